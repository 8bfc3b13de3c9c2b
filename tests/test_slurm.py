"""Batch jobs: rendered scripts that shell and Slurm accept, refusals, and real jobs on a real Slurm, one of which loses a node."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
from conftest import cluster_command, cluster_missing

from shardlab import progress, switch
from shardlab.cluster import batch, slurm
from shardlab.cluster.batch import BatchError, JobSettings
from shardlab.cluster.site import LOCAL_PROFILE, PROFILE, SiteError, minutes, read_site
from shardlab.course.demo import METHODS
from shardlab.hardware import ROOT
from shardlab.labs import provided
from shardlab.run.experiment import Experiment
from shardlab.run.launch import launch
from shardlab.run.run_folder import Run, RunError

pytestmark = pytest.mark.jobs

VENV = Path(sys.prefix)
GPU_SITE = PROFILE.read_text().replace("CHANGE_ME", "course")
CONDA = 'kind = "conda"\npath = "shardlab"\nconda_setup = "/opt/conda/etc/profile.d/conda.sh"\n'
CONTAINER = 'kind = "container"\npath = "/apps/shard lab.sif"\ncontainer_command = "apptainer exec --nv {image}"\n'


def with_environment(text: str) -> str:
    begin, rest = GPU_SITE.split("[environment]\n")
    return f"{begin}[environment]\n{text}\n[variables]\n" + rest.split("[variables]\n")[1]


SITES = {
    "modules": GPU_SITE,
    "conda": with_environment(CONDA),
    "container": with_environment(CONTAINER),
    "local": LOCAL_PROFILE.read_text(),
}


@pytest.fixture
def site(tmp_path):
    def read(text: str):
        path = tmp_path / "site.toml"
        path.write_text(text)
        return read_site(path)

    return read


def settings_of(name: str, **changes) -> JobSettings:
    given = {"exercises": "/home/ada/my exercises"} if name == "grading" else {}
    given |= {"arguments": ["/home/ada/a class", "--out", "/home/ada/out"], "parts": 3} if name == "class" else {}
    return JobSettings(**given, **changes)


CASES = [(name, kind, launcher) for kind in SITES for name in batch.SCRIPTS for launcher in ("torchrun",)]
CASES += [("multi-node", "modules", "deepspeed"), ("multi-node", "modules", "srun")]


@pytest.mark.parametrize("name,kind,launcher", CASES)
def test_script_is_sound_and_every_directive_has_its_reason(name, kind, launcher, site, tmp_path):
    script = batch.render(name, settings_of(name, launcher=launcher), site(SITES[kind]))
    lines = script.splitlines()
    assert not [line for line in lines if line.startswith("# SBATCH")], "a space makes it a comment"
    numbers = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert len(numbers) >= 6
    for number in numbers:
        assert lines[number - 1].startswith("# "), f"line {number + 1} has no reason above it"
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert max(numbers) < first_command, "sbatch reads no directive behind the first command"
    assert "CHANGE_ME" not in script and "{{" not in script
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed: apt-get install shellcheck")
    done = subprocess.run(["shellcheck", "-"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", batch.SCRIPTS)
def test_slurm_accepts_the_script(name, slurm_cluster, site):
    slurm.submit(batch.render(name, settings_of(name), read_site(LOCAL_PROFILE)), test_only=True)


def test_slurm_refuses_what_cannot_run(slurm_cluster, site):
    """So the test above can fail."""
    script = batch.render("multi-node", JobSettings(nodes=3), site(SITES["local"].replace("max_nodes = 2", "max_nodes = 3")))
    with pytest.raises(slurm.SlurmError, match="Requested node configuration is not available|more nodes|Node count"):
        slurm.submit(script, test_only=True)


@pytest.mark.parametrize(
    "name,changes,says",
    [
        ("multi-node", {"nodes": 0}, "at least 1 node"),
        ("multi-node", {"nodes": -2}, "at least 1 node"),
        ("multi-node", {"nodes": 5}, "max_nodes"),
        ("baseline", {"nodes": 2}, "multi-node"),
        ("multi-node", {"gpus_per_node": 5}, "gpus_per_node"),
        ("multi-node", {"gpus_per_node": 0}, "one each"),
        ("multi-node", {"ranks_per_node": 2}, "one rank per GPU"),
        ("multi-node", {"time": "5:00:00"}, "max_time"),
        ("multi-node", {"time": "soon"}, "soon"),
        ("multi-node", {"time": "0:00:00"}, "needs some"),
        ("grading", {}, "--exercises"),
        ("class", {}, "shardlab grade"),
        ("multinode", {}, "there are baseline"),
    ],
)
def test_the_impossible_is_refused_before_submission(name, changes, says, site):
    with pytest.raises(BatchError, match=says):
        batch.render(name, JobSettings(**changes), site(GPU_SITE))


@pytest.mark.parametrize(
    "words,says",
    [
        (["--node", "2"], "--node"),
        (["--", "--methd", "ZeRO-2"], "--methd"),
        (["--", "--method", "ZeRO-9"], "no method 'ZeRO-9'"),
        (["--", "--steps", "0"], "--steps"),
        (["--launcher", "mpirun"], "mpirun"),
        (["--site", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_a_wrong_option_is_refused_before_submission(words, says):
    """Also one for `shardlab run`, which would be read in the job only."""
    arguments = ["slurm", "render", "multi-node", "--site", str(LOCAL_PROFILE), *words]
    done = subprocess.run([sys.executable, "-m", "shardlab.cli", *arguments], capture_output=True, text=True)
    assert done.returncode and says in done.stderr and "Traceback" not in done.stderr
    assert "#SBATCH" not in done.stdout


@pytest.mark.parametrize(
    "old,new,says",
    [
        ('interface = "ib0"', "", "interface"),
        ("max_nodes = 4", "max_nodes = 0", "max_nodes"),
        ('max_time = "4:00:00"', 'max_time = "4 hours"', "4 hours"),
        ("cores_per_task = 8 ", "cores_per_task = 80 ", "cores_per_node"),
        ('kind = "venv"', 'kind = "conda"', "conda_setup"),
        ('kind = "venv"', 'kind = "docker"', "environment.kind"),
        ("offline = true", "offlin = true", "offlin"),
        ("max_nodes = 4", "max_nodes = ", "TOML"),
        ('account = "course"', 'account = "CHANGE_ME"', "line 9"),
    ],
)
def test_a_bad_profile_is_refused_in_a_sentence(old, new, says, site):
    assert old in GPU_SITE
    with pytest.raises(SiteError, match=says):
        site(GPU_SITE.replace(old, new, 1))


def test_the_shipped_profile_asks_to_be_adapted():
    with pytest.raises(SiteError, match="CHANGE_ME"):
        read_site(PROFILE)
    with pytest.raises(SiteError, match="no such site profile"):
        read_site(ROOT / "slurm" / "nowhere.toml")


def test_times_as_slurm_writes_them():
    assert [minutes(text) for text in ("30:00", "1:30:00", "2-01:00:00", "0:30")] == [30, 90, 2940, 0.5]


def test_no_script_names_anything_of_a_site():
    for path in (ROOT / "slurm" / "scripts").iterdir():
        text = path.read_text()
        assert not [word for word in ("--account", "--partition", "ib0", "eth0", "/scratch", "module load p") if word in text], (
            path.name
        )


# --- the local cluster ----------------------------------------------------------------------------------------------


def test_the_cluster_leaves_nothing_behind(tmp_path, monkeypatch):
    """Beside one that may be up already, which it does not touch."""
    if why := cluster_missing():
        pytest.skip(why)
    folder = Path(f"/tmp/shardlab-test-{os.getpid()}")
    monkeypatch.setenv("SHARDLAB_CLUSTER", str(folder))
    monkeypatch.delenv("SLURM_CONF", raising=False)

    def interfaces() -> set[str]:
        return set(os.listdir("/sys/class/net"))

    def processes() -> list[str]:
        return [
            name
            for name in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout.splitlines()
            if str(folder) in name
        ]

    before = interfaces()
    try:
        cluster_command("up")
        assert slurm.missing() is None and slurm.is_local()
        assert "node1" in cluster_command("status") and "already" in cluster_command("up")
        job = slurm.submit("#!/bin/bash\nsrun sleep 300\n", "--nodes=2", "--output=/dev/null")
        deadline = time.monotonic() + 30
        while slurm.job(job).state != "RUNNING" and time.monotonic() < deadline:
            time.sleep(0.2)
        assert slurm.job(job).state == "RUNNING"
        assert processes()
    finally:
        cluster_command("down")
    assert not folder.exists() and interfaces() == before and not processes()


def started_cluster(folder: Path, **more: str) -> subprocess.Popen:
    env = {name: value for name, value in os.environ.items() if name != "SLURM_CONF"} | {"SHARDLAB_CLUSTER": str(folder)} | more
    script = [ROOT / "slurm" / "local_cluster.sh", "up"]
    return subprocess.Popen(script, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_clusters_that_start_at_once_do_not_meet():
    if why := cluster_missing():
        pytest.skip(why)
    folders = [Path(f"/tmp/shardlab-test-{os.getpid()}-{name}") for name in "ab"]
    starting = [started_cluster(folder) for folder in folders]
    said = [process.communicate(timeout=90)[0] for process in starting]
    try:
        assert [process.returncode for process in starting] == [0, 0], said
        configurations = [folder.joinpath("slurm.conf").read_text() for folder in folders]
        ports = [set(re.findall(r"Port=(\d+)", text)) for text in configurations]
        assert len(ports[0]) == 3 and not ports[0] & ports[1]
        for folder in folders:
            hosts = ["srun", "--nodes=2", "hostname"]
            done = subprocess.run(hosts, env=os.environ | {"SLURM_CONF": f"{folder}/slurm.conf"}, capture_output=True, timeout=60)
            assert done.returncode == 0, done.stderr
    finally:
        for folder in folders:
            down = [ROOT / "slurm" / "local_cluster.sh", "down"]
            subprocess.run(down, env=os.environ | {"SHARDLAB_CLUSTER": str(folder)}, capture_output=True, timeout=60)


def test_a_cluster_that_does_not_come_up_leaves_its_logs_alone(tmp_path):
    if why := cluster_missing():
        pytest.skip(why)
    (tmp_path / "slurmctld").write_text("#!/bin/sh\necho no controller today >&2\nexit 3\n")
    (tmp_path / "slurmctld").chmod(0o755)
    with tempfile.TemporaryDirectory(prefix="shardlab-") as parent:
        folder = Path(parent, "c")
        process = started_cluster(folder, PATH=f"{tmp_path}:{os.environ['PATH']}")
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 1 and "no controller today" in said
        assert os.listdir(parent) == ["c.failed"] and "slurmctld.out" in os.listdir(f"{parent}/c.failed")
        left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
        assert str(folder) not in left, "a munged that nobody ends"


def test_the_cluster_says_what_is_missing(tmp_path):
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("bash", "id", "cksum", "cut", "sort", "tr"):
        (commands / name).symlink_to(shutil.which(name))
    script = (ROOT / "slurm" / "local_cluster.sh").read_text().replace("PATH=$PATH:/usr/sbin:/sbin", "")
    done = subprocess.run(
        [shutil.which("bash"), "-s", "up"], input=script, capture_output=True, text=True,
        env={"PATH": str(commands), "SHARDLAB_CLUSTER": str(tmp_path / "c")},
    )  # fmt: skip
    assert done.returncode == 1 and "apt-get install munge slurm-wlm" in done.stderr


def test_the_cluster_needs_an_address_and_says_so_at_once():
    """A laptop without any network, and an ordinary account: here a namespace whose loopback alone is there."""
    if missing := cluster_missing():
        pytest.skip(missing)
    alone = ["unshare", "--user", "--map-user=1000", "--map-group=1000", "--net"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces for this account")
    with tempfile.TemporaryDirectory(prefix="shardlab-") as folder:  # a short path: Slurm's sockets would lie in it
        done = subprocess.run(
            [*alone, ROOT / "slurm" / "local_cluster.sh", "up"],
            capture_output=True, text=True, timeout=20, env=os.environ | {"SHARDLAB_CLUSTER": f"{folder}/c"},
        )  # fmt: skip
        assert done.returncode == 1 and "no network address" in done.stderr and "ip addr add" in done.stderr
        assert not Path(folder, "c").exists()


# --- real jobs ------------------------------------------------------------------------------------------------------

STEPS = 40
TRAIN = ["--method", "ZeRO-2", "--steps", str(STEPS), "--micro-batch", "2", "--accumulation", "1", "--max-tokens", "64"]
TRAIN += ["--learning-rate", "1e-3", "--no-evaluate", "--save-every", "5"]


@pytest.fixture(scope="module")
def local_site(slurm_cluster, tmp_path_factory):
    """The local profile, with its run folders in a temporary folder."""
    path = tmp_path_factory.mktemp("site") / "site.toml"
    text = LOCAL_PROFILE.read_text().replace('scratch = "runs"', f'scratch = "{tmp_path_factory.mktemp("runs")}"')
    path.write_text(text)
    return read_site(path)


@pytest.fixture(scope="module")
def one_node_losses(tmp_path_factory):
    """The same training, with both ranks on one node and without Slurm."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(switch.VARIABLE, str(switch.SOLUTIONS))
        switch.use_exercises(switch.SOLUTIONS)
        config = switch.import_exercise("lab02_zero_stages").create_deepspeed_config(**METHODS["ZeRO-2"])
        settings = {
            "program": provided("finetune"),
            "steps": STEPS,
            "micro_batch": 2,
            "accumulation": 1,
            "max_tokens": 64,
            "learning_rate": 1e-3,
            "eval_examples": 200,
        }
        experiment = Experiment(name="one-node", ranks=2, deepspeed=config, evaluate=False, **settings)
        return launch(experiment, runs=tmp_path_factory.mktemp("one"), display=progress.Quiet(), or_cpu=True)[0].losses()


