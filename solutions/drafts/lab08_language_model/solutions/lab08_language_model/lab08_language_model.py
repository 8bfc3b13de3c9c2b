"""Lab 08, a language model: the parts of a project that runs without this course.

You complete 11 tasks. `python labs/lab08_language_model/make_project.py FOLDER` puts this file, as `language_model.py`, beside
the program that is given, `main.py`, its DeepSpeed files and its scripts. Nothing in here may import the course.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import AutoTokenizer

UNPREDICTED = -100
"""The label of a place that counts in no loss."""


# --- several ranks --------------------------------------------------------------------------------------------------


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks, on each of them; all of them must call it."""
    values = values.clone()
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


# --- Task 8.1 -------------------------------------------------------------------------------------------------------


def get_tokenizer(name: str):
    """The tokenizer of a model, for training and for generation.

    Args:
        name: on the hub, or a folder.

    Returns:
        With a token to fill up with: its own, or its end-of-sequence token where it has none, as GPT-2. It fills up on the left,
        since generation goes on at the right end.

    Raises:
        ValueError: it has no end-of-sequence token, so documents could not be told apart; the sentence names the tokenizer.
    """
    # BEGIN SOLUTION 8.1
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    if tokenizer.eos_token is None:
        raise ValueError(f"the tokenizer of {name} has no end-of-sequence token: documents could not be told apart")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
    # END SOLUTION


def preprocess_function(examples: dict[str, list[str]], tokenizer) -> dict[str, list[list[int]]]:
    """Documents as token ids, as `datasets.Dataset.map(…, batched=True, remove_columns=["text"])` calls it.

    Args:
        examples: {"text": documents}.

    Returns:
        {"input_ids": a list for each document}: its tokens, nothing in front, and the end-of-sequence token behind. A document
        of blanks alone is left out. None is cut.
    """
    # BEGIN SOLUTION 8.1
    texts = [text for text in examples["text"] if text.strip()]
    if not texts:
        return {"input_ids": []}
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return {"input_ids": [[*document, tokenizer.eos_token_id] for document in ids]}
    # END SOLUTION


# --- Task 8.2 -------------------------------------------------------------------------------------------------------


class Blocks(Dataset):
    """Documents one behind the other, cut into blocks of `length` tokens, wherever a document ends.

    No token is lost and none is in two blocks: the last block is filled up.

    Args:
        documents: token ids, each with its end-of-sequence token.
        length: tokens of a block, at least 2: a block's first token is predicted by nothing.
        filling: the token to fill up with.

    Raises:
        ValueError: `length` is below 2, or there is no token at all.
    """

    def __init__(self, documents: Iterable[list[int]], length: int, filling: int):
        # BEGIN SOLUTION 8.2
        self.length, self.filling = length, filling
        self.tokens = torch.tensor([token for document in documents for token in document])
        if length < 2:
            raise ValueError(f"blocks of {length} token: it takes 2, one to predict from and one to predict")
        if not len(self.tokens):
            raise ValueError("there is no text: not one token")
        # END SOLUTION

    def __len__(self) -> int:
        # BEGIN SOLUTION 8.2
        return math.ceil(len(self.tokens) / self.length)
        # END SOLUTION

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        """A block: `input_ids`, `attention_mask` and `labels`, each [length], in int64.

        Labels are the tokens themselves; the model shifts them. Where a block is filled up the mask is 0 and the label
        `UNPREDICTED`. The number `len(self)`, behind the last, gives a block of filling alone: what a rank gets that has run out
        of blocks.

        Raises:
            IndexError: any other number that is no block's.
        """
        # BEGIN SOLUTION 8.2
        if not 0 <= number <= len(self):
            raise IndexError(number)
        found = self.tokens[number * self.length : (number + 1) * self.length]
        missing = self.length - len(found)
        return {
            "input_ids": functional.pad(found, (0, missing), value=self.filling),
            "attention_mask": functional.pad(torch.ones_like(found), (0, missing)),
            "labels": functional.pad(found, (0, missing), value=UNPREDICTED),
        }
        # END SOLUTION


