"""Runs of notebooks: validated parameters, seeds, tidy files, and the record of what was run."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Self

import pandas as pd
import torch
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from pai_utils.compensation import COMPENSATION_OPTIONS, parse_compensation
from pai_utils.execution import PRECISIONS, unknown_name
from pai_utils.export import FORMATS
from pai_utils.files import write_atomically
from pai_utils.finetuning import OPTIMISERS, PENALTIES, SCHEDULES, STARTS
from pai_utils.heads import HEADS
from pai_utils.pruning import check_rounds
from pai_utils.scorers import SCORERS
from pai_utils.shared import digest_of, used_files
from pai_utils.sources import IMAGE_SETS, is_held_out, task_of
from pai_utils.tasks import check_task_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pydantic_core import ErrorDetails

    from pai_utils.masks import Mask
    from pai_utils.tasks import Task


def _known_task(name: str) -> str:
    check_task_name(name)
    return name


def _known_sources(names: str | list[str]) -> str | list[str]:
    for name in [names] if isinstance(names, str) else names:
        for part in name.split("+"):
            if part not in IMAGE_SETS:
                check_task_name(task_of(part), unlisted=IMAGE_SETS)
    return names


def _known_pool(name: str | None) -> str | None:
    return name if name is None else str(_known_sources(name))


def _one_of(kind: str, names: Collection[str]) -> AfterValidator:
    def check(name: str) -> str:
        if name not in names:
            raise unknown_name(kind, name, names)
        return name

    return AfterValidator(check)


def _known_compensation(text: str) -> str:
    parse_compensation(text)
    return text


# Names are looked up before a run starts, which would meet the last of them after minutes.
TaskName = Annotated[str, AfterValidator(_known_task)]
CompensationOption = Annotated[str, _one_of("compensation option", COMPENSATION_OPTIONS)]
Start = Annotated[str, _one_of("start", STARTS)]
Strength = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PenaltyName = Annotated[str, _one_of("penalty", PENALTIES)]
ScorerName = Annotated[str, _one_of("scorer", SCORERS)]
Precision = Annotated[str, _one_of("precision", PRECISIONS)]
Compensation = Annotated[str, AfterValidator(_known_compensation)]
Sparsity = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]

COMPARISONS = ("random", "trained")
"""Weights to set beside an encoder's, not trained at all, or briefly on the source."""

_RECORDED_PACKAGES = ("torch", "torchvision", "timm", "numpy", "scikit-learn", "pai-utils")
# What a kernel puts beside the notebook's own names.
_KERNEL_NAMES = {"In", "Out", "exit", "quit", "open", "get_ipython"}


class RunConfig(BaseModel):
    """Parameters common to all notebooks. Subclasses add their own."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    device: str = "auto"
    seed: Annotated[int, Field(ge=0)] = 0
    out: str = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _read_texts(cls, values: Any) -> Any:
        """Papermill's ``-p`` passes lists and mappings as text; read it."""
        if not isinstance(values, Mapping):
            return values
        return {name: _read_text(value) for name, value in values.items()}

    @classmethod
    def from_notebook(cls, namespace: Mapping[str, Any]) -> Self:
        """Validate the parameters that a notebook's first cells defined.

        Args:
            namespace: the notebook's ``globals()``, holding parameters and imported modules only.

        Raises:
            ValueError: for an unknown, missing or ill-typed parameter, with the valid names.

        Examples:
            >>> from pai_utils.runs import PrunePerTaskConfig
            >>> given = {"backbone": "mobilenetv2", "scorers": ["snip"], "out": "results"}
            >>> given |= {"sources": ["digits", "glyphs"], "sparsity": 0.5}
            >>> PrunePerTaskConfig.from_notebook(given).batch_size
            64
            >>> PrunePerTaskConfig.from_notebook(given | {"sparsity": 50})  # doctest: +ELLIPSIS
            Traceback (most recent call last):
                ...
            ValueError: parameters refused: sparsity: Input should be less than 1, not 50. Valid...
        """
        given = {
            name: value
            for name, value in namespace.items()
            if not name.startswith("_")
            and name not in _KERNEL_NAMES
            and not isinstance(value, ModuleType)
            and not callable(value)  # imported functions and classes
        }
        fields = list(cls.model_fields)
        for name in given:
            if name not in fields:
                raise unknown_name("parameter", name, fields)
        try:
            return cls(**given)
        except ValidationError as error:
            problems = "; ".join(map(_problem, error.errors()))
            raise ValueError(
                f"parameters refused: {problems}. Valid parameters: {', '.join(fields)}"
            ) from error


