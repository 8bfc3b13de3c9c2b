"""Multi-label text: generated comments from programs, each with some of 16 labels, or a CSV file of one's own.

A generated comment is of one of four kinds, and the kind makes some labels likely: so labels come together. Each label that applies
puts a sentence into the text. One in four of these is vague, as several labels may say it; and an annotator has overlooked some
labels, and left some cells empty. So the rare labels are seldom more likely than not, even where the text hints at them. Comment
number n of a split is the same on every machine and in every process, and nothing is stored.
"""

from __future__ import annotations

import csv
from pathlib import Path
from random import Random

from shardlab.data.squad_file import DataError

UNKNOWN = -100
"""The label of a cell that nobody has filled in. It counts in no loss and in no metric."""

KINDS = {
    "documentation": (
        0.44,
        {
            "summary": 0.9,
            "parameters": 0.65,
            "returns": 0.6,
            "raises": 0.3,
            "example": 0.25,
            "units": 0.18,
            "deprecated": 0.04,
        },
    ),
    "note": (0.26, {"todo": 0.45, "bug": 0.3, "workaround": 0.2, "rationale": 0.3, "reference": 0.08, "summary": 0.1}),
    "engineering": (
        0.22,
        {
            "performance": 0.5,
            "memory": 0.35,
            "concurrency": 0.22,
            "rationale": 0.35,
            "reference": 0.15,
            "units": 0.15,
            "summary": 0.2,
        },
    ),
    "change": (0.08, {"deprecated": 0.35, "security": 0.35, "reference": 0.35, "todo": 0.15}),
}
"""How often a kind of comment comes, and how likely it makes each label."""
LABELS = (
    "summary", "parameters", "returns", "raises", "example", "units", "todo", "bug", "workaround", "rationale", "performance",
    "memory", "concurrency", "security", "deprecated", "reference",
)  # fmt: skip

SENTENCES = {
    "summary": [
        "Computes the {noun} of a {noun}.",
        "Splits a {noun} into {noun}s.",
        "This class holds one {noun}.",
        "Reads the {noun} from a {source}.",
    ],
    "parameters": [
        "{arg}: the {noun} to start from.",
        "Takes {arg} and {arg}.",
        "{arg} may be left out.",
        "With {arg}, the {noun} is kept.",
    ],
    "returns": [
        "Gives back the {noun}.",
        "The result is a new {noun}.",
        "Returns none where there is no {noun}.",
        "Returns the {noun}.",
    ],
    "raises": ["Fails with {error} where {arg} is empty.", "Raises {error}.", "{error} is thrown for a bad {noun}."],
    "example": ["For instance, {call} gives {number}.", "Example: {call}.", ">>> {call}", "As in {call}."],
    "units": ["{arg} is in {unit}.", "All times are in {unit}.", "Counted in {unit}.", "Note: {unit}, and no other unit."],
    "todo": ["TODO: support more than one {noun}.", "TODO tests for the {noun}.", "Still missing: the {noun}.", "Left for later."],
    "bug": [
        "FIXME: wrong where {arg} is negative.",
        "Crashes on the second {noun}.",
        "Known to fail for {number} {noun}s.",
        "BUG: off by one.",
    ],
    "workaround": ["HACK until {library} is mended.", "Works around a fault of {library}.", "Without this line, {library} hangs."],
    "rationale": [
        "Because a {noun} may come twice.",
        "We chose this since the {noun} is small.",
        "The reason is {library}.",
        "On purpose: see the {noun}.",
    ],
    "performance": [
        "Runs in O(n log n).",
        "Slow for a large {noun}.",
        "The inner loop dominates.",
        "Twice as fast as the {noun} before.",
    ],
    "memory": [
        "Keeps every {noun} in memory.",
        "Allocates one buffer per {noun}.",
        "Freed when the {noun} is.",
        "Holds a copy of {arg}.",
    ],
    "concurrency": [
        "Hold the lock before this.",
        "Not safe from two threads.",
        "Each thread has a {noun} of its own.",
        "A race is possible here.",
    ],
    "security": [
        "Never log the {noun}: it is a secret.",
        "{arg} comes from outside and is checked.",
        "Escapes the {noun} against injection.",
    ],
    "deprecated": ["Deprecated since {version}.", "Use {call} instead.", "Goes away in {version}.", "Only kept for old callers."],
    "reference": ["See section {number} of the manual.", "After the paper of {name}, {year}.", "Described in RFC {year}."],
}
"""What a label puts into the text."""
VAGUE = [
    (("raises", "security", "concurrency", "bug"), ["Be careful with {arg}.", "Mind the {noun}.", "This can go wrong."]),
    (("todo", "deprecated", "workaround", "bug"), ["This may change.", "Not final.", "To be looked at again."]),
    (("performance", "memory", "rationale", "concurrency"), ["Costs more than it looks.", "Do not call this in a loop."]),
    (("summary", "returns", "parameters", "units"), ["The {noun} of the {noun}.", "A {noun}, as everywhere.", "The usual {noun}."]),
    (("reference", "example", "security", "deprecated"), ["See there.", "More in {library}.", "As {name} had it."]),
]
"""Sentences that say little: those of a group may mean each of its labels."""
WORDS = {
    "noun": "tree node list buffer token matrix table path queue cache header key index image sample batch window graph".split(),
    "source": "file socket pipe database stream folder".split(),
    "arg": "n size count path index value limit start end step name mode data key timeout".split(),
    "error": "ValueError KeyError IndexError TimeoutError IOException OverflowError".split(),
    "unit": "seconds milliseconds bytes pixels degrees metres tokens".split(),
    "library": "libfoo parsekit netlayer gridlib oldjson fastmath".split(),
    "name": "Ada Grace Edsger Barbara Tony Leslie Frances".split(),
}
VAGUE_SHARE, MORE_VAGUE, OVERLOOKED, EMPTY = 0.25, 0.25, 0.08, 0.03
TRAIN, TEST = 1200, 600
"""Comments of the two splits."""


