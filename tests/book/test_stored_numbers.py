"""Numbers of sentences come from one value of a stored table, or not at all."""

from pathlib import Path

import pytest
from stored_numbers import stored_value


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "left.csv"
    path.write_text("method,of all,low\nsnip,0.5,\npx,0.25,\n")
    return path


def test_a_value_is_that_of_the_rows_named(table: Path) -> None:
    assert stored_value(table, 'method == "px"', "100 * `of all`") == 25
    assert stored_value(table, "", "`of all`.max()") == 0.5
    assert stored_value(table, "", "`of all`[method == 'px'].mean() < `of all`.mean()")


@pytest.mark.parametrize(
    ("rows", "value", "message"),
    [
        ("", "`of all`", "not one value where 'anything'"),
        ('method == "grasp"', "`of all`", "not one value where 'method == \"grasp\"'"),
        ("", "low.max()", "not one value"),
        ("", "high.max()", "left.csv: name 'high' is not defined"),
        ("", "low.max(", "left.csv"),
    ],
)
def test_several_values_none_or_no_column_are_refused(
    table: Path, rows: str, value: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        stored_value(table, rows, value)


def test_a_table_that_is_not_stored_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.csv: .* No such file"):
        stored_value(tmp_path / "gone.csv", "", "low.max()")
