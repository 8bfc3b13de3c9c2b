"""Hidden milestones of lab 01: the same invariants with other texts and numbers."""

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_lab01_baseline import (  # noqa: F401  (fixtures)
    IGNORED,
    encoded_example,
    encoded_prompt,
    memory_rows,
    model,
    prompt_as_described,
    summarised,
    tokenizer,
)

from shardlab.milestones.agreement import agree, solution
from shardlab.milestones.saved_weights import saved_weights
from shardlab.run.experiment import Experiment

QUESTION = "When did the mill at Orvik burn down?"
CONTEXT = (
    "The mill at Orvik was built by two sisters. It burned down in 1907 and was never built again. Its wheel lies in the river. "
    "Visitors find a plate with the names of those who worked there."
)

REFERENCE = solution("lab01_baseline")

WORDS = r"The|bridge|Zürich|1832|“oak”|it’s|🙂|東京|—|</s>|<pad>|<unk>|.|".split("|")
WORDS += ["10\u00a0km", "a\u0301", "\n", "\t", "mill\nat", "x\r\ny", "\r", "\x0b", "a\u2028b", "क\u094d\u200dष"]
MARKS = r'\frac|\d|C:\new|{context}|{question}|{0}|%s|&amp;|&lt;|Question:|Context:|Answer:|"I|came"|(x)|Ms.|Inc.'.split("|")
TEXTS = st.lists(st.sampled_from(WORDS) | st.sampled_from(WORDS + MARKS), max_size=24).map(" ".join)
"""Words between single spaces, of which some are empty: double spaces, line breaks, marks that tokenizers and templates know."""


@pytest.mark.milestone(task="1.1")
def test_another_prompt(lab):
    edges = [("", ""), (" a\n\nb ", "\u00a0c  d\n"), ("\tWho  is\nit?\t", "A  b"), ("Who?", ""), ("name the river", "x")]
    edges += [
        ("What is <context>?", "Context: a"),
        ("What does {context} stand for?", "{question} \\d &amp; \\1"),
        ("Who?\r\n", "b\r\nc"),
    ]
    edges += [("Question: is it?", '"I came", he said. "So"'), ("name\u200dit", "\x85a\u2028b\u3000"), ("Who?", CONTEXT * 40)]
    edges += [(QUESTION, CONTEXT * 40), (QUESTION * 30, CONTEXT), ("10\u00a0km?", "“oak”, it’s 🙂 10\u00a0km")]
    edges += [(f"{space}Who?{space}", f"{space}a b{space}") for space in "\u202f\u2009\u2003\u2029\u1680\u205f\x1c\x1f"]
    agree(lab.format_prompt, REFERENCE.format_prompt, st.tuples(TEXTS, TEXTS), first=edges, record="1.1")
    for question, context in ((QUESTION, CONTEXT), ("\tWho?", "Nobody. \n"), ("Is 3 > 2 ?", "It  is.")):
        assert lab.format_prompt(question, context) == f"Question: {question.strip()} Context: {context.strip()} Answer:"


@pytest.mark.milestone(task="1.2")
def test_another_long_prompt(lab, tokenizer):  # noqa: F811
    whole = tokenizer(f"Question: {QUESTION} Context: {CONTEXT} Answer:")["input_ids"]
    assert list(lab.encode_prompt(tokenizer, QUESTION, CONTEXT, len(whole) + 3)) == whole
    for budget in (len(whole) - 5, len(whole) - 20):
        text = tokenizer.decode(lab.encode_prompt(tokenizer, QUESTION, CONTEXT, budget))
        assert len(tokenizer(text)["input_ids"]) <= budget
        assert text.startswith(f"Question: {QUESTION} Context: The mill") and text.endswith("Answer:")
    whole, bare = (len(tokenizer(REFERENCE.format_prompt(QUESTION, context))["input_ids"]) for context in (CONTEXT, ""))
    exact = [(QUESTION, CONTEXT, budget) for budget in (whole, whole - 1, bare + 1, bare, bare - 1, 0, -1, -90)]
    lab.replace("format_prompt", prompt_as_described)
    lines = CONTEXT.replace(". ", ".\n\n").replace("sisters", "two  sisters,")
    agree(
        encoded_prompt(lab, tokenizer),
        encoded_prompt(REFERENCE, tokenizer),
        st.tuples(st.just(QUESTION) | TEXTS, TEXTS, st.integers(4, 90)),
        first=[*exact, (QUESTION, "", bare), (QUESTION, "one", bare), (QUESTION, " one", bare)]
        + [(QUESTION, lines, budget) for budget in range(bare + 2, whole, 3)]
        + [(QUESTION, " ".join([CONTEXT] * 60), budget) for budget in (4096,)]
        + [(QUESTION, " ".join([CONTEXT] * 30), 60)]
        + [(QUESTION, " ".join(["oak"] * 9000), budget) for budget in (9000, 10**6)]
        + [(QUESTION, "It is 10\u00a0km long and 10\u00a0km wide", budget) for budget in range(bare + 1, bare + 16)]
        + [(QUESTION, "name\tage city\tTorsu 12", budget) for budget in range(bare, bare + 20)]
        + [(QUESTION, "one" + " " * 120 + "two", budget) for budget in (bare + 3, 90)],
        record="1.2",
    )


