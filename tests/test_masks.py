import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pai_utils.masks import Mask, describe_weights, make_mask
from pai_utils.scorers.registry import Scores
from pai_utils.support.stored import write_tensors
from tests.cases import fingerprint, tiny_classifier

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


def highest(values: Tensor, pruned: int) -> list[bool]:
    """What is kept of a vector by a stable sort: of equal values the first goes first."""
    keep = torch.ones(len(values), dtype=torch.bool)
    keep[values.double().argsort(stable=True)[:pruned]] = False
    return keep.tolist()


@settings(deadline=None, max_examples=100)
@given(scores=some_scores(), sparsity=SPARSITIES)
def test_masks_prune_the_exact_count_of_the_lowest_scores(
    scores: dict[str, Tensor], sparsity: float
) -> None:
    together = torch.cat([values.double().flatten() for values in scores.values()])
    wanted = round(sparsity * len(together))
    mask = make_mask(scores, sparsity)
    flat = torch.cat([entry.flatten() for entry in mask.values()])
    assert flat.tolist() == highest(together, wanted)
    assert (mask.total, mask.kept) == (len(together), len(together) - wanted)
    assert mask.sparsity == pytest.approx(wanted / len(together))
    by_layer = make_mask(scores, sparsity, "layer")
    for name, values in scores.items():
        alone = round(sparsity * values.numel())
        assert by_layer[name].flatten().tolist() == highest(values.flatten(), alone)
        assert by_layer.layer_sparsity[name] == pytest.approx(alone / values.numel())
        assert (name in by_layer.empty_layers) == (alone == values.numel())


@settings(deadline=None, max_examples=50)
@given(scores=some_scores(), n=st.integers(1, 4), m=st.integers(1, 4))
def test_patterns_keep_the_n_highest_of_every_m_along_the_input(
    scores: dict[str, Tensor], n: int, m: int
) -> None:
    n, m = min(n, m), max(n, m)
    scores["depthwise.weight"] = torch.randn(4, 1, 3, 3)  # loses nothing
    mask = make_mask(scores, 1 - n / m, f"{n}:{m}")
    for name, values in scores.items():
        rows, kept = (v.movedim(1, -1).flatten(0, -2) for v in (values, mask[name]))
        for row, keep in zip(rows, kept, strict=True):
            groups = row.split(m)
            assert keep.tolist() == [k for g in groups for k in highest(g, max(0, len(g) - n))]


@settings(deadline=None, max_examples=100)
@given(
    scores=some_scores(),
    first=SPARSITIES,
    second=SPARSITIES,
    scope=st.sampled_from(["global", "layer"]),
    same=st.booleans(),
)
@example({name: torch.ones(1) for name in "abc"}, 0.75, 0.75, "layer", True)  # rounded by layer
def test_a_pruned_weight_never_comes_back(
    scores: dict[str, Tensor], first: float, second: float, scope: str, same: bool
) -> None:
    first, second = sorted((first, second))
    early = make_mask(scores, first, scope if same else "global")
    inverted = {name: -values for name, values in scores.items()}
    late = make_mask(inverted, second, scope, within=early)
    assert all(bool((late[n] <= early[n]).all()) for n in scores)
    assert late.kept == min(make_mask(scores, second, scope).kept, early.kept)


def test_a_pattern_keeps_what_an_earlier_mask_pruned_and_no_mask_may_prune_less() -> None:
    early = make_mask({"w": torch.tensor([[4.0, 3, 2, 1]])}, 0.25)
    late = make_mask({"w": torch.tensor([[1.0, 2, 3, 9]])}, 0.5, "2:4", within=early)
    assert late["w"].tolist() == [[False, True, True, False]]
    scores = {"w": torch.arange(8.0).view(2, 4)}
    early = make_mask(scores, 0.75)
    for scope in ("global", "layer", "2:4"):
        with pytest.raises(ValueError, match=r"sparsity=0\.5 is below.*0\.7500; a pruned"):
            make_mask(scores, 0.5, scope, within=early)
    for scope in ("global", "layer"):
        assert torch.equal(make_mask(scores, 0, scope, within=early)["w"], early["w"])
    # Where more is gone already, a pattern keeps at most N.
    scores = {"w": torch.tensor([[4.0, 3, 2, 1, 9, 8, 7, 6]])}
    early = Mask({"w": torch.tensor([[1, 0, 0, 0, 1, 1, 1, 1]])})
    late = make_mask(scores, 0.5, "2:4", within=early)
    assert late["w"].int().tolist() == [[1, 0, 0, 0, 1, 1, 0, 0]]


ONES = {"w": torch.ones(4, 4)}


