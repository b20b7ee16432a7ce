"""Diagonals of Fisher and generalised Gauss-Newton matrices of the mean cross-entropy.

With logits z_n = f(x_n), Jacobian J_n = ∂z_n/∂w and p_n = softmax(z_n)::

    empirical Fisher   diag = 1/N Σ_n (J_nᵀ (p_n − e_{y_n}))²            y_n: the true label
    GGN                diag = 1/N Σ_n diag(J_nᵀ (diag p_n − p_n p_nᵀ) J_n)

For cross-entropy the GGN is the Fisher information: its diagonal is the expectation of the first
line with labels drawn from p_n (Monte Carlo), or the sum over classes of (J_nᵀ s_c)² with
s_c = √p_c (e_c − p) (exact). The vectors before which Jᵀ stands are the cotangents.

Sources: Martens (2020), "New insights and perspectives on the natural gradient method";
Kunstner et al. (2019), "Limitations of the empirical Fisher approximation"; Dangel et al. (2020),
"BackPACK".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pai_utils.curvature.persample import Batch, Cotangents, drawn_batches, sum_squared_gradients
from pai_utils.curvature.products import gradients, residual
from pai_utils.support.common import check_names, device_of, undisturbed
from pai_utils.support.contract import check_labels, unwrapped
from pai_utils.support.sampling import (
    ALL,
    Draw,
    Samples,
    fitting_batches,
    paired,
    sum_over_processes,
)


def fisher_diagonal(
    model: nn.Module, names: Sequence[str], data: Samples, draw: Draw = ALL
) -> dict[str, Tensor]:
    """Diagonal of the empirical Fisher matrix: the mean squared per-sample gradient.

    ``names`` are those of parameters of the model, which is evaluated in evaluation mode and left
    as it was. One tensor a name, of the parameter's shape, without any error beyond the draw's.

    Raises:
        ValueError: if a label goes beyond the model's classes.

    Examples:
        >>> import torch
        >>> from pai_utils.curvature.diagonals import fisher_diagonal
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 2, bias=False))
        >>> model[1].weight.data = torch.tensor([[1.0, -1.0, 0.5], [0.0, 1.0, -0.5]])
        >>> images = torch.eye(3).view(3, 3, 1, 1)  # three images of one pixel
        >>> data = torch.utils.data.TensorDataset(images, torch.tensor([0, 1, 0]))
        >>> fisher_diagonal(model, ["1.weight"], data)["1.weight"]
        tensor([[0.0241, 0.0047, 0.0241],
                [0.0241, 0.0047, 0.0241]])
    """
    return _mean_squares(model, names, data, draw, true_labels)


def ggn_diagonal(
    model: nn.Module,
    names: Sequence[str],
    data: Samples,
    draw: Draw = ALL,
    *,
    estimator: str = "mc",
    draws: int = 1,
) -> dict[str, Tensor]:
    """Diagonal of the generalised Gauss-Newton matrix of the mean cross-entropy.

    Arguments and result as in :func:`fisher_diagonal`, but that labels are not used: the draw's
    seed also draws ``draws`` labels a sample, whatever the batches. With ``estimator="mc"`` these
    give an unbiased estimate, one backward a draw, of a relative variance proportional to
    1/(samples · draws), and larger the surer the model is. ``"exact"`` costs one backward a class
    and has no error. ``"batch"`` squares the gradient of a whole batch, in which cross terms of
    independent labels vanish in expectation: unbiased and no dearer than training, but its relative
    variance is of order 1/(batches · draws), and it depends on the batches.

    Raises:
        ValueError: if ``estimator`` is unknown or ``draws`` is below one.

    Examples:
        >>> import torch
        >>> from pai_utils.curvature.diagonals import ggn_diagonal
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 2, bias=False))
        >>> model[1].weight.data = torch.tensor([[1.0, -1.0, 0.5], [0.0, 1.0, -0.5]])
        >>> images = torch.eye(3).view(3, 3, 1, 1)  # three images of one pixel
        >>> data = torch.utils.data.TensorDataset(images, torch.tensor([0, 1, 0]))
        >>> ggn_diagonal(model, ["1.weight"], data, estimator="exact")["1.weight"]
        tensor([[0.0655, 0.0350, 0.0655],
                [0.0655, 0.0350, 0.0655]])
    """
    check_names("estimator", [estimator], ("mc", "exact", "batch"))
    exact, count = estimator == "exact", len(draw.indices(data))
    cotangents = _factor_columns if exact else DrawnLabels(count, draws, draw.seed)
    sums = _sum_squared_batch_gradients if estimator == "batch" else sum_squared_gradients
    return _mean_squares(model, names, data, draw, cotangents, sums)


def output_diagonal(
    model: nn.Module,
    names: Sequence[str],
    data: Samples,
    draw: Draw = ALL,
    *,
    estimator: str = "mc",
    draws: int = 1,
) -> dict[str, Tensor]:
    """Diagonal of 1/N Σ JᵀJ, the Gauss-Newton matrix of half the outputs' mean squared change.

    At the present weights this is the diagonal of the Hessian of 1/N Σ ½‖f(x; w) − f(x; w₀)‖².
    Summed over all weights it is the mean trace of the neural tangent kernel. Arguments, result and
    errors as in :func:`ggn_diagonal`, for a model of images to any outputs ``[B, D]``: ``"mc"``
    takes E[(Jᵀv)²] over ``draws`` vectors v of random signs a sample, ``"exact"`` one backward an
    output.
    """
    check_names("estimator", [estimator], ("mc", "exact"))
    exact, count = estimator == "exact", len(draw.indices(data))
    cotangents = _unit_columns if exact else _RandomSigns(count, draws, draw.seed)
    return _mean_squares(model, names, data, draw, cotangents)


def is_piecewise_linear(model: nn.Module, names: Sequence[str], images: Tensor) -> bool:
    """Whether the outputs have no second derivative in any one of the named weight tensors.

    Then the diagonal of the Hessian is that of the Gauss-Newton matrix. Looked for on these images,
    along one direction of each tensor; functions that bend (GELU, LayerNorm, the gates of
    squeeze-and-excitation) and weights used twice show there.
    """
    with undisturbed(model), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        model.requires_grad_(False)
        weights = [model.get_parameter(name).requires_grad_() for name in names]
        outputs = model(paired(images))[: len(images)]
        slopes = gradients([outputs], weights, [_uneven(outputs)], create_graph=True)
        for weight, slope in zip(weights, slopes, strict=True):
            (second,) = gradients([slope], [weight], [_uneven(slope)], keep=True)
            if second.any():
                return False
    return True


def _uneven(like: Tensor) -> Tensor:
    return torch.linspace(1, 2, like.numel()).to(like).view_as(like)


def _sum_squared_batch_gradients(
    model: nn.Module, names: Sequence[str], batches: Iterable[Batch], cotangents: Cotangents
) -> dict[str, Tensor]:
    """Σ over batches b and cotangents v of (Σ_{n in b} J_nᵀ v_n)²."""
    model.requires_grad_(False)
    weights = {name: model.get_parameter(name).requires_grad_() for name in names}
    totals = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for images, labels, rows in batches:
        with torch.enable_grad():
            logits = model(paired(images))[: len(images)]
        for cotangent in cotangents(logits.detach(), labels, rows):
            parts = gradients([logits], weights.values(), [cotangent], keep=True)
            for total, part in zip(totals.values(), parts, strict=True):
                total.addcmul_(part, part)
    return totals


def true_labels(logits: Tensor, labels: Tensor, rows: Tensor) -> Iterator[Tensor]:
    """The one cotangent ``[B, C]`` of the data's labels, refused beyond the model's classes."""
    check_labels(labels, logits.shape[1])
    yield residual(logits, labels)


class DrawnLabels:
    """Cotangents ``[B, C]`` of ``draws`` labels a sample from the model, each over √draws."""

    def __init__(self, samples: int, draws: int, seed: int) -> None:
        _check_draws(draws)
        # Drawn for all samples beforehand, so that a sample's labels do not depend on the batches.
        generator = torch.Generator().manual_seed(seed)
        self._uniform = torch.rand(samples, draws, generator=generator, dtype=torch.float64)

    def __call__(self, logits: Tensor, labels: Tensor, rows: Tensor) -> Iterator[Tensor]:
        """One cotangent a draw; ``rows`` say which samples these are."""
        cumulative = logits.double().softmax(1).cumsum(1)
        thresholds = self._uniform[rows.cpu()].to(logits.device)
        drawn = torch.searchsorted(cumulative, thresholds).clamp_max(logits.shape[1] - 1)
        for column in drawn.unbind(1):
            yield residual(logits, column) / self._uniform.shape[1] ** 0.5


def _check_draws(draws: int) -> None:
    if draws < 1:
        raise ValueError(f"draws={draws}: at least one a sample is needed")


def _factor_columns(logits: Tensor, _labels: Tensor, _rows: Tensor) -> Iterator[Tensor]:
    """The columns s_c = √p_c (e_c − p) of a factor of the cross-entropy's Hessian."""
    probabilities = logits.softmax(1)
    for c in range(logits.shape[1]):
        column = -probabilities
        column[:, c] += 1
        yield column * probabilities[:, c : c + 1].sqrt()


