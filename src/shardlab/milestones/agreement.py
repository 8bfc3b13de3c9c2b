"""An exercise and the course's own solution on many inputs.

Hidden milestones are the instructor's and know the solution: `agree` compares with it on inputs that it draws. The milestone that a
learner has does the same without it: `agree_as_recorded` takes inputs and hashes of the solution's results from
`labs/<lab>/inputs.json`, which `shardlab matrix --record` writes with the `agree` calls of the hidden milestones.

What only computes gives the same anywhere. So both call the exercise a second time with each input, on one rank of a job where
torch sees a GPU (`milestones/elsewhere.py`), and want what came at the first call.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import json
import operator
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType

from shardlab import labs
from shardlab.milestones.exercises import Lab
from shardlab.milestones.messages import MilestoneFailed
from shardlab.sandbox.ended import BoxEnded

SEED, RECORDED_SEED = 2026, 5
"""Of the inputs of hidden milestones, so that a verdict can be repeated; and of those that learners get, which are others."""

_recording: list[dict[str, list] | None] = [None]
_judged: list[Lab | None] = [None]


@cache
def solution(stem: str) -> ModuleType:
    """The reference solution of a lab, under a name of its own: `exercises` stays what is judged."""
    path, name = labs.named(stem).solution, f"reference_{stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def agree(
    answer: Callable,
    reference: Callable,
    arguments,
    *,
    record: str = "",
    first: Iterable[tuple] = (),
    count: int = 60,
    same: Callable[[object, object], bool] = operator.eq,
) -> None:
    """Fail the milestone unless two functions do the same: return what is equal, or raise the same kind of error.

    Args:
        answer: the exercise.
        reference: the solution.
        arguments: a hypothesis strategy of tuples, the positional arguments.
        record: the name under which the task's own milestone finds recorded inputs; their arguments are plain values.
        first: tuples that are tried before: the edges.
        count: how many inputs are drawn; a call into a box takes some milliseconds.
        same: whether two returned values are equal.
    """
    from hypothesis import HealthCheck, given, seed, settings

    def compare(given_arguments: tuple) -> None:
        wanted = _outcome(reference, given_arguments)
        if _recording[0] is not None:
            if record:
                _recording[0].setdefault(record, []).append([list(given_arguments), _hash(record, given_arguments, *wanted)])
            return
        got = _outcome(answer, given_arguments)
        seen.append((given_arguments, *got))
        alike = wanted[0] == got[0] and (wanted[1] == got[1] if wanted[0] == "raised" else _same(same, wanted[1], got[1]))
        if not alike:
            raise MilestoneFailed(f"for {given_arguments!r}:\nexpected  {wanted[0]} {wanted[1]!r}\ngot       {got[0]} {got[1]!r}")

    seen: list[tuple] = []
    for edge in first:
        compare(edge)
    quiet = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck), "report_multiple_bugs": False}
    drawn = SEED if _recording[0] is None else RECORDED_SEED
    seed(drawn)(settings(max_examples=count, **quiet)(given(arguments)(compare)))()
    _the_same_elsewhere(answer, seen, "the function{}")


def agree_as_recorded(answer: Callable, test_file: str, record: str, of: str) -> None:
    """Fail the milestone unless the exercise gives what the solution gave, on recorded inputs.

    Args:
        answer: the exercise, called as in the hidden milestone's `agree`.
        test_file: `__file__` of the milestone: the record lies next to it.
        record: the name that `agree` has there.
        of: the call, for the message, such as "collate{}"; the arguments take the place of the braces.
    """
    if _recording[0] is not None:
        return
    recorded = json.loads(Path(test_file).with_name("inputs.json").read_text(encoding="utf-8"))
    seen: list[tuple] = []
    for arguments, wanted in recorded[record]:
        how, value = _outcome(answer, tuple(arguments))
        seen.append((tuple(arguments), how, value))
        if _hash(record, arguments, how, value) != wanted:
            if how == "raised" and _hash(record, arguments, how, "ValueError") != wanted:
                answer(*copy.deepcopy(arguments))  # no error is due: this one says more of itself
            shown, got = f"({', '.join(map(repr, arguments))})", f"{how} {value!r}"
            raise MilestoneFailed(
                "expected  another result, by the docstring: work this case out by hand (the course keeps only a hash of its own)\n"
                f"got       {got if len(got) <= 400 else got[:400] + ' …'}\nof        {of.format(shown)}",
                f"{record} {shown} {got}",
            )
    _the_same_elsewhere(answer, seen, of)


@contextlib.contextmanager
def judging(lab: Lab):
    """While this lasts, the exercises that are called elsewhere are those of `lab`, wherever they are."""
    _judged[0] = lab
    try:
        yield
    finally:
        _judged[0] = None


def _the_same_elsewhere(answer: Callable, seen: list[tuple], of: str) -> None:
    """Fail the milestone unless each input gives what it gave before, on one rank of a job where torch sees a GPU.

    Args:
        answer: the exercise.
        seen: arguments, and how the first call ended: "returned" and what, or "raised" and which error.
        of: the call, for the message; the arguments take the place of the braces.
    """
    if _judged[0] is None or not seen:  # nothing is seen while inputs are recorded
        return
    differs = None
    with _judged[0].elsewhere():
        # The last one first: a result that is kept between calls (`@cache`) is met while the earlier one is remembered (`watched`).
        for arguments, how, value in reversed(seen):
            there = _outcome(answer, arguments)
            if there == ("raised", "CallAtFault"):
                answer(*copy.deepcopy(arguments))  # it says more of itself
            if not _alike(there, (how, value)):
                differs = arguments, (how, value), there
                break
    if differs:
        arguments, here, there = differs
        texts = [text if len(text) <= 300 else text[:300] + " …" for text in (f"{how} {value!r}" for how, value in (here, there))]
        shown = f"({', '.join(map(repr, arguments))})"
        if _alike(_outcome(answer, arguments), here):
            likely = "it asks for the rank, WORLD_SIZE or a GPU of where it runs, though its arguments say all that it needs"
        else:
            likely = "something is kept from one call to the next, and changes the result"
        raise MilestoneFailed(
            f"expected  the same result wherever it is called: here {texts[0]}\n"
            f"got       {texts[1]}, on rank 3 of a job of 5, where torch sees a GPU\n"
            f"of        {of.format(shown if len(shown) <= 400 else shown[:400] + ' …')}\nlikely    {likely}",
            f"elsewhere: {of.format(shown)} {there[0]} {there[1]!r}",
        )


def _alike(one: tuple[str, object], other: tuple[str, object]) -> bool:
    return one[0] == other[0] and _plain(one[1]) == _plain(other[1])


@contextlib.contextmanager
def recording():
    """While this lasts, `agree` compares nothing and notes inputs and hashes of results, by name."""
    _recording[0] = {}
    try:
        yield _recording[0]
    finally:
        _recording[0] = None


def _outcome(function: Callable, arguments: tuple) -> tuple[str, object]:
    try:
        return "returned", function(*copy.deepcopy(arguments))
    except (NotImplementedError, BoxEnded):
        raise
    except Exception as error:
        return "raised", getattr(error, "kind", type(error).__name__)


def _same(same: Callable, wanted, got) -> bool:
    try:
        return bool(same(wanted, got))
    except Exception:  # whatever came, it is nothing that can be compared
        return False


def _hash(record: str, arguments, how: str, value) -> str:
    """Of a result among equals: 1 and 1.0 are one, a list and a tuple too, and fractions count to nine digits and nine places."""
    text = f"{record} {json.dumps(arguments)} {how} {_plain(value)}"
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:12]


def _plain(value) -> str:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return repr(value)
    if isinstance(value, int | float):
        return f"{round(float(value), 9) + 0.0:.9g}"  # what is 0 on one machine is 1e-17 on another
    if isinstance(value, Mapping):
        return "{" + ", ".join(sorted(f"{_plain(key)}: {_plain(item)}" for key, item in value.items())) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_plain, value)) + "]"
    if hasattr(value, "tolist"):
        return f"{value.dtype} {_plain(value.tolist())}"
    return repr(value)
