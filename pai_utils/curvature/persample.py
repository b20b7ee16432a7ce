"""Sums of squared per-sample gradients, layer by layer, during one forward and backward.

For a sample n with cotangent v (one value a logit), the gradient of a weight is J_nᵀ v. Curvature
diagonals are sums over samples (and cotangents) of its *square*, so the gradients of different
samples must be told apart, and positions or tokens of one sample must be summed before squaring:

    linear   G_n = Σ_t g_nt a_ntᵀ             (t: tokens; a: layer input, g: gradient at its output)
    conv     G_n = Σ_l g_nl unfold(a_n)_lᵀ    (l: output positions)

Calls of ``F.linear`` and ``F.conv2d`` are observed by a ``TorchFunctionMode``, not by module
hooks, so that a weight is recognised wherever it is used: inside padded convolutions, through a
functional call, or twice. The weight gradient that autograd would sum over the batch is replaced
by the per-sample one, which costs the same products; no more than a few samples' gradients of
one layer exist at any time.

A weight used in any other way (shared by several calls, reshaped, inside
``nn.MultiheadAttention``, or in a layout whose rows are not grouped by sample) takes a generic
path, one backward a sample, with the same result. Which weights do is found by trial on two
samples: a weight that receives a gradient although its observed calls are cut off is used
elsewhere, and rows are grouped by sample where changing one sample changes its half alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight
from torch.overrides import TorchFunctionMode

from pai_utils.execution import logger, paired

Batch = tuple[Tensor, Tensor, Tensor]
"""``(images [B, 3, H, W], labels [B], rows [B])``; ``rows`` are positions within the draw."""

Cotangents = Callable[[Tensor, Tensor, Tensor], Iterable[Tensor]]
"""``(logits [B, C], labels [B], rows [B]) -> cotangents``, each ``[B, C]``."""

_CPU_CHUNK_BYTES = 4 * 2**20
_GPU_CHUNK_BYTES = 256 * 2**20


class Call:
    """One observed use of a weight: what is needed to form its per-sample gradients."""

    def __init__(self, name: str, layer_input: Tensor, convolution: dict[str, Any] | None) -> None:
        self.name = name
        self.input = layer_input.detach()
        self.version = layer_input._version
        self.convolution = convolution

    def check_unchanged(self) -> None:
        """Refuse an input that no longer is what the layer saw."""
        if self.input._version != self.version:
            raise RuntimeError(
                f"the input of the layer with weight {self.name!r} was modified in place after "
                "the layer used it, so that its gradient cannot be formed; use the out-of-place "
                "operation there"
            )


class Receiver(Protocol):
    """Takes the per-sample gradients of a pass over the data, in whatever order they come."""

    def observed(self, call: Call, gradient: Tensor, rows: Tensor) -> None:
        """A whole batch: the call, the gradient at its output, the samples' rows ``[B]``."""

    def single(self, name: str, gradient: Tensor, rows: Tensor) -> None:
        """One sample: the gradient of the weight ``name``, and the sample's row ``[1]``."""


