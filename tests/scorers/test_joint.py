from typing import Any

import pytest
from torch import Tensor

import pai_utils as pai
from tests.cases import relative_error, tiny_classifier, tiny_task


def scored(name: str, **options: Any) -> pai.Scores:
    return pai.score(name, tiny_classifier(), tiny_task().train, samples=10, **options)


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("selection", ["wanda", "random", "ggn_diag+2*obs_inputs"])
def test_layers_keep_their_budgets_and_of_these_what_the_selection_ranks_first(
    sparsity: float, selection: str
) -> None:
    budgets = pai.make_mask(scored("ggn_diag"), sparsity)
    mask = pai.make_mask(scored(f"{selection}@ggn_diag"), sparsity)
    assert mask.layer_sparsity == budgets.layer_sparsity

    def share(name: str, layer: str) -> Tensor:
        values = scored(name)[layer].double()
        return values / values.sum()

    for layer, keep in mask.items():
        chosen = (
            scored(selection)[layer]
            if "+" not in selection
            else (share("ggn_diag", layer) + 2 * share("obs_inputs", layer))
        )
        if keep.any() and not keep.all():
            assert chosen[keep].min() >= chosen[~keep].max()


def test_the_shuffle_of_a_mask_shares_with_it_what_chance_does() -> None:
    mask, shuffled = (pai.make_mask(scored(n), 0.5) for n in ("ggn_diag", "random@ggn_diag"))
    assert mask.overlap(shuffled) == pytest.approx(mask.expected_overlap(shuffled), abs=0.1)
    other = pai.score("random@ggn_diag", tiny_classifier(), tiny_task().train, seed=1, samples=10)
    assert pai.make_mask(other, 0.5).overlap(shuffled) < 0.6


def test_magnitude_by_layer_is_that_of_the_scope() -> None:
    model = tiny_classifier()
    found = pai.make_mask(pai.score("magnitude@layer", model), 0.5)
    expected = pai.make_mask(pai.score("magnitude", model), 0.5, "layer")
    assert found.overlap(expected) == 1
    assert not pai.find_scorer("magnitude@layer").needs_data


def test_a_score_at_its_own_budgets_is_itself() -> None:
    alone, found = scored("ggn_diag"), scored("ggn_diag@ggn_diag")
    assert all(relative_error(found[name], alone[name]) == 0 for name in alone)


def test_options_go_to_the_parts_that_have_them() -> None:
    scorer = pai.find_scorer("ggn_diag+obs_inputs@fisher_diag")
    assert list(scorer.options) == ["damping", "draws", "estimator"]
    undamped, expected = (scored(n, damping=0.0) for n in ("wanda@ggn_diag", "ggn_diag"))
    for name in expected:
        found, values = (scores[name].flatten().sort().values for scores in (undamped, expected))
        assert relative_error(found, values) <= 1e-6


def test_a_pruned_weight_stays_last_in_every_round() -> None:
    model, data = tiny_classifier(), tiny_task().train
    pruned = pai.prune(model, data, "random@ggn_diag", sparsity=0.6, rounds=3, samples=10)
    assert pruned.mask.sparsity == pytest.approx(0.6, abs=0.01)
    alone = pai.prune(model, data, "ggn_diag", sparsity=0.6, samples=10)
    assert pruned.report.layer_sparsity.keys() == alone.report.layer_sparsity.keys()
    again = pai.score("random@ggn_diag", pruned.model, data, samples=10)
    for name, keep in pruned.mask.items():
        assert again[name][~keep].max() <= again[name][keep].min()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("wanda@ggn", {}, "unknown scorer 'ggn'.*Choose from: .*ggn_diag"),
        ("wnda@layer", {}, "unknown scorer 'wnda'; did you mean 'wanda'"),
        ("layer@ggn_diag", {}, "unknown scorer 'layer'"),
        ("two*wanda@layer", {}, r"what stands before a \* must be a number"),
        (
            "wanda@layer",
            {"damping": 0.1},
            "'wanda@layer' has no option 'damping'; its options are: none",
        ),
        ("wanda@ggn_diag", {"damping": -1.0}, r"damping=-1\.0 must be"),
    ],
)
def test_joint_scorers_that_cannot_be_are_refused(
    name: str, options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        scored(name, **options)
