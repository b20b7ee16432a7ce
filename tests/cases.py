"""Tiny networks, one for each way of using a weight, and the dense curvature to compare with."""

from __future__ import annotations

import warnings
from collections import UserList
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from timm.layers.create_conv2d import create_conv2d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from pai_utils.data.images import ImageDataset, ImageTransform
from pai_utils.data.tasks import Task
from pai_utils.heads import fit_head
from pai_utils.models.encoders import Backbone, Classifier, Provenance
from pai_utils.studies.suite import Suite
from pai_utils.support.contract import WholeBatches

CLASSES = 4
SIDE = 8
TRANSFORM = ImageTransform(SIDE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Images(WholeBatches):
    """Random images and labels, read in whole batches."""

    def __init__(
        self,
        count: int = 10,
        *,
        classes: int = CLASSES,
        side: int = SIDE,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(count, 3, side, side, generator=generator, dtype=dtype)
        self.labels = torch.randint(0, classes, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])

    def batch(self, indices: Tensor, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        return self.images[indices].to(device), self.labels[indices].to(device)


class Head(nn.Module):
    """Mean over positions or tokens, then logits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4:
            x = x.flatten(2).transpose(1, 2)
        if x.dim() == 3:
            x = x.mean(1)
        logits: Tensor = self.out(x)
        return logits


class Tokens(nn.Module):
    """Four patches of an image as tokens ``[N, 4, width]``."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.patches(images)
        return x.flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention as in timm: one projection to q, k and v and the fused kernel."""

    def __init__(self, width: int = 6, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        projected: Tensor = self.proj(x.reshape(batch, tokens, width))
        return projected


class Layers(nn.Module):
    """Layers, and what is done with them."""

    def __init__(self, call: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.call = call
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def torch_attention() -> nn.Module:
    return Layers(
        lambda m, x: x + m.attention(x, x, x, need_weights=False)[0],
        attention=nn.MultiheadAttention(6, 2, batch_first=True),
    )


class _Hidden(torch.autograd.Function):
    """A product that no observer of torch's functions sees."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.T

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: object, _: object) -> None:
        ctx.save_for_backward(*inputs)  # type: ignore[misc]

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        rows = gradient.reshape(-1, gradient.shape[-1])
        return gradient @ weight, rows.T @ x.reshape(-1, x.shape[-1])


def _in_windows(layers: Any, x: Tensor) -> Tensor:
    """A linear layer whose rows are ``samples × windows``, as Swin's attention has them."""
    return F.gelu(layers.linear(x.reshape(-1, 2, 6))).reshape(x.shape)


def _convolved_windows(layers: Any, x: Tensor) -> Tensor:
    """A convolution whose rows are ``samples × windows``."""
    batch, channels, height, width = x.shape
    rows = x.reshape(batch, channels, 2, height // 2, width).transpose(1, 2)
    y = layers.conv(rows.flatten(0, 1))
    return F.gelu(y).reshape(rows.shape).transpose(1, 2).flatten(2, 3)


def _constant() -> nn.Module:
    """A layer whose input is no function of the images, as a position table's."""
    table = torch.randn(4, 3)
    return Layers(lambda m, x: torch.tanh(x * m.linear(table.to(x))), linear=nn.Linear(3, 6))


def _set_aside() -> nn.Module:
    """A layer after one whose weights are all zero: no gradient reaches what comes before."""
    layers = Layers(
        lambda m, x: x + m.after(torch.tanh(m.before(x))),
        before=nn.Linear(6, 6),
        after=nn.Linear(6, 6),
    )
    nn.init.zeros_(layers.get_parameter("after.weight"))
    return layers


def _unevenly_padded(layers: Any, x: Tensor) -> Tensor:
    """One more row and column of zeros below and right, which torch warns of as slow."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y: Tensor = layers.conv(x)
    return y


class BatchNorm(nn.BatchNorm2d):
    """With statistics and an affine part that are not the initial ones."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        assert self.running_mean is not None
        assert self.running_var is not None
        nn.init.uniform_(self.running_mean, -0.5, 0.5)
        nn.init.uniform_(self.running_var, 0.5, 2)
        nn.init.uniform_(self.weight, 0.5, 2)


def _conv(*layers: nn.Module, width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GELU(), *layers, Head(width))


def _tokens(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(Tokens(), *layers, Head(6))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: _conv(nn.Conv2d(4, 5, 3), width=5),
    "strided conv": lambda: _conv(nn.Conv2d(4, 5, 3, 2, 1), nn.Conv2d(5, 4, 1, 2)),
    "padded convs": lambda: _conv(
        nn.Conv2d(4, 4, 3, padding="same", dilation=2, bias=False),
        nn.Conv2d(4, 4, (3, 1), padding=(1, 0), padding_mode="circular"),
        Layers(_unevenly_padded, conv=nn.Conv2d(4, 4, 2, padding="same")),
        create_conv2d(4, 4, 3, stride=2, padding="same"),
    ),
    "grouped conv": lambda: _conv(nn.Conv2d(4, 6, 3, 2, groups=2), width=6),
    "depthwise convs": lambda: _conv(
        nn.Conv2d(4, 4, 5, 2, (2, 1), groups=4),
        nn.Conv2d(4, 4, 3, 1, 2, dilation=2, groups=4),
        nn.Conv2d(4, 8, 3, padding=1, groups=4),
        width=8,
    ),
    "transposed conv": lambda: _conv(nn.ConvTranspose2d(4, 4, 2)),
    "eval BatchNorm": lambda: _conv(BatchNorm(4), nn.ReLU(), nn.Conv2d(4, 4, 3), BatchNorm(4)),
    "plain norms": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4, affine=False),
        nn.GELU("tanh"),
        nn.Conv2d(4, 4, 3),
        nn.LayerNorm((6, 6), elementwise_affine=False),
        nn.GELU(),
        Head(4),
    ),
    "max-pool": lambda: _conv(nn.MaxPool2d(2), nn.Conv2d(4, 4, 3)),
    "in-place activation": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3),
        nn.SiLU(inplace=True),
        Head(4),
    ),
    "linear over vectors": lambda: nn.Sequential(
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(48, 6), nn.GELU(), nn.Linear(6, 6), Head(6)
    ),
    "linear over tokens": lambda: _tokens(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)),
    "LayerNorm": lambda: _tokens(nn.LayerNorm(6), nn.Linear(6, 6), nn.LayerNorm(6)),
    "fused attention": lambda: _tokens(Attention()),
    "nn.MultiheadAttention": lambda: _tokens(torch_attention()),
    "shared weight": lambda: _tokens(
        Layers(lambda m, x: m.linear(torch.tanh(m.linear(x))), linear=nn.Linear(6, 6))
    ),
    "unused weight": lambda: _tokens(
        Layers(lambda m, x: m.used(x), used=nn.Linear(6, 6), unused=nn.Linear(6, 6))
    ),
    "reshaped weight": lambda: _tokens(
        Layers(
            lambda m, x: F.linear(x, m.conv.weight.reshape(6, 6), m.conv.bias),
            conv=nn.Conv2d(6, 6, 1),
        )
    ),
    "weight in a custom function": lambda: _tokens(
        Layers(lambda m, x: _Hidden.apply(x, m.linear.weight), linear=nn.Linear(6, 6))
    ),
    "sequence first": lambda: _tokens(
        Layers(
            lambda m, x: F.gelu(m.linear(x.transpose(0, 1))).transpose(0, 1), linear=nn.Linear(6, 6)
        )
    ),
    "sequence first, one token read": lambda: _tokens(
        Layers(lambda m, x: F.gelu(m.linear(x.transpose(0, 1))[0]), linear=nn.Linear(6, 6))
    ),
    "windows": lambda: _tokens(Layers(_in_windows, linear=nn.Linear(6, 6))),
    "convolution over windows": lambda: _conv(
        Layers(_convolved_windows, conv=nn.Conv2d(4, 4, 3, padding=1))
    ),
    "input without images": lambda: _tokens(_constant()),
    "no gradient": lambda: _tokens(_set_aside()),
}


