"""What happens on a rank around an experiment's program, whoever has started it: `launch`, torchrun, deepspeed or srun."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import psutil

from shardlab import hardware, switch
from shardlab.run import tampering
from shardlab.run.experiment import Experiment, program_of
from shardlab.run.placement import TooFewGpus, place
from shardlab.run.run_folder import Run, before_it
from shardlab.zero import ops


def rank_main(folders: list[str], logs: str, launcher: int) -> dict[str, dict]:
    os.setpgid(0, 0)
    die_with_the_launcher(launcher)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher gets Ctrl-C, and ends the ranks
    rank, name, results = int(os.environ["RANK"]), "", {}
    try:
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        switch.use_exercises(os.environ[switch.VARIABLE])
        for folder in folders:
            run = Run.read(folder)
            name = run.name
            results[name] = run_experiment(run)
    except BaseException as error:
        lines = [line for line in traceback.format_exception(error)]
        report = {
            "time": time.time(),
            "rank": rank,
            "experiment": name,
            "traceback": "".join(lines),
            "error": traceback.format_exception_only(error)[-1].strip(),
        }
        temporary = Path(logs, f".error-{rank}")
        temporary.write_text(json.dumps(report))
        temporary.rename(Path(logs, f"error-{rank}.json"))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    leave_process_group()
    return results


def leave_process_group() -> None:
    """For the end of a program on ranks: where one just ends, NCCL on the others prints a stack trace of the lost connection."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def die_with_the_launcher(launcher: int) -> None:
    """Ask the kernel to end this rank when its parent, the fork server, ends; that one ends with the launcher.

    The fork server ends when nobody holds the other end of a pipe of its any more. Each rank gets that end too, so it must
    let go of it, or ranks and server keep each other alive.
    """
    import ctypes

    if (alive := forkserver._forkserver._forkserver_alive_fd) is not None:
        with contextlib.suppress(OSError):
            os.close(alive)

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
    # The launcher may have died before the call above.
    if os.getppid() == 1 or not psutil.pid_exists(launcher):
        os._exit(1)


def run_experiment(run: Run) -> dict:
    """Run one experiment's program on this rank, with the environment and the singletons of a fresh process; its results."""
    from shardlab.run.checkpoints import Stopped
    from shardlab.run.collectives import barrier, rank
    from shardlab.run.samplers import MemorySampler
    from shardlab.run.training import prepare_process

    experiment = run.experiment
    before = os.environ.copy()
    # A lone rank without DeepSpeed is a plain process: with RANK set, Trainer would wrap the model in DDP.
    plain = experiment.ranks == 1 and experiment.deepspeed is None
    if plain:
        for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(variable, None)
    try:
        prepare_process(experiment)
        program = program_of(experiment.program)
        noted = tampering.snapshot() if os.environ.get(tampering.WATCHED) else None
        require_unchanged = tampering.require_unchanged
        local_rank, local_ranks = int(before.get("LOCAL_RANK", "0")), int(before.get("LOCAL_WORLD_SIZE", experiment.ranks))
        # Appending from two hosts to one file of a network file system loses lines.
        samples = run.folder / ("memory.csv" if local_ranks == experiment.ranks else f"memory.{socket.gethostname()}.csv")
        if local_rank == 0 and not samples.exists():
            MemorySampler.write_header(samples)
        if rank() == 0:
            run.start()
        barrier()
        results = {}
        try:
            sampler = MemorySampler(samples, rank(), local_rank if hardware.gpu_count() else None)
            with sampler, _one_gpu_in_sight() if plain else contextlib.nullcontext():
                results = program(experiment, run)
            if noted is not None:
                require_unchanged(noted)
        except Stopped as stopped:
            if rank() == 0:
                run.finish("stopped", str(stopped))
            return {}
        if rank() == 0:
            run.record(**(results or {}))
            run.finish()
        return run.results
    finally:
        os.environ.clear()
        os.environ.update(before)


def _one_gpu_in_sight():
    """A plain process in which `Trainer` sees several GPUs takes them all, through DataParallel, and makes its batches larger."""
    import torch

    return mock.patch.object(torch.cuda, "device_count", lambda: min(1, hardware.gpu_count()))


