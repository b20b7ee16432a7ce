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
from pai_utils.data.tasks import Task
from pai_utils.heads import PROTOCOLS, dense_features, features, fit_head
from pai_utils.models.encoders import Backbone
from pai_utils.support.common import NonFiniteError, check_names, device_of, undisturbed
from pai_utils.support.sampling import Samples, batches, check_labels, fitting_batches, in_precision


@dataclass(frozen=True)
class Evaluation:
    """Accuracy and loss of a model on a data set."""

    accuracy: float
    loss: float  #: mean cross-entropy, in nats
    count: int
    interval: tuple[float, float]  #: 95 % Wilson interval of the accuracy
    correct: Tensor  #: [count] bool, in the order of the data

    def row(self, chance: float) -> dict[str, object]:
        """What a table of accuracies holds of it: ``accuracy, loss, count, chance, correct``."""
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

    Args:
        model: from images to logits.
        data: labelled images.
        batch_size: images a forward.
        precision: of the forward's products, a key of `pai_utils.support.sampling.PRECISIONS`.

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
    device = device_of(model)

    def compute(size: int) -> list[tuple[Tensor, Tensor]]:
        return [(model(x), y) for x, y in batches(data, size, device)]

    with undisturbed(model), torch.inference_mode(), in_precision(device, precision):
        pairs = fitting_batches(compute, batch_size)
        logits, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        return _evaluation(logits, labels)


def evaluate_heads(
    backbone: nn.Module,
    heads: Mapping[str, nn.Linear],
    data: Mapping[str, Samples],
    *,
    batch_size: int = 128,
    precision: str = "float32",
) -> dict[str, Evaluation]:
    """Evaluate one encoder on several tasks, each with its own frozen head.

    Args:
        backbone: the encoder.
        heads: a head for each task.
        data: labelled images by task.
        batch_size: images a forward.
        precision: of the encoder's products, as in :func:`evaluate`.

    Raises:
        ValueError: as :func:`evaluate`, or if a task has no head.
    """
    check_names("head of task", data, heads)
    results = {}
    for name, samples in data.items():
        values, labels = features(backbone, samples, batch_size=batch_size, precision=precision)
        with torch.inference_mode():
            head = heads[name]
            logits = head(values.to(head.weight)).cpu()
        results[name] = _evaluation(logits, labels)
    return results


def protocol_gap(
    backbone: Backbone, tasks: Mapping[str, Task], *, batch_size: int = 128
) -> pd.DataFrame:
    """Test accuracy of heads fitted on ``train`` and, with a leak, on ``test`` itself.

    Args:
        backbone: the dense encoder.
        tasks: the tasks, by name.
        batch_size: images a forward.

    Returns:
        One row a task and protocol, with ``task, protocol, accuracy``, its 95 % interval ``low``
        and ``high``, ``count``, and ``gain``, the accuracy over that of ``"clean"``.
    """
    rows = []
    for name, task in tasks.items():
        values, labels = dense_features(backbone, task.test, batch_size=batch_size)
        clean = float("nan")
        for protocol in PROTOCOLS:
            head = fit_head(backbone, task, protocol=protocol, batch_size=batch_size).cpu()
            with torch.inference_mode():
                found = _evaluation(head(values), labels)
            if protocol == "clean":
                clean = found.accuracy
            low, high = found.interval
            rows.append(
                {
                    "task": name,
                    "protocol": protocol,
                    "accuracy": found.accuracy,
                    "low": low,
                    "high": high,
                    "count": found.count,
                    "gain": found.accuracy - clean,
                }
            )
    return pd.DataFrame(rows)


