"""Tables of small measurements, the record of where they were made, and journals of long ones."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from pai_utils.runs import surroundings
from pai_utils.support.stored import write_atomically

ROOT = Path(__file__).parents[1]


def fingerprint(settings: object) -> str:
    """Changes with the settings, torch, and every source that measures or is measured."""
    digest = hashlib.sha256(f"{settings} {torch.__version__}".encode())
    for folder in ("benchmarks", "pai_utils"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The entries that :func:`add_entry` wrote, but for one that was cut short."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def add_entry(path: Path, entry: dict[str, Any]) -> None:
    """Add what was finished to a journal, a line an entry."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def store(table: pd.DataFrame, out: Path, name: str, **settings: object) -> None:
    """Print a table, and write it as ``out/name.csv`` with a record of where it was measured."""
    # Looked at before anything is written, which would make the checkout differ from its commit.
    record = {**settings, **surroundings("auto")}
    print(table.round(3).to_string(index=False))
    content = table.to_csv(index=False, float_format="%.4g").encode()
    write_atomically(out / f"{name}.csv", content)
    text = json.dumps(record, indent=2, sort_keys=True)
    write_atomically(out / "record.json", text.encode() + b"\n")
