"""The proof of the milestones: solutions pass, skeletons fail, and each mutant fails its own milestone.

The first mutant of a task is graded against the whole lab, and must fail no other task; so a mistake stays with its task. Hidden
milestones meet the mutants of their task, until one fails them.

A mutant is a plausible wrong answer, kept in `solutions/<lab>/mutants.toml` as a replacement in the solution.
All variants are graded in this one process, so the fork server stays warm, and equal launches are shared.
"""

from __future__ import annotations

import json
import re
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shardlab import switch
from shardlab.course import proven
from shardlab.course.authoring import skeleton, tasks
from shardlab.errors import CourseError
from shardlab.hardware import ROOT
from shardlab.labs import catalogue, named, stems
from shardlab.milestones.agreement import recording
from shardlab.milestones.grade import grade
from shardlab.milestones.markers import files_of, milestones_of
from shardlab.milestones.messages import known_mistakes
from shardlab.milestones.scoreboard import task_order


class MutantError(CourseError, ValueError):
    """A mutant that cannot be made; the message names its file."""


@dataclass(frozen=True)
class Mutant:
    """A wrong answer: `old` becomes `new` in the solution of `task`.

    Attributes:
        likely: the cause in words. The message gives it where the result is the one that this mutant gave when it was recorded.
        says: what else the message must hold.
    """

    stem: str
    task: str
    name: str
    old: str
    new: str
    likely: str = ""
    says: str = ""

    def source(self, solution: str) -> str:
        """The solution's source with the mistake in it; the text to replace must be there, in that task, exactly once."""
        begin, end = f"# BEGIN SOLUTION {self.task}\n", "# END SOLUTION"
        parts = solution.split(begin)
        changed = [part.partition(end) for part in parts[1:]]
        found = sum(body.count(self.old) for body, _, _ in changed)
        if found != 1:
            raise MutantError(
                f"solutions/{self.stem}/mutants.toml, task {self.task}, '{self.name}': "
                f"`old` stands {found} times in the solution, not once."
            )
        return parts[0] + "".join(begin + body.replace(self.old, self.new) + end_ + rest for body, end_, rest in changed)


def mutants(stem: str, root: Path = ROOT) -> list[Mutant]:
    """All mutants of a lab, by task."""
    return [Mutant(stem, **entry) for entry in tomllib.loads(named(stem, root).mutants.read_text())["mutant"]]


def package_with(folder: Path, stem: str, source: str) -> Path:
    """An `exercises` package with the solutions of all labs, but this source for one."""
    package = folder / "exercises"
    package.mkdir()
    (package / "__init__.py").touch()
    for lab in catalogue():
        (package / f"{lab.stem}.py").write_text(source if lab.stem == stem else lab.solution.read_text())
    return folder


@dataclass(frozen=True)
class Line:
    """One row of the matrix: a variant, and what was wrong with its verdicts (nothing, if all is well)."""

    stem: str
    variant: str
    problem: str = ""


def _digest(stem: str, task: str, wrong_answers: list[Mutant]) -> str:
    return proven.digest(stem, task, repr(wrong_answers))


def _prove_task(stem: str, task: str, wrong_answers: list[Mutant], record: dict[str, str] | None, whole: bool) -> Iterator[Line]:
    """Each mutant of a task fails its milestone; the first one no other task's; and one of them the hidden milestone too.

    With a `record`, what mutants are recognised by goes in there, instead of being looked for in the messages. Where it is not the
    `whole` task, only the first mutant is looked at, and only at its own milestone.
    """
    solution = named(stem).solution.read_text()
    hidden = [m.name for m in milestones_of(stem) if m.hidden and m.task == task] if whole else []
    caught, ran = set(), True
    for number, mutant in enumerate(wrong_answers if whole else wrong_answers[:1]):
        with tempfile.TemporaryDirectory() as temporary:
            package = package_with(Path(temporary), stem, mutant.source(solution))
            outcome = grade(stem, exercises=package, task=None if whole and not number else task)
            failed = {m.task: m.message for m in outcome if m.verdict not in ("passed", "not run")}
            (own,) = [m for m in outcome if m.task == task]
            if not failed and any(m.task == task and m.verdict == "not run" for m in outcome):
                ran = False
                reason = own.message.splitlines()[0] if own.message else "its milestone cannot run here"
                yield Line(stem, f"{task} {mutant.name} (not run: {reason})")
                continue
            if set(hidden) - caught:
                looked = grade(stem, exercises=package, task=task, files=files_of(stem), hidden_too=True)
                caught |= {m.name for m in looked if m.hidden and m.verdict != "passed"}
        problem = ""
        if set(failed) != {task}:
            others = "".join(f"\n{message}" for other, message in failed.items() if other != task)
            problem = f"should fail {task} alone, fails {', '.join(failed) or 'nothing'}{others}"
        elif mutant.says not in failed[task]:
            problem = f"should say {mutant.says!r}, says:\n{failed[task]}"
        elif mutant.likely and record is not None:
            said = re.search(r"^likely    (.*)$", failed[task], re.MULTILINE)
            if said and said[1] not in (mutant.likely, *known_mistakes(named(stem).mistakes).values()):
                problem = f"should say {mutant.likely!r}, and its milestone names a cause of its own:\n{failed[task]}"
            elif record.setdefault(own.fingerprint, mutant.likely) != mutant.likely:
                problem = f"gives the same as the one of which is said: {record[own.fingerprint]!r}\n{failed[task]}"
        # GPUs round otherwise than the CPU on which the record was made.
        elif mutant.likely and "GPUs" not in own.ran_on and f"likely    {mutant.likely}\n" not in failed[task]:
            problem = f"should say {mutant.likely!r}, says (with --record it is noted anew):\n{failed[task]}"
        yield Line(stem, f"{task} {mutant.name}", problem)
    if ran and (vacuous := set(hidden) - caught):
        yield Line(stem, f"{task} hidden", f"no mutant fails {', '.join(sorted(vacuous))}: it may check nothing")


