"""Runs with several lives: checkpoints in the run folder, and stopping when asked to."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
from transformers import TrainerCallback

from shardlab.run.collectives import barrier, rank, world_size
from shardlab.run.run_folder import Run, write_json


class Stopped(Exception):
    """Training ended before its last step because it was asked to; the text says after which step."""


class NothingLeft(Exception):
    """The checkpoint that training would go on from is that of the last step."""


STOP_FILE = "stop"
"""A file of this name in the run folder asks a run with checkpoints to save one and to end."""


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in a run's folder `checkpoints` that was written to its end; None if there is none."""
    whole = [path.parent for path in Path(folder).glob("checkpoint-*/complete.json")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class Checkpointer(TrainerCallback):
    """Marks each checkpoint of `Trainer` that is whole, and ends training where the run folder's stop file asks for it.

    A job can be killed while it saves; `Trainer` would take the half-written folder for a checkpoint. So the last file of
    each is `complete.json`.
    """

    def __init__(self, run: Run):
        self.run, self.stopped = run, False

    def on_train_begin(self, args, state, control, **_):
        # `Trainer` (5.x) asks whether it is done after each step, so it would take one too many: max_steps + 1.
        if state.global_step >= state.max_steps:
            raise NothingLeft

    def on_step_end(self, args, state, control, **_):
        # Rank 0 alone looks, and tells the others: on a shared file system each would see the file at another step.
        asked = [rank() == 0 and (self.run.folder / STOP_FILE).exists()]
        if dist.is_initialized():
            dist.broadcast_object_list(asked, src=0)
        if asked[0] and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **_):
        barrier()
        if rank() == 0:
            write_json(Path(args.output_dir, f"checkpoint-{state.global_step}", "complete.json"), {"ranks": world_size()})
        barrier()
