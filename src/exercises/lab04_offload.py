"""Lab 04, offload: keep states on the host or on disk, count what moves, and pay for it as little as possible.

You complete twelve functions in eight tasks. The milestones run them on two real ranks, with DeepSpeed's compiled ops and libaio.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import torch

from shardlab.run.collectives import barrier, rank
from shardlab.zero.nvme import parameters_renewed, swapped_groups, without_its_nvme_part

# --- Task 4.1 -------------------------------------------------------------------------------------------------------

AIO = {"block_size": 1048576, "queue_depth": 8, "intra_op_parallelism": 1, "single_submit": False, "overlap_events": True}
"""DeepSpeed's settings for reading and writing through libaio, with their defaults. Sizes in bytes."""


def create_offload_config(stage: int, *, optimizer_offload: bool = False, param_offload: bool = False,
                          offload_device: str = "cpu", nvme_path: str | Path | None = None, pin_memory: bool = True,
                          aio: dict | None = None, largest_parameter: int | None = None, bytes_on_disk: int = 0) -> dict:
    """The part of a DeepSpeed configuration that says where the states are.

    Args:
        stage: 0, 1, 2 or 3.
        optimizer_offload: the optimizer states go to `offload_device`, and Adam's step runs on the host; stages 1 to 3.
        param_offload: the parameters go to `offload_device`; stage 3 only.
        offload_device: "cpu" or "nvme". Below stage 3 DeepSpeed takes "nvme" for "cpu" and does not say so.
        nvme_path: a folder on the disk; ignored with "cpu".
        pin_memory: lock the host's copies into memory, so that the GPU's copy engine can reach them.
        aio: values other than those that `AIO` has, by its keys; ignored with "cpu".
        largest_parameter: elements of the model's largest parameter; needed for parameters on NVMe, which pass through
            buffers of one size.
        bytes_on_disk: bytes that this machine's ranks will write.

    Returns:
        {"zero_optimization": {"stage": stage, …}}. With an offload, there is `offload_optimizer` or `offload_param` or both
        in it, each {"device": …, "pin_memory": …}, and with "nvme" also "nvme_path" as a string. With "nvme" the result
        has a second key, "aio": `AIO` with your settings over it. Parameters on NVMe also need `buffer_size` in
        `offload_param`, which is `largest_parameter`; and next to it in `zero_optimization` `stage3_max_live_parameters`
        and `stage3_max_reuse_distance`, both 0. Otherwise stage 3 keeps parameters gathered, each holds its buffer, and
        training ends in "Not enough buffers".

    Raises:
        ValueError: with a sentence that names the argument and its value (of a path, the path; of an offload that the stage does
            not allow, the stage), for
            an unknown stage or device;
            `param_offload` without stage 3, `optimizer_offload` at stage 0;
            and, where something is to be offloaded to "nvme":
            a stage below 3;
            no `nvme_path`, or an empty one, or a path that is no folder;
            a folder that cannot be written. Permissions do not tell (root may write, and nobody can on a read-only disk), and a
            full disk has room for an empty file: write a byte, and leave all as it was;
            less room on the disk than `bytes_on_disk` (`shutil.disk_usage`);
            a key that is not in `AIO`;
            parameters without `largest_parameter`.

    Source: https://www.deepspeed.ai/docs/config-json/, and deepspeed 0.19.8, `runtime/zero/offload_config.py`.
    """
    raise NotImplementedError("Task 4.1: complete create_offload_config() in src/exercises/lab04_offload.py")


def check_nvme_path(nvme_path: str | Path | None, bytes_on_disk: int) -> None:
    """Refuse a folder that cannot take the swapped states; `create_offload_config` says when.

    Raises:
        ValueError: no path, no folder, not writable, or less than `bytes_on_disk` free.
    """
    raise NotImplementedError("Task 4.1: complete check_nvme_path() in src/exercises/lab04_offload.py")


# --- Task 4.2 -------------------------------------------------------------------------------------------------------


