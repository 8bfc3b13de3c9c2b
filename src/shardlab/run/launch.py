"""Ranks on this machine. This is the only place that starts them.

The ranks are forked from a server that has torch, transformers and deepspeed loaded already, so only the first launch of
a process waits for imports. DeepSpeed settles for a device when it is imported, so on a machine with GPUs there is a server for
ranks on GPUs and one for ranks on the CPU (`placement` says which), each started at its first use. Torch elastic's process
layer (`torch.distributed.elastic.multiprocessing`) starts and watches the ranks. Its agent is left out: it takes over the caller's
signals and knows no time limit, and one machine needs no rendezvous. The store that the ranks meet at is opened here on a port that
the system picks, so launches never collide.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import groupby
from multiprocessing import forkserver
from pathlib import Path

import psutil

from shardlab import hardware, progress, switch
from shardlab.errors import CourseError, UsageError
from shardlab.run.experiment import Experiment
from shardlab.run.live_run import LiveRun
from shardlab.run.placement import Placement, place
from shardlab.run.ranks import rank_main
from shardlab.run.run_folder import Run
from shardlab.zero import ops

PRELOAD = [
    *hardware.HEAVY_MODULES,
    "shardlab.run.cpu_facts",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.ops.adam",
    "transformers.integrations.deepspeed",
    "accelerate.utils.deepspeed",
    "torchmetrics.functional.text",
]


EXACT = {"SHARDLAB_EXACT": "1", "NVIDIA_TF32_OVERRIDE": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""For ranks on GPUs whose losses are compared to 1e-5: no TF32, whatever a container's defaults are, and sums in one order."""

LOST = re.compile(r"gloo|nccl|connection|socket|broken pipe", re.IGNORECASE)
"""What a rank's error says when another one has gone."""


class LaunchError(CourseError, RuntimeError):
    """A launch that did not end well. Its runs' folders say the same."""


class RankError(LaunchError):
    """A rank that raised, or died.

    Attributes:
        rank: which one.
        experiment: the name of the experiment that it was at.
        error: the last line of its traceback, such as `ValueError: …`.
        rank_traceback: all of the traceback; empty if the rank died without one.
    """

    def __init__(self, rank: int, experiment: str, error: str, rank_traceback: str = ""):
        self.rank, self.experiment, self.error, self.rank_traceback = rank, experiment, error, rank_traceback
        super().__init__(f"rank {rank} failed in '{experiment}': {error}\n\n{rank_traceback}".rstrip())


class LaunchTimeout(LaunchError):
    """The launch exceeded its limit; its ranks have been ended.

    Attributes:
        waiting: no rank was computing any more: they waited for one another, or for what never comes.
    """

    def __init__(self, message: str, waiting: bool = False):
        super().__init__(message)
        self.waiting = waiting


PATIENCE = 3
"""So many times its limit a launch may take while its ranks compute: a machine that does other things too is slow, not stuck."""


class _Activity:
    """How much processor time ranks, and what they have started, have used of late."""

    SPAN = 3.0

    def __init__(self, processes):
        self._ranks = []
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended already
                self._ranks.append(psutil.Process(process.pid))
        self._noted: list[tuple[float, float]] = []

    def note(self) -> None:
        now = time.monotonic()
        if self._noted and now - self._noted[-1][0] < 0.5:
            return
        used = 0.0
        for rank in self._ranks:
            with contextlib.suppress(psutil.Error):
                for process in (rank, *rank.children(recursive=True)):
                    used += sum(process.cpu_times()[:2])
        self._noted = [*(noted for noted in self._noted if now - noted[0] <= self.SPAN), (now, used)]

    @property
    def computing(self) -> bool:
        (since, before), (now, used) = self._noted[0], self._noted[-1]
        return now - since < 1 or (used - before) / (now - since) > 0.05


_servers: dict[str, forkserver.ForkServer] = {}
"""The fork servers by device; the one of this process's own device is the standard library's."""


