"""Exercises against the solution on many inputs: what counts as the same, and what is told."""

import pytest
from hypothesis import strategies as st

from shardlab.labs import catalogue
from shardlab.milestones.agreement import agree, solution
from shardlab.milestones.messages import MilestoneFailed

NUMBERS = st.tuples(st.integers(-50, 50))


def root(number: int) -> int:
    if number < 0:
        raise ValueError("a negative number")
    return int(number**0.5)


def test_what_does_the_same_passes():
    agree(lambda number: root(number), root, NUMBERS)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(lambda number: root(abs(number)), id="no error"),
        pytest.param(lambda number: root(number) + (number == 49), id="one number of a hundred"),
        pytest.param(lambda number: {}[number] if number < 0 else root(number), id="another error"),
        pytest.param(lambda number: None, id="nothing"),
    ],
)
def test_what_does_not_is_told_with_its_inputs(answer):
    with pytest.raises(MilestoneFailed, match=r"for \(-?\d+,\):\nexpected  (returned|raised) .*\ngot       (returned|raised)"):
        agree(answer, root, NUMBERS)


def test_edges_come_first():
    asked = []
    agree(lambda number: asked.append(number), lambda number: None, NUMBERS, first=[(-7,), (10**9,)], count=5)
    assert asked[:2] == [-7, 10**9] and len(asked) == 7


def test_inputs_are_the_same_each_time():
    def drawn() -> list[int]:
        asked = []
        agree(lambda number: asked.append(number), lambda number: None, NUMBERS, count=20)
        return asked

    assert drawn() == drawn() and len(set(drawn())) > 10


def test_an_answer_cannot_change_what_the_solution_is_given():
    agree(lambda values: values.clear(), lambda values: values.clear(), st.tuples(st.lists(st.integers())))
    with pytest.raises(MilestoneFailed):
        agree(lambda values: values.clear(), sum, st.tuples(st.lists(st.integers(), min_size=1)))


def test_a_task_that_is_not_written_is_no_wrong_answer():
    def skeleton(number):
        raise NotImplementedError("Task 9.1: complete it")

    with pytest.raises(NotImplementedError):
        agree(skeleton, root, NUMBERS)


def test_values_that_cannot_be_compared_are_not_the_same():
    with pytest.raises(MilestoneFailed):
        agree(lambda number: None, lambda number: {"a": 1}, NUMBERS, same=lambda wanted, got: got["a"] == wanted["a"])


@pytest.mark.parametrize("lab", catalogue(), ids=lambda lab: lab.stem)
def test_a_solution_is_found_without_being_the_exercises_in_use(lab):
    import sys

    before = sys.modules.get(f"exercises.{lab.stem}")
    assert solution(lab.stem).__file__ == str(lab.solution)
    assert sys.modules.get(f"exercises.{lab.stem}") is before
