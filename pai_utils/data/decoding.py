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
import struct
import tempfile
import weakref
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pai_utils.data.images import ImageTransform
from pai_utils.support.common import logger, progress
from pai_utils.support.stored import write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = NDArray[np.uint8]
Positions = NDArray[np.int64]
OnError = Literal["raise", "skip"]
_CHUNK = 64
_WORKERS = 8
_NAMED_FILES = 5
_CACHE_FORMAT = 1
_STEM_LENGTH = 60
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Formats whose 32-bit integer mode holds 16-bit grey values.
_SIXTEEN_BIT_FORMATS = {"PNG", "PPM"}
# What Pillow raises for files that are truncated, altered or no image.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)


def to_channels(images: Pixels) -> Tensor:
    """Turn grey [N, H, W] or colour [N, H, W, 3] pixels into uint8 [N, 3, H, W]."""
    if images.ndim == 3:
        return torch.from_numpy(images).unsqueeze(1).expand(-1, 3, -1, -1)
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class ImageArrays:
    """Images of one size that lie in one array.

    Attributes:
        pixels: uint8 [N, H, W] or [N, H, W, 3]; anything that numpy-like indexing by increasing
            positions reads from.
        labels: int64 [N].
        identity: names the array's content where reading all of it would take long.

    Raises:
        ValueError: images and labels of different counts, or pixels of another type or shape.
    """

    pixels: Any
    labels: NDArray[np.int64]
    identity: str | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.pixels.shape)
        if len(shape) not in (3, 4) or shape[3:] not in ((), (3,)) or self.pixels.dtype != np.uint8:
            raise ValueError(
                "pixels must be uint8 [N, H, W] or [N, H, W, 3], got "
                f"{self.pixels.dtype} {list(shape)}"
            )
        if len(self.labels) != shape[0]:
            raise ValueError(f"{shape[0]} images but {len(self.labels)} labels")

    def raw(self, positions: Positions) -> Tensor:
        """Images as they are: uint8 [n, 3, H, W]."""
        return to_channels(np.asarray(self.pixels[positions]))

    def chunks(
        self, positions: Positions, transform: ImageTransform
    ) -> Iterator[list[Tensor | ValueError]]:
        """Resized images, some at a time."""
        for chunk in _chunked(positions):
            yield list(transform.resize(self.raw(chunk)))

    def fingerprint(self, positions: Positions) -> bytes:
        """What tells these images from others."""
        if self.identity is not None:
            return self.identity.encode()
        digest = hashlib.sha256()
        for chunk in _chunked(positions):
            digest.update(np.ascontiguousarray(self.pixels[chunk]).data)
        return digest.digest()


@dataclass(frozen=True)
class ImageFiles:
    """Images that lie in files, of any size and mode.

    Attributes:
        paths: one file an image.
        labels: int64 [N].
    """

    paths: Sequence[Path]
    labels: NDArray[np.int64]

    def chunks(
        self, positions: Positions, transform: ImageTransform
    ) -> Iterator[list[Tensor | ValueError]]:
        """Resized images, some at a time; an error in the place of a file that is unreadable."""

        def read(position: int) -> Tensor | ValueError:
            path = self.paths[position]
            try:
                return transform.resize(open_image(path))
            except ValueError as error:
                return error

        with ThreadPoolExecutor(min(_WORKERS, os.cpu_count() or 1)) as pool:
            for chunk in _chunked(positions):
                yield list(pool.map(read, chunk.tolist()))

    def fingerprint(self, positions: Positions) -> bytes:
        """What tells these files from others: names, sizes and times of change."""
        digest = hashlib.sha256()
        for position in positions.tolist():
            path = self.paths[position]
            digest.update(f"{path}\0".encode())
            if path.exists():
                found = path.stat()
                digest.update(f"{found.st_size} {found.st_mtime_ns}\0".encode())
        return digest.digest()


Source = ImageArrays | ImageFiles


def _chunked(positions: Positions) -> Iterator[Positions]:
    return (positions[start : start + _CHUNK] for start in range(0, len(positions), _CHUNK))


