"""Scores of a layer's own inputs: what removing a weight does to the output of its layer alone.

At every position, the outputs of a linear layer or convolution are products of its weights with a
row x of inputs: a token, or a patch of an image as wide as the kernel. With H the mean of x xᵀ over
all rows of all samples, removing weight w_i changes the output's mean square by w_i² H_ii, or, if
the other weights of the same output follow, by w_i² / [H⁻¹]_ii. Neither labels nor the layers
after it matter. The rows of a grouped convolution are those of one group, so that H is block
diagonal; a weight that is used several times has the rows of all its uses.

**Cost.** One forward pass. ``obs_inputs`` adds for a layer of K inputs a group and R rows 2RK²
operations for the products, and about K³ in float64 for the inverse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pai_utils.curvature.blocks import DAMPING
from pai_utils.curvature.calls import CONVOLUTIONS, TRANSPOSED, Call, Calls, Geometry, each_side
from pai_utils.curvature.persample import chunk_bytes, drawn_batches
from pai_utils.support.common import at_least_single, device_of, undisturbed
from pai_utils.support.sampling import Draw, Samples, batches, fitting_batches, sum_over_processes_


def wanda(model: nn.Module, names: Sequence[str], data: Samples, draw: Draw) -> dict[str, Tensor]:
    """``|w_i| √H_ii``: the weight times the root mean square of its input.

    Source: Sun, Liu, Bair & Kolter (2024), "A simple and effective pruning approach for large
    language models". They compare the weights of one output and take the norm of the inputs, which
    differs by a factor of the layer; the mean lets layers of other sizes be compared.

    Raises:
        ValueError: if no linear layer or convolution takes a named parameter as its weight.
    """
    found = _moments(model, names, data, draw, diagonal=True)
    magnitudes = {name: model.get_parameter(name).detach().abs() for name in names}
    return {name: found[name].scores(magnitudes[name], found[name].mean.sqrt()) for name in names}


def obs_inputs(
    model: nn.Module,
    names: Sequence[str],
    data: Samples,
    draw: Draw,
    *,
    damping: float = DAMPING,
) -> dict[str, Tensor]:
    """w_i² / (2 [(H + λI)⁻¹]_ii), with λ = ``damping`` · mean diagonal of H over the layer.

    The H take 8K² bytes for each layer of K inputs, times its groups: of a ViT-L some 4 GB.

    Source: Frantar & Alistarh (2022), "Optimal brain compression", whose first removal this is.

    Raises:
        ValueError: if no linear layer or convolution takes a named parameter as its weight, or H
            is singular in float64 in spite of its damping.
    """
    found = _moments(model, names, data, draw, diagonal=False)
    scores = {}
    for name in names:
        moments = found.pop(name)  # its H is no longer needed once its scores are known
        inverse = _inverse_diagonal(name, moments.mean, damping)
        squares = model.get_parameter(name).detach().square()
        scores[name] = moments.scores(squares, 0.5 / inverse)
    return scores


def _inverse_diagonal(name: str, matrices: Tensor, damping: float) -> Tensor:
    """Diagonals of the inverses of damped ``[groups, K, K]``; infinite where all is zero."""
    diagonal = matrices.diagonal(dim1=1, dim2=2)
    scale = float(diagonal.mean())
    if scale == 0 or not math.isfinite(scale):  # what is not finite is found in the scores
        return torch.full_like(diagonal, math.inf if scale == 0 else math.nan)
    damped = matrices / scale
    damped.diagonal(dim1=1, dim2=2).add_(damping)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed.any():
        raise ValueError(
            f"the inputs of {name!r} are fewer or less independent than its weights: their matrix "
            f"is singular in float64 with damping={damping}; choose a larger one"
        )
    inverse: Tensor = torch.cholesky_inverse(factor)
    return inverse.diagonal(dim1=1, dim2=2).div(scale)


@dataclass
class _Moments:
    """Sums of x xᵀ over a weight's rows, or of x²: ``[groups, K, K]`` or ``[groups, K]``."""

    sums: Tensor
    rows: Tensor  #: of each group
    transposed: bool

    @property
    def mean(self) -> Tensor:
        """Over the rows."""
        return self.sums / self.rows.view(-1, *(1,) * (self.sums.dim() - 1))

    def scores(self, weights: Tensor, factors: Tensor) -> Tensor:
        """The product of a weight's entries and their inputs' factors ``[groups, K]``."""
        # A transposed convolution's weight is [in, out of a group, ...], any other [out, in, ...].
        split = weights.unflatten(0, (len(factors), -1))
        shape = list(split.shape)
        shape[2 if self.transposed else 1] = 1
        each = factors.view(shape)
        if self.transposed:  # whose kernel reads its rows backwards
            each = each.flip(*range(3, each.dim()))
        scores: Tensor = split * each
        return scores.flatten(0, 1).to(at_least_single(weights))


def _moments(
    model: nn.Module, names: Sequence[str], data: Samples, draw: Draw, *, diagonal: bool
) -> dict[str, _Moments]:
    """Moments of the named weights' inputs."""
    indices, device = draw.indices(data), device_of(model)

    def compute(batch_size: int) -> _Observer:
        observer = _Observer(model, names, diagonal)
        with observer:
            for images, _, _ in drawn_batches(data, indices, batch_size, device, "layers' inputs"):
                model(images)
            if not observer.found:  # fewer samples than processes: zeros of the same shapes
                images, _ = next(batches(data, 1, device, indices[:1]))
                model(images)
                for moments in observer.found.values():
                    moments.sums.zero_()
                    moments.rows.zero_()
        return observer

    with undisturbed(model, any_output=True), torch.no_grad():
        observer = fitting_batches(compute, draw.batch_size)
    for moments in observer.found.values():
        sum_over_processes_(moments.sums)
        sum_over_processes_(moments.rows)
    without = [name for name in names if name not in observer.found]
    if without:
        raise ValueError(
            f"{without[0]!r} has no inputs: no linear layer or convolution takes it as its weight; "
            "name the weights to score, or take another scorer"
        )
    return observer.found


