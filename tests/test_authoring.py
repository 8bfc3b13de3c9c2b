"""From solutions to skeletons: what a learner gets is what the solutions generate, and holds nothing of the answers."""

import ast
import json
import re
import shutil

import pytest

from shardlab import labs
from shardlab.course.authoring import AuthoringError, build, drifted, generated, notebooks, skeleton, skeletons, tasks
from shardlab.hardware import ROOT
from shardlab.labs import stems
from shardlab.milestones.markers import markers_of

SOLUTION = '''"""A lab."""

import math


def area(radius: float) -> float:
    """The area of a circle."""
    # BEGIN SOLUTION 3.1
    return math.pi * radius**2
    # END SOLUTION


class Box:
    def volume(self) -> float:
        """Its volume."""
        if True:
            # BEGIN SOLUTION 3.2
            return self.a * self.b
            # END SOLUTION


def perimeter(radius: float) -> float:
    # BEGIN SOLUTION 3.1
    return 2 * math.pi * radius
    # END SOLUTION
'''

SKELETON = '''"""A lab."""

import math


def area(radius: float) -> float:
    """The area of a circle."""
    raise NotImplementedError("Task 3.1: complete area() in lab.py")


class Box:
    def volume(self) -> float:
        """Its volume."""
        if True:
            raise NotImplementedError("Task 3.2: complete Box.volume() in lab.py")


def perimeter(radius: float) -> float:
    raise NotImplementedError("Task 3.1: complete perimeter() in lab.py")
'''


@pytest.fixture
def copy(tmp_path):
    """A copy of everything that `build` reads and writes, built."""
    for folder in ("solutions", "src/exercises", "labs", "notebooks"):
        if (ROOT / folder).exists():
            shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    build(tmp_path, force=True)
    return tmp_path


def off(root) -> list:
    """What `build` would mend. Executed notebooks are not its business: a notebook runs for minutes."""
    return sorted(path for path in drifted(root) if path not in {lab.executed_notebook for lab in labs.catalogue(root)})


def solution_source(stem: str) -> str:
    return labs.named(stem).solution.read_text()


def skeleton_source(stem: str) -> str:
    return (ROOT / "src" / "exercises" / f"{stem}.py").read_text()


# --- this tree --------------------------------------------------------------------------------------------------------


def test_tree_is_what_the_solutions_generate():
    assert drifted() == [], "run `shardlab build`, and `shardlab build --execute` for executed notebooks"


def test_every_lab_has_its_parts():
    """One stem for a lab, everywhere."""
    for folder in ("labs", "solutions"):
        assert stems() == sorted(path.name for path in (ROOT / folder).glob("lab*") if path.is_dir())
    for lab in labs.catalogue():
        parts = (
            lab.milestones,
            lab.notebook,
            lab.exercises,
            lab.solution,
            lab.hidden_milestones,
            lab.mutants,
            lab.executed_notebook,
        )
        for path in (*parts, lab.answers / "text.py"):
            assert path.exists(), path


@pytest.mark.parametrize("stem", stems())
def test_milestones_send_learners_to_sections_that_are_there(stem):
    headings = re.findall(r"^# #+ (.*)$", (labs.named(stem).answers / "lecture.py").read_text(), re.MULTILINE)
    sections = {given["section"] for _, _, given in markers_of(stem) if "section" in given}
    assert sections and sections <= set(headings), sections - set(headings)


@pytest.mark.parametrize("stem", stems())
def test_skeleton_holds_no_line_of_a_solution(stem):
    """Markers are read here by hand, so that a mistake in `authoring` cannot hide itself."""
    outside, inside, within = set(), set(), False
    for line in solution_source(stem).splitlines():
        if line.strip().startswith("# BEGIN SOLUTION"):
            within = True
        elif line.strip().startswith("# END SOLUTION"):
            within = False
        else:
            (inside if within else outside).add(line)
    assert len(inside) > 20
    for line in skeleton_source(stem).splitlines():
        assert line in outside or line.strip().startswith('raise NotImplementedError("Task '), line
        assert "BEGIN SOLUTION" not in line and "END SOLUTION" not in line


