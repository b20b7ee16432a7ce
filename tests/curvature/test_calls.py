from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pai_utils.curvature.calls import Call, Calls

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def seen(function: Any, compute: Callable[[], Any], **changed: Any) -> tuple[list[Call], Any]:
    """The calls of a function, and what is computed if some of its arguments are changed."""
    calls = []

    def handler(call: Call) -> Any:
        calls.append(call)
        return call.run(**changed)

    with Calls({function: handler}):
        return calls, compute()


def test_arguments_have_names_and_defaults_however_they_are_given() -> None:
    conv = nn.Conv2d(4, 4, 3, stride=2, groups=2)
    (call,), output = seen(F.conv2d, lambda: conv(X))
    assert torch.equal(output, conv(X))
    assert call["input"] is X
    assert call["weight"] is conv.weight
    assert call.name.endswith("conv2d")
    assert (call["stride"], call["groups"]) == ((2, 2), 2)
    (call,), _ = seen(F.conv2d, lambda: F.conv2d(X, weight=conv.weight, groups=2))
    assert call["weight"] is conv.weight
    assert (call["bias"], call["stride"], call["padding"], call["dilation"]) == (None, 1, 0, 1)
    (call,), _ = seen(F.layer_norm, lambda: F.layer_norm(X, (6,)))
    assert (call["normalized_shape"], call["weight"], call["eps"]) == ((6,), None, 1e-5)


@pytest.mark.parametrize(
    "add",
    [
        torch.add,
        Tensor.add,
        lambda x, y: x + y,
        lambda x, y: x.clone().add_(y),
        lambda x, y: torch.add(x, other=y),
        lambda x, y: x.__radd__(y),  # as of a constant on the left
        lambda x, y: x.clone().__iadd__(y),
    ],
)
def test_a_handler_gets_a_function_however_it_is_written(
    add: Callable[[Tensor, Tensor], Tensor],
) -> None:
    (call,), output = seen(torch.add, lambda: add(X, X), other=2 * X)
    assert torch.equal(call["other"], X)
    assert call["alpha"] == 1
    assert torch.equal(output, X + 2 * X)


def test_tensors_in_lists_are_found_and_other_functions_go_elsewhere() -> None:
    others = []

    def otherwise(call: Call) -> Any:
        others.append(call)
        return call.run()

    with Calls({torch.matmul: lambda call: call.run()}, otherwise):
        torch.einsum("nchw,nchw->n", X, torch.stack([X, X])[0])
        X.relu()
    names = [call.name.rpartition(".")[2] for call in others]
    assert [name for name in names if name != "__getitem__"] == ["stack", "einsum", "relu"]
    assert [len(call.tensors) for call in others if call.name.endswith("stack")] == [2]
    assert others[-1]["input"] is X


def test_calls_of_a_handler_are_seen_only_once_it_enters_the_observer_again() -> None:
    scales = []

    def attention(call: Call) -> Any:
        with calls:
            return torch.softmax(call["query"] @ call["key"].mT, -1) @ call["value"]

    def softmax(call: Call) -> Any:
        scales.append(call["dim"])
        return call.run()

    calls = Calls({F.scaled_dot_product_attention: attention, F.softmax: softmax})
    with calls:
        output = F.scaled_dot_product_attention(X, X, X)
    assert scales == [-1]
    assert torch.allclose(output, F.scaled_dot_product_attention(X, X, X, scale=1.0), atol=1e-6)
