"""Sphinx extension: show of an executed notebook what its run was: backbone and parameters.

One notebook is rendered once a backbone. Without this, both pages would bear the same title in the
browser's tab, in search results and in the links to the previous and the next page. And papermill
leaves two cells of parameters, the notebook's own and those in their place; a page shows one, with
the values that the run had.
"""

import ast
import json
from collections.abc import Mapping
from pprint import pformat
from typing import Any

from sphinx.application import Sphinx

EXECUTED = "book/executed/"
LABELS = {"efficientnet_lite0": "EfficientNet-Lite0", "vit_small_saliency": "ViT-S/14"}


def effective(code: str, values: Mapping[str, Any]) -> str:
    """Return a parameters cell with other values; its comments stay."""
    lines = code.split("\n")
    for node in reversed(ast.parse(code).body):
        if isinstance(node, ast.Assign) and isinstance(name := node.targets[0], ast.Name):
            if name.id not in values:
                continue
            end, after = (node.value.end_lineno or 0) - 1, node.value.end_col_offset or 0
            text = pformat(values[name.id], width=88, compact=True).replace("'", '"')
            first = f"{name.id} = "
            text = text.replace("\n", "\n" + " " * len(first))
            lines[node.lineno - 1 : end + 1] = [first + text + lines[end][after:]]
    return "\n".join(lines)


def show_run(app: Sphinx, docname: str, source: list[str]) -> None:
    """Append the backbone to the notebook's first heading, and join its parameters."""
    if not docname.startswith(EXECUTED):
        return
    notebook = json.loads(source[0])
    parameters = notebook["metadata"].get("papermill", {}).get("parameters", {})
    cells = notebook["cells"]
    if backbone := parameters.get("backbone"):
        heading = next(cell for cell in cells if "".join(cell["source"]).startswith("# "))
        lines = "".join(heading["source"]).split("\n")
        lines[0] += f" on {LABELS.get(backbone, backbone)}"
        heading["source"] = "\n".join(lines)
    for cell in cells:
        if "parameters" in cell["metadata"].get("tags", ()):
            cell["source"] = effective("".join(cell["source"]), parameters)
    injected = "injected-parameters"
    notebook["cells"] = [c for c in cells if injected not in c["metadata"].get("tags", ())]
    source[0] = json.dumps(notebook)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension with Sphinx."""
    app.connect("source-read", show_run)
    return {"version": "1.0", "parallel_read_safe": True, "parallel_write_safe": True}
