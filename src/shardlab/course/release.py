"""The course as a learner gets it: skeletons, notebooks without outputs, milestones, lectures, library, data; no answer in it.

shardlab release DIR --labs 1,2,3
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from shardlab import hardware
from shardlab.course import authoring
from shardlab.errors import CourseError
from shardlab.hardware import ROOT
from shardlab.labs import Lab
from shardlab.pages import page

MANIFEST = "manifest.json"
FORMAT = 1
KEPT = (
    "constraints.txt",
    "environment.yml",
    "install.mk",
    "pyproject.toml",
    "docs/site-guide.md",
    "src/shardlab",
    "slurm",
    "bench",
)
LEFT_OUT = ("__pycache__", "*.pyc", "*.egg-info", ".ipynb_checkpoints")
NOT_FOR_LEARNERS = ("bench/grading.py", "bench/engine.py", "src/shardlab/zero/engine_model.py")
OWN = ("src/exercises/", "labs/", "notebooks/")
"""Where a learner works: files there may change, those of milestones excepted."""
OF_MILESTONES = ("test_", "programs.py", "mistakes.json", "inputs.json", "skeleton.py")
"""How the names of these begin."""


class ReleaseError(CourseError, ValueError):
    """A release that cannot be made; the message says why."""


def make(target: Path, labs: list[Lab], root: Path = ROOT) -> dict:
    """Write the release.

    Args:
        target: a folder that is not there yet, or is empty.
        labs: those that it holds.
        root: the course with its solutions.

    Returns:
        The manifest.

    Raises:
        ReleaseError: there is something in the folder; the course has no solutions; or it has drifted from them.
    """
    if not (root / "solutions" / "exercises").is_dir():
        raise ReleaseError(f"{root} has no solutions to make skeletons from: it is a release itself.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ReleaseError(f"{target} is there and not empty. Name a new folder.")
    target = target.resolve()
    if target.is_relative_to(root.resolve() / "src") or target.is_relative_to(root.resolve() / "labs"):
        raise ReleaseError(f"{target} lies within what is copied. Name a folder outside of the course.")
    target.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        _copy(root / name, target / name)
    for name in NOT_FOR_LEARNERS:
        (target / name).unlink(missing_ok=True)
    exercises = target / "src" / "exercises"
    exercises.mkdir(parents=True)
    wanted = authoring.skeletons(root)
    (exercises / "__init__.py").write_text(authoring.PACKAGE, encoding="utf-8")
    for lab in labs:
        (target / lab.exercises.relative_to(root)).write_text(wanted[lab.exercises], encoding="utf-8")
        _copy(lab.folder, target / lab.folder.relative_to(root))
        (target / lab.skeleton.relative_to(root)).write_text(wanted[lab.exercises], encoding="utf-8")
    _write_notebooks(target, labs, root)
    (target / "README.md").write_text(_readme(labs), encoding="utf-8")
    (target / "Makefile").write_text(page("release_makefile"), encoding="utf-8")
    (target / ".gitignore").write_text((root / ".gitignore").read_text(encoding="utf-8"), encoding="utf-8")
    files = {str(p.relative_to(target)): digest(p) for p in sorted(target.rglob("*")) if p.is_file()}
    manifest = {
        "format": FORMAT,
        "course": "shardlab",
        "commit": hardware.commit(),
        "labs": [lab.stem for lab in labs],
        "files": files,
    }
    (target / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def changed(root: Path = ROOT) -> list[str] | None:
    """Files of a release that are not as they were released, without those that a learner writes; None where this is no release."""
    path = root / MANIFEST
    if not path.exists():
        return None
    files = json.loads(path.read_text())["files"]
    theirs = {name for name in files if name.startswith(OWN) and not Path(name).name.startswith(OF_MILESTONES)}
    return [
        name for name, was in files.items() if name not in theirs and (not (root / name).is_file() or digest(root / name) != was)
    ]


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(*LEFT_OUT))
    else:
        shutil.copy(source, target)


def _write_notebooks(target: Path, labs: list[Lab], root: Path) -> None:
    import nbformat

    sources = authoring.notebooks(root)
    for path in (place for lab in labs for place in (lab.notebook, lab.lecture_notebook) if place in sources):
        place = target / path.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(authoring.read_source(sources[path], path.stem), place)


def _readme(labs: list[Lab]) -> str:
    return page("release_readme.md", labs=labs)
