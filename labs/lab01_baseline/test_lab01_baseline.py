"""Milestones of lab 01. Each checks what must be true on any machine; none looks at a clock."""

import contextlib
import csv
import dataclasses
import json

import pytest

from shardlab.milestones.agreement import agree_as_recorded
from shardlab.milestones.launches import ranks_come_back
from shardlab.milestones.messages import require, require_equal, require_error
from shardlab.milestones.small_runs import zero_config
from shardlab.run.experiment import Experiment, program_of

PROGRAMS = "labs/lab01_baseline/programs.py"
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
    wanted = f"Question: {QUESTION} Context: {CONTEXT} Answer:"
    require_equal(lab.format_prompt(QUESTION, CONTEXT), wanted, of=f"format_prompt({QUESTION!r}, {CONTEXT!r})")
    lines = CONTEXT.replace(". ", ".\n ")
    require_equal(
        lab.format_prompt(QUESTION, lines),
        wanted.replace(CONTEXT, lines),
        of=f"format_prompt({QUESTION!r}, {lines!r}): white space within the context stays",
    )
    got = lab.format_prompt(f" {QUESTION}\n", f"\n{CONTEXT} ")
    require(
        got == wanted,
        expected="white space around the question and the context stripped",
        got=repr(got),
    )
    for kept in ("1914–1918", "Kon\u00adstanz", "a\u200bb", "a\ufeffb", "QUESTION or CONTEXT", "context, question", "word " * 9000):
        kept = kept.strip()
        wanted = f"Question: {kept}? Context: It is {kept}. Answer:"
        of = f"format_prompt() with {kept!a} in question and context: what is within them stays"
        require_equal(lab.format_prompt(f"{kept}?", f"It is {kept}."), wanted, of=of)
    got = lab.format_prompt("\fWho?\x0b", "\f One.\f")
    require_equal(got, "Question: Who? Context: One. Answer:", of="format_prompt('\\fWho?\\x0b', '\\f One.\\f')")
    agree_as_recorded(lab.format_prompt, __file__, "1.1", "format_prompt{}")


