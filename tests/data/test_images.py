from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pai_utils.data.images import ImageDataset, ImageTransform, open_image, to_rgb

HALF = (0.5, 0.5, 0.5)
TRANSFORM = ImageTransform(16, HALF, HALF)


# --- from a file to RGB ---


def saved(image: Image.Image, path: Path, **options: Any) -> Image.Image:
    image.save(path, **options)
    return open_image(path)


def pixel(image: Image.Image) -> Any:
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "expected"),
    [
        ("L", 77, ".png", (77, 77, 77)),
        ("1", 1, ".png", (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), ".tif", (255, 0, 0)),
        ("CMYK", (0, 255, 255, 0), ".jpg", (254, 0, 0)),
        ("RGBA", (10, 20, 30, 255), ".png", (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), ".png", (255, 255, 255)),
        ("RGBA", (0, 0, 0, 128), ".png", (127, 127, 127)),
        ("LA", (50, 255), ".png", (50, 50, 50)),
        ("LA", (50, 0), ".png", (255, 255, 255)),
    ],
)
def test_an_image_of_any_mode_becomes_rgb(
    mode: str, colour: Any, suffix: str, expected: tuple[int, ...], tmp_path: Path
) -> None:
    found = pixel(saved(Image.new(mode, (16, 16), colour), tmp_path / f"x{suffix}"))
    assert found == pytest.approx(expected, abs=10 if suffix == ".jpg" else 0)


def test_a_palette_image_shows_its_colours(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    assert pixel(saved(image, tmp_path / "x.png")) == (200, 100, 50)
    assert pixel(saved(image, tmp_path / "x.png", transparency=1)) == (255, 255, 255)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
@pytest.mark.parametrize(("value", "level"), [(65535, 255), (256, 1)])
def test_sixteen_bit_grey_is_scaled_not_clipped(
    suffix: str, value: int, level: int, tmp_path: Path
) -> None:
    path = tmp_path / f"x{suffix}"
    if suffix == ".pgm":
        path.write_bytes(b"P5 4 4 65535\n" + value.to_bytes(2, "big") * 16)
    else:
        Image.fromarray(np.full((4, 4), value, np.uint16)).save(path)
    assert pixel(open_image(path)) == (level,) * 3


def test_sixteen_bit_grey_of_the_other_byte_order_is_read(tmp_path: Path) -> None:
    # A big-endian TIFF of one 2 x 1 strip, by hand: Pillow writes its own order only.
    tags = [(256, 2), (257, 1), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (279, 4)]
    entries = b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in tags)
    strip = struct.pack(">HHH", 257 * 100, 65535, len(tags))
    path = tmp_path / "x.tif"
    path.write_bytes(b"MM" + struct.pack(">HI", 42, 12) + strip + entries + bytes(4))
    assert np.asarray(open_image(path))[0, :, 0].tolist() == [100, 255]


# How a camera stores an upright image, by the orientation that it notes.
STORED: dict[int, Callable[[Any], Any]] = {
    1: lambda image: image,
    2: np.fliplr,
    3: lambda image: np.rot90(image, 2),
    4: np.flipud,
    5: lambda image: np.swapaxes(image, 0, 1),
    6: np.rot90,
    7: lambda image: np.rot90(np.swapaxes(image, 0, 1), 2),
    8: lambda image: np.rot90(image, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_an_image_is_turned_as_its_camera_was(
    suffix: str, orientation: int, tmp_path: Path
) -> None:
    upright = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path, stored = tmp_path / f"x{suffix}", np.ascontiguousarray(STORED[orientation](upright))
    Image.fromarray(stored).save(path, exif=exif, lossless=True)
    assert np.array_equal(np.asarray(open_image(path)), upright)
    with Image.open(path) as image:
        pixels = TRANSFORM.resize(image)
        if suffix != ".tif":  # Pillow turns these itself
            assert np.array_equal(np.asarray(image), stored)
    assert torch.equal(pixels, torch.from_numpy(upright[:, 4:20]).permute(2, 0, 1))
    assert torch.equal(TRANSFORM.resize(open_image(path)), pixels)  # and turned once only


def test_damaged_exif_does_not_keep_an_image_from_being_read(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 4), (200, 100, 50))
    found = saved(image, tmp_path / "x.png", exif=b"Exif\0\0no table of tags")
    assert pixel(found) == (200, 100, 50)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_known_range_are_refused(mode: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"x\.tif cannot be read.*mode {mode} has no known range"):
        saved(Image.new(mode, (4, 4), 5), tmp_path / "x.tif")
    with pytest.raises(ValueError, match="save it with 8 or 16 bits"):
        to_rgb(Image.new(mode, (4, 4), 5))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp", ".ppm", ".bmp"])
def test_a_truncated_image_is_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"broken{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:8] + bytes(40), b"no image at all", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path.name} cannot be read as an image"):
            open_image(path)


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    with pytest.raises(ValueError, match=r"x\.png cannot be read.*exceeds limit"):
        saved(Image.new("RGB", (4, 4)), tmp_path / "x.png")


# --- the transform of an encoder ---


def test_channels_are_scaled_shifted_and_divided() -> None:
    result = ImageTransform(8, HALF, (0.25, 0.25, 0.5))(Image.new("RGB", (20, 12), (255, 0, 51)))
    expected = torch.tensor([2.0, -2.0, -0.6]).view(3, 1, 1).expand(3, 8, 8)
    torch.testing.assert_close(result, expected)


