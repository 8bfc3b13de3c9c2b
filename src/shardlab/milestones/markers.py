"""What a lab's milestone files say of themselves, read from the source: nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

from shardlab import labs
from shardlab.milestones.scoreboard import Milestone


def files_of(stem: str) -> list[Path]:
    """The milestone files of a lab: the learner's own, and the hidden ones where they are."""
    lab = labs.named(stem)
    return [path for path in (lab.milestones, lab.hidden_milestones) if path.exists()]


def is_hidden(path: Path) -> bool:
    return path.name.startswith("hidden_")


def markers_of(stem: str) -> Iterator[tuple[Path, str, dict]]:
    """File, test and arguments of each milestone marker of a lab, read from the source."""
    for path in files_of(stem):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for decorator in node.decorator_list if isinstance(node, ast.FunctionDef) else []:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.milestone":
                    yield path, node.name, {keyword.arg: ast.literal_eval(keyword.value) for keyword in decorator.keywords}


def milestones_of(stem: str) -> list[Milestone]:
    """Every milestone of a lab, as a submission of which nothing is proven gets it."""
    return [
        Milestone(
            lab=stem,
            task=str(given["task"]),
            name=name,
            points=int(given.get("points", 0)),
            verdict="failed",
            message="its grading did not come to its end",
            hidden=is_hidden(path),
        )
        for path, name, given in markers_of(stem)
    ]


def ops_of(stems: Iterable[str]) -> list[str]:
    """DeepSpeed's ops that milestones of these labs load."""
    return list(dict.fromkeys(op for stem in stems for _, _, given in markers_of(stem) for op in given.get("ops", ())))
