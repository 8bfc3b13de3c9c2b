"""The optimizer states that DeepSpeed has swapped out to disk: go through them, and save and load an engine around them.

This rests on names inside deepspeed 0.19.8, which constraints.txt pins.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@contextmanager
def without_its_nvme_part(engine) -> Iterator[None]:
    """Let the engine save or load all but the states on NVMe.

    By itself, deepspeed 0.19.8 copies the folder of swap files into the checkpoint, and back. That fails or loses states:
    a second save into one place ends in FileExistsError (DeepSpeed issue 7549); the files are named by a counter of the
    process, so a process that counted otherwise writes them back next to its own and uses neither; on load, Adam's moments
    and step count are not restored, nor the sub-groups that are too small for the disk. Told that nothing is on NVMe, the
    engine saves and loads everything but the swapped tensors.
    """
    engine.zero_nvme_offload_optimizer = lambda: False
    try:
        yield
    finally:
        del engine.zero_nvme_offload_optimizer


def swapped_groups(engine) -> Iterator[tuple[int, torch.Tensor, dict]]:
    """Go through this rank's sub-groups on NVMe. While one is yielded it is in memory; then it is written back to disk.

    Yields:
        The sub-group's number; its master weights, a flat fp32 tensor; and Adam's state of them, a dictionary with `step`,
        `exp_avg` (momentum) and `exp_avg_sq` (variance). Before the first step the dictionary is empty; after the engine has
        loaded a checkpoint it has the step count, and moments without elements. The tensors are views of buffers that the
        next sub-group uses again: copy what you keep. What you write into the master weights (`master.data.copy_(…)`, since
        they require a gradient), or put into the dictionary, is on disk afterwards.
    """
    zero = engine.optimizer
    for number, master in enumerate(zero.fp32_partitioned_groups_flat):
        if zero._swappable_optimizer_subgroup(number):
            zero._optimizer_states_and_gradient_swap_in(number)
            yield number, master, zero.optimizer.state[master]
            zero._reassign_or_swap_out_partitioned_parameters(number)  # the parameters follow their master weights
            zero._optimizer_states_and_gradient_swap_out(number)


@contextmanager
def parameters_renewed(engine) -> Iterator[None]:
    """Within this, change master weights; afterwards every parameter that stage 3 keeps gathered is gathered anew."""
    engine.optimizer.checkpoint_event_prologue()
    yield
    engine.optimizer.checkpoint_event_epilogue()
