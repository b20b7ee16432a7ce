"""What a cell will take, counted from its parameters before anything runs.

Work is counted in forwards of one image through the encoder. A forward and backward counts as
three, a scorer as `Scorer.cost` of those. The operations of a forward are counted on tensors
without values, and hours follow from a speed that the device sustains. Left out are decoding, fits
of heads, and what a scorer does beyond forwards and backwards, such as inverting blocks.
"""

from collections.abc import Iterable
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from pai_utils.data.datasets import DATASETS
from pai_utils.data.mixtures import IMAGE_SETS, MOST_POOLED, UNLABELLED_IMAGES, task_of
from pai_utils.data.tasks import check_size, part_sizes
from pai_utils.models.encoders import prunable_parameters
from pai_utils.models.loading import load_backbone
from pai_utils.pruning import Recipe
from pai_utils.repair.methods import Repair
from pai_utils.scorers import find_scorer
from pai_utils.studies.parameters import EncoderParameters, RunParameters, combine

LIBRARIES_MIB = 1200
FIGURES_MIB = 2.5
REPAIR_MIB = 1000  # products of layers' inputs
BLOCKS_MIB = 4096  # most of the sums of Fisher blocks


class Encoder(NamedTuple):
    """An encoder's size, and what a forward of one image takes."""

    side: int
    flop: float
    weights: int
    prunable: int
    activations: int  # numbers that its layers give


@cache
def encoder(name: str, image_size: int | None) -> Encoder:
    """Count a forward through random weights, since values do not matter."""
    name = name.rpartition("@")[2] if name.startswith("file:") else name
    backbone = load_backbone(name, image_size=image_size, device="cpu", pretrained=False)
    side, given = backbone.image_size, [0]
    for module in backbone.modules():
        if not list(module.children()):
            module.register_forward_hook(
                lambda _module, _inputs, output: given.append(getattr(output, "numel", int)())
            )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone.to("meta")(torch.empty(1, 3, side, side, device="meta"))
    prunable = sum(backbone.get_parameter(n).numel() for n in prunable_parameters(backbone))
    weights = sum(parameter.numel() for parameter in backbone.parameters())
    return Encoder(side, counter.get_total_flops(), weights, prunable, sum(given))


def sizes(name: str, config: Any) -> dict[str, int]:
    """Images of a task's parts, as many as are asked for.

    Raises:
        ValueError: it has fewer.
    """
    found = part_sizes(name)
    for split, wanted in (("train", config.train_size), ("test", config.test_size)):
        if wanted is not None:
            check_size(wanted, found[split], split, name)
            found = {**found, split: wanted}
    return found


def sources_of(config: Any) -> list[str]:
    """What the masks of a study are computed on."""
    return getattr(config, "sources", [config.pool] if hasattr(config, "pool") else config.tasks)


