"""Values as people write them in YAML: in grids, in profiles and on the command line."""

from __future__ import annotations

import re
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"
_INTEGER = re.compile(r"[-+]?[0-9][0-9_]*\Z")
_FLOAT = re.compile(
    r"([-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))\Z"
)


class _Loader(yaml.SafeLoader):
    """Numbers of YAML 1.2, days as text, and no key twice."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [pair for pair in pairs if not pair[0].endswith((":int", ":float", ":timestamp"))]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping as it is written, before ``<<`` brings keys that its own replace."""
        node = super().compose_mapping_node(anchor)
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, _ in node.value:
            if keys.count((key.tag, key.value)) > 1:
                problem = f"{key.value!r} is there twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return node


# As in YAML 1.2, and Python's None. PyYAML follows YAML 1.1, where 1e-5 is text, 2:4 is 124, 010 is
# 8, and a day is no text.
_Loader.add_implicit_resolver(_TAG + "int", _INTEGER, list("-+0123456789"))
_Loader.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+.0123456789"))
_Loader.add_implicit_resolver(_TAG + "null", re.compile(r"None\Z"), ["N"])
_Loader.add_constructor(_TAG + "int", lambda _, node: int(node.value))


def read_yaml(text: str) -> Any:
    """What a text in YAML holds.

    Numbers are those of YAML 1.2, so that ``1e-5`` is one; days stay text, and ``None`` is null.

    Raises:
        ValueError: it is no YAML, or a mapping has a key twice; the message names line and column.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        said = " ".join(str(error).split()).replace(' in "<unicode string>"', "")
        raise ValueError(said) from error


def read_exponents(value: Any) -> Any:
    """Texts such as ``1e-5`` as the numbers that they are, in lists and mappings too.

    Other programs read YAML 1.1, which takes them for text; papermill's ``-f`` does.
    """
    if isinstance(value, list):
        return [read_exponents(each) for each in value]
    if isinstance(value, dict):
        return {key: read_exponents(each) for key, each in value.items()}
    exponent = isinstance(value, str) and "e" in value.casefold() and _FLOAT.match(value)
    return float(value) if exponent else value
