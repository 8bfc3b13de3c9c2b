"""Lab 03, engine: train with DeepSpeed's engine by hand, without `Trainer`.

You complete nine functions. `labs/lab03_engine/train.py` puts them together as a program, which a launcher starts once per rank:

    deepspeed --num_gpus 2 labs/lab03_engine/train.py --stage 2
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import sys
from pathlib import Path

import numpy
import torch
from datasets import Dataset

from shardlab.data.models import load_model, load_tokenizer
from shardlab.run.collectives import barrier, gather, rank, world_size
from shardlab.run.run_folder import write_json
from shardlab.zero import ops

os.environ.update(ops.environment())  # DeepSpeed reads the device and the folder of its compiled ops when it is imported
import deepspeed

# --- Task 3.1 -------------------------------------------------------------------------------------------------------


def initialize_deepspeed(model, config: dict, optimizer=None, training_data: Dataset | None = None) -> tuple:
    """Wrap a model in a DeepSpeed engine. Every rank calls this.

    Args:
        model: a `transformers` model.
        config: DeepSpeed's configuration, without "auto": there is no `Trainer` to fill it in. An `optimizer` of None, null in the
            file, is none; DeepSpeed itself fails at it (AttributeError), so it gets a configuration without the key.
        optimizer: a torch optimizer over the model's parameters; None if the configuration has an `optimizer`.
        training_data: rows of tensors on the CPU, of equal shapes, such as `Dataset.from_list(rows).with_format("torch")`. The
            loader's batches stay there; each step moves its own (`on_device`).

    Returns:
        Engine, optimizer, data loader and learning-rate scheduler. The first, second and last are as `deepspeed.initialize`
        returns them. The data loader is `engine.deepspeed_io(training_data, …)`, which gives each rank its own share of the
        rows; None without data. Load in the rank itself (`num_local_io_workers=0`): by default each rank starts two more
        processes, and they outlive a rank that is killed. Pin memory only where there is a GPU.

    Raises:
        ValueError: there is neither an `optimizer` nor one in the configuration, or both are there; or one of
            `train_batch_size`, `train_micro_batch_size_per_gpu` and `gradient_accumulation_steps` is "auto". The sentence
            names the key, or says "optimizer".

    Source: https://deepspeed.readthedocs.io/en/latest/initialize.html
    """
    raise NotImplementedError("Task 3.1: complete initialize_deepspeed() in src/exercises/lab03_engine.py")


# --- Given ----------------------------------------------------------------------------------------------------------


def on_device(batch: dict[str, torch.Tensor], engine) -> dict[str, torch.Tensor]:
    """The batch on the engine's device."""
    return {name: tensor.to(engine.device) for name, tensor in batch.items()}


def mean_over_ranks(value: torch.Tensor) -> float:
    """The mean of a number of which each rank has one. All ranks must call it."""
    value = value.detach().clone().float()
    deepspeed.comm.all_reduce(value)
    return value.item() / world_size()


def random_state() -> dict:
    """The states of this rank's random generators, as plain values and tensors on the CPU. Dropout draws from torch's: on a GPU
    from CUDA's, else from the CPU's."""
    name, keys, *position = numpy.random.get_state()
    return {"python": random.getstate(), "numpy": [name, keys.tolist(), *position], "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}


def write_manifest(folder: Path, ranks: int, universal: bool = False) -> None:
    """Write `complete.json`, the last file of a checkpoint: its ranks, and the size of every file in bytes."""
    files = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(Path(folder).rglob("*"))
             if path.is_file() and path.name != "complete.json"}
    write_json(Path(folder, "complete.json"), {"ranks": ranks, "universal": universal, "files": files})