@pytest.mark.milestone(task="1.2", points=10, needs=("1.1",))
def test_long_prompt_loses_context_only(lab, tokenizer):
    whole = tokenizer(lab.format_prompt(QUESTION, CONTEXT))["input_ids"]
    got = lab.encode_prompt(tokenizer, QUESTION, CONTEXT, len(whole))
    require(
        list(got) == whole,
        expected=f"the {len(whole)} ids of the whole prompt, which fits",
        got=tokenizer.decode(got),
    )
    lines = CONTEXT.replace(". ", ".\n ")
    whole_lines = tokenizer(lab.format_prompt(QUESTION, lines))["input_ids"]
    got = lab.encode_prompt(tokenizer, QUESTION, lines, len(whole_lines))
    require(
        list(got) == whole_lines,
        expected="a context of several lines, which fits, as it is",
        got=repr(tokenizer.decode(got)),
    )
    before, after = lab.format_prompt(QUESTION, "|").split("|")
    words = CONTEXT.split(" ")

    def length(count: int) -> int:
        return len(tokenizer(lab.format_prompt(QUESTION, " ".join(words[:count])))["input_ids"])

    for budget in (length(0) + 30, length(0) + 8, len(whole) - 1, length(0)):
        got = lab.encode_prompt(tokenizer, QUESTION, CONTEXT, budget)
        text = tokenizer.decode(got)
        require(len(got) <= budget, expected=f"at most {budget} ids", got=f"{len(got)} ids: {text}")
        require(text.rstrip().endswith("Answer:"), expected=f"a prompt that still ends in 'Answer:' ({budget} ids)", got=text)
        require(QUESTION in text, expected=f"a prompt that still holds the whole question ({budget} ids)", got=text)
        kept = text.removeprefix(before).removesuffix(after).strip()
        require(
            kept.split(" ") == words[: len(kept.split(" "))] or not kept,
            expected=f"whole words of the context's beginning ({budget} ids)",
            got=kept,
        )
        count = len(kept.split(" ")) if kept else 0
        require(
            count == len(words) or length(count + 1) > budget,
            expected=f"as many words of the context as fit into {budget} ids; with {words[min(count, len(words) - 1)]!r} it has "
            f"{length(count + 1)}",
            got=f"{len(got)} ids: {text}",
        )
    long_word = "Antidisestablishmentarianism was tried."
    got = tokenizer.decode(lab.encode_prompt(tokenizer, QUESTION, long_word, length(0)))
    require_equal(got, lab.format_prompt(QUESTION, ""), of=f"encode_prompt(…, {long_word!r}, {length(0)}): no word of it fits")
    for most in (length(0) - 1, 0, -1, -400):
        require_error(
            lambda most=most: lab.encode_prompt(tokenizer, QUESTION, CONTEXT, most),
            ValueError,
            expected=f"ValueError for max_tokens={most}: the prompt without any context has {length(0)}",
        )
    address = f"See https://orvik.example/{'/'.join(f'a{number}b' for number in range(60))} for the mill, or ask."
    whole_of = len(tokenizer(lab.format_prompt(QUESTION, address))["input_ids"])
    got = tokenizer.decode(lab.encode_prompt(tokenizer, QUESTION, address, whole_of - 1))
    require_equal(
        got,
        lab.format_prompt(QUESTION, address.rpartition(" ")[0]),
        of=f"encode_prompt() of a context with a word of many tokens, cut to {whole_of - 1} of its {whole_of}: one word less",
    )
    ends_long = address.removesuffix(" for the mill, or ask.")
    whole_of = len(tokenizer(lab.format_prompt(QUESTION, ends_long))["input_ids"])
    got = tokenizer.decode(lab.encode_prompt(tokenizer, QUESTION, ends_long, whole_of - 100))
    require_equal(
        got,
        lab.format_prompt(QUESTION, "See"),
        of=f"encode_prompt() of a context whose last word has many tokens, cut to {whole_of - 100} of its {whole_of}: one word less",
    )
    many_words = " ".join(["oak"] * 24_000)
    require(
        len(lab.encode_prompt(tokenizer, QUESTION, many_words, 10**6))
        == len(tokenizer(lab.format_prompt(QUESTION, many_words))["input_ids"]),
        expected="the whole prompt of 24,000 words, which fits into 1,000,000 tokens",
        got="less of it",
    )
    got = lab.observe(f"{PROGRAMS}:with_another_tokenizer", VOCABULARY, QUESTION, CONTEXT)
    require_equal(
        got["prompts"],
        [[0, *ids_of(f"Question: {QUESTION} Context: {' '.join(words[:kept])} Answer:")] for kept in (len(words), 5, len(words))],
        of=f"encode_prompt() with a tokenizer of whole words that puts {VOCABULARY[0]} in front: the whole prompt, 5 words of context, and "
        "the whole prompt with more spaces, which are no tokens",
    )
    require_equal(
        got["without"],
        ids_of(f"Question: {QUESTION} Context: {CONTEXT} Answer:"),
        of="encode_prompt() with a tokenizer of the same name that puts nothing in front",
    )
    require_equal(
        got["used before"], got["without"], of="encode_prompt() with a tokenizer that has cut and padded other texts before"
    )
    require_equal(
        got["more tokens"],
        got["more tokens, wanted"],
        of="encode_prompt() with a tokenizer that got more tokens since its last call",
    )
    lab.replace("format_prompt", prompt_as_described)
    agree_as_recorded(encoded_prompt(lab, tokenizer), __file__, "1.2", "encode_prompt{}, the tokenizer left out")


def prompt_as_described(question: str, context: str) -> str:
    """Stands for task 1.1, so that a mistake in it costs nothing here."""
    return " ".join(("Question:", question.strip(), "Context:", context.strip(), "Answer:"))


