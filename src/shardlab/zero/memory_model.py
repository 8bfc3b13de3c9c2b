"""Model-state memory, predicted: the formulae that others have given. `held_bytes.py` counts on a live engine.

Model states are parameters, gradients and optimizer states. Ψ is the number of parameters, N the number of ranks.
Three accounts of the same thing are kept apart, because they differ and course material mixes them up:

- `paper_bytes`: the ZeRO paper (Rajbhandari et al. 2020, arXiv 1910.02054, §3.1 and §5): 16Ψ for mixed-precision Adam.
- `estimator_bytes`: DeepSpeed's own estimator functions, which also count fp32 gradients: 18Ψ.
- `engine_bytes`, in `engine_model.py`: what the DeepSpeed engine holds by its settings, padding included. Learners write it, so
  releases do not have that file.
"""

from __future__ import annotations

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


def check_sizes(stage: int, ranks: int, parameters: int) -> None:
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
    check_sizes(stage, ranks, parameters)
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
    check_sizes(stage, ranks, parameters)
    if stage < 2:
        raise ValueError(f"stage {stage}: DeepSpeed has estimators for stages 2 and 3 only.")
    if stage == 2:
        return 2 * parameters + round(18 * parameters / ranks)
    return round(18 * parameters / ranks) + 4 * largest_layer


def ddp_bytes(parameters: int) -> States:
    """What a rank of plain `Trainer` or DDP holds: 4Ψ + 4Ψ + 8Ψ in fp32, under autocast too; DDP's buckets come on top."""
    check_sizes(0, 1, parameters)
    return States(4 * parameters, 4 * parameters, 8 * parameters)
