"""A class of submissions, as they come and as no instructor wants them: each gets its row, and no more than it earned."""

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import submission_kinds as made
from conftest import every_lab
from submission_kinds import KINDS, STEM

from shardlab.grading import gradebook, results, submissions, whole_class
from shardlab.grading.plan import Plan
from shardlab.hardware import ROOT
from shardlab.labs import named
from shardlab.sandbox import boxes

pytestmark = pytest.mark.boxes

SHARDLAB = [sys.executable, "-m", "shardlab.cli"]


@pytest.fixture(scope="module")
def walls():
    """Bubblewrap. Without it, hostile submissions are not run: this machine is what they would harm."""
    kind, why = boxes.isolation()
    if kind != "bubblewrap":
        pytest.skip(why)
    return kind, why


def plan(isolation, labs=(STEM,), **changes) -> Plan:
    settings = {"seconds": 150, "course": "this one", "call_seconds": 25}
    return Plan(labs, isolation=isolation, **(settings | changes))


def contents(folder) -> dict[str, str]:
    """Digests of all files below a folder, links by their targets."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if "__pycache__" not in path.parts and not path.is_dir():
            data = os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
            found[str(path)] = hashlib.sha256(data).hexdigest()
    return found


def _variables(process: psutil.Process) -> list[str]:
    try:
        return [f"{name}={value}" for name, value in process.environ().items()]
    except psutil.Error:
        return []


def processes() -> set[tuple[int, float]]:
    """What grading has started and is still there, by number and start: below this process's own children, or left to init."""
    me, found, mine = os.getpid(), set(), f"SHARDLAB_TESTS={os.getpid()}"
    below = {process.pid for process in psutil.Process().children(recursive=True)}
    for process in psutil.process_iter(["pid", "create_time", "ppid", "status", "cmdline"]):
        info = process.info
        words = " ".join(info["cmdline"] or [])
        orphan = info["ppid"] == 1 and ("bwrap" in words or "multiprocessing" in words) and mine in _variables(process)
        if (orphan or (info["pid"] in below and info["ppid"] != me)) and info["status"] != psutil.STATUS_ZOMBIE:
            found.add((info["pid"], info["create_time"]))
    return found


class Class:
    """What came of grading one submission of each kind."""

    def __init__(self, folder, walls):
        self.folder, self.out = folder / "handed in", folder / "out"
        self.kinds = made.make(self.folder)
        course = [ROOT / name for name in ("src", "labs", "solutions", "notebooks", "bench")]
        before = [contents(path) for path in (self.folder, *course)]
        running = processes()
        found = submissions.find([self.folder])
        self.results = whole_class.grade_all(found, self.out, plan(walls), jobs=2)
        gradebook.write(self.out, self.results)
        end = time.monotonic() + 10
        while (left := processes() - running) and time.monotonic() < end:
            time.sleep(0.1)
        self.left = left
        self.harm = [path for path, was in zip((self.folder, *course), before) if contents(path) != was]


@pytest.fixture(scope="module")
def graded(tmp_path_factory, walls):
    return Class(tmp_path_factory.mktemp("class"), walls)


@pytest.mark.timeout(1800)  # the first of them waits until all are graded
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_submission_gets_the_grade_that_it_earned(graded, kind):
    (result,) = [graded.results[name] for name, of in graded.kinds.items() if of == kind]
    passed = tuple(sorted(m["task"] for m in result["milestones"] if m["verdict"] == "passed" and not m["hidden"]))
    messages = [m["message"] for m in result["milestones"] if m["verdict"] != "passed"]
    said = json.dumps([result["error"], result["notes"], messages], ensure_ascii=False)
    assert passed == kind.passes, said
    assert kind.says in said
    assert result["whole"], "a submission's own fault is a grade, not a failure of the grading"
    earned = {grade.task: grade.earned for grade in gradebook.tasks_of(result)}
    assert [task for task, points in earned.items() if points] == list(kind.passes)


