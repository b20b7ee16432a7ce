"""What is done to the weights that survive pruning, without training.

Removing weights shifts what the next layers receive. Three ways to make good for it, all on images
of the source task only and without their labels, save for ``obs``:

``moments``
    Every BatchNorm and LayerNorm gives its channels the mean and standard deviation that they have
    in the dense network, through its own scale and shift; pruned layers with a bias of their own
    are given the dense mean through it.
``layerwise``
    The surviving weights of every pruned linear layer and convolution, and its bias, are re-solved
    by damped least squares: from the inputs of the network pruned so far to the outputs of the
    dense one (as the reconstruction steps of Dong et al. 2017, "Learning to prune deep neural
    networks via layer-wise optimal brain surgeon", and Frantar & Alistarh 2022, "Optimal brain
    compression", here solved exactly).
``obs``
    The second-order update that belongs to ``block_fisher``:
    :meth:`~pai_utils.curvature.blocks.BlockFisher.repair`.

``moments`` and ``layerwise`` leave out transposed convolutions, convolutions that transform their
weight and the input projections of ``nn.MultiheadAttention``, and ``moments`` normalisations of
another kind or without a shift; a warning names them.

Where a layer's output is added to a residual stream, what counts is the sum: both ask such a layer
for its dense output *and* for what the stream has lost on the way to it, so that errors are mended
at every sum instead of adding up (:mod:`pai_utils.repair.streams`; ``streams=False`` looks at each
layer alone, as those methods do).

They combine with a plus, ``"layerwise+moments"``, in any order of words: ``obs`` comes first, then
one pass through the network repairs layer after layer, each from inputs that earlier repairs made.

**Cost.** ``moments`` and ``layerwise`` take one forward of the dense and one of the pruned network
on all images at once. ``layerwise`` adds for a layer of K inputs, M outputs and R rows about 2RK²
operations for the products, and for each output n³/3, n the weights that survive or those that are
gone, whichever are fewer, in float64.
``obs`` costs what its blocks cost, a forward and a backward with products of per-sample gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from pai_utils.curvature.blocks import check_block_options, fisher_blocks
from pai_utils.masks import Mask
from pai_utils.repair.layouts import (
    by_group,
    channel_axis,
    channels_last,
    count_rows,
    is_norm,
    is_plain,
    keeps_its_scale,
    rows_of,
    standardised,
)
from pai_utils.repair.least_squares import solve_layer
from pai_utils.repair.streams import Residual, find_residuals, shown
from pai_utils.support.common import (
    NonFiniteError,
    device_of,
    listed,
    logger,
    undisturbed,
    unknown_name,
)
from pai_utils.support.sampling import Draw, Samples, batches, check_batch_size, draw_samples

REPAIR_SAMPLES = 512
REPAIR_DAMPING = 0.1
REPAIRS = ("moments", "layerwise", "obs")
"""The parts that a repair may have."""
_IMAGES_TO_LOOK_AT = 8  # ample to tell whether one tensor is an affine map of another
_ROWS_AN_UNKNOWN = 64  # of a depthwise layer's 9 weights, thousands of rows would be wasted
REPAIR_OPTIONS = ("samples", "damping", "rows", "streams", "block_size")
"""Keywords of :func:`repair_` that change its result."""


def parse_repair(text: str) -> tuple[str, ...]:
    """The parts of a repair: of ``"none"`` nothing, of ``"layerwise+moments"`` both.

    Raises:
        ValueError: for an unknown part, or one that is named twice.

    Examples:
        >>> from pai_utils.repair.methods import parse_repair
        >>> parse_repair("layerwise+moments")
        ('layerwise', 'moments')
        >>> parse_repair("weights")
        Traceback (most recent call last):
            ...
        ValueError: unknown repair 'weights'. Choose from: none, moments, layerwise, obs
    """
    if text == "none":
        return ()
    parts = tuple(text.split("+"))
    for part in parts:
        if part not in REPAIRS:
            raise unknown_name("repair", part, ["none", *REPAIRS])
    if len(set(parts)) < len(parts):
        raise ValueError(f"repair {text!r} names a part twice")
    return parts


def check_repair(repair: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """The parts of a repair, with options that :func:`repair_` can take.

    Args:
        repair: as there.
        options: its keywords, or some of them.

    Returns:
        As :func:`parse_repair`.

    Raises:
        ValueError: as :func:`parse_repair`, for an unknown keyword, a damping that is
            not above zero, or fewer samples, rows, or weights a block than one.

    Examples:
        >>> from pai_utils.repair.methods import check_repair
        >>> check_repair("layerwise+moments", {"damping": 0.01})
        ('layerwise', 'moments')
        >>> check_repair("layerwise", {"rows": 0})
        Traceback (most recent call last):
            ...
        ValueError: rows=0: at least one row is needed
    """
    parts = parse_repair(repair)
    known = (*REPAIR_OPTIONS, "seed", "batch_size")
    for name in options:
        if name not in known:
            raise unknown_name("repair option", name, known)
    samples = options.get("samples")
    damping = options.get("damping", REPAIR_DAMPING)
    if samples is not None and samples < 1:
        raise ValueError(f"samples={samples}: at least one sample is needed (None takes all)")
    if not 0 < damping < math.inf:
        raise ValueError(f"damping={damping} must be a finite number above zero")
    if (rows := options.get("rows", 1)) < 1:
        raise ValueError(f"rows={rows}: at least one row is needed")
    check_batch_size(options.get("batch_size", 1))
    if "obs" in parts:
        check_block_options(options.get("block_size", 1), damping)
    return parts


def repair_(
    model: nn.Module,
    dense: nn.Module,
    mask: Mask,
    data: Samples,
    repair: str,
    *,
    samples: int | None = REPAIR_SAMPLES,
    seed: int = 0,
    damping: float = REPAIR_DAMPING,
    rows: int = 8192,
    streams: bool = True,
    block_size: int = 64,
    batch_size: int = 64,
) -> None:
    """Repair a pruned model in place; pruned weights stay exactly zero.

    Args:
        model: the pruned model; its parameters and BatchNorm buffers are those of ``dense`` but
            for the mask.
        dense: the model before pruning; left as it was.
        mask: what was pruned.
        data: samples of the source task.
        repair: parts joined by ``+``, of :data:`REPAIRS`.
        samples: at most so many, by a seeded draw; ``None`` for all. They run through the networks
            as one batch.
        seed: of this draw and of the rows.
        damping: ridge of ``layerwise`` towards the dense weights, over the mean square of a
            layer's inputs; of ``obs``, over a block's mean diagonal.
        rows: positions (of images, pixels or tokens) at most that a layer is re-solved on, and no
            more than 64 for each weight of an output.
        streams: whether layers that end a residual branch also make good what their stream lost.
        block_size: of ``obs``.
        batch_size: of ``obs``, samples a forward.

    Raises:
        ValueError: as :func:`check_repair`, and for an image that is not finite; the model is
            then left as it was.

    Examples:
        >>> import copy
        >>> import torch
        >>> from pai_utils import Mask
        >>> from pai_utils.repair.methods import repair_
        >>> dense = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 2, bias=False))
        >>> dense[1].weight.data = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -0.5]])
        >>> images = torch.tensor([[1.0, 1.0, 0.0], [2.0, 2.0, 1.0], [3.0, 3.0, 5.0]])
        >>> images = images.view(3, 3, 1, 1)
        >>> data = torch.utils.data.TensorDataset(images, torch.tensor([0, 1, 0]))
        >>> mask = Mask({"1.weight": torch.tensor([[False, True, True], [False, True, True]])})
        >>> model = copy.deepcopy(dense)
        >>> mask.apply_(model)
        >>> repair_(model, dense, mask, data, "layerwise", damping=1e-6)
        >>> model[1].weight.data  # the second channel, equal to the first, stands in for it
        tensor([[ 0.0000, -1.0000,  0.5000],
                [ 0.0000,  3.0000, -0.5000]])
    """
    ranged = {"samples": samples, "damping": damping, "rows": rows, "block_size": block_size}
    parts = check_repair(repair, ranged | {"batch_size": batch_size})
    if samples is not None:
        samples = min(samples, len(cast(Sized, data)))
    if not parts:
        return
    indices = draw_samples(data, samples, seed)
    together = bool({"moments", "layerwise"} & set(parts))
    size = len(indices) if together else batch_size
    drawn = batches(data, size, device_of(dense), indices)
    for rows_drawn, (images, _) in zip(indices.split(size), drawn, strict=True):
        _check_images(images, rows_drawn)
    if "obs" in parts:
        _follow_fisher_(
            model, dense, mask, data,
            samples=samples, seed=seed, damping=damping, block_size=block_size,
            batch_size=batch_size,
        )  # fmt: skip
    if not together:
        return
    masked = {name.rpartition(".")[0] for name in mask if name.endswith(".weight")}
    layers = {
        name: module
        for name, module in model.named_modules()
        if name in masked and is_plain(module)
    }
    if others := [name for name in mask if name.removesuffix(".weight") not in layers]:
        logger.warning(
            "%s: no weights of plain linear layers or convolutions; not repaired by %s",
            listed(others),
            "+".join(part for part in parts if part != "obs"),
        )
    unscaled = [name for name, module in model.named_modules() if keeps_its_scale(module)]
    if "moments" in parts and unscaled:
        logger.warning(
            "%s: no BatchNorm or LayerNorm of channels with scale and shift; moments not restored",
            listed(unscaled),
        )
    places = {**layers, **{n: m for n, m in model.named_modules() if is_norm(m)}}
    residuals = _residuals(dense, places, images[:_IMAGES_TO_LOOK_AT]) if streams else {}
    run = _Repair(parts, mask, damping, rows, seed, residuals, places)
    with (
        undisturbed(dense),
        torch.inference_mode(),
        shown(dense, residuals, run.record_stream),
        _watched(dense, layers, run.record),
    ):
        dense(images)
    originals = {name: p.detach() for name, p in dense.named_parameters()}
    with (
        undisturbed(model),
        torch.no_grad(),
        shown(model, residuals, run.compare_stream),
        run.acting_on(model, layers, originals),
    ):
        model(images)
    for name in set(layers) - set(run.done):
        logger.warning("%s is not called as a layer; its weights are not repaired", name)


def _check_images(images: Tensor, indices: Tensor) -> None:
    """Refuse images that would give weights that are not finite."""
    broken = ~images.flatten(1).isfinite().all(1)
    if broken.any():
        index = int(indices[broken.cpu()][0])
        raise NonFiniteError(f"image {index} of the data to repair by is not finite")


def _residuals(dense: nn.Module, places: dict[str, Any], images: Tensor) -> dict[str, Residual]:
    def axis_of(module: Any) -> Callable[[Tensor], int]:
        return lambda output: channel_axis(module, output)

    return find_residuals(dense, {n: axis_of(m) for n, m in places.items()}, images)


@dataclass
class _Stream:
    """A residual stream where a branch is added to it, over the branch's scale."""

    mean: Tensor  # [channels]
    rows: Tensor | None = None  # [rows, channels], of a layer to re-solve


