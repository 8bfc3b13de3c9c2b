"""Machine-made wrong answers: every small change to a solution, for milestones to catch.

A change replaces one stretch of the source, found by `ast`; everything else stays as it is, the marks of the tasks included.
What no milestone catches is a survivor: a gap in the milestones, or equivalent to the solution. Equivalents are listed with their
reason in `solutions/<lab>/equivalent.toml`. Milestones that start ranks take long; so what became of each task's changes is in the
record (proven.py), and a test says which have to be judged again.
"""

from __future__ import annotations

import ast
import collections
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shardlab.course import proven
from shardlab.course.matrix import package_with
from shardlab.errors import UsageError
from shardlab.labs import named
from shardlab.milestones.grade import grade
from shardlab.milestones.markers import files_of
from shardlab.milestones.scoreboard import Milestone

COMPARISONS = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.Div: ast.FloorDiv, ast.FloorDiv: ast.Div,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip
FUNCTIONS = {
    "min": "max", "max": "min", "any": "all", "all": "any", "ceil": "floor", "floor": "ceil", "round": "int", "sorted": "list",
}  # fmt: skip
METHODS = {"strip", "rstrip", "lstrip", "lower", "upper", "clone", "detach", "cpu", "copy", "splitlines", "resolve", "absolute"}
"""Methods whose call may have been forgotten."""


@dataclass(frozen=True)
class Change:
    """One small change: in `source[start:end]` stands `old`, and `new` takes its place."""

    task: str
    line: int
    start: int
    end: int
    old: str
    new: str

    @property
    def told(self) -> str:
        """What changes, in one line; where it is the same at several places of a task, the line tells them apart."""
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{old} → {new or 'nothing'}"

    def apply(self, source: str) -> str:
        return source[: self.start] + self.new + source[self.end :]


def changes(source: str) -> list[Change]:
    """Every small change within the solutions of a module, in the order of its lines.

    Args:
        source: of the solution, with its `# BEGIN SOLUTION` marks.
    """
    tree = ast.parse(source)
    offsets = [0]
    for line in source.encode().splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line))
    tasks = proven.task_of_lines(source)
    encoded, found = source.encode(), {}
    for node, new in _variants(tree):
        task = tasks.get(node.lineno, "")
        if not task or tasks.get(node.end_lineno) != task:
            continue
        start, end = offsets[node.lineno - 1] + node.col_offset, offsets[node.end_lineno - 1] + node.end_col_offset
        old, text = encoded[start:end].decode(), _as_text(new, node)
        changed = Change(task, node.lineno, len(encoded[:start].decode()), len(encoded[:end].decode()), old, text)
        if text != old and _compiles(changed.apply(source)):
            found.setdefault((changed.start, changed.end, text), changed)
    return sorted(found.values(), key=lambda change: (change.start, change.end))


def _as_text(new, node) -> str:
    if isinstance(new, str):
        return new
    text = ast.unparse(ast.fix_missing_locations(new))
    if isinstance(new, ast.stmt):
        return ("\n" + " " * node.col_offset).join(text.splitlines())
    # An operator may bind less tightly than what it stands in.
    return f"({text})" if isinstance(new, ast.BinOp | ast.BoolOp | ast.Compare | ast.UnaryOp | ast.IfExp) else text


def _compiles(source: str) -> bool:
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def _variants(tree: ast.AST) -> Iterator[tuple[ast.AST, ast.AST | str]]:
    """Nodes, each with what may stand in its place."""
    words = _only_said(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Compare(ops=[operator]) if type(operator) in COMPARISONS:
                yield node, ast.Compare(node.left, [COMPARISONS[type(operator)]()], node.comparators)
            case ast.BoolOp():
                yield node, ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
                for value in node.values:
                    yield node, _without(node.values, value, lambda rest: rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest))
            case ast.UnaryOp(op=ast.Not() | ast.USub()):
                yield node, node.operand
            case ast.BinOp() if type(node.op) in ARITHMETIC and not {node.left, node.right} & words:
                yield node, ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right)
            case ast.Constant(value=bool()):
                yield node, ast.Constant(not node.value)
            case ast.Constant(value=int() | float()):
                yield node, ast.Constant(node.value + 1)
                if node.value not in (0, 1):
                    yield node, ast.Constant(node.value - 1 if isinstance(node.value, int) else 0.0)
            case ast.Constant(value=str()) if node not in words and node.value:
                yield node, ast.Constant(node.value + "x")
            case ast.IfExp():
                yield node, ast.IfExp(node.test, node.orelse, node.body)
            case ast.If() | ast.While():
                yield node.test, ast.UnaryOp(ast.Not(), node.test)
            case ast.Call():
                yield from _calls(node)
            case ast.Dict(keys=[_, *_]):
                for key in node.keys:
                    kept = [(k, v) for k, v in zip(node.keys, node.values) if k is not key]
                    yield node, ast.Dict([k for k, _ in kept], [v for _, v in kept])
            case ast.Subscript(slice=ast.Slice() as cut):
                for part in ("lower", "upper"):
                    if getattr(cut, part):
                        yield cut, ast.Slice(**{**{key: getattr(cut, key) for key in ("lower", "upper", "step")}, part: None})
            case ast.comprehension(ifs=[test]):
                yield test, ast.Constant(True)
            case ast.With(items=[item]) if isinstance(item.context_expr, ast.Call) and not item.optional_vars:
                yield item.context_expr, "__import__('contextlib').nullcontext()"
            case ast.Return(value=ast.expr()) if not isinstance(node.value, ast.Constant):
                yield node, "return None"
            case ast.Raise() | ast.Continue() | ast.Break() | ast.AugAssign() | ast.Delete():
                yield node, "pass"
            case ast.Expr(value=ast.Call()):
                yield node, "pass"


