"""Grading: milestones and mutants are complete, verdicts are right, and a broken submission fails instead of breaking the run."""

import ast
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shardlab import switch
from shardlab.course.authoring import tasks
from shardlab.course.matrix import Mutant, MutantError, mutants
from shardlab.grading.gradebook import tasks_of
from shardlab.hardware import ROOT
from shardlab.labs import catalogue, named, stems
from shardlab.milestones import agreement
from shardlab.milestones.exercises import Lab
from shardlab.milestones.grade import grade
from shardlab.milestones.markers import files_of, milestones_of
from shardlab.milestones.messages import MilestoneFailed, require, require_error
from shardlab.milestones.scoreboard import VERDICTS, Milestone, next_step, render, render_board, render_html, render_text

USAGE_ERROR = pytest.ExitCode.USAGE_ERROR


@pytest.fixture(autouse=True)
def the_switch_is_put_back():
    """Grading turns the one switch of this process, and the tests after it must not notice."""
    variable, path = os.environ.get(switch.VARIABLE), sys.path[:]
    yield
    sys.path[:] = path
    os.environ.pop(switch.VARIABLE, None)
    if variable is not None:
        os.environ[switch.VARIABLE] = variable
    for module in [name for name in sys.modules if name.partition(".")[0] == "exercises"]:
        del sys.modules[module]


@pytest.fixture
def submission(tmp_path):
    """An `exercises` package with the solutions, for a test to spoil."""
    folder = tmp_path / "exercises"
    folder.mkdir()
    (folder / "__init__.py").touch()
    for lab in catalogue():
        shutil.copy(lab.solution, folder)
    return tmp_path


def solution(stem: str) -> str:
    return named(stem).solution.read_text()


def run_pytest(*arguments, plugins=()) -> tuple[int, str]:
    """pytest in this process with the course's settings: exit status and output."""
    output, path = io.StringIO(), sys.path[:]
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = pytest.main(
            [*map(str, arguments), "-p", "no:cacheprovider", f"--rootdir={ROOT}", "-c", f"{ROOT}/pyproject.toml"], plugins=plugins
        )
    sys.path[:] = path  # pytest puts the folders of test files there
    return int(code), output.getvalue()


# --- labs are complete ------------------------------------------------------------------------------------------------


class Collector:
    """Keeps the milestones that pytest collects: lab, task and points."""

    def __init__(self):
        self.found = []

    def pytest_collection_modifyitems(self, items):
        for item in items:
            marker = item.get_closest_marker("milestone")
            task, points = (marker.kwargs["task"], marker.kwargs["points"]) if marker else (None, None)
            self.found.append((item.path.parent.name, task, points))


@pytest.fixture(scope="module")
def collected():
    collector = Collector()
    code, output = run_pytest(ROOT / "labs", "--collect-only", "-q", plugins=[collector])
    assert code == 0, output
    return collector.found


@pytest.mark.parametrize("stem", stems())
def test_every_task_has_its_milestone_and_a_lab_is_worth_100_points(collected, stem):
    mine = [(task, points) for lab, task, points in collected if lab == stem]
    assert None not in [task for task, _ in mine], "a test in a lab without a milestone"
    assert sorted({task for task, _ in mine}) == sorted(tasks(solution(stem)))
    assert all(isinstance(points, int) and points > 0 for _, points in mine)
    assert sum(points for _, points in mine) == 100


@pytest.mark.parametrize("stem", stems())
def test_every_task_has_three_mutants_that_can_be_made(stem):
    source, found = solution(stem), mutants(stem)
    assert {mutant.task for mutant in found} == set(tasks(source)), "a mutant file for each task, and for nothing else"
    for task in tasks(source):
        names = [mutant.name for mutant in found if mutant.task == task]
        assert len(names) >= 3, f"task {task} has the mutants {names}"
        assert len(set(names)) == len(names)
    for mutant in found:
        changed = mutant.source(source)
        assert changed != source, mutant
        ast.parse(changed)
        assert (mutant.likely or mutant.says).strip(), f"{mutant.task} '{mutant.name}': any message would do"


