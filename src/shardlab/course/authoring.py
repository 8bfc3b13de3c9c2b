"""From `solutions/` to what a learner gets: skeletons and notebooks. Each task is written once, in the solution.

A solution module marks what the learner is to write:

    # BEGIN SOLUTION 2.1
    …
    # END SOLUTION

`shardlab build` writes the skeleton, with `raise NotImplementedError("Task 2.1: …")` in that place, and the notebooks
from their text sources; `shardlab build --check` fails where the two have drifted.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from shardlab.errors import CourseError
from shardlab.hardware import ROOT
from shardlab.labs import catalogue, chosen

BEGIN = re.compile(r"^(?P<indent>\s*)# BEGIN SOLUTION (?P<task>\d+\.\d+)\s*$")
END = re.compile(r"^\s*# END SOLUTION\s*$")
MARKER = re.compile(r"#\s*(BEGIN|END)\s+SOLUTION", re.IGNORECASE)


class AuthoringError(CourseError, ValueError):
    """A solution module or a notebook source that cannot be built; the message names the file and the line."""


def skeleton(source: str, name: str = "solution") -> str:
    """The learner's module: each marked solution becomes a `NotImplementedError` that names its task and function.

    Imports that only the solutions used stay: the learner needs them too.

    Raises:
        AuthoringError: a marker without its partner, one inside another, or one that the pattern does not read.
    """
    functions = {node.lineno: name for name, node in _functions_of(ast.parse(source))}
    kept, opened = [], None
    for number, line in enumerate(source.splitlines(), start=1):
        if begin := BEGIN.match(line):
            if opened:
                raise AuthoringError(f"{name}, line {number}: a solution begins inside the one that began in line {opened}.")
            opened = number
            above = [at for at in functions if at < number]
            if not above:
                raise AuthoringError(f"{name}, line {number}: a solution must stand inside a function.")
            function = functions[max(above)]
            indent, task = begin["indent"], begin["task"]
            kept.append(f'{indent}raise NotImplementedError("Task {task}: complete {function}() in {name}")')
        elif END.match(line):
            if not opened:
                raise AuthoringError(f"{name}, line {number}: END SOLUTION without BEGIN SOLUTION.")
            opened = None
        elif MARKER.search(line):
            raise AuthoringError(f"{name}, line {number}: write '# BEGIN SOLUTION 1.2' or '# END SOLUTION', alone on the line.")
        elif not opened:
            kept.append(line)
    if opened:
        raise AuthoringError(f"{name}, line {opened}: the solution that begins here does not end.")
    return "\n".join(kept) + "\n"


def tasks(source: str) -> list[str]:
    """The task numbers of a solution module, in order, each once."""
    return list(dict.fromkeys(match["task"] for match in map(BEGIN.match, source.splitlines()) if match))


PACKAGE = '"""The exercises of the course. Complete the functions; `pytest labs` grades them."""\n'
"""What `src/exercises/__init__.py` holds."""


def skeletons(root: Path = ROOT) -> dict[Path, str]:
    """What `src/exercises` should hold: paths and texts."""
    wanted = {root / "src/exercises/__init__.py": PACKAGE}
    for lab in catalogue(root):
        wanted[lab.exercises] = skeleton(lab.solution.read_text(), str(lab.exercises.relative_to(root)))
    return wanted


def skeleton_of(wanted: str, root: Path = ROOT) -> str:
    """The exercises of a task or of a whole lab, as they were before anybody wrote in them.

    Args:
        wanted: a task such as "1.3", or a lab: its number or name.

    Raises:
        LabError: there is no such lab.
        AuthoringError: the lab has no such task.
    """
    (lab,) = chosen(wanted.partition(".")[0], root)
    name = str(lab.exercises.relative_to(root))
    # A release has no solution to make it from, so it brings the skeleton itself.
    text = skeleton(lab.solution.read_text(), name) if lab.solution.exists() else lab.skeleton.read_text()
    if "." not in wanted:
        return text
    parts = re.split(r"^(?= *# --- )", text, flags=re.MULTILINE)
    headed = [(part, re.match(r" *# --- Tasks? ([\d., and]+)", part)) for part in parts]
    parts = {task: part for part, head in headed if head for task in re.findall(r"\d+\.\d+", head[1])}
    if wanted not in parts:
        raise AuthoringError(f"{lab.stem} has no task {wanted}; it has {', '.join(parts)}.")
    return parts[wanted].partition("\n")[2].strip("\n") + "\n"


def _functions_of(node: ast.AST, within: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """Each function with its full name, such as `Lion.step`: several classes may have a `step`."""
    for child in ast.iter_child_nodes(node):
        name = f"{within}{child.name}" if isinstance(child, ast.FunctionDef | ast.ClassDef) else ""
        if isinstance(child, ast.FunctionDef):
            yield name, child
        yield from _functions_of(child, f"{name}." if name else within)


def _functions(source: str) -> dict[str, tuple[str, bool]]:
    """Each function's source, and whether its body is nothing but a `raise`."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return {}
    found = {}
    for name, node in _functions_of(tree):
        body = node.body[1:] if ast.get_docstring(node) else node.body
        found[name] = ast.get_source_segment(source, node), len(body) == 1 and isinstance(body[0], ast.Raise)
    return found


