"""Prune a model: score, mask, apply, in one or several rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from pai_utils.masks import Mask, check_sparsity, describe_weights, make_mask
from pai_utils.models.encoders import check_masks_hold, prunable_parameters
from pai_utils.repair.methods import Repair, repair_
from pai_utils.scorers import Scores, check_options, score
from pai_utils.support.common import check_names, copied, device_of, logger
from pai_utils.support.contract import unwrapped
from pai_utils.support.sampling import Draw, Samples

SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "exponential": lambda sparsity, progress: (1 - sparsity) ** progress,
    "linear": lambda sparsity, progress: 1 - sparsity * progress,
}
"""The fraction *kept* once a fraction ``progress`` of the rounds is done, at a final sparsity."""


@dataclass(frozen=True)
class Recipe:
    """How a mask is made, and what is done to the weights that it leaves."""

    scorer: str = "ggn_diag"  #: one that `pai_utils.find_scorer` knows
    sparsity: float = 0.7  #: fraction to remove, in [0, 1), of the weights that may be pruned
    scope: str = "global"  #: as in `pai_utils.make_mask`
    rounds: int = 1  #: the scopes "N:M" take one
    schedule: str = "exponential"  #: a key of `SCHEDULES`
    repair: str = "none"  #: or parts joined by + of "moments", "layerwise" and "obs"
    options: Mapping[str, Any] = field(default_factory=dict)  #: the scorer's own keywords
    repair_options: Mapping[str, Any] = field(default_factory=dict)  #: by `REPAIR_OPTIONS`
    include: str | Sequence[str] | None = None  #: patterns, as in `select_parameters`; None: all
    exclude: str | Sequence[str] = ()

    @property
    def label(self) -> str:
        """The scorer, and the repair where there is one, as tables name them."""
        return self.scorer if self.repair == "none" else f"{self.scorer} + {self.repair}"

    def check(self) -> None:
        """Refuse a recipe that cannot be followed, before anything is computed."""
        check_options(self.scorer, self.options)
        Repair.of(self.repair, self.repair_options)
        check_names("schedule", [self.schedule], SCHEDULES)
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds}: at least one round is needed")
        if check_sparsity(self.sparsity, self.scope) is not None and self.rounds > 1:
            raise ValueError(
                f"scope {self.scope!r} fixes the sparsity at once; use rounds=1 with it"
            )

    def pruned_after(self, step: int, before: float = 0.0) -> float:
        """The fraction pruned after a round, and before the first: after the last the sparsity."""
        if step == self.rounds:
            return self.sparsity
        more = (self.sparsity - before) / (1 - before)  # of what is left
        return 1 - (1 - before) * SCHEDULES[self.schedule](more, step / self.rounds)

    def metadata(self, draw: Draw, source: str | None) -> dict[str, str]:
        """What a mask made by it is labelled with, apart from the weights."""
        own = ("scorer", "sparsity", "scope", "rounds", "schedule", "repair")
        return {
            **({} if source is None else {"source": source}),
            **{name: str(getattr(self, name)) for name in own},
            **{f"scorer.{option}": str(value) for option, value in self.options.items()},
            "samples": str(draw.samples),
            "seed": str(draw.seed),
        }


@dataclass(frozen=True)
class PruningReport:
    """What a call of :func:`prune` did."""

    scorer: str
    scope: str
    sparsity: float  #: reached, over all prunable weights
    layer_sparsity: dict[str, float]
    empty_layers: list[str]  #: pruned to nothing
    ties: int  #: weights whose last scores tied across the cut, so that the smaller ones went
    left_out: list[str]  #: parameters never pruned
    rounds: int
    schedule: str
    seconds: float


@dataclass(frozen=True)
class Pruned:
    """A pruned copy of a model, its mask, and a report."""

    model: nn.Module
    mask: Mask
    report: PruningReport


def prune(
    model: nn.Module,
    data: Samples | None,
    scorer: str = "ggn_diag",
    sparsity: float = 0.7,
    scope: str = "global",
    *,
    rounds: int = 1,
    repair: str = "none",
    repair_data: Samples | None = None,
    samples: int | None = 256,
    batch_size: int = 64,
    seed: int = 0,
    **options: Any,
) -> Pruned:
    """Prune a copy of ``model``; the model itself is untouched.

    Each round scores the network pruned so far, repaired if a repair is named, and prunes it
    further; a pruned weight never comes back. After round r of R the fraction of weights that is
    left is (1 − s)^(r/R) with ``schedule="exponential"`` (Tanaka et al. 2020), and 1 − s r/R with
    ``"linear"``. Weights that are zero in ``model`` are pruned already: they count, stay zero
    through every repair, and rounds start from them.

    Args:
        model: images to logits, usually a :class:`~pai_utils.models.encoders.Classifier`. Of a
            wrapper, such as what ``torch.compile`` gives, the module inside is copied and pruned.
        data: samples of the source task.
        scorer: one that :func:`~pai_utils.scorers.registry.find_scorer` knows, joint or not.
        sparsity: fraction s to remove, in [0, 1), of the weights that ``include`` and ``exclude``
            leave.
        scope: as in :func:`~pai_utils.masks.make_mask`.
        rounds: R above; the scopes ``"N:M"`` take one.
        repair: what is done to the surviving weights in every round, from their values in
            ``model``: ``"none"``, or parts joined by ``+`` of ``moments``, ``layerwise`` and
            ``obs`` (:mod:`pai_utils.repair.methods`).
        repair_data: samples for the repair; by default ``data``.
        samples: size of the draw for the scores; ``None`` for all of ``data``.
        batch_size: samples a forward.
        seed: seed of every draw.
        options: ``schedule``, ``include``, ``exclude`` and ``repair_options`` of a
            :class:`Recipe`; ``source``, the data's name, for the mask's metadata; ``within``, an
            earlier mask, by which the model, dense or pruned, is pruned further; and the scorer's
            own keywords.

    Raises:
        ValueError: for an unknown scorer, scope, schedule, option or repair, an impossible
            sparsity, a pattern without a match, a weight that no mask holds in, fewer rounds than
            one, or more with a scope that prunes at once; or if more is pruned already than asked
            for.

    Examples:
        >>> import torch
        >>> import pai_utils as pai
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 2, bias=False))
        >>> model[1].weight.data = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -0.5]])
        >>> pruned = pai.prune(model, None, "magnitude", sparsity=0.5)
        >>> pruned.model[1].weight.data
        tensor([[ 1., -2.,  0.],
                [ 0.,  3.,  0.]])
        >>> pruned.mask["1.weight"]
        tensor([[ True,  True, False],
                [False,  True, False]])
        >>> pruned.report.sparsity
        0.5
    """
    whence = {name: options.pop(name, None) for name in ("source", "within")}
    others = ("schedule", "include", "exclude", "repair_options")
    given = {name: options.pop(name) for name in others if name in options}
    recipe = Recipe(scorer, sparsity, scope, rounds, repair=repair, options=options, **given)
    draw = Draw(samples, batch_size, seed)
    pruned = follow(recipe, model, data, draw, repair_data=repair_data, **whence)
    pruned.mask.metadata.update(describe_weights(model, pruned.mask))
    if pruned.report.empty_layers:
        logger.warning("pruned to nothing: %s", ", ".join(pruned.report.empty_layers))
    return pruned


def follow(
    recipe: Recipe,
    model: nn.Module,
    data: Samples | None,
    draw: Draw,
    *,
    repair_data: Samples | None = None,
    source: str | None = None,
    within: Mask | None = None,
    scores: Scores | None = None,
) -> Pruned:
    """Prune a copy of ``model`` by a recipe, as :func:`prune` describes it.

    ``scores`` are those of the dense model by this recipe and draw, where they are known already.
    The mask's metadata do not identify the weights that it was made for, which takes long:
    :func:`~pai_utils.masks.describe_weights` does.
    """
    recipe.check()
    model = unwrapped(model)
    repair = Repair.of(recipe.repair, recipe.repair_options)
    images = data if repair_data is None else repair_data
    if repair.parts and images is None:
        raise ValueError(f"repair {recipe.repair!r} needs samples of the source task")
    start = time.perf_counter()
    names = prunable_parameters(model, recipe.include, recipe.exclude)
    check_masks_hold(model, names)
    metadata = recipe.metadata(draw, source)
    pruned, mask, before = copied(model), _surviving(model, names, within), 0.0
    if mask is not None:
        check_sparsity(recipe.sparsity, recipe.scope, mask)
        mask.apply_(pruned, strict=False)
        before = mask.sparsity
    for step in range(1, recipe.rounds + 1):
        if scores is None or step > 1:
            settings = {**asdict(draw), **recipe.options}
            scores = score(recipe.scorer, pruned, data, names=names, **settings)
        share = recipe.pruned_after(step, before)
        mask = make_mask(scores, share, recipe.scope, within=mask, metadata=metadata)
        if repair.parts and step > 1:
            pruned = copied(model)  # a weight has its dense value, not its last repair's
        # Not strict: these are the weights it was made for, some of them removed by now.
        mask.apply_(pruned, strict=False)
        if images is not None:
            size, seed = draw.batch_size, draw.seed
            repair_(pruned, model, mask, images, repair, batch_size=size, seed=seed)
    assert mask is not None
    report = PruningReport(
        scorer=recipe.scorer,
        scope=recipe.scope,
        sparsity=mask.sparsity,
        layer_sparsity=mask.layer_sparsity,
        empty_layers=mask.empty_layers,
        ties=mask.ties,
        left_out=[name for name, _ in model.named_parameters() if name not in mask],
        rounds=recipe.rounds,
        schedule=recipe.schedule,
        seconds=time.perf_counter() - start,
    )
    return Pruned(pruned, mask, report)


def _surviving(model: nn.Module, names: Sequence[str], within: Mask | None) -> Mask | None:
    """The weights that are not zero, and that an earlier mask keeps; None if these are all."""
    alive = {name: (model.get_parameter(name) != 0).cpu() for name in names}
    if within is not None:
        within.check(model)
        for name, entry in within.items():
            if name in alive:
                alive[name] &= entry
            elif model.get_parameter(name)[~entry.to(device_of(model))].any():
                raise ValueError(
                    f"within= prunes weights of {name!r}, which is not to be pruned here; apply it "
                    "to the model first, which then needs no within="
                )
    return None if all(entry.all() for entry in alive.values()) else Mask(alive)
