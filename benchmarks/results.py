"""The table of measurements: one row a step of a contender on a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pandas as pd

UNIT = "forward and backward"
"""The contender that is the unit of cost."""

STATUSES = ("ok", "wrong", "failed")


@dataclass(frozen=True)
class Row:
    """A measurement, or why there is none. What does not apply is NaN or empty."""

    task: str
    model: str
    contender: str
    computes: str = ""
    role: str = "peer"  # "ours", "peer" or "unit"
    step: str = ""
    status: str = "ok"  # of STATUSES; "wrong": measured, but beyond the task's tolerance
    message: str = ""  # of what failed or is wrong
    seconds: float = math.nan  # median
    unit_seconds: float = math.nan  # median of the unit, run in turns with it
    fb: float = math.nan  # their ratio
    fb_low: float = math.nan  # lowest and highest ratio of neighbours
    fb_high: float = math.nan
    turns: int = 0
    memory_mib: float = math.nan  # peak above the level before
    memory: float = math.nan  # as a multiple of the unit's, or of the input's size
    error: float = math.nan  # relative, against float64
    estimate: bool = False  # random by design, so that its error is no mistake
    layout: str = ""


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """The rows as a table, with its columns even if there is none."""
    return pd.DataFrame([asdict(row) for row in rows], columns=[f.name for f in fields(Row)])


def read(path: Path) -> pd.DataFrame:
    """The table of a file that :func:`table` was written to.

    Raises:
        ValueError: if the file has other columns, or a status that is none.
    """
    text = {f.name: str for f in fields(Row) if f.type == "str"}
    found = pd.read_csv(
        path,
        dtype=text,
        keep_default_na=False,
        na_values={f.name: [""] for f in fields(Row) if f.type == "float"},
    )
    wanted = [f.name for f in fields(Row)]
    if list(found.columns) != wanted:
        raise ValueError(f"{path}: expected the columns {', '.join(wanted)}")
    unknown = set(found.status) - set(STATUSES)
    if unknown:
        raise ValueError(f"{path}: unknown status {sorted(unknown)}; valid are {STATUSES}")
    return found
