"""The command line: what it says, what it refuses, and how it leaves."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
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
from pai_utils.support.common import package_folder

ROOT = Path(__file__).resolve().parents[1]
PARAMETERS = """
backbone = "efficientnet_lite0"
source = "digits"  # one task
targets = ["photos"]
scorers = ["magnitude"]
sparsities = [0.2]
seeds = [0]
out = "results"
"""
CONFIG = """
import pai_utils as pai

config = pai.studies.zero_shot_retention.Parameters.from_notebook(globals())
"""


def _stem(path: Path) -> str:
    return path.stem


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
def notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a notebook to an empty working directory: parameters, their check, more cells."""
    monkeypatch.chdir(tmp_path)

    def write(*sources: str, parameters: str = PARAMETERS, config: str = CONFIG) -> Path:
        new: Any = nbformat.v4
        cells = [new.new_code_cell(source) for source in (parameters, config, *sources)]
        cells[0].metadata["tags"] = ["parameters"]
        path = tmp_path / "mine.ipynb"
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python", "language": "python"}}
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


def test_help_names_the_commands() -> None:
    result = call("--help")
    assert result.exit_code == 0
    listed = result.stdout.split("Commands:")[1].split("\n")
    assert [line.split()[0] for line in listed if line.strip()] == ["doctor", "list", "run"]


def test_the_list_has_a_line_on_every_backbone_task_and_scorer() -> None:
    result = call("list")
    assert result.exit_code == 0
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line.startswith("  ")}
    for name, spec in published.BACKBONES.items():
        assert spec.description in lines[name]
    for name, preset in published.PRESETS.items():
        assert f"{preset.description}; 224 px, {preset.licence}" in lines[name]
    for name, task in pai.TASKS.items():
        assert lines[name].endswith(task.description)
    for name, dataset in DATASETS.items():
        assert dataset.description in lines[name]
        assert dataset.licence in lines[name]
    for name, scorer in pai.SCORERS.items():
        assert lines[name].endswith(scorer.summary)


def test_help_loads_no_library_and_the_list_no_more_than_the_registries_need() -> None:
    code = (
        "import sys; from pai_utils.__main__ import main; "
        "main(sys.argv[1:], standalone_mode=False); "
        "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    for arguments, absent in (
        (["--help"], {"torch", "numpy", "pandas", "pydantic", "papermill"}),
        (["list"], {"timm", "torchvision", "pandas", "pydantic", "papermill", "sklearn"}),
    ):
        loaded = subprocess.run(
            [sys.executable, "-c", code, *arguments], check=True, capture_output=True, cwd=ROOT
        ).stderr
        assert not absent & set(loaded.decode().split())


def test_as_a_module_it_refuses_in_one_line() -> None:
    call = [sys.executable, "-m", "pai_utils", "run", "zero_shot_retentio"]
    result = subprocess.run(call, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(
        "Error: unknown notebook 'zero_shot_retentio'; did you mean 'zero_shot_retention'? "
    )
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("path", sorted(command_line.NOTEBOOKS.glob("*.ipynb")), ids=_stem)
def test_every_notebook_of_the_book_runs_by_name_with_its_own_parameters(
    path: Path, executed: list[Any]
) -> None:
    result = call("run", path.stem)
    assert result.exit_code == 0, result.output
    assert executed == [(path.stem, {}, Path("out") / path.stem)]


def test_values_reach_the_notebook_in_their_types(
    executed: list[Any], notebook: Callable[..., Path]
) -> None:
    path = notebook()
    given = {
        "sparsities": ("[0.1, 1e-2]", [0.1, 0.01]),
        "targets": ("[digits, photos]", ["digits", "photos"]),
        "samples": ("None", None),
        "batch_size": ("8", 8),
        "pretrained": ("False", False),
        "device": ("cpu", "cpu"),
    }
    options = [text for name, (value, _) in given.items() for text in ("-p", name, value)]
    result = call("run", str(path), *options, "-o", "there/now")
    assert result.exit_code == 0, result.output
    expected = {name: value for name, (_, value) in given.items()} | {"out": "there/now"}
    assert executed == [("mine", expected, Path("there/now"))]
    assert str(Path("there/now/mine.ipynb")) in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-p", "sparsity", "0.4"], "unknown parameter 'sparsity'; did you mean 'sparsities'?"),
        (["-p", "_sparsities", "[0.4]"], "unknown parameter '_sparsities'"),
        (["-p", "sparsities", "[1.5]"], "sparsities.0: Input should be less than 1, not 1.5"),
        (["-p", "seeds", "one"], "seeds: Input should be a valid list, not 'one'"),
        (["-p", "scorers", "[magnitud]"], "unknown scorer 'magnitud'; did you mean 'magnitude'?"),
        (["-p", "seed", "1", "-p", "seed", "2"], "a parameter is given twice"),
        (["-p", "out", "here", "-o", "there"], "the folder is given twice"),
    ],
)
def test_wrong_parameters_are_refused_before_anything_starts(
    options: list[str],
    message: str,
    executed: list[Any],
    notebook: Callable[..., Path],
    tmp_path: Path,
) -> None:
    assert message in refusal("run", str(notebook()), *options)
    assert executed == []
    assert [path.name for path in tmp_path.iterdir()] == ["mine.ipynb"]