def open_image(path: Path) -> Image:
    """Read an image file as RGB.

    Raises:
        ValueError: the file is missing, truncated, no image, or of a mode without a known range.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except (*_UNREADABLE, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def to_rgb(image: Image) -> Image:
    """Convert a PIL image of any mode to RGB.

    Sixteen-bit grey values are scaled to eight bits. Transparent images are laid on white, as a
    viewer shows them: what colour lies under full transparency is arbitrary.

    Raises:
        ValueError: 32-bit integers or floats, whose range is not known.
    """
    from PIL import Image

    sixteen = image.mode.startswith("I;16") or (
        image.mode == "I" and image.format in _SIXTEEN_BIT_FORMATS
    )
    if sixteen:
        values = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(np.rint(values).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no known range; save it with 8 or 16 bits")
    if image.has_transparency_data:
        opaque = image.convert("RGBA")
        paper = Image.new("RGBA", opaque.size, "white")
        return Image.alpha_composite(paper, opaque).convert("RGB")
    return image.convert("RGB")


class MemoryBudget:
    """How many bytes of pixels may be kept in memory; they count for as long as they are used.

    Args:
        limit: bytes. Default: `PAI_DATA_MEMORY`, such as `8G` or a number of bytes, then a quarter
            of the machine's memory.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._taken = 0

    @property
    def left(self) -> int:
        """Bytes that may still be taken.

        Raises:
            ValueError: `PAI_DATA_MEMORY` is no amount of memory.
        """
        return (_memory_limit() if self._limit is None else self._limit) - self._taken

    def empty(self, shape: tuple[int, ...]) -> Pixels | None:
        """An array for pixels, or `None` if it does not fit."""
        size = math.prod(shape)
        if size > self.left:
            return None
        pixels: Pixels = np.empty(shape, np.uint8)
        self._taken += size
        weakref.finalize(pixels, self._give_back, size)
        return pixels

    def _give_back(self, size: int) -> None:
        self._taken -= size


_OF_PROCESS = MemoryBudget()  # all tasks share the machine's memory


def _memory_limit() -> int:
    text = os.environ.get("PAI_DATA_MEMORY", "").strip()
    if not text:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    if found is None:
        raise ValueError(
            f"PAI_DATA_MEMORY={text!r} is no amount of memory; write bytes, or such as 500M or 8G"
        )
    return int(float(found[1]) * _UNITS[found[2].upper()])


@dataclass(frozen=True)
class Decoded:
    """Images of one part, ready for one encoder."""

    images: Tensor
    """uint8 [n, 3, S, S]."""
    kept: Positions
    """Positions in the source of the images that could be read, [n]."""
    skipped: tuple[str, ...]
    """Files that could not."""


def decode(
    source: Source,
    positions: Positions,
    transform: ImageTransform,
    *,
    name: str,
    cache: Path,
    budget: MemoryBudget | None = None,
    on_error: OnError = "raise",
) -> Decoded:
    """Decode and resize the chosen images of a source, each of them once.

    Args:
        source: where the images are.
        positions: which of them, increasing, [N].
        transform: whose `resize` is applied.
        name: of the data set and its part, for messages and the cache's files.
        cache: folder of memory-mapped pixels, used when they do not fit the budget.
        budget: of what may be kept in memory. Default: one that all calls share.
        on_error: "raise" at the first file that cannot be read, or "skip" and count them.

    Raises:
        ValueError: a file cannot be read, and `on_error` is "raise".
        OSError: the pixels fit neither the budget nor the disk.
    """
    side = transform.image_size
    shape = (len(positions), 3, side, side)
    pixels = (budget or _OF_PROCESS).empty(shape)
    if pixels is not None:
        decoded = _fill(pixels, source, positions, transform, name, on_error)
    else:
        decoded = _through_cache(shape, source, positions, transform, name, cache, on_error)
    if decoded.skipped:
        named = ", ".join(decoded.skipped[:_NAMED_FILES])
        more = len(decoded.skipped) - _NAMED_FILES
        logger.warning(
            "%s: %d of %d images cannot be read and are left out: %s",
            name,
            len(decoded.skipped),
            len(positions),
            f"{named} and {more} more" if more > 0 else named,
        )
    return decoded


