"""Every data set is written here in its publisher's layout, with few small images.

The grey level of an image is twice its label, so that a test can see whether an image still has
its own label.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import pickle
import re
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision import datasets as published

from pai_utils.data.datasets import DATASETS, data_root, open_dataset
from pai_utils.data.images import ImageTransform
from pai_utils.data.tasks import Task, load_task

TRANSFORM = ImageTransform(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
Patch = pytest.MonkeyPatch
Sizes = tuple[int, int, int]
Write = Callable[[str], Sizes]
Change = Callable[[bytes], bytes]


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: Patch, tmp_path: Path) -> None:
    for name in ("PAI_DATA_ROOT", "PAI_DOWNLOAD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "data"


# --- writing the layouts ---

LAYOUTS: dict[str, Callable[[str, Path, Patch], Sizes]] = {}


def layout_of(*names: str) -> Callable[[Callable[[str, Path, Patch], Sizes]], None]:
    """Register what writes the data sets of these names and gives the sizes of their parts."""
    return lambda write: LAYOUTS.update(dict.fromkeys(names, write))


def write_image(path: Path, label: int, size: tuple[int, int] = (12, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (2 * label,) * 3).save(path)


def write_classes(folder: Path, names: Iterable[str], count: int, suffix: str = ".png") -> None:
    for label, name in enumerate(names):
        for index in range(count):
            write_image(folder / name / f"image_{index}{suffix}", label)


def write_listed(
    folder: Path, names: Iterable[str], counts: dict[str, int], image: str, line: str, text: str
) -> None:
    """Images of each split and class, and a text with a line on each for every split."""
    for split, count in counts.items():
        lines = []
        for label, name in enumerate(names):
            for index in range(count):
                file = image.format(split=split, name=name, number=label, index=index)
                write_image(folder / "images" / file, label)
                lines.append(line.format(file=Path(file), name=name, number=label + 1))
        write_text(folder / text.format(split), lines)


def write_text(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


Bytes = NDArray[np.uint8]


def labelled(count: int, classes: int, *shape: int) -> tuple[Bytes, Bytes]:
    """Grey images [N, *shape] of each class in turn, and their labels [N]."""
    labels = np.arange(count, dtype=np.uint8) % np.uint8(classes)
    grey = 2 * labels.reshape(-1, *(1 for _ in shape))
    return np.ascontiguousarray(np.broadcast_to(grey, (count, *shape))), labels


def mnist_files() -> dict[str, bytes]:
    def idx(array: Bytes) -> bytes:
        header = bytes([0, 0, 8, array.ndim])
        return header + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()

    files = {}
    for prefix, count in (("train", 60), ("t10k", 20)):
        images, labels = labelled(count, 10, 28, 28)
        files[f"{prefix}-images-idx3-ubyte"] = idx(images)
        files[f"{prefix}-labels-idx1-ubyte"] = idx(labels)
    return files


@layout_of("MNIST", "FashionMNIST", "KMNIST")
def _mnist(name: str, root: Path, patch: Patch) -> Sizes:
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    for file, content in mnist_files().items():
        (folder / file).write_bytes(content)
    return 54, 6, 20


@layout_of("CIFAR10", "CIFAR100")
def _cifar(name: str, root: Path, patch: Patch) -> Sizes:
    kind = getattr(published, name)
    classes, key = (10, "labels") if name == "CIFAR10" else (100, "fine_labels")
    folder = root / kind.base_folder
    folder.mkdir(parents=True)

    def dump(file: str, content: dict[str, Any]) -> tuple[str, str]:
        (folder / file).write_bytes(pickle.dumps(content))
        return file, md5(folder / file)

    images, labels = labelled(2 * classes, classes, 3072)
    batch = {"data": images, key: labels.tolist()}
    for part in ("train_list", "test_list"):
        patch.setattr(kind, part, [dump(file, batch) for file, _ in getattr(kind, part)])
    names = [f"class {index}" for index in range(classes)]
    _, digest = dump(kind.meta["filename"], {kind.meta["key"]: names})
    patch.setattr(kind, "meta", {**kind.meta, "md5": digest})
    train = 2 * classes * len(kind.train_list)
    return train - train // 10, train // 10, 2 * classes


@layout_of("SVHN")
def _svhn(name: str, root: Path, patch: Patch) -> Sizes:
    root.mkdir()
    for split, count in (("train", 40), ("test", 20)):
        images, labels = labelled(count, 10, 32, 32, 3)
        labels[labels == 0] = 10  # as the publisher numbers the digit 0
        file = f"{split}_32x32.mat"
        scipy.io.savemat(root / file, {"X": images.transpose(1, 2, 3, 0), "y": labels[:, None]})
        patch.setitem(published.SVHN.split_list, split, ["", file, md5(root / file)])
    return 36, 4, 20


@layout_of("STL10")
def _stl10(name: str, root: Path, patch: Patch) -> Sizes:
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)

    images, labels = labelled(20, 10, 3, 96, 96)
    for split in ("train", "test"):
        files = {f"{split}_X.bin": images, f"{split}_y.bin": labels + 1, "unlabeled_X.bin": images}
        for file, content in files.items():
            content.tofile(folder / file)
        sums = [[file, md5(folder / file)] for file in files]
        patch.setattr(published.STL10, f"{split}_list", sums)
    return 18, 2, 20


@layout_of("EuroSAT")
def _eurosat(name: str, root: Path, patch: Patch) -> Sizes:
    write_classes(root / "eurosat/2750", ("AnnualCrop", "Forest", "River", "SeaLake"), 10, ".jpg")
    return 22, 6, 12


@layout_of("GTSRB")
def _gtsrb(name: str, root: Path, patch: Patch) -> Sizes:
    folder = root / "gtsrb/GTSRB"
    write_classes(folder / "Training", [f"{label:05d}" for label in range(43)], 4, ".ppm")
    for label in range(43):
        write_image(folder / f"Final_Test/Images/{label:05d}.ppm", label)
    rows = [f"{label:05d}.ppm;12;10;{label}" for label in range(43)]
    write_text(root / "gtsrb/GT-final_test.csv", ["Filename;Width;Height;ClassId", *rows])
    return 155, 17, 43


@layout_of("DTD")
def _dtd(name: str, root: Path, patch: Patch) -> Sizes:
    counts, file = {"train": 3, "val": 2, "test": 4}, "{name}/{name}_{split}_{index}.jpg"
    names = ("banded", "blotchy", "braided")
    write_listed(root / "dtd/dtd", names, counts, file, "{file}", "labels/{}1.txt")
    return 9, 6, 12


@layout_of("Flowers102")
def _flowers(name: str, root: Path, patch: Patch) -> Sizes:
    folder = root / "flowers-102"
    ids = np.arange(1, 102 * 3 + 1).reshape(3, 1, 102)
    labels = ids.reshape(1, -1) % 102
    for index, label in enumerate(labels[0].tolist(), 1):
        write_image(folder / f"jpg/image_{index:05d}.jpg", label)
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": labels + 1})
    splits = {"trnid": ids[0], "valid": ids[1], "tstid": ids[2]}
    scipy.io.savemat(folder / "setid.mat", splits)
    for kind, file in (("label", "imagelabels.mat"), ("setid", "setid.mat")):
        patch.setitem(published.Flowers102._file_dict, kind, (file, md5(folder / file)))
    return 102, 102, 102


@layout_of("OxfordIIITPet")
def _pets(name: str, root: Path, patch: Patch) -> Sizes:
    # torchvision takes the class from the name before the last underscore.
    counts, file = {"trainval": 10, "test": 2}, "{name}_{split}{index}.jpg"
    names, line = ("Abyssinian", "great_pyrenees", "pug"), "{file.stem} {number} 1 1"
    write_listed(root / "oxford-iiit-pet", names, counts, file, line, "annotations/{}.txt")
    return 27, 3, 6


@layout_of("StanfordCars")
def _cars(name: str, root: Path, patch: Patch) -> Sizes:
    folder = root / "stanford_cars"
    names = np.asarray(["AM General Hummer", "Acura RL", "Acura TL"], dtype=object)
    paths = {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
    for split, count in (("train", 30), ("test", 6)):
        rows = np.zeros((1, count), dtype=[("fname", object), ("class", object)])
        for index in range(count):
            file = f"{index:05d}.jpg"
            write_image(folder / f"cars_{split}" / file, index % 3)
            rows[0, index] = (file, index % 3 + 1)
        (folder / "devkit").mkdir(exist_ok=True)
        scipy.io.savemat(folder / paths[split], {"annotations": rows})
    scipy.io.savemat(folder / "devkit/cars_meta.mat", {"class_names": names[None]})
    return 27, 3, 6


@layout_of("FGVCAircraft")
def _aircraft(name: str, root: Path, patch: Patch) -> Sizes:
    folder, names = root / "fgvc-aircraft-2013b/data", ("707-320", "A300B4", "Cessna 172")
    counts, file = {"train": 3, "val": 2, "test": 4}, "{split}{number}{index}.jpg"
    write_listed(folder, names, counts, file, "{file.stem} {name}", "images_variant_{}.txt")
    write_text(folder / "variants.txt", names)
    return 9, 6, 12


@layout_of("Food101")
def _food(name: str, root: Path, patch: Patch) -> Sizes:
    folder = root / "food-101"
    names = ("apple_pie", "baklava", "churros")
    for split, count in (("train", 10), ("test", 3)):
        files = {n: [f"{n}/{split}{index}" for index in range(count)] for n in names}
        write_text(folder / f"meta/{split}.json", [json.dumps(files)])
        for label, name in enumerate(names):
            for file in files[name]:
                write_image(folder / f"images/{file}.jpg", label)
    return 27, 3, 9


@layout_of("SUN397")
def _sun(name: str, root: Path, patch: Patch) -> Sizes:
    names = ("/a/abbey", "/b/bakery/shop", "/c/cave")
    write_text(root / "SUN397/ClassName.txt", names)
    for label, name in enumerate(names):
        for index in range(20):
            write_image(root / f"SUN397{name}/sun_{name[3:5]}{index}.jpg", label)
    return 33, 9, 18


@layout_of("ImageNet")
def _imagenet(name: str, root: Path, patch: Patch) -> Sizes:
    folder = root / "imagenet"
    names = {"n01": ("tench", "Tinca tinca"), "n02": ("crane",), "n03": ("crane",)}
    write_classes(folder / "train", names, 20, ".JPEG")
    write_classes(folder / "val", names, 2, ".JPEG")
    torch.save((names, ["n01"]), folder / "meta.bin")
    return 54, 6, 6


@layout_of("RESISC45")
def _resisc45(name: str, root: Path, patch: Patch) -> Sizes:
    write_classes(root / "NWPU-RESISC45", [f"place_{index:02d}" for index in range(45)], 6, ".jpg")
    return 148, 41, 81


@pytest.fixture
def write(root: Path, monkeypatch: Patch) -> Write:
    """Write a data set by name."""
    return lambda name: LAYOUTS[name](name, root, monkeypatch)


def sizes(task: Task) -> Sizes:
    return len(task.train), len(task.validation), len(task.test)


def assert_labels_belong_to_images(task: Task) -> None:
    for part in (task.train, task.validation, task.test):
        levels = part.images.float().mean(dim=(1, 2, 3)) / 2
        assert torch.equal(levels.round().long(), part.labels)


# --- every data set, in its publisher's layout ---

NAMES = {
    "FashionMNIST": ("T-shirt/top", "Trouser"),
    "MNIST": ("0", "1", "2"),
    "CIFAR10": ("class 0", "class 1"),
    "OxfordIIITPet": ("Abyssinian", "Great Pyrenees", "Pug"),
    "SUN397": ("abbey", "bakery/shop", "cave"),
    # ILSVRC 2012 calls two classes by the same word.
    "ImageNet": ("tench, Tinca tinca", "crane (n02)", "crane (n03)"),
}


@pytest.mark.parametrize("name", DATASETS)
def test_a_data_set_is_read_from_its_own_layout(name: str, root: Path, write: Write) -> None:
    expected = write(name)
    task = load_task(name, TRANSFORM, root)
    assert sizes(task) == expected
    assert task.train.images.shape == (expected[0], 3, 8, 8)
    assert_labels_belong_to_images(task)
    for part in (task.train, task.test):
        assert set(part.labels.tolist()) == set(range(len(task.class_names)))
    assert task.skipped == ()
    names = NAMES.get(name, ())
    assert task.class_names[: len(names)] == names


@pytest.mark.parametrize("name", DATASETS)
def test_a_missing_data_set_says_how_to_get_it(name: str, root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"^{name} is not at .*data") as error:
        load_task(name, TRANSFORM, root)
    command = f"import open_dataset; open_dataset({name!r}, {str(root)!r}, download=True)"
    assert (DATASETS[name].by_hand or command) in str(error.value)


# --- where data is looked for, and when it is fetched ---


def test_the_root_is_the_argument_then_the_variable_then_the_cache(
    write: Write, root: Path, monkeypatch: Patch, tmp_path: Path
) -> None:
    assert data_root() == tmp_path / "home/.cache/pai_utils/data"
    monkeypatch.setenv("PAI_DATA_ROOT", str(root))
    assert data_root() == root
    assert data_root("~/mine") == tmp_path / "home/mine"
    assert write("KMNIST") == sizes(load_task("KMNIST", TRANSFORM))


@pytest.fixture
def archives(root: Path, monkeypatch: Patch) -> None:
    """Downloads of MNIST, not unpacked yet, that torchvision takes for the publisher's."""
    folder = root / "MNIST/raw"
    folder.mkdir(parents=True)
    resources = []
    for file, content in mnist_files().items():
        (folder / f"{file}.gz").write_bytes(gzip.compress(content))
        resources.append((f"{file}.gz", md5(folder / f"{file}.gz")))
    monkeypatch.setattr(published.MNIST, "resources", resources)
    monkeypatch.delattr("urllib.request.urlopen")  # the network is not asked


