"""What several cells need, computed by the command that the workflow calls."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pai_utils.needs import needs
from pai_utils.studies.parameters import read_parameters

ROOT = Path(__file__).parents[2]


def _share(need: object, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "workflow/share.py"), json.dumps(need)]
    command += ["--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Features, a head and scores, each made from the one before, and the scores' need."""
    folder = tmp_path_factory.mktemp("made")
    values = {"sources": ["digits", "photos"], "scorers": ["fisher_diag"], "samples": 10}
    config = read_parameters(ROOT / "notebooks/prune_per_task.ipynb", {**values, "train_size": 60})
    files: dict[str, Path] = {}
    before: list[str] = []
    for need in needs(config):
        if need.source == "digits":
            out = folder / f"{need.kind}.safetensors"
            result = _share(need.parameters, out, "--before", *before)
            assert result.returncode == 0, result.stderr
            files[need.kind] = out
            before = [str(out)]
            files["need"] = folder / "need.json"
            files["need"].write_text(json.dumps(need.parameters))
    return files


def test_each_is_one_file_of_its_own_kind(made: dict[str, Path]) -> None:
    assert {path.name for path in made["need"].parent.iterdir()} == {
        "features.safetensors",
        "head.safetensors",
        "scores.safetensors",
        "need.json",
    }
    assert load_file(made["features"])["features"].shape == (60, 1280)
    assert load_file(made["head"])["weight"].shape == (10, 1280)


def test_processes_of_torchrun_give_the_scores_of_one(made: dict[str, Path]) -> None:
    out = made["need"].with_name("two.safetensors")
    need = json.loads(made["need"].read_text())
    arguments = ["--before", str(made["head"]), "--processes", "2"]
    result = _share(need, out, *arguments)
    assert result.returncode == 0, result.stderr
    one, two = load_file(made["scores"]), load_file(out)
    assert one.keys() == two.keys()
    for name, values in one.items():
        torch.testing.assert_close(two[name], values, rtol=1e-4, atol=1e-9)


def test_a_need_that_cannot_be_made_fails_and_leaves_no_file(
    made: dict[str, Path], tmp_path: Path
) -> None:
    need = json.loads(made["need"].read_text())
    result = _share({**need, "samples": 10**6}, tmp_path / "scores.safetensors")
    assert result.returncode != 0
    assert "samples=1000000 but the dataset holds 60" in result.stderr
    assert not list(tmp_path.iterdir())