def encoded_prompt(of, tokenizer):
    return lambda *given: of.encode_prompt(tokenizer, *given)


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
    )
    require(
        ids[: len(prompt)] == prompt,
        expected="input_ids that begin with encode_prompt's ids",
        got=tokenizer.decode(ids),
    )
    require(
        ids[-1] == tokenizer.eos_token_id,
        expected="the end-of-sequence id last",
        got=tokenizer.decode(ids[-8:]),
    )
    taught = [token for token in labels if token != IGNORED]
    require(
        labels[: len(prompt)] == [IGNORED] * len(prompt),
        expected=f"{IGNORED} at all {len(prompt)} tokens of the prompt",
        got=f"{len(taught)} labels are not {IGNORED}: {tokenizer.decode(taught)!r}",
    )
    require(
        tokenizer.decode(taught) == f" {answer}{tokenizer.eos_token}",
        expected=f"labels that spell {' ' + answer + tokenizer.eos_token!r}",
        got=repr(tokenizer.decode(taught)),
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
    )

    for limit in range(len(prompt) - 4, len(prompt) - 14, -1):
        short = lab.encode_example(tokenizer, QUESTION, CONTEXT * 3, answer, limit)
        kept = tokenizer.decode([token for token in short["labels"] if token != IGNORED])
        require(
            len(short["input_ids"]) <= limit,
            expected=f"at most {limit} ids, end-of-sequence included",
            got=f"{len(short['input_ids'])} ids",
        )
        require(
            kept == f" {answer}{tokenizer.eos_token}",
            expected="the whole answer, however long the context",
            got=repr(kept),
        )
        wanted = list(lab.encode_prompt(tokenizer, QUESTION, CONTEXT * 3, limit - len(taught))) + taught
        require(
            list(short["input_ids"]) == wanted,
            expected=f"what encode_prompt gives for {limit} - {len(taught)} tokens, and then the answer: {tokenizer.decode(wanted)!r}",
            got=repr(tokenizer.decode(short["input_ids"])),
        )

    answers = [
        "oak",
        "the U.S.",
        "Inc.",
        "Room 4\nFloor 2",
        "a  b",
        "Zürich",
        '"I came"',
        "—",
        "1832",
        " oak ",
        "the <unk> there",
        "a <s> there",
        " ".join(["oak"] * 2200),
    ]
    for answer in answers:
        taught = [*tokenizer(" " + answer)["input_ids"], tokenizer.eos_token_id]
        bare = len(lab.encode_prompt(tokenizer, QUESTION, "", 500)) + len(taught)
        for limit in (bare + 400, bare + 12, bare):
            start = list(lab.encode_prompt(tokenizer, QUESTION, CONTEXT, limit - len(taught)))
            got = lab.encode_example(tokenizer, QUESTION, CONTEXT, answer, limit)
            require_equal(
                {name: list(got[name]) for name in ("input_ids", "labels")},
                {"input_ids": start + taught, "labels": [IGNORED] * len(start) + taught},
                of=f"encode_example(…, {answer!r}, {limit}): encode_prompt for {limit - len(taught)} tokens, and the answer's {len(taught)}",
            )
        with contextlib.suppress(ValueError):
            lab.encode_prompt(tokenizer, QUESTION, CONTEXT, bare - 1 - len(taught))
            continue  # a prompt that is too long passes there: a matter of task 1.2
        require_error(
            lambda: lab.encode_example(tokenizer, QUESTION, CONTEXT, answer, bare - 1),
            ValueError,
            expected=f"ValueError for {bare - 1} tokens: the answer {answer!r} and the prompt without any context have {bare}",
        )
    articles = " ".join([CONTEXT] * 60)  # longer than the tokenizer's model_max_length, which BLOOM does not know
    start, taught = list(lab.encode_prompt(tokenizer, QUESTION, articles, 4090)), list(tokenizer(" oak")["input_ids"])
    got = lab.encode_example(tokenizer, QUESTION, articles, "oak", 4090 + len(taught) + 1)
    require_equal(
        list(got["input_ids"]), [*start, *taught, tokenizer.eos_token_id], of="encode_example(…) of 4,000 tokens: input_ids"
    )
    articles = " ".join([CONTEXT] * 180)
    start = list(lab.encode_prompt(tokenizer, QUESTION, articles, 10**6))
    got = lab.encode_example(tokenizer, QUESTION, articles, "oak", len(start) + 100)
    require_equal(
        len(got["input_ids"]),
        len(start) + len(taught) + 1,
        of=f"encode_example(…) of {len(start):,} tokens, which fit: their number",
    )
    got = lab.observe(f"{PROGRAMS}:with_another_tokenizer", VOCABULARY, QUESTION, CONTEXT, "Mera nobody Vond")
    prompt, taught = [*ids_of(f"Question: {QUESTION} Context: {CONTEXT} Answer:")], [*ids_of("Mera <unknown> Vond"), END]
    require_equal(
        got["example"],
        {"input_ids": prompt + taught, "labels": [IGNORED] * len(prompt) + taught},
        of=f"encode_example(…, 'Mera nobody Vond', 512) with a tokenizer of whole words, which does not know one of these: {UNKNOWN} stands "
        f"for it; end-of-sequence and padding have one id, {END}",
    )


END, UNKNOWN = 1, 2
VOCABULARY = ["<s>", "<|end|>", "<unknown>", *sorted({*f"Question: {QUESTION} Context: {CONTEXT} Answer:".split()})]
"""Of a tokenizer whose tokens are whole words, as long as BLOOM's."""


def ids_of(text: str) -> list[int]:
    return [VOCABULARY.index(word) for word in text.split()]


def encoded_example(of, tokenizer):
    return lambda *given: of.encode_example(tokenizer, *given)


