import copy
import importlib
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pai_utils import export
from pai_utils.export import (
    check_compressed,
    check_onnx,
    export_onnx,
    load_classifier,
    load_compressed,
    save_compressed,
    save_dense,
    to_semi_structured,
    write_formats,
)
from pai_utils.masks import Mask, make_mask
from pai_utils.models.encoders import Classifier, prunable_parameters
from pai_utils.models.loading import load_backbone
from tests.cases import MODELS, SIDE, Limited

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


class Renamed(nn.Sequential):
    """Another encoder of the same names and shapes."""


def tied() -> nn.Sequential:
    """Two layers with one weight."""
    first, second = nn.Linear(3 * SIDE**2, 3 * SIDE**2), nn.Linear(3 * SIDE**2, 3 * SIDE**2)
    second.weight = first.weight
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), second)


NETWORKS = {name: MODELS[name] for name in ("eval BatchNorm", "nn.MultiheadAttention")}
NETWORKS |= {"grouped conv": MODELS["grouped conv"], "tied": tied}
of_all = pytest.mark.parametrize("network", NETWORKS)
needs_onnx = pytest.mark.skipif(
    find_spec("onnxscript") is None or find_spec("onnxruntime") is None,
    reason="the extra export is not installed",
)


def pruned(model: nn.Module, sparsity: float = 0.7, scope: str = "global") -> Mask:
    scores = {n: model.get_parameter(n).detach().abs() for n in prunable_parameters(model)}
    mask = make_mask(scores, sparsity, scope, metadata={"scorer": "magnitude"})
    mask.apply_(model)
    return mask


def wide(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64)).eval()


def copied(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@of_all
def test_a_compressed_model_comes_back_bit_for_bit(
    network: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, other = (NETWORKS[network]().to(dtype).eval() for _ in range(2))
    mask = pruned(model)
    save_compressed(model, mask, tmp_path / "m.safetensors")
    back = load_compressed(tmp_path / "m.safetensors", other)
    images = torch.randn(4, 3, SIDE, SIDE, dtype=dtype)
    assert torch.equal(other(images), model(images))
    assert same(copied(other), copied(model))
    assert back.metadata == mask.metadata
    assert same(dict(back), dict(mask))


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_a_file_is_as_small_as_promised(sparsity: float, tmp_path: Path) -> None:
    model = wide()
    mask = pruned(model, sparsity)
    size = save_compressed(model, mask, tmp_path / "m")
    weights = mask.kept * 4 + mask.total / 8
    others = (256 + 64) * 4
    assert size.bytes == (tmp_path / "m").stat().st_size
    assert size.promised == weights + others
    assert size.bytes - others == pytest.approx(weights, rel=0.05)
    assert size.dense == mask.total * 4 + others
    assert size.kept == pytest.approx(1 - sparsity, abs=1e-4)


def test_what_is_not_pruned_by_the_mask_is_refused(tmp_path: Path) -> None:
    class Stateful(nn.Linear):
        def get_extra_state(self) -> int:
            return 1

    half = Mask({"2.weight": torch.rand(64, 256) > 0.5})
    for save in (save_compressed, save_dense):
        with pytest.raises(ValueError, match=r"not zero in 2\.weight; call mask\.apply_\(model\)"):
            save(wide(), half, tmp_path / "m")
        with pytest.raises(ValueError, match=r"the model has no 2\.weight"):
            save(tied(), half, tmp_path / "m")
        with pytest.raises(ValueError, match="no tensor cannot be stored or loaded: _extra_state"):
            save(Stateful(2, 2), Mask({"weight": torch.ones(2, 2)}), tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Sequential(nn.Linear(256, 256)), r"architecture: 2 unexpected: 2\.bias, 2\.weight$"),
        (nn.Sequential(*wide(), nn.Linear(64, 1)), r"2 missing: 3\.weight, 3\.bias$"),
        (wide().double(), r"torch\.float32 instead of \[256, 256\] torch\.float64"),
        (wide().to("meta"), r"no memory \(device meta\) for 0\.weight"),
        (Renamed(*wide()), "holds the encoder 'Sequential', not 'Renamed'"),
    ],
)
def test_another_architecture_is_refused_and_untouched(
    other: nn.Module, message: str, tmp_path: Path
) -> None:
    model = wide()
    before = copied(other)
    save_compressed(model, pruned(model), tmp_path / "m")
    with pytest.raises(ValueError, match=message):
        load_compressed(tmp_path / "m", other)
    assert next(iter(before.values())).is_meta or same(copied(other), before)


