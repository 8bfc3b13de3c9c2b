"""Asking Slurm: which one is there, submit a script, what a job is doing, follow it to its end."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shardlab import progress
from shardlab.errors import CourseError
from shardlab.hardware import ROOT

LOCAL_CLUSTER = "local_cluster.sh"
START_ONE = f"{ROOT / 'slurm' / 'local_cluster.sh'} up"
PENDING, RUNNING = (
    {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"},
    {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED"},
)


UNHEARD = re.compile("timed out|did not answer|Unable to contact slurm controller|Zero Bytes")
"""What Slurm's commands say where the controller is too busy to answer, or is just being started anew."""
PATIENCE = 60
"""Seconds for which a question is asked again until the controller answers."""


class SlurmError(CourseError, RuntimeError):
    """Slurm is not there, or refused; the message holds what it said."""


def local_state() -> Path:
    """The folder of the cluster that `slurm/local_cluster.sh` starts."""
    return Path(os.environ.get("SHARDLAB_CLUSTER", f"/tmp/shardlab-cluster-{os.getuid()}"))


def environment() -> dict[str, str]:
    """The variables for Slurm's commands. The machine's own Slurm is used where there is one, else the local cluster that is up."""
    configuration = local_state() / "slurm.conf"
    if "SLURM_CONF" in os.environ or Path("/etc/slurm/slurm.conf").exists() or not configuration.exists():
        return dict(os.environ)
    return os.environ | {"SLURM_CONF": str(configuration)}


_elsewhere: Callable[..., str] | None = None
_none_there: Callable[[], str] = str


@contextlib.contextmanager
def elsewhere(run: Callable[..., str], none_there: Callable[[], str]):
    """Let Slurm's commands be those next to a local cluster that this process does not see.

    Args:
        run: called as `command` is, without `cwd`; also with `local_cluster.sh` and its arguments.
        none_there: says why there can be no such cluster; nothing if there can.
    """
    global _elsewhere, _none_there
    _elsewhere, _none_there = run, none_there
    try:
        yield
    finally:
        _elsewhere, _none_there = None, str


def is_elsewhere() -> bool:
    return _elsewhere is not None


def is_local() -> bool:
    """Whether the Slurm in use is the one that `slurm/local_cluster.sh` started."""
    return _elsewhere is not None or environment().get("SLURM_CONF") == str(local_state() / "slurm.conf")


def command(*words: str, seconds: float = 30, text: str | None = None, cwd: Path | None = None) -> str:
    """What one of Slurm's commands prints.

    Raises:
        SlurmError: it is not installed, it failed, or it did not answer.
    """
    if _elsewhere is not None:
        return _elsewhere(*words, seconds=seconds, text=text)
    if not shutil.which(words[0]):
        raise SlurmError(
            f"there is no {words[0]} here: Slurm is not installed "
            f"(Debian, Ubuntu: sudo apt-get install slurm-wlm munge; then {START_ONE})"
        )
    # A job's own variables would become options of what is submitted from within it.
    variables = {
        key: value for key, value in environment().items() if not key.startswith(("SLURM_", "SBATCH_")) or key == "SLURM_CONF"
    }
    try:
        done = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=seconds, input=text, cwd=cwd)
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{words[0]} did not answer within {seconds:g} s") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        raise SlurmError(re.sub(rf"^{words[0]}: (error|fatal): ", "", said[-1] if words[0] != "sbatch" else said[0]))
    return done.stdout


def ask(*words: str) -> str:
    """As `command`, for what changes nothing: where the controller does not answer, it is asked again for `PATIENCE` seconds.

    Raises:
        SlurmError: as `command`.
    """
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return command(*words)
        except SlurmError as error:
            if not UNHEARD.search(str(error)) or time.monotonic() > until:
                raise
        time.sleep(1)


