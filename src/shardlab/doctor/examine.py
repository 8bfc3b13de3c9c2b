"""Preflight: what works on this machine, what does not, and the command that mends it.

Each check does the thing itself where that is cheap: it compiles a program, starts two ranks, asks the hub. A file that
merely lies in its place proves nothing. What is absent is *not here*; only what is broken, or what every lab needs, *fails*.

    shardlab doctor                             # all checks, about 10 s; the exit status is 1 if one fails
    shardlab doctor --build-ops                 # compiles DeepSpeed's ops too; minutes
    python -m shardlab.doctor.process_group     # the process group alone, with all that its ranks say
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from shardlab import hardware
from shardlab.doctor.course import check_course_files, check_isolation, check_slurm
from shardlab.doctor.machine import (
    check_accelerator,
    check_caches,
    check_disk,
    check_hub,
    check_memory,
    check_milestone_ranks,
    check_numactl,
)
from shardlab.doctor.process_group import check_process_group
from shardlab.doctor.versions import check_deepspeed, check_python, check_torch
from shardlab.findings import Finding, exit_status, show
from shardlab.run.placement import CHECKING_RANKS, place
from shardlab.zero import ops
from shardlab.zero.toolchain import check_compiler, check_cuda_compiler, check_libaio, check_ninja, check_op


def examine(build_ops: bool = False, say: Callable[[str], None] = print) -> Iterator[Finding]:
    """Check this machine. The findings come one at a time, as they are made; the ops come last, since they can take minutes.

    Args:
        build_ops: compile the ops of DeepSpeed that are not built yet, and clear what interrupted builds left behind.
        say: called with a line when a build begins and when it ends.
    """
    yield check_python()
    tools = [check_compiler(), check_ninja()]
    yield from tools
    torch_finding, torch = check_torch()
    yield torch_finding
    if torch is None:
        yield Finding("accelerator", "not here", "needs torch")
    else:
        yield check_accelerator(torch)
        yield check_milestone_ranks()
        if torch["gpus"]:
            tools.append(check_cuda_compiler(torch["cuda"]))
            yield tools[-1]
    deepspeed_finding, deepspeed = check_deepspeed()
    yield deepspeed_finding
    aio = check_libaio(tools[0])
    yield aio
    yield check_numactl()
    yield Finding("process group", "not here", "needs torch") if torch is None else check_process_group()
    yield check_hub()
    yield check_caches(ops_too=None not in (torch, deepspeed))
    yield check_slurm()
    yield check_isolation()
    yield check_course_files()
    yield check_disk()
    yield check_memory()
    if torch is None or deepspeed is None:
        yield from (Finding(f"op {op}", "not here", "needs torch and DeepSpeed") for op in ops.OPS)
        return
    for device in dict.fromkeys([hardware.device(), place(CHECKING_RANKS, or_cpu=True).device]):
        if build_ops and all(tool.state == "works" for tool in tools):
            possible = [op for op in ops.needed_on(device) if op != "async_io" or aio.state == "works"]
            with contextlib.suppress(ops.OpBuildError, OSError):  # each is tried again by its own check, which says what is wrong
                ops.build_all(possible, say, device)
        for op in ops.OPS:
            yield check_op(op, build_ops, [*tools, aio] if op == "async_io" else tools, say, device)


def run(build_ops: bool = False) -> int:
    """All checks, printed as they come; returns the exit status. This is `shardlab doctor`."""
    return exit_status(show(examine(build_ops)))
