"""Fine-tuning of pruned models, in which pruned weights stay exactly zero."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pai_utils.masks import Mask
from pai_utils.models.encoders import Classifier
from pai_utils.support.common import NonFiniteError, check_names, device_of, undisturbed
from pai_utils.support.contract import check_labels, count_items, hold_, unwrapped
from pai_utils.support.sampling import Samples, batches, check_batch_size, paired


def _adam(
    weights: list[nn.Parameter], rate: float, momentum: float = 0.9, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, rate, (momentum, 0.99), weight_decay=weight_decay)


OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, momentum=0.9),
    "adam": _adam,
}
"""By name; Adam with decoupled weight decay, and a second beta for short runs."""
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
}
"""The learning rate, over the first, once a share ``done`` of the updates is made."""
_UNSEEN = 10  # updates between checks that all is finite


@dataclass(frozen=True)
class Penalty:
    """A quadratic pull of trained parameters to an anchor: ½ λ Σ c_i (w_i − a_i)².

    With c the diagonal of a curvature this is elastic weight consolidation (Kirkpatrick et al.
    2017, "Overcoming catastrophic forgetting in neural networks"); without c it is L2-SP (Li et al.
    2018, "Explicit inductive bias for transfer learning with convolutional networks").
    """

    anchor: Mapping[str, Tensor]  #: a, by parameter name; parameters without an entry are free
    strength: float  #: λ
    curvature: Mapping[str, Tensor] | None = None  #: c ≥ 0, by parameter name; None: 1 everywhere

    def check(self, model: nn.Module) -> None:
        """Refuse a strength, anchor or curvature out of range or not of the model's parameters."""
        _check_strength(self.strength)
        parameters = dict(model.named_parameters())
        for kind, tensors in (("anchor", self.anchor), ("curvature", self.curvature or {})):
            check_names(f"parameter of the penalty's {kind}", tensors, parameters)
            least = 0 if kind == "curvature" else -math.inf
            for name, tensor in tensors.items():
                what = f"the penalty's {kind} of {name!r}"
                shape, wanted = list(tensor.shape), list(parameters[name].shape)
                if shape != wanted:
                    raise ValueError(f"{what} has shape {shape}, the parameter {wanted}")
                if not (tensor.isfinite() & (tensor >= least)).all():
                    raise ValueError(f"{what} must be finite, and a curvature not negative")
        if self.curvature is not None and (missing := set(self.anchor) - set(self.curvature)):
            raise ValueError(f"the penalty has no curvature for {min(missing)!r}")

    def pull_(self, parameters: Mapping[str, nn.Parameter], learning_rate: float) -> None:
        """The proximal step: where w and the penalty balance, hence stable at any strength."""
        for name, anchor in self.anchor.items():
            weight = parameters[name]
            if weight.requires_grad:
                curvature = 1.0 if self.curvature is None else self.curvature[name].to(weight)
                share = learning_rate * self.strength * curvature
                weight.lerp_(anchor.to(weight), share / (1 + share))


@dataclass(frozen=True)
class FeaturePenalty:
    """A pull of a classifier's features to given ones: ½ λ E ‖φ(x; w) − φ₀(x)‖² / V.

    V is the total variance of φ₀, so that the expectation is the share of it that is lost. The
    images x may belong to no task. To second order at the dense weights this is ½ λ δᵀGδ / V, G the
    Gauss-Newton matrix whose diagonal is
    :func:`~pai_utils.curvature.diagonals.output_diagonal` (Benjamin et al. 2019, "Measuring and
    regularizing networks in function space"; as distillation: Romero et al. 2015, "FitNets").
    """

    images: Samples  #: x
    targets: Tensor  #: φ₀, [N, D], in the order of the images
    strength: float  #: λ

    def check(self, model: nn.Module) -> None:
        """Refuse a strength out of range, or targets that are not the model's features."""
        _check_strength(self.strength)
        if not isinstance(model, Classifier):
            raise ValueError("a FeaturePenalty needs a Classifier, whose backbone gives features")
        expected = [count_items(self.images), model.backbone.feature_dim]
        if list(self.targets.shape) != expected:
            raise ValueError(
                f"the penalty's targets have shape {list(self.targets.shape)}, expected "
                f"{expected}: one row an image, one column a feature"
            )

    @cached_property
    def variance(self) -> Tensor:
        """V above, the total variance of the targets, summed over features."""
        return self.targets.var(0, correction=0).sum()

    def loss(self, model: nn.Module, batch_size: int, seed: int) -> Tensor:
        """The penalty on a seeded draw of ``batch_size`` images, with replacement."""
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(len(self.targets), (batch_size,), generator=generator)
        ((images, _),) = batches(self.images, batch_size, device_of(model), rows)
        found = model.get_submodule("backbone")(paired(images))
        targets = paired(self.targets[rows].to(found))
        change: Tensor = (found - targets).square().sum(1).mean() / self.variance.to(found)
        return 0.5 * self.strength * change


