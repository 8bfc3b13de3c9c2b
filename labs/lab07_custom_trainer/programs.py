"""What the milestones of lab 07 run around the exercises: trainings by the loop and by `Trainer`, and what passes in them."""

from __future__ import annotations

import contextlib
import itertools
import json
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from shardlab import switch
from shardlab.data.comments import UNKNOWN, comments
from shardlab.data.models import load_classifier, load_tokenizer
from shardlab.milestones.exercises import watched_exercises
from shardlab.run.collectives import gather, rank
from shardlab.run.experiment import Experiment
from shardlab.run.multilabel import Collator, Encoded, EpochOrder, TrainingConfig, TrainParams, train_by_hand
from shardlab.run.run_folder import Run

STEM = "lab07_custom_trainer"


def exercises():
    return watched_exercises(STEM)


# --- what is trained ------------------------------------------------------------------------------------------------


class Entries(nn.Module):
    """Binary cross-entropy of each entry, the milestones' own."""

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        unknown = labels == UNKNOWN
        targets = labels.masked_fill(unknown, 0).to(logits.dtype)
        return functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").masked_fill(unknown, 0)


def rows_of(count: int) -> Encoded:
    """Comments of which every fifth lacks most of its labels, so that batches differ in how many they have."""
    rows = comments("train", count)
    for number, row in enumerate(rows):
        if number % 5 == 0:
            row["labels"] = [UNKNOWN] * 12 + row["labels"][12:]
    return Encoded(rows, load_tokenizer("comment-tiny"), 64)


def plain_model() -> nn.Module:
    """comment-tiny without dropout, always with the same head."""
    model = load_classifier("comment-tiny", 16)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def collator() -> Collator:
    return Collator(load_tokenizer("comment-tiny").pad_token_id)


def hand(params: dict, count: int) -> list[float]:
    """The losses of the loop. Nothing of the exercises is in it."""
    return train_by_hand(plain_model(), rows_of(count), collator(), Entries(), TrainParams(**params))


# --- Trainer on ranks -----------------------------------------------------------------------------------------------


def own_settings(experiment: Experiment, run: Run) -> TrainingArguments:
    """The settings of the loop, the milestones' own."""
    return TrainingArguments(
        output_dir=str(run.folder / "trainer"),
        per_device_train_batch_size=experiment.micro_batch,
        gradient_accumulation_steps=experiment.accumulation,
        num_train_epochs=experiment.epochs,
        learning_rate=experiment.learning_rate,
        weight_decay=experiment.weight_decay,
        max_grad_norm=experiment.clipping,
        optim="adamw_torch",
        seed=experiment.seed,
        remove_unused_columns=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        deepspeed=experiment.deepspeed,
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
    )


class PlainTrainer(Trainer):
    """With the right loss and the loop's order: where the settings are judged."""

    model_accepts_loss_kwargs = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True

    def _get_train_sampler(self, train_dataset=None):
        return EpochOrder(len(self.train_dataset), self.args.seed, self.args.per_device_train_batch_size * self.args.world_size)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        return Entries()(outputs.logits, labels).sum() / num_items_in_batch * self.accelerator.num_processes


def config_of(experiment: Experiment, deepspeed: str | None = None) -> TrainingConfig:
    names = {"batch_size": "micro_batch", "grad_accum": "accumulation", "lr": "learning_rate"}
    params = {name: getattr(experiment, field) for name, field in names.items()}
    params |= {"weight_decay": experiment.weight_decay, "clipping": experiment.clipping, "seed": experiment.seed}
    return TrainingConfig(train_params=TrainParams(epochs=int(experiment.epochs), **params), deepspeed=deepspeed)


