"""A few steps of fine-tuning on real paragraphs: the whole path of lab 01, with the solutions, on two ranks.

The course ships no real text. The variable SHARDLAB_SQUAD names a SQuAD v1.1 or v2.0 JSON file to run this on.
"""

import math
import os
import sys
from pathlib import Path

import pytest

from shardlab import switch
from shardlab.data.datasets import load_squad
from shardlab.progress import Quiet
from shardlab.run.experiment import Experiment
from shardlab.run.launch import launch

FILE = os.environ.get("SHARDLAB_SQUAD", "")
pytestmark = [
    pytest.mark.skipif(not FILE, reason="SHARDLAB_SQUAD is not set; set it to the path of a SQuAD v1.1 or v2.0 JSON file"),
]

STEPS = 4


@pytest.fixture(scope="module")
def solutions():
    variable, path = os.environ.get(switch.VARIABLE), sys.path[:]
    yield switch.use_exercises(switch.SOLUTIONS)
    sys.path[:] = path
    os.environ.pop(switch.VARIABLE)
    if variable is not None:
        os.environ[switch.VARIABLE] = variable


@pytest.fixture(scope="module")
def run(solutions, tmp_path_factory):
    experiment = Experiment(
        name="real-text",
        program="exercises.lab01_baseline:finetune",
        data=str(Path(FILE).resolve()),
        ranks=2,
        micro_batch=4,
        accumulation=1,
        steps=STEPS,
        learning_rate=1e-3,
        max_tokens=256,
        train_examples=32,
        eval_examples=16,
    )
    (finished,) = launch(experiment, runs=tmp_path_factory.mktemp("runs"), timeout=300, display=Quiet(), or_cpu=True)
    assert finished.outcome == "finished"
    return finished


def test_training_on_real_text_lowers_the_loss(run):
    losses = run.losses()
    assert len(losses) == STEPS
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    before, *_, after = run.results["eval_losses"]
    assert math.isfinite(before) and math.isfinite(after)
    assert after < before, "the loss on paragraphs that it did not train on"


def test_answers_to_real_questions_are_text_and_are_scored(run):
    assert 0 <= run.results["exact_match"] <= run.results["f1"] <= 100
    asked = load_squad(FILE)["validation"]
    examples = run.results["examples"]
    assert [example["question"] for example in examples] == asked["question"][: len(examples)]
    assert len(examples) == 5
    for example, answers in zip(examples, asked["answers"], strict=False):
        assert example["answer"] == answers["text"][0]
        assert isinstance(example["predicted"], str)
    assert any(example["predicted"] for example in examples), "a model that answers nothing at all"


def test_run_folder_is_whole(run):
    assert (run.folder / "model" / "model.safetensors").exists() and (run.folder / "model" / "tokenizer.json").exists()
    assert run.results["summary"]["steps_per_epoch"] == 32 // run.experiment.global_batch
    assert set(run.memory()) == {"rank0", "rank1"}
    assert len(run.states()["ranks"]) == 2