def test_every_submission_has_its_row_and_its_page(graded):
    with open(graded.out / "gradebook.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0][:3] == ["submission", "points", "of"] and rows[0][3:11] == made.TASKS
    names = [row[0].removeprefix("'") for row in rows[1:]]
    assert sorted(names) == sorted(graded.kinds) and len(rows) == len(KINDS) + 1
    assert not [row[0] for row in rows if row[0].startswith("=")], "a spreadsheet would compute it"
    pages = list((graded.out / "feedback").glob("*.html"))
    assert len(pages) == len(KINDS)
    book = json.loads((graded.out / "gradebook.json").read_text())
    assert {entry["submission"] for entry in book["submissions"]} == set(graded.kinds)


def test_nothing_is_left_and_nothing_was_harmed(graded):
    assert not graded.left, [psutil.Process(pid).cmdline() for pid, _ in graded.left if psutil.pid_exists(pid)]
    assert not graded.harm, "something outside of the output folder has changed"
    assert not (graded.out / ".work").exists()


def test_feedback_shows_messages_and_escapes_what_learners_wrote(graded):
    pages = {p.name: p.read_text() for p in (graded.out / "feedback").glob("*.html")}
    half = next(text for name, text in pages.items() if name.startswith("half"))
    assert "50 of 100 points" in half and "not implemented" in half
    strange = next(text for text in pages.values() if "Zoë" in text)
    assert "&#34;lab 02&#34;" in strange, "quotes are escaped"
    overview = (graded.out / "overview.html").read_text()
    assert f"{len(KINDS)} submissions" in overview and "bubblewrap" in overview


@pytest.fixture
def copies(tmp_path):
    """A class of equal names' work: two have done three tasks, two have done two. None of them starts ranks."""
    folder = tmp_path / "class"
    for number in range(2):
        made.package(folder / f"more {number}", made.half(3))
        made.package(folder / f"less {number}", made.half(2))
    return folder


def verdicts(results: dict) -> dict:
    return {name: [(m["task"], m["name"], m["verdict"], m["message"]) for m in r["milestones"]] for name, r in results.items()}


def test_equal_work_gets_equal_grades(tmp_path, walls):
    for number in range(6):
        made.package(tmp_path / "class" / f"{number}", made.half(5).replace("2**20", "1048576"))
    results = whole_class.grade_all(submissions.find([tmp_path / "class"]), tmp_path / "out", plan(walls), jobs=2)
    assert len({json.dumps(v) for v in verdicts(results).values()}) == 1


def test_killed_batch_goes_on_to_the_same_gradebook(copies, tmp_path, walls):
    def command(out):
        return [*SHARDLAB, "grade", str(copies), "--out", str(out), "--labs", "2", "--jobs", "1"]

    process = subprocess.Popen(command(tmp_path / "killed"), stdout=subprocess.DEVNULL, start_new_session=True)
    running = processes()
    results = tmp_path / "killed" / "results"
    while len(list(results.glob("[!.]*.json"))) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in results.glob("[!.]*.json")}
    assert 2 <= len(kept) < 4
    end = time.monotonic() + 20
    while (left := processes() - running) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left, "judges and boxes end with the batch, however that ended"
    again = subprocess.run(command(tmp_path / "killed"), capture_output=True, text=True)
    assert again.returncode == 0 and f"{len(kept)} graded before" in again.stdout, again.stdout + again.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "what was graded is not graded again"
    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    books = [(tmp_path / name / "gradebook.csv").read_text() for name in ("killed", "whole")]
    assert books[0] == books[1]
    third = subprocess.run(command(tmp_path / "whole"), capture_output=True, text=True)
    assert third.returncode == 0 and "to grade" not in third.stdout, "nothing is left to grade"
    one = [str(copies / "less 1") if word == str(copies) else word for word in command(tmp_path / "whole")]
    subprocess.run(one, check=True, capture_output=True)
    assert (tmp_path / "whole" / "gradebook.csv").read_text() == books[1], "who was not named keeps a row"


def test_changed_submission_is_graded_again(tmp_path, walls):
    folder = made.package(tmp_path / "class" / "ann", made.half(2))
    first = whole_class.grade_all({"ann": folder}, tmp_path / "out", plan(walls))
    (folder / "exercises" / f"{STEM}.py").write_text(made.half(3))
    second = whole_class.grade_all({"ann": folder}, tmp_path / "out", plan(walls))
    passed = [[m["task"] for m in r["ann"]["milestones"] if m["verdict"] == "passed" and not m["hidden"]] for r in (first, second)]
    assert passed == [["2.1", "2.2"], ["2.1", "2.2", "2.3"]]


