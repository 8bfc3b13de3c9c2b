"""Hidden milestones of lab 07: other numbers, seeds, sizes and files."""

import math

import pytest
import test_lab07_custom_trainer as public
import torch
from test_lab07_custom_trainer import PROGRAMS, by_formula, experiment, metrics_by_hand, reference, some_entries, some_predictions

from shardlab.data.comments import UNKNOWN, comments
from shardlab.milestones.agreement import solution
from shardlab.milestones.messages import farthest

REFERENCE = solution("lab07_custom_trainer")


@pytest.mark.milestone(task="7.1")
def test_other_losses(lab):
    weights = torch.tensor([3.0, 1.0, 0.25])
    for number, (positive, negative, clip, smoothing) in enumerate(
        ((1.0, 2.0, 0.1, 0.0), (3.0, 1.0, 0.0, 0.3), (0.0, 5.0, 0.5, 0.0), (1.25, 0.0, 0.01, 0.05))
    ):
        logits, labels = some_entries(100 + number, 9, 3)
        settings = {"gamma_positive": positive, "gamma_negative": negative, "clip": clip, "label_smoothing": smoothing}
        got = lab.observe(f"{PROGRAMS}:entries_of", "AsymmetricLoss", settings, logits.double(), labels, weights)
        losses, gradient = by_formula(logits, labels, positive, negative, clip, smoothing, weights)
        assert (got["losses"] - losses).abs().max() < 1e-9 and (got["gradient"] - gradient).abs().max() < 1e-9
    extreme = torch.tensor([[-1e6, 1e6, 300.0, -300.0]])
    for clip in (0.0, 0.05):
        for label in (0.0, 1.0, float(UNKNOWN)):
            settings = {"gamma_positive": 2.0, "gamma_negative": 1.0, "clip": clip}
            got = lab.observe(f"{PROGRAMS}:entries_of", "AsymmetricLoss", settings, extreme, torch.full_like(extreme, label))
            assert torch.isfinite(got["losses"]).all() and torch.isfinite(got["gradient"]).all()


@pytest.mark.milestone(task="7.2")
def test_other_settings(lab):
    values = {"batch_size": 3, "grad_accum": 7, "epochs": 2, "lr": 0.3, "weight_decay": 0.0, "clipping": 2.5, "seed": 4}
    said = lab.observe(f"{PROGRAMS}:arguments_of", values, logging_steps=5, report_to="tensorboard")
    assert (said["per_device_train_batch_size"], said["gradient_accumulation_steps"], said["logging_steps"]) == (3, 7, 5)
    assert (said["max_grad_norm"], said["weight_decay"], said["seed"], said["learning_rate"]) == (2.5, 0.0, 4, 0.3)
    assert said["lr_scheduler_type"] == "linear" and not said["warmup_steps"] and said["num_train_epochs"] == 2


@pytest.mark.milestone(task="7.3")
def test_loss_of_other_steps(lab, run_experiments):
    run = run_experiments([experiment("two-3", "by_trainer", ranks=2, accumulation=3)], timeout=90)["two-3"]
    assert farthest(run.results["losses"], reference("hand", public.PARAMS | {"grad_accum": 3}, public.ROWS)) < 1e-5
    got = lab.observe(f"{PROGRAMS}:loss_of_batch", 1000, False)
    assert math.isclose(got["loss"], got["sum"] / 1000, rel_tol=1e-5)


@pytest.mark.milestone(task="7.4")
def test_another_adversary(lab, run_experiments):
    plans = [experiment("fgm-4", "by_trainer", accumulation=2, fgm=2.0)]
    plans.append(experiment("fgm-4-zero2", "by_trainer", ranks=2, accumulation=1, stage=2, fgm=2.0))
    plans.append(experiment("fgm-4-ddp", "by_trainer", ranks=2, accumulation=1, fgm=2.0))
    runs = run_experiments(plans, timeout=120)
    got, wanted = runs["fgm-4"].results, reference("fgm_step", public.ROWS, 8, 2, 2.0, 3)["gradients"]
    scale = got["gradients"]["classifier.dense.weight"][0] / wanted["classifier.dense.weight"][0]
    for name, numbers in wanted.items():
        assert all(math.isclose(a, scale * b, rel_tol=1e-3, abs_tol=1e-5) for a, b in zip(got["gradients"][name], numbers)), name
    assert got["moved"] == 0 and not got["hooks"]
    assert farthest(runs["fgm-4-zero2"].results["losses"], runs["fgm-4-ddp"].results["losses"]) < 1e-5


