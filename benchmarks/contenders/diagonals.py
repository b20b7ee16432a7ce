"""Diagonals: the mean over samples of squared per-sample gradients.

Where a package allows it, labels are the true ones (the empirical Fisher), so that the result is
one number a weight and can be compared; with labels drawn from the model the cost is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

import pai_utils as pai
from benchmarks.problems import Problem
from benchmarks.tasks import EITHER_LAYOUT, Contender, Steps, Vector
from pai_utils.curvature.blocks import DAMPING
from pai_utils.curvature.diagonals import DrawnLabels, fisher_diagonal, ggn_diagonal
from pai_utils.support.sampling import Draw

CHUNK = 8
"""Samples whose gradients ``vmap`` holds at once."""


def ours_fisher(problem: Problem) -> Steps:
    """``fisher_diagonal`` on all images in one batch."""
    data, count = problem.data, len(problem.labels)
    return {
        "whole": lambda: fisher_diagonal(problem.model, problem.names, data, Draw(None, count)),
    }


def ours_ggn(problem: Problem, estimator: str = "mc") -> Steps:
    """``ggn_diagonal`` on all images in one batch."""
    data, count = problem.data, len(problem.labels)
    return {
        "whole": lambda: ggn_diagonal(
            problem.model, problem.names, data, Draw(None, count), estimator=estimator
        ),
    }


def ours_score(problem: Problem) -> Steps:
    """``pai.score("ggn_diag", …)`` as a user calls it."""
    data, count = problem.data, len(problem.labels)
    return {
        "whole": lambda: pai.score("ggn_diag", problem.model, data, samples=None, batch_size=count),
    }


def loop(problem: Problem) -> Steps:
    """One forward and backward a sample."""
    weights = list(problem.parameters.values())

    def whole() -> Vector:
        totals = [torch.zeros_like(weight) for weight in weights]
        for image, label in zip(problem.images.split(1), problem.labels.split(1), strict=True):
            loss = F.cross_entropy(problem.model(image), label)
            for total, gradient in zip(totals, torch.autograd.grad(loss, weights), strict=True):
                total.addcmul_(gradient, gradient)
        return _mean(problem, totals)

    return {"whole": whole}


def vmap_of_grad(problem: Problem) -> Steps:
    """``torch.func``: the gradient function, vectorised over a few samples at a time."""
    weights = {name: p.detach() for name, p in problem.parameters.items()}
    others = {
        name: p.detach()
        for name, p in (*problem.model.named_parameters(), *problem.model.named_buffers())
        if name not in weights
    }

    def loss(values: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(problem.model, {**values, **others}, (image[None],))
        return F.cross_entropy(logits, label[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))

    def whole() -> Vector:
        totals = [torch.zeros_like(weight) for weight in weights.values()]
        chunks = zip(problem.images.split(CHUNK), problem.labels.split(CHUNK), strict=True)
        for images, labels in chunks:
            gradients = each(weights, images, labels)
            for total, name in zip(totals, weights, strict=True):
                total.add_(gradients[name].square_().sum(0))
        return _mean(problem, totals)

    return {"whole": whole}


def hooks(problem: Problem) -> Steps:
    """Module hooks and ``F.unfold``: the textbook way, in a page of code."""
    totals: dict[str, Tensor] = {}

    def attach(name: str, module: nn.Module) -> None:
        weight = f"{name}.weight"
        parameter = problem.parameters[weight]

        def forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            def backward(gradient: Tensor) -> None:
                each = _per_sample(module, inputs[0].detach(), gradient)
                total = each.square_().sum(0).view_as(parameter)
                totals[weight] = totals[weight] + total if weight in totals else total

            output.register_hook(backward)

        module.register_forward_hook(forward)

    for name, module in problem.model.named_modules():
        if f"{name}.weight" in problem.names:
            attach(name, module)

    def whole() -> Vector:
        totals.clear()
        loss = F.cross_entropy(problem.model(problem.images), problem.labels, reduction="sum")
        # The stem's weight keeps the graph alive down to the first layer.
        torch.autograd.grad(loss, problem.parameters[problem.names[0]])
        return _mean(problem, [totals[name] for name in problem.names])

    return {"whole": whole}


def _per_sample(module: nn.Module, inputs: Tensor, gradient: Tensor) -> Tensor:
    """Gradients of a layer's weight, ``[B, out, K]``, one a sample."""
    if isinstance(module, nn.Linear):
        left = gradient.flatten(1, -2) if gradient.dim() > 2 else gradient[:, None]
        right = inputs.flatten(1, -2) if inputs.dim() > 2 else inputs[:, None]
        return left.mT @ right
    if not isinstance(module, nn.Conv2d) or isinstance(module.padding, str):
        raise TypeError(f"no rule for {type(module).__name__} with padding given by name")
    if type(module) is not nn.Conv2d:
        raise TypeError(f"no rule for {type(module).__name__}, which pads on its own")
    columns = F.unfold(inputs, module.kernel_size, module.dilation, module.padding, module.stride)
    columns = columns.unflatten(1, (module.groups, -1))
    left = gradient.flatten(2).unflatten(1, (module.groups, -1))
    each: Tensor = (left @ columns.mT).flatten(1, 2)
    return each


