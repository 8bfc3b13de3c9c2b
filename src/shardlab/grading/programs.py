"""What ranks run for milestones that need a live trainer around one exercise function."""

from __future__ import annotations

import torch

from shardlab import switch
from shardlab.models import load_model, load_tokenizer
from shardlab.runs import Experiment, Run
from shardlab.training import gather, text_rows, train, trainer_arguments


def save_round_trip(experiment: Experiment, run: Run) -> dict:
    """Train a few steps, let `lab01_baseline.save_and_reload` save and reload, and compare what came back.

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


def uneven_gradient(experiment: Experiment, run: Run) -> dict:
    """Task 6.5: the gradient of a linear model in the mean over the ranks, beside that of one rank with the whole global batch."""
    import torch.distributed as dist

    from shardlab.training import rank, world_size

    lab, size = switch.import_exercise("lab06_multi_node"), experiment.options["global_batch"]
    generator = torch.Generator().manual_seed(experiment.seed)
    inputs = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    targets = torch.randn(size, generator=generator, dtype=torch.float64)

    def gradient(positions: list[int], weight: float) -> torch.Tensor:
        model = torch.zeros(5, dtype=torch.float64, requires_grad=True)
        (weight * ((inputs[positions] @ model - targets[positions]) ** 2).mean()).backward()
        return model.grad

    weight = lab.loss_weight(size, rank(), world_size())
    # The shares are worked out here, so that a wrong share() does not count twice.
    each, more = divmod(size, world_size())
    first = rank() * each + min(rank(), more)
    mine = gradient(list(range(first, first + each + (rank() < more))), weight)
    dist.all_reduce(mine)
    difference = (mine / world_size() - gradient(list(range(size)), 1.0)).abs().max().item()
    return {"difference": difference, "weights": gather(weight)}


def stop_at_different_steps(experiment: Experiment, run: Run) -> dict:
    """Task 6.8: after which step each rank stops, where each is asked in a step of its own."""
    from shardlab.training import rank

    lab, options = switch.import_exercise("lab06_multi_node"), experiment.options
    stopped, kinds = options["steps"], []
    for step in range(1, options["steps"] + 1):
        answer = lab.stop_together(step >= options["asked"][rank()])
        kinds.append(type(answer).__name__)
        # All ranks take all steps here, so that a wrong answer is seen, not waited for.
        if answer and stopped == options["steps"]:
            stopped = step
    return {"stopped": gather(stopped), "kinds": gather(kinds[0])}
