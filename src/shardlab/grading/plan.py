"""What all submissions of a batch are graded with."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from shardlab.hardware import ROOT
from shardlab.labs import chosen


def course_digest(labs: list[str]) -> str:
    """A digest of everything that a grade depends on besides the submission."""
    whole = hashlib.sha256()
    folders = (ROOT / "src" / "shardlab", ROOT / "slurm")
    library = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    parts = ("milestones", "hidden_milestones", "programs", "mistakes", "solution")
    judged = [getattr(lab, part) for lab in chosen(",".join(labs)) for part in parts]
    for path in [*library, ROOT / "constraints.txt", *judged]:
        if path.exists():
            whole.update(str(path.relative_to(ROOT)).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()


@dataclass(frozen=True)
class Plan:
    """What all submissions of a batch are graded with.

    Attributes:
        labs: stems.
        seconds: how long the exercises of one submission may run, all labs together.
        call_seconds: how long they may take for one call.
        course: `course_digest(labs)`.
        isolation: "bubblewrap" or "limits", and why not bubblewrap.
    """

    labs: tuple[str, ...]
    seconds: float
    course: str
    isolation: tuple[str, str]
    call_seconds: float = 60.0
