"""Per-sample gradients, layer by layer, during one forward and backward.

For a sample n with cotangent v (one value a logit), the gradient of a weight is J_nᵀ v. Curvature
diagonals are sums over samples (and cotangents) of its *square*, so the gradients of different
samples must be told apart, and positions or tokens of one sample must be summed before squaring::

    linear   G_n = Σ_t g_nt a_ntᵀ             (t: tokens; a: layer input, g: gradient at its output)
    conv     G_n = Σ_l g_nl unfold(a_n)_lᵀ    (l: output positions)

Calls of ``F.linear`` and ``F.conv2d`` are observed, and the weight gradient that autograd would sum
over the batch is replaced by the per-sample one, which costs the same products. A weight used in
any other way (by several calls, reshaped, inside ``nn.MultiheadAttention``, with rows not grouped
by sample) takes one backward a sample, with the same result. The first batch tells which.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from pai_utils.curvature.calls import Call, Geometry, watching
from pai_utils.curvature.products import gradients
from pai_utils.support.common import at_least_single, logger, progress
from pai_utils.support.sampling import Samples, batches, paired, share_of_work

Batch = tuple[Tensor, Tensor, Tensor]
"""``(images [B, 3, H, W], labels [B], rows [B])``; ``rows`` are positions within the draw."""

Cotangents = Callable[[Tensor, Tensor, Tensor], Iterable[Tensor]]
"""``(logits [B, C], labels [B], rows [B]) -> cotangents``, each ``[B, C]``."""

_CPU_BLOCK_BYTES = 2 * 2**20  # of a sample: about a core's caches
_GPU_BLOCK_BYTES = 256 * 2**20
_SMALL = 2**13  # entries below which a call costs more than its work
_ROUNDING_SHARE = 0.1  # most that rounding may move a layer's input, over what other images do


@dataclass(frozen=True)
class Gradients:
    """Gradients of one weight, formed, or as a layer's input and the gradient at its output."""

    name: str  #: of the weight
    rows: Tensor  #: of the samples, [b]
    gradient: Tensor  #: [b, *shape] of the weight, or at the layer's output [b, rows, ...]
    input: Tensor | None = None  #: of the layer, [b, rows, ...]
    geometry: Geometry | None = None  #: of a convolution; None for a linear layer
    room: int = 2**28  #: bytes that :meth:`pieces` may take

    def add_squares_(self, total: Tensor) -> None:
        """Add Σ_n G_n² to ``total``, of the weight's shape; a convolution's lies channels-last."""
        gradient, geometry = self.gradient.to(total.dtype), self.geometry
        if self.input is None:
            _add_squares_(total, gradient)
            return
        inputs = self.input.to(total.dtype)
        if geometry is None and gradient[0].numel() == gradient.shape[-1]:
            # No tokens: the square of an outer product factorises.
            total.addmm_(gradient.flatten(1).square().T, inputs.flatten(1).square())
        elif geometry is None or geometry.groups == 1:
            _add_squared_products_(total, inputs, gradient, geometry)
        elif total.shape[1] == 1 and len(total) == geometry.groups:
            _add_squared_taps_(total, inputs, gradient, geometry)
        else:
            for _, _, entries in self.pieces(total.numel(), total.numel()):
                _add_squares_(total, entries.view(-1, *total.shape))

    def pieces(self, length: int, block: int) -> Iterator[tuple[slice, int, Tensor]]:
        """Yield which samples, the first block's number, and the entries ``[b, blocks, block]``.

        Of gradients flattened to ``length`` entries, with zeros behind them, as many at once as
        fit. All entries of some samples come before those of the next.
        """
        samples = step = len(self.rows)
        gradient = self.gradient.to(at_least_single(self.gradient))
        inputs, geometry = self.input, self.geometry
        if inputs is not None and geometry is not None:  # whose windows are copied
            windows = inputs.shape[2] * math.prod(geometry.kernel) * gradient[:, :, 0].numel()
            step = max(1, self.room * samples // (2 * windows * gradient.element_size()))
        for begin in range(0, samples, step):
            chosen = slice(begin, min(begin + step, samples))
            each, right = gradient[chosen], None if inputs is None else inputs[chosen].to(gradient)
            if right is None:
                form = _formed(each)
            elif geometry is None or geometry.groups == 1:
                form = _product(_positions(each, geometry), _patches(right, geometry), geometry)
            else:
                form = _formed(_grouped(right, each, geometry))
            # Sixteen bytes each: one copy in float64, and the product that is copied.
            most = min(16 * chunk_bytes(gradient.device), self.room // 2) // 16
            width = max(1, most // ((chosen.stop - begin) * block)) * block
            for first in range(0, length, width):
                entries = in_blocks(form(first, min(first + width, length)), block)
                yield chosen, first // block, entries


def chunk_bytes(device: torch.device) -> int:
    """Bytes to work on at once: what a core's cache holds, what fills a GPU."""
    return _GPU_BLOCK_BYTES if device.type == "cuda" else _CPU_BLOCK_BYTES


def in_blocks(values: Tensor, size: int) -> Tensor:
    """``values [..., n]`` as ``[..., blocks, size]``, the last block filled up with zeros."""
    padded = F.pad(values, (0, -values.shape[-1] % size))
    return padded.reshape(*values.shape[:-1], -1, size)


def _formed(each: Tensor) -> Callable[[int, int], Tensor]:
    return lambda first, last: each.flatten(1)[:, first:last]


def _product(
    left: Tensor, right: Tensor, geometry: Geometry | None
) -> Callable[[int, int], Tensor]:
    """Entries of G = leftᵀ right, for which no more rows are formed than they lie in."""
    width = right.shape[2]

    def form(first: int, last: int) -> Tensor:
        row = first // width
        entries = torch.bmm(left[:, :, row : -(-last // width)].mT, right)
        if geometry is not None:
            entries = entries.unflatten(2, (*geometry.kernel, -1)).movedim(4, 2)
        return entries.flatten(1)[:, first - row * width : last - row * width]

    return form


def _grouped(inputs: Tensor, gradient: Tensor, geometry: Geometry) -> Tensor:
    """Gradients ``[b, out, in / groups, kh, kw]`` of a grouped convolution."""
    windows = _windows(inputs, geometry).unflatten(4, (geometry.groups, -1))
    gradient = gradient.unflatten(2, (geometry.groups, -1))
    return torch.einsum("npgohw,nphwgiyx->ngoiyx", gradient, windows).flatten(1, 2)


def _add_squared_products_(
    total: Tensor, inputs: Tensor, gradient: Tensor, geometry: Geometry | None
) -> None:
    """Linear layers and ungrouped convolutions: G_n is a product of two matrices.

    On CPUs the time goes into memory rather than into the products, so a block of the weight's
    rows is finished for all samples while it lies in the cache, a few samples a thread at once: a
    product of one sample's block is too small to be shared by threads.
    """
    left = _positions(gradient, geometry)  # [samples, L, out]
    samples = len(left)
    matrix = total if geometry is None else total.permute(0, 2, 3, 1)
    matrix = matrix.view(len(total), -1)  # [out, K]
    # How many entries of a G_n to form at once.
    most = max(1, chunk_bytes(total.device) // total.element_size())
    rows = max(1, min(len(total), most // matrix.shape[1]))
    rows = math.ceil(len(total) / math.ceil(len(total) / rows))
    fewest = 1 if total.is_cuda else 2 * torch.get_num_threads()
    step = min(samples, max(fewest, most // matrix.numel()))
    # Patches of all samples if they are needed for several blocks of rows.
    taken = samples if rows < len(total) else step
    products = matrix.new_empty(step, rows, matrix.shape[1])
    for some, positions in zip(inputs.split(taken), left.split(taken), strict=True):
        right = _patches(some, geometry)  # [b, L, K]
        for block, columns in zip(matrix.split(rows), positions.split(rows, 2), strict=True):
            for each, patches in zip(columns.split(step), right.split(step), strict=True):
                out = products[: len(each), : len(block)]
                _add_squares_(block, torch.bmm(each.mT, patches, out=out))


def _positions(gradient: Tensor, geometry: Geometry | None) -> Tensor:
    """Gradient at the output with positions or tokens before channels, ``[b, L, out]``."""
    return (gradient if geometry is None else gradient.movedim(2, -1)).flatten(1, -2)


def _patches(inputs: Tensor, geometry: Geometry | None) -> Tensor:
    """Tokens, or patches in the order (kernel row, kernel column, channel), ``[b, L, K]``."""
    if geometry is None:
        return inputs.flatten(1, -2)
    return _windows(inputs, geometry).movedim(4, -1).flatten(4).flatten(1, 3)


def _windows(inputs: Tensor, geometry: Geometry) -> Tensor:
    """What lies under the kernel, a view ``[b, rows, H, W, C, kh, kw]`` for output positions."""
    windows = geometry.windows(inputs.flatten(0, 1)).flatten(1, 2).movedim(1, 3)
    grouped: Tensor = windows.unflatten(0, inputs.shape[:2])
    return grouped


def _add_squared_taps_(total: Tensor, inputs: Tensor, gradient: Tensor, geometry: Geometry) -> None:
    """Depthwise convolutions, one place of the kernel at a time."""
    each = inputs[0].numel() * inputs.element_size()
    step = max(1, chunk_bytes(total.device) // (4 * each))
    for some, g in zip(inputs.split(step), gradient.split(step), strict=True):
        windows, g = _windows(some, geometry), g.movedim(2, -1)  # [b, rows, H, W, channels, ...]
        for y in range(total.shape[2]):
            for x in range(total.shape[3]):
                tap = (windows[..., y, x] * g).sum((1, 2, 3))
                total[:, 0, y, x] += tap.square_().sum(0)


def _add_squares_(total: Tensor, each: Tensor) -> None:
    """Add Σ_n of the squares of ``each [b, ...]``, which may be overwritten."""
    if len(each) == 1 or (each.device.type == "cpu" and total.numel() > _SMALL):
        for gradient in each.unbind():
            total.addcmul_(gradient, gradient)
    else:
        total.add_(each.square_().sum(0))


def sum_squared_gradients(
    model: nn.Module, names: Sequence[str], batches: Iterable[Batch], cotangents: Cotangents
) -> dict[str, Tensor]:
    """Σ over samples n and cotangents v of (J_nᵀ v)², for every entry of the named weights.

    Exact up to rounding. The model is run as it is, and left without any parameter that asks for a
    gradient, so call this inside :func:`~pai_utils.support.common.undisturbed`.
    """
    totals = {}
    for name in names:
        weight = model.get_parameter(name)
        # Patches are read channels-last, so that convolutions' gradients come in that order.
        layout = torch.channels_last if weight.dim() == 4 else torch.contiguous_format
        totals[name] = torch.zeros_like(weight, dtype=at_least_single(weight), memory_format=layout)
    receive_gradients(model, names, batches, cotangents, lambda g: g.add_squares_(totals[g.name]))
    return {name: total.detach().contiguous() for name, total in totals.items()}


def drawn_batches(
    data: Samples, indices: Tensor, size: int, device: torch.device, title: str
) -> Iterator[Batch]:
    """This process's share of a draw, batch by batch, under a progress bar.

    The batches' ``rows`` are positions within the draw, on the CPU. Under ``torchrun`` with fewer
    samples than processes there may be none.
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
    receive: Callable[[Gradients], None],
    room: int = 2**28,
) -> None:
    """Hand ``receive`` the gradients J_nᵀ v of the named weights, for each sample and cotangent.

    A weight that a sample does not use may be left out: its gradient is zero. The arguments are
    those of :func:`sum_squared_gradients`; ``room`` are bytes of gradients in the making.
    """
    weights = {name: model.get_parameter(name) for name in names}
    through = _Pass(model, cotangents, receive, room)
    generic: set[str] | None = None
    for batch in batches:
        model.requires_grad_(False)
        slow = weights
        with torch.enable_grad():
            if len(batch[0]) > 1:  # a single sample's gradient is its own, however weights are used
                if generic is None:
                    generic = through.trial(weights, batch)
                    if not generic:
                        continue
                slow = {name: weight for name, weight in weights.items() if name in generic}
                if fast := {n: weight for n, weight in weights.items() if n not in generic}:
                    # Nothing of it is named here, which would keep the layers' inputs for the next.
                    through.pull_back(through.observe(fast, batch)[0], batch)
            if slow:
                through.singly(slow, batch)


@dataclass(frozen=True)
class _Pass:
    model: nn.Module
    cotangents: Cotangents
    receive: Callable[[Gradients], None]
    room: int

    def trial(self, weights: Mapping[str, nn.Parameter], batch: Batch) -> set[str]:
        """Names of the weights that take one backward a sample; if none does, use the batch too."""
        images = batch[0]
        for weight in weights.values():
            weight.requires_grad_()
        logits, found = self.observe(weights, batch)
        self.model.requires_grad_(False)
        generic = _reached(logits, weights)
        chosen = len(images) // 2
        change = torch.linspace(-1, 1, images[0].numel()).to(images).view_as(images[0])
        two = torch.stack([images[chosen], images[chosen - 1] + change])
        with torch.no_grad():
            _, again = self.observe(weights, (two, *batch[1:]))
        generic |= {
            name
            for name, inputs in found.items()
            if inputs and not _grouped_by_sample(inputs, again[name], len(images))
        }
        found.clear()  # the layers' inputs
        if generic:
            logger.info(
                "per-sample gradients of %s take one backward a sample: the weight is shared, "
                "reshaped, or its rows are not grouped by sample",
                ", ".join(sorted(generic)),
            )
        else:
            self.pull_back(logits, batch)
        return generic

    def observe(
        self, weights: Mapping[str, nn.Parameter], batch: Batch
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Logits of a batch, whose backward pass will hand on the gradients; and layers' inputs."""
        images, _, rows = batch
        inputs: dict[str, list[Tensor]] = {name: [] for name in weights}

        def visit(name: str, call: Call) -> Any:
            layer_input, linear = call["input"].detach(), call.function is F.linear
            if layer_input.dim() < 2 if linear else layer_input.dim() != 4:
                return call.run()
            inputs[name].append(layer_input)
            geometry = None if linear else Geometry.of(call)
            output = call.run(weight=call["weight"].detach())
            if not torch.is_grad_enabled():
                return output
            version = layer_input._version
            if not output.requires_grad:
                # The first weight of the network: the graph starts here, not at the image. The copy
                # lets an in-place activation follow, which a leaf would refuse.
                output = output.requires_grad_().clone()

            def hook(gradient: Tensor) -> None:
                if layer_input._version != version:
                    raise RuntimeError(
                        f"the input of the layer with weight {name!r} was modified in place after "
                        "the layer used it, so that its gradient cannot be formed; use the "
                        "out-of-place operation there"
                    )
                both = (gradient.detach(), layer_input)
                each, given = (values.unflatten(0, (len(rows), -1)) for values in both)
                self.receive(Gradients(name, rows, each, given, geometry, self.room))

            output.register_hook(hook)
            return output

        with watching(weights, (F.linear, F.conv2d), visit):
            logits = self.model(images)
        return logits, inputs

    def pull_back(self, logits: Tensor, batch: Batch) -> None:
        """One backward a cotangent; the last one frees the graph."""
        if not logits.requires_grad:
            return
        found = self.cotangents(logits.detach(), *batch[1:])
        for cotangent, following in pairwise(chain(found, [None])):
            logits.backward(cotangent, retain_graph=following is not None)

    def singly(self, weights: Mapping[str, nn.Parameter], batch: Batch) -> None:
        """One backward a sample and cotangent; as many are handed on at once as fit."""
        wanted = [weight.requires_grad_() for weight in weights.values()]
        normalised = any(isinstance(m, _BatchNorm) for m in self.model.modules())
        size = sum(w.numel() * w.element_size() for w in wanted)
        together = max(1, self.room // (2 * size))
        kept: list[tuple[Tensor, Sequence[Tensor]]] = []

        def hand_on() -> None:
            found, each = zip(*kept, strict=True)
            kept.clear()
            for name, parts in zip(weights, zip(*each, strict=True), strict=True):
                formed = torch.stack(parts)
                self.receive(Gradients(name, torch.cat(found), formed, room=self.room))

        for image, label, row in zip(*(part.split(1) for part in batch), strict=True):
            logits = self.model(paired(image) if normalised else image)[:1]
            for cotangent in self.cotangents(logits.detach(), label, row):
                kept.append((row, gradients([logits], wanted, [cotangent], keep=True)))
                if len(kept) == together:
                    hand_on()
        if kept:
            hand_on()


def _grouped_by_sample(inputs: list[Tensor], again: list[Tensor], count: int) -> bool:
    """Whether a layer is called once, with rows that do not depend on the other samples.

    Of ``count`` samples the middle one was run again in another place, beside a changed one: its
    rows must be the same but for rounding, by a wide margin against what the change does.
    """
    if not len(inputs) == len(again) == 1 or len(inputs[0]) % count:
        return False
    here, there = (x.split(len(inputs[0]) // count) for x in (inputs[0], again[0]))
    if len(there) != 2 or not here[0].shape == there[0].shape == there[1].shape:
        return False
    same, changed = (there[i] - here[count // 2 - i] for i in range(2))
    return bool(same.norm() <= _ROUNDING_SHARE * changed.norm())


def _reached(logits: Tensor, weights: Mapping[str, nn.Parameter]) -> set[str]:
    """Names of the weights that the graph of ``logits`` leads to."""
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
        waiting += [following for following, _ in node.next_functions]
    variables = {id(getattr(node, "variable", None)) for node in seen}
    return {name for name, weight in weights.items() if id(weight) in variables}
