"""The second lock agrees with the first, and names no address."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "requirements-bench.lock").read_text(encoding="utf-8")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "optional-dependencies"
]


def pins(text: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", text, flags=re.MULTILINE):
        found.setdefault(canonicalize_name(name), set()).add(version)
    return found


def test_both_locks_hold_the_same_version_of_what_they_share() -> None:
    first, second = pins((ROOT / "requirements.lock").read_text(encoding="utf-8")), pins(TEXT)
    shared = set(first) & set(second)
    assert {"torch", "timm", "pytest"} <= shared
    assert {name for name in shared if second[name] != first[name]} == set()


def test_the_second_lock_holds_the_peers_in_versions_that_are_asked_for() -> None:
    locked = pins(TEXT)
    for text in EXTRAS["bench"]:
        requirement = Requirement(text)
        (version,) = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True)


def test_every_entry_has_a_hash_and_none_an_address() -> None:
    entries = re.sub(r"\\\n\s*", " ", TEXT).splitlines()
    entries = [line for line in entries if line and not line.lstrip().startswith("#")]
    assert [line for line in entries if "--hash=sha256:" not in line] == []
    assert "://" not in TEXT