@pytest.mark.parametrize("stem", stems())
def test_task_function_of_a_skeleton_only_raises_and_says_which_task(stem):
    tree, unwritten = ast.parse(skeleton_source(stem)), []
    classes = {id(inner): node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for inner in node.body}
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for node in sorted(functions, key=lambda node: node.lineno):
        raises = [inner for inner in ast.walk(node) if isinstance(inner, ast.Raise)]
        raised = [inner for inner in raises if "NotImplementedError" in ast.dump(inner)]
        if not raised:
            continue
        owner = classes.get(id(node))
        name = f"{owner.name}.{node.name}" if owner else node.name
        said = ast.get_docstring(node)
        assert said or (node.name == "__init__" and ast.get_docstring(owner)), f"{name}() does not say what it should do"
        assert node.body[1 if said else 0 :] == raised, f"{name}() holds something besides its NotImplementedError"
        text = raised[0].exc.args[0].value
        task = re.fullmatch(rf"Task (\d+\.\d+): complete {re.escape(name)}\(\) in src/exercises/{stem}\.py", text)
        assert task, text
        unwritten.append(task[1])
    assert list(dict.fromkeys(unwritten)) == tasks(solution_source(stem))


@pytest.mark.parametrize("stem", stems())
def test_tasks_are_numbered_by_lab_without_a_gap(stem):
    lab = int(re.match(r"lab(\d+)", stem)[1])
    numbers = tasks(solution_source(stem))
    assert numbers == [f"{lab}.{k}" for k in range(1, len(numbers) + 1)]


# --- build ------------------------------------------------------------------------------------------------------------


def test_drift_is_found_and_mended(copy):
    shutil.copy(ROOT / "README.md", copy)
    assert off(copy) == []
    edited, deleted = (copy / "src" / "exercises" / f"{stem}.py" for stem in stems()[:2])
    edited.write_text(edited.read_text() + "\n# A change by hand.\n")
    deleted.unlink()
    table, notebook = next(iter(generated(copy))), next(iter(notebooks(copy)))
    table.write_text(table.read_text().replace("| minutes |", "| hours |"))
    cells = json.loads(notebook.read_text())
    cells["cells"][0]["source"] = ["# Another title"]
    notebook.write_text(json.dumps(cells))
    wanted = sorted([edited, deleted, table, notebook])
    assert off(copy) == wanted
    assert "A change by hand" in edited.read_text() and not deleted.exists(), "looking writes nothing"
    assert sorted(build(copy)) == wanted
    assert off(copy) == []
    assert edited.read_text() == skeletons(copy)[edited] and table.read_text() == generated(copy)[table]
    assert "Another title" not in notebook.read_text()
    assert build(copy) == [], "what is right is left alone"


def test_outputs_of_a_notebook_are_no_drift(copy):
    """Someone who has run a notebook has not changed it, and does not lose what it printed."""
    path = next(iter(notebooks(copy)))
    notebook = json.loads(path.read_text())
    code = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    code["execution_count"], code["outputs"] = 3, [{"output_type": "stream", "name": "stdout", "text": ["the loss is 1.5\n"]}]
    path.write_text(json.dumps(notebook))
    assert off(copy) == []
    assert build(copy) == []
    assert "the loss is 1.5" in path.read_text()


def test_change_of_a_solution_changes_its_skeleton_only_outside_the_markers(copy):
    path = labs.catalogue(copy)[0].solution
    source = path.read_text()
    path.write_text(source.replace("    # END SOLUTION", "    # another way to say it\n    # END SOLUTION", 1))
    assert off(copy) == []
    path.write_text(source + "\n\nADDED = 1\n")
    assert off(copy) == [copy / "src" / "exercises" / f"{stems()[0]}.py"]


@pytest.mark.parametrize("half", [False, True])
def test_learner_s_work_is_not_replaced(copy, half):
    """Not even a function that is half written, with its NotImplementedError still at the end."""
    worked_on, other = (copy / "src" / "exercises" / f"{stem}.py" for stem in stems()[:2])
    line = next(line for line in worked_on.read_text().splitlines() if "Task 1.1: " in line)
    answer = f"    mine = 1\n{line}" if half else "    return 'mine'"
    worked_on.write_text(worked_on.read_text().replace(line, answer))
    other.unlink()
    before = worked_on.read_text()
    with pytest.raises(AuthoringError) as refused:
        build(copy)
    for words in (f"src/exercises/{stems()[0]}.py", "1.1", "--force"):
        assert words in str(refused.value)
    assert worked_on.read_text() == before and not other.exists(), "nothing is written then"
    assert sorted(build(copy, force=True)) == sorted([worked_on, other])
    assert worked_on.read_text() == skeletons(copy)[worked_on]


