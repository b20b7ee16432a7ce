"""What is done to the weights that survive pruning, without training.

Removing weights shifts what the next layers receive. Three repairs counter that. They use images of
the source task, and only ``obs`` uses their labels.

``moments``
    Every BatchNorm and LayerNorm gives its channels the mean and standard deviation that they have
    in the dense network, through its own scale and shift. A pruned layer with a bias gets its
    dense mean back through the bias.
``layerwise``
    The surviving weights of every pruned linear layer and convolution, and its bias, are re-solved
    by damped least squares: from the inputs of the network pruned so far to the outputs of the
    dense one (as the reconstruction steps of Dong et al. 2017, "Learning to prune deep neural
    networks via layer-wise optimal brain surgeon", and Frantar & Alistarh 2022, "Optimal brain
    compression", here solved exactly).
``obs``
    The second-order update that belongs to ``block_fisher``:
    :meth:`~pai_utils.curvature.blocks.BlockFisher.repair`.

Repairs combine with a plus, as in ``"layerwise+moments"``; ``obs`` comes first. Then one pass
through the network repairs layer after layer, each from inputs that earlier repairs made. Where a
layer's output is added to a residual stream, it is asked for its dense output *and* for what the
stream has lost on the way to it, so that every sum mends the errors before it
(:mod:`pai_utils.repair.streams`). Transposed convolutions, convolutions that transform their
weight, the input projections of ``nn.MultiheadAttention`` and other normalisations are left out,
and a warning names them.

**Cost.** ``moments`` and ``layerwise`` take one forward of the dense and one of the pruned network
on all images at once. ``layerwise`` adds for a layer of K inputs, M outputs and R rows about 2RK²
operations for the products, and n³/3 in float64 for each output, n the weights that survive or
those that are gone, whichever are fewer. ``obs`` costs what its blocks cost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sized
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from pai_utils.curvature.blocks import check_block_options, fisher_blocks
from pai_utils.masks import Mask
from pai_utils.repair import layouts
from pai_utils.repair.least_squares import solve_layer
from pai_utils.repair.streams import Residual, find_residuals, shown
from pai_utils.support.common import (
    NonFiniteError,
    check_names,
    device_of,
    listed,
    logger,
    undisturbed,
)
from pai_utils.support.sampling import Draw, Samples, batches

REPAIRS = ("moments", "layerwise", "obs")
"""The parts that a repair may have."""
_IMAGES_TO_LOOK_AT = 8  # ample to tell whether one tensor is an affine map of another
_ROWS_AN_UNKNOWN = 64  # of a depthwise layer's 9 weights, thousands of rows would be wasted


def parse_repair(text: str) -> tuple[str, ...]:
    """The parts of a repair: of ``"none"`` nothing, of ``"layerwise+moments"`` both.

    Raises:
        ValueError: for an unknown part, one that is named twice, or any beside ``none``.
    """
    parts = () if text == "none" else tuple(text.split("+"))
    check_names("repair", parts, ["none", *REPAIRS])
    if len(set(parts)) < len(parts) or "none" in parts:
        raise ValueError(f"repair {text!r} names a part twice, or has parts beside 'none'")
    return parts


@dataclass(frozen=True)
class Repair:
    """Which repair is made, and how.

    Raises:
        ValueError: for an unknown part or one that is named twice, a damping that is not above
            zero, or fewer samples, rows or weights a block than one.

    Examples:
        >>> from pai_utils.repair.methods import Repair
        >>> Repair("layerwise+moments", damping=0.01).parts
        ('layerwise', 'moments')
        >>> Repair("weights")
        Traceback (most recent call last):
            ...
        ValueError: unknown repair 'weights'. Choose from: none, moments, layerwise, obs
    """

    method: str  #: "none", or parts joined by + of `REPAIRS`
    samples: int | None = 512  #: images at most; None: all. They run as one batch, but for "obs"
    damping: float = 0.1
    """Of "layerwise", the ridge towards the dense weights, over the mean square of a layer's
    inputs; of "obs", over a block's mean diagonal."""
    rows: int = 8192
    """Positions (of images, pixels or tokens) at most that a layer is re-solved on, and no more
    than 64 for each weight of an output."""
    streams: bool = True  #: whether the end of a residual branch restores what its stream lost
    block_size: int = 64  #: of "obs"

    def __post_init__(self) -> None:
        Draw(self.samples)
        if not 0 < self.damping < math.inf:
            raise ValueError(f"damping={self.damping} must be a finite number above zero")
        if self.rows < 1:
            raise ValueError(f"rows={self.rows}: at least one row is needed")
        if "obs" in self.parts:
            check_block_options(self.block_size, self.damping)

    @classmethod
    def of(cls, method: str, options: Mapping[str, Any]) -> Self:
        """The repair with these options, by the names in :data:`REPAIR_OPTIONS`."""
        check_names("repair option", options, REPAIR_OPTIONS)
        return cls(method, **options)

    @property
    def parts(self) -> tuple[str, ...]:
        """Those of the method."""
        return parse_repair(self.method)


