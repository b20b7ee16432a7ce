import sys
from collections.abc import Callable
from pathlib import Path

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
    measure_speedup,
    save_compressed,
    save_dense,
    to_semi_structured,
    write_formats,
)
from pai_utils.masks import Mask, make_mask
from pai_utils.models.encoders import Classifier, prunable_parameters
from pai_utils.models.loading import load_backbone

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


class Attention(nn.Module):
    """One layer of attention over the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images.flatten(2).transpose(1, 2))
        mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        logits: Tensor = self.head(mixed.mean(1))
        return logits


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(48, 48)
        self.second = nn.Linear(48, 48)
        self.second.weight = self.first.weight

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.second(self.first(images.flatten(1)).relu())
        return logits


class Renamed(nn.Sequential):
    """Another encoder of the same names and shapes."""


def convolutions() -> nn.Module:
    """A plain and a grouped convolution and BatchNorm with statistics of its own."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1, groups=4),
        nn.Flatten(),
        nn.Linear(32, 3),
    )
    model(torch.randn(9, 3, 4, 4))
    return model


NETWORKS = {"convolutions": convolutions, "attention": Attention, "tied": Tied}


def pruned(model: nn.Module, sparsity: float = 0.7, scope: str = "global") -> Mask:
    parameters = dict(model.named_parameters())
    scores = {n: parameters[n].detach().abs() for n in prunable_parameters(model)}
    mask = make_mask(scores, sparsity, scope, metadata={"scorer": "magnitude"})
    mask.apply_(model)
    return mask


def wide(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64)).eval()


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_compressed_model_comes_back_bit_for_bit(
    network: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = NETWORKS[network]().to(dtype).eval()
    mask = pruned(model)
    save_compressed(model, mask, tmp_path / "m.safetensors")
    other = NETWORKS[network]().to(dtype).eval()
    back = load_compressed(tmp_path / "m.safetensors", other)
    images = torch.randn(4, 3, 4, 4, dtype=dtype)
    assert torch.equal(other(images), model(images))
    assert same(copied(other), copied(model))
    assert back.metadata == mask.metadata
    assert same(dict(back), dict(mask))


def test_mixed_types_and_an_empty_layer_come_back(tmp_path: Path) -> None:
    model, other = wide(), wide(1)
    for network in (model, other):
        network[2].double()
    mask = Mask({"0.weight": torch.zeros(256, 256), "2.weight": torch.rand(64, 256) > 0.5})
    mask.apply_(model)
    save_compressed(model, mask, tmp_path / "m")
    load_compressed(tmp_path / "m", other)
    assert same(copied(other), copied(model))


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
            save(Tied(), half, tmp_path / "m")
        with pytest.raises(ValueError, match="no tensor cannot be stored or loaded: _extra_state"):
            save(Stateful(2, 2), Mask({"weight": torch.ones(2, 2)}), tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Sequential(nn.Linear(256, 256)), r"architecture: 2 unexpected: 2\.bias, 2\.weight$"),
        (nn.Sequential(*wide(), nn.Linear(64, 1)), r"2 missing: 3\.weight, 3\.bias$"),
        (
            nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 5)),
            r"type: 2\.weight \[64, 256\] torch\.float32 instead of \[5, 256\] torch\.float32",
        ),
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
    model, tied = Tied(), Tied()
    model.second = nn.Linear(48, 48)
    before = copied(tied)
    save_compressed(model, pruned(model), tmp_path / "m")
    with pytest.raises(ValueError, match=r"shares one tensor where the file has two: second\.wei"):
        load_compressed(tmp_path / "m", tied)
    assert same(copied(tied), before)
    save_compressed(tied, pruned(tied), tmp_path / "m")
    load_compressed(tmp_path / "m", model)
    assert same(copied(model), copied(tied))


