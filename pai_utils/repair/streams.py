"""Where a network adds a layer's output to something it already has: its residual streams.

Residual networks add what a branch computes to a stream that goes past it. Which layers end a
branch, and what their outputs are added to, is read off one forward, from every addition of two
tensors of one shape. A layer ends a branch if one of them is its output up to an affine map of each
channel (a BatchNorm in evaluation mode, a LayerScale, dropout that is off), while the other went
into or came out of a module. Where two branches meet, the one that is computed last is found,
since only then the other is known. Outputs that are rearranged before they are added, as in
windowed attention, are not found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pai_utils.curvature.calls import Call, Calls
from pai_utils.support.common import undisturbed

_AFFINE = 1e-6  # the share of the operand's variance that rounding may leave unexplained


@dataclass(frozen=True)
class Residual:
    """The sum ``stream + scale · output + shift`` that a module's output goes into."""

    place: str  #: module that the stream passes before the sum
    side: str  #: whether it is the module's ``"input"`` or ``"output"``
    scale: Tensor  #: ``[channels]``; zero for a channel that never varied


def find_residuals(
    model: nn.Module, channel_axes: Mapping[str, Callable[[Tensor], int]], images: Tensor
) -> dict[str, Residual]:
    """The modules whose outputs are added to a stream, by name.

    ``channel_axes`` names the modules to look at, and says which axis of an output holds its
    channels. The model is run in evaluation mode on a few images ``[N, 3, H, W]``, and left as it
    was.
    """
    search = _Search(channel_axes)
    with undisturbed(model), torch.no_grad(), ExitStack() as hooks:
        for name, module in model.named_modules():
            if name:
                before, after = partial(search.enter, name), partial(search.leave, name)
                hooks.enter_context(module.register_forward_pre_hook(before))
                hooks.enter_context(module.register_forward_hook(after))
        hooks.enter_context(Calls({torch.add: search.add}))
        model(images)
    return search.found


@contextmanager
def shown(
    model: nn.Module, residuals: Mapping[str, Residual], observe: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Show ``observe`` the stream of each residual, under its name, whenever it is seen."""

    def show(name: str, _: nn.Module, inputs: tuple[Tensor, ...], *output: Tensor) -> None:
        observe(name, *(output or inputs[:1]))

    with ExitStack() as hooks:
        for name, residual in residuals.items():
            module: Any = model.get_submodule(residual.place)
            enters = residual.side == "input"
            register = module.register_forward_pre_hook if enters else module.register_forward_hook
            hooks.enter_context(register(partial(show, name)))
        yield


class _Sight(NamedTuple):
    """Where and when a tensor was seen, and how often it had been changed in place."""

    tensor: Tensor  #: kept, since its id may be given again once it is gone
    place: str
    side: str
    version: int
    time: int


class _Search:
    """Looks at modules and additions while a model runs."""

    def __init__(self, channel_axes: Mapping[str, Callable[[Tensor], int]]) -> None:
        self.found: dict[str, Residual] = {}
        self._channel_axes = channel_axes
        self._time = 0
        self._started: dict[str, int] = {}
        self._sights: dict[int, list[_Sight]] = {}  # by the tensor's id
        self._outputs: dict[str, Tensor] = {}  # of modules that are in no sum yet, in order

    def enter(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Note what goes into a module."""
        self._note(name, "input", inputs[0] if inputs else None)
        self._started[name] = self._time

    def leave(self, name: str, module: nn.Module, inputs: object, output: object) -> None:
        """Note what comes out of a module."""
        self._note(name, "output", output)
        if name in self._channel_axes and isinstance(output, Tensor):
            self._outputs[name] = output.clone()  # additions in place change it

    def _note(self, place: str, side: str, tensor: object) -> None:
        if isinstance(tensor, Tensor):
            self._time += 1
            sight = _Sight(tensor, place, side, tensor._version, self._time)
            self._sights.setdefault(id(tensor), []).append(sight)

    def add(self, call: Call) -> Tensor:
        """Look at an addition, then make it."""
        first, second = call["input"], call["other"]
        if isinstance(first, Tensor) and isinstance(second, Tensor) and call["alpha"] == 1:
            alike = first.shape == second.shape and first.is_floating_point()
            if alike and not self._ends_a_branch(second, first):
                self._ends_a_branch(first, second)
        total: Tensor = call.run()
        return total

    def _ends_a_branch(self, branch: Tensor, stream: Tensor) -> bool:
        """Whether ``branch`` is what the last module gave; if so, note those that end with it."""
        sights = self._sights.get(id(stream), [])
        if not sights or not self._outputs:
            return False
        *_, last = self._outputs
        if self._scale(last, branch) is None:
            return False
        scales = {name: self._scale(name, branch) for name in self._outputs}
        ending = {name: scale for name, scale in scales.items() if scale is not None}
        begin = min(self._started[name] for name in ending)
        # As it was added, and known before the branch's last layer runs.
        at = [s for s in sights if s.version == stream._version and s.time <= begin]
        for name, scale in ending.items():
            del self._outputs[name]
            if at:
                self.found.setdefault(name, Residual(at[-1].place, at[-1].side, scale))
        return True

    def _scale(self, name: str, branch: Tensor) -> Tensor | None:
        """The factors that map each channel of a module's output to ``branch``, if there are."""
        output = self._outputs[name]
        if output.shape != branch.shape:
            return None
        axis = self._channel_axes[name](output)
        y, h = (t.movedim(axis, -1).flatten(0, -2).double() for t in (output, branch))
        y, h = y - y.mean(0), h - h.mean(0)
        power = y.square().sum(0)
        scale = torch.where(power > 0, (y * h).sum(0) / torch.where(power > 0, power, 1), 0)
        lost = (h - scale * y).square().sum()
        return scale if scale.any() and lost <= _AFFINE * h.square().sum() else None
