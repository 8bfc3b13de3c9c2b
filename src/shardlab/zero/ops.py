"""DeepSpeed's compiled ops: which are built, which a run needs, and building them.

DeepSpeed compiles an op at its first use, on every rank at once, behind a lock that a killed process leaves behind for
ever. So the course builds what a run needs beforehand, in one process, with a line on the screen.

    python -m shardlab.zero.ops cpu_adam          # builds one op in this process
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shardlab import hardware
from shardlab.errors import CourseError

OPS = {
    "deepspeed_shm_comm": ("ShareMemCommBuilder", "all-reduce between ranks of one CPU machine", 0.5),
    "cpu_adam": ("CPUAdamBuilder", "Adam on the host, for optimizer offload", 1),
    "pin_memory": ("PinMemoryBuilder", "page-locked host memory, for NVMe offload", 0.5),
    "fused_adam": ("FusedAdamBuilder", "Adam in one kernel, for the optimizer type AdamW of a DeepSpeed configuration", 2),
    "quantizer": ("QuantizerBuilder", "quantized weights and gradients, for ZeRO++ on GPUs", 2),
    "async_io": ("AsyncIOBuilder", "reading and writing NVMe through libaio", 2),
}
"""Op: DeepSpeed's builder, what it is for, and about how many minutes it takes to build on two cores."""


class OpBuildError(CourseError, RuntimeError):
    """An op that did not compile; the message carries the compiler's last lines."""


