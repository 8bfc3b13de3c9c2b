"""Measure the plain Trainer, DDP and ZeRO 0 to 3 on this machine's GPUs: BLOOM-560m's shape, random weights, sequences of 512.

    python bench/stages.py --ranks 4 --out bench/results/stages-4xh200.json

All methods have the same global batch. Weights are random and the text is padded, which changes neither memory nor speed.
The result holds each run's figures, its configuration, and the hardware and versions.
"""

import argparse
import json
from pathlib import Path

from shardlab import progress, switch
from shardlab.course.demo import METHODS, experiments
from shardlab.run.launch import LaunchError, launch
from shardlab.run.placement import TooFewGpus
from shardlab.run.run_folder import Run
from shardlab.show import report
from shardlab.zero import memory_model

H100_BF16_FLOPS = 989e12  # dense bf16, H100 and H200 SXM, NVIDIA's datasheet


def flops_per_token(config: dict, parameters: int, sequence: int) -> float:
    """6 FLOPs per parameter and token for forward and backward, and 12·layers·hidden·sequence for attention.

    Source: PaLM, arXiv 2204.02311, appendix B.
    """
    return 6 * parameters + 12 * config["n_layer"] * config["hidden_size"] * sequence


def figures(run: Run) -> dict:
    """What is worth keeping of a run."""
    from shardlab.data.models import SHAPES

    experiment, states = run.experiment, run.states()
    found = {
        "method": experiment.method,
        "outcome": run.outcome,
        "reason": run.reason,
        "ranks": experiment.ranks,
        "micro_batch": experiment.micro_batch,
        "accumulation": experiment.accumulation,
        "deepspeed": experiment.deepspeed,
    }
    if run.outcome != "finished":
        return found
    parameters, shape = states["parameters"], SHAPES.get(experiment.model)
    speed = run.samples_per_second()
    device = run.results.get("device_memory")
    measured, predicted = report.measured_states(run), report.predicted_states(run)
    found |= {
        "parameters": parameters,
        "samples_per_second": round(speed, 2),
        "losses": [round(loss, 4) for loss in run.losses()],
        "held_bytes_per_parameter": round((measured.device + measured.host) / parameters, 3),
        "held_bytes": vars(measured),
        "predicted_bytes": vars(predicted),
        "largest_rank": report.bytes_text(measured.device),
    }
    if shape:
        found["mfu_percent"] = round(
            100
            * speed
            * experiment.max_tokens
            * flops_per_token(shape, parameters, experiment.max_tokens)
            / (experiment.ranks * H100_BF16_FLOPS),
            2,
        )
    if device:
        found["peak_gib"] = round(max(d["peak_allocated"] for d in device) / memory_model.GIB, 2)
        found["between_steps_bytes_per_parameter"] = round(max(d["allocated_between_steps"] for d in device) / parameters, 2)
    return found


def write_results(out: Path, what: str, command: str, results: list[dict], last: Run) -> None:
    """A result file: the figures, and where they come from."""
    record, experiment = last.record_json, last.experiment
    provenance = {
        "what": what.splitlines()[0],
        "command": command,
        "date": record["created"],
        "hardware": record["hardware"],
        "versions": record["versions"],
        "commit": record["commit"],
        "model": experiment.model,
        "sequence": experiment.max_tokens,
        "global_batch": experiment.global_batch,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(provenance | {"results": results}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="bigscience/bloom-560m")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--runs", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()

    if switch.SOLUTIONS.is_dir():  # a release has none: there it measures with your own lab 02
        switch.use_exercises(switch.SOLUTIONS)
    planned = experiments(
        options.methods,
        program="shardlab.run.training:train_text",
        model=options.model,
        random_weights=options.model != "bloom-tiny",
        ranks=options.ranks,
        steps=options.steps,
        micro_batch=options.micro_batch,
        accumulation=options.accumulation,
        max_tokens=options.max_tokens,
        precision=options.precision,
        learning_rate=1e-5,
        evaluate=False,
        save=False,
    )
    results, last = [], None
    for experiment in planned:
        try:
            launch(experiment, runs=options.runs, timeout=240, display=progress.default_display())
        except TooFewGpus as error:
            raise SystemExit(str(error)) from None
        except LaunchError as error:
            print(f"{experiment.method}: {error}")
        last = Run.read(options.runs / experiment.name)
        results.append(figures(last))
        print(
            json.dumps(
                {
                    k: v
                    for k, v in results[-1].items()
                    if k
                    in (
                        "method",
                        "samples_per_second",
                        "mfu_percent",
                        "peak_gib",
                        "between_steps_bytes_per_parameter",
                        "held_bytes_per_parameter",
                    )
                }
            ),
            flush=True,
        )
    command = (
        f"python bench/stages.py --ranks {options.ranks} --model {options.model} --micro-batch {options.micro_batch} "
        f"--accumulation {options.accumulation} --steps {options.steps} --precision {options.precision}"
    )
    if options.methods != list(METHODS):
        command += " --methods " + " ".join(f"'{method}'" for method in options.methods)
    write_results(options.out, __doc__, command, results, last)


if __name__ == "__main__":
    main()