class NotebookConfig(RunConfig):
    """Parameters common to the notebooks that load an encoder."""

    backbone: str
    image_size: Positive | None = None  #: None: the backbone's own
    pretrained: bool = True
    train_size: Positive | None = None  #: images a task; None: all
    test_size: Positive | None = None
    samples: Positive | None = 256  #: images a score; None: all
    batch_size: Positive = 64


class WorkedExamplesConfig(RunConfig):
    """Parameters of the notebook ``worked_examples``, whose networks are its own."""

    fractions: list[Fraction] = Field(min_length=2)  #: of the pruning step
    correlation: Annotated[float, Field(gt=0, lt=1)]  #: of two weights' effects
    draws: Positive = 100  #: labels a sample, where they are drawn from the model


def read_parameters(notebook: Path, values: Mapping[str, Any]) -> RunConfig:
    """A notebook's parameters with ``values`` in place of its own, by its own schema; nothing runs.

    Args:
        notebook: the file, with one cell tagged ``parameters`` that holds plain assignments.
        values: to set, by name.

    Raises:
        ValueError: no such notebook, or a value that its schema refuses.
    """
    try:
        text = notebook.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{notebook} is no readable notebook: {error!r}") from error
    try:
        schema, defaults = _schema_and_defaults(text)
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"{notebook} {error}") from error
    for name in values:
        if name not in schema.model_fields:
            raise unknown_name("parameter", name, schema.model_fields)
    return schema.from_notebook({**defaults, **values})


@cache  # a grid reads one notebook for thousands of cells
def _schema_and_defaults(text: str) -> tuple[type[RunConfig], dict[str, Any]]:
    """What checks a notebook's parameters, and the values it sets itself, from its file's text.

    Raises:
        ValueError, SyntaxError: with what is wrong, to be put after the notebook's name.
    """
    try:
        cells = json.loads(text)["cells"]
        sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
        tagged = [
            "".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", ())
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"is no readable notebook: {error!r}") from error
    names = re.findall(r"\bruns\.(\w+)\.from_notebook\(globals\(\)\)", "\n".join(sources))
    if len(tagged) != 1 or len(names) != 1:
        raise ValueError(
            "has no cell tagged 'parameters', or none that checks them as "
            "pai_utils.runs.<Name>Config.from_notebook(globals())"
        )
    schema = globals().get(names[0])
    if not (isinstance(schema, type) and issubclass(schema, RunConfig)):
        raise ValueError(f"checks its parameters by {names[0]}, which pai_utils lacks")
    return schema, _assignments(tagged[0])


def _assignments(source: str) -> dict[str, Any]:
    """The names that a cell of plain assignments defines, without running it."""
    return {
        target.id: ast.literal_eval(statement.value)
        for statement in ast.parse(source).body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }


def _problem(details: ErrorDetails) -> str:
    """What is wrong with which parameter, from an entry of pydantic's errors."""
    if details["type"] == "value_error":  # raised by this module, in whole sentences
        text = str(details["ctx"]["error"])
    elif details["type"] == "missing":
        text = details["msg"]
    else:
        text = f"{details['msg']}, not {details['input']!r}"
    # A check of several parameters together is at no place.
    return ": ".join(filter(None, (".".join(map(str, details["loc"])), text)))


def _read_text(value: Any) -> Any:
    """A list or mapping written as text, such as ``"[0.4, 1e-4]"`` or ``"[digits, photos]"``.

    Anything else is returned as it is, for the schema to judge.
    """
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    # JSON first: YAML takes 1e-4, without a point, for text.
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        pass
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


class PrunePerTaskConfig(NotebookConfig):
    """Parameters of the notebook ``prune_per_task``."""

    sources: list[TaskName] = Field(min_length=2)
    scorers: list[ScorerName] = Field(min_length=1)
    sparsity: Sparsity

    @field_validator("scorers")
    @classmethod
    def _one_needs_data(cls, scorers: list[str]) -> list[str]:
        # The notebook compares the masks that one of them makes of different tasks.
        if not any(SCORERS[name].needs_data for name in scorers):
            valid = [name for name, scorer in SCORERS.items() if scorer.needs_data]
            raise ValueError(
                f"none of {', '.join(scorers)} looks at a task; add at least one of: "
                + ", ".join(valid)
            )
        return scorers


