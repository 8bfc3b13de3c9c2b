"""Grading many submissions: judges side by side, each with one box at a time; results that survive an interruption.

OUT/results/<submission>.json     what came of each; a batch that is started again goes on behind them
OUT/gradebook.csv, …              written by `gradebook.py` from the results alone
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path

import psutil

from shardlab.errors import CourseError
from shardlab.grading import submissions
from shardlab.hardware import ROOT
from shardlab.labs import chosen, named
from shardlab.milestones.launches import REFERENCES
from shardlab.milestones.markers import files_of, milestones_of, ops_of

FORMAT = 1
"""Milestones that a release leaves out: the same invariants with other numbers."""
JUDGE_MEMORY = 6 * 2**30
"""Bytes that a judge may take beyond what it begins with."""
MESSAGE = 20_000
"""Letters of a message that are kept."""
GRACE = 600.0
"""Seconds that a judge may take beyond a submission's own time: its reference runs, and opening the submission."""


class GradingError(CourseError, ValueError):
    """A batch that cannot be graded; the message says why and what to do."""


def course_digest(labs: list[str]) -> str:
    """A digest of everything that a grade depends on besides the submission."""
    whole = hashlib.sha256()
    folders = (ROOT / "src" / "shardlab", ROOT / "slurm")
    library = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    judged = [path for lab in chosen(",".join(labs)) for path in (lab.milestones, lab.hidden_milestones, lab.programs)]
    for path in [*library, ROOT / "constraints.txt", *judged]:
        if path.exists():
            whole.update(str(path.relative_to(ROOT)).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()


# --- one submission ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What all submissions of a batch are graded with.

    Attributes:
        labs: stems.
        seconds: how long the exercises of one submission may run, all labs together.
        call_seconds: how long they may take for one call.
        course: `course_digest(labs)`.
        isolation: "bubblewrap" or "limits", and why not bubblewrap.
    """

    labs: tuple[str, ...]
    seconds: float
    course: str
    isolation: tuple[str, str]
    call_seconds: float = 60.0


def grade_submission(name: str, path: Path, plan: Plan, tell: Callable[[str], None] = lambda at: None) -> dict:
    """Grade one submission in a box. Whatever goes wrong is in the result, and what is not proven has not passed.

    Args:
        name: of the submission.
        path: folder, archive or bundle.
        plan: how.
        tell: called with what is being done.
    """
    from shardlab.milestones.grade import grade
    from shardlab.milestones.launches import visible_folder
    from shardlab.sandbox.boxes import Box
    from shardlab.sandbox.exchange import remove

    started = time.monotonic()
    result = empty_result(name, path, plan)
    proven = {}
    work = Path(tempfile.mkdtemp(prefix="shardlab-judge-"))
    try:
        tell("opening")
        opened = submissions.open_apart(path, work / "submission")
        result |= {"digest": opened.digest, "notes": opened.notes}
        left = plan.seconds
        for stem in plan.labs:
            tell(stem)
            lab = named(stem)
            programs = str(lab.programs.relative_to(ROOT)) if lab.programs.exists() else ""
            # A box a lab: what a hidden milestone handed over must not be there for the next lab to tell.
            box = Box(work / "submission", work / f"exchange-{stem}", (visible_folder(),), programs, kind=plan.isolation[0])
            box.seconds, box.call_seconds = left, plan.call_seconds
            with box:
                for milestone in grade(stem, box=box, files=files_of(stem), say=tell):
                    proven[milestone.lab, milestone.name] = milestone
            left -= box.used
            remove(work / f"exchange-{stem}")
            if box.troubled:
                result |= {"error": box.troubled, "whole": False}
    except submissions.SubmissionError as error:
        result |= {"error": str(error)}
    except Exception as error:
        result |= {"error": f"the grading ended: {type(error).__name__}: {str(error)[:2000]}", "whole": False}
    finally:
        remove(work)
    for entry in result["milestones"]:
        if milestone := proven.get((entry["lab"], entry["name"])):
            entry |= {"verdict": milestone.verdict, "message": milestone.message[:MESSAGE], "waits_for": milestone.waits_for}
        elif result["error"]:
            entry["message"] = result["error"]
    return result | {"seconds": round(time.monotonic() - started, 2)}


def empty_result(name: str, path: Path, plan: Plan) -> dict:
    """The result of a submission of which nothing is proven yet."""
    return {
        "format": FORMAT,
        "name": name,
        "source": str(path),
        "digest": "",
        "course": plan.course,
        "labs": list(plan.labs),
        "isolation": list(plan.isolation),
        "whole": True,
        "error": "",
        "notes": [],
        "seconds": 0.0,
        "graded": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "milestones": [asdict(milestone) for stem in plan.labs for milestone in milestones_of(stem)],
    }


# --- a judge ----------------------------------------------------------------------------------------------------------


class _NoExercises:
    """Keeps a judge from importing exercises by mistake: whatever is called so on its path is not to be trusted."""

    def find_spec(self, name: str, path=None, target=None):
        if name.partition(".")[0] == "exercises":
            raise ImportError("a judge imports no exercises; they run in a box")


def _judge(connection: Connection, lifeline: Connection, plan: Plan, log: str, work: str, references: str) -> None:
    """A judge's life: one submission after the other, until the batch has no more or has gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tempfile.tempdir = work
    os.environ[REFERENCES] = references
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for fd in (1, 2):
        os.dup2(file, fd)

    def end_with_the_batch() -> None:
        with contextlib.suppress(EOFError, OSError):
            lifeline.recv()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=end_with_the_batch, daemon=True).start()
    sys.meta_path.insert(0, _NoExercises())
    # This process comes from the fork server itself, which is not its child; it runs, and boxes and ranks come from it too.
    from multiprocessing import forkserver

    forkserver._forkserver.ensure_running = lambda: None
    forkserver.ensure_running = lambda: None
    hard, memory = resource.getrlimit(resource.RLIMIT_DATA)[1], psutil.Process().memory_info().data + JUDGE_MEMORY
    resource.setrlimit(resource.RLIMIT_DATA, (memory if hard < 0 else min(memory, hard), hard))
    while (task := connection.recv()) is not None:
        name, path = task
        connection.send(("done", grade_submission(name, path, plan, lambda at: connection.send(("at", at)))))