@dataclass
class _Target:
    """What the dense network had at one layer or normalisation."""

    mean: Tensor  # [channels] of its outputs; of a normalisation's inputs
    std: Tensor
    outputs: Tensor | None = None  # [rows, channels] of a layer to re-solve


Observer = Callable[[str, nn.Module, Tensor, Tensor], None]


@contextmanager
def _watched(model: nn.Module, layers: dict[str, Any], observe: Observer) -> Iterator[None]:
    """Show inputs and outputs of the layers and normalisations, at their first call."""
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            observe(name, module, inputs[0], output)

        handles.append(module.register_forward_hook(hook))

    for name, module in model.named_modules():
        if name in layers or is_norm(module):
            watch(name, module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Repair:
    """Repairs layer after layer while images run through the pruned network."""

    parts: tuple[str, ...]
    mask: Mask
    damping: float
    rows: int
    seed: int
    residuals: dict[str, Residual]
    modules: dict[str, Any]  # the layers and normalisations, by name
    targets: dict[str, _Target] = field(default_factory=dict)
    streams: dict[str, _Stream] = field(default_factory=dict)  # of the dense network
    gaps: dict[str, _Stream] = field(default_factory=dict)  # what the pruned network's lack
    done: list[str] = field(default_factory=list)
    shifted: set[str] = field(default_factory=set)

    def record(self, name: str, module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        """Keep what the dense network gives at one place."""
        if name in self.targets:
            return
        if is_norm(module):
            values = channels_last(standardised(module, inputs), module)
            outputs = None
        else:
            values = channels_last(output, module)
            outputs = None
            if "layerwise" in self.parts:
                outputs = values[self._chosen(module, len(values))].clone()
        values = values.double()
        self.targets[name] = _Target(values.mean(0), values.std(0, correction=0), outputs)

    def record_stream(self, name: str, stream: Tensor) -> None:
        """Keep what the dense network adds the output of a layer or normalisation to."""
        self.streams[name] = self._stream(name, stream)

    def compare_stream(self, name: str, stream: Tensor) -> None:
        """Keep what the pruned network's stream lacks of the dense one's."""
        dense, now = self.streams.pop(name), self._stream(name, stream)
        rows = None if dense.rows is None or now.rows is None else dense.rows - now.rows
        self.gaps[name] = _Stream(dense.mean - now.mean, rows)

    def _stream(self, name: str, stream: Tensor) -> _Stream:
        module, scale = self.modules[name], self.residuals[name].scale
        values = channels_last(stream, module)
        # A channel that the branch does not reach can make nothing good.
        inverse = torch.where(scale == 0, 0, 1 / scale)
        mean = values.double().mean(0) * inverse
        if is_norm(module) or "layerwise" not in self.parts:
            return _Stream(mean)
        chosen = self._chosen(module, len(values))
        return _Stream(mean, values[chosen] * inverse.to(values.dtype))

    @contextmanager
    def acting_on(
        self, model: nn.Module, layers: dict[str, Any], originals: dict[str, Tensor]
    ) -> Iterator[None]:
        """Repair each place before its own output is computed, so that all later ones see it."""
        handles = []

        def add(name: str, module: nn.Module) -> None:
            def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                if name in self.done:
                    return
                self.done.append(name)
                if is_norm(module):
                    if "moments" in self.parts:
                        self._repair_norm_(name, module, inputs[0])
                    return
                if "layerwise" in self.parts:
                    original = originals[f"{name}.weight"]
                    self._solve_(name, module, inputs[0], original)

            def after(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
                bias = cast(Tensor | None, module.bias)
                if "moments" not in self.parts or bias is None or name in self.shifted:
                    return None
                self.shifted.add(name)
                values = channels_last(output, module).double()
                wanted = self.targets[name].mean
                if name in self.gaps:
                    wanted = wanted + self.gaps[name].mean
                shift = (wanted - values.mean(0)).to(output.dtype)
                bias += shift
                axis = channel_axis(module, output)
                return output + shift.view([-1 if i == axis else 1 for i in range(output.ndim)])

            handles.append(module.register_forward_pre_hook(before))
            if not is_norm(module):
                handles.append(module.register_forward_hook(after))

        for name, module in model.named_modules():
            if name in layers or is_norm(module):
                add(name, module)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _chosen(self, module: Any, count: int) -> Tensor:
        """The rows of a layer to re-solve it on: the same in both networks."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randperm(count, generator=generator)
        most = min(self.rows, _ROWS_AN_UNKNOWN * module.weight[0].numel())
        return drawn[:most].sort().values.to(module.weight.device)

    def _repair_norm_(self, name: str, module: Any, inputs: Tensor) -> None:
        target = self.targets[name]
        values = channels_last(standardised(module, inputs), module).double()
        mean, std = values.mean(0), values.std(0, correction=0)
        if module.weight is None or module.bias is None:
            return
        scale, shift = module.weight.double(), module.bias.double()
        # A channel that the pruned network holds constant has no spread to restore.
        alive = std > 1e-6 * target.std
        ratio = torch.where(alive, target.std / torch.where(alive, std, 1), 1.0)
        # scale' z + shift' has the moments that scale z + shift had in the dense network.
        restored = scale * target.mean + shift - scale * ratio * mean
        if (gap := self.gaps.get(name)) is not None:
            restored += gap.mean
        module.weight.copy_(scale * ratio)
        module.bias.copy_(restored)

    def _solve_(self, name: str, module: Any, inputs: Tensor, original: Tensor) -> None:
        target = self.targets[name].outputs
        assert target is not None
        if (gap := self.gaps.get(name)) is not None and gap.rows is not None:
            target = target + gap.rows
        keep = self.mask[f"{name}.weight"].to(inputs.device)
        solved, bias = solve_layer(
            rows_of(module, inputs, self._chosen(module, count_rows(module, inputs))),
            target,
            by_group(module, original),
            by_group(module, keep),
            # A mean that no bias can carry is left to the normalisation's, if those are repaired.
            centred=module.bias is not None or "moments" in self.parts,
            damping=self.damping,
        )
        module.weight.copy_(solved.reshape(module.weight.shape))
        if module.bias is not None:
            module.bias.copy_(bias)


def _follow_fisher_(
    model: nn.Module,
    dense: nn.Module,
    mask: Mask,
    data: Samples,
    *,
    samples: int | None,
    seed: int,
    damping: float,
    block_size: int,
    batch_size: int,
) -> None:
    """Move surviving weights by the second-order update of the dense network's Fisher blocks."""
    targets = dict(model.named_parameters())
    originals = dict(dense.named_parameters())
    blocks = fisher_blocks(
        dense,
        list(mask),
        data,
        Draw(samples, batch_size, seed),
        block_size=block_size,
        damping=damping,
    )
    with torch.no_grad():
        for block in blocks:
            part = slice(block.start, block.stop)
            weights = originals[block.name].detach().flatten()[part]
            keep = mask[block.name].flatten()[part].to(weights.device)
            moved = block.repair(weights, keep)
            target = targets[block.name]
            places = torch.arange(block.start, block.stop, device=target.device)
            target[torch.unravel_index(places, target.shape)] = moved  # in any memory layout
