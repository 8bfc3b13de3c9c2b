"""Lab 05, multi-GPU: one experiment runner for every data-parallel way to train, measured against each other.

You complete 15 functions. `train_method` puts them together; `launch` starts it on each rank.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from shardlab.hardware import ROOT
from shardlab.run.experiment import Experiment
from shardlab.run.run_folder import Run
from shardlab.run.trace import Collective, collectives, profile_to
from shardlab.zero import ops
from shardlab.zero.held_bytes import held_before_step

os.environ.update(ops.environment())  # DeepSpeed reads the device and the folder of its compiled ops when it is imported

CONFIGS = ROOT / "labs" / "lab05_multi_gpu" / "configs"
"""DeepSpeed configurations by method, with "auto" where a size or the learning rate is due."""
DEEPSPEED_METHODS = ("single_gpu_offload", "zero1", "zero2", "zero3", "zeropp")
METHODS = ("single_gpu_simple", "single_gpu_offload", "ddp", "fsdp2", "zero1", "zero2", "zero3", "zeropp")
IGNORED = -100
"""The label of a row that only fills up a rank's share: it counts in no loss and no accuracy."""

# --- Task 5.1 -------------------------------------------------------------------------------------------------------


def setup_distributed() -> tuple[torch.device, int, int, int]:
    """Join the process group of the ranks that a launcher has started, or make one of this process alone.

    A launcher sets RANK, LOCAL_RANK and WORLD_SIZE, and where the ranks meet. Where RANK is not set, this is
    a lone process, rank 0 of 1, whatever the other two say: a login shell or a Slurm job may have set them. A
    lone process has no meeting place: `init_process_group(…, store=dist.HashStore(), rank=0, world_size=1)`.
    A group that is there already stays, so a second call returns the same; the GPU is looked at and chosen as
    without it. The environment stays as it is. NCCL connects GPUs, gloo CPUs.

    Returns:
        The device, rank, local rank and world size. The device is `cuda:<local rank>`, and torch's current
        one from then on; the CPU where torch sees no GPU.

    Raises:
        ValueError: torch sees GPUs, and none of this local rank's number; the sentence names the local rank
            and the count of GPUs. No group has been made then.
    """
    # BEGIN SOLUTION 5.1
    rank, local_rank, world_size = 0, 0, 1
    if "RANK" in os.environ:
        rank, local_rank, world_size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"local rank {local_rank} has no GPU of its own: torch sees {torch.cuda.device_count()}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **alone)
    return device, rank, local_rank, world_size
    # END SOLUTION


def cleanup_distributed() -> None:
    """Leave the process group, if there is one. A rank that ends without it leaves its neighbours a broken
    connection.
    """
    # BEGIN SOLUTION 5.1
    if dist.is_initialized():
        dist.destroy_process_group()
    # END SOLUTION


# --- Task 5.2 -------------------------------------------------------------------------------------------------------


def create_image_transforms(image_size: int, mean: list[float], std: list[float]) -> tuple[Callable, Callable]:
    """Two functions that make a model's input of a `PIL.Image` of any size and mode: for training, and for
    validation.

    Both: convert to RGB, resize to the square (`Image.Resampling.BILINEAR`), scale 0…255 to 0…1, subtract the
    mean, divide by the deviation. The one for training then mirrors half of the images, left and right
    exchanged, by torch's random numbers; the one for validation draws nothing. The image stays as it is, and
    each tensor has memory of its own.

    Args:
        image_size: height and width that the model takes, pixels.
        mean, std: of the model's own image processor: a number per channel, on the scale of 0 to 1.

    Returns:
        The two functions. Each gives a float32 tensor on the CPU of shape [3, image_size, image_size]:
        channel, row, column.
    """
    # BEGIN SOLUTION 5.2
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))

    def validation(image: Image.Image) -> torch.Tensor:
        image = image.convert("RGB").resize((image_size, image_size), Image.Resampling.BILINEAR)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image_size, image_size, 3)
        return (pixels.permute(2, 0, 1).float() / 255 - mean) / std

    def training(image: Image.Image) -> torch.Tensor:
        tensor = validation(image)
        return tensor.flip(2) if torch.rand(()) < 0.5 else tensor

    return training, validation
    # END SOLUTION


