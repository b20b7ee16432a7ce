"""Features, heads and scores that several runs need, computed once and kept in files.

Where the environment variable ``PAI_SHARED`` names a folder, what is found there is read instead of
computed. A file's name is a digest of all that its content follows from: weights, images, labels,
options, the kind of device, the versions of the packages that compute, and the library's own code.
Nothing can therefore be read for what it is not, and nothing goes stale. Runs only read; a folder
is filled inside :func:`keeping`, by ``workflow/share.py`` before the runs begin.

Cost: one hash of weights and images a look, about a second a GB.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pai_utils.support.common import hash_tensors, logger
from pai_utils.support.stored import read_header, read_tensors, write_tensors

FOLDER = "PAI_SHARED"
"""The environment variable that names the folder."""
_FORMAT = "pai_utils.support.cache/2"
_keeps: ContextVar[list[str] | None] = ContextVar("_keeps", default=None)
_ignores: ContextVar[bool] = ContextVar("_ignores", default=False)
_used: dict[str, str] = {}
_digests: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


class Kept(NamedTuple):
    """What a computation gave: tensors by name, and facts that JSON can hold."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


@contextmanager
def keeping() -> Iterator[list[str]]:
    """Keep inside what is computed; yields the names of files read and written, as they come."""
    names: list[str] = []
    token = _keeps.set(names)
    try:
        yield names
    finally:
        _keeps.reset(token)


@contextmanager
def ignored() -> Iterator[None]:
    """Compute everything anew inside, to measure what it costs."""
    token = _ignores.set(True)
    try:
        yield
    finally:
        _ignores.reset(token)


def used_files() -> dict[str, str]:
    """Files that this process read, with the checksums of their contents."""
    return dict(_used)


def gather(files: Iterable[Path], folder: Path) -> None:
    """Make kept files, moved and renamed since, a folder that runs find them in, by links.

    A file that cannot be read is left out: what it should hold is computed anew.
    """
    for file in files:
        try:
            name = read_header(file).get("name")
        except (ValueError, OSError) as error:
            logger.warning("%s cannot be read: %s", file, error)
            continue
        if name is not None and not (folder / name).exists():
            (folder / name).symlink_to(file.resolve())


def reused(kind: str, parts: Mapping[str, Any], compute: Callable[[], Kept]) -> Kept:
    """What is kept of this computation, or else what ``compute`` gives.

    Args:
        kind: what it is, such as ``"scores"``; begins the file's name.
        parts: all that the result follows from: modules, datasets, and what JSON can hold, the
            kind of device among them.
        compute: the computation.

    Returns:
        What was computed, or what was read, which is on the CPU.
    """
    folder = os.environ.get(FOLDER)
    # Inside `torch.autocast` results are those of a precision that no part names.
    mixed = any(map(torch.is_autocast_enabled, ("cpu", "cuda")))
    if not folder or _ignores.get() or mixed:
        return compute()
    digest = _name_of(parts)
    if digest is None:
        return compute()
    name = f"{kind}-{digest}.safetensors"
    path = Path(folder) / name
    found = _read(path)
    kept = _keeps.get()
    if kept is not None:
        kept.append(name)
    if found is None:
        result = compute()
        if kept is not None:
            _write(path, result)
        return result
    return found


def _write(path: Path, result: Kept) -> None:
    tensors = {name: value.detach().cpu().contiguous() for name, value in result.tensors.items()}
    facts = json.dumps(result.facts, sort_keys=True)
    write_tensors(path, tensors, facts, format=_FORMAT, name=path.name)


def _read(path: Path) -> Kept | None:
    """The file's content; ``None`` where there is none, or where it is not whole."""
    if not path.is_file():
        return None
    try:
        tensors, header = read_tensors(path, _FORMAT, what="kept computation")
    except (ValueError, OSError) as error:
        logger.warning("computing anew what %s should hold: %s", path, error)
        return None
    _used[path.name] = header["sha256"]
    return Kept(tensors, json.loads(header["text"]))


def _name_of(parts: Mapping[str, Any]) -> str | None:
    """Of everything; ``None`` if a part is nothing that can be looked at as a whole."""
    digest = hashlib.sha256(f"{_code()} {_versions()}\n".encode())
    for name in sorted(parts):
        value = parts[name]
        if isinstance(value, nn.Module):
            text = _module(value)
        elif hasattr(value, "images") and hasattr(value, "labels"):
            text = digest_of(value)
        else:
            try:
                text = json.dumps(value, sort_keys=True)
            except TypeError:  # a dataset that reads its images when asked, or an object
                return None
        digest.update(f"{name}={text}\n".encode())
    return digest.hexdigest()[:24]


def _module(module: nn.Module) -> str:
    """Of the architecture and all parameters and buffers: they may have changed since."""
    lines = [repr(module)]
    for name, part in module.named_modules():
        plain = {k: v for k, v in vars(part).items() if isinstance(v, (bool, int, float, str))}
        plain.pop("training", None)  # everything is computed in evaluation mode
        lines.append(f"{name} {sorted(plain.items())}\n")
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return hash_tensors(tensors, "".join(lines))


def digest_of(data: Any) -> str:
    """SHA-256 of a dataset's pixels, labels and transform; it is not to change once it is made.

    Args:
        data: with ``images``, ``labels`` and ``transform``, such as
            :class:`~pai_utils.data.images.ImageDataset`.
    """
    if data not in _digests:
        content = {"images": data.images, "labels": data.labels}
        _digests[data] = hash_tensors(content, repr(data.transform))
    return _digests[data]


@cache
def _versions() -> str:
    """Of the packages that compute."""
    packages = ("numpy", "scikit-learn", "scipy", "timm", "torch", "torchvision")
    return " ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)


@cache
def _code() -> str:
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
