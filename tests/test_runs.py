import hashlib
import importlib.metadata
import json
import platform
import shutil
import subprocess
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

import pai_utils as pai
from pai_utils import runs
from pai_utils.runs import Run, check_results, read_record, read_results
from pai_utils.studies.parameters import schema_of
from tests.cases import tiny_task

RESULTS = Path(__file__).parents[1] / "results"
RESULT = {
    "cell": "a", "notebook": "n", "backbone": "b", "source": "digits", "target": "photos",
    "held_out": True, "scorer": "snip", "sparsity": 0.5, "stage": "pruned", "accuracy": 0.5,
    "dense_accuracy": 0.9, "chance": 0.1, "retention": 0.5, "low": 0.4, "high": 0.6, "count": 100,
    "seeds": 3,
}  # fmt: skip


def start(folder: Path, notebook: str = "prune_per_task") -> Run:
    given: dict[str, Any] = {
        "prune_per_task": {
            "backbone": "b", "sources": ["digits", "photos"], "scorers": ["snip"], "sparsity": 0.5
        },
        "worked_examples": {"fractions": [0.5, 1.0], "correlation": 0.9},
    }  # fmt: skip
    return Run(notebook, schema_of(notebook)(**given[notebook], out=str(folder)))


def table(**changed: object) -> pd.DataFrame:
    return pd.DataFrame([RESULT | changed])


def test_a_run_writes_tables_masks_figures_and_their_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    run = start(Path("~") / tmp_path.name)
    run.write_table("table", pd.DataFrame({"a": [1, 2], "b": [0.123456789, 2.0]}))
    run.write_mask("mask", pai.Mask({"w": torch.ones(3)}))
    figure = Figure()
    figure.add_subplot().plot([1, 2])
    run.write_figure("figure", figure)
    (tmp_path / "model.onnx").write_bytes(b"content")
    run.record_files("model.onnx")
    with pytest.raises(FileNotFoundError):
        run.record_files("none")
    record = run.finish({"spots": tiny_task()}, provenance={"source": "here"})
    assert (tmp_path / "table.csv").read_text() == "a,b\n1,0.123457\n2,2\n"
    assert pai.Mask.load(tmp_path / "mask.safetensors").sparsity == 0
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "record.json").read_text()) == record
    files = {"table.csv", "mask.safetensors", "figure.png", "model.onnx"}
    assert {path.name for path in tmp_path.iterdir()} == {*files, "record.json"}
    assert record["outputs"] == {
        name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in files
    }
    assert record["notebook"] == "prune_per_task"
    assert record["parameters"] == run.config.model_dump()
    assert record["provenance"] == {"source": "here"}
    assert record["versions"]["torch"] == importlib.metadata.version("torch")
    assert record["python"] == platform.python_version()
    assert record["threads"] == 1
    assert record["peak_memory_mib"] > 100
    assert record["seconds"] >= 0
    assert record["device"]
    assert set(record["inputs"]["tasks"]["spots"]) == {"train", "test"}


def _git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip


def test_the_commit_is_that_of_the_librarys_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    library = tmp_path / "runs.py"
    library.write_text("")
    monkeypatch.setattr(runs, "__file__", str(library))
    _git(tmp_path, "init", "-q")
    assert runs._commit() == (None, None)  # below a checkout, but no part of it
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-q", "-m", "the library")
    head = _git(tmp_path, "rev-parse", "HEAD")
    assert runs._commit() == (head, True)
    library.write_text("changed")
    assert runs._commit() == (head, False)


def test_a_record_needs_neither_git_nor_an_installed_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", absent)
    record = start(tmp_path).finish()
    assert (record["commit"], record["clean"]) == (None, None)
    assert record["versions"]["pai-utils"] is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"accuracy": 1.2}, "0.accuracy: Input should be less than or equal to 1"),
        ({"seeds": None}, "0.seeds: Input should be a valid integer"),
        ({"extra": 1}, "0.extra: Extra inputs are not permitted"),
    ],
)
def test_results_are_refused_with_the_row_and_the_reason(
    changed: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_results(table(**changed))


def test_results_have_every_column_and_one_row_a_key() -> None:
    with pytest.raises(ValueError, match=r"two rows of .*'digits'.*'snip'"):
        check_results(pd.concat([table(), table(accuracy=0.4)]))
    with pytest.raises(ValueError, match=r"row 0\.stage: Field required"):
        check_results(table().drop(columns="stage"))


def test_results_come_back_from_a_file_and_are_checked_there(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    whole = pd.concat([table(), table(source="none", retention=None, low=None, high=None)])
    whole.to_csv(path, index=False)
    read = read_results(path)
    assert read.source.tolist() == ["digits", "none"]
    assert read.retention.isna().tolist() == [False, True]
    path.write_text(path.read_text().replace("photos", ""))
    with pytest.raises(ValueError, match=r"results\.csv: no table of results: row 0\.target"):
        read_results(path)


def test_a_run_writes_results_of_an_encoder_without_the_dense_rows(tmp_path: Path) -> None:
    run = start(tmp_path / "cell")
    given = table().drop(columns=["cell", "notebook", "backbone", "held_out", "stage"])
    dense = given.assign(scorer="dense", source="none", sparsity=0.0)
    run.write_results(pd.concat([dense, given]).assign(unknown=1))
    (row,) = read_results(tmp_path / "cell" / "results.csv").to_dict("records")
    assert (row["cell"], row["notebook"], row["stage"]) == ("cell", "prune_per_task", "pruned")
    assert row["held_out"] is True
    with pytest.raises(ValueError, match="results are those of an encoder, and worked_examples"):
        start(tmp_path, "worked_examples").write_results(table())


def test_a_record_is_checked_when_it_is_read_and_goes_when_a_run_starts(tmp_path: Path) -> None:
    run = start(tmp_path)
    run.write_table("t", pd.DataFrame({"a": [1]}))
    with pytest.raises(ValueError, match=r"record\.json: missing"):
        read_record(tmp_path)
    run.finish()
    assert read_record(tmp_path).outputs == {"t.csv": sha256(b"a\n1\n").hexdigest()}
    path = tmp_path / "record.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "seconds": -1}))
    with pytest.raises(ValueError, match="no record of a run: seconds: Input should be greater"):
        read_record(tmp_path)
    start(tmp_path)
    assert not path.exists(), "it would vouch for files that are being replaced"


def test_stored_records_are_read_and_call_repairs_by_their_name() -> None:
    stored = [path.parent for path in sorted(RESULTS.glob("*/*-*/record.json"))]
    names = [name for folder in stored for name in read_record(folder).parameters]
    assert {"repair", "repairs", "repair_options"} <= set(names)
    assert not [name for name in names if "compensation" in name]
