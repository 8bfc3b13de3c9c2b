"""Grading many submissions: judges side by side, each with one box at a time; Ctrl-C ends them, and what they finished is kept."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import time
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path

import psutil

from shardlab import progress
from shardlab.grading.gradebook import summary
from shardlab.grading.judge import judge_process
from shardlab.grading.plan import Plan
from shardlab.grading.results import empty_result, is_current, keep_result, results_in, state_of, with_reason
from shardlab.milestones.launches import REFERENCES
from shardlab.milestones.markers import ops_of

GRACE = 600.0
"""Seconds that a judge may take beyond a submission's own time: its reference runs, and opening the submission."""


class _Judge:
    """A judge as the batch sees it."""

    def __init__(self, number: int, plan: Plan, out: Path):
        self.number, self.plan, self.out = number, plan, out
        self.task: tuple[str, Path] | None = None
        self.doing = ""
        self.since = 0.0
        self._start()

    def _start(self) -> None:
        from shardlab.run.launch import _bare_main

        context = get_context("forkserver")
        self.connection, theirs = context.Pipe()
        self.lifeline, watched = context.Pipe()
        log = self.out / "logs" / f"judge-{self.number}.log"
        work = work_folder(self.out) / f"judge-{self.number}"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        # What needs nobody's exercises is run once for all judges.
        references = os.environ.get(REFERENCES) or str(work.parent / "references")
        self.process = context.Process(target=judge_process, args=(theirs, watched, self.plan, str(log), str(work), references))
        with _bare_main():
            self.process.start()
        theirs.close()
        watched.close()

    def give(self, task: tuple[str, Path]) -> None:
        self.task, self.since, self.state = task, time.monotonic(), state_of(task[1])
        self.connection.send(task)

    def again(self) -> None:
        """Another one in its place: it has ended, or does not come back."""
        self.stop()
        self._start()

    def stop(self) -> None:
        self.lifeline.close()
        self.connection.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def work_folder(out: Path) -> Path:
    """Where the judges of this process keep what is gone when it is."""
    return (out / ".work" / f"{platform.node()}-{os.getpid()}").resolve()


def remove_work(out: Path) -> None:
    """Remove this process's own, and what processes of this machine left that were killed."""
    from shardlab.sandbox.exchange import remove

    for folder in (out / ".work").glob(f"{platform.node()}-*"):
        number = folder.name.rpartition("-")[2]
        mine = folder.name == f"{platform.node()}-{number}"  # and not that of a machine whose name begins like this one's
        if folder == work_folder(out) or (mine and number.isdigit() and not psutil.pid_exists(int(number))):
            remove(folder)
    with contextlib.suppress(OSError):
        (out / ".work").rmdir()


def judges_that_fit() -> int:
    """How many judges this machine has cores and memory for: two cores each, and what a box and its judge usually take at most."""
    from shardlab import hardware
    from shardlab.sandbox.limits import MEMORY

    return max(1, min(hardware.cpu_cores() // 2, psutil.virtual_memory().available // (MEMORY + 2 * 2**30)))


def grade_all(
    found: dict[str, Path], out: Path, plan: Plan, *, jobs: int = 1, display: progress.Quiet | None = None
) -> dict[str, dict]:
    """Grade submissions, `jobs` at a time, and keep each result as soon as it is there.

    Args:
        found: submissions by name.
        out: the output folder; current results in it are not made again.
        plan: how.
        jobs: judges.
        display: where progress is shown; nowhere by default.

    Returns:
        The results by name, of all submissions that have one.
    """
    from shardlab.run.launch import warm_up
    from shardlab.zero import toolchain

    display = progress.Quiet() if display is None else display
    for folder in ("results", "logs"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    there = results_in(out)
    kept = {name: there[name] for name, path in found.items() if is_current(there.get(name), path, plan)}
    waiting = [(name, path) for name, path in found.items() if name not in kept]
    finished = dict(kept)
    if not waiting:
        return finished
    for op in ops_of(plan.labs):  # what cannot be compiled is said by the milestones that need it
        toolchain.why_no_op(op, display.say)
    warm_up()
    jobs = max(1, min(jobs, len(waiting)))
    already = f", {len(kept)} graded before" if kept else ""
    display.say(f"{len(waiting)} submissions to grade{already}, {jobs} at a time")
    judges: list[_Judge] = []

    def rows() -> list[progress.Row]:
        graded = progress.Row("graded", "running", {}, len(finished) - len(kept), len(found) - len(kept))
        return [graded, *(progress.Row(f"judge {judge.number}", "running", {"at": judge.doing}) for judge in judges)]

    def take(judge: _Judge, result: dict) -> None:
        name, _ = judge.task
        result |= {"state": judge.state}
        judge.task, judge.doing = None, ""
        keep_result(out, result)
        finished[name] = result
        display.say(f"[{len(finished) - len(kept)}/{len(found) - len(kept)}] {summary(result)}")

    try:
        judges += [_Judge(number, plan, out) for number in range(jobs)]
        while waiting or any(judge.task for judge in judges):
            display.update(rows)
            for judge in judges:
                if judge.task is None and waiting:
                    judge.give(waiting.pop(0))
                    judge.doing = f"{judge.task[0]}: starting"
            for ready in wait([judge.connection for judge in judges if judge.task], timeout=1):
                judge = next(judge for judge in judges if judge.connection is ready)
                try:
                    kind, what = judge.connection.recv()
                except (EOFError, OSError):
                    lost = empty_result(*judge.task, plan) | {"whole": False, "error": "the judge ended while it graded this"}
                    take(judge, with_reason(lost))
                    judge.again()
                    continue
                if kind == "at":
                    judge.doing = f"{judge.task[0]}: {what}"
                else:
                    take(judge, what)
            for judge in judges:
                if judge.task and time.monotonic() - judge.since > plan.seconds + GRACE:
                    lost = empty_result(*judge.task, plan) | {"whole": False, "error": "the judge did not come back and was ended"}
                    take(judge, with_reason(lost))
                    judge.again()
    finally:
        for judge in judges:
            judge.stop()
        remove_work(out)
        display.end(rows)
    return finished
