"""A failing milestone teaches: expected, got, the likely cause. Where to read on stands in its marker, and the plugin adds it."""

from __future__ import annotations

import math

from shardlab.sandbox.ended import BoxEnded


class MilestoneFailed(AssertionError):
    """A milestone's own failure; its text is all that a learner is shown."""


def require(condition, *, expected: str, got, likely: str) -> None:
    """Fail the milestone unless `condition` holds.

    Args:
        condition: what must be true.
        expected: what should have come.
        got: the result; shortened if it is long.
        likely: the usual mistake.
    """
    if not condition:
        text = got if isinstance(got, str) else repr(got)
        text = text if len(text) <= 400 else f"{text[:400]} …"
        raise MilestoneFailed(f"expected  {expected}\ngot       {text}\nlikely    {likely}")


def farthest(found: list[float], wanted: list[float]) -> float:
    """The largest difference between two curves; infinite where their lengths differ, or where something is no number."""
    try:
        differences = [abs(a - b) for a, b in zip(found, wanted, strict=True)]
        return math.inf if any(math.isnan(difference) for difference in differences) else max(differences, default=math.inf)
    except (TypeError, ValueError):
        return math.inf


def require_error(call, error: type[Exception], *, mentions: tuple[str, ...] = (), expected: str, likely: str) -> None:
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
        )
    except Exception as raised:
        require(False, expected=expected, got=f"{type(raised).__name__}: {raised}", likely=likely)
    else:
        require(False, expected=expected, got=f"no error; it returned {result!r}", likely=likely)