def environment(device: str | None = None) -> dict[str, str]:
    """Variables under which torch and DeepSpeed find the ops and the device.

    Args:
        device: `cuda` or `cpu`: what the process computes on that gets the variables; by default what this one does.
    """
    device = device or hardware.device()
    # One ninja, and always the same: a newer one than built the op would build it again, on every rank.
    own = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", "")
    variables = {
        "PATH": path if path.split(os.pathsep)[0] == own else own + os.pathsep + path,
        "TORCH_EXTENSIONS_DIR": str(hardware.ops_folder(device)),
        "DS_ACCELERATOR": device,
        # Asks NVML, not CUDA: a process that has started CUDA cannot fork ranks.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    }
    if device == "cpu":
        # Threads of OpenMP spin while they wait for one another. Where the cores have other work too, that takes the time of those
        # waited for: on 2 cores with a load of 3, two threads trained at a third of this setting's speed.
        variables["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
    if device == "cuda":
        variables["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # as NVML counts, which says how much memory is free
    if device == "cuda" and (cards := hardware.gpus()):
        # A container's own list with an entry such as 10.0a ends a build of deepspeed 0.19.8 in an error.
        variables["TORCH_CUDA_ARCH_LIST"] = ";".join(sorted({".".join(map(str, gpu.capability)) for gpu in cards}))
    if device == "cpu" and hardware.driver_is_here():
        variables["CUDA_VISIBLE_DEVICES"] = ""
    return variables


def library(op: str, device: str | None = None) -> Path:
    return hardware.ops_folder(device) / op / f"{op}.so"


def is_built(op: str, device: str | None = None) -> bool:
    return library(op, device).exists() and not stale_lock(op, device)


def stale_lock(op: str, device: str | None = None) -> Path | None:
    """The lock file that an interrupted build left behind, if there is one and nobody is building.

    A rank that loads a built op holds the lock for a moment, so one that has just appeared is not stale.
    """
    lock = library(op, device).parent / "lock"
    try:
        young = time.time() - lock.stat().st_mtime < 5
    except FileNotFoundError:
        return None
    return None if young or _being_built(lock.parent) else lock


def _being_built(folder: Path) -> bool:
    import psutil

    for process in psutil.process_iter(["cwd", "name"]):
        if process.info["name"] in ("ninja", "cc1plus", "nvcc", "cicc") and (process.info["cwd"] or "").startswith(str(folder)):
            return True
    return False


def needed_by(config: dict | None, on: str | None = None) -> list[str]:
    """The ops that a run with this DeepSpeed configuration will load, with its ranks on `cuda` or `cpu`."""
    if config is None:
        return []
    # Any of these may be null.
    zero, optimizer = (config.get(name) or {} for name in ("zero_optimization", "optimizer"))
    device, other = ((zero.get(f"offload_{what}") or {}).get("device", "none") for what in ("optimizer", "param"))
    needed = [] if (on or hardware.device()) == "cuda" else ["deepspeed_shm_comm"]
    torch_adam = optimizer.get("params", {}).get("torch_adam", False)
    if device != "none":
        needed.append("cpu_adam")
    elif optimizer.get("type", "").lower() in ("adam", "adamw") and not torch_adam:
        needed.append("fused_adam")
    quantized = zero.get("zero_quantized_weights") or zero.get("zero_quantized_gradients")
    if quantized and (on or hardware.device()) == "cuda":
        needed.append("quantizer")
    if "nvme" in (device, other):
        needed += ["pin_memory", "async_io"]
    return needed


def needed_on(device: str) -> list[str]:
    """The ops that labs load for ranks on `cuda` or `cpu`."""
    # The ranks of GPUs talk through NCCL; on the CPU the labs use torch's own Adam, or cpu_adam.
    others = {"cuda": ("deepspeed_shm_comm",), "cpu": ("fused_adam", "quantizer")}[device]
    return [op for op in OPS if op not in others]


HEARTBEAT = 30.0
"""Seconds after which a build that goes on says so."""


def build(op: str, say=print, device: str | None = None) -> float:
    """Build one op in a process of its own, if it is not built; a stale lock is cleared first.

    Args:
        op: a key of `OPS`.
        say: called with a line when a build begins, every half minute, and when it ends.
        device: `cuda` or `cpu`: what the ranks that load it compute on; by default what this process does.

    Returns:
        Seconds that it took; 0.0 if it was there.

    Raises:
        OpBuildError: it did not compile.
    """
    if is_built(op, device):
        return 0.0
    from filelock import FileLock

    hardware.ops_folder(device).mkdir(parents=True, exist_ok=True)
    with FileLock(hardware.ops_folder(device) / f".{op}.building"):
        if is_built(op, device):
            return 0.0
        while (library(op, device).parent / "lock").exists() and not stale_lock(op, device):
            time.sleep(0.2)  # a rank loads it just now, somebody else builds it, or the lock is still too young to tell
        if is_built(op, device):
            return 0.0
        if lock := stale_lock(op, device):
            say(f"{op}: an interrupted build left a lock behind; removed it.")
            lock.unlink()
        say(f"{op}: compiling once ({OPS[op][1]}; about {OPS[op][2]:g} min on two cores) …")
        started = time.monotonic()
        headers = _short_headers(device)
        code, output = _compile(op, device, say, headers)
        if code > 0 and headers:  # its sources may use more of torch than before
            say(f"{op}: it does not compile with the course's short header; again with all of torch's …")
            code, output = _compile(op, device, say, {})
        if code != 0 or not library(op, device).exists():
            lines = output.strip().splitlines()
            errors = [line for line in lines if "error:" in line or "FAILED" in line][:10]
            said = "\n".join(errors or lines[-15:])
            raise OpBuildError(f"DeepSpeed's op {op} did not compile. Try `shardlab doctor`. The compiler said:\n{said}")
        seconds = time.monotonic() - started
        say(f"{op}: compiled in {seconds:.0f} s.")
        return seconds


_building: set[subprocess.Popen] = set()


def _compile(op: str, device: str | None, say, variables: dict[str, str]) -> tuple[int, str]:
    """Run a build to its end, with these variables; its exit status, and what it printed."""
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "shardlab.zero.ops", op],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | environment(device) | variables,
    )
    _building.add(process)
    try:
        while True:
            try:
                output, _ = process.communicate(timeout=HEARTBEAT)
                break
            except subprocess.TimeoutExpired:
                say(f"{op}: still compiling, {time.monotonic() - started:.0f} s")
    except BaseException:
        _end(process)
        process.wait()
        (library(op, device).parent / "lock").unlink(missing_ok=True)
        raise
    finally:
        _building.discard(process)
    if process.returncode < 0:
        (library(op, device).parent / "lock").unlink(missing_ok=True)
    return process.returncode, output


def _short_headers(device: str | None) -> dict[str, str]:
    """Variables that lead a compiler to a `torch/extension.h` with only what the ops for the CPU use of torch.

    All of torch's headers take it three times as long (37 s a file, and 13 s with these), and what is built does the same.
    """
    if (device or hardware.device()) != "cpu":
        return {}
    return {"CPATH": os.pathsep.join(filter(None, (str(hardware.OP_HEADERS), os.environ.get("CPATH"))))}


def build_all(names: Iterable[str], say=print, device: str | None = None) -> None:
    """Build several ops, two at a time: one build keeps two cores busy only for a part of its time.

    Args:
        names: keys of `OPS`.
        say, device: as for `build`.

    Raises:
        OpBuildError: one did not compile; those that were under way have been ended.
    """
    missing = sorted((op for op in names if not is_built(op, device)), key=lambda op: -OPS[op][2])
    whole_lines = threading.Lock()

    def say_line(line: str) -> None:
        with whole_lines:
            say(line)

    with ThreadPoolExecutor(2) as pool:
        builds = [pool.submit(build, op, say_line, device) for op in missing]
        try:
            for each in builds:
                each.result()
        except BaseException:  # Ctrl-C reaches this thread alone
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(_building):
                _end(process)
            raise


def _end(process: subprocess.Popen) -> None:
    """Kill a build: ninja puts each compiler into a process group of its own.

    All are stopped first: one that goes on while the others are looked up can start another, which nobody would find any more.
    """
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        builder, stopped = psutil.Process(process.pid), set()
        while running := {builder, *builder.children(recursive=True)} - stopped:
            for each in running:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.suspend()
            stopped |= running
        for each in stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


def _build_here(op: str) -> None:
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder(OPS[op][0])
    builder.load(verbose=True)  # with DeepSpeed's own flags: with others, each rank that loads the op would compile it anew


if __name__ == "__main__":
    _build_here(sys.argv[1])
