"""How busy each GPU of a machine is, and how full: a line per GPU and second, in usage.csv of the output folder."""

from __future__ import annotations

import statistics
import threading
import time
from pathlib import Path

import torch


class Usage:
    """Within `with Usage(path):` a thread asks the driver each second. Without a GPU, or where the driver does not say, nothing is
    written.

    Args:
        path: the file; a new run begins a new one.
    """

    def __init__(self, path: Path):
        self.path, self.over, self.rows = path, threading.Event(), []

    def __enter__(self):
        self.thread = threading.Thread(target=self._watch, daemon=True)
        if torch.cuda.is_available():
            self.thread.start()
        return self

    def __exit__(self, *error):
        self.over.set()
        if self.thread.is_alive():
            self.thread.join()

    def _watch(self) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
            self._write(pynvml)
        except Exception as error:  # a part of a GPU (MIG) does not say how busy it is, and training goes on without
            print(f"{self.path.name} is not written: {error}", flush=True)

    def _write(self, pynvml) -> None:
        started = time.perf_counter()
        devices = [pynvml.nvmlDeviceGetHandleByIndex(n) for n in range(pynvml.nvmlDeviceGetCount())]
        with open(self.path, "w") as file:
            file.write("seconds,gpu,percent_busy,bytes_used\n")
            while not self.over.wait(1):
                for number, device in enumerate(devices):
                    busy = pynvml.nvmlDeviceGetUtilizationRates(device).gpu
                    used = pynvml.nvmlDeviceGetMemoryInfo(device).used
                    self.rows.append((number, busy, used))
                    file.write(f"{time.perf_counter() - started:.1f},{number},{busy},{used}\n")
                file.flush()

    def summary(self, first: int = 0) -> list[dict]:
        """For each GPU the median of how busy it was, in percent, and the most bytes; empty without a GPU.

        Args:
            first: the number of the first of `rows` that counts.
        """
        found = []
        for number in sorted({row[0] for row in self.rows[first:]}):
            rows = [row for row in self.rows[first:] if row[0] == number]
            busy = statistics.median(row[1] for row in rows)
            found.append({"gpu": number, "percent_busy": busy, "peak_bytes": max(row[2] for row in rows)})
        return found
