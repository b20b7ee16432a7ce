from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pai_utils.curvature.products import (
    CurvatureOperator,
    GGNOperator,
    HessianOperator,
    dense_matrix,
)
from pai_utils.support.common import NonFiniteError
from pai_utils.support.sampling import Draw
from tests.cases import (
    Case,
    Images,
    Limited,
    build,
    fingerprint,
    flattened,
    hessian_of,
    logits_of,
    per_sample_gradients,
    relative_error,
    vector_for,
)
from tests.matrices import MatrixOperator

KINDS: list[type[CurvatureOperator]] = [HessianOperator, GGNOperator]
kinds = pytest.mark.parametrize("kind", KINDS)


def dense_ggn(case: Case) -> Tensor:
    """1/N Σ_n J_nᵀ (diag p_n − p_n p_nᵀ) J_n with one backward a logit."""
    p = logits_of(case.model, case.data.images).softmax(1)
    rows = [
        torch.cat([g.flatten() for g in gradients])
        for unit in torch.eye(p.shape[1], dtype=p.dtype)
        for gradients in per_sample_gradients(
            case.model, case.names, case.data.images, unit.expand_as(p)
        )
    ]
    jacobian = torch.stack(rows).view(*p.T.shape, -1).transpose(0, 1)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("nci,ncd,ndj->ij", jacobian, middle, jacobian) / len(p)


def limited(
    kind: type[CurvatureOperator], draw: Draw, limit: int
) -> tuple[CurvatureOperator, dict[str, Tensor], Limited]:
    """An operator, a vector, and its model, which fits ``limit`` samples at a time."""
    case = build("conv")
    model = Limited(case.model, limit)
    v = {f"model.{name}": value for name, value in vector_for(case).items()}
    return kind(model, list(v), case.data, draw), v, model


@pytest.mark.parametrize(("batch_size", "biases"), [(64, False), (4, True)])
@kinds
def test_product_equals_that_of_the_dense_matrix(
    kind: type[CurvatureOperator], case: Case, batch_size: int, biases: bool
) -> None:
    names = [name for name, _ in case.model.named_parameters()] if biases else case.names
    case = replace(case, names=names)
    v = vector_for(case)
    before = fingerprint(case.model)
    product = kind(case.model, names, case.data, Draw(None, batch_size))(v)
    assert fingerprint(case.model) == before
    assert torch.backends.cuda.flash_sdp_enabled()
    assert list(product) == names
    dense = dense_ggn(case) if kind is GGNOperator else hessian_of(case, names)
    assert relative_error(flattened(product), dense @ flattened(v)) <= 1e-10


@pytest.mark.parametrize("case", ["conv", "fused attention", "shared weight"], indirect=True)
@pytest.mark.parametrize("memory", [2**30, 0])
def test_the_gradient_shares_its_graphs_with_the_products(case: Case, memory: int) -> None:
    operator = HessianOperator(case.model, case.names, case.data, Draw(None, 3), memory=memory)
    vector = vector_for(case)
    first = flattened(operator(vector))
    gradient = operator.gradient()
    case.model.eval()
    weights = [case.model.get_parameter(name) for name in case.names]
    loss = F.cross_entropy(case.model(case.data.images), case.data.labels)
    expected = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
    assert relative_error(flattened(gradient), torch.cat([g.flatten() for g in expected])) <= 1e-10
    kept = operator.kept_bytes
    assert relative_error(flattened(operator(vector)), first) <= 1e-10
    assert operator.kept_bytes == kept


@kinds
@pytest.mark.parametrize("case", ["eval BatchNorm", "fused attention", "windows"], indirect=True)
def test_products_on_kept_and_on_rebuilt_graphs_are_the_same(
    kind: type[CurvatureOperator], case: Case
) -> None:
    kept = kind(case.model, case.names, case.data, Draw(None, 4))
    first = kept(vector_for(case))
    size = kept.kept_bytes
    partly = kind(case.model, case.names, case.data, Draw(None, 4), memory=size - 1)
    rebuilt = kind(case.model, case.names, case.data, Draw(None, 4), memory=0)
    v = vector_for(case)
    again = flattened(kept(v))
    for found in (first, partly(v), rebuilt(v)):
        assert torch.equal(flattened(found), again)
    assert kept.kept_bytes == size
    assert 0 < partly.kept_bytes < size
    assert rebuilt.kept_bytes == 0


@kinds
def test_product_takes_the_seeded_draw(kind: type[CurvatureOperator]) -> None:
    case = build("conv")
    v = vector_for(case)
    rows = torch.randperm(10, generator=torch.Generator().manual_seed(5))[:6]
    found = kind(case.model, case.names, case.data, Draw(6, seed=5))(v)
    case.data.images, case.data.labels = case.data.batch(rows)
    expected = kind(case.model, case.names, case.data)(v)
    assert torch.equal(flattened(found), flattened(expected))


