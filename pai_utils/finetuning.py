"""Masked fine-tuning: what training on the source brings back."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pai_utils.backbones import Classifier
from pai_utils.curvature.diagonals import output_diagonal
from pai_utils.evaluation import evaluate_heads, gain_replicates, interval, retention
from pai_utils.execution import (
    NonFiniteError,
    Samples,
    batches,
    check_labels,
    device_of,
    logger,
    paired,
    progress,
    unknown_name,
)
from pai_utils.heads import fit_head
from pai_utils.masks import Mask
from pai_utils.tasks import Task

_SETTINGS = ("start", "sparsity", "penalty", "learning_rate")  # of a run, as columns


@dataclass(frozen=True)
class Penalty:
    """A quadratic pull of trained parameters to an anchor: ½ λ Σ c_i (w_i − a_i)².

    With c the diagonal of a curvature this is elastic weight consolidation (Kirkpatrick et al.
    2017, "Overcoming catastrophic forgetting in neural networks"): of the feature curvature of
    :func:`~pai_utils.curvature.diagonals.output_diagonal` it bounds, to second order, how far the
    features move. Without c it is L2-SP (Li et al. 2018, "Explicit inductive bias for transfer
    learning with convolutional networks").
    """

    anchor: Mapping[str, Tensor]
    """a, by parameter name; parameters without an entry are free."""
    strength: float
    """λ."""
    curvature: Mapping[str, Tensor] | None = None
    """c ≥ 0, by parameter name; ``None`` for 1 everywhere."""

    def check(self, model: nn.Module) -> None:
        """Refuse a penalty that does not fit.

        Raises:
            ValueError: for a strength that is negative or not finite, an anchor or curvature of an
                unknown parameter or another shape, or a negative or non-finite curvature.
        """
        if not 0 <= self.strength < math.inf:
            raise ValueError(f"strength={self.strength} must be a finite number, not negative")
        parameters = dict(model.named_parameters())
        for kind, tensors in (("anchor", self.anchor), ("curvature", self.curvature or {})):
            for name, tensor in tensors.items():
                if name not in parameters:
                    raise unknown_name(f"parameter of the penalty's {kind}", name, parameters)
                if tensor.shape != parameters[name].shape:
                    raise ValueError(
                        f"the penalty's {kind} of {name!r} has shape {list(tensor.shape)}, the "
                        f"parameter {list(parameters[name].shape)}"
                    )
                if kind == "curvature" and not bool((tensor >= 0).all() & tensor.isfinite().all()):
                    raise ValueError(
                        f"the penalty's curvature of {name!r} must be finite and not negative"
                    )
        if self.curvature is not None and (missing := set(self.anchor) - set(self.curvature)):
            raise ValueError(f"the penalty has no curvature for {min(missing)!r}")

    def pull_(self, parameters: Mapping[str, nn.Parameter], learning_rate: float) -> None:
        """The proximal step: where w and the penalty balance, hence stable at any strength."""
        for name, anchor in self.anchor.items():
            w, a = parameters[name], anchor.to(parameters[name])
            step = learning_rate * self.strength
            share = torch.as_tensor(step if self.curvature is None else step * self.curvature[name])
            w.lerp_(a, (share / (1 + share)).to(w))


def finetune(
    model: nn.Module,
    data: Samples,
    mask: Mask | None = None,
    *,
    steps: int = 100,
    learning_rate: float = 1e-4,
    batch_size: int = 64,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    seed: int = 0,
    penalty: Penalty | None = None,
    on_step: Callable[[int], None] | None = None,
) -> list[float]:
    """Train ``model`` in place by SGD on the mean cross-entropy; pruned weights stay exactly zero.

    The model is kept in evaluation mode (frozen BatchNorm statistics, no dropout), since
    re-estimated statistics on one task destroy the others. Parameters that do not require a
    gradient, such as a :class:`~pai_utils.backbones.Classifier`'s head, stay as they are.

    Args:
        model: images to logits.
        data: labelled samples of the source task, drawn in seeded random order without
            replacement, epoch after epoch; the last batch of an epoch may be smaller.
        mask: the pruned model's mask; ``None`` trains densely.
        steps: number of updates.
        learning_rate: of SGD, constant.
        batch_size: samples an update (not changed when memory runs out: it is part of the result).
        momentum: of SGD.
        weight_decay: of SGD.
        seed: seed of the order of samples.
        penalty: a quadratic pull to an anchor, as a proximal step after each update; pruned weights
            stay zero.
        on_step: called with the number of updates made, before the first and after each.

    Returns:
        The loss of each update's batch, in nats.

    Raises:
        ValueError: for settings outside their range, a mask or penalty of another architecture, or
            labels beyond the model's classes.
        FloatingPointError: at a non-finite loss or update, naming step and learning rate. The
            model keeps the last weights whose loss was finite (those given, at step 0).
    """
    if steps < 0:
        raise ValueError(f"steps={steps} must not be negative")
    for name, value in {"learning_rate": learning_rate, "batch_size": batch_size}.items():
        if value <= 0:
            raise ValueError(f"{name}={value} must be positive")
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model requires a gradient; nothing to fine-tune")
    if mask is not None:
        mask.apply_(model)
    if penalty is not None:
        penalty.check(model)
    device = device_of(model)
    removed = _removed(model, mask)
    parameters = dict(model.named_parameters())
    optimiser = torch.optim.SGD(
        trained, lr=learning_rate, momentum=momentum, weight_decay=weight_decay
    )
    modes = {module: module.training for module in model.modules()}
    model.eval()
    sound = [p.detach().clone() for p in trained]
    losses: list[float] = []
    try:
        if on_step is not None:
            on_step(0)
        while len(losses) < steps:
            epoch = len(losses)  # a fresh order each epoch, from the same seed
            order = torch.randperm(
                len(cast(Sequence[object], data)),
                generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch),
            )
            for images, labels in batches(data, batch_size, device, order):
                images, labels = paired(images), paired(labels)
                logits = model(images)
                check_labels(labels, logits.shape[1])
                loss = F.cross_entropy(logits, labels)
                value = loss.item()
                if not math.isfinite(value):
                    raise _diverged(f"the loss is {value}", len(losses), learning_rate)
                torch._foreach_copy_(sound, [p.detach() for p in trained])
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                with torch.no_grad():
                    # No gradient, hence no momentum and no decay: the weights stay zero.
                    for parameter, gone in removed:
                        if parameter.grad is not None:
                            parameter.grad.masked_fill_(gone, 0)
                optimiser.step()
                if penalty is not None:
                    with torch.no_grad():
                        penalty.pull_(parameters, learning_rate)
                        for parameter, gone in removed:
                            parameter.masked_fill_(gone, 0)
                losses.append(value)
                if not torch.stack([p.isfinite().all() for p in trained]).all():
                    raise _diverged("an update is not finite", len(losses), learning_rate)
                if on_step is not None:
                    on_step(len(losses))
                if len(losses) == steps:
                    break
    except NonFiniteError:
        torch._foreach_copy_([p.detach() for p in trained], sound)
        raise
    finally:
        optimiser.zero_grad(set_to_none=True)
        for module, training in modes.items():
            module.training = training
    return losses


def recovery_sweep(
    model: Classifier,
    mask: Mask | None,
    tasks: Mapping[str, Task],
    heads: Mapping[str, nn.Linear],
    source: str,
    *,
    learning_rates: Sequence[float],
    at_steps: Sequence[int],
    batch_size: int = 64,
    seed: int = 0,
    refit: bool = True,
    penalties: Mapping[str, Penalty | None] | None = None,
) -> pd.DataFrame:
    """Fine-tune copies of a pruned classifier on the source, watching every task.

    Args:
        model: the pruned (or, with ``mask=None``, dense) classifier of the source; untouched.
        mask: its mask.
        tasks: source and held-out tasks; only the source's training split is trained on.
        heads: the frozen heads, fitted on the dense encoder.
        source: name of the source task.
        learning_rates: one run each.
        at_steps: numbers of updates after which all tasks are evaluated; the largest ends a run.
        batch_size: samples an update.
        seed: seed of the order of samples.
        refit: also fit new heads on the encoder at the last step, which tells lost features
            (a new head does not help) from drifted ones (it does).
        penalties: by name, one run each beside every learning rate; by default ``"none"`` alone.

    Returns:
        Columns ``penalty, learning_rate, step, target, split, head ("frozen" or "refitted"),
        accuracy, loss, count, chance, seed, correct``; the split is ``"test"``, and for the source
        with its frozen head also ``"validation"``, to choose a rate by. A run that diverges ends
        with its last finite rows.
    """
    tests = {name: task.test for name, task in tasks.items()}
    table: list[dict[str, object]] = []
    settings = list(itertools.product((penalties or {"none": None}).items(), learning_rates))
    for (label, penalty), rate in progress(settings, "fine-tuning", total=len(settings)):
        tuned = copy.deepcopy(model)
        backbone = tuned.backbone

        def record(
            step: int,
            kind: str,
            used: Mapping[str, nn.Linear],
            data: Mapping[str, Samples] = tests,
            split: str = "test",
            label: str = label,
            rate: float = rate,
            backbone: nn.Module = backbone,
        ) -> None:
            for target, result in evaluate_heads(backbone, used, data).items():
                table.append(
                    {
                        "penalty": label,
                        "learning_rate": rate,
                        "step": step,
                        "target": target,
                        "split": split,
                        "head": kind,
                        "accuracy": result.accuracy,
                        "loss": result.loss,
                        "count": result.count,
                        "chance": tasks[target].chance,
                        "seed": seed,
                        "correct": result.correct.numpy(),
                    }
                )

        def watch(step: int, record: Callable[..., None] = record) -> None:
            if step in at_steps:
                record(step, "frozen", heads)
                record(step, "frozen", heads, {source: tasks[source].validation}, "validation")

        try:
            finetune(
                tuned,
                tasks[source].train,
                mask,
                steps=max(at_steps),
                learning_rate=rate,
                batch_size=batch_size,
                seed=seed,
                penalty=penalty,
                on_step=watch,
            )
        except NonFiniteError as error:
            logger.warning("fine-tuning ends early: %s", error)
            continue
        if refit:
            refitted = {name: fit_head(backbone, task) for name, task in tasks.items()}
            record(max(at_steps), "refitted", refitted)
    return pd.DataFrame(table)


def _diverged(what: str, step: int, learning_rate: float) -> NonFiniteError:
    return NonFiniteError(
        f"{what} at step {step} with learning_rate={learning_rate}; try a smaller one"
    )


PENALTIES = ("none", "unweighted", "source", "pool")


def make_penalties(
    encoder: nn.Module,
    names: Sequence[str],
    strength: float,
    source: Samples,
    pool: Samples,
    *,
    penalties: Sequence[str] = PENALTIES,
    samples: int | None = 256,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, Penalty | None]:
    """Penalties that hold a classifier's encoder at its dense weights, for a comparison.

    Each curvature is the diagonal of the features' Gauss-Newton matrix
    (:func:`~pai_utils.curvature.diagonals.output_diagonal`), divided by its mean over all weights,
    so that one strength means as much pull on average with it as without.

    Args:
        encoder: the dense one.
        names: of its parameters to hold.
        strength: λ of all of them.
        source: images of the source task.
        pool: images of a mixture.
        penalties: which: ``"none"``, ``"unweighted"`` (c = 1), ``"source"``, ``"pool"`` (curvature
            on these images).
        samples: images a curvature; at most all.
        batch_size: images a forward.
        seed: of their draw.

    Returns:
        By name; parameters are named as in a :class:`~pai_utils.backbones.Classifier`.

    Raises:
        ValueError: for an unknown penalty.
    """
    anchor = {f"backbone.{name}": encoder.get_parameter(name).detach().clone() for name in names}
    found: dict[str, Penalty | None] = {}
    for penalty in penalties:
        if penalty not in PENALTIES:
            raise unknown_name("penalty", penalty, PENALTIES)
        if penalty == "none":
            found[penalty] = None
            continue
        if penalty == "unweighted":
            found[penalty] = Penalty(anchor, strength)
            continue
        data = source if penalty == "source" else pool
        count = len(cast(Sized, data))
        diagonal = output_diagonal(
            encoder,
            names,
            data,
            samples=count if samples is None else min(samples, count),
            batch_size=batch_size,
            seed=seed,
        )
        mean = float(torch.cat([values.flatten() for values in diagonal.values()]).double().mean())
        curvature = {f"backbone.{name}": values / mean for name, values in diagonal.items()}
        found[penalty] = Penalty(anchor, strength, curvature)
    return found


def recovery_gains(
    recovery: pd.DataFrame,
    source: str,
    *,
    dense: Mapping[str, float] | None = None,
    level: float = 0.95,
) -> pd.DataFrame:
    """Gain in accuracy over a fine-tuning run, with frozen heads, on source and held-out tasks.

    Args:
        recovery: as from :func:`recovery_sweep`, perhaps of several starts, sparsities or seeds,
            told apart by columns ``start`` and ``sparsity``; seeds are averaged.
        source: the task fine-tuned on.
        dense: accuracy of the dense encoder by task, for the retentions.
        level: coverage of the bootstrap intervals, over test items for the seeds that were run.

    Returns:
        One row a start, sparsity, penalty and learning rate: these, ``validation`` (the source's
        validation accuracy at the last step, which chooses a rate without a look at any test) and,
        for ``source`` and ``held_out`` (mean over the other tasks), the columns ``<part>,
        <part>_gain, <part>_low, <part>_high``, in accuracy, and with ``dense``
        ``<part>_retention`` at the last step and ``<part>_retention_before``.
    """
    frozen = recovery[recovery["head"] == "frozen"]
    keys = [key for key in _SETTINGS if key in frozen]
    gains = []
    for values, run in frozen.groupby(keys, sort=False):
        first = run[run.step == run.step.min()]
        last = run[run.step == run.step.max()]
        row: dict[str, object] = dict(zip(keys, values, strict=True))
        row["validation"] = last[last.split == "validation"].accuracy.mean()
        before, after = (part[part.split == "test"] for part in (first, last))
        others = [target for target in dict.fromkeys(before.target) if target != source]
        for part, targets in {"source": [source], "held_out": others}.items():
            old, new = (
                # Over seeds: the share of them that are right on an item.
                [np.mean(np.stack(list(table[table.target == t].correct)), 0) for t in targets]
                for table in (before, after)
            )
            low, high = interval(gain_replicates(old, new), level)
            start, end = (float(np.mean([right.mean() for right in side])) for side in (old, new))
            row |= {part: end, f"{part}_gain": end - start}
            row |= {f"{part}_low": low, f"{part}_high": high}
            if dense is not None:
                chance = before.groupby("target").chance.first()
                for suffix, side in (("", new), ("_before", old)):
                    kept = [
                        retention(float(right.mean()), dense[t], float(chance[t]))
                        for t, right in zip(targets, side, strict=True)
                    ]
                    row[f"{part}_retention{suffix}"] = float(np.mean(kept))
        gains.append(row)
    return pd.DataFrame(gains)


def chosen_on_validation(gains: pd.DataFrame) -> pd.DataFrame:
    """Of each start, sparsity and penalty the rate at which the source validates best.

    Args:
        gains: as from :func:`recovery_gains`.
    """
    keys = [key for key in _SETTINGS if key in gains and key != "learning_rate"]
    return gains.loc[gains.groupby(keys, sort=False).validation.idxmax()].reset_index(drop=True)


def _removed(model: nn.Module, mask: Mask | None) -> list[tuple[nn.Parameter, torch.Tensor]]:
    if mask is None:
        return []
    parameters = dict(model.named_parameters())
    return [(parameters[name], ~entry.to(parameters[name].device)) for name, entry in mask.items()]
