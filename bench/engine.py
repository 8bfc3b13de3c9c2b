"""Measure lab 03's `--compare` on this machine's GPUs: BLOOM-560m's shape, random weights, sequences of 512.

    python bench/engine.py --ranks 2 --out bench/results/engine-2xh200.json

It starts the lab's own program with the `deepspeed` launcher and the reference solutions, and reads the run folders.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from stages import figures, write_results

from shardlab.hardware import ROOT
from shardlab.run.run_folder import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="bigscience/bloom-560m")
    parser.add_argument("--steps", type=int, default=8)
    chosen = parser.parse_args()
    program = ROOT / "labs/lab03_engine/train.py"
    options = ["--compare", "--random-weights", "--model", chosen.model, "--steps", str(chosen.steps)]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(chosen.ranks)]
    solutions = os.environ | {"SHARDLAB_EXERCISES": str(ROOT / "solutions")}
    subprocess.run([*launcher, str(program), *options], check=True, env=solutions)
    names = ["stage0", "stage1", "stage2", "stage3", "stage2-offload", "stage3-offload"]
    runs = [Run.read(Path("runs", f"lab03-{name}")) for name in names]
    command = f"python bench/engine.py --ranks {chosen.ranks} --model {chosen.model} --steps {chosen.steps}"
    write_results(chosen.out, __doc__, command, [figures(run) for run in runs], runs[-1])


if __name__ == "__main__":
    main()
