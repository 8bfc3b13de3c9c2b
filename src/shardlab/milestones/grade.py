"""Run the milestones of one lab in this process, and get their outcomes."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from pathlib import Path

import pytest

from shardlab import switch
from shardlab.errors import UsageError
from shardlab.hardware import ROOT
from shardlab.milestones.plugin import BOX, HIDDEN_TOO, SAY
from shardlab.milestones.scoreboard import Milestone


class Grading:
    """Tells the plugin of the box that the exercises are in, and the caller of what is being done."""

    def __init__(self, box, say, hidden_too: bool):
        self.box, self.say, self.hidden_too = box, say, hidden_too

    def pytest_configure(self, config) -> None:
        config.stash[HIDDEN_TOO] = self.hidden_too
        if self.box is not None:
            config.stash[BOX] = self.box
        if self.say is not None:
            config.stash[SAY] = self.say

    def pytest_runtest_setup(self, item) -> None:
        if self.say and (marker := item.get_closest_marker("milestone")):
            self.say(f"checking task {marker.kwargs['task']}")


def grade(
    stem: str,
    *,
    exercises: Path | None = None,
    task: str | None = None,
    box=None,
    files: list[Path] | None = None,
    say=None,
    hidden_too: bool = False,
    limit: float | None = None,
) -> list[Milestone]:
    """The outcome of each milestone of a lab, as `pytest labs/<stem>` would report it.

    Args:
        stem: the lab's name.
        exercises: the folder that holds the `exercises` package to grade; the one in use by default.
        task: only the milestones of this task.
        box: the `Box` that holds the exercises to grade, where nothing of them may run in this process.
        files: the milestone files; those of the lab's folder by default.
        limit: seconds for each milestone; by default what pyproject.toml says.
        hidden_too: look at hidden milestones even where the task's own one has failed.
        say: called with the number of each task as it begins, and with a line on each op that is compiled.

    Raises:
        ValueError: there is no such task.
        RuntimeError: pytest could not run the milestones; the message holds what it printed last.
    """
    with tempfile.TemporaryDirectory() as temporary:
        result, output = Path(temporary, "milestones.json"), io.StringIO()
        options = ["--milestones-json", str(result)]
        options += ["--exercises", str(exercises or switch.exercises_folder())] if box is None else []
        options += ["--task", task] if task else []
        options += [f"--timeout={limit}"] if limit else []
        options += [
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:unraisableexception",
            f"--rootdir={ROOT}",
            "-c",
            str(ROOT / "pyproject.toml"),
        ]
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            tests = temporary if box is None else box.exchange
            paths = [str(path) for path in files or [ROOT / "labs" / stem]]
            code = pytest.main([*paths, *options, f"--basetemp={tests}/pytest"], plugins=[Grading(box, say, hidden_too)])
        printed = output.getvalue().strip()
        if task and code == pytest.ExitCode.USAGE_ERROR:
            raise UsageError(printed.splitlines()[-1])
        if code not in (0, 1) or not result.exists():
            raise RuntimeError(f"pytest ended with {code} on {exercises}:\n{printed[-3000:]}")
        return [Milestone(**entry) for entry in json.loads(result.read_text())]
