"""What a model still knows: accuracy with intervals, and retention across tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pai_utils.data.mixtures import is_held_out
from pai_utils.heads import features
from pai_utils.support.common import NonFiniteError, check_names
from pai_utils.support.contract import check_labels
from pai_utils.support.sampling import Samples


@dataclass(frozen=True)
class Evaluation:
    """Accuracy and loss of a model on a data set."""

    accuracy: float
    loss: float  #: mean cross-entropy, in nats
    count: int
    interval: tuple[float, float]  #: 95 % Wilson interval of the accuracy
    correct: Tensor  #: [count] bool, in the order of the data

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> Evaluation:
        """Of logits ``[N, classes]`` and labels ``[N]``; errors as :func:`evaluate`."""
        from scipy.stats import binomtest

        logits, labels = logits.cpu(), labels.cpu()
        check_labels(labels, logits.shape[1])
        loss, count = float(F.cross_entropy(logits.double(), labels)), len(labels)
        if not np.isfinite(loss):
            raise NonFiniteError(
                f"the loss on {count} samples is {loss}: the logits are not finite"
            )
        correct = (logits.argmax(1) == labels).clone()  # no inference tensor
        right = int(correct.sum())
        bounds = binomtest(right, count).proportion_ci(0.95, method="wilson")
        return cls(right / count, loss, count, (float(bounds.low), float(bounds.high)), correct)

    def row(self, chance: float) -> dict[str, object]:
        """What a table of accuracies holds of it."""
        return {
            "accuracy": self.accuracy,
            "loss": self.loss,
            "count": self.count,
            "chance": chance,
            "correct": self.correct.numpy(),
        }


def evaluate(
    model: nn.Module, data: Samples, *, batch_size: int = 128, precision: str = "float32"
) -> Evaluation:
    """Accuracy and mean cross-entropy of ``model`` on all of ``data``, in evaluation mode.

    The ``precision`` of the forward's products is a key of `pai_utils.support.sampling.PRECISIONS`.

    Raises:
        ValueError: if the labels go beyond the model's classes, the loss is not finite, ``data``
            is empty, or the precision is unknown.

    Examples:
        >>> import torch
        >>> import pai_utils as pai
        >>> model = torch.nn.Flatten()  # takes the pixels for the logits
        >>> images = torch.eye(3).view(3, 3, 1, 1)
        >>> data = torch.utils.data.TensorDataset(images, torch.tensor([0, 1, 1]))
        >>> found = pai.evaluate(model, data)
        >>> found.correct
        tensor([ True,  True, False])
        >>> f"{found.accuracy:.3f} of {found.count}, loss {found.loss:.3f}"
        '0.667 of 3, loss 0.885'
    """
    return Evaluation.of(*features(model, data, batch_size=batch_size, precision=precision))


def evaluate_heads(
    backbone: nn.Module,
    heads: Mapping[str, nn.Linear],
    data: Mapping[str, Samples],
    *,
    batch_size: int = 128,
    precision: str = "float32",
) -> dict[str, Evaluation]:
    """Evaluate one encoder on several tasks, each with its own frozen head, as :func:`evaluate`.

    Raises:
        ValueError: as :func:`evaluate`, or if a task has no head.
    """
    check_names("head of task", data, heads)
    results = {}
    for name, samples in data.items():
        values, labels = features(backbone, samples, batch_size=batch_size, precision=precision)
        with torch.inference_mode():
            results[name] = Evaluation.of(heads[name](values.to(heads[name].weight)), labels)
    return results


def retention(accuracy: float, dense: float, chance: float) -> float:
    """Fraction of the dense accuracy above chance that is kept: 1 all of it, 0 none.

    Not a number when the dense model is not above chance: there is nothing to retain.

    Examples:
        >>> from pai_utils.evaluation import retention
        >>> retention(0.5, dense=0.9, chance=0.1)
        0.5
        >>> retention(0.1, dense=0.1, chance=0.1)
        nan
    """
    return (accuracy - chance) / (dense - chance) if dense > chance else float("nan")


@dataclass(frozen=True)
class Estimate:
    """A mean over masks, tasks and test images, and how far it may be from the truth.

    Its variance has two parts: by test images, and by what was repeated, seeds or sources. Each
    part takes the quantile of its own degrees of freedom (Banerjee 1960, "Approximate confidence
    interval for linear functions of means"), which holds its level with three repetitions too.
    """

    value: float
    images: float  #: variance by test images, those of the dense encoder among them
    repeats: float  #: variance by repetitions, less a part that is that of images
    degrees: int  #: of freedom of the latter; 0 where nothing was repeated
    over: str  #: what the interval is about: ``"images"``, or these ``"… and seeds"`` or sources

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The two-sided confidence interval of a level."""
        from scipy.stats import norm, t

        tail = (1 - level) / 2
        repeats = float(t.isf(tail, self.degrees)) ** 2 * self.repeats if self.degrees else 0.0
        half = math.sqrt(float(norm.isf(tail)) ** 2 * self.images + repeats)
        return self.value - half, self.value + half


def estimate(rows: pd.DataFrame, dense: pd.DataFrame | None = None) -> Estimate:
    """Mean retention over pairs of source and target, or mean accuracy without ``dense``.

    A variance over images clustered by image and by repetition (Cameron, Gelbach and Miller 2011,
    "Robust inference with multiway clustering"): an image counts once, however many masks and the
    dense encoder it was shown to. Repetitions are the sources where there are at least three, and
    the mean is one over sources like these; else the seeds, and it is one of these sources. With
    two repetitions in all, the interval is about the images alone, and says so.
    Retention is a ratio, and both its sides vary.

    Args:
        rows: ``source, target, seed, correct`` (``[items]`` bool), one row a mask and target, and
            perhaps a ``sign``: -1 in rows that are subtracted, as :func:`paired` gives them.
        dense: ``correct`` and ``chance`` of the dense encoder, by target.

    Examples:
        >>> import numpy as np, pandas as pd
        >>> from pai_utils.evaluation import estimate
        >>> right = np.arange(100)[:, None] % 10 < [6, 5, 7]
        >>> rows = pd.DataFrame({"source": "a", "target": "b", "seed": range(3)})
        >>> found = estimate(rows.assign(correct=[*right.T]))
        >>> low, high = found.interval()
        >>> f"{found.value:.2f} ({low:.2f} to {high:.2f}) over {found.over}"
        '0.60 (0.34 to 0.86) over images and seeds'
    """
    rows = rows.assign(sign=rows.get("sign", 1.0)).reset_index(drop=True)
    sources = rows.source.nunique()
    by_source = rows.groupby("source", sort=False)
    same = rows.groupby(["source", "target", "sign"]).seed.transform("size")
    targets = by_source.target.transform("nunique")
    weights = (rows.sign / (sources * targets * same)).to_numpy()
    if sources >= 3:
        over, codes = "images and sources", by_source.ngroup().to_numpy()
        strata = [np.arange(sources)]
    else:
        over, codes = "images and seeds", rows.groupby(["source", "seed"]).ngroup().to_numpy()
        strata = [np.unique(codes[places]) for places in by_source.indices.values()]
    effects, images, shared = np.zeros(codes.max() + 1), 0.0, 0.0
    for target, places in rows.groupby("target").indices.items():
        right = np.stack([*rows.correct.iloc[places]]).astype(float)
        kept, items = right.mean(1), right.shape[1]
        influence = right - kept[:, None]
        if dense is not None:
            known: Any = dense.loc[cast(str, target)]
            reference = known.correct.astype(float)
            above = max(reference.mean() - known.chance, 0) or math.nan
            kept = (kept - known.chance) / above
            influence = (influence - kept[:, None] * (reference - reference.mean())) / above
        member = np.equal.outer(np.arange(len(effects)), codes[places]) * weights[places]
        effects += member @ kept
        each = member @ influence / items  # what an image adds to a repetition
        corrected = items / max(items - 1, 1)
        images += corrected * (each.sum(0) ** 2).sum()
        for group in strata:
            shared += corrected * _spread(each[np.intersect1d(group, codes[places])])
    repeats = sum(_spread(effects[group]) for group in strata)
    degrees = sum(len(group) - 1 for group in strata)
    # Both parts hold the noise of an image in one repetition. Without it here, three repetitions
    # cover too little, since its estimate errs too; with all, too much (`benchmarks.coverage`).
    beyond = np.maximum(0.0, repeats - shared / 2)
    if degrees < 2:  # of two repetitions nobody can tell how far they vary
        over, degrees, beyond = "images", 0, 0.0
    return Estimate(float(effects.sum()), float(images), float(beyond), degrees, over)


def _spread(parts: NDArray[np.float64]) -> float:
    """Variance of the sum of ``[n, ...]`` equally distributed parts; none of a single one."""
    count = len(parts)
    return count / (count - 1) * float(((parts - parts.mean(0)) ** 2).sum()) if count > 1 else 0.0


def paired(rows: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    """Rows whose :func:`estimate` is the difference of two methods on the same pairs of tasks.

    Every row meets the other method's of its source, target and seed, or the only one there is.

    Raises:
        ValueError: a row has no counterpart.
    """
    keys = ["source", "target", "seed"]
    wanted = rows[keys].reset_index(drop=True)
    exact = wanted.merge(others[[*keys, "correct"]], "left", keys, validate="m:1").correct
    single = others.drop_duplicates(keys[:2], keep=False)[[*keys[:2], "correct"]]
    found = exact.fillna(wanted.merge(single, "left", on=keys[:2]).correct)
    if found.isna().any():
        key = next(wanted[found.isna()].itertuples(index=False, name=None))
        raise ValueError(f"nothing to compare with source, target and seed {key}")
    less = rows.assign(sign=-1.0, correct=found.to_numpy())
    return pd.concat([rows.assign(sign=1.0), less])


def verdicts(estimates: Sequence[Estimate], criterion: float) -> list[str]:
    """What the estimates of one claim say of a criterion, at 5 % for all of them together.

    ``"holds"`` where an interval lies beyond it, ``"reversed"`` where it falls short, else
    ``"undecided"``. The level is of 5 % over the number of estimates, or over those that are left
    where wider intervals decide the others (Holm 1979, "A simple sequentially rejective multiple
    test procedure").
    """
    said = list[str]()
    for left in range(len(estimates), 0, -1):
        bounds = [each.interval(1 - 0.05 / left) for each in estimates]
        said = [
            "holds" if low > criterion else "reversed" if high < criterion else "undecided"
            for low, high in bounds
        ]
        if said.count("undecided") == left:
            break
    return said


def summarise_retention(table: pd.DataFrame) -> pd.DataFrame:
    """Retention with its 95 % interval (:func:`estimate`), for each source and target.

    The table is as from :func:`~pai_utils.studies.suite.sweep`. One row a source, target, scorer
    and sparsity, with ``accuracy, retention, low, high, dense_accuracy, chance, count, seeds``.
    """
    dense = dense_rows(table)
    keys = ["source", "target", "scorer", "sparsity"]
    known = dense.rename(columns={"accuracy": "dense_accuracy"})[["dense_accuracy", "chance"]]
    columns = ["accuracy", "retention", "low", "high", "dense_accuracy", "chance", "count", "seeds"]
    return _summaries(table, keys, dense).join(known, on="target")[[*keys, *columns]]


def held_out_retention(
    table: pd.DataFrame, sources: Sequence[str], *, own: bool = False
) -> pd.DataFrame:
    """Retention averaged over the tasks that a mask was *not* computed on; with ``own`` the others.

    Arguments are as of :func:`judged_rows`. One row a source, scorer and sparsity, with
    ``retention, low, high, accuracy, tasks, count, seeds``; ``count`` is the number of test items
    over all those tasks.
    """
    keys = ["source", "scorer", "sparsity"]
    return _summaries(judged_rows(table, sources, own=own), keys, dense_rows(table))


def dense_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The dense encoder's rows of a :func:`~pai_utils.studies.suite.sweep`, by target."""
    return table.loc[table.scorer == "dense"].set_index("target")


def judged_rows(table: pd.DataFrame, sources: Sequence[str], *, own: bool = False) -> pd.DataFrame:
    """The rows of every source's held-out tasks, or with ``own`` those of its own.

    The table is as from :func:`~pai_utils.studies.suite.sweep`. A mask that looked at no data
    (source ``"none"``) counts beside every source, on that source's held-out tasks.
    """
    parts = list[pd.DataFrame]()
    for source in sources:
        seen = table[table.source.isin([source, "none"])]
        held_out = np.array([is_held_out(target, source) for target in seen.target], bool)
        parts.append(seen[held_out != own].assign(source=source))
    return pd.concat(parts, ignore_index=True)


def _summaries(rows: pd.DataFrame, keys: list[str], dense: pd.DataFrame) -> pd.DataFrame:
    """For each group of rows with the same keys, means over its targets."""
    found = []
    for _, group in rows.groupby(keys, sort=False):
        kept = estimate(group, dense)
        low, high = kept.interval()
        by_target = group.groupby("target", sort=False)
        means = {
            "retention": kept.value,
            "low": low,
            "high": high,
            "accuracy": by_target.accuracy.mean().mean(),
            "tasks": len(by_target),
            "count": by_target["count"].first().sum(),
            "seeds": group.seed.nunique(),
        }
        found.append(group.iloc[0][keys].to_dict() | means)
    return pd.DataFrame(found)
