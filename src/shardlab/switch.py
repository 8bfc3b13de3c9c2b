"""Which `exercises` package is in use: the learner's, the solutions, or a submission. There is one switch, and this is it.

The choice is the environment variable `SHARDLAB_EXERCISES`, so that ranks inherit it: a folder that holds `exercises/`.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from shardlab.errors import UsageError
from shardlab.hardware import ROOT

VARIABLE = "SHARDLAB_EXERCISES"
LEARNER = ROOT / "src"
SOLUTIONS = ROOT / "solutions"


def exercises_folder() -> Path:
    """The folder that holds the `exercises` package in use."""
    return Path(os.environ.get(VARIABLE, LEARNER))


def exercise_file(stem: str, folder: Path | None = None) -> Path:
    """The file of a lab's exercises, in the folder in use by default; the solutions have it in the lab's own folder."""
    folder = folder or exercises_folder()
    apart = folder / stem / f"{stem}.py"
    return apart if apart.exists() else folder / "exercises" / f"{stem}.py"


def exercise_files() -> list[Path]:
    """The files of all exercises in use, where they are edited."""
    folder = exercises_folder()
    apart = [path / f"{path.name}.py" for path in folder.glob("lab*")]
    return sorted([*(folder / "exercises").glob("*.py"), *(path for path in apart if path.exists())])


def use_exercises(folder: Path | str) -> Path:
    """Make `import exercises` mean the package in `folder`, in this process and in every rank launched from it.

    Args:
        folder: a folder that holds `exercises/`, or `exercises/` itself.

    Raises:
        ValueError: there is no `exercises` package there.
    """
    folder = Path(folder).resolve()
    if folder.name == "exercises" and not (folder / "exercises").is_dir():
        folder = folder.parent
    if not (folder / "exercises").is_dir():
        raise UsageError(f"{folder} holds no folder 'exercises'. Name the folder that contains it, as src/ or solutions/ do.")
    os.environ[VARIABLE] = str(folder)
    for module in [m for m in sys.modules if m == "exercises" or m.startswith("exercises.")]:
        del sys.modules[module]
    sys.path[:] = [
        str(folder),
        *(p for p in sys.path if Path(p or ".").resolve() not in (LEARNER, SOLUTIONS, folder)),
        str(LEARNER),
    ]
    importlib.invalidate_caches()
    return folder


def import_exercise(stem: str):
    """Import `exercises.<stem>` from the folder in use."""
    if str(exercises_folder()) not in sys.path[:1]:
        use_exercises(exercises_folder())
    return importlib.import_module(f"exercises.{stem}")