class ScorerAtlasConfig(NotebookConfig):
    """Parameters of the notebook ``scorer_atlas``."""

    sources: list[TaskName] = Field(min_length=2)
    scorers: list[ScorerName] = Field(min_length=2)
    sparsities: list[Sparsity] = Field(min_length=1)
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    options: dict[ScorerName, dict[str, Any]] = {}  #: a scorer's own keywords, or its samples

    @model_validator(mode="after")
    def _known_options(self) -> Self:
        for scorer, options in self.options.items():
            if scorer not in self.scorers:
                raise unknown_name("scorer of options", scorer, self.scorers)
            valid = [*SCORERS[scorer].options, "samples", "batch_size"]
            for option in options:
                if option not in valid:
                    raise unknown_name(f"option of {scorer}", option, valid)
        return self


class _Masks(NotebookConfig):
    """Parameters of masks of several sparsities."""

    sparsities: list[Sparsity] = Field(min_length=1)
    scope: str = "global"  #: as in `pai_utils.make_mask`
    rounds: int = 1  #: in which a mask is reached, each with its repair

    @model_validator(mode="after")
    def _scope_and_rounds_fit(self) -> Self:
        for sparsity in self.sparsities:
            check_rounds(self.rounds, sparsity, self.scope)
        return self


class ZeroShotRetentionConfig(_Masks):
    """Parameters of the notebook ``zero_shot_retention``."""

    #: One or several, as of `pai_utils.sources`.
    source: Annotated[str | list[str], AfterValidator(_known_sources)]
    targets: list[TaskName] = Field(min_length=1)
    scorers: list[ScorerName] = Field(min_length=1)
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    compensations: list[Compensation] = Field(default=["none"], min_length=1)
    compensation_options: dict[CompensationOption, bool | float | int] = {}
    heads: Annotated[str, _one_of("kind of head", HEADS)] = "linear"  #: or "text", of class names
    precision: Precision = "float32"  #: of the forwards that measure accuracy

    @field_validator("compensations")
    @classmethod
    def _plain_masks_too(cls, compensations: list[str]) -> list[str]:
        if "none" not in compensations:
            raise ValueError("masks without compensation are what others are seen beside; add none")
        return compensations

    @model_validator(mode="after")
    def _unseen_tasks(self) -> Self:
        for source in self.sources:
            if not any(is_held_out(task, source) for task in self.tasks):
                raise ValueError(f"the only target is the source {source}; add an unseen task")
        return self

    @property
    def sources(self) -> list[str]:
        """The source tasks, always as a list."""
        return [self.source] if isinstance(self.source, str) else self.source

    @property
    def tasks(self) -> list[str]:
        """Tasks among the sources, and targets, each once, in that order."""
        parts = [part for source in self.sources for part in source.split("+")]
        seen = [task_of(part) for part in parts if part not in IMAGE_SETS]
        return list(dict.fromkeys([*seen, *self.targets]))


class _OneSource(NotebookConfig):
    """Parameters of a source and the tasks beside it."""

    source: TaskName
    targets: list[TaskName] = Field(min_length=1)

    @property
    def tasks(self) -> list[str]:
        """Source and targets, each once, the source first."""
        return list(dict.fromkeys([self.source, *self.targets]))


class _Repaired(_Masks, _OneSource):
    """Parameters of masks of one source, and of the repair that follows them."""

    #: Images to prune and repair by, as of `pai_utils.sources`; the source's own by default.
    prune_by: Annotated[str | None, AfterValidator(_known_pool)] = None
    compensation: Compensation = "layerwise+moments"
    compensation_options: dict[CompensationOption, bool | float | int] = {}

    @model_validator(mode="after")
    def _held_out(self) -> Self:
        pool = self.prune_by or self.source
        seen = [t for t in self.targets if t != self.source and not is_held_out(t, pool)]
        if seen:
            raise ValueError(f"prune_by={pool} looks at the target {seen[0]}, which is held out")
        if self.source not in map(task_of, pool.split("+")):
            raise ValueError(f"prune_by={pool} has no part of the source {self.source}")
        return self


