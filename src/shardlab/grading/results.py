"""What came of each submission, one file each: so a batch that is interrupted goes on where it was.

OUT/results/<submission>.json     the result of each
OUT/gradebook.csv, …              written by `gradebook.py` from the results alone
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from dataclasses import asdict
from pathlib import Path

from shardlab.errors import CourseError
from shardlab.grading import submissions
from shardlab.grading.plan import Plan
from shardlab.milestones.markers import milestones_of

FORMAT = 1
"""Of these files; those of another one are graded again."""


class GradingError(CourseError, ValueError):
    """A batch that cannot be graded; the message says why and what to do."""


def empty_result(name: str, path: Path, plan: Plan) -> dict:
    """The result of a submission of which nothing is proven yet."""
    return {
        "format": FORMAT,
        "name": name,
        "source": str(path),
        "digest": "",
        "course": plan.course,
        "labs": list(plan.labs),
        "isolation": list(plan.isolation),
        "whole": True,
        "error": "",
        "notes": [],
        "seconds": 0.0,
        "graded": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "milestones": [asdict(milestone) for stem in plan.labs for milestone in milestones_of(stem)],
    }


def results_in(out: Path) -> dict[str, dict]:
    """The results in an output folder, by the submissions' names. A file that is damaged counts as not there."""
    found = {}
    for path in sorted((out / "results").glob("*.json")):
        with contextlib.suppress(ValueError, OSError, KeyError, TypeError):
            result = json.loads(path.read_text(encoding="utf-8"))
            if result["format"] == FORMAT:
                found[result["name"]] = result
    return found


def require_same_labs(out: Path, plan: Plan) -> None:
    """A folder holds the grades of one choice of labs: a row for each learner, a column for each task.

    Raises:
        GradingError: there are grades of another one in it.
    """
    other = {tuple(result["labs"]) for result in results_in(out).values()} - {plan.labs}
    if other:
        held, wanted = ", ".join(sorted(other)[0]), ", ".join(plan.labs)
        raise GradingError(f"{out} holds grades of {held}, and you ask for {wanted}. Give those another --out.")


def keep_result(out: Path, result: dict) -> None:
    """Write one result so that it is there whole or not at all."""
    path = out / "results" / f"{submissions.file_name(result['name'])}.json"
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(result, indent=1) + "\n")  # ASCII: a learner's text can hold what UTF-8 cannot
    os.replace(temporary, path)


def is_current(result: dict | None, path: Path, plan: Plan) -> bool:
    """Whether a result is that of this very submission under this very course, so that it need not be graded again."""
    if result is None or not result["whole"] or result["course"] != plan.course or result["labs"] != list(plan.labs):
        return False
    if result["isolation"][0] != plan.isolation[0] or result["source"] != str(path):
        return False
    return result.get("state") == state_of(path)


def state_of(path: Path) -> str:
    """A cheap mark of a submission's state: names, sizes and times of its files."""
    whole = hashlib.sha256()
    try:
        paths = sorted(path.rglob("*")) if path.is_dir() else [path]
    except RecursionError:
        paths = [path]  # deeper than any course
    for each in paths:
        with contextlib.suppress(OSError):
            status = each.lstat()
            whole.update(f"{os.fsencode(each)!r} {status.st_size} {status.st_mtime_ns}\n".encode())
    return whole.hexdigest()[:16]


def with_reason(result: dict) -> dict:
    for milestone in result["milestones"]:
        milestone["message"] = result["error"]
    return result
