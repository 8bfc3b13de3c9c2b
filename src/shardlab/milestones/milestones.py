"""What a milestone test says when it fails: what was expected, what came, the likely cause, and where to read on."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import json
import math
import os
import tempfile
from functools import cache
from pathlib import Path

import pytest

from shardlab import switch


class BoxEnded(RuntimeError):
    """Exercises in a box have gone before they answered; the message says why."""

    likely = "os._exit(), a crash, or more memory, processes or files than a submission may have"


class TookTooLong(BoxEnded):
    """They did not answer in time, and were ended."""

    likely = "a loop that does not end, or something that waits for what never comes"


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


def farthest(found: list[float], wanted: list[float]) -> float:
    """The largest difference between two curves; infinite where their lengths differ, or where something is no number."""
    try:
        differences = [abs(a - b) for a, b in zip(found, wanted, strict=True)]
        return math.inf if any(math.isnan(difference) for difference in differences) else max(differences, default=math.inf)
    except (TypeError, ValueError):
        return math.inf


def require_error(call, error: type[Exception], *, mentions: tuple[str, ...] = (), expected: str, likely: str, read: str) -> None:
    """Fail the milestone unless `call()` raises `error` with all of `mentions` in its text."""
    try:
        result = call()
    except (NotImplementedError, BoxEnded):
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
        return switch.exercises_folder() / "exercises"

    @property
    def path(self) -> Path:
        return switch.exercises_folder() / "exercises" / f"{self.stem}.py"

    def __getattr__(self, name: str):
        module = switch.import_exercise(self.stem)
        try:
            return getattr(module, name)
        except AttributeError:
            raise self._missing(name) from None

    def _missing(self, name: str) -> MilestoneFailed:
        return MilestoneFailed(
            f"expected  a function {name}() in {self.path.name}\ngot       none of that name\n"
            f"likely    it was renamed or deleted\nread      the skeleton: git show HEAD:src/exercises/{self.path.name}"
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


def program_of(name: str):
    """The function that `module:function` names."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


_RUNS: dict[str, list] = {}


@cache
def _lifetime_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="shardlab-milestones-")


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


def safely_loaded(path: Path) -> dict:
    """What `torch.save` wrote, without running anything that it may hold: tensors and plain values.

    Raises:
        MilestoneFailed: it holds something else.
    """
    import pickle

    import torch

    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        raise MilestoneFailed(
            f"expected  a file of torch.save with tensors and plain values in it: {path.name}\n"
            f"got       {str(error).splitlines()[0][:300]}\n"
            "likely    an object of a class of its own was saved, or the file is not whole\nread      the task's docstring"
        ) from None


def saved_weights(folder: Path, base_model: str, *, read: str) -> dict:
    """The weights in a model folder, read as what they are: JSON and safetensors. Nothing else in the folder is looked at.

    Args:
        folder: what `save_pretrained` wrote, with its tokenizer.
        base_model: the model whose shape and tokenizer it must have.
        read: where the lab explains it.

    Returns:
        fp32 tensors by the parameters' names, each shared tensor once.

    Raises:
        MilestoneFailed: it is not a model of this shape that plain transformers can load.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from shardlab.data.models import load_tokenizer, model_config

    def json_in(name: str) -> dict:
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            found = error
        require(
            isinstance(found, dict),
            expected=f"a {name} in the folder",
            got=f"{type(found).__name__}: {found}",
            likely="save_pretrained left out, or a state dict saved without its configuration",
            read=read,
        )
        return found

    wanted = model_config(base_model).to_dict()
    shape = ("model_type", "vocab_size", "hidden_size", "n_layer", "n_head")
    config = json_in("config.json")
    require(
        [config.get(name) for name in shape] == [wanted[name] for name in shape] and config.get("tie_word_embeddings", True),
        expected=f"the configuration of {', '.join(f'{name} {wanted[name]}' for name in shape)}, its output layer tied",
        got=", ".join(f"{name} {config.get(name)}" for name in (*shape, "tie_word_embeddings")),
        likely="another model saved, or lm_head handled by itself",
        read=read,
    )
    try:
        weights = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        require(
            False,
            expected="the weights in model.safetensors",
            got=f"{type(error).__name__}: {error}",
            likely="model.save_pretrained under ZeRO-3 writes empty shards; or weights saved in another way",
            read=read,
        )
    types = sorted({str(weight.dtype) for weight in weights.values()})
    require(
        types == ["torch.float32"],
        expected="fp32 weights",
        got=", ".join(types) or "none",
        likely="the model's half-precision copy instead of the master weights",
        read=read,
    )
    tokenizer = load_tokenizer(base_model)
    vocabulary = json_in("tokenizer.json").get("model", {}) if (folder / "tokenizer.json").exists() else {}
    require(
        vocabulary == json.loads(tokenizer.backend_tokenizer.to_str())["model"],
        expected="the tokenizer in the folder",
        got="none that can be read" if not vocabulary else "another one",
        likely="the tokenizer's save_pretrained left out: load_tokenizer(base_model).save_pretrained(folder)",
        read=read,
    )
    return {name if name.startswith("transformer.") else f"transformer.{name}": weight for name, weight in weights.items()}


def _code_of(task: str) -> list[str]:
    """The exercises' source without the solutions of other tasks, where they are marked, as in solutions and mutants.

    A program on the ranks uses the functions of one task alone. So the mutants of other tasks need no launch of their own.
    """
    sources = []
    for path in sorted((switch.exercises_folder() / "exercises").glob("*.py")):
        first, *parts = path.read_text().split("# BEGIN SOLUTION ")
        sources += [first, *(part if part.split()[0] == task else part.partition("# END SOLUTION")[2] for part in parts)]
    return sources


def launched(experiments: list, *, task: str, largest: int, timeout: float = 120, box=None) -> dict:
    """Run experiments on real ranks, once for each combination of experiments and the task's code in this process.

    Args:
        experiments: what to run.
        task: whose functions the programs use.
        largest: the ranks of the largest experiment of the milestone: all run where those do.
        timeout: seconds.
        box: where ranks that run somebody's exercises are started; here by default.

    Returns:
        The finished runs by name.

    Raises:
        ValueError: an experiment has more ranks than the milestone's marker says.
    """
    from shardlab.run import progress
    from shardlab.run.launch import LaunchError, launch
    from shardlab.run.placement import place
    from shardlab.run.runs import Run

    if (most := max(experiment.ranks for experiment in experiments)) > largest:
        raise ValueError(f"task {task}: an experiment has {most} ranks; the milestone's marker says ranks={largest}")

    theirs = any(experiment.program.startswith(WITH_EXERCISES) for experiment in experiments)
    if theirs and box is not None:
        key = json.dumps([e.model_dump() for e in experiments])
        if key not in box.launched:
            folder = box.exchange / "runs" / hashlib.sha256(key.encode()).hexdigest()[:12]
            box.launched[key] = box.launch(experiments, runs=folder, timeout=timeout)
        return {run.name: run for run in box.launched[key]}
    sources = _code_of(task) if theirs else []
    device = place(largest, or_cpu=True).device
    key = hashlib.sha256(json.dumps([[e.model_dump() for e in experiments], sources, device]).encode()).hexdigest()
    if key not in _RUNS:
        kept = own_folder() if theirs else shared_folder()
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


WITH_EXERCISES = ("exercises.", "shardlab.milestones.programs:", "shardlab.milestones.engine_programs:")
"""How the names of programs begin that use exercises."""
