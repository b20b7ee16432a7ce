"""Convolutions and BatchNorm whose second derivative costs no more than it must.

A convolution c(x, w) is linear in each argument. With the gradient g at its output, c and the
gradients of ⟨c(x, w), g⟩ in x and in w are the three derivatives of one trilinear form, and the
derivatives of each of them are the other two again. Torch's own second derivative expresses a
weight gradient as a convolution with an image-sized kernel, for which CPUs have no fast code; here
all three stay with the fast kernels. Products come out the same up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pai_utils.curvature.calls import Call, Calls, Geometry


def fast_second_derivatives() -> Calls:
    """Compute convolutions and BatchNorm as above inside.

    A gradient taken inside with ``create_graph=True`` is for differentiating only: where the weight
    of a convolution is a leaf, its value is not computed, a third of a forward and backward pass.
    """
    return Calls({F.conv2d: _convolution, F.batch_norm: _batch_norm})


def _convolution(call: Call) -> Any:
    x, weight, geometry = call["input"], call["weight"], Geometry.of(call)
    padding, behind = zip(*geometry.margins, strict=True)
    if x.dim() != 4 or padding != behind:
        return call.run()
    last = x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    form = _Form(geometry, padding, layout, x.shape, weight.shape)
    output = _Derivative.apply(form, "output", x, weight)
    return output if call["bias"] is None else output.add_(call["bias"].view(-1, 1, 1))


def _batch_norm(call: Call) -> Any:
    """In evaluation mode a fixed scale and shift; torch's node for it has a slow derivative."""
    mean, variance, weight = call["running_mean"], call["running_var"], call["weight"]
    if call["training"] or mean is None or variance is None:
        return call.run()
    scale = (variance + call["eps"]).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    if call["bias"] is not None:
        shift = shift + call["bias"]
    shape = (1, -1) + (1,) * (call["input"].dim() - 2)
    return torch.addcmul(shift.view(shape), call["input"], scale.view(shape))


_ROLES = ("input", "weight", "output")


@dataclass(frozen=True)
class _Form:
    """x [N, in, H, W], w [out, in / groups, h, w], g [N, out, H', W']."""

    geometry: Geometry
    padding: tuple[int, ...]
    layout: torch.memory_format  # of x, and so of all that is computed: others are far slower
    input_shape: torch.Size
    weight_shape: torch.Size

    def derivative(self, role: str, first: Tensor, second: Tensor) -> Tensor:
        """In the argument of this role, from the two others in the order of ``_ROLES``."""
        where = self.geometry.stride, self.padding, self.geometry.dilation
        if role == "output":
            x = first.contiguous(memory_format=self.layout)
            return F.conv2d(x, second, None, *where, self.geometry.groups)
        gradient = second.contiguous(memory_format=self.layout)
        # Of the argument differentiated in, only shape and layout matter.
        x, weight = first, gradient.new_empty(1).expand(self.weight_shape)
        if role == "input":
            shape = gradient.new_empty(1).expand(self.input_shape)
            x, weight = torch.empty_like(shape, memory_format=self.layout), first
        more = False, [0, 0], self.geometry.groups, [role == name for name in _ROLES]
        found = torch.ops.aten.convolution_backward(gradient, x, weight, None, *where, *more)
        value: Tensor = found[_ROLES.index(role)]
        return value


class _Derivative(torch.autograd.Function):
    """The derivative of a form in one of its arguments, made from the two others."""

    @staticmethod
    def forward(
        ctx: Any,
        form: _Form,
        role: str,
        first: Tensor,
        second: Tensor,
        unused: torch.Size | None = None,
    ) -> Tensor:
        ctx.save_for_backward(first, second)
        ctx.form, ctx.role = form, role
        ctx.of_leaf = role == "output" and second.is_leaf
        if unused is not None:  # zeros of that shape stand for a value that nobody reads
            return second.new_zeros(1).expand(unused)
        return form.derivative(role, first, second)

    @staticmethod
    def backward(ctx: Any, along: Tensor) -> tuple[Any, ...]:
        names = [name for name in _ROLES if name != ctx.role]
        values = {**dict(zip(names, ctx.saved_tensors, strict=True)), ctx.role: along}

        def derivative(role: str) -> Any:
            given = [values[name] for name in _ROLES if name != role]
            if not torch.is_grad_enabled():
                return ctx.form.derivative(role, *given)
            # Of a leaf, the gradient is nobody's input.
            unused = values["weight"].shape if role == "weight" and ctx.of_leaf else None
            return _Derivative.apply(ctx.form, role, *given, unused)

        needed = zip(names, ctx.needs_input_grad[2:], strict=False)
        first, second = (derivative(name) if need else None for name, need in needed)
        return None, None, first, second, None
