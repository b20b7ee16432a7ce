"""The page's tables and figures from the measurements: ``python -m benchmarks.report FOLDER``."""

from __future__ import annotations

import argparse
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from benchmarks.problems import NETWORKS
from benchmarks.results import read
from pai_utils.support.stored import write_atomically

NOTHING = "–"
_FLOOR = (
    "model",
    "image",
    "weights scored, M",
    "FB, GFLOP",
    "squares, GFLOP",
    "floor, FB",
    "gradients' traffic, GB",
    "if uncached, FB",
    "measured, FB",
    "above the floor",
)
_TARGETS = (
    "diagonal of the GGN, time in FB",
    "diagonal of the GGN, memory in FB's",
    "times faster than the fastest correct peer",
    "first Hessian product, time in FB",
    "further Hessian product, time in FB",
    "block_fisher, times faster than the rank-one recursion",
    "mask of 86 M weights, seconds",
    "mask of 86 M weights, copies of the scores",
)


def write_report(folder: Path) -> None:
    """Write what the page shows beside the measurements in ``folder``."""
    rows = read(folder / "measurements.csv")
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    work = _read_if_any(folder / "work.csv")
    shares = _read_if_any(folder / "profile.csv")
    tables = {
        "diagonal_time": pivot(rows, "diagonal", "whole", _time),
        "diagonal_memory": pivot(rows, "diagonal", "whole", _memory),
        "diagonal_error": pivot(rows, "diagonal", "whole", _error),
        "product_first": pivot(rows, "product", "first", _time),
        "product_further": pivot(rows, "product", "further", _time),
        "product_memory": pivot(rows, "product", "further", _memory),
        "product_error": pivot(rows, "product", "first", _error),
        "eigenpairs": listing(rows, "eigenpairs"),
        "blocks": listing(rows, "blocks"),
        "inputs": listing(rows, "inputs"),
        "mask": listing(rows, "mask"),
        "contenders": contenders(rows, record),
        "failures": failures(rows),
        "targets": targets(rows, _kind(record)),
        "floor": floor(rows, work),
        "shares": _rounded(shares),
        "setting": setting(record),
    }
    for name, table in tables.items():
        if table.empty:  # which the page could not show
            table = pd.DataFrame([dict.fromkeys(table.columns, NOTHING)])
        write_atomically(folder / "page" / f"{name}.csv", table.to_csv(index=False).encode())
    for task, step in (("diagonal", "whole"), ("product", "further")):
        own = rows[(rows.task == task) & rows.step.isin([step, ""])]
        if len(own):
            buffer = io.BytesIO()
            figure = cost_multiples(own)
            figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
            write_atomically(folder / "page" / f"{task}.png", buffer.getvalue())


def cost_multiples(table: pd.DataFrame) -> Figure:
    """Cost of each contender as a multiple of one forward and backward, one panel a model.

    Bars of our own are hatched; a status other than "ok" is written beside a bar or in its place.
    """
    names = list(dict.fromkeys(table.sort_values("role", kind="stable").contender))
    with sns.axes_style("whitegrid"), sns.plotting_context("paper", 1.1):
        grid = sns.catplot(
            table.assign(fb=table.fb.clip(lower=0.5)),  # a failure's bar ends where the axis begins
            kind="bar",
            x="fb",
            y="contender",
            order=names,
            hue="role",
            palette={"ours": "0.85", "peer": "0.55"},
            edgecolor="black",
            linewidth=0.6,
            legend=False,
            col="model",
            col_wrap=3,
            height=1.0 + 0.24 * len(names),
            aspect=3.6 / (1.0 + 0.24 * len(names)),
        )
        for model, axes in grid.axes_dict.items():
            for bar in axes.containers[0]:
                bar.set_hatch("///")
            for row in table[table.model == model].itertuples():
                text = f"{row.fb:.2f}" if row.fb > 0 else "fails"
                if row.fb > 0 and row.status != "ok":
                    text += f" {row.status}"
                place = (max(row.fb, 0.5), names.index(row.contender))
                axes.annotate(f" {text}", place, va="center", fontsize=7)
            axes.axvline(1, color="black", linewidth=1, linestyle="--")
            axes.set_xscale("log")
            axes.set_xlim(0.5, 3 * table.fb.max())
            axes.set_xticks([1, 3, 10, 30], ["1", "3", "10", "30"])
            axes.minorticks_off()
        grid.set_titles("{col_name}").set_axis_labels("forward and backward passes", "")
        grid.tight_layout()
    figure: Figure = grid.figure
    plt.close(figure)
    return figure


