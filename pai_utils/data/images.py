"""From an image file to pixels for an encoder, and labelled images kept decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pai_utils.support.common import check_names, hash_tensors
from pai_utils.support.contract import WholeBatches

if TYPE_CHECKING:
    from PIL.Image import Image

INTERPOLATIONS = ("bilinear", "bicubic")


def open_image(path: Path) -> Image:
    """Read an image file as RGB; a ValueError names one that cannot be read."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except Exception as error:  # Pillow has many, for files that are altered or no image
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def to_rgb(image: Image) -> Image:
    """Convert a PIL image of any mode to RGB, as a viewer shows it, turned by its EXIF orientation.

    Sixteen-bit grey values are scaled to eight bits. Transparent images are laid on white. A
    ValueError refuses 32-bit integers and floats, whose range is not known.
    """
    from PIL import ExifTags, ImageOps

    pixels = _as_stored(image)
    pixels.info.clear()  # or it would be turned again
    with suppress(Exception):  # damaged EXIF does not damage the pixels
        orientation = ExifTags.Base.Orientation
        pixels.getexif()[orientation] = image.getexif().get(orientation, 1)
    return ImageOps.exif_transpose(pixels)


def _as_stored(image: Image) -> Image:
    """The pixels as RGB, not turned."""
    from PIL import Image

    # In these formats the mode of 32-bit integers holds 16-bit grey values.
    sixteen = image.mode == "I" and image.format in ("PNG", "PPM")
    if sixteen or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.float64)
        values[values == image.info.get("transparency")] = 65535
        return Image.fromarray(np.rint(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no known range; save it with 8 or 16 bits")
    if image.has_transparency_data:  # the colour under full transparency is arbitrary
        opaque = image.convert("RGBA")
        paper = Image.new("RGBA", opaque.size, "white")
        return Image.alpha_composite(paper, opaque).convert("RGB")
    return image.convert("RGB")


def check_image_size(image_size: int) -> None:
    """Refuse what is no number of pixels."""
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
        raise ValueError(f"image_size must be a positive integer, got {image_size!r}")


def _unfit(what: str, needed: str, found: object) -> ValueError:
    kind = type(found).__name__
    if isinstance(found, Tensor):
        kind = f"{found.dtype} {list(found.shape)}"
    return ValueError(f"{what} must be {needed}, got {kind}")


@dataclass(frozen=True)
class ImageTransform:
    """Preprocessing of one encoder, in two steps: `resize` to uint8, then `normalize` to float.

    Calling it does both. Datasets apply `resize` once and `normalize` at each access.
    """

    image_size: int  #: side S of the square result, in pixels
    mean: tuple[float, float, float]  #: subtracted from each channel, whose values are in [0, 1]
    std: tuple[float, float, float]  #: each channel is then divided by this
    interpolation: str = "bicubic"  #: one of `INTERPOLATIONS`, always antialiased

    def __post_init__(self) -> None:
        check_image_size(self.image_size)
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")
        check_names("interpolation", [self.interpolation], INTERPOLATIONS)

    def __call__(self, images: Image | Tensor) -> Tensor:
        """Resize and normalise an image, or a batch as a tensor: float32 [..., 3, S, S]."""
        return self.normalize(self.resize(images))

    def resize(self, images: Image | Tensor) -> Tensor:
        """Bring a PIL image, or uint8 [C, H, W] or [N, C, H, W], to uint8 [..., 3, S, S].

        The shorter side becomes S with the aspect ratio kept, then the centre is cut out. Grey
        images are repeated over the three channels.

        Raises:
            ValueError: the input is neither of these.
        """
        from PIL.Image import Image
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional

        pixels = images
        if isinstance(images, Image):
            pixels = torch.from_numpy(np.array(to_rgb(images))).permute(2, 0, 1)
        if not isinstance(pixels, Tensor):
            raise _unfit("an image", "a PIL image or a uint8 tensor", pixels)
        shape, size = pixels.shape, self.image_size
        whole = len(shape) in (3, 4) and shape[-3] in (1, 3) and 0 not in shape[-2:]
        if pixels.dtype != torch.uint8 or not whole:
            kinds = "uint8 [C, H, W] or [N, C, H, W] with 1 or 3 channels and some pixels"
            raise _unfit("images to resize", kinds, pixels)
        if tuple(shape[-2:]) != (size, size):
            scaled = [max(size, round(side * size / min(shape[-2:]))) for side in shape[-2:]]
            pixels = functional.resize(
                pixels, scaled, InterpolationMode(self.interpolation), antialias=True
            )
            pixels = functional.center_crop(pixels, [size, size])
        return pixels.expand(*pixels.shape[:-3], 3, size, size).contiguous()

    def normalize(self, images: Tensor) -> Tensor:
        """Turn uint8 [..., 3, S, S] into float32: (x / 255 - mean) / std."""
        size = self.image_size
        if images.dtype != torch.uint8 or tuple(images.shape[-3:]) != (3, size, size):
            raise _unfit("images to normalise", f"uint8 [..., 3, {size}, {size}]", images)
        shift, scale = (_channels(values, images.device) for values in (self.mean, self.std))
        return images.to(torch.float32).sub_(shift).div_(scale)


@lru_cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Values ``[3, 1, 1]`` in units of a pixel: moved once, since each move waits for a GPU."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1) * 255


Transform = ImageTransform | Callable[[Any], Tensor]
"""What is applied to images: an encoder's, or any callable from PIL to a float [3, H, W]."""


@dataclass(frozen=True, eq=False, repr=False)
class ImageDataset(WholeBatches):
    """Labelled images kept decoded: in memory, or in a memory-mapped file.

    An `ImageTransform` brings them to its size at once, so that only the normalisation is left for
    each access; any other transform is applied at each access.

    Raises:
        ValueError: images and labels of other types, shapes or counts.
    """

    images: Tensor  #: uint8 [N, 3, H, W]
    labels: Tensor  #: int64 [N]
    transform: Transform
    _copies: dict[torch.device, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise _unfit("images", "uint8 [N, 3, H, W]", images)
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise _unfit("labels", f"int64 [{len(images)}]", labels)
        if isinstance(self.transform, ImageTransform):
            object.__setattr__(self, "images", self.transform.resize(images))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of pixels, labels and transform; the tensors must not change in place."""
        return hash_tensors({"images": self.images, "labels": self.labels}, repr(self.transform))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        if isinstance(self.transform, ImageTransform):
            return self.transform.normalize(image), int(self.labels[index])
        from PIL.Image import fromarray

        result = self.transform(fromarray(image.permute(1, 2, 0).contiguous().numpy()))
        if not isinstance(result, Tensor) or result.ndim != 3 or not result.is_floating_point():
            raise _unfit("what transform gives", "a float tensor [3, H, W]", result)
        return result, int(self.labels[index])

    def batch(
        self, indices: Sequence[int] | Tensor | slice, device: torch.device | None = None
    ) -> tuple[Tensor, Tensor]:
        """Several items at once: float [B, 3, S, S] and int64 [B].

        With an `ImageTransform`, pixels are moved to a GPU once, as uint8, and normalised there;
        more than one image comes in channels-last order, in which convolutions run faster.
        """
        chosen = self._positions(indices)
        labels = self.labels[chosen]
        if isinstance(self.transform, ImageTransform):
            images = self._pixels(device)
            rows = chosen.to(images.device, non_blocking=True)
            pixels = images[rows].to(device or self.images.device)
            if len(pixels) > 1:
                pixels = pixels.contiguous(memory_format=torch.channels_last)
            images = self.transform.normalize(pixels)
        else:
            images = torch.stack([self[index][0] for index in chosen.tolist()])
        return images.to(device or images.device), labels.to(device or labels.device)

    def _pixels(self, device: torch.device | None) -> Tensor:
        """The images on ``device``, moved there once; where they are if they would not fit."""
        if device is None or device.type == self.images.device.type:
            return self.images
        if device not in self._copies:
            fits = True
            if device.type == "cuda":  # half of its memory stays free for activations
                free, total = torch.cuda.mem_get_info(device)
                fits = free - self.images.nbytes > total / 2
            self._copies[device] = self.images
            if fits:
                with suppress(torch.OutOfMemoryError):  # others may have taken what was free
                    self._copies[device] = self.images.to(device)
        return self._copies[device]

    def subset(self, indices: Sequence[int] | Tensor | slice) -> ImageDataset:
        """Keep the given items, in the given order."""
        chosen = self._positions(indices)
        return ImageDataset(self.images[chosen], self.labels[chosen], self.transform)

    def _positions(self, indices: Sequence[int] | Tensor | slice) -> Tensor:
        if isinstance(indices, slice):
            return torch.arange(len(self))[indices]
        positions = torch.as_tensor(indices)  # an empty list has no type of its own
        if positions.numel() and (positions.dtype == torch.bool or positions.is_floating_point()):
            raise ValueError(f"indices must be integers, got {positions.dtype}")
        return positions.to(torch.int64)
