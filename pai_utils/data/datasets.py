"""Data sets on disk: one table of facts, and how each is found, fetched and read.

The sets of `DATASETS` are read by torchvision from the layout its own downloads make under one
root folder, `PAI_DATA_ROOT` or `~/.cache/pai_utils/data`. `folder:<path>` names any folder of
images. Nothing is fetched unless it is asked for, by `download=True` or `PAI_DOWNLOAD=1`.
"""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import lzma
import os
import pickle
import string
import tarfile
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
from filelock import FileLock

from pai_utils.data.decoding import ImageArrays, ImageFiles, Source
from pai_utils.support.common import listed, logger, may_download, unknown_name

FOLDER = "folder:"
"""What the name of a task made of a folder of images starts with."""
_DEFAULT_ROOT = "~/.cache/pai_utils/data"
_CACHE_FOLDER = ".decoded"
_BROKEN_ARCHIVE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    lzma.LZMAError,
    zlib.error,
    EOFError,
)
# What torchvision, numpy and scipy raise for missing, truncated or altered files.
_UNREADABLE = (
    *_BROKEN_ARCHIVE,
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AssertionError,
    NotImplementedError,
    pickle.UnpicklingError,
)
Checksums = Iterable[tuple[str, str]]


@dataclass(frozen=True)
class DatasetSpec:
    """Facts about one data set."""

    description: str
    splits: Mapping[str, Mapping[str, Any]]
    """Keywords of torchvision's class by part: "train" and "test", perhaps "validation"; or "all"
    for a set published whole, which is cut into the three parts. Where there is no "validation",
    it is carved from "train"."""
    read: Callable[[Any], Source]
    """Images and labels of torchvision's data set object."""
    class_names: Callable[[Any], Sequence[str]]
    """In the order of the labels, from torchvision's object."""
    place: str
    """What lies under the root when the set is there."""
    licence: str
    """As published; "none stated" where the publisher states none."""
    images: Mapping[str, int]
    """Published number by part, as in `splits`."""
    megabytes: int
    """To download, roughly."""
    archives: str = ""
    """Pattern of the downloaded files under the root."""
    base: str = ""
    """Folder under the root that torchvision is given."""
    kind: str = ""
    """torchvision's class, where it has another name."""
    by_hand: str = ""
    """How to get what torchvision cannot download."""
    package: str = ""
    """A further package that torchvision reads it with."""
    checksums: Callable[[Any, Mapping[str, Any]], Checksums] = lambda kind, keywords: ()
    """Paths under the root, and MD5 sums, that torchvision checks before it reads."""
    options: Mapping[str, Any] | None = None
    """Further keywords of torchvision's class for every split."""


@dataclass(frozen=True)
class OpenDataset:
    """A data set whose images are listed but not decoded yet."""

    class_names: tuple[str, ...]
    parts: dict[str, Source]
    """By part, as in `DatasetSpec.splits`."""
    cache: Path
    """Folder for decoded pixels, beside the data where that can be written to."""


def data_root(root: str | Path | None = None) -> Path:
    """The folder of data sets: `root`, else `PAI_DATA_ROOT`, else one under `~/.cache`."""
    return Path(root or os.environ.get("PAI_DATA_ROOT") or _DEFAULT_ROOT).expanduser()


def fetch(name: str, root: str | Path | None = None) -> None:
    """Download a data set, unless it is there.

    Args:
        name: a key of `DATASETS`.
        root: folder of data sets. Default: see `data_root`.

    Raises:
        ValueError: an unknown name, or a download that is corrupt.
        ConnectionError: its publisher cannot be reached.
        FileNotFoundError: it is not there and can only be fetched by hand.
    """
    if name not in DATASETS:
        raise unknown_name("data set", name, DATASETS)
    open_dataset(name, root, download=True)


