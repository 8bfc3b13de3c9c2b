"""Machine-made wrong answers: what is changed, and what is left alone."""

import ast

import pytest

from shardlab.course import small_changes
from shardlab.course.proven import SMALL_CHANGES, digest, recorded, starts_something
from shardlab.course.small_changes import changes, equivalents, judged
from shardlab.errors import UsageError
from shardlab.labs import catalogue
from shardlab.milestones.scoreboard import Milestone

SOURCE = '''"""A module."""
import math

LIMIT = 3


def first(values, limit=LIMIT):
    """Text that is no code: limit + 1."""
    # BEGIN SOLUTION 1.1
    if not values or len(values) > limit:
        raise ValueError(f"{len(values)} values are too many: " + str(limit))
    größe = math.ceil(len("ü") / 2)
    return {"a": values[1:], "b": größe, "c": sorted(values, reverse=True)}
    # END SOLUTION


def given(value):
    return value + 1
'''


def told() -> set[str]:
    return {change.told for change in changes(SOURCE)}


@pytest.mark.parametrize(
    "change",
    [
        "len(values) > limit → (len(values) >= limit)",
        "not values → values",
        "not values or len(values) > limit → (not values and len(values) > limit)",
        "not values or len(values) > limit → (len(values) > limit)",
        "math.ceil → math.floor",
        "len(\"ü\") / 2 → (len('ü') // 2)",
        "1: → :",
        "sorted(values, reverse=True) → sorted(values)",
        "sorted → list",
        "True → False",
    ],
)
def test_each_kind_of_change_is_made(change):
    assert change in told()


def test_dropped_statements_and_entries():
    assert any(line.startswith("raise ValueError") and line.endswith("→ pass") for line in told())
    assert any(line.startswith("return {") and line.endswith("→ return None") for line in told())
    assert sum(line.startswith("{") for line in told()) == 3, "each entry is left out once"


def test_only_solutions_change_and_no_text_that_people_read():
    for change in changes(SOURCE):
        changed = change.apply(SOURCE)
        ast.parse(changed)
        assert change.task == "1.1" and changed != SOURCE
        assert changed.startswith(SOURCE[: SOURCE.index("    if not")]) and changed.endswith(SOURCE[SOURCE.index("    # END") :])
        assert '"""Text that is no code: limit + 1."""' in changed and "LIMIT = 3" in changed
        assert "are too many: " in changed or change.new == "pass"


def test_no_change_is_made_twice():
    made = [(change.start, change.end, change.new) for change in changes(SOURCE)]
    assert len(made) == len(set(made))


@pytest.mark.parametrize("lab", catalogue(), ids=lambda lab: lab.stem)
def test_every_task_has_changes(lab):
    from shardlab.course.authoring import tasks

    source = lab.solution.read_text()
    assert {change.task for change in changes(source)} == set(tasks(source))


# --- against the milestones -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lab", catalogue(), ids=lambda lab: lab.stem)
def test_what_became_of_the_changes_is_known_and_up_to_date(lab):
    """After a change: `shardlab matrix N --generated --only TASK --record`."""
    from shardlab.course.authoring import tasks

    entries = recorded(lab.stem, SMALL_CHANGES)
    stale = {task for task, entry in entries.items() if entry["digest"] != digest(lab.stem, task)}
    assert not stale, f"judge these again: {', '.join(sorted(stale))}"
    for task in tasks(lab.solution.read_text()):
        assert not entries[task]["survived"]


@pytest.mark.parametrize("lab", catalogue(), ids=lambda lab: lab.stem)
def test_equivalents_are_changes_that_there_are(lab):
    made = {(change.task, change.told) for change in changes(lab.solution.read_text())}
    assert set(equivalents(lab.stem)) <= made
    assert all(len(why) > 20 for why in equivalents(lab.stem).values())


def test_nothing_is_said_of_the_changes_to_a_solution_that_fails(monkeypatch):
    def fails(*args, task, **kwargs):
        return [Milestone("lab02_zero_stages", task, "test_shards", 10, "failed", "expected 1")]

    monkeypatch.setattr(small_changes, "grade", fails)
    with pytest.raises(UsageError, match="the solution itself fails 2.5.*expected 1"):
        next(judged("lab02_zero_stages", task="2.5"))


@pytest.mark.ranks
@pytest.mark.parametrize("lab", catalogue(), ids=lambda lab: lab.stem)
def test_a_share_of_the_changes_gets_the_verdict_that_the_record_has(lab):
    """Of tasks whose functions only compute; the record vouches for the others."""
    for task, entry in recorded(lab.stem, SMALL_CHANGES).items():
        if starts_something(lab.stem, task):
            continue
        known = {told for of, told in equivalents(lab.stem) if of == task} | set(entry["survived"])
        for one in judged(lab.stem, task=task, every=20):
            assert one.verdict == "caught" or one.change.told in known, f"{task}, line {one.change.line}: {one.change.told}"
