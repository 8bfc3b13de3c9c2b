"""An exercise called where a learner seldom is: on one rank of a job, on a machine with a GPU."""

from __future__ import annotations

import contextlib
import os
from unittest import mock

from shardlab import switch

JOB = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "5", "LOCAL_WORLD_SIZE": "5", "SLURM_NTASKS": "5", "SLURM_PROCID": "3"}


def call(stem: str, function: str, *arguments, **named):
    """What a function that computes returns on rank 3 of 5, where torch sees a GPU: the same as anywhere.

    Args:
        stem: of the lab.
        function: the exercise's name.
        arguments, named: its own.
    """
    import torch

    exercise = getattr(switch.import_exercise(stem), function)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, JOB))
        for name, stand_in in {"is_available": lambda: True, "device_count": lambda: 1}.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        for name, stand_in in {"is_initialized": lambda: True, "get_world_size": lambda group=None: 5}.items():
            stack.enter_context(mock.patch.object(torch.distributed, name, stand_in))
        return exercise(*arguments, **named)
