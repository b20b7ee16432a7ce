"""Quadratic forms of ever larger parts of the Gauss-Newton matrix, from one pass over the data.

A diagonal score keeps vᵀ diag(G) v of vᵀGv, a block score the blocks. With labels drawn from the
model, the per-sample gradients g_n of the loss have E g_n g_nᵀ = G, so that for every partition of
the weights into groups ::

    vᵀ G_groups v = E Σ_groups (g_nᵀ v restricted to the group)².

Single weights, consecutive weights in blocks and whole tensors are three partitions; all are summed
from the same gradients, so that what a coarser one adds is not the noise of other labels.

Sources: LeCun et al. (1990), "Optimal brain damage" (diagonal); Singh & Alistarh (2020),
"WoodFisher" (blocks); Kunstner et al. (2019), "Limitations of the empirical Fisher approximation"
(drawn labels).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pai_utils.curvature.labels import DrawnLabels
from pai_utils.curvature.persample import (
    Call,
    chunk_bytes,
    drawn_batches,
    gradient_entries,
    gradient_factors,
    receive_gradients,
    samples_at_once,
)
from pai_utils.curvature.products import check_directions
from pai_utils.support.common import device_of, undisturbed
from pai_utils.support.sampling import ALL, Draw, Samples, fitting_batches, sum_over_processes_


@dataclass(frozen=True)
class PartialTerms:
    """vᵀAv of one direction v for parts A of the Gauss-Newton matrix."""

    diagonal: float
    blocks: float  #: of consecutive weights of one flattened tensor
    tensors: float  #: of whole tensors, with nothing between layers
    count: int  #: samples the means are over


def partial_terms(
    model: nn.Module,
    directions: Sequence[Mapping[str, Tensor]],
    data: Samples,
    draw: Draw = ALL,
    *,
    block_size: int = 64,
    draws: int = 1,
) -> list[PartialTerms]:
    """Quadratic forms with the diagonal, blocks and tensors of the GGN of the mean cross-entropy.

    Unbiased for the samples drawn, where the directions do not depend on the same labels; the
    error is that of the drawn labels, and common to the three. Its relative variance falls as
    1/(samples * draws) and grows with the model's confidence: with p the probability of the
    likeliest class it is of the order of 1/(1 − p), since few draws then give another label. Costs
    one forward, ``draws`` backwards that form per-sample gradients, a product of these with each
    direction, and memory for a copy of all directions.

    Args:
        model: images to logits ``[B, C]``; evaluated in evaluation mode, left as it was.
        directions: each a v, one tensor a parameter name, of the parameter's shape; all of the
            same names.
        data: samples; their labels are not used.
        draw: the samples to take; its seed also draws the labels. The result does not depend on the
            batches beyond rounding.
        block_size: weights a block; the last of a tensor may be shorter.
        draws: labels a sample.

    Returns:
        The terms of each direction, in their order.

    Raises:
        ValueError: if directions do not fit the model or each other, or ``block_size`` or
            ``draws`` is below one.
    """
    check_directions(model, directions)
    for name, value in {"block_size": block_size, "draws": draws}.items():
        if value < 1:
            raise ValueError(f"{name}={value}: at least one is needed")
    indices = draw.indices(data)
    device = device_of(model)
    names = list(directions[0])
    # One row a direction, whole blocks.
    flat = {}
    for name in names:
        rows = torch.stack([v[name].detach().to(device).flatten() for v in directions])
        flat[name] = _padded(rows, block_size)

    def compute(size: int) -> Tensor:
        receiver = _Forms(flat, block_size)
        drawn = drawn_batches(data, indices, size, device, "quadratic forms")
        cotangents = DrawnLabels(len(indices), draws, draw.seed)
        receive_gradients(model, names, drawn, cotangents, receiver)
        return receiver.sums

    with undisturbed(model):
        sums = fitting_batches(compute, draw.batch_size)
    sum_over_processes_(sums)
    return [
        PartialTerms(diagonal, blocks, tensors, len(indices))
        for diagonal, blocks, tensors in (sums / len(indices)).tolist()
    ]


class _Forms:
    """Receives per-sample gradients; ``sums`` are the squares over weights, blocks and tensors."""

    def __init__(self, directions: Mapping[str, Tensor], block_size: int) -> None:
        self.directions = directions
        self.block_size = block_size
        (like, *_) = directions.values()
        self.sums = torch.zeros(len(like), 3, dtype=torch.float64, device=like.device)

    def observed(self, call: Call, gradient: Tensor, rows: Tensor) -> None:
        """Add a batch, as many samples and entries at a time as a chunk of memory holds."""
        samples = len(rows)
        room = chunk_bytes(gradient.device) // gradient.element_size()
        together = samples_at_once(call, gradient, samples, room)
        for first in range(0, samples, together):
            chosen = slice(first, min(first + together, samples))
            left, right = gradient_factors(call, gradient, samples, chosen)
            step = max(1, room // (len(left) * self.block_size)) * self.block_size
            inner = left.new_zeros(len(left), len(self.sums), dtype=torch.float64)
            stop = left.shape[1] * left.shape[2] * right.shape[3]
            for start in range(0, stop, step):
                entries = gradient_entries(left, right, start, min(start + step, stop))
                inner += self._add_(call.name, start, entries)
            self.sums[:, 2] += inner.square().sum(0)

    def single(self, name: str, gradient: Tensor, rows: Tensor) -> None:
        """Add the gradient of one sample."""
        self.sums[:, 2] += self._add_(name, 0, gradient.flatten()[None]).square().sum(0)

    def _add_(self, name: str, start: int, entries: Tensor) -> Tensor:
        """Add entries ``[b, n]`` from ``start`` on; their products with the directions [b, D]."""
        entries = _padded(entries, self.block_size)
        along = self.directions[name][:, start : start + entries.shape[1]]
        along = along.to(torch.promote_types(along.dtype, torch.float32))
        entries = entries.to(along.dtype)
        self.sums[:, 0] += (along.square() @ entries.square().sum(0)).double()
        # [blocks, b, size] @ [blocks, size, D]
        blocks = torch.bmm(
            entries.unflatten(1, (-1, self.block_size)).transpose(0, 1),
            along.unflatten(1, (-1, self.block_size)).permute(1, 2, 0),
        ).double()
        self.sums[:, 1] += blocks.square().sum((0, 1))
        return blocks.sum(0)


def _padded(rows: Tensor, size: int) -> Tensor:
    return F.pad(rows, (0, -rows.shape[1] % size))
