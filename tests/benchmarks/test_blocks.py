import torch

from benchmarks.contenders.blocks import rank_one_recursion
from tests.cases import relative_error


def test_the_recursion_gives_the_inverses_of_the_same_blocks() -> None:
    gradients = torch.randn(20, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ridge = 0.1 * float(gradients.square().mean())
    found = rank_one_recursion(gradients.view(20, 3, 8), ridge)
    for block, inverse in zip(gradients.split(8, 1), found, strict=True):
        matrix = block.T @ block / 20 + ridge * torch.eye(8, dtype=torch.float64)
        assert relative_error(inverse, torch.linalg.inv(matrix)) <= 1e-12
