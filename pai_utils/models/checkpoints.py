"""Files of weights: finding, fetching and checking them, and loading the encoder they hold.

Published files differ in what they wrap around an encoder's tensors. These layouts are read as
they are, and a `CheckpointReport` says which one it was and what was left out:

- a plain state dict, of timm, of torchvision or of DINO's backbone files;
- one under the key `state_dict` or `model`, beside an optimizer's state, an epoch, arguments;
- names under `module.`, as `DataParallel` writes them;
- MoCo's, of which the query encoder (`encoder_q.`) is taken;
- DINO's training file, of which the teacher's `backbone.` is taken.

Nothing is ever unpickled into arbitrary objects, and a file that does not fit is refused whole.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import math
import os
import pickle
import re
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from pai_utils.support.common import logger, watched

SUFFIXES = (".safetensors", ".pth", ".pt", ".pth.tar")
"""Endings of the files that can be read."""
_LISTED_NAMES = 5
# What reading altered bytes can end in: a pickle's opcodes then act on the wrong operands.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class CheckpointReport:
    """What a file held, and what of it an encoder did not take."""

    file: str
    """Name of the file, without its folder."""
    layout: str
    """How the encoder's tensors lay in it."""
    head: tuple[str, ...]
    """Tensors left out because they belong to a classifier or a projection head."""
    other: tuple[str, ...]
    """Further entries left out, such as another network's tensors or a training's state."""

    def __str__(self) -> str:
        parts = (("the head's", self.head), ("other", self.other))
        left = [f"{len(names)} {what}: {_listed(names)}" for what, names in parts if names]
        return f"{self.file} is {self.layout}; left out: {'; '.join(left) or 'nothing'}"


def weights_root() -> Path:
    """Folder of fetched weights: `PAI_WEIGHTS_ROOT`, or the one torchvision uses."""
    given = os.environ.get("PAI_WEIGHTS_ROOT")
    return Path(given).expanduser() if given else Path(torch.hub.get_dir()) / "checkpoints"


def fetch(url: str, path: Path, digest: str | None) -> None:
    """Download a checkpoint to `path`, where it appears only once it is complete and checked.

    Args:
        url: its publisher's address.
        path: where to keep it; its folder is made.
        digest: what `check_digest` takes, or `None` if the publisher gives none. Either way
            the file is read once, since a connection that is cut ends like a complete one.

    Raises:
        ConnectionError: the address cannot be read.
        ValueError: what came is not the expected file, or no checkpoint. Nothing is kept of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        partial = Path(folder) / path.name
        try:
            torch.hub.download_url_to_file(url, str(partial), progress=watched())
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(
                f"{url} could not be fetched ({error}); download it elsewhere and save it as {path}"
            ) from error
        if digest is not None:
            check_digest(partial, digest, f"what {url} sent was not kept; fetch it again")
        read_checkpoint(partial)
        partial.replace(path)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_digest(path: Path, expected: str, advice: str) -> None:
    """Compare a file with a digest, or with as many of its first digits as are known.

    Args:
        path: the file.
        expected: hexadecimal digits of its SHA-256, possibly after `sha256:`, or of its MD5
            after `md5:`.
        advice: what to do if it differs, for the error.

    Raises:
        ValueError: it differs.
    """
    kind, _, digits = expected.lower().rpartition(":")
    if kind == "md5":
        with path.open("rb") as file:
            # The publisher's own digest, and no more than a guard against damage.
            found = hashlib.file_digest(
                file, lambda: hashlib.md5(usedforsecurity=False)
            ).hexdigest()
    else:
        found = sha256_of(path)
    if not digits or not found.startswith(digits):
        raise ValueError(
            f"{path.name} is damaged or not the expected file: its "
            f"{'MD5' if kind == 'md5' else 'SHA-256'} is {found}, expected {expected}; {advice}"
        )


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a file, with the names it has there, without running any code.

    A `.pth` file stores a CRC of each tensor, which `torch.load` does not compare; it is compared
    here. A `.safetensors` file, or a `.pth` file from before PyTorch 1.6, stores none: only a
    known digest finds a flipped bit in it.

    Raises:
        ValueError: the file is cut short, altered, or holds no named tensors.
    """
    return _find_state(_read(path), path.name)[0]


def load_checkpoint(encoder: nn.Module, path: Path, architecture: str) -> CheckpointReport:
    """Load the encoder that a file holds in any of the published layouts.

    The head's tensors are left out, by the name timm has for the classifier; all others must fit
    exactly, apart from the grid of position embeddings, which are interpolated. The counters of
    BatchNorm, which older files lack and no output depends on, may be missing.

    Args:
        encoder: timm model without classifier, changed in place.
        path: file with one of the endings `SUFFIXES`.
        architecture: name of the model, for errors.

    Raises:
        ValueError: the file cannot be read, or its names or shapes are not the encoder's.
    """
    state, keys, other = _find_state(_read(path), path.name)
    layout = f"a state dict under {'/'.join(keys)}" if keys else "a plain state dict"
    head: list[str] = []
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
        layout += ", of DataParallel"
    if any(name.startswith("encoder_q.") for name in state):
        layout = "a training file of MoCo, whose query encoder is taken"
        state, left = _split(state, "encoder_q.", ("encoder_k.", "queue"), path.name)
        other += left
    elif keys == ["teacher"] and any(name.startswith("backbone.") for name in state):
        layout = "a training file of DINO, whose teacher is taken"
        state, head = _split(state, "backbone.", ("head.",), path.name)

    expected = encoder.state_dict()
    config = getattr(encoder, "default_cfg", {})
    named = config.get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ((named,) if isinstance(named, str) else named))
    classifier = [name for name in state if name not in expected and name.startswith(prefixes)]
    state = {name: value for name, value in state.items() if name not in classifier}
    counters = {
        name: value for name, value in expected.items() if name.endswith(".num_batches_tracked")
    }
    load_state(encoder, counters | state, path.name, architecture)
    report = CheckpointReport(path.name, layout, (*head, *classifier), tuple(other))
    logger.info("%s", report)
    return report


