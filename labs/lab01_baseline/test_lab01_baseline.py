"""Milestones of lab 01. Each checks what must be true on any machine; none looks at a clock."""

import json

import pytest

from shardlab.milestones.messages import require, require_error
from shardlab.milestones.small_runs import zero_config
from shardlab.run.experiment import Experiment

IGNORED = -100
QUESTION = "Who designed the Loran bridge?"
CONTEXT = (
    "The Loran bridge was opened in 1832. Mera Vond designed the Loran bridge. The Torsu bridge is built of oak. "
    "The river Hansil passes under the Loran bridge."
)


@pytest.fixture(scope="module")
def tokenizer():
    from shardlab.data.models import load_tokenizer

    return load_tokenizer()


@pytest.fixture(scope="module")
def model():
    from shardlab.data.models import load_model

    return load_model().eval()


@pytest.mark.milestone(task="1.1", points=5)
def test_prompt_has_the_course_format(lab):
    got = lab.format_prompt(QUESTION, CONTEXT)
    wanted = f"Question: {QUESTION} Context: {CONTEXT} Answer:"
    likely = "the order question, context, answer, or a line break or a space too many"
    if isinstance(got, str) and got == wanted + " ":
        likely = "a space after 'Answer:'; the answer brings its own, so the model would see two"
    require(got == wanted, expected=repr(wanted), got=got, likely=likely)
    got = lab.format_prompt(f" {QUESTION}\n", f"\n{CONTEXT} ")
    require(
        got == wanted,
        expected="white space around the question and the context stripped",
        got=got,
        likely="no .strip() on one of the two; SQuAD's questions do carry stray spaces",
    )


@pytest.mark.milestone(task="1.2", points=10, needs=("1.1",))
def test_long_prompt_loses_context_only(lab, tokenizer):
    whole = tokenizer(lab.format_prompt(QUESTION, CONTEXT))["input_ids"]
    got = lab.encode_prompt(tokenizer, QUESTION, CONTEXT, len(whole))
    require(
        list(got) == whole,
        expected=f"the {len(whole)} ids of the whole prompt, which fits",
        got=tokenizer.decode(got),
        likely="the prompt is shortened although it fits",
    )
    lines = CONTEXT.replace(". ", ".\n ")
    whole_lines = tokenizer(lab.format_prompt(QUESTION, lines))["input_ids"]
    got = lab.encode_prompt(tokenizer, QUESTION, lines, len(whole_lines))
    require(
        list(got) == whole_lines,
        expected="a context of several lines, which fits, as it is",
        got=repr(tokenizer.decode(got)),
        likely='context.split() throws line breaks and double spaces away; context.split(" ") and " ".join keep them',
    )
    before, after = lab.format_prompt(QUESTION, "|").split("|")
    bare = len(tokenizer(lab.format_prompt(QUESTION, ""))["input_ids"])
    for budget in (bare + 8, bare + 30, len(whole) - 1):
        got = lab.encode_prompt(tokenizer, QUESTION, CONTEXT, budget)
        text = tokenizer.decode(got)
        require(
            len(got) <= budget,
            expected=f"at most {budget} ids",
            got=f"{len(got)} ids: {text}",
            likely="the length is checked before the last pieces are added",
        )
        require(
            text.rstrip().endswith("Answer:"),
            expected="a prompt that still ends in 'Answer:'",
            got=text,
            likely="ids cut off at the end; cut the context instead, and encode again",
        )
        require(
            QUESTION in text,
            expected="a prompt that still holds the whole question",
            got=text,
            likely="ids cut off at the front; cut the context instead, and encode again",
        )
        kept = text.removeprefix(before).removesuffix(after).strip()
        require(
            CONTEXT.startswith(kept),
            expected="the beginning of the context, cut at its end",
            got=kept,
            likely="words taken off the front of the context, or white space changed",
        )
        require(
            len(got) > budget - 16,
            expected=f"as much context as fits into {budget} ids",
            got=f"{len(got)} ids: {text}",
            likely="the whole context is dropped, or whole sentences of it; take one word at a time",
        )
    require_error(
        lambda: lab.encode_prompt(tokenizer, QUESTION, CONTEXT, 5),
        ValueError,
        expected="ValueError when the question alone does not fit into 5 tokens",
        likely="the loop ends, or runs for ever, when the context is used up",
    )