def offload_bytes(stage: int, states: dict[str, int], shard: int, precision: str, *, optimizer_offload: bool = False,
                  param_offload: bool = False) -> dict[str, int]:
    """Bytes of model states that one rank holds just before an optimizer step of one micro-batch, with Adam and offload to the CPU.

    What is moved, by kind:

    Optimizer offload moves the 12 bytes per element to the host. No gradients stay on the device: each goes to the host as
    soon as it is reduced. There the step needs the shard's gradients in fp32, 4 bytes per element. Stage 3 holds them there a
    second time, in the parameters' precision: it adds up the micro-batches there, and does so for a single one too.
    Parameter offload moves `states["parameters"]` as it is, and nothing else.

    Args:
        stage: 1, 2 or 3.
        states: what the rank holds without offload, all of it on the device, as lab 02's `state_bytes` gives it: bytes by kind,
            {"parameters": …, "gradients": …, "optimizer": …}.
        shard: elements in the rank's shard, padding included, as lab 02's `shard_elements` gives them.
        precision: `fp32`, `bf16` or `fp16`, of parameters and gradients.
        optimizer_offload, param_offload: what is on the host.

    Returns:
        {"device": …, "host": …} in bytes.
    """
    raise NotImplementedError("Task 4.2: complete offload_bytes() in src/exercises/lab04_offload.py")


# --- Task 4.3 -------------------------------------------------------------------------------------------------------


def swapped_bytes(groups: list[list[int]], ranks: int) -> int:
    """Bytes of optimizer states that one rank has on disk, with the optimizer on NVMe.

    DeepSpeed swaps a sub-group as a whole: all its shards in one flat fp32 tensor each for master weights, momentum and
    variance. A tensor of less than 1 MiB (2²⁰ bytes) stays in memory. What is written is rounded up to whole blocks of
    1,024 bytes, since direct reads and writes need them.

    Args:
        groups: the sizes of the parameters, by sub-group, as `states.json` gives them under stage 3. Stage 3 cuts each
            parameter on its own, rounded up to a multiple of the ranks.
        ranks: N.
    """
    raise NotImplementedError("Task 4.3: complete swapped_bytes() in src/exercises/lab04_offload.py")


def bytes_found(nvme_path: str | Path, rank: int) -> int:
    """Bytes of optimizer states that one rank really has on disk.

    DeepSpeed writes into `zero_stage_3/optimizer/rank<rank>` below the path, a file a tensor. Files with `_gradient_` in their
    names are gradients, left over from the last step; they do not count.
    """
    raise NotImplementedError("Task 4.3: complete bytes_found() in src/exercises/lab04_offload.py")


# --- Task 4.4 -------------------------------------------------------------------------------------------------------


def compare_optimizers(make_first: Callable, make_second: Callable, elements: int, steps: int, seed: int = 0) -> dict[str, float]:
    """Take the same steps with two optimizers, and time them.

    Both begin with the same parameter, of normally distributed numbers, in a tensor of its own, and both get the same gradients,
    new ones for each step. `torch.randn(…, generator=torch.Generator().manual_seed(seed))` draws numbers that can be drawn again:
    for each optimizer, one generator draws the parameter first and then the gradients.

    Args:
        make_first, make_second: make an optimizer of a list of parameters, such as `DeepSpeedCPUAdam`.
        elements: of the parameter, fp32, on the CPU.
        steps: at least 2.
        seed: of parameter and gradients.

    Returns:
        `largest_difference`: the largest absolute difference between the two parameters after the last step; nan
        where one has an element that is nan.
        `first_seconds`, `second_seconds`: of one `step()`, the median of all steps but the first, which allocates the
        moments. Drawing the gradients and putting them in place is not timed.

    torch's own random generator and number of threads stay as they are.
    """
    raise NotImplementedError("Task 4.4: complete compare_optimizers() in src/exercises/lab04_offload.py")


# --- Task 4.5 -------------------------------------------------------------------------------------------------------


def fit_step_time(accumulations: list[int], seconds: list[float]) -> tuple[float, float]:
    """The line through measured times of an optimizer step: seconds = a · accumulation + b, by least squares.

    Args:
        accumulations: micro-batches an optimizer step; at least two different values.
        seconds: of one optimizer step, for each of them.

    Returns:
        a, the seconds of a micro-batch, and b, the seconds that each step costs besides.
    """
    raise NotImplementedError("Task 4.5: complete fit_step_time() in src/exercises/lab04_offload.py")


