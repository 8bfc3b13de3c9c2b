"""Batch scripts, rendered from the site profile and the templates in `slurm/scripts/`.

A script is text for `sbatch` and for people: each directive has its reason above it.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from shardlab.cluster import slurm
from shardlab.cluster.site import LOCAL_PROFILE, PROFILE, Site, minutes, read_site
from shardlab.errors import CourseError
from shardlab.hardware import ROOT

SCRIPTS = {
    "baseline": "the plain Trainer on one GPU",
    "zero-sweep": "every ZeRO stage on all GPUs of a node, as an array job",
    "multi-gpu": "one method on all GPUs of one node",
    "multi-node": "one method on several nodes: preflight, checkpoints, goes on after a lost node or the time limit",
    "jupyter": "JupyterLab on a compute node",
    "grading": "the milestones of a folder of exercises",
    "class": "a class of submissions as an array job; `shardlab grade --slurm` submits it",
}
SWEEP = ["baseline", "ZeRO-1", "ZeRO-2", "ZeRO-3"]
ONE_NODE = {"baseline", "zero-sweep", "multi-gpu", "jupyter", "grading", "class"}


class BatchError(CourseError, ValueError):
    """A job that cannot be asked for; the message names the value and what is possible."""


class JobSettings(BaseModel):
    """What one job asks for; what is not given comes from the site profile or from the kind of job."""

    model_config = ConfigDict(extra="forbid")

    nodes: int | None = None
    gpus_per_node: int | None = None
    ranks_per_node: int | None = Field(None, description="on nodes without GPUs; with GPUs it is one rank per GPU")
    time: str | None = None
    launcher: Literal["torchrun", "deepspeed", "srun"] = "torchrun"
    exercises: str | None = Field(None, description="for grading: the folder that holds `exercises/`")
    solutions: bool = False
    parts: int = Field(1, ge=1, description="for class: jobs of the array")
    arguments: list[str] = Field(
        [], description="options of `shardlab run`, such as --method ZeRO-2; for class, of `shardlab grade`"
    )


@dataclass(frozen=True)
class Directive:
    """One `#SBATCH` line, and the comment above it."""

    reason: str
    option: str


def site_in_use(path: Path | str | None = None) -> Site:
    """The profile at `path`; by default the local cluster's where that is the Slurm in use, else the site's own."""
    return read_site(path or (LOCAL_PROFILE if slurm.is_local() else PROFILE))


def _checked(name: str, settings: JobSettings, site: Site) -> tuple[int, int, int, str]:
    """Nodes, GPUs per node, ranks per node and time, or an error that says what is impossible."""
    if name not in SCRIPTS:
        raise BatchError(f"there is no script '{name}'; there are {', '.join(SCRIPTS)}")
    nodes = settings.nodes if settings.nodes is not None else 2 if name == "multi-node" else 1
    if nodes < 1:
        raise BatchError(f"--nodes {nodes}: a job needs at least 1 node")
    if name in ONE_NODE and nodes != 1:
        raise BatchError(f"--nodes {nodes}: '{name}' runs on one node; several are for multi-node")
    if nodes > site.max_nodes:
        raise BatchError(f"--nodes {nodes}: {site.name} lets a job have {site.max_nodes} (max_nodes in the site profile)")
    wanted = {"baseline": 1, "jupyter": 1, "grading": 1, "class": 0}.get(name, site.gpus_per_node)
    gpus = settings.gpus_per_node if settings.gpus_per_node is not None else min(wanted, site.gpus_per_node)
    if gpus < 0 or gpus > site.gpus_per_node:
        raise BatchError(
            f"--gpus-per-node {gpus}: a node of {site.name} has {site.gpus_per_node} (gpus_per_node in the site profile)"
        )
    if site.gpus_per_node and not gpus and name != "class":
        raise BatchError("--gpus-per-node 0: these nodes have GPUs, and the ranks need one each")
    if gpus and settings.ranks_per_node not in (None, gpus):
        raise BatchError(f"--ranks-per-node {settings.ranks_per_node}: with GPUs it is one rank per GPU, here {gpus}")
    ranks = gpus or (settings.ranks_per_node if settings.ranks_per_node is not None else 1 if name == "multi-node" else 2)
    if ranks < 1:
        raise BatchError(f"--ranks-per-node {ranks}: a node needs at least 1 rank")
    if ranks * site.cores_per_task > site.cores_per_node:
        raise BatchError(
            f"--ranks-per-node {ranks}: with {site.cores_per_task} cores each (cores_per_task in the site profile) "
            f"they need more than a node's {site.cores_per_node}"
        )
    time = settings.time or {"baseline": "30:00", "jupyter": "4:00:00", "grading": "30:00", "class": "4:00:00"}.get(name, "1:00:00")
    try:
        asked = minutes(time)
    except ValueError as error:
        raise BatchError(f"--time: {error}") from None
    if not 0 < asked:
        raise BatchError(f"--time {time}: a job needs some")
    if asked > minutes(site.max_time):
        if settings.time:
            raise BatchError(f"--time {time}: {site.name} ends jobs after {site.max_time} (max_time in the site profile)")
        time = site.max_time
    if name == "class" and not settings.arguments:
        raise BatchError("'class' is submitted by: shardlab grade SUBMISSIONS… --out DIR --slurm")
    if name == "grading" and not settings.exercises:
        raise BatchError("--exercises is missing: the folder that holds the 'exercises' package to grade")
    return nodes, gpus, ranks, time


def directives(name: str, settings: JobSettings, site: Site) -> list[Directive]:
    """The `#SBATCH` options of a job, with their reasons.

    Raises:
        BatchError: a value is missing or impossible on this site.
    """
    nodes, gpus, ranks, time = _checked(name, settings, site)
    folder = run_root(site)
    log = folder / ("%x-%A_%a.out" if name in ("zero-sweep", "class") else "%x-%j.out")
    found = [
        Directive("The name in squeue, and in the name of the log.", f"--job-name=shardlab-{name}"),
        Directive("How many nodes. Not a range: the run's global batch rests on it.", f"--nodes={nodes}"),
        Directive("One task per node: it starts the node's ranks itself.", "--ntasks-per-node=1"),
    ]
    if gpus:
        found.append(Directive("GPUs on each node, one per rank.", _gpus(site, gpus)))
    found.append(
        Directive(
            f"CPU cores of that task, {site.cores_per_task} a rank: for Python, the data and an offloaded optimizer.",
            f"--cpus-per-task={ranks * site.cores_per_task}",
        )
    )
    if site.memory_per_node_gib:
        found.append(
            Directive("Host memory per node; without it many clusters give very little.", f"--mem={site.memory_per_node_gib}G")
        )
    found.append(Directive("After this time Slurm ends the job. Shorter jobs start sooner.", f"--time={time}"))
    if name == "zero-sweep":
        found.append(Directive("One job per method, two at a time, so that others get nodes too.", f"--array=0-{len(SWEEP) - 1}%2"))
    if name == "class":
        found.append(Directive("One job a share of the class.", f"--array=0-{settings.parts - 1}"))
    if name == "multi-node":
        found += [
            Directive("Where a node is lost, Slurm puts the job back into the queue.", "--requeue"),
            Directive(
                "Two minutes before the time is up, tell this script (B:), which then has a checkpoint saved.",
                "--signal=B:USR1@120",
            ),
            Directive("A job that was started again writes on in the same log.", "--open-mode=append"),
        ]
    found.append(Directive("What the job prints. %x is its name, %j its number.", f"--output={_quoted(str(log))}"))
    for option, value, reason in (
        ("account", site.account, "Whom the time is charged to."),
        ("partition", site.partition, "Which nodes."),
        ("reservation", site.reservation, "Nodes kept for the course."),
        ("qos", site.quality_of_service, "The quality of service: limits and priority."),
    ):
        if value:
            found.append(Directive(reason, f"--{option}={value}"))
    return found


def _quoted(text: str) -> str:
    """For a directive: sbatch reads quotes there, and splits at spaces otherwise."""
    return f'"{text}"' if any(letter.isspace() for letter in text) else text


def run_root(site: Site) -> Path:
    """The folder for run folders, the same on all nodes."""
    return ROOT / site.scratch


def _template(name: str):
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROOT / "slurm" / "scripts"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters["quoted"] = lambda value: shlex.quote(str(value))
    return templates.get_template(name)


def _container(site: Site) -> str:
    return (site.environment.container_command or "").replace("{image}", shlex.quote(site.environment.path))


def setup_lines(site: Site) -> str:
    """The shell lines with which a job on this site comes by Python and the course's packages, in the course's folder."""
    lines = _template("_environment.sh").render(site=site, container=_container(site), prefix=Path(sys.prefix))
    return f"cd {shlex.quote(str(ROOT))}\n{lines}".rstrip()


def sbatch_options(site: Site, *, gpus_per_node: int = 0) -> list[str]:
    """The options of `sbatch` without which this site takes no job: account, partition, reservation, quality of service, GPUs."""
    named = {"account": site.account, "partition": site.partition, "reservation": site.reservation, "qos": site.quality_of_service}
    options = [f"--{option}={value}" for option, value in named.items() if value]
    if gpus_per_node:
        options.append(_gpus(site, gpus_per_node))
    return options


def _gpus(site: Site, gpus: int) -> str:
    return f"--gpus-per-node={gpus}" if site.gpu_request == "gpus-per-node" else f"--gres=gpu:{gpus}"


def render(name: str, settings: JobSettings, site: Site) -> str:
    """A batch script.

    Args:
        name: one of `SCRIPTS`.
        settings: what this job asks for.
        site: the profile.

    Raises:
        BatchError: a value is missing or impossible on this site.
    """
    options = directives(name, settings, site)
    nodes, gpus, ranks, _ = _checked(name, settings, site)
    text = _template(f"{name}.sh").render(
        name=name,
        what=SCRIPTS[name],
        site=site,
        directives=options,
        course=ROOT,
        runs=run_root(site),
        nodes=nodes,
        gpus=gpus,
        ranks=ranks,
        launcher=settings.launcher,
        methods=SWEEP,
        parts=settings.parts,
        exercises=settings.exercises,
        container=_container(site),
        prefix=Path(sys.prefix),
        arguments=shlex.join((["--solutions"] if settings.solutions else []) + settings.arguments),
    )
    return text.rstrip() + "\n"


def submit(name: str, settings: JobSettings, site: Site) -> tuple[int, Path | None]:
    """Render a script and submit it.

    Returns:
        The job's number, and the run folder that it will write, if it writes just one.

    Raises:
        BatchError: a value is missing or impossible on this site.
        SlurmError: Slurm refuses the script.
    """
    script = render(name, settings, site)
    folder = run_root(site)
    try:
        folder.mkdir(parents=True, exist_ok=True)  # Slurm opens the log before the script begins
    except OSError as error:
        raise BatchError(f"the folder for runs, {folder} (scratch in the site profile), cannot be made: {error.strerror}") from None
    number = slurm.submit(script)
    return number, folder / f"{name}-{number}" if name in ("baseline", "multi-gpu", "multi-node") else None
