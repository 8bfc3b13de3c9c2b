"""Real ranks: what they compute, what they hold and record, and that none of them outlives its launch."""

import json
import math
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from shardlab import switch
from shardlab.milestones.small_runs import zero_config
from shardlab.progress import Quiet
from shardlab.run.experiment import Experiment
from shardlab.run.launch import LaunchTimeout, RankError, launch
from shardlab.run.run_folder import Run, RunError
from shardlab.run.samplers import read_samples
from shardlab.zero.engine_model import engine_bytes, whole_parameters
from shardlab.zero.memory_model import ddp_bytes

pytestmark = pytest.mark.ranks

launch = partial(launch, or_cpu=True)  # with one GPU these ranks run on the CPU, as those of milestones do

PROGRAMS = '''
"""What the ranks of these tests run."""

import gc
import os
import signal
import sys
import subprocess
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist


def who(experiment, run):
    return {"pid": os.getpid(), "file": __file__, "group": dist.is_initialized(), "world": os.environ.get("WORLD_SIZE"),
            "port": os.environ.get("MASTER_PORT")}


def what_deepspeed_leaves(experiment, run):
    if experiment.deepspeed:
        import deepspeed

        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
            "zero_optimization": {"stage": 3},
        }
        engine = deepspeed.initialize(model=torch.nn.Linear(4, 999), config=settings)[0]
        engine.backward(engine(torch.ones(1, 4)).sum())
        engine.step()
        del engine
    gc.collect()
    states = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor) and one.numel() > 1000]
    return {"linear": torch.nn.functional.linear.__module__, "states": len(states)}


def one_rank_raises(experiment, run):
    if dist.get_rank() == 1:
        print("rank 1 says why", file=sys.stderr)
        raise ValueError("this rank cannot go on")
    dist.barrier()


def one_rank_is_killed(experiment, run):
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if experiment.data == "barrier":
        dist.barrier()
    time.sleep(600)


def one_rank_aborts(experiment, run):
    if dist.get_rank() == 1:
        print("pages cannot be locked", file=sys.stderr, flush=True)
        os.abort()
    time.sleep(600)


def one_rank_raises_and_both_have_workers(experiment, run):
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(experiment.data, str(worker.pid)).touch()
    dist.barrier()
    if dist.get_rank() == 1:
        raise ValueError("with a worker")
    time.sleep(600)


def one_rank_leaves(experiment, run):
    if dist.get_rank() == 1:
        os._exit(3)
    time.sleep(600)


def never_ends(experiment, run):
    if dist.get_rank() == 0:
        run.log_step(step=1, loss=2.0, samples_per_second=1.0, steps=9, port=os.environ["MASTER_PORT"])
    time.sleep(600)


def never_stops_computing(experiment, run):
    while dist.get_rank() == 0:
        pass
    time.sleep(600)


def meet(experiment, run):
    """It ends only if the ranks of two launches are there at the same time."""
    place, total = Path(experiment.data), torch.ones(1)
    dist.all_reduce(total)
    (place / f"{run.folder.parent.name}-{dist.get_rank()}").touch()
    deadline = time.monotonic() + 300
    while len(list(place.iterdir())) < 4:
        if time.monotonic() > deadline:
            raise TimeoutError(f"only {sorted(path.name for path in place.iterdir())} came")
        time.sleep(0.02)
    dist.all_reduce(total)
    return {"total": total.item()}
'''


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """A folder with an `exercises` package that holds the programs above; ranks import them from there."""
    folder = tmp_path_factory.mktemp("course")
    (folder / "exercises").mkdir()
    (folder / "exercises" / "__init__.py").write_text("")
    (folder / "exercises" / "troubles.py").write_text(PROGRAMS)
    variable, path = os.environ.get(switch.VARIABLE), sys.path[:]
    yield switch.use_exercises(folder)
    sys.path[:] = path
    os.environ.pop(switch.VARIABLE)
    if variable is not None:
        os.environ[switch.VARIABLE] = variable


