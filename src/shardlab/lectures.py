"""Programs that the lectures run on ranks; there is no exercise in them."""

from __future__ import annotations

import torch

from shardlab import memory
from shardlab.models import load_model
from shardlab.runs import Experiment, Run
from shardlab.training import gather, rank, text_rows, world_size


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
        held = memory.held_bytes(engine.module, engine.optimizer).gradients
        engine.step()
        after = memory.held_bytes(engine.module, engine.optimizer).gradients
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