class DeepSpeedTrainer:
    """Trains an engine, and knows how far it has come.

    Attributes:
        engine: what `initialize_deepspeed` made.
        epoch: epochs finished.
        samples: sequences of the current epoch that have been trained on, over all ranks.
        after_step: called after each optimizer step with the trainer and the mean loss of the step's micro-batches.
        random_state_to_restore: set by `load_checkpoint`; `restore_random_state` puts it in place.
    """

    def __init__(self, engine, after_step=lambda trainer, loss: None):
        self.engine, self.after_step = engine, after_step
        self.epoch = self.samples = 0
        self.random_state_to_restore: dict | None = None

    @property
    def accumulating(self) -> bool:
        """Whether there are gradients that no optimizer step has used yet."""
        return self.engine.micro_steps % self.engine.gradient_accumulation_steps() != 0

    def restore_random_state(self) -> None:
        """Continue the random numbers of the checkpoint, if one has been loaded; a second call does nothing."""
        state, self.random_state_to_restore = self.random_state_to_restore, None
        if state is not None:
            random.setstate(state["python"])
            numpy.random.set_state(state["numpy"])
            torch.set_rng_state(state["torch"])
            if state["cuda"] is not None and torch.cuda.is_available():  # saved on GPUs, continued on the CPU
                torch.cuda.set_rng_state(state["cuda"])

    # --- Task 3.2 ---------------------------------------------------------------------------------------------------

    def train_step(self, batch: dict[str, torch.Tensor]) -> float:
        """Forward, backward and step for one micro-batch.

        An evaluation may have left dropout off: `engine.train()` comes first, and costs nothing.

        The engine counts micro-batches. `engine.backward` divides the loss by the accumulation, and `engine.step` does
        nothing until the last micro-batch of an optimizer step: then it clips, steps, and clears the gradients.

        Args:
            batch: `input_ids`, `attention_mask` and `labels` of this rank's micro-batch, each (micro-batch, tokens), on
                any device; `on_device(batch, engine)` moves them to the engine's.

        Returns:
            The micro-batch's loss, as the model gives it, in the mean over the ranks: a Python float.
        """
        raise NotImplementedError("Task 3.2: complete DeepSpeedTrainer.train_step() in src/exercises/lab03_engine.py")

    # --- Task 3.3 ---------------------------------------------------------------------------------------------------

    def train_epoch(self, dataloader, last_step: int | None = None) -> float:
        """Train on the batches of the current epoch that have not been trained on yet.

        The sampler shuffles anew only if it is told the epoch: `dataloader.data_sampler.set_epoch(…)`. After a checkpoint
        was loaded, `samples` says how many sequences to pass over; each batch has micro-batch × ranks of them, over all
        ranks. DeepSpeed's loader starts anew at each `iter()`, and a `for` calls it too: so go through it with one `for`, and
        pass over inside (a rest of less than a batch, as after a change of ranks, is trained on again). Call
        `restore_random_state` after the passing over, which draws random numbers itself, and before the first step; if no batch
        is left, before you return, since the next epoch draws from there.

        After each micro-batch `samples` grows. After the last one of an optimizer step, `after_step` is called, and
        training ends if `engine.global_steps` has reached `last_step`, even if that was the epoch's last batch. Otherwise, at the
        end of the epoch, `epoch` grows, and `samples` is 0 again. (An accumulation that began in the epoch before counts its
        micro-batches of this epoch only.)

        Args:
            dataloader: what `initialize_deepspeed` returned; its batches are on the CPU, and `train_step` moves them.
            last_step: the optimizer step, counted from the beginning of the training, after which to return. Where it has been
                taken already, the next one is the last.

        Returns:
            The mean loss of the micro-batches that were trained on; nan if none was left.
        """
        raise NotImplementedError("Task 3.3: complete DeepSpeedTrainer.train_epoch() in src/exercises/lab03_engine.py")

    # --- Task 3.4 ---------------------------------------------------------------------------------------------------

    def evaluate(self, dataloader) -> float:
        """The mean loss of a token on held-out data, over all ranks; nothing is trained.

        The model's loss is a mean over the micro-batch's labels that are not −100, the first of each row left out, since
        nothing predicts it. Batches with few labels must not count as much as batches with many; the loss of a batch without any is
        the mean of nothing, nan, and counts for nothing. (Any other nan is the model's, and the mean is then nan too.) Dropout is
        off while this runs, and on again afterwards. No gradients are kept (`torch.no_grad`), those of an accumulation that has
        begun stay, and torch's random numbers stay where they are (but for what going through `dataloader` draws). The model's
        output is let go of batch by batch: its logits are large.

        Args:
            dataloader: batches for this rank, on any device, to be gone through once; every rank has equally many, or stage 3
                would wait for ever. Sums that go through `all_reduce` must be on the engine's device.
        """
        raise NotImplementedError("Task 3.4: complete DeepSpeedTrainer.evaluate() in src/exercises/lab03_engine.py")

    # --- Task 3.5 ---------------------------------------------------------------------------------------------------

    def save_checkpoint(self, path: str | Path, client_state: dict) -> Path:
        """Save everything that training needs to go on, into the folder `path/step-<optimizer steps>`. Every rank calls this.

        DeepSpeed saves parameters, optimizer states and scheduler, each rank its shard. The rest goes through DeepSpeed's own
        `client_state`: {"epoch": …, "samples": …, "random": [each rank's random_state(), by rank], "client": client_state}.
        DeepSpeed writes the client state of rank 0 only, in stages 0 to 2; `gather(value)` gives every rank the list.

        The folder is complete when `complete.json` is in it: rank 0 writes that (`write_manifest`), after every rank has
        written its files (`barrier()`), and no rank returns before. A run that continues from an older checkpoint saves into
        folders that are there already: rank 0 removes an old `complete.json` first, before any rank writes.

        Args:
            path: the folder of all checkpoints.
            client_state: whatever the caller wants back; anything that can be pickled. Tensors in it should be on the CPU: a rank
                that loads them on a machine with fewer GPUs could not put them back on one.

        Returns:
            The folder of this checkpoint.

        Raises:
            ValueError: in the middle of an accumulation; gradients are not saved, so they would be lost.
        """
        raise NotImplementedError("Task 3.5: complete DeepSpeedTrainer.save_checkpoint() in src/exercises/lab03_engine.py")

    # --- Task 3.6 ---------------------------------------------------------------------------------------------------

    def load_checkpoint(self, path: str | Path, tag: str | None = None) -> dict:
        """Continue from a checkpoint that `save_checkpoint` wrote. Every rank calls this, before the first step.

        Args:
            path: the folder of all checkpoints.
            tag: the checkpoint's folder in it, such as "step-4"; by default the newest that is whole (`newest_whole`).

        Returns:
            The `client_state` that was saved. `epoch` and `samples` are restored. `random_state_to_restore` is this rank's, or
            None if the checkpoint was saved by another number of ranks.

        Raises:
            ValueError: what `check_checkpoint` raises, before the engine has loaded anything.
        """
        raise NotImplementedError("Task 3.6: complete DeepSpeedTrainer.load_checkpoint() in src/exercises/lab03_engine.py")


