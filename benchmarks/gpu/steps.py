"""What the parts of the command share: their settings, and the networks they look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.problems import Network, Problem, build

Step = tuple[str, Callable[[], list[dict[str, Any]]]]
"""A key, by which a run that was stopped knows what it has done, and what gives its rows."""
Steps = Iterator[Step]

_STAGES = (("layers", (1, 1, 1, 1)), ("channels", (8, 8, 16, 16)))
SMALL = {
    "tiny resnet": Network("resnet18", 32, (*_STAGES, ("zero_init_last", False))),
    "tiny resnext": Network(
        "resnext50_32x4d", 32,
        (*_STAGES, ("cardinality", 2), ("base_width", 64), ("zero_init_last", False)),
    ),
    "tiny densenet": Network("densenet121", 32, (("growth_rate", 4), ("block_config", (2, 2)))),
    "tiny convnext": Network(
        "convnext_tiny", 32,
        (("depths", (1, 1, 1, 1)), ("dims", (8, 8, 16, 16)), ("ls_init_value", 1.0)),
    ),
    "tiny vit": Network(
        "vit_tiny_patch16_224", 16,
        (("img_size", 16), ("patch_size", 8), ("embed_dim", 16), ("depth", 2), ("num_heads", 2)),
        convolutional=False,
    ),
}  # fmt: skip
LARGE = {
    "resnet50": Network("resnet50", 96, (("zero_init_last", False),)),
    "vit_small_patch16_224": Network(
        "vit_small_patch16_224", 96, (("img_size", 96),), convolutional=False
    ),
}
CLASSES = 10


@dataclass(frozen=True)
class Settings:
    """Where to run, and whether to stay small, as on a CPU."""

    device: torch.device
    small: bool

    @property
    def budget(self) -> float:
        """Seconds of turns of a measurement, after the least number of them."""
        return 0.0 if self.small else 1.0

    @property
    def networks(self) -> dict[str, Network]:
        """Those of the parts that compare results."""
        return SMALL if self.small else SMALL | LARGE


def problem(name: str, count: int, device: torch.device) -> Problem:
    """One of the networks with random weights, and random images, the same on every device."""
    return build((SMALL | LARGE)[name], count, classes=CLASSES).to(device)
