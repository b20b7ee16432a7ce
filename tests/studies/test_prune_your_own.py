"""The choice reads the validation part alone, is made again exactly, and is then compared."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import pai_utils as pai
from pai_utils.data.images import ImageDataset
from pai_utils.data.tasks import Task
from pai_utils.studies.prune_your_own import (
    Choice,
    choose,
    compare_stages,
    prune_as_chosen,
    validation_sweep,
)
from tests.cases import tiny_backbone, tiny_dataset, tiny_task


class Sealed(ImageDataset):
    """Nobody may look at its images."""

    def batch(
        self, indices: Sequence[int] | Tensor | slice, device: torch.device | None = None
    ) -> tuple[Tensor, Tensor]:
        raise AssertionError("a sealed part was read")

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        raise AssertionError("a sealed part was read")


def sealed(data: ImageDataset) -> Sealed:
    return Sealed(data.images, data.labels, data.transform)


def spots(**parts: ImageDataset) -> Task:
    given: dict[str, Any] = {"validation": tiny_dataset(60, 3, 7), **parts}
    return replace(tiny_task(), **given)


def table(*rows: tuple[str, float, float]) -> pd.DataFrame:
    made = pd.DataFrame(rows, columns=["scorer", "sparsity", "retention"])
    return made.assign(low=made.retention - 0.1, high=made.retention + 0.1)


def test_the_highest_sparsity_within_the_tolerance_is_chosen() -> None:
    rows = table(
        ("snip", 0.7, 0.80),
        ("snip", 0.2, 0.99),
        ("magnitude", 0.5, 0.96),
        ("snip", 0.5, 0.949),
        ("magnitude", 0.2, 1.0),
    )
    assert choose(rows, 0.05) == Choice("magnitude", 0.5, 0.96, 0.86, 1.06, tried=5)
    assert choose(rows, 0.2).sparsity == 0.7
    assert choose(rows, 0.0) == Choice("magnitude", 0.2, 1.0, 0.9, 1.1, tried=5)


def test_of_several_scorers_there_the_one_that_keeps_most_is_chosen() -> None:
    rows = table(("a", 0.5, 0.96), ("b", 0.5, 0.98), ("c", 0.5, 0.97), ("d", 0.4, 1.0))
    assert choose(rows, 0.05).scorer == "b"
    # Of equals the first.
    equal = table(("b", 0.5, 0.96), ("a", 0.5, 0.96))
    assert choose(equal, 0.05).scorer == "b"


def test_where_no_candidate_keeps_enough_the_best_is_named() -> None:
    rows = table(("snip", 0.5, 0.6), ("magnitude", 0.2, 0.875), ("random", 0.2, 0.1))
    with pytest.raises(
        ValueError,
        match=r"no candidate keeps 0\.900 .*; magnitude at sparsity 0\.2 keeps 0\.875: add lower",
    ):
        choose(rows, 0.1)


@pytest.mark.parametrize("tolerance", [5, 1.0, -0.1, math.nan])
def test_a_tolerance_that_is_no_fraction_is_refused(tolerance: float) -> None:
    with pytest.raises(ValueError, match=r"tolerance=.* must be a fraction"):
        choose(table(("snip", 0.5, 0.6)), tolerance)


def test_without_candidates_nothing_is_chosen() -> None:
    with pytest.raises(ValueError, match="no candidate to choose from"):
        choose(table(), 0.1)


def test_a_sweep_for_a_choice_reads_no_test_image() -> None:
    encoder, task = tiny_backbone(), spots()
    head = pai.fit_head(encoder, task)
    blind = replace(task, test=sealed(task.test))
    found = validation_sweep(
        encoder, "spots", blind, head,
        scorers=["snip", "magnitude"], sparsities=[0.2, 0.5], repair="moments", samples=8,
    )  # fmt: skip
    assert set(found["count"]) == {60}
    assert [*zip(found.scorer, found.sparsity, strict=True)] == [
        ("snip", 0.2), ("snip", 0.5), ("magnitude", 0.2), ("magnitude", 0.5)
    ]  # fmt: skip
    # That a sealed part tells is seen where it is read.
    with pytest.raises(AssertionError, match="sealed"):
        compare_stages(
            {"dense": encoder, "pruned": encoder}, {"spots": blind}, {"spots": head},
            Choice("snip", 0.2, 1, 1, 1, 1), source="spots",
        )  # fmt: skip


@pytest.mark.parametrize("prune_by", [None, "spots+noise", "spots:random_labels"])
@pytest.mark.parametrize("repair", ["none", "moments", "layerwise", "obs"])
@pytest.mark.parametrize("scorer", ["snip", "feature_ggn_diag", "magnitude", "random"])
def test_what_is_pruned_is_the_candidate_that_was_chosen(
    scorer: str, repair: str, prune_by: str | None
) -> None:
    encoder, task = tiny_backbone(), spots()
    head = pai.fit_head(encoder, task)
    settings: dict[str, Any] = {
        "prune_by": prune_by, "repair": repair, "samples": 16, "seed": 3
    }  # fmt: skip
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    sparsities = [0.3, 0.6]
    found = validation_sweep(
        encoder, "spots", task, head, scorers=[scorer], sparsities=sparsities, **settings
    )
    assert list(found.scorer) == [scorer] * 2
    for row in found.itertuples():
        choice = Choice(scorer, float(str(row.sparsity)), 1, 1, 1, 1)
        pruned = prune_as_chosen(choice, encoder, "spots", task, head, **settings)
        assert pai.evaluate(pruned.model, task.validation).accuracy == row.accuracy
        assert pruned.mask.sparsity == pytest.approx(choice.sparsity, abs=0.01)
        assert pruned.mask.metadata["source"] == (prune_by or "spots")
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_an_encoder_at_chance_has_nothing_to_retain() -> None:
    encoder, task = tiny_backbone(), spots()
    constant = nn.Linear(encoder.feature_dim, 3)
    with torch.no_grad():
        constant.weight.zero_()
    with pytest.raises(ValueError, match=r"on the validation part of spots .* nothing to retain"):
        validation_sweep(encoder, "spots", task, constant, scorers=["magnitude"], sparsities=[0.2])


def test_stages_are_compared_with_the_first_on_test_images() -> None:
    encoder = tiny_backbone()
    tasks = {"spots": spots(), "other": tiny_task("other", classes=2)}
    tasks = {
        name: replace(task, validation=sealed(task.validation)) for name, task in tasks.items()
    }
    heads = {name: pai.fit_head(encoder, task) for name, task in tasks.items()}
    choice = Choice("magnitude", 0.5, 0.9, 0.8, 1.0, 2)
    pruned: Any = prune_as_chosen(choice, encoder, "spots", tasks["spots"], heads["spots"])
    stages = {"dense": encoder, "same": encoder, "pruned": pruned.model.backbone}
    found = compare_stages(stages, tasks, heads, choice, source="spots")
    assert [*zip(found.stage, found.target, strict=True)] == [
        ("same", "spots"), ("same", "other"), ("pruned", "spots"), ("pruned", "other")
    ]  # fmt: skip
    same = found[found.stage == "same"]
    assert (same[["retention", "low", "high"]] == 1).all(axis=None)
    for row in found[found.stage == "pruned"].itertuples():
        name = str(row.target)
        dense, now = (
            pai.evaluate(pai.Classifier(backbone, heads[name]), tasks[name].test)
            for backbone in (encoder, pruned.model.backbone)
        )
        assert (row.accuracy, row.dense_accuracy) == (now.accuracy, dense.accuracy)
        assert (row.source, row.scorer, row.sparsity) == ("spots", "magnitude", 0.5)


def write_images(folder: Path, names: Sequence[str], count: int = 20) -> None:
    random = torch.Generator().manual_seed(0)
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = torch.randint(0, 120, (10, 10, 3), generator=random, dtype=torch.uint8)
            pixels[..., label % 3] += 100
            Image.fromarray(pixels.numpy()).save(folder / name / f"{number}.png")


def test_a_folder_of_images_goes_all_the_way_to_a_file(tmp_path: Path) -> None:
    write_images(tmp_path / "birds", ["crow", "robin", "wren"])
    name = f"folder:{tmp_path / 'birds'}"
    encoder = pai.load_backbone("test_resnet", image_size=32, pretrained=False, device="cpu")
    task = pai.load_task(name, encoder.transform)
    assert task.class_names == ("crow", "robin", "wren")
    head = pai.fit_head(encoder, task)
    # More samples than there are images are all of them.
    settings: dict[str, Any] = {"samples": 1_000_000, "prune_by": f"{name}+{name}:altered+noise"}
    found = validation_sweep(
        encoder, name, task, head, scorers=["snip", "magnitude"], sparsities=[0.1, 0.2], **settings
    )
    choice = choose(found, 0.5)
    pruned: Any = prune_as_chosen(choice, encoder, name, task, head, **settings)
    images, _ = task.test.batch(range(4))
    files = pai.export.write_formats(pruned.model, pruned.mask, tmp_path, images, ["compressed"])
    path = tmp_path / files.file.item()
    again = pai.load_classifier(path, "cpu")
    assert pai.evaluate(again, task.test).accuracy == pai.evaluate(pruned.model, task.test).accuracy


def test_a_folder_that_cannot_serve_is_refused_before_anything_runs(tmp_path: Path) -> None:
    encoder = tiny_backbone()
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        pai.load_task(f"folder:{tmp_path / 'none'}", encoder.transform)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no class folders"):
        pai.load_task(f"folder:{tmp_path / 'empty'}", encoder.transform)
    write_images(tmp_path / "one", ["crow"])
    with pytest.raises(ValueError, match="has one class only: 'crow'; at least two"):
        pai.load_task(f"folder:{tmp_path / 'one'}", encoder.transform)
    write_images(tmp_path / "few", ["crow", "robin"], count=1)
    with pytest.raises(ValueError, match=r"each class needs several|too few images"):
        pai.load_task(f"folder:{tmp_path / 'few'}", encoder.transform)
