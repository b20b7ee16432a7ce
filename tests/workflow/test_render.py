"""The copy of the book's sources for a site elsewhere, drafts, and what the renderer's log says."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from render import complaints, render, stage


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "sources"
    (root / "book" / "executed").mkdir(parents=True)
    (root / "book" / "executed" / "cell.ipynb").write_text("the reader's")
    (root / "book" / "index.md").write_text("# New")
    (root / "_config.yml").write_text("title: t")
    (root / "_toc.yml").write_text("root: book/index")
    monkeypatch.chdir(root)
    return root


def test_staged_site_has_the_sources_and_keeps_its_own_executed_copies(sources: Path) -> None:
    site = sources / "build" / "smoke"
    executed = site / "book" / "executed"
    executed.mkdir(parents=True)
    (executed / "cell.ipynb").write_text("the site's")
    stage(site)
    assert (site / "_config.yml").read_text() == "title: t"
    assert (site / "book" / "index.md").read_text() == "# New"
    assert (executed / "cell.ipynb").read_text() == "the site's"
    assert (sources / "book" / "executed" / "cell.ipynb").read_text() == "the reader's"


def test_page_that_was_removed_leaves_the_site_too(sources: Path) -> None:
    site = sources / "build" / "smoke"
    (site / "book" / "folder").mkdir(parents=True)
    (site / "book" / "old.md").write_text("# Old")
    (site / "book" / "folder" / "old.md").write_text("# Old")
    stage(site)
    assert sorted(path.name for path in (site / "book").iterdir()) == ["index.md"]


def test_staging_again_dates_only_what_changed(sources: Path) -> None:
    site = sources / "build" / "draft"
    stage(site, sources / "book" / "executed")
    same, changed = site / "_toc.yml", site / "book" / "index.md"
    before = [path.stat().st_mtime_ns for path in (same, changed)]
    # As old as a copy from elsewhere may be: the content counts.
    (sources / "book" / "index.md").write_text("# Newer")
    os.utime(sources / "book" / "index.md", (0, 0))
    stage(site, sources / "book" / "executed")
    after = [path.stat().st_mtime_ns for path in (same, changed)]
    assert after[0] == before[0]
    assert after[1] > before[1]
    assert (site / "book" / "executed" / "cell.ipynb").read_text() == "the reader's"


@pytest.fixture
def draft(sources: Path) -> Callable[[], list[str]]:
    """Render a draft of the sources and return the renderer's complaints; none if it succeeded."""
    (sources / "_config.yml").write_text("title: t\nonly_build_toc_files: true\n")
    contents = "format: jb-book\nroot: book/index\nchapters: [{file: book/one}, {file: book/two}]\n"
    (sources / "_toc.yml").write_text(contents)
    for name in ("one", "two"):
        (sources / "book" / f"{name}.md").write_text(f"# Page {name}\n")

    def draft() -> list[str]:
        site, log = sources / "build" / "draft", sources / "render.log"
        stage(site, sources / "book" / "executed")
        return [] if render(site, log, draft=True) else complaints(log)

    return draft


def test_draft_renders_changed_pages_and_drops_removed_ones(
    sources: Path, draft: Callable[[], list[str]]
) -> None:
    html = sources / "build" / "draft" / "_build" / "html" / "book"
    assert draft() == []
    before = {path.name: path.stat().st_mtime_ns for path in html.glob("*.html")}
    (sources / "book" / "one.md").write_text("# Page one\n\nA new sentence.\n")
    assert draft() == []
    after = {path.name: path.stat().st_mtime_ns for path in html.glob("*.html")}
    assert "A new sentence." in (html / "one.html").read_text()
    assert after["one.html"] > before["one.html"]
    assert after["two.html"] == before["two.html"]

    contents = (sources / "_toc.yml").read_text()
    (sources / "_toc.yml").write_text(contents.replace(", {file: book/two}", ""))
    (sources / "book" / "two.md").unlink()
    assert draft() == []
    assert {path.name for path in html.glob("*.html")} == {"index.html", "one.html"}


def test_draft_repeats_a_warning_until_it_is_mended(
    sources: Path, draft: Callable[[], list[str]]
) -> None:
    page = sources / "book" / "one.md"
    assert draft() == []
    good = page.read_text()
    page.write_text(good + "\n```{nonsense}\n```\n")
    first = draft()
    assert any("nonsense" in line for line in first)
    # The page has not changed since, and is read again all the same.
    assert draft() == first
    page.write_text(good)
    assert draft() == []


def test_draft_that_never_succeeded_repeats_its_warnings(
    sources: Path, draft: Callable[[], list[str]]
) -> None:
    (sources / "book" / "two.md").write_text("# Page two\n\n```{nonsense}\n```\n")
    first = draft()
    assert any("nonsense" in line for line in first)
    assert draft() == first


def test_folder_without_the_sources_is_refused(sources: Path) -> None:
    (sources / "_toc.yml").unlink()
    with pytest.raises(ValueError, match=r"_toc\.yml is missing"):
        stage(sources / "build" / "smoke")


def test_log_is_reduced_to_its_warnings_without_colour(tmp_path: Path) -> None:
    log = tmp_path / "render.log"
    log.write_text("reading\n\x1b[91mpage.md:3: WARNING: no such label\x1b[39;49;00m\ndone\n")
    assert complaints(log) == ["page.md:3: WARNING: no such label"]


def test_log_without_warnings_is_reduced_to_its_end(tmp_path: Path) -> None:
    log = tmp_path / "render.log"
    log.write_text("\n".join(f"line {n}" for n in range(30)))
    assert complaints(log) == [f"line {n}" for n in range(10, 30)]