@pytest.mark.milestone(task="1.4", points=10, section="Padding")
def test_batch_is_padded_to_its_longest_example(lab, model):
    import torch

    rows = [{"input_ids": list(range(10, 10 + n)), "labels": [IGNORED] * 2 + list(range(11, 9 + n))} for n in (4, 9, 6)]
    pad = 11  # among the real tokens and labels too: what is padding, the lengths say
    batch = lab.collate(rows, pad)
    for name in ("input_ids", "attention_mask", "labels"):
        require(
            name in batch and torch.is_tensor(batch[name]) and batch[name].dtype == torch.int64,
            expected=f"a tensor '{name}' of type int64",
            got={key: str(value.dtype) if torch.is_tensor(value) else type(value).__name__ for key, value in batch.items()},
        )
        require(batch[name].device.type == "cpu", expected=f"'{name}' on the CPU", got=str(batch[name].device))
        require(
            tuple(batch[name].shape) == (3, 9),
            expected=f"'{name}' of shape (3, 9): three examples, the longest has 9 tokens",
            got=str(tuple(batch[name].shape)),
        )
    for row, mask, ids, labels in zip(
        rows, batch["attention_mask"].tolist(), batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True
    ):
        n = len(row["input_ids"])
        require(
            ids == row["input_ids"] + [pad] * (9 - n),
            expected=f"{row['input_ids']} and then the padding id {pad}",
            got=ids,
        )
        require(
            mask == [1] * n + [0] * (9 - n),
            expected=f"{n} ones and {9 - n} zeros",
            got=mask,
        )
        require(
            labels == row["labels"] + [IGNORED] * (9 - n),
            expected=f"{IGNORED} at padding",
            got=labels,
        )
    with torch.no_grad():
        together = model(**batch).loss.item()
        alone = [model(**lab.collate([row], pad)).loss.item() for row in rows]
    counts = [sum(label != IGNORED for label in row["labels"][1:]) for row in rows]
    mean = sum(loss * n for loss, n in zip(alone, counts, strict=True)) / sum(counts)
    require(
        abs(together - mean) < 1e-4,
        expected=f"the loss that the examples have one by one, {mean:.4f}",
        got=f"{together:.4f}",
    )
    others = ("token_type_ids", "position_ids", "attention_mask", "special_tokens_mask", "labels_mask")
    more = [row | {"id": 7, "question": "Who?"} | {name: [0] * len(row["input_ids"]) for name in others} for row in rows]
    require_equal(
        {name: tensor.tolist() for name, tensor in lab.collate(more, pad).items()},
        {name: tensor.tolist() for name, tensor in batch.items()},
        of=f"collate() of the same examples with an 'id', a 'question', and {', '.join(others)} of zeros: none of it gets into the batch",
    )
    for token in range(12):
        got = lab.collate([{"input_ids": [token, 5], "labels": [token, 5]}], pad)
        require_equal(got["input_ids"].tolist(), [[token, 5]], of=f"input_ids of batch number {token + 1} of one shape")
    long = [{"input_ids": list(range(n)), "labels": [IGNORED] * n} for n in (5, 9000)]
    with lab.elsewhere():
        got = lab.collate(long, 3)
    require_equal(
        {name: [str(tensor.device), list(tensor.shape)] for name, tensor in got.items()},
        {name: ["cpu", [2, 9000]] for name in ("input_ids", "attention_mask", "labels")},
        of="collate() on a machine with a GPU: device and shape",
    )
    agree_as_recorded(lab.collate, __file__, "1.4", "collate{}")


