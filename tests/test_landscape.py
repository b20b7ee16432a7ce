import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from scipy.stats import spearmanr
from torch import nn

import pai_utils as pai
from pai_utils.curvature.products import directional_terms, inner_product
from pai_utils.curvature.quadratic import partial_terms
from pai_utils.curvature.spectra import Eigenpairs
from pai_utils.evaluation import evaluate_heads
from pai_utils.landscape import (
    Plane,
    difference,
    losses_on_path,
    losses_on_plane,
    plane_through,
    predicted_and_measured,
    pruning_direction,
    task_alignment,
)
from pai_utils.models.encoders import Backbone
from pai_utils.support.sampling import ALL, Draw
from tests.cases import (
    Case,
    Images,
    build,
    fingerprint,
    tiny_classifier,
    tiny_suite,
    tiny_task,
    vector_for,
)


def test_the_pruning_direction_leads_from_the_dense_to_the_pruned_weights() -> None:
    model = tiny_classifier()
    pruned = pai.prune(model, None, "magnitude", 0.5)
    for name, step in pruning_direction(model, pruned.mask).items():
        weight = model.get_parameter(name).detach()
        assert torch.equal(weight + step, pruned.model.get_parameter(name))
        assert torch.equal(step[pruned.mask[name]], torch.zeros(int(pruned.mask[name].sum())))
    with pytest.raises(ValueError, match="another architecture"):
        pruning_direction(model, pai.Mask({"other": torch.ones(2)}))


@pytest.mark.parametrize("case", ["conv", "shared weight", "unused weight"], indirect=True)
def test_measured_losses_are_those_of_the_moved_model(case: Case) -> None:
    direction = vector_for(case, 0)
    before = fingerprint(case.model)
    table = predicted_and_measured(case.model, {"v": direction}, case.data, ALL, fractions=[0, 1])
    assert fingerprint(case.model) == before
    with torch.no_grad():
        for name, step in direction.items():
            case.model.get_parameter(name).add_(step)
    assert table.measured[0] == pytest.approx(0, abs=1e-12)
    moved = pai.evaluate(case.model, case.data).loss
    assert table.dense_loss[1] + table.measured[1] == pytest.approx(moved, rel=1e-12)


def test_an_error_on_the_way_restores_the_weights_bit_for_bit() -> None:
    case = build("conv")
    before = fingerprint(case.model)
    step = {"v": {"0.weight": torch.ones(4, 3, 3, 3, dtype=torch.float64)}}
    with pytest.raises(ValueError, match="loss on 10 samples is"):
        predicted_and_measured(case.model, step, case.data, ALL, fractions=[0, 1e308])
    assert fingerprint(case.model) == before
    step = {"v": {"0.wieght": torch.ones(1)}}
    with pytest.raises(
        ValueError, match=r"unknown parameter '0\.wieght'; did you mean '0\.weight'"
    ):
        predicted_and_measured(case.model, step, case.data, ALL, fractions=[1.0])


@pytest.mark.parametrize("name", ["conv", "fused attention", "linear over tokens"])
def test_the_quadratic_prediction_is_wrong_by_third_order_only(name: str) -> None:
    case = build(name)
    table = predicted_and_measured(
        case.model, {"v": vector_for(case, 0)}, case.data, ALL, fractions=[1e-4, 2e-4]
    )
    second = (table.measured - table.taylor).abs()
    first = (table.measured - table.gradient).abs()
    assert second[1] / second[0] == pytest.approx(8, rel=0.2)
    assert first[1] / first[0] == pytest.approx(4, rel=0.2)
    assert second[0] < 1e-2 * first[0]


