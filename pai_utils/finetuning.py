"""Masked fine-tuning: what training on the source brings back."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

from pai_utils.backbones import Classifier
from pai_utils.evaluation import evaluate_heads, gain_replicates, interval
from pai_utils.execution import (
    NonFiniteError,
    Samples,
    batches,
    check_labels,
    device_of,
    logger,
    paired,
    progress,
)
from pai_utils.heads import fit_head
from pai_utils.masks import Mask
from pai_utils.tasks import Task


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
        on_step: called with the number of updates made, before the first and after each.

    Returns:
        The loss of each update's batch, in nats.

    Raises:
        ValueError: for settings outside their range, a mask of another architecture, or labels
            beyond the model's classes.
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
    device = device_of(model)
    removed = _removed(model, mask)
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

    Returns:
        Columns ``learning_rate, step, target, head ("frozen" or "refitted"), accuracy, loss,
        count, chance, seed, correct``. A run that diverges ends with its last finite rows.
    """
    tests = {name: task.test for name, task in tasks.items()}
    table: list[dict[str, object]] = []
    for rate in progress(list(learning_rates), "fine-tuning", total=len(learning_rates)):
        tuned = copy.deepcopy(model)
        backbone = tuned.backbone

        def record(
            step: int,
            kind: str,
            used: Mapping[str, nn.Linear],
            rate: float = rate,
            backbone: nn.Module = backbone,
        ) -> None:
            for target, result in evaluate_heads(backbone, used, tests).items():
                table.append(
                    {
                        "learning_rate": rate,
                        "step": step,
                        "target": target,
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

        try:
            finetune(
                tuned,
                tasks[source].train,
                mask,
                steps=max(at_steps),
                learning_rate=rate,
                batch_size=batch_size,
                seed=seed,
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


def recovery_gains(recovery: pd.DataFrame, source: str, *, level: float = 0.95) -> pd.DataFrame:
    """Gain in accuracy over a fine-tuning run, with frozen heads, on source and held-out tasks.

    Args:
        recovery: as from :func:`recovery_sweep`.
        source: the task fine-tuned on.
        level: coverage of the bootstrap intervals over test items.

    Returns:
        One row a learning rate: ``learning_rate`` and, for ``source`` and ``held_out`` (mean over
        the other tasks), the columns ``<part>_gain, <part>_low, <part>_high``, in accuracy.
    """
    frozen = recovery[recovery["head"] == "frozen"]
    gains = []
    for rate, run in frozen.groupby("learning_rate"):
        first = run[run.step == run.step.min()].set_index("target").correct
        last = run[run.step == run.step.max()].set_index("target").correct
        row: dict[str, object] = {"learning_rate": rate}
        others = [target for target in first.index if target != source]
        for part, targets in {"source": [source], "held_out": others}.items():
            before, after = [first[t] for t in targets], [last[t] for t in targets]
            gain = np.mean([a.mean() - b.mean() for a, b in zip(after, before, strict=True)])
            low, high = interval(gain_replicates(before, after), level)
            row |= {f"{part}_gain": float(gain), f"{part}_low": low, f"{part}_high": high}
        gains.append(row)
    return pd.DataFrame(gains)


def _removed(model: nn.Module, mask: Mask | None) -> list[tuple[nn.Parameter, torch.Tensor]]:
    if mask is None:
        return []
    parameters = dict(model.named_parameters())
    return [(parameters[name], ~entry.to(parameters[name].device)) for name, entry in mask.items()]
