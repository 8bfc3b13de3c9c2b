"""One set of versions: environment.yml, constraints.txt and pyproject.toml name the same packages, and the same versions."""

import re
import tomllib

import pytest
import yaml

from shardlab.doctor.versions import canonical, pins
from shardlab.hardware import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEPENDENCIES = {canonical(re.match(r"[\w.-]+", line)[0]) for line in PROJECT["dependencies"]}
"""What pyproject.toml depends on, as pip compares names."""


@pytest.fixture(scope="module")
def environment() -> dict:
    return yaml.safe_load((ROOT / "environment.yml").read_text())


@pytest.fixture(scope="module")
def conda(environment) -> list[str]:
    return [line for line in environment["dependencies"] if isinstance(line, str)]


@pytest.fixture(scope="module")
def pip(environment) -> list[str]:
    return next(line["pip"] for line in environment["dependencies"] if isinstance(line, dict))


@pytest.fixture(scope="module")
def pip_versions(pip) -> dict[str, str]:
    named = [line.partition("==") for line in pip if not line.startswith("-")]
    assert all(equal for _, equal, _ in named), "every package of environment.yml has an exact version"
    return {canonical(name): version for name, _, version in named}


def test_constraints_are_exact_versions():
    """A constraint that allows a range is no record of what the course was run with; +cpu would forbid the build with CUDA."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.partition("#")[0].strip()]
    assert len(lines) == len(pins()), "no package stands there twice, and every line names a version"
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []


def test_every_dependency_is_pinned_and_in_the_environment(pip_versions):
    assert DEPENDENCIES - set(pins()) == set(), "missing from constraints.txt"
    assert DEPENDENCIES - set(pip_versions) == set(), "missing from environment.yml"
    assert set(pip_versions) - DEPENDENCIES == set(), "in environment.yml, but not in pyproject.toml"


def test_environment_has_the_versions_of_the_constraints(pip_versions):
    assert pip_versions == {name: version for name, version in pins().items() if name in pip_versions}


def test_environment_installs_the_course_itself_under_the_constraints(pip):
    """Without the constraints, what the named packages need in turn would come in whatever version is newest."""
    assert "-e ." in pip
    assert "-c constraints.txt" in pip


def test_environment_has_the_python_that_the_course_needs(conda):
    version = next(line.partition("=")[2] for line in conda if line.startswith("python="))
    assert PROJECT["requires-python"] == f">={version}"


def test_conda_and_pip_do_not_bring_the_same_package(conda, pip_versions):
    """Of two files written to one place the later wins, whatever its version."""
    assert {canonical(re.match(r"[\w.-]+", line)[0]) for line in conda} & set(pip_versions) == set()


def test_what_compiles_and_runs_the_ops_comes_from_conda(environment, conda):
    assert environment["channels"] == ["conda-forge"]
    assert {"cxx-compiler", "libaio", "numactl"} <= set(conda)
