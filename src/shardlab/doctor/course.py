"""What the course itself needs: Slurm, boxes for grading, its own files as they were released."""

from __future__ import annotations

import shutil
from pathlib import Path

from shardlab.findings import Finding


def check_slurm() -> Finding:
    from shardlab.cluster import slurm

    why = slurm.missing()
    if why:
        return Finding(
            "Slurm",
            "not here",
            "no job can be submitted from here; only labs with jobs, and runs on several nodes, need it",
            f"{slurm.START_ONE}    # a real Slurm on this machine; needs: sudo apt install slurm-wlm munge. Or use a login node",
        )
    return Finding(
        "Slurm", "works", slurm.command("sbatch", "--version").strip() + (", the local cluster" if slurm.is_local() else "")
    )


def check_isolation() -> Finding:
    """Only `shardlab grade` needs it."""
    from shardlab.sandbox import boxes

    kind, why = boxes.isolation()
    if kind == "bubblewrap":
        return Finding("isolation", "works", "submissions can be graded in boxes of their own")
    remedy = "sudo apt install bubblewrap"
    if shutil.which("bwrap"):
        remedy = ALLOW_BWRAP if _setting("kernel/apparmor_restrict_unprivileged_userns") == "1" else ALLOW_NAMESPACES
    return Finding("isolation", "not here", f"only `shardlab grade` needs it: {why}", remedy)


def _setting(name: str) -> str:
    """A setting of the kernel; empty where it has none of that name."""
    try:
        return Path("/proc/sys", name).read_text().strip()
    except OSError:
        return ""


ALLOW_NAMESPACES = "sudo sysctl user.max_user_namespaces=10000    # ordinary accounts may make namespaces then"
ALLOW_BWRAP = (
    "printf 'abi <abi/4.0>,\\ninclude <tunables/global>\\nprofile bwrap /usr/bin/bwrap flags=(unconfined) {\\n  userns,\\n}\\n' | "
    "sudo tee /etc/apparmor.d/bwrap && sudo apparmor_parser -r /etc/apparmor.d/bwrap"
)
"""For Ubuntu 23.10 and newer, where AppArmor lets a program make namespaces if a profile of its own says so."""


def check_course_files() -> Finding:
    """A release carries the hashes of its files."""
    from shardlab.course import release

    changed = release.changed()
    if changed is None:
        return Finding("course files", "works", "the course itself, with its solutions")
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        return Finding("course files", "fails", f"not as released: {', '.join(changed[:3])}{more}", "unpack the release again")
    return Finding("course files", "works", "as released")
