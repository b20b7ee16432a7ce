from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F

import pai_utils as pai
from tests.cases import (
    Case,
    Layers,
    Limited,
    build,
    dense_hessian,
    fingerprint,
    flattened,
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
    hessian = dense_hessian(case.model, names, case.data)
    expected = weights_of(case, names) * (hessian @ gradient)
    assert relative_error(flattened(dict(scores)), expected) <= 1e-10


def test_the_temperature_divides_the_logits() -> None:
    case = build("linear over tokens")
    scores = pai.score("grasp", case.model, case.data, samples=None, temperature=20.0)
    names = list(scores)
    divided = Layers(lambda m, x: m.model(x) / 20, model=case.model)
    inner = [f"model.{name}" for name in names]
    gradient = dense_gradient(divided, inner, case.data.images, case.data.labels)
    hessian = dense_hessian(divided, inner, case.data)
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


@pytest.mark.parametrize("name", ["snip", "grasp"])
def test_running_out_of_memory_halves_the_batch_and_changes_nothing(name: str) -> None:
    case = build("conv")
    expected = pai.score(name, case.model, case.data, samples=None)
    limited = Limited(case.model, 3)
    found = pai.score(name, limited, case.data, samples=None, batch_size=8)
    assert relative_error(flattened(dict(found)), flattened(dict(expected))) <= 1e-10


NAMES = ("snip", "grasp", "px", "ntk_sap")


def _scores_of_a_process(rank: int, file: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=2
    )
    case = build("conv")
    for name in NAMES:
        scores = pai.score(name, case.model, case.data, samples=7, batch_size=2)
        torch.save(flattened(dict(scores)), f"{out}-{name}-{rank}")
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_scores_of_one(tmp_path: Path) -> None:
    spawn(_scores_of_a_process, (str(tmp_path / "store"), str(tmp_path / "scores")), nprocs=2)
    case = build("conv")
    for name in NAMES:
        alone = flattened(dict(pai.score(name, case.model, case.data, samples=7)))
        for rank in (0, 1):
            found = torch.load(tmp_path / f"scores-{name}-{rank}", weights_only=True)
            assert relative_error(found, alone) <= 1e-10, name


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
