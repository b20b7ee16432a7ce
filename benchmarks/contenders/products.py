"""Products with the Hessian and the Gauss-Newton matrix: the first, and each further one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.problems import Problem
from benchmarks.tasks import EITHER_LAYOUT, Contender, Steps, Vector
from pai_utils.curvature.products import CurvatureOperator, GGNOperator, HessianOperator
from pai_utils.support.sampling import Draw


def probe(problem: Problem) -> dict[str, Tensor]:
    """The vector everyone multiplies with."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(p.shape, generator=generator).to(p)
        for name, p in problem.parameters.items()
    }


def _cached(make: Callable[[], Callable[[], Vector]]) -> Steps:
    """The first product makes the operator, the further ones use it."""
    made: list[Callable[[], Vector]] = []

    def first() -> Vector:
        made.clear()
        made.append(make())
        return made[0]()

    return {"first": first, "further": lambda: made[0]()}


def ours(problem: Problem, kind: type[CurvatureOperator]) -> Steps:
    """The library's operators, with the whole batch's graph kept."""
    data, count, vector = problem.data, len(problem.labels), probe(problem)

    def make() -> Callable[[], Vector]:
        operator = kind(problem.model, problem.names, data, Draw(None, count), memory=2**40)
        return lambda: operator(vector)

    return _cached(make)


def double_backward(problem: Problem) -> Steps:
    """Two calls of autograd, the first one's graph kept; the math attention kernel."""
    weights, vector = list(problem.parameters.values()), list(probe(problem).values())

    def make() -> Callable[[], Vector]:
        with sdpa_kernel(SDPBackend.MATH):
            gradients = torch.autograd.grad(problem.loss, weights, create_graph=True)

        def multiply() -> Vector:
            products = torch.autograd.grad(gradients, weights, vector, retain_graph=True)
            return dict(zip(problem.names, products, strict=True))

        return multiply

    return _cached(make)


def jvp_of_grad(problem: Problem) -> Steps:
    """``torch.func``: forward-mode derivative of the gradient."""
    weights = {name: p.detach() for name, p in problem.parameters.items()}
    others = {
        name: p.detach() for name, p in problem.model.named_parameters() if name not in weights
    }
    vector = probe(problem)

    def loss(values: dict[str, Tensor]) -> Tensor:
        logits = functional_call(problem.model, {**values, **others}, (problem.images,))
        return F.cross_entropy(logits, problem.labels)

    def multiply() -> Vector:
        product: Vector = jvp(grad(loss), (weights,), (vector,))[1]
        return product

    return _cached(lambda: multiply)


def curvlinops(problem: Problem, kind: str) -> Steps:
    """Operators of curvlinops, without the check of determinism that precedes the products."""
    import curvlinops as package

    vector = list(probe(problem).values())

    def make() -> Callable[[], Vector]:
        operator = getattr(package, kind)(
            problem.model,
            nn.CrossEntropyLoss(),
            list(problem.parameters.values()),
            [(problem.images, problem.labels)],
            check_deterministic=False,
            num_data=len(problem.labels),
        )
        return lambda: dict(zip(problem.names, operator @ vector, strict=True))

    return _cached(make)


def eigenthings_operator(problem: Problem, kind: str) -> Any:
    """An operator of hessian-eigenthings over the prunable parameters."""
    import hessian_eigenthings as package

    wanted = set(problem.names)
    options = {"param_filter": lambda name, _: name in wanted}
    data, criterion = [(problem.images, problem.labels)], nn.CrossEntropyLoss()
    if kind == "hessian":
        loss = package.supervised_loss(criterion)
        return package.HessianOperator(problem.model, data, loss, **options)
    loss = package.supervised_loss_of_output(criterion)
    forward = package.supervised_forward
    return package.GGNOperator(problem.model, data, forward, loss, **options)


def eigenthings(problem: Problem, kind: str) -> Steps:
    """hessian-eigenthings' operators."""
    weights = problem.parameters
    flat = torch.cat([part.flatten() for part in probe(problem).values()])

    def make() -> Callable[[], Vector]:
        operator = eigenthings_operator(problem, kind)

        def multiply() -> Vector:
            parts = operator.matvec(flat).split([weight.numel() for weight in weights.values()])
            return {
                name: part.view_as(weight)
                for (name, weight), part in zip(weights.items(), parts, strict=True)
            }

        return multiply

    return _cached(make)


