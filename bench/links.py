"""What the link between GPUs moves: seconds of NCCL's collectives by size, for `shardlab.cluster.scaling`.

torchrun --nproc-per-node 4 bench/links.py --out mine.json
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist


def seconds_of(collective, repeats: int, gpu: bool) -> float:
    """The median time of a collective, in the slowest rank, after three that do not count."""
    taken = []
    for _ in range(repeats + 3):
        dist.barrier()
        if gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        collective()
        if gpu:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    slowest = torch.tensor(statistics.median(taken[3:]), device="cuda" if gpu else "cpu")
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="the JSON file to write")
    parser.add_argument("--largest", type=int, default=2**30, help="bytes of the largest message")
    parser.add_argument("--repeats", type=int, default=20)
    chosen = parser.parse_args()
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpu else "gloo")
    ranks, device, rows = dist.get_world_size(), "cuda" if gpu else "cpu", []
    size = 2**12
    while size <= chosen.largest:
        whole = torch.zeros(size // 2, dtype=torch.bfloat16, device=device)
        part = torch.zeros(size // 2 // ranks, dtype=torch.bfloat16, device=device)
        collectives = {
            "all-reduce": lambda: dist.all_reduce(whole),
            "all-gather": lambda: dist.all_gather_into_tensor(whole, part),
            "reduce-scatter": lambda: dist.reduce_scatter_tensor(part, whole),
        }
        for name, collective in collectives.items():
            taken = seconds_of(collective, chosen.repeats, gpu)
            # nccl-tests' bus bandwidth: the bytes that each link carries, whatever the number of ranks.
            moved = size * (ranks - 1) / ranks * (2 if name == "all-reduce" else 1)
            rows.append({"collective": name, "bytes": size, "seconds": taken, "bus_gb_per_second": moved / taken / 1e9})
            if dist.get_rank() == 0:
                print(f"{name:<15} {size:>12,} bytes {1e6 * taken:>10.1f} us {moved / taken / 1e9:>8.1f} GB/s", flush=True)
        size *= 4
    if dist.get_rank() == 0:
        name = torch.cuda.get_device_name() if gpu else "CPU, gloo"
        record = {
            "what": "collectives of torch.distributed by size, median of the slowest rank",
            "command": f"torchrun --nproc-per-node {ranks} {' '.join(sys.argv)}",
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "hardware": {"gpus": [name] * ranks},
            "versions": {"torch": torch.__version__, "nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpu else None},
            "commit": None,
            "ranks": ranks,
            "results": rows,
        }
        Path(chosen.out).write_text(json.dumps(record, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
