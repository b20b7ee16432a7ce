import logging
from itertools import pairwise
from typing import Any

import pytest
import torch

import pai_utils as pai
from pai_utils import pruning
from pai_utils.masks import Mask, make_mask
from pai_utils.scorers import Scores, score
from tests.cases import fingerprint, tiny_classifier, tiny_task

NAMES = ["backbone.encoder.0.weight", "backbone.encoder.3.weight"]
TOTAL = 8 * 3 * 9 + 6 * 8 * 9


@pytest.mark.parametrize("scorer", pai.SCORERS)
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_copy_is_pruned_to_the_exact_count_and_the_model_untouched(
    scorer: str, scope: str
) -> None:
    model = tiny_classifier()
    before = fingerprint(model)
    pruned = pai.prune(model, tiny_task().train, scorer, 0.6, scope, samples=8)
    assert fingerprint(model) == before
    expected = (
        round(0.6 * TOTAL) if scope == "global" else round(0.6 * 8 * 27) + round(0.6 * 6 * 72)
    )
    assert pruned.mask.total - pruned.mask.kept == expected
    dense = dict(model.named_parameters())
    for name, parameter in pruned.model.named_parameters():
        kept = pruned.mask[name] if name in pruned.mask else torch.ones_like(parameter).bool()
        assert torch.equal(parameter[kept], dense[name][kept])
        assert not parameter[~kept].any()


def test_the_report_says_what_was_done() -> None:
    pruned = pai.prune(tiny_classifier(), tiny_task().train, "fisher_diag", 0.5, samples=8, seed=4)
    report = pruned.report
    assert (report.scorer, report.scope, report.rounds) == ("fisher_diag", "global", 1)
    assert report.sparsity == pruned.mask.sparsity == pytest.approx(0.5)
    assert report.layer_sparsity == pruned.mask.layer_sparsity
    assert list(report.layer_sparsity) == NAMES
    assert report.empty_layers == []
    assert "head.weight" in report.left_out
    assert report.seconds > 0
    assert pruned.mask.metadata == {
        "scorer": "fisher_diag",
        "sparsity": "0.5",
        "scope": "global",
        "samples": "8",
        "seed": "4",
    }


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_each_round_keeps_its_share_and_scores_the_network_pruned_so_far(
    scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks: list[Mask] = []

    def remember(*args: Any, **options: Any) -> Mask:
        masks.append(make_mask(*args, **options))
        return masks[-1]

    def check(name: str, model: torch.nn.Module, *args: Any, **options: Any) -> Scores:
        for parameter, entry in (masks[-1] if masks else {}).items():
            assert not model.get_parameter(parameter)[~entry].any()
        return score(name, model, *args, **options)

    monkeypatch.setattr(pruning, "make_mask", remember)
    monkeypatch.setattr(pruning, "score", check)
    model, data = tiny_classifier(), tiny_task().train
    pruned = pai.prune(model, data, "ggn_diag", 0.9, scope, rounds=4, samples=8)
    assert len(masks) == 4
    for step, mask in enumerate(masks, 1):
        share = 1 - 0.1 ** (step / 4)
        sizes = [TOTAL] if scope == "global" else [8 * 27, 6 * 72]
        assert mask.total - mask.kept == sum(round(share * size) for size in sizes)
    for earlier, later in pairwise(masks):
        assert all(bool((later[n] <= earlier[n]).all()) for n in NAMES)
    assert pruned.report.rounds == 4
    monkeypatch.undo()
    one_shot = pai.prune(model, data, "ggn_diag", 0.9, scope, samples=8)
    assert any(not torch.equal(pruned.mask[n], one_shot.mask[n]) for n in NAMES)


def test_patterns_prune_in_one_round_only() -> None:
    model, data = tiny_classifier(), tiny_task().train
    pruned = pai.prune(model, data, "magnitude", 0.5, "2:4")
    # Three input channels make one group of three, of which two stay.
    assert pruned.mask.layer_sparsity == pytest.approx({NAMES[0]: 1 / 3, NAMES[1]: 1 / 2})
    with pytest.raises(ValueError, match="'2:4' fixes the sparsity at once; use rounds=1"):
        pai.prune(model, data, "magnitude", 0.5, "2:4", rounds=2)


def test_a_layer_pruned_to_nothing_is_allowed_and_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny_classifier()
    with torch.no_grad():
        model.get_parameter(NAMES[0]).mul_(1e-6)
    with caplog.at_level(logging.WARNING, "pai_utils"):
        pruned = pai.prune(model, None, "magnitude", 0.4)
    assert pruned.report.empty_layers == [NAMES[0]]
    assert caplog.messages == [f"pruned to nothing: {NAMES[0]}"]
    assert torch.isfinite(pruned.model(torch.randn(2, 3, 8, 8))).all()
    again = pai.prune(pruned.model, tiny_task().train, "ggn_diag", 0.6, rounds=2, samples=8)
    assert NAMES[0] in again.report.empty_layers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compensation": "moment"}, "unknown compensation 'moment'.* Choose from: none"),
        ({"rounds": 0}, "rounds=0"),
        ({"sparsity": 1.0}, r"sparsity=1\.0"),
        ({"sparsity": -0.5}, r"sparsity=-0\.5"),
        ({"scope": "neuron"}, "unknown scope 'neuron'"),
        ({"scope": "2:4"}, r"sparsity is 0\.5, not 0\.7"),
        ({"scorer": "magnitud"}, "unknown scorer 'magnitud'; did you mean 'magnitude'"),
        ({"draw": 2}, "has no option 'draw'; its options are: estimator, draws"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pai.prune(tiny_classifier(), tiny_task().train, **({"samples": 8} | options))


def test_a_misspelled_scope_is_told_before_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "score", lambda *_, **__: pytest.fail("scored first"))
    with pytest.raises(ValueError, match="unknown scope"):
        pai.prune(tiny_classifier(), tiny_task().train, scope="globl")