def zero(stage: int, **offload: bool) -> dict:
    parts = {part: {"device": "cpu"} for part in offload}
    return zero_config({"stage": stage} | parts, adam={"lr": "auto", "weight_decay": "auto"} if offload else None)


def program(name: str, function: str, **settings) -> Experiment:
    return Experiment(name=name, program=f"exercises.troubles:{function}", **({"ranks": 2} | settings))


def ranks_of(server: psutil.Process) -> list[psutil.Process]:
    """The ranks that a fork server has started and that still run."""
    return [child for child in server.children() if child.status() != psutil.STATUS_ZOMBIE]


def ranks_here() -> list[psutil.Process]:
    """The ranks that this process has started and that still run."""
    return ranks_of(psutil.Process(multiprocessing.forkserver._forkserver._forkserver_pid))


def shared_memory(port: str) -> list[str]:
    """DeepSpeed's all-reduce buffers on the CPU, 66 MiB a rank, by the port of their launch."""
    return [path.name for path in Path("/dev/shm").glob(f"deepspeed_*_{port}_*")]


def gone(processes: list[psutil.Process], seconds: float = 10) -> bool:
    """Whether all of them end in that time; a zombie has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes):
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def no_rank_is_left():
    """After the test, every rank that it launched has ended."""
    yield
    deadline = time.monotonic() + 10
    while ranks_here() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ranks_here() == []


# --- training ---------------------------------------------------------------------------------------------------------

METHODS = {
    "zero1": (1, {}),
    "zero2": (2, {}),
    "zero3": (3, {}),
    "zero2-offload": (2, {"offload_optimizer": True}),
    "zero3-offload": (3, {"offload_optimizer": True, "offload_param": True}),
}
TRAINED = ["ddp", *METHODS]
STEPS = 4


def training(name: str, **changes) -> Experiment:
    """A few fp32 steps on text. The rows differ in length, so a mean over the wrong tokens would show in the loss."""
    settings = {
        "program": "shardlab.run.training:train_text",
        "ranks": 2,
        "micro_batch": 2,
        "accumulation": 2,
        "steps": STEPS,
        "learning_rate": 1e-3,
        "max_tokens": 80,
        "train_examples": 64,
        "evaluate": False,
        "save": False,
        "seed": 3,
    }
    return Experiment(name=name, **(settings | changes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Run]:
    """DDP, three stages and two offloads on two ranks, and a lone rank with the same global batch: all in one launch."""
    experiments = [training("ddp")]
    experiments += [training(name, deepspeed=zero(stage, **offload)) for name, (stage, offload) in METHODS.items()]
    experiments += [training("lone", ranks=1, micro_batch=4)]
    runs = launch(experiments, runs=tmp_path_factory.mktemp("trained"), display=Quiet())
    assert [run.name for run in runs] == [experiment.name for experiment in experiments]
    return {run.name: run for run in runs}


def test_every_run_finishes_and_learns(trained):
    for name, run in trained.items():
        assert (run.outcome, run.reason) == ("finished", None), name
        assert len(run.losses()) == STEPS and all(map(math.isfinite, run.losses())), name
        assert len(set(run.losses())) == STEPS, f"{name}: losses that do not move"


@pytest.mark.parametrize("name", METHODS)
def test_zero_is_the_same_mathematics_as_ddp(trained, name):
    assert trained[name].losses() == pytest.approx(trained["ddp"].losses(), abs=1e-5)


def test_two_ranks_do_what_a_lone_rank_does_with_the_same_global_batch(trained):
    assert trained["lone"].experiment.global_batch == trained["ddp"].experiment.global_batch
    assert trained["lone"].losses() == pytest.approx(trained["ddp"].losses(), abs=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_each_rank_holds_what_the_formula_says(trained, name):
    stage, offload = METHODS[name]
    states = trained[name].states()
    assert len(states["ranks"]) == 2
    assert sum(map(sum, states["groups"])) == states["parameters"]
    predicted = engine_bytes(stage, states["groups"], 2, precision="fp32", **offload)
    whole = whole_parameters(states["groups"], 2)
    for rank, held in enumerate(states["ranks"]):
        # Stage 2 adds micro-batches up on the host for all parameters that lie in the shard; the formula gives the larger rank.
        less = 4 * (max(whole) - whole[rank]) if (stage, bool(offload)) == (2, True) else 0
        assert held == asdict(replace(predicted, host_gradients=predicted.host_gradients - less)), f"rank {rank}"


@pytest.mark.parametrize("name, ranks", [("ddp", 2), ("lone", 1)])
def test_plain_trainer_holds_sixteen_bytes_a_parameter(trained, name, ranks):
    states = trained[name].states()
    assert states["ranks"] == [asdict(ddp_bytes(states["parameters"]))] * ranks


def test_metrics_have_a_line_a_step(trained):
    for name, run in trained.items():
        rows = run.metrics()
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), name
        for row in rows:
            assert min(row[key] for key in ("loss", "seconds", "samples_per_second", "tokens_per_second")) > 0, name
            assert row["steps"] == STEPS, name
            over_all_ranks = run.experiment.global_batch / row["seconds"]
            assert row["samples_per_second"] == pytest.approx(over_all_ranks, rel=0.01), name


def test_memory_is_sampled_on_every_rank(trained):
    for name, run in trained.items():
        samples = read_samples(run.folder / "memory.csv")
        assert set(samples) == {f"rank{rank}" for rank in range(run.experiment.ranks)}, name
        for device, rows in samples.items():
            assert len(rows) >= 2, f"{name}, {device}: a sample at the start and one at the end"
            assert all(used > run.states()["ranks"][0]["parameters"] for _, used in rows), name


def test_record_is_whole(trained):
    for run in trained.values():
        record = json.loads((run.folder / "run.json").read_text())
        assert record["experiment"] == run.experiment.model_dump()
        assert record["started"] <= record["ended"]
        assert run.results["parameters"] == run.states()["parameters"]


# --- how ranks are started --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_rank_is_left")
def test_equal_worlds_share_their_processes(programs, tmp_path):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    environment = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", switch.VARIABLE)}
    experiments = [program("a", "who"), program("b", "who"), program("alone", "who", ranks=1), program("c", "who")]
    a, b, alone, c = (run.results for run in launch(experiments, runs=tmp_path, display=Quiet()))
    assert a["pid"] == b["pid"]
    assert len({os.getpid(), a["pid"], alone["pid"], c["pid"]}) == 4
    assert (a["group"], a["world"]) == (True, "2")
    assert (alone["group"], alone["world"]) == (False, None), "a lone rank without DeepSpeed is a plain process"
    assert {Path(r["file"]).parent for r in (a, b, alone, c)} == {programs / "exercises"}
    # The caller keeps its signal handlers and its environment.
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers
    assert {name: os.environ.get(name) for name in environment} == environment


@pytest.mark.usefixtures("programs", "no_rank_is_left")
def test_a_run_after_zero3_finds_nothing_of_it(tmp_path):
    """The first assertion says that DeepSpeed still leaves something; if it fails, nothing has to be undone any more."""
    plans = [program("deep", "what_deepspeed_leaves", deepspeed=zero(3)), program("plain", "what_deepspeed_leaves")]
    deep, plain = (run.results for run in launch(plans, runs=tmp_path, display=Quiet()))
    assert deep["linear"].startswith("deepspeed") and deep["states"] >= 3
    assert not (plain["linear"] or "").startswith("deepspeed") and plain["states"] == 0


@pytest.mark.usefixtures("programs", "no_rank_is_left")
def test_launch_leaves_no_shared_memory(tmp_path):
    """Buffers that stay in /dev/shm are memory that nobody gets back before the machine is started again."""
    (run,) = launch(program("deep", "who", deepspeed=zero(1)), runs=tmp_path, display=Quiet())
    assert run.results["group"]
    assert shared_memory(run.results["port"]) == []


def test_two_experiments_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="names of their own"):
        launch([training("same"), training("other"), training("same")], runs=tmp_path / "runs", display=Quiet())
    assert not (tmp_path / "runs").exists()


def test_refused_launch_leaves_no_run_that_seems_to_go_on(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("All of it.")
    with pytest.raises(RunError, match="not a run folder"):
        launch([training("first"), training("thesis")], runs=tmp_path, display=Quiet())
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "All of it."
    Run.create(training("first"), tmp_path)  # refused if a run of that name goes on


# --- ranks that fail --------------------------------------------------------------------------------------------------


def failed_launch(function: str, folder: Path, **settings) -> RankError:
    """The error of a launch of three experiments, the second of which fails."""
    experiments = [program("before", "who"), program("trouble", function, **settings), program("after", "who")]
    with pytest.raises(RankError) as caught:
        launch(experiments, runs=folder, timeout=60, display=Quiet())
    error = caught.value
    assert error.experiment == "trouble"
    assert str(error).startswith(f"rank {error.rank} failed in 'trouble': {error.error}")
    runs = {name: Run.read(folder / name) for name in ("before", "trouble", "after")}
    assert {name: run.outcome for name, run in runs.items()} == {"before": "finished", "trouble": "failed", "after": "not run"}
    assert error.error in runs["trouble"].reason
    return error


@pytest.mark.usefixtures("programs", "no_rank_is_left")
def test_rank_that_raises_ends_the_others_and_is_named(tmp_path):
    error = failed_launch("one_rank_raises", tmp_path)
    assert (error.rank, error.error) == (1, "ValueError: this rank cannot go on")
    assert "Traceback" in error.rank_traceback
    assert "troubles.py" in error.rank_traceback and "in one_rank_raises" in error.rank_traceback
    assert error.rank_traceback.strip() in str(error)
    logs = {path.name: path.read_text() for path in (tmp_path / "trouble").glob("*.log")}
    assert "rank 1 says why" in logs["rank1.stderr.log"], "what it printed is kept in the run folder"


@pytest.mark.usefixtures("programs", "no_rank_is_left")
@pytest.mark.parametrize("the_other", ["sleeps", "barrier"])
def test_rank_that_is_killed_is_named_with_its_signal(tmp_path, the_other):
    """In a barrier the other rank fails too, with a lost connection; that is not the cause."""
    error = failed_launch("one_rank_is_killed", tmp_path, data=the_other)
    assert error.rank == 1
    assert "killed by SIGKILL" in error.error and "out of memory" in error.error


@pytest.mark.usefixtures("programs", "no_rank_is_left")
def test_rank_that_aborts_is_quoted(tmp_path):
    error = failed_launch("one_rank_aborts", tmp_path)
    assert error.rank == 1 and "killed by SIGABRT" in error.error and "pages cannot be locked" in error.error


@pytest.mark.usefixtures("programs", "no_rank_is_left")
def test_what_ranks_have_started_ends_with_them(tmp_path):
    """Such as the workers of a data loader: those of the rank that raised, and those of the rank that was ended."""
    workers = tmp_path / "workers"
    workers.mkdir()
    failed_launch("one_rank_raises_and_both_have_workers", tmp_path, data=str(workers))
    pids = [int(path.name) for path in workers.iterdir()]
    assert len(pids) == 2
    assert gone([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]), "a worker outlived its rank"


@pytest.mark.usefixtures("programs", "no_rank_is_left")
def test_rank_that_leaves_is_named_with_its_status(tmp_path):
    error = failed_launch("one_rank_leaves", tmp_path)
    assert error.rank == 1
    assert "exit status 3" in error.error


@pytest.mark.usefixtures("programs", "no_rank_is_left")
@pytest.mark.parametrize(
    "path, words", [("exercises.nowhere:who", "ModuleNotFoundError"), ("exercises.troubles:nowhere", "AttributeError")]
)
def test_program_that_is_not_there_is_a_failure_of_its_run(tmp_path, path, words):
    with pytest.raises(RankError, match="nowhere") as caught:
        launch(Experiment(name="trouble", program=path, ranks=2), runs=tmp_path, timeout=60, display=Quiet())
    assert caught.value.error.startswith(words)
    assert Run.read(tmp_path / "trouble").outcome == "failed"


@pytest.mark.usefixtures("programs", "no_rank_is_left")
def test_launch_that_takes_too_long_is_ended(tmp_path):
    experiments = [program("endless", "never_ends", deepspeed=zero(1)), program("after", "who")]
    with pytest.raises(LaunchTimeout, match="limit of 10 s .* none computes") as caught:
        launch(experiments, runs=tmp_path, timeout=10, display=Quiet())
    assert caught.value.waiting
    endless = Run.read(tmp_path / "endless")
    assert endless.outcome == "timed out"
    assert "limit of 10 s" in endless.reason
    assert endless.losses() == [2.0], "what it had written is still there"
    assert Run.read(tmp_path / "after").outcome == "not run"
    assert shared_memory(endless.metrics()[0]["port"]) == []


@pytest.mark.usefixtures("programs", "no_rank_is_left")
def test_ranks_that_compute_get_more_time_and_are_not_said_to_wait(tmp_path):
    """On a busy machine ranks are slow, and not stuck."""
    began = time.monotonic()
    with pytest.raises(LaunchTimeout, match="still compute after 9 s") as caught:
        launch(program("busy", "never_stops_computing"), runs=tmp_path, timeout=3, display=Quiet())
    assert not caught.value.waiting and time.monotonic() - began >= 9


# --- launchers that are stopped ---------------------------------------------------------------------------------------

# Without `if __name__ == "__main__"` on purpose: a rank must not run its caller's script a second time.
LAUNCHER = """
import sys
from functools import partial
from pathlib import Path
from shardlab.run.launch import launch
from shardlab.progress import Quiet
from shardlab.run.experiment import Experiment

