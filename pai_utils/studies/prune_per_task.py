"""The study of masks of single tasks: its parameters."""

from __future__ import annotations

from pydantic import Field, field_validator

from pai_utils.scorers import SCORERS
from pai_utils.studies.parameters import EncoderParameters, ScorerName, Sparsity, TaskName


class Parameters(EncoderParameters):
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
