"""A mask that keeps the highest of all scores of a ViT-B."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import timm
import torch
from torch import Tensor

import pai_utils as pai
from benchmarks.tasks import Contender, Steps, Vector

SPARSITY = 0.7


@dataclass(frozen=True)
class ScoredWeights:
    """Scores by parameter name."""

    scores: dict[str, Tensor]

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return next(iter(self.scores.values())).device

    @property
    def memory_unit(self) -> int:
        """Bytes of the scores."""
        return sum(values.nbytes for values in self.scores.values())

    def in_layout(self, layout: str) -> Self:
        """The same: there is one layout."""
        return self

    def to(self, target: torch.device | torch.dtype) -> Self:
        """A copy on another device; scores keep their type, since another could break ties."""
        if isinstance(target, torch.dtype):
            return self
        return type(self)({name: values.to(target) for name, values in self.scores.items()})

    def forward_backward(self) -> None:
        """None: there is no network."""


def vit_base() -> ScoredWeights:
    """Random scores of the prunable weights of ViT-B/16."""
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(0)
    return ScoredWeights(
        {
            name: torch.rand(parameters[name].shape, generator=generator)
            for name in pai.prunable_parameters(model)
        }
    )


def ours(subject: ScoredWeights) -> Steps:
    """``pai.make_mask`` over all weights."""

    def whole() -> Vector:
        mask = pai.make_mask(subject.scores, SPARSITY)
        return {name: mask[name] for name in subject.scores}

    return {"whole": whole}


def sorting(subject: ScoredWeights) -> Steps:
    """A stable sort of all scores: the plain way to an exact count under ties."""
    sizes = [values.numel() for values in subject.scores.values()]

    def whole() -> Vector:
        flat = torch.cat([values.flatten() for values in subject.scores.values()])
        order = flat.argsort(stable=True)
        keep = torch.ones_like(flat, dtype=torch.bool)
        keep[order[: round(SPARSITY * len(flat))]] = False
        parts = keep.split(sizes)
        return {
            name: part.view_as(values)
            for (name, values), part in zip(subject.scores.items(), parts, strict=True)
        }

    return {"whole": whole}


def exact(subject: ScoredWeights) -> Vector:
    """What the sort keeps."""
    return sorting(subject)["whole"]()


REFERENCES = {"mask": exact}

CONTENDERS: dict[str, Contender[ScoredWeights]] = {
    "make_mask": Contender(ours, "global mask, 70 % sparsity", ours=True, reference="mask"),
    "stable sort": Contender(sorting, "global mask, 70 % sparsity", reference="mask"),
}
