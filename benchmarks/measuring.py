"""Seconds and peak memory of calls in this process."""

from __future__ import annotations

import ctypes
import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
Step = Callable[[], object]


@dataclass
class Peak:
    """Bytes above a level; filled in when the context that made it ends."""

    bytes: int = 0


@dataclass(frozen=True)
class Timing:
    """Seconds of a step, and of the unit of cost run in turn with it."""

    seconds: list[float] = field(default_factory=list)
    unit: list[float] = field(default_factory=list)

    @property
    def multiple(self) -> float:
        """Median over median."""
        return statistics.median(self.seconds) / statistics.median(self.unit)

    @property
    def spread(self) -> tuple[float, float]:
        """Lowest and highest ratio of a step to the unit run beside it."""
        ratios = [a / b for a, b in zip(self.seconds, self.unit, strict=True)]
        return min(ratios), max(ratios)


def timed(step: Step, device: torch.device) -> float:
    """Seconds of one call."""
    gc.collect()
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - start


def in_turns(
    step: Step,
    unit: Step | None,
    device: torch.device,
    *,
    budget: float,
    least: int = 3,
    most: int = 15,
) -> Timing:
    """Time a step and the unit of cost in turns, so that both meet the same disturbances.

    Args:
        step: what to time; called before, so that nothing is built for the first time.
        unit: the unit of cost; ``None`` if the step has none.
        device: waited for after each call.
        budget: seconds after which no further turn begins, once ``least`` are done.
        least: turns in any case.
        most: turns at most.
    """
    timing = Timing()
    start = time.perf_counter()
    while len(timing.seconds) < most:
        if len(timing.seconds) >= least and time.perf_counter() - start > budget:
            break
        if unit is not None:
            timing.unit.append(timed(unit, device))
        timing.seconds.append(timed(step, device))
    return timing


def memory_level(device: torch.device) -> int:
    """Bytes in use now: of the device's allocator, or resident in this process."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if sys.platform == "linux":
        # What was freed but not given back would hide as much of a later increase.
        ctypes.CDLL(None).malloc_trim(0)
        return _kibibytes("VmRSS") * 1024
    return _highest_ever()


@contextmanager
def peak_memory(device: torch.device, level: int) -> Iterator[Peak]:
    """Record the peak inside, above ``level``.

    On systems without ``/proc`` it is the process's peak so far.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        _CLEAR.write_text("5")
    peak = Peak()
    yield peak
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        highest = torch.cuda.max_memory_allocated(device)
    else:
        highest = _kibibytes("VmHWM") * 1024 if _STATUS.exists() else _highest_ever()
    peak.bytes = max(0, highest - level)


def limit_memory(bytes_: int) -> None:
    """Make allocations beyond ``bytes_`` fail in this process, instead of the whole machine."""
    resource.setrlimit(resource.RLIMIT_DATA, (bytes_, bytes_))


def keep_freed_memory() -> None:
    """Let this process keep what it frees (glibc), so that times are not those of page faults.

    Large tensors are otherwise given back and mapped again at every call: seconds of a large
    model then differ by a fifth, by chance and for every contender.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((_M_TRIM_THRESHOLD, -1), (_M_MMAP_MAX, 0)):
            mallopt(parameter, value)


def _kibibytes(entry: str) -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{entry}:"):
            return int(line.split()[1])
    raise RuntimeError(f"{_STATUS} has no entry {entry}")


def _highest_ever() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