CONFINED = [kind for kind in KINDS if kind.confined]


def test_limits_alone_grade_the_same(tmp_path):
    """Only submissions that keep to their own process: without walls, the others would harm whoever runs this."""
    kinds = made.make(tmp_path / "class", CONFINED)
    results = whole_class.grade_all(submissions.find([tmp_path / "class"]), tmp_path / "out", plan(("limits", "a test")), jobs=2)
    for name, kind in kinds.items():
        passed = tuple(sorted(m["task"] for m in results[name]["milestones"] if m["verdict"] == "passed" and not m["hidden"]))
        assert passed == kind.passes, (name, results[name])
    gradebook.write(tmp_path / "out", results)
    assert "could read what your account can read" in (tmp_path / "out" / "overview.html").read_text()


# --- on ranks ---------------------------------------------------------------------------------------------------------

SAVE = """
def save_and_reload(trainer, tokenizer, folder):
{body}
"""
ON_RANKS = {
    "leaves with status 0 and a forged record": """
    import json, os, pathlib, time
    if os.environ["RANK"] != "0":
        time.sleep(1)
        os._exit(0)
    path = pathlib.Path(folder).parent / "run.json"
    record = json.loads(path.read_text())
    good = dict(difference=0.0, same_object=False, dtype="torch.float32", parameters=1, tokenizer=True, tied=True)
    path.write_text(json.dumps(record | {"outcome": "finished", "results": good}))
    os._exit(0)""",
    "replaces what the program observes with": """
    import sys
    programs = sys.modules["shardlab.labs.lab01_baseline.programs"]
    programs.gather = lambda value: [0.0, 0.0]
    from transformers import AutoModelForCausalLM
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_config(trainer.model.config)
    return model""",
    "takes the check away first": """
    import sys
    programs = sys.modules["shardlab.labs.lab01_baseline.programs"]
    import shardlab.run.tampering as tampering
    tampering.require_unchanged = tampering.snapshot = lambda *a, **k: ()
    programs.gather = lambda value: [0.0, 0.0]
    from transformers import AutoModelForCausalLM
    tokenizer.save_pretrained(folder)
    return AutoModelForCausalLM.from_config(trainer.model.config)""",
    "writes the record itself": """
    from shardlab.run.run_folder import Run
    good = dict(difference=0.0, same_object=False, dtype="torch.float32", parameters=1, tokenizer=True, tied=True)
    Run.results = property(lambda self: good)
    return trainer.model""",
    "answers in the launcher's place": """
    import json, os, struct
    good = dict(difference=0.0, same_object=False, dtype="torch.float32", parameters=1, tokenizer=True, tied=True)
    runs = [dict(outcome="finished", results=good)] * 2
    answer = json.dumps(dict(runs=runs)).encode()
    for fd in range(3, 64):
        try:
            os.write(fd, struct.pack(">Q", len(answer)) + answer)
        except OSError:
            pass
    os._exit(1)""",
    "hands the launcher a program": """
    import os, sys
    class Program:
        def __reduce__(self):
            return (exec, ("raise SystemExit('it ran in the launcher')",))
    frame = sys._getframe()
    while "ret_vals" not in frame.f_locals:
        frame = frame.f_back
    frame.f_locals["ret_vals"][int(os.environ["LOCAL_RANK"])].put(Program())
    tokenizer.save_pretrained(folder)
    return trainer.model""",
    "starts processes without end": """
    import os
    while True:
        os.fork()""",
}  # fmt: skip