# --- Task 8.3 -------------------------------------------------------------------------------------------------------


class Share(Sampler):
    """The numbers of a rank's blocks in an epoch; all ranks have equally many.

    Of the blocks in the epoch's order, rank r of R has those at r, r + R, r + 2R, … Where they do not divide, the last ranks get
    one number `blocks` more, that of no block: a batch less on one rank, and the others would wait for it for ever.

    Args:
        blocks: how many there are.
        rank, ranks: whose share.
        seed: of the orders; None for the order of the text, in each epoch.
    """

    def __init__(self, blocks: int, rank: int, ranks: int, seed: int | None):
        self.blocks, self.rank, self.ranks, self.seed = blocks, rank, ranks, seed
        self.epoch, self.first = 0, 0

    def begin(self, epoch: int, first: int = 0) -> None:
        """The next pass is that of `epoch`, without the rank's first so many blocks, which a stopped run has had; with more than
        there are, it is empty."""
        self.epoch, self.first = epoch, first

    def __len__(self) -> int:
        # BEGIN SOLUTION 8.3
        return max(0, math.ceil(self.blocks / self.ranks) - self.first)
        # END SOLUTION

    def __iter__(self) -> Iterator[int]:
        """The order of an epoch is drawn from `seed` and `epoch` alone, so it is the same on all ranks."""
        # BEGIN SOLUTION 8.3
        order = list(range(self.blocks))
        if self.seed is not None:
            draw = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
            order = torch.randperm(self.blocks, generator=draw).tolist()
        order += [self.blocks] * (-self.blocks % self.ranks)
        return iter(order[self.rank :: self.ranks][self.first :])
        # END SOLUTION


def get_dataloaders(splits: dict[str, Blocks], batch_size: int, *, rank: int, ranks: int, seed: int) -> dict[str, DataLoader]:
    """A loader for each split, with this rank's share of its blocks, `batch_size` at a time.

    "train" is in another order in each epoch, the others in that of the text. The last batch may be smaller; all ranks have
    batches of the same sizes. `loader.sampler` is a `Share`.

    A loader draws a number whenever a pass begins: from torch's own generator, unless it has one (`generator`). Dropout draws
    from torch's own too, so a run that goes on would drop others than the run that never stopped.
    """
    # BEGIN SOLUTION 8.3
    shares = {name: Share(len(blocks), rank, ranks, seed if name == "train" else None) for name, blocks in splits.items()}
    return {
        name: DataLoader(blocks, batch_size, sampler=shares[name], generator=torch.Generator()) for name, blocks in splits.items()
    }
    # END SOLUTION


# --- Task 8.4 -------------------------------------------------------------------------------------------------------


def summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The cross-entropy of a batch, summed over what is predicted, and how many tokens that is.

    Args:
        logits: [rows, length, vocabulary]: at place t, of the token at t + 1.
        labels: [rows, length], with `UNPREDICTED` where nothing counts.

    Returns:
        The sum in nats, in float32, and the number, in int64. Both are 0 where nothing is predicted.
    """
    # BEGIN SOLUTION 8.4
    targets = labels[:, 1:]
    loss = functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=UNPREDICTED, reduction="sum"
    )
    return loss, (targets != UNPREDICTED).sum()
    # END SOLUTION


def train_epoch(engine, batches: Iterable[dict], device: torch.device, steps: int | None = None) -> Iterator[float]:
    """Train on each batch, and give the loss of each step: the mean over the tokens that are predicted, of all ranks.

    The engine takes the mean of the ranks' gradients. So what a rank hands to `engine.backward` is its own sum, divided by the
    tokens of all ranks, times the number of ranks: then a rank with few tokens counts for as many as it has. A step in which no
    rank has a token gives 0.

    Args:
        engine: of DeepSpeed, or one that is used alike: `engine.train()`, once, before the first batch;
            `engine(input_ids=…, attention_mask=…).logits`, `engine.backward(loss)`, `engine.step()`.
        steps: so many, and not the rest of the batches; all without it.

    Yields:
        The loss after each step.
    """
    # BEGIN SOLUTION 8.4
    engine.train()
    for number, batch in enumerate(batches):
        if number == steps:
            return
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        logits = engine(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        total, tokens = summed_loss(logits, batch["labels"])
        everywhere = sum_over_ranks(tokens).clamp(min=1)
        engine.backward(total / everywhere * world_size())
        engine.step()
        yield (sum_over_ranks(total.detach()) / everywhere).item()
    # END SOLUTION


# --- Task 8.5 -------------------------------------------------------------------------------------------------------


@dataclass
class Totals:
    """What an evaluation has summed up over all batches of all ranks.

    Attributes:
        nats: the cross-entropy.
        tokens: how many were predicted.
        bytes: of the text that they stand for, in UTF-8; 0 where nobody has said how long tokens are.
    """

    nats: float
    tokens: int
    bytes: int = 0


METRICS: dict[str, Callable[[Totals], float]] = {}
"""What an evaluation reports. To add one takes a line: `@metric("name")` above a function of `Totals`."""


def metric(name: str) -> Callable:
    def register(function: Callable[[Totals], float]) -> Callable[[Totals], float]:
        METRICS[name] = function
        return function

    return register


@metric("loss")
def loss(totals: Totals) -> float:
    """The mean over the tokens, in nats."""
    return totals.nats / totals.tokens


@metric("perplexity")
def perplexity(totals: Totals) -> float:
    """The exponential of the mean over the tokens; infinite where that is too large for a float."""
    # BEGIN SOLUTION 8.5
    with contextlib.suppress(OverflowError):
        return math.exp(totals.nats / totals.tokens)
    return math.inf
    # END SOLUTION


@torch.no_grad()
def evaluate(
    model, batches: Iterable[dict], device: torch.device, steps: int | None = None, token_bytes: torch.Tensor | None = None
) -> dict[str, float]:
    """Ask the model for all batches, add up their `summed_loss`, and report each of `METRICS`, the same on all ranks.

    Sums are added up over batches and ranks, and divided once, at the end: a mean of means would weigh a short batch like a long
    one. The number of tokens is exact however large it is: float32 counts to 2^24 and no further. The model drops nothing
    meanwhile, and is in training again afterwards if it was so before.

    Args:
        model: or engine, as in `train_epoch`, with `training`, `eval()` and `train(mode)`.
        steps: at most so many batches of this rank.
        token_bytes: of each token, how many bytes it stands for, [vocabulary].

    Raises:
        ValueError: no token is predicted in any batch.
    """
    # BEGIN SOLUTION 8.5
    training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for number, batch in enumerate(batches):
        if number == steps:
            break
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        total, tokens = summed_loss(
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"]
        )
        sums[0] += total.double()
        sums[1] += tokens
        if token_bytes is not None:
            targets = batch["labels"][:, 1:]
            sums[2] += token_bytes.to(device)[targets[targets != UNPREDICTED]].sum()
    model.train(training)
    nats, count, size = sum_over_ranks(sums).tolist()
    if not count:
        raise ValueError("there is nothing to evaluate: no token is predicted in any batch")
    totals = Totals(nats, int(count), int(size))
    return {name: function(totals) for name, function in METRICS.items()}
    # END SOLUTION


# --- Task 8.6 -------------------------------------------------------------------------------------------------------


def generate_text(model, tokenizer, prompt: str, new_tokens: int = 40) -> str:
    """The text that the model goes on with, greedily: at each place the likeliest token, also where the model's own
    `generation_config` says that it samples.

    Under ZeRO-3 each forward pass gathers the parameters from all ranks, so all ranks must make equally many: those that are
    done go on until the last one is (`generate(…, synced_gpus=True)`). Parameters that ZeRO-3 has sharded have a `ds_id`.

    Args:
        model: of transformers, not the engine.
        prompt: on each rank its own, if you like. Nothing is put in front of it, as in training; an empty one is the
            end-of-sequence token, behind which a document begins.
        new_tokens: at most, and fewer than the model's positions, `model.config.max_position_embeddings`; the text ends earlier at
            the tokenizer's end-of-sequence token. Prompt and new tokens have to fit in the positions: of a prompt that is too long
            the beginning is left out.

    Returns:
        What is new, without special tokens.
    """
    # BEGIN SOLUTION 8.6
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
    ids = torch.tensor([ids[-(model.config.max_position_embeddings - new_tokens) :]], device=model.device)
    training = model.training
    model.eval()
    sharded = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        synced_gpus=sharded and world_size() > 1,
    )
    model.train(training)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    # END SOLUTION


# --- Tasks 8.7 and 8.8 ----------------------------------------------------------------------------------------------


def identity(model) -> dict:
    """What two models have in common if the checkpoint of one fits the other. (Under ZeRO-3 a parameter's own shape says
    nothing.)"""
    config = model.config
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    return {"architecture": type(model).__name__} | {name: getattr(config, name, None) for name in names}


def random_state() -> dict:
    """The generators that dropout draws from, on this rank."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def save_checkpoint(engine, folder: str | Path, position: dict) -> Path:
    """Write what a run needs to go on, into `folder`/step-000120 for step 120: whole, or not at all. All ranks call it.

    `engine.save_checkpoint(folder, tag=name, save_latest=False)` writes weights and optimizer, each rank its part, into
    `folder`/`name`. Beside them come each rank's `random_state()`, as `random-of-rank-0.pt` and so on (`torch.save`), and from
    rank 0 `state.json`: `position`, and with it "ranks", how many there are, and "model", `identity(engine.module)`.

    It is all written under another name, step-000120.partial, which is made before any rank writes, and gets its own when every
    rank is done. What is there of that other name, from a run that was killed while it wrote, goes first. A whole checkpoint of an
    earlier run, step-000120 itself, is replaced: it gets the name step-000120.old, and goes when the new one has its name. A whole
    name is on whole checkpoints alone, at every moment.

    Args:
        folder: made if it is not there.
        position: "step", "epoch", and "batches", how many of the epoch's batches a rank has had.

    Returns:
        The checkpoint's folder.
    """
    # BEGIN SOLUTION 8.7
    import shutil

    done = Path(folder) / f"step-{position['step']:06d}"
    partial, old = done.with_name(done.name + ".partial"), done.with_name(done.name + ".old")
    if rank() == 0:
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    engine.save_checkpoint(str(folder), tag=partial.name, save_latest=False)
    torch.save(random_state(), partial / f"random-of-rank-{rank()}.pt")
    if rank() == 0:
        state = position | {"ranks": world_size(), "model": identity(engine.module)}
        (partial / "state.json").write_text(json.dumps(state) + "\n")
    barrier()
    if rank() == 0:
        if done.exists():
            done.rename(old)
        partial.rename(done)
        shutil.rmtree(old, ignore_errors=True)
    barrier()
    return done
    # END SOLUTION


