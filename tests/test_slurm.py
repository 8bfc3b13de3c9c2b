"""The batch script: sound shell, and directives that are directives, each with its reason."""

import shutil
import subprocess

import pytest

from shardlab.hardware import ROOT

SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_directive_has_its_reason_and_none_is_a_comment(path):
    lines = path.read_text().splitlines()
    assert not [line for line in lines if line.startswith("# SBATCH")], "a space makes it a comment"
    directives = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert len(directives) >= 5
    for number in directives:
        assert lines[number - 1].startswith("# "), f"line {number + 1} has no reason above it"
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert max(directives) < first_command, "sbatch reads no directive behind the first command"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path):
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed: apt-get install shellcheck")
    done = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
