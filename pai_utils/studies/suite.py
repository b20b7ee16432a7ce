"""What a study works on: an encoder, tasks, their heads, and sources; and sweeps over recipes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from typing import Any, Self, cast

import pandas as pd
import torch
from torch import nn

from pai_utils.data import mixtures
from pai_utils.data.images import ImageDataset
from pai_utils.data.tasks import Task, load_task
from pai_utils.evaluation import Evaluation, evaluate_heads, summarise_retention
from pai_utils.finetuning import finetune
from pai_utils.heads import fit_head, make_heads
from pai_utils.masks import Mask
from pai_utils.models.encoders import Backbone, Classifier, prunable_parameters
from pai_utils.models.loading import load_backbone
from pai_utils.pruning import Recipe, follow
from pai_utils.repair.methods import parse_repair
from pai_utils.scorers import Scores, find_scorer, score
from pai_utils.studies.parameters import EncoderParameters
from pai_utils.support.common import copied, device_of, progress
from pai_utils.support.sampling import Draw


@dataclass(frozen=True)
class Source:
    """Images to prune by."""

    name: str
    images: ImageDataset  #: of all parts; labels are -1 where there is no single task
    labelled: ImageDataset | None  #: of the first task among the parts
    head: nn.Linear | None  #: of that task

    def part(self, *, alone: bool) -> ImageDataset:
        """The images of all parts, or of the first task alone where there is one."""
        return self.labelled if alone and self.labelled is not None else self.images


@dataclass(frozen=True)
class Suite:
    """A dense encoder, tasks, and a frozen head for each task.

    Examples:
        >>> import pai_utils as pai
        >>> from pai_utils.studies.prune_per_task import Parameters
        >>> config = Parameters(
        ...     backbone="efficientnet_lite0", image_size=32, train_size=60, test_size=20,
        ...     sources=["digits", "photos"], scorers=["snip"], sparsity=0.5, out="results",
        ... )
        >>> suite = pai.Suite.load(config)
        >>> suite.classifier("photos").head.out_features == len(suite.tasks["photos"].class_names)
        True
    """

    encoder: Backbone
    tasks: Mapping[str, Task]  #: by name
    heads: Mapping[str, nn.Linear]  #: by the tasks' names

    @classmethod
    def load(cls, config: EncoderParameters, *, heads: str = "linear") -> Self:
        """What parameters name, with heads of a kind of :func:`~pai_utils.heads.make_heads`."""
        name, size, device, seed = config.backbone, config.image_size, config.device, config.seed
        encoder = load_backbone(name, size, device, pretrained=config.pretrained, seed=seed)
        how: dict[str, Any] = config.model_dump(include={"train_size", "test_size", "seed"})
        tasks = {name: load_task(name, encoder.transform, **how) for name in config.tasks}
        return cls(encoder, tasks, make_heads(encoder, tasks, heads, batch_size=config.batch_size))

    def untrained(self, *, seed: int = 0, batch_size: int = 64) -> Suite:
        """The same architecture at random weights, with heads of its own."""
        here, device = self.encoder, device_of(self.encoder)
        blank = load_backbone(here.name, here.image_size, device, pretrained=False, seed=seed)
        return self.with_encoder(blank, batch_size)

    def with_encoder(self, encoder: Backbone, batch_size: int = 64) -> Suite:
        """Another encoder for the same tasks, with heads fitted on its features."""
        return Suite(encoder, self.tasks, make_heads(encoder, self.tasks, batch_size=batch_size))

    @property
    def tests(self) -> dict[str, ImageDataset]:
        """The test part of each task."""
        return {name: task.test for name, task in self.tasks.items()}

    def classifier(self, task: str) -> Classifier:
        """The encoder with a task's head; neither is copied."""
        return Classifier(self.encoder, self.heads[task])

    def fine_tuned(self, encoder: Backbone, task: str, mask: Mask | None, **how: Any) -> Classifier:
        """A copy of an encoder, fine-tuned under a task's frozen head, by Adam at a falling rate.

        ``how`` are further keywords of :func:`~pai_utils.finetuning.finetune`.
        """
        model = Classifier(copied(encoder), self.heads[task])
        finetune(model, self.tasks[task].train, mask, optimiser="adam", schedule="linear", **how)
        return model

    def evaluate(self, encoder: Backbone | None = None, **how: Any) -> dict[str, Evaluation]:
        """Test accuracy of every task, by :func:`~pai_utils.evaluation.evaluate_heads`."""
        return evaluate_heads(encoder or self.encoder, self.heads, self.tests, **how)

    def rows(self, found: Mapping[str, Evaluation], **mask: object) -> list[dict[str, object]]:
        """Evaluations by task as rows of a table like :func:`sweep`'s.

        ``mask`` is its ``source, scorer, sparsity, seed`` and more; by default that of dense rows.
        """
        made = {"source": "none", "scorer": "dense", "sparsity": 0.0, "seed": 0, **mask}
        return [
            {"target": target, **made, **result.row(self.tasks[target].chance)}
            for target, result in found.items()
        ]

    def summarise_stages(self, rows: pd.DataFrame, dense: Mapping[str, Evaluation]) -> pd.DataFrame:
        """Retention beside the dense encoder, for each ``stage`` of the rows."""
        parts, reference = [], pd.DataFrame(self.rows(dense))
        for stage, group in rows.groupby("stage", sort=False):
            summary = summarise_retention(pd.concat([reference, group]))
            parts.append(summary[summary.scorer != "dense"].assign(stage=stage))
        return pd.concat(parts, ignore_index=True)

    def source(self, name: str, *, seed: int = 0) -> Source:
        """The training images of a source (:mod:`pai_utils.data.mixtures`), and their head.

        The seed is that of all that is drawn: images of no task, random labels, equal parts.
        """
        parts = mixtures.source_parts(name, self.tasks)
        first = next((part for part in parts if part not in mixtures.IMAGE_SETS), None)
        labelled, head = None, None
        if first is not None:
            task, head = self.tasks[mixtures.task_of(first)], self.heads[mixtures.task_of(first)]
            labelled = task.train
            if first.endswith(mixtures.RANDOM_LABELS):
                order = torch.randperm(len(labelled), generator=torch.Generator().manual_seed(seed))
                labelled = ImageDataset(labelled.images, labelled.labels[order], labelled.transform)
                head = fit_head(self.encoder, replace(task, name=first, train=labelled))
            if len(parts) == 1 and not name.endswith(mixtures.ALTERED):
                return Source(name, labelled, labelled, head)
        train = {known: task.train for known, task in self.tasks.items()}
        images = mixtures.load_mixture(name, train, self.encoder.transform, seed=seed)
        return Source(name, images, labelled, head)

    def score(self, recipe: Recipe, source: Source | None, draw: Draw) -> Scores:
        """Score the dense encoder's weights, as a recipe's first round does.

        A scorer that needs a head looks at the first task of the source, the others at all parts.
        One that looks at no data needs no source.
        """
        model, images, draw = self._seen(recipe, source, draw)
        names = prunable_parameters(model, recipe.include, recipe.exclude)
        return score(recipe.scorer, model, images, names=names, **asdict(draw), **recipe.options)

    def prune(
        self, recipe: Recipe, source: Source | None, draw: Draw, *, scores: Scores | None = None
    ) -> tuple[Backbone, Mask]:
        """Prune a copy of the encoder by the images of a source; its mask is one of a classifier.

        Scores are as from :meth:`score`, by default computed here. A repair looks at all parts of
        the source, but ``obs`` at the first task among them.
        """
        model, images, draw = self._seen(recipe, source, draw)
        whence: dict[str, Any] = {}
        if source is not None:
            labels = "obs" in parse_repair(recipe.repair)
            whence = {"source": source.name, "repair_data": source.part(alone=labels)}
        pruned = follow(recipe, model, images, draw, scores=scores, **whence)
        return cast(Classifier, pruned.model).backbone, pruned.mask

    def _seen(
        self, recipe: Recipe, source: Source | None, draw: Draw
    ) -> tuple[Classifier, ImageDataset | None, Draw]:
        """The encoder with the source's head, and what scores look at with it."""
        any_head = next(iter(self.heads.values()))  # for what looks at features only
        if source is None:
            return Classifier(self.encoder, any_head), None, draw
        images = source.part(alone=find_scorer(recipe.scorer).needs_head)
        return Classifier(self.encoder, source.head or any_head), images, draw.at_most(len(images))


