"""The locks, `pyproject.toml` and `environment.yml` name the same environments."""

import itertools
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
# The extras that each lock holds.
EXTRAS = {"requirements": ("book", "clip", "export", "test"), "requirements-bench": ("bench",)}
PYTHONS = ("3.11", "3.12", "3.13")
ENVIRONMENTS = [
    {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": platform.lower(),
        "platform_system": platform,
        "platform_machine": machine,
    }
    for python in PYTHONS
    for platform, machine in (("Linux", "x86_64"), ("Darwin", "arm64"))
]
every_lock = pytest.mark.parametrize("lock", EXTRAS)


def text_of(lock: str) -> str:
    return (ROOT / f"{lock}.lock").read_text(encoding="utf-8")


def pins(lock: str) -> list[Requirement]:
    """The entries of a lock; that each has a hash, its installation requires."""
    return [
        Requirement(entry) for entry in re.findall(r"^([\w.-]+ *[=@][^\\\n]*)", text_of(lock), re.M)
    ]


def locked(lock: str, environment: dict[str, str]) -> dict[str, str]:
    """The version of every package in one environment."""
    versions: dict[str, str] = {}
    for pin in pins(lock):
        if pin.marker is None or pin.marker.evaluate(environment):
            name = canonicalize_name(pin.name)
            assert name not in versions, f"{name} is locked twice"
            versions[name] = str(pin.specifier).removeprefix("==")
    return versions


def asked_for(lock: str) -> list[Requirement]:
    extras = PROJECT["project"]["optional-dependencies"]
    texts = itertools.chain.from_iterable(extras[extra] for extra in EXTRAS[lock])
    own = PROJECT["project"]["dependencies"] if lock == "requirements" else []
    return [Requirement(text) for text in (*own, *texts)]


@every_lock
def test_a_lock_holds_one_fitting_version_for_every_python_and_platform(lock: str) -> None:
    overridden = [Requirement(t).name for t in PROJECT["tool"]["uv"]["override-dependencies"]]
    for environment in ENVIRONMENTS:
        versions = locked(lock, environment)
        for requirement in asked_for(lock):
            version = versions[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version, prereleases=True), requirement
        assert not set(overridden) & set(versions)


@every_lock
def test_a_lock_names_no_address_and_no_index(lock: str) -> None:
    assert "://" not in text_of(lock)
    assert [pin.name for pin in pins(lock) if pin.url] == []
    assert re.findall(r"^\s*-", text_of(lock).replace("    --hash", ""), flags=re.MULTILINE) == []


def test_both_locks_hold_the_same_version_of_what_they_share() -> None:
    first, second = (locked(lock, ENVIRONMENTS[0]) for lock in EXTRAS)
    shared = set(first) & set(second)
    assert {"torch", "timm", "pytest"} <= shared
    assert {name for name in shared if second[name] != first[name]} == set()


def test_the_lock_brings_the_installer_that_the_makefile_starts_with() -> None:
    # The Makefile cuts uv's entry out of the lock and installs it without dependencies.
    assert len(re.findall(r"^uv==", text_of("requirements"), flags=re.MULTILINE)) == 1


def test_conda_users_get_the_same_packages_on_a_supported_python() -> None:
    packages = next(entry["pip"] for entry in CONDA["dependencies"] if isinstance(entry, dict))
    *requirements, project = packages
    asked = sorted(map(str, asked_for("requirements")))
    assert sorted(str(Requirement(text)) for text in requirements) == asked
    assert project == "--editable ."
    (python,) = [text for text in CONDA["dependencies"] if str(text).startswith("python ")]
    supported = SpecifierSet(PROJECT["project"]["requires-python"])
    assert SpecifierSet(python.removeprefix("python ")) == supported


def test_the_pythons_tested_are_those_that_the_project_supports() -> None:
    supported = SpecifierSet(PROJECT["project"]["requires-python"])
    assert [f"3.{minor}" for minor in range(30) if f"3.{minor}" in supported] == list(PYTHONS)
    prefix = "Programming Language :: Python :: "
    classifiers = PROJECT["project"]["classifiers"]
    assert [text.removeprefix(prefix) for text in classifiers if prefix in text] == list(PYTHONS)
