import copy
import logging
import re
from typing import Any

import pytest
import torch
from timm.layers.std_conv import StdConv2d
from torch.nn.utils import prune

import pai_utils as pai
from pai_utils import pruning
from pai_utils.masks import Mask, make_mask
from pai_utils.pruning import Recipe, follow
from pai_utils.repair.methods import Repair, repair_
from pai_utils.scorers import Scores, score
from pai_utils.support.sampling import Draw
from tests.cases import fingerprint, tiny_classifier, tiny_task

NAMES = ["backbone.encoder.0.weight", "backbone.encoder.3.weight"]
TOTAL = 8 * 3 * 9 + 6 * 8 * 9
Scored = list[tuple[dict[str, torch.Tensor], Scores]]


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> Scored:
    """The weights and the scores of each round that was scored."""
    rounds: Scored = []

    def watch(name: str, model: torch.nn.Module, *args: Any, **options: Any) -> Scores:
        before = copy.deepcopy(model.state_dict())
        rounds.append((before, score(name, model, *args, **options)))
        return rounds[-1][1]

    monkeypatch.setattr(pruning, "score", watch)
    return rounds


@pytest.mark.parametrize("scorer", pai.SCORERS)
def test_a_copy_is_pruned_to_the_exact_count_and_the_model_untouched(scorer: str) -> None:
    model = tiny_classifier()
    before = fingerprint(model)
    pruned = pai.prune(model, tiny_task().train, scorer, 0.6, samples=8)
    assert fingerprint(model) == before
    assert pruned.mask.kept == TOTAL - round(0.6 * TOTAL)
    dense = dict(model.named_parameters())
    for name, parameter in pruned.model.named_parameters():
        kept = pruned.mask[name] if name in pruned.mask else torch.ones_like(parameter).bool()
        assert torch.equal(parameter[kept], dense[name][kept])
        assert not parameter[~kept].any()


def test_mask_and_report_say_what_was_done_and_to_which_weights() -> None:
    model = tiny_classifier()
    settings: dict[str, Any] = {"samples": 8, "seed": 4, "estimator": "exact", "source": "spots"}
    pruned = pai.prune(model, tiny_task().train, "ggn_diag", 0.5, "layer", rounds=2, **settings)
    weights = pruned.mask.metadata.pop("weights")
    assert re.fullmatch("sha256:[0-9a-f]{64}", weights)
    assert pruned.mask.metadata == {
        "encoder": model.backbone.name, "provenance": model.backbone.provenance.source,
        "source": "spots", "samples": "8", "seed": "4", "scorer": "ggn_diag",
        "scorer.estimator": "exact", "sparsity": "0.5", "scope": "layer", "rounds": "2",
        "schedule": "exponential", "repair": "none",
    }  # fmt: skip
    report = pruned.report
    assert (report.scorer, report.scope, report.rounds) == ("ggn_diag", "layer", 2)
    assert report.schedule == "exponential"
    assert report.sparsity == pruned.mask.sparsity == pytest.approx(0.5)
    assert report.layer_sparsity == dict.fromkeys(NAMES, 0.5)
    assert report.empty_layers == []
    assert "head.weight" in report.left_out
    assert report.seconds > 0


def test_a_mask_fits_the_dense_the_pruned_and_the_fine_tuned_model_but_no_other() -> None:
    model, data = tiny_classifier(), tiny_task().train
    pruned = pai.prune(model, data, "magnitude", 0.5, rounds=3)
    pruned.mask.check(model)
    pai.finetune(pruned.model, data, pruned.mask, steps=2, learning_rate=0.1)
    assert not torch.equal(pruned.model.get_parameter(NAMES[0]), model.get_parameter(NAMES[0]))
    pruned.mask.check(pruned.model)
    with torch.no_grad():
        model.get_parameter(NAMES[1]).view(-1)[-1].nextafter_(torch.tensor(9.0))
    with pytest.raises(ValueError, match="made for other weights of the same shapes"):
        pruned.mask.apply_(model)
    pruned.mask.apply_(model, strict=False)
    assert not model.get_parameter(NAMES[1])[~pruned.mask[NAMES[1]]].any()