def test_truncated_altered_and_foreign_files_are_refused(tmp_path: Path) -> None:
    model, path = wide(), tmp_path / "m"
    save_compressed(model, pruned(model), path)
    whole, other = path.read_bytes(), wide(1)
    before = copied(other)
    for content in (b"", whole[:100], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="truncated or no compressed checkpoint"):
            load_compressed(path, other)
    for altered in (
        whole[:-1] + bytes([whole[-1] ^ 1]),
        whole.replace(b"magnitude", b"magnitudf"),
    ):
        path.write_bytes(altered)
        with pytest.raises(ValueError, match="was altered"):
            load_compressed(path, other)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="is no compressed checkpoint"):
        load_compressed(path, other)
    with pytest.raises(FileNotFoundError, match="no compressed checkpoint at"):
        load_compressed(tmp_path / "none", other)
    assert same(copied(other), before)


@pytest.mark.parametrize("save", [save_compressed, save_dense])
def test_a_writer_that_is_cut_short_leaves_the_old_file(
    save: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "m").write_bytes(b"old")
    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        save(nn.Linear(2, 2), Mask({"weight": torch.ones(2, 2)}), tmp_path / "m")
    assert [file.name for file in tmp_path.iterdir()] == ["m"]
    assert (tmp_path / "m").read_bytes() == b"old"


@pytest.mark.parametrize("network", NETWORKS)
def test_a_dense_file_needs_nothing_but_safetensors(network: str, tmp_path: Path) -> None:
    model = NETWORKS[network]().eval()
    save_dense(model, pruned(model), tmp_path / "m")
    other = NETWORKS[network]().eval()
    other.load_state_dict(load_file(tmp_path / "m"))
    assert same(copied(other), copied(model))