@pytest.mark.milestone(task="1.3", points=15, needs=("1.1", "1.2"), section="What the labels say")
def test_labels_teach_only_the_answer(lab, tokenizer, model):
    import torch

    answer = "Mera Vond"
    example = lab.encode_example(tokenizer, QUESTION, CONTEXT, answer, 512)
    ids, labels = list(example["input_ids"]), list(example["labels"])
    prompt = list(lab.encode_prompt(tokenizer, QUESTION, CONTEXT, 500))
    require(
        len(ids) == len(labels),
        expected="as many labels as input ids",
        got=f"{len(ids)} ids, {len(labels)} labels",
        likely="the end-of-sequence id is added to one of the two only",
    )
    require(
        ids[: len(prompt)] == prompt,
        expected="input_ids that begin with encode_prompt's ids",
        got=tokenizer.decode(ids),
        likely="the prompt is encoded in another way than encode_prompt does",
    )
    require(
        ids[-1] == tokenizer.eos_token_id,
        expected="the end-of-sequence id last",
        got=tokenizer.decode(ids[-8:]),
        likely="no end-of-sequence token; the model would never learn to stop",
    )
    taught = [token for token in labels if token != IGNORED]
    require(
        labels[: len(prompt)] == [IGNORED] * len(prompt),
        expected=f"{IGNORED} at all {len(prompt)} tokens of the prompt",
        got=f"{len(taught)} labels are not {IGNORED}: {tokenizer.decode(taught)!r}",
        likely="labels copied from input_ids, or a mask that is one token short",
    )
    require(
        tokenizer.decode(taught) == f" {answer}{tokenizer.eos_token}",
        expected=f"labels that spell {' ' + answer + tokenizer.eos_token!r}",
        got=repr(tokenizer.decode(taught)),
        likely="a mask that is one token long, or an answer without its leading space",
    )

    # The model's loss is the mean over the answer's tokens and over nothing else.
    with torch.no_grad():
        loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    chosen = [-torch.log_softmax(logits[at - 1], -1)[ids[at]].item() for at in range(len(prompt), len(ids))]
    require(
        abs(loss - sum(chosen) / len(chosen)) < 1e-4,
        expected=f"a loss of {sum(chosen) / len(chosen):.4f}, the answer's alone",
        got=f"{loss:.4f}",
        likely="labels shifted by one; the model shifts them itself",
    )

    short = lab.encode_example(tokenizer, QUESTION, CONTEXT * 3, answer, len(prompt) - 10)
    kept = tokenizer.decode([token for token in short["labels"] if token != IGNORED])
    require(
        len(short["input_ids"]) <= len(prompt) - 10,
        expected=f"at most {len(prompt) - 10} ids",
        got=f"{len(short['input_ids'])} ids",
        likely="the answer's tokens are not counted into max_tokens",
    )
    require(
        kept == f" {answer}{tokenizer.eos_token}",
        expected="the whole answer, however long the context",
        got=repr(kept),
        likely="the example is cut at its end; give the prompt what the answer leaves over",
    )