# --- Task 5.3 -------------------------------------------------------------------------------------------------------


class Transformed(Dataset):
    """Rows of a data set of images and labels, the image made a tensor when it is read."""

    def __init__(self, rows, transform: Callable):
        self.rows, self.transform = rows, transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int):
        image, label = self.rows[number]
        return self.transform(image), label


class FilledUp(Dataset):
    """A data set to which rows are added until its length is a multiple of `ranks`: its last image, with the
    label `IGNORED`.
    """

    def __init__(self, rows: Dataset, ranks: int):
        self.rows, self.length = rows, math.ceil(len(rows) / ranks) * ranks

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int):
        image, label = self.rows[min(number, len(self.rows) - 1)]
        return image, label if number < len(self.rows) else IGNORED


def create_data_loaders(train_set: Dataset, test_set: Dataset, *, micro_batch_size: int, rank: int, world_size: int, seed: int = 0):
    """This rank's loaders, for training and for evaluation. All ranks get equally many batches, or some would
    wait for ever.

    Training: rows in an order that `seed` and the epoch draw, the same on all ranks, dealt to them. Where the
    rows do not divide by the ranks, the few that are over are left out of this epoch (`drop_last` of the
    sampler); no row is seen twice. The next epoch leaves out others, if it is told its number:
    `loader.sampler.set_epoch(epoch)`. A row is read when its batch is due, in each epoch anew: the transform
    may draw. Torch's own random numbers stay as they are.

    Evaluation: each row once, in order, dealt to the ranks. Where the rows do not divide, nothing may be left
    out: `FilledUp` makes them divide. Neither loader leaves out a last batch that is smaller.

    Args:
        train_set, test_set: data sets of pairs, an image's tensor and a label.
        micro_batch_size: rows per rank and batch.
        rank, world_size: whose loaders these are; no process group is needed.
        seed: of the order in training.

    Returns:
        Two `DataLoader`s, each with a `DistributedSampler`, without worker processes. Memory is pinned where
        there is a GPU. A batch is images and int64 labels, as a `DataLoader` makes them by itself.
    """
    # BEGIN SOLUTION 5.3
    train_sampler = DistributedSampler(train_set, world_size, rank, shuffle=True, seed=seed, drop_last=True)
    test_set = FilledUp(test_set, world_size)
    test_sampler = DistributedSampler(test_set, world_size, rank, shuffle=False)
    settings = {"batch_size": micro_batch_size, "pin_memory": torch.cuda.is_available()}
    return DataLoader(train_set, sampler=train_sampler, **settings), DataLoader(test_set, sampler=test_sampler, **settings)
    # END SOLUTION


# --- Task 5.4 -------------------------------------------------------------------------------------------------------


def load_vit_model(model_name: str, num_labels: int, torch_dtype: torch.dtype = torch.float32,
                   enable_gradient_checkpointing: bool = False) -> nn.Module:
    """A Vision Transformer with a head of `num_labels` classes, on the CPU, in training mode.

    Args:
        model_name: `vit-tiny` is built from `shardlab.data.models.vit_config`, with random weights from
            torch's generator (`ViTForImageClassification`). Anything else is a name on the hub or a folder,
            of a model of any kind for images, and brings its weights
            (`AutoModelForImageClassification.from_pretrained`). Where its head has another number of classes,
            the head is new: `ignore_mismatched_sizes=True`.
        num_labels: classes.
        torch_dtype: of all parameters, in whatever type a folder has them.
        enable_gradient_checkpointing: compute activations anew in the backward pass instead of keeping them.

    Source: https://huggingface.co/docs/transformers/model_doc/vit
    """
    # BEGIN SOLUTION 5.4
    from transformers import AutoModelForImageClassification, ViTForImageClassification

    from shardlab.data.models import vit_config

    if model_name == "vit-tiny":
        model = ViTForImageClassification(vit_config(model_name, num_labels)).to(torch_dtype)
    else:
        model = AutoModelForImageClassification.from_pretrained(
            model_name, num_labels=num_labels, dtype=torch_dtype, ignore_mismatched_sizes=True)
    if enable_gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()
    # END SOLUTION


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a model: what is in its longest `ModuleList`."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len)) if lists else []