@pytest.mark.parametrize("network", NETWORKS)
def test_onnx_gives_the_same_logits_for_any_batch(network: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model = NETWORKS[network]()
    pruned(model)
    model.train()
    export_onnx(model, tmp_path / "m.onnx", 4)
    assert model.training
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    for count in (1, 2, 7):
        assert check_onnx(model, tmp_path / "m.onnx", torch.randn(count, 3, 4, 4)) <= 1e-4
    with torch.no_grad():
        next(iter(model.parameters())).add_(1)
    with pytest.raises(ValueError, match="differ from the model's by"):
        check_onnx(model, tmp_path / "m.onnx", torch.randn(2, 3, 4, 4))


def test_onnx_refuses_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.zeros(1, 3, 4, 4)
    with monkeypatch.context() as patch:
        patch.setattr(export, "_extra", lambda _: None)
        with pytest.raises(FileNotFoundError, match="no ONNX file at"):
            check_onnx(Tied(), tmp_path / "m", images)
        for size in (None, 0):
            with pytest.raises(ValueError, match=f"image_size={size} must be"):
                export_onnx(Tied(), tmp_path / "m", size)
    for name in ("onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r"onnxscript: pip install 'pai-utils\[export\]'"):
        export_onnx(Tied(), tmp_path / "m", 4)
    with pytest.raises(ModuleNotFoundError, match=r"onnxruntime: pip install 'pai-utils\[export\]"):
        check_onnx(Tied(), tmp_path / "m", images)


def test_sparse_weights_need_the_pattern_zeros_a_device_and_a_type() -> None:
    model = wide()
    with pytest.raises(ValueError, match=r"not 2:4 along the input of 0\.weight"):
        to_semi_structured(model, Mask({"0.weight": torch.ones(256, 256)}))
    with pytest.raises(ValueError, match=r"not 2:4 along the input of 0\.bias"):
        to_semi_structured(model, Mask({"0.bias": torch.ones(256)}))
    half = Mask({"0.weight": torch.tensor([1, 1, 0, 0]).repeat(256, 64)})
    with pytest.raises(ValueError, match="not zero"):
        to_semi_structured(model, half)
    half.apply_(model)
    with pytest.raises(ValueError, match=r"0\.weight is on cpu; sparse kernels need a CUDA"):
        to_semi_structured(model, half)


@gpu
def test_sparse_weights_need_sixteen_bits() -> None:
    model = wide()
    mask = pruned(model, 0.5, "2:4")
    with pytest.raises(ValueError, match=r"torch\.float32; use model\.half\(\)"):
        to_semi_structured(model.cuda(), mask)


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sparse_weights_give_the_same_logits(dtype: torch.dtype) -> None:
    model = nn.Sequential(*wide(), nn.Linear(64, 5)).to("cuda", dtype).eval()
    mask = pruned(model, 0.5, "2:4")
    sparse, dense = to_semi_structured(model, mask)
    images = torch.randn(64, 256, device="cuda", dtype=dtype)
    assert dense == ["3.weight"]
    torch.testing.assert_close(sparse(images), model(images), rtol=2e-2, atol=2e-2)
    assert measure_speedup(model, sparse, images).factor > 0


def test_a_speedup_is_the_ratio_of_medians_and_changes_no_statistics() -> None:
    model = nn.BatchNorm1d(3).train()
    before = model.get_buffer("running_mean").clone()
    speed = measure_speedup(model, nn.Identity(), torch.ones(4, 3))
    assert speed.sparse > 0
    assert speed.factor == speed.dense / speed.sparse
    assert torch.equal(model.get_buffer("running_mean"), before)
    assert model.training


def of_timm() -> Classifier:
    """A small model of timm, at random weights and statistics."""
    backbone = load_backbone("test_resnet", image_size=32, pretrained=False, device="cpu", seed=5)
    torch.manual_seed(0)
    model = Classifier(backbone, nn.Linear(backbone.feature_dim, 3))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.get_buffer("running_mean"))
    return model.eval()


def test_a_file_alone_makes_the_classifier_in_a_fresh_process(tmp_path: Path) -> None:
    model = of_timm()
    images = torch.randn(5, 3, 32, 32)
    save_compressed(model, pruned(model), tmp_path / "m")
    assert check_compressed(model, tmp_path / "m", images) == 0
    back = load_classifier(tmp_path / "m", "cpu")
    assert not back.training
    assert same(copied(back), copied(model))


def test_a_fresh_process_that_fails_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/sh")
    with pytest.raises(ValueError, match=r"a fresh process cannot load .*none: .*[Ss]yntax"):
        check_compressed(of_timm(), tmp_path / "none", torch.zeros(1, 3, 32, 32))


def test_a_file_that_does_not_say_how_to_make_its_model_is_refused(tmp_path: Path) -> None:
    model = wide()
    save_compressed(model, pruned(model), tmp_path / "m")
    with pytest.raises(ValueError, match=r"how to make its model \(Sequential\); make it yourself"):
        load_classifier(tmp_path / "m")
    own = of_timm()
    own.backbone.name = "file:/home/me/mine.pth@test_resnet"
    save_compressed(own, pruned(own), tmp_path / "own")
    with pytest.raises(ValueError, match=r"\(file:mine\.pth@test_resnet\); make it yourself"):
        load_classifier(tmp_path / "own")


def test_formats_are_written_and_read_back(tmp_path: Path) -> None:
    model = of_timm()
    mask = pruned(model)
    before = copied(model)
    images = torch.randn(4, 3, 32, 32)
    formats = ["compressed", "dense"] if export.missing_for_onnx() else export.FORMATS
    table = write_formats(model, mask, tmp_path, images, formats).set_index("format")
    assert same(copied(model), before)
    assert (table.difference.drop("onnx", errors="ignore") == 0).all()
    assert table.difference.between(0, 1e-4).all()
    for row in table.itertuples():
        assert row.bytes == (tmp_path / str(row.file)).stat().st_size
    compressed = table.loc["compressed"]
    assert compressed.bytes == pytest.approx(compressed.promised, rel=0.05)
    assert compressed.of_dense == pytest.approx(0.3 + 1 / 32, rel=0.1)
    assert table.loc["dense"].of_dense == pytest.approx(1, rel=0.05)
    other = of_timm()
    load_compressed(tmp_path / str(compressed.file), other)
    assert same(copied(other), before)


def test_no_format_is_an_empty_table_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    model = of_timm()
    mask, images = pruned(model), torch.zeros(1, 3, 32, 32)
    assert write_formats(model, mask, tmp_path, images, []).empty
    with pytest.raises(ValueError, match=r"unknown format 'onxx'; did you mean 'onnx'"):
        write_formats(model, mask, tmp_path, images, ["compressed", "onxx"])
    assert not list(tmp_path.iterdir())
