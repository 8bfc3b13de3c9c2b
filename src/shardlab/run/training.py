"""Training on a rank: a `Trainer` that records its run folder.

Exercises hand their data, collator and arguments to `train`. `train_text` is a complete program without any exercise in it: it
continues pre-training on the paragraphs. Milestones use it where they judge a DeepSpeed configuration alone.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_utils import IntervalStrategy

from shardlab.data.models import load_model, parameter_count
from shardlab.run.checkpoints import Checkpointer, NothingLeft, Stopped, newest_checkpoint
from shardlab.run.collectives import barrier, rank
from shardlab.run.experiment import Experiment
from shardlab.run.recorder import RunRecorder, StateRecorder
from shardlab.run.run_folder import Run
from shardlab.run.text_rows import text_rows
from shardlab.zero import memory_model

TORCH_LINEAR = torch.nn.functional.linear


class Rows(Dataset):
    """A list as a torch data set."""

    def __init__(self, rows: list):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def prepare_process(experiment: Experiment) -> None:
    """Give this process what a fresh one has: no accelerate state, nothing that DeepSpeed has left, a process group, a seed."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    _forget_deepspeed()
    gc.collect()
    if torch.cuda.is_available():
        if os.environ.get("SHARDLAB_EXACT"):
            # The variable for cuBLAS is not enough where torch was loaded before it was set.
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if experiment.deepspeed is not None:
        import deepspeed

        # zero.Init asks DeepSpeed for the world size while the model is loaded, before Trainer has set it up.
        deepspeed.init_distributed(auto_mpi_discovery=False)
        _unlink_shared_buffers()
    set_seed(experiment.seed)


def _forget_deepspeed() -> None:
    """Undo what earlier engines have left in this process: memory, and a function of torch's that they replace.

    An engine and its states stay in memory when nobody holds it any more, since hooks on its parameters do; `destroy` takes most of
    them off, but under ZeRO-3 not all (deepspeed 0.19.8). So what it holds is taken out of it. And ZeRO-3 puts a `linear` of its
    own in the place of torch's, for good: "This will persist". It is Python, and makes methods that come later slower.
    """
    torch.nn.functional.linear = TORCH_LINEAR
    if (deepspeed := sys.modules.get("deepspeed")) is None:
        return
    for left in gc.get_objects():
        if issubclass(type(left), deepspeed.DeepSpeedEngine):
            with contextlib.suppress(Exception):  # one whose making has failed half-way
                left.destroy()
                for parameter in left.module.parameters():
                    for held in (parameter, getattr(parameter, "ds_tensor", parameter)):
                        held.data = torch.empty(0)
                left.basic_optimizer.state.clear()
                left.basic_optimizer.param_groups.clear()
                vars(left.optimizer).clear()


def _unlink_shared_buffers() -> None:
    """Take the names of DeepSpeed's shared-memory buffers away once all ranks have them mapped.

    On a CPU machine each rank makes a buffer of 66 MiB in /dev/shm for its all-reduces, and nothing ever removes it: deepspeed
    0.19.8 never calls its own `shared_close`. Without a name, the memory goes when the last rank ends, however it ends.
    """
    barrier()
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank()}"
    Path("/dev/shm", name).unlink(missing_ok=True)


