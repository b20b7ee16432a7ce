"""The settings of the kernels that execute notebooks, for the command line and the workflow."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

_POSIX = os.name == "posix"


@contextmanager
def kernel_settings() -> Iterator[Any]:
    """The ``config`` of papermill's ``execute_notebook``, which is to be called inside.

    The channel to a kernel is a socket in a folder of its own: two kernels that start together may
    be given one port, and a port is open to every user of the computer.
    """
    from traitlets.config import Config

    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # silences the kernel's debugger notice
    # The path of a socket may have about a hundred characters, and other folders are deep.
    with TemporaryDirectory(prefix="kernel-", dir="/tmp" if _POSIX else None) as folder:
        channel = {"transport": "ipc"} if _POSIX else {"transport_encryption": "auto"}
        yield Config(
            {
                "KernelManager": {**channel, "connection_file": f"{folder}/kernel.json"},
                # A kernel is interrupted before it is ended, and reports that as an error.
                "NotebookClient": {"extra_arguments": ["--IPKernelApp.log_level=50"]},
            }
        )
