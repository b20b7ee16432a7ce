"""The exact least-squares solve for the weights that a mask leaves in a layer."""

from __future__ import annotations

import torch
from torch import Tensor


def solve_layer(
    inputs: Tensor,
    outputs: Tensor,
    original: Tensor,
    keep: Tensor,
    *,
    centred: bool,
    damping: float,
) -> tuple[Tensor, Tensor]:
    """Least squares for the surviving weights of one layer, each output for itself.

    Minimises ‖y − X w − b‖²/R + λ‖w − w₀‖² over the kept entries of w and over b, with λ = damping
    · mean square of the group's inputs, less their mean if ``centred``; b is zero otherwise. X is
    ``inputs [groups, R, K]``, y ``outputs [R, groups · M]``, w₀ ``original [groups, M, K]``, and
    ``keep`` is boolean, of the same shape.

    Returns:
        float64 weights ``[groups, M, K]``, zero where ``keep`` is false, and b ``[groups · M]``.
    """
    groups, count, size = inputs.shape
    x = inputs.double()
    y = outputs.double().unflatten(1, (groups, -1)).transpose(0, 1)  # [groups, R, M]
    x_mean = x.mean(1, keepdim=True) if centred else x.new_zeros(groups, 1, size)
    y_mean = y.mean(1, keepdim=True) if centred else y.new_zeros(groups, 1, y.shape[2])
    x, y = x - x_mean, y - y_mean
    gram = torch.bmm(x.mT, x) / count  # [groups, K, K]
    ridge = damping * gram.diagonal(dim1=1, dim2=2).mean(1)
    ridge = torch.where(ridge > 0, ridge, 1.0)  # no input at all: the weights stay
    gram.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    start = original.double()
    right = torch.bmm(y.mT, x) / count + ridge[:, None, None] * start  # [groups, M, K]
    groupwise = zip(gram, right, keep.bool().cpu(), strict=True)
    solved = torch.stack([_solve_group(*group) for group in groupwise])
    bias = y_mean - torch.bmm(x_mean, solved.mT)  # [groups, 1, M]
    return solved, bias.flatten()


def _solve_group(gram: Tensor, right: Tensor, keep: Tensor) -> Tensor:
    """The systems of a group's outputs: ``[K, K]``, ``[M, K]`` and ``[M, K]`` to ``[M, K]``.

    The unknowns are the surviving weights of one output. Where few of them are gone, the inverse
    of the whole matrix tells what their loss costs the others, from a system of as many unknowns
    as are gone.
    """
    size = len(gram)
    left = keep.sum(1).double()
    saved = (left**3 - (size - left) ** 3).clamp(min=0) / 3  # operations
    inverse = whole = None
    if saved.sum() > size**3:  # about what the inverse takes, for all outputs together
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        whole = right @ inverse  # [M, K], with no weight gone
    solved = torch.zeros_like(right)
    for output, alive in enumerate(keep):
        if inverse is not None and whole is not None and saved[output] > 0:
            gone = (~alive).nonzero()[:, 0].to(gram.device)
            lost = _solve_part(inverse, whole[output], gone)
            solved[output] = (whole[output] - lost @ inverse[gone]).index_fill(0, gone, 0)
        else:
            chosen = alive.nonzero()[:, 0].to(gram.device)
            solved[output, chosen] = _solve_part(gram, right[output], chosen)
    return solved


def _solve_part(matrix: Tensor, right: Tensor, chosen: Tensor) -> Tensor:
    """The system of the chosen rows and columns alone."""
    factor = torch.linalg.cholesky(matrix[chosen[:, None], chosen])
    return torch.cholesky_solve(right[chosen, None], factor)[:, 0]