def open_dataset(
    name: str, root: str | Path | None = None, *, download: bool | None = None
) -> OpenDataset:
    """Find a data set and list its images.

    Args:
        name: a key of `DATASETS`, or `folder:<path>`.
        root: folder of data sets. The path of a `folder:` is looked for in the working directory
            and then there.
        download: fetch what is missing. Default: whether `PAI_DOWNLOAD` is 1.

    Raises:
        FileNotFoundError: the data is not there; the message says what fetches it.
        ValueError: it is incomplete, corrupt, or no set of at least two classes with images each.
        ConnectionError: it was to be fetched and its publisher cannot be reached.
        ModuleNotFoundError: a package that it is read with is not installed.
    """
    if name.startswith(FOLDER):
        given = Path(name.removeprefix(FOLDER)).expanduser()
        beside = data_root(root) / given  # an absolute path stays what it is
        return _open_folder(given if given.is_dir() else beside, name)
    place = data_root(root)
    download = may_download(download)
    spec = DATASETS[name]
    if spec.package and importlib.util.find_spec(spec.package) is None:
        raise ModuleNotFoundError(
            f"{name} is read with the package {spec.package}, which is not installed; install "
            f"{spec.package}",
            name=spec.package,
        )
    found: dict[str, tuple[str, ...]] = {}
    parts = {}
    for part in spec.splits:
        found[part], parts[part] = _read_split(name, spec, part, place, download)
    names, *others = found.values()
    if any(other != names for other in others):
        raise ValueError(
            f"the splits of {name} under {place / spec.place} have different classes; the set is "
            f"incomplete. {_how_to_fetch(name, spec, place)}"
        )
    _check_classes(names, parts, name)
    count = sum(len(source.labels) for source in parts.values())
    if count != sum(spec.images.values()):
        logger.warning(
            "%s under %s has %d images, %d are published; was it unpacked to the end?",
            name,
            place / spec.place,
            count,
            sum(spec.images.values()),
        )
    return OpenDataset(names, parts, _cache_folder(place))


def _read_split(
    name: str, spec: DatasetSpec, part: str, root: Path, download: bool
) -> tuple[tuple[str, ...], Source]:
    """Class names and images of one split, through torchvision."""
    from scipy.io.matlab import MatReadError
    from torchvision import datasets

    kind = getattr(datasets, spec.kind or name)
    keywords = {**spec.splits[part], **(spec.options or {})}
    if download and not spec.by_hand:
        (root / spec.base).mkdir(parents=True, exist_ok=True)
        keywords["download"] = True
    try:
        with _fetching_alone(name, root) if "download" in keywords else nullcontext():
            published = kind(str(root / spec.base), **keywords)
        return tuple(spec.class_names(published)), spec.read(published)
    except (*_UNREADABLE, MatReadError) as error:
        raise _explained(error, name, spec, spec.splits[part], root, download) from error


def _fetching_alone(name: str, root: Path) -> AbstractContextManager[object]:
    """Of several processes that want a set, one downloads and the others wait for it."""
    writable = os.access(root, os.W_OK)  # otherwise it can only be there already
    return FileLock(root / f".{name}.lock") if writable else nullcontext()


def _explained(
    error: Exception,
    name: str,
    spec: DatasetSpec,
    split: Mapping[str, Any],
    root: Path,
    download: bool,
) -> Exception:
    """The error that says which file is missing or corrupt, and what to do."""
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity

    cure = _how_to_fetch(name, spec, root)
    if isinstance(error, URLError):
        return ConnectionError(f"{name} could not be fetched: {error}")
    archives = sorted(root.glob(spec.archives)) if spec.archives else []
    if isinstance(error, _BROKEN_ARCHIVE):
        archive = next(_broken_archives(archives), root / spec.place)
        return ValueError(f"{archive} of {name} is corrupt ({error}); delete it. {cure}")
    place = root / spec.place
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        if download and not spec.by_hand:
            if archives:
                last = max(archives, key=lambda path: path.stat().st_mtime)
                return ValueError(f"{last} of {name} is corrupt ({error}); delete it. {cure}")
            return ConnectionError(f"{name} could not be fetched: {error}")
        return FileNotFoundError(f"{name} is not at {place}. {cure}")
    for file, md5 in spec.checksums(getattr(datasets, spec.kind or name), split):
        path = root / file
        if not path.exists():
            return FileNotFoundError(f"{path} of {name} is missing. {cure}")
        if not check_integrity(path, md5):
            return ValueError(f"{path} of {name} is corrupt; delete it. {cure}")
    text = f"{name} at {place} is incomplete or corrupt ({error}); delete it. {cure}"
    return (FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError)(text)


def _how_to_fetch(name: str, spec: DatasetSpec, root: Path) -> str:
    if spec.by_hand:
        return f"{spec.by_hand} (licence: {spec.licence})"
    return (
        f"To fetch it ({spec.megabytes:,} MB; licence: {spec.licence}), run\n"
        f'  python -c "from pai_utils.data.datasets import fetch; fetch({name!r}, {str(root)!r})"\n'
        "or pass download=True, or set PAI_DOWNLOAD=1"
    )


