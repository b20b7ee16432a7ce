"""Sums of squared per-sample gradients, layer by layer, during one forward and backward.

For a sample n with cotangent v (one value a logit), the gradient of a weight is J_nᵀ v. Curvature
diagonals are sums over samples (and cotangents) of its *square*, so the gradients of different
samples must be told apart, and positions or tokens of one sample must be summed before squaring::

    linear   G_n = Σ_t g_nt a_ntᵀ             (t: tokens; a: layer input, g: gradient at its output)
    conv     G_n = Σ_l g_nl unfold(a_n)_lᵀ    (l: output positions)

Calls of ``F.linear`` and ``F.conv2d`` are observed by a ``TorchFunctionMode``, not by module
hooks, so that a weight is recognised wherever it is used: inside padded convolutions, through a
functional call, or twice. The weight gradient that autograd would sum over the batch is replaced
by the per-sample one, which costs the same products; no more than a few samples' gradients of
one layer exist at any time.

A weight used in any other way (shared by several calls, reshaped, inside
``nn.MultiheadAttention``, or in a layout whose rows are not grouped by sample) takes a generic
path, one backward a sample, with the same result. Which weights do is found on the first batch: a
weight that its graph reaches although its observed calls are cut off is used elsewhere, and rows
are grouped by sample where those of one sample stay the same beside another one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight
from torch.overrides import TorchFunctionMode

from pai_utils.support.common import logger, progress
from pai_utils.support.sampling import Samples, batches, paired, share_of_work

Batch = tuple[Tensor, Tensor, Tensor]
"""``(images [B, 3, H, W], labels [B], rows [B])``; ``rows`` are positions within the draw."""

Cotangents = Callable[[Tensor, Tensor, Tensor], Iterable[Tensor]]
"""``(logits [B, C], labels [B], rows [B]) -> cotangents``, each ``[B, C]``."""

_CPU_CHUNK_BYTES = 4 * 2**20
_CPU_BLOCK_BYTES = 2 * 2**20  # of a sample: about a core's caches
_SMALL = 2**13  # entries below which a call costs more than its work
_GPU_CHUNK_BYTES = 256 * 2**20
_ROUNDING_SHARE = 0.1  # most that rounding may move a layer's input, over what other images do


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
    """Cut observed calls' weights off from autograd, and keep the calls in ``calls``.

    ``receive`` is handed ``(call, output gradient)`` during the backward pass.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        receive: Callable[[Call, Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        self.weights = weights
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
        self.calls[call.name].append(call)
        receive = self.receive
        if receive is None or not torch.is_grad_enabled():
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


def add_squared_gradients_(total: Tensor, call: Call, gradient: Tensor, samples: int) -> None:
    """Add Σ_n G_n² of one observed call to ``total``, which has the weight's shape.

    A convolution's ``total`` is best laid out channels-last.
    """
    inputs, gradient = call.input.to(total.dtype), gradient.to(total.dtype)
    geometry = call.convolution
    if geometry is None and gradient.numel() == samples * gradient.shape[-1]:
        # No tokens: the square of an outer product factorises.
        left = gradient.reshape(samples, -1).square()
        total.addmm_(left.T, inputs.reshape(samples, -1).square())
    elif geometry is None or geometry["groups"] == 1:
        _add_squared_products_(total, call, inputs, gradient, samples)
    elif total.shape[1] == 1 and len(total) == inputs.shape[1] and total[0].numel() > 9:
        _add_squared_taps_(total, geometry, inputs, gradient, samples)
    else:
        _add_squared_groups_(total, geometry, inputs, gradient, samples)


def _add_squared_products_(
    total: Tensor, call: Call, inputs: Tensor, gradient: Tensor, samples: int
) -> None:
    """Linear layers and ungrouped convolutions: G_n is a product of two matrices.

    On CPUs the time goes into memory rather than into the products, so a block of the weight's
    rows is finished for all samples while it lies in the cache, a few samples a thread at once: a
    product of one sample's block is too small to be shared by threads.
    """
    left = _positions(gradient, call, samples)  # [samples, L, out]
    matrix = total if call.convolution is None else total.permute(0, 2, 3, 1)
    matrix = matrix.reshape(len(total), -1)  # [out, K], a view where the layout allows
    most = max(1, _block_bytes(total) // total.element_size())  # entries of a G_n to form at once
    rows = max(1, min(len(total), most // matrix.shape[1]))
    rows = math.ceil(len(total) / math.ceil(len(total) / rows))
    step = min(samples, max(_samples_at_once(total), most // matrix.numel()))
    # Patches of all samples if they are needed for several blocks of rows.
    taken = samples if rows < len(total) else step
    products = matrix.new_empty(step, rows, matrix.shape[1])
    for start in range(0, samples, taken):
        here = slice(start, min(start + taken, samples))
        right = _patches(inputs, call, samples, here)  # [b, L, K]
        for row in range(0, len(total), rows):
            block = matrix[row : row + rows]
            for first in range(0, here.stop - here.start, step):
                part = slice(first, first + step)
                chosen = left[here][part, :, row : row + rows].mT
                out = products[: len(chosen), : len(block)]
                _add_squares_(block, torch.bmm(chosen, right[part], out=out))
    if matrix.data_ptr() != total.data_ptr():
        shape = (len(total), *total.shape[2:], total.shape[1])
        total.copy_(matrix.view(shape).permute(0, 3, 1, 2))


def _block_bytes(like: Tensor) -> int:
    """Bytes of a block of gradients that stays in a core's cache, or that fills a GPU."""
    return _GPU_CHUNK_BYTES if like.device.type == "cuda" else _CPU_BLOCK_BYTES


def _samples_at_once(like: Tensor) -> int:
    """Fewest samples whose blocks are formed by one call."""
    return 1 if like.device.type == "cuda" else 2 * torch.get_num_threads()


def _positions(gradient: Tensor, call: Call, samples: int) -> Tensor:
    """Gradient at the output with positions or tokens before channels, ``[samples, L, out]``."""
    if call.convolution is not None:
        gradient = gradient.permute(0, 2, 3, 1)
    return gradient.reshape(samples, -1, gradient.shape[-1])


def _patches(inputs: Tensor, call: Call, samples: int, rows: slice) -> Tensor:
    """Tokens, or patches in the order (kernel row, kernel column, channel), ``[b, L, K]``."""
    inputs = inputs.reshape(samples, -1, *inputs.shape[1:])[rows].flatten(0, 1)
    count = rows.stop - rows.start
    if call.convolution is None:
        return inputs.reshape(count, -1, inputs.shape[-1])
    windows = _windows(inputs, call.convolution)
    return windows.permute(0, 1, 2, 4, 5, 3).reshape(count, -1, windows[0, 0, 0].numel())


def _windows(images: Tensor, geometry: Mapping[str, Any]) -> Tensor:
    """What lies under the kernel, a view ``[B, H, W, C, kh, kw]`` for output positions H × W."""
    (top, left), (dy, dx) = geometry["padding"], geometry["dilation"]
    (kh, kw), (sy, sx) = geometry["kernel"], geometry["stride"]
    images = F.pad(images, (left, left, top, top)) if top or left else images
    images = images.contiguous(memory_format=torch.channels_last)
    height = (images.shape[2] - dy * (kh - 1) - 1) // sy + 1
    width = (images.shape[3] - dx * (kw - 1) - 1) // sx + 1
    sample, channel, row, column = images.stride()
    return images.as_strided(
        (len(images), height, width, images.shape[1], kh, kw),
        (sample, sy * row, sx * column, channel, dy * row, dx * column),
    )


def _add_squared_taps_(
    total: Tensor, geometry: Mapping[str, Any], inputs: Tensor, gradient: Tensor, samples: int
) -> None:
    """Depthwise convolutions with kernels beyond 3 × 3, for which libraries have no fast path."""
    each = inputs[0].numel() * inputs.element_size() * len(inputs) // samples
    step = max(1, min(samples, _block_bytes(total) // each))
    for first in range(0, samples, step):
        windows, g = (
            x.unflatten(0, (samples, -1))[first : first + step] for x in (inputs, gradient)
        )
        count, per_sample = windows.shape[:2]
        windows = _windows(windows.flatten(0, 1), geometry).unflatten(0, (count, per_sample))
        g = g.permute(0, 1, 3, 4, 2)  # [b, images a sample, H, W, channels]
        for y in range(total.shape[2]):
            for x in range(total.shape[3]):
                tap = (windows[..., y, x] * g).sum((1, 2, 3))
                total[:, 0, y, x] += tap.square_().sum(0)


def _add_squared_groups_(
    total: Tensor, geometry: Mapping[str, Any], inputs: Tensor, gradient: Tensor, samples: int
) -> None:
    """Grouped convolutions: samples become groups too, so that one call returns a gradient each."""
    step = max(1, min(samples, _block_bytes(total) // (total.numel() * total.element_size())))
    if inputs.device.type == "cpu":
        step = 1  # the library's kernels are slow for more groups than one sample has
    for first in range(0, samples, step):
        parts = [x.unflatten(0, (samples, -1))[first : first + step] for x in (inputs, gradient)]
        count = len(parts[0])
        together = [x.transpose(0, 1).flatten(1, 2) for x in parts]
        each = conv2d_weight(
            together[0],
            (count * total.shape[0], *total.shape[1:]),
            together[1],
            geometry["stride"],
            geometry["padding"],
            geometry["dilation"],
            count * geometry["groups"],
        )
        _add_squares_(total, each.view(count, *total.shape))


def _add_squares_(total: Tensor, each: Tensor) -> None:
    """Add Σ_n of the squares of ``each [b, ...]``, which may be overwritten."""
    if len(each) == 1 or (each.device.type == "cpu" and total.numel() > _SMALL):
        for gradient in each.unbind():
            total.addcmul_(gradient, gradient)
    else:
        total.add_(each.square_().sum(0))


def samples_at_once(call: Call, gradient: Tensor, samples: int, room: float) -> int:
    """How many samples of a call may go through :func:`gradient_factors` together.

    Args:
        call: the observed use of a weight.
        gradient: gradient at the call's output.
        samples: samples in the batch.
        room: numbers to copy windows of a convolution's input into; other layers copy nothing.
    """
    if call.convolution is None:
        return samples
    kernel = math.prod(call.convolution["kernel"])
    windows = call.input.shape[1] * kernel * gradient[0, 0].numel() * len(gradient)
    return min(samples, max(1, int(room * samples // windows)))


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
    left = _positions(gradient, call, samples)[rows]
    if call.convolution is None:
        return left.mT[:, None], _patches(call.input, call, samples, rows)[:, None]
    groups = call.convolution["groups"]
    left = left.unflatten(2, (groups, -1)).permute(0, 2, 3, 1)
    inputs = call.input.reshape(samples, -1, *call.input.shape[1:])[rows].flatten(0, 1)
    windows = _windows(inputs, call.convolution).unflatten(3, (groups, -1))
    windows = windows.unflatten(0, (len(left), -1)).movedim(4, 1)  # groups before positions
    return left, windows.reshape(len(left), groups, left.shape[-1], -1)


def gradient_entries(left: Tensor, right: Tensor, start: int, stop: int) -> Tensor:
    """Entries ``start`` to ``stop`` of the flattened gradients ``left @ right``, ``[b, n]``.

    The factors are those of :func:`gradient_factors`; no more rows are formed than are asked for.
    """
    outputs, width = left.shape[2], right.shape[3]
    first, last = start // width, -(-stop // width)  # output channels
    groups = slice(first // outputs, -(-last // outputs))
    left, right = left[:, groups], right[:, groups]
    offset = groups.start * outputs
    if left.shape[1] == 1:
        left = left[:, :, first - offset : last - offset]
        offset = first
    entries = torch.matmul(left, right).flatten(1)
    return entries[:, start - offset * width : stop - offset * width]


def _reached(logits: Tensor, weights: Mapping[str, nn.Parameter]) -> set[str]:
    """Names of the weights that the graph of ``logits`` leads to."""
    names = {id(weight): name for name, weight in weights.items()}
    found: set[str] = set()
    waiting: list[Any] = [logits.grad_fn]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise RuntimeError(
                "the model recomputes activations in its backward pass, where its weights cannot "
                "be observed; switch that off (timm: model.set_grad_checkpointing(False))"
            )
        variable = id(getattr(node, "variable", None))
        if variable in names:
            found.add(names[variable])
        waiting += [following for following, _ in node.next_functions]
    return found


def _used_once_and_grouped(model: nn.Module, images: Tensor, observer: _Observer) -> set[str]:
    """Names of the weights with one call, whose rows are grouped by sample.

    Args:
        model: with its parameters frozen.
        images: a batch of at least two, ``[B, 3, H, W]``.
        observer: what was observed on it.

    The rows of a sample must not depend on the other samples. One sample is run again in another
    place, beside a changed one: its rows must be the same but for rounding, by a wide margin
    against what the change does.
    """
    chosen = len(images) // 2
    change = torch.linspace(-1, 1, images[0].numel()).to(images).view_as(images[0])
    again = _Observer(observer.weights)
    with torch.no_grad(), again:
        model(torch.stack([images[chosen], images[chosen - 1] + change]))
    changes: dict[str, Tensor] = {}
    for name, calls in observer.calls.items():
        if not len(calls) == len(again.calls[name]) == 1:
            continue
        first, second = calls[0].input, again.calls[name][0].input
        if len(first) % len(images) or len(second) * len(images) != len(first) * 2:
            continue
        here, there = (x.unflatten(0, (n, -1)) for x, n in ((first, len(images)), (second, 2)))
        if here.shape[1:] != there.shape[1:]:
            continue
        same, changed = (there[0] - here[chosen]).norm(), (there[1] - here[chosen - 1]).norm()
        changes[name] = torch.stack([same, changed])
    if not changes:
        return set()
    # Compared at once, so that a GPU is waited for once.
    table = torch.stack([change.double() for change in changes.values()]).tolist()
    pairs = zip(changes, table, strict=True)
    return {name for name, (same, changed) in pairs if same <= _ROUNDING_SHARE * changed}


def sum_squared_gradients(
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[Batch],
    cotangents: Cotangents,
) -> dict[str, Tensor]:
    """Σ over samples n and cotangents v of (J_nᵀ v)², for every entry of the named weights.

    Args:
        model: images to logits; run as it is, so put it in evaluation mode first
            (:func:`pai_utils.support.common.undisturbed`).
        names: parameter names, as in ``model.named_parameters()``.
        batches: triples ``(images [B, 3, H, W], labels [B], rows [B])``.
        cotangents: for the logits of a batch, the cotangents ``[B, C]`` to pull back.

    Returns:
        One tensor a name, of the weight's shape. Exact up to rounding, since nothing is sampled.
    """
    parameters = dict(model.named_parameters())
    totals = {name: _zeros_for_squares(parameters[name]) for name in names}
    receive_gradients(model, names, batches, cotangents, _SumOfSquares(totals))
    return {name: total.contiguous() for name, total in totals.items()}


def _zeros_for_squares(weight: Tensor) -> Tensor:
    # Patches are read channels-last, so that convolutions' gradients come in that order. The sum
    # over many samples takes at least single precision.
    layout = torch.channels_last if weight.dim() == 4 else torch.contiguous_format
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.zeros_like(weight, dtype=dtype, memory_format=layout)


class _SumOfSquares:
    def __init__(self, totals: dict[str, Tensor]) -> None:
        self.totals = totals

    def observed(self, call: Call, gradient: Tensor, rows: Tensor) -> None:
        add_squared_gradients_(self.totals[call.name], call, gradient, len(rows))

    def single(self, name: str, gradient: Tensor, rows: Tensor) -> None:
        gradient = gradient.to(self.totals[name].dtype)
        self.totals[name].addcmul_(gradient, gradient)


def drawn_batches(
    data: Samples, indices: Tensor, size: int, device: torch.device, title: str
) -> Iterator[Batch]:
    """This process's share of a draw, batch by batch, under a progress bar.

    Under ``torchrun`` with fewer samples than processes it may be empty.

    Args:
        data: samples.
        indices: the draw, of which positions become the batches' ``rows``.
        size: samples a batch.
        device: of the images and labels; rows are on the CPU.
        title: of the progress bar.
    """
    share = share_of_work(len(indices))
    if len(share) == 0:
        return
    parts = share.split(size)
    loaded = progress(batches(data, size, device, indices[share]), title, len(parts))
    for (images, labels), rows in zip(loaded, parts, strict=True):
        yield images, labels, rows


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
        batch = (images, labels, rows)
        with _frozen(parameters.values()):
            if len(images) == 1:
                # Its own per-sample gradient, whatever way a weight is used in.
                _receive_singles(receiver, model, weights, batch, cotangents)
                continue
            if generic is None:
                generic = _receive_first(receiver, model, weights, batch, cotangents)
                if not generic:
                    continue
                logger.info(
                    "per-sample gradients of %s take one backward a sample: the weight is shared, "
                    "reshaped, or its rows are not grouped by sample",
                    ", ".join(sorted(generic)),
                )
            fast = {name: weight for name, weight in weights.items() if name not in generic}
            slow = {name: weight for name, weight in weights.items() if name in generic}
            if fast:
                # Nothing of it is named here, which would keep the layers' inputs for the next.
                _pull_back(_observe(receiver, model, fast, batch)[0], batch, cotangents)
            if slow:
                _receive_singles(receiver, model, slow, batch, cotangents)


def _receive_first(
    receiver: Receiver,
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batch: Batch,
    cotangents: Cotangents,
) -> set[str]:
    """Find the weights that need the generic path; where none does, also use the batch."""
    for weight in weights.values():
        weight.requires_grad_()
    logits, observer = _observe(receiver, model, weights, batch)
    for weight in weights.values():
        weight.requires_grad_(False)
    used = {name for name, calls in observer.calls.items() if calls}
    elsewhere = _reached(logits, weights)
    generic = elsewhere | (used - _used_once_and_grouped(model, batch[0], observer))
    del observer  # and with it the layers' inputs
    if not generic:
        _pull_back(logits, batch, cotangents)
    return generic


def _observe(
    receiver: Receiver, model: nn.Module, weights: Mapping[str, nn.Parameter], batch: Batch
) -> tuple[Tensor, _Observer]:
    """Logits of a batch, whose backward pass will hand ``receiver`` the gradients."""
    images, _, rows = batch

    def receive(call: Call, gradient: Tensor) -> None:
        call.check_unchanged()
        receiver.observed(call, gradient.detach(), rows)

    observer = _Observer(weights, receive)
    with torch.enable_grad(), observer:
        logits = model(images)
    return logits, observer


def _pull_back(logits: Tensor, batch: Batch, cotangents: Cotangents) -> None:
    """One backward a cotangent; the last one frees the graph."""
    if not logits.requires_grad:
        return
    _, labels, rows = batch
    waiting: Tensor | None = None
    for cotangent in cotangents(logits.detach(), labels, rows):
        if waiting is not None:
            logits.backward(waiting, retain_graph=True)
        waiting = cotangent
    if waiting is not None:
        logits.backward(waiting)


def _receive_singles(
    receiver: Receiver,
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
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
