"""Every data set is written here in its publisher's layout, with few small images.

The grey level of an image is twice its label, so that a test can see whether an image still has
its own label.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import importlib.machinery
import io
import json
import logging
import pickle
import sys
import tarfile
import time
import types
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision import datasets as published

from pai_utils.data.datasets import DATASETS, data_root, fetch
from pai_utils.data.images import ImageTransform
from pai_utils.data.tasks import Task, load_task

TRANSFORM = ImageTransform(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
Patch = pytest.MonkeyPatch
Sizes = tuple[int, int, int]


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: Patch, tmp_path: Path) -> None:
    for name in ("PAI_DATA_ROOT", "PAI_DOWNLOAD", "PAI_DATA_MEMORY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "data"


# --- writing the layouts ---


def write_image(path: Path, label: int, size: tuple[int, int] = (12, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (2 * label,) * 3).save(path)


def write_text(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def cycle(count: int, classes: int) -> list[int]:
    return [index % classes for index in range(count)]


def solid(labels: Sequence[int], *shape: int) -> NDArray[np.uint8]:
    """Arrays [N, *shape] of the labels' grey levels."""
    grey = 2 * np.asarray(labels, dtype=np.uint8).reshape(-1, *(1 for _ in shape))
    return np.ascontiguousarray(np.broadcast_to(grey, (len(labels), *shape)))


def idx(array: NDArray[np.uint8]) -> bytes:
    header = bytes([0, 0, 8, array.ndim])
    return header + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def mnist_files(labels: list[int], prefix: str) -> dict[str, bytes]:
    return {
        f"{prefix}-images-idx3-ubyte": idx(solid(labels, 28, 28)),
        f"{prefix}-labels-idx1-ubyte": idx(np.asarray(labels, dtype=np.uint8)),
    }


def write_mnist(name: str, root: Path) -> Sizes:
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    files = mnist_files(cycle(60, 10), "train") | mnist_files(cycle(20, 10), "t10k")
    for file, content in files.items():
        (folder / file).write_bytes(content)
    return 54, 6, 20


def write_cifar(name: str, root: Path, patch: Patch) -> Sizes:
    kind = getattr(published, name)
    classes, key = (10, "labels") if name == "CIFAR10" else (100, "fine_labels")
    folder = root / kind.base_folder
    folder.mkdir(parents=True)

    def dump(file: str, content: dict[str, Any]) -> list[str]:
        (folder / file).write_bytes(pickle.dumps(content))
        return [file, md5(folder / file)]

    def batch(file: str, count: int) -> list[str]:
        labels = cycle(count, classes)
        return dump(file, {"data": solid(labels, 3072), key: labels})

    patch.setattr(kind, "train_list", [batch(f, 2 * classes) for f, _ in kind.train_list])
    patch.setattr(kind, "test_list", [batch(f, classes) for f, _ in kind.test_list])
    names = [f"class {index}" for index in range(classes)]
    file, digest = dump(kind.meta["filename"], {kind.meta["key"]: names})
    patch.setattr(kind, "meta", {**kind.meta, "filename": file, "md5": digest})
    train = 2 * classes * len(kind.train_list)
    return train - train // 10, train // 10, classes


def write_svhn(root: Path, patch: Patch) -> Sizes:
    root.mkdir()
    splits = {}
    for split, count in (("train", 40), ("test", 20)):
        labels = cycle(count, 10)
        file = f"{split}_32x32.mat"
        # The publisher numbers the digit 0 as class 10.
        marks = np.where(np.asarray(labels) == 0, 10, labels).astype(np.uint8)[:, None]
        images = solid(labels, 32, 32, 3).transpose(1, 2, 3, 0)
        scipy.io.savemat(root / file, {"X": images, "y": marks})
        splits[split] = ["", file, md5(root / file)]
    patch.setattr(published.SVHN, "split_list", splits)
    return 36, 4, 20