def evaluated(experiment: Experiment, run: Run) -> dict:
    """Task 7.3: the loss of an evaluation of all rows on all ranks, before training."""
    arguments = own_settings(experiment, run)
    arguments.per_device_eval_batch_size = 32 // experiment.ranks
    trainer = exercises().CustomTrainer(
        model=plain_model(), args=arguments, eval_dataset=rows_of(32), data_collator=collator(), loss=Entries()
    )
    trainer.remove_callback(PrinterCallback)
    loss = trainer.evaluate()["eval_loss"]
    shape = list(trainer.predict(rows_of(32)).predictions.shape)
    batch = collator()([rows_of(8)[n] for n in range(6)])
    batch = {name: tensor.to(trainer.args.device) for name, tensor in batch.items()}
    with torch.no_grad():
        alone = float(trainer.compute_loss(trainer.model.eval(), batch))
    return {"eval_loss": loss, "shape": shape, "alone": alone} if rank() == 0 else {}


def evaluation_loss(count: int, of: int) -> float:
    """The mean over all labels of the first rows of so many. Nothing of the exercises is in it."""
    rows = rows_of(of)
    batch, model = collator()([rows[n] for n in range(count)]), plain_model().eval()
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return (Entries()(logits, batch["labels"]).sum() / (batch["labels"] != UNKNOWN).sum()).item()


