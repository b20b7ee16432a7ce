"""Measure every contender on every model, each in a process of its own, and write the tables.

``python -m benchmarks.run`` measures all on the CPU; ``--device cuda`` on a GPU, with batches of
128 and all blocks. ``--only diagonal/resnet18`` takes the measurements whose name
``task/model/contender`` contains that text; such partial results go to ``build/benchmarks``. A run
that is stopped goes on where it was, unless a source or a setting changed.
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
from collections.abc import Iterator, Mapping, Sequence
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
from benchmarks.storing import add_entry, fingerprint, read_journal
from benchmarks.tasks import Task
from pai_utils.runs import surroundings
from pai_utils.support.common import progress
from pai_utils.support.stored import write_atomically

ROOT = Path(__file__).parents[1]
CPU_BLOCKS, GPU_BLOCKS = "an eighth of resnet50's largest layer", "resnet50's largest layer"


@dataclass
class Outcome:
    """What came of all jobs."""

    rows: list[Row] = field(default_factory=list)
    work: list[dict[str, Any]] = field(default_factory=list)
    profile: list[dict[str, Any]] = field(default_factory=list)


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


class Finished:
    """What earlier jobs gave, kept in a file, so that a run that was stopped goes on from there.

    Args:
        path: a file of one JSON object a line; ``None`` keeps nothing.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.entries: dict[str, dict[str, Any]] = {}
        if path is not None:
            self.entries = {entry["job"]: entry for entry in read_journal(path)}

    def holds(self, job: Job) -> bool:
        """Whether the job was done before."""
        return _key(job) in self.entries

    def do(self, job: Job, limit: float, registry: str) -> list[dict[str, Any]] | str:
        """The job's result, from the file or from a fresh process."""
        if not self.holds(job):
            started = time.perf_counter()
            result = execute(job, limit, registry)
            seconds = round(time.perf_counter() - started, 1)
            entry = {"job": _key(job), "task": job.task, "seconds": seconds, "result": result}
            self.entries[_key(job)] = entry
            if self.path is not None and job.kind != "reference":
                add_entry(self.path, entry)
        found: list[dict[str, Any]] | str = self.entries[_key(job)]["result"]
        return found

    @property
    def seconds(self) -> dict[str, float]:
        """Time spent by task, in earlier runs too."""
        spent: dict[str, float] = {}
        for entry in self.entries.values():
            spent[entry["task"]] = round(spent.get(entry["task"], 0.0) + entry["seconds"], 1)
        return spent


def _key(job: Job) -> str:
    return f"{job.kind}/{job.task}/{job.model}/{job.contender}"


def measure(
    tasks: Mapping[str, Task[Any]],
    jobs: Sequence[Job],
    settings: Job,
    limit: float,
    *,
    finished: Finished,
    registry: str = "benchmarks.registry",
) -> Outcome:
    """Run all jobs, with their units and references before them.

    Args:
        tasks: the registry the jobs were planned from.
        jobs: from :func:`plan`.
        settings: a job whose device, images, threads and budget all jobs take.
        limit: seconds after which a contender has failed.
        finished: jobs done before, which are not done again; the others are added.
        registry: name of the module that holds ``tasks``.

    Raises:
        RuntimeError: if a unit or a reference fails, without which nothing can be said.
    """
    outcome = Outcome()
    units: dict[str, Job] = {}
    groups: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.task, job.model), []).append(job)
    with tempfile.TemporaryDirectory() as folder:
        bar = progress(_steps(groups), "benchmarks", total=len(jobs) + len(groups))
        for job in bar:
            base = units.get(job.model, replace(settings, references=folder))
            job = replace(
                base, kind=job.kind, task=job.task, model=job.model, contender=job.contender
            )
            if job.kind == "contender":
                outcome.rows += _contender(tasks, job, finished.do(job, limit, registry))
                _say(outcome.rows[-1])
                continue
            if job.model not in units:
                units[job.model] = _unit(tasks, job, outcome, finished, registry)
            if not all(finished.holds(other) for other in groups[job.task, job.model]):
                for path in Path(folder).iterdir():
                    path.unlink()  # of the model before
                _needed(finished.do(job, math.inf, registry), job)
    return outcome


def _steps(groups: Mapping[tuple[str, str], Sequence[Job]]) -> Iterator[Job]:
    """The jobs, each task and model preceded by its references."""
    for (task, model), jobs in groups.items():
        yield Job("reference", task, model)
        yield from jobs


def _unit(
    tasks: Mapping[str, Task[Any]], job: Job, outcome: Outcome, finished: Finished, registry: str
) -> Job:
    """Measure the unit of cost of a model; the settings of its contenders."""
    if not tasks[job.task].in_units:
        return job

    def do(kind: str) -> list[dict[str, Any]]:
        return _needed(finished.do(replace(job, kind=kind), math.inf, registry), job)

    rows = [Row(**row) for row in do("unit")]
    outcome.rows += [replace(row, task="unit", contender=UNIT) for row in rows]
    _say(rows[0])
    if job.task == "diagonal" and job.model in NETWORKS:
        outcome.work += do("work")
        outcome.profile += do("profile")
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
    started = datetime.now(UTC)
    finished = Finished(ROOT / "build" / "benchmarks" / f"{fingerprint(settings)}.jsonl")
    outcome = measure(TASKS, jobs, settings, options.limit, finished=finished)
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
        "seconds": round(sum(finished.seconds.values()), 1),
        "seconds_by_task": finished.seconds,
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
    if finished.path is not None and not options.only:
        finished.path.unlink()  # the next whole run measures anew
    print(f"{len(jobs)} contenders measured in {record['seconds']:.0f} s: {out}")


if __name__ == "__main__":
    main()