@pytest.mark.usefixtures("archives")
@pytest.mark.parametrize("way", ["argument", "variable"])
def test_downloads_happen_only_when_asked_for(way: str, root: Path, monkeypatch: Patch) -> None:
    for download in (None, False):
        with pytest.raises(ValueError, match=r"pass download=True, or set PAI_DOWNLOAD=1"):
            load_task("MNIST", TRANSFORM, root, download=download)
        if way == "variable":
            monkeypatch.setenv("PAI_DOWNLOAD", "1")
    task = load_task("MNIST", TRANSFORM, root, download=True if way == "argument" else None)
    assert sizes(task) == (54, 6, 20)
    assert_labels_belong_to_images(task)


def test_what_cannot_be_fetched_or_is_not_the_published_file_is_a_connection_error(
    root: Path, monkeypatch: Patch
) -> None:
    class Response(io.BytesIO):
        length = 5
        url = "https://example.org/dtd.tar.gz"

    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: Response(b"other"))
    with pytest.raises(ConnectionError, match=r"DTD could not be fetched: .*corrupted"):
        load_task("DTD", TRANSFORM, root, download=True)
    monkeypatch.setattr("urllib.request.urlopen", Mock(side_effect=URLError("no route")))
    with pytest.raises(ConnectionError, match=r"(?s)MNIST could not be fetched.*no route"):
        load_task("MNIST", TRANSFORM, root, download=True)


