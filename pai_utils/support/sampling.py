"""How data runs through a model: seeded draws, batches, processes, and too little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pai_utils.support.common import logger
from pai_utils.support.contract import WholeBatches, count_items, read_items

Samples = Dataset[tuple[Tensor, int]]
"""A map-style dataset of ``(image [3, H, W], class index)``."""
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types that a forward's products are computed in, by name; `None` is the model's own."""
T = TypeVar("T")


@dataclass(frozen=True)
class Draw:
    """Which samples a score, a curvature or a repair looks at, and how many at a time."""

    samples: int | None = 256  #: drawn without replacement; None: all, in order
    batch_size: int = 64  #: a forward; halved when memory runs out, and no result depends on it
    seed: int = 0  #: of this draw and of whatever else is drawn

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"samples={self.samples}: at least one is needed (None takes all)")
        check_batch_size(self.batch_size)
        check_seed(self.seed)

    def at_most(self, count: int) -> Draw:
        """The same draw, of ``count`` samples where it asks for more."""
        return self if self.samples is None else replace(self, samples=min(self.samples, count))

    def indices(self, data: Samples) -> Tensor:
        """Positions of the samples in ``data``: long ``[samples]``, on the CPU.

        Raises:
            ValueError: if ``data`` is empty or of another kind, or holds fewer than are drawn.
        """
        available = count_items(data)
        if self.samples is None:
            return torch.arange(available)
        if self.samples > available:
            next(batches(data, 1, torch.device("cpu"), torch.arange(1)))  # its kind is said first
            raise ValueError(
                f"samples={self.samples} but the dataset holds {available}; ask for at most that "
                "many, or pass samples=None for all"
            )
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randperm(available, generator=generator)[: self.samples]


def batches(
    data: Samples, batch_size: int, device: torch.device, indices: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``(images [B, 3, H, W], labels [B])`` on ``device``, in the order of ``indices``.

    :class:`~pai_utils.support.contract.WholeBatches` are asked for whole batches; any other
    map-style dataset is read item by item.

    Raises:
        ValueError: if ``batch_size`` is below one, there is no sample, or one is of another kind.
    """
    check_batch_size(batch_size)
    available = count_items(data)
    for rows in (torch.arange(available) if indices is None else indices).split(batch_size):
        if isinstance(data, WholeBatches):
            images, labels = data.batch(rows, device)
        else:
            images, labels = read_items(data, rows.tolist())
        if images.dim() == 4 and len(images) > 1:
            # Convolutions run up to twice as fast so; see `paired` for why not for one image.
            images = images.contiguous(memory_format=torch.channels_last)
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def this_process() -> tuple[int, int]:
    """The number of this process among those of ``torchrun``, and how many there are: 0 and 1."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def agreed(answer: bool) -> bool:
    """What the first process of ``torchrun`` answers. Every process must call it."""
    if this_process()[1] == 1:
        return answer
    answers = [answer]
    torch.distributed.broadcast_object_list(answers)
    return answers[0]


def share_of_work(count: int) -> Tensor:
    """Positions ``0 … count - 1`` that this process takes: all, or under ``torchrun`` its share."""
    rank, ranks = this_process()
    return torch.arange(rank, count, ranks)


def sum_over_processes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sum tensors of one type over the processes of ``torchrun`` in one all-reduce.

    Every process must call it, with tensors of the same names and shapes. Alone it does nothing.
    """
    if this_process()[1] == 1:
        return tensors
    flat = torch.cat([value.flatten() for value in tensors.values()])
    sum_over_processes_(flat)
    parts = flat.split([value.numel() for value in tensors.values()])
    return {n: p.view(v.shape) for (n, v), p in zip(tensors.items(), parts, strict=True)}


def sum_over_processes_(tensor: Tensor) -> None:
    """Sum one contiguous tensor over the processes of ``torchrun``, where it is."""
    if this_process()[1] > 1:
        torch.distributed.all_reduce(tensor)


def paired(batch: Tensor) -> Tensor:
    """A batch of one sample twice; any other batch as it is.

    A mean over it is the same. On CPUs, torch's BatchNorm in evaluation mode gives wrong gradients
    for a single sample whose incoming gradient lies channels-last (seen in torch 2.15).
    """
    return torch.cat([batch, batch]) if len(batch) == 1 else batch


def fitting_batches(compute: Callable[[int], T], batch_size: int) -> T:
    """Return ``compute(batch_size)``; when memory runs out, start again with half the batch.

    ``compute`` must give the same result for every batch size and have no effect when it fails.

    Raises:
        torch.OutOfMemoryError: if even single samples do not fit (on a CPU a ``RuntimeError``,
            or what another library raises).
    """
    while True:
        try:
            return compute(batch_size)
        except Exception as error:
            full = isinstance(error, (torch.OutOfMemoryError, MemoryError))
            # The allocators of torch's CPU and of ONNX Runtime have no class of their own.
            said = ("DefaultCPUAllocator", "Failed to allocate memory")
            if batch_size == 1 or not (full or any(words in str(error) for words in said)):
                raise
            batch_size //= 2
        # Outside the handler: the traceback would keep the failed batch's tensors alive.
        logger.warning("out of memory; starting again with batches of %d", batch_size)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def check_batch_size(batch_size: int) -> None:
    """Refuse a batch of fewer samples than one."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: at least one sample a batch is needed")


def check_seed(seed: int) -> None:
    """Refuse what no generator takes: anything but an integer from 0 to 2**63 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be an integer from 0 to 2**63 - 1, got {seed!r}")


ALL = Draw(samples=None)
"""Every sample, in order."""
