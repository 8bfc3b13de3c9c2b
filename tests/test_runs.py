"""Experiments and run folders: what is written comes back, and a folder that cannot be trusted says so."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from pydantic import ValidationError

from shardlab.run.experiment import Experiment
from shardlab.run.run_folder import FORMAT, Run, RunError, before_it, read_runs


def a_run(folder, name: str = "one", **settings) -> Run:
    return Run.create(Experiment(name=name, **settings), folder)


def edit(run: Run, **changes) -> None:
    """Change `run.json` as another process or another version would have written it."""
    path = run.folder / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- experiments ------------------------------------------------------------------------------------------------------


def test_global_batch_is_the_product():
    assert Experiment(name="x", micro_batch=3, accumulation=5, ranks=2).global_batch == 30


def test_unknown_field_is_refused_by_name():
    with pytest.raises(ValueError) as refused:
        Experiment(name="x", learnin_rate=1e-3)
    assert "learnin_rate" in str(refused.value)
    assert "learning_rate" in str(refused.value), "the message lists the fields that there are"


@pytest.mark.parametrize(
    "field, value",
    [
        ("name", ""),
        ("name", "a/b"),
        ("name", "../up"),
        ("name", "a b"),
        ("name", "."),
        ("name", ".."),
        ("program", "finetune"),
        ("program", "os; x:y"),
        ("precision", "fp8"),
        ("ranks", 0),
        ("micro_batch", 0),
        ("accumulation", -1),
        ("epochs", 0),
        ("steps", 0),
        ("learning_rate", 0),
        ("weight_decay", -0.1),
        ("clipping", -1),
        ("max_tokens", 7),
        ("train_examples", 0),
        ("eval_examples", 0),
        ("deepspeed", "ds.json"),
    ],
)
def test_bad_value_is_refused_with_its_field(field, value):
    """A name is a folder's name, so it must not lead out of `runs/`."""
    with pytest.raises(ValidationError) as refused:
        Experiment(**({"name": "x"} | {field: value}))
    assert [error["loc"][0] for error in refused.value.errors()] == [field]


def test_experiment_cannot_be_changed_but_copied():
    experiment = Experiment(name="x")
    with pytest.raises(ValidationError):
        experiment.ranks = 2
    assert experiment.model_copy(update={"ranks": 2}).ranks == 2
    assert experiment.ranks == 1


# --- writing and reading ----------------------------------------------------------------------------------------------