def losses_of(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def by_settings(experiment: Experiment, run: Run) -> dict:
    """Task 7.2: losses of a `Trainer` with the exercise's settings, and with the experiment's DeepSpeed, which they get as a file."""
    file = None
    if experiment.deepspeed is not None:
        file = str(run.folder / f"zero-of-rank-{rank()}.json")
        Path(file).write_text(json.dumps(experiment.deepspeed))
    config = config_of(experiment, file)
    arguments = exercises().trainer_arguments(config, run.folder / "trainer", disable_tqdm=True)
    rows = rows_of(experiment.train_examples)
    trainer = PlainTrainer(model=plain_model(), args=arguments, train_dataset=rows, data_collator=collator())
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return {"losses": losses_of(trainer), "deepspeed": trainer.is_deepspeed_enabled}


class Look(TrainerCallback):
    """What lies in the gradients before the first step, and whether the embeddings are where they were."""

    def __init__(self, model: nn.Module):
        self.before = model.get_input_embeddings().weight.detach().cpu().clone()
        self.gradients, self.moved = {}, None

    def on_pre_optimizer_step(self, args, state, control, model=None, **others):
        if self.moved is None:
            weight = model.get_input_embeddings().weight.detach().cpu()
            self.moved = int((weight != self.before).sum()) if weight.shape == self.before.shape else -1
            self.gradients = {name: short(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def short(tensor: torch.Tensor) -> list[float]:
    """A tensor in three numbers: its norm, its sum, and its product with fixed random numbers."""
    flat = tensor.detach().double().flatten().cpu()
    draw = torch.Generator().manual_seed(flat.numel())
    return [flat.norm().item(), flat.sum().item(), (flat @ torch.randn(flat.numel(), generator=draw, dtype=torch.float64)).item()]


def by_trainer(experiment: Experiment, run: Run) -> dict:
    """Tasks 7.3 and 7.4: a training by `CustomTrainer` with the milestones' own settings. `options`: `fgm`, its epsilon;
    then the loss is the milestones' own."""
    model = plain_model()
    look = Look(model) if experiment.deepspeed is None else None
    weight = model.get_input_embeddings().weight
    kind, epsilon = exercises().CustomTrainer, experiment.options.get("fgm", 0.0)
    if epsilon:
        kind = type("WithOwnLoss", (kind,), {"compute_loss": PlainTrainer.compute_loss})
    trainer = kind(
        model=model,
        args=own_settings(experiment, run),
        train_dataset=rows_of(experiment.train_examples),
        data_collator=collator(),
        callbacks=[look] if look else [],
        loss=Entries(),
        fgm_epsilon=epsilon,
    )
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train()
    except ValueError as error:
        return {"refused": str(error)}
    hooks = len(weight._backward_hooks or {})
    found = {"losses": losses_of(trainer), "hooks": hooks}
    if look and rank() == 0:
        found |= {"moved": look.moved, "gradients": look.gradients}
    return found


def fgm_step(count: int, micro_batch: int, accumulation: int, epsilon: float, seed: int) -> dict:
    """The first step by FGM: its loss, and gradients in three numbers each. Nothing of the exercises is in it."""
    model, rows, collate = plain_model(), rows_of(count), collator()
    model.train()
    weight, numbers = model.get_input_embeddings().weight, list(EpochOrder(count, seed, micro_batch))
    batches = [collate([rows[n] for n in numbers[b * micro_batch : (b + 1) * micro_batch]]) for b in range(accumulation)]
    given = sum((batch["labels"] != UNKNOWN).sum() for batch in batches)
    total = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}

    def add(batch) -> tuple[torch.Tensor, float]:
        model.zero_grad()
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = Entries()(logits, batch["labels"]).sum() / given
        loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] += parameter.grad
        return weight.grad.clone(), loss.item()

    clean = 0.0
    for batch in batches:
        (gradient, loss), kept = add(batch), weight.detach().clone()
        clean += loss
        with torch.no_grad():
            weight.add_(epsilon * gradient / gradient.norm())
        add(batch)
        with torch.no_grad():
            weight.copy_(kept)
    return {"loss": clean, "gradients": {name: short(gradient) for name, gradient in total.items()}}


@contextlib.contextmanager
def lone_trainer(model: nn.Module, **changes):
    """A `CustomTrainer` of this process alone, for one call."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, report_to="none", use_cpu=True, per_device_eval_batch_size=4, remove_unused_columns=False
        )
        yield exercises().CustomTrainer(model=model, args=arguments, data_collator=collator(), loss=Entries(), **changes)


def gradient_without_labels() -> list[float]:
    """Task 7.3: largest gradient of a batch of which no label is known; nan is given as -1."""
    batch = collator()([rows_of(8)[n] for n in range(6)])
    batch["labels"] = torch.full_like(batch["labels"], UNKNOWN)
    model = plain_model()
    with lone_trainer(model) as trainer:
        trainer.compute_loss(model, batch).backward()
    gradients = [p.grad.abs().max().item() for p in model.parameters() if p.grad is not None]
    return [-1.0 if gradient != gradient else gradient for gradient in gradients]


def loss_of_diverged() -> str:
    """Task 7.3: the loss of a model whose logits are no numbers any more, as text."""
    model = plain_model().eval()
    torch.nn.init.constant_(model.classifier.out_proj.bias, float("nan"))
    with lone_trainer(model) as trainer, torch.no_grad():
        return str(float(trainer.compute_loss(model, collator()([rows_of(8)[n] for n in range(6)]))))


def loss_of_batch(number: int | None, known: int | None) -> dict:
    """Task 7.3: `compute_loss` called by itself, with and without outputs. `known`: so many labels are known, in the first row."""
    batch = collator()([rows_of(8)[n] for n in range(6)])
    if known is not None:
        batch["labels"] = torch.full_like(batch["labels"], UNKNOWN)
        batch["labels"][0, :known] = 1
    model = plain_model().eval()
    batch["position_ids"] = torch.arange(2, 2 + batch["input_ids"].shape[1]).expand_as(batch["input_ids"])  # RoBERTa's begin at 2
    keys, labels, seen = sorted(batch), batch["labels"].clone(), []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(sorted(kwargs)), with_kwargs=True)
    with lone_trainer(model) as trainer, torch.no_grad():
        given = None if number is None else torch.tensor(number)
        loss = trainer.compute_loss(model, batch, num_items_in_batch=given)
        both = trainer.compute_loss(model, batch, return_outputs=True, num_items_in_batch=given)
        right = Entries()(model(**{name: batch[name] for name in batch if name != "labels"}).logits, labels).sum().item()
    kept = sorted(batch) == keys and torch.equal(batch["labels"], labels)
    logits = getattr(both[1], "logits", None) if isinstance(both, tuple) and len(both) == 2 else None
    return {
        "loss": float(loss),
        "second": float(both[0]) if isinstance(both, tuple) else None,
        "logits": list(logits.shape) if logits is not None else None,
        "kept": kept,
        "saw_labels": "labels" in seen[0],
        "saw_positions": "position_ids" in seen[0],
        "sum": right,
        "known": int((labels != UNKNOWN).sum()),
    }


# --- pieces ---------------------------------------------------------------------------------------------------------


def entries_of(kind: str, settings: dict, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None) -> dict:
    """Task 7.1: a loss of each entry, and the gradient of their sum by the logits."""
    given = settings | ({"class_weights": weights} if weights is not None else {})
    before, logits = labels.clone(), logits.clone().requires_grad_()
    losses = getattr(exercises(), kind)(**given)(logits, labels)
    losses.sum().backward()
    return {"losses": losses.detach(), "gradient": logits.grad, "kept": torch.equal(labels, before)}


def refused(kind: str, settings: dict) -> str:
    """Task 7.1: the text of the ValueError; empty without one."""
    try:
        getattr(exercises(), kind)(**settings)
    except ValueError as error:
        return str(error) or "a ValueError without a text"
    return ""


def arguments_of(values: dict, **overrides) -> dict:
    """Task 7.2: what the settings say, as plain values."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainingConfig(train_params=TrainParams(**values))
        found = exercises().trainer_arguments(config, Path(folder, "out"), **overrides)
        said = {key: value for key, value in found.to_dict().items() if isinstance(value, int | float | str | type(None))}
        return said | {"inside": found.output_dir == str(Path(folder, "out")), "report_to": list(found.report_to)}


def asked_for(gpu: bool, **overrides) -> dict:
    """Task 7.2: what `TrainingArguments` is asked for where torch sees a GPU, and where it sees none, with a DeepSpeed file."""
    from unittest import mock

    lab, asked = switch.import_exercise(STEM), []
    ask = lambda *args, **given: asked.append(given)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        file = Path(folder, "zero.json")
        file.write_text("{}")
        stack.enter_context(mock.patch("transformers.TrainingArguments", ask))
        for name in [name for name, value in vars(lab).items() if value is TrainingArguments]:
            stack.enter_context(mock.patch.object(lab, name, ask))
        stack.enter_context(mock.patch("torch.cuda.is_available", lambda: gpu))
        stack.enter_context(mock.patch("torch.cuda.device_count", lambda: int(gpu)))
        lab.trainer_arguments(TrainingConfig(deepspeed=str(file)), "out", **overrides)
    said = {name: bool(asked[0].get(name)) for name in ("use_cpu", "bf16", "fp16", "tf32")}
    return said | {"deepspeed": asked[0].get("deepspeed") is not None}


def fgm_by_itself(gradient: list[float] | None, dtype: str, epsilon: float) -> dict:
    """Task 7.4: embeddings before, after `attack` and after `restore`; and after a change and a second `restore`."""
    model = load_classifier("comment-tiny", 16).to(getattr(torch, dtype))
    weight = model.get_input_embeddings().weight
    others = {name: parameter.clone() for name, parameter in model.named_parameters() if parameter is not weight}
    given = torch.zeros_like(weight, dtype=torch.float32)
    given[5, :3] = torch.tensor(gradient or [0.0, 0.0, 0.0])
    before = weight.detach().clone()
    fgm = exercises().FGM(model, epsilon)
    handed = given.to(weight.dtype)
    fgm.attack(handed)
    kept = torch.equal(handed.nan_to_num(7.0), given.to(weight.dtype).nan_to_num(7.0))
    moved = (weight.detach().float() - before.float())[5, :3].tolist()
    elsewhere = int((weight != before).sum()) - int((weight[5, :3] != before[5, :3]).sum())
    fgm.restore()
    back = torch.equal(weight, before)
    with torch.no_grad():
        weight.add_(1.0)
    fgm.restore()
    stays = torch.equal(weight.detach(), before + 1.0)
    same = all(torch.equal(parameter, others[name]) for name, parameter in model.named_parameters() if name in others)
    return {"moved": moved, "elsewhere": elsewhere, "back": back, "stays": stays, "same": same, "kept": kept}


def fgm_refused(sharded: bool) -> str:
    """Task 7.4: what is said of embeddings that ZeRO-3 has sharded, or that are frozen."""
    model = load_classifier("comment-tiny", 16)
    weight = model.get_input_embeddings().weight
    if sharded:
        weight.ds_id = 0
    else:
        weight.requires_grad_(False)
    try:
        exercises().FGM(model, 0.5)
    except ValueError as error:
        return str(error) or "a ValueError without a text"
    return ""


def hooks_after_a_failure() -> int:
    """Task 7.4: hooks on the embeddings after a first pass that has failed."""

    class Failing(nn.Module):
        def forward(self, logits, labels):
            raise RuntimeError("the loss fails")

    model, batch = plain_model(), collator()([rows_of(8)[n] for n in range(4)])
    with lone_trainer(model, fgm_epsilon=0.5) as trainer:
        trainer.loss = Failing()
        with contextlib.suppress(RuntimeError):
            trainer.training_step(model, batch, torch.tensor(60))
    return len(model.get_input_embeddings().weight._backward_hooks or {})


def passes_of_a_step(known: bool) -> int:
    """Task 7.4: how often the model is asked in a step, where labels are known, and where none is, so that no gradient says where."""
    model, batch = plain_model(), collator()([rows_of(8)[n] for n in range(4)])
    if not known:
        batch["labels"] = torch.full_like(batch["labels"], UNKNOWN)
    calls = []
    model.register_forward_pre_hook(lambda module, args: calls.append(1))
    with lone_trainer(model, fgm_epsilon=0.5) as trainer:
        trainer.training_step(model, batch, torch.tensor(60))
    return len(calls)


def head(samples: int, dropout: float, training: bool, seed: int) -> dict:
    """Task 7.5: a head's logits of random features, twice, and what they are without dropout."""
    torch.manual_seed(seed)
    made = exercises().MultiSampleDropoutHead(64, 7, samples=samples, dropout=dropout).train(training)
    features = torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(1))
    matrix = next(parameter for parameter in made.parameters() if parameter.dim() == 2)
    bias = next(parameter for parameter in made.parameters() if parameter.dim() == 1)
    return {
        "logits": made(features).detach(),
        "again": made(features).detach(),
        "shapes": [list(parameter.shape) for parameter in made.parameters()],
        "exact": (features[:, 0] @ matrix.T + bias).detach(),
    }


