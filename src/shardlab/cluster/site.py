"""The site profile: all that the batch scripts need to know about one cluster. No other file names anything of it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from shardlab.errors import CourseError
from shardlab.hardware import ROOT

PROFILE = ROOT / "slurm" / "site.toml"
"""The site's own profile."""

LOCAL_PROFILE = ROOT / "slurm" / "local.toml"
"""The profile of the cluster that `slurm/local_cluster.sh` starts."""

TIME = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d\d)")


class SiteError(CourseError, ValueError):
    """A site profile that cannot be used; the message names the file, the key and the remedy."""


def minutes(time: str) -> float:
    """A time as Slurm writes it ("30:00", "4:00:00", "2-00:00:00") in minutes.

    Raises:
        ValueError: it is written otherwise.
    """
    found = TIME.fullmatch(time)
    if not found:
        raise SiteError(f"{time!r} is no time; write hours, minutes and seconds: 1:30:00, or days before them: 2-12:00:00")
    days, hours, minutes_, seconds = (int(part or 0) for part in found.groups())
    return days * 1440 + hours * 60 + minutes_ + seconds / 60


class Environment(BaseModel):
    """How a job comes by Python and the course's packages."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["current", "venv", "conda", "container"] = Field(description="current: the Python that renders the script")
    modules: list[str] = Field([], description="loaded first, in this order")
    path: str | None = Field(None, description="of the virtual environment, the conda environment, or the container's image")
    conda_setup: str | None = Field(None, description="the site's conda.sh, for kind conda")
    container_command: str | None = Field(None, description="what starts a command in the container, with {image} in it")

    @model_validator(mode="after")
    def _complete(self):
        if self.kind != "current" and not self.path:
            raise ValueError(f"kind '{self.kind}' needs a path")
        if self.kind == "conda" and not self.conda_setup:
            raise ValueError("kind 'conda' needs conda_setup: the path of conda.sh, such as /opt/conda/etc/profile.d/conda.sh")
        if self.kind == "container" and "{image}" not in (self.container_command or ""):
            raise ValueError("kind 'container' needs container_command with {image} in it, such as 'apptainer exec --nv {image}'")
        return self


class Site(BaseModel):
    """One cluster, as `slurm/site.toml` describes it."""

    model_config = ConfigDict(extra="forbid")

    name: str
    account: str | None = None
    partition: str | None = None
    reservation: str | None = None
    quality_of_service: str | None = None
    max_nodes: int = Field(ge=1, description="the largest job that may be asked for")
    max_time: str = Field(description="the longest, as hours:minutes:seconds")
    gpus_per_node: int = Field(ge=0)
    gpu_request: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    cores_per_node: int = Field(ge=1)
    cores_per_task: int = Field(ge=1, description="CPU cores for each GPU's rank; without GPUs, for each rank")
    memory_per_node_gib: int | None = Field(
        None, ge=1, description="host memory to ask for on each node; none where a node is always given whole"
    )
    interface: str = Field(description="the network interface by which the nodes reach each other")
    scratch: str = Field(description="a folder that every node sees, for run folders")
    offline: bool = Field(description="whether compute nodes have no network, so that models and data come from the local cache")
    login_host: str | None = Field(None, description="what a learner's ssh tunnel to Jupyter goes through")
    environment: Environment
    variables: dict[str, str] = Field({}, description="exported in every job")

    @field_validator("max_time")
    @classmethod
    def _is_time(cls, value: str) -> str:
        minutes(value)
        return value

    @model_validator(mode="after")
    def _fits(self):
        ranks = max(1, self.gpus_per_node)
        if self.cores_per_task * ranks > self.cores_per_node:
            raise ValueError(
                f"cores_per_task {self.cores_per_task} × {ranks} ranks per node are more than cores_per_node {self.cores_per_node}"
            )
        return self


def read_site(path: Path | str) -> Site:
    """Read a site profile.

    Raises:
        SiteError: there is none, it is no TOML, a value is missing, unknown, impossible, or still says CHANGE_ME.
    """
    path = Path(path)
    try:
        text = path.read_text()
        values = tomllib.loads(text)
    except FileNotFoundError:
        raise SiteError(
            f"{path}: there is no such site profile. slurm/site.toml is the one to adapt; slurm/local.toml is the local cluster's."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SiteError(f"{path} is no valid TOML: {error}") from None
    unchanged = [number for number, line in enumerate(text.splitlines(), 1) if "CHANGE_ME" in line.partition("#")[0]]
    if unchanged:
        raise SiteError(
            f"{path} is not adapted yet: CHANGE_ME still stands in line {', '.join(map(str, unchanged))}. docs/site-guide.md goes "
            "through it; to try the course without a cluster: slurm/local_cluster.sh up"
        )
    try:
        return Site(**values)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, e['loc'])) or 'the profile'}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()
        ]
        raise SiteError(f"{path}: " + "; ".join(problems)) from None
