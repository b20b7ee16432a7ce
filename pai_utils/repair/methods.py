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
(:mod:`pai_utils.repair.streams`). A weight that is used several times is repaired for all its uses
together, each with the inputs that it has before. Transposed convolutions, convolutions that
transform their weight, the projections of ``nn.MultiheadAttention``, other normalisations, and
weights that share a bias or have several are left out, and a warning names them.

**Cost.** ``moments`` and ``layerwise`` take one forward of the dense and one of the pruned network
on all images; where these do not fit into memory at once, the pruned network runs once a layer, in
batches. ``layerwise`` adds for K inputs and R rows of a layer about 2RK² operations, and n³/3 in
float64 an output, n the fewer of its surviving and its pruned weights. ``obs`` costs its blocks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from itertools import chain, cycle
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from pai_utils.curvature.blocks import check_block_options, fisher_blocks
from pai_utils.curvature.calls import Call
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
from pai_utils.support.contract import count_items, unwrapped
from pai_utils.support.sampling import Draw, Samples, batches, fitting_batches

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
    samples: int | None = 512
    """Images at most; None: all. They run as one batch where that fits into memory."""
    damping: float = 0.1
    """Of "layerwise", the ridge towards the dense weights, over the mean square of a layer's
    inputs; of "obs", over a block's mean diagonal."""
    rows: int = 8192
    """Positions (of images, pixels or tokens) at most of each use of a layer that it is re-solved
    on, and no more than 64 for each weight of an output."""
    streams: bool = True  #: whether the end of a residual branch restores what its stream lost
    float32: bool = False
    """Whether "layerwise" solves in it, for GPUs whose float64 is slow; weights move by about 1e-5
    of their norm, of one depthwise layer of EfficientNet-Lite0 by 1e-3."""
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
    model, dense = unwrapped(model), unwrapped(dense)
    draw = Draw(repair.samples, batch_size, seed).at_most(count_items(data))
    indices = draw.indices(data)
    images, _ = next(batches(data, len(indices), torch.device("cpu"), indices))
    broken = ~images.flatten(1).isfinite().all(1)
    if broken.any():
        index = int(indices[broken][0])
        raise NonFiniteError(f"image {index} of the data to repair by is not finite")
    if "obs" in repair.parts:
        _move_by_fisher_(model, dense, mask, data, repair, draw)
    if repair.parts != ("obs",):
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
            weights = dense.get_parameter(block.name).detach()
            keep = mask[block.name].to(weights.device)
            moved = block.repair(weights.flatten(), keep.flatten())
            model.get_parameter(block.name).copy_(moved.view(weights.shape))


def _match_activations_(
    model: nn.Module, dense: nn.Module, mask: Mask, images: Tensor, repair: Repair, seed: int
) -> None:
    """Give layers and normalisations what they have in the dense network, one after the other."""
    before = [(p, p.detach().clone()) for p in model.parameters()]

    def compute(batch_size: int) -> list[str]:
        try:
            return _Run(model, dense, mask, images.split(batch_size), repair, seed).repair_()
        except BaseException:  # an interrupt, too, leaves nothing half repaired
            with torch.no_grad():
                for parameter, values in before:
                    parameter.copy_(values)
            raise

    for warning in fitting_batches(compute, len(images)):
        logger.warning(warning)


class _Enough(BaseException):
    """Ends a forward that has nothing more to tell. No model catches it."""


class _Seen(NamedTuple):
    """Values at one use of a weight in one batch, ``[rows, channels]``."""

    size: int  #: how many rows
    mean: Tensor  #: in float64
    variance: Tensor  #: zero where it does not matter
    rows: Tensor  #: those that a layer is re-solved on


class _Use(NamedTuple):
    """One use of a weight in one batch."""

    dense: _Seen  #: outputs of the dense network
    wanted: _Seen  #: those and what the stream they are added to has lost, to mean and chosen rows
    pruned: _Seen  #: a normalisation's outputs, a layer's inputs ``[groups, rows, K]``


@dataclass
class _Place:
    """A weight that is repaired."""

    norm: bool
    biases: set[str | None] = field(default_factory=set)  #: parameters that are added
    outputs: dict[int, list[_Seen]] = field(default_factory=dict)
    """Of the dense network, for each batch those of each use in it."""
    uses: dict[int, list[_Use]] = field(default_factory=dict)
    """Those that the pruned network came to, in the same order."""

    @property
    def seen(self) -> Iterator[tuple[_Seen, ...]]:
        """What was seen in all uses: dense, wanted and pruned."""
        return zip(*chain(*self.uses.values()), strict=True)


