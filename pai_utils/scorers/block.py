"""Optimal brain surgeon: w² / (2 [F⁻¹]_ii) with a Fisher matrix in blocks.

Removing weight w_i while the other weights of its block follow raises the loss, to second order
and at a minimum, by w_i² / (2 [F⁻¹]_ii) (Hassibi & Stork 1993; Kurtic et al. 2022).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pai_utils.curvature.blocks import fisher_blocks
from pai_utils.support.sampling import Draw, Samples


def block_fisher(
    model: nn.Module,
    names: Sequence[str],
    data: Samples,
    *,
    samples: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    block_size: int = 64,
    damping: float = 1e-2,
    estimator: str = "empirical",
    memory_budget: int = 4 * 2**30,
) -> dict[str, Tensor]:
    """w² / (2 [F⁻¹]_ii), zero in blocks of zero gradients.

    Options and errors are those of :func:`~pai_utils.curvature.blocks.fisher_blocks`.
    """
    parameters = dict(model.named_parameters())
    scores = {
        # At least float32: increases span too many orders of magnitude for half precision.
        name: parameters[name].new_empty(
            parameters[name].numel(),
            dtype=torch.promote_types(parameters[name].dtype, torch.float32),
        )
        for name in names
    }
    for blocks in fisher_blocks(
        model,
        names,
        data,
        Draw(samples, batch_size, seed),
        block_size=block_size,
        damping=damping,
        estimator=estimator,
        memory_budget=memory_budget,
    ):
        part = slice(blocks.start, blocks.stop)
        weights = parameters[blocks.name].detach().flatten()[part]
        scores[blocks.name][part] = blocks.saliency(weights)
        del blocks  # before the next pass asks for its memory
    return {name: scores[name].view(parameters[name].shape) for name in names}
