"""Settings and fixtures shared by the tests of the library."""

from collections.abc import Iterator

import pytest
import torch

from tests.cases import CASES, Case


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked ``cuda`` say that they were skipped where there is no GPU."""
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs CUDA")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test that fails once fails again."""
    torch.manual_seed(0)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """One tiny network and its data, in float64."""
    return CASES[request.param]()
