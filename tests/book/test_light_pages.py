"""What is left out of the theme and of figures, and what is not."""

import io
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from fontTools.ttLib import TTFont
from light_pages import characters, reduce_image, trim_font, trim_styles
from PIL import Image

USED = {"used", "here", "nav"}


@pytest.mark.parametrize(
    "rule",
    [
        "p{margin:0}",
        ".used{margin:0}",
        "#here .used>a:hover{margin:0}",
        ".used:not(.absent){margin:0}",
        "nav:is(.absent,.used) a{margin:0}",
        '.used[data-x="a,b{.absent}"]{margin:0}',
        ".tooltip-inner{margin:0}",
        ".collapsing{margin:0}",
        "@media print{.used{margin:0}}",
        "@font-face{font-family:absent}",
        "@keyframes absent{to{margin:0}}",
        '@import "absent.css";',
        ".used{background:url(\"data:image/svg+xml,%3Csvg fill='rgba(0,0,0,1)'/%3E\")}",
        "/*! licence */.used{margin:0}",
    ],
)
def test_a_rule_that_may_apply_is_kept_as_it_is(rule: str) -> None:
    assert trim_styles(rule, USED) == rule
    assert trim_styles(f"{rule}.absent{{margin:1}}", USED) == rule


@pytest.mark.parametrize(
    "rule",
    [
        ".absent{margin:0}",
        ".used.absent a{margin:0}",
        "#absent{margin:0}",
        "@media print{.absent{margin:0}}",
        "@media print{@supports (a:b){.absent{margin:0}}}",
        "/* remark */.absent{margin:0}",
    ],
)
def test_a_rule_that_cannot_apply_is_left_out(rule: str) -> None:
    assert trim_styles(rule, USED) == ""
    assert trim_styles(f"p{{a:b}}{rule}p{{c:d}}", USED) == "p{a:b}p{c:d}"
    # A licence outlives its rules.
    assert trim_styles(f"/*! licence */{rule}", USED) == "/*! licence */"


def test_of_several_selectors_those_in_use_are_kept() -> None:
    assert trim_styles(".absent,.used,p:is(a,b){margin:0}", USED) == ".used,p:is(a,b){margin:0}"


def test_a_font_keeps_only_the_characters_that_styles_name(tmp_path: Path) -> None:
    path = tmp_path / "font.ttf"
    path.write_bytes(
        (Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf").read_bytes()
    )
    before = path.stat().st_size
    # DejaVu Sans has characters in the private area too.
    codes = characters(r'.a:before{content:"\f6c5"}.b{margin:0}')
    assert codes == {0xF6C5}
    trim_font(path, codes)
    with TTFont(path) as font:
        assert set(font.getBestCmap()) == codes
    assert path.stat().st_size < before / 50


def test_a_reduced_figure_keeps_its_size_and_its_colours() -> None:
    values = np.random.default_rng(0).random((100, 100))
    colours = matplotlib.colormaps["viridis"](values)
    content = io.BytesIO()
    Image.fromarray((colours * 255).astype(np.uint8), "RGBA").save(content, "PNG")
    before = np.asarray(Image.open(content).convert("RGB"), dtype=int)
    after = Image.open(io.BytesIO(reduce_image(content.getvalue())))
    assert after.mode == "P"
    assert np.abs(np.asarray(after.convert("RGB"), dtype=int) - before).max() <= 4
