"""Lab 05: every way to use the GPUs of one node, measured against each other.

You complete the functions below. `check("5.1")` in the notebook, or `pytest labs/lab05_multi_gpu` in a terminal, grades them.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from shardlab.zero import ops

METHODS = ("single_gpu_simple", "single_gpu_offload", "ddp", "fsdp2", "zero1", "zero2", "zero3", "zeropp")
"""What `run_training_experiment` knows. Those from `zero1` on, and `single_gpu_offload`, are DeepSpeed's."""

# --- Task 5.1 -------------------------------------------------------------------------------------------------------


def setup_distributed() -> tuple[torch.device, int, int, int]:
    """Join the process group, or make one of this process alone.

    A launcher (torchrun, `deepspeed`, srun with the course's script) sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and
    MASTER_PORT. Where RANK is not set, this is a lone process: a world of one, with a port that is free. A group that is there
    already is used as it is.

    Returns:
        device: the GPU of this process's LOCAL_RANK, made the current one, or the CPU where there is no GPU;
        rank, local rank and world size.

    Raises:
        ValueError: LOCAL_RANK names a GPU that this machine does not have; the sentence holds both numbers. No group is left.
    """
    # BEGIN SOLUTION 5.1
    rank, local_rank, world_size = (int(os.environ.get(name, default)) for name, default in
                                    (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"local rank {local_rank} needs GPU {local_rank}, and {torch.cuda.device_count()} are visible")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device, rank, local_rank, world_size
    # END SOLUTION


def cleanup_distributed() -> None:
    """Leave the process group, if there is one. A rank that ends without it can abort, and keep others waiting."""
    # BEGIN SOLUTION 5.1
    if dist.is_initialized():
        dist.destroy_process_group()
    # END SOLUTION


# --- Task 5.2 -------------------------------------------------------------------------------------------------------


def create_image_transforms(image_size: int, mean: list[float], std: list[float]) -> tuple:
    """Functions that make a model's input of an image: one for training, one for validation.

    Args:
        image_size: height and width that the model takes, pixels.
        mean, std: of the model's own image processor, a number per channel, on the scale of 0 to 1.

    Returns:
        Two functions of a `PIL.Image` of any mode and size, each giving a float32 tensor [3, image_size, image_size] on the CPU:
        resized, as RGB on the scale of 0 to 1, minus the mean, divided by the deviation, channel by channel. The one for
        training mirrors half of the images from left to right, by torch's random numbers; the one for validation draws nothing.
    """
    # BEGIN SOLUTION 5.2
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))

    def validation(image: Image.Image) -> torch.Tensor:
        resized = image.convert("RGB").resize((image_size, image_size), Image.Resampling.BILINEAR)
        pixels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).view(image_size, image_size, 3)
        return (pixels.permute(2, 0, 1).float() / 255 - mean) / std

    def training(image: Image.Image) -> torch.Tensor:
        tensor = validation(image)
        return tensor.flip(2) if torch.rand(()) < 0.5 else tensor

    return training, validation
    # END SOLUTION


# --- Task 5.3 -------------------------------------------------------------------------------------------------------


def create_data_loaders(train_set, validation_set, *, micro_batch_size: int, rank: int, world_size: int, seed: int = 0):
    """Loaders of this rank's share.

    In training every rank must take equally many steps, or the others wait for it. So where the rows do not divide by the ranks,
    the sampler leaves the few that are over out of this epoch; another epoch has another order and leaves out others. No row comes
    twice. In evaluation nobody waits in between: every row is seen by just one rank, and some ranks have one more.

    Args:
        train_set, validation_set: data sets of pairs, a tensor and a label.
        micro_batch_size: rows per rank and batch.
        seed: of the order; the same on every rank.

    Returns:
        The training loader, whose `sampler.set_epoch` is to be called before each epoch, and the validation loader.
    """
    # BEGIN SOLUTION 5.3
    sampler = DistributedSampler(train_set, world_size, rank, shuffle=True, seed=seed, drop_last=True)
    mine = torch.utils.data.Subset(validation_set, range(rank, len(validation_set), world_size))
    pinned = torch.cuda.is_available()
    return (DataLoader(train_set, batch_size=micro_batch_size, sampler=sampler, pin_memory=pinned),
            DataLoader(mine, batch_size=micro_batch_size, pin_memory=pinned))
    # END SOLUTION


# --- Task 5.4 -------------------------------------------------------------------------------------------------------


def load_vit_model(model_name: str, num_labels: int, torch_dtype: torch.dtype = torch.float32,
                   enable_gradient_checkpointing: bool = False) -> nn.Module:
    """A Vision Transformer with a new head of `num_labels` classes, on the CPU, in training mode.

    Args:
        model_name: `vit-tiny`, the course's small one, with random weights; a name on the hub or a folder, with its own.
        num_labels: classes; the head of another number that the weights bring is replaced.
        torch_dtype: of all parameters.
        enable_gradient_checkpointing: activations are computed again in the backward pass instead of kept.
    """
    # BEGIN SOLUTION 5.4
    if model_name == "vit-tiny":
        model = ViTForImageClassification(ViTConfig(num_labels=num_labels, **VIT_TINY)).to(torch_dtype)
    else:
        model = AutoModelForImageClassification.from_pretrained(
            model_name, num_labels=num_labels, dtype=torch_dtype, ignore_mismatched_sizes=True)
    if enable_gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()
    # END SOLUTION


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a model: the children of its longest `ModuleList`."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len)) if lists else []


