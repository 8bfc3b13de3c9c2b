"""Model-state memory, predicted: the formulae. `held_bytes.py` counts the same on a live engine.

Model states are parameters, gradients and optimizer states. Ψ is the number of parameters, N the number of ranks.
Three accounts of the same thing are kept apart here, because they differ and course material mixes them up:

- `paper_bytes`: the ZeRO paper (Rajbhandari et al. 2020, arXiv 1910.02054, §3.1 and §5): 16Ψ for mixed-precision Adam.
- `estimator_bytes`: DeepSpeed's own estimator functions, which also count fp32 gradients: 18Ψ.
- `engine_bytes`: what the DeepSpeed engine holds by its settings, padding included. `held_bytes` measures it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MIB = 2**20
GIB = 2**30


@dataclass(frozen=True)
class States:
    """Bytes of model states on one rank: on the device, on the host, and on disk."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    host_parameters: int = 0
    host_gradients: int = 0
    host_optimizer: int = 0
    disk_gradients: int = 0
    disk_optimizer: int = 0

    @property
    def device(self) -> int:
        return self.parameters + self.gradients + self.optimizer

    @property
    def host(self) -> int:
        return self.host_parameters + self.host_gradients + self.host_optimizer

    @property
    def disk(self) -> int:
        return self.disk_gradients + self.disk_optimizer


def _check(stage: int, ranks: int, parameters: int) -> None:
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"stage {stage!r}: ZeRO has the stages 0, 1, 2 and 3.")
    if ranks < 1:
        raise ValueError(f"ranks {ranks!r}: at least one rank is needed.")
    if parameters < 1:
        raise ValueError(f"parameters {parameters!r}: a model has at least one parameter.")


def paper_bytes(stage: int, parameters: int, ranks: int) -> States:
    """Bytes a rank by the ZeRO paper, for Adam in mixed precision: 2Ψ + 2Ψ + 12Ψ, each part divided by N once sharded.

    Args:
        stage: 0 shards nothing, 1 the optimizer states, 2 the gradients too, 3 the parameters too.
        parameters: Ψ.
        ranks: N.
    """
    _check(stage, ranks, parameters)
    share = [1 / ranks if stage >= needed else 1.0 for needed in (3, 2, 1)]
    return States(*(round(bytes_ * parameters * part) for bytes_, part in zip((2, 2, 12), share)))


def estimator_bytes(stage: int, parameters: int, ranks: int, *, largest_layer: int = 0) -> int:
    """Device bytes per rank without offload as DeepSpeed's estimators have them, with their factor for buffers at 1.

    Source: `deepspeed.runtime.zero.stage_1_and_2.estimate_zero2_model_states_mem_needs` (2Ψ + 18Ψ/N) and
    `deepspeed.runtime.zero.stage3.estimate_zero3_model_states_mem_needs` (18Ψ/N + 4 × the largest layer).

    Args:
        largest_layer: parameters of the largest layer, which stage 3 gathers whole.

    Raises:
        ValueError: a stage that DeepSpeed has no estimator for (0 and 1).
    """
    _check(stage, ranks, parameters)
    if stage < 2:
        raise ValueError(f"stage {stage}: DeepSpeed has estimators for stages 2 and 3 only.")
    if stage == 2:
        return 2 * parameters + round(18 * parameters / ranks)
    return round(18 * parameters / ranks) + 4 * largest_layer


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
    _check(stage, ranks, total)
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


def ddp_bytes(parameters: int) -> States:
    """What a rank of plain `Trainer` or DDP holds: 4Ψ + 4Ψ + 8Ψ in fp32, under autocast too; DDP's buckets come on top."""
    _check(0, 1, parameters)
    return States(4 * parameters, 4 * parameters, 8 * parameters)