# Weights left after each of the rounds, at 90 % sparsity. A schedule of the removed fraction
# would leave other numbers: 1 - 0.9^(4/r), say, is 34 % after the first of four rounds.
LEFT = {
    ("exponential", 4): [10 ** (-1 / 4), 10 ** (-1 / 2), 10 ** (-3 / 4), 0.1],
    ("linear", 4): [0.775, 0.55, 0.325, 0.1],
    ("exponential", 1): [0.1],
}


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize(("schedule", "rounds"), LEFT)
def test_each_round_keeps_its_share_and_scores_the_network_pruned_so_far(
    scope: str, schedule: str, rounds: int, scored: Scored, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks: list[Mask] = []

    def remember(*args: Any, **options: Any) -> Mask:
        masks.append(make_mask(*args, **options))
        return masks[-1]

    monkeypatch.setattr(pruning, "make_mask", remember)
    model, data = tiny_classifier(), tiny_task().train
    pai.prune(model, data, "ggn_diag", 0.9, scope, rounds=rounds, schedule=schedule, samples=8)
    assert len(masks) == len(scored) == rounds
    for share, mask in zip(LEFT[schedule, rounds], masks, strict=True):
        sizes = [8 * 27, 6 * 72] if scope == "layer" else [TOTAL]
        assert mask.kept == sum(size - round((1 - share) * size) for size in sizes)
    for earlier, later, (weights, _) in zip(masks, masks[1:], scored[1:], strict=False):
        assert all(bool((later[n] <= earlier[n]).all()) for n in NAMES)
        assert not any(weights[n][~earlier[n]].any() for n in NAMES)


def test_each_round_scores_the_network_repaired_so_far(scored: Scored) -> None:
    model, data = tiny_classifier(), tiny_task().train
    repaired: dict[str, Any] = {"repair": "layerwise+moments", "samples": 8}
    pruned = pai.prune(model, data, "ggn_diag", 0.75, rounds=2, **repaired)
    half = pai.prune(model, data, "ggn_diag", 0.5, **repaired)
    torch.testing.assert_close(scored[1][0], dict(half.model.state_dict()), rtol=0, atol=0)
    # Both rounds start from the dense weights, so that errors of the first repair are not kept.
    alone = copy.deepcopy(model)
    pruned.mask.apply_(alone)
    repair_(alone, model, pruned.mask, data, Repair("layerwise+moments"))
    torch.testing.assert_close(alone.state_dict(), pruned.model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("scorer", "scope", "rounds", "repair"),
    [
        ("random", "global", 2, "obs+layerwise+moments"),
        ("ggn_diag", "layer", 3, "none"),
        ("ggn_diag", "2:4", 1, "obs+layerwise+moments"),
    ],
)
def test_a_pruned_model_is_pruned_further_to_the_exact_count_and_nothing_comes_back(
    scorer: str, scope: str, rounds: int, repair: str
) -> None:
    dense, data = tiny_classifier(), tiny_task().train
    how: dict[str, Any] = {"samples": 8, "repair": repair}
    with torch.no_grad():
        dense.get_parameter(NAMES[0]).mul_(0.15)
    first = pai.prune(dense, data, "magnitude", 0.4, **how)
    assert first.report.layer_sparsity[NAMES[0]] > 0.7  # more than a layer is asked for
    sparsity = 0.5 if scope == "2:4" else 0.7
    how |= {"rounds": rounds, "seed": 1}
    for model, within in ((first.model, None), (first.model, first.mask), (dense, first.mask)):
        again = pai.prune(model, data, scorer, sparsity, scope, within=within, **how)
        sizes = [8 * 27, 6 * 72] if scope == "layer" else [TOTAL]
        kept = sum(size - round(sparsity * size) for size in sizes)
        # Of four weights, two or fewer may be left already.
        assert again.mask.kept == kept or (scope == "2:4" and again.mask.kept < kept)
        assert all(bool((again.mask[n] <= first.mask[n]).all()) for n in NAMES)
        alive = {n: again.model.get_parameter(n) != 0 for n in NAMES}
        assert all(torch.equal(alive[n], again.mask[n]) for n in NAMES)


def test_rounds_start_from_what_is_pruned_already(scored: Scored) -> None:
    model, data = tiny_classifier(), tiny_task().train
    first = pai.prune(model, None, "magnitude", 0.2)
    again = pai.prune(
        model, data, "ggn_diag", 0.9, rounds=3, schedule="linear", samples=8, within=first.mask
    )
    alive = [sum(int(weights[name].count_nonzero()) for name in NAMES) for weights, _ in scored[1:]]
    assert alive == [
        first.mask.kept,
        *(TOTAL - round(s * TOTAL) for s in (0.2 + 0.7 / 3, 0.2 + 1.4 / 3)),
    ]
    assert again.mask.kept == TOTAL - round(0.9 * TOTAL)


def test_less_than_is_pruned_already_is_refused_and_nothing_more_keeps_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = pai.prune(tiny_classifier(), None, "magnitude", 0.6)
    same = pai.prune(first.model, tiny_task().train, "random", 0, repair="layerwise", samples=8)
    assert all(torch.equal(same.mask[name], first.mask[name]) for name in NAMES)
    monkeypatch.setattr(pruning, "score", lambda *_, **__: pytest.fail("scored first"))
    for model, within in ((first.model, None), (tiny_classifier(), first.mask)):
        with pytest.raises(ValueError, match=r"sparsity=0\.5 is below .* already, 0\.6003"):
            pai.prune(model, None, "random", 0.5, within=within)
    with pytest.raises(ValueError, match=f"within= prunes weights of '{NAMES[1]}'"):
        pai.prune(tiny_classifier(), None, "random", 0.7, within=first.mask, include="*.0")
    with pytest.raises(ValueError, match="the mask is for another architecture"):
        pai.prune(tiny_classifier().backbone, None, "random", 0.7, within=first.mask)


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
        ({"rounds": 0}, "rounds=0"),
        ({"schedule": "cubic"}, "unknown schedule 'cubic'.* Choose from: exponential, linear"),
        ({"exclude": "*.encoder.O"}, r"matches '\*\.encoder\.O'; names near it: backbone\.encoder"),
        ({"include": ["*.0", "*.Encoder"]}, r"matches '\*\.Encoder'"),  # letters count
        ({"include": "encoder"}, "matches 'encoder'"),  # patterns are of whole names
        ({"include": "*.0", "exclude": NAMES[0]}, "leave no weight to prune"),
        ({"sparsity": 1.0}, r"sparsity=1\.0"),
        ({"scope": "2:4", "sparsity": 0.5, "rounds": 2}, "fixes the sparsity at once; use rounds="),
        ({"draw": 2}, "has no option 'draw'; its options are: estimator, draws"),
        ({"scope": "globl"}, "unknown scope"),
        ({"repair": "obs", "repair_options": {"model": None}}, "unknown repair option 'model'"),
        ({"batch_size": 0}, "batch_size=0: at least one sample a batch"),
    ],
)
def test_impossible_settings_are_told_before_the_scores(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "score", lambda *_, **__: pytest.fail("scored first"))
    with pytest.raises(ValueError, match=message):
        pai.prune(tiny_classifier(), tiny_task().train, **options)


