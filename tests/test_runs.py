import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import pai_utils as pai
from pai_utils import SCORERS, TASKS, runs
from pai_utils.runs import Run, altered_outputs, check_results, read_record, read_results
from pai_utils.studies.finetune_recovery import Parameters as FinetuneRecoveryParameters
from pai_utils.studies.landscape_analysis import Parameters as LandscapeAnalysisParameters
from pai_utils.studies.prune_per_task import Parameters as PrunePerTaskParameters
from pai_utils.studies.prune_your_own import Parameters as PruneYourOwnParameters
from pai_utils.studies.scorer_atlas import Parameters as ScorerAtlasParameters
from pai_utils.studies.worked_examples import Parameters as WorkedExamplesParameters
from pai_utils.studies.zero_shot_retention import Parameters as ZeroShotRetentionParameters
from tests.cases import tiny_task

GIVEN: dict[str, Any] = {
    "backbone": "efficientnet_lite0",
    "source": "digits",
    "targets": ["photos", "digits"],
    "scorers": ["ggn_diag"],
    "sparsities": [0.2, 0.4],
    "seeds": [0],
    "out": "somewhere",
}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("precision", "float61", "precision: unknown precision 'float61'; did you mean 'float16'"),
        ("heads", "texts", "heads: unknown kind of head 'texts'; did you mean 'text'"),
        (
            "repairs",
            ["none", "layerwize"],
            "repairs.1: unknown repair 'layerwize'; did you mean 'layerwise'",
        ),
        ("source", "digits+leafs", "source: unknown task 'leafs'; did you mean 'leaves'"),
        ("scope", "layers", "unknown scope 'layers'; choose 'global', 'layer'"),
        ("scope", "2:4", "scope '2:4' keeps 2 of every 4 weights: its sparsity is 0.5, not 0.2"),
        ("rounds", 0, "rounds=0: at least one round is needed"),
        ("repair_options", {"damp": 1}, "unknown repair option 'damp'"),
    ],
)
def test_choices_of_the_sweep_are_looked_up_before_it_runs(
    name: str, value: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ZeroShotRetentionParameters.from_notebook({**GIVEN, name: value})


def test_options_of_a_repair_keep_their_types() -> None:
    options = {"samples": 600, "damping": 0.1, "streams": False}
    config = ZeroShotRetentionParameters.from_notebook({**GIVEN, "repair_options": options})
    assert config.repair_options == options
    assert [type(v) for v in config.repair_options.values()] == [int, float, bool]


def test_a_notebooks_namespace_becomes_its_configuration() -> None:
    namespace = GIVEN | {
        "pai": pai,
        "os": os,
        "_i1": "text",
        "__name__": "__main__",
        "In": [],
        "Out": {},
        "exit": object(),
        "quit": object(),
        "open": open,
        "get_ipython": object(),
    }
    config = ZeroShotRetentionParameters.from_notebook(namespace)
    assert config.model_dump() == GIVEN | {
        "repairs": ["none"],
        "repair_options": {},
        "scope": "global",
        "rounds": 1,
        "heads": "linear",
        "precision": "float32",
        "image_size": None,
        "pretrained": True,
        "train_size": None,
        "test_size": None,
        "samples": 256,
        "batch_size": 64,
        "device": "auto",
        "seed": 0,
    }
    assert config.sources == ["digits"]
    assert config.tasks == ["digits", "photos"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[0.4]", [0.4]),
        (" [0.2, 1e-1]", [0.2, 0.1]),
        ("[0]", [0.0]),
    ],
)
def test_lists_that_papermill_passes_as_text_are_read(text: str, value: list[float]) -> None:
    config = ZeroShotRetentionParameters.from_notebook(GIVEN | {"sparsities": text})
    assert config.sparsities == value


