"""What the milestones of lab 08 run around the exercises: small GPT-2s on ranks, and what the parts of the project leave behind."""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import io
import json
import math
import os
import shutil
import tempfile
import time
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from torch.nn import functional

from shardlab import switch
from shardlab.milestones.exercises import watched_exercises
from shardlab.run.collectives import gather, rank, world_size
from shardlab.run.experiment import Experiment
from shardlab.run.run_folder import Run

STEM = "lab08_language_model"
END, START, FILL = "<|endoftext|>", "<|start|>", "[FILL]"
TEXT = "def add(a, b): Return the sum of a and b. Raise ValueError if one is below zero; see help(add), naïve naïve naïve."
LENGTH, ROWS, STEPS = 12, 4, 6


def exercises():
    return watched_exercises(STEM)


def given(name: str) -> ModuleType:
    """A file of `my_project` that imports nothing of the exercises."""
    spec = importlib.util.spec_from_file_location(f"lab08_{name}", Path(__file__).parent / "my_project" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- small models and tokenizers ------------------------------------------------------------------------------------


@cache
def tokenizer_of(*, end: bool = True, fill: bool = False, start: bool = False, fill_first: bool = False):
    """A byte-level tokenizer as GPT-2's, for texts of 16 tokens as it says. `start`: one that puts a token in front of each text,
    as Llama's does. `fill_first`: the token to fill up with has the number 0, as T5's."""
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = ByteLevelBPETokenizer()
    words.train_from_iterator(
        [TEXT] * 3, vocab_size=300, special_tokens=[FILL, START, END] if fill_first else [END, START, FILL], show_progress=False
    )
    if start:
        words._tokenizer.post_processor = TemplateProcessing(
            single=f"{START} $A", special_tokens=[(START, words.token_to_id(START))]
        )
    names = {"eos_token": END} if end else {}
    names |= {"bos_token": START} if start else {}
    names |= {"pad_token": FILL} if fill else {}
    return PreTrainedTokenizerFast(tokenizer_object=words._tokenizer, model_max_length=16, **names)


def small_gpt2(*, dropout: float = 0.0, seed: int = 0, layers: int = 2, spread: float = 0.3, vocabulary: int = 300) -> nn.Module:
    """A GPT-2 with random weights, always the same ones; `spread` is that of its weights, so large that answers differ."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=vocabulary,
            n_positions=32,
            n_embd=32,
            n_layer=layers,
            n_head=2,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            initializer_range=spread,
            bos_token_id=0,
            eos_token_id=0,
        )
        return GPT2LMHeadModel(config)


# --- 8.1 ------------------------------------------------------------------------------------------------------------


def tokenizer_facts(options: dict) -> dict:
    """What `get_tokenizer` gives for a tokenizer in a folder."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_of(**options).save_pretrained(folder)
        try:
            got = exercises().get_tokenizer(folder)
        except ValueError as error:
            return {"refused": str(error).replace(folder, "FOLDER")}
        return {"pad": got.pad_token, "eos": got.eos_token, "side": got.padding_side, "size": len(got)}


def preprocessed(texts: list[str], options: dict) -> dict:
    """What `Dataset.map` makes of documents with `preprocess_function`, in batches of two, and what a plain call gives."""
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer, function = tokenizer_of(**options), switch.import_exercise(STEM).preprocess_function
    rows = Dataset.from_dict({"text": texts})
    mapped = rows.map(
        lambda examples: function(examples, tokenizer),
        batched=True,
        batch_size=2,
        remove_columns=["text"],
        load_from_cache_file=False,
    )
    ids = mapped["input_ids"][:]
    plain = exercises().preprocess_function({"text": list(texts)}, tokenizer)
    return {
        "columns": mapped.column_names,
        "blank": exercises().preprocess_function({"text": [" ", ""]}, tokenizer),
        "ids": ids,
        "plain": [list(document) for document in plain["input_ids"]],
        "texts": [tokenizer.decode(document[:-1]) for document in ids],
        "ends": [document[-1] == tokenizer.eos_token_id for document in ids],
    }


# --- 8.2 and 8.3 ----------------------------------------------------------------------------------------------------


def blocks_of(documents: list[list[int]], length: int, filling: int, at: int | None = None) -> dict:
    """All blocks of `Blocks`, and the one of filling behind the last; or what it says of a number that is none."""
    lab = exercises()
    try:
        blocks = lab.Blocks(documents, length, filling)
        if at is not None:
            return {"refused": "", "got": str(blocks[at])}
    except (ValueError, IndexError) as error:
        return {"refused": type(error).__name__}
    found = [blocks[n] for n in range(len(blocks) + 1)]
    return {
        "number": len(blocks),
        "types": sorted({str(tensor.dtype) for block in found for tensor in block.values()}),
        "blocks": [{name: tensor.tolist() for name, tensor in block.items()} for block in found],
    }


def blocks_of_a_generator(documents: list[list[int]], length: int) -> list:
    """How many blocks there are, and the tokens of the first."""
    blocks = exercises().Blocks((document for document in documents), length, 0)
    return [len(blocks), blocks[0]["input_ids"].tolist()]


def shares(blocks: int, ranks: int, seed: int | None, epoch: int, first: int = 0) -> dict:
    """The numbers of each rank in an epoch, and how many it says it has."""
    lab, found = exercises(), {"numbers": [], "length": []}
    for rank_ in range(ranks):
        share = lab.Share(blocks, rank_, ranks, seed)
        share.begin(epoch, first)
        found["numbers"].append(list(share))
        found["length"].append(len(share))
        if list(share) != found["numbers"][-1]:
            found["numbers"][-1] = ["another order at the second pass of the same epoch"]
    return found


def loaders_of(blocks: int, batch_size: int, ranks: int, seed: int) -> dict:
    """The first tokens of the blocks in each batch of each rank and split, two epochs; is torch's generator as before?"""
    lab = exercises()
    splits = {name: OwnBlocks(count) for name, count in (("train", blocks), ("validation", blocks - 2), ("test", 3))}
    state, found = torch.get_rng_state(), {name: [] for name in splits}
    types = set()
    for rank_ in range(ranks):
        loaders = lab.get_dataloaders(splits, batch_size, rank=rank_, ranks=ranks, seed=seed)
        for name, loader in loaders.items():
            types.add(type(loader.sampler).__name__)
            epochs = []
            for epoch in (0, 1):
                loader.sampler.begin(epoch)
                epochs.append([batch["input_ids"][:, 0].tolist() for batch in loader])
            found[name].append(epochs)
    return {"batches": found, "untouched": bool(torch.equal(state, torch.get_rng_state())), "samplers": sorted(types)}


class OwnBlocks(torch.utils.data.Dataset):
    """Blocks of 2 that tell their number."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        if not 0 <= number <= self.count:
            raise IndexError(number)
        return {"input_ids": torch.tensor([number, 0]), "attention_mask": torch.ones(2, dtype=torch.long), "labels": torch.zeros(2)}


# --- 8.4 ------------------------------------------------------------------------------------------------------------


def rows_of_step(step: int, unpredicted: int = -100) -> dict[str, torch.Tensor]:
    """The rows of all ranks in a step. Rows differ in how much of them is filling: in the third step every other row is filling
    alone, in the fifth all rows are, and in the sixth one token is predicted in all. In the fourth two places are in no loss that
    are no filling."""
    draw = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(4, 300, (ROWS, LENGTH), generator=draw)
    kept = torch.tensor([LENGTH, 3, LENGTH - 2, 5]).roll(step)
    if step == 2:
        kept[1::2] = 0
    if step == 4:
        kept[:] = 0
    if step == 5:
        kept = torch.tensor([2, 1, 0, 0])
    mask = (torch.arange(LENGTH)[None] < kept[:, None]).long()
    labels = ids.masked_fill(mask == 0, unpredicted)
    if step == 3:
        labels[:, 2:4] = unpredicted
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def batches_of(steps: int, rank_: int, ranks: int, taken: list[int]):
    for step in range(steps):
        taken.append(step)
        yield {name: tensor[rank_::ranks] for name, tensor in rows_of_step(step).items()}


def sum_and_count(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The milestones' own cross-entropy, token by token."""
    kept = labels[:, 1:] != -100
    chosen = functional.log_softmax(logits[:, :-1].float(), -1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    return -(chosen * kept).sum(), int(kept.sum())


def losses_by_hand(steps: int, learning_rate: float) -> list[float]:
    """The losses of one process that has all rows, with plain SGD. Nothing of the exercises is in it."""
    model, losses = small_gpt2(spread=0.1), []
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    for step in range(steps):
        rows = rows_of_step(step)
        total, count = sum_and_count(
            model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits, rows["labels"]
        )
        loss = total / max(count, 1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


class SgdEngine:
    """torch alone with the calls of a DeepSpeed engine, SGD without clipping: a gradient of another size is seen."""

    def __init__(self, model: nn.Module, device: torch.device, learning_rate: float):
        self.module = model.to(device)
        several = torch.distributed.is_initialized() and world_size() > 1
        self.net = nn.parallel.DistributedDataParallel(self.module) if several else self.module
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=learning_rate)
        self.training = True

    def train(self, mode: bool = True) -> None:
        self.net.train(mode)

    def __call__(self, **inputs):
        return self.net(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def device_of_rank() -> torch.device:
    from shardlab import hardware

    return torch.device("cuda", torch.cuda.current_device()) if hardware.device() == "cuda" else torch.device("cpu")


def sgd_engine(experiment: Experiment, model: nn.Module):
    if experiment.deepspeed is None:
        return SgdEngine(model, device_of_rank(), experiment.learning_rate)
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=experiment.deepspeed)
    return engine


def trained(experiment: Experiment, run: Run) -> dict:
    """`train_epoch` on the rows of `rows_of_step`, of which each rank has its part. `options`: `steps`, or all batches."""
    lab, device = exercises(), device_of_rank()
    model = small_gpt2(spread=0.1)
    engine, taken, seen, stepped = sgd_engine(experiment, model), [], [], []
    step = engine.step

    def counted(*given, **named):
        stepped.append(1)
        return step(*given, **named)

    engine.step = counted
    model.register_forward_pre_hook(
        lambda module, args, inputs: seen.append((module.training, inputs["attention_mask"].sum().item())), with_kwargs=True
    )
    model.eval()
    batches = batches_of(STEPS, rank(), world_size(), taken)
    values = lab.train_epoch(engine, batches, device, experiment.options.get("steps"))
    losses, lazily = [], None
    for loss in values:
        lazily = [len(taken), len(stepped)] if lazily is None else lazily
        losses.append(loss)
    return {
        "losses": gather([loss if isinstance(loss, float) else f"a {type(loss).__name__}" for loss in losses]),
        "training": all(training for training, _ in seen),
        "masks": [mask for _, mask in seen],
        "taken": len(taken),
        "at_first": lazily,
    }


def sum_of_batch(logits: torch.Tensor, labels: torch.Tensor) -> dict:
    """`summed_loss`, the types of what it gives, and the gradient."""
    logits = logits.clone().requires_grad_()
    total, tokens = exercises().summed_loss(logits, labels)
    total.backward()
    return {
        "total": total.detach(),
        "tokens": int(tokens),
        "types": [str(total.dtype), str(getattr(tokens, "dtype", type(tokens).__name__))],
        "gradient": logits.grad,
    }


# --- 8.5 ------------------------------------------------------------------------------------------------------------

EVALUATED = 11


def own_rows(number: int, count: int) -> dict[str, torch.Tensor]:
    """Row `number` of those that are evaluated: of other lengths each, and the last ones empty."""
    draw = torch.Generator().manual_seed(500 + number)
    ids = torch.randint(4, 300, (LENGTH,), generator=draw)
    kept = 0 if number >= count else 2 + 5 * number % (LENGTH - 1)
    mask = (torch.arange(LENGTH) < kept).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def rows_to_evaluate(batch_size: int, rank_: int, ranks: int):
    """A rank's batches of `EVALUATED` rows; where they do not divide, the last ranks get an empty row."""
    numbers = list(range(-(-EVALUATED // ranks) * ranks))[rank_::ranks]
    for first in range(0, len(numbers), batch_size):
        rows = [own_rows(number, EVALUATED) for number in numbers[first : first + batch_size]]
        yield {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def bytes_of_tokens() -> torch.Tensor:
    return 1 + torch.arange(300) % 7


def evaluation_by_hand(rows: int | None = None) -> dict[str, float]:
    """Loss, perplexity, tokens and bytes of the rows, each computed by itself. Nothing of the exercises is in it."""
    model, nats, tokens, size = small_gpt2().eval(), 0.0, 0, 0
    for number in range(EVALUATED if rows is None else rows):
        row = {name: tensor[None] for name, tensor in own_rows(number, EVALUATED).items()}
        with torch.no_grad():
            total, count = sum_and_count(
                model(input_ids=row["input_ids"], attention_mask=row["attention_mask"]).logits, row["labels"]
            )
        kept = row["labels"][:, 1:]
        nats, tokens, size = nats + total.item(), tokens + count, size + int(bytes_of_tokens()[kept[kept != -100]].sum())
    return {"loss": nats / tokens, "perplexity": math.exp(nats / tokens), "tokens": tokens, "bytes": size}


@contextlib.contextmanager
def only_evaluate(module):
    """Two more metrics meanwhile, that tell what was summed up, and the milestones' own `summed_loss`: that is another task."""

    def summed(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total, count = sum_and_count(logits, labels)
        return total, torch.tensor(count, device=logits.device)

    before, theirs = dict(module.METRICS), module.summed_loss
    module.METRICS |= {"tokens": lambda totals: totals.tokens, "bytes": lambda totals: totals.bytes}
    module.summed_loss = summed
    try:
        yield
    finally:
        module.METRICS.clear()
        module.METRICS.update(before)
        module.summed_loss = theirs


def evaluated(experiment: Experiment, run: Run) -> dict:
    """`evaluate` on ranks, of a model with dropout, for several batch sizes."""
    module, device = switch.import_exercise(STEM), device_of_rank()
    model = small_gpt2(dropout=0.5)
    engine = sgd_engine(experiment, model) if experiment.deepspeed else adam_engine(experiment, model)
    engine.precision = "fp32"
    lab, found = exercises(), {}
    with only_evaluate(module):
        for batch_size in (1, 4, 6):
            batches = rows_to_evaluate(batch_size, rank(), world_size())
            got = lab.evaluate(engine, batches, device, token_bytes=bytes_of_tokens())
            found[str(batch_size)] = gather({name: float(value) for name, value in got.items()})
        # One rank has all, and the other nothing but filling.
        numbers = (0, 1) if rank() == 0 else (99, 99)
        rows = [{name: tensor[None] for name, tensor in own_rows(number, EVALUATED).items()} for number in numbers]
        got = lab.evaluate(engine, rows, device, token_bytes=bytes_of_tokens())
        uneven = gather({name: float(value) for name, value in got.items()})
    return {"metrics": found, "uneven": uneven}


def evaluated_here(what: str) -> dict:
    """`evaluate` in one process. `what`: whole, steps, modes, gradients, bytes, many (tokens), or nothing (to predict)."""
    module, lab, device = switch.import_exercise(STEM), exercises(), torch.device("cpu")
    model = small_gpt2(dropout=0.5)
    batches = list(rows_to_evaluate(2, 0, 1))
    if what == "nothing":
        empty = [{name: tensor for name, tensor in own_rows(99, 0).items()}]
        batches = [{name: tensor[None] for name, tensor in row.items()} for row in empty]
        try:
            return {"refused": "", "got": str(lab.evaluate(model, batches, device))}
        except ValueError as error:
            return {"refused": str(error) or "ValueError"}
    with only_evaluate(module):
        if what == "many":
            module.summed_loss = lambda logits, labels: (torch.tensor(2.0), torch.tensor(2**24 + 1))
            return {name: float(value) for name, value in lab.evaluate(model, batches, device).items()}
        if what == "steps":
            return {name: float(v) for name, v in lab.evaluate(model, batches, device, 2).items()}
        if what == "modes":
            after = []
            for training in (True, False):
                model.train(training)
                lab.evaluate(model, batches, device)
                after.append(model.training)
            return {"after": after}
        if what == "gradients":
            kept = []
            model.register_forward_hook(lambda module, args, output: kept.append(output.logits.requires_grad))
            lab.evaluate(model, batches, device)
            return {"kept": any(kept)}
        got = lab.evaluate(model, batches, device, token_bytes=bytes_of_tokens() if what == "whole" else None)
        return {name: float(value) for name, value in got.items()}


def perplexities(pairs: list[tuple[float, int]]) -> list[float]:
    module = switch.import_exercise(STEM)
    return [float(exercises().perplexity(module.Totals(nats, tokens))) for nats, tokens in pairs]


# --- 8.6 ------------------------------------------------------------------------------------------------------------

PROMPTS = ["Return the", "def add(a, b): Return the sum of a"]
NEW = 8


def greedy_by_hand(prompt: str, new_tokens: int, end: int | None, seed: int = 0) -> list[int]:
    """The likeliest token at each place, by a forward pass of everything for each. Nothing of the exercises is in it."""
    model, tokenizer = small_gpt2(seed=seed).eval(), tokenizer_of()
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
    ids, new = ids[-(32 - new_tokens) :], []
    for _ in range(new_tokens):
        with torch.no_grad():
            new.append(int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
        if new[-1] == end:
            break
    return new


def generation_tokenizer(end: int | None = None):
    """The small tokenizer, of the kind that puts a token in front; with `end`, that token is its end-of-sequence token."""
    tokenizer = copy.deepcopy(tokenizer_of(start=True))
    tokenizer.padding_side, tokenizer.pad_token = "left", END
    if end is not None:
        tokenizer.add_special_tokens({"eos_token": tokenizer.convert_ids_to_tokens(end)})
    return tokenizer


def text_by_hand(prompt: str, new_tokens: int = NEW, end: int | None = None, seed: int = 0) -> str:
    tokenizer = generation_tokenizer(end)
    new = greedy_by_hand(prompt, new_tokens, tokenizer.eos_token_id, seed)
    special = {0, 1, 2, tokenizer.eos_token_id}
    return tokenizer.decode([token for token in new if token not in special])


def generated(experiment: Experiment, run: Run) -> dict:
    """`generate_text` on ranks, each with a prompt of its own. `options`: `end`, a token at which the first rank is done early."""
    model = small_gpt2()
    engine = sgd_engine(experiment, model)
    tokenizer = generation_tokenizer(experiment.options.get("end"))
    engine.train()
    text = exercises().generate_text(engine.module, tokenizer, PROMPTS[rank()], NEW)
    return {"texts": gather(text), "training": gather(bool(engine.module.training))}


def generated_here(prompt: str, new_tokens: int, dropout: float, training: bool, end: int | None = None, seed: int = 0) -> dict:
    """`generate_text` of a model that would sample if nobody told it otherwise."""
    model = small_gpt2(dropout=dropout, seed=seed)
    model.generation_config.do_sample = True
    model.train(training)
    text = exercises().generate_text(model, generation_tokenizer(end), prompt, new_tokens)
    return {"text": text, "training": model.training}


# --- 8.7 and 8.8 ----------------------------------------------------------------------------------------------------


def adam_engine(experiment: Experiment, model: nn.Module):
    engines = given("engines")
    if experiment.deepspeed is None:
        return engines.PlainEngine(model, device_of_rank(), experiment.learning_rate, 20)
    return engines.deepspeed_engine(model, experiment.deepspeed, 20)


def steps_of(engine, first: int, last: int) -> list[float]:
    """Train by the milestones' own loop, with dropout."""
    losses, device = [], device_of_rank()
    engine.train()
    for step in range(first, last):
        rows = {
            name: tensor[rank() :: world_size()].to(device) for name, tensor in rows_of_step(0 if step == 2 else step % 4).items()
        }
        total, count = sum_and_count(
            engine(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits, rows["labels"]
        )
        engine.backward(total / max(count, 1))
        engine.step()
        losses.append(total.item())
    return losses


def engine_with_dropout(experiment: Experiment, seed: int = 0):
    torch.manual_seed(1000 * seed + rank())
    return adam_engine(experiment, small_gpt2(dropout=0.2, seed=seed, spread=0.1))


class WatchedSave:
    """An engine whose `save_checkpoint` tells how it was called and what it found, and on the last rank takes its time.

    Attributes:
        calls: for each, its tag, whether a file `latest` is asked for, whether the folder of that tag was there and fresh, and
            whether one with its last name is there at the end.
        done: that last name.
        earlier: a file of an earlier whole checkpoint, which has to be there as long as the new one is being written.
    """

    def __init__(self, engine):
        self._engine, self.calls, self.done, self.earlier = engine, [], None, None

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def save_checkpoint(self, save_dir, tag=None, client_state=None, save_latest=True, **others):
        found = Path(save_dir, str(tag))
        fresh = found.is_dir() and not (found / "left-behind.txt").exists()
        if rank() == world_size() - 1:
            time.sleep(1.0)  # longer than a rename takes here
        self._engine.save_checkpoint(str(save_dir), tag=tag, save_latest=save_latest)
        if self.earlier is not None:
            fresh = fresh and self.earlier.exists()
        self.calls.append(
            {"tag": str(tag), "latest": bool(save_latest), "fresh": fresh, "whole": bool(self.done and self.done.exists())}
        )


@contextlib.contextmanager
def slow_to_rename():
    """Meanwhile, a name is given half a second late: whoever does not wait for it sees that it is not there.

    The last rank takes its time for its random state too.

    Yields:
        The names of folders that are removed while they are there, and (name, new name, files) of what is renamed.
    """
    true, removed, remove = {name: getattr(os, name) for name in ("rename", "replace")}, [], shutil.rmtree
    renamed_to, save = [], torch.save

    def late(name: str):
        def renamed(path, to, *given, **named):
            if Path(path).is_dir():
                renamed_to.append([Path(path).name, Path(to).name, listing(Path(path))])
            time.sleep(0.5)
            return true[name](path, to, *given, **named)

        return renamed

    def watched(path, *given, **named):
        removed.extend([Path(path).name] * Path(path).exists())
        return remove(path, *given, **named)

    def slow_save(value, path, *given, **named):
        if "random-of-rank" in str(path) and rank() == world_size() - 1:
            time.sleep(1.0)
        return save(value, path, *given, **named)

    for name in true:
        setattr(os, name, late(name))
    shutil.rmtree, torch.save = watched, slow_save
    try:
        yield removed, renamed_to
    finally:
        shutil.rmtree, torch.save = remove, save
        for name, function in true.items():
            setattr(os, name, function)


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def saved(experiment: Experiment, run: Run) -> dict:
    """`save_checkpoint` after two steps and after four, over what a killed run has left, and after six into a new folder."""
    lab, folder = exercises(), run.folder / "checkpoints"
    trained_engine = engine_with_dropout(experiment)
    engine = WatchedSave(trained_engine)
    if rank() == 0:
        left = folder / "step-000002.partial"
        left.mkdir(parents=True)
        (left / "left-behind.txt").write_text("of a run that was killed")
        earlier = folder / "step-000004"
        earlier.mkdir()
        (earlier / "earlier.txt").write_text("of an earlier run")
    wait()
    found, before, states, random = {"after": [], "position_kept": True, "removed": [], "renamed": []}, {}, {}, []
    for step, place in ((2, folder), (4, str(folder)), (6, run.folder / "new" / "checkpoints")):
        steps_of(trained_engine, step - 2, step)
        position = {"step": step, "epoch": 1, "batches": step + 1}
        done = Path(place, f"step-{step:06d}")
        engine.done, engine.earlier = (done, None) if step != 4 else (None, done / "earlier.txt")
        before[step] = torch.get_rng_state()
        wait()
        if rank() == 0:
            time.sleep(0.3)  # the others are there first
        with slow_to_rename() as (removed, renamed):
            path = lab.save_checkpoint(engine, place, position)
        found["removed"] += removed
        found["renamed"] += renamed
        # What each rank sees as soon as its call is over.
        here = listing(done) if done.is_dir() else []
        found["after"].append(gather({"path": Path(path).name if path is not None else "None", "files": here}))
        found["position_kept"] &= position == {"step": step, "epoch": 1, "batches": step + 1}
        wait()
        with contextlib.suppress(OSError, ValueError):
            states[str(step)] = json.loads((done / "state.json").read_text())
        kept = done / f"random-of-rank-{rank()}.pt"
        random.append(kept.exists() and torch.equal(torch.load(kept)["cpu"], before[step]))
    wanted = {"ranks": world_size(), "model": switch.import_exercise(STEM).identity(engine.module)}
    return found | {
        "calls": gather(engine.calls),
        "states": states,
        "wanted": wanted,
        "random": gather(random),
        # DeepSpeed puts scripts beside the checkpoints, which gather the weights of ZeRO.
        "folders": sorted(path.name for path in folder.iterdir() if not path.name.startswith("zero_to_")),
    }


def wait() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def own_save(engine, folder: Path, position: dict) -> None:
    """A checkpoint as it should be, by the milestones' own lines."""
    module = switch.import_exercise(STEM)
    place = folder / f"step-{position['step']:06d}"
    if rank() == 0:
        place.mkdir(parents=True)
    wait()
    engine.save_checkpoint(str(folder), tag=place.name, save_latest=False)
    torch.save(module.random_state(), place / f"random-of-rank-{rank()}.pt")
    if rank() == 0:
        state = position | {"ranks": world_size(), "model": module.identity(engine.module)}
        (place / "state.json").write_text(json.dumps(state))
    wait()


def never_stopped(experiment: Experiment, run: Run) -> dict:
    """Six steps, with checkpoints after one, after three, and half a one after five. No exercise is called."""
    folder = run.folder / "checkpoints"
    engine, losses = engine_with_dropout(experiment), []
    for step in range(6):
        losses += steps_of(engine, step, step + 1)
        if step in (0, 2):
            own_save(engine, folder, {"step": step + 1, "epoch": step // 2, "batches": 7 * step + 1})
    if rank() == 0:
        shutil.copytree(folder / "step-000001", folder / "step-000005.partial")
        (folder / "step-000005.partial" / "state.json").unlink()
        (folder / "notes.txt").write_text("not a checkpoint")
    return {"losses": gather(losses)}


def goes_on(experiment: Experiment, run: Run) -> dict:
    """`load_checkpoint` into an engine with other weights, and the steps after it. `options`: `after`, the run before it."""
    engine = engine_with_dropout(experiment, seed=1)
    steps_of(engine, 0, 1)
    position = exercises().load_checkpoint(engine, run.folder.parent / experiment.options["after"] / "checkpoints")
    return {"position": position, "losses": gather(steps_of(engine, 3, 6))}


class NoEngine:
    """An engine that only counts how often something is loaded, and never can."""

    def __init__(self, **changes):
        self.module, self.loaded = small_gpt2(**changes), 0

    def load_checkpoint(self, *given, **named):
        self.loaded += 1
        return None, {}


def loaded_where(what: str) -> dict:
    """`load_checkpoint` of folders that have no fitting checkpoint. `what`: none, no folder, partial, model, ranks,
    large (steps), or broken: it fits, and the engine cannot load it."""
    module, lab = switch.import_exercise(STEM), exercises()
    with tempfile.TemporaryDirectory() as folder:
        engine, here = NoEngine(vocabulary=301), Path(folder, "checkpoints")
        if what != "no folder":
            here.mkdir()
        names = {"partial": ["step-000007.partial", "step-000008.old"], "large": ["step-099999", "step-1000001", "step-900000"]}
        names |= dict.fromkeys(("model", "ranks", "broken"), ["step-000007"])
        for name in names.get(what, []):
            (here / name).mkdir()
            other = NoEngine(vocabulary=307 if what == "model" else 301).module
            ranks = 2 if what in ("ranks", "large") else 1
            state = {"step": int(name[5:].split(".")[0]), "epoch": 0, "batches": 7, "ranks": ranks, "model": module.identity(other)}
            (here / name / "state.json").write_text(json.dumps(state))
            torch.save(module.random_state(), here / name / "random-of-rank-0.pt")
        state = torch.get_rng_state()
        try:
            got = lab.load_checkpoint(engine, str(here) if what in ("large", "none") else here)
            said = ""
        except ValueError as error:
            got, said = None, str(error).replace(folder, "FOLDER")
        untouched = torch.equal(state, torch.get_rng_state())
    return {"got": got, "refused": said, "loaded": engine.loaded, "untouched": untouched}


# --- 8.9 to 8.11 ----------------------------------------------------------------------------------------------------


def parsed(words: list[str], files: dict[str, str] | None = None) -> dict:
    """What the parser makes of words, or with which status and sentence it ends; FOLDER stands for a folder with `files`."""
    out, err = io.StringIO(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        for name, text in (files or {}).items():
            Path(folder, name).write_text(text)
        words = [word.replace("FOLDER", folder) for word in words]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                found = vars(exercises().command_line().parse_args(words))
        except SystemExit as ended:
            return {"status": ended.code, "said": (out.getvalue() + err.getvalue()).replace(folder, "FOLDER")}
    return {
        "options": {
            name: str(value).replace(folder, "FOLDER") if isinstance(value, str | Path) else value for name, value in found.items()
        }
    }


def helps() -> dict[str, str]:
    """Each option that `--help` shows, and its words."""
    actions = switch.import_exercise(STEM).command_line()._actions
    return {name: action.help or "" for action in actions if action.help != argparse.SUPPRESS for name in action.option_strings}


def paragraphs_of(articles: list[dict] | None, registered: bool = False) -> dict:
    """`squad_paragraphs` of a file, or of no path; `registered`: by its name in `DATASETS`."""
    module, lab = switch.import_exercise(STEM), exercises()
    function = module.DATASETS["squad"] if registered else lab.squad_paragraphs
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "squad.json")
        path.write_text(json.dumps({"version": "1.1", "data": articles or []}, ensure_ascii=False), encoding="utf-8")
        try:
            found = function(None if articles is None else str(path))
        except ValueError as error:
            return {"refused": str(error).replace(folder, "FOLDER")}
    return {"splits": {name: list(texts) for name, texts in found.items()}}


def bytes_of_tokenizer(options: dict, texts: list[str]) -> dict:
    """`token_bytes` of a tokenizer to which a token was added, and the sum over a text's tokens."""
    tokenizer = copy.deepcopy(tokenizer_of(**options))
    tokenizer.add_tokens(["<more>"])
    got = exercises().token_bytes(tokenizer)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return {
        "type": str(got.dtype),
        "shape": list(got.shape),
        "size": len(tokenizer),
        "special": [int(got[number]) for number in tokenizer.all_special_ids],
        "sums": [int(got[torch.tensor(row)].sum()) for row in ids],
    }


def bits_of(nats: float, tokens: int, size: int) -> float:
    module = switch.import_exercise(STEM)
    return float(module.METRICS["bits_per_byte"](module.Totals(nats, tokens, size)))
