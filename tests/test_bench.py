"""Each benchmark that a CPU can run comes to its end there, with the least work that it can be given."""

import json
import subprocess
import sys

import pytest

from shardlab import hardware

LEAST = {
    "stages": "--ranks 1 --model bloom-tiny --micro-batch 1 --accumulation 1 --steps 2 --max-tokens 64 --precision fp32 "
    "--methods baseline ZeRO-2",
    "offload": "--ranks 1 --tiny --steps 2 --cases 0",
    "multi_gpu": "--ranks 1 --model vit-tiny --micro-batch 1 --methods single_gpu_simple zero2 --repetitions 1 --precision fp32",
}
"""`host` has a disk to measure, `engine` is lab 03's own program, `links` needs NCCL, `grading` bubblewrap and a class."""


@pytest.mark.ranks
@pytest.mark.parametrize("name", LEAST)
def test_a_benchmark_comes_to_its_end(tmp_path, name):
    out = tmp_path / "out.json"
    words = [*LEAST[name].split(), "--out", str(out), "--runs", str(tmp_path / "runs")]
    command = [sys.executable, f"bench/{name}.py", *words]
    done = subprocess.run(command, cwd=hardware.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["versions"] and found["hardware"] and found["commit"]
    assert found["results"] and all(row["samples_per_second"] > 0 for row in found["results"]), found["results"]
