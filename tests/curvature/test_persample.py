from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pai_utils.curvature import persample
from pai_utils.curvature.persample import sum_squared_gradients
from pai_utils.support.common import undisturbed
from tests.cases import Case, Images, Layers, build, fingerprint, largest_error, logits_of


def squares(case: Case, cotangents: Tensor, batch_size: int) -> dict[str, Tensor]:
    rows = torch.arange(len(case.data)).split(batch_size)
    batches = [(*case.data.batch(part), part) for part in rows]
    with undisturbed(case.model):
        return sum_squared_gradients(
            case.model, case.names, batches, lambda logits, labels, part: [cotangents[part]]
        )


def cotangents_for(case: Case) -> Tensor:
    logits = logits_of(case.model, case.data.images)
    return torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=logits.dtype)


@pytest.mark.parametrize("name", ["conv", "depthwise convs", "linear over tokens"])
def test_gradients_formed_in_parts_give_the_same_sum(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = build(name)
    cotangents = cotangents_for(case)
    expected = squares(case, cotangents, 5)
    for entries in (1, 10, 100):
        monkeypatch.setattr(persample, "_CPU_BLOCK_BYTES", 8 * entries)
        assert largest_error(squares(case, cotangents, 5), expected) <= 1e-12


def test_checkpointing_that_hides_gradients_is_refused() -> None:
    case = build("conv")
    assert isinstance(case.model, nn.Sequential)
    model = Layers(
        lambda m, x: checkpoint(m.rest, m.first(x), use_reentrant=True),
        first=case.model[0],
        rest=case.model[1:],
    )
    names = [n for n, p in model.named_parameters() if p.dim() > 1]
    with pytest.raises(RuntimeError, match=r"set_grad_checkpointing\(False\)"):
        squares(Case(model, names, case.data), cotangents_for(case), 5)


def test_equal_samples_are_still_told_apart() -> None:
    case = build("sequence first, one token read")
    case.data.images[1:] = case.data.images[:1]
    cotangents = cotangents_for(case)
    whole, single = squares(case, cotangents, 10), squares(case, cotangents, 1)
    assert largest_error(whole, single) <= 1e-10


@pytest.mark.parametrize("name", ["conv", "nn.MultiheadAttention", "shared weight"])
@pytest.mark.parametrize("fails_at", [1, 4])
def test_an_error_midway_leaves_no_trace(name: str, fails_at: int) -> None:
    case = build(name)
    calls = 0

    def fail(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise RuntimeError("interrupted")

    first = next(iter(case.model.parameters()))
    first.grad = torch.ones_like(first)
    list(case.model.parameters())[-1].requires_grad_(False)
    case.model.get_submodule("0").eval()
    before = fingerprint(case.model)
    cotangents = cotangents_for(case)
    handle = case.model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        squares(case, cotangents, 2)
    handle.remove()
    assert fingerprint(case.model) == before


def test_an_input_changed_after_use_is_refused() -> None:
    def changed(layers: Any, images: Tensor) -> Tensor:
        images = images * 1
        x: Tensor = layers.conv(images)
        images.add_(1)
        return x.mean((2, 3))

    case = Case(Layers(changed, conv=nn.Conv2d(3, 4, 1)).double(), ["conv.weight"], Images())
    with pytest.raises(RuntimeError, match=r"conv\.weight.*modified in place"):
        squares(case, torch.ones(10, 4, dtype=torch.float64), 5)