def test_ranks_cannot_forge_what_they_report(tmp_path, walls):
    source = made.alone("lab01_baseline", "1.6")
    for name, body in ON_RANKS.items():
        changed = source + SAVE.format(body=body.strip("\n"))
        made.package(tmp_path / "class" / name, changed, "lab01_baseline.py")
    made.package(tmp_path / "class" / "right", source, "lab01_baseline.py")
    labs = ("lab01_baseline",)
    results = whole_class.grade_all(submissions.find([tmp_path / "class"]), tmp_path / "out", plan(walls, labs), jobs=2)
    for name, result in results.items():
        verdicts = {m["task"]: (m["verdict"], m["message"]) for m in result["milestones"] if not m["hidden"]}
        assert verdicts["1.6"][0] == ("passed" if name == "right" else "failed"), (name, verdicts["1.6"])
        assert {verdict for task, (verdict, _) in verdicts.items() if task != "1.6"} == {"not implemented"}
    said = {name: [m["message"] for m in r["milestones"] if m["task"] == "1.6"][0] for name, r in results.items()}
    assert "exit status 0" in said["leaves with status 0 and a forged record"]
    assert "was replaced" in said["replaces what the program observes with"]
    assert "was replaced" in said["takes the check away first"]
    assert "was replaced" in said["writes the record itself"]
    assert "processes" in said["starts processes without end"]
    assert "plain values are taken" in said["hands the launcher a program"]


# --- the other labs ---------------------------------------------------------------------------------------------------


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("stem", every_lab())
def test_solution_passes_in_a_box(stem, tmp_path, walls, may_get):
    """What needs ranks, disks and jobs, hidden milestones too."""
    made.package(tmp_path / "class" / "ann", named(stem).solution.read_text(), f"{stem}.py")
    settings = plan(walls, (stem,), seconds=900, call_seconds=60)
    result = whole_class.grade_all(submissions.find([tmp_path / "class"]), tmp_path / "out", settings)["ann"]
    lost = [f"{m['task']} {m['name']}, {m['verdict']}: {m['message']}" for m in result["milestones"] if m["verdict"] not in may_get]
    assert result["milestones"] and not lost, "\n\n".join(lost)
    assert result["whole"]


@pytest.mark.jobs
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("stem, task", [("lab06_multi_node", "6.6")])
def test_one_judge_tells_the_clusters_of_two_boxes_apart(stem, task, tmp_path, walls, may_get):
    """Jobs with the same script and the same numbers, in one box after the other."""
    for name in ("reads jobs", "reads jobs again"):
        made.package(tmp_path / "class" / name, made.alone(stem, task), f"{stem}.py")
    settings = plan(walls, (stem,), seconds=900, call_seconds=60)
    results = whole_class.grade_all(submissions.find([tmp_path / "class"]), tmp_path / "out", settings)
    for result in results.values():
        reads = {(m["task"], m["hidden"]): m["verdict"] for m in result["milestones"]}
        assert reads[task, False] in may_get and reads[task, True] in may_get
        others = {verdict for (other, _), verdict in reads.items() if other != task}
        assert others <= {"not implemented", "failed"}, "the other tasks are not written"
        assert result["whole"]


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, said",
    [
        (["missing", "--out", "out"], "missing is not there"),
        ([".", "--out", "out", "--labs", "77"], "there is no lab '77'; there are lab01_baseline"),
    ],
)
def test_bad_arguments_are_one_sentence(tmp_path, words, said):
    done = subprocess.run([*SHARDLAB, "grade", *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and said in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_root_does_not_grade_without_walls(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("this is about root")
    made.package(tmp_path / "ann", made.solution())
    words = ["grade", str(tmp_path / "ann"), "--out", str(tmp_path / "out"), "--limits-only"]
    done = subprocess.run([*SHARDLAB, *words], capture_output=True, text=True)
    assert done.returncode == 1 and "not graded as root" in done.stderr and not (tmp_path / "out").exists()


def test_two_of_one_name_are_refused(tmp_path):
    for place in ("a", "b"):
        made.package(tmp_path / place / "ann", "")
    with pytest.raises(submissions.SubmissionError, match="two submissions are called 'ann'"):
        submissions.find([tmp_path / "a" / "ann", tmp_path / "b" / "ann"])


def test_damaged_result_is_graded_again(tmp_path, walls):
    folder = made.package(tmp_path / "class" / "ann", made.half(1))
    whole_class.grade_all({"ann": folder}, tmp_path / "out", plan(walls))
    (path,) = (tmp_path / "out" / "results").glob("*.json")
    path.write_text(path.read_text()[:100])
    assert results.results_in(tmp_path / "out") == {}
    assert whole_class.grade_all({"ann": folder}, tmp_path / "out", plan(walls))["ann"]["whole"]
    shutil.rmtree(tmp_path / "out")
