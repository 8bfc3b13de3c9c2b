"""Measure every method of lab 05 on this machine's GPUs: a model's shape with random weights, bf16, gradient checkpointing.

    python bench/multi_gpu.py --ranks 1 2 4 --out bench/results/multi-gpu-4xh200.json

A Vision Transformer gets drawn images. A BLOOM gets 512 tokens in the place of each image: the methods do not know the difference.
All methods run one after the other, and then all again; each builds its model anew. After the repetitions come one more of each,
with a profiler, where there is more than one GPU: reading the traces of a large model takes longer than training it. Its speed is
not counted. The result holds every repetition, median and spread, and the hardware and versions.
"""

import argparse
import functools
import gc
import json
from pathlib import Path
from statistics import median
from unittest import mock

from shardlab import switch
from shardlab.run.experiment import Experiment
from shardlab.run.launch import launch_each
from shardlab.run.placement import TooFewGpus
from shardlab.run.run_folder import Run
from shardlab.run.trace import shares
from shardlab.show.timeline import traces_of

STEM = "lab05_multi_gpu"
H100_BF16_FLOPS = 989e12  # dense bf16, H100 and H200 SXM, NVIDIA's datasheet


TOKENS = 512
"""Of a row, where the model is a language model."""

MEASURED_STEPS = 10

TRACED = "traced"
"""In the place of a repetition's number."""


def random_weights(model_name: str, num_labels: int, torch_dtype=None, enable_gradient_checkpointing: bool = False):
    """A model of that name's shape: weights change neither memory nor speed."""
    import torch
    from transformers import AutoModelForCausalLM, ViTForImageClassification

    from shardlab.data.models import SHAPES, model_config, vit_config

    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        if model_name in SHAPES:
            model = AutoModelForCausalLM.from_config(model_config(model_name))
        else:
            model = ViTForImageClassification(vit_config(model_name, num_labels))
    if enable_gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return (tokens_for_images(model, num_labels) if model_name in SHAPES else model).train()


def tokens_for_images(language_model, num_labels: int):
    """A language model that is called as an image classifier is, and computes its own loss on as many rows of tokens."""
    import torch

    class TokensForImages(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.language_model = language_model

        def forward(self, pixel_values, labels=None):
            rows = len(pixel_values)
            ids = torch.arange(rows * TOKENS, device=pixel_values.device).view(rows, TOKENS) % self.language_model.config.vocab_size
            if labels is None:  # an evaluation, of which nothing is kept
                ids = ids[:, :8]
            output = self.language_model(input_ids=ids, labels=ids if labels is not None else None)
            output.logits = output.logits[:, -1, :num_labels]
            return output

    return TokensForImages()


def image_settings(model_name: str) -> tuple[int, list[float], list[float]]:
    """As `shardlab.data.models.image_settings`, and for language models, to which the pixels are nothing."""
    from shardlab.data.models import SHAPES, VIT_SHAPES

    return 8 if model_name in SHAPES else VIT_SHAPES[model_name]["image_size"], [0.5] * 3, [0.5] * 3


def measure(experiment: Experiment, run: Run) -> dict:
    """What every rank runs: lab 05's `train_method`, with random weights; and how much memory its GPU has had to give."""
    import torch

    from shardlab.run.collectives import gather

    lab = switch.import_exercise(STEM)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    measured = functools.partial(lab.measure_throughput, measured_steps=MEASURED_STEPS)
    with (
        mock.patch.object(lab, "load_vit_model", random_weights),
        mock.patch.object(lab, "measure_throughput", measured),
        mock.patch("shardlab.data.models.image_settings", image_settings),
    ):
        results = lab.train_method(experiment, run)
    if not results["not_run"]:
        results |= {"held_by_rank": gather(results["held_bytes"]), "peak_by_rank": gather(results["peak_memory_gb"])}
    return results


def flops_per_sample(model: str) -> float:
    """6 FLOPs per parameter and token for forward and backward, and 12·layers·hidden·tokens per token for attention; what is
    computed anew is not counted. Source: PaLM, arXiv 2204.02311, appendix B. An embedding that is also the output layer counts."""
    from shardlab.data.models import SHAPES, VIT_SHAPES

    if model in SHAPES:
        shape = SHAPES[model]
        hidden, layers, tokens = shape["hidden_size"], shape["n_layer"], TOKENS
        parameters = 12 * layers * hidden * hidden + shape["vocab_size"] * hidden
    else:
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
        "mfu_percent": round(100 * speed * flops_per_sample(experiment.model) / experiment.ranks / H100_BF16_FLOPS, 2),
        "peak_gb": round(max(results["peak_by_rank"]), 3),
        "held_bytes": [sum(held.values()) for held in results["held_by_rank"]],
        "first_losses": [round(loss, 5) for loss in results["train_losses"][:3]],
    }
    return found