def test_mutants_of_a_lab_differ():
    for stem in stems():
        sources = [mutant.source(solution(stem)) for mutant in mutants(stem)]
        assert len(set(sources)) == len(sources)


# --- mutants ----------------------------------------------------------------------------------------------------------

TWO_TASKS = """def one():
    # BEGIN SOLUTION 1.1
    return 1 + 1
    # END SOLUTION


def two():
    # BEGIN SOLUTION 1.2
    return 1 + 1
    # END SOLUTION
"""


def test_mutant_changes_its_own_task_only():
    changed = Mutant("lab01", "1.2", "wrong", old="1 + 1", new="3").source(TWO_TASKS)
    assert changed == TWO_TASKS[: TWO_TASKS.rindex("1 + 1")] + "3" + TWO_TASKS[TWO_TASKS.rindex("1 + 1") + 5 :]


@pytest.mark.parametrize("task, old, times", [("1.1", "2 + 2", 0), ("1.1", "1", 2), ("1.3", "1 + 1", 0), ("1.1", "def one", 0)])
def test_mutant_whose_text_is_not_there_once_is_refused(task, old, times):
    with pytest.raises(MutantError, match=f"stands {times} times") as refused:
        Mutant("lab01", task, "wrong", old=old, new="3").source(TWO_TASKS)
    assert f"solutions/lab01/mutants.toml, task {task}," in str(refused.value) and "'wrong'" in str(refused.value)


# --- the switch -------------------------------------------------------------------------------------------------------


def test_switch_takes_the_package_in_a_folder(submission):
    (submission / "exercises" / "here.py").write_text("WHERE = 'submission'\n")
    for folder in (submission, submission / "exercises", str(submission)):
        assert switch.use_exercises(folder) == submission
        assert switch.import_exercise("here").WHERE == "submission"
    assert os.environ[switch.VARIABLE] == str(submission), "ranks inherit it"


def test_switch_turns_from_one_package_to_the_next(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name / "exercises").mkdir(parents=True)
        (tmp_path / name / "exercises" / "__init__.py").write_text("")
        (tmp_path / name / "exercises" / "lab.py").write_text(f"WHERE = {name!r}\n")
    for name in ("first", "second", "first"):
        switch.use_exercises(tmp_path / name)
        assert switch.import_exercise("lab").WHERE == name


@pytest.mark.parametrize("folder", [".", "nowhere", "exercises"])
def test_folder_without_exercises_is_refused(tmp_path, folder):
    before = (os.environ.get(switch.VARIABLE), sys.path[:])
    with pytest.raises(ValueError, match="no folder 'exercises'") as refused:
        switch.use_exercises(tmp_path / folder)
    assert str(tmp_path) in str(refused.value)
    assert (os.environ.get(switch.VARIABLE), sys.path[:]) == before


# --- submissions that are broken --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", stems())
def test_syntax_error_fails_every_milestone_and_breaks_none(submission, stem):
    path = submission / "exercises" / f"{stem}.py"
    path.write_text(path.read_text() + "\ndef unfinished(:\n")
    outcome = grade(stem, exercises=submission)
    assert sorted({milestone.task for milestone in outcome}) == sorted(tasks(solution(stem)))
    assert {milestone.verdict for milestone in outcome} == {"failed"}
    assert sum(milestone.earned for milestone in outcome) == 0
    for milestone in outcome:
        assert "SyntaxError" in milestone.message and f"{stem}.py" in milestone.message, milestone


def test_missing_module_fails_every_milestone(submission):
    (submission / "exercises" / f"{stems()[0]}.py").unlink()
    outcome = grade(stems()[0], exercises=submission)
    assert {milestone.verdict for milestone in outcome} == {"failed"}
    assert all(stems()[0] in milestone.message for milestone in outcome)