@dataclass(frozen=True)
class SweepMask:
    """One mask of a :func:`sweep`, and what made it."""

    recipe: Recipe
    source: str  #: "none" where nothing looked at data
    seed: int
    scores: Scores  #: of the dense encoder, by which the first round prunes
    mask: Mask  #: of a classifier


def sweep(
    suite: Suite,
    sources: Sequence[str],
    recipes: Sequence[Recipe],
    draw: Draw,
    *,
    seeds: Sequence[int] | None = None,
    precision: str = "float32",
    observe: Callable[[SweepMask], None] | None = None,
) -> pd.DataFrame:
    """Prune on every source, evaluate on every task with its frozen head.

    Recipes that begin with the same scores stand next to each other and share them, computed once a
    source and seed. A scorer that looks at no data runs once, under the source ``"none"``, but its
    masks are repaired on every source; one that draws nothing runs with the first seed alone. The
    ``precision`` is that of the forwards that measure accuracy. ``observe`` is given every mask
    before it is evaluated.

    Returns:
        Columns ``target, source, scorer, sparsity, seed, accuracy, loss, count, chance, correct``
        (``[count]`` bool), one row a mask and target. The scorer is the recipe's
        :attr:`~pai_utils.pruning.Recipe.label`, or ``"dense"``, of sparsity 0.
    """
    for recipe in recipes:
        recipe.check()
        for source in sources:
            if set(mixtures.source_parts(source, suite.tasks)) <= set(mixtures.IMAGE_SETS):
                _check_needs_no_task(recipe, source)
    seeds = [draw.seed] if seeds is None else seeds
    alike = itertools.groupby(recipes, lambda r: (r.scorer, r.options, r.include, r.exclude))
    groups = [list(group) for _, group in alike]
    masks = [
        (number, source, seed, recipe, place)
        for number, group in enumerate(groups)
        for source in (sources if find_scorer(group[0].scorer).needs_data else ["none"])
        for seed in (seeds if find_scorer(group[0].scorer).seeded else seeds[:1])
        for recipe in group
        for place in (sources if source == "none" and recipe.repair != "none" else [source])
    ]

    @cache
    def loaded(name: str, seed: int) -> Source | None:
        return None if name == "none" else suite.source(name, seed=seed)

    @lru_cache(maxsize=1)  # masks of the same scores stand next to each other
    def scored(number: int, source: str, seed: int) -> Scores:
        return suite.score(groups[number][0], loaded(source, seed), replace(draw, seed=seed))

    how: dict[str, Any] = {"batch_size": draw.batch_size, "precision": precision}
    table = suite.rows(suite.evaluate(**how))
    for number, source, seed, recipe, place in progress(masks, "masks", len(masks)):
        scores, drawn = scored(number, source, seed), replace(draw, seed=seed)
        encoder, mask = suite.prune(recipe, loaded(place, seed), drawn, scores=scores)
        if observe is not None:
            observe(SweepMask(recipe, place, seed, scores, mask))
        made = {"source": place, "scorer": recipe.label, "sparsity": recipe.sparsity}
        table += suite.rows(suite.evaluate(encoder, **how), **made, seed=seed)
    return pd.DataFrame(table)


def _check_needs_no_task(recipe: Recipe, source: str) -> None:
    add = f"source {source!r} has none; add a task to it with a +"
    scorer = find_scorer(recipe.scorer)
    if scorer.needs_data and scorer.needs_head:
        raise ValueError(
            f"scorer {recipe.scorer!r} needs a task's head, and {add}, or use feature_ggn_diag"
        )
    if "obs" in parse_repair(recipe.repair):
        raise ValueError(f"repair 'obs' needs labels, and {add}")