def dropped(dropout: float, rows: int) -> dict:
    """Task 7.5: a head of one sample that passes each entry on: how many are 0, what the others are, how many rows differ."""
    torch.manual_seed(4)
    made = exercises().MultiSampleDropoutHead(64, 64, samples=1, dropout=dropout).train()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.eye(64) if parameter.dim() == 2 else torch.zeros(64))
    logits = made(torch.ones(rows, 2, 64)).detach()
    return {
        "zeros": (logits == 0).float().mean().item(),
        "others": logits.max().item(),
        "patterns": len(set(map(tuple, logits.tolist()))),
    }


def augmented(ids: list[int], settings: list[dict], busy: bool) -> dict:
    """Task 7.5: the results of several calls; `busy`: others have drawn random numbers in between."""
    import random

    import numpy

    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    states = (random.getstate(), torch.get_rng_state().clone(), numpy.random.get_state()[1].tolist())
    if busy:
        random.random(), torch.rand(1), numpy.random.rand()
        states = (random.getstate(), torch.get_rng_state().clone(), numpy.random.get_state()[1].tolist())
    function = exercises().augment
    results = [function(list(ids), **given) for given in settings]
    now = (random.getstate(), torch.get_rng_state(), numpy.random.get_state()[1].tolist())
    drawn = [
        name
        for name, a, b in zip(("random", "torch", "numpy"), states, now)
        if not (torch.equal(a, b) if torch.is_tensor(a) else a == b)
    ]
    return {"results": results, "drawn": drawn}


