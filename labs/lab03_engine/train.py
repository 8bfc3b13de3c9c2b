"""The exercises of lab 03 as a program, which a launcher starts once per rank.

    deepspeed --num_gpus 2 labs/lab03_engine/train.py --stage 2
    deepspeed --num_gpus 2 labs/lab03_engine/train.py --stage 3 --offload
    deepspeed --num_gpus 2 labs/lab03_engine/train.py --compare
    deepspeed --hostfile hosts.txt --no_ssh --node_rank 0 --master_addr localhost labs/lab03_engine/train.py --stage 2
    torchrun --nproc-per-node 2 labs/lab03_engine/train.py --stage 2

`--num_gpus` counts ranks. Each needs a GPU of its own; without GPUs they are processes on the CPU. On a machine with one GPU, take
`--num_gpus 1`, or put `DS_ACCELERATOR=cpu` in front of the command. A hostfile has a line per machine, such as
`localhost slots=2`. With a hostfile the launcher asks each machine through ssh, without a password; with `--no_ssh` you start
the command on each machine yourself, with its `--node_rank` and the address of the first.

The exercises are those in `src/exercises`. In the course itself, not in a release, SHARDLAB_EXERCISES=solutions in front of the
command takes the reference solutions.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
from pathlib import Path

import torch
from datasets import Dataset

from shardlab import hardware, switch
from shardlab.data.models import load_model
from shardlab.run.collectives import rank, world_size
from shardlab.run.experiment import Experiment
from shardlab.run.ranks import leave_process_group, run_under_launcher
from shardlab.run.recorder import StateRecorder
from shardlab.run.run_folder import Run
from shardlab.run.training import text_rows
from shardlab.show import report


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line. The `deepspeed` launcher puts `--local_rank=N` in front of a script's arguments; `torchrun` does not."""
    parser = argparse.ArgumentParser(description="Train with DeepSpeed's engine; a launcher starts this once per rank.")
    parser.add_argument("--stage", type=int, choices=(0, 1, 2, 3), default=2, help="ZeRO stage (default: 2)")
    parser.add_argument("--offload", action="store_true", help="optimizer states on the CPU; in stage 3 the parameters too")
    parser.add_argument("--compare", action="store_true", help="train with every stage, without and with offload; print a table")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default: 20)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the newest whole checkpoint of the same run; without it the run is replaced, and its checkpoints set aside",
    )
    parser.add_argument("--save-every", type=int, default=10, help="optimizer steps from one checkpoint to the next (default: 10)")
    parser.add_argument("--model", help="default: bloom-tiny without a GPU, else bigscience/bloom-560m")
    parser.add_argument("--random-weights", action="store_true", help="the model's shape only, to measure without its weights")
    parser.add_argument("--micro-batch", type=int, help="sequences per rank and forward pass (default: 2 without a GPU, else 8)")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    chosen = parser.parse_args(arguments)
    if chosen.offload and chosen.stage == 0:
        parser.error("--offload needs --stage 1, 2 or 3: stage 0 has no sharded optimizer to move")
    if chosen.compare and chosen.steps < 2:
        parser.error("--compare needs --steps 2 or more: the first step warms up and is not measured")
    for name in ("steps", "save_every", "micro_batch"):
        if getattr(chosen, name) is not None and getattr(chosen, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(chosen, name)}: at least 1 is needed")
    return chosen


def tensors(rows: list[dict]) -> Dataset:
    """Rows of numbers as a data set of tensors."""
    return Dataset.from_list(rows).with_format("torch")


