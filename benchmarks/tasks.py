"""What a task of the benchmarks consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from benchmarks.problems import LAYOUTS

Vector = Mapping[str, Tensor]
"""A result: one tensor a name."""

Steps = dict[str, Callable[[], Vector]]
"""What is timed of a contender, by name and in order; a later step may need the earlier ones."""


class Subject(Protocol):
    """What contenders work on."""

    @property
    def device(self) -> torch.device:
        """Where it is."""

    @property
    def memory_unit(self) -> int | None:
        """Bytes that peak memory is given in multiples of; ``None`` for those of the unit's run."""

    def in_layout(self, layout: str) -> Self:
        """The same in another memory layout."""

    def to(self, target: torch.device | torch.dtype) -> Self:
        """A copy on another device or in another type."""

    def forward_backward(self) -> Callable[[], object] | None:
        """The unit of cost; ``None`` where time is given in seconds only."""


S = TypeVar("S", bound=Subject)


@dataclass(frozen=True)
class Contender(Generic[S]):
    """One way to do a task."""

    prepare: Callable[[S], Steps]
    computes: str  # in words, for the table
    ours: bool = False
    package: str | None = None  # of the ``bench`` extra
    reference: str | None = None  # a key of the task's references; None: nothing to compare with
    estimate: bool = False  # random by design: its error is shown, but is no mistake
    layouts: tuple[str, ...] = ("contiguous",)  # tried; the fastest is measured
    second_derivatives: bool = False  # which fused attention kernels do not have


EITHER_LAYOUT = LAYOUTS[:2]


@dataclass(frozen=True)
class Task(Generic[S]):
    """Contenders that answer the same question about the same subjects."""

    contenders: Mapping[str, Contender[S]]
    subjects: Mapping[str, Callable[[int], S]]  # by model; called with the number of images
    references: Mapping[str, Callable[[S], Vector]]  # called with a copy in float64
    tolerance: float  # relative error beyond which a result is wrong
    in_units: bool = True  # whether the subjects have a forward and backward to compare with
