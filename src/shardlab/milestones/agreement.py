"""An exercise and the course's own solution on many inputs.

For hidden milestones: they are the instructor's, so they may know the answer.
"""

from __future__ import annotations

import copy
import importlib.util
import operator
import sys
from collections.abc import Callable, Iterable
from functools import cache
from types import ModuleType

from shardlab import labs
from shardlab.milestones.messages import MilestoneFailed
from shardlab.sandbox.ended import BoxEnded

SEED = 2026
"""Of all inputs, so that a verdict can be repeated."""


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
    first: Iterable[tuple] = (),
    count: int = 60,
    same: Callable[[object, object], bool] = operator.eq,
) -> None:
    """Fail the milestone unless two functions do the same: return what is equal, or raise the same kind of error.

    Args:
        answer: the exercise.
        reference: the solution.
        arguments: a hypothesis strategy of tuples, the positional arguments.
        first: tuples that are tried before: the edges.
        count: how many inputs are drawn; a call into a box takes some milliseconds.
        same: whether two returned values are equal.
    """
    from hypothesis import HealthCheck, given, seed, settings

    def compare(given_arguments: tuple) -> None:
        wanted, got = (_outcome(function, given_arguments) for function in (reference, answer))
        alike = wanted[0] == got[0] and (wanted[1] == got[1] if wanted[0] == "raised" else _same(same, wanted[1], got[1]))
        if not alike:
            raise MilestoneFailed(f"for {given_arguments!r}:\nexpected  {wanted[0]} {wanted[1]!r}\ngot       {got[0]} {got[1]!r}")

    for edge in first:
        compare(edge)
    quiet = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck), "report_multiple_bugs": False}
    seed(SEED)(settings(max_examples=count, **quiet)(given(arguments)(compare)))()


def _outcome(function: Callable, arguments: tuple) -> tuple[str, object]:
    try:
        return "returned", function(*copy.deepcopy(arguments))
    except (NotImplementedError, BoxEnded):
        raise
    except Exception as error:
        return "raised", type(error).__name__


def _same(same: Callable, wanted, got) -> bool:
    try:
        return bool(same(wanted, got))
    except Exception:  # whatever came, it is nothing that can be compared
        return False
