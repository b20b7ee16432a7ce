import logging
import math
import re

import pytest
import torch
from torch import Tensor

from pai_utils.curvature.blocks import DAMPING, BlockFisher, fisher_blocks
from pai_utils.curvature.diagonals import fisher_diagonal, ggn_diagonal
from pai_utils.support.sampling import Draw
from tests.cases import (
    Case,
    build,
    largest_error,
    logits_of,
    per_sample_gradients,
    relative_error,
)


def spread_gradients(samples: int, weights: int, *, decades: float = 2.0) -> Tensor:
    """Correlated gradients ``[m, P]`` whose principal variances span ``2 * decades`` decades."""
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(samples, weights, generator=generator, dtype=torch.float64)
    scales = torch.logspace(0, -decades, weights, dtype=torch.float64)
    square = torch.randn(weights, weights, generator=generator, dtype=torch.float64)
    rotation: Tensor = torch.linalg.qr(square).Q
    return latent * scales @ rotation


def dense_blocks(gradients: Tensor, block_size: int, damping: float) -> list[Tensor]:
    """F of each block by its definition, the last as short as it is."""
    ridge = damping * gradients.double().square().mean()
    return [
        g.T @ g / len(g) + ridge * torch.eye(g.shape[1], dtype=torch.float64)
        for g in gradients.double().split(block_size, dim=1)
    ]


def dense_saliency(gradients: Tensor, weights: Tensor, block_size: int, damping: float) -> Tensor:
    if not gradients.any():
        return torch.zeros_like(weights)
    inverses = [
        torch.linalg.inv(m).diagonal() for m in dense_blocks(gradients, block_size, damping)
    ]
    return weights.double().square() / (2 * torch.cat(inverses))


def largest_relative_error(value: Tensor, reference: Tensor) -> float:
    """Over the entries, each relative to itself; zero must be met exactly."""
    assert torch.equal(value == 0, reference == 0)
    return float(((value - reference) / torch.where(reference == 0, 1, reference)).abs().max())


def gradients_of(case: Case) -> dict[str, Tensor]:
    """Per-sample gradients with the true labels, ``[m, P]`` a name."""
    residual = logits_of(case.model, case.data.images).softmax(1)
    residual[torch.arange(len(case.data)), case.data.labels] -= 1
    samples = per_sample_gradients(case.model, case.names, case.data.images, residual)
    stacked = (torch.stack(gradients).flatten(1) for gradients in zip(*samples, strict=True))
    return dict(zip(case.names, stacked, strict=True))


def saliencies(case: Case, **options: object) -> dict[str, Tensor]:
    return {
        blocks.name: blocks.saliency(case.model.get_parameter(blocks.name).detach().flatten())
        for blocks in fisher_blocks(case.model, case.names, case.data, **options)  # type: ignore[arg-type]
    }


# Ten samples: fewer and more than a block has weights.
@pytest.mark.parametrize("block_size", [7, 16])
def test_saliency_equals_the_dense_inverse(case: Case, block_size: int) -> None:
    found = saliencies(case, block_size=block_size, draw=Draw(None, 4))
    for name, gradients in gradients_of(case).items():
        weight = case.model.get_parameter(name).detach().flatten()
        expected = dense_saliency(gradients, weight, block_size, DAMPING)
        assert relative_error(found[name], expected) <= 1e-10, name


# One network for each way to get a sample's gradients: by its layer, and by a backward of its own.
some = pytest.mark.parametrize("case", ["conv", "fused attention", "shared weight"], indirect=True)


@some
@pytest.mark.parametrize(("block_size", "budget"), [(7, 22000), (16, 50000)])
def test_a_small_budget_takes_more_passes_and_gives_the_same(
    case: Case, block_size: int, budget: int, caplog: pytest.LogCaptureFixture
) -> None:
    whole = saliencies(case, block_size=block_size)
    with caplog.at_level(logging.INFO, "pai_utils"):
        parts = saliencies(case, block_size=block_size, memory_budget=budget)
    (number,) = re.findall(r"GiB: (\d+) passes over 10 samples", " ".join(caplog.messages))
    assert int(number) > 1
    assert largest_error(parts, whole) <= 1e-10