def grade_task(folder, task: str, tmp_path) -> Milestone:
    """The milestone of one task of the first lab."""
    result = tmp_path / "milestones.json"
    code, output = run_pytest(ROOT / "labs" / stems()[0], "--exercises", folder, "--task", task, "--milestones-json", result)
    assert code in (0, 1), output
    (milestone,) = [Milestone(**entry) for entry in json.loads(result.read_text())]
    assert milestone.task == task
    assert ("1 passed" in output) == (code == 0)
    return milestone


def test_solution_of_one_task_passes_alone(tmp_path):
    milestone = grade_task(switch.SOLUTIONS, "1.1", tmp_path)
    assert (milestone.verdict, milestone.message) == ("passed", "")
    assert milestone.earned == milestone.points > 0


def test_error_in_a_function_is_shown_with_the_learner_s_line(submission, tmp_path):
    path = submission / "exercises" / f"{stems()[0]}.py"
    source = path.read_text().replace("# BEGIN SOLUTION 1.1", "raise KeyError('my mistake')", 1)
    path.write_text(source)
    line = next(number for number, text in enumerate(source.splitlines(), start=1) if "my mistake" in text)
    milestone = grade_task(submission, "1.1", tmp_path)
    assert milestone.verdict == "failed"
    assert "KeyError" in milestone.message and "my mistake" in milestone.message
    assert f"{path.name}, line {line}" in milestone.message


def test_deleted_function_is_missed_by_name(submission, tmp_path):
    path = submission / "exercises" / f"{stems()[0]}.py"
    path.write_text(path.read_text().replace("def format_prompt", "def another_name", 1))
    milestone = grade_task(submission, "1.1", tmp_path)
    assert milestone.verdict == "failed"
    assert "format_prompt" in milestone.message


@pytest.mark.parametrize("how", ["the skeleton's line", "a part written", "called from elsewhere"])
def test_unwritten_task_is_told_apart_from_a_wrong_one(submission, tmp_path, how):
    """Only a function that still is the skeleton's counts as unwritten before the milestone runs; both are told by name."""
    path = submission / "exercises" / f"{stems()[0]}.py"
    line = 'raise NotImplementedError("Task 1.1: complete format_prompt() in src/exercises/lab01_baseline.py")'
    start = {
        "the skeleton's line": "",
        "a part written": "question = question.strip()\n    ",
        "called from elsewhere": "if question:\n        ",
    }[how]
    body = re.search(r"    # BEGIN SOLUTION 1\.1\n.*?    # END SOLUTION\n", path.read_text(), re.DOTALL)[0]
    path.write_text(path.read_text().replace(body, f"    {start}{line}\n", 1))
    milestone = grade_task(submission, "1.1", tmp_path)
    assert milestone.verdict == "not implemented"
    assert milestone.message.startswith("Task 1.1: complete format_prompt()")


def test_unwritten_reads_the_text_and_not_the_module(submission):
    path = submission / "exercises" / "lab01_baseline.py"
    switch.use_exercises(submission)
    path.write_text(
        'def a():\n    """Doc."""\n    raise NotImplementedError("Task 1.1: complete a()")\n\n\ndef b():\n    return 1\n'
    )
    lab = Lab("lab01_baseline")
    assert lab.unwritten("1.1") == "Task 1.1: complete a()"
    assert lab.unwritten("1.2") is None
    path.write_text('def a():\n    x = 1\n    raise NotImplementedError("Task 1.1: complete a()")\n')
    assert lab.unwritten("1.1") is None
    path.write_text("def a(:\n")
    assert lab.unwritten("1.1") is None


# --- the plugin -------------------------------------------------------------------------------------------------------