def local_cluster(*words: str) -> str:
    """Run `slurm/local_cluster.sh`; what it prints.

    Raises:
        SlurmError: it failed; the message is its last line.
    """
    if _elsewhere is not None:
        return _elsewhere(LOCAL_CLUSTER, *words, seconds=90)
    script = ROOT / "slurm" / LOCAL_CLUSTER
    try:
        done = subprocess.run([script, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=90)
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{LOCAL_CLUSTER} {' '.join(words)} did not end within 90 s") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
        raise SlurmError(said[-1])
    return done.stdout


def missing() -> str | None:
    """Why no job can be submitted from here, with the remedy; None if one can."""
    if _elsewhere is not None:
        return _none_there() or None
    try:
        command("scontrol", "ping", seconds=10)
    except SlurmError as error:
        if shutil.which("scontrol"):
            return f"no Slurm answers ({error}); to start one on this machine: {START_ONE}"
        return str(error)
    return None


def hostnames(nodelist: str) -> list[str]:
    """The nodes of a list such as node[1-3,7], as Slurm itself expands it. No cluster needs to run."""
    variables = environment()
    if "SLURM_CONF" not in variables and not Path("/etc/slurm/slurm.conf").exists():
        # scontrol reads a configuration before it does anything.
        import tempfile

        with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
            file.write("ClusterName=none\nSlurmctldHost=localhost\nNodeName=localhost\nPartitionName=none Nodes=ALL\n")
            file.flush()
            return _hostnames(nodelist, variables | {"SLURM_CONF": file.name})
    return _hostnames(nodelist, variables)


def _hostnames(nodelist: str, variables: dict[str, str]) -> list[str]:
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", nodelist], env=variables, capture_output=True, text=True, timeout=10
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        raise SlurmError("scontrol is not here, or does not answer") from None
    if done.returncode or done.stderr.strip():
        raise SlurmError(done.stderr.strip() or f"scontrol refuses {nodelist!r}")
    return done.stdout.split()


def submit(script: str, *arguments: str, test_only: bool = False, cwd: Path | None = None) -> int | None:
    """Give Slurm a script.

    Args:
        script: its text.
        arguments: options of `sbatch`, which win over those in the script.
        test_only: only let Slurm look whether it could run.
        cwd: where the job begins; the course's folder by default.

    Returns:
        The job's number; None with `test_only`.

    Raises:
        SlurmError: it was refused; the message is Slurm's.
    """
    options = ["--test-only"] if test_only else ["--parsable"]
    printed = command("sbatch", *options, *arguments, text=script, cwd=cwd or ROOT)
    return None if test_only else int(printed.split(";")[0])


@dataclass(frozen=True)
class Job:
    """What Slurm says of a job.

    Attributes:
        number: its number; of one task of an array, the array's and the task's, such as 12_3.
        name: as in `squeue`.
        state: PENDING, RUNNING, COMPLETED, FAILED, TIMEOUT, CANCELLED, NODE_FAIL …
        reason: why it waits, or failed; empty if there is no reason.
        nodes: the nodes that it has, or had.
        restarts: how often it was requeued.
        log: the file that its output goes to.
    """

    number: str
    name: str
    state: str
    reason: str
    nodes: str
    restarts: int
    log: Path

    @property
    def is_over(self) -> bool:
        return self.state not in PENDING | RUNNING


def job(number: int | str) -> Job:
    """What Slurm says of a job that waits, runs, or has ended a while ago.

    Raises:
        SlurmError: Slurm does not know it, or not any more.
    """
    line = ask("scontrol", "--oneliner", "show", "job", str(number)).splitlines()[0]

    def value(key: str) -> str:
        found = re.search(rf"(?:^| ){key}=(.*?)(?= [A-Za-z/:]+=|$)", line)
        return found[1].strip() if found else ""

    task = f"_{value('ArrayTaskId')}" if value("ArrayTaskId") else ""
    said = value("Reason")
    return Job(
        number=(value("ArrayJobId") if task else value("JobId")) + task,
        name=value("JobName"),
        state=value("JobState"),
        reason="" if said == "None" else said,
        nodes="" if value("NodeList") == "(null)" else value("NodeList"),
        restarts=int(value("Restarts") or 0),
        log=Path(value("StdOut")),
    )


def cancel(number: int | str) -> None:
    """End a job."""
    command("scancel", str(number))


def follow(
    number: int | str, run_folder: Path | None = None, *, limit: float | None = None, display: progress.Quiet | None = None
) -> Job:
    """Wait until a job is over, and show what it does: first its state in the queue, then the steps and losses of its run folder.

    Ctrl-C ends the following, not the job.

    Args:
        number: the job.
        run_folder: the one that the job will write.
        limit: seconds after which to stop waiting.
        display: where it is shown; by default what fits where this process's output goes.

    Returns:
        The job, as it was last.
    """
    from shardlab.run.live_run import LiveRun
    from shardlab.run.run_folder import Run

    display = progress.default_display() if display is None else display
    started, run = time.monotonic(), None

    def rows() -> list[progress.Row]:
        facts = {
            "reason": now.reason,
            "nodes": now.nodes,
            "started again": f"{now.restarts} ×" if now.restarts else "",
            "since": f"{time.monotonic() - started:.0f} s",
        }
        trained = run.row() if run else None
        counted = {"done": trained.done, "total": trained.total} if trained else {}
        facts |= trained.facts if trained else {}
        return [progress.Row(f"job {now.number}", now.state, facts, **counted, over=now.is_over)]

    now = job(number)
    try:
        while True:
            if run is None and run_folder is not None and (run_folder / "run.json").exists():
                run = LiveRun(Run.read(run_folder))
            display.update(rows)
            if now.is_over or (limit is not None and time.monotonic() - started > limit):
                return now
            time.sleep(0.5)
            now = job(number)
    finally:
        display.end(rows)


def log_tail(number: int | str, lines: int = 20) -> str:
    """The last lines of a job's output."""
    path = job(number).log
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else f"{path} is not there yet"
