"""Files that are whole or not there, and tensors with a text and a checksum in them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pai_utils.support.stored import (
    read_tensors,
    write_atomically,
    write_tensors,
)

TENSORS = {"a": torch.arange(3), "b": torch.tensor([[0.5]], dtype=torch.float16)}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "x.safetensors"
    content = write_tensors(path, TENSORS, "said", format="kind/1", name="x")
    assert path.read_bytes() == content
    tensors, header = read_tensors(path, "kind/1", what="thing")
    assert (header["text"], header["name"]) == ("said", "x")
    assert tensors.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert tensors[name].dtype == value.dtype
        assert torch.equal(tensors[name], value)


def test_another_kind_and_another_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    content = write_tensors(path, TENSORS, "said", format="kind/1")
    with pytest.raises(ValueError, match="is no thing: its format is 'kind/1'"):
        read_tensors(path, "kind/2", what="thing")
    path.write_bytes(content.replace(b"said", b"sawn"))
    with pytest.raises(ValueError, match="was altered"):
        read_tensors(path, "kind/1", what="thing")


def test_a_missing_and_a_truncated_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match=r"no thing at .*x\.safetensors"):
        read_tensors(path, "kind/1", what="thing")
    path.write_bytes(write_tensors(path, TENSORS, "", format="kind/1")[:20])
    with pytest.raises(ValueError, match=r"x\.safetensors is truncated or no thing"):
        read_tensors(path, "kind/1", what="thing")


def test_a_write_replaces_the_file_with_usual_permissions(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    write_atomically(path, b"first")
    write_atomically(path, b"second")
    assert path.read_bytes() == b"second"
    other = tmp_path / "other"
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


def test_the_workflow_writes_files_without_importing_torch() -> None:
    code = "import sys, pai_utils.support.stored; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