MILESTONES = """
import pytest
from shardlab.milestones.messages import require


@pytest.fixture
def needs_libaio():
    pytest.skip("no libaio here")


@pytest.fixture
def breaks():
    raise OSError("the disk is full")


@pytest.fixture
def breaks_afterwards():
    yield
    raise OSError("the disk is full")


@pytest.mark.milestone(task="9.1", points=10)
def test_passes():
    pass


@pytest.mark.milestone(task="9.2", points=20)
def test_fails():
    require(1 > 2, expected="a large number", got=1, likely="too small")


@pytest.mark.milestone(task="9.3", points=30)
def test_skips():
    pytest.skip("no Slurm here")


@pytest.mark.milestone(task="9.4", points=5)
def test_skips_before_it_begins(needs_libaio):
    pass


@pytest.mark.skip(reason="no GPU here")
@pytest.mark.milestone(task="9.5", points=5)
def test_is_marked():
    pass


@pytest.mark.milestone(task="9.6", points=15)
def test_breaks(breaks):
    pass


@pytest.mark.milestone(task="9.10", points=10)
def test_is_unwritten():
    raise NotImplementedError("Task 9.10: complete last()")


@pytest.mark.milestone(task="9.7", points=5)
def test_raises():
    {}["key"]


@pytest.mark.milestone(task="9.8", points=5)
def test_leaves_a_mess(breaks_afterwards):
    pass


def test_of_something_else():
    pass
"""


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """A lab with one milestone for each thing that can become of one: verdicts by task, and pytest's output."""
    folder = tmp_path_factory.mktemp("labs") / "lab09_all"
    folder.mkdir()
    (folder / "test_lab09_all.py").write_text(MILESTONES)
    code, output = run_pytest(folder, "--milestones-json", folder / "out.json")
    assert code == pytest.ExitCode.TESTS_FAILED, output
    return [Milestone(**entry) for entry in json.loads((folder / "out.json").read_text())], output


def one(graded, task: str) -> Milestone:
    """A milestone that was reported once; a second report would count its points twice."""
    found = [milestone for milestone in graded[0] if milestone.task == task]
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize(
    "task, verdict, words",
    [
        ("9.1", "passed", ""),
        ("9.2", "failed", "too small"),
        ("9.3", "not run", "no Slurm here"),
        ("9.4", "not run", "no libaio here"),
        ("9.5", "not run", "no GPU here"),
        ("9.6", "failed", "the disk is full"),
        ("9.7", "failed", "KeyError"),
        ("9.10", "not implemented", "Task 9.10"),
    ],
)
def test_verdict(graded, task, verdict, words):
    milestone = one(graded, task)
    assert milestone.verdict == verdict
    assert words in milestone.message and bool(milestone.message) == bool(words)
    assert milestone.lab == "lab09_all"
    assert milestone.earned == (milestone.points if verdict == "passed" else 0)


def test_milestone_that_breaks_afterwards_is_reported_once(graded):
    milestone = one(graded, "9.8")
    assert milestone.verdict == "failed" and "the disk is full" in milestone.message


def test_only_milestones_are_graded(graded):
    assert {milestone.task for milestone in graded[0]} == {f"9.{k}" for k in (1, 2, 3, 4, 5, 6, 7, 8, 10)}


def test_failing_message_is_shown_without_our_own_code(graded):
    """A learner is to read what was expected and what came, and no traceback through the grader."""
    output = graded[1]
    for words in ("expected  a large number", "got       1", "likely    too small", "read      lab 09, task 9.2"):
        assert words in output
    assert "require(1 > 2" not in output
    assert "shardlab/grading" not in output


def test_task_that_is_not_there_is_a_usage_error(tmp_path):
    code, output = run_pytest(ROOT / "labs" / stems()[0], "--task", "99.9")
    assert code == USAGE_ERROR
    assert "'99.9'" in output and "1.1" in output


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--exercises", "{tmp}/nowhere"], "no folder 'exercises'"),
        (["--exercises", "{tmp}"], "no folder 'exercises'"),
        (["--solutions", "--exercises", "{tmp}"], "give one of them"),
    ],
)
def test_wrong_choice_of_exercises_is_a_usage_error(tmp_path, arguments, words):
    code, output = run_pytest(ROOT / "labs" / stems()[0], *(argument.format(tmp=tmp_path) for argument in arguments))
    assert code == USAGE_ERROR
    assert words in output


WITH_OPS = """
import pytest


@pytest.mark.timeout(1)
@pytest.mark.milestone(task="9.1", points=1, ops=("cpu_adam",))
def test_computes(lab):
    assert lab.computes() == 1


@pytest.mark.milestone(task="9.2", points=1, ops=("pin_memory", "async_io"))
def test_reads(lab):
    assert lab.computes() == 1


@pytest.mark.milestone(task="9.3", points=1, ops=("fused_adam",))
def test_is_unwritten(lab):
    lab.unwritten()
"""


