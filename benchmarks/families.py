"""Which architectures the library takes: one small member of each of timm's families, all the way.

``python -m benchmarks.families`` writes the table and its record to
``results/benchmarks/families``. The families are the modules of timm with most published weights
and a small model; the member is the one with fewest parameters, at random weights and the fewest
pixels that it takes. Nothing is fetched.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import click
import pandas as pd
import timm
import torch

import pai_utils as pai
from benchmarks.storing import store
from pai_utils.models.encoders import Backbone
from pai_utils.support.common import progress
from pai_utils.support.stored import write_atomically

ROOT = Path(__file__).parents[1]
FAMILIES = 60
MOST_PARAMETERS = 60_000_000
PIXELS = (32, 64, 96, 128, 160, 192, 224, 256)
SPARSITY = 0.5


def members(count: int) -> Iterator[tuple[str, str]]:
    """The modules of timm with most published weights and a small model, and that model."""
    weights = {m: len(timm.list_models(module=m, pretrained=True)) for m in timm.list_modules()}
    for module in sorted(weights, key=lambda module: (-weights[module], module)):
        member = smallest(module)
        if count and parameters(member) <= MOST_PARAMETERS:
            count -= 1
            yield module, member


def smallest(module: str) -> str:
    """The published model of a module with fewest parameters."""
    names: list[str] = timm.list_models(module=module, pretrained=True)
    # One for each architecture: weights differ in what they were trained on.
    return min(sorted({name.partition(".")[0] for name in names}), key=parameters)


def parameters(name: str) -> int:
    """How many a model of timm has."""
    with torch.device("meta"):
        return sum(each.numel() for each in timm.create_model(name).parameters())


def load(name: str) -> Backbone:
    """The encoder at the fewest pixels that it takes, or else at its own size."""
    for size in PIXELS:
        with suppress(Exception):  # whatever a model raises at a size that it does not take
            backbone = pai.load_backbone(f"timm:{name}", size, "cpu", pretrained=False)
            with torch.no_grad():
                backbone(torch.zeros(2, 3, size, size))
            return backbone
    return pai.load_backbone(f"timm:{name}", None, "cpu", pretrained=False)


def tried(row: dict[str, object], step: str, what: Callable[[], Any]) -> Any:
    """What a step gives; in its row, ``"yes"``, or the reason why not."""
    try:
        found = what()
    except Exception as error:
        kind = "refused" if isinstance(error, ValueError) else f"failed: {type(error).__name__}"
        # PyTorch's exporter writes in colours; where the files were for a moment tells nobody much.
        said = re.sub(r"\S+/(?=pruned\.)", "", click.unstyle(str(error)))
        row[step] = f"{kind}: {said.splitlines()[0][:300]}" if said else kind
        return None
    row[step] = "yes"
    return found


def all_the_way(module: str, member: str) -> Mapping[str, object]:
    """Load, score, prune with a repair, evaluate, and export one member of a family."""
    begin = time.perf_counter()
    row: dict[str, object] = {"family": module, "member": member}
    backbone = tried(row, "load", lambda: load(member))
    if backbone is None:
        return row
    row["pixels"] = backbone.image_size
    row["millions"] = sum(each.numel() for each in backbone.parameters()) / 1e6
    task = pai.load_task("photos", backbone.transform, train_size=24, test_size=12)
    model = pai.Classifier(backbone, pai.fit_head(backbone, task))
    how: dict[str, Any] = {"samples": 8, "batch_size": 4}

    def finite(scorer: str) -> bool:
        scores = pai.score(scorer, model, task.train, **how)
        return all(bool(values.isfinite().all()) for values in scores.values())

    for scorer in ("ggn_diag", "snip", "synflow"):
        tried(row, scorer, partial(finite, scorer))

    def prune() -> pai.Pruned:
        repair = "layerwise+moments"
        return pai.prune(model, task.train, "magnitude", SPARSITY, repair=repair, **how)

    pruned = tried(row, "repair", prune)
    if pruned is not None:
        _take_home(row, pruned.model, pruned.mask, task)
    row["seconds"] = time.perf_counter() - begin
    return row


def _take_home(
    row: dict[str, object], model: pai.Classifier, mask: pai.Mask, task: pai.Task
) -> None:
    images, _ = task.test.batch(range(4))
    tried(row, "evaluate", lambda: pai.evaluate(model, task.test))
    with tempfile.TemporaryDirectory() as folder:

        def compressed() -> None:
            path = Path(folder) / "pruned.safetensors"
            pai.save_compressed(model, mask, path)
            with torch.no_grad():
                assert torch.equal(pai.load_classifier(path)(images), model(images))

        def onnx() -> None:
            path = Path(folder) / "pruned.onnx"
            pai.export.export_onnx(model, path)
            pai.export.check_onnx(model, path, images)

        tried(row, "compressed", compressed)
        tried(row, "onnx", onnx)


def main() -> None:
    """Try every family and write the table."""
    parser = argparse.ArgumentParser(description="Which of timm's families work, and how far.")
    parser.add_argument("--out", type=Path, default=ROOT / "results/benchmarks/families")
    given = parser.parse_args()
    rows = [all_the_way(*each) for each in progress(members(FAMILIES), "families", FAMILIES)]
    table = pd.DataFrame(rows)
    store(table, given.out, "families", timm=timm.__version__, sparsity=SPARSITY)
    write_atomically(given.out / "page.csv", shown(table).to_csv(index=False).encode())


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """One row a family, with the steps that fail and the first reason why."""
    steps = ["load", "ggn_diag", "snip", "synflow", "repair", "evaluate", "compressed", "onnx"]
    rows = []
    for _, row in table.iterrows():
        # A step that was not reached is no text.
        failing = {s: row[s] for s in steps if isinstance(row.get(s), str) and row[s] != "yes"}
        _, _, why = next(iter(failing.values()), "").partition(": ")
        rows.append(
            {
                "family": row.family,
                "member": row.member,
                "pixels": row.pixels,
                "all but": ", ".join(failing) or "–",
                "because": textwrap.shorten(why, 140, placeholder=" …"),
            }
        )
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main()
