"""An exercise called where a learner seldom is: on one rank of a job, on a machine with a GPU."""

from __future__ import annotations

import contextlib
import os
import sys
from types import SimpleNamespace
from unittest import mock

JOB = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "5", "LOCAL_WORLD_SIZE": "5", "SLURM_NTASKS": "5", "SLURM_PROCID": "3"}

CARD = SimpleNamespace(name="a GPU without bf16", total_memory=16 * 2**30, major=7, minor=0)
"""Old and small: who asks what it can do gets another answer than from a large one, or from none."""

_until_back: list[contextlib.ExitStack] = []


def go() -> None:
    """Let this process look like rank 3 of 5, where torch sees a GPU, until `come_back`."""
    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.dict(os.environ, JOB))
    # Who has not imported torch has not asked it; where nothing needs it, importing it would be most of a milestone's time.
    if torch := sys.modules.get("torch"):
        gpu = {"is_available": lambda: True, "device_count": lambda: 1, "is_bf16_supported": lambda *_, **__: False}
        gpu |= {"get_device_properties": lambda *_: CARD, "get_device_name": lambda *_: CARD.name}
        gpu |= {"get_device_capability": lambda *_: (7, 0), "mem_get_info": lambda *_: (CARD.total_memory, CARD.total_memory)}
        group = {"is_initialized": lambda: True, "get_world_size": lambda group=None: 5, "get_rank": lambda group=None: 3}
        accelerator = {"is_available": lambda: True, "device_count": lambda: 1}
        accelerator |= {"current_accelerator": lambda check_available=False: torch.device("cuda")}
        for module, stand_ins in ((torch.cuda, gpu), (torch.accelerator, accelerator), (torch.distributed, group)):
            for name, stand_in in stand_ins.items():
                stack.enter_context(mock.patch.object(module, name, stand_in))
    _until_back.append(stack)


def come_back() -> None:
    """Let this process be again what it was before `go`."""
    _until_back.pop().close()
