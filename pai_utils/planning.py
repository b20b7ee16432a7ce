"""What runs of notebooks will cost before they start: arithmetic, hours on a GPU, and disk.

**Estimator.** Every notebook's work is counted from its parameters in passes of one image through
the encoder; a forward and backward counts as three forwards, a scorer as `Scorer.passes` of those.
A forward's floating-point operations are counted on tensors without values
(`torch.utils.flop_counter`). Hours follow from a speed that the device sustains, in TFLOP/s.

**Error.** Left out are decoding, fitting of heads on the CPU, and whatever a scorer does beyond
forwards and backwards, such as inverting blocks. Small batches and memory traffic are in the
sustained speed, which is far below what the maker of a GPU states and differs by encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pandas as pd

from pai_utils.data.datasets import DATASETS
from pai_utils.data.mixtures import IMAGE_SETS, MOST_POOLED, UNLABELLED_IMAGES, task_of
from pai_utils.data.tasks import check_size, part_sizes
from pai_utils.needs import Need
from pai_utils.repair.methods import REPAIR_SAMPLES, parse_repair
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
from pai_utils.studies.parameters import EncoderParameters, RunParameters
from pai_utils.support.common import progress

DEFAULT_TFLOPS = 20.0
"""Sustained by a data-centre GPU in float32 with TensorFloat-32, by order of magnitude."""
_BACKWARD = 2  # forwards
_FIGURES_MIB = 2.0
_LIBRARIES_MIB = 1200.0
_PRODUCTS_MIB = 1000.0  # of layers' inputs, to solve for weights
_BLOCKS_MIB = 4096.0  # at most, of the sums of Fisher blocks
_TABLE_ROW_BYTES = 120
_HVP, _GGN = 3.1, 2.5  # forwards and backwards of a product
_SHARED, _DIRECTION = 3.0, 2.0  # of the terms along several directions, and of each
_BRIEF_BATCH = 32
_DENSITY_ROWS = 500


@dataclass
class _Work:
    """What a cell does, counted in images."""

    forwards: float = 0.0
    rows: int = 0  # of tables
    masks: int = 0  # kept as files
    copies: float = 12.0  # of the encoder's weights, at once in memory
    block_size: int = 0  # of Fisher blocks; 0: none
    products_mib: float = 0.0  # of other products, beside

    def train(self, images: float) -> None:
        """Forward and backward."""
        self.forwards += (1 + _BACKWARD) * images


def plan(cells: Mapping[str, RunParameters], *, tflops: float = DEFAULT_TFLOPS) -> pd.DataFrame:
    """Estimate every cell of a grid.

    Args:
        cells: the validated parameters of each notebook to run, by the cell's name.
        tflops: 10¹² floating-point operations a second that the device sustains.

    Returns:
        One row a cell, with `cell`, `backbone`, `images` (passes of one image, in forwards),
        `pflop` (10¹⁵ operations), `hours`, `results_mib` (tables, figures and masks), `pixels_mib`
        (decoded images, shared by the cells of one task and size) and `memory_mib` (of the
        process, or of a GPU and the process). A notebook that loads no encoder has an empty
        `backbone`, and its work is not counted.

    Raises:
        ValueError: parameters of a notebook that has no estimate, an unknown encoder, more images
            than a part of a task has, or `tflops` not above 0.
        FileNotFoundError: a folder of images that does not exist.
    """
    if not tflops > 0:
        raise ValueError(f"tflops must be above 0, got {tflops}")
    rows = []
    for name, config in progress(cells.items(), "planning", total=len(cells)):
        if type(config) not in _COUNTS:
            raise ValueError(f"cell {name!r}: no estimate for {type(config).__name__}")
        try:
            work = _COUNTS[type(config)](config)
        except ValueError as error:
            raise ValueError(f"cell {name!r}: {error}") from error
        if not isinstance(config, EncoderParameters):
            rows.append(
                {"cell": name, "backbone": "", "images": 0.0, "pflop": 0.0, "hours": 0.0}
                | {"results_mib": _FIGURES_MIB, "pixels_mib": 0.0, "memory_mib": _LIBRARIES_MIB}
            )
            continue
        encoder = _encoder(config.backbone, config.image_size)
        flop = work.forwards * encoder.forward_flop
        images = sum(sum(_sizes(task, config).values()) for task in _tasks(config))
        rows.append(
            {
                "cell": name,
                "backbone": config.backbone,
                "images": work.forwards,
                "pflop": flop / 1e15,
                "hours": flop / (tflops * 1e12) / 3600,
                "results_mib": _FIGURES_MIB
                + (work.rows * _TABLE_ROW_BYTES + work.masks * encoder.prunable) / 2**20,
                "pixels_mib": images * 3 * encoder.side**2 / 2**20,
                "memory_mib": encoder.memory_mib(work.copies, config.batch_size, images)
                + work.products_mib
                + min(8 * work.block_size * encoder.prunable / 2**20, _BLOCKS_MIB),
            }
        )
    return pd.DataFrame(rows)


def plan_need(need: Need, *, tflops: float = DEFAULT_TFLOPS) -> dict[str, float]:
    """Estimate what runs have in common (:mod:`pai_utils.needs`): `hours` and `memory_mib`.

    Args:
        need: what is to be computed.
        tflops: as in :func:`plan`.
    """
    encoder = _encoder(need.backbone, need.image_size)
    images = sum(sum(_sizes(task, need).values()) for task in need.tasks)
    forwards: float = images
    if need.kind == "scores":
        passes = SCORERS[need.scorer].passes(SCORERS[need.scorer].options)
        forwards += 3 * passes * (need.samples or images)
    return {
        "hours": forwards * encoder.forward_flop / (tflops * 1e12) / 3600,
        "memory_mib": encoder.memory_mib(6.0, need.batch_size, images),
    }


def downloads(cells: Iterable[RunParameters]) -> dict[str, int]:
    """The data sets on disk that runs need, each once, with their megabytes."""
    encoders = [config for config in cells if isinstance(config, EncoderParameters)]
    names = dict.fromkeys(name for config in encoders for name in _tasks(config))
    return {name: DATASETS[name].megabytes for name in names if name in DATASETS}


@dataclass(frozen=True)
class _Encoder:
    side: int
    forward_flop: float
    prunable: int
    weights: int
    activations: int  # numbers that the layers of one image's forward give

    def memory_mib(self, copies: float, batch_size: int, images: int) -> float:
        """Of a process: libraries, copies of the weights, two batches' activations, and pixels."""
        numbers = copies * self.weights + 2 * batch_size * self.activations
        return _LIBRARIES_MIB + (4 * numbers + images * 3 * self.side**2) / 2**20


