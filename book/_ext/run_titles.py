"""Sphinx extension: name the backbone in the title of an executed notebook.

One notebook is rendered once a backbone. Without this, both pages would bear the same title in the
browser's tab, in search results and in the links to the previous and the next page.
"""

import json
from typing import Any

from sphinx.application import Sphinx

EXECUTED = "book/executed/"
LABELS = {"efficientnet_lite0": "EfficientNet-Lite0", "vit_small_saliency": "ViT-S/14"}


def name_backbone(app: Sphinx, docname: str, source: list[str]) -> None:
    """Append the backbone, as papermill recorded it, to the notebook's first heading."""
    if not docname.startswith(EXECUTED):
        return
    notebook = json.loads(source[0])
    parameters = notebook["metadata"].get("papermill", {}).get("parameters", {})
    backbone = parameters.get("backbone")
    if backbone is None:
        return
    for cell in notebook["cells"]:
        lines = "".join(cell["source"]).split("\n")
        if cell["cell_type"] == "markdown" and lines[0].startswith("# "):
            lines[0] += f" on {LABELS.get(backbone, backbone)}"
            cell["source"] = "\n".join(lines)
            source[0] = json.dumps(notebook)
            return


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension with Sphinx."""
    app.connect("source-read", name_backbone)
    return {"version": "1.0", "parallel_read_safe": True, "parallel_write_safe": True}
