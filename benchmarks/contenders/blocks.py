"""Inverse diagonals of Fisher blocks from given gradients: factorised, and rank one by rank one.

Gradients are random, since neither side's work depends on their values. ResNet-50's largest
convolution, 512 × 512 × 3 × 3, has 18,432 blocks of 128; both costs are proportional to the number
of blocks once these exceed the caches, so that a CPU is given an eighth of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from benchmarks.tasks import Contender, Steps, Vector
from pai_utils.curvature.blocks import BlockFisher

BLOCK_SIZE = 128
SAMPLES = 1024
DAMPING = 1e-2
CHECKED = 8
"""Blocks that are compared with float64."""


@dataclass(frozen=True)
class Gradients:
    """Gradients ``[samples, blocks * block_size]`` of one tensor, a row a sample."""

    values: Tensor
    block_size: int = BLOCK_SIZE

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.values.device

    @property
    def memory_unit(self) -> int:
        """Bytes of the gradients."""
        return self.values.nbytes

    @property
    def blocked(self) -> Tensor:
        """``[samples, blocks, block_size]``."""
        return self.values.view(len(self.values), -1, self.block_size)

    def in_layout(self, layout: str) -> Self:
        """The same: there is one layout."""
        return self

    def to(self, target: torch.device | torch.dtype) -> Self:
        """A copy on another device or in another type."""
        return replace(self, values=self.values.to(target))

    def forward_backward(self) -> None:
        """None: there is no network."""


def draw(blocks: int) -> Gradients:
    """Random gradients of so many blocks."""
    generator = torch.Generator().manual_seed(0)
    return Gradients(torch.randn(SAMPLES, blocks * BLOCK_SIZE, generator=generator))


def ridge_of(gradients: Gradients) -> float:
    """λ: the damping times the mean square of all entries."""
    each = gradients.blocked.unbind(1)
    return DAMPING * float(torch.stack([block.double().square().mean() for block in each]).mean())


def ours(gradients: Gradients) -> Steps:
    """Streamed Gram matrices, batched Cholesky in float64."""

    def whole() -> Vector:
        blocks = BlockFisher.from_gradients(
            gradients.values, block_size=gradients.block_size, damping=DAMPING
        )
        return _checked(gradients, blocks.inverse_diagonal())

    return {"whole": whole}


def recursion(gradients: Gradients) -> Steps:
    """One rank-one update a sample of all blocks' inverses."""
    ridge = ridge_of(gradients)

    def whole() -> Vector:
        inverse = rank_one_recursion(gradients.blocked, ridge)
        return _checked(gradients, inverse.diagonal(dim1=1, dim2=2))

    return {"whole": whole}


def rank_one_recursion(gradients: Tensor, ridge: float) -> Tensor:
    """Inverses of λI + 1/m Σ_n g_n g_nᵀ, one sample after the other, all blocks at once.

    Sherman and Morrison's formula for each sample, starting from F⁻¹ = I/λ, as WoodFisher (Singh &
    Alistarh 2020) and oBERT (Kurtic et al. 2022) define it:

        F⁻¹ ← F⁻¹ − (F⁻¹g)(F⁻¹g)ᵀ / (m + gᵀF⁻¹g).

    Args:
        gradients: ``[m, blocks, B]``; the result has their dtype.
        ridge: λ.

    Returns:
        F⁻¹ ``[blocks, B, B]``.
    """
    samples, blocks, size = gradients.shape
    identity = torch.eye(size, dtype=gradients.dtype, device=gradients.device)
    inverse = (identity / ridge).repeat(blocks, 1, 1)
    for g in gradients:
        column = torch.bmm(inverse, g[:, :, None])
        denominator = samples + torch.bmm(g[:, None, :], column)
        inverse.baddbmm_(column / denominator, column.mT, alpha=-1)
    return inverse


def exact(gradients: Gradients) -> Vector:
    """Dense inverses of the first blocks in float64."""
    first = gradients.blocked[:, :CHECKED]
    gram = torch.einsum("nbi,nbj->bij", first, first) / len(first)
    gram.diagonal(dim1=1, dim2=2).add_(ridge_of(gradients))
    return _checked(gradients, torch.linalg.inv(gram).diagonal(dim1=1, dim2=2))


def _checked(gradients: Gradients, diagonal: Tensor) -> Vector:
    return {"inverse diagonal": diagonal.flatten()[: CHECKED * gradients.block_size]}


REFERENCES = {"inverse": exact}

CONTENDERS: dict[str, Contender[Gradients]] = {
    "BlockFisher": Contender(
        ours, "Gram matrices, Cholesky in float64", ours=True, reference="inverse"
    ),
    "rank-one recursion": Contender(
        recursion, "Sherman–Morrison, a sample at a time", reference="inverse"
    ),
}
