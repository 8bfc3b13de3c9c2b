"""What an instructor reads and hands back: gradebook, feedback pages, an overview of the class, imports for Moodle.

Everything is made from the results and from `by_hand.csv` alone, so that it can be made again at any time.
"""

from __future__ import annotations

import collections
import csv
import io
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from shardlab.errors import UsageError
from shardlab.grading.submissions import file_name
from shardlab.milestones.agreement import SEED
from shardlab.milestones.scoreboard import VERDICTS, task_order, title_of
from shardlab.pages import page

BY_HAND = "by_hand.csv"
"""In the output folder: points that an instructor gives, which no regrading changes."""
BY_HAND_COLUMNS = ["submission", "task", "points", "why"]


@dataclass(frozen=True)
class TaskGrade:
    """One task of one submission.

    Attributes:
        verdict: that of its first milestone that has not passed, the learner's own milestones before the hidden ones.
        earned: points; none where one of its milestones, hidden ones included, has not passed.
        by_hand: why the instructor gave these points; empty where the milestones did.
    """

    lab: str
    task: str
    verdict: str
    earned: float
    points: int
    by_hand: str = ""

    @property
    def open(self) -> bool:
        """Whether nothing is known of the task: it could not run here, and nobody has graded it by hand."""
        return self.verdict == "not run" and not self.by_hand


def tasks_of(result: dict) -> list[TaskGrade]:
    """A result by task, in their order."""
    by_task: dict[tuple[str, str], list[dict]] = {}
    for milestone in result["milestones"]:
        by_task.setdefault((milestone["lab"], milestone["task"]), []).append(milestone)
    grades = []
    for (lab, task), mine in sorted(by_task.items(), key=lambda entry: task_order(entry[0][1])):
        open_ = [m for m in sorted(mine, key=lambda m: m["hidden"]) if m["verdict"] != "passed"]
        earned = 0 if any(m["hidden"] for m in open_) else sum(m["points"] for m in mine if m["verdict"] == "passed")
        given, why = result.get("by_hand", {}).get(task, (earned, ""))
        verdict = open_[0]["verdict"] if open_ else "passed"
        grades.append(TaskGrade(lab, task, verdict, given, sum(m["points"] for m in mine), why))
    return grades


def summary(result: dict) -> str:
    """One line on a result."""
    grades = tasks_of(result)
    points = f"{sum(grade.earned for grade in grades)}/{sum(grade.points for grade in grades)}"
    return f"{result['name']}: {points}, {result['seconds']:.1f} s" + (f"; {result['error']}" if result["error"] else "")


def given_by_hand(out: Path, results: dict[str, dict]) -> dict[str, dict[str, tuple[float, str]]]:
    """What `by_hand.csv` says: for each submission the points of some tasks, and why.

    Raises:
        ValueError: a line that names no submission, no task, or points that the task does not have.
    """
    path, given = out / BY_HAND, collections.defaultdict(dict)
    if not path.exists():
        return given
    with open(path, newline="", encoding="utf-8-sig") as file:
        lines = csv.DictReader(file)
        if lines.fieldnames != BY_HAND_COLUMNS:
            raise UsageError(
                f"{path}: its first line is {','.join(lines.fieldnames or [])}; it must be {','.join(BY_HAND_COLUMNS)}"
            )
        for number, line in enumerate(lines, 2):
            name, task = line["submission"], line["task"]
            if name not in results:
                raise UsageError(
                    f"{path}, line {number}: there is no submission {name!r} in {out}. Copy its name from gradebook.csv."
                )
            known = {grade.task: grade for grade in tasks_of(results[name])}
            if task not in known:
                raise UsageError(f"{path}, line {number}: there is no task {task!r}; there are {', '.join(known)}.")
            try:
                points = float(line["points"])
            except (TypeError, ValueError):
                points = -1.0
            if not 0 <= points <= known[task].points:
                raise UsageError(
                    f"{path}, line {number}: task {task} has 0 to {known[task].points} points, not {line['points']!r}."
                )
            given[name][task] = (int(points) if points.is_integer() else points, line["why"] or "by hand")
    return given


def write(out: Path, results: dict[str, dict], waiting: list[str] = ()) -> Path:
    """Write everything into `out`; the path of the gradebook.

    Args:
        out: the output folder.
        results: by the submissions' names.
        waiting: the names of those that are not graded yet.

    Raises:
        ValueError: `by_hand.csv` is not as it must be.
    """
    given = given_by_hand(out, results)
    rows = [results[name] | {"by_hand": given.get(name, {})} for name in sorted(results, key=str.casefold)]
    _write(out / "gradebook.csv", gradebook_csv(rows, waiting))
    _write(out / "gradebook.json", json.dumps(gradebook_json(rows, waiting), indent=1, ensure_ascii=False) + "\n")
    _write(out / "moodle.csv", moodle_csv(rows))
    (out / "moodle-worksheet.csv").unlink(missing_ok=True)
    if worksheet := moodle_worksheet(rows):
        _write(out / "moodle-worksheet.csv", worksheet)
    pages = out / "feedback"
    pages.mkdir(exist_ok=True)
    for result in rows:
        _write(pages / f"{file_name(result['name'])}.html", page("feedback.html", **_for_feedback(result)))
    _write(out / "overview.html", page("overview.html", **_for_overview(rows, waiting)))
    return out / "gradebook.csv"


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8", errors="replace", newline="")
    os.replace(temporary, path)


def _plain(text: str) -> str:
    """A text that a spreadsheet shows and does not compute: names come from learners."""
    text = text.encode("utf-8", "replace").decode()
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def all_tasks(rows: list[dict]) -> list[str]:
    return sorted({grade.task for row in rows for grade in tasks_of(row)}, key=task_order)