def _calls(node: ast.Call) -> Iterator[tuple[ast.AST, ast.AST | str]]:
    for keyword in node.keywords:
        yield node, ast.Call(node.func, node.args, [k for k in node.keywords if k is not keyword])
    match node.func:
        case ast.Attribute(attr=name, value=owner) if name in METHODS:
            yield node, owner
        case ast.Attribute(attr=name, value=owner) if name in FUNCTIONS and isinstance(owner, ast.Name) and owner.id == "math":
            yield node.func, ast.Attribute(owner, FUNCTIONS[name], ast.Load())
        case ast.Name(id=name) if name in FUNCTIONS:
            yield node.func, ast.Name(FUNCTIONS[name], ast.Load())


def _without(values: list, one, make):
    return make([value for value in values if value is not one])


def _only_said(tree: ast.AST) -> set[ast.AST]:
    """Texts that people read: docstrings, and what an error says. Nobody's grade depends on their exact words."""
    said: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise | ast.JoinedStr):
            said |= {each for each in ast.walk(node) if isinstance(each, ast.Constant | ast.JoinedStr)}
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            said.add(node.value)
        if isinstance(node, ast.BinOp) and isinstance(node.left, ast.Constant) and isinstance(node.left.value, str):
            said.add(node.left)
    return said


# --- against the milestones -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What the milestones say of one change: `caught`, `survived` or `not run`."""

    change: Change
    verdict: str
    seconds: float


QUICK, SLOW = 10.0, 60.0
"""Seconds that a milestone has at least, where it only calls a function, and where it starts ranks or jobs: a change can make an
endless loop."""


def judged(stem: str, *, task: str | None = None, every: int = 1) -> Iterator[Verdict]:
    """Each change of a lab's solution against the milestones of its task, hidden ones included.

    Args:
        stem: the lab's name.
        task: only the changes of this task.
        every: only one change of so many, as a sample; the solution is then taken to pass.

    Raises:
        UsageError: the solution itself fails, so nothing can be said of its changes.
    """
    solution = named(stem).solution.read_text()
    limits: dict[str, float] = {}
    for change in [change for change in changes(solution) if task in (None, change.task)][::every]:
        if change.task not in limits:
            limits[change.task] = SLOW if proven.starts_something(stem, change.task) else QUICK
            if every == 1:
                limits[change.task] = max(limits[change.task], 3 * _seconds_of_solution(stem, change.task, solution))
        started = time.monotonic()
        verdicts = {m.verdict for m in _graded(stem, change.task, change.apply(solution), limits[change.task])}
        verdict = "survived" if verdicts == {"passed"} else "not run" if verdicts <= {"passed", "not run"} else "caught"
        yield Verdict(change, verdict, time.monotonic() - started)


def _seconds_of_solution(stem: str, task: str, solution: str) -> float:
    """How long the milestones of a task take where all is right."""
    started = time.monotonic()
    failed = [m for m in _graded(stem, task, solution, None) if m.verdict not in ("passed", "not run")]
    if failed:
        raise UsageError(f"{stem}: the solution itself fails {task}, so all of its changes would seem caught: {failed[0].message}")
    return time.monotonic() - started


def _graded(stem: str, task: str, source: str, limit: float | None) -> list[Milestone]:
    with tempfile.TemporaryDirectory() as temporary:
        package = package_with(Path(temporary), stem, source)
        return grade(stem, exercises=package, task=task, files=files_of(stem), limit=limit)


def equivalents(stem: str) -> dict[tuple[str, str], str]:
    """The changes that are as right as the solution: task and change, and why."""
    path = named(stem).answers / "equivalent.toml"
    listed = tomllib.loads(path.read_text())["equivalent"] if path.exists() else []
    return {(entry["task"], entry["change"]): entry["why"] for entry in listed}


# --- the record -------------------------------------------------------------------------------------------------------


def record(stem: str, verdicts: list[Verdict]) -> None:
    """Note what became of all changes of one or several tasks."""
    explained = equivalents(stem)
    for task in {verdict.change.task for verdict in verdicts}:
        mine = [verdict for verdict in verdicts if verdict.change.task == task]
        counts = collections.Counter(verdict.verdict for verdict in mine)
        survivors = [verdict.change.told for verdict in mine if verdict.verdict == "survived"]
        unexplained = sorted(told for told in survivors if (task, told) not in explained)
        entry = {
            "digest": proven.digest(stem, task),
            "changes": len(mine),
            "caught": counts["caught"],
            "equivalent": len(survivors) - len(unexplained),
            "not run": counts["not run"],
            "survived": unexplained,
        }
        proven.record(stem, task, proven.SMALL_CHANGES, entry)
