"""Milestones of lab 03. The judges are plain PyTorch, the engine used without your code, and the checkpoint's own files."""

import json
import os
import re
import shutil

import pytest

from shardlab.hardware import gpu_count
from shardlab.milestones import engine_runs
from shardlab.milestones.launches import once, ranks_come_back, shared_folder, visible_folder
from shardlab.milestones.messages import farthest, require, require_equal, require_error
from shardlab.milestones.saved_weights import safely_loaded, saved_weights
from shardlab.milestones.small_runs import text_experiment, zero_config
from shardlab.run.experiment import Experiment, program_of

PROGRAMS = "labs/lab03_engine/programs.py"
STEPS = 7
DROPOUT = {1: 0.0, 2: 0.1, 3: 0.0}


def of_sizes(configuration: dict) -> dict:
    """Without the size that follows from the others."""
    return {key: value for key, value in configuration.items() if key != "train_batch_size"}


WARM_UP = {
    "type": "WarmupLR",
    "params": {"warmup_min_lr": 1e-3, "warmup_max_lr": 1e-2, "warmup_num_steps": 6, "warmup_type": "linear"},
}


def config(
    stage: int,
    *,
    ranks: int = 2,
    micro_batch: int = 2,
    accumulation: int = 2,
    clipping: float = 0.5,
    universal: bool = False,
    **more,
) -> dict:
    # With an epsilon this large, AdamW feels the scale of its gradients; with the usual 1e-8 it would not.
    adam = {"lr": 1e-2, "eps": 0.1, "weight_decay": 0.01}
    sizes = {"micro_batch": micro_batch, "accumulation": accumulation, "ranks": ranks}
    return zero_config(stage, **sizes, clipping=clipping, adam=adam, checkpoint={"load_universal": universal}, **more)


def experiment(
    name: str, program: str, stage: int, *, ranks: int = 2, accumulation: int = 2, options=None, **changes
) -> Experiment:
    settings = {
        "program": program,
        "method": f"stage {stage}",
        "ranks": ranks,
        "deepspeed": config(stage, ranks=ranks, accumulation=accumulation, micro_batch=changes.get("micro_batch", 2)),
        "model": engine_runs.odd_model(),
        "accumulation": accumulation,
        "steps": STEPS,
        "train_examples": 24,
        "options": options or {},
    }
    return text_experiment(name, **(settings | changes))


def never_stopped(run_experiments) -> dict:
    """Seven steps of the engine without your code, stage 2 with dropout; checkpoints after steps 2 and 4. And two in bf16."""
    folder = visible_folder() / "engine"
    folder.mkdir(exist_ok=True)
    experiments = []
    for stage in (1, 2, 3):
        name = f"stage{stage}"
        options = {"dropout": DROPOUT[stage], "save_at": [2, 4], "checkpoints": str(folder / name)}
        options |= {"weights_at": 2, "weights": str(shared_folder() / f"{name}.pt")}
        experiments.append(experiment(name, "shardlab.milestones.engine_runs:train", stage, options=options, **scheduled(stage)))
    options = {"save_at": [2], "checkpoints": str(folder / "bf16"), "weights_at": 2, "weights": str(shared_folder() / "bf16.pt")}
    short = {"deepspeed": config(2, precision="bf16"), "precision": "bf16", "steps": 2}
    experiments.append(experiment("bf16", "shardlab.milestones.engine_runs:train", 2, options=options, **short))
    for name, model, frozen in OTHER_MODELS:
        options = {
            "save_at": [1],
            "checkpoints": str(folder / name),
            "weights_at": 1,
            "weights": str(shared_folder() / f"{name}.pt"),
        }
        other = {"model": model or engine_runs.odd_model(tied=False), "steps": 1, "options": options | {"frozen": frozen}}
        experiments.append(experiment(name, "shardlab.milestones.engine_runs:train", 2, **other))
    return run_experiments(experiments, reference=True)


OTHER_MODELS = (("untied", "", "transformer.ln_f"), ("by-name", "bloom-tiny", "transformer.word_embeddings_layernorm"))
"""Name, model (the odd one, with an output layer of its own, where it is empty), and how the names of its frozen parameters begin."""


def scheduled(stage: int) -> dict:
    """Stages 2 and 3 have a learning-rate scheduler, whose place is to be found again too."""
    return {"deepspeed": config(stage, scheduler=WARM_UP)} if stage > 1 else {}


def sampled(epoch: int, rank: int, ranks: int, rows: int = 24) -> list[int]:
    """The rows that torch's sampler gives a rank in an epoch."""
    from torch.utils.data import DistributedSampler

    sampler = DistributedSampler(range(rows), ranks, rank)
    sampler.set_epoch(epoch)
    return list(sampler)


def rounded(told: list[list]) -> list[list]:
    """What `after_step` was told, for reading."""
    return [[round(loss, 5), *rest] for loss, *rest in told]


CLIENT = {"note": [1, "two"], "rank": "any", "place": (1, 2), 3: {"four": 0.5}}
"""What the program of task 3.5 saves."""


def checkpoints(name: str):
    return visible_folder() / "engine" / name


