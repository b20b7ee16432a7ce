"""Estimates of cells: counts by hand, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from estimates import downloads, encoder, estimate
from grids import read_grid
from plan import plan

from pai_utils.data.datasets import DATASETS
from pai_utils.data.tasks import part_sizes
from pai_utils.models.loading import load_backbone
from pai_utils.scorers import SCORERS
from pai_utils.studies.parameters import STUDIES, RunParameters, read_parameters

ROOT = Path(__file__).parents[2]
COMMON: dict[str, Any] = {
    "backbone": "timm:test_resnet",
    "image_size": 32,
    "train_size": 100,
    "test_size": 40,
    "samples": 10,
}


def read(notebook: str, **values: Any) -> RunParameters:
    return read_parameters(ROOT / f"notebooks/{notebook}.ipynb", {**COMMON, **values})


def retention(**changes: Any) -> RunParameters:
    values = {
        "source": ["digits", "photos"],
        "targets": ["digits", "photos", "glyphs"],
        "scorers": ["snip", "magnitude", "random"],
        "sparsities": [0.2, 0.4],
        "seeds": [0, 1, 2],
    }
    return read("zero_shot_retention", **{**values, **changes})


def forwards(config: RunParameters, notebook: str = "zero_shot_retention") -> float:
    return estimate(notebook, config, 20)["forwards"]


def test_a_sweep_is_counted_as_it_runs() -> None:
    train, test = 3 * 100, 3 * 40
    # Heads, the gap of the protocols, and heads of the encoder without pre-training.
    heads = train + test + 2 * (train + test)
    draws = 2 * 3 + 1 + 3  # snip on two sources, magnitude once, random with each seed
    scores = 3 * 10 * (2 * 3 + 2)
    assert forwards(retention()) == heads + scores + (2 * draws + 2 * 2) * test


def test_repairs_and_rounds_multiply_what_they_repeat() -> None:
    plain, repaired = (forwards(retention(repairs=r)) for r in (["none"], ["none", "moments"]))
    # snip on two sources with three seeds; magnitude, and random three times, on each source
    masks = 2 * (2 * 3 + 2 * (1 + 3))
    assert repaired - plain == masks * (2 * 100 + 3 * 40)
    given: dict[str, Any] = {"scorers": ["snip"], "repairs": ["none", "moments"]}
    two, three = (forwards(retention(rounds=rounds, **given)) for rounds in (2, 3))
    scores = 3 * 10 * SCORERS["snip"].cost({}) * (2 * 3 + 2)
    assert three - two == pytest.approx(scores * 2 * 2 + 2 * 3 * 2 * 2 * 100, rel=0.2)


@pytest.mark.parametrize("notebook", sorted(set(STUDIES) - {"worked_examples"}))
def test_every_study_has_an_estimate_that_grows_with_its_scores(notebook: str) -> None:
    one, more = (estimate(notebook, read(notebook, samples=samples), 20) for samples in (10, 20))
    assert 0 < one["score_hours"] < more["score_hours"]
    assert one["forwards"] < more["forwards"]
    assert one["memory_mib"] > 1200


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
    assert encoder("timm:test_resnet", 32).flop == flop
    found = estimate("zero_shot_retention", retention(), 2)
    assert found["hours"] == pytest.approx(found["forwards"] * flop / 2e12 / 3600)
    images = sum(100 + 40 + part_sizes(n)["validation"] for n in ("digits", "photos", "glyphs"))
    assert found["pixels_mib"] == pytest.approx(images * 3 * 32**2 / 2**20)


def test_data_sets_to_fetch_are_named_once() -> None:
    configs = [retention(source="MNIST", targets=["MNIST", "DTD"]), retention(targets=["DTD"])]
    names = ("MNIST", "DTD")
    assert downloads(configs) == {name: DATASETS[name].megabytes for name in names}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 101}, "samples=101 is more than the 100 images that digits trains on"),
        (
            {"train_size": 1000},
            "train_size must be between 1 and 988, the number of train items of digits",
        ),
        ({"test_size": 513}, "test_size must be between 1 and 512, .* of photos"),
        ({"backbone": "timm:test_resnett"}, "unknown backbone 'test_resnett'"),
    ],
)
def test_more_than_there_is_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forwards(retention(**changes))


def test_the_grid_of_the_paper_asks_for_no_more_than_there_is() -> None:
    for cell in read_grid(ROOT / "workflow/grids/paper.yaml").values():
        samples, tasks = cell.parameters["samples"], cell.parameters.get("targets")
        for name in tasks or cell.parameters["sources"]:
            assert samples <= part_sizes(name)["train"]


def test_a_plan_names_every_cell_its_hours_and_what_they_come_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    lines = plan("smoke", 2).splitlines()
    assert lines[0].split() == [
        "cell",
        "forwards",
        "GPU",
        "hours",
        "results,",
        "MiB",
        "pixels,",
        "MiB",
    ]
    assert {line.split()[0] for line in lines[1:14]} == set(
        read_grid(ROOT / "workflow/grids/smoke.yaml")
    )
    assert "13 rows, " in lines[15]
    (examples,) = (line for line in lines if line.split()[:1] == ["worked_examples"])
    assert examples.split()[1:3] == ["0", "0"]  # no encoder, and beside the others all the same
    with pytest.raises(ValueError, match="tflops must be above 0, got 0"):
        plan("smoke", 0)
