"""Results kept in a folder: read where they are the same, computed anew where they are not."""

import ast
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms import Compose, Lambda, ToTensor

import pai_utils as pai
from pai_utils.data.images import ImageDataset, ImageTransform
from pai_utils.scorers.first_order import snip
from pai_utils.support import cache, code
from pai_utils.support.cache import Kept, reused
from tests.cases import tiny_backbone, tiny_task

TRANSFORM = ImageTransform(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def _data(fill: int = 0, transform: Any = TRANSFORM) -> ImageDataset:
    generator = torch.Generator().manual_seed(fill)
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return ImageDataset(images, torch.arange(6) % 2, transform)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PAI_CACHE", "~")
    return tmp_path


@pytest.fixture
def times(folder: Path) -> Callable[..., int]:
    """How often something is computed that is asked for with each of several parts."""

    def times(*each: dict[str, Any]) -> int:
        computed = []

        def compute() -> Kept:
            computed.append(1)
            return Kept({"values": torch.arange(3.0)}, {"seconds": 1.5})

        for parts in each:
            found = reused("x", parts, compute)
            assert found.facts == {"seconds": 1.5}
            assert found.tensors["values"].tolist() == [0, 1, 2]
        return len(computed)

    return times


def test_without_a_folder_everything_is_computed(
    times: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PAI_CACHE")
    assert times({"samples": 4}, {"samples": 4}) == 2


def test_the_same_is_computed_once_and_anything_else_anew(times: Callable[..., int]) -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    given = _data()
    parts = {"by": snip, "model": model, "data": given, "samples": 4}
    assert times(parts, parts, {**parts, "data": _data()}) == 1
    relabelled = ImageDataset(given.images, 1 - given.labels, given.transform)
    shifted = ImageTransform(8, (0.4, 0.5, 0.5), (0.5, 0.5, 0.5))
    different = [
        {**parts, "by": pai.score},
        {**parts, "model": other},
        {**parts, "model": nn.Sequential(model)},
        {**parts, "data": _data(1)},
        {**parts, "data": relabelled},
        {**parts, "data": ImageDataset(given.images, given.labels, shifted)},
        {**parts, "samples": 5},
    ]
    assert times(*different) == len(different)
    with torch.no_grad():
        model.weight[0, 0] += 1
    assert times(parts) == 1


class _Own(nn.Linear):
    """A module of a user's own, which prints like torch's."""


class _Lazy(Dataset[tuple[Tensor, int]]):
    images, labels, transform = ("a.png",), (0,), None


class _Subclass(ImageDataset):
    """Images that may be read in another way."""


def _hooked() -> nn.Module:
    model = nn.Linear(2, 2)
    model.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    "part",
    [
        nn.Sequential(_Own(2, 2)),
        _hooked(),
        _Lazy(),
        _Subclass(_data().images, _data().labels, TRANSFORM),
        TensorDataset(torch.ones(2)),
        _data(transform=lambda image: torch.ones(3, 8, 8)),
        _data(transform=Compose([ToTensor(), Lambda(torch.square)])),
        partial(max, lambda: 3),
    ],
    ids=["class", "hook", "paths", "subclass", "others", "lambda", "torchvision", "partial"],
)
def test_what_cannot_be_told_apart_is_not_kept(
    times: Callable[..., int], folder: Path, part: object
) -> None:
    assert times({"part": part}, {"part": part}) == 2
    assert not list(folder.iterdir())


def test_a_change_of_the_code_that_computes_leaves_nothing_stale(
    times: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"by": snip}
    assert times(parts) == 1
    closure = code.closure
    changed = {"pai_utils.support.sampling": "other"}
    monkeypatch.setattr(cache, "closure", lambda modules: {**closure(modules), **changed})
    assert times(parts, parts) == 1
    # Of a file that is newer than this process, who knows which version runs.
    monkeypatch.setattr(cache, "_STARTED", 0)
    assert times(parts, parts) == 2


def test_docstrings_comments_and_plots_are_no_code_of_a_score() -> None:
    found = code.closure(["pai_utils.scorers.first_order"])
    assert "pai_utils.support.sampling" in found
    assert not {"pai_utils.plots", "pai_utils.runs", "pai_utils.scorers"} & set(found)
    commented = 'def f(x):\n    """Say."""\n    # why\n    return x\n'
    assert ast.dump(code.syntax(commented)) == ast.dump(code.syntax("def f(x): return x"))


def test_a_broken_file_is_computed_anew_with_a_warning(
    times: Callable[..., int], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = {"samples": 4}
    assert times(parts) == 1
    (path,) = folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with caplog.at_level(logging.WARNING, logger="pai_utils"):
        assert times(parts, parts) == 1  # it is whole again
    assert "computing anew" in caplog.text


def test_what_was_not_used_for_longest_makes_room(
    times: Callable[..., int], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = [{"samples": samples} for samples in range(3)]
    assert times(*each[:2]) == 2
    size = max(path.stat().st_size for path in folder.glob("*.safetensors"))
    monkeypatch.setattr(cache, "MOST_BYTES", 2 * size + 8)
    assert times(each[0]) == 0
    assert times(each[2]) == 1
    assert times(each[0], each[2]) == 0
    assert times(each[1]) == 1


def compute_slowly() -> Kept:
    print("computes", flush=True)
    time.sleep(float(os.environ.get("TEST_SECONDS", "0")))
    return Kept({}, {"process": os.getpid()})


def test_others_wait_for_the_first_and_go_on_if_it_is_killed(folder: Path) -> None:
    script = (
        "from pai_utils.support.cache import reused\n"
        "from tests.support.test_cache import compute_slowly\n"
        "reused('x', {'samples': 4}, compute_slowly)\n"
    )
    found: list[Kept] = []
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        cwd=code.ROOT,
        env={**os.environ, "TEST_SECONDS": "60"},
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"computes\n"
        second = threading.Thread(
            target=lambda: found.append(reused("x", {"samples": 4}, compute_slowly))
        )
        second.start()
        time.sleep(0.5)
        assert not found
        first.kill()
    second.join(10)
    assert found[0].facts == {"process": os.getpid()}
    assert len(list(folder.glob("*.safetensors"))) == 1


def test_heads_and_scores_are_the_same_read_as_computed(folder: Path) -> None:
    backbone, task = tiny_backbone(), tiny_task()

    def both() -> tuple[nn.Linear, pai.Scores]:
        head = pai.fit_head(backbone, task)
        model = pai.Classifier(backbone, head)
        return head, pai.score("ggn_diag", model, task.train, samples=8)

    head, scores = both()
    kinds = sorted(path.name.split("-")[0] for path in folder.glob("*.safetensors"))
    assert kinds == ["features", "head", "scores"]
    before = {path: path.stat().st_ino for path in folder.glob("*.safetensors")}
    read_head, read = both()
    assert {path: path.stat().st_ino for path in folder.glob("*.safetensors")} == before
    assert torch.equal(read_head.weight, head.weight)
    assert torch.equal(read_head.bias, head.bias)
    assert not any(parameter.requires_grad for parameter in read_head.parameters())
    assert list(read) == list(scores)
    assert all(torch.equal(read[name], scores[name]) for name in scores)
    assert (read.scorer, read.left_out) == (scores.scorer, scores.left_out)
    assert read.seconds == scores.seconds > 0
