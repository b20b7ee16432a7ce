"""Scores of the weights and of the mean loss's gradient: nothing of second order but ``grasp``.

The gradient g is that of the loss over *all* samples drawn, summed over the batches before
anything is made of it, so that no score depends on the batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pai_utils.curvature.persample import drawn_batches
from pai_utils.curvature.products import HessianOperator, gradients
from pai_utils.support.common import at_least_single, device_of, undisturbed
from pai_utils.support.contract import check_labels
from pai_utils.support.sampling import Draw, Samples, fitting_batches, paired, sum_over_processes


def random(
    model: nn.Module, names: Sequence[str], data: Samples | None, draw: Draw
) -> dict[str, Tensor]:
    """U(0, 1) for every weight, drawn in the order of ``names``, the same on every device."""
    generator = torch.Generator().manual_seed(draw.seed)
    return {n: torch.rand(model.get_parameter(n).shape, generator=generator) for n in names}


def magnitude(
    model: nn.Module, names: Sequence[str], data: Samples | None, draw: Draw
) -> dict[str, Tensor]:
    """``|w|``, the second-order saliency ½ w² H_ii for H = I, up to a monotone map."""
    return {name: model.get_parameter(name).detach().abs() for name in names}


def lamp(
    model: nn.Module, names: Sequence[str], data: Samples | None, draw: Draw
) -> dict[str, Tensor]:
    """w² over the sum of u² of all weights u of its tensor with u² ≥ w².

    Within a layer the order is that of the magnitude; between layers it spares those of few or
    small weights. The last weight of every layer scores one.

    Source: Lee, Park, Mo, Ahn & Shin (2021), "Layer-adaptive sparsity for the magnitude-based
    pruning".
    """
    scores = {}
    for name in names:
        weight = model.get_parameter(name).detach()
        squares = weight.double().square().flatten()
        ordered = squares.sort().values
        not_smaller = ordered.flip(0).cumsum(0).flip(0)[torch.searchsorted(ordered, squares)]
        shares = torch.where(squares > 0, squares / not_smaller, 0)
        scores[name] = shares.view_as(weight).to(at_least_single(weight))
    return scores


def snip(model: nn.Module, names: Sequence[str], data: Samples, draw: Draw) -> dict[str, Tensor]:
    """``|w g|``, g the gradient of the mean cross-entropy: the first-order change when w goes.

    Source: Lee, Ajanthan & Torr (2019), "SNIP: single-shot network pruning based on connection
    sensitivity". Theirs are divided by their sum, which changes no order. One forward and
    backward pass a sample.
    """
    indices, device = draw.indices(data), device_of(model)
    weights = {name: model.get_parameter(name) for name in names}

    def gradient(size: int) -> dict[str, Tensor]:
        totals = {n: torch.zeros_like(w, dtype=at_least_single(w)) for n, w in weights.items()}
        for images, labels, _ in drawn_batches(data, indices, size, device, "snip"):
            with torch.enable_grad():
                logits = model(paired(images))
                check_labels(labels, logits.shape[1])
                share = len(images) / len(indices)
                loss = share * F.cross_entropy(logits, paired(labels))
            parts = gradients([loss], weights.values())
            for total, part in zip(totals.values(), parts, strict=True):
                total += part
        return totals

    with undisturbed(model):
        model.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_()
        found = sum_over_processes(fitting_batches(gradient, draw.batch_size))
    return {name: g.mul_(weights[name].detach()).abs_() for name, g in found.items()}


def grasp(model: nn.Module, names: Sequence[str], data: Samples, draw: Draw) -> dict[str, Tensor]:
    """Signed w ⊙ Hg, with gradient g and Hessian H of the mean cross-entropy.

    Removing w changes the squared gradient norm gᵀg by −2 w (Hg) to first order. The original
    removes the weights with the largest −w ⊙ Hg, whose removal raises the norm most or lowers it
    least; what is kept are the largest w ⊙ Hg. Many public versions have the sign the other way
    round.

    The authors' code divides the logits by 200, which all but levels the predicted probabilities;
    here the loss is the model's own. Costs three forward and backward passes, or four where the
    graphs of all batches do not fit in 4 GiB together.

    Source: Wang, Zhang & Grosse (2020), "Picking winning tickets before training by preserving
    gradient flow".
    """
    operator = HessianOperator(model, names, data, draw)
    operator.bar = "grasp"
    product = operator(operator.gradient())
    return {name: product[name].mul_(weight) for name, weight in operator.parameters.items()}