@pytest.mark.milestone(task="1.5", points=10)
def test_training_arguments_are_those_of_the_course(lab, tmp_path):
    from transformers import TrainingArguments

    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "model.safetensors").write_text("of a run before")
    arguments = lab.training_arguments(str(tmp_path))
    require(
        (tmp_path / "checkpoint-7" / "model.safetensors").exists(),
        expected="the folder of the checkpoints left as it is: only arguments are made",
        got="the checkpoint of an earlier run is gone",
    )
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
        )
    overrides = {"learning_rate": 1e-3, "weight_decay": 0.0, "save_total_limit": None, "save_strategy": "no"}
    changed = lab.training_arguments(str(tmp_path), **overrides)
    got = {name: getattr(getattr(changed, name), "value", getattr(changed, name)) for name in overrides}
    require_equal(got, overrides, of=f"training_arguments(…, **{overrides}), read back")
    for has_gpu in (False, True):
        given = lab.observe(f"{PROGRAMS}:arguments_given", has_gpu)
        require(
            bool(given.get("use_cpu")) is not has_gpu,
            expected=f"use_cpu {not has_gpu} where torch sees {'a' if has_gpu else 'no'} GPU",
            got=given.get("use_cpu", "not given"),
        )
        missing = sorted(set(wanted) - {"bf16", "fp16"} - set(given))
        require(
            not missing,
            expected="each of the course's settings given to TrainingArguments, also where Trainer has the same today",
            got=f"{', '.join(missing)} left out",
        )
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    settings = {**wanted, "use_cpu": True}
    for has_gpu in (False, True):
        given = lab.observe(f"{PROGRAMS}:arguments_given", has_gpu)
        more = {name: value for name, value in given.items() if name not in settings and value != defaults.get(name, value)}
        require(not more, expected="all else as Trainer has it", got=f"{more}, {'with' if has_gpu else 'without'} a GPU")
        got = {name: given.get(name) for name in ("learning_rate", "bf16", "fp16", "report_to")}
        require(
            (got["learning_rate"], bool(got["bf16"]), bool(got["fp16"])) == (5e-5, False, False)
            and got["report_to"] in ("none", ["none"], [], "[]", "['none']"),
            expected="learning rate 5e-5 on any number of ranks, no mixed precision unless asked for, no reporting service with a key for one",
            got=f"{got} with 4 ranks, a key for Weights & Biases, and {'a' if has_gpu else 'no'} GPU",
        )
        sizes = {name: value for name, value in wanted.items() if name not in ("bf16", "fp16", "report_to", "output_dir")}
        require_equal(
            {name: given.get(name) for name in sizes},
            sizes,
            of=f"training_arguments() on rank 1 of 4, {'with' if has_gpu else 'without'} a GPU: what is given to TrainingArguments",
        )
        for precision in ("bf16", "fp16"):
            mixed = lab.observe(f"{PROGRAMS}:arguments_given", has_gpu, precision=precision)
            require_equal(
                sorted(name for name, value in mixed.items() if "16" in name and value),
                [precision],
                of=f"training_arguments(…, {precision!r}), {'with a GPU that knows no bf16' if has_gpu else 'without a GPU'}: what is on",
            )
        forced = lab.observe(f"{PROGRAMS}:arguments_given", has_gpu, use_cpu=has_gpu)
        require_equal(
            forced.get("use_cpu"), has_gpu, of=f"training_arguments(…, use_cpu={has_gpu}) {'with' if has_gpu else 'without'} a GPU"
        )
    for has_gpu in (False, True):
        without = lab.observe(f"{PROGRAMS}:arguments_given", has_gpu)
        for overrides in (
            {"per_device_train_batch_size": 2},
            {"gradient_accumulation_steps": 1},
            {"eval_strategy": "no"},
            {"eval_strategy": "steps"},
            {"save_strategy": "no"},
            {"num_train_epochs": 1},
            {"max_steps": 5},
            {"precision": "bf16"},
            {"precision": "fp16"},
            *(
                {name: 7}
                for name in ("seed", "eval_steps", "save_steps", "logging_steps", "warmup_steps", "per_device_eval_batch_size")
            ),
            {"learning_rate": 1e-3},
            {"weight_decay": 0.0},
            {"report_to": "tensorboard"},
            {"use_cpu": True},
        ):
            given = lab.observe(f"{PROGRAMS}:arguments_given", has_gpu, **overrides)
            others = sorted({*given, *without} - {*overrides, "bf16", "fp16"})
            require_equal(
                {name: given.get(name) for name in others},
                {name: without.get(name) for name in others},
                of=f"training_arguments(…, **{overrides}), all that this does not name",
            )
        require(
            not without["variables"],
            expected="no environment variable changed: other runs of the process go by them too",
            got=f"{without['variables']} changed",
        )
    overrides = {"seed": 7, "logging_steps": 3, "warmup_steps": 2}
    given = lab.observe(f"{PROGRAMS}:arguments_given", False, **overrides)
    require_equal({name: given.get(name) for name in overrides}, overrides, of="overrides as they are given to TrainingArguments")
    for unknown in ("evaluation_strategy", "learning_rte"):
        require_error(
            lambda unknown=unknown: lab.training_arguments(str(tmp_path), **{unknown: "no"}),
            TypeError,
            mentions=(unknown,),
            expected=f"TypeError for {unknown}=…, which TrainingArguments does not know",
        )
    overrides = {"max_steps": 5, "seed": 7, "per_device_train_batch_size": 2, "num_train_epochs": 7, "eval_strategy": "no"}
    overrides |= {"use_cpu": True, "bf16": False, "report_to": ["tensorboard"]}
    changed = lab.training_arguments(str(tmp_path), precision="bf16", **overrides)
    got = {name: getattr(getattr(changed, name), "value", getattr(changed, name)) for name in overrides}
    require_equal(got, overrides, of=f"training_arguments(…, precision='bf16', **{overrides}), read back")
    require_equal(changed.per_device_eval_batch_size, 8, of="the same, per_device_eval_batch_size, which nobody changed")
    for precision in ("bf16", "fp16"):
        mixed = lab.training_arguments(str(tmp_path), precision=precision)
        got = {"bf16": mixed.bf16, "fp16": mixed.fp16}
        require_equal(got, {"bf16": precision == "bf16", "fp16": precision == "fp16"}, of=f"training_arguments(…, {precision!r})")
    for unknown in ("fp8", "BF16", "tf32", "float16", "f16", "p32", "16", "", "bf16-mixed", "fp16x", "fp32 ", "mixed-bf16"):
        require_error(
            lambda unknown=unknown: lab.training_arguments(str(tmp_path), precision=unknown),
            ValueError,
            mentions=(unknown,),
            expected=f"ValueError for precision {unknown!r}",
        )


