"""Files that are whole or not there, and safetensors files with a checksum of all they hold.

The workflow writes files too and starts often, so torch is imported only where tensors are read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

if TYPE_CHECKING:
    from torch import Tensor


def located(path: str | Path) -> Path:
    """The path that somebody gave: a leading ``~`` is the home folder, as in a shell."""
    return Path(path).expanduser()


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write ``content`` to ``path`` through a temporary file beside it: all of it or nothing.

    A symbolic link stays one, and the file it leads to is written.
    """
    path = located(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def digest_of(path: Path, kind: str = "sha256") -> str:
    """SHA-256 of a file, as 64 hexadecimal digits, or another digest of that name."""
    with path.open("rb") as file:
        # MD5 is what some publishers give, and no more than a guard against damage.
        digest = hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=False))
    return digest.hexdigest()


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], text: str, *, format: str
) -> bytes:
    """Write contiguous tensors on the CPU and a text, whole or not at all; return the content."""
    from safetensors.torch import save

    from pai_utils.support.common import hash_tensors

    checked = {"format": format, "text": text, "sha256": hash_tensors(tensors, text)}
    content = save(dict(tensors), metadata=checked)
    write_atomically(path, content)
    return content


def read_tensors(path: str | Path, format: str, *, what: str) -> tuple[dict[str, Tensor], str]:
    """The tensors on the CPU, and the text, of a file of :func:`write_tensors` in one format.

    ``what`` is what errors call such a file. A ValueError refuses one that is truncated, of another
    format, or does not match its checksum.
    """
    from safetensors import SafetensorError, safe_open

    from pai_utils.support.common import hash_tensors

    path = located(path)
    if not path.is_file():
        raise FileNotFoundError(f"no {what} at {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
            header = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no {what}: {error}") from error
    if header.get("format") != format:
        raise ValueError(f"{path} is no {what}: its format is {header.get('format')!r}")
    text = header.get("text", "")
    if header.get("sha256") != hash_tensors(tensors, text):
        raise ValueError(f"{path} was altered: its contents do not match its checksum")
    return tensors, text
