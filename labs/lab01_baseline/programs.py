"""What ranks run for the milestones of this lab: a live trainer around one exercise function."""

from __future__ import annotations

import contextlib
import copy
import os
import random
import time
from unittest import mock

import numpy
import torch

from shardlab import hardware, switch
from shardlab.data.models import load_model, load_tokenizer
from shardlab.milestones import engine_runs, pretended
from shardlab.milestones.exercises import watched_exercises
from shardlab.run.collectives import barrier, gather, rank, world_size
from shardlab.run.experiment import Experiment
from shardlab.run.run_folder import Run
from shardlab.run.training import text_rows, train, trainer_arguments


def save_round_trip(experiment: Experiment, run: Run) -> dict:
    """Train a few steps, let `lab01_baseline.save_and_reload` save and reload, and compare the result.

    The tokenizer takes its time to be saved, so that a rank which reads too early is seen on any machine.

    Returns:
        `difference`: the largest difference between a trained and a reloaded weight, over all ranks;
        `same_object`: the function handed the trained model back instead of a reloaded one;
        `dtype` and `parameters` of the reloaded model; `tied`: its output layer is its embedding;
        `tokenizer`: whether a tokenizer could be read from the folder, and its `padding_side`; `saves`: how often each rank saved it in
        the two calls; `device` of the reloaded model, `moved`: the trainer's is on another; `trainer_changed`: it has another tokenizer; `others_stay`: a file in the folder too;
        `too_early`: a rank read the model before the tokenizer was in the folder;
        `other_class`: on one rank, what a model of GPT-2's class comes back as.
    """
    from accelerate.state import PartialState
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedModel, Trainer

    arguments = trainer_arguments(experiment, run)
    model = load_model(experiment.model)
    rows, _ = text_rows(experiment)
    trainer = train(
        run,
        model=model,
        arguments=arguments,
        train_set=rows,
        eval_set=[],
        collate=lambda batch: {key: torch.tensor([row[key] for row in batch]) for key in batch[0]},
        tokens_per_sequence=experiment.max_tokens,
    )
    folder = run.folder / "model"
    names = (
        "notes.txt",
        "results.json",
        "vocabulary.bin",
        "adapter.safetensors",
        "model_card.md",
        "model.txt",
        "tokens.md",
        "README.md",
    )
    notes = [folder / name for name in names]
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for path in notes:
            path.write_text("mine")
    tokenizer, saves, early = load_tokenizer(), [], []
    save, read = tokenizer.save_pretrained, PreTrainedModel.from_pretrained.__func__

    sleep = time.sleep

    def save_slowly(*args, **kwargs):
        sleep(0.3)
        saves.append(rank())
        return save(*args, **kwargs)

    def note_and_read(cls, *args, **kwargs):
        early.append(not (folder / "tokenizer_config.json").exists())
        return read(cls, *args, **kwargs)

    tokenizer.save_pretrained = save_slowly
    import deepspeed

    trained, device = dict(trainer.model.named_parameters()), trainer.model.device
    processing_class = trainer.processing_class
    # As on nodes of one rank each. With NCCL accelerate's barrier takes this number for the GPU's, so there it stays.
    first_of_its_node = {} if torch.cuda.is_available() else {"local_process_index": 0}
    with (
        mock.patch.object(PreTrainedModel, "from_pretrained", classmethod(note_and_read)),
        mock.patch.dict(PartialState._shared_state, first_of_its_node),
        mock.patch.dict(os.environ, {"LOCAL_RANK": "0"}),
        mock.patch.object(time, "sleep", lambda seconds: None),  # no time that is slept is long enough for every disk
    ):
        watched_exercises("lab01_baseline").save_and_reload(trainer, tokenizer, str(folder))
        early.append(not (folder / "tokenizer_config.json").exists())
        fresh = run.folder / "not" / "there yet"
        watched_exercises("lab01_baseline").save_and_reload(trainer, load_tokenizer(), str(fresh))
        # The second model in the same folder has other weights than the first.
        norm = trainer.model.transformer.ln_f.weight
        with torch.no_grad(), deepspeed.zero.GatheredParameters([norm], modifier_rank=0, enabled=hasattr(norm, "ds_id")):
            norm.add_(1.0)
        barrier()
        reloaded = watched_exercises("lab01_baseline").save_and_reload(trainer, tokenizer, str(folder))
    other_class = None
    if world_size() == 1:
        small = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=32, n_positions=16))
        other = watched_exercises("lab01_baseline").save_and_reload(
            Trainer(model=small, args=arguments), load_tokenizer(), str(run.folder / "other model")
        )
        other_class = type(other).__name__
    same_object = reloaded is trainer.model or reloaded is trainer.model_wrapped
    difference = float("inf")
    if not same_object:
        got = dict(reloaded.named_parameters())
        sharded = [p for p in trained.values() if hasattr(p, "ds_id")]
        with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
            same_names = set(got) == set(trained)
            difference = (
                max(
                    (got[name].float().cpu() - p.detach().float().cpu()).abs().max().item()
                    if got[name].shape == p.shape
                    else float("inf")
                    for name, p in trained.items()
                )
                if same_names
                else float("inf")
            )
    try:
        has_tokenizer = AutoTokenizer.from_pretrained(folder).pad_token == "<pad>"
    except (OSError, ValueError):
        has_tokenizer = False
    embedding = getattr(getattr(reloaded, "transformer", None), "word_embeddings", None)
    return {
        "difference": max(gather(difference)),
        "same_object": same_object,
        "dtype": str(reloaded.dtype),
        "parameters": sum(p.numel() for p in reloaded.parameters()),
        "tokenizer": has_tokenizer,
        "saves": gather(len(saves)),
        "device": reloaded.device.type,
        "moved": trainer.model.device != device,
        "trainer_changed": trainer.processing_class is not processing_class,
        "others_stay": all(path.exists() and path.read_text() == "mine" for path in notes),
        "padding_side": AutoTokenizer.from_pretrained(folder).padding_side if has_tokenizer else None,
        "too_early": any(gather(any(early))),
        "other_class": other_class,
        "tied": embedding is not None and reloaded.lm_head.weight is embedding.weight,
    }


