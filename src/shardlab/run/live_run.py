"""A run while it goes on, read from its folder: what a display shows of it."""

from __future__ import annotations

import json
import time

from shardlab.progress import Row
from shardlab.run.run_folder import Run


class LiveRun:
    """Reads what the ranks have written since the last time.

    Args:
        run: the run, whose folder is there.
    """

    def __init__(self, run: Run):
        self.run, self._metrics, self._position = run, [], 0

    def refresh(self) -> None:
        path = self.run.folder / "metrics.jsonl"
        if not path.exists():
            return
        with open(path) as file:
            if path.stat().st_size < self._position:  # a run that was started again begins with fewer lines than it had
                self._metrics, self._position = [], 0
            file.seek(self._position)
            for line in iter(file.readline, ""):
                if not line.endswith("\n"):
                    break
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
            "loss": f"{last['loss']:.3f}" if last else "",
            "samples/s": f"{last['samples_per_second']:.1f}" if last else "",
        }
        return Row(experiment.method, outcome, facts, done, total, over)
