"""Files that are whole or not there, and tensors with a text and a checksum in them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pai_utils.support.stored import read_tensors, write_atomically, write_tensors

TENSORS = {"a": torch.arange(3), "b": torch.tensor([[0.5]], dtype=torch.float16)}


def test_a_write_replaces_the_file_with_usual_permissions(tmp_path: Path) -> None:
    path, other = tmp_path / "new" / "file.txt", tmp_path / "other"
    write_atomically(path, b"first")
    write_atomically(path, b"second")
    assert path.read_bytes() == b"second"
    other.write_text("")
    assert path.stat().st_mode == other.stat().st_mode
    assert list(path.parent.iterdir()) == [path]


def test_an_interrupted_write_leaves_the_old_file_whole_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.bin"
    write_atomically(path, b"old")

    def interrupt(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_followed_and_a_tilde_is_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    link, target = tmp_path / "link", tmp_path / "elsewhere" / "target"
    link.symlink_to("elsewhere/target")
    for content in (b"where nothing was", b"over it"):
        write_atomically(link, content)
        assert link.is_symlink()
        assert target.read_bytes() == content
    assert list(target.parent.iterdir()) == [target]
    content = write_tensors("~/x.safetensors", TENSORS, "said", format="kind/1")
    assert (tmp_path / "home" / "x.safetensors").read_bytes() == content
    assert read_tensors("~/x.safetensors", "kind/1", what="thing")[1] == "said"


def test_the_workflow_writes_files_without_importing_torch() -> None:
    code = "import sys, pai_utils.support.stored; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
