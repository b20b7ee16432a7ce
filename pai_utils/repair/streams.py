"""Where a network adds a layer's output to something it already has: its residual streams.

Residual networks add what a branch computes to a stream that goes past it. Which layers end a
branch, and what their outputs are added to, is read off one forward, from every addition of two
tensors of one shape. A layer ends a branch if one of them is its output up to an affine map of each
channel (a BatchNorm in evaluation mode, a LayerScale, dropout that is off), while the other went
into or came out of a module. Where two branches meet, the one that is computed last is found,
since only then the other is known. Outputs that are rearranged before they are added, as in
windowed attention, are not found, nor are layers and streams that a forward passes several times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pai_utils.curvature.calls import Call, Calls
from pai_utils.repair.layouts import channel_axis, channels_last, watching
from pai_utils.support.common import undisturbed

_AFFINE = 1e-6  # the share of the operand's variance that rounding may leave unexplained


@dataclass(frozen=True)
class Residual:
    """The sum ``stream + scale · output + shift`` that a layer's output goes into."""

    place: str  #: module that the stream passes before the sum
    side: str  #: whether it is the module's ``"input"`` or ``"output"``
    scale: Tensor  #: ``[channels]``; zero for a channel that never varied
    axis: int  #: of the channels, from the end


def find_residuals(model: nn.Module, names: Sequence[str], images: Tensor) -> dict[str, Residual]:
    """The layers and normalisations whose outputs are added to a stream, by their weights' names.

    ``names`` are the weights to look at. The model is run in evaluation mode on a few images
    ``[N, 3, H, W]``, and left as it was.
    """
    search = _Search()
    with undisturbed(model, any_output=True), torch.no_grad(), ExitStack() as hooks:
        for name, module in model.named_modules():
            if name:
                before, after = partial(search.enter, name), partial(search.leave, name)
                hooks.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
                hooks.enter_context(module.register_forward_hook(after))
        hooks.enter_context(Calls({torch.add: search.add}))
        hooks.enter_context(watching(model, names, search.visit))
        model(images)
    passed = search.passed
    return {n: r for n, r in search.found.items() if passed[n] == passed[r.place] == 1}


@contextmanager
def shown(
    model: nn.Module, residuals: Mapping[str, Residual], observe: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Show ``observe`` the stream of each residual, under its name, whenever it is seen."""

    def show(name: str, _: nn.Module, inputs: Any, last: Any) -> None:
        observe(name, last if residuals[name].side == "output" else _first(inputs, last))

    with ExitStack() as hooks:
        for name, residual in residuals.items():
            module: Any = model.get_submodule(residual.place)
            if residual.side == "input":
                hook = module.register_forward_pre_hook(partial(show, name), with_kwargs=True)
            else:
                hook = module.register_forward_hook(partial(show, name))
            hooks.enter_context(hook)
        yield


def _first(inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """A module's first argument."""
    return next(iter((*inputs, *keywords.values())), None)


class _Sight(NamedTuple):
    """Where and when a tensor was seen, and how often it had been changed in place."""

    tensor: Tensor  #: kept, since its id may be given again once it is gone
    place: str
    side: str
    version: int
    time: int


class _Search:
    """Looks at modules and additions while a model runs."""

    def __init__(self) -> None:
        self.found: dict[str, Residual] = {}
        self.passed: Counter[str] = Counter()  # how often a module or a weight was used
        self._time = 0
        self._started: dict[str, int] = {}
        self._sights: dict[int, list[_Sight]] = {}  # by the tensor's id
        self._outputs: dict[str, tuple[Tensor, int]] = {}  # those that are in no sum yet, in order

    def enter(self, name: str, module: nn.Module, inputs: Any, keywords: Any) -> None:
        """Note what goes into a module."""
        self.passed[name] += 1
        self._note(name, "input", _first(inputs, keywords))

    def leave(self, name: str, module: nn.Module, inputs: object, output: object) -> None:
        """Note what comes out of a module."""
        self._note(name, "output", output)

    def visit(self, name: str, call: Call) -> Tensor:
        """Keep what a layer gives."""
        self.passed[name] += 1
        self._started[name] = self._time
        output: Tensor = call.run()
        # A copy: additions in place change it.
        self._outputs[name] = output.clone(), channel_axis(call)
        return output

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
        """Whether ``branch`` is what the last layer gave; if so, note those that end with it."""
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
            _, axis = self._outputs.pop(name)
            if at:
                self.found.setdefault(name, Residual(at[-1].place, at[-1].side, scale, axis))
        return True

    def _scale(self, name: str, branch: Tensor) -> Tensor | None:
        """The factors that map each channel of a layer's output to ``branch``, if there are."""
        output, axis = self._outputs[name]
        if output.shape != branch.shape:
            return None
        y, h = (channels_last(t, axis).double() for t in (output, branch))
        y, h = y - y.mean(0), h - h.mean(0)
        power = y.square().sum(0)
        scale = torch.where(power > 0, (y * h).sum(0) / torch.where(power > 0, power, 1), 0)
        lost = (h - scale * y).square().sum()
        return scale if scale.any() and lost <= _AFFINE * h.square().sum() else None
