"""Optimal brain damage as first written: ½ w² H_ii with the Hessian's own diagonal.

Unlike the Gauss-Newton diagonal it has a sign. A weight with H_ii < 0 has a negative score: by the
quadratic model its removal lowers the loss, and it is pruned first.

Source: LeCun, Denker & Solla (1990), "Optimal brain damage". Their recursion from layer to layer
drops the Hessian's other entries on the way; the estimate here is unbiased.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from pai_utils.curvature.hutchinson import hutchinson_diagonal
from pai_utils.curvature.products import GRAPH_MEMORY, HessianOperator
from pai_utils.support.common import logger
from pai_utils.support.sampling import Draw, Samples


@dataclass(frozen=True)
class EstimatedScores:
    """Scores with a known sampling error, as a scorer returns them."""

    scores: dict[str, Tensor]
    standard_error: dict[str, Tensor]  #: of each score


def hessian_diag(
    model: nn.Module,
    names: Sequence[str],
    data: Samples,
    *,
    samples: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    probes: int = 64,
    tolerance: float = 0.1,
    memory: int = GRAPH_MEMORY,
) -> EstimatedScores:
    """½ w² · diag H of the mean cross-entropy, by Hutchinson's estimator; may be negative.

    Stops after ``probes`` Hessian products, or earlier once the relative standard error of the
    diagonal (see :func:`~pai_utils.curvature.hutchinson.hutchinson_diagonal`) is at most
    ``tolerance``. The standard error of a score is ½ w² times that of its H_ii; it covers the
    probes, not the draw of samples. ``memory`` as in
    :class:`~pai_utils.curvature.products.CurvatureOperator`.

    Raises:
        ValueError: as :func:`~pai_utils.curvature.hutchinson.hutchinson_diagonal`.
    """
    draw = Draw(samples, batch_size, seed)
    operator = HessianOperator(model, names, data, draw, memory=memory)
    estimate = hutchinson_diagonal(operator, probes=probes, tolerance=tolerance, seed=seed)
    logger.info(
        "hessian_diag: relative standard error %.3g after %d probes%s",
        estimate.relative_error,
        estimate.probes,
        "" if estimate.converged else f", above the tolerance {tolerance}; more probes lower it",
    )
    half = {name: w.detach().square() / 2 for name, w in operator.parameters.items()}
    return EstimatedScores(
        {name: half[name] * values for name, values in estimate.diagonal.items()},
        {name: half[name] * values for name, values in estimate.standard_error.items()},
    )
