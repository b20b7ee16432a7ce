"""One measurement in a process of its own.

A fresh process makes peak memory honest: nothing that another contender left behind is reused.
"""

from __future__ import annotations

import importlib
import json
import math
import multiprocessing
import os
import re
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measuring import (
    Timing,
    in_turns,
    keep_freed_memory,
    limit_memory,
    memory_level,
    peak_memory,
    timed,
)
from benchmarks.problems import LAYOUTS
from benchmarks.results import UNIT, Row
from benchmarks.tasks import Contender, Steps, Task, Vector
from benchmarks.work import Share, Work, count, profile

MATH_ATTENTION = ", math attention"
"""Ends the name of a contender that is run without fused attention kernels."""


_PATIENCE = 20.0
"""Seconds of first calls beyond which nothing is repeated."""


@dataclass(frozen=True)
class Job:
    """What to measure, and how."""

    kind: str  # "unit", "reference", "contender", "work" or "profile"
    task: str
    model: str
    contender: str = ""
    device: str = "cpu"
    images: int = 32
    threads: int = 2
    budget: float = 10.0  # seconds of turns
    layout: str = LAYOUTS[0]  # of the unit of cost
    unit_memory: int | None = None  # its peak in bytes, from a process of its own
    references: str = ""  # the folder of references
    most_memory: int | None = None  # bytes this process may allocate on a CPU


def run(job: Job, tasks: Mapping[str, Task[Any]]) -> Sequence[Row | Work | Share]:
    """Do one job and return its rows."""
    task = tasks[job.task]
    subject = task.subjects[job.model](job.images).to(torch.device(job.device))
    if job.kind == "unit":
        return _measure_unit(job, subject)
    if job.kind == "work":
        return [count(job.model, subject)]
    if job.kind == "profile":
        return profile(job.model, subject)
    if job.kind == "reference":
        exact = subject.to(torch.float64)
        for name, compute in task.references.items():
            save_reference(job, name, compute(exact))
        return []
    contender = task.contenders[job.contender.removesuffix(MATH_ATTENTION)]
    row = Row(
        job.task,
        job.model,
        job.contender,
        computes=contender.computes,
        role="ours" if contender.ours else "peer",
        estimate=contender.estimate,
    )
    with _attention(job.contender.endswith(MATH_ATTENTION)):
        return _measure(job, task, contender, subject, row)


def reference_path(job: Job, name: str) -> Path:
    """Where a task's reference for a model is."""
    return Path(job.references) / f"{job.task}-{job.model.replace(' ', '_')}-{name}.safetensors"


def save_reference(job: Job, name: str, vector: Vector) -> None:
    """Keep a reference for the processes that compare with it."""
    contiguous = {key: value.detach().cpu().contiguous() for key, value in vector.items()}
    save_file(contiguous, reference_path(job, name))


def relative_error(found: Vector, reference: Vector) -> float:
    """‖found − reference‖ / ‖reference‖ over all tensors, in float64.

    Raises:
        ValueError: if a tensor of the reference is missing or has another shape.
    """
    difference = total = 0.0
    for name, exact in reference.items():
        if name not in found:
            raise ValueError(f"no value for {name!r}")
        if found[name].shape != exact.shape:
            raise ValueError(
                f"shape {tuple(found[name].shape)} for {name!r}, which is {tuple(exact.shape)}"
            )
        exact = exact.double()
        difference += float((found[name].detach().cpu().double() - exact).square().sum())
        total += float(exact.square().sum())
    return math.sqrt(difference / total)


def _measure_unit(job: Job, subject: Any) -> list[Row]:
    """The unit itself in every layout, the fastest first."""
    rows = []
    for layout in LAYOUTS:
        here = subject.in_layout(layout)
        unit = here.forward_backward()
        _warm_up(here)
        level = memory_level(here.device)
        with peak_memory(here.device, level) as peak:
            unit()
        keep_freed_memory()
        timing = in_turns(unit, unit, here.device, budget=job.budget / 2)
        rows.append(
            replace(
                _timed_row(Row(job.task, job.model, UNIT, role="unit", layout=layout), timing),
                memory_mib=peak.bytes / 2**20,
            )
        )
    least = min(row.memory_mib for row in rows)
    rows = [replace(row, memory=row.memory_mib / least) for row in rows]
    return sorted(rows, key=lambda row: row.seconds)