@dataclass(frozen=True)
class Case:
    """A network in float64, the weights to look at, and data."""

    model: nn.Module
    names: list[str]
    data: Images
    name: str = ""


def build(name: str) -> Case:
    """The case called ``name``, the same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name]().double()
    # In training mode, as users may have it: curvature is that of evaluation mode all the same.
    names = [n for n, p in model.named_parameters() if p.dim() > 1]
    return Case(model.train(), names, Images(), name)


CASES: dict[str, Callable[[], Case]] = {name: partial(build, name) for name in MODELS}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; each module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    yield
    for module, training in modes.items():
        module.training = training


def per_sample_gradients(
    model: nn.Module, names: Sequence[str], images: Tensor, cotangents: Tensor
) -> Iterator[tuple[Tensor, ...]]:
    """J_nᵀ v_n by one backward a sample, in evaluation mode: the definition, without any trick."""
    parameters = dict(model.named_parameters())
    with evaluating(model):
        for image, cotangent in zip(images.split(1), cotangents.split(1), strict=True):
            yield torch.autograd.grad(
                # Twice, since torch's BatchNorm is wrong for some single samples; one is looked at.
                model(torch.cat([image, image]))[:1],
                [parameters[name] for name in names],
                cotangent,
                allow_unused=True,
                materialize_grads=True,
            )


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Logits in evaluation mode."""
    with evaluating(model), torch.no_grad():
        logits: Tensor = model(images)
    return logits