REPAIR_OPTIONS = tuple(option.name for option in fields(Repair))[1:]
"""What a :class:`Repair` can be told beside its method."""
REPAIR_SAMPLES = cast(int, Repair.samples)
"""Images that a repair uses where nothing else is asked for."""


def repair_(
    model: nn.Module,
    dense: nn.Module,
    mask: Mask,
    data: Samples,
    repair: Repair,
    *,
    batch_size: int = 64,
    seed: int = 0,
) -> None:
    """Repair a pruned model in place; pruned weights stay exactly zero.

    The model's parameters and BatchNorm buffers are those of ``dense``, the model before pruning,
    but for the mask. The seed draws samples and rows.

    Raises:
        ValueError: for an image that is not finite; the model is then left as it was.

    Examples:
        >>> import copy
        >>> import torch
        >>> from pai_utils import Mask
        >>> from pai_utils.repair.methods import Repair, repair_
        >>> dense = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 2, bias=False))
        >>> dense[1].weight.data = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -0.5]])
        >>> images = torch.tensor([[1.0, 1.0, 0.0], [2.0, 2.0, 1.0], [3.0, 3.0, 5.0]])
        >>> images = images.view(3, 3, 1, 1)
        >>> data = torch.utils.data.TensorDataset(images, torch.tensor([0, 1, 0]))
        >>> mask = Mask({"1.weight": torch.tensor([[False, True, True], [False, True, True]])})
        >>> model = copy.deepcopy(dense)
        >>> mask.apply_(model)
        >>> repair_(model, dense, mask, data, Repair("layerwise", damping=1e-6))
        >>> model[1].weight.data  # the second channel, equal to the first, stands in for it
        tensor([[ 0.0000, -1.0000,  0.5000],
                [ 0.0000,  3.0000, -0.5000]])
    """
    if not repair.parts:
        return
    draw = Draw(repair.samples, batch_size, seed).at_most(len(cast(Sized, data)))
    indices = draw.indices(data)
    together = repair.parts != ("obs",)
    size = len(indices) if together else batch_size
    drawn = batches(data, size, device_of(dense), indices)
    for rows, (images, _) in zip(indices.split(size), drawn, strict=True):
        broken = ~images.flatten(1).isfinite().all(1).cpu()
        if broken.any():
            index = int(rows[broken][0])
            raise NonFiniteError(f"image {index} of the data to repair by is not finite")
    if "obs" in repair.parts:
        _move_by_fisher_(model, dense, mask, data, repair, draw)
    if together:
        _match_activations_(model, dense, mask, images, repair, seed)


