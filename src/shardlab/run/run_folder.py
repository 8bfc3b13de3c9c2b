"""The run folder: what comes back from an experiment.

A run folder is all that remains of a run, and all that tables, plots, milestones and grading read:

    run.json        the experiment, versions, hardware, commit, outcome and results
    metrics.jsonl   a line an optimizer step: step, loss, learning rate, seconds, samples/s, tokens/s
    memory.csv      memory in use, sampled, per device; on several nodes a file each, memory.<host>.csv
    states.json     bytes of parameters, gradients and optimizer states that each rank held
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from pathlib import Path

from pydantic import ValidationError

from shardlab import hardware
from shardlab.errors import CourseError
from shardlab.run.experiment import Experiment

FORMAT = 1


class RunError(CourseError, ValueError):
    """A run folder that cannot be read or written; the message names the folder and the reason."""


class Run:
    """One run folder. `Run.create` starts one, `Run.read` opens one."""

    def __init__(self, folder: Path, record: dict):
        self.folder, self._record = Path(folder), record

    # --- writing ----------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, experiment: Experiment, runs: Path | str = "runs", device: str | None = None) -> Run:
        """Make `runs/<name>/` with a record that says *waiting*.

        A finished or dead run of that name goes to `runs/.before/<name>/`. It stays there until the new run has taken its first
        step, so that one which fails before destroys nothing; with checkpoints it stays longer, until it is replaced in its turn.

        Args:
            experiment: what will run.
            runs: the folder in which the run gets its own.
            device: `cuda` or `cpu`, what its ranks compute on; by default what this process does.

        Raises:
            RunError: the folder is something else than a run, or a run that is still going on.
        """
        folder = Path(runs) / experiment.name
        if folder.exists():
            if not (folder / "run.json").exists():
                if not folder.is_dir() or any(folder.iterdir()):
                    raise RunError(f"{folder} exists and is not a run folder, so it is not replaced. Use another name.")
            elif cls._is_going_on(folder):
                raise RunError(f"{folder} is being written by a run that is still going on. Use another name, or end it.")
            _set_aside(folder)
        folder.mkdir(parents=True)
        run = cls(
            folder,
            {
                "format": FORMAT,
                "experiment": experiment.model_dump(),
                "outcome": "waiting",
                "versions": hardware.versions(),
                "hardware": hardware.describe(device),
                "commit": hardware.commit(),
                "created": _now(),
                "writer": _this_process(),
            },
        )
        run._write()
        return run

    @classmethod
    def reopen(cls, experiment: Experiment, runs: Path | str = "runs") -> Run:
        """Continue `runs/<name>/`: what it holds stays, and its record gets a line on how it ended before.

        A scheduler that starts a job again knows that the job's first life is over; nobody else may call this, since two
        processes would write one folder.

        Raises:
            RunError: the folder holds another experiment.
        """
        run = cls.read(Path(runs) / experiment.name)
        if run.experiment != experiment:
            kept, asked = run.experiment.model_dump(), experiment.model_dump()
            differ = ", ".join(f"{key} {kept[key]!r} → {asked[key]!r}" for key in asked if kept[key] != asked[key])
            raise RunError(f"{run.folder} holds another experiment ({differ}), so it is not continued. Use another name.")
        before = {key: run._record.pop(key, None) for key in ("outcome", "reason", "ended")}
        run._record.setdefault("earlier", []).append(before | {"steps": len(run.metrics()), "hardware": run._record["hardware"]})
        run._record |= {"outcome": "waiting", "hardware": hardware.describe(), "writer": _this_process()}
        run._write()
        return run

    def keep_steps(self, last: int) -> None:
        """Drop the lines of steps after `last`: training goes on from a checkpoint, and takes them again."""
        rows = [row for row in self.metrics() if row["step"] <= last]
        temporary = self.folder / ".metrics.jsonl"
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(temporary, self.folder / "metrics.jsonl")

    @classmethod
    def _is_going_on(cls, folder: Path) -> bool:
        try:
            return cls.read(folder).outcome in ("waiting", "running")
        except RunError:
            return False

    def start(self) -> None:
        """Called by rank 0 when it begins."""
        (self.folder / "metrics.jsonl").touch()
        self._record |= {"outcome": "running", "started": _now()}
        self._write()

    def log_step(self, **values) -> None:
        """Append a line to `metrics.jsonl`."""
        path = self.folder / "metrics.jsonl"
        if not path.exists() or path.stat().st_size == 0:
            before = before_it(self.folder)
            if before.exists() and not (before / "checkpoints").exists():
                shutil.rmtree(before, ignore_errors=True)
        with open(path, "a") as file:
            file.write(json.dumps(values) + "\n")

    def doing(self, what: str = "") -> None:
        """Say what goes on between steps, for whoever watches; nothing, and the steps speak for themselves."""
        self._record["doing"] = [what, time.time()]
        self._write()

    def record(self, **results) -> None:
        """Add results to `run.json`."""
        self._record.setdefault("results", {}).update(results)
        self._write()

    def write_states(self, states: dict) -> None:
        """`states`: {"parameters": Ψ, "groups": sizes by optimizer group, "ranks": [bytes by kind, a rank each]}."""
        write_json(self.folder / "states.json", states)

    def finish(self, outcome: str = "finished", reason: str | None = None) -> None:
        """Set the outcome: `finished`, `stopped` (asked to, after saving), `failed`, `killed`, `interrupted` or `timed out`."""
        self._record.pop("doing", None)
        self._record |= {"outcome": outcome, "ended": _now()} | ({"reason": reason} if reason else {})
        self._write()

    def confirm(self, results: dict) -> None:
        """Put the results that rank 0 handed to the launcher in the place of what the folder says: any rank could write there."""
        results = json.loads(json.dumps(results))
        if self._record.get("results", {}) != results or self._record["outcome"] not in ("finished", "stopped"):
            self._record |= {"results": results, "outcome": "finished"}
            self._write()

    def _write(self) -> None:
        write_json(self.folder / "run.json", self._record)

    # --- reading ----------------------------------------------------------------------------------------------------

    @classmethod
    def read(cls, folder: Path | str) -> Run:
        """Open a run folder.

        Raises:
            RunError: there is none, it is damaged, or another version of shardlab wrote it.
        """
        path = Path(folder) / "run.json"
        try:
            record = json.loads(path.read_text())
        except FileNotFoundError:
            raise RunError(f"{folder} is not a run folder: it has no run.json.") from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise RunError(f"{path} is damaged ({error}). Run the experiment again.") from None
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            found = record.get("format") if isinstance(record, dict) else None
            raise RunError(
                f"{path} has format {found!r}; this shardlab reads format {FORMAT}. "
                "Read it with the version that wrote it, or run the experiment again."
            )
        try:
            Experiment(**record["experiment"])
        except (KeyError, TypeError, ValidationError) as error:
            raise RunError(f"{path} holds no valid experiment: {error}") from None
        absent = [key for key in ("outcome", "created") if not isinstance(record.get(key), str)]
        if absent:
            raise RunError(f"{path} is damaged (no {' and no '.join(absent)}). Run the experiment again.")
        return cls(Path(folder), record)

    @property
    def experiment(self) -> Experiment:
        return Experiment(**self._record["experiment"])

    @property
    def name(self) -> str:
        return self.experiment.name

    @property
    def outcome(self) -> str:
        """`finished`, or how it ended instead. A record that says *running* but whose writer is gone says `killed`."""
        outcome = self._record["outcome"]
        if outcome in ("waiting", "running") and not _is_alive(self._record.get("writer", {})):
            return "killed"
        return outcome

    @property
    def reason(self) -> str | None:
        """Why a run did not finish."""
        if self.outcome == "killed" and "reason" not in self._record:
            return f"the process that wrote it ended without a word after {len(self.metrics())} steps"
        return self._record.get("reason")

    @property
    def results(self) -> dict:
        return self._record.get("results", {})

    @property
    def record_json(self) -> dict:
        """All of `run.json`."""
        return self._record

    def metrics(self) -> list[dict]:
        """The lines of `metrics.jsonl`. A last line cut short by a kill is left out."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        rows = []
        for line in lines:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def losses(self) -> list[float]:
        """The training loss of every optimizer step."""
        return [row["loss"] for row in self.metrics()]

    def memory(self) -> dict[str, dict[str, float]]:
        """Peak, mean and minimum by device in MiB; empty if nothing was sampled."""
        from shardlab.run.samplers import summarise_samples

        return {device: row for path in sorted(self.folder.glob("memory*.csv")) for device, row in summarise_samples(path).items()}

    def states(self) -> dict | None:
        """What each rank held; `None` if the run did not come so far."""
        path = self.folder / "states.json"
        return json.loads(path.read_text()) if path.exists() else None

    def samples_per_second(self) -> float | None:
        """Sequences a second over all ranks, by the median optimizer step; the first step warms up and is left out."""
        return _median([row["samples_per_second"] for row in self.metrics()[1:]])

    def __repr__(self) -> str:
        return f"<Run {self.folder}: {self.outcome}>"


