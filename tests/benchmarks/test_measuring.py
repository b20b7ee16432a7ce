import sys

import pytest
import torch

from benchmarks.measuring import memory_level, peak_memory
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
