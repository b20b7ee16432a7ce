"""Data sets on disk: how each is found, fetched and read.

torchvision reads the sets of `DATASETS` from the layout that its own downloads make under one root
folder; `datasets.toml` holds the facts about them. `folder:<path>` names any folder of images.
"""

from __future__ import annotations

import inspect
import os
import re
import tomllib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
from filelock import FileLock

from pai_utils.data.decoding import ImageArrays, ImageFiles, Source
from pai_utils.data.embedded import TASKS
from pai_utils.support.common import listed, logger, may_download, unknown_name
from pai_utils.support.stored import located

FOLDER = "folder:"
Part = tuple[tuple[str, ...], Source]
"""Class names, and images with labels."""
# What common tools call the parts of a set in folders; the datasets package knows the same names.
_PARTS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("val", "valid", "validation", "dev"),
}
# What systems and tools put among people's files, beside names with a dot in front.
_SYSTEM = ("__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "System Volume Information")


@dataclass(frozen=True)
class DatasetSpec:
    """Facts about one data set, as in `datasets.toml`."""

    description: str
    licence: str  #: as published
    images: Mapping[str, int]
    """Published number by part: "train" and "test", perhaps "validation"; or "all" for a set
    published whole, which is cut into the three parts. Without "validation", it is carved from
    "train"."""
    megabytes: int  #: to download, roughly
    place: str  #: what lies under the root when the set is there
    base: str = ""  #: folder under the root that torchvision is given
    kind: str = ""  #: torchvision's class, where it has another name
    splits: Mapping[str, str] = field(default_factory=dict)
    """torchvision's names of parts, where they are not "train", "val" and "test"."""
    classes: Sequence[str] = ()  #: names in the order of the labels, where torchvision has none
    by_hand: str = ""  #: how to get what torchvision cannot download


_FACTS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
DATASETS = {name: DatasetSpec(**facts) for name, facts in _FACTS.items()}
"""Data sets that can be loaded by name."""


@dataclass(frozen=True)
class OpenDataset:
    """A data set whose images are listed but not decoded yet."""

    class_names: tuple[str, ...]
    parts: Mapping[str, Source]  #: by part, as in `DatasetSpec.images`


def data_root(root: str | Path | None = None) -> Path:
    """The folder of data sets: `root`, else `PAI_DATA_ROOT`, else one under `~/.cache`."""
    return located(root or os.environ.get("PAI_DATA_ROOT") or "~/.cache/pai_utils/data")


def check_task_name(name: str, *, unlisted: Iterable[str] = ()) -> None:
    """Refuse what names no task; ``unlisted`` says what else may have been meant."""
    if name not in TASKS and name not in DATASETS and not name.startswith(FOLDER):
        raise unknown_name("task", name, TASKS, unlisted=[*DATASETS, *unlisted])


def open_dataset(
    name: str, root: str | Path | None = None, *, download: bool | None = None
) -> OpenDataset:
    """Find a data set and list its images; arguments and errors are those of `load_task`."""
    check_task_name(name)
    if name in TASKS:
        return OpenDataset(TASKS[name].class_names, TASKS[name].read())
    home = data_root(root)
    if name.startswith(FOLDER):
        given = located(name.removeprefix(FOLDER))
        home = given if given.is_dir() else home / given
        read = _read_folder(home, name)
    else:
        spec = DATASETS[name]
        fetched = may_download(download) and not spec.by_hand
        read = {part: _read_part(name, part, home, fetched) for part in spec.images}
        count = sum(len(source.labels) for _, source in read.values())
        if count != (published := sum(spec.images.values())):
            logger.warning(
                "%s under %s has %d images, %d are published; was it unpacked to the end?",
                name, home / spec.place, count, published,
            )  # fmt: skip
    names, *others = (classes for classes, _ in read.values())
    for other in others:
        if other != names:
            classes = listed(map(repr, sorted(set(names) ^ set(other)))) or "by their order"
            cure = f"; it is incomplete. {_how_to_fetch(name, home)}" if name in DATASETS else ""
            raise ValueError(
                f"the splits of {name} under {home} differ in the classes {classes}{cure}"
            )
    parts = {part: source for part, (_, source) in read.items()}
    _check_classes(names, parts, name)
    return OpenDataset(names, parts)


def _read_part(name: str, part: str, root: Path, fetched: bool) -> Part:
    """Read one part through torchvision."""
    from torchvision import datasets

    spec = DATASETS[name]
    kind = getattr(datasets, spec.kind or name)
    keywords: dict[str, Any] = {}
    if "train" in inspect.signature(kind).parameters:
        keywords["train"] = part == "train"
    elif part != "all":
        keywords["split"] = spec.splits.get(part, "val" if part == "validation" else part)
    if fetched:
        (root / spec.base).mkdir(parents=True, exist_ok=True)
        keywords["download"] = True
    # Of several processes that want a set, one downloads. Where nobody may write, it must be there.
    alone = fetched and os.access(root, os.W_OK)
    try:
        with FileLock(root / f".{name}.lock") if alone else nullcontext():
            published = kind(str(root / spec.base), **keywords)
        return _class_names(spec, published), _images(published)
    except Exception as error:  # of torchvision, NumPy and SciPy, at missing or altered files
        place, cure = root / spec.place, _how_to_fetch(name, root)
        absent = not place.exists() or (place.is_dir() and not any(place.iterdir()))
        if isinstance(error, URLError) or (absent and fetched):
            raise ConnectionError(f"{name} could not be fetched: {error}") from error
        if absent:
            raise FileNotFoundError(f"{name} is not at {place}. {cure}") from error
        raise ValueError(
            f"{name} at {place} is incomplete or corrupt ({error}); delete it. {cure}"
        ) from error


def _class_names(spec: DatasetSpec, published: Any) -> tuple[str, ...]:
    names = list(spec.classes or published.classes)
    if hasattr(published, "wnids"):  # ImageNet: two pairs of classes share their synonyms
        names = [", ".join(synonyms) for synonyms in names]
        repeated = {label for label in names if names.count(label) > 1}
        ids = zip(names, published.wnids, strict=True)
        names = [f"{label} ({wnid})" if label in repeated else label for label, wnid in ids]
    return tuple(names)


def _images(published: Any) -> Source:
    """Images and labels of torchvision's data set object; files are not read."""
    kind = type(published).__name__
    if hasattr(published, "data"):
        pixels = np.asarray(published.data)
        if pixels.ndim == 4 and pixels.shape[1] == 3:
            pixels = np.transpose(pixels, (0, 2, 3, 1))
        labels = published.targets if hasattr(published, "targets") else published.labels
        return ImageArrays(pixels, np.asarray(labels, dtype=np.int64))
    if kind == "GTSRB":  # this class and the next take no loader
        return _files(published._samples)
    if kind == "OxfordIIITPet":
        return _files(zip(published._images, published._labels, strict=True))
    published.loader = lambda path: path
    items = [published[index] for index in range(len(published))]
    return _files(sorted(items) if kind == "SUN397" else items)  # which is in the disk's order


def _files(items: Iterable[tuple[str | Path, int]]) -> ImageFiles:
    paths, labels = zip(*items, strict=True)
    return ImageFiles(tuple(map(Path, paths)), np.asarray(labels, dtype=np.int64))


def _how_to_fetch(name: str, root: Path) -> str:
    spec = DATASETS[name]
    if spec.by_hand:
        return f"{spec.by_hand} (licence: {spec.licence})"
    call = f"open_dataset({name!r}, {str(root)!r}, download=True)"
    return (
        f"To fetch it ({spec.megabytes:,} MB; licence: {spec.licence}), run\n"
        f'  python -c "from pai_utils.data.datasets import open_dataset; {call}"\n'
        "or pass download=True, or set PAI_DOWNLOAD=1"
    )


def _check_classes(names: Sequence[str], parts: Mapping[str, Source], name: str) -> None:
    """Refuse fewer than two classes, names that repeat and labels that have none."""
    folded = [unicodedata.normalize("NFC", label).casefold() for label in names]
    repeated = [label for label, key in zip(names, folded, strict=True) if folded.count(key) > 1]
    if repeated:
        raise ValueError(f"class names of {name} repeat: {listed(map(repr, repeated))}")
    if len(names) < 2:
        raise ValueError(
            f"{name} has one class only: {listed(map(repr, names))}; at least two are needed"
        )
    for part, source in parts.items():
        least, most = source.labels.min(initial=0), source.labels.max(initial=0)
        if least < 0 or most >= len(names):
            raise ValueError(
                f"{name} has {len(names)} classes but its {part} labels run from {least} to {most}"
            )


def _read_folder(path: Path, name: str) -> Mapping[str, Part]:
    """The parts of a folder of class folders, or of folders for parts with such."""
    if name == FOLDER:
        raise ValueError("a folder task needs a path, as in 'folder:path/to/images'")
    if not path.is_dir():
        raise FileNotFoundError(
            f"{name}: there is no folder {path}; give one of class folders with images, or one "
            "with train/ and test/ made of class folders"
        )
    folders = _class_folders(path)
    named = {folder: part for folder in folders if (part := _part_of(folder))}
    parts = {part: path / folder for folder, part in named.items()}
    has = f"{path} has {' and '.join(f'{folder}/' for folder in named)}"
    if "train" in parts and len(parts) > 1:
        if len(parts) < len(named):
            raise ValueError(f"{has}, two of which are one part; keep one of them")
        if "test" not in parts:  # then the validation part is the test
            parts["test"] = parts.pop("validation")
    elif named and len(named) == len(folders):
        raise ValueError(f"{has} only; give train/ and test/, or train/ and val/")
    else:
        parts = {"all": path}
    read = {part: _read_classes(folder) for part, folder in parts.items()}
    taken = {file for _, source in read.values() for file in source.paths}
    unread = [file for file in _visible_files(path) if file not in taken]
    if counts := Counter(map(_ending, unread)):
        logger.warning(
            "%s: %d files that are in no class folder, or have no ending of an image that Pillow "
            "reads, are left out: %s; the first is %s", name, len(unread),
            ", ".join(f"{count} {ending}" for ending, count in counts.most_common()), unread[0],
        )  # fmt: skip
    return read


def _part_of(folder: str) -> str:
    """The part that a folder's name stands for, in any case and as in "test_set"; "" if none."""
    word = re.sub(r"([\W_]|images|data|set)+$", "", folder.casefold())
    return next((part for part, names in _PARTS.items() if word in names), "")


def _visible(name: str) -> bool:
    return not name.startswith(".") and name not in _SYSTEM


def _class_folders(path: Path) -> tuple[str, ...]:
    return tuple(sorted(e.name for e in path.iterdir() if e.is_dir() and _visible(e.name)))


def _visible_files(folder: Path) -> list[Path]:
    """All files below a folder that are not hidden, nor in a hidden folder, in order."""

    def fail(error: OSError) -> None:
        raise error

    found = []
    for place, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = filter(_visible, folders)
        found.append((place, sorted(filter(_visible, files))))
    return [Path(place, file) for place, files in sorted(found) for file in files]


def _ending(path: Path) -> str:
    return path.suffix.casefold() or "without an ending"


def _read_classes(folder: Path) -> tuple[tuple[str, ...], ImageFiles]:
    """Names of the class folders, and the image files below each with the class as label."""
    from PIL import Image

    names = _class_folders(folder)
    if not names:
        raise ValueError(f"{folder} has no class folders")
    # Pillow also knows films, documents and tables, which it cannot decode by itself.
    kinds = Image.registered_extensions().items()
    endings = {end for end, kind in kinds if Image.MIME.get(kind, "").startswith("image/")}
    files = [(file, i) for i, label in enumerate(names) for file in _visible_files(folder / label)]
    items = [(file, index) for file, index in files if _ending(file) in endings]
    if empty := sorted({*names} - {names[index] for _, index in items}):
        others = listed(sorted({_ending(file) for file, _ in files} - endings)) or "none"
        raise ValueError(
            f"{folder} has no images of the classes {listed(map(repr, empty))}; files that Pillow "
            f"knows for no image: {others}"
        )
    return names, _files(items)
