"""Hidden milestones of lab 08: other numbers, seeds, sizes and texts."""

import math

import pytest
import test_lab08_language_model as public
import torch
from test_lab08_language_model import PROGRAMS, articles, blocks_by_hand, documents, experiment, reference

from shardlab.milestones.messages import farthest


@pytest.mark.milestone(task="8.1")
def test_other_tokens(lab):
    facts = lab.observe(f"{PROGRAMS}:tokenizer_facts", {"fill": True, "start": True})
    assert (facts["pad"], facts["eos"], facts["side"]) == ("[FILL]", "<|endoftext|>", "left")
    assert "FOLDER" in lab.observe(f"{PROGRAMS}:tokenizer_facts", {"end": False, "fill": True})["refused"]
    texts = ["\u00a0", "a\nb", " x ", "see help " * 40]
    got = lab.observe(f"{PROGRAMS}:preprocessed", texts, {"start": True, "fill": True})
    assert got["texts"] == texts[1:] and all(got["ends"]) and got["ids"] == got["plain"]


@pytest.mark.milestone(task="8.2")
def test_other_blocks(lab):
    for lengths, length, filling in (([1, 1, 1], 2, 8), ([64, 3], 16, 1), ([10], 10, 5), ([11], 10, 5)):
        got = lab.observe(f"{PROGRAMS}:blocks_of", documents(9, lengths), length, filling)
        assert got["number"] == math.ceil(sum(lengths) / length) and got["types"] == ["torch.int64"]
        assert got["blocks"] == blocks_by_hand(documents(9, lengths), length, filling)
    assert lab.observe(f"{PROGRAMS}:blocks_of", [[4, 0]], -2, 0) == {"refused": "ValueError"}
    assert lab.observe(f"{PROGRAMS}:blocks_of", documents(0, [4]), 4, 0, 2) == {"refused": "IndexError"}


@pytest.mark.milestone(task="8.3")
def test_other_shares(lab):
    for blocks, ranks, seed, epoch, first in ((13, 4, 7, 3, 0), (13, 4, 7, 3, 2), (5, 5, 0, 0, 0), (17, 2, None, 2, 3)):
        got = lab.observe(f"{PROGRAMS}:shares", blocks, ranks, seed, epoch, first)
        whole = lab.observe(f"{PROGRAMS}:shares", blocks, ranks, seed, epoch)["numbers"]
        each = math.ceil(blocks / ranks)
        assert sorted(n for share in whole for n in share) == [*range(blocks)] + [blocks] * (each * ranks - blocks)
        assert got["numbers"] == [share[first:] for share in whole] and got["length"] == [each - first] * ranks
        together = [share[place] for place in range(each) for share in whole]
        assert together[blocks:] == [blocks] * (each * ranks - blocks)
    got = lab.observe(f"{PROGRAMS}:loaders_of", 9, 3, 4, 8)
    assert got["untouched"] and got["samplers"] == ["Share"]
    for split, count in (("train", 9), ("validation", 7), ("test", 3)):
        each = math.ceil(count / 4)
        found = got["batches"][split]
        read = sorted(n for share in found for batch in share[1] for n in batch)
        assert read == [*range(count)] + [count] * (each * 4 - count)
        assert all([len(batch) for batch in share[0]] == [min(3, each - f) for f in range(0, each, 3)] for share in found)


@pytest.mark.milestone(task="8.4")
def test_other_trainings(lab, run_experiments):
    draw = torch.Generator().manual_seed(77)
    logits, labels = 30 * torch.randn(4, 7, 23, generator=draw), torch.randint(0, 23, (4, 7), generator=draw)
    labels[:, 5:] = -100
    labels[2] = -100
    got = lab.observe(f"{PROGRAMS}:sum_of_batch", logits.half(), labels)
    total, count = reference("sum_and_count", logits.half(), labels)
    assert got["tokens"] == count and math.isclose(float(got["total"]), float(total), rel_tol=1e-4)
    plans = [experiment("train-3-zero2", "trained", stage=2, steps=3), experiment("train-5", "trained", steps=5)]
    runs, wanted = run_experiments(plans, timeout=120), reference("losses_by_hand", 6, 0.5)
    for name, steps in (("train-3-zero2", 3), ("train-5", 5)):
        assert all(farthest(losses, wanted[:steps]) < 1e-4 for losses in runs[name].results["losses"])
        assert runs[name].results["training"]


@pytest.mark.milestone(task="8.5")
def test_other_evaluations(lab, run_experiments):
    assert lab.observe(f"{PROGRAMS}:perplexities", [[math.log(50) * 7, 7], [2e3, 1]])[1] == math.inf
    got = run_experiments([experiment("evaluate-zero2", "evaluated", stage=2)], timeout=100)["evaluate-zero2"].results["metrics"]
    wanted = reference("evaluation_by_hand")
    for ranks in got.values():
        for found in ranks:
            assert all(math.isclose(found[name], value, rel_tol=1e-4) for name, value in wanted.items())
    assert lab.observe(f"{PROGRAMS}:evaluated_here", "modes")["after"] == [True, False]
    assert lab.observe(f"{PROGRAMS}:evaluated_here", "nothing")["refused"]
    assert lab.observe(f"{PROGRAMS}:evaluated_here", "bytes")["bytes"] == 0
    assert not lab.observe(f"{PROGRAMS}:evaluated_here", "gradients")["kept"]
    some, by_hand = lab.observe(f"{PROGRAMS}:evaluated_here", "steps"), reference("evaluation_by_hand", 4)
    assert some["tokens"] == by_hand["tokens"] and math.isclose(some["perplexity"], by_hand["perplexity"], rel_tol=1e-3)