def dense_fisher_diagonal(case: Case) -> dict[str, Tensor]:
    """Mean of squared per-sample gradients with the true labels."""
    residual = logits_of(case.model, case.data.images).softmax(1)
    residual[torch.arange(len(case.data)), case.data.labels] -= 1
    return _mean_squares(case, [residual])


def dense_ggn_diagonal(case: Case) -> dict[str, Tensor]:
    """Diagonal of J_nᵀ (diag p − p pᵀ) J_n, over an eigenbasis of the middle factor."""
    p = logits_of(case.model, case.data.images).softmax(1)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    values, vectors = torch.linalg.eigh(middle)
    columns = (vectors * values.clamp_min(0).sqrt()[:, None, :]).unbind(2)
    return _mean_squares(case, columns)


def dense_output_diagonal(case: Case) -> dict[str, Tensor]:
    """Diagonal of the mean of JᵀJ over samples, J the Jacobian of the outputs."""
    outputs = logits_of(case.model, case.data.images)
    columns = [column.expand_as(outputs) for column in torch.eye(outputs.shape[1]).to(outputs)]
    return _mean_squares(case, columns)


def _mean_squares(case: Case, cotangents: Sequence[Tensor]) -> dict[str, Tensor]:
    parameters = dict(case.model.named_parameters())
    totals = {name: torch.zeros_like(parameters[name]) for name in case.names}
    for cotangent in cotangents:
        for gradients in per_sample_gradients(case.model, case.names, case.data.images, cotangent):
            for name, gradient in zip(case.names, gradients, strict=True):
                totals[name] += gradient.square() / len(case.data)
    return totals


def dense_hessian(model: nn.Module, names: Sequence[str], data: Images) -> Tensor:
    """Hessian of the mean cross-entropy over the named weights, ``[P, P]``."""
    parameters = dict(model.named_parameters())
    weights = [parameters[name] for name in names]
    math_kernel = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with evaluating(model), math_kernel:
        loss = F.cross_entropy(model(data.images), data.labels)
    gradients = torch.autograd.grad(
        loss, weights, create_graph=True, allow_unused=True, materialize_grads=True
    )
    flat = torch.cat([g.flatten() for g in gradients])
    units = torch.eye(len(flat), dtype=flat.dtype)
    found = torch.autograd.grad(flat, weights, units, allow_unused=True, is_grads_batched=True)
    rows = [
        flat.new_zeros(len(flat), weight.numel()) if part is None else part.flatten(1)
        for part, weight in zip(found, weights, strict=True)
    ]
    return torch.cat(rows, 1).detach()


def hessian_of(case: Case, names: Sequence[str]) -> Tensor:
    """The dense Hessian of a case's own network over some of its parameters."""
    numbers = torch.arange(sum(p.numel() for p in case.model.parameters()))
    sizes = {name: p.numel() for name, p in case.model.named_parameters()}
    parts = dict(zip(sizes, numbers.split(list(sizes.values())), strict=True))
    chosen = torch.cat([parts[name] for name in names])
    return _whole_hessian(case.name)[chosen][:, chosen]


@cache
def _whole_hessian(name: str) -> Tensor:
    """Computed once, since it is the slowest of the references."""
    case = build(name)
    return dense_hessian(case.model, [n for n, _ in case.model.named_parameters()], case.data)


