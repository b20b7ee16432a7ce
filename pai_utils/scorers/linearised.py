"""A network as a sum over paths, run in place of the network itself.

With all gates fixed, a network is linear in its input: logit k is Σ_p a_p v_p x_o over the paths p
from an input o to k, where v_p is the product of the weights on the path and a_p that of all other
factors, such as the gates of activations. :class:`PathNetwork` runs a model with the parameters
raised to a ``power`` in absolute value, and with gates of its own, by these rules:

- *Parameters* are ``|w|^power``; with power 0 a weight is 1, and 0 if it is exactly 0. *Buffers*
  are taken in absolute value, to the same power.
- *Constants that are added* are left out: biases, position tables. Only what comes from the image
  flows. Where two quantities that come from the image are subtracted, they are added.
- *Constants that are joined*, such as class tokens, are replaced by 2⁻⁴⁰ times the mean of the
  tokens they are joined to. They bring in no flow of their own, but have queries to attend with.
- *Activations* are the identity, or, with records, their gate f(x)/x on the data to the second
  power. (Of ReLU the gate is 0 or 1.)
- *BatchNorm* is its fixed scale: ``(|γ| / √(var + ε))^power``. So a network gives the same as one
  into whose convolutions BatchNorm was folded.
- *LayerNorm, GroupNorm, RMSNorm, L2 normalisation* are their gain ``|γ|^power``, with records times
  the second power of 1/σ on the data. The mean is not subtracted.
- *Attention*: the pattern is fixed. It is uniform over the tokens that the data-free network
  cannot tell apart (``patterns="mean"``: q·k over its sum), 1 for each pair of tokens
  (``patterns="count"``), or, with records, the second power of the softmax on the data. Masks and
  position biases of the pattern are additive constants.
- *Sigmoid gates* (squeeze-and-excitation) are 1, with records the second power of their value.
- *Max-pooling* stays, with ``patterns="count"`` becomes a sum, with records takes the entry that
  was largest on the data.
- Anything else that is linear (padding, reshapes, averages, skip connections) acts as it is.

**Queries, keys and gates.** With a fixed pattern no path runs through the weights of queries and
keys, or of squeeze-and-excitation; all of them would score zero and be pruned first. Therefore a
fixed factor a is replaced by a · s / [s], where s is the quantity it is made of (q·k; the gate's
input) in this network and [s] its value, taken as a constant. No value changes, but the weights
that make s carry flow. And where two quantities that come from the image are multiplied, each
passes on half of the gradient. So a product divides its flow equally among its factors (of
attention one half goes to values, a quarter each to queries and keys), and every neuron passes on
exactly what it receives; without the halves the flow would grow with every product. The price:
weights before an attention are reached through queries and keys as well as through values. Where
s is zero, as for a head whose queries are all pruned, the pattern's part of the flow ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

PATTERNS = ("mean", "count")

# What a class token is of the mean of the image's tokens: next to nothing, but not zero.
_SEED = 2.0**-40

# The functions that are looked at, by the rule for them.
_RULES: dict[Any, str] = {
    **dict.fromkeys(
        (
            *(F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_),
            *(F.relu6, F.hardtanh, F.hardtanh_, F.leaky_relu, F.leaky_relu_, F.rrelu, F.prelu),
            *(F.elu, F.elu_, F.selu, F.celu, F.gelu, F.silu, F.mish, F.hardswish),
            *(torch.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_, F.tanh, F.softsign),
        ),
        "_activation",
    ),
    **dict.fromkeys(
        (torch.sigmoid, torch.sigmoid_, Tensor.sigmoid, Tensor.sigmoid_, F.sigmoid, F.hardsigmoid),
        "_sigmoid",
    ),
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), "_softmax"),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), "_max_pool"),
    F.batch_norm: "_batch_norm",
    F.layer_norm: "_layer_norm",
    F.group_norm: "_group_norm",
    F.rms_norm: "_rms_norm",
    F.normalize: "_normalize",
    F.scaled_dot_product_attention: "_attention",
    F.multi_head_attention_forward: "_multi_head_attention",
    **dict.fromkeys(
        (
            *(F.linear, F.conv1d, F.conv2d, F.conv3d),
            *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
        ),
        "_layer",
    ),
    **dict.fromkeys(
        (
            *(torch.add, Tensor.add, Tensor.add_),
            *(Tensor.__add__, Tensor.__radd__, Tensor.__iadd__),
        ),
        "_sum",
    ),
    **dict.fromkeys(
        (
            *(torch.sub, torch.subtract, Tensor.sub, Tensor.sub_),
            *(Tensor.__sub__, Tensor.__isub__),
        ),
        "_difference",
    ),
    **dict.fromkeys((torch.rsub, Tensor.__rsub__), "_reversed_difference"),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), "_join"),
    **dict.fromkeys(
        (
            *(torch.mul, torch.multiply, Tensor.mul, Tensor.mul_),
            *(Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__),
            *(torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__),
        ),
        "_product",
    ),
    torch.einsum: "_einsum",
}


class _Observer(TorchFunctionMode):
    """Hands the model's calls to the rules that a subclass has; other calls pass unchanged."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        rule = getattr(self, _RULES.get(func, ""), None)
        if rule is None:
            return func(*args, **kwargs or {})
        return rule(func, *args, **kwargs or {})

    def _multi_head_attention(
        self,
        func: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        embed_dim_to_check: int,
        num_heads: int,
        in_proj_weight: Tensor | None,
        in_proj_bias: Tensor | None,
        bias_k: Tensor | None,
        bias_v: Tensor | None,
        add_zero_attn: bool,
        dropout_p: float,
        out_proj_weight: Tensor,
        out_proj_bias: Tensor | None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        use_separate_proj_weight: bool = False,
        q_proj_weight: Tensor | None = None,
        k_proj_weight: Tensor | None = None,
        v_proj_weight: Tensor | None = None,
        is_causal: bool = False,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Torch's own, made of calls that have rules; inputs ``[tokens, samples, width]``."""
        if query.dim() != 3 or add_zero_attn or bias_k is not None or key_padding_mask is not None:
            raise ValueError(
                "nn.MultiheadAttention with padding masks, bias_kv, zero attention or unbatched "
                "inputs has no defined paths"
            )
        weights: tuple[Tensor | None, ...]
        if use_separate_proj_weight:
            weights = (q_proj_weight, k_proj_weight, v_proj_weight)
        else:
            assert in_proj_weight is not None
            weights = in_proj_weight.chunk(3)
        biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        heads = [
            self._project(x, w, b).unflatten(2, (num_heads, -1)).permute(1, 2, 0, 3)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        ]
        mixed = self._attention(func, *heads, attn_mask=attn_mask, is_causal=is_causal)
        joined = mixed.permute(2, 0, 1, 3).flatten(2)
        return self._project(joined, out_proj_weight, out_proj_bias), None

    def _project(self, input: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        layer = getattr(self, "_layer", None)
        output: Tensor = (
            F.linear(input, weight, bias) if layer is None else layer(F.linear, input, weight, bias)
        )
        return output

    def _attention(self, func: Any, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = func(*args, **kwargs)
        return output


class Recorder(_Observer):
    """Collects the factors a_p of a forward pass of the model itself, in ``records``."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[Tensor] = []

    def _activation(self, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        # At 0 the slope from the left, which for ReLU is 0. The function may work in place.
        at = torch.where(input == 0, -torch.finfo(input.dtype).eps, input)
        self.records.append(func(at.clone(), *args, **kwargs) / at)
        return func(input, *args, **kwargs)

    def _sigmoid(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        output = func(*args, **kwargs)
        self.records.append(output.clone())
        return output

    _softmax = _sigmoid

    def _max_pool(
        self,
        func: Any,
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:
        output, indices = F.max_pool2d(
            input, kernel_size, stride, padding, dilation, ceil_mode, return_indices=True
        )
        self.records.append(indices)
        return (output, indices) if return_indices else output

    def _layer_norm(
        self, func: Any, input: Tensor, normalized_shape: Sequence[int], *args: Any, **kwargs: Any
    ) -> Any:
        dims = tuple(range(-len(normalized_shape), 0))
        eps = kwargs.get("eps", args[2] if len(args) > 2 else 1e-5)
        variance = input.var(dims, correction=0, keepdim=True)
        self.records.append((variance + eps).rsqrt())
        return func(input, normalized_shape, *args, **kwargs)

    def _group_norm(
        self,
        func: Any,
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Any:
        variance = input.reshape(len(input), num_groups, -1).var(-1, correction=0, keepdim=True)
        self.records.append((variance + eps).rsqrt())
        return func(input, num_groups, weight, bias, eps)

    def _rms_norm(
        self,
        func: Any,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        eps: float | None = None,
    ) -> Any:
        dims = tuple(range(-len(normalized_shape), 0))
        mean = input.square().mean(dims, keepdim=True)
        self.records.append((mean + (torch.finfo(input.dtype).eps if eps is None else eps)).rsqrt())
        return func(input, normalized_shape, weight, eps)

    def _normalize(
        self, func: Any, input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12
    ) -> Any:
        self.records.append(input.norm(p, dim, keepdim=True).clamp_min(eps).reciprocal())
        return func(input, p, dim, eps)

    def _attention(
        self,
        func: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if enable_gqa:
            key, value = _repeated(key, value, like=query)
        products = query @ key.transpose(-2, -1)
        products *= query.shape[-1] ** -0.5 if scale is None else scale
        if is_causal:
            attn_mask = torch.ones_like(products, dtype=torch.bool).tril()
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                products = products.masked_fill(~attn_mask, -torch.inf)
            else:
                products = products + attn_mask
        pattern = products.softmax(-1)
        self.records.append(pattern)
        return pattern @ value


class PathNetwork:
    """The sum over paths of ``model``; see the module. Computes in float64.

    To be made and used inside :func:`~pai_utils.support.common.undisturbed`.

    Args:
        model: images to logits; neither its parameters nor torch's functions are touched.
        names: the weights that gradients are asked for; they are in ``weights``.
        power: of the parameters: 0, 1 or 2.
        shape: of one image, ``[3, H, W]``.
        patterns: of attention and max-pooling where there are no records.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        power: int,
        shape: Sequence[int],
        *,
        patterns: str = "mean",
    ) -> None:
        self._model = model
        self._power = power
        self._patterns = patterns
        self._values = _raised(model, power)
        # Which operands come from the image is the same at each run: the calls are the same.
        self._roles: list[tuple[bool, ...]] = []
        device = next(iter(self._values.values())).device
        image = torch.ones(1, *shape, dtype=torch.float64, device=device, requires_grad=True)
        with torch.enable_grad(), _Paths(power, patterns, roles=self._roles):
            logits = functional_call(model, self._values, (image,))
        self.classes: int = logits.shape[1]
        self.weights = {name: self._values[name].requires_grad_() for name in names}

    def __call__(self, images: Tensor, records: Sequence[Tensor] | None = None) -> Tensor:
        """Logits ``[N, C]`` of non-negative ``images [N, 3, H, W]``."""
        mode = _Paths(
            self._power,
            self._patterns,
            replay=iter(self._roles),
            records=None if records is None else iter(records),
        )
        with mode:
            logits: Tensor = functional_call(self._model, self._values, (images,))
        return logits


class _Paths(_Observer):
    """The rules; see the module."""

    def __init__(
        self,
        power: int,
        patterns: str,
        *,
        roles: list[tuple[bool, ...]] | None = None,
        replay: Iterator[tuple[bool, ...]] | None = None,
        records: Iterator[Tensor] | None = None,
    ) -> None:
        super().__init__()
        self._power = power
        self._patterns = patterns
        self._roles = roles
        self._replay = replay
        self._records = records

    def _from_image(self, *operands: Any) -> tuple[bool, ...]:
        """Which operands come from the image: found once by what has a graph, then remembered."""
        if self._replay is not None:
            return next(self._replay)
        flags = tuple(isinstance(o, Tensor) and o.requires_grad for o in operands)
        if self._roles is not None:
            self._roles.append(flags)
        return flags

    def _squared_record(self) -> Tensor | None:
        return None if self._records is None else next(self._records).double().square()

    def _layer(
        self,
        func: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        output: Tensor = func(input, weight, None, *args, **kwargs)
        return output

    def _sum(self, func: Any, input: Any, other: Any, *args: Any, **kwargs: Any) -> Any:
        kept = self._from_image(input, other)
        if any(kept):
            input, other = (v if k else _zero(v) for v, k in zip((input, other), kept, strict=True))
        return func(input, other, *args, **kwargs)

    def _difference(self, func: Any, input: Any, other: Any, *args: Any, **kwargs: Any) -> Any:
        kept = self._from_image(input, other)
        if any(kept):
            input = input if kept[0] else _zero(input)
            other = -other if kept[1] else _zero(other)
        return func(input, other, *args, **kwargs)

    def _reversed_difference(
        self, func: Any, input: Any, other: Any, *args: Any, **kwargs: Any
    ) -> Any:
        kept = self._from_image(input, other)
        if any(kept):
            input = -input if kept[0] else _zero(input)
            other = other if kept[1] else _zero(other)
        return func(input, other, *args, **kwargs)

    def _join(self, func: Any, tensors: Sequence[Tensor], dim: int = 0, **kwargs: Any) -> Any:
        kept = self._from_image(*tensors)
        if any(kept):
            source = next(t for t, k in zip(tensors, kept, strict=True) if k)
            seed = _SEED * source.mean(dim, keepdim=True)
            tensors = [t if k else seed.expand_as(t) for t, k in zip(tensors, kept, strict=True)]
        return func(tensors, dim, **kwargs)

    def _product(self, func: Any, input: Any, other: Any, *args: Any, **kwargs: Any) -> Any:
        input, other = _shared((input, other), self._from_image(input, other))
        return func(input, other, *args, **kwargs)

    def _einsum(self, func: Any, equation: str, *operands: Any) -> Any:
        return func(equation, *_shared(operands, self._from_image(*operands)))

    def _activation(self, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        gate = self._squared_record()
        # No alias of the input, which the model may write to afterwards.
        return input.clone() if gate is None else input * gate

    def _sigmoid(self, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        value = self._squared_record()
        return _unit(input) if value is None else value * _unit(input)

    def _softmax(self, func: Any, input: Tensor, dim: int = -1, *_: Any, **__: Any) -> Tensor:
        value = self._squared_record()
        if value is None and self._patterns == "mean":
            sums = input.detach().sum(dim, keepdim=True)
            even = torch.full_like(input, 1 / input.shape[dim])
            value = torch.where(sums > 0, input.detach() / sums, even)
        return _unit(input) if value is None else value * _unit(input)

    def _attention(
        self,
        func: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *_: Any,
        enable_gqa: bool = False,
        **__: Any,
    ) -> Tensor:
        from_query, from_key, from_value = self._from_image(query, key, value)
        if enable_gqa:
            key, value = _repeated(key, value, like=query)
        query, key = _shared((query, key), (from_query, from_key))
        pattern = self._softmax(func, query @ key.transpose(-2, -1))
        pattern, value = _shared((pattern, value), (from_query or from_key, from_value))
        mixed: Tensor = pattern @ value
        return mixed

    def _max_pool(
        self,
        func: Any,
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:
        if return_indices:
            raise ValueError("max-pooling whose indices are used has no defined paths")
        if self._records is not None:
            indices = next(self._records)
            return input.flatten(-2).gather(-1, indices.flatten(-2)).view_as(indices)
        if self._patterns == "mean":
            return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)
        if dilation not in (1, (1, 1), [1, 1]):
            raise ValueError("the paths through a dilated max-pooling are not counted")
        return F.avg_pool2d(
            input,
            kernel_size,
            stride,
            padding,
            ceil_mode,
            count_include_pad=True,
            divisor_override=1,
        )

    def _batch_norm(
        self,
        func: Any,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if running_var is not None and not training:
            scale = (running_var + eps) ** (-self._power / 2)
            weight = scale if weight is None else weight * scale
        return _by_channel(input, weight)

    def _layer_norm(
        self,
        func: Any,
        input: Tensor,
        normalized_shape: Any,
        weight: Tensor | None = None,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        scale = self._squared_record()
        scaled = input.clone() if scale is None else input * scale
        return scaled if weight is None else scaled * weight

    _rms_norm = _layer_norm

    def _group_norm(
        self,
        func: Any,
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        scale = self._squared_record()
        if scale is not None:
            input = (input.reshape(len(input), num_groups, -1) * scale).view_as(input)
        return _by_channel(input, weight)

    def _normalize(self, func: Any, input: Tensor, *_: Any, **__: Any) -> Tensor:
        scale = self._squared_record()
        return input.clone() if scale is None else input * scale


def _raised(model: nn.Module, power: int) -> dict[str, Tensor]:
    """|t|^power of all parameters and buffers in float64; statistics of norms and integers stay."""
    statistics = {
        buffer
        for module in model.modules()
        if isinstance(module, _NormBase)
        for buffer in module.buffers(recurse=False)
    }
    values = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        value = tensor.detach()
        if value.is_floating_point():
            value = value.double()
            if tensor in statistics:
                pass
            elif power == 0:  # a pruned weight has no paths
                value = (value != 0).double()
            else:
                value = value.abs() ** power
        values[name] = value
    return values


def _zero(value: Any) -> Any:
    return torch.zeros_like(value) if isinstance(value, Tensor) else 0


def _shared(operands: Sequence[Any], from_image: Sequence[bool]) -> list[Any]:
    """Factors of a product: each that comes from the image passes on an equal part."""
    parts = sum(from_image)
    if parts < 2:
        return list(operands)
    return [
        # The value is the same; the gradient is a fraction.
        o / parts + (o * (1 - 1 / parts)).detach() if kept else o
        for o, kept in zip(operands, from_image, strict=True)
    ]


def _unit(quantity: Tensor) -> Tensor:
    """The constant 1 as s / [s], which has a gradient."""
    if not (torch.is_grad_enabled() and quantity.requires_grad):
        return torch.ones_like(quantity)
    value = quantity.detach()
    zero = value == 0
    return quantity / value.masked_fill(zero, 1) + zero


def _by_channel(input: Tensor, scale: Tensor | None) -> Tensor:
    return input.clone() if scale is None else input * scale.view(-1, *(1,) * (input.dim() - 2))


def _repeated(key: Tensor, value: Tensor, *, like: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of grouped queries, one for each query head."""
    times = like.shape[-3] // key.shape[-3]
    return key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
