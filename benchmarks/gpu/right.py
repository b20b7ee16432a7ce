"""Results of a device in float32 and bfloat16, beside those of the CPU in float64.

A relative error is that of all tensors of a result together. Masks are compared at half the
weights: a weight that only one of both masks keeps counts as a tie if its score is as near the
threshold as float32 can tell. Everything is computed twice, to see whether it repeats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import pai_utils as pai
from benchmarks.gpu.steps import Settings, Steps, problem
from benchmarks.job import relative_error
from benchmarks.problems import Problem
from benchmarks.registry import TOLERANCE
from pai_utils.curvature.blocks import fisher_blocks
from pai_utils.curvature.products import GGNOperator, HessianOperator
from pai_utils.curvature.spectra import top_eigenpairs
from pai_utils.heads import features
from pai_utils.support.sampling import Draw

IMAGES, BATCH = 6, 4  # a ragged batch among them
SPARSITY = 0.5
_NEAR = 1e-3  # of the threshold: what rounding in float32 may move a score by
Result = dict[str, Tensor]


def score(name: str, given: Problem) -> Result:
    """Scores of all images."""
    return dict(pai.score(name, given.model, given.data, samples=None, batch_size=BATCH))


def product(operator: type[GGNOperator | HessianOperator], given: Problem) -> Result:
    """A product with a fixed vector."""
    vector = {name: weight.detach().cos() for name, weight in given.parameters.items()}
    return dict(operator(given.model, given.names, given.data, Draw(None, BATCH))(vector))


def _spectrum(given: Problem) -> Result:
    operator = GGNOperator(given.model, given.names, given.data, Draw(None, BATCH))
    return {"eigenvalues": top_eigenpairs(operator, 2).values}


def _blocks(given: Problem) -> Result:
    found = fisher_blocks(given.model, given.names, given.data, Draw(None, BATCH), block_size=16)
    return {str(place): block.inverse_diagonal() for place, block in enumerate(found)}


def _repaired(repair: str, given: Problem) -> Result:
    how: dict[str, Any] = {"samples": None, "batch_size": BATCH, "repair": repair}
    pruned = pai.prune(given.model, given.data, "magnitude", SPARSITY, **how)
    return {name: p.detach() for name, p in pruned.model.named_parameters()}


def _trained(given: Problem) -> Result:
    pruned = pai.prune(given.model, given.data, "magnitude", SPARSITY).model
    before = {name: p.detach().clone() for name, p in pruned.named_parameters()}
    pai.finetune(pruned, given.data, steps=3, learning_rate=1e-2, batch_size=BATCH)
    return {name: p.detach() - before[name] for name, p in pruned.named_parameters()}


def _logits(given: Problem) -> Result:
    found, _ = features(given.model, given.data, batch_size=BATCH)
    return {"logits": found}


RESULTS: dict[str, Callable[[Problem], Result]] = {
    **{f"score {name}": partial(score, name) for name in pai.SCORERS if name != "random"},
    "Hessian product": partial(product, HessianOperator),
    "Gauss-Newton product": partial(product, GGNOperator),
    "two eigenvalues": _spectrum,
    "blocks": _blocks,
    **{f"repair {name}": partial(_repaired, name) for name in ("moments", "layerwise", "obs")},
    "three updates": _trained,
    "logits": _logits,
}


def steps(settings: Settings) -> Steps:
    """One step a network and result."""
    for network in settings.networks:
        for what in RESULTS:
            yield f"right/{network}/{what}", partial(compared, network, what, settings.device)


@cache
def _problems(network: str, device: torch.device) -> tuple[Problem, Problem]:
    """The problem in float64 on the CPU, and on the device in float32."""
    exact = problem(network, IMAGES, torch.device("cpu")).to(torch.float64)
    return exact, problem(network, IMAGES, device)


def compared(network: str, what: str, device: torch.device) -> list[dict[str, Any]]:
    """A row for float32, and one for bfloat16 where a result can be computed in it."""
    exact, given = _problems(network, device)
    compute = RESULTS[what]
    try:
        expected = compute(exact)
    except ValueError as refused:  # as a network of these functions is on every device
        return [{"network": network, "what": what, "verdict": "refused", "note": str(refused)}]
    rows = [_row(expected, compute(given), compute(given)) | {"precision": "float32"}]
    if what.startswith("score") or what == "logits":
        with torch.autocast(device.type, torch.bfloat16):
            rows.append(_row(expected, compute(given), compute(given)) | {"precision": "bfloat16"})
    for row in rows:
        held = row["precision"] == "bfloat16" or (row["error"] <= TOLERANCE and row["same"])
        row |= {"network": network, "what": what, "verdict": "right" if held else "wrong"}
        if what.startswith("score"):
            row |= _masks(expected, row.pop("found"))
        row.pop("found", None)
    return rows


def _row(expected: Result, found: Result, again: Result) -> dict[str, Any]:
    same = all(torch.equal(found[name], again[name]) for name in found)
    return {"error": relative_error(found, expected), "same": same, "found": found}


def _masks(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, Any]:
    """What both masks keep, as a share of what one keeps, and weights that differ without a tie."""
    wanted = pai.make_mask({name: value.float() for name, value in expected.items()}, SPARSITY)
    masks = pai.make_mask({name: value.cpu().float() for name, value in found.items()}, SPARSITY)
    scores = torch.cat([expected[name].flatten() for name in wanted])
    ours = torch.cat([masks[name].flatten() for name in wanted])
    theirs = torch.cat([wanted[name].flatten() for name in wanted])
    threshold = scores[theirs].min()
    near = (scores - threshold).abs() <= _NEAR * threshold.abs()
    beyond = int(((ours != theirs) & ~near).sum())
    kept = int(theirs.sum())
    return {"overlap": int((ours & theirs).sum()) / kept if kept else math.nan, "beyond": beyond}
