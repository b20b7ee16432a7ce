"""What a grid comes to: needs in common, resources, and a file that spares the library's import."""

import json
from pathlib import Path

import pytest
import yaml
from cells import Layout
from planned import library_files, minutes, processes, read_plan

from pai_utils.needs import Need

ROOT = Path(__file__).parents[2]


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """A grid of two notebooks of this repository, in another folder."""
    for folder in ("notebooks", "pai_utils"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    common = {"sources": ["digits", "photos"], "scorers": ["snip", "magnitude"], "samples": 16}
    retention = {"source": "digits", "targets": ["photos"], "scorers": ["snip", "px"]}
    _write(
        {
            "one": {"notebook": "prune_per_task", "parameters": common},
            "two": {"notebook": "zero_shot_retention", "parameters": {**retention, "samples": 16}},
        }
    )
    return Layout("few")


def _write(cells: dict[str, dict[str, object]]) -> None:
    path = Path("workflow/grids/few.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"cells": cells}))


def test_what_two_cells_need_is_made_once_and_the_rest_by_the_cell(layout: Layout) -> None:
    plan = read_plan(layout)
    kinds = [entry["kind"] for entry in plan["needs"].values()]
    # Two tasks' training features and heads, and the one score that both cells take.
    assert sorted(kinds) == ["features", "features", "head", "head", "scores"]
    (scores,) = [entry for entry in plan["needs"].values() if entry["kind"] == "scores"]
    assert Need(**json.loads(scores["need"])).scorer == "snip"
    assert [plan["needs"][name]["kind"] for name in scores["before"]] == ["head"]
    assert plan["cells"]["one"]["needs"] == plan["cells"]["two"]["needs"] == sorted(plan["needs"])


def test_resources_are_those_of_the_estimate(layout: Layout) -> None:
    plan = read_plan(layout)
    for entry in [*plan["cells"].values(), *plan["needs"].values()]:
        assert 1000 < entry["memory_mib"] < 10_000
        assert 0 < entry["hours"] < 1


def test_the_plan_is_read_again_until_something_changes(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read_plan(layout)
    layout.plan.write_text(json.dumps({**first, "mark": 1}))
    assert "mark" in read_plan(layout)
    _write({"one": {"notebook": "scorer_atlas", "parameters": {}}})
    changed = read_plan(layout)
    assert set(changed["cells"]) == {"one"}
    assert "mark" not in changed


def test_refused_parameters_name_the_cell(layout: Layout) -> None:
    _write({"one": {"notebook": "scorer_atlas", "parameters": {"sede": 1}}})
    with pytest.raises(ValueError, match=r"cell 'one': unknown parameter 'sede'; did you mean"):
        read_plan(layout)


def test_notebooks_without_a_schema_are_run_without_an_estimate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _write({"one": {"notebook": "mine", "parameters": {"x": 1}}})
    assert read_plan(Layout("few"))["cells"]["one"] == {
        "notebook": "mine",
        "parameters": '{"x": 1}',
        "needs": [],
        "memory_mib": 1500,
        "hours": 0.0,
    }


def test_compiled_files_are_no_part_of_the_library(layout: Layout) -> None:
    names = library_files()
    assert "pai_utils/curvature/blocks.py" in names
    assert all(name.endswith(".py") and "__pycache__" not in name for name in names)


def test_run_times_leave_room_and_long_scores_take_several_gpus() -> None:
    assert minutes(0, 20) == 30
    assert minutes(1, 20) == 630
    assert minutes(1, 10) == 1230
    assert processes(0.1, 20, 4) == 1
    assert processes(2.5, 20, 4) == 3
    assert processes(2.5, 40, 4) == 2
    assert processes(50, 20, 4) == 4
    assert processes(50, 20, 0) == 1