def load_state(encoder: nn.Module, state: dict[str, Tensor], file: str, architecture: str) -> None:
    """Load a state dict that must fit exactly, apart from the grid of position embeddings.

    Raises:
        ValueError: names are missing, unexpected or of another shape, or values not finite. The
            encoder is as it was.
    """
    state = _fit_position_embedding(encoder, state)
    expected = encoder.state_dict()
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    shapes = [
        f"{name} {list(state[name].shape)} instead of {list(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    problems = [
        f"{len(names)} {what}: {_listed(names)}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
        )
        if names
    ]
    if problems:
        raise ValueError(f"{file} does not fit {architecture}: {'; '.join(problems)}")
    broken = [
        name
        for name, value in state.items()
        if value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]
    if broken:
        raise ValueError(f"{file} holds weights that are not finite: {_listed(broken)}")
    encoder.load_state_dict(state, strict=True)


def resample_position(position: Tensor, encoder: nn.Module, *, antialias: bool) -> Tensor:
    """Interpolate a position embedding [1, tokens, dim] of a square grid to the encoder's grid."""
    from timm.layers.pos_embed import resample_abs_pos_embed

    embedding = encoder.get_parameter("pos_embed")
    height, width = cast(tuple[int, int], encoder.get_submodule("patch_embed").grid_size)
    prefix = embedding.shape[1] - height * width
    resampled: Tensor = resample_abs_pos_embed(
        position, new_size=[height, width], num_prefix_tokens=prefix, antialias=antialias
    )
    return resampled


def _read(path: Path) -> object:
    """Read what a file holds: tensors, and beside them plain values and arguments."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"the CRC of {damaged} does not match")
        # Training files hold the command's arguments; a Namespace is a bag of values that runs
        # nothing when it is rebuilt.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return cast(object, torch.load(path, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        found = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        which = f" ({found[1]})" if found else ""
        raise ValueError(
            f"{path.name} is damaged, or holds objects other than tensors{which}, which are not "
            "loaded because they could run code; fetch it again, or ask its publisher for a file "
            "of the state dict alone, best as .safetensors"
        ) from error
    except (SafetensorError, *_DAMAGE) as error:
        raise ValueError(f"{path.name} is truncated or damaged: {error}") from error


def _find_state(content: object, file: str) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Find the state dict in a file: itself, the keys it lies under, the entries beside it."""
    keys, other = list[str](), list[str]()
    for key in ("teacher", "state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            keys.append(key)
            other += [str(name) for name in content if name != key]
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{file} holds no state dict")
    strangers = [
        str(name)
        for name, value in content.items()
        if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if strangers:
        raise ValueError(f"{file} holds entries that are not tensors: {_listed(strangers)}")
    return dict(content), keys, other


def _split(
    state: dict[str, Tensor], taken: str, left: tuple[str, ...], file: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Take the tensors under one prefix, without it, and name those under prefixes left out."""
    strangers = [name for name in state if not name.startswith((taken, *left))]
    if strangers:
        raise ValueError(
            f"{file} holds {len(strangers)} unexpected names beside {taken}*: {_listed(strangers)}"
        )
    return (
        {name.removeprefix(taken): state[name] for name in state if name.startswith(taken)},
        [name for name in state if name.startswith(left)],
    )


def _fit_position_embedding(encoder: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Interpolate the position embedding of a checkpoint made at another image size."""
    embedding = getattr(encoder, "pos_embed", None)
    stored = state.get("pos_embed")
    grid = getattr(getattr(encoder, "patch_embed", None), "grid_size", None)
    if stored is None or grid is None or not isinstance(embedding, Tensor):
        return state
    patches = stored.shape[-2] - (embedding.shape[-2] - grid[0] * grid[1]) if stored.ndim > 1 else 0
    resizable = (
        stored.ndim == embedding.ndim == 3
        and stored.shape[2] == embedding.shape[2]
        and stored.shape[1] != embedding.shape[1]
        and patches > 0
        and math.isqrt(patches) ** 2 == patches
    )
    if not resizable:
        return state
    return {**state, "pos_embed": resample_position(stored, encoder, antialias=True)}


def _listed(names: Iterable[str]) -> str:
    """Join the first few names and count the rest."""
    names = list(names)
    shown = ", ".join(names[:_LISTED_NAMES])
    rest = len(names) - _LISTED_NAMES
    return f"{shown} and {rest} more" if rest > 0 else shown