def augmented_alike(ids: list[int], settings: dict) -> list[dict]:
    """Task 7.5: two of thousands of seeds, epochs and rows for which the same tokens are masked; empty if there are no two."""
    function, seen = switch.import_exercise(STEM).augment, {}  # unwatched: watching a call costs more than the call
    for longest in ("seed", "epoch", "row"):
        few = {"seed": range(2), "epoch": range(2), "row": range(2)} | {longest: range(1300)}
        for place in itertools.product(few["seed"], few["epoch"], few["row"]):
            place = dict(zip(("seed", "epoch", "row"), place))
            masked = tuple(function(list(ids), **settings, **place))
            if seen.setdefault(masked, place) != place:
                return [seen[masked], place]
    return []


def augmented_on_ranks(experiment: Experiment, run: Run) -> dict:
    """Task 7.5: what each rank masks; the hash of a text is another there than here. `options`: `ids`, `given`."""
    given = experiment.options["given"] | {"special_ids": set(experiment.options["given"]["special_ids"])}
    return {"results": gather(exercises().augment(list(experiment.options["ids"]), **given))}


def lora(rank_of_update: int, targets: tuple[str, ...], width: int = 0) -> dict:
    """Task 7.6: trained parameters, calculated and found; the adapted model and the merged one; what a checkpoint holds."""
    from safetensors.torch import load_file

    lab = switch.import_exercise(STEM)  # unwatched: peft freezes the very model that it is given
    model = small_encoder(width) if width else load_classifier("comment-tiny", 16)
    model.eval()
    calculated = lab.lora_parameters(model, rank_of_update, tuple(targets))
    batch = load_tokenizer("comment-tiny")(["TODO: a tree", "Returns the list of the node."], padding=True, return_tensors="pt")
    plain = model(**batch).logits.detach().clone()
    adapted = lab.add_lora(model, rank_of_update, tuple(targets), alpha=12.0)
    adapted.eval()
    trained = {name: parameter.numel() for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    first = adapted(**batch).logits.detach().clone()
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    there = adapted(**batch).logits.detach().clone()
    adapted.train()
    before = [(name, parameter.requires_grad) for name, parameter in adapted.named_parameters()]
    merged = lab.merged(adapted)
    same = adapted.training and before == [(name, parameter.requires_grad) for name, parameter in adapted.named_parameters()]
    adapted.eval()
    merged.eval()
    there_again = adapted(**batch).logits.detach().clone()
    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder)
        saved = sum(tensor.numel() for file in Path(folder).glob("*.safetensors") for tensor in load_file(file).values())
    kinds = {type(module).__module__.split(".")[0] for module in merged.modules()}
    layers = [module for module in adapted.modules() if hasattr(module, "lora_A")]
    dropped = [getattr(dropout, "p", 0.0) for module in layers for dropout in module.lora_dropout.values()]
    return {
        "calculated": calculated,
        "trained": sum(trained.values()),
        "names": sorted(trained),
        "plain": plain,
        "first": first,
        "there": there,
        "there_again": there_again,
        "merged": merged(**batch).logits.detach().clone(),
        "kinds": sorted(kinds),
        "same": same,
        "saved": saved,
        "scale": layers[0].scaling.get("default") if layers else None,
        "dropout": max(dropped, default=0.0),
    }


