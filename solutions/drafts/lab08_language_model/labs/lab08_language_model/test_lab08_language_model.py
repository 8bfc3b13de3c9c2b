"""Milestones of lab 08. The judges are sums over single tokens, a greedy loop, and a run that never stopped."""

import math

import pytest
import torch

from shardlab.milestones.launches import ranks_come_back
from shardlab.milestones.messages import farthest, require, require_equal
from shardlab.milestones.small_runs import zero_config
from shardlab.run.experiment import Experiment, program_of

PROGRAMS = "labs/lab08_language_model/programs.py"
SGD = {"type": "SGD", "params": {"lr": 0.5}}


def experiment(name: str, program: str, *, ranks: int = 2, stage: int | None = None, sgd: bool = True, **options) -> Experiment:
    """A small GPT-2 on ranks, with plain SGD and no clipping, or with Adam."""
    config = None
    if stage is not None and sgd:
        config = zero_config(
            stage, micro_batch=1, accumulation=1, ranks=ranks, clipping=0.0, optimizer=SGD, zero_allow_untested_optimizer=True
        )
    elif stage is not None:
        config = zero_config(stage, micro_batch=1, accumulation=1, ranks=ranks, adam={"lr": 1e-2})
    return Experiment(
        name=name,
        program=f"{PROGRAMS}:{program}",
        ranks=ranks,
        micro_batch=1,
        learning_rate=0.5 if sgd else 1e-2,
        deepspeed=config,
        save=False,
        options=options,
    )


def reference(name: str, *given):
    """A function of programs.py, without anybody's exercises."""
    return program_of(f"{PROGRAMS}:{name}")(*given)


def rounded(values: list) -> list:
    return [round(value, 5) if isinstance(value, float) else value for value in values]


# --- 8.1 ------------------------------------------------------------------------------------------------------------

TEXTS = ["Return the sum of a and b.", "   \n ", "\n  def add(a, b):\n", "", "<|start|> help(add) " * 9]


@pytest.mark.milestone(task="8.1", points=8, section="From documents to blocks")
def test_tokens(lab):
    for words, options, wanted in (
        ("a tokenizer without a token to fill up with", {}, {"pad": "<|endoftext|>"}),
        ("one that has a token to put in front", {"start": True}, {"pad": "<|endoftext|>"}),
        ("a tokenizer that has one, [FILL]", {"fill": True}, {"pad": "[FILL]"}),
        ("one that has one with the number 0", {"fill": True, "fill_first": True}, {"pad": "[FILL]"}),
    ):
        got = lab.observe(f"{PROGRAMS}:tokenizer_facts", options)
        wanted |= {"eos": "<|endoftext|>", "side": "left", "size": 300}
        require_equal(got, wanted, of=f"pad_token, eos_token, padding_side and number of tokens of get_tokenizer() for {words}")
    for options in ({"end": False}, {"end": False, "start": True}):
        got = lab.observe(f"{PROGRAMS}:tokenizer_facts", options)
        require(
            "FOLDER" in got.get("refused", ""),
            expected="ValueError for a tokenizer without an end-of-sequence token, in a sentence with its name, the folder",
            got=got,
        )
    for words, options in (("GPT-2's kind", {}), ("a kind that puts a token in front", {"start": True})):
        got = lab.observe(f"{PROGRAMS}:preprocessed", TEXTS, options)
        shown = f"for {len(TEXTS)} documents, two of blanks alone, and a tokenizer of {words}"
        require_equal(got["columns"], ["input_ids"], of=f"the columns that preprocess_function() gives, {shown}")
        require_equal(got["ids"], got["plain"], of=f"the documents by Dataset.map and by a plain call, {shown}")
        require_equal(got["texts"], [TEXTS[0], TEXTS[2], TEXTS[4]], of=f"the documents' tokens without the last, as text, {shown}")
        require(all(got["ends"]), expected=f"the end-of-sequence token at the end of each document, {shown}", got=got["ends"])
    empty = lab.observe(f"{PROGRAMS}:preprocessed", [" ", "a", "", "\n"], {})
    require_equal(empty["blank"], {"input_ids": []}, of="preprocess_function({'text': [' ', '']}, tokenizer)")
    require_equal(len(empty["ids"]), 1, of="the number of documents left of [' ', 'a', '', '\\n'], in batches of two")


# --- 8.2 ------------------------------------------------------------------------------------------------------------


def documents(seed: int, lengths: list[int]) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 300, (length - 1,), generator=draw).tolist() + [0] for length in lengths]