def test_lists_of_names_may_go_without_quotes() -> None:
    config = ZeroShotRetentionParameters.from_notebook(
        GIVEN | {"source": "[digits, mnist5k]", "targets": '["photos"]'}
    )
    assert config.sources == ["digits", "mnist5k"]
    assert config.targets == ["photos"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsites": [0.4]}, r"unknown parameter 'sparsites'; did you mean 'sparsities'\?"),
        ({"learning_rate": 1.0}, "unknown parameter 'learning_rate'"),
        ({"seed": True}, "seed: .*not True"),
        ({"seed": "3"}, "seed: .*not '3'"),
        ({"seed": 1.0}, r"seed: .*not 1\.0"),
        ({"seed": -1}, "seed: .*not -1"),
        ({"pretrained": 1}, "pretrained: .*not 1"),
        ({"pretrained": "yes"}, "pretrained: .*not 'yes'"),
        ({"batch_size": 0}, "batch_size: .*not 0"),
        ({"samples": 0}, "samples: .*not 0"),
        ({"sparsities": [1.0]}, r"sparsities\.0: .*not 1\.0"),
        ({"sparsities": [0.1, float("nan")]}, r"sparsities\.1: .*not nan"),
        ({"sparsities": "[0.4"}, r"sparsities: .*not '\[0\.4'"),
        ({"sparsities": "[yes]"}, r"sparsities\.0: .*not True"),
        ({"sparsities": 0.4}, r"sparsities: .*not 0\.4"),
        ({"sparsities": []}, r"sparsities: .*not \[\]"),
        ({"scorers": "ggn_diag"}, "scorers: .*not 'ggn_diag'"),
        ({"source": 3}, r"source\.str: .*not 3"),
        ({"source": "digit"}, "source: unknown task 'digit'; did you mean 'digits'"),
        ({"source": ["digits", "mnist"]}, "source: unknown task 'mnist'"),
        ({"targets": ["digits", "photo"]}, r"targets\.1: unknown task 'photo'"),
        ({"scorers": ["magnitud"]}, r"scorers\.0: unknown scorer 'magnitud'; did you mean"),
        ({"repairs": ["moments"]}, "repairs: masks without repair .*add none"),
        (
            {"source": ["digits"], "targets": ["digits"]},
            "the only target is the source digits; add an unseen task",
        ),
        ({"backbone": None}, "backbone: .*not None"),
        ({"out": ""}, "out: .*not ''"),
    ],
)
def test_a_wrong_parameter_is_told_with_the_valid_names(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        ZeroShotRetentionParameters.from_notebook(GIVEN | changes)
    for name in ZeroShotRetentionParameters.model_fields:
        assert name in str(error.value)


def test_an_unknown_name_is_told_in_plain_words() -> None:
    with pytest.raises(ValueError, match="parameters refused") as error:
        ZeroShotRetentionParameters.from_notebook(
            GIVEN | {"targets": ["digit"], "scorers": ["snap"]}
        )
    assert str(error.value) == (
        "parameters refused: "
        f"targets.0: unknown task 'digit'; did you mean 'digits'? Choose from: {', '.join(TASKS)}; "
        f"scorers.0: unknown scorer 'snap'; did you mean 'snip'? Choose from: {', '.join(SCORERS)}."
        f" Valid parameters: {', '.join(ZeroShotRetentionParameters.model_fields)}"
    )
    atlas: dict[str, Any] = {
        "backbone": "b", "sources": ["digits", "photos"], "scorers": ["snip", "random"],
        "sparsities": [0.5], "seeds": [0], "out": "o", "options": {"px": {}},
    }  # fmt: skip
    with pytest.raises(ValueError, match="refused: unknown scorer of options 'px'"):
        ScorerAtlasParameters.from_notebook(atlas)


@pytest.mark.parametrize("name", ["backbone", "source", "seeds", "out"])
def test_a_missing_parameter_is_named(name: str) -> None:
    given = {key: value for key, value in GIVEN.items() if key != name}
    with pytest.raises(ValueError, match=f"{name}: Field required.*Valid parameters: .*backbone, "):
        ZeroShotRetentionParameters.from_notebook(given)


def test_an_infinite_learning_rate_is_refused() -> None:
    given = {
        "backbone": "b", "source": "digits", "targets": ["photos"], "scorer": "ggn_diag",
        "sparsities": [0.5], "starts": ["pruned"], "seeds": [0], "steps": [0, 5], "out": "o",
    }  # fmt: skip
    config = FinetuneRecoveryParameters.from_notebook(given | {"learning_rates": "[1e-4, 2e-3]"})
    assert config.learning_rates == [1e-4, 2e-3]
    assert config.tasks == ["digits", "photos"]
    for rate in (float("inf"), 0.0, -1.0):
        with pytest.raises(ValueError, match=r"learning_rates\.0"):
            FinetuneRecoveryParameters.from_notebook(given | {"learning_rates": [rate]})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("starts", ["dens"], r"starts\.0: unknown start 'dens'; did you mean 'dense'"),
        ("penalties", {"none": 0, "feature": 1}, "unknown penalty 'feature'"),
        ("penalties", {"none": 0, "features": -1}, r"penalties\.features"),
        ("penalties", {"features": 1}, "add none"),
        ("prune_by", "noise", "prune_by=noise has no part of the source digits"),
        ("prune_by", "digits+photos", "looks at the target photos, which is held out"),
        ("optimiser", "lion", r"unknown optimiser 'lion'.*sgd, adam"),
        ("schedule", "cosine", r"unknown schedule 'cosine'.*constant, linear"),
    ],
)
def test_an_impossible_recovery_is_refused_at_once(name: str, value: object, message: str) -> None:
    given = {
        "backbone": "b", "source": "digits", "targets": ["photos"], "scorer": "ggn_diag",
        "sparsities": [0.5], "starts": ["pruned"], "seeds": [0], "steps": [0, 5], "out": "o",
        "learning_rates": [1e-4],
    }  # fmt: skip
    assert FinetuneRecoveryParameters.from_notebook(given).penalties == {"none": 0}
    sorted_by_name = FinetuneRecoveryParameters.from_notebook(
        given | {"penalties": {"features": 1, "none": 0}}
    )
    assert list(sorted_by_name.penalties) == ["none", "features"]
    with pytest.raises(ValueError, match=message):
        FinetuneRecoveryParameters.from_notebook(given | {name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tolerance", -0.1, "tolerance"),
        ("tolerance", float("nan"), "tolerance"),
        ("formats", [], "formats"),
        ("formats", ["onxx"], r"formats\.0: unknown format 'onxx'; did you mean 'onnx'"),
        ("scorers", [], "scorers"),
        ("scorers", ["snap"], r"scorers\.0: unknown scorer 'snap'; did you mean 'snip'"),
        ("scope", "2:4", "its sparsity is 0.5, not 0.2"),
        ("prune_by", "noise", "prune_by=noise has no part of the source digits"),
        ("prune_by", "digits+photos:altered", "looks at the target photos, which is held out"),
        ("targets", ["digits"], "the only target is the source digits; add an unseen task"),
        ("finetune_steps", -1, "finetune_steps"),
        ("learning_rate", 0.0, "learning_rate"),
    ],
)
def test_an_impossible_choice_is_refused_at_once(name: str, value: object, message: str) -> None:
    given = {
        "backbone": "b", "source": "digits", "targets": ["photos"], "scorers": ["snip"],
        "sparsities": [0.2, 0.5], "out": "o",
    }  # fmt: skip
    config = PruneYourOwnParameters.from_notebook(given)
    assert config.tasks == ["digits", "photos"]
    assert config.formats == ["compressed", "dense", "onnx"]
    with pytest.raises(ValueError, match=message):
        PruneYourOwnParameters.from_notebook(given | {name: value})