@pytest.mark.milestone(task="1.3")
def test_another_answer(lab, tokenizer):  # noqa: F811
    example = lab.encode_example(tokenizer, QUESTION, CONTEXT, "in 1907", 400)
    ids, labels = list(example["input_ids"]), list(example["labels"])
    taught = [token for token in labels if token != IGNORED]
    assert len(ids) == len(labels) and labels[-len(taught) :] == taught == ids[-len(taught) :]
    assert tokenizer.decode(taught) == f" in 1907{tokenizer.eos_token}"
    edges = [(QUESTION, CONTEXT, "in 1907", len(ids) + more) for more in (1, 0, -1, -2)] + [(QUESTION, CONTEXT, "", 400)]
    answers = ["oak", "1832", " 1832", "oak ", "oak\n", "the oak", "St. J.", "a\nb", "two sisters", CONTEXT[:90]]
    edges += [(QUESTION, CONTEXT, answer, limit) for answer in answers for limit in (24, 40, 56, 400)]
    edges += [(QUESTION, " ".join([CONTEXT] * 16), "oak", 1024), (QUESTION, " ".join([CONTEXT] * 60), "oak", 4096)]
    edges += [(QUESTION, CONTEXT, " ".join(["oak"] * 900), 2500), (QUESTION, CONTEXT, "the <unk> of Orvik", 400)]
    drawn = st.tuples(TEXTS, TEXTS, TEXTS, st.integers(8, 120))
    agree(encoded_example(lab, tokenizer), encoded_example(REFERENCE, tokenizer), drawn, first=edges)


def equal_tensors(wanted: dict, got: dict) -> bool:
    return set(wanted) == set(got) and all(got[name].dtype == w.dtype and torch.equal(got[name], w) for name, w in wanted.items())


@pytest.mark.milestone(task="1.4")
def test_another_batch(lab):
    rows = [{"input_ids": list(range(20, 20 + n)), "labels": [IGNORED, *range(21, 20 + n)]} for n in (7, 2, 11, 5)]
    batch = lab.collate(rows, 9)
    for number, row in enumerate(rows):
        n = len(row["input_ids"])
        assert batch["input_ids"][number].tolist() == row["input_ids"] + [9] * (11 - n)
        assert batch["attention_mask"][number].tolist() == [1] * n + [0] * (11 - n)
        assert batch["labels"][number].tolist() == row["labels"] + [IGNORED] * (11 - n)
    # Few ids, so that the one of padding stands among real tokens and labels too.
    row = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5) | st.just(IGNORED)), min_size=1, max_size=6).map(
        lambda pairs: {"input_ids": [a for a, _ in pairs], "labels": [b for _, b in pairs]}
    )
    batches = st.tuples(st.lists(row, min_size=1, max_size=5), st.integers(0, 5))
    rows = [
        [{"input_ids": [9] * n, "labels": [IGNORED] * (n - 1) + [last]} for n in lengths]
        for lengths in ([600], [3, 2], [1], [105, 90], [1501, 2], [3] * 17)
        for last in (2, IGNORED, 250_679)
    ]
    large = [[{"input_ids": [7] * n, "labels": [8] * n} for n in lengths] for lengths in ([5000], [1] * 300)]
    agree(
        lab.collate,
        REFERENCE.collate,
        batches,
        first=[(row, pad) for row in rows for pad in (0, 3, 250_001)] + [(many, 3) for many in large],
        same=equal_tensors,
        record="1.4",
    )