def test_scores_that_are_known_are_not_computed_again(scored: Scored) -> None:
    model, data = tiny_classifier(), tiny_task().train
    recipe, draw = Recipe("ggn_diag", 0.6, rounds=2), Draw(8)
    known = score("ggn_diag", model, data, samples=8)
    wanted = follow(recipe, model, data, draw)
    found = follow(recipe, model, data, draw, scores=known)
    assert len(scored) == 2 + 1  # of the last, the second round
    assert all(torch.equal(found.mask[name], wanted.mask[name]) for name in NAMES)
    assert "weights" not in found.mask.metadata


def test_sparsity_is_that_of_the_weights_that_are_left_in_and_only_they_are_scored(
    scored: Scored,
) -> None:
    model, data = tiny_classifier(), tiny_task().train
    pruned = pai.prune(model, data, "ggn_diag", 0.9, rounds=2, exclude="*.encoder.0", samples=8)
    assert list(pruned.mask) == NAMES[1:]
    assert pruned.mask.kept == 6 * 72 - round(0.9 * 6 * 72)
    assert torch.equal(pruned.model.get_parameter(NAMES[0]), model.get_parameter(NAMES[0]))
    assert NAMES[0] in pruned.report.left_out
    assert NAMES[1] not in pruned.report.left_out
    same = pai.prune(model, data, "ggn_diag", 0.9, rounds=2, include=NAMES[1], samples=8)
    assert torch.equal(same.mask[NAMES[1]], pruned.mask[NAMES[1]])
    assert [list(scores) for _, scores in scored] == [NAMES[1:]] * 4


