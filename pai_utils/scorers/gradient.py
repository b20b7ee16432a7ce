"""Scores from the gradient of the mean loss: ``snip`` and ``grasp``.

Both take the gradient g of the loss over *all* samples drawn, summed over the batches before
anything is made of it, so that neither depends on the batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from pai_utils.curvature.products import HessianOperator
from pai_utils.support.common import device_of, progress, undisturbed
from pai_utils.support.sampling import (
    Draw,
    Samples,
    batches,
    check_labels,
    draw_samples,
    fitting_batches,
    paired,
    share_of_work,
    sum_over_processes,
)


def snip(
    model: nn.Module,
    names: Sequence[str],
    data: Samples,
    *,
    samples: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """``|w g|``, g the gradient of the mean cross-entropy: the first-order change when w goes.

    Source: Lee, Ajanthan & Torr (2019), "SNIP: single-shot network pruning based on connection
    sensitivity". Theirs are divided by their sum, which changes no order. One forward and
    backward pass a sample.
    """
    indices = draw_samples(data, samples, seed)
    share = indices[share_of_work(len(indices))]
    values = {name: p.detach() for name, p in model.named_parameters()}
    # Detached once more, since only these leaves ask for a gradient; storage is shared.
    leaves = {name: values[name].detach().requires_grad_() for name in names}

    def compute(size: int) -> dict[str, Tensor]:
        totals = {
            name: torch.zeros_like(w.detach(), dtype=torch.promote_types(w.dtype, torch.float32))
            for name, w in leaves.items()
        }
        if not len(share):  # fewer samples than processes
            return totals
        loaded = batches(data, size, device_of(model), share)
        for images, labels in progress(loaded, "snip", total=-(-len(share) // size)):
            with torch.enable_grad():
                logits = functional_call(model, {**values, **leaves}, (paired(images),))
                check_labels(labels, logits.shape[1])
                mean = F.cross_entropy(logits, paired(labels))
                loss = mean * (len(images) / len(indices))
            if loss.requires_grad:
                gradients = torch.autograd.grad(
                    loss, list(leaves.values()), allow_unused=True, materialize_grads=True
                )
                for name, gradient in zip(leaves, gradients, strict=True):
                    totals[name] += gradient
        return totals

    with undisturbed(model):
        gradient = sum_over_processes(fitting_batches(compute, batch_size))
    return {name: g.mul_(values[name]).abs_() for name, g in gradient.items()}


def grasp(
    model: nn.Module,
    names: Sequence[str],
    data: Samples,
    *,
    samples: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """Signed w ⊙ Hg, with gradient g and Hessian H of the mean cross-entropy.

    Removing w changes the squared gradient norm gᵀg by −2 w (Hg) to first order. The original
    removes the weights with the largest −w ⊙ Hg, whose removal raises the norm most or lowers it
    least; what is kept are the largest w ⊙ Hg. Many public versions have the sign the other way
    round.

    The same g, of all samples drawn, multiplies the Hessian of every batch. Counted in products of
    matrices, a batch costs three forward and backward passes, since gradient and product share a
    graph; those whose graphs do not fit in 4 GiB together cost four.

    Source: Wang, Zhang & Grosse (2020), "Picking winning tickets before training by preserving
    gradient flow".

    ``temperature`` divides the logits. The authors' code takes 200, which all but levels the
    predicted probabilities; 1 is the loss itself.

    Raises:
        ValueError: if ``temperature`` is not positive and finite.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be positive and finite")
    operator = _TemperedHessian(model, names, data, Draw(samples, batch_size, seed))
    operator.temperature = temperature
    product = operator(operator.gradient())
    return {name: product[name].mul_(weight) for name, weight in operator.parameters.items()}


class _TemperedHessian(HessianOperator):
    """Hessian of the mean cross-entropy of divided logits."""

    bar = "grasp"
    temperature = 1.0

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().loss(logits / self.temperature, labels)
