"""Estimate GPU hours and disk of every cell of a grid before anything runs: `plan.py GRID`.

GRID is the name of a file in `workflow/grids`. Nothing is fetched. Hours follow from the
operations of each encoder and from a speed: what the device sustains, not what its maker states.
"""

import argparse
import sys

import pandas as pd
from cells import Layout
from grids import read_grid
from planned import PLANNED_TFLOPS, read_cell


def plan(grid: str, tflops: float) -> str:
    """Return a table of a grid's cells, and what they take together.

    Raises:
        ValueError: The grid is none, a cell is refused, or `tflops` is not above 0.
        FileNotFoundError: A folder of images does not exist.
    """
    from estimates import downloads

    from pai_utils.data.datasets import DATASETS

    if not tflops > 0:
        raise ValueError(f"tflops must be above 0, got {tflops}")
    cells = [read_cell(cell, tflops) for cell in read_grid(Layout(grid).grid_file).values()]
    table = pd.DataFrame([{"cell": cell, **estimate} for cell, _, estimate in cells])
    columns = {
        "cell": "cell",
        "forwards": "forwards",
        "hours": "GPU hours",
        "results_mib": "results, MiB",
        "pixels_mib": "pixels, MiB",
    }
    shown = table[list(columns)].rename(columns=columns)
    needed = downloads(config for _, config, _ in cells)
    listed = ", ".join(f"{name} {size:,}" for name, size in needed.items())
    lines = [
        shown.to_string(index=False, float_format="{:,.3g}".format),
        f"\n{len(table)} rows, {table.hours.sum():,.1f} hours on a device that sustains "
        f"{tflops:g} TFLOP/s (--tflops), {table.results_mib.sum() / 1024:,.1f} GiB of results.",
        "Decoded images are shared by the rows of one task and size; the largest row needs "
        f"{table.pixels_mib.max() / 1024:,.1f} GiB of them, in memory or beside the data.",
    ]
    if needed:
        total = sum(needed.values())
        lines.append(f"Data sets to have on disk, in MB: {listed}; {total:,} together.")
    by_hand = [name for name in needed if DATASETS[name].by_hand]
    lines += [f"{name} cannot be downloaded. {DATASETS[name].by_hand}." for name in by_hand]
    return "\n".join(lines)


def main() -> int:
    """Estimate the grid that the command line names."""
    parser = argparse.ArgumentParser(description="Estimate GPU hours and disk of a grid's cells.")
    parser.add_argument("grid", help="the name of a file in workflow/grids")
    speed = "what the device sustains, in 10^12 floating-point operations a second"
    parser.add_argument("--tflops", type=float, default=PLANNED_TFLOPS, help=speed)
    arguments = parser.parse_args()
    try:
        print(plan(arguments.grid, arguments.tflops))
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        print(f"{arguments.grid}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