def retention(accuracy: float, dense: float, chance: float) -> float:
    """Fraction of the dense accuracy above chance that is kept: 1 all of it, 0 none.

    Not a number when the dense model is not above chance: there is nothing to retain.

    Args:
        accuracy: of the pruned model.
        dense: that of the dense one.
        chance: that of a constant guess.

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

    An item is drawn for all seeds and for the dense model together, since they saw the same one;
    a seed for all tasks together, since it stands for one mask.

    Args:
        pruned: for each task ``[seeds, items]``, whether the pruned model was right.
        dense: for each task ``[items]``, whether the dense model was right.
        chance: for each task the accuracy of a constant guess.
        resamples: number of replicates.
        seed: seed of the bootstrap.

    Returns:
        ``[resamples]``; not a number where a dense model is not above chance.
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
    """Bootstrap replicates, over test items, of a gain in accuracy averaged over tasks.

    Args:
        before: for each task ``[items]``, whether the model was right before, or the share of
            several models that were.
        after: the same after, on the same items.
        resamples: number of replicates.
        seed: seed of the bootstrap.

    Returns:
        ``[resamples]``, in accuracy.
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
    """Percentile interval of bootstrap replicates.

    Args:
        replicates: ``[resamples]``; undefined ones (not a number) are left out.
        level: coverage of the interval.

    Returns:
        Its bounds; not a number where more than a fraction ``1 - level`` is undefined.

    Examples:
        >>> import numpy as np
        >>> from pai_utils.evaluation import interval
        >>> interval(np.arange(101) / 100, level=0.5)
        (0.25, 0.75)
    """
    defined = replicates[~np.isnan(replicates)]
    if len(defined) < level * len(replicates):
        return float("nan"), float("nan")
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def summarise_retention(table: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """Means and bootstrap intervals over items and seeds of a :func:`retention_sweep`.

    Returns:
        One row a source, target, scorer and sparsity, with ``accuracy, retention, low, high,
        dense_accuracy, chance, count, seeds``; ``low`` and ``high`` bound the retention.
    """
    dense = _dense_rows(table)
    summary = []
    keys = ["source", "target", "scorer", "sparsity"]
    for key, group in table.groupby(keys, sort=False):
        key = cast(tuple[str, str, str, float], key)
        reference = dense[key[1]]
        correct = np.stack(list(group.correct))
        replicates = retention_replicates([correct], [reference["correct"]], [reference["chance"]])
        low, high = interval(replicates, level)
        accuracy = float(correct.mean())
        summary.append(
            dict(zip(keys, key, strict=True))
            | {
                "accuracy": accuracy,
                "retention": retention(accuracy, reference["accuracy"], reference["chance"]),
                "low": low,
                "high": high,
                "dense_accuracy": reference["accuracy"],
                "chance": reference["chance"],
                "count": correct.shape[1],
                "seeds": correct.shape[0],
            }
        )
    return pd.DataFrame(summary)


def held_out_retention(
    table: pd.DataFrame, sources: Sequence[str], *, level: float = 0.95, own: bool = False
) -> pd.DataFrame:
    """Retention averaged over the tasks that a mask was *not* computed on.

    With ``own``, retention on the task that it was computed on.

    A mask that looked at no data (source ``"none"``) counts beside every source, on that source's
    held-out tasks.

    Returns:
        One row a source, scorer and sparsity, with ``retention, low, high, accuracy, tasks,
        count, seeds``; ``count`` is the number of test items over all held-out tasks.
    """
    dense = _dense_rows(table)
    summary = []
    for source in sources:
        seen = table[table.source.isin([source, "none"])]
        seen = seen[[is_held_out(target, source) != own for target in seen.target]]
        for (scorer, sparsity), group in seen.groupby(["scorer", "sparsity"], sort=False):
            targets = list(dict.fromkeys(group.target))
            correct = [np.stack(list(group[group.target == t].correct)) for t in targets]
            replicates = retention_replicates(
                correct,
                [dense[t]["correct"] for t in targets],
                [dense[t]["chance"] for t in targets],
            )
            low, high = interval(replicates, level)
            each = [
                retention(float(right.mean()), dense[t]["accuracy"], dense[t]["chance"])
                for t, right in zip(targets, correct, strict=True)
            ]
            summary.append(
                {
                    "source": source,
                    "scorer": scorer,
                    "sparsity": sparsity,
                    "retention": float(np.mean(each)),
                    "low": low,
                    "high": high,
                    "accuracy": float(np.mean([right.mean() for right in correct])),
                    "tasks": len(targets),
                    "count": sum(right.shape[1] for right in correct),
                    "seeds": correct[0].shape[0],
                }
            )
    return pd.DataFrame(summary)


def retention_verdict(
    held_out: pd.DataFrame, scorer: str, *, threshold: float = 0.9
) -> pd.DataFrame:
    """Whether held-out tasks keep a fraction ``threshold`` of their accuracy above chance.

    Args:
        held_out: as from :func:`held_out_retention`.
        scorer: the one judged.
        threshold: the retention asked for.

    Returns:
        One row a sparsity, with ``sparsity, retention, low, high`` (means over sources),
        ``worst`` (the lowest source), and ``verdict``: ``"kept"`` where the mean reaches the
        threshold, ``"lost"`` where even its upper bound does not, ``"undecided"`` between.
    """
    rows = held_out[held_out.scorer == scorer].groupby("sparsity")
    table = rows[["retention", "low", "high"]].mean()
    table["worst"] = rows.retention.min()
    table["verdict"] = np.select(
        [table.retention >= threshold, table.high < threshold], ["kept", "lost"], "undecided"
    )
    return table.reset_index()


def sparsity_kept(summary: pd.DataFrame, *, threshold: float = 0.9) -> pd.DataFrame:
    """The sparsity up to which retention stays at ``threshold``, for each pair of tasks.

    Found on the straight lines between the sparsities measured, from a retention of 1 at sparsity
    0, at the first crossing.

    Args:
        summary: as from :func:`summarise_retention`.
        threshold: the retention asked for, below 1.

    Returns:
        One row a source, target and scorer, with ``sparsity``, and ``low`` and ``high``, the same
        on the lower and upper bounds of the retention; the highest sparsity measured where there is
        no crossing, and then ``crossed`` is false.

    Examples:
        >>> import pandas as pd
        >>> from pai_utils.evaluation import sparsity_kept
        >>> summary = pd.DataFrame({"sparsity": [0.25, 0.5], "retention": [1.0, 0.75]})
        >>> summary = summary.assign(source="digits", target="glyphs", scorer="snip")
        >>> summary = summary.assign(low=summary.retention, high=summary.retention)
        >>> sparsity_kept(summary, threshold=0.875)[["target", "sparsity", "crossed"]]
           target  sparsity  crossed
        0  glyphs     0.375     True
    """
    rows = []
    pruned = summary[summary.scorer != "dense"]
    for key, group in pruned.groupby(["source", "target", "scorer"], sort=False):
        curve = group.sort_values("sparsity")
        at = np.array([0.0, *curve.sparsity])
        found = {
            name: _first_crossing(at, np.array([1.0, *curve[column]]), threshold)
            for name, column in {"sparsity": "retention", "low": "low", "high": "high"}.items()
        }
        crossed = bool((curve.retention < threshold).any())
        key = cast(tuple[str, str, str], key)
        rows.append(
            {"source": key[0], "target": key[1], "scorer": key[2], **found, "crossed": crossed}
        )
    return pd.DataFrame(rows)


def _first_crossing(at: NDArray[Any], values: NDArray[Any], threshold: float) -> float:
    below = np.flatnonzero(values < threshold)
    if len(below) == 0:
        return float(at[-1])
    i = int(below[0])
    share = (values[i - 1] - threshold) / (values[i - 1] - values[i])
    return float(at[i - 1] + share * (at[i] - at[i - 1]))


def rank_donors(summary: pd.DataFrame, scorer: str, sparsity: float) -> pd.DataFrame:
    """Which source's masks serve the others best: retention over that of all sources, by target.

    Every source has other held-out tasks, some of them harder. So each held-out retention is
    compared with the mean, on the same target, over the sources that held it out.

    Args:
        summary: as from :func:`summarise_retention`.
        scorer: the one looked at.
        sparsity: the one looked at.

    Returns:
        One row a source, the best first, with ``source, advantage, low, high, targets``; the
        bounds are the standard error over targets times ±1.96, and not a number for a single
        target.
    """
    rows = summary[(summary.scorer == scorer) & (summary.sparsity == sparsity)]
    rows = rows[rows.source != "none"]
    rows = rows[[is_held_out(t, s) for t, s in zip(rows.target, rows.source, strict=True)]]
    advantage = rows.retention - rows.groupby("target").retention.transform("mean")
    grouped = rows.assign(advantage=advantage).groupby("source").advantage
    table = pd.DataFrame({"advantage": grouped.mean(), "targets": grouped.count()})
    error = 1.96 * grouped.sem()
    table["low"], table["high"] = table.advantage - error, table.advantage + error
    return table.sort_values("advantage", ascending=False).reset_index()[
        ["source", "advantage", "low", "high", "targets"]
    ]


def _dense_rows(table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """The dense encoder's row of each target."""
    rows = table[table.scorer == "dense"].to_dict("records")
    return {str(row["target"]): {str(k): v for k, v in row.items()} for row in rows}


def _evaluation(logits: Tensor, labels: Tensor) -> Evaluation:
    from scipy.stats import binomtest

    logits, labels = logits.cpu(), labels.cpu()
    check_labels(labels, logits.shape[1])
    loss = float(F.cross_entropy(logits.double(), labels))
    if not np.isfinite(loss):
        raise NonFiniteError(
            f"the loss on {len(labels)} samples is {loss}: the logits are not finite"
        )
    correct = logits.argmax(1) == labels
    right = int(correct.sum())
    bounds = binomtest(right, len(labels)).proportion_ci(0.95, method="wilson")
    return Evaluation(
        accuracy=right / len(labels),
        loss=loss,
        count=len(labels),
        interval=(float(bounds.low), float(bounds.high)),
        correct=correct.clone(),
    )
