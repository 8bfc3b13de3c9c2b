"""Programs that the lectures run on ranks; there is no exercise in them."""

from __future__ import annotations

import torch

from shardlab import memory
from shardlab.models import load_model
from shardlab.runs import Experiment, Run
from shardlab.training import gather, rank, text_rows, world_size


def gradient_bytes(engine) -> int:
    """Bytes of gradients that this rank keeps for the next optimizer step of stages 0 to 2.

    Between micro-batches stages 1 and 2 keep a list of gradients, and make the flat shard of it just before the step.
    """
    waiting = [tensor for group in getattr(engine.optimizer, "all_grad_tensors", {}).values() for tensor in group or []]
    return memory.held_bytes(engine.module, engine.optimizer).gradients + sum(tensor.nbytes for tensor in waiting)


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