def _move_by_fisher_(
    model: nn.Module, dense: nn.Module, mask: Mask, data: Samples, repair: Repair, draw: Draw
) -> None:
    """Move surviving weights by the second-order update of the dense network's Fisher blocks."""
    blocks = fisher_blocks(
        dense, list(mask), data, draw, block_size=repair.block_size, damping=repair.damping
    )
    with torch.no_grad():
        for block in blocks:
            part = slice(block.start, block.stop)
            weights = dense.get_parameter(block.name).detach().flatten()[part]
            keep = mask[block.name].flatten()[part].to(weights.device)
            target = model.get_parameter(block.name)
            places = torch.arange(block.start, block.stop, device=target.device)
            # In any memory layout.
            target[torch.unravel_index(places, target.shape)] = block.repair(weights, keep)


def _match_activations_(
    model: nn.Module, dense: nn.Module, mask: Mask, images: Tensor, repair: Repair, seed: int
) -> None:
    """Give layers and normalisations what they have in the dense network, one after the other."""
    modules: dict[str, Any] = dict(model.named_modules())
    layers = {n: m for n, m in modules.items() if f"{n}.weight" in mask and layouts.is_plain(m)}
    norms = {n: m for n, m in modules.items() if layouts.is_norm(m)}
    if others := [name for name in mask if name.removesuffix(".weight") not in layers]:
        logger.warning(
            "%s: no weights of plain linear layers or convolutions; not repaired by %s",
            listed(others),
            "+".join(part for part in repair.parts if part != "obs"),
        )
    places = dict(layers)
    if "moments" in repair.parts:
        if unscaled := [name for name, m in modules.items() if layouts.keeps_its_scale(m)]:
            text = (
                "no BatchNorm or LayerNorm of channels with scale and shift; moments not restored"
            )
            logger.warning("%s: %s", listed(unscaled), text)
        places |= {name: norm for name, norm in norms.items() if layouts.has_scale_and_shift(norm)}
    run = _Run(repair, mask, seed, places)
    if repair.streams:
        axes = {n: partial(layouts.channel_axis, m) for n, m in (layers | norms).items()}
        found = find_residuals(dense, axes, images[:_IMAGES_TO_LOOK_AT])
        run.residuals = {name: residual for name, residual in found.items() if name in places}
    with undisturbed(dense), torch.no_grad(), ExitStack() as hooks:
        hooks.enter_context(shown(dense, run.residuals, run.record_stream))
        for name in places:
            hook = partial(run.record, name)
            hooks.enter_context(dense.get_submodule(name).register_forward_hook(hook))
        dense(images)
    for name in layers:
        if name not in run.targets:
            logger.warning("%s is not called as a layer; its weights are not repaired", name)
    with undisturbed(model), torch.no_grad(), ExitStack() as hooks:
        hooks.enter_context(shown(model, run.residuals, run.compare_stream))
        for name, module in places.items():
            before = partial(run.before, name, dense.get_parameter(f"{name}.weight"))
            hooks.enter_context(module.register_forward_pre_hook(before))
            hooks.enter_context(module.register_forward_hook(partial(run.after, name)))
        model(images)