def _check_strength(strength: float) -> None:
    if not 0 <= strength < math.inf:
        raise ValueError(f"strength={strength} must be a finite number, not negative")


def finetune(
    model: nn.Module,
    data: Samples,
    mask: Mask | None = None,
    *,
    steps: int = 100,
    learning_rate: float = 1e-4,
    batch_size: int = 64,
    optimiser: str = "sgd",
    schedule: str = "constant",
    seed: int = 0,
    penalty: Penalty | FeaturePenalty | None = None,
    on_step: Callable[[int], None] | None = None,
    **options: float,
) -> list[float]:
    """Train ``model`` in place on the mean cross-entropy; pruned weights stay exactly zero.

    The model is kept in evaluation mode, since BatchNorm statistics of one task destroy the others.
    Parameters that do not require a gradient, such as the head of a
    :class:`~pai_utils.models.encoders.Classifier`, stay as they are.

    Args:
        model: images to logits.
        data: labelled samples of the source task, drawn in seeded random order without
            replacement, epoch after epoch; the last batch of an epoch may be smaller.
        mask: the pruned model's mask; ``None`` trains densely.
        steps: number of updates.
        learning_rate: of the first update.
        batch_size: samples an update (not changed when memory runs out: it is part of the result).
        optimiser: a key of :data:`OPTIMISERS`. Frozen heads need low rates of plain SGD.
        schedule: a key of :data:`SCHEDULES`: what the rate is later.
        seed: seed of the order of samples.
        penalty: a pull to weights, as a proximal step after each update, or to features, on
            ``batch_size`` of its images an update; pruned weights stay zero.
        on_step: called with the number of updates made, before the first and after each.
        options: ``momentum`` of SGD, of Adam the first beta (0.9), and ``weight_decay`` (0).

    Returns:
        The loss of each update's batch, in nats.

    Raises:
        ValueError: for settings outside their range, a mask or penalty of another architecture, or
            labels beyond the model's classes.
        FloatingPointError: at a non-finite loss or update, naming step and learning rate. The
            model keeps the last weights whose loss was finite (those given, at step 0).

    Examples:
        >>> import torch
        >>> import pai_utils as pai
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 2, bias=False))
        >>> model[1].weight.data = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -0.5]])
        >>> images = torch.eye(3).view(3, 3, 1, 1)  # three images of one pixel
        >>> data = torch.utils.data.TensorDataset(images, torch.tensor([0, 1, 0]))
        >>> mask = pai.make_mask(pai.score("magnitude", model), sparsity=0.5)
        >>> mask.apply_(model)
        >>> losses = pai.finetune(model, data, mask, steps=20, learning_rate=0.1)
        >>> losses[-1] < losses[0]
        True
        >>> model[1].weight.data[~mask["1.weight"]]
        tensor([0., 0., 0.])
    """
    check_names("optimiser", [optimiser], OPTIMISERS)
    check_names("schedule", [schedule], SCHEDULES)
    check_batch_size(batch_size)
    if steps < 0:
        raise ValueError(f"steps={steps} must not be negative")
    if learning_rate <= 0:
        raise ValueError(f"learning_rate={learning_rate} must be positive")
    model = unwrapped(model)
    parameters = dict(model.named_parameters())
    trained = [p for p in parameters.values() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model requires a gradient; nothing to fine-tune")
    stepper = OPTIMISERS[optimiser](trained, learning_rate, **options)
    if penalty is not None:
        penalty.check(model)
    removed = []
    if mask is not None:
        mask.apply_(model)
        removed = [(parameters[n], ~entry.to(parameters[n].device)) for n, entry in mask.items()]
    sound, device = [p.detach().clone() for p in trained], device_of(model)
    losses: list[Tensor] = []
    # Whether all was finite until now, after each loss and update; asked for only now and then,
    # since that waits for the device. What follows a value that is not finite is thrown away.
    finite = [torch.ones((), dtype=torch.bool, device=device)]
    updates = _updates(data, steps, batch_size, device, seed)
    with undisturbed(model):
        if isinstance(penalty, FeaturePenalty):
            hold_(model.get_submodule("backbone"))
        try:
            for step, (images, labels) in enumerate(updates):
                if on_step or step % _UNSEEN == 0:
                    _check_finite(finite, learning_rate)
                if on_step:
                    on_step(step)
                logits = model(images)
                check_labels(labels, logits.shape[1])
                loss = F.cross_entropy(logits, labels)
                losses.append(loss.detach())
                if isinstance(penalty, FeaturePenalty):
                    loss = loss + penalty.loss(model, batch_size, _seed_at(seed, step))
                finite.append(finite[-1] & loss.detach().isfinite())
                for kept, parameter in zip(sound, trained, strict=True):
                    torch.where(finite[-1], parameter.detach(), kept, out=kept)
                stepper.zero_grad(set_to_none=True)
                loss.backward()
                # No gradient, hence no momentum and no decay: the weights stay zero.
                for parameter, gone in removed:
                    if parameter.grad is not None:
                        parameter.grad.masked_fill_(gone, 0)
                rate = learning_rate * SCHEDULES[schedule](step / steps)
                for group in stepper.param_groups:
                    group["lr"] = rate
                stepper.step()
                if isinstance(penalty, Penalty):
                    with torch.no_grad():
                        penalty.pull_(parameters, rate)
                        for parameter, gone in removed:
                            parameter.masked_fill_(gone, 0)
                fine = [parameter.detach().isfinite().all() for parameter in trained]
                finite.append(torch.stack([finite[-1], *fine]).all())
            _check_finite(finite, learning_rate)
            if on_step:
                on_step(steps)
        except NonFiniteError:
            torch._foreach_copy_([p.detach() for p in trained], sound)
            raise
    return torch.stack(losses).tolist() if losses else []


def _check_finite(finite: Sequence[Tensor], rate: float) -> None:
    """Refuse the first loss or update that was not finite; this waits for the device.

    ``finite`` says whether all was so far: at the start, then after each loss and update in turn.
    """
    if finite[-1]:
        return
    updates, of_update = divmod(int(torch.stack(list(finite)).sum()) - 1, 2)
    step, what = updates + of_update, "an update" if of_update else "the loss"
    advice = "try a smaller one" if step else "before any update: look at images and weights"
    raise NonFiniteError(f"{what} is not finite at step {step} with learning_rate={rate}; {advice}")


def _updates(
    data: Samples, steps: int, batch_size: int, device: torch.device, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels of every update: epoch after epoch, each in an order of its own."""
    step = 0
    while step < steps:
        generator = torch.Generator().manual_seed(_seed_at(seed, step))
        order = torch.randperm(count_items(data), generator=generator)
        epoch = itertools.islice(batches(data, batch_size, device, order), steps - step)
        for images, labels in epoch:
            yield paired(images), paired(labels)
            step += 1


def _seed_at(seed: int, step: int) -> int:
    """A seed for what is drawn at an update."""
    return seed * 1_000_003 + step