def _local_ranks() -> int:
    """Ranks that a launcher has started on this machine: torchrun tells, and the deepspeed launcher in a variable of its own."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def run_under_launcher(experiment: Experiment, runs: Path | str, *, resume: bool = False) -> Run:
    """Run one experiment in a process that `deepspeed`, `torchrun` or `srun` has started as one of its ranks.

    Every rank calls this. What goes wrong on a rank is in the run folder before the error goes on.

    Args:
        experiment: what to run; its `ranks` are those that the launcher has started.
        runs: the folder in which the run has its own.
        resume: continue the run of that name from its newest whole checkpoint, if there is such a run. Its first life must be
            over, as that of a job is that Slurm starts again.

    Returns:
        The finished run, on every rank.
    """
    try:
        where = place(_local_ranks(), or_cpu=False)
    except TooFewGpus as error:
        # Each rank comes here, and one sentence is enough.
        raise SystemExit(str(error) if os.environ.get("LOCAL_RANK", "0") == "0" else 1) from None
    os.environ.update(ops.environment(where.device))
    end_with_the_command()
    # deepspeed 0.19.8 calls functions that torch 2.13 is about to rename, on every rank and in every step: a log of nothing else.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import torch

    from shardlab.run.collectives import barrier, rank
    from shardlab.run.training import prepare_process

    if "OMP_NUM_THREADS" not in os.environ:
        # The deepspeed launcher leaves it alone: each rank would take all cores, and its threads wait for those of the others.
        torch.set_num_threads(max(1, hardware.cpu_cores() // _local_ranks()))
    for op in ops.needed_by(experiment.deepspeed):
        ops.build(op, print)
    if experiment.deepspeed is not None:
        import shardlab.run.cpu_facts  # noqa: F401  # before DeepSpeed asks about the processor, again and again
    try:
        prepare_process(experiment)
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise SystemExit(
            f"Port {os.environ.get('MASTER_PORT')} of this machine is taken, by another run perhaps. Give this one a port of its "
            "own: --master_port 29501 after `deepspeed`, --master-port 29501 after `torchrun`."
        ) from None
    if rank() == 0:
        folder = Path(runs).resolve() / experiment.name
        goes_on = resume and (folder / "run.json").exists()
        if not goes_on and (folder / "checkpoints").exists():
            print(
                f"{folder} has the checkpoints of an earlier run. It goes to {before_it(folder)}; --resume would have continued it."
            )
        (Run.reopen if goes_on else Run.create)(experiment, Path(runs).resolve())
    barrier()
    run = Run.read(Path(runs).resolve() / experiment.name)
    try:
        with _shown(run) if rank() == 0 else contextlib.nullcontext():
            run_experiment(run)
    except BaseException as error:
        if Run.read(run.folder).record_json["outcome"] in ("waiting", "running"):
            run.finish("failed", f"rank {rank()}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        raise
    barrier()
    return Run.read(run.folder)


@contextlib.contextmanager
def _shown(run: Run) -> Iterator[None]:
    """Meanwhile, show how far the run is: a bar in a terminal, lines in a log file."""
    from shardlab.progress import default_display
    from shardlab.run.live_run import LiveRun

    display, live, over = default_display(), LiveRun(run), threading.Event()

    def watch() -> None:
        while not over.wait(0.3):
            display.update(lambda: [live.row()])

    watching = threading.Thread(target=watch, daemon=True, name="show the run")
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()
        display.end(lambda: [live.row()])


def end_with_the_command() -> None:
    """End the ranks that `deepspeed` has started when that command itself is ended.

    On one machine it starts a second process, which starts the ranks; it passes no signal on to it (deepspeed 0.19.8, `runner.py`),
    so that `kill` of the command alone leaves all others at work. Under another launcher this does nothing.
    """
    starter = psutil.Process(os.getppid())
    if "deepspeed.launcher.launch" not in starter.cmdline():
        return
    command = starter.ppid()

    def watch() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            while starter.ppid() == command:
                time.sleep(1)
            starter.terminate()  # it ends the ranks

    threading.Thread(target=watch, daemon=True, name="end with the command").start()


def main(arguments: list[str]) -> int:
    """`python -m shardlab.run.ranks EXPERIMENT.json RUNS` under torchrun, deepspeed or srun: one rank of that experiment.

    It continues from the newest checkpoint, if the run is there already.
    """
    if len(arguments) != 2 or "RANK" not in os.environ:
        print("usage: torchrun … -m shardlab.run.ranks EXPERIMENT.json RUNS", file=sys.stderr)
        return 2
    experiment = Experiment.model_validate_json(Path(arguments[0]).read_text())
    run_under_launcher(experiment, arguments[1], resume=True)
    leave_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
