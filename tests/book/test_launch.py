"""Where the launch buttons lead, once the published repository has an address."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup, Tag
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
PAGE = "book/executed/zero_shot_retention-vit_small_saliency"
NOTEBOOK = "notebooks/zero_shot_retention.ipynb"
Links = Callable[[str], dict[str, str]]


@pytest.fixture(scope="module")
def links(tmp_path_factory: pytest.TempPathFactory) -> Links:
    """Return the buttons of an executed page, by text, for an address of the repository."""

    def links(address: str) -> dict[str, str]:
        site = tmp_path_factory.mktemp("site")
        for folder in ("_ext", "_static", "_templates"):
            shutil.copytree(ROOT / "book" / folder, site / "book" / folder)
        shutil.copy(ROOT / "book" / "references.bib", site / "book")
        config = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))
        config["sphinx"]["config"]["html_theme_options"]["repository_url"] = address
        (site / "_config.yml").write_text(yaml.safe_dump(config))
        pages = [{"file": "book/rerun"}, {"file": PAGE}]
        contents = {"format": "jb-book", "root": "book/index", "chapters": pages}
        (site / "_toc.yml").write_text(yaml.safe_dump(contents))
        (site / "book" / "index.md").write_text("# Start\n")
        (site / "book" / "rerun.md").write_text("# Run\n\n## In the browser\n\nSo.\n")
        notebook = nbformat.read(ROOT / NOTEBOOK, as_version=4)
        notebook.cells = notebook.cells[:2]
        (site / f"{PAGE}.ipynb").parent.mkdir()
        nbformat.write(notebook, site / f"{PAGE}.ipynb")
        program = Path(sys.executable).with_name("jupyter-book")
        done = subprocess.run(
            [program, "build", site, "-W", "--keep-going"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        html = (site / "_build" / "html" / f"{PAGE}.html").read_text("utf-8")
        header = BeautifulSoup(html, "html.parser").select_one(".article-header-buttons")
        assert isinstance(header, Tag)
        anchors = header.select("a[href]")
        return {a.get_text(strip=True) or str(a.get("title")): str(a["href"]) for a in anchors}

    return links


def test_an_address_turns_on_buttons_that_open_the_notebook_with_its_parameters(
    links: Links,
) -> None:
    found = links("https://github.com/owner/name")
    binder, colab = urlsplit(found["Binder"]), urlsplit(found["Colab"])
    assert (binder.netloc, binder.path) == ("mybinder.org", "/v2/gh/owner/name/main")
    assert parse_qs(binder.query) == {"urlpath": [f"lab/tree/{NOTEBOOK}"]}
    assert colab.netloc == "colab.research.google.com"
    assert colab.path == f"/github/owner/name/blob/main/{NOTEBOOK}"
    assert found["How to"] == "../rerun.html#in-the-browser"
    assert "https://github.com/owner/name" in found.values()


def test_elsewhere_than_on_github_binder_is_offered_alone(links: Links) -> None:
    found = links("https://gitlab.com/owner/name")
    assert "/v2/gl/owner%2Fname/main?" in found["Binder"]
    assert "Colab" not in found


def test_the_page_that_the_buttons_lead_to_for_help_exists() -> None:
    text = (ROOT / "book" / "rerun.md").read_text("utf-8")
    assert re.search(r"^## In the browser$", text, re.MULTILINE)


def test_binder_builds_a_supported_python_from_the_locked_versions_without_docker() -> None:
    folder = ROOT / ".binder"
    runtime = (folder / "runtime.txt").read_text().strip().removeprefix("python-")
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    (supported,) = re.findall(r'^requires-python = "(.*)"$', project, re.MULTILINE)
    assert runtime in SpecifierSet(supported)
    script = folder / "postBuild"
    assert script.stat().st_mode & 0o100, "Binder runs it"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    text = script.read_text("utf-8")
    assert "--constraint requirements.lock" in text
    assert '--editable ".[book]"' in text
    assert not [path for path in (ROOT, folder) if (path / "Dockerfile").exists()]