@pytest.mark.usefixtures("archives")
def test_of_several_that_want_a_set_one_downloads_it(root: Path, monkeypatch: Patch) -> None:
    download, alone = published.MNIST.download, threading.Lock()

    def slow(self: published.MNIST) -> None:
        assert alone.acquire(blocking=False)
        time.sleep(0.02)
        download(self)
        alone.release()

    monkeypatch.setattr(published.MNIST, "download", slow)
    with ThreadPoolExecutor(3) as pool:
        for task in pool.map(lambda _: load_task("MNIST", TRANSFORM, root, download=True), "123"):
            assert sizes(task) == (54, 6, 20)


def test_what_cannot_be_downloaded_is_not_tried(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match="offers it no more"):
        load_task("StanfordCars", TRANSFORM, root, download=True)
    with pytest.raises(FileNotFoundError, match="Register with image-net"):
        open_dataset("ImageNet", root, download=True)


# --- missing and corrupt files ---


def put(old: bytes, new: bytes) -> Change:
    return lambda content: content.replace(old, new)


def idx_of_59_labels(content: bytes) -> bytes:
    return content[:7] + bytes([59]) + content[8:-1]


CARS = "stanford_cars/devkit/cars_train_annos.mat"


@pytest.mark.parametrize(
    ("name", "files", "change", "message"),
    [
        # Files whose checksums are published are never read when they differ.
        ("CIFAR10", "*/data_batch_3", lambda old: old + b"!", "CIFAR10 at .*incomplete or corrupt"),
        ("Flowers102", "*/setid.mat", lambda old: old + b"!", "Flowers102 at .*corrupt"),
        ("MNIST", "MNIST/raw/train-i*", lambda old: old[:999], "MNIST at .*incomplete or corrupt"),
        ("MNIST", "MNIST/raw/train-l*", idx_of_59_labels, "60 images but 59 labels"),
        ("StanfordCars", CARS, lambda old: b"", "StanfordCars .*corrupt.* from a copy of yours"),
        ("DTD", "*/*/labels/val1.txt", put(b"banded", b"braided"), "splits of DTD .* differ"),
        ("GTSRB", "*/GT-final_test.csv", put(b";42", b";43"), "test labels run from 0 to 43"),
        ("FGVCAircraft", "*/*/*var*.txt", put(b"Cessna 172", b"A300B4"), "repeat: 'A300B4'"),
        ("DTD", "*/*/labels/val1.txt", None, r"DTD at .*val1\.txt.*; delete it\. To fetch it"),
    ],
)
def test_files_that_are_damaged_missing_or_do_not_fit_are_named(
    name: str, files: str, change: Change | None, message: str, root: Path, write: Write
) -> None:
    write(name)
    for path in root.glob(files):
        path.write_bytes(change(path.read_bytes())) if change else path.unlink()
    with pytest.raises(ValueError, match=message):
        load_task(name, TRANSFORM, root)