def load_checkpoint(engine, folder: str | Path) -> dict | None:
    """Go on from the newest whole checkpoint of `folder`: weights, optimizer and random generators. All ranks call it.

    The newest is that of the largest step. One whose name ends in `.partial` or `.old` is not whole.

    Returns:
        The `position` that was saved; None where there is no checkpoint, and nothing has changed then.

    Raises:
        ValueError: the newest is that of another model, or of another number of ranks, whose parts do not fit. The sentence
            names the checkpoint and both values, and is raised before anything is loaded. Or the engine could not load it:
            `engine.load_checkpoint` gives (path, …), and None for the path where it has loaded nothing.
    """
    # BEGIN SOLUTION 8.8
    found = {int(path.name[5:]): path for path in Path(folder).glob("step-*") if path.name[5:].isdigit()}
    if not found:
        return None
    newest = found[max(found)]
    state = json.loads((newest / "state.json").read_text())
    here = {"ranks": world_size(), "model": identity(engine.module)}
    for name, value in here.items():
        if state[name] != value:
            raise ValueError(f"{newest} is a checkpoint of {name} {state[name]}; here it is {value}")
    path, _ = engine.load_checkpoint(str(folder), tag=newest.name)
    if path is None:
        raise ValueError(f"{newest} could not be loaded")
    set_random_state(torch.load(newest / f"random-of-rank-{rank()}.pt"))
    return {name: state[name] for name in ("step", "epoch", "batches")}
    # END SOLUTION


