"""Checks of the rendered book, as files and in a browser.

``PAI_SITE`` names the folder of the rendered pages (default ``_build/html``). Without one the
checks are skipped, or fail where ``PAI_REQUIRE_SITE`` is set; the browser's are skipped without
Chromium, or fail where ``PAI_REQUIRE_BROWSER`` is set.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from bs4 import BeautifulSoup
from cells import problems
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

ROOT = Path(__file__).parents[2]
SITE = Path(os.environ.get("PAI_SITE") or ROOT / "_build" / "html").resolve()
MAX_PAGE_BYTES = 1_500_000
MAX_BOOK_BYTES = 30_000_000
WIDTHS = (1280, 390)
SCHEMES = ("light", "dark")
VIEWS = [(width, scheme) for width in WIDTHS for scheme in SCHEMES]
AXE_VIEWS = [(1280, "light"), (390, "dark")]
# One page of each kind, for the checks of axe, which take seconds a page.
KINDS = {
    "start": "book/index",
    "chapter": "book/experiments/repair",
    "notebook": "book/executed/prune_per_task-vit_small_saliency",
    "reference": "book/api/masks",
    "explorer": "book/experiments/explorer",
}
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
GENERIC_ALT = {"image", "figure", "plot", "graph", "chart", "picture", "img", "png", "svg", "alt"}


def toc_pages() -> list[str]:
    """Return the pages of the table of contents, in order."""

    def walk(entry: Any) -> Iterator[str]:
        if isinstance(entry, dict):
            yield from (entry[key] for key in ("root", "file") if key in entry)
            for value in entry.values():
                yield from walk(value)
        elif isinstance(entry, list):
            for item in entry:
                yield from walk(item)

    return list(walk(yaml.safe_load((ROOT / "_toc.yml").read_text("utf-8"))))


PAGES = toc_pages()
NOTEBOOKS = [page for page in PAGES if page.startswith("book/executed/")]
OF_BACKBONES = [page for page in NOTEBOOKS if "-" in Path(page).name]  # others load none


@cache
def parse(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text("utf-8"), "html.parser")


@cache
def anchors(path: Path) -> set[str]:
    """Return what a link can point at within a page."""
    tags = parse(path).find_all(True)
    return {str(tag[key]) for tag in tags for key in ("id", "name") if tag.has_attr(key)}


@pytest.fixture(scope="session")
def site() -> Path:
    if not SITE.is_dir():
        advice = f"no rendered book at {SITE}: run `make book`, or set PAI_SITE to one"
        if os.environ.get("PAI_REQUIRE_SITE"):
            pytest.fail(advice)
        pytest.skip(advice)
    return SITE


@pytest.fixture
def soup(site: Path, page: str) -> BeautifulSoup:
    return parse(site / f"{page}.html")


def test_every_page_of_the_table_of_contents_is_rendered(site: Path) -> None:
    assert [page for page in PAGES if not (site / f"{page}.html").is_file()] == []


def test_the_start_page_leads_to_the_book(site: Path) -> None:
    assert f"url={PAGES[0]}.html" in (site / "index.html").read_text("utf-8")


def test_the_contents_hold_both_backbones_of_every_notebook() -> None:
    pairs = {tuple(Path(page).name.split("-", 1)) for page in OF_BACKBONES}
    notebooks = {name for name, _ in pairs}
    backbones = {backbone for _, backbone in pairs}
    assert pairs == {(name, backbone) for name in notebooks for backbone in backbones}
    assert len(pairs) == len(OF_BACKBONES) == 12


@pytest.mark.parametrize("page", NOTEBOOKS)
def test_an_executed_notebook_ran_to_its_end_without_error(site: Path, page: str) -> None:
    assert problems(site / "_sources" / f"{page}.ipynb") == []


@pytest.mark.parametrize("page", OF_BACKBONES)
def test_an_executed_notebook_names_its_backbone_in_the_title(soup: BeautifulSoup) -> None:
    heading = soup.select_one("article h1")
    assert heading is not None
    assert re.search(r" on \S+", heading.get_text())


@pytest.mark.parametrize("page", OF_BACKBONES)
def test_an_executed_notebook_shows_the_parameters_of_its_run_once(
    site: Path, soup: BeautifulSoup, page: str
) -> None:
    notebook = json.loads((site / "_sources" / f"{page}.ipynb").read_text("utf-8"))
    used = notebook["metadata"]["papermill"]["parameters"]
    shown = [cell.get_text() for cell in soup.select("article div.highlight")]
    assert sum("\nbackbone = " in f"\n{code}" for code in shown) == 1
    assert f'backbone = "{used["backbone"]}"' in shown[0]
    for name in ("test_size", "seed"):
        assert f"\n{name} = {used.get(name, 0)}" in shown[0]


@pytest.mark.parametrize("page", PAGES)
def test_every_image_has_an_alternative_text_that_says_something(soup: BeautifulSoup) -> None:
    poor = []
    for image in soup.select("article img, .sidebar-primary__section img"):
        alt = str(image.get("alt") or "").strip()
        words = re.findall(r"\w+", alt.lower())
        is_file_name = re.search(r"\.(png|svg|jpe?g|gif)$", alt.lower())
        if len(set(words) - GENERIC_ALT) < 3 or is_file_name or alt.startswith("<"):
            poor.append((image.get("src"), alt))
    assert poor == []


@pytest.mark.parametrize("page", PAGES)
def test_all_links_inside_the_book_lead_somewhere(site: Path, page: str) -> None:
    source = site / f"{page}.html"
    dead = []
    for link in parse(source).find_all("a", href=True):
        address = urlsplit(str(link["href"]))
        if address.scheme or address.netloc:
            continue
        target = (source.parent / unquote(address.path)).resolve() if address.path else source
        anchor = unquote(address.fragment)
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            dead.append(link["href"])
    assert dead == []


def test_without_an_address_of_the_repository_no_button_leads_out_of_the_book(site: Path) -> None:
    config = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))
    if config["sphinx"]["config"]["html_theme_options"].get("repository_url"):
        pytest.skip("the book has an address")
    (header,) = parse(site / f"{KINDS['notebook']}.html").select(".article-header-buttons")
    addresses = {a.get_text(strip=True): str(a["href"]) for a in header.select("a[href]")}
    assert {text: a for text, a in addresses.items() if urlsplit(a).netloc} == {}
    assert "How to" not in addresses


def test_no_style_sheet_loads_from_outside_the_book(site: Path) -> None:
    sheets = list((site / "_static").rglob("*.css"))
    assert sheets
    loads = re.compile(r"(?:url\(|@import)\s*['\"]?((?:https?:)?//[^'\")]+)")
    found = {sheet.name: loads.findall(sheet.read_text("utf-8")) for sheet in sheets}
    assert {name: addresses for name, addresses in found.items() if addresses} == {}


def test_the_book_weighs_less_than_the_limit(site: Path) -> None:
    assert sum(path.stat().st_size for path in site.rglob("*") if path.is_file()) < MAX_BOOK_BYTES


def test_the_links_to_the_next_page_go_through_the_whole_book(site: Path) -> None:
    order, page = [PAGES[0]], site / f"{PAGES[0]}.html"
    while link := parse(page).select_one("link[rel=next]"):
        page = (page.parent / str(link["href"])).resolve()
        order.append(str(page.relative_to(site).with_suffix("")))
    assert order == PAGES


def test_only_the_used_part_of_mathjax_is_shipped(site: Path) -> None:
    files = [path for path in (site / "_static" / "mathjax").rglob("*") if path.is_file()]
    assert any(path.suffix == ".woff" for path in files)
    assert sum(path.stat().st_size for path in files) < 1_500_000


@pytest.fixture(scope="session")
def browser(site: Path) -> Iterator[Browser]:
    executable = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if executable is None:
        advice = f"no Chromium found (looked for {', '.join(CHROMIUM_NAMES)})"
        if os.environ.get("PAI_REQUIRE_BROWSER"):
            pytest.fail(advice)
        pytest.skip(f"{advice}: the pages are not opened in a browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(CHROMIUM_FLAGS))
        yield browser
        browser.close()


class OpenTab(Protocol):
    """Open a page of the book from disk, without a network."""

    def __call__(self, page: str, width: int = ..., visit: Visit | None = ...) -> Page: ...


@dataclass
class Visit:
    """What a browser showed and did while a page of the book was open from disk."""

    errors: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    loaded: set[Path] = field(default_factory=set)
    content: dict[str, Any] = field(default_factory=dict)
    views: dict[str, dict[str, Any]] = field(default_factory=dict)  #: by width and scheme
    violations: dict[str, list[str]] = field(default_factory=dict)  #: axe's, by width and scheme

    def watch(self, page: Page) -> None:
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", self._on_request)
        page.on("requestfailed", self._failed)

    def _failed(self, request: Request) -> None:
        if request.failure != "net::ERR_ABORTED":  # by leaving a page that still loads its icon
            self.missing.append(request.url)

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(message.text)

    def _on_request(self, request: Request) -> None:
        if request.url.startswith("file:"):
            self.loaded.add(Path(unquote(urlsplit(request.url).path)))
        elif not request.url.startswith(("data:", "blob:")):
            self.outside.append(request.url)


CONTENT = """async () => {
    // MathJax that does not start never settles its promise: look at the page all the same.
    const patience = new Promise((resolve) => setTimeout(resolve, 15000));
    await Promise.race([window.MathJax?.startup?.promise, patience]);
    await document.fonts.ready;
    const article = document.querySelector("article").cloneNode(true);
    const count = (selector) => article.querySelectorAll(selector).length;
    const [formulae, typeset, failed] = [".math", "mjx-container", "mjx-merror"].map(count);
    article.querySelectorAll("pre, code, mjx-container, script").forEach((e) => e.remove());
    return {
        broken: [...document.images].filter((i) => i.complete && !i.naturalWidth).map((i) => i.src),
        formulae, typeset, failed, text: article.textContent,
    };
}"""

# What is wider than the page, and text whose contrast with its ground is below level AA of WCAG 2.
# Of text that looks alike, on the same ground, one piece stands for all.
LOOK = """(scheme) => {
    document.documentElement.dataset.theme = scheme;
    // Colours fade: look at what they come to.
    document.getAnimations().forEach((a) => a instanceof CSSTransition && a.finish());
    const scrolls = (element) => {
        for (let e = element; e.tagName !== "ARTICLE"; e = e.parentElement)
            if (getComputedStyle(e).overflowX !== "visible") return true;
        return false;
    };
    const cutOff = [...document.querySelectorAll("article *")].filter((element) => {
        const box = element.getBoundingClientRect();
        return box.width && box.right > innerWidth + 1 && !scrolls(element);
    });
    const read = (colour) => {
        const [r, g, b, alpha = 1] = colour.match(/[\\d.]+(?:e-?\\d+)?/g).map(Number);
        const scale = colour.startsWith("color(") ? 255 : 1;
        return [r * scale, g * scale, b * scale, alpha];
    };
    const over = ([r, g, b, a], below) => [r, g, b].map((v, i) => v * a + below[i] * (1 - a));
    const ground = (e) => {
        if (!e) return [255, 255, 255];
        const colour = read(getComputedStyle(e).backgroundColor);
        return colour[3] === 1 ? colour.slice(0, 3) : over(colour, ground(e.parentElement));
    };
    const luminance = (colour) => {
        const [r, g, b] = colour.map((v) => v / 255).map(
            (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const holdsText = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    const seen = new Set(), faint = [];
    for (const e of document.body.querySelectorAll("*")) {
        if (!holdsText(e) || e.matches("script, style, :disabled")) continue;
        if (!e.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
        const { color, fontSize, fontWeight } = getComputedStyle(e), below = ground(e);
        const look = [color, fontSize, fontWeight, below].join();
        if (seen.has(look)) continue;
        seen.add(look);
        const [one, other] = [over(read(color), below), below].map((c) => luminance(c) + 0.05);
        const ratio = Math.max(one / other, other / one), size = parseFloat(fontSize);
        const large = size >= 24 || (size >= 18.66 && fontWeight >= 700);
        if (ratio < (large ? 3 : 4.5)) faint.push(`${ratio}: ${e.outerHTML.slice(0, 120)}`);
    }
    return {
        overflow: document.documentElement.scrollWidth - innerWidth,
        cutOff: cutOff.map((e) => e.outerHTML.slice(0, 120)),
        faint,
    };
}"""

ACCESSIBILITY = """async () => {
    const options = { resultTypes: ["violations"], preload: false };
    const { violations } = await axe.run(document, options);
    return violations.filter(({ impact }) => ["serious", "critical"].includes(impact)).flatMap(
        ({ id, nodes }) => nodes.map(({ html }) => `${id}: ${html.slice(0, 200)}`));
}"""


@pytest.fixture(scope="session")
def axe() -> str:
    """The script of axe-core, which a package of the extra `test` ships."""
    return (files("axe_playwright_python") / "axe.min.js").read_text("utf-8")


@pytest.fixture(scope="session")
def open_tab(site: Path, browser: Browser) -> OpenTab:
    def open_tab(page: str, width: int = WIDTHS[0], visit: Visit | None = None) -> Page:
        # Offline, a request that leaves the page fails at once instead of holding the page up.
        tab = browser.new_page(offline=True, viewport={"width": width, "height": 844})
        (visit or Visit()).watch(tab)
        tab.goto((site / f"{page}.html").as_uri())
        return tab

    return open_tab


@pytest.fixture(scope="session")
def visit(open_tab: OpenTab, axe: str) -> Callable[[str], Visit]:
    """Open each page once, in every view; the tests look at what was seen."""

    @cache
    def visit(page: str) -> Visit:
        visit = Visit()
        tab = open_tab(page, visit=visit)
        visit.content = tab.evaluate(CONTENT)
        for width, scheme in VIEWS:
            tab.set_viewport_size({"width": width, "height": 844})
            visit.views[f"{width}, {scheme}"] = tab.evaluate(LOOK, scheme)
            if page in KINDS.values() and (width, scheme) in AXE_VIEWS:
                tab.wait_for_timeout(500)  # the theme marks what scrolls some time after a resize
                tab.evaluate(axe)
                visit.violations[f"{width}, {scheme}"] = tab.evaluate(ACCESSIBILITY)
        tab.close()
        return visit

    return visit


Open = Callable[[str], Visit]
every_page = pytest.mark.parametrize("page", PAGES)


@every_page
def test_a_page_opens_without_a_console_error(page: str, visit: Open) -> None:
    assert visit(page).errors == []


@every_page
def test_no_request_leaves_a_page_opened_from_disk(page: str, visit: Open) -> None:
    assert visit(page).outside == []
    assert visit(page).missing == []
    assert visit(page).content["broken"] == []


@every_page
def test_a_page_does_not_scroll_sideways(page: str, visit: Open) -> None:
    for view, seen in visit(page).views.items():
        assert seen["overflow"] <= 1, view
        assert seen["cutOff"] == [], f"wider than the page, in no box that scrolls: {view}"


@every_page
def test_text_stands_out_from_its_ground(page: str, visit: Open) -> None:
    assert {view: seen["faint"] for view, seen in visit(page).views.items() if seen["faint"]} == {}


@every_page
def test_the_formulae_of_a_page_are_typeset(page: str, visit: Open) -> None:
    content = visit(page).content
    assert content["typeset"] >= content["formulae"]
    assert content["failed"] == 0
    assert not re.search(r"\\[(\[]|\$\$|\\(?:frac|mathbb|theta)", content["text"])


@every_page
def test_all_that_a_page_loads_weighs_less_than_the_limit(page: str, visit: Open) -> None:
    loaded = visit(page).loaded
    assert any(path.suffix == ".css" for path in loaded)
    assert sum(path.stat().st_size for path in loaded) < MAX_PAGE_BYTES


def test_the_theory_page_holds_formulae(visit: Open) -> None:
    assert visit("book/theory").content["typeset"] > 50


@pytest.mark.parametrize("page", KINDS.values(), ids=list(KINDS))
def test_axe_finds_no_serious_violation(page: str, visit: Open) -> None:
    assert visit(page).violations == {f"{width}, {scheme}": [] for width, scheme in AXE_VIEWS}


def test_what_is_too_wide_or_too_faint_is_seen(open_tab: OpenTab) -> None:
    tab = open_tab(PAGES[0])
    tab.evaluate(
        """() => {
            const last = document.querySelector("article p");
            last.style.cssText = "color: rgba(0, 0, 0, 0.4); width: 2000px";
        }"""
    )
    seen = tab.evaluate(LOOK, "light")
    tab.close()
    assert seen["overflow"] > 1
    assert len(seen["cutOff"]) >= 1
    assert len(seen["faint"]) >= 1


@pytest.mark.parametrize("width", WIDTHS)
def test_a_search_by_keyboard_finds_the_page_that_explains_a_word(
    width: int, open_tab: OpenTab, axe: str
) -> None:
    visit = Visit()
    tab = open_tab(PAGES[0], width, visit)
    tab.keyboard.press("Control+K")
    tab.keyboard.type("saliency")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#search-results li a", timeout=10_000)
    found = tab.eval_on_selector_all("#search-results li a", "links => links.map((a) => a.href)")
    looks = [tab.evaluate(LOOK, scheme) for scheme in SCHEMES]
    tab.evaluate(axe)
    violations = tab.evaluate(ACCESSIBILITY)
    tab.close()
    assert any("/book/theory.html" in address for address in found)
    assert [(look["overflow"] > 1, look["faint"]) for look in looks] == [(False, [])] * 2
    assert violations == []
    assert (visit.errors, visit.outside, visit.missing) == ([], [], [])


@pytest.mark.parametrize("width", WIDTHS)
def test_the_contents_lead_to_a_page(width: int, open_tab: OpenTab) -> None:
    tab = open_tab(PAGES[0], width)
    link = tab.locator("nav.bd-links a", has_text="Protocol").first
    if not link.is_visible():
        assert width == min(WIDTHS), "a wide window shows the contents at once"
        tab.locator(".primary-toggle").first.click()
    link.click()
    tab.wait_for_url("**/protocol.html")
    tab.close()


def test_the_switch_changes_the_colours_and_the_next_page_keeps_them(
    site: Path, open_tab: OpenTab
) -> None:
    tab = open_tab(PAGES[0])
    seen = []
    for _ in range(3):
        tab.locator(".theme-switch-button").first.click()
        seen.append(tab.evaluate("document.documentElement.dataset.theme"))
    tab.goto((site / f"{PAGES[1]}.html").as_uri())
    kept = tab.evaluate("document.documentElement.dataset.theme")
    tab.close()
    assert set(seen) == set(SCHEMES)
    assert kept == seen[-1]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_explorer_shows_what_the_keyboard_chooses(width: int, open_tab: OpenTab) -> None:
    visit = Visit()
    tab = open_tab("book/experiments/explorer", width, visit)
    before = tab.inner_text("#explorer-status")
    tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")  # the link over the navigation
    for _ in range(40):
        tab.keyboard.press("Tab")
        if tab.evaluate("document.activeElement.name") == "scorer":
            break
    tab.keyboard.press("ArrowDown")
    assert tab.inner_text("#explorer-status") != before
    choice = tab.evaluate(
        "() => Object.fromEntries(new FormData(document.getElementById('explorer-form')))"
    )
    assert tab.locator("#explorer-panels svg[role=img][aria-label]").count() > 0
    shown = table_of(tab)
    assert shown == measured(tab.text_content("#explorer-data") or "", choice)
    looks = [tab.evaluate(LOOK, scheme) for scheme in SCHEMES]
    assert [(look["overflow"] > 1, look["faint"]) for look in looks] == [(False, [])] * 2
    # The address holds the choice.
    tab.goto(tab.url)
    tab.reload()
    assert table_of(tab) == shown
    tab.close()
    assert (visit.errors, visit.outside, visit.missing) == ([], [], [])


def table_of(tab: Page) -> list[list[str]]:
    """Return the texts of the explorer's table, row by row, without what is read off a line."""
    cells = "rows => rows.map((row) => [...row.cells].slice(0, -1).map((cell) => cell.textContent))"
    return list(tab.eval_on_selector_all("#explorer-table tbody tr", cells))


def measured(data: str, choice: dict[str, str]) -> list[list[str]]:
    """Return the rows that the explorer's table must hold: the chosen masks, then those beside."""
    rows = [
        row
        for row in csv.DictReader(data.strip().splitlines())
        if row["backbone"] == choice["backbone"]
        and "-".join(filter(None, (row["grid"], row["variant"]))) == choice["run"]
        and row["source"] in (choice["source"], "none")
    ]
    own = {row["target"] for row in rows if row["source"] != "none" and row["task"] == "own"}

    def method(scorer: str, repair: str) -> str:
        return scorer if repair == "none" else f"{scorer} + {repair}"

    return [
        [
            row["target"], "own" if row["target"] in own else "held-out",
            method(row["scorer"], row["repair"]), row["sparsity"], row["retention"],
            f"{row['low']} to {row['high']}", row["count"], row["seeds"],
        ]
        for shown in (method(choice["scorer"], choice["repair"]), choice["beside"])
        for row in rows
        if method(row["scorer"], row["repair"]) == shown
    ]  # fmt: skip