def share_kept(accumulation: int, plain: tuple[float, float], offloaded: tuple[float, float]) -> float:
    """The samples/s with offload as a share of those without, at the same accumulation and so at the same global batch.

    Args:
        accumulation: micro-batches an optimizer step.
        plain, offloaded: (a, b) of `fit_step_time`, without offload and with it.
    """
    raise NotImplementedError("Task 4.5: complete share_kept() in src/exercises/lab04_offload.py")


def accumulation_for(share: float, plain: tuple[float, float], offloaded: tuple[float, float]) -> int | None:
    """The smallest accumulation that keeps this share of the samples/s; None if none does.

    As the accumulation grows, the share comes closer and closer to a limit, the ratio of the two a. Say offload is slower in
    b as well, so the share grows with the accumulation.
    """
    raise NotImplementedError("Task 4.5: complete accumulation_for() in src/exercises/lab04_offload.py")


# --- Task 4.6 -------------------------------------------------------------------------------------------------------


def largest_model(bytes_of: Callable[[int], dict[str, int]], *, ranks: int, device_bytes: int, host_bytes: int) -> int:
    """The largest number of parameters whose states fit; activations come on top, so leave them out of `device_bytes`.

    Args:
        bytes_of: gives {"device": …, "host": …} of one rank for a whole number of parameters. Neither falls when that grows, and
            one of them grows too.
        ranks: on this machine.
        device_bytes: of each device, for model states.
        host_bytes: of this machine's memory, which its ranks share.

    Returns:
        The number of parameters; 0 if not even one fits. Try doubled sizes until one does not fit, then halve the gap.
    """
    raise NotImplementedError("Task 4.6: complete largest_model() in src/exercises/lab04_offload.py")


# --- Task 4.7 -------------------------------------------------------------------------------------------------------


def save_offloaded(engine, path: str | Path, tag: str, client_state: dict) -> Path:
    """Save a checkpoint of an engine whose optimizer states are on NVMe (stage 3). Every rank calls this.

    The engine saves all but the swapped tensors itself: `without_its_nvme_part`. Each rank saves those, a file for each of its
    sub-groups, so that only one must fit into memory: `path/tag/offloaded/rank<rank>-group<number>.pt`, in which
    `torch.save` has put {"master": …, "step": …, "exp_avg": …, "exp_avg_sq": …}. The step is Adam's own count (the engine's has
    steps in it that fp16 skipped), and the others are tensors on the CPU, on a machine with GPUs too. Saving a view saves the
    whole buffer behind it; `clone` what you save. No rank returns before all have written (`barrier`). A second save into the
    same place replaces the first: each rank removes its old files.

    Args:
        engine: DeepSpeed's, between two optimizer steps, after at least one.
        path: the folder of all checkpoints.
        tag: this checkpoint's folder in it.
        client_state: whatever the caller wants back.

    Returns:
        The folder of this checkpoint.
    """
    raise NotImplementedError("Task 4.7: complete save_offloaded() in src/exercises/lab04_offload.py")


# --- Task 4.8 -------------------------------------------------------------------------------------------------------


def load_offloaded(engine, path: str | Path, tag: str) -> dict:
    """Continue from a checkpoint that `save_offloaded` wrote, on as many ranks. Every rank calls this, before the first step.

    The engine loads its part: `without_its_nvme_part`. Then each rank reads its files, one after the other, since only one must fit
    into memory, and puts master weights, moments and Adam's step in place, on the CPU as they were saved, within
    `parameters_renewed`.

    Args:
        engine: DeepSpeed's, new.
        path, tag: as they were saved.

    Returns:
        The `client_state` that was saved. What `engine.load_checkpoint` returns with it has keys of DeepSpeed's own in it; they
        may stay.

    Raises:
        ValueError: there is no folder `path/tag/offloaded`, or it has no file for one of this rank's sub-groups; the
            sentence names the folder or file. Nothing has been loaded into the engine if the folder is not there. (The
            launcher ends the other ranks.)
    """
    raise NotImplementedError("Task 4.8: complete load_offloaded() in src/exercises/lab04_offload.py")