def test_what_is_no_notebook_of_ours_is_refused(
    notebook: Callable[..., Path], tmp_path: Path
) -> None:
    assert "there is no notebook other.ipynb" in refusal("run", "other.ipynb")
    (tmp_path / "text.ipynb").write_text("text")
    assert "text.ipynb is no readable notebook" in refusal("run", str(tmp_path / "text.ipynb"))
    assert "no cell tagged 'parameters'" in refusal("run", str(notebook(config="")))
    path = notebook(config="pai.runs.OtherConfig.from_notebook(globals())")
    assert "OtherConfig, which pai_utils lacks" in refusal("run", str(path))
    (tmp_path / "file").touch()
    assert "cannot write to the folder file" in refusal("run", str(notebook()), "-o", "file")


def test_a_library_that_notebooks_need_is_named_with_how_to_install_it(
    notebook: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_line, "_RUNNERS", ("json", "no_such_runner"))
    result = call("run", str(notebook()))
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "needs no_such_runner, not installed here" in result.stderr
    assert "'pai-utils[book]'" in result.stderr


def as_module(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pai_utils", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_a_notebook_runs_and_its_copy_lies_with_the_results(
    notebook: Callable[..., Path], tmp_path: Path
) -> None:
    path = notebook("print(config.sparsities, config.out)")
    before = path.read_bytes()
    result = as_module("run", "mine.ipynb", "-p", "sparsities", "[0.3]", "-o", "o", folder=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "o/mine.ipynb and its results are in o\n"
    assert [file.name for file in (tmp_path / "o").iterdir()] == ["mine.ipynb"]
    copy = json.loads((tmp_path / "o" / "mine.ipynb").read_text())
    assert "".join(copy["cells"][-1]["outputs"][0]["text"]) == "[0.3] o\n"
    assert path.read_bytes() == before


def test_a_notebook_that_fails_says_with_what_and_leaves_its_copy(
    notebook: Callable[..., Path], tmp_path: Path
) -> None:
    notebook(config=f"raise ValueError('no such\\nluck')\n{CONFIG}")
    result = as_module("run", "mine.ipynb", folder=tmp_path)
    assert result.returncode == 1
    assert result.stderr == (
        "Error: mine.ipynb failed with ValueError: no such luck; the copy up to there is "
        "results/mine.partial.ipynb\n"
    )
    assert [file.name for file in (tmp_path / "results").iterdir()] == ["mine.partial.ipynb"]


def test_the_doctor_finds_versions_device_weights_and_data() -> None:
    result = call("doctor")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert all(line.startswith("ok ") for line in lines)
    names = [line.split(maxsplit=1)[1].split(":")[0] for line in lines]
    for name in ("Python", "torch", "timm", "papermill", "device"):
        assert name in names
    assert [n for n in names if n.startswith("weights")] == [
        f"weights {name}" for name in published.BACKBONES
    ]
    assert [n for n in names if n.startswith("data")] == [
        *(f"data {name}" for name in pai.TASKS),
        "data sets",
    ]


def test_the_doctor_says_which_published_weights_are_there_and_that_one_is_damaged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PAI_WEIGHTS_ROOT", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(command_line, "_packages", list)
    monkeypatch.setattr(command_line, "_embedded", list)
    result = call("doctor")
    assert result.exit_code == 0
    assert (
        f"ok       presets: none found in {tmp_path} or the hub's cache; resnet50" in result.stdout
    )
    (tmp_path / "dino_resnet50_pretrain.pth").touch()
    result = call("doctor")
    assert result.exit_code == 0
    *_, line, _ = result.stdout.splitlines()
    assert line.startswith("ok       presets: resnet50.dino found in ")
    assert line.endswith(
        "; resnet50.in1k, resnet50.mocov2, vit_small.dino, vit_base.dino, vit_small.in1k: fetched "
        "by load_backbone(name, download=True)"
    )
    (tmp_path / "resnet50-0676ba61.pth").write_bytes(b"half a file")
    result = call("doctor")
    assert result.exit_code == 1
    assert "missing  preset resnet50.in1k: resnet50-0676ba61.pth is damaged" in result.stdout
    assert "presets: resnet50.dino found" in result.stdout


def test_the_doctor_says_which_data_sets_are_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command_line, "_packages", list)
    monkeypatch.setattr(command_line, "_embedded", list)
    monkeypatch.setenv("PAI_DATA_ROOT", str(tmp_path))
    assert f"data sets: none found in {tmp_path} (PAI_DATA_ROOT)" in call("doctor").stdout
    (tmp_path / DATASETS["KMNIST"].place).mkdir(parents=True)
    assert f"data sets: KMNIST found in {tmp_path}" in call("doctor").stdout


def test_the_doctor_says_what_to_do_about_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = "efficientnet_lite0"
    damaged = tmp_path / "encoder.pth"
    damaged.write_bytes(b"half a file")
    spec = published.BACKBONES[name]
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
    missing = [line for line in result.stdout.splitlines() if line.startswith("missing")]
    assert len(missing) == 4
    assert "no-such-library: run `make env`" in missing[0]
    assert "no-such-runner: only notebooks need it; run `make env`" in missing[1]
    assert f"weights {name}: encoder.pth is damaged" in missing[2]
    assert f"reinstall the package {spec.package}" in missing[2]
    assert "data digits:" in missing[3]
    assert "install no-such-package" in missing[3]
    assert result.stderr == "Error: something is missing; the lines above say what to do\n"


def test_only_what_notebooks_need_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.requires", lambda _: ["no-such ; extra == 'book'"])
    monkeypatch.setattr(command_line, "_embedded", list)
    result = call("doctor")
    assert result.exit_code == 0
    assert "missing  no-such: only notebooks need it" in result.stdout
