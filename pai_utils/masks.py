"""Masks: which weights stay, chosen from scores, applied to models, kept in files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pai_utils.models.encoders import Backbone, Classifier
from pai_utils.support.common import hash_tensors, listed
from pai_utils.support.stored import read_tensors, write_atomically, write_tensors

SCOPES = ("global", "layer", "erk", "N:M")
_FORMAT = "pai_utils.Mask/2"
_BLOCK = 2**22  # scores compared at a time, which bounds the memory of what comparisons return


class Mask(Mapping[str, Tensor]):
    """Which weights stay: one boolean tensor a parameter name, true where the weight is kept.

    Args:
        entries: boolean tensors (or 0/1 tensors of any type), copied to the CPU.
        metadata: text that travels with the mask's file, such as scorer, source task and seed.
            With the entries of :func:`describe_weights`, the mask fits those weights only.

    Raises:
        ValueError: if the mask is empty, a tensor holds anything but zeros and ones, or an entry
            of the metadata is not text.

    Examples:
        >>> import torch
        >>> import pai_utils as pai
        >>> left = pai.Mask({"weight": torch.tensor([True, True, False, False])})
        >>> right = pai.Mask({"weight": torch.tensor([True, False, False, False])})
        >>> left.sparsity
        0.5
        >>> left.overlap(right)
        0.5
        >>> left.union(right)["weight"]
        tensor([ True,  True, False, False])
    """

    def __init__(
        self, entries: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
    ) -> None:
        if not entries:
            raise ValueError("a mask needs at least one parameter")
        self._entries = {name: _as_boolean(name, value) for name, value in entries.items()}
        self.metadata = dict(metadata or {})
        for key, text in self.metadata.items():
            if not (isinstance(key, str) and isinstance(text, str)):
                raise ValueError(f"metadata of a mask is text, not {key!r}: {text!r}")

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
        return sum(_count(entry) for entry in self._entries.values())

    @property
    def sparsity(self) -> float:
        """Pruned fraction of the weights under the mask."""
        return 1 - self.kept / self.total

    @property
    def layer_sparsity(self) -> dict[str, float]:
        """Pruned fraction of each parameter."""
        return {n: 1 - _count(entry) / entry.numel() for n, entry in self._entries.items()}

    @property
    def empty_layers(self) -> list[str]:
        """Parameters that are pruned to nothing."""
        return [name for name, entry in self._entries.items() if not entry.any()]

    def intersection(self, other: Mask) -> Mask:
        """Keep what both masks keep; of the metadata, what both say of the same weights.

        Raises:
            ValueError: if the masks are for different parameters.
        """
        self._check_fits(other)
        return Mask({n: entry & other[n] for n, entry in self.items()}, self._common(other))

    def union(self, other: Mask) -> Mask:
        """Keep what either mask keeps; of the metadata, what both say of the same weights.

        Raises:
            ValueError: if the masks are for different parameters.
        """
        self._check_fits(other)
        return Mask({n: entry | other[n] for n, entry in self.items()}, self._common(other))

    def overlap(self, other: Mask) -> float:
        """Intersection over union (Jaccard index) of the weights that the two masks keep.

        Between 0 (no weight in common) and 1 (equal, or both empty). Compare it with
        :meth:`expected_overlap`.

        Raises:
            ValueError: if the masks are for different parameters.
        """
        self._check_fits(other)
        both = sum(_count(entry & other[name]) for name, entry in self.items())
        either = self.kept + other.kept - both
        return both / either if either else 1.0

    def expected_overlap(self, other: Mask) -> float:
        """The overlap by chance: of masks that keep as many weights of each layer, but at random.

        Of a layer of n weights, two random masks that keep k and l share k l / n on average (the
        mean of a hypergeometric distribution). With I the sum of these means, this is
        I / (Σk + Σl − I), the intersection over union at the mean intersection; the mean of the
        ratio itself exceeds it by a relative error of the order of 1 / (number of weights). Two
        masks that keep a fraction d of every layer overlap by d / (2 − d).

        Raises:
            ValueError: if the masks are for different parameters.
        """
        self._check_fits(other)
        shared = sum(
            _count(entry) * _count(other[name]) / entry.numel() for name, entry in self.items()
        )
        either = self.kept + other.kept - shared
        return shared / either if either else 1.0

    def check(self, model: nn.Module, *, strict: bool = True) -> None:
        """Refuse a model that the mask was not made for.

        Names and shapes must fit. So must the encoder's name and the weights' checksum, where the
        metadata has them (:func:`describe_weights`). The checksum is of the dense weights, so it
        is not asked of a model whose pruned weights are all zero already, such as one that was
        repaired or fine-tuned after pruning: there is nothing left to prune.

        Args:
            model: the model to prune.
            strict: false accepts other weights and another encoder of the same names and shapes.

        Raises:
            ValueError: what does not fit.
        """
        parameters = dict(model.named_parameters())
        self._check(parameters)
        if not strict:
            return
        encoder = _encoder_name(model)
        if self.metadata.get("encoder", encoder) != encoder:
            raise ValueError(
                f"the mask was made for the encoder {self.metadata['encoder']!r}, not {encoder!r}; "
                "strict=False applies it all the same"
            )
        made_for = self.metadata.get("weights")
        if made_for is None or self._obeyed_by(parameters):
            return
        if made_for != _checksum_of_weights(parameters, self):
            raise ValueError(
                "the mask was made for other weights of the same shapes: their checksum is "
                f"{made_for}; load those weights, or strict=False applies it all the same"
            )

    @torch.no_grad()
    def apply_(self, model: nn.Module, *, strict: bool = True) -> None:
        """Set the pruned weights of ``model`` to zero, in place.

        Args:
            model: the dense model, or one that was pruned with this mask before.
            strict: as in :meth:`check`.

        Raises:
            ValueError: if :meth:`check` refuses the model, which is then untouched.
        """
        self.check(model, strict=strict)
        parameters = dict(model.named_parameters())
        for name, entry in self._entries.items():
            # Not a product: a non-finite weight that is pruned becomes zero as well.
            parameters[name].masked_fill_(~entry.to(parameters[name].device), 0)

    def report(self) -> dict[str, Any]:
        """Numbers of weights and sparsity, overall and of each layer, with the metadata."""
        return {
            "total": self.total,
            "kept": self.kept,
            "sparsity": self.sparsity,
            "empty_layers": self.empty_layers,
            "metadata": self.metadata,
            "layers": {
                name: {
                    "shape": list(entry.shape),
                    "total": entry.numel(),
                    "kept": _count(entry),
                    "sparsity": self.layer_sparsity[name],
                }
                for name, entry in self._entries.items()
            },
        }

    def save(self, path: str | Path) -> None:
        """Write the mask as safetensors, with its metadata and a checksum, and its report.

        The :meth:`report` goes to the same path with the suffix ``.json``, with the SHA-256 of the
        mask's file; nothing reads it back. Each file is written whole or not at all.

        Raises:
            ValueError: if ``path`` itself ends in ``.json``, or a file that is no mask's report
                stands where the report goes; nothing is written then.
        """
        path = Path(path)
        if path.suffix == ".json":
            raise ValueError(f"{path} is where the mask's report goes; end it in .safetensors")
        stem = path.name.removesuffix(".safetensors")  # any other dot is part of the name
        target = path.with_name(f"{stem}.json")
        if target.exists() and not _is_report(target):
            raise ValueError(
                f"the report of {path.name} goes to {target}, which is of something else; "
                "give the mask another name"
            )
        entries = {name: entry.to(torch.uint8) for name, entry in self._entries.items()}
        text = json.dumps(self.metadata, sort_keys=True)
        content = write_tensors(path, entries, text, format=_FORMAT)
        report = {
            "mask": path.name,
            "sha256": hashlib.sha256(content).hexdigest(),
            **self.report(),
        }
        write_atomically(target, json.dumps(report, indent=2).encode() + b"\n")

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> Mask:
        """Read a mask written by :meth:`save`.

        Args:
            path: the mask's file.
            model: what the mask must have been made for, by :meth:`check`; ``None`` leaves that
                to :meth:`apply_`.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is truncated, altered, or not a mask, or ``model`` is another.

        Examples:
            >>> import tempfile
            >>> from pathlib import Path
            >>> import torch
            >>> import pai_utils as pai
            >>> mask = pai.Mask({"weight": torch.tensor([True, False])}, {"scorer": "magnitude"})
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     mask.save(Path(folder) / "mask.safetensors")
            ...     found = pai.Mask.load(Path(folder) / "mask.safetensors")
            >>> found["weight"], found.metadata
            (tensor([ True, False]), {'scorer': 'magnitude'})
        """
        entries, header = read_tensors(path, _FORMAT, what="mask file")
        mask = cls(entries, json.loads(header["text"]))
        if model is not None:
            mask.check(model)
        return mask

    def _check(self, parameters: Mapping[str, Tensor], owner: str = "the model") -> None:
        missing = [name for name in self._entries if name not in parameters]
        if missing:
            raise ValueError(
                f"the mask is for another architecture: {owner} has no {listed(missing)}"
            )
        wrong = [
            f"{name} (mask {tuple(entry.shape)}, {owner.removeprefix('the ')} "
            f"{tuple(parameters[name].shape)})"
            for name, entry in self._entries.items()
            if entry.shape != parameters[name].shape
        ]
        if wrong:
            raise ValueError(f"the mask is for another architecture: shapes of {listed(wrong)}")

    def _check_fits(self, other: Mask) -> None:
        self._check(other, "the other mask")
        other._check(self, "the first mask")

    def _common(self, other: Mask) -> dict[str, str]:
        # What was asked of each mask says nothing about the sparsity of the two together.
        return {
            key: text
            for key, text in self.metadata.items()
            if key != "sparsity" and other.metadata.get(key) == text
        }

    def _obeyed_by(self, parameters: Mapping[str, Tensor]) -> bool:
        return not any(
            (parameters[name].detach().cpu() != 0).logical_and_(~entry).any()
            for name, entry in self._entries.items()
        )


def make_mask(
    scores: Mapping[str, Tensor],
    sparsity: float,
    scope: str = "global",
    *,
    within: Mask | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Mask:
    """Keep the weights with the highest scores.

    The number of pruned weights is exactly ``round(sparsity * n)`` of each group of n weights that
    are compared, also when scores tie; among equal scores (−0 and 0 are) the first in order is
    pruned first. All is computed on the CPU, so that no mask depends on a device.

    Args:
        scores: one tensor a parameter name, higher means keep.
        sparsity: fraction to prune, in [0, 1). For ``"N:M"`` it must be 1 − N/M.
        scope: which weights are compared with each other.

            - ``"global"``: all of them.
            - ``"layer"``: those of one parameter; every layer gets the same sparsity.
            - ``"erk"``: those of one parameter, with the layers' densities by :func:`erk_budget`
              and the exact count overall.
            - ``"N:M"`` (such as ``"2:4"``): every M consecutive weights along dimension 1, of
              which the N highest stay. That is the input dimension of linear layers
              ``[out, in]`` and of convolutions ``[out, in / groups, ...]``, there at each place
              of the kernel; of transposed convolutions it is the output. A last group of fewer
              than M keeps its N highest, so that depthwise convolutions (one input a group) lose
              nothing.
        within: an earlier mask; what it prunes stays pruned.
        metadata: kept with the mask.

    Raises:
        ValueError: for an impossible sparsity, an unknown scope, no scores or non-finite ones, or
            if ``within`` prunes more than ``sparsity`` asks for.

    Examples:
        >>> import torch
        >>> import pai_utils as pai
        >>> scores = {"weight": torch.tensor([[4.0, 1.0, 3.0, 2.0], [8.0, 7.0, 6.0, 5.0]])}
        >>> pai.make_mask(scores, sparsity=0.5)["weight"]
        tensor([[False, False, False, False],
                [ True,  True,  True,  True]])
        >>> pai.make_mask(scores, sparsity=0.5, scope="2:4")["weight"]
        tensor([[ True, False,  True, False],
                [ True,  True, False, False]])
    """
    pattern = check_sparsity(sparsity, scope)
    _check_scores(scores, pattern is not None, within)
    on_cpu = {name: values.detach().cpu() for name, values in scores.items()}
    kept: dict[str, Tensor] = {}
    if pattern is None:
        for names, pruned in _groups(scores, sparsity, scope):
            alive = None if within is None else [within[name] for name in names]
            if within is not None and pruned < sum(_count(~within[name]) for name in names):
                raise _comes_back(sparsity, within, names)
            layers = [on_cpu[name] for name in names]
            kept |= zip(names, _keep_highest(layers, pruned, alive), strict=True)
    else:
        for name, values in on_cpu.items():
            if within is not None:
                values = values.masked_fill(~within[name], -torch.inf)
            kept[name] = _keep_n_of_m(values, *pattern)
            if within is not None and (kept[name] & ~within[name]).any():
                raise _comes_back(sparsity, within, [name])
    return Mask(kept, metadata)


def erk_budget(shapes: Mapping[str, torch.Size], kept: int) -> dict[str, int]:
    """Number of weights to keep in each layer, by the Erdős–Rényi-kernel rule.

    The density of a layer is proportional to (Σ of its dimensions) / (∏ of its dimensions), which
    keeps more of small layers (Evci et al., "Rigging the Lottery", ICML 2020). A layer whose share
    exceeds its size stays dense, and the others share the rest. Shares are rounded so that their
    sum is ``kept``, each layer by at most one weight more than half, and so that no layer's number
    falls when ``kept`` grows (Webster's method): budgets of successive rounds are nested.

    Args:
        shapes: shape of each layer's weight.
        kept: number of weights to keep in all, at most that of all weights.

    Raises:
        ValueError: if there are fewer weights than ``kept``.

    Examples:
        >>> import torch
        >>> from pai_utils.masks import erk_budget
        >>> shapes = {"conv": torch.Size([8, 3, 3, 3]), "linear": torch.Size([10, 40])}
        >>> erk_budget(shapes, kept=200)
        {'conv': 51, 'linear': 149}
    """
    sizes = {name: shape.numel() for name, shape in shapes.items()}
    if not 0 <= kept <= sum(sizes.values()):
        raise ValueError(f"kept={kept} must be between 0 and {sum(sizes.values())}, all weights")
    claims = {name: sum(shape) for name, shape in shapes.items()}
    open_ = list(sizes)
    rate = Fraction(0)
    while open_:
        dense = sum(size for name, size in sizes.items() if name not in open_)
        rate = Fraction(kept - dense, sum(claims[name] for name in open_))
        full = [name for name in open_ if rate * claims[name] > sizes[name]]
        if not full:
            break
        open_ = [name for name in open_ if name not in full]
    budget = {
        name: int(rate * claims[name] + Fraction(1, 2)) if name in open_ else size
        for name, size in sizes.items()
    }
    # A layer's k-th weight is due at the rate (k - 1/2) / claim; ties go in the layers' order.
    order = {name: index for index, name in enumerate(sizes)}
    while (spare := kept - sum(budget.values())) != 0:
        step = 1 if spare > 0 else -1
        movable = [n for n in sizes if (budget[n] < sizes[n] if step > 0 else budget[n] > 0)]
        budget[
            min(
                movable,
                key=lambda n: (step * Fraction(2 * budget[n] + step, claims[n]), step * order[n]),
            )
        ] += step
    return budget


def check_sparsity(sparsity: float, scope: str) -> tuple[int, int] | None:
    """Refuse a sparsity or scope that :func:`make_mask` cannot serve; return N and M of ``"N:M"``.

    Raises:
        ValueError: for an impossible sparsity, an unknown scope, or a sparsity other than the
            scope's own.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity} must be in [0, 1): the fraction of weights to prune")
    if scope in SCOPES[:-1]:
        return None
    pattern = re.fullmatch(r"(\d+):(\d+)", scope)
    if pattern is None:
        raise ValueError(
            f"unknown scope {scope!r}; choose 'global', 'layer', 'erk' or 'N:M' such as '2:4'"
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


def describe_weights(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Metadata that ties a mask to the weights it is made for.

    Args:
        model: the dense model.
        names: the parameters that the mask covers.

    Returns:
        ``encoder``, the backbone's name (of other modules that of their class); ``provenance`` of
        a backbone's weights; ``weights``, the SHA-256 of the named weights with their names,
        shapes and type.

    Raises:
        ValueError: if the model has no such parameter.
    """
    backbone = model.backbone if isinstance(model, Classifier) else model
    parameters = dict(model.named_parameters())
    names = list(names)
    missing = [name for name in names if name not in parameters]
    if missing:
        raise ValueError(f"the model has no {listed(missing)}")
    return {
        "encoder": _encoder_name(model),
        **({"provenance": backbone.provenance.source} if isinstance(backbone, Backbone) else {}),
        "weights": _checksum_of_weights(parameters, names),
    }


def _encoder_name(model: nn.Module) -> str:
    backbone = model.backbone if isinstance(model, Classifier) else model
    if not isinstance(backbone, Backbone):
        return type(model).__name__
    # The folder of a local checkpoint is nobody else's, and no part of what it holds.
    kind, separator, path = backbone.name.partition("file:")
    return f"file:{Path(path).name}" if separator and not kind else backbone.name


def _checksum_of_weights(parameters: Mapping[str, Tensor], names: Iterable[str]) -> str:
    return "sha256:" + hash_tensors({name: parameters[name] for name in names})


def _check_scores(scores: Mapping[str, Tensor], grouped: bool, within: Mask | None) -> None:
    if not scores:
        raise ValueError("no scores to make a mask from")
    for name, values in scores.items():
        if values.numel() == 0:
            raise ValueError(f"scores of {name!r} are empty")
        # Finite bounds mean finite scores, and need no copy of them; NaN counts as a bound.
        if not torch.isfinite(torch.stack(torch.aminmax(values.detach()))).all():
            raise ValueError(f"scores of {name!r} are not finite")
        if grouped and values.dim() < 2:
            raise ValueError(f"a scope 'N:M' needs scores [out, in, ...], not 1-D {name!r}")
    if within is not None:
        within._check(scores, "the scoring")
        new = [name for name in scores if name not in within]
        if new:
            raise ValueError(f"the earlier mask has no {listed(new)}, which the scores name")


def _comes_back(sparsity: float, within: Mask, names: list[str]) -> ValueError:
    return ValueError(
        f"sparsity={sparsity} is below that of the earlier mask ({within.sparsity:.4f} overall) "
        f"in {listed([repr(name) for name in names])}; a pruned weight never comes back"
    )


def _groups(
    scores: Mapping[str, Tensor], sparsity: float, scope: str
) -> list[tuple[list[str], int]]:
    """The parameters whose weights are compared with each other, and how many of them go."""
    total = sum(values.numel() for values in scores.values())
    pruned = round(sparsity * total)
    if scope == "global":
        return [(list(scores), pruned)]
    if scope == "layer":
        return [([name], round(sparsity * values.numel())) for name, values in scores.items()]
    budget = erk_budget({name: values.shape for name, values in scores.items()}, total - pruned)
    return [([name], scores[name].numel() - kept) for name, kept in budget.items()]


def _keep_highest(layers: list[Tensor], pruned: int, alive: list[Tensor] | None) -> list[Tensor]:
    """Boolean tensors, false at the ``pruned`` lowest of all scores, of ties at the first.

    Scores that ``alive`` leaves out are the first to go.
    """
    if alive is None:
        alive = [torch.ones((), dtype=torch.bool).expand(values.shape) for values in layers]
    living = sum(map(_count, alive))
    keep_count = sum(entry.numel() for entry in alive) - pruned
    if keep_count == living:
        return alive
    threshold = _kth_smallest(layers, alive, living - keep_count)
    kept = []
    blocks: list[tuple[Tensor, Tensor, Tensor]] = []
    for values, entry in zip(layers, alive, strict=True):
        keep = torch.empty(values.shape, dtype=torch.bool)
        flat = (values.flatten(), entry.flatten(), keep.view(-1))
        blocks += zip(*(tensor.split(_BLOCK) for tensor in flat), strict=True)
        kept.append(keep)
    room = keep_count
    for values, entry, keep in blocks:
        torch.gt(values.to(threshold.dtype), threshold, out=keep).logical_and_(entry)
        room -= _count(keep)
    # At the threshold, as many of the last ones are kept as the exact count leaves room for.
    for values, entry, keep in reversed(blocks):
        if room == 0:
            break
        ties = (values.to(threshold.dtype) == threshold).logical_and_(entry)
        if (count := _count(ties)) > room:
            ties[ties.nonzero().squeeze(1)[: count - room]] = False
        keep |= ties
        room -= min(count, room)
    return kept


def _kth_smallest(layers: list[Tensor], alive: list[Tensor], k: int) -> Tensor:
    """The k-th lowest of all the scores together, as a scalar of the type that holds them all."""
    dtype = reduce(torch.promote_types, (values.dtype for values in layers))
    if dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32  # NumPy has no bfloat16
    pool = torch.empty(sum(map(_count, alive)), dtype=dtype)
    start = 0
    for values, entry in zip(layers, alive, strict=True):
        count = _count(entry)
        part = values if count == values.numel() else values[entry]
        pool[start : start + count].view(part.shape).copy_(part)
        start += count
    # In place and several times as fast as torch's kthvalue, which also returns an index.
    pool.numpy().partition(k - 1)
    return pool[k - 1].clone()


def _keep_n_of_m(values: Tensor, n: int, m: int) -> Tensor:
    """Keep the n highest of every m entries along dimension 1 (the input)."""
    kept = torch.empty(values.shape, dtype=torch.bool)
    # Sorting makes several arrays, one of them of 8-byte indices: less is done at a time.
    rows = max(1, _BLOCK // 8 // values[0].numel())
    for part, out in zip(values.split(rows), kept.split(rows), strict=True):
        last = part.movedim(1, -1)
        width = last.shape[-1]
        padded = nn.functional.pad(last, (0, -width % m), value=-torch.inf)
        groups = padded.unflatten(-1, (-1, m))
        # In a stable order the first of equal scores goes first; padding, last of all, is cut off.
        order = groups.argsort(dim=-1, stable=True)
        keep = torch.ones_like(groups, dtype=torch.bool).scatter_(-1, order[..., : m - n], False)
        out.copy_(keep.flatten(-2)[..., :width].movedim(-1, 1))
    return kept


def _is_report(path: Path) -> bool:
    """Whether :meth:`Mask.save` wrote it."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        return False
    return isinstance(found, dict) and {"mask", "sha256"} <= found.keys()


def _count(entry: Tensor) -> int:
    return int(torch.count_nonzero(entry))


def _as_boolean(name: str, value: Tensor) -> Tensor:
    if value.numel() == 0:
        raise ValueError(f"mask of {name!r} is empty")
    if value.dtype != torch.bool and not ((value == 0) | (value == 1)).all():
        raise ValueError(f"mask of {name!r} holds values other than 0 and 1")
    # A copy always: later changes to the caller's tensor are none of the mask's.
    kept = torch.empty(value.shape, dtype=torch.bool)
    return kept.copy_(value.detach())
