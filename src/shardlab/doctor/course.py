"""What the course itself needs: Slurm, boxes for grading, its own files as they were released."""

from __future__ import annotations

import shutil

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
    settings = (
        "sudo sysctl user.max_user_namespaces=10000    # and on Ubuntu kernel.apparmor_restrict_unprivileged_userns=0: they let "
        "ordinary accounts make namespaces"
    )
    remedy = settings if shutil.which("bwrap") else "sudo apt install bubblewrap"
    return Finding("isolation", "not here", f"only `shardlab grade` needs it: {why}", remedy)


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
