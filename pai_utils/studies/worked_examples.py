"""The parameters of the worked examples."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pai_utils.studies.parameters import Fraction, Positive, RunParameters


class Parameters(RunParameters):
    """Parameters of the notebook ``worked_examples``, whose networks are its own."""

    fractions: list[Fraction] = Field(min_length=2)  #: of the pruning step
    correlation: Annotated[float, Field(gt=0, lt=1)]  #: of two weights' effects
    draws: Positive = 100  #: labels a sample, where they are drawn from the model