class FinetuneRecoveryConfig(_Repaired):
    """Parameters of the notebook ``finetune_recovery``, whose start ``repaired`` has the repair."""

    scorer: ScorerName
    starts: list[Start] = Field(min_length=1)
    penalties: dict[PenaltyName, Strength] = {"none": 0.0}  #: with their strengths
    optimiser: Annotated[str, _one_of("optimiser", OPTIMISERS)] = "sgd"
    schedule: Annotated[str, _one_of("schedule", SCHEDULES)] = "constant"  #: of the rate
    learning_rates: list[Rate] = Field(min_length=1)
    steps: list[Annotated[int, Field(ge=0)]] = Field(min_length=2)  #: when tasks are evaluated
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    finetune_batch_size: Positive = 32

    @field_validator("penalties")
    @classmethod
    def _plain_too(cls, penalties: dict[str, float]) -> dict[str, float]:
        if "none" not in penalties:
            raise ValueError("runs without a penalty are what others are seen beside; add none")
        return {"none": 0.0, **penalties}  # first, whatever order a file gave


class PruneYourOwnConfig(_Repaired):
    """Parameters of the notebook ``prune_your_own``."""

    scorers: list[ScorerName] = Field(min_length=1)
    tolerance: Annotated[float, Field(ge=0, le=1)] = 0.05  #: of the accuracy above chance
    finetune_steps: Annotated[int, Field(ge=0)] = 0
    learning_rate: Rate = 1e-5
    finetune_batch_size: Positive = 32
    formats: list[Annotated[str, _one_of("format", FORMATS)]] = Field(
        default=list(FORMATS), min_length=1
    )

    @model_validator(mode="after")
    def _something_unseen(self) -> Self:
        if self.tasks == [self.source]:
            raise ValueError(f"the only target is the source {self.source}; add an unseen task")
        return self


class LandscapeAnalysisConfig(_OneSource):
    """Parameters of the notebook ``landscape_analysis``."""

    scorers: list[ScorerName] = Field(min_length=1)  #: the first one is looked at closely
    sparsities: list[Sparsity] = Field(min_length=1)  #: as is the last
    fractions: list[Fraction] = Field(min_length=2)  #: of the pruning step
    block_size: Positive = 64  #: weights a block of the Gauss-Newton matrix
    eigenvectors: Positive = 5  #: of each task's, to compare
    products: Positive = 30  #: most to take for them
    # Weights of the same architecture to set beside the encoder's, and how the last are trained.
    comparisons: list[Annotated[str, _one_of("comparison", COMPARISONS)]] = []
    brief_steps: Positive = 30
    brief_learning_rate: Rate = 1e-3
    spectrum_samples: Positive | None = 64  #: images a Hessian product; None: all
    probes: Annotated[int, Field(ge=2)] = 2
    lanczos_steps: Positive = 20
    compensation: Compensation = "moments"
    compensation_options: dict[CompensationOption, bool | float | int] = {}
    finetune_steps: Positive = 10
    learning_rate: Rate = 1e-5
    path_points: Positive = 4  #: of each line
    plane_points: Annotated[int, Field(ge=2)] = 9  #: of a side
    plane_images: Positive | None = 60  #: a task; None: all test images

    @field_validator("fractions")
    @classmethod
    def _whole_step(cls, fractions: list[float]) -> list[float]:
        if 1 not in fractions:
            raise ValueError("the full step is what is compared with accuracies; add 1.0")
        return fractions

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.eigenvectors > self.products:
            raise ValueError(
                f"{self.eigenvectors} eigenvectors need as many products; got {self.products}"
            )
        if len(self.tasks) < 2:
            raise ValueError(f"the only target is the source {self.source}; add an unseen task")
        return self


class RunRecord(BaseModel):
    """What ``record.json`` of a run holds; a notebook may add entries."""

    model_config = ConfigDict(extra="allow")

    notebook: str
    parameters: dict[str, Any]  #: seeds among them
    started: datetime
    seconds: Annotated[float, Field(ge=0)]
    peak_memory_mib: Annotated[int, Field(ge=0)]
    device: str
    threads: Positive
    platform: str
    python: str
    versions: dict[str, str | None]
    commit: str | None  #: None outside a checkout
    clean: bool | None
    inputs: dict[str, Any] = {}  #: digests of images and of shared files
    outputs: dict[str, str]  #: SHA-256 by name


