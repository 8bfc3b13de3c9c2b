"""Measure every method of lab 05 on this machine's GPUs: a Vision Transformer's shape with random weights, bf16, drawn images.

    python bench/multi_gpu.py --ranks 1 2 4 --out bench/results/multi-gpu-4xh200.json

Each repetition is a launch of its own. The result holds every repetition, median and spread, and the hardware and versions.
"""

import argparse
import json
from pathlib import Path
from statistics import median
from unittest import mock

from shardlab import progress, switch
from shardlab.run.experiment import Experiment
from shardlab.run.launch import LaunchError, launch
from shardlab.run.placement import TooFewGpus
from shardlab.run.run_folder import Run
from shardlab.run.trace import shares
from shardlab.show.timeline import traces_of

STEM = "lab05_multi_gpu"
H100_BF16_FLOPS = 989e12  # dense bf16, H100 and H200 SXM, NVIDIA's datasheet


def random_weights(model_name: str, num_labels: int, torch_dtype=None, enable_gradient_checkpointing: bool = False):
    """A model of that name's shape: weights change neither memory nor speed."""
    import torch
    from transformers import ViTForImageClassification

    from shardlab.data.models import vit_config

    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = ViTForImageClassification(vit_config(model_name, num_labels))
    if enable_gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()


def measure(experiment: Experiment, run: Run) -> dict:
    """What every rank runs: lab 05's `train_method`, with random weights; and how much memory its GPU has had to give."""
    import torch

    from shardlab.run.collectives import gather

    lab = switch.import_exercise(STEM)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with mock.patch.object(lab, "load_vit_model", random_weights):
        results = lab.train_method(experiment, run)
    if not results["not_run"]:
        results |= {"held_by_rank": gather(results["held_bytes"]), "peak_by_rank": gather(results["peak_memory_gb"])}
    return results


def flops_per_image(model: str) -> float:
    """6 FLOPs per parameter and token for forward and backward, and 12·layers·hidden·tokens per token for attention; what is
    computed anew is not counted. Source: PaLM, arXiv 2204.02311, appendix B."""
    from shardlab.data.models import VIT_SHAPES

    shape = VIT_SHAPES[model]
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    tokens = (shape["image_size"] // shape["patch_size"]) ** 2 + 1
    parameters = layers * (4 * hidden * hidden + 2 * hidden * shape["intermediate_size"])
    return tokens * (6 * parameters + 12 * layers * hidden * tokens)


def figures(run: Run) -> dict:
    """What is worth keeping of one repetition."""
    experiment, results = run.experiment, run.results
    found = {"method": experiment.method, "ranks": experiment.ranks, "outcome": run.outcome, "reason": run.reason}
    found["not_run"] = results.get("not_run") or None
    if not results.get("throughput"):
        return found
    speed = results["throughput"]
    found |= {
        "samples_per_second": round(speed, 2),
        "mfu_percent": round(100 * speed * flops_per_image(experiment.model) / experiment.ranks / H100_BF16_FLOPS, 2),
        "peak_gb": round(max(results["peak_by_rank"]), 3),
        "held_bytes": [sum(held.values()) for held in results["held_by_rank"]],
        "sent_bytes_per_step": {name: round(row["sent"]) for name, row in (results["communication"] or {}).items()},
        "calls_per_step": {name: row["calls"] for name, row in (results["communication"] or {}).items()},
        "first_losses": [round(loss, 5) for loss in results["train_losses"][:3]],
    }
    if traces := traces_of(run):
        found["shares_of_a_step"] = {name: round(share, 4) for name, share in shares(traces, 1).items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", required=True, help="numbers of GPUs, such as 1 2 4")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="google/vit-huge-patch14-224-in21k", help="a Vision Transformer's shape by name")
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--methods", nargs="+", help="by default all")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--runs", type=Path, default=Path("runs/bench-multi-gpu"))
    options = parser.parse_args()

    if switch.SOLUTIONS.is_dir():  # a release has none: there it measures with your own lab 05
        switch.use_exercises(switch.SOLUTIONS)
    lab = switch.import_exercise(STEM)
    results, last = [], None
    for ranks in options.ranks:
        for method in options.methods or lab.METHODS:
            if method.startswith("single_gpu") and ranks > 1:
                continue
            repetitions = []
            for number in range(options.repetitions):
                experiment = lab.method_experiment(
                    method,
                    ranks=ranks,
                    train_images=2 * ranks * options.micro_batch,
                    test_images=ranks * options.micro_batch,
                    checkpointing=True,
                    program="bench/multi_gpu.py:measure",
                    model=options.model,
                    precision=options.precision,
                    micro_batch=options.micro_batch,
                    accumulation=1,
                    name=f"{method}-{ranks}-{number}",
                )
                try:
                    launch(experiment, runs=options.runs, timeout=300, display=progress.default_display())
                except TooFewGpus as error:
                    raise SystemExit(str(error)) from None
                except LaunchError as error:
                    print(f"{method} on {ranks}: {str(error)[:2000]}", flush=True)
                last = Run.read(options.runs / experiment.name)
                repetitions.append(figures(last))
                if "samples_per_second" not in repetitions[-1]:
                    break
            speeds = [one["samples_per_second"] for one in repetitions if "samples_per_second" in one]
            summary = {"method": method, "ranks": ranks, "repetitions": repetitions}
            if speeds:
                summary |= {"samples_per_second": median(speeds), "spread_percent": round(100 * (max(speeds) / min(speeds) - 1), 2)}
            results.append(summary)
            print(json.dumps({"method": method, "ranks": ranks, "speeds": speeds} | repetitions[-1]), flush=True)
            write(options, results, last)


def write(options: argparse.Namespace, results: list[dict], last: Run) -> None:
    """The result file, after each method: what has been measured is not lost when a later one ends the program."""
    record, experiment = last.record_json, last.experiment
    ranks = " ".join(map(str, options.ranks))
    command = f"python bench/multi_gpu.py --ranks {ranks} --model {options.model} --micro-batch {options.micro_batch}"
    provenance = {
        "what": __doc__.splitlines()[0],
        "command": f"{command} --repetitions {options.repetitions} --precision {options.precision}",
        "date": record["created"],
        "hardware": record["hardware"],
        "versions": record["versions"],
        "commit": record["commit"],
        "model": experiment.model,
        "micro_batch": experiment.micro_batch,
        "gradient_checkpointing": True,
        "flops_per_image": flops_per_image(experiment.model),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(provenance | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
