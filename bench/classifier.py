"""Measure lab 07's Trainer on this machine's GPUs, without DeepSpeed and with ZeRO-1 to 3: graphcodebert-base's shape.

    python bench/classifier.py --ranks 2 --out bench/results/classifier-2xh200.json

Weights are random, which changes neither memory nor speed. Rows are full length, so that a sample is always as much work. The
result has samples per second, of the steps after the first two, and each rank's peak memory, next to hardware and versions.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import PrinterCallback, TrainerCallback

from shardlab import progress, switch
from shardlab.data.comments import comments
from shardlab.data.models import load_classifier, load_tokenizer, parameter_count
from shardlab.run.collectives import rank
from shardlab.run.experiment import Experiment
from shardlab.run.launch import launch_each
from shardlab.run.multilabel import Collator, Encoded, TrainingConfig, TrainParams
from shardlab.run.run_folder import Run

METHODS = {"no DeepSpeed": None, "ZeRO-1": 1, "ZeRO-2": 2, "ZeRO-3": 3}
WARM_UP = 2


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, args, state, control, **others):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def long_rows(count: int, max_len: int) -> list[dict]:
    """Comments one after the other, so many that each row is cut at `max_len`."""
    rows = comments("train", 16 * max_len)
    return [
        {"text": " ".join(row["text"] for row in rows[n : n + max_len // 4]), "labels": rows[n]["labels"]} for n in range(count)
    ]


def program(experiment: Experiment, run: Run) -> dict:
    """`options`: `fgm`."""
    lab = switch.import_exercise("lab07_custom_trainer")
    params = TrainParams(batch_size=experiment.micro_batch, grad_accum=experiment.accumulation, epochs=1, lr=1e-5)
    config = TrainingConfig(model_name=experiment.model, max_len=experiment.max_tokens, train_params=params)
    more = {"max_steps": experiment.steps, "disable_tqdm": True, "deepspeed": experiment.deepspeed}
    arguments = lab.trainer_arguments(config, run.folder / "trainer", bf16=experiment.precision == "bf16", **more)
    model = load_classifier(experiment.model, 16, random_weights=experiment.random_weights)
    count, clock = experiment.global_batch * experiment.steps, Clock()
    rows = Encoded(long_rows(count, experiment.max_tokens), load_tokenizer("comment-tiny"), experiment.max_tokens)
    trainer = lab.CustomTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=Collator(1),
        callbacks=[clock],
        loss=lab.AsymmetricLoss(),
        fgm_epsilon=experiment.options.get("fgm", 0.0),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    timed = clock.ends[WARM_UP:]
    speed = experiment.global_batch * (len(timed) - 1) / (timed[-1] - timed[0])
    peak = torch.tensor([torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0], device=arguments.device)
    peaks = trainer.accelerator.gather(peak).tolist()
    losses = [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry]
    found = {"samples_per_second": round(speed, 1), "peak_bytes": peaks, "losses": losses}
    return found | {"parameters": parameter_count(model)} if rank() == 0 else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="microsoft/graphcodebert-base")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps, of which the first two are not timed (default: 12)")
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()
    if options.steps < WARM_UP + 2:
        parser.error(f"--steps {options.steps}: at least {WARM_UP + 2} are needed, as the first {WARM_UP} are not timed")

    switch.use_exercises(switch.SOLUTIONS)
    planned = [
        Experiment(
            name=f"classifier-{method.lower().replace(' ', '-')}{'-fgm' * bool(fgm)}-{repetition}",
            program="bench/classifier.py:program",
            method=method + " with FGM" * bool(fgm),
            model=options.model,
            random_weights=options.model != "comment-tiny",
            precision=options.precision,
            deepspeed=None if stage is None else zero_file(stage),
            ranks=options.ranks,
            micro_batch=options.micro_batch,
            accumulation=1,
            steps=options.steps,
            max_tokens=options.max_tokens,
            save=False,
            options={"fgm": fgm},
        )
        for repetition in range(options.repetitions)
        for method, stage in METHODS.items()
        for fgm in ((0.0, 0.5) if stage in (None, 2) else (0.0,))
    ]
    runs = launch_each(planned, runs=options.runs, timeout=240, display=progress.default_display())
    results = []
    for method in dict.fromkeys(run.experiment.method for run in runs):
        same = [run for run in runs if run.experiment.method == method]
        done = sorted(run.results["samples_per_second"] for run in same if run.outcome == "finished")
        found = {"method": method, "outcome": same[0].outcome, "reason": same[0].reason, "deepspeed": same[0].experiment.deepspeed}
        if done:
            peaks = max(max(run.results["peak_bytes"]) for run in same if run.outcome == "finished")
            found |= {"samples_per_second": done[len(done) // 2], "spread_percent": round(100 * (done[-1] / done[0] - 1), 1)}
            found |= {"peak_gb": round(peaks / 1e9, 2), "losses": same[0].results["losses"]}
            found |= {"parameters": same[0].results["parameters"]}
        results.append(found)
        print(json.dumps({key: value for key, value in found.items() if key != "deepspeed"}))
    record = runs[-1].record_json
    chosen = f"--ranks {options.ranks} --model {options.model} --micro-batch {options.micro_batch} --steps {options.steps}"
    provenance = {
        "what": __doc__.splitlines()[0],
        "command": f"python bench/classifier.py {chosen}",
        "date": record["created"],
        "hardware": record["hardware"],
        "versions": record["versions"],
        "commit": record["commit"],
        "micro_batch": options.micro_batch,
        "max_tokens": options.max_tokens,
        "precision": options.precision,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(provenance | {"results": results}, indent=1) + "\n")


def zero_file(stage: int) -> dict:
    sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
    return dict.fromkeys(sizes, "auto") | {"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": stage}}


if __name__ == "__main__":
    main()
