"""How fast: beside other packages, in forward and backward passes of the same images (FB)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from functools import cache, partial
from statistics import median
from types import MappingProxyType
from typing import Any

import torch
from torch.nn import functional as F

import pai_utils as pai
from benchmarks import registry
from benchmarks.contenders import blocks
from benchmarks.gpu.steps import SMALL, Settings, Steps
from benchmarks.job import MATH_ATTENTION, Job, run
from benchmarks.measuring import in_turns
from benchmarks.problems import Network, Problem, build
from benchmarks.results import Row
from benchmarks.tasks import Task
from pai_utils.data.images import ImageDataset, ImageTransform
from pai_utils.models.encoders import prunable_parameters

NETWORKS = {
    "vit_base_patch16_224": Network("vit_base_patch16_224", 224, convolutional=False),
    "resnet50": Network("resnet50", 224, (("zero_init_last", False),)),
    "convnext_tiny": Network("convnext_tiny", 224, (("ls_init_value", 1.0),)),
}
DIAGONALS = (
    "ggn_diagonal", "module hooks", "torch.func vmap", "BackPACK", "NNGeometry", "curvlinops",
)  # fmt: skip
PRODUCTS = (
    "HessianOperator", "GGNOperator", "double backward", "torch.func jvp of grad",
    "curvlinops Hessian",
)  # fmt: skip


@cache
def _built(name: str, count: int) -> Problem:
    return build((NETWORKS | SMALL)[name], count)


def _unchecked(
    name: str, chosen: Iterable[str] = (), subjects: Mapping[str, Any] = MappingProxyType({})
) -> Task[Any]:
    """A task whose results are looked at elsewhere, on smaller networks; all contenders or some."""
    task = registry.TASKS[name]
    chosen = chosen or task.contenders
    contenders = {key: replace(task.contenders[key], reference=None) for key in chosen}
    return replace(task, contenders=contenders, subjects={**task.subjects, **subjects})


FEW_BLOCKS, BLOCKS = "a few blocks", "resnet50's largest layer"
_PROBLEMS = {name: partial(_built, name) for name in NETWORKS | SMALL}
TASKS: dict[str, Task[Any]] = {
    "diagonal": _unchecked("diagonal", DIAGONALS, _PROBLEMS),
    "product": _unchecked("product", PRODUCTS, _PROBLEMS),
    "blocks": _unchecked("blocks", subjects={FEW_BLOCKS: lambda _: blocks.draw(32)}),
    "inputs": _unchecked("inputs"),
}
PACKAGES = sorted({c.package for t in TASKS.values() for c in t.contenders.values() if c.package})


def steps(settings: Settings) -> Steps:
    """Our own first, then what they are compared with."""
    networks = ("tiny resnet", "tiny vit") if settings.small else tuple(NETWORKS)
    count = 8 if settings.small else 128
    jobs = [
        Job("contender", task, network, contender, images=count)
        for task in ("diagonal", "product")
        for network in networks
        for contender in TASKS[task].contenders
    ]
    jobs += [
        Job("contender", "diagonal", network, "ggn_diagonal", images=images)
        for network in networks
        for images in ((16,) if settings.small else (32, 512))
    ]
    layers = list(TASKS["inputs"].subjects)[: 1 if settings.small else None]
    for task, subjects in {
        "blocks": [FEW_BLOCKS if settings.small else BLOCKS],
        "inputs": layers,
    }.items():
        jobs += [Job("contender", task, s, c) for s in subjects for c in TASKS[task].contenders]
    jobs.sort(key=lambda job: not TASKS[job.task].contenders[job.contender].ours)
    for job in jobs:
        key = f"speed/{job.task}/{job.model}/{job.contender}/{job.images}"
        yield (
            key,
            partial(measured, replace(job, device=str(settings.device), budget=settings.budget)),
        )
    network = networks[0] if not settings.small else "tiny vit"
    for what, measure in LOOPS.items():
        yield f"speed/{what}", partial(measure, network, settings)
    yield "speed/2:4", partial(semi_structured, network, settings)


@cache
def _unit(task: str, model: str, images: int, device: str, budget: float) -> Row:
    rows = run(Job("unit", task, model, images=images, device=device, budget=budget), TASKS)
    fastest = rows[0]
    assert isinstance(fastest, Row)
    return fastest


def measured(job: Job) -> list[dict[str, Any]]:
    """One contender, as a row of the benchmarks' table."""
    task, contender = TASKS[job.task], TASKS[job.task].contenders[job.contender]
    if task.in_units:
        unit = _unit(job.task, job.model, job.images, job.device, job.budget)
        memory = round(unit.memory_mib * 2**20)
        job = replace(job, layout=unit.layout, unit_memory=memory)
    network = (NETWORKS | SMALL).get(job.model)
    if contender.second_derivatives and network is not None and not network.convolutional:
        job = replace(job, contender=job.contender + MATH_ATTENTION)
    wanted = ("task", "model", "contender", "role", "step", "seconds", "fb", "memory", "memory_mib")
    rows = [asdict(row) for row in run(job, TASKS) if isinstance(row, Row)]
    return [
        {name: row[name] for name in wanted} | {"images": job.images, "verdict": "measured"}
        for row in rows
    ]


