"""What ranks run for the milestones of this lab: a live trainer around one exercise function."""

from __future__ import annotations

import contextlib
import time
from unittest import mock

import torch

from shardlab import switch
from shardlab.data.models import load_model, load_tokenizer
from shardlab.milestones import engine_runs
from shardlab.run.collectives import gather, rank
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
        `tokenizer`: whether a tokenizer could be read from the folder; `saves`: how often each rank saved it;
        `too_early`: a rank read the model before the tokenizer was in the folder.
    """
    from transformers import AutoTokenizer, PreTrainedModel

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
    tokenizer, saves, early = load_tokenizer(), [], []
    save, read = tokenizer.save_pretrained, PreTrainedModel.from_pretrained.__func__

    def save_slowly(*args, **kwargs):
        time.sleep(0.3)
        saves.append(rank())
        return save(*args, **kwargs)

    def note_and_read(cls, *args, **kwargs):
        early.append(not (folder / "tokenizer_config.json").exists())
        return read(cls, *args, **kwargs)

    tokenizer.save_pretrained = save_slowly
    with mock.patch.object(PreTrainedModel, "from_pretrained", classmethod(note_and_read)):
        reloaded = switch.import_exercise("lab01_baseline").save_and_reload(trainer, tokenizer, str(folder))

    import deepspeed

    trained = dict(trainer.model.named_parameters())
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
        "too_early": any(gather(any(early))),
        "tied": embedding is not None and reloaded.lm_head.weight is embedding.weight,
    }


def arguments_given(has_gpu: bool, **given) -> dict:
    """Task 1.5: what `training_arguments` hands to `TrainingArguments` on a machine with a GPU, or without one."""
    import transformers

    module, seen = switch.import_exercise("lab01_baseline"), {}

    def note(output_dir=None, **named):
        seen.update(named, output_dir=output_dir)
        return named

    with contextlib.ExitStack() as stack:
        for owner in (module, transformers):
            if hasattr(owner, "TrainingArguments"):
                stack.enter_context(mock.patch.object(owner, "TrainingArguments", note))
        stack.enter_context(mock.patch.object(torch.cuda, "is_available", lambda: has_gpu))
        stack.enter_context(mock.patch.object(torch.cuda, "device_count", lambda: int(has_gpu)))
        module.training_arguments("somewhere", **given)
    return {name: value if isinstance(value, str | int | float | bool | None) else str(value) for name, value in seen.items()}


def answers_of_other_models(prompts: list[list[int]], max_new_tokens: int) -> dict:
    """Task 1.7: models that do not answer greedily and at full length by themselves.

    Returns:
        `sampling`: answers of one whose own settings say to sample, from several beams; `training`: of one in training mode, with
        dropout; `ending`: of one that ends each answer after two tokens;
        `scripted`: of one that says `SCRIPT` to every prompt; `at once`: of one that says nothing.
    """
    answer = switch.import_exercise("lab01_baseline").generate_answers
    tokenizer, model = load_tokenizer(), load_model()
    model.generation_config.update(do_sample=True, num_beams=3, temperature=9.0, top_k=0)
    torch.manual_seed(5)
    sampling = answer(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
    model = load_model().train()
    engine_runs.set_dropout(model, 0.5)
    training = answer(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
    model, forwards = load_model(), []

    def end_at_the_third(module, args, output):
        forwards.append(1)
        if len(forwards) >= 3:
            output.logits[..., tokenizer.eos_token_id] = 1e9
        return output

    model.register_forward_hook(end_at_the_third)
    ending = answer(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
    scripted = answer(_says(SCRIPT, tokenizer), tokenizer, prompts, max_new_tokens=32)
    at_once = answer(_says("", tokenizer), tokenizer, prompts, max_new_tokens=max_new_tokens)
    return {"sampling": sampling, "training": training, "ending": ending, "scripted": scripted, "at once": at_once}


SCRIPT = " The oak , it is.\n\nQuestion: a Answer: b \n"
"""White space at both ends, and what might be taken for the end of an answer."""


def _says(text: str, tokenizer):
    """A model that answers every prompt with this text."""
    model, forwards = load_model(), []
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]

    def say(module, args, output):
        output.logits[..., ids[min(len(forwards), len(ids) - 1)]] = 1e9
        forwards.append(1)
        return output

    model.register_forward_hook(say)
    return model
