"""Scores that several processes compute together, where cells find them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pai_utils as pai
from pai_utils.pruning import Recipe
from pai_utils.studies.parameters import EncoderParameters, read_parameters

ROOT = Path(__file__).parents[2]


@pytest.mark.engine
@pytest.mark.xdist_group("engine")
def test_processes_of_torchrun_keep_the_scores_that_a_cell_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAI_CACHE", str(tmp_path / "cache"))
    notebook = ROOT / "notebooks/prune_per_task.ipynb"
    parameters = {"backbone": "timm:test_resnet", "image_size": 32, "pretrained": False}
    parameters |= {"train_size": 60, "test_size": 30, "samples": 10}
    parameters |= {"sources": ["digits", "photos"], "scorers": ["fisher_diag", "random"]}
    command = [sys.executable, str(ROOT / "workflow/share.py")]
    command += [str(notebook), "--out", str(tmp_path / "done.txt"), "--processes", "2"]
    command += ["--parameters", json.dumps(parameters)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    done = (tmp_path / "done.txt").read_text()
    assert done.splitlines() == ["fisher_diag digits 0", "fisher_diag photos 0"]
    kept = set(tmp_path.glob("cache/scores-*.safetensors"))
    assert len(kept) == 2

    config = read_parameters(notebook, {**parameters, "device": "cpu"})
    assert isinstance(config, EncoderParameters)
    suite = pai.Suite.load(config)

    def digits() -> pai.Scores:
        return suite.score(Recipe("fisher_diag"), suite.source("digits"), config.draw)

    read = digits()
    assert set(tmp_path.glob("cache/scores-*.safetensors")) == kept
    monkeypatch.delenv("PAI_CACHE")
    alone = digits()
    for name, values in alone.items():
        torch.testing.assert_close(read[name], values, rtol=1e-4, atol=1e-9)
