"""Milestones of lab 07. The judges are the loop, formulas in float64, and what a training leaves in its gradients."""

import math
import random
import re

import pytest
import torch

from shardlab.data.comments import UNKNOWN
from shardlab.milestones.launches import ranks_come_back
from shardlab.milestones.messages import farthest, require, require_equal, require_error
from shardlab.milestones.small_runs import zero_config
from shardlab.run.experiment import Experiment, program_of

PROGRAMS = "labs/lab07_custom_trainer/programs.py"
ROWS = 50
PARAMS = {"batch_size": 8, "epochs": 2, "lr": 1e-3, "weight_decay": 0.01, "clipping": 1.0, "seed": 3}


def experiment(
    name: str, program: str, *, ranks: int = 1, accumulation: int = 1, stage: int | None = None, **options
) -> Experiment:
    """A training that has 8 rows in all micro-batches together, whatever the ranks."""
    return Experiment(
        name=name,
        program=f"{PROGRAMS}:{program}",
        ranks=ranks,
        micro_batch=8 // ranks,
        accumulation=accumulation,
        epochs=2,
        learning_rate=1e-3,
        seed=3,
        train_examples=ROWS,
        deepspeed=None if stage is None else zero_config(stage),
        save=False,
        options=options,
    )


def reference(name: str, *given):
    """A function of programs.py, without anybody's exercises."""
    return program_of(f"{PROGRAMS}:{name}")(*given)


def rounded(values: list[float]) -> list[float]:
    return [round(value, 5) for value in values]


# --- 7.1 ------------------------------------------------------------------------------------------------------------


