"""Scores from sums over the paths of a network: ``synflow`` and ``px``.

With all gates fixed, a network is linear in its input: logit k is Σ_p a_p v_p x_o over the paths p
from an input o to k, where v_p is the product of the weights on the path and a_p that of all other
factors, such as the gates of activations. The book's theory says which paths the two scores sum
over. A copy of the model in float64 computes these sums. Its parameters are raised to a *power*, 0,
1 or 2, and its functions follow these rules, with the factors of the model on some data or without:

- *Parameters and buffers* are ``|w|^power``; with power 0 a weight is 1, and 0 if it is exactly 0.
- *Constants that are added* are left out: biases, position tables. Factors lose their signs.
- *Constants that are joined*, such as class tokens, are 2⁻⁴⁰ times the mean of their fellows: next
  to no flow, but queries to attend with.
- *Activations* are the identity; with data, their gate f(x)/x squared, which for ReLU is 0 or 1.
- *BatchNorm* is its fixed scale ``(|γ| / √(var + ε))^power``, as if folded into the convolution.
- *Other normalisations* are their gain ``|γ|^power``; with data, times the square of 1/σ.
- *Attention* has a fixed pattern: q·k over its sum (for power 2: 1 for each pair of tokens); with
  data, the square of the softmax. Masks and position biases of the pattern are constants.
- *Sigmoid gates* (squeeze-and-excitation) are 1; with data, the square of their value.
- *Max-pooling* stays (for power 2 it is a sum); with data, it takes the entry that was largest.

Any other function of what comes from the image is refused by its name.

**Queries, keys and gates.** With a fixed pattern all weights that make it would score zero. So a
factor a is replaced by a · s / [s], where s is what it is made of (q·k; the gate's input) in this
network and [s] its value, taken as a constant: no value changes, but these weights carry flow.
Where two quantities that come from the image are multiplied, each passes on half of the gradient,
so that every neuron passes on exactly what it receives.

**Degrees.** Sums over paths are of degree 1 in the image, gates and patterns of degree 0, and q·k
is of degree 2 until it becomes a pattern. Quantities of different degrees cannot be added, since
the scale of the image would decide how they compare: products of two streams, as in SwiGLU, gMLP
and linear attention, are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from pai_utils.curvature.calls import Call, Calls
from pai_utils.curvature.persample import drawn_batches
from pai_utils.curvature.products import gradients
from pai_utils.models.encoders import image_shape
from pai_utils.support.common import at_least_single, check_names, device_of, replica, undisturbed
from pai_utils.support.sampling import Draw, Samples, batches, fitting_batches, sum_over_processes

# Flow grows by orders of magnitude a layer: it starts low, so that deep networks do not overflow.
# All scores have the same factor, which goes when they are divided by the whole.
_FLOW = 2.0**-300
_COUNT = 2.0**-900
# What a class token is of the mean of the image's tokens: next to nothing, but not zero.
_SEED = 2.0**-40


def synflow(
    model: nn.Module,
    names: Sequence[str],
    data: Samples | None,
    draw: Draw,
    *,
    image_size: int | Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """``|w ⊙ ∂R/∂w| / R``, R the sum of the logits of an image of ones with weights ``|w|``.

    ``R = 1ᵀ ∏ |W_l| 1`` for a network of layers W_l: the score is the share of R on paths through
    w, and in a network without skip connections those of each layer sum to 1. (The paper does not
    divide by R; the order is the same.) What a path is in networks with attention, gates and
    normalisation says :mod:`pai_utils.scorers.paths`; that definition is ours.

    No sample is looked at. ``image_size`` is that of the image, by default of the data's, and as
    :func:`~pai_utils.models.encoders.image_shape` takes it.

    Source: Tanaka, Kunin, Yamins & Ganguli (2020), "Pruning neural networks without any data by
    iteratively conserving synaptic flow". They prune in 100 rounds: in one round, whole layers
    vanish at high sparsity.

    Raises:
        ValueError: if no size is known, or the model calls a function without a rule.
    """
    shape = _image_shape(model, data, image_size)
    network = _Network(model, names, 1, shape)
    image = torch.full((1, *shape), _FLOW, dtype=torch.float64, device=device_of(model))
    return _shares(model, network, _flow(network, image, _FLOW))


def px(
    model: nn.Module, names: Sequence[str], data: Samples, draw: Draw, *, estimator: str = "bound"
) -> dict[str, Tensor]:
    """w² ∂R/∂(w²) / R, R a bound on the trace of the neural tangent kernel, by paths.

    With logit k of sample n as Σ_p a_p(x_n) v_p x_{n,o(p)} over the paths p into k (v_p: product of
    weights; a_p: gates; o(p): its origin), the paper bounds the trace by Σ_j ∂R/∂(w_j²) with ::

        R = Σ_n Σ_k (Σ_p a_p(x_n)² x_{n,o(p)}²) (Σ_p v_p²)              estimator="bound"

    The score is the share of R on paths through w. What a_p and v_p are in other networks than
    those of ReLU says :mod:`pai_utils.scorers.paths`.

    **Pitfall.** If the last layer connects all its inputs to all logits, as the linear head of any
    classifier does, the first factor is the same for every k: then it scales all scores alike, and
    the order does not depend on the data. ``estimator="gated"`` keeps each path's data with
    its weights, ::

        R = Σ_n Σ_k Σ_p a_p(x_n)² v_p² x_{n,o(p)}²                      estimator="gated"

    so that Σ_j ∂R/∂(w_j²) is the trace without the products of different paths. This second form is
    ours. Costs a forward pass of the model and one in float64; ``"gated"`` a backward pass as well.

    Source: Iurada, Ciccone & Tommasi (2024), "Finding lottery tickets in vision models via
    data-driven spectral foresight pruning".

    Raises:
        ValueError: if ``estimator`` is unknown, or the model calls a function without a rule.
    """
    check_names("estimator", [estimator], ["bound", "gated"])
    indices, device = draw.indices(data), device_of(model)
    shape = _image_shape(model, data, None)
    network = _Network(model, names, 2, shape)
    zero = torch.zeros((), dtype=torch.float64, device=device)

    def summed(
        like: dict[str, Tensor], part: Callable[[Tensor, list[Tensor]], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        def compute(size: int) -> dict[str, Tensor]:
            total = {name: torch.zeros_like(values) for name, values in like.items()}
            for images, _, _ in drawn_batches(data, indices, size, device, "px"):
                squares = images.double().square()  # before the model, which may change its input
                for name, values in part(squares, _factors(model, images)).items():
                    total[name] += values
            return total

        return sum_over_processes(fitting_batches(compute, draw.batch_size))

    with undisturbed(model), torch.no_grad():
        if estimator == "gated":
            like = {**network.weights, "": zero}
            flow = summed(like, lambda x, a: _flow(network, x * _FLOW, _FLOW, a))
        else:
            counts = _Network(model, [], 0, shape)
            like = {"": zero.expand(network.classes)}
            classes = summed(like, lambda x, a: {"": counts(x * _COUNT, a).sum(0)})[""]
            classes /= classes.max() if classes.max() > 0 else 1  # only the ratios count
            ones = torch.full((1, *shape), _FLOW, dtype=torch.float64, device=device)
            flow = _flow(network, ones, classes * _FLOW)
    return _shares(model, network, flow)


def _image_shape(
    model: nn.Module, data: Samples | None, image_size: int | Sequence[int] | None
) -> Sequence[int]:
    if image_size is None and data is not None:
        images, _ = next(batches(data, 1, torch.device("cpu"), torch.tensor([0])))
        return images.shape[1:]
    return image_shape(model, image_size)


def _flow(
    network: _Network,
    images: Tensor,
    cotangent: Tensor | float,
    factors: Iterable[Tensor] | None = None,
) -> dict[str, Tensor]:
    """Gradients of R = Σ logits · cotangent by name, and R itself under the name ""."""
    with torch.enable_grad():
        whole = (network(images, factors) * cotangent).sum()
    flow = gradients([whole], network.weights.values())
    return {**dict(zip(network.weights, flow, strict=True)), "": whole.detach()}


def _shares(model: nn.Module, network: _Network, flow: dict[str, Tensor]) -> dict[str, Tensor]:
    """Shares of R on the paths through each weight; 0 where nothing flows at all."""
    whole = torch.where(flow[""] > 0, flow[""], 1)
    return {
        name: (weight.detach() * flow[name])
        .div_(whole)
        .to(at_least_single(model.get_parameter(name)))
        for name, weight in network.weights.items()
    }


def _no_rule(what: str) -> ValueError:
    return ValueError(
        f"synflow and px know no paths through {what}, which the model applies to what comes from "
        "the image: build it of the functions that pai_utils.scorers.paths lists, or take another "
        "scorer"
    )


class _Composed(Calls):
    """Shows its handlers attention and the like as the simpler calls that they are made of."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        # Found here, not handed up: a reference to itself would keep what handlers hold alive.
        compose = {
            F.scaled_dot_product_attention: self._attention,
            F.multi_head_attention_forward: self._multi_head_attention,
            torch.addcmul: self._add_product,
        }.get(func)
        if compose is not None:
            return compose(Call(func, args, kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    def _attention(self, call: Call) -> Any:
        query, key, value, mask = (call[n] for n in ("query", "key", "value", "attn_mask"))
        if call["is_causal"]:
            mask = query.new_ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
        if mask is not None and mask.dtype == torch.bool:
            mask = query.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
        # A constant even if it comes from the image: nothing is observed until here.
        mask = 0 if mask is None else mask.detach()
        with self:
            if call["enable_gqa"]:
                groups = query.shape[-3] // key.shape[-3]
                key, value = (x.repeat_interleave(groups, -3) for x in (key, value))
            scale = query.shape[-1] ** -0.5 if call["scale"] is None else call["scale"]
            return (query @ key.transpose(-2, -1) * scale + mask).softmax(-1) @ value

    def _multi_head_attention(self, call: Call) -> tuple[Tensor, None]:
        """Of inputs ``[tokens, samples, width]``."""
        unusual = [call["bias_k"], call["key_padding_mask"], call["add_zero_attn"] or None]
        if call["query"].dim() != 3 or any(value is not None for value in unusual):
            raise ValueError(
                "nn.MultiheadAttention with padding masks, bias_kv, zero attention or unbatched "
                "inputs has no defined paths"
            )
        inputs = [call[name] for name in ("query", "key", "value")]
        weights = [call[name] for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]
        if not call["use_separate_proj_weight"]:
            weights = call["in_proj_weight"].chunk(3)
        biases = (None,) * 3 if call["in_proj_bias"] is None else call["in_proj_bias"].chunk(3)
        with self:
            q, k, v = (
                F.linear(x, w, b).unflatten(2, (call["num_heads"], -1)).permute(1, 2, 0, 3)
                for x, w, b in zip(inputs, weights, biases, strict=True)
            )
            mask, causal = call["attn_mask"], call["is_causal"]
            mixed = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
            joined = mixed.permute(2, 0, 1, 3).flatten(2)
            return F.linear(joined, call["out_proj_weight"], call["out_proj_bias"]), None

    def _add_product(self, call: Call) -> Any:
        with self:
            return call["input"] + call["value"] * call["tensor1"] * call["tensor2"]


def _factors(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Gates, patterns and scales of the model itself on images, in the order of its calls."""
    factors = []

    def observe(record: Callable[[Call], Any], call: Call) -> Any:
        factors.append(record(call))  # before the call, which may work in place
        return call.run()

    handlers = {f: partial(observe, rule.record) for f, rule in _RULES.items() if rule.record}
    with torch.no_grad(), _Composed(handlers):
        model(images)
    return factors


class _Network:
    """The sum over paths of a model; see the module.

    ``weights`` are the raised parameters called ``names``, whose gradients can be asked for. What
    comes from the image is followed from call to call, with its degree.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], power: int, shape: Sequence[int]
    ) -> None:
        self._power = power
        self._model = _raised(model, power)
        image = torch.ones(1, *shape, dtype=torch.float64, device=device_of(model))
        with torch.enable_grad():  # no weight has a graph yet: what has one comes from the image
            self.classes = self(image.requires_grad_().clone()).shape[1]
        self.weights = {n: self._model.get_parameter(n).requires_grad_() for n in names}

    def __call__(self, images: Tensor, factors: Iterable[Tensor] | None = None) -> Tensor:
        """Logits ``[N, C]`` of ``images``, with the factors of data or without."""
        self._factors = None if factors is None else iter(factors)
        self._image_alone_has_a_graph = images.requires_grad
        self._degrees: Any = WeakTensorKeyDictionary()
        self._degrees[images] = 1
        with _Composed({f: partial(self._apply, rule) for f, rule in _RULES.items()}, self._other):
            logits: Tensor = self._model(images)
        if (self._degree(logits) or 0) > 1:
            raise _no_rule("a product of two streams that the logits are made of")
        return logits

    def _degree(self, value: object) -> int | None:
        """That of what comes from the image; None for anything else."""
        if not isinstance(value, Tensor):
            return None
        degree: int | None = self._degrees.get(value)
        node = value.grad_fn if self._image_alone_has_a_graph else None
        # Functions with a gradient of their own, and calls that no observer sees.
        if isinstance(node, BackwardCFunction) or (degree is None and node is not None):
            raise _no_rule(node.name())
        return degree

    def _apply(self, rule: _Rule, call: Call) -> Any:
        factor = None
        if rule.record is not None and self._factors is not None:
            factor = next(self._factors)
            factor = factor.double().square() if factor.is_floating_point() else factor
        # Of `expand_as`, `to` and the like, the second tensor gives its form alone.
        tensors = call.tensors[:1] if call.name.endswith(("_as", ".to")) else call.tensors
        degrees = [d for tensor in tensors if (d := self._degree(tensor)) is not None]
        if rule.degree is max and len(set(degrees)) > 1:
            raise _no_rule(f"{call.name} of a product of streams, or of a gate, and a stream")
        output = rule.flow(self, call, factor)
        for tensor in tree_leaves(output) if degrees else []:
            if isinstance(tensor, Tensor):
                self._degrees[tensor] = rule.degree(degrees)
        return output

    def _other(self, call: Call) -> Any:
        name = call.name.removesuffix(".__get__").rpartition(".")[2].strip("_")
        if name in _AS_THEY_ARE.split():
            return self._apply(_Rule(lambda network, call, factor: call.run()), call)
        if name not in _OF_FORM.split() and any(self._degree(t) is not None for t in call.tensors):
            raise _no_rule(call.name)
        return call.run()

    def _share(self, *factors: Any) -> list[Any]:
        """Factors of a product: what comes from the image passes on equal parts of the flow."""
        streams = [self._degree(factor) is not None for factor in factors]
        parts = sum(streams)
        return [
            # The value is the same; the gradient is a fraction.
            (x / parts + (x * (1 - 1 / parts)).detach() if parts > 1 else x)
            if stream
            else (_unsigned(x) if parts or isinstance(x, Tensor) else x)
            for x, stream in zip(factors, streams, strict=True)
        ]

    def product(
        self, call: Call, factor: Tensor | None, *, of: Sequence[str], **others: Any
    ) -> Any:
        shares = self._share(*(call[name] for name in of))
        return call.run(**dict(zip(of, shares, strict=True)), **others)

    def einsum(self, call: Call, factor: Tensor | None) -> Any:
        return torch.einsum(call.args[0], *self._share(*call.args[1:]))

    def quotient(self, call: Call, factor: Tensor | None) -> Any:
        if self._degree(call["other"]) is not None:
            raise _no_rule(f"{call.name} by a stream")
        return call.run(other=_unsigned(call["other"]))

    def addition(self, call: Call, factor: Tensor | None, *, minus: str = "") -> Any:
        terms = {name: call[name] for name in ("input", "other")}
        constants = [name for name, value in terms.items() if self._degree(value) is None]
        if len(constants) == 2:
            return call.run()
        for name in constants:
            terms[name] = torch.zeros_like(terms[name]) if isinstance(terms[name], Tensor) else 0
        if minus:
            terms[minus] = -terms[minus]
        return call.run(**terms)

    def join(self, call: Call, factor: Tensor | None) -> Any:
        streams = [tensor for tensor in call["tensors"] if self._degree(tensor) is not None]
        if not streams:
            return call.run()
        seed = streams[0] * _SEED
        if call.function is not torch.stack:
            seed = seed.mean(call["dim"], keepdim=True)
        seeded = [seed.expand_as(t) if self._degree(t) is None else t for t in call["tensors"]]
        return call.run(tensors=seeded)

    def pad(self, call: Call, factor: Tensor | None) -> Any:
        constant = call["mode"] == "constant" and self._degree(call["input"]) is not None
        return call.run(value=0) if constant else call.run()

    def cast(self, call: Call, factor: Tensor | None) -> Any:
        """Types and signs are of constants alone."""
        return call.run() if self._degree(call["input"]) is None else call["input"].clone()

    def activation(self, call: Call, gate: Tensor | None) -> Any:
        return _times(call["input"], gate)

    def gate(self, call: Call, value: Tensor | None) -> Any:
        """The factor as a · s / [s]."""
        s = call["input"]
        if not (torch.is_grad_enabled() and s.requires_grad):
            return torch.ones_like(s) if value is None else value
        zero = s.detach() == 0
        return _times(s / s.detach().masked_fill(zero, 1) + zero, value)

    def pattern(self, call: Call, value: Tensor | None) -> Any:
        if value is None and self._power < 2:
            products, dim = call["input"].detach(), call["dim"]
            sums = products.sum(dim, keepdim=True)
            even = torch.full_like(products, 1 / products.shape[dim])
            value = torch.where(sums > 0, products / sums, even)
        return self.gate(call, value)

    def max_pool(self, call: Call, largest: Tensor | None) -> Any:
        if largest is not None:
            return call["input"].flatten(-2).gather(-1, largest.flatten(-2)).view_as(largest)
        if self._power < 2:
            return call.run()
        if call["dilation"] not in (1, (1, 1), [1, 1]):
            raise ValueError("px does not count the paths through a dilated max-pooling")
        names = ("input", "kernel_size", "stride", "padding", "ceil_mode")
        return F.avg_pool2d(**{name: call[name] for name in names}, divisor_override=1)

    def norm(self, call: Call, scale: Tensor | None) -> Any:
        value, gain = call["input"], call.arguments.get("weight")
        variance = call.arguments.get("running_var")
        if variance is not None and not call["training"]:
            fixed = (variance + call["eps"]) ** (-self._power / 2)
            gain = fixed if gain is None else gain * fixed
        if gain is not None and call.function in (F.batch_norm, F.group_norm):
            gain = gain.view(-1, *(1,) * (value.dim() - 2))
        return _times(value, scale, gain)


def _unsigned(factor: Any) -> Any:
    """A constant without its sign: parameters and buffers have none here, but tables may."""
    if isinstance(factor, Tensor):
        return factor.abs() if factor.is_floating_point() else factor
    return abs(factor)


def _times(value: Tensor, *factors: Tensor | None) -> Tensor:
    """No alias of the value, even without factors: the model may write to it afterwards."""
    given = [factor for factor in factors if factor is not None]
    return math.prod(given, start=value) if given else value.clone()


def _raised(model: nn.Module, power: int) -> nn.Module:
    """A copy with |t|^power of all parameters and buffers but integers and norms' statistics."""
    raised = replica(model)
    norms = [module for module in raised.modules() if isinstance(module, _NormBase)]
    kept = {id(buffer) for norm in norms for buffer in norm.buffers(recurse=False)}
    for tensor in [*raised.parameters(), *raised.buffers()]:
        if tensor.is_floating_point() and id(tensor) not in kept:
            # With power 0, a pruned weight has no paths.
            tensor.copy_(tensor.abs() ** power if power else tensor.abs().sign())
    return raised


def _slope(call: Call) -> Any:
    """f(x)/x; at 0 the slope from the left, which for ReLU is 0."""
    value = call["input"]
    at = torch.where(value == 0, -torch.finfo(value.dtype).eps, value)
    return call.run(input=at.clone()) / at


def _scale(call: Call) -> Any:
    """1/σ of a normalisation, or 1 over the length."""
    value, eps = call["input"], call["eps"]
    if call.function is F.normalize:
        return value.norm(call["p"], call["dim"], keepdim=True).clamp_min(eps).reciprocal()
    if call.function is F.group_norm:
        groups, dims = call["num_groups"], (1,) * (value.dim() - 2)
        scale = (value.reshape(len(value), groups, -1).var(-1, correction=0) + eps).rsqrt()
        return scale.repeat_interleave(value.shape[1] // groups, 1).view(*value.shape[:2], *dims)
    dims = tuple(range(-len(call["normalized_shape"]), 0))
    if call.function is F.layer_norm:
        return (value.var(dims, correction=0, keepdim=True) + eps).rsqrt()
    eps = torch.finfo(value.dtype).eps if eps is None else eps
    return (value.square().mean(dims, keepdim=True) + eps).rsqrt()


@dataclass(frozen=True)
class _Rule:
    """How a call acts on a flow, given its factor; what that factor is, of a call on data."""

    flow: Callable[[_Network, Call, Tensor | None], Any]
    record: Callable[[Call], Any] | None = None
    degree: Callable[[list[int]], int] = max  #: of the result by those of the arguments, all equal


def _spelled(names: str) -> list[Any]:
    """The functions of these names in torch, in place or not."""
    spellings = [spelling for name in names.split() for spelling in (name, f"{name}_")]
    found = (getattr(space, name, None) for space in (torch, Tensor, F) for name in spellings)
    return [function for function in found if callable(function)]


# By the last part of their names: functions of a tensor's form alone, and functions that act on a
# flow as they do on any tensor.
_OF_FORM = (
    "shape ndim dim size numel dtype device layout stride is_contiguous is_floating_point is_cuda "
    "requires_grad is_nested get_device len zeros_like ones_like empty_like full_like new_zeros "
    "new_ones new_empty new_full"
)
_AS_THEY_ARE = (
    "getitem T mT view reshape view_as reshape_as permute transpose swapaxes movedim flatten "
    "unflatten unbind chunk split narrow select squeeze unsqueeze expand expand_as repeat tile "
    "repeat_interleave contiguous clone roll flip index_select mean sum unfold fold avg_pool1d "
    "avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "pixel_shuffle pixel_unshuffle interpolate dropout dropout1d dropout2d dropout3d"
)
_CASTS = _spelled("to type type_as float double half bfloat16 neg")
_LAYERS = _spelled("linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d")
_ACTIVATIONS = _spelled(
    "relu relu6 hardtanh leaky_relu rrelu prelu elu selu celu gelu silu mish hardswish tanh "
    "softsign"
)
_LAYER = _Rule(partial(_Network.product, of=("input", "weight"), bias=None), degree=sum)
_PRODUCT = _Rule(partial(_Network.product, of=("input", "other")), degree=sum)
_FACTOR = partial(
    _Rule, record=lambda call: call.run(input=call["input"].clone()), degree=lambda degrees: 0
)
_RULES: dict[Any, _Rule] = {
    **dict.fromkeys(_CASTS, _Rule(_Network.cast)),
    **dict.fromkeys(_LAYERS, _LAYER),
    **dict.fromkeys(_ACTIVATIONS, _Rule(_Network.activation, _slope)),
    **dict.fromkeys(_spelled("sigmoid hardsigmoid"), _FACTOR(_Network.gate)),
    F.softmax: _FACTOR(_Network.pattern),
    F.max_pool2d: _Rule(
        _Network.max_pool,
        lambda call: F.max_pool2d(**{**call.arguments, "return_indices": True})[1],
    ),
    F.batch_norm: _Rule(_Network.norm),
    **dict.fromkeys(
        (F.group_norm, F.layer_norm, F.rms_norm, F.normalize), _Rule(_Network.norm, _scale)
    ),
    F.pad: _Rule(_Network.pad),
    **dict.fromkeys((torch.cat, torch.stack), _Rule(_Network.join)),
    torch.add: _Rule(_Network.addition),
    torch.sub: _Rule(partial(_Network.addition, minus="other")),
    torch.rsub: _Rule(partial(_Network.addition, minus="input")),
    **dict.fromkeys((torch.mul, torch.matmul), _PRODUCT),
    torch.einsum: _Rule(_Network.einsum, degree=sum),
    torch.div: _Rule(_Network.quotient),
}
