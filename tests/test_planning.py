"""Estimates of grids: counts by hand, published sizes, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pai_utils.data.datasets import DATASETS
from pai_utils.data.tasks import part_sizes
from pai_utils.grids import read_grid
from pai_utils.models.loading import load_backbone
from pai_utils.planning import downloads, plan
from pai_utils.scorers import SCORERS
from pai_utils.studies import (
    finetune_recovery,
    landscape_analysis,
    parameters,
    prune_per_task,
    prune_your_own,
    scorer_atlas,
    worked_examples,
    zero_shot_retention,
)

COMMON: dict[str, Any] = {
    "backbone": "timm:test_resnet",
    "image_size": 32,
    "train_size": 100,
    "test_size": 40,
    "samples": 10,
    "out": "out",
}


def retention(**changes: Any) -> zero_shot_retention.Parameters:
    values = {
        "source": ["digits", "photos"],
        "targets": ["digits", "photos", "glyphs"],
        "scorers": ["snip", "magnitude", "random"],
        "sparsities": [0.2, 0.4],
        "seeds": [0, 1, 2],
    }
    return zero_shot_retention.Parameters(**{**COMMON, **values, **changes})


def test_a_sweep_is_counted_as_it_runs() -> None:
    (row,) = plan({"mine": retention()}).to_dict("records")
    train, test = 3 * 100, 3 * 40
    draws = 2 * 3 + 1 + 3  # snip on two sources, magnitude once, random with each seed
    heads = train + (train + 2 * test) + train
    scores = 3 * 10 * (2 * 3)
    sweep = (1 + 2 * draws) * test
    untrained = 3 * 10 * 2 + (1 + 2 * 2) * test
    assert row["images"] == heads + scores + sweep + untrained
    assert row["cell"] == "mine"
    assert row["pixels_mib"] == pytest.approx(
        sum(100 + 40 + part_sizes(name)["validation"] for name in ("digits", "photos", "glyphs"))
        * 3
        * 32**2
        / 2**20
    )


def test_heads_of_class_names_need_no_images() -> None:
    linear, text = (plan({"a": retention(heads=h)}).images[0] for h in ("linear", "text"))
    assert linear - text == 300


def test_operations_are_those_of_the_encoders_forward() -> None:
    # A linear-algebra count by hand of every convolution.
    backbone = load_backbone("timm:test_resnet", image_size=32, device="cpu", pretrained=False)
    flop = 0

    def count(module: torch.nn.Conv2d, _: Any, output: torch.Tensor) -> None:
        nonlocal flop
        flop += 2 * module.weight.numel() * output.shape[2] * output.shape[3]

    for module in backbone.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(count)
    with torch.no_grad():
        backbone(torch.zeros(1, 3, 32, 32))
    (row,) = plan({"a": retention()}, tflops=2).to_dict("records")
    assert row["pflop"] == pytest.approx(row["images"] * flop / 1e15)
    assert row["hours"] == pytest.approx(row["pflop"] / 2 * 1e3 / 3600)


@pytest.mark.parametrize(
    ("config", "images"),
    [
        (
            prune_per_task.Parameters(
                **COMMON, sources=["digits", "photos"], scorers=["snip", "random"], sparsity=0.5
            ),
            2 * 140 + 2 * (3 * 10 + 40) + 40,
        ),
        (
            finetune_recovery.Parameters(
                **COMMON, source="digits", targets=["photos"], scorer="snip",
                sparsities=[0.5, 0.7], starts=["pruned", "repaired", "dense"],
                repair="moments", penalties={"none": 0, "source": 1},
                learning_rates=[1e-5, 1e-4], steps=[0, 2, 6], seeds=[0], finetune_batch_size=4,
            ),
            # Heads; scores and repairs; twelve runs, each watched at three steps and fitted anew.
            2 * 140 + 4 * 3 * 10 + 2 * 2 * 100
            + 12 * (3 * 6 * 4 + 3 * (80 + part_sizes("digits")["validation"]) + 80 + 200),
        ),
        (
            landscape_analysis.Parameters(
                **COMMON, source="digits", targets=["photos"], scorers=["snip"],
                sparsities=[0.2, 0.4], fractions=[0.5, 1.0], products=4, eigenvectors=2,
                comparisons=["random", "trained"], brief_steps=5, spectrum_samples=6, probes=2,
                lanczos_steps=3, finetune_steps=2, path_points=2, plane_points=3, plane_images=7,
            ),
            # Scores, heads and accuracies, terms and products, losses; the same for one sparsity
            # of two other weights, one of them trained; spectra, repair, fine-tuning, path, planes.
            2 * 3 * 10 + 200 + 5 * 80 + 2 * 10 * (3 * (3 + 2 * 4 + 2 + 2.5 * 4) + 9)
            + 2 * (2 * 3 * 10 + 200 + 3 * 80 + 2 * 10 * (3 * (3 + 2 * 2 + 2 + 2.5 * 4) + 3))
            + 100 + 3 * 32 * 5
            + 3 * 4 * 2 * 3 * 3.1 * 6 + 3 * 10 + 2 * 100 + 3 * 2 * 64 + 5 * 80
            + 2 * 9 * (7 + 7),
        ),
        (
            prune_your_own.Parameters(
                **COMMON, source="digits", targets=["photos"], scorers=["snip", "magnitude"],
                sparsities=[0.2, 0.4], repair="moments", finetune_steps=5,
                finetune_batch_size=4,
            ),
            # Heads and tests; scores, repairs and validation of candidates; the chosen one again
            # and the accuracies of three networks; fine-tuning and its tests.
            200 + 2 * 80 + 3 * 10 + 4 * (2 * 100 + part_sizes("digits")["validation"])
            + 3 * 10 + 2 * 100 + 3 * part_sizes("digits")["validation"]
            + 3 * 5 * 4 + 80,
        ),
        (
            scorer_atlas.Parameters(
                **COMMON, sources=["digits", "photos"], scorers=["hessian_diag", "random"],
                sparsities=[0.5], seeds=[0, 1],
                options={"hessian_diag": {"probes": 5, "samples": 7}},
            ),
            200 + 4 * 3 * 7 * (1 + 2.1 * 5) + (1 + 4 + 2) * 80,
        ),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, (int, float)) else "",
)  # fmt: skip
def test_every_notebook_is_counted(config: parameters.EncoderParameters, images: float) -> None:
    assert plan({"a": config}).images[0] == pytest.approx(images)


def test_a_notebook_without_an_encoder_is_planned_beside_others() -> None:
    examples = worked_examples.Parameters(fractions=[0.5, 1.0], correlation=0.9, out="x")
    cells = {"examples": examples, "mine": retention(targets=["digits", "MNIST"])}
    first, second = plan(cells).to_dict("records")
    assert (first["backbone"], first["images"], first["hours"]) == ("", 0, 0)
    assert 0 < first["memory_mib"] < second["memory_mib"]
    assert list(downloads(cells.values())) == ["MNIST"]


def test_parts_are_those_that_loading_makes(tmp_path: Path) -> None:
    for label in "ab":
        (tmp_path / label).mkdir()
        for number in range(20):
            Image.new("L", (8, 8), number).save(tmp_path / label / f"{number}.png")
    assert part_sizes(f"folder:{tmp_path}") == {"train": 22, "validation": 6, "test": 12}
    assert part_sizes("MNIST") == {"train": 54_000, "validation": 6_000, "test": 10_000}
    assert part_sizes("DTD") == {"train": 1_880, "validation": 1_880, "test": 1_880}
    assert part_sizes("EuroSAT") == {"train": 14_850, "validation": 4_050, "test": 8_100}
    assert part_sizes("digits") == {"train": 988, "validation": 270, "test": 539}
    with pytest.raises(ValueError, match="unknown task 'digitz'"):
        part_sizes("digitz")


def test_data_sets_to_fetch_are_named_once() -> None:
    configs = [retention(source="MNIST", targets=["MNIST", "DTD"]), retention(targets=["DTD"])]
    assert downloads(configs) == {
        "MNIST": DATASETS["MNIST"].megabytes,
        "DTD": DATASETS["DTD"].megabytes,
    }


def test_repairs_are_counted_with_the_masks_they_repair() -> None:
    configs = {
        "plain": retention(),
        "moments": retention(repairs=["none", "moments"]),
        "obs": retention(repairs=["none", "obs"]),
    }
    plain, moments, obs = plan(configs).images
    # snip on two sources with three seeds; magnitude, and random three times, on each source
    repaired = 2 * (2 * 3 + 2 * (1 + 3))
    assert moments - plain == repaired * (2 * 100 + 3 * 40)
    blocks = SCORERS["block_fisher"]
    assert obs - moments == pytest.approx(repaired * 3 * 100 * blocks.passes(blocks.options))


def test_rounds_multiply_scores_and_repairs() -> None:
    given: dict[str, Any] = {"scorers": ["snip"], "repairs": ["none", "moments"]}
    images = [plan({"cell": retention(rounds=rounds, **given)}).images[0] for rounds in (1, 2, 3)]
    scores = 2 * 3 * SCORERS["snip"].passes(SCORERS["snip"].options) * 30
    sparsities, repairs = 2, 2
    # Of the further round: a score and a repair a mask.
    repairs = 2 * 3 * sparsities * 2 * 100
    assert images[2] - images[1] == pytest.approx(scores * sparsities * repairs + repairs)
    assert images[1] - images[0] == pytest.approx(scores * (2 * sparsities * repairs - 1) + repairs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 101}, "cell 'a': samples=101 is more than the 100 images that digits trains"),
        (
            {"train_size": 1000},
            "cell 'a': train_size must be between 1 and 988, the number of train items of digits",
        ),
        ({"test_size": 513}, "cell 'a': test_size must be between 1 and 512, .* of photos"),
    ],
)
def test_more_images_than_there_are_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan({"a": retention(**changes)})


def test_the_grid_of_the_paper_asks_for_no_more_than_there_is() -> None:
    path = Path(__file__).parents[1] / "workflow/grids/paper.yaml"
    for cell in read_grid(path).values():
        samples, tasks = cell.parameters["samples"], cell.parameters.get("targets")
        for name in tasks or cell.parameters["sources"]:
            assert samples <= part_sizes(name)["train"]


def test_what_cannot_be_estimated_is_refused() -> None:
    with pytest.raises(ValueError, match="tflops must be above 0, got 0"):
        plan({}, tflops=0)
    with pytest.raises(ValueError, match="cell 'a': no estimate for EncoderParameters"):
        plan({"a": parameters.EncoderParameters(**COMMON)})
    with pytest.raises(ValueError, match="unknown backbone 'test_resnett'"):
        plan({"a": retention(backbone="timm:test_resnett")})