@dataclass
class _Run:
    """Repairs one place after the other while batches run through the pruned network.

    A place is repaired once it was seen in all batches, and before its own output is computed, so
    that with one batch all follow in one forward.
    """

    model: nn.Module
    dense: nn.Module
    mask: Mask
    images: Sequence[Tensor]  #: batches
    repair: Repair
    seed: int
    places: dict[str, _Place] = field(default_factory=dict)
    """Those that are still to be repaired, in the order of their first use."""
    residuals: dict[str, Residual] = field(default_factory=dict)
    streams: dict[tuple[str, int], _Seen] = field(default_factory=dict)
    """The dense residual streams in each batch."""
    lost: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """What the pruned network's streams lack of those in this batch: their means and rows."""
    batch: int = 0
    orders: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def repair_(self) -> list[str]:
        """Repair the model; returns what to warn of."""
        norms = [name for name, p in self.dense.named_parameters() if p.ndim == 1]
        device, names = device_of(self.model), [*norms, *self.mask]
        if self.repair.streams:
            few = self.images[0][:_IMAGES_TO_LOOK_AT].to(device)
            found = find_residuals(self.dense, names, few)
            self.residuals = {n: r for n, r in found.items() if n in self.mask or self._moments}
        with (
            undisturbed(self.dense, any_output=True),
            torch.no_grad(),
            shown(self.dense, self.residuals, self.record_stream),
            layouts.watching(self.dense, names, self.record),
        ):
            for batch, images in enumerate(self.images):
                self.batch = batch
                self.dense(images.to(device))
        warnings = self._leave_out()
        with undisturbed(self.model, any_output=True), torch.no_grad():
            in_turn = cycle(enumerate(self.images))
            while self.places:
                self.batch, images = next(in_turn)
                with (
                    suppress(_Enough),
                    shown(self.model, self.residuals, self.compare_stream),
                    layouts.watching(self.model, names, self.mend),
                ):
                    self.model(images.to(device))
                    name = next(iter(self.places))
                    del self.places[name]
                    less = "is not used as often as in the dense network; it is not repaired"
                    warnings.append(f"{name} {less}")
        return warnings

    @property
    def _moments(self) -> bool:
        return "moments" in self.repair.parts

    def _solves(self, name: str) -> bool:
        return "layerwise" in self.repair.parts and name in self.mask

    def _shifts(self, name: str) -> bool:
        return self._moments and self.places[name].biases != {None}

    def record(self, name: str, call: Call) -> Tensor:
        """Keep what the dense network gives at one place."""
        output: Tensor = call.run()
        bias = next((n for n, p in self.dense.named_parameters() if p is call["bias"]), None)
        norm = call.function in layouts.NORMS
        if norm and (not self._moments or bias is None or call.arguments.get("training")):
            return output
        place = self.places.setdefault(name, _Place(norm))
        place.biases.add(bias)
        values = layouts.channels_last(output, layouts.channel_axis(call))
        if bias is None and call["bias"] is not None:
            values = values - call["bias"]  # which the model computes, and no repair changes
        place.outputs.setdefault(self.batch, []).append(self._seen(name, values, spread=norm))
        return output

    def _seen(self, name: str, values: Tensor, *, spread: bool = False) -> _Seen:
        exact = values.double()
        mean = exact.mean(0)
        variance = exact.var(0, correction=0) if spread else torch.zeros_like(mean)
        return _Seen(len(values), mean, variance, values[self._chosen(name, len(values))])

    def _chosen(self, name: str, count: int) -> Tensor:
        """Which of the rows of this batch to re-solve a layer on, the same in both networks."""
        if not self._solves(name):
            return torch.zeros(0, dtype=torch.long)
        sizes = [len(images) for images in self.images]
        each, rest = divmod(count, sizes[self.batch])
        # As in one batch of all images, one after the other; other rows are the same in each batch.
        total, first = (count, 0) if rest else (each * sum(sizes), each * sum(sizes[: self.batch]))
        most = min(self.repair.rows, _ROWS_AN_UNKNOWN * self.mask[name][0].numel())
        if (total, most) not in self.orders:
            generator = torch.Generator().manual_seed(self.seed)
            order = torch.randperm(total, generator=generator)[:most]
            self.orders[total, most] = order.sort().values
        order = self.orders[total, most] - first
        return order[(order >= 0) & (order < count)]

    def _leave_out(self) -> list[str]:
        """Forget what has no repair of its own; returns what to warn of."""
        owners = Counter(bias for place in self.places.values() for bias in place.biases - {None})
        torn = [
            name
            for name, place in self.places.items()
            if len(place.biases) > 1 or any(owners[bias] > 1 for bias in place.biases)
        ]
        unused = [name for name in self.mask if name not in self.places]
        repaired = {id(self.dense.get_parameter(name)) for name in self.places}
        # Normalisations share no class, and many are timm's own or another package's.
        norms = [
            name
            for name, module in self.dense.named_modules()
            if "norm" in type(module).__name__.lower() and f"{name}.weight" not in self.mask
            if (scale := getattr(module, "weight", None)) is not None or not any(module.children())
            if id(scale) not in repaired
        ]
        self.places = {
            name: place
            for name, place in self.places.items()
            if name not in torn
            if place.norm or self._solves(name) or self._shifts(name)
        }
        parts = "+".join(part for part in self.repair.parts if part != "obs")
        texts = {
            f"no call of a linear layer or convolution takes them; not repaired by {parts}": unused,
            f"several biases of one weight, or one bias of several; not repaired by {parts}": torn,
            "no BatchNorm with running statistics or LayerNorm of channels, with scale and shift; "
            "moments not restored": norms if self._moments else [],
        }
        return [f"{listed(names)}: {text}" for text, names in texts.items() if names]

    def record_stream(self, name: str, stream: Tensor) -> None:
        """Keep what the dense network adds the output of a place to."""
        values = layouts.channels_last(stream, self.residuals[name].axis)
        self.streams[name, self.batch] = self._seen(name, values)

    def compare_stream(self, name: str, stream: Tensor) -> None:
        """Note what the pruned network's stream lacks, over the scale of the branch."""
        if name in self.places:
            axis, scale = self.residuals[name].axis, self.residuals[name].scale
            # A channel that the branch does not reach can mend nothing.
            inverse = torch.where(scale == 0, 0, 1 / scale)
            dense = self.streams[name, self.batch]
            pruned = self._seen(name, layouts.channels_last(stream, axis))
            rows = (dense.rows - pruned.rows) * inverse.to(stream.dtype)
            self.lost[name] = (dense.mean - pruned.mean) * inverse, rows

    def mend(self, name: str, call: Call) -> Tensor:
        """Repair a place before its own output is computed; all later inputs follow from it."""
        first, place = next(iter(self.places.items()))
        dense, uses = place.outputs.get(self.batch, []), place.uses.setdefault(self.batch, [])
        if name == first and len(uses) < len(dense):
            uses.append(self._use(name, call, dense[len(uses)]))
            if len(uses) == len(dense):
                complete = len(place.uses) == len(self.images)
                if complete:
                    repair_ = self._rescale_ if place.norm else self._solve_
                    repair_(name, call)
                    del self.places[name]  # its rows take memory
                if not complete or not self.places or len(uses) > 1:  # earlier uses are out of date
                    raise _Enough
        output: Tensor = call.run()
        return output

    def _use(self, name: str, call: Call, dense: _Seen) -> _Use:
        if self.places[name].norm:
            values = layouts.channels_last(call.run(), layouts.channel_axis(call))
            pruned = self._seen(name, values, spread=True)
        else:
            mean = layouts.mean_row(call) if self._shifts(name) else torch.zeros(())
            rows = layouts.rows_of(call, self._chosen(name, dense.size))
            pruned = _Seen(dense.size, mean, torch.zeros_like(mean), rows)
        if name not in self.residuals:
            return _Use(dense, dense, pruned)
        mean, rows = self.lost[name]
        wanted = dense._replace(mean=dense.mean + mean, rows=dense.rows + rows)
        return _Use(dense, wanted, pruned)

    def _solve_(self, name: str, call: Call) -> None:
        """Re-solve the surviving weights of a layer, and its bias."""
        _, wanted, pruned = self.places[name].seen
        weight, biased = call["weight"], self.places[name].biases != {None}
        if self._solves(name):
            x = torch.cat([use.rows for use in pruned], 1)
            solved, bias = solve_layer(
                x,
                torch.cat([use.rows for use in wanted]),
                layouts.by_group(self.dense.get_parameter(name), len(x)),
                layouts.by_group(self.mask[name], len(x)),
                # Where there is no bias, the mean is left to the normalisation, if it is repaired.
                centred=biased or (self._moments and call["bias"] is None),
                damping=self.repair.damping,
                dtype=torch.float32 if self.repair.float32 else torch.float64,
            )
            weight.copy_(solved.reshape(weight.shape))
            if biased:
                call["bias"].copy_(bias)
        if self._shifts(name):  # the mean over all rows
            (mean, _), (inputs, _) = _pooled(wanted), _pooled(pruned)
            matrices = layouts.by_group(weight, len(inputs)).double()
            call["bias"].copy_(mean - torch.bmm(matrices, inputs[:, :, None]).flatten())

    def _rescale_(self, name: str, call: Call) -> None:
        """Give a normalisation the mean and standard deviation that it has in the dense network."""
        (_, dense_std), (wanted, _), (mean, std) = map(_pooled, self.places[name].seen)
        # A channel that the pruned network holds constant has no spread to restore.
        alive = std > 1e-6 * dense_std
        factor = torch.where(alive, dense_std / torch.where(alive, std, 1), 1.0)
        call["bias"].copy_(wanted - factor * (mean - call["bias"]))
        call["weight"].mul_(factor)


def _pooled(uses: Sequence[_Seen]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of all rows of some uses."""
    means = torch.stack([use.mean for use in uses])
    variances = torch.stack([use.variance for use in uses])
    counts = torch.tensor([use.size for use in uses]).to(means)
    shares = counts / counts.sum()
    mean = torch.tensordot(shares, means, 1)
    variance = torch.tensordot(shares, variances + (means - mean).square(), 1)
    return mean, variance.sqrt()