def test_work_in_one_of_two_methods_of_the_same_name_is_not_replaced(copy):
    path = copy / "src/exercises/lab07_custom_trainer.py"
    line = next(line for line in path.read_text().splitlines() if "complete AsymmetricLoss.__init__()" in line)
    path.write_text(path.read_text().replace(line, "        super().__init__()"))
    before = path.read_text()
    with pytest.raises(AuthoringError, match=r"lab07_custom_trainer\.py has answers to task 7\.1"):
        build(copy)
    assert path.read_text() == before


def test_skeletons_are_those_of_every_lab():
    assert {path.stem for path in skeletons()} == {"__init__", *stems()}


# --- skeleton ---------------------------------------------------------------------------------------------------------


def test_skeleton_of_a_module():
    assert skeleton(SOLUTION, "lab.py") == SKELETON
    assert tasks(SOLUTION) == ["3.1", "3.2"]


def test_skeleton_is_python_and_raises():
    module = {}
    exec(compile(skeleton(SOLUTION, "lab.py"), "lab.py", "exec"), module)
    with pytest.raises(NotImplementedError, match="Task 3.1: complete area"):
        module["area"](1.0)


def test_skeleton_of_a_skeleton_is_itself():
    assert skeleton(SKELETON, "lab.py") == SKELETON


def after(line: str, new: str) -> str:
    """SOLUTION with another line behind the first line that reads so."""
    return SOLUTION.replace(f"{line}\n", f"{line}\n{new}\n", 1)


BAD_MARKERS = {
    "a solution inside a solution": (
        after("    # BEGIN SOLUTION 3.1", "    # BEGIN SOLUTION 3.2"),
        "line 9",
        "inside the one that began in line 8",
    ),
    "END without BEGIN": (after("    # END SOLUTION", "    # END SOLUTION"), "line 11", "END SOLUTION without BEGIN SOLUTION"),
    "BEGIN without END": (SOLUTION.rstrip().removesuffix("    # END SOLUTION"), "line 23", "does not end"),
    "no task": (SOLUTION.replace("BEGIN SOLUTION 3.1", "BEGIN SOLUTION", 1), "line 8", "alone on the line"),
    "half a task": (SOLUTION.replace("BEGIN SOLUTION 3.1", "BEGIN SOLUTION 3", 1), "line 8", "alone on the line"),
    "words behind BEGIN": (SOLUTION.replace("BEGIN SOLUTION 3.1", "BEGIN SOLUTION 3.1 (hard)", 1), "line 8", "alone on the line"),
    "words behind END": (SOLUTION.replace("# END SOLUTION", "# END SOLUTION 3.1", 1), "line 10", "alone on the line"),
    "code before BEGIN": (
        SOLUTION.replace("    # BEGIN SOLUTION 3.1", "    x = 1  # BEGIN SOLUTION 3.1", 1),
        "line 8",
        "alone on the line",
    ),
    "code before END": (SOLUTION.replace("radius**2\n    # END", "radius**2  # END", 1), "line 9", "alone on the line"),
    "small letters": (SOLUTION.replace("# BEGIN SOLUTION", "# begin solution", 1), "line 8", "alone on the line"),
    "no space": (SOLUTION.replace("# END SOLUTION", "#END SOLUTION", 1), "line 10", "alone on the line"),
    "outside a function": ("import math\n\n# BEGIN SOLUTION 3.1\nPI = math.pi\n# END SOLUTION\n", "line 3", "function"),
}


@pytest.mark.parametrize("case", BAD_MARKERS)
def test_bad_marker_is_refused_with_file_and_line(case):
    source, line, reason = BAD_MARKERS[case]
    with pytest.raises(AuthoringError) as refused:
        skeleton(source, "lab.py")
    assert str(refused.value).startswith(f"lab.py, {line}: ")
    assert reason in str(refused.value)


@pytest.mark.parametrize("path", [*notebooks()], ids=lambda path: path.stem)
def test_code_cells_fit_the_page(path):
    """JupyterLab shows about a hundred characters of a line next to its file browser."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    lines = [line for cell in cells for line in "".join(cell["source"]).splitlines()]
    assert not [line for line in lines if len(line) > 100]
