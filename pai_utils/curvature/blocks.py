"""Fisher matrices in blocks of consecutive weights, and what they say about removing weights.

A tensor's weights are flattened and cut into blocks of B (the last may be shorter). With the
gradients g_n [B] of one sample each, a block's matrix and damping are ::

    F = λI + 1/m Σ_n g_n g_nᵀ,      λ = damping · mean square of g_n over samples and the tensor.

Removing weights q and letting the others of the block follow raises ½ δᵀFδ the least for ::

    δ = −F⁻¹E (EᵀF⁻¹E)⁻¹ w_q,       E: the columns of I that q selects,

and for one weight i that least rise is its saliency w_i² / (2 [F⁻¹]_ii).

Sums and factors are in float64, since the inverse multiplies a sum's rounding by up to the block's
trace over λ. The sums take 2mPB operations and 8PB bytes for P weights, the factorisations about
PB².

Sources: Hassibi & Stork (1993), "Second order derivatives for network pruning: optimal brain
surgeon"; Singh & Alistarh (2020), "WoodFisher"; Kurtic et al. (2022), "The optimal BERT surgeon",
both of which invert the same matrix by m rank-one updates of each block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pai_utils.curvature.diagonals import DrawnLabels, true_labels
from pai_utils.curvature.persample import (
    Gradients,
    chunk_bytes,
    drawn_batches,
    in_blocks,
    receive_gradients,
)
from pai_utils.support.common import check_names, device_of, logger, undisturbed
from pai_utils.support.contract import unwrapped
from pai_utils.support.sampling import ALL, Draw, Samples, fitting_batches, sum_over_processes_

FISHER_ESTIMATORS = ("empirical", "mc")
DAMPING = 0.1
"""What every second-order score adds to a weight's curvature, over the mean of its tensor."""
SMALLEST_DAMPING = 1e-10
"""Below it, rounding in float64 decides what the inverse of a singular block is."""


