"""A lab is two folders: one is made in a copy of the course, built, released, run, proven and graded; nothing else is touched."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shardlab.hardware import ROOT
from shardlab.sandbox.boxes import isolation

pytestmark = pytest.mark.boxes

STEM = "lab97_throwaway"
COURSE = (
    "README.md",
    "bench",
    "constraints.txt",
    "install.mk",
    "docs",
    "environment.yml",
    "labs",
    "notebooks",
    "pyproject.toml",
    "slurm",
    "solutions",
    "src",
    ".gitignore",
)
FILES = {
    f"labs/{STEM}/lab.toml": """number = 97
title = "Throw-away"
minutes = 5
lecture = "97_means"
writes = "a mean over ranks"
""",
    f"labs/{STEM}/test_{STEM}.py": f'''"""Milestones of lab 97."""

import pytest

from shardlab.milestones.messages import require
from shardlab.run.experiment import Experiment


def found(run_experiments, ranks: int) -> list[float]:
    plan = Experiment(name="means", program="labs/{STEM}/programs.py:mean_of_ranks", ranks=ranks)
    return run_experiments([plan])["means"].results["means"]


@pytest.mark.milestone(task="97.1", points=100)
def test_mean_of_two_ranks(lab, run_experiments):
    lab.mean_over_ranks  # noqa: B018
    require(
        found(run_experiments, 2) == [0.5, 0.5],
        expected="the mean of 0 and 1 on both ranks",
        got=found(run_experiments, 2),
        likely="the sum is not the mean",
    )
''',
    f"labs/{STEM}/programs.py": f'''"""What ranks run for the milestones of this lab."""

from shardlab import switch
from shardlab.run.collectives import gather, rank


def mean_of_ranks(experiment, run) -> dict:
    return {{"means": gather(switch.import_exercise("{STEM}").mean_over_ranks(float(rank())))}}
''',
    f"solutions/{STEM}/{STEM}.py": '''"""Lab 97: a mean."""


def mean_over_ranks(value: float) -> float:
    """The mean of `value` over all ranks; every rank calls this."""
    # BEGIN SOLUTION 97.1
    import torch
    import torch.distributed as dist

    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor(value, device=device)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()
    # END SOLUTION
''',
    f"solutions/{STEM}/hidden_{STEM}.py": f'''"""Hidden milestones of lab 97."""

import pytest
from test_{STEM} import found


@pytest.mark.milestone(task="97.1", ranks=3)
def test_mean_of_three_ranks(lab, run_experiments):
    assert found(run_experiments, 3) == [1.0] * 3
''',
    f"solutions/{STEM}/mutants.toml": """[[mutant]]
task = "97.1"
name = "the sum"
says = "the sum is not the mean"
old = " / dist.get_world_size()"
new = ""
""",
    f"solutions/{STEM}/text.py": f"""# %% [markdown]
# # Lab 97

# %%
from shardlab.show.notebook import check, start

lab = start("{STEM}")

# %%
check("97.1")
""",
    f"solutions/{STEM}/lecture.py": "# %% [markdown]\n# # Means\n\n# %%\nprint(sum([1, 2, 3]) / 3)\n",
}


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A copy of the course with the new lab in it."""
    copy = tmp_path_factory.mktemp("new-lab") / "course"
    for name in COURSE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            copy.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    for name, text in FILES.items():
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text(text)
    return copy


def run(course: Path, *words: str) -> str:
    """What `python` with these words prints in a course's folder, with that course's library."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=course,
        env=os.environ | {"PYTHONPATH": str(course / "src")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def contents(folder: Path) -> dict[str, str]:
    """Every file, and a digest of it; without tables of labs, which are made."""
    marks = ("<!-- labs", "<!-- end of labs -->", "| ")
    return {
        str(path.relative_to(folder)): hashlib.sha256(
            b"".join(line for line in path.read_bytes().splitlines() if not line.startswith(tuple(mark.encode() for mark in marks)))
        ).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.mark.timeout(900)
def test_a_whole_lab_is_two_folders(course, tmp_path):
    before = contents(course)
    cli = ("-m", "shardlab.cli")
    run(course, *cli, "build")
    run(course, *cli, "build", "--execute", "--only", STEM)
    run(course, *cli, "build", "--check")
    after = contents(course)
    made = {f"src/exercises/{STEM}.py", f"labs/{STEM}/{STEM}.ipynb", "notebooks/97_means.ipynb", f"solutions/{STEM}/{STEM}.ipynb"}
    assert set(after) - set(before) == made
    assert {name for name in before if after[name] != before[name]} == set()
    assert "Task 97.1: complete mean_over_ranks()" in (course / "src/exercises" / f"{STEM}.py").read_text()
    for page in ("README.md", "docs/instructor-guide.md"):
        row = f"(labs/{STEM}/{STEM}.ipynb) | [`97_means`](notebooks/97_means.ipynb) | a mean over ranks | 5 |"
        assert row in (course / page).read_text().replace("../", "")
    assert "97.1 passed" in (course / "solutions" / STEM / f"{STEM}.ipynb").read_text()

    proven = run(course, *cli, "matrix", "97")
    assert proven.count("as it should") == 3, proven

    released = tmp_path / "released"
    run(course, *cli, "release", str(released), "--labs", "97")
    assert [path.name for path in (released / "labs").iterdir()] == [STEM]
    assert not [path for path in released.rglob("*") if "hidden" in path.name or "mutants" in path.name]
    assert f"[`{STEM}`](labs/{STEM}/{STEM}.ipynb)" in (released / "README.md").read_text()


@pytest.mark.timeout(600)
def test_a_new_lab_is_graded_in_a_box(course, tmp_path):
    if isolation()[0] != "bubblewrap":
        pytest.skip(f"no boxes here: {isolation()[1]}")
    exercises = tmp_path / "class" / "ada" / "exercises"
    exercises.mkdir(parents=True)
    (exercises / "__init__.py").touch()
    shutil.copy(course / "solutions" / STEM / f"{STEM}.py", exercises)
    out = tmp_path / "out"
    run(course, "-m", "shardlab.cli", "grade", str(tmp_path / "class"), "--out", str(out), "--labs", "97")
    (result,) = [json.loads(path.read_text()) for path in (out / "results").glob("*.json")]
    assert {(m["task"], m["hidden"], m["verdict"]) for m in result["milestones"]} == {
        ("97.1", False, "passed"),
        ("97.1", True, "passed"),
    }, result