def backpack(problem: Problem) -> Steps:
    """BackPACK's ``SumGradSquared``, on the prunable layers only."""
    from backpack import backpack as active
    from backpack import extend
    from backpack.extensions import SumGradSquared

    for module in _layers(problem).values():
        extend(module)
    for name, parameter in problem.model.named_parameters():
        parameter.requires_grad_(name in set(problem.names))
    weights: list[Any] = list(problem.parameters.values())  # with an attribute of BackPACK's

    def whole() -> Vector:
        problem.model.zero_grad()
        with active(SumGradSquared()):
            F.cross_entropy(
                problem.model(problem.images), problem.labels, reduction="sum"
            ).backward()
        return _mean(problem, [weight.sum_grad_squared for weight in weights])

    return {"whole": whole}


def backpack_ggn(problem: Problem) -> Steps:
    """BackPACK's ``DiagGGNMC``, on the network converted to its modules."""
    from backpack import backpack as active
    from backpack import extend
    from backpack.extensions import DiagGGNMC

    model = extend(problem.model, use_converter=True)
    criterion = extend(nn.CrossEntropyLoss())
    parameters = dict(model.named_parameters())

    def whole() -> Vector:
        model.zero_grad()
        with active(DiagGGNMC(mc_samples=1)):
            criterion(model(problem.images), problem.labels).backward()
        return {name: parameters[name].diag_ggn_mc for name in problem.names}

    return {"whole": whole}


def nngeometry(problem: Problem) -> Steps:
    """NNGeometry's diagonal from its hooks, of the log-likelihood of the true labels."""
    from nngeometry.backend import TorchHooksJacobianBackend
    from nngeometry.layercollection import LayerCollection
    from nngeometry.object import PMatDiag

    collection = LayerCollection()
    for module in _layers(problem).values():
        collection.add_layer_from_model(problem.model, module)

    def log_likelihood(images: Tensor, labels: Tensor) -> Tensor:
        return -F.cross_entropy(problem.model(images), labels, reduction="none")[:, None]

    def whole() -> Vector:
        backend = TorchHooksJacobianBackend(
            layer_collection=collection, model=problem.model, function=log_likelihood
        )
        examples = (problem.images.detach(), problem.labels)
        flat = PMatDiag(generator=backend, examples=examples).get_diag()
        return {
            name: flat[collection.p_pos[layer] :][: weight.numel()].view_as(weight)
            for (name, weight), layer in zip(
                problem.parameters.items(), _layers(problem), strict=True
            )
        }

    return {"whole": whole}


def curvlinops(problem: Problem) -> Steps:
    """Hutchinson's method of curvlinops: one product with the empirical Fisher."""
    from curvlinops import EFLinearOperator, hutchinson_diag

    weights = list(problem.parameters.values())

    def whole() -> Vector:
        operator = EFLinearOperator(
            problem.model,
            nn.CrossEntropyLoss(),
            weights,
            [(problem.images, problem.labels)],
            check_deterministic=False,
            num_data=len(problem.labels),
        )
        parts = hutchinson_diag(operator, 1).split([weight.numel() for weight in weights])
        return {
            name: part.view_as(weight)
            for (name, weight), part in zip(problem.parameters.items(), parts, strict=True)
        }

    return {"whole": whole}


def _layers(problem: Problem) -> dict[str, nn.Module]:
    """The modules whose weights are asked for, in the order of the names."""
    names = [name.removesuffix(".weight") for name in problem.names]
    return {name: problem.model.get_submodule(name) for name in names}


