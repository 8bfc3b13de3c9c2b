"""What this machine has, and which size of the course applies to it.

Nothing here imports torch unless a function needs it: the command line must answer `--help` at once.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The course's own folder: the one with `labs/`, `src/` and `solutions/`."""

HEAVY_MODULES = [
    "torch",
    "deepspeed",
    "transformers",
    "transformers.trainer",
    "transformers.models.bloom.modeling_bloom",
    "datasets",
    "shardlab.run.training",
]
"""What a rank needs and what takes seconds to import; the fork server loads it once for all launches."""


def cpu_cores() -> int:
    """Cores that this process may use (a batch job's share, not the node's total)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu_count() -> int:
    """GPUs that ranks started here can use: those that torch sees, none where `DS_ACCELERATOR` is `cpu`.

    The driver's device files are looked at first, since asking torch costs two seconds of import.
    """
    # The deepspeed launcher sets CUDA_VISIBLE_DEVICES for ranks on the CPU too, but not this variable.
    if not driver_is_here() or gpus_are_hidden():
        return 0
    return _gpu_count(os.environ.get("CUDA_VISIBLE_DEVICES"))


def driver_is_here() -> bool:
    """Whether a GPU's driver has left its device files."""
    return any(Path("/dev", name).exists() for name in ("nvidiactl", "dxg", "kfd"))


def gpus_are_hidden() -> bool:
    """Whether somebody has chosen to leave the GPUs out, if there are any."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1") or os.environ.get("DS_ACCELERATOR") == "cpu"


@lru_cache
def _gpu_count(visible: str | None) -> int:
    import torch

    return torch.cuda.device_count()


def device() -> str:
    """`cuda` or `cpu`: what this process, and a rank of its own kind, computes on."""
    return "cuda" if gpu_count() else "cpu"


@dataclass(frozen=True)
class Gpu:
    """One GPU as NVML sees it: its memory in bytes, what other processes use included."""

    name: str
    capability: tuple[int, int]
    total: int
    free: int


def gpus() -> list[Gpu]:
    """The GPUs that torch sees, in its order; empty where NVML cannot say.

    NVML is asked and not CUDA: that would take some hundred MiB of the GPU, and a process that has started CUDA cannot fork ranks.
    """
    import pynvml

    if not gpu_count():
        return []
    try:
        return [_described(handle) for handle in nvml_handles()]
    except pynvml.NVMLError:
        return []


def _described(handle) -> Gpu:
    import pynvml

    memory, name = pynvml.nvmlDeviceGetMemoryInfo(handle), pynvml.nvmlDeviceGetName(handle)
    try:
        whole = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)  # a part of a card does not know its capability
    except pynvml.NVMLError:
        whole = handle
    capability = tuple(pynvml.nvmlDeviceGetCudaComputeCapability(whole))
    return Gpu(name if isinstance(name, str) else name.decode(), capability, memory.total, memory.free)


def driver() -> str | None:
    """The version of NVIDIA's driver; None where NVML cannot say."""
    import pynvml

    try:
        pynvml.nvmlInit()
        found = pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError:
        return None
    return found if isinstance(found, str) else found.decode()


def nvml_handles() -> list:
    """NVML's handle of each GPU that `CUDA_VISIBLE_DEVICES` names, by index, by UUID or its beginning, or as a MIG device.

    As CUDA does, it stops at the first name that is none.
    """
    import pynvml

    pynvml.nvmlInit()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return handles
    found = []
    for word in (word.strip() for word in visible.split(",")):
        if word.isdigit() and int(word) < len(handles):
            found.append(handles[int(word)])
        elif word.startswith("MIG-"):
            found.append(pynvml.nvmlDeviceGetHandleByUUID(word))
        elif word.startswith("GPU-"):
            found += [handle for handle in handles if _uuid(handle).startswith(word)][:1]
        else:
            break
    return found


def _uuid(handle) -> str:
    import pynvml

    uuid = pynvml.nvmlDeviceGetUUID(handle)
    return uuid if isinstance(uuid, str) else uuid.decode()