def write_stl10(root: Path, patch: Patch) -> Sizes:
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)

    def write(file: str, content: NDArray[np.uint8]) -> list[str]:
        content.tofile(folder / file)
        return [file, md5(folder / file)]

    for split, count in (("train", 20), ("test", 10)):
        labels = cycle(count, 10)
        files = [
            write(f"{split}_X.bin", solid(labels, 3, 96, 96)),
            write(f"{split}_y.bin", np.asarray(labels, dtype=np.uint8) + 1),
        ]
        if split == "train":
            files.append(write("unlabeled_X.bin", solid([0], 3, 96, 96)))
        patch.setattr(published.STL10, f"{split}_list", files)
    return 18, 2, 10


def write_classes(folder: Path, names: Sequence[str], count: int, suffix: str = ".png") -> None:
    for label, name in enumerate(names):
        for index in range(count):
            write_image(folder / name / f"image_{index}{suffix}", label)


def write_eurosat(root: Path) -> Sizes:
    write_classes(root / "eurosat/2750", ("AnnualCrop", "Forest", "River", "SeaLake"), 10, ".jpg")
    return 22, 6, 12


def write_gtsrb(root: Path) -> Sizes:
    folder = root / "gtsrb/GTSRB"
    write_classes(folder / "Training", [f"{label:05d}" for label in range(43)], 4, ".ppm")
    rows = ["Filename;Width;Height;ClassId"]
    for label in range(43):
        write_image(folder / f"Final_Test/Images/{label:05d}.ppm", label)
        rows.append(f"{label:05d}.ppm;12;10;{label}")
    write_text(root / "gtsrb/GT-final_test.csv", rows)
    return 155, 17, 43


def write_dtd(root: Path) -> Sizes:
    folder = root / "dtd/dtd"
    names = ("banded", "blotchy", "braided")
    for split, count in (("train", 3), ("val", 2), ("test", 4)):
        lines = [f"{n}/{n}_{split}_{index}.jpg" for n in names for index in range(count)]
        write_text(folder / f"labels/{split}1.txt", lines)
        for line in lines:
            write_image(folder / "images" / line, names.index(line.split("/")[0]))
    return 9, 6, 12


def write_flowers(root: Path, patch: Patch) -> Sizes:
    folder = root / "flowers-102"
    labels = cycle(102 * 3, 102)
    for index, label in enumerate(labels, 1):
        write_image(folder / f"jpg/image_{index:05d}.jpg", label)
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": np.asarray([labels]) + 1})
    ids = np.arange(1, 102 * 3 + 1).reshape(3, 1, 102)
    splits = {"trnid": ids[0], "valid": ids[1], "tstid": ids[2]}
    scipy.io.savemat(folder / "setid.mat", splits)
    sums = {
        kind: (file, md5(folder / file))
        for kind, file in (("label", "imagelabels.mat"), ("setid", "setid.mat"))
    }
    patch.setattr(published.Flowers102, "_file_dict", published.Flowers102._file_dict | sums)
    return 102, 102, 102


def write_pets(root: Path) -> Sizes:
    folder = root / "oxford-iiit-pet"
    names = ("Abyssinian", "great_pyrenees", "pug")
    for split, count in (("trainval", 10), ("test", 2)):
        lines = []
        for label, name in enumerate(names):
            for index in range(count):
                write_image(folder / f"images/{name}_{split}{index}.jpg", label)
                lines.append(f"{name}_{split}{index} {label + 1} 1 1")
        # torchvision takes the class from the name before the last underscore.
        write_text(folder / f"annotations/{split}.txt", lines)
    return 27, 3, 6


