"""What the page of this name promises, row by row, and the test that holds each row to it."""

import ast
import csv
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "book" / "what_it_takes.csv"
HELD_BY = {
    "any module from images to logits": (
        "scorers/test_registry.py::test_every_scorer_scores_every_way_of_using_a_weight"
    ),
    "a model inside `DataParallel`, `DistributedDataParallel` or `torch.compile`": (
        "support/test_contract.py::test_a_wrapped_classifier_is_the_one_inside"
    ),
    "one module under several names": ("test_untouched.py::test_the_model_is_exactly_as_it_was"),
    "a forward that changes its images in place": (
        "support/test_contract.py::test_a_model_that_changes_its_images_is_scored_as_one_that_does_not"
    ),
    "attention biases or fused weights kept between forwards": (
        "test_untouched.py::test_what_a_forward_kept_changes_no_score"
    ),
    "half-precision weights": (
        "support/test_contract.py::test_images_are_taken_in_the_models_own_type"
    ),
    "a forward that gives a tuple, a dictionary or an object": (
        "support/test_contract.py::test_a_model_without_plain_logits_is_refused_with_the_wrapper_it_needs"
    ),
    "convolutions and linear layers of any kind, also `nn.MultiheadAttention`": (
        "models/test_encoders.py::test_prunable_weights_of_any_module_include_every_layer_type"
    ),
    "one weight used several times": (
        "repair/test_methods.py::test_a_layer_that_is_called_twice_is_solved_over_both_uses"
    ),
    "layers called by keyword or without a batch dimension": (
        "repair/test_methods.py::test_layers_are_repaired_however_they_are_called"
    ),
    "LayerNorm of channels, first or last": (
        "repair/test_methods.py::test_moments_finds_the_channels_of_a_layer_norm_of_images"
    ),
    "BatchNorm without running statistics": (
        "repair/test_methods.py::test_a_batch_norm_of_the_batch_is_left_and_layers_beside_it_are_solved"
    ),
    "weights under `torch.nn.utils.prune`, `weight_norm` or a parametrisation": (
        "models/test_encoders.py::test_a_weight_that_is_computed_is_refused_unless_it_is_left_out"
    ),
    "weights that are standardised before they act (BiT, NFNet)": (
        "test_pruning.py::test_no_mask_is_made_or_applied_where_it_would_not_hold"
    ),
    "attention, gates and the usual activations, for `synflow` and `px`": (
        "scorers/test_paths.py::test_every_layer_of_a_chain_carries_the_whole_flow"
    ),
    "a product of two streams, or a function without a rule, for `synflow` and `px`": (
        "scorers/test_paths.py::test_a_function_without_a_rule_is_refused_by_its_name"
    ),
    "a model that is pruned already": (
        "test_pruning.py::test_a_pruned_model_is_pruned_further_to_the_exact_count_and_nothing_comes_back"
    ),
    "pairs of an image and an integer of any width": (
        "support/test_contract.py::test_an_integer_label_may_have_any_width"
    ),
    "images of whole numbers, as `uint8`": (
        "support/test_contract.py::test_data_of_another_kind_is_refused_by_what_it_is"
    ),
    "one-hot, float or boolean labels": (
        "support/test_contract.py::test_any_other_label_is_refused_in_one_way"
    ),
    "a DataLoader, dictionaries or triples": (
        "support/test_contract.py::test_data_of_another_kind_is_refused_by_what_it_is"
    ),
    "one or five channels, or rectangles": (
        "scorers/test_paths.py::test_synflow_takes_rectangles_and_as_many_channels_as_the_model"
    ),
    "any image that Pillow reads; turned by a camera; 16 bits; transparent; CMYK": (
        "data/test_datasets.py::test_a_task_has_the_pixels_that_the_transform_makes_of_its_files"
    ),
    "other files in a folder": (
        "data/test_datasets.py::test_every_file_that_is_not_read_is_counted"
    ),
    "`train/val/test` under the names that tools give them, in any case": (
        "data/test_datasets.py::test_a_folder_keeps_its_own_parts"
    ),
    "hidden folders, `__MACOSX`, `.ipynb_checkpoints`": (
        "data/test_datasets.py::test_hidden_and_system_folders_are_ignored"
    ),
    "one image in two parts": (
        "data/test_datasets.py::test_copies_of_an_image_in_two_parts_are_named"
    ),
    "more than fits": (
        "repair/test_methods.py::test_repair_is_the_same_in_batches_that_fit_into_memory"
    ),
}


def test_every_row_of_the_page_is_held_by_a_test() -> None:
    with PAGE.open(newline="") as file:
        promised = [row["you bring"] for row in csv.DictReader(file)]
    assert promised == list(HELD_BY)
    for test in HELD_BY.values():
        path, _, name = test.partition("::")
        tree = ast.parse((TESTS / path).read_text("utf-8"))
        assert name in {f.name for f in tree.body if isinstance(f, ast.FunctionDef)}, test
