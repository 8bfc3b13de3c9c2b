"""Python, torch and DeepSpeed, against the versions that the course was run with."""

from __future__ import annotations

import platform
import re
import sys

from shardlab import hardware
from shardlab.findings import Finding, ask_python, pip_command
from shardlab.zero import ops

PYTHON = (3, 11)

# What is asked of a Python in a process of its own; each prints JSON in its last line.
ASK_TORCH = """
import json, torch
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "gpus": torch.cuda.device_count()}))
"""
ASK_DEEPSPEED = """
import json, deepspeed
from deepspeed.accelerator import get_accelerator
print(json.dumps({"version": deepspeed.__version__, "accelerator": get_accelerator().device_name()}))
"""


def pins() -> dict[str, str]:
    """The versions of `constraints.txt`, by package; empty if the course's folder has no such file."""
    path = hardware.ROOT / "constraints.txt"
    lines = [line.partition("#")[0] for line in path.read_text().splitlines()] if path.exists() else []
    return {canonical(name): version.strip() for name, equal, version in (line.partition("==") for line in lines) if equal}


def canonical(package: str) -> str:
    """A package's name as pip compares it: `nvidia_ml.Py` and `nvidia-ml-py` are one."""
    return re.sub(r"[-_.]+", "-", package.strip()).lower()


def against_pin(package: str, version: str, more: str = "") -> Finding:
    """Compare a version with `constraints.txt`. What follows a + (cpu, cu130) names a build, not a version."""
    pinned = pins().get(canonical(package))
    more = f"; {more}" if more else ""
    if pinned is None:
        return Finding(package, "works", f"{version} (constraints.txt names no version){more}")
    if version.partition("+")[0] != pinned.partition("+")[0]:
        return Finding(
            package, "fails", f"{version}, but the course was run with {pinned} (constraints.txt){more}", pip_command(package)
        )
    return Finding(package, "works", f"{version}, as in constraints.txt{more}")


def check_python() -> Finding:
    detail = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info < PYTHON:
        needed = ".".join(map(str, PYTHON))
        return Finding("Python", "fails", f"{detail}; the course needs {needed}", "conda env create -f environment.yml")
    return Finding("Python", "works", detail)


# --- torch and DeepSpeed --------------------------------------------------------------------------------------------


def check_torch() -> tuple[Finding, dict | None]:
    found, reason = ask_python(ASK_TORCH, 180, **ops.environment())
    if found is None:
        return Finding("torch", "fails", f"cannot be imported: {reason}", pip_command("torch")), None
    return against_pin("torch", found["version"], f"CUDA {found['cuda']}" if found["cuda"] else "a build without CUDA"), found


def check_deepspeed() -> tuple[Finding, dict | None]:
    found, reason = ask_python(ASK_DEEPSPEED, 180, **ops.environment())
    if found is None:
        return Finding("deepspeed", "fails", f"cannot be imported: {reason}", pip_command("deepspeed")), None
    return against_pin("deepspeed", found["version"], f"accelerator {found['accelerator']}"), found
