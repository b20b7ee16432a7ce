"""The command line, ``python -m pai_utils``: what there is, run a notebook, check the installation.

Libraries are imported by the command that needs them, so that help and errors come at once.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import platform
import re
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
# What notebooks import to be run, and the extra that installs it.
_RUNNERS = ("papermill", "ipykernel", "myst_nb")
_INSTALL_BOOK = "run `make env` in a checkout, or install the extra: pip install 'pai-utils[book]'"
_INSTALL = "run `make env` in a checkout, or pip install --editable . there"


class BadInput(click.ClickException):
    """What was asked for cannot be: one line that says why, and exit status 2."""

    exit_code = 2


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Second-order pruning of pre-trained vision encoders."""


@main.command("list")
def list_names() -> None:
    """Name the backbones, tasks and scorers, with a line on each."""
    from pai_utils.data.datasets import DATASETS
    from pai_utils.data.embedded import TASKS
    from pai_utils.models.published import BACKBONES, PRESETS
    from pai_utils.scorers import SCORERS

    tables = {
        "Backbones": {
            name: f"{spec.description}; {spec.transform.image_size} px, {spec.licence}"
            + ("" if spec.package else ", fetched on request")
            for name, spec in (BACKBONES | PRESETS).items()
        }
        | {
            "timm:<model>": "any model of timm, with its weights from the Hugging Face hub",
            "file:<path>@<timm model>": "a local checkpoint of that model",
            "clip:<model>@<weights>": "a CLIP image tower of open_clip, fetched on request",
        },
        "Tasks": {name: spec.description for name, spec in TASKS.items()}
        | {
            name: f"{spec.description}; {spec.megabytes:,} MB, licence: {spec.licence}"
            + ("" if spec.by_hand else ", fetched on request")
            for name, spec in DATASETS.items()
        }
        | {"folder:<path>": "any folder of class folders with images"},
        "Scorers": {name: scorer.summary for name, scorer in SCORERS.items()}
        | {"<one>@<other>": "layers keep as many weights as by the other, those that one ranks"},
    }
    width = max(len(name) for rows in tables.values() for name in rows)
    for title, rows in tables.items():
        click.echo(title)
        for name, text in rows.items():
            click.echo(f"  {name:<{width}}  {text}")


@main.command()
@click.argument("notebook")
@click.option(
    "-p",
    "--parameter",
    "given",
    nargs=2,
    multiple=True,
    metavar="NAME VALUE",
    help="Set a parameter of the notebook; a list is written as '[a, b]'. May be repeated.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="Folder of the results and of the executed copy; the notebook's own by default.",
)
def run(notebook: str, given: tuple[tuple[str, str], ...], out: Path | None) -> None:
    """Run NOTEBOOK, a name such as zero_shot_retention or a path, with other parameters.

    The parameters are checked before anything starts. The executed copy is written beside the
    results; that of a run that fails ends in .partial.ipynb.
    """
    from pai_utils.studies.parameters import read_parameters

    values = dict(given)
    if len(values) < len(given):
        raise BadInput("a parameter is given twice")
    if out is not None:
        if "out" in values:
            raise BadInput("the folder is given twice, by -o and by -p out")
        values["out"] = out.as_posix()
    try:
        path = _find_notebook(notebook)
        config = read_parameters(path, values)
    except ValueError as error:
        raise BadInput(str(error)) from error
    absent = [module for module in _RUNNERS if importlib.util.find_spec(module) is None]
    if absent:
        raise click.ClickException(
            f"running notebooks needs {', '.join(absent)}, not installed here; {_INSTALL_BOOK}"
        )
    copy = _execute(path, {name: getattr(config, name) for name in values}, Path(config.out))
    click.echo(f"{copy} and its results are in {copy.parent}")


@main.command()
def doctor() -> None:
    """Check versions, the device, and that the weights and data are found."""
    complete = True
    for mark, name, text in itertools.chain(_packages(), _files()):
        complete &= mark != "missing"
        click.echo(f"{mark:<8} {name}: {text}")
    if not complete:
        raise click.ClickException("something is missing; the lines above say what to do")


