"""What is made from results: gradebook, points given by hand, imports for Moodle; and who gets a row at all."""

import csv
import io
import json
from pathlib import Path

import pytest

from shardlab.grading import gradebook, plan, results, submissions

PLAN = plan.Plan(("lab02_zero_stages",), 60, "this course", ("bubblewrap", ""))


def result(name: str, **verdicts: str) -> dict:
    """A result in which every task has passed but those that are named, such as `t2_3="not run"`."""
    made = results.empty_result(name, Path("/handed in") / name, PLAN)
    for milestone in made["milestones"]:
        milestone["verdict"] = verdicts.get("t" + milestone["task"].replace(".", "_"), "passed")
    return made


def rows(text: str) -> dict[str, dict]:
    return {row["submission"]: row for row in csv.DictReader(io.StringIO(text))}


def write(out: Path, *results: dict) -> dict[str, dict]:
    (out / "results").mkdir(parents=True, exist_ok=True)
    return rows(gradebook.write(out, {r["name"]: r for r in results}).read_text())


def test_task_that_did_not_run_is_no_zero(tmp_path):
    book = write(tmp_path, result("ann"), result("bob", t2_3="not run"), result("cem", t2_3="failed"))
    points = {name: (row["points"], row["of"], row["2.3"]) for name, row in book.items()}
    worth = int(book["ann"]["2.3"])
    assert points == {
        "ann": ("100", "100", str(worth)),
        "bob": (str(100 - worth), str(100 - worth), "not run"),
        "cem": (str(100 - worth), "100", "0"),
    }
    moodle = {row["username"]: row["total"] for row in csv.DictReader(io.StringIO((tmp_path / "moodle.csv").read_text()))}
    assert moodle == {"ann": "100", "bob": "", "cem": str(100 - worth)}, "no number is better than a wrong one"
    write(tmp_path, result("dan") | {"whole": False, "error": "the judge ended while it graded this"})
    assert "dan,,\n" in (tmp_path / "moodle.csv").read_text()
    assert (tmp_path / book["bob"]["feedback"]).is_file()


def test_points_given_by_hand_survive(tmp_path):
    (tmp_path / gradebook.BY_HAND).write_text(
        'submission,task,points,why\nbob,2.3,2.5,"ran it myself, on a GPU"\ncem,2.1,0,copied\n'
    )
    for _ in range(2):
        book = write(tmp_path, result("bob", t2_3="not run"), result("cem"))
    worth = int(book["cem"]["2.3"])
    assert (float(book["bob"]["points"]), book["bob"]["of"], book["bob"]["2.3"]) == (100 - worth + 2.5, "100", "2.5")
    assert book["cem"]["2.1"] == "0" and "2.1 by hand: copied" in book["cem"]["notes"]
    assert "by hand: ran it myself, on a GPU" in (tmp_path / book["bob"]["feedback"]).read_text()
    entry = json.loads((tmp_path / "gradebook.json").read_text())["submissions"][0]
    assert (entry["submission"], entry["points"]) == ("bob", 100)


@pytest.mark.parametrize(
    "line, says",
    [
        ("eve,2.1,1,x", "there is no submission 'eve'"),
        ("ann,9.9,1,x", "there is no task '9.9'; there are 2.1, 2.2"),
        ("ann,2.1,1000,x", "0 to"),
        ("ann,2.1,many,x", "not 'many'"),
        ("ann,2.1,nan,x", "not 'nan'"),
    ],
)
def test_mistakes_in_what_is_given_by_hand_are_named(tmp_path, line, says):
    (tmp_path / gradebook.BY_HAND).write_text(f"submission,task,points,why\n{line}\n")
    with pytest.raises(ValueError, match="line 2") as raised:
        write(tmp_path, result("ann"))
    assert says in str(raised.value)
    (tmp_path / gradebook.BY_HAND).write_text("name;task\nann;2.1\n")
    with pytest.raises(ValueError, match="it must be submission,task,points,why"):
        write(tmp_path, result("ann"))


def test_moodle_s_names_make_a_grading_worksheet(tmp_path):
    write(
        tmp_path,
        result("Ann Müller_4711_assignsubmission_file_"),
        result("Al_x_12_assignsubmission_file_my-own work.v2", t2_1="failed"),
    )
    found = list(csv.reader(io.StringIO((tmp_path / "moodle-worksheet.csv").read_text())))
    assert found[0] == ["Identifier", "Full name", "Grade", "Last modified (grade)"]
    assert [row[:2] for row in found[1:]] == [["Participant 12", "Al_x"], ["Participant 4711", "Ann Müller"]]
    assert found[2][2] == "100" and int(found[1][2]) < 100
    write(tmp_path, result("ann"))
    assert not (tmp_path / "moodle-worksheet.csv").exists()


def test_whatever_is_handed_in_gets_a_row(tmp_path):
    folder = tmp_path / "class"
    (folder / "ann" / "exercises").mkdir(parents=True)
    for name in ("bob.rar", "cem.7z", "dan.tar.xz", "eve.py", "fay's work", ".DS_Store"):
        (folder / name).write_text("")
    found = submissions.find([folder])
    assert set(found) == {"ann", "bob.rar", "cem.7z", "dan", "eve.py", "fay's work"}
    for name, path in found.items():
        if name != "ann":
            with pytest.raises(submissions.SubmissionError, match=path.name):
                submissions.open_submission(path, tmp_path / "opened")


def test_one_folder_holds_the_grades_of_one_choice_of_labs(tmp_path):
    (tmp_path / "results").mkdir()
    results.keep_result(tmp_path, result("ann"))
    results.require_same_labs(tmp_path, PLAN)
    other = plan.Plan(("lab01_baseline",), 60, "this course", ("bubblewrap", ""))
    with pytest.raises(results.GradingError, match="lab02_zero_stages, and you ask for lab01_baseline"):
        results.require_same_labs(tmp_path, other)
