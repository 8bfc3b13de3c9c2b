"""The few things that ranks ask of each other, on one rank too."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def gather(value) -> list:
    """One value per rank, in the order of the ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def try_all_reduce(gpu: int | None, **group) -> None:
    """Make a process group, contribute rank + 1 to an all-reduce, see that all of them arrived, and leave the group.

    Args:
        gpu: this rank's GPU, for NCCL; None for gloo.
        group: what `init_process_group` takes besides the backend.

    Raises:
        RuntimeError: another sum came, or the ranks did not reach each other.
    """
    if gpu is not None:
        torch.cuda.set_device(gpu)
    dist.init_process_group("gloo" if gpu is None else "nccl", **group)
    ranks = dist.get_world_size()
    values = torch.full((1024,), dist.get_rank() + 1.0, device="cpu" if gpu is None else "cuda")
    dist.all_reduce(values)
    expected = ranks * (ranks + 1) / 2
    if not values.eq(expected).all():
        raise RuntimeError(f"the all-reduce gave {values.unique().tolist()}, not {expected:g}")
    dist.barrier()
    dist.destroy_process_group()
