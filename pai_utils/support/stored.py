"""Safetensors files that carry a text and a checksum of everything in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from pai_utils.support.common import hash_tensors
from pai_utils.support.files import write_atomically


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], text: str, **header: str
) -> bytes:
    """Write tensors and a text whole or not at all, and return the file's content.

    Args:
        path: the file.
        tensors: contiguous, on the CPU.
        text: any, such as JSON.
        header: what else the file's header says, such as ``format``; not checked.
    """
    from safetensors.torch import save

    checked = {**header, "text": text, "sha256": hash_tensors(tensors, text)}
    content = save(dict(tensors), metadata=checked)
    write_atomically(path, content)
    return content


def read_header(path: str | Path) -> dict[str, str]:
    """The header of a safetensors file, unchecked.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if it is truncated or none of these.
    """
    return _open(path, "safetensors file", whole=False)[1]


def read_tensors(
    path: str | Path, kind: str, *, what: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors on the CPU, and the header, of a file of :func:`write_tensors`.

    Args:
        path: the file.
        kind: the ``format`` that its header must say.
        what: what such a file is called in errors.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if it is truncated, of another format, or does not match its checksum.
    """
    tensors, header = _open(path, what, whole=True)
    if header.get("format") != kind:
        raise ValueError(f"{path} is no {what}: its format is {header.get('format')!r}")
    if header.get("sha256") != hash_tensors(tensors, header.get("text", "")):
        raise ValueError(f"{path} was altered: its contents do not match its checksum")
    return tensors, header


def _open(path: str | Path, what: str, *, whole: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"no {what} at {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            names = file.keys() if whole else ()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no {what}: {error}") from error
