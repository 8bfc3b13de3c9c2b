"""What milestones of this lab run around the exercises: on ranks, and in the exercises' process."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from shardlab import switch
from shardlab.run.collectives import gather, rank, world_size
from shardlab.run.experiment import Experiment
from shardlab.run.run_folder import Run


def uneven_gradient(experiment: Experiment, run: Run) -> dict:
    """Task 6.5: the gradient of a linear model in the mean over the ranks, next to that of one rank with the whole global batch."""
    import torch.distributed as dist

    lab, size = switch.import_exercise("lab06_multi_node"), experiment.options["global_batch"]
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    generator = torch.Generator().manual_seed(experiment.seed)
    inputs = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    targets = torch.randn(size, generator=generator, dtype=torch.float64)

    def gradient(positions: list[int], weight: float) -> torch.Tensor:
        model = torch.zeros(5, dtype=torch.float64, requires_grad=True)
        (weight * ((inputs[positions] @ model - targets[positions]) ** 2).mean()).backward()
        return model.grad

    weight = lab.loss_weight(size, rank(), world_size())
    # The shares are worked out here, so that a wrong share() does not count twice.
    each, more = divmod(size, world_size())
    first = rank() * each + min(rank(), more)
    mine = gradient(list(range(first, first + each + (rank() < more))), weight).to(device)
    dist.all_reduce(mine)
    difference = (mine.cpu() / world_size() - gradient(list(range(size)), 1.0)).abs().max().item()
    return {"difference": difference, "weights": gather(weight)}


def stop_at_different_steps(experiment: Experiment, run: Run) -> dict:
    """Task 6.8: after which step each rank stops, where each is asked in a step of its own; drawn here if `asked` is not given."""
    lab, options = switch.import_exercise("lab06_multi_node"), experiment.options
    stopped, kinds, made = options["steps"], [], []
    new_group = torch.distributed.new_group

    def counted(*args, **kwargs):
        made.append(args)
        return new_group(*args, **kwargs)

    torch.distributed.new_group = counted
    # Drawn, nobody but this rank knows it: an answer that is right needs the others.
    mine = options["asked"][rank()] if "asked" in options else 1 + int.from_bytes(os.urandom(4)) % options["steps"]
    for step in range(1, options["steps"] + 1):
        answer = lab.stop_together(step >= mine)
        kinds.append(type(answer).__name__)
        # All ranks take all steps here, so that a wrong answer is seen, not waited for.
        if answer and stopped == options["steps"]:
            stopped = step
    torch.distributed.new_group = new_group
    return {"stopped": gather(stopped), "asked": gather(mine), "kinds": gather(kinds[0]), "groups": len(made)}


def executable(path: Path, text: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


TWO_NETWORKS = "echo 10.1.2.3 STREAM node1; echo 192.168.9.9 STREAM"
"""What `getent` does on a node with two networks, of which it prints the one that all nodes share first."""


def started_on_nodes(settings: dict, program: list[str], setup: str = "true", getent: str = TWO_NETWORKS) -> dict:
    """Task 6.4: the script run by bash, where `srun` stands for four nodes, one after the other.

    Args:
        settings: of `batch_script`, without the others.
        setup: a line after those that put `srun`, `torchrun` and `getent` in place.
        getent: what `getent` does.

    Returns:
        `status` of the script, and `torchruns`: the words of each, by node.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = Path(folder, "words")
        executable(Path(folder, "torchrun"), f'printf "%s\\0" "$SLURM_NODEID" "$#" "$@" >>{shlex.quote(str(words))}')
        executable(Path(folder, "getent"), getent)
        nodes = 'for node in 0 1 2 3; do SLURM_NODEID=$node SLURM_PROCID=$node "$@"; done'
        executable(Path(folder, "srun"), f"while [[ $1 == -* || $1 =~ ^[0-9]+$ ]]; do shift; done\n{nodes}")
        lines = f'PATH={shlex.quote(folder)}:"$PATH"\n{setup}'
        text = switch.import_exercise("lab06_multi_node").batch_script(**settings, setup=lines, program=program)
        script = Path(folder, "job.sh")
        script.write_text(text)
        job = {"SLURM_JOB_ID": "4123456", "SLURM_JOB_NUM_NODES": "4", "SLURM_NNODES": "4", "SLURM_NODEID": "0"}
        done = subprocess.run(
            ["bash", script],
            cwd=folder,
            env=os.environ | job,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=30,
            check=False,
        )
        noted, torchruns = words.read_text().split("\0")[:-1] if words.exists() else [], []
        while noted:
            node, count = int(noted[0]), int(noted[1])
            torchruns.append([node, noted[2 : 2 + count]])
            noted = noted[2 + count :]
    return {"status": done.returncode, "torchruns": torchruns}