# --- Task 5.5 -------------------------------------------------------------------------------------------------------


def wrap_model(model: nn.Module, method: str, device: torch.device) -> nn.Module:
    """The model on its device, and for `ddp` and `fsdp2` wrapped so that backward passes also communicate.

    FSDP2: `fully_shard` each block first, and then the model, over a mesh of all ranks. The blocks are gathered one at a time, so
    only one is whole at once.
    """
    # BEGIN SOLUTION 5.5
    model = model.to(device)
    if method == "ddp":
        return nn.parallel.DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    if method == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for block in blocks(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model
    # END SOLUTION


def initialize_deepspeed_model(model: nn.Module, config_path: str | Path, *, micro_batch_size: int,
                               gradient_accumulation_steps: int, learning_rate: float):
    """A DeepSpeed engine around the model, by a configuration file of lab 02.

    Args:
        config_path: a JSON file whose sizes and learning rate are "auto"; `Trainer` would fill them in, and here you do.
        micro_batch_size, gradient_accumulation_steps, learning_rate: what they become; the global batch too.

    Returns:
        The engine.
    """
    # BEGIN SOLUTION 5.5
    config = json.loads(Path(config_path).read_text())
    config |= {"train_micro_batch_size_per_gpu": micro_batch_size, "gradient_accumulation_steps": gradient_accumulation_steps,
               "train_batch_size": micro_batch_size * gradient_accumulation_steps * dist.get_world_size()}
    config["optimizer"] = {"type": "AdamW", "params": {"lr": learning_rate, "torch_adam": True}}
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    # END SOLUTION


# --- Task 5.6 -------------------------------------------------------------------------------------------------------


def train_epoch_standard(model, loader, optimizer, device: torch.device, gradient_accumulation_steps: int,
                         dtype: torch.dtype = torch.float32) -> list[float]:
    """One epoch of a model that is no DeepSpeed engine, with autocast where the dtype is not float32.

    Each optimizer step is the mean over `gradient_accumulation_steps` micro-batches; those that are left at the end of an epoch
    are dropped. With DDP, gradients are reduced in the last micro-batch of a step only (`no_sync` in the others).

    Returns:
        The loss of each optimizer step: the mean over its micro-batches and over all ranks.
    """
    # BEGIN SOLUTION 5.6
    model.train()
    losses, step = [], []
    for images, labels in loader:
        last = len(step) + 1 == gradient_accumulation_steps
        quiet = contextlib.nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync()
        with quiet, torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(pixel_values=images.to(device), labels=labels.to(device)).loss
            (loss / gradient_accumulation_steps).backward()
        step.append(loss.detach())
        if last:
            optimizer.step()
            optimizer.zero_grad()
            losses.append(mean_over_ranks(torch.stack(step).mean()))
            step = []
    optimizer.zero_grad()
    return losses
    # END SOLUTION


def train_epoch_deepspeed(engine, loader, device: torch.device) -> list[float]:
    """The same with DeepSpeed's engine, which divides, accumulates, reduces and steps by itself."""
    # BEGIN SOLUTION 5.6
    engine.train()
    losses, step = [], []
    for images, labels in loader:
        loss = engine(pixel_values=images.to(device), labels=labels.to(device)).loss
        engine.backward(loss)
        last = engine.is_gradient_accumulation_boundary()
        engine.step()
        step.append(loss.detach().float())
        if last:
            losses.append(mean_over_ranks(torch.stack(step).mean()))
            step = []
    return losses
    # END SOLUTION


# --- Task 5.7 -------------------------------------------------------------------------------------------------------


def evaluate(model, loader, device: torch.device) -> dict[str, float]:
    """Loss, top-1 and top-5 over the rows of all ranks, of which some may have more than others.

    torchmetrics' `MulticlassAccuracy` adds up counts over the ranks when `compute` is called; the loss is a sum over rows, added up
    over the ranks too. Under ZeRO-3 and FSDP2 each forward pass gathers: a rank with one batch fewer must take part with an empty
    turn, so every rank makes as many forward passes as the one that has most.
    """
    # BEGIN SOLUTION 5.7
    raise NotImplementedError
    # END SOLUTION


# --- Task 5.8 -------------------------------------------------------------------------------------------------------


def bytes_sent(collective: str, size: int, ranks: int) -> float:
    """Bytes that each rank sends in one collective by the ring algorithm.

    Args:
        collective: `all-reduce`, `all-gather`, `reduce-scatter` or `broadcast`.
        size: bytes of the whole tensor: what is reduced; what is there after an all-gather; what is there before a reduce-scatter.
        ranks: N.

    Returns:
        (N − 1) / N of the size; an all-reduce is a reduce-scatter and an all-gather, so twice that.

    Source: NCCL's performance notes, https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
    """
    # BEGIN SOLUTION 5.8
    share = (ranks - 1) / ranks * size
    return 2 * share if collective == "all-reduce" else share
    # END SOLUTION
