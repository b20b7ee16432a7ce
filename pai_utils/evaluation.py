"""What a model still knows: accuracy with intervals, and retention across tasks."""

from __future__ import annotations

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


def retention_replicates(
    pruned: Sequence[NDArray[np.bool_]],
    dense: Sequence[NDArray[np.bool_]],
    chance: Sequence[float],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Bootstrap replicates, over test items and seeds, of the retention averaged over tasks.

    For each task, ``pruned [seeds, items]`` and ``dense [items]`` say whether a model was right. An
    item is drawn for all seeds and for the dense model together, since it is the same one; a seed
    for all tasks together, since it stands for one mask. Replicates ``[resamples]`` are not a
    number where a dense model is not above chance.
    """
    random = np.random.default_rng(seed)
    seeds = len(pruned[0])
    chosen = random.integers(seeds, size=(resamples, seeds))
    total = np.zeros(resamples)
    for right, reference, floor in zip(pruned, dense, chance, strict=True):
        items = len(reference)
        counts = random.multinomial(items, np.full(items, 1 / items), size=resamples)
        accuracy = np.take_along_axis(counts @ right.T / items, chosen, axis=1).mean(1)
        above = counts @ reference / items - floor
        total += (accuracy - floor) / np.where(above > 0, above, np.nan)
    return np.asarray(total / len(pruned))


def gain_replicates(
    before: Sequence[NDArray[Any]],
    after: Sequence[NDArray[Any]],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Bootstrap replicates ``[resamples]``, over items, of a gain in accuracy averaged over tasks.

    For each task, ``before [items]`` and ``after [items]`` say whether the model was right, or the
    share of several models that were.
    """
    random = np.random.default_rng(seed)
    total = np.zeros(resamples)
    for first, second in zip(before, after, strict=True):
        items = len(first)
        counts = random.multinomial(items, np.full(items, 1 / items), size=resamples)
        total += counts @ (second.astype(float) - first.astype(float)) / items
    # Shares of several models are no exact sums: a gain of nothing would be one above zero.
    return np.asarray(np.round(total / len(before), 12))


def interval(replicates: NDArray[np.float64], level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of bootstrap replicates; undefined ones are left out.

    Its bounds are not a number where more than a fraction ``1 - level`` is undefined.
    """
    defined = replicates[~np.isnan(replicates)]
    if len(defined) < level * len(replicates):
        return float("nan"), float("nan")
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def summarise_retention(table: pd.DataFrame) -> pd.DataFrame:
    """Retention with its bootstrap interval over items and seeds, for each source and target.

    The table is as from :func:`~pai_utils.studies.suite.sweep`. One row a source, target, scorer
    and sparsity, with ``accuracy, retention, low, high, dense_accuracy, chance, count, seeds``.
    """
    dense = table[table.scorer == "dense"].set_index("target")
    keys = ["source", "target", "scorer", "sparsity"]
    rows = []
    for key, group in table.groupby(keys, sort=False):
        place = dict(zip(keys, cast(tuple[Any, ...], key), strict=True))
        known = dense.loc[place["target"]]
        place |= {"dense_accuracy": known.accuracy, "chance": known.chance}
        rows.append(place | _mean_retention(group, dense))
    columns = ["accuracy", "retention", "low", "high", "dense_accuracy", "chance", "count", "seeds"]
    return pd.DataFrame(rows, columns=[*keys, *columns])


def held_out_retention(
    table: pd.DataFrame, sources: Sequence[str], *, own: bool = False
) -> pd.DataFrame:
    """Retention averaged over the tasks that a mask was *not* computed on; with ``own`` the others.

    The table is as from :func:`~pai_utils.studies.suite.sweep`. A mask that looked at no data
    (source ``"none"``) counts beside every source, on that source's held-out tasks.

    Returns:
        One row a source, scorer and sparsity, with ``retention, low, high, accuracy, tasks,
        count, seeds``; ``count`` is the number of test items over all those tasks.
    """
    dense = table[table.scorer == "dense"].set_index("target")
    rows = []
    for source in sources:
        seen = table[table.source.isin([source, "none"])]
        seen = seen[[is_held_out(target, source) != own for target in seen.target]]
        for (scorer, sparsity), group in seen.groupby(["scorer", "sparsity"], sort=False):
            mask = {"source": source, "scorer": scorer, "sparsity": sparsity}
            rows.append(mask | _mean_retention(group, dense))
    return pd.DataFrame(rows)


def _mean_retention(group: pd.DataFrame, dense: pd.DataFrame) -> dict[str, Any]:
    """Of one scorer and sparsity, averaged over the targets of its rows."""
    by_target = group.groupby("target", sort=False).correct
    correct = {target: np.stack(list(seeds)) for target, seeds in by_target}
    reference = dense.loc[list(correct)]
    low, high = interval(
        retention_replicates([*correct.values()], [*reference.correct], [*reference.chance])
    )
    accuracies = [float(right.mean()) for right in correct.values()]
    known = zip(accuracies, reference.accuracy, reference.chance, strict=True)
    return {
        "retention": float(np.mean([retention(*each) for each in known])),
        "low": low,
        "high": high,
        "accuracy": float(np.mean(accuracies)),
        "tasks": len(correct),
        "count": sum(right.shape[1] for right in correct.values()),
        "seeds": len(next(iter(correct.values()))),
    }