def pivot(rows: pd.DataFrame, task: str, step: str, cell: Callable[[Any], str]) -> pd.DataFrame:
    """One row a contender, one column a model; ours first, failures as words."""
    own = rows[(rows.task == task) & rows.step.isin([step, ""])]
    models = [name for name in NETWORKS if name in set(own.model)]
    lines = []
    for contender in _ordered(own):
        line = {"contender": _named(own, contender)}
        for model in models:
            found = own[(own.contender == contender) & (own.model == model)]
            line[model] = cell(found.iloc[0]) if len(found) else NOTHING
        lines.append(line)
    return pd.DataFrame(lines, columns=["contender", *models])


def listing(rows: pd.DataFrame, task: str) -> pd.DataFrame:
    """One row a contender, with everything that was measured."""
    own = rows[rows.task == task]
    return pd.DataFrame(
        [
            {
                "contender": _named(own, str(row.contender)),
                "on": row.model,
                "seconds": _number(row.seconds),
                "FB": _number(row.fb),
                "peak memory, MiB": _number(row.memory_mib),
                "peak memory, multiple": _number(row.memory),
                "relative error": _error(row),
            }
            for row in own.itertuples()
        ],
        columns=[
            "contender",
            "on",
            "seconds",
            "FB",
            "peak memory, MiB",
            "peak memory, multiple",
            "relative error",
        ],
    )


def contenders(rows: pd.DataFrame, record: dict[str, Any]) -> pd.DataFrame:
    """What each contender computes."""
    own = rows[rows.role != "unit"]
    first = own.drop_duplicates(["task", "contender"])
    return pd.DataFrame(
        {
            "task": first.task,
            "contender": [_named(own, name) for name in first.contender],
            "computes": first.computes,
        }
    )


def failures(rows: pd.DataFrame) -> pd.DataFrame:
    """Who failed or was wrong where, with the message."""
    own = rows[rows.status != "ok"]
    merged = own.groupby(["task", "contender", "status", "message"], sort=False).model
    lines = [
        {
            "task": key[0],
            "contender": key[1],
            "on": ", ".join(dict.fromkeys(models)),
            "is": key[2],
            "message": f"`{key[3]}`".replace("``", "`"),
        }
        for key, models in merged
    ]
    return pd.DataFrame(lines, columns=["task", "contender", "on", "is", "message"])


def targets(rows: pd.DataFrame, device: str) -> pd.DataFrame:
    """The targets beside what was measured."""
    gpu = device == "cuda"
    lines: list[dict[str, str]] = []

    def add(target: str, model: str, bound: float, value: float, *, least: bool = False) -> None:
        if math.isnan(value):
            return
        met = value >= bound if least else value <= bound
        lines.append(
            {
                "target": target,
                "on": model,
                "at least" if least else "at most": _number(bound),
                "measured": _number(value),
                "met": "yes" if met else "no",
            }
        )

    for model, network in NETWORKS.items():
        bound = 1.25 if gpu else 1.5 if network.convolutional else 1.15
        own = _one(rows, "diagonal", model, "ggn_diagonal", "whole")
        if own is None:
            continue
        add(_TARGETS[0], model, bound, own.fb)
        add(_TARGETS[1], model, 1.5, own.memory)
        peer = fastest_correct_peer(rows, "diagonal", model, "whole")
        if peer is not None:
            wanted = 3.0 if gpu else 2.5 if model.startswith("resnet") else 1.0
            add(f"{_TARGETS[2]} ({peer.contender})", model, wanted, peer.fb / own.fb, least=True)
    for model in NETWORKS:
        for label, step, bound in (
            (_TARGETS[3], "first", 3.1),
            (_TARGETS[4], "further", 2.1),
        ):
            own = _one(rows, "product", model, "HessianOperator", step)
            if own is not None:
                add(label, model, bound, own.fb)
    for model in dict.fromkeys(rows[rows.task == "blocks"].model):
        ours = _one(rows, "blocks", model, "BlockFisher", "whole")
        theirs = _one(rows, "blocks", model, "rank-one recursion", "whole")
        if ours is not None and theirs is not None:
            bound = 20.0 if gpu else 10.0
            add(_TARGETS[5], model, bound, theirs.seconds / ours.seconds, least=True)
    mask = _one(rows, "mask", "vit_base", "make_mask", "whole")
    if mask is not None:
        add(_TARGETS[6], "vit_base", 0.05 if gpu else 2.0, mask.seconds)
        add(_TARGETS[7], "vit_base", 2.0, mask.memory)
    columns = ["target", "on", "at most", "at least", "measured", "met"]
    return pd.DataFrame(lines, columns=columns).fillna("")


