"""Real jobs for milestones: submitted to the Slurm that is there, together, and each only once in a process."""

from __future__ import annotations

import hashlib
import re
import shlex
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from shardlab.cluster import batch, slurm
from shardlab.cluster.site import Site, SiteError
from shardlab.milestones.small_runs import text_experiment, zero_config
from shardlab.run.experiment import Experiment
from shardlab.sandbox.ended import BoxEnded

LIMIT = 240.0
"""Seconds for which jobs of one milestone may wait in the queue."""
QUEUE_OF_ONE = 60.0
"""The same where the cluster has no other jobs."""


@dataclass(frozen=True)
class Ended:
    """A job that is over, or was cancelled at the limit."""

    job: slurm.Job
    log: str

    @property
    def told(self) -> str:
        """The first error in its log, which is the cause, and the log's end, which is often a consequence."""
        errors = [
            line.strip()
            for line in self.log.splitlines()
            if re.search(r"\b\w*(Error|Exception)\b: |command not found|: error: ", line)
        ]
        return f"the first error in its log: {errors[0][:300] if errors else 'none'}; its log ends: {self.log[-200:]}"


_ENDED: dict[str, list[Ended]] = {}


def site() -> Site:
    """The profile of the Slurm that is there; the milestone is reported as not run where there is none."""
    if why := slurm.missing():
        pytest.skip(why)
    try:
        return batch.site_in_use()
    except SiteError as error:
        pytest.skip(str(error))


def folder_for(workspace: Path, *texts: str) -> Path:
    """A folder for jobs with these texts, on a file system that all nodes see. Its name has a space, as a learner's may."""
    name = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:10]
    place = workspace if slurm.is_local() else batch.run_root(site())
    folder = place / "jobs of milestones" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def log_folder(workspace: Path) -> Path:
    """A folder for jobs' output, on a file system that all nodes see."""
    folder = workspace / "job-logs" if slurm.is_local() else batch.run_root(site())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run_jobs(
    scripts: list[str], *options: str, running: float = 60, gpus_per_node: int = 0, meanwhile=lambda jobs: None
) -> list[Ended]:
    """Submit scripts, and wait until all jobs are over.

    Args:
        scripts: the texts; equal ones are submitted once in a process.
        options: of `sbatch`, for all of them.
        running: seconds after the first of them has begun, until those that are left are cancelled.
        gpus_per_node: what each asks for.
        meanwhile: called again and again with the jobs' numbers.

    Raises:
        shardlab.cluster.slurm.SlurmError: a script was refused; the message is Slurm's.
    """
    profile = site()
    key = "\0".join([*scripts, *options])
    if key not in _ENDED:
        given = [*options, *batch.sbatch_options(profile, gpus_per_node=gpus_per_node)]
        numbers = [slurm.submit(script, *given) for script in scripts]
        submitted, begun = time.monotonic(), None
        try:
            while True:
                now = [slurm.job(number) for number in numbers]
                if all(job.is_over for job in now):
                    break
                meanwhile(numbers)
                if begun is None and any(job.state not in slurm.PENDING for job in now):
                    begun = time.monotonic()
                if begun is None and slurm.is_elsewhere() and time.monotonic() - submitted > QUEUE_OF_ONE:
                    break  # nobody else's job is in its way
                if begun is None and time.monotonic() - submitted > LIMIT:
                    first = now[0]
                    pytest.skip(f"job {first.number} waits in the queue for {LIMIT:g} s ({first.reason}); check again later")
                if begun is not None and time.monotonic() - begun > running:
                    break
                time.sleep(0.2)
        except BoxEnded:
            raise  # its cluster is gone, and all jobs with it
        except BaseException:
            _cancel(numbers)
            raise
        _cancel(numbers)
        ended = [Ended(slurm.job(number), _text(slurm.job(number).log)) for number in numbers]
        if slurm.is_elsewhere():
            return ended  # the next box has a cluster of its own, which gives the same numbers again
        _ENDED[key] = ended
    return _ENDED[key]


def _cancel(numbers: list[int]) -> None:
    for number in numbers:
        if not slurm.job(number).is_over:
            slurm.cancel(number)


def _text(path: Path) -> str:
    if slurm.is_elsewhere():
        # The path comes from somebody's script: it is read with that one's eyes.
        try:
            return slurm.command("cat", "--", str(path))
        except slurm.SlurmError:
            return ""
    return path.read_text(errors="replace") if path.is_file() else ""


def recorded_torchrun(folder: Path) -> str:
    """Shell lines that put a `torchrun` first in PATH which notes node and words in `folder/started`, and then is the real one."""
    real = shutil.which("torchrun") or "torchrun"
    (folder / "bin").mkdir(exist_ok=True)
    wrapper = folder / "bin" / "torchrun"
    # The words come one per line, so that those with spaces can be told apart.
    wrapper.write_text(
        "#!/bin/bash\n"
        f'{{ printf "node %s\\n" "$SLURM_NODEID"; printf "%s\\n" "$@"; }} >{shlex.quote(str(folder))}/started-"$SLURM_NODEID"-$$\n'
        f'export PATH="${{PATH#*:}}"\nexec {shlex.quote(real)} "$@"\n'
    )
    wrapper.chmod(0o755)
    return f"export PATH={shlex.quote(str(folder / 'bin'))}:$PATH"


def started(folder: Path) -> dict[int, list[list[str]]]:
    """What `recorded_torchrun` noted: by node, the words of each torchrun."""
    found: dict[int, list[list[str]]] = {}
    for path in sorted(folder.glob("started-*")):
        node, *words = path.read_text().splitlines()
        found.setdefault(int(node.split()[1]), []).append(words)
    return found


def training(name: str, folder: Path, **changes) -> tuple[Experiment, list[str]]:
    """An experiment without any exercise in it, and the words with which torchrun starts a rank of it."""
    settings = {"accumulation": 1, "max_tokens": 64, "train_examples": None, "deepspeed": zero_config(2, adam={"lr": "auto"})}
    experiment = text_experiment(name, **(settings | changes))
    path = folder / f"{name}.json"
    path.write_text(experiment.model_dump_json())
    return experiment, ["-m", "shardlab.run.ranks", str(path), str(folder)]