@cache
def _encoder(name: str, image_size: int | None) -> _Encoder:
    """Count a forward of one image; random weights do, since values do not matter."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from pai_utils.models.encoders import prunable_parameters
    from pai_utils.models.loading import load_backbone

    if name.startswith("file:"):
        name = name.rpartition("@")[2]
    backbone = load_backbone(name, image_size=image_size, device="cpu", pretrained=False)
    side = backbone.image_size
    backbone = backbone.to("meta")
    given = 0

    def count(_module: object, _inputs: object, output: object) -> None:
        nonlocal given
        if isinstance(output, torch.Tensor):
            given += output.numel()

    for module in backbone.modules():
        if not list(module.children()):
            module.register_forward_hook(count)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(torch.empty(1, 3, side, side, device="meta"))
    weights = sum(parameter.numel() for parameter in backbone.parameters())
    prunable = sum(backbone.get_parameter(n).numel() for n in prunable_parameters(backbone))
    return _Encoder(side, float(counter.get_total_flops()), prunable, weights, given)


def _sizes(name: str, config: Any) -> dict[str, int]:
    sizes = part_sizes(name)
    for split, wanted in (("train", config.train_size), ("test", config.test_size)):
        if wanted is not None:
            check_size(wanted, sizes[split], split, name)
            sizes = {**sizes, split: wanted}
    return sizes


def _tasks(config: Any) -> list[str]:
    names: list[str] = config.sources if not hasattr(config, "targets") else config.tasks
    return list(dict.fromkeys(names))


def _total(config: Any, split: str) -> int:
    return sum(_sizes(name, config)[split] for name in _tasks(config))


def _available(source: str, config: Any, scorer: str | None = None) -> int:
    """Images of a source; for a scorer that needs a head, those of its first task."""
    parts = source.split("+")
    sizes = [_sizes(task_of(p), config)["train"] for p in parts if p not in IMAGE_SETS]
    if len(parts) == 1 or (scorer is not None and SCORERS[scorer].needs_head):
        return sizes[0] if sizes else UNLABELLED_IMAGES
    return len(parts) * (min(MOST_POOLED, *sizes) if sizes else UNLABELLED_IMAGES)


def _drawn(source: str, config: Any, samples: int | None, scorer: str | None = None) -> int:
    available = _available(source, config, scorer)
    if samples is not None and available < _available(source, config):
        samples = min(samples, available)  # the first part alone is looked at
    if samples is not None and samples > available:
        raise ValueError(
            f"samples={samples} is more than the {available} images that {source} trains on"
        )
    return samples or available


def _score(work: _Work, config: Any, scorer: str, source: str, **options: Any) -> None:
    samples = options.pop("samples", config.samples)
    passes = SCORERS[scorer].passes({**SCORERS[scorer].options, **options})
    work.train(passes * _drawn(source, config, samples, scorer))


def _draws(config: Any, scorers: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Scorers and sources of a sweep, once a seed."""
    for scorer in scorers:
        spec = SCORERS[scorer]
        for source in config.sources if spec.needs_data else config.sources[:1]:
            for _ in config.seeds if spec.seeded else config.seeds[:1]:
                yield scorer, source