@pytest.mark.parametrize(
    ("scores", "sparsity", "scope", "message"),
    [
        (ONES, 1.0, "global", r"sparsity=1\.0 must be in \[0, 1\)"),
        (ONES, float("nan"), "layer", "sparsity=nan"),
        (ONES, 0.5, "row", "unknown scope 'row'; choose 'global', 'layer' or 'N:M'"),
        (ONES, 0.5, "2:", "unknown scope '2:'"),
        (ONES, 0.7, "2:4", r"sparsity is 0\.5, not 0\.7"),
        (ONES, 0.0, "0:4", "N must be in 1 to M"),
        ({}, 0.5, "global", "no scores"),
        ({"w": torch.ones(4)}, 0.5, "2:4", "1-D 'w'"),
        ({"w": torch.ones(4, 0)}, 0.5, "global", "scores of 'w' are empty"),
        (ONES | {"v": torch.tensor([1, torch.nan])}, 0.5, "global", "'v' are not finite"),
        (ONES | {"v": torch.tensor([1, -torch.inf])}, 0.5, "layer", "'v' are not finite"),
    ],
)
def test_impossible_scores_sparsities_and_scopes_are_refused(
    scores: dict[str, Tensor], sparsity: float, scope: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_mask(scores, sparsity, scope)


@pytest.mark.parametrize("scope", ["global", "layer", "2:4"])
def test_of_equal_scores_the_smallest_weights_go(scope: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(6, 8, generator=generator) for n in ("a", "b")}
    tied = {n: torch.zeros_like(w) for n, w in weights.items()}
    mask = make_mask(Scores(tied, "synflow", weights=weights), 0.5, scope)
    expected = make_mask({n: w.abs() for n, w in weights.items()}, 0.5, scope)
    assert all(torch.equal(mask[n], expected[n]) for n in weights)
    assert mask.ties == 96
    assert expected.ties == 0


def test_ties_are_counted_where_they_cross_the_cut() -> None:
    scores = {"a": torch.tensor([[0.0, 1.0, 1.0, 2.0], [3.0, 3.0, 3.0, 3.0]])}
    assert make_mask(scores, 0.25).ties == 2  # the cut lies between the two ones
    assert make_mask(scores, 0.375).ties == 0
    assert make_mask(scores, 0.5, "2:4").ties == 6
    assert make_mask(scores, 0.75, within=make_mask(scores, 0.5)).ties == 4


def test_the_order_of_ties_is_that_of_the_shape_and_not_of_the_memory() -> None:
    dense = torch.randint(0, 3, (4, 3, 5, 5), generator=torch.Generator().manual_seed(0)).float()
    last = dense.to(memory_format=torch.channels_last)
    for scope in ("global", "2:4"):
        one, other = (make_mask({"w": v}, 0.5, scope)["w"] for v in (dense, last))
        assert torch.equal(one, other)


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))


def mask_for(network: nn.Module, sparsity: float = 0.5) -> Mask:
    """A mask by magnitude that names the weights that it is made for."""
    names = [n for n, p in network.named_parameters() if p.dim() > 1]
    scores = {n: network.get_parameter(n).detach().abs() for n in names}
    metadata = {"scorer": "magnitude", "source": "dïgits", **describe_weights(network, names)}
    return make_mask(scores, sparsity, metadata=metadata)


def test_applying_zeroes_the_pruned_weights_alone_and_twice_changes_nothing() -> None:
    network, dense = small_model(), small_model()
    mask = mask_for(network)
    for _ in range(2):
        mask.apply_(network)
        for name, parameter in network.named_parameters():
            keep = mask[name] if name in mask else torch.ones_like(parameter, dtype=torch.bool)
            assert torch.equal(parameter[keep], dense.get_parameter(name)[keep])
            assert not parameter[~keep].any()


def test_a_pruned_weight_that_is_not_finite_becomes_zero() -> None:
    network = nn.Linear(2, 1)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[torch.nan, torch.inf]]))
    Mask({"weight": torch.zeros(1, 2)}).apply_(network)
    assert network.weight.tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"0.weight": (4, 3, 3, 3), "5.weight": (2, 4)}, r"the model has no 5\.weight"),
        (
            {"0.weight": (4, 3, 3, 3), "2.weight": (4, 2)},
            r"shapes of 2\.weight \(mask \(4, 2\), model \(2, 4\)\)",
        ),
    ],
)
def test_a_mask_of_another_architecture_leaves_the_model_untouched(
    shapes: dict[str, tuple[int, ...]], message: str, tmp_path: Path
) -> None:
    network = small_model()
    before = fingerprint(network)
    mask = Mask({name: torch.zeros(shape) for name, shape in shapes.items()})
    mask.save(tmp_path / "mask.safetensors")
    with pytest.raises(ValueError, match=f"another architecture: {message}"):
        mask.apply_(network)
    with pytest.raises(ValueError, match=f"another architecture: {message}"):
        Mask.load(tmp_path / "mask.safetensors", network)
    assert fingerprint(network) == before


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