def by_formula(logits, labels, gamma_positive, gamma_negative, clip, smoothing, weights) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses in float64, and the gradient of their sum."""
    logits = logits.double().clone().requires_grad_()
    known = labels != UNKNOWN
    y = labels.double().masked_fill(~known, 0) * (1 - smoothing) + smoothing / 2
    p = torch.sigmoid(logits)
    q = (p - clip).clamp(min=0)
    positive = -y * (1 - p) ** gamma_positive * torch.nn.functional.logsigmoid(logits)
    rest = torch.log1p(-q) if clip else torch.nn.functional.logsigmoid(-logits)
    losses = positive - (1 - y) * q**gamma_negative * rest
    losses = (losses * (1 if weights is None else weights.double())).masked_fill(~known, 0)
    losses.sum().backward()
    return losses.detach(), logits.grad


def some_entries(seed: int, rows: int = 6, count: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (rows, count), generator=draw).float()
    labels[torch.rand(rows, count, generator=draw) < 0.2] = UNKNOWN
    return 3 * torch.randn(rows, count, generator=draw), labels


LOSSES = [
    ("AsymmetricLoss", {}, (1.0, 4.0, 0.05, 0.0)),
    ("AsymmetricLoss", {"gamma_positive": 0.0, "gamma_negative": 0.0, "clip": 0.0}, (0.0, 0.0, 0.0, 0.0)),
    ("AsymmetricLoss", {"gamma_positive": 2.0, "gamma_negative": 3.0, "clip": 0.0}, (2.0, 3.0, 0.0, 0.0)),
    ("AsymmetricLoss", {"gamma_positive": 0.0, "gamma_negative": 1.5, "clip": 0.2, "label_smoothing": 0.1}, (0.0, 1.5, 0.2, 0.1)),
    ("AsymmetricLoss", {"gamma_negative": 2.0, "clip": 1e-8}, (1.0, 2.0, 1e-8, 0.0)),
    ("FocalLoss", {}, (2.0, 2.0, 0.0, 0.0)),
    ("FocalLoss", {"gamma": 0.0, "label_smoothing": 0.2}, (0.0, 0.0, 0.0, 0.2)),
    ("FocalLoss", {"gamma": 1.0}, (1.0, 1.0, 0.0, 0.0)),
]


@pytest.mark.milestone(task="7.1", points=10, section="Losses for labels that are mostly 0")
def test_losses(lab):
    weights = torch.tensor([1.0, 0.5, 4.0, 2.0, 0.0])
    for number, (kind, settings, formula) in enumerate(LOSSES):
        for given in (None, weights):
            logits, labels = some_entries(number)
            shown = f"{kind}({', '.join([f'{k}={v}' for k, v in settings.items()] + ['class_weights=…'] * (given is not None))})"
            got = lab.observe(f"{PROGRAMS}:entries_of", kind, settings, logits, labels, given)
            losses, gradient = by_formula(logits, labels, *formula, given)
            require_equal(list(got["losses"].shape), list(losses.shape), of=f"the shape of what {shown} gives: a loss per entry")
            require(
                got["losses"].dtype == torch.float32,
                expected=f"losses in float32 from {shown} for logits in float32",
                got=str(got["losses"].dtype),
            )
            require(got["kept"], expected=f"labels that stay as they are, by {shown}", got="others")
            for name, found, wanted in (("losses", got["losses"], losses), ("gradient", got["gradient"], gradient)):
                unknown = labels == UNKNOWN
                require(
                    not found[unknown].any(),
                    expected=f"{name} of 0 where the label is UNKNOWN, by {shown}",
                    got=found[unknown].tolist(),
                )
                off = (found.double() - wanted).abs()
                row, column = divmod(int(off.argmax()), off.shape[1])
                require(
                    off.max() < 1e-5,
                    expected=f"{wanted[row, column]:.6f}: the {name} of {shown} for the logit {logits[row, column]:.3f} and label "
                    f"{labels[row, column]:.0f}" + (f" and the weight {given[column]:g}" if given is not None else ""),
                    got=f"{found[row, column]:.6f}",
                )
    extreme = torch.tensor([[-1e6, -2e4, -120.0, -80.0, 0.0], [80.0, 120.0, 2e4, 17.0, 1e6]])
    for kind, settings, formula in LOSSES:
        shown = f"{kind}({', '.join(f'{name}={value}' for name, value in settings.items())})"
        for label in (0.0, 1.0):
            got = lab.observe(f"{PROGRAMS}:entries_of", kind, settings, extreme, torch.full_like(extreme, label))
            require(
                torch.isfinite(got["losses"]).all() and torch.isfinite(got["gradient"]).all(),
                expected=f"finite losses and gradients of {shown} for the logits {extreme.tolist()} and the label {label:.0f}",
                got=f"losses {got['losses'].tolist()}, gradients {got['gradient'].tolist()}",
            )
            wanted, _ = by_formula(extreme, torch.full_like(extreme, label), *formula, None)
            for logit, right, found in zip(extreme.flatten(), wanted.flatten(), got["losses"].double().flatten()):
                require(
                    not torch.isfinite(right) or torch.isclose(found, right, rtol=1e-4, atol=1e-6),
                    expected=f"{right:.6g}: the loss of {shown} for the logit {logit:g} and the label {label:.0f}",
                    got=f"{found:.6g}",
                )
    logits, labels = some_entries(40)
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)):
        got = lab.observe(f"{PROGRAMS}:entries_of", "AsymmetricLoss", {}, logits.to(dtype), labels)["losses"]
        exact, _ = by_formula(logits.to(dtype), labels, 1.0, 4.0, 0.05, 0.0, None)
        tolerance = 1e-5 if wanted == torch.float32 else 1e-12
        require(
            got.dtype == wanted and (got.double() - exact).abs().max() < tolerance,
            expected=f"losses computed in {wanted} for logits in {dtype}",
            got=f"{got.dtype}, off by {(got.double() - exact).abs().max():.1e}",
        )
    got = lab.observe(f"{PROGRAMS}:entries_of", "AsymmetricLoss", {}, logits, labels, weights.double())["losses"].dtype
    require(
        got == torch.float32, expected="losses in float32 for logits in float32, with class weights in float64 too", got=str(got)
    )
    for kind in ("AsymmetricLoss", "FocalLoss"):
        whole, parts = (
            lab.observe(f"{PROGRAMS}:entries_of", kind, {}, logits, given)["losses"] for given in (labels.long(), labels)
        )
        require(torch.equal(whole, parts), expected=f"the same of {kind} for labels in int64 as in float32", got=whole.tolist())
    for kind, settings in (
        ("AsymmetricLoss", {"gamma_positive": -1.0}),
        ("AsymmetricLoss", {"gamma_positive": 0.25}),
        ("AsymmetricLoss", {"gamma_negative": 0.5}),
        ("AsymmetricLoss", {"gamma_negative": -2.0}),
        ("AsymmetricLoss", {"clip": 1.0}),
        ("AsymmetricLoss", {"clip": -0.1}),
        ("AsymmetricLoss", {"label_smoothing": 1.0}),
        ("FocalLoss", {"label_smoothing": -0.2}),
    ):
        ((name, value),) = settings.items()
        said = lab.observe(f"{PROGRAMS}:refused", kind, settings)
        require(
            re.search(rf"\b{name}\b", said) and str(value) in said,
            expected=f"ValueError of {kind}({name}={value}), in a sentence that names {name} and {value}",
            got=said or "no error",
        )
    said = lab.observe(f"{PROGRAMS}:refused", "FocalLoss", {"gamma": 0.5})
    require(
        "gamma" in said and "0.5" in said, expected="ValueError of FocalLoss(gamma=0.5), that names both", got=said or "no error"
    )


# --- 7.2 ------------------------------------------------------------------------------------------------------------


@pytest.mark.milestone(task="7.2", points=6, section="What moves where")
def test_settings(lab, run_experiments):
    values = {"batch_size": 6, "grad_accum": 3, "epochs": 5, "lr": 0.002, "weight_decay": 0.1, "clipping": 0.5, "seed": 11}
    said = lab.observe(f"{PROGRAMS}:arguments_of", values)
    for name, wanted in (
        ("per_device_train_batch_size", 6),
        ("gradient_accumulation_steps", 3),
        ("num_train_epochs", 5),
        ("learning_rate", 0.002),
        ("weight_decay", 0.1),
        ("max_grad_norm", 0.5),
        ("seed", 11),
        ("save_strategy", "no"),
        ("eval_strategy", "no"),
        ("logging_strategy", "steps"),
        ("logging_steps", 1),
        ("remove_unused_columns", False),
        ("dataloader_drop_last", False),
        ("label_smoothing_factor", 0.0),
    ):
        require_equal(said.get(name), wanted, of=f"trainer_arguments(config, …).{name}, for {values}")
    require(said["inside"], expected="output_dir as it was given", got=said["output_dir"])
    require_equal(said["report_to"], [], of="trainer_arguments(config, …).report_to: no other program is told")
    for gpu in (True, False):
        require_equal(
            lab.observe(f"{PROGRAMS}:asked_for", gpu),
            {"use_cpu": not gpu, "bf16": False, "fp16": False, "tf32": False, "deepspeed": True},
            of=f"what TrainingArguments is asked for, with a DeepSpeed file, where torch sees {'a' if gpu else 'no'} GPU",
        )
    said = lab.observe(f"{PROGRAMS}:asked_for", False, deepspeed=None)
    require(
        not said["deepspeed"],
        expected="no DeepSpeed by trainer_arguments(config, …, deepspeed=None): what is given wins",
        got="a file",
    )
    said = lab.observe(f"{PROGRAMS}:arguments_of", values, learning_rate=0.5, save_strategy="epoch", dataloader_drop_last=True)
    for name, wanted in (("learning_rate", 0.5), ("save_strategy", "epoch"), ("dataloader_drop_last", True)):
        require_equal(said[name], wanted, of=f"trainer_arguments(config, …, {name}={wanted!r}).{name}: what is given wins")
    plans = [
        experiment("settings-1", "by_settings", accumulation=4),
        experiment("settings-2", "by_settings", ranks=2, accumulation=4),
        experiment("settings-zero2", "by_settings", ranks=2, accumulation=4, stage=2),
    ]
    with ranks_come_back():
        runs = run_experiments(plans, timeout=90)
    wanted = reference("hand", PARAMS | {"grad_accum": 4}, ROWS)
    for name, words in (
        ("settings-1", "on one rank"),
        ("settings-2", "on two ranks"),
        ("settings-zero2", "on two ranks with ZeRO-2"),
    ):
        got = runs[name].results
        require_equal(
            got["deepspeed"],
            name == "settings-zero2",
            of=f"whether DeepSpeed trains, {words}, with `deepspeed` {'a path' if 'zero' in name else 'None'}",
        )
        require(
            farthest(got["losses"], wanted) < 1e-5,
            expected=f"the loop's losses {rounded(wanted)} from Trainer with these settings, {words}",
            got=rounded(got["losses"]),
        )


# --- 7.3 ------------------------------------------------------------------------------------------------------------


@pytest.mark.milestone(task="7.3", points=15, section="A mean over the step, not a mean of means")
def test_loss_of_a_step(lab, run_experiments):
    for number, known in ((None, None), (57, None), (1, None), (None, 1), (None, 0), (0, 0)):
        got = lab.observe(f"{PROGRAMS}:loss_of_batch", number, known)
        words = f"compute_loss with num_items_in_batch={number}"
        words += "" if known is None else f", where {known or 'no'} label is known"
        wanted = got["sum"] / (number or got["known"] or 1)
        require(
            math.isclose(got["loss"], wanted, rel_tol=1e-5, abs_tol=1e-7),
            expected=f"{wanted:.6f} by {words}: the sum over the batch, {got['sum']:.4f}, over {number or got['known']} labels",
            got=got["loss"],
        )
        require(
            got["second"] == got["loss"] and got["logits"] == [6, 16],
            expected=f"the loss and the model's output, by {words} and return_outputs=True",
            got=f"{got['second']}, logits {got['logits']}",
        )
        require(got["kept"], expected=f"the batch as it was, labels included, after {words}", got="another one")
        require(
            not got["saw_labels"], expected="a model that is not given the labels: it would compute a loss of its own", got="labels"
        )
        require(
            got["saw_positions"],
            expected="a model that is given all of the batch but the labels, position_ids too",
            got="without them",
        )
    largest = lab.observe(f"{PROGRAMS}:gradient_without_labels")
    require(largest and not any(largest), expected="gradients of 0 where no label is known", got="nan, or others than 0")
    got = lab.observe(f"{PROGRAMS}:loss_of_diverged")
    require(got == "nan", expected="nan where the model's logits are nan: a training that has diverged must be seen", got=got)
    cases = [("one", 1, 1, None), ("one-4", 1, 4, None), ("two", 2, 1, None), ("two-4", 2, 4, None), ("two-4-zero2", 2, 4, 2)]
    plans = [experiment(name, "by_trainer", ranks=ranks, accumulation=steps, stage=stage) for name, ranks, steps, stage in cases]
    with ranks_come_back():
        runs = run_experiments([*plans, experiment("evaluated", "evaluated", ranks=2)], timeout=90)
    wanted, got = reference("evaluation_loss", 32, 32), runs["evaluated"].results
    require(
        abs(got["eval_loss"] - wanted) < 1e-5 and got["shape"] == [32, 16],
        expected=f"{wanted:.5f}, the mean over all labels of 32 rows, by evaluate() on two ranks, and predictions [32, 16]",
        got=f"{got['eval_loss']:.5f}, {got['shape']}",
    )
    wanted = reference("evaluation_loss", 6, 8)
    require(
        abs(got["alone"] - wanted) < 1e-5,
        expected=f"{wanted:.5f}, the mean over this batch's labels, on each of two ranks that calls compute_loss without a number",
        got=f"{got['alone']:.5f}",
    )
    for name, ranks, steps, stage in cases:
        wanted = reference("hand", PARAMS | {"grad_accum": steps}, ROWS)
        got = runs[name].results["losses"]
        require(
            farthest(got, wanted) < 1e-5,
            expected=f"the loop's losses {rounded(wanted)}, on {ranks} rank{'s' * (ranks > 1)} with accumulation {steps}"
            + f" and ZeRO-{stage}" * (stage is not None)
            + ", of batches with unequal numbers of labels",
            got=rounded(got),
        )


# --- 7.4 ------------------------------------------------------------------------------------------------------------


@pytest.mark.milestone(task="7.4", points=15, section="Adversarial training")
def test_adversarial_training(lab, run_experiments):
    for gradient, dtype, wanted in (
        ([3.0, 0.0, 4.0], "float32", [0.3, 0.0, 0.4]),
        ([0.0, -2.0, 0.0], "float32", [0.0, -0.5, 0.0]),
        ([3e-20, 0.0, 4e-20], "float32", [0.3, 0.0, 0.4]),
        (None, "float32", [0.0, 0.0, 0.0]),
        ([math.inf, 0.0, 0.0], "float32", [0.0, 0.0, 0.0]),
        ([math.nan, 3.0, 4.0], "float32", [0.0, 0.0, 0.0]),
        ([math.inf, math.nan, 3.0], "float32", [0.0, 0.0, 0.0]),
        ([300.0, 0.0, 400.0], "bfloat16", [0.3, 0.0, 0.4]),
    ):
        got = lab.observe(f"{PROGRAMS}:fgm_by_itself", gradient, dtype, 0.5)
        words = f"with ε = 0.5 and the gradient {gradient or 'zero'} in row 5, in {dtype}"
        require(
            farthest(got["moved"], wanted) < (1e-6 if dtype == "float32" else 5e-3) and not got["elsewhere"],
            expected=f"row 5 of the embeddings moved by {wanted}, and nothing else, by attack() {words}",
            got=f"by {got['moved']}, and {got['elsewhere']} numbers elsewhere",
        )
        require(got["back"], expected=f"the very embeddings of before, after restore() {words}", got="others")
        require(
            got["stays"], expected="a second restore() that changes nothing: a step may lie between the two", got="the old values"
        )
        require(got["same"], expected="all other parameters as they were", got="others")
        require(got["kept"], expected=f"the gradient as it was, after attack() {words}", got="another one")
    for sharded, word in ((True, "ZeRO-3"), (False, "frozen")):
        said = lab.observe(f"{PROGRAMS}:fgm_refused", sharded)
        require(
            word.lower() in said.lower(),
            expected=f"ValueError of FGM where the embeddings are {'sharded' if sharded else 'frozen'}, in a sentence with {word}",
            got=said or "no error",
        )
    hooks = lab.observe(f"{PROGRAMS}:hooks_after_a_failure")
    require(not hooks, expected="no hook on the embeddings after a first pass that has failed", got=f"{hooks} hooks")
    for known, words in ((True, "with labels"), (False, "without any known label, where nothing says which way to move")):
        passes = lab.observe(f"{PROGRAMS}:passes_of_a_step", known)
        require_equal(passes, 2, of=f"passes through the model in a step of a batch {words}: all ranks must make the same passes")
    plans = [
        experiment("fgm-1", "by_trainer", accumulation=3, fgm=0.5),
        experiment("fgm-2", "by_trainer", ranks=2, accumulation=2, fgm=0.5),
        *(experiment(f"fgm-zero{stage}", "by_trainer", ranks=2, accumulation=2, stage=stage, fgm=0.5) for stage in (1, 2, 3)),
    ]
    with ranks_come_back():
        runs = run_experiments(plans, timeout=120)
    for name, words, micro, count in (("fgm-1", "on one rank", 8, 3), ("fgm-2", "on two ranks", 4, 4)):
        got, step = runs[name].results, reference("fgm_step", ROWS, micro, count, 0.5, 3)
        require(
            math.isclose(got["losses"][0], step["loss"], rel_tol=1e-5),
            expected=f"{step['loss']:.5f}, the loss of the batch as it is, in the first step, {words}",
            got=round(got["losses"][0], 5),
        )
        wanted = step["gradients"]
        require(
            got["moved"] == 0,
            expected=f"the embeddings where they were when the optimizer steps, {words}",
            got=f"{got['moved']} moved",
        )
        require(not got["hooks"], expected=f"no hook left on the embeddings, {words}", got=f"{got['hooks']} hooks")
        # Clipping scales all gradients alike.
        scale = got["gradients"]["classifier.dense.weight"][0] / wanted["classifier.dense.weight"][0]
        for parameter, numbers in wanted.items():
            found = got["gradients"].get(parameter, [math.nan] * 3)
            require(
                all(math.isclose(a, scale * b, rel_tol=1e-3, abs_tol=1e-5) for a, b in zip(found, numbers)),
                expected=f"in {parameter} the gradients of both passes of each micro-batch, {words}: their norm is "
                f"{scale * numbers[0]:.5f}, their sum {scale * numbers[1]:.5f}",
                got=f"a norm of {found[0]:.5f}, a sum of {found[1]:.5f}"
                + ", in another direction" * math.isclose(found[0], scale * numbers[0], rel_tol=1e-3),
            )
    wanted = runs["fgm-2"].results["losses"]
    for stage in (1, 2):
        got = runs[f"fgm-zero{stage}"].results.get("losses", [])
        require(
            farthest(got, wanted) < 1e-5,
            expected=f"with ZeRO-{stage} the losses of the run without DeepSpeed, {rounded(wanted)}",
            got=rounded(got) or runs[f"fgm-zero{stage}"].results,
        )
    said = runs["fgm-zero3"].results.get("refused", "")
    require(
        "ZeRO-3" in said,
        expected="ValueError under ZeRO-3, in a sentence that names it",
        got=said or "no error",
    )


# --- 7.5 ------------------------------------------------------------------------------------------------------------


PLACES = [(0, 0), (1, 0), (0, 1), (0, 0), (1, 1), (0, 11), (11, 0), (1, 11), (11, 1), (0, 100), (0, 1000), (100, 0), (2, 1)]
"""Epochs and rows."""


@pytest.mark.milestone(task="7.5", points=10, section="Dropout many times, and words that are missing")
def test_head_and_augmentation(lab, run_experiments):
    quiet = lab.observe(f"{PROGRAMS}:head", 4, 0.5, False, 0)
    require_equal(
        sorted(quiet["shapes"]), [[7], [7, 64]], of="the shapes of the head's parameters, for hidden_size 64 and 7 labels"
    )
    none = lab.observe(f"{PROGRAMS}:head", 3, 0.0, True, 0)
    for got, where in ((quiet, "in evaluation"), (none, "in training with dropout 0")):
        require_equal(list(got["logits"].shape), [5, 7], of=f"the shape of the logits, {where}")
        require(
            torch.allclose(got["logits"], got["exact"], atol=1e-5),
            expected=f"one linear layer on the first token's vector, {where}: {rounded(got['exact'][0].tolist())}",
            got=rounded(got["logits"][0].tolist()),
        )
    spread = {}
    for samples in (1, 64):
        got = lab.observe(f"{PROGRAMS}:head", samples, 0.5, True, 1)
        require(not torch.equal(got["logits"], got["again"]), expected="other masks in each forward pass", got="the same")
        spread[samples] = (got["logits"] - got["exact"]).std().item()
    require(
        spread[64] < spread[1] / 4,
        expected=f"the mean over 64 masks to spread an eighth of what one does, {spread[1] / 8:.3f}: a mask for each",
        got=f"{spread[64]:.3f}",
    )
    got = lab.observe(f"{PROGRAMS}:dropped", 0.25, 64)
    require(
        0.22 < got["zeros"] < 0.28 and abs(got["others"] - 4 / 3) < 1e-4,
        expected="a quarter of the entries dropped with dropout 0.25, and the others scaled by 4/3",
        got=f"{got['zeros']:.3f} dropped, the others scaled by {got['others']:.3f}",
    )
    require(got["patterns"] > 60, expected="other entries dropped in each row", got=f"{got['patterns']} patterns in 64 rows")

    ids, settings = (
        [0, *range(5, 200), 3, *range(200, 400), 2],
        {"share": 0.3, "mask_id": 4, "special_ids": {0, 1, 2, 3, 4}, "seed": 5},
    )
    calls = [settings | {"epoch": epoch, "row": row} for epoch, row in PLACES]
    calls += [settings | {"epoch": 0, "row": 0, "seed": 6}, settings | {"epoch": 0, "row": 0, "share": 0.0}]
    calls += [settings | {"epoch": 0, "row": 0, "share": 1.0}]
    first = lab.observe(f"{PROGRAMS}:augmented", ids, calls, False)
    results = first["results"]
    require(
        not first["drawn"], expected="no random number drawn from torch, numpy or random", got=f"from {', '.join(first['drawn'])}"
    )
    again = lab.observe(f"{PROGRAMS}:augmented", ids, calls[::-1], True)["results"][::-1]
    require(results == again, expected="the same for the same seed, epoch and row, in any order of the calls", got="something else")
    require(all(len(result) == len(ids) for result in results), expected=f"{len(ids)} ids", got=[len(result) for result in results])
    for result, given in zip(results, calls):
        masked = [n for n, (a, b) in enumerate(zip(ids, result)) if a != b]
        require(
            all(result[n] == 4 for n in masked) and (result[0], result[196], result[-1]) == (0, 3, 2),
            expected="only mask_id in the place of another token, and special tokens where they were",
            got=result[:12],
        )
        wanted = given["share"] * 395
        require(
            abs(len(masked) - wanted) <= (45 if 0 < given["share"] < 1 else 0),
            expected=f"about {wanted:.0f} of 395 ordinary tokens masked, with share {given['share']}",
            got=len(masked),
        )
    given = calls[1] | {"special_ids": sorted(calls[1]["special_ids"])}
    with ranks_come_back():
        runs = run_experiments([experiment("elsewhere", "augmented_on_ranks", ranks=2, ids=ids, given=given)], timeout=60)
    require(
        runs["elsewhere"].results["results"] == [results[1]] * 2,
        expected="the same in every process: on each rank of a run, and in its next life (the hash of a text is another in each)",
        got="something else",
    )
    words = [token + 400 * (token > 4) for token in ids]
    (other,) = lab.observe(f"{PROGRAMS}:augmented", words, calls[:1], False)["results"]
    require(
        [token == 4 for token in other] == [token == 4 for token in results[0]],
        expected="the same places masked in a row of other words: which ones depends on seed, epoch and row alone",
        got="others",
    )
    plain = [settings | {"special_ids": set(), "epoch": 0, "row": row} for row in range(60)]
    more = lab.observe(f"{PROGRAMS}:augmented", list(range(5, 25)), plain, False)["results"]
    counts = [sum(token == 4 for token in result) for result in more]
    require(
        len(set(counts)) > 3 and all(sum(result[place] == 4 for result in more) > 3 for place in (0, 10, 19)),
        expected="each token masked by a draw of its own, the first and last too: of 60 rows of 20 not all have equally many",
        got=f"from {min(counts)} to {max(counts)} masked",
    )
    alike = lab.observe(f"{PROGRAMS}:augmented_alike", list(range(5, 85)), {"share": 0.5, "mask_id": 4, "special_ids": set()})
    require(
        not alike,
        expected="other tokens masked for another seed, epoch or row",
        got=f"the same for {alike[0]} and for {alike[1]}" if alike else "",
    )
    free, bound = (settings | {"special_ids": special, "epoch": 0, "row": 0} for special in (set(), set(range(10, 110))))
    free, bound = lab.observe(f"{PROGRAMS}:augmented", ids, [free, bound], False)["results"]
    require(
        bound[106:] == free[106:],
        expected="the same places masked behind special tokens as behind others: there is a draw for each place, special or not",
        got="others",
    )


# --- 7.6 ------------------------------------------------------------------------------------------------------------


@pytest.mark.milestone(task="7.6", points=10, section="LoRA")
def test_lora(lab):
    for update, targets, width, wanted in (
        (4, ("query", "value"), 0, 3 * 2 * 4 * 192 + 96 * 96 + 96 + 96 * 16 + 16),
        (2, ("query",), 32, 2 * 2 * 64 + 32 * 32 + 32 + 32 * 5 + 5),
        (3, ("query", "key", "dense"), 32, 3 * 2 * (64 + 64 + 64 + 128 + 128) + 32 * 32 + 32 + 32 * 5 + 5),
    ):
        words = f"rank {update} beside {', '.join(targets)}"
        got = lab.observe(f"{PROGRAMS}:lora", update, targets, width)
        require_equal(got["calculated"], wanted, of=f"lora_parameters() with {words}")
        require_equal(got["trained"], wanted, of=f"parameters that are trained after add_lora() with {words}")
        require_equal(got["saved"], wanted, of=f"numbers in the checkpoint that save_pretrained() writes, with {words}")
        require_equal(got["scale"], 12.0 / update, of=f"the factor of the update, alpha / rank, with alpha 12 and {words}")
        require_equal(got["dropout"], 0.0, of=f"the share that the adapters drop, with {words}")
        require(
            torch.allclose(got["plain"], got["first"], atol=1e-6),
            expected=f"before any training the logits of the model as it was, with {words}",
            got=f"off by {(got['plain'] - got['first']).abs().max():.2e}",
        )
        require(
            not torch.allclose(got["plain"], got["there"], atol=1e-3),
            expected=f"other logits with other adapters, with {words}",
            got="the same",
        )
        require(
            torch.allclose(got["merged"], got["there"], atol=1e-5),
            expected=f"the adapted model's logits from merged(), with {words}",
            got=f"off by {(got['merged'] - got['there']).abs().max():.2e}",
        )
        require("peft" not in got["kinds"], expected="nothing of peft in what merged() returns", got=got["kinds"])
        require(
            got["same"],
            expected="the adapted model in training mode, its parameters trained or frozen as they were",
            got="otherwise",
        )
        require(
            torch.equal(got["there"], got["there_again"]),
            expected="the adapted model as it was, after merged()",
            got=f"logits off by {(got['there'] - got['there_again']).abs().max():.2e}",
        )
    for targets, head, wanted in (
        (("uery",), 5, 85),
        (("output",), 5, 85),
        (("classifier",), 5, 85),
        (("query",), 9, 2 * 2 * 32 + 153),
        ((), 2, 34),
    ):
        got = lab.observe(f"{PROGRAMS}:lora_counted", targets, head)
        require_equal(
            got, wanted, of=f"lora_parameters(model, 2, {targets}), of 2 layers of width 16 and a head of one layer 16 → {head}"
        )
    for targets, bad in ((("query", "q_proj"), "q_proj"), (("word_embeddings", "query"), "word_embeddings"), (("self",), "self")):
        said = lab.observe(f"{PROGRAMS}:lora_refused", targets)
        require(
            bad in said,
            expected=f"ValueError for the target {bad}, which names no linear layer, in a sentence that names it",
            got=said or "no error",
        )


# --- 7.7 ------------------------------------------------------------------------------------------------------------


def metrics_by_hand(probabilities, labels, names, thresholds) -> dict:
    """By counting, in Python."""
    rows, count = len(labels), len(names)
    thresholds = thresholds if isinstance(thresholds, list) else [thresholds] * count
    each, areas, nothing, total = [], [], [], [0, 0, 0]
    for n in range(count):
        seen = [(probabilities[r][n], labels[r][n]) for r in range(rows) if labels[r][n] != UNKNOWN]
        hits = [(p >= thresholds[n], y) for p, y in seen]
        right, wrong, missed = (sum(h == a and y == b for h, y in hits) for a, b in ((True, 1), (True, 0), (False, 1)))
        total = [a + b for a, b in zip(total, (right, wrong, missed))]
        if right + missed:
            precision = right / (right + wrong) if right + wrong else 0.0
            f1 = 2 * right / (2 * right + wrong + missed)
            each.append((precision, right / (right + missed), f1))
        else:
            nothing.append(names[n])
        positives, negatives = ([p for p, y in seen if y == kind] for kind in (1, 0))
        if positives and negatives:
            pairs = sum((a > b) + 0.5 * (a == b) for a in positives for b in negatives)
            areas.append(pairs / len(positives) / len(negatives))
    mean = lambda values: sum(values) / len(values) if values else math.nan
    right, wrong, missed = total
    return {
        "micro_f1": 2 * right / (2 * right + wrong + missed) if right + wrong + missed else 0.0,
        "macro_f1": mean([f1 for _, _, f1 in each]),
        "macro_precision": mean([precision for precision, _, _ in each]),
        "macro_recall": mean([recall for _, recall, _ in each]),
        "roc_auc": mean(areas),
        "without_positives": nothing,
    }


def some_predictions(seed: int, rows: int = 40, count: int = 6) -> tuple[list, list]:
    draw = random.Random(seed)
    labels = [[draw.choice([0, 0, 0, 1, UNKNOWN]) if n != 4 else 0 for n in range(count)] for _ in range(rows)]
    for row in labels:
        row[5] = 1 if row[5] == 0 else row[5]  # no negative
    grid = [step / 64 for step in range(65)]
    return [[draw.choice(grid) for _ in range(count)] for _ in range(rows)], labels


@pytest.mark.milestone(task="7.7", points=8, section="Metrics")
def test_metrics(lab):
    names = ["bug", "todo", "units", "memory", "licence", "summary"]
    for seed, thresholds in ((1, 0.5), (2, 0.25), (3, [0.1, 0.9, 0.5, 0.3, 0.7, 0.75]), (4, 1.0), (5, [0.0] * 6)):
        probabilities, labels = some_predictions(seed)
        given = torch.tensor(thresholds) if isinstance(thresholds, list) else thresholds
        got = lab.multilabel_metrics(torch.tensor(probabilities), torch.tensor(labels), names, thresholds=given)
        wanted = metrics_by_hand(probabilities, labels, names, thresholds)
        require_equal(sorted(got), sorted(wanted), of="the keys of multilabel_metrics()")
        require_equal(got["without_positives"], wanted["without_positives"], of="without_positives, where label 4 has none")
        for name in wanted:
            if name != "without_positives":
                require(
                    isinstance(got[name], float) and abs(got[name] - wanted[name]) < 1e-5,
                    expected=f"{name} {wanted[name]:.5f}, of 40 rows, 6 labels and the thresholds {thresholds}",
                    got=got[name],
                )
    probabilities, labels = some_predictions(7)
    probabilities = [[0.5 + p / 4000 for p in row] for row in probabilities]  # near each other
    for row in labels:
        row[3] = UNKNOWN  # a label that nobody has looked at
    given, wanted = torch.tensor(labels), metrics_by_hand(probabilities, labels, names, 0.5)
    for turn in ("first", "second"):
        near = torch.tensor(probabilities).double()
        got = lab.multilabel_metrics(near, given, names)
        require(
            torch.equal(near, torch.tensor(probabilities).double()), expected="probabilities that stay as they are", got="others"
        )
        require_equal(got["without_positives"], ["memory", "licence"], of="without_positives, where nobody has looked at memory")
        require(
            abs(got["roc_auc"] - wanted["roc_auc"]) < 1e-5 and abs(got["micro_f1"] - wanted["micro_f1"]) < 1e-5,
            expected=f"ROC-AUC {wanted['roc_auc']:.5f}, micro F1 {wanted['micro_f1']:.5f}, of probabilities near 0.5, {turn} call",
            got=f"{got['roc_auc']:.5f}, {got['micro_f1']:.5f}",
        )
    require(torch.equal(given, torch.tensor(labels)), expected="labels that stay as they are", got="others")
    got = lab.multilabel_metrics(torch.tensor([[0.2], [0.6]]), torch.tensor([[0.0], [UNKNOWN]]), ["bug"])
    require(
        math.isnan(got["macro_f1"]) and math.isnan(got["roc_auc"]) and got["without_positives"] == ["bug"] and got["micro_f1"] == 0,
        expected="nan for a mean over no label, the label named, and micro F1 0 where there is no positive and one is predicted",
        got=got,
    )


# --- 7.8 ------------------------------------------------------------------------------------------------------------


def f1_at(probabilities: list[float], labels: list[int], threshold: float) -> float:
    pairs = [(p >= threshold, y) for p, y in zip(probabilities, labels) if y != UNKNOWN]
    right = sum(hit and y == 1 for hit, y in pairs)
    return 2 * right / (sum(hit for hit, _ in pairs) + sum(y == 1 for _, y in pairs) or 1)


@pytest.mark.milestone(task="7.8", points=8, section="Thresholds")
def test_thresholds(lab):
    for column, truth, wanted, why in (
        ([0.9, 0.12], [1, 0], 0.5, "all from 0.15 to 0.9 are equally good"),
        ([0.9, 0.36, 0.34, 0.33, 0.32, 0.31], [1, 0, 0, 0, 1, 1], 0.3, "F1 is 0.67; at 0.5 more entries are right, and F1 is 0.5"),
        ([0.33, 0.12], [1, 0], 0.3, "0.15 to 0.3 are equally good"),
        ([0.93, 0.72], [1, 0], 0.75, "0.75 to 0.9 are equally good"),
        ([0.57, 0.52, 0.47, 0.46], [1, 0, 1, 0], 0.45, "0.45 and 0.55 are equally good, and equally near to 0.5"),
        ([0.72, 0.68, 0.33, 0.32], [1, 0, 1, 0], 0.3, "0.3 and 0.7 are equally good, and equally near to 0.5"),
        ([0.97, 0.93, 0.07, 0.06], [1, 0, 1, 0], 0.05, "0.05 and 0.95 are equally good, and equally near to 0.5"),
        ([1.0, 0.97], [1, 0], 0.5, "all up to 0.95 are equally good, and 1.0 is none of them"),
        ([0.96, 0.93], [1, 0], 0.95, "0.95 alone tells the two apart"),
        ([0.25, 0.2], [1, 0], 0.25, "0.25 is reached by 0.25"),
        ([0.02, 0.03], [1, 0], 0.5, "none finds the positive"),
    ):
        got = lab.best_thresholds(torch.tensor([column]).T, torch.tensor([truth]).T)
        require(
            abs(got[0].item() - wanted) < 1e-4,
            expected=f"{wanted} for the probabilities {column} with the labels {truth}: {why}",
            got=round(got[0].item(), 4),
        )
    # Each label's positive lies on one of the thresholds, and its negative just below: no other tells the two apart.
    on_them = torch.tensor([[n / 20 for n in range(1, 20)], [n / 20 - 0.01 for n in range(1, 20)]])
    got = lab.best_thresholds(on_them, torch.tensor([[1], [0]]).expand(2, 19))
    wrong = [n for n in range(19) if got[n] != on_them[0, n]]
    require(
        not wrong,
        expected="each n/20 in float32, where a positive lies on it and a negative just below",
        got=[f"{got[n].item():.9f} for {on_them[0, n].item():.9f}" for n in wrong],
    )
    steps = [round(0.05 * n, 2) for n in range(1, 20)]
    for seed in range(6):
        draw = random.Random(seed)
        labels = [[draw.choice([0, 0, 1, UNKNOWN]), int(draw.random() < 0.1), 0, draw.choice([0, 1])] for _ in range(60)]
        centre = [0.45, 0.2, 0.4, 0.7]
        probabilities = [
            [min(1.0, max(0.0, c + (0.15 if y == 1 else -0.1) + draw.gauss(0, 0.15))) for c, y in zip(centre, row)]
            for row in labels
        ]
        given, shares = torch.tensor(labels).float(), torch.tensor(probabilities)
        got = lab.best_thresholds(shares, given)
        require(torch.equal(given, torch.tensor(labels).float()), expected="labels that stay as they are", got="others")
        require(torch.equal(shares, torch.tensor(probabilities)), expected="probabilities that stay as they are", got="others")
        require(
            torch.is_tensor(got) and got.dtype == torch.float32 and list(got.shape) == [4],
            expected="thresholds [4] in float32",
            got=repr(got),
        )
        for label in range(4):
            column, truth = ([row[label] for row in table] for table in (probabilities, labels))
            if not any(y == 1 for y in truth):
                wanted = 0.5
            else:
                best = max(f1_at(column, truth, step) for step in steps)
                equal = [step for step in steps if f1_at(column, truth, step) > best - 1e-9]
                wanted = min(equal, key=lambda step: (round(abs(step - 0.5), 4), step))
            require(
                abs(got[label].item() - wanted) < 1e-4,
                expected=f"{wanted} for label {label}, with F1 {f1_at(column, truth, wanted):.4f}",
                got=f"{got[label].item():.4f}, with F1 {f1_at(column, truth, got[label].item()):.4f}",
            )


# --- 7.9 ------------------------------------------------------------------------------------------------------------


@pytest.mark.milestone(task="7.9", points=6, section="Folds")
def test_folds(lab):
    from shardlab.data.comments import comments

    labels = torch.tensor([row["labels"] for row in comments("train", 400)])
    positive = labels == 1
    for folds, seed in ((3, 0), (5, 1)):
        got = lab.stratified_folds(labels, folds, seed)
        require_equal(len(got), folds, of=f"the number of folds of stratified_folds(labels, {folds})")
        held_out = sorted(row for _, validation in got for row in validation)
        require(
            held_out == list(range(400)),
            expected="each of 400 rows in the validation of just one fold",
            got=f"{len(held_out)} rows",
        )
        for number, (training, validation) in enumerate(got):
            require(
                sorted([*training, *validation]) == list(range(400)),
                expected=f"in fold {number} each row in one of the two parts",
                got=f"{len(training)} and {len(validation)}",
            )
            require(
                training == sorted(training) and validation == sorted(validation) and all(isinstance(row, int) for row in training),
                expected="the rows' numbers, as int, in the order of the data",
                got=f"{training[:5]}, {validation[:5]}",
            )
            share = positive[validation].sum(0)
            for label, count in enumerate(positive.sum(0).tolist()):
                require(
                    abs(int(share[label]) - count / folds) <= 1.5 + 0.15 * count / folds,
                    expected=f"about {count / folds:.1f} of {count} positives of label {label} in fold {number} of {folds}",
                    got=int(share[label]),
                )
        require(got == lab.stratified_folds(labels, folds, seed), expected="the same folds for the same seed", got="others")
    require(
        lab.stratified_folds(labels, 3, 0) != lab.stratified_folds(labels, 3, 7),
        expected="other folds for another seed",
        got="the same",
    )
    few = torch.zeros(30, 3, dtype=torch.long)
    few[:10, 0], few[:2, 1], few[2:9, 1], few[5:20, 2] = 1, 1, UNKNOWN, UNKNOWN
    for folds, names in ((1, ("1",)), (3, ("1", "2"))):
        require_error(
            lambda folds=folds: lab.stratified_folds(few, folds),
            ValueError,
            mentions=names,
            expected=f"ValueError for {folds} folds, where label 1 has 2 positives",
        )
    one = few.clone()
    one[1, 1] = 0
    require_error(
        lambda: lab.stratified_folds(one, 2),
        ValueError,
        mentions=("1",),
        expected="ValueError for 2 folds, where label 1 has 1 positive",
    )
    require(
        len(lab.stratified_folds(few, 2)) == 2, expected="2 folds where a label has 2 positives, and another has none", got="others"
    )
    alone = lab.stratified_folds(few[:, :1], 2)
    require(
        [len(validation) for _, validation in alone] == [15, 15]
        and all((few[validation, 0] == 1).sum() == 5 for _, validation in alone),
        expected="5 of 10 positives and 15 of 30 rows in each of 2 folds, of one label alone",
        got=[len(validation) for _, validation in alone],
    )
    require(few[2, 1] == UNKNOWN, expected="labels that stay as they are", got="others")


# --- 7.10 -----------------------------------------------------------------------------------------------------------

FULL = """\
# as before
model_name: comment-tiny
num_labels: 12
max_len: 48
train_params:
  batch_size: 8
  grad_accum: 2
  lr: 5.0e-4
  folds: 4
