"""Has somebody changed the course's own code while their exercises ran?

On a rank, exercises and the program that observes them share a process. What the program reports is judged elsewhere, but it must
be the program that reports. So every function and class of the course is noted before the exercises come in, and looked at again
behind them.
"""

from __future__ import annotations

import builtins
import json
import sys
import types

WATCHED = "SHARDLAB_WATCHED"
"""The variable that is set where exercises are not to be trusted."""


class Tampered(RuntimeError):
    """Something of the course's is not what it was; the message names it."""


def snapshot() -> tuple[tuple[tuple[str, ...], object], ...]:
    """What the course's modules, `builtins` and `json` hold now, by module, class and name."""
    found: dict[tuple[str, ...], object] = {}
    for name, module in list(sys.modules.items()):
        if isinstance(module, types.ModuleType) and (module in (builtins, json) or name.partition(".")[0] == "shardlab"):
            found[(name,)] = module
            for key, value in list(vars(module).items()):
                if callable(value):
                    found[name, key] = value
                if isinstance(value, type) and value.__module__ == name and module is not builtins:
                    found |= {(name, key, entry): it for entry, it in vars(value).items() if callable(it) or hasattr(it, "__get__")}
                if isinstance(value, types.FunctionType):
                    found[name, key, "__code__"] = value.__code__
    return tuple(found.items())


def require_unchanged(before: tuple[tuple[tuple[str, ...], object], ...], now=snapshot) -> None:
    """Raise unless everything that `snapshot` noted is still what it was.

    Raises:
        Tampered: it is not.
    """
    held = dict(now())
    for path, value in before:
        if held.get(path) is not value:
            raise Tampered(f"{'.'.join(path)} was replaced while the exercises ran")
