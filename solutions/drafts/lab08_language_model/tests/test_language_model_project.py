"""Lab 08's project as a learner has it: a folder that knows nothing of the course, run by its own command line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shardlab import hardware, switch
from shardlab.data.minisquad import squad_split
from shardlab.zero import ops

SMALL = "--dataset_name text.txt --max_length 32 --batch_size 4 --max_eval_steps 2".split()
SEVERAL = """
import json, main, sys
for words in json.loads(sys.argv[1]):
    status = main.main(words)
    print("STATUS", status, flush=True)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    command = [sys.executable, "labs/lab08_language_model/make_project.py", str(folder)]
    subprocess.run(command, cwd=hardware.ROOT, env=os.environ | {switch.VARIABLE: str(switch.SOLUTIONS)}, check=True)
    texts = [paragraph["context"] for article in squad_split("train", 60)["data"] for paragraph in article["paragraphs"]]
    (folder / "text.txt").write_text("\n\n".join(texts), encoding="utf-8")
    return folder


def environment(**more) -> dict[str, str]:
    """Without the course's own folders on Python's path, and without a network."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", switch.VARIABLE)}
    return kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more


def several(project: Path, *commands: list[str]) -> tuple[list[int], str]:
    """Run `main.py` with each of these words, one after the other in one process; the statuses, and what was said."""
    command = [sys.executable, "-c", SEVERAL, json.dumps([[str(word) for word in words] for words in commands])]
    done = subprocess.run(command, cwd=project, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("STATUS")], done.stdout + done.stderr


def summary(project: Path, name: str) -> dict:
    return json.loads((project / name / "summary.json").read_text())


def losses(project: Path, name: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (project / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.ranks
def test_every_option_has_its_effect(project):
    three = [*SMALL, "--max_train_steps", "3"]
    changes = {
        "base": [],
        "batch": ["--batch_size", "2"],
        "length": ["--max_length", "16"],
        "steps": ["--max_train_steps", "5"],
        "evaluated": ["--max_eval_steps", "1"],
        "rate": ["--learning_rate", "1e-5"],
        "seed": ["--seed", "1"],
        "saved": ["--save_checkpoint", "2"],
        "prompt": ["--generation_prompt", "In the year"],
        "profile": ["--profile"],
        "folder": ["--model_name", "base/small"],
        "squad": ["--dataset_name", "squad", "--dataset_config", "squad.json"],
    }
    (project / "squad.json").write_text(json.dumps(squad_split("train", 60)), encoding="utf-8")
    words = [[*three, *more, "--output_dir", name] for name, more in changes.items()]
    whole = [*SMALL, "--output_dir"]
    words += [[*whole, "epoch"], [*whole, "epochs", "--num_epochs", "2"], [*three, "--dry-run", "--output_dir", "dry"]]
    statuses, said = several(project, *words)
    assert statuses == [0] * len(words), said
    base = summary(project, "base")
    assert base["steps"] == 3 and base["text"] is None and not (project / "base" / "checkpoints").exists()
    assert summary(project, "steps")["steps"] == 5
    assert summary(project, "epochs")["steps"] == 2 * summary(project, "epoch")["steps"] > 6
    assert summary(project, "evaluated")["validation"] != base["validation"]
    first = {name: losses(project, name) for name in changes}
    assert first["rate"][0] == first["base"][0] and first["rate"][2] != first["base"][2]
    for name in ("batch", "length", "seed", "squad"):
        assert first[name][0] != first["base"][0]
    for name in ("evaluated", "saved", "prompt", "profile", "folder"):
        assert first[name] == first["base"], name
    assert sorted(path.name for path in (project / "saved" / "checkpoints").iterdir()) == ["step-000002", "step-000003"]
    assert summary(project, "prompt")["text_before"] and summary(project, "prompt")["text"]
    trace = json.loads((project / "profile" / "trace.json").read_text())["traceEvents"]
    assert {event["name"] for event in trace} & {"ProfilerStep#0", "ProfilerStep#1"} or len(trace) > 100
    assert summary(project, "folder")["model"] == "base/small" and not (project / "folder" / "small").exists()
    assert not (project / "dry").exists() and "fits         yes" in said and "parameters" in said


@pytest.mark.ranks
def test_what_cannot_be_done_is_said(project):
    (project / "empty.txt").write_text("")
    (project / "latin.txt").write_bytes("Übung\n\nÜ\n\nb".encode("latin-1"))
    three = [*SMALL, "--max_train_steps", "3"]
    statuses, said = several(
        project,
        [*three, "--output_dir", "first", "--save_checkpoint", "3"],
        [*three, "--dataset_name", "no/such"],
        [*three, "--dataset_name", "empty.txt"],
        [*three, "--dataset_name", "latin.txt"],
        [*three, "--max_length", "512"],
        [*three, "--model_name", "no/model"],
    )
    assert statuses == [0, 1, 1, 1, 1, 1], said
    for sentence in (
        "there is no text no/such: not one of squad, stdlib",
        "empty.txt has 0 documents",
        "latin.txt is not UTF-8",
        "--max_length 512: small has 256 positions",
        "there is no model no/model",
    ):
        assert sentence in said, sentence
    assert "Traceback" not in said
    (project / "other").mkdir()
    small = json.loads((project / "first" / "small" / "config.json").read_text())
    for path in (project / "first" / "small").iterdir():
        if "safetensors" not in path.name:
            (project / "other" / path.name).write_bytes(path.read_bytes())
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config.from_dict(small | {"n_layer": 2})).save_pretrained(project / "other")
    statuses, said = several(project, [*three, "--model_name", "other", "--output_dir", "first", "--resume"])
    assert statuses == [1] and "the run in first has --model_name small" in said and "Traceback" not in said
    statuses, said = several(
        project,
        [*three, "--output_dir", "first"],
        [*three, "--output_dir", "text.txt"],
        [*three, "--deepspeed_config", "text.txt"],
        [*three, "--dataset_name", "squad", "--dataset_config", "no.json"],
        [*three, "--dataset_config", "en"],
    )
    assert statuses == [1] * 5 and "Traceback" not in said, said
    for sentence in ("--resume goes on", "that is a file", "text.txt is no JSON", "no.json: No such file", "takes no --dataset"):
        assert sentence in said, sentence


@pytest.mark.ranks
def test_a_killed_run_goes_on_with_the_losses_of_one_that_was_not(project):
    words = [*SMALL, "--num_epochs", "3", "--max_train_steps", "30", "--save_checkpoint", "4", "--output_dir"]
    several(project, [*words, "whole"])
    command = [sys.executable, "main.py", *words, "killed"]
    running = subprocess.Popen(command, cwd=project, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics, until = project / "killed" / "metrics.jsonl", time.monotonic() + 300
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 7:
        assert running.poll() is None and time.monotonic() < until, "ended before its seventh step"
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    (project / "killed" / "checkpoints" / "step-000029.partial").mkdir()
    statuses, said = several(project, [*words, "killed", "--resume"])
    assert statuses == [0] and "going on from step" in said
    assert losses(project, "killed") == losses(project, "whole") and len(losses(project, "whole")) == 30


@pytest.mark.ranks
def test_two_ranks_under_both_deepspeed_files_train_as_plain_ones(project):
    ops.build_all(["deepspeed_shm_comm", "cpu_adam"], print, "cpu")
    words = [*SMALL, "--max_train_steps", "6", "--generation_prompt", "In the", "--output_dir"]
    found = {}
    for name in ("plain", "zero-2", "zero-3"):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "main.py"]
        config = [] if name == "plain" else ["--deepspeed_config", f"config/deepspeed/{name}.json"]
        command = [sys.executable, *launcher, *words, f"two-{name}", *config]
        variables = environment(**ops.environment("cpu"))
        done = subprocess.run(command, cwd=project, env=variables, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-3000:]
        found[name] = summary(project, f"two-{name}")
    for name in ("zero-2", "zero-3"):
        assert losses(project, f"two-{name}") == pytest.approx(losses(project, "two-plain"), abs=2e-4)
        assert found[name]["validation"] == pytest.approx(found["plain"]["validation"], rel=1e-3)
        assert found[name]["parameters"] == found["plain"]["parameters"] and found[name]["ranks"] == 2


@pytest.mark.ranks
def test_perplexity_falls_on_real_paragraphs(project):
    if not (path := os.environ.get("SHARDLAB_SQUAD")):
        pytest.skip("SHARDLAB_SQUAD names no file of SQuAD")
    words = ["--dataset_name", "squad", "--dataset_config", path, "--num_epochs", "3", "--max_eval_steps", "5"]
    statuses, said = several(project, [*words, "--output_dir", "real"])
    found = summary(project, "real")
    assert statuses == [0] and found["validation"]["perplexity"] < 0.5 * found["validation_before"]["perplexity"], said


def test_the_project_imports_nothing_of_the_course():
    given = (hardware.ROOT / "labs" / "lab08_language_model" / "my_project").rglob("*.py")
    for path in [*given, switch.exercise_file("lab08_language_model", switch.SOLUTIONS)]:
        assert "shardlab" not in path.read_text(), path
