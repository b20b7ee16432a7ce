"""One observer of the torch functions that a model calls, and how each of them is called.

Unlike a module's hook, a :class:`Calls` sees a function wherever it is called, with the weights
that are really used, and nothing is patched. Calls inside TorchScript stay unseen, and so do those
that a handler makes, unless it enters the observer again (``with calls:``).
"""

from __future__ import annotations

import inspect
from ast import literal_eval
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)

# Parameters of functions written in C++, which Python cannot read. Of a function that is neither
# here nor written in Python only the first parameter has a name, "input".
_LAYER = "input weight bias=None stride=1 padding=0"
_PARAMETERS: dict[Any, str] = {
    F.linear: "input weight bias=None",
    **dict.fromkeys(CONVOLUTIONS, f"{_LAYER} dilation=1 groups=1"),
    **dict.fromkeys(TRANSPOSED, f"{_LAYER} output_padding=0 groups=1 dilation=1"),
    F.scaled_dot_product_attention: "query key value attn_mask=None dropout_p=0.0 is_causal=False "
    "scale=None enable_gqa=False",
    F.max_pool2d: "input kernel_size stride=None padding=0 dilation=1 ceil_mode=False "
    "return_indices=False",
    **dict.fromkeys((torch.add, torch.sub, torch.rsub), "input other alpha=1"),
    **dict.fromkeys((torch.mul, torch.div, torch.matmul), "input other"),
    **dict.fromkeys((torch.cat, torch.stack), "tensors dim=0"),
    torch.addcmul: "input tensor1 tensor2 value=1",
}

# The other ways to write a function, all with its parameters.
_SPELLINGS: dict[Any, tuple[Any, ...]] = {
    torch.add: (Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__),
    torch.sub: (torch.subtract, Tensor.sub, Tensor.sub_, Tensor.__sub__, Tensor.__isub__),
    torch.rsub: (Tensor.__rsub__,),
    torch.mul: (
        *(torch.multiply, Tensor.mul, Tensor.mul_),
        *(Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__),
    ),
    torch.div: (torch.divide, Tensor.div, Tensor.div_, Tensor.__truediv__, Tensor.__itruediv__),
    torch.matmul: (torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__),
    torch.cat: (torch.concat, torch.concatenate),
    F.softmax: (torch.softmax, Tensor.softmax),
    F.max_pool2d: (torch.max_pool2d,),
}
_CHIEF = {other: function for function, others in _SPELLINGS.items() for other in others}


@cache
def _parameters(function: Any) -> dict[str, Any]:
    """Parameters of a torch function in their order, with defaults (``...`` where required)."""
    function = _CHIEF.get(function, function)
    if function in _PARAMETERS:
        words = (f"{word}=...".split("=") for word in _PARAMETERS[function].split())
        return {word[0]: literal_eval(word[1]) for word in words}
    try:
        found = inspect.signature(function).parameters.values()
    except ValueError:
        return {"input": ...}
    return {
        "input" if p.name == "self" else p.name: ... if p.default is p.empty else p.default
        for p in found
        if p.kind is p.POSITIONAL_OR_KEYWORD
    }


class Call:
    """One call of a torch function: ``call["weight"]`` is an argument by its parameter's name."""

    def __init__(self, function: Any, args: Sequence[Any], keywords: Mapping[str, Any]):
        self.function, self.args, self.keywords = function, args, keywords

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """All arguments by name, with the defaults of those that were not given."""
        names = _parameters(self.function)
        return {**names, **dict(zip(names, self.args, strict=False)), **self.keywords}

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def name(self) -> str:
        """What the function is called in torch, as ``"torch.nn.functional.linear"``."""
        return str(resolve_name(self.function) or self.function)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, also those in lists."""
        return [t for t in tree_leaves((self.args, self.keywords)) if isinstance(t, Tensor)]

    def run(self, **changed: Any) -> Any:
        """Call the function as the model does, but for some arguments by name."""
        args = list(self.args)
        for position, name in enumerate(list(_parameters(self.function))[: len(args)]):
            args[position] = changed.pop(name, args[position])
        return self.function(*args, **{**self.keywords, **changed})


@dataclass(frozen=True)
class Geometry:
    """Where a convolution's kernel goes; all but the groups for each dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    margins: tuple[tuple[int, int], ...]  #: zeros before and behind
    groups: int

    @classmethod
    def of(cls, call: Call) -> Geometry:
        """That of a call, transposed or not, however its arguments are given."""
        kernel = tuple(call["weight"].shape[2:])
        stride, dilation = (each_side(call[name], len(kernel)) for name in ("stride", "dilation"))
        padding = 0 if call["padding"] in ("valid", "same") else call["padding"]
        margins = tuple((size, size) for size in each_side(padding, len(kernel)))
        found = cls(kernel, stride, dilation, margins, call["groups"])
        if call["padding"] != "same":
            return found
        return replace(found, margins=tuple((r // 2, r - r // 2) for r in found.reach))

    @property
    def reach(self) -> list[int]:
        """From the kernel's first entry to its last."""
        return [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]

    def windows(self, x: Tensor) -> Tensor:
        """What the kernel meets: a view ``[N, groups, channels, *places, *kernel]``."""
        x = F.pad(x, [size for pair in reversed(self.margins) for size in pair])
        if x.dim() == 4:  # whose windows are read fastest so
            x = x.contiguous(memory_format=torch.channels_last)
        along = zip(self.reach, self.stride, self.dilation, strict=True)
        for axis, (reach, step, apart) in enumerate(along, start=2):
            x = x.unfold(axis, reach + 1, step)[..., ::apart]
        grouped: Tensor = x.unflatten(1, (self.groups, -1))
        return grouped


def each_side(value: int | Sequence[int], sides: int) -> tuple[int, ...]:
    """A convolution's argument as one number for each of its dimensions."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * sides if len(values) == 1 else values


class Calls(TorchFunctionMode):
    """Hand the calls that are made inside to their handlers, whose results the model gets.

    ``handlers`` are by the function they are for, however it is written: that of ``torch.add`` also
    gets ``x + y`` and ``x.add_(y)``. ``otherwise`` handles all other functions.

    Examples:
        >>> with Calls({torch.add: lambda call: call.run(other=2 * call["other"])}):
        ...     torch.ones(2) + torch.ones(2)
        tensor([3., 3.])
    """

    def __init__(
        self,
        handlers: Mapping[Any, Callable[[Call], Any]],
        otherwise: Callable[[Call], Any] | None = None,
    ) -> None:
        super().__init__()
        self._otherwise = otherwise
        self._handlers = {
            spelling: handler
            for function, handler in handlers.items()
            for spelling in (function, *_SPELLINGS.get(function, ()))
        }

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Hand one call to its handler."""
        handler = self._handlers.get(func, self._otherwise)
        if handler is None:
            return func(*args, **kwargs or {})
        return handler(Call(func, args, kwargs or {}))


def watching(
    weights: Mapping[str, Tensor], functions: Iterable[Any], visit: Callable[[str, Call], Any]
) -> Calls:
    """An observer that has ``visit`` make each call of the functions that takes a named weight."""
    names = {id(weight): name for name, weight in weights.items()}

    def handle(call: Call) -> Any:
        name = names.get(id(call["weight"]))
        return call.run() if name is None else visit(name, call)

    return Calls(dict.fromkeys(functions, handle))
