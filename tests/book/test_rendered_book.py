"""Checks of the rendered book, as files and in a browser.

``PAI_SITE`` names the folder of the rendered pages (default ``_build/html``). Without one the
checks are skipped, or fail where ``PAI_REQUIRE_SITE`` is set; the browser's are skipped without
Chromium, or fail where ``PAI_REQUIRE_BROWSER`` is set.
"""

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
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from bs4 import BeautifulSoup, Tag
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

ROOT = Path(__file__).parents[2]
SITE = Path(os.environ.get("PAI_SITE") or ROOT / "_build" / "html").resolve()
MAX_PAGE_BYTES = 1_500_000
MAX_BOOK_BYTES = 30_000_000
WIDTHS = (1280, 390)
SCHEMES = ("light", "dark")
View = tuple[int, str]
VIEWS = [(width, scheme) for width in WIDTHS for scheme in SCHEMES]
# Whether axe looks at contrast, and at the rest. Contrast takes most of the time, and colours are
# the same at every width; all else is the same in both schemes.
AXE_VIEWS = {
    (1280, "light"): (True, True),
    (1280, "dark"): (True, False),
    (390, "light"): (False, True),
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
LOADED = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "embed": "src",
    "source": "src",
    "audio": "src",
    "video": "src",
    "object": "data",
}
LOADED_LINKS = {"stylesheet", "icon", "preload", "modulepreload", "prefetch", "manifest"}
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


def is_external(address: str) -> bool:
    parts = urlsplit(address)
    return bool(parts.netloc) or parts.scheme in ("http", "https", "ftp")


@pytest.mark.parametrize("page", PAGES)
def test_every_page_of_the_table_of_contents_is_rendered(site: Path, page: str) -> None:
    assert (site / f"{page}.html").is_file()


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
    notebook = json.loads((site / "_sources" / f"{page}.ipynb").read_text("utf-8"))
    assert notebook["metadata"]["papermill"].get("exception") is None
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert [output["ename"] for output in outputs if output["output_type"] == "error"] == []
    not_run = [
        cell["source"] for cell in cells if "".join(cell["source"]) and not cell["execution_count"]
    ]
    assert not_run == []


@pytest.mark.parametrize("page", OF_BACKBONES)
def test_an_executed_notebook_names_its_backbone_in_the_title(soup: BeautifulSoup) -> None:
    heading = soup.select_one("article h1")
    assert heading is not None
    assert re.search(r" on \S+", heading.get_text())


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


@pytest.mark.parametrize("page", [*PAGES, "search", "genindex"])
def test_a_page_names_no_resource_outside_the_book(soup: BeautifulSoup) -> None:
    addresses = [
        str(tag[attribute])
        for name, attribute in LOADED.items()
        for tag in soup.find_all(name)
        if isinstance(tag, Tag) and tag.has_attr(attribute)
    ]
    for link in soup.find_all("link", href=True):
        if LOADED_LINKS.intersection(link.get_attribute_list("rel")):
            addresses.append(str(link["href"]))
    for style in soup.find_all("style"):
        addresses += re.findall(r"url\(['\"]?([^'\")]+)", style.get_text())
    assert [address for address in addresses if is_external(address)] == []


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


@dataclass
class Visit:
    """What a browser showed and did while a page of the book was opened from disk."""

    errors: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    loaded: set[Path] = field(default_factory=set)
    seen: dict[str, Any] = field(default_factory=dict)

    def watch(self, page: Page) -> None:
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", self._on_request)
        page.on("requestfailed", lambda request: self.missing.append(request.url))

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(message.text)

    def _on_request(self, request: Request) -> None:
        if request.url.startswith("file:"):
            self.loaded.add(Path(unquote(urlsplit(request.url).path)))
        elif not request.url.startswith(("data:", "blob:")):
            self.outside.append(request.url)


LOOK = """async () => {
    // MathJax that does not start never settles its promise: look at the page all the same.
    const patience = new Promise((resolve) => setTimeout(resolve, 15000));
    await Promise.race([window.MathJax?.startup?.promise, patience]);
    await document.fonts.ready;
    // Buttons fade to the colours of the dark scheme: look at what they come to.
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
    const article = document.querySelector("article").cloneNode(true);
    const count = (selector) => article.querySelectorAll(selector).length;
    const [formulae, typeset, failed] = [".math", "mjx-container", "mjx-merror"].map(count);
    article.querySelectorAll("pre, code, mjx-container, script").forEach((e) => e.remove());
    return {
        overflow: document.documentElement.scrollWidth - innerWidth,
        cutOff: cutOff.map((e) => e.outerHTML.slice(0, 120)),
        broken: [...document.images].filter((i) => i.complete && !i.naturalWidth).map((i) => i.src),
        formulae, typeset, failed, text: article.textContent,
    };
}"""