def blocks_by_hand(texts: list[list[int]], length: int, filling: int) -> list[dict]:
    tokens, found = [token for text in texts for token in text], []
    for first in [*range(0, len(tokens), length), None]:
        kept = [] if first is None else tokens[first : first + length]
        missing = length - len(kept)
        found.append(
            {
                "input_ids": kept + [filling] * missing,
                "attention_mask": [1] * len(kept) + [0] * missing,
                "labels": kept + [-100] * missing,
            }
        )
    return found


@pytest.mark.milestone(task="8.2", points=10, section="From documents to blocks")
def test_blocks(lab):
    for lengths, length, filling in (([5, 9, 2], 8, 7), ([4, 4, 4], 4, 0), ([3], 8, 9), ([20, 1, 1, 1], 2, 0), ([7, 8], 5, 299)):
        texts = documents(sum(lengths), lengths)
        shown = f"Blocks(documents of {lengths} tokens, {length}, {filling})"
        got = lab.observe(f"{PROGRAMS}:blocks_of", texts, length, filling)
        require("number" in got, expected=f"{-(-sum(lengths) // length)} blocks of {shown}", got=got)
        wanted = blocks_by_hand(texts, length, filling)
        require_equal(got["number"], len(wanted) - 1, of=f"len({shown})")
        require_equal(got["types"], ["torch.int64"], of=f"the types of a block's tensors, {shown}")
        for number, (found, right) in enumerate(zip(got["blocks"], wanted)):
            require_equal(
                {name: found.get(name) for name in sorted(found)},
                {name: right[name] for name in sorted(right)},
                of=f"{shown}[{number}]" + (", the block of filling alone" if number == len(wanted) - 1 else ""),
            )
    require_equal(
        lab.observe(f"{PROGRAMS}:blocks_of_a_generator", documents(0, [5, 6]), 4),
        [3, documents(0, [5, 6])[0][:4]],
        of="how many blocks of 4 come of 11 tokens from a generator, and the first one's tokens",
    )
    for texts, length in (([[4, 0]], 1), ([[4, 0]], 0), ([], 4), ([[]], 4)):
        got = lab.observe(f"{PROGRAMS}:blocks_of", texts, length, 0)
        require_equal(got.get("refused"), "ValueError", of=f"the error of Blocks({texts}, {length}, 0)")
    for at in (3, 4, -1):
        got = lab.observe(f"{PROGRAMS}:blocks_of", documents(0, [5]), 4, 0, at)
        require_equal(got["refused"], "IndexError", of=f"the error of block {at}, where there are two and the one of filling")


# --- 8.3 ------------------------------------------------------------------------------------------------------------


