from itertools import product

import pytest
import torch

from pai_utils.curvature.diagonals import DrawnLabels
from pai_utils.curvature.products import directional_terms
from pai_utils.curvature.quadratic import partial_terms
from pai_utils.support.sampling import Draw
from tests.cases import Case, build, fingerprint, logits_of, per_sample_gradients, vector_for


def test_forms_are_those_of_dense_gradients_of_the_drawn_labels(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Few entries at a time, and blocks that no weight is a multiple of.
    monkeypatch.setattr("pai_utils.curvature.persample._CPU_BLOCK_BYTES", 160)
    block_size = 5
    directions = [vector_for(case), vector_for(case, 3)]
    drawn = Draw(6, seed=7).indices(case.data)
    images, labels = case.data.batch(drawn)
    expected = torch.zeros(2, 3, dtype=torch.float64)
    logits = logits_of(case.model, images)
    for cotangent in DrawnLabels(6, 3, 7)(logits, labels, torch.arange(6)):
        each = list(per_sample_gradients(case.model, case.names, images, cotangent))
        for (d, v), (i, name) in product(enumerate(directions), enumerate(case.names)):
            along = torch.stack([(gradients[i] * v[name]).flatten() for gradients in each])
            blocks = [block.sum(1) for block in along.split(block_size, 1)]
            expected[d, 0] += along.square().sum() / 6
            expected[d, 1] += sum(block.square().sum() for block in blocks) / 6
            expected[d, 2] += along.sum(1).square().sum() / 6
    before = fingerprint(case.model)
    for batch_size in (3, 64):
        found = partial_terms(
            case.model, directions, case.data,
            Draw(6, batch_size, 7), block_size=block_size, draws=3,
        )  # fmt: skip
        values = [[terms.diagonal, terms.blocks, terms.tensors] for terms in found]
        assert torch.allclose(torch.tensor(values, dtype=torch.float64), expected, rtol=1e-9)
        assert [terms.count for terms in found] == [6, 6]
    assert fingerprint(case.model) == before


def test_of_a_single_tensor_the_form_is_unbiased_for_the_whole_matrix() -> None:
    case = build("linear over vectors")
    name = case.names[0]
    v = {name: vector_for(case)[name]}
    draws = 200
    found = [
        partial_terms(case.model, [v], case.data, Draw(None, seed=seed), draws=draws)[0].tensors
        for seed in range(20)
    ]
    (exact,) = directional_terms(case.model, [v], case.data)
    values = torch.tensor(found, dtype=torch.float64)
    assert abs(float(values.mean()) - exact.ggn) < 4 * float(values.std()) / 20**0.5
    assert float(values.std()) < 0.1 * exact.ggn


def test_bad_settings_are_refused() -> None:
    case = build("conv")
    with pytest.raises(ValueError, match="block_size=0: at least one"):
        partial_terms(case.model, [vector_for(case)], case.data, block_size=0)
    with pytest.raises(ValueError, match="draws=0: at least one"):
        partial_terms(case.model, [vector_for(case)], case.data, draws=0)