def with_another_tokenizer(vocabulary: list[str], question: str, context: str, answer: str = "") -> dict:
    """Tasks 1.2 and 1.3: prompts and an example with a tokenizer whose tokens are whole words, by their place in the vocabulary.

    Returns:
        `prompts`: the whole one, and one with room for five words of context, each with the vocabulary's first word in front;
        `without`: the whole one without the first word in front; `used before`: the same with a tokenizer that has cut other texts;
        `more tokens`: with one that knows the context's first two words as one token since its last call, and what it is to give; `example`: with an answer, likewise. Padding and end of sequence are
        the vocabulary's second word, and the third stands for those that are not in it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    lab, ids = watched_exercises("lab01_baseline"), {word: at for at, word in enumerate(vocabulary)}

    def made(begins: bool):
        words = Tokenizer(models.WordLevel(ids, unk_token=vocabulary[2]))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        words.decoder = decoders.Fuse()  # what is decoded is not the text that was encoded, as with many tokenizers
        if begins:
            words.post_processor = processors.TemplateProcessing(single=f"{vocabulary[0]} $A", special_tokens=[(vocabulary[0], 0)])
        return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=vocabulary[1], pad_token=vocabulary[1])

    if answer:
        example = lab.encode_example(made(begins=False), question, context, answer, 512)
        return {"example": {name: list(values) for name, values in example.items()}}
    bare, whole = 4 + len(question.split()), 4 + len(f"{question} {context}".split())
    lab.encode_prompt(load_tokenizer(), question, context, 512)  # what is remembered of one tokenizer is none of another's
    prompts = [list(lab.encode_prompt(made(begins=True), question, context, room)) for room in (whole, bare + 5)]
    # Spaces are no tokens here: what does not fit is counted in tokens, not in words.
    prompts.append(list(lab.encode_prompt(made(begins=True), question, context.replace(" ", " " * 90), whole)))
    without = list(lab.encode_prompt(made(begins=False), question, context, whole))
    text, tokenizer = f"Question: {question} Context: {context} Answer:", made(begins=False)
    tokenizer([text], truncation=True, max_length=3, padding="max_length")  # a fast tokenizer keeps these until the next call
    used_before = list(lab.encode_prompt(tokenizer, question, context, whole))
    tokenizer.add_tokens([" ".join(context.split()[:2])])
    more = {
        "more tokens": list(lab.encode_prompt(tokenizer, question, context, whole)),
        "more tokens, wanted": tokenizer(text)["input_ids"],
    }
    return {"prompts": prompts, "without": without, "used before": used_before} | more


def arguments_given(has_gpu: bool, **given) -> dict:
    """Task 1.5: what `training_arguments` hands to `TrainingArguments` on a machine with a GPU, or without one.

    And under `variables` the names of the environment variables that it changes.
    """
    import transformers

    module, seen = switch.import_exercise("lab01_baseline"), {}

    def note(output_dir=None, **named):
        seen.update(named, output_dir=output_dir)
        return named

    with contextlib.ExitStack() as stack:
        for owner in (module, transformers):
            if hasattr(owner, "TrainingArguments"):
                stack.enter_context(mock.patch.object(owner, "TrainingArguments", note))
        stack.enter_context(
            mock.patch.dict(os.environ, {"WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "1", "WANDB_API_KEY": "0" * 40})
        )
        stack.enter_context(mock.patch.object(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: False))
        stack.enter_context(mock.patch.object(torch.cuda, "is_available", lambda: has_gpu))
        stack.enter_context(mock.patch.object(torch.cuda, "device_count", lambda: 4 * has_gpu))
        stack.enter_context(mock.patch.object(torch.accelerator, "is_available", lambda: has_gpu))
        stack.enter_context(mock.patch.object(torch.accelerator, "device_count", lambda: 4 * has_gpu))
        stack.enter_context(mock.patch.object(hardware, "gpu_count", lambda: 4 * has_gpu))
        for name in [name for name in os.environ if name.startswith("WANDB") and name != "WANDB_API_KEY"]:
            del os.environ[name]  # or what an earlier call has set would not be seen
        before = dict(os.environ)
        watched_exercises("lab01_baseline").training_arguments("somewhere", **given)
        seen["variables"] = " ".join(sorted(name for name in {*before, *os.environ} if before.get(name) != os.environ.get(name)))
    return {name: value if isinstance(value, str | int | float | bool | None) else str(value) for name, value in seen.items()}


def random_state() -> tuple:
    """Of Python's, NumPy's and torch's generators, as it can be compared."""
    _, words, at, *_ = numpy.random.get_state()
    return random.getstate(), words.tolist(), at, torch.get_rng_state().tolist()


