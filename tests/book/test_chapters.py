"""What every chapter has, read off its source: a question, an answer from a run, limits."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
# How to run the book and what its symbols mean are no questions to a run.
REFERENCE = {"index", "notation", "references", "rerun"}
CHAPTERS = [
    pytest.param(path, id=path.stem)
    for path in sorted([*BOOK.glob("*.md"), *BOOK.glob("experiments/*.md")])
    if path.stem not in REFERENCE
]
EXPERIMENTS = [chapter for chapter in CHAPTERS if "experiments" in str(chapter.values[0])]
NAMES = r"ViT-S/14|EfficientNet-Lite0|P[12]\b"


def _opening(path: Path) -> tuple[str, str]:
    """The question, and what follows it."""
    text = path.read_text("utf-8")
    found = re.search(r"\n\*\*Question\.\*\*(.*?)\n\n(.*)", text, re.DOTALL)
    assert found is not None, "no question"
    before = re.sub(r"\([\w-]+\)=\n", "", text[: found.start()]).strip().splitlines()
    assert len(before) == 1, f"something comes before the question: {before}"
    return found[1], found[2]


@pytest.mark.parametrize("path", [*CHAPTERS, pytest.param(BOOK / "index.md", id="index")])
def test_a_chapter_opens_with_its_question_and_its_answer(path: Path) -> None:
    question, answer = _opening(path)
    assert question.strip().endswith("?")
    assert answer.startswith("**Answer.**")
    first = re.split(r"\n\n", answer)[0]
    assert re.search(r"\{(glue:text|stored)\}", first), "no number from a run"


@pytest.mark.parametrize("path", CHAPTERS)
def test_no_number_in_an_answer_is_typed(path: Path) -> None:
    text = path.read_text("utf-8")
    (answer,) = re.findall(r"\*\*Answer\.\*\*.*?(?=\n\n)", text, re.DOTALL)
    for made in (r"\{[\w:]+\}(`+).*?\1", r"\$[^$]*\$", NAMES, "`cifar10-jpeg`"):
        answer = re.sub(made, "", answer)
    assert re.findall(r"\d[\d.]*", answer) == []


def _paragraphs(text: str) -> list[str]:
    """Paragraphs and items of lists, with a word for each number and formula."""
    text = re.sub(r"^(```|:::).*?^\1", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\{holds\}(`+).*?\1", "", text, flags=re.DOTALL)
    for made in (r"\{[\w:]+\}(`+).*?\1", r"\$\$.*?\$\$", r"\$[^$]*\$"):
        text = re.sub(made, "x", text, flags=re.DOTALL)
    return re.split(r"\n\s*\n|\n(?=\s*(?:[-*:]|\d+\.) )", text)


@pytest.mark.parametrize("path", sorted([*BOOK.glob("*.md"), *BOOK.glob("experiments/*.md")]))
def test_no_paragraph_is_longer_than_90_words(path: Path) -> None:
    sizes = {text[:60]: len(text.split()) for text in _paragraphs(path.read_text("utf-8"))}
    assert {
        start for start, size in sizes.items() if size > 90 and start.lstrip()[:1] != "|"
    } == set()


@pytest.mark.parametrize("path", CHAPTERS)
def test_an_answer_holds_at_most_four_numbers(path: Path) -> None:
    (answer,) = re.findall(r"\*\*Answer\.\*\*.*?(?=\n\n)", path.read_text("utf-8"), re.DOTALL)
    assert 1 <= len(re.findall(r"\{(?:stored|glue:text)\}", answer)) <= 4


@pytest.mark.parametrize("path", EXPERIMENTS)
def test_an_experiment_ends_with_its_limits(path: Path) -> None:
    headings = re.findall(r"^## (.*)$", path.read_text("utf-8"), re.MULTILINE)
    assert headings[-1] == "Limits"


def _fields(bibtex: str) -> dict[str, str]:
    """The fields of an entry, without braces and escapes."""
    pairs = re.findall(r"(\w+)\s*=\s*\{(.*)\}", bibtex)
    return {name: re.sub(r"[{}\\]", "", value) for name, value in pairs}


def test_the_ways_to_cite_agree() -> None:
    page = (BOOK / "references.md").read_text("utf-8")
    book, paper = (_fields(entry) for entry in re.findall(r"```bibtex\n(.*?)```", page, re.DOTALL))
    cited: dict[str, Any] = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    config = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))
    assert book["title"] == cited["title"]
    assert book["author"] == cited["authors"][0]["name"] == config["author"]
    assert book["version"] == cited["version"] == project["version"]
    assert book["year"] == config["copyright"]

    (reference,) = cited["references"]
    names = [f"{who['family-names']}, {who['given-names']}" for who in reference["authors"]]
    assert paper["author"] == " and ".join(names)
    assert paper["title"] == reference["title"]
    assert paper["booktitle"] == reference["collection-title"]
    assert paper["year"] == str(reference["year"])
    assert paper["note"] == reference["identifiers"][0]["value"]
    in_book = (BOOK / "references.bib").read_text("utf-8")
    entry = re.search(r"@inproceedings\{iurada2025secondorder,.*?\n\}", in_book, re.DOTALL)
    assert entry is not None
    assert _fields(entry[0]) == paper
