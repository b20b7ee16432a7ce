"""What the README shows is there and is accepted."""

import ast
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

import pai_utils as pai
from pai_utils.studies.parameters import read_parameters

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
CODE = re.findall(r"`([^`\n]+)`", BLOCK.sub("", README))


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCK.findall(README) if name == language]


def test_papermill_example_names_parameters_that_the_notebook_accepts() -> None:
    (block,) = [block for block in blocks("sh") if "papermill" in block]
    command, show = block.replace("\\\n", " ").splitlines()
    program, notebook, copy, *options = shlex.split(command)
    assert (Path(program).name, Path(copy).suffix) == ("papermill", ".ipynb")
    values: dict[str, Any] = {}
    for option, first, second in zip(options, options[1:], [*options[2:], ""], strict=False):
        values.update(yaml.safe_load(first) if option == "-y" else {})
        values.update({first: second} if option == "-p" else {})
    config = read_parameters(ROOT / notebook, values)
    assert values
    assert all(getattr(config, name) == value for name, value in values.items())
    assert show.split()[1].startswith(f"{values['out']}/")

    (output,) = blocks("text")
    header, *rows = output.splitlines()
    stored = next((ROOT / "results" / "transfer").glob("*/verdict.csv"))
    assert header == stored.read_text("utf-8").splitlines()[0]
    assert [float(row.split(",")[0]) for row in rows] == values["sparsities"]


def test_python_example_calls_what_the_library_has() -> None:
    (code,) = blocks("python")
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    called = {ast.unparse(call.func): call for call in calls}
    names = [name.removeprefix("pai.") for name in called if name.startswith("pai.")]
    assert "prune" in names
    for name in names:
        given = {keyword.arg for keyword in called[f"pai.{name}"].keywords}
        assert given <= set(inspect.signature(getattr(pai, name)).parameters), name


def test_commands_name_targets_of_the_makefile() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    named = set(re.findall(r"\bmake ([a-z-]+)\b", "\n".join([*blocks("sh"), *CODE])))
    assert named
    assert named <= set(targets)


def test_files_and_images_that_are_named_exist_and_images_are_described() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    paths = [text for text in CODE if "/" in text and " " not in text]
    made_by_runs = ("runs/", "book/executed/", ".venv")
    for path in [*links, *paths]:
        if "://" not in path and not path.startswith(made_by_runs):
            assert (ROOT / path).exists(), path
    (alternative,) = re.findall(r"!\[(.*?)\]\([^)]*\.png\)", README, re.DOTALL)
    assert len(alternative.split()) > 15


def test_the_figure_shows_what_its_text_says() -> None:
    rows = pd.read_csv(ROOT / "results" / "summary" / "judged.csv").set_index("claim")
    for encoder in ("EfficientNet-Lite0", "ViT-S/14"):
        kept = rows[rows.encoder == encoder].value
        little = kept["no repair, on the source alone"]
        assert little < 0.5 < kept["with the repair, on a mixture around it"]
