"""What a run writes into its folder while it trains: a line per optimizer step, and the bytes that each rank holds."""

from __future__ import annotations

import time
from dataclasses import asdict

import torch
from transformers import Trainer, TrainerCallback

from shardlab.data.models import parameter_count
from shardlab.run.collectives import gather, rank, world_size
from shardlab.run.run_folder import Run
from shardlab.zero import held_bytes


class StateRecorder:
    """Writes `metrics.jsonl` after each optimizer step, and `states.json` at the second one.

    The states are counted twice on the way to the second step (Adam makes its moments in the first): between two
    micro-batches, where stage 1 holds whole gradients and stage 2 a shard of them, and just before the step. The larger
    count of each kind is written.

    Args:
        run: the run folder.
        engine: a DeepSpeed engine; None without DeepSpeed, where `count` and `write` must be called.
        tokens_per_sequence: mean length of the training sequences, for tokens/s; the experiment's `max_tokens` by default.
    """

    def __init__(self, run: Run, engine=None, tokens_per_sequence: float | None = None):
        self.run, self.experiment = run, run.experiment
        self.tokens_per_sequence = tokens_per_sequence or run.experiment.max_tokens
        self.counts: list[dict] = []
        self.allocated: int | None = None
        self.restart_clock()
        if engine is not None:
            self.watch(engine)

    def restart_clock(self) -> None:
        """Leave what has happened since the last step out of the next step's time."""
        self.before = time.perf_counter()

    def watch(self, engine) -> None:
        """Count just before the second optimizer step of a DeepSpeed engine, and after each earlier micro-batch of that step."""
        take_step, backward, calls = engine.optimizer.step, engine.backward, 0

        def step(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == 2:
                self.count(engine.module, engine.optimizer)
                self.write(engine.module, engine.optimizer)
            return take_step(*args, **kwargs)

        def count_behind(*args, **kwargs):
            result = backward(*args, **kwargs)
            if calls == 1 and not engine.is_gradient_accumulation_boundary():
                self.count(engine.module, engine.optimizer)
            return result

        engine.optimizer.step, engine.backward = step, count_behind

    def count(self, model, optimizer) -> None:
        self.counts.append(asdict(held_bytes.held_bytes(model, optimizer)))

    def write(self, model, optimizer) -> None:
        largest = {kind: max(count[kind] for count in self.counts) for kind in self.counts[0]}
        ranks = gather(largest)
        if rank() == 0:
            self.run.write_states(
                {"parameters": parameter_count(model), "groups": held_bytes.parameter_groups(optimizer), "ranks": ranks}
            )

    def log_step(self, step: int, loss: float, learning_rate: float | None = None, samples: int | None = None) -> None:
        """One optimizer step is done; rank 0 writes its line.

        Args:
            step: how many there have been, with this one.
            loss: the mean over the step's micro-batches.
            learning_rate: of this step.
            samples: sequences of this step, over all ranks; the global batch by default.
        """
        if step == 2 and torch.cuda.is_available():
            self.allocated = torch.cuda.memory_allocated()
        now = time.perf_counter()
        seconds, self.before = now - self.before, now
        if rank() != 0:
            return
        samples = samples or self.experiment.global_batch
        self.run.log_step(
            step=step,
            loss=loss,
            learning_rate=learning_rate,
            seconds=round(seconds, 4),
            samples_per_second=round(samples / seconds, 3),
            tokens_per_second=round(samples * self.tokens_per_sequence / seconds, 1),
            steps=self.experiment.steps or step,
        )

    def device_memory(self) -> dict:
        """Each rank's peak and what it held after the second step, for `run.json`; nothing without a GPU. All ranks call it."""
        if not torch.cuda.is_available():
            return {}
        mine = {"peak_allocated": torch.cuda.max_memory_allocated(), "allocated_between_steps": self.allocated}
        return {"device_memory": gather(mine)}


class RunRecorder(TrainerCallback):
    """Lets `Trainer` fill the run folder through a `StateRecorder`."""

    def __init__(self, states: StateRecorder):
        self.states = states
        self.trainer: Trainer | None = None
        self.epochs_logged = 0.0

    def on_train_begin(self, args, state, control, **_):
        self.states.restart_clock()
        self.epochs_logged = state.epoch or 0.0  # more than 0 where training continues
        self.states.experiment = self.states.experiment.model_copy(update={"steps": state.max_steps})
        if self.trainer.is_deepspeed_enabled:
            self.states.watch(self.trainer.deepspeed)

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **_):
        # Under DeepSpeed the step has been taken by now, inside `backward`.
        if state.global_step == 1 and not self.trainer.is_deepspeed_enabled:
            self.states.count(model, optimizer.optimizer)
            self.states.write(model, optimizer.optimizer)

    def on_substep_end(self, args, state, control, model=None, optimizer=None, **_):
        if state.global_step == 1 and not self.trainer.is_deepspeed_enabled:
            self.states.count(model, optimizer.optimizer)

    def on_log(self, args, state, control, logs=None, train_dataloader=None, **_):
        if logs and "loss" in logs:
            # The last step of an epoch accumulates over what is left of it, which can be less than a global batch.
            epochs, self.epochs_logged = state.epoch - self.epochs_logged, state.epoch
            micro_batches = round(epochs * len(train_dataloader))
            samples = micro_batches * self.states.experiment.micro_batch * world_size()
            self.states.log_step(state.global_step, logs["loss"], logs.get("learning_rate"), samples)

    def on_evaluate(self, args, state, control, **_):
        self.states.restart_clock()

    def on_save(self, args, state, control, **_):
        self.states.restart_clock()
