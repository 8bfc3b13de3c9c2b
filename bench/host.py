"""Measure what offload rests on: the way between GPU and host, Adam on the host, and the disk.

    python bench/host.py --out bench/results/host-1xh200.json --disk /path/on/the/disk

Each figure is the median of several runs after one that warms up. Rates count the bytes that are read and written: a copy of 1 GiB
within one memory moves 2 GiB; between GPU and host it moves 1 GiB over the link. A step of Adam reads parameter, gradient, momentum
and variance in fp32 and writes three of them: 28 bytes per element.
"""

import argparse
import json
import os
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path

from shardlab import hardware
from shardlab.zero import ops

os.environ.update(ops.environment())
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import AsyncIOBuilder

GIB = 2**30


def median_seconds(action, repeats: int = 7) -> float:
    seconds = []
    for _ in range(repeats + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def copies(size: int) -> list[dict]:
    """GiB/s of copies of `size` bytes."""
    pageable, target = torch.ones(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)
    rows = [("within the host's memory", 2, lambda: target.copy_(pageable))]
    if torch.cuda.is_available():
        pinned = torch.ones(size, dtype=torch.uint8).pin_memory()
        device, other = torch.ones(size, dtype=torch.uint8, device="cuda"), torch.ones(size, dtype=torch.uint8, device="cuda")
        rows += [
            ("within the GPU's memory", 2, lambda: other.copy_(device)),
            ("host to GPU, pinned", 1, lambda: device.copy_(pinned, non_blocking=True)),
            ("GPU to host, pinned", 1, lambda: pinned.copy_(device, non_blocking=True)),
            ("host to GPU, pageable", 1, lambda: device.copy_(pageable)),
            ("GPU to host, pageable", 1, lambda: pageable.copy_(device)),
        ]
    return [{"what": what, "gib_per_second": round(times * size / GIB / median_seconds(action), 2)} for what, times, action in rows]


def adams(elements: int) -> list[dict]:
    """Seconds of one step of Adam on the host, fp32."""
    rows = []
    kinds = {
        "DeepSpeedCPUAdam": lambda p: DeepSpeedCPUAdam(p, weight_decay=0.01),
        "torch AdamW, fused": lambda p: torch.optim.AdamW(p, fused=True),
        "torch AdamW, foreach": lambda p: torch.optim.AdamW(p, foreach=True),
        "torch AdamW, a loop": lambda p: torch.optim.AdamW(p, foreach=False),
    }
    for what, make in kinds.items():
        parameter = torch.randn(elements).requires_grad_()
        parameter.grad = torch.randn(elements)
        seconds = median_seconds(make([parameter]).step, 5)
        rate = 28 * elements / GIB / seconds
        rows.append({"what": what, "elements": elements, "seconds": round(seconds, 5), "gib_per_second": round(rate, 2)})
    return rows


def disk(folder: Path, size: int) -> list[dict]:
    """GiB/s through DeepSpeed's async_io, past the page cache (O_DIRECT), with its default block size and queue depth."""
    if not AsyncIOBuilder().is_compatible():
        return [{"what": "disk", "not_run": "no libaio"}]
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for threads in (1, 4):
        handle = AsyncIOBuilder().load().aio_handle(2**20, 8, False, True, threads)
        buffer, path = handle.new_cpu_locked_tensor(size, torch.empty(0, dtype=torch.uint8)), folder / "bench.swp"
        buffer.fill_(7)
        for what, action in (("write", handle.sync_pwrite), ("read", handle.sync_pread)):
            seconds = median_seconds(lambda: action(buffer, str(path), 0), 3)
            rows.append({"what": f"{what}, {threads} threads", "gib_per_second": round(size / GIB / seconds, 2)})
        handle.free_cpu_locked_tensor(buffer)
        path.unlink()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--disk", type=Path, default=Path("runs/bench-disk"), help="a folder on the disk to measure")
    parser.add_argument("--gib", type=float, default=1, help="size of a copy and of the file")
    parser.add_argument("--elements", type=int, default=100_000_000, help="parameters of the step of Adam")
    options = parser.parse_args()
    size = int(options.gib * GIB) // 4096 * 4096  # the disk is read by pages
    found = {
        "what": __doc__.splitlines()[0],
        "command": f"python bench/host.py --gib {options.gib:g} --elements {options.elements}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware.describe(),
        "versions": hardware.versions(),
        "commit": hardware.commit(),
        "gib": options.gib,
        "threads": torch.get_num_threads(),
        "copies": copies(size),
        "adam": adams(options.elements),
        "disk": disk(options.disk, size),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    for row in [*found["copies"], *found["adam"], *found["disk"]]:
        print(row)


if __name__ == "__main__":
    main()