def train(
    run: Run,
    *,
    model,
    arguments: TrainingArguments,
    train_set: list,
    eval_set: list,
    collate,
    tokens_per_sequence: float,
    callbacks: tuple[TrainerCallback, ...] = (),
) -> Trainer:
    """Train with `Trainer` and fill the run folder.

    Where the experiment has `save_every`, checkpoints go into the run folder, and training continues from the newest whole
    one that is there already.

    Args:
        run: where everything is recorded.
        model: what to train. Under ZeRO-3, load it after `arguments` exist: it is then sharded while it is loaded.
        arguments: the exercise's; logging is set to a line per step.
        train_set, eval_set: encoded examples; with an empty `eval_set` nothing is evaluated.
        collate: makes a batch of tensors from a list of examples.
        tokens_per_sequence: mean length of the training sequences.
        callbacks: what else `Trainer` is to call.

    Returns:
        The trainer, trained.

    Raises:
        Stopped: the run folder's stop file asked for it; a checkpoint has been saved.
    """
    checkpointer, checkpoint = None, None
    if run.experiment.save_every:
        arguments.output_dir = str(run.folder / "checkpoints")
        arguments.save_strategy, arguments.save_steps, arguments.save_total_limit = (
            IntervalStrategy.STEPS,
            run.experiment.save_every,
            2,
        )
        checkpointer, checkpoint = Checkpointer(run), newest_checkpoint(run.folder / "checkpoints")
        trained = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    arguments.logging_strategy = IntervalStrategy.STEPS
    arguments.logging_steps = 1
    arguments.disable_tqdm = True
    arguments.eval_on_start = bool(eval_set) and checkpoint is None
    arguments.remove_unused_columns = False
    arguments.dataloader_pin_memory = torch.cuda.is_available()
    if not eval_set:
        arguments.eval_strategy = IntervalStrategy.NO
    if arguments.world_size != run.experiment.ranks:
        raise RuntimeError(
            f"Trainer sees a world of {arguments.world_size}, the experiment has {run.experiment.ranks} ranks. "
            "Build TrainingArguments on the rank, with use_cpu=True where there is no GPU."
        )
    states = StateRecorder(run, tokens_per_sequence=tokens_per_sequence)
    recorder = RunRecorder(states)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Rows(train_set),
        eval_dataset=Rows(eval_set) if eval_set else None,
        data_collator=collate,
        callbacks=[recorder, *callbacks] + ([checkpointer] if checkpointer else []),
    )
    if trainer.is_deepspeed_enabled != (run.experiment.deepspeed is not None):
        # accelerate drops DeepSpeed without a word where ACCELERATE_USE_CPU is set, and trains with DDP instead.
        raise RuntimeError(
            f"DeepSpeed is {'on' if trainer.is_deepspeed_enabled else 'off'}, the experiment says otherwise. "
            "Pass the experiment's `deepspeed` to TrainingArguments, and unset ACCELERATE_USE_CPU."
        )
    trainer.remove_callback(PrinterCallback)
    recorder.trainer = trainer
    started = time.perf_counter()
    if checkpointer and rank() == 0:
        run.keep_steps(trained)  # an earlier life can have come further than its last whole checkpoint
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except NothingLeft:
        # A job can be started again between its last step and its end; the checkpoint is loaded when this is noticed. What reads
        # the log expects the entry that sums training up, as `Trainer` writes it after the last step.
        nothing = {"train_runtime": 0.0, "train_samples_per_second": 0.0, "train_steps_per_second": 0.0}
        trainer.state.log_history.append(nothing | {"epoch": trainer.state.epoch, "step": trainer.state.global_step})
    # While this is set, from_pretrained shards every model that it loads; after training, a model is loaded whole again.
    unset_hf_deepspeed_config()
    if checkpointer and checkpointer.stopped:
        raise Stopped(f"asked to stop after step {trainer.state.global_step} of {trainer.state.max_steps}; a checkpoint was saved")
    device_memory = states.device_memory()
    if rank() == 0:
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        run.record(
            parameters=parameter_count(trainer.model),
            train_seconds=round(time.perf_counter() - started, 2),
            tokens_per_sequence=round(tokens_per_sequence, 1),
            eval_losses=losses,
            log_history=trainer.state.log_history,
            **device_memory,
        )
    return trainer


def trainer_arguments(experiment: Experiment, run: Run) -> TrainingArguments:
    """The experiment's settings for `Trainer`, without evaluation and saving by the way."""
    return TrainingArguments(
        output_dir=str(run.folder / "trainer"),
        per_device_train_batch_size=experiment.micro_batch,
        per_device_eval_batch_size=8,
        gradient_accumulation_steps=experiment.accumulation,
        num_train_epochs=experiment.epochs,
        max_steps=experiment.steps or -1,
        learning_rate=experiment.learning_rate,
        weight_decay=experiment.weight_decay,
        max_grad_norm=experiment.clipping,
        seed=experiment.seed,
        bf16=experiment.precision == "bf16",
        fp16=experiment.precision == "fp16",
        deepspeed=experiment.deepspeed,
        save_strategy="no",
        eval_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
    )


def train_text(experiment: Experiment, run: Run) -> dict:
    """A program without exercises: continue pre-training on the paragraphs, with the experiment's settings.

    With `options["device_gib"]`, torch gets only so much of each GPU, as if the card were smaller.
    """
    if "device_gib" in experiment.options and torch.cuda.is_available():
        whole = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(experiment.options["device_gib"] * memory_model.GIB / whole)
    arguments = trainer_arguments(experiment, run)
    model = load_model(experiment.model, random_weights=experiment.random_weights, seed=experiment.seed)
    train_set, eval_set = text_rows(experiment)
    trainer = train(
        run,
        model=model,
        arguments=arguments,
        train_set=train_set,
        eval_set=eval_set if experiment.evaluate else [],
        collate=lambda batch: {key: torch.tensor([row[key] for row in batch]) for key in batch[0]},
        tokens_per_sequence=experiment.max_tokens,
    )
    if experiment.save:
        trainer.save_model(str(run.folder / "model"))
    return {}
