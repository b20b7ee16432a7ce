"""Frozen linear heads, fitted on features of the dense encoder."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from pai_utils.data.images import ImageDataset
from pai_utils.data.tasks import Task
from pai_utils.models.clip import zero_shot_head
from pai_utils.models.encoders import Backbone, frozen_head
from pai_utils.support.cache import Kept, reused
from pai_utils.support.common import at_least_single, check_names, device_of, undisturbed
from pai_utils.support.sampling import PRECISIONS, Samples, batches, fitting_batches

HEADS = ("linear", "text")
"""What heads are made of, labelled features or class names."""


def features(
    backbone: nn.Module, data: Samples, *, batch_size: int = 64, precision: str = "float32"
) -> tuple[Tensor, Tensor]:
    """Features ``[N, feature_dim]`` and labels ``[N]`` of all of ``data``, in order, on the CPU.

    Features are float32 at least, in whichever of `pai_utils.support.sampling.PRECISIONS` the
    forward computes its products.
    """
    check_names("precision", [precision], PRECISIONS)
    device, dtype = device_of(backbone), PRECISIONS[precision]
    # A caller's own autocast stays in force unless another precision is asked for.
    mixed = nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)

    def compute(size: int) -> tuple[Tensor, Tensor]:
        # Moved at the end, since each move waits for a GPU.
        pairs = [(backbone(x), y) for x, y in batches(data, size, device)]
        return torch.cat([f for f, _ in pairs]).cpu(), torch.cat([y for _, y in pairs]).cpu()

    with undisturbed(backbone), torch.inference_mode(), mixed:
        values, labels = fitting_batches(compute, batch_size)
    values = values if dtype is None else values.to(at_least_single(values))
    return values.clone(), labels.clone()


def dense_features(
    backbone: nn.Module, data: ImageDataset, *, batch_size: int = 64
) -> tuple[Tensor, Tensor]:
    """The same as :func:`features`, kept in the cache for other runs."""

    def compute() -> Kept:
        values, labels = features(backbone, data, batch_size=batch_size)
        return Kept({"features": values, "labels": labels}, {})

    parts = {"by": features, "encoder": backbone, "data": data, "device": device_of(backbone).type}
    found = reused("features", parts, compute)
    return found.tensors["features"], found.tensors["labels"]


def make_heads(
    backbone: Backbone, tasks: Mapping[str, Task], kind: str = "linear", *, batch_size: int = 64
) -> dict[str, nn.Linear]:
    """A frozen head of the dense encoder for each task, by name.

    The kind ``"linear"`` is fitted on the task's training images, ``batch_size`` images a forward
    (:func:`fit_head`). The kind ``"text"`` is made of the class names, which needs an encoder of
    CLIP (:func:`~pai_utils.models.clip.zero_shot_head`).

    Raises:
        ValueError: if the kind is unknown, and as these two functions say.
    """
    check_names("kind of head", [kind], HEADS)
    if kind == "text":
        return {name: zero_shot_head(backbone, task.class_names) for name, task in tasks.items()}
    return {name: fit_head(backbone, task, batch_size=batch_size) for name, task in tasks.items()}


def fit_head(
    backbone: Backbone,
    task: Task,
    *,
    inverse_penalty: float = 0.1,
    batch_size: int = 64,
) -> nn.Linear:
    """Fit multinomial logistic regression on standardised features of ``task.train``.

    The standardisation is folded into the head, which therefore takes raw features.

    Args:
        backbone: the encoder, usually dense; left as it was.
        task: only its training part is used.
        inverse_penalty: scikit-learn's ``C``, the inverse of the L2 penalty's strength.
        batch_size: images a forward.

    Returns:
        Frozen ``nn.Linear(feature_dim, classes)`` on the encoder's device.

    Raises:
        ValueError: if the features are not finite, or a class has no training sample.

    Examples:
        >>> import pai_utils as pai
        >>> backbone = pai.load_backbone("efficientnet_lite0", image_size=32, device="cpu")
        >>> task = pai.load_task("digits", backbone.transform, train_size=100, test_size=50)
        >>> head = pai.fit_head(backbone, task)
        >>> head
        Linear(in_features=1280, out_features=10, bias=True)
        >>> pai.evaluate(pai.Classifier(backbone, head), task.test).accuracy > 5 * task.chance
        True
    """
    data, device = task.train, device_of(backbone)
    parts = {"by": fit_head, "encoder": backbone, "data": data, "device": device.type}
    options = {"classes": list(task.class_names), "inverse_penalty": inverse_penalty}

    def compute() -> Kept:
        values, labels = dense_features(backbone, data, batch_size=batch_size)
        if not torch.isfinite(values).all():
            raise ValueError(f"features of task {task.name!r} are not finite; check the weights")
        absent = set(range(len(task.class_names))) - set(labels.tolist())
        if absent:
            raise ValueError(
                f"the train part of task {task.name!r} has no sample of class "
                f"{task.class_names[min(absent)]!r}; raise train_size"
            )
        weight, bias = _logistic_regression(values.double(), labels, inverse_penalty)
        return Kept({"weight": weight.to(values.dtype), "bias": bias.to(values.dtype)}, {})

    found = reused("head", parts | options, compute).tensors
    return frozen_head(found["weight"], found["bias"]).to(device)


def _logistic_regression(
    features: Tensor, labels: Tensor, inverse_penalty: float
) -> tuple[Tensor, Tensor]:
    """Weight [classes, feature_dim] and bias [classes] on raw features, in float64."""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    mean, std = features.mean(0), features.std(0, correction=0)
    # A feature that varies by rounding only, such as a bias alone, must not be blown up.
    std[std <= 1e-6 * mean.abs()] = 1
    regression = LogisticRegression(C=inverse_penalty, max_iter=2000)
    # Of many small products: threads that wait for each other make it dozens of times slower.
    with threadpool_limits(1, "blas"):
        regression.fit(((features - mean) / std).numpy(), labels.numpy())
    weight, bias = torch.from_numpy(regression.coef_), torch.from_numpy(regression.intercept_)
    if len(bias) == 1:  # scikit-learn gives the difference of two classes
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    weight = weight / std
    return weight, bias - weight @ mean
