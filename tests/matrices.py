"""Known matrices behind the interface of a curvature operator."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class MatrixOperator:
    """A dense matrix over two parameters, ``"a" [2, 3]`` and ``"b"`` with the rest."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        empty = torch.zeros(len(matrix), dtype=matrix.dtype)
        self.parameters = {"a": empty[:6].view(2, 3), "b": empty[6:]}
        self.seen: list[Tensor] = []

    def __call__(self, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        flat = torch.cat([vector["a"].flatten(), vector["b"]])
        self.seen.append(flat)
        product = self.matrix @ flat
        return {"a": product[:6].view(2, 3), "b": product[6:]}


def symmetric(size: int, values: Tensor | None = None, seed: int = 0) -> Tensor:
    """A random symmetric matrix in float64, with the given eigenvalues if there are any."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(size, size, generator=generator, dtype=torch.float64)
    if values is None:
        return (noise + noise.T) / 2
    basis = torch.linalg.qr(noise).Q
    matrix: Tensor = basis * values @ basis.T
    return matrix
