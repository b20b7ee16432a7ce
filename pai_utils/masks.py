"""Masks: which weights stay, chosen from scores, applied to models, kept in files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pai_utils.models.encoders import Backbone, Classifier, check_masks_hold
from pai_utils.scorers.registry import Scores
from pai_utils.support.common import forget, hash_tensors, listed
from pai_utils.support.contract import unwrapped
from pai_utils.support.stored import read_tensors, write_tensors

_FORMAT = "pai_utils.Mask/2"


class Mask(Mapping[str, Tensor]):
    """Which weights stay: one boolean tensor a parameter name, true where the weight is kept.

    Args:
        entries: boolean tensors (or 0/1 tensors of any type), copied to the CPU.
        metadata: text that travels with the mask's file, such as scorer, source task and seed.
            With the entries of :func:`describe_weights`, the mask fits those weights only.

    Raises:
        ValueError: if the mask is empty or a tensor holds anything but zeros and ones.

    Examples:
        >>> import torch
        >>> import pai_utils as pai
        >>> left = pai.Mask({"weight": torch.tensor([True, True, False, False])})
        >>> right = pai.Mask({"weight": torch.tensor([True, False, False, False])})
        >>> left.sparsity, left.overlap(right)
        (0.5, 0.5)
    """

    ties: int = 0
    """Weights whose scores tied across the cut, of which only some stay; not kept in files."""

    def __init__(
        self, entries: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
    ) -> None:
        if not entries:
            raise ValueError("a mask needs at least one parameter")
        self._entries = {name: _as_boolean(name, value) for name, value in entries.items()}
        self._kept = {name: int(entry.count_nonzero()) for name, entry in self._entries.items()}
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
        return sum(entry.numel() for entry in self.values())

    @property
    def kept(self) -> int:
        """Number of weights kept."""
        return sum(self._kept.values())

    @property
    def sparsity(self) -> float:
        """Pruned fraction of the weights under the mask."""
        return 1 - self.kept / self.total

    @property
    def layer_sparsity(self) -> dict[str, float]:
        """Pruned fraction of each parameter."""
        return {name: 1 - self._kept[name] / entry.numel() for name, entry in self.items()}

    @property
    def empty_layers(self) -> list[str]:
        """Parameters that are pruned to nothing."""
        return [name for name, kept in self._kept.items() if kept == 0]

    def overlap(self, other: Mask) -> float:
        """Intersection over union (Jaccard index) of the weights that the two masks keep.

        From 0 (no weight in common) to 1 (equal, or both empty); compare :meth:`expected_overlap`.

        Raises:
            ValueError: if the other mask is for other parameters.
        """
        return self._jaccard(other, lambda n: int((self[n] & other[n]).count_nonzero()))

    def expected_overlap(self, other: Mask) -> float:
        """The overlap by chance: of masks that keep as many weights of each layer, but at random.

        Of a layer of n weights, two random masks that keep k and l share k l / n on average. With I
        the sum of these means, this is I / (Σk + Σl − I). Two masks that keep a fraction d of every
        layer overlap by d / (2 − d).
        """
        return self._jaccard(other, lambda n: self._kept[n] * other._kept[n] / self[n].numel())

    def _jaccard(self, other: Mask, kept_by_both: Callable[[str], float]) -> float:
        self._check(other, "the other mask", alike=True)
        both = sum(map(kept_by_both, self))
        either = self.kept + other.kept - both
        return both / either if either else 1.0

    def check(self, model: nn.Module, *, strict: bool = True) -> None:
        """Refuse a model that the mask was not made for.

        Names and shapes must fit, and unless ``strict`` is false also the encoder's name and the
        weights' checksum, where the metadata has them (:func:`describe_weights`). A model whose
        pruned weights are all zero passes without its checksum: it was pruned by this mask, and
        perhaps repaired or fine-tuned since.

        Raises:
            ValueError: what does not fit.
        """
        model = unwrapped(model)
        parameters = dict(model.named_parameters())
        self._check(parameters, "the model")
        check_masks_hold(model, [n for n, entry in self.items() if self._kept[n] < entry.numel()])
        if not strict:
            return
        encoder = describe_weights(model, ())["encoder"]
        if self.metadata.get("encoder", encoder) != encoder:
            raise ValueError(
                f"the mask was made for the encoder {self.metadata['encoder']!r}, not {encoder!r}; "
                "strict=False applies it all the same"
            )
        made_for = self.metadata.get("weights")
        if (
            made_for is not None
            and any(((parameters[n].cpu() != 0) & ~entry).any() for n, entry in self.items())
            and made_for != describe_weights(model, self)["weights"]
        ):
            raise ValueError(
                "the mask was made for other weights of the same shapes: their checksum is "
                f"{made_for}; load those weights, or strict=False applies it all the same"
            )

    @torch.no_grad()
    def apply_(self, model: nn.Module, *, strict: bool = True) -> None:
        """Set the pruned weights of ``model`` to zero, in place; ``strict`` as in :meth:`check`.

        Raises:
            ValueError: if :meth:`check` refuses the model, which is then untouched.
        """
        self.check(model, strict=strict)
        for name, entry in self.items():
            parameter = unwrapped(model).get_parameter(name)
            # Not a product: a pruned weight that is not finite becomes zero as well.
            parameter.masked_fill_(~entry.to(parameter.device), 0)
        forget(model)

    def save(self, path: str | Path) -> None:
        """Write the mask as safetensors, with its metadata and a checksum."""
        entries = {name: entry.to(torch.uint8) for name, entry in self.items()}
        write_tensors(path, entries, json.dumps(self.metadata, sort_keys=True), format=_FORMAT)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> Mask:
        """Read a mask written by :meth:`save`, and :meth:`check` a model if one is given.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is truncated, altered, or not a mask, or ``model`` is another.
        """
        entries, text = read_tensors(path, _FORMAT, what="mask file")
        mask = cls(entries, json.loads(text))
        if model is not None:
            mask.check(model)
        return mask

    def _check(self, tensors: Mapping[str, Tensor], owner: str, *, alike: bool = False) -> None:
        """Refuse tensors that lack a name of the mask or, if ``alike``, have others too."""
        missing = [name for name in self if name not in tensors]
        new = [name for name in tensors if name not in self] if alike else []
        reshaped = [
            f"{name} (mask {tuple(entry.shape)}, {owner.removeprefix('the ')} "
            f"{tuple(tensors[name].shape)})"
            for name, entry in self.items()
            if name in tensors and entry.shape != tensors[name].shape
        ]
        different = {f"{owner} has no": missing, "the mask has no": new, "shapes of": reshaped}
        for what, names in different.items():
            if names:
                raise ValueError(f"the mask is for another architecture: {what} {listed(names)}")


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
    are compared, also when scores tie. Among equal scores the smallest weights are pruned first, if
    these are the :class:`~pai_utils.scorers.registry.Scores` of a model; among equal weights the
    first in order. ``ties`` of the mask counts the weights that only this rule parted. All is
    computed on the CPU, so that no mask depends on a device.

    Args:
        scores: one tensor a parameter name, higher means keep.
        sparsity: fraction to prune, in [0, 1); 0 prunes no more. For ``"N:M"`` it must be 1 − N/M.
        scope: which weights are compared with each other.

            - ``"global"``: all of them.
            - ``"layer"``: those of one parameter; every layer gets the same sparsity. One that is
              sparser already stays so, and the others keep more instead.
            - ``"N:M"`` (such as ``"2:4"``): every M consecutive weights along dimension 1, of
              which the N highest stay. That is the input of linear layers ``[out, in]`` and of
              convolutions ``[out, in / groups, ...]``, at each place of the kernel; of transposed
              convolutions it is the output. A last group of fewer than M keeps its N highest, so
              that depthwise convolutions lose nothing.
        within: an earlier mask; what it prunes stays pruned, and counts.
        metadata: kept with the mask.

    Raises:
        ValueError: for an impossible sparsity, an unknown scope, no scores or non-finite ones, or
            if ``within`` prunes more weights than ``sparsity`` asks for.

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
    pattern = check_sparsity(sparsity, scope, within)
    _check_scores(scores, pattern is not None, within)
    values = _comparable(scores)
    weights = _comparable(scores.weights) if isinstance(scores, Scores) else {}
    if within is not None:  # scores are finite, so that what is gone goes first
        values = {n: v.masked_fill(~within[n], -torch.inf) for n, v in values.items()}
    kept: dict[str, Tensor] = {}
    ties = 0
    if pattern is not None:
        for name in values:
            found, tied = _keep_n_of_m(values[name], weights.get(name), *pattern)
            # A group may have lost more than M - N already.
            kept[name] = found if within is None else found & within[name]
            ties += tied
    else:
        groups = [list(values)] if scope == "global" else [[name] for name in values]
        pools = [_flat(values, names) for names in groups]
        for names, pool, count in zip(groups, pools, _budgets(pools, sparsity), strict=True):
            found, tied = _keep_highest(pool, count, _flat(weights, names) if weights else None)
            parts = found.split([values[name].numel() for name in names])
            kept |= {n: part.view_as(values[n]) for n, part in zip(names, parts, strict=True)}
            ties += tied
    mask = Mask(kept, metadata)
    mask.ties = ties
    return mask


def _budgets(pools: Sequence[Tensor], sparsity: float) -> list[int]:
    """How many weights of each pool stay; what an earlier mask took from one, others keep more."""
    sizes = [len(pool) for pool in pools]
    left = [int(pool.isfinite().count_nonzero()) for pool in pools]
    budgets = [size - round(sparsity * size) for size in sizes]
    if all(budget <= most for budget, most in zip(budgets, left, strict=True)):
        return budgets
    # Pools fill up in proportion to their sizes: a pool's k-th weight is due at (k - 1/2) / size.
    due = [(np.arange(most) + 0.5) / size for most, size in zip(left, sizes, strict=True)]
    pool_of = np.repeat(np.arange(len(pools)), left)
    first = np.concatenate(due).argsort(kind="stable")[: sum(budgets)]
    return list(np.bincount(pool_of[first], minlength=len(pools)).tolist())


def check_sparsity(
    sparsity: float, scope: str, within: Mask | None = None
) -> tuple[int, int] | None:
    """Refuse what :func:`make_mask` cannot serve; return N and M of the scope ``"N:M"``."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity} must be in [0, 1): the fraction of weights to prune")
    sizes = [] if within is None else [kept.numel() for kept in within.values()]
    # A mask by layer is rounded in each, any other once.
    counts = (sum(n - round(sparsity * n) for n in groups) for groups in (sizes, [sum(sizes)]))
    if within and sparsity and within.kept < min(counts):
        raise ValueError(
            f"sparsity={sparsity} is below that of what is pruned already, {within.sparsity:.4f}; "
            "a pruned weight never comes back: ask for more, or start from a denser model"
        )
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