# --- Task 5.5 -------------------------------------------------------------------------------------------------------


def wrap_model(model: nn.Module, method: str, device: torch.device) -> nn.Module:
    """The model on its device, and ready for a method that is not DeepSpeed's.

    - `single_gpu_simple`: on its device, else as it is.
    - `ddp`: in `DistributedDataParallel`. Each rank holds all; gradients are averaged in the backward pass,
      in buckets of torch's own size.
    - `fsdp2`: sharded by `fully_shard`, over a mesh (`init_device_mesh`) of all ranks, of that device's kind, on
      however many machines. Without one torch would take the machine's GPU, though the model is on its CPU.
      Every block first (`blocks_of`), then the whole model: what is sharded together is gathered together. With
      the whole model alone there would be one gather of everything.

    Args:
        method: one of the three.

    Returns:
        The model to train. `fully_shard` changes the model itself.

    Raises:
        ValueError: another method; the sentence names it.

    Source: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
    """
    # BEGIN SOLUTION 5.5
    model = model.to(device)
    if method == "single_gpu_simple":
        return model
    if method == "ddp":
        return nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    if method != "fsdp2":
        raise ValueError(f"method {method!r}: wrap_model knows single_gpu_simple, ddp and fsdp2")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in (*blocks_of(model), model):
        fully_shard(module, mesh=mesh)
    return model
    # END SOLUTION


# --- Task 5.6 -------------------------------------------------------------------------------------------------------


def initialize_deepspeed_model(model: nn.Module, config_path: str | Path, *, micro_batch_size: int,
                               gradient_accumulation_steps: int, learning_rate: float, torch_dtype: torch.dtype = torch.float32):
    """A DeepSpeed engine around the model. `Trainer` is not there to fill in "auto": you do.

    Args:
        config_path: a JSON file, such as those in `CONFIGS`. The micro-batch, the accumulation, the global
            batch (over all ranks of the process group) and the optimizer's `lr` are "auto" in it, or numbers,
            which are replaced too. All other entries are for DeepSpeed, as they are. The file stays as it is.
        micro_batch_size: rows per rank and forward pass.
        gradient_accumulation_steps: forward passes per optimizer step.
        learning_rate: for `optimizer.params.lr`.
        torch_dtype: where it is not float32, the engine computes under autocast with it. An autocast around
            the engine has no effect: the entry `torch_autocast`, {"enabled": True, "dtype": …} with torch's
            name of the type such as "bfloat16", has. DeepSpeed refuses it together with
            `zero_quantized_weights`: a file that has this on gets `bf16`, {"enabled": True}, instead, and its
            parameters are in bf16 then.

    Returns:
        The engine.

    Raises:
        ValueError: anything else is "auto", however deep; the sentence names its path, such as
            `bf16.enabled`. Or the file has no `optimizer`; the sentence says so. No engine has been made
            then.
    """
    # BEGIN SOLUTION 5.6
    import deepspeed

    config = json.loads(Path(config_path).read_text())
    if "optimizer" not in config:
        raise ValueError(f"{config_path} names no optimizer, and none is given")
    config["train_micro_batch_size_per_gpu"] = micro_batch_size
    config["gradient_accumulation_steps"] = gradient_accumulation_steps
    config["train_batch_size"] = micro_batch_size * gradient_accumulation_steps * dist.get_world_size()
    config["optimizer"].setdefault("params", {})["lr"] = learning_rate
    if torch_dtype != torch.float32 and config.get("zero_optimization", {}).get("zero_quantized_weights"):
        config["bf16"] = {"enabled": True}
    elif torch_dtype != torch.float32:
        config["torch_autocast"] = {"enabled": True, "dtype": str(torch_dtype).removeprefix("torch.")}
    if left := auto_in(config):
        raise ValueError(f"{config_path}: {', '.join(left)} is 'auto', which only Trainer fills in; write a value")
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    # END SOLUTION


