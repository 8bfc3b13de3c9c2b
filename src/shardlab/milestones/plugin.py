"""Milestones as a pytest plugin: `pytest labs` grades the exercises in use and prints a scoreboard.

pytest labs                      the learner's exercises in src/
pytest labs --solutions          the reference solutions
pytest labs --exercises PATH     a submission
pytest labs --task 2.1           one task
"""

from __future__ import annotations

import json
import os
import re
from functools import partial
from pathlib import Path

import pytest

from shardlab import hardware, labs, switch
from shardlab.cluster import slurm
from shardlab.milestones.agreement import judging
from shardlab.milestones.exercises import BoxedLab, FileAtFault, Lab
from shardlab.milestones.launches import launched, own_folder
from shardlab.milestones.messages import MilestoneFailed, fingerprint, known_mistakes
from shardlab.milestones.scoreboard import Milestone, render
from shardlab.run.placement import CHECKING_RANKS, Placement, place
from shardlab.sandbox.calls import CallAtFault
from shardlab.sandbox.ended import BoxEnded


def pytest_addoption(parser) -> None:
    group = parser.getgroup("shardlab", "milestones of the shardlab course")
    group.addoption("--solutions", action="store_true", help="grade the reference solutions")
    group.addoption("--exercises", metavar="PATH", help="grade the 'exercises' package in this folder")
    group.addoption("--task", metavar="N.K", help="only the milestones of this task")
    group.addoption("--milestones-json", metavar="FILE", help="write the outcome of every milestone to this file")


def pytest_configure(config) -> None:
    marker = (
        "milestone(task, points, section, needs, ops, ranks): a graded milestone of a lab; `section`: of the lecture, to read on; "
        "`needs`: tasks that it uses, `ops`: DeepSpeed's ops, `ranks`: of the largest run that it starts, 2 by default"
    )
    config.addinivalue_line("markers", marker)
    if config.getoption("--solutions") and config.getoption("--exercises"):
        raise pytest.UsageError("--solutions and --exercises name two packages; give one of them")
    chosen = config.getoption("--exercises") or (switch.SOLUTIONS if config.getoption("--solutions") else None)
    if chosen:
        try:
            switch.use_exercises(chosen)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None
    config.stash[_outcomes] = []


_outcomes = pytest.StashKey[list]()
BOX = pytest.StashKey()
"""The box in which the exercises are, where they are not in this process."""
SAY = pytest.StashKey()
"""Called with a line on what takes long; by default it is printed."""
HIDDEN_TOO = pytest.StashKey[bool]()
"""Look at hidden milestones even where the task's own one has failed: do they catch the mistake as well?"""
_no_op = pytest.StashKey[str]()
_ran_on = pytest.StashKey[str]()


def _marker(item):
    marker = item.get_closest_marker("milestone")
    if not marker:
        return None
    hidden = item.path.name.startswith("hidden_")
    return str(marker.kwargs["task"]), 0 if hidden else int(marker.kwargs["points"]), hidden


CALLS_ONLY = 60
"""Seconds for a milestone that starts no ranks and no jobs. Each takes a few; a loop in an exercise may have no end."""


def pytest_collection_modifyitems(config, items) -> None:
    for item in items:
        if _marker(item) and BOX not in config.stash and not {"run_experiments", "slurm_beside_exercises"} & set(item.fixturenames):
            item.add_marker(pytest.mark.timeout(min(CALLS_ONLY, config.getoption("--timeout") or CALLS_ONLY)))
    wanted = config.getoption("--task")
    if wanted:
        chosen = [item for item in items if _marker(item) and _marker(item)[0] == wanted]
        if not chosen:
            known = sorted({_marker(item)[0] for item in items if _marker(item)})
            raise pytest.UsageError(f"there is no task {wanted!r} here; there are {', '.join(known) or 'none'}")
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


@pytest.fixture
def lab(request):
    """The exercise module that belongs to this milestone file."""
    module = _lab(request.node)
    with judging(module):
        yield module
    module.close()


def _lab(item) -> Lab:
    stem, box = _stem(item.path), item.config.stash.get(BOX, None)
    return Lab(stem) if box is None else BoxedLab(stem, box)


@pytest.fixture
def run_experiments(request):
    """`run_experiments(experiments)`: finished runs by name, on real ranks; equal experiments share one launch."""
    launch = partial(launched, task=_marker(request.node)[0], largest=_ranks(request.node), box=request.config.stash.get(BOX, None))

    def run(experiments: list, timeout: float = 120, reference: bool = False) -> dict:
        where = _placement(request.node)
        request.node.stash[_ran_on] = where.on if where.device == "cuda" or where.why else ""
        return launch(experiments, timeout=timeout, reference=reference)

    return run


def _ranks(item) -> int:
    """Ranks of the largest run of a milestone."""
    return item.get_closest_marker("milestone").kwargs.get("ranks", CHECKING_RANKS)


def _placement(item) -> Placement:
    return place(_ranks(item), or_cpu=True)


