"""Where a network adds a layer's output to something it already has: its residual streams.

Residual networks add what a branch computes to a stream that goes past it. Which layers end a
branch, and what their outputs are added to, is read off one forward: every addition of two tensors
of one shape is looked at, and a layer ends a branch if one of them is its output up to an affine
map of each channel (a BatchNorm in evaluation mode, a LayerScale, dropout that is off), while the
other went into or came out of a module. Of two branches that meet, the one that is computed last
is the one found, since only then the other is known. Outputs that are rearranged before they are
added, as in windowed attention, are not found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pai_utils.support.common import undisturbed

_ADDITIONS = {
    torch.add,
    torch.Tensor.add,
    torch.Tensor.add_,
    torch.Tensor.__add__,
    torch.Tensor.__radd__,
    torch.Tensor.__iadd__,
}
_AFFINE = 1e-6  # of the operand's variance at most is not an affine map of the output


@dataclass(frozen=True)
class Residual:
    """The sum ``stream + scale · output + shift`` that a module's output goes into."""

    place: str
    """Module at which the stream is seen, before the sum."""
    side: str
    """Whether as its ``"input"`` or its ``"output"``."""
    scale: Tensor
    """``[channels]``; zero for a channel that never varied."""


def find_residuals(
    model: nn.Module, channel_axes: Mapping[str, Callable[[Tensor], int]], images: Tensor
) -> dict[str, Residual]:
    """The modules whose outputs are added to a stream.

    Args:
        model: run in evaluation mode, and left as it was.
        channel_axes: the modules to look at, by name: which axis of an output holds its channels.
        images: a few images ``[N, 3, H, W]``; one is enough for layers over positions or tokens.

    Returns:
        By name, those that end a branch.
    """
    watcher = _Watcher(channel_axes)
    with undisturbed(model), torch.no_grad(), watcher.watching(model), watcher:
        model(images)
    return watcher.found


@contextmanager
def shown(
    model: nn.Module, residuals: Mapping[str, Residual], observe: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Show ``observe`` the stream of each residual, under its name, at the first call."""
    handles = []
    seen: set[str] = set()

    def show(name: str, stream: Tensor) -> None:
        if name not in seen:
            seen.add(name)
            observe(name, stream)

    def hook(name: str, side: str) -> Callable[..., None]:
        if side == "input":
            return lambda module, inputs: show(name, inputs[0])
        return lambda module, inputs, output: show(name, output)

    for name, residual in residuals.items():
        module = model.get_submodule(residual.place)
        if residual.side == "input":
            handles.append(module.register_forward_pre_hook(hook(name, "input")))
        else:
            handles.append(module.register_forward_hook(hook(name, "output")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Sight(NamedTuple):
    """Where and when a tensor was seen, and how often it had been changed in place."""

    place: str
    side: str
    version: int
    time: int


class _Watcher(TorchFunctionMode):
    """Watches modules and additions while a model runs."""

    def __init__(self, channel_axes: Mapping[str, Callable[[Tensor], int]]) -> None:
        super().__init__()
        self.channel_axes = channel_axes
        self.found: dict[str, Residual] = {}
        self._time = 0
        self._places: dict[int, list[_Sight]] = {}
        self._started: dict[str, int] = {}
        self._alive: list[Tensor] = []  # an id may be given again once its tensor is gone
        self._outputs: dict[str, Tensor] = {}  # of modules that are in no sum yet, in order

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Note what goes into and comes out of every module."""
        handles = []

        def note(tensor: object, name: str, side: str) -> None:
            if isinstance(tensor, Tensor):
                self._time += 1
                sight = _Sight(name, side, tensor._version, self._time)
                self._places.setdefault(id(tensor), []).append(sight)
                self._alive.append(tensor)
            if side == "input":
                self._started[name] = self._time

        def before(name: str) -> Callable[..., None]:
            return lambda module, inputs: note(inputs[0] if inputs else None, name, "input")

        def after(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: object, output: object) -> None:
                note(output, name, "output")
                if name in self.channel_axes and isinstance(output, Tensor):
                    self._outputs[name] = output.clone()  # additions in place change it

            return hook

        for name, module in model.named_modules():
            if name:
                handles.append(module.register_forward_pre_hook(before(name)))
                handles.append(module.register_forward_hook(after(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Look at an addition before it is made."""
        if func in _ADDITIONS and len(args) == 2 and not kwargs:
            first, second = args
            if isinstance(first, Tensor) and isinstance(second, Tensor):
                self._look(first, second)
        return func(*args, **(kwargs or {}))

    def _look(self, first: Tensor, second: Tensor) -> None:
        if first.shape != second.shape or not first.is_floating_point():
            return
        for branch, stream in ((second, first), (first, second)):
            sights = self._places.get(id(stream), [])
            if not sights:
                continue
            scales = {
                name: scale
                for name, output in self._outputs.items()
                if output.shape == branch.shape
                and (scale := self._scale(name, output, branch)) is not None
            }
            # Of two branches that meet, the one that ran last.
            if not scales or list(self._outputs)[-1] not in scales:
                continue
            begin = min(self._started[name] for name in scales)
            for name, scale in scales.items():
                del self._outputs[name]
                # As it was added, and known before the branch's last layer runs.
                at = [s for s in sights if s.version == stream._version and s.time <= begin]
                if at:
                    self.found.setdefault(name, Residual(at[-1].place, at[-1].side, scale))
            return

    def _scale(self, name: str, output: Tensor, branch: Tensor) -> Tensor | None:
        """The factors that map each channel of ``output`` to ``branch``, if there are such."""
        axis = self.channel_axes[name](output)
        y, h = (t.movedim(axis, -1).flatten(0, -2).double() for t in (output, branch))
        y, h = y - y.mean(0), h - h.mean(0)
        power = y.square().sum(0)
        scale = torch.where(power > 0, (y * h).sum(0) / torch.where(power > 0, power, 1), 0)
        if not bool(scale.any()):
            return None
        lost = (h - scale * y).square().sum()
        return scale if bool(lost <= _AFFINE * h.square().sum()) else None