def small_encoder(width: int, vocabulary: int = 800) -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 3 * width}
    return RobertaForSequenceClassification(RobertaConfig(vocab_size=vocabulary, num_labels=5, max_position_embeddings=70, **sizes))


def four_words():
    """A tokenizer that knows no word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")


def lora_counted(targets: tuple[str, ...], head: int) -> int:
    """Task 7.6: `lora_parameters` of a small encoder with a head of one layer of so many labels."""
    model = small_encoder(16)
    model.classifier = nn.Linear(16, head)
    return exercises().lora_parameters(model, 2, tuple(targets))


def lora_refused(targets: tuple[str, ...]) -> str:
    try:
        switch.import_exercise(STEM).add_lora(small_encoder(16), 2, tuple(targets))
    except ValueError as error:
        return str(error) or "a ValueError without a text"
    return ""


def read_file(name: str, text: str, others: dict[str, str]) -> dict:
    """Task 7.10: what comes of a YAML file with others beside it; files of the same names lie in the current folder too."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as current, contextlib.chdir(current):
        for beside in (folder, current):
            for other, content in others.items():
                Path(beside, other).parent.mkdir(parents=True, exist_ok=True)
                Path(beside, other).write_text(content)
        path = Path(folder, name)
        path.write_bytes(text.encode("latin-1" if name.startswith("latin") else "utf-8"))
        try:
            found = exercises().load_training_config(str(path))
        except ValueError as error:
            return {"refused": str(error)}
        except Exception as error:
            return {"refused": f"{type(error).__name__} in the place of ValueError"}
        said = found.model_dump()
        if said["deepspeed"] is not None:
            given = Path(said["deepspeed"])
            said["deepspeed"] = [given.is_file() and given.resolve().is_relative_to(Path(folder).resolve()), given.name]
        return {"config": said}


