"""A run while it goes on, read from its folder: what a display shows of it."""

from __future__ import annotations

import contextlib
import json
import os
import time

from shardlab.progress import Row
from shardlab.run.run_folder import Run


class LiveRun:
    """Reads what the ranks have written since the last time.

    Args:
        run: the run, whose folder is there.
    """

    def __init__(self, run: Run):
        self.run, self._metrics, self._position, self._file = run, [], 0, None

    def refresh(self) -> None:
        path = self.run.folder / "metrics.jsonl"
        if not path.exists():
            return
        with open(path) as file:
            found = os.fstat(file.fileno())
            if found.st_ino != self._file or found.st_size < self._position:
                # A run that was started again begins with another file, of the steps that it keeps.
                self._metrics, self._position, self._file = [], 0, found.st_ino
            file.seek(self._position)
            for line in iter(file.readline, ""):
                if not line.endswith("\n"):
                    break
                with contextlib.suppress(json.JSONDecodeError):  # a line that a kill has cut short, and the next life's behind it
                    self._metrics.append(json.loads(line))
                self._position = file.tell()

    def row(self) -> Row:
        """What is known now."""
        self.refresh()
        now = Run.read(self.run.folder)
        experiment, outcome = self.run.experiment, now.outcome
        doing, since = now.record_json.get("doing", ("", 0.0))
        last = self._metrics[-1] if self._metrics else {}
        done, total = last.get("step", 0), last.get("steps", experiment.steps)
        over = outcome not in ("waiting", "running")
        if outcome == "running":
            outcome = "starting" if not done else "evaluating" if done == total else "training"
            outcome = f"{doing}, {time.time() - since:.0f} s" if doing else outcome
        elif now.results.get("not_run"):
            outcome = "not run"  # the program has ended as it should, and says that it could not do this here
        facts = {
            "ranks": str(experiment.ranks),
            "loss": f"{last['loss']:.3f}" if "loss" in last else "",
            "samples/s": f"{last['samples_per_second']:.1f}" if "samples_per_second" in last else "",
        }
        return Row(experiment.method, outcome, facts, done, total, over)
