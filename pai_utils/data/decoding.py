"""Image files and arrays to uint8 [N, 3, S, S]: each image decoded once, in memory or on disk.

Pixels that fit the budget (`PAI_DATA_MEMORY`, by default a quarter of the machine's memory) are
kept in memory. Others go to a file that is memory-mapped and found again by the next run.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pai_utils.data.images import ImageTransform, Transform, open_image
from pai_utils.support.common import listed, progress
from pai_utils.support.stored import write_atomically

Pixels = NDArray[np.uint8]
Positions = NDArray[np.int64]
OnError = Literal["raise", "skip"]
_CHUNK = 64  # images held at once between reading and their place among the result
_CACHE_FORMAT = 4
# All tasks share the machine's memory.
_IN_USE: WeakValueDictionary[int, Pixels] = WeakValueDictionary()


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
        for chunk in _chunked(positions):
            yield from transform.resize(self.raw(chunk))

    def fingerprint(self, positions: Positions) -> str:
        """What tells these images from others."""
        digest = hashlib.sha256()
        for chunk in _chunked(positions):
            digest.update(np.ascontiguousarray(self.pixels[chunk]).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class ImageFiles:
    """Images that lie in files, of any size and mode."""

    paths: Sequence[Path]  #: one an image
    labels: NDArray[np.int64]  #: [N]

    def resized(
        self, positions: Positions, transform: ImageTransform
    ) -> Iterator[Tensor | ValueError]:
        """The images one after the other, uint8 [3, S, S], or why one cannot be read."""

        def read(position: int) -> Tensor | ValueError:
            try:
                return transform.resize(open_image(self.paths[position]))
            except ValueError as error:
                return error

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for chunk in _chunked(positions):
                yield from pool.map(read, chunk.tolist())

    def fingerprint(self, positions: Positions) -> str:
        """What tells these files from others: names, sizes and times of change."""
        digest = hashlib.sha256()
        for position in positions.tolist():
            path = self.paths[position]
            digest.update(f"{path}\0".encode())
            if path.exists():
                found = path.stat()
                digest.update(f"{found.st_size} {found.st_mtime_ns}\0".encode())
        return digest.hexdigest()


Source = ImageArrays | ImageFiles


def _chunked(positions: Positions) -> Iterator[Positions]:
    return (positions[start : start + _CHUNK] for start in range(0, len(positions), _CHUNK))


def _memory_limit() -> int:
    """Bytes that `PAI_DATA_MEMORY` allows."""
    text = os.environ.get("PAI_DATA_MEMORY", "").strip()
    if not text:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    if found is None:
        raise ValueError(
            f"PAI_DATA_MEMORY={text!r} is no amount of memory; write bytes, or such as 500M or 8G"
        )
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " "))


def decode(
    source: Source,
    positions: Positions,
    transform: Transform,
    *,
    name: str,
    cache: Path,
    on_error: OnError = "raise",
) -> tuple[Tensor, Positions]:
    """Decode and resize the chosen images of a source, each of them once.

    ``positions`` are increasing. Without an `ImageTransform` arrays stay as they are. Pixels that
    do not fit the budget lie in memory-mapped files in the folder ``cache``.

    Returns:
        The images that could be read, uint8 [n, 3, S, S], and their positions in the source, [n].

    Raises:
        ValueError: files cannot be read, and `on_error` is "raise"; or files, of any size, come
            with another transform.
        OSError: the pixels fit neither the budget nor the disk.
    """
    if not isinstance(transform, ImageTransform):
        if isinstance(source, ImageArrays):
            return source.raw(positions).contiguous(), positions
        raise ValueError(
            f"the images of {name} are files of any size, which an ImageTransform brings to one; "
            "pass backbone.transform"
        )
    side = transform.image_size
    shape = (len(positions), 3, side, side)

    def fill(out: Pixels) -> Positions:
        """Write the images that can be read into `out`; gives their positions."""
        kept, problems = list[int](), []
        images = source.resized(positions, transform)
        bar = progress(images, f"decoding {name}", len(positions))
        for position, image in zip(positions.tolist(), bar, strict=True):
            if isinstance(image, Tensor):
                out[len(kept)] = image.numpy()
                kept.append(position)
            else:
                problems.append(image)
        if problems and on_error == "raise":
            raise ValueError(
                f"{len(problems)} images of {name} cannot be read; restore them, or pass on_error="
                f'"skip" to leave them out: {listed(problems)}'
            )
        return np.array(kept, dtype=np.int64)

    if sum(pixels.nbytes for pixels in _IN_USE.values()) + math.prod(shape) <= _memory_limit():
        pixels = np.empty(shape, np.uint8)
        _IN_USE[id(pixels)] = pixels
        kept = fill(pixels)
        return torch.from_numpy(pixels[: len(kept)]), kept
    versions = version("pillow"), version("torchvision")
    facts = _CACHE_FORMAT, name, shape, transform.interpolation, versions
    digest = hashlib.sha256(f"{facts} {source.fingerprint(positions)}".encode())
    digest.update(np.ascontiguousarray(positions).data)
    stem = re.sub(r"\W+", "-", name)[-60:].strip("-")
    path = cache / f"{stem}-{side}-{digest.hexdigest()[:32]}.npy"
    record = path.with_suffix(".json")  # what the pixels lack, written once they are whole
    left_out = json.loads(record.read_bytes()) if record.exists() and path.exists() else None
    # Files that were left out make an incomplete cache when they are an error now.
    if left_out is None or (left_out and on_error == "raise"):
        left_out = np.setdiff1d(positions, _write_cache(path, shape, fill)).tolist()
        write_atomically(record, json.dumps(left_out).encode())
    kept = np.setdiff1d(positions, left_out)
    # Copy-on-write: whoever changes the images does not change the file.
    mapped = np.load(path, mmap_mode="c", allow_pickle=False)
    return torch.from_numpy(mapped)[: len(kept)], kept


def _write_cache(
    path: Path, shape: tuple[int, ...], fill: Callable[[Pixels], Positions]
) -> Positions:
    """Decode into a file beside `path` that takes its name when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A full disk would end the process while it writes to mapped memory.
    needed, free = math.prod(shape), shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{path.name} takes {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; make "
            "room, take fewer or smaller images, or raise PAI_DATA_MEMORY",
            str(path.parent),
        )
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / path.name
        out = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        kept = fill(out)
        out.flush()
        temporary.replace(path)
    return kept
