"""Small experiments for milestones and for the tests of the course: a few steps of bloom-tiny, and DeepSpeed configurations."""

from __future__ import annotations

from shardlab.run.experiment import Experiment


def zero_config(
    zero: int | dict,
    *,
    micro_batch: int | str = "auto",
    accumulation: int | str = "auto",
    ranks: int | None = None,
    precision: str = "fp32",
    clipping: float = 1.0,
    adam: dict | None = None,
    **more,
) -> dict:
    """A DeepSpeed configuration.

    Args:
        zero: the stage, or all of `zero_optimization`.
        micro_batch, accumulation, ranks: sizes for the engine alone; without them `Trainer` fills them in.
        precision: fp32 or bf16.
        clipping: of the gradients' norm.
        adam: parameters of AdamW; torch's, unless its states are offloaded. None leaves the optimizer to `Trainer`.
        more: other entries.
    """
    zero = {"stage": zero} if isinstance(zero, int) else zero
    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": "auto" if ranks is None else micro_batch * accumulation * ranks,
        "gradient_clipping": clipping,
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": zero,
    }
    if adam is not None:
        torch_adam = {} if "offload_optimizer" in zero else {"torch_adam": True}
        config["optimizer"] = {"type": "AdamW", "params": adam | torch_adam}
    return config | more


def text_experiment(name: str, **changes) -> Experiment:
    """A few steps on the paragraphs' text, on two ranks, without any exercise in it."""
    settings = {
        "program": "shardlab.run.training:train_text",
        "ranks": 2,
        "micro_batch": 2,
        "accumulation": 2,
        "steps": 2,
        "learning_rate": 1e-3,
        "max_tokens": 32,
        "train_examples": 32,
        "evaluate": False,
        "save": False,
    }
    return Experiment(name=name, **(settings | changes))