# --- Task 8.9 -------------------------------------------------------------------------------------------------------


def command_line() -> argparse.ArgumentParser:
    """The options of `main.py`, each with a word of help and its default, as `ArgumentDefaultsHelpFormatter` shows it.

    | option | what it is | without it |
    | --- | --- | --- |
    | --model_name | on the hub, a folder, or `small`: a small GPT-2, made here | small |
    | --dataset_name | a name of `DATASETS`, a text file, a folder of them, or a data set on the hub | stdlib |
    | --dataset_config | the configuration of a data set on the hub, or the file of a name of `DATASETS` | None |
    | --batch_size | blocks per rank and step, at least 1 | 8 |
    | --max_length | tokens per block, at least 2 | 128 |
    | --num_epochs | at least 1 | 1 |
    | --learning_rate | above 0, and finite | 1e-3 |
    | --seed | a whole number | 0 |
    | --deepspeed_config | a DeepSpeed file that is there | None: without DeepSpeed |
    | --max_train_steps | at least 1 | None: all |
    | --max_eval_steps | at least 1 | None: all |
    | --save_checkpoint | every so many steps, at least 1, and after the last | None: no checkpoint |
    | --output_dir | a folder | output |
    | --generation_prompt | a text | None: no text is shown |
    | --resume | a flag: go on from the newest checkpoint of --output_dir | False |
    | --profile | a flag: write a trace of three steps | False |
    | --dry-run | a flag: say what would be done, and start nothing | False |

    `deepspeed` puts --local_rank=N in front of a script's arguments: it is taken and shown in no help. An option is not known by
    its beginning (`allow_abbrev`): --max would be two.

    Returns:
        A parser whose `parse_args` ends the program with status 2 and a sentence, with the option and the value, where a value is
        out of its range or a file is not there.
    """

    # BEGIN SOLUTION 8.9
    def whole(least: int) -> Callable[[str], int]:
        def number(text: str) -> int:
            value = int(text)
            if value < least:
                raise argparse.ArgumentTypeError(f"{value}: it is at least {least}")
            return value

        return number

    def rate(text: str) -> float:
        value = float(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text}: it is above 0")
        return value

    def file(text: str) -> str:
        if not os.path.isfile(text):
            raise argparse.ArgumentTypeError(f"{text}: there is no such file")
        return text

    parser = argparse.ArgumentParser(
        description="Train a language model on a text, and say how well it predicts another.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model_name", default="small", help="on the hub, a folder, or `small`: a small GPT-2, made here")
    add("--dataset_name", default="stdlib", help="a registered name, a text file, a folder of them, or a data set on the hub")
    add("--dataset_config", help="the configuration of a data set on the hub, or the file of a registered name")
    add("--batch_size", type=whole(1), default=8, help="blocks per rank and step")
    add("--max_length", type=whole(2), default=128, help="tokens per block")
    add("--num_epochs", type=whole(1), default=1, help="passes over the text")
    add("--learning_rate", type=rate, default=1e-3, help="at the first step; it falls to 0 in a straight line")
    add("--seed", type=int, default=0, help="of the weights and of the order of the blocks")
    add("--deepspeed_config", type=file, help="a DeepSpeed file; without it, no DeepSpeed")
    add("--max_train_steps", type=whole(1), help="no more than so many steps in all")
    add("--max_eval_steps", type=whole(1), help="no more than so many batches of an evaluation")
    add("--save_checkpoint", type=whole(1), metavar="STEPS", help="every so many steps, and after the last")
    add("--output_dir", default="output", help="a folder for checkpoints, figures and the summary")
    add("--generation_prompt", help="a text to go on with, before training and after it")
    add("--resume", action="store_true", help="go on from the newest checkpoint of --output_dir")
    add("--profile", action="store_true", help="write a trace of three steps")
    add("--dry-run", action="store_true", help="say what would be done, and start nothing")
    add("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser
    # END SOLUTION


# --- Task 8.10 ------------------------------------------------------------------------------------------------------


DATASETS: dict[str, Callable[[str | None], dict[str, list[str]]]] = {}
"""Texts by name: functions that give the documents of "train", "validation" and "test". To add one takes a line:
`@dataset("name")`."""


def dataset(name: str) -> Callable:
    def register(function: Callable) -> Callable:
        DATASETS[name] = function
        return function

    return register


@dataset("squad")
def squad_paragraphs(path: str | None) -> dict[str, list[str]]:
    """The paragraphs of a SQuAD file, without their questions; `--dataset_config` names the file.

    In the file, {"data": articles}, an article is {"title": …, "paragraphs": [{"context": text, …}, …]}. All paragraphs of an
    article go to one split, or the model would be asked about a text of which it has read the next paragraph. Of n articles the
    last n // 10, and one at least, are "test"; as many before them are "validation", and the rest is "train", in the order of the
    file. A text that is there twice is taken once, where it comes first.

    Raises:
        ValueError: no path, in a sentence with the option, --dataset_config; or a split is left without any text, as "train" is of
            two articles, in one with the split and the file.
    """
    # BEGIN SOLUTION 8.10
    if path is None:
        raise ValueError("the data set squad is a file: name it with --dataset_config")
    splits, seen = {"train": [], "validation": [], "test": []}, set()
    articles = json.loads(Path(path).read_text(encoding="utf-8"))["data"]
    held_out = max(1, len(articles) // 10)
    for number, article in enumerate(articles, start=1):
        behind = len(articles) - number
        split = "test" if behind < held_out else "validation" if behind < 2 * held_out else "train"
        for paragraph in article["paragraphs"]:
            if paragraph["context"] not in seen:
                seen.add(paragraph["context"])
                splits[split].append(paragraph["context"])
    for name, documents in splits.items():
        if not documents:
            raise ValueError(f"{path} leaves no text for {name}: it takes three articles at least")
    return splits
    # END SOLUTION


# --- Task 8.11 ------------------------------------------------------------------------------------------------------


def token_bytes(tokenizer) -> torch.Tensor:
    """How many bytes of UTF-8 each token of a byte-level tokenizer stands for, [vocabulary] in int64; a special token stands for
    none.

    Byte-level tokenizers, GPT-2's and those after it, write each byte as one character: `tokenizer.convert_ids_to_tokens(id)` is
    as long as the token's bytes.
    """
    # BEGIN SOLUTION 8.11
    special = set(tokenizer.all_special_ids)
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return torch.tensor([0 if number in special else len(piece) for number, piece in enumerate(pieces)])
    # END SOLUTION


@metric("bits_per_byte")
def bits_per_byte(totals: Totals) -> float:
    """How many bits the model needs for a byte of the text: the same question to models whatever their tokenizers.

    A perplexity is per token, so it is larger the longer tokens are: of the same text, a model whose tokens are twice as long
    has the square of the other's perplexity if both are equally good. One nat is 1 / ln 2 bits. nan where no bytes were counted.
    """
    # BEGIN SOLUTION 8.11
    return totals.nats / math.log(2) / totals.bytes if totals.bytes else math.nan
    # END SOLUTION
