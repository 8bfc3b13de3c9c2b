"""Runs of DeepSpeed's engine without any exercise in them, for milestones to compare with."""

from __future__ import annotations

import json
import os
import signal
from functools import cache
from pathlib import Path

import torch
from torch.utils.data import DistributedSampler

from shardlab.data.models import load_model, load_tokenizer
from shardlab.milestones.launches import once, visible_folder
from shardlab.run.collectives import barrier, gather, rank, world_size
from shardlab.run.experiment import Experiment
from shardlab.run.run_folder import Run, write_json
from shardlab.run.text_rows import text_rows
from shardlab.zero.nvme import swapped_groups, without_its_nvme_part


def odd_model(*, tied: bool = True) -> str:
    """The folder of a small BLOOM whose sizes divide by nothing, so that every shard is padded.

    Its weights are drawn wide, so that one token's loss differs from another's.

    Args:
        tied: whether the output layer is the embedding, as BLOOM has it.
    """
    from transformers import BloomConfig, BloomForCausalLM, set_seed

    name = "odd-model" if tied else "untied-model"
    folder = visible_folder() / name
    with once(name) as first:
        if first:
            set_seed(0)
            sizes = {"vocab_size": 1031, "hidden_size": 33, "n_layer": 1, "n_head": 3, "tie_word_embeddings": tied}
            config = BloomConfig(**sizes, initializer_range=0.2, bos_token_id=1, eos_token_id=2, pad_token_id=3)
            load_tokenizer().save_pretrained(folder)
            BloomForCausalLM(config).save_pretrained(folder)
    return str(folder)


def set_dropout(model, probability: float) -> None:
    """Set BLOOM's dropout; as it is shipped it has none."""
    for block in model.transformer.h:
        block.self_attention.hidden_dropout = block.mlp.hidden_dropout = probability
        block.self_attention.attention_dropout.p = probability


def build(experiment: Experiment):
    """The experiment's model in an engine; `options` may have `dropout`, and `frozen`, with which untrained names begin."""
    import deepspeed

    model = load_model(experiment.model, seed=experiment.seed)
    if frozen := experiment.options.get("frozen"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
    set_dropout(model, experiment.options.get("dropout", 0.0))
    torch.manual_seed(experiment.seed + rank())  # dropout then differs from rank to rank
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=experiment.deepspeed)[0]


