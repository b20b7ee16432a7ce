from dataclasses import astuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pai_utils.curvature.products import (
    DirectionalTerms,
    GGNOperator,
    HessianOperator,
    directional_terms,
    inner_product,
)
from pai_utils.support.sampling import Draw
from tests.cases import Case, Images, build, logits_of, vector_for


def terms_along(
    model: nn.Module, v: dict[str, Tensor], data: Images, *, batch_size: int = 64
) -> DirectionalTerms:
    (terms,) = directional_terms(model, [v], data, Draw(None, batch_size))
    return terms


def close(value: float, reference: Tensor | float) -> bool:
    return abs(value - float(reference)) <= 1e-10 * max(1e-3, abs(float(reference)))


def test_terms_are_those_of_the_operators(case: Case) -> None:
    v = vector_for(case)
    hessian = HessianOperator(case.model, case.names, case.data)
    ggn = GGNOperator(case.model, case.names, case.data)
    loss = F.cross_entropy(logits_of(case.model, case.data.images), case.data.labels)
    products = hessian.gradient(), hessian(v), ggn(v)
    expected = [float(loss), *(float(inner_product(v, product)) for product in products), 10]
    for batch_size in (3, 64):
        terms = astuple(terms_along(case.model, v, case.data, batch_size=batch_size))
        assert all(close(one, other) for one, other in zip(terms, expected, strict=True))


def test_directions_do_not_disturb_each_other() -> None:
    case = build("fused attention")
    v = vector_for(case)
    other = {name: part.cos() for name, part in v.items()}
    both = directional_terms(case.model, [v, other, v], case.data, Draw(None, 4))
    alone = [terms_along(case.model, w, case.data, batch_size=4) for w in (v, other)]
    assert both == [alone[0], alone[1], alone[0]]


def test_the_ggn_keeps_its_digits_when_all_logits_move_alike() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    data = Images(7, classes=3, side=2, dtype=torch.float32)
    v = {"1.bias": torch.tensor([1e4, 1e4, 1e4 + 1])}
    p = logits_of(model, data.images).softmax(1)[:, 2]
    assert terms_along(model, v, data).ggn == pytest.approx(float((p * (1 - p)).mean()), rel=1e-3)


def test_directions_that_do_not_fit_are_refused() -> None:
    case = build("linear over vectors")
    with pytest.raises(ValueError, match=r"shape \(48, 6\) for '2\.weight', which is \(6, 48\)"):
        terms_along(case.model, {"2.weight": torch.zeros(48, 6)}, case.data)
    with pytest.raises(ValueError, match="at least one direction"):
        directional_terms(case.model, [], case.data)
    v = vector_for(case)
    with pytest.raises(ValueError, match=r"the vector lacks '2\.weight'"):
        directional_terms(case.model, [v, {"2.bias": torch.zeros(6)}], case.data)
