"""Put a project together that runs without the course: what is given in my_project, and your exercises.

    python labs/lab08_language_model/make_project.py ~/my_project

The exercises are those in `src/exercises`; they become `language_model.py`. A project that is there already gets
the newest exercises, and its other files stay as they are.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path

from shardlab import switch
from shardlab.errors import CourseError

STEM = "lab08_language_model"
GIVEN = Path(__file__).parent / "my_project"


def make(folder: Path) -> list[str]:
    """Make or renew a project.

    Returns:
        The names of the files that were written.

    Raises:
        CourseError: the exercises import something of the course.
    """
    written = []
    for path in sorted(GIVEN.rglob("*")):
        target = folder / path.relative_to(GIVEN)
        if path.is_file() and "__pycache__" not in path.parts and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
            written.append(str(path.relative_to(GIVEN)))
    exercises = switch.exercise_file(STEM)
    if found := re.search(r"^\s*(from|import) (shardlab|exercises)\b.*", exercises.read_text(encoding="utf-8"), re.MULTILINE):
        raise CourseError(
            f"{exercises.name} has the line `{found[0].strip()}`, and the project runs without the course: take it out"
        )
    target = folder / "language_model.py"
    if not target.exists() or target.read_bytes() != exercises.read_bytes():
        shutil.copy(exercises, target)
        written.append(target.name)
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the project's folder, made if it is not there")
    folder = parser.parse_args().folder.expanduser()
    if folder.exists() and not folder.is_dir():
        print(f"{folder} is a file, and a project is a folder: name another", file=sys.stderr)
        return 1
    try:
        written = make(folder)
    except CourseError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{folder}: {', '.join(written) or 'nothing new'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