# Of text that looks alike, on the same ground, one piece stands for all: contrast is slow to see.
ACCESSIBILITY = """async ([contrast, structure]) => {
    const ground = (element) => {
        const colour = getComputedStyle(element).backgroundColor;
        const clear = colour === "rgba(0, 0, 0, 0)" && element.parentElement;
        return clear ? ground(element.parentElement) : colour;
    };
    const holdsText = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    const alike = new Map();
    for (const element of document.body.querySelectorAll("*")) {
        if (!element.getClientRects().length || !holdsText(element)) continue;
        const { color, fontSize, fontWeight, opacity } = getComputedStyle(element);
        const look = [color, fontSize, fontWeight, opacity, ground(element)].join();
        if (!alike.has(look)) alike.set(look, element);
    }
    const options = { resultTypes: ["violations"], preload: false };
    const found = [];
    if (contrast) {
        const shown = { include: [...alike.values()] };
        found.push(await axe.run(shown, { ...options, runOnly: ["color-contrast"] }));
    }
    if (structure) {
        const rules = { "color-contrast": { enabled: false } };
        found.push(await axe.run(document, { ...options, rules }));
    }
    const violations = found.flatMap((results) => results.violations);
    return violations.filter(({ impact }) => ["serious", "critical"].includes(impact)).flatMap(
        ({ id, nodes }) => nodes.map(({ html }) => `${id}: ${html.slice(0, 200)}`));
}"""


@pytest.fixture(scope="session")
def axe() -> str:
    """The script of axe-core, which a package of the extra `test` ships."""
    return (files("axe_playwright_python") / "axe.min.js").read_text("utf-8")


@pytest.fixture(scope="session")
def visit(site: Path, browser: Browser, axe: str) -> Iterator[Callable[[str, View], Visit]]:
    """Open each page once per view; the tests look at what was seen."""
    contexts = {}
    for width, scheme in VIEWS:
        # Offline, a request that leaves the page fails at once instead of holding the page up.
        context = browser.new_context(viewport={"width": width, "height": 844}, offline=True)
        context.add_init_script(f"localStorage.setItem('mode', '{scheme}')")
        contexts[width, scheme] = context

    @cache
    def visit(page: str, view: View) -> Visit:
        tab, visit = contexts[view].new_page(), Visit()
        visit.watch(tab)
        tab.goto((site / f"{page}.html").as_uri())
        visit.seen = tab.evaluate(LOOK)
        if view in AXE_VIEWS:
            tab.evaluate(axe)
            visit.seen["violations"] = tab.evaluate(ACCESSIBILITY, AXE_VIEWS[view])
        tab.close()
        return visit

    yield visit
    for context in contexts.values():
        context.close()


Open = Callable[[str, View], Visit]
in_browser = pytest.mark.parametrize(
    ("page", "view"),
    [(page, view) for page in PAGES for view in VIEWS],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
)


@in_browser
def test_a_page_opens_without_a_console_error(page: str, view: View, visit: Open) -> None:
    assert visit(page, view).errors == []


@in_browser
def test_no_request_leaves_a_page_opened_from_disk(page: str, view: View, visit: Open) -> None:
    assert visit(page, view).outside == []
    assert visit(page, view).missing == []
    assert visit(page, view).seen["broken"] == []


@in_browser
def test_a_page_does_not_scroll_sideways(page: str, view: View, visit: Open) -> None:
    assert visit(page, view).seen["overflow"] <= 1
    assert visit(page, view).seen["cutOff"] == [], "wider than the page, in no box that scrolls"


@in_browser
def test_the_formulae_of_a_page_are_typeset(page: str, view: View, visit: Open) -> None:
    seen = visit(page, view).seen
    assert seen["typeset"] >= seen["formulae"]
    assert seen["failed"] == 0
    assert not re.search(r"\\[(\[]|\$\$|\\(?:frac|mathbb|theta)", seen["text"])


def test_the_theory_page_holds_formulae(visit: Open) -> None:
    assert visit("book/theory", VIEWS[0]).seen["typeset"] > 50


@pytest.mark.parametrize("view", AXE_VIEWS, ids=lambda view: "-".join(map(str, view)))
@pytest.mark.parametrize("page", PAGES)
def test_axe_finds_no_serious_violation(page: str, view: View, visit: Open) -> None:
    assert visit(page, view).seen["violations"] == []


@pytest.mark.parametrize("page", PAGES)
def test_all_that_a_page_loads_weighs_less_than_the_limit(page: str, visit: Open) -> None:
    loaded = visit(page, VIEWS[0]).loaded
    assert any(path.suffix == ".css" for path in loaded)
    assert sum(path.stat().st_size for path in loaded) < MAX_PAGE_BYTES


