"""Lab 03's exercises as a program: under the `deepspeed` launcher and under `torchrun`, with real ranks, as one types it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from shardlab.hardware import ROOT
from shardlab.run.experiment import program_of
from shardlab.run.run_folder import Run

pytestmark = pytest.mark.ranks

PROGRAM = str(ROOT / "labs" / "lab03_engine" / "train.py")
BIN = Path(sys.executable).parent
DEEPSPEED = [str(BIN / "deepspeed"), "--num_gpus", "2"]
TORCHRUN = [str(BIN / "torchrun"), "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]


def environment(exercises: str = "solutions") -> dict[str, str]:
    """A shell's environment with the virtual environment on the path, and one switch."""
    return os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "SHARDLAB_EXERCISES": str(ROOT / exercises)}


def run(launcher: list[str], *words: str, cwd: Path, exercises: str = "solutions") -> subprocess.CompletedProcess:
    return subprocess.run(
        [*launcher, PROGRAM, *words], cwd=cwd, env=environment(exercises), capture_output=True, text=True, timeout=400
    )


@pytest.fixture(scope="module")
def stage2(tmp_path_factory):
    """Three optimizer steps of stage 2 under the `deepspeed` launcher."""
    folder = tmp_path_factory.mktemp("stage2")
    return folder, run(DEEPSPEED, "--stage", "2", "--steps", "3", cwd=folder)


def test_deepspeed_launcher_runs_the_program_to_its_summary(stage2):
    folder, done = stage2
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    for words in ("stage          2, 2 ranks", "offload        none", "loss", "model states", "samples/s"):
        assert words in done.stdout, words
    finished = Run.read(folder / "runs" / "lab03-stage2")
    assert finished.outcome == "finished" and len(finished.losses()) == 3
    assert finished.experiment.ranks == 2 and len(finished.states()["ranks"]) == 2
    assert (folder / "runs" / "lab03-stage2-checkpoints" / "step-3" / "complete.json").exists()


