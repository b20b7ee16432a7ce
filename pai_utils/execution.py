"""How data runs through a model: seeded draws, batches, devices, memory, and leaving no trace.

Everything that loops over samples (heads, scores, evaluation, fine-tuning) uses these few
functions, so that a seed, a batch split or an out-of-memory retry means the same everywhere.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

Samples = Dataset[tuple[Tensor, int]]
"""A map-style dataset of ``(image [3, H, W], class index)``."""

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types that a forward's products are computed in, by name; `None` is the model's own."""

T = TypeVar("T")
logger = logging.getLogger("pai_utils")


class NonFiniteError(ValueError, FloatingPointError):
    """A loss or a weight that is not finite: bad input, or arithmetic that went wrong."""


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter (CPU for a model without any)."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def draw_samples(data: Samples, samples: int | None, seed: int) -> Tensor:
    """Indices of the samples to use.

    Args:
        data: the dataset drawn from.
        samples: how many; ``None`` for all of them, in order.
        seed: seed of the draw without replacement. The global random state is not touched.

    Returns:
        Long tensor ``[samples]`` on the CPU.

    Raises:
        ValueError: if ``samples`` is below one or above the size of the dataset.
    """
    available = len(cast(Sized, data))
    if available < 1:
        raise ValueError("the dataset is empty; at least one sample is needed")
    if samples is None:
        return torch.arange(available)
    if samples < 1:
        raise ValueError(f"samples={samples}: at least one sample is needed (None takes all)")
    if samples > available:
        raise ValueError(
            f"samples={samples} but the dataset holds {available}; ask for at most that many, "
            "or pass samples=None for all"
        )
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(available, generator=generator)[:samples]


def batches(
    data: Samples, batch_size: int, device: torch.device, indices: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``(images [B, 3, H, W], labels [B])`` on ``device``, in the order of ``indices``.

    A dataset with a ``batch(indices, device)`` method is asked for whole batches; any other
    map-style dataset is read item by item.

    Raises:
        ValueError: if ``batch_size`` is below one or there is no sample.
    """
    check_batch_size(batch_size)
    if indices is None:
        indices = torch.arange(len(cast(Sized, data)))
    if len(indices) == 0:
        raise ValueError("the dataset is empty; at least one sample is needed")
    whole = getattr(data, "batch", None)
    for rows in indices.split(batch_size):
        if whole is not None:
            images, labels = whole(rows, device)
        else:
            images, labels = default_collate([data[int(row)] for row in rows])
        if images.dim() == 4 and len(images) > 1:
            # Convolutions run up to twice as fast so; see `paired` for why not for one image.
            images = images.contiguous(memory_format=torch.channels_last)
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def in_precision(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Mixed precision inside: products in ``precision``, sums and normalisations in float32.

    Raises:
        ValueError: if ``precision`` is no key of `PRECISIONS`.
    """
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    dtype = PRECISIONS[precision]
    # A caller's own autocast stays in force unless another precision is asked for.
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def share_of_work(count: int) -> Tensor:
    """Positions ``0 … count - 1`` that this process takes: all, or under ``torchrun`` its share."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        return torch.arange(rank, count, ranks)
    return torch.arange(count)


def sum_over_processes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sum tensors of one type over the processes of ``torchrun`` in one all-reduce.

    Every process must call it, with tensors of the same names and shapes. Alone it does nothing.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensors
    flat = torch.cat([value.flatten() for value in tensors.values()])
    sum_over_processes_(flat)
    parts = flat.split([value.numel() for value in tensors.values()])
    return {n: p.view(v.shape) for (n, v), p in zip(tensors.items(), parts, strict=True)}


def sum_over_processes_(tensor: Tensor) -> None:
    """Sum one contiguous tensor over the processes of ``torchrun``, where it is."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)


def check_labels(labels: Tensor, classes: int) -> None:
    """Refuse labels that a model with so many classes cannot give.

    Raises:
        ValueError: if a label is negative or not below ``classes``.
    """
    lowest, highest = (int(bound) for bound in torch.aminmax(labels))
    if lowest < 0 or highest >= classes:
        raise ValueError(
            f"the data has a label {lowest if lowest < 0 else highest} but the model's classes are "
            f"0 to {classes - 1}; the head was made for another task"
        )


def paired(batch: Tensor) -> Tensor:
    """A batch of one sample twice; any other batch as it is.

    A mean over it is the same. On CPUs, torch's BatchNorm in evaluation mode gives wrong gradients
    for a single sample whose incoming gradient lies channels-last (seen in torch 2.15).
    """
    return torch.cat([batch, batch]) if len(batch) == 1 else batch


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluate ``model`` inside; on leaving, modes, buffers, ``grad`` and ``requires_grad`` return.

    Parameter *values* are not copied: whoever changes them inside restores them.
    """
    modes = {module: module.training for module in model.modules()}
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, requires_grad, grad in flags:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)


def fitting_batches(compute: Callable[[int], T], batch_size: int) -> T:
    """Return ``compute(batch_size)``; when memory runs out, start again with half the batch.

    ``compute`` must give the same result for every batch size and have no effect when it fails.

    Raises:
        torch.OutOfMemoryError: if even single samples do not fit (on a CPU a ``RuntimeError``).
        ValueError: if ``batch_size`` is below one.
    """
    check_batch_size(batch_size)
    while True:
        try:
            return compute(batch_size)
        except RuntimeError as error:
            if batch_size == 1 or not _ran_out_of_memory(error):
                raise
            batch_size //= 2
        # Outside the handler: the traceback would keep the failed batch's tensors alive.
        logger.warning("out of memory; starting again with batches of %d", batch_size)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def check_batch_size(batch_size: int) -> None:
    """Refuse a batch of fewer samples than one.

    Raises:
        ValueError: if ``batch_size`` is below one.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: at least one sample a batch is needed")


def _ran_out_of_memory(error: RuntimeError) -> bool:
    # The CPU's allocator has no exception class of its own.
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


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
    """Wrap ``items`` in a progress bar on stderr, where a person may watch: terminal or notebook.

    The bar is text that is wiped at the end, and the book drops what notebooks write to stderr, so
    a rendered page holds no trace of it. ``PAI_PROGRESS=0`` turns it off.
    """
    from tqdm import tqdm

    bar: Any = tqdm(items, desc=description, total=total, leave=False, disable=not watched())
    return cast(Iterable[T], bar)


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


def listed(items: Iterable[object], most: int = 5) -> str:
    """The first of some items, separated by commas, and how many more there are."""
    texts = list(map(str, items))
    rest = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + rest


def unknown_name(
    kind: str, name: object, valid: Iterable[str], *, unlisted: Iterable[str] = ()
) -> ValueError:
    """The error for a name that is in no registry: says the name and the valid choices.

    ``unlisted`` are further valid names, too many to say; one of them may be what was meant.
    """
    choices = list(valid)
    near = difflib.get_close_matches(str(name), [*choices, *unlisted], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return ValueError(f"unknown {kind} {name!r}{hint} Choose from: {', '.join(choices)}")