def write_cars(root: Path) -> Sizes:
    folder = root / "stanford_cars"
    names = np.asarray(["AM General Hummer", "Acura RL", "Acura TL"], dtype=object)
    paths = {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
    for split, count in (("train", 30), ("test", 6)):
        rows = np.zeros((1, count), dtype=[("fname", object), ("class", object)])
        for index, label in enumerate(cycle(count, 3)):
            file = f"{index:05d}.jpg"
            write_image(folder / f"cars_{split}" / file, label)
            rows[0, index] = (file, label + 1)
        (folder / "devkit").mkdir(exist_ok=True)
        scipy.io.savemat(folder / paths[split], {"annotations": rows})
    scipy.io.savemat(folder / "devkit/cars_meta.mat", {"class_names": names[None]})
    return 27, 3, 6


def write_aircraft(root: Path) -> Sizes:
    folder = root / "fgvc-aircraft-2013b/data"
    names = ("707-320", "A300B4", "Cessna 172")
    write_text(folder / "variants.txt", names)
    for split, count in (("train", 3), ("val", 2), ("test", 4)):
        lines = []
        for label, name in enumerate(names):
            for index in range(count):
                write_image(folder / f"images/{split}{label}{index}.jpg", label)
                lines.append(f"{split}{label}{index} {name}")
        write_text(folder / f"images_variant_{split}.txt", lines)
    return 9, 6, 12


def write_food(root: Path) -> Sizes:
    folder = root / "food-101"
    names = ("apple_pie", "baklava", "churros")
    for split, count in (("train", 10), ("test", 3)):
        files = {n: [f"{n}/{split}{index}" for index in range(count)] for n in names}
        write_text(folder / f"meta/{split}.json", [json.dumps(files)])
        for label, name in enumerate(names):
            for file in files[name]:
                write_image(folder / f"images/{file}.jpg", label)
    return 27, 3, 9


def write_sun(root: Path) -> Sizes:
    names = ("/a/abbey", "/b/bakery/shop", "/c/cave")
    write_text(root / "SUN397/ClassName.txt", names)
    for label, name in enumerate(names):
        for index in range(20):
            write_image(root / f"SUN397{name}/sun_{name[3:5]}{index}.jpg", label)
    return 33, 9, 18


def write_imagenet(root: Path) -> Sizes:
    folder = root / "imagenet"
    names = {"n01": ("tench", "Tinca tinca"), "n02": ("crane",), "n03": ("crane",)}
    write_classes(folder / "train", tuple(names), 20, ".JPEG")
    write_classes(folder / "val", tuple(names), 2, ".JPEG")
    torch.save((names, ["n01"]), folder / "meta.bin")
    return 54, 6, 6


def write_resisc45(root: Path) -> Sizes:
    write_classes(root / "NWPU-RESISC45", [f"place_{index:02d}" for index in range(45)], 6, ".jpg")
    return 148, 41, 81


def write_pcam(root: Path, patch: Patch) -> Sizes:
    """PatchCamelyon is read by h5py; this one of the same interface reads numpy's files."""
    folder = root / "pcam"
    folder.mkdir(parents=True)
    for split, count in (("train", 12), ("valid", 4), ("test", 6)):
        labels = cycle(count, 2)
        for axis, content in (
            ("x", solid(labels, 96, 96, 3)),
            ("y", np.asarray(labels, dtype=np.uint8).reshape(-1, 1, 1, 1)),
        ):
            with (folder / f"camelyonpatch_level_2_split_{split}_{axis}.h5").open("wb") as file:
                np.save(file, content)

    class File(contextlib.AbstractContextManager[Any]):
        def __init__(self, path: Path) -> None:
            self.axis, self.content = path.stem[-1], np.load(path)

        def __getitem__(self, axis: str) -> NDArray[np.uint8]:
            assert axis == self.axis
            content: NDArray[np.uint8] = self.content
            return content

        def __exit__(self, *error: object) -> None:
            pass

    module = types.ModuleType("h5py")
    module.__spec__ = importlib.machinery.ModuleSpec("h5py", None)
    module.File = File  # type: ignore[attr-defined]
    patch.setitem(sys.modules, "h5py", module)
    return 12, 4, 6


WRITERS: dict[str, Callable[[Path, Patch], Sizes]] = {
    **{
        name: lambda root, patch, name=name: write_mnist(name, root)  # type: ignore[misc]
        for name in ("MNIST", "FashionMNIST", "KMNIST")
    },
    **{
        name: lambda root, patch, name=name: write_cifar(name, root, patch)  # type: ignore[misc]
        for name in ("CIFAR10", "CIFAR100")
    },
    "SVHN": write_svhn,
    "STL10": write_stl10,
    "EuroSAT": lambda root, patch: write_eurosat(root),
    "GTSRB": lambda root, patch: write_gtsrb(root),
    "DTD": lambda root, patch: write_dtd(root),
    "Flowers102": write_flowers,
    "OxfordIIITPet": lambda root, patch: write_pets(root),
    "StanfordCars": lambda root, patch: write_cars(root),
    "FGVCAircraft": lambda root, patch: write_aircraft(root),
    "Food101": lambda root, patch: write_food(root),
    "PCAM": write_pcam,
    "SUN397": lambda root, patch: write_sun(root),
    "ImageNet": lambda root, patch: write_imagenet(root),
    "RESISC45": lambda root, patch: write_resisc45(root),
}


def sizes(task: Task) -> Sizes:
    return len(task.train), len(task.validation), len(task.test)


def assert_labels_belong_to_images(task: Task) -> None:
    for part in (task.train, task.validation, task.test):
        levels = part.images.float().mean(dim=(1, 2, 3)) / 2
        assert torch.equal(levels.round().long(), part.labels)


# --- every data set, in its publisher's layout ---


def test_every_data_set_of_the_table_is_tested_here() -> None:
    assert list(WRITERS) == list(DATASETS)


@pytest.mark.parametrize("name", WRITERS)
def test_a_data_set_is_read_from_its_own_layout(name: str, root: Path, monkeypatch: Patch) -> None:
    expected = WRITERS[name](root, monkeypatch)
    task = load_task(name, TRANSFORM, root)
    assert sizes(task) == expected
    assert task.train.images.shape == (expected[0], 3, 8, 8)
    assert_labels_belong_to_images(task)
    assert set(task.train.labels.tolist()) == set(range(len(task.class_names)))
    assert set(task.test.labels.tolist()) == set(range(len(task.class_names)))
    assert task.skipped == ()


@pytest.mark.parametrize("name", WRITERS)
def test_a_missing_data_set_says_how_to_get_it(name: str, root: Path, monkeypatch: Patch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", types.ModuleType("h5py"))
    sys.modules["h5py"].__spec__ = importlib.machinery.ModuleSpec("h5py", None)
    with pytest.raises(FileNotFoundError, match=f"^{name} is not at .*data") as error:
        load_task(name, TRANSFORM, root)
    command = f"from pai_utils.data.datasets import fetch; fetch({name!r}, {str(root)!r})"
    assert (DATASETS[name].by_hand or command) in str(error.value)


@pytest.mark.parametrize("name", WRITERS)
def test_facts_are_whole(name: str) -> None:
    spec = DATASETS[name]
    assert spec.licence
    assert spec.description
    assert sum(spec.images.values()) > 1000
    assert set(spec.images) == set(spec.splits)
    assert spec.megabytes > 10
    assert set(spec.splits) in ({"all"}, {"train", "test"}, {"train", "validation", "test"})
    assert hasattr(published, spec.kind or name)


def test_classes_are_named_as_published(root: Path, monkeypatch: Patch) -> None:
    def names(name: str) -> tuple[str, ...]:
        WRITERS[name](root / name, monkeypatch)
        return load_task(name, TRANSFORM, root / name).class_names

    root.mkdir()
    assert names("FashionMNIST")[:2] == ("T-shirt/top", "Trouser")
    assert names("MNIST") == tuple("0123456789")
    assert names("CIFAR10")[9] == "class 9"
    assert names("OxfordIIITPet") == ("Abyssinian", "Great Pyrenees", "Pug")
    assert names("SUN397") == ("abbey", "bakery/shop", "cave")
    assert len(set(names("GTSRB"))) == 43
    # ILSVRC 2012 calls two classes by the same word.
    assert names("ImageNet") == ("tench, Tinca tinca", "crane (n02)", "crane (n03)")


def test_a_validation_part_carved_from_train_keeps_proportions_and_shares_no_image(
    root: Path,
) -> None:
    for label, count in enumerate((40, 20, 10)):
        for index in range(count):
            path = root / f"train/c{label}/{index}.png"
            write_image(path, label)
            # Tells this image from all others.
            Image.new("RGB", (8, 8), (2 * label, 2 * index, 0)).save(path)
    write_classes(root / "test", ("c0", "c1", "c2"), 1)
    task = load_task(f"folder:{root}", TRANSFORM)
    assert task.validation.labels.bincount().tolist() == [4, 2, 1]
    colours = [
        {tuple(image[:, 0, 0].tolist()) for image in part.images}
        for part in (task.train, task.validation)
    ]
    assert not colours[0] & colours[1]
    assert len(colours[0] | colours[1]) == 70
    again = load_task(f"folder:{root}", TRANSFORM, seed=5)
    assert torch.equal(again.validation.images, task.validation.images)


# --- where data is looked for, and when it is fetched ---


def test_the_root_is_the_argument_then_the_variable_then_the_cache(
    monkeypatch: Patch, tmp_path: Path
) -> None:
    assert data_root() == tmp_path / "home/.cache/pai_utils/data"
    monkeypatch.setenv("PAI_DATA_ROOT", str(tmp_path / "sets"))
    assert data_root() == tmp_path / "sets"
    assert data_root("~/mine") == tmp_path / "home/mine"
    write_mnist("KMNIST", tmp_path / "sets")
    assert sizes(load_task("KMNIST", TRANSFORM)) == (54, 6, 20)


def test_pixels_of_data_that_may_not_be_written_beside_go_to_the_cache(
    root: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    write_mnist("MNIST", root)
    monkeypatch.setenv("PAI_DATA_MEMORY", "0")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert_labels_belong_to_images(load_task("MNIST", TRANSFORM, root))
    assert not (root / ".decoded").exists()
    decoded = tmp_path / "home/.cache/pai_utils/data/.decoded"
    assert len(list(decoded.glob("MNIST-*.npy"))) == 3


def write_mnist_archives(root: Path, patch: Patch) -> Path:
    """Downloaded files, not unpacked yet, that torchvision takes for the publisher's."""
    folder = root / "MNIST/raw"
    folder.mkdir(parents=True)
    resources = []
    files = mnist_files(cycle(60, 10), "train") | mnist_files(cycle(20, 10), "t10k")
    for file, content in files.items():
        (folder / f"{file}.gz").write_bytes(gzip.compress(content))
        resources.append((f"{file}.gz", md5(folder / f"{file}.gz")))
    patch.setattr(published.MNIST, "resources", resources)
    return folder


@pytest.fixture
def _no_network(monkeypatch: Patch) -> None:
    def refuse(*arguments: object, **keywords: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.mark.usefixtures("_no_network")
@pytest.mark.parametrize("way", ["argument", "variable", "fetch"])
def test_downloads_happen_only_when_asked_for(way: str, root: Path, monkeypatch: Patch) -> None:
    write_mnist_archives(root, monkeypatch)
    with pytest.raises(ValueError, match=r"pass download=True, or set PAI_DOWNLOAD=1"):
        load_task("MNIST", TRANSFORM, root)
    if way == "variable":
        monkeypatch.setenv("PAI_DOWNLOAD", "1")
        with pytest.raises(ValueError, match="PAI_DOWNLOAD"):
            load_task("MNIST", TRANSFORM, root, download=False)
    if way == "fetch":
        fetch("MNIST", root)
    task = load_task("MNIST", TRANSFORM, root, download=True if way == "argument" else None)
    assert sizes(task) == (54, 6, 20)
    assert_labels_belong_to_images(task)


def test_a_publisher_that_cannot_be_reached_is_a_connection_error(
    root: Path, monkeypatch: Patch
) -> None:
    from urllib.error import URLError

    def fail(*arguments: object, **keywords: object) -> None:
        raise URLError("no route")

    monkeypatch.setattr("urllib.request.urlopen", fail)
    for name in ("DTD", "MNIST"):
        with pytest.raises(ConnectionError, match=f"(?s){name} could not be fetched.*no route"):
            load_task(name, TRANSFORM, root, download=True)


def test_of_several_that_want_a_set_one_downloads_it(root: Path, monkeypatch: Patch) -> None:
    download = published.MNIST.download
    inside, most = [], []

    def slow(self: published.MNIST) -> None:
        inside.append(self)
        most.append(len(inside))
        time.sleep(0.2)
        download(self)
        inside.pop()

    write_mnist_archives(root, monkeypatch)
    monkeypatch.setattr(published.MNIST, "download", slow)
    with ThreadPoolExecutor(3) as pool:
        tasks = list(
            pool.map(lambda _: load_task("MNIST", TRANSFORM, root, download=True), range(3))
        )
    assert [sizes(task) for task in tasks] == [(54, 6, 20)] * 3
    assert len(most) == 6  # two published splits each
    assert max(most) == 1


def test_a_download_that_is_not_the_published_file_is_named(root: Path, monkeypatch: Patch) -> None:
    class Response(io.BytesIO):
        length = 5
        url = "https://example.org/dtd.tar.gz"

    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: Response(b"other"))
    with pytest.raises(ValueError, match=r"dtd-r1\.0\.1\.tar\.gz of DTD is corrupt .*delete it"):
        load_task("DTD", TRANSFORM, root, download=True)


def test_what_cannot_be_downloaded_is_not_tried(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match="offers it no more"):
        load_task("StanfordCars", TRANSFORM, root, download=True)
    with pytest.raises(FileNotFoundError, match="Register with image-net"):
        fetch("ImageNet", root)


def test_fetching_an_unknown_data_set_names_the_choices() -> None:
    with pytest.raises(ValueError, match=r"unknown data set 'MNISt'; did you mean 'MNIST'\?"):
        fetch("MNISt")


# --- missing and corrupt files ---


@pytest.mark.usefixtures("_no_network")
def test_a_corrupt_archive_is_named(root: Path, monkeypatch: Patch) -> None:
    folder = write_mnist_archives(root, monkeypatch)
    broken = folder / "train-labels-idx1-ubyte.gz"
    broken.write_bytes(broken.read_bytes()[:-12])
    sums = [(file, md5(folder / file)) for file, _ in published.MNIST.resources]
    monkeypatch.setattr(published.MNIST, "resources", sums)
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte\.gz of MNIST is corrupt.*fetch"):
        load_task("MNIST", TRANSFORM, root, download=True)


@pytest.mark.usefixtures("_no_network")
def test_a_truncated_tar_archive_is_named(root: Path, monkeypatch: Patch) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        noise = np.random.default_rng(0).bytes(10_000)
        member = tarfile.TarInfo("dtd/labels/train1.txt")
        member.size = len(noise)
        tar.addfile(member, io.BytesIO(noise))
    archive = root / "dtd/dtd-r1.0.1.tar.gz"
    archive.parent.mkdir(parents=True)
    archive.write_bytes(content.getvalue()[:5_000])
    monkeypatch.setattr(published.DTD, "_MD5", md5(archive))
    with pytest.raises(ValueError, match=r"dtd-r1\.0\.1\.tar\.gz of DTD is corrupt"):
        load_task("DTD", TRANSFORM, root, download=True)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("CIFAR10", "cifar-10-batches-py/data_batch_3"),
        ("CIFAR100", "cifar-100-python/meta"),
        ("SVHN", "train_32x32.mat"),
        ("STL10", "stl10_binary/test_y.bin"),
        ("Flowers102", "flowers-102/setid.mat"),
    ],
)
def test_a_file_that_is_not_the_published_one_is_named_and_not_read(
    name: str, file: str, root: Path, monkeypatch: Patch
) -> None:
    WRITERS[name](root, monkeypatch)
    path = root / file
    path.write_bytes(path.read_bytes() + b"!")
    with pytest.raises(ValueError, match=f"{Path(file).name} of {name} is corrupt; delete it"):
        load_task(name, TRANSFORM, root)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{Path(file).name}.*(missing|not at)|is not at"):
        load_task(name, TRANSFORM, root)


def test_an_altered_pickle_is_never_executed(
    root: Path, monkeypatch: Patch, tmp_path: Path
) -> None:
    write_cifar("CIFAR10", root, monkeypatch)

    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "executed",)

    (root / "cifar-10-batches-py/data_batch_1").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(ValueError, match="data_batch_1 of CIFAR10 is corrupt"):
        load_task("CIFAR10", TRANSFORM, root)
    write_imagenet(root)
    torch.save(Harmful(), root / "imagenet/meta.bin")
    with pytest.raises(ValueError, match=r"ImageNet at .*imagenet is incomplete or corrupt"):
        load_task("ImageNet", TRANSFORM, root)
    assert not (tmp_path / "executed").exists()


