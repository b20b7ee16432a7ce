"""Labels whose loss gradients make a Fisher matrix: the true ones, or ones drawn from the model.

With true labels y the mean of g gᵀ is the empirical Fisher; with labels drawn from the model it
estimates the Fisher, which is the GGN for cross-entropy (Kunstner et al. 2019, "Limitations of the
empirical Fisher approximation").
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pai_utils.support.contract import check_labels


def true_labels(logits: Tensor, labels: Tensor, rows: Tensor) -> Iterator[Tensor]:
    """The one cotangent ``[B, C]`` of the data's labels.

    Raises:
        ValueError: if a label goes beyond the model's classes.
    """
    check_labels(labels, logits.shape[1])
    yield residual(logits, labels)


class DrawnLabels:
    """Cotangents of ``draws`` labels a sample, drawn from the model; each is over √draws."""

    def __init__(self, samples: int, draws: int, seed: int) -> None:
        # Drawn for all samples beforehand, so that a sample's labels do not depend on the batches.
        generator = torch.Generator().manual_seed(seed)
        self._uniform = torch.rand(samples, draws, generator=generator, dtype=torch.float64)

    def __call__(self, logits: Tensor, labels: Tensor, rows: Tensor) -> Iterator[Tensor]:
        """One cotangent ``[B, C]`` a draw; ``rows`` say which samples these are."""
        cumulative = logits.double().softmax(1).cumsum(1)
        thresholds = self._uniform[rows.cpu()].to(logits.device)
        drawn = torch.searchsorted(cumulative, thresholds).clamp_max(logits.shape[1] - 1)
        for column in drawn.unbind(1):
            yield residual(logits, column) / self._uniform.shape[1] ** 0.5


def residual(logits: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the cross-entropy at the logits: p − e_y, ``[B, C]``."""
    classes = torch.arange(logits.shape[1], device=logits.device)
    return logits.softmax(1) - (labels[:, None] == classes).to(logits.dtype)