# --- Task 3.7 -------------------------------------------------------------------------------------------------------


def check_checkpoint(folder: str | Path, ranks: int) -> dict:
    """Refuse a checkpoint that is not whole, or that this number of ranks cannot load.

    Args:
        folder: of one checkpoint, such as checkpoints/step-4.
        ranks: how many want to load it.

    Returns:
        What `complete.json` says: {"ranks": …, "universal": True or False, "files": {name in the folder: bytes}}.

    Raises:
        ValueError: with a sentence that names the folder or the file, and the reason:
            the folder is missing; it has no `complete.json` (the save did not come to its end); a file is missing; a file
            has another size (the sentence gives both sizes); another number of ranks saved it and it is not universal (the
            sentence names both numbers).
    """
    raise NotImplementedError("Task 3.7: complete check_checkpoint() in src/exercises/lab03_engine.py")


def newest_whole(path: str | Path, ranks: int) -> Path:
    """The newest checkpoint in a folder that `check_checkpoint` accepts. Newer ones that it refuses are named on stderr.

    Raises:
        ValueError: there is none; the sentence says why for each.
    """
    refused = []
    for folder in sorted(Path(path).glob("step-*"), key=lambda folder: int(folder.name.partition("-")[2]), reverse=True):
        try:
            check_checkpoint(folder, ranks)
        except ValueError as error:
            refused.append(str(error))
            continue
        if refused and rank() == 0:
            print(f"Passed over: {'; '.join(refused)}. Continuing from {folder}.", file=sys.stderr)
        return folder
    raise ValueError(f"{path} holds no checkpoint to continue from" + "".join(f"; {reason}" for reason in refused))