def _images(network: str, count: int, device: torch.device) -> ImageDataset:
    """Random pixels, as data in memory has them."""
    side = (NETWORKS | SMALL)[network].image_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (count,), generator=generator)
    return ImageDataset(pixels, labels, ImageTransform(side, (0.5,) * 3, (0.5,) * 3))


def _row(what: str, network: str, images: int, **found: object) -> list[dict[str, Any]]:
    row = {"task": what, "model": network, "images": images, "contender": "ours", "role": "ours"}
    return [row | {"verdict": "measured"} | found]


def _unit_of(given: Problem, data: ImageDataset, batch_size: int) -> Callable[[], object]:
    """Forward and backward of all images, which are normalised and on the device already."""
    rows = torch.arange(len(data)).split(batch_size)
    batches = [data.batch(chosen, given.device) for chosen in rows]
    weights = list(given.model.parameters())

    def unit() -> None:
        for images, labels in batches:
            torch.autograd.grad(F.cross_entropy(given.model(images), labels), weights)

    return unit


def repaired(network: str, settings: Settings) -> list[dict[str, Any]]:
    """Layer-wise repair of a mask by magnitude."""
    count = 32 if settings.small else 512
    given = _built(network, 8).to(settings.device)
    data = _images(network, count, settings.device)
    how: dict[str, Any] = {"repair": "layerwise", "samples": None, "batch_size": 64}

    def repair() -> None:
        pai.prune(given.model, data, "magnitude", 0.5, **how)

    timing = in_turns(
        repair, _unit_of(given, data, 64), settings.device, budget=settings.budget, least=1, most=3
    )
    return _row("layerwise", network, count, seconds=median(timing.seconds), fb=timing.multiple)


def trained(network: str, settings: Settings) -> list[dict[str, Any]]:
    """Fine-tuning of a pruned network for an epoch."""
    size, count = (8, 32) if settings.small else (64, 1024)
    given = _built(network, 8).to(settings.device)
    data = _images(network, count, settings.device)
    mask = pai.make_mask(pai.score("magnitude", given.model), 0.5)
    how: dict[str, Any] = {"steps": count // size, "batch_size": size, "learning_rate": 1e-6}

    def train() -> None:
        pai.finetune(given.model, data, mask, **how)

    train()
    timing = in_turns(train, _unit_of(given, data, size), settings.device, budget=settings.budget)
    return _row("fine-tuning", network, count, seconds=median(timing.seconds), fb=timing.multiple)


def evaluated(network: str, settings: Settings) -> list[dict[str, Any]]:
    """Evaluation from memory beside a bare loop of forwards."""
    size, count = (8, 32) if settings.small else (128, 2048)
    given = _built(network, 8).to(settings.device)
    data = _images(network, count, settings.device)
    batches = [data.batch(rows, settings.device)[0] for rows in torch.arange(count).split(size)]

    def bare() -> None:
        with torch.inference_mode():
            for batch in batches:
                given.model(batch)

    def evaluate() -> None:
        pai.evaluate(given.model, data, batch_size=size)

    evaluate()
    timing = in_turns(evaluate, bare, settings.device, budget=settings.budget)
    rate = 1 / timing.multiple
    return _row("evaluation", network, count, seconds=median(timing.seconds), of_bare=rate)


LOOPS = {"layerwise": repaired, "fine-tuning": trained, "evaluation": evaluated}


def semi_structured(network: str, settings: Settings) -> list[dict[str, Any]]:
    """Forwards with 2:4 weights on the sparse cores, beside dense ones, in float16."""
    if settings.device.type != "cuda":
        note = "sparse cores are those of a CUDA device"
        return _row("2:4", network, 0, verdict="not measured", note=note)
    model = _built(network, 8).to(settings.device).model.half()
    names = [name for name in prunable_parameters(model) if model.get_parameter(name).dim() == 2]
    mask = pai.make_mask(pai.score("magnitude", model, names=names), scope="2:4", sparsity=0.5)
    mask.apply_(model)
    sparse, dense = pai.to_semi_structured(model, mask)
    side = NETWORKS[network].image_size
    images = torch.randn(128, 3, side, side, device=settings.device).half()

    @torch.inference_mode()
    def forward(network: torch.nn.Module) -> object:
        return network(images)

    steps = partial(forward, sparse), partial(forward, model)
    timing = in_turns(*steps, settings.device, budget=settings.budget)
    factor, seconds = 1 / timing.multiple, median(timing.seconds)
    note = f"{factor:.2f} times as fast; {len(dense)} weights stay dense"
    return _row("2:4", network, 128, seconds=seconds, factor=factor, note=note)