def test_a_grey_image_gives_the_same_result_as_pil_tensor_and_batch() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    transform = ImageTransform(64, HALF, HALF)
    as_pil = transform(Image.fromarray(pixels))
    as_batch = transform(torch.from_numpy(pixels).expand(2, 1, 28, 28))
    assert torch.equal(as_pil, transform(torch.from_numpy(pixels)[None]))
    assert as_batch.shape == (2, 3, 64, 64)
    assert torch.equal(as_batch[1], as_pil)


def test_resizing_keeps_the_aspect_ratio_and_cuts_the_centre() -> None:
    image = torch.zeros(1, 40, 120, dtype=torch.uint8)
    image[:, :, 40:80] = 200
    resized = ImageTransform(40, HALF, HALF).resize(image)
    assert torch.equal(resized, torch.full((3, 40, 40), 200, dtype=torch.uint8))


def test_shrinking_antialiases() -> None:
    board = torch.zeros(1, 64, 64, dtype=torch.uint8)
    board[:, ::2] = 255
    shrunk = ImageTransform(8, HALF, HALF, "bilinear").resize(board)
    assert 110 < int(shrunk.min()) <= int(shrunk.max()) < 145


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(3, 8, 8), "must be uint8 .* got torch.float32"),
        (torch.zeros(2, 8, 8, dtype=torch.uint8), r"1 or 3 channels.*got torch.uint8 \[2, 8, 8\]"),
        (torch.zeros(8, 8, dtype=torch.uint8), r"got torch.uint8 \[8, 8\]"),
        (torch.zeros(3, 0, 8, dtype=torch.uint8), "and some pixels"),
        (np.zeros((8, 8, 3), dtype=np.uint8), "PIL image or a uint8 tensor, got ndarray"),
    ],
)
def test_what_is_no_image_is_refused(image: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageTransform(8, HALF, HALF)(image)
    with pytest.raises(ValueError, match=r"uint8 \[\.\.\., 3, 8, 8\], got torch.uint8 \[3, 9, 9\]"):
        ImageTransform(8, HALF, HALF).normalize(torch.zeros(3, 9, 9, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size must be a positive integer"),
        ({"std": (0.5, 0.0, 0.5)}, "std must be positive"),
        ({"interpolation": "cubic"}, "unknown interpolation 'cubic'.* Choose from: bilinear, bi"),
    ],
)
def test_a_transform_that_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageTransform(**{"image_size": 8, "mean": HALF, "std": HALF, **options})


# --- labelled images ---


@pytest.fixture
def dataset() -> ImageDataset:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3, 16, 16), dtype=np.uint8)
    return ImageDataset(torch.from_numpy(pixels), torch.arange(20) % 7, TRANSFORM)


@pytest.mark.parametrize("indices", [[4, 0, 4], torch.tensor([4, 0, 4]), slice(2, 7), [], [-1]])
def test_a_batch_is_its_items(indices: Any, dataset: ImageDataset) -> None:
    images, labels = dataset.batch(indices)
    wanted = range(20)[indices] if isinstance(indices, slice) else [int(i) for i in indices]
    assert images.shape == (len(wanted), 3, 16, 16)
    assert images.is_contiguous(memory_format=torch.channels_last) or len(wanted) < 2
    assert labels.dtype == torch.int64
    assert len(dataset) == 20
    for row, index in enumerate(wanted):
        image, label = dataset[index]
        assert isinstance(label, int)
        assert torch.equal(images[row], image)
        assert int(labels[row]) == label


def test_a_batch_is_normalised_on_the_device_asked_for(dataset: ImageDataset) -> None:
    # The device "meta" has shapes and no values; any other than the CPU is treated like it.
    images, labels = dataset.batch([3, 1], torch.device("meta"))
    assert images.device.type == labels.device.type == "meta"
    assert images.dtype == torch.float32


def test_a_subset_keeps_items_in_the_order_asked(dataset: ImageDataset) -> None:
    part = dataset.subset([7, 2])
    assert torch.equal(part.images, dataset.images[[7, 2]])
    assert torch.equal(part.batch([1])[0], dataset.batch([2])[0])


def test_indices_that_are_no_integers_are_refused(dataset: ImageDataset) -> None:
    wrong: Any
    for wrong in ([True, False], [0.5]):
        with pytest.raises(ValueError, match="indices must be integers"):
            dataset.batch(wrong)


def test_any_callable_on_pil_images_can_be_the_transform(dataset: ImageDataset) -> None:
    def transform(image: Image.Image) -> Tensor:
        assert image.mode == "RGB"
        assert image.size == (16, 16)
        return torch.full((3, 2, 2), float(np.asarray(image).sum()))

    data = ImageDataset(dataset.images, dataset.labels, transform)
    assert torch.equal(data[0][0], torch.full((3, 2, 2), float(data.images[0].sum())))
    images, labels = data.batch([1, 3])
    assert images.shape == (2, 3, 2, 2)
    assert torch.equal(labels, data.labels[[1, 3]])
    assert torch.equal(data.subset([3]).batch([0])[0], images[1:])
    flat = ImageDataset(dataset.images, dataset.labels, lambda image: torch.zeros(2))
    with pytest.raises(ValueError, match=r"float tensor \[3, H, W\], got torch.float32 \[2\]"):
        flat[0]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2).long(), "images must be uint8"),
        (torch.zeros(2, 1, 4, 4).byte(), torch.zeros(2).long(), r"\[N, 3, H, W\]"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.zeros(3).long(), r"labels must be int64 \[2\]"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.zeros(2), "got torch.float32"),
    ],
)
def test_images_and_labels_that_do_not_belong_together_are_refused(
    images: Tensor, labels: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ImageDataset(images, labels, TRANSFORM)