def gradebook_csv(rows: list[dict], waiting: list[str] = ()) -> str:
    """A row per submission, a column per task. A task that did not run says so, and does not count into `of`."""
    tasks, text = all_tasks(rows), io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["submission", "points", "of", *tasks, "state", "isolation", "notes", "feedback"])
    for row in rows:
        grades = {grade.task: grade for grade in tasks_of(row)}
        cells = [("not run" if g.open else g.earned) if (g := grades.get(task)) else "" for task in tasks]
        total = _totals(list(grades.values()))
        by_hand = [f"{g.task} by hand: {g.by_hand}" for g in grades.values() if g.by_hand]
        last = [_plain(state(row)), row["isolation"][0], _plain("; ".join([*row["notes"], *by_hand])), page_of(row["name"])]
        writer.writerow([_plain(row["name"]), total["earned"], total["points"], *cells, *last])
    for name in waiting:
        writer.writerow([_plain(name), "", "", *("" for _ in tasks), "not graded yet", "", "", ""])
    return text.getvalue()


def page_of(name: str) -> str:
    """Where a submission's feedback lies in the output folder."""
    return f"feedback/{file_name(name)}.html"


def state(row: dict) -> str:
    return row["error"] or "graded"


def gradebook_json(rows: list[dict], waiting: list[str] = ()) -> dict:
    """Everything, for programs; and the seed of the inputs on which hidden milestones compared answers with the solution."""
    entries = []
    for row in rows:
        grades = tasks_of(row)
        entries.append(
            {"submission": row["name"]} | _totals(grades) | {"tasks": list(map(vars, grades)), "state": state(row)} | row
        )
    return {"seed": SEED, "submissions": entries, "not graded yet": list(waiting)}


def moodle_csv(rows: list[dict]) -> str:
    """Moodle's import of grades: who, and a column per lab. No number where a task did not run or a judge broke."""
    labs = sorted({lab for row in rows for lab in row["labs"]})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["username", *labs, "total"])
    for row in rows:
        writer.writerow([_plain(row["name"]), *(_points(row, lab) for lab in labs), _points(row)])
    return text.getvalue()


def _points(row: dict, lab: str | None = None) -> float | str:
    grades = [grade for grade in tasks_of(row) if lab in (None, grade.lab)]
    known = row["whole"] and not any(grade.open for grade in grades)
    return sum(grade.earned for grade in grades) if known else ""


def moodle_worksheet(rows: list[dict]) -> str:
    """Moodle's grading worksheet, where submissions lie as Moodle's *Download all submissions* names them; else nothing.

    Moodle finds people by the number in those names, "Participant 12345", and wants the columns Identifier, Grade and
    Last modified (grade).
    """
    found = [(re.fullmatch(r"(.+?)_(\d+)_assignsubmission_.+", row["name"]), row) for row in rows]
    if not any(match for match, _ in found):
        return ""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["Identifier", "Full name", "Grade", "Last modified (grade)"])
    for match, row in found:
        if match:
            writer.writerow([f"Participant {match[2]}", _plain(match[1]), _points(row), "-"])
    return text.getvalue()


# --- pages ------------------------------------------------------------------------------------------------------------


def _for_feedback(result: dict) -> dict:
    grades, labs = tasks_of(result), []
    for lab in result["labs"]:
        tasks = []
        for grade in (grade for grade in grades if grade.lab == lab):
            mine = sorted((m for m in result["milestones"] if m["task"] == grade.task), key=lambda m: m["hidden"])
            tasks.append({"grade": grade, "milestones": [m | {"title": title_of(m["name"])} for m in mine]})
        labs.append({"name": lab, "tasks": tasks, **_totals([t["grade"] for t in tasks])})
    return {"result": result, "labs": labs, **_totals(grades)}


def _totals(grades: list[TaskGrade]) -> dict:
    """What was earned, of the points of the tasks that were judged."""
    judged = [grade for grade in grades if not grade.open]
    return {"earned": sum(grade.earned for grade in judged), "points": sum(grade.points for grade in judged)}


def _cause(message: str) -> str:
    """Of a failure's message the line that tells it from others: the cause where it is known, else what was found."""
    lines = dict(reversed([line.split(maxsplit=1) for line in message.splitlines() if len(line.split(maxsplit=1)) == 2]))
    return next((lines[word][:120] for word in ("likely", "differs", "got") if word in lines), "")


def _for_overview(rows: list[dict], waiting: list[str]) -> dict:
    tasks = []
    for task in all_tasks(rows):
        mine = [(row, grade) for row in rows for grade in tasks_of(row) if grade.task == task]
        counts = collections.Counter(grade.verdict for _, grade in mine)
        found = collections.Counter(
            _cause(m["message"])
            for row, _ in mine
            for m in row["milestones"]
            if m["task"] == task and m["verdict"] == "failed" and not m["hidden"]
        )
        shares = {verdict: 100 * counts[verdict] / len(mine) for verdict in VERDICTS}
        tasks.append(
            {
                "task": task,
                "counts": counts,
                "shares": shares,
                "found": [(text, count) for text, count in found.most_common(3) if text][:2],
            }
        )
    tasks_by_failures = sorted(tasks, key=lambda t: -(t["counts"]["failed"] + t["counts"]["not implemented"]))
    learners = []
    for row in rows:
        totals = _totals(tasks_of(row))
        learners.append({"name": row["name"], "page": page_of(row["name"]), "state": state(row)} | totals)
    kinds = collections.Counter(tuple(row["isolation"]) for row in rows)
    return {"tasks": tasks_by_failures, "learners": learners, "waiting": waiting, "isolation": kinds, "verdicts": VERDICTS}
