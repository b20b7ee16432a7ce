"""Optimal brain damage: ½ w² H_ii with a positive semi-definite diagonal curvature H_ii.

Removing weight w_i moves the parameters by −w_i e_i; at a minimum of the loss, and with a
diagonal Hessian, the loss rises by ½ w_i² H_ii (LeCun, Denker & Solla 1990).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pai_utils.curvature.diagonals import fisher_diagonal, ggn_diagonal, output_diagonal
from pai_utils.models.encoders import Classifier
from pai_utils.support.sampling import Draw, Samples


def fisher_diag(
    model: nn.Module,
    names: Sequence[str],
    data: Samples,
    *,
    samples: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """½ w² · mean over samples of g², g the gradient with the true label (empirical Fisher).

    Source: Theis et al. (2018), "Faster gaze prediction with dense networks and Fisher pruning".

    Raises:
        ValueError: as :func:`~pai_utils.curvature.diagonals.fisher_diagonal`.
    """
    diagonal = fisher_diagonal(model, names, data, Draw(samples, batch_size, seed))
    return _saliency(model, diagonal)


def ggn_diag(
    model: nn.Module,
    names: Sequence[str],
    data: Samples,
    *,
    samples: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    estimator: str = "mc",
    draws: int = 1,
) -> dict[str, Tensor]:
    """½ w² · diagonal of the Gauss-Newton matrix of the mean cross-entropy.

    Options and errors are those of :func:`~pai_utils.curvature.diagonals.ggn_diagonal`.

    Source: LeCun, Denker & Solla (1990), "Optimal brain damage", whose diagonal also drops what can
    be negative of the Hessian.
    """
    diagonal = ggn_diagonal(
        model,
        names,
        data,
        Draw(samples, batch_size, seed),
        estimator=estimator,
        draws=draws,
    )
    return _saliency(model, diagonal)


def feature_ggn_diag(
    model: nn.Module,
    names: Sequence[str],
    data: Samples,
    *,
    samples: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    estimator: str = "mc",
    draws: int = 1,
) -> dict[str, Tensor]:
    """½ w² · diagonal of the Gauss-Newton matrix of the features' squared change.

    The features are a :class:`~pai_utils.models.encoders.Classifier`'s input to its head, and the
    outputs of any other model. No head and no label matters: what the score guards is the whole
    representation, of which any later task may use another part. Options and errors are those of
    :func:`~pai_utils.curvature.diagonals.output_diagonal`. The score is our own.
    """
    encoder, prefix = (
        (model.backbone, "backbone.") if isinstance(model, Classifier) else (model, "")
    )
    diagonal = output_diagonal(
        encoder,
        [name.removeprefix(prefix) for name in names if name.startswith(prefix)],
        data,
        Draw(samples, batch_size, seed),
        estimator=estimator,
        draws=draws,
    )
    parameters = dict(model.named_parameters())
    return _saliency(
        model,
        {
            name: diagonal[name.removeprefix(prefix)]
            if name.startswith(prefix)
            else torch.zeros_like(parameters[name])  # no feature depends on the head
            for name in names
        },
    )


def _saliency(model: nn.Module, diagonal: dict[str, Tensor]) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    return {
        name: values.mul_(parameters[name].detach().square()).mul_(0.5)
        for name, values in diagonal.items()
    }