@pytest.fixture
def workspace(request) -> Path:
    """A folder that exercises may write into, and that keeps its name from one milestone to the next."""
    box = request.config.stash.get(BOX, None)
    return own_folder() if box is None else box.exchange / "work"


@pytest.fixture
def slurm_beside_exercises(request):
    """For milestones whose jobs run what the exercises wrote: with exercises in a box, the Slurm in use is one in that box."""
    box = request.config.stash.get(BOX, None)
    if box is None:
        yield
    else:
        from shardlab.sandbox.boxes import why_no_slurm

        with slurm.elsewhere(box.slurm, why_no_slurm):
            yield


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    """Have DeepSpeed's ops compiled before the clock of a test runs: a slow compiler is not the exercises' fault."""
    mark = _marker(item)
    names = item.get_closest_marker("milestone").kwargs.get("ops", ()) if mark else ()
    if names and not _lab(item).unwritten(mark[0]):
        from shardlab import hardware
        from shardlab.zero import toolchain

        say, box = item.config.stash.get(SAY, None), item.config.stash.get(BOX, None)
        # Its ranks may compute on another device than this process; one that starts no ranks loads its ops here.
        device = _placement(item).device if "run_experiments" in item.fixturenames else hardware.device()
        for op in names:
            if why := toolchain.why_no_op(op, say or item.config.get_terminal_writer().line, device):
                item.stash[_no_op] = why
                break
            if box is not None:
                box.provide(op)
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    mark = _marker(item)
    if mark and "lab" in item.funcargs:
        if message := item.funcargs["lab"].unreadable():
            raise FileAtFault(message)
        if message := item.funcargs["lab"].unwritten(mark[0]):
            raise NotImplementedError(message)
    if mark and mark[2] and not item.config.stash.get(HIDDEN_TOO, False) and (own := _open_tasks(item, {mark[0]})):
        if {m.verdict for m in own} == {"not run"}:
            pytest.skip("the task's own milestone could not run here")
        raise MilestoneFailed("The task's own milestone has not passed, so this one was not looked at.")
    if why := item.stash.get(_no_op, ""):
        pytest.skip(why)
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    mark = _marker(item)
    if not mark or (report.when != "call" and report.passed):
        return report
    task, points, hidden = mark
    verdict, message, mark_of_it = "passed", "", ""
    if report.skipped:
        verdict, message = "not run", str(call.excinfo.value)
    elif report.failed:
        folder = item.funcargs["lab"].folder if "lab" in item.funcargs else ""
        error = call.excinfo.value
        mark_of_it = fingerprint(task, item.name, _seen(error))
        known = "" if hidden else known_mistakes(item.path.parent / "mistakes.json").get(mark_of_it, "")
        verdict, message = "failed", _message(call.excinfo, _where_to_read(item), folder, known)
        if _is_unwritten(call.excinfo.value) and _names_task(call.excinfo.value) in ("", task):
            verdict = "not implemented"
        report.longrepr = message
    waits_for = ""
    if verdict == "failed" and (waits_for := _comes_first(item, call.excinfo.value, task)):
        message = f"Task {task} uses task {waits_for}, which has not passed. Look at that one first; then check this one again."
        report.longrepr = message
    if report.when == "teardown":  # it has its line already
        item.config.stash[_outcomes].pop()
    ran_on = item.stash.get(_ran_on, "") if verdict in ("passed", "failed") else ""
    outcome = Milestone(_stem(item.path), task, item.name, points, verdict, message, hidden, waits_for, ran_on, mark_of_it)
    item.config.stash[_outcomes].append(outcome)
    return report


def _seen(error: BaseException) -> str:
    """What a mistake is recognised by: of an error on a rank its last line, as the traceback holds the learner's own lines."""
    if on_rank := getattr(error, "error", "") if getattr(error, "rank_traceback", "") else "":
        return f"{error.experiment}: {on_rank}"
    return getattr(error, "seen", "") or f"{type(error).__name__}: {error}"


def _stem(path: Path) -> str:
    """The lab of a milestone file: `test_<lab>.py`, or `hidden_<lab>.py` where a release leaves it out."""
    return path.stem.removeprefix("test_").removeprefix("hidden_")


def _names_task(error: BaseException) -> str:
    """The task whose skeleton raised this; nothing if it was not one."""
    found = re.search(r"\bTask (\d+\.\d+): ", str(getattr(error, "error", error)))
    return found[1] if found and _is_unwritten(error) else ""


def _comes_first(item, error: BaseException, task: str) -> str:
    """The task that this one uses and that has not passed, as far as the outcomes so far or the error show."""
    if other := _names_task(error):
        return other
    if isinstance(error, FileAtFault | BoxEnded):
        return ""  # of the whole file, and no other task's fault
    open_ = _open_tasks(item, set(item.get_closest_marker("milestone").kwargs.get("needs", ())))
    return open_[0].task if open_ else ""