def _measure(
    job: Job, task: Task[Any], contender: Contender[Any], subject: Any, row: Row
) -> list[Row]:
    """Every step: its first call for memory and error, then in turns with the unit of cost."""
    device = subject.device
    fastest = subject.in_layout(job.layout)
    unit = fastest.forward_backward()
    exact = _reference(job, contender)
    choices = {layout: subject.in_layout(layout) for layout in contender.layouts}
    prepared: dict[str, Steps] = {
        layout: contender.prepare(choice) for layout, choice in choices.items()
    }
    _warm_up(subject)
    layout = contender.layouts[0]
    level = memory_level(device)
    rows, first_calls = [], {}
    for step, call in prepared[layout].items():
        results: list[Vector] = []
        with peak_memory(device, level) as peak:
            first_calls[step] = timed(partial(_keep, call, results), device)
        rows.append(
            replace(
                _judged(row, results.pop(), exact, task.tolerance, contender.estimate),
                step=step,
                memory_mib=peak.bytes / 2**20,
                memory=_multiple(peak.bytes, subject.memory_unit or job.unit_memory),
            )
        )
    keep_freed_memory()
    whole = sum(first_calls.values())
    quick = whole < _PATIENCE
    if quick and len(prepared) > 1:
        layout = min(prepared, key=lambda name: _seconds_once_warm(prepared[name], device))
    if unit is not None:
        unit()
    timings = {}
    for step, call in prepared[layout].items():
        if quick:
            least = 3 if whole < job.budget else 2
            timings[step] = in_turns(call, unit, device, budget=job.budget, least=least)
        else:  # too slow to repeat: its first call stands
            beside = in_turns(unit, None, device, budget=0).seconds if unit else [math.nan]
            timings[step] = Timing([first_calls[step]], [statistics.median(beside)])
    return [replace(_timed_row(found, timings[found.step]), layout=layout) for found in rows]


def _keep(call: Callable[[], Vector], results: list[Vector]) -> None:
    results.append(call())


def _seconds_once_warm(steps: Steps, device: torch.device) -> float:
    for call in steps.values():
        call()
    return sum(timed(call, device) for call in steps.values())


def _reference(job: Job, contender: Contender[Any]) -> Vector | None:
    if contender.reference is None:
        return None
    return load_file(reference_path(job, contender.reference))


def _judged(row: Row, found: Vector, exact: Vector | None, tolerance: float, estimate: bool) -> Row:
    if exact is None:
        return row
    try:
        error = relative_error(found, exact)
    except ValueError as problem:
        return replace(row, status="wrong", message=str(problem))
    if estimate or error <= tolerance:
        return replace(row, error=error)
    what = f"relative error {error:.1e}, above {tolerance:g}"
    return replace(row, error=error, status="wrong", message=what)


def _timed_row(row: Row, timing: Timing) -> Row:
    row = replace(row, seconds=statistics.median(timing.seconds), turns=len(timing.seconds))
    if not timing.unit:
        return row
    low, high = timing.spread
    return replace(
        row,
        unit_seconds=statistics.median(timing.unit),
        fb=timing.multiple,
        fb_low=low,
        fb_high=high,
    )


def _multiple(count: int, unit: int | None) -> float:
    return count / unit if unit else math.nan


def _warm_up(subject: Any) -> None:
    """Start thread pools and libraries, so that their memory is nobody's."""
    weights = torch.ones(64, 64, device=subject.device, requires_grad=True)
    (weights @ weights).sum().backward()
    images = torch.ones(2, 3, 16, 16, device=subject.device)
    kernel = torch.ones(4, 3, 3, 3, device=subject.device, requires_grad=True)
    torch.nn.functional.conv2d(images, kernel).sum().backward()


@contextmanager
def _attention(only_math: bool) -> Iterator[None]:
    if not only_math:
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


def public_message(name: str, text: str) -> str:
    """First line of an error, without paths of this machine."""
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    first = re.sub(r"(?:/[\w.+-]+){2,}", "…", first)
    message = f"{name}: {first}" if first else name
    return message if len(message) <= 200 else message[:199] + "…"


@contextmanager
def _silent() -> Iterator[None]:
    """What a contender prints is no part of the measurement."""
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        yield


class _Report:
    """Writes the message of an error that ends the job."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        if kind is not None:
            result = {"failed": public_message(kind.__name__, str(error))}
            self.target.write_text(json.dumps(result), encoding="utf-8")


def work_off(job: Job, registry: str, target: Path) -> None:
    """Do a job in this process, made for it, and write its rows or its error to ``target``.

    Args:
        job: the job.
        registry: name of the module whose ``TASKS`` it refers to.
        target: a JSON file.
    """
    tasks: Mapping[str, Task[Any]] = importlib.import_module(registry).TASKS
    with _silent(), _Report(target):
        torch.set_num_threads(job.threads)
        if job.most_memory is not None and job.device == "cpu":
            limit_memory(job.most_memory)
        rows = [asdict(row) for row in run(job, tasks)]
        target.write_text(json.dumps({"rows": rows}), encoding="utf-8")


def execute(
    job: Job, limit: float, registry: str = "benchmarks.registry"
) -> list[dict[str, Any]] | str:
    """Run a job in a fresh process; its rows, or the message of its failure.

    The process is forked from one that has imported the registry and computed nothing.

    Args:
        job: the job.
        limit: seconds after which it has failed.
        registry: as in :func:`work_off`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([registry, __name__])
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "result.json")
        process = context.Process(target=work_off, args=(job, registry, target))
        process.start()
        try:
            process.join(limit if math.isfinite(limit) else None)
            late = process.is_alive()
        finally:
            process.kill()
            process.join()
        if late:
            return f"not finished after {limit:g} s"
        if not target.exists():
            return f"ended with status {process.exitcode} and no result"
        result = json.loads(target.read_text(encoding="utf-8"))
        rows: list[dict[str, Any]] | str = result.get("failed") or result["rows"]
        return rows