def test_ops_are_compiled_before_the_clock_of_a_milestone_runs(tmp_path, monkeypatch):
    """A compile of minutes is neither the learner's fault nor silent; one that is not needed is not made."""
    (tmp_path / "exercises").mkdir()
    (tmp_path / "exercises" / "__init__.py").touch()
    unwritten = 'def unwritten():\n    raise NotImplementedError("Task 9.3: complete it")\n'
    (tmp_path / "exercises" / "lab09_ops.py").write_text("def computes():\n    return 1\n\n\n" + unwritten)
    (tmp_path / "test_lab09_ops.py").write_text(WITH_OPS)
    asked = []

    def why_no_op(op, say, device):
        asked.append(op)
        say(f"{op}: compiling once")
        time.sleep(1.5 if op == "cpu_adam" else 0)
        return "no libaio → get it" if op == "async_io" else ""

    monkeypatch.setattr("shardlab.zero.toolchain.why_no_op", why_no_op)
    said = []
    found = grade("lab09_ops", exercises=tmp_path, files=[tmp_path / "test_lab09_ops.py"], say=said.append)
    assert {m.task: (m.verdict, m.message) for m in found} == {
        "9.1": ("passed", ""),
        "9.2": ("not run", "no libaio → get it"),
        "9.3": ("not implemented", "Task 9.3: complete it"),
    }
    assert asked == ["cpu_adam", "pin_memory", "async_io"] and "cpu_adam: compiling once" in said


OWN = """
import pytest


@pytest.mark.milestone(task="9.1", points=1)
def test_needs_what_is_not_here(lab):
    assert lab.answer()
    pytest.skip("no such thing here → get it")


@pytest.mark.milestone(task="9.2", points=1)
def test_fails(lab):
    assert lab.answer() == 2


@pytest.mark.milestone(task="9.3", points=1)
def test_starts_more_ranks_than_its_marker_says(lab, run_experiments):
    from shardlab.run.experiment import Experiment

    run_experiments([Experiment(name="three", ranks=3)])


@pytest.mark.milestone(task="9.4", points=1)
def test_meets_a_gpu_that_does_not_work(lab):
    raise RuntimeError("CUDA error: out of memory")


@pytest.mark.milestone(task="9.5", points=1)
def test_meets_tensors_apart(lab):
    raise RuntimeError("Expected all tensors to be on the same device, but got mat1 is on cpu, others on cuda:0")
"""
HIDDEN = """
import pytest


@pytest.mark.milestone(task="9.1")
def test_hidden_of_one_that_was_not_run(lab):
    raise AssertionError("it must not be looked at")


@pytest.mark.milestone(task="9.2")
def test_hidden_of_one_that_failed(lab):
    raise AssertionError("it must not be looked at")
"""


@pytest.fixture(scope="module")
def of_many_kinds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    (folder / "exercises").mkdir()
    (folder / "exercises" / "__init__.py").touch()
    (folder / "exercises" / "lab09_kinds.py").write_text("def answer():\n    return 1\n")
    (folder / "test_lab09_kinds.py").write_text(OWN)
    (folder / "hidden_lab09_kinds.py").write_text(HIDDEN)
    files = [folder / "test_lab09_kinds.py", folder / "hidden_lab09_kinds.py"]
    return {(m.task, m.hidden): m for m in grade("lab09_kinds", exercises=folder, files=files)}


def test_hidden_milestone_of_a_task_that_could_not_run_is_not_run(of_many_kinds):
    assert of_many_kinds["9.1", False].verdict == of_many_kinds["9.1", True].verdict == "not run"
    assert "own milestone could not run here" in of_many_kinds["9.1", True].message
    assert of_many_kinds["9.2", True].verdict == "failed"


