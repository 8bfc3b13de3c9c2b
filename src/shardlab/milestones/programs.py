"""What ranks run for milestones that need a live trainer around one exercise function."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import torch

from shardlab import switch
from shardlab.data.models import load_model, load_tokenizer
from shardlab.run.collectives import gather
from shardlab.run.experiment import Experiment
from shardlab.run.run_folder import Run
from shardlab.run.training import text_rows, train, trainer_arguments
from shardlab.zero import ops


def save_round_trip(experiment: Experiment, run: Run) -> dict:
    """Train a few steps, let `lab01_baseline.save_and_reload` save and reload, and compare what came back.

    Returns:
        `difference`: the largest difference between a trained and a reloaded weight, over all ranks;
        `same_object`: the function handed the trained model back instead of a reloaded one;
        `dtype` and `parameters` of the reloaded model; `tied`: its output layer is its embedding;
        `tokenizer`: whether a tokenizer could be read from the folder.
    """
    from transformers import AutoTokenizer

    arguments = trainer_arguments(experiment, run)
    model = load_model(experiment.model)
    rows, _ = text_rows(experiment)
    trainer = train(
        run,
        model=model,
        arguments=arguments,
        train_set=rows,
        eval_set=[],
        collate=lambda batch: {key: torch.tensor([row[key] for row in batch]) for key in batch[0]},
        tokens_per_sequence=experiment.max_tokens,
    )
    folder = run.folder / "model"
    reloaded = switch.import_exercise("lab01_baseline").save_and_reload(trainer, load_tokenizer(), str(folder))

    import deepspeed

    trained = dict(trainer.model.named_parameters())
    same_object = reloaded is trainer.model or reloaded is trainer.model_wrapped
    difference = float("inf")
    if not same_object:
        got = dict(reloaded.named_parameters())
        sharded = [p for p in trained.values() if hasattr(p, "ds_id")]
        with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
            same_names = set(got) == set(trained)
            difference = (
                max(
                    (got[name].float().cpu() - p.detach().float().cpu()).abs().max().item()
                    if got[name].shape == p.shape
                    else float("inf")
                    for name, p in trained.items()
                )
                if same_names
                else float("inf")
            )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder).pad_token == "<pad>"
    except (OSError, ValueError):
        tokenizer = False
    embedding = getattr(getattr(reloaded, "transformer", None), "word_embeddings", None)
    return {
        "difference": max(gather(difference)),
        "same_object": same_object,
        "dtype": str(reloaded.dtype),
        "parameters": sum(p.numel() for p in reloaded.parameters()),
        "tokenizer": tokenizer,
        "tied": embedding is not None and reloaded.lm_head.weight is embedding.weight,
    }


def uneven_gradient(experiment: Experiment, run: Run) -> dict:
    """Task 6.5: the gradient of a linear model in the mean over the ranks, beside that of one rank with the whole global batch."""
    import torch.distributed as dist

    from shardlab.run.collectives import rank, world_size

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
    from shardlab.run.collectives import rank

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


# --- lab 04 -----------------------------------------------------------------------------------------------------------


def configure_offload_with_free_bytes(folder, free: int) -> dict:
    """Task 4.1: the configuration for states of just so many bytes on a disk where just so many are free, in `folder` alone."""
    import shutil
    from types import SimpleNamespace
    from unittest import mock

    create = switch.import_exercise("lab04_offload").create_offload_config
    with mock.patch.object(shutil, "disk_usage", lambda path: SimpleNamespace(free=free if str(path) == str(folder) else 0)):
        return create(3, optimizer_offload=True, bytes_on_disk=free, offload_device="nvme", nvme_path=folder)


class Sum(torch.optim.Optimizer):
    """Subtracts its gradients times a factor, and notes them. Its first step is slow, as if it allocated its moments."""

    def __init__(self, parameters, factor: float):
        super().__init__(parameters, {})
        self.factor, self.gradients = factor, []
        self.parameter = self.param_groups[0]["params"][0]
        self.start = self.parameter.detach().clone()

    def step(self, closure=None):
        self.gradients.append(self.parameter.grad.clone())
        self.parameter.data.sub_(self.factor * self.parameter.grad)
        if len(self.gradients) == 1:
            time.sleep(0.3)


Sum.step.hooked = True  # or torch wraps it for its profiler at first use, and it looks as if somebody had replaced it


def compare_two_sums(size: int, steps: int, seed: int) -> dict:
    """Task 4.4: what two optimizers were given, that subtract their gradients once and three times."""
    made: list[Sum] = []

    def optimizer(factor: float):
        def make(parameters) -> Sum:
            made.append(Sum(parameters, factor))
            return made[-1]

        return make

    returned = switch.import_exercise("lab04_offload").compare_optimizers(optimizer(1.0), optimizer(3.0), size, steps, seed=seed)
    first, second = made[:2]
    return {
        "returned": returned,
        "same_tensor": first.parameter.data_ptr() == second.parameter.data_ptr(),
        "first": {"start": first.start, "gradients": first.gradients},
        "second": {"start": second.start, "gradients": second.gradients},
    }


def compare_adams(size: int, steps: int) -> dict:
    """Task 4.4: DeepSpeed's Adam on the host and torch's AdamW."""
    os.environ.update(ops.environment())  # or DeepSpeed would compile its op again, into torch's own folder
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    import shardlab.run.cpu_facts  # noqa: F401  # DeepSpeedCPUAdam asks about the processor each time; once is enough

    settings = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-8}
    return switch.import_exercise("lab04_offload").compare_optimizers(
        lambda p: DeepSpeedCPUAdam(p, **settings), lambda p: torch.optim.AdamW(p, **settings), size, steps
    )


# --- lab 06 -----------------------------------------------------------------------------------------------------------


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
