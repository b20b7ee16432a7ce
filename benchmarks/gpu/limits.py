"""Hidden waits, more images than memory holds, and several processes on one device."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.multiprocessing.spawn import spawn

import pai_utils as pai
from benchmarks.gpu.right import BATCH, Result, product, score
from benchmarks.gpu.steps import Settings, Steps, problem
from benchmarks.job import relative_error
from benchmarks.problems import Problem
from pai_utils.curvature.products import GGNOperator

_FEW, _MANY = 2, 6  # batches
_CAP = 0.6  # of the memory that a batch takes
_LIMIT = 1e-4  # relative error of sums in another order


def _updates(given: Problem) -> list[float]:
    steps = len(given.labels) // BATCH
    return pai.finetune(given.model, given.data, steps=steps, batch_size=BATCH, learning_rate=1e-5)


LOOPS: dict[str, Callable[[Problem], object]] = {
    **{f"score {n}": partial(score, n) for n in ("ggn_diag", "snip", "wanda", "block_fisher")},
    "Gauss-Newton product": partial(product, GGNOperator),
    "fine-tuning": _updates,
    "evaluation": lambda given: pai.evaluate(given.model, given.data, batch_size=BATCH),
}


def steps(settings: Settings) -> Steps:
    """Waits, then memory, then processes."""
    network = "tiny resnet" if settings.small else "resnet50"
    for what in LOOPS:
        yield f"limits/waits/{what}", partial(waits, what, settings.device)
    yield "limits/memory", partial(halved, network, settings.device)
    yield "limits/processes", partial(two_processes, network, settings.device)


def waits(what: str, device: torch.device) -> list[dict[str, Any]]:
    """How often a batch makes the CPU wait for the GPU: what more batches add to the count."""
    row: dict[str, Any] = {"what": what}
    if device.type != "cuda":
        return [row | {"verdict": "not measured", "note": "waits are those of a CUDA device"}]
    few, many = (_count_waits(LOOPS[what], count * BATCH, device) for count in (_FEW, _MANY))
    each = (many - few) / (_MANY - _FEW)
    return [row | {"waits_a_batch": each, "verdict": "right" if each == 0 else "waits"}]


def _count_waits(loop: Callable[[Problem], object], images: int, device: torch.device) -> int:
    given = problem("tiny resnet", images, device)
    loop(given)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            loop(given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in seen)


def halved(network: str, device: torch.device) -> list[dict[str, Any]]:
    """Scores of a batch that memory has room for, and of one that it has not."""
    given = problem(network, 32, device)

    def scores() -> Result:
        return dict(pai.score("ggn_diag", given.model, given.data, samples=None, batch_size=32))

    expected, forwards = scores(), list[int]()
    hook = given.model.register_forward_pre_hook(lambda _, args: forwards.append(len(args[0])))
    if device.type == "cuda":
        found = _capped(scores, device)
    else:
        refuse = given.model.register_forward_pre_hook(_refuse_large)
        found = scores()
        refuse.remove()
    hook.remove()
    error = relative_error(found, expected)
    right = error <= _LIMIT and min(forwards) < 32
    note = f"batches of {max(forwards)}, then {min(forwards)} images"
    verdict = "right" if right else "wrong"
    return [{"what": "out of memory", "error": error, "verdict": verdict, "note": note}]


def _capped(scores: Callable[[], Result], device: torch.device) -> Result:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    level = torch.cuda.memory_allocated(device)
    scores()
    needed = torch.cuda.max_memory_allocated(device) - level
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(device).total_memory
    reserved = torch.cuda.memory_reserved(device)
    torch.cuda.set_per_process_memory_fraction((reserved + _CAP * needed) / whole, device)
    try:
        return scores()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _refuse_large(_: object, args: tuple[Any, ...]) -> None:
    if len(args[0]) > 16:
        raise torch.OutOfMemoryError("no room for more than 16 images")


def two_processes(network: str, device: torch.device) -> list[dict[str, Any]]:
    """Scores of one process, and of two that share its device under ``torch.distributed``."""
    expected = score("ggn_diag", problem(network, 2 * BATCH, device))
    with tempfile.TemporaryDirectory() as folder:
        spawn(_share, (network, str(device), folder), nprocs=2)
        errors = [
            relative_error(load_file(Path(folder, f"{rank}.safetensors")), expected)
            for rank in range(2)
        ]
    verdict = "right" if max(errors) <= _LIMIT else "wrong"
    return [{"what": "two processes", "error": max(errors), "verdict": verdict}]


def _share(rank: int, network: str, device: str, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    scores = score("ggn_diag", problem(network, 2 * BATCH, torch.device(device)))
    save_file({n: v.cpu() for n, v in scores.items()}, Path(folder, f"{rank}.safetensors"))
    torch.distributed.destroy_process_group()