def _broken_archives(paths: Iterable[Path]) -> Iterator[Path]:
    """Those of the archives that cannot be read to their end."""
    openers: dict[str, Callable[[Path], Any]] = {
        ".gz": gzip.open,
        ".tgz": gzip.open,
        ".bz2": bz2.open,
        ".xz": lzma.open,
    }
    for path in paths:
        try:
            if path.suffix == ".zip":
                with zipfile.ZipFile(path) as archive:
                    whole = archive.testzip() is None
            else:
                with openers.get(path.suffix, Path.open)(path) as file:
                    while file.read(2**20):
                        pass
                whole = ".tar" not in path.name and path.suffix != ".tgz"
                whole = whole or tarfile.is_tarfile(path)
        except (*_BROKEN_ARCHIVE, OSError):
            whole = False
        if not whole:
            yield path


def _cache_folder(root: Path) -> Path:
    """Where decoded pixels go; data may lie where nobody may write."""
    return (root if os.access(root, os.W_OK) else data_root()) / _CACHE_FOLDER


def _check_classes(names: Sequence[str], parts: Mapping[str, Source], name: str) -> None:
    """Refuse fewer than two classes, names that repeat and labels that have none."""
    repeated = [label for label, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"class names of {name} repeat: {listed(map(repr, repeated))}")
    if len(names) < 2:
        raise ValueError(
            f"{name} has one class only: {listed(map(repr, names))}; at least two are needed"
        )
    for part, source in parts.items():
        labels = source.labels
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(names):
            raise ValueError(
                f"{name} has {len(names)} classes but its {part} labels run from {labels.min()} to "
                f"{labels.max()}"
            )


def _open_folder(path: Path, name: str) -> OpenDataset:
    """A folder of class folders, or of `train`, `val` or `validation`, and `test` with such."""
    if name == FOLDER:
        raise ValueError("a folder task needs a path, as in 'folder:path/to/images'")
    if not path.is_dir():
        raise FileNotFoundError(
            f"{name}: there is no folder {path}; give one of class folders with images, or one "
            "with train/ and test/ made of class folders"
        )
    splits = _splits_of(path)
    names = _class_folders(next(iter(splits.values())))
    for folder in splits.values():
        differing = sorted(set(names) ^ set(_class_folders(folder)))
        if differing:
            raise ValueError(
                f"{name}: the splits differ in the classes {listed(map(repr, differing))}"
            )
    parts: dict[str, Source] = {
        part: _list_images(folder, names, name) for part, folder in splits.items()
    }
    folded = [unicodedata.normalize("NFC", label).casefold() for label in names]
    repeated = [label for label, key in zip(names, folded, strict=True) if Counter(folded)[key] > 1]
    if repeated:
        raise ValueError(f"class names of {name} repeat: {listed(map(repr, repeated))}")
    _check_classes(names, parts, name)
    return OpenDataset(names, parts, _cache_folder(path))


def _splits_of(path: Path) -> dict[str, Path]:
    """Folders of the parts. Without `test/`, `val/` is the test and validation is carved."""
    folders = _class_folders(path)
    if "train" not in folders or not set(folders) <= {"train", "val", "validation", "test"}:
        return {"all": path}
    validation = [folder for folder in ("val", "validation") if folder in folders]
    if len(validation) == 2:
        raise ValueError(f"{path} has val/ and validation/; keep one of them")
    if "test" in folders:
        parts = {"train": path / "train", "test": path / "test"}
        return parts | ({"validation": path / validation[0]} if validation else {})
    if validation:
        return {"train": path / "train", "test": path / validation[0]}
    raise ValueError(f"{path} has train/ but neither test/ nor val/")


def _class_folders(path: Path) -> tuple[str, ...]:
    """Names of the folders inside that are not hidden, in order."""
    return tuple(
        sorted(e.name for e in path.iterdir() if e.is_dir() and not e.name.startswith("."))
    )


def _list_images(folder: Path, names: Sequence[str], name: str) -> ImageFiles:
    """Image files below each class folder, with the class as label."""
    from torchvision.datasets.folder import is_image_file, make_dataset

    def is_image(path: str) -> bool:
        return is_image_file(path) and not Path(path).name.startswith(".")

    if not names:
        raise ValueError(f"{name}: {folder} has no class folders")
    indices = {label: index for index, label in enumerate(names)}
    items = make_dataset(folder, indices, is_valid_file=is_image, allow_empty=True)
    present = {label for _, label in items}
    empty = [label for label, index in indices.items() if index not in present]
    if empty:
        raise ValueError(
            f"{name}: {folder} has no images of the classes {listed(map(repr, empty))}"
        )
    return _files(items)