@pytest.mark.parametrize("damping", [1.0, 1e-4])
@pytest.mark.parametrize("samples", [6, 64])
@pytest.mark.parametrize("block_size", [1, 15, 16, 33, 64])
def test_the_inverse_is_the_dense_one(block_size: int, samples: int, damping: float) -> None:
    gradients = spread_gradients(samples, 131, decades=1)
    weights = torch.randn(131, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    blocks = BlockFisher.from_gradients(gradients, block_size=block_size, damping=damping)
    expected = dense_saliency(gradients, weights, block_size, damping)
    assert largest_relative_error(blocks.saliency(weights), expected) <= 1e-10


def test_ill_conditioned_blocks_keep_six_digits_from_float32_gradients() -> None:
    gradients = spread_gradients(1024, 500, decades=0).float()
    for block in gradients.split(50, dim=1):  # views
        block.copy_(spread_gradients(1024, 50, decades=3.6).float())
    weights = torch.ones(500)
    condition = [torch.linalg.cond(m) for m in dense_blocks(gradients, 50, 1e-7)]
    assert min(condition) >= 2e6
    blocks = BlockFisher.from_gradients(gradients, block_size=50, damping=1e-7)
    expected = dense_saliency(gradients, weights, 50, 1e-7)
    assert largest_relative_error(blocks.saliency(weights), expected) <= 1e-6


@pytest.mark.parametrize("samples", [3, 12])
def test_a_block_of_zero_gradients_has_the_damping_alone_and_moves_nothing(samples: int) -> None:
    gradients = spread_gradients(samples, 24)
    gradients[:, 8:16] = 0
    weights = torch.arange(1.0, 25.0, dtype=torch.float64)
    blocks = BlockFisher.from_gradients(gradients, block_size=8, damping=1e-2)
    ridge = 1e-2 * gradients.square().mean()
    assert relative_error(blocks.saliency(weights)[8:16], weights[8:16] ** 2 * ridge / 2) <= 1e-12
    keep = torch.arange(24) % 3 > 0
    assert torch.equal(blocks.repair(weights, keep)[8:16], (weights * keep)[8:16])


@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_the_scale_of_the_gradients_is_only_a_factor(scale: float) -> None:
    gradients = spread_gradients(32, 24)
    weights = torch.ones(24)
    one, other = (
        BlockFisher.from_gradients(g, block_size=8, damping=1e-2).saliency(weights)
        for g in (gradients, gradients * scale)
    )
    assert largest_relative_error(other / scale**2, one) <= 1e-12


@pytest.mark.parametrize(("samples", "block_size"), [(40, 8), (5, 8), (40, 30), (3, 1)])
def test_repair_is_the_closed_form(samples: int, block_size: int) -> None:
    gradients = spread_gradients(samples, 30)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(30, generator=generator, dtype=torch.float64)
    keep = torch.rand(30, generator=generator) > 0.4
    keep[:8] = True  # a block that nothing is removed from
    keep[8:16] = False  # and one that loses all
    blocks = BlockFisher.from_gradients(gradients, block_size=block_size, damping=1e-2)
    found = blocks.repair(weights, keep)
    expected = []
    parts = zip(weights.split(block_size), keep.split(block_size), strict=True)
    matrices = dense_blocks(gradients, block_size, 1e-2)
    for matrix, (w, k) in zip(matrices, parts, strict=True):
        inverse = torch.linalg.inv(matrix)
        removed = torch.eye(len(w), dtype=torch.float64)[:, ~k]
        inner = torch.linalg.inv(removed.T @ inverse @ removed)
        expected.append(w - inverse @ removed @ inner @ w[~k])
    assert relative_error(found, torch.cat(expected)) <= 1e-10
    assert not found[~keep].any()
    if block_size == 8:
        assert torch.equal(found[:8], weights[:8])


def test_blocks_of_one_weight_are_the_damped_diagonal() -> None:
    case = build("grouped conv")
    options = {"block_size": 1, "damping": 0.25}
    for estimator, diagonal in (
        ("empirical", fisher_diagonal(case.model, case.names, case.data)),
        ("mc", ggn_diagonal(case.model, case.names, case.data)),
    ):
        found = saliencies(case, estimator=estimator, **options)
        for name in case.names:
            weight = case.model.get_parameter(name).detach()
            damped = diagonal[name] + 0.25 * diagonal[name].mean()
            expected = weight.square() * damped / 2
            assert relative_error(found[name], expected.flatten()) <= 1e-12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size=0: at least one weight"),
        ({"damping": 0.0}, "damping=0.0 must be a finite number of at least 1e-10"),
        ({"damping": math.nan}, "damping=nan must"),
        ({"estimator": "true"}, "unknown estimator 'true'.*empirical, mc"),
        ({"draw": Draw(11)}, "samples=11 but the dataset holds 10"),
        (
            {"memory_budget": 500},
            "memory_budget=500 is too small: the blocks of '0.weight' take 6272",
        ),
    ],
)
def test_bad_options_are_refused_at_the_call(options: dict[str, object], message: str) -> None:
    case = build("conv")
    options = {"block_size": 7} | options
    with pytest.raises(ValueError, match=message):
        fisher_blocks(case.model, case.names, case.data, **options)  # type: ignore[arg-type]


def test_a_singular_block_is_refused_not_turned_into_nan() -> None:
    # Not a Fisher matrix at all: rounding of a nearly singular one, carried to the extreme.
    gram = torch.tensor([[[1.0, 2.0], [2.0, 1.0]]], dtype=torch.float64)
    blocks = BlockFisher("layer.weight", 2, 1e-10, gram)
    with pytest.raises(ValueError, match=r"'layer\.weight' is singular.*larger damping"):
        blocks.saliency(torch.ones(2))
