"""A folder of submissions, from what lies in it to gradebook and feedback: what `shardlab grade` does."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from shardlab import labs, progress
from shardlab.errors import UsageError
from shardlab.grading import cluster, gradebook, judge, submissions, whole_class
from shardlab.grading.plan import Plan, course_digest
from shardlab.grading.results import is_current, require_same_labs, results_in
from shardlab.sandbox import boxes


@dataclass(frozen=True)
class Graded:
    """What came of grading a folder.

    Attributes:
        found: the names of the submissions.
        finished: current results by name.
        book: the gradebook; None where only a share was graded.
        interrupted: whether Ctrl-C ended it; what was finished is kept.
    """

    found: list[str]
    finished: dict[str, dict]
    book: Path | None
    interrupted: bool

    @property
    def missing(self) -> list[str]:
        return [name for name in self.found if name not in self.finished]

    @property
    def not_whole(self) -> list[str]:
        """Those whose grading ended early through no fault of theirs."""
        return [name for name, result in self.finished.items() if not result["whole"]]


def grade_folder(
    paths: Iterable[Path],
    out: Path,
    *,
    of: str | None = None,
    seconds: float = 900,
    jobs: int | None = None,
    on_slurm: bool = False,
    part: str | None = None,
    limits_only: bool = False,
    display: progress.Quiet | None = None,
) -> Graded:
    """Grade submissions that are not graded yet, and write gradebook, feedback and overview from all results in `out`.

    Args:
        paths: submissions, or folders full of them.
        out: the output folder.
        of: labs, such as "1,2"; all by default.
        seconds: how long the exercises of one submission may run.
        jobs: submissions at a time; by default as many as this machine has room for, or 4 jobs of the array.
        on_slurm: grade in an array job.
        part: "K/N", to grade only this share and write no gradebook.
        limits_only: grade without bubblewrap, though it works here.
        display: where progress is shown, and what to know before.

    Raises:
        shardlab.errors.CourseError: what cannot be graded, and why.
    """
    display = progress.Quiet() if display is None else display
    stems = [lab.stem for lab in labs.chosen(of)]
    paths = [path.absolute() for path in paths]
    found = submissions.find(paths)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; --out names a folder")
    isolation = ("limits", "it was asked for with --limits-only") if limits_only else boxes.isolation()
    plan = Plan(tuple(stems), seconds, course_digest(stems), isolation)
    require_same_labs(out, plan)
    if isolation[0] == "limits" and os.geteuid() == 0:
        raise UsageError(
            f"submissions are not graded as root without isolation ({isolation[1]}): their code could end every process and write "
            "every file of this machine. Install bubblewrap, or grade from an ordinary account."
        )
    if isolation[0] == "limits":
        display.say(f"No isolation: {isolation[1]}. The submissions' code can read what this account can read.")
    if part:
        found = cluster.part_of(found, part)
    interrupted = False
    try:
        if on_slurm:
            words = [*map(str, paths), "--out", str(out.absolute()), "--labs", ",".join(stems)]
            words += ["--timeout", str(seconds), *(["--limits-only"] if limits_only else [])]
            finished = cluster.grade_on_cluster(found, out, plan, words, parts=jobs or 4, display=display)
        else:
            judge.forget_the_environment()
            finished = whole_class.grade_all(found, out, plan, jobs=jobs or whole_class.judges_that_fit(), display=display)
    except KeyboardInterrupt:
        interrupted, there = True, results_in(out)
        finished = {name: there[name] for name, path in found.items() if is_current(there.get(name), path, plan)}
    if part:
        return Graded(list(found), finished, None, interrupted)
    # Those that were not named this time keep their rows.
    others = {name: result for name, result in results_in(out).items() if name not in found}
    book = gradebook.write(out, others | finished, [name for name in found if name not in finished])
    return Graded(list(found), finished, book, interrupted)
