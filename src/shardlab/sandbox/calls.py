"""A call of an exercise, and what is wrong with it whatever the task: arguments that it has changed, or a `return` forgotten."""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable, Mapping

PLAIN = (str, int, float, bool, bytes, types.NoneType)


class CallAtFault(AssertionError):
    """What a call did that no exercise may; its text is a message. Of a built-in type, so that it leaves a box as one."""


def watched(function: Callable) -> Callable:
    """The function, with its calls looked at.

    Lists and dictionaries of plain values must be the same afterwards: who calls with the same ones again would get something else.
    A function that says what it returns must not return None.

    Raises:
        CallAtFault: by the returned function, when a call did one of the two.
    """
    name = getattr(function, "__name__", "the function")

    @functools.wraps(function)
    def call(*args, **kwargs):
        given = {**dict(enumerate(args, 1)), **kwargs}
        before = {key: copy.deepcopy(value) for key, value in given.items() if is_plain_container(value)}
        result = function(*args, **kwargs)
        for key, was in before.items():
            if given[key] != was:
                what = f"argument {key}" if isinstance(key, int) else key
                raise CallAtFault(
                    f"expected  {name}() to leave what it is given as it was\n"
                    f"got       {what} changed from {_short(was)} to {_short(given[key])}\n"
                    "likely    a list or dictionary changed in place (append, pop, +=, update, an entry set): make a new one"
                )
        if result is None and _promises_a_value(function):
            raise CallAtFault(
                f"expected  {name}() to return what its docstring says\ngot       None\n"
                "likely    `return` is missing, at its end or on one of the ways through it"
            )
        return result

    return call


def is_plain_container(value, depth: int = 6) -> bool:
    """Whether a value is a list, dictionary, tuple or set of plain values only, so that it can be copied and compared."""
    if depth == 0:
        return False
    if isinstance(value, list | tuple | set):
        return all(isinstance(entry, PLAIN) or is_plain_container(entry, depth - 1) for entry in value)
    if isinstance(value, Mapping):
        return all(isinstance(entry, PLAIN) or is_plain_container(entry, depth - 1) for entry in value.values())
    return False


def _promises_a_value(function: Callable) -> bool:
    try:
        promised = inspect.signature(function).return_annotation
    except (TypeError, ValueError):
        return False
    text = promised if isinstance(promised, str) else getattr(promised, "__name__", str(promised))
    return promised is not inspect.Signature.empty and promised is not None and "None" not in text and "Any" not in text


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} …"
