"""Progress of what takes longer than a few seconds: bars in a terminal, a table in a notebook, lines in a log file.

Whoever does the work calls `update` as often as it likes, with a function that makes the rows; a display calls that function when
it draws, and `Quiet` never does.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from shardlab.pages import page


@dataclass(frozen=True)
class Row:
    """One of the things that go on.

    Attributes:
        name: what it is.
        state: such as "waiting" or "running", or how it ended.
        facts: what else is known of it, by heading.
        done: steps done.
        total: of how many; None if they are not counted.
        over: whether it has come to its end.
    """

    name: str
    state: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    done: int = 0
    total: int | None = None
    over: bool = False

    @property
    def goes_on(self) -> bool:
        return not self.over and self.state != "waiting"

    @property
    def count(self) -> str:
        return f"{self.done}/{self.total}" if self.total else ""

    @property
    def text(self) -> str:
        """All that is known, without the name."""
        known = [self.state, self.count, *(f"{heading} {fact}" for heading, fact in self.facts.items() if fact)]
        return ", ".join(part for part in known if part)

    @property
    def line(self) -> str:
        return f"{self.name}: {self.text}" if self.text else self.name


class Quiet:
    """Shows nothing; what a display has to have.

    Args:
        say: called with a line on what takes long or is out of the ordinary; by default nothing is said.
    """

    def __init__(self, say: Callable[[str], None] = lambda line: None):
        self._say = say

    def say(self, line: str) -> None:
        """A line that stays."""
        self._say(line)

    def update(self, rows: Callable[[], list[Row]]) -> None:
        """Show how things are now, in place of how they were."""

    def end(self, rows: Callable[[], list[Row]]) -> None:
        """Show how things were at last."""

    def replace(self, markup: str, text: str) -> None:
        """Show a result in place of the rows."""


class _Drawn(Quiet):
    interval = 0.3
    """Seconds from one drawing to the next."""

    def __init__(self):
        self._drawn = float("-inf")

    def update(self, rows: Callable[[], list[Row]]) -> None:
        if time.monotonic() - self._drawn >= self.interval:
            self._drawn = time.monotonic()
            self._draw(rows())

    def end(self, rows: Callable[[], list[Row]]) -> None:
        self._draw(rows())

    def _draw(self, rows: list[Row]) -> None:
        raise NotImplementedError


class Log(_Drawn):
    """For a log file: a line whenever a row's state changes, and every 20 s one on the first row that goes on."""

    heartbeat = 20.0

    def __init__(self):
        super().__init__()
        self._told: dict[str, str] = {}
        self._spoke = time.monotonic()

    def say(self, line: str) -> None:
        self._spoke = time.monotonic()
        print(line, flush=True)

    def _draw(self, rows: list[Row]) -> None:
        first = next((row for row in rows if row.goes_on), None)
        for row in rows:
            due = row is first and time.monotonic() - self._spoke > self.heartbeat
            if due or row.state != self._told.get(row.name, "waiting"):
                self.say(row.line)
            self._told[row.name] = row.state

    def replace(self, markup: str, text: str) -> None:
        print(text, flush=True)


class Terminal(_Drawn):
    """A bar for each row."""

    def __init__(self):
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        super().__init__()
        columns = (
            TextColumn("{task.description:<22}", markup=False),
            BarColumn(24),
            TextColumn("{task.fields[text]}", markup=False),
        )
        self._bars = Progress(*columns, TimeElapsedColumn())
        self._tasks: list = []

    def say(self, line: str) -> None:
        self._bars.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _draw(self, rows: list[Row]) -> None:
        if not self._tasks:
            self._bars.start()
        for number, row in enumerate(rows):
            if number == len(self._tasks):
                self._tasks.append(self._bars.add_task(row.name, total=row.total, text="", start=False))
            task = self._tasks[number]
            if row.goes_on and not self._bars.tasks[number].started:
                self._bars.start_task(task)
            self._bars.update(task, description=row.name, completed=row.done, total=row.total, text=row.text)
            if row.over:
                self._bars.stop_task(task)

    def end(self, rows: Callable[[], list[Row]]) -> None:
        super().end(rows)
        self._bars.stop()

    def replace(self, markup: str, text: str) -> None:
        self._bars.stop()
        print(text)


class Shown:
    """HTML in a notebook, text elsewhere."""

    def __init__(self, markup: str, text: str):
        self.markup, self.text = markup, text

    def _repr_html_(self) -> str:
        return self.markup

    def __repr__(self) -> str:
        return self.text


class Notebook(_Drawn):
    """A table below the cell, redrawn in place. Not rich's, whose output in a notebook is a widget that a stored notebook loses."""

    def __init__(self):
        super().__init__()
        self._handle = None

    def say(self, line: str) -> None:
        print(line)

    def _draw(self, rows: list[Row]) -> None:
        facts = list(dict.fromkeys(heading for row in rows for heading in row.facts))
        stated, counted = any(row.state for row in rows), any(row.total for row in rows)
        table = page(
            "progress.html",
            head=["", *(["state"] if stated else []), *(["step"] if counted else []), *facts],
            rows=[
                (
                    [
                        row.name,
                        *([row.state] if stated else []),
                        *([row.count] if counted else []),
                        *(row.facts.get(heading, "") for heading in facts),
                    ],
                    round(100 * row.done / row.total) if row.total else 0,
                )
                for row in rows
            ],
            bars=counted,
        )
        self._show(Shown(table, "\n".join(row.line for row in rows)))

    def replace(self, markup: str, text: str) -> None:
        self._show(Shown(markup, text))

    def _show(self, what: Shown) -> None:
        from IPython.display import display

        if self._handle is None:
            self._handle = display(what, display_id=True)
        else:
            self._handle.update(what)


def in_notebook() -> bool:
    """Whether this process is a Jupyter kernel."""
    shell = sys.modules.get("IPython")
    shell = shell.get_ipython() if shell else None
    return shell is not None and shell.__class__.__name__ == "ZMQInteractiveShell"


def default_display() -> Quiet:
    """The display that fits where the output of this process goes."""
    if in_notebook():
        return Notebook()
    return Terminal() if sys.stdout.isatty() else Log()