@pytest.mark.milestone(task="8.3", points=10, section="Each rank its share")
def test_shares(lab):
    for blocks, ranks, seed in ((10, 2, 0), (11, 2, 1), (7, 3, 5), (1, 4, 2), (9, 4, None), (6, 1, 3), (8, 2, -7)):
        shown = f"{ranks} Share(s) of {blocks} blocks, seed {seed}"
        orders = []
        for epoch in (0, 1):
            got = lab.observe(f"{PROGRAMS}:shares", blocks, ranks, seed, epoch)
            numbers, each = got["numbers"], -(-blocks // ranks)
            require_equal([len(share) for share in numbers], [each] * ranks, of=f"how many numbers each rank has, {shown}")
            require_equal(got["length"], [each] * ranks, of=f"len() of each, {shown}")
            interleaved = [share[place] for place in range(each) for share in numbers]
            require_equal(
                sorted(interleaved),
                list(range(blocks)) + [blocks] * (each * ranks - blocks),
                of=f"all numbers together: each block once, and {blocks} where they do not divide, {shown}",
            )
            require_equal(
                interleaved[blocks:], [blocks] * (each * ranks - blocks), of=f"the last numbers of the last ranks, {shown}"
            )
            orders.append(interleaved[:blocks])
            alone = lab.observe(f"{PROGRAMS}:shares", blocks, 1, seed, epoch)["numbers"][0]
            require_equal(
                orders[-1], alone, of=f"the numbers of all ranks in turn, {shown}: the order that one rank has, epoch {epoch}"
            )
        if seed is None:
            require_equal(orders, [list(range(blocks))] * 2, of=f"the order of two epochs, {shown}: that of the text")
        elif blocks > 5:
            require(
                orders[0] != orders[1] and list(range(blocks)) not in orders,
                expected=f"an order of its own in each epoch, of {shown}",
                got=orders,
            )
            other = lab.observe(f"{PROGRAMS}:shares", blocks, ranks, seed + 1, 1)["numbers"]
            require(other != got["numbers"], expected=f"another order with seed {seed + 1}, of {shown}", got="the same")
    whole = lab.observe(f"{PROGRAMS}:shares", 11, 2, 4, 1)["numbers"]
    rest = lab.observe(f"{PROGRAMS}:shares", 11, 2, 4, 1, 4)
    require_equal(
        rest["numbers"], [share[4:] for share in whole], of="the shares after begin(1, first=4), of 11 blocks on two ranks"
    )
    require_equal(rest["length"], [2, 2], of="len() of each after begin(1, first=4), of 11 blocks on two ranks")
    over = lab.observe(f"{PROGRAMS}:shares", 11, 2, 4, 1, 9)
    require_equal(over, {"numbers": [[], []], "length": [0, 0]}, of="the shares after begin(1, first=9), and len() of each")
    one, other = (lab.observe(f"{PROGRAMS}:loaders_of", 11, 2, 2, seed)["batches"]["train"] for seed in (3, 4))
    require(one != other, expected="other batches of train with another seed, of get_dataloaders()", got="the same")
    for blocks, batch_size, ranks in ((11, 2, 2), (8, 4, 1)):
        got = lab.observe(f"{PROGRAMS}:loaders_of", blocks, batch_size, ranks, 3)
        shown = f"get_dataloaders() of {blocks}, {blocks - 2} and 3 blocks, {batch_size} at a time, on {ranks} rank(s)"
        require_equal(got["samplers"], ["Share"], of=f"the type of loader.sampler, {shown}")
        for split, count in (("train", blocks), ("validation", blocks - 2), ("test", 3)):
            found = got["batches"][split]
            each = -(-count // ranks)
            sizes = [min(batch_size, each - first) for first in range(0, each, batch_size)]
            for epoch in (0, 1):
                for share in found:
                    require_equal([len(batch) for batch in share[epoch]], sizes, of=f"the sizes of the batches of {split}, {shown}")
                read = sorted(number for share in found for batch in share[epoch] for number in batch)
                require_equal(
                    read, [*range(count)] + [count] * (each * ranks - count), of=f"the blocks of {split} on all ranks, {shown}"
                )
            same = all(share[0] == share[1] for share in found)
            require(
                same == (split != "train"),
                expected=f"{split} in {'another order in each epoch' if split == 'train' else 'the order of the text'}, {shown}",
                got=found,
            )
            if split != "train":
                first = [number for batch in found[0][0] for number in batch]
                require_equal(first, list(range(0, each * ranks, ranks))[:each], of=f"the blocks of rank 0 of {split}, {shown}")
        require(
            got["untouched"],
            expected=f"torch's own generator as it was before the passes, {shown}",
            got="another state: a loader without a generator of its own draws from it",
        )


# --- 8.4 ------------------------------------------------------------------------------------------------------------


@pytest.mark.milestone(task="8.4", points=13, section="Training with an engine", timeout=180)
def test_training(lab, run_experiments):
    draw = torch.Generator().manual_seed(3)
    for rows, length, kept in ((2, 6, 1.0), (3, 5, 0.5), (1, 4, 0.0)):
        logits = 4 * torch.randn(rows, length, 11, generator=draw)
        labels = torch.randint(0, 11, (rows, length), generator=draw)
        labels[torch.rand(rows, length, generator=draw) >= kept] = -100
        for dtype in (torch.float32, torch.bfloat16):
            given, shown = logits.to(dtype), f"summed_loss() of logits [{rows}, {length}, 11] in {dtype}, labels {labels.tolist()}"
            got = lab.observe(f"{PROGRAMS}:sum_of_batch", given, labels)
            wanted, count = reference("sum_and_count", given, labels)
            require_equal(got["types"], ["torch.float32", "torch.int64"], of=f"the types of what {shown} gives")
            require_equal(got["tokens"], count, of=f"how many tokens are predicted: {shown}")
            require(
                math.isclose(float(got["total"]), float(wanted), rel_tol=1e-5, abs_tol=1e-5),
                expected=f"{wanted:.5f} from {shown}",
                got=f"{got['total']:.5f}",
            )
            require(
                bool(torch.isfinite(got["gradient"]).all()), expected=f"a finite gradient of {shown}", got=got["gradient"].tolist()
            )
    plans = [experiment(f"train-{name}", "trained", stage=stage) for name, stage in (("ddp", None), ("zero2", 2), ("zero3", 3))]
    plans += [experiment("train-some", "trained", steps=2), experiment("train-none", "trained", steps=0)]
    plans.append(experiment("train-one", "trained", ranks=1))
    with ranks_come_back():
        runs = run_experiments(plans, timeout=120)
    wanted = reference("losses_by_hand", 6, 0.5)
    for name, words in (
        ("train-one", "one rank"),
        ("train-ddp", "two ranks"),
        ("train-zero2", "two ranks with ZeRO-2"),
        ("train-zero3", "two ranks with ZeRO-3"),
    ):
        got = runs[name].results
        shown = f"train_epoch() on {words}, SGD with a learning rate of 0.5, rows with 11, 2, 9 and 4 predicted tokens and less"
        require(got["training"], expected=f"a model in training mode in each forward pass, {shown}", got="one in evaluation mode")
        for place, losses in enumerate(got["losses"]):
            require(
                farthest(losses, wanted) < 1e-4,
                expected=f"the losses {rounded(wanted)}, of one process with all rows; {shown}",
                got=f"{rounded(losses)} on rank {place}",
            )
        masks = sum(int(reference("rows_of_step", step)["attention_mask"].sum()) for step in range(6))
        if name == "train-one":
            require_equal(sum(got["masks"]), masks, of="the ones in the attention masks that the model gets, over six steps")
        require_equal(got["at_first"], [1, 1], of=f"how many batches were read and steps taken when the first loss came, {shown}")
    require_equal(runs["train-none"].results["losses"], [[], []], of="the losses with steps=0, on two ranks")
    some = runs["train-some"].results
    require(
        [len(losses) for losses in some["losses"]] == [2, 2] and farthest(some["losses"][0], wanted[:2]) < 1e-4,
        expected=f"the losses {rounded(wanted[:2])} with steps=2",
        got=some["losses"],
    )


# --- 8.5 ------------------------------------------------------------------------------------------------------------


@pytest.mark.milestone(task="8.5", points=10, section="Perplexity", timeout=150)
def test_evaluation(lab, run_experiments):
    pairs = [(0.0, 5), (12.0, 4), (693.147, 1000), (705.0, 1), (1e6, 2)]
    for (nats, tokens), got in zip(pairs, lab.observe(f"{PROGRAMS}:perplexities", pairs)):
        wanted = math.inf if nats / tokens > 709 else math.exp(nats / tokens)
        require(
            math.isclose(got, wanted, rel_tol=1e-9), expected=f"perplexity {wanted:.6g} of {nats} nats for {tokens} tokens", got=got
        )
    wanted = reference("evaluation_by_hand")
    whole = lab.observe(f"{PROGRAMS}:evaluated_here", "whole")
    plans = [experiment("evaluate-ddp", "evaluated"), experiment("evaluate-zero3", "evaluated", stage=3)]
    with ranks_come_back():
        runs = run_experiments(plans, timeout=120)
    two = reference("evaluation_by_hand", 2)
    for name, run in runs.items():
        for place, got in enumerate(run.results["uneven"]):
            require(
                math.isclose(got["loss"], two["loss"], rel_tol=1e-4) and got["bytes"] == two["bytes"],
                expected=f"loss {two['loss']:.5f} where rank 0 has two rows and rank 1 filling alone, {name}, rank {place}",
                got=f"{got['loss']:.5f}",
            )
    found = {"one rank, batches of 2": whole}
    for name, run in runs.items():
        for size, ranks in run.results["metrics"].items():
            found |= {f"{name.removeprefix('evaluate-')}, rank {n} of 2, batches of {size}": got for n, got in enumerate(ranks)}
    for words, got in found.items():
        for name, value in wanted.items():
            require(name in got, expected=f"the metric {name} of METRICS in what evaluate() gives", got=sorted(got))
            require(
                math.isclose(got[name], value, rel_tol=1e-4),
                expected=f"{name} {value:.6g} of 11 rows from evaluate(), {words}",
                got=f"{got[name]:.6g}",
            )
    some, by_hand = lab.observe(f"{PROGRAMS}:evaluated_here", "steps"), reference("evaluation_by_hand", 4)
    require(
        math.isclose(some["loss"], by_hand["loss"], rel_tol=1e-4) and some["tokens"] == by_hand["tokens"],
        expected=f"loss {by_hand['loss']:.5f} of {by_hand['tokens']} tokens with steps=2 of two rows each",
        got=f"loss {some['loss']:.5f} of {some['tokens']:g} tokens",
    )
    many = lab.observe(f"{PROGRAMS}:evaluated_here", "many")["tokens"]
    require_equal(many, 6.0 * (2**24 + 1), of="the tokens of 6 batches of 2^24 + 1 predicted tokens each")
    require_equal(
        lab.observe(f"{PROGRAMS}:evaluated_here", "bytes")["bytes"], 0.0, of="the bytes that are counted without token_bytes"
    )
    require_equal(
        lab.observe(f"{PROGRAMS}:evaluated_here", "modes")["after"],
        [True, False],
        of="model.training after evaluate(), of a model in training before, and of one that was not",
    )
    require(
        not lab.observe(f"{PROGRAMS}:evaluated_here", "gradients")["kept"],
        expected="no graph kept for a backward pass while evaluate() asks the model",
        got="logits that want a gradient",
    )
    got = lab.observe(f"{PROGRAMS}:evaluated_here", "nothing")
    require(got["refused"], expected="ValueError where no token is predicted", got=got)


# --- 8.6 ------------------------------------------------------------------------------------------------------------

EARLY = 2  # the first rank's text ends at its third token, the second one's does not


@pytest.mark.milestone(task="8.6", points=10, section="Generation", timeout=150)
def test_generation(lab, run_experiments):
    prompts, new = program_of(f"{PROGRAMS}:generation_tokenizer").__globals__["PROMPTS"], 8
    end = reference("greedy_by_hand", prompts[0], new, None)[EARLY]
    for words, prompt, tokens, ending, seed in (
        ("a prompt", prompts[0], 8, None, 0),
        ("a prompt of one letter", "a", 12, None, 0),
        ("an empty prompt", "", 6, None, 0),
        ("a prompt of more tokens than the model has positions", prompts[1] * 3, 8, None, 0),
        ("a text that ends early", prompts[0], 8, end, 0),
        ("a text with special tokens in it", prompts[0], 8, None, 24),
        ("a text that ends at the end-of-sequence token", prompts[0], 8, None, 230),
    ):
        shown = f"generate_text() with {words} and {tokens} new tokens"
        wanted = reference("text_by_hand", prompt, tokens, ending, seed)
        for dropout, training in ((0.0, False), (0.5, True)):
            got = lab.observe(f"{PROGRAMS}:generated_here", prompt, tokens, dropout, training, ending, seed)
            require_equal(got["text"], wanted, of=shown + (", of a model with dropout, in training before" if training else ""))
            require_equal(got["training"], training, of=f"model.training after {shown}, where it was {training} before")
    plans = [experiment(f"generate-zero{stage}", "generated", stage=stage, end=end) for stage in (2, 3)]
    with ranks_come_back():
        runs = run_experiments(plans, timeout=100)
    wanted = [reference("text_by_hand", prompt, new, end) for prompt in prompts]
    for stage in (2, 3):
        got = runs[f"generate-zero{stage}"].results
        require_equal(got["texts"], wanted, of=f"generate_text() on two ranks with ZeRO-{stage}, whose prompts differ in length")
        require_equal(got["training"], [True, True], of=f"model.training afterwards, with ZeRO-{stage}")


# --- 8.7 ------------------------------------------------------------------------------------------------------------

STEPS = (2, 4, 6)
KINDS = (("plain", None), ("zero2", 2), ("zero3", 3))


@pytest.mark.milestone(task="8.7", points=11, section="Checkpoints that are whole", timeout=150)
def test_checkpoints_are_written(lab, run_experiments):
    with ranks_come_back():
        runs = run_experiments([experiment(f"save-{name}", "saved", stage=stage, sgd=False) for name, stage in KINDS], timeout=120)
    for name, _ in KINDS:
        got, shown = runs[f"save-{name}"].results, f"save_checkpoint() on two ranks, {name}"
        for ranks in got["calls"]:
            tags = [call["tag"] for call in ranks]
            require_equal(
                tags,
                [f"step-{step:06d}.partial" for step in STEPS],
                of=f"the tags with which engine.save_checkpoint was called at steps 2, 4 and 6; {shown}",
            )
            require(
                all(call["fresh"] for call in ranks),
                expected=f"the folder that ends in .partial there, with nothing of a killed run, before any rank writes, and an "
                f"earlier whole checkpoint untouched meanwhile; {shown}",
                got=[call["fresh"] for call in ranks],
            )
            require(not any(call["latest"] for call in ranks), expected=f"save_latest=False; {shown}", got="a file `latest`")
            require(
                not any(call["whole"] for call in ranks),
                expected=f"no folder step-000002 before all ranks have written; {shown}",
                got="one",
            )
        require_equal(got["folders"], ["step-000002", "step-000004"], of=f"what is in the folder at the end; {shown}")
        for number, step in enumerate(STEPS):
            first, *others = got["after"][number]
            require_equal(first["path"], f"step-{step:06d}", of=f"the name of the folder that is returned; {shown}")
            for other in others:
                require_equal(
                    other,
                    first,
                    of=f"what each rank finds in step-{step:06d} as soon as its call is over; {shown}, rank 1 being slow",
                )
            files = first["files"]
            require(
                {"state.json", "random-of-rank-0.pt", "random-of-rank-1.pt"} <= set(files),
                expected=f"state.json and random-of-rank-0.pt and -1.pt in step-{step:06d}; {shown}",
                got=files,
            )
            require(
                sum(file.startswith(("plain", "mp_rank", "zero_pp", "bf16_zero", "bf16")) for file in files) >= 1,
                expected=f"the engine's own files in step-{step:06d}; {shown}",
                got=files,
            )
            require(
                not {"left-behind.txt", "earlier.txt"} & set(files),
                expected=f"nothing of what was there before in step-{step:06d}; {shown}",
                got=files,
            )
            require_equal(
                got["states"].get(str(step)),
                {"step": step, "epoch": 1, "batches": step + 1} | got["wanted"],
                of=f"state.json of step {step}; {shown}",
            )
        require(
            not {f"step-{step:06d}" for step in STEPS} & set(got["removed"]),
            expected=f"no folder removed while it has a whole checkpoint's name; {shown}",
            got=got["removed"],
        )
        require_equal(got["random"], [[True] * 3] * 2, of=f"is each rank's file its own random_state(), at each step; {shown}")
        named = {(name, to): files for name, to, files in got["renamed"]}
        for step in STEPS:
            files = set(named.get((f"step-{step:06d}.partial", f"step-{step:06d}"), []))
            require(
                {"state.json", "random-of-rank-0.pt", "random-of-rank-1.pt"} <= files,
                expected=f"step-{step:06d}.partial renamed to step-{step:06d} with state.json and both ranks' files in it; {shown}",
                got=[[name, to, sorted(files)] for (name, to), files in named.items()],
            )
        require(got["position_kept"], expected=f"position as it was; {shown}", got="another")


# --- 8.8 ------------------------------------------------------------------------------------------------------------


@pytest.mark.milestone(task="8.8", points=10, section="Checkpoints that are whole", timeout=150)
def test_a_run_goes_on(lab, run_experiments):
    for what in ("none", "no folder", "partial"):
        got = lab.observe(f"{PROGRAMS}:loaded_where", what)
        require_equal(
            {name: got[name] for name in ("got", "refused", "loaded", "untouched")},
            {"got": None, "refused": "", "loaded": 0, "untouched": True},
            of=f"load_checkpoint() where there is no checkpoint ({what})",
        )
    for what, words in (("model", ("step-000007", "301", "307")), ("ranks", ("step-000007", "1", "2"))):
        got = lab.observe(f"{PROGRAMS}:loaded_where", what)
        missing = [word for word in words if word not in got["refused"]]
        require(
            got["refused"] and not missing,
            expected=f"ValueError for a checkpoint of another {what.removesuffix('s')}, in a sentence with {', '.join(words)}",
            got=got["refused"] or f"no error, and {got['got']}",
        )
        require(
            got["loaded"] == 0 and got["untouched"],
            expected="the error before anything is loaded",
            got=f"loaded {got['loaded']} times",
        )
    broken = lab.observe(f"{PROGRAMS}:loaded_where", "broken")
    require(
        broken["refused"] and broken["loaded"] == 1 and broken["untouched"],
        expected="ValueError where engine.load_checkpoint gives (None, {}), and the random generators as they were",
        got=broken,
    )
    said = lab.observe(f"{PROGRAMS}:loaded_where", "large")["refused"]
    require(
        "step-1000001" in said,
        expected="ValueError about step-1000001, the newest of step-099999, step-1000001 and step-900000, all of two ranks",
        got=said or "no error",
    )
    plans = []
    for name, stage in KINDS:
        plans.append(experiment(f"whole-{name}", "never_stopped", stage=stage, sgd=False))
        plans.append(experiment(f"on-{name}", "goes_on", stage=stage, sgd=False, after=f"whole-{name}"))
    with ranks_come_back():
        runs = run_experiments(plans, timeout=120)
    for name, _ in KINDS:
        got, whole = runs[f"on-{name}"].results, runs[f"whole-{name}"].results["losses"]
        require_equal(got["position"], {"step": 3, "epoch": 1, "batches": 15}, of=f"the position of load_checkpoint(), {name}")
        for place, (losses, wanted) in enumerate(zip(got["losses"], whole)):
            require(
                farthest(losses, wanted[3:]) < 1e-4,
                expected=f"the losses {rounded(wanted[3:])} after load_checkpoint(), as without a stop, {name}, rank {place}",
                got=rounded(losses),
            )


# --- 8.9 ------------------------------------------------------------------------------------------------------------

DEFAULTS = {
    "model_name": "small",
    "dataset_name": "stdlib",
    "dataset_config": None,
    "batch_size": 8,
    "max_length": 128,
    "num_epochs": 1,
    "learning_rate": 1e-3,
    "seed": 0,
    "deepspeed_config": None,
    "max_train_steps": None,
    "max_eval_steps": None,
    "save_checkpoint": None,
    "output_dir": "output",
    "generation_prompt": None,
    "resume": False,
    "profile": False,
    "dry_run": False,
}
GIVEN = {
    "model_name": ("distilgpt2", "distilgpt2"),
    "dataset_name": ("wikitext", "wikitext"),
    "dataset_config": ("wikitext-2-raw-v1", "wikitext-2-raw-v1"),
    "batch_size": ("3", 3),
    "max_length": ("2", 2),
    "num_epochs": ("4", 4),
    "learning_rate": ("5e-5", 5e-5),
    "seed": ("-7", -7),
    "deepspeed_config": ("FOLDER/z.json", "FOLDER/z.json"),
    "max_train_steps": ("50", 50),
    "max_eval_steps": ("20", 20),
    "save_checkpoint": ("1", 1),
    "output_dir": ("a folder", "a folder"),
    "generation_prompt": ("Return a", "Return a"),
}
BAD = [
    ("--batch_size", "0"),
    ("--batch_size", "1.5"),
    ("--max_length", "1"),
    ("--num_epochs", "0"),
    ("--learning_rate", "0"),
    ("--learning_rate", "-0.5"),
    ("--learning_rate", "fast"),
    ("--learning_rate", "nan"),
    ("--seed", "x"),
    ("--deepspeed_config", "no/such.json"),
    ("--deepspeed_config", "FOLDER"),
    ("--max_train_steps", "0"),
    ("--max_eval_steps", "-3"),
    ("--max_eval_steps", "0"),
    ("--save_checkpoint", "0"),
]


@pytest.mark.milestone(task="8.9", points=6, section="A command line")
def test_command_line(lab):
    def options(words: list[str]) -> dict:
        got = lab.observe(f"{PROGRAMS}:parsed", words, {"z.json": "{}"})
        require("options" in got, expected=f"{' '.join(words)} to be taken", got=got.get("said", got))
        return {name: value for name, value in got["options"].items() if name != "local_rank"}

    require_equal(options([]), DEFAULTS, of="command_line().parse_args([])")
    for name, (word, value) in GIVEN.items():
        require_equal(options([f"--{name}", word]), DEFAULTS | {name: value}, of=f"parse_args(['--{name}', {word!r}])")
    for name in ("resume", "profile", "dry_run"):
        flag = "--dry-run" if name == "dry_run" else f"--{name}"
        require_equal(options([flag]), DEFAULTS | {name: True}, of=f"parse_args(['{flag}'])")
    got = lab.observe(f"{PROGRAMS}:parsed", ["--local_rank=1", "--seed", "3"])
    require_equal(got.get("options", got).get("local_rank"), 1, of="local_rank of parse_args(['--local_rank=1', …])")
    for option, word in BAD:
        got = lab.observe(f"{PROGRAMS}:parsed", [option, word])
        require(
            got.get("status") == 2 and option in got["said"] and word in got["said"],
            expected=f"status 2 and a sentence with {option} and {word} for the words {option} {word}",
            got=got,
        )
    got = lab.observe(f"{PROGRAMS}:parsed", ["--max", "5"])
    require(got.get("status") == 2, expected="status 2 for --max, the beginning of several options", got=got)
    got = lab.observe(f"{PROGRAMS}:parsed", ["--batch", "5"])
    require(got.get("status") == 2, expected="status 2 for --batch: an option is not known by its beginning", got=got)
    said = " ".join(lab.observe(f"{PROGRAMS}:parsed", ["--help"])["said"].split())
    for name, value in DEFAULTS.items():
        flag = "--dry-run" if name == "dry_run" else f"--{name}"
        require(flag in said, expected=f"{flag} in --help", got=said)
        if value not in (None, False):
            require(f"(default: {value})" in said, expected=f"(default: {value}) in --help, of {flag}", got=said)
    require("local_rank" not in said, expected="--local_rank shown in no help", got=said)
    helps = lab.observe(f"{PROGRAMS}:helps")
    for name in DEFAULTS:
        flag = "--dry-run" if name == "dry_run" else f"--{name}"
        require(helps.get(flag, "").strip(), expected=f"words of help for {flag}", got=helps.get(flag, "no such option"))
    require_equal(
        options(["--learning_rate", "2"])["learning_rate"], 2.0, of="learning_rate of parse_args(['--learning_rate', '2'])"
    )
    for name in ("batch_size", "num_epochs", "max_train_steps", "max_eval_steps"):
        require_equal(options([f"--{name}", "1"])[name], 1, of=f"{name} of parse_args(['--{name}', '1'])")


# --- 8.10 -----------------------------------------------------------------------------------------------------------


def articles(count: int, paragraphs: int = 2, twice: bool = False) -> list[dict]:
    found = []
    for number in range(count):
        texts = [f"Paragraph {place} of article {number}, with a naïve word." for place in range(paragraphs)]
        if twice and number % 3 == 2:
            texts[0] = "Paragraph 0 of article 1, with a naïve word."
        paragraphs_of = [{"context": text, "qas": [{"question": f"What is {text}?", "answers": []}]} for text in texts]
        found.append({"title": f"Article {number}", "paragraphs": paragraphs_of})
    return found


def paragraphs_by_hand(given: list[dict]) -> dict[str, list[str]]:
    splits, seen = {"train": [], "validation": [], "test": []}, set()
    apart = max(1, len(given) // 10)
    parts = {"train": given[: -2 * apart], "validation": given[-2 * apart : -apart], "test": given[-apart:]}
    for split, chosen in parts.items():
        for article in chosen:
            for paragraph in article["paragraphs"]:
                if paragraph["context"] not in seen:
                    seen.add(paragraph["context"])
                    splits[split].append(paragraph["context"])
    return splits


@pytest.mark.milestone(task="8.10", points=7, section="One more text, one more metric")
def test_paragraphs(lab):
    for words, given in (
        ("5 articles of 2 paragraphs", articles(5)),
        ("20 articles of 2 paragraphs", articles(20)),
        ("31 articles of 3 paragraphs, some of them there twice", articles(31, 3, twice=True)),
    ):
        for registered in (False, True):
            got = lab.observe(f"{PROGRAMS}:paragraphs_of", given, registered)
            shown = "DATASETS['squad']" if registered else "squad_paragraphs()"
            require("splits" in got, expected=f"splits from {shown} for {words}", got=got)
            require_equal(got["splits"], paragraphs_by_hand(given), of=f"{shown} for {words}")
    blank = articles(12)
    blank[10]["paragraphs"] = []
    untested, again = articles(12), articles(12)
    untested[11]["paragraphs"] = []
    again[11]["paragraphs"] = again[0]["paragraphs"]
    for words, given, names in (
        ("no path", None, ("--dataset_config",)),
        ("2 articles", articles(2), ("squad.json", "train")),
        ("1 article", articles(1), ("squad.json", "train")),
        ("12 articles, the last but one without paragraphs", blank, ("squad.json", "validation")),
        ("12 articles, the last without paragraphs", untested, ("squad.json", "test")),
        ("12 articles, the last with the paragraphs of the first", again, ("squad.json", "test")),
    ):
        said = lab.observe(f"{PROGRAMS}:paragraphs_of", given).get("refused", "")
        missing = [name for name in names if name not in said]
        require(
            said and not missing, expected=f"ValueError for {words}, in a sentence with {', '.join(names)}", got=said or "no error"
        )
    said = lab.observe(f"{PROGRAMS}:paragraphs_of", articles(2)).get("refused", "")
    require("validation" not in said, expected="a sentence that names the split without text, and no other", got=said)


# --- 8.11 -----------------------------------------------------------------------------------------------------------


@pytest.mark.milestone(task="8.11", points=5, section="One more text, one more metric")
def test_bits_per_byte(lab):
    texts = ["Return the sum of a and b.", "a naïve Übung, 東京", "see <more> of it", "\t\n  a", "e\u0301 \U0001f40d"]
    for words, options in (("a tokenizer with one special token", {}), ("one with three", {"fill": True, "start": True})):
        got = lab.observe(f"{PROGRAMS}:bytes_of_tokenizer", options, texts)
        require_equal(got["type"], "torch.int64", of=f"the type of token_bytes() of {words}")
        require_equal(got["shape"], [got["size"]], of=f"the shape of token_bytes() of {words}")
        require_equal(got["special"], [0] * len(got["special"]), of=f"the bytes of the special tokens, of {words}")
        for text, number in zip(texts, got["sums"]):
            require_equal(number, len(text.encode()), of=f"the sum over the tokens of {text!r}, of {words}: its bytes in UTF-8")
    for nats, tokens, size in ((math.log(2) * 24, 3, 8), (100.0, 50, 210), (0.0, 5, 5)):
        wanted = nats / math.log(2) / size
        got = lab.observe(f"{PROGRAMS}:bits_of", nats, tokens, size)
        require(
            math.isclose(got, wanted, rel_tol=1e-9, abs_tol=1e-12),
            expected=f"{wanted:.6g} bits per byte: METRICS['bits_per_byte'] of {nats:.4g} nats, {tokens} tokens, {size} bytes",
            got=got,
        )
    got = lab.observe(f"{PROGRAMS}:bits_of", 1.0, 1, 0)
    require(math.isnan(got), expected="nan where no bytes were counted", got=got)