def _files(items: Iterable[tuple[str | Path, int]]) -> ImageFiles:
    paths, labels = zip(*items, strict=True)
    return ImageFiles(tuple(map(Path, paths)), np.asarray(labels, dtype=np.int64))


def _unread(path: str | Path) -> str | Path:
    """A loader for torchvision that leaves the file to us."""
    return path


def _listed(published: Any) -> ImageFiles:
    """Paths and labels of a data set made with the loader `_unread`."""
    return _files(published[index] for index in range(len(published)))


def _sorted(published: Any) -> ImageFiles:
    """The same, where torchvision keeps the order of the disk."""
    return _files(sorted(published[index] for index in range(len(published))))


def _arrays(pixels: Any, labels: Any) -> ImageArrays:
    return ImageArrays(np.asarray(pixels), np.asarray(labels, dtype=np.int64))


def _with_targets(published: Any) -> ImageArrays:
    return _arrays(published.data, published.targets)


def _channels_first(published: Any) -> ImageArrays:
    return _arrays(np.transpose(published.data, (0, 2, 3, 1)), published.labels)


def _pcam(published: Any) -> ImageArrays:
    """Read through h5py from the disk, a few images at a time."""
    names = {kind: entry[0] for kind, entry in published._FILES[published._split].items()}
    folder = Path(published.root) / "pcam"
    with published.h5py.File(folder / names["targets"]) as file:
        labels = np.asarray(file["y"][:], dtype=np.int64).reshape(-1)
    path = folder / names["images"]
    found = path.stat()
    return ImageArrays(
        published.h5py.File(path)["x"], labels, f"{path} {found.st_size} {found.st_mtime_ns}"
    )


def _classes(published: Any) -> Sequence[str]:
    names: Sequence[str] = published.classes
    return names


def _named(*names: str) -> Callable[[Any], Sequence[str]]:
    return lambda published: names


def _resisc45_names(published: Any) -> Sequence[str]:
    if len(published.classes) != 45:
        raise ValueError(f"it has 45 class folders, not {len(published.classes)}")
    return _classes(published)


def _imagenet_names(published: Any) -> Sequence[str]:
    """Synonyms of each class; two pairs of classes share them and are told apart by their id."""
    names = [", ".join(synonyms) for synonyms in published.classes]
    counts = Counter(names)
    return [
        f"{label} ({wnid})" if counts[label] > 1 else label
        for label, wnid in zip(names, published.wnids, strict=True)
    ]


def _cifar_sums(kind: Any, split: Mapping[str, Any]) -> Checksums:
    files = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
    return ((f"{kind.base_folder}/{file}", md5) for file, md5 in files)


def _svhn_sums(kind: Any, split: Mapping[str, Any]) -> Checksums:
    _, file, md5 = kind.split_list[split["split"]]
    return [(file, md5)]


def _stl10_sums(kind: Any, split: Mapping[str, Any]) -> Checksums:
    return ((f"{kind.base_folder}/{f}", md5) for f, md5 in (*kind.train_list, *kind.test_list))


def _flowers_sums(kind: Any, split: Mapping[str, Any]) -> Checksums:
    return ((f"flowers-102/{f}", md5) for f, md5 in map(kind._file_dict.get, ("label", "setid")))


