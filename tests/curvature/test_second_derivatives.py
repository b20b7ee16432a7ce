from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pai_utils.curvature.second_derivatives import FastSecondDerivatives
from tests.cases import relative_error

X = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
W = torch.randn(8, 2, 3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
ROW = torch.linspace(0.5, 2, 6, dtype=torch.float64)
CHANNEL = torch.linspace(0.5, 2, 4, dtype=torch.float64)

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "conv2d, grouped, strided, dilated": lambda x: F.conv2d(
        x, W, torch.ones(8).double(), (2, 1), (1, 2), (1, 2), 2
    ),
    "conv2d, padded alike": lambda x: F.conv2d(x, W, padding="valid", groups=2),
    "conv2d, one image": lambda x: F.conv2d(x[0], W, groups=2),
    "linear over tokens": lambda x: F.linear(x, torch.outer(ROW, ROW), ROW),
    "linear over a vector": lambda x: F.linear(x[0, 0, 0], torch.outer(ROW, ROW)),
    "batch norm": lambda x: F.batch_norm(x, CHANNEL, CHANNEL, CHANNEL, CHANNEL),
    "batch norm without affine part": lambda x: F.batch_norm(x, CHANNEL, CHANNEL),
    "batch norm in training": lambda x: F.batch_norm(x, None, None, CHANNEL, training=True),
    "layer norm": lambda x: F.layer_norm(x, (6,), ROW, ROW),
    "layer norm without affine part": lambda x: F.layer_norm(x, (6,), eps=0.1),
    "layer norm over two dimensions": lambda x: F.layer_norm(x, (5, 6)),
    "GELU": lambda x: F.gelu(x),
    "GELU by tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def second_order(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient and Hessian product of Σ sin(function(x)) at X."""
    x = X.clone().requires_grad_()
    value = function(x)
    (gradient,) = torch.autograd.grad(value.sin().sum(), x, create_graph=True)
    (product,) = torch.autograd.grad(gradient, x, X.cos())
    return value.detach(), gradient.detach(), product


@pytest.mark.parametrize("name", FUNCTIONS)
def test_value_gradient_and_second_derivative_are_torchs(name: str) -> None:
    expected = second_order(FUNCTIONS[name])
    with FastSecondDerivatives():
        found = second_order(FUNCTIONS[name])
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) <= 1e-12
