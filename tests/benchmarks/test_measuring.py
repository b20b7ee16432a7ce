import sys

import pytest
import torch

from benchmarks.measuring import memory_level, peak_memory
from benchmarks.problems import LAYOUTS
from benchmarks.work import forward_gflop, unit_gflop
from tests.benchmarks.fakes import tiny

CPU = torch.device("cpu")
MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is reset through Linux's /proc")
def test_peak_memory_is_that_of_the_calls_inside() -> None:
    with peak_memory(CPU, memory_level(CPU)) as before:
        torch.ones(100 * MIB // 4)
    with peak_memory(CPU, memory_level(CPU)) as peak:
        torch.ones(50 * MIB // 4)
    assert 98 * MIB <= before.bytes <= 110 * MIB
    assert 48 * MIB <= peak.bytes <= 60 * MIB


def test_the_count_of_the_unit_is_that_of_its_operations_without_the_images_gradient() -> None:
    problem = tiny(4)
    convolution, linear = 4 * 8 * 256 * 27 * 2, 4 * 2048 * 5 * 2
    assert forward_gflop(problem.model, problem.images) * 1e9 == convolution + linear
    assert unit_gflop(problem) * 1e9 == pytest.approx(2 * convolution + 3 * linear)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_changes_neither_values_nor_the_other_layouts(layout: str) -> None:
    problem = tiny(4)
    other = problem.in_layout(layout)
    assert other.model is not problem.model
    torch.testing.assert_close(other.loss, problem.loss)
    assert problem.images.is_contiguous()
    assert all(p.is_contiguous() for p in problem.parameters.values())


def test_an_unknown_layout_is_refused_with_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown layout 'strided'.*channels-last images"):
        tiny(2).in_layout("strided")
