"""The exact least-squares solve for the weights that a mask leaves in a layer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pai_utils.curvature.persample import chunk_bytes


def solve_layer(
    inputs: Tensor,
    outputs: Tensor,
    original: Tensor,
    keep: Tensor,
    *,
    centred: bool,
    damping: float,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Least squares for the surviving weights of one layer, each output for itself.

    Minimises ‖y − X w − b‖²/R + λ‖w − w₀‖² over the kept entries of w and over b, with λ = damping
    · mean square of the group's inputs, less their mean if ``centred``; b is zero otherwise. X is
    ``inputs [groups, R, K]``, y ``outputs [R, groups · M]``, w₀ ``original [groups, M, K]``, and
    ``keep`` is boolean, of the same shape.

    Returns:
        Weights ``[groups, M, K]``, zero where ``keep`` is false, and b ``[groups · M]``.
    """
    groups, count, size = inputs.shape
    x = inputs.to(dtype)
    y = outputs.to(dtype).unflatten(1, (groups, -1)).transpose(0, 1)  # [groups, R, M]
    x_mean = x.mean(1, keepdim=True) if centred else x.new_zeros(groups, 1, size)
    y_mean = y.mean(1, keepdim=True) if centred else y.new_zeros(groups, 1, y.shape[2])
    x, y = x - x_mean, y - y_mean
    gram = torch.bmm(x.mT, x) / count  # [groups, K, K]
    ridge = damping * gram.diagonal(dim1=1, dim2=2).mean(1)
    ridge = torch.where(ridge > 0, ridge, 1.0)  # no input at all: the weights stay
    gram.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    start = original.to(dtype)
    right = torch.bmm(y.mT, x) / count + ridge[:, None, None] * start  # [groups, M, K]
    solved = _solve(gram, right, keep.bool().to(gram.device))
    bias = y_mean - torch.bmm(x_mean, solved.mT)  # [groups, 1, M]
    return solved, bias.flatten()


def _solve(gram: Tensor, right: Tensor, keep: Tensor) -> Tensor:
    """The systems of all outputs: ``[groups, K, K]`` and twice ``[groups, M, K]`` to the last.

    The unknowns are the surviving weights of one output. Where few of them are gone, the inverse
    of the whole matrix tells what their loss costs the others, from a system of as many unknowns
    as are gone.
    """
    size = keep.shape[2]
    left = keep.sum(2).double()
    saved = (left**3 - (size - left) ** 3).clamp(min=0) / 3  # operations
    few_gone = (saved > 0) & (saved.sum(1, keepdim=True) > size**3)  # what the inverse takes
    few_gone = few_gone[:, :, None]
    solved = _solve_parts(gram, right, keep & ~few_gone)
    if few_gone.any():
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        whole = right @ inverse  # with no weight gone
        lost = _solve_parts(inverse, whole, ~keep & few_gone)
        solved = torch.where(few_gone, (whole - lost @ inverse) * keep, solved)
    return solved


def _solve_parts(matrices: Tensor, right: Tensor, chosen: Tensor) -> Tensor:
    """For each output, the system of its chosen unknowns alone; zero for the others.

    Systems of about one size are solved together, filled up with equations x = 0.
    """
    # One more unknown, whose row is zero, to fill up with.
    matrices, right = F.pad(matrices, (0, 1, 0, 1)), F.pad(right, (0, 1))
    solved, last = torch.zeros_like(right), right.shape[2] - 1
    entries, most_bytes = matrices.flatten(), chunk_bytes(right.device)
    counts = chosen.sum(2).flatten().cpu()
    order = counts.argsort()[int((counts == 0).sum()) :]
    while len(order):
        # As many as fit beside their factors, by the size of the largest.
        fitting = torch.arange(1, len(order) + 1) * counts[order] ** 2 * 24 <= most_bytes
        some, order = order.tensor_split([max(1, int(fitting.sum()))])
        most, some = int(counts[some[-1]]), some.to(right.device)
        group, output = some // chosen.shape[1], some % chosen.shape[1]
        keep = chosen[group, output]
        unknowns = keep.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
        filled = ~keep.gather(1, unknowns)
        unknowns.masked_fill_(filled, last)
        rows = group[:, None] * (last + 1) + unknowns
        systems = entries[rows[:, :, None] * (last + 1) + unknowns[:, None]]
        systems.diagonal(dim1=1, dim2=2).add_(filled)
        values = right[group[:, None], output[:, None], unknowns]
        factors = torch.linalg.cholesky(systems)
        found = torch.cholesky_solve(values[..., None], factors)[..., 0]
        solved[group[:, None], output[:, None], unknowns] = found
    return solved[:, :, :last]
