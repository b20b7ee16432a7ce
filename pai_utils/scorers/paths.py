"""Scores from sums over the paths of a network: ``synflow`` and ``px``.

What a path is, also through attention, gates and normalisation, says
:mod:`pai_utils.scorers.linearised`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from pai_utils.scorers.linearised import PathNetwork, Recorder
from pai_utils.support.common import device_of, progress, undisturbed, unknown_name
from pai_utils.support.sampling import (
    Samples,
    batches,
    draw_samples,
    fitting_batches,
    share_of_work,
    sum_over_processes,
)

ESTIMATORS = ("bound", "gated")

# Flow grows by orders of magnitude a layer: it starts low, so that deep networks do not overflow.
# All scores have the same factor, which goes when they are divided by the whole.
_FLOW = 2.0**-300
_COUNT = 2.0**-900


def synflow(
    model: nn.Module,
    names: Sequence[str],
    data: Samples | None,
    *,
    samples: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    image_size: int | None = None,
) -> dict[str, Tensor]:
    """``|w ⊙ ∂R/∂w| / R``, R the sum of the logits of an image of ones with weights ``|w|``.

    ``R = 1ᵀ ∏ |W_l| 1`` for a network of layers W_l: the score is the share of R on paths through
    w. Each neuron passes on what it receives, and in a network without skip connections the scores
    of each layer sum to 1. (The paper does not divide by R; the order is the same. Here it keeps
    the scores of deep networks in range; the computation is in float64.)

    The network is made linear by :mod:`pai_utils.scorers.linearised`, with power 1: activations
    are the identity, biases and other added constants are left out, BatchNorm is its fixed scale,
    LayerNorm its gain, attention mixes tokens uniformly. So conservation holds on every such
    network. Queries and keys, which no path runs through, each get a quarter of the flow of their
    attention, values a half; otherwise they would be pruned first. That is our definition, since
    the paper has none for attention.

    No sample is looked at; ``data`` serves for the shape of an image only.

    Source: Tanaka, Kunin, Yamins & Ganguli (2020), "Pruning neural networks without any data by
    iteratively conserving synaptic flow". They prune in 100 rounds: in one round, whole layers
    vanish at high sparsity.

    ``image_size`` is the side of the image; by default that of the data, or of the model.

    Raises:
        ValueError: if no side is known.
    """
    shape = _image_shape(model, data, image_size)
    with undisturbed(model):
        network = PathNetwork(model, names, 1, shape)
        image = torch.full((1, *shape), _FLOW, dtype=torch.float64, device=device_of(model))
        with torch.enable_grad():
            logits = network(image)
        gradients, whole = _flow(network, logits, torch.full_like(logits, _FLOW))
    return _shares(model, network, gradients, whole)


def px(
    model: nn.Module,
    names: Sequence[str],
    data: Samples,
    *,
    samples: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    estimator: str = "bound",
) -> dict[str, Tensor]:
    """w² ∂R/∂(w²) / R, R a bound on the trace of the neural tangent kernel, by paths.

    With logit k of sample n as Σ_p a_p(x_n) v_p x_{n,o(p)} over the paths p into k (v_p: product of
    weights; a_p: gates; o(p): its origin), the paper bounds the trace by Σ_j ∂R/∂(w_j²) with ::

        R = Σ_n Σ_k (Σ_p a_p(x_n)² x_{n,o(p)}²) (Σ_p v_p²)              estimator="bound"

    The first factor is the network with weights of one and the gates of the data, on squared
    images; the second that with squared weights and without gates, on an image of ones. The score
    is the share of R on paths through w.

    **Pitfall.** If the last layer connects all its inputs to all logits, as the linear head of any
    classifier does, the first factor is the same for every k: then it scales all scores alike, and
    the order does not depend on the data. ``estimator="gated"`` keeps each path's data with
    its weights, ::

        R = Σ_n Σ_k Σ_p a_p(x_n)² v_p² x_{n,o(p)}²                      estimator="gated"

    so that Σ_j ∂R/∂(w_j²) is the trace without the products of different paths. This second form is
    ours.

    What a_p and v_p are in networks with GELU, SiLU, attention, normalisation or pooling says
    :mod:`pai_utils.scorers.linearised`. In particular BatchNorm enters by the square of its scale
    γ / √(var + ε), without shift, as if folded into the convolution; squaring its parameters and
    statistics one by one, as public code does, is something else. Weights of queries and keys get a
    part of the flow through their attention.

    Costs a forward pass of the model and one of the gates' network in float64; ``"gated"`` a
    backward pass as well.

    Source: Iurada, Ciccone & Tommasi (2024), "Finding lottery tickets in vision models via
    data-driven spectral foresight pruning".

    Raises:
        ValueError: if ``estimator`` is unknown.
    """
    if estimator not in ESTIMATORS:
        raise unknown_name("estimator", estimator, ESTIMATORS)
    indices = draw_samples(data, samples, seed)
    rows = indices[share_of_work(len(indices))]
    device = device_of(model)
    shape = _image_shape(model, data, None)

    def recorded(size: int) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Squared images of each batch, with the gates of the model on it."""
        if len(rows) == 0:  # fewer samples than processes
            return
        loaded = batches(data, size, device, rows)
        for images, _ in progress(loaded, "px", total=-(-len(rows) // size)):
            with torch.no_grad(), Recorder() as recorder:
                model(images)
            yield images.double().square(), recorder.records

    with undisturbed(model):
        # Counts of paths need no patterns of their own: those are of the data.
        network = PathNetwork(model, names, 2, shape, patterns="count")
        if estimator == "gated":

            def gated(size: int) -> dict[str, Tensor]:
                totals = {name: torch.zeros_like(w.detach()) for name, w in network.weights.items()}
                totals[""] = torch.zeros(1, dtype=torch.float64, device=device)  # R
                for squares, records in recorded(size):
                    with torch.enable_grad():
                        logits = network(squares * _FLOW, records)
                    parts, whole = _flow(network, logits, torch.full_like(logits, _FLOW))
                    for name, part in parts.items():
                        totals[name] += part
                    totals[""] += whole
                return totals

            gradients = sum_over_processes(fitting_batches(gated, batch_size))
            whole = gradients.pop("").squeeze(0)
        else:
            counts = PathNetwork(model, [], 0, shape)

            def activity(size: int) -> dict[str, Tensor]:
                total = torch.zeros(counts.classes, dtype=torch.float64, device=device)
                for squares, records in recorded(size):
                    with torch.no_grad():
                        total += counts(squares * _COUNT, records).sum(0)
                return {"": total}

            of_classes = sum_over_processes(fitting_batches(activity, batch_size))[""]
            # Only the ratios count.
            of_classes /= of_classes.max() if of_classes.max() > 0 else 1
            ones = torch.full((1, *shape), _FLOW, dtype=torch.float64, device=device)
            with torch.enable_grad():
                logits = network(ones)
            gradients, whole = _flow(network, logits, of_classes[None] * _FLOW)
    return _shares(model, network, gradients, whole)


def _flow(
    network: PathNetwork, logits: Tensor, cotangent: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of R = Σ logits · cotangent, and R."""
    whole = (logits.detach() * cotangent).sum()
    if not logits.requires_grad:
        return {name: torch.zeros_like(w) for name, w in network.weights.items()}, whole
    gradients = torch.autograd.grad(
        logits,
        list(network.weights.values()),
        cotangent,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(network.weights, gradients, strict=True)), whole


def _shares(
    model: nn.Module, network: PathNetwork, gradients: dict[str, Tensor], whole: Tensor
) -> dict[str, Tensor]:
    """Shares of R on the paths through each weight; 0 where nothing flows at all."""
    parameters = dict(model.named_parameters())
    factor = torch.where(whole > 0, whole, 1)
    return {
        name: (network.weights[name].detach() * gradient)
        .div_(factor)
        .to(torch.promote_types(parameters[name].dtype, torch.float32))
        for name, gradient in gradients.items()
    }


def _image_shape(
    model: nn.Module, data: Samples | None, image_size: int | None
) -> tuple[int, int, int]:
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size={image_size}: at least one pixel is needed")
    if image_size is None and data is not None:
        images, _ = next(batches(data, 1, torch.device("cpu"), torch.tensor([0])))
        channels, height, width = images.shape[1:]
        return channels, height, width
    if image_size is None:
        backbone = getattr(model, "backbone", model)
        image_size = getattr(backbone, "image_size", None)
    if not isinstance(image_size, int):
        raise ValueError(
            "the size of an image is not known: pass image_size, or data to take it from"
        )
    return 3, image_size, image_size
