"""Errors, progress, devices, digests, and leaving a model as it was: what every room uses."""

from __future__ import annotations

import copy
import difflib
import hashlib
import importlib.util
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pai_utils.support.contract import hold_

T = TypeVar("T")
Module = TypeVar("Module", bound=nn.Module)
logger = logging.getLogger("pai_utils")


class NonFiniteError(ValueError, FloatingPointError):
    """A loss or a weight that is not finite: bad input, or arithmetic that went wrong."""


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter (CPU for a model without any)."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def at_least_single(values: Tensor) -> torch.dtype:
    """The type of the values, or float32 where theirs has fewer digits."""
    return torch.promote_types(values.dtype, torch.float32)


@contextmanager
def undisturbed(model: nn.Module, *, any_output: bool = False) -> Iterator[None]:
    """Evaluate ``model`` inside, held to the contract of :mod:`pai_utils.support.contract`.

    On leaving, its modes, buffers, ``grad``, ``requires_grad``, parameters and other attributes are
    as they were, but for what :func:`~pai_utils.support.common.forget` drops, before each forward
    in here and on leaving. Whoever changes *values* of parameters inside restores them.
    """
    held = [value for module in model.modules() for value in _held(vars(module), {}).values()]
    # Dictionaries and lists are filled in place.
    dictionaries = [(v, dict(v)) for v in held if isinstance(v, dict)]
    lists = [(v, list(v)) for v in held if isinstance(v, list)]
    tensors = [t for t in held if isinstance(t, Tensor) and not isinstance(t, nn.Parameter)]
    values = [tensor.detach().clone() for tensor in tensors]
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    _evaluate(model)
    hold_(model, any_output=any_output)
    model.register_forward_pre_hook(lambda module, _: forget(module))
    try:
        yield
    finally:
        for attributes, before in dictionaries:
            attributes.clear()
            attributes.update(before)
        for items, earlier in lists:
            items[:] = earlier
        for parameter, requires_grad, grad in flags:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                if not torch.equal(tensor, value):  # a graph of the caller's may need it untouched
                    tensor.copy_(value)
        forget(model)


def _evaluate(model: nn.Module) -> None:
    """Evaluation mode, in which an adapter that would merge its weights stays as it is."""
    switched = [
        (module, dict(vars(module)), [(p, p.detach().clone()) for p in module.parameters(False)])
        for module in model.modules()
        if module.training and type(module).train is not nn.Module.train
    ]
    model.eval()
    for module, attributes, weights in switched:
        if not all(torch.equal(now, before) for now, before in weights):
            for now, before in weights:
                now.data.copy_(before)
            vars(module).update(attributes, training=False)


def forget(model: nn.Module) -> None:
    """Let modules drop, or make anew, what they computed from their weights for evaluation.

    Attention biases, say, or fused weights, which are out of date once a weight changes. Modules
    that keep such tensors drop them in training mode, by a method of their own; modes stay.
    """
    for module in model.modules():
        if type(module).train is nn.Module.train or module.training:
            continue
        others = {k: v for k, v in vars(module).items() if k not in ("_parameters", "_buffers")}
        # Others, such as adapters that merge weights, do something else in training mode.
        if any(isinstance(value, Tensor) for value in _held(others, {}).values()):
            modes = [(inner, inner.training) for inner in module.modules()]
            with torch.inference_mode(False), torch.enable_grad():  # as the caller made them
                module.train()
                module.eval()
            for inner, training in modes:
                inner.training = training


def _held(value: Any, found: dict[int, Any]) -> dict[int, Any]:
    """The dictionaries, lists, tuples and tensors that a value is made of, added by their ids."""
    if isinstance(value, dict | list | tuple | Tensor) and id(value) not in found:
        found[id(value)] = value
        if not isinstance(value, Tensor):
            for inner in value.values() if isinstance(value, dict) else value:
                _held(inner, found)
    return found


def copied(model: Module) -> Module:
    """A deep copy, also of a model that keeps what it computed from its weights, with a graph."""
    forget(model)
    held = [value for module in model.modules() for value in _held(vars(module), {}).values()]
    # Weights that a hook computes cannot be copied.
    computed = [v for v in held if isinstance(v, Tensor) and not v.is_leaf]
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in computed})


def replica(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in float64, in evaluation mode, frozen and held to the contract.

    Unlike a functional call of the model itself, running it with other weights leaves nothing
    behind in what modules keep beside their state.
    """
    other = copied(model).double().requires_grad_(False)
    other.eval()
    other.register_forward_pre_hook(lambda module, _: forget(module))
    return hold_(other)


def clock(device: torch.device) -> float:
    """Seconds for measuring what work on ``device`` costs.

    On a CPU those of this process's threads, which other processes do not lengthen; on a GPU those
    of the wall, once all work is done.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """Wrap ``items`` in a progress bar on stderr, where a person may watch; wiped at the end."""
    from tqdm import tqdm

    return tqdm(items, desc=description, total=total, leave=False, disable=not watched())


def watched() -> bool:
    """Whether to show progress: a person may watch stderr, and ``PAI_PROGRESS=0`` is not set."""
    # Only a running kernel: other code may import its package.
    ipython = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    seen = sys.stderr.isatty() or hasattr(ipython, "kernel")
    return seen and os.environ.get("PAI_PROGRESS") != "0"


def hash_tensors(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 of a text and of tensors: their names, shapes, types and bytes, in order of names.

    Nothing is copied but a tensor that lies on a GPU or is not contiguous.
    """
    digest = hashlib.sha256(text.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def listed(items: Iterable[object]) -> str:
    """The first five items, separated by commas, and how many more there are."""
    texts = list(map(str, items))
    rest = f" and {len(texts) - 5} more" if len(texts) > 5 else ""
    return ", ".join(texts[:5]) + rest


def unknown_name(
    kind: str, name: object, valid: Iterable[str], *, unlisted: Iterable[str] = ()
) -> ValueError:
    """The error for a name that is in no registry: says the name and the valid choices.

    ``unlisted`` are further valid names, too many to say; one of them may be what was meant.
    """
    choices = list(valid)
    folded = {choice.casefold(): choice for choice in [*choices, *unlisted]}
    near = difflib.get_close_matches(str(name).casefold(), folded, n=1)
    hint = f"; did you mean {folded[near[0]]!r}?" if near else "."
    return ValueError(f"unknown {kind} {name!r}{hint} Choose from: {', '.join(choices)}")


def package_folder(module: str, package: str, use: str) -> Path:
    """Folder of an installed package, found without importing it, for a ``use``.

    A ModuleNotFoundError says that "the images come" with it, and to install it.
    """
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(
            f"{use} with the package {package}, which is not installed; install {package}",
            name=module,
        )
    return Path(found.submodule_search_locations[0])


def may_download(download: bool | None) -> bool:
    """Whether a missing file may be fetched: as asked, or if `None` as `PAI_DOWNLOAD=1` says."""
    return os.environ.get("PAI_DOWNLOAD") == "1" if download is None else download


def check_names(kind: str, names: Iterable[str], valid: Iterable[str]) -> None:
    """Refuse the first of some names that is not among the valid ones, as `unknown_name`."""
    known = list(valid)
    for name in names:
        if name not in known:
            raise unknown_name(kind, name, known)