def test_the_other_notebooks_have_their_parameters() -> None:
    common = {"backbone": "b", "scorers": ["random"], "out": "o"}
    per_task = common | {
        "sources": ["digits", "photos"], "scorers": ["random", "snip"], "sparsity": 0.5
    }  # fmt: skip
    assert PrunePerTaskParameters.from_notebook(per_task).sources == ["digits", "photos"]
    with pytest.raises(ValueError, match="sources"):
        PrunePerTaskParameters.from_notebook(per_task | {"sources": ["digits"]})
    with pytest.raises(
        ValueError,
        match="refused: scorers: none of random, magnitude looks at a task; add at least one of: "
        "snip, ",
    ):
        PrunePerTaskParameters.from_notebook(per_task | {"scorers": ["random", "magnitude"]})
    landscape = common | {
        "source": "digits", "targets": ["photos"], "sparsities": [0.1], "fractions": [0.5, 1.0]
    }  # fmt: skip
    assert LandscapeAnalysisParameters.from_notebook(landscape).tasks == ["digits", "photos"]
    with pytest.raises(ValueError, match=r"fractions\.1"):
        LandscapeAnalysisParameters.from_notebook(landscape | {"fractions": [0.5, 1.5]})
    with pytest.raises(ValueError, match="9 eigenvectors need as many products; got 5"):
        LandscapeAnalysisParameters.from_notebook(landscape | {"eigenvectors": 9, "products": 5})
    with pytest.raises(ValueError, match=r"add 1\.0"):
        LandscapeAnalysisParameters.from_notebook(landscape | {"fractions": [0.25, 0.5]})
    with pytest.raises(ValueError, match="the only target is the source digits"):
        LandscapeAnalysisParameters.from_notebook(landscape | {"targets": ["digits"]})
    with pytest.raises(ValueError, match=r"unknown comparison 'brief'.*random, trained"):
        LandscapeAnalysisParameters.from_notebook(landscape | {"comparisons": ["brief"]})


