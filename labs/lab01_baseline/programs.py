"""What ranks run for the milestones of this lab: a live trainer around one exercise function."""

from __future__ import annotations

import torch

from shardlab import switch
from shardlab.data.models import load_model, load_tokenizer
from shardlab.run.collectives import gather
from shardlab.run.experiment import Experiment
from shardlab.run.run_folder import Run
from shardlab.run.training import text_rows, train, trainer_arguments


def save_round_trip(experiment: Experiment, run: Run) -> dict:
    """Train a few steps, let `lab01_baseline.save_and_reload` save and reload, and compare the result.

    Returns:
        `difference`: the largest difference between a trained and a reloaded weight, over all ranks;
        `same_object`: the function handed the trained model back instead of a reloaded one;
        `dtype` and `parameters` of the reloaded model; `tied`: its output layer is its embedding;
        `tokenizer`: whether a tokenizer could be read from the folder.
    """
    from transformers import AutoTokenizer

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
    reloaded = switch.import_exercise("lab01_baseline").save_and_reload(trainer, load_tokenizer(), str(folder))

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
        tokenizer = AutoTokenizer.from_pretrained(folder).pad_token == "<pad>"
    except (OSError, ValueError):
        tokenizer = False
    embedding = getattr(getattr(reloaded, "transformer", None), "word_embeddings", None)
    return {
        "difference": max(gather(difference)),
        "same_object": same_object,
        "dtype": str(reloaded.dtype),
        "parameters": sum(p.numel() for p in reloaded.parameters()),
        "tokenizer": tokenizer,
        "tied": embedding is not None and reloaded.lm_head.weight is embedding.weight,
    }
