"""What a study works on: an encoder, tasks, a head for each, and sources to prune by."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pai_utils.data.images import ImageDataset
from pai_utils.data.mixtures import (
    ALTERED,
    IMAGE_SETS,
    RANDOM_LABELS,
    UNLABELLED_IMAGES,
    load_mixture,
    source_parts,
    task_of,
)
from pai_utils.data.tasks import Task
from pai_utils.heads import fit_head
from pai_utils.models.encoders import Backbone, Classifier
from pai_utils.pruning import Pruned, prune
from pai_utils.repair.methods import parse_repair
from pai_utils.scorers import SCORERS, Scores, score


@dataclass(frozen=True)
class Source:
    """Images to prune by."""

    name: str
    images: ImageDataset
    """Of all parts; labels are -1 where there is no single task."""
    labelled: ImageDataset | None
    """Of the first task among the parts."""
    head: nn.Linear | None
    """Of that task."""

    def images_for(self, scorer: str) -> ImageDataset:
        """What a scorer looks at: the first task's where it needs a head, or else all parts'."""
        if SCORERS[scorer].needs_head and self.labelled is not None:
            return self.labelled
        return self.images

    def samples_for(self, scorer: str, samples: int | None) -> int | None:
        """How many of them: at most all of the first task's, where there are more in all parts."""
        data = self.images_for(scorer)
        if data is self.images or samples is None:
            return samples
        return min(samples, len(data))

    def images_to_repair_by(self, repair: str) -> ImageDataset:
        """All parts', or the first task's where gradients, hence labels, are needed."""
        if "obs" in parse_repair(repair) and self.labelled is not None:
            return self.labelled
        return self.images


def load_source(
    name: str,
    backbone: Backbone,
    tasks: Mapping[str, Task],
    heads: Mapping[str, nn.Linear],
    *,
    count: int = UNLABELLED_IMAGES,
    seed: int = 0,
) -> Source:
    """The images of a source, and the head that goes with them.

    Args:
        name: as in the module's description.
        backbone: the dense encoder, whose transform images of no task take, and on which a head
            for random labels is fitted.
        tasks: by name; only their training parts are used.
        heads: a head for each.
        count: images of each part if none of them is a task; otherwise each gives as many as the
            smallest task holds, up to 2,048.
        seed: of the images of no task, of random labels, and of what is drawn from larger parts.

    Raises:
        ValueError: for an unknown part, or one named twice.
    """
    parts = source_parts(name, tasks)
    head: nn.Linear | None = None
    labelled: ImageDataset | None = None
    first = next((part for part in parts if part not in IMAGE_SETS), None)
    if first is not None:
        task = tasks[task_of(first)]
        if first.endswith(RANDOM_LABELS):
            task = _relabelled(task, seed)
            head = fit_head(backbone, task)
        else:
            head = heads[task_of(first)]
        labelled = task.train
    if len(parts) == 1 and labelled is not None and not name.endswith(ALTERED):
        return Source(name, labelled, labelled, head)
    training = {known: task.train for known, task in tasks.items()}
    images = load_mixture(name, training, backbone.transform, count=count, seed=seed)
    return Source(name, images, labelled, head)


def score_source(
    scorer: str, model: Classifier, source: Source, *, samples: int | None = 256, **keywords: Any
) -> Scores:
    """Scores by the images of a source that has them for this scorer.

    A scorer that needs a head looks at the first task among the parts, at no more images than that
    has; the others look at all parts.

    Args:
        scorer: one that looks at data.
        model: the encoder with the source's head, or with any where the scorer needs none.
        source: what to look at.
        samples: images a score; ``None`` for all.
        keywords: others of :func:`~pai_utils.scorers.score`.

    Raises:
        ValueError: as there.
    """
    return score(
        scorer,
        model,
        source.images_for(scorer),
        samples=source.samples_for(scorer, samples),
        **keywords,
    )


def prune_source(
    scorer: str,
    model: Classifier,
    source: Source,
    sparsity: float,
    *,
    samples: int | None = 256,
    repair: str = "none",
    **keywords: Any,
) -> Pruned:
    """Prune by the images of a source that has them for this scorer and repair.

    Args:
        scorer: a key of :data:`~pai_utils.scorers.SCORERS`; what looks at no data prunes as ever.
        model: the encoder with the source's head, or with any where neither the scorer nor the
            repair needs one.
        source: what to look at; its name goes into the mask's metadata.
        sparsity: as in :func:`~pai_utils.pruning.prune`.
        samples: images a score; ``None`` for all.
        repair: as in :func:`~pai_utils.pruning.prune`; it looks at all parts, but ``obs`` at
            the first task among them.
        keywords: others of :func:`~pai_utils.pruning.prune`; not ``repair_data``, which is
            the source's.

    Returns:
        As :func:`~pai_utils.pruning.prune`.

    Raises:
        ValueError: as :func:`~pai_utils.pruning.prune`.
    """
    return prune(
        model,
        source.images_for(scorer),
        scorer,
        sparsity,
        source=source.name,
        repair=repair,
        repair_data=source.images_to_repair_by(repair),
        samples=source.samples_for(scorer, samples),
        **keywords,
    )


def _relabelled(task: Task, seed: int) -> Task:
    train = task.train
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    shuffled = ImageDataset(train.images, train.labels[order], train.transform)
    return dataclasses.replace(task, name=task.name + RANDOM_LABELS, train=shuffled)
