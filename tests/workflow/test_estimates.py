"""Estimates of cells: what was counted in runs, what is published, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from estimates import encoder, estimate
from grids import read_grid
from plan import plan

from pai_utils.data.datasets import DATASETS
from pai_utils.data.tasks import part_sizes
from pai_utils.studies.parameters import STUDIES, RunParameters, read_parameters

ROOT = Path(__file__).parents[2]
GRIDS = sorted((ROOT / "workflow/grids").glob("*.yaml"))


def read(notebook: str, **values: Any) -> RunParameters:
    few = {"backbone": "timm:test_resnet", "image_size": 32, "train_size": 100, "test_size": 40}
    return read_parameters(ROOT / f"notebooks/{notebook}.ipynb", {**few, "samples": 10, **values})


def retention(**changes: Any) -> RunParameters:
    values = {"source": ["digits", "photos"], "targets": ["digits", "photos"], "seeds": [0, 1]}
    values |= {"scorers": ["snip"], "sparsities": [0.2, 0.4]}
    return read("zero_shot_retention", **{**values, **changes})


def forwards(config: RunParameters) -> float:
    return estimate("zero_shot_retention", config, 20)["forwards"]


@pytest.mark.parametrize(
    ("changes", "counted"),
    [
        ({"scorers": ["snip", "magnitude", "random"]}, 480),
        ({"repairs": ["none", "moments"]}, 2304),
        ({"repairs": ["none", "moments"], "rounds": 3}, 6592),
    ],
)
def test_more_masks_repairs_and_rounds_take_what_was_counted_in_runs_of_them(
    changes: dict[str, Any], counted: int
) -> None:
    # Images through the first layer of the encoder, three times where gradients were kept.
    assert forwards(retention(**changes)) - forwards(retention()) == pytest.approx(
        counted, rel=0.05
    )


@pytest.mark.parametrize("notebook", sorted(set(STUDIES) - {"worked_examples"}))
def test_every_study_has_an_estimate_that_grows_with_its_scores(notebook: str) -> None:
    one, more = (estimate(notebook, read(notebook, samples=samples), 20) for samples in (10, 20))
    assert 0 < one["score_hours"] < more["score_hours"]
    assert one["forwards"] < more["forwards"]
    assert one["memory_mib"] > 1200


def test_hours_are_those_of_the_published_operations_at_the_speed_given() -> None:
    assert encoder("efficientnet_lite0", 224).flop == pytest.approx(2 * 407e6, rel=0.06)
    config = retention(backbone="efficientnet_lite0", image_size=224)
    found = estimate("zero_shot_retention", config, 2)
    assert found["hours"] == pytest.approx(found["forwards"] * 2 * 407e6 / 2e12 / 3600, rel=0.06)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda path: path.stem)
def test_notebooks_accept_the_cells_of_a_grid_and_data_sets_have_as_many_images(grid: Path) -> None:
    for cell in read_grid(grid).values():
        config: Any = read_parameters(ROOT / f"notebooks/{cell.notebook}.ipynb", cell.parameters)
        sizes = [
            part_sizes(name)["train"] for name in getattr(config, "tasks", []) if name in DATASETS
        ]
        assert all(config.samples <= size for size in sizes), cell.name


def test_a_plan_names_every_cell_its_hours_and_what_they_come_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    header, *rows, _, total, _ = plan("smoke", 2).splitlines()
    assert "GPU hours" in header
    assert {line.split()[0] for line in rows} == set(read_grid(ROOT / "workflow/grids/smoke.yaml"))
    assert total.startswith("7 rows, ")
    (examples,) = (line for line in rows if line.split()[0] == "worked_examples")
    assert examples.split()[1:3] == ["0", "0"]  # no encoder, and beside the others all the same
    with pytest.raises(ValueError, match="tflops must be above 0, got 0"):
        plan("smoke", 0)