@pytest.mark.milestone(task="1.4", points=10, section="Padding")
def test_batch_is_padded_to_its_longest_example(lab, model):
    import torch

    rows = [{"input_ids": list(range(10, 10 + n)), "labels": [IGNORED] * 2 + list(range(12, 10 + n))} for n in (4, 9, 6)]
    batch = lab.collate(rows, 3)
    for name in ("input_ids", "attention_mask", "labels"):
        require(
            name in batch and torch.is_tensor(batch[name]) and batch[name].dtype == torch.int64,
            expected=f"a tensor '{name}' of type int64",
            got=sorted(batch),
            likely="a key left out, or lists not made into tensors",
        )
        require(
            tuple(batch[name].shape) == (3, 9),
            expected=f"'{name}' of shape (3, 9): three examples, the longest has 9 tokens",
            got=str(tuple(batch[name].shape)),
            likely="padding to a fixed length",
        )
    for row, mask, ids, labels in zip(
        rows, batch["attention_mask"].tolist(), batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True
    ):
        n = len(row["input_ids"])
        require(
            ids == row["input_ids"] + [3] * (9 - n),
            expected=f"{row['input_ids']} and then the padding id 3",
            got=ids,
            likely="padding on the left, or with another id",
        )
        require(
            mask == [1] * n + [0] * (9 - n),
            expected=f"{n} ones and {9 - n} zeros",
            got=mask,
            likely="a mask of ones; attention would look at padding",
        )
        require(
            labels == row["labels"] + [IGNORED] * (9 - n),
            expected=f"{IGNORED} at padding",
            got=labels,
            likely="labels padded with the padding id; the model would be trained to write <pad>",
        )
    with torch.no_grad():
        together = model(**batch).loss.item()
        alone = [model(**lab.collate([row], 3)).loss.item() for row in rows]
    counts = [sum(label != IGNORED for label in row["labels"][1:]) for row in rows]
    mean = sum(loss * n for loss, n in zip(alone, counts, strict=True)) / sum(counts)
    require(
        abs(together - mean) < 1e-4,
        expected=f"the loss that the examples have one by one, {mean:.4f}",
        got=f"{together:.4f}",
        likely="padding that takes part in attention or in the loss",
    )


@pytest.mark.milestone(task="1.5", points=10)
def test_training_arguments_are_those_of_the_course(lab, tmp_path):
    arguments = lab.training_arguments(str(tmp_path))
    wanted = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "gradient_accumulation_steps": 4,
        "num_train_epochs": 3,
        "learning_rate": 5e-5,
        "weight_decay": 0.01,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "bf16": False,
        "fp16": False,
        "report_to": [],
        "push_to_hub": False,
        "output_dir": str(tmp_path),
    }
    for name, value in wanted.items():
        got = getattr(arguments, name)
        require(
            got == value,
            expected=f"{name} = {value!r}",
            got=f"{got!r}",
            likely=f"{name} left at Trainer's default or set to another value",
        )
    changed = lab.training_arguments(str(tmp_path), learning_rate=1e-3, per_device_train_batch_size=2, save_strategy="no")
    strategy = changed.save_strategy
    got = (changed.learning_rate, changed.per_device_train_batch_size, getattr(strategy, "value", strategy))
    require(
        got == (1e-3, 2, "no"),
        expected="overrides that win: (0.001, 2, 'no')",
        got=got,
        likely="overrides dropped, or put before the course's settings",
    )
    mixed = lab.training_arguments(str(tmp_path), precision="bf16")
    require(
        mixed.bf16 and not mixed.fp16,
        expected="bf16 on and fp16 off for precision 'bf16'",
        got=f"bf16={mixed.bf16}, fp16={mixed.fp16}",
        likely="precision is not passed on",
    )
    require_error(
        lambda: lab.training_arguments(str(tmp_path), precision="fp8"),
        ValueError,
        mentions=("fp8",),
        expected="ValueError for precision 'fp8'",
        likely="an unknown precision silently trains in fp32",
    )