def test_no_mask_is_made_or_applied_where_it_would_not_hold(scored: Scored) -> None:
    layers = StdConv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3), torch.nn.Flatten()
    model = torch.nn.Sequential(*layers, torch.nn.LazyLinear(3)).eval()
    model(torch.zeros(1, 3, 8, 8))
    data = tiny_task().train
    for layer in (model, torch.nn.Sequential(model)):
        with pytest.raises(ValueError, match=r"no mask holds in '(0\.)?0\.weight': what StdConv2d"):
            pai.prune(layer, data, "ggn_diag", 0.5, samples=8)
    assert not scored
    mask = make_mask(score("ggn_diag", model, data, samples=8), 0.5)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"no mask holds in '0\.weight'"):
        mask.apply_(model, strict=False)
    assert fingerprint(model) == before
    kept = pai.prune(model, data, "ggn_diag", 0.5, samples=8, exclude="0").mask
    assert list(kept) == ["2.weight", "4.weight"]


def test_layers_with_computed_tensors_are_left_out_or_keep_them() -> None:
    data, names = tiny_task().train, ["0.weight", "3.weight"]
    layers = torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 4)
    bare: Any = torch.nn.Sequential(*layers, torch.nn.Linear(4, 3))
    with torch.no_grad():
        bare[0].bias[:2] = 0
    model = copy.deepcopy(bare)
    prune.custom_from_mask(model[0], "bias", torch.tensor([0, 0, 1, 1]))
    prune.identity(model[4], "weight")
    images, _ = data.batch(range(len(data)))
    model(images)  # now both tensors have a graph
    how: dict[str, Any] = {"samples": 8, "exclude": "4"}
    found, wanted = (pai.prune(m, data, "ggn_diag", 0.5, rounds=2, **how) for m in (model, bare))
    assert list(found.mask) == names
    assert all(torch.equal(found.mask[name], wanted.mask[name]) for name in names)
    torch.testing.assert_close(found.model(images), wanted.model(images))
    repaired = pai.prune(model, data, "ggn_diag", 0.5, repair="layerwise", **how).model
    errors = [float((m(images) - bare(images)).detach().norm()) for m in (repaired, wanted.model)]
    assert errors[0] < 0.7 * errors[1]
    # What a hook would overwrite is no repair's to change.
    assert torch.equal(repaired.get_parameter("0.bias_orig"), bare[0].bias)


@pytest.mark.parametrize(
    ("include", "exclude", "chosen"),
    [
        (None, (), ["stem.weight", "blocks.1.fc.weight", "blocks.10.fc.weight"]),
        ("blocks.1", (), ["blocks.1.fc.weight"]),
        ("blocks.1*", (), ["blocks.1.fc.weight", "blocks.10.fc.weight"]),
        ("*.fc", "blocks.1", ["blocks.10.fc.weight"]),
        (["blocks.1[0]", "st?m"], (), ["stem.weight", "blocks.10.fc.weight"]),
        (None, ["stem.weight", "*.10.*"], ["blocks.1.fc.weight"]),
    ],
)
def test_patterns_choose_weights_and_whole_modules(
    include: Any, exclude: Any, chosen: list[str]
) -> None:
    names = ["stem.weight", "blocks.1.fc.weight", "blocks.10.fc.weight"]
    assert pai.select_parameters(names, include, exclude) == chosen
