"""A lab's exercises as a milestone sees them: in this process, or in a box."""

from __future__ import annotations

import ast
from pathlib import Path

from shardlab import switch
from shardlab.milestones.messages import MilestoneFailed
from shardlab.run.experiment import program_of


class Lab:
    """The exercise module of a lab, imported at first use, so that a broken import fails a test and not the session.

    Its functions are attributes. `replace` and `observe` do what a test would otherwise do to the module itself: so a milestone
    judges exercises in this process and exercises in a box by the same lines.
    """

    def __init__(self, stem: str):
        self.stem = stem
        self._replaced: dict[str, object] = {}

    @property
    def folder(self) -> Path:
        """The folder of the exercises, under the name that their tracebacks carry."""
        return self.path.parent

    @property
    def path(self) -> Path:
        return switch.exercise_file(self.stem)

    def __getattr__(self, name: str):
        module = switch.import_exercise(self.stem)
        try:
            return getattr(module, name)
        except AttributeError:
            raise self._missing(name) from None

    def _missing(self, name: str) -> MilestoneFailed:
        return MilestoneFailed(
            f"expected  a function {name}() in {self.path.name}\ngot       none of that name\n"
            f"likely    it was renamed or deleted; the skeleton has it: git show HEAD:src/exercises/{self.path.name}"
        )

    def replace(self, name: str, function) -> None:
        """Let another task's function of the module be `function` until the test is over: its own milestone judges that one."""
        module = switch.import_exercise(self.stem)
        self._replaced.setdefault(name, getattr(module, name, None))
        setattr(module, name, function)

    def observe(self, program: str, *args, **kwargs):
        """Call `module:function`, which uses the exercises where they are, and get back what it saw; the judging is done here."""
        return program_of(program)(*args, **kwargs)

    def close(self) -> None:
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
                # What does not come in now does not come in for the next task either, and need not be waited for again.
                self._box.broken_imports[self.stem] = error
                raise
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
