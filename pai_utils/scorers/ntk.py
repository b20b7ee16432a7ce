"""``ntk_sap``: the weights that the spectrum of the neural tangent kernel depends on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pai_utils.curvature.persample import drawn_batches
from pai_utils.curvature.products import gradients
from pai_utils.support.common import at_least_single, device_of, replica
from pai_utils.support.sampling import Draw, Samples, fitting_batches, paired, sum_over_processes


def ntk_sap(
    model: nn.Module,
    names: Sequence[str],
    data: Samples,
    draw: Draw,
    *,
    epsilon: float = 0.01,
    perturbations: int = 1,
) -> dict[str, Tensor]:
    """``|∂/∂m E ‖f(x; θ ⊙ m) − f(x; (θ + Δθ) ⊙ m)‖²|`` at the mask m = 1, with Δθ ~ N(0, ε² I).

    For small ε the expectation is ε² times the trace of the neural tangent kernel of the weights
    that m keeps, which is its nuclear norm. f are the logits; only the prunable weights are
    perturbed. The absolute value is taken last, of the mean over samples and perturbations.

    The paper prunes untrained networks, averages over random weights and takes random images; here
    the kernel is that of the model's own weights on the images drawn. A weight that is exactly zero
    counts as pruned: it is not perturbed, and its score is zero. All is computed in float64, on
    copies of the model, since the score is a difference of differences, of relative size ε². Costs
    two forward and backward passes a sample and perturbation.

    Source: Wang, Li & Sun (2023), "NTK-SAP: improving neural network pruning by aligning training
    dynamics".

    ``epsilon`` is the standard deviation ε, 0.01 in the authors' examples. A smaller one is no
    better for a network with ReLU: the derivative of the kernel then comes from the few gates that
    Δθ flips, so that its variance grows.

    Raises:
        ValueError: if ``epsilon`` is not positive and finite, or ``perturbations`` is below one.
    """
    if not 0 < epsilon < float("inf"):
        raise ValueError(f"epsilon={epsilon} must be positive and finite")
    if perturbations < 1:
        raise ValueError(f"perturbations={perturbations}: at least one is needed")
    device = device_of(model)
    indices = draw.indices(data)
    plain = replica(model)
    weights = {name: plain.get_parameter(name).requires_grad_() for name in names}

    def compute(size: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(draw.seed)
        totals = {name: torch.zeros_like(w, requires_grad=False) for name, w in weights.items()}
        for _ in range(perturbations):
            other = replica(plain)
            moved = {name: other.get_parameter(name) for name in names}
            for weight in moved.values():
                # On the CPU, so that one seed means the same Δθ on every device.
                step = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
                weight.add_(step.to(device).mul_(epsilon).mul_(weight != 0)).requires_grad_()
            leaves = [*weights.values(), *moved.values()]
            for images, _, _ in drawn_batches(data, indices, size, device, "ntk_sap"):
                pair = paired(images.double())
                with torch.enable_grad():
                    change = (plain(pair) - other(pair)).square().sum()
                    change = change * (len(images) / len(pair))
                found = gradients([change], leaves)
                # Both networks are masked: ∂/∂m = θ ∂/∂θ + (θ + Δθ) ∂/∂(θ + Δθ).
                for name, leaf, gradient in zip([*weights, *moved], leaves, found, strict=True):
                    totals[name].addcmul_(leaf.detach(), gradient)
        return totals

    totals = sum_over_processes(fitting_batches(compute, draw.batch_size))
    count = len(indices) * perturbations
    return {
        name: total.div_(count).abs_().to(at_least_single(own))
        for (name, total), own in zip(totals.items(), map(model.get_parameter, names), strict=True)
    }