@pytest.mark.milestone(task="1.5")
def test_other_overrides(lab, tmp_path):
    got = lab.training_arguments(str(tmp_path), num_train_epochs=7, weight_decay=0.5, gradient_accumulation_steps=9)
    assert (got.num_train_epochs, got.weight_decay, got.gradient_accumulation_steps) == (7, 0.5, 9)
    assert (got.learning_rate, got.per_device_eval_batch_size, got.save_total_limit) == (5e-5, 8, 1)
    changes = {"bf16": False, "weight_decay": 0.0, "save_total_limit": None, "eval_strategy": "no"}
    off = lab.training_arguments(str(tmp_path), precision="bf16", **changes)
    assert (off.bf16, off.weight_decay, off.save_total_limit, off.eval_strategy) == (False, 0.0, None, "no")


@pytest.mark.milestone(task="1.6", ranks=3)
def test_another_model_comes_back(lab, run_experiments):
    lab.save_and_reload  # noqa: B018
    plan = Experiment(
        name="other-seed",
        program="labs/lab01_baseline/programs.py:save_round_trip",
        ranks=3,
        micro_batch=1,
        accumulation=1,
        steps=3,
        learning_rate=3e-3,
        max_tokens=40,
        train_examples=18,
        evaluate=False,
        seed=77,
    )
    (run,) = run_experiments([plan], timeout=90).values()
    got = run.results
    assert got["difference"] <= 1e-6 and not got["same_object"] and got["tied"] and got["tokenizer"]
    # What the ranks said is their word. The folder is looked at too, next to the weights of a run without anybody's exercises.
    alone = plan.model_copy(update={"program": "shardlab.run.training:train_text", "name": "without", "save": True})
    (reference,) = run_experiments([alone], timeout=90, reference=True).values()
    wanted = load_file(reference.folder / "model" / "model.safetensors")
    found = saved_weights(run.folder / "model", plan.model)
    # Between its two calls, the program changes this weight.
    wanted["transformer.ln_f.weight"] = wanted["transformer.ln_f.weight"] + 1.0
    assert len(found) == len(wanted)
    assert all((found[name] - weight).abs().max() <= 1e-5 for name, weight in wanted.items())


@pytest.mark.milestone(task="1.7")
def test_other_prompts(lab, tokenizer, model):  # noqa: F811
    prompts = [tokenizer(text)["input_ids"] for text in ("The crew of the", "In 1832 the bridge over the river was")]
    alone = [lab.generate_answers(model, tokenizer, [prompt], max_new_tokens=5)[0] for prompt in prompts]
    assert lab.generate_answers(model, tokenizer, prompts, max_new_tokens=5) == alone
    assert lab.generate_answers(model, tokenizer, prompts[::-1], max_new_tokens=5) == alone[::-1]