@pytest.mark.milestone(task="1.6", points=15, section="Saving")
def test_saved_model_comes_back_from_two_ranks(lab, run_experiments):
    """Plain, and under ZeRO-3, where each rank holds half of every weight."""
    from shardlab.run.launch import LaunchTimeout, RankError

    settings = {
        "program": "labs/lab01_baseline/programs.py:save_round_trip",
        "ranks": 2,
        "micro_batch": 2,
        "accumulation": 1,
        "steps": 2,
        "learning_rate": 1e-3,
        "max_tokens": 48,
        "train_examples": 16,
        "evaluate": False,
    }
    zero3 = zero_config({"stage": 3, "stage3_gather_16bit_weights_on_model_save": True})
    lab.save_and_reload  # noqa: B018  (a syntax error shows here, not as a rank's error)
    try:
        runs = run_experiments(
            [Experiment(name="plain", **settings), Experiment(name="zero3", deepspeed=zero3, **settings)], timeout=60
        )
    except LaunchTimeout:
        require(
            False,
            expected="both ranks to come back",
            got="one waits for the other for ever",
            likely="trainer.save_model is called on one rank only; under ZeRO-3 saving is a collective",
        )
    except RankError as error:
        if "from_pretrained" not in error.rank_traceback:
            raise
        late = error.experiment == "plain"
        require(
            False,
            expected="a folder that a model can be read from",
            got=f"rank {error.rank}, {error.experiment}: {error.error}",
            likely="a rank reads before rank 0 has written everything; let all ranks wait for one another first"
            if late
            else "model.save_pretrained under ZeRO-3 writes empty shards; trainer.save_model gathers them",
        )
    for name, run in runs.items():
        got = run.results
        require(
            not got["same_object"],
            expected="a model read from the folder",
            got="the trained model itself",
            likely="trainer.model returned",
        )
        require(
            got["difference"] <= 1e-6,
            expected=f"the trained weights back, bit for bit ({name}, 2 ranks)",
            got=f"weights that differ by {got['difference']:.3g}",
            likely="model.save_pretrained under ZeRO-3 writes empty shards; or the weights were read in a shorter type",
        )
        require(
            got["dtype"] == "torch.float32",
            expected="a model in fp32",
            got=got["dtype"],
            likely="dtype not given to from_pretrained",
        )
        require(
            got["tied"],
            expected="the output layer tied to the embedding, as BLOOM has it",
            got="two separate tensors",
            likely="the state dict was loaded by hand",
        )
        require(
            got["tokenizer"],
            expected="a tokenizer in the folder",
            got="none that can be read",
            likely="tokenizer.save_pretrained left out",
        )


@pytest.mark.milestone(task="1.7", points=15, section="Padding")
def test_batched_answers_equal_single_ones(lab, tokenizer, model):
    import torch

    texts = [
        "A crew of 51 served on the Paiwo. The cargo of the Paiwo was tea. In short: The Paiwo carried",
        "The river",
        "The Loran bridge was opened in 1832. Put once more: In 1832",
    ]
    prompts = [tokenizer(text)["input_ids"] for text in texts]

    def greedy(ids: list[int], steps: int) -> str:
        start = len(ids)
        with torch.no_grad():
            for _ in range(steps):
                ids = ids + [model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()]
        return tokenizer.decode(ids[start:], skip_special_tokens=True).strip()

    wanted = [greedy(prompt, 8) for prompt in prompts]
    for prompt, answer in zip(prompts, wanted, strict=True):
        got = lab.generate_answers(model, tokenizer, [prompt], max_new_tokens=8)
        require(
            isinstance(got, list) and len(got) == 1,
            expected="a list with one text for one prompt",
            got=got,
            likely="the tokens returned, or a lone text",
        )
        likely = "sampling instead of greedy decoding, or fewer new tokens than asked for"
        if tokenizer.decode(prompt)[:6] in got[0]:
            likely = "the prompt is still in front of the answer; decode the new tokens only"
        require(
            got[0] == answer,
            expected=f"{answer!r} for the prompt {tokenizer.decode(prompt)[-30:]!r}",
            got=repr(got[0]),
            likely=likely,
        )
    together = lab.generate_answers(model, tokenizer, prompts, max_new_tokens=8)
    require(
        together == wanted,
        expected=f"the same answers in a batch: {wanted}",
        got=together,
        likely="padding on the right, or an attention mask that lets padding in; or another order",
    )


