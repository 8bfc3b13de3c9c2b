"""What all tests share."""

import os
import re
import shutil
import signal
import subprocess
import tempfile

import psutil
import pytest

from shardlab import hardware, switch
from shardlab.labs import catalogue, named
from shardlab.milestones.launches import REFERENCES
from shardlab.milestones.markers import ops_of
from shardlab.sandbox import boxes
from shardlab.zero import toolchain

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Threads of OpenMP spin while they wait for one another: two processes with two each on two cores took nine times as long.
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // int(workers)))
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As it is in what a shell's `&` has started, and in all that it starts: nobody could try Ctrl-C there.
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["SHARDLAB_TESTS"] = str(os.getpid())
"""Tells what these tests have started from what others have, whose processes are nobody's business here."""


@pytest.fixture(autouse=True)
def same_exercises_afterwards(monkeypatch):
    """A test that switches the exercises switches for itself alone."""
    before = os.environ.get(switch.VARIABLE)
    yield
    if before is None:
        os.environ.pop(switch.VARIABLE, None)
    else:
        os.environ[switch.VARIABLE] = before


@pytest.fixture(autouse=True, scope="session")
def references(tmp_path_factory):
    """What milestones compare with needs nobody's exercises: it is made once for matrix, notebooks and classes."""
    base = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(REFERENCES, str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "references"))
        yield


@pytest.fixture(autouse=True, scope="session")
def no_rank_outlives_the_tests():
    """The fork server, this process's own child, may stay until it ends; the ranks below it may not."""
    yield
    below = [process for process in psutil.Process().children(recursive=True) if process.ppid() != os.getpid()]
    left = [process for process in below if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not left, f"ranks left behind: {left}"


REQUIRED = set(filter(None, os.environ.get("SHARDLAB_REQUIRE", "").split(",")))
"""What has to be here: where CI says so, nothing that needs it may be skipped or *not run*."""
MAY_BE_SKIPPED = re.compile(r"GPU|SHARDLAB_SQUAD|about root|share this machine's network")
"""Reasons to skip that are nobody's fault where everything is required."""


def what_is_absent() -> dict[str, str]:
    """Of what `SHARDLAB_REQUIRE` can name, what is not here, and why."""
    libaio = toolchain.check_libaio()
    found = {
        "boxes": "" if boxes.isolation()[0] == "bubblewrap" else boxes.isolation()[1],
        "slurm": cluster_missing() or "",
        "libaio": "" if libaio.state == "works" else libaio.detail,
        "shellcheck": "" if shutil.which("shellcheck") else "shellcheck is not installed: apt-get install shellcheck",
    }
    return {name: why for name, why in found.items() if why}


def pytest_sessionstart(session):
    if unknown := REQUIRED - {"boxes", "slurm", "libaio", "shellcheck"}:
        pytest.exit(f"SHARDLAB_REQUIRE names {', '.join(unknown)}; it can name boxes, slurm, libaio, shellcheck", returncode=2)
    absent = {name: why for name, why in what_is_absent().items() if name in REQUIRED} if REQUIRED else {}
    if absent:
        pytest.exit("; ".join(f"{name} is required here, and: {why}" for name, why in absent.items()), returncode=1)


def pytest_collection_modifyitems(items):
    """What takes long comes first, so that at the end of `pytest -n 2` no process is alone with it."""

    def rank(item) -> int:
        marks = {mark.name for mark in item.iter_markers()}
        is_notebook = item.path.suffix == ".ipynb" or item.path.stem == "test_notebooks"
        # A class in boxes is the largest group; notebooks, a minute or two each, fill what is left beside it.
        slow_first = ("jobs" in marks, "ranks" in marks and not is_notebook, "boxes" in marks, is_notebook, True)
        return slow_first.index(True)

    items.sort(key=rank)


def pytest_xdist_make_scheduler(config, log):
    """Groups for `pytest -n 2`: all that needs Slurm in one process, which mostly waits for jobs while the other computes.

    Else a module is a group, as its tests share what was made for them; a lab's matrix, notebook or box is one.
    """
    from xdist.scheduler import LoadScopeScheduling

    with_jobs = "|".join(lab.stem for lab in catalogue() if lab.has_jobs)

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, lab = nodeid.partition("::")[0], re.search(r"\[(lab\d+_\w+)", nodeid)
            if "test_slurm" in file or re.search(rf"\[({with_jobs})", nodeid):
                return "jobs"
            return f"{file} {lab[1] if lab else ''}"

    return ByGroup(config, log)


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if REQUIRED and report.skipped and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        if not MAY_BE_SKIPPED.search(reason):
            report.outcome, report.longrepr = "failed", f"skipped, where nothing may be (SHARDLAB_REQUIRE): {reason}"
    return report


def every_lab() -> list:
    """Parameters, a lab each; those whose milestones submit jobs are marked so."""
    return [pytest.param(lab.stem, marks=pytest.mark.jobs if lab.has_jobs else ()) for lab in catalogue()]


def everything_must_run() -> bool:
    """Whether no milestone may be *not run* here."""
    return {"slurm", "libaio"} <= REQUIRED


@pytest.fixture
def may_get(stem, request) -> set[str]:
    """What the solutions of the lab `stem` may get here: *not run* only where something is absent, and may be. Its Slurm is up."""
    slurm_here = not named(stem).has_jobs or request.getfixturevalue("slurm_where_possible")
    libaio_here = "async_io" not in ops_of([stem]) or toolchain.check_libaio().state == "works"
    return {"passed"} if everything_must_run() or (slurm_here and libaio_here) else {"passed", "not run"}


def cluster_missing() -> str | None:
    """What keeps a local Slurm cluster from starting here; None if nothing does."""
    absent = [
        command
        for command in ("slurmctld", "slurmd", "munged")
        if not shutil.which(command, path=os.environ["PATH"] + ":/usr/sbin")
    ]
    return f"{', '.join(absent)} not installed: apt-get install slurm-wlm munge" if absent else None


def cluster_command(*words: str) -> str:
    """Run `slurm/local_cluster.sh`; what it printed."""
    done = subprocess.run([hardware.ROOT / "slurm" / "local_cluster.sh", *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def slurm_where_possible():
    """A real Slurm of two nodes for the whole session, beside any other that is up; None where its packages are missing."""
    if cluster_missing():
        yield None
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHARDLAB_CLUSTER", tempfile.mkdtemp(prefix="shardlab-test-"))
        patch.delenv("SLURM_CONF", raising=False)
        cluster_command("up")
        try:
            yield "up"
        finally:
            cluster_command("down")


@pytest.fixture(scope="session")
def slurm_cluster(slurm_where_possible):
    """The same, for tests that are not run without it."""
    if slurm_where_possible is None:
        pytest.skip(cluster_missing())
