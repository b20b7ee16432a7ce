"""Linear maps and convolutions whose second derivative costs no more than it must.

A convolution or a linear map c(x, w) is linear in each argument. With the gradient g at its output,
c and the gradients of ⟨c(x, w), g⟩ in x and in w are the three derivatives of one trilinear form,
and the derivatives of each of them are the other two again. Torch's own second derivative expresses
a weight gradient as a convolution with an image-sized kernel, for which CPUs have no fast code;
here all three stay with the fast kernels. Products come out the same up to rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pai_utils.curvature.calls import Call, Calls, Geometry


class FastSecondDerivatives(Calls):
    """Compute linear maps, convolutions and BatchNorm as above inside.

    A gradient taken inside with ``create_graph=True`` is for differentiating only: where a weight
    is a leaf, its value is not computed, a third of a forward and backward pass.
    """

    def __init__(self) -> None:
        super().__init__(
            {
                F.linear: self._linear,
                F.conv2d: self._convolution,
                F.batch_norm: _batch_norm,
                F.layer_norm: self._layer_norm,
                F.gelu: self._gelu,
            }
        )
        self.tangents_only = False
        """Whether gradients, Jᵀu, are differentiated in u alone: for Gauss-Newton products."""

    def _linear(self, call: Call) -> Any:
        x, weight, bias = call["input"], call["weight"], call["bias"]
        if x.dim() < 2 or weight.dim() != 2:
            return call.run()
        output = _Derivative.apply(_Linear(), self, "output", x.flatten(0, -2), weight)
        if bias is not None:
            output = output.add_(bias)
        return output.view(*x.shape[:-1], -1)

    def _convolution(self, call: Call) -> Any:
        x, weight, geometry = call["input"], call["weight"], Geometry.of(call)
        if geometry is None:
            return call.run()
        last = x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        form = _Convolution(geometry, layout, x.shape, weight.shape)
        output = _Derivative.apply(form, self, "output", x, weight)
        return output if call["bias"] is None else output.add_(call["bias"].view(-1, 1, 1))

    def _gelu(self, call: Call) -> Any:
        if call["approximate"] != "none":
            return call.run()
        return _Gelu.apply(call["input"], self)

    def _layer_norm(self, call: Call) -> Any:
        weight, bias = call["weight"], call["bias"]
        asked = any(p is not None and p.requires_grad for p in (weight, bias))
        if asked or len(call["normalized_shape"]) != 1:
            return call.run()
        return _LayerNorm.apply(call["input"], weight, bias, call["eps"], self)


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


class _Linear:
    """⟨x wᵀ, g⟩ with input x [N, in], weight w [out, in] and output gradient g [N, out]."""

    def output(self, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.T

    def input(self, weight: Tensor, gradient: Tensor) -> Tensor:
        return gradient @ weight

    def weight(self, x: Tensor, gradient: Tensor) -> Tensor:
        return gradient.T @ x


@dataclass(frozen=True)
class _Convolution:
    """x [N, in, H, W], w [out, in / groups, h, w], g [N, out, H', W']."""

    geometry: Geometry
    layout: torch.memory_format  # of x, and so of all that is computed: others are far slower
    input_shape: torch.Size
    weight_shape: torch.Size

    def output(self, x: Tensor, weight: Tensor) -> Tensor:
        g = self.geometry
        x = x.contiguous(memory_format=self.layout)
        return F.conv2d(x, weight, None, g.stride, g.padding, g.dilation, g.groups)

    def input(self, weight: Tensor, gradient: Tensor) -> Tensor:
        # Of the argument differentiated in, only shape and layout matter.
        shape = gradient.new_empty(1).expand(self.input_shape)
        x = torch.empty_like(shape, memory_format=self.layout)
        return self._backward(gradient, x, weight, [True, False, False])[0]

    def weight(self, x: Tensor, gradient: Tensor) -> Tensor:
        weight = gradient.new_empty(1).expand(self.weight_shape)
        return self._backward(gradient, x, weight, [False, True, False])[1]

    def _backward(
        self, gradient: Tensor, x: Tensor, w: Tensor, mask: list[bool]
    ) -> tuple[Tensor, ...]:
        g = self.geometry
        gradient = gradient.contiguous(memory_format=self.layout)
        found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
            gradient, x, w, None, g.stride, g.padding, g.dilation, False, [0, 0], g.groups, mask
        )
        return found


class _Derivative(torch.autograd.Function):
    """The derivative of a form in one of its arguments, made from the two others."""

    @staticmethod
    def forward(
        ctx: Any,
        form: _Linear | _Convolution,
        mode: FastSecondDerivatives,
        role: str,
        first: Tensor,
        second: Tensor,
        unused: torch.Size | None = None,
    ) -> Tensor:
        ctx.save_for_backward(first, second)
        ctx.form, ctx.mode, ctx.role = form, mode, role
        ctx.of_leaf = role == "output" and second.is_leaf
        if unused is not None:  # zeros of that shape stand for a value that nobody reads
            return second.new_zeros(1).expand(unused)
        value: Tensor = getattr(form, role)(first, second)
        return value

    @staticmethod
    def backward(ctx: Any, along: Tensor) -> tuple[Any, ...]:
        names = [name for name in _ROLES if name != ctx.role]
        values = {**dict(zip(names, ctx.saved_tensors, strict=True)), ctx.role: along}

        def derivative(role: str) -> Any:
            given = [values[name] for name in _ROLES if name != role]
            if not torch.is_grad_enabled():
                return getattr(ctx.form, role)(*given)
            if ctx.mode.tangents_only:
                given = [value if value is along else value.detach() for value in given]
            # Of a leaf, the gradient is nobody's input.
            unused = values["weight"].shape if role == "weight" and ctx.of_leaf else None
            return _Derivative.apply(ctx.form, ctx.mode, role, *given, unused)

        needed = zip(names, ctx.needs_input_grad[3:], strict=False)
        first, second = (derivative(name) if need else None for name, need in needed)
        return None, None, None, first, second, None


class _Gelu(torch.autograd.Function):
    """x Φ(x), with the normal distribution Φ and its density φ; the slope is Φ(x) + x φ(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mode: FastSecondDerivatives) -> Tensor:
        slope = torch.ops.aten.gelu_backward(x.new_ones(1).expand_as(x), x)
        ctx.save_for_backward(x, slope)
        ctx.mode = mode
        return F.gelu(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, slope = ctx.saved_tensors
        if not torch.is_grad_enabled() or ctx.mode.tangents_only:
            return gradient * slope, None
        return _GeluGradient.apply(gradient, x, slope), None


class _GeluGradient(torch.autograd.Function):
    """The slope times g, whose derivative in x is g φ(x) (2 − x²), formed once for all products."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, x: Tensor, slope: Tensor) -> Tensor:
        square = x.square()
        bend = square.mul(-0.5).exp_().mul_(square.neg_().add_(2)).mul_(gradient)
        ctx.save_for_backward(slope, bend.div_(math.sqrt(2 * math.pi)))
        return gradient * slope

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, along: Tensor) -> tuple[Tensor | None, ...]:
        slope, bend = ctx.saved_tensors
        return along * slope, along * bend if ctx.needs_input_grad[1] else None, None


class _LayerNorm(torch.autograd.Function):
    """γ x̂ + β over the last dimension of size n, x̂ = r (x − mean x), r = 1/√(var x + ε)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        mode: FastSecondDerivatives,
    ) -> Tensor:
        output, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight)
        ctx.mode = mode
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, *rest = ctx.saved_tensors
        pull = _Projection.apply if torch.is_grad_enabled() else _project
        return pull(gradient, x.detach() if ctx.mode.tangents_only else x, *rest), *(None,) * 4