def test_two_tensors_do_not_go_into_one(tmp_path: Path) -> None:
    one, two = tied(), tied()
    two[3] = nn.Linear(3 * SIDE**2, 3 * SIDE**2)
    before = copied(one)
    save_compressed(two, pruned(two), tmp_path / "m")
    with pytest.raises(ValueError, match=r"shares one tensor where the file has two: 3\.weight"):
        load_compressed(tmp_path / "m", one)
    assert same(copied(one), before)
    save_compressed(one, pruned(one), tmp_path / "m")
    load_compressed(tmp_path / "m", two)
    assert same(copied(two), copied(one))


def test_altered_and_foreign_files_are_refused(tmp_path: Path) -> None:
    model, path = wide(), tmp_path / "m"
    save_compressed(model, pruned(model), path)
    other = wide(1)
    before = copied(other)
    path.write_bytes(path.read_bytes().replace(b"magnitude", b"magnitudf"))
    with pytest.raises(ValueError, match="was altered"):
        load_compressed(path, other)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="is no compressed checkpoint"):
        load_compressed(path, other)
    assert same(copied(other), before)


def test_a_dense_file_needs_nothing_but_safetensors(tmp_path: Path) -> None:
    model, other = tied(), tied()
    save_dense(model, pruned(model), tmp_path / "m")
    other.load_state_dict(load_file(tmp_path / "m"))
    assert same(copied(other), copied(model))


def narrow() -> nn.Sequential:
    """Of rectangles with one channel."""
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(84, 3))


@needs_onnx
@pytest.mark.parametrize(
    ("make", "size", "shape"),
    [
        *(
            (NETWORKS[n], SIDE, (3, SIDE, SIDE))
            for n in ("eval BatchNorm", "nn.MultiheadAttention")
        ),
        (narrow, (1, 6, 9), (1, 6, 9)),
    ],
    ids=["BatchNorm", "attention", "rectangles with a channel"],
)
def test_onnx_gives_the_same_logits_for_any_batch(
    make: Callable[[], nn.Module], size: Any, shape: tuple[int, ...], tmp_path: Path
) -> None:
    model, path = make().train(), tmp_path / "m.onnx"
    export_onnx(model, path, size)
    assert model.training
    assert list(tmp_path.iterdir()) == [path]
    for count in (1, 2, 7):
        assert check_onnx(model, path, torch.randn(count, *shape)) <= 1e-4
    with torch.no_grad():
        list(model.parameters())[-1].add_(1)
    with pytest.raises(ValueError, match="differ from the model's by"):
        check_onnx(model, path, torch.randn(2, *shape))


@needs_onnx
def test_onnx_is_judged_by_the_scale_of_the_logits(tmp_path: Path) -> None:
    model, path, images = tied(), tmp_path / "m.onnx", torch.randn(4, 3, SIDE, SIDE)
    with torch.no_grad():
        model.get_parameter("3.weight").mul_(1e3)
        largest = float(model(images).abs().max())
    export_onnx(model, path, SIDE)
    model.get_parameter("3.bias").data.add_(2e-5 * largest)
    assert check_onnx(model, path, images) == pytest.approx(2e-5 * largest, rel=0.1)
    model.get_parameter("3.bias").data.add_(5e-4 * largest)
    with pytest.raises(ValueError, match=r"more than 0\.0001 of the largest"):
        check_onnx(model, path, images)


def test_onnx_refuses_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.zeros(1, 3, SIDE, SIDE)
    with monkeypatch.context() as patch:
        patch.setattr(export, "package_folder", lambda *_: None)
        with pytest.raises(FileNotFoundError, match="no ONNX file at"):
            check_onnx(tied(), tmp_path / "m", images)
        for size in (None, 0):
            with pytest.raises(ValueError, match=f"image_size={size} must be"):
                export_onnx(tied(), tmp_path / "m", size)
    for name in ("onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r"are written .* install pai-utils\[export\]"):
        export_onnx(tied(), tmp_path / "m", SIDE)
    with pytest.raises(ModuleNotFoundError, match=r"are run .* install pai-utils\[export\]"):
        check_onnx(tied(), tmp_path / "m", images)


def test_sparse_weights_need_the_pattern_zeros_a_device_and_a_type() -> None:
    model = wide()
    with pytest.raises(ValueError, match=r"not 2:4 along the input of 0\.weight"):
        to_semi_structured(model, Mask({"0.weight": torch.ones(256, 256)}))
    with pytest.raises(ValueError, match=r"not 1-D '0\.bias'"):
        to_semi_structured(model, Mask({"0.bias": torch.ones(256)}))
    half = Mask({"0.weight": torch.tensor([1, 1, 0, 0]).repeat(256, 64)})
    with pytest.raises(ValueError, match="not zero"):
        to_semi_structured(model, half)
    half.apply_(model)
    message = r"0\.weight is torch\.float32 on cpu; sparse kernels need a CUDA device and model\."
    with pytest.raises(ValueError, match=message):
        to_semi_structured(model, half)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sparse_weights_give_the_same_logits(dtype: torch.dtype) -> None:
    model = nn.Sequential(*wide(), nn.Linear(64, 5)).to("cuda", dtype).eval()
    mask = pruned(model, 0.5, "2:4")
    sparse, dense = to_semi_structured(model, mask)
    images = torch.randn(64, 256, device="cuda", dtype=dtype)
    assert dense == ["3.weight"]
    torch.testing.assert_close(sparse(images), model(images), rtol=2e-2, atol=2e-2)
    with pytest.raises(ValueError, match=r"is torch\.float32 on cuda"):
        to_semi_structured(model.float(), mask)


def of_timm() -> Classifier:
    """A small model of timm, at random weights and statistics."""
    backbone = load_backbone("test_resnet", image_size=32, pretrained=False, device="cpu", seed=5)
    torch.manual_seed(0)
    model = Classifier(backbone, nn.Linear(backbone.feature_dim, 3))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.get_buffer("running_mean"))
    return model.eval()


