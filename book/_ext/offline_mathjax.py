"""Sphinx extension: serve the formulae from the book itself.

The package ``sphinx-mathjax-offline`` ships all of MathJax 3.2.2, 24 MB. Only the parts that turn
TeX into HTML, and their fonts, are copied into the book.
"""

from importlib.util import find_spec
from pathlib import Path
from shutil import copy2
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

SCRIPTS = (
    "startup.js",
    "core.js",
    "input/tex.js",
    "output/chtml.js",
    "output/chtml/fonts/tex.js",
    "a11y/assistive-mml.js",
)
FONTS = "output/chtml/fonts/woff-v2"


def mathjax_folder() -> Path:
    """Return the folder of the installed MathJax.

    Raises:
        ExtensionError: if the package that ships it is not installed.
    """
    # The import name holds hyphens, so that only the import machinery can find the package.
    spec = find_spec("sphinx-mathjax-offline")
    if spec is None or spec.origin is None:
        raise ExtensionError(
            "the package sphinx-mathjax-offline is not installed: the formulae would not render"
        )
    return Path(spec.origin).parent / "static" / "mathjax"


def copy_mathjax(app: Sphinx, exception: Exception | None) -> None:
    """Copy the needed part of MathJax to ``_static/mathjax`` of the finished book."""
    if exception is not None or app.builder.format != "html":
        return
    source, target = mathjax_folder(), Path(app.outdir) / "_static" / "mathjax"
    fonts = [f"{FONTS}/{path.name}" for path in sorted((source / FONTS).glob("*.woff"))]
    for name in [*SCRIPTS, *fonts]:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        copy2(source / name, target / name)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension with Sphinx."""
    app.config.mathjax_path = "mathjax/startup.js"
    app.connect("build-finished", copy_mathjax)
    return {"version": "1.0", "parallel_read_safe": True, "parallel_write_safe": True}
