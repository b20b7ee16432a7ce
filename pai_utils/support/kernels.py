"""Execution of a notebook in a kernel of its own, for the command line and for grids."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


def execute(
    notebook: Path, copy: Path, parameters: Mapping[str, Any], *, watched: bool = False
) -> None:
    """Execute a notebook through papermill, cell by cell, into its copy.

    ``watched`` shows a bar of cells on stderr, and what these print. A port would be open to every
    user of the computer: the channel to the kernel is a socket in a folder of its own.

    Raises:
        papermill.PapermillExecutionError: a cell failed; the copy shows it.
        nbclient.exceptions.DeadKernelError: the kernel died.
    """
    from papermill import execute_notebook
    from traitlets.config import Config

    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # silences the kernel's debugger notice
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")  # and tqdm's, of widgets
    with TemporaryDirectory(prefix="kernel-", dir="/tmp") as folder:  # a socket's path is short
        settings = {
            "KernelManager": {"transport": "ipc", "connection_file": f"{folder}/kernel.json"},
            # A kernel is interrupted before it is ended, and reports that as an error.
            "NotebookClient": {"extra_arguments": ["--IPKernelApp.log_level=50"]},
        }
        execute_notebook(
            str(notebook),
            str(copy),
            parameters=dict(parameters),
            progress_bar=watched,
            stdout_file=sys.stderr if watched else None,
            stderr_file=sys.stderr if watched else None,
            config=Config(settings),
        )
