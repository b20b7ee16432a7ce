"""The copy of the book's sources for a site elsewhere, drafts, and what the renderer's log says."""

import json
from pathlib import Path

import pytest
from render import lend_copies, main, render, stage


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "sources"
    (root / "book" / "executed").mkdir(parents=True)
    (root / "book" / "executed" / "cell.ipynb").write_text("the reader's")
    (root / "book" / "index.md").write_text("# New")
    (root / "_config.yml").write_text("title: t\nonly_build_toc_files: true\n")
    (root / "_toc.yml").write_text("root: book/index")
    monkeypatch.chdir(root)
    return root


def test_staged_site_has_the_sources_and_keeps_its_own_executed_copies(sources: Path) -> None:
    site = sources / "build" / "smoke"
    executed = site / "book" / "executed"
    for folder in (executed, site / "book" / "folder"):
        folder.mkdir(parents=True)
        (folder / "cell.ipynb").write_text("the site's")
    stage(site)
    stage(site)
    assert (site / "book" / "index.md").read_text() == "# New"
    assert (executed / "cell.ipynb").read_text() == "the site's"
    assert (sources / "book" / "executed" / "cell.ipynb").read_text() == "the reader's"
    assert not (site / "book" / "folder").exists()  # of a page that was removed


def test_a_page_whose_cell_did_not_run_shows_another_of_its_notebook(sources: Path) -> None:
    pages = ["a-vit", "a-resnet", "b", "c-vit"]
    (sources / "_toc.yml").write_text("".join(f"- file: book/executed/{p}\n" for p in pages))
    executed = sources / "book" / "executed"
    for cell in ("a-vit", "b"):
        (executed / f"{cell}.ipynb").write_text(cell)
        (executed / cell).mkdir()
        (executed / cell / "table.csv").write_text(cell)
    for _ in range(2):
        lend_copies(sources, ["a-vit", "b"])
    assert (executed / "a-resnet.ipynb").read_text() == "a-vit"
    assert (executed / "a-resnet" / "table.csv").read_text() == "a-vit"
    assert not (executed / "b.ipynb").is_symlink()
    assert not (executed / "c-vit").exists()  # which is then missing, as a warning says


@pytest.mark.engine
@pytest.mark.xdist_group("engine")
def test_draft_renders_what_changed_and_repeats_a_warning_until_it_is_mended(sources: Path) -> None:
    contents = "format: jb-book\nroot: book/index\nchapters: [{file: book/one}, {file: book/two}]\n"
    (sources / "_toc.yml").write_text(contents)
    one, two = (sources / "book" / f"{name}.md" for name in ("one", "two"))
    for page in (one, two):
        page.write_text(f"# Page {page.stem}\n")
    site, log = sources / "build" / "draft", sources / "render.log"
    html = site / "_build" / "html" / "book"

    def draft() -> list[str]:
        stage(site, sources / "book" / "executed")
        return render(site, log, draft=True)

    one.write_text("# Page one\n\n```{nonsense}\n```\n")
    first = draft()
    assert any("nonsense" in line for line in first)
    # The page has not changed since, and is read again all the same.
    assert draft() == first
    one.write_text("# Page one\n\nA sentence.\n")
    before = (html / "two.html").stat().st_mtime_ns
    assert draft() == []
    assert "A sentence." in (html / "one.html").read_text()
    assert (html / "two.html").stat().st_mtime_ns == before

    (sources / "_toc.yml").write_text(contents.replace(", {file: book/two}", ""))
    two.unlink()
    assert draft() == []
    assert {path.name for path in html.glob("*.html")} == {"index.html", "one.html"}


def test_executed_copy_with_an_error_is_not_rendered(
    sources: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = sources / "workflow/grids/book.yaml"
    grid.parent.mkdir(parents=True)
    grid.write_text("cells: {cell: {notebook: n, parameters: {}}}")
    error = {"output_type": "error", "ename": "KeyError", "evalue": "'x'", "traceback": []}
    content = {"cells": [{"outputs": [error]}], "metadata": {"papermill": {}}}
    (sources / "book/executed/cell.ipynb").write_text(json.dumps(content))
    monkeypatch.setattr("sys.argv", ["render.py", "book"])
    assert main() == 1
    assert "book/executed/cell.ipynb: KeyError: 'x'" in capsys.readouterr().err
