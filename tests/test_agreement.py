"""Exercises against the solution on many inputs: what counts as the same, and what is told."""

from functools import cache

import pytest
from hypothesis import strategies as st

from shardlab.labs import catalogue
from shardlab.milestones.agreement import agree, judging, solution
from shardlab.milestones.elsewhere import CARD
from shardlab.milestones.exercises import Lab
from shardlab.milestones.messages import MilestoneFailed
from shardlab.sandbox.calls import CallAtFault, watched
from shardlab.switch import SOLUTIONS, use_exercises

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


def ranks(number: int) -> int:
    import os

    return number * int(os.environ.get("WORLD_SIZE", 1))


def where_a_gpu_is(number: int) -> int:
    import torch

    return number + torch.cuda.is_available() * torch.cuda.get_device_properties(0).total_memory if number > 40 else number


def counted(number: int, calls=[]) -> int:  # noqa: B006
    calls.append(number)
    return number + (len(calls) > 60)


@pytest.mark.parametrize(
    "answer, said",
    [
        pytest.param(ranks, "asks for the rank, WORLD_SIZE", id="WORLD_SIZE"),
        pytest.param(where_a_gpu_is, "on rank 3 of a job of 5, where torch sees a GPU", id="a GPU"),
        pytest.param(counted, "kept from one call to the next", id="a state"),
    ],
)
def test_what_only_computes_gives_the_same_on_a_rank_with_a_gpu(answer, said, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: CARD)
    with judging(Lab("lab01_baseline")), pytest.raises(MilestoneFailed, match=said):
        agree(answer, lambda number: number, NUMBERS)
    agree(lambda number: number, lambda number: number, NUMBERS)


def test_a_result_that_is_kept_is_seen_at_the_second_call():
    made = cache(lambda number: {"root": number})
    with judging(Lab("lab01_baseline")), pytest.raises(CallAtFault, match="something new at each call"):
        agree(watched(made), lambda number: {"root": number}, NUMBERS)


def test_nothing_of_the_job_is_left_behind():
    import os

    before = dict(os.environ)
    with pytest.raises(RuntimeError), Lab("lab01_baseline").elsewhere():
        assert os.environ["WORLD_SIZE"] == "5"
        raise RuntimeError
    assert dict(os.environ) == before


def test_exercises_are_called_with_one_thread_and_the_threads_come_back():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    use_exercises(SOLUTIONS)
    try:
        lab = Lab("lab01_baseline")
        assert lab.collate is not None and torch.get_num_threads() == 1
        lab.close()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
