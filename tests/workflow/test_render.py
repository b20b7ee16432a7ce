"""The copy of the book's sources that a site elsewhere gets, and what the renderer's log says."""

from pathlib import Path

import pytest
from render import complaints, stage


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
