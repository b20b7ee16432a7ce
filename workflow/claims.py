"""What is claimed, and what the stored results say of it.

`judged` estimates every number that a claim rests on from the results of single images,
and `results/recompute.py` does so again in plain NumPy. `claims` sets them side by side for a page.
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from pai_utils.evaluation import Estimate, dense_rows, estimate, judged_rows, paired, verdicts
from pai_utils.runs import read_table
from pai_utils.studies.finetune_recovery import chosen_on_validation

ENCODERS = {
    "efficientnet_lite0": "EfficientNet-Lite0",
    "efficientnet_lite1": "EfficientNet-Lite1",
    "efficientnet_lite2": "EfficientNet-Lite2",
    "mobilenetv2": "MobileNetV2",
    "vit_small_saliency": "ViT-S/14",
}
KEPT = 0.9  # of the accuracy above chance
LOCKED = "folder:tiny-imagenet-b"
PAPER, DAMPED = "ggn_diag", "feature_ggn_diag"
JOINT = "feature_ggn_diag+obs_inputs@feature_ggn_diag"
SHUFFLED = f"random@{DAMPED}"
MOMENTS, SOLVED = " + moments", " + layerwise+moments"
COLUMNS = [
    "claim", "encoder", "sparsity", "tasks", "value", "low", "high", "over", "verdict",
    "run", "method", "images", "against_run", "against", "against_images", "rate",
]  # fmt: skip
ALONE, MIXTURE = "the source alone", "a mixture around it"


class Masks(NamedTuple):
    """What made the masks of a stored run, and what they are measured on."""

    run: str  #: a folder of `results/`
    method: str  #: as its tables name it
    images: str = ""  #: :data:`ALONE`, :data:`MIXTURE` or one source; empty: all of the run
    tasks: str = "held-out"  #: or ``"own"``, or one task's name


class Question(NamedTuple):
    """Do masks keep more than nine tenths, or more than others? At every sparsity of the run."""

    claim: str
    masks: Masks
    others: Masks | None = None


def questions(encoder: str) -> Iterator[Question]:
    """All that is asked of an encoder's masks."""
    run, steps = (
        f"transfer/zero_shot_retention-{encoder}",
        f"factorial/zero_shot_retention-{encoder}",
    )
    paper = Masks(f"{run}-undamped", PAPER)
    loss, features = Masks(run, PAPER), Masks(run, DAMPED)
    yield Question("P1, the paper's score: no damping", paper)
    yield Question("P1, damped curvature of the loss", loss)
    yield Question("P1, damped curvature of the features", features)
    yield Question("the masks' own tasks", loss._replace(tasks="own"))
    yield Question("the locked task", features._replace(tasks=LOCKED))
    yield Question("damping adds", loss, paper)
    for label, other in {
        "its shuffle in each layer": "random@ggn_diag",
        "magnitude over all layers": "magnitude",
        "magnitude within layers": "magnitude@layer",
        "LAMP": "lamp",
        "SNIP": "snip",
        "Wanda": "wanda",
        "curvature of the features": DAMPED,
    }.items():
        yield Question(f"curvature of the loss over {label}", loss, Masks(run, other))
    for repair, label in {"": "without repair", SOLVED: "with the repair"}.items():
        mixed = Masks(steps, DAMPED + repair, MIXTURE)
        yield Question(f"a mixture adds, {label}", mixed, mixed._replace(images=ALONE))
    mixed = Masks(steps, DAMPED + SOLVED, MIXTURE)
    for label, other in {
        "their shuffle in each layer": SHUFFLED,
        "magnitude over all layers": "magnitude",
        "magnitude within layers": "magnitude@layer",
    }.items():
        others = mixed._replace(method=other + SOLVED)
        yield Question(f"repaired masks on a mixture over {label}", mixed, others)
    for images in (ALONE, MIXTURE):
        plain = Masks(steps, DAMPED, images)
        before = plain._replace(run=f"{steps}-undamped")
        yield Question(f"no repair, on {images}", plain)
        yield Question(f"damping adds, on {images}", plain, before)
        for label, repair in {"moments": MOMENTS, "the repair": SOLVED}.items():
            repaired = plain._replace(method=DAMPED + repair)
            yield Question(f"with {label}, on {images}", repaired)
            yield Question(f"{label} adds, on {images}", repaired, plain)
            undamped = repaired._replace(run=before.run)
            yield Question(f"damping adds, with {label}, on {images}", repaired, undamped)
            joint = plain._replace(method=JOINT + repair)
            yield Question(f"a joint score adds, with {label}, on {images}", joint, repaired)