def read_record(folder: Path) -> RunRecord:
    """The record of a run, checked by its schema.

    Args:
        folder: of the run's files.

    Raises:
        ValueError: there is none, or it is not whole.
    """
    path = folder / "record.json"
    if not path.is_file():
        raise ValueError(f"{path}: missing")
    try:
        return RunRecord.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problems = "; ".join(map(_problem, error.errors()))
        raise ValueError(f"{path} is no record of a run: {problems}") from error


def altered_outputs(folder: Path, *, absent: bool = False) -> list[str]:
    """Files that a run wrote whose checksum is no longer that of its record.

    Args:
        folder: of the run's files.
        absent: whether missing files count.

    Raises:
        ValueError: as :func:`read_record`.
    """
    return [
        name
        for name, digest in read_record(folder).outputs.items()
        if (
            (folder / name).is_file()
            and hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest
        )
        or (absent and not (folder / name).is_file())
    ]


class Result(BaseModel):
    """A row of ``results.csv``: one task after one pruning; fractions are of one."""

    model_config = ConfigDict(extra="forbid")

    cell: str  #: the run: a cell of a grid, or the folder's name
    notebook: str
    backbone: str
    source: str  #: what the mask was computed on, or "none"
    target: str
    held_out: bool
    scorer: str
    sparsity: Annotated[float, Field(ge=0, lt=1)]
    stage: str  #: what was done after pruning
    accuracy: Annotated[float, Field(ge=0, le=1)]  #: mean over seeds
    dense_accuracy: Annotated[float, Field(ge=0, le=1)]
    chance: Annotated[float, Field(ge=0, le=1)]
    retention: float | None  #: of the dense accuracy above chance; None where that is none
    low: float | None  #: 95 % interval of the retention
    high: float | None
    count: Positive  #: test images
    seeds: Positive


RESULT_KEY = ("cell", "source", "target", "scorer", "sparsity", "stage")
"""The columns that tell the rows of ``results.csv`` apart."""

_RESULT = list(Result.model_fields)
_ROWS = TypeAdapter(list[Result])


def check_results(table: pd.DataFrame) -> pd.DataFrame:
    """A table of :class:`Result` rows, each with a key of its own; returned with their columns.

    Raises:
        ValueError: a column is missing or unknown, a value ill-typed or out of range, or two rows
            have the same :data:`RESULT_KEY`.
    """
    absent = [column for column in _RESULT if column not in table]
    if absent:
        raise ValueError(f"no table of results: there is no column {absent[0]!r}")
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    try:
        _ROWS.validate_python(rows)
    except ValidationError as error:
        (first, *others) = error.errors()
        more = f", and {len(others)} more" if others else ""
        raise ValueError(f"no table of results: row {_problem(first)}{more}") from error
    twice = table[table.duplicated(list(RESULT_KEY))]
    if len(twice):
        raise ValueError(f"no table of results: two rows of {tuple(twice.iloc[0][[*RESULT_KEY]])}")
    return table[_RESULT]


