"""The machine: its accelerator, memory, disk, caches, and the way to the hub."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from shardlab import hardware
from shardlab.findings import Finding, ask_python, run_command, telling_line
from shardlab.run.placement import CHECKING_RANKS, place
from shardlab.zero import ops
from shardlab.zero.memory_model import GIB

DISK_NEEDED = 2 * GIB
MEMORY_NEEDED = 4 * GIB
ASK_CUDA = """
import json, torch
cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
torch.ones(1, device="cuda").item()
print(json.dumps({"cards": [[card.name, card.total_memory] for card in cards]}))
"""
ASK_HUB = """
import json
from huggingface_hub import HfApi, constants
print(json.dumps({"url": constants.ENDPOINT, "model": HfApi().model_info("bigscience/bloom-560m", timeout=5).id}))
"""


def check_accelerator(torch: dict) -> Finding:
    name, cores = "accelerator", f"{hardware.cpu_cores()} CPU cores, {hardware.cpu_name()}"
    if torch["gpus"]:
        found, reason = ask_python(ASK_CUDA, 180, **ops.environment())
        if found is None:
            return Finding(
                name,
                "fails",
                f"{torch['gpus']} GPUs, and the first does not compute: {reason}",
                "nvidia-smi    # is another process on it?",
            )
        cards = Counter((card, memory // GIB) for card, memory in found["cards"])
        return Finding(name, "works", ", ".join(f"{n} × {card}, {gib} GiB" for (card, gib), n in cards.items()) + f"; {cores}")
    if Path("/dev/nvidiactl").exists() and not hardware.gpus_are_hidden():
        version = torch["version"].partition("+")[0]
        remedy = (
            "nvidia-smi    # the CUDA version that it names must be at least torch's"
            if torch["cuda"]
            else shlex.join([sys.executable, "-m", "pip", "install", "--force-reinstall", f"torch=={version}"])
        )
        why = f"torch, built with CUDA {torch['cuda']}, finds none it can use" if torch["cuda"] else "torch is a build without CUDA"
        return Finding(name, "fails", f"there is an NVIDIA driver here, but {why}", remedy)
    return Finding(name, "works", f"no GPU; {cores}")


def check_milestone_ranks() -> Finding:
    return Finding("ranks of milestones", "works", f"{CHECKING_RANKS} ranks run on {place(CHECKING_RANKS, or_cpu=True).on}")


# --- the machine and its surroundings -------------------------------------------------------------------------------


def check_numactl() -> Finding:
    code, output = run_command(["numactl", "--show"], 10)
    get = "sudo apt install numactl    # without root: conda install -c conda-forge numactl"
    if code == 127:
        return Finding("numactl", "not here", "only --bind_cores_to_rank needs it", get)
    if code:
        return Finding("numactl", "not here", f"installed, but it may not bind: {telling_line(output, code)}")
    cores = re.search(r"physcpubind:(.*)", output)
    return Finding("numactl", "works", f"can bind ranks to {len(cores[1].split())} cores" if cores else "can bind ranks to cores")


def check_hub() -> Finding:
    found, reason = ask_python(ASK_HUB, 20, **ops.environment())
    if found:
        return Finding("hub", "works", f"{found['url']} answers for {found['model']}")
    return Finding(
        "hub",
        "not here",
        f"{reason}; the shipped model and data need none",
        "export HF_HUB_OFFLINE=1    # and name a SQuAD JSON file as data and a folder as model: "
        'Experiment(data="/path/to/train-v1.1.json", model="/path/to/bloom-560m")',
    )


def _hf_home() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("HF_HOME") or cache / "huggingface")


def _cannot_write(folder: Path) -> str | None:
    """Why nothing can be written to a folder, or to the nearest one above it that exists; `None` if something can."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
    except OSError as error:
        return f"{folder}: {error.strerror}"
    return None


def check_caches(ops_too: bool) -> Finding:
    folders = {"XDG_CACHE_HOME": hardware.cache_folder(), "HF_HOME": _hf_home()}
    if ops_too:
        folders["TORCH_EXTENSIONS_DIR"] = hardware.ops_folder()
    for variable, folder in folders.items():
        if why := _cannot_write(folder):
            return Finding("caches", "fails", f"cannot write there: {why}", f"export {variable}=/path/to/a/folder/of/yours")
    written = dict.fromkeys(str(folder) for folder in folders.values())
    return Finding("caches", "works", f"can write to {', '.join(written)}")


def check_disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    detail = f"{free / GIB:.0f} GiB free in {Path.cwd()}, where runs/ is written"
    if free < DISK_NEEDED:
        return Finding(
            "disk",
            "fails",
            f"{detail}; {DISK_NEEDED // GIB} GiB are needed",
            "du -sh runs/*    # remove runs, or start from another folder",
        )
    return Finding("disk", "works", detail)


def _memory_limit() -> int | None:
    """Bytes that a batch job or a container may use (cgroup v2); `None` where the whole machine may be used."""
    path = Path("/proc/self/cgroup")
    group = next((line[3:] for line in path.read_text().splitlines() if line.startswith("0::")), None) if path.exists() else None
    if group is None:
        return None
    folder = Path("/sys/fs/cgroup", group.lstrip("/"))
    limits = [(above / "memory.max").read_text().strip() for above in (folder, *folder.parents) if (above / "memory.max").exists()]
    return min((int(limit) for limit in limits if limit != "max"), default=None)


def check_memory() -> Finding:
    import psutil

    memory, limit = psutil.virtual_memory(), _memory_limit()
    usable = min(memory.available, limit) if limit is not None else memory.available
    detail = f"{memory.available / GIB:.1f} GiB available of {memory.total / GIB:.1f}"
    detail += f"; this job may use {limit / GIB:.1f}" if limit is not None else ""
    if usable < MEMORY_NEEDED:
        return Finding(
            "memory",
            "fails",
            f"{detail}; {MEMORY_NEEDED // GIB} GiB are needed",
            "ps -eo rss,pid,args --sort=-rss | head    # what holds it; or ask for a larger job: sbatch --mem=8G",
        )
    return Finding("memory", "works", detail)
