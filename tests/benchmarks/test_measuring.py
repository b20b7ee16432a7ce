import sys

import pytest
import torch

from benchmarks.measuring import memory_level, peak_memory

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
