import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pai_utils.masks import Mask, make_mask

SPARSITIES = st.floats(0, 0.999)


@st.composite
def some_scores(draw: st.DrawFn) -> dict[str, Tensor]:
    """Up to four layers, with few distinct values, so that many scores tie."""
    shapes = draw(
        st.lists(
            st.tuples(*[st.integers(1, 5)] * 2, st.sampled_from([1, 3])), min_size=1, max_size=4
        )
    )
    levels = draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return {
        f"layer{i}.weight": torch.randint(0, levels, shape, generator=generator).float() - 1
        for i, shape in enumerate(shapes)
    }


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
    flat = torch.cat([v.flatten() for v in scores.values()])
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
    scope=st.sampled_from(["global", "layer"]),
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
        if scope == "global"
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
        (0.5, "row", "unknown scope 'row'; choose 'global', 'layer' or 'N:M'"),
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


def test_no_scores_and_scores_without_an_input_dimension_are_refused() -> None:
    with pytest.raises(ValueError, match="no scores"):
        make_mask({}, 0.5)
    with pytest.raises(ValueError, match="1-D 'w'"):
        make_mask({"w": torch.ones(4)}, 0.5, "2:4")


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


@settings(deadline=None, max_examples=15)
@given(scores=some_scores(), sparsity=SPARSITIES, text=st.text(max_size=8))
def test_a_saved_mask_comes_back_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    scores: dict[str, Tensor],
    sparsity: float,
    text: str,
) -> None:
    path = tmp_path_factory.mktemp("masks") / "mask.safetensors"
    mask = make_mask(scores, sparsity, metadata={"source": text})
    mask.save(path)
    loaded = Mask.load(path)
    assert list(loaded) == sorted(mask) or list(loaded) == list(mask)
    assert all(torch.equal(loaded[n], mask[n]) for n in mask)
    assert loaded.metadata == {"source": text}


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path, altered = tmp_path / "mask.safetensors", tmp_path / "altered.safetensors"
    mask_for(nn.Sequential(nn.Linear(3, 2))).save(path)
    content = path.read_bytes()
    for offset in range(len(content)):
        flipped = bytearray(content)
        flipped[offset] ^= 1 << (offset % 8)
        altered.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"altered|truncated|not written by"):
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
    with pytest.raises(ValueError, match=r"not written by Mask\.save"):
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
    assert [p.name for p in tmp_path.iterdir()] == ["mask.safetensors"]


def test_overlap_is_the_shared_part_of_what_is_kept() -> None:
    first = Mask({"v": torch.tensor([1, 1, 0, 0]), "w": torch.tensor([1, 0])})
    second = Mask({"v": torch.tensor([1, 0, 1, 0]), "w": torch.tensor([1, 0])})
    assert first.overlap(second) == second.overlap(first) == pytest.approx(2 / 4)
    assert first.overlap(first) == 1
    nothing = Mask({"w": torch.zeros(6)})
    assert nothing.overlap(nothing) == 1
    with pytest.raises(ValueError, match="another architecture"):
        first.overlap(Mask({"v": torch.ones(4)}))
