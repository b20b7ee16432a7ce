import pytest
import torch
from torch import Tensor

from pai_utils.curvature.diagonals import ggn_diagonal
from pai_utils.curvature.labels import DrawnLabels
from pai_utils.curvature.products import directional_terms
from pai_utils.curvature.quadratic import partial_terms
from pai_utils.support.sampling import Draw
from tests.cases import (
    Case,
    build,
    fingerprint,
    flattened,
    logits_of,
    per_sample_gradients,
    vector_for,
)


def products(
    case: Case, directions: list[dict[str, Tensor]], cotangent: Tensor
) -> list[dict[str, Tensor]]:
    """Per direction and name, g ⊙ v of every sample ``[N, P]``."""
    each = list(per_sample_gradients(case.model, case.names, case.data.images, cotangent))
    return [
        {
            name: torch.stack([(g[i] * v[name]).flatten() for g in each])
            for i, name in enumerate(case.names)
        }
        for v in directions
    ]


@pytest.mark.parametrize("block_size", [1, 5, 10_000])
def test_forms_are_those_of_dense_gradients_of_the_drawn_labels(
    case: Case, block_size: int
) -> None:
    directions = [vector_for(case), vector_for(case, 3)]
    logits = logits_of(case.model, case.data.images)
    rows = torch.arange(10)
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for cotangent in DrawnLabels(10, 3, 7)(logits, case.data.labels, rows):
        for d, parts in enumerate(products(case, directions, cotangent)):
            for along in parts.values():
                blocks = [block.sum(1) for block in along.split(block_size, 1)]
                expected[d, 0] += along.square().sum() / 10
                expected[d, 1] += sum(block.square().sum() for block in blocks) / 10
                expected[d, 2] += along.sum(1).square().sum() / 10
    before = fingerprint(case.model)
    for batch_size in (3, 64):
        found = partial_terms(
            case.model, directions, case.data,
            Draw(None, batch_size, 7), block_size=block_size, draws=3,
        )  # fmt: skip
        values = [[terms.diagonal, terms.blocks, terms.tensors] for terms in found]
        assert torch.allclose(torch.tensor(values, dtype=torch.float64), expected, rtol=1e-9)
        assert [terms.count for terms in found] == [10, 10]
    assert fingerprint(case.model) == before


def test_the_diagonal_is_that_of_the_same_labels(case: Case) -> None:
    directions = [vector_for(case), vector_for(case, 3)]
    diagonal = ggn_diagonal(case.model, case.names, case.data, Draw(6, seed=3))
    found = partial_terms(case.model, directions, case.data, Draw(6, seed=3))
    for v, terms in zip(directions, found, strict=True):
        own = (flattened(diagonal) * flattened(v).square()).sum()
        assert terms.diagonal == pytest.approx(float(own), rel=1e-9)
        assert terms.count == 6


def test_of_a_single_tensor_the_form_is_unbiased_for_the_whole_matrix() -> None:
    case = build("linear over vectors")
    name = case.names[0]
    v = {name: vector_for(case)[name]}
    draws = 400
    found = [
        partial_terms(case.model, [v], case.data, Draw(None, seed=seed), draws=draws)[0].tensors
        for seed in range(20)
    ]
    (exact,) = directional_terms(case.model, [v], case.data)
    values = torch.tensor(found, dtype=torch.float64)
    assert abs(float(values.mean()) - exact.ggn) < 4 * float(values.std()) / 20**0.5
    assert float(values.std()) < 0.1 * exact.ggn


def test_memory_in_slices_gives_the_same(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    directions = [vector_for(case), vector_for(case, 3)]
    whole = partial_terms(case.model, directions, case.data, block_size=4)
    monkeypatch.setattr("pai_utils.curvature.persample._CPU_BLOCK_BYTES", 16)
    for found, expected in zip(
        partial_terms(case.model, directions, case.data, block_size=4), whole, strict=True
    ):
        assert found.blocks == pytest.approx(expected.blocks, rel=1e-10)
        assert found.tensors == pytest.approx(expected.tensors, rel=1e-10)


def test_bad_settings_are_refused() -> None:
    case = build("conv")
    directions = [vector_for(case), vector_for(case, 3)]
    with pytest.raises(ValueError, match="block_size=0: at least one"):
        partial_terms(case.model, directions, case.data, block_size=0)
    with pytest.raises(ValueError, match="draws=0: at least one"):
        partial_terms(case.model, directions, case.data, draws=0)
