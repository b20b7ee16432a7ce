"""Results kept in a folder: read where they are the same, computed anew where they are not."""

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

import pai_utils as pai
from pai_utils.data.images import ImageDataset, ImageTransform
from pai_utils.support import cache
from pai_utils.support.cache import Kept, ignored, keeping, reused, used_files
from tests.cases import tiny_backbone, tiny_task


def _data(fill: int = 0, size: int = 8) -> ImageDataset:
    generator = torch.Generator().manual_seed(fill)
    images = torch.randint(0, 256, (6, 3, size, size), dtype=torch.uint8, generator=generator)
    transform = ImageTransform(size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return ImageDataset(images, torch.arange(6) % 2, transform)


class _Computed:
    """A computation that counts how often it is asked for."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> Kept:
        self.times += 1
        return Kept({"values": torch.arange(3.0)}, {"seconds": 1.5})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PAI_SHARED", str(tmp_path))
    monkeypatch.setattr(cache, "_used", {})
    return tmp_path


def test_without_a_folder_everything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PAI_SHARED", raising=False)
    compute = _Computed()
    with keeping() as names:
        for _ in range(2):
            reused("x", {"model": nn.Linear(2, 2)}, compute)
    assert (compute.times, names) == (2, [])


def test_runs_read_what_was_kept_and_keep_nothing(folder: Path) -> None:
    parts = {"model": nn.Linear(2, 2), "data": _data(), "samples": 4}
    compute = _Computed()
    reused("x", parts, compute)
    assert not list(folder.iterdir())
    with keeping() as names:
        first = reused("x", parts, compute)
    assert [path.name for path in folder.iterdir()] == names
    again = reused("x", parts, compute)
    assert compute.times == 2
    assert again.facts == first.facts == {"seconds": 1.5}
    assert torch.equal(again.tensors["values"], first.tensors["values"])
    assert list(used_files()) == names


def test_anything_that_differs_is_computed(folder: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    given = _data()
    parts = {"model": model, "data": given, "samples": 4}
    compute = _Computed()
    with keeping() as names:
        reused("x", parts, compute)
        reused("y", parts, compute)
        reused("x", {**parts, "samples": 5}, compute)
        reused("x", {**parts, "data": _data(1)}, compute)
        other = ImageTransform(8, (0.4, 0.5, 0.5), (0.5, 0.5, 0.5))
        reused("x", {**parts, "data": ImageDataset(given.images, given.labels, other)}, compute)
        relabelled = ImageDataset(given.images, 1 - given.labels, given.transform)
        reused("x", {**parts, "data": relabelled}, compute)
        with torch.no_grad():
            model.weight[0, 0] += 1
        reused("x", parts, compute)
    assert compute.times == len(set(names)) == 7


def test_a_change_of_the_library_leaves_nothing_stale(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = _Computed()
    with keeping():
        reused("x", {"samples": 4}, compute)
        monkeypatch.setattr(cache, "_code", lambda: "other code")
        reused("x", {"samples": 4}, compute)
    assert compute.times == 2


def test_files_are_found_under_other_names_too(folder: Path) -> None:
    compute = _Computed()
    with keeping() as names:
        reused("x", {"samples": 4}, compute)
    moved = folder / "readable.safetensors"
    (folder / names[0]).rename(moved)
    broken = folder / "broken.safetensors"
    broken.write_bytes(b"no tensors")
    cache.gather([moved, broken, folder / "absent"], folder)
    reused("x", {"samples": 4}, compute)
    assert compute.times == 1


@pytest.mark.parametrize("harm", ["truncated", "altered"])
def test_a_broken_file_is_computed_anew_with_a_warning(
    folder: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    compute = _Computed()
    with keeping() as names:
        reused("x", {"samples": 4}, compute)
        path = folder / names[0]
        content = path.read_bytes()
        path.write_bytes(content[:-3] if harm == "truncated" else content[:-1] + b"\x01")
        with caplog.at_level(logging.WARNING, logger="pai_utils"):
            found = reused("x", {"samples": 4}, compute)
    assert compute.times == 2
    assert found.tensors["values"].tolist() == [0, 1, 2]
    assert "computing anew" in caplog.text
    reused("x", {"samples": 4}, compute)
    assert compute.times == 2  # it is whole again


def test_images_that_lie_nowhere_are_not_shared(folder: Path) -> None:
    class Lazy(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            raise IndexError

    compute = _Computed()
    with keeping() as names:
        reused("x", {"data": Lazy()}, compute)
    assert (compute.times, names) == (1, [])


def test_ignored_computes_anew(folder: Path) -> None:
    compute = _Computed()
    with keeping():
        reused("x", {"samples": 4}, compute)
        with ignored():
            reused("x", {"samples": 4}, compute)
    assert compute.times == 2


def test_heads_and_scores_are_the_same_read_as_computed(folder: Path) -> None:
    backbone, task = tiny_backbone(), tiny_task()
    head = pai.fit_head(backbone, task)
    model = pai.Classifier(backbone, head)
    scores = pai.score("hessian_diag", model, task.train, samples=8, probes=4)
    with keeping() as names:
        pai.fit_head(backbone, task)
        pai.score("hessian_diag", model, task.train, samples=8, probes=4)
    kinds = [name.split("-")[0] for name in names]
    assert sorted(kinds) == ["features", "head", "scores"]
    read_head = pai.fit_head(backbone, task)
    read = pai.score("hessian_diag", model, task.train, samples=8, probes=4)
    assert set(used_files()) == {name for name in names if not name.startswith("features")}
    assert torch.equal(read_head.weight, head.weight)
    assert torch.equal(read_head.bias, head.bias)
    assert not any(parameter.requires_grad for parameter in read_head.parameters())
    assert list(read) == list(scores)
    assert all(torch.equal(read[name], scores[name]) for name in scores)
    assert all(
        torch.equal(read.standard_error[name], error)
        for name, error in scores.standard_error.items()
    )
    assert len(read.standard_error) == len(scores)
    assert (read.scorer, read.left_out) == (scores.scorer, scores.left_out)
    assert read.seconds > 0


def test_scores_that_need_no_head_are_shared_whatever_the_head(folder: Path) -> None:
    backbone, task = tiny_backbone(), tiny_task()
    heads = [nn.Linear(backbone.feature_dim, classes) for classes in (2, 3)]
    with keeping() as names:
        for head in heads:
            pai.score("feature_ggn_diag", pai.Classifier(backbone, head), task.train, samples=4)
    assert len(names) == 2
    assert len(set(names)) == 1
