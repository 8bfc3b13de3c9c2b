"""What runs in a box: a supervisor that never runs an exercise itself, and the processes that it forks for those that do."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import resource
import shutil
import signal
import socket
import sys
import tempfile
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import psutil

from shardlab import switch
from shardlab.run import tampering
from shardlab.run.experiment import Experiment, module_of, program_of
from shardlab.sandbox import wire
from shardlab.sandbox.calls import is_exercise, watched
from shardlab.sandbox.limits import DISK, MEMORY, PROCESSES
from shardlab.sandbox.linux import DIE_WITH_PARENT, SET_DUMPABLE, SET_SUBREAPER, drop_privileges, end_below, prctl

KEPT_VARIABLES = (
    *("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL"),
    *("DS_ACCELERATOR", "TOKENIZERS_PARALLELISM", "CUDA_VISIBLE_DEVICES", "TORCH_CUDA_ARCH_LIST"),
)


def supervise(control: socket.socket, setup: dict) -> None:
    """Serve a box until its judge has gone: fork a process for each caller and each launch that is asked for.

    Args:
        control: where the judge asks.
        setup: `submission`, `home` and `ops`, folders as the box sees them; `namespaces_of`, None where there are none; `ours`, a
            pipe that tells the watch which processes run no exercise.
    """
    _let_go_of_what_was_inherited(keep=(control.fileno(), setup["ours"]))
    os.setsid()
    os.chdir(setup["home"])
    variables = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    variables |= {"HOME": setup["home"], "TMPDIR": setup["home"], "XDG_CACHE_HOME": setup["home"] + "/cache", "HF_HUB_OFFLINE": "1"}
    variables |= {"TORCH_EXTENSIONS_DIR": setup["home"] + "/ops", switch.VARIABLE: setup["submission"], tampering.WATCHED: "1"}
    os.environ.clear()
    os.environ.update(variables)
    tempfile.tempdir = None
    drop_privileges()
    prctl(SET_DUMPABLE, 0)  # or the exercises, which run as the same user, could write into this process
    prctl(SET_SUBREAPER, 1)
    _set_limits(setup)

    def reap(*_) -> None:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0] > 0:
                pass

    signal.signal(signal.SIGCHLD, reap)
    os.write(setup["ours"], b"%d " % os.getpid())
    serve = {"caller": _serve_calls, "launcher": _serve_launch}
    while (asked := wire.receive_with_end(control)) is not None:
        request, end = asked
        started = os.fork()
        if started == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            control.close()
            os.close(setup["ours"])
            prctl(DIE_WITH_PARENT, signal.SIGKILL)
            if request["run"] == "caller":
                prctl(SET_DUMPABLE, 1)  # the watch could not look at the files that it has open
            with contextlib.suppress(OSError):
                os.nice(10)
            with contextlib.suppress(BaseException):
                serve[request["run"]](end, setup)
            os._exit(0)
        if request["run"] == "launcher":
            os.write(setup["ours"], b"%d " % started)
        end.close()
    end_below(os.getpid())


def _let_go_of_what_was_inherited(keep: tuple[int, ...]) -> None:
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd not in keep:
            with contextlib.suppress(OSError):
                os.close(fd)
    nothing = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nothing, fd)
    os.close(nothing)
    # Its pipe was one of those; a new one is opened when it is needed.
    import multiprocessing.resource_tracker as tracker

    tracker._resource_tracker._fd = None


def _set_limits(setup: dict) -> None:
    def limit(kind: int, value: int) -> None:
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))

    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_FSIZE, DISK)
    limit(resource.RLIMIT_NOFILE, 4096)
    limit(resource.RLIMIT_DATA, MEMORY + psutil.Process().memory_info().data)
    if setup["namespaces_of"] is not None:
        # Threads count. Since Linux 5.14 they are counted for each box alone; before, all of this account's would be.
        if tuple(map(int, os.uname().release.split("-")[0].split(".")[:2])) >= (5, 14):
            limit(resource.RLIMIT_NPROC, 16 * PROCESSES)


def _take_ops(setup: dict) -> None:
    """Copy the compiled ops that the judge has provided: loading one writes a lock next to it."""
    for provided in Path(setup["ops"]).iterdir():
        target = Path(os.environ["TORCH_EXTENSIONS_DIR"], provided.name)
        if not target.exists():
            copy = target.with_name(f".{provided.name}-{os.getpid()}")
            shutil.copytree(provided, copy)
            with contextlib.suppress(OSError):  # another process of the box was faster
                copy.rename(target)


def _serve_calls(connection: socket.socket, setup: dict) -> None:
    """Call the functions of the exercises that the judge asks for, until it has gone."""
    submission = setup["submission"]
    switch.use_exercises(submission)

    def callback(number: int, args: tuple, kwargs: dict):
        wire.send(connection, {"callback": number, "args": codec.encode(list(args)), "kwargs": codec.encode(kwargs)})
        told = wire.receive(connection)
        if "error" in told:
            raise wire.rebuilt(told["error"])
        return codec.decode(told["value"])

    codec = wire.Codec(callback=callback)
    if setup["programs"]:
        module_of(setup["programs"])  # noted below, before the exercises come in
    noted, require_unchanged = tampering.snapshot(), tampering.require_unchanged
    while True:
        message = wire.receive(connection)
        try:
            _take_ops(setup)
            came = _carry_out(message, codec)
            if message["op"] == "observe":
                require_unchanged(noted)
            answer = {"value": codec.encode(came)}
        except BaseException as error:
            answer = {"error": wire.described(error, f"{submission}/exercises")}
        wire.send(connection, answer)


def _carry_out(message: dict, codec: wire.Codec):
    args, kwargs = codec.decode(message["args"]), codec.decode(message["kwargs"])
    match message["op"]:
        case "import":
            switch.import_exercise(message["lab"])
            if torch := sys.modules.get("torch"):
                torch.set_num_threads(1)  # as `milestones.exercises.Lab` does where there is no box
        case "get":
            module = switch.import_exercise(message["lab"])
            if not hasattr(module, message["name"]):
                return False, None
            found = getattr(module, message["name"])
            return True, watched(found) if is_exercise(found) else found
        case "call":
            return codec.lent[message["of"]](*args, **kwargs)
        case "attribute":
            return getattr(codec.lent[message["of"]], message["name"])
        case "replace":
            setattr(switch.import_exercise(message["lab"]), message["name"], args[0])
        case "observe":
            return program_of(message["function"])(*args, **kwargs)


class _PlainValues(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"a rank returned something of {module}.{name}; plain values are taken")


def _plain_values(data, *_, **__):
    return _PlainValues(io.BytesIO(data)).load()


def _serve_launch(connection: socket.socket, setup: dict) -> None:
    """Launch the experiments that the judge asks for. This process runs no exercise; its ranks do.

    They are the same user's, so they must not get at it: it cannot be traced, they do not have its connection, and what they return
    is taken for plain values or not at all.
    """
    from shardlab import progress
    from shardlab.run.launch import LaunchTimeout, RankError, launch

    plan = wire.receive(connection)
    os.register_at_fork(after_in_child=lambda: (connection.close(), prctl(SET_DUMPABLE, 1)))
    ForkingPickler.loads = staticmethod(_plain_values)
    try:
        _take_ops(setup)
        experiments = [Experiment.model_validate(experiment) for experiment in plan["experiments"]]
        finished = launch(experiments, runs=plan["runs"], timeout=plan["timeout"], display=progress.Quiet(), start_method="fork")
        answer = {"runs": [run.record_json for run in finished]}
    except LaunchTimeout as error:
        answer = {"timeout": str(error), "waiting": error.waiting}
    except RankError as error:
        answer = {"rank": error.rank, "experiment": error.experiment, "error": error.error, "traceback": error.rank_traceback}
    except BaseException as error:
        answer = {"why": f"{type(error).__name__}: {error}"}
    wire.send(connection, answer)
