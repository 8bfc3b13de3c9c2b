"""What DeepSpeed's engine holds, predicted to the byte by its settings; `held_bytes.py` counts the same on a live engine.

These formulae are exercises. So this file stays with the instructor: a release does not have it, and tables there predict with the
learner's own functions.
"""

from __future__ import annotations

import math

from shardlab.zero.memory_model import MIB, States, check_sizes


def sharded_elements(groups: list[list[int]], ranks: int, stage: int) -> int:
    """Elements of one rank's shard, padding included.

    Stages 1 and 2 lay each optimizer group out as one flat buffer, rounded up to a multiple of 2N, and give each rank
    an equal piece. Stage 3 cuts every parameter on its own, rounded up to a multiple of N.

    Args:
        groups: sizes of the parameters, by optimizer group (`Trainer` makes two: with and without weight decay).
        ranks: N.
        stage: 1, 2 or 3.
    """
    if stage == 3:
        return sum(math.ceil(size / ranks) for group in groups for size in group)
    return sum(math.ceil(sum(group) / (2 * ranks)) * 2 for group in groups if group)


def engine_bytes(
    stage: int,
    groups: list[list[int]],
    ranks: int,
    *,
    precision: str = "bf16",
    offload_optimizer: bool = False,
    offload_param: bool = False,
    nvme: bool = False,
    accumulates: bool = True,
) -> States:
    """What one rank of DeepSpeed's engine holds while it accumulates gradients, by its settings.

    Per element: 2 bytes of parameters and of gradients in bf16 or fp16, and 4 in fp32; 8 bytes of Adam's two moments; 4
    bytes of master weights, counted with the optimizer. Stages 1 to 3 keep master weights in fp32 too, as a second copy
    of the shard; stage 0 in fp32 keeps none. Transient buffers, and what stage 3 gathers, come on top.

    Args:
        stage: 0 to 3. Stage 0 is DeepSpeed without ZeRO; in fp32 it holds what DDP holds, 16 bytes per parameter.
        groups: sizes of the parameters, by optimizer group.
        ranks: N.
        precision: `fp32`, `bf16` or `fp16`.
        offload_optimizer: optimizer states, and the gradients that the step needs, are on the host.
        offload_param: the parameters are on the host; stage 3 only.
        nvme: the offloaded optimizer states are on disk where DeepSpeed swaps them out (`swapped_elements`); stage 3 only,
            and `groups` are then its sub-groups.
        accumulates: an optimizer step has several micro-batches. Stage 1 then holds whole gradients on the device, not a shard of
            them; and stage 2 with optimizer offload on the host the gradients of all parameters that lie in the rank's shard,
            whole too. There ranks differ, and the one that holds most is given.

    Raises:
        ValueError: an unknown stage, or an offload that the stage does not have.
    """
    total = sum(sum(group) for group in groups)
    check_sizes(stage, ranks, total)
    if offload_optimizer and stage == 0:
        raise ValueError("Optimizer offload needs stage 1, 2 or 3: stage 0 has no sharded optimizer to move.")
    if offload_param and stage != 3:
        raise ValueError(f"Parameter offload needs stage 3, not stage {stage}: only stage 3 shards parameters.")
    if nvme and not (offload_optimizer and stage == 3):
        raise ValueError("NVMe offload of the optimizer needs optimizer offload and stage 3: below it DeepSpeed stays on the host.")
    if precision not in ("fp32", "bf16", "fp16"):
        raise ValueError(f"precision {precision!r}: the engine computes in fp32, bf16 or fp16.")
    width = 4 if precision == "fp32" else 2
    shard = sharded_elements(groups, ranks, stage) if stage else total
    whole = shard * ranks if stage in (1, 2) else total
    parameters = width * (shard if stage == 3 else whole)
    optimizer = (8 if stage == 0 and precision == "fp32" else 12) * shard
    # Stage 1 reduces nothing before the last micro-batch, so until then its gradients are whole, on the device.
    gradients, host_gradients = width * (shard if stage >= 2 or (stage == 1 and not accumulates) else total), 0
    if offload_optimizer:
        # The step reads fp32 gradients on the host; stage 3 collects them there in the parameters' precision first.
        gradients, host_gradients = (gradients if stage == 1 and accumulates else 0), (4 + (width if stage == 3 else 0)) * shard
        if stage == 2 and accumulates:
            host_gradients += width * max(whole_parameters(groups, ranks))
    on_disk, disk_gradients, disk_optimizer = 0, 0, 0
    if nvme:
        for group in groups:
            if swapped := swapped_elements(sum(math.ceil(size / ranks) for size in group)):
                on_disk += sum(math.ceil(size / ranks) for size in group)
                disk_optimizer += 3 * 4 * swapped
                pieces = [math.ceil(size / ranks) for size in group]
                disk_gradients += sum(4 * (piece // SWAP_ALIGNMENT * SWAP_ALIGNMENT) for piece in pieces if swapped_elements(piece))
        host_gradients -= 4 * on_disk
    return States(
        parameters=0 if offload_param else parameters,
        gradients=gradients,
        optimizer=0 if offload_optimizer else optimizer,
        host_parameters=parameters if offload_param else 0,
        host_gradients=host_gradients,
        host_optimizer=optimizer - 12 * on_disk if offload_optimizer else 0,
        disk_gradients=disk_gradients,
        disk_optimizer=disk_optimizer,
    )


def whole_parameters(groups: list[list[int]], ranks: int) -> list[int]:
    """By rank, the elements of all parameters of which a part lies in the rank's shard, in stages 1 and 2."""
    found = [0] * ranks
    for group in groups:
        shard, first = sharded_elements([group], ranks, 2), 0
        for size in group:
            for rank in range(first // shard, (first + size - 1) // shard + 1):
                found[rank] += size
            first += size
    return found


SWAP_ALIGNMENT = 256
"""DeepSpeed writes whole blocks of 1,024 bytes to disk, times its `aio.intra_op_parallelism`, which is 1: 256 fp32 numbers."""


def swapped_elements(elements: int) -> int:
    """Elements that an fp32 tensor has on disk under NVMe offload; 0 where DeepSpeed leaves it in memory.

    Below 1 MiB, or one `aio.block_size` if that is larger, a tensor stays in memory. Source: deepspeed 0.19.8,
    `runtime/swap_tensor/optimizer_utils.py`, `OptimizerSwapper`.
    """
    return math.ceil(elements / SWAP_ALIGNMENT) * SWAP_ALIGNMENT if 4 * elements >= MIB else 0
