import subprocess
import sys
import time

import pytest
import torch

from benchmarks.measuring import in_turns, memory_level, peak_memory
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


@pytest.mark.skipif(sys.platform != "linux", reason="page faults of glibc's allocator")
def test_times_are_taken_without_page_faults() -> None:
    script = """
import resource, torch
from benchmarks.measuring import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
usual = [faults() for _ in range(20)]
keep_freed_memory()
kept = [faults() for _ in range(20)]
print(min(usual), kept[-1])
"""
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    usual, kept = map(int, out.split())
    assert usual > 10_000
    assert kept < 100


def test_a_step_is_timed_in_multiples_of_its_unit() -> None:
    timing = in_turns(lambda: time.sleep(0.03), lambda: time.sleep(0.01), CPU, budget=0)
    assert len(timing.seconds) == len(timing.unit) == 3
    assert 1.5 < timing.multiple < 4
    low, high = timing.spread
    assert low <= high


def test_turns_end_with_the_budget() -> None:
    assert len(in_turns(lambda: None, None, CPU, budget=10, most=5).seconds) == 5
    turns = in_turns(lambda: time.sleep(0.05), None, CPU, budget=0.2, least=1).seconds
    assert 1 <= len(turns) <= 4


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
