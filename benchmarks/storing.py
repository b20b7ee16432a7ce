"""Tables of small measurements, and the record of where they were made."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from pai_utils.runs import surroundings
from pai_utils.support.stored import write_atomically


def store(table: pd.DataFrame, out: Path, name: str, **settings: object) -> None:
    """Print a table, and write it as ``out/name.csv`` with a record of where it was measured."""
    # Looked at before anything is written, which would make the checkout differ from its commit.
    record = {**settings, **surroundings("auto")}
    print(table.round(3).to_string(index=False))
    content = table.to_csv(index=False, float_format="%.4g").encode()
    write_atomically(out / f"{name}.csv", content)
    text = json.dumps(record, indent=2, sort_keys=True)
    write_atomically(out / "record.json", text.encode() + b"\n")