class _Observer(Calls):
    """Adds up the moments of layers' inputs while a model runs."""

    def __init__(self, model: nn.Module, names: Sequence[str], diagonal: bool) -> None:
        handlers: dict[Any, Callable[[Call], Any]] = {
            F.linear: self._linear,
            F.multi_head_attention_forward: self._attention,
            **dict.fromkeys(CONVOLUTIONS, self._convolution),
            **dict.fromkeys(TRANSPOSED, partial(self._convolution, transposed=True)),
        }
        super().__init__(handlers)
        self.found: dict[str, _Moments] = {}
        self._diagonal = diagonal
        self._names = {id(model.get_parameter(name)): name for name in names}

    def _linear(self, call: Call) -> Any:
        self._add(call["weight"], [call["input"]])
        return call.run()

    def _attention(self, call: Call) -> Any:
        """``nn.MultiheadAttention``: its projections are products that no observer sees."""
        streams = [call[name] for name in ("query", "key", "value")]
        if call["use_separate_proj_weight"]:
            for letter, stream in zip("qkv", streams, strict=True):
                self._add(call[f"{letter}_proj_weight"], [stream])
        else:
            alike = streams[0] is streams[1] is streams[2]
            self._add(call["in_proj_weight"], streams[:1] if alike else streams)
        weight, bias = call["out_proj_weight"], call["out_proj_bias"]
        identity = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        mixed, pattern = call.run(out_proj_weight=identity, out_proj_bias=None)
        self._add(weight, [mixed])
        return F.linear(mixed, weight, bias), pattern

    def _convolution(self, call: Call, transposed: bool = False) -> Any:
        weight = call["weight"]
        if id(weight) in self._names:
            x = call["input"].to(at_least_single(call["input"]))
            x = x[None] if x.dim() == weight.dim() - 1 else x
            samples, geometry = len(x), Geometry.of(call)
            if self._diagonal:  # the kernel moves over all samples alike
                x = _summed_squares(x)
            if transposed:
                x, geometry = _as_plain(x, geometry, call["output_padding"])
            windows = geometry.windows(x)
            places = range(3, 1 + weight.dim())
            groups, positions = windows.shape[1], math.prod(windows.shape[axis] for axis in places)
            size = windows[0, 0].numel() // positions
            moments = self._moments_of(weight, groups, size, transposed)
            if moments is not None:
                moments.rows += samples * positions
                if self._diagonal:
                    moments.sums += windows.sum((0, *places)).flatten(1)
                else:
                    step = max(1, chunk_bytes(x.device) // (windows[0].numel() * x.itemsize))
                    for some in windows.movedim(2, 2 + len(places)).split(step):
                        part = some.transpose(0, 1).reshape(groups, -1, size)
                        moments.sums += torch.bmm(part.mT, part)
        return call.run()

    def _add(self, weight: Tensor, streams: Sequence[Tensor]) -> None:
        """Add the rows ``[..., K]`` of a linear layer, or of each third of its outputs."""
        if id(weight) not in self._names:
            return
        rows = [stream.reshape(-1, stream.shape[-1]) for stream in streams]
        moments = self._moments_of(weight, len(rows), weight.shape[1])
        if moments is None:
            return
        moments.rows += torch.tensor([float(len(x)) for x in rows]).to(moments.rows)
        for sums, x in zip(moments.sums, rows, strict=True):
            x = x.to(at_least_single(x))
            sums += x.square().sum(0) if self._diagonal else x.mT @ x

    def _moments_of(
        self, weight: Tensor, groups: int, size: int, transposed: bool = False
    ) -> _Moments | None:
        """Where to add the rows of a weight, if they are wanted."""
        name = self._names.get(id(weight), "")
        if name and name not in self.found:
            shape = (groups, size) if self._diagonal else (groups, size, size)
            sums = torch.zeros(shape, dtype=torch.float64, device=weight.device)
            rows = torch.zeros(groups, dtype=torch.float64, device=weight.device)
            self.found[name] = _Moments(sums, rows, transposed)
        return self.found.get(name)


def _as_plain(x: Tensor, geometry: Geometry, more: int | Sequence[int]) -> tuple[Tensor, Geometry]:
    """A transposed convolution: one of stride 1, its input spread by zeros, its kernel reversed."""
    stride = geometry.stride
    spread = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
    stuffed = x.new_zeros(*x.shape[:2], *spread)
    stuffed[(slice(None), slice(None), *(slice(None, None, s) for s in stride))] = x
    ends = zip(geometry.reach, geometry.margins, each_side(more, len(stride)), strict=True)
    margins = tuple((reach - p, reach - p + extra) for reach, (p, _), extra in ends)
    return stuffed, replace(geometry, stride=(1,) * len(stride), margins=margins)


def _summed_squares(x: Tensor) -> Tensor:
    """Σ_n x_n² of ``[N, ...]``, as ``[1, ...]``."""
    # Ten times as fast as a sum over the first dimension where channels are last.
    total = torch.zeros_like(x[:1])
    for each in x.split(1):
        total.addcmul_(each, each)
    return total