class Work:
    """The work of one cell, counted in images."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.images = [sizes(name, config) for name in config.tasks]
        self.train, self.test = (sum(s[split] for s in self.images) for split in ("train", "test"))
        self.forwards: float = self.train + self.test  # for heads and dense accuracies
        self.longest = 0.0  # of single scores
        self.copies = 12  # of the weights, at once in memory
        self.kept = 0  # files with a byte a weight
        self.rows = 0  # of tables

    def steps(self, images: float) -> None:
        """Forwards and backwards."""
        self.forwards += 3 * images

    def looked_at(self, source: str, samples: int | None, labelled: bool = False) -> int:
        """How many images of a source a score or a repair takes."""
        parts = source.split("+")
        found = [sizes(task_of(p), self.config)["train"] for p in parts if p not in IMAGE_SETS]
        most = len(parts) * (min(MOST_POOLED, *found, *found) if found else UNLABELLED_IMAGES)
        if found and (labelled or len(parts) == 1):
            most = found[0]
        return min(samples or most, most)

    def masks(self, recipes: Iterable[Recipe], seeds: int = 1) -> int:
        """Scores and repairs of a sweep; returns how many masks there are."""
        made, sources = 0, sources_of(self.config)
        for name, group in groupby(recipes, lambda recipe: recipe.scorer):
            alike, scorer = list(group), find_scorer(name)
            draws = seeds if scorer.seeded else 1
            # Their first round is the same.
            times = draws * (1 + sum(recipe.rounds - 1 for recipe in alike))
            for source in sources if scorer.needs_data else []:
                passes = scorer.cost(alike[0].options)
                images = passes * self.looked_at(source, self.config.samples, scorer.needs_head)
                self.longest = max(self.longest, 3 * images)
                self.steps(times * images)
            for recipe in alike:
                repaired = recipe.repair != "none"
                places = sources if repaired or scorer.needs_data else sources[:1]
                made += draws * len(places)
                self.rows += 2 * draws * len(places) * len(self.images)
                wanted = Repair.of(recipe.repair, recipe.repair_options).samples
                taken = sum(self.looked_at(place, wanted) for place in places)
                self.forwards += 2 * draws * recipe.rounds * taken * repaired
                self.copies = 40 if repaired else self.copies
        return made


def count_work(notebook: str, work: Work, config: Any) -> None:
    """Count what a notebook does beyond heads and dense accuracies."""
    recipes = config.recipes
    masks = work.masks(recipes, len(getattr(config, "seeds", [0])))
    if notebook == "prune_per_task":
        work.kept = masks
        work.forwards += masks * work.test
    elif notebook == "scorer_atlas":
        work.forwards += masks * work.test
    elif notebook == "zero_shot_retention":  # and the encoder without pre-training
        masks += work.masks(combine(config.scorers[:1], config.sparsities))
        work.forwards += masks * work.test + 2 * (work.train + work.test)
    elif notebook == "prune_your_own":  # and the chosen one
        masks += work.masks(recipes[:1])
        work.forwards += masks * work.images[0]["validation"] + work.test
        work.steps(config.finetune_steps * config.finetune_batch_size)
        work.copies, work.kept = 40, 1 + 4 * len(config.formats)
    elif notebook == "finetune_recovery":
        starts = masks + len(config.seeds) * (
            len(config.penalties) - 1 + ("dense" in config.starts)
        )
        runs, steps = starts * len(config.learning_rates), len(config.steps)
        work.steps(runs * max(config.steps) * config.finetune_batch_size)
        validation = steps * work.images[0]["validation"]
        # Heads are fitted anew at the last step.
        work.forwards += runs * ((steps + 1) * work.test + work.train + validation)
        work.copies = 40
    elif notebook == "landscape_analysis":
        studies = [masks, *(work.masks(recipes[:1]) for _ in config.comparisons)]
        for masks in studies:
            images = len(work.images) * (config.samples or work.train / len(work.images))
            # What all steps to masks share, each of them, and products for eigenvectors.
            work.steps((5 + 2 * masks + 2.5 * config.products) * images)
            work.forwards += (1 + masks * len(config.fractions)) * images
            work.forwards += work.train + masks * work.test
        work.copies = 16 + 4 * studies[0] + config.products
        spectrum = config.spectrum_samples or work.images[0]["train"]
        work.steps(4 * config.probes * config.lanczos_steps * 3.1 * spectrum)
        plane = sum(min(config.plane_images or s["test"], s["test"]) for s in work.images[:2])
        work.forwards += config.plane_points**2 * plane + 2 * config.path_points * work.test


def estimate(notebook: str, config: RunParameters, tflops: float) -> dict[str, float]:
    """Estimate one cell, on a device that sustains `tflops` 10¹² operations a second.

    Returns:
        `forwards` (of one image), `hours`, `score_hours` (of the longest score), `memory_mib` (of
        the process, or of a GPU and the process), `results_mib` and `pixels_mib` (decoded images,
        which cells of one task and size share). Without an encoder no work is counted.

    Raises:
        ValueError: an unknown encoder, or more images than a part of a task has.
        FileNotFoundError: a folder of images that does not exist.
    """
    if not isinstance(config, EncoderParameters):
        found = dict.fromkeys(("forwards", "hours", "score_hours", "pixels_mib"), 0.0)
        return {**found, "memory_mib": LIBRARIES_MIB, "results_mib": FIGURES_MIB}
    work, size = Work(config), encoder(config.backbone, config.image_size)
    count_work(notebook, work, config)
    hours = size.flop / (tflops * 1e12) / 3600  # of a forward
    pixels = sum(sum(each.values()) for each in work.images) * 3 * size.side**2
    numbers = work.copies * size.weights + 2 * config.batch_size * size.activations
    blocks = getattr(config, "options", {}).get("block_fisher", {}).get("block_size", 0)
    products = REPAIR_MIB * (work.copies == 40)
    products += min(8 * blocks * size.prunable / 2**20, BLOCKS_MIB)
    return {
        "forwards": work.forwards,
        "hours": work.forwards * hours,
        "score_hours": work.longest * hours,
        "memory_mib": LIBRARIES_MIB + (4 * numbers + pixels) / 2**20 + products,
        "results_mib": FIGURES_MIB + (120 * work.rows + work.kept * size.prunable) / 2**20,
        "pixels_mib": pixels / 2**20,
    }


def downloads(configs: Iterable[RunParameters]) -> dict[str, int]:
    """The data sets on disk that cells need, each once, with their megabytes."""
    encoders = [config for config in configs if isinstance(config, EncoderParameters)]
    names = dict.fromkeys(name for config in encoders for name in config.tasks)
    return {name: DATASETS[name].megabytes for name in names if name in DATASETS}
