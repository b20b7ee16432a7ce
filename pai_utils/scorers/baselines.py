"""Scores that look at no data: ``random`` and ``magnitude``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pai_utils.support.sampling import Samples


def random(
    model: nn.Module,
    names: Sequence[str],
    data: Samples | None,
    *,
    samples: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """U(0, 1) for every weight, drawn in the order of ``names``, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    return {
        name: torch.rand(parameters[name].shape, generator=generator).to(parameters[name].device)
        for name in names
    }


def magnitude(
    model: nn.Module,
    names: Sequence[str],
    data: Samples | None,
    *,
    samples: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """``|w|``, the second-order saliency ½ w² H_ii for H = I, up to a monotone map."""
    parameters = dict(model.named_parameters())
    return {name: parameters[name].detach().abs() for name in names}