def _fill(
    out: Pixels,
    source: Source,
    positions: Positions,
    transform: ImageTransform,
    name: str,
    on_error: OnError,
) -> Decoded:
    """Write the images into `out`, one after the other."""
    kept = np.zeros(len(positions), bool)
    skipped: list[str] = []
    filled = 0
    results = (result for chunk in source.chunks(positions, transform) for result in chunk)
    shown: Iterable[Tensor | ValueError] = progress(results, f"decoding {name}", len(positions))
    for index, result in enumerate(shown):
        if isinstance(result, Tensor):
            out[filled] = result.numpy()
            kept[index] = True
            filled += 1
        elif on_error == "raise":
            raise ValueError(
                f'{result}; restore the file, or pass on_error="skip" to leave such images out'
            ) from result
        elif isinstance(source, ImageFiles):
            skipped.append(str(source.paths[int(positions[index])]))
    return Decoded(torch.from_numpy(out[:filled]), positions[kept], tuple(skipped))


def _through_cache(
    shape: tuple[int, ...],
    source: Source,
    positions: Positions,
    transform: ImageTransform,
    name: str,
    cache: Path,
    on_error: OnError,
) -> Decoded:
    """Memory-map pixels that an earlier run has decoded, or decode them into such a file."""
    key = hashlib.sha256(
        repr(
            (
                _CACHE_FORMAT,
                name,
                shape,
                transform.interpolation,
                version("pillow"),
                version("torchvision"),
                hashlib.sha256(np.ascontiguousarray(positions).data).hexdigest(),
                source.fingerprint(positions).hex(),
            )
        ).encode()
    ).hexdigest()
    stem = re.sub(r"\W+", "-", name)[-_STEM_LENGTH:].strip("-")
    path = cache / f"{stem}-{transform.image_size}-{key[:16]}.npy"
    record = path.with_suffix(".json")
    found = _mapped(path, record, key, positions)
    # Files that were left out make an incomplete cache when they are an error now.
    if found is not None and not (found.skipped and on_error == "raise"):
        return found
    cache.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)
    # A full disk would end the process while it writes to mapped memory.
    needed, free = math.prod(shape), shutil.disk_usage(cache).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"the decoded images of {name} take {needed / 2**30:.1f} GiB and {free / 2**30:.1f} "
            "GiB are free; make room, take fewer or smaller images, or raise PAI_DATA_MEMORY",
            str(cache),
        )
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / path.name
        out = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        decoded = _fill(out, source, positions, transform, name, on_error)
        out.flush()
        temporary.replace(path)
    facts = {
        "key": key,
        "sha256": _digest(path),
        "skipped": decoded.skipped,
        "left_out": sorted(set(positions.tolist()) - set(decoded.kept.tolist())),
    }
    # Written last: without it the pixels are not used.
    write_atomically(record, json.dumps(facts).encode())
    again = _mapped(path, record, key, positions)
    if again is None:
        raise OSError(f"{path} cannot be read back; is its disk full or failing?")
    return again


def _mapped(path: Path, record: Path, key: str, positions: Positions) -> Decoded | None:
    """Pixels of the cache if they are whole; `None` otherwise."""
    try:
        facts = json.loads(record.read_bytes())
        if facts["key"] != key:
            return None
        if facts["sha256"] != _digest(path):
            logger.warning("%s is corrupt and is decoded again", path)
            return None
        kept = positions[~np.isin(positions, facts["left_out"])]
        # Copy-on-write: whoever changes the images does not change the file.
        pixels = np.load(path, mmap_mode="c", allow_pickle=False)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s cannot be used and is decoded again: %s", path, error)
        return None
    return Decoded(torch.from_numpy(pixels)[: len(kept)], kept, tuple(facts["skipped"]))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