class Life(NamedTuple):
    """What stands for the ranks in one life of a job, and the job around it.

    Attributes:
        ranks: a command of bash; `$run` is the run folder.
        signals: after how many seconds the script's shell gets SIGUSR1; None for when it first looks for checkpoints with `find`, or
            after 2 s.
        checkpoints: those that are complete when it begins.
        restarts: lives before this one, as Slurm counts them.
        stop: whether an earlier life has left the file stop.
    """

    ranks: str
    signals: list[float | None] = []
    checkpoints: list[int] = []
    restarts: int = 0
    stop: bool = False


SAVE_100 = 'mkdir -p "$run/checkpoints/checkpoint-100"; touch "$run/checkpoints/checkpoint-100/complete.json"; '
LIVES = {
    "fails with 5": Life("exit 5"),
    "is asked, and fails while it saves": Life(
        'mkdir -p "$run"; until [ -e "$run/stop" ]; do /bin/sleep 0.1; done; rm "$run/stop"; touch "$run/stop"; exit 6', [0.6]
    ),
    "is asked before it has a run folder": Life(
        '/bin/sleep 2; mkdir -p "$run"; for _ in $(seq 50); do /bin/sleep 0.1; [ ! -e "$run/stop" ] || exit 0; done; exit 7', [0.5]
    ),
    "dies in its first checkpoint": Life(
        'mkdir -p "$run/checkpoints/checkpoint-5"; touch "$run/checkpoints/checkpoint-5/model.pt"; exit 8'
    ),
    "dies after checkpoint 100, beside that of step 80": Life(f"{SAVE_100} exit 9", checkpoints=[80]),
    "dies after checkpoint 100, in the place of that of step 80": Life(
        f'{SAVE_100} rm -r "$run/checkpoints/checkpoint-80"; exit 9', checkpoints=[80]
    ),
    "dies after checkpoint 100, in its fortieth life": Life(f"{SAVE_100} exit 9", checkpoints=[80], restarts=39),
    "dies when it has removed the older of two checkpoints": Life(
        'rm -r "$run/checkpoints/checkpoint-80"; exit 9', checkpoints=[80, 100]
    ),
    "is asked, and fails without a run folder": Life("/bin/sleep 1; exit 3", [0.5]),
    "is asked twice": Life(
        'mkdir -p "$run"; until [ -e "$run/stop" ]; do /bin/sleep 0.1; done; /bin/sleep 1.5; touch "$run/saved"; exit 0',
        [0.6, 1.2, 1.6],
    ),
    "is killed by SIGUSR1 itself": Life("kill -USR1 $$; /bin/sleep 1"),
    "ends at once where a file stop is there": Life('[ ! -e "$run/stop" ] || exit 4', checkpoints=[80], stop=True),
    "is asked while the script looks for checkpoints": Life(
        'mkdir -p "$run"; for _ in $(seq 50); do /bin/sleep 0.1; [ ! -e "$run/stop" ] || exit 0; done; exit 7', [None]
    ),
}
"""Of task 6.9."""
AT_ONCE = 6
"""Lives that are played side by side: each has up to six processes, and a box has room for 64."""


