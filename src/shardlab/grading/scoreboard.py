"""The scoreboard: for each task what became of its milestone, and what to do next."""

from __future__ import annotations

import html
import io
from dataclasses import dataclass

VERDICTS = {"passed": "green", "failed": "red", "not implemented": "yellow", "not run": "blue"}


@dataclass
class Milestone:
    """The outcome of one milestone test."""

    lab: str
    task: str
    name: str
    points: int
    verdict: str
    message: str = ""
    hidden: bool = False

    @property
    def earned(self) -> int:
        return self.points if self.verdict == "passed" else 0


def task_order(task: str) -> list[int]:
    return [int(part) for part in task.split(".")]


def next_step(milestones: list[Milestone]) -> str:
    """One sentence: the first task that is not passed, or that all is done."""
    for milestone in sorted(milestones, key=lambda m: task_order(m.task)):
        if milestone.verdict == "failed":
            return f"Next: task {milestone.task} fails; its message above says what came and what should have."
        if milestone.verdict == "not implemented":
            return f"Next: task {milestone.task}. {milestone.message.splitlines()[0].partition(': ')[2]}"
    missing = [m for m in milestones if m.verdict == "not run"]
    if missing:
        return f"All that could run has passed; not run here: {', '.join(m.task for m in missing)}."
    return "All milestones passed."


def render(milestones: list[Milestone], width: int = 110) -> str:
    """The scoreboard for a terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=io.StringIO(), width=width)
    for lab in dict.fromkeys(m.lab for m in milestones):
        mine = sorted((m for m in milestones if m.lab == lab), key=lambda m: task_order(m.task))
        table = Table(title=lab, title_justify="left")
        for heading, justify in (("task", "right"), ("milestone", "left"), ("verdict", "left"), ("points", "right")):
            table.add_column(heading, justify=justify)
        for m in mine:
            reason = f": {m.message.splitlines()[0]}" if m.verdict == "not run" and m.message else ""
            table.add_row(m.task, m.name.removeprefix("test_").replace("_", " "), m.verdict + reason, f"{m.earned}/{m.points}")
        table.add_section()
        table.add_row("", "", "", f"{sum(m.earned for m in mine)}/{sum(m.points for m in mine)}")
        console.print(table)
        console.print(next_step(mine), highlight=False, markup=False)
    return console.file.getvalue()


def render_html(milestones: list[Milestone]) -> str:
    """The outcome of one check in a notebook."""
    colours = {"passed": "#2e7d32", "failed": "#c62828", "not implemented": "#b26a00", "not run": "#1565c0"}
    blocks = []
    for m in milestones:
        message = f"<pre style='margin:4px 0 0 0'>{html.escape(m.message)}</pre>" if m.message else ""
        blocks.append(
            f"<div style='border-left:4px solid {colours[m.verdict]};padding:2px 10px;margin:4px 0'>"
            f"<b style='color:{colours[m.verdict]}'>{m.task} {m.verdict}</b> "
            f"{html.escape(m.name.removeprefix('test_').replace('_', ' '))} ({m.earned}/{m.points}){message}</div>"
        )
    return "".join(blocks)
