"""``ntk_sap``: the weights that the spectrum of the neural tangent kernel depends on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pai_utils.support.common import device_of, progress, undisturbed, unknown_name
from pai_utils.support.sampling import (
    Samples,
    batches,
    draw_samples,
    fitting_batches,
    paired,
    share_of_work,
    sum_over_processes,
)

INPUTS = ("data", "noise")


def ntk_sap(
    model: nn.Module,
    names: Sequence[str],
    data: Samples,
    *,
    samples: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    epsilon: float = 0.01,
    perturbations: int = 1,
    inputs: str = "data",
) -> dict[str, Tensor]:
    """``|∂/∂m E ‖f(x; θ ⊙ m) − f(x; (θ + Δθ) ⊙ m)‖²|`` at the mask m = 1, with Δθ ~ N(0, ε² I).

    For small ε the expectation is ε² times the trace of the neural tangent kernel of the weights
    that m keeps, which is its nuclear norm. f are the logits; only the prunable weights are
    perturbed. The absolute value is taken last, of the mean over samples and perturbations.

    The paper averages over random weights, since it prunes untrained networks, and its code draws
    them anew before every batch. Here the weights are those of the model: the kernel looked at is
    the pre-trained network's. A weight that is exactly zero counts as pruned: it is not perturbed,
    and its score is zero.

    All is computed in float64: the score is a difference of differences, of relative size ε².
    Costs two forward and backward passes a sample and perturbation.

    Source: Wang, Li & Sun (2023), "NTK-SAP: improving neural network pruning by aligning training
    dynamics".

    ``epsilon`` is the standard deviation ε, 0.01 in the authors' examples. A smaller one is no
    better for a network with ReLU: the derivative of the kernel then comes from the few gates that
    Δθ flips, so that its variance grows. Each of ``perturbations`` draws of Δθ is used for all
    samples. ``inputs="data"`` takes the images drawn, ``"noise"`` standard normal ones of their
    shape and number, as the paper does.

    Raises:
        ValueError: if ``epsilon`` is not positive and finite, ``perturbations`` is below one or
            ``inputs`` unknown.
    """
    if not 0 < epsilon < float("inf"):
        raise ValueError(f"epsilon={epsilon} must be positive and finite")
    if perturbations < 1:
        raise ValueError(f"perturbations={perturbations}: at least one is needed")
    if inputs not in INPUTS:
        raise unknown_name("inputs", inputs, INPUTS)
    device = device_of(model)
    indices = draw_samples(data, samples, seed)
    share = share_of_work(len(indices))
    values = {name: _double(t) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    weights = {name: values[name].requires_grad_() for name in names}

    def images_of(size: int) -> Iterable[Tensor]:
        if len(share) == 0:  # fewer samples than processes
            return
        loaded = batches(data, size, device, indices[share])
        for (images, _), rows in zip(loaded, share.split(size), strict=True):
            yield _noise(images, rows, seed) if inputs == "noise" else images.double()

    def compute(size: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        totals = {name: torch.zeros_like(w, requires_grad=False) for name, w in weights.items()}
        for _ in range(perturbations):
            moved = _perturbed(weights, epsilon, generator)
            steps = progress(images_of(size), "ntk_sap", total=-(-len(share) // size))
            for images in steps:
                gradients = _change_gradients(model, values, weights, moved, images)
                for name, total in totals.items():
                    at_weights, at_moved = gradients[name]
                    # Both networks are masked: ∂/∂m = θ ∂/∂θ + (θ + Δθ) ∂/∂(θ + Δθ).
                    total.addcmul_(weights[name].detach(), at_weights)
                    total.addcmul_(moved[name].detach(), at_moved)
        return totals

    with undisturbed(model):
        totals = sum_over_processes(fitting_batches(compute, batch_size))
    parameters = dict(model.named_parameters())
    return {
        name: (total / (len(indices) * perturbations))
        .abs_()
        .to(torch.promote_types(parameters[name].dtype, torch.float32))
        for name, total in totals.items()
    }


def _change_gradients(
    model: nn.Module,
    values: dict[str, Tensor],
    weights: dict[str, Tensor],
    moved: dict[str, Tensor],
    images: Tensor,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Gradients of Σ_n ‖f(x_n; θ) − f(x_n; θ + Δθ)‖² at either set of weights."""
    inputs = paired(images)
    with torch.enable_grad():
        logits = functional_call(model, values, (inputs,))
        change = (logits - functional_call(model, {**values, **moved}, (inputs,))).square().sum()
    change = change * (len(images) / len(inputs))
    leaves = [*weights.values(), *moved.values()]
    if not change.requires_grad:
        return {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in weights.items()}
    gradients = torch.autograd.grad(change, leaves, allow_unused=True, materialize_grads=True)
    halves = gradients[: len(weights)], gradients[len(weights) :]
    return dict(zip(weights, zip(*halves, strict=True), strict=True))


def _perturbed(
    weights: dict[str, Tensor], epsilon: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """θ + Δθ; drawn on the CPU, so that one seed means the same Δθ on every device."""
    moved = {}
    for name, weight in weights.items():
        step = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        step = step.to(weight.device).mul_(epsilon).mul_(weight.detach() != 0)
        moved[name] = (weight.detach() + step).requires_grad_()
    return moved


def _noise(images: Tensor, rows: Tensor, seed: int) -> Tensor:
    """Standard normal images; a sample's does not depend on the batches."""
    drawn = [
        torch.randn(
            images.shape[1:],
            # Apart from the generator of the perturbation, whose seed is below 2³².
            generator=torch.Generator().manual_seed(((row + 1) << 32) + seed),
            dtype=torch.float64,
        )
        for row in rows.tolist()
    ]
    return torch.stack(drawn).to(images.device)


def _double(tensor: Tensor) -> Tensor:
    """A detached copy in float64; anything but a floating-point tensor as it is."""
    tensor = tensor.detach()
    return tensor.to(torch.float64, copy=True) if tensor.is_floating_point() else tensor