def answers_of_other_models(prompts: list[list[int]], max_new_tokens: int, long_prompt: list[int]) -> dict:
    """Task 1.7: models that do not answer greedily and at full length by themselves.

    Returns:
        `sampling`: answers of one whose own settings say to sample, from several beams; `training`: of one in training mode, with
        dropout; `ending`: of one that ends each answer after two tokens;
        `scripted`: of one that says `SCRIPT` to every prompt; `at once`: of one that says nothing; `different`: of one that says another
        of `SCRIPTS` to each; `default`: of one that goes on for ever, where no length is given, and `long`: where 100 tokens are;
        `whole prompt`: of one that looks whether it was given all of a long prompt; `changed`: of one whose weights are others than at
        the call before, and `changed_wanted`, of a copy of it; `padding on the right`: with a tokenizer that pads there, and behind that call
        whether this model or the one that was in training mode is `left in training` mode, and the `random state changed`.
    """
    answer = watched_exercises("lab01_baseline").generate_answers
    tokenizer, model = load_tokenizer(), load_model()
    model.generation_config.update(do_sample=True, num_beams=3, temperature=9.0, top_k=0)
    torch.manual_seed(5)
    sampling = answer(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
    model = load_model().train()
    engine_runs.set_dropout(model, 0.5)
    training = answer(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
    stays_in_training = model.training
    model = load_model().eval()
    random.random(), numpy.random.random(), torch.rand(1)  # so that no generator is where a seed puts it
    state = random_state()
    right = load_tokenizer()
    right.padding_side = "right"
    after = {"padding on the right": answer(model, right, prompts, max_new_tokens=max_new_tokens)}
    after |= {"left in training": model.training or stays_in_training, "random state changed": random_state() != state}

    def end_at_the_third(logits, row: int, start: int, written: int) -> None:
        if written >= 2:
            logits[row, ..., tokenizer.eos_token_id] = 1e9

    def answered(texts: list[str], asked: list[list[int]], **given) -> list[str]:
        return answer(_says(texts, tokenizer, prompts), tokenizer, asked, **given)

    ending = answer(_writes(end_at_the_third), tokenizer, prompts, max_new_tokens=max_new_tokens)
    model = _says([SCRIPT], tokenizer, prompts)
    model.generation_config.eos_token_id = tokenizer(SCRIPT)["input_ids"][4]
    scripted = answer(model, tokenizer, prompts, max_new_tokens=48)
    at_once = answered([""], prompts, max_new_tokens=max_new_tokens)
    different = answered(list(SCRIPTS), prompts, max_new_tokens=40)
    default, long = answered([ENDLESS], prompts[:1]), answered([ENDLESS], prompts[:1], max_new_tokens=100)
    whole = answer(_says(["all of it", "a part"], tokenizer, [long_prompt]), tokenizer, [long_prompt], max_new_tokens=8)
    model = load_model()
    answer(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
    with torch.no_grad():
        model.transformer.ln_f.weight.copy_(model.transformer.ln_f.weight.flip(0))
    changed = answer(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
    changed_wanted = [answer(copy.deepcopy(model), tokenizer, [prompt], max_new_tokens=max_new_tokens)[0] for prompt in prompts]
    answers = {
        "changed": changed,
        "changed_wanted": changed_wanted,
        "whole prompt": whole,
        "sampling": sampling,
        "training": training,
        "ending": ending,
        "scripted": scripted,
        "at once": at_once,
    }
    return answers | after | {"different": different, "default": default, "long": long}


SCRIPT = "\t The oak , it is.\n\nQuestion: a Answer: b \r\n\u00a0\t"
"""White space at both ends, and what might be taken for the end of an answer."""
ENDLESS = " one two" * 60
SCRIPTS = (" tea <unk> oak", ' "I came", he said', " Zürich Context: 東京, 10² ﬁ", " one two three four five six seven", "")
"""Of different lengths, with characters of several tokens, and with what might be taken off."""


def placed_next_to_a_gpu(prompts: list[list[int]]) -> dict:
    """Task 1.7: where the inputs of `model.generate` are, of a model that says it is on a GPU, and whether a time limit is given to it."""
    tokenizer, model, seen = load_tokenizer(), load_model(), {}
    with pretended.gpu() as gpu:

        def generate(inputs=None, **given):
            given["input_ids"] = ids = given.get("input_ids", inputs)
            on = {name: "gpu" if gpu.holds(given[name]) else "cpu" for name in ("input_ids", "attention_mask") if name in given}
            limits = [given.get("max_time"), getattr(given.get("generation_config"), "max_time", None)]
            seen.update(on=on, max_time=any(limits))
            return torch.cat([ids, torch.full_like(ids[:, :1], tokenizer.eos_token_id)], 1)

        on_gpu = property(lambda self: pretended.GPU)
        with mock.patch.object(type(model), "device", on_gpu), mock.patch.object(model, "generate", generate):
            switch.import_exercise("lab01_baseline").generate_answers(model, tokenizer, prompts)
    return seen


def _says(texts: list[str], tokenizer, prompts: list[list[int]]):
    """A model that says the first text to the shortest prompts, the second to the next ones, and so on; the last one to all others.

    What it writes after the end-of-sequence token is no part of an answer.
    """
    after = tokenizer(" Question: and so on")["input_ids"] * 20
    scripts = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id, *after] for text in texts]
    lengths = sorted({len(prompt) for prompt in prompts})

    def say(logits, row: int, start: int, written: int) -> None:
        script = scripts[min(lengths.index(start) if start in lengths else -1, len(scripts) - 1)]
        logits[row, ..., script[min(written, len(script) - 1)]] = 1e9

    return _writes(say)


def _writes(change):
    """A model whose logits `change` may change, by row: it is told how long the row's prompt was, and how much was written.

    Its own settings do not say which token ends a text: the tokenizer knows.
    """
    model, seen = load_model(), {"now": None, "start": None}
    model.generation_config.update(eos_token_id=None, pad_token_id=None)

    def hook(module, args, kwargs, output):
        mask, ids, past = (
            kwargs.get("attention_mask"),
            kwargs.get("input_ids", args[0] if args else None),
            kwargs.get("past_key_values"),
        )
        length = past.get_seq_length() if past is not None else ids.shape[1]
        now = mask.sum(-1).tolist() if mask is not None else [length] * len(ids)
        if seen["now"] is None or now != [before + 1 for before in seen["now"]]:
            seen["start"] = now
        seen["now"] = now
        for row, (length, start) in enumerate(zip(now, seen["start"])):
            change(output.logits, row, start, length - start)
        return output

    model.register_forward_hook(hook, with_kwargs=True)
    return model
