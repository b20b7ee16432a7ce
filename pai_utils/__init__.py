"""Second-order pruning of pre-trained vision encoders, and what survives it on unseen tasks.

The public names are loaded when first used, so that importing the package stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pai_utils import (
        atlas,
        evaluation,
        export,
        finetuning,
        landscape,
        plots,
        runs,
        selection,
        shared,
        sources,
    )
    from pai_utils.backbones import Backbone, Classifier, load_backbone, prunable_parameters
    from pai_utils.clip import zero_shot_head
    from pai_utils.evaluation import Evaluation, evaluate
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
    )
    from pai_utils.finetuning import finetune
    from pai_utils.heads import fit_head, make_heads
    from pai_utils.masks import Mask, describe_weights, make_mask
    from pai_utils.pruning import Pruned, prune, select_parameters
    from pai_utils.scorers import SCORERS, Scores, score
    from pai_utils.tasks import TASKS, Task, load_task

_HOMES = {
    "Backbone": "backbones",
    "Classifier": "backbones",
    "load_backbone": "backbones",
    "prunable_parameters": "backbones",
    "TASKS": "tasks",
    "Task": "tasks",
    "load_task": "tasks",
    "fit_head": "heads",
    "make_heads": "heads",
    "zero_shot_head": "clip",
    "SCORERS": "scorers",
    "Scores": "scorers",
    "score": "scorers",
    "Mask": "masks",
    "describe_weights": "masks",
    "make_mask": "masks",
    "Pruned": "pruning",
    "prune": "pruning",
    "select_parameters": "pruning",
    "Evaluation": "evaluation",
    "evaluate": "evaluation",
    "finetune": "finetuning",
    "check_compressed": "export",
    "check_onnx": "export",
    "export_onnx": "export",
    "load_classifier": "export",
    "load_compressed": "export",
    "measure_speedup": "export",
    "save_compressed": "export",
    "save_dense": "export",
    "to_semi_structured": "export",
}
_MODULES = (
    "atlas",
    "evaluation",
    "export",
    "finetuning",
    "landscape",
    "plots",
    "runs",
    "selection",
    "shared",
    "sources",
)

__all__ = [
    "SCORERS",
    "TASKS",
    "Backbone",
    "Classifier",
    "Evaluation",
    "Mask",
    "Pruned",
    "Scores",
    "Task",
    "atlas",
    "check_compressed",
    "check_onnx",
    "describe_weights",
    "evaluate",
    "evaluation",
    "export",
    "export_onnx",
    "finetune",
    "finetuning",
    "fit_head",
    "landscape",
    "load_backbone",
    "load_classifier",
    "load_compressed",
    "load_task",
    "make_heads",
    "make_mask",
    "measure_speedup",
    "plots",
    "prunable_parameters",
    "prune",
    "runs",
    "save_compressed",
    "save_dense",
    "score",
    "select_parameters",
    "selection",
    "shared",
    "sources",
    "to_semi_structured",
    "zero_shot_head",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