@pytest.mark.milestone(task="8.6")
def test_other_generations(lab, run_experiments):
    for prompt, tokens in (("help", 5), ("see help(add). " * 4, 10), ("", 20)):
        for training in (True, False):
            got = lab.observe(f"{PROGRAMS}:generated_here", prompt, tokens, 0.3, training, None)
            assert got["text"] == reference("text_by_hand", prompt, tokens, None) and got["training"] == training
    prompts = ["Return the", "def add(a, b): Return the sum of a"]
    end = reference("greedy_by_hand", prompts[0], 8, None)[4]
    got = run_experiments([experiment("generate-later", "generated", stage=3, end=end)], timeout=100)["generate-later"].results
    assert got["texts"] == [reference("text_by_hand", prompt, 8, end) for prompt in prompts] and got["training"] == [True, True]


@pytest.mark.milestone(task="8.7")
def test_other_checkpoints(lab, run_experiments):
    plans = [experiment("save-one", "saved", ranks=1, sgd=False), experiment("save-zero1", "saved", stage=1, sgd=False)]
    for run in run_experiments(plans, timeout=100).values():
        got = run.results
        assert got["folders"] == ["step-000002", "step-000004"] and got["position_kept"]
        assert all(call["tag"].endswith(".partial") and not call["latest"] for calls in got["calls"] for call in calls)
        assert all(after == ranks[0] for ranks in got["after"] for after in ranks)
        assert all(not {"left-behind.txt", "earlier.txt"} & set(after["files"]) for ranks in got["after"] for after in ranks)
        assert all(
            got["states"][step] == {"step": int(step), "epoch": 1, "batches": int(step) + 1} | got["wanted"] for step in "246"
        )
        assert all(all(ranks) for ranks in got["random"]) and all(call["fresh"] for calls in got["calls"] for call in calls)


@pytest.mark.milestone(task="8.8")
def test_another_run_goes_on(lab, run_experiments):
    for what in ("none", "no folder", "partial", "model", "ranks"):
        got = lab.observe(f"{PROGRAMS}:loaded_where", what)
        assert got["got"] is None and got["loaded"] == 0 and got["untouched"]
        assert bool(got["refused"]) == (what in ("model", "ranks"))
    kinds = [("one", None, 1), ("zero1", 1, 2)]
    plans = []
    for name, stage, ranks in kinds:
        plans.append(experiment(f"whole-{name}", "never_stopped", stage=stage, ranks=ranks, sgd=False))
        plans.append(experiment(f"on-{name}", "goes_on", stage=stage, ranks=ranks, sgd=False, after=f"whole-{name}"))
    runs = run_experiments(plans, timeout=100)
    for name, *_ in kinds:
        got, whole = runs[f"on-{name}"].results, runs[f"whole-{name}"].results["losses"]
        assert got["position"] == {"step": 3, "epoch": 1, "batches": 15}
        assert all(farthest(losses, wanted[3:]) < 1e-4 for losses, wanted in zip(got["losses"], whole))


@pytest.mark.milestone(task="8.9")
def test_other_command_lines(lab):
    words = [word for name, (given, _) in public.GIVEN.items() for word in (f"--{name}", given)] + ["--resume", "--dry-run"]
    got = lab.observe(f"{PROGRAMS}:parsed", words, {"z.json": "{}"})["options"]
    wanted = public.DEFAULTS | {name: value for name, (_, value) in public.GIVEN.items()} | {"resume": True, "dry_run": True}
    assert {name: value for name, value in got.items() if name != "local_rank"} == wanted
    for option, word in (("--batch_size", "-4"), ("--max_length", "0"), ("--learning_rate", "inf"), ("--save_checkpoint", "often")):
        got = lab.observe(f"{PROGRAMS}:parsed", [option, word])
        assert got["status"] == 2 and option in got["said"]
    assert lab.observe(f"{PROGRAMS}:parsed", ["--no_such_option"])["status"] == 2
    assert lab.observe(f"{PROGRAMS}:parsed", ["--out", "x"])["status"] == 2


@pytest.mark.milestone(task="8.10")
def test_other_paragraphs(lab):
    for given in (articles(3, 1), articles(19, 1), articles(45, 4, twice=True)):
        for registered in (False, True):
            assert lab.observe(f"{PROGRAMS}:paragraphs_of", given, registered)["splits"] == public.paragraphs_by_hand(given)
    assert "squad.json" in lab.observe(f"{PROGRAMS}:paragraphs_of", articles(1))["refused"]
    assert "--dataset_config" in lab.observe(f"{PROGRAMS}:paragraphs_of", None, True)["refused"]


@pytest.mark.milestone(task="8.11")
def test_other_bytes(lab):
    texts = ["a" * 40, "ß→∞", " \u00a0"]
    got = lab.observe(f"{PROGRAMS}:bytes_of_tokenizer", {"start": True}, texts)
    assert got["sums"] == [len(text.encode()) for text in texts] and not any(got["special"]) and got["shape"] == [got["size"]]
    assert math.isclose(lab.observe(f"{PROGRAMS}:bits_of", 3.0, 9, 4), 3 / math.log(2) / 4)
    assert math.isnan(lab.observe(f"{PROGRAMS}:bits_of", 3.0, 9, 0))
