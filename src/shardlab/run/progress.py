"""Live progress of a launch: step, loss and samples/s of every run, in a terminal and in a notebook."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field

from shardlab.pages import page
from shardlab.run.run_folder import Run


@dataclass
class Row:
    """What is known of one run while it goes on."""

    run: Run
    state: str = "waiting"
    metrics: list[dict] = field(default_factory=list)
    _position: int = 0

    def refresh(self) -> None:
        """Read what the ranks have written since the last time."""
        import json

        path = self.run.folder / "metrics.jsonl"
        if path.exists():
            with open(path) as file:
                file.seek(self._position)
                for line in iter(file.readline, ""):
                    if not line.endswith("\n"):
                        break
                    self.metrics.append(json.loads(line))
                    self._position = file.tell()
        if self.state not in ("finished", "failed"):
            self.state = Run.read(self.run.folder).outcome

    @property
    def step(self) -> int:
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def steps(self) -> int | None:
        return self.metrics[-1]["steps"] if self.metrics else self.run.experiment.steps

    @property
    def cells(self) -> list[str]:
        """Name, ranks, step, loss, samples/s, state."""
        last = self.metrics[-1] if self.metrics else {}
        steps = f"{self.step}/{self.steps}" if self.steps else ""
        return [
            self.run.experiment.method,
            str(self.run.experiment.ranks),
            steps,
            f"{last['loss']:.3f}" if last else "",
            f"{last['samples_per_second']:.1f}" if last else "",
            self.state,
        ]


HEADINGS = ["method", "ranks", "step", "loss", "samples/s", "state"]


class Quiet:
    """Shows no progress.

    Args:
        say: called with a line on what takes long or is out of the ordinary; by default nothing is said.
    """

    def __init__(self, say=lambda line: None):
        self._say = say

    def begin(self, rows: list[Row]) -> None:
        self.rows = rows

    def say(self, line: str) -> None:
        self._say(line)

    def update(self) -> None:
        for row in self.rows:
            row.refresh()

    def end(self) -> None:
        self.update()


class Terminal(Quiet):
    """A bar for each run; in a log file, a line for each run that ends, and every 20 s one on what goes on."""

    heartbeat = 20.0

    def __init__(self):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.console = Console()
        self.bars = Progress(
            TextColumn("{task.description:<22}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]:<34}"),
            TimeElapsedColumn(),
            console=self.console,
        )
        self.live = self.console.is_terminal

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False)

    def begin(self, rows: list[Row]) -> None:
        super().begin(rows)
        self.told: set[int] = set()
        self.spoke = time.monotonic()
        if self.live:
            self.tasks = [self.bars.add_task(row.run.experiment.method, total=row.steps, numbers="", start=False) for row in rows]
            self.bars.start()

    def update(self) -> None:
        super().update()
        for index, row in enumerate(self.rows):
            _, _, steps, loss, speed, state = row.cells
            if self.live:
                if state not in ("waiting",) and not self.bars.tasks[index].started:
                    self.bars.start_task(self.tasks[index])
                numbers = f"loss {loss}  {speed} samples/s" if loss else "waiting" if state == "waiting" else "starting"
                if row.steps and row.step == row.steps and state == "running":
                    numbers = f"loss {loss}  evaluating"
                self.bars.update(self.tasks[index], completed=row.step, total=row.steps, numbers=numbers)
                if state not in ("waiting", "running"):
                    self.bars.stop_task(self.tasks[index])
            elif state not in ("waiting", "running") and index not in self.told:
                self.told.add(index)
                self.spoke = time.monotonic()
                self.say(
                    f"{row.run.experiment.method}: {state}, {steps or 'no'} steps, loss {loss or '-'}, {speed or '-'} samples/s"
                )
            elif state == "running" and time.monotonic() - self.spoke > self.heartbeat:
                self.spoke = time.monotonic()
                doing = "starting" if not row.step else "evaluating" if row.step == row.steps else f"step {steps}, loss {loss}"
                self.say(f"{row.run.experiment.method}: {doing}")

    def end(self) -> None:
        super().end()
        if self.live:
            self.bars.stop()


class Notebook(Quiet):
    """One HTML table below the cell, redrawn in place."""

    interval = 0.3

    def begin(self, rows: list[Row]) -> None:
        from IPython.display import HTML, display

        super().begin(rows)
        self.html, self.last = HTML, time.monotonic()
        self.handle = display(HTML(self._table()), display_id=True)

    def say(self, line: str) -> None:
        print(line)

    def update(self) -> None:
        if time.monotonic() - self.last < self.interval:
            return
        self.last = time.monotonic()
        super().update()
        self.handle.update(self.html(self._table()))

    def end(self) -> None:
        super().update()
        self.handle.update(self.html(self._table()))

    def _table(self) -> str:
        rows = [(row.cells, round(100 * row.step / row.steps) if row.steps else 0) for row in self.rows]
        return page("progress.html", head=HEADINGS, rows=rows)


def in_notebook() -> bool:
    """Whether this process is a Jupyter kernel."""
    shell = sys.modules.get("IPython")
    shell = shell.get_ipython() if shell else None
    return shell is not None and shell.__class__.__name__ == "ZMQInteractiveShell"


def default_display() -> Quiet:
    return Notebook() if in_notebook() else Terminal()


class JobDisplay:
    """A job's state in the queue, then its steps and loss.

    A table redrawn in a notebook, a line redrawn in a terminal, and in a log file a line for each change of state.
    """

    def __init__(self):
        self.notebook, self.handle, self.told, self.status = in_notebook(), None, None, None
        self.started = time.monotonic()
        if not self.notebook:
            from rich.console import Console

            self.console = Console()

    def update(self, job, row: Row | None) -> None:
        """Show a `shardlab.cluster.slurm.Job`, and the row of its run once there is one."""
        waited = f"{time.monotonic() - self.started:.0f} s"
        last = row.metrics[-1] if row and row.metrics else None
        training = (
            f"step {row.step}/{row.steps}, loss {last['loss']:.3f}, {last['samples_per_second']:.1f} samples/s" if last else ""
        )
        again = f"started again {job.restarts} ×" if job.restarts else ""
        cells = [f"job {job.number}", job.state, job.reason, job.nodes, again, training, waited]
        if self.notebook:
            self._redraw(cells, row)
            return
        line = ", ".join(cell for cell in cells[:-2] if cell)
        if self.console.is_terminal:
            self.status = self.status or self.console.status("")
            self.status.start()
            self.status.update(", ".join(cell for cell in cells if cell))
        elif line != self.told:
            self.console.print(f"{waited:>6}  {', '.join(filter(None, [line, training]))}", highlight=False, markup=False)
        self.told = line

    def _redraw(self, cells: list[str], row: Row | None) -> None:
        from IPython.display import HTML, display

        share = round(100 * row.step / row.steps) if row and row.steps else 0
        table = page("progress.html", head=["", "state", "reason", "nodes", "", "training", "since"], rows=[(cells, share)])
        if self.handle is None:
            self.handle = display(HTML(table), display_id=True)
        else:
            self.handle.update(HTML(table))

    def end(self) -> None:
        if self.status is not None:
            self.status.stop()
            self.console.print(self.told, highlight=False, markup=False)