def test_a_saved_mask_comes_back_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    mask = make_mask({"v": torch.rand(3, 4), "w": torch.rand(2)}, 0.5, metadata={"source": "dï\n"})
    mask.save("~/digits_s0.5")
    loaded = Mask.load(tmp_path / "digits_s0.5")
    assert sorted(loaded) == sorted(mask)
    assert all(torch.equal(loaded[n], mask[n]) for n in mask)
    assert loaded.metadata == {"source": "dï\n"}


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path: Path) -> None:
    path, altered = tmp_path / "mask.safetensors", tmp_path / "altered.safetensors"
    Mask({"w": torch.tensor([[1, 0, 1]])}, {"source": "dïgits"}).save(path)
    content = path.read_bytes()
    for offset in range(len(content)):
        flipped = bytearray(content)
        flipped[offset] ^= 1 << (offset % 8)
        altered.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"altered|truncated|is no mask file"):
            Mask.load(altered)
    for length in (0, 4, 8, 50, len(content) // 2, len(content) - 1):
        altered.write_bytes(content[:length])
        with pytest.raises(ValueError, match="truncated or no mask file"):
            Mask.load(altered)


def test_other_files_are_refused_and_no_pickle_runs(tmp_path: Path) -> None:
    path, mark = tmp_path / "mask.safetensors", tmp_path / "ran"
    two = {"w": torch.tensor([0, 2], dtype=torch.uint8)}
    for kind, message in (("another", "is no mask file"), ("pai_utils.Mask/2", "other than 0 and")):
        write_tensors(path, two, "{}", format=kind)
        with pytest.raises(ValueError, match=message):
            Mask.load(path)

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path(mark).write_text, ("ran",)

    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match="no mask file"):
        Mask.load(path)
    assert not mark.exists()


def test_masks_are_compared_by_what_they_keep() -> None:
    first = Mask({"v": torch.tensor([1, 1, 0, 0]), "w": torch.tensor([1, 0])})
    second = Mask({"v": torch.tensor([1, 0, 1, 0]), "w": torch.tensor([1, 0])})
    assert first.overlap(second) == second.overlap(first) == pytest.approx(2 / 4)
    assert first.overlap(first) == 1
    nothing = Mask({"w": torch.zeros(6)})
    assert nothing.overlap(nothing) == nothing.expected_overlap(nothing) == 1


def test_chance_overlap_is_that_of_random_masks_of_the_same_layer_densities() -> None:
    # Half of one layer and all of the other, against a quarter of both.
    one = Mask({"v": torch.tensor([1, 0] * 50), "w": torch.ones(20)})
    other = Mask({"v": torch.tensor([1, 0, 0, 0] * 25), "w": torch.tensor([1, 0, 0, 0] * 5)})
    shared = 50 * 25 / 100 + 20 * 5 / 20
    expected = shared / (50 + 20 + 25 + 5 - shared)
    assert one.expected_overlap(other) == other.expected_overlap(one) == pytest.approx(expected)


def test_masks_of_different_parameters_are_not_compared() -> None:
    mask = Mask({"v": torch.ones(2, 2), "w": torch.ones(2, 2)})
    for ones in ({"v": torch.ones(2, 2)}, {"v": torch.ones(2, 2), "w": torch.ones(2, 3)}):
        for compare in (mask.overlap, mask.expected_overlap):
            with pytest.raises(ValueError, match=r"another architecture: .*\bw\b"):
                compare(Mask(ones))
        with pytest.raises(ValueError, match=r"another architecture: .*\bw\b"):
            make_mask(ones, 0.5, within=mask)


def test_a_mask_from_a_file_fits_the_weights_it_was_made_for_alone(tmp_path: Path) -> None:
    path = tmp_path / "mask.safetensors"
    network = small_model()
    mask_for(network).save(path)
    mask = Mask.load(path, network)
    mask.apply_(network)
    Mask.load(path, network).apply_(network)  # again: nothing is left to prune
    for name in ("0.weight", "2.weight"):
        other = small_model()
        with torch.no_grad():
            other.get_parameter(name).view(-1)[0] *= -1
        before = fingerprint(other)
        with pytest.raises(ValueError, match=r"made for other weights.*sha256:.*strict=False"):
            Mask.load(path, other)
        with pytest.raises(ValueError, match="made for other weights"):
            mask.apply_(other)
        assert fingerprint(other) == before
    other = small_model()
    with torch.no_grad():
        other.get_parameter("0.bias").add_(1)  # no weight under the mask
    Mask.load(path, other).apply_(other)
    assert torch.equal(other.get_parameter("2.weight"), network.get_parameter("2.weight"))


def test_a_mask_of_another_encoder_is_refused_by_name() -> None:
    encoder = tiny_classifier().backbone
    mask = mask_for(encoder)
    encoder.name = "other"
    with pytest.raises(ValueError, match="made for the encoder 'tiny', not 'other'"):
        mask.check(encoder)
    mask.apply_(encoder, strict=False)
    assert not any(encoder.get_parameter(name)[~entry].any() for name, entry in mask.items())