def test_a_file_alone_makes_the_classifier(tmp_path: Path) -> None:
    model, images = of_timm(), torch.randn(5, 3, 32, 32).to(memory_format=torch.channels_last)
    save_compressed(model, pruned(model), tmp_path / "m")
    assert check_compressed(model, tmp_path / "m", images) == 0
    back = load_classifier(tmp_path / "m", "cpu")
    assert not back.training
    assert same(copied(back), copied(model))
    with torch.no_grad():
        list(model.parameters())[-1].add_(1)
    assert check_compressed(model, tmp_path / "m", images) == pytest.approx(1, abs=1e-5)


@needs_onnx
def test_files_are_compared_in_batches_that_fit_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = importlib.import_module("onnxruntime").InferenceSession
    images, run = torch.randn(5, 3, SIDE, SIDE), session.run
    model = Limited(tied(), 2)
    export_onnx(model.model, tmp_path / "m.onnx", SIDE)

    def limited(self: Any, outputs: object, feed: dict[str, Any]) -> Any:
        if len(feed["images"]) > 1:
            raise Exception("Failed to allocate memory for requested buffer of size 9")
        return run(self, outputs, feed)

    monkeypatch.setattr(session, "run", limited)
    assert check_onnx(model, tmp_path / "m.onnx", images) < 1e-5
    model.get_parameter("model.3.bias").data.add_(1)
    with pytest.raises(ValueError, match=r"differ from the model's by 1\b"):
        check_onnx(model, tmp_path / "m.onnx", images)


def test_a_file_that_does_not_say_how_to_make_its_model_is_refused(tmp_path: Path) -> None:
    model, own = wide(), of_timm()
    own.backbone.name = "file:/home/me/mine.pth@test_resnet"
    for each, name in ((model, "Sequential"), (own, r"file:mine\.pth@test_resnet")):
        save_compressed(each, pruned(each), tmp_path / "m")
        with pytest.raises(ValueError, match=rf"make its model \({name}\); make it yourself"):
            load_classifier(tmp_path / "m")


@needs_onnx
def test_formats_are_written_and_read_back_and_unknown_ones_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model = of_timm()
    mask = pruned(model)
    before = copied(model)
    images = torch.randn(4, 3, 32, 32)
    with pytest.raises(ValueError, match=r"unknown format 'onxx'; did you mean 'onnx'"):
        write_formats(model, mask, tmp_path, images, ["compressed", "onxx"])
    assert not list(tmp_path.iterdir())
    table = write_formats(model, mask, "~", images).set_index("format")
    assert same(copied(model), before)
    assert table.problem.isna().all()
    assert (table.difference.drop("onnx", errors="ignore") == 0).all()
    assert table.difference.between(0, 1e-4).all()
    for row in table.itertuples():
        assert row.bytes == (tmp_path / str(row.file)).stat().st_size
    compressed = table.loc["compressed"]
    assert compressed.bytes == pytest.approx(compressed.promised, rel=0.05)
    assert compressed.of_dense == pytest.approx(0.3 + 1 / 32, rel=0.1)
    assert table.loc["dense"].of_dense == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("failed", ["compressed", "dense"])
def test_a_format_that_fails_is_reported_and_leaves_the_others(
    failed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such operator\nmore")

    model, images = of_timm(), torch.randn(2, 3, 32, 32)
    mask = pruned(model)
    monkeypatch.setattr(export, f"save_{failed}", fail)
    formats = ["compressed", "dense"]
    table = write_formats(model, mask, tmp_path, images, formats).set_index("format")
    assert table.problem[failed] == "RuntimeError: no such operator"
    assert f"{table.file[failed]} is not written: RuntimeError: no such operator" in caplog.text
    assert table.problem.drop(failed).isna().all()
    assert {path.name for path in tmp_path.iterdir()} == set(table.file.drop(failed))
    with pytest.raises(ValueError, match="are not zero"):
        write_formats(of_timm(), mask, tmp_path, images)