def test_an_altered_pickle_is_never_executed(root: Path, write: Write, tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "executed",)

    write("CIFAR10")
    (root / "cifar-10-batches-py/data_batch_1").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(ValueError, match=r"CIFAR10 at .* is incomplete or corrupt"):
        load_task("CIFAR10", TRANSFORM, root)
    write("ImageNet")
    torch.save(Harmful(), root / "imagenet/meta.bin")
    with pytest.raises(ValueError, match=r"ImageNet at .*imagenet is incomplete or corrupt"):
        load_task("ImageNet", TRANSFORM, root)
    assert not (tmp_path / "executed").exists()


def test_a_data_set_with_fewer_images_than_published_is_reported(
    root: Path, write: Write, monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    write("EuroSAT")
    load_task("EuroSAT", TRANSFORM, root)
    assert "has 40 images, 27000 are published; was it unpacked to the end?" in caplog.text
    caplog.clear()
    whole = dataclasses.replace(DATASETS["EuroSAT"], images={"all": 40})
    monkeypatch.setitem(DATASETS, "EuroSAT", whole)
    load_task("EuroSAT", TRANSFORM, root)
    assert not caplog.text


# --- folders ---


def test_a_folder_of_class_folders_is_cut_into_parts(root: Path) -> None:
    write_classes(root, ("bus", "train"), 20)  # a class may be called like a part
    write_image(root / "train/deeper/more.webp", 1)
    (root / "train/notes.txt").write_text("not an image")
    (root / ".hidden").mkdir()
    task = load_task(f"folder:{root}", TRANSFORM)
    assert task.name == f"folder:{root}"
    assert task.class_names == ("bus", "train")
    assert sizes(task) == (23, 6, 12)
    assert_labels_belong_to_images(task)
    assert sizes(load_task(f"folder:{root}", TRANSFORM, train_size=5, test_size=4)) == (5, 6, 4)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ("train validation test", (40, 8, 8)),
        ("train test", (36, 4, 8)),  # validation is carved from train
        # As other tools call them.
        ("train valid", (36, 4, 8)),
        ("TRAIN VAL TEST", (40, 8, 8)),
        ("train dev test", (40, 8, 8)),
        ("training_set test-set", (36, 4, 8)),
    ],
)
def test_a_folder_keeps_its_own_parts(parts: str, expected: Sizes, root: Path) -> None:
    for part in parts.split():
        count = 20 if part.casefold().startswith("train") else 4
        write_classes(root / part, ("ant", "bee"), count)
    task = load_task(f"folder:{root}", TRANSFORM)
    assert sizes(task) == expected
    assert_labels_belong_to_images(task)