def _sweep(
    work: _Work,
    config: Any,
    scorers: Iterable[str],
    seeds: int | None = None,
    repairs: Sequence[str] = (),
    rounds: int = 1,
) -> None:
    draws = list(_draws(config, scorers))
    if seeds is not None:  # the encoder without pre-training: one seed
        draws = list(dict.fromkeys(draws))
    # More than one round leads to each mask by itself.
    scores = 1 if rounds == 1 else rounds * len(config.sparsities) * len(repairs)
    for scorer, source in draws * scores:
        _score(work, config, scorer, source, **getattr(config, "options", {}).get(scorer, {}))
    masks = len(draws) * len(config.sparsities)
    places = [
        place
        for scorer, source in draws
        for place in ([source] if SCORERS[scorer].needs_data else config.sources)
    ]
    for repair in repairs:
        parts = parse_repair(repair)
        if parts:
            work.copies, work.products_mib = 40, _PRODUCTS_MIB
        for place in places if parts else []:
            wanted = getattr(config, "repair_options", {}).get("samples")
            images = min(wanted or REPAIR_SAMPLES, _available(place, config))
            # The dense and the pruned network see the images; blocks need gradients besides.
            repaired = rounds * len(config.sparsities)
            work.forwards += 2 * images * repaired
            if "obs" in parts:
                for _ in range(repaired):
                    _score(work, config, "block_fisher", place, samples=images)
            masks += len(config.sparsities)
    work.forwards += (1 + masks) * _total(config, "test")
    work.rows += 2 * (1 + masks) * len(_tasks(config))


def _prune_per_task(config: prune_per_task.Parameters) -> _Work:
    work = _Work(forwards=_total(config, "train") + _total(config, "test"))
    for scorer in config.scorers:
        for source in config.sources if SCORERS[scorer].needs_data else config.sources[:1]:
            _score(work, config, scorer, source)
            work.forwards += _sizes(source, config)["test"]
            work.masks += 1
    work.rows = 60 * work.masks
    return work


def _zero_shot_retention(config: zero_shot_retention.Parameters) -> _Work:
    work = _Work()
    train, test = _total(config, "train"), _total(config, "test")
    # Heads, the gap of the protocols, and heads of the encoder without pre-training.
    work.forwards += (train if config.heads == "linear" else 0) + (train + 2 * test) + train
    _sweep(work, config, config.scorers, repairs=config.repairs, rounds=config.rounds)
    _sweep(work, config, config.scorers[:1], seeds=1)
    return work


def _finetune_recovery(config: finetune_recovery.Parameters) -> _Work:
    train, test = _total(config, "train"), _total(config, "test")
    work = _Work(forwards=train + test, copies=40, products_mib=_PRODUCTS_MIB)
    pool = config.prune_by or config.source
    pruned = [start for start in config.starts if start != "dense"]
    begun = len(pruned) * len(config.sparsities) + (len(config.starts) - len(pruned))
    runs_of = (begun + len(config.penalties) - 1) * len(config.seeds) * len(config.learning_rates)
    for start in config.starts:
        for _ in range(len(config.sparsities) * len(config.seeds)):
            if start in ("pruned", "repaired"):
                for _ in range(config.rounds):
                    _score(work, config, config.scorer, pool)
            if start == "repaired":
                wanted = config.repair_options.get("samples") or REPAIR_SAMPLES
                work.forwards += config.rounds * 2 * min(int(wanted), _available(pool, config))
    for _ in range(runs_of):
        work.train(max(config.steps) * config.finetune_batch_size)
        # Validation beside the tests, and the last step again, with heads fitted anew.
        validation = _sizes(config.source, config)["validation"]
        work.forwards += len(config.steps) * (test + validation) + test + train
        work.rows += (len(config.steps) + 1) * (len(config.tasks) + 1)
    return work