def config(folder: Path) -> ZeroShotRetentionParameters:
    return ZeroShotRetentionParameters.from_notebook(GIVEN | {"out": str(folder)})


def test_a_run_writes_tables_masks_figures_and_their_record(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    run = Run("zero_shot_retention", config(tmp_path / "run"))
    run.write_table("table", pd.DataFrame({"a": [1, 2], "b": [0.123456789, 2.0]}))
    run.write_mask("mask", pai.Mask({"w": torch.ones(3)}))
    figure = Figure()
    figure.add_subplot().plot([1, 2])
    run.write_figure("figure", figure)
    record = run.finish(provenance={"source": "here"})
    folder = tmp_path / "run"
    assert (folder / "table.csv").read_text() == "a,b\n1,0.123457\n2,2\n"
    assert pai.Mask.load(folder / "mask.safetensors").sparsity == 0
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "record.json").read_text()) == record
    assert record["outputs"] == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("table.csv", "mask.safetensors", "mask.json", "figure.png")
    }
    assert record["notebook"] == "zero_shot_retention"
    assert record["parameters"] == config(folder).model_dump()
    assert record["provenance"] == {"source": "here"}
    assert record["versions"]["torch"] == importlib.metadata.version("torch")
    assert record["python"] == platform.python_version()
    assert record["threads"] == 1
    assert record["peak_memory_mib"] > 100
    assert record["seconds"] >= 0
    assert record["device"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "figure.png", "mask.json", "mask.safetensors", "record.json", "table.csv"
    ]  # fmt: skip


def test_the_record_of_an_earlier_run_goes_before_the_next_one_starts(tmp_path: Path) -> None:
    Run("first", config(tmp_path)).finish()
    assert (tmp_path / "record.json").exists()
    Run("second", config(tmp_path))
    assert not (tmp_path / "record.json").exists()


def test_a_failed_write_leaves_no_part_and_no_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run("run", config(tmp_path))
    run.write_table("table", pd.DataFrame({"a": [1]}))

    def full(_: int) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="no space"):
            run.write_table("table", pd.DataFrame({"a": [2]}))
        with pytest.raises(OSError, match="no space"):
            run.write_table("other", pd.DataFrame({"a": [2]}))
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]
    assert (tmp_path / "table.csv").read_text() == "a\n1\n"
    assert list(run.finish()["outputs"]) == ["table.csv"]


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
    library, other = tmp_path / "pai_utils" / "runs.py", tmp_path / "other"
    library.parent.mkdir()
    library.write_text("")
    monkeypatch.setattr(runs, "__file__", str(library))
    assert runs._commit() == (None, None)
    _git(tmp_path, "init", "-q")
    other.write_text("")
    _git(tmp_path, "add", "other")
    _git(tmp_path, "commit", "-q", "-m", "another project")
    # Below a checkout, but no part of it.
    assert runs._commit() == (None, None)
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-q", "-m", "the library")
    head = _git(tmp_path, "rev-parse", "HEAD")
    assert runs._commit() == (head, True)
    other.write_text("changed")
    assert runs._commit() == (head, False)


def test_a_record_needs_neither_git_nor_an_installed_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", absent)
    record = Run("run", config(tmp_path)).finish()
    assert (record["commit"], record["clean"]) == (None, None)
    assert record["versions"]["pai-utils"] is None


