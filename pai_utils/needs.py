"""What runs of notebooks have in common: features, heads and scores, to be computed once.

:func:`needs` lists what a run will look for in :mod:`pai_utils.support.cache`, from its
parameters alone; :func:`make` computes one of them there. A run finds by content, not by these
names: one that needs what was not foreseen computes it itself.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, replace
from functools import cached_property
from typing import Any

from pai_utils.data.mixtures import IMAGE_SETS, task_of
from pai_utils.scorers import SCORERS
from pai_utils.studies import (
    finetune_recovery,
    landscape_analysis,
    prune_per_task,
    prune_your_own,
    scorer_atlas,
    worked_examples,
    zero_shot_retention,
)
from pai_utils.studies.parameters import RunParameters

KINDS = ("features", "head", "scores")


@dataclass(frozen=True)
class Need:
    """One thing to compute: features or a head of a task, or scores of a source."""

    kind: str
    backbone: str
    image_size: int | None
    pretrained: bool
    device: str
    encoder_seed: int
    source: str  # of features and heads a task
    split: str  # of features and heads
    train_size: int | None
    test_size: int | None
    scorer: str = ""
    seed: int = 0
    samples: int | None = None
    batch_size: int = 64

    @cached_property
    def name(self) -> str:
        """A file's name, readable and different for different needs."""
        size = f"-{self.image_size}px" if self.image_size else ""
        kind = f"{self.scorer}-{self.samples or 'all'}" if self.scorer else self.split
        seed = f"-seed{self.seed}" if self.scorer else ""
        readable = f"{self.backbone}{size}-{self.source}-{kind}{seed}"
        readable = re.sub(r"[^A-Za-z0-9_.-]+", "_", readable)[:120]
        matters = self.parameters
        if self.split == "train":
            del matters["test_size"]
        digest = hashlib.sha256(json.dumps(matters, sort_keys=True).encode())
        return f"{readable}-{digest.hexdigest()[:12]}"

    @property
    def parameters(self) -> dict[str, Any]:
        """All that it is made of, by name; `Need(**parameters)` is equal."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def tasks(self) -> list[str]:
        """The tasks whose images it takes."""
        parts = [part for part in self.source.split("+") if part not in IMAGE_SETS]
        return list(dict.fromkeys(map(task_of, parts)))

    @property
    def before(self) -> list[Need]:
        """Needs that this one is made from."""
        if self.kind == "features":
            return []
        if self.kind == "head":
            return [replace(self, kind="features")]
        if not SCORERS[self.scorer].needs_head:
            return []
        plain: dict[str, Any] = {f.name: f.default for f in fields(self) if f.default != MISSING}
        return [replace(self, kind="head", source=task, **plain) for task in self.tasks[:1]]


def needs(config: RunParameters) -> list[Need]:
    """What a run with these parameters reads from a shared folder, if it is there.

    Those of the pre-trained encoder only: encoders without pre-training, pruned and fine-tuned
    ones belong to a run alone.

    Raises:
        ValueError: for parameters of a notebook that has no list.
    """
    if type(config) not in _LISTS:
        raise ValueError(f"no list of needs for {type(config).__name__}")
    return list(dict.fromkeys(_LISTS[type(config)](config)))


def make(need: Need) -> None:
    """Compute a need; inside :func:`pai_utils.support.cache.keeping` it is kept.

    Raises:
        ValueError: as the functions that compute it.
    """
    from torch import nn

    from pai_utils.data.tasks import load_task
    from pai_utils.heads import dense_features, fit_head
    from pai_utils.models.loading import load_backbone
    from pai_utils.pruning import Recipe
    from pai_utils.studies.suite import Suite
    from pai_utils.support.common import device_of
    from pai_utils.support.sampling import Draw

    encoder = load_backbone(
        need.backbone,
        image_size=need.image_size,
        pretrained=need.pretrained,
        device=need.device,
        seed=need.encoder_seed,
    )
    tasks = {
        name: load_task(
            name,
            transform=encoder.transform,
            train_size=need.train_size,
            test_size=need.test_size,
            seed=need.encoder_seed,
        )
        for name in need.tasks
    }
    if need.kind == "features":
        task = tasks[need.source]
        dense_features(encoder, getattr(task, need.split), batch_size=need.batch_size)
        return
    if need.kind == "head":
        fit_head(encoder, tasks[need.source], batch_size=need.batch_size)
        return
    # Without a head of its own, any will do: the score looks at the features alone.
    heads = {name: nn.Linear(encoder.feature_dim, 2) for name in tasks}
    if SCORERS[need.scorer].needs_head:
        first = need.tasks[0]
        heads[first] = fit_head(encoder, tasks[first], batch_size=need.batch_size)
    heads = heads or {"any": nn.Linear(encoder.feature_dim, 2)}
    suite = Suite(encoder, tasks, {n: head.to(device_of(encoder)) for n, head in heads.items()})
    source = suite.source(need.source, seed=need.seed)
    draw = Draw(need.samples, need.batch_size, need.seed)
    suite.score(Recipe(need.scorer), source, draw)


def _common(config: Any, kind: str, source: str, split: str = "train", **others: Any) -> Need:
    return Need(
        kind=kind,
        backbone=config.backbone,
        image_size=config.image_size,
        pretrained=config.pretrained,
        device=config.device,
        encoder_seed=config.seed,
        source=source,
        split=split,
        train_size=config.train_size,
        test_size=config.test_size,
        **others,
    )


def _heads(config: Any, tasks: list[str]) -> Iterator[Need]:
    for task in tasks:
        yield _common(config, "features", task)
        yield _common(config, "head", task)


def _scores(
    config: Any, scorers: list[str], sources: list[str], seeds: list[int]
) -> Iterator[Need]:
    for scorer in scorers:
        if SCORERS[scorer].needs_data:
            for source in sources:
                for seed in seeds if SCORERS[scorer].seeded else seeds[:1]:
                    yield _common(
                        config,
                        "scores",
                        source,
                        scorer=scorer,
                        seed=seed,
                        samples=config.samples,
                        batch_size=config.batch_size,
                    )


def _prune_per_task(config: prune_per_task.Parameters) -> Iterator[Need]:
    yield from _heads(config, config.sources)
    yield from _scores(config, config.scorers, config.sources, [config.seed])


def _zero_shot_retention(config: zero_shot_retention.Parameters) -> Iterator[Need]:
    yield from _heads(config, config.tasks)  # also of text heads, for the gap of the protocols
    for task in config.tasks:
        yield _common(config, "features", task, "test")
    if config.heads == "linear":
        yield from _scores(config, config.scorers, config.sources, config.seeds)


def _finetune_recovery(config: finetune_recovery.Parameters) -> Iterator[Need]:
    yield from _heads(config, config.tasks)
    pool = config.prune_by or config.source
    masked = {"pruned", "repaired"} & set(config.starts)
    # All images are drawn in another order there; and the head is the source's own.
    if masked and config.samples is not None and pool.split("+")[0] == config.source:
        yield from _scores(config, [config.scorer], [pool], config.seeds)


def _landscape_analysis(config: landscape_analysis.Parameters) -> Iterator[Need]:
    yield from _heads(config, config.tasks)
    yield from _scores(config, config.scorers, config.tasks, [config.seed])


def _scorer_atlas(config: scorer_atlas.Parameters) -> Iterator[Need]:
    yield from _heads(config, config.sources)  # but no scores: what they cost is measured


def _worked_examples(config: worked_examples.Parameters) -> Iterator[Need]:
    yield from ()  # no encoder


def _prune_your_own(config: prune_your_own.Parameters) -> Iterator[Need]:
    yield from _heads(config, config.tasks)
    yield from _scores(config, config.scorers, [config.prune_by or config.source], [config.seed])


_LISTS: dict[type[RunParameters], Callable[[Any], Iterator[Need]]] = {
    prune_per_task.Parameters: _prune_per_task,
    zero_shot_retention.Parameters: _zero_shot_retention,
    finetune_recovery.Parameters: _finetune_recovery,
    landscape_analysis.Parameters: _landscape_analysis,
    scorer_atlas.Parameters: _scorer_atlas,
    worked_examples.Parameters: _worked_examples,
    prune_your_own.Parameters: _prune_your_own,
}