def traced_figures(run: Run) -> dict:
    """What only the repetition with a profiler says; empty where the method did not run."""
    if not (traces := traces_of(run)):
        return {}
    table = run.results["communication"]
    return {
        "sent_bytes_per_step": {name: round(row["sent"]) for name, row in table.items()},
        "calls_per_step": {name: row["calls"] for name, row in table.items()},
        "shares_of_a_step": {name: round(share, 4) for name, share in shares(traces, 1).items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", required=True, help="numbers of GPUs, such as 1 2 4")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--model", default="google/vit-huge-patch14-224-in21k", help="whose shape: a Vision Transformer's or a BLOOM's"
    )
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--methods", nargs="+", help="by default all")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--runs", type=Path, default=Path("runs/bench-multi-gpu"))
    options = parser.parse_args()

    if switch.SOLUTIONS.is_dir():  # a release has none: there it measures with your own lab 05
        switch.use_exercises(switch.SOLUTIONS)
    lab = switch.import_exercise(STEM)
    results = []
    for ranks in options.ranks:
        methods = [method for method in options.methods or lab.METHODS if ranks == 1 or not method.startswith("single_gpu")]
        numbers = list(range(options.repetitions)) + [TRACED] * (ranks > 1)
        planned = {
            (method, number): lab.method_experiment(
                method,
                ranks=ranks,
                train_images=2 * ranks * options.micro_batch,
                test_images=ranks * options.micro_batch,
                checkpointing=True,
                trace=number == TRACED,
                program="bench/multi_gpu.py:measure",
                model=options.model,
                precision=options.precision,
                micro_batch=options.micro_batch,
                accumulation=1,
                name=f"{method}-{ranks}-{number}",
            )
            for number in numbers
            for method in methods
        }
        try:
            runs = dict(zip(planned, launch_each(list(planned.values()), runs=options.runs, timeout=60 * len(planned))))
        except TooFewGpus as error:
            raise SystemExit(str(error)) from None
        for method in methods:
            repetitions = [figures(runs[method, number]) for number in range(options.repetitions)]
            speeds = [one["samples_per_second"] for one in repetitions if "samples_per_second" in one]
            summary = {"method": method, "ranks": ranks, "repetitions": repetitions}
            if TRACED in numbers:
                summary["traced"] = traced_figures(runs[method, TRACED])
            if speeds:
                summary |= {"samples_per_second": median(speeds), "spread_percent": round(100 * (max(speeds) / min(speeds) - 1), 2)}
            results.append(summary)
            print(json.dumps({"speeds": speeds} | repetitions[-1] | summary.get("traced", {})), flush=True)
        write(options, results, runs[methods[0], 0])


def write(options: argparse.Namespace, results: list[dict], last: Run) -> None:
    """The result file, after each number of ranks: what has been measured is not lost when something later ends the program."""
    from shardlab.data.models import SHAPES

    record, experiment = last.record_json, last.experiment
    ranks = " ".join(map(str, options.ranks))
    command = f"python bench/multi_gpu.py --ranks {ranks} --model {options.model} --micro-batch {options.micro_batch}"
    command += f" --methods {' '.join(options.methods)}" if options.methods else ""
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
        "samples": f"{TOKENS} tokens" if experiment.model in SHAPES else "images",
        "flops_per_sample": flops_per_sample(experiment.model),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(provenance | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