class Results:
    """Tables of stored runs, each read once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.table = lru_cache(maxsize=None)(self._table)

    def _table(self, run: str, name: str) -> pd.DataFrame:
        return read_table(self.root / run / f"{name}.csv")

    def rows(self, masks: Masks) -> pd.DataFrame:
        """One row a mask and task."""
        table = self.table(masks.run, "accuracies")
        own, found = masks.tasks == "own", table[table.scorer == masks.method]
        sources = [name for name in table.source.unique() if name != "none"]
        if masks.images in (ALONE, MIXTURE):
            sources = [name for name in sources if ("+" in name) == (masks.images == MIXTURE)]
        elif masks.images:
            sources = [masks.images]
        found = judged_rows(found, sources, own=own)
        # A mixture goes by the task that it is around, beside masks of that task alone.
        found = found.assign(source=found.source.str.split("+").str[0])
        return found if masks.tasks in ("own", "held-out") else found[found.target == masks.tasks]

    def dense(self, run: str) -> pd.DataFrame:
        """The dense encoder's rows of a run."""
        return dense_rows(self.table(run, "accuracies"))

    def answer(self, question: Question) -> dict[float, Estimate]:
        """An estimate at each sparsity; of the difference, where there are others."""
        rows = self.rows(question.masks)
        others = None if question.others is None else self.rows(question.others)
        if others is not None and others.empty:
            return {}
        found = {}
        for sparsity, these in rows.groupby("sparsity"):
            if others is not None:
                these = paired(these, others[others.sparsity == sparsity])
            found[float(str(sparsity))] = estimate(these, self.dense(question.masks.run))
        return found


def _row(
    claim: str, encoder: str, found: Estimate, verdict: str, **place: object
) -> dict[str, object]:
    low, high = found.interval()
    known = {"claim": claim, "encoder": ENCODERS[encoder], **place}
    return {
        **known,
        "value": found.value,
        "low": low,
        "high": high,
        "over": found.over,
        "verdict": verdict,
    }


def _of_masks(results: Results, encoder: str) -> Iterator[dict[str, object]]:
    for question in questions(encoder):
        masks, others = question.masks, question.others
        try:
            found = results.answer(question)
        except FileNotFoundError:  # not stored
            continue
        said = verdicts([*found.values()], KEPT if others is None else 0.0)
        place = masks._asdict()
        if others is not None:
            beside = {"against_run": others.run, "against": others.method}
            place |= {**beside, "against_images": others.images}
        for (sparsity, value), verdict in zip(found.items(), said, strict=True):
            yield _row(question.claim, encoder, value, verdict, sparsity=sparsity, **place)


def _of_fine_tuning(results: Results, encoder: str) -> Iterator[dict[str, object]]:
    """Gains at the rate that the source's validation part chooses, task by task."""
    run = f"adaptation/finetune_recovery-{encoder}"
    try:
        table, gains = results.table(run, "recovery"), results.table(run, "gains")
    except FileNotFoundError:
        return
    for chosen in chosen_on_validation(gains).itertuples():
        same = (table.start == chosen.start) & (table.learning_rate == chosen.learning_rate)
        rows = table[same & (table["head"] == "frozen") & (table.split == "test")]
        rows = rows[(rows.sparsity == chosen.sparsity) & (rows.penalty == chosen.penalty)]
        rows = rows.assign(source="", sign=rows.step.map({0: -1.0}).fillna(1.0))
        parts = {task: rows[rows.target == task] for task in rows.target.unique()}
        found = [estimate(part) for part in parts.values()]
        how = f"{chosen.start}, {chosen.penalty}"
        place = {"run": run, "method": how, "sparsity": chosen.sparsity}
        for task, value, verdict in zip(parts, found, verdicts(found, 0.0), strict=True):
            where = {**place, "tasks": task, "rate": chosen.learning_rate}
            yield _row("P2, fine-tuning adds", encoder, value, verdict, **where)


def judged(results: Results) -> pd.DataFrame:
    """One row a claim, encoder, sparsity and task; what is not stored is left out.

    Verdicts are corrected for the sparsities, or tasks, of one claim and encoder.
    """
    rows = [
        row
        for encoder in ENCODERS
        for part in (_of_masks, _of_fine_tuning)
        for row in part(results, encoder)
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def claims(table: pd.DataFrame, encoder: str) -> pd.DataFrame:
    """What :func:`judged` found on one encoder, one row a claim, one column a sparsity."""
    rows = table[(table.encoder == encoder) & ~table.claim.str.startswith("P2")]
    marks = {"holds": "✓", "reversed": "✗", "undecided": "?"}
    signs = rows.verdict.map(marks)
    texts = [f"{value:z.2f} {sign}" for value, sign in zip(rows.value, signs, strict=True)]
    columns = "at " + rows.sparsity.map("{:.0%}".format)
    wide = rows.assign(text=texts, at=columns).pivot(index="claim", columns="at", values="text")
    return wide.loc[rows.claim.unique()].reset_index().fillna("")
