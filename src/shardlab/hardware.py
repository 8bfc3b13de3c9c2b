"""What this machine has, and which size of the course applies to it.

Nothing here imports torch unless a function needs it: the command line must answer `--help` at once.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
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
    "shardlab.training",
]
"""What a rank needs and what takes seconds to import; the fork server loads it once for all launches."""


def cpu_cores() -> int:
    """Cores that this process may use (a batch job's share, not the node's total)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@lru_cache
def gpu_count() -> int:
    """Visible CUDA devices. The driver's device files are looked at first, since asking torch costs two seconds of import."""
    # The deepspeed launcher sets CUDA_VISIBLE_DEVICES on a machine without GPUs too.
    if not any(Path("/dev", name).exists() for name in ("nvidiactl", "dxg", "kfd")):
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    import torch

    return torch.cuda.device_count()


def size() -> str:
    """`tiny` without a GPU, `gpu` with one or more, `cluster` inside a Slurm job of several nodes that have GPUs."""
    if not gpu_count():
        return "tiny"
    return "cluster" if int(os.environ.get("SLURM_JOB_NUM_NODES", "1")) > 1 else "gpu"


def best_precision() -> str:
    """`bf16` on a GPU that computes in it, `fp16` on an older GPU, `fp32` without a GPU.

    On two CPU cores fp32 is the fast precision: a step under bf16 autocast takes about twice as long.
    """
    if not gpu_count():
        return "fp32"
    import torch

    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def default_ranks() -> int:
    """All GPUs, or two ranks on a machine without one."""
    return gpu_count() or 2


def cache_folder() -> Path:
    """Where the course keeps what it has compiled: `$XDG_CACHE_HOME/shardlab`, by default `~/.cache/shardlab`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shardlab"


def ops_folder() -> Path:
    """Where DeepSpeed's compiled ops lie (`TORCH_EXTENSIONS_DIR` wins if it is set).

    The ops are compiled with `-march=native`, so a build made on a login node can be wrong for a compute node. The
    folder's name therefore carries the processor, the Python and the torch that it was made with.
    """
    if os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(os.environ["TORCH_EXTENSIONS_DIR"])
    from importlib.metadata import version

    cpu = next((line for line in _cpuinfo() if line.startswith("flags")), platform.processor())
    made_with = f"{platform.machine()}/{cpu}/{sys.version_info[:2]}/{version('torch')}/{version('deepspeed')}/{sys.prefix}"
    return cache_folder() / "ops" / hashlib.sha256(made_with.encode()).hexdigest()[:12]


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def cpu_name() -> str:
    line = next((line for line in _cpuinfo() if line.startswith("model name")), "")
    return line.partition(":")[2].strip() or platform.processor() or platform.machine()


def describe() -> dict:
    """The hardware as a run folder records it."""
    gpus = []
    if gpu_count():
        import torch

        gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"host": platform.node(), "cpu": cpu_name(), "cpu_cores": cpu_cores(), "gpus": gpus}


def versions() -> dict:
    """Versions of the packages that a figure depends on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("torch", "deepspeed", "transformers", "datasets", "accelerate"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


@lru_cache
def commit() -> str | None:
    """The course's commit, with `+changes` behind it where files differ; `None` outside a git checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