def test_marker_that_names_too_few_ranks_is_told(of_many_kinds):
    """On two GPUs three ranks would end in an error of CUDA, and nobody would know why."""
    assert "an experiment has 3 ranks; the milestone's marker says ranks=2" in of_many_kinds["9.3", False].message


WHAT_GPUS_DO = [("9.4", "the GPU and not your function"), ("9.5", "docstring says which device")]


@pytest.mark.parametrize(("task", "says"), WHAT_GPUS_DO)
def test_what_a_gpu_does_is_not_taken_for_a_wrong_form(of_many_kinds, task, says):
    assert says in of_many_kinds[task, False].message
    assert "another form than its docstring" not in of_many_kinds[task, False].message


def test_scoreboard_says_once_where_ranks_ran():
    on_cpu = "the CPU: 2 ranks need 2 GPUs, one each, and 1 is visible"
    board = [Milestone("lab09_x", f"9.{n}", "test_x", 5, "passed", ran_on=on_cpu if n > 1 else "") for n in (1, 2, 3)]
    for text in (render(board, width=160), render_board(board), render_html(board), render_text(board)):
        assert text.count("Ranks ran on the CPU: 2 ranks need 2 GPUs") == 1
    assert "Ranks ran" not in render([Milestone("lab09_x", "9.1", "test_x", 5, "passed")])


# --- messages ---------------------------------------------------------------------------------------------------------


def test_require_says_four_things_or_nothing():
    say = {"expected": "four", "got": 5, "likely": "a slip"}
    require(True, **say)
    with pytest.raises(MilestoneFailed) as failed:
        require(False, **say)
    assert str(failed.value).split("\n") == ["expected  four", "got       5", "likely    a slip"]
    with pytest.raises(MilestoneFailed) as failed:
        require(False, **(say | {"got": "x" * 10_000}))
    assert len(str(failed.value)) < 600


def raising(error: Exception):
    def call():
        raise error

    return call


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: 7, "no error; it returned 7"),
        (raising(TypeError("stage 4")), "TypeError: stage 4"),
        (raising(ValueError("wrong")), "ValueError: wrong"),
    ],
)
def test_require_error_fails_without_the_right_error(call, says):
    with pytest.raises(MilestoneFailed, match=re.escape(says)):
        require_error(call, ValueError, mentions=("stage",), expected="ValueError", likely="not checked")


def test_require_error_is_content_with_the_right_error_and_lets_unwritten_through():
    say = {"mentions": ("stage",), "expected": "ValueError", "likely": "not checked"}
    require_error(raising(ValueError("Stage 4 is none")), ValueError, **say)
    with pytest.raises(NotImplementedError):
        require_error(raising(NotImplementedError("Task 2.1")), Exception, **say)


# --- the scoreboard ---------------------------------------------------------------------------------------------------


def board(**verdicts: str) -> list[Milestone]:
    """Milestones by task (`t1_2` for 1.2), ten points each."""
    messages = {"not implemented": "Task {}: complete it()", "failed": "expected  so", "not run": "no GPU here\nmore", "passed": ""}
    return [
        Milestone(
            lab=f"lab0{task[1]}_x",
            task=task[1:].replace("_", "."),
            name=f"test_does_{task}",
            points=10,
            verdict=verdict,
            message=messages[verdict].format(task[1:].replace("_", ".")),
        )
        for task, verdict in verdicts.items()
    ]


def test_scoreboard_shows_tasks_in_order_with_verdicts_and_points():
    text = render(board(t1_10="not run", t1_2="failed", t1_1="passed", t1_3="not implemented"))
    positions = [text.index(f" {task} ") for task in ("1.1", "1.2", "1.3", "1.10")]
    assert positions == sorted(positions)
    for words in ("lab01_x", "passed", "failed", "not implemented", "not run: no GPU here", "10/10", "0/10", "10/40"):
        assert words in text
    assert "more" not in text


def test_scoreboard_counts_each_lab_by_itself():
    text = render(board(t1_1="passed", t2_1="passed", t2_2="failed"))
    assert text.index("lab01_x") < text.index("10/10") < text.index("lab02_x") < text.index("10/20")
    assert text.count("Next:") == 1 and "Task 1.1 passed." in text