@dataclass(frozen=True)
class BlockFisher:
    """Fisher blocks of one flattened tensor.

    A short last block is filled up with zero gradients, which changes nothing for its own weights.

    Examples:
        >>> import torch
        >>> from pai_utils.curvature.blocks import BlockFisher
        >>> gradients = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0]])
        >>> fisher = BlockFisher.from_gradients(gradients, block_size=2, damping=0.01)
        >>> weights = torch.ones(4)
        >>> fisher.saliency(weights)  # of two weights that move together, either can go
        tensor([0.0074, 0.0074, 1.0037, 0.0037], dtype=torch.float64)
        >>> fisher.repair(weights, torch.tensor([False, True, True, True]))
        tensor([0.0000, 1.9852, 1.0000, 1.0000])
    """

    name: str  #: of the tensor
    length: int  #: how many entries it has
    ridge: float  #: λ above; zero only where all gradients of the tensor are
    stored: Tensor  #: mean of g gᵀ, float64 ``[blocks, B, B]``

    @classmethod
    def from_gradients(cls, gradients: Tensor, *, block_size: int, damping: float) -> BlockFisher:
        """Blocks of given gradients ``[m, P]``, one row a sample."""
        check_block_options(block_size, damping)
        samples, length = gradients.shape
        sums = _zeros(length, block_size, gradients.device)
        _add_(sums, length, Gradients("weights", torch.arange(samples), gradients))
        return _damped("weights", length, sums.div_(samples), damping)

    def saliency(self, weights: Tensor) -> Tensor:
        """Least rise of ½ δᵀFδ when one weight becomes zero: w_i² / (2 [F⁻¹]_ii), in float64.

        ``weights`` are the flattened tensor. Where all its gradients are zero, removing its weights
        costs nothing.
        """
        return weights.double().square() / (2 * self.inverse_diagonal())

    def inverse_diagonal(self) -> Tensor:
        """Diagonal of F⁻¹, float64 ``[length]``; infinite if the ridge is zero.

        Raises:
            ValueError: if a block is singular in float64 in spite of its damping.
        """
        parts = []
        for _, damped in self._chunks():
            diagonal = _inverse_cholesky(damped).square_().sum(1)
            self._check(diagonal > 0, damped)
            parts.append(diagonal / self.ridge)
        return torch.cat(parts).flatten()[: self.length]

    def repair(self, weights: Tensor, keep: Tensor) -> Tensor:
        """Weights after removing those with ``keep`` false and moving the others of their block.

        Both are flattened. The result w + δ is exactly zero where ``keep`` is false; a weight stays
        as it is where nothing correlated with it is removed from its block.

        Raises:
            ValueError: if a shape does not fit, or a block is singular in float64.
        """
        if not weights.shape == keep.shape == (self.length,):
            raise ValueError(
                f"weights {tuple(weights.shape)} and keep {tuple(keep.shape)} must both have the "
                f"shape ({self.length},), that of {self.name!r} flattened"
            )
        size = self.stored.shape[-1]
        w, kept = (in_blocks(v.double(), size) for v in (weights, keep))
        parts = []
        for chunk, damped in self._chunks():
            k = kept[chunk]
            # F_kk δ_k = F_kq w_q, with the rows and columns of q replaced by those of I.
            right = k * torch.bmm(damped, ((1 - k) * w[chunk])[:, :, None]).squeeze(2)
            system = damped * k[:, :, None] * k[:, None, :] + torch.diag_embed(1 - k)
            factor = _inverse_cholesky(system)
            moved = torch.bmm(factor.mT, torch.bmm(factor, right[:, :, None])).squeeze(2)
            self._check(moved.isfinite() | ~w[chunk].isfinite(), damped)
            parts.append(torch.where(k > 0, w[chunk] + moved, 0))
        return torch.cat(parts).flatten()[: self.length].to(weights.dtype)

    def _chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks to factorise at once: which, and F over the ridge, ``[b, B, B]``."""
        # About six such chunks exist at a time: together no more than the sums' quarter for work.
        count, _, size = self.stored.shape
        share = max(2**22, self.stored.numel() * self.stored.element_size() // 24)
        step = max(1, min(2 * chunk_bytes(self.stored.device), share) // (8 * size**2))
        for first in range(0, count, step):
            chunk = slice(first, min(first + step, count))
            damped = self.stored[chunk] / (self.ridge or 1.0)
            damped.diagonal(dim1=1, dim2=2).add_(1)
            yield chunk, damped

    def _check(self, right: Tensor, damped: Tensor) -> None:
        # Gradients that are not finite are for the caller to find in the result.
        broken = ~right.all(1) & damped.isfinite().all(2).all(1)
        if broken.any():
            raise ValueError(
                f"a Fisher block of {self.name!r} is singular in float64; choose a larger damping"
            )


def fisher_blocks(
    model: nn.Module,
    names: Sequence[str],
    data: Samples,
    draw: Draw = ALL,
    *,
    block_size: int = 64,
    damping: float = DAMPING,
    estimator: str = "empirical",
    memory_budget: int = 4 * 2**30,
) -> Iterator[BlockFisher]:
    """Fisher blocks of the named weights, in their order.

    The model, images to logits ``[B, C]``, is evaluated in evaluation mode, and is as it was
    whenever the caller has control. ``estimator="empirical"`` takes the gradients of the true
    labels; ``"mc"`` those of one label a sample drawn from the model by the draw's seed, an
    unbiased estimate of the GGN.

    ``memory_budget`` are bytes beside those of a forward and backward: three quarters for the sums,
    the rest for gradients in the making. Sums that do not fit together take several passes over the
    data, whose number is logged.

    Raises:
        ValueError: for an unknown estimator, a block size below one, a damping below
            ``SMALLEST_DAMPING``, a budget too small for one tensor, or a label beyond the model's
            classes.
    """
    check_block_options(block_size, damping)
    check_names("estimator", [estimator], FISHER_ESTIMATORS)
    indices, model = draw.indices(data), unwrapped(model)
    lengths = {name: model.get_parameter(name).numel() for name in names}
    passes = _plan(lengths, block_size, memory_budget)
    logger.info(
        "Fisher blocks of %d weights within %.2f GiB: %d %s over %d samples",
        sum(lengths.values()),
        memory_budget / 2**30,
        len(passes),
        "pass" if len(passes) == 1 else "passes",
        len(indices),
    )
    drawn_labels = DrawnLabels(len(indices), 1, draw.seed)
    cotangents = true_labels if estimator == "empirical" else drawn_labels

    def one_pass(together: Sequence[str], batch_size: int) -> dict[str, Tensor]:
        device = device_of(model)
        sums = {name: _zeros(lengths[name], block_size, device) for name in together}
        drawn = drawn_batches(data, indices, batch_size, device, "Fisher blocks")

        def receive(gradients: Gradients) -> None:
            _add_(sums[gradients.name], lengths[gradients.name], gradients)

        receive_gradients(model, together, drawn, cotangents, receive, memory_budget // 4)
        return sums

    def make() -> Iterator[BlockFisher]:
        for together in passes:
            with undisturbed(model):
                sums = fitting_batches(partial(one_pass, together), draw.batch_size)
            for name in together:
                sum_over_processes_(sums[name])
                yield _damped(name, lengths[name], sums.pop(name).div_(len(indices)), damping)

    return make()


def check_block_options(block_size: int, damping: float) -> None:
    """Refuse a block size or a damping that no Fisher block can have."""
    if block_size < 1:
        raise ValueError(f"block_size={block_size}: at least one weight a block is needed")
    if not SMALLEST_DAMPING <= damping < math.inf:
        raise ValueError(
            f"damping={damping} must be a finite number of at least {SMALLEST_DAMPING}: without it "
            "a block of fewer independent gradients than weights has no inverse"
        )


def _plan(lengths: Mapping[str, int], block_size: int, memory_budget: int) -> list[list[str]]:
    """Whose blocks each pass over the data sums."""
    capacity = memory_budget - memory_budget // 4
    passes: list[list[str]] = []
    room = 0
    for name, length in lengths.items():
        size = min(block_size, length)
        needed = 8 * size**2 * math.ceil(length / size)
        if needed > capacity:
            raise ValueError(
                f"memory_budget={memory_budget} is too small: the blocks of {name!r} take {needed} "
                f"bytes of its three quarters; choose at least {4 * needed // 3 + 4}, or smaller "
                "blocks"
            )
        if needed > room:
            passes.append([])
            room = capacity
        passes[-1].append(name)
        room -= needed
    return passes


def _zeros(length: int, block_size: int, device: torch.device) -> Tensor:
    """Sums of the blocks of a tensor, to add to."""
    size = min(block_size, length)
    blocks = math.ceil(length / size)
    return torch.zeros(blocks, size, size, dtype=torch.float64, device=device)


def _add_(sums: Tensor, length: int, gradients: Gradients) -> None:
    """Add Σ_n g_n g_nᵀ of some samples to the sums of a tensor's blocks."""
    for _, first, entries in gradients.pieces(length, sums.shape[-1]):
        each = entries.transpose(0, 1)
        each = torch.empty(each.shape, dtype=torch.float64, device=each.device).copy_(each)
        sums[first : first + len(each)].baddbmm_(each.mT, each)


def _damped(name: str, length: int, stored: Tensor, damping: float) -> BlockFisher:
    mean = float(stored.diagonal(dim1=1, dim2=2).sum()) / length
    return BlockFisher(name, length, damping * mean, stored)


def _inverse_cholesky(matrices: Tensor) -> Tensor:
    """L⁻¹ for symmetric ``[b, k, k]`` = L Lᵀ; not a number where one is not positive definite."""
    factor, failed = torch.linalg.cholesky_ex(matrices)
    factor = torch.where(failed[:, None, None] > 0, math.nan, factor)
    identity = torch.eye(matrices.shape[-1], dtype=factor.dtype, device=factor.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
    return inverse