def describe_weights(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Metadata that ties a mask to the weights it is made for.

    ``encoder`` is the backbone's name or the module's class, ``provenance`` that of a backbone's
    weights, and ``weights`` the SHA-256 of the named weights.
    """
    model = unwrapped(model)
    backbone = model.backbone if isinstance(model, Classifier) else model
    described = {"encoder": type(backbone).__name__}
    if isinstance(backbone, Backbone):
        name, path = backbone.name, Path(backbone.name.removeprefix("file:"))
        # The folder of a local checkpoint is nobody else's, and no part of what it holds.
        described["encoder"] = f"file:{path.name}" if name.startswith("file:") else name
        described["provenance"] = backbone.provenance.source
    weights = {name: model.get_parameter(name) for name in names}
    return {**described, "weights": f"sha256:{hash_tensors(weights)}"}


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
        within._check(scores, "the scoring", alike=True)


def _comparable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, in one type, so that values of several types compare exactly."""
    # NumPy has no bfloat16.
    dtype = reduce(torch.promote_types, (v.dtype for v in tensors.values()), torch.float32)
    return {n: v.detach().to("cpu", dtype).contiguous() for n, v in tensors.items()}


def _flat(tensors: Mapping[str, Tensor], names: Iterable[str]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in names])


def _keep_highest(values: Tensor, count: int, weights: Tensor | None) -> tuple[Tensor, int]:
    """True at the ``count`` highest values, of ties at the largest weights; how many tied."""
    pruned = len(values) - count
    if pruned == 0:
        return torch.ones_like(values, dtype=torch.bool), 0
    # Several times as fast as torch's kthvalue, which also returns an index.
    threshold = float(np.partition(values.numpy(), pruned - 1)[pruned - 1])
    kept, tied = values > threshold, values == threshold
    room, ties = count - int(kept.count_nonzero()), int(tied.count_nonzero())
    if room == 0:
        return kept, 0
    if weights is None:
        kept[tied] = torch.arange(ties) >= ties - room
    else:
        kept[tied], _ = _keep_highest(weights[tied].abs(), room, None)
    return kept, ties


