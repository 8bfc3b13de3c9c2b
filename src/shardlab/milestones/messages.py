"""A failing milestone teaches: expected, got, where the two differ, and the cause where it is known.

A cause is said where the milestone's condition leaves only one, or where a known wrong answer gives the very same result: those
results are kept in `labs/<lab>/mistakes.json`, by their fingerprint, and `shardlab matrix --record` writes them from the mutants.
Where to read on stands in the milestone's marker, and the plugin adds it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

from shardlab.sandbox.ended import BoxEnded

LONGEST = 400
"""Characters of a value in a message."""


class MilestoneFailed(AssertionError):
    """A milestone's own failure; its text is all that a learner is shown.

    Attributes:
        seen: what was expected and what came, whole: a known mistake is recognised by it.
    """

    def __init__(self, text: str, seen: str = ""):
        super().__init__(text)
        self.seen = seen


def require(condition, *, expected: str, got, likely: str = "", log: str = "") -> None:
    """Fail the milestone unless `condition` holds.

    Args:
        condition: what must be true.
        expected: what should have come, and for which input.
        got: the result; shortened if it is long.
        likely: the cause, where the condition leaves only one.
        log: what a job wrote meanwhile; it is shown, and no mistake is recognised by it.
    """
    if not condition:
        text = got if isinstance(got, str) else repr(got)
        lines = [f"expected  {expected}", f"got       {_shortened(text)}"] + [f"log       {log}"] * bool(log)
        raise MilestoneFailed("\n".join(lines + [f"likely    {likely}"] * bool(likely)), f"{expected}\n{text}")


def require_equal(got, wanted, *, of: str, likely: str = "") -> None:
    """Fail the milestone unless two values are equal; the message says where they differ.

    Args:
        got: the result.
        wanted: what should have come: plain values, or containers of them.
        of: the call with its arguments, such as "collate(rows, 3)".
        likely: the cause, where the condition leaves only one.
    """
    if type(got) is not type(wanted) and not _comparable(got, wanted) or got != wanted:
        at = difference(wanted, got)
        lines = [f"expected  {_around(repr(wanted), repr(got))}", f"got       {_around(repr(got), repr(wanted))}"]
        lines += [f"of        {_shortened(of)}"] + [f"differs   {at}"] * bool(at) + [f"likely    {likely}"] * bool(likely)
        raise MilestoneFailed("\n".join(lines), f"{of}: {got!r}")


def require_error(
    call,
    error: type[Exception],
    *,
    mentions: tuple[str, ...] = (),
    silent: tuple[str, ...] = (),
    expected: str,
    likely: str = "",
) -> None:
    """Fail the milestone unless `call()` raises `error` with all of `mentions` in its text, and none of `silent`.

    A number must stand there by itself.
    """
    try:
        result = call()
    except (NotImplementedError, BoxEnded):
        raise
    except error as raised:
        missing = [word for word in mentions if not _mentions(str(raised), word)]
        require(
            not missing,
            expected=f"{expected}, in a sentence that names {', '.join(map(repr, mentions))}",
            got=f"{type(raised).__name__}: {raised}",
            likely=likely,
        )
        named = [word for word in silent if _mentions(str(raised), word)]
        require(
            not named,
            expected=f"{expected}, in a sentence that does not name {', '.join(map(repr, named))}: nothing is wrong there",
            got=f"{type(raised).__name__}: {raised}",
            likely=likely,
        )
    except Exception as raised:
        nothing = "\ngot       None\n" in str(raised)  # a `return` forgotten is no news where an error is due
        said = "no error; it returned None" if nothing else f"{type(raised).__name__}: {raised}"
        require(False, expected=expected, got=said, likely=likely)
    else:
        require(False, expected=expected, got=f"no error; it returned {result!r}", likely=likely)


def _mentions(text: str, word: str) -> bool:
    if re.fullmatch(r"[0-9.]+", word):
        return re.search(rf"(?<![0-9.]){re.escape(word)}(?![0-9]|\.[0-9])", text) is not None
    return word.lower() in text.lower()


def farthest(found: list[float], wanted: list[float]) -> float:
    """The largest difference between two curves; infinite where their lengths differ, or where something is no number."""
    try:
        differences = [abs(a - b) for a, b in zip(found, wanted, strict=True)]
        return math.inf if any(math.isnan(difference) for difference in differences) else max(differences, default=math.inf)
    except (TypeError, ValueError):
        return math.inf


# --- where two values differ ------------------------------------------------------------------------------------------


def _comparable(got, wanted) -> bool:
    """Whether values of two types may be equal all the same: numbers, but no booleans for numbers, and mappings."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (got, wanted))
    return numbers or all(isinstance(value, Mapping) for value in (got, wanted))