def test_a_truncated_array_is_corrupt(root: Path) -> None:
    write_mnist("MNIST", root)
    path = root / "MNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"MNIST at .*raw is incomplete or corrupt"):
        load_task("MNIST", TRANSFORM, root)


@pytest.mark.parametrize("kept", [0, 200])
def test_a_truncated_annotation_file_is_corrupt(kept: int, root: Path) -> None:
    write_cars(root)
    path = root / "stanford_cars/devkit/cars_train_annos.mat"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"StanfordCars .*corrupt.* from a copy of yours"):
        load_task("StanfordCars", TRANSFORM, root)


def test_images_without_labels_are_corrupt(root: Path) -> None:
    write_mnist("MNIST", root)
    labels = idx(np.zeros(59, dtype=np.uint8))
    (root / "MNIST/raw/train-labels-idx1-ubyte").write_bytes(labels)
    with pytest.raises(ValueError, match="60 images but 59 labels"):
        load_task("MNIST", TRANSFORM, root)


def test_a_file_list_that_is_missing_is_named(root: Path) -> None:
    write_dtd(root)
    (root / "dtd/dtd/labels/val1.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"DTD at .*val1\.txt.*fetch"):
        load_task("DTD", TRANSFORM, root)


def test_a_data_set_with_fewer_images_than_published_is_reported(
    root: Path, monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    write_eurosat(root)
    with caplog.at_level(logging.WARNING, "pai_utils"):
        load_task("EuroSAT", TRANSFORM, root)
    assert "EuroSAT" in caplog.text
    assert "has 40 images, 27000 are published; was it unpacked to the end?" in caplog.text
    caplog.clear()
    whole = dataclasses.replace(DATASETS["EuroSAT"], images={"all": 40})
    monkeypatch.setitem(DATASETS, "EuroSAT", whole)
    with caplog.at_level(logging.WARNING, "pai_utils"):
        load_task("EuroSAT", TRANSFORM, root)
    assert not caplog.text


def test_splits_of_different_classes_are_refused(root: Path) -> None:
    write_dtd(root)
    list_of_files = root / "dtd/dtd/labels/val1.txt"
    lines = [line for line in list_of_files.read_text().splitlines() if "banded" not in line]
    write_text(list_of_files, lines)
    with pytest.raises(ValueError, match=r"splits of DTD .* different classes"):
        load_task("DTD", TRANSFORM, root)


def test_labels_beyond_the_classes_are_refused(root: Path) -> None:
    write_gtsrb(root)
    rows = root / "gtsrb/GT-final_test.csv"
    rows.write_text(rows.read_text().replace(";42\n", ";43\n"))
    with pytest.raises(ValueError, match="43 classes but its test labels run from 0 to 43"):
        load_task("GTSRB", TRANSFORM, root)


def test_class_names_that_repeat_are_refused(root: Path) -> None:
    write_aircraft(root)
    write_text(root / "fgvc-aircraft-2013b/data/variants.txt", ["707-320", "A300B4", "A300B4"])
    for split in ("train", "val", "test"):
        path = root / f"fgvc-aircraft-2013b/data/images_variant_{split}.txt"
        path.write_text(path.read_text().replace("Cessna 172", "A300B4"))
    with pytest.raises(ValueError, match="class names of FGVCAircraft repeat: 'A300B4'"):
        load_task("FGVCAircraft", TRANSFORM, root)


def test_resisc45_has_45_classes(root: Path) -> None:
    write_classes(root / "NWPU-RESISC45", ("airport", "beach"), 3)
    with pytest.raises(ValueError, match="45 class folders, not 2"):
        load_task("RESISC45", TRANSFORM, root)


# --- folders ---


def test_a_folder_of_class_folders_is_cut_into_parts(root: Path) -> None:
    write_classes(root, ("ant", "bee"), 20)
    write_image(root / "bee/deeper/more.webp", 1)
    (root / "bee/notes.txt").write_text("not an image")
    (root / ".hidden").mkdir()
    task = load_task(f"folder:{root}", TRANSFORM)
    assert task.name == f"folder:{root}"
    assert task.class_names == ("ant", "bee")
    assert sizes(task) == (23, 6, 12)
    assert_labels_belong_to_images(task)
    assert sizes(load_task(f"folder:{root}", TRANSFORM, train_size=5, test_size=4)) == (5, 6, 4)


@pytest.mark.parametrize("validation", ["val", "validation"])
def test_a_folder_keeps_its_own_parts(validation: str, root: Path) -> None:
    for split, count in (("train", 5), (validation, 3), ("test", 4)):
        write_classes(root / split, ("ant", "bee"), count)
    task = load_task(f"folder:{root}", TRANSFORM)
    assert sizes(task) == (10, 6, 8)
    assert_labels_belong_to_images(task)


@pytest.mark.parametrize("test", ["test", "val"])
def test_a_folder_without_a_validation_part_has_it_carved(test: str, root: Path) -> None:
    for split, count in (("train", 20), (test, 4)):
        write_classes(root / split, ("ant", "bee"), count)
    assert sizes(load_task(f"folder:{root}", TRANSFORM)) == (36, 4, 8)


def test_a_folder_may_have_a_class_called_train(root: Path) -> None:
    write_classes(root, ("bus", "train"), 10)
    assert load_task(f"folder:{root}", TRANSFORM).class_names == ("bus", "train")


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ({"ant/1.png", "ant/2.png"}, "has one class only: 'ant'; at least two"),
        ({"ant/1.png", "bee/"}, "has no images of the classes 'bee'"),
        ({"ant/1.png", "bee/notes.txt"}, "has no images of the classes 'bee'"),
        ({"1.png"}, "has no class folders"),
        ({"train/ant/1.png", "train/bee/1.png"}, r"train/ but neither test/ nor val/"),
        ({"train/a/1.png", "val/a/1.png", "validation/a/1.png"}, r"has val/ and validation/"),
        (
            {"train/ant/1.png", "train/bee/1.png", "test/ant/1.png", "test/wasp/1.png"},
            "splits differ in the classes 'bee', 'wasp'",
        ),
        (
            {"train/ant/1.png", "train/bee/1.png", "test/ant/1.png", "test/bee/"},
            "test has no images of the classes 'bee'",
        ),
        ({"ant/1.png", "bee/1.png"}, "no images of the class '.*'; each class needs several"),
        ({"Ant/1.png", "ant/1.png", "bee/1.png"}, "repeat: 'Ant', 'ant'"),
        ({"caf\u00e9/1.png", "cafe\u0301/1.png"}, "repeat: 'caf"),
    ],
)
def test_a_folder_that_is_no_data_set_is_refused(
    folders: set[str], message: str, root: Path
) -> None:
    for name in folders:
        path = root / name
        if name.endswith(".png"):
            write_image(path, 1)
        else:
            (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if name.endswith(".txt"):
            path.write_text("not an image")
    with pytest.raises(ValueError, match=message):
        load_task(f"folder:{root}", TRANSFORM)


def test_a_folder_that_is_missing_or_unnamed_is_refused(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*data"):
        load_task(f"folder:{root}", TRANSFORM)
    with pytest.raises(ValueError, match="needs a path"):
        load_task("folder:", TRANSFORM)
