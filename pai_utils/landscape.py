"""The loss around the pre-trained weights: what the quadratic model predicts, what is measured.

Pruning moves the weights by δ = (m − 1) ⊙ θ₀. To second order

    L(θ₀ + αδ) − L(θ₀) ≈ α gᵀδ + ½ α² δᵀHδ,

and replacing H by the Gauss-Newton matrix G, or by the diagonal of G, drops what the scores drop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor, nn

from pai_utils.curvature.diagonals import ggn_diagonal
from pai_utils.curvature.products import check_direction, directional_terms
from pai_utils.evaluation import evaluate
from pai_utils.execution import Samples, draw_samples
from pai_utils.masks import Mask


def pruning_direction(model: nn.Module, mask: Mask) -> dict[str, Tensor]:
    """δ = (m − 1) ⊙ θ: the step from the dense to the pruned weights."""
    mask._check(parameters := dict(model.named_parameters()))
    return {
        name: parameters[name].detach().masked_fill(entry.to(parameters[name].device), 0).neg()
        for name, entry in mask.items()
    }


def predicted_and_measured(
    model: nn.Module,
    direction: Mapping[str, Tensor],
    data: Samples,
    *,
    fractions: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    samples: int | None = 128,
    batch_size: int = 64,
    seed: int = 0,
    diagonal: Mapping[str, Tensor] | None = None,
) -> pd.DataFrame:
    """Loss increase along a direction: predicted by quadratic models and measured.

    All quantities are over the same samples. Predictions with gradient, Hessian and Gauss-Newton
    matrix are exact up to rounding; the diagonal is a Monte Carlo estimate with one label a
    sample. Costs about seven forward and backward passes, and one forward a fraction.

    Args:
        model: the dense model, left as it was.
        direction: δ, as from :func:`pruning_direction`.
        data: labelled samples.
        fractions: values of α.
        samples: size of the seeded draw; ``None`` for all.
        batch_size: samples a forward.
        seed: seed of the draw and of the labels.
        diagonal: diag(G) if it is at hand, as from
            :func:`~pai_utils.curvature.diagonals.ggn_diagonal` on the same draw; it is the same
            for every direction.

    Returns:
        One row an α: ``fraction, gradient, hessian, ggn, diagonal, measured, dense_loss, count``
        in nats: α gᵀδ; α gᵀδ + ½ α² δᵀHδ; ½ α² δᵀGδ; ½ α² δᵀ diag(G) δ; and the measured
        difference.
    """
    settings = {"samples": samples, "batch_size": batch_size, "seed": seed}
    terms = directional_terms(model, direction, data, **settings)  # type: ignore[arg-type]
    if diagonal is None:
        diagonal = ggn_diagonal(model, list(direction), data, **settings)  # type: ignore[arg-type]
    own = sum(
        float((diagonal[n].double() * d.double().square()).sum()) for n, d in direction.items()
    )
    drawn = torch.utils.data.Subset(data, draw_samples(data, samples, seed).tolist())
    losses = losses_along(model, direction, drawn, fractions, batch_size=batch_size)
    return pd.DataFrame(
        {
            "fraction": alpha,
            "gradient": alpha * terms.gradient,
            "hessian": alpha * terms.gradient + alpha**2 * terms.hessian / 2,
            "ggn": alpha**2 * terms.ggn / 2,
            "diagonal": alpha**2 * own / 2,
            "measured": loss - terms.loss,
            "dense_loss": terms.loss,
            "count": terms.count,
        }
        for alpha, loss in zip(fractions, losses, strict=True)
    )


def losses_along(
    model: nn.Module,
    direction: Mapping[str, Tensor],
    data: Samples,
    fractions: Sequence[float],
    *,
    batch_size: int = 64,
) -> list[float]:
    """Mean loss at θ + αδ for every α; the weights return bit for bit.

    Raises:
        ValueError: if the direction does not fit the model or a loss is not finite.
    """
    check_direction(model, direction)
    parameters = dict(model.named_parameters())
    origin = {name: parameters[name].detach().clone() for name in direction}
    losses = []
    try:
        for alpha in fractions:
            with torch.no_grad():
                for name, start in origin.items():
                    parameters[name].copy_(start + alpha * direction[name])
            losses.append(evaluate(model, data, batch_size=batch_size).loss)
    finally:
        with torch.no_grad():
            for name, start in origin.items():
                parameters[name].copy_(start)
    return losses


def rank_agreement(table: pd.DataFrame) -> pd.DataFrame:
    """Spearman rank correlation between predicted and measured loss increases at the full step.

    Args:
        table: rows of :func:`predicted_and_measured` for several directions or tasks.

    Returns:
        One row a prediction: ``prediction, correlation, count``; the correlation is not a number
        for fewer than three rows.
    """
    from scipy.stats import spearmanr

    full = table[table.fraction == table.fraction.max()]
    return pd.DataFrame(
        {
            "prediction": name,
            "correlation": float(spearmanr(full[name], full.measured).statistic)
            if len(full) > 2
            else float("nan"),
            "count": len(full),
        }
        for name in ("gradient", "hessian", "ggn", "diagonal")
    )
