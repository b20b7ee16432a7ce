import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pai_utils as pai
from tests.cases import (
    Case,
    fingerprint,
    flattened,
    hessian_of,
    relative_error,
    tiny_classifier,
    tiny_task,
)


def dense_gradient(model: nn.Module, names: list[str], images: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the mean cross-entropy in evaluation mode, flattened."""
    weights = [model.get_parameter(name) for name in names]
    training = model.training
    loss = F.cross_entropy(model.eval()(images), labels)
    model.train(training)
    gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in gradients])


def weights_of(case: Case, names: list[str]) -> Tensor:
    return torch.cat([case.model.get_parameter(n).detach().flatten() for n in names])


def test_snip_is_the_weight_times_the_gradient_of_the_mean_loss(case: Case) -> None:
    scores = pai.score("snip", case.model, case.data, samples=None)
    names = list(scores)
    gradient = dense_gradient(case.model, names, case.data.images, case.data.labels)
    expected = (weights_of(case, names) * gradient).abs()
    assert relative_error(flattened(dict(scores)), expected) <= 1e-10


def test_grasp_is_the_weight_times_the_hessian_times_the_gradient(case: Case) -> None:
    before = fingerprint(case.model)
    scores = pai.score("grasp", case.model, case.data, samples=None)
    assert fingerprint(case.model) == before
    names = list(scores)
    gradient = dense_gradient(case.model, names, case.data.images, case.data.labels)
    hessian = hessian_of(case, names)
    expected = weights_of(case, names) * (hessian @ gradient)
    assert relative_error(flattened(dict(scores)), expected) <= 1e-10


def test_autocast_reaches_the_gradient_of_snip_but_not_the_product_of_grasp() -> None:
    model, data = tiny_classifier(), tiny_task().train
    for name in ("snip", "grasp"):
        scores = pai.score(name, model, data, samples=8)
        with torch.autocast("cpu", torch.bfloat16):
            inside = pai.score(name, model, data, samples=8)
        same = all(torch.equal(inside[n], scores[n]) for n in scores)
        assert same == (name == "grasp")
        for n, values in scores.items():
            assert inside[n].dtype == torch.float32
            assert relative_error(inside[n], values) <= 0.1


PRUNED = ["backbone.encoder.0.weight", "backbone.encoder.3.weight"]


def test_magnitude_is_the_absolute_value_and_a_copy() -> None:
    model = tiny_classifier()
    scores = pai.score("magnitude", model)
    for name in PRUNED:
        assert torch.equal(scores[name], model.get_parameter(name).detach().abs())
        assert scores[name].data_ptr() != model.get_parameter(name).data_ptr()


def test_random_is_uniform_and_set_by_its_seed() -> None:
    model = nn.Sequential(nn.Linear(200, 200))
    first, again, other = (pai.score("random", model, seed=s)["0.weight"] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0 <= float(first.min()) < float(first.max()) < 1
    error = (1 / 12 / first.numel()) ** 0.5
    assert abs(float(first.mean()) - 0.5) <= 4 * error


def test_lamp_is_the_square_over_the_sum_of_the_squares_not_smaller() -> None:
    model = nn.Linear(3, 2, bias=False)
    model.weight.data = torch.tensor([[3.0, -1.0, 2.0], [0.0, 2.0, -4.0]])
    expected = torch.tensor([[9 / 25, 1 / 34, 4 / 33], [0.0, 4 / 33, 1.0]])
    assert torch.allclose(pai.score("lamp", model)["weight"], expected)
    nn.init.zeros_(model.weight)
    assert not pai.score("lamp", model)["weight"].any()
