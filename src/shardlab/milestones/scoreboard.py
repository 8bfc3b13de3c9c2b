"""The scoreboard: for each task what became of its milestone, and what to do next."""

from __future__ import annotations

import io
from dataclasses import dataclass

from shardlab.pages import page

VERDICTS = {"passed": "green", "failed": "red", "not implemented": "yellow", "not run": "blue"}

COLOURS = {"passed": "#2e7d32", "failed": "#c62828", "not implemented": "#b26a00", "not run": "#1565c0"}


@dataclass
class Milestone:
    """The outcome of one milestone test.

    Attributes:
        hidden: it is not in a release, and guards the points of its task's other milestone.
        waits_for: the task that it uses and that has not passed, so that its own failure says nothing.
        ran_on: what its ranks ran on: `GPUs`, or `the CPU` and why not those that are here; empty where there was no choice.
        fingerprint: of the result that it failed for, by which a known mistake is recognised.
    """

    lab: str
    task: str
    name: str
    points: int
    verdict: str
    message: str = ""
    hidden: bool = False
    waits_for: str = ""
    ran_on: str = ""
    fingerprint: str = ""

    @property
    def title(self) -> str:
        """The test's name in words."""
        return title_of(self.name)

    @property
    def earned(self) -> int:
        return self.points if self.verdict == "passed" else 0


def title_of(name: str) -> str:
    """A test's name as words."""
    return name.removeprefix("test_").replace("_", " ")


def task_order(task: str) -> list[int]:
    return [int(part) for part in task.split(".")]


def next_step(milestones: list[Milestone]) -> str:
    """One sentence: the first task that is not passed, or that all is done."""
    for milestone in sorted(milestones, key=lambda m: task_order(m.task)):
        if milestone.verdict == "failed" and milestone.waits_for not in ("", *(m.task for m in milestones)):
            return f"Next: task {milestone.waits_for}; task {milestone.task} uses it."
        if milestone.verdict == "failed":
            return f"Next: task {milestone.task} fails; its message above says what was expected and what was found."
        if milestone.verdict == "not implemented":
            return f"Next: task {milestone.task}. {milestone.message.splitlines()[0].partition(': ')[2]}"
    missing = [m for m in milestones if m.verdict == "not run"]
    if missing:
        return f"All that could run has passed; not run here: {', '.join(m.task for m in missing)}."
    tasks = {milestone.task for milestone in milestones}
    return "All milestones passed." if len(tasks) > 1 else f"Task {', '.join(tasks)} passed."


def where_ranks_ran(milestones: list[Milestone]) -> list[str]:
    """A sentence for each place that ranks of these milestones ran on, on a machine that has GPUs."""
    return [f"Ranks ran on {place}." for place in dict.fromkeys(m.ran_on for m in milestones if m.ran_on)]


def render(milestones: list[Milestone], width: int = 110) -> str:
    """The scoreboard for a terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=io.StringIO(), width=width, force_jupyter=False)  # in a notebook it would draw all by itself
    for lab in dict.fromkeys(m.lab for m in milestones):
        mine = sorted((m for m in milestones if m.lab == lab), key=lambda m: task_order(m.task))
        table = Table(title=lab, title_justify="left")
        for heading, justify in (("task", "right"), ("milestone", "left"), ("verdict", "left"), ("points", "right")):
            table.add_column(heading, justify=justify)
        for m in mine:
            reason = f": {m.message.splitlines()[0]}" if m.verdict == "not run" and m.message else ""
            reason = f"; it uses task {m.waits_for}, which comes first" if m.waits_for else reason
            table.add_row(m.task, m.title, m.verdict + reason, f"{m.earned}/{m.points}")
        table.add_section()
        table.add_row("", "", "", f"{sum(m.earned for m in mine)}/{sum(m.points for m in mine)}")
        console.print(table)
        for sentence in [*where_ranks_ran(mine), next_step(mine)]:
            console.print(sentence, highlight=False, markup=False)
    return console.file.getvalue()


def render_text(milestones: list[Milestone]) -> str:
    """The outcome of one check in a terminal."""
    lines = []
    for m in milestones:
        lines += [f"{m.task} {m.verdict}: {m.title} ({m.earned}/{m.points})", m.message]
    lines += where_ranks_ran(milestones)
    return "\n".join(line for line in lines if line)


def render_html(milestones: list[Milestone]) -> str:
    """The outcome of one check in a notebook."""
    return page("check.html", milestones=milestones, colours=COLOURS, where=where_ranks_ran(milestones))


def render_board(milestones: list[Milestone]) -> str:
    """The scoreboard for a notebook: a line per task, the messages folded below those that failed, points, what to do next."""
    labs = []
    for name in dict.fromkeys(m.lab for m in milestones):
        mine = sorted((m for m in milestones if m.lab == name), key=lambda m: task_order(m.task))
        labs.append({"name": name, "milestones": mine, "next": next_step(mine), "where": where_ranks_ran(mine)})
    return page("scoreboard.html", labs=labs, colours=COLOURS)