def test_a_validation_part_carved_from_train_keeps_proportions(root: Path) -> None:
    write_classes(root / "test", ("c0", "c1", "c2"), 1)
    for label, count in enumerate((40, 20, 10)):
        for index in range(count):
            write_image(root / f"train/c{label}/{index}.png", index)
    task, again = (load_task(f"folder:{root}", TRANSFORM, seed=seed) for seed in (0, 5))
    assert task.train.labels.bincount().tolist() == [36, 18, 9]
    assert task.validation.labels.bincount().tolist() == [4, 2, 1]
    assert torch.equal(again.validation.images, task.validation.images)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("ant/1.png ant/2.png", "has one class only: 'ant'; at least two"),
        ("ant/1.png bee/notes.txt", "has no images of the classes 'bee'; .* no image: .txt"),
        ("1.png", "has no class folders"),
        ("train/ant/1.png train/bee/1.png", "has train/ only; give train/ and test/, or"),
        ("train/a/1.png val/a/1.png Dev/a/1.png", "has Dev/ and train/ and val/, two of which are"),
        ("train/a/1.png train/b/1.png test/a/1.png test/c/1.png", "differ in the classes 'b', 'c'"),
        ("train/a/1.png train/b/1.png test/a/1.png test/b/", "test has no images of the classes"),
        ("ant/1.png bee/1.png", "no images of the class '.*'; each class needs several"),
        ("Ant/1.png ant/1.png bee/1.png", "repeat: 'Ant', 'ant'"),
        ("caf\u00e9/1.png cafe\u0301/1.png", "repeat: 'caf"),
    ],
)
def test_a_folder_that_is_no_data_set_is_refused(files: str, message: str, root: Path) -> None:
    for name in files.split():
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if name.endswith(".png"):
            write_image(path, 1)
        elif name.endswith(".txt"):
            path.write_text("not an image")
    with pytest.raises(ValueError, match=message):
        load_task(f"folder:{root}", TRANSFORM)


