"""Programs that the lectures run on ranks; there is no exercise in them."""

from __future__ import annotations

import torch

from shardlab.data.comments import UNKNOWN, comments
from shardlab.data.models import load_classifier, load_model, load_tokenizer
from shardlab.run.collectives import gather, rank, world_size
from shardlab.run.experiment import Experiment
from shardlab.run.multilabel import Collator, Encoded
from shardlab.run.run_folder import Run
from shardlab.run.text_rows import text_rows
from shardlab.run.training import train, trainer_arguments
from shardlab.zero import held_bytes


def gradient_bytes(engine) -> int:
    """Bytes of gradients that this rank keeps for the next optimizer step of stages 0 to 2.

    Between micro-batches stages 1 and 2 keep a list of gradients, and make the flat shard of it just before the step.
    """
    waiting = [tensor for group in getattr(engine.optimizer, "all_grad_tensors", {}).values() for tensor in group or []]
    return held_bytes.held_bytes(engine.module, engine.optimizer).gradients + sum(tensor.nbytes for tensor in waiting)


def watch_steps(experiment: Experiment, run: Run) -> dict:
    """Train with DeepSpeed's engine, note what each micro-batch changed, and save a checkpoint at the end."""
    import deepspeed

    model = load_model(experiment.model, seed=experiment.seed)
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=experiment.deepspeed)[0]
    rows, watched, per_rank = text_rows(experiment)[0], [], experiment.micro_batch
    for number in range(experiment.steps * experiment.accumulation):
        at = (number * world_size() + rank()) * per_rank
        batch = {key: torch.tensor([row[key] for row in rows[at : at + per_rank]]).to(engine.device) for key in rows[0]}
        weights = model.lm_head.weight.detach().clone()
        loss = engine(**batch).loss
        engine.backward(loss)
        held = gradient_bytes(engine)
        engine.step()
        after = gradient_bytes(engine)
        losses = gather(loss.item())
        watched.append(
            {
                "micro-batch": number + 1,
                "loss": sum(losses) / len(losses),
                "gradients after backward": f"{held:,} bytes",
                "and after step": f"{after:,} bytes",
                "optimizer steps": engine.global_steps,
                "weights changed": not torch.equal(weights, model.lm_head.weight),
            }
        )
    engine.save_checkpoint(str(run.folder / "checkpoint"), tag=f"step-{engine.global_steps}")
    return {"watched": watched}


def resume_with_deepspeed_alone(experiment: Experiment, run: Run) -> dict:
    """Train, save or load with nothing but the engine's own functions; lecture 04 shows what comes of it with NVMe.

    The experiment's `options`: `save_at`, the step after which to save into `checkpoints`; or `load`, to begin from there.
    """
    import deepspeed

    options, model = experiment.options, load_model(experiment.model, seed=experiment.seed)
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=experiment.deepspeed)[0]
    if options.get("load"):
        engine.load_checkpoint(options["checkpoints"], tag="saved")
    rows, losses, refused, size = text_rows(experiment)[0], [], "", experiment.micro_batch
    for step in range(engine.global_steps, experiment.steps):
        at = (step * world_size() + rank()) * size
        batch = {key: torch.tensor([row[key] for row in rows[at : at + size]]).to(engine.device) for key in rows[0]}
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        both = gather(loss.item())
        losses.append(round(sum(both) / len(both), 4))
        if step + 1 == options.get("save_at"):
            engine.save_checkpoint(options["checkpoints"], tag="saved")
            try:
                engine.save_checkpoint(options["checkpoints"], tag="saved")
            except FileExistsError as error:
                refused = f"{type(error).__name__}: {error.strerror}"
    return {"losses": losses, "second save": refused or "went through"}


def classify(experiment: Experiment, run: Run) -> dict:
    """Train a classifier of comments with the plain `Trainer`, with DeepSpeed or without; rows with an empty label are left out."""
    arguments = trainer_arguments(experiment, run)
    tokenizer = load_tokenizer("comment-tiny")
    rows = [row for row in comments("train", experiment.train_examples) if UNKNOWN not in row["labels"]]
    train(
        run,
        model=load_classifier("comment-tiny", seed=experiment.seed),
        arguments=arguments,
        train_set=Encoded(rows, tokenizer, experiment.max_tokens),
        eval_set=[],
        collate=Collator(tokenizer.pad_token_id),
        tokens_per_sequence=experiment.max_tokens,
    )
    return {}
