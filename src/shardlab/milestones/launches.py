"""Launches that milestones share: equal experiments run once, references once for all judges."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

import pytest

from shardlab import switch

_RUNS: dict[str, list] = {}


PREFIX, IN_USE = "shardlab-milestones-", ".in-use"


@cache
def _lifetime_folder() -> tempfile.TemporaryDirectory:
    _remove_abandoned()
    folder = tempfile.TemporaryDirectory(prefix=PREFIX)
    mark = Path(folder.name, "new")
    fcntl.flock(os.open(mark, os.O_CREAT | os.O_RDWR), fcntl.LOCK_EX)  # held until this process ends
    mark.rename(mark.with_name(IN_USE))  # under this name nobody finds it without its lock
    return folder


def _remove_abandoned() -> None:
    """Remove the folders of processes that were killed and could not do it, such as a notebook's kernel."""
    for mark in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{IN_USE}"):
        with contextlib.suppress(OSError):  # in use, or another account's
            held = os.open(mark, os.O_RDWR)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(mark.parent, ignore_errors=True)
            finally:
                os.close(held)


def shared_folder() -> Path:
    """A folder that lasts as long as this process, so that what one grading made serves the next.

    The variable `SHARDLAB_REFERENCES` names one that several processes share, such as the judges of a class.
    """
    if REFERENCES in os.environ:
        folder = Path(os.environ[REFERENCES])
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    return own_folder()


REFERENCES = "SHARDLAB_REFERENCES"


def own_folder() -> Path:
    """A folder of this process alone, for what its exercises make."""
    return Path(_lifetime_folder().name)


@contextlib.contextmanager
def once(name: str, folder: Path | None = None):
    """Do something once in a folder, by default the shared one.

    `with once("killed") as first:` is true for the first who comes, and the others wait until it is done.
    """
    from filelock import FileLock

    folder = folder or shared_folder()
    with FileLock(folder / f".{name}.lock"):
        done = folder / f".{name}.done"
        yield not done.exists()
        done.touch()


def visible_folder() -> Path:
    """The part of `shared_folder()` that exercises in a box can read: inputs, never what a milestone expects."""
    folder = shared_folder() / "visible"
    folder.mkdir(exist_ok=True)
    return folder


def _code_of(task: str) -> list[str]:
    """The exercises' source without the solutions of other tasks, where they are marked, as in solutions and mutants.

    A program on the ranks uses the functions of one task alone. So the mutants of other tasks need no launch of their own.
    """
    sources = []
    for path in switch.exercise_files():
        first, *parts = path.read_text().split("# BEGIN SOLUTION ")
        sources += [first, *(part if part.split()[0] == task else part.partition("# END SOLUTION")[2] for part in parts)]
    return sources


def launched(experiments: list, *, task: str, largest: int, timeout: float = 120, reference: bool = False, box=None) -> dict:
    """Run experiments on real ranks, once for each combination of experiments and the task's code in this process.

    Args:
        experiments: what to run.
        task: whose functions the programs use.
        largest: the ranks of the largest experiment of the milestone: all run where those do.
        timeout: seconds.
        reference: nothing of anybody's exercises is in these runs: they run outside of the box, and once for all judges. Whatever
            else a milestone starts runs with the exercises.
        box: where ranks that run somebody's exercises are started; here by default.

    Returns:
        The finished runs by name.

    Raises:
        ValueError: an experiment has more ranks than the milestone's marker says.
    """
    from shardlab import progress
    from shardlab.run.launch import LaunchError, launch
    from shardlab.run.placement import place
    from shardlab.run.run_folder import Run

    if (most := max(experiment.ranks for experiment in experiments)) > largest:
        raise ValueError(f"task {task}: an experiment has {most} ranks; the milestone's marker says ranks={largest}")

    # What lies in a lab's folder runs around the exercises, so outside of the box it would be theirs that run there.
    if reference and (theirs := [e for e in experiments if e.program.startswith(("exercises.", "labs/"))]):
        raise ValueError(f"task {task}: {theirs[0].name} is no reference run; its program is {theirs[0].program}")
    if not reference and box is not None:
        key = json.dumps([e.model_dump() for e in experiments])
        if key not in box.launched:
            folder = box.exchange / "runs" / hashlib.sha256(key.encode()).hexdigest()[:12]
            box.launched[key] = box.launch(experiments, runs=folder, timeout=timeout)
        return {run.name: run for run in box.launched[key]}
    sources = [] if reference else _code_of(task)
    device = place(largest, or_cpu=True).device
    key = hashlib.sha256(json.dumps([[e.model_dump() for e in experiments], sources, device]).encode()).hexdigest()
    if key not in _RUNS:
        kept = shared_folder() if reference else own_folder()
        folder, checking = kept / key[:12], {"or_cpu": True, "largest": largest, "exact": True}
        with once(key[:12], kept) as first:
            if first:
                try:
                    launch(experiments, runs=folder, timeout=timeout, display=progress.Quiet(), **checking)
                except LaunchError as error:
                    if box is None or any("kill_at" in experiment.options for experiment in experiments):
                        raise
                    box.troubled = f"a run without anybody's exercises failed: {str(error).splitlines()[0]}"
                    pytest.skip(box.troubled)
        _RUNS[key] = [Run.read(folder / experiment.name) for experiment in experiments]
    return {run.name: run for run in _RUNS[key]}


@contextlib.contextmanager
def ranks_come_back():
    """Around a launch in which one rank may wait for another for ever: the milestone fails and says so."""
    from shardlab.milestones.messages import require
    from shardlab.run.launch import LaunchTimeout

    try:
        yield
    except LaunchTimeout as error:
        require(
            False,
            expected="both ranks to come back",
            got="one waits for the other for ever" if error.waiting else f"ranks that compute without end: {error}",
            likely="" if error.waiting else "an endless loop; or this machine does much else, and a second try will do",
        )