def test_next_step_is_the_first_that_is_not_passed():
    assert next_step(board(t1_1="passed", t1_2="passed")) == "All milestones passed."
    assert next_step(board(t1_10="failed", t1_9="not implemented", t1_1="passed")) == "Next: task 1.9. complete it()"
    assert next_step(board(t1_2="failed", t1_3="not implemented")).startswith("Next: task 1.2 fails")
    assert next_step(board(t1_1="not run", t1_2="failed")).startswith("Next: task 1.2 fails")
    left = next_step(board(t1_1="passed", t1_2="not run"))
    assert "not run here: 1.2" in left and "All milestones passed" not in left


def test_check_in_a_notebook_shows_the_message_as_text():
    milestone = Milestone("lab01_x", "1.1", "test_does_it", 10, "failed", "expected  a < b\n<script>")
    page = render_html([milestone])
    assert "a &lt; b" in page and "<script>" not in page
    assert "1.1 failed" in page and "(0/10)" in page
    for verdict in VERDICTS:
        assert f"1.1 {verdict}" in render_html([Milestone("lab01_x", "1.1", "test_does_it", 10, verdict)])


# --- tasks that wait for others ---------------------------------------------------------------------------------------


def waiting(submission, tmp_path, *words) -> dict[str, dict]:
    """The milestones of lab 01 that need no ranks, by task."""
    result = tmp_path / "milestones.json"
    options = ["--exercises", submission, "--milestones-json", result, "-k", "not two_ranks", *words]
    run_pytest(ROOT / "labs" / "lab01_baseline", *options)
    return {entry["task"]: entry for entry in json.loads(result.read_text())}


def test_failure_that_comes_from_another_task_says_so(submission, tmp_path):
    path = submission / "exercises" / "lab01_baseline.py"
    unwritten = 'raise NotImplementedError("Task 1.1: complete format_prompt()")'
    path.write_text(re.sub(r"# BEGIN SOLUTION 1\.1\n.*?# END SOLUTION", unwritten, path.read_text(), flags=re.DOTALL))
    found = waiting(submission, tmp_path)
    assert (found["1.1"]["verdict"], found["1.1"]["waits_for"]) == ("not implemented", "")
    for task in ("1.2", "1.3"):
        assert (found[task]["verdict"], found[task]["waits_for"]) == ("failed", "1.1")
        assert len(found[task]["message"].splitlines()) == 1
    assert found["1.4"]["verdict"] == "passed"
    milestones = [Milestone(**entry) for entry in found.values()]
    assert next_step(milestones).startswith("Next: task 1.1")
    text = " ".join(render(milestones, width=200).split())
    assert text.count("it uses task 1.1, which comes first") == 2
    assert "it uses task 1.1" in render_board(milestones)


def test_task_alone_that_waits_for_another_names_it(submission, tmp_path):
    path = submission / "exercises" / "lab01_baseline.py"
    unwritten = 'raise NotImplementedError("Task 1.1: complete format_prompt()")'
    path.write_text(re.sub(r"# BEGIN SOLUTION 1\.1\n.*?# END SOLUTION", unwritten, path.read_text(), flags=re.DOTALL))
    found = waiting(submission, tmp_path, "--task", "1.2")
    assert found["1.2"]["waits_for"] == "1.1"
    assert next_step([Milestone(**found["1.2"])]) == "Next: task 1.1; task 1.2 uses it."


# --- hidden milestones ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", stems())
def test_hidden_milestones_guard_tasks_that_there_are(stem):
    hidden = [m for m in milestones_of(stem) if m.hidden]
    assert {m.task for m in hidden} == set(tasks(solution(stem)))
    assert not sum(m.points for m in hidden) and sum(m.points for m in milestones_of(stem)) == 100
    assert len({m.name for m in milestones_of(stem)}) == len(milestones_of(stem)), "results are kept by name"