# --- a batch ----------------------------------------------------------------------------------------------------------


class Display:
    """Shows nothing. What a batch tells its display."""

    def say(self, line: str) -> None: ...

    def begin(self, waiting: int, kept: int, judges: int) -> None: ...

    def at(self, judge: int, name: str, what: str) -> None: ...

    def done(self, judge: int, result: dict) -> None: ...

    def end(self) -> None: ...


class _Judge:
    """A judge as the batch sees it."""

    def __init__(self, number: int, plan: Plan, out: Path):
        self.number, self.plan, self.out = number, plan, out
        self.task: tuple[str, Path] | None = None
        self.since = 0.0
        self._start()

    def _start(self) -> None:
        from shardlab.run.launch import _bare_main

        context = get_context("forkserver")
        self.connection, theirs = context.Pipe()
        self.lifeline, watched = context.Pipe()
        log = self.out / "logs" / f"judge-{self.number}.log"
        work = work_folder(self.out) / f"judge-{self.number}"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        # What needs nobody's exercises is run once for all judges.
        references = os.environ.get(REFERENCES) or str(work.parent / "references")
        self.process = context.Process(target=_judge, args=(theirs, watched, self.plan, str(log), str(work), references))
        with _bare_main():
            self.process.start()
        theirs.close()
        watched.close()

    def give(self, task: tuple[str, Path]) -> None:
        self.task, self.since, self.state = task, time.monotonic(), state_of(task[1])
        self.connection.send(task)

    def again(self) -> None:
        """Another one in its place: it has ended, or does not come back."""
        self.stop()
        self._start()

    def stop(self) -> None:
        self.lifeline.close()
        self.connection.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def work_folder(out: Path) -> Path:
    """Where the judges of this process keep what is gone when it is."""
    return (out / ".work" / f"{platform.node()}-{os.getpid()}").resolve()