@pytest.mark.milestone(task="1.6", points=15, section="Saving")
def test_saved_model_comes_back_from_two_ranks(lab, run_experiments):
    """Plain, and under ZeRO-3, where each rank holds half of every weight."""
    from shardlab.run.launch import RankError

    settings = {
        "program": f"{PROGRAMS}:save_round_trip",
        "ranks": 2,
        "micro_batch": 2,
        "accumulation": 1,
        "steps": 2,
        "learning_rate": 1e-3,
        "max_tokens": 48,
        "train_examples": 16,
        "evaluate": False,
    }
    zero3 = zero_config({"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}, precision="bf16")
    lab.save_and_reload  # noqa: B018  (a syntax error shows here, not as a rank's error)
    try:
        with ranks_come_back():
            runs = run_experiments(
                [Experiment(name="plain", **settings), Experiment(name="zero3", deepspeed=zero3, precision="bf16", **settings)],
                timeout=60,
            )
            runs |= run_experiments([Experiment(name="alone", **(settings | {"ranks": 1, "train_examples": 4}))], timeout=60)
    except RankError as error:
        if "from_pretrained" not in error.rank_traceback:
            raise
        require(
            False,
            expected="a folder that every rank can read a model from: none reads before rank 0 has written all of it",
            got=f"rank {error.rank}, {error.experiment}: {error.error}",
        )
    for name, run in runs.items():
        got = run.results
        require(
            not got["same_object"],
            expected="a model read from the folder",
            got="the trained model itself",
        )
        require(
            got["difference"] <= 1e-6,
            expected=f"the trained weights back, bit for bit, from a folder that holds an earlier model ({name}, {len(got['saves'])} ranks)",
            got=f"weights that differ by {got['difference']:.3g}",
        )
        require(
            got["device"] == "cpu" and not got["moved"],
            expected="a model on the CPU, and the trainer's own where it was",
            got=f"one on {got['device']}; the trainer's own {'moved' if got['moved'] else 'stays'}",
        )
        require(got["others_stay"], expected="what else lies in the folder to stay there", got="a file of notes that is gone")
        require(not got["trainer_changed"], expected="a trainer that is left as it was", got="another processing_class in it")
        require(got["padding_side"] == "left", expected="the tokenizer saved as it is", got=f"padding on the {got['padding_side']}")
        require(
            got["dtype"] == "torch.float32",
            expected="a model in fp32",
            got=got["dtype"],
        )
        require(
            got["tied"],
            expected="the output layer tied to the embedding, as BLOOM has it",
            got="two separate tensors",
        )
        require(
            got["tokenizer"],
            expected="a tokenizer in the folder",
            got="none that can be read",
        )
        require(
            got["saves"] == [2, 0][: len(got["saves"])],
            expected="the tokenizer saved by rank 0, and by no other: two that write one file can leave half of it",
            got=f"in two calls {got['saves'][0]} × by rank 0, {sum(got['saves'][1:])} × by others",
        )
        require(
            not got["too_early"],
            expected="no rank to go on before all files are in the folder",
            got="a rank that read the model while the tokenizer was still being saved",
        )
    require(
        runs["alone"].results["other_class"] == "GPT2LMHeadModel",
        expected="a model of the class that the folder's config.json names: a GPT-2 back as GPT2LMHeadModel",
        got=runs["alone"].results["other_class"],
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
    # One has the padding id among its own, where it changes the answer if it is taken for padding; and one is longer.
    prompts += [[*prompts[0][:9], *[tokenizer.pad_token_id] * 3, *prompts[0][9:]], tokenizer(texts[0] * 8)["input_ids"]]

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
        )
        require(
            got[0] == answer,
            expected=f"{answer!r} for the prompt {tokenizer.decode(prompt)[-30:]!r}",
            got=repr(got[0]),
        )
    together = lab.generate_answers(model, tokenizer, prompts, max_new_tokens=8)
    require_equal(together, wanted, of="generate_answers() on the same prompts in one batch")
    twice = lab.generate_answers(model, tokenizer, [*prompts, prompts[0]], max_new_tokens=8)
    require_equal(twice, [*wanted, wanted[0]], of="generate_answers() on a batch that has one prompt twice")
    long = tokenizer(texts[0] * 72)["input_ids"]
    others = lab.observe(f"{PROGRAMS}:answers_of_other_models", prompts, 8, long)
    ends = [greedy(prompt, 2) for prompt in prompts]
    require_equal(
        others["ending"],
        ends,
        of="generate_answers() with a model that writes </s> after two tokens, of which its own settings do not know that it ends a text",
    )
    require_equal(
        others["whole prompt"],
        ["all of it"],
        of=f"generate_answers() with a model that looks whether it got all {len(long)} tokens",
    )
    require_equal(
        others["sampling"], wanted, of="generate_answers() with a model whose generation_config says do_sample=True and num_beams=3"
    )
    require_equal(others["training"], wanted, of="generate_answers() with a model in training mode, with dropout")
    require_equal(others["at once"], [""] * len(prompts), of="generate_answers() with a model that writes </s> at once")
    require_equal(
        others["changed"],
        others["changed_wanted"],
        of="generate_answers() with a model that was trained further since its last call",
    )
    require_equal(others["padding on the right"], wanted, of="generate_answers() with a tokenizer whose padding_side is 'right'")
    require(
        not others["left in training"],
        expected="a model in evaluation mode afterwards: what its caller computes next is without dropout too",
        got="one in training mode",
    )
    require(
        not others["random state changed"],
        expected="no random number drawn, and no seed set: training goes on with the numbers that are next",
        got="another state of Python's, NumPy's or torch's generator",
    )
    placed = lab.observe(f"{PROGRAMS}:placed_next_to_a_gpu", prompts)
    require_equal(
        placed["on"],
        {"input_ids": "gpu", "attention_mask": "gpu"},
        of="where the inputs are that model.generate() gets, of a model whose model.device is a GPU",
    )
    require(
        not placed["max_time"],
        expected="answers that do not depend on how fast a machine is",
        got="max_time given to model.generate()",
    )
    require_equal(lab.generate_answers(model, tokenizer, []), [], of="generate_answers() of no prompts")
    many = [prompts[at % len(prompts)] for at in range(41)]
    got = lab.generate_answers(model, tokenizer, many, max_new_tokens=2)
    require_equal(
        got, [greedy(prompt, 2) for prompt in prompts] * 8 + [greedy(prompts[0], 2)], of="generate_answers() of 41 prompts"
    )
    said = [program_of(f"{PROGRAMS}:SCRIPT").strip()] * len(prompts)
    require_equal(
        others["scripted"],
        said,
        of="generate_answers() with a model that says one text to every prompt, of which its own settings call a token the end",
    )
    lengths = sorted({len(prompt) for prompt in prompts})
    scripts = ("tea  oak", '"I came", he said', "Zürich Context: 東京, 10² ﬁ", "one two three four five six seven", "")
    said = [scripts[lengths.index(len(prompt))] for prompt in prompts]
    require_equal(
        others["different"],
        said,
        of="generate_answers() with a model that says something else to each prompt, and goes on after </s>",
    )
    endless = tokenizer(" one two" * 60)["input_ids"]
    for name, count, given in (("default", 24, "without max_new_tokens"), ("long", 100, "max_new_tokens=100")):
        said = tokenizer.decode(endless[:count], skip_special_tokens=True).strip()
        require_equal(others[name], [said], of=f"generate_answers() with a model that goes on for ever, {given}")


HISTORY = [
    {"eval_loss": 8.5, "eval_samples_per_second": 300.0, "eval_runtime": 1.0, "epoch": 0, "step": 0},
    {"loss": 6.0, "learning_rate": 5e-5, "epoch": 0.5, "step": 20},
    {"eval_loss": 4.5, "eval_samples_per_second": 190.0, "eval_runtime": 1.0, "epoch": 0.5, "step": 20},
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
        "step": 80,
    },
]


@pytest.mark.milestone(task="1.8", points=10)
def test_summary_reads_the_log(lab):
    got = lab.summarise_training(json.loads(json.dumps(HISTORY)))
    wanted = {
        "final_train_loss": 1.25,
        "eval_losses": {0.0: 8.5, 0.5: 4.5, 1.0: 2.5, 2.0: 2.75},
        "train_samples_per_second": 20.0,
        "eval_samples_per_second": 210.0,
        "steps_per_epoch": 40,
    }
    require_equal(
        got, wanted, of="summarise_training(…) of three evaluations after the one before training, and 80 steps in 2 epochs"
    )
    for name, kind in (("steps_per_epoch", int), ("eval_losses", dict)):
        require(type(got[name]) is kind, expected=f"{name} of type {kind.__name__}", got=type(got[name]).__name__)
    for steps, epochs, per_epoch in ((121, 3.0, 40), (119, 3.0, 40), (50, 1.25, 40)):
        first, last = ({"loss": loss, "epoch": epochs, "step": steps} for loss in (2.0, 0.0))
        history = [first, last, HISTORY[-1] | {"step": steps, "epoch": epochs}]
        got = lab.summarise_training(history)
        require_equal(got["steps_per_epoch"], per_epoch, of=f"steps_per_epoch of {steps} steps in {epochs:g} epochs")
        require_equal(got["final_train_loss"], 0.0, of="final_train_loss where the last loss is 0.0")
    diverged = lab.summarise_training([*HISTORY[:-1], {"loss": float("nan"), "epoch": 2.0, "step": 80}, HISTORY[-1]])
    require(
        diverged["final_train_loss"] != diverged["final_train_loss"],
        expected="final_train_loss nan where the last loss is nan: the run has diverged",
        got=diverged["final_train_loss"],
    )
    nan = [HISTORY[0], HISTORY[2] | {"eval_loss": float("nan")}, *HISTORY[3:]]
    require_equal(
        sorted(lab.summarise_training(nan)["eval_losses"]),
        [0.0, 0.5, 1.0, 2.0],
        of="the epochs of eval_losses, where the second loss is nan",
    )
    others = [{"epoch": 1.5, "step": 60, "grad_norm": 2.5}, {"memory": 3}]
    got = lab.summarise_training(
        [*HISTORY[:4], *others, *HISTORY[4:6], {"loss": 2, "epoch": 2, "step": 80}, others[0], *HISTORY[6:]]
    )
    require_equal(
        got,
        wanted | {"final_train_loss": 2},
        of="summarise_training(…) where entries with neither loss nor eval_loss stand between, and the last loss is the number 2",
    )
    without = lab.summarise_training([entry for entry in HISTORY if "eval_loss" not in entry])
    require(
        without["eval_losses"] == {} and without["eval_samples_per_second"] is None,
        expected="no evaluation: an empty eval_losses, and None samples/s",
        got=without,
    )
    agree_as_recorded(summarised(lab), __file__, "1.8", "summarise_training{}")


def summarised(of):
    """With the types of the epochs, which are floats."""

    def summary(history: list[dict]) -> dict:
        found = of.summarise_training(history)
        return dict(found) | {"eval_losses": sorted([repr(epoch), loss] for epoch, loss in found["eval_losses"].items())}

    return summary


@pytest.mark.milestone(task="1.9", points=10, section="Where the memory goes")
def test_memory_table_keeps_devices_apart(lab, tmp_path):
    mib = 2**20
    # Of different lengths when they are written: as texts, 95 is above 500.
    samples = [("rank0", 300), ("rank1", 500), ("rank0", 95), ("rank1", 1100), ("rank0", 205), ("rank0", 601)]
    path = tmp_path / "memory.csv"
    path.write_text(
        "seconds,device,used_bytes\n" + "".join(f"{at / 10},{device},{used * mib}\n" for at, (device, used) in enumerate(samples))
    )
    for beside in ("memory.node2.csv", "memory (1).csv", "other.csv"):
        (tmp_path / beside).write_text(f"seconds,device,used_bytes\n0.0,rank0,{9999 * mib}\n")
    got = lab.memory_table(path)
    wanted = {"rank0": {"peak": 601.0, "mean": 300.25, "minimum": 95.0}, "rank1": {"peak": 1100.0, "mean": 800.0, "minimum": 500.0}}
    require(
        set(got) == set(wanted),
        expected="a row for rank0 and one for rank1",
        got=sorted(got),
    )
    for device, row in wanted.items():
        for name, value in row.items():
            require(
                abs(got[device][name] - value) < 1e-6,
                expected=f"{name} of {device}: {value} MiB",
                got=got[device][name],
            )
    path.write_text("seconds,device,used_bytes\n")
    require_error(
        lambda: lab.memory_table(path),
        ValueError,
        mentions=("memory.csv",),
        expected="ValueError for a file without samples",
    )
    names = ["0", "NA", "null", "1e3", "nan", 'the "big" one', "a, b", "001", ""]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("seconds", "device", "used_bytes"), *((0.0, name, mib) for name in names)])
    got = sorted(lab.memory_table(path))
    require_equal(got, sorted(names), of=f"the devices of memory_table() of a file with the devices {names}")
    hours = 80_000
    lines = (f"{at / 10},gpu{at % 2},{mib * (1 + (at >= hours - 2) + 2 * (at < 4))}\n" for at in range(hours))
    path.write_text("seconds,device,used_bytes\n" + "".join(lines))
    got = {device: {name: round(value, 9) for name, value in row.items()} for device, row in lab.memory_table(path).items()}
    row = {"peak": 3.0, "mean": round(1 + 5 / (hours // 2), 9), "minimum": 1.0}
    require_equal(got, {"gpu0": row, "gpu1": row}, of="memory_table() of a file of 80,000 samples, whose first and last are larger")
    agree_as_recorded(memory_rows(lab, str(tmp_path / "drawn.csv")), __file__, "1.9", "memory_table() of a file with the rows {}")


def memory_rows(of, path: str):
    """Of a file with these devices and bytes, or of one that is empty; an error says whether it names the file."""

    def table(rows: list | None) -> dict | str:
        with open(path, "w", newline="") as file:
            # Several samples of one moment: the course's times have two digits.
            lines = ((f"{at // 3 / 10:.2f}", *row) for at, row in enumerate(rows or []))
            written = [] if rows is None else [("seconds", "device", "used_bytes"), *lines]
            csv.writer(file).writerows(written)
        try:
            return {name: dict(row) for name, row in of.memory_table(path).items()}
        except ValueError as error:
            return f"ValueError that names the file: {path.rpartition('/')[2] in str(error)}"

    return table
