"""A release: it runs, it passes its own doctor, and there is no answer in it."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from shardlab.course import release
from shardlab.hardware import ROOT
from shardlab.labs import chosen, named, stems

LABS = ["lab01_baseline", "lab02_zero_stages"]


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a class") / "course"
    release.make(folder, chosen("1,2"))
    return folder


def inside(folder, *words: str) -> subprocess.CompletedProcess:
    """A command in a release, with the release's own library."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SHARDLAB_")} | {
        "PYTHONPATH": f"{folder}/src"
    }
    return subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def test_no_answer_is_in_it(released):
    names = {path.relative_to(released).as_posix() for path in released.rglob("*")}
    assert not [name for name in names if re.search(r"solution|mutant|hidden|\.git/|__pycache__", name)]
    assert {name for name in names if name.startswith("src/exercises/")} == {
        "src/exercises/__init__.py",
        *(f"src/exercises/{stem}.py" for stem in LABS),
    }
    texts = {name: (released / name).read_bytes().decode(errors="replace") for name in names if (released / name).is_file()}
    for stem in LABS:
        assert (
            "BEGIN SOLUTION" not in texts[f"src/exercises/{stem}.py"]
            and "raise NotImplementedError" in texts[f"src/exercises/{stem}.py"]
        )
    # The library has a memory model of its own; nothing else may hold a line of an answer.
    texts = {name: text for name, text in texts.items() if not name.startswith("src/shardlab/")}
    for stem in LABS:
        solution = named(stem).solution.read_text()
        for body in re.findall(r"# BEGIN SOLUTION .*?\n(.*?)# END SOLUTION", solution, re.DOTALL):
            lines = [line.strip() for line in body.splitlines() if len(line.strip()) > 60]
            for line in lines:
                assert not [name for name, text in texts.items() if line in text], line
    texts |= {str(path): path.read_text() for path in (released / "src" / "shardlab").rglob("*.py")}
    hidden = re.findall(r"def (test_\w+)", "".join(lab.hidden_milestones.read_text() for lab in chosen()))
    assert hidden and not [name for name in hidden for text in texts.values() if name in text]


PREDICTS = """
from shardlab.run.experiment import Experiment
from shardlab.run.run_folder import Run
from shardlab.show import report

run = Run.create(Experiment(name="one", ranks=2, deepspeed={"zero_optimization": {"stage": 2}}), "runs")
run.start()
run.write_states({"parameters": 10, "groups": [[10]], "ranks": [{"parameters": 40}]})
run.finish()
print(report.predicted_states(Run.read(run.folder)), report.COLUMNS["predicted"])
"""


def test_no_formula_of_a_task_can_be_called(released):
    """What predicts bytes is written by learners; a table of a release that needs it calls theirs."""
    source = "".join(path.read_text() for path in (released / "src" / "shardlab").rglob("*.py"))
    formulae = "engine_bytes sharded_elements swapped_elements shard_elements state_bytes offload_bytes".split()
    assert not [name for name in formulae if f"def {name}(" in source]
    code = PREDICTS
    exercises = released / "src" / "exercises" / "lab02_zero_stages.py"
    skeleton = exercises.read_text()
    environment = os.environ | {"PYTHONPATH": str(released / "src"), "SHARDLAB_EXERCISES": str(released / "src")}
    said = []
    for text in (skeleton, skeleton + "\n\ndef state_bytes(*sizes):\n    return {'parameters': 7}\n"):
        exercises.write_text(text)
        done = subprocess.run([sys.executable, "-c", code], cwd=released, env=environment, capture_output=True, text=True)
        said.append(done.stdout.strip() or done.stderr)
    exercises.write_text(skeleton)
    shutil.rmtree(released / "runs")
    assert said[0] == "None predicted by you", said
    assert said[1].startswith("States(parameters=7,") and said[1].endswith("predicted by you"), said


def test_notebooks_have_no_outputs(released):
    notebooks = list(released.rglob("*.ipynb"))
    assert {path.stem for path in notebooks} == {*LABS, "01_training_step", "02_zero"}, "and no lecture of another lab"
    for path in notebooks:
        cells = json.loads(path.read_text())["cells"]
        assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")], path


def test_manifest_has_every_file_and_finds_what_was_changed(released, tmp_path):
    course = tmp_path / "course"
    shutil.copytree(released, course)
    files = json.loads((course / "manifest.json").read_text())["files"]
    assert set(files) == {str(p.relative_to(course)) for p in course.rglob("*") if p.is_file()} - {"manifest.json"}
    assert release.changed(course) == []
    (course / "src/exercises/lab01_baseline.py").write_text("# my work")
    (course / "labs/lab01_baseline/lab01_baseline.ipynb").write_text("{}")
    assert release.changed(course) == [], "what learners write is theirs"
    (course / "labs/lab02_zero_stages/test_lab02_zero_stages.py").write_text("")
    (course / "src/shardlab/zero/memory_model.py").unlink()
    assert release.changed(course) == ["labs/lab02_zero_stages/test_lab02_zero_stages.py", "src/shardlab/zero/memory_model.py"]
    assert release.changed(ROOT) is None


@pytest.mark.ranks
def test_release_passes_its_doctor_and_grades_its_exercises(released, tmp_path):
    course = tmp_path / "with a space"
    shutil.copytree(released, course)
    doctor = inside(course, "-m", "shardlab.cli", "doctor")
    assert doctor.returncode == 0 and re.search(r"course files +works +as released", doctor.stdout), doctor.stdout + doctor.stderr
    grading = ("-m", "pytest", "labs", "-p", "no:cacheprovider", "--milestones-json", "report.json", "--junitxml", "report.xml")
    board = inside(course, *grading)
    report = json.loads((course / "report.json").read_text())
    assert {m["verdict"] for m in report} == {"not implemented"} and {m["lab"] for m in report} == set(LABS)
    assert "0/100" in board.stdout and "Next: task 1.1" in board.stdout
    assert (course / "report.xml").read_text().count("<failure") == len(report)
    shutil.copy(named("lab02_zero_stages").solution, course / "src/exercises")
    board = inside(course, *grading, "--task", "2.8")
    assert [m["verdict"] for m in json.loads((course / "report.json").read_text())] == ["passed"], board.stdout


@pytest.mark.parametrize("command", [["demo"], ["build"], ["matrix"], ["release", "again"]])
def test_what_needs_the_solutions_says_so(released, command):
    done = inside(released, "-m", "shardlab.cli", *command)
    assert done.returncode == 1 and re.search("has none|has no solutions", done.stderr) and done.stderr.count("\n") == 1


def test_release_replaces_nothing(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(release.ReleaseError, match="not empty"):
        release.make(tmp_path, chosen("1,2"))
    assert [p.name for p in tmp_path.iterdir()] == ["notes"]


def test_labs_are_named_by_number_or_stem():
    for words in ("2,1", "lab01_baseline, 2", "02, 01,1"):
        assert [lab.stem for lab in chosen(words)] == LABS
    assert [lab.stem for lab in chosen()] == stems() == sorted(path.parent.name for path in (ROOT / "labs").glob("*/lab.toml"))