def missing_file() -> str:
    """Task 7.10: the kind of error where the YAML file is not there."""
    try:
        exercises().load_training_config("/no/such/folder/config.yaml")
    except Exception as error:
        return type(error).__name__
    return ""


@contextlib.contextmanager
def package_that_fails(name: str, damage: str):
    """Meanwhile a package cannot be imported: it is not there, or another one is, which consists of the line `damage`."""
    import importlib
    import sys

    hidden = {module: sys.modules[module] for module in list(sys.modules) if name and module.partition(".")[0] == name}
    with tempfile.TemporaryDirectory() as folder:
        if damage:
            Path(folder, f"{name}.py").write_text(damage)
            sys.path.insert(0, folder)
            importlib.invalidate_caches()
            for module in hidden:
                del sys.modules[module]
        elif name:
            # Not mock.patch.dict: it would forget all modules that are imported meanwhile.
            sys.modules.update(dict.fromkeys([*hidden, name]))
        try:
            yield
        finally:
            if damage:
                sys.path.remove(folder)
                sys.path_importer_cache.pop(folder, None)
            if name:
                sys.modules.pop(name, None)
            sys.modules.update(hidden)


def validated(text: str, others: dict[str, str], without: str = "", damage: str = "", settings: str = "") -> list:
    """Task 7.11: what is found for a YAML file; `without` is a package that cannot be imported.

    `MODEL` in the text becomes a folder with a model that knows fewer tokens than its tokenizer has, `WEIGHTLESS` one with a model
    that has no weights, and `FOUR` one that knows four tokens, as its own tokenizer does. With `settings`, `trainer_arguments`
    raises an error with this text.
    """
    from unittest import mock

    import deepspeed  # noqa: F401  # sets a variable of the environment when it is imported

    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as elsewhere:
        for other, content in others.items():
            Path(folder, other).write_text(content)
        path = Path(folder, "config.yaml")
        model = Path(folder, "model")
        if kind := next((kind for kind in ("MODEL", "WEIGHTLESS", "FOUR") if kind in text), None):
            small_encoder(16, vocabulary={"MODEL": 3, "WEIGHTLESS": 800, "FOUR": 4}[kind]).save_pretrained(model)
            (four_words() if kind == "FOUR" else load_tokenizer("comment-tiny")).save_pretrained(model)
            if kind == "WEIGHTLESS":
                Path(model, "model.safetensors").unlink()
            text = text.replace(kind, str(model))
        if text:
            path.write_text(text)
        before = sorted(Path(folder).iterdir())
        refused = mock.patch.object(switch.import_exercise(STEM), "trainer_arguments", side_effect=RuntimeError(settings))
        with (
            package_that_fails(without, damage),
            mock.patch("tempfile.tempdir", elsewhere),
            refused if settings else contextlib.nullcontext(),
        ):
            found = exercises().validate_setup(str(path))
        left = sorted(Path(folder).iterdir()) != before or list(Path(elsewhere).iterdir())
        return [list(pair) for pair in found] + [["left", "files" if left else ""]]
