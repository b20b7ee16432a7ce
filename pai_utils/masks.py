"""Masks: which weights stay, chosen from scores, applied to models, kept in files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pai_utils.execution import write_atomically

SCOPES = ("global", "layer", "N:M")


class Mask(Mapping[str, Tensor]):
    """Which weights stay: one boolean tensor a parameter name, true where the weight is kept.

    Args:
        entries: boolean tensors (or 0/1 tensors of any type), copied to the CPU.
        metadata: text that travels with the mask's file, such as scorer, source task and seed.

    Raises:
        ValueError: if the mask is empty or a tensor holds anything but zeros and ones.
    """

    def __init__(
        self, entries: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
    ) -> None:
        if not entries:
            raise ValueError("a mask needs at least one parameter")
        self._entries = {name: _as_boolean(name, value) for name, value in entries.items()}
        self.metadata = dict(metadata or {})

    def __getitem__(self, name: str) -> Tensor:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Mask({len(self)} parameters, {self.total} weights, sparsity {self.sparsity:.4f})"

    @property
    def total(self) -> int:
        """Number of weights under the mask, kept and pruned."""
        return sum(entry.numel() for entry in self._entries.values())

    @property
    def kept(self) -> int:
        """Number of weights kept."""
        return sum(int(entry.sum()) for entry in self._entries.values())

    @property
    def sparsity(self) -> float:
        """Pruned fraction of the weights under the mask."""
        return 1 - self.kept / self.total

    @property
    def layer_sparsity(self) -> dict[str, float]:
        """Pruned fraction of each parameter."""
        return {name: 1 - float(entry.double().mean()) for name, entry in self._entries.items()}

    @property
    def empty_layers(self) -> list[str]:
        """Parameters that are pruned to nothing."""
        return [name for name, entry in self._entries.items() if not entry.any()]

    def overlap(self, other: Mask) -> float:
        """Intersection over union of the weights that the two masks keep.

        Two independent random masks that keep a fraction k each overlap by k / (2 - k).

        Raises:
            ValueError: if the masks are for different parameters.
        """
        self._check(other)
        other._check(self)
        both = sum(int((entry & other[name]).sum()) for name, entry in self._entries.items())
        either = self.kept + other.kept - both
        return both / either if either else 1.0

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Set the pruned weights of ``model`` to zero, in place.

        Raises:
            ValueError: if the model lacks a parameter of the mask or its shape differs; the model
                is then untouched.
        """
        parameters = dict(model.named_parameters())
        self._check(parameters)
        for name, entry in self._entries.items():
            # Not a product: a non-finite weight that is pruned becomes zero as well.
            parameters[name].masked_fill_(~entry.to(parameters[name].device), 0)

    def save(self, path: str | Path) -> None:
        """Write the mask as safetensors, with its metadata and a checksum; all or nothing."""
        from safetensors.torch import save

        entries = {name: entry.to(torch.uint8) for name, entry in self._entries.items()}
        metadata = json.dumps(self.metadata, sort_keys=True)
        header = {
            "format": "pai_utils.Mask/1",
            "sha256": _checksum(entries, metadata),
            "metadata": metadata,
        }
        write_atomically(path, save(entries, metadata=header))

    @classmethod
    def load(cls, path: str | Path) -> Mask:
        """Read a mask written by :meth:`save`.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is truncated, altered, or not a mask.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"no mask file at {path}")
        try:
            with safe_open(str(path), framework="pt") as file:
                header = file.metadata() or {}
                entries = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or no mask file: {error}") from error
        if header.get("format") != "pai_utils.Mask/1":
            raise ValueError(f"{path} was not written by Mask.save")
        metadata = header.get("metadata", "")
        if header.get("sha256") != _checksum(entries, metadata):
            raise ValueError(f"{path} was altered: its contents do not match its checksum")
        return cls(entries, json.loads(metadata))

    def _check(self, parameters: Mapping[str, Tensor]) -> None:
        missing = [name for name in self._entries if name not in parameters]
        if missing:
            raise ValueError(
                f"the mask is for another architecture: the model has no {_some(missing)}"
            )
        wrong = [
            f"{name} (mask {tuple(entry.shape)}, model {tuple(parameters[name].shape)})"
            for name, entry in self._entries.items()
            if entry.shape != parameters[name].shape
        ]
        if wrong:
            raise ValueError(f"the mask is for another architecture: shapes of {_some(wrong)}")


def make_mask(
    scores: Mapping[str, Tensor],
    sparsity: float,
    scope: str = "global",
    *,
    within: Mask | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Mask:
    """Keep the weights with the highest scores.

    The number of pruned weights is exactly ``round(sparsity * n)``, also when scores tie; among
    equal scores the first in order is pruned first.

    Args:
        scores: one tensor a parameter name, higher means keep.
        sparsity: fraction to prune, in [0, 1). For ``"N:M"`` it must be 1 − N/M.
        scope: ``"global"`` compares all weights with each other, ``"layer"`` those of one
            parameter; ``"N:M"`` (such as ``"2:4"``) keeps N of every M consecutive weights along
            the input dimension. A last group of fewer than M keeps its N highest.
        within: an earlier mask; what it prunes stays pruned.
        metadata: kept with the mask.

    Raises:
        ValueError: for an impossible sparsity, an unknown scope, no scores or non-finite ones, or
            if ``within`` prunes more than ``sparsity`` asks for.
    """
    pattern = check_sparsity(sparsity, scope)
    if not scores:
        raise ValueError("no scores to make a mask from")
    for name, values in scores.items():
        if not torch.isfinite(values).all():
            raise ValueError(f"scores of {name!r} are not finite")
        if pattern is not None and values.dim() < 2:
            raise ValueError(f"scope {scope!r} needs scores [out, in, ...], not 1-D {name!r}")
    ranked = dict(scores)
    if within is not None:
        within._check(ranked)
        new = [name for name in ranked if name not in within]
        if new:
            raise ValueError(f"the earlier mask has no {_some(new)}, which the scores name")
        ranked = {
            name: values.masked_fill(~within[name].to(values.device), -torch.inf)
            for name, values in ranked.items()
        }
    if scope == "global":
        flat = torch.cat([values.flatten() for values in ranked.values()])
        parts = _keep_highest(flat, sparsity).split([v.numel() for v in ranked.values()])
        kept = {n: p.view(v.shape) for (n, v), p in zip(ranked.items(), parts, strict=True)}
    elif pattern is None:
        kept = {n: _keep_highest(v.flatten(), sparsity).view(v.shape) for n, v in ranked.items()}
    else:
        kept = {name: _keep_n_of_m(values, *pattern) for name, values in ranked.items()}
    if within is not None:
        for name, entry in kept.items():
            if (entry.cpu() & ~within[name]).any():
                raise ValueError(
                    f"sparsity={sparsity} is below that of the earlier mask ({within.sparsity:.4f} "
                    f"overall) in {name!r}; a pruned weight never comes back"
                )
    return Mask(kept, metadata)


def check_sparsity(sparsity: float, scope: str) -> tuple[int, int] | None:
    """Refuse a sparsity or scope that :func:`make_mask` cannot serve; return N and M of ``"N:M"``.

    Raises:
        ValueError: for an impossible sparsity, an unknown scope, or a sparsity other than the
            scope's own.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity} must be in [0, 1): the fraction of weights to prune")
    if scope in ("global", "layer"):
        return None
    pattern = re.fullmatch(r"(\d+):(\d+)", scope)
    if pattern is None:
        raise ValueError(
            f"unknown scope {scope!r}; choose 'global', 'layer' or 'N:M' such as '2:4'"
        )
    n, m = int(pattern[1]), int(pattern[2])
    if not 0 < n <= m:
        raise ValueError(f"scope {scope!r} keeps {n} of every {m} weights; N must be in 1 to M")
    if abs(sparsity - (1 - n / m)) > 1e-9:
        raise ValueError(
            f"scope {scope!r} keeps {n} of every {m} weights: its sparsity is {1 - n / m:g}, "
            f"not {sparsity}"
        )
    return n, m


