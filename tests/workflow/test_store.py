import json
from pathlib import Path

import pytest
from cells import Layout
from store import store


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """A grid of one executed cell, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    layout = Layout("wide")
    layout.grid_file.parent.mkdir(parents=True)
    layout.grid_file.write_text("cells: {half: {notebook: divide, parameters: {}}}\n")
    folder = layout.executed / "half"
    folder.mkdir(parents=True)
    for name in ("table.csv", "record.json", "figure.png", "mask-a.json", "mask-a.safetensors"):
        (folder / name).write_text(name)
    copy = {"cells": [], "metadata": {"papermill": {"exception": None}}}
    (layout.executed / "half.ipynb").write_text(json.dumps(copy))
    return layout


def test_tables_figures_and_records_replace_those_of_an_earlier_run(layout: Layout) -> None:
    old = Path("results/wide/half/old.csv")
    old.parent.mkdir(parents=True)
    old.write_text("old")
    assert store(layout, Path("results")) == [Path("results/wide/half")]
    kept = sorted(path.name for path in Path("results").rglob("*") if path.is_file())
    assert kept == ["figure.png", "record.json", "table.csv"]


@pytest.mark.parametrize("lacking", ["half.ipynb", "half/record.json"])
def test_nothing_is_stored_of_a_grid_that_is_not_whole(layout: Layout, lacking: str) -> None:
    (layout.executed / lacking).unlink()
    with pytest.raises(ValueError, match=f"{lacking}: missing"):
        store(layout, Path("results"))
    assert not Path("results").exists()