def _unit_columns(outputs: Tensor, _labels: Tensor, _rows: Tensor) -> Iterator[Tensor]:
    """The columns of the identity, for each sample."""
    for column in torch.eye(outputs.shape[1]).to(outputs):
        yield column.expand_as(outputs)


class _RandomSigns:
    """Cotangents ``[B, D]`` of ``draws`` vectors of random signs a sample, each over √draws."""

    def __init__(self, samples: int, draws: int, seed: int) -> None:
        _check_draws(draws)
        self._shape = (draws, samples)
        self._seed = seed
        self._positive = torch.empty(0, dtype=torch.bool)

    def __call__(self, outputs: Tensor, labels: Tensor, rows: Tensor) -> Iterator[Tensor]:
        size = (*self._shape, outputs.shape[1])
        if self._positive.shape != size:
            # For all samples at once, so that a sample's signs do not depend on the batches.
            generator = torch.Generator().manual_seed(self._seed)
            self._positive = torch.randint(2, size, generator=generator, dtype=torch.bool)
        for positive in self._positive[:, rows.cpu()].to(outputs.device):
            yield torch.where(positive, 1.0, -1.0).to(outputs) / self._shape[0] ** 0.5


def _mean_squares(
    model: nn.Module,
    names: Sequence[str],
    data: Samples,
    draw: Draw,
    cotangents: Cotangents,
    sums: Callable[..., dict[str, Tensor]] = sum_squared_gradients,
) -> dict[str, Tensor]:
    """Mean over the samples; under ``torchrun`` each process takes its share of them."""
    model = unwrapped(model)
    device, indices = device_of(model), draw.indices(data)

    def compute(size: int) -> dict[str, Tensor]:
        drawn = drawn_batches(data, indices, size, device, "curvature diagonal")
        return sums(model, names, drawn, cotangents)

    with undisturbed(model):
        totals = sum_over_processes(fitting_batches(compute, draw.batch_size))
    return {name: total / len(indices) for name, total in totals.items()}