def _find_notebook(name: str) -> Path:
    from pai_utils.support.common import check_names
    from pai_utils.support.stored import located

    if located(name).is_file():
        return located(name)
    known = {file.stem: file for file in sorted(NOTEBOOKS.glob("*.ipynb"))}
    check_names("notebook", [name], known)
    return known[name]


def _execute(path: Path, parameters: Mapping[str, Any], out: Path) -> Path:
    """Execute a notebook; its copy takes its name in ``out`` once all of it ran."""
    from nbclient.exceptions import DeadKernelError
    from papermill import PapermillExecutionError

    from pai_utils.support.kernels import execute

    partial = out / f"{path.stem}.partial.ipynb"
    try:
        out.mkdir(parents=True, exist_ok=True)
        partial.touch()
    except OSError as error:
        raise BadInput(f"cannot write to the folder {out}: {error.strerror}") from error
    try:
        execute(path, partial, parameters, watched=sys.stderr.isatty())
    except (PapermillExecutionError, DeadKernelError) as error:
        what = str(error)
        if isinstance(error, PapermillExecutionError):  # whose text is the whole traceback
            what = " ".join(f"{error.ename}: {error.evalue}".split())
        raise click.ClickException(
            f"{path.name} failed with {what}; the copy up to there is {partial}"
        ) from error
    copy = out / f"{path.stem}.ipynb"
    partial.replace(copy)
    return copy


def _packages() -> Iterator[tuple[str, str, str]]:
    """For each: "ok", "absent" or "missing", its name, and what was found, or what to do."""
    from pai_utils.support.code import version_of

    yield "ok", "Python", f"{platform.python_version()} at {sys.executable}"
    requirements = []
    with suppress(importlib.metadata.PackageNotFoundError):
        requirements = importlib.metadata.requires("pai-utils") or []
    for requirement in ["pai-utils", *requirements]:
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        extra = re.search(r"extra == ['\"](\w+)['\"]", requirement)
        if extra is None or extra[1] == "book":
            absent = ("missing", name, _INSTALL)
            if extra:
                absent = ("absent", name, f"only notebooks need it; {_INSTALL_BOOK}")
            found = version_of(name)
            yield ("ok", name, found) if found else absent


def _files() -> Iterator[tuple[str, str, str]]:
    """The device, weights, whose checksums are compared, and data."""
    if not all(importlib.util.find_spec(module) for module in ("torch", "timm")):
        return
    import torch

    from pai_utils.data.datasets import DATASETS, data_root
    from pai_utils.data.embedded import TASKS
    from pai_utils.models.published import BACKBONES, PRESETS

    text = f"cpu with {torch.get_num_threads()} threads; torch finds no CUDA device"
    if torch.cuda.is_available():
        gib = torch.cuda.get_device_properties(0).total_memory / 2**30
        text = f"cuda, {torch.cuda.get_device_name()} with {gib:.0f} GiB"
    yield "ok", "device", text
    for name, spec in (BACKBONES | PRESETS).items():
        try:
            yield "ok", f"weights {name}", f"{spec.obtain(name, download=False)}, intact"
        except FileNotFoundError:  # no package ships it
            yield "absent", f"weights {name}", "fetched by load_backbone(name, download=True)"
        except (ImportError, OSError, ValueError) as error:
            yield "missing", f"weights {name}", str(error)
    for name, task in TASKS.items():
        try:
            images = sum(len(part.labels) for part in task.read().values())
            yield "ok", f"data {name}", f"{images:,} images"
        except (ImportError, OSError, ValueError, EOFError, zlib.error) as error:
            yield "missing", f"data {name}", f"{error}; {_INSTALL}"
    there = [name for name, spec in DATASETS.items() if (data_root() / spec.place).exists()]
    by_hand = [name for name, spec in DATASETS.items() if spec.by_hand]
    text = f"{', '.join(there) or 'none'} found in {data_root()} (PAI_DATA_ROOT); others are "
    text += f"fetched by load_task(..., download=True), {', '.join(by_hand)} by hand"
    yield "ok", "data sets", text


if __name__ == "__main__":
    main()
