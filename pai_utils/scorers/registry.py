"""The registry of scorers, and :func:`score`, the one way to call them.

A scorer is a function ``(model, names, data, draw, **options)`` that returns one tensor a name, of
the parameter's shape, and one line in :data:`SCORERS`. Its keyword arguments are its options.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from pai_utils.models.encoders import Classifier, prunable_parameters
from pai_utils.scorers.first_order import grasp, lamp, magnitude, random, snip
from pai_utils.scorers.inputs import obs_inputs, wanda
from pai_utils.scorers.ntk import ntk_sap
from pai_utils.scorers.paths import px, synflow
from pai_utils.scorers.second_order import (
    block_fisher,
    feature_ggn_diag,
    fisher_diag,
    ggn_diag,
    hessian_diag,
)
from pai_utils.support.cache import Kept, reused
from pai_utils.support.common import check_names, clock, device_of
from pai_utils.support.contract import unwrapped
from pai_utils.support.sampling import Draw, Samples

LAYER = "layer"
"""As the budgets of a joint scorer: the same fraction of every layer."""


@dataclass(frozen=True)
class Scorer:
    """A row of the registry."""

    function: Callable[..., Any]
    summary: str
    needs_data: bool = True
    needs_head: bool = True  #: false where images alone are enough
    seeded: bool = True  #: false where no seed changes the scores
    passes: float | Callable[[Mapping[str, Any]], float] = 1
    """What it costs, perhaps by its options, in forward and backward passes over the samples."""

    parts: tuple[str, ...] = ()  #: of a joint scorer: those that it is made of

    @cached_property
    def options(self) -> dict[str, Any]:
        """The scorer's own keywords with their defaults; of a joint one those of its parts."""
        if self.parts:
            own = {k: v for part in self.parts for k, v in SCORERS[part].options.items()}
            return dict(sorted(own.items()))
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    def cost(self, options: Mapping[str, Any]) -> float:
        """Forward and backward passes over the samples, with these options."""
        return self.passes({**self.options, **options}) if callable(self.passes) else self.passes


_of_weights = partial(Scorer, needs_data=False, seeded=False, passes=0)

SCORERS: dict[str, Scorer] = {
    "random": Scorer(random, "U(0, 1), the floor of every comparison", needs_data=False, passes=0),
    "magnitude": _of_weights(magnitude, "|w|, that is H = I"),
    "lamp": _of_weights(lamp, "w² over the sum of the squares not smaller, in its layer"),
    "snip": Scorer(snip, "|w g|, g the gradient of the mean loss"),
    "grasp": Scorer(grasp, "w ⊙ Hg, signed: what the gradient's norm depends on", passes=3.1),
    "synflow": _of_weights(synflow, "|w ⊙ ∂R/∂w|, R the flow through all |weights|"),
    "px": Scorer(px, "w² ∂R/∂(w²), R a bound on the tangent kernel's trace by paths", passes=2),
    "ntk_sap": Scorer(
        ntk_sap,
        "|m ∂/∂m|f(θ⊙m) − f((θ+Δθ)⊙m)|²|, the tangent kernel's spectrum",
        # In float64, which costs twice on a CPU and more on most GPUs.
        passes=lambda options: 4.0 * options["perturbations"],
    ),
    "fisher_diag": Scorer(
        fisher_diag,
        "½ w² (h + λ), h the diagonal of the empirical Fisher (true labels)",
        passes=1.4,
    ),
    "ggn_diag": Scorer(
        ggn_diag, "½ w² (h + λ), h that of the Gauss-Newton matrix (model's labels)", passes=1.4
    ),
    "feature_ggn_diag": Scorer(
        feature_ggn_diag,
        "½ w² (h + λ), h that of the features' Gauss-Newton matrix (no head, no labels)",
        needs_head=False,
        passes=1.4,
    ),
    "block_fisher": Scorer(
        block_fisher,
        "w² / (2 [F⁻¹]_ii), F the Fisher in blocks + λI (OBS)",
        # The blocks' products and inverses, by what the atlas in results/ took.
        passes=lambda options: 1.4 + options["block_size"] / 4,
    ),
    "wanda": Scorer(
        wanda, "|w| · root mean square of the layer's own inputs", needs_head=False, passes=0.4
    ),
    "obs_inputs": Scorer(
        obs_inputs,
        "w² / (2 [H⁻¹]_ii), H the mean xxᵀ of the layer's own inputs + λI (OBC)",
        needs_head=False,
    ),
    "hessian_diag": Scorer(
        hessian_diag,
        "½ w² (h + λ), h the Hessian's diagonal, of networks of ReLU and the like",
        passes=10,  # a backward a class
    ),
}
"""All scorers, by the name that :func:`~pai_utils.scorers.registry.score` takes."""