def vector_for(case: Case, seed: int = 2) -> dict[str, Tensor]:
    """A random direction over the case's weights."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(
            case.model.get_parameter(name).shape, generator=generator, dtype=torch.float64
        )
        for name in case.names
    }


def flattened(tensors: dict[str, Tensor]) -> Tensor:
    """All entries in one vector, in the dictionary's order."""
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference (its own norm where that is zero)."""
    scale = reference.norm()
    return float((value - reference).norm() / (scale if scale > 0 else 1))


def largest_error(values: dict[str, Tensor], references: dict[str, Tensor]) -> float:
    """The largest relative error among tensors, which come in the same order."""
    pairs = zip(values.values(), references.values(), strict=True)
    return max(relative_error(value, reference) for value, reference in pairs)


def fingerprint(model: nn.Module) -> list[object]:
    """All that must be as before, under every name: values bit for bit, which objects, flags."""
    parameters = list(model.named_parameters(remove_duplicate=False))
    modules = list(model.named_modules(remove_duplicate=False))
    # Tensors that are no part of the state, and whatever else a module keeps beside it.
    registered = ("_parameters", "_buffers", "_modules")
    others = [{k: v for k, v in vars(m).items() if k not in registered} for _, m in modules]
    held = [t for t in tree_leaves(others) if isinstance(t, Tensor)]
    state = [*parameters, *model.named_buffers(remove_duplicate=False)]
    return [
        [(n, id(t), t.detach().numpy().tobytes()) for n, t in state],
        [t.detach().numpy().tobytes() for t in held],
        [(n, type(p), p.requires_grad, id(p.grad)) for n, p in parameters],
        [(n, id(m), m.training) for n, m in modules],
        [{k: repr(v) for k, v in each.items()} for each in others],
    ]


class Limited(nn.Module):
    """A model that runs out of memory for batches above ``limit``."""

    def __init__(self, model: nn.Module, limit: int) -> None:
        super().__init__()
        self.model = model
        self.limit = limit
        self.sizes: UserList[int] = UserList()  # a list would be put back

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        if len(images) > self.limit:
            raise torch.OutOfMemoryError("not enough memory for this batch")
        logits: Tensor = self.model(images)
        return logits


def tiny_backbone() -> Backbone:
    """A convolutional encoder of 8 × 8 images with 6 features, in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 6, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
    return Backbone(
        encoder.eval(),
        name="tiny",
        feature_dim=6,
        transform=TRANSFORM,
        provenance=Provenance("random weights", "none", None),
    )


def tiny_dataset(count: int, classes: int, seed: int) -> ImageDataset:
    """Noise with a bright spot in one channel or corner a class, balanced."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 120, (count, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % classes
    for image, label in zip(images, labels.tolist(), strict=True):
        image[label % 3, 4 * (label // 3) : 4 * (label // 3) + 4] += 100
    return ImageDataset(images, labels, TRANSFORM)


def tiny_task(name: str = "spots", *, classes: int = 3, train: int = 30, test: int = 24) -> Task:
    """A task that a random encoder with a fitted head does well on, but not perfectly."""
    fitted, chosen, reported = (
        tiny_dataset(size, classes, seed) for seed, size in enumerate((train, classes, test))
    )
    return Task(name, tuple("abcdefgh"[:classes]), fitted, chosen, reported)


def tiny_classifier(classes: int = 3) -> Classifier:
    """The encoder with a random head."""
    backbone = tiny_backbone()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Classifier(backbone, nn.Linear(6, classes))


def tiny_suite(**tasks: Task) -> Suite:
    """The encoder, tasks by name, and heads fitted for them."""
    backbone = tiny_backbone()
    return Suite(backbone, tasks, {name: fit_head(backbone, task) for name, task in tasks.items()})


def logistic_regression() -> tuple[nn.Module, Images]:
    """A model without hidden layers at the minimum of its loss, and the data."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3, bias=False)).double()
    data = Images(40, classes=3, side=2)
    optimiser = torch.optim.LBFGS(
        model.parameters(), max_iter=500, tolerance_grad=1e-13, tolerance_change=0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(model(data.images), data.labels)
        loss.backward()
        return loss

    for _ in range(3):  # a line search may end early; a restart goes on
        optimiser.step(closure)
    model.zero_grad()
    return model, data
