"""Parameters of notebooks: how they are read, and that wrong ones are refused with a reason."""

import os
from importlib import import_module
from typing import Any

import pytest
import yaml

import pai_utils as pai
from pai_utils import SCORERS, TASKS
from pai_utils.studies.parameters import schema_of

MASKS = {
    "backbone": "efficientnet_lite0", "source": "digits", "targets": ["photos", "digits"],
    "sparsities": [0.2, 0.4], "out": "somewhere",
}  # fmt: skip
GIVEN: dict[str, dict[str, Any]] = {
    "zero_shot_retention": MASKS | {"scorers": ["ggn_diag"], "seeds": [0]},
    "scorer_atlas": {
        "backbone": "b", "sources": ["digits", "photos"], "scorers": ["snip", "random"],
        "sparsities": [0.5], "seeds": [0], "out": "o",
    },
    "finetune_recovery": MASKS | {
        "scorer": "ggn_diag", "starts": ["pruned"], "seeds": [0], "steps": [0, 5],
        "learning_rates": [1e-4],
    },
    "prune_your_own": MASKS | {"scorers": ["snip"]},
    "prune_per_task": {
        "backbone": "b", "sources": ["digits", "photos"], "scorers": ["random", "snip"],
        "sparsity": 0.5, "out": "o",
    },
    "landscape_analysis": MASKS | {"scorers": ["random"], "fractions": [0.5, 1.0]},
    "worked_examples": {"fractions": [0.5, 1.0], "correlation": 0.9, "out": "o"},
}  # fmt: skip


def read(notebook: str = "zero_shot_retention", **changes: Any) -> Any:
    return schema_of(notebook).from_notebook(GIVEN[notebook] | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsites": [0.4]}, r"unknown parameter 'sparsites'; did you mean 'sparsities'\?"),
        ({"seed": True}, "seed: .*not True"),
        ({"pretrained": 1}, "pretrained: .*not 1"),
        ({"sparsities": [0.1, float("nan")]}, r"sparsities\.1: .*not nan"),
        ({"sparsities": "[0.4"}, r"sparsities: .*not '\[0\.4'"),
        ({"scorers": ["magnitud"]}, r"scorers\.0: unknown scorer 'magnitud'; did you mean"),
        ({"source": 3}, r"source\.str: .*not 3"),
        ({"source": ["digits", "mnist"]}, "source: unknown task 'mnist'"),
        ({"source": "digits+leafs"}, "source: unknown task 'leafs'; did you mean 'leaves'"),
        ({"source": ["digits"], "targets": ["digits"]}, "only target is the source digits; add an"),
        ({"precision": "float61"}, "precision: unknown precision 'float61'; did you mean 'float16"),
        ({"heads": "texts"}, "heads: unknown kind of head 'texts'; did you mean 'text'"),
        ({"repairs": ["moments"]}, "repairs: masks without repair .*add none"),
        ({"repairs": ["none", "layerwize"]}, "unknown repair 'layerwize'; did you mean 'layerwise"),
        ({"repair_options": {"damp": 1}}, "unknown repair option 'damp'"),
        ({"scope": "2:4"}, "keeps 2 of every 4 weights: its sparsity is 0.5, not 0.2"),
        ({"rounds": 0}, "rounds=0: at least one round is needed"),
        ({"out": ""}, "out: .*not ''"),
    ],
)
def test_a_wrong_parameter_is_told_with_the_valid_names(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read(**changes)
    for name in schema_of("zero_shot_retention").model_fields:
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("notebook", "changes", "message"),
    [
        ("scorer_atlas", {"options": {"px": {}}}, "refused: unknown scorer of options 'px'"),
        ("finetune_recovery", {"starts": ["dens"]}, r"unknown start 'dens'; did you mean 'dense'"),
        ("finetune_recovery", {"penalties": {"none": 0, "feature": 1}}, "penalty 'feature'"),
        ("finetune_recovery", {"penalties": {"features": 1}}, "add none"),
        ("finetune_recovery", {"prune_by": "noise"}, "noise has no part of the source digits"),
        ("finetune_recovery", {"prune_by": "digits+photos"}, "the target photos, which is held"),
        ("finetune_recovery", {"optimiser": "lion"}, "unknown optimiser 'lion'.*sgd, adam"),
        ("finetune_recovery", {"schedule": "cosine"}, "schedule 'cosine'.*constant, linear"),
        ("prune_your_own", {"tolerance": 1.0}, "tolerance"),
        ("prune_your_own", {"formats": ["onxx"]}, "unknown format 'onxx'; did you mean 'onnx'"),
        ("prune_your_own", {"prune_by": "digits+photos:altered"}, "the target photos, which is"),
        ("prune_per_task", {"scorers": ["random", "magnitude"]}, "none of random, magnitude looks"),
        ("landscape_analysis", {"fractions": [0.25, 0.5]}, r"add 1\.0"),
        ("landscape_analysis", {"eigenvectors": 9, "products": 5}, "as many products; got 5"),
        ("landscape_analysis", {"comparisons": ["brief"]}, "comparison 'brief'.*random, trained"),
    ],
)
def test_what_one_notebook_cannot_do_is_refused_at_once(
    notebook: str, changes: dict[str, Any], message: str
) -> None:
    assert read(notebook)
    with pytest.raises(ValueError, match=message):
        read(notebook, **changes)