def _worked_on(path: Path, wanted: str) -> list[str]:
    """Tasks of a skeleton that somebody has written something for; all of them, if the file no longer parses."""
    asked = re.findall(r'raise NotImplementedError\("Task (\d+\.\d+): complete ([\w.]+)\(\)', wanted)
    if not path.exists():
        return []
    existing, skeletons_ = _functions(path.read_text()), _functions(wanted)
    if not existing and asked:
        return [task for task, _ in asked]
    return [
        task
        for task, function in asked
        if function in existing and not existing[function][1] and existing[function][0] != skeletons_[function][0]
    ]


def notebooks(root: Path = ROOT) -> dict[Path, Path]:
    """Notebook, and the text source that it is made from: labs next to their milestones, lectures in `notebooks/`."""
    found = {}
    for lab in catalogue(root):
        found[lab.notebook] = lab.answers / "text.py"
        if lab.lecture:
            found[lab.lecture_notebook] = lab.answers / "lecture.py"
    return found


def read_source(source: Path, name: str):
    """A percent-format text as a notebook of that name, with cell ids that stay the same from build to build."""
    import jupytext

    notebook = jupytext.read(source, fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"{name}-{number:02d}".replace("_", "-")
        cell["metadata"] = {}
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def _cells(notebook) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def _same_cells(path: Path, notebook) -> bool:
    import nbformat

    return path.exists() and _cells(nbformat.read(path, as_version=4)) == _cells(notebook)


TABLE = re.compile(r"(<!-- labs, made by `shardlab build` from labs/\*/lab.toml -->\n).*?(<!-- end of labs -->)", re.DOTALL)
"""Where a page has a table of the labs."""


def table(root: Path = ROOT, to_root: str = "") -> str:
    """The labs as a table in Markdown, with links to their notebooks.

    Args:
        to_root: the way from the page's folder to the course's, such as "../".
    """
    rows = []
    for lab in catalogue(root):
        notebook = f"[`{lab.stem}`]({to_root}labs/{lab.stem}/{lab.stem}.ipynb)"
        lecture = f"[`{lab.lecture}`]({to_root}notebooks/{lab.lecture}.ipynb)" if lab.lecture else ""
        rows.append(f"| {notebook} | {lecture} | {lab.writes} | {lab.minutes} |\n")
    return "".join(["| lab | lecture | what you write | minutes |\n| --- | --- | --- | --- |\n", *rows])


def generated(root: Path = ROOT) -> dict[Path, str]:
    """What else is made, paths and texts: the tables of labs."""
    found = {}
    for page, to_root in ((root / "README.md", ""), (root / "docs" / "instructor-guide.md", "../")):
        if page.exists():
            found[page] = TABLE.sub(lambda marks, way=to_root: f"{marks[1]}\n{table(root, way)}\n{marks[2]}", page.read_text())
    return found


def executed(root: Path = ROOT) -> dict[Path, Path]:
    """Executed notebook, and its text source: the labs with the reference solutions, and the lectures in place."""
    places = {lab.notebook: lab.executed_notebook for lab in catalogue(root)}
    return {places.get(path, path): source for path, source in notebooks(root).items()}


def drifted(root: Path = ROOT) -> list[Path]:
    """Files that are not what `solutions/` gives: skeletons, generated files, notebooks, executed notebooks."""
    found = [path for path, text in (skeletons(root) | generated(root)).items() if not path.exists() or path.read_text() != text]
    return found + [
        path for path, source in (notebooks(root) | executed(root)).items() if not _same_cells(path, read_source(source, path.stem))
    ]


def build(root: Path = ROOT, *, force: bool = False) -> list[Path]:
    """Write skeletons, generated files and notebooks; a file that is right already is left alone, outputs included.

    Returns:
        The files that were written.

    Raises:
        AuthoringError: a skeleton would replace exercises that somebody has worked on; nothing has been written then.
    """
    import nbformat

    wanted = skeletons(root)
    at_risk = {path: tasks_ for path, text in wanted.items() if (tasks_ := _worked_on(path, text))}
    if at_risk and not force:
        path, tasks_ = next(iter(at_risk.items()))
        raise AuthoringError(
            f"{path.relative_to(root)} has answers to task {', '.join(tasks_)}; a skeleton would replace them. "
            "Copy the file elsewhere, then: shardlab build --force"
        )
    written = []
    for path, text in (wanted | generated(root)).items():
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            written.append(path)
    for path, source in notebooks(root).items():
        notebook = read_source(source, path.stem)
        if not _same_cells(path, notebook):
            path.parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(notebook, path)
            written.append(path)
    return written


def execute_notebook(source: Path, target: Path, exercises: Path) -> None:
    """Execute one notebook with the `exercises` package in `exercises`, through papermill, and write it with its outputs.

    Warnings on stderr and times of execution are left out: they differ from machine to machine and say nothing.

    Raises:
        papermill.PapermillExecutionError: a cell failed.
    """
    import os
    import tempfile

    import nbformat
    import papermill

    from shardlab import switch

    target.parent.mkdir(parents=True, exist_ok=True)
    before = os.environ.get(switch.VARIABLE)
    os.environ[switch.VARIABLE] = str(exercises)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            made, output = Path(temporary, "source.ipynb"), Path(temporary, "output.ipynb")
            nbformat.write(read_source(source, target.stem), made)
            papermill.execute_notebook(
                str(made), str(output), kernel_name="python3", cwd=str(ROOT), progress_bar=False, log_output=False
            )
            notebook = nbformat.read(output, as_version=4)
    finally:
        os.environ.pop(switch.VARIABLE) if before is None else os.environ.update({switch.VARIABLE: before})
    clean = read_source(source, target.stem)
    for cell, ran in zip(clean.cells, notebook.cells, strict=True):
        if cell.cell_type == "code":
            cell.execution_count = ran.execution_count
            cell.outputs = [output for output in ran.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                output.get("metadata", {}).clear()
    nbformat.write(clean, target)


def execute(root: Path = ROOT, only: str | None = None) -> list[Path]:
    """Execute the lectures in place, and the labs with the solutions into `solutions/<lab>/`."""
    done = []
    for target, source in executed(root).items():
        if only in (None, target.stem):
            execute_notebook(source, target, root / "solutions")
            done.append(target)
    return done
