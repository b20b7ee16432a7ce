"""Gradient, Hessian and Gauss-Newton products of the mean cross-entropy over named parameters.

    Hv = ∂(gᵀv)/∂w                       (Pearlmutter 1994: two backwards a batch)
    vᵀGv = 1/N Σ_n (J_n v)ᵀ (diag p_n − p_n p_nᵀ) (J_n v)     (Schraudolph 2002)

The tangent J_n v is ∂(vᵀJ_nᵀu)/∂u, a product that is linear in u: two backwards as well, and no
need of forward-mode derivatives, which not every operation has.

All sums are over samples, weighted by batch size, so ragged batches change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pai_utils.execution import (
    NonFiniteError,
    Samples,
    batches,
    check_labels,
    device_of,
    draw_samples,
    fitting_batches,
    paired,
    undisturbed,
)


@dataclass(frozen=True)
class DirectionalTerms:
    """Terms of the expansion of the mean loss along one direction v."""

    loss: float
    gradient: float  # gᵀv
    hessian: float  # vᵀHv
    ggn: float  # vᵀGv, G the Gauss-Newton matrix
    count: int  # samples the means are over


def directional_terms(
    model: nn.Module,
    direction: Mapping[str, Tensor],
    data: Samples,
    *,
    samples: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> DirectionalTerms:
    """Loss, gᵀv, vᵀHv and vᵀGv of the mean cross-entropy at the model's parameters.

    Exact up to rounding for the samples drawn. Costs about five forward and backward passes.

    Args:
        model: images to logits; evaluated in evaluation mode, left as it was.
        direction: v, one tensor a parameter name, of the parameter's shape.
        data: labelled samples.
        samples: size of the seeded draw without replacement; ``None`` for all.
        batch_size: samples a forward; halved when memory runs out.
        seed: seed of the draw.

    Raises:
        ValueError: if a name or shape of ``direction`` does not fit the model, a label goes beyond
            its classes, or a term is not finite.
    """
    check_direction(model, direction)
    indices = draw_samples(data, samples, seed)

    def compute(size: int) -> Tensor:
        total = torch.zeros(4, dtype=torch.float64, device=device_of(model))
        for images, labels in batches(data, size, device_of(model), indices):
            terms = _batch_terms(model, direction, paired(images), paired(labels))
            total += terms / len(paired(images)) * len(images)
        return total

    # The fused attention kernels have no second derivative; the plain one has.
    with undisturbed(model), sdpa_kernel(SDPBackend.MATH):
        loss, gradient, hessian, ggn = (
            fitting_batches(compute, batch_size) / len(indices)
        ).tolist()
    terms = DirectionalTerms(loss, gradient, hessian, ggn, len(indices))
    if not all(map(math.isfinite, (loss, gradient, hessian, ggn))):
        raise NonFiniteError(f"{terms}: look for non-finite weights, images or directions")
    return terms


def check_direction(model: nn.Module, direction: Mapping[str, Tensor]) -> None:
    """Refuse a direction that does not fit the model's parameters.

    Raises:
        ValueError: if it is empty, or a name or shape is none of the model's.
    """
    if not direction:
        raise ValueError("the direction names no parameter")
    parameters = dict(model.named_parameters())
    for name, value in direction.items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise ValueError(
                f"direction {name!r} {tuple(value.shape)} is no parameter of the model"
            )


def _batch_terms(
    model: nn.Module, direction: Mapping[str, Tensor], images: Tensor, labels: Tensor
) -> Tensor:
    """Sums over the batch of loss, gᵀv, vᵀHv and vᵀGv, in float64."""
    weights = {
        name: p.detach().requires_grad_()
        for name, p in model.named_parameters()
        if name in direction
    }
    vectors = [direction[name] for name in weights]
    with torch.enable_grad():
        logits = functional_call(model, weights, (images,))
        check_labels(labels, logits.shape[1])
        loss = F.cross_entropy(logits, labels, reduction="sum")
        gradients = _gradients(loss, list(weights.values()), create_graph=True)
        slope = sum_of_products(gradients, vectors)
        products = _gradients(slope, list(weights.values()))
        along = torch.zeros_like(logits, requires_grad=True)
        pulled = _gradients(logits, list(weights.values()), along, create_graph=True)
        (tangent,) = _gradients(sum_of_products(pulled, vectors), [along])
    p = logits.detach().softmax(1)
    # Centred first: the difference of E t² and (E t)² loses digits when all logits move alike.
    centred = tangent - (p * tangent).sum(1, keepdim=True)
    spread = (p * centred.square()).sum(1)
    terms = [loss.detach(), slope.detach(), sum_of_products(products, vectors), spread.sum()]
    return torch.stack([term.double() for term in terms])


def _gradients(
    value: Tensor,
    weights: list[Tensor],
    cotangent: Tensor | None = None,
    *,
    create_graph: bool = False,
) -> tuple[Tensor, ...]:
    """Gradients, zero for weights that ``value`` does not depend on."""
    if not value.requires_grad:
        return tuple(torch.zeros_like(weight) for weight in weights)
    return torch.autograd.grad(
        value,
        weights,
        cotangent,
        create_graph=create_graph,
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )


def sum_of_products(left: tuple[Tensor, ...] | list[Tensor], right: list[Tensor]) -> Tensor:
    """Inner product of two lists of tensors."""
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()
