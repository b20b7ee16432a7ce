"""YAML as people write it."""

import math
from typing import Any

import pytest

from pai_utils.support.written import read_exponents, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5), ("1E3", 1e3), ("+.5e-2", 0.005), ("-.5", -0.5), ("5.", 5.0),
        ("-.inf", -math.inf),
        ("010", 10), ("1_000", 1000), ("-3", -3), ("None", None), ("~", None), ("yes", True),
        ("2:4", "2:4"), ("2026-01-31", "2026-01-31"), ("1e-5x", "1e-5x"), ("e5", "e5"),
        ("'1e-5'", "1e-5"), ("Nonesuch", "Nonesuch"), ("0x10", "0x10"),
    ],
)  # fmt: skip
def test_a_plain_word_is_what_people_mean_by_it(text: str, value: Any) -> None:
    found = read_yaml(text)
    assert (found, type(found)) == (value, type(value))


def test_a_key_that_is_there_twice_is_refused_by_name_and_place() -> None:
    for text in ("a: 1\nb: {x: 1, y: 2, x: 3}", "b: 0\nx: 1\nx: 1"):
        with pytest.raises(ValueError, match="'x' is there twice, line 2"):
            read_yaml(text)
    assert read_yaml("{1: a, '1': b}") == {1: "a", "1": "b"}


def test_keys_that_a_merge_brings_may_be_set_anew() -> None:
    text = "a: &a {x: 1, y: 2}\nb: &b\n  <<: *a\n  x: 3\nc:\n  <<: *b\n  y: 4"
    assert read_yaml(text)["c"] == {"x": 3, "y": 4}


def test_numbers_with_exponents_that_others_leave_as_text_are_found_everywhere() -> None:
    left: Any = {"a": ["1e-5", {"b": "2E3"}, "12", "0.5", "e5"], "c": "x1e5"}
    assert read_exponents(left) == {"a": [1e-5, {"b": 2e3}, "12", "0.5", "e5"], "c": "x1e5"}
