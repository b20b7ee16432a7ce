"""The study of zero-shot retention: its parameters."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from pai_utils.data.mixtures import IMAGE_SETS, is_held_out, task_of
from pai_utils.heads import HEADS
from pai_utils.studies.parameters import (
    Masks,
    Precision,
    Repair,
    RepairOption,
    ScorerName,
    TaskName,
    known_sources,
    one_of,
)


class Parameters(Masks):
    """Parameters of the notebook ``zero_shot_retention``."""

    #: One or several, as of `pai_utils.data.mixtures`.
    source: Annotated[str | list[str], AfterValidator(known_sources)]
    targets: list[TaskName] = Field(min_length=1)
    scorers: list[ScorerName] = Field(min_length=1)
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    repairs: list[Repair] = Field(default=["none"], min_length=1)
    repair_options: dict[RepairOption, bool | float | int] = Field(default={})
    heads: Annotated[str, one_of("kind of head", HEADS)] = "linear"  #: or "text", of class names
    precision: Precision = "float32"  #: of the forwards that measure accuracy

    @field_validator("repairs")
    @classmethod
    def _plain_masks_too(cls, repairs: list[str]) -> list[str]:
        if "none" not in repairs:
            raise ValueError("masks without repair are what others are seen beside; add none")
        return repairs

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
