"""Gradient, Hessian and Gauss-Newton products of the mean cross-entropy over named parameters.

With the gradient g, Jacobians J_n of the logits and p_n = softmax(z_n)::

    Hv = ∂(gᵀv)/∂w                       (Pearlmutter 1994: two backwards a batch)
    Gv = 1/N Σ_n J_nᵀ (diag p_n − p_n p_nᵀ) J_n v             (Schraudolph 2002)

The tangent J_n v is ∂(vᵀJ_nᵀu)/∂u, a product that is linear in u: two backwards as well, and no
need of forward-mode derivatives, which not every operation has.

All sums are over samples, weighted by batch size, so ragged batches change nothing.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pai_utils.curvature.second_derivatives import fast_second_derivatives
from pai_utils.support.common import (
    NonFiniteError,
    at_least_single,
    check_names,
    device_of,
    progress,
    undisturbed,
)
from pai_utils.support.contract import check_labels, unwrapped
from pai_utils.support.sampling import (
    ALL,
    Draw,
    Samples,
    batches,
    fitting_batches,
    paired,
    share_of_work,
    sum_over_processes,
)

Vector = Mapping[str, Tensor]
"""One tensor a parameter name, of the parameter's shape."""


class Operator(Protocol):
    """A symmetric matrix over named parameters, known by its products."""

    @property
    def parameters(self) -> Vector:
        """The parameters it acts on, with their names, order, shapes, type and device."""

    def __call__(self, vector: Vector) -> dict[str, Tensor]:
        """The product with ``vector``."""


