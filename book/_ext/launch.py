"""Sphinx extension: buttons that open a page's notebook in Binder or Colab.

The theme makes them from the address of the published repository, the option `repository_url` of
`_config.yml`, and fails without one; then there are none. It takes the page's own file, an executed
copy that is not in the repository: here its buttons lead to the notebook that the copy was made
from, with the parameters on top.
"""

from pathlib import PurePosixPath
from typing import Any

from docutils.nodes import document
from sphinx.application import Sphinx
from sphinx.config import Config

EXECUTED = "book/executed/"
BUTTONS = "launch-buttons"


def choose_buttons(app: Sphinx, config: Config) -> None:
    """Turn off the buttons for which there is no address, or one that they do not serve."""
    options = config.html_theme_options
    address = options.get("repository_url")
    options["use_repository_button"] = bool(address)
    if not address:
        options["launch_buttons"] = {}
    elif "://github.com/" not in address:
        options["launch_buttons"].pop("colab_url", None)


def lead_to_the_notebook(
    app: Sphinx, pagename: str, template: str, context: dict[str, Any], page: document | None
) -> None:
    """Let the launch buttons of an executed copy open its notebook, and say what to do there."""
    if not pagename.startswith(EXECUTED):
        return
    notebook = f"notebooks/{PurePosixPath(pagename).name.split('-', 1)[0]}.ipynb"
    for group in context.get("header_buttons", []):
        if group.get("label") != BUTTONS:
            continue
        for button in group["buttons"]:
            button["url"] = button["url"].replace(f"{pagename}.ipynb", notebook)
        group["buttons"].append(
            {
                "type": "link",
                "text": "How to",
                "tooltip": "What to do in Binder and Colab",
                "icon": "fas fa-circle-question",
                "url": f"{context['pathto']('book/rerun')}#in-the-browser",
            }
        )


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension with Sphinx."""
    app.connect("config-inited", choose_buttons)
    # After the theme has made its buttons.
    app.connect("html-page-context", lead_to_the_notebook, priority=900)
    return {"version": "1.0", "parallel_read_safe": True, "parallel_write_safe": True}
