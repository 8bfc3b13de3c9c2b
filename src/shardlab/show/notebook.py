"""What a lab notebook needs: the exercises, reloaded when their file is saved; checks in place; predictions next to measurements.

from shardlab.show.notebook import check, compare, show, start
lab = start("<lab>")
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

from shardlab import hardware, labs, pages, switch
from shardlab.errors import UsageError
from shardlab.milestones.scoreboard import Milestone, render, render_board, render_html, render_text
from shardlab.progress import Row, default_display
from shardlab.run.run_folder import Run
from shardlab.show import report

RUNS = Path(os.environ.get("SHARDLAB_RUNS") or hardware.ROOT / "runs")
"""Where the notebooks keep their run folders; the variable `SHARDLAB_RUNS` moves it."""

SIZES = {"tiny": "tiny: no GPU here, so small models and data, on two ranks", "gpu": "gpu", "cluster": "cluster"}


class Exercises:
    """The exercise module of a lab. Each use looks whether the file was saved since, and if so imports it again."""

    def __init__(self, stem: str):
        self._stem, self._saved = stem, 0

    def __getattr__(self, name: str):
        path = switch.exercise_file(self._stem)
        if path.stat().st_mtime_ns != self._saved:
            self._saved = path.stat().st_mtime_ns
            switch.use_exercises(switch.exercises_folder())
        return getattr(switch.import_exercise(self._stem), name)

    def __repr__(self) -> str:
        return f"<exercises in {switch.exercise_file(self._stem)}>"


def _display(text: str) -> None:
    from IPython.display import HTML, display

    display(HTML(text))


def start(stem: str) -> Exercises:
    """Begin a lab: say which file is yours and which size of the course applies here, and warm the ranks up.

    Args:
        stem: the lab's name.

    Raises:
        ValueError: there is no such lab.
    """
    from shardlab.run.launch import warm_up
    from shardlab.run.placement import CHECKING_RANKS, place

    labs.named(stem)
    path = switch.exercise_file(stem)
    if not path.exists():
        raise UsageError(f"there is no {path}: bring the file back, or print it as it was: shardlab skeleton {stem}")
    switch.use_exercises(switch.exercises_folder())
    _interrupts_in_a_sentence()
    checks = place(CHECKING_RANKS, or_cpu=True)
    for device in dict.fromkeys([hardware.device(), checks.device]):
        warm_up(device)
    gpus = hardware.gpu_count()
    machine = f"{gpus} GPU{'s' if gpus > 1 else ''}" if gpus else f"{hardware.cpu_cores()} CPU cores, no GPU"
    shown = path.relative_to(hardware.ROOT) if path.is_relative_to(hardware.ROOT) else path
    print(
        f"Your file: {shown} (saved changes are picked up by themselves)\nThis machine: {machine}. Size: {SIZES[hardware.size()]}."
    )
    if checks.note:
        print(f"Checks: {checks.note[0].lower()}{checks.note[1:]}")
    return Exercises(stem)


def _interrupts_in_a_sentence() -> None:
    """Show an interrupt as what it was, and what it left: IPython would show frames of a wait, and an empty KeyboardInterrupt."""
    from IPython import get_ipython

    def show_interrupt(shell, kind, error, trace, tb_offset=None) -> None:
        said = str(error) or "interrupted."
        print(said[0].upper() + said[1:])

    if shell := get_ipython():
        shell.set_custom_exc((KeyboardInterrupt,), show_interrupt)


def outcomes(task: str, say: Callable[[str], None]) -> list[Milestone]:
    """Run the milestones of one task, as `pytest labs --task …` does, in this process.

    Args:
        task: such as "2.1".
        say: called with what is being done.

    Raises:
        ValueError: there is no such task.
    """
    from shardlab.milestones.grade import grade

    lab = labs.with_task(task)
    switch.use_exercises(switch.exercises_folder())
    return grade(lab.stem, task=task, say=say)


def check(task: str) -> None:
    """Check one task: the same milestone that `pytest labs` runs, shown below the cell."""
    files = _files()
    with _checking() as (display, doing):
        found = outcomes(task, doing)
        display.replace(render_html(found), render_text(found))
    _checked[task] = (files, found)


@contextlib.contextmanager
def _checking():
    """A display, and what to call with what is being done; a result replaces it, and an error removes it."""
    display = default_display()
    display.interval = 0.0  # each line is another one, and the last one may stay for long

    def doing(what: str) -> None:
        display.update(lambda: [Row(what)])

    doing("checking …")
    try:
        yield display, doing
    except BaseException:
        display.replace("", "")
        raise


_checked: dict[str, tuple[list, list[Milestone]]] = {}
"""By task: the files that were checked, and the outcomes."""


def _files() -> list[tuple]:
    return [(str(path), path.stat().st_mtime_ns) for path in switch.exercise_files()]


def scoreboard(stem: str) -> None:
    """All milestones of a lab as `pytest labs` reports them: verdicts, points, and what to do next.

    Where each task was checked since a file was last saved, and passed, nothing is run again.
    """
    from shardlab.milestones.grade import grade
    from shardlab.milestones.markers import milestones_of

    labs.named(stem)
    files, tasks = _files(), {milestone.task for milestone in milestones_of(stem) if not milestone.hidden}
    known = [m for task in tasks for at, found in [_checked.get(task, (None, []))] if at == files for m in found]
    if {m.task for m in known if m.verdict == "passed"} == tasks:
        default_display().replace(render_board(known), render(known))
        return
    switch.use_exercises(switch.exercises_folder())
    with _checking() as (display, doing):
        found = grade(stem, say=doing)
        display.replace(render_board(found), render(found))


def show(runs: list[Run] | Run, *, plots: bool = True) -> None:
    """The table of some runs, and their plots."""
    from IPython.display import display

    runs = [runs] if isinstance(runs, Run) else runs
    _display(report.html_table(runs))
    if plots:
        figure = report.plot(runs)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=80)
        from IPython.display import Image

        display(Image(buffer.getvalue()))


def compare(
    measured: dict, predicted: dict, reference: dict | None = None, *, unit: str = "", reference_name: str = "reference"
) -> None:
    """Your predictions next to what was measured, and to the reference figure.

    Args:
        measured: the results, by name.
        predicted: what you wrote down before, by the same names; numbers, texts, or None where you did not say.
        reference: the course's own figure, by the same names.
        unit: of the numbers; "bytes" are shown as MiB or GiB.
        reference_name: where the reference was measured.
    """

    def text(value) -> str:
        if value is None or value is Ellipsis:
            return "—"
        if unit == "bytes" and isinstance(value, int | float):
            return report.bytes_text(value)
        if isinstance(value, int):
            return f"{value:,} {unit}".strip()
        return f"{value:,.4g} {unit}".strip() if isinstance(value, float) else str(value)

    rows = []
    for name, came in measured.items():
        said = predicted.get(name)
        ratio = f"{said / came:.2f} ×" if isinstance(said, int | float) and isinstance(came, int | float) and came else ""
        cells = [str(name), text(said), text(came), ratio] + ([text(reference.get(name))] if reference else [])
        rows.append(cells)
    heads = ["", "you predicted", "measured", "prediction / measured"] + ([reference_name] if reference else [])
    _display(pages.table(heads, rows))
    open_ = sum(predicted.get(name, ...) in (None, ...) for name in measured)
    if open_:
        print(f"{open_} of {len(measured)} not predicted. Guess before you run: a wrong guess shows what you did not know yet.")


def table(rows: list[dict], *, bytes_columns: tuple[str, ...] = ()) -> None:
    """A list of dictionaries as a table, a row each."""

    def text(key, value) -> str:
        if value is None:
            return "—"
        if key in bytes_columns:
            return report.bytes_text(value)
        return f"{value:,.4g}" if isinstance(value, float) else str(value)

    heads = list(dict.fromkeys(key for row in rows for key in row))
    _display(pages.table([head.replace("_", " ") for head in heads], [[text(key, row.get(key)) for key in heads] for row in rows]))


def reference(name: str) -> dict:
    """A measured reference from `bench/results/`, with the hardware and versions it was measured with.

    Raises:
        ValueError: there is none of that name.
    """
    path = hardware.ROOT / "bench" / "results" / f"{name}.json"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.json"))) or "none"
        raise UsageError(f"there is no reference '{name}'; there are: {known}")
    return json.loads(path.read_text())
