"""How long does a class take to grade, and does it come out right? A hundred submissions to lab 02, of all kinds that tests know.

    python bench/grading.py --count 100 --out class.json

It grades them with `shardlab grade`, kills the batch in the middle, starts it again, and compares the gradebook with that of a
batch that nobody disturbed. Then it grades complete submissions alone, for the number a minute. The submissions are hostile:
without bubblewrap it refuses.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from shardlab import hardware
from shardlab.hardware import ROOT
from shardlab.sandbox import boxes

sys.path.insert(0, str(ROOT / "tests"))
import submission_kinds as made


def command(folder: Path, out: Path, jobs: int) -> list[str]:
    words = ["grade", str(folder), "--out", str(out), "--labs", "2", "--jobs", str(jobs), "--timeout", "300"]
    return [sys.executable, "-m", "shardlab.cli", *words]


def graded(out: Path) -> int:
    return len(list((out / "results").glob("[!.]*.json")))


def rows(out: Path) -> list[list[str]]:
    """The gradebook, without what a time limit makes differ: seconds in a note."""
    with open(out / "gradebook.csv", newline="") as file:
        return [[re.sub(r"\d+ s\b", "… s", cell) for cell in row] for row in csv.reader(file)]


def left(before: set[int]) -> list[str]:
    """Command lines of processes that were not there before, without the kernel's."""
    found = []
    for process in psutil.process_iter(["pid", "ppid", "cmdline"]):
        if process.pid not in before and process.info["ppid"] != 2 and process.info["cmdline"]:
            found.append(" ".join(process.info["cmdline"])[:100])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="submissions")
    parser.add_argument("--jobs", type=int, default=2, help="at a time")
    parser.add_argument("--complete", type=int, default=20, help="complete submissions for the number a minute")
    parser.add_argument("--out", type=Path, help="a JSON file for the result; printed as well")
    given = parser.parse_args()
    kind, why = boxes.isolation()
    if kind != "bubblewrap":
        print(f"not run: these submissions do harm, and {why}", file=sys.stderr)
        return 1
    result: dict = {
        "command": sys.argv,
        "hardware": hardware.describe(),
        "versions": hardware.versions(),
        "commit": hardware.commit(),
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder, expected = Path(temporary, "class"), {}
        for number in range(given.count):
            one = made.KINDS[number % len(made.KINDS)]
            expected |= made.make(folder / "parts" / str(number), [one])
            (made_at,) = (folder / "parts" / str(number)).iterdir()
            name = f"{number:03d} {made_at.name}"
            made_at.rename(folder / name)
        for part in (folder / "parts").iterdir():
            part.rmdir()
        (folder / "parts").rmdir()
        before = {process.pid for process in psutil.process_iter()}

        started = time.monotonic()
        subprocess.run(command(folder, Path(temporary, "whole"), given.jobs), check=True)
        result["seconds"] = round(time.monotonic() - started, 1)
        result["submissions a minute, all kinds"] = round(60 * given.count / result["seconds"], 1)

        process = subprocess.Popen(command(folder, Path(temporary, "killed"), given.jobs), stdout=subprocess.DEVNULL)
        while graded(Path(temporary, "killed")) < given.count // 2:
            time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        result["graded when it was killed"] = graded(Path(temporary, "killed"))
        subprocess.run(command(folder, Path(temporary, "killed"), given.jobs), check=True, stdout=subprocess.DEVNULL)
        books = rows(Path(temporary, "whole")), rows(Path(temporary, "killed"))
        result["rows"] = len(books[0]) - 1
        result["same gradebook"] = books[0] == books[1]
        wrong = []
        for row in books[0][1:]:
            one = made.KINDS[int(row[0].lstrip("'")[:3]) % len(made.KINDS)]
            if tuple(t for t, cell in zip(made.TASKS, row[3:]) if cell not in ("0", "not run", "")) != one.passes:
                wrong.append(row)
        result["rows that are not what their kind earns"] = wrong

        for number in range(given.complete):
            made.package(Path(temporary, "complete", str(number)), made.solution())
        words = command(Path(temporary, "complete"), Path(temporary, "complete-out"), given.jobs)
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        times = sorted((path.stat().st_mtime) for path in Path(temporary, "complete-out", "results").glob("*.json"))
        rest = times[given.jobs :]  # the judges start, and the runs without anybody's code are made, for the first
        result["complete submissions a minute"] = round(60 * (len(rest) - 1) / (rest[-1] - rest[0]), 1)
        time.sleep(2)
        result["processes left"] = left(before)
        result["left in the temporary folder"] = [p for p in os.listdir(tempfile.gettempdir()) if p.startswith("shardlab-box")]
    text = json.dumps(result, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
