"""The command as a person types it."""

import os
import subprocess
import sys

import pytest

from shardlab.run.run_folder import Run

pytestmark = pytest.mark.ranks


def shardlab(*words: str, timeout: float = 300, **variables: str) -> subprocess.CompletedProcess:
    """Run the command in a process of its own, without a terminal."""
    return subprocess.run(
        [sys.executable, "-m", "shardlab.cli", *words], capture_output=True, text=True, timeout=timeout, env=os.environ | variables
    )


def test_help_names_every_command_in_whole_sentences():
    shown = shardlab("--help", COLUMNS="80").stdout
    for command in ("demo", "run", "report", "doctor", "build", "matrix"):
        assert f"  {command} " in shown
    assert not [line for line in shown.splitlines()[1:] if line.endswith("...")], "the sentences fit into 80 columns"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo's two ends: the baseline with its full training, as `make demo` has it."""
    runs = tmp_path_factory.mktemp("demo")
    return runs, shardlab("demo", "--method", "baseline", "--runs", str(runs), timeout=500)


def test_demo_teaches_the_model_to_answer(demo):
    """Exact match on held-out paragraphs rises from under 10 % to at least 30 %."""
    runs, done = demo
    assert done.returncode == 0, done.stderr
    run = Run.read(runs / "baseline")
    assert run.results["exact_match_before"] < 10
    assert run.results["exact_match"] >= 30
    assert run.results["eval_losses"][-1] < run.results["eval_losses"][0]


def test_demo_leaves_a_report_that_stands_alone(demo):
    runs, done = demo
    page = (runs / "report.html").read_text()
    assert (runs / "report.png").stat().st_size > 10_000
    assert "data:image/png;base64," in page and 'src="http' not in page
    assert "baseline" in page and "EM after" in page
    assert "baseline" in done.stdout and "Report:" in done.stdout


def test_offload_runs_through_the_same_command(tmp_path):
    """ZeRO-3 with parameters and optimizer on the CPU, the reference solution's configuration; every byte is the host's."""
    done = shardlab("demo", "--method", "ZeRO-3 + CPU offload", "--steps", "3", "--runs", str(tmp_path), timeout=500)
    assert done.returncode == 0, done.stderr
    run = Run.read(tmp_path / "zero-3-cpu-offload")
    assert run.outcome == "finished" and len(run.losses()) == 3
    for held in run.states()["ranks"]:
        assert held["host_parameters"] > 0 and held["host_optimizer"] > 0
        assert held["parameters"] == held["gradients"] == held["optimizer"] == 0


def test_a_run_with_the_untouched_exercises_names_the_first_task(tmp_path):
    done = shardlab("run", "mine", "--steps", "2", "--runs", str(tmp_path))
    assert done.returncode == 1
    assert "Task 1." in done.stderr and "src/exercises/lab01_baseline.py" in done.stderr
    assert Run.read(tmp_path / "mine").outcome == "failed"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("demo", "--data", "missing.json"), "there is no such file"),
        (("demo", "--method", "ZeRO-9"), "there is no method 'ZeRO-9'"),
        (("run", "x", "--method", "zero"), "there is no method 'zero'"),
        (("run", "a/b"), "name"),
        (("report", "nowhere"), "no run folder"),
    ],
)
def test_bad_input_is_one_sentence_and_no_traceback(words, says, tmp_path):
    done = shardlab(*words, "--runs", str(tmp_path)) if words[0] != "report" else shardlab(*words)
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_report_reads_what_another_process_wrote(demo):
    runs, _ = demo
    done = shardlab("report", str(runs))
    assert done.returncode == 0 and "baseline" in done.stdout


def test_build_does_not_replace_a_learner_s_work(tmp_path):
    """In a copy of the course: a task that somebody has written stops the build, and nothing is written."""
    import shutil

    from shardlab.course import authoring

    for folder in ("solutions", "src/exercises", "labs", "notebooks"):
        shutil.copytree(authoring.ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    mine = tmp_path / "src" / "exercises" / "lab01_baseline.py"
    text = mine.read_text()
    mine.write_text(
        text.replace(
            'raise NotImplementedError("Task 1.1: complete format_prompt() in src/exercises/lab01_baseline.py")', 'return "mine"'
        )
    )
    with pytest.raises(authoring.AuthoringError, match="1.1"):
        authoring.build(tmp_path)
    assert 'return "mine"' in mine.read_text()
    authoring.build(tmp_path, force=True)
    assert mine.read_text() == text


def test_only_what_a_person_can_mend_is_one_line(monkeypatch, capsys):
    from shardlab import cli
    from shardlab.errors import UsageError
    from shardlab.run.experiment import Experiment

    def app_that_raises(error):
        def app():
            raise error

        return app

    def nonsense():
        Experiment(name="x", precision="fp64")

    monkeypatch.setattr(cli, "app", app_that_raises(UsageError("--out is a file")))
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert capsys.readouterr().err == "shardlab: --out is a file\n"
    monkeypatch.setattr(cli, "app", nonsense)
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert capsys.readouterr().err.startswith("shardlab: --precision fp64: ")
    monkeypatch.setattr(cli, "app", app_that_raises(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        cli.main()
