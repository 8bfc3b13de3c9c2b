"""Where ranks run. This is the one rule that launches, milestones, lectures, the demo, programs and batch scripts follow.

Each rank on a GPU has one of its own: NCCL does not put two ranks on one GPU.

- No GPU here: ranks run on the CPU, with gloo.
- A run for *measuring* asks for GPUs on a machine that has any. Too few for its ranks, or one that others use up: it is refused.
- A run for *checking* takes the GPUs if there are enough, else all its ranks run on the CPU, and that is said. Losses, bytes and
  files are the same there; a speed in its table is then the CPU's.

`DS_ACCELERATOR=cpu` in front of a command hides the GPUs from the course's ranks, also where the `deepspeed` launcher starts them;
`CUDA_VISIBLE_DEVICES=` hides them from everything, but that launcher sets it anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shardlab import hardware
from shardlab.errors import CourseError

GIB = 2**30
FREE_NEEDED = 2 * GIB
"""Bytes that must be free on a GPU. CUDA and NCCL take about 1 GiB for a rank before it has allocated anything."""


CHECKING_RANKS = 2
"""Ranks of a milestone that does not say how many."""


class TooFewGpus(CourseError, ValueError):
    """A run for measuring that the GPUs here have no room for; the message says why, and what to do."""


@dataclass(frozen=True)
class Placement:
    """Where the ranks of a launch run.

    Attributes:
        device: `cuda` or `cpu`.
        why: why they run on the CPU although the machine has a GPU; else empty.
    """

    device: Literal["cuda", "cpu"]
    why: str = ""

    @property
    def on(self) -> str:
        """`GPUs`; or `the CPU`, and why."""
        return "GPUs" if self.device == "cuda" else f"the CPU: {self.why}" if self.why else "the CPU"

    @property
    def note(self) -> str:
        """A sentence for the learner; empty where there was no choice."""
        return f"Ranks run on {self.on}." if self.why else ""


def place(ranks: int, *, or_cpu: bool) -> Placement:
    """Decide where the ranks of a launch on this machine run.

    Args:
        ranks: how many there are.
        or_cpu: the run checks something, so the CPU will do; without it a run measures, and is refused where GPUs are too few.

    Raises:
        TooFewGpus: a run for measuring has more ranks than there are GPUs, or a GPU has no room.
    """
    gpus = hardware.gpu_count()
    if not gpus:
        return Placement("cpu", _why_no_gpu())
    if why := too_few(ranks, gpus):
        remedy = f"Take {gpus} rank{'s' * (gpus > 1)}"
    else:
        full = [(index, gpu) for index, gpu in enumerate(hardware.gpus()[:ranks]) if gpu.free < FREE_NEEDED]
        if not full:
            return Placement("cuda")
        index, gpu = full[0]
        why = f"GPU {index} ({gpu.name}) has {gpu.free / GIB:.1f} of {gpu.total / GIB:.0f} GiB free; other processes use the rest"
        remedy = "End them (`nvidia-smi` lists them), or name other GPUs in CUDA_VISIBLE_DEVICES"
    if or_cpu:
        return Placement("cpu", why)
    on_cpu = "or run on the CPU: DS_ACCELERATOR=cpu in front of the command, or_cpu=True in a notebook's launch()"
    raise TooFewGpus(f"{why}. {remedy}; {on_cpu}.")


def too_few(ranks: int, gpus: int) -> str:
    """What is wrong with so many ranks on a machine with so many GPUs; empty where each has its own, and where there is no GPU."""
    if not gpus or ranks <= gpus:
        return ""
    return f"{ranks} ranks need {ranks} GPUs, one each, and {'1 is' if gpus == 1 else f'{gpus} are'} visible"


def _why_no_gpu() -> str:
    if hardware.gpus_are_hidden() or not hardware.driver_is_here():
        return ""
    return "there is a GPU's driver here, but torch finds no GPU that it can use; `shardlab doctor` says why"
