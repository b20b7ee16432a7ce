"""Models and data as people have them: right values, or one error that says what is wanted."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import pai_utils as pai
from pai_utils.curvature.diagonals import fisher_diagonal
from pai_utils.curvature.products import GGNOperator
from pai_utils.support.contract import unwrapped
from tests.cases import CLASSES, Images, tiny_classifier, tiny_dataset

IMAGES = Images(8, dtype=torch.float32)


class Net(nn.Module):
    """A classifier that normalises its images, in place or not, and gives a form of its logits."""

    def __init__(self, in_place: bool = False, form: Callable[[Tensor], Any] = lambda z: z) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.in_place, self.form = in_place, form
        self.conv, self.norm, self.out = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 4)
        self.eval()

    def forward(self, x: Tensor) -> Any:
        x = x.sub_(0.4).div_(0.3) if self.in_place else (x - 0.4) / 0.3
        return self.form(self.out(F.relu(self.norm(self.conv(x))).mean((2, 3))))


class Given(Dataset[Any]):
    """The same images and labels, each pair in a form."""

    def __init__(self, form: Callable[[Tensor, int], Any]) -> None:
        self.form = form

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> Any:
        return self.form(*IMAGES[index])


class ForeignBatch(Given):
    """Its method of this name means something else."""

    def batch(self, batch_size: int, drop_last_batch: bool = False) -> None:
        raise AssertionError("a method of another library was called")


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.zeros(3, 8, 8), 0)])


def same(left: Any, right: Any) -> bool:
    return all(torch.equal(left[name], right[name]) for name in {**left, **right})


@pytest.mark.parametrize(
    "scorer",
    ["fisher_diag", "block_fisher", "hessian_diag", "grasp", "ntk_sap", "px", "obs_inputs"],
)
def test_a_model_that_changes_its_images_is_scored_as_one_that_does_not(scorer: str) -> None:
    found, expected = (
        pai.score(scorer, Net(in_place), Images(8, dtype=torch.float32), samples=None)
        for in_place in (True, False)
    )
    assert same(found, expected)


@pytest.mark.parametrize("repair", ["layerwise", "moments", "obs"])
def test_a_model_that_changes_its_images_is_repaired_as_one_that_does_not(repair: str) -> None:
    found, expected = (
        pai.prune(Net(in_place), IMAGES, "magnitude", 0.5, samples=None, repair=repair).model
        for in_place in (True, False)
    )
    assert same(found.state_dict(), expected.state_dict())


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        nn.parallel.DistributedDataParallel,
        lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
    ],
    ids=["DataParallel", "DistributedDataParallel", "compile"],
)
def test_a_wrapped_classifier_is_the_one_inside(
    wrap: Callable[[nn.Module], Any], tmp_path: Path
) -> None:
    data, plain, inner = tiny_dataset(12, 3, 0), tiny_classifier(), tiny_classifier()
    wrapped = wrap(inner)
    assert unwrapped(wrapped) is inner
    assert pai.prunable_parameters(wrapped) == pai.prunable_parameters(plain)
    for scorer in ("feature_ggn_diag", "px", "grasp"):
        found, expected = (pai.score(scorer, m, data, samples=None) for m in (wrapped, plain))
        assert same(found, expected)
        assert found.left_out == expected.left_out
    names = pai.prunable_parameters(plain)
    ones = {name: torch.ones_like(plain.get_parameter(name)) for name in names}
    assert same(*(fisher_diagonal(m, names, data) for m in (wrapped, plain)))
    assert same(*(GGNOperator(m, names, data)(ones) for m in (wrapped, plain)))

    mine, its = (
        pai.prune(m, data, "snip", 0.5, samples=None, repair="layerwise+moments+obs")
        for m in (plain, wrapped)
    )
    assert same(its.mask, mine.mask)
    assert its.mask.metadata == mine.mask.metadata
    assert same(its.model.state_dict(), mine.model.state_dict())
    assert pai.evaluate(wrapped, data).loss == pytest.approx(pai.evaluate(plain, data).loss)

    for model in (plain, wrapped):
        mine.mask.apply_(model)
    losses = [pai.finetune(m, data, mine.mask, steps=3) for m in (plain, wrapped)]
    assert losses[0] == losses[1]
    assert same(inner.state_dict(), plain.state_dict())

    path = tmp_path / "pruned.safetensors"
    pai.save_compressed(wrapped, mine.mask, path)
    read = tiny_classifier()
    pai.load_compressed(path, read)  # which refuses a file that says another encoder
    assert same(read.state_dict(), plain.state_dict())
    other = wrap(tiny_classifier())
    pai.load_compressed(path, other)
    assert same(unwrapped(other).state_dict(), plain.state_dict())


@pytest.mark.parametrize(
    "kind",
    [np.int32, np.uint8, torch.tensor, lambda y: torch.tensor(y, dtype=torch.int16), np.array],
    ids=["int32", "uint8", "tensor", "int16 tensor", "array"],
)
def test_an_integer_label_may_have_any_width(kind: Callable[[int], Any]) -> None:
    data = Given(lambda x, y: (x, kind(y)))
    found, expected = (pai.score("fisher_diag", Net(), d, samples=None) for d in (data, IMAGES))
    assert same(found, expected)
    assert torch.equal(pai.evaluate(Net(), data).correct, pai.evaluate(Net(), IMAGES).correct)


@pytest.mark.parametrize(
    "kind",
    [
        lambda y: np.array([y]),
        lambda y: torch.tensor([y]),
        lambda y: F.one_hot(torch.tensor(y), CLASSES),
        lambda y: F.one_hot(torch.tensor(y), CLASSES).float(),
        float,
        lambda y: torch.tensor(float(y)),
        str,
        lambda y: [y],
        lambda y: None,
    ],
    ids=["[1] array", "[1]", "one-hot", "soft", "float", "float tensor", "str", "list", "none"],
)
def test_any_other_label_is_refused_in_one_way(kind: Callable[[int], Any]) -> None:
    # As many as there are classes, so that a batch of one-hot labels is square.
    data = torch.utils.data.Subset(Given(lambda x, y: (x, kind(y))), range(CLASSES))
    message = r"item 0 of the data is \(Tensor .*a label is one integer.*int\(label\)"
    with pytest.raises(ValueError, match=message):
        pai.evaluate(Net(), data)
    with pytest.raises(ValueError, match=message):
        pai.score("ggn_diag", Net(), data, samples=None)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataLoader(IMAGES, 4), "the data is a DataLoader; pass its .dataset: .*pairs"),
        (Stream(), "the data is a Stream: .*pairs"),
        ({"image": IMAGES.images, "label": IMAGES.labels}, "the data is a dict: .*pairs"),
        (
            Given(lambda x, y: {"image": x, "label": y}),
            r"\(dict of \['image', 'label'\]\): .*pairs",
        ),
        (Given(lambda x, y: (x, y, 7)), r"\(Tensor torch.float32 \[3, 8, 8\], int, int\): .*pairs"),
        (Given(lambda x, y: ("a.png", y)), r"\(str, int\): .*pairs"),
        (IMAGES.images[:2], r"item . .* \(Tensor torch.float32 \[3, 8, 8\]\): .*pairs"),
        ((IMAGES.images, IMAGES.labels), r"item . .* \(Tensor .*pairs"),
        (Given(lambda x, y: (x.byte(), y)), r"images are torch\.uint8; give floats"),
        ([], "empty"),
    ],
    ids=[
        "loader",
        "stream",
        "dict",
        "dicts",
        "triples",
        "paths",
        "bare",
        "tensors",
        "bytes",
        "empty",
    ],
)
def test_data_of_another_kind_is_refused_by_what_it_is(data: Any, message: str) -> None:
    for look in (
        lambda: pai.score("feature_ggn_diag", Net(), data, samples=None),
        lambda: pai.evaluate(Net(), data),
        lambda: pai.finetune(Net(), data, steps=1),
    ):
        with pytest.raises(ValueError, match=message):
            look()


def test_the_kind_of_data_is_said_before_how_much_there_is() -> None:
    with pytest.raises(ValueError, match=r"item 0 of the data is \(Tensor .*pairs"):
        pai.score("snip", Net(), (IMAGES.images, IMAGES.labels))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "data",
    [
        ForeignBatch(lambda x, y: (x, y)),
        Given(lambda x, y: [x.numpy(), y]),
        Given(lambda x, y: (x.double().numpy(), y)),
        list(IMAGES),  # type: ignore[call-overload]
        TensorDataset(IMAGES.images, IMAGES.labels),
    ],
    ids=["foreign batch", "arrays", "float64 arrays", "list", "tensors"],
)
def test_pairs_give_the_same_however_they_are_kept(data: Any) -> None:
    found, expected = (pai.score("fisher_diag", Net(), d, samples=None) for d in (data, IMAGES))
    assert same(found, expected)


class Output(dict[str, Tensor]):
    """As of models whose outputs have names."""


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        (lambda z: (z, z), "tuple"),
        (lambda z: {"logits": z}, r"dict of \['logits'\]"),
        (lambda z: Output(logits=z), r"Output of \['logits'\]"),
        (lambda z: z[:, :, None, None], r"Tensor torch.float\d\d \[\d, 4, 1, 1\]"),
    ],
    ids=["tuple", "dict", "output", "maps"],
)
@pytest.mark.parametrize("scorer", ["fisher_diag", "snip", "grasp", "px", "hessian_diag"])
def test_a_model_without_plain_logits_is_refused_with_the_wrapper_it_needs(
    form: Callable[[Tensor], Any], kind: str, scorer: str
) -> None:
    message = rf"the model gives {kind}, not logits \[N, C\].*return self.model\(x\)\[0\]"
    with pytest.raises(ValueError, match=message):
        pai.score(scorer, Net(form=form), IMAGES, samples=None)
    with pytest.raises(ValueError, match=message):
        pai.evaluate(Net(form=form), IMAGES)


def test_where_no_output_is_looked_at_it_may_be_anything() -> None:
    plain, other = Net(), Net(form=lambda z: (z, z))
    assert same(*(pai.score("wanda", m, IMAGES, samples=None) for m in (plain, other)))
    found, expected = (
        pai.prune(m, IMAGES, "magnitude", 0.5, repair="layerwise+moments").model.state_dict()
        for m in (other, plain)
    )
    assert same(found, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scorer", ["fisher_diag", "snip", "px", "wanda"])
def test_images_are_taken_in_the_models_own_type(dtype: torch.dtype, scorer: str) -> None:
    model, own = Net().to(dtype), Images(8, dtype=torch.float32)
    own.images = own.images.to(dtype)
    found, expected = (pai.score(scorer, model, data, samples=None) for data in (IMAGES, own))
    assert same(found, expected)
    assert pai.evaluate(model, IMAGES).loss == pai.evaluate(model, own).loss
    pruned = [
        pai.prune(model, data, "magnitude", 0.5, samples=None, repair="layerwise").model
        for data in (IMAGES, own)
    ]
    assert same(*(each.state_dict() for each in pruned))


def test_images_keep_a_type_that_any_of_the_models_weights_has() -> None:
    model = Net()
    model.register_parameter("scale", nn.Parameter(torch.ones(1, dtype=torch.float64)))
    assert next(model.parameters()).dtype == torch.float64
    expected = pai.evaluate(Net(), IMAGES).loss
    assert pai.evaluate(model, IMAGES).loss == expected