def lives() -> dict[str, list]:
    """Task 6.9: for each of `LIVES`, the script's exit status, how often it asked for a requeue, whether `saved` was there at its end,
    and whether something has put `stop` into a run folder that was made after it. `sleep` is short for the script, so that what
    gives up after some turns does so soon.
    """
    surviving = switch.import_exercise("lab06_multi_node").surviving
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(AT_ONCE) as pool:
        bin_folder = Path(folder, "bin")
        bin_folder.mkdir()
        executable(bin_folder / "sleep", "exec /bin/sleep 0.02")
        executable(bin_folder / "scontrol", '[ "$1" != requeue ] || echo "$2" >>"$REQUEUED"')
        find = f'[ -z "$LOOKS" ] || [ -e "$LOOKS" ] || {{ touch "$LOOKS"; /bin/sleep 0.5; }}\nexec {shutil.which("find")} "$@"'
        executable(bin_folder / "find", find)

        def live(number: int, life: Life) -> list:
            place = Path(folder, "checkpoint-999", f'run {number} of $USER\'s `own` "best"')
            requeued, script, looks = (
                Path(folder, f"requeued-{number}"),
                Path(folder, f"{number}.sh"),
                Path(folder, f"looks-{number}"),
            )
            for step in life.checkpoints:
                checkpoint = place / "checkpoints" / f"checkpoint-{step}"
                checkpoint.mkdir(parents=True)
                (checkpoint / "complete.json").touch()
            if life.stop:
                (place / "stop").touch()
            launch = f"bash -c {shlex.quote(f'run={shlex.quote(str(place))}; {life.ranks}')}"
            script.write_text(f"set -euo pipefail\n{surviving(launch, str(place))}\n")
            variables = {"PATH": f"{bin_folder}:{os.environ['PATH']}", "REQUEUED": str(requeued), "SLURM_JOB_ID": "17"}
            variables |= {"SLURM_RESTART_COUNT": str(life.restarts), "LOOKS": str(looks) if None in life.signals else ""}
            output = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            shell = subprocess.Popen(["bash", script], env=os.environ | variables, start_new_session=True, **output)
            started = time.monotonic()
            for after in life.signals:
                while after is None and not looks.exists() and time.monotonic() - started < 2:
                    time.sleep(0.02)
                time.sleep(max(0.0, started + (after or 0) - time.monotonic()))
                if shell.poll() is None:
                    shell.send_signal(signal.SIGUSR1)
            try:
                status = shell.wait(timeout=25)
            except subprocess.TimeoutExpired:
                status = "no end"
            saved, late = (place / "saved").exists(), False
            if not place.exists():
                time.sleep(0.5)  # for a turn of the loop, which then sees that the script has ended
                place.mkdir(parents=True)
                time.sleep(1)
                late = (place / "stop").exists()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
            return [status, len(requeued.read_text().splitlines()) if requeued.exists() else 0, saved, late]

        return dict(zip(LIVES, pool.map(live, range(len(LIVES)), LIVES.values())))


def rendezvous_of_this_process(variables: dict, address: str, ranks_per_node: int) -> dict:
    """Task 6.2: with `os.environ` itself, which is a mapping and no dictionary."""
    with mock.patch.dict(os.environ, variables):
        return switch.import_exercise("lab06_multi_node").rendezvous(os.environ, address, ranks_per_node)


def rendezvous_within_a_job(variables: dict, address: str, ranks_per_node: int) -> dict:
    """Task 6.2: in a process that is itself a task of another job, as JupyterLab on a compute node is."""
    job = {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "9", "SLURM_NODEID": "3", "SLURM_PROCID": "3"}
    with mock.patch.dict(os.environ, job):
        return switch.import_exercise("lab06_multi_node").rendezvous(variables, address, ranks_per_node)


@cache
def ranks_of_torchruns(*options: tuple) -> tuple[list[str], list]:
    """Task 6.2: rank and world size of every process that torchruns with these options start, and the torchruns' exit statuses."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        store = f"--rdzv-endpoint=127.0.0.1:{probe.getsockname()[1]}"
    with tempfile.TemporaryDirectory() as folder:
        seen, agents = Path(folder, "ranks"), []
        for given in options:
            words = [f"--{key}={value}" for key, value in given]
            program = ["--no-python", "bash", "-c", 'echo "$RANK $WORLD_SIZE" >>"$0"', str(seen)]
            command = [sys.executable, "-m", "torch.distributed.run", *words, store, *program]
            agents.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        try:
            statuses = [agent.wait(timeout=55) for agent in agents]
        except subprocess.TimeoutExpired:
            statuses = ["it waited for 55 s"]
        finally:
            for agent in agents:
                agent.kill()
        return sorted(seen.read_text().splitlines()) if seen.exists() else [], statuses
