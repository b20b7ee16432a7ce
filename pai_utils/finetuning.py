"""Masked fine-tuning: what training on the source brings back."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pai_utils.backbones import Backbone, Classifier, prunable_parameters
from pai_utils.curvature.diagonals import output_diagonal
from pai_utils.evaluation import (
    Evaluation,
    evaluate_heads,
    gain_replicates,
    interval,
    retention,
    summarise_retention,
)
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
from pai_utils.heads import features, fit_head
from pai_utils.masks import Mask
from pai_utils.scorers import SCORERS
from pai_utils.sources import Source, load_source, prune_source
from pai_utils.tasks import Task

OPTIMISERS: dict[str, Callable[[list[nn.Parameter], float, float, float], torch.optim.Optimizer]]
OPTIMISERS = {
    "sgd": lambda weights, rate, momentum, decay: torch.optim.SGD(
        weights, lr=rate, momentum=momentum, weight_decay=decay
    ),
    "adam": lambda weights, rate, momentum, decay: torch.optim.AdamW(
        weights, lr=rate, betas=(momentum, 0.99), weight_decay=decay
    ),
}
"""By name; Adam with decoupled weight decay, and a second beta for short runs."""

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
}
"""The learning rate, over the first, once a share ``done`` of the updates is made."""

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
    """a, by parameter name; parameters without an entry are free, frozen ones stay as they are."""
    strength: float
    """λ."""
    curvature: Mapping[str, Tensor] | None = None
    """c ≥ 0, by parameter name; ``None`` for 1 everywhere."""

    def check(self, model: nn.Module) -> None:
        """Refuse a penalty that does not fit.

        Raises:
            ValueError: for a strength that is negative or not finite, an anchor or curvature of an
                unknown parameter or another shape or not finite, or a negative curvature.
        """
        _check_strength(self.strength)
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
                if not tensor.isfinite().all():
                    raise ValueError(f"the penalty's {kind} of {name!r} must be finite")
                if kind == "curvature" and (tensor < 0).any():
                    raise ValueError(f"the penalty's curvature of {name!r} must not be negative")
        if self.curvature is not None and (missing := set(self.anchor) - set(self.curvature)):
            raise ValueError(f"the penalty has no curvature for {min(missing)!r}")

    def pull_(self, parameters: Mapping[str, nn.Parameter], learning_rate: float) -> None:
        """The proximal step: where w and the penalty balance, hence stable at any strength."""
        for name, anchor in self.anchor.items():
            w, a = parameters[name], anchor.to(parameters[name])
            if not w.requires_grad:
                continue
            step = learning_rate * self.strength
            share = torch.as_tensor(step if self.curvature is None else step * self.curvature[name])
            w.lerp_(a, (share / (1 + share)).to(w))


@dataclass(frozen=True)
class FeaturePenalty:
    """A pull of a classifier's features to given ones: ½ λ E ‖φ(x; w) − φ₀(x)‖² / V.

    V is the total variance of φ₀, so that the expectation is the share of it that is lost. The
    images x need no labels and no head, so they may belong to no task. To second order at the
    dense weights this is ½ λ δᵀGδ / V, G the whole Gauss-Newton matrix whose diagonal is
    :func:`~pai_utils.curvature.diagonals.output_diagonal`: what :class:`Penalty` approximates by
    that diagonal, here with all of its terms and of every order (Benjamin et al. 2019, "Measuring
    and regularizing networks in function space"; as distillation: Romero et al. 2015, "FitNets").
    """

    images: Samples
    """x."""
    targets: Tensor
    """φ₀, ``[N, D]``, in the order of the images."""
    strength: float
    """λ."""

    def check(self, model: nn.Module) -> None:
        """Refuse a penalty that does not fit.

        Raises:
            ValueError: for a strength that is negative or not finite, a model without a
                ``backbone``, or targets of another number or size.
        """
        _check_strength(self.strength)
        if not isinstance(model, Classifier):
            raise ValueError("a FeaturePenalty needs a Classifier, whose backbone gives features")
        expected = [len(cast(Sized, self.images)), model.backbone.feature_dim]
        if list(self.targets.shape) != expected:
            raise ValueError(
                f"the penalty's targets have shape {list(self.targets.shape)}, expected "
                f"{expected}: one row an image, one column a feature"
            )

    @cached_property
    def variance(self) -> Tensor:
        """V above, the total variance of the targets, summed over features."""
        return self.targets.var(0, correction=0).sum()

    def loss(self, model: Classifier, batch_size: int, seed: int) -> Tensor:
        """The penalty on a seeded draw of ``batch_size`` images, with replacement."""
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(len(self.targets), (batch_size,), generator=generator)
        ((images, _),) = batches(self.images, batch_size, device_of(model), rows)
        found = model.backbone(paired(images))
        targets = paired(self.targets[rows].to(found))
        change: Tensor = (found - targets).square().sum(1).mean() / self.variance.to(found)
        return 0.5 * self.strength * change


def _check_strength(strength: float) -> None:
    if not 0 <= strength < math.inf:
        raise ValueError(f"strength={strength} must be a finite number, not negative")


def finetune(
    model: nn.Module,
    data: Samples,
    mask: Mask | None = None,
    *,
    steps: int = 100,
    learning_rate: float = 1e-4,
    batch_size: int = 64,
    optimiser: str = "sgd",
    schedule: str = "constant",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    seed: int = 0,
    penalty: Penalty | FeaturePenalty | None = None,
    on_step: Callable[[int], None] | None = None,
) -> list[float]:
    """Train ``model`` in place on the mean cross-entropy; pruned weights stay exactly zero.

    The model is kept in evaluation mode (frozen BatchNorm statistics, no dropout), since
    re-estimated statistics on one task destroy the others. Parameters that do not require a
    gradient, such as a :class:`~pai_utils.backbones.Classifier`'s head, stay as they are.

    Args:
        model: images to logits.
        data: labelled samples of the source task, drawn in seeded random order without
            replacement, epoch after epoch; the last batch of an epoch may be smaller.
        mask: the pruned model's mask; ``None`` trains densely.
        steps: number of updates.
        learning_rate: of the first update.
        batch_size: samples an update (not changed when memory runs out: it is part of the result).
        optimiser: a key of :data:`OPTIMISERS`. Frozen heads on standardised features are sharp:
            plain SGD then needs rates far below those that suit the rest of the network.
        schedule: a key of :data:`SCHEDULES`: what the rate is later.
        momentum: of SGD; of Adam the first beta.
        weight_decay: of the optimiser.
        seed: seed of the order of samples.
        penalty: a pull to weights, as a proximal step after each update, or to features, on
            ``batch_size`` of its images an update; pruned weights stay zero.
        on_step: called with the number of updates made, before the first and after each.

    Returns:
        The loss of each update's batch, in nats.

    Raises:
        ValueError: for settings outside their range, a mask or penalty of another architecture, or
            labels beyond the model's classes.
        FloatingPointError: at a non-finite loss or update, naming step and learning rate. The
            model keeps the last weights whose loss was finite (those given, at step 0).

    Examples:
        >>> import torch
        >>> import pai_utils as pai
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 2, bias=False))
        >>> model[1].weight.data = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -0.5]])
        >>> images = torch.eye(3).view(3, 3, 1, 1)  # three images of one pixel
        >>> data = torch.utils.data.TensorDataset(images, torch.tensor([0, 1, 0]))
        >>> mask = pai.make_mask(pai.score("magnitude", model), sparsity=0.5)
        >>> mask.apply_(model)
        >>> losses = pai.finetune(model, data, mask, steps=20, learning_rate=0.1)
        >>> losses[-1] < losses[0]
        True
        >>> model[1].weight.data[~mask["1.weight"]]
        tensor([0., 0., 0.])
    """
    if optimiser not in OPTIMISERS:
        raise unknown_name("optimiser", optimiser, OPTIMISERS)
    if schedule not in SCHEDULES:
        raise unknown_name("schedule", schedule, SCHEDULES)
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
    stepper = OPTIMISERS[optimiser](trained, learning_rate, momentum, weight_decay)
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
                if isinstance(penalty, FeaturePenalty):
                    draw = seed * 1_000_003 + len(losses)
                    loss = loss + penalty.loss(cast(Classifier, model), batch_size, draw)
                if not math.isfinite(loss.item()):
                    raise _diverged(f"the loss is {loss.item()}", len(losses), learning_rate)
                torch._foreach_copy_(sound, [p.detach() for p in trained])
                stepper.zero_grad(set_to_none=True)
                loss.backward()
                with torch.no_grad():
                    # No gradient, hence no momentum and no decay: the weights stay zero.
                    for parameter, gone in removed:
                        if parameter.grad is not None:
                            parameter.grad.masked_fill_(gone, 0)
                rate = learning_rate * SCHEDULES[schedule](len(losses) / steps)
                for group in stepper.param_groups:
                    group["lr"] = rate
                stepper.step()
                if isinstance(penalty, Penalty):
                    with torch.no_grad():
                        penalty.pull_(parameters, rate)
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
        stepper.zero_grad(set_to_none=True)
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
    optimiser: str = "sgd",
    schedule: str = "constant",
    seed: int = 0,
    refit: bool = True,
    penalties: Mapping[str, Penalty | FeaturePenalty | None] | None = None,
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
        optimiser: a key of :data:`OPTIMISERS`.
        schedule: a key of :data:`SCHEDULES`.
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
                        "seed": seed,
                        **result.row(tasks[target].chance),
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
                optimiser=optimiser,
                schedule=schedule,
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


def recovery_study(
    encoder: Backbone,
    tasks: Mapping[str, Task],
    heads: Mapping[str, nn.Linear],
    source: str,
    *,
    starts: Sequence[str],
    sparsities: Sequence[float],
    seeds: Sequence[int],
    scorer: str,
    scope: str = "global",
    rounds: int = 1,
    prune_by: str | None = None,
    compensation: str = "layerwise+moments",
    compensation_options: Mapping[str, Any] | None = None,
    penalties: Mapping[str, float] | None = None,
    samples: int | None = 256,
    batch_size: int = 64,
    **sweep: Any,
) -> pd.DataFrame:
    """Recovery from several starts, at several sparsities and seeds.

    Args:
        encoder: the dense one; left as it was.
        tasks: by name, the source among them.
        heads: a frozen head for each.
        source: the task fine-tuned on.
        starts: keys of :data:`STARTS`.
        sparsities: of each start but ``"dense"``, which is run once a seed.
        seeds: of images, scores, repairs and the order of fine-tuning.
        scorer: of all starts but ``"random"``.
        scope: as in :func:`~pai_utils.masks.make_mask`.
        rounds: of every mask, as in :func:`~pai_utils.pruning.prune`.
        prune_by: images for scores, repairs and the penalties of a mixture
            (:mod:`pai_utils.sources`); by default the source's own.
        compensation: of the start ``"repaired"``.
        compensation_options: keywords of :func:`~pai_utils.compensation.compensate_`.
        penalties: strengths as in :func:`make_penalties`, on the first start and the first
            sparsity; elsewhere there is none.
        samples: images a score, at most all.
        batch_size: images a forward.
        sweep: keywords of :func:`recovery_sweep`; its batch size is ``finetune_batch_size``.

    Returns:
        The rows of :func:`recovery_sweep` with columns ``start`` and ``sparsity``.

    Raises:
        ValueError: for an unknown start or penalty, and as :func:`~pai_utils.pruning.prune`.
    """
    for start in starts:
        if start not in STARTS:
            raise unknown_name("start", start, STARTS)
    held = prunable_parameters(encoder)
    sweep["batch_size"] = sweep.pop("finetune_batch_size", 64)
    plain = {"none": 0.0}
    parts = []

    @cache
    def pool_of(seed: int) -> Source:
        return load_source(prune_by or source, encoder, tasks, heads, seed=seed)

    for seed, sparsity, start in itertools.product(seeds, sparsities, starts):
        if start == "dense" and sparsity != sparsities[0]:
            continue
        pool = pool_of(seed)
        begun, mask = encoder, None
        if start != "dense":
            pruned = prune_source(
                "random" if start == "random" else scorer,
                Classifier(encoder, pool.head or heads[source]),  # whose images these are
                pool,
                sparsity,
                scope=scope,
                rounds=rounds,
                compensation=compensation if start == "repaired" else "none",
                compensation_options=compensation_options,
                samples=None if samples is None else min(samples, len(pool.images)),
                batch_size=batch_size,
                seed=seed,
            )
            begun, mask = cast(Classifier, pruned.model).backbone, pruned.mask
        first = start == starts[0] and sparsity == sparsities[0]
        table = recovery_sweep(
            Classifier(begun, heads[source]),
            mask,
            tasks,
            heads,
            source,
            seed=seed,
            penalties=make_penalties(
                encoder,
                held,
                penalties if penalties and first else plain,
                tasks[source].train,
                pool.images,
                samples=samples,
                batch_size=batch_size,
                seed=seed,
            ),
            **sweep,
        )
        parts.append(table.assign(start=start, sparsity=0.0 if start == "dense" else sparsity))
    return pd.concat(parts, ignore_index=True)


def _diverged(what: str, step: int, learning_rate: float) -> NonFiniteError:
    advice = "try a smaller one" if step else "before any update: look at images and weights"
    return NonFiniteError(f"{what} at step {step} with learning_rate={learning_rate}; {advice}")


STARTS = {
    "pruned": "by a scorer",
    "repaired": "also compensated",
    "random": "pruned at random",
    "dense": "not pruned",
}
"""What is fine-tuned, by name."""

PENALTIES = {
    "none": "cross-entropy alone",
    "unweighted": "towards the dense weights, all alike (L2-SP)",
    "source": "towards the dense weights, by the features' curvature on the source's images",
    "pool": "the same, by their curvature on a mixture of images",
    "features": "towards the dense features, on the mixture's images",
}
"""What fine-tuning is held by, by name."""


def make_penalties(
    encoder: Backbone,
    names: Sequence[str],
    strengths: Mapping[str, float],
    source: Samples,
    pool: Samples,
    *,
    samples: int | None = 256,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, Penalty | FeaturePenalty | None]:
    """Penalties that hold a classifier's encoder to the dense one, for a comparison.

    Each curvature is the diagonal of the features' Gauss-Newton matrix
    (:func:`~pai_utils.curvature.diagonals.output_diagonal`), divided by its mean over all weights,
    so that one strength means as much pull on average with it as without.

    Args:
        encoder: the dense one.
        names: of its parameters to hold, where weights are held.
        strengths: λ of each, by a key of :data:`PENALTIES`; of ``"none"`` it is not looked at.
        source: images of the source task.
        pool: images of a mixture.
        samples: images a curvature; at most all. Features are held on all of the pool.
        batch_size: images a forward.
        seed: of their draw.

    Returns:
        By name; parameters are named as in a :class:`~pai_utils.backbones.Classifier`.

    Raises:
        ValueError: for an unknown penalty.
    """
    anchor = {f"backbone.{name}": encoder.get_parameter(name).detach().clone() for name in names}

    def make(penalty: str, strength: float) -> Penalty | FeaturePenalty | None:
        if penalty == "none":
            return None
        if penalty == "unweighted":
            return Penalty(anchor, strength)
        if penalty == "features":
            return FeaturePenalty(pool, features(encoder, pool, batch_size=batch_size)[0], strength)
        if penalty not in PENALTIES:
            raise unknown_name("penalty", penalty, PENALTIES)
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
        return Penalty(anchor, strength, curvature)

    return {penalty: make(penalty, strength) for penalty, strength in strengths.items()}


def recovery_results(
    recovery: pd.DataFrame, dense: Mapping[str, Evaluation], source: str, scorer: str, *, steps: int
) -> pd.DataFrame:
    """Retention with frozen heads before and after fine-tuning, as rows of ``results.csv``.

    Args:
        recovery: as from :func:`recovery_study`.
        dense: each task's accuracy before pruning.
        source: what masks were computed on.
        scorer: by which, where the start says no other.
        steps: of a whole run; one that diverged has no row of its end. Before fine-tuning is step
            0, where it was evaluated.

    Returns:
        As :func:`~pai_utils.evaluation.summarise_retention`, with ``stage`` for the start and
        what it was fine-tuned by.

    Raises:
        ValueError: if there is neither step 0 nor the last one.
    """
    frozen = recovery[(recovery["split"] == "test") & (recovery["head"] == "frozen")]
    chances = frozen.groupby("target").chance.first()
    references = [
        {"source": "none", "target": t, "scorer": "dense", "sparsity": 0.0, "seed": 0}
        | dense[t].row(float(chances[t]))
        for t in chances.index
    ]
    by = ["start", "penalty", "learning_rate"]
    parts = []
    for key, group in frozen[frozen.step == steps].groupby(by, sort=False):
        parts.append((str(key[0]), f"{key[0]}, fine-tuned ({key[1]}, {key[2]:g})", group))
    begun = frozen[frozen.step == 0].drop_duplicates(["start", "sparsity", "seed", "target"])
    for start, group in begun.groupby("start", sort=False):
        parts.append((str(start), str(start), group))
    if not parts:
        raise ValueError(f"recovery was evaluated neither at step 0 nor at step {steps}")
    tables = []
    for start, stage, group in parts:
        rows = group.assign(
            scorer={"random": "random", "dense": "none"}.get(start, scorer),
            source=source if start == "repaired" or _looks(start, scorer) else "none",
        )
        summary = summarise_retention(pd.concat([pd.DataFrame(references), rows]))
        tables.append(summary[summary.scorer != "dense"].assign(stage=stage))
    return pd.concat(tables, ignore_index=True)


def _looks(start: str, scorer: str) -> bool:
    """Whether the masks of a start look at images."""
    return start in ("pruned", "repaired") and SCORERS[scorer].needs_data


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
        One row a start, sparsity, penalty and learning rate, with these, ``seeds`` (how many came
        to the last step; others are left out of all that follows), ``validation`` (the
        source's validation accuracy at the last step, which chooses a rate without a look at any
        test) and, for ``source`` and ``held_out`` (mean over the other tasks), the columns
        ``<part>, <part>_gain, <part>_low, <part>_high``, in accuracy, and with ``dense``
        ``<part>_retention`` at the last step and ``<part>_retention_before``.
    """
    if recovery.empty:
        raise ValueError("no fine-tuning came to an evaluation; try smaller learning rates")
    frozen = recovery[recovery["head"] == "frozen"]
    keys = [key for key in _SETTINGS if key in frozen]
    gains = []
    for values, run in frozen.groupby(keys, sort=False):
        reached = run.groupby("seed").step.transform("max")
        run = run[reached == reached.max()]  # a seed that diverged has no end to compare
        first = run[run.step == run.step.min()]
        last = run[run.step == run.step.max()]
        row: dict[str, object] = dict(zip(keys, values, strict=True))
        row["seeds"] = run.seed.nunique()
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

    Returns:
        The rows of ``gains`` with these rates.
    """
    keys = [key for key in _SETTINGS if key in gains and key != "learning_rate"]
    return gains.loc[gains.groupby(keys, sort=False).validation.idxmax()].reset_index(drop=True)


def _removed(model: nn.Module, mask: Mask | None) -> list[tuple[nn.Parameter, torch.Tensor]]:
    if mask is None:
        return []
    parameters = dict(model.named_parameters())
    return [(parameters[name], ~entry.to(parameters[name].device)) for name, entry in mask.items()]
