"""Files of weights: finding, fetching and checking them, and loading the encoder they hold.

Published files differ in what they wrap around an encoder's tensors. These layouts are read as
they are, and `Backbone.checkpoint` says which one it was and what was left out:

- a plain state dict, of timm, of torchvision or of DINO's backbone files;
- one under the key `state_dict` or `model`, beside an optimizer's state, an epoch, arguments;
- names under `module.` or `_orig_mod.`, as `DataParallel` and `torch.compile` write them;
- MoCo's: the query encoder (`encoder_q.`) is taken;
- DINO's training file: the teacher's `backbone.` is taken.

Nothing is ever unpickled into arbitrary objects, and a file that does not fit is refused whole.
"""

from __future__ import annotations

import argparse
import http.client
import math
import os
import pickle
import re
import tempfile
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from pai_utils.support.common import listed, logger, package_folder, watched
from pai_utils.support.stored import digest_of, located

HUB, PACKAGE = "hub:", "package:"
"""Starts of addresses: `hub:<model>/<file>` (Hugging Face), `package:<distribution>/<path>`."""


def weights_root() -> Path:
    """Folder of fetched weights: `PAI_WEIGHTS_ROOT`, or the one torchvision uses."""
    return located(os.environ.get("PAI_WEIGHTS_ROOT") or f"{torch.hub.get_dir()}/checkpoints")


def package_of(address: str) -> str:
    """The distribution that ships the file of an address; empty if none does."""
    return address.removeprefix(PACKAGE).split("/")[0] if address.startswith(PACKAGE) else ""


def find_weights(address: str) -> Path | None:
    """Find a published or a local file on this computer, unchecked; `None` if it is not there."""
    start, _, file = address.rpartition("/")
    path = weights_root() / file if "://" in start else Path(address)
    if start.startswith(HUB):
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(start.removeprefix(HUB), file)
        return Path(found) if isinstance(found, str) else None
    if start.startswith(PACKAGE):
        _, module, rest = address.split("/", 2)
        with suppress(ModuleNotFoundError):
            path = package_folder(module, module, "weights come") / rest
    return path if path.is_file() else None


def obtain_weights(what: str, *addresses: str, download: bool, digest: str | None = None) -> Path:
    """Find and check a file, or one of several with the same weights, or fetch it.

    Errors are those of `load_backbone`; ``what`` is what they call the file.
    """
    if not addresses:
        raise ValueError(f"{what} are not published; pass pretrained=False for random ones")
    source, package = " or ".join(addresses), package_of(addresses[0])
    path = next(filter(None, map(find_weights, addresses)), None)
    if path is not None:
        check_digest(path, digest, f"reinstall the package {package}" if package else "")
        return path
    if package:
        raise ModuleNotFoundError(f"{what} come with the package {package}; install {package}")
    if not download:
        raise FileNotFoundError(
            f"{what} are not on this computer, neither in {weights_root()} nor in the hub's cache; "
            f"pass download=True, or set PAI_DOWNLOAD=1, to fetch {source}"
        )
    for address in addresses[:-1]:
        with suppress(OSError, http.client.HTTPException, ValueError):
            return _fetch(address, digest)
    try:
        return _fetch(addresses[-1], digest)
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(
            f"{source} could not be fetched ({error}); download it elsewhere and name the file, as "
            "file:<path>@<timm model> or clip:<model>@<path>, or pass pretrained=False for random "
            "weights"
        ) from error


def _fetch(address: str, digest: str | None) -> Path:
    """Download a file, which appears in its place only once it is complete and checked."""
    folder, _, file = address.removeprefix(HUB).rpartition("/")
    if address.startswith(HUB):
        from huggingface_hub import hf_hub_download

        found = Path(hf_hub_download(folder, file))
        check_digest(found, digest)
        return found
    path = weights_root() / file
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{file}.") as temporary:
        partial = Path(temporary) / file
        torch.hub.download_url_to_file(address, str(partial), progress=watched())
        check_digest(partial, digest, f"what {address} sent was not kept; fetch it again")
        read_checkpoint(partial)  # a connection that is cut ends like a complete one
        partial.replace(path)
    return path