def difference(wanted, got) -> str:
    """The first place where two values differ, in a few words; empty where the values say it all by themselves."""
    if isinstance(wanted, str) and isinstance(got, str):
        return _in_text(wanted, got)
    if isinstance(wanted, Mapping) and isinstance(got, Mapping):
        return _in_mapping(wanted, got)
    if isinstance(wanted, list | tuple) and isinstance(got, list | tuple):
        if type(wanted) is not type(got):
            return f"a {type(got).__name__} for a {type(wanted).__name__}"
        return _in_sequence(wanted, got)
    if type(wanted) is not type(got):
        return f"in type: {type(got).__name__} for {type(wanted).__name__}"
    return ""


def _in_text(wanted: str, got: str) -> str:
    at = next((n for n, (a, b) in enumerate(zip(wanted, got)) if a != b), min(len(wanted), len(got)))
    if wanted.split() == got.split():
        return f"in white space alone: at character {at}, {got[at : at + 1]!r} for {wanted[at : at + 1]!r}"
    if got.startswith(wanted):
        return f"at its end: {_shortened(repr(got[at:]), 60)} too much"
    if wanted.startswith(got):
        return f"at its end: {_shortened(repr(wanted[at:]), 60)} is missing"
    return f"from character {at} on: {got[at : at + 20]!r} for {wanted[at : at + 20]!r}" if max(len(wanted), len(got)) > 60 else ""


def _in_mapping(wanted: Mapping, got: Mapping) -> str:
    missing, more = ([key for key in a if key not in b] for a, b in ((wanted, got), (got, wanted)))
    if missing or more:
        said = [f"without the key{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))}"] * bool(missing)
        return "; ".join(said + [f"with the key{'s' * (len(more) > 1)} {', '.join(map(repr, more))} more"] * bool(more))
    at = next((key for key in wanted if wanted[key] != got[key]), None)
    return "" if at is None else _deeper(f"at {at!r}", wanted[at], got[at])


def _in_sequence(wanted, got) -> str:
    at = next((n for n, (a, b) in enumerate(zip(wanted, got)) if a != b), None)
    if len(wanted) != len(got):
        return f"in length: {len(got)} for {len(wanted)}" + (f"; first at place {at}" if at is not None else "")
    return "" if at is None or len(wanted) == 1 else _deeper(f"at place {at}", wanted[at], got[at])


def _deeper(place: str, wanted, got) -> str:
    inner = difference(wanted, got)
    return f"{place}, {inner}" if inner else f"{place}: {_shortened(repr(got), 60)} for {_shortened(repr(wanted), 60)}"


def _shortened(text: str, longest: int = LONGEST) -> str:
    return text if len(text) <= longest else f"{text[:longest]} …"


def _around(text: str, other: str) -> str:
    """A long text, cut to the surroundings of the first place where it differs from the other."""
    if len(text) <= LONGEST:
        return text
    at = next((n for n, (a, b) in enumerate(itertools.zip_longest(text, other)) if a != b), 0)
    begin = max(0, min(at - LONGEST // 2, len(text) - LONGEST))
    return f"{'… ' * (begin > 0)}{text[begin : begin + LONGEST]}{' …' * (begin + LONGEST < len(text))}"


# --- known mistakes ---------------------------------------------------------------------------------------------------


def fingerprint(task: str, test: str, seen: str) -> str:
    """What tells a wrong result from others, without holding it: the same for all who make the same mistake.

    Folders and the ranks' numbers are left out, and fractions are rounded to four digits: they differ between machines and runs.
    """
    plain = re.sub(r"(/[^\s'\",:;)]*)+/", "", seen)
    plain = re.sub(r"\brank \d+", "rank", plain)
    plain = re.sub(r"\d+\.\d+(e[-+]?\d+)?|\d+e[-+]?\d+", lambda found: f"{float(found[0]):.4g}", plain)
    return hashlib.sha256("\0".join((task, test, plain)).encode("utf-8", "backslashreplace")).hexdigest()[:16]


def known_mistakes(path: Path) -> dict[str, str]:
    """Fingerprints of known mistakes, and what each is; none where the file is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