def _keep_highest(flat: Tensor, sparsity: float) -> Tensor:
    """Boolean tensor that is false at the ``round(sparsity * n)`` lowest entries, ties in order."""
    pruned = round(sparsity * flat.numel())
    if pruned == 0:
        return torch.ones_like(flat, dtype=torch.bool)
    threshold = flat.kthvalue(pruned).values
    keep = flat > threshold
    # At the threshold, as many of the last ones are kept as the exact count leaves room for.
    room = flat.numel() - pruned - int(keep.sum())
    if room:
        ties = (flat == threshold).nonzero().squeeze(1)
        keep[ties[len(ties) - room :]] = True
    return keep


def _keep_n_of_m(values: Tensor, n: int, m: int) -> Tensor:
    """Keep the n highest of every m entries along dimension 1 (the input)."""
    last = values.movedim(1, -1)
    width = last.shape[-1]
    padded = nn.functional.pad(last, (0, -width % m), value=-torch.inf)
    groups = padded.unflatten(-1, (-1, m))
    # In a stable order the first of equal scores goes first; padding ranks lowest and is cut off.
    order = groups.argsort(dim=-1, stable=True)
    keep = torch.ones_like(groups, dtype=torch.bool).scatter_(-1, order[..., : m - n], False)
    return keep.flatten(-2)[..., :width].movedim(-1, 1)


def _as_boolean(name: str, value: Tensor) -> Tensor:
    if not ((value == 0) | (value == 1)).all():
        raise ValueError(f"mask of {name!r} holds values other than 0 and 1")
    # A copy always: later changes to the caller's tensor are none of the mask's.
    kept = torch.empty(value.shape, dtype=torch.bool)
    return kept.copy_(value.detach())


def _checksum(entries: Mapping[str, Tensor], metadata: str) -> str:
    digest = hashlib.sha256(f"{metadata}\n".encode())
    for name in sorted(entries):
        entry = entries[name].contiguous()
        digest.update(f"{name} {tuple(entry.shape)} {entry.dtype}\n".encode())
        digest.update(entry.numpy().tobytes())
    return digest.hexdigest()


def _some(items: list[Any], most: int = 5) -> str:
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + rest
