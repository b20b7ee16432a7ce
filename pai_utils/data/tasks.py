"""Image classification tasks: three fixed parts that share nothing and depend on no seed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray

from pai_utils.data.datasets import DATASETS, FOLDER, open_dataset
from pai_utils.data.decoding import ImageFiles, OnError, Positions, decode
from pai_utils.data.embedded import FRACTIONS, SPLITS, cut, stratified_order
from pai_utils.data.images import ImageDataset, Transform
from pai_utils.support.common import check_names, listed, logger
from pai_utils.support.sampling import check_seed


@dataclass(frozen=True)
class Task:
    """A classification task with fixed, disjoint parts."""

    name: str
    class_names: tuple[str, ...]  #: in the order of the labels
    train: ImageDataset  #: fits heads, scores weights, fine-tunes
    validation: ImageDataset  #: chooses hyper-parameters
    test: ImageDataset  #: read once, for the reported number
    skipped: tuple[str, ...] = ()  #: files that could not be read and were left out

    @property
    def chance(self) -> float:
        """Accuracy of always answering the most frequent class of `test`."""
        return float(self.test.labels.bincount().max()) / len(self.test)


def load_task(
    name: str,
    transform: Transform,
    root: str | Path | None = None,
    *,
    train_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
    download: bool | None = None,
    on_error: OnError = "raise",
) -> Task:
    """Load a task, with its images prepared for one encoder.

    Data sets on disk keep their published splits. A validation split that is not published is a
    tenth of the training split; a set published whole is cut into three. Both cuts keep the
    proportions of the classes.

    Args:
        name: a key of `TASKS` (shipped by packages) or of `datasets.DATASETS` (on disk), or
            `folder:<path>` for class folders with images, alone or under folders for the parts:
            `train`, `val` and `test`, or what else tools call them (`Training`, `valid`, `dev`,
            `test_set`). Without a test, the validation part is the test. Hidden files are ignored;
            others that are not read, and images that lie in two parts, are logged.
        transform: `backbone.transform`, or any callable from a PIL image to a float tensor
            [3, H, W]; image files of any size need the former.
        root: folder of data sets on disk, and of a relative `folder:` that is not in the working
            directory. Default: `PAI_DATA_ROOT`, then `~/.cache/pai_utils/data`.
        train_size: number of training items to keep. Default: all. The choice keeps the
            proportions of the classes, and a smaller one is contained in a larger one.
        test_size: the same for the test items.
        seed: of these choices.
        download: fetch a data set that is missing. Default: whether `PAI_DOWNLOAD` is 1.
        on_error: "raise" at an image file that cannot be read, or "skip" and log it.

    Raises:
        ValueError: an unknown task, a size below 1 or above what there is, corrupt data, or a
            folder with fewer than two classes or a class without images.
        FileNotFoundError: the data set is not on disk; the message says what fetches it.
        ConnectionError: it was to be fetched and its publisher cannot be reached.
        ModuleNotFoundError: the package that ships the images is not installed.

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
    if not callable(transform):
        raise ValueError(f"transform must be callable, got {transform!r}; pass backbone.transform")
    check_seed(seed)
    check_names("on_error", [on_error], get_args(OnError))
    opened = open_dataset(name, root, download=download)
    sizes = {"train": train_size, "test": test_size}
    chosen = {}
    published = {part: source.labels for part, source in opened.parts.items()}
    for split, (part, positions) in _splits_of(published).items():
        source = opened.parts[part]
        labels = source.labels[positions]
        absent = set(range(len(opened.class_names))) - set(labels.tolist())
        if absent and split != "validation":
            raise ValueError(
                f"the {split} part of {name} has no images of the class "
                f"{opened.class_names[min(absent)]!r}; each class needs several"
            )
        if not len(labels):
            raise ValueError(f"{name} has too few images to carve a validation part from them")
        if (size := sizes.get(split)) is not None:
            check_size(size, len(labels), split, name)
            generator = np.random.default_rng([seed, SPLITS.index(split)])
            positions = positions[np.sort(stratified_order(labels, generator)[:size])]
        chosen[split] = source, positions
    datasets, files, skipped = {}, {}, list[str]()
    for split, (source, positions) in chosen.items():
        what = f"{name} {split}"
        images, kept = decode(source, positions, transform, name=what, on_error=on_error)
        labels = source.labels[kept]
        if lost := set(source.labels[positions].tolist()) - set(labels.tolist()):
            raise ValueError(
                f"no image of the class {opened.class_names[min(lost)]!r} in the {split} part of "
                f"{name} can be read"
            )
        datasets[split] = ImageDataset(images, torch.from_numpy(labels), transform)
        if isinstance(source, ImageFiles):
            files[split] = [source.paths[i] for i in kept]
            skipped += [str(source.paths[i]) for i in np.setdiff1d(positions, kept)]
    if skipped:
        logger.warning(
            "%s: %d images cannot be read and are left out: %s", name, len(skipped), listed(skipped)
        )
    if name.startswith(FOLDER):  # published sets are what they are
        _warn_of_copies(name, datasets, files)
    return Task(name, opened.class_names, **datasets, skipped=tuple(skipped))


def _warn_of_copies(
    name: str, parts: Mapping[str, ImageDataset], files: Mapping[str, Sequence[Path]]
) -> None:
    """Say which images have the pixels of one in an earlier part."""
    first: dict[bytes, tuple[Path, str]] = {}
    copies = []
    for part, data in parts.items():
        for file, pixels in zip(files[part], data.images.numpy(), strict=True):
            found, where = first.setdefault(hashlib.sha256(pixels.data).digest(), (file, part))
            if where != part:
                copies.append(f"{file} ({part}) of {found} ({where})")
    if copies:
        logger.warning(
            "%s: %d images are copies of one in another part, so that accuracy is not on unseen "
            "images; delete them: %s", name, len(copies), listed(copies),
        )  # fmt: skip


def _splits_of(labels: Mapping[str, NDArray[np.int64]]) -> dict[str, tuple[str, Positions]]:
    """The published part that each split comes from, and the positions there that belong to it."""
    if "all" in labels:
        parts = cut(labels["all"], FRACTIONS)
        return {split: ("all", np.sort(parts[split])) for split in SPLITS}
    found = {part: (part, np.arange(len(labels[part]))) for part in labels}
    if "validation" not in labels:  # a tenth of the published training split
        parts = cut(labels["train"], {"validation": 0.1, "train": 0.9})
        found |= {split: ("train", np.sort(parts[split])) for split in parts}
    return {split: found[split] for split in SPLITS}


@cache
def part_sizes(name: str) -> dict[str, int]:
    """Number of images in each part of a task; of a data set on disk the published one."""
    if name in DATASETS:  # the labels change which images a cut gives, not how many
        labels = {part: np.zeros(n, np.int64) for part, n in DATASETS[name].images.items()}
    else:
        labels = {part: source.labels for part, source in open_dataset(name).parts.items()}
    return {split: len(positions) for split, (_, positions) in _splits_of(labels).items()}


def check_size(size: int, available: int, split: str, name: str) -> None:
    """Refuse a number of items that is none, or that a part does not have."""
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= available:
        raise ValueError(
            f"{split}_size must be between 1 and {available}, the number of {split} items of "
            f"{name}; got {size!r}"
        )
