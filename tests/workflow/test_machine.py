"""One GPU for each process, as long as it lives."""

from pathlib import Path

import pytest
from machine import gpus, held_gpus


@pytest.fixture(autouse=True)
def _two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")


def test_a_lost_gpu_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with (
        pytest.raises(OSError, match="1 GPUs were to be used and 0 are there"),
        held_gpus(tmp_path),
    ):
        pass


def test_without_a_folder_none_is_held() -> None:
    with held_gpus(None) as held:
        assert (held, gpus()) == ([], ["2", "5"])


def test_the_driver_is_asked_where_no_variable_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus() == []
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 0\necho 1\n")
    program.chmod(0o755)
    assert gpus() == ["0", "1"]
    program.write_text("#!/bin/sh\nexit 9\n")  # no driver
    assert gpus() == []
