"""Layers pruned by their own inputs: saliencies of all weights, and SparseGPT's recursion.

With H the mean of x xᵀ over the rows x of a layer's inputs, plus a ridge, ours gives the saliency
w² / (2 [H⁻¹]_ii) of every weight as it stands. SparseGPT goes through the columns once, and divides
by the inverse for the columns not yet visited: less work than the inverse's diagonal after each
removal, but a saliency that depends on the order of the columns.

The inputs are random and few: no work depends on their values, and H takes either side the same
2RK² operations for R rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

import pai_utils as pai
from benchmarks.problems import Images
from benchmarks.tasks import Contender, Steps, Vector
from pai_utils.curvature.blocks import DAMPING

SPARSITY = 0.7
BLOCK_SIZE = 128
ROWS = 8
SHAPES = {
    "vit_small's query, key and value": (1152, 384),
    "vit_small's projection": (384, 384),
    "vit_small's first of the MLP": (1536, 384),
    "vit_small's second of the MLP": (384, 1536),
    "efficientnet_lite0's blocks.6.0.conv_pwl": (320, 1152),
    "efficientnet_lite0's conv_head": (1280, 320),
}
"""Outputs M and inputs K, by layer."""


@dataclass(frozen=True)
class Layer:
    """A linear layer and some of its inputs."""

    weight: Tensor  # [M, K]
    inputs: Tensor  # [R, K]

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.weight.device

    @property
    def memory_unit(self) -> int:
        """Bytes of a matrix H in float64."""
        return 8 * self.weight.shape[1] ** 2

    def in_layout(self, layout: str) -> Self:
        """The same: there is one layout."""
        return self

    def to(self, target: torch.device | torch.dtype) -> Self:
        """A copy on another device or in another type."""
        return replace(self, weight=self.weight.to(target), inputs=self.inputs.to(target))

    def forward_backward(self) -> None:
        """None: there is no network."""


def draw(outputs: int, size: int, rows: int = ROWS) -> Layer:
    """A random layer and random inputs."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, size, generator=generator)
    return Layer(weight, torch.randn(rows, size, generator=generator))


def second_moment(inputs: Tensor, damping: float) -> Tensor:
    """XᵀX/R + λI of rows ``[R, K]``, with λ = ``damping`` · mean diagonal: ``[K, K]``."""
    matrix = inputs.T @ inputs / len(inputs)
    matrix.diagonal().add_(damping * matrix.diagonal().mean())
    return matrix


def inverse_factor(matrix: Tensor) -> Tensor:
    """The upper triangular U with UᵀU = H⁻¹, of H ``[K, K]``.

    Its row i, from the diagonal on, is the first row of the inverse of H without its first i rows
    and columns, over the square root of that row's first entry.

    Raises:
        torch.linalg.LinAlgError: if H is not positive definite in its dtype.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def sparsegpt(
    weight: Tensor,
    matrix: Tensor,
    *,
    sparsity: float | None = None,
    keep: Tensor | None = None,
    block_size: int = BLOCK_SIZE,
) -> tuple[Tensor, Tensor]:
    """Prune a layer column by column, and move what each removal costs to the later columns.

    At the start of each block of columns, its weights of least w² / U_ii² go, of all outputs
    together, or those that ``keep`` does not have. A weight that goes from column i changes the
    later weights w_j of its output by −w_i U_ij / U_ii, which is the optimal brain surgeon's update
    with all earlier columns held fixed.

    Source: Frantar & Alistarh (2023), "SparseGPT: massive language models can be accurately pruned
    in one-shot", algorithm 1.

    Args:
        weight: ``[M, K]``.
        matrix: H ``[K, K]``, positive definite; computation is in its dtype.
        sparsity: the share that goes of each block, rounded to a whole number of weights.
        keep: a mask ``[M, K]`` in its place, true for the weights that stay.
        block_size: columns a block.

    Returns:
        The weights, zero where the mask is false, and the mask: both ``[M, K]``.

    Raises:
        ValueError: unless one of ``sparsity`` and ``keep`` is given.
        torch.linalg.LinAlgError: if H is not positive definite in its dtype.
    """
    if (sparsity is None) == (keep is None):
        raise ValueError("give either a sparsity or a mask to keep")
    factor = inverse_factor(matrix)
    columns = weight.T.to(matrix.dtype, copy=True).contiguous()  # [K, M]: a column in one piece
    kept = torch.ones_like(columns, dtype=torch.bool) if keep is None else keep.T.contiguous()
    for start in range(0, len(columns), block_size):
        stop = min(start + block_size, len(columns))
        part, here, own = columns[start:stop], kept[start:stop], factor[start:stop, start:stop]
        if sparsity is not None:
            saliency = (part / own.diagonal()[:, None]).square().flatten()
            count = round(sparsity * len(saliency))
            here.view(-1)[saliency.topk(count, largest=False, sorted=False).indices] = False
        errors = part.masked_fill(here, 0)
        for i in range(len(part)):
            errors[i] = part[i].masked_fill(here[i], 0) / own[i, i]
            part[i + 1 :].addr_(own[i, i + 1 :], errors[i], alpha=-1)
        part.masked_fill_(~here, 0)
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return columns.T.contiguous(), kept.T.contiguous()


def ours(layer: Layer) -> Steps:
    """``pai.score("obs_inputs", …)`` of a network that is this layer."""
    outputs, size = layer.weight.shape
    model = nn.Sequential(nn.Flatten(), nn.Linear(size, outputs, bias=False))
    model.to(layer.weight)
    model[1].weight.data = layer.weight
    labels = torch.zeros(len(layer.inputs), dtype=torch.long)
    data = Images(layer.inputs.cpu()[:, :, None, None], labels)

    def whole() -> Vector:
        scores = pai.score("obs_inputs", model, data, samples=None, damping=DAMPING)
        return {"saliency": scores["1.weight"]}

    return {"whole": whole}


def recursion(layer: Layer) -> Steps:
    """SparseGPT's mask and weights, in the layer's dtype."""

    def whole() -> Vector:
        matrix = second_moment(layer.inputs, DAMPING)
        weights, keep = sparsegpt(layer.weight, matrix, sparsity=SPARSITY)
        return {"weights": weights, "keep": keep}

    return {"whole": whole}


def exact(layer: Layer) -> Vector:
    """The saliencies from the dense inverse."""
    inverse = torch.linalg.inv(second_moment(layer.inputs, DAMPING))
    return {"saliency": layer.weight.square() / (2 * inverse.diagonal())}


REFERENCES = {"saliency": exact}

CONTENDERS: dict[str, Contender[Layer]] = {
    "obs_inputs": Contender(
        ours, "saliencies of all weights, in float64", ours=True, reference="saliency"
    ),
    "SparseGPT": Contender(
        recursion, "mask of 70 % sparsity and repaired weights, a column at a time"
    ),
}