# --- Task 3.8 -------------------------------------------------------------------------------------------------------


def consolidate(folder: str | Path, base_model: str, out: str | Path):
    """Make a plain `transformers` model folder, in fp32, of a checkpoint of ZeRO stages 1 to 3. One process calls this.

    `get_fp32_state_dict_from_zero_checkpoint` in `deepspeed.utils.zero_to_fp32` puts the shards of the master weights together,
    of the folder of all checkpoints and a tag. The model folder also needs the
    configuration, which the checkpoint does not have, and the tokenizer. All of this happens on the CPU: the machine need not
    have a GPU, and the model need not fit on one.

    Args:
        folder: of one checkpoint, such as checkpoints/step-4.
        base_model: the model that was trained; `load_model(base_model, random_weights=True)` builds one of that shape, and
            `load_tokenizer(base_model)` reads its tokenizer.
        out: the model folder to write; a model that lies there is replaced.

    Returns:
        The model, on the CPU.

    Raises:
        RuntimeError: the base model has other parameters than the checkpoint, as `load_state_dict` says by itself.
    """
    raise NotImplementedError("Task 3.8: complete consolidate() in src/exercises/lab03_engine.py")


# --- Task 3.9 -------------------------------------------------------------------------------------------------------


def convert_to_universal(folder: str | Path, path: str | Path) -> Path:
    """Convert a checkpoint so that any number of ranks can load it. One process calls this.

    `deepspeed.checkpoint.ds_to_universal.main` does it; it takes what its command line gives: an object with the attributes
    input_folder, output_folder, num_extract_workers, num_merge_workers, keep_temp_folder, strict and inject_missing_state.
    One worker each is enough here, `strict` is True and `keep_temp_folder` False. `inject_missing_state` must be True: the
    conversion asks for an entry `universal_checkpoint_info`, which only Megatron-DeepSpeed writes. The engine that loads the
    result needs {"checkpoint": {"load_universal": True}} in its configuration.

    Args:
        folder: of one checkpoint of ZeRO stages 1 to 3.
        path: the folder of universal checkpoints; the new one goes into `path/<name of folder>`, with a `complete.json` that
            says `universal`, and the number of ranks that saved the original. One of that name from before is written anew.

    Returns:
        The new checkpoint's folder.

    Raises:
        ValueError: `path` is the folder in which the original lies, whichever way it is written: the new one would take its place.
    """
    raise NotImplementedError("Task 3.9: complete convert_to_universal() in src/exercises/lab03_engine.py")


# --- Given ------------------------------------------------------------------------------------------------------------


def engine_config(stage: int, *, offload: bool, micro_batch: int, accumulation: int, ranks: int, learning_rate: float,
                  precision: str) -> dict:
    """A configuration with numbers in the place of every "auto"."""
    zero: dict = {"stage": stage}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    adam = {"lr": learning_rate} | ({} if offload else {"torch_adam": True})
    return {
        "train_micro_batch_size_per_gpu": micro_batch, "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch * accumulation * ranks, "gradient_clipping": 1.0,
        "bf16": {"enabled": precision == "bf16"}, "zero_optimization": zero, "optimizer": {"type": "AdamW", "params": adam},
    }