def check_digest(path: Path, expected: str | None, advice: str = "") -> None:
    """Compare a file with the known first digits of its SHA-256, or of its MD5 after `md5:`.

    The ValueError says what to do: the `advice`, or to fetch the file again.
    """
    if expected is None:
        return
    kind, _, digits = expected.lower().rpartition(":")
    found = digest_of(path, kind or "sha256")
    if not digits or not found.startswith(digits):
        raise ValueError(
            f"{path.name} is damaged or not the expected file: its {kind or 'sha256'} is {found}, "
            f"expected {expected}; {advice or f'remove {path} and fetch it again'}"
        )


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a file, with the names it has there, without running any code.

    The CRC that a `.pth` file stores of each tensor is compared. A `.safetensors` file, or a `.pth`
    file from before PyTorch 1.6, stores none: only a known digest finds a flipped bit in it.

    Raises:
        ValueError: the file is cut short, altered, or holds no named tensors.
    """
    return _find_state(path)[0]


def load_checkpoint(encoder: nn.Module, path: Path, architecture: str) -> str:
    """Load the encoder that a file holds in a published layout; say which, and what was left out.

    The head's tensors are left out, by the name timm has for the classifier; all others must fit,
    but for BatchNorm's counters, which older files lack and no output depends on.
    """
    from timm.models import clean_state_dict

    state, keys, other = _find_state(path)
    layout = f"a state dict under {'/'.join(keys)}" if keys else "a plain state dict"
    unwrapped: dict[str, Tensor] = clean_state_dict(state)
    if len(unwrapped) == len(state) and unwrapped.keys() != state.keys():
        state, layout = unwrapped, f"{layout}, of a wrapped model"
    prefix = ""
    if any(name.startswith("encoder_q.") for name in state):
        layout, prefix = "a training file of MoCo, whose query encoder is taken", "encoder_q."
    elif keys == ["teacher"] and any(name.startswith("backbone.") for name in state):
        layout, prefix = "a training file of DINO, whose teacher is taken", "backbone."
    other += [name for name in state if not name.startswith(prefix)]
    state = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}

    expected = encoder.state_dict()
    named = getattr(encoder, "default_cfg", {}).get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ((named,) if isinstance(named, str) else named))
    head = [name for name in state if name not in expected and name.startswith(prefixes)]
    counters = {name: v for name, v in expected.items() if name.endswith(".num_batches_tracked")}
    taken = {name: value for name, value in state.items() if name not in head}
    load_state(encoder, counters | taken, path.name, architecture)
    parts = {"the head's": head, "other": other}
    left = [f"{len(names)} {what}: {listed(names)}" for what, names in parts.items() if names]
    said = f"{path.name} is {layout}; left out: {'; '.join(left) or 'nothing'}"
    logger.info("%s", said)
    return said


def load_state(
    encoder: nn.Module, state: Mapping[str, Tensor], file: str, architecture: str
) -> None:
    """Load a state dict that must fit exactly, apart from the grid of position embeddings.

    Raises:
        ValueError: names are missing, unexpected or of another shape, or values not finite. The
            encoder is as it was.
    """
    from timm.layers.pos_embed import resample_abs_pos_embed

    expected = encoder.state_dict()
    state = {n: v.to(expected[n].dtype) if n in expected else v for n, v in state.items()}
    grid = getattr(getattr(encoder, "patch_embed", None), "grid_size", None)
    own, stored = expected.get("pos_embed"), state.get("pos_embed")
    if grid and own is not None and stored is not None and own.shape != stored.shape:
        prefix = own.shape[1] - math.prod(grid)  # class and register tokens
        with suppress(RuntimeError, ValueError, IndexError):  # no square grid is refused below
            state["pos_embed"] = resample_abs_pos_embed(
                stored, new_size=list(grid), num_prefix_tokens=prefix
            )
    if problems := differences(state, expected):
        raise ValueError(f"{file} does not fit {architecture}: {problems}")
    if broken := [name for name, value in state.items() if not torch.isfinite(value).all()]:
        raise ValueError(f"{file} holds weights that are not finite: {listed(broken)}")
    encoder.load_state_dict(state)


def differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Say how the names, shapes and types of tensors differ from the expected ones; "" if not."""
    theirs, ours = (
        {name: f"{list(value.shape)} {value.dtype}" for name, value in tensors.items()}
        for tensors in (found, expected)
    )
    problems = {
        "missing": [name for name in ours if name not in theirs],
        "unexpected": [name for name in theirs if name not in ours],
        "of another shape or type": [
            f"{name} {theirs[name]} instead of {kind}"
            for name, kind in ours.items()
            if theirs.get(name, kind) != kind
        ],
    }
    return "; ".join(f"{len(n)} {what}: {listed(n)}" for what, n in problems.items() if n)


def _read(path: Path) -> object:
    """Read what a file holds: tensors, and beside them plain values and arguments."""
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"the CRC of {damaged} does not match")
        # Training files hold the command's arguments; a Namespace is a bag of values that runs
        # nothing when it is rebuilt.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return cast(object, torch.load(path, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        found = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{path.name} is damaged, or holds objects other than tensors"
            f"{f' ({found[1]})' if found else ''}, which are not loaded because they could run "
            "code; fetch it again, or ask its publisher for a file of the state dict alone, best "
            "as .safetensors"
        ) from error
    except Exception as error:  # altered opcodes of a pickle act on the wrong operands
        raise ValueError(f"{path.name} is truncated or damaged: {error}") from error


def _find_state(path: Path) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Find the state dict in a file: itself, the keys it lies under, the entries beside it."""
    content = _read(path)
    keys, other = list[str](), list[str]()
    for key in ("teacher", "state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            keys.append(key)
            other += [str(name) for name in content if name != key]
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path.name} holds no state dict")
    for name, value in content.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise ValueError(f"{path.name} holds an entry that is not a named tensor: {name}")
    return dict(content), keys, other
