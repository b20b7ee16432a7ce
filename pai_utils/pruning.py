"""Prune a model: score, mask, apply, in one or several rounds."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

from torch import nn

from pai_utils.execution import Samples, logger, unknown_name
from pai_utils.masks import Mask, check_sparsity, make_mask
from pai_utils.scorers import score

COMPENSATIONS = ("none",)


@dataclass(frozen=True)
class PruningReport:
    """What a call of :func:`prune` did."""

    scorer: str
    scope: str
    sparsity: float  # reached, over all prunable weights
    layer_sparsity: dict[str, float]
    empty_layers: list[str]  # pruned to nothing
    left_out: list[str]  # parameters never pruned
    rounds: int
    seconds: float


@dataclass(frozen=True)
class Pruned:
    """A pruned copy of a model, its mask, and a report."""

    model: nn.Module
    mask: Mask
    report: PruningReport


def prune(
    model: nn.Module,
    data: Samples | None,
    scorer: str = "ggn_diag",
    sparsity: float = 0.7,
    scope: str = "global",
    *,
    rounds: int = 1,
    compensation: str = "none",
    samples: int | None = 256,
    batch_size: int = 64,
    seed: int = 0,
    **options: Any,
) -> Pruned:
    """Prune a copy of ``model``; the model itself is untouched.

    In round r of R the kept fraction is (1 − s)^(r/R), scored on the network pruned so far; a
    pruned weight never comes back.

    Args:
        model: images to logits, usually a :class:`~pai_utils.backbones.Classifier`.
        data: samples of the source task.
        scorer: a key of :data:`~pai_utils.scorers.SCORERS`.
        sparsity: fraction of the prunable weights to remove, in [0, 1).
        scope: as in :func:`~pai_utils.masks.make_mask`.
        rounds: R above.
        compensation: what is done to the surviving weights; only ``"none"`` so far.
        samples: size of the draw for the scores; ``None`` for all of ``data``.
        batch_size: samples a forward.
        seed: seed of every draw.
        options: the scorer's own keywords.

    Raises:
        ValueError: for an unknown scorer, scope, option or compensation, an impossible sparsity,
            or fewer rounds than one.
    """
    if compensation not in COMPENSATIONS:
        raise unknown_name("compensation", compensation, COMPENSATIONS)
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: at least one round is needed")
    # Before the costly scores, so that a misspelling is told at once.
    if check_sparsity(sparsity, scope) is not None and rounds > 1:
        raise ValueError(f"scope {scope!r} fixes the sparsity at once; use rounds=1 with it")
    start = time.perf_counter()
    pruned = copy.deepcopy(model)
    mask: Mask | None = None
    for step in range(1, rounds + 1):
        scores = score(
            scorer, pruned, data, samples=samples, batch_size=batch_size, seed=seed, **options
        )
        mask = make_mask(
            scores,
            # At the last step the given number itself, so that the count is exact.
            sparsity if step == rounds else 1 - (1 - sparsity) ** (step / rounds),
            scope,
            within=mask,
            metadata={
                "scorer": scorer,
                "sparsity": str(sparsity),
                "scope": scope,
                "samples": str(samples),
                "seed": str(seed),
            },
        )
        mask.apply_(pruned)
    assert mask is not None
    if mask.empty_layers:
        logger.warning("pruned to nothing: %s", ", ".join(mask.empty_layers))
    report = PruningReport(
        scorer=scorer,
        scope=scope,
        sparsity=mask.sparsity,
        layer_sparsity=mask.layer_sparsity,
        empty_layers=mask.empty_layers,
        left_out=scores.left_out,
        rounds=rounds,
        seconds=time.perf_counter() - start,
    )
    return Pruned(pruned, mask, report)
