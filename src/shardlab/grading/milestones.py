"""What a milestone test says when it fails: what was expected, what came, the likely cause, and where to read on."""

from __future__ import annotations

import ast
import hashlib
import json
import tempfile
from functools import cache
from pathlib import Path

from shardlab import switch


class MilestoneFailed(AssertionError):
    """A milestone's own failure; its text is all that a learner is shown."""


def require(condition, *, expected: str, got, likely: str, read: str) -> None:
    """Fail the milestone unless `condition` holds.

    Args:
        condition: what must be true.
        expected: what should have come.
        got: what came; shortened if it is long.
        likely: the usual mistake behind it.
        read: where the lab or the lecture explains it.
    """
    if not condition:
        text = got if isinstance(got, str) else repr(got)
        text = text if len(text) <= 400 else f"{text[:400]} …"
        raise MilestoneFailed(f"expected  {expected}\ngot       {text}\nlikely    {likely}\nread      {read}")


def require_error(call, error: type[Exception], *, mentions: tuple[str, ...] = (), expected: str, likely: str, read: str) -> None:
    """Fail the milestone unless `call()` raises `error` with all of `mentions` in its text."""
    try:
        result = call()
    except NotImplementedError:
        raise
    except error as raised:
        missing = [word for word in mentions if word.lower() not in str(raised).lower()]
        require(
            not missing,
            expected=f"{expected}, in a sentence that names {', '.join(map(repr, mentions))}",
            got=f"{type(raised).__name__}: {raised}",
            likely=likely,
            read=read,
        )
    except Exception as raised:
        require(False, expected=expected, got=f"{type(raised).__name__}: {raised}", likely=likely, read=read)
    else:
        require(False, expected=expected, got=f"no error; it returned {result!r}", likely=likely, read=read)


class Lab:
    """The exercise module of a lab, imported at first use, so that a broken import fails a test and not the session."""

    def __init__(self, stem: str):
        self.stem = stem

    @property
    def path(self) -> Path:
        return switch.exercises_folder() / "exercises" / f"{self.stem}.py"

    def __getattr__(self, name: str):
        module = switch.import_exercise(self.stem)
        try:
            return getattr(module, name)
        except AttributeError:
            raise MilestoneFailed(
                f"expected  a function {name}() in {self.path.name}\ngot       none of that name\n"
                f"likely    it was renamed or deleted\nread      the skeleton: git show HEAD:src/exercises/{self.path.name}"
            ) from None

    @property
    def module(self):
        return switch.import_exercise(self.stem)

    def unwritten(self, task: str) -> str | None:
        """The message of the task's `NotImplementedError`, if the body of one of its functions is still just that."""
        try:
            tree = ast.parse(self.path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, UnicodeDecodeError):
            return None
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                if len(body) == 1 and isinstance(body[0], ast.Raise) and isinstance(body[0].exc, ast.Call):
                    words = [arg.value for arg in body[0].exc.args if isinstance(arg, ast.Constant)]
                    if words and str(words[0]).startswith(f"Task {task}:"):
                        return str(words[0])
        return None


_RUNS: dict[str, list] = {}


@cache
def _lifetime_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="shardlab-milestones-")


def shared_folder() -> Path:
    """A temporary folder that lasts as long as this process, so that what one grading made serves the next."""
    return Path(_lifetime_folder().name)


def _code_of(task: str) -> list[str]:
    """The exercises' source without the solutions of other tasks, where they are marked, as in solutions and mutants.

    A program on the ranks uses the functions of one task alone. So the mutants of other tasks need no launch of their own.
    """
    sources = []
    for path in sorted((switch.exercises_folder() / "exercises").glob("*.py")):
        first, *parts = path.read_text().split("# BEGIN SOLUTION ")
        sources += [first, *(part if part.split()[0] == task else part.partition("# END SOLUTION")[2] for part in parts)]
    return sources


def launched(experiments: list, *, task: str, timeout: float = 120) -> dict:
    """Run experiments on real ranks, once for each combination of experiments and the task's code in this process.

    Args:
        experiments: what to run.
        task: whose functions the programs use.
        timeout: seconds.

    Returns:
        The finished runs by name.
    """
    from shardlab import progress
    from shardlab.launch import launch

    with_exercises = ("exercises.", "shardlab.grading.programs:", "shardlab.grading.engine_programs:")
    sources = _code_of(task) if any(experiment.program.startswith(with_exercises) for experiment in experiments) else []
    key = hashlib.sha256(json.dumps([[e.model_dump() for e in experiments], sources]).encode()).hexdigest()
    if key not in _RUNS:
        _RUNS[key] = launch(experiments, runs=shared_folder() / key[:12], timeout=timeout, display=progress.Quiet())
    return {run.name: run for run in _RUNS[key]}