def pyhessian_operator(problem: Problem) -> Any:
    """PyHessian on one batch; it takes every parameter that asks for a gradient."""
    from pyhessian import hessian

    for name, parameter in problem.model.named_parameters():
        parameter.requires_grad_(name in set(problem.names))
    problem.model.zero_grad()
    batch, cuda = (problem.images, problem.labels), problem.device.type == "cuda"
    return hessian(problem.model, nn.CrossEntropyLoss(), data=batch, cuda=cuda)


def pyhessian(problem: Problem) -> Steps:
    """PyHessian's product on one batch, whose graph it keeps."""
    from pyhessian.utils import hessian_vector_product

    vector = list(probe(problem).values())

    def make() -> Callable[[], Vector]:
        kept = pyhessian_operator(problem)

        def multiply() -> Vector:
            products = hessian_vector_product(kept.gradsH, kept.params, vector)
            return dict(zip(problem.names, products, strict=True))

        return multiply

    return _cached(make)


def exact_hessian(problem: Problem) -> Vector:
    """Two backwards."""
    return double_backward(problem)["first"]()


def exact_ggn(problem: Problem) -> Vector:
    """Jᵀ (diag p − p pᵀ) J v / N, with J v from the derivative of Jᵀu by u."""
    weights, vector = list(problem.parameters.values()), list(probe(problem).values())
    with sdpa_kernel(SDPBackend.MATH):
        logits = problem.model(problem.images)
    u = torch.zeros_like(logits, requires_grad=True)
    pulled = torch.autograd.grad(logits, weights, u, create_graph=True)
    (tangent,) = torch.autograd.grad(pulled, u, vector, retain_graph=True)
    p = logits.detach().softmax(1)
    image = p * (tangent - (p * tangent).sum(1, keepdim=True)) / len(logits)
    products = torch.autograd.grad(logits, weights, image)
    return dict(zip(problem.names, products, strict=True))


REFERENCES = {"hessian": exact_hessian, "ggn": exact_ggn}

CONTENDERS: dict[str, Contender[Problem]] = {
    "HessianOperator": Contender(
        lambda problem: ours(problem, HessianOperator), "Hessian", ours=True, reference="hessian"
    ),
    "double backward": Contender(
        double_backward, "Hessian", reference="hessian", layouts=EITHER_LAYOUT
    ),
    "torch.func jvp of grad": Contender(
        jvp_of_grad,
        "Hessian",
        reference="hessian",
        layouts=EITHER_LAYOUT,
        second_derivatives=True,
    ),
    "curvlinops Hessian": Contender(
        lambda problem: curvlinops(problem, "HessianLinearOperator"),
        "Hessian",
        package="curvlinops-for-pytorch",
        reference="hessian",
        layouts=EITHER_LAYOUT,
        second_derivatives=True,
    ),
    "hessian-eigenthings Hessian": Contender(
        lambda problem: eigenthings(problem, "hessian"),
        "Hessian",
        package="hessian-eigenthings",
        reference="hessian",
        layouts=EITHER_LAYOUT,
        second_derivatives=True,
    ),
    "PyHessian": Contender(
        pyhessian,
        "Hessian",
        package="pyhessian",
        reference="hessian",
        layouts=EITHER_LAYOUT,
        second_derivatives=True,
    ),
    "GGNOperator": Contender(
        lambda problem: ours(problem, GGNOperator), "GGN", ours=True, reference="ggn"
    ),
    "curvlinops GGN": Contender(
        lambda problem: curvlinops(problem, "GGNLinearOperator"),
        "GGN",
        package="curvlinops-for-pytorch",
        reference="ggn",
        layouts=EITHER_LAYOUT,
        second_derivatives=True,
    ),
    "hessian-eigenthings GGN": Contender(
        lambda problem: eigenthings(problem, "ggn"),
        "GGN",
        package="hessian-eigenthings",
        reference="ggn",
        layouts=EITHER_LAYOUT,
        second_derivatives=True,
    ),
}