HISTORY = [
    {"eval_loss": 8.5, "eval_samples_per_second": 300.0, "eval_runtime": 1.0, "epoch": 0, "step": 0},
    {"loss": 6.0, "learning_rate": 5e-5, "epoch": 0.5, "step": 20},
    {"loss": 3.0, "learning_rate": 3e-5, "epoch": 1.0, "step": 40},
    {"eval_loss": 2.5, "eval_samples_per_second": 200.0, "eval_runtime": 1.0, "epoch": 1.0, "step": 40},
    {"loss": 1.25, "learning_rate": 1e-5, "epoch": 2.0, "step": 80},
    {"eval_loss": 2.75, "eval_samples_per_second": 210.0, "eval_runtime": 1.0, "epoch": 2.0, "step": 80},
    {
        "train_runtime": 64.0,
        "train_samples_per_second": 20.0,
        "train_steps_per_second": 1.25,
        "train_loss": 3.4,
        "epoch": 2.0,
        "step": 79,
    },
]


@pytest.mark.milestone(task="1.8", points=10)
def test_summary_reads_the_log(lab):
    got = lab.summarise_training(json.loads(json.dumps(HISTORY)))
    likely = {
        "final_train_loss": "train_loss of the last entry is the mean over all steps; the last 'loss' is asked for",
        "eval_losses": "an evaluation left out (the one before training has epoch 0), or a list instead of {epoch: loss}",
        "train_samples_per_second": "the throughput of the last entry changed; it is over all ranks already",
        "eval_samples_per_second": "the first evaluation taken instead of the last",
        "steps_per_epoch": "the total of steps, not divided by the epochs",
    }
    wanted = {
        "final_train_loss": 1.25,
        "eval_losses": {0.0: 8.5, 1.0: 2.5, 2.0: 2.75},
        "train_samples_per_second": 20.0,
        "eval_samples_per_second": 210.0,
        "steps_per_epoch": 40,
    }
    require(
        set(got) == set(wanted),
        expected=f"the keys {sorted(wanted)}",
        got=sorted(got),
        likely="a key misspelt or left out",
    )
    for key, value in wanted.items():
        require(got[key] == value, expected=f"{key} = {value}", got=got[key], likely=likely[key])
    without = lab.summarise_training([entry for entry in HISTORY if "eval_loss" not in entry])
    require(
        without["eval_losses"] == {} and without["eval_samples_per_second"] is None,
        expected="no evaluation: an empty eval_losses, and None samples/s",
        got=without,
        likely="evaluations[-1] of an empty list",
    )


@pytest.mark.milestone(task="1.9", points=10, section="Where the memory goes")
def test_memory_table_keeps_devices_apart(lab, tmp_path):
    mib = 2**20
    samples = [("rank0", 300), ("rank1", 500), ("rank0", 100), ("rank1", 700), ("rank0", 200), ("rank0", 600)]
    path = tmp_path / "memory.csv"
    path.write_text(
        "seconds,device,used_bytes\n" + "".join(f"{at / 10},{device},{used * mib}\n" for at, (device, used) in enumerate(samples))
    )
    got = lab.memory_table(path)
    wanted = {"rank0": {"peak": 600.0, "mean": 300.0, "minimum": 100.0}, "rank1": {"peak": 700.0, "mean": 600.0, "minimum": 500.0}}
    require(
        set(got) == set(wanted),
        expected="a row for rank0 and one for rank1",
        got=sorted(got),
        likely="devices thrown together",
    )
    for device, row in wanted.items():
        for name, value in row.items():
            require(
                abs(got[device][name] - value) < 1e-6,
                expected=f"{name} of {device}: {value} MiB",
                got=got[device][name],
                likely="MB (10**6) instead of MiB (2**20), or a mean of peak and minimum instead of all samples",
            )
    path.write_text("seconds,device,used_bytes\n")
    require_error(
        lambda: lab.memory_table(path),
        ValueError,
        mentions=("memory.csv",),
        expected="ValueError for a file without samples",
        likely="an empty table passes silently",
    )