@pytest.mark.milestone(task="3.1", points=10, section="What initialize makes")
def test_engine_is_what_the_configuration_says(lab, run_experiments):
    with_optimizer, without = config(2), {key: value for key, value in config(2).items() if key != "optimizer"}
    without_micro_batch = config(1, ranks=1, scheduler=WARM_UP)
    del without_micro_batch["train_micro_batch_size_per_gpu"]
    for words, configuration, optimizer, name in (
        ("neither an optimizer nor one in the configuration", without, None, "optimizer"),
        ("two optimizers", with_optimizer, "another", "optimizer"),
        ("train_batch_size 'auto'", with_optimizer | {"train_batch_size": "auto"}, None, "train_batch_size"),
        ("'auto' accumulation", with_optimizer | {"gradient_accumulation_steps": "auto"}, None, "gradient_accumulation_steps"),
        (
            "'auto' micro-batch",
            with_optimizer | {"train_micro_batch_size_per_gpu": "auto"},
            None,
            "train_micro_batch_size_per_gpu",
        ),
        ("'auto' with an optimizer of one's own", without | {"train_batch_size": "auto"}, "another", "train_batch_size"),
        ("no optimizer, and null for one in the configuration", without | {"optimizer": None}, None, "optimizer"),
    ):
        require_error(
            lambda: lab.initialize_deepspeed(None, configuration, optimizer),
            ValueError,
            mentions=(name,),
            silent=tuple({"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"} - {name}),
            expected=f"ValueError for {words}, before the engine is made",
        )
    scheduled = without | {"scheduler": WARM_UP}
    only_the_global = {key: value for key, value in scheduled.items() if "micro_batch" not in key and "accumulation" not in key}
    runs = run_experiments(
        [
            # Accumulation is not the micro-batch, 26 rows are no whole optimizer steps, and DeepSpeed works out the global batch.
            experiment(
                "initialize",
                f"{PROGRAMS}:initialize",
                3,
                deepspeed=of_sizes(config(3, accumulation=4)),
                accumulation=4,
                train_examples=26,
            ),
            # Some write null for an optimizer that the program makes.
            experiment(
                "own",
                f"{PROGRAMS}:initialize",
                2,
                deepspeed=without | {"optimizer": None},
                options={"own_optimizer": True, "no_data": True},
            ),
            experiment(
                "scheduled",
                f"{PROGRAMS}:initialize",
                2,
                deepspeed=only_the_global,
                options={"own_optimizer": True},
            ),
            # Parameter groups of its own, some parameters frozen, and an entry of the configuration that only loading needs.
            experiment(
                "grouped",
                f"{PROGRAMS}:initialize",
                1,
                deepspeed={key: value for key, value in config(1, universal=True).items() if key != "optimizer"},
                options={"own_optimizer": True, "no_data": True, "frozen": "transformer.ln_f"},
            ),
            # DeepSpeed works out the micro-batch.
            experiment("alone", f"{PROGRAMS}:initialize", 1, ranks=1, deepspeed=without_micro_batch),
        ]
    )
    own, got = runs["own"].results, runs["initialize"].results
    for result in (got, own, runs["scheduled"].results):
        require(
            result["returned"] == "engine, optimizer, data loader, scheduler",
            expected="a tuple of four: engine, optimizer, data loader, scheduler",
            got=result["returned"],
        )
    for result in (got, own, runs["scheduled"].results):
        require(not result["config_changed"], expected="a configuration that is left as it was, within too", got="it was changed")
        require(
            result["optimizer_is_the_engines"] and result["scheduler_is_the_engines"],
            expected="optimizer and scheduler as `deepspeed.initialize` returns them, those of the engine",
            got=f"the engine's optimizer: {result['optimizer_is_the_engines']}; its scheduler: {result['scheduler_is_the_engines']}",
        )
    require(
        (own["stage"], own["learning_rate"], own["seen"]) == (2, 0.125, [None, None]),
        expected="stage 2, the given optimizer with its learning rate 0.125, and no data loader where there is no data",
        got=f"stage {own['stage']}, learning rate {own['learning_rate']}, data loader: {own['seen'] != [None, None]}",
    )
    settings = [{"betas": [0.7, 0.95], "eps": 1e-8, "weight_decay": 0.3, "lr": 0.125}]
    require_equal(
        own["settings"], settings, of="the settings of the engine's optimizer, where AdamW with betas and weight decay is given"
    )
    require(
        own["stepped"] == own["parameters"],
        expected=f"an optimizer over all {own['parameters']:,} parameters, the tied embedding once",
        got=f"{own['stepped']:,}",
    )
    grouped = runs["grouped"].results
    of_groups = [settings[0] | {"lr": 0.25, "weight_decay": 0.0}, settings[0]]
    require_equal(
        grouped.get("settings"),
        of_groups,
        of="the settings of the engine's optimizer, by group, where an AdamW of two groups is given",
    )
    require_equal(
        grouped["frozen"],
        ["transformer.ln_f.bias", "transformer.ln_f.weight"],
        of="the parameters that are not trained, of a model whose last layer norm is frozen",
    )
    require(
        grouped["stepped"] == grouped["parameters"],
        expected=f"an optimizer over the {grouped['parameters']:,} parameters that are trained",
        got=f"{grouped['stepped']:,}",
    )
    require(
        grouped["universal"] and not own["universal"],
        expected="the configuration as it is given, with load_universal, which says how a checkpoint is to be loaded",
        got=f"load_universal {grouped['universal']}, and {own['universal']} without it",
    )
    for name, words in (("scheduled", "an optimizer of one's own"), ("alone", "the configuration's optimizer")):
        require(
            runs[name].results.get("scheduler") == "WarmupLR",
            expected=f"the configuration's scheduler, WarmupLR, with {words}",
            got=runs[name].results.get("scheduler"),
        )
    require(
        (got["stage"], got["clipping"], got["learning_rate"]) == (3, 0.5, 1e-2),
        expected="stage 3, clipping 0.5, learning rate 0.01, as the configuration says",
        got=(got["stage"], got["clipping"], got["learning_rate"]),
    )
    settings = [[group["eps"], group["weight_decay"], group["lr"]] for group in got["settings"]]
    require(
        got["stepped"] == got["parameters"] and all(group == [0.1, 0.01, 1e-2] for group in settings),
        expected=f"the configuration's optimizer over all {got['parameters']:,} parameters, with eps 0.1, weight decay 0.01 and learning "
        "rate 0.01 for each of them",
        got=f"{got['stepped']:,}; eps, weight decay and learning rate by group: {settings}",
    )
    for result in (got, runs["scheduled"].results):
        require(result["workers"] == 0, expected="a loader without processes of its own", got=f"{result['workers']} a rank")
    seen = got["seen"]
    rows = [sorted(number for batch in share or [] for number in batch) for share in seen]
    require(
        all(share is not None for share in seen) and sorted(rows[0] + rows[1]) == list(range(26)),
        expected="a data loader that gives each of 2 ranks its own 13 of the 26 rows",
        got=f"rank 0 sees {rows[0]}, rank 1 sees {rows[1]}",
    )
    for number, share in enumerate(zip(seen, got["seen_next"])):
        first, second = ([row for batch in each for row in batch] for each in share)
        require(
            first == sampled(0, number, 2, 26) and second == sampled(1, number, 2, 26),
            expected=f"rows shuffled anew for each epoch; rank {number}: {sampled(0, number, 2, 26)}, and then {sampled(1, number, 2, 26)}",
            got=f"{first}, and then {second}",
        )
    alone = [number for batch in runs["alone"].results.get("seen", [None])[0] or [] for number in batch]
    require(
        alone == sampled(0, 0, 1),
        expected=f"all 24 rows where one rank trains alone, as the sampler has them: {sampled(0, 0, 1)}",
        got=alone,
    )
    require(
        not got["pinned"] or gpu_count(),
        expected="memory pinned only where there is a GPU",
        got=f"pin_memory {got['pinned']}",
    )
    require(
        [len(batch) for batch in seen[0]] == [2] * 6 + [1],
        expected="batches of 2, the configuration's micro-batch, and one of the row that is left",
        got=[len(batch) for batch in seen[0]],
    )
    sizes = {len(batch) for batch in runs["alone"].results["seen"][0]}
    require(
        sizes == {2},
        expected="batches of 2, the micro-batch that DeepSpeed works out of a global batch of 4 and an accumulation of 2",
        got=sizes,
    )
    wanted = [[scheduled["train_batch_size"] // 2] * 3] * 2
    require_equal(
        [[len(batch) for batch in share] for share in runs["scheduled"].results["seen"]],
        wanted,
        of=f"the batches of each of 2 ranks, where the configuration gives train_batch_size {scheduled['train_batch_size']} alone",
    )
    require(
        got["as_they_are"] and got["devices"] == ["cpu"],
        expected="batches of the rows as they are, -100 among the labels and a column of fractions too, on the CPU",
        got=f"others, or on {got['devices']}",
    )


@pytest.mark.milestone(task="3.2", points=15, section="A step")
def test_losses_are_those_of_plain_pytorch(lab, run_experiments):
    from shardlab.run.launch import RankError

    padded_rows = program_of(f"{PROGRAMS}:padded_rows")
    constant = {"type": "WarmupLR", "params": WARM_UP["params"] | {"warmup_min_lr": 1e-2}}
    cases = {
        "zero0": {"stage": 0, "accumulation": 4, "clipping": 0.5},
        "zero1": {"stage": 1, "accumulation": 4, "clipping": 0.5},
        "zero2": {"stage": 2, "accumulation": 1, "clipping": 0.0},
        "zero3": {"stage": 3, "accumulation": 4, "clipping": 0.5},
        "alone": {"stage": 1, "accumulation": 4, "clipping": 0.5, "ranks": 1, "scheduler": constant},
        "unclipped": {"stage": 0, "accumulation": 4, "clipping": 0.0},
    }
    experiments = {
        name: experiment(
            name,
            f"{PROGRAMS}:train_steps",
            case["stage"],
            ranks=case.get("ranks", 2),
            accumulation=case["accumulation"],
            deepspeed=config(**case),
            steps=3,
        )
        for name, case in cases.items()
    }
    lab.DeepSpeedTrainer  # noqa: B018
    try:
        runs = run_experiments(list(experiments.values()))
    except RankError as error:
        require(
            ", in step\n" not in error.rank_traceback,
            expected="gradients to be there when engine.step() takes the optimizer step",
            got=f"rank {error.rank}, {error.experiment}: {error.error}",
        )
        raise
    plain: dict[tuple, list[float]] = {}
    for name, case in cases.items():
        accumulation, ranks, got = case["accumulation"], case.get("ranks", 2), runs[name].results
        if (accumulation, ranks, case["clipping"]) not in plain:
            plain[accumulation, ranks, case["clipping"]] = engine_runs.plain_losses(
                experiments[name], padded_rows(experiments[name])
            )
        wanted = plain[accumulation, ranks, case["clipping"]]
        require(
            got["kind"] == "float",
            expected="a float",
            got=got["kind"],
        )
        require(
            got["training"],
            expected="the model in training mode in each forward pass, though an evaluation came before",
            got="evaluation mode",
        )
        require(
            got["by_rank"][0] == got["by_rank"][-1],
            expected="the same loss on both ranks: the mean over them",
            got=f"first micro-batch: {got['by_rank'][0][0]:.4f} on rank 0, {got['by_rank'][-1][0]:.4f} on rank 1",
        )
        require(
            got["micro_steps"] == 3 * accumulation and got["global_steps"] == 3,
            expected=f"{3 * accumulation} micro-batches and 3 optimizer steps, accumulation {accumulation}",
            got=f"{got['micro_steps']} and {got['global_steps']}",
        )
        require(
            got["samples"] == 0 and not got["told"],
            expected="samples and after_step left to train_epoch",
            got=f"samples {got['samples']}, after_step called {got['told']} ×",
        )
        require(
            got.get("scheduler_steps", 3) == 3,
            expected="a learning-rate scheduler that has taken 3 steps, as engine.step() lets it",
            got=got.get("scheduler_steps"),
        )
        require(not got["seeded"], expected="random numbers that go on", got="torch seeded anew in each step")
        require(
            got["moved"],
            expected="every tensor of the batch moved to the engine's device before the model gets it (on_device): a GPU cannot compute "
            "with what lies on the CPU",
            got="tensors as the batch brought them",
        )
        require(got["batch_kept"], expected="a batch that is left as it was", got="one without some of its tensors, or with others")
        require(
            got["lengths"][0] == got["lengths"][1],
            expected=f"all {got['lengths'][0]:,} tokens of a long micro-batch given to the model",
            got=f"{got['lengths'][1]:,}",
        )
        require(got["of_nan"] == "nan", expected="nan where the model's loss is nan: that is to be seen", got=got["of_nan"])
        require(
            (got["of_no_label"], got["counted_of_nan"]) == ("nan", 2),
            expected="nan for a micro-batch without labels as well, and both of them counted by the engine as any other",
            got=f"{got['of_no_label']}; {got['counted_of_nan']} of the two counted",
        )
        apart = max(abs(loss / wanted[0] - 1) for loss in got["by_rank"][0][:accumulation])
        require(
            apart < 0.5,
            expected=f"each micro-batch's own loss, at first about {wanted[0]:.1f}",
            got=[round(loss, 3) for loss in got["by_rank"][0][:accumulation]],
        )
        first = abs(got["losses"][0] - wanted[0])
        require(
            first <= 1e-5,
            expected=f"the model's loss before the first step, {wanted[0]:.5f} (stage {case['stage']}, accumulation {accumulation}, ranks {ranks})",
            got=f"{got['losses'][0]:.5f}",
        )
        worst = farthest(got["losses"], wanted)
        require(
            worst <= 1e-5,
            expected=f"stage {case['stage']}, accumulation {accumulation}, ranks {ranks}: plain PyTorch's losses to 1e-5, "
            f"{[round(x, 5) for x in wanted]}",
            got=[round(x, 5) for x in got["losses"]],
        )


@pytest.mark.milestone(task="3.3", points=15, section="An epoch")
def test_epoch_keeps_its_place(lab, run_experiments):
    lab.DeepSpeedTrainer  # noqa: B018
    program = f"{PROGRAMS}:train_epochs"
    plans = [
        experiment("epochs", program, 1, steps=18),
        experiment("alone", program, 1, ranks=1, micro_batch=3, accumulation=2, steps=24),
    ]
    plans += [experiment("rest", program, 1, steps=12, train_examples=18)]
    runs = run_experiments(plans)
    got = runs["epochs"].results

    def order(epoch: int, rank: int) -> list[int]:
        return sampled(epoch, rank, 2)

    def rows(call: dict, rank: int = 0) -> list[int]:
        return [number for batch in call["seen"][rank] for number in batch]

    first, second, cut, resumed = (got[name] for name in ("first", "second", "cut", "resumed"))
    for rank in (0, 1):
        require(
            rows(first, rank) == order(0, rank),
            expected=f"rank {rank} to see its 12 rows once, in the sampler's order for epoch 0",
            got=rows(first, rank),
        )
    require(
        (first["epoch"], first["samples"], second["epoch"], second["samples"]) == (1, 0, 2, 0),
        expected="epoch 1 and 2 after the first and second epoch, and samples 0",
        got=f"epoch {first['epoch']}, samples {first['samples']}; epoch {second['epoch']}, samples {second['samples']}",
    )
    require(
        rows(second) == order(1, 0),
        expected=f"another order in the second epoch: {order(1, 0)}",
        got=rows(second),
    )
    wanted = [[(a + b) / 2, 8 * (k + 1), k + 1] for k, (a, b) in enumerate(zip(first["losses"][::2], first["losses"][1::2]))]
    same = len(first["told"]) == 3 and all(
        abs(a[0] - b[0]) < 1e-6 and a[1:] == b[1:] for a, b in zip(first["told"], wanted, strict=False)
    )
    require(
        same,
        expected=f"after_step called after each of 3 optimizer steps with the mean loss of its 2 micro-batches, samples at 8, 16, 24: {rounded(wanted)}",
        got=f"(loss, samples, optimizer steps): {rounded(first['told'])}",
    )
    require(
        rows(resumed) == order(1, 0)[8:],
        expected=f"with epoch 1 and samples 16 of 24, which are 4 batches of 2 on each of 2 ranks: the 4 rows of rank 0 that are left, {order(1, 0)[8:]}",
        got=rows(resumed) or "none: all batches were passed over",
    )
    for words in ("first", "second", "cut", "at_the_end", "resumed"):
        losses = got[words]["losses"]
        mean = sum(losses) / len(losses)
        require(
            got[words]["returned"] is not None and abs(got[words]["returned"] - mean) < 1e-6,
            expected=f"the mean loss of the {len(losses)} micro-batches that were trained on, {mean:.5f} ({words.replace('_', ' ')})",
            got="nan" if got[words]["nan"] else got[words]["returned"],
        )
    require(
        len(cut["told"]) == 1 and cut["told"][0][1:] == [8, 7],
        expected="after_step called for the last step too, with samples at 8",
        got=f"(loss, samples, optimizer steps): {cut['told']}",
    )
    require(
        (cut["global_steps"], cut["epoch"], cut["samples"], len(cut["seen"][0])) == (7, 2, 8, 2),
        expected="with last_step 7: back after optimizer step 7, epoch 2, samples 8, 2 micro-batches",
        got=f"step {cut['global_steps']}, epoch {cut['epoch']}, samples {cut['samples']}, {len(cut['seen'][0])} micro-batches",
    )
    ended = got["at_the_end"]
    require(
        (ended["global_steps"], ended["epoch"], ended["samples"]) == (9, 2, 24),
        expected="with last_step 9, which is the epoch's last batch: back in epoch 2 with samples 24; the epoch ends in the next call",
        got=f"step {ended['global_steps']}, epoch {ended['epoch']}, samples {ended['samples']}",
    )
    behind = got["behind_the_end"]
    require(
        (behind["epoch"], behind["samples"], behind["seen"][0]) == (3, 0, []) and behind["nan"],
        expected="the next call, where last_step has been taken and no batch is left: nan, epoch 3 and samples 0",
        got=f"epoch {behind['epoch']}, samples {behind['samples']}, {len(behind['seen'][0])} micro-batches",
    )
    require(
        cut["read"] == sum(map(len, cut["seen"][0])),
        expected=f"no row read after last_step: {sum(map(len, cut['seen'][0]))} of 12, since reading a row may draw random numbers",
        got=f"{cut['read']} rows read",
    )
    for words, epoch in (("first", 0), ("second", 1)):
        require(
            set(got[words]["epochs_told"]) == {epoch},
            expected=f"epoch still {epoch} when after_step is called in the {words} epoch, at its last batch too: a checkpoint may be saved",
            got=got[words]["epochs_told"],
        )
    alone = [samples for _, samples, _ in runs["alone"].results["first"]["told"]]
    require(
        alone == [6, 12, 18, 24],
        expected="on one rank, samples at 6, 12, 18, 24 after the optimizer steps of 2 micro-batches of 3",
        got=alone,
    )
    left = [number for batch in runs["alone"].results["resumed"]["seen"][0] for number in batch]
    require(
        left == sampled(1, 0, 1)[12:],
        expected=f"on one rank with micro-batch 3, epoch 1 and samples 12 of 24: the 12 rows that are left, {sampled(1, 0, 1)[12:]}",
        got=left,
    )
    within, passed = got["resumed_within_a_step"], got["passed"]
    require(
        rows(within) == order(1, 0)[2:],
        expected=f"with epoch 1 and samples 4 of 24, where an accumulation began in the epoch before: {order(1, 0)[2:]}",
        got=rows(within),
    )
    require(
        rows(cut) == order(2, 0)[:4] and rows(passed) == order(13, 0)[:4],
        expected=f"orders of their own in epochs 2 and 13, beginning {order(2, 0)[:4]} and {order(13, 0)[:4]}; and with last_step 0, "
        "which has been taken already, the next step as the last",
        got=f"{rows(cut)}, and {rows(passed)}",
    )
    require(
        first["told_by_rank"][0] == first["told_by_rank"][1],
        expected="after_step called on every rank: a checkpoint is saved by all of them",
        got=f"{len(first['told_by_rank'][0])} × on rank 0, {len(first['told_by_rank'][1])} × on rank 1",
    )
    require(
        got["diverged"]["nan"] or got["diverged"]["returned"] is None,
        expected="nan as the mean where the loss of a micro-batch is nan: training has diverged",
        got=got["diverged"]["returned"],
    )
    losses = [5.0, 1.0, 3.0, 8.0, 2.0, 11.0]
    called = lab.observe(f"{PROGRAMS}:epoch_without_an_engine", losses, 3, 37)
    require_equal(
        called,
        {"returned": 5.0, "told": [3.0, 7.0], "epochs": [37]},
        of=f"train_epoch() in epoch 37 with accumulation 3, where train_step gives {losses}: what it returns, what after_step is told, and "
        "what the sampler is told",
    )
    told = got["diverged"]["told"][0][0]
    require(told != told, expected="nan for after_step too, where one of the step's micro-batches is nan", got=told)
    require(
        got["infinite"]["returned"] == float("inf"),
        expected="inf as the mean where the loss of a micro-batch is inf",
        got=got["infinite"]["returned"],
    )
    require(
        resumed["random_at_first"] == [[got["random_wanted"]]] * 2,
        expected="the restored random state at the first step after a checkpoint",
        got="another one: it was restored, and numbers were drawn before the step"
        if resumed["restored"]
        else "the state of a process that has restored nothing: restore_random_state was not called",
    )
    require(
        got["begun"]["random_at_first"] == [[got["random_wanted"]]] * 2,
        expected="the restored random state at the first step, where the checkpoint is of an epoch's beginning (samples 0)",
        got="another one",
    )
    require(
        got["of_another_batch"]["random_at_first"] == [[got["random_wanted"]]] * 2,
        expected="the restored random state at the first step too where samples is no multiple of micro-batch × ranks: the run that saved it "
        "had smaller micro-batches",
        got="another one",
    )
    # 5 micro-batches with accumulation 2: the last one, of one row, waits for the next epoch's first.
    for words in ("first", "second"):
        call, steps = runs["rest"].results[words], {"first": [(0, 2), (2, 4)], "second": [(0, 1), (1, 3), (3, 5)]}[words]
        losses, begun = call["losses"], {"first": 0, "second": 2}[words]
        told = [
            [sum(losses[a:b]) / (b - a), 4 * b, begun + number] for number, (a, b) in enumerate(steps, start=1) if b <= len(losses)
        ]
        same = (
            len(losses) == 5
            and len(call["told"]) == len(told)
            and all(abs(a[0] - b[0]) < 1e-6 and a[1:] == b[1:] for a, b in zip(call["told"], told))
        )
        require(
            same,
            expected=f"18 rows, the {words} epoch: 5 micro-batches, the last of one row, and after_step after each optimizer step, with the mean loss of its "
            f"micro-batches of this epoch: {told}",
            got=f"{len(losses)} micro-batches; (loss, samples, optimizer steps): {call['told']}",
        )
        mean = sum(losses) / len(losses)
        require(
            call["returned"] is not None and abs(call["returned"] - mean) < 1e-6,
            expected=f"the mean loss of the 5 micro-batches, {mean:.5f}, where they are not whole optimizer steps",
            got=call["returned"],
        )
    left = got["nothing_left"]
    require(
        left["nan"] and not left["seen"][0] and (left["epoch"], left["samples"]) == (1, 0),
        expected="nan, and the next epoch, where all rows of an epoch had been seen",
        got=f"{left['returned']}, epoch {left['epoch']}, samples {left['samples']}",
    )
    require(
        left["random_at_end"] == got["random_wanted"],
        expected="the restored random state on return, where a checkpoint was saved at the end of an epoch and no batch is left",
        got="another one; the next epoch would draw other numbers than in a run that was never stopped",
    )


@pytest.mark.milestone(task="3.4", points=10, section="Evaluation")
def test_evaluation_counts_tokens_and_changes_nothing(lab, run_experiments):
    masked_rows = program_of(f"{PROGRAMS}:masked_rows")

    lab.DeepSpeedTrainer  # noqa: B018
    # A threshold of 0: every forward pass gathers parameters, and a rank that leaves one out keeps the others waiting.
    gathering = config({"stage": 3, "stage3_param_persistence_threshold": 0})
    plan = experiment("evaluate", f"{PROGRAMS}:evaluate", 3, options={"dropout": 0.3}, deepspeed=gathering)
    with ranks_come_back():
        plans = [plan] + [experiment(f"evaluate-between-{stage}", f"{PROGRAMS}:evaluate_between", stage) for stage in (0, 1)]
        runs = run_experiments(plans, timeout=45)
        got = runs["evaluate"].results
    by_token, by_row = engine_runs.mean_losses(masked_rows(plan))
    mine, other = [losses[0] for losses in got["losses"]]
    require(
        mine == mine and other == other,
        expected="a number, though some batches have no label: the nan that is their loss counts for nothing",
        got=f"{mine} on rank 0, {other} on rank 1",
    )
    require(
        abs(mine - other) < 1e-6,
        expected="the same loss on both ranks",
        got=f"{mine:.5f} on rank 0, {other:.5f} on rank 1",
    )
    require(
        got["losses"][0][0] == got["losses"][0][1],
        expected="the same loss twice",
        got=got["losses"][0],
    )
    require(
        abs(mine - by_token) < 1e-4,
        expected=f"the mean over tokens, {by_token:.5f} (the mean over rows would be {by_row:.5f})",
        got=f"{mine:.5f}",
    )
    require(
        got["kind"] == "float",
        expected="a float",
        got=got["kind"],
    )
    alone = engine_runs.mean_losses(masked_rows(plan)[0::2])[0]
    require(
        all(abs(loss - alone) < 1e-4 for loss in got["of_rank_0"]),
        expected=f"rank 0's loss on both ranks, {alone:.5f}, where rank 1 has no label at all",
        got=got["of_rank_0"],
    )
    wanted = program_of(f"{PROGRAMS}:mean_of_many")(2)
    require(
        all(abs(loss - wanted) < 1e-4 * wanted for loss in got["of_many"]),
        expected=f"{wanted:.4f}, the mean over the tokens of 150 batches on each rank, of rows of 1,100 tokens",
        got=got["of_many"],
    )
    require(
        abs(got["uneven"][0] - got["uneven"][1]) < 1e-4 * abs(got["uneven"][1]),
        expected=f"{got['uneven'][1]:.4f}, the mean over the tokens of batches of other lengths, the last of one row",
        got=got["uneven"][0],
    )
    require_equal(got["of_no_batch"], "nan", of="evaluate([]): the mean of nothing")
    counts, losses = [1 + number % 7 for number in range(700)], [0.5 + number / 64 for number in range(700)]
    alone = lab.observe(f"{PROGRAMS}:evaluation_without_an_engine", counts, losses)
    wanted = sum(loss * count for loss, count in zip(losses, counts)) / sum(counts)
    require(
        abs(alone - wanted) < 1e-6 * wanted,
        expected=f"{wanted:.5f}, the mean over the {sum(counts):,} tokens of 700 batches, with a model in bf16: sums in bf16 have three digits",
        got=alone,
    )
    require(
        got["outputs_alive"] <= 2,
        expected="a batch's logits let go of before the ones after the next come: of a large vocabulary they take GiB",
        got=f"those of {got['outputs_alive']} batches in memory at once",
    )
    for stage in (0, 1):
        apart = runs[f"evaluate-between-{stage}"].results["apart"]
        require(
            apart <= 1e-6,
            expected=f"the gradients that an accumulation has gathered left alone: the same weights after its step (stage {stage})",
            got=f"weights that differ by {apart:.3g}",
        )
    require(got["random_kept"], expected="torch's random numbers where they were: an evaluation draws none", got="another state")
    require(
        got["of_nan"] == "nan",
        expected="nan where the model's loss of labels is nan: training has diverged, and that is to be seen",
        got=got["of_nan"],
    )
    require(
        got["of_nothing"] == "nan",
        expected="nan where no rank has a label: the mean of nothing",
        got=got["of_nothing"],
    )
    require(
        got["moved"],
        expected="every tensor of a batch moved to the engine's device before the model gets it (on_device)",
        got="tensors as the batch brought them",
    )
    require(got["batches_kept"], expected="batches that are left as they were", got="others: they were changed in place")
    require(
        not got["gradients"],
        expected="the model called without gradients (torch.no_grad)",
        got="gradients kept, and the memory of all activations with them",
    )
    require(
        got["training"] and got["micro_steps"] == 0,
        expected="training mode afterwards, and no step taken",
        got=f"training mode: {got['training']}, micro-batches: {got['micro_steps']}",
    )


@pytest.mark.milestone(task="3.5", points=15, section="A checkpoint")
def test_checkpoint_is_complete(lab, run_experiments):
    fingerprints = program_of(f"{PROGRAMS}:fingerprints")
    lab.DeepSpeedTrainer  # noqa: B018
    with ranks_come_back():
        frozen = {2: {"frozen": "transformer.ln_f"}, 3: {}}
        plans = [
            experiment(f"save{stage}", f"{PROGRAMS}:save", stage, accumulation=stage, options=frozen[stage]) for stage in (2, 3)
        ]
        plans.append(experiment("save-alone", f"{PROGRAMS}:save", 2, ranks=1, accumulation=1))
        plans.append(experiment("save-whole", f"{PROGRAMS}:save", 0, accumulation=1))
        from_universal = config(1, accumulation=1, universal=True)
        plans.append(experiment("save-on", f"{PROGRAMS}:save", 1, accumulation=1, deepspeed=from_universal))
        runs = run_experiments(plans, timeout=45)
    for stage, run in ((2, runs["save2"]), (3, runs["save3"])):
        got, parent = run.results, run.folder / "checkpoints"
        folder = parent / "step-11"
        require(
            folder.is_dir() and got["returned"] == str(folder),
            expected=f"the folder step-11 after one optimizer step of a run that went on from step 10, and its path returned (stage {stage})",
            got=f"returned {got['returned']!r}; in the folder: {sorted(path.name for path in parent.glob('*'))}",
        )
        require(
            got["is_path"] and all(got["first"]),
            expected="a Path returned on every rank, and a whole checkpoint in a folder that did not exist, given as text, with None as client_state",
            got=f"a Path: {got['is_path']}; complete.json on return: {got['first']}",
        )
        require_equal(got["returned_by_rank"], [str(folder)] * 2, of="what save_checkpoint() returns, by rank")
        require(
            all(said for by_rank in got["refused"] for said in by_rank),
            expected=f"ValueError after each micro-batch of an optimizer step but the last, of {stage}",
            got="a checkpoint whose gradients are lost",
        )
        require(
            all(got["kept"]),
            expected="the checkpoint before it left whole by a save that is refused",
            got="one without its complete.json",
        )
        require(all(got["older_kept"]), expected="older checkpoints, step-2 to step-8, left where they are", got="one is gone")
        few = parent.parent / "fresh" / "step-4"
        require(
            got["first_returned"] == str(few) and few.is_dir(),
            expected="the folder step-4 after 4 optimizer steps",
            got=f"returned {got['first_returned']!r}; there are {sorted(path.name for path in few.parent.glob('*'))}",
        )
        client = {path.name: safely_loaded(path)["client"] for path in few.glob("*model_states.pt")}
        require(
            client and set(map(repr, client.values())) == {"None"},
            expected="the caller's client_state as it is, None too",
            got=client,
        )
        require(
            not got["frozen_left_out"],
            expected="all parameters in the checkpoint, those that are not trained too",
            got="exclude_frozen_parameters=True",
        )
        require(
            all(got["newer_kept"]),
            expected="another checkpoint, step-99, left whole, where a run went on from an older one",
            got="without its complete.json",
        )
        names = sorted(path.name for path in folder.rglob("*") if path.is_file())
        missing = [rank for rank in (0, 1) if not any(f"zero_pp_rank_{rank}_" in name and "optim" in name for name in names)]
        require(
            not missing,
            expected=f"optimizer shards of both ranks (stage {stage})",
            got=f"none of rank {missing}: {names}",
        )
        require(
            (folder / "complete.json").exists(),
            expected="complete.json in the folder",
            got=names,
        )
        manifest = json.loads((folder / "complete.json").read_text())
        sizes = {
            str(path.relative_to(folder)): path.stat().st_size
            for path in folder.rglob("*")
            if path.is_file() and path.name != "complete.json"
        }
        require(
            manifest["ranks"] == 2 and not manifest["universal"] and manifest["files"] == sizes,
            expected=f"complete.json with 2 ranks, not universal, and the {len(sizes)} files in their final sizes",
            got=f"{manifest['ranks']} ranks, universal {manifest['universal']}, {len(manifest['files'])} files",
        )
        require(
            got["complete_at_first"] == [[False], [False]],
            expected="no complete.json while DeepSpeed saves, though the folder had one from an earlier life of the run",
            got="the old one: were the job killed now, half a checkpoint would be taken for whole",
        )
        require(
            all(got["complete_on_return"]),
            expected="complete.json there when save_checkpoint returns, on every rank",
            got=got["complete_on_return"],
        )
        stage3 = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in (0, 1)]
        for name in stage3 if stage == 3 else ["mp_rank_00_model_states.pt"]:
            state = safely_loaded(folder / name)
            require(
                (state.get("epoch"), state.get("samples")) == (3, 8),
                expected="epoch 3 and samples 8 in DeepSpeed's client_state",
                got=(state.get("epoch"), state.get("samples")),
            )
            require(
                state.get("client") == CLIENT,
                expected="the caller's client_state under 'client'",
                got=state.get("client"),
            )
            require(
                stage == 3 or "transformer.ln_f.weight" in state["module"],
                expected="all parameters in the checkpoint, those too that are not trained",
                got="the frozen ones left out",
            )
            random = state.get("random")
            require(
                isinstance(random, list) and [fingerprints(state) for state in random] == got["random"],
                expected="what random_state() gives on both ranks, by rank, under 'random'",
                got="none"
                if random is None
                else f"{len(random) if isinstance(random, list) else 'not a list'}; not those of ranks 0 and 1",
            )
    whole = runs["save-whole"].folder / "checkpoints" / "step-11"
    manifest = json.loads((whole / "complete.json").read_text()) if (whole / "complete.json").exists() else {}
    require(
        "mp_rank_00_model_states.pt" in manifest.get("files", {}),
        expected="a whole checkpoint at stage 0, where every rank has everything, and all of them save",
        got=manifest or "no complete.json",
    )
    went_on = json.loads((runs["save-on"].folder / "checkpoints" / "step-11" / "complete.json").read_text())
    require(
        went_on["universal"] is False,
        expected="universal False in complete.json of a run that went on from a universal checkpoint: what it saves are shards again",
        got=went_on["universal"],
    )
    alone = runs["save-alone"].folder / "checkpoints" / "step-11" / "complete.json"
    require(
        alone.exists() and json.loads(alone.read_text())["ranks"] == 1,
        expected="complete.json with 1 rank, where one rank trains alone",
        got=f"{json.loads(alone.read_text())['ranks']} ranks" if alone.exists() else "no complete.json",
    )
    require(
        runs["save-alone"].results["complete_at_first"] == [[False]],
        expected="no complete.json of an earlier life while DeepSpeed saves, where one rank trains alone",
        got="the old one",
    )


@pytest.mark.milestone(task="3.6", points=10, section="A checkpoint")
def test_resumed_training_goes_on_as_if_never_stopped(lab, run_experiments):
    """Stages 1, 2 and 3, in new processes; and from the checkpoints of a run that lost a rank to SIGKILL."""

    from shardlab.run.launch import RankError

    lab.DeepSpeedTrainer  # noqa: B018
    runs = never_stopped(run_experiments)
    killed = checkpoints("killed")
    with once("killed") as first:
        if first:
            shutil.rmtree(killed, ignore_errors=True)
            plan = {"dropout": DROPOUT[2], "save_at": [2, 4], "checkpoints": str(killed), "kill_at": 6}
            program = "shardlab.milestones.engine_runs:train"
            with pytest.raises(RankError) as caught:
                run_experiments([experiment("killed", program, 2, options=plan, **scheduled(2))], reference=True)
            assert caught.value.rank == 1, "the run must say which rank was killed"
            # A save that did not come to its end, newer than the whole ones.
            shutil.copytree(killed / "step-2", killed / "step-11")
            (killed / "step-11" / "complete.json").unlink()
            (killed / "latest").write_text("step-11")  # DeepSpeed writes it before the last rank is done
            shutil.copytree(
                killed / "step-2", killed / "step-12"
            )  # and one that check_checkpoint refuses, though it has complete.json
            (killed / "step-12" / "damaged").touch()
            shutil.move(killed / "step-4", killed / "step-10")  # the newest whole one, and not the last by its name
            os.utime(killed / "step-2" / "complete.json")  # nor by the clock: copied from another disk
            os.utime(killed / "step-2")
    plans, wanted = [], {}
    for stage, source, tag, at in ((1, "stage1", "step-2", 2), (2, "killed", None, 4), (3, "stage3", "step-4", 4)):
        options = {
            "dropout": DROPOUT[stage],
            "checkpoints": str(checkpoints(source)),
            "tag": tag,
            "broken": "step-11" if tag is None else "step-9",
        }
        plans.append(experiment(f"resumed-{source}", f"{PROGRAMS}:load", stage, options=options, **scheduled(stage)))
        wanted[f"resumed-{source}"] = (at, runs[f"stage{stage}"].losses()[at:], source)
    for name, run in run_experiments(plans).items():
        at, losses, source = wanted[name]
        got = run.results
        require(
            got["refused"] and got["untouched"],
            expected="the error of check_checkpoint for a broken checkpoint, before the engine loads anything",
            got=got["refused"] or "no error",
        )
        require(
            not got["nothing"],
            expected="ValueError where the folder has no checkpoint to continue from",
            got=got["nothing"],
        )
        require(
            got["position"]["global_steps"] == at,
            expected=f"the engine at optimizer step {at}",
            got=got["position"],
        )
        position = {2: {"epoch": 0, "samples": 16}, 4: {"epoch": 1, "samples": 8}}[at] | {"global_steps": at}
        require(
            got["position"] == position,
            expected=f"{position}",
            got=got["position"],
        )
        require(
            got["strict"],
            expected="DeepSpeed to refuse a checkpoint with other parameters than the model's",
            got="load_module_strict switched off",
        )
        client = repr({"name": source})
        require(
            got["client"] == client,
            expected=f"the caller's client_state back: {client}",
            got=got["client"][:200],
        )
        require(
            [set(ranks) for ranks in got["asked"]] == [{2}, {2}],
            expected="check_checkpoint asked for 2 ranks, those of this run",
            got=got["asked"],
        )
        require(
            got["restored"],
            expected="this rank's random_state_to_restore, as the checkpoint has it: python's, numpy's and torch's",
            got="None, or another one",
        )
        worst = farthest(run.losses(), losses)
        require(
            worst <= 1e-5,
            expected=f"the losses of the run that never stopped, {[round(x, 5) for x in losses]} ({name})",
            got=[round(x, 5) for x in run.losses()],
        )

    for saved, here, me, random, client in (
        (3, 1, 0, None, {"note": "kept"}),
        (2, 4, 1, None, []),
        (4, 4, 2, {"of": 2}, 0),
        (2, 2, 1, {"of": 1}, {3: ("a", "tuple")}),
    ):
        for tag in ("step-3", None, "run7-final"):
            other = lab.observe(f"{PROGRAMS}:load_of_other_ranks", saved, here, me, client, tag)
            require_equal(
                other,
                {"client": client, "place": [2, 12], "random": random, "asked": [here], "left_out": []},
                of=f"load_checkpoint(…, {tag!r}) on rank {me} of {here}, of a universal checkpoint of {saved} ranks with client_state {client!r}: "
                "what it returns, epoch and samples, random_state_to_restore, the ranks that check_checkpoint and newest_whole are asked for, and what engine.load_checkpoint is told to leave out",
            )


@pytest.mark.milestone(task="3.7", points=10, section="A checkpoint")
def test_broken_checkpoints_are_refused(lab, tmp_path):
    whole = tmp_path / "step-4"
    (whole / "zero").mkdir(parents=True)
    contents = {
        "mp_rank_00_model_states.pt": b"m" * 100,
        "zero/fp32.pt": b"z" * 50,
        "zero/a/b/fp32.pt": b"a" * 60,
        "zero/a/exp.pt": b"e",
        "zero/large.pt": b"l" * (2**20 + 5),
        "weights.safetensors": b"w" * 30,
        "zero/empty.pt": b"",
        ".parts/names.pt": b"n" * 20,
    }
    (whole / ".parts").mkdir()
    (whole / "zero" / "a" / "b").mkdir(parents=True)
    for name, content in contents.items():
        (whole / name).write_bytes(content)
    (whole / "notes.txt").write_text("a file that complete.json does not list")
    manifest = {"ranks": 2, "universal": False, "files": {name: len(content) for name, content in contents.items()}}
    (whole / "complete.json").write_text(json.dumps(manifest))
    require(
        lab.check_checkpoint(whole, 2) == manifest,
        expected="no error for a whole checkpoint of 2 ranks, and what complete.json says",
        got=lab.check_checkpoint(whole, 2),
    )

    in_brackets = tmp_path / "lr[1e-3]" / "step-4"
    shutil.copytree(whole, in_brackets)
    os.utime(in_brackets / "zero" / "fp32.pt", (2**31, 2**31))
    try:
        lab.check_checkpoint(in_brackets, 2)
    except ValueError as error:
        require(
            False,
            expected="no error for a whole checkpoint below a folder with brackets in its name, of which a file is newer than complete.json, "
            "as after copying",
            got=f"ValueError: {error}",
        )
    (in_brackets / "zero" / "fp32.pt").write_bytes(b"z" * 20)
    (in_brackets / "complete.json").write_text(json.dumps(manifest | {"ranks": 5}))
    with lab.elsewhere():
        require_error(
            lambda: lab.check_checkpoint(in_brackets, 5),
            ValueError,
            mentions=("fp32.pt",),
            expected="ValueError for a truncated file on every rank, on rank 3 of 5 too",
        )

    def refused(name: str, change, ranks: int, mentions: tuple, expected: str) -> None:
        folder = tmp_path / name
        shutil.copytree(whole, folder)
        change(folder)
        require_error(lambda: lab.check_checkpoint(folder, ranks), ValueError, mentions=mentions, expected=expected)

    require_error(
        lambda: lab.check_checkpoint(tmp_path / "step-9", 2),
        ValueError,
        mentions=("step-9",),
        expected="ValueError that names the folder, where there is none",
    )
    refused(
        "half",
        lambda folder: (folder / "complete.json").unlink(),
        2,
        ("half",),
        "ValueError that names the folder, without complete.json",
    )
    said = []
    for name in ("step-9", "half"):
        with pytest.raises(ValueError) as error:
            lab.check_checkpoint(tmp_path / name, 2)
        said.append(str(error.value).replace(str(tmp_path / name), "…").replace(name, "…"))
    require(
        said[0] != said[1],
        expected="another reason where there is no folder than where the save did not come to its end",
        got=f"for both: {said[0]}",
    )
    refused(
        "missing",
        lambda folder: (folder / "zero" / "fp32.pt").unlink(),
        2,
        ("fp32.pt",),
        "ValueError that names the missing file",
    )
    refused(
        "truncated",
        lambda folder: (folder / "zero" / "fp32.pt").write_bytes(b"z" * 20),
        2,
        ("fp32.pt",),
        "ValueError that names the truncated file",
    )
    refused(
        "longer",
        lambda folder: (folder / "zero" / "fp32.pt").write_bytes(b"z" * 70),
        2,
        ("fp32.pt",),
        "ValueError that names a file of another size, longer too",
    )
    refused(
        "first",
        lambda folder: (folder / "mp_rank_00_model_states.pt").write_bytes(b"m"),
        2,
        ("mp_rank_00_model_states.pt",),
        "ValueError that names a truncated file, the first of two",
    )
    for number, (name, content) in enumerate(contents.items()):
        for size in {0, len(content) - 1} if content else {20}:
            refused(
                f"cut-{number}-{size}",
                lambda folder, name=name, size=size: (folder / name).write_bytes(b"x" * size),
                2,
                (name.rpartition("/")[2],),
                f"ValueError that names {name}, which has {size} of its {len(content)} bytes",
            )
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    lab.check_checkpoint(again, 2)
    for name in ("fp32.pt", "large.pt"):
        was = (again / "zero" / name).read_bytes()
        (again / "zero" / name).write_bytes(was[:-1])
        require_error(
            lambda: lab.check_checkpoint(again, 2),
            ValueError,
            mentions=(name,),
            expected="ValueError for a file that was cut after the checkpoint had been checked once",
        )
        (again / "zero" / name).write_bytes(was)
    (again / "zero" / "fp32.pt").write_bytes(b"z" * 40)
    (again / "zero" / "large.pt").write_bytes(b"l" * (2**20 + 15))
    require_error(
        lambda: lab.check_checkpoint(again, 2),
        ValueError,
        mentions=(".pt",),
        expected="ValueError where one file is 10 bytes shorter and another 10 longer",
    )
    (tmp_path / "step-7").write_text("a file where a folder should be")
    require_error(
        lambda: lab.check_checkpoint(tmp_path / "step-7", 2),
        ValueError,
        mentions=("step-7",),
        expected="ValueError that names it, where a file has the folder's name",
    )
    for name, change in (("missing", lambda file: file.unlink()), ("cut", lambda file: file.write_bytes(b"z" * 37))):
        folder = tmp_path / f"why-{name}"
        shutil.copytree(whole, folder)
        change(folder / "zero" / "fp32.pt")
        require_error(
            lambda folder=folder: lab.check_checkpoint(folder, 2),
            ValueError,
            mentions=("fp32.pt", *(("37", "50") if name == "cut" else ())),
            silent=("50",) if name == "missing" else (),
            expected="ValueError with the reason: of 50 bytes there are 37" if name == "cut" else "ValueError: the file is missing",
        )
    refused(
        "empty-missing",
        lambda folder: (folder / "zero" / "empty.pt").unlink(),
        2,
        ("empty.pt",),
        "ValueError for a file that is missing, though it should be empty",
    )
    many = tmp_path / "many"
    many.mkdir()
    for number in range(1400):
        (many / f"{number}.pt").write_bytes(b"x")
    (many / "complete.json").write_text(json.dumps(manifest | {"files": {f"{number}.pt": 1 for number in range(1400)}}))
    (many / "1399.pt").write_bytes(b"")
    require_error(
        lambda: lab.check_checkpoint(many, 2),
        ValueError,
        mentions=("1399.pt",),
        expected="ValueError for the last of 1,400 files, which is empty",
    )
    for saved, ranks in ((2, 3), (2, 1), (7, 13), (2, 4), (1, 3), (6, 2)):
        folder = tmp_path / "ranks"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        (folder / "complete.json").write_text(json.dumps(manifest | {"ranks": saved}))
        try:
            found = lab.check_checkpoint(str(folder), ranks)
            require(
                False, expected=f"ValueError for a checkpoint of {saved} ranks on {ranks}", got=f"no error; it returned {found}"
            )
        except ValueError as error:
            said = str(error).replace(str(folder), "…")
            numbers = set(re.findall(r"\d+", said))
            require(
                {str(saved), str(ranks)} <= numbers,
                expected=f"ValueError that names both numbers, {saved} and {ranks}",
                got=f"ValueError: {said}",
            )
    (whole / "complete.json").write_text(json.dumps(manifest | {"universal": True}))
    refused(
        "universal",
        lambda folder: (folder / "zero" / "fp32.pt").write_bytes(b"z" * 20),
        3,
        ("fp32.pt",),
        "ValueError that names the truncated file of a universal checkpoint",
    )
    refused(
        "universal-longer",
        lambda folder: (folder / "zero" / "fp32.pt").write_bytes(b"z" * 70),
        3,
        ("fp32.pt",),
        "ValueError that names a file of a universal checkpoint that is longer than it was written",
    )
    refused(
        "universal-missing",
        lambda folder: (folder / "zero" / "a" / "b" / "fp32.pt").unlink(),
        3,
        ("fp32.pt",),
        "ValueError that names the missing file of a universal checkpoint",
    )
    try:
        found = lab.check_checkpoint(whole, 3)
        require_equal(found, manifest | {"universal": True}, of="check_checkpoint() of a universal checkpoint of 2 ranks on 3")
    except ValueError as error:
        require(
            False,
            expected="a universal checkpoint accepted for any number of ranks",
            got=f"ValueError: {error}",
        )


@pytest.mark.milestone(task="3.8", points=10, section="One model again")
def test_consolidated_model_is_the_engines(lab, run_experiments, tmp_path):
    import math

    import torch
    from transformers import AutoTokenizer

    lab.consolidate  # noqa: B018
    never_stopped(run_experiments)
    # The base model's weights are not here, and its tokenizer is not bloom-tiny's.
    base = visible_folder() / "engine" / "base"
    with once("base") as first:
        if first:
            shutil.rmtree(base, ignore_errors=True)
            shutil.copytree(engine_runs.odd_model(), base, ignore=shutil.ignore_patterns("*.safetensors"))
            settings = json.loads((base / "tokenizer_config.json").read_text())
            (base / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 77}))
            shape = json.loads((base / "config.json").read_text())
            (base / "config.json").write_text(json.dumps(shape | {"layer_norm_epsilon": 0.004}))
    for stage in (2, 3):
        out = tmp_path / "model"  # the second time it holds the model of another checkpoint
        folder = checkpoints(f"stage{stage}") / "step-2"
        returned = lab.consolidate(str(folder) if stage == 2 else folder, str(base), str(out))
        weights = torch.load(shared_folder() / f"stage{stage}.pt", weights_only=True, map_location="cpu")
        found = saved_weights(out, engine_runs.odd_model())
        worst = max((found[name] - weights[name]).abs().max().item() if name in found else math.inf for name in weights)
        require(
            worst == 0,
            expected=f"the engine's own weights after step 2, bit for bit (ZeRO-{stage}, 2 ranks)",
            got=f"weights that differ by up to {worst:.3g}",
        )
        require(
            returned is not None
            and all(torch.equal(weight.cpu(), weights[name]) for name, weight in returned.named_parameters() if name in weights),
            expected="the model returned",
            got="nothing" if returned is None else "a model with other weights",
        )
        length = AutoTokenizer.from_pretrained(out).model_max_length
        require(length == 77, expected="the base model's tokenizer, of which model_max_length is 77, in the folder", got=length)
        epsilon = json.loads((out / "config.json").read_text()).get("layer_norm_epsilon")
        require(
            (epsilon, returned.config.layer_norm_epsilon) == (0.004, 0.004),
            expected="the base model's own settings, of which layer_norm_epsilon is 0.004, in the folder and in the model returned",
            got=(epsilon, returned.config.layer_norm_epsilon),
        )
        where = {parameter.device.type for parameter in returned.parameters()}
        require(where == {"cpu"}, expected="the model on the CPU", got=where)
    there = lab.observe(
        f"{PROGRAMS}:consolidate_next_to_a_gpu", str(checkpoints("stage2") / "step-2"), str(base), str(tmp_path / "model-gpu")
    )
    require_equal(
        there, "CPU", of="where the model is that consolidate() returns on a machine with a GPU, on which it need not fit"
    )
    for name, model, frozen in OTHER_MODELS:
        base_model, out = model or engine_runs.odd_model(tied=False), tmp_path / f"model-{name}"
        lab.consolidate(checkpoints(name) / "step-1", base_model, out)
        weights = torch.load(shared_folder() / f"{name}.pt", weights_only=True, map_location="cpu")
        found = saved_weights(out, base_model)
        wrong = [key for key in weights if key not in found or not torch.equal(found[key].float(), weights[key])]
        require(
            not wrong,
            expected=f"the engine's own weights of {model or 'a model whose output layer is not tied'}, of which {frozen} is frozen",
            got=f"others in {', '.join(wrong)}",
        )
    out = tmp_path / "model-bf16"
    lab.consolidate(checkpoints("bf16") / "step-2", str(base), out)
    found, weights = saved_weights(out, str(base)), torch.load(shared_folder() / "bf16.pt", weights_only=True, map_location="cpu")
    rounded = {name: weight.float().bfloat16() for name, weight in found.items()}
    require(
        all(torch.equal(rounded[name], weights[name].cpu().bfloat16()) for name in weights if name in rounded),
        expected="the engine's own weights after two steps in bf16, once they are rounded to bf16",
        got="others",
    )
    require(
        any(not torch.equal(rounded[name].float(), weight.float()) for name, weight in found.items()),
        expected="after training in bf16, the fp32 master weights of the optimizer's shards",
        got="weights that were rounded to bf16",
    )
    for name, change, words in (
        ("longer", {"n_layer": 2}, "has a layer more than the checkpoint: it would keep random weights"),
        ("shorter", {"n_layer": 0}, "has a layer less than the checkpoint: it would be lost"),
        ("wider", {"hidden_size": 36}, "has another hidden size than the checkpoint"),
        ("another vocabulary", {"vocab_size": 1040}, "has another vocabulary than the checkpoint"),
    ):
        other = visible_folder() / "engine" / name
        with once(name) as first:
            if first:
                shutil.rmtree(other, ignore_errors=True)
                shutil.copytree(base, other)
                (other / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | change))
        require_error(
            lambda other=other: lab.consolidate(checkpoints("stage2") / "step-2", str(other), tmp_path / other.name),
            RuntimeError,
            expected=f"RuntimeError where the base model {words}",
        )


