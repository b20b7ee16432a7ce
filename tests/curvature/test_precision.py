"""Half precision in the forward and backward; sums in single precision."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pai_utils.curvature.blocks import fisher_blocks
from pai_utils.curvature.diagonals import fisher_diagonal, ggn_diagonal
from pai_utils.curvature.products import GGNOperator, HessianOperator
from pai_utils.support.sampling import Draw
from tests.cases import Case, Images, build, flattened, relative_error, vector_for

# bfloat16 has 8 bits; errors of a few layers add up.
TOLERANCE = 0.1


CURVATURES: dict[str, Callable[[Case], Tensor]] = {
    "fisher": lambda c: flattened(fisher_diagonal(c.model, c.names, c.data)),
    "ggn": lambda c: flattened(ggn_diagonal(c.model, c.names, c.data, estimator="exact")),
    # Each block's matrix over its size: inverses of blocks without gradients are infinite.
    "blocks": lambda c: torch.cat(
        [
            1 / part.inverse_diagonal()
            for part in fisher_blocks(c.model, c.names, c.data, block_size=4, damping=0.1)
        ]
    ),
}
PRODUCTS = {"hessian": HessianOperator, "ggn": GGNOperator}


def _in(case: Case, dtype: torch.dtype) -> Case:
    data = copy.deepcopy(case.data)
    data.images = data.images.to(dtype)
    return Case(copy.deepcopy(case.model).to(dtype), case.names, data)


def _product(case: Case, kind: str) -> Tensor:
    operator = PRODUCTS[kind](case.model, case.names, case.data)
    return flattened(operator(vector_for(case)))


@pytest.mark.parametrize("kind", CURVATURES)
def test_bfloat16_by_type_or_autocast_gives_sums_in_float32(case: Case, kind: str) -> None:
    expected = CURVATURES[kind](case)
    whole = CURVATURES[kind](_in(case, torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        cast = CURVATURES[kind](_in(case, torch.float32))
    for found in (whole, cast):
        assert found.dtype in (torch.float32, torch.float64)
        # Above the rounding of float32: bfloat16 has really been used.
        assert 1e-5 < relative_error(found.double(), expected) <= TOLERANCE


def test_many_small_squares_do_not_get_lost() -> None:
    # In bfloat16, 256 + 1 is 256: a sum of equal squares would stop growing there.
    case = _in(build("linear over vectors"), torch.bfloat16)

    def repeated(count: int) -> Tensor:
        data = Images(count)
        data.images = case.data.images[:1].expand(count, -1, -1, -1)
        data.labels = case.data.labels[:1].expand(count)
        return flattened(fisher_diagonal(case.model, case.names, data, Draw(None, 2)))

    assert relative_error(repeated(1000), repeated(2)) <= 1e-4


@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_second_derivatives_in_half_precision_are_refused_by_name(
    kind: str, dtype: torch.dtype
) -> None:
    with pytest.raises(ValueError, match=rf"is {dtype}.*take model.float\(\)"):
        _product(_in(build("linear over tokens"), dtype), kind)