def _mean(problem: Problem, totals: list[Tensor]) -> Vector:
    count = len(problem.labels)
    return {name: total / count for name, total in zip(problem.names, totals, strict=True)}


def exact_fisher(problem: Problem) -> Vector:
    """One backward a sample with the true labels."""
    return _reference(problem, problem.labels)


def exact_drawn(problem: Problem) -> Vector:
    """The same with the labels that the library draws."""
    return _reference(problem, _drawn(problem))


def exact_score(problem: Problem) -> Vector:
    """½ w² times that diagonal, damped."""
    weights = problem.parameters
    return {
        name: (values + DAMPING * values.mean()) * weights[name].detach().square() / 2
        for name, values in exact_drawn(problem).items()
    }


def exact_batch(problem: Problem) -> Vector:
    """The square of the summed gradient with the labels that the library draws."""
    logits, weights = problem.model(problem.images), problem.parameters
    loss = F.cross_entropy(logits, _drawn(problem), reduction="sum")
    gradients = torch.autograd.grad(loss, list(weights.values()))
    return _mean(problem, [gradient.square() for gradient in gradients])


def _drawn(problem: Problem) -> Tensor:
    count = len(problem.labels)
    with torch.no_grad():
        logits = problem.model(problem.images)
    # p − e_y has its one negative entry at the label.
    rows = torch.arange(count)
    (cotangent,) = DrawnLabels(count, 1, 0)(logits, problem.labels, rows)
    return cotangent.argmin(1)


def _reference(problem: Problem, labels: Tensor) -> Vector:
    weights = list(problem.parameters.values())
    totals = [torch.zeros_like(weight) for weight in weights]
    for losses in _losses(problem, labels):
        for loss in losses:
            gradients = torch.autograd.grad(loss, weights, retain_graph=True)
            for total, gradient in zip(totals, gradients, strict=True):
                total.addcmul_(gradient, gradient)
    return _mean(problem, totals)


def _losses(problem: Problem, labels: Tensor) -> Iterator[Tensor]:
    # Two at a time: torch's BatchNorm can give wrong gradients for a batch of one image.
    for images, wanted in zip(problem.images.split(2), labels.split(2), strict=True):
        yield F.cross_entropy(problem.model(images), wanted, reduction="none")


REFERENCES = {
    "fisher": exact_fisher,
    "drawn": exact_drawn,
    "score": exact_score,
    "batch": exact_batch,
}

CONTENDERS: dict[str, Contender[Problem]] = {
    "ggn_diagonal": Contender(
        ours_ggn, "GGN, one drawn label a sample", ours=True, reference="drawn"
    ),
    "score ggn_diag": Contender(
        ours_score, "½ w² (GGN + λ), one drawn label a sample", ours=True, reference="score"
    ),
    "fisher_diagonal": Contender(ours_fisher, "empirical Fisher", ours=True, reference="fisher"),
    "ggn_diagonal batch": Contender(
        lambda problem: ours_ggn(problem, "batch"),
        "square of the batch's gradient, one drawn label a sample",
        ours=True,
        reference="batch",
    ),
    "module hooks": Contender(hooks, "empirical Fisher", reference="fisher", layouts=EITHER_LAYOUT),
    "loop over samples": Contender(loop, "empirical Fisher", reference="fisher"),
    "torch.func vmap": Contender(
        vmap_of_grad, "empirical Fisher", reference="fisher", layouts=EITHER_LAYOUT
    ),
    "BackPACK": Contender(
        backpack,
        "empirical Fisher (SumGradSquared)",
        package="backpack-for-pytorch",
        reference="fisher",
        layouts=EITHER_LAYOUT,
    ),
    "BackPACK DiagGGNMC": Contender(
        backpack_ggn, "GGN, one drawn label a sample", package="backpack-for-pytorch"
    ),
    "NNGeometry": Contender(
        nngeometry,
        "empirical Fisher (PMatDiag)",
        package="nngeometry",
        reference="fisher",
    ),
    "curvlinops": Contender(
        curvlinops,
        "empirical Fisher, Hutchinson with one probe",
        package="curvlinops-for-pytorch",
        reference="fisher",
        estimate=True,
        layouts=EITHER_LAYOUT,
    ),
}