@dataclass
class _Run:
    """Repairs layer after layer while images run through the pruned network.

    The dense network runs first, observed by ``record`` and ``record_stream``, then the pruned one
    with the three others. Only the first call of a module counts.
    """

    repair: Repair
    mask: Mask
    seed: int
    places: dict[str, Any]
    """Layers and normalisations of the pruned network, by name."""
    residuals: dict[str, Residual] = field(default_factory=dict)
    targets: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """What each is to give: the ``mean [channels]`` of its outputs; of a layer to re-solve also
    some ``rows [rows, channels]``; of a normalisation the ``std [channels]`` before its scale."""
    streams: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Mean and rows of the dense residual streams, over the scales of their branches."""
    chosen: dict[str, Tensor] = field(default_factory=dict)
    """The rows to re-solve a layer on, the same in both networks."""

    def record(self, name: str, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keep what the dense network gives at one place."""
        if name in self.targets:
            return
        if layouts.is_norm(module):
            mean, std = _moments(module, inputs[0])
            mean = module.weight.double() * mean + module.bias.double()
            self.targets[name] = {"mean": mean, "std": std}
        else:
            self.targets[name] = self._summary(name, output)

    def record_stream(self, name: str, stream: Tensor) -> None:
        """Keep what the dense network adds the output of a place to."""
        if name not in self.streams:
            self.streams[name] = self._over_scale(name, stream)

    def compare_stream(self, name: str, stream: Tensor) -> None:
        """Ask the end of a branch for what the pruned network's stream lacks of the dense one's."""
        if dense := self.streams.pop(name, None):
            target = self.targets[name]
            for key, now in self._over_scale(name, stream).items():
                target[key] = target[key] + (dense[key] - now)

    def before(self, name: str, original: Tensor, module: Any, inputs: tuple[Tensor, ...]) -> None:
        """Repair a place before its own output is computed; all later inputs follow from it."""
        if (target := self.targets.get(name)) is None:
            return
        if layouts.is_norm(module):
            mean, std = _moments(module, inputs[0])
            # A channel that the pruned network holds constant has no spread to restore.
            alive = std > 1e-6 * target["std"]
            rescaled = torch.where(alive, target["std"] / torch.where(alive, std, 1), 1.0)
            scale = module.weight * rescaled
            module.weight.copy_(scale)
            module.bias.copy_(target["mean"] - scale * mean)
        elif "rows" in target:
            keep = self.mask[f"{name}.weight"].to(inputs[0].device)
            solved, bias = solve_layer(
                layouts.rows_of(module, inputs[0], self.chosen[name]),
                target["rows"],
                layouts.by_group(module, original),
                layouts.by_group(module, keep),
                # A mean that no bias can carry is left to the normalisation, if that is repaired.
                centred=module.bias is not None or "moments" in self.repair.parts,
                damping=self.repair.damping,
            )
            module.weight.copy_(solved.reshape(module.weight.shape))
            if module.bias is not None:
                module.bias.copy_(bias)

    def after(
        self, name: str, module: Any, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor | None:
        """Shift what a layer gives to the mean that it is to have."""
        target = self.targets.pop(name, None)
        if target is None or "moments" not in self.repair.parts:
            return None
        if layouts.is_norm(module) or module.bias is None:
            return None
        mean = layouts.channels_last(output, module).double().mean(0)
        shift = (target["mean"] - mean).to(output.dtype)
        module.bias += shift
        axis = layouts.channel_axis(module, output)
        return output + shift.view([-1 if i == axis else 1 for i in range(output.ndim)])

    def _summary(self, name: str, output: Tensor) -> dict[str, Tensor]:
        module = self.places[name]
        values = layouts.channels_last(output, module)
        summary = {"mean": values.double().mean(0)}
        if "layerwise" in self.repair.parts and not layouts.is_norm(module):
            if name not in self.chosen:
                generator = torch.Generator().manual_seed(self.seed)
                order = torch.randperm(len(values), generator=generator)
                most = min(self.repair.rows, _ROWS_AN_UNKNOWN * module.weight[0].numel())
                self.chosen[name] = order[:most].sort().values.to(values.device)
            summary["rows"] = values[self.chosen[name]]
        return summary

    def _over_scale(self, name: str, stream: Tensor) -> dict[str, Tensor]:
        scale = self.residuals[name].scale
        # A channel that the branch does not reach can mend nothing.
        inverse = torch.where(scale == 0, 0, 1 / scale)
        return {k: v * inverse.to(v.dtype) for k, v in self._summary(name, stream).items()}


def _moments(module: Any, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of what a normalisation multiplies by its scale, by channel."""
    values = layouts.channels_last(layouts.standardised(module, inputs), module).double()
    return values.mean(0), values.std(0, correction=0)
