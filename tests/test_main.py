"""The command line: what it says, what it refuses, and how it leaves."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import nbformat
import pytest
from click.testing import CliRunner, Result

import pai_utils as pai
from pai_utils import __main__ as command_line
from pai_utils.data import embedded
from pai_utils.data.datasets import DATASETS
from pai_utils.models import checkpoints, published
from pai_utils.studies.parameters import STUDIES
from pai_utils.support.common import package_folder

ROOT = Path(__file__).resolve().parents[1]
NAME = "zero_shot_retention"
PARAMETERS = """
backbone = "efficientnet_lite0"
source = "digits"  # one task
targets = ["photos"]
scorers = ["magnitude"]
sparsities = [0.2]
seeds = [0]
out = "results"
"""
Written = Callable[..., Path]


def call(*arguments: str) -> Result:
    return CliRunner().invoke(command_line.main, arguments)


def refusal(*arguments: str) -> str:
    """The one line that a refused call writes, without a traceback."""
    result = call(*arguments)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture
def notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Written:
    """Write a notebook to an empty working directory: parameters, and one more cell."""
    monkeypatch.chdir(tmp_path)

    def write(source: str = "", name: str = NAME) -> Path:
        new: Any = nbformat.v4
        cells = [new.new_code_cell(PARAMETERS), new.new_code_cell(source)]
        cells[0].metadata["tags"] = ["parameters"]
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python", "language": "python"}}
        path = tmp_path / f"{name}.ipynb"
        path.write_text(nbformat.writes(new.new_notebook(cells=cells, metadata=kernel)))
        return path

    return write


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any], Path]]:
    """What would be executed, without a kernel."""
    calls: list[tuple[str, dict[str, Any], Path]] = []

    def remember(path: Path, parameters: dict[str, Any], out: Path) -> Path:
        calls.append((path.stem, parameters, out))
        return out / path.name

    monkeypatch.setattr(command_line, "_execute", remember)
    return calls


@pytest.mark.parametrize(
    ("argument", "absent"),
    [
        ("--help", {"torch", "numpy", "pandas", "pydantic", "papermill"}),
        ("list", {"timm", "torchvision", "pandas", "pydantic", "papermill", "sklearn"}),
    ],
)
def test_help_and_the_list_load_no_library_they_do_not_need(
    argument: str, absent: set[str]
) -> None:
    code = (
        "import sys; from pai_utils.__main__ import main; "
        "main(sys.argv[1:], standalone_mode=False); "
        "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, argument]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    assert not absent & set(done.stderr.split())


def test_the_list_has_a_line_on_every_backbone_task_and_scorer() -> None:
    result = call("list")
    assert result.exit_code == 0
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line.startswith("  ")}
    for name, backbone in (published.BACKBONES | published.PRESETS).items():
        assert f"{backbone.description}; " in lines[name]
        assert backbone.licence in lines[name]
    for name, task in pai.TASKS.items():
        assert lines[name].endswith(task.description)
    for name, dataset in DATASETS.items():
        assert dataset.description in lines[name]
        assert dataset.licence in lines[name]
    for name, scorer in pai.SCORERS.items():
        assert lines[name].endswith(scorer.summary)


def test_every_notebook_of_the_book_runs_by_name_with_its_own_parameters(
    executed: list[Any],
) -> None:
    assert {path.stem for path in command_line.NOTEBOOKS.glob("*.ipynb")} == set(STUDIES)
    for name in STUDIES:
        result = call("run", name)
        assert result.exit_code == 0, result.output
    assert executed == [(name, {}, Path("out") / name) for name in STUDIES]


def test_values_reach_the_notebook_in_their_types(executed: list[Any], notebook: Written) -> None:
    given = {
        "sparsities": ("[.5, 5e-1]", [0.5, 0.5]),
        "targets": ("[digits, photos]", ["digits", "photos"]),
        "samples": ("None", None),
        "batch_size": ("8", 8),
        "pretrained": ("false", False),
        "train_size": ("~", None),
        "scope": ("2:4", "2:4"),
        "device": ("cpu", "cpu"),
    }
    options = [text for name, (value, _) in given.items() for text in ("-p", name, value)]
    result = call("run", str(notebook()), *options, "-o", "there/now")
    assert result.exit_code == 0, result.output
    expected = {name: value for name, (_, value) in given.items()} | {"out": "there/now"}
    assert executed == [(NAME, expected, Path("there/now"))]
    assert str(Path(f"there/now/{NAME}.ipynb")) in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-p", "sparsity", "0.4"], "unknown parameter 'sparsity'; did you mean 'sparsities'?"),
        (["-p", "sparsities", "[1.5]"], "sparsities.0: Input should be less than 1, not 1.5"),
        (["-p", "seeds", "one"], "seeds: Input should be a valid list, not 'one'"),
        (["-p", "scorers", "[magnitud]"], "unknown scorer 'magnitud'; did you mean 'magnitude'?"),
        (["-p", "seed", "1", "-p", "seed", "2"], "a parameter is given twice"),
        (["-p", "out", "here", "-o", "there"], "the folder is given twice"),
    ],
)
def test_wrong_parameters_are_refused_before_anything_starts(
    options: list[str], message: str, executed: list[Any], notebook: Written, tmp_path: Path
) -> None:
    assert message in refusal("run", str(notebook()), *options)
    assert executed == []
    assert [path.name for path in tmp_path.iterdir()] == [f"{NAME}.ipynb"]


def test_values_in_a_parameters_cell_may_be_expressions(
    executed: list[Any], notebook: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "tests.test_main.PARAMETERS", PARAMETERS.replace("[0.2]", "[k / 10 for k in range(3)]")
    )
    assert call("run", str(notebook())).exit_code == 0
    assert executed == [(NAME, {}, Path("results"))]
    path = notebook()
    path.write_text(path.read_text().replace("range(3)", "range(30)"))
    assert "sparsities.10: Input should be less than 1, not 1.0" in refusal("run", str(path))
    path.write_text(path.read_text().replace("range(30)", "absent"))
    assert "its parameters cell fails: NameError" in refusal("run", str(path))


def test_what_is_no_notebook_of_ours_is_refused(notebook: Written, tmp_path: Path) -> None:
    assert "unknown notebook 'there/other.ipynb'. Choose" in refusal("run", "there/other.ipynb")
    assert f"did you mean {NAME!r}?" in refusal("run", NAME[:-1])
    assert "unknown notebook 'mine'" in refusal("run", str(notebook(name="mine")))
    (tmp_path / "scorer_atlas.ipynb").write_text("text")
    assert "is no readable notebook" in refusal("run", str(tmp_path / "scorer_atlas.ipynb"))
    (tmp_path / "file").touch()
    assert "cannot write to the folder file" in refusal("run", str(notebook()), "-o", "file")


def test_a_notebook_runs_and_a_person_at_a_terminal_sees_what_its_cells_print_and_their_bars(
    notebook: Written, tmp_path: Path
) -> None:
    code = "import pai_utils.support.common as c; print(sparsities, out); "
    path = notebook(code + "list(c.progress([1], 'masks'))")
    before = path.read_bytes()
    command = [sys.executable, "-m", "pai_utils", "run", path.name]
    command += ["-p", "sparsities", "[0.3]", "-o", "o"]
    ours, theirs = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=theirs, check=True, cwd=tmp_path, env=environment
    )
    os.close(theirs)
    seen = b""
    with suppress(OSError):  # at its end
        while part := os.read(ours, 4096):
            seen += part
    os.close(ours)
    assert b"[0.3] o" in seen
    assert b"masks:   0%" in seen
    assert b"Warning" not in seen
    assert done.stdout.decode() == f"o/{NAME}.ipynb and its results are in o\n"
    assert [file.name for file in (tmp_path / "o").iterdir()] == [f"{NAME}.ipynb"]
    copy = json.loads((tmp_path / "o" / path.name).read_text())
    assert "".join(copy["cells"][-1]["outputs"][0]["text"]) == "[0.3] o\n"
    assert path.read_bytes() == before


def test_a_notebook_that_fails_says_with_what_and_leaves_its_copy(
    notebook: Written, tmp_path: Path
) -> None:
    notebook("raise ValueError('no such\\nluck')")
    result = call("run", f"{NAME}.ipynb")
    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: {NAME}.ipynb failed with ValueError: no such luck; the copy up to there is "
        f"results/{NAME}.partial.ipynb\n"
    )
    assert [file.name for file in (tmp_path / "results").iterdir()] == [f"{NAME}.partial.ipynb"]


def test_the_doctor_finds_versions_device_weights_and_data() -> None:
    result = call("doctor")
    assert result.exit_code == 0, result.output
    lines = (line.split(":")[0].split(maxsplit=1) for line in result.stdout.splitlines())
    marks = {name: mark for mark, name in lines}
    shipped = [f"weights {name}" for name in published.BACKBONES]
    shipped += [f"data {name}" for name in pai.TASKS]
    assert {"Python", "torch", "timm", "papermill", "device", *shipped, "data sets"} <= set(marks)
    optional = {f"weights {name}" for name in published.PRESETS}
    assert {name for name, mark in marks.items() if mark != "ok"} <= optional


def test_the_doctor_says_which_published_files_are_there_and_that_one_is_damaged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command_line, "_packages", list)
    monkeypatch.setattr(published, "BACKBONES", {})
    monkeypatch.setattr(embedded, "TASKS", {})
    monkeypatch.setenv("PAI_WEIGHTS_ROOT", str(tmp_path))
    monkeypatch.setenv("PAI_DATA_ROOT", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    found = tmp_path / "dino_resnet50_pretrain.pth"
    absent = "absent   weights {}: fetched by load_backbone(name, download=True)"
    *lines, last = call("doctor").stdout.splitlines()
    assert lines[1:] == [absent.format(name) for name in published.PRESETS]
    assert f"data sets: none found in {tmp_path} (PAI_DATA_ROOT)" in last
    found.touch()
    (tmp_path / "resnet50-0676ba61.pth").write_bytes(b"half a file")
    (tmp_path / DATASETS["KMNIST"].place).mkdir(parents=True)
    result = call("doctor")
    assert result.exit_code == 1
    assert f"ok       weights resnet50.dino: {found}, intact" in result.stdout
    assert "missing  weights resnet50.in1k: resnet50-0676ba61.pth is damaged" in result.stdout
    assert f"data sets: KMNIST found in {tmp_path}" in result.stdout


def test_the_doctor_says_what_to_do_about_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = "efficientnet_lite0"
    damaged = tmp_path / "encoder.pth"
    damaged.write_bytes(b"half a file")
    find = checkpoints.find_weights
    monkeypatch.setattr(checkpoints, "find_weights", lambda a: damaged if "lite0" in a else find(a))

    def absent() -> Any:
        return package_folder("no_such_module", "no-such-package", "the images come")

    monkeypatch.setitem(embedded.TASKS, "digits", embedded.TaskSpec("digits", ("0", "1"), absent))
    monkeypatch.setattr(
        "importlib.metadata.requires",
        lambda _: ["no-such-library>=2", "no-such-runner ; extra == 'book'", "x ; extra == 'test'"],
    )
    result = call("doctor")
    assert result.exit_code == 1
    assert "absent   no-such-runner: only notebooks need it; run `make env`" in result.stdout
    library, weights, data = (x for x in result.stdout.splitlines() if x.startswith("missing"))
    assert "no-such-library: run `make env`" in library
    assert f"weights {name}: encoder.pth is damaged" in weights
    assert f"reinstall the package {published.BACKBONES[name].package}" in weights
    assert "data digits:" in data
    assert "install no-such-package" in data
    assert result.stderr == "Error: something is missing; the lines above say what to do\n"