def test_torchrun_resumes_what_the_deepspeed_launcher_began(stage2, tmp_path):
    shutil.copytree(stage2[0] / "runs", tmp_path / "runs")
    done = run(TORCHRUN, "--stage", "2", "--steps", "5", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    finished = Run.read(tmp_path / "runs" / "lab03-stage2")
    assert [row["step"] for row in finished.metrics()] == [4, 5]


def test_nothing_left_to_train_is_said(stage2, tmp_path):
    shutil.copytree(stage2[0] / "runs", tmp_path / "runs")
    done = run(TORCHRUN, "--stage", "2", "--steps", "3", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Nothing was left to train" in done.stdout


def test_hostfile_of_this_machine(tmp_path):
    (tmp_path / "hosts.txt").write_text("localhost slots=2\n")
    launcher = [str(BIN / "deepspeed"), "--hostfile", "hosts.txt", "--no_ssh", "--node_rank", "0", "--master_addr", "localhost"]
    done = run(launcher, "--stage", "3", "--offload", "--steps", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "offload        optimizer, param" in done.stdout and "stage          3, 2 ranks" in done.stdout


def test_comparison_has_a_row_for_each_method(tmp_path):
    done = run(TORCHRUN, "--compare", "--steps", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for method in ("stage 0", "stage 1", "stage 2", "stage 3", "stage 1 + offload", "stage 2 + offload", "stage 3 + offload"):
        assert method in done.stdout, method
    held = {
        name: json.loads((tmp_path / f"runs/lab03-{name}/states.json").read_text())["ranks"]
        for name in ("stage0", "stage2", "stage3")
    }
    sums = {name: sum(ranks[0][kind] for kind in ("parameters", "gradients", "optimizer")) for name, ranks in held.items()}
    assert sums["stage3"] < sums["stage2"] < sums["stage0"]


def test_skeleton_fails_with_its_first_task(tmp_path):
    done = run(TORCHRUN, "--stage", "2", cwd=tmp_path, exercises="src")
    assert done.returncode != 0
    assert "Task 3.1" in done.stderr


def test_without_a_launcher_it_says_which_command_to_type(tmp_path):
    plain = {key: value for key, value in environment().items() if key != "RANK"}
    done = subprocess.run(
        [sys.executable, PROGRAM, "--stage", "1"], cwd=tmp_path, env=plain, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 2
    assert "deepspeed --num_gpus 2" in done.stderr and "torchrun" in done.stderr


@pytest.mark.parametrize(
    "words, said",
    [(["--stage", "4"], "invalid choice: 4"), (["--stage", "0", "--offload"], "stage 0"), (["--steps", "0"], "--steps 0")],
)
def test_bad_arguments_are_refused(words, said, monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        program_of("labs/lab03_engine/train.py:parse_arguments")(["--local_rank=0", *words])
    assert caught.value.code == 2 and said in capsys.readouterr().err


def test_killed_rank_ends_the_others_and_training_resumes(tmp_path):
    """`kill -9` in the middle, as an out-of-memory killer does it; then the same command with --resume."""
    words = [*TORCHRUN, PROGRAM, "--stage", "1", "--steps", "100000", "--save-every", "2"]
    job = subprocess.Popen(words, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        folder, deadline = tmp_path / "runs" / "lab03-stage1", time.monotonic() + 200
        while time.monotonic() < deadline and not (folder / "metrics.jsonl").exists():
            assert job.poll() is None, job.stdout.read()[-3000:]
            time.sleep(0.2)
        while len(Run.read(folder).metrics()) < 3:
            time.sleep(0.1)
        ranks = [p for p in psutil.Process(job.pid).children(recursive=True) if PROGRAM in p.cmdline()]
        victim = next(p for p in ranks if p.environ().get("RANK") == "1")
        victim.send_signal(signal.SIGKILL)
        output, _ = job.communicate(timeout=300)
    finally:
        if job.poll() is None:
            job.kill()
    assert job.returncode != 0
    assert not [p for p in ranks if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert Run.read(folder).outcome in ("failed", "killed")
    assert "SIGKILL" in output or "exitcode: -9" in output or "Signal 9" in output

    whole = [path.parent for path in (tmp_path / "runs" / "lab03-stage1-checkpoints").glob("step-*/complete.json")]
    newest = max(int(path.name.partition("-")[2]) for path in whole)
    done = run(TORCHRUN, "--stage", "1", "--steps", str(newest + 2), "--save-every", "2", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["step"] for row in Run.read(folder).metrics()] == [newest + 1, newest + 2]


def test_ranks_end_with_the_deepspeed_command(tmp_path):
    """`kill` of that process alone, as a terminal's Ctrl-C does not do, but a script or a notebook's `!` does."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, pathlib, time\n"
        "from shardlab.run.ranks import end_with_the_command\n"
        "end_with_the_command()\n"
        f"pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).write_text(str(os.getpid()))\n"
        "time.sleep(300)\n"
    )
    command = [str(BIN / "deepspeed"), "--num_gpus", "2", str(program)]
    launcher = subprocess.Popen(command, env=environment() | {"DS_ACCELERATOR": "cpu"}, stderr=subprocess.DEVNULL)
    files = [tmp_path / "0", tmp_path / "1"]
    try:
        deadline = time.monotonic() + 300
        while not all(file.exists() and file.read_text() for file in files) and time.monotonic() < deadline:
            time.sleep(0.2)
        below = [psutil.Process(int(file.read_text())) for file in files]
        below += psutil.Process(launcher.pid).children()
        launcher.terminate()
        launcher.wait(10)
        gone, alive = psutil.wait_procs(below, timeout=20)
        assert len(gone) == 3 and not alive
    finally:
        launcher.kill()
        subprocess.run(["pkill", "-9", "-f", str(program)])
