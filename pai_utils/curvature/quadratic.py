"""Quadratic forms of ever larger parts of the Gauss-Newton matrix, from one pass over the data.

A diagonal score keeps vᵀ diag(G) v of vᵀGv, a block score the blocks. With labels drawn from the
model, the per-sample gradients g_n of the loss have E g_n g_nᵀ = G, so that for every partition of
the weights into groups ::

    vᵀ G_groups v = E Σ_groups (g_nᵀ v restricted to the group)².

Single weights, blocks and whole tensors are three partitions, summed from the same gradients.

Sources: LeCun et al. (1990), "Optimal brain damage" (diagonal); Singh & Alistarh (2020),
"WoodFisher" (blocks); Kunstner et al. (2019), "Limitations of the empirical Fisher approximation"
(drawn labels).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pai_utils.curvature.diagonals import DrawnLabels
from pai_utils.curvature.persample import Gradients, drawn_batches, in_blocks, receive_gradients
from pai_utils.curvature.products import check_directions
from pai_utils.support.common import device_of, undisturbed
from pai_utils.support.contract import unwrapped
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

    Unbiased for the samples drawn, where the directions do not depend on the same labels; the error
    is that of the ``draws`` labels a sample, and common to the three. Its relative variance falls
    as 1/(samples · draws) and is of the order of 1/(1 − p), p the probability of the likeliest
    class, since few draws then give another label. Costs one forward, ``draws`` backwards that form
    per-sample gradients, and a product of these with each direction. ``directions`` are tensors by
    parameter name, all of the same names.

    Returns:
        The terms of each direction, in their order.

    Raises:
        ValueError: if directions do not fit the model or each other, or ``block_size`` or
            ``draws`` is below one.
    """
    check_directions(model, directions)
    if block_size < 1:
        raise ValueError(f"block_size={block_size}: at least one weight is needed")
    indices, model = draw.indices(data), unwrapped(model)
    cotangents = DrawnLabels(len(indices), draws, draw.seed)
    device = device_of(model)
    weights = directions[0]
    flat = {n: [v[n].detach().flatten().to(device) for v in directions] for n in weights}
    along = {name: in_blocks(torch.stack(v), block_size) for name, v in flat.items()}

    def compute(size: int) -> Tensor:
        sums = torch.zeros(len(directions), 3, dtype=torch.float64, device=device)

        def receive(gradients: Gradients) -> None:
            inner = sums.new_zeros(len(gradients.rows), len(directions))  # gᵀv of whole tensors
            length = weights[gradients.name].numel()
            for chosen, first, entries in gradients.pieces(length, block_size):
                v = along[gradients.name][:, first : first + entries.shape[1]].to(entries)
                squares = entries.square().sum(0).flatten()
                sums[:, 0] += (v.square().flatten(1) @ squares).double()
                # Of each block, sample and direction, [blocks, b, D].
                blocks = torch.einsum("nks,dks->knd", entries, v).double()
                sums[:, 1] += blocks.square().sum((0, 1))
                inner[chosen] += blocks.sum(0)
            sums[:, 2] += inner.square().sum(0)

        drawn = drawn_batches(data, indices, size, device, "quadratic forms")
        receive_gradients(model, list(weights), drawn, cotangents, receive)
        return sums

    with undisturbed(model):
        sums = fitting_batches(compute, draw.batch_size)
    sum_over_processes_(sums)
    return [
        PartialTerms(diagonal, blocks, tensors, len(indices))
        for diagonal, blocks, tensors in (sums / len(indices)).tolist()
    ]
