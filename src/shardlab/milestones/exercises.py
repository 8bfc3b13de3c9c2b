"""A lab's exercises as a milestone sees them: in this process, or in a box."""

from __future__ import annotations

import ast
import contextlib
import sys
import traceback
from pathlib import Path

from shardlab import switch
from shardlab.milestones.messages import MilestoneFailed
from shardlab.run.experiment import program_of
from shardlab.sandbox.calls import WatchedModule, is_exercise, watched
from shardlab.sandbox.ended import BoxEnded


class FileAtFault(MilestoneFailed):
    """A file of exercises that cannot be imported: no task's own fault."""


def watched_exercises(stem: str) -> WatchedModule:
    """A lab's exercises for a program that runs where they are, on a rank too: their calls are looked at as a milestone's are."""
    return WatchedModule(switch.import_exercise(stem))


def _line(source: bytes, number: int | None) -> str:
    lines = source.decode(errors="replace").splitlines()
    return lines[number - 1] if number and number <= len(lines) else ""


class Lab:
    """The exercise module of a lab, imported at first use, so that a broken import fails a test and not the session.

    Its functions are attributes. `replace` and `observe` do what a test would otherwise do to the module itself: so a milestone
    judges exercises in this process and exercises in a box by the same lines.
    """

    def __init__(self, stem: str):
        self.stem = stem
        self._replaced: dict[str, object] = {}
        self._threads: int | None = None

    @property
    def folder(self) -> Path:
        """The folder of the exercises, under the name that their tracebacks carry."""
        return self.path.parent

    @property
    def path(self) -> Path:
        return switch.exercise_file(self.stem)

    def __getattr__(self, name: str):
        module = self._module()
        try:
            found = getattr(module, name)
        except AttributeError:
            raise self._missing(name) from None
        return watched(found) if is_exercise(found) else found

    def _module(self):
        try:
            module = switch.import_exercise(self.stem)
            if self._threads is None and (torch := sys.modules.get("torch")):
                # What is called here is small. Several threads would wait for each other by spinning, and where other programs
                # have the cores, minutes would go by.
                self._threads = torch.get_num_threads()
                torch.set_num_threads(1)
            return module
        except Exception as error:
            lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(self.path)]
            raise self._not_imported(error, [f"line {frame.lineno}: {frame.line}" for frame in lines]) from None

    def _not_imported(self, error: Exception, places: list[str]) -> FileAtFault:
        kind = getattr(error, "kind", type(error).__name__)
        return FileAtFault(
            f"expected  {self.path.name} to be imported\ngot       {kind}: {error}"
            + "".join(f"\n          {place}" for place in places[-1:])
        )

    def _missing(self, name: str) -> MilestoneFailed:
        return MilestoneFailed(
            f"expected  a function {name}() in {self.path.name}\ngot       none of that name: renamed, deleted, or indented below "
            f"another\nremedy    shardlab skeleton {self.stem} prints the file as it was"
        )

    def unreadable(self) -> str:
        """What keeps the file from being read as Python, with the line; empty if nothing does. Nothing of it is run."""
        where = f"remedy    shardlab skeleton {self.stem} prints the file as it was"
        try:
            source = self.path.read_bytes()
            compile(source, self.path.name, "exec", dont_inherit=True)
        except FileNotFoundError:
            return f"expected  a file {self.path.name} in {self.path.parent.name}/\ngot       none there\n{where}"
        except SyntaxError as error:
            line = (error.text or _line(source, error.lineno)).rstrip()
            return (
                f"expected  {self.path.name} to be Python\ngot       {type(error).__name__}, line {error.lineno}: {error.msg}\n"
                f"          {line.strip()}\nremedy    look at that line and at the one before it"
            )
        except (ValueError, OSError, RecursionError, MemoryError) as error:
            return f"expected  {self.path.name} to be Python\ngot       {type(error).__name__}: {error}\n{where}"
        return ""

    def replace(self, name: str, function) -> None:
        """Let another task's function of the module be `function` until the test is over: its own milestone judges that one."""
        module = self._module()
        self._replaced.setdefault(name, getattr(module, name, None))
        setattr(module, name, function)

    def observe(self, program: str, *args, **kwargs):
        """Call `module:function`, which uses the exercises where they are, and get back what it saw; the judging is done here."""
        return program_of(program)(*args, **kwargs)

    @contextlib.contextmanager
    def elsewhere(self):
        """While this lasts, the exercises are on one rank of a job, and torch sees a GPU there."""
        self.observe("shardlab.milestones.elsewhere:go")
        try:
            yield
        finally:
            self.observe("shardlab.milestones.elsewhere:come_back")

    def close(self) -> None:
        if self._threads is not None:
            sys.modules["torch"].set_num_threads(self._threads)
        for name, function in self._replaced.items():
            setattr(switch.import_exercise(self.stem), name, function)

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


class BoxedLab(Lab):
    """The same, for exercises in a box: each call goes there, and what comes back is a plain value."""

    def __init__(self, stem: str, box):
        super().__init__(stem)
        self._box, self._caller = box, None

    @property
    def folder(self) -> Path:
        return self._box.seen_submission / "exercises"

    @property
    def path(self) -> Path:
        return self._box.submission / "exercises" / f"{self.stem}.py"

    def _ask(self, request: dict, *args, **kwargs):
        if why := self._box.broken_imports.get(self.stem):
            raise why
        if not self.path.exists():
            raise ModuleNotFoundError(f"there is no exercises/{self.path.name}")
        if self._caller is None:
            caller = self._box.caller()
            try:
                caller.ask({"op": "import", "lab": self.stem})
            except Exception as error:
                broken = error if isinstance(error, BoxEnded) else self._not_imported(error, list(getattr(error, "places", ())))
                # What does not come in now does not come in for the next task either, and need not be waited for again.
                self._box.broken_imports[self.stem] = broken
                raise broken from None
            self._caller = caller
        return self._caller.ask(request | {"lab": self.stem}, args, kwargs)

    def __getattr__(self, name: str):
        if name.startswith("_"):
            raise AttributeError(name)
        there, value = self._ask({"op": "get", "name": name})
        if not there:
            raise self._missing(name)
        return value

    def replace(self, name: str, function) -> None:
        self._ask({"op": "replace", "name": name}, function)

    def observe(self, program: str, *args, **kwargs):
        return self._ask({"op": "observe", "function": program}, *args, **kwargs)

    def close(self) -> None:
        if self._caller is not None:
            self._caller.close()