def _open_tasks(item, tasks: set[str]) -> list[Milestone]:
    """The milestones of some tasks of the lab that have been judged and have not passed."""
    judged = item.config.stash[_outcomes]
    return [m for m in judged if m.task in tasks and m.lab == _stem(item.path) and m.verdict != "passed"]


def _where_to_read(item) -> str:
    """The lab's task, and the section of its lecture that the marker names."""
    given = item.get_closest_marker("milestone").kwargs
    task = str(given["task"])
    place = f"lab {int(task.partition('.')[0]):02d}, task {task}"
    if "section" in given:
        place += f"; notebooks/{labs.named(_stem(item.path)).lecture}.ipynb, '{given['section']}'"
    return place


def _is_unwritten(error: BaseException) -> bool:
    return isinstance(error, NotImplementedError) or str(getattr(error, "error", "")).startswith("NotImplementedError")


def _message(excinfo, read: str, folder, known: str) -> str:
    """A failure as the learner reads it; `known` is the mistake that gives this very result, if it is a known one."""
    error = excinfo.value
    if _is_unwritten(error):
        return str(getattr(error, "error", error)).removeprefix("NotImplementedError: ")
    on_rank = str(getattr(error, "error", "")).removeprefix(f"{CallAtFault.__module__}.{CallAtFault.__name__}: ")
    if _is_message(on_rank):
        text = f"{on_rank}\nat        rank {error.rank}, in '{error.experiment}'"
    elif isinstance(error, MilestoneFailed) or _is_message(str(error)):
        text = str(error)
        if not _is_message(text):
            return text
    else:
        text = _of_an_error(excinfo, folder)
    if known and "\nlikely    " not in text:
        text += f"\nlikely    {known}"
    return f"{text}\nread      {read}"


def _is_message(text: str) -> bool:
    """Whether an error's text is a message already, as that of a `CallAtFault` is, from a box or a rank too."""
    return text.startswith("expected  ")


def _of_an_error(excinfo, folder) -> str:
    """The message for an error that somebody's exercises raised, or that came of what they returned."""
    error = excinfo.value
    folder = str(folder or switch.exercises_folder() / "exercises")
    expected, likely = "your function to come to its end", getattr(error, "likely", "")
    # Frames of the learner's own code are what helps; the rest is ours.
    if rank_traceback := getattr(error, "rank_traceback", ""):
        got = f"rank {error.rank}, in '{error.experiment}': {error.error}"
        found = re.findall(rf'File "{re.escape(folder)}/([^"]+)", line (\d+), in (\w+)', rank_traceback)
        places = [f"{file}, line {line}, in {function}()" for file, line, function in found]
    else:
        got = f"{getattr(error, 'kind', type(error).__name__)}: {error}"
        places = getattr(error, "places", None) or [
            f"{Path(str(entry.path)).name}, line {entry.lineno + 1}: {str(entry.statement).strip()}"
            for entry in excinfo.traceback
            if str(entry.path).startswith(folder)
        ]
        if not places and not isinstance(error, BoxEnded):
            expected, got = "a result of the form that the docstring describes", f"one whose use gives {got}"
    if isinstance(error, BoxEnded):
        got = str(error)
    elif seconds := re.match(r"Timeout \(>([0-9.]+)s\) from pytest-timeout", str(error)):
        load, cores = os.getloadavg()[0], hardware.cpu_cores()
        busy = f", on a machine that is busy: {load:.0f} processes for {cores} cores. Try again" if load > 1.5 * cores else ""
        expected, got = "your function to come to its end", f"no end after {float(seconds[1]):.0f} s{busy}"
    elif GPU_TROUBLE.search(got):
        likely = GPU_ADVICE
    elif APART.search(got):
        likely = "a tensor on the CPU where one on the GPU is due, or the other way round; the task's docstring says which device"
    lines = [f"expected  {expected}", f"got       {got}", *(f"at        {place}" for place in dict.fromkeys(places))]
    lines += [f"of        {call}" for call in [getattr(error, "exercise_call", "")] if call]
    return "\n".join(lines + [f"likely    {likely}"] * bool(likely))


GPU_TROUBLE = re.compile(
    r"CUDA (driver )?error(?!: (device-side assert|invalid device ordinal))|CUDA out of memory|NCCL error(?!.*invalid usage)"
    r"|CUBLAS_STATUS",
    re.IGNORECASE,
)
APART = re.compile(r"to be on the same device|No backend type associated with device type")
GPU_ADVICE = (
    "the GPU and not your function: other processes use it up, or its driver does not work (`nvidia-smi`, `shardlab doctor`). "
    "With CUDA_VISIBLE_DEVICES= in front of the command (for a notebook, of `jupyter lab`) the check runs on the CPU"
)


def pytest_terminal_summary(terminalreporter, config) -> None:
    outcomes = config.stash[_outcomes]
    if config.getoption("--milestones-json"):
        Path(config.getoption("--milestones-json")).write_text(json.dumps([vars(o) for o in outcomes], indent=1) + "\n")
    if outcomes and terminalreporter.verbosity >= 0:
        terminalreporter.write_line("")
        terminalreporter.write(render(outcomes))