@pytest.mark.parametrize("name", ["backbone", "source", "seeds", "out"])
def test_a_missing_parameter_is_named(name: str) -> None:
    given = {key: value for key, value in GIVEN["zero_shot_retention"].items() if key != name}
    with pytest.raises(ValueError, match=f"{name}: Field required.*Valid parameters: .*backbone, "):
        schema_of("zero_shot_retention").from_notebook(given)


def test_several_problems_are_told_together() -> None:
    with pytest.raises(ValueError, match="parameters refused") as error:
        read(targets=["digit"], scorers=["snap"])
    assert str(error.value) == (
        "parameters refused: "
        f"targets.0: unknown task 'digit'; did you mean 'digits'? Choose from: {', '.join(TASKS)}; "
        f"scorers.0: unknown scorer 'snap'; did you mean 'snip'? Choose from: {', '.join(SCORERS)}."
        f" Valid parameters: {', '.join(schema_of('zero_shot_retention').model_fields)}"
    )


def test_a_notebook_without_a_study_is_named() -> None:
    with pytest.raises(ValueError, match="unknown notebook 'scorer_atlass'; did you mean"):
        schema_of("scorer_atlass")


def test_a_kernels_own_names_are_no_parameters() -> None:
    kernel: dict[str, Any] = {
        "pai": pai, "os": os, "_i1": "text", "__name__": "__main__", "In": [], "Out": {},
        "exit": exit, "open": open, "import_module": import_module,
    }  # fmt: skip
    assert read(**kernel) == read()


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("sparsities", "[0.4]", [0.4]),
        ("sparsities", " [0.2, 1e-1]", [0.2, 0.1]),
        ("sparsities", "[0]", [0.0]),
        ("source", "[digits, mnist5k]", ["digits", "mnist5k"]),
        ("targets", '["photos"]', ["photos"]),
        ("repair_options", "{samples: 600, damping: 1e-1}", {"samples": 600, "damping": 0.1}),
    ],
)
def test_lists_and_mappings_that_papermill_passes_as_text_are_read(
    name: str, text: str, value: object
) -> None:
    assert getattr(read(**{name: text}), name) == value


def test_numbers_that_papermills_files_leave_as_text_are_read_where_a_number_belongs() -> None:
    given = yaml.safe_load("{learning_rates: [1e-5, 3E-4], penalties: {none: 0, features: 1e3}}")
    assert given["learning_rates"] == ["1e-5", "3E-4"]
    found = read("finetune_recovery", **given, out="1e5")
    assert found.learning_rates == [1e-5, 3e-4]
    assert found.penalties == {"none": 0, "features": 1000}
    assert found.out == "1e5"
    with pytest.raises(ValueError, match=r"learning_rates\.0: .*greater than 0, not -1e-05"):
        read("finetune_recovery", learning_rates=["-1e-5"])


@pytest.mark.parametrize("notebook", ["zero_shot_retention", "prune_your_own"])
def test_the_tasks_of_a_run_are_each_named_once_the_source_first(notebook: str) -> None:
    assert read(notebook, targets=["photos", "digits", "photos"]).tasks == ["digits", "photos"]