def _result(**changed: object) -> pd.DataFrame:
    row = {
        "cell": "a",
        "notebook": "n",
        "backbone": "b",
        "source": "digits",
        "target": "photos",
        "held_out": True,
        "scorer": "snip",
        "sparsity": 0.5,
        "stage": "pruned",
        "accuracy": 0.5,
        "dense_accuracy": 0.9,
        "chance": 0.1,
        "retention": 0.5,
        "low": 0.4,
        "high": 0.6,
        "count": 100,
        "seeds": 3,
    }
    return pd.DataFrame([{**row, **changed}])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sparsity": 1.0}, "0.sparsity: Input should be less than 1"),
        ({"accuracy": 1.2}, "0.accuracy: Input should be less than or equal to 1"),
        ({"count": 0}, "0.count: Input should be greater than or equal to 1"),
        ({"seeds": None}, "0.seeds: Input should be a valid integer"),
        ({"extra": 1}, "0.extra: Extra inputs are not permitted"),
    ],
)
def test_results_are_refused_with_the_row_and_the_reason(
    changed: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_results(_result(**changed))


def test_results_have_one_row_a_key() -> None:
    two = pd.concat([_result(), _result(accuracy=0.4)])
    with pytest.raises(ValueError, match=r"two rows of .*'digits'.*'snip'"):
        check_results(two)
    with pytest.raises(ValueError, match="there is no column 'stage'"):
        check_results(_result().drop(columns="stage"))


def test_results_come_back_from_a_file_and_are_checked_there(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    whole = pd.concat([_result(), _result(source="none", retention=None, low=None, high=None)])
    whole.to_csv(path, index=False)
    read = read_results(path)
    assert read.source.tolist() == ["digits", "none"]
    assert read.retention.isna().tolist() == [False, True]
    path.write_text(path.read_text().replace("photos", ""))
    with pytest.raises(ValueError, match=r"results\.csv: no table of results: row 0\.target"):
        read_results(path)


def test_a_run_writes_results_without_the_dense_rows(tmp_path: Path) -> None:
    config = PrunePerTaskParameters(
        backbone="b", sources=["digits", "photos"], scorers=["snip"], sparsity=0.5,
        out=str(tmp_path / "cell"),
    )  # fmt: skip
    run = runs.Run("prune_per_task", config)
    given = _result().drop(columns=["cell", "notebook", "backbone", "held_out", "stage"])
    dense = given.assign(scorer="dense", source="none", sparsity=0.0)
    run.write_results(pd.concat([dense, given]).assign(unknown=1))
    (row,) = read_results(tmp_path / "cell" / "results.csv").to_dict("records")
    assert (row["cell"], row["notebook"], row["stage"]) == ("cell", "prune_per_task", "pruned")
    assert row["held_out"] is True


def test_results_need_an_encoder(tmp_path: Path) -> None:
    config = WorkedExamplesParameters(fractions=[0.5, 1.0], correlation=0.9, out=str(tmp_path))
    with pytest.raises(ValueError, match="results are those of an encoder, and worked_examples"):
        runs.Run("worked_examples", config).write_results(_result())
    with pytest.raises(ValueError, match="unknown parameter 'backbone'"):
        WorkedExamplesParameters.from_notebook({"backbone": "efficientnet_lite0", "out": "x"})


def test_a_record_is_checked_when_it_is_read(tmp_path: Path) -> None:
    config = PrunePerTaskParameters(
        backbone="b", sources=["digits", "photos"], scorers=["snip"], sparsity=0.5,
        out=str(tmp_path),
    )  # fmt: skip
    run = runs.Run("prune_per_task", config)
    run.write_table("t", pd.DataFrame({"a": [1]}))
    with pytest.raises(ValueError, match=r"record\.json: missing"):
        read_record(tmp_path)
    run.finish({"spots": tiny_task()})
    record = read_record(tmp_path)
    assert set(record.inputs["tasks"]["spots"]) == {"train", "test"}
    assert altered_outputs(tmp_path) == []
    (tmp_path / "t.csv").write_text("a\n2\n")
    assert altered_outputs(tmp_path) == ["t.csv"]
    (tmp_path / "t.csv").unlink()
    assert altered_outputs(tmp_path) == []
    assert altered_outputs(tmp_path, absent=True) == ["t.csv"]
    content = json.loads((tmp_path / "record.json").read_text())
    (tmp_path / "record.json").write_text(json.dumps({**content, "seconds": -1}))
    with pytest.raises(ValueError, match="no record of a run: seconds: Input should be greater"):
        read_record(tmp_path)


def test_files_written_by_others_are_in_the_record(tmp_path: Path) -> None:
    config = WorkedExamplesParameters(fractions=[0.5, 1.0], correlation=0.5, out=str(tmp_path))
    run = Run("worked_examples", config)
    (tmp_path / "model.onnx").write_bytes(b"content")
    run.record_files("model.onnx")
    with pytest.raises(FileNotFoundError):
        run.record_files("none")
    record = run.finish()
    assert record["outputs"] == {"model.onnx": hashlib.sha256(b"content").hexdigest()}
    assert altered_outputs(tmp_path) == []
    (tmp_path / "model.onnx").write_bytes(b"other")
    assert altered_outputs(tmp_path) == ["model.onnx"]