def write_noise(path: Path, seed: int, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


def write_two_classes(folder: Path, first: int, within: str = "") -> None:
    """Nine images of noise a class, numbered from ``first``, all different."""
    for label, name in enumerate(("ant", "bee")):
        for index in range(first, first + 9):
            write_noise(folder / name / within / f"{index}.png", 100 * label + index)


def test_a_task_has_the_pixels_that_the_transform_makes_of_its_files(root: Path) -> None:
    """Formats, depths, transparency and orientation: one path for training and for use."""
    endings = (
        "png", "jpg", "JPEG", "jfif", "webp", "bmp", "gif", "tif", "TIFF", "avif", "ico", "jp2",
        "pgm",
    )  # fmt: skip
    modes = {"I;16": "png", "RGBA": "png", "LA": "png", "P": "png", "1": "png", "CMYK": "jpg"}
    exif = Image.Exif()
    exif[0x0112] = 6
    for label, name in enumerate(("ant", "bee")):
        for index, ending in enumerate(endings):
            write_noise(root / name / f"{index}.{ending}", 100 * label + index)
        write_noise(root / name / "turned.jpg", 100 * label + 50, exif=exif)
        pixels = np.random.default_rng(label).integers(0, 256, (12, 9, 4), dtype=np.uint8)
        for mode, ending in modes.items():
            image = Image.fromarray(pixels).convert("L" if mode == "I;16" else "RGB")
            if mode in ("RGBA", "LA"):
                image.putalpha(Image.fromarray(pixels[..., 3]))
            options: dict[str, Any] = {"transparency": 3} if mode == "P" else {}
            image.convert(mode).save(root / name / f"{ord(mode[0])}.{ending}", **options)
    task = load_task(f"folder:{root}", TRANSFORM)
    parts = (task.train, task.validation, task.test)
    found = {
        (part[index][0].numpy().tobytes(), part[index][1])
        for part in parts
        for index in range(len(part))
    }
    expected = set()
    for label, name in enumerate(task.class_names):
        for path in (root / name).iterdir():
            with Image.open(path) as image:
                expected.add((TRANSFORM(image).numpy().tobytes(), label))
    assert found == expected
    assert sum(map(len, parts)) == len(expected) == 2 * (len(endings) + len(modes) + 1)


def test_hidden_and_system_folders_are_ignored(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_two_classes(root, 0, "deeper")
    for name in ("ant", "bee"):
        for hidden in (".ipynb_checkpoints", "deeper/.ipynb_checkpoints", "deeper/@eaDir"):
            write_noise(root / name / hidden / "1-checkpoint.png", 1)
        (root / name / "._1.png").write_bytes(b"of a system")
    write_noise(root / "__MACOSX/ant/1.png", 1)
    task = load_task(f"folder:{root}", TRANSFORM)
    assert task.class_names == ("ant", "bee")
    assert sum(sizes(task)) == 18
    assert not caplog.text


def test_every_file_that_is_not_read_is_counted(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_two_classes(root / "train", 0)
    write_two_classes(root / "test", 50)
    for file in ("train/ant/1.HEIC", "train/ant/2.heic", "test/bee/film.mpg", "test/bee/noted"):
        (root / file).write_bytes(b"no image")
    for file in ("unlabelled/1.png", "unlabelled/2.png", "loose.png", "train/loose.png"):
        write_noise(root / file, 1)
    task = load_task(f"folder:{root}", TRANSFORM)
    assert sum(sizes(task)) == 36
    assert "8 files that are in no class folder" in caplog.text
    assert "left out: 4 .png, 2 .heic, 1 .mpg, 1 without an ending; the first is" in caplog.text


def test_copies_of_an_image_in_two_parts_are_named(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_two_classes(root / "train", 0)
    write_two_classes(root / "test", 50)
    load_task(f"folder:{root}", TRANSFORM)
    assert not caplog.text
    write_noise(root / "test/ant/other.bmp", 107)  # of another format, name and class
    load_task(f"folder:{root}", TRANSFORM)
    assert "1 images are copies of one in another part" in caplog.text
    copied = (
        rf"{root}/test/ant/other\.bmp \(test\) of {root}/train/bee/7\.png \((train|validation)\)"
    )
    assert re.search(copied, caplog.text)


def test_a_folder_that_is_missing_or_unnamed_is_refused() -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        load_task("folder:nowhere", TRANSFORM)
    with pytest.raises(ValueError, match="needs a path"):
        load_task("folder:", TRANSFORM)
