"""What an instructor reads and hands back: gradebook, feedback pages, an overview of the class, an import for Moodle.

Everything is made from the results alone, so that it can be made again at any time.
"""

from __future__ import annotations

import collections
import csv
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path

from shardlab.grading.scoreboard import VERDICTS, task_order
from shardlab.grading.submissions import file_name

TEMPLATES = Path(__file__).resolve().parents[1] / "templates"


@dataclass(frozen=True)
class TaskGrade:
    """One task of one submission.

    Attributes:
        verdict: that of its first milestone that has not passed, the learner's own milestones before the hidden ones.
        earned: points; none where one of its milestones, hidden ones included, has not passed.
    """

    lab: str
    task: str
    verdict: str
    earned: int
    points: int


def tasks_of(result: dict) -> list[TaskGrade]:
    """A result by task, in their order."""
    by_task: dict[tuple[str, str], list[dict]] = {}
    for milestone in result["milestones"]:
        by_task.setdefault((milestone["lab"], milestone["task"]), []).append(milestone)
    grades = []
    for (lab, task), mine in sorted(by_task.items(), key=lambda entry: task_order(entry[0][1])):
        open_ = [m for m in sorted(mine, key=lambda m: m["hidden"]) if m["verdict"] != "passed"]
        earned = 0 if any(m["hidden"] for m in open_) else sum(m["points"] for m in mine if m["verdict"] == "passed")
        grades.append(TaskGrade(lab, task, open_[0]["verdict"] if open_ else "passed", earned, sum(m["points"] for m in mine)))
    return grades


def write(out: Path, results: dict[str, dict], waiting: list[str] = ()) -> Path:
    """Write everything into `out`; the path of the gradebook.

    Args:
        out: the output folder.
        results: by the submissions' names.
        waiting: the names of those that are not graded yet.
    """
    rows = [results[name] for name in sorted(results, key=str.casefold)]
    _write(out / "gradebook.csv", gradebook_csv(rows, waiting))
    _write(out / "gradebook.json", json.dumps(gradebook_json(rows, waiting), indent=1, ensure_ascii=False) + "\n")
    _write(out / "moodle.csv", moodle_csv(rows))
    pages = out / "feedback"
    pages.mkdir(exist_ok=True)
    template = _template("feedback.html")
    for result in rows:
        _write(pages / f"{file_name(result['name'])}.html", template.render(**_for_feedback(result)))
    _write(out / "overview.html", _template("overview.html").render(**_for_overview(rows, waiting)))
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
    """A row a submission, a column a task. A task that did not run says so instead of a number."""
    tasks, text = all_tasks(rows), io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["submission", "points", "of", *tasks, "state", "isolation", "notes"])
    for row in rows:
        grades = {grade.task: grade for grade in tasks_of(row)}
        cells = [("not run" if g.verdict == "not run" else g.earned) if (g := grades.get(task)) else "" for task in tasks]
        earned, points = sum(g.earned for g in grades.values()), sum(g.points for g in grades.values())
        notes = _plain("; ".join(row["notes"]))
        writer.writerow([_plain(row["name"]), earned, points, *cells, _plain(state(row)), row["isolation"][0], notes])
    for name in waiting:
        writer.writerow([_plain(name), "", "", *("" for _ in tasks), "not graded yet", "", ""])
    return text.getvalue()


def state(row: dict) -> str:
    return row["error"] or "graded"


def gradebook_json(rows: list[dict], waiting: list[str] = ()) -> dict:
    """Everything, for programs."""
    entries = []
    for row in rows:
        tasks = [vars(grade) for grade in tasks_of(row)]
        total = {"earned": sum(t["earned"] for t in tasks), "points": sum(t["points"] for t in tasks)}
        entries.append({"submission": row["name"]} | total | {"tasks": tasks, "state": state(row)} | row)
    return {"submissions": entries, "not graded yet": list(waiting)}


def moodle_csv(rows: list[dict]) -> str:
    """Moodle's import of grades: who, and a column a lab."""
    labs = sorted({lab for row in rows for lab in row["labs"]})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["username", *labs, "total"])
    for row in rows:
        points = [sum(g.earned for g in tasks_of(row) if g.lab == lab) for lab in labs]
        writer.writerow([_plain(row["name"]), *points, sum(points)])
    return text.getvalue()


# --- pages ------------------------------------------------------------------------------------------------------------


def _template(name: str):
    import jinja2

    loader = jinja2.FileSystemLoader(TEMPLATES)
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined).get_template(name)


def title_of(name: str) -> str:
    """A test's name as words."""
    return name.removeprefix("test_").replace("_", " ")


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
    return {"earned": sum(grade.earned for grade in grades), "points": sum(grade.points for grade in grades)}


def _for_overview(rows: list[dict], waiting: list[str]) -> dict:
    tasks = []
    for task in all_tasks(rows):
        mine = [(row, grade) for row in rows for grade in tasks_of(row) if grade.task == task]
        counts = collections.Counter(grade.verdict for _, grade in mine)
        likely = collections.Counter(
            line.removeprefix("likely").strip()
            for row, _ in mine
            for m in row["milestones"]
            if m["task"] == task and m["verdict"] == "failed" and not m["hidden"]
            for line in m["message"].splitlines()
            if line.startswith("likely")
        )
        shares = {verdict: 100 * counts[verdict] / len(mine) for verdict in VERDICTS}
        tasks.append({"task": task, "counts": counts, "shares": shares, "likely": likely.most_common(2)})
    tasks_by_failures = sorted(tasks, key=lambda t: -(t["counts"]["failed"] + t["counts"]["not implemented"]))
    learners = []
    for row in rows:
        totals = _totals(tasks_of(row))
        learners.append({"name": row["name"], "page": f"feedback/{file_name(row['name'])}.html", "state": state(row)} | totals)
    kinds = collections.Counter(tuple(row["isolation"]) for row in rows)
    return {"tasks": tasks_by_failures, "learners": learners, "waiting": waiting, "isolation": kinds, "verdicts": VERDICTS}
