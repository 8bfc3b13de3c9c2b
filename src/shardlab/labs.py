"""The catalogue of labs: what each `labs/<lab>/lab.toml` says, and where the parts of a lab lie.

labs/<lab>/         lab.toml, the notebook, milestones, programs.py: what a learner gets
solutions/<lab>/    answers, sources of the notebooks, hidden milestones, mutants: what only the instructor has
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shardlab.errors import CourseError
from shardlab.hardware import ROOT


class LabError(CourseError, ValueError):
    """A lab that is not there, or whose `lab.toml` says what it cannot; the message names it."""


class Lab(BaseModel):
    """One lab. `stem` is its name everywhere: its two folders, its exercise module, its milestones."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    root: Path
    stem: str = Field(pattern=r"^lab\d\d_\w+$")
    number: int
    title: str
    minutes: int = Field(description="what it takes a learner")
    lecture: str = Field("", description="the notebook in notebooks/ to read before it")
    writes: str = Field(description="what the learner writes, for the tables of labs")
    packages: dict[str, str] = Field({}, description="Debian packages besides the course's own, and what needs them")
    provides: dict[str, str] = Field(
        {}, description="exercises that the demo and `shardlab run` put together: part, and `module:function`"
    )

    @property
    def has_jobs(self) -> bool:
        """Whether its milestones submit jobs to Slurm."""
        return "slurm-wlm" in self.packages

    @property
    def folder(self) -> Path:
        return self.root / "labs" / self.stem

    @property
    def notebook(self) -> Path:
        return self.folder / f"{self.stem}.ipynb"

    @property
    def milestones(self) -> Path:
        return self.folder / f"test_{self.stem}.py"

    @property
    def skeleton(self) -> Path:
        """The exercises as they were, in a release."""
        return self.folder / "skeleton.py"

    @property
    def mistakes(self) -> Path:
        """By which results known mistakes are recognised; `shardlab matrix --record` writes it."""
        return self.folder / "mistakes.json"

    @property
    def programs(self) -> Path:
        """What milestones run around the exercises; not every lab has it."""
        return self.folder / "programs.py"

    @property
    def exercises(self) -> Path:
        return self.root / "src" / "exercises" / f"{self.stem}.py"

    @property
    def lecture_notebook(self) -> Path:
        return self.root / "notebooks" / f"{self.lecture}.ipynb"

    @property
    def answers(self) -> Path:
        return self.root / "solutions" / self.stem

    @property
    def solution(self) -> Path:
        return self.answers / f"{self.stem}.py"

    @property
    def hidden_milestones(self) -> Path:
        # Pytest wants names that differ from folder to folder.
        return self.answers / f"hidden_{self.stem}.py"

    @property
    def mutants(self) -> Path:
        return self.answers / "mutants.toml"

    @property
    def executed_notebook(self) -> Path:
        return self.answers / f"{self.stem}.ipynb"


def catalogue(root: Path = ROOT) -> list[Lab]:
    """All labs, by number.

    Raises:
        LabError: a `lab.toml` that says too much, too little, or another number than its folder.
    """
    found = []
    for path in sorted((root / "labs").glob("*/lab.toml")):
        stem = path.parent.name
        try:
            lab = Lab(root=root, stem=stem, **tomllib.loads(path.read_text(encoding="utf-8")))
        except (ValidationError, tomllib.TOMLDecodeError, TypeError) as error:
            raise LabError(f"{path}: {error}") from None
        if not stem.startswith(f"lab{lab.number:02d}_"):
            raise LabError(f"{path}: number = {lab.number}, and its folder is called {stem}")
        found.append(lab)
    return found


def stems(root: Path = ROOT) -> list[str]:
    """The names of all labs, in order."""
    return [lab.stem for lab in catalogue(root)]


def chosen(words: str | None = None, root: Path = ROOT) -> list[Lab]:
    """The labs that words such as "1,2" name, by number or stem; all by default.

    Raises:
        LabError: there is no such lab.
    """
    known = catalogue(root)
    found = []
    for word in (words or "").split(",") if words else []:
        wanted = [lab for lab in known if word.strip() in (lab.stem, str(lab.number), f"{lab.number:02d}")]
        if not wanted:
            raise LabError(
                f"there is no lab {word.strip()!r}; there are {', '.join(lab.stem for lab in known)} (1, 2, … for short)"
            )
        found += wanted
    return [lab for lab in known if lab in found] if words else known


def named(stem: str, root: Path = ROOT) -> Lab:
    """The lab of that name; LabError if there is none."""
    (lab,) = chosen(stem, root)
    return lab


def provided(part: str, root: Path = ROOT) -> str:
    """The exercise that is this part of the main job, as `module:function`.

    Raises:
        LabError: no lab here provides it, as in a release without that lab.
    """
    for lab in catalogue(root):
        if part in lab.provides:
            return lab.provides[part]
    raise LabError(f"no lab here provides '{part}': this is a release without the lab that does")


def with_task(task: str, root: Path = ROOT) -> Lab:
    """The lab of a task such as "2.1".

    Raises:
        LabError: there is no such task.
    """
    for lab in catalogue(root):
        if task.partition(".")[0] == str(lab.number):
            return lab
    raise LabError(f"there is no task '{task}': tasks are called after their lab, such as 2.1")
