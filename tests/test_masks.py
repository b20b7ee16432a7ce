import hashlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pai_utils import masks
from pai_utils.masks import Mask, describe_weights, erk_budget, make_mask
from tests.cases import tiny_classifier

ROOT = Path(__file__).resolve().parents[1]
SPARSITIES = st.floats(0, 0.999)
SHAPES = st.lists(
    st.tuples(*[st.integers(1, 5)] * 2, st.sampled_from([1, 3])), min_size=1, max_size=4
)


@st.composite
def some_scores(draw: st.DrawFn) -> dict[str, Tensor]:
    """Up to four layers, with few distinct values, so that many scores tie; zeros of both signs."""
    shapes = draw(SHAPES)
    levels = draw(st.integers(1, 6))
    types = draw(st.sampled_from([[torch.float32], [torch.float64, torch.bfloat16]]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return {
        f"layer{i}.weight": (torch.randint(0, levels, shape, generator=generator) - 1)
        .mul(torch.tensor(-0.1, dtype=types[i % len(types)]))
        .to(types[i % len(types)])
        for i, shape in enumerate(shapes)
    }


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores are compared in blocks, here of a few: their edges must not show."""
    monkeypatch.setattr(masks, "_BLOCK", 3)


def pruned(entries: Mask | dict[str, Tensor]) -> int:
    return sum(int((~entry).sum()) for entry in entries.values())


@settings(deadline=None, max_examples=100)
@given(scores=some_scores(), sparsity=SPARSITIES)
def test_global_masks_have_the_exact_count_and_keep_the_highest(
    scores: dict[str, Tensor], sparsity: float
) -> None:
    mask = make_mask(scores, sparsity)
    assert pruned(mask) == round(sparsity * mask.total)
    assert mask.sparsity == pytest.approx(pruned(mask) / mask.total)
    flat = torch.cat([v.double().flatten() for v in scores.values()])
    keep = torch.cat([mask[n].flatten() for n in scores])
    if keep.any() and not keep.all():
        assert flat[keep].min() >= flat[~keep].max()
        # Among equal scores the first in order goes first.
        tied = flat == flat[~keep].max()
        assert keep[tied].int().diff().ge(0).all()


@settings(deadline=None, max_examples=100)
@given(scores=some_scores(), sparsity=SPARSITIES)
def test_layer_masks_have_the_exact_count_in_every_layer(
    scores: dict[str, Tensor], sparsity: float
) -> None:
    mask = make_mask(scores, sparsity, "layer")
    for name, entry in mask.items():
        assert int((~entry).sum()) == round(sparsity * entry.numel())
        assert mask.layer_sparsity[name] == pytest.approx(float((~entry).double().mean()))
    assert mask.empty_layers == [n for n, entry in mask.items() if not entry.any()]


@settings(deadline=None, max_examples=100)
@given(scores=some_scores(), n=st.integers(1, 4), m=st.integers(1, 4))
def test_patterns_keep_the_n_highest_of_every_m_along_the_input(
    scores: dict[str, Tensor], n: int, m: int
) -> None:
    n, m = min(n, m), max(n, m)
    mask = make_mask(scores, 1 - n / m, f"{n}:{m}")
    for name, values in scores.items():
        for rows, kept in zip(
            values.movedim(1, -1).flatten(0, -2),
            mask[name].movedim(1, -1).flatten(0, -2),
            strict=True,
        ):
            for group, keep in zip(rows.split(m), kept.split(m), strict=True):
                assert int(keep.sum()) == min(n, len(group))
                if keep.any() and not keep.all():
                    assert group[keep].min() >= group[~keep].max()


@settings(deadline=None, max_examples=100)
@given(
    scores=some_scores(),
    first=SPARSITIES,
    second=SPARSITIES,
    scope=st.sampled_from(["global", "layer", "erk"]),
)
def test_a_pruned_weight_never_comes_back(
    scores: dict[str, Tensor], first: float, second: float, scope: str
) -> None:
    first, second = sorted((first, second))
    early = make_mask(scores, first, scope)
    inverted = {name: -values for name, values in scores.items()}
    late = make_mask(inverted, second, scope, within=early)
    assert all(bool((late[n] <= early[n]).all()) for n in scores)
    assert pruned(late) == (
        round(second * late.total)
        if scope != "layer"
        else sum(round(second * v.numel()) for v in scores.values())
    )


def test_a_pattern_within_an_earlier_mask_keeps_what_it_pruned() -> None:
    early = make_mask({"w": torch.tensor([[4.0, 3, 2, 1]])}, 0.25)
    late = make_mask({"w": torch.tensor([[1.0, 2, 3, 9]])}, 0.5, "2:4", within=early)
    assert late["w"].tolist() == [[False, True, True, False]]


def test_an_earlier_mask_that_prunes_more_is_refused() -> None:
    scores = {"w": torch.arange(8.0).view(2, 4)}
    early = make_mask(scores, 0.75)
    with pytest.raises(ValueError, match=r"sparsity=0\.5 is below.*0\.7500.*'w'"):
        make_mask(scores, 0.5, within=early)
    with pytest.raises(ValueError, match=r"'w'.*never comes back"):
        make_mask(scores, 0.5, "2:4", within=early)


@pytest.mark.parametrize("name", ["v", "w"])
def test_an_earlier_mask_of_other_parameters_is_refused(name: str) -> None:
    early = Mask({name: torch.ones(2, 2)})
    other = {"v": torch.ones(2, 2), "w": torch.ones(2, 2)}
    with pytest.raises(ValueError, match=r"\b[vw]\b"):
        make_mask(other, 0.5, within=early)
    with pytest.raises(ValueError, match="another architecture"):
        make_mask({"w": torch.ones(2, 3)}, 0.5, within=early)


@pytest.mark.parametrize(
    ("sparsity", "scope", "message"),
    [
        (1.0, "global", r"sparsity=1\.0 must be in \[0, 1\)"),
        (-0.1, "global", r"sparsity=-0\.1"),
        (float("nan"), "layer", "sparsity=nan"),
        (0.5, "row", "unknown scope 'row'; choose 'global', 'layer', 'erk' or 'N:M'"),
        (0.5, "2:", "unknown scope '2:'"),
        (0.7, "2:4", r"sparsity is 0\.5, not 0\.7"),
        (0.0, "0:4", "N must be in 1 to M"),
        (0.0, "5:4", "N must be in 1 to M"),
        (0.0, "2:0", "N must be in 1 to M"),
    ],
)
def test_impossible_sparsities_and_scopes_are_refused(
    sparsity: float, scope: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_mask({"w": torch.ones(4, 4)}, sparsity, scope)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="scores of 'w' are not finite"):
        make_mask({"v": torch.ones(2, 2), "w": torch.tensor([[1.0, value]])}, 0.5)


def test_scores_that_all_tie_go_in_order() -> None:
    scores = {"v": torch.zeros(2, 2), "w": -torch.zeros(3)}
    mask = make_mask(scores, 5 / 7)
    assert [mask["v"].tolist(), mask["w"].tolist()] == [[[False] * 2] * 2, [False, True, True]]
    assert make_mask(scores, 0.0).sparsity == 0


@pytest.mark.parametrize("scope", ["global", "layer", "erk", "2:4"])
def test_the_size_of_blocks_makes_no_difference(
    scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {n: torch.randint(0, 9, (7, 5, 3), generator=generator).float() for n in "vw"}
    early = make_mask(scores, 0.25, scope) if scope != "2:4" else None
    small = make_mask(scores, 0.5, scope, within=early)
    monkeypatch.setattr(masks, "_BLOCK", 2**22)
    whole = make_mask(scores, 0.5, scope, within=early)
    assert all(torch.equal(whole[n], small[n]) for n in scores)


def test_the_order_of_ties_is_that_of_the_shape_and_not_of_the_memory() -> None:
    dense = torch.randint(0, 3, (4, 3, 5, 5), generator=torch.Generator().manual_seed(0)).float()
    last = dense.to(memory_format=torch.channels_last)
    for scope in ("global", "2:4"):
        one, other = (make_mask({"w": v}, 0.5, scope)["w"] for v in (dense, last))
        assert torch.equal(one, other)


def test_budgets_by_the_erdos_renyi_kernel_rule() -> None:
    shapes = {
        "wide": torch.Size([100, 50]),
        "conv": torch.Size([10, 20, 3, 3]),
        "thin": torch.Size([2, 3]),
    }
    # Claims 150, 36 and 5, in all 191: at 382 weights each gets two for each unit of its claim,
    # which is more than the 6 of the last; the 4 too many go to the others.
    assert erk_budget(shapes, 382) == {"wide": 303, "conv": 73, "thin": 6}
    assert erk_budget(shapes, 6806) == {"wide": 5000, "conv": 1800, "thin": 6}
    assert erk_budget(shapes, 0) == dict.fromkeys(shapes, 0)
    with pytest.raises(ValueError, match="kept=6807 must be between 0 and 6806"):
        erk_budget(shapes, 6807)


@settings(deadline=None, max_examples=100)
@given(shapes=SHAPES)
def test_budgets_are_exact_proportional_and_nested(shapes: list[tuple[int, ...]]) -> None:
    layers = {f"layer{i}": torch.Size(shape) for i, shape in enumerate(shapes)}
    sizes = {name: shape.numel() for name, shape in layers.items()}
    before = dict.fromkeys(layers, 0)
    for kept in range(sum(sizes.values()) + 1):
        budget = erk_budget(layers, kept)
        assert sum(budget.values()) == kept
        assert all(before[name] <= budget[name] <= sizes[name] for name in layers)
        # One rate fits all: no layer below its size is more than a weight behind another.
        due = [(budget[n] - 1) / sum(layers[n]) for n in layers if budget[n]]
        free = [(budget[n] + 1) / sum(layers[n]) for n in layers if budget[n] < sizes[n]]
        assert not due or not free or max(due) <= min(free)
        before = budget


@settings(deadline=None, max_examples=50)
@given(scores=some_scores(), sparsity=SPARSITIES)
def test_budgeted_masks_have_the_exact_count_and_keep_the_highest_of_each_layer(
    scores: dict[str, Tensor], sparsity: float
) -> None:
    mask = make_mask(scores, sparsity, "erk")
    assert pruned(mask) == round(sparsity * mask.total)
    budget = erk_budget({n: v.shape for n, v in scores.items()}, mask.kept)
    for name, entry in mask.items():
        assert int(entry.sum()) == budget[name]
        if entry.any() and not entry.all():
            assert scores[name][entry].min() >= scores[name][~entry].max()


def test_depthwise_convolutions_lose_nothing_to_a_pattern() -> None:
    mask = make_mask({"w": torch.randn(8, 1, 3, 3)}, 0.5, "2:4")
    assert mask["w"].all()


def test_no_scores_and_scores_without_an_input_dimension_are_refused() -> None:
    with pytest.raises(ValueError, match="no scores"):
        make_mask({}, 0.5)
    with pytest.raises(ValueError, match="1-D 'w'"):
        make_mask({"w": torch.ones(4)}, 0.5, "2:4")
    with pytest.raises(ValueError, match="scores of 'w' are empty"):
        make_mask({"w": torch.ones(4, 0)}, 0.5)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))


def mask_for(network: nn.Module, sparsity: float = 0.5) -> Mask:
    scores = {n: p.detach().abs() for n, p in network.named_parameters() if p.dim() > 1}
    return make_mask(scores, sparsity, metadata={"scorer": "magnitude", "source": "dïgits"})


def test_applying_zeroes_the_pruned_weights_alone_and_twice_changes_nothing() -> None:
    network = model()
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    mask = mask_for(network)
    mask.apply_(network)
    once = {n: p.detach().clone() for n, p in network.named_parameters()}
    mask.apply_(network)
    for name, parameter in network.named_parameters():
        keep = mask[name] if name in mask else torch.ones_like(parameter, dtype=torch.bool)
        assert torch.equal(parameter[keep], before[name][keep])
        assert not parameter[~keep].any()
        assert torch.equal(parameter, once[name])


def test_a_pruned_weight_that_is_not_finite_becomes_zero() -> None:
    network = nn.Linear(2, 1)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[torch.nan, torch.inf]]))
    Mask({"weight": torch.zeros(1, 2)}).apply_(network)
    assert network.weight.tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"0.weight": torch.zeros(4, 3, 3, 3), "5.weight": torch.zeros(2, 4)}, r"no 5\.weight"),
        (
            {"0.weight": torch.zeros(4, 3, 3, 3), "2.weight": torch.zeros(4, 2)},
            r"2\.weight \(mask \(4, 2\), model \(2, 4\)\)",
        ),
    ],
)
def test_a_mask_of_another_architecture_leaves_the_model_untouched(
    entries: dict[str, Tensor], message: str
) -> None:
    network = model()
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    with pytest.raises(ValueError, match=message):
        Mask(entries).apply_(network)
    assert all(torch.equal(p, before[n]) for n, p in network.named_parameters())


def test_a_mask_holds_zeros_and_ones_of_its_own() -> None:
    given_ = torch.ones(2, 2, dtype=torch.bool)
    mask = Mask({"w": given_})
    given_.zero_()
    assert mask["w"].all()
    assert mask["w"].dtype is torch.bool
    for bad in (0.5, 2.0, -1.0, torch.nan):
        with pytest.raises(ValueError, match="'w' holds values other than 0 and 1"):
            Mask({"w": torch.tensor([1.0, bad])})
    with pytest.raises(ValueError, match="at least one parameter"):
        Mask({})
    with pytest.raises(ValueError, match="mask of 'w' is empty"):
        Mask({"w": torch.ones(0)})
    with pytest.raises(ValueError, match="metadata of a mask is text, not 'seed': 4"):
        Mask({"w": given_}, {"seed": 4})  # type: ignore[dict-item]


@settings(deadline=None, max_examples=15)
@given(scores=some_scores(), sparsity=SPARSITIES, text=st.text(max_size=8))
def test_a_saved_mask_comes_back_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    scores: dict[str, Tensor],
    sparsity: float,
    text: str,
) -> None:
    path = tmp_path_factory.mktemp("masks") / "mask.1.safetensors"
    mask = make_mask(scores, sparsity, metadata={"source": text})
    mask.save(path)
    loaded = Mask.load(path)
    assert sorted(loaded) == sorted(mask)
    assert all(torch.equal(loaded[n], mask[n]) for n in mask)
    assert loaded.metadata == {"source": text}
    report = json.loads(path.with_name("mask.1.json").read_text())
    assert report["mask"] == path.name
    assert report["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert report["metadata"] == {"source": text}
    assert (report["total"], report["kept"]) == (mask.total, mask.kept)
    assert report["sparsity"] == mask.sparsity
    assert report["empty_layers"] == mask.empty_layers
    assert list(report["layers"]) == list(mask)
    for name, layer in report["layers"].items():
        assert layer == {
            "shape": list(mask[name].shape),
            "total": mask[name].numel(),
            "kept": int(mask[name].sum()),
            "sparsity": mask.layer_sparsity[name],
        }


def test_names_with_a_dot_keep_their_own_reports(tmp_path: Path) -> None:
    for sparsity in ("0.5", "0.7"):
        Mask({"w": torch.ones(2)}).save(tmp_path / f"digits_s{sparsity}")
    names = ["digits_s0.5", "digits_s0.5.json", "digits_s0.7", "digits_s0.7.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize("content", ['{"run": "atlas"}', "[1, 2]", "not JSON"])
def test_a_report_replaces_nothing_else(tmp_path: Path, content: str) -> None:
    (tmp_path / "record.json").write_text(content)
    with pytest.raises(ValueError, match=r"record\.json, which is of something else"):
        Mask({"w": torch.ones(2)}).save(tmp_path / "record.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]
    assert (tmp_path / "record.json").read_text() == content


def test_a_mask_is_not_saved_over_its_own_report(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"end it in \.safetensors"):
        Mask({"w": torch.ones(2)}).save(tmp_path / "mask.json")
    assert not list(tmp_path.iterdir())


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path, altered = tmp_path / "mask.safetensors", tmp_path / "altered.safetensors"
    mask_for(nn.Sequential(nn.Linear(3, 2))).save(path)
    content = path.read_bytes()
    for offset in range(len(content)):
        flipped = bytearray(content)
        flipped[offset] ^= 1 << (offset % 8)
        altered.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"altered|truncated|is no mask file"):
            Mask.load(altered)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mask.safetensors"
    mask_for(model()).save(path)
    content = path.read_bytes()
    for length in (0, 4, 8, 50, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="truncated or no mask file"):
            Mask.load(path)


def test_other_files_are_refused_and_no_pickle_runs(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "mask.safetensors"
    with pytest.raises(FileNotFoundError, match="no mask file"):
        Mask.load(path)
    save_file({"w": torch.ones(2, dtype=torch.uint8)}, path)
    with pytest.raises(ValueError, match="is no mask file"):
        Mask.load(path)
    mark = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path(mark).write_text, ("ran",)

    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match="no mask file"):
        Mask.load(path)
    assert not mark.exists()


def test_entries_other_than_zero_and_one_are_refused_even_with_a_right_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mask.safetensors"
    mask = Mask({"w": torch.ones(4)})
    mask._entries["w"] = torch.tensor([0, 1, 2, 1], dtype=torch.uint8)
    mask.save(path)
    with pytest.raises(ValueError, match="values other than 0 and 1"):
        Mask.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mask.safetensors"
    first = mask_for(model(), 0.25)
    first.save(path)

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        mask_for(model(), 0.75).save(path)
    assert Mask.load(path).sparsity == first.sparsity
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mask.json", "mask.safetensors"]
    report = json.loads((tmp_path / "mask.json").read_text())
    assert report["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_overlap_is_the_shared_part_of_what_is_kept() -> None:
    first = Mask({"v": torch.tensor([1, 1, 0, 0]), "w": torch.tensor([1, 0])})
    second = Mask({"v": torch.tensor([1, 0, 1, 0]), "w": torch.tensor([1, 0])})
    assert first.overlap(second) == second.overlap(first) == pytest.approx(2 / 4)
    assert first.overlap(first) == 1
    nothing = Mask({"w": torch.zeros(6)})
    assert nothing.overlap(nothing) == 1
    with pytest.raises(ValueError, match="another architecture"):
        first.overlap(Mask({"v": torch.ones(4)}))


@settings(deadline=None, max_examples=50)
@given(scores=some_scores(), first=SPARSITIES, second=SPARSITIES)
def test_set_operations_are_those_of_the_kept_weights(
    scores: dict[str, Tensor], first: float, second: float
) -> None:
    one = make_mask(scores, first, metadata={"weights": "a", "seed": "0", "sparsity": "0.5"})
    other = make_mask(
        {n: -v for n, v in scores.items()},
        second,
        metadata={"weights": "a", "seed": "1", "sparsity": "0.5"},
    )
    both, either = one.intersection(other), one.union(other)
    for name in scores:
        assert torch.equal(both[name], one[name] & other[name])
        assert torch.equal(either[name], one[name] | other[name])
    assert both.metadata == either.metadata == {"weights": "a"}
    assert both.kept + either.kept == one.kept + other.kept
    assert one.overlap(other) == (both.kept / either.kept if either.kept else 1.0)


def test_chance_overlap_is_that_of_random_masks_of_the_same_layer_densities() -> None:
    # Half of one layer and all of the other, against a quarter of both.
    one = Mask({"v": torch.tensor([1, 0] * 50), "w": torch.ones(20)})
    other = Mask({"v": torch.tensor([1, 0, 0, 0] * 25), "w": torch.tensor([1, 0, 0, 0] * 5)})
    shared = 50 * 25 / 100 + 20 * 5 / 20
    expected = shared / (50 + 20 + 25 + 5 - shared)
    assert one.expected_overlap(other) == other.expected_overlap(one) == pytest.approx(expected)
    generator = torch.Generator().manual_seed(0)
    drawn = [
        one.overlap(
            Mask({n: e.flatten()[torch.randperm(len(e), generator=generator)] for n, e in pair})
        )
        for pair in [list(other.items())] * 2000
    ]
    # Over 2,000 draws the standard error is 0.0007; the bound of the mean ratio is as small.
    assert sum(drawn) / len(drawn) == pytest.approx(expected, abs=0.003)
    third = make_mask({"w": torch.rand(40, 25)}, 0.7)
    assert third.expected_overlap(third) == pytest.approx(0.3 / 1.7)
    nothing = Mask({"w": torch.zeros(6)})
    assert nothing.expected_overlap(nothing) == 1


@pytest.mark.parametrize("other", [{"v": (4,)}, {"v": (4,), "w": (2,), "x": (1,)}, {"v": (5,)}])
@pytest.mark.parametrize("operation", ["intersection", "union", "overlap", "expected_overlap"])
def test_masks_of_different_parameters_are_not_combined(
    operation: str, other: dict[str, tuple[int, ...]]
) -> None:
    mask = Mask({"v": torch.ones(4), "w": torch.ones(2)})
    second = Mask({name: torch.ones(shape) for name, shape in other.items()})
    with pytest.raises(ValueError, match=r"another architecture: (the|shapes of v)"):
        getattr(mask, operation)(second)


def described_mask(network: nn.Module, sparsity: float = 0.5) -> Mask:
    names = [n for n, p in network.named_parameters() if p.dim() > 1]
    scores = {n: network.get_parameter(n).detach().abs() for n in names}
    return make_mask(scores, sparsity, metadata=describe_weights(network, names))


def test_a_mask_from_a_file_fits_the_weights_it_was_made_for_alone(tmp_path: Path) -> None:
    path = tmp_path / "mask.safetensors"
    network = model()
    described_mask(network).save(path)
    mask = Mask.load(path, network)
    mask.apply_(network)
    Mask.load(path, network).apply_(network)  # again: nothing is left to prune
    once = {n: p.detach().clone() for n, p in network.named_parameters()}
    for name, spared in (("0.weight", "2.weight"), ("2.weight", "0.weight")):
        other = model()
        with torch.no_grad():
            other.get_parameter(name).view(-1)[0] *= -1
        with pytest.raises(ValueError, match=r"made for other weights.*sha256:.*strict=False"):
            Mask.load(path, other)
        with pytest.raises(ValueError, match="made for other weights"):
            mask.apply_(other)
        assert torch.equal(other.get_parameter(spared), model().get_parameter(spared))
    other = model()
    with torch.no_grad():
        other.get_parameter("0.bias").add_(1)  # no weight under the mask
    Mask.load(path, other).apply_(other)
    assert torch.equal(other.get_parameter("2.weight"), once["2.weight"])
    with pytest.raises(ValueError, match=r"no 0\.weight"):
        Mask.load(path, nn.Sequential(nn.Flatten()))


def test_a_mask_of_another_encoder_is_refused_by_name() -> None:
    network = tiny_classifier()
    mask = described_mask(network.backbone)
    network.backbone.name = "other"
    for sparsity in (0.0, 0.5):
        mask = make_mask({n: mask[n].float() for n in mask}, sparsity, metadata=mask.metadata)
        with pytest.raises(ValueError, match="made for the encoder 'tiny', not 'other'"):
            mask.check(network.backbone)
    mask.apply_(network.backbone, strict=False)
    assert mask._obeyed_by(dict(network.backbone.named_parameters()))


def test_weights_are_described_by_encoder_provenance_and_checksum() -> None:
    network = tiny_classifier()
    name = "backbone.encoder.0.weight"
    described = describe_weights(network, [name])
    assert described["encoder"] == network.backbone.name
    assert described["provenance"] == network.backbone.provenance.source
    weight = network.get_parameter(name).detach()
    text = f"{name} (8, 3, 3, 3) torch.float32\n".encode() + weight.numpy().tobytes()
    assert described["weights"] == "sha256:" + hashlib.sha256(text).hexdigest()
    assert describe_weights(nn.Linear(2, 2), ["weight"]).keys() == {"encoder", "weights"}
    with pytest.raises(ValueError, match="the model has no encoder"):
        describe_weights(network, ["encoder"])


def test_the_folder_of_a_checkpoint_is_not_told(tmp_path: Path) -> None:
    network = tiny_classifier()
    network.backbone.name = f"file:{tmp_path}/encoder.pth@resnet18"
    assert describe_weights(network, [])["encoder"] == "file:encoder.pth@resnet18"


@settings(deadline=None, max_examples=60)
@given(
    scores=some_scores(),
    sparsity=SPARSITIES,
    place=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
)
def test_any_cut_and_any_flipped_bit_is_noticed(
    tmp_path_factory: pytest.TempPathFactory,
    scores: dict[str, Tensor],
    sparsity: float,
    place: float,
    bit: int,
) -> None:
    path = tmp_path_factory.mktemp("masks") / "mask.safetensors"
    make_mask(scores, sparsity, metadata={"source": "dïgits"}).save(path)
    content = path.read_bytes()
    offset = int(place * len(content))
    flipped = bytearray(content)
    flipped[offset] ^= 1 << bit
    for altered in (bytes(flipped), content[:offset], content + b"0"):
        path.write_bytes(altered)
        with pytest.raises(ValueError, match=r"altered|truncated|is no mask file"):
            Mask.load(path)


@settings(deadline=None, max_examples=40)
@given(scores=some_scores(), sparsity=SPARSITIES, data=st.data())
def test_wrong_names_and_shapes_in_a_file_are_noticed(
    tmp_path_factory: pytest.TempPathFactory,
    scores: dict[str, Tensor],
    sparsity: float,
    data: st.DataObject,
) -> None:
    path = tmp_path_factory.mktemp("masks") / "mask.safetensors"
    network = nn.Module()
    for name, values in scores.items():
        layer = nn.Module()
        layer.weight = nn.Parameter(values.float())
        network.add_module(name.removesuffix(".weight"), layer)
    mask = make_mask(scores, sparsity)
    mask.save(path)
    Mask.load(path, network).apply_(network)
    changed = data.draw(st.sampled_from(list(mask)))
    renamed = {n.replace(changed, "other.weight"): entry for n, entry in mask.items()}
    reshaped = dict(mask) | {changed: mask[changed].unsqueeze(0)}
    for entries, message in ((renamed, r"no other\.weight"), (reshaped, f"shapes of {changed}")):
        Mask(entries).save(path)
        with pytest.raises(ValueError, match=f"another architecture.*{message}"):
            Mask.load(path, network)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_a_mask_takes_no_more_than_two_further_copies_of_the_scores() -> None:
    code = """
import torch
from pathlib import Path
from pai_utils.masks import make_mask

def kib(key):
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0])

scores = {"w": torch.rand(20_000, 1_000)}
make_mask({"w": torch.rand(8, 8)}, 0.5)
for scope in ("global", "layer", "erk", "2:4"):
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before = kib("VmRSS")
    make_mask(scores, 0.5, scope)
    print((kib("VmHWM") - before) / (20e6 * 4 / 1024))
"""
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT
    ).stdout
    copies = [float(line) for line in output.split()]
    assert len(copies) == 4
    assert max(copies) <= 2
