"""Labels whose loss gradients make a Fisher matrix: the true ones, or ones drawn from the model.

Both are cotangents for :mod:`pai_utils.curvature.persample`: the gradient of the cross-entropy at
the logits z, softmax(z) − e_y. With true labels y the mean of g gᵀ is the empirical Fisher; with
labels drawn from the model it estimates the Fisher, which is the GGN for cross-entropy
(Kunstner et al. 2019, "Limitations of the empirical Fisher approximation").
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pai_utils.support.sampling import check_labels


class TrueLabels:
    """Cotangents of the data's labels; call :meth:`check` when all have been seen."""

    def __init__(self, device: torch.device) -> None:
        self._lowest, self._highest = torch.zeros(2, dtype=torch.long, device=device)
        self._classes = 0

    def __call__(self, logits: Tensor, labels: Tensor, rows: Tensor) -> Iterator[Tensor]:
        """The one cotangent ``[B, C]`` of a batch."""
        self._classes = logits.shape[1]
        torch.minimum(self._lowest, labels.min(), out=self._lowest)
        torch.maximum(self._highest, labels.max(), out=self._highest)
        yield residual(logits, labels)

    def check(self) -> None:
        """Refuse labels that the model cannot give: once, so that a GPU does not wait each batch.

        Raises:
            ValueError: if a label seen goes beyond the model's classes.
        """
        if self._classes:  # none seen where the logits do not depend on any weight looked at
            check_labels(torch.stack([self._lowest, self._highest]), self._classes)


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