def _remove_work(out: Path) -> None:
    """Remove this process's own, and what processes of this machine left that were killed."""
    from shardlab.sandbox.exchange import remove

    for folder in (out / ".work").glob(f"{platform.node()}-*"):
        number = folder.name.rpartition("-")[2]
        mine = folder.name == f"{platform.node()}-{number}"  # and not that of a machine whose name begins like this one's
        if folder == work_folder(out) or (mine and number.isdigit() and not psutil.pid_exists(int(number))):
            remove(folder)
    with contextlib.suppress(OSError):
        (out / ".work").rmdir()


def results_in(out: Path) -> dict[str, dict]:
    """The results in an output folder, by the submissions' names. A file that is damaged counts as not there."""
    found = {}
    for path in sorted((out / "results").glob("*.json")):
        with contextlib.suppress(ValueError, OSError, KeyError, TypeError):
            result = json.loads(path.read_text(encoding="utf-8"))
            if result["format"] == FORMAT:
                found[result["name"]] = result
    return found


def require_same_labs(out: Path, plan: Plan) -> None:
    """A folder holds the grades of one choice of labs: a row for each learner, a column for each task.

    Raises:
        GradingError: there are grades of another one in it.
    """
    other = {tuple(result["labs"]) for result in results_in(out).values()} - {plan.labs}
    if other:
        held, wanted = ", ".join(sorted(other)[0]), ", ".join(plan.labs)
        raise GradingError(f"{out} holds grades of {held}, and you ask for {wanted}. Give those another --out.")


def keep_result(out: Path, result: dict) -> None:
    """Write one result so that it is there whole or not at all."""
    path = out / "results" / f"{submissions.file_name(result['name'])}.json"
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(result, indent=1) + "\n")  # ASCII: a learner's text can hold what UTF-8 cannot
    os.replace(temporary, path)


def is_current(result: dict | None, path: Path, plan: Plan) -> bool:
    """Whether a result is that of this very submission under this very course, so that it need not be graded again."""
    if result is None or not result["whole"] or result["course"] != plan.course or result["labs"] != list(plan.labs):
        return False
    if result["isolation"][0] != plan.isolation[0] or result["source"] != str(path):
        return False
    return result.get("state") == state_of(path)


def state_of(path: Path) -> str:
    """A cheap mark of a submission's state: names, sizes and times of its files."""
    whole = hashlib.sha256()
    try:
        paths = sorted(path.rglob("*")) if path.is_dir() else [path]
    except RecursionError:
        paths = [path]  # deeper than any course
    for each in paths:
        with contextlib.suppress(OSError):
            status = each.lstat()
            whole.update(f"{os.fsencode(each)!r} {status.st_size} {status.st_mtime_ns}\n".encode())
    return whole.hexdigest()[:16]


