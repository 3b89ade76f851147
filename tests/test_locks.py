"""Tests that the locks agree with pyproject.toml, are complete, and contain no index or path."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10.0", "3.11.7", "3.12.1", "3.13.0")


def section(name: str) -> list[str]:
    """Return the strings of a list in pyproject.toml (Python 3.10 has no TOML reader)."""
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(rf"^{name} = \[(.*?)\]( *#.*)?$", text, re.MULTILINE | re.DOTALL)
    return re.findall(r'"([^"]+)"', found.group(1))


def locked(name: str) -> list[tuple[Requirement, int]]:
    """Return the requirements of a file in locks/ with the number of hashes of each."""
    text = (ROOT / "locks" / name).read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    return [(Requirement(line.partition("--hash")[0]), line.count("--hash=sha256:")) for line in lines]


def environment(python: str) -> dict[str, str]:
    return {
        "python_version": ".".join(python.split(".")[:2]),
        "python_full_version": python,
        "sys_platform": "linux",
        "platform_machine": "x86_64",
        "extra": "",
    }


@pytest.mark.parametrize("python", PYTHONS)
def test_the_demos_dependencies_are_locked_to_versions_that_pyproject_allows(python):
    pins = {
        canonicalize_name(pin.name): str(pin.specifier).removeprefix("==")
        for pin, _ in locked("demo.txt")
        if pin.marker is None or pin.marker.evaluate(environment(python))
    }
    assert "torch" not in pins  # the hashes of its builds differ
    for wanted in map(Requirement, section("dependencies") + section("demo") + section("requires")):
        if wanted.name != "torch":
            assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)]), wanted


def test_every_locked_package_has_one_version_and_hashes():
    for name in ("build.txt", "demo.txt"):
        for pin, hashes in locked(name):
            assert re.fullmatch(r"==[^,]+", str(pin.specifier)) and hashes, (name, pin)


def test_versions_of_the_test_environment_agree_with_the_demos():
    versions = {(pin.name, str(pin.marker)): str(pin.specifier) for pin, _ in locked("test.txt")}
    for pin, _ in locked("demo.txt"):
        assert versions.get((pin.name, str(pin.marker)), str(pin.specifier)) == str(pin.specifier), pin


@pytest.mark.parametrize("name", ["build.in", "build.txt", "demo.txt", "test.txt"])
def test_a_lock_names_no_index_and_no_path(name):
    text = (ROOT / "locks" / name).read_text()
    assert not re.search(r"://|^-|index|/(home|root|tmp|opt|work)/", text, re.MULTILINE)
