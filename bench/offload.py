"""Measure what CPU offload costs on this machine's GPUs, and what amortises it: BLOOM's shapes, random weights, sequences of 512.

    python bench/offload.py --ranks 1 --out bench/results/offload-1xh200.json

Each case is one run. Cases with the same global batch are compared with each other. A case that ends in an error, such as
out of memory, stays in the result with its reason. The file is written anew after each case.
"""

import argparse
import copy
import shutil
import time
from pathlib import Path

from stages import figures, write_results

from shardlab import progress
from shardlab.run.experiment import Experiment
from shardlab.run.launch import LaunchError, launch
from shardlab.run.placement import TooFewGpus
from shardlab.run.run_folder import Run


def config(stage: int, optimizer: str | None = None, parameters: str | None = None, pin: bool = True) -> dict:
    """Optimizer states and parameters stay on the GPU, or go to "cpu" or "nvme"; the path is filled in later."""
    zero: dict = {"stage": stage}
    if optimizer:
        zero["offload_optimizer"] = {"device": optimizer, "pin_memory": pin}
    if parameters:
        zero["offload_param"] = {"device": parameters, "pin_memory": pin}
    if parameters == "nvme":  # a buffer holds the largest parameter: BLOOM-560m's embedding has 256,901,120 elements
        zero["offload_param"] |= {"buffer_size": 300_000_000, "buffer_count": 5, "max_in_cpu": 0}
        zero |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}  # or each parameter keeps its buffer
    params = {"lr": "auto", "weight_decay": "auto"} | ({} if optimizer else {"torch_adam": True})
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": 1.0,
        "bf16": {"enabled": "auto"},
        "zero_optimization": zero,
        "optimizer": {"type": "AdamW", "params": params},
    }


SMALL, LARGE = "bigscience/bloom-560m", "bigscience/bloom-3b"
CASES = [
    # method, configuration, model, micro-batch, accumulation, GiB of the device
    ("ZeRO-2", config(2), SMALL, 8, 1, None),
    ("ZeRO-2 + optimizer on CPU", config(2, "cpu"), SMALL, 8, 1, None),
    ("ZeRO-2", config(2), SMALL, 8, 4, None),
    ("ZeRO-2 + optimizer on CPU", config(2, "cpu"), SMALL, 8, 4, None),
    ("ZeRO-2", config(2), SMALL, 8, 16, None),
    ("ZeRO-2 + optimizer on CPU", config(2, "cpu"), SMALL, 8, 16, None),
    ("ZeRO-2", config(2), SMALL, 32, 1, None),
    ("ZeRO-2 + optimizer on CPU", config(2, "cpu"), SMALL, 32, 1, None),
    ("ZeRO-2", config(2), SMALL, 32, 4, None),
    ("ZeRO-2 + optimizer on CPU", config(2, "cpu"), SMALL, 32, 4, None),
    ("ZeRO-2 + optimizer on CPU, pageable", config(2, "cpu", pin=False), SMALL, 8, 4, None),
    ("ZeRO-3", config(3), SMALL, 8, 4, None),
    ("ZeRO-3 + optimizer on CPU", config(3, "cpu"), SMALL, 8, 4, None),
    ("ZeRO-3 + both on CPU", config(3, "cpu", "cpu"), SMALL, 8, 4, None),
    ("ZeRO-2", config(2), LARGE, 4, 16, 40),
    ("ZeRO-2 + optimizer on CPU", config(2, "cpu"), LARGE, 4, 16, 40),
    ("ZeRO-3 + both on CPU", config(3, "cpu", "cpu"), LARGE, 4, 16, 40),
    ("baseline", None, SMALL, 4, 1, None),
    ("baseline", None, SMALL, 8, 1, None),
    ("baseline", None, SMALL, 32, 1, None),
    ("ZeRO-3 + optimizer on NVMe", config(3, "nvme"), SMALL, 8, 4, None),
    ("ZeRO-3 + optimizer on NVMe, parameters on CPU", config(3, "nvme", "cpu"), SMALL, 8, 4, None),
    ("ZeRO-3 + both on NVMe", config(3, "nvme", "nvme"), SMALL, 8, 4, None),
    ("ZeRO-3 + optimizer on NVMe, parameters on CPU", config(3, "nvme", "cpu"), LARGE, 4, 16, 40),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--cases", type=int, nargs="+", help="only these, counted from 0")
    parser.add_argument("--tiny", action="store_true", help="bloom-tiny and short sequences, to try this program without a GPU")
    parser.add_argument("--nvme", type=Path, default=Path("runs/bench-nvme"), help="a folder on the disk for NVMe offload")
    parser.add_argument("--runs", type=Path, default=Path("runs/bench-offload"))
    options = parser.parse_args()
    results, command = [], f"python bench/offload.py --ranks {options.ranks} --steps {options.steps}"
    for number in options.cases or range(len(CASES)):
        method, deepspeed, model, micro_batch, accumulation, device_gib = copy.deepcopy(CASES[number])
        for part in ("offload_optimizer", "offload_param"):
            settings = deepspeed["zero_optimization"].get(part, {}) if deepspeed else {}
            if settings.get("device") == "nvme":
                settings["nvme_path"] = str(options.nvme.resolve())
            if options.tiny and "buffer_size" in settings:
                settings["buffer_size"] = 300_000
        experiment = Experiment(
            name=f"case{number}",
            method=method,
            program="shardlab.run.training:train_text",
            deepspeed=deepspeed,
            model="bloom-tiny" if options.tiny else model,
            random_weights=not options.tiny,
            ranks=options.ranks,
            steps=options.steps,
            micro_batch=2 if options.tiny else micro_batch,
            accumulation=min(accumulation, 2) if options.tiny else accumulation,
            max_tokens=64 if options.tiny else 512,
            precision="fp32" if options.tiny else "bf16",
            learning_rate=1e-5,
            evaluate=False,
            save=False,
            options={"device_gib": device_gib} if device_gib else {},
        )
        started = time.monotonic()
        try:
            launch(experiment, runs=options.runs, timeout=330, display=progress.Quiet())
        except TooFewGpus as error:
            raise SystemExit(str(error)) from None
        except LaunchError as error:
            print(str(error)[:300])
        on_disk = sum(path.stat().st_size for path in options.nvme.rglob("*") if path.is_file())
        shutil.rmtree(options.nvme, ignore_errors=True)
        run = Run.read(options.runs / experiment.name)
        results.append(figures(run) | {"model": model, "global_batch": experiment.global_batch, "device_gib": device_gib})
        results[-1] |= {"disk_bytes": on_disk} if on_disk else {}
        keys = ("method", "micro_batch", "accumulation", "outcome", "samples_per_second", "peak_gib")
        print(number, {key: results[-1].get(key) for key in keys}, f"{time.monotonic() - started:.0f} s", flush=True)
        write_results(options.out, __doc__, command, results, run)


if __name__ == "__main__":
    main()
