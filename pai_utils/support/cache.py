"""Features, heads and scores that several runs need, computed by the first and kept in files.

Where the environment variable ``PAI_CACHE`` names a folder, results are kept there and read again
by whoever asks for the same. The first computes behind a lock for its key, and others wait for it.
A file's name is a digest of all that its content follows from: weights, images, labels, options,
the kind of device, the versions of the packages that compute, and the library's code that does,
without its docstrings and comments. What cannot be told apart for certain, such as a model with a
function of its own or images that are read when asked for, is not kept.

Cost: a hash of weights and images for each look, about a second a GB.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.utils.data import Dataset

from pai_utils.support.code import LIBRARY, closure, definition, file_of, version_of
from pai_utils.support.common import hash_tensors, logger
from pai_utils.support.sampling import agreed, this_process
from pai_utils.support.stored import located, read_tensors, write_tensors

FOLDER = "PAI_CACHE"
"""The environment variable that names the folder."""
MOST_BYTES = 20 * 2**30
"""What a folder holds at most; what was not used for longest makes room."""
_FORMAT = "pai_utils.support.cache/3"
_STARTED = time.time()
# Packages that compute, whose modules do the same as long as their version is the same.
_PACKAGES = ("numpy", "open_clip_torch", "scikit-learn", "scipy", "timm", "torch", "torchvision")
_VERSIONS = {package: version_of(package) for package in _PACKAGES}
_KNOWN = {"numpy", "open_clip", "timm", "torch", "torchvision", *sys.stdlib_module_names}


class Kept(NamedTuple):
    """What a computation gave: tensors by name, and facts that JSON can hold."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def reused(kind: str, parts: Mapping[str, Any], compute: Callable[[], Kept]) -> Kept:
    """What is kept of this computation, or else what ``compute`` gives, which is then kept.

    ``kind`` begins the file's name. ``parts`` are all that the result follows from: modules, data
    sets, plain values, and functions, which stand for their modules and all that these import. What
    is read is on the CPU. Under ``torchrun`` every process must call it.
    """
    folder = os.environ.get(FOLDER)
    # Inside `torch.autocast` results are those of a precision that no part names.
    mixed = any(map(torch.is_autocast_enabled, ("cpu", "cuda")))
    key = _key(parts, compute) if folder and not mixed else None
    if not folder or key is None:
        return compute()
    path = located(folder) / f"{kind}-{key}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    first = this_process()[0] == 0
    with FileLock(path.with_suffix(".lock")) if first else nullcontext():
        found = _read(path) if first else None
        if agreed(found is None):
            found = compute()
            if first:
                _write(path, found)
    found = found or _read(path)
    assert found is not None, path
    return found


def _write(path: Path, result: Kept) -> None:
    tensors = {name: value.detach().cpu().contiguous() for name, value in result.tensors.items()}
    write_tensors(path, tensors, json.dumps(result.facts, sort_keys=True), format=_FORMAT)
    _mark_used(path)
    with suppress(FileNotFoundError):  # others make room too
        files = [(file, file.stat()) for file in path.parent.glob("*.safetensors")]
        excess = sum(stat.st_size for _, stat in files) - MOST_BYTES
        for file, stat in sorted(files, key=lambda entry: entry[1].st_mtime_ns):
            if excess > 0:
                file.unlink()
                excess -= stat.st_size


def _mark_used(path: Path) -> None:
    now = time.time_ns()  # by itself a file takes the time of a clock that ticks too slowly
    os.utime(path, ns=(now, now))


def _read(path: Path) -> Kept | None:
    """The file's content; ``None`` where there is none, or where it is not whole."""
    try:
        tensors, text = read_tensors(path, _FORMAT, what="kept computation")
        _mark_used(path)
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        logger.warning("computing anew what %s should hold: %s", path, error)
        return None
    return Kept(tensors, json.loads(text))


def _key(parts: Mapping[str, Any], compute: Callable[[], Kept]) -> str | None:
    """A digest of everything; ``None`` where something cannot be described for certain."""
    stream = io.BytesIO()
    describer = _Describer(stream)
    try:
        describer.dump(sorted(parts.items()))
    except (pickle.PicklingError, AttributeError, TypeError, RecursionError):
        return None
    code = closure(describer.library)
    # What changed since this process began is not what it runs.
    if any(path.stat().st_mtime > _STARTED for path in map(file_of, code) if path):
        return None
    text = f"{_VERSIONS} {definition(compute)} {sorted(code.items())}"
    return hashlib.sha256(stream.getvalue() + text.encode()).hexdigest()[:24]


class _Describer(pickle.Pickler):
    """Writes what an object is: tensors by their bytes, functions and classes by their names.

    Whatever is not of a known package cannot be described: its name does not tell what it does.
    """

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=4)
        self.fast = True  # equal objects are written alike, whether or not they are one
        self.library: set[str] = set()

    def persistent_id(self, value: Any) -> object:
        """What is written in place of an object; ``None`` lets it be taken apart."""
        if isinstance(value, Tensor):
            return hash_tensors({"": value})
        if isinstance(value, (set, frozenset)):
            return sorted(map(repr, value))
        if isinstance(value, (type, FunctionType, BuiltinFunctionType)):
            module = value.__module__ or "builtins"
            root = module.partition(".")[0]
            # Transforms of torchvision draw at random.
            if root == LIBRARY:
                self.library.add(module)
            elif root not in _KNOWN or module.startswith("torchvision.transforms"):
                raise pickle.PicklingError(f"{value} may be anything")
        return None

    def reducer_override(self, value: Any) -> Any:
        """How an object is taken apart."""
        if isinstance(value, nn.Module):
            state = {k: v for k, v in vars(value).items() if k != "training"}  # it is evaluated
            return type(value), (), state
        if isinstance(value, Dataset):
            content: Any = value  # without a digest, it may read its images when asked for them
            return type(value), (content.digest, content.transform)
        return NotImplemented