_BY_TRAIN: dict[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
_TRAIN_TEST: dict[str, dict[str, Any]] = {"train": {"split": "train"}, "test": {"split": "test"}}
_TRAIN_VAL_TEST: dict[str, dict[str, Any]] = {
    "train": {"split": "train"},
    "validation": {"split": "val"},
    "test": {"split": "test"},
}
_WHOLE: dict[str, dict[str, Any]] = {"all": {}}
_PATHS = {"loader": _unread}
_DIGITS = _named(*string.digits)
# Meanings of the signs, which the data set numbers only.
_SPEED = [f"speed limit {limit} km/h" for limit in (20, 30, 50, 60, 70, 80)]
_SIGNS = (
    *_SPEED,
    "end of speed limit 80 km/h",
    "speed limit 100 km/h",
    "speed limit 120 km/h",
    "no overtaking",
    "no overtaking for lorries",
    "right of way at the next crossing",
    "priority road",
    "give way",
    "stop",
    "no vehicles",
    "no lorries",
    "no entry",
    "danger",
    "bend to the left",
    "bend to the right",
    "double bend",
    "uneven road",
    "slippery road",
    "road narrows on the right",
    "road works",
    "traffic lights",
    "pedestrians",
    "children",
    "cyclists",
    "snow or ice",
    "wild animals",
    "end of all limits",
    "turn right ahead",
    "turn left ahead",
    "straight ahead only",
    "straight ahead or right",
    "straight ahead or left",
    "keep right",
    "keep left",
    "roundabout",
    "end of no overtaking",
    "end of no overtaking for lorries",
)
DATASETS: dict[str, DatasetSpec] = {
    "MNIST": DatasetSpec(
        "handwritten digits, grey, 28 x 28 pixels",
        _BY_TRAIN,
        _with_targets,
        _DIGITS,
        place="MNIST/raw",
        licence="CC BY-SA 3.0 (as Keras states it)",
        images={"train": 60_000, "test": 10_000},
        megabytes=12,
        archives="MNIST/raw/*.gz",
    ),
    "FashionMNIST": DatasetSpec(
        "articles of clothing, grey, 28 x 28 pixels",
        _BY_TRAIN,
        _with_targets,
        _classes,
        place="FashionMNIST/raw",
        licence="MIT",
        images={"train": 60_000, "test": 10_000},
        megabytes=31,
        archives="FashionMNIST/raw/*.gz",
    ),
    "KMNIST": DatasetSpec(
        "cursive Japanese characters, grey, 28 x 28 pixels",
        _BY_TRAIN,
        _with_targets,
        _classes,
        place="KMNIST/raw",
        licence="CC BY-SA 4.0",
        images={"train": 60_000, "test": 10_000},
        megabytes=21,
        archives="KMNIST/raw/*.gz",
    ),
    # Published as pickles. torchvision compares each file with the publisher's MD5 sum before it
    # reads it, so that only those very files are ever unpickled.
    "CIFAR10": DatasetSpec(
        "animals and vehicles, 32 x 32 pixels",
        _BY_TRAIN,
        _with_targets,
        _classes,
        place="cifar-10-batches-py",
        licence="none stated",
        images={"train": 50_000, "test": 10_000},
        megabytes=170,
        archives="cifar-10-python.tar.gz",
        checksums=_cifar_sums,
    ),
    "CIFAR100": DatasetSpec(
        "100 kinds of objects and animals, 32 x 32 pixels",
        _BY_TRAIN,
        _with_targets,
        _classes,
        place="cifar-100-python",
        licence="none stated",
        images={"train": 50_000, "test": 10_000},
        megabytes=170,
        archives="cifar-100-python.tar.gz",
        checksums=_cifar_sums,
    ),
    "SVHN": DatasetSpec(
        "digits of house numbers, 32 x 32 pixels",
        _TRAIN_TEST,
        _channels_first,
        _DIGITS,
        place="train_32x32.mat",
        licence="non-commercial use only",
        images={"train": 73_257, "test": 26_032},
        megabytes=250,
        checksums=_svhn_sums,
    ),
    "STL10": DatasetSpec(
        "animals and vehicles, 96 x 96 pixels; the unlabelled images are not used",
        _TRAIN_TEST,
        _channels_first,
        _named("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"),
        place="stl10_binary",
        licence="none stated",
        images={"train": 5_000, "test": 8_000},
        megabytes=2_640,
        archives="stl10_binary.tar.gz",
        checksums=_stl10_sums,
    ),
    "EuroSAT": DatasetSpec(
        "land use seen by a satellite, 64 x 64 pixels",
        _WHOLE,
        _listed,
        _classes,
        place="eurosat/2750",
        licence="MIT",
        images={"all": 27_000},
        megabytes=94,
        archives="eurosat/*.zip",
        options=_PATHS,
    ),
    "GTSRB": DatasetSpec(
        "German traffic signs",
        _TRAIN_TEST,
        lambda published: _files(published._samples),  # its class takes no loader
        _named(*_SIGNS),
        place="gtsrb/GTSRB",
        licence="none stated",
        images={"train": 26_640, "test": 12_630},
        megabytes=280,
        archives="gtsrb/*.zip",
    ),
    "DTD": DatasetSpec(
        "describable textures; the first of its ten partitions",
        _TRAIN_VAL_TEST,
        _listed,
        _classes,
        place="dtd/dtd",
        licence="research purposes only",
        images={"train": 1_880, "validation": 1_880, "test": 1_880},
        megabytes=600,
        archives="dtd/*.tar.gz",
        options=_PATHS,
    ),
    "Flowers102": DatasetSpec(
        "flowers of the United Kingdom",
        _TRAIN_VAL_TEST,
        _listed,
        _classes,
        place="flowers-102/jpg",
        licence="none stated",
        images={"train": 1_020, "validation": 1_020, "test": 6_149},
        megabytes=350,
        archives="flowers-102/*.tgz",
        checksums=_flowers_sums,
        options=_PATHS,
    ),
    "OxfordIIITPet": DatasetSpec(
        "breeds of cats and dogs",
        {"train": {"split": "trainval"}, "test": {"split": "test"}},
        # Its class takes no loader.
        lambda published: _files(zip(published._images, published._labels, strict=True)),
        _classes,
        place="oxford-iiit-pet/annotations",
        licence="CC BY-SA 4.0",
        images={"train": 3_680, "test": 3_669},
        megabytes=810,
        archives="oxford-iiit-pet/*.tar.gz",
    ),
    "StanfordCars": DatasetSpec(
        "makes, models and years of cars",
        _TRAIN_TEST,
        _listed,
        _classes,
        place="stanford_cars",
        licence="none stated",
        images={"train": 8_144, "test": 8_041},
        megabytes=1_960,
        by_hand=(
            "Its publisher offers it no more: put cars_train/, cars_test/, devkit/ and "
            "cars_test_annos_withlabels.mat there from a copy of yours"
        ),
        options=_PATHS,
    ),
    "FGVCAircraft": DatasetSpec(
        "variants of aircraft",
        _TRAIN_VAL_TEST,
        _listed,
        _classes,
        place="fgvc-aircraft-2013b",
        licence="non-commercial research purposes only",
        images={"train": 3_334, "validation": 3_333, "test": 3_333},
        megabytes=2_750,
        archives="fgvc-aircraft-2013b.tar.gz",
        options=_PATHS,
    ),
    "Food101": DatasetSpec(
        "dishes",
        _TRAIN_TEST,
        _listed,
        _classes,
        place="food-101",
        licence="none stated; the photographs are their authors'",
        images={"train": 75_750, "test": 25_250},
        megabytes=5_000,
        archives="food-101.tar.gz",
        options=_PATHS,
    ),
    "PCAM": DatasetSpec(
        "sections of lymph nodes, 96 x 96 pixels",
        _TRAIN_VAL_TEST,
        _pcam,
        _named("no metastatic tissue", "metastatic tissue"),
        place="pcam",
        licence="CC0",
        images={"train": 262_144, "validation": 32_768, "test": 32_768},
        megabytes=7_700,
        archives="pcam/*.gz",
        package="h5py",
    ),
    "SUN397": DatasetSpec(
        "scenes",
        _WHOLE,
        _sorted,
        _classes,
        place="SUN397",
        licence="none stated",
        images={"all": 108_754},
        megabytes=39_000,
        archives="SUN397.tar.gz",
        options=_PATHS,
    ),
    # Its labels of the test images are not public: the published validation images are the test.
    "ImageNet": DatasetSpec(
        "1,000 kinds of objects and animals (ILSVRC 2012)",
        {"train": {"split": "train"}, "test": {"split": "val"}},
        _listed,
        _imagenet_names,
        place="imagenet",
        base="imagenet",
        licence="non-commercial research and education only, on registration",
        images={"train": 1_281_167, "test": 50_000},
        megabytes=148_000,
        archives="imagenet/*.tar*",
        by_hand=(
            "Register with image-net.org and put ILSVRC2012_devkit_t12.tar.gz, "
            "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar there"
        ),
        options=_PATHS,
    ),
    "RESISC45": DatasetSpec(
        "aerial photographs of 45 kinds of places",
        _WHOLE,
        _listed,
        _resisc45_names,
        place="NWPU-RESISC45",
        base="NWPU-RESISC45",
        kind="ImageFolder",
        licence="none stated",
        images={"all": 31_500},
        megabytes=430,
        by_hand="Put the 45 class folders of its publisher's archive there",
        options=_PATHS,
    ),
}
"""Data sets that can be loaded by name."""