@pytest.mark.milestone(task="7.5")
def test_another_head(lab):
    got = lab.observe(f"{PROGRAMS}:head", 2, 0.1, False, 9)
    assert torch.allclose(got["logits"], got["exact"], atol=1e-5)
    one, many = (lab.observe(f"{PROGRAMS}:head", samples, 0.3, True, 3) for samples in (1, 100))
    assert (many["logits"] - many["exact"]).std() < 0.2 * (one["logits"] - one["exact"]).std()
    got = lab.observe(f"{PROGRAMS}:dropped", 0.6, 40)
    assert 0.55 < got["zeros"] < 0.65 and abs(got["others"] - 2.5) < 1e-4 and got["patterns"] == 40
    settings = {"share": 0.5, "mask_id": 9, "special_ids": {7}, "seed": 1}
    calls = [settings | {"epoch": epoch, "row": row} for epoch in range(3) for row in range(3)]
    found = lab.observe(f"{PROGRAMS}:augmented", [7, *range(10, 110), 7], calls, False)
    assert not found["drawn"] and len({tuple(result) for result in found["results"]}) == 9
    assert all(result[0] == result[-1] == 7 and 25 < result.count(9) < 75 for result in found["results"])


@pytest.mark.milestone(task="7.6")
def test_other_lora(lab):
    got = lab.observe(f"{PROGRAMS}:lora", 5, ("key", "value"), 16)
    wanted = 2 * 2 * 5 * 32 + 16 * 16 + 16 + 16 * 5 + 5
    assert got["calculated"] == got["trained"] == got["saved"] == wanted and got["scale"] == 12.0 / 5
    assert torch.allclose(got["merged"], got["there"], atol=1e-5) and torch.equal(got["there"], got["there_again"])
    assert "peft" not in got["kinds"]
    assert "nothing" in lab.observe(f"{PROGRAMS}:lora_refused", ("nothing",))


@pytest.mark.milestone(task="7.7")
def test_other_metrics(lab):
    for seed in range(20, 32):
        probabilities, labels = some_predictions(seed, 25, 6)
        thresholds = [((seed + n) % 9 + 1) / 10 for n in range(6)]
        names = [f"label {n}" for n in range(6)]
        got = dict(lab.multilabel_metrics(torch.tensor(probabilities), torch.tensor(labels), names, torch.tensor(thresholds)))
        wanted = metrics_by_hand(probabilities, labels, names, thresholds)
        assert got.pop("without_positives") == wanted.pop("without_positives")
        assert got.keys() == wanted.keys() and all(abs(got[name] - wanted[name]) < 1e-5 for name in wanted)


@pytest.mark.milestone(task="7.8")
def test_other_thresholds(lab):
    for seed in range(40, 60):
        probabilities, labels = (torch.tensor(table) for table in some_predictions(seed, 30, 6))
        assert torch.allclose(lab.best_thresholds(probabilities, labels), REFERENCE.best_thresholds(probabilities, labels)), seed


@pytest.mark.milestone(task="7.9")
def test_other_folds(lab):
    labels = torch.tensor([row["labels"] for row in comments("hidden folds", 500)])
    for folds in (2, 4):
        got = lab.stratified_folds(labels, folds, 5)
        assert sorted(row for _, validation in got for row in validation) == list(range(500))
        for training, validation in got:
            assert not set(training) & set(validation) and len(training) + len(validation) == 500
            share = (labels[validation] == 1).sum(0) / (labels == 1).sum(0)
            assert ((share - 1 / folds).abs() < 0.15).all()
    few = torch.zeros(40, 2, dtype=torch.long)
    few[:3, 0] = 1
    with pytest.raises(ValueError, match="0.*3|3.*0"):
        lab.stratified_folds(few, 4)


@pytest.mark.milestone(task="7.10")
def test_other_files(lab):
    got = lab.observe(f"{PROGRAMS}:read_file", "a.yaml", "train_params: {lr: 2.0e-5, seed: 9}\nmax_len: 32\n", {})["config"]
    assert (got["train_params"]["lr"], got["train_params"]["seed"], got["max_len"], got["deepspeed"]) == (2e-5, 9, 32, None)
    for text, names in (
        ("max_len: 32\n\n# x\ntrainparams: {}\n", ("trainparams", "line 4")),
        ("train_params:\n  epochs: '3'\n", ("epochs", "line 2", "3")),
        ("train_params:\n  lr: 0.0\n", ("lr", "line 2", "0.0")),
        ("train_params:\n  folds: 3\n  folds: 4\n", ("folds", "line 3")),
        ("num_labels: 16\ndeepspeed: 3\n", ("deepspeed", "line 2", "3")),
        ("just text\n", ()),
    ):
        said = lab.observe(f"{PROGRAMS}:read_file", "x.yaml", text, {}).get("refused", "")
        assert all(name in said.lower() for name in ("x.yaml", *names)), (text, said)


@pytest.mark.milestone(task="7.11", needs=("7.2", "7.10"))
def test_another_set_up(lab):
    *found, left = lab.observe(
        f"{PROGRAMS}:validated", "deepspeed: a.json\nmodel_name: none-such\n", {"a.json": '{"x": 1'}, "torchmetrics"
    )
    reasons = dict(map(tuple, found))
    assert list(reasons) == ["configuration", "imports", "deepspeed", "model", "trainer"] and left == ["left", ""]
    assert reasons["configuration"] == reasons["trainer"] == "" and "torchmetrics" in reasons["imports"]
    assert "none-such" in reasons["model"] and "a.json" in reasons["deepspeed"]
