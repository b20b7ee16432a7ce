"""Sphinx extension: ship of the theme and of the figures only what the pages need.

The theme brings all of Font Awesome, all of Bootstrap's styles, and their source maps: 6 MB, of
which every page would load 2 MB. Icons and styles that no page names are left out, and so are the
source maps. Figures keep their size in pixels, with a palette of 256 colours.
"""

import hashlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from sphinx.application import Sphinx

ICONS = "scripts/fontawesome.js"
STYLES = ("styles/pydata-sphinx-theme.css", "styles/sphinx-book-theme.css")
# Bootstrap's scripts put these class names together from parts.
COMPOSED = re.compile(r"(bs|tooltip|popover|dropdown|collaps|modal)(-|$|ed|ing)")
ICON = re.compile(
    r'"?(?P<name>[\w-]+)"?:\[\d+,\d+,\[(?P<others>[^\]]*)\],"[0-9a-f]*",(?:"[^"]*"|\[[^\]]*\])\],?'
)
BLOCK = re.compile(r"""/\*.*?\*/|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|url\([^"')]*\)|[{};]""", re.S)


def words(folder: Path) -> set[str]:
    """Return every word of the pages and of the scripts, and so all names of classes among them."""
    files = [*folder.rglob("*.html"), *folder.rglob("*.js")]
    texts = (path.read_text("utf-8") for path in files if not path.match(f"*/{ICONS}"))
    return {word for text in texts for word in re.findall(r"[A-Za-z][\w-]*", text)}


def trim_icons(script: str, used: set[str]) -> str:
    """Return Font Awesome's script without the icons that no word names.

    Raises:
        ValueError: The script does not hold its icons in the form that is known.
    """
    names = {word.removeprefix("fa-") for word in used if word.startswith("fa-")}

    def keep(icon: re.Match[str]) -> str:
        others = re.findall(r"[a-z][\w-]*", icon["others"])
        return icon[0] if names.intersection([icon["name"], *others]) else ""

    trimmed, count = ICON.subn(keep, script)
    if count == 0:
        raise ValueError(f"{ICONS} holds no icons in the form that is known")
    return trimmed


def trim_styles(styles: str, used: set[str]) -> str:
    """Return a style sheet without the rules that apply to no class or id among the words used."""
    return "".join(_trimmed(styles, used))


def _trimmed(styles: str, used: set[str]) -> Iterator[str]:
    for opening, body in _blocks(styles):
        comments, head = "".join(re.findall(r"/\*!.*?\*/", opening, re.S)), _bare(opening)
        if body is None or re.match(r"@(?!media|supports|layer|container)", head):
            yield comments + head + ("" if body is None else f"{{{body}}}")
            continue
        if head.startswith("@"):
            kept, inner = head, trim_styles(body, used)
        else:
            kept = ",".join(one for one in _alternatives(head) if _applies(one, used))
            inner = body
        yield comments + (f"{kept}{{{inner}}}" if kept and inner else "")


def _bare(text: str) -> str:
    return re.sub(r"/\*.*?\*/", "", text, flags=re.S).strip()


def _blocks(styles: str) -> Iterator[tuple[str, str | None]]:
    """Yield what stands before each outermost pair of braces, and within; None for a statement."""
    depth = start = brace = 0
    for token in BLOCK.finditer(styles):
        if token[0] == "{":
            if depth == 0:
                brace = token.start()
            depth += 1
        elif token[0] == "}":
            depth -= 1
            if depth == 0:
                yield styles[start:brace], styles[brace + 1 : token.start()]
                start = token.end()
        elif token[0] == ";" and depth == 0:
            yield styles[start : token.end()], None
            start = token.end()


def _alternatives(selectors: str) -> list[str]:
    """Split at the commas that no bracket holds."""
    return re.findall(r"(?:[^,(\[]|\((?:[^()]|\([^()]*\))*\)|\[[^\]]*\])+", selectors)


def _applies(selector: str, used: set[str]) -> bool:
    # What a negation or a choice in brackets names need not be there.
    outside = re.sub(r"\((?:[^()]|\([^()]*\))*\)|\[[^\]]*\]", "", selector)
    names = re.findall(r"[.#]([A-Za-z_-][\w-]*)", outside)
    return "\\" in outside or all(name in used or COMPOSED.match(name) for name in names)


def reduce_image(content: bytes) -> bytes:
    """Return a PNG with a palette, or the one given where that is smaller or partly transparent."""
    image = Image.open(io.BytesIO(content))
    if image.mode not in ("RGB", "RGBA"):
        return content
    if image.mode == "RGBA" and image.getchannel("A").getextrema() != (255, 255):
        return content
    reduced = io.BytesIO()
    flat = image.convert("RGB")
    flat.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(reduced, "PNG")
    return min(content, reduced.getvalue(), key=len)


def lighten(app: Sphinx, exception: Exception | None) -> None:
    """Lighten the finished book."""
    if exception is not None or app.builder.format != "html":
        return
    out = Path(app.outdir)
    static = out / "_static"
    for source_map in static.rglob("*.map"):
        source_map.unlink()
    used = words(out)
    for name in (ICONS, *STYLES):
        path = static / name
        trim = trim_icons if name == ICONS else trim_styles
        path.write_text(trim(path.read_text("utf-8"), used), "utf-8")
    # To take a palette takes longer than to write a page: what was reduced is kept.
    kept = Path(app.doctreedir) / "images"
    kept.mkdir(exist_ok=True)
    for path in sorted((out / "_images").glob("*.png")):
        content = path.read_bytes()
        small = kept / hashlib.sha256(content).hexdigest()
        if not small.exists():
            small.write_bytes(reduce_image(content))
        path.write_bytes(small.read_bytes())


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension with Sphinx."""
    # Last, when every other extension has copied its files.
    app.connect("build-finished", lighten, priority=900)
    return {"version": "1.0", "parallel_read_safe": True, "parallel_write_safe": True}