def auto_in(value, path: str = "") -> list[str]:
    """The paths at which a configuration says "auto", such as `bf16.enabled`."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * (value == "auto") + [found for key, below in inner for found in auto_in(below, f"{path}.{key}".lstrip("."))]


# --- Task 5.7 -------------------------------------------------------------------------------------------------------


def mean_over_ranks(value: torch.Tensor) -> float:
    """The mean of a number of which each rank has one. All ranks must call it."""
    value = value.detach().clone().float()
    dist.all_reduce(value)
    return value.item() / dist.get_world_size()


def whole_steps(loader, gradient_accumulation_steps: int):
    """The batches of a loader without those at its end that make no whole optimizer step."""
    return itertools.islice(loader, len(loader) // gradient_accumulation_steps * gradient_accumulation_steps)


def train_epoch_standard(model: nn.Module, loader, optimizer, device: torch.device, gradient_accumulation_steps: int,
                         dtype: torch.dtype = torch.float32) -> list[float]:
    """Train over the loader once (`whole_steps` of it), without DeepSpeed.

    A step's gradient is the mean over its micro-batches and over the ranks. DDP would average over the ranks
    after each backward pass; only that of a step's last micro-batch needs it, so the others run within
    `model.no_sync()`, forward pass included. What has no `no_sync` needs none: FSDP2 reduces after each backward
    pass and lets its parameters go, so that no rank keeps whole ones; leave its settings alone. Gradients that
    are left from before are cleared first. They are not clipped.

    Args:
        model: from `wrap_model`; it may be in evaluation mode. Called as `model(pixel_values=…, labels=…)`,
            it returns the loss as `.loss`.
        loader: batches of images and labels, on the CPU. It has a length, and gives one batch after the other;
            all of them together need not fit in memory.
        gradient_accumulation_steps: micro-batches per optimizer step.
        dtype: where it is not float32, the forward pass runs under `torch.autocast` with it.

    Returns:
        A loss per optimizer step: the mean over its micro-batches and over all ranks (`mean_over_ranks`); an
        empty list where the loader has no whole step.
    """
    # BEGIN SOLUTION 5.7
    model.train()
    losses, step = [], []
    optimizer.zero_grad()
    for images, labels in whole_steps(loader, gradient_accumulation_steps):
        last = len(step) + 1 == gradient_accumulation_steps
        with contextlib.ExitStack() as stack:
            if not last and hasattr(model, "no_sync"):
                stack.enter_context(model.no_sync())
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = model(pixel_values=images.to(device), labels=labels.to(device)).loss
            (loss / gradient_accumulation_steps).backward()
        step.append(loss.detach())
        if last:
            optimizer.step()
            optimizer.zero_grad()
            losses.append(mean_over_ranks(torch.stack(step).mean()))
            step = []
    return losses
    # END SOLUTION


def train_epoch_deepspeed(engine, loader, device: torch.device) -> list[float]:
    """The same with a DeepSpeed engine, which scales, accumulates, averages and steps by itself.

    Args:
        engine: from `initialize_deepspeed_model`; `engine.gradient_accumulation_steps()` says how many
            micro-batches make a step.
        loader, device: as above.

    Returns:
        As above.
    """
    # BEGIN SOLUTION 5.7
    engine.train()
    count = engine.gradient_accumulation_steps()
    losses = []
    for images, labels in whole_steps(loader, count):
        loss = engine(pixel_values=images.to(device), labels=labels.to(device)).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return [mean_over_ranks(torch.stack(losses[at : at + count]).mean()) for at in range(0, len(losses), count)]
    # END SOLUTION


# --- Task 5.8 -------------------------------------------------------------------------------------------------------


def evaluate(model, loader, device: torch.device, num_classes: int) -> dict[str, float]:
    """Loss and accuracy over the rows of all ranks: what one process would get for all rows. Of a model and
    of an engine alike.

    Rows with the label `IGNORED` count nowhere, and a batch may hold nothing else (torchmetrics takes no
    empty batch); but the model is called for it all the same: under FSDP2 and ZeRO-3 each call gathers
    parameters, and all ranks must take part. A mean over ranks of means would weigh the rows of a small share
    more, so sums and counts are added up: `torchmetrics.classification.MulticlassAccuracy`
    (`average="micro"`, `top_k`) does that when its `compute` is called; for the loss you do, in float32
    whatever the model's type is. All of it is on the device: NCCL adds up nothing else.

    Args:
        model: called itself, with its wrapper or engine, as `model(pixel_values=…)`, it returns `.logits` of
            shape [rows, num_classes].
        loader: from `create_data_loaders`.
        num_classes: classes.

    Returns:
        `loss`, the mean cross-entropy of a row; `top1` and `top5`, the share of rows whose label has the
        highest logit, or one of the five highest; numbers from 0 to 1. The same on every rank. No gradient is
        kept (`torch.no_grad`; under `inference_mode` FSDP2 would gather tensors that cannot be trained on).
        Afterwards gradients are computed as before, and the model is in training or evaluation mode as
        before. (An engine's own `training` is always
        True; that of its `module` says which.)
    """
    # BEGIN SOLUTION 5.8
    from torchmetrics.classification import MulticlassAccuracy

    accuracy = {k: MulticlassAccuracy(num_classes, top_k=k, average="micro").to(device) for k in (1, 5)}
    sums = torch.zeros(2, device=device)
    was_training = getattr(model, "module", model).training
    model.eval()
    with torch.no_grad():
        for images, labels in loader:
            labels = labels.to(device)
            counted = labels != IGNORED
            logits = model(pixel_values=images.to(device)).logits.float()[counted]
            for metric in accuracy.values() if counted.any() else ():
                metric.update(logits, labels[counted])
            sums += torch.stack([functional.cross_entropy(logits, labels[counted], reduction="sum"), counted.sum()])
    model.train(was_training)
    dist.all_reduce(sums)
    top1, top5 = (metric.compute().item() for metric in accuracy.values())
    return {"loss": (sums[0] / sums[1]).item(), "top1": top1, "top5": top5}
    # END SOLUTION


# --- Task 5.9 -------------------------------------------------------------------------------------------------------


def bytes_sent(collective: str, size: int, ranks: int) -> float:
    """Bytes that each rank sends in one collective over a ring of `ranks`.

    Args:
        collective: `all-reduce`, `all-gather`, `reduce-scatter`, `all-to-all`, or `broadcast`.
        size: bytes of the whole tensor: what is reduced or broadcast; what is there after an all-gather;
            what a rank has before a reduce-scatter or an all-to-all.
        ranks: N, at least 1.

    Returns:
        All-gather and reduce-scatter pass N − 1 of N pieces on: size · (N − 1) / N. An all-reduce is one of
        each, so twice that. In an all-to-all a rank keeps one of its N pieces and sends each of the others to
        the rank that it is for: size · (N − 1) / N. In a broadcast all but the last rank pass everything on:
        size · (N − 1) / N in the mean over the ranks.

    Raises:
        ValueError: another collective, or fewer than 1 rank; the sentence names it.

    Source: https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md, "Bus bandwidth"
    """
    # BEGIN SOLUTION 5.9
    times = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "all-to-all": 1, "broadcast": 1}
    if collective not in times:
        raise ValueError(f"collective {collective!r}: use one of {', '.join(times)}")
    if ranks < 1:
        raise ValueError(f"{ranks} ranks: at least 1 is needed")
    return times[collective] * size * (ranks - 1) / ranks
    # END SOLUTION


def communication_table(found: list[Collective], ranks: int, steps: int) -> dict[str, dict[str, float]]:
    """What one rank sends per optimizer step, by collective.

    Args:
        found: the collectives of that rank's trace, `shardlab.run.trace.collectives(path)`: each with `name`,
            `bytes`, those of the whole tensor, and `ranks`, how many took part; None where the trace does not
            say. (ZeRO++ on 8 GPUs gathers within pairs: `ranks` is 2 there.)
        ranks: all there are; for the collectives whose own `ranks` is None.
        steps: optimizer steps in the trace.

    Returns:
        For each collective in the trace, in the order of their first calls: `calls`, `bytes` (of the whole
        tensors) and `sent` (by `bytes_sent`), each divided by the steps.

    Raises:
        ValueError: that of `bytes_sent`, for a collective that it does not know.
    """
    # BEGIN SOLUTION 5.9
    table: dict[str, dict[str, float]] = {}
    for one in found:
        row = table.setdefault(one.name, {"calls": 0.0, "bytes": 0.0, "sent": 0.0})
        row["calls"] += 1 / steps
        row["bytes"] += one.bytes / steps
        row["sent"] += bytes_sent(one.name, one.bytes, one.ranks or ranks) / steps
    return table
    # END SOLUTION


# --- Task 5.10 ------------------------------------------------------------------------------------------------------


def measure_throughput(take_step: Callable[[], None], samples_per_step: int, device: torch.device, *,
                       warm_up_steps: int = 2, measured_steps: int = 5) -> float:
    """Samples per second, without the first steps, in which memory is taken, kernels are loaded and buckets
    are arranged.

    A GPU works on after a call has returned. So the clock (`time.perf_counter`) is read when the device has
    done its work: `torch.cuda.synchronize(device)` before each of the two readings, where the device is a
    GPU. Between them nothing waits for the GPU, as nothing does in training.

    Args:
        take_step: called without arguments, takes one optimizer step.
        samples_per_step: over all ranks.
        warm_up_steps: taken first, and not measured.
        measured_steps: taken between the two readings.
    """
    # BEGIN SOLUTION 5.10
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    for _ in range(warm_up_steps):
        take_step()
    begun = now()
    for _ in range(measured_steps):
        take_step()
    return measured_steps * samples_per_step / (now() - begun)
    # END SOLUTION


def get_memory_stats(device: torch.device) -> dict[str, float]:
    """The most memory that this process has had so far, in GB (10⁹ bytes). Asking changes nothing.

    Returns:
        On a GPU: `peak_allocated_gb`, of tensors, and `peak_reserved_gb`, what torch's allocator took from
        the GPU for them. On a CPU both are the largest resident memory of the process, `ru_maxrss` of
        `resource.getrusage(resource.RUSAGE_SELF)`, which Linux counts in KiB.
    """
    # BEGIN SOLUTION 5.10
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    else:
        allocated = reserved = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_allocated_gb": allocated / 1e9, "peak_reserved_gb": reserved / 1e9}
    # END SOLUTION


# --- Task 5.11 ------------------------------------------------------------------------------------------------------

RESULT_KEYS = ("method", "not_run", "final_accuracy", "final_top5", "eval_loss", "train_losses", "epoch_duration", "throughput",
               "held_bytes", "peak_memory_gb", "communication")


def why_not(method: str, device: torch.device, world_size: int) -> str:
    """What keeps a method from running here; empty if nothing does."""
    if method.startswith("single_gpu") and world_size > 1:
        return f"it is for one rank, and there are {world_size}"
    if method == "zeropp" and device.type != "cuda":
        return "ZeRO++ quantizes by a CUDA kernel, and there is no GPU"
    if method == "zeropp" and world_size % 2:
        return f"its configuration keeps a copy of the parameters on each pair of ranks, and there are {world_size}"
    return ""


def run_training_experiment(method: str, model_name: str, train_loader, test_loader, rank: int, world_size: int, *,
                            device: torch.device, num_labels: int, num_epochs: int, micro_batch_size: int,
                            gradient_accumulation_steps: int, learning_rate: float,
                            torch_dtype: torch.dtype = torch.float32, enable_gradient_checkpointing: bool = False,
                            seed: int = 0, enable_profiling: Path | None = None) -> dict:
    """Train one model by one method, evaluate it, and measure. All ranks call it, within a process group.

    Args:
        method: one of `METHODS`.
        model_name, num_labels, enable_gradient_checkpointing: for `load_vit_model`; its parameters are
            float32, and `torch_dtype` is what autocast computes in.
        train_loader, test_loader: from `create_data_loaders`.
        num_epochs: passes over the training data, each told its number. With 0 the model is evaluated as it is.
        micro_batch_size, gradient_accumulation_steps, learning_rate: of the training; AdamW, whose other
            settings are torch's defaults, or what the method's file in `CONFIGS` says.
        seed: set (`torch.manual_seed`) before the model is loaded, so that all methods begin with the same
            weights.
        enable_profiling: a folder, in which this rank's trace of two steps is written as `rank<rank>.json`
            (`profile_to`); None for none.

    Returns:
        A dictionary with all of `RESULT_KEYS`, whatever has happened. `not_run` is the reason of `why_not`;
        empty where the method ran. Then the others are: `final_accuracy`, `final_top5` and `eval_loss` after
        the last epoch; `train_losses`, one per step, all epochs in one list; `epoch_duration`, seconds, one
        per epoch. What follows is measured after the evaluation, so that it changes no score, by steps that
        take the training loader's first micro-batch again and again: `throughput`, samples/s; `held_bytes`,
        `vars(…)` of what `held_before_step` returns; `peak_memory_gb`, what `get_memory_stats` calls
        `peak_allocated_gb`; `communication`, the `communication_table` of the trace. What there is not is None.

    Raises:
        ValueError: no such method; the sentence names it.
    """
    # BEGIN SOLUTION 5.11
    if method not in METHODS:
        raise ValueError(f"method {method!r}: use one of {', '.join(METHODS)}")
    result = dict.fromkeys(RESULT_KEYS) | {"method": method, "not_run": why_not(method, device, world_size)}
    if result["not_run"]:
        return result
    torch.manual_seed(seed)
    model = load_vit_model(model_name, num_labels, enable_gradient_checkpointing=enable_gradient_checkpointing)
    if method in DEEPSPEED_METHODS:
        model = initialize_deepspeed_model(
            model, CONFIGS / f"{method}.json", micro_batch_size=micro_batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps, learning_rate=learning_rate, torch_dtype=torch_dtype)
        optimizer = model.optimizer
    else:
        model = wrap_model(model, method, device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)

    def train(batches) -> list[float]:
        if method in DEEPSPEED_METHODS:
            return train_epoch_deepspeed(model, batches, device)
        return train_epoch_standard(model, batches, optimizer, device, gradient_accumulation_steps, torch_dtype)

    losses, seconds = [], []
    for epoch in range(num_epochs):
        train_loader.sampler.set_epoch(epoch)
        begun = time.perf_counter()
        losses += train(train_loader)
        seconds.append(time.perf_counter() - begun)
    scores = evaluate(model, test_loader, device, num_labels)
    step = [next(iter(train_loader))] * gradient_accumulation_steps
    result |= {
        "final_accuracy": scores["top1"], "final_top5": scores["top5"], "eval_loss": scores["loss"],
        "train_losses": losses, "epoch_duration": seconds,
        "throughput": measure_throughput(
            lambda: train(step), micro_batch_size * gradient_accumulation_steps * world_size, device),
        "held_bytes": vars(held_before_step(model, optimizer, lambda: train(step))),
        "peak_memory_gb": get_memory_stats(device)["peak_allocated_gb"],
    }
    if enable_profiling is not None:
        path = Path(enable_profiling, f"rank{rank}.json")
        profile_to(path, lambda: train(step), steps=2)
        result["communication"] = communication_table(collectives(path), world_size, steps=2)
    return result
    # END SOLUTION


# --- Given ----------------------------------------------------------------------------------------------------------


class Counted:
    """A training loader that says, once a second at most, how far it has come."""

    def __init__(self, loader: DataLoader, say: Callable[[str], None]):
        self.loader, self.sampler, self.say, self.said = loader, loader.sampler, say, 0.0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        for number, batch in enumerate(self.loader, 1):
            if time.monotonic() - self.said > 1:
                self.say(f"epoch {self.sampler.epoch + 1}, micro-batch {number} of {len(self)}")
                self.said = time.monotonic()
            yield batch


def method_experiment(method: str, *, ranks: int, epochs: int = 1, train_images: int = 1010, test_images: int = 505,
                      trace: bool = True, checkpointing: bool = False, **changes) -> Experiment:
    """What to train by one method. `single_gpu_…` takes one rank, with as many micro-batches more.

    Args:
        method: one of `METHODS`.
        ranks: of the other methods.
        epochs, train_images, test_images: how long, and how many images of each split.
        trace: whether two steps are profiled.
        checkpointing: whether activations are computed anew in the backward pass.
        changes: fields of the experiment.
    """
    own_ranks = 1 if method.startswith("single_gpu") else ranks
    settings = {
        "program": "exercises.lab05_multi_gpu:train_method", "method": method, "ranks": own_ranks,
        "model": "vit-tiny", "data": "drawn", "micro_batch": 16, "accumulation": 2 * ranks // own_ranks,
        "epochs": epochs, "learning_rate": 1e-3, "train_examples": train_images, "eval_examples": test_images,
        "options": {"trace": trace, "checkpointing": checkpointing}}
    if method in DEEPSPEED_METHODS:
        settings["deepspeed"] = json.loads(Path(CONFIGS, f"{method}.json").read_text())
    return Experiment(**({"name": f"lab05-{method}"} | settings | changes))


def rows_of_head(classes: int) -> int:
    """The rows of a head for so many classes: the next multiple of 64. ZeRO++ quantizes eight elements at a time, and each
    rank's part of each parameter must be such a multiple. No label has the rows that are over, so they learn to stay small.
    """
    return math.ceil(classes / 64) * 64


def train_method(experiment: Experiment, run: Run) -> dict:
    """What every rank runs: your functions, put together. `shardlab.run.launch` calls it with the experiment
    and its run folder.

    The experiment's `options`: `trace`, whether two steps are profiled, into the run folder; `checkpointing`, whether
    activations are computed anew in the backward pass.
    """
    from shardlab.data.images import load_images
    from shardlab.data.models import image_settings
    from shardlab.run.tracking import tracked

    def say(what: str = "") -> None:
        if rank == 0:
            run.doing(what)

    device, rank, _, world_size = setup_distributed()
    images = load_images(experiment.data, train=experiment.train_examples, validation=experiment.eval_examples)
    for_training, for_validation = create_image_transforms(*image_settings(experiment.model))
    train_loader, test_loader = create_data_loaders(
        Transformed(images["train"], for_training), Transformed(images["validation"], for_validation),
        micro_batch_size=experiment.micro_batch, rank=rank, world_size=world_size, seed=experiment.seed)
    result = run_training_experiment(
        experiment.method, experiment.model, Counted(train_loader, say), test_loader, rank, world_size, device=device,
        num_labels=rows_of_head(len(images["train"].classes)), num_epochs=int(experiment.epochs),
        micro_batch_size=experiment.micro_batch, gradient_accumulation_steps=experiment.accumulation,
        learning_rate=experiment.learning_rate,
        torch_dtype={"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[experiment.precision],
        enable_gradient_checkpointing=experiment.options.get("checkpointing", False), seed=experiment.seed,
        enable_profiling=run.folder if experiment.options.get("trace") else None)
    say()
    losses, durations = result["train_losses"] or [], result["epoch_duration"] or []
    if rank == 0 and losses:
        with tracked(run) as track:
            for step, loss in enumerate(losses, 1):
                seconds = durations[(step - 1) * len(durations) // len(losses)] * len(durations) / len(losses)
                speed = round(experiment.global_batch / seconds, 3)
                run.log_step(step=step, loss=loss, seconds=round(seconds, 4), steps=len(losses), samples_per_second=speed)
                track(step, loss=loss, samples_per_second=speed)
    return result