def judges_that_fit() -> int:
    """How many judges this machine has cores and memory for: two cores each, and what a box and its judge usually take at most."""
    from shardlab import hardware
    from shardlab.sandbox.limits import MEMORY

    return max(1, min(hardware.cpu_cores() // 2, psutil.virtual_memory().available // (MEMORY + 2 * 2**30)))


def grade_all(found: dict[str, Path], out: Path, plan: Plan, *, jobs: int = 1, display: Display | None = None) -> dict[str, dict]:
    """Grade submissions, `jobs` at a time, and keep each result as soon as it is there.

    Args:
        found: submissions by name.
        out: the output folder; current results in it are not made again.
        plan: how.
        jobs: judges.
        display: told of the progress.

    Returns:
        The results by name, of all submissions that have one.
    """
    from shardlab.run.launch import warm_up
    from shardlab.zero import toolchain

    display = display or Display()
    for folder in ("results", "logs"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    there = results_in(out)
    kept = {name: there[name] for name, path in found.items() if is_current(there.get(name), path, plan)}
    waiting = [(name, path) for name, path in found.items() if name not in kept]
    finished = dict(kept)
    if not waiting:
        return finished
    for op in ops_of(plan.labs):  # what cannot be compiled is said by the milestones that need it
        toolchain.why_no_op(op, display.say)
    warm_up()
    jobs = max(1, min(jobs, len(waiting)))
    display.begin(len(waiting), len(kept), jobs)
    judges: list[_Judge] = []

    def take(judge: _Judge, result: dict) -> None:
        name, _ = judge.task
        result |= {"state": judge.state}
        judge.task = None
        keep_result(out, result)
        finished[name] = result
        display.done(judge.number, result)

    try:
        judges += [_Judge(number, plan, out) for number in range(jobs)]
        while waiting or any(judge.task for judge in judges):
            for judge in judges:
                if judge.task is None and waiting:
                    judge.give(waiting.pop(0))
                    display.at(judge.number, judge.task[0], "waiting for a judge")
            for ready in wait([judge.connection for judge in judges if judge.task], timeout=1):
                judge = next(judge for judge in judges if judge.connection is ready)
                try:
                    kind, what = judge.connection.recv()
                except (EOFError, OSError):
                    lost = empty_result(*judge.task, plan) | {"whole": False, "error": "the judge ended while it graded this"}
                    take(judge, _with_reason(lost))
                    judge.again()
                    continue
                if kind == "at":
                    display.at(judge.number, judge.task[0], what)
                else:
                    take(judge, what)
            for judge in judges:
                if judge.task and time.monotonic() - judge.since > plan.seconds + GRACE:
                    lost = empty_result(*judge.task, plan) | {"whole": False, "error": "the judge did not come back and was ended"}
                    take(judge, _with_reason(lost))
                    judge.again()
    finally:
        for judge in judges:
            judge.stop()
        _remove_work(out)
        display.end()
    return finished


def grade_on_cluster(found: dict[str, Path], out: Path, plan: Plan, words: list[str], *, parts: int, display: Display) -> dict:
    """Grade submissions in an array job, whose jobs write into `out`, and wait for it. Ctrl-C cancels it.

    Args:
        found: submissions by name.
        out: the output folder, which all nodes see.
        plan: how, to know which results are current.
        words: the arguments of `shardlab grade` for each job of the array.
        parts: its jobs.
        display: told of the progress.

    Returns:
        The current results by name.

    Raises:
        shardlab.cluster.slurm.SlurmError, shardlab.cluster.batch.BatchError: the job was refused.
    """
    from shardlab.cluster import batch, slurm

    def current() -> dict[str, dict]:
        there = results_in(out)
        return {name: there[name] for name, path in found.items() if is_current(there.get(name), path, plan)}

    for folder in ("results", "logs"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    shown = current()
    waiting = len(found) - len(shown)
    if not waiting:
        return shown
    parts = min(parts, waiting)
    number, _ = batch.submit("class", batch.JobSettings(parts=parts, arguments=words), batch.site_in_use())
    display.begin(waiting, len(shown), parts)
    try:
        while True:
            over = not slurm.command("squeue", "--noheader", "--jobs", str(number)).strip()
            for name, result in current().items():
                if name not in shown:
                    display.done(0, result)
                    shown[name] = result
            if over or len(shown) == len(found):
                return shown
            time.sleep(1)
    except BaseException:
        slurm.cancel(number)
        raise
    finally:
        display.end()


def part_of(found: dict[str, Path], part: str) -> dict[str, Path]:
    """One share of the submissions: "0/3" is every third, from the first.

    Raises:
        GradingError: it is not of that form.
    """
    number, _, parts = part.partition("/")
    if not (number.isdigit() and parts.isdigit() and int(number) < int(parts)):
        raise GradingError(f"--part {part}: it is K/N, with K from 0 to N - 1")
    return {name: found[name] for name in sorted(found)[int(number) :: int(parts)]}


def _with_reason(result: dict) -> dict:
    for milestone in result["milestones"]:
        milestone["message"] = result["error"]
    return result


def forget_the_environment() -> None:
    """Take what is nobody's business out of this process's environment, before the fork server and so every box inherits it.

    A box has no GPU: several are judged at a time, and what they are compared with is the same on the CPU.
    """
    kept = ("PATH", "PYTHONPATH", "HOME", "LANG", "TMPDIR", "TERM", "COLUMNS", "VIRTUAL_ENV")
    kept += ("XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR", "HF_HOME")
    prefixes = ("LC_", "SHARDLAB_", "CUDA_", "NVIDIA_", "TORCH_CUDA_", "LD_LIBRARY_PATH", "SLURM_", "PYTEST_", "CC", "CXX")
    for name in list(os.environ):
        if name == "SLURM_JWT" or (name not in kept and not name.startswith(prefixes)):
            del os.environ[name]
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
