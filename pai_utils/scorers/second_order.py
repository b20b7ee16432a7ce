"""Scores from the curvature of the loss: optimal brain damage and optimal brain surgeon.

Optimal brain damage: removing weight w_i moves the parameters by −w_i e_i. At a minimum of the
loss, and with a diagonal Hessian H, the loss rises by ½ w_i² H_ii (LeCun, Denker & Solla 1990).

Optimal brain surgeon: if the other weights of a block follow, it rises by w_i² / (2 [H⁻¹]_ii) with
the block's H (Hassibi & Stork 1993; Kurtic et al. 2022, "The optimal BERT surgeon").

Damping: H_ii is a derivative at the present weights, and removing a weight is a finite step. A unit
that is off on every image has H_ii = 0 for all its weights, although without them it may switch on.
So every score here adds to the diagonal of H ``damping`` times its mean (of absolute values) over
the weight's tensor: a curvature that no image of the source can take away.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pai_utils.curvature.blocks import DAMPING, fisher_blocks
from pai_utils.curvature.diagonals import (
    fisher_diagonal,
    ggn_diagonal,
    is_piecewise_linear,
    output_diagonal,
)
from pai_utils.models.encoders import Classifier
from pai_utils.support.common import at_least_single, device_of
from pai_utils.support.sampling import Draw, Samples, batches


def fisher_diag(
    model: nn.Module, names: Sequence[str], data: Samples, draw: Draw, *, damping: float = DAMPING
) -> dict[str, Tensor]:
    """½ w² (h + λ), h the mean over samples of g², g the gradient with the true label.

    Source: Theis et al. (2018), "Faster gaze prediction with dense networks and Fisher pruning".
    """
    return _saliency(model, fisher_diagonal(model, names, data, draw), damping)


def ggn_diag(
    model: nn.Module,
    names: Sequence[str],
    data: Samples,
    draw: Draw,
    *,
    estimator: str = "mc",
    draws: int = 1,
    damping: float = DAMPING,
) -> dict[str, Tensor]:
    """½ w² (h + λ), h the diagonal of the Gauss-Newton matrix of the mean cross-entropy.

    Options and errors are those of :func:`~pai_utils.curvature.diagonals.ggn_diagonal`.

    Source: LeCun, Denker & Solla (1990), "Optimal brain damage", whose diagonal also drops what can
    be negative of the Hessian.
    """
    diagonal = ggn_diagonal(model, names, data, draw, estimator=estimator, draws=draws)
    return _saliency(model, diagonal, damping)


def feature_ggn_diag(
    model: nn.Module,
    names: Sequence[str],
    data: Samples,
    draw: Draw,
    *,
    estimator: str = "mc",
    draws: int = 1,
    damping: float = DAMPING,
) -> dict[str, Tensor]:
    """½ w² (h + λ), h the diagonal of the Gauss-Newton matrix of the features' squared change.

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
    found = output_diagonal(encoder, inner, data, draw, estimator=estimator, draws=draws)
    diagonal = {name: torch.zeros_like(model.get_parameter(name)) for name in names}
    diagonal |= {prefix + name: values for name, values in found.items()}
    return _saliency(model, diagonal, damping)


def hessian_diag(
    model: nn.Module, names: Sequence[str], data: Samples, draw: Draw, *, damping: float = DAMPING
) -> dict[str, Tensor]:
    """½ w² (h + λ), h the diagonal of the Hessian of the mean cross-entropy.

    Only where the logits are piecewise linear in each weight tensor, as ReLU, max-pooling and
    BatchNorm in evaluation mode make them
    (:func:`~pai_utils.curvature.diagonals.is_piecewise_linear`). There the diagonal is that of the
    Gauss-Newton matrix, exactly, with one backward a class.

    Elsewhere the diagonal has no exact form of that cost, and its estimates from random signs have
    the variance of H's other entries: hundreds of times the spread of the scores.

    Source: LeCun, Denker & Solla (1990), "Optimal brain damage", whose recursion from layer to
    layer drops the Hessian's other entries on the way.

    Raises:
        ValueError: if the logits bend in a weight tensor.
    """
    images, _ = next(batches(data, 2, device_of(model), draw.indices(data)[:2]))
    if not is_piecewise_linear(model, names, images):
        raise ValueError(
            "hessian_diag: the logits bend in single weights (GELU, LayerNorm, attention, gates or "
            "a weight used twice), where the Hessian's diagonal has no cheap exact form and its "
            "estimates are noise; take 'ggn_diag', the part of it that is never negative"
        )
    return _saliency(model, ggn_diagonal(model, names, data, draw, estimator="exact"), damping)


def block_fisher(
    model: nn.Module,
    names: Sequence[str],
    data: Samples,
    draw: Draw,
    *,
    block_size: int = 64,
    damping: float = DAMPING,
    estimator: str = "empirical",
    memory_budget: int = 4 * 2**30,
) -> dict[str, Tensor]:
    """w² / (2 [F⁻¹]_ii) with a damped Fisher matrix F in blocks of consecutive weights.

    Options and errors are those of :func:`~pai_utils.curvature.blocks.fisher_blocks`.
    """
    scores = {}
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
        weight = model.get_parameter(blocks.name).detach()
        # At least float32: increases span too many orders of magnitude for half precision.
        found = blocks.saliency(weight.flatten()).to(at_least_single(weight))
        scores[blocks.name] = found.view(weight.shape)
        del blocks  # before the next pass asks for its memory
    return scores


def _saliency(model: nn.Module, diagonal: dict[str, Tensor], damping: float) -> dict[str, Tensor]:
    """½ w² (h + λ) for each weight w and its diagonal entry h, which it overwrites."""
    return {
        name: values.add_(damping * values.abs().mean())
        .mul_(model.get_parameter(name).detach().square())
        .mul_(0.5)
        for name, values in diagonal.items()
    }
