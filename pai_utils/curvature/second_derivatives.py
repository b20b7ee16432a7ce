"""Layers whose second derivative costs no more than it must.

A convolution or a linear map c(x, w) is linear in each argument, and so are its two gradients:
every derivative of any order is again a product, an input gradient or a weight gradient. Torch's
own second derivative expresses a weight gradient as a convolution with an image-sized kernel, for
which CPUs have no fast code, and those of normalisations and GELU as long chains of elementwise
operations. Inside :class:`FastSecondDerivatives` the same functions are computed by nodes that
stay with the fast kernels. Products come out the same up to rounding; nothing is patched.

The weight gradients themselves, a third of a forward and backward pass, are left out: a product
needs their derivatives, not their values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class FastSecondDerivatives(TorchFunctionMode):
    """Compute linear maps, convolutions, normalisations, GELU and attention as above inside.

    A gradient taken inside with ``create_graph=True`` is for differentiating only: where a weight
    is a leaf, its value is not computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear_only = False

    @contextmanager
    def only_linear(self) -> Iterator[None]:
        """Differentiate Jᵀu in u alone inside: what a Gauss-Newton product asks for.

        Torch tells a custom node which of its inputs have a graph, not which are asked for.
        """
        self.linear_only = True
        try:
            yield
        finally:
            self.linear_only = False

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _REPLACEMENTS:
            return _REPLACEMENTS[func](self, *args, **kwargs or {})
        return func(*args, **kwargs or {})