def fastest_correct_peer(rows: pd.DataFrame, task: str, model: str, step: str) -> Any | None:
    """The peer of least cost that computes the quantity itself and was not found wrong."""
    own = rows[(rows.task == task) & (rows.model == model) & (rows.step == step)]
    own = own[(own.role == "peer") & (own.status == "ok") & ~own.estimate]
    return own.sort_values("fb").iloc[0] if len(own) else None


def floor(rows: pd.DataFrame, work: pd.DataFrame) -> pd.DataFrame:
    """How far the diagonal is from the work that it cannot do without."""
    lines = []
    for entry in work.itertuples():
        own = _one(rows, "diagonal", str(entry.model), "ggn_diagonal", "whole")
        measured = own.fb if own is not None else math.nan
        lines.append(
            {
                "model": entry.model,
                "image": f"{entry.image_size} px",
                "weights scored, M": _number(float(str(entry.prunable)) / 1e6),
                "FB, GFLOP": _number(entry.unit_gflop),
                "squares, GFLOP": _number(entry.squares_gflop),
                "floor, FB": _number(entry.floor_fb),
                "gradients' traffic, GB": _number(entry.gradients_gbyte),
                "if uncached, FB": _number(entry.traffic_fb),
                "measured, FB": _number(measured),
                "above the floor": NOTHING
                if math.isnan(measured)
                else f"{measured / float(str(entry.floor_fb)) - 1:+.0%}",
            }
        )
    return pd.DataFrame(lines, columns=_FLOOR)


def setting(record: dict[str, Any]) -> pd.DataFrame:
    """Where and when the measurements were taken."""
    entries = {
        "processor": record["processor"],
        "device": record["device"],
        "threads": record["parameters"]["threads"],
        "memory": f"{record['memory_gib']:g} GiB",
        "images": record["parameters"]["images"],
        "date": record["started"],
        "commit": record["commit"] or NOTHING,
        "duration": f"{record['seconds'] / 60:.0f} min",
        "Python": record["python"],
        **{name: version for name, version in record["versions"].items() if version},
    }
    return pd.DataFrame({"": list(entries), "value": [str(value) for value in entries.values()]})


def _kind(record: dict[str, Any]) -> str:
    return "cpu" if record["device_type"] == "cpu" else "cuda"


def _read_if_any(path: Path) -> pd.DataFrame:
    # A run of a part may have neither counts nor profiles.
    return pd.read_csv(path) if path.read_text(encoding="utf-8").strip() else pd.DataFrame()


def _rounded(table: pd.DataFrame) -> pd.DataFrame:
    if table.empty:
        return pd.DataFrame(columns=["model", "operation", "diagonal_fb", "unit_fb"])
    shown = table.map(lambda value: _number(value) if isinstance(value, float) else value)
    return shown.rename(columns={"diagonal_fb": "ggn_diagonal, FB", "unit_fb": "FB"})


def _one(rows: pd.DataFrame, task: str, model: str, contender: str, step: str) -> Any | None:
    own = rows[
        (rows.task == task)
        & (rows.model == model)
        & (rows.contender == contender)
        & (rows.step == step)
    ]
    return own.iloc[0] if len(own) else None


def _ordered(own: pd.DataFrame) -> list[str]:
    names = own.sort_values("role", kind="stable", key=lambda r: r != "ours").contender
    return list(dict.fromkeys(names))


def _named(own: pd.DataFrame, contender: str) -> str:
    ours = (own[own.contender == contender].role == "ours").any()
    return f"**{contender}**" if ours else contender


def _time(row: Any) -> str:
    if row.status == "failed":
        return "fails"
    words = "wrong: " if row.status == "wrong" else ""
    if row.turns < 2:
        return f"{words}{row.fb:.2f}"
    return f"{words}{row.fb:.2f} ({row.fb_low:.2f}–{row.fb_high:.2f})"


def _memory(row: Any) -> str:
    return "fails" if row.status == "failed" else _number(row.memory)


def _error(row: Any) -> str:
    if row.status == "failed":
        return "fails"
    return NOTHING if math.isnan(row.error) else f"{row.error:.1e}"


def _number(value: Any) -> str:
    value = float(value)
    if math.isnan(value):
        return NOTHING
    return f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"


def main() -> None:
    """Write the tables and figures of a folder again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    write_report(parser.parse_args().folder)


if __name__ == "__main__":
    main()