deepspeed: configs/zero2.json
"""
BAD_FILES = [
    ("num_label: 16\n", ("num_label", "line 1")),
    ("model_name: a\nnum_labels: '16'\n", ("num_labels", "line 2", "'16'")),
    ("train_params:\n  lr: 1e-3\n", ("lr", "line 2", "1e-3")),
    ("train_params:\n  batch_size: 8\n  batchsize: 8\n", ("batchsize", "line 3")),
    ("\n\nmax_len: 2\n", ("max_len", "line 3", "2")),
    ("train_params:\n  # less\n  epochs: 2.5\n", ("epochs", "line 3", "2.5")),
    ("deepspeed: no/such.json\n", ("deepspeed", "line 1", "no/such.json")),
    ("train_params: 5\n", ("train_params", "line 1", "5")),
    ("train_params:\n  seed: true\n", ("seed", "line 2")),
    ("- a\n- b\n", ()),
    ("a: [1, 2\n", ()),
    ("model_name: a\nmax_len: 16\nmodel_name: b\n", ("model_name", "line 3")),
    ("data: 2026-02-31\n", ()),
    ("max_len: 16\ntrain_params:\n  max_len: 3\n", ("max_len", "line 3")),
    ("train_params: {epochs: 3,\n  lr: 0.0}\n", ("lr", "line 2")),
    ("trainparams:\n  lr: 1.0\n", ("trainparams", "line 1")),
    ("deepspeed: ''\n", ("deepspeed", "line 1")),
    ("max_len: 16\ndeepspeed: .\n", ("deepspeed", "line 2")),
    ("deepspeed: 5\n", ("deepspeed", "line 1", "5")),
    ("data: !!python/object/apply:os.getcwd []\n", ("line 1",)),
    ("[]\n", ()),
    ("0\n", ()),
    ("max_len: 64\n1: 2\n", ("line 2",)),
    ("train_params:\n  max_len: 3\nmax_len: 16\n", ("max_len", "line 2")),
    ("model_name: a\nmax_len:\n", ("max_len", "line 2", "None")),
]


@pytest.mark.milestone(task="7.10", points=8, section="A configuration that refuses slips")
def test_configuration_files(lab):
    defaults = lab.observe(f"{PROGRAMS}:read_file", "empty.yaml", "", {})
    require_equal(defaults.get("config", {}).get("model_name"), "comment-tiny", of="model_name of an empty file: the default")
    got = lab.observe(f"{PROGRAMS}:read_file", "full.yaml", FULL, {"configs/zero2.json": "{}"})
    require("config" in got, expected="no error for the file in the docstring's form", got=got)
    config, params = got["config"], got["config"]["train_params"]
    for name, value, wanted in (
        ("num_labels", config["num_labels"], 12),
        ("max_len", config["max_len"], 48),
        ("train_params.batch_size", params["batch_size"], 8),
        ("train_params.lr", params["lr"], 5e-4),
        ("train_params.epochs", params["epochs"], 4),
        ("deepspeed", config["deepspeed"], [True, "zero2.json"]),
    ):
        require_equal(value, wanted, of=f"{name} of a file with 12 labels (deepspeed: whether the path exists, and its name)")
    before = lab.observe(f"{PROGRAMS}:read_file", "old.yaml", FULL.replace("deepspeed: configs/zero2.json\n", ""), {})
    require_equal(
        before.get("config"),
        config | {"deepspeed": None},
        of="the same file without its line `deepspeed`: nothing else is different",
    )
    require_equal(lab.observe(f"{PROGRAMS}:missing_file"), "FileNotFoundError", of="the error where the YAML file is not there")
    said = lab.observe(f"{PROGRAMS}:read_file", "latin.yaml", "data: donn\u00e9es.csv\n", {}).get("refused", "")
    require(
        "latin.yaml" in said,
        expected="ValueError for a file that is not UTF-8, in a sentence that names it",
        got=said or "no error",
    )
    for text, names in BAD_FILES:
        said = lab.observe(f"{PROGRAMS}:read_file", "bad.yaml", text, {}).get("refused", "")
        missing = [name for name in ("bad.yaml", *names) if name.lower() not in said.lower()]
        require(
            not missing,
            expected=f"ValueError for {text!r}, in a sentence with {', '.join(('bad.yaml', *names))}",
            got=said or "no error",
        )


# --- 7.11 -----------------------------------------------------------------------------------------------------------

REFUSED = "settings that are refused"
WHY = "the settings\nare refused"
DAMAGE = {"a damaged package": "raise KeyError('no such key')", "a package damaged without a word": "raise AssertionError"}
ABSENT = {"imports": "deepspeed", "deepspeed": "deepspeed"}
ONE_RANK = '{"train_batch_size": 3, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 1}'


@pytest.mark.milestone(task="7.11", points=4, section="A configuration that refuses slips", needs=("7.2", "7.10"))
def test_set_up_is_looked_at(lab):
    names = ["configuration", "imports", "deepspeed", "model", "trainer"]
    good = "train_params:\n  batch_size: 4\n"
    for words, text, others, without, wanted in (
        ("a good file", good, {}, "", {"deepspeed": "not used"}),
        ("a good DeepSpeed file", "deepspeed: z.json\n", {"z.json": '{"train_batch_size": "auto"}'}, "", {}),
        (
            "a DeepSpeed file with stage 7",
            "deepspeed: z.json\n",
            {"z.json": '{"train_batch_size": 8, "zero_optimization": {"stage": 7}}'},
            "",
            {"deepspeed": "stage"},
        ),
        ("a DeepSpeed file that is no JSON", "deepspeed: z.json\n", {"z.json": "{"}, "", {"deepspeed": "z.json"}),
        ("another number of labels", "num_labels: 12\n", {}, "", {"deepspeed": "not used"}),
        ("no DeepSpeed file, and deepspeed not there", good, {}, "deepspeed", {"deepspeed": "not used"}),
        (
            "a file that is not there",
            "",
            {},
            "",
            {"configuration": "config.yaml", "deepspeed": "not looked at", "model": "not looked at", "trainer": "not looked at"},
        ),
        ("a model that is not there", "model_name: /no/such/model\n", {}, "", {"model": "/no/such/model", "deepspeed": "not used"}),
        ("a package that is not there", good, {}, "peft", {"imports": "peft", "deepspeed": "not used"}),
        ("a damaged package", good, {}, "iterstrat", {"imports": "no such key", "deepspeed": "not used"}),
        ("a package damaged without a word", good, {}, "iterstrat", {"imports": "AssertionError", "deepspeed": "not used"}),
        ("a DeepSpeed file, and deepspeed not there", "deepspeed: z.json\n", {"z.json": "{}"}, "deepspeed", ABSENT),
        ("a DeepSpeed file for one rank", "deepspeed: z.json\n", {"z.json": ONE_RANK}, "", {}),
        (REFUSED, good, {}, "", {"deepspeed": "not used", "trainer": "the settings are refused"}),
        (
            "a model without weights",
            "model_name: WEIGHTLESS\nnum_labels: 5\n",
            {},
            "",
            {"model": "Error: ", "deepspeed": "not used"},
        ),
        ("a model with a tokenizer of its own", "model_name: FOUR\nnum_labels: 5\n", {}, "", {"deepspeed": "not used"}),
        (
            "a model that knows fewer tokens than its tokenizer",
            "model_name: MODEL\nnum_labels: 5\n",
            {},
            "",
            {"model": "index", "deepspeed": "not used"},
        ),
        (
            "an unknown key",
            "num_label: 3\n",
            {},
            "",
            {"configuration": "num_label", "deepspeed": "not looked at", "model": "not looked at", "trainer": "not looked at"},
        ),
    ):
        *found, left = lab.observe(f"{PROGRAMS}:validated", text, others, without, DAMAGE.get(words, ""), WHY * (words == REFUSED))
        require_equal([name for name, _ in found], names, of=f"the names that validate_setup() gives, for {words}")
        require_equal(left, ["left", ""], of=f"what lies in the file's folder after validate_setup(), for {words}")
        for name, reason in found:
            expected = wanted.get(name, "")
            require(
                reason == expected if expected in ("", "not used", "not looked at") else expected in reason and "\n" not in reason,
                expected=f"for {words}: {name} {f'with {expected!r} in one line' if expected else 'without a reason'}",
                got=reason or "nothing",
            )