def test_a_dense_matrix_has_the_rows_and_columns_of_the_operator() -> None:
    entries = torch.arange(81, dtype=torch.float64).view(9, 9)  # not symmetric, so no transpose
    assert torch.equal(dense_matrix(MatrixOperator(entries)), entries)


@kinds
def test_batch_is_halved_when_memory_runs_out(kind: type[CurvatureOperator]) -> None:
    operator, v, model = limited(kind, Draw(None, 10), 3)
    found, case = operator(v), build("conv")
    expected = kind(case.model, case.names, case.data)(vector_for(case))
    assert relative_error(flattened(found), flattened(expected)) <= 1e-12
    assert model.sizes == [10, 5, 2, 2, 2, 2, 2]
    assert operator.kept_bytes == 0
    operator(v)
    assert model.sizes[7:] == [2] * 5


@kinds
@pytest.mark.parametrize(
    ("name", "options"), [("test_resnet", {}), ("test_vit", {"img_size": 32, "patch_size": 8})]
)
def test_timm_encoders_give_what_plain_autograd_gives(
    kind: type[CurvatureOperator], name: str, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, **options).double().eval()
    names = [n for n, p in model.named_parameters() if p.dim() > 1][1:4]
    data = Images(3, side=32)
    parameters = dict(model.named_parameters())
    v = {n: torch.randn_like(parameters[n]) for n in names}
    found = kind(model, names, data, Draw(None, 2))(v)
    weights = [parameters[n] for n in names]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        logits = model(data.images)
    loss = F.cross_entropy(logits, data.labels)
    if kind is GGNOperator:
        # Less its own tangent plane at the logits, the loss has no slope there, and H is G.
        slope = torch.autograd.grad(loss, logits, retain_graph=True)[0]
        loss = loss - (logits * slope).sum()
    gradients = torch.autograd.grad(loss, weights, create_graph=True)
    expected = torch.autograd.grad(gradients, weights, list(v.values()))
    for one, other in zip(found.values(), expected, strict=True):
        assert relative_error(one, other) <= 1e-10


@kinds
def test_names_and_vectors_that_do_not_fit_are_refused(kind: type[CurvatureOperator]) -> None:
    case = build("conv")
    with pytest.raises(ValueError, match=r"unknown parameter '2.wait'; did you mean '2.weight'"):
        kind(case.model, ["2.wait"], case.data)
    with pytest.raises(ValueError, match="no parameter is named"):
        kind(case.model, [], case.data)
    with pytest.raises(ValueError, match=r"'2.weight' is named twice"):
        kind(case.model, ["2.weight", "2.weight"], case.data)
    with pytest.raises(ValueError, match="memory=-1"):
        kind(case.model, case.names, case.data, memory=-1)
    operator = kind(case.model, case.names, case.data)
    v = vector_for(case)
    with pytest.raises(ValueError, match=r"lacks '2.weight'"):
        operator({name: value for name, value in v.items() if name != "2.weight"})
    with pytest.raises(ValueError, match="unknown parameter 'more'"):
        operator(v | {"more": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"shape \(1,\) for '2.weight'"):
        operator(v | {"2.weight": torch.zeros(1)})


@kinds
def test_labels_and_values_that_do_not_fit_are_refused(kind: type[CurvatureOperator]) -> None:
    case = build("conv")
    v = vector_for(case)
    case.data.labels[3] = 4
    with pytest.raises(ValueError, match="label 4 but the model's classes are 0 to 3"):
        kind(case.model, case.names, case.data)(v)
    case.data.labels[3] = 0
    case.data.images[3] = torch.inf
    with pytest.raises(NonFiniteError, match="non-finite images"):
        kind(case.model, case.names, case.data)(v)
    parameters = dict(case.model.named_parameters())
    with torch.no_grad():
        parameters["2.weight"][0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"the weights of '2.weight' are not finite"):
        kind(case.model, case.names, case.data)(v)


@kinds
def test_random_data_and_changed_weights_are_told(kind: type[CurvatureOperator]) -> None:
    case = build("conv")
    v = vector_for(case)
    operator = kind(case.model, case.names, case.data, memory=0)
    operator(v)
    case.data.images += 0.5
    with pytest.raises(RuntimeError, match="the data or the model is random"):
        operator(v)
    kept = kind(case.model, case.names, case.data)
    kept(v)
    with torch.no_grad():
        nn.init.ones_(dict(case.model.named_parameters())["2.bias"])
    with pytest.raises(RuntimeError, match=r"the weights of '2.bias' changed"):
        kept(v)
