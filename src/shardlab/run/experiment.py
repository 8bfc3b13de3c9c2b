"""What to train: an experiment is plain values, and a line in a run folder's `run.json`."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shardlab import hardware


class Experiment(BaseModel):
    """What to train. Every field has a plain value, so an experiment is also a line in `run.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    name: str = Field(pattern=r"^[\w+-][\w.+-]*$", description="the run folder's name")
    program: str = Field(
        "shardlab.run.training:train_text",
        pattern=r"^[\w./-]+:\w+$",
        description="what each rank runs, as module:function; it is called with the experiment and the run",
    )
    method: str = Field("baseline", description="the name in tables: baseline, ZeRO-1, ZeRO-3 + CPU offload, …")
    model: str = Field("bloom-tiny", description="bloom-tiny, a hub name, or a folder")
    random_weights: bool = Field(False, description="architecture only: for measuring without weights")
    data: str = Field("mini", description="mini, a SQuAD JSON file, or a hub name")
    skip_bad: bool = Field(False, description="leave out questions of a file whose answers are not at their offset")
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    deepspeed: dict[str, Any] | None = Field(None, description="DeepSpeed's configuration; none: the plain Trainer")
    ranks: int = Field(1, ge=1, description="processes, one per GPU")
    micro_batch: int = Field(4, ge=1, description="sequences per rank and forward pass")
    accumulation: int = Field(4, ge=1, description="forward passes an optimizer step")
    epochs: float = Field(3.0, gt=0, description="passes over the training data; steps wins where it is given")
    steps: int | None = Field(None, ge=1, description="optimizer steps")
    learning_rate: float = Field(5e-5, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    clipping: float = Field(1.0, ge=0, description="largest gradient norm; 0 clips nothing")
    seed: int = 0
    max_tokens: int = Field(512, ge=8, description="longest sequence, prompt and answer together")
    train_examples: int | None = Field(None, ge=1, description="use only the first so many")
    eval_examples: int | None = Field(None, ge=1, description="evaluate on only the first so many")
    evaluate: bool = Field(True, description="evaluation loss before and after training, and generated answers")
    save: bool = Field(True, description="save the model into the run folder")
    save_every: int | None = Field(None, ge=1, description="optimizer steps from one checkpoint in the run folder to the next")
    options: dict[str, Any] = Field({}, description="what this program needs and no other does; the program's docstring says")

    @model_validator(mode="before")
    @classmethod
    def _nothing_unknown(cls, values):
        unknown = sorted(set(values) - set(cls.model_fields)) if isinstance(values, dict) else []
        if unknown:
            raise ValueError(f"an experiment has no field {', '.join(map(repr, unknown))}; it has {', '.join(cls.model_fields)}")
        return values

    @property
    def global_batch(self) -> int:
        """Sequences an optimizer step, over all ranks: micro-batch × accumulation × ranks."""
        return self.micro_batch * self.accumulation * self.ranks


def module_of(name: str):
    """The module of that name; or, for a path in the course such as `labs/<lab>/programs.py`, of that file.

    What lies in a lab's folder is in no package, so the file is loaded once, under a name of the course's own.
    """
    if not name.endswith(".py"):
        return importlib.import_module(name)
    known = "shardlab." + name.removesuffix(".py").replace("/", ".")
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, hardware.ROOT / name)
        sys.modules[known] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[known]
            raise
    return sys.modules[known]


def program_of(name: str):
    """The function that `module:function` names, or `path/in/the/course.py:function`."""
    module, _, function = name.partition(":")
    return getattr(module_of(module), function)