@pytest.mark.milestone(task="1.8")
def test_another_log(lab):
    history = [
        {"loss": 4.0, "epoch": 0.5, "step": 10},
        {"eval_loss": 3.5, "eval_samples_per_second": 11.0, "epoch": 1.0, "step": 20},
        {"loss": 2.0, "epoch": 3.0, "step": 60},
        {"eval_loss": 1.5, "eval_samples_per_second": 13.0, "epoch": 3.0, "step": 60},
        {"train_runtime": 9.0, "train_samples_per_second": 31.0, "train_loss": 3.0, "epoch": 3.0, "step": 60},
    ]
    assert lab.summarise_training(history) == {
        "final_train_loss": 2.0,
        "eval_losses": {1.0: 3.5, 3.0: 1.5},
        "train_samples_per_second": 31.0,
        "eval_samples_per_second": 13.0,
        "steps_per_epoch": 20,
    }
    number = st.floats(0, 9, allow_nan=False) | st.sampled_from([0.0, float("inf")])
    at = st.floats(0, 9, allow_nan=False) | st.just(0.0)
    of_step = st.integers(0, 900)
    trained = st.lists(st.fixed_dictionaries({"loss": number, "epoch": at, "step": of_step}), min_size=1, max_size=4)
    evaluation = {"eval_loss": number, "eval_samples_per_second": number, "epoch": at | st.integers(0, 3), "step": of_step}
    evaluated = st.lists(st.fixed_dictionaries(evaluation), max_size=3)

    @st.composite
    def histories(draw) -> tuple:
        step, epoch = draw(st.integers(1, 500)), draw(st.floats(0.05, 7) | st.integers(1, 7) | st.floats(0.0005, 0.02))
        assume(abs(step / epoch % 1 - 0.5) > 1e-6)  # a half may be rounded either way
        entries = draw(st.permutations([*draw(trained), *draw(evaluated)]))
        last = {"train_runtime": 9.0, "train_samples_per_second": draw(number), "train_loss": 3.0, "epoch": epoch, "step": step}
        return ([*entries, last],)

    summary = {"train_runtime": 9.0, "train_samples_per_second": 5.0, "train_loss": 3.0, "epoch": 1.0, "step": 87_599}
    twice = [
        {"loss": 2.0, "epoch": 1.0, "step": 9},
        summary,
        {"loss": 1.0, "epoch": 2.0, "step": 18},
        summary | {"train_samples_per_second": 7.0, "epoch": 2},
    ]
    long = [{"eval_loss": 8.0, "eval_samples_per_second": 3.0, "epoch": 0, "step": 0}]
    long += [{"loss": 7.0 - at / 100, "epoch": at / 650, "step": at} for at in range(1, 651)] + [summary]
    agree(summarised(lab), summarised(REFERENCE), histories(), first=[(twice,), (long,)], record="1.8")
    longer = long[:1] + [{"loss": 7.0, "epoch": at / 30_000, "step": at} for at in range(1, 30_001)] + [summary]
    agree(summarised(lab), summarised(REFERENCE), st.tuples(st.just(longer)), count=1)


@pytest.mark.milestone(task="1.9")
def test_other_samples(lab, tmp_path):
    path = tmp_path / "samples.csv"
    samples = [("gpu3", 50), ("gpu1", 7), ("gpu3", 150), ("gpu1", 9), ("host", 1000)]
    path.write_text(
        "seconds,device,used_bytes\n" + "".join(f"{at},{name},{used * 2**20}\n" for at, (name, used) in enumerate(samples))
    )
    got = lab.memory_table(path)
    assert {name: (row["peak"], row["mean"], row["minimum"]) for name, row in got.items()} == {
        "gpu3": (150.0, 100.0, 50.0),
        "gpu1": (9.0, 8.0, 7.0),
        "host": (1000.0, 1000.0, 1000.0),
    }
    names = ["0", "NA", 'the "big" one', "gpu0", "GPU1", "rank0", "rank1", "rank10", "rank11", "rank100", "rank101", "a, b"]
    samples = st.tuples(st.sampled_from(names), st.just(0) | st.integers(0, 2**41) | st.integers(2**41, 2**43))

    def same(wanted, got) -> bool:
        return (
            wanted == got
            if isinstance(wanted, str)
            else {name: pytest.approx(row, rel=1e-9) for name, row in wanted.items()} == got
        )

    drawn, edges = st.tuples(st.lists(samples, max_size=12)), [(None,), ([],), ([("rank0", 0)],), ([("gpu0", 2**43)] * 3,)]
    edges += [([("rank1", 5), ("rank10", 6), ("rank1", 7)],), ([("gpu0", 10**9 + at) for at in range(3000)] + [("gpu0", 2**35)],)]
    rows = memory_rows(lab, str(path)), memory_rows(REFERENCE, str(path))
    long = [(f"rank{at % 3}", (at * at) % 10**9) for at in range(120_000)]  # more than an hour of one device
    agree(*rows, st.tuples(st.just(long)), count=1, same=same)
    agree(*rows, drawn, first=edges, count=30, same=same, record="1.9")
