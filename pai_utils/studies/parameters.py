"""Parameters that notebooks share, and how they are read and refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, ValidationError

from pai_utils.data.datasets import check_task_name
from pai_utils.data.mixtures import IMAGE_SETS, is_held_out, task_of
from pai_utils.pruning import Recipe
from pai_utils.repair.methods import REPAIR_OPTIONS, parse_repair
from pai_utils.scorers import find_scorer
from pai_utils.support.common import check_names
from pai_utils.support.sampling import Draw
from pai_utils.support.stored import located
from pai_utils.support.written import read_exponents, read_yaml


def checked(check: Callable[[Any], object]) -> AfterValidator:
    """Keep a value that a check does not refuse."""

    def keep(value: Any) -> Any:
        check(value)
        return value

    return AfterValidator(keep)


def one_of(kind: str, names: Collection[str]) -> AfterValidator:
    """A check that a parameter is one of some names."""
    return checked(lambda name: check_names(kind, [name], names))


def check_sources(names: str | list[str]) -> None:
    """Refuse a source, or one of several, with an unknown part."""
    for part in "+".join([names] if isinstance(names, str) else names).split("+"):
        if part not in IMAGE_SETS:
            check_task_name(task_of(part), unlisted=IMAGE_SETS)


# Names are looked up before a run starts, which would meet the last of them after minutes.
TaskName = Annotated[str, checked(check_task_name)]
ScorerName = Annotated[str, checked(find_scorer)]
Repair = Annotated[str, checked(parse_repair)]
RepairOptions = dict[Annotated[str, one_of("repair option", REPAIR_OPTIONS)], bool | float | int]

ScorerOptions = Annotated[dict[str, dict[str, Any]], BeforeValidator(read_exponents)]  # by scorer
Sparsity = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Rate = Annotated[float, Field(gt=0)]
Seeds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]
STUDIES = (
    "finetune_recovery",
    "landscape_analysis",
    "prune_per_task",
    "prune_your_own",
    "scorer_atlas",
    "worked_examples",
    "zero_shot_retention",
)
"""Notebooks, each with its parameters in the module of its name."""


class RunParameters(BaseModel):
    """Parameters common to all notebooks."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    device: str = "auto"
    seed: Annotated[int, Field(ge=0)] = 0
    out: Annotated[str, Field(min_length=1), AfterValidator(lambda path: str(located(path)))]

    @field_validator("*", mode="wrap")
    @classmethod
    def _read_text(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        """Read as YAML a text that does not fit as it is, and numbers such as ``1e-5`` in lists.

        Papermill's ``-p`` passes lists as text, its ``-f`` such numbers, a command line everything.
        """
        try:
            return check(value)
        except ValidationError:
            read = read_exponents(value)
            if isinstance(value, str) and value:
                with suppress(ValueError):
                    read = read_yaml(value)
            if read == value:
                raise
            return check(read)

    @classmethod
    def from_notebook(cls, namespace: Mapping[str, Any]) -> Self:
        """Validate the parameters among a notebook's ``globals()``.

        Raises:
            ValueError: for an unknown, missing or ill-typed parameter, with the valid names.
        """
        given = {
            name: value
            for name, value in namespace.items()
            if not (name.startswith("_") or name in ("In", "Out"))  # a kernel's own
            and not (isinstance(value, ModuleType) or callable(value))
        }
        fields = list(cls.model_fields)
        check_names("parameter", given, fields)
        try:
            return cls(**given)
        except ValidationError as error:
            problems = "; ".join(map(describe_problem, error.errors()))
            raise ValueError(
                f"parameters refused: {problems}. Valid parameters: {', '.join(fields)}"
            ) from error


class EncoderParameters(RunParameters):
    """Parameters common to the notebooks that load an encoder."""

    backbone: str
    image_size: Positive | None = None  #: None: the backbone's own
    pretrained: bool = True
    train_size: Positive | None = None  #: images a task; None: all
    test_size: Positive | None = None
    samples: Positive | None = 256  #: images a score, as far as there are; None: all
    batch_size: Positive = 64

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks that a run loads, each once."""
        return []

    @property
    def recipes(self) -> list[Recipe]:
        """How a run makes its masks."""
        return []

    @property
    def draw(self) -> Draw:
        """What scores look at."""
        return Draw(self.samples, self.batch_size, self.seed)

    @model_validator(mode="after")
    def _recipes_can_be_followed(self) -> Self:
        for recipe in self.recipes:
            recipe.check()
        return self


def read_parameters(notebook: Path, values: Mapping[str, Any]) -> RunParameters:
    """A notebook's parameters with ``values`` in place of its own; no other cell of it runs."""
    schema = schema_of(notebook.stem)
    try:
        defaults = _defaults(notebook.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{notebook} is no readable notebook: {error!r}") from error
    check_names("parameter", values, schema.model_fields)
    return schema.from_notebook({**defaults, **values})


def schema_of(notebook: str) -> type[RunParameters]:
    """The parameters of a notebook, found by its name."""
    check_names("notebook", [notebook], STUDIES)
    schema: type[RunParameters] = import_module(f"pai_utils.studies.{notebook}").Parameters
    return schema


@cache  # a grid reads one notebook for thousands of cells
def _defaults(text: str) -> dict[str, Any]:
    cells = json.loads(text)["cells"]
    tagged = ["".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", ())]
    if len(tagged) != 1:
        raise ValueError("it has no cell tagged 'parameters', or several")
    values: dict[str, Any] = {}
    try:  # as the kernel will: a value may be an expression
        exec(tagged[0], values)
    except Exception as error:
        raise ValueError(f"its parameters cell fails: {error!r}") from error
    return values


def describe_problem(details: ErrorDetails) -> str:
    """What is wrong with which parameter, from an entry of pydantic's errors."""
    kind, text = details["type"], details["msg"]
    if kind == "value_error":  # raised by this module, in whole sentences
        text = str(details["ctx"]["error"])
    elif kind != "missing":
        text += f", not {details['input']!r}"
    # A check of several parameters together is at no place.
    return ": ".join(filter(None, (".".join(map(str, details["loc"])), text)))


def combine(
    scorers: Sequence[str],
    sparsities: Sequence[float],
    repairs: Sequence[str] = ("none",),
    options: Mapping[str, Mapping[str, Any]] = {},
    **common: Any,
) -> list[Recipe]:
    """A recipe for each scorer, sparsity and repair, in this order, alike in all else.

    ``options`` are the scorers' own keywords, by their names.
    """
    check_names("scorer of options", options, scorers)
    return [
        Recipe(scorer, sparsity, repair=repair, options=options.get(scorer, {}), **common)
        for scorer, sparsity, repair in itertools.product(scorers, sparsities, repairs)
    ]


class SeveralSources(EncoderParameters):
    """Parameters of masks of several tasks."""

    sources: list[TaskName] = Field(min_length=2)

    @property
    def tasks(self) -> list[str]:
        """The sources, each once."""
        return list(dict.fromkeys(self.sources))


class OneSource(EncoderParameters):
    """Parameters of a source and the tasks beside it."""

    source: TaskName
    targets: list[TaskName] = Field(min_length=1)

    @property
    def tasks(self) -> list[str]:
        """Source and targets, each once, the source first."""
        return list(dict.fromkeys([self.source, *self.targets]))

    @model_validator(mode="after")
    def _something_unseen(self) -> Self:
        if self.tasks == [self.source]:
            raise ValueError(f"the only target is the source {self.source}; add an unseen task")
        return self


class Masks(EncoderParameters):
    """Parameters of masks of several sparsities."""

    sparsities: list[Sparsity] = Field(min_length=1)
    scope: str = "global"  #: as in `pai_utils.make_mask`
    rounds: int = 1  #: in which a mask is reached, each with its repair
    repair_options: RepairOptions = Field(default={})

    def combined(self, scorers: Sequence[str], repairs: Sequence[str], **how: Any) -> list[Recipe]:
        """A recipe for each scorer, sparsity and repair, as of :func:`combine`."""
        how |= {"scope": self.scope, "rounds": self.rounds, "repair_options": self.repair_options}
        return combine(scorers, self.sparsities, repairs, **how)


class RepairedMasks(Masks, OneSource):
    """Parameters of masks of one source, and of the repair that follows them."""

    #: Images to prune and repair by, as in `pai_utils.data.mixtures`; None: the source's own.
    prune_by: Annotated[str, checked(check_sources)] | None = None
    repair: Repair = "layerwise+moments"

    @property
    def pool(self) -> str:
        """The images to prune and repair by."""
        return self.prune_by or self.source

    @model_validator(mode="after")
    def _held_out(self) -> Self:
        for task in self.tasks[1:]:
            if not is_held_out(task, self.pool):
                raise ValueError(
                    f"prune_by={self.pool} looks at the target {task}, which is held out"
                )
        if self.source not in map(task_of, self.pool.split("+")):
            raise ValueError(f"prune_by={self.pool} has no part of the source {self.source}")
        return self