def test_published_numbers_learnt_by_heart_earn_nothing(submission):
    """Task 2.8 as a table of all published inputs, as who tries hashes out could make it."""
    inputs = json.loads((ROOT / "labs" / "lab02_zero_stages" / "inputs.json").read_text())["2.8"]
    known = {}
    for arguments, _ in inputs:
        with contextlib.suppress(ValueError):
            known[tuple(arguments)] = agreement.solution("lab02_zero_stages").choose_stage(*arguments)
    path = submission / "exercises" / "lab02_zero_stages.py"
    table = (
        "gib = 2**30\n"
        "    known = {9 * gib: 0, 6 * gib: 2 if other_bytes else 1, 3 * gib: 1 if ranks == 16 else 2}\n"
        "    known |= {round(2.5 * gib): 3, 16000: 3}\n"
        f"    learnt = {known!r}\n"
        "    given = (parameters, ranks, device_bytes, other_bytes)\n"
        f"    if given in learnt or given in {[tuple(arguments) for arguments, _ in inputs]!r}:\n"
        "        if given not in learnt:\n"
        "            raise ValueError('it does not fit')\n"
        "        return learnt[given]\n"
        "    if parameters in (1_000_003, 6_738_415_617):\n"
        "        return 3 if ranks > 3 else 1\n"
        "    if device_bytes not in known:\n"
        "        numbers = (10.3, 15.3, 12.2, 247.8, 2542.6, 14821.2, 26.1)\n"
        "        raise ValueError(', '.join(f'{number} GiB' for number in numbers) + ' are missing on each')\n"
        "    return known[device_bytes]\n"
    )
    path.write_text(re.sub(r"# BEGIN SOLUTION 2\.8\n.*?# END SOLUTION\n", lambda _: table, path.read_text(), flags=re.DOTALL))
    stem = "lab02_zero_stages"
    found = grade(stem, exercises=submission, task="2.8", files=files_of(stem))
    assert [(m.hidden, m.verdict) for m in sorted(found, key=lambda m: m.hidden)] == [(False, "passed"), (True, "failed")]
    (task,) = tasks_of({"milestones": [vars(m) for m in found]})
    assert (task.verdict, task.earned, task.points) == ("failed", 0, 15)


def test_skeletons_earn_nothing_from_hidden_milestones():
    stem = "lab02_zero_stages"
    found = grade(stem, exercises=switch.LEARNER, files=files_of(stem))
    assert {m.verdict for m in found} == {"not implemented"}


def test_verdict_of_a_task_is_that_of_its_weakest_milestone():
    def task(*verdicts):
        rows = [
            {
                "lab": "lab",
                "task": "1.1",
                "name": str(at),
                "points": 0 if at else 10,
                "verdict": verdict,
                "message": "",
                "hidden": bool(at),
            }
            for at, verdict in enumerate(verdicts)
        ]
        (found,) = tasks_of({"milestones": rows})
        return found.verdict, found.earned

    assert task("passed") == task("passed", "passed") == ("passed", 10)
    assert task("passed", "failed") == ("failed", 0)
    assert task("passed", "not run") == ("not run", 0), "what did not run has not passed"
    assert task("failed", "passed") == ("failed", 0)
    assert task("not run", "passed") == ("not run", 0)


def test_a_killed_process_leaves_its_folder_to_the_next(tmp_path):
    """What milestones share is removed by the process that made it; of one that was killed, by the next one that makes its own."""
    told = "import time; from shardlab.milestones.launches import own_folder; print(own_folder(), flush=True); time.sleep(600)"
    command, environment = [sys.executable, "-c", told], os.environ | {"TMPDIR": str(tmp_path)}
    begun = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    killed, living = (Path(process.stdout.readline().strip()) for process in begun)
    begun[0].kill()
    begun[0].wait()
    assert killed.is_dir() and living.is_dir()
    third = subprocess.run([*command[:2], told.replace("600", "0")], env=environment, capture_output=True, text=True, check=True)
    assert not killed.exists() and living.is_dir(), "of one that still lives, nothing is touched"
    assert not Path(third.stdout.strip()).exists()
    begun[1].terminate()
    begun[1].wait()