def program(experiment: Experiment, run: Run) -> dict:
    """What every rank runs: the exercises, put together. It trains on the paragraphs' text.

    The experiment's `options`: `checkpoints`, a folder to save to at the end and every `save_every` optimizer steps; and
    `resume`, to continue from the newest whole checkpoint in it; without it what is in the folder goes to one next to it;
    and `set_epoch`, False to lose that call, as a loop that forgot it would.

    Returns:
        Results for `run.json`; `orders` says in how many different orders rank 0 has seen its rows.
    """
    lab, options = switch.import_exercise("lab03_engine"), experiment.options
    model = load_model(experiment.model, random_weights=experiment.random_weights, seed=experiment.seed)
    train_rows, eval_rows = text_rows(experiment)
    engine, optimizer, loader, _ = lab.initialize_deepspeed(model, experiment.deepspeed, None, tensors(train_rows))
    states = StateRecorder(run, engine)

    def after_step(trainer, loss: float) -> None:
        states.log_step(engine.global_steps, loss)
        if engine.global_steps % options.get("save_every", math.inf) == 0:
            trainer.save_checkpoint(options["checkpoints"], {"name": experiment.name})

    trainer = lab.DeepSpeedTrainer(engine, after_step)
    if options.get("resume"):
        trainer.load_checkpoint(options["checkpoints"])
    elif "checkpoints" in options and rank() == 0:
        make_room(Path(options["checkpoints"]))
    if not options.get("set_epoch", True):
        loader.data_sampler.set_epoch = lambda epoch: None
    orders = set()
    while engine.global_steps < experiment.steps:
        trainer.train_epoch(loader, experiment.steps)
        orders.add(tuple(loader.data_sampler))
    results = states.device_memory() | {"orders": len(orders)}
    if experiment.evaluate:
        share = tensors(eval_rows[: len(eval_rows) // world_size() * world_size()])
        held_out = engine.deepspeed_io(share, route="eval", num_local_io_workers=0, pin_memory=torch.cuda.is_available())
        results["eval_loss"] = trainer.evaluate(held_out)
    saved = "checkpoints" in options and Path(options["checkpoints"], f"step-{engine.global_steps}", "complete.json").exists()
    if "checkpoints" in options and not saved:
        trainer.save_checkpoint(options["checkpoints"], {"name": experiment.name})
    engine.destroy()  # the next run of the same process needs the memory
    return results


def make_room(folder: Path) -> None:
    """An empty folder for checkpoints, that can be written: now, and not found out after hours of training."""
    if folder.exists():
        before = folder.with_name(folder.name + ".before")
        shutil.rmtree(before, ignore_errors=True)
        folder.rename(before)
        print(f"{folder} held checkpoints of an earlier run: they are in {before} now. --resume would have continued from them.")
    folder.mkdir(parents=True)
    probe = folder / ".can-be-written"
    probe.touch()
    probe.unlink()


def summary(run: Run) -> str:
    """What came of a run, for the terminal."""
    experiment, zero = run.experiment, run.experiment.deepspeed["zero_optimization"]
    moved = [part.removeprefix("offload_") for part in ("offload_optimizer", "offload_param") if part in zero]
    if not run.losses():
        return f"Nothing was left to train: the checkpoint is at step {experiment.steps} or later. Give more --steps."
    held, speed = report.measured_states(run), run.samples_per_second()
    states = "not measured: two optimizer steps are needed"
    if held:
        states = f"{report.bytes_text(held.device)} on each device, {report.bytes_text(held.host)} per rank on the host"
    memory = ", ".join(f"{device} {row['peak']:.0f} MiB" for device, row in sorted(run.memory().items()))
    return "\n".join(
        [
            f"stage          {zero['stage']}, {experiment.ranks} ranks",
            f"offload        {', '.join(moved) or 'none'}",
            f"loss           {run.losses()[0]:.4f} at first, {run.losses()[-1]:.4f} at last (each step sees other text)",
            f"eval loss      {run.results['eval_loss']:.4f} after training",
            f"model states   {states}",
            f"peak memory    {memory}",
            f"samples/s      {speed:.1f}" if speed else "samples/s      not measured: two optimizer steps are needed",
            f"run folder     {run.folder}",
            f"checkpoints    {experiment.options.get('checkpoints', 'none')}",
        ]
    )


def main() -> int:
    """The program: one run and its summary, or all of them and a table."""
    chosen = parse_arguments(sys.argv[1:])
    if "RANK" not in os.environ:
        print(
            "This is one rank of several, so a launcher must start it, such as\n"
            f"    deepspeed --num_gpus 2 {sys.argv[0]} --stage {chosen.stage}\n"
            f"    torchrun --nproc-per-node 2 {sys.argv[0]} --stage {chosen.stage}",
            file=sys.stderr,
        )
        return 2
    tiny, ranks = hardware.size() == "tiny", int(os.environ["WORLD_SIZE"])
    model = chosen.model or ("bloom-tiny" if tiny else "bigscience/bloom-560m")
    common = {
        "model": model,
        "data": "mini" if model == "bloom-tiny" or chosen.random_weights else "squad",
        "random_weights": chosen.random_weights,
        "ranks": ranks,
        "steps": chosen.steps,
        "learning_rate": 1e-4,
        "micro_batch": chosen.micro_batch or (2 if tiny else 8),
        "accumulation": 2,
        "max_tokens": 64 if tiny else 512,
        "precision": hardware.best_precision(),
        "program": "labs/lab03_engine/train.py:program",
        "train_examples": 256,
        "eval_examples": 64,
    }
    plans = [(chosen.stage, chosen.offload)]
    if chosen.compare:
        plans = [(0, False), (1, False), (2, False), (3, False), (1, True), (2, True), (3, True)]
    finished = []
    for stage, offload in plans:
        name = f"lab03-stage{stage}{'-offload' if offload else ''}"
        config = switch.import_exercise("lab03_engine").engine_config(
            stage,
            offload=offload,
            ranks=ranks,
            **{key: common[key] for key in ("micro_batch", "accumulation", "learning_rate", "precision")},
        )
        options = {}
        if not chosen.compare:
            saved = str(Path("runs", f"{name}-checkpoints"))
            options = {"checkpoints": saved, "save_every": chosen.save_every, "resume": chosen.resume}
        experiment = Experiment(
            name=name, method=f"stage {stage}{' + offload' if offload else ''}", deepspeed=config, options=options, **common
        )
        finished.append(run_under_launcher(experiment, "runs"))
    leave_process_group()
    if rank() == 0 and not chosen.compare:
        print(summary(finished[0]))
    if rank() == 0 and chosen.compare:
        fastest = max(run.samples_per_second() for run in finished)
        report.print_rows(
            "Measured here, with this model: the fastest row that fits is the one to take",
            [
                {
                    "method": run.experiment.method,
                    "bytes per rank": report.bytes_text(report.measured_states(run).device),
                    "on the host, per rank": report.bytes_text(report.measured_states(run).host),
                    "samples/s": f"{run.samples_per_second():.1f}",
                    "relative speed": f"{run.samples_per_second() / fastest:.2f}",
                    "last loss": f"{run.losses()[-1]:.4f}",
                }
                for run in finished
            ],
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