@pytest.mark.parametrize("scheme", SCHEMES)
def test_body_text_has_enough_contrast(site: Path, scheme: str, browser: Browser) -> None:
    tab = browser.new_page(offline=True)
    tab.add_init_script(f"localStorage.setItem('mode', '{scheme}')")
    tab.goto((site / f"{PAGES[0]}.html").as_uri())
    theme, *colours = tab.evaluate(
        """() => [document.documentElement.dataset.theme,
            getComputedStyle(document.querySelector("article p")).color,
            getComputedStyle(document.body).backgroundColor]"""
    )
    tab.close()
    assert theme == scheme
    dark, light = sorted(luminance(colour) for colour in colours)
    assert (light + 0.05) / (dark + 0.05) >= 7, "the level AAA of WCAG 2"


def luminance(colour: str) -> float:
    """Return the relative luminance of ``rgb(r, g, b)`` as WCAG 2 defines it."""
    values = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    red, green, blue = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("width", WIDTHS)
def test_a_search_by_keyboard_finds_the_page_that_explains_a_word(
    site: Path, width: int, browser: Browser, axe: str
) -> None:
    tab, visit = new_tab(browser, width), Visit()
    visit.watch(tab)
    tab.goto((site / f"{PAGES[0]}.html").as_uri())
    tab.keyboard.press("Control+K")
    tab.keyboard.type("saliency")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#search-results li a", timeout=10_000)
    found = tab.eval_on_selector_all("#search-results li a", "links => links.map((a) => a.href)")
    overflow = tab.evaluate("document.documentElement.scrollWidth - innerWidth")
    tab.evaluate(axe)
    violations = tab.evaluate(ACCESSIBILITY, (True, True))
    tab.close()
    assert any("/book/theory.html" in address for address in found)
    assert overflow <= 1
    assert violations == []
    assert (visit.errors, visit.outside, visit.missing) == ([], [], [])


@pytest.mark.parametrize("width", WIDTHS)
def test_the_contents_lead_to_a_page(site: Path, width: int, browser: Browser) -> None:
    tab = new_tab(browser, width)
    tab.goto((site / f"{PAGES[0]}.html").as_uri())
    link = tab.locator("nav.bd-links a", has_text="Protocol").first
    if not link.is_visible():
        assert width == min(WIDTHS), "a wide window shows the contents at once"
        tab.locator(".primary-toggle").first.click()
    link.click()
    tab.wait_for_url("**/protocol.html")
    tab.close()


def test_the_switch_changes_the_colours_and_the_next_page_keeps_them(
    site: Path, browser: Browser
) -> None:
    tab = new_tab(browser, WIDTHS[0])
    tab.goto((site / f"{PAGES[0]}.html").as_uri())
    seen = []
    for _ in range(3):
        tab.locator(".theme-switch-button").first.click()
        seen.append(tab.evaluate("document.documentElement.dataset.theme"))
    chosen = seen[-1]
    tab.goto((site / f"{PAGES[1]}.html").as_uri())
    kept = tab.evaluate("document.documentElement.dataset.theme")
    tab.close()
    assert set(seen) == set(SCHEMES)
    assert kept == chosen


def new_tab(browser: Browser, width: int) -> Page:
    return browser.new_page(offline=True, viewport={"width": width, "height": 844})


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_explorer_shows_what_the_keyboard_chooses(
    site: Path, scheme: str, width: int, browser: Browser
) -> None:
    tab = browser.new_page(offline=True, viewport={"width": width, "height": 844})
    visit = Visit()
    visit.watch(tab)
    tab.add_init_script(f"localStorage.setItem('mode', '{scheme}')")
    tab.goto((site / "book/experiments/explorer.html").as_uri())
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
    overflow = tab.evaluate("document.documentElement.scrollWidth - innerWidth")

    # The address holds the choice.
    again = browser.new_page(offline=True)
    again.goto(tab.url)
    assert table_of(again) == shown
    again.close()
    tab.close()
    assert overflow <= 1
    assert (visit.errors, visit.outside, visit.missing) == ([], [], [])


def table_of(tab: Page) -> list[list[str]]:
    """Return the texts of the explorer's table, row by row."""
    cells = "rows => rows.map((row) => [...row.cells].map((cell) => cell.textContent))"
    return list(tab.eval_on_selector_all("#explorer-table tbody tr", cells))


def measured(data: str, choice: dict[str, str]) -> list[list[str]]:
    """Return the rows that the explorer's table must hold: the chosen masks, then random ones."""
    rows = [
        row
        for row in csv.DictReader(data.strip().splitlines())
        if row["backbone"] == choice["backbone"]
        and "-".join(filter(None, (row["grid"], row["variant"]))) == choice["run"]
        and row["source"] in (choice["source"], "none")
    ]
    own = {row["target"] for row in rows if row["source"] != "none" and row["task"] == "own"}
    methods = [(choice["scorer"], choice["repair"]), ("random", "none")]
    return [
        [
            row["target"], "own" if row["target"] in own else "held-out", row["scorer"],
            row["sparsity"], row["retention"], f"{row['low']} to {row['high']}", row["count"],
            row["seeds"],
        ]
        for method in dict.fromkeys(methods)
        for row in rows
        if (row["scorer"], row["repair"]) == method
    ]  # fmt: skip
