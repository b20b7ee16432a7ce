"""Sphinx extension: ship of the theme and of the figures only what the pages need.

The theme brings all of Font Awesome, as a script and as fonts, all of Bootstrap's styles, and
source maps of all: 7 MB, of which every page would load 2 MB. Here icons are characters of a font
that holds the ones in use, styles that no page names are left out, and so are the source maps.
Figures keep their size in pixels, with a palette of 256 colours.
"""

import hashlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fontTools import subset
from PIL import Image
from sphinx.application import Sphinx

ICON_SCRIPT = "scripts/fontawesome.js"
ICON_FONTS = "vendor/fontawesome/webfonts"
COMPRESSED_FONT = re.compile(r"url\([^()]*\.woff2\) ?format\(.woff2.\),?")
# Bootstrap's scripts put these class names together from parts.
COMPOSED = re.compile(r"(bs|tooltip|popover|dropdown|collaps|modal)(-|$|ed|ing)")
BLOCK = re.compile(r"""/\*.*?\*/|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|url\([^"')]*\)|[{};]""", re.S)


def words(folder: Path) -> set[str]:
    """Return every word of the pages and of the scripts, and so all names of classes among them."""
    files = [*folder.rglob("*.html"), *folder.rglob("*.js")]
    texts = (path.read_text("utf-8") for path in files)
    return {word for text in texts for word in re.findall(r"[A-Za-z][\w-]*", text)}


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


def characters(styles: str) -> set[int]:
    """Return the icons that a style sheet names by their code, from Unicode's private area."""
    return {int(code, 16) for code in re.findall(r"\\([ef][0-9a-f]{3})\b", styles)}


def trim_font(path: Path, kept: set[int]) -> None:
    """Leave only some characters in a font."""
    options = subset.Options()
    font = subset.load_font(str(path), options)
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=kept)
    subsetter.subset(font)
    subset.save_font(font, str(path), options)
    font.close()


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
    lighten_theme(out)
    # To take a palette takes longer than to write a page: what was reduced is kept.
    kept = Path(app.doctreedir) / "images"
    kept.mkdir(exist_ok=True)
    for path in sorted((out / "_images").glob("*.png")):
        content = path.read_bytes()
        small = kept / hashlib.sha256(content).hexdigest()
        if not small.exists():
            small.write_bytes(reduce_image(content))
        path.write_bytes(small.read_bytes())


def lighten_theme(out: Path) -> None:
    """Lighten what every page loads."""
    static = out / "_static"
    for source_map in static.rglob("*.map"):
        source_map.unlink()
    # It would draw again what the styles show.
    (static / ICON_SCRIPT).write_text("", "utf-8")
    used = words(out)
    icons: set[int] = set()
    for path in static.rglob("*.css"):
        styles = COMPRESSED_FONT.sub("", trim_styles(path.read_text("utf-8"), used))
        icons |= characters(styles)
        path.write_text(styles, "utf-8")
    for font in (static / ICON_FONTS).iterdir():
        if font.suffix == ".ttf":
            trim_font(font, icons)
        else:
            font.unlink()


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension with Sphinx."""
    # Last, when every other extension has copied its files.
    app.connect("build-finished", lighten, priority=900)
    return {"version": "1.0", "parallel_read_safe": True, "parallel_write_safe": True}