def read_results(path: Path) -> pd.DataFrame:
    """The results in a file, checked by :func:`check_results`.

    Raises:
        ValueError: as there.
    """
    try:
        texts = {n: str for n, f in Result.model_fields.items() if f.annotation is str}
        return check_results(pd.read_csv(path, dtype=texts, keep_default_na=False, na_values=[""]))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class Run:
    """One execution of a notebook: its output folder and its record.

    Args:
        name: the notebook's name.
        config: its validated parameters; ``config.out`` is the folder, made if needed.
    """

    def __init__(self, name: str, config: RunConfig) -> None:
        self.name = name
        self.config = config
        self.folder = Path(config.out)
        self._outputs: dict[str, str] = {}
        self._started = datetime.now(UTC)
        self._clock = time.perf_counter()
        # A record from an earlier run in this folder would vouch for files that are being replaced.
        (self.folder / "record.json").unlink(missing_ok=True)

    def write_table(self, name: str, table: pd.DataFrame) -> None:
        """Write ``<name>.csv`` to the run's folder: all of it or nothing."""
        self._write(f"{name}.csv", table.to_csv(index=False, float_format="%.6g").encode())

    def write_results(self, table: pd.DataFrame, stage: str = "pruned") -> None:
        """Write ``results.csv``, checked by :func:`check_results`.

        Args:
            table: one row a source, target, scorer and sparsity, as from
                :func:`pai_utils.evaluation.summarise_retention`; rows of the dense encoder are left
                out, and so are columns that no result has.
            stage: what was done after pruning, where the table has no such column.

        Raises:
            ValueError: as :func:`check_results`, or for a notebook that loads no encoder.
        """
        if not isinstance(self.config, NotebookConfig):
            raise ValueError(f"results are those of an encoder, and {self.name} loads none")
        rows = table[table.scorer != "dense"]
        rows = rows.assign(
            cell=self.folder.resolve().name,
            notebook=self.name,
            backbone=self.config.backbone,
            held_out=[is_held_out(t, s) for t, s in zip(rows.target, rows.source, strict=True)],
            **({} if "stage" in rows else {"stage": stage}),
        )
        self.write_table("results", check_results(rows[rows.columns.intersection(_RESULT)]))

    def write_figure(self, name: str, figure: Figure) -> None:
        """Write ``<name>.png`` to the run's folder: all of it or nothing."""
        from io import BytesIO

        buffer = BytesIO()
        figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
        self._write(f"{name}.png", buffer.getvalue())

    def write_mask(self, name: str, mask: Mask) -> None:
        """Write ``<name>.safetensors`` and its report ``<name>.json`` to the run's folder."""
        path = self.folder / f"{name}.safetensors"
        mask.save(path)
        self.record_files(path.name, path.with_suffix(".json").name)

    def record_files(self, *names: str) -> None:
        """Give files that were written to the run's folder a place in its record.

        Raises:
            FileNotFoundError: if one of them is not there.
        """
        for name in names:
            with (self.folder / name).open("rb") as file:
                self._outputs[name] = hashlib.file_digest(file, "sha256").hexdigest()

    def finish(self, tasks: Mapping[str, Task] | None = None, **facts: Any) -> dict[str, Any]:
        """Write ``record.json``, the last file of a run, and return its contents.

        Args:
            tasks: whose images the run took.
            facts: further entries, such as the provenance of weights.
        """
        inputs = {
            "tasks": {
                name: {part: digest_of(getattr(task, part)) for part in ("train", "test")}
                for name, task in (tasks or {}).items()
            },
            "shared": used_files(),
        }
        record: dict[str, Any] = {
            "notebook": self.name,
            "parameters": self.config.model_dump(),
            "started": self._started.isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - self._clock, 2),
            "peak_memory_mib": _peak_memory_mib(),
            **surroundings(self.config.device),
            "inputs": inputs,
            "outputs": self._outputs,
            **facts,
        }
        RunRecord.model_validate(record)
        text = json.dumps(record, indent=2, sort_keys=True, default=str)
        write_atomically(self.folder / "record.json", text.encode() + b"\n")
        return record

    def _write(self, name: str, content: bytes) -> None:
        write_atomically(self.folder / name, content)
        self._outputs[name] = hashlib.sha256(content).hexdigest()


def surroundings(device: str, packages: Sequence[str] = ()) -> dict[str, Any]:
    """What a record says of the place a run happened in.

    Args:
        device: the device asked for, or ``"auto"``.
        packages: further packages whose versions to give.
    """
    commit, clean = _commit()
    return {
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in (*_RECORDED_PACKAGES, *packages)},
        "commit": commit,
        "clean": clean,
    }


def _peak_memory_mib() -> int:
    """Peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 2**20 if sys.platform == "darwin" else peak / 2**10)


def _device_name(device: str) -> str:
    if torch.cuda.is_available() and (device == "auto" or device.startswith("cuda")):
        return torch.cuda.get_device_name(None if device == "auto" else device)
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    """The installed version; ``None`` for a library that runs from its folder."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> tuple[str | None, bool | None]:
    """Commit of the library's checkout and whether it is clean; ``None`` outside a checkout."""
    file = Path(__file__).resolve()
    # The first asks whether the library is part of the checkout, not just installed below it.
    questions = (
        ("ls-files", "--error-unmatch", file.name),
        ("rev-parse", "HEAD"),
        ("status", "--porcelain"),
    )
    try:
        _, commit, status = (
            subprocess.run(
                ["git", "-C", str(file.parent), *arguments],
                capture_output=True,
                text=True,
                check=True,
                timeout=10,
            ).stdout.strip()
            for arguments in questions
        )
    except (OSError, subprocess.SubprocessError):
        return None, None
    return commit, not status