def _keep_n_of_m(values: Tensor, weights: Tensor | None, n: int, m: int) -> tuple[Tensor, int]:
    """Keep the n highest of every m entries along dimension 1 (the input); ties as above."""
    columns = values.shape[1]
    if n == m:
        return torch.ones_like(values, dtype=torch.bool), 0
    keys = [values] if weights is None else [weights.abs(), values]  # the last one counts first
    padded = [
        nn.functional.pad(key.movedim(1, -1), (0, -columns % m), value=-torch.inf) for key in keys
    ]
    groups = [key.unflatten(-1, (-1, m)) for key in padded]
    order = torch.from_numpy(np.lexsort(groups))
    ranked = groups[-1].gather(-1, order)
    keep = torch.ones_like(ranked, dtype=torch.bool).scatter_(-1, order[..., : m - n], False)
    highest_gone, lowest_kept = ranked[..., m - n - 1, None], ranked[..., m - n, None]
    tied = (ranked == highest_gone) & (highest_gone == lowest_kept) & highest_gone.isfinite()
    return keep.flatten(-2)[..., :columns].movedim(-1, 1), int(tied.count_nonzero())


def _as_boolean(name: str, value: Tensor) -> Tensor:
    if value.numel() == 0:
        raise ValueError(f"mask of {name!r} is empty")
    if value.dtype != torch.bool and not ((value == 0) | (value == 1)).all():
        raise ValueError(f"mask of {name!r} holds values other than 0 and 1")
    # A copy always: later changes to the caller's tensor are none of the mask's.
    return value.detach().to("cpu", torch.bool, copy=True).contiguous()
