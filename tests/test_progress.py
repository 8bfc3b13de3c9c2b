"""What is said while something goes on: in a log file, in a terminal, in a notebook."""

import sys

import pytest

from shardlab import progress
from shardlab.progress import Log, Notebook, Quiet, Row, Terminal
from shardlab.run.experiment import Experiment
from shardlab.run.live_run import LiveRun
from shardlab.run.run_folder import Run


@pytest.fixture
def run(tmp_path) -> Run:
    return Run.create(Experiment(name="a", method="ZeRO-2", steps=4, ranks=2), tmp_path)


def drawn(display):
    display.interval = 0.0
    return display


def test_a_log_file_says_each_change_of_state_and_now_and_then_what_goes_on(run, capsys):
    display, live = drawn(Log()), LiveRun(run)
    display.heartbeat = float("inf")

    def lines() -> list[str]:
        display.update(lambda: [live.row()])
        return capsys.readouterr().out.splitlines()

    assert lines() == [], "what waits says nothing"
    run.start()
    assert lines() == ["ZeRO-2: starting, 0/4, ranks 2"]
    run.log_step(step=1, steps=4, loss=2.5, samples_per_second=3.0)
    assert lines() == ["ZeRO-2: training, 1/4, ranks 2, loss 2.500, samples/s 3.0"]
    run.log_step(step=2, steps=4, loss=2.25, samples_per_second=3.0)
    assert lines() == [], "the state is the same"
    display.heartbeat = 0.0
    assert lines() == ["ZeRO-2: training, 2/4, ranks 2, loss 2.250, samples/s 3.0"]
    display.heartbeat = float("inf")
    run.log_step(step=4, steps=4, loss=2.0, samples_per_second=3.0)
    assert lines()[0].startswith("ZeRO-2: evaluating, 4/4")
    run.finish()
    display.end(lambda: [live.row()])
    assert capsys.readouterr().out == "ZeRO-2: finished, 4/4, ranks 2, loss 2.000, samples/s 3.0\n"
    assert lines() == [], "what is over is said once"


def test_a_run_that_was_started_again_is_read_from_its_beginning(run):
    live = LiveRun(run)
    run.start()
    for step in (1, 2, 3):
        run.log_step(step=step, steps=4, loss=1.0, samples_per_second=3.0)
    assert live.row().done == 3
    run.keep_steps(1)
    assert live.row().done == 1


def test_a_run_that_begins_again_is_followed_from_its_new_file(tmp_path):
    """The new file may be longer than the place where reading had stopped, and another line is there."""
    run = Run.create(Experiment(name="again", steps=9), tmp_path)
    run.start()
    live = LiveRun(run)
    for step in range(1, 4):
        run.log_step(step=step, steps=9, loss=1.0, samples_per_second=1.0)
    assert live.row().done == 3
    run.keep_steps(1)
    for step in range(2, 8):
        run.log_step(step=step, steps=9, loss=0.123456789, samples_per_second=10.0)
    assert live.row().done == 7
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "st{"step": 8, "steps": 9, "loss": 1.0, "samples_per_second": 1.0}\n')
    assert live.row().done == 7, "a line that a kill has cut short is passed over"


def test_what_could_not_be_done_here_is_not_called_finished(run):
    run.start()
    run.record(not_run="quantized weights need a GPU")
    run.finish()
    row = LiveRun(run).row()
    assert (row.state, row.over) == ("not run", True)


def test_a_display_asks_for_rows_when_it_draws_and_a_quiet_one_never(monkeypatch):
    def rows():
        asked.append(1)
        return [Row("a", "running")]

    asked, said = [], []
    quiet = Quiet(said.append)
    quiet.say("compiled")
    quiet.update(rows)
    quiet.end(rows)
    assert (asked, said) == ([], ["compiled"])
    display = Log()
    for _ in range(5):
        display.update(rows)
    assert len(asked) == 1, "five times within its interval"


def test_a_terminal_has_a_bar_for_each_row(capsys):
    display = drawn(Terminal())
    display._bars.console.file, display._bars.console.width = sys.stdout, 120
    display.update(lambda: [Row("ann [1]", "running", {"at": "task [2.1]"}, 1, 3), Row("bob", "waiting")])
    display.end(lambda: [Row("ann [1]", "finished", {"at": ""}, 3, 3, over=True), Row("bob", "waiting")])
    shown = capsys.readouterr().out
    assert "ann [1]" in shown and "finished, 3/3" in shown and "bob" in shown, "brackets are no markup"


def test_a_notebook_has_one_table_that_a_result_replaces(monkeypatch):
    shown = []

    class Handle:
        def update(self, what):
            shown.append(what)

    monkeypatch.setattr("IPython.display.display", lambda what, display_id: shown.append(what) or Handle())
    display = drawn(Notebook())
    display.update(lambda: [Row("<b>", "running", {"loss": "2.5"}, 1, 4)])
    display.replace("<p>all passed</p>", "all passed")
    table, result = shown
    assert "&lt;b&gt;" in table._repr_html_() and 'value="25"' in table._repr_html_() and "1/4" in repr(table)
    assert (result._repr_html_(), repr(result)) == ("<p>all passed</p>", "all passed")


def test_what_has_no_state_is_its_name_alone(monkeypatch, capsys):
    """As of a check: "checking task 2.1", with no heading above nothing."""
    drawn(Log()).update(lambda: [Row("checking task 2.1")])
    assert capsys.readouterr().out == "checking task 2.1\n"
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda what, display_id: shown.append(what))
    drawn(Notebook()).update(lambda: [Row("checking task 2.1")])
    assert "state" not in shown[0]._repr_html_() and repr(shown[0]) == "checking task 2.1"


def test_the_display_fits_where_the_output_goes(monkeypatch):
    assert isinstance(progress.default_display(), Log)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert isinstance(progress.default_display(), Terminal)
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    assert isinstance(progress.default_display(), Notebook)