def size() -> str:
    """`tiny` without a GPU, `gpu` with one or more, `cluster` inside a Slurm job of several nodes that have GPUs."""
    if not gpu_count():
        return "tiny"
    return "cluster" if int(os.environ.get("SLURM_JOB_NUM_NODES", "1")) > 1 else "gpu"


def best_precision() -> str:
    """`bf16` on a GPU that computes in it (compute capability 8.0 and later), `fp16` on an older GPU, `fp32` without a GPU.

    On two CPU cores fp32 is the fast precision: a step under bf16 autocast takes about twice as long.
    """
    if not gpu_count():
        return "fp32"
    if cards := gpus():
        return "bf16" if all(gpu.capability >= (8, 0) for gpu in cards) else "fp16"
    import torch

    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def default_ranks() -> int:
    """All GPUs, or two ranks on a machine without one."""
    return gpu_count() or 2


def cache_folder() -> Path:
    """Where the course keeps what it has compiled: `$XDG_CACHE_HOME/shardlab`, by default `~/.cache/shardlab`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shardlab"


OP_HEADERS = Path(__file__).parent / "zero" / "headers"
"""What ops for the CPU include instead of all of torch."""


def ops_folder(for_device: str | None = None) -> Path:
    """Where DeepSpeed's compiled ops lie (`TORCH_EXTENSIONS_DIR` wins if it is set).

    The ops are compiled with `-march=native`, so a build made on a login node can be wrong for a compute node. The
    folder's name therefore carries the processor, the Python and the torch that it was made with, and the device: DeepSpeed
    builds one and the same op otherwise for ranks on the CPU than for ranks on GPUs. And it carries when torch, DeepSpeed and
    our own header were installed: sources newer than an op that was built before make each rank build it again as it loads it.

    Args:
        for_device: `cuda` or `cpu`: what the ranks that load the ops compute on; by default what this process does.
    """
    for_device = for_device or device()
    ours = cache_folder() / "ops"
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    if chosen and Path(chosen).parent != ours:
        plain = Path(chosen).parent if Path(chosen).name == "cuda" else Path(chosen)  # a launch on GPUs has put the latter there
        return plain / "cuda" if for_device == "cuda" else plain
    cpu = next((line for line in _cpuinfo() if line.startswith("flags")), platform.processor())
    made_with = f"{platform.machine()}/{cpu}/{sys.version_info[:2]}/{_installed('torch')}/{_installed('deepspeed')}/{sys.prefix}"
    made_with += "/cuda" if for_device == "cuda" else f"/{OP_HEADERS}/{_written(OP_HEADERS / 'torch' / 'extension.h')}"
    return ours / hashlib.sha256(made_with.encode()).hexdigest()[:12]


@lru_cache
def _installed(package: str) -> str:
    """A package's version, and when its files were written."""
    from importlib.metadata import distribution

    found = distribution(package)
    return f"{found.version} {_written(Path(found.locate_file(f'{package}/__init__.py')))}"


def _written(path: Path) -> int:
    return path.stat().st_mtime_ns


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def cpu_name() -> str:
    line = next((line for line in _cpuinfo() if line.startswith("model name")), "")
    return line.partition(":")[2].strip() or platform.processor() or platform.machine()


def describe(for_device: str | None = None) -> dict:
    """The hardware as a run folder records it.

    Args:
        for_device: `cuda` or `cpu`, what the run's ranks compute on; by default what this process does.
    """
    for_device = for_device or device()
    names = [gpu.name for gpu in gpus()] or ["a GPU that NVML does not name"] * gpu_count() if for_device == "cuda" else []
    found = {"host": platform.node(), "cpu": cpu_name(), "cpu_cores": cpu_cores(), "gpus": names, "ranks_on": for_device}
    return found | ({"driver": driver()} if names else {})


def versions() -> dict:
    """Versions of the packages that a figure depends on."""
    packages = ("torch", "deepspeed", "transformers", "datasets", "accelerate")
    return {"python": platform.python_version()} | {package: _version(package) for package in packages}


@lru_cache
def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


@lru_cache
def commit() -> str | None:
    """The course's commit, with `+changes` after it where files differ; `None` outside a git checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
