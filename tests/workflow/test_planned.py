"""What a grid comes to: what its cells follow from, their resources, and a file that is read."""

from pathlib import Path

import pytest
import yaml
from cells import Layout
from planned import read_plan

ROOT = Path(__file__).parents[2]
FEW = {"backbone": "timm:test_resnet", "image_size": 32, "train_size": 60, "test_size": 30}


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """A grid of two notebooks of this repository, in another folder."""
    (tmp_path / "pai_utils").symlink_to(ROOT / "pai_utils")
    (tmp_path / "notebooks").mkdir()
    for name in ("prune_per_task", "scorer_atlas"):
        text = (ROOT / f"notebooks/{name}.ipynb").read_text()
        (tmp_path / f"notebooks/{name}.ipynb").write_text(text)
    (tmp_path / "requirements.lock").write_text("torch==2\n")
    monkeypatch.chdir(tmp_path)
    _write(
        {
            "one": {"notebook": "prune_per_task", "parameters": {**FEW, "samples": 16}},
            "two": {"notebook": "scorer_atlas", "parameters": {**FEW, "samples": 16}},
        }
    )
    return Layout("few")


def _write(cells: dict[str, dict[str, object]]) -> None:
    path = Path("workflow/grids/few.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"cells": cells}))


def test_refused_parameters_and_missing_notebooks_are_named(layout: Layout) -> None:
    _write({"one": {"notebook": "scorer_atlas", "parameters": {"sede": 1}}})
    with pytest.raises(ValueError, match=r"cell 'one': unknown parameter 'sede'; did you mean"):
        read_plan(layout)
    _write({"one": {"notebook": "atlas", "parameters": {}}})
    with pytest.raises(ValueError, match="no notebook 'atlas' in notebooks"):
        read_plan(layout)


def test_notebooks_that_are_no_study_are_run_without_an_estimate(layout: Layout) -> None:
    text = Path("notebooks/scorer_atlas.ipynb").read_text()
    Path("notebooks/mine.ipynb").write_text(text)
    _write({"one": {"notebook": "mine", "parameters": {"x": 1}}})
    entry = read_plan(layout)["one"]
    assert (entry["parameters"], entry["memory_mib"], entry["hours"]) == ('{"x": 1}', 1500, 0)