@dataclass
class Scores(dict[str, Tensor]):
    """Scores by parameter name, and the parameters that were left out.

    ``seconds`` is what the scorer took when they were computed, of the processor on a CPU.
    ``weights`` are the model's own, not copies; :func:`~pai_utils.masks.make_mask` breaks ties by
    them.
    """

    scores: dict[str, Tensor]
    scorer: str
    left_out: list[str] = field(default_factory=list)
    seconds: float = 0.0
    weights: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.update(self.scores)


def score(
    name: str,
    model: nn.Module,
    data: Samples | None = None,
    *,
    names: Sequence[str] | None = None,
    samples: int | None = 256,
    batch_size: int = 64,
    seed: int = 0,
    **options: Any,
) -> Scores:
    """Score every prunable weight of ``model``; higher means keep.

    Inside ``torch.autocast`` gradients are computed in that precision and summed at least in
    float32; Hessian products (``grasp``) keep the model's own. Under ``torchrun``, with
    ``torch.distributed`` initialised, each process takes its share of the samples and all get the
    same scores.

    Args:
        name: a key of :data:`SCORERS`, or a joint scorer as :func:`find_scorer` reads it.
        model: images ``[N, 3, H, W]`` to logits ``[N, C]``, with mean cross-entropy as the loss.
            Scored in evaluation mode and left exactly as it was. Of a
            :class:`~pai_utils.models.encoders.Classifier` the head is left out. What else it and
            the data must be says :mod:`pai_utils.support.contract`.
        data: samples of the source task; ``random``, ``magnitude`` and ``synflow`` need none.
        names: the parameters to score, of any kind; by default the prunable ones.
            ``grasp`` and ``ntk_sap`` vary these parameters only, so that a score depends on the
            others named; ``random`` draws in their order.
        samples: size of the seeded draw without replacement; ``None`` for all, in order.
        batch_size: samples a forward; halved when memory runs out. No score depends on it.
        seed: seed of every draw.
        options: the scorer's own keywords, as in ``SCORERS[name].options``.

    Returns:
        A dictionary from parameter name to a tensor of the parameter's shape; ``left_out`` names
        the parameters that are not scored (by default biases, norms, embeddings, the head).

    Raises:
        ValueError: for an unknown scorer, option or parameter, no parameter to score, missing
            data, labels beyond the model's classes, or non-finite weights, images or scores.

    Examples:
        >>> import torch
        >>> import pai_utils as pai
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 2, bias=False))
        >>> model[1].weight.data = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -0.5]])
        >>> images = torch.eye(3).view(3, 3, 1, 1)  # three images of one pixel
        >>> data = torch.utils.data.TensorDataset(images, torch.tensor([0, 1, 0]))
        >>> pai.score("magnitude", model)["1.weight"]
        tensor([[1.0000, 2.0000, 0.5000],
                [0.0000, 3.0000, 0.5000]])
        >>> pai.score("ggn_diag", model, data, samples=None, estimator="exact")["1.weight"]
        tensor([[0.0350, 0.0133, 0.0087],
                [0.0000, 0.0300, 0.0087]])
        >>> pai.score("snip", model, data, samples=2).left_out
        []
    """
    scorer, model = check_options(name, options), unwrapped(model)
    if scorer.parts:
        each = partial(score, names=names, samples=samples, batch_size=batch_size, seed=seed)
        scored = {}
        for part in scorer.parts:
            own = {k: v for k, v in options.items() if k in SCORERS[part].options}
            scored[part] = each(part, model, data, **own)
        return _join(name, scored)
    if scorer.needs_data and data is None:
        raise ValueError(f"scorer {name!r} needs data: pass the source task's training set")
    chosen = prunable_parameters(model) if names is None else list(dict.fromkeys(names))
    if not chosen:
        raise ValueError(
            "names is empty, or the model has no convolution or linear weight to score"
        )
    parameters = dict(model.named_parameters())
    check_names("parameter", chosen, parameters)
    draw = Draw(samples, batch_size, seed)
    device = device_of(model)

    def compute() -> Kept:
        begin = clock(device)
        scores = scorer.function(model, chosen, data, draw, **options)
        return Kept(scores, {"seconds": clock(device) - begin})

    if scorer.needs_data:
        # What the scorer does not look at must not tell its scores apart.
        of_encoder = all(parameter.startswith("backbone.") for parameter in chosen)
        headless = isinstance(model, Classifier) and of_encoder and not scorer.needs_head
        seen = model.backbone if headless else model
        parts = {"by": scorer.function, "model": seen, "data": data, "names": chosen, **options}
        found = reused("scores", {**parts, **asdict(draw), "device": device.type}, compute)
    else:  # at once
        found = compute()
    scores = {n: found.tensors[n].to(device) for n in chosen}
    broken = [n for n, values in scores.items() if not values.isfinite().all()]
    if broken:
        # One bad weight spoils the scores of every layer: name the weight, where there is one.
        causes = [
            f"the weights of {n!r} are not finite"
            for n, weight in parameters.items()
            if not weight.isfinite().all()
        ]
        causes.append("the weights are finite, so look for non-finite images or logits")
        raise ValueError(f"{name} gave non-finite scores for {broken[0]!r}: {causes[0]}")
    left_out = [parameter for parameter in parameters if parameter not in scores]
    weights = {n: parameters[n].detach() for n in chosen}
    return Scores(scores, name, left_out, found.facts["seconds"], weights)


