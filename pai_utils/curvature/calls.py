"""One observer of the torch functions that a model calls, and how each of them is called.

Unlike a module's hook, a :class:`Calls` sees a function wherever it is called, with the weights
that are really used, and nothing is patched. Calls inside TorchScript stay unseen, and so do those
that a handler makes, unless it enters the observer again (``with calls:``).
"""

from __future__ import annotations

import inspect
from ast import literal_eval
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
    F.gelu: "input approximate='none'",
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
    """Where the kernel of a two-dimensional convolution goes, whatever way it was called."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @classmethod
    def of(cls, call: Call) -> Geometry | None:
        """That of a call of ``F.conv2d``; None without a batch, or with uneven padding."""
        if call["input"].dim() != 4:
            return None
        kernel, dilation = _pair(call["weight"].shape[2:]), _pair(call["dilation"])
        padding = 0 if call["padding"] == "valid" else call["padding"]
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            if any(t % 2 for t in total):
                return None
            padding = [t // 2 for t in total]
        return cls(kernel, _pair(call["stride"]), _pair(padding), dilation, call["groups"])


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def windows_of(x: Tensor, call: Call, transposed: bool = False) -> Tensor:
    """What a convolution's kernel meets: a view ``[N, groups, channels, *places, *kernel]``.

    A transposed convolution is one of stride 1, its kernel reversed, over its input with zeros
    between the entries.
    """
    sides = call["weight"].dim() - 2

    def each(name: str) -> tuple[int, ...]:
        value = call[name]
        return (value,) * sides if isinstance(value, int) else tuple(value)

    stride, dilation = each("stride"), each("dilation")
    kernel = call["weight"].shape[2:]
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if call["padding"] == "same":
        margins = [(r // 2, r - r // 2) for r in reach]
    else:
        margins = [
            (p, p) for p in ((0,) * sides if call["padding"] == "valid" else each("padding"))
        ]
    if transposed:
        spread = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
        stuffed = x.new_zeros(*x.shape[:2], *spread)
        stuffed[(slice(None), slice(None), *(slice(None, None, s) for s in stride))] = x
        ends = zip(reach, margins, each("output_padding"), strict=True)
        x, stride = stuffed, (1,) * sides
        margins = [(r - p, r - p + more) for r, (p, _), more in ends]
    x = F.pad(x, [margin for pair in reversed(margins) for margin in pair])
    for axis, (r, s, d) in enumerate(zip(reach, stride, dilation, strict=True), start=2):
        x = x.unfold(axis, r + 1, s)[..., ::d]
    windows: Tensor = x.unflatten(1, (call["groups"], -1))
    return windows


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
