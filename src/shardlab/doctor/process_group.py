"""A real all-reduce on two ranks.

python -m shardlab.doctor.process_group     # with all that its ranks say; the exit status is 1 if it fails
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from shardlab import hardware
from shardlab.findings import Finding, exit_status, show, telling_line
from shardlab.zero import ops

# --- ranks ----------------------------------------------------------------------------------------------------------


def check_process_group(limit: float = 60.0, say: Callable[[str], None] = lambda line: None) -> Finding:
    """A real all-reduce on two ranks: over NCCL with two GPUs or more, else over gloo.

    The ranks meet at a store on a port that the system picks, and none of them outlives this call.

    Args:
        limit: seconds for all of it, imports included.
        say: called with what each rank wrote.
    """
    name, ranks = "process group", 2
    backend = "nccl" if hardware.gpu_count() >= ranks else "gloo"
    again = ("NCCL_DEBUG=INFO " if backend == "nccl" else "") + f"{shlex.quote(sys.executable)} -m shardlab.doctor.process_group"
    import torch.distributed as dist

    try:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    except (dist.DistError, OSError) as error:
        return Finding(name, "fails", f"no store on 127.0.0.1: {telling_line(str(error), 1)}", again)
    shared = (
        os.environ
        | ops.environment()
        | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "OMP_NUM_THREADS": "1",
        }
    )
    if backend == "gloo":
        shared["GLOO_SOCKET_IFNAME"] = "lo"
    command = [sys.executable, "-m", "shardlab.doctor.process_group", "--rank", backend, str(os.getpid())]
    started, processes = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="shardlab-doctor-") as folder:
        logs = [Path(folder, f"rank{rank}.log") for rank in range(ranks)]
        try:
            for rank, log in enumerate(logs):
                environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                with open(log, "w") as file:
                    processes.append(
                        subprocess.Popen(
                            command,
                            env=environment,
                            stdin=subprocess.DEVNULL,
                            stdout=file,
                            stderr=subprocess.STDOUT,
                            start_new_session=True,
                        )
                    )
            # A rank that fails leaves the other one waiting, so the first failure ends the wait.
            while (codes := [process.poll() for process in processes]) and None in codes and not any(codes):
                if time.monotonic() - started > limit:
                    break
                time.sleep(0.05)
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        outputs = [log.read_text(errors="replace") for log in logs]
    seconds = time.monotonic() - started
    for rank, output in enumerate(outputs):
        for line in output.splitlines():
            say(f"rank {rank}: {line}")
    failed = [rank for rank, code in enumerate(codes) if code]
    if failed:
        return Finding(
            name, "fails", f"rank {failed[0]} over {backend}: {telling_line(outputs[failed[0]], codes[failed[0]])}", again
        )
    if None in codes:
        return Finding(name, "fails", f"{ranks} ranks over {backend}: no all-reduce within {limit:g} s", again)
    detail = f"{ranks} ranks over {backend}: an all-reduce gave the sum on both, in {seconds:.1f} s with imports"
    return Finding(name, "works", detail)


def run_rank(backend: str, starter: int) -> None:
    """What each rank runs."""
    from shardlab.run.collectives import try_all_reduce
    from shardlab.run.ranks import die_with_the_launcher

    die_with_the_launcher(starter)
    try_all_reduce(int(os.environ["LOCAL_RANK"]) if backend == "nccl" else None)


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--rank"]:
        run_rank(arguments[1], starter=int(arguments[2]))
        return 0
    if arguments:
        print("usage: python -m shardlab.doctor.process_group", file=sys.stderr)
        return 2
    return exit_status(show([check_process_group(say=print)]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
