"""Tests of one page share what a browser saw of it, so that one process takes them all."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group tests by their page, for `pytest --dist=loadgroup`."""
    for item in items:
        page = getattr(item, "callspec", None) and item.callspec.params.get("page")  # type: ignore[attr-defined]
        if page:
            item.add_marker(pytest.mark.xdist_group(page))
