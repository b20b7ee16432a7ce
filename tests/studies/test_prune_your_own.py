"""The choice reads the validation part alone, is made again exactly, and is then compared."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor

import pai_utils as pai
from pai_utils.data.images import ImageDataset
from pai_utils.data.tasks import Task
from pai_utils.studies import prune_your_own as study
from tests.cases import fingerprint, tiny_dataset, tiny_suite, tiny_task


class Sealed(ImageDataset):
    """Nobody may look at its images."""

    def batch(self, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        raise AssertionError("a sealed part was read")

    __getitem__ = batch  # type: ignore[assignment]


def sealed(data: ImageDataset) -> Sealed:
    return Sealed(data.images, data.labels, data.transform)


def task(**parts: ImageDataset) -> Task:
    given: dict[str, Any] = {"validation": tiny_dataset(60, 3, 7), **parts}
    return replace(tiny_task("digits"), **given)


def parameters(**changes: Any) -> study.Parameters:
    given = {
        "backbone": "tiny", "source": "digits", "targets": ["photos"], "sparsities": [0.3, 0.6],
        "scorers": ["snip"], "repair": "none", "samples": 16, "seed": 3, "out": "out",
    }  # fmt: skip
    return study.Parameters(**{**given, **changes})


def table(*rows: tuple[str, float, float]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["scorer", "sparsity", "retention"])


def test_the_highest_sparsity_within_the_tolerance_is_chosen() -> None:
    rows = table(
        ("snip", 0.7, 0.80), ("snip", 0.2, 0.99), ("magnitude", 0.5, 0.96), ("snip", 0.5, 0.949),
        ("magnitude", 0.2, 1.0),
    )  # fmt: skip
    assert [*study.choose(rows, 0.05)] == ["magnitude", 0.5, 0.96]
    assert study.choose(rows, 0.2).sparsity == 0.7
    assert [*study.choose(rows, 0.0)] == ["magnitude", 0.2, 1.0]
    # Of several there, the one that keeps most; of equals the first.
    rows = table(("a", 0.5, 0.96), ("b", 0.5, 0.98), ("c", 0.5, 0.98), ("d", 0.4, 1.0))
    assert study.choose(rows, 0.05).scorer == "b"


def test_where_no_candidate_keeps_enough_the_best_is_named() -> None:
    rows = table(("snip", 0.5, 0.6), ("magnitude", 0.2, 0.875), ("random", 0.2, 0.1))
    with pytest.raises(
        ValueError,
        match=r"no candidate keeps 0\.900 .*; magnitude at sparsity 0\.2 keeps 0\.875: add lower",
    ):
        study.choose(rows, 0.1)


def test_candidates_are_compared_without_a_look_at_test_images() -> None:
    suite = tiny_suite(digits=task())
    blind = replace(suite, tasks={"digits": task(test=sealed(tiny_dataset(24, 3, 2)))})
    config = parameters(scorers=["snip", "magnitude"], repair="moments")
    found = study.compare_candidates(blind, config)
    assert set(found["count"]) == {60}
    assert [*zip(found.scorer, found.sparsity, strict=True)] == [
        ("snip", 0.3), ("snip", 0.6), ("magnitude", 0.3), ("magnitude", 0.6)
    ]  # fmt: skip
    # That a sealed part tells is seen where it is read.
    stages = {"pruned": blind.classifier("digits")}
    with pytest.raises(AssertionError, match="sealed"):
        study.compare_stages(stages, blind, config, found.iloc[0])


@pytest.mark.parametrize(
    ("prune_by", "repair"),
    [(None, "none"), ("digits+noise", "layerwise+moments"), ("digits:random_labels", "obs")],
)
@pytest.mark.parametrize("scorer", ["snip", "feature_ggn_diag", "random"])
def test_what_is_pruned_is_the_candidate_that_was_chosen(
    scorer: str, repair: str, prune_by: str | None
) -> None:
    suite = tiny_suite(digits=task())
    config = parameters(scorers=[scorer], repair=repair, prune_by=prune_by)
    before = fingerprint(suite.encoder)
    for _, row in study.compare_candidates(suite, config).iterrows():
        stages, mask = study.prune_as_chosen(row, suite, config)
        validation = suite.tasks["digits"].validation
        assert pai.evaluate(stages["pruned"], validation).accuracy == row.accuracy
        assert stages["pruned"].head is suite.heads["digits"]
        assert mask.sparsity == pytest.approx(row.sparsity, abs=0.01)
        assert mask.metadata["source"] == (prune_by or "digits")
        mask.check(suite.classifier("digits"))  # by the checksum of the weights
    assert fingerprint(suite.encoder) == before


def test_an_encoder_at_chance_has_nothing_to_retain() -> None:
    suite = tiny_suite(digits=task())
    with torch.no_grad():
        suite.heads["digits"].weight.zero_()
        suite.heads["digits"].bias.zero_()
    with pytest.raises(ValueError, match=r"on the validation part of digits .* nothing to retain"):
        study.compare_candidates(suite, parameters())


def test_stages_are_compared_with_the_dense_encoder_on_test_images() -> None:
    suite = tiny_suite(digits=task(), photos=tiny_task("photos", classes=2))
    blind = {n: replace(t, validation=sealed(t.validation)) for n, t in suite.tasks.items()}
    suite = replace(suite, tasks=blind)
    config = parameters(scorers=["magnitude"], finetune_steps=2, learning_rate=1e-2)
    choice = pd.Series({"scorer": "magnitude", "sparsity": 0.6})
    stages, mask = study.prune_as_chosen(choice, suite, config)
    tuned = stages["fine-tuned"]
    assert not any(tuned.get_parameter(name)[~kept].any() for name, kept in mask.items())
    stages = {"same": suite.classifier("digits"), **stages}
    found = study.compare_stages(stages, suite, config, choice).set_index(["stage", "target"])
    everything = [*stages, "shuffled"]
    assert list(found.index) == [(s, t) for s in everything for t in ("digits", "photos")]
    control = pai.prune(
        suite.classifier("digits"), suite.tasks["digits"].train, scorer="random@magnitude",
        sparsity=0.6, samples=config.samples, seed=config.seed, repair=config.repair,
    )  # fmt: skip
    kept = pai.evaluate(control.model, suite.tasks["digits"].test).accuracy
    assert found.loc[("shuffled", "digits"), "accuracy"] == kept
    assert found.loc[("shuffled", "digits"), "scorer"] == "random@magnitude"
    assert found[["retention", "low", "high"]].iloc[:2].eq(1).all(axis=None)
    for name, dense in suite.evaluate().items():
        row: Any = found.loc["fine-tuned", name]
        assert row.accuracy == suite.evaluate(tuned.backbone)[name].accuracy
        assert row.dense_accuracy == dense.accuracy
        assert (row.source, row.scorer, row.sparsity) == ("digits", "magnitude", 0.6)


def test_a_folder_of_images_goes_all_the_way_to_a_file(tmp_path: Path) -> None:
    for label, bird in enumerate(["crow", "robin", "wren"]):
        (tmp_path / "birds" / bird).mkdir(parents=True)
        for number in range(20):
            pixels = torch.randint(0, 120, (10, 10, 3), dtype=torch.uint8)
            pixels[..., label] += 100
            Image.fromarray(pixels.numpy()).save(tmp_path / "birds" / bird / f"{number}.png")
    name = f"folder:{tmp_path / 'birds'}"
    encoder = pai.load_backbone("test_resnet", image_size=32, pretrained=False, device="cpu")
    images = pai.load_task(name, encoder.transform)
    assert images.class_names == ("crow", "robin", "wren")
    suite = pai.Suite(encoder, {name: images}, {name: pai.fit_head(encoder, images)})
    # More samples than there are images are all of them.
    config = parameters(
        source=name, scorers=["snip", "magnitude"], sparsities=[0.1, 0.2], samples=1_000_000,
        prune_by=f"{name}+{name}:altered+noise",
    )  # fmt: skip
    choice = study.choose(study.compare_candidates(suite, config), 0.5)
    stages, mask = study.prune_as_chosen(choice, suite, config)
    first, _ = images.test.batch(range(4))
    model = stages["pruned"]
    files = pai.export.write_formats(model, mask, tmp_path, first, ["compressed"])
    again = pai.load_classifier(tmp_path / files.file.item(), "cpu")
    assert pai.evaluate(again, images.test).accuracy == pai.evaluate(model, images.test).accuracy
