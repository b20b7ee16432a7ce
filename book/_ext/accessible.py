"""Sphinx extension: mend for screen readers what the theme and docutils write."""

import re
from typing import Any

from docutils.nodes import document
from sphinx.application import Sphinx

# What Sphinx writes of a signature over several lines: definitions without a term.
PARAMETERS = re.compile(r'(?<=<span class="sig-paren">\(</span>)(\s*)<dl>(.*?)</dl>', re.S)


def name_toggles(
    app: Sphinx, pagename: str, template: str, context: dict[str, Any], page: document | None
) -> None:
    """Name each arrow of the sidebar after the page whose subpages it shows."""
    make = context.get("generate_toctree_html")
    if make is None:
        return

    def named(*positional: Any, **options: Any) -> Any:
        contents = make(*positional, **options)
        # A page without contents gets an empty text instead of a tree.
        for arrow in contents.select("summary") if contents else ():
            title = arrow.find_parent("li").find("a").get_text(strip=True)
            arrow["aria-label"] = f"Pages of {title}"
        return contents

    context["generate_toctree_html"] = named


def name_references(
    app: Sphinx, pagename: str, template: str, context: dict[str, Any], page: document | None
) -> None:
    """Make entries of a bibliography items of the list that docutils puts them in."""
    if "body" in context:
        context["body"] = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')


def list_parameters(
    app: Sphinx, pagename: str, template: str, context: dict[str, Any], page: document | None
) -> None:
    """Make the parameters of a signature that stand one a line items of a list."""

    def listed(found: re.Match[str]) -> str:
        items = found[2].replace("<dd>", '<dd role="listitem">')
        return f'{found[1]}<dl role="list">{items}</dl>'

    if "body" in context:
        context["body"] = PARAMETERS.sub(listed, context["body"])


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension with Sphinx."""
    app.connect("html-page-context", name_references)
    app.connect("html-page-context", list_parameters)
    # After the theme has put its function there.
    app.connect("html-page-context", name_toggles, priority=900)
    return {"version": "1.0", "parallel_read_safe": True, "parallel_write_safe": True}
