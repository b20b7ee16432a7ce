"""Gradient, Hessian and Gauss-Newton products of the mean cross-entropy over named parameters.

With the gradient g, Jacobians J_n of the logits and p_n = softmax(z_n)::

    Hv = ∂(gᵀv)/∂w                       (Pearlmutter 1994: two backwards a batch)
    vᵀGv = 1/N Σ_n (J_n v)ᵀ (diag p_n − p_n p_nᵀ) (J_n v)     (Schraudolph 2002)

The tangent J_n v is ∂(vᵀJ_nᵀu)/∂u, a product that is linear in u: two backwards as well, and no
need of forward-mode derivatives, which not every operation has.

All sums are over samples, weighted by batch size, so ragged batches change nothing.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pai_utils.curvature.labels import residual
from pai_utils.curvature.second_derivatives import FastSecondDerivatives
from pai_utils.support.common import NonFiniteError, device_of, progress, undisturbed, unknown_name
from pai_utils.support.sampling import (
    ALL,
    Draw,
    Samples,
    batches,
    check_labels,
    fitting_batches,
    paired,
    share_of_work,
    sum_over_processes,
    sum_over_processes_,
)

GRAPH_MEMORY = 4 * 2**30
"""Bytes that graphs kept between products may hold, unless told otherwise."""


class Operator(Protocol):
    """A symmetric matrix over named parameters, known by its products."""

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The parameters it acts on, with their names, order, shapes, type and device."""

    def __call__(self, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The product with ``vector``, one tensor a parameter name."""


class _Graph(Protocol):
    """What is kept of one batch: its loss, and how it multiplies."""

    @property
    def loss(self) -> Tensor: ...

    def multiply(self, vectors: list[Tensor], *, keep: bool) -> tuple[Tensor, ...]: ...


class CurvatureOperator(ABC):
    """Products with a curvature matrix of the mean cross-entropy, summed over batches.

    Computed in the model's own precision, also inside ``torch.autocast``: differences of gradients
    keep few digits in half precision. Sums are at least in float32. Under ``torchrun`` each
    process takes its share of the samples and all get the same product.

    The graph of a batch's forward and first backward is kept for the next products as long as all
    that is kept stays within ``memory``; the other batches are run anew at each product, with the
    same result. What is kept lives as long as the operator.

    Args:
        model: images to logits ``[B, C]``; evaluated in evaluation mode. Between and after
            products it is as it was; its weights must not change while the operator is used.
        names: the parameters to take.
        data: labelled samples, the same at each reading.
        draw: the samples to take. The product does not depend on the batches beyond rounding; when
            memory runs out they are halved and nothing is kept any more.
        memory: bytes that graphs kept between products may hold; 0 keeps none.

    Raises:
        ValueError: if a name is no parameter of the model or comes twice, or ``memory``
            is negative; at the first product, if the loss is not finite or a label
            goes beyond the model's classes.
    """

    bar: str | None = None
    """Name of a progress bar over batches; callers who take many products show one over these."""

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        data: Samples,
        draw: Draw = ALL,
        *,
        memory: int = GRAPH_MEMORY,
    ) -> None:
        if memory < 0:
            raise ValueError(f"memory={memory}: the bytes to keep graphs in cannot be negative")
        self._originals = dict(model.named_parameters())
        _check_names(self._originals, names)
        self._versions = {name: p._version for name, p in self._originals.items()}
        self._values = {name: p.detach() for name, p in self._originals.items()}
        for name in names:
            # Detached once more, since only these leaves ask for a gradient; storage is shared.
            self._values[name] = self._values[name].detach().requires_grad_()
        self._weights = [self._values[name] for name in names]
        self._names = list(names)
        self._model = model
        self._data = data
        drawn = draw.indices(data)
        self._count = len(drawn)
        self._indices = drawn[share_of_work(len(drawn))]
        self._batch_size = draw.batch_size
        self._memory = memory
        self._kept: dict[int, _Graph] = {}
        self._kept_bytes = 0
        self._losses: Tensor | None = None

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The parameters the operator acts on, in order."""
        return {name: self._originals[name].detach() for name in self._names}

    @property
    def kept_bytes(self) -> int:
        """Bytes of the graphs that are kept for further products."""
        return self._kept_bytes

    def __call__(self, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The product with ``vector``.

        Args:
            vector: one tensor a name of the operator, of the parameter's shape.

        Returns:
            One tensor a name, of the parameter's shape, at least in float32.

        Raises:
            ValueError: if a name or a shape of ``vector`` does not fit.
            RuntimeError: if weights, data or model changed between products.
        """
        self._check_vector(vector)
        vectors = [
            vector[name].detach().to(weight)
            for name, weight in zip(self._names, self._weights, strict=True)
        ]
        return self._sum(lambda graph, keep: graph.multiply(vectors, keep=keep))

    def _sum(self, part: Callable[[Any, bool], Iterable[Tensor]]) -> dict[str, Tensor]:
        """Σ over all batches of ``part(graph, whether the graph is needed again)``."""
        changed = [n for n, p in self._originals.items() if p._version != self._versions[n]]
        if changed:
            raise RuntimeError(
                f"the weights of {changed[0]!r} changed after the operator was made; make a new one"
            )
        totals = fitting_batches(lambda size: self._sum_in_batches(part, size), self._batch_size)
        return sum_over_processes(dict(zip(self._names, totals, strict=True)))

    @abstractmethod
    def _graph(
        self,
        logits: Tensor,
        inputs: list[Tensor],
        labels: Tensor,
        share: float,
        layers: FastSecondDerivatives,
    ) -> _Graph:
        """The graph from ``inputs``, the weights, of a batch with ``share`` of all samples."""

    def _sum_in_batches(
        self, part: Callable[[Any, bool], Iterable[Tensor]], batch_size: int
    ) -> list[Tensor]:
        if batch_size != self._batch_size:  # memory ran out
            self._batch_size, self._memory = batch_size, 0
            self._losses = None
            self._drop()
        if not len(self._indices):  # fewer samples than processes
            return [torch.zeros_like(w, dtype=_accumulator(w.dtype)) for w in self._weights]
        totals: list[Tensor] = []
        losses = []
        split = self._indices.split(batch_size)
        loop = split if self.bar is None else progress(split, self.bar)
        for number, rows in enumerate(loop):
            with _own_precision(self._model):
                graph = self._kept.get(number) or self._build(number, rows)
                found = part(graph, number in self._kept)
            parts = [value.detach().to(_accumulator(value.dtype)) for value in found]
            # Not in place: autograd may hand out its own tensors, or the caller's.
            totals = [t + p for t, p in zip(totals, parts, strict=True)] if totals else parts
            losses.append(graph.loss)
            del graph, found, parts
        self._check_losses(torch.stack(losses))
        return totals

    def _inputs(self) -> list[Tensor]:
        """The weights that a graph is made with."""
        return self._weights

    def _drop(self) -> None:
        self._kept, self._kept_bytes = {}, 0

    def _build(self, number: int, rows: Tensor) -> _Graph:
        """Run a batch, and keep its graph if it fits."""
        images, labels = next(batches(self._data, len(rows), device_of(self._model), rows))
        share = len(rows) / self._count
        # The fused attention kernels have no second derivative; the plain one has.
        with (
            undisturbed(self._model),
            sdpa_kernel(SDPBackend.MATH),
            torch.enable_grad(),
            FastSecondDerivatives() as layers,
            _saved_storages() as storages,
        ):
            inputs = self._inputs()
            values = self._values | dict(zip(self._names, inputs, strict=True))
            logits = functional_call(self._model, values, (paired(images),))
            if number not in self._kept and self._losses is None:
                check_labels(labels, logits.shape[1])
            graph = self._graph(logits, inputs, paired(labels), share, layers)
        own = {p.untyped_storage().data_ptr() for p in self._originals.values()}
        size = sum(count for pointer, count in storages.items() if pointer not in own)
        if self._kept_bytes + size <= self._memory:
            self._kept[number] = graph
            self._kept_bytes += size
        return graph

    def _check_losses(self, losses: Tensor) -> None:
        """Compare with the first product's: costs nothing, and shows data that change."""
        if self._losses is None:
            self._losses = losses
            if not torch.isfinite(losses).all():
                broken = _first_non_finite(self._values)
                raise NonFiniteError(
                    "the loss is not finite: "
                    + (
                        f"the weights of {broken!r} are not finite"
                        if broken
                        else "the weights are finite, so look for non-finite images"
                    )
                )
        elif not torch.allclose(losses, self._losses, rtol=1e-3, atol=0):
            raise RuntimeError(
                "the loss of the same samples changed between two products: the data or the model "
                "is random (augmentation, noise); make them deterministic"
            )

    def _check_vector(self, vector: Mapping[str, Tensor]) -> None:
        for name, weight in zip(self._names, self._weights, strict=True):
            if name not in vector:
                raise ValueError(f"the vector lacks {name!r}; it needs all of the operator's names")
            if vector[name].shape != weight.shape:
                raise ValueError(
                    f"the vector has shape {tuple(vector[name].shape)} for {name!r}, "
                    f"which is {tuple(weight.shape)}"
                )
        unknown = [name for name in vector if name not in self._names]
        if unknown:
            raise unknown_name("parameter", unknown[0], self._names)


class HessianOperator(CurvatureOperator):
    """Hv, H the Hessian of the mean cross-entropy; arguments as in :class:`CurvatureOperator`.

    In units of one forward and backward pass, counting products of matrices: the first product
    takes 8/3 (1/3 for the forward, 1/3 for the gradient without its weights' part, 2 for the
    backward through both), each further one on kept graphs 2. Where :meth:`gradient` was asked
    for before, which takes 1, so does every product on the graphs it left.

    Examples:
        >>> import torch
        >>> from pai_utils.curvature.products import HessianOperator
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 2, bias=False))
        >>> model[1].weight.data = torch.tensor([[1.0, -1.0, 0.5], [0.0, 1.0, -0.5]])
        >>> images = torch.eye(3).view(3, 3, 1, 1)  # three images of one pixel
        >>> data = torch.utils.data.TensorDataset(images, torch.tensor([0, 1, 0]))
        >>> hessian = HessianOperator(model, ["1.weight"], data)
        >>> hessian({"1.weight": torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])})["1.weight"]
        tensor([[ 0.0655,  0.0350,  0.0655],
                [-0.0655, -0.0350, -0.0655]])
    """

    _with_values = False  # whether the graphs hold the gradient's values

    def gradient(self) -> dict[str, Tensor]:
        """Gradient of the mean cross-entropy; its graphs are kept for the products.

        Returns:
            One tensor a name, of the parameter's shape, at least in float32.

        Raises:
            RuntimeError: if weights, data or model changed since a product.
        """
        if not self._with_values:
            self._with_values = True
            self._drop()
        return self._sum(lambda graph, keep: graph.gradients)

    def _inputs(self) -> list[Tensor]:
        # Of a leaf's gradient the fast layers would not compute the value.
        return [w.view_as(w) for w in self._weights] if self._with_values else self._weights

    def _graph(
        self,
        logits: Tensor,
        inputs: list[Tensor],
        labels: Tensor,
        share: float,
        layers: FastSecondDerivatives,
    ) -> _HessianGraph:
        loss = share * F.cross_entropy(logits, labels)
        gradients = _gradients(loss, inputs, create_graph=True)
        return _HessianGraph(loss.detach(), self._weights, gradients)


class GGNOperator(CurvatureOperator):
    """Gv, G the Gauss-Newton matrix of the mean cross-entropy.

    Arguments as in :class:`CurvatureOperator`. G is positive semi-definite, and the Fisher
    information of the model. Counted as in :class:`HessianOperator`, the first product takes 2
    forward and backward passes, each further one on kept graphs 4/3.
    """

    def _graph(
        self,
        logits: Tensor,
        inputs: list[Tensor],
        labels: Tensor,
        share: float,
        layers: FastSecondDerivatives,
    ) -> _Graph:
        loss = share * F.cross_entropy(logits.detach(), labels)
        # Jᵀu is linear in u: its derivative does not depend on where it is taken.
        cotangent = torch.zeros_like(logits, requires_grad=True)
        pulled = _gradients(logits, inputs, cotangent, create_graph=True)
        share /= len(labels)
        return _GGNGraph(loss, self._weights, logits, cotangent, pulled, share, layers)


@dataclass(frozen=True)
class _HessianGraph:
    loss: Tensor
    weights: list[Tensor]
    gradients: tuple[Tensor, ...]

    def multiply(self, vectors: list[Tensor], *, keep: bool) -> tuple[Tensor, ...]:
        return _backward(self.gradients, self.weights, vectors, keep=keep)


@dataclass(frozen=True)
class _GGNGraph:
    loss: Tensor
    weights: list[Tensor]
    logits: Tensor  # [B, C]
    cotangent: Tensor  # u [B, C]
    pulled: tuple[Tensor, ...]  # Jᵀu, one a weight
    share: float  # of one sample in the mean
    layers: FastSecondDerivatives

    def multiply(self, vectors: list[Tensor], *, keep: bool) -> tuple[Tensor, ...]:
        with self.layers.only_linear():
            (tangent,) = _backward(self.pulled, [self.cotangent], vectors, keep=True)
        p = self.logits.detach().softmax(1)
        image = p * (tangent - (p * tangent).sum(1, keepdim=True)) * self.share
        return _backward((self.logits,), self.weights, [image], keep=keep)


def _backward(
    outputs: Sequence[Tensor], inputs: list[Tensor], vectors: list[Tensor], *, keep: bool
) -> tuple[Tensor, ...]:
    """Σ_k (∂ outputs_k / ∂ inputs)ᵀ vectors_k; outputs without a graph are constants."""
    pairs = [(o, v) for o, v in zip(outputs, vectors, strict=True) if o.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(value) for value in inputs)
    return torch.autograd.grad(
        [output for output, _ in pairs],
        inputs,
        [vector for _, vector in pairs],
        retain_graph=keep,
        allow_unused=True,
        materialize_grads=True,
    )


def _own_precision(model: nn.Module) -> torch.autocast:
    return torch.autocast(device_of(model).type, enabled=False)


@contextmanager
def _saved_storages() -> Iterator[dict[int, int]]:
    """Sizes in bytes, by address, of the storages that graphs made inside keep."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        # Detached: a node that kept its own output with its history would never be freed.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _first_non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    return next((n for n, values in tensors.items() if not torch.isfinite(values).all()), None)


def _check_names(parameters: Mapping[str, Tensor], names: Sequence[str]) -> None:
    if not names:
        raise ValueError("no parameter is named; at least one is needed")
    for name in names:
        if name not in parameters:
            raise unknown_name("parameter", name, parameters)
    twice = [name for name in names if list(names).count(name) > 1]
    if twice:
        raise ValueError(f"parameter {twice[0]!r} is named twice")


@dataclass(frozen=True)
class DirectionalTerms:
    """Terms of the expansion of the mean loss along one direction v."""

    loss: float
    gradient: float  #: gᵀv
    hessian: float  #: vᵀHv
    ggn: float  #: vᵀGv, G the Gauss-Newton matrix
    count: int  #: samples the means are over


def directional_terms(
    model: nn.Module,
    directions: Sequence[Mapping[str, Tensor]],
    data: Samples,
    draw: Draw = ALL,
) -> list[DirectionalTerms]:
    """Loss, gᵀv, vᵀHv and vᵀGv of the mean cross-entropy at the model's parameters.

    Exact up to rounding for the samples drawn. Costs about five forward and backward passes for
    one direction and two for each more, since all share what does not depend on them.

    Args:
        model: images to logits; evaluated in evaluation mode, left as it was.
        directions: each a v, one tensor a parameter name, of the parameter's shape; all of the
            same names.
        data: labelled samples.
        draw: the samples to take.

    Returns:
        The terms of each direction, in their order.

    Raises:
        ValueError: if there is no direction, a name or shape does not fit the model or the other
            directions, a label goes beyond the model's classes, or a term is not finite.

    Examples:
        >>> import torch
        >>> from pai_utils.curvature.products import directional_terms
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 2, bias=False))
        >>> model[1].weight.data = torch.zeros(2, 3)
        >>> images = torch.eye(3).view(3, 3, 1, 1)  # three images of one pixel
        >>> data = torch.utils.data.TensorDataset(images, torch.tensor([0, 1, 0]))
        >>> v = {"1.weight": torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]])}
        >>> (terms,) = directional_terms(model, [v], data)
        >>> f"{terms.loss:.3f} {terms.gradient:.3f} {terms.hessian:.3f} {terms.ggn:.3f}"
        '0.693 -0.333 1.000 1.000'
    """
    check_directions(model, directions)
    indices = draw.indices(data)
    share = indices[share_of_work(len(indices))]

    def compute(size: int) -> Tensor:
        total = torch.zeros(len(directions), 4, dtype=torch.float64, device=device_of(model))
        if not len(share):  # fewer samples than processes
            return total
        for images, labels in batches(data, size, device_of(model), share):
            terms = _batch_terms(model, directions, paired(images), paired(labels))
            total += terms / len(paired(images)) * len(images)
        return total

    # The fused attention kernels have no second derivative; the plain one has.
    with undisturbed(model), sdpa_kernel(SDPBackend.MATH), _own_precision(model):
        total = fitting_batches(compute, draw.batch_size)
    sum_over_processes_(total)
    found = [
        DirectionalTerms(loss, gradient, hessian, ggn, len(indices))
        for loss, gradient, hessian, ggn in (total / len(indices)).tolist()
    ]
    for terms in found:
        if not all(map(math.isfinite, (terms.loss, terms.gradient, terms.hessian, terms.ggn))):
            raise NonFiniteError(f"{terms}: look for non-finite weights, images or directions")
    return found


def check_directions(model: nn.Module, directions: Sequence[Mapping[str, Tensor]]) -> None:
    """Refuse directions that do not fit the model's parameters.

    Raises:
        ValueError: if there are none or one is empty, a name or shape is none of the model's, or
            they do not all have the same names.
    """
    if not directions:
        raise ValueError("at least one direction is needed")
    parameters = dict(model.named_parameters())
    for direction in directions:
        if not direction:
            raise ValueError("the direction names no parameter")
        for name, value in direction.items():
            if name not in parameters or parameters[name].shape != value.shape:
                raise ValueError(
                    f"direction {name!r} {tuple(value.shape)} is no parameter of the model"
                )
        if different := set(direction) ^ set(directions[0]):
            raise ValueError(f"only some of the directions have {min(different)!r}")


def _batch_terms(
    model: nn.Module, directions: Sequence[Mapping[str, Tensor]], images: Tensor, labels: Tensor
) -> Tensor:
    """Sums over the batch of loss, gᵀv, vᵀHv and vᵀGv, ``[directions, 4]`` in float64."""
    # Others are detached as well: no gradient is formed that nobody asks for.
    values = {name: p.detach() for name, p in model.named_parameters()}
    weights = {name: values[name].requires_grad_() for name in directions[0]}
    leaves = list(weights.values())
    with torch.enable_grad(), FastSecondDerivatives() as layers:
        logits = functional_call(model, values, (images,))
        check_labels(labels, logits.shape[1])
        loss = F.cross_entropy(logits, labels, reduction="sum")
        gradients = _gradients(loss, leaves, create_graph=True)
        along = torch.zeros_like(logits, requires_grad=True)
        pulled = _gradients(logits, leaves, along, create_graph=True)
    p = logits.detach().softmax(1)
    slopes = residual(logits.detach(), labels)
    terms: list[Tensor] = []
    for direction in directions:
        vectors = [direction[name] for name in weights]
        keep = len(terms) + 1 < len(directions)
        # The second graph hangs on parts of the first, so that this one stays for it.
        products = _backward(gradients, leaves, vectors, keep=True)
        with layers.only_linear():
            (tangent,) = _backward(pulled, [along], vectors, keep=keep)
        # Centred first: the difference of E t² and (E t)² loses digits when all logits move alike.
        centred = tangent - (p * tangent).sum(1, keepdim=True)
        spread = (p * centred.square()).sum()
        slope = (slopes * tangent).sum()
        bend = torch.stack([(a * b).sum() for a, b in zip(products, vectors, strict=True)]).sum()
        terms.append(torch.stack([t.double() for t in (loss.detach(), slope, bend, spread)]))
    return torch.stack(terms)


def _gradients(
    value: Tensor,
    weights: list[Tensor],
    cotangent: Tensor | None = None,
    *,
    create_graph: bool = False,
) -> tuple[Tensor, ...]:
    """Gradients of ``value`` against ``cotangent``, zero for weights it does not depend on."""
    if not value.requires_grad:
        return tuple(torch.zeros_like(weight) for weight in weights)
    return torch.autograd.grad(
        value,
        weights,
        cotangent,
        retain_graph=True,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )


def inner_product(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> Tensor:
    """Inner product over all names, in float64."""
    return torch.stack([(left[name].double() * right[name].double()).sum() for name in left]).sum()


def dense_matrix(operator: Operator) -> Tensor:
    """All entries of a matrix that is known by its products, for a handful of weights.

    Args:
        operator: of m weights in all; it is asked for m products.

    Returns:
        ``[m, m]``, rows and columns in the order of the operator's flattened parameters.
    """
    parameters = operator.parameters
    sizes = [value.numel() for value in parameters.values()]
    like = next(iter(parameters.values()))
    columns = []
    for unit in torch.eye(sum(sizes), dtype=like.dtype, device=like.device):
        vector = {
            name: part.view(value.shape)
            for part, (name, value) in zip(unit.split(sizes), parameters.items(), strict=True)
        }
        product = operator(vector)
        columns.append(torch.cat([product[name].flatten() for name in parameters]))
    return torch.stack(columns, 1)