def warm_up(device: str | None = None) -> None:
    """Start the fork server, so that it imports while the caller does something else. Calling it again is free.

    Args:
        device: `cuda` or `cpu`, what its ranks compute on; by default what this process does.
    """
    own = hardware.device()
    variables = ops.environment(own)
    variables.pop("CUDA_VISIBLE_DEVICES", None)  # the server gets it; here it would look like somebody's choice
    os.environ.update(variables)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    device = device or own
    if device not in _servers:
        taken = device != own or forkserver._forkserver in _servers.values()
        _servers[device] = forkserver.ForkServer() if taken else forkserver._forkserver
    server = _servers[device]
    # A site without network must not wait for the hub; real loading code still asks it unless this is set.
    server.set_forkserver_preload(PRELOAD)
    # Ranks are told which exercises they run. What else comes from the server, such as judges, must not get those of this moment.
    with _environment(ops.environment(device) | {switch.VARIABLE: None}):
        server.ensure_running()


@contextlib.contextmanager
def _environment(variables: dict[str, str | None]):
    """Have these variables in the environment meanwhile, and those without a value not: the fork server inherits it."""

    def put(values: dict[str, str | None]) -> None:
        for name, value in values.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    before = {name: os.environ.get(name) for name in variables}
    put(variables)
    try:
        yield
    finally:
        put(before)


@contextlib.contextmanager
def _forked_for(device: str):
    """Have the standard library ask the device's server for new processes meanwhile; it knows only one."""
    if device not in _servers:  # ranks are forked from this process itself
        yield
        return
    asked, forkserver.connect_to_new_process = forkserver.connect_to_new_process, _servers[device].connect_to_new_process
    try:
        yield
    finally:
        forkserver.connect_to_new_process = asked


def launch(
    experiments: Experiment | list[Experiment],
    *,
    runs: Path | str = "runs",
    timeout: float | None = None,
    display: progress.Quiet | None = None,
    or_cpu: bool = False,
    largest: int | None = None,
    exact: bool = False,
    start_method: str = "forkserver",
) -> list[Run]:
    """Run experiments on this machine, one after the other; those with equal `ranks` share their processes.

    Args:
        experiments: what to run.
        runs: the folder in which each run gets its own.
        timeout: seconds for all of it; compiling ops does not count. While ranks compute, it may be three times as much.
        display: how progress is shown; by default bars in a terminal and a table in a notebook.
        or_cpu: these runs check something, so where GPUs are too few for the ranks of any of them, all of them run on the CPU. By
            default they measure, and are refused there.
        largest: ranks of the largest run that these are compared with, if it is in another launch; where those ranks run, these do.
        exact: losses will be compared to 1e-5, so ranks on GPUs compute without TF32 and with deterministic kernels, at some cost.
        start_method: "fork" where this process is warm itself and has computed nothing yet, as in a box of the grading.

    Returns:
        The runs, finished, in the order of the experiments.

    Raises:
        RankError: a rank raised or died. The other ranks have been ended.
        LaunchTimeout: the limit was exceeded.
        KeyboardInterrupt: the ranks have been ended, the folders say *interrupted*, and the message says what they hold.
        TooFewGpus: there are GPUs here, and too few of them.
        ValueError: two experiments with the same name.
    """
    experiments = [experiments] if isinstance(experiments, Experiment) else list(experiments)
    names = [experiment.name for experiment in experiments]
    if len(set(names)) < len(names):
        raise UsageError(f"experiments need names of their own, to have folders of their own: {', '.join(names)}")
    display = progress.default_display() if display is None else display
    where = place(max([largest or 1, *(experiment.ranks for experiment in experiments)]), or_cpu=or_cpu)
    if where.note:
        display.say(where.note)
    if start_method == "forkserver":
        warm_up(where.device)
    else:
        os.environ.update(ops.environment())
    needed = dict.fromkeys(op for experiment in experiments for op in ops.needed_by(experiment.deepspeed, where.device))
    ops.build_all(needed, display.say, where.device)

    folder = Path(runs).resolve()
    all_runs: list[Run] = []
    try:
        for experiment in experiments:
            all_runs.append(Run.create(experiment, folder, where.device))
    except BaseException as error:
        _mark_unfinished(all_runs, error)
        raise
    deadline = None if timeout is None else time.monotonic() + timeout
    live, results = [LiveRun(run) for run in all_runs], {}

    def rows() -> list[progress.Row]:
        return [run.row() for run in live]

    try:
        for ranks, group in groupby(all_runs, key=lambda run: run.experiment.ranks):
            results |= _launch_group(
                list(group), ranks, where, exact, deadline, timeout, lambda: display.update(rows), start_method
            )
    except KeyboardInterrupt as error:
        _mark_unfinished(all_runs, error)
        raise KeyboardInterrupt(_what_is_kept(all_runs)) from None
    except BaseException as error:
        _mark_unfinished(all_runs, error)
        raise
    finally:
        display.end(rows)
    finished = [Run.read(run.folder) for run in all_runs]
    for run in finished:
        run.confirm(results[run.name])
    return finished


