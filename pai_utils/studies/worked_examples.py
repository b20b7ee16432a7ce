"""The worked examples: their parameters, and what the one on a real layer measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Annotated, Any

import pandas as pd
import torch
from pydantic import Field
from torch import Tensor, nn

from pai_utils.data.images import ImageDataset
from pai_utils.data.tasks import Task
from pai_utils.evaluation import evaluate, evaluate_heads, retention
from pai_utils.masks import make_mask
from pai_utils.models.encoders import Backbone, Classifier
from pai_utils.scorers import score
from pai_utils.studies.parameters import Fraction, Positive, RunParameters
from pai_utils.support.common import copied, device_of, progress, undisturbed
from pai_utils.support.sampling import Draw, batches


class Parameters(RunParameters):
    """Parameters of the notebook ``worked_examples``, whose networks are its own."""

    fractions: list[Fraction] = Field(min_length=2)  #: of the pruning step
    correlation: Annotated[float, Field(gt=0, lt=1)]  #: of two weights' effects
    draws: Positive = 100  #: labels a sample, where they are drawn from the model
    samples: Positive = 64  #: images that the example on a real layer looks at
    train_size: Positive = 300  #: of each of its tasks
    test_size: Positive = 150


def silent_units(backbone: Backbone, images: ImageDataset, samples: int) -> pd.DataFrame:
    """What each unit before a ReLU or ReLU6 is given on images, and without its own weights.

    Units are channels of a convolution that a BatchNorm with that activation follows. Columns
    ``weight`` (the convolution's parameter), ``unit``, ``highest`` (over images and places), and
    ``alone``, the constant that is left when the unit's weights are zero.
    """
    rows = []
    for weight, norm, values in _before_activations(backbone, images, samples):
        scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
        alone = norm.bias.detach() - scale * norm.running_mean
        highest = values.amax((0, 2, 3))
        rows += [
            {"weight": weight, "unit": unit, "highest": float(most), "alone": float(constant)}
            for unit, (most, constant) in enumerate(zip(highest, alone, strict=True))
        ]
    return pd.DataFrame(rows)


def pre_activations(
    backbone: Backbone, unit: pd.Series, tasks: Mapping[str, Task], samples: int
) -> pd.DataFrame:
    """What one unit of :func:`silent_units` is given on images of each task: ``task, value``."""
    found = []
    for name, task in tasks.items():
        for weight, _, values in _before_activations(backbone, task.train, samples):
            if weight == unit.weight:
                values = values[:, unit.unit].flatten().cpu()
                found.append(pd.DataFrame({"task": name, "value": values.numpy()}))
    return pd.concat(found, ignore_index=True)


def _before_activations(
    backbone: Backbone, images: ImageDataset, samples: int
) -> list[tuple[str, Any, Tensor]]:
    """Each convolution's weight, the BatchNorm after it, and what that gives its activation."""
    last, found = [""], []

    def convolved(name: str, *_: object) -> None:
        last[0] = name

    def normalised(norm: Any, inputs: tuple[Tensor], _output: Tensor) -> None:
        if isinstance(getattr(norm, "act", None), (nn.ReLU, nn.ReLU6)):
            given = nn.functional.batch_norm(
                inputs[0], norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
            )
            found.append((f"{last[0]}.weight", norm, given))

    chosen = Draw(samples).indices(images)
    batch, _ = next(batches(images, samples, device_of(backbone), chosen))
    with undisturbed(backbone), torch.no_grad(), ExitStack() as hooks:
        for name, module in backbone.named_modules():
            if isinstance(module, nn.Conv2d):
                hooks.enter_context(module.register_forward_hook(partial(convolved, name)))
            elif isinstance(module, nn.BatchNorm2d):
                hooks.enter_context(module.register_forward_hook(normalised))
        backbone(batch)
    return found


def damping_curve(
    backbone: Backbone,
    heads: Mapping[str, nn.Linear],
    tasks: Mapping[str, Task],
    source: str,
    *,
    dampings: Sequence[float],
    sparsities: Sequence[float] = (0.1, 0.3, 0.5),
    samples: int = 256,
) -> pd.DataFrame:
    """What masks by ``ggn_diag`` keep, by their damping.

    Columns ``damping, sparsity, task, retention``, and ``loss``, that of the source's validation
    part, by which a damping may be chosen.
    """
    model = Classifier(backbone, heads[source])
    tests = {name: task.test for name, task in tasks.items()}
    dense = evaluate_heads(backbone, heads, tests)
    rows = []
    for damping in progress(dampings, "dampings", len(dampings)):
        scores = score("ggn_diag", model, tasks[source].train, samples=samples, damping=damping)
        for sparsity in sparsities:
            pruned = copied(model)
            make_mask(scores, sparsity).apply_(pruned)
            loss = evaluate(pruned, tasks[source].validation).loss
            for name, after in evaluate_heads(pruned.backbone, heads, tests).items():
                kept = retention(after.accuracy, dense[name].accuracy, tasks[name].chance)
                rows.append((damping, sparsity, name, kept, loss))
    return pd.DataFrame(rows, columns=["damping", "sparsity", "task", "retention", "loss"])
