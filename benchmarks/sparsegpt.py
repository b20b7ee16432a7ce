"""SparseGPT beside what this library does: saliencies in seconds, and repairs by their errors.

``python -m benchmarks.sparsegpt`` writes two tables and their records to
``build/benchmarks/sparsegpt``. Seconds are the least of some turns, in which both sides alternate.
Errors are those of one layer's outputs, for the same masks and on the same inputs: of images that
the repair has seen, and of others.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

import pai_utils as pai
from benchmarks.contenders.inputs import (
    CONTENDERS,
    SHAPES,
    SPARSITY,
    draw,
    second_moment,
    sparsegpt,
)
from benchmarks.measuring import timed
from benchmarks.storing import store
from pai_utils.curvature.calls import Call
from pai_utils.data.images import ImageDataset
from pai_utils.repair import layouts
from pai_utils.repair.least_squares import solve_layer

ROOT = Path(__file__).parents[1]
BACKBONE, IMAGE_SIZE, TASK = "efficientnet_lite0", 64, "photos"
LAYER = "blocks.3.1.conv_pwl"
DAMPINGS = (0.01, 0.1)


def seconds(turns: int) -> pd.DataFrame:
    """Least seconds of both contenders on every layer, and SparseGPT's in float64 too."""
    lines = []
    for name, (outputs, size) in SHAPES.items():
        layer = draw(outputs, size)
        steps = {
            "obs_inputs": CONTENDERS["obs_inputs"].prepare(layer)["whole"],
            "SparseGPT": CONTENDERS["SparseGPT"].prepare(layer)["whole"],
            "SparseGPT, float64": CONTENDERS["SparseGPT"].prepare(layer.to(torch.float64))["whole"],
        }
        for step in steps.values():
            step()
        least = dict.fromkeys(steps, float("inf"))
        for _ in range(turns):
            for key, step in steps.items():
                least[key] = min(least[key], timed(step, layer.device))
        ratio = least["SparseGPT"] / least["obs_inputs"]
        lines.append({"layer": name, "K": size, "M": outputs, **least, "times as long": ratio})
    return pd.DataFrame(lines)


def errors(name: str) -> pd.DataFrame:
    """Squared error of a layer's output over its square, by mask, damping and repair."""
    backbone = pai.load_backbone(BACKBONE, image_size=IMAGE_SIZE, device="cpu")
    task = pai.load_task(TASK, backbone.transform, train_size=512)
    seen, unseen = (_inputs(backbone, name, data) for data in (task.train, task.validation))
    weight = backbone.encoder.get_parameter(f"{name}.weight").detach().flatten(1).double()
    lines = []
    for damping in DAMPINGS:
        matrix = second_moment(seen, damping)
        own_weights, own = sparsegpt(weight, matrix, sparsity=SPARSITY)
        saliency = weight.square() / torch.linalg.inv(matrix).diagonal()
        masks = {
            "SparseGPT": own,
            "obs_inputs": pai.make_mask({"layer": saliency}, SPARSITY)["layer"],
            "magnitude": pai.make_mask({"layer": weight.abs()}, SPARSITY)["layer"],
        }
        for mask, keep in masks.items():
            solved, _ = solve_layer(
                seen[None],
                seen @ weight.T,
                weight[None],
                keep[None],
                centred=False,
                damping=damping,
            )
            moved = own_weights if mask == "SparseGPT" else sparsegpt(weight, matrix, keep=keep)[0]
            repaired = {"none": weight * keep, "SparseGPT": moved, "exact": solved[0]}
            lines += [
                {
                    "layer": name,
                    "damping": damping,
                    "mask": mask,
                    "repair": repair,
                    "objective": _error(weight, weights, matrix),
                    "seen images": _error(weight, weights, second_moment(seen, 0)),
                    "other images": _error(weight, weights, second_moment(unseen, 0)),
                }
                for repair, weights in repaired.items()
            ]
    return pd.DataFrame(lines)


def _inputs(backbone: pai.Backbone, name: str, data: ImageDataset) -> Tensor:
    """Rows ``[R, K]`` of a layer's inputs, in float64, of all its positions in all images."""
    found: list[Tensor] = []

    def keep(_: str, call: Call) -> Tensor:
        output: Tensor = call.run()
        count = len(layouts.channels_last(output, layouts.channel_axis(call)))
        found.append(layouts.rows_of(call, torch.arange(count))[0])
        return output

    with layouts.watching(backbone.encoder, [f"{name}.weight"], keep), torch.no_grad():
        backbone.eval()(data.batch(torch.arange(len(data)), torch.device("cpu"))[0])
    return found[0].double()


def _error(weight: Tensor, other: Tensor, matrix: Tensor) -> float:
    """How much of an output's mean square is lost, by the second moment of its inputs."""
    lost = other - weight
    return float((lost @ matrix * lost).sum() / (weight @ matrix * weight).sum())


def main() -> None:
    """Measure and write both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layer", default=LAYER, help=f"a pointwise one of {BACKBONE}")
    parser.add_argument("--out", type=Path, default=ROOT / "build/benchmarks/sparsegpt")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    setting = {"threads": given.threads, "sparsity": SPARSITY}
    store(errors(given.layer), given.out / "errors", "errors", images=TASK, **setting)
    store(seconds(given.turns), given.out / "seconds", "seconds", turns=given.turns, **setting)


if __name__ == "__main__":
    main()
