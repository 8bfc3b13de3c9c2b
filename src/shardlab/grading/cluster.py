"""A class on a cluster: a job array, in which each job is one judge with a share of the submissions."""

from __future__ import annotations

import time
from pathlib import Path

from shardlab import progress
from shardlab.grading.gradebook import summary
from shardlab.grading.plan import Plan
from shardlab.grading.results import GradingError, is_current, results_in


def grade_on_cluster(
    found: dict[str, Path], out: Path, plan: Plan, words: list[str], *, parts: int, display: progress.Quiet
) -> dict:
    """Grade submissions in an array job, whose jobs write into `out`, and wait for it. Ctrl-C cancels it.

    Args:
        found: submissions by name.
        out: the output folder, which all nodes see.
        plan: how, to know which results are current.
        words: the arguments of `shardlab grade` for each job of the array.
        parts: its jobs.
        display: where progress is shown.

    Returns:
        The current results by name.

    Raises:
        shardlab.cluster.slurm.SlurmError, shardlab.cluster.batch.BatchError: the job was refused.
    """
    from shardlab.cluster import batch, slurm

    def current() -> dict[str, dict]:
        there = results_in(out)
        return {name: there[name] for name, path in found.items() if is_current(there.get(name), path, plan)}

    for folder in ("results", "logs"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    kept = current()
    shown, waiting = dict(kept), len(found) - len(kept)
    if not waiting:
        return shown
    parts = min(parts, waiting)
    number, _ = batch.submit("class", batch.JobSettings(parts=parts, arguments=words), batch.site_in_use())
    already = f", {len(kept)} graded before" if kept else ""
    display.say(f"{waiting} submissions to grade{already}, in {parts} jobs of the array {number}")

    def rows() -> list[progress.Row]:
        return [progress.Row("graded", "running", {}, len(shown) - len(kept), waiting)]

    try:
        while True:
            over = not slurm.ask("squeue", "--noheader", "--jobs", str(number)).strip()
            for name, result in current().items():
                if name not in shown:
                    shown[name] = result
                    display.say(f"[{len(shown) - len(kept)}/{waiting}] {summary(result)}")
            display.update(rows)
            if over or len(shown) == len(found):
                return shown
            time.sleep(1)
    except BaseException:
        slurm.cancel(number)
        raise
    finally:
        display.end(rows)


def part_of(found: dict[str, Path], part: str) -> dict[str, Path]:
    """One share of the submissions: "0/3" is every third, from the first.

    Raises:
        GradingError: it is not of that form.
    """
    number, _, parts = part.partition("/")
    if not (number.isdigit() and parts.isdigit() and int(number) < int(parts)):
        raise GradingError(f"--part {part}: it is K/N, with K from 0 to N - 1")
    return {name: found[name] for name in sorted(found)[int(number) :: int(parts)]}