@pytest.mark.milestone(task="3.9", points=5, section="Another number of ranks")
def test_universal_checkpoint_fits_any_number_of_ranks(lab, run_experiments, workspace):
    """Trained on 2 ranks, continued on 1, and back on 2: the losses of a run that had 2 all along."""
    import torch

    lab.convert_to_universal  # noqa: B018
    whole = never_stopped(run_experiments)

    def convert(source, name: str, end: str = "", *, fresh: bool = False):
        parent = workspace / "engine" / name
        shutil.rmtree(parent, ignore_errors=True)
        others = [parent / other / "complete.json" for other in ("step-1", f"{source.name}0")]
        earlier = parent / source.name / "complete.json"  # of a checkpoint that had the same name
        for path, text in (
            () if fresh else (*((other, "{}") for other in others), (earlier, '{"ranks": 2, "universal": true, "files": {}}'))
        ):
            path.parent.mkdir(parents=True)
            path.write_text(text)
        left_over = parent / source.name / "zero" / "of.another.model" / "fp32.pt"
        if not fresh:
            left_over.parent.mkdir(parents=True)
            left_over.write_text("earlier")
        seen = lab.observe(f"{PROGRAMS}:convert", f"{source}{end}", str(parent))
        out = seen["returned"]
        require(
            out == parent / source.name and (out / "complete.json").exists(),
            expected=f"the folder {source.name} in the given path, with a complete.json, and its path returned",
            got=f"returned {out}; {sorted(path.parent.name for path in parent.rglob('complete.json'))}",
        )
        require(
            not left_over.exists(),
            expected="nothing left of an earlier checkpoint of that name: whoever loads it would take its files for the new one's",
            got=f"{left_over.relative_to(parent)}, as it was",
        )
        there = sorted(path.name for path in parent.iterdir() if path.is_dir())
        wanted = sorted([source.name] + [other.parent.name for other in others if not fresh])
        require_equal(there, wanted, of="the folders in the given path: other universal checkpoints stay, and nothing else is left")
        require(fresh or all(map(os.path.exists, others)), expected="other universal checkpoints left as they are", got="others")
        manifest = json.loads((out / "complete.json").read_text())
        ranks = json.loads((source / "complete.json").read_text())["ranks"]
        require_equal(
            seen["asked"],
            [{"strict": True, "keep_temp_folder": False}],
            of="ds_to_universal.main() in convert_to_universal()",
        )
        require(
            (manifest["universal"], manifest["ranks"]) == (True, ranks) and (out / "zero").is_dir(),
            expected=f"universal, saved by {ranks} ranks, and a folder 'zero' with the merged states",
            got=f"universal {manifest['universal']}, {manifest['ranks']} ranks, {sorted(path.name for path in out.iterdir())}",
        )
        sizes = {
            str(path.relative_to(out)): path.stat().st_size
            for path in out.rglob("*")
            if path.is_file() and path.name != "complete.json"
        }
        require(
            manifest["files"] == sizes,
            expected=f"complete.json with the {len(sizes)} files that are in the folder, in their sizes",
            got=f"{len(manifest['files'])} files, {len(set(manifest['files']) - set(sizes))} of them not there",
        )
        require(
            set(seen["random_states"].values()) == {ranks},
            expected=f"the client state of the checkpoint in the new one, with the random states of {ranks} ranks: on as many, they go on",
            got=f"random states by file: {seen['random_states']}",
        )
        return out

    def continued(name: str, stage: int, ranks: int, folder, step: int):
        accumulation = 4 // ranks
        plan = experiment(
            name,
            f"{PROGRAMS}:continue_universal",
            stage,
            ranks=ranks,
            accumulation=accumulation,
            deepspeed=config(
                stage, ranks=ranks, accumulation=accumulation, universal=True, **({"scheduler": WARM_UP} if stage > 1 else {})
            ),
            steps=step,
            options={"load": str(folder), "save_at": [step]},
        )
        return run_experiments([plan])[name]

    best = workspace / "engine" / "of-twelve" / "step-4.best"
    for folder in (best.parent, workspace / "engine" / "of-twelve-universal"):
        shutil.rmtree(folder, ignore_errors=True)
    found = lab.observe(f"{PROGRAMS}:convert_of_many_ranks", str(best), str(workspace / "engine" / "of-twelve-universal"), 12)
    require_equal(
        found,
        {"returned": str(workspace / "engine" / "of-twelve-universal" / "step-4.best"), "ranks": 12},
        of="convert_to_universal() of a checkpoint step-4.best of 12 ranks: the folder, and the ranks in its complete.json",
    )
    source = workspace / "engine" / "run7-final"
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(checkpoints("bf16") / "step-2", source)
    shutil.rmtree(workspace / "engine" / "new", ignore_errors=True)
    (workspace / "engine" / "link").unlink(missing_ok=True)
    (workspace / "engine" / "link").symlink_to(source.parent)
    through_link = workspace / "engine" / "link" / source.name
    for folder, parent in (
        (source, source.parent),
        (source, f"{source.parent}/new/.."),
        (source, workspace / "engine" / "link"),
        (through_link, source.parent),
    ):
        require_error(
            lambda folder=folder, parent=parent: lab.convert_to_universal(folder, str(parent)),
            ValueError,
            mentions=(source.name,),
            expected="ValueError that names the checkpoint, where the original lies in the given path",
        )
        require(
            len(list(source.glob("*"))) == len(list((checkpoints("bf16") / "step-2").glob("*"))),
            expected="the original as it was",
            got=sorted(path.name for path in source.glob("*")),
        )
    masters = [torch.load(path, weights_only=True) for path in convert(source, "new/folder", fresh=True).rglob("fp32.pt")]
    masters = [master["param"] if isinstance(master, dict) else master for master in masters]
    require(
        masters and any(not torch.equal(master, master.bfloat16().float()) for master in masters),
        expected="the master weights in fp32, as the optimizer of a run in bf16 has them",
        got="rounded to bf16",
    )
    for stage in (1, 3):
        wanted = whole[f"stage{stage}"].losses()
        folder = convert(checkpoints(f"stage{stage}") / "step-4", f"universal{stage}", end="/" if stage == 3 else "")
        single = continued(f"single{stage}", stage, 1, folder, 5 if stage == 1 else 7)
        require(
            farthest(single.losses(), wanted[4 : 4 + len(single.losses())]) <= 1e-5,
            expected=f"step 5 and what follows on one rank as on two: {[round(x, 5) for x in wanted[4:]]} (stage {stage})",
            got=[round(x, 5) for x in single.losses()],
        )
        if stage == 1:
            back = continued("back", stage, 2, convert(single.folder / "checkpoints" / "step-5", "back"), 6)
            require(
                abs(back.losses()[0] - wanted[5]) <= 1e-5,
                expected=f"step 6 back on two ranks: {wanted[5]:.5f}",
                got=f"{back.losses()[0]:.5f}",
            )