def test_what_is_written_comes_back(tmp_path):
    experiment = Experiment(
        name="zero-2",
        method="ZeRO-2",
        ranks=2,
        micro_batch=2,
        accumulation=3,
        seed=7,
        learning_rate=1e-3,
        deepspeed={"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8}, "gradient_clipping": 1.0},
    )
    run = Run.create(experiment, tmp_path)
    assert Run.read(run.folder).outcome == "waiting"
    run.start()
    assert Run.read(run.folder).outcome == "running"
    speeds = [1.0, 30.0, 10.0, 20.0]
    for step, speed in enumerate(speeds, start=1):
        run.log_step(step=step, loss=4.0 / step, samples_per_second=speed, steps=4)
    states = {"parameters": 10, "groups": [[6, 4]], "ranks": [{"parameters": 40}, {"parameters": 20}]}
    run.write_states(states)
    run.record(exact_match=61.5, parameters=10)
    run.record(exact_match=62.5, note="Zürich")
    run.finish()

    back = Run.read(run.folder)
    assert back.folder == tmp_path / "zero-2"
    assert (back.name, back.experiment) == ("zero-2", experiment)
    assert (back.outcome, back.reason) == ("finished", None)
    assert back.losses() == [4.0, 2.0, 4.0 / 3, 1.0]
    assert [row["step"] for row in back.metrics()] == [1, 2, 3, 4]
    assert back.samples_per_second() == 20.0, "the median of all steps but the first"
    assert back.states() == states
    assert back.results == {"exact_match": 62.5, "parameters": 10, "note": "Zürich"}
    assert back.memory() == {}


def test_record_names_what_a_figure_depends_on(tmp_path):
    record = json.loads((a_run(tmp_path).folder / "run.json").read_text())
    assert record["format"] == FORMAT
    assert {"torch", "deepspeed", "transformers", "python"} <= set(record["versions"])
    assert record["hardware"]["cpu_cores"] >= 1 and record["hardware"]["host"]
    assert record["writer"]["pid"] == os.getpid()
    assert "commit" in record and record["created"]


@pytest.mark.parametrize("outcome", ["failed", "interrupted", "timed out", "not run"])
def test_outcome_and_reason_come_back(tmp_path, outcome):
    run = a_run(tmp_path)
    run.start()
    run.finish(outcome, "because of this")
    assert (Run.read(run.folder).outcome, Run.read(run.folder).reason) == (outcome, "because of this")


def test_run_that_has_not_begun_has_no_figures(tmp_path):
    run = Run.read(a_run(tmp_path).folder)
    assert (run.metrics(), run.losses(), run.memory(), run.results) == ([], [], {}, {})
    assert run.states() is None and run.samples_per_second() is None


def test_runs_are_listed_oldest_first_and_other_folders_passed_over(tmp_path):
    for name, created in (("b", "2026-01-02T00:00:00+0000"), ("a", "2026-01-03T00:00:00+0000"), ("c", "2026-01-01T00:00:00+0000")):
        edit(a_run(tmp_path, name), created=created)
    (tmp_path / "notes").mkdir()
    (tmp_path / "table.txt").write_text("")
    assert [run.name for run in read_runs(tmp_path)] == ["c", "b", "a"]
    assert read_runs(tmp_path / "nowhere") == []


def test_nothing_is_left_beside_the_files(tmp_path):
    """`run.json` is replaced as a whole; the file that it is first written to must be gone."""
    run = a_run(tmp_path)
    run.start()
    run.record(a=1)
    run.write_states({"ranks": []})
    run.finish()
    assert sorted(path.name for path in run.folder.iterdir()) == ["metrics.jsonl", "run.json", "states.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


# --- folders that cannot be trusted -----------------------------------------------------------------------------------


def test_metrics_line_cut_short_by_a_kill_is_left_out(tmp_path):
    run = a_run(tmp_path)
    run.start()
    run.log_step(step=1, loss=2.5, samples_per_second=1.0)
    path = run.folder / "metrics.jsonl"
    whole, last = path.read_text(), json.dumps({"step": 2, "loss": 1.25, "samples_per_second": 2.0})
    for kept in range(len(last)):
        path.write_text(whole + last[:kept])
        assert Run.read(run.folder).losses() == [2.5], last[:kept]
    path.write_text(whole + last + "\n")
    assert Run.read(run.folder).losses() == [2.5, 1.25]


@pytest.mark.parametrize("format_", [FORMAT + 1, 0, None, "1"])
def test_folder_of_another_version_is_refused(tmp_path, format_):
    run = a_run(tmp_path)
    edit(run, format=format_)
    for read in (Run.read, lambda folder: read_runs(folder.parent)):
        with pytest.raises(RunError) as refused:
            read(run.folder)
        message = str(refused.value)
        assert str(run.folder / "run.json") in message
        assert repr(format_) in message and f"format {FORMAT}" in message


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "damaged"),
        ('{"format": 1, "exper', "damaged"),
        (b"\xff\xfe\x00", "damaged"),
        ("[1, 2]", "format None"),
        ("null", "format None"),
        (json.dumps({"format": FORMAT}), "no valid experiment"),
        (json.dumps({"format": FORMAT, "experiment": "one"}), "no valid experiment"),
        (json.dumps({"format": FORMAT, "experiment": {"name": "one", "gpus": 2}}), "gpus"),
        (json.dumps({"format": FORMAT, "experiment": {"name": "one"}}), "outcome"),
    ],
)
def test_damaged_record_is_refused(tmp_path, text, reason):
    run = a_run(tmp_path)
    (run.folder / "run.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RunError) as refused:
        Run.read(run.folder)
    assert str(run.folder / "run.json") in str(refused.value)
    assert reason in str(refused.value)


def test_folder_without_a_record_is_no_run(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RunError, match="not a run folder") as refused:
            Run.read(folder)
        assert str(folder) in str(refused.value)


# --- what is replaced, and what is not --------------------------------------------------------------------------------


def test_finished_run_is_replaced_and_its_files_go(tmp_path):
    run = a_run(tmp_path)
    run.start()
    run.log_step(step=1, loss=1.0)
    run.finish()
    again = a_run(tmp_path, seed=3)
    assert (again.outcome, again.experiment.seed, again.metrics()) == ("waiting", 3, [])
    assert sorted(path.name for path in again.folder.iterdir()) == ["run.json"]
    assert len(Run.read(before_it(again.folder)).metrics()) == 1, "kept as long as the new one has no step"
    assert [found.folder for found in read_runs(tmp_path)] == [again.folder]
    again.start()
    again.log_step(step=1, loss=2.0)
    assert not before_it(again.folder).exists()


def test_runs_that_fail_before_their_first_step_destroy_nothing(tmp_path):
    run = a_run(tmp_path)
    run.start()
    run.log_step(step=1, loss=1.0)
    run.finish()
    for seed in (2, 3):
        failed = a_run(tmp_path, seed=seed)
        failed.start()
        failed.finish("failed", "no such file")
    assert Run.read(before_it(run.folder)).losses() == [1.0]


def test_checkpoints_of_the_run_before_are_kept(tmp_path):
    run = a_run(tmp_path)
    run.start()
    run.log_step(step=1, loss=1.0)
    (run.folder / "checkpoints" / "step-1").mkdir(parents=True)
    run.finish()
    again = a_run(tmp_path)
    again.start()
    again.log_step(step=1, loss=2.0)
    assert (before_it(run.folder) / "checkpoints" / "step-1").is_dir()


def test_folder_that_is_no_run_is_not_replaced(tmp_path):
    keep = tmp_path / "thesis"
    keep.mkdir()
    (keep / "chapter1.txt").write_text("All of it.")
    with pytest.raises(RunError, match="not a run folder") as refused:
        a_run(tmp_path, "thesis")
    assert str(keep) in str(refused.value)
    assert (keep / "chapter1.txt").read_text() == "All of it."


def test_file_in_the_way_is_not_replaced(tmp_path):
    (tmp_path / "one").write_text("All of it.")
    with pytest.raises(RunError, match="not a run folder"):
        a_run(tmp_path)
    assert (tmp_path / "one").read_text() == "All of it."


def test_empty_folder_may_become_a_run(tmp_path):
    (tmp_path / "one").mkdir()
    assert a_run(tmp_path).outcome == "waiting"


def test_damaged_run_is_replaced(tmp_path):
    (a_run(tmp_path).folder / "run.json").write_text('{"form')
    assert a_run(tmp_path).outcome == "waiting"


@pytest.mark.parametrize("begun", [False, True])
def test_run_that_goes_on_is_not_replaced(tmp_path, begun):
    run = a_run(tmp_path)
    if begun:
        run.start()
        run.log_step(step=1, loss=1.0)
    with pytest.raises(RunError, match="still going on") as refused:
        a_run(tmp_path)
    assert str(run.folder) in str(refused.value)
    assert Run.read(run.folder).outcome == ("running" if begun else "waiting")
    assert len(Run.read(run.folder).metrics()) == begun


# --- killed runs ------------------------------------------------------------------------------------------------------

WRITER = """
import sys, time
from shardlab.run.experiment import Experiment
from shardlab.run.run_folder import Run, before_it
run = Run.create(Experiment(name="killed"), sys.argv[1])
run.start()
for step in (1, 2, 3):
    run.log_step(step=step, loss=1.0 / step, samples_per_second=1.0)
print("three steps", flush=True)
time.sleep(600)
"""


def test_killed_run_says_so(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "three steps\n"
        assert Run.read(tmp_path / "killed").outcome == "running"
        with pytest.raises(RunError, match="still going on"):
            a_run(tmp_path, "killed")

        process.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 10
        while Run.read(tmp_path / "killed").outcome != "killed" and time.monotonic() < deadline:
            time.sleep(0.02)
        # Nobody has waited for the process yet: a zombie is dead too.
        run = Run.read(tmp_path / "killed")
        assert run.outcome == "killed"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    run = Run.read(tmp_path / "killed")
    assert run.outcome == "killed"
    assert "3 steps" in run.reason
    assert run.losses() == [1.0, 1 / 2, 1 / 3]
    assert "killed" in repr(run)
    assert [run.outcome for run in read_runs(tmp_path)] == ["killed"]
    assert a_run(tmp_path, "killed").outcome == "waiting", "a dead run's folder is free again"


def test_process_that_got_the_dead_one_s_number_is_not_taken_for_it(tmp_path):
    run = a_run(tmp_path)
    run.start()
    writer = run.record_json["writer"]
    edit(run, writer=writer | {"process_started": writer["process_started"] - 3600})
    assert Run.read(run.folder).outcome == "killed"


def test_run_on_another_host_is_taken_to_go_on(tmp_path):
    """A batch job writes from a compute node; the login node cannot see whether its process lives."""
    run = a_run(tmp_path)
    run.start()
    edit(run, writer=run.record_json["writer"] | {"host": "node-of-another-name", "pid": 2**22 + 1})
    assert Run.read(run.folder).outcome == "running"
    with pytest.raises(RunError, match="still going on"):
        a_run(tmp_path)


def test_finished_run_stays_finished_when_its_writer_is_gone(tmp_path):
    run = a_run(tmp_path)
    run.start()
    run.finish()
    edit(run, writer=run.record_json["writer"] | {"process_started": 0})
    assert Run.read(run.folder).outcome == "finished"
