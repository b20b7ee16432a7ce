"""How much there is to do at least, and where the time goes.

The products of matrices of one forward and backward are counted from the forward: each backward
has the same number twice, once for the inputs' gradients and once for the weights', save that
nobody asks for the gradient of the images. (``FlopCounterMode`` counts the backward of grouped
convolutions several times over, so that only its forward is used.) A diagonal of squared
per-sample gradients takes the same products: a weight's gradient is a sum over samples, formed
before it is squared instead of after. On top come the squares, two operations for each weight and
sample, and the traffic of the per-sample gradients, where they do not stay in the caches.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contenders.diagonals import ours_ggn
from benchmarks.measuring import Step, in_turns, timed
from benchmarks.problems import Problem

_LISTED = 8  # operations of a profile
_COPIED = 2**27  # numbers


@dataclass(frozen=True)
class Work:
    """Counts for one model and one batch."""

    model: str
    image_size: int
    images: int
    parameters: int
    prunable: int
    forward_gflop: float
    unit_gflop: float  # forward and backward
    squares_gflop: float
    gradients_gbyte: float  # written and read once, all samples
    bandwidth_gbyte: float  # a second, of a copy within memory
    unit_seconds: float
    floor_fb: float  # operations of a diagonal over those of the unit
    traffic_fb: float  # time of the traffic, were none of it cached, over the unit's


@dataclass(frozen=True)
class Share:
    """Time inside one operation, in this library's diagonal and in the unit of cost."""

    model: str
    operation: str
    diagonal_fb: float
    unit_fb: float


def forward_gflop(model: nn.Module, images: Tensor) -> float:
    """10⁹ floating-point operations in products of matrices of one forward."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return float(counter.get_total_flops()) / 1e9


def unit_gflop(problem: Problem) -> float:
    """The same for one forward and backward, without the gradient of the images."""
    inputs: list[Tensor] = []
    first = next(m for m in problem.model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    handle = first.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    total = forward_gflop(problem.model, problem.images)
    handle.remove()
    return 3 * total - forward_gflop(first, inputs[0])


def count(model: str, problem: Problem) -> Work:
    """Count, and time the unit and a copy within memory to set the counts against."""
    forward, unit = forward_gflop(problem.model, problem.images), unit_gflop(problem)
    weights = sum(p.numel() for p in problem.parameters.values())
    images = len(problem.labels)
    step = problem.forward_backward()
    step()
    seconds = statistics.median(in_turns(step, None, problem.device, budget=5).seconds)
    bandwidth = _bandwidth(problem.device)
    squares, traffic = 2 * images * weights / 1e9, 8 * images * weights / 1e9
    return Work(
        model,
        image_size=problem.images.shape[-1],
        images=images,
        parameters=sum(p.numel() for p in problem.model.parameters()),
        prunable=weights,
        forward_gflop=forward,
        unit_gflop=unit,
        squares_gflop=squares,
        gradients_gbyte=traffic,
        bandwidth_gbyte=bandwidth,
        unit_seconds=seconds,
        floor_fb=1 + squares / unit,
        traffic_fb=traffic / bandwidth / seconds,
    )


def _bandwidth(device: torch.device) -> float:
    source = torch.ones(_COPIED, device=device)
    target = torch.zeros_like(source)
    best = min(timed(lambda: target.copy_(source), device) for _ in range(5))
    return 2 * source.nbytes / best / 1e9


def profile(model: str, problem: Problem) -> list[Share]:
    """Time inside single operations: those whose share in the diagonal exceeds the unit's most."""
    diagonal = ours_ggn(problem)["whole"]
    unit = problem.in_layout("channels-last images").forward_backward()
    own, base = (_self_times(step, problem.device) for step in (diagonal, unit))
    whole = sum(base.values())
    excess = sorted(own, key=lambda name: base.get(name, 0.0) - own[name])
    return [
        Share(model, name, own[name] / whole, base.get(name, 0.0) / whole)
        for name in excess[:_LISTED]
    ]


def _self_times(step: Step, device: torch.device) -> dict[str, float]:
    step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as recorded:
        step()
    kind = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return {event.key: float(getattr(event, kind)) for event in recorded.key_averages()}