def _conv2d(
    mode: FastSecondDerivatives,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    if isinstance(padding, str) or input.dim() != 4:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    last = input.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    layer = _Convolution(_pair(stride), _pair(padding), _pair(dilation), groups, layout)
    output: Tensor = _Product.apply(input, weight, bias, layer, mode)
    return output


def _linear(
    mode: FastSecondDerivatives, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    if input.dim() < 2 or weight.dim() != 2:
        return F.linear(input, weight, bias)
    rows = input.reshape(-1, input.shape[-1])
    output: Tensor = _Product.apply(rows, weight, bias, _Linear(), mode)
    return output.view(*input.shape[:-1], -1)


def _attention(
    mode: FastSecondDerivatives,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None or dropout_p or is_causal or enable_gqa:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    attention: Tensor = _Softmax.apply(query * factor @ key.transpose(-2, -1), mode)
    return attention @ value


def _batch_norm(
    mode: FastSecondDerivatives,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or running_mean is None or running_var is None:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    scale = (running_var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -running_mean * scale
    if bias is not None:
        shift = shift + bias
    shape = (1, -1) + (1,) * (input.dim() - 2)
    return torch.addcmul(shift.view(shape), input, scale.view(shape))


def _gelu(mode: FastSecondDerivatives, input: Tensor, approximate: str = "none") -> Tensor:
    if approximate != "none":
        return F.gelu(input, approximate=approximate)
    output: Tensor = _Gelu.apply(input, mode)
    return output


def _layer_norm(
    mode: FastSecondDerivatives,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    asked = any(p is not None and p.requires_grad for p in (weight, bias))
    if asked or len(normalized_shape) != 1:
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    output: Tensor = _LayerNorm.apply(input, weight, bias, eps, mode)
    return output


_REPLACEMENTS: dict[Any, Callable[..., Tensor]] = {
    F.conv2d: _conv2d,
    F.linear: _linear,
    F.scaled_dot_product_attention: _attention,
    F.batch_norm: _batch_norm,
    F.gelu: _gelu,
    F.layer_norm: _layer_norm,
}


class _Bilinear(Protocol):
    """A map c(x, w), linear in each argument, and the gradients of ⟨c(x, w), g⟩."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...

    def input_gradient(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor: ...

    def weight_gradient(self, gradient: Tensor, x: Tensor, shape: torch.Size) -> Tensor: ...


@dataclass(frozen=True)
class _Linear:
    """x [N, in], w [out, in], c [N, out]."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def input_gradient(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        return gradient @ weight

    def weight_gradient(self, gradient: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        return gradient.T @ x


@dataclass(frozen=True)
class _Convolution:
    """x [N, in, H, W], w [out, in / groups, h, w], c [N, out, H', W']."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    layout: torch.memory_format  # of x, and so of all that is computed: others are far slower

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = x.contiguous(memory_format=self.layout)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def input_gradient(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        # Of the argument differentiated in, only shape and layout are looked at.
        x = torch.empty(
            shape, dtype=gradient.dtype, device=gradient.device, memory_format=self.layout
        )
        return self._gradients(gradient, x, weight, [True, False, False])[0]

    def weight_gradient(self, gradient: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        weight = gradient.new_empty(1).expand(shape)
        return self._gradients(gradient, x, weight, [False, True, False])[1]

    def _gradients(
        self, gradient: Tensor, x: Tensor, weight: Tensor, mask: list[bool]
    ) -> tuple[Tensor, ...]:
        gradient = gradient.contiguous(memory_format=self.layout)
        geometry = (self.stride, self.padding, self.dilation, False, [0, 0], self.groups)
        result: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
            gradient, x, weight, None, *geometry, mask
        )
        return result


class _Product(torch.autograd.Function):
    """c(x, w) + b."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: _Bilinear,
        mode: FastSecondDerivatives,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        # Of a leaf, the gradient is nobody's input.
        ctx.layer, ctx.mode, ctx.leaf = layer, mode, weight.is_leaf
        return layer.product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _, _ = ctx.needs_input_grad
        settings = (ctx.layer, ctx.mode)
        if not torch.is_grad_enabled():
            in_x = ctx.layer.input_gradient(gradient, weight, x.shape) if need_x else None
            in_weight = (
                ctx.layer.weight_gradient(gradient, x, weight.shape) if need_weight else None
            )
        else:
            in_x = _InputGradient.apply(gradient, weight, x.shape, *settings) if need_x else None
            in_weight = (
                _WeightGradient.apply(x, gradient, weight.shape, ctx.leaf, *settings)
                if need_weight
                else None
            )
        dims = [d for d in range(gradient.dim()) if d != 1]
        return in_x, in_weight, gradient.sum(dims) if need_bias else None, None, None


class _InputGradient(torch.autograd.Function):
    """The gradient of ⟨c(x, w), g⟩ in x, bilinear in g and w."""

    @staticmethod
    def forward(
        ctx: Any,
        gradient: Tensor,
        weight: Tensor,
        shape: torch.Size,
        layer: _Bilinear,
        mode: FastSecondDerivatives,
    ) -> Tensor:
        ctx.save_for_backward(gradient, weight)
        ctx.layer, ctx.mode = layer, mode
        return layer.input_gradient(gradient, weight, shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, along: Tensor) -> tuple[Tensor | None, ...]:
        gradient, weight = ctx.saved_tensors
        need_gradient, need_weight, *_ = ctx.needs_input_grad
        in_gradient = ctx.layer.product(along, weight, None) if need_gradient else None
        in_weight = None
        if need_weight and not ctx.mode.linear_only:
            in_weight = ctx.layer.weight_gradient(gradient, along, weight.shape)
        return in_gradient, in_weight, None, None, None


class _WeightGradient(torch.autograd.Function):
    """The gradient of ⟨c(x, w), g⟩ in w, bilinear in x and g; zeros in place of an unused value."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gradient: Tensor,
        shape: torch.Size,
        unused: bool,
        layer: _Bilinear,
        mode: FastSecondDerivatives,
    ) -> Tensor:
        ctx.save_for_backward(x, gradient)
        ctx.layer, ctx.mode = layer, mode
        if unused:
            return gradient.new_zeros(1).expand(shape)
        return layer.weight_gradient(gradient, x, shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, along: Tensor) -> tuple[Tensor | None, ...]:
        x, gradient = ctx.saved_tensors
        need_x, need_gradient, *_ = ctx.needs_input_grad
        in_gradient = ctx.layer.product(x, along, None) if need_gradient else None
        in_x = None
        if need_x and not ctx.mode.linear_only:
            in_x = ctx.layer.input_gradient(gradient, along, x.shape)
        return in_x, in_gradient, None, None, None, None


class _Softmax(torch.autograd.Function):
    """Over the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mode: FastSecondDerivatives) -> Tensor:
        y = x.softmax(-1)
        ctx.save_for_backward(y)
        ctx.mode = mode
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return torch.ops.aten._softmax_backward_data(gradient, y, -1, y.dtype), None
        return _SoftmaxGradient.apply(gradient, y, ctx.mode), None


class _SoftmaxGradient(torch.autograd.Function):
    """A g with A = diag y − y yᵀ.

    Against a vector h its derivative in g is A h; in y it is (h − yᵀh) (g − yᵀg), up to a
    constant in each row, which A takes to zero afterwards.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, y: Tensor, mode: FastSecondDerivatives) -> Tensor:
        centred = gradient - _row_products(gradient, y)
        ctx.save_for_backward(centred, y)
        ctx.mode = mode
        return centred * y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, along: Tensor) -> tuple[Tensor | None, ...]:
        centred, y = ctx.saved_tensors
        h = along - _row_products(along, y)
        in_y = h * centred if ctx.needs_input_grad[1] and not ctx.mode.linear_only else None
        return h.mul_(y), in_y, None


class _Gelu(torch.autograd.Function):
    """x Φ(x), Φ and φ the normal distribution and its density; its slope is Φ(x) + x φ(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mode: FastSecondDerivatives) -> Tensor:
        slope = torch.ops.aten.gelu_backward(x.new_ones(1).expand_as(x), x)
        ctx.save_for_backward(x, slope)
        ctx.mode = mode
        return F.gelu(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, slope = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return gradient * slope, None
        return _GeluGradient.apply(gradient, x, slope, ctx.mode), None


class _GeluGradient(torch.autograd.Function):
    """The slope times g, whose derivative in x is g φ(x) (2 − x²)."""

    @staticmethod
    def forward(
        ctx: Any, gradient: Tensor, x: Tensor, slope: Tensor, mode: FastSecondDerivatives
    ) -> Tensor:
        # Formed once, for all products to come.
        square = x.square()
        bend = square.mul(-0.5).exp_().mul_(square.neg_().add_(2)).mul_(gradient)
        ctx.save_for_backward(slope, bend.div_(math.sqrt(2 * math.pi)))
        ctx.mode = mode
        return gradient * slope

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, along: Tensor) -> tuple[Tensor | None, ...]:
        slope, bend = ctx.saved_tensors
        need_gradient, need_x, *_ = ctx.needs_input_grad
        return (
            along * slope if need_gradient else None,
            along * bend if need_x and not ctx.mode.linear_only else None,
            None,
            None,
        )


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
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight = ctx.saved_tensors
        if not torch.is_grad_enabled():
            result = _project(gradient, x, mean, rstd, weight)
        else:
            result = _LayerNormGradient.apply(gradient, x, mean, rstd, weight, ctx.mode)
        return result, None, None, None, None


class _LayerNormGradient(torch.autograd.Function):
    """P ĝ with ĝ = γ g and P = r (I − 1 1ᵀ/n − x̂ x̂ᵀ/n), which is symmetric.

    Against a vector h its derivative in g is γ P h. In x, with c_h = x̂ᵀh/n and c_g = x̂ᵀĝ/n,

        ∂(hᵀ P ĝ)/∂x = −(r/n) (hᵀ P ĝ) x̂ − r c_g P h − r c_h P ĝ.
    """

    @staticmethod
    def forward(
        ctx: Any,
        gradient: Tensor,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor | None,
        mode: FastSecondDerivatives,
    ) -> Tensor:
        projected = _project(gradient, x, mean, rstd, weight)
        normalised = (x - mean).mul_(rstd)
        scaled = gradient if weight is None else gradient * weight
        along_x = _row_products(normalised, scaled) * rstd / x.shape[-1]  # r c_g
        ctx.save_for_backward(x, mean, rstd, weight, projected, normalised, along_x)
        ctx.mode = mode
        return projected

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, along: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, projected, normalised, along_x = ctx.saved_tensors
        image = _project(along, x, mean, rstd, None)
        in_gradient = image if weight is None else image * weight
        in_x = None
        if ctx.needs_input_grad[1] and not ctx.mode.linear_only:
            factor = rstd / -x.shape[-1]
            in_x = normalised * (_row_products(along, projected) * factor)
            in_x.addcmul_(image, along_x, value=-1)
            in_x.addcmul_(projected, _row_products(along, normalised) * factor)
        return in_gradient, in_x, None, None, None, None


def _project(
    gradient: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None
) -> Tensor:
    """P (γ g), torch's own gradient of layer normalisation."""
    mask = [True, False, False]
    projected: Tensor = torch.ops.aten.native_layer_norm_backward(
        gradient, x, x.shape[-1:], mean, rstd, weight, None, mask
    )[0]
    return projected


def _row_products(left: Tensor, right: Tensor) -> Tensor:
    """Inner products over the last dimension, which is kept."""
    return (left * right).sum(-1, keepdim=True)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])
