"""Runs of notebooks: validated parameters, seeds, tidy files, and the record of what was run."""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from pai_utils.data.mixtures import is_held_out
from pai_utils.studies.parameters import (
    EncoderParameters,
    Positive,
    RunParameters,
    describe_problem,
)
from pai_utils.support.code import version_of
from pai_utils.support.common import listed
from pai_utils.support.stored import digest_of, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pai_utils.data.tasks import Task
    from pai_utils.masks import Mask

_RECORDED_PACKAGES = ("torch", "torchvision", "timm", "numpy", "scikit-learn", "pai-utils")


class RunRecord(BaseModel):
    """What ``record.json`` of a run holds; a notebook may add further entries."""

    model_config = ConfigDict(extra="allow")

    notebook: str
    parameters: dict[str, Any]  #: seeds among them
    started: datetime
    seconds: Annotated[float, Field(ge=0)]
    peak_memory_mib: Annotated[int, Field(ge=0)]
    device: str
    threads: Positive
    platform: str
    python: str
    versions: dict[str, str | None]
    commit: str | None  #: None outside a checkout
    clean: bool | None
    inputs: dict[str, Any] = {}  #: digests of images
    outputs: dict[str, str]  #: SHA-256 by name


def read_record(folder: Path) -> RunRecord:
    """The record of a run's folder, checked by its schema.

    Raises:
        ValueError: there is none, or it is not whole.
    """
    path = folder / "record.json"
    if not path.is_file():
        raise ValueError(f"{path}: missing")
    try:
        return RunRecord.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problems = "; ".join(map(describe_problem, error.errors()))
        raise ValueError(f"{path} is no record of a run: {problems}") from error


class Result(BaseModel):
    """A row of ``results.csv``: one task after one pruning; fractions are of one."""

    model_config = ConfigDict(extra="forbid")

    cell: str  #: the run: a cell of a grid, or the folder's name
    notebook: str
    backbone: str
    source: str  #: what the mask was computed on, or "none"
    target: str
    held_out: bool
    scorer: str
    sparsity: Annotated[float, Field(ge=0, lt=1)]
    stage: str  #: what was done after pruning
    accuracy: Annotated[float, Field(ge=0, le=1)]  #: mean over seeds
    dense_accuracy: Annotated[float, Field(ge=0, le=1)]
    chance: Annotated[float, Field(ge=0, le=1)]
    retention: float | None  #: of the dense accuracy above chance; None where that is none
    low: float | None  #: 95 % interval of the retention
    high: float | None
    count: Positive  #: test images
    seeds: Positive


_COLUMNS = list(Result.model_fields)
_KEY = ["cell", "source", "target", "scorer", "sparsity", "stage"]


def check_results(table: pd.DataFrame) -> pd.DataFrame:
    """A table of :class:`Result` rows, returned with their columns in order.

    Raises:
        ValueError: a column is missing or unknown, a value ill-typed or out of range, or two rows
            agree in cell, source, target, scorer, sparsity and stage.
    """
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    try:
        TypeAdapter(list[Result]).validate_python(rows)
    except ValidationError as error:
        problems = listed(map(describe_problem, error.errors()))
        raise ValueError(f"no table of results: row {problems}") from error
    twice = table.loc[table.duplicated(_KEY), _KEY]
    if len(twice):
        raise ValueError(f"no table of results: two rows of {tuple(twice.iloc[0])}")
    return table[_COLUMNS]


def read_results(path: Path) -> pd.DataFrame:
    """The results in a file, checked by :func:`check_results`."""
    try:
        texts = {name: str for name, f in Result.model_fields.items() if f.annotation is str}
        return check_results(pd.read_csv(path, dtype=texts, keep_default_na=False, na_values=[""]))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_table(path: Path) -> pd.DataFrame:
    """A table of :meth:`Run.write_table`, with its column ``correct`` as ``[count]`` bool."""
    table = pd.read_csv(path, dtype={"correct": str})
    if "correct" in table:
        packed = [np.frombuffer(bytes.fromhex(text), np.uint8) for text in table.correct]
        sized = zip(packed, table["count"], strict=True)
        right = [np.unpackbits(bits, count=count).astype(bool) for bits, count in sized]
        table["correct"] = pd.Series(right, dtype=object)
    return table


