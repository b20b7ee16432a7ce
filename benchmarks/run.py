"""Measure every contender on every model, each in a process of its own, and write the tables.

``python -m benchmarks.run`` measures all on the CPU; ``--device cuda`` on a GPU, with batches of
128 and all blocks. ``--only diagonal/resnet18`` takes the measurements whose name
``task/model/contender`` contains that text; such partial results go to ``build/benchmarks``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.job import MATH_ATTENTION, Job, execute
from benchmarks.problems import NETWORKS
from benchmarks.registry import TASKS
from benchmarks.report import write_report
from benchmarks.results import UNIT, Row, table
from benchmarks.tasks import Task
from pai_utils.execution import progress, write_atomically
from pai_utils.runs import surroundings

ROOT = Path(__file__).parents[1]
CPU_BLOCKS, GPU_BLOCKS = "an eighth of resnet50's largest layer", "resnet50's largest layer"


@dataclass
class Outcome:
    """What came of all jobs."""

    rows: list[Row] = field(default_factory=list)
    work: list[dict[str, Any]] = field(default_factory=list)
    profile: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # by task


def plan(tasks: Mapping[str, Task[Any]], only: Sequence[str], device: str) -> list[Job]:
    """The contenders to measure, as jobs without settings, in the order of the tasks."""
    unwanted = GPU_BLOCKS if device == "cpu" else CPU_BLOCKS
    jobs = []
    for name, task in tasks.items():
        for model in task.subjects:
            if model == unwanted:
                continue
            for key, contender in task.contenders.items():
                jobs.append(Job("contender", name, model, key))
                transformer = model in NETWORKS and not NETWORKS[model].convolutional
                if contender.second_derivatives and transformer:
                    jobs.append(Job("contender", name, model, key + MATH_ATTENTION))
    return [
        job
        for job in jobs
        if not only or any(text in f"{job.task}/{job.model}/{job.contender}" for text in only)
    ]


def measure(
    tasks: Mapping[str, Task[Any]],
    jobs: Sequence[Job],
    settings: Job,
    limit: float,
    *,
    registry: str = "benchmarks.registry",
) -> Outcome:
    """Run all jobs, with their units and references before them.

    Args:
        tasks: the registry the jobs were planned from.
        jobs: from :func:`plan`.
        settings: a job whose device, images, threads and budget all jobs take.
        limit: seconds after which a contender has failed.
        registry: name of the module that holds ``tasks``.

    Raises:
        RuntimeError: if a unit or a reference fails, without which nothing can be said.
    """
    outcome = Outcome()
    units: dict[str, Job] = {}
    with tempfile.TemporaryDirectory() as folder:
        settings = replace(settings, references=folder)
        pairs = dict.fromkeys((job.task, job.model) for job in jobs)
        bar = progress(_steps(jobs), "benchmarks", total=len(jobs) + len(pairs))
        for job in bar:
            started = time.perf_counter()
            base = units.get(job.model, settings)
            job = replace(
                base, kind=job.kind, task=job.task, model=job.model, contender=job.contender
            )
            if job.kind == "reference":
                for path in Path(folder).iterdir():
                    path.unlink()  # of the model before
                if job.model not in units:
                    units[job.model] = _unit(tasks, job, outcome, registry)
                _needed(execute(job, math.inf, registry), job)
            else:
                outcome.rows += _contender(tasks, job, execute(job, limit, registry))
                _say(outcome.rows[-1])
            spent = outcome.seconds.get(job.task, 0) + time.perf_counter() - started
            outcome.seconds[job.task] = round(spent, 1)
    return outcome


def _steps(jobs: Sequence[Job]) -> Iterable[Job]:
    """The jobs, each task and model preceded by its references."""
    before: tuple[str, str] | None = None
    for job in jobs:
        if (job.task, job.model) != before:
            yield Job("reference", job.task, job.model)
        before = (job.task, job.model)
        yield job


def _unit(tasks: Mapping[str, Task[Any]], job: Job, outcome: Outcome, registry: str) -> Job:
    """Measure the unit of cost of a model; the settings of its contenders."""
    if not tasks[job.task].in_units:
        return job
    rows = [
        Row(**row) for row in _needed(execute(replace(job, kind="unit"), math.inf, registry), job)
    ]
    outcome.rows += [replace(row, task="unit", contender=UNIT) for row in rows]
    _say(rows[0])
    if job.task == "diagonal" and job.model in NETWORKS:
        outcome.work += _needed(execute(replace(job, kind="work"), math.inf, registry), job)
        outcome.profile += _needed(execute(replace(job, kind="profile"), math.inf, registry), job)
    memory = min(row.memory_mib for row in rows) * 2**20
    return replace(job, layout=rows[0].layout, unit_memory=round(memory))


def _contender(
    tasks: Mapping[str, Task[Any]], job: Job, result: list[dict[str, Any]] | str
) -> list[Row]:
    if not isinstance(result, str):
        return [Row(**row) for row in result]
    contender = tasks[job.task].contenders[job.contender.removesuffix(MATH_ATTENTION)]
    return [
        Row(
            job.task,
            job.model,
            job.contender,
            computes=contender.computes,
            role="ours" if contender.ours else "peer",
            status="failed",
            message=result,
            estimate=contender.estimate,
        )
    ]


def _needed(result: list[dict[str, Any]] | str, job: Job) -> list[dict[str, Any]]:
    if isinstance(result, str):
        raise RuntimeError(f"{job.kind} of {job.task} on {job.model}: {result}")
    return result


def _say(row: Row) -> None:
    if not sys.stderr.isatty():  # no bar there
        cost = f"{row.fb:.2f} FB" if math.isfinite(row.fb) else f"{row.seconds:.2f} s"
        what = row.message if row.status == "failed" else f"{row.status}, {cost}"
        print(f"{row.task}/{row.model}/{row.contender}: {what}", file=sys.stderr, flush=True)


def processor() -> str:
    """The name of the CPU, as the system gives it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description="Measure costs beside other packages.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT")
    parser.add_argument("--images", type=int, help="default: 32, on a GPU 128")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--budget", type=float, default=4.0, help="seconds of repeats of a step")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for a contender")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    kind = torch.device(options.device).type
    # So that the process of a contender ends with this one.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    jobs = plan(TASKS, options.only, kind)
    if not jobs:
        parser.error(f"nothing is called {options.only}; names are task/model/contender")
    home = Path("build") if options.only else Path("results")
    out = options.out or ROOT / home / "benchmarks" / kind
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    settings = Job(
        "contender",
        "",
        "",
        device=options.device,
        images=options.images or (32 if kind == "cpu" else 128),
        threads=options.threads,
        budget=options.budget,
        most_memory=round(0.7 * memory),
    )
    started, clock = datetime.now(UTC), time.perf_counter()
    outcome = measure(TASKS, jobs, settings, options.limit)
    torch.set_num_threads(options.threads)
    packages = sorted(
        {c.package for t in TASKS.values() for c in t.contenders.values() if c.package}
    )
    record = {
        "parameters": {
            "only": options.only,
            "images": settings.images,
            "threads": settings.threads,
            "budget": settings.budget,
            "limit": options.limit,
        },
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - clock, 1),
        "seconds_by_task": outcome.seconds,
        "processor": processor(),
        "device_type": kind,
        "memory_gib": round(memory / 2**30, 1),
        **surroundings(options.device, packages),
    }
    for name, rows in (
        ("measurements", table(outcome.rows)),
        ("work", pd.DataFrame(outcome.work)),
        ("profile", pd.DataFrame(outcome.profile)),
    ):
        text = rows.to_csv(index=False, float_format="%.6g")
        write_atomically(out / f"{name}.csv", text.encode())
    text = json.dumps(record, indent=2, sort_keys=True)
    write_atomically(out / "record.json", text.encode() + b"\n")
    write_report(out)
    print(f"{len(jobs)} contenders measured in {record['seconds']:.0f} s: {out}")


if __name__ == "__main__":
    main()