def as_batch(rows: list[dict]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def epoch_batches(rows: list[dict], epoch: int, micro_batch: int, ranks: int, rank_: int) -> list[dict[str, torch.Tensor]]:
    """One rank's micro-batches of an epoch, in the order of torch's `DistributedSampler`."""
    sampler = DistributedSampler(rows, ranks, rank_)
    sampler.set_epoch(epoch)
    mine = [rows[index] for index in sampler]
    return [as_batch(mine[at : at + micro_batch]) for at in range(0, len(mine), micro_batch)]


def micro_step(engine, batch: dict[str, torch.Tensor]) -> float:
    """Forward, backward and step; the loss in the mean over the ranks."""
    engine.train()
    loss = engine(**{name: tensor.to(engine.device) for name, tensor in batch.items()}).loss
    engine.backward(loss)
    engine.step()
    losses = gather(loss.item())
    return sum(losses) / len(losses)


def random_states() -> list[dict]:
    """Every rank's random generators, in the form that the exercises give them, and none where it was at the beginning."""
    import random

    import numpy

    random.random()
    numpy.random.random()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return gather({"python": random.getstate(), "numpy": numpy.random.get_state(), "torch": torch.get_rng_state(), "cuda": cuda})


def save(engine, path: Path, state: dict) -> None:
    """A checkpoint in the form that the exercises write."""
    tag = f"step-{engine.global_steps}"
    engine.save_checkpoint(str(path), tag=tag, client_state=state | {"random": random_states()})
    barrier()
    if rank() == 0:
        folder = Path(path, tag)
        files = {str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()}
        write_json(folder / "complete.json", {"ranks": world_size(), "universal": False, "files": files})
    barrier()


def full_weights(engine) -> dict[str, torch.Tensor]:
    """The engine's fp32 weights, whole, on every rank, on the CPU."""
    from deepspeed.utils import safe_get_full_fp32_param

    named = engine.module.named_parameters()
    whole = {name: safe_get_full_fp32_param(parameter) if parameter.requires_grad else parameter for name, parameter in named}
    return {name: tensor.detach().float().cpu().clone() for name, tensor in whole.items()}


def go_on(engine, experiment: Experiment, run: Run, *, epoch: int = 0, samples: int = 0, before_first=lambda: None) -> None:
    """Train to the experiment's last step from a position in the data, and write a line per step.

    The experiment's `options`: `checkpoints`, a folder to save to after the steps in `save_at`; `weights`, a file for the
    weights after the step `weights_at`; `kill_at`, the step in which rank 1 ends itself with SIGKILL.
    """
    options, rows = experiment.options, text_rows(experiment)[0]
    per_batch = experiment.micro_batch * world_size()
    while engine.global_steps < experiment.steps:
        losses = []
        for number, batch in enumerate(epoch_batches(rows, epoch, experiment.micro_batch, world_size(), rank())):
            if number * per_batch < samples:
                continue
            before_first()
            if engine.global_steps + 1 == options.get("kill_at") and rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            losses.append(micro_step(engine, batch))
            samples += per_batch
            if len(losses) < experiment.accumulation:
                continue
            if rank() == 0:
                run.log_step(step=engine.global_steps, loss=sum(losses) / len(losses), steps=experiment.steps)
            losses = []
            if engine.global_steps in options.get("save_at", []):
                state = {"epoch": epoch, "samples": samples, "client": {"name": experiment.name}}
                save(engine, Path(options["checkpoints"]), state)
            if engine.global_steps == options.get("weights_at"):
                weights = full_weights(engine)
                if rank() == 0:
                    torch.save(weights, options["weights"])
            if engine.global_steps == experiment.steps:
                return
        epoch, samples = epoch + 1, 0


def train(experiment: Experiment, run: Run) -> dict:
    """Train without a stop, or to the step in which a rank is killed.

    With `options["load"]`, the folder of a checkpoint, training continues from there.
    """
    engine = build(experiment)
    state = {"epoch": 0, "samples": 0}
    if "load" in experiment.options:
        folder = Path(experiment.options["load"])
        _, state = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    go_on(engine, experiment, run, epoch=state["epoch"], samples=state["samples"])
    return {}


def mean_losses(rows: list[dict]) -> tuple[float, float]:
    """The mean loss of a token of `odd_model`, and the mean of the rows' losses, in plain PyTorch without dropout."""
    return _mean_losses(json.dumps(rows))


@cache
def _mean_losses(rows: str) -> tuple[float, float]:
    model, total, count, losses = load_model(odd_model()).eval(), 0.0, 0, []
    for row in json.loads(rows):
        with torch.no_grad():
            loss = model(**as_batch([row])).loss.item()
        tokens = sum(label != -100 for label in row["labels"][1:])
        if not tokens:
            continue  # its loss is the mean of nothing
        total, count = total + loss * tokens, count + tokens
        losses.append(loss)
    return total / count, sum(losses) / len(losses)


def plain_losses(experiment: Experiment, rows: list[dict]) -> list[float]:
    """The loss of each optimizer step in plain PyTorch, in this process, on the batches of `rows` that all ranks would see.

    AdamW and clipping come from the experiment's DeepSpeed configuration. Dropout is off.
    """
    return _plain_losses(experiment.model_dump_json(), json.dumps(rows))


@cache
def _plain_losses(experiment_json: str, rows_json: str) -> list[float]:
    experiment = Experiment.model_validate_json(experiment_json)
    config = experiment.deepspeed
    model = load_model(experiment.model, seed=experiment.seed).train()
    settings = {key: value for key, value in config["optimizer"]["params"].items() if key != "torch_adam"}
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    rows, found, pending, epoch = json.loads(rows_json), [], [], 0
    while len(found) < experiment.steps:
        shares = [epoch_batches(rows, epoch, experiment.micro_batch, experiment.ranks, r) for r in range(experiment.ranks)]
        for together in zip(*shares):
            losses = [model(**batch).loss for batch in together]
            loss = sum(losses) / len(losses)
            (loss / experiment.accumulation).backward()
            pending.append(loss.item())
            if len(pending) < experiment.accumulation:
                continue
            if config["gradient_clipping"]:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config["gradient_clipping"])
            optimizer.step()
            optimizer.zero_grad()
            found.append(sum(pending) / len(pending))
            pending = []
            if len(found) == experiment.steps:
                break
        epoch += 1
    return found


# --- the optimizer on NVMe ----------------------------------------------------------------------------------------------


NVME_CLIENT = {"note": "kept", "seen": [1, 2], "step": 7, "sampler": {"at": 3}}
"""The client state of checkpoints of states on NVMe."""
STEPS_SKIPPED = 3
"""By how much the engine's count of steps in the saved checkpoint is above Adam's, as after overflows in fp16."""


def swapped_states(engine) -> dict[int, dict]:
    """This rank's swapped states, copied into memory, by sub-group, as the exercises save them."""
    none = torch.empty(0)
    return {
        number: {"master": master.detach().cpu().clone(), "step": state.get("step", 0)}
        | {key: state.get(key, none).detach().cpu().clone() for key in ("exp_avg", "exp_avg_sq")}
        for number, master, state in swapped_groups(engine)
    }


def train_nvme(experiment: Experiment, run: Run) -> dict:
    """Train on the first batches of the first epoch.

    The experiment's `options`: `save_at`, the step after which to save into `checkpoints`, in the form of the exercises.
    """
    engine = build(experiment)
    train_on(engine, experiment, run, 0, experiment.options.get("save_at", experiment.steps))
    if "save_at" in experiment.options:
        folder = Path(experiment.options["checkpoints"], f"step-{engine.global_steps}", "offloaded")
        with without_its_nvme_part(engine):
            engine.global_steps += STEPS_SKIPPED
            engine.save_checkpoint(str(folder.parents[1]), tag=folder.parent.name, client_state=dict(NVME_CLIENT))
            engine.global_steps -= STEPS_SKIPPED
        folder.mkdir(exist_ok=True)
        for number, state in swapped_states(engine).items():
            torch.save(state, folder / f"rank{rank()}-group{number}.pt")
        barrier()
        train_on(engine, experiment, run, engine.global_steps, experiment.steps)
    return {}


def train_on(engine, experiment: Experiment, run: Run, first: int, last: int) -> None:
    """Train from one optimizer step to another, one micro-batch each, and write a line per step."""
    batches = epoch_batches(text_rows(experiment)[0], 0, experiment.micro_batch, world_size(), rank())
    for step in range(first, last):
        loss = micro_step(engine, batches[step])
        if rank() == 0:
            run.log_step(step=step + 1, loss=loss, steps=experiment.steps)
