"""Sphinx extension: numbers of sentences, read from the stored results.

``{stored}`TABLE | ROWS | VALUE | FORMAT` `` stands for one number: `VALUE`, an expression of the
columns of `results/TABLE`, over the rows where the condition `ROWS` holds (all, if it is empty).
``{holds}`TABLE | ROWS | CLAIM` `` shows nothing, and is an error unless the claim is true: it keeps
the words of a sentence beside it in agreement with what is stored. Expressions are those of
`pandas.DataFrame.eval`.
"""

from pathlib import Path
from tokenize import TokenError
from typing import Any

import pandas as pd
from docutils.nodes import Node, Text, system_message
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxRole

RESULTS = Path(__file__).resolve().parents[2] / "results"


def stored_value(table: Path, rows: str, value: str) -> Any:
    """Return the one value of an expression over some rows of a table.

    Raises:
        ValueError: there is no such table or column, or the rows have several values or none.
    """
    try:
        found = pd.read_csv(table)
        found = found.query(rows, engine="python") if rows else found
        values = found.eval(value, engine="python")
    except (OSError, SyntaxError, TokenError, pd.errors.UndefinedVariableError) as error:
        raise ValueError(f"{table.name}: {error}") from error
    different = set(values) if isinstance(values, pd.Series) else {values}
    if len(different) != 1 or pd.isna(one := different.pop()):
        raise ValueError(f"{table.name}: {value!r} is not one value where {rows or 'anything'!r}")
    return one


class Stored(SphinxRole):
    """A number, or an assertion about numbers, with its table noted as a dependency."""

    def run(self) -> tuple[list[Node], list[system_message]]:
        """Read the value; a mistake is an error of the page."""
        table, rows, value, *form = (part.strip() for part in self.text.split(" | "))
        self.env.note_dependency(str(RESULTS / table))
        try:
            found = stored_value(RESULTS / table, rows, value)
            if self.name == "stored":
                return [Text(f"{found:{form[0]}}")], []
            if not found:
                raise ValueError(f"{table}: {value!r} is not true where {rows or 'anything'!r}")
        except (ValueError, IndexError) as error:
            return [], [self.inliner.reporter.error(f"{self.name}: {error}", line=self.lineno)]
        return [], []


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension with Sphinx."""
    app.add_role("stored", Stored())
    app.add_role("holds", Stored())
    return {"version": "1.0", "parallel_read_safe": True, "parallel_write_safe": True}
