"""Scores from the curvature of the loss: optimal brain damage and optimal brain surgeon.

Optimal brain damage: removing weight w_i moves the parameters by −w_i e_i. At a minimum of the
loss, and with a diagonal Hessian H, the loss rises by ½ w_i² H_ii (LeCun, Denker & Solla 1990).

Optimal brain surgeon: if the other weights of a block follow, it rises by w_i² / (2 [H⁻¹]_ii) with
the block's H (Hassibi & Stork 1993; Kurtic et al. 2022, "The optimal BERT surgeon").
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pai_utils.curvature.blocks import fisher_blocks
from pai_utils.curvature.diagonals import fisher_diagonal, ggn_diagonal, output_diagonal
from pai_utils.curvature.hutchinson import hutchinson_diagonal
from pai_utils.curvature.products import HessianOperator
from pai_utils.models.encoders import Classifier
from pai_utils.support.common import at_least_single, logger
from pai_utils.support.sampling import Draw, Samples


def fisher_diag(
    model: nn.Module, names: Sequence[str], data: Samples, draw: Draw
) -> dict[str, Tensor]:
    """½ w² · mean over samples of g², g the gradient with the true label (empirical Fisher).

    Source: Theis et al. (2018), "Faster gaze prediction with dense networks and Fisher pruning".
    """
    return _saliency(model, fisher_diagonal(model, names, data, draw))


def ggn_diag(
    model: nn.Module,
    names: Sequence[str],
    data: Samples,
    draw: Draw,
    *,
    estimator: str = "mc",
    draws: int = 1,
) -> dict[str, Tensor]:
    """½ w² · diagonal of the Gauss-Newton matrix of the mean cross-entropy.

    Options and errors are those of :func:`~pai_utils.curvature.diagonals.ggn_diagonal`.

    Source: LeCun, Denker & Solla (1990), "Optimal brain damage", whose diagonal also drops what can
    be negative of the Hessian.
    """
    diagonal = ggn_diagonal(model, names, data, draw, estimator=estimator, draws=draws)
    return _saliency(model, diagonal)


def feature_ggn_diag(
    model: nn.Module,
    names: Sequence[str],
    data: Samples,
    draw: Draw,
    *,
    estimator: str = "mc",
    draws: int = 1,
) -> dict[str, Tensor]:
    """½ w² · diagonal of the Gauss-Newton matrix of the features' squared change.

    The features are a :class:`~pai_utils.models.encoders.Classifier`'s input to its head, and the
    outputs of any other model. Head and labels do not matter: the score protects the whole
    representation, since a later task may use any part of it. Weights of the head score zero.
    Options and errors are those of :func:`~pai_utils.curvature.diagonals.output_diagonal`. The
    score is our own.
    """
    encoder, prefix = (
        (model.backbone, "backbone.") if isinstance(model, Classifier) else (model, "")
    )
    inner = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    diagonal = output_diagonal(encoder, inner, data, draw, estimator=estimator, draws=draws)
    parameters = dict(model.named_parameters())
    found = {prefix + name: values for name, values in diagonal.items()}
    return _saliency(
        model,
        {n: found[n] if n in found else torch.zeros_like(parameters[n]) for n in names},
    )


def hessian_diag(
    model: nn.Module,
    names: Sequence[str],
    data: Samples,
    draw: Draw,
    *,
    probes: int = 64,
    tolerance: float = 0.1,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """½ w² · diag H of the mean cross-entropy, by Hutchinson's estimator, with standard errors.

    Unlike the Gauss-Newton diagonal, the Hessian's has a sign. A weight with H_ii < 0 has a
    negative score: by the quadratic model its removal lowers the loss, and it is pruned first.

    Stops after ``probes`` Hessian products, or earlier once the relative standard error of the
    diagonal (see :func:`~pai_utils.curvature.hutchinson.hutchinson_diagonal`) is at most
    ``tolerance``. The standard error of a score is ½ w² times that of its H_ii; it covers the
    probes, not the draw of samples.

    Source: LeCun, Denker & Solla (1990), "Optimal brain damage". Their recursion from layer to
    layer drops the Hessian's other entries on the way; the estimate here is unbiased.
    """
    operator = HessianOperator(model, names, data, draw)
    estimate = hutchinson_diagonal(operator, probes=probes, tolerance=tolerance, seed=draw.seed)
    logger.info(
        "hessian_diag: relative standard error %.3g after %d probes%s",
        estimate.relative_error,
        estimate.probes,
        "" if estimate.converged else f", above the tolerance {tolerance}; more probes lower it",
    )
    return _saliency(model, estimate.diagonal), _saliency(model, estimate.standard_error)


def block_fisher(
    model: nn.Module,
    names: Sequence[str],
    data: Samples,
    draw: Draw,
    *,
    block_size: int = 64,
    damping: float = 1e-2,
    estimator: str = "empirical",
    memory_budget: int = 4 * 2**30,
) -> dict[str, Tensor]:
    """w² / (2 [F⁻¹]_ii) with a damped Fisher matrix F in blocks; zero in blocks of zero gradients.

    Options and errors are those of :func:`~pai_utils.curvature.blocks.fisher_blocks`.
    """
    weights = {name: model.get_parameter(name).detach() for name in names}
    scores = {
        # At least float32: increases span too many orders of magnitude for half precision.
        name: weight.new_empty(weight.shape, dtype=at_least_single(weight))
        for name, weight in weights.items()
    }
    for blocks in fisher_blocks(
        model,
        names,
        data,
        draw,
        block_size=block_size,
        damping=damping,
        estimator=estimator,
        memory_budget=memory_budget,
    ):
        part = slice(blocks.start, blocks.stop)
        flat = weights[blocks.name].flatten()[part]
        scores[blocks.name].view(-1)[part] = blocks.saliency(flat)
        del blocks  # before the next pass asks for its memory
    return scores


def _saliency(model: nn.Module, diagonal: dict[str, Tensor]) -> dict[str, Tensor]:
    """½ w² h for each weight w and its diagonal entry h, which it overwrites."""
    return {
        name: values.mul_(model.get_parameter(name).detach().square()).mul_(0.5)
        for name, values in diagonal.items()
    }