def test_columns_are_the_terms_of_their_definitions() -> None:
    case = build("linear over vectors")
    directions = {"v": vector_for(case, 0)}
    directions["w"] = {name: step.cos() for name, step in directions["v"].items()}
    before = fingerprint(case.model)
    table = predicted_and_measured(
        case.model, directions, case.data, Draw(6, 4, 2), fractions=[0.25, 1.0], block_size=5,
    )  # fmt: skip
    assert fingerprint(case.model) == before
    assert list(table.direction) == ["v", "v", "w", "w"]
    rows = torch.randperm(10, generator=torch.Generator().manual_seed(2))[:6]
    drawn, steps = Images(6), [*directions.values()]
    drawn.images, drawn.labels = case.data.batch(rows)
    exact = directional_terms(case.model, steps, drawn)
    parts = partial_terms(case.model, steps, drawn, Draw(None, seed=2), block_size=5)
    for row in table.to_dict("records"):
        a, number = row["fraction"], "vw".index(row["direction"])
        terms, part = exact[number], parts[number]
        gradient, half = a * terms.gradient, a**2 / 2
        expected = {
            "gradient": gradient, "hessian": half * terms.hessian, "ggn": half * terms.ggn,
            "taylor": gradient + half * terms.hessian, "diagonal": half * part.diagonal,
            "blocks": half * part.blocks, "tensors": half * part.tensors,
            "dense_loss": terms.loss, "count": 6,
        }  # fmt: skip
        assert {column: row[column] for column in expected} == pytest.approx(expected)


