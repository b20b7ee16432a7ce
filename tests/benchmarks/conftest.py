"""Fixtures of the tests of benchmarks."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _collect_only_what_is_new() -> Iterator[None]:
    """Benchmarks collect garbage before each call: slow, if it is all that earlier tests left."""
    gc.freeze()
    yield
    gc.unfreeze()