class _Projection(torch.autograd.Function):
    """P ĝ with ĝ = γ g and the symmetric P = r (I − 1 1ᵀ/n − x̂ x̂ᵀ/n).

    Against a vector h its derivative in g is γ P h. In x, with c_h = x̂ᵀh/n and c_g = x̂ᵀĝ/n, it is
    −(r/n) (hᵀ P ĝ) x̂ − r c_g P h − r c_h P ĝ.
    """

    @staticmethod
    def forward(
        ctx: Any, gradient: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None
    ) -> Tensor:
        projected = _project(gradient, x, mean, rstd, weight)
        saved = [x, mean, rstd, weight]
        if ctx.needs_input_grad[1]:
            normalised = (x - mean).mul_(rstd)
            scaled = gradient if weight is None else gradient * weight
            along_x = _row_products(normalised, scaled) * rstd / x.shape[-1]  # r c_g
            saved += [projected, normalised, along_x]
        ctx.save_for_backward(*saved)
        return projected

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, along: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, *rest = ctx.saved_tensors
        image, in_x = _project(along, x, mean, rstd), None
        if rest:
            projected, normalised, along_x = rest
            factor = rstd / -x.shape[-1]
            in_x = normalised * (_row_products(along, projected) * factor)
            in_x.addcmul_(image, along_x, value=-1)
            in_x.addcmul_(projected, _row_products(along, normalised) * factor)
        return image if weight is None else image * weight, in_x, None, None, None


def _project(
    gradient: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None = None
) -> Tensor:
    projected: Tensor = torch.ops.aten.native_layer_norm_backward(
        gradient, x, x.shape[-1:], mean, rstd, weight, None, [True, False, False]
    )[0]
    return projected


def _row_products(left: Tensor, right: Tensor) -> Tensor:
    """Inner products over the last dimension, which is kept."""
    return (left * right).sum(-1, keepdim=True)