def orthonormal(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(20, count, generator=generator, dtype=torch.float64)
    q: torch.Tensor = torch.linalg.qr(drawn).Q
    return q.T


def named(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Vectors ``[k, 20]`` as those of two parameters."""
    return {"a": rows[:, :12].reshape(-1, 3, 4), "b": rows[:, 12:]}


def test_alignment_of_tasks_is_that_of_numpy_and_scipy() -> None:
    generator = torch.Generator().manual_seed(0)
    weights, one, other = torch.randn(3, 20, generator=generator, dtype=torch.float64)
    one, other = one.square(), other.square()
    one[:5] = 0  # ties
    diagonals = {"first": one, "second": other, "again": one}
    bases = {"first": orthonormal(2, 0), "second": orthonormal(3, 1)}
    pairs = {
        task: Eigenpairs(torch.ones(len(rows)), named(rows), torch.zeros(2), 1, converged=True)
        for task, rows in {**bases, "again": bases["first"]}.items()
    }
    parts = {task: {"a": d[:12].view(3, 4), "b": d[12:]} for task, d in diagonals.items()}
    table = task_alignment(parts, pairs, {"a": weights[:12].view(3, 4), "b": weights[12:]})
    assert len(table) == 6
    rows: Any = table.set_index(["source", "target"]).to_dict("index")
    row = rows["first", "second"]
    assert row == rows["second", "first"]
    angles = subspace_angles(bases["first"].T.numpy(), bases["second"].T.numpy())
    assert row["eigenspace_overlap"] == pytest.approx((np.cos(angles) ** 2).mean())
    assert row["chance"] == 3 / 20
    assert row["rank_correlation"] == pytest.approx(spearmanr(one, other).statistic)
    covariance = np.cov(one, other, aweights=weights.square(), ddof=0)
    expected = covariance[0, 1] / math.sqrt(covariance[0, 0] * covariance[1, 1])
    assert row["weighted_correlation"] == pytest.approx(expected)
    for column in ("eigenspace_overlap", "rank_correlation", "weighted_correlation"):
        assert rows["first", "again"][column] == pytest.approx(1)
    constant = {**parts, "second": {n: torch.ones_like(d) for n, d in parts["second"].items()}}
    assert task_alignment(constant, pairs, parts["first"]).rank_correlation.isna().sum() == 4


@pytest.fixture
def suite() -> pai.Suite:
    return tiny_suite(one=tiny_task("one"), two=tiny_task("two", classes=4))


def shifted(backbone: Backbone, amount: float) -> Backbone:
    moved = copy.deepcopy(backbone)
    with torch.no_grad():
        moved.get_parameter("encoder.0.weight").add_(amount)
        moved.get_parameter("encoder.3.bias").sub_(amount)
    return moved


def test_a_path_visits_its_stations(suite: pai.Suite) -> None:
    dense, heads, tests = suite.encoder, suite.heads, suite.tests
    stations = {"dense": dense, "moved": shifted(dense, 0.1), "far": shifted(dense, 0.3)}
    before = [fingerprint(station) for station in stations.values()]
    path = losses_on_path(stations, heads, tests, points=4)
    assert [fingerprint(station) for station in stations.values()] == before
    assert len(path) == 9 * 2
    assert list(dict.fromkeys(path.segment)) == ["dense → moved", "moved → far"]
    assert (path[path.position == 1].segment == "dense → moved").all()
    # The stations lie on one line, so that the middle of the second segment is known.
    middle = shifted(dense, 0.2)
    for place, station in zip((0, 1, 2, 1.5), (*stations.values(), middle), strict=True):
        here = path[path.position == place].set_index("task")
        for name, found in evaluate_heads(station, heads, tests).items():
            assert here.loss[name] == pytest.approx(found.loss, rel=1e-5)
            assert here.accuracy[name] == pytest.approx(found.accuracy)
            assert here["count"][name] == found.count


def test_paths_that_lead_nowhere_are_refused(suite: pai.Suite) -> None:
    dense = suite.encoder
    with pytest.raises(ValueError, match="two stations and a point, got 1"):
        losses_on_path({"dense": dense}, suite.heads, suite.tests)
    other = copy.deepcopy(dense)
    other.get_buffer("encoder.1.running_mean").add_(1)
    with pytest.raises(ValueError, match=r"'encoder\.1\.running_mean' differs"):
        losses_on_path({"dense": dense, "other": other}, suite.heads, suite.tests)
    with pytest.raises(ValueError, match="different parameters"):
        difference(dense, nn.Linear(2, 2))


def test_the_plane_through_three_networks_holds_them(suite: pai.Suite) -> None:
    dense, second = suite.encoder, shifted(suite.encoder, 0.2)
    third = copy.deepcopy(second)
    with torch.no_grad():
        third.get_parameter("encoder.0.weight").mul_(1.1)
    plane = plane_through(dense, {"second": second, "third": third})
    u, v = plane.directions
    for one, other, expected in ((u, u, 1), (v, v, 1), (u, v, 0)):
        assert float(inner_product(one, other)) == pytest.approx(expected, abs=1e-5)
    start = dict(dense.named_parameters())
    for name, network in {"dense": dense, "second": second, "third": third}.items():
        x, y = plane.points[name]
        for part, values in network.named_parameters():
            place = start[part] + sum(s * d[part] for s, d in ((x, u), (y, v)) if part in d)
            assert torch.allclose(place, values, atol=1e-6)
    before = fingerprint(dense)
    grid = losses_on_plane(dense, plane, suite.heads, suite.tests, points=3, margin=0)
    assert fingerprint(dense) == before
    assert len(grid) == 9 * 2
    corner = grid[(grid.x == 0) & (grid.y == 0)].set_index("task")
    for name, found in suite.evaluate().items():
        assert corner.loss[name] == found.loss
    assert grid.x.max() == pytest.approx(max(x for x, _ in plane.points.values()))


def test_planes_that_are_none_are_refused(suite: pai.Suite) -> None:
    dense, second = suite.encoder, shifted(suite.encoder, 0.2)
    with pytest.raises(ValueError, match="'same' has the dense weights"):
        plane_through(dense, {"same": copy.deepcopy(dense), "second": second})
    for amount in (0.4, 40):
        with pytest.raises(ValueError, match="lie on one line"):
            plane_through(dense, {"second": second, "third": shifted(dense, amount)})


def test_where_the_loss_is_not_finite_the_plane_goes_on(suite: pai.Suite) -> None:
    huge = {"encoder.0.weight": torch.full((8, 3, 3, 3), 3e38)}
    plane = Plane((huge, huge), {"dense": (0, 0), "far": (1, 1)})
    before = fingerprint(suite.encoder)
    grid = losses_on_plane(suite.encoder, plane, suite.heads, suite.tests, points=3, margin=1)
    assert fingerprint(suite.encoder) == before
    middle = (grid.x == 0) & (grid.y == 0)
    assert np.isfinite(grid.loss[middle]).all()
    assert (np.isinf(grid.loss) == grid.accuracy.isna()).all()
    assert np.isinf(grid.loss[(grid.x == 1) & (grid.y == 1)]).all()
