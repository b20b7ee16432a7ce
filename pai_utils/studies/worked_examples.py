"""The worked examples: their parameters, and what the one on a real layer measures."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import pandas as pd
import torch
from pydantic import Field
from torch import Tensor, nn

from pai_utils.data.images import ImageDataset
from pai_utils.data.tasks import Task
from pai_utils.evaluation import summarise_retention
from pai_utils.models.encoders import Backbone
from pai_utils.pruning import Recipe
from pai_utils.studies.parameters import Fraction, Positive, RunParameters
from pai_utils.studies.suite import Suite, sweep
from pai_utils.support.common import device_of, undisturbed
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
    for weight, (norm, values) in _before_activations(backbone, images, samples).items():
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
        _, values = _before_activations(backbone, task.train, samples)[unit.weight]
        values = values[:, unit.unit].flatten().cpu()
        found.append(pd.DataFrame({"task": name, "value": values.numpy()}))
    return pd.concat(found, ignore_index=True)


def _before_activations(
    backbone: Backbone, images: ImageDataset, samples: int
) -> dict[str, tuple[Any, Tensor]]:
    """The BatchNorm after each convolution's weight, and what it gives its activation."""
    found = {}

    def keep(weight: str, norm: Any, _activation: nn.Module, inputs: tuple[Tensor]) -> None:
        found[weight] = norm, inputs[0].clone()  # which the activation may overwrite

    chosen = Draw(samples).indices(images)
    batch, _ = next(batches(images, samples, device_of(backbone), chosen))
    layers = [m for m in backbone.named_modules() if isinstance(m[1], nn.Conv2d | nn.BatchNorm2d)]
    with undisturbed(backbone), torch.no_grad():
        for (name, _), (_, norm) in itertools.pairwise(layers):
            activation = getattr(norm, "act", None)
            if isinstance(activation, nn.ReLU | nn.ReLU6):
                activation.register_forward_pre_hook(partial(keep, f"{name}.weight", norm))
        backbone(batch)
    return found


def damping_curve(
    suite: Suite, source: str, *, dampings: Sequence[float], samples: int
) -> pd.DataFrame:
    """What masks by ``ggn_diag`` keep: ``damping, sparsity, task, retention``."""
    parts = []
    for damping in dampings:
        recipes = [Recipe("ggn_diag", s, options={"damping": damping}) for s in (0.1, 0.3, 0.5)]
        kept = summarise_retention(sweep(suite, [source], recipes, Draw(samples)))
        parts.append(kept[kept.scorer != "dense"].assign(damping=damping))
    table = pd.concat(parts, ignore_index=True).rename(columns={"target": "task"})
    return table[["damping", "sparsity", "task", "retention"]]
