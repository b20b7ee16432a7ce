"""Prune by every source, evaluate on every task."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import pandas as pd
import torch
from torch import nn

from pai_utils.data.mixtures import IMAGE_SETS, source_parts
from pai_utils.data.tasks import Task
from pai_utils.evaluation import evaluate_heads
from pai_utils.masks import Mask, make_mask
from pai_utils.models.encoders import Backbone, Classifier
from pai_utils.pruning import Recipe, prune
from pai_utils.repair.methods import Repair, parse_repair, repair_
from pai_utils.scorers import SCORERS, Scores, score
from pai_utils.studies.suite import Source, load_source, prune_source, score_source
from pai_utils.support.common import check_names, progress


@dataclass(frozen=True)
class SweepMask:
    """One mask of a :func:`retention_sweep`, and what made it."""

    scorer: str
    source: str  #: "none" for a scorer that looks at no data
    seed: int
    sparsity: float
    scores: Scores
    mask: Mask


def retention_sweep(
    backbone: Backbone,
    tasks: Mapping[str, Task],
    heads: Mapping[str, nn.Linear],
    sources: Sequence[str],
    *,
    scorers: Sequence[str] = ("ggn_diag", "magnitude", "random"),
    sparsities: Sequence[float] = (0.2, 0.4, 0.6, 0.8),
    seeds: Sequence[int] = (0, 1, 2),
    samples: int | None = 256,
    scope: str = "global",
    rounds: int = 1,
    batch_size: int = 64,
    precision: str = "float32",
    options: Mapping[str, Mapping[str, Any]] | None = None,
    repairs: Sequence[str] = ("none",),
    repair_options: Mapping[str, Any] | None = None,
    observe: Callable[[SweepMask], None] | None = None,
) -> pd.DataFrame:
    """Prune on every source, evaluate on every task with its frozen head.

    No data but the source's touches a mask, of tasks their training split. Scores are computed once
    a source, scorer and seed and shared by all sparsities. A scorer that looks at no data is run
    once and recorded under the source ``"none"``, and one that draws nothing with the first seed
    alone. Of a source with several parts a scorer that needs a head looks at the first task alone;
    repair and the others look at all.

    Args:
        backbone: the dense encoder; it is left as it is.
        tasks: by name, the sources among them.
        heads: a frozen head for each task.
        sources: what masks are computed on: a task, or parts joined by ``+`` that may also be
            images of no task (:mod:`pai_utils.data.mixtures`).
        scorers: keys of :data:`~pai_utils.scorers.SCORERS`.
        sparsities: fractions of the prunable weights to remove.
        seeds: of the scores' draws.
        samples: images a score; ``None`` for all.
        scope: as in :func:`~pai_utils.masks.make_mask`.
        rounds: in which every mask is reached, as in :func:`~pai_utils.pruning.prune`. With more
            than one nothing is shared: each repair has masks of its own.
        batch_size: images a forward.
        precision: of the forwards that measure accuracy, as in :func:`evaluate`; scores are
            computed in the encoder's own.
        options: for a scorer, keywords of its own, or others for its ``samples`` and
            ``batch_size``.
        repairs: what is done to the surviving weights of every mask, each in turn
            (:mod:`pai_utils.repair.methods`), on the source's training images. A scorer with a
            repair is named ``"scorer + repair"`` in the table, and a mask that looked
            at no data is repaired on every source.
        repair_options: keywords of :func:`~pai_utils.repair.methods.repair_`, for all of
            them; ``samples`` and ``options`` are the scores' own.
        observe: is handed every mask before it is evaluated; of one round only.

    Returns:
        One row a source, scorer, seed, sparsity and target, and the dense rows (scorer
        ``"dense"``, sparsity 0): columns ``target, source, scorer, sparsity, seed, accuracy,
        loss, count, chance, correct`` (the last one ``[count]`` bool).

    Raises:
        ValueError: for an unknown source, scorer, scope, precision, repair or option of it,
            an impossible sparsity or number of rounds, an ``observe`` with several, or a scorer
            that needs a head, or ``obs``, with a source that is no task.
    """
    for source in sources:
        parts = source_parts(source, tasks)
        if all(part in IMAGE_SETS for part in parts):
            for scorer in scorers:
                if scorer in SCORERS and SCORERS[scorer].needs_data and SCORERS[scorer].needs_head:
                    raise ValueError(
                        f"scorer {scorer!r} needs a task's head, and source {source!r} has none; "
                        "use feature_ggn_diag, or add a task to the source with a +"
                    )
            if any("obs" in parse_repair(repair) for repair in repairs):
                raise ValueError(
                    f"repair 'obs' needs labels, and source {source!r} has none; add a task "
                    "to the source with a +"
                )
    check_names("scorer", scorers, SCORERS)
    options = options or {}
    check_names("scorer of options", options, scorers)
    for sparsity in sparsities:
        Recipe(sparsity=sparsity, scope=scope, rounds=rounds).check()
    if observe is not None and rounds > 1:
        raise ValueError(f"masks of rounds={rounds} cannot be observed; use rounds=1")
    for repair in repairs:
        Repair.of(repair, repair_options or {})
    tests = {name: task.test for name, task in tasks.items()}
    pruned = copy.deepcopy(backbone)
    weights = {name: p.detach().clone() for name, p in pruned.named_parameters()}

    def rows(source: str, scorer: str, sparsity: float, seed: int) -> Iterator[dict[str, object]]:
        results = evaluate_heads(pruned, heads, tests, batch_size=batch_size, precision=precision)
        for target, result in results.items():
            mask = {"source": source, "scorer": scorer, "sparsity": sparsity, "seed": seed}
            yield {"target": target, **mask, **result.row(tasks[target].chance)}

    cells = [
        (scorer, source, seed)
        for scorer in scorers
        for source in (sources if SCORERS[scorer].needs_data else ["none"])
        for seed in (seeds if SCORERS[scorer].seeded else seeds[:1])
    ]
    table = list(rows("none", "dense", 0.0, 0))
    any_head = next(iter(heads.values()))  # for what looks at features only

    @cache
    def loaded(source: str, seed: int) -> Source:
        return load_source(source, backbone, tasks, heads, seed=seed)

    def repair_encoder_(whole: Mask, source: str, repair: str, seed: int) -> None:
        place = loaded(source, seed)
        head = place.head or any_head
        repair_(
            Classifier(pruned, head),
            Classifier(backbone, head),
            whole,
            place.images_to_repair_by(repair),
            Repair.of(repair, repair_options or {}),
            batch_size=batch_size,
            seed=seed,
        )

    def scored(scorer: str, source: str, seed: int, **keywords: Any) -> Scores:
        if not SCORERS[scorer].needs_data:
            return score(scorer, Classifier(backbone, any_head), seed=seed, **keywords)
        place = loaded(source, seed)
        model = Classifier(backbone, place.head or any_head)
        return score_source(scorer, model, place, seed=seed, **keywords)

    def prune_(
        scorer: str, source: str, sparsity: float, repair: str, seed: int, **keywords: Any
    ) -> None:
        place = None if source == "none" else loaded(source, seed)
        model = Classifier(backbone, any_head if place is None else place.head or any_head)
        shared: dict[str, Any] = {
            "scope": scope,
            "rounds": rounds,
            "repair": repair,
            "repair_options": repair_options,
            "seed": seed,
        }
        if place is None:
            found = prune(model, None, scorer, sparsity, **shared, **keywords)
        else:
            found = prune_source(scorer, model, place, sparsity, **shared, **keywords)
        pruned.load_state_dict(cast(Classifier, found.model).backbone.state_dict())

    for scorer, source, seed in progress(cells, "retention", total=len(cells)):
        keywords = {"samples": samples, "batch_size": batch_size, **options.get(scorer, {})}
        scores = scored(scorer, source, seed, **keywords) if rounds == 1 else None
        for sparsity in sparsities:
            if scores is not None:
                whole = make_mask(scores, sparsity, scope)
                mask = _encoder_part(whole)
                if observe is not None:
                    observe(SweepMask(scorer, source, seed, sparsity, scores, mask))
            for repair in repairs:
                repaired = repair != "none"
                for place_name in sources if repaired and source == "none" else [source]:
                    if scores is None:
                        prune_(scorer, place_name, sparsity, repair, seed, **keywords)
                    else:
                        mask.apply_(pruned)
                        if repaired:
                            repair_encoder_(whole, place_name, repair, seed)
                    label = f"{scorer} + {repair}" if repaired else scorer
                    table += rows(place_name, label, sparsity, seed)
                    with torch.no_grad():
                        for name, parameter in pruned.named_parameters():
                            parameter.copy_(weights[name])
    return pd.DataFrame(table)


def _encoder_part(mask: Mask) -> Mask:
    """The mask of a classifier as a mask of its encoder."""
    return Mask({name.removeprefix("backbone."): entry for name, entry in mask.items()})
