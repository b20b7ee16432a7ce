import torch
from torch import Tensor, nn
from torch.func import functional_call

import pai_utils as pai
from tests.cases import Case, Images, build, fingerprint, flattened, relative_error


def masked_change(
    model: nn.Module, names: list[str], images: Tensor, steps: list[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """|∂/∂m mean ‖f(x; θ⊙m) − f(x; (θ+Δθ)⊙m)‖²| with an explicit mask, sample by sample."""
    weights = {n: model.get_parameter(n).detach() for n in names}
    masks = {n: torch.ones_like(w, requires_grad=True) for n, w in weights.items()}
    training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    for step in steps:
        for image in images.split(1):
            pair = torch.cat([image, image])
            plain = functional_call(model, {n: weights[n] * masks[n] for n in names}, (pair,))
            moved = {n: (weights[n] + step[n]) * masks[n] for n in names}
            change = plain - functional_call(model, moved, (pair,))
            total = total + change[0].square().sum() / (len(images) * len(steps))
    model.train(training)
    gradients = torch.autograd.grad(
        total, list(masks.values()), allow_unused=True, materialize_grads=True
    )
    return {n: g.abs() for n, g in zip(names, gradients, strict=True)}


def draws(
    model: nn.Module, names: list[str], epsilon: float, seed: int, count: int
) -> list[dict[str, Tensor]]:
    """Perturbations of the weights that are not zero."""
    generator = torch.Generator().manual_seed(seed)

    def step(weight: Tensor) -> Tensor:
        drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        return epsilon * drawn * (weight != 0)

    return [{n: step(model.get_parameter(n).detach()) for n in names} for _ in range(count)]


def test_scores_are_the_masks_derivative_at_the_models_own_weights(case: Case) -> None:
    # Weights drawn anew, as public code has them, would give other scores.
    names = pai.prunable_parameters(case.model)
    steps = draws(case.model, names, 0.05, 3, 2)
    before = fingerprint(case.model)
    scores = pai.score(
        "ntk_sap", case.model, case.data, samples=None, seed=3, epsilon=0.05, perturbations=2
    )
    assert fingerprint(case.model) == before
    expected = masked_change(case.model, names, case.data.images, steps)
    assert relative_error(flattened(dict(scores)), flattened(expected)) <= 1e-10


def test_a_smaller_perturbation_changes_the_scores_by_its_square() -> None:
    # In float32 the difference of the two networks would drown at this size.
    case = build("linear over tokens")
    case.model.float()
    data = Images(dtype=torch.float32)
    one, other = (
        flattened(dict(pai.score("ntk_sap", case.model, data, samples=None, epsilon=e)))
        for e in (1e-5, 1e-6)
    )
    assert relative_error(other * 100, one) <= 1e-4


def test_pruned_weights_are_not_perturbed_and_score_zero() -> None:
    case = build("conv")
    weight = case.model.get_parameter("2.weight")
    with torch.no_grad():
        weight[:, 1] = 0
    names = pai.prunable_parameters(case.model)
    scores = pai.score("ntk_sap", case.model, case.data, samples=None, seed=1)
    assert not scores["2.weight"][:, 1].any()
    steps = draws(case.model, names, 0.01, 1, 1)
    expected = masked_change(case.model, names, case.data.images, steps)
    assert relative_error(flattened(dict(scores)), flattened(expected)) <= 1e-10