def launch_each(experiments: list[Experiment], *, runs: Path | str = "runs", **how) -> list[Run]:
    """Run experiments as `launch` does, but one that fails does not end those after it: they are launched anew.

    Args:
        experiments, runs: as of `launch`.
        how: its other arguments; the time limit is that of each launch.

    Returns:
        All runs, in the order of the experiments. The folder of one that failed says so, with its reason.

    Raises:
        TooFewGpus: there are GPUs here, and too few of them.
        KeyboardInterrupt: as of `launch`.
    """
    waiting, folder = list(experiments), Path(runs).resolve()
    while waiting:
        try:
            launch(waiting, runs=folder, **how)
            break
        except LaunchError:
            waiting = [experiment for experiment in waiting if Run.read(folder / experiment.name).outcome == "not run"]
    return [Run.read(folder / experiment.name) for experiment in experiments]


def _what_is_kept(runs: list[Run]) -> str:
    held = [
        f"{run.folder} has {len(steps)} step{'s' * (len(steps) > 1)}" for run in runs if (steps := Run.read(run.folder).metrics())
    ]
    return f"interrupted; the ranks have been ended. {'; '.join(held) or 'No run had taken a step'}."


def _mark_unfinished(runs: list[Run], error: BaseException) -> None:
    outcome, reason = "failed", str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        outcome, reason = "interrupted", "interrupted by the user"
    elif isinstance(error, LaunchTimeout):
        outcome = "timed out"
    first = True
    for run in [Run.read(run.folder) for run in runs]:
        if run.record_json["outcome"] == "running" or (run.record_json["outcome"] == "waiting" and first):
            run.finish(outcome, reason)
            first = False
        elif run.record_json["outcome"] == "waiting":
            run.finish("not run", f"an earlier run of the same launch did not finish: {reason}")