class Run:
    """One execution of a notebook: its folder ``config.out``, made if needed, and its record."""

    def __init__(self, name: str, config: RunParameters) -> None:
        self.name = name
        self.config = config
        self.folder = Path(config.out)
        self._outputs: dict[str, str] = {}
        self._started = datetime.now(UTC)
        self._clock = time.perf_counter()
        # A record from an earlier run in this folder would vouch for files that are being replaced.
        (self.folder / "record.json").unlink(missing_ok=True)

    def write_table(self, name: str, table: pd.DataFrame) -> None:
        """Write ``<name>.csv`` to the run's folder: all of it or nothing.

        A column ``correct``, which images a model was right on, is written as their bits, eight to
        a byte and the first the highest, in hexadecimal digits; :func:`read_table` reads it.
        """
        if "correct" in table:
            bits = [np.packbits(right).tobytes().hex() for right in table.correct]
            table = table.assign(correct=bits)
        self._write(f"{name}.csv", table.to_csv(index=False, float_format="%.6g").encode())

    def write_results(self, table: pd.DataFrame) -> None:
        """Write ``results.csv`` from a table of retention, checked by :func:`check_results`.

        The table is as from :func:`pai_utils.evaluation.summarise_retention`; the dense encoder's
        rows are left out, and so are columns that no result has. Without a column ``stage``
        nothing was done after pruning.

        Raises:
            ValueError: as :func:`check_results`, or for a notebook that loads no encoder.
        """
        if not isinstance(self.config, EncoderParameters):
            raise ValueError(f"results are those of an encoder, and {self.name} loads none")
        rows = table[table.scorer != "dense"]
        rows = rows.assign(
            cell=self.folder.resolve().name,
            notebook=self.name,
            backbone=self.config.backbone,
            held_out=[is_held_out(t, s) for t, s in zip(rows.target, rows.source, strict=True)],
            stage=rows.get("stage", "pruned"),
        )
        self.write_table("results", check_results(rows[rows.columns.intersection(_COLUMNS)]))

    def write_figure(self, name: str, figure: Figure) -> None:
        """Write ``<name>.png`` to the run's folder: all of it or nothing."""
        buffer = BytesIO()
        figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
        self._write(f"{name}.png", buffer.getvalue())

    def write_mask(self, name: str, mask: Mask) -> None:
        """Write ``<name>.safetensors`` to the run's folder."""
        mask.save(self.folder / f"{name}.safetensors")
        self.record_files(f"{name}.safetensors")

    def record_files(self, *names: str) -> None:
        """Give files that were written to the run's folder a place in its record."""
        for name in names:
            self._outputs[name] = digest_of(self.folder / name)

    def finish(self, tasks: Mapping[str, Task] | None = None, **facts: Any) -> dict[str, Any]:
        """Write ``record.json``, the last file of a run, and return its contents.

        Its inputs are the images of ``tasks``; ``facts`` are further entries.
        """
        images = {
            name: {"train": task.train.digest, "test": task.test.digest}
            for name, task in (tasks or {}).items()
        }
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, else KiB
        record: dict[str, Any] = {
            "notebook": self.name,
            "parameters": self.config.model_dump(),
            "started": self._started.isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - self._clock, 2),
            "peak_memory_mib": round(peak / 2**20 if sys.platform == "darwin" else peak / 2**10),
            **surroundings(self.config.device),
            "inputs": {"tasks": images},
            "outputs": self._outputs,
            **facts,
        }
        RunRecord.model_validate(record)
        text = json.dumps(record, indent=2, sort_keys=True, default=str)
        write_atomically(self.folder / "record.json", text.encode() + b"\n")
        return record

    def _write(self, name: str, content: bytes) -> None:
        write_atomically(self.folder / name, content)
        self.record_files(name)


def surroundings(device: str, packages: Sequence[str] = ()) -> dict[str, Any]:
    """What a record says of where a run happened: on a device or ``"auto"``, with what packages."""
    commit, clean = _commit()
    name = platform.processor() or platform.machine()
    if torch.cuda.is_available() and (device == "auto" or device.startswith("cuda")):
        name = torch.cuda.get_device_name(None if device == "auto" else device)
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {package: version_of(package) for package in (*_RECORDED_PACKAGES, *packages)},
        "commit": commit,
        "clean": clean,
    }


def _commit() -> tuple[str | None, bool | None]:
    """Commit of the library's checkout and whether it is clean; ``None`` outside a checkout."""
    file = Path(__file__).resolve()

    def git(*arguments: str) -> list[str]:
        command = ["git", "-C", str(file.parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.splitlines()

    try:
        # The library may be installed below another project's checkout, and be no part of it.
        git("ls-files", "--error-unmatch", file.name)
        (commit,), changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    except (OSError, subprocess.SubprocessError):
        return None, None
    return commit, not changes