def submit(site, **changes) -> tuple[int, Path]:
    return batch.submit("multi-node", JobSettings(solutions=True, arguments=TRAIN, **changes), site)


# Seconds within which a job has reached what a test waits for, on a slow machine that does other work: 90 were too few once.
PATIENCE = 400


def wait_for(number: int) -> slurm.Job:
    job = slurm.follow(number, limit=PATIENCE, display=progress.Quiet())
    assert job.state == "COMPLETED", f"{job}\n{slurm.log_tail(number, 60)}"
    return job


def wait_for_steps(number: int, folder: Path, steps: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while not (folder / "metrics.jsonl").exists() or len((folder / "metrics.jsonl").read_text().splitlines()) < steps:
        assert time.monotonic() < deadline, f"{slurm.job(number)}: no {steps} steps\n{slurm.log_tail(number, 60)}"
        time.sleep(0.05)


def agree(losses: list[float], others: list[float]) -> bool:
    return len(losses) == len(others) and max(abs(a - b) for a, b in zip(losses, others)) <= 1e-5


def test_a_controller_that_does_not_answer_is_asked_again(slurm_cluster):
    """Longer than Slurm's commands wait for it; what changes something is refused then, and not repeated."""
    number = slurm.submit("#!/bin/sh\n", "--output=/dev/null")
    controller = psutil.Process(int((slurm.local_state() / "slurmctld.pid").read_text()))
    controller.suspend()
    try:
        with pytest.raises(slurm.SlurmError, match=slurm.UNHEARD):
            slurm.command("scontrol", "--oneliner", "show", "job", str(number))
        threading.Timer(1, controller.resume).start()
        assert slurm.job(number).number == str(number)
    finally:
        controller.resume()


@pytest.mark.timeout(1000)
def test_a_job_that_loses_a_node_goes_on_and_ends_with_the_same_curve(local_site, one_node_losses):
    number, folder = submit(local_site)
    wait_for_steps(number, folder, 12)
    cluster_command("kill", "node2")
    cluster_command("start", "node2")
    job = wait_for(number)
    run = Run.read(folder)
    assert job.restarts == 1 and run.outcome == "finished"
    assert 12 <= run.record_json["earlier"][0]["steps"] < STEPS, "it had not ended before"
    assert [row["step"] for row in run.metrics()] == list(range(1, STEPS + 1))
    assert agree(run.losses(), one_node_losses)
    assert set(run.memory()) == {"rank0", "rank1"}


@pytest.mark.timeout(1000)
def test_a_signal_before_the_time_limit_saves_and_requeues(local_site, one_node_losses):
    number, folder = submit(local_site)
    wait_for_steps(number, folder, 8)
    slurm.command("scancel", "--signal=USR1", "--batch", str(number))
    job = wait_for(number)
    run = Run.read(folder)
    first = run.record_json["earlier"][0]
    assert job.restarts == 1 and first["outcome"] == "stopped" and 8 <= first["steps"] < STEPS
    assert agree(run.losses(), one_node_losses)


@pytest.mark.timeout(1000)
def test_two_jobs_side_by_side_and_the_other_launchers(local_site, one_node_losses):
    """Both run at once on the same nodes: they share neither port nor folder."""
    jobs = [submit(local_site, launcher=launcher) for launcher in ("deepspeed", "srun")]
    together = False
    while not all(slurm.job(number).is_over for number, _ in jobs):
        together = together or all(slurm.job(number).state == "RUNNING" for number, _ in jobs)
        time.sleep(0.5)
    for number, folder in jobs:
        wait_for(number)
        assert agree(Run.read(folder).losses(), one_node_losses)
        assert Run.read(folder).states()["ranks"][0]["optimizer"] > 0
    assert together


@pytest.mark.timeout(1000)
def test_a_course_on_a_path_with_spaces(slurm_cluster, tmp_path):
    course = tmp_path / "my course"
    for part in ("src", "slurm", "labs", "solutions"):
        shutil.copytree(ROOT / part, course / part, ignore=shutil.ignore_patterns("__pycache__"))
    profile = course / "slurm" / "local.toml"
    profile.write_text(profile.read_text() + f'PYTHONPATH = "{course / "src"}"\n')
    arguments = ["slurm", "submit", "multi-node", "--solutions", "--follow", "--", *TRAIN, "--steps", "3"]
    environment = os.environ | {"PYTHONPATH": str(course / "src")}
    done = subprocess.run(
        [sys.executable, "-m", "shardlab.cli", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = Run.read(next((course / "runs").glob("multi-node-*/run.json")).parent)
    assert run.outcome == "finished" and len(run.losses()) == 3


@pytest.mark.timeout(1000)
@pytest.mark.parametrize(
    "on_second_node,address,says",
    [
        ("export HF_HOME=/nowhere", "$first", "node2: the cache HF_HOME=/nowhere is not there"),
        ("sleep 30", "$first", "node2: no word from rank 1"),
        (":", "127.0.0.1", "node2 cannot reach the first node at 127.0.0.1"),
        (":", "$first", "preflight: 2 ranks reach each other"),
    ],
)
def test_preflight_names_the_node_that_fails(on_second_node, address, says, slurm_cluster, tmp_path):
    if not (slurm.local_state() / "namespaces").exists():
        pytest.skip("the nodes share this machine's network here, so 127.0.0.1 is right")
    script = f"""#!/bin/bash
source '{VENV}/bin/activate'
first=$(getent ahostsv4 "$(hostname)" | awk 'NR == 1 {{print $1}}')
srun --kill-on-bad-exit=1 bash -c '[ "$SLURM_NODEID" = 0 ] || {{ {on_second_node}; }}
exec python -m shardlab.cluster.preflight --address "$1" --port 31999 --runs "$2" --seconds 8' bash "{address}" '{tmp_path}'
"""
    number = slurm.submit(script, "--nodes=2", "--ntasks-per-node=1", f"--output={tmp_path}/log", "--exclusive")
    deadline = time.monotonic() + 60
    while not slurm.job(number).is_over and time.monotonic() < deadline:
        time.sleep(0.3)
    log = (tmp_path / "log").read_text()
    assert says in log, log
    assert slurm.job(number).state == ("COMPLETED" if says.startswith("preflight") else "FAILED")


# --- run folders that go on -----------------------------------------------------------------------------------------


def test_a_run_is_continued_and_keeps_what_it_has(tmp_path):
    experiment = Experiment(name="again", save_every=2)
    run = Run.create(experiment, tmp_path)
    run.start()
    for step in range(1, 6):
        run.log_step(step=step, loss=1.0 / step)
    run.finish("failed", "lost a node")
    again = Run.reopen(experiment, tmp_path)
    again.keep_steps(4)
    assert [row["step"] for row in again.metrics()] == [1, 2, 3, 4]
    earlier = Run.read(run.folder).record_json["earlier"]
    assert [(life["outcome"], life["reason"], life["steps"]) for life in earlier] == [("failed", "lost a node", 5)]
    assert "reason" not in json.loads((run.folder / "run.json").read_text())


def test_another_experiment_is_not_continued(tmp_path):
    Run.create(Experiment(name="again", steps=5), tmp_path).finish()
    with pytest.raises(RunError, match="steps 5 → 6"):
        Run.reopen(Experiment(name="again", steps=6), tmp_path)


def test_a_run_that_was_ended_before_its_first_checkpoint_begins_anew(tmp_path):
    settings = {
        "program": "shardlab.run.training:train_text",
        "ranks": 1,
        "micro_batch": 2,
        "accumulation": 1,
        "steps": 4,
        "max_tokens": 32,
    }
    experiment = Experiment(name="early", evaluate=False, save=False, save_every=4, **settings)
    run = Run.create(experiment, tmp_path)
    run.start()
    run.log_step(step=1, loss=99.0)
    run.log_step(step=2, loss=98.0)
    (tmp_path / "experiment.json").write_text(experiment.model_dump_json())
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    command = [sys.executable, "-m", "shardlab.run.ranks", str(tmp_path / "experiment.json"), str(tmp_path)]
    # The second time it is started again after its last step: there is nothing left to train.
    for steps_before in (2, 4):
        done = subprocess.run(command, env=os.environ | rank, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        run = Run.read(run.folder)
        assert run.outcome == "finished"
        assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4] and max(run.losses()) < 50
        assert run.record_json["earlier"][-1]["steps"] == steps_before
        assert "train_runtime" in run.results["log_history"][-1], "programs read there how training went"


# --- a class ----------------------------------------------------------------------------------------------------------


def handed_in(folder, count: int):
    for number in range(count):
        package = folder / f"learner {number}" / "exercises"
        package.mkdir(parents=True)
        shutil.copy(batch.ROOT / "src" / "exercises" / "lab02_zero_stages.py", package)
    return folder


def grading(folder, out) -> list[str]:
    words = ["grade", str(folder), "--out", str(out), "--labs", "2", "--slurm", "--jobs", "2"]
    return [sys.executable, "-m", "shardlab.cli", *words]


def needs_walls() -> None:
    from shardlab.sandbox import boxes

    if boxes.isolation()[0] != "bubblewrap":
        pytest.skip(boxes.isolation()[1])


def test_a_class_is_graded_in_an_array_job(slurm_cluster, tmp_path):
    needs_walls()
    out = tmp_path / "graded here"
    done = subprocess.run(grading(handed_in(tmp_path / "a class", 3), out), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "3 of 3 graded" in done.stdout, done.stdout + done.stderr
    rows = (out / "gradebook.csv").read_text().splitlines()
    assert len(rows) == 4 and all(row.split(",")[1:3] == ["0", "100"] for row in rows[1:])
    assert not (out / ".work").exists()


def test_interrupted_grading_cancels_its_jobs(slurm_cluster, tmp_path):
    needs_walls()
    process = subprocess.Popen(grading(handed_in(tmp_path / "class", 4), tmp_path / "out"), stdout=subprocess.PIPE, text=True)
    assert "4 submissions to grade" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    end = time.monotonic() + 60
    while (left := slurm.command("squeue", "--noheader", "--name=shardlab-class").strip()) and time.monotonic() < end:
        time.sleep(0.5)
    assert not left
    assert "not graded yet" in (tmp_path / "out" / "gradebook.csv").read_text()
