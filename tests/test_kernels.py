"""Kernels of executed notebooks: reached through a folder of their own."""

import stat
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from papermill import execute_notebook

from pai_utils.kernels import kernel_settings

SOURCE = """\
import ipykernel, json, os
path = ipykernel.get_connection_file()
print(json.load(open(path))["transport"], oct(os.stat(os.path.dirname(path)).st_mode), path)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sockets that are files are POSIX")
def test_a_kernel_is_reached_by_its_user_alone(tmp_path: Path) -> None:
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = new_notebook(cells=[new_code_cell(SOURCE)], metadata={"kernelspec": kernel})
    path = tmp_path / "print.ipynb"
    nbformat.write(notebook, path)
    with kernel_settings() as config:
        executed = execute_notebook(path, None, progress_bar=False, config=config)
    transport, mode, connection = executed.cells[0].outputs[0].text.split()
    assert transport == "ipc"
    assert not int(mode, 8) & (stat.S_IRWXG | stat.S_IRWXO)
    assert not Path(connection).parent.exists()
