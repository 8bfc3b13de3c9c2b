"""The lab notebooks run from top to bottom with the solutions, and say what is missing with the skeletons."""

import os
import re

import nbformat
import pytest
from conftest import every_lab
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

from shardlab import hardware, switch
from shardlab.course import authoring
from shardlab.labs import named

pytestmark = pytest.mark.ranks

LABS = {path.stem: path for path in authoring.notebooks() if path.stem.startswith("lab")}


def outputs(cell) -> str:
    """Everything a code cell shows, as one text."""
    shown = []
    for output in cell.get("outputs", []):
        shown += [output.get("text", ""), output.get("data", {}).get("text/html", ""), output.get("data", {}).get("text/plain", "")]
        shown += [f"{output.get('ename', '')}: {output.get('evalue', '')}"]
    return "\n".join(shown)


@pytest.fixture(autouse=True)
def runs_elsewhere(monkeypatch, tmp_path):
    """A learner's own runs are not replaced."""
    monkeypatch.setenv("SHARDLAB_RUNS", str(tmp_path / "runs"))


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("stem", every_lab())
def test_lab_runs_with_the_solutions(stem, tmp_path, may_get):
    source = authoring.notebooks()[LABS[stem]]
    authoring.execute_notebook(source, tmp_path / "out.ipynb", switch.SOLUTIONS)
    notebook = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    tasks = authoring.tasks(named(stem).solution.read_text())
    shown = "\n".join(outputs(cell) for cell in notebook.cells if cell.cell_type == "code")
    verdicts = dict(re.findall(r">(\d+\.\d+) (passed|failed|not implemented|not run)<", shown))
    assert set(verdicts) == set(tasks) and set(verdicts.values()) <= may_get


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """One for all notebooks of which nothing is to run: to start it, with the ranks' fork server, takes longer than they do."""
    manager = KernelManager(kernel_name="python3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(switch.VARIABLE, str(switch.LEARNER))
        patch.setenv("SHARDLAB_RUNS", str(tmp_path_factory.mktemp("runs")))
        manager.start_kernel(cwd=str(hardware.ROOT))
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("stem", LABS)
def test_untouched_lab_names_the_task_that_is_missing(stem, kernel):
    notebook = nbformat.read(LABS[stem], as_version=4)
    client = NotebookClient(notebook, km=kernel, timeout=300, allow_errors=True)
    client.execute(reset_kc=True)
    tasks = authoring.tasks(named(stem).solution.read_text())
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.source.startswith("check("):
            for task in re.findall(r'check\("([\d.]+)"\)', cell.source):
                assert f"{task} not implemented" in outputs(cell)
                assert f"Task {task}:" in outputs(cell)
                tasks.remove(task)
    assert not tasks, "a task without a check in the notebook"


@pytest.mark.parametrize("path", [path for path in authoring.executed()], ids=lambda path: path.stem)
def test_stored_outputs_say_nothing_of_the_machine_they_were_made_on(path):
    text = path.read_text()
    assert str(hardware.ROOT) not in text and os.path.expanduser("~") + "/" not in text
    assert "Traceback" not in text


def test_lab_notebooks_carry_no_outputs():
    for path in LABS.values():
        assert all(not cell.get("outputs") for cell in nbformat.read(path, as_version=4).cells)
