import io
import logging
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pai_utils.support.common import progress, watched
from pai_utils.support.sampling import Draw, batches, fitting_batches
from tests.cases import Images

CPU = torch.device("cpu")


def test_a_draw_is_seeded_without_replacement_and_touches_no_global_state() -> None:
    data = Images(50)
    state = torch.get_rng_state()
    drawn = Draw(20, seed=3).indices(data)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(set(drawn.tolist())) == 20
    assert torch.equal(Draw(20, seed=3).indices(data), drawn)
    assert not torch.equal(drawn, Draw(20, seed=4).indices(data))
    assert Draw(None, seed=3).indices(data).tolist() == list(range(50))
    assert sorted(Draw(50, seed=3).indices(data).tolist()) == list(range(50))


@pytest.mark.parametrize("samples", [0, -1, 51])
def test_a_draw_of_too_few_or_too_many_is_refused(samples: int) -> None:
    with pytest.raises(ValueError, match=f"samples={samples}"):
        Draw(samples, seed=0).indices(Images(50))


@pytest.mark.parametrize("size", [1, 3, 7, 64])
def test_batches_hold_every_sample_once_and_in_order(size: int) -> None:
    data = Images(7)
    order = torch.tensor([6, 0, 3, 2, 1, 5, 4])
    items: Any = [data[row] for row in range(7)]  # without a method for whole batches
    for source in (data, items):
        got = list(batches(source, size, CPU, order))
        assert [len(y) for _, y in got] == [len(part) for part in order.split(size)]
        assert torch.equal(torch.cat([x for x, _ in got]), data.images[order])
        assert torch.equal(torch.cat([y for _, y in got]), data.labels[order])
    assert torch.equal(torch.cat([x for x, _ in batches(data, size, CPU)]), data.images)


def test_empty_data_and_impossible_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="dataset is empty"):
        Draw(None, seed=0).indices(Images(0))
    with pytest.raises(ValueError, match="dataset is empty"):
        list(batches(Images(0), 4, CPU))
    with pytest.raises(ValueError, match="batch_size=0"):
        list(batches(Images(2), 0, CPU))


def test_batches_are_halved_until_they_fit(caplog: pytest.LogCaptureFixture) -> None:
    tried: list[int] = []

    def compute(size: int) -> str:
        tried.append(size)
        if size > 5:
            raise torch.OutOfMemoryError
        return f"done with {size}"

    with caplog.at_level(logging.WARNING, "pai_utils"):
        assert fitting_batches(compute, 64) == "done with 4"
    assert tried == [64, 32, 16, 8, 4]
    assert caplog.messages[-1] == "out of memory; starting again with batches of 4"
    # The CPU's own lack of memory counts too, and that of numpy.
    assert fitting_batches(lambda size: len(torch.empty((size - 1) << 50)), 2) == 0
    assert fitting_batches(lambda size: len(np.empty((size - 1) << 50)), 2) == 0


def test_progress_yields_the_items_and_writes_nothing_unwatched(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert list(progress([1, 2, 3], "counting")) == [1, 2, 3]
    assert capsys.readouterr() == ("", "")


def test_a_person_may_watch_a_kernel_but_not_a_package_that_lies_about(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shell = SimpleNamespace()
    fake = SimpleNamespace(get_ipython=lambda: shell)
    monkeypatch.setitem(sys.modules, "IPython", fake)
    monkeypatch.setitem(sys.modules, "ipykernel", SimpleNamespace())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert not watched()
    shell.kernel = object()
    assert watched()
    monkeypatch.setenv("PAI_PROGRESS", "0")
    assert not watched()