def before_it(folder: Path) -> Path:
    """Where the run that a run folder has replaced lies, while it is kept."""
    return folder.parent / ".before" / folder.name


def _set_aside(folder: Path) -> None:
    """Make room for a new run. What has no step is worth less than what it has replaced itself."""
    before, metrics = before_it(folder), folder / "metrics.jsonl"
    if before.exists() and not (metrics.exists() and metrics.stat().st_size):
        shutil.rmtree(folder)
        return
    shutil.rmtree(before, ignore_errors=True)
    before.parent.mkdir(exist_ok=True)
    folder.rename(before)


def read_runs(folder: Path | str = "runs") -> list[Run]:
    """All runs below a folder, oldest first; folders of other versions are refused, others passed over."""
    runs = [Run.read(path.parent) for path in sorted(Path(folder).glob("*/run.json"))]
    return sorted(runs, key=lambda run: run.record_json["created"])


def _median(values: list[float]) -> float | None:
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _this_process() -> dict:
    import psutil

    return {"host": socket.gethostname(), "pid": os.getpid(), "process_started": psutil.Process().create_time()}


def _is_alive(writer: dict) -> bool:
    """Whether the process that wrote the record still runs. A process on another host is taken to."""
    import psutil

    if writer.get("host") != socket.gethostname():
        return bool(writer)
    try:
        process = psutil.Process(writer["pid"])
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - writer["process_started"]) < 1
    except (psutil.Error, KeyError):
        return False


def write_json(path: Path, value) -> None:
    """Write a file whole or not at all, so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)
