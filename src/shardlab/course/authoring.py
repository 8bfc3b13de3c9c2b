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
from pathlib import Path

from shardlab.hardware import ROOT

BEGIN = re.compile(r"^(?P<indent>\s*)# BEGIN SOLUTION (?P<task>\d+\.\d+)\s*$")
END = re.compile(r"^\s*# END SOLUTION\s*$")
MARKER = re.compile(r"#\s*(BEGIN|END)\s+SOLUTION", re.IGNORECASE)


class AuthoringError(ValueError):
    """A solution module or a notebook source that cannot be built; the message names the file and the line."""


def stems(root: Path = ROOT) -> list[str]:
    """The labs, in order: the names of the modules in `solutions/exercises`."""
    return sorted(path.stem for path in (root / "solutions" / "exercises").glob("lab*.py"))


def skeleton(source: str, name: str = "solution") -> str:
    """The learner's module: each marked solution becomes a `NotImplementedError` that names its task and function.

    Imports that only the solutions used stay: the learner needs them too.

    Raises:
        AuthoringError: a marker without its partner, one inside another, or one that the pattern does not read.
    """
    functions = {node.lineno: node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
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


def skeletons(root: Path = ROOT) -> dict[Path, str]:
    """What `src/exercises` should hold: paths and texts."""
    wanted = {root / "src/exercises/__init__.py": (root / "solutions/exercises/__init__.py").read_text()}
    for stem in stems(root):
        source = (root / "solutions" / "exercises" / f"{stem}.py").read_text()
        wanted[root / "src" / "exercises" / f"{stem}.py"] = skeleton(source, f"src/exercises/{stem}.py")
    return wanted


def _functions(source: str) -> dict[str, tuple[str, bool]]:
    """Each function's source, and whether its body is nothing but a `raise`."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return {}
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            found[node.name] = ast.get_source_segment(source, node), len(body) == 1 and isinstance(body[0], ast.Raise)
    return found


def _worked_on(path: Path, wanted: str) -> list[str]:
    """Tasks of a skeleton that somebody has written something for; all of them, if the file no longer parses."""
    asked = re.findall(r'raise NotImplementedError\("Task (\d+\.\d+): complete (\w+)\(\)', wanted)
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
    """Notebook, and the text source that it is made from: labs beside their milestones, lectures in `notebooks/`."""
    found = {}
    for source in sorted((root / "solutions" / "text").glob("*.py")):
        folder = root / "labs" / source.stem if source.stem.startswith("lab") else root / "notebooks"
        found[folder / f"{source.stem}.ipynb"] = source
    return found


def _read_source(source: Path):
    """A percent-format text as a notebook, with cell ids that stay the same from build to build."""
    import jupytext

    notebook = jupytext.read(source, fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"{source.stem}-{number:02d}".replace("_", "-")
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


def configs(root: Path = ROOT) -> dict[Path, str]:
    """The ready DeepSpeed files beside lab 02: what its solution makes, for `Trainer`."""
    import json

    source = root / "solutions" / "exercises" / "lab02_zero_stages.py"
    if not source.exists():
        return {}
    space: dict = {"__name__": "solution"}
    exec(compile(source.read_text(), str(source), "exec"), space)
    create, folder = space["create_deepspeed_config"], root / "labs" / "lab02_zero_stages" / "configs"
    made = {f"zero{stage}": create(stage) for stage in range(4)}
    made |= {
        "zero2_offload": create(2, offload_optimizer=True),
        "zero3_offload": create(3, offload_optimizer=True, offload_param=True),
    }
    return {folder / f"{name}.json": json.dumps(config, indent=2) + "\n" for name, config in made.items()}


def executed(root: Path = ROOT) -> dict[Path, Path]:
    """Executed notebook, and its text source: the labs with the reference solutions, and the lectures in place."""
    return {
        root / "solutions" / "notebooks" / path.name if source.stem.startswith("lab") else path: source
        for path, source in notebooks(root).items()
    }


def drifted(root: Path = ROOT) -> list[Path]:
    """Files that are not what `solutions/` gives: skeletons, configurations, notebooks, executed notebooks."""
    found = [path for path, text in (skeletons(root) | configs(root)).items() if not path.exists() or path.read_text() != text]
    return found + [
        path for path, source in (notebooks(root) | executed(root)).items() if not _same_cells(path, _read_source(source))
    ]


def build(root: Path = ROOT, *, force: bool = False) -> list[Path]:
    """Write skeletons, configurations and notebooks; a file that is right already is left alone, outputs included.

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
    for path, text in (wanted | configs(root)).items():
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            written.append(path)
    for path, source in notebooks(root).items():
        notebook = _read_source(source)
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
            nbformat.write(_read_source(source), made)
            papermill.execute_notebook(
                str(made), str(output), kernel_name="python3", cwd=str(ROOT), progress_bar=False, log_output=False
            )
            notebook = nbformat.read(output, as_version=4)
    finally:
        os.environ.pop(switch.VARIABLE) if before is None else os.environ.update({switch.VARIABLE: before})
    clean = _read_source(source)
    for cell, ran in zip(clean.cells, notebook.cells, strict=True):
        if cell.cell_type == "code":
            cell.execution_count = ran.execution_count
            cell.outputs = [output for output in ran.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                output.get("metadata", {}).clear()
    nbformat.write(clean, target)


def execute(root: Path = ROOT, only: str | None = None) -> list[Path]:
    """Execute the lectures in place, and the labs with the solutions into `solutions/notebooks/`."""
    done = []
    for target, source in executed(root).items():
        if only in (None, source.stem):
            execute_notebook(source, target, root / "solutions")
            done.append(target)
    return done