runs, place, log = sys.argv[1:]
with open(log, "a") as file:
    file.write("imported\\n")
launch(Experiment(name="meeting", program="exercises.troubles:meet", ranks=2, data=place), runs=runs, display=Quiet(), or_cpu=True)
launch([Experiment(name="endless", program="exercises.troubles:never_ends", ranks=2, deepspeed={"train_batch_size": 2}),
        Experiment(name="after", program="exercises.troubles:who", ranks=2)], runs=runs, display=Quiet(), or_cpu=True)
"""


@pytest.fixture(scope="module")
def launchers(programs, tmp_path_factory):
    """Two scripts side by side, each in a process of its own; first their ranks meet, then each runs without end.

    The first is then stopped by Ctrl-C, which a terminal sends to all processes of the job, and the second is killed.
    """
    folder = tmp_path_factory.mktemp("side-by-side")
    place, script = folder / "meeting-place", folder / "script.py"
    place.mkdir()
    script.write_text(LAUNCHER)
    scripts = {}
    # The fork server's socket lies in the temporary folder and has room for a short path only, so it cannot be below pytest's.
    with tempfile.TemporaryDirectory(prefix="sl") as temporary:
        try:
            for name in ("interrupted", "killed"):
                runs, log, imports = folder / name, folder / f"{name}.log", folder / f"{name}.imports"
                Path(temporary, name).mkdir()
                with open(log, "w") as output:
                    process = subprocess.Popen(
                        [sys.executable, *map(str, (script, runs, place, imports))],
                        stdout=output,
                        stderr=output,
                        start_new_session=True,
                        env=os.environ | {"TMPDIR": f"{temporary}/{name}"},
                        # A shell's background job ignores Ctrl-C, and so would this one if the tests are run as such.
                        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
                    )
                scripts[name] = SimpleNamespace(process=process, runs=runs, log=log, imports=imports, family=[], ranks=[])
            deadline = time.monotonic() + 400
            for name, it in scripts.items():
                metrics = it.runs / "endless" / "metrics.jsonl"
                while not (metrics.exists() and metrics.read_text().endswith("\n")):
                    assert it.process.poll() is None, it.log.read_text()
                    assert time.monotonic() < deadline, f"{name}: no endless run\n{it.log.read_text()}"
                    time.sleep(0.05)
                it.family = psutil.Process(it.process.pid).children(recursive=True)
                it.ranks = [child for child in it.family if child.ppid() != it.process.pid]
            os.killpg(scripts["interrupted"].process.pid, signal.SIGINT)
            scripts["killed"].process.kill()
            for name, it in scripts.items():
                it.process.wait(30)
                it.ended = gone(it.family)
                it.left = sorted(path.name for path in Path(temporary, name).glob("shardlab-*"))
            yield scripts
        finally:
            for it in scripts.values():
                for process in [*it.family, it.process]:
                    try:
                        process.kill()
                    except psutil.NoSuchProcess:
                        pass
                it.process.wait()


def test_launches_side_by_side_both_finish(launchers):
    for it in launchers.values():
        run = Run.read(it.runs / "meeting")
        assert run.outcome == "finished"
        assert run.results["total"] == 4, "1 + 1, then 2 + 2: each world has its own two ranks"


def test_ranks_do_not_run_the_caller_s_script(launchers):
    for it in launchers.values():
        assert it.imports.read_text() == "imported\n"


def test_ctrl_c_ends_the_ranks_and_is_recorded(launchers):
    it = launchers["interrupted"]
    assert len(it.ranks) == 2
    assert it.ended, "processes that outlive their launch"
    assert it.process.returncode != 0
    assert "KeyboardInterrupt" in it.log.read_text()
    endless, after = Run.read(it.runs / "endless"), Run.read(it.runs / "after")
    assert (endless.outcome, endless.reason) == ("interrupted", "interrupted by the user")
    assert endless.losses() == [2.0]
    assert after.outcome == "not run"
    assert it.left == [], "temporary files of the launch"


def test_killed_launcher_s_folder_says_killed(launchers):
    it = launchers["killed"]
    assert it.process.returncode == -signal.SIGKILL
    endless = Run.read(it.runs / "endless")
    assert endless.outcome == "killed"
    assert "after 1 steps" in endless.reason
    assert Run.read(it.runs / "after").outcome == "killed"


def test_killed_launcher_s_ranks_end(launchers):
    """Nobody is left to end them: they must notice by themselves."""
    it = launchers["killed"]
    assert len(it.ranks) == 2
    assert it.ended, "processes that outlive their launch"


@pytest.mark.parametrize("name", ["interrupted", "killed"])
def test_stopped_launch_leaves_no_shared_memory(launchers, name):
    (row,) = Run.read(launchers[name].runs / "endless").metrics()
    assert shared_memory(row["port"]) == []


def test_the_fork_server_does_not_keep_the_exercises_of_the_moment_it_was_started(tmp_path):
    program = (
        "import multiprocessing, os; from shardlab import switch; from shardlab.run import launch; "
        f"os.environ[switch.VARIABLE] = {str(tmp_path)!r}; launch.warm_up('cpu'); "
        "pool = multiprocessing.get_context('forkserver').Pool(1); print(pool.apply(os.getenv, (switch.VARIABLE,))); "
        "print(os.environ[switch.VARIABLE]); pool.terminate()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=400)
    assert done.stdout.split() == ["None", str(tmp_path)], done.stderr
