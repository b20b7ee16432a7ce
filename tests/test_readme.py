"""What the README shows is there and is accepted."""

import ast
import inspect
import re
import shlex
from pathlib import Path

import pandas as pd
import yaml

import pai_utils as pai
from pai_utils.studies.parameters import read_parameters

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_papermill_example_names_parameters_that_the_notebook_accepts() -> None:
    (block,) = [block for block in blocks("sh") if "papermill" in block]
    command, show = block.replace("\\\n", " ").splitlines()
    program, notebook, copy, *options = shlex.split(command)
    values = {}
    for option, name, *value in _split(options):
        if option == "-y":
            values.update(yaml.safe_load(name))
        else:
            assert option == "-p"
            (values[name],) = value
    assert program.endswith("/papermill")
    assert copy.endswith(".ipynb")
    config = read_parameters(ROOT / notebook, values)
    assert values
    assert all(getattr(config, name) == value for name, value in values.items())
    assert show.split()[1].startswith(f"{values['out']}/")


def _split(options: list[str]) -> list[list[str]]:
    groups: list[list[str]] = []
    for word in options:
        if word in ("-p", "-y"):
            groups.append([])
        groups[-1].append(word)
    return groups


def test_shown_output_of_papermill_is_a_table_as_runs_write_it() -> None:
    (output,) = blocks("text")
    stored = next((ROOT / "results" / "retention").glob("*/verdict.csv"))
    assert output.splitlines()[0] == stored.read_text("utf-8").splitlines()[0]
    (block,) = [block for block in blocks("sh") if "papermill" in block]
    (sparsities,) = re.findall(r"sparsities: (\[.*?\])", block)
    rows = [line.split(",")[0] for line in output.splitlines()[1:]]
    assert [float(row) for row in rows] == ast.literal_eval(sparsities)


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
    named = set(re.findall(r"\bmake ([a-z-]+)\b", "\n".join([*blocks("sh"), *_code()])))
    assert named
    assert named <= set(targets)


def test_files_and_images_that_are_named_exist() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert any(link.endswith(".png") for link in links)
    made_by_runs = ("runs/", "book/executed/", ".venv")
    paths = [text for text in _code() if "/" in text and " " not in text]
    for path in [*links, *paths]:
        if "://" not in path and not path.startswith(made_by_runs):
            assert (ROOT / path).exists(), path


def test_the_figure_has_an_alternative_text_that_says_what_it_shows() -> None:
    (alternative,) = re.findall(r"!\[(.*?)\]", README, re.DOTALL)
    assert len(alternative.split()) > 15


def test_the_figure_shows_what_its_text_says() -> None:
    rows = pd.read_csv(ROOT / "results" / "summary" / "repaired.csv")
    rows = rows[(rows.encoder == "EfficientNet-Lite0") & (rows.tasks == "embedded")]
    means = {
        (row.sparsity, row.method): float(str(row.retention).split()[0])
        for row in rows.itertuples()
    }
    for sparsity in (0.5, 0.7):
        order = [
            means[sparsity, method]
            for method in (
                "feature_ggn_diag + layerwise+moments",
                "magnitude + layerwise+moments",
                "feature_ggn_diag",
            )
        ]
        assert order == sorted(order, reverse=True)


def _code() -> list[str]:
    text = re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", text)