def _landscape_analysis(config: landscape_analysis.Parameters) -> _Work:
    work = _Work()
    _study(work, config, config.scorers, len(config.sparsities), len(config.fractions))
    for name in config.comparisons:
        if name == "trained":
            work.forwards += _sizes(config.source, config)["train"]  # its head
            work.train(_BRIEF_BATCH * config.brief_steps)
        _study(work, config, config.scorers[:1], 1, 1)
    networks = 4  # dense, pruned, repaired, fine-tuned
    images = _drawn(config.source, config, config.spectrum_samples)
    work.train(networks * config.probes * config.lanczos_steps * _HVP * images)
    work.rows += networks * _DENSITY_ROWS
    _score(work, config, config.scorers[0], config.source)
    work.forwards += 2 * min(
        config.repair_options.get("samples", REPAIR_SAMPLES),
        _available(config.source, config),
    )
    work.train(config.finetune_steps * config.batch_size)
    path = 2 * config.path_points + 1
    work.forwards += path * _total(config, "test")
    shown = [_sizes(task, config)["test"] for task in config.tasks[:2]]
    points = 2 * config.plane_points**2
    work.forwards += points * sum(min(config.plane_images or n, n) for n in shown)
    work.rows += path * len(config.tasks) + points * len(shown)
    return work


def _study(
    work: _Work, config: Any, scorers: Iterable[str], sparsities: int, fractions: int
) -> None:
    """Of :func:`pai_utils.studies.landscape_analysis.study`."""
    masks = 0
    for scorer in scorers:
        sources = config.tasks if SCORERS[scorer].needs_data else config.tasks[:1]
        for source in sources:
            _score(work, config, scorer, source)
        masks += len(sources) * sparsities
    # Steps to each mask and their padded copies, beside the scores and the eigenvectors.
    work.copies = max(work.copies, 16 + 4 * masks + config.products)
    work.forwards += _total(config, "train") + (1 + masks) * _total(config, "test")
    for target in config.tasks:
        images = _drawn(target, config, config.samples)
        # Shared by all directions, then of each; per-sample gradients; products for eigenpairs.
        work.train((_SHARED + _DIRECTION * masks + 2 + _GGN * config.products) * images)
        work.forwards += (1 + masks * fractions) * images
    work.rows += masks * len(config.tasks) * (fractions + 2)


def _scorer_atlas(config: scorer_atlas.Parameters) -> _Work:
    work = _Work(forwards=_total(config, "train"))
    if "block_fisher" in config.scorers:
        work.block_size = config.options.get("block_fisher", {}).get("block_size", 64)
    _sweep(work, config, config.scorers)
    return work


def _worked_examples(config: worked_examples.Parameters) -> _Work:
    return _Work()  # networks of a few weights


def _prune_your_own(config: prune_your_own.Parameters) -> _Work:
    train, test = _total(config, "train"), _total(config, "test")
    work = _Work(forwards=train + 2 * test, copies=40, products_mib=_PRODUCTS_MIB)
    pool = config.prune_by or config.source
    wanted = int(config.repair_options.get("samples") or REPAIR_SAMPLES)
    repaired = min(wanted, _available(pool, config)) if config.repair != "none" else 0
    repaired *= config.rounds
    validation = _sizes(config.source, config)["validation"]
    for scorer in config.scorers:
        for _ in range(1 if config.rounds == 1 else config.rounds * len(config.sparsities)):
            _score(work, config, scorer, pool)
        work.forwards += len(config.sparsities) * (2 * repaired + validation)
    for _ in range(config.rounds):  # the chosen one, once more
        _score(work, config, config.scorers[0], pool)
    work.forwards += 2 * repaired + 3 * validation
    if config.finetune_steps:
        work.train(config.finetune_steps * config.finetune_batch_size)
        work.forwards += test
    work.rows = len(config.scorers) * len(config.sparsities) + 2 * len(config.tasks)
    work.masks = 1 + 4 * len(config.formats)  # a mask's byte a weight, and at most its four
    return work


_COUNTS: dict[type[RunParameters], Callable[[Any], _Work]] = {
    prune_per_task.Parameters: _prune_per_task,
    zero_shot_retention.Parameters: _zero_shot_retention,
    finetune_recovery.Parameters: _finetune_recovery,
    landscape_analysis.Parameters: _landscape_analysis,
    scorer_atlas.Parameters: _scorer_atlas,
    worked_examples.Parameters: _worked_examples,
    prune_your_own.Parameters: _prune_your_own,
}
