"""The lock, `pyproject.toml` and `environment.yml` name the same environment."""

import itertools
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LOCK_TEXT = (ROOT / "requirements.lock").read_text(encoding="utf-8")
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))

EXTRAS = ("book", "clip", "export", "test")
PYTHONS = ("3.11", "3.12", "3.13")
PLATFORMS = (("linux", "Linux", "x86_64"), ("darwin", "Darwin", "arm64"))


@dataclass(frozen=True)
class Pin:
    """One entry of the lock."""

    requirement: Requirement
    hashes: int

    @property
    def version(self) -> Version:
        (specifier,) = self.requirement.specifier
        assert specifier.operator == "=="
        return Version(specifier.version)

    def applies(self, environment: dict[str, str]) -> bool:
        marker = self.requirement.marker
        return marker is None or marker.evaluate(environment)


def _read_lock() -> list[Pin]:
    joined = re.sub(r"\\\n\s*", " ", LOCK_TEXT)
    entries = [line for line in joined.splitlines() if line and not line.lstrip().startswith("#")]
    pins = []
    for entry in entries:
        requirement, *hashes = re.split(r"\s+--hash=", entry)
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}\s*", value) for value in hashes), entry
        pins.append(Pin(Requirement(requirement), len(hashes)))
    return pins


LOCK = _read_lock()
DIRECT = [
    Requirement(text)
    for text in itertools.chain(
        PROJECT["project"]["dependencies"],
        *(PROJECT["project"]["optional-dependencies"][extra] for extra in EXTRAS),
    )
]
ENVIRONMENTS = [
    {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": platform,
        "platform_system": system,
        "platform_machine": machine,
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "os_name": "posix",
    }
    for python, (platform, system, machine) in itertools.product(PYTHONS, PLATFORMS)
]


def _pins(name: str, environment: dict[str, str]) -> list[Pin]:
    wanted = canonicalize_name(name)
    return [
        pin
        for pin in LOCK
        if canonicalize_name(pin.requirement.name) == wanted and pin.applies(environment)
    ]


@pytest.mark.parametrize("requirement", DIRECT, ids=lambda requirement: requirement.name)
def test_lock_holds_one_fitting_version_for_every_python_and_platform(
    requirement: Requirement,
) -> None:
    for environment in ENVIRONMENTS:
        (pin,) = _pins(requirement.name, environment)
        assert pin.version in requirement.specifier, environment


def test_no_package_is_locked_twice_for_one_environment() -> None:
    for environment in ENVIRONMENTS:
        names = [pin.requirement.name for pin in LOCK if pin.applies(environment)]
        assert len(names) == len(set(names))


def test_every_entry_of_the_lock_has_a_hash() -> None:
    assert [pin.requirement.name for pin in LOCK if pin.hashes == 0] == []


def test_lock_names_no_address_and_no_index() -> None:
    assert "://" not in LOCK_TEXT
    assert [pin.requirement.name for pin in LOCK if pin.requirement.url] == []
    assert re.findall(r"^\s*-", LOCK_TEXT.replace("    --hash", ""), flags=re.MULTILINE) == []


def test_lock_leaves_out_what_the_project_overrides() -> None:
    for text in PROJECT["tool"]["uv"]["override-dependencies"]:
        for environment in ENVIRONMENTS:
            assert _pins(Requirement(text).name, environment) == []


def test_lock_brings_the_installer_that_the_makefile_starts_with() -> None:
    # The Makefile cuts uv's entry out of the lock and installs it without dependencies.
    for environment in ENVIRONMENTS:
        assert len(_pins("uv", environment)) == 1
    assert len(re.findall(r"^uv==", LOCK_TEXT, flags=re.MULTILINE)) == 1


def test_conda_users_get_the_same_direct_dependencies() -> None:
    packages = next(entry["pip"] for entry in CONDA["dependencies"] if isinstance(entry, dict))
    *requirements, project = packages
    assert {str(Requirement(text)) for text in requirements} == {str(r) for r in DIRECT}
    assert len(requirements) == len(DIRECT)
    assert project == "--editable ."


def test_conda_users_get_a_supported_python() -> None:
    (python,) = [
        entry.removeprefix("python ")
        for entry in CONDA["dependencies"]
        if isinstance(entry, str) and entry.startswith("python ")
    ]
    assert SpecifierSet(python) == SpecifierSet(PROJECT["project"]["requires-python"])


def test_lock_covers_exactly_the_pythons_that_the_project_supports() -> None:
    supported = SpecifierSet(PROJECT["project"]["requires-python"])
    assert [f"3.{minor}" for minor in range(30) if f"3.{minor}" in supported] == list(PYTHONS)
    prefix = "Programming Language :: Python :: "
    classifiers = PROJECT["project"]["classifiers"]
    assert [text.removeprefix(prefix) for text in classifiers if prefix in text] == list(PYTHONS)