def _filled(template: str, rng: Random) -> str:
    text = template
    while "{" in text:
        name = text[text.index("{") + 1 : text.index("}")]
        word = {
            "number": lambda: str(rng.randint(2, 40)),
            "year": lambda: str(rng.randint(1970, 2025)),
            "version": lambda: f"{rng.randint(1, 9)}.{rng.randint(0, 9)}",
            "call": lambda: f"{rng.choice(WORDS['noun'])}_{rng.choice(WORDS['source'])}({rng.randint(0, 9)})",
        }.get(name, lambda: rng.choice(WORDS[name]))()
        text = text.replace("{" + name + "}", word, 1)
    return text


def comment(split: str, number: int) -> dict:
    """One generated comment: its `text`, and `labels`, sixteen numbers in the order of `LABELS`: 1, 0, or UNKNOWN.

    Args:
        split: "train", "test", or any other word for comments of their own, such as "pretraining".
        number: which comment.
    """
    rng = Random(f"comments/{split}/{number}")
    kind = rng.choices(list(KINDS), [share for share, _ in KINDS.values()])[0]
    apply = [label for label in LABELS if rng.random() < KINDS[kind][1].get(label, 0.01)]
    sentences = []
    for label in apply:
        groups = [sentences for labels, sentences in VAGUE if label in labels]
        vague = groups and rng.random() < VAGUE_SHARE
        sentences.append(_filled(rng.choice(rng.choice(groups) if vague else SENTENCES[label]), rng))
    if rng.random() < MORE_VAGUE or not sentences:
        sentences.append(_filled(rng.choice(rng.choice(VAGUE)[1]), rng))
    rng.shuffle(sentences)
    labels = [int(label in apply and rng.random() >= OVERLOOKED) for label in LABELS]
    return {"text": " ".join(sentences), "labels": [UNKNOWN if rng.random() < EMPTY else value for value in labels]}


def comments(split: str, count: int | None = None) -> list[dict]:
    """The first `count` generated comments of a split; all of "train" or "test" without it."""
    return [comment(split, number) for number in range(count or {"train": TRAIN, "test": TEST}[split])]


def read_csv(path: str | Path, labels: list[str] | None = None) -> tuple[list[dict], list[str]]:
    """Rows of a CSV file as `comments` gives them, and the names of their labels.

    Args:
        path: in UTF-8, with a line of names first; one of them is `text`. An empty cell of a label is UNKNOWN.
        labels: the columns that are labels; all but `text` without it.

    Raises:
        DataError: no such file, no UTF-8, no column `text` or of a label, a line of another length, a cell that is not 0, 1 or
            empty, or an empty text; the sentence names the file, the line and the column.
    """
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            names = [name for name in header if name != "text"] if labels is None else labels
            if missing := [name for name in ["text", *names] if name not in header]:
                raise DataError(f"{path}: there is no column '{missing[0]}'; the columns are {', '.join(header) or 'none'}.")
            rows = []
            for cells in reader:
                if len(cells) != len(header):
                    raise DataError(f"{path}, line {reader.line_num}: {len(cells)} cells for {len(header)} columns.")
                row = dict(zip(header, cells))
                if not row["text"].strip():
                    raise DataError(f"{path}, line {reader.line_num}, column text: there is no text.")
                if bad := [name for name in names if row[name].strip() not in ("0", "1", "")]:
                    raise DataError(
                        f"{path}, line {reader.line_num}, column {bad[0]}: {row[bad[0]]!r} is no label; "
                        "write 1, 0, or nothing where it is not known."
                    )
                rows.append({"text": row["text"], "labels": [int(row[name].strip() or UNKNOWN) for name in names]})
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8, at byte {error.start}; write it as UTF-8.") from None
    if not rows:
        raise DataError(f"{path}: there is no row below the names of the columns.")
    return rows, names
