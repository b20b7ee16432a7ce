"""Saliency scores of weights: one number a weight, higher means keep."""

from pai_utils.scorers.registry import (
    SCORERS,
    Scorer,
    Scores,
    check_options,
    find_scorer,
    score,
    shuffled,
)

__all__ = ["SCORERS", "Scorer", "Scores", "check_options", "find_scorer", "score", "shuffled"]