def find_scorer(name: str) -> Scorer:
    """The scorer of this name, or the joint one that it describes.

    ``"selection@budgets"`` gives every layer the scores of ``budgets``, in the order in which
    ``selection`` ranks the layer's weights: at every sparsity a layer keeps as many weights as by
    ``budgets``, and of these the ones that ``selection`` would. A selection ``"a+2*b"`` is a
    weighted sum of scores, each over its layer's sum. Three uses:

    - ``"random@ggn_diag"``, a layer-wise shuffle of the mask by ``ggn_diag``;
    - ``"magnitude@layer"``, magnitude with the same sparsity in every layer;
    - ``"ggn_diag+obs_inputs@ggn_diag"``, the joint score of a loss and of layers' outputs
      (Afriat et al. 2026, "MOONSHOT", arXiv 2604.13287).

    Raises:
        ValueError: for an unknown name.
    """
    selection, joined, budgets = name.partition("@")
    if not joined:
        check_names("scorer", [name], SCORERS)
        return SCORERS[name]
    wanted = [part for part, _ in _terms(selection)] + [budgets] * (budgets != LAYER)
    check_names("scorer", wanted, SCORERS)
    parts = tuple(dict.fromkeys(wanted))
    found = [SCORERS[part] for part in parts]
    return Scorer(
        score,
        f"layers keep as many weights as by {budgets}, those that {selection} ranks first",
        needs_data=any(scorer.needs_data for scorer in found),
        needs_head=any(scorer.needs_data and scorer.needs_head for scorer in found),
        seeded=any(scorer.seeded for scorer in found),
        passes=lambda options: sum(scorer.cost(options) for scorer in found),
        parts=parts,
    )


def shuffled(name: str) -> str:
    """The scorer whose mask is a layer-wise shuffle of this one's: the same budgets, no order."""
    return f"random@{name.rpartition('@')[2]}"


def check_options(name: str, options: Mapping[str, Any]) -> Scorer:
    """The scorer of this name, which has these options."""
    scorer = find_scorer(name)
    unknown = [option for option in options if option not in scorer.options]
    if unknown:
        raise ValueError(
            f"scorer {name!r} has no option {unknown[0]!r}; its options are: "
            + (", ".join(scorer.options) or "none")
        )
    damping = options.get("damping", 0)
    if not isinstance(damping, int | float) or not 0 <= damping < math.inf:
        raise ValueError(f"damping={damping!r} must be zero or a finite number above it")
    return scorer


def _terms(selection: str) -> list[tuple[str, float]]:
    """The scorers that a joint one's selection adds up, with their factors."""
    terms = [term.rpartition("*") for term in selection.split("+")]
    try:
        return [(part, float(factor or 1)) for factor, _, part in terms]
    except ValueError:
        raise ValueError(f"{selection!r}: what stands before a * must be a number") from None


def _join(name: str, found: Mapping[str, Scores]) -> Scores:
    """Scores of a joint scorer from those of its parts."""
    selection, _, budgets = name.partition("@")
    terms = _terms(selection)
    first = found[terms[0][0]]
    scores = {}
    for parameter, weight in first.weights.items():
        ranked = torch.zeros_like(weight, dtype=torch.float64)
        for part, factor in terms:
            values = found[part][parameter].double()
            ranked += factor * values / (values.abs().sum() or 1)
        # What is gone stays last, whatever a score says of it; of ties the smaller goes first.
        ranked = torch.where(weight == 0, -torch.inf, ranked).flatten()
        order = weight.abs().flatten().argsort()
        order = order[ranked[order].argsort(stable=True)]
        if budgets == LAYER:
            values = torch.linspace(0, 1, len(order), dtype=torch.float64, device=weight.device)
        else:
            values = found[budgets][parameter].flatten().sort().values
        scores[parameter] = torch.empty_like(values).scatter_(0, order, values).view_as(weight)
    seconds = sum(each.seconds for each in found.values())
    return Scores(scores, name, first.left_out, seconds, first.weights)
