"""What milestones of this lab run around the exercises: on ranks, and in the exercises' process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
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
    stopped, kinds = options["steps"], []
    # Drawn, nobody but this rank knows it: an answer that is right needs the others.
    mine = options["asked"][rank()] if "asked" in options else 1 + int.from_bytes(os.urandom(4)) % options["steps"]
    for step in range(1, options["steps"] + 1):
        answer = lab.stop_together(step >= mine)
        kinds.append(type(answer).__name__)
        # All ranks take all steps here, so that a wrong answer is seen, not waited for.
        if answer and stopped == options["steps"]:
            stopped = step
    return {"stopped": gather(stopped), "asked": gather(mine), "kinds": gather(kinds[0])}


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
