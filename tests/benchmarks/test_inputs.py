import pytest
import torch
from torch import Tensor

from benchmarks.contenders.inputs import CONTENDERS, REFERENCES, draw, second_moment, sparsegpt
from tests.cases import relative_error

DAMPING = 0.05


@pytest.fixture
def layer() -> tuple[Tensor, Tensor]:
    """A weight [6, 20], and correlated inputs [50, 20]."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(20, 20, generator=generator, dtype=torch.float64)
    inputs = torch.randn(50, 20, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(6, 20, generator=generator, dtype=torch.float64), inputs


def surgeon(weight: Tensor, matrix: Tensor, keep: Tensor) -> Tensor:
    """Column by column, the optimal update of the columns not yet visited."""
    moved = weight.clone()
    for i in range(weight.shape[1]):
        inverse = torch.linalg.inv(matrix[i:, i:])
        for output in (~keep[:, i]).nonzero()[:, 0]:
            moved[output, i:] -= moved[output, i] / inverse[0, 0] * inverse[0]
            moved[output, i] = 0
    return moved


@pytest.mark.parametrize("block_size", [1, 7, 128])
def test_a_given_mask_is_repaired_by_the_surgeons_update_of_later_columns(
    layer: tuple[Tensor, Tensor], block_size: int
) -> None:
    weight, inputs = layer
    matrix = second_moment(inputs, DAMPING)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    found, mask = sparsegpt(weight, matrix, keep=keep, block_size=block_size)
    assert torch.equal(mask, keep)
    assert relative_error(found, surgeon(weight, matrix, keep)) <= 1e-10


def test_the_scorer_gives_the_saliencies_of_the_reference() -> None:
    layer = draw(5, 12).to(torch.float64)
    found = CONTENDERS["obs_inputs"].prepare(layer)["whole"]()
    expected = REFERENCES["saliency"](layer)
    assert relative_error(found["saliency"], expected["saliency"]) <= 1e-10