def _launch_group(
    runs: list[Run],
    ranks: int,
    where: Placement,
    exact: bool,
    deadline: float | None,
    timeout: float | None,
    tick: Callable[[], None],
    start_method: str,
) -> dict[str, dict]:
    """Run experiments that share their ranks; what rank 0's programs returned, by name. `tick` is called while they run."""
    import torch.distributed as dist
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std, start_processes

    # They warn of each rank that they end, next to the error that says why.
    for module in ("torch.distributed.elastic.multiprocessing.api", "torch.multiprocessing.spawn"):
        logging.getLogger(module).setLevel(logging.CRITICAL)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    logs = Path(tempfile.mkdtemp(prefix="shardlab-launch-"))
    threads = max(1, hardware.cpu_cores() // ranks)
    shared = (
        os.environ.copy()
        | ops.environment(where.device)
        | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "OMP_NUM_THREADS": str(threads),
            switch.VARIABLE: str(switch.exercises_folder()),
        }
    )
    if where.device == "cpu":
        shared["GLOO_SOCKET_IFNAME"] = "lo"
        shared["LOCAL_SIZE"] = str(ranks)
    elif exact:
        shared |= EXACT
    envs = {rank: shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)}
    job = ([str(run.folder) for run in runs], str(logs), os.getpid())
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)}
    context = None
    try:
        with _bare_main(), _forked_for(where.device):
            context = start_processes(
                "rank",
                rank_main,
                {rank: job for rank in range(ranks)},
                envs,
                DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL),
                start_method=start_method,
            )
        _restore(handlers)
        activity = _Activity(context._pc.processes)
        while True:
            result = context.wait(0)
            activity.note()
            tick()
            if result is not None:
                break
            # A rank waits for the others before it goes, so one that has gone with status 0 has not come to its end.
            gone = [rank for rank, process in enumerate(context._pc.processes) if process.exitcode == 0]
            if gone and context.wait(0) is None:
                raise RankError(gone[0], _current(runs).name, "the process ended with exit status 0 before its program was over")
            if deadline is not None and (late := time.monotonic() - deadline) > 0:
                if not activity.computing:
                    why = "its ranks wait, and none computes"
                    raise LaunchTimeout(f"the launch exceeded its limit of {timeout:g} s and was ended: {why}", waiting=True)
                if late > (PATIENCE - 1) * timeout:
                    why = f"its ranks still compute after {PATIENCE * timeout:g} s"
                    raise LaunchTimeout(f"the launch exceeded its limit of {timeout:g} s and was ended: {why}")
            time.sleep(0.05)
        if result.is_failed():
            raise _first_error(result, logs, runs, [process.exitcode for process in context._pc.processes])
        return result.return_values[0]
    except BaseException:
        if context is not None:
            _end(context)
        for run in runs:
            for log in sorted(logs.glob("**/std*.log")):
                if log.stat().st_size:
                    shutil.copy(log, run.folder / f"rank{log.parent.name}.{log.stem}.log")
        raise
    finally:
        _restore(handlers)
        shutil.rmtree(logs, ignore_errors=True)


def _end(context) -> None:
    """Kill the ranks and what they have started: a data loader's workers would outlive them."""
    context.close(signal.SIGKILL, timeout=5)
    for process in context._pc.processes:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # each rank leads a process group of its own
        except ProcessLookupError:
            continue


def _restore(handlers: dict) -> None:
    """Elastic installs its own signal handlers, in the main thread only; give the caller's back."""
    import threading

    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)


class _bare_main:
    """While ranks start, hide `__main__`'s file, so that a rank does not import the caller's script a second time."""

    def __enter__(self):
        main = sys.modules["__main__"]
        self.saved = {name: main.__dict__.pop(name) for name in ("__file__", "__spec__") if name in main.__dict__}
        main.__spec__ = None

    def __exit__(self, *_):
        vars(sys.modules["__main__"]).update(self.saved)


def _first_error(result, logs: Path, runs: list[Run], codes: list[int | None]) -> RankError:
    """The error that came first: a rank that dies often makes the others fail in their next collective."""
    reports = sorted((json.loads(path.read_text()) for path in logs.glob("error-*.json")), key=lambda report: report["time"])
    # A rank that was killed reports nothing, and the others then report that they have lost it. (SIGTERM is elastic's own.)
    told = {report["rank"] for report in reports}
    silent = [rank for rank, code in enumerate(codes) if code not in (None, 0, -signal.SIGTERM) and rank not in told]
    if reports and not (silent and LOST.search(reports[0]["error"])):
        first = reports[0]
        return RankError(first["rank"], first["experiment"], first["error"], first["traceback"])
    rank = silent[0] if silent else min(result.failures)
    code = codes[rank] if silent else result.failures[rank].exitcode
    at = _current(runs)
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
    hint = " (out of memory, perhaps)" if code == -signal.SIGKILL else ""
    output = "\n".join(log.read_text(errors="replace") for log in logs.glob(f"**/{rank}/stderr.log"))
    if code in (-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS):
        # A library in C says why, and ends the process; then Python prints where it was.
        said = [line.strip() for line in output.partition("Fatal Python error")[0].splitlines() if line.strip()]
        hint = f"; it said last: {said[-1][:200]}" if said else ""
    return RankError(rank, at.name, f"the process was {how}{hint}", output[-2000:])


def _current(runs: list[Run]) -> Run:
    """The run that the ranks are at."""
    return next((run for run in map(lambda run: Run.read(run.folder), runs) if run.outcome in ("running", "waiting")), runs[-1])
