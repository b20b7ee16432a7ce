"""Keep what a grid's cells wrote: `store.py GRID` copies it to `results/GRID/`.

Tables, figures and records are kept; masks, which are large, are not. The cells' results together
are `results/GRID/results.csv`, one row a cell, mask and task.
"""

import argparse
import shutil
import sys
from pathlib import Path

import pandas as pd
from cells import Layout, problems
from grids import read_grid

from pai_utils.runs import check_results, read_record, read_results
from pai_utils.support.stored import digest_of, write_atomically

KEPT = (".csv", ".json", ".png")


def store(layout: Layout, results: Path) -> list[Path]:
    """Copy every cell's tables, figures and record to a folder of its own; return these folders.

    Raises:
        ValueError: A cell is not executed, its copy or record is not whole, or a file is not what
            its record says; nothing is copied.
    """
    cells = read_grid(layout.grid_file)
    found = [p for name in cells for p in problems(layout.executed / f"{name}.ipynb")]
    tables = []
    for name in cells:
        folder = layout.executed / name
        try:
            for output, digest in read_record(folder).outputs.items():
                path = folder / output
                if not path.is_file() or digest_of(path) != digest:
                    found.append(f"{path}: altered")
            if (folder / "results.csv").is_file():
                tables.append(read_results(folder / "results.csv"))
        except ValueError as error:
            found.append(str(error))
    if found:
        raise ValueError("; ".join(found))
    folders = []
    for name in cells:
        folder = results / layout.grid / name
        partial = folder.with_name(f".{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file in sorted((layout.executed / name).iterdir()):
            if file.suffix in KEPT and not file.name.startswith("mask-"):
                shutil.copyfile(file, partial / file.name)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        folders.append(folder)
    for path in (results / layout.grid).iterdir():
        if path.name not in cells:  # of an earlier grid
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if tables:
        together = check_results(pd.concat(tables, ignore_index=True))
        content = together.to_csv(index=False, float_format="%.6g").encode()
        write_atomically(results / layout.grid / "results.csv", content)
    return folders


def main() -> int:
    """Store what the command line names."""
    parser = argparse.ArgumentParser(description="Keep what a grid's cells wrote.")
    parser.add_argument("grid", help="the name of a file in workflow/grids")
    try:
        for folder in store(Layout(parser.parse_args().grid), Path("results")):
            print(f"Stored {folder}")
    except ValueError as error:
        print(f"nothing is stored: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
