"""What ranks run for the milestones of this lab: one exercise function at a time, with the engine itself around it."""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import math
import random
import time
import weakref
import zlib
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy
import torch

from shardlab import switch
from shardlab.milestones import engine_runs, pretended
from shardlab.milestones.exercises import watched_exercises
from shardlab.run.collectives import barrier, gather, rank, world_size
from shardlab.run.experiment import Experiment
from shardlab.run.run_folder import Run
from shardlab.run.training import text_rows
from shardlab.zero import held_bytes


def _lab():
    return watched_exercises("lab03_engine")


def fingerprint(state: torch.Tensor) -> int:
    return int(state.to(torch.int64).mul(torch.arange(1, state.numel() + 1)).sum())


def initialize(experiment: Experiment, run: Run) -> dict:
    """Task 3.1: the result, by rank."""
    from datasets import Dataset

    from shardlab.data.models import load_model, parameter_count

    # Besides its tokens a row has a fraction.
    rows = [row | {"weight": number + 0.25} for number, row in enumerate(padded_rows(experiment))]
    model = load_model(experiment.model)
    config, optimizer = copy.deepcopy(experiment.deepspeed), None
    if frozen := experiment.options.get("frozen"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
    if experiment.options.get("own_optimizer"):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [{"params": trained[:3], "lr": 0.25, "weight_decay": 0.0}, {"params": trained[3:]}] if frozen else trained
        optimizer = torch.optim.AdamW(groups, lr=0.125, betas=(0.7, 0.95), weight_decay=0.3)
    data = None if experiment.options.get("no_data") else Dataset.from_list(rows).with_format("torch")
    returned = _lab().initialize_deepspeed(model, config, optimizer, data)
    if not isinstance(returned, tuple) or len(returned) != 4:
        return {"returned": repr(type(returned))}
    engine, second, loader, scheduler = returned
    if not hasattr(engine, "backward") or hasattr(loader, "step"):
        return {"returned": "a tuple of " + ", ".join(type(one).__name__ for one in returned)}
    stepped = engine.optimizer.optimizer if hasattr(engine.optimizer, "optimizer") else engine.optimizer
    numbers = {tuple(row["input_ids"]): number for number, row in enumerate(rows)}

    def seen(epoch: int):
        if loader is None:
            return None
        if hasattr(loader, "data_sampler"):
            loader.data_sampler.set_epoch(epoch)
        found = []
        for batch in loader:
            found.append([numbers.get(tuple(ids), -1) for ids in batch["input_ids"].tolist()])
            as_they_are.append(all(batch[key].tolist() == [rows[number][key] for number in found[-1]] for key in rows[0]))
            devices.add(batch["input_ids"].device.type)
        return found

    as_they_are: list[bool] = []
    devices: set[str] = set()
    by_epoch = [gather(seen(epoch)) for epoch in (0, 1)]
    return {
        "returned": "engine, optimizer, data loader, scheduler",
        "stage": engine.zero_optimization_stage(),
        "clipping": engine.gradient_clipping(),
        "learning_rate": stepped.param_groups[0]["lr"],
        "settings": [{name: group[name] for name in ("betas", "eps", "weight_decay", "lr")} for group in stepped.param_groups],
        "as_they_are": all(gather(all(as_they_are))),
        "devices": sorted(devices),
        "frozen": sorted(name for name, parameter in model.named_parameters() if not parameter.requires_grad),
        "universal": bool(engine.load_universal_checkpoint()),
        "parameters": sum(
            parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()
            for parameter in model.parameters()
            if parameter.requires_grad
        )
        if frozen
        else parameter_count(model),
        "stepped": sum(sum(group) for group in held_bytes.parameter_groups(engine.optimizer)),
        "optimizer_is_the_engines": second is engine.optimizer,
        "scheduler_is_the_engines": scheduler is engine.lr_scheduler,
        "scheduler": type(scheduler).__name__,
        "config_changed": config != experiment.deepspeed,
        "seen": by_epoch[0],
        "seen_next": by_epoch[1],
        "pinned": getattr(loader, "pin_memory", None),
        "workers": getattr(loader, "num_local_io_workers", getattr(loader, "num_workers", 0)),
    }


PADS = (0, 5, 9)


def padded_rows(experiment: Experiment, labelled=lambda number: range(4, 64)) -> list[dict]:
    """Rows with padding on the left in turns, as for generating, and with labels only where `labelled` has them.

    Where a row has several labels, the last token of its padding has one too: an end-of-text that is also the padding is such a token.

    Args:
        labelled: the places of a row's labels, by its number and without its padding; by default those after a prompt of 4 tokens.
    """

    def padded(number: int, row: dict) -> dict:
        pads = PADS[number % 3]
        ids, mask, labels = (list(row[name][: len(row[name]) - pads]) for name in ("input_ids", "attention_mask", "labels"))
        ids[6] = 3  # padding's token among real ones
        labels[7] = 0  # and the first token of the vocabulary as a label
        return {
            "input_ids": [3] * pads + ids,
            "attention_mask": [0] * pads + mask,
            "labels": [-100] * (pads - 1)
            + [3 if len(labelled(number)) > 1 else -100] * min(pads, 1)
            + [label if at in labelled(number) else -100 for at, label in enumerate(labels)],
        }

    return [padded(number, row) for number, row in enumerate(text_rows(experiment)[0])]


class NotMoved(torch.Tensor):
    """A tensor of a batch that nobody has moved yet: `.to` gives a plain one. On a CPU alone, a batch left where it is would do as well."""

    def to(self, *where, **how):
        return self.as_subclass(torch.Tensor).to(*where, **how)


def not_moved(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.as_subclass(NotMoved) for name, tensor in batch.items()}


def watch_moves(engine) -> list[bool]:
    """For each forward pass of the engine from now on, whether all its tensors were moved."""
    moved: list[bool] = []

    def look(module, given, named):
        moved.append(not any(isinstance(value, NotMoved) for value in (*given, *named.values())))

    engine.module.register_forward_pre_hook(look, with_kwargs=True)
    return moved


def _times_nan(module, given, output):
    output.loss = output.loss * math.nan
    return output


def train_steps(experiment: Experiment, run: Run) -> dict:
    """Task 3.2: losses of the optimizer steps, and what the engine counted."""
    engine, modes = engine_runs.build(experiment), []
    told: list = []
    trainer = _lab().DeepSpeedTrainer(engine, lambda *given: told.append(given))
    engine.module.register_forward_pre_hook(lambda module, _: modes.append(all(part.training for part in module.modules())))
    moved = watch_moves(engine)
    rows, losses, epoch, kind, whole = padded_rows(experiment), [], 0, "float", True
    wanted = experiment.steps * experiment.accumulation
    while len(losses) < wanted:
        for batch in engine_runs.epoch_batches(rows, epoch, experiment.micro_batch, world_size(), rank())[: wanted - len(losses)]:
            batch = not_moved(batch)
            engine.eval()  # as an evaluation may have left it
            if len(losses) % 2:  # or one of a part of the model
                engine.train()
                engine.module.transformer.eval()
            before = {name: tensor.clone() for name, tensor in batch.items()}
            loss = trainer.train_step(batch)
            kind = type(loss).__name__
            losses.append(float(loss))
            whole = whole and set(batch) == {"input_ids", "attention_mask", "labels"}
            whole = whole and all(torch.equal(tensor, batch[name]) for name, tensor in before.items())
        epoch += 1
    counted = {"micro_steps": engine.micro_steps, "global_steps": engine.global_steps}
    if engine.lr_scheduler is not None:
        counted["scheduler_steps"] = engine.lr_scheduler.last_batch_iteration + 1
    lengths: list[int] = []
    long = {name: tensor.repeat(1, 1 + 1100 // tensor.shape[1]) for name, tensor in batch.items()}
    long["labels"][:, 0] = 5  # nothing predicts it, but it is the caller's
    watching = engine.module.register_forward_pre_hook(
        lambda module, given, named: lengths.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    while trainer.accumulating or not lengths:  # whole optimizer steps, for what comes after
        trainer.train_step(long)
    watching.remove()
    whole = whole and bool((long["labels"][:, 0] == 5).all())
    random_after = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        trainer.train_step(batch)
        random_after.append(fingerprint(torch.get_rng_state()))
    if rank() == world_size() - 1:  # of one rank alone: the others must hear of it
        engine.module.register_forward_hook(_times_nan)
    before = engine.micro_steps
    lost = float(trainer.train_step(batch))
    of_no_label = float(trainer.train_step(batch | {"labels": torch.full_like(batch["labels"], -100)}))
    groups = [losses[at : at + experiment.accumulation] for at in range(0, wanted, experiment.accumulation)]
    return {
        "losses": [sum(group) / len(group) for group in groups],
        "by_rank": gather(losses),
        "kind": kind,
        **counted,
        "samples": trainer.samples,
        "told": len(told),
        "batch_kept": whole,
        "lengths": [long["input_ids"].shape[1], min(lengths)],
        "moved": all(gather(all(moved))),
        "seeded": random_after[0] == random_after[1],
        "of_nan": "nan" if math.isnan(lost) else lost,
        "of_no_label": "nan" if math.isnan(of_no_label) else of_no_label,
        "counted_of_nan": engine.micro_steps - before,
        "training": all(modes) and engine.module.training,
    }


class Drawing(torch.utils.data.Dataset):
    """Rows whose reading draws random numbers, as augmenting images does."""

    def __init__(self, rows: list[dict]):
        self.rows = [{key: torch.tensor(value) for key, value in row.items()} for row in rows]
        self.read = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict:
        self.read += 1
        torch.rand(1)
        return self.rows[number]


def train_epochs(experiment: Experiment, run: Run) -> dict:
    """Task 3.3: the rows seen in two epochs, one cut short and one resumed, and the trainer's book-keeping."""
    lab, engine, rows = _lab(), engine_runs.build(experiment), text_rows(experiment)[0]
    drawing = Drawing(rows)
    loader = engine.deepspeed_io(drawing, num_local_io_workers=0, pin_memory=False)
    numbers = {tuple(row["input_ids"]): number for number, row in enumerate(rows)}
    seen, losses, random_at, diverges = [], [], [], []

    class Recording(lab.DeepSpeedTrainer):
        def train_step(self, batch):
            random_at.append(fingerprint(torch.get_rng_state()))
            seen.append([numbers[tuple(ids)] for ids in batch["input_ids"].tolist()])
            losses.append(engine_runs.micro_step(self.engine, batch))
            return diverges[0] if diverges and len(losses) == 1 else losses[-1]

    def call(trainer, last_step=None) -> dict:
        for record in (seen, losses, random_at, told, epochs):
            record.clear()
        drawing.read = 0
        returned = trainer.train_epoch(loader, last_step)
        return {
            "read": drawing.read,
            "returned": None if returned is None or math.isnan(returned) else returned,
            "nan": returned is not None and math.isnan(returned),
            "seen": gather(list(seen)),
            "losses": list(losses),
            "told": list(told),
            "epochs_told": list(epochs),
            "told_by_rank": gather([rest for _, *rest in told]),
            "epoch": trainer.epoch,
            "samples": trainer.samples,
            "global_steps": engine.global_steps,
            "random_at_first": gather(random_at[:1]),
        }

    told: list = []
    epochs: list[int] = []

    def note(trainer, loss: float) -> None:
        told.append([loss, trainer.samples, engine.global_steps])
        epochs.append(trainer.epoch)

    trainer = Recording(engine, note)
    results = {"first": call(trainer), "second": call(trainer), "cut": call(trainer, engine.global_steps + 1)}
    left = (len(rows) - trainer.samples) // (experiment.accumulation * experiment.micro_batch * world_size())
    results["at_the_end"] = call(trainer, engine.global_steps + left)
    results["behind_the_end"] = call(trainer, engine.global_steps)
    resumed = Recording(engine, note)
    resumed.epoch, resumed.samples = 1, 2 * experiment.accumulation * experiment.micro_batch * world_size()
    torch.manual_seed(4321)
    state = lab.random_state()
    resumed.random_state_to_restore = state
    results["random_wanted"] = fingerprint(state["torch"])
    torch.manual_seed(99)
    results["resumed"] = call(resumed) | {"restored": resumed.random_state_to_restore is None}
    resumed.epoch, resumed.samples = 1, 0
    resumed.random_state_to_restore = state
    results["begun"] = call(resumed)
    resumed.epoch, resumed.samples = 1, experiment.micro_batch * world_size() // 2
    resumed.random_state_to_restore = state
    results["of_another_batch"] = call(resumed)
    resumed.epoch, resumed.samples = 0, len(rows)
    resumed.random_state_to_restore = state
    results["nothing_left"] = call(resumed) | {"random_at_end": fingerprint(torch.get_rng_state())}
    resumed.epoch, resumed.samples = 1, experiment.micro_batch * world_size()
    results["resumed_within_a_step"] = call(resumed)
    while trainer.accumulating:
        engine_runs.micro_step(engine, next(iter(loader)))
    resumed.epoch, resumed.samples = 13, 0
    results["passed"] = call(resumed, 0)
    for name, loss in (("diverged", math.nan), ("infinite", math.inf)):
        while trainer.accumulating:
            engine_runs.micro_step(engine, next(iter(loader)))
        resumed.epoch, resumed.samples = 3, 0
        diverges[:] = [loss]
        results[name] = call(resumed)
    return results


def epoch_without_an_engine(losses: list[float], accumulation: int, epoch: int) -> dict:
    """Task 3.3: an epoch of one rank in which `train_step` gives these losses, with a stand-in for the engine.

    Returns:
        `returned`; `told`: what `after_step` was told, step by step; `epochs`: what the sampler was told.
    """
    lab, told, epochs, at = _lab(), [], [], iter(losses)
    engine = SimpleNamespace(
        gradient_accumulation_steps=lambda: accumulation, train_micro_batch_size_per_gpu=lambda: 2, micro_steps=0, global_steps=0
    )

    class Scripted(lab.DeepSpeedTrainer):
        def train_step(self, batch):
            engine.micro_steps += 1
            engine.global_steps = engine.micro_steps // accumulation
            return next(at)

    class Batches(list):
        data_sampler = SimpleNamespace(set_epoch=epochs.append)

    trainer = Scripted(engine, lambda trainer, loss: told.append(loss))
    trainer.epoch = epoch
    with mock.patch.object(switch.import_exercise("lab03_engine"), "world_size", lambda: 1):
        returned = trainer.train_epoch(Batches({"input_ids": torch.zeros(2, 4)} for _ in losses))
    return {"returned": returned, "told": told, "epochs": epochs}


def evaluation_without_an_engine(counts: list[int], losses: list[float]) -> float:
    """Task 3.4: the mean over batches of one rank with so many labels and these losses, of a model in bf16, without an engine."""

    class Engine(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.device = torch.nn.Linear(2, 2, dtype=torch.bfloat16), torch.device("cpu")

        def forward(self, input_ids, attention_mask, labels):
            return SimpleNamespace(loss=torch.tensor(losses[int(input_ids[0, 0])], dtype=torch.float32))

    def batch(number: int, count: int) -> dict:
        labels = torch.tensor([[5] * (count + 1)])
        return {"input_ids": torch.full_like(labels, number), "attention_mask": torch.ones_like(labels), "labels": labels}

    batches = [batch(number, count) for number, count in enumerate(counts)]
    with pretended.lone_group(), mock.patch("deepspeed.comm.all_reduce", lambda tensor, *_, **__: None):
        return float(_lab().DeepSpeedTrainer(Engine()).evaluate(batches))


def evaluate(experiment: Experiment, run: Run) -> dict:
    """Task 3.4: the loss by rank, and whether anything changed; then with a loss that is nan in the last batch."""
    engine, rows, gradients = engine_runs.build(experiment), masked_rows(experiment), []
    engine.module.register_forward_hook(lambda *_: gradients.append(torch.is_grad_enabled()))
    engine.train()
    share = rows[rank() :: world_size()]
    moved = watch_moves(engine)
    batches = Batches(
        engine_runs.as_batch(share[at : at + experiment.micro_batch]) for at in range(0, len(share), experiment.micro_batch)
    )
    before = [{name: tensor.clone() for name, tensor in batch.items()} for batch in batches]
    torch.manual_seed(4321)
    random_before = fingerprint(torch.get_rng_state())
    losses = [_lab().DeepSpeedTrainer(engine).evaluate(batches) for _ in range(2)]
    kept = all(torch.equal(a[name], b[name]) for a, b in zip(before, batches, strict=True) for name in a)
    facts = {
        "batches_kept": kept,
        "random_kept": all(gather(fingerprint(torch.get_rng_state()) == random_before)),
        "training": all(part.training for part in engine.module.modules()),
        "micro_steps": engine.micro_steps,
        "kind": type(losses[0]).__name__,
    }

    engine.eval()
    _lab().DeepSpeedTrainer(engine).evaluate([not_moved(batch) for batch in batches])
    facts["training"] = facts["training"] and engine.module.training
    facts["moved"] = all(gather(all(moved)))
    alive: list[int] = []
    outputs: list[weakref.ref] = []

    def count(module, given, output):
        outputs.append(weakref.ref(output.logits))
        alive.append(sum(one() is not None for one in outputs))

    counting = engine.module.register_forward_hook(count)
    _lab().DeepSpeedTrainer(engine).evaluate(batches)
    counting.remove()
    tokens = batches.batches[0]["input_ids"].shape[1]
    uneven = [
        *({name: tensor[:, : tokens - number] for name, tensor in batch.items()} for number, batch in enumerate(batches)),
        {name: tensor[:1] for name, tensor in batches.batches[-1].items()},
    ]
    of_uneven = float(_lab().DeepSpeedTrainer(engine).evaluate(uneven))
    rows_alone = [
        {name: tensor[at : at + 1] for name, tensor in batch.items()} for batch in uneven for at in range(len(batch["labels"]))
    ]
    sums = numpy.zeros(2)
    engine.eval()
    with torch.no_grad():
        for row in rows_alone:
            labels = int((row["labels"][:, 1:] != -100).sum())
            loss = engine(**{name: tensor.to(engine.device) for name, tensor in row.items()}).loss.item()
            sums += (loss * labels, labels) if labels else (0, 0)
    engine.train()
    loss, labels = map(sum, zip(*gather(sums.tolist())))
    facts |= {"uneven": [of_uneven, loss / labels], "outputs_alive": max(gather(max(alive)))}
    facts["of_no_batch"] = str(float(_lab().DeepSpeedTrainer(engine).evaluate([])))
    unlabelled = [batch | {"labels": torch.full_like(batch["labels"], -100)} for batch in batches]
    nothing = float(_lab().DeepSpeedTrainer(engine).evaluate(unlabelled))
    alone = float(_lab().DeepSpeedTrainer(engine).evaluate(unlabelled if rank() else batches))
    gone_through_once = (batch for batch in many_batches(rank()))
    with mock.patch.object(engine.module, "forward", lambda *given, **batch: SimpleNamespace(loss=_mean_label(batch["labels"]))):
        of_many = float(_lab().DeepSpeedTrainer(engine).evaluate(gone_through_once))
    calls = iter(range(len(before)))

    def diverged(module, given, output):
        return _times_nan(module, given, output) if next(calls) == len(before) - 1 and rank() == 1 else output

    engine.module.register_forward_hook(diverged)
    lost = float(_lab().DeepSpeedTrainer(engine).evaluate(batches))
    return facts | {
        "losses": gather([float(loss) for loss in losses]),
        "of_rank_0": gather(alone),
        "of_many": gather(of_many),
        "gradients": any(gather(any(gradients))),
        "of_nan": "nan" if math.isnan(lost) else lost,
        "of_nothing": "nan" if math.isnan(nothing) else nothing,
    }


def evaluate_between(experiment: Experiment, run: Run) -> dict:
    """Task 3.4: how far the weights after an optimizer step are from each other, with an evaluation within its accumulation and without."""
    rows, found = text_rows(experiment)[0], []
    batches = engine_runs.epoch_batches(rows, 0, experiment.micro_batch, world_size(), rank())
    for evaluates in (False, True):
        engine = engine_runs.build(experiment)
        for batch in batches[: experiment.accumulation]:
            engine_runs.micro_step(engine, batch)
            if evaluates:
                _lab().DeepSpeedTrainer(engine).evaluate(batches[-1:])
        found.append({name: weight.detach().cpu().clone() for name, weight in engine.module.named_parameters()})
    return {"apart": max((found[1][name] - weight).abs().max().item() for name, weight in found[0].items())}


MANY_BATCHES = 150


def many_batches(rank: int) -> list[dict[str, torch.Tensor]]:
    """More batches than a milestone would train on, of one long row each, where the mean loss of a row is that of its labels."""
    drawn, batches = torch.Generator().manual_seed(50 + rank), []
    for number in range(MANY_BATCHES):
        labels = torch.randint(0, 100 + number, (1, 1100), generator=drawn)
        labels[0, : int(torch.randint(0, 1000, (1,), generator=drawn))] = -100
        labels[0, int(torch.randint(1001, 1100, (1,), generator=drawn)) :] += 500
        batches.append({"input_ids": torch.zeros_like(labels), "attention_mask": torch.ones_like(labels), "labels": labels})
    return batches


def _mean_label(labels: torch.Tensor) -> torch.Tensor:
    counted = labels[:, 1:]
    return counted[counted != -100].double().mean()


def mean_of_many(ranks: int) -> float:
    """The mean over all labels of `many_batches` of so many ranks."""
    return _mean_label(torch.cat([batch["labels"] for at in range(ranks) for batch in many_batches(at)])).item()


class Batches:
    """Batches that can be gone through, again and again, and not be taken by number: as DeepSpeed's loader."""

    def __init__(self, batches):
        self.batches = list(batches)

    def __iter__(self):
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def masked_rows(experiment: Experiment) -> list[dict]:
    """Padded rows with labels to their end, up to 2 and up to 17 in turns, so that ranks differ in them, and a rank's batches too.

    Nothing predicts the first label of a row without padding; every fourth row has none at its first 5 tokens. Rank 0's first
    micro-batch has no labels at all.
    """
    without = [number * experiment.ranks for number in range(experiment.micro_batch)]

    def labelled(number: int) -> range:
        first = 5 if number % 4 == 1 else min(PADS[number % 3], 1)
        return range(0) if number in without else range(first, (10**6, 2, 17)[number % 3])

    return padded_rows(experiment, labelled)


CLIENT = {"note": [1, "two"], "rank": "any", "place": (1, 2), 3: {"four": 0.5}}


def fingerprints(state: dict) -> list[int]:
    """Of the states of the three generators that draw on the CPU; 0 where there is none."""
    return [
        fingerprint(state["torch"]) if "torch" in state else 0,
        zlib.crc32(repr(state.get("python")).encode()) if "python" in state else 0,
        zlib.crc32(repr(list(state["numpy"][1:])).encode()) if "numpy" in state else 0,
    ]


STEPS_BEFORE = 10
"""Optimizer steps that the engine counts from a life before, as after loading; DeepSpeed's count of micro-batches begins anew there."""


OLDER, FEW_STEPS = (3, 4, 5, 6, 7, 8), 4


def save(experiment: Experiment, run: Run) -> dict:
    """Task 3.5: two checkpoints, and attempts between two micro-batches, before and after them."""
    engine, rows = engine_runs.build(experiment), text_rows(experiment)[0]
    batches = iter(engine_runs.epoch_batches(rows, 0, experiment.micro_batch, world_size(), rank()))
    trainer = _lab().DeepSpeedTrainer(engine)
    trainer.epoch, trainer.samples = 3, 8
    folder = run.folder / "checkpoints"

    def refusals() -> list[str]:
        """What is said after each micro-batch of an accumulation but the last."""
        said = []
        for _ in range(experiment.accumulation - 1):
            engine_runs.micro_step(engine, next(batches))
            try:
                trainer.save_checkpoint(folder, {})
                said.append("")
            except ValueError as error:
                said.append(str(error))
            barrier()
        return said

    refused = refusals()
    engine_runs.micro_step(engine, next(batches))
    for number, seed in enumerate((torch.manual_seed, random.seed, numpy.random.seed)):
        seed(100 * number + rank())
    numpy.random.random(5)
    engine.global_steps += STEPS_BEFORE
    tag = f"step-{engine.global_steps}"
    wanted = gather(fingerprints(_lab().random_state()))
    # What an earlier life of the run left behind.
    manifest, save_checkpoint = folder / tag / "complete.json", engine.save_checkpoint
    older, newer = folder / "step-2" / "complete.json", folder / "step-99" / "complete.json"
    if rank() == 0:
        manifest.parent.mkdir(parents=True)
        for path in (older, newer, *(folder / f"step-{number}" / "complete.json" for number in OLDER)):
            path.parent.mkdir()
            path.write_text('{"ranks": 2, "universal": false, "files": {}}')
        manifest.write_text('{"ranks": 2, "universal": false, "files": {}}')
    barrier()
    complete_at_first: list[bool] = []
    left_out: list[bool] = []

    def saving(*args, **kwargs):
        complete_at_first.append(manifest.exists())
        given = inspect.signature(save_checkpoint).bind(*args, **kwargs).arguments
        left_out.append(bool(given.get("exclude_frozen_parameters", False)))
        return save_checkpoint(*args, **kwargs)

    engine.save_checkpoint = saving
    module = switch.import_exercise("lab03_engine")
    write_manifest = module.write_manifest

    def written_slowly(*args, **kwargs):
        time.sleep(0.5)  # or another rank would come back after it by chance
        return write_manifest(*args, **kwargs)

    with mock.patch.object(module, "write_manifest", written_slowly):
        returned = trainer.save_checkpoint(folder, CLIENT)
        complete_on_return = manifest.exists()
    complete, at_first = gather(complete_on_return), gather(list(complete_at_first))
    engine.global_steps, steps = FEW_STEPS, engine.global_steps
    first = trainer.save_checkpoint(str(run.folder / "fresh"), None)
    engine.global_steps = steps
    refused += refusals()
    return {
        "kept": gather(manifest.exists()),
        "is_path": all(gather(isinstance(returned, Path) and isinstance(first, Path))),
        "returned_by_rank": gather(str(returned)),
        "first": gather(Path(run.folder, "fresh", f"step-{FEW_STEPS}", "complete.json").exists()),
        "first_returned": str(first),
        "frozen_left_out": any(gather(any(left_out))),
        "older_kept": gather(older.exists() and all((folder / f"step-{number}").is_dir() for number in OLDER)),
        "newer_kept": gather(newer.exists()),
        "refused": gather(refused),
        "random": wanted,
        "returned": str(returned),
        "complete_at_first": at_first,
        "complete_on_return": complete,
    }


def load(experiment: Experiment, run: Run) -> dict:
    """Task 3.6: load with the exercise, and go on without it."""
    lab, options = _lab(), experiment.options

    asked = []

    def check(folder, ranks):
        """Stands in for task 3.7."""
        asked.append(ranks)
        if not Path(folder, "complete.json").exists() or Path(folder, "damaged").exists():
            raise ValueError(f"{folder} is half-written or damaged")
        return {"ranks": ranks, "universal": False, "files": {}}

    switch.import_exercise("lab03_engine").check_checkpoint = check
    engine = engine_runs.build(experiment)
    trainer = lab.DeepSpeedTrainer(engine)
    refused = ""
    try:
        trainer.load_checkpoint(options["checkpoints"], options["broken"])
    except ValueError as error:
        refused = str(error)
    try:
        trainer.load_checkpoint(Path(options["checkpoints"], "nothing"))
        nothing = "no error"
    except ValueError:
        nothing = ""
    barrier()
    untouched, load_checkpoint, strict, states = engine.global_steps == 0, engine.load_checkpoint, [], []

    def loading(*args, **kwargs):
        given = inspect.signature(load_checkpoint).bind(*args, **kwargs).arguments
        strict.append(bool(given.get("load_module_strict", True)))
        states.append(load_checkpoint(*args, **kwargs))
        return states[-1]

    engine.load_checkpoint = loading
    client = trainer.load_checkpoint(Path(options["checkpoints"]), options.get("tag"))
    position = {"epoch": trainer.epoch, "samples": trainer.samples, "global_steps": engine.global_steps}
    mine = trainer.random_state_to_restore
    restored = mine is not None and _same_random(mine, states[-1][1]["random"][rank()])
    engine_runs.go_on(
        engine, experiment, run, epoch=trainer.epoch, samples=trainer.samples, before_first=trainer.restore_random_state
    )
    return {
        "refused": refused,
        "untouched": untouched,
        "client": repr(client)[:300],
        "position": position,
        "restored": all(gather(restored)),
        "nothing": nothing,
        "asked": gather(asked),
        "strict": all(strict),
    }


def _same_random(mine: dict, saved: dict) -> bool:
    """Whether two states of the random generators are one."""
    name, keys, *position = mine["numpy"]
    same_numpy = name == saved["numpy"][0] and list(keys) == list(saved["numpy"][1]) and position == list(saved["numpy"][2:])
    return mine["python"] == saved["python"] and same_numpy and torch.equal(mine["torch"], saved["torch"])


def load_of_other_ranks(saved: int, here: int, me: int = 0, client=None, tag: str | None = "step-3") -> dict:
    """Task 3.6: what rank `me` of `here` takes from a checkpoint that `saved` ranks have made, with DeepSpeed's part stood in for."""
    from types import SimpleNamespace

    lab, asked, left_out = _lab(), [], []
    state = {"epoch": 2, "samples": 12, "random": [{"of": number} for number in range(saved)], "client": client}
    facts = {"ranks": saved, "universal": True, "files": {}}

    def check(folder, ranks):
        asked.append(ranks)
        return facts

    from deepspeed import DeepSpeedEngine

    def load(*args, **kwargs):
        given = inspect.signature(DeepSpeedEngine.load_checkpoint).bind(None, *args, **kwargs).arguments
        left_out.extend(name for name, value in given.items() if value is (name == "load_module_only"))
        return "folder", copy.deepcopy(state)

    def newest(path, ranks):
        asked.append(ranks)
        return Path(path, "step-3")

    engine = SimpleNamespace(load_checkpoint=load, zero_optimization_stage=lambda: 0)
    stand_ins = {"check_checkpoint": check, "newest_whole": newest, "world_size": lambda: here, "rank": lambda: me}
    with contextlib.ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch.object(switch.import_exercise("lab03_engine"), name, stand_in))
        trainer = lab.DeepSpeedTrainer(engine)
        trainer.random_state_to_restore = {"of": "a checkpoint that was loaded before"}
        returned = trainer.load_checkpoint("checkpoints", tag)
    place, random_state = [trainer.epoch, trainer.samples], trainer.random_state_to_restore
    return {"client": returned, "place": place, "random": random_state, "asked": sorted(set(asked)), "left_out": left_out}


def convert(source, parent) -> dict:
    """Task 3.9: convert, and note what DeepSpeed's converter was asked for, and how many random states are in what came of it, by file."""
    from deepspeed.checkpoint import ds_to_universal

    asked, main = [], ds_to_universal.main

    def noting(arguments):
        asked.append({name: getattr(arguments, name, None) for name in ("strict", "keep_temp_folder")})
        return main(arguments)

    with mock.patch.object(ds_to_universal, "main", noting):
        out = _lab().convert_to_universal(source, parent)
    kept = {}
    for states in Path(source).glob("*model_states.pt"):
        converted = Path(out, states.name)
        state = torch.load(converted, weights_only=False, map_location="cpu") if converted.exists() else {}
        kept[states.name] = sum(isinstance(of_a_rank, dict) for of_a_rank in state.get("random") or ())
    return {"returned": out, "asked": asked, "random_states": kept}


def convert_of_many_ranks(source, parent, ranks: int) -> dict:
    """Task 3.9: what is written for a checkpoint of so many ranks, with a stand-in for DeepSpeed's converter."""
    from deepspeed.checkpoint import ds_to_universal

    for number in range(ranks):
        Path(source).mkdir(parents=True, exist_ok=True)
        Path(source, f"zero_pp_rank_{number}_mp_rank_00_optim_states.pt").write_bytes(b"x")
    Path(source, "complete.json").write_text(json.dumps({"ranks": ranks, "universal": False, "files": {}}))

    def convert_nothing(arguments):
        Path(arguments.output_folder, "zero").mkdir(parents=True)

    with mock.patch.object(ds_to_universal, "main", convert_nothing):
        out = _lab().convert_to_universal(source, parent)
    return {"returned": str(out), "ranks": json.loads(Path(out, "complete.json").read_text())["ranks"]}


def consolidate_next_to_a_gpu(folder, base_model: str, out) -> str:
    """Task 3.8: where the model that comes back is, on a machine where torch sees a GPU."""
    with pretended.gpu() as gpu:
        model = _lab().consolidate(folder, base_model, out)
        return "GPU" if any(gpu.holds(parameter) for parameter in model.parameters()) else "CPU"


def continue_universal(experiment: Experiment, run: Run) -> dict:
    """Task 3.9: go on from a converted checkpoint, and save into the run folder."""
    options = experiment.options | {"checkpoints": str(run.folder / "checkpoints")}
    return engine_runs.train(experiment.model_copy(update={"options": options}), run)
