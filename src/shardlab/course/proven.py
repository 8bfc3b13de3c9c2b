"""What has been proven of each task, and of which code: `solutions/<lab>/proven.json`.

Every wrong answer against every milestone takes longer than the rest of the tests together, and its result changes only with the
task. So `shardlab matrix --record` notes it with a digest of the task's solution, its milestones and what they start; the tests
look at one wrong answer of each task, and at all of a task whose digest is no longer that of the record. The library is not in the
digest: what a change of it does to a verdict shows in the solutions, in the one wrong answer, and in the whole matrix.
"""

from __future__ import annotations

import ast
import hashlib
import json

from shardlab.labs import named
from shardlab.milestones.markers import files_of
from shardlab.milestones.scoreboard import task_order

MUTANTS, SMALL_CHANGES = "mutants", "small changes"


def task_of_lines(source: str) -> dict[int, str]:
    """The task that a line of a solution belongs to, by the line's number; lines outside of tasks are left out."""
    tasks, current = {}, ""
    for number, line in enumerate(source.splitlines(), 1):
        if line.strip().startswith("# BEGIN SOLUTION"):
            current = line.split()[-1]
        elif line.strip().startswith("# END SOLUTION"):
            current = ""
        elif current:
            tasks[number] = current
    return tasks


def _milestones_of(stem: str, task: str) -> tuple[list[ast.FunctionDef], list[ast.stmt]]:
    """The milestones of a task, and what else stands in their files."""
    tests, rest = [], []
    for path in files_of(stem):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            marker = [d for d in getattr(node, "decorator_list", []) if "milestone" in ast.unparse(d)]
            if not marker:
                rest.append(node)
            elif f"task='{task}'" in ast.unparse(marker[0]):
                tests.append(node)
    return tests, rest


def _said(node) -> str:
    """Code without its layout. (`ast.unparse` writes f-strings otherwise since Python 3.12, and a record is for all versions.)"""
    if isinstance(node, ast.AST):
        fields = {
            name: value for name, value in ast.iter_fields(node) if value not in (None, []) and name not in ("kind", "type_comment")
        }
        return f"{type(node).__name__}({', '.join(f'{name}={_said(value)}' for name, value in fields.items())})"
    return f"[{', '.join(map(_said, node))}]" if isinstance(node, list) else repr(node)


def starts_something(stem: str, task: str) -> bool:
    """Whether a task's milestones start ranks or jobs, or call programs."""
    slow = {"run_experiments", "slurm_beside_exercises"}
    return any(
        slow & {argument.arg for argument in test.args.args} or "observe" in ast.unparse(test)
        for test in _milestones_of(stem, task)[0]
    )


def digest(stem: str, task: str, *more: str) -> str:
    """Of a task's solution and its milestones, with what they share and start: it changes where a verdict may.

    Args:
        more: what else the verdicts hang on, such as the wrong answers.
    """
    lab = named(stem)
    solution = lab.solution.read_text(encoding="utf-8")
    tasks = task_of_lines(solution)
    own = [line for number, line in enumerate(solution.splitlines(), 1) if tasks.get(number) == task]
    tests, rest = _milestones_of(stem, task)
    started = []
    if starts_something(stem, task):
        beside = sorted(set(lab.folder.glob("*.py")) - set(files_of(stem)) - {lab.folder / "skeleton.py"})
        started = [ast.parse(path.read_text(encoding="utf-8")) for path in beside]
    parts = [*own, *(_said(node) for node in (*tests, *rest, *started)), *more]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def recorded(stem: str, what: str) -> dict[str, dict]:
    """The record of `MUTANTS` or `SMALL_CHANGES` by task: each with the digest of what it was made of."""
    entries = _read(stem)
    return {task: entry[what] for task, entry in entries.items() if what in entry}


def record(stem: str, task: str, what: str, entry: dict) -> None:
    """Note what was proven of a task; what else is known of it, and of other tasks, stays."""
    entries = _read(stem)
    entries[task] = dict(sorted((entries.get(task, {}) | {what: entry}).items()))
    ordered = dict(sorted(entries.items(), key=lambda item: task_order(item[0])))
    path = named(stem).answers / "proven.json"
    path.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _read(stem: str) -> dict[str, dict]:
    path = named(stem).answers / "proven.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
