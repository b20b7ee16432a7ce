"""Pruned models in files (compressed, dense, ONNX) and on hardware that skips zeros."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from pai_utils.masks import Mask, describe_weights, make_mask
from pai_utils.models.checkpoints import differences
from pai_utils.models.encoders import Classifier, image_shape
from pai_utils.models.loading import load_backbone, resolve_device
from pai_utils.support.common import (
    check_names,
    copied,
    forget,
    listed,
    logger,
    package_folder,
)
from pai_utils.support.contract import hold_, unwrapped
from pai_utils.support.sampling import fitting_batches
from pai_utils.support.stored import located, read_tensors, write_atomically, write_tensors

FORMATS = ("compressed", "dense", "onnx")
"""What :func:`write_formats` writes."""
_FORMAT = "pai_utils.compressed/1"
# Multiples of rows and columns that PyTorch's kernels for 16-bit 2:4 weights take (CUTLASS).
_ROWS, _COLUMNS = 32, 64
# Of the largest logit, where another library computes them. It adds up in another order, which
# after a hundred layers of float32 costs some 1e-5; a layer that is wrong costs 1e-2 and more.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Size:
    """What a compressed checkpoint weighs, in bytes; the file adds a header to what is promised."""

    bytes: int  #: of the file on disk
    promised: int  #: of the surviving weights, a bit a masked weight, and all other tensors
    dense: int  #: of all parameters and buffers uncompressed
    kept: float  #: fraction of the weights under the mask that survive


def save_compressed(model: nn.Module, mask: Mask, path: str | Path) -> Size:
    """Write a pruned model as safetensors: a bit a weight under the mask, and the survivors.

    The bits of all masks make one tensor (row-major, most significant first), the surviving
    values one for each type of number; all other parameters and buffers are stored whole, and a
    tensor with two names once. A pruned zero comes back as +0, whichever its sign.

    Raises:
        ValueError: if the mask is for another model, or a weight that it prunes is not zero.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import torch
        >>> import pai_utils as pai
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 2, bias=False))
        >>> model[1].weight.data = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -0.5]])
        >>> pruned = pai.prune(model, None, "magnitude", sparsity=0.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "pruned.safetensors"
        ...     size = pai.save_compressed(pruned.model, pruned.mask, path)
        ...     mask = pai.load_compressed(path, model)
        >>> size.kept, size.promised, size.dense
        (0.5, 13, 24)
        >>> model[1].weight.data
        tensor([[ 1., -2.,  0.],
                [ 0.,  3.,  0.]])
    """
    model = unwrapped(model)
    state = _pruned_state(model, mask)
    aliases = _aliases(model, mask)
    kept: dict[str, list[Tensor]] = {}
    for name, entry in mask.items():
        kept.setdefault(f"values.{_short(state[name])}", []).append(state[name][entry])
    whole = [name for name in state if name not in mask and name not in aliases]
    tensors = {f"whole.{name}": state[name] for name in whole}
    tensors |= {key: torch.cat(values) for key, values in kept.items()}
    bits = torch.cat([entry.flatten() for entry in mask.values()])
    tensors["masks"] = torch.from_numpy(np.packbits(bits.numpy()))
    text = json.dumps(
        {
            "encoder": describe_weights(model, ())["encoder"],
            "image_size": model.backbone.image_size if isinstance(model, Classifier) else None,
            "mask": mask.metadata,
            "masked": {n: [_short(state[n]), list(entry.shape)] for n, entry in mask.items()},
            "aliases": aliases,
        }
    )
    content = write_tensors(path, tensors, text, format=_FORMAT)
    return Size(
        bytes=len(content),
        promised=sum(value.nbytes for value in tensors.values()),
        dense=sum(value.nbytes for name, value in state.items() if name not in aliases),
        kept=mask.kept / mask.total,
    )


@torch.no_grad()
def load_compressed(path: str | Path, model: nn.Module) -> Mask:
    """Fill ``model`` from a file of ``save_compressed``, bit for bit, and return its mask.

    The model has the same architecture in the same types, any weights, and is on any device.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated, altered or none of these, or was written of another
            architecture. The model is then untouched.
    """
    state, mask, said = _read(path)
    target, encoder = _tensors(model), describe_weights(model, ())["encoder"]
    if problems := differences(state, target):
        raise ValueError(f"{path} is of another architecture: {problems}")
    if empty := [name for name, value in target.items() if value.is_meta]:
        raise ValueError(f"the model has no memory (device meta) for {listed(empty)}")
    shared = _aliases(model).items()
    if split := [name for name, owner in shared if not torch.equal(state[name], state[owner])]:
        raise ValueError(f"the model shares one tensor where the file has two: {listed(split)}")
    if said["encoder"] != encoder:
        raise ValueError(f"{path} holds the encoder {said['encoder']!r}, not {encoder!r}")
    for name, value in target.items():
        value.copy_(state[name])
    forget(model)
    return mask


def load_classifier(path: str | Path, device: str | torch.device = "auto") -> Classifier:
    """Make an encoder with its head from a compressed file alone, with no download.

    The file is of a :class:`~pai_utils.models.encoders.Classifier` whose encoder
    :func:`~pai_utils.models.loading.load_backbone` knows by name.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: as :func:`load_compressed`; or if the file is of another kind of model, or of
            an encoder from a checkpoint of the user's own: load that, and fill it by
            :func:`load_compressed`.
    """
    state, _, said = _read(path)
    weight, name, size = state.get("head.weight"), said["encoder"], said["image_size"]
    if weight is None or size is None or name.startswith("file:"):
        raise ValueError(
            f"{path} does not say how to make its model ({name}); make it yourself, and fill it by "
            "load_compressed"
        )
    encoder = load_backbone(name, image_size=size, pretrained=False, device="cpu")
    head = nn.Linear(weight.shape[1], weight.shape[0], bias="head.bias" in state)
    model = Classifier(encoder, head).to(weight.dtype)
    load_compressed(path, model)
    return model.to(resolve_device(device)).eval()


def check_compressed(model: Classifier, path: str | Path, images: Tensor) -> float:
    """Largest absolute difference of logits between a classifier and its file, on the CPU.

    The file alone makes the other model, by :func:`load_classifier`; images are [N, 3, S, S].

    Raises:
        FileNotFoundError, ValueError: as :func:`load_classifier`.
    """
    found = _logits(load_classifier(path, "cpu"), images)
    return float((found - _logits(model, images)).abs().max())


def save_dense(model: nn.Module, mask: Mask, path: str | Path) -> None:
    """Write the pruned model's state dict with its zeros, as plain safetensors.

    ``safetensors.torch.load_file`` and ``load_state_dict`` read it; a tensor with two names is
    stored under both.

    Raises:
        ValueError: as :func:`save_compressed`.
    """
    write_atomically(path, save(_pruned_state(model, mask), metadata={"format": "pt"}))


def export_onnx(
    model: nn.Module, path: str | Path, image_size: int | Sequence[int] | None = None
) -> None:
    """Write the model in evaluation mode as ONNX: ``images`` [N, C, H, W] to ``logits``, any N.

    The weights are inside. C, H and W are as :func:`~pai_utils.models.encoders.image_shape` says.

    Raises:
        ModuleNotFoundError: if the extra ``export`` is not installed.
        ValueError: if there is no image size, or it is not positive.
    """
    package_folder("onnxscript", "pai-utils[export]", "ONNX files are written")
    like = next(model.parameters())
    images = like.new_zeros(2, *image_shape(model, image_size))
    program = torch.onnx.export(
        copied(unwrapped(model)).eval(),
        (images,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    write_atomically(path, program.model_proto.SerializeToString())


def check_onnx(model: nn.Module, path: str | Path, images: Tensor) -> float:
    """Largest absolute difference of logits between the model and its ONNX file, on the CPU.

    The model is in float32 or float64; images are [N, 3, S, S].

    Raises:
        FileNotFoundError: if there is no such file.
        ModuleNotFoundError: if the extra ``export`` is not installed.
        ValueError: if the difference exceeds 1e-4 of the largest logit or is not a number.
    """
    package_folder("onnxruntime", "pai-utils[export]", "ONNX files are run")
    path = located(path)
    if not path.is_file():
        raise FileNotFoundError(f"no ONNX file at {path}")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(batch: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: batch.numpy()})[0])

    found, expected = _logits(run, images), _logits(model, images)
    difference = float((found - expected).abs().max())
    largest = float(expected.abs().max())
    if not difference <= _TOLERANCE * largest:
        raise ValueError(
            f"logits of {path} differ from the model's by {difference:.3g}, more than "
            f"{_TOLERANCE:g} of the largest, {largest:.3g}"
        )
    return difference


@torch.no_grad()
def write_formats(
    model: Classifier,
    mask: Mask,
    folder: str | Path,
    images: Tensor,
    formats: Sequence[str] = FORMATS,
) -> pd.DataFrame:
    """Write a pruned model in several formats, read each back and compare its logits.

    The folder gets ``pruned.compressed.safetensors``, ``pruned.dense.safetensors`` and
    ``pruned.onnx``, as ``formats`` of :data:`FORMATS` say; logits are compared on images [N, 3, S,
    S]. Of a format that fails no file is left; it is logged, and the others are written.

    Returns:
        One row a format, with ``format, file, bytes``; ``promised``, as in :class:`Size`;
        ``of_dense``, the fraction of the bytes of all parameters and buffers uncompressed;
        ``difference``, the largest of the logits; ``problem``, why a format failed.

    Raises:
        ValueError: for an unknown format, another model's mask, or a weight that it prunes and that
            is not zero.
    """
    check_names("format", formats, FORMATS)
    _check_pruned(model, mask)
    expected = _logits(model, images)
    dense = sum(value.nbytes for value in model.state_dict().values())
    rows = []
    for wanted in formats:
        path = located(folder) / f"pruned.{wanted}{'' if wanted == 'onnx' else '.safetensors'}"
        row: dict[str, object] = {"format": wanted, "file": path.name}
        try:
            row |= _write_format(wanted, path, model, mask, images, expected)
            row |= {"bytes": path.stat().st_size, "of_dense": path.stat().st_size / dense}
        except Exception as error:  # of torch's exporter, of the disk, or what is not installed
            path.unlink(missing_ok=True)
            row["problem"] = f"{type(error).__name__}: {error}".split("\n")[0]
            logger.warning("%s is not written: %s", path, row["problem"])
        rows.append(row)
    columns = ["format", "file", "bytes", "promised", "of_dense", "difference", "problem"]
    return pd.DataFrame(rows, columns=columns).astype({"bytes": "Int64", "promised": "Int64"})


def _write_format(
    wanted: str, path: Path, model: Classifier, mask: Mask, images: Tensor, expected: Tensor
) -> dict[str, object]:
    """Write one format and read it back: what it promises, and the difference of logits."""
    if wanted == "onnx":
        export_onnx(model, path)
        return {"difference": check_onnx(model, path, images)}
    plain, promised = copied(unwrapped(model)), None
    for value in plain.state_dict().values():
        value.zero_()  # so that what is read is what is compared
    if wanted == "compressed":
        promised = save_compressed(model, mask, path).promised
        load_compressed(path, plain)
    else:
        save_dense(model, mask, path)
        plain.load_state_dict(load_file(path))
    difference = float((_logits(plain, images) - expected).abs().max())
    return {"promised": promised, "difference": difference}


def to_semi_structured(model: nn.Module, mask: Mask) -> tuple[nn.Module, list[str]]:
    """A copy of the model whose 2:4 linear layers run on the sparse tensor cores of CUDA.

    The model is on CUDA, in float16 or bfloat16.

    Returns:
        The copy, for inference, and the names of the weights that stay dense. These are weights of
        other layers than ``nn.Linear``, and matrices whose rows [out] are no multiple of 32 or
        whose columns [in] are none of 64.

    Raises:
        ValueError: if the mask is for another model or not 2:4, a pruned weight is not zero, or
            the device or type is another.
    """
    _check_pruned(model, mask)
    # A mask of this pattern, made of another by its scores 0 and 1, loses none of its weights.
    whole = make_mask({name: entry.float() for name, entry in mask.items()}, 0.5, "2:4")
    if wrong := [name for name, entry in mask.items() if (entry & ~whole[name]).any()]:
        raise ValueError(f"the mask is not 2:4 along the input of {listed(wrong)}")
    sparse = copied(unwrapped(model)).requires_grad_(False)
    dense = []
    for name, entry in mask.items():
        value = sparse.get_parameter(name)
        if not value.is_cuda or value.dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"{name} is {value.dtype} on {value.device}; sparse kernels need a CUDA device and "
                "model.half() or model.bfloat16()"
            )
        module = sparse.get_submodule(name.rpartition(".")[0])
        rows, columns = entry.shape[:2]
        # Subclasses may read their weight in ways of their own, as attention's projection does.
        if type(module) is not nn.Linear or rows % _ROWS or columns % _COLUMNS:
            dense.append(name)
        else:
            weight = torch.sparse.to_sparse_semi_structured(module.weight.detach())
            module.weight = nn.Parameter(weight, requires_grad=False)
    return sparse, dense


def _read(path: str | Path) -> tuple[dict[str, Tensor], Mask, dict[str, Any]]:
    """All tensors of a compressed file by their names, the mask, and what the file says."""
    tensors, text = read_tensors(path, _FORMAT, what="compressed checkpoint")
    said = json.loads(text)
    state = {n.removeprefix("whole."): t for n, t in tensors.items() if n.startswith("whole.")}
    masked = said["masked"]
    sizes = [math.prod(shape) for _, shape in masked.values()]
    bits = torch.from_numpy(np.unpackbits(tensors["masks"].numpy(), count=sum(sizes))).bool()
    entries = {}
    for (name, (dtype, shape)), part in zip(masked.items(), bits.split(sizes), strict=True):
        entries[name], key = part.view(shape), f"values.{dtype}"
        kept, tensors[key] = tensors[key].tensor_split([int(part.sum())])
        state[name] = torch.zeros(shape, dtype=kept.dtype)
        state[name][entries[name]] = kept
    state |= {alias: state[name] for alias, name in said["aliases"].items()}
    return state, Mask(entries, said["mask"]), said


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    state: dict[str, Any] = unwrapped(model).state_dict()
    other = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if other:
        raise ValueError(f"state that is no tensor cannot be stored or loaded: {listed(other)}")
    return state


def _pruned_state(model: nn.Module, mask: Mask) -> dict[str, Tensor]:
    """Copies on the CPU of all tensors of a model that was pruned with the mask."""
    _check_pruned(model, mask)
    return {n: torch.empty(v.shape, dtype=v.dtype).copy_(v) for n, v in _tensors(model).items()}


def _check_pruned(model: nn.Module, mask: Mask) -> None:
    mask.check(model, strict=False)
    model = unwrapped(model)
    wrong = [n for n, entry in mask.items() if model.get_parameter(n).detach().cpu()[~entry].any()]
    if wrong:
        raise ValueError(
            f"weights that the mask prunes are not zero in {listed(wrong)}; "
            "call mask.apply_(model) first"
        )


def _aliases(model: nn.Module, first: Iterable[str] = ()) -> dict[str, str]:
    """Further names of tensors with several, and the first of each; ``first`` go before others."""
    state = unwrapped(model).state_dict(keep_vars=True)
    owners = {id(state[name]): name for name in reversed([*first, *state])}
    every = {name: owners[id(value)] for name, value in state.items()}
    return {name: owner for name, owner in every.items() if name != owner}


@torch.no_grad()
def _logits(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Logits on the CPU, as many at a time as fit; of a module by a copy in evaluation mode."""
    if isinstance(model, nn.Module):
        model = hold_(copied(unwrapped(model)).cpu().eval())
    images = images.cpu()
    return fitting_batches(lambda size: torch.cat([*map(model, images.split(size))]), len(images))


def _short(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
