"""One judge: it runs milestones against exercises that are in a box, and imports none of them."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from shardlab.grading import submissions
from shardlab.grading.plan import Plan
from shardlab.grading.results import empty_result
from shardlab.hardware import ROOT
from shardlab.labs import named
from shardlab.milestones.launches import REFERENCES
from shardlab.milestones.markers import files_of

JUDGE_MEMORY = 6 * 2**30
"""Bytes that a judge may take beyond what it begins with."""
MESSAGE = 20_000
"""Letters of a message that are kept."""


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
            # A box per lab: what a hidden milestone handed over must not be there for the next lab to tell.
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


class _NoExercises:
    """Keeps a judge from importing exercises by mistake: whatever is called so on its path is not to be trusted."""

    def find_spec(self, name: str, path=None, target=None):
        if name.partition(".")[0] == "exercises":
            raise ImportError("a judge imports no exercises; they run in a box")


def judge_process(connection: Connection, lifeline: Connection, plan: Plan, log: str, work: str, references: str) -> None:
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
