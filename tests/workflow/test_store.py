import json
from hashlib import sha256
from pathlib import Path

import pytest
from cells import Layout
from store import store

from pai_utils.runs import read_results
from tests.workflow.conftest import store_record

RESULTS = """\
cell,notebook,backbone,source,target,held_out,scorer,sparsity,stage,accuracy,dense_accuracy,chance,\
retention,low,high,count,seeds
half,divide,tiny,digits,photos,True,snip,0.5,pruned,0.5,0.9,0.1,0.5,0.4,0.6,100,3
half,divide,tiny,none,photos,True,random,0.5,pruned,0.5,0.9,0.1,,,,100,3
"""


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """A grid of one executed cell, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    layout = Layout("wide")
    layout.grid_file.parent.mkdir(parents=True)
    layout.grid_file.write_text("cells: {half: {notebook: divide, parameters: {}}}\n")
    folder = layout.executed / "half"
    folder.mkdir(parents=True)
    names = ("table.csv", "results.csv", "figure.png", "mask-a.json", "mask-a.safetensors")
    for name in names:
        (folder / name).write_text(name)
    (folder / "results.csv").write_text(RESULTS)
    outputs = {name: sha256((folder / name).read_bytes()).hexdigest() for name in names}
    store_record(folder, outputs=outputs)
    copy = {"cells": [], "metadata": {"papermill": {"exception": None}}}
    (layout.executed / "half.ipynb").write_text(json.dumps(copy))
    return layout


def test_tables_figures_and_records_replace_those_of_an_earlier_run(layout: Layout) -> None:
    old = Path("results/wide/half/old.csv")
    old.parent.mkdir(parents=True)
    old.write_text("old")
    assert store(layout, Path("results")) == [Path("results/wide/half")]
    kept = sorted(path.name for path in Path("results").rglob("*") if path.is_file())
    assert kept == ["figure.png", "record.json", "results.csv", "results.csv", "table.csv"]
    together = read_results(Path("results/wide/results.csv"))
    assert together.scorer.tolist() == ["snip", "random"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("table.csv", "other", r"table\.csv: altered"),
        ("record.json", "{}", "no record of a run: notebook: Field required"),
        ("results.csv", RESULTS.replace("0.5,pruned", "1.5,pruned"), "altered|less than 1"),
    ],
)
def test_nothing_is_stored_that_is_not_what_its_record_says(
    layout: Layout, file: str, content: str, message: str
) -> None:
    (layout.executed / "half" / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        store(layout, Path("results"))
    assert not Path("results").exists()


def test_nothing_is_stored_of_a_grid_that_is_not_whole(layout: Layout) -> None:
    (layout.executed / "half.ipynb").unlink()
    with pytest.raises(ValueError, match=r"half\.ipynb: missing"):
        store(layout, Path("results"))
    assert not Path("results").exists()
