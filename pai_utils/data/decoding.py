"""Image files and arrays to uint8 [N, 3, S, S]: each image decoded once.

Pixels of more than a quarter of the machine's memory lie in a temporary file that is memory-mapped.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pai_utils.data.images import ImageTransform, Transform, open_image
from pai_utils.support.common import listed, progress

Pixels = NDArray[np.uint8]
Positions = NDArray[np.int64]
OnError = Literal["raise", "skip"]
_CHUNK = 64  # images held at once between reading and their place among the result


@dataclass(frozen=True)
class ImageArrays:
    """Images of one size that lie in one array."""

    pixels: Pixels  #: [N, H, W] or [N, H, W, 3]
    labels: NDArray[np.int64]  #: [N]

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.pixels):
            raise ValueError(f"{len(self.pixels)} images but {len(self.labels)} labels")

    def raw(self, positions: Positions) -> Tensor:
        """Images as they are: uint8 [n, 3, H, W]."""
        pixels = torch.from_numpy(self.pixels[positions])
        if pixels.ndim == 3:
            return pixels.unsqueeze(1).expand(-1, 3, -1, -1)
        return pixels.permute(0, 3, 1, 2)

    def resized(self, positions: Positions, transform: ImageTransform) -> Iterator[Tensor]:
        """The images one after the other, uint8 [3, S, S]."""
        for chunk in np.split(positions, range(_CHUNK, len(positions), _CHUNK)):
            yield from transform.resize(self.raw(chunk))


@dataclass(frozen=True)
class ImageFiles:
    """Images that lie in files, of any size and mode."""

    paths: Sequence[Path]  #: one an image
    labels: NDArray[np.int64]  #: [N]

    def resized(
        self, positions: Positions, transform: ImageTransform
    ) -> Iterator[Tensor | ValueError]:
        """As of `ImageArrays`; in place of an image that cannot be read, why."""

        def read(position: int) -> Tensor | ValueError:
            try:
                return transform.resize(open_image(self.paths[position]))
            except ValueError as error:
                return error

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for chunk in np.split(positions, range(_CHUNK, len(positions), _CHUNK)):
                yield from pool.map(read, chunk.tolist())


Source = ImageArrays | ImageFiles


def decode(
    source: Source,
    positions: Positions,
    transform: Transform,
    *,
    name: str,
    on_error: OnError = "raise",
) -> tuple[Tensor, Positions]:
    """Decode and resize the chosen images of a source, at increasing positions, each once.

    Gives those that could be read, uint8 [n, 3, S, S], and their positions in the source, [n].
    Without an `ImageTransform` arrays stay as they are.

    Raises:
        ValueError: files cannot be read, and `on_error` is "raise"; or files, of any size, come
            with another transform.
        OSError: pixels that go to a file do not fit on the disk.
    """
    if not isinstance(transform, ImageTransform):
        if isinstance(source, ImageArrays):
            return source.raw(positions).contiguous(), positions
        raise ValueError(
            f"the images of {name} are files of any size, which an ImageTransform brings to one; "
            "pass backbone.transform"
        )
    side = transform.image_size
    pixels = _room_for((len(positions), 3, side, side), name)
    kept, problems = list[int](), []
    bar = progress(source.resized(positions, transform), f"decoding {name}", len(positions))
    for position, image in zip(positions.tolist(), bar, strict=True):
        if isinstance(image, Tensor):
            pixels[len(kept)] = image.numpy()
            kept.append(position)
        else:
            problems.append(image)
    if problems and on_error == "raise":
        raise ValueError(
            f"{len(problems)} images of {name} cannot be read; restore them, or pass on_error="
            f'"skip" to leave them out: {listed(problems)}'
        )
    return torch.from_numpy(pixels[: len(kept)]), np.array(kept, dtype=np.int64)


def _room_for(shape: tuple[int, ...], name: str) -> Pixels:
    """An array in memory, or in a temporary file that goes with its last reader."""
    size = math.prod(shape)
    if size <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4:
        return np.empty(shape, np.uint8)
    folder = tempfile.gettempdir()
    # A full disk would end the process while it writes to mapped memory.
    if size > (free := shutil.disk_usage(folder).free):
        raise OSError(
            f"the pixels of {name} take {size / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free "
            f"in {folder}; take fewer or smaller images, or name another folder by TMPDIR"
        )
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, np.uint8, shape=shape)