class CurvatureOperator(ABC):
    """Products with a curvature matrix of the mean cross-entropy, summed over batches.

    Computed in the model's own precision, also inside ``torch.autocast``, and summed at least in
    float32. Under ``torchrun`` each process takes its share of the samples. The model, images to
    logits ``[B, C]``, is evaluated in evaluation mode and left as it was; its weights must not
    change while the operator is used, nor the samples between readings.

    Graphs of up to ``memory`` bytes are kept for further products as long as the operator lives;
    other batches are run anew. When memory runs out batches are halved, and nothing is kept.

    Raises:
        ValueError: if a name is no parameter of the model or comes twice, a parameter has fewer
            digits than float32, or ``memory`` is negative; at the first product, if the loss is not
            finite or a label goes beyond the model's classes.
    """

    _differentiated: tuple[str, ...]
    _with_values = False  # whether the graphs hold the gradient's values
    bar: str | None = None
    """Name of a progress bar over batches; callers who take many products show one over these."""

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        data: Samples,
        draw: Draw = ALL,
        *,
        memory: int = 4 * 2**30,
    ) -> None:
        if memory < 0:
            raise ValueError(f"memory={memory}: the bytes to keep graphs in cannot be negative")
        model = unwrapped(model)
        self._originals = dict(model.named_parameters())
        _check_names(self._originals, names)
        self._versions = {name: p._version for name, p in self._originals.items()}
        self._values = {name: p.detach() for name, p in self._originals.items()}
        # The only leaves that ask for a gradient; storage is shared.
        self._weights = {name: self._values[name].detach().requires_grad_() for name in names}
        for name, weight in self._weights.items():
            if weight.dtype != at_least_single(weight):
                raise ValueError(
                    f"{name!r} is {weight.dtype}, in which second derivatives are mostly rounding; "
                    "take model.float()"
                )
        self._model, self._data = model, data
        drawn = draw.indices(data)
        self.count = len(drawn)  # samples that sums are means over
        self._indices = drawn[share_of_work(len(drawn))]
        self._batch_size, self._memory = draw.batch_size, memory
        self._kept: dict[int, _Graphs] = {}
        self.kept_bytes = 0  # of the graphs that are kept for further products
        self._losses: Tensor | None = None

    @property
    def parameters(self) -> Vector:
        """The parameters the operator acts on, in order."""
        return {name: weight.detach() for name, weight in self._weights.items()}

    def __call__(self, vector: Vector) -> dict[str, Tensor]:
        """The product with ``vector``: one tensor a name, at least in float32.

        Raises:
            ValueError: if a name or a shape of ``vector`` does not fit.
            RuntimeError: if weights, data or model changed between products.
        """
        parts = self._parts(vector)
        return self._sum(lambda graphs, keep: self._multiply(graphs, parts, keep), self._weights)

    @abstractmethod
    def _multiply(self, graphs: _Graphs, parts: list[Tensor], keep: bool) -> Iterable[Tensor]:
        """A batch's part of the product; ``keep`` what it takes for another one."""

    def _parts(self, vector: Vector) -> list[Tensor]:
        check_vector(vector, self._weights)
        return [vector[name].detach().to(weight) for name, weight in self._weights.items()]

    def _sum(
        self, part: Callable[[_Graphs, bool], Iterable[Tensor]], like: Vector
    ) -> dict[str, Tensor]:
        """Sums over all batches of ``part(graphs, whether they are needed again)``."""
        changed = [n for n, p in self._originals.items() if p._version != self._versions[n]]
        if changed:
            raise RuntimeError(
                f"the weights of {changed[0]!r} changed after the operator was made; make a new one"
            )

        def compute(batch_size: int) -> dict[str, Tensor]:
            if batch_size != self._batch_size:  # memory ran out
                self._batch_size, self._memory, self._losses = batch_size, 0, None
                self._kept, self.kept_bytes = {}, 0
            totals: list[Tensor] = []
            losses = []
            split = self._indices.split(batch_size) if len(self._indices) else ()
            for number, rows in enumerate(progress(split, self.bar) if self.bar else split):
                with torch.autocast(device_of(self._model).type, enabled=False):
                    graphs = self._kept.get(number) or self._build(number, rows)
                    found = part(graphs, number in self._kept)
                parts = [v.detach().to(at_least_single(v)) for v in found]
                # Not in place: autograd may hand out its own tensors, or the caller's.
                totals = [t + p for t, p in zip(totals, parts, strict=True)] if totals else parts
                losses.append(graphs.loss)
                del graphs, found, parts
            self._check_losses(losses)
            if not totals:  # fewer samples than processes
                totals = [v.new_zeros(v.shape, dtype=at_least_single(v)) for v in like.values()]
            return dict(zip(like, totals, strict=True))

        return sum_over_processes(fitting_batches(compute, self._batch_size))

    def _build(self, number: int, rows: Tensor) -> _Graphs:
        """Run a batch, and keep its graphs if they fit."""
        storages: dict[int, int] = {}  # bytes, by address

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            # Detached: a node that kept its own output with its history would never be freed.
            return tensor.detach()

        images, labels = next(batches(self._data, len(rows), device_of(self._model), rows))
        # The fused attention kernels have no second derivative; the plain one has.
        with (
            undisturbed(self._model),
            sdpa_kernel(SDPBackend.MATH),
            torch.enable_grad(),
            fast_second_derivatives(),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            inputs = list(self._weights.values())
            if self._with_values:  # which are not computed of the gradients of leaves
                inputs = [weight.view_as(weight) for weight in inputs]
            values = self._values | dict(zip(self._weights, inputs, strict=True))
            logits = functional_call(self._model, values, (paired(images),))
            if self._losses is None:
                check_labels(labels, logits.shape[1])
            share = len(rows) / self.count
            loss = share * F.cross_entropy(logits, paired(labels))
            graphs = _Graphs(loss.detach(), logits, paired(labels), share)
            if "gradient" in self._differentiated:
                graphs.gradient = gradients([loss], inputs, create_graph=True)
            if "tangent" in self._differentiated:
                graphs.u = torch.zeros_like(logits, requires_grad=True)
                graphs.pulled = gradients([logits], inputs, [graphs.u], create_graph=True)
        own = {p.untyped_storage().data_ptr() for p in self._originals.values()}
        size = sum(count for pointer, count in storages.items() if pointer not in own)
        if self.kept_bytes + size <= self._memory:
            self._kept[number] = graphs
            self.kept_bytes += size
        return graphs

    def _check_losses(self, found: list[Tensor]) -> None:
        """Compare with the first product's: costs nothing, and shows data that change."""
        losses = torch.stack(found) if found else torch.zeros(0)
        if self._losses is None:
            self._losses = losses
            if not torch.isfinite(losses).all():
                broken = [n for n, v in self._values.items() if not torch.isfinite(v).all()]
                raise NonFiniteError(
                    f"the loss is not finite: the weights of {broken[0]!r} are not finite"
                    if broken
                    else "the loss is not finite with finite weights; look for non-finite images"
                )
        elif not torch.allclose(losses, self._losses, rtol=1e-3, atol=0):
            raise RuntimeError(
                "the loss of the same samples changed between two products: the data or the model "
                "is random (augmentation, noise); make them deterministic"
            )


@dataclass
class _Graphs:
    """One batch's forward, and what of its first backwards an operator differentiates again."""

    loss: Tensor  #: its part of the mean loss
    logits: Tensor  #: [B, C]
    labels: Tensor  #: [B]
    share: float  #: of the batch in all samples
    gradient: Sequence[Tensor] = ()  #: of the loss, one a weight
    u: Tensor | None = None  #: [B, C]
    pulled: Sequence[Tensor] = ()  #: Jᵀu, linear in u, so that u may have any value

    def tangent(self, parts: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Jv less its mean under p, and the loss's Hessian at the logits times it, ``[B, C]``."""
        assert self.u is not None
        (tangent,) = gradients(self.pulled, [self.u], parts, keep=True)
        p = self.logits.detach().softmax(1)
        # Centred first: the difference of E t² and (E t)² loses digits when all logits move alike.
        centred = tangent - (p * tangent).sum(1, keepdim=True)
        return centred, p * centred * (self.share / len(p))


class HessianOperator(CurvatureOperator):
    """Hv, H the Hessian of the mean cross-entropy; arguments as in :class:`CurvatureOperator`.

    In units of one forward and backward pass the first product takes 3, for convolutions 8/3, each
    further one on kept graphs 2, also where :meth:`gradient`, which takes 1, was asked for before.

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

    _differentiated: tuple[str, ...] = ("gradient",)

    def gradient(self) -> dict[str, Tensor]:
        """Gradient of the mean loss, at least in float32; its graphs are kept for the products.

        Raises:
            RuntimeError: if weights, data or model changed since a product.
        """
        if not self._with_values:
            self._with_values, self._kept, self.kept_bytes = True, {}, 0
        return self._sum(lambda graphs, keep: graphs.gradient, self._weights)

    def _multiply(self, graphs: _Graphs, parts: list[Tensor], keep: bool) -> Sequence[Tensor]:
        return gradients(graphs.gradient, self._weights.values(), parts, keep=keep)


class GGNOperator(CurvatureOperator):
    """Gv, G the Gauss-Newton matrix of the mean cross-entropy.

    Arguments as in :class:`CurvatureOperator`. G is positive semi-definite, and the Fisher
    information of the model. Counted as in :class:`HessianOperator`, the first product takes 2
    to 7/3 forward and backward passes, each further one on kept graphs 4/3.
    """

    _differentiated = ("tangent",)

    def _multiply(self, graphs: _Graphs, parts: list[Tensor], keep: bool) -> Sequence[Tensor]:
        _, image = graphs.tangent(parts)
        return gradients([graphs.logits], self._weights.values(), [image], keep=keep)


class _Expansion(HessianOperator):
    """Both operators' graphs of a batch, from one forward."""

    _differentiated = ("gradient", "tangent")

    def terms(self, directions: Sequence[Vector]) -> Tensor:
        """Loss, gᵀv, vᵀHv and vᵀGv of each direction, ``[directions, 4]`` in float64."""
        vectors = [self._parts(direction) for direction in directions]

        def part(graphs: _Graphs, keep: bool) -> list[Tensor]:
            slopes = residual(graphs.logits.detach(), graphs.labels)
            slopes *= graphs.share / len(slopes)
            rows = []
            for parts in vectors:
                # The second graph hangs on parts of the first, so that this one stays for it.
                products = self._multiply(graphs, parts, True)
                tangent, image = graphs.tangent(parts)
                bends = [(a * b).sum() for a, b in zip(products, parts, strict=True)]
                slope, spread = (slopes * tangent).sum(), (image * tangent).sum()
                terms = (graphs.loss, slope, torch.stack(bends).sum(), spread)
                rows.append(torch.stack([term.double() for term in terms]))
            return [torch.stack(rows)]

        like = torch.zeros(len(vectors), 4, dtype=torch.float64, device=device_of(self._model))
        return self._sum(part, {"terms": like})["terms"]


@dataclass(frozen=True)
class DirectionalTerms:
    """Terms of the expansion of the mean loss along one direction v."""

    loss: float
    gradient: float  #: gᵀv
    hessian: float  #: vᵀHv
    ggn: float  #: vᵀGv, G the Gauss-Newton matrix
    count: int  #: samples the means are over


def directional_terms(
    model: nn.Module, directions: Sequence[Vector], data: Samples, draw: Draw = ALL
) -> list[DirectionalTerms]:
    """Loss, gᵀv, vᵀHv and vᵀGv of the mean cross-entropy at the model's parameters.

    Exact up to rounding for the samples drawn. ``directions`` are vectors v by parameter name, all
    of the same names. Costs about five forward and backward passes for one direction and two for
    each more, since all share what does not depend on them.

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
    # Each batch is looked at once, so that nothing need be kept.
    expansion = _Expansion(model, list(directions[0]), data, draw, memory=0)
    found = [
        DirectionalTerms(loss, gradient, hessian, ggn, expansion.count)
        for loss, gradient, hessian, ggn in expansion.terms(directions).tolist()
    ]
    for terms in found:
        if not all(map(math.isfinite, astuple(terms))):
            raise NonFiniteError(f"{terms}: look for non-finite weights, images or directions")
    return found


def gradients(
    outputs: Sequence[Tensor],
    inputs: Iterable[Tensor],
    vectors: Sequence[Tensor | None] = (None,),
    *,
    keep: bool = False,
    create_graph: bool = False,
) -> Sequence[Tensor]:
    """Σ_k (∂ outputs_k / ∂ inputs)ᵀ vectors_k; outputs without a graph are constants."""
    pairs = [(o, v) for o, v in zip(outputs, vectors, strict=True) if o.requires_grad]
    if not pairs:
        return [torch.zeros_like(value) for value in inputs]
    return torch.autograd.grad(
        [output for output, _ in pairs],
        list(inputs),
        [vector for _, vector in pairs],
        retain_graph=keep or create_graph,
        create_graph=create_graph,
        materialize_grads=True,
    )


def residual(logits: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the cross-entropy at the logits: p − e_y, ``[B, C]``."""
    classes = torch.arange(logits.shape[1], device=logits.device)
    return logits.softmax(1) - (labels[:, None] == classes).to(logits.dtype)


def _check_names(parameters: Vector, names: Sequence[str]) -> None:
    if not names:
        raise ValueError("no parameter is named; at least one is needed")
    check_names("parameter", names, parameters)
    for name in names:
        if list(names).count(name) > 1:
            raise ValueError(f"parameter {name!r} is named twice")


def check_vector(vector: Vector, parameters: Vector) -> None:
    """Refuse a vector whose names or shapes are not those of the parameters."""
    for name, weight in parameters.items():
        if name not in vector:
            raise ValueError(f"the vector lacks {name!r}; it needs all of the operator's names")
        if vector[name].shape != weight.shape:
            raise ValueError(
                f"the vector has shape {tuple(vector[name].shape)} for {name!r}, "
                f"which is {tuple(weight.shape)}"
            )
    check_names("parameter", vector, parameters)


def check_directions(model: nn.Module, directions: Sequence[Vector]) -> None:
    """Refuse directions that do not all fit the same parameters of the model."""
    if not directions:
        raise ValueError("at least one direction is needed")
    parameters = dict(unwrapped(model).named_parameters())
    _check_names(parameters, list(directions[0]))
    for direction in directions:
        check_vector(direction, {name: parameters[name] for name in directions[0]})


def inner_product(left: Vector, right: Vector) -> Tensor:
    """Inner product over all names, in float64."""
    return torch.stack([(left[name].double() * right[name].double()).sum() for name in left]).sum()


def dense_matrix(operator: Operator) -> Tensor:
    """All entries ``[m, m]`` of a matrix of a handful of weights, from m products.

    Rows and columns are in the order of the operator's flattened parameters.
    """
    flat = torch.cat([values.flatten() for values in operator.parameters.values()])
    units = torch.eye(len(flat), dtype=flat.dtype, device=flat.device)
    return torch.stack([flat_product(operator, unit) for unit in units], 1)


def flat_product(operator: Operator, flat: Tensor) -> Tensor:
    """The product with a vector ``[P]``, the operator's parameters one after the other."""
    product = operator(split_vector(flat, operator.parameters))
    return torch.cat([product[name].flatten() for name in operator.parameters])


def split_vector(flat: Tensor, parameters: Vector) -> dict[str, Tensor]:
    """The parts ``[..., *shape]`` of the parameters in vectors ``[..., P]``."""
    parts = flat.split([values.numel() for values in parameters.values()], -1)
    return {
        name: part.reshape(*flat.shape[:-1], *values.shape)
        for part, (name, values) in zip(parts, parameters.items(), strict=True)
    }
