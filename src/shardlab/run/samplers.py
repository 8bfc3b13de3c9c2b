"""Memory in use, sampled while a run goes on: a line per device and interval in the run folder's `memory.csv`."""

from __future__ import annotations

import csv
import os
import threading
import time
from pathlib import Path

from shardlab.zero.memory_model import MIB

# --- sampling -------------------------------------------------------------------------------------------------------

COLUMNS = ["seconds", "device", "used_bytes"]


class MemorySampler:
    """Writes the memory in use to a CSV file, a line per device and interval, until it is stopped.

    Devices are `gpu0`, `gpu1`, … (the whole card, through NVML, so other processes on it count too) and `rank0`,
    `rank1`, … (resident host memory of that rank's process, through psutil). Every rank samples for itself and appends
    whole lines to the same file; the local rank's own GPU is sampled by it.

    Args:
        path: the file; its header is written by `write_header`.
        rank: the global rank, for the device's name.
        local_rank: which GPU of this node is sampled; `None` samples none.
        interval: seconds between samples.
    """

    def __init__(self, path: Path, rank: int = 0, local_rank: int | None = None, interval: float = 0.1):
        self.path, self.rank, self.local_rank, self.interval = Path(path), rank, local_rank, interval
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @staticmethod
    def write_header(path: Path) -> None:
        Path(path).write_text(",".join(COLUMNS) + "\n")

    def __enter__(self) -> MemorySampler:
        self._started = time.monotonic()
        self._read = self._readers()
        self._sample()
        self._thread = threading.Thread(target=self._loop, name="memory-sampler", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _readers(self) -> dict:
        import psutil

        process = psutil.Process()
        readers = {f"rank{self.rank}": lambda: process.memory_info().rss}
        if self.local_rank is not None:
            import pynvml

            from shardlab import hardware

            try:
                handle = hardware.nvml_handles()[self.local_rank]
                readers[f"gpu{self.rank}"] = lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).used
                readers[f"gpu{self.rank}"]()
            except (pynvml.NVMLError, IndexError):  # in some containers NVML does not see the GPU that CUDA does
                readers.pop(f"gpu{self.rank}", None)
        return readers

    def _loop(self) -> None:
        while not self._stop.wait(self.interval):
            self._sample()

    def _sample(self) -> None:
        now = time.monotonic() - self._started
        lines = "".join(f"{now:.2f},{device},{read()}\n" for device, read in self._read.items())
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, lines.encode())
        finally:
            os.close(descriptor)


def read_samples(path: Path) -> dict[str, list[tuple[float, int]]]:
    """`memory.csv` by device: lists of (seconds, bytes). A last line cut short by a kill is left out."""
    samples: dict[str, list[tuple[float, int]]] = {}
    # Cut short, a number is still a number; a line is whole once its newline is there.
    whole = [line for line in Path(path).read_text().splitlines(keepends=True) if line.endswith("\n")]
    for row in csv.DictReader(whole):
        samples.setdefault(row["device"], []).append((float(row["seconds"]), int(row["used_bytes"])))
    return samples


def summarise_samples(path: Path) -> dict[str, dict[str, float]]:
    """Peak, mean and minimum by device, in MiB."""
    return {
        device: {"peak": max(used) / MIB, "mean": sum(used) / len(used) / MIB, "minimum": min(used) / MIB}
        for device, rows in read_samples(path).items()
        for used in [[row[1] for row in rows]]
    }
