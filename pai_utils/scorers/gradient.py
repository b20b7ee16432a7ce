"""Scores from the gradient of the mean loss: ``snip`` and ``grasp``.

Both take the gradient g of the loss over *all* samples drawn, summed over the batches before
anything is made of it, so that neither depends on the batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pai_utils.curvature.second_derivatives import FastSecondDerivatives
from pai_utils.execution import (
    Samples,
    batches,
    check_labels,
    device_of,
    draw_samples,
    fitting_batches,
    paired,
    progress,
    share_of_work,
    sum_over_processes,
    undisturbed,
)

_Batch = tuple[Tensor, Tensor]


def snip(
    model: nn.Module,
    names: Sequence[str],
    data: Samples,
    *,
    samples: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """|w g|, g the gradient of the mean cross-entropy: the first-order change when w goes.

    Source: Lee, Ajanthan & Torr (2019), "SNIP: single-shot network pruning based on connection
    sensitivity". Theirs are divided by their sum, which changes no order. One forward and
    backward pass a sample.
    """
    loss = _Loss(model, names, data, samples, batch_size, seed)
    with undisturbed(model):
        gradient = loss.gradient()
    return {name: (loss.leaves[name].detach() * g).abs_() for name, g in gradient.items()}


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
    matrices, one batch costs three forward and backward passes, since gradient and product share
    a graph; several batches cost 11/3.

    Source: Wang, Zhang & Grosse (2020), "Picking winning tickets before training by preserving
    gradient flow".

    ``temperature`` divides the logits. The authors' code takes 200, which all but levels the
    predicted probabilities; 1 is the loss itself.

    Raises:
        ValueError: if ``temperature`` is not positive and finite.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be positive and finite")
    loss = _Loss(model, names, data, samples, batch_size, seed, temperature)
    # In half precision, products of differences would keep few digits, as in `HessianOperator`.
    with undisturbed(model), torch.autocast(device_of(model).type, enabled=False):
        gradient = loss.gradient(keep_graph=True)
        product = loss.hessian_product(gradient)
    return {name: (loss.leaves[name].detach() * p) for name, p in product.items()}


class _Loss:
    """Mean cross-entropy of a draw, as a function of the named weights.

    To be used inside :func:`~pai_utils.execution.undisturbed`. Under ``torchrun`` each process
    takes its share of the samples; gradients and products are those of all.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        data: Samples,
        samples: int | None,
        batch_size: int,
        seed: int,
        temperature: float = 1.0,
    ) -> None:
        self._model = model
        self._data = data
        self._indices = draw_samples(data, samples, seed)
        self._share = share_of_work(len(self._indices))
        self._batch_size = batch_size
        self._temperature = temperature
        self._values = {name: p.detach() for name, p in model.named_parameters()}
        # Detached once more, since only these leaves ask for a gradient; storage is shared.
        self.leaves = {name: self._values[name].detach().requires_grad_() for name in names}
        self._kept: tuple[Tensor, ...] | None = None

    def gradient(self, *, keep_graph: bool = False) -> dict[str, Tensor]:
        """Gradient of the mean loss; a single batch's graph may be kept for the product."""

        def compute(size: int) -> dict[str, Tensor]:
            totals: dict[str, Tensor] = {}
            for batch in self._batches(size):
                if keep_graph and len(self._share) <= size:
                    self._kept = gradients = self._differentiable_gradient(batch)
                else:
                    gradients = self._gradient(self._forward(batch, self.leaves), self.leaves)
                totals = self._added(totals, gradients)
            return totals or self._zeros()

        return sum_over_processes(fitting_batches(compute, self._batch_size))

    def hessian_product(self, vector: dict[str, Tensor]) -> dict[str, Tensor]:
        """Hessian of the mean loss times ``vector``."""

        def compute(size: int) -> dict[str, Tensor]:
            totals: dict[str, Tensor] = {}
            for batch in self._batches(size) if self._kept is None else [None]:
                if batch is None:
                    assert self._kept is not None
                    gradients, self._kept = self._kept, None  # built anew, should memory run out
                else:
                    gradients = self._differentiable_gradient(batch)
                pairs = [
                    (g, vector[name].to(g))
                    for name, g in zip(self.leaves, gradients, strict=True)
                    if g.requires_grad
                ]
                if pairs:  # otherwise the loss is linear in the weights
                    products = torch.autograd.grad(
                        [g for g, _ in pairs],
                        list(self.leaves.values()),
                        [v for _, v in pairs],
                        allow_unused=True,
                        materialize_grads=True,
                    )
                    totals = self._added(totals, products)
            return totals or self._zeros()

        return sum_over_processes(fitting_batches(compute, self._batch_size))

    def _batches(self, size: int) -> Iterable[_Batch]:
        if len(self._share) == 0:  # fewer samples than processes
            return ()
        loaded = batches(self._data, size, device_of(self._model), self._indices[self._share])
        return progress(loaded, "gradient", total=-(-len(self._share) // size))

    def _forward(self, batch: _Batch, weights: dict[str, Tensor]) -> Tensor:
        """The part of the mean loss that ``batch`` is."""
        images, labels = batch
        with torch.enable_grad():
            logits: Tensor = functional_call(
                self._model, {**self._values, **weights}, (paired(images),)
            )
            check_labels(labels, logits.shape[1])
            loss = F.cross_entropy(logits / self._temperature, paired(labels))
        return loss * (len(images) / len(self._indices))

    def _differentiable_gradient(self, batch: _Batch) -> tuple[Tensor, ...]:
        # The fused attention kernels have no second derivative; the plain one has.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FastSecondDerivatives():
            # Views: of a leaf's gradient the fast layers would not compute the value.
            views = {name: leaf.view_as(leaf) for name, leaf in self.leaves.items()}
            return self._gradient(self._forward(batch, views), views, create_graph=True)

    def _gradient(
        self, loss: Tensor, weights: dict[str, Tensor], *, create_graph: bool = False
    ) -> tuple[Tensor, ...]:
        if not loss.requires_grad:
            return tuple(torch.zeros_like(w) for w in weights.values())
        return torch.autograd.grad(
            loss,
            list(weights.values()),
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )

    def _zeros(self) -> dict[str, Tensor]:
        return self._added({}, map(torch.zeros_like, self.leaves.values()))

    def _added(self, totals: dict[str, Tensor], parts: Iterable[Tensor]) -> dict[str, Tensor]:
        """Sums in at least float32; not in place, since autograd may hand out its own tensors."""
        named = {
            name: part.detach().to(torch.promote_types(part.dtype, torch.float32))
            for name, part in zip(self.leaves, parts, strict=True)
        }
        return {n: totals[n] + part for n, part in named.items()} if totals else named
