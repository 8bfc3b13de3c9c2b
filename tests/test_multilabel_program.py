"""Lab 07's programs as a learner starts them: with python, and with torchrun and ZeRO-2; and with files that are at fault."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shardlab import hardware
from shardlab.run.run_folder import Run

FOLDER = hardware.ROOT / "labs" / "lab07_custom_trainer"
BIN = Path(sys.executable).parent
SAID = ("TODO: a tree", "Reads the list", "FIXME: off by one")
CSV = ["text,todo,bug"] + [f"{SAID[n % 3]} {n},{int(n % 3 == 0)},{int(n % 3 == 2)}" for n in range(60)]
"""Sixty rows, of which each says what it is."""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "own.csv").write_text("\n".join(CSV) + "\n")
    for stage in (2, 3):
        (tmp_path / f"zero{stage}.json").write_text((FOLDER / "configs" / f"zero{stage}.json").read_text())
    params = "train_params:\n  batch_size: 4\n  epochs: 6\n  lr: 3.0e-3\n  folds: 2\n"
    base = f"num_labels: 2\nmax_len: 16\ndata: {tmp_path / 'own.csv'}\n{params}"
    for name, more in (("plain", ""), ("zero2", "deepspeed: zero2.json\n"), ("zero3", "deepspeed: zero3.json\n")):
        (tmp_path / f"{name}.yaml").write_text(base + more)
    return tmp_path


def started(folder: Path, *words: str, program: str = "train.py") -> subprocess.CompletedProcess:
    variables = {
        "SHARDLAB_EXERCISES": str(hardware.ROOT / "solutions"),
        "SHARDLAB_RUNS": str(folder / "runs"),
        "OMP_NUM_THREADS": "1",
    }
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [str(BIN / words[0]), *words[1:-1], str(FOLDER / program), *words[-1].split()]
    return subprocess.run(command, env=environment | variables, capture_output=True, text=True, timeout=300, cwd=folder)


@pytest.mark.ranks
def test_programs_run_under_every_launcher_and_lose_nothing(folder):
    """It learns what stands in the text, on one rank, and on two with ZeRO-2."""
    for name, words in (
        ("plain", ("python", f"{folder}/plain.yaml")),
        ("zero2", ("torchrun", "--nproc-per-node", "2", f"{folder}/zero2.yaml")),
    ):
        ended = started(folder, *words)
        assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-3000:]
        assert "macro F1" in ended.stdout
        run = Run.read(folder / "runs" / name)
        assert run.results["tuned"]["macro_f1"] > 0.9 and set(run.results["thresholds"]) == {"todo", "bug"}
        assert sorted(path.name for path in (run.folder / "tensorboard").iterdir()) == ["fold-0", "fold-1"]
        steps = [row["step"] for row in run.metrics()]
        assert steps == list(range(1, len(steps) + 1)), "steps are counted through the folds"
        assert all(row["step"] <= row["steps"] for row in run.metrics())


@pytest.mark.ranks
def test_everything_at_once(folder):
    ended = started(folder, "python", f"{folder}/plain.yaml --folds 1", program="train_advanced.py")
    assert ended.returncode == 0, ended.stderr[-3000:]
    run = Run.read(folder / "runs" / "plain-advanced")
    assert run.results["tuned"]["macro_f1"] > 0.5 and run.experiment.options["fgm"] == 0.2


@pytest.mark.ranks
def test_fgm_is_refused_under_zero_3(folder):
    ended = started(folder, "python", f"{folder}/zero3.yaml --fgm 0.1 --folds 1", program="train_advanced.py")
    assert ended.returncode == 1 and "ZeRO-3" in ended.stderr and "Traceback" not in ended.stderr.split("FGM")[-1]


def test_files_at_fault_are_one_sentence(folder):
    (folder / "slip.yaml").write_text("num_label: 2\n")
    (folder / "broken.yaml").write_text("deepspeed: broken.json\n")
    (folder / "broken.json").write_text(json.dumps({"train_batch_size": 8, "zero_optimization": {"stage": 9}}))
    ended = started(folder, "python", f"{folder}/slip.yaml")
    assert ended.returncode == 1 and "slip.yaml, line 1: num_label" in ended.stderr and "Traceback" not in ended.stderr
    ended = started(folder, "python", f"{folder}/none.yaml")
    assert ended.returncode == 1 and "none.yaml" in ended.stderr and "Traceback" not in ended.stderr
    ended = started(folder, "python", f"{folder}/broken.yaml --validate")
    lines = dict(line.split(maxsplit=1) for line in ended.stdout.splitlines() if line)
    assert ended.returncode == 1 and "stage" in lines["deepspeed"] and lines["configuration"] == "works"
    ended = started(folder, "python", f"{folder}/plain.yaml --validate")
    assert ended.returncode == 0 and "not used" in ended.stdout
