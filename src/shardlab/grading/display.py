"""The progress of a batch of gradings: bars in a terminal, a line per submission elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from shardlab.grading.gradebook import tasks_of


class Display:
    """Shows nothing. What a batch tells its display."""

    def say(self, line: str) -> None: ...

    def begin(self, waiting: int, kept: int, judges: int) -> None: ...

    def at(self, judge: int, name: str, what: str) -> None: ...

    def done(self, judge: int, result: dict) -> None: ...

    def end(self) -> None: ...


def summary(result: dict) -> str:
    """One line on a result."""
    grades = tasks_of(result)
    points = f"{sum(grade.earned for grade in grades)}/{sum(grade.points for grade in grades)}"
    return f"{result['name']}: {points}, {result['seconds']:.1f} s" + (f"; {result['error']}" if result["error"] else "")


class Lines(Display):
    """A line when a submission is graded."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.count, self.total, self.started = 0, 0, 0.0

    def say(self, line: str) -> None:
        self.console.print(line, markup=False)

    def begin(self, waiting: int, kept: int, judges: int) -> None:
        self.total, self.started = waiting, time.monotonic()
        already = f", {kept} graded before" if kept else ""
        self.console.print(f"{waiting} submissions to grade{already}, {judges} at a time", markup=False)

    def done(self, judge: int, result: dict) -> None:
        self.count += 1
        self.console.print(f"[{self.count}/{self.total}] {summary(result)}", markup=False)


class Bars(Lines):
    """Bars: one for all, and for each judge what it is at."""

    def begin(self, waiting: int, kept: int, judges: int) -> None:
        super().begin(waiting, kept, judges)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=self.console)
        self.whole = self.progress.add_task("graded", total=waiting)
        self.judges = [self.progress.add_task(f"judge {number}: starting", total=None) for number in range(judges)]
        self.progress.start()

    def at(self, judge: int, name: str, what: str) -> None:
        self.progress.update(self.judges[judge], description=f"{escape(name[:40])}: {what}")

    def done(self, judge: int, result: dict) -> None:
        super().done(judge, result)
        self.progress.advance(self.whole)
        self.progress.update(self.judges[judge], description="waiting")

    def end(self) -> None:
        self.progress.stop()


def default() -> Display:
    """Bars in a terminal, lines elsewhere."""
    console = Console(highlight=False, soft_wrap=True)
    return Bars(console) if console.is_terminal else Lines(console)