def prove(
    labs: list[str] | None = None,
    *,
    only: str | None = None,
    record: bool = False,
    trust_record: bool = False,
    say=lambda line: None,
) -> list[Line]:
    """Grade solutions, skeletons and mutants, and compare the verdicts with what they must be.

    Args:
        labs: stems; all labs by default.
        only: `solutions`, `skeletons`, `mutants`, or a task number, to grade just that.
        record: write anew what the mutants are recognised by (`mistakes.json` of each lab), and that they were caught
            (`proven.json`), and hashes of the solution's results (`inputs.json`); with a task as `only`, entries of others stay.
        trust_record: of a task that was recorded as proven, and has not changed since, look at the first mutant only.
        say: called with each line as it comes.
    """
    lines = []

    def add(line: Line) -> None:
        lines.append(line)
        say(line)

    for stem in labs or stems():
        solution = named(stem).solution.read_text()
        if only in (None, "solutions"):
            outcome = grade(stem, exercises=switch.SOLUTIONS, files=files_of(stem))
            wrong = [m for m in outcome if m.verdict not in ("passed", "not run")]
            untested = sorted(set(tasks(solution)) - {m.task for m in outcome if not m.hidden})
            problem = f"fails {', '.join(m.task for m in wrong)}: {wrong[0].message}" if wrong else ""
            add(Line(stem, "solution", problem or (f"no milestone for {', '.join(untested)}" if untested else "")))
        if only in (None, "skeletons"):
            with tempfile.TemporaryDirectory() as temporary:
                outcome = grade(stem, exercises=package_with(Path(temporary), stem, skeleton(solution)))
            wrong = [m.task for m in outcome if m.verdict != "not implemented" or f"Task {m.task}" not in m.message]
            add(Line(stem, "skeleton", f"does not say 'Task {wrong[0]}': {outcome}" if wrong else ""))
        known = proven.recorded(stem, proven.MUTANTS) if trust_record else {}
        recorded: dict[str, str] | None = {} if record else None
        chosen = {task: found for task, found in by_task(stem).items() if only in (None, "mutants", task)}
        if record and only != "skeletons":
            _record_inputs(stem, only if only in chosen else None)
        for task, wrong_answers in chosen.items():
            current = _digest(stem, task, wrong_answers)
            begun = len(lines)
            for line in _prove_task(stem, task, wrong_answers, recorded, known.get(task, {}).get("digest") != current):
                add(line)
            if record and not any(line.problem or "(not run" in line.variant for line in lines[begun:]):
                proven.record(stem, task, proven.MUTANTS, {"digest": current, "caught": len(wrong_answers)})
        if recorded is not None:
            _write_mistakes(stem, recorded, {mutant.likely for mutant in mutants(stem) if mutant.task not in chosen})
    return lines


def by_task(stem: str) -> dict[str, list[Mutant]]:
    """A lab's mutants by task, in the order of their file."""
    found: dict[str, list[Mutant]] = {}
    for mutant in mutants(stem):
        found.setdefault(mutant.task, []).append(mutant)
    return found


def _record_inputs(stem: str, task: str | None) -> None:
    """Note what the solution gives for the inputs that the hidden milestones draw; with a task, entries of others stay."""
    with recording() as found:
        grade(stem, exercises=switch.SOLUTIONS, task=task, files=files_of(stem), hidden_too=True)
    path = named(stem).folder / "inputs.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() and task else {}
    entries = {name: cases for name, cases in before.items() if name.split()[0] != task} | found
    ordered = sorted(entries.items(), key=lambda entry: (task_order(entry[0].split()[0]), entry[0]))
    lines = [
        f" {json.dumps(name)}: [\n" + ",\n".join(f"  {json.dumps(case)}" for case in cases) + "\n ]" for name, cases in ordered
    ]
    if lines:
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _write_mistakes(stem: str, recorded: dict[str, str], of_others: set[str]) -> None:
    """Write what known mistakes are recognised by; entries with the texts of tasks that were not looked at stay."""
    path = named(stem).mistakes
    kept = {mark: likely for mark, likely in known_mistakes(path).items() if likely in of_others}
    path.write_text(json.dumps(dict(sorted((kept | recorded).items())), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