class _Observer(TorchFunctionMode):
    """Cut observed calls' weights off from autograd.

    With ``receive``, hand it ``(call, output gradient)`` during the backward pass; without, keep
    the calls of each weight in ``calls``.
    """

    def __init__(
        self,
        weights: dict[str, nn.Parameter],
        receive: Callable[[Call, Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        self.names = {id(weight): name for name, weight in weights.items()}
        self.receive = receive
        self.calls: dict[str, list[Call]] = {name: [] for name in weights}

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear or func is F.conv2d:
            values = dict(zip(_SIGNATURES[func], args, strict=False)) | kwargs
            call = self._recognise(func, values)
            if call is not None:
                return self._observed(func, values, call)
        return func(*args, **kwargs)

    def _recognise(self, func: Any, values: dict[str, Any]) -> Call | None:
        name = self.names.get(id(values["weight"]))
        if name is None:
            return None
        if func is F.linear:
            return Call(name, values["input"], None) if values["input"].dim() > 1 else None
        kernel = values["weight"].shape[2:]
        dilation = _pair(values.get("dilation", 1))
        padding = _symmetric_padding(values.get("padding", 0), kernel, dilation)
        if padding is None or values["input"].dim() != 4:
            return None
        geometry = {
            "stride": _pair(values.get("stride", 1)),
            "padding": padding,
            "dilation": dilation,
            "groups": values.get("groups", 1),
            "kernel": tuple(kernel),
        }
        return Call(name, values["input"], geometry)

    def _observed(self, func: Any, values: dict[str, Any], call: Call) -> Tensor:
        output: Tensor = func(**values | {"weight": values["weight"].detach()})
        receive = self.receive
        if receive is None:
            self.calls[call.name].append(call)
            return output
        if not torch.is_grad_enabled():
            return output
        if not output.requires_grad:
            # The first weight of the network: the graph starts here, not at the image. The copy
            # lets an in-place activation follow, which a leaf would refuse.
            output = output.requires_grad_().clone()
        output.register_hook(lambda gradient: receive(call, gradient))
        return output


_SIGNATURES: dict[Any, tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    F.conv2d: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
}


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return (value, value)
    values = tuple(int(v) for v in value)
    return (values[0], values[-1])


def _symmetric_padding(
    padding: Any, kernel: Sequence[int], dilation: tuple[int, int]
) -> tuple[int, int] | None:
    if padding == "valid":
        return (0, 0)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return None if any(t % 2 for t in total) else (total[0] // 2, total[1] // 2)
    return _pair(padding)


def chunk_bytes(device: torch.device) -> int:
    """Bytes to work on at once: what a core's cache holds, what fills a GPU."""
    return _GPU_CHUNK_BYTES if device.type == "cuda" else _CPU_CHUNK_BYTES


def _chunks(samples: int, weight: Tensor) -> int:
    """How many samples' gradients of ``weight`` to form at once."""
    budget = chunk_bytes(weight.device)
    return max(1, min(samples, budget // (weight.numel() * weight.element_size())))


def add_squared_gradients_(total: Tensor, call: Call, gradient: Tensor, samples: int) -> None:
    """Add Σ_n G_n² of one observed call to ``total``, which has the weight's shape."""
    if call.convolution is None and gradient.numel() == samples * gradient.shape[-1]:
        # No tokens: the square of an outer product factorises.
        left = gradient.reshape(samples, -1)
        total.addmm_(left.square().T, call.input.reshape(samples, -1).square())
        return
    step = _chunks(samples, total)
    for first in range(0, samples, step):
        rows = slice(first, min(first + step, samples))
        _add_squares_(total, _gradients(call, gradient, samples, rows, total.shape))


def _gradients(
    call: Call, gradient: Tensor, samples: int, rows: slice, shape: torch.Size
) -> Tensor:
    """Per-sample gradients ``[b, *shape]`` of one observed call, for the samples in ``rows``."""
    if call.convolution is None or call.convolution["kernel"] == (1, 1):
        left, right = gradient_factors(call, gradient, samples, rows)
        return torch.matmul(left, right).reshape(-1, *shape)
    # Samples become groups of one convolution, so that the library's own kernels, fast for every
    # stride, dilation and grouping, return one gradient a sample.
    inputs, outputs = (
        x.unflatten(0, (samples, -1))[rows].transpose(0, 1).flatten(1, 2)
        for x in (call.input, gradient)
    )
    count, geometry = rows.stop - rows.start, call.convolution
    each: Tensor = conv2d_weight(
        inputs,
        (count * shape[0], *shape[1:]),
        outputs,
        geometry["stride"],
        geometry["padding"],
        geometry["dilation"],
        count * geometry["groups"],
    )
    return each.view(count, *shape)


def gradient_factors(
    call: Call, gradient: Tensor, samples: int, rows: slice
) -> tuple[Tensor, Tensor]:
    """Factors of the per-sample gradients of one observed call, for the samples in ``rows``.

    Args:
        call: the observed use of a weight ``[out, K...]`` in ``groups`` groups (one for a linear
            layer).
        gradient: gradient at the call's output.
        samples: samples in the batch.
        rows: the samples to take.

    Returns:
        ``left [b, groups, out / groups, L]`` and ``right [b, groups, L, K]``, where L counts
        tokens or output positions: ``(left @ right).reshape(b, out, K...)`` are the gradients.
    """
    per_sample = call.input.shape[0] // samples
    taken = slice(rows.start * per_sample, rows.stop * per_sample)
    count = rows.stop - rows.start
    if call.convolution is None:
        left = gradient[taken].reshape(count, 1, -1, gradient.shape[-1])
        return left.transpose(2, 3), call.input[taken].reshape(count, 1, -1, call.input.shape[-1])
    columns = _columns(call.input[taken], **call.convolution)  # [B, groups, K, L]
    groups, positions = columns.shape[1], columns.shape[-1]
    left = gradient[taken].reshape(columns.shape[0], groups, -1, positions)
    if per_sample > 1:
        left, columns = (
            x.unflatten(0, (count, per_sample)).movedim(1, -2).flatten(-2) for x in (left, columns)
        )
    return left, columns.transpose(2, 3)


def _add_squares_(total: Tensor, each: Tensor) -> None:
    if each.shape[0] == 1:
        total.addcmul_(each[0], each[0])
    else:
        total.add_(each.square_().sum(0))


def _columns(
    images: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    kernel: tuple[int, int],
) -> Tensor:
    """Patches under the kernel, ``[B, groups, Cin/groups * kh * kw, L]``."""
    batch = images.shape[0]
    if kernel == (1, 1) and padding == (0, 0):
        columns = images[:, :, :: stride[0], :: stride[1]].flatten(2)
    else:
        columns = F.unfold(images, kernel, dilation, padding, stride)
    return columns.reshape(batch, groups, -1, columns.shape[-1])


def _generic_names(model: nn.Module, weights: dict[str, nn.Parameter], images: Tensor) -> set[str]:
    """Names of the weights that need the generic path, tried on two images ``[2, 3, H, W]``.

    All parameters are frozen when this is called.
    """
    for weight in weights.values():
        weight.requires_grad_()
    observer = _Observer(weights)
    with torch.enable_grad(), observer:
        logits = model(images)
    elsewhere: set[str] = set()
    if logits.requires_grad:  # through a use of a weight that was not observed
        gradients = torch.autograd.grad(
            logits, list(weights.values()), torch.ones_like(logits), allow_unused=True
        )
        used = zip(weights, gradients, strict=True)
        elsewhere = {name for name, gradient in used if gradient is not None}
    # Another first image, then another second one.
    change = torch.linspace(-1, 1, images[0].numel()).to(images).view_as(images[0])
    inputs = [observer.calls]
    for changed in (0, 1):
        others = images.clone()
        others[changed] += change
        observer = _Observer(weights)
        with torch.no_grad(), observer:
            model(others)
        inputs.append(observer.calls)
    rest = {name for name, calls in inputs[0].items() if calls} - elsewhere
    return elsewhere | {
        name for name in rest if not _used_once_and_grouped(*(calls[name] for calls in inputs))
    }


def _used_once_and_grouped(
    calls: list[Call], first_changed: list[Call], second_changed: list[Call]
) -> bool:
    """Whether a weight has one call, the first half of whose rows is the first sample's."""
    if not len(calls) == len(first_changed) == len(second_changed) == 1:
        return False
    reference = calls[0].input
    rows = reference.shape[0]
    if rows % 2:
        return False
    for half, other in ((0, first_changed[0].input), (1, second_changed[0].input)):
        if other.shape != reference.shape:
            return False
        differs = (other != reference).reshape(2, -1).any(1)
        if not differs[half] or differs[1 - half]:
            return False
    return True


def sum_squared_gradients(
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[Batch],
    cotangents: Cotangents,
) -> dict[str, Tensor]:
    """Σ over samples n and cotangents v of (J_nᵀ v)², for every entry of the named weights.

    Args:
        model: images to logits; run as it is, so put it in evaluation mode first
            (:func:`pai_utils.execution.undisturbed`).
        names: parameter names, as in ``model.named_parameters()``.
        batches: triples ``(images [B, 3, H, W], labels [B], rows [B])``.
        cotangents: for the logits of a batch, the cotangents ``[B, C]`` to pull back.

    Returns:
        One tensor a name, of the weight's shape. Exact up to rounding: nothing is sampled here.
    """
    parameters = dict(model.named_parameters())
    totals = {name: torch.zeros_like(parameters[name]) for name in names}
    receive_gradients(model, names, batches, cotangents, _SumOfSquares(totals))
    return totals


class _SumOfSquares:
    def __init__(self, totals: dict[str, Tensor]) -> None:
        self.totals = totals

    def observed(self, call: Call, gradient: Tensor, rows: Tensor) -> None:
        add_squared_gradients_(self.totals[call.name], call, gradient, len(rows))

    def single(self, name: str, gradient: Tensor, rows: Tensor) -> None:
        self.totals[name].addcmul_(gradient, gradient)


def receive_gradients(
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[Batch],
    cotangents: Cotangents,
    receiver: Receiver,
) -> None:
    """Hand ``receiver`` the gradients J_nᵀ v of the named weights, for each sample and cotangent.

    A weight that a sample does not use may be left out: its gradient is zero. The arguments are
    those of :func:`sum_squared_gradients`.
    """
    parameters = dict(model.named_parameters())
    weights = {name: parameters[name] for name in names}
    generic: set[str] | None = None
    for images, labels, rows in batches:
        if generic is None and len(images) > 1:
            with _frozen(parameters.values()):
                generic = _generic_names(model, weights, images[:2])
            if generic:
                logger.info(
                    "per-sample gradients of %s take one backward a sample: the weight is shared, "
                    "reshaped, or its rows are not grouped by sample",
                    ", ".join(sorted(generic)),
                )
        # A batch of one sample is its own per-sample gradient: any use of a weight is fine.
        slow = set(names) if generic is None or len(images) == 1 else generic
        fast = {name: weight for name, weight in weights.items() if name not in slow}
        if fast:
            with _frozen(parameters.values()):
                _receive_observed(receiver, model, fast, (images, labels, rows), cotangents)
        if slow:
            with _frozen(parameters.values()):
                _receive_singles(
                    receiver,
                    model,
                    {n: w for n, w in weights.items() if n in slow},
                    (images, labels, rows),
                    cotangents,
                )


def _receive_observed(
    receiver: Receiver,
    model: nn.Module,
    weights: dict[str, nn.Parameter],
    batch: Batch,
    cotangents: Cotangents,
) -> None:
    images, labels, rows = batch

    def receive(call: Call, gradient: Tensor) -> None:
        call.check_unchanged()
        receiver.observed(call, gradient.detach(), rows)

    with torch.enable_grad():
        with _Observer(weights, receive):
            logits = model(images)
        if logits.requires_grad:
            for cotangent in cotangents(logits.detach(), labels, rows):
                logits.backward(cotangent, retain_graph=True)


def _receive_singles(
    receiver: Receiver,
    model: nn.Module,
    weights: dict[str, nn.Parameter],
    batch: Batch,
    cotangents: Cotangents,
) -> None:
    for weight in weights.values():
        weight.requires_grad_()
    normalised = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    for image, label, row in zip(*(part.split(1) for part in batch), strict=True):
        with torch.enable_grad():
            logits = model(paired(image) if normalised else image)[:1]
        if not logits.requires_grad:
            return
        for cotangent in cotangents(logits.detach(), label, row):
            gradients = torch.autograd.grad(
                logits, list(weights.values()), cotangent, retain_graph=True, allow_unused=True
            )
            for name, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    receiver.single(name, gradient, row)


@contextmanager
def _frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """No parameter asks autograd for a gradient inside; afterwards each asks as before."""
    flags = [(p, p.requires_grad) for p in parameters]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
