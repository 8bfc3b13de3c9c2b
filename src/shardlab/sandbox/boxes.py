"""A box in which somebody's exercises run: no network, nothing to see but the course, limits on everything.

The judging process is outside and stays there. In the box there is a supervisor. It is forked from the warm fork server, so that a
box with torch, transformers and deepspeed loaded answers within a second. It never runs an exercise itself: it forks a process
for each milestone, and the ranks of each launch. Another process of ours, which nothing in the box can see, watches memory,
processes and disk.

With bubblewrap the supervisor joins the namespaces that `bwrap` has made: its own mounts, process numbers, network and /dev/shm.
Where the machine does not allow that, only the limits hold, and the exercises can read what this account can read.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

from shardlab import hardware
from shardlab.run.experiment import Experiment
from shardlab.run.run_folder import Run
from shardlab.sandbox import wire
from shardlab.sandbox.ended import BoxEnded, TookTooLong
from shardlab.sandbox.exchange import Exchange, remove
from shardlab.sandbox.limits import DISK
from shardlab.sandbox.linux import ADDRESS
from shardlab.sandbox.watch import WATCH_SECONDS, watch_over_box
from shardlab.zero import ops

USER = "1000"
"""The number, in a box, of whoever grades. Root among numbers without any right would keep Slurm from starting."""
BWRAP_FLAGS = (
    *(f"--unshare-{name}" for name in ("user", "pid", "net", "ipc", "uts")),
    "--disable-userns",
    *("--uid", USER, "--gid", USER, "--die-with-parent", "--new-session"),
)
DEVICES = ("null", "zero", "full", "random", "urandom")
ETC = ("nsswitch.conf", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives", "localtime")


@cache
def isolation() -> tuple[str, str]:
    """How boxes are shut on this machine: ("bubblewrap", ""), or ("limits", why not bubblewrap)."""
    if not shutil.which("bwrap"):
        return "limits", "bubblewrap is not installed (apt-get install bubblewrap)"
    tried = subprocess.run(
        ["bwrap", *BWRAP_FLAGS, "--ro-bind", "/", "/", "--proc", "/proc", "true"], capture_output=True, text=True, timeout=20
    )
    if tried.returncode == 0:
        return "bubblewrap", ""
    return "limits", f"this machine does not let bubblewrap make namespaces ({tried.stderr.strip()[-200:]})"


class Box:
    """One box, for one lab of one submission.

    Args:
        submission: the folder that holds `exercises/`; read-only in the box.
        exchange: a folder that judge and box both see under this path. What one side writes reaches the other with the next call.
        visible: folders that the box may read, under the same paths.
        programs: a file of the course, such as `labs/<lab>/programs.py`, that runs with the exercises; loaded before them.
        kind: "bubblewrap" or "limits".
    """

    def __init__(
        self, submission: Path, exchange: Path, visible: tuple[Path, ...] = (), programs: str = "", kind: str | None = None
    ):
        self.kind = kind or isolation()[0]
        self.submission, self.exchange, self.visible, self.programs = submission, exchange, visible, programs
        self.seconds, self.used = float("inf"), 0.0
        self.call_seconds = 60.0
        self.work = Path(tempfile.mkdtemp(prefix="shardlab-box-"))
        inside = self.work / "exchange" if self.isolated else exchange
        for folder in (exchange, inside, self.work / "ops", self.work / "home"):
            folder.mkdir(parents=True, exist_ok=True)
        self.files = Exchange(exchange, inside) if self.isolated else None
        self.broken_imports: dict[str, Exception] = {}
        self.troubled = ""  # what kept the judge, not the submission, from judging
        self.launched: dict[str, list[Run]] = {}
        self._killed_for_memory = 0
        self._bwrap = self._first = self._control = self._watch = self._process = self._beside_slurm = None

    @property
    def isolated(self) -> bool:
        return self.kind == "bubblewrap"

    @property
    def seen_submission(self) -> Path:
        """The submission's folder under the name that it has in the box."""
        return Path("/box/submission") if self.isolated else self.submission

    # --- its processes -----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        from multiprocessing import get_context

        from shardlab.run.launch import _bare_main, warm_up

        warm_up()
        self._killed_for_memory = _killed_for_memory()
        first = self._start_bwrap() if self.isolated else None
        self._control, control = wire.pair()
        self._watch, watch = wire.pair()
        setup = {
            "namespaces_of": first,
            "submission": str(self.seen_submission),
            "home": "/tmp" if self.isolated else str(self.work / "home"),
            "ops": "/box/ops" if self.isolated else str(self.work / "ops"),
            "disk": str(self.exchange),
            "programs": self.programs,
        }
        self._process = get_context("forkserver").Process(target=watch_over_box, args=(control, watch, setup))
        with _bare_main():
            self._process.start()
        control.close()
        watch.close()

    def _start_bwrap(self) -> int:
        """Make the namespaces; the number of their first process."""
        words = ["bwrap", *BWRAP_FLAGS, "--proc", "/proc", "--size", "65536", "--tmpfs", "/dev", "--hostname", "box"]
        for name in DEVICES:
            words += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
        for path in sorted(Path("/dev").glob("nvidia*")):
            words += ["--dev-bind", str(path), str(path)]
        for name, target in (("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("stdout", "/proc/self/fd/1")):
            words += ["--symlink", target, f"/dev/{name}"]
        for folder in ("/dev/shm", "/tmp"):
            words += ["--size", str(DISK), "--tmpfs", folder]
        for name in ("bin", "sbin", "lib", "lib32", "lib64"):
            path = Path("/", name)
            if path.is_symlink():
                words += ["--symlink", os.readlink(path), str(path)]
            elif path.is_dir():
                words += ["--ro-bind", str(path), str(path)]
        python = {Path(sys.prefix), Path(sys.base_prefix), Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()}
        seen = ["/usr", "/sys/devices/system", *(f"/etc/{name}" for name in ETC), *map(str, sorted(python))]
        # A Python of a cluster's module may need libraries of other modules.
        seen += [path for path in os.environ.get("LD_LIBRARY_PATH", "").split(":") if path.startswith("/")]
        seen += [str(hardware.ROOT / "src" / "shardlab"), str(hardware.ROOT / "slurm"), *map(str, self.visible)]
        seen += [str(hardware.ROOT / self.programs)] if self.programs else []
        for path in seen:
            words += ["--ro-bind-try", path, path]
        words += ["--bind", str(self.work / "exchange"), str(self.exchange), "--ro-bind", str(self.work / "ops"), "/box/ops"]
        own = {"hosts": f"127.0.0.1 localhost\n{ADDRESS} box\n", "group": f"box:x:{USER}:\n"}
        own |= {"passwd": f"box:x:{USER}:{USER}::/tmp:/bin/bash\n"}
        for name, text in own.items():
            (self.work / name).write_text(text)
            words += ["--ro-bind", str(self.work / name), f"/etc/{name}"]
        words += ["--ro-bind", str(self.submission), "/box/submission"]
        # Without this, settings of the kernel could be written where the box belongs to root.
        words += [word for place in ("/dev", "/proc", "/") for word in ("--remount-ro", place)]
        reading, writing = os.pipe()
        self._bwrap = subprocess.Popen(
            [*words, "--info-fd", str(writing), "--", "sleep", "infinity"],
            pass_fds=[writing],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        os.close(writing)
        with os.fdopen(reading) as pipe:
            told = pipe.read()
        if not told:
            self.troubled = f"bubblewrap could not make a box: {self._bwrap.communicate()[1].strip()[-300:]}"
            raise BoxEnded(self.troubled)
        self._first = first = json.loads(told)["child-pid"]
        # The information comes before the mounts are made; `sleep` is the sign that they are.
        end = time.monotonic() + 10
        while self._bwrap.poll() is None and time.monotonic() < end:
            with contextlib.suppress(OSError):
                if "sleep" in Path(f"/proc/{first}/cmdline").read_text().split("\0")[0]:
                    return first
                children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
                if any("sleep" in Path(f"/proc/{child}/cmdline").read_text().split("\0")[0] for child in children):
                    return first
            time.sleep(0.001)
        self.end()
        self.troubled = "bubblewrap did not make a box within 10 s"
        raise BoxEnded(self.troubled)

    def _ask_supervisor(self, request: dict) -> socket.socket:
        """A connection to a new process of the box."""
        for attempt in (1, 2):
            if self._process is None:
                self._start()
            mine, other = wire.pair()
            try:
                wire.send_with_end(self._control, request, other)
                return mine
            except OSError:
                mine.close()
                self.end()  # an earlier call has brought the box down
                if attempt == 2:
                    self.troubled = "the box could not be started"
                    raise BoxEnded(self.troubled) from None
            finally:
                other.close()

    def why_ended(self) -> str:
        """What the watch says, once a connection has broken off."""
        if self._killed_for_memory and _killed_for_memory() > self._killed_for_memory:
            self.troubled = "this machine ran out of memory while it graded; grade fewer at a time (--jobs)"
        try:
            return wire.receive(self._watch, time.monotonic() + 2 * WATCH_SECONDS + 0.2)["why"]
        except (wire.WireError, KeyError, AttributeError):
            return "the process ended before it answered, by os._exit(), a signal or a crash"

    def end(self) -> None:
        """End every process of the box. The next call starts it anew; files stay."""
        for connection in (self._control, self._watch):
            if connection is not None:
                connection.close()
        if self._bwrap is not None:
            # With its first process a namespace ends whole; bwrap sees that, and goes too.
            if self._bwrap.poll() is None and self._first is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._first, signal.SIGKILL)
            try:
                self._bwrap.communicate(timeout=5)
            except subprocess.TimeoutExpired:
                self._bwrap.kill()
                self._bwrap.communicate()
        if self._process is not None:
            self._process.join(10)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
        self._bwrap = self._first = self._control = self._watch = self._process = self._beside_slurm = None

    def close(self) -> None:
        """End it, and remove what it left on disk."""
        self.end()
        remove(self.work)

    def __enter__(self) -> Box:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # --- what it is asked --------------------------------------------------------------------------------------------

    def provide(self, op: str) -> None:
        """Let the box have one of DeepSpeed's compiled ops."""
        ops.build(op, lambda line: None)
        target = self.work / "ops" / op
        if not target.exists():
            shutil.copytree(ops.library(op).parent, target, ignore=shutil.ignore_patterns("lock"))

    @contextlib.contextmanager
    def timed(self, seconds: float):
        """How long something may take: so many seconds, or what is left of the box's own. What is done within counts.

        Raises:
            TookTooLong: nothing is left.
        """
        left = self.seconds - self.used
        if left <= 0:
            raise TookTooLong(f"the submission's time of {self.seconds:g} s is used up")
        started = time.monotonic()
        try:
            yield min(seconds, left)
        finally:
            self.used += time.monotonic() - started

    def caller(self) -> Caller:
        """A new process that carries out requests; the exercises come in with the first request that needs them."""
        return Caller(self, self._ask_supervisor({"run": "caller"}))

    def slurm(self, *words: str, seconds: float = 30, text: str | None = None) -> str:
        """Run one of Slurm's commands in the box, next to a cluster of the box's own, which the first command starts.

        Raises:
            shardlab.cluster.slurm.SlurmError: as `shardlab.cluster.slurm.command`.
        """
        from shardlab.cluster.slurm import LOCAL_CLUSTER, SlurmError

        try:
            if self._beside_slurm is None:
                for op in ops.needed_by({}):
                    self.provide(op)
                caller = self.caller()  # it never imports the exercises
                caller.ask({"op": "observe", "function": "shardlab.cluster.slurm:local_cluster"}, ("up",), {}, 120)
                self._beside_slurm = caller
            if words[0] == LOCAL_CLUSTER:
                return self._beside_slurm.ask(
                    {"op": "observe", "function": "shardlab.cluster.slurm:local_cluster"}, words[1:], {}, 120
                )
            request = {"op": "observe", "function": "shardlab.cluster.slurm:command"}
            return str(self._beside_slurm.ask(request, words, {"seconds": seconds, "text": text}, seconds + 10))
        except BoxEnded:
            raise
        except RuntimeError as error:
            raise SlurmError(str(error)) from None

    def launch(self, experiments: list[Experiment], *, runs: Path, timeout: float) -> list[Run]:
        """Run experiments on ranks in the box, as `shardlab.run.launch.launch` does outside.

        The results are those that the ranks' programs returned to the launcher; a record that was written into a run folder
        by somebody else does not count.

        Raises:
            shardlab.run.launch.RankError, shardlab.run.launch.LaunchTimeout: as there.
            BoxEnded: the box ended.
        """
        from shardlab.run.launch import PATIENCE, LaunchTimeout, RankError

        for op in dict.fromkeys(op for experiment in experiments for op in ops.needed_by(experiment.deepspeed)):
            self.provide(op)
        self.push()
        with self.timed(timeout) as seconds, self._ask_supervisor({"run": "launcher"}) as connection:
            try:
                plan = {"experiments": [e.model_dump() for e in experiments], "runs": str(runs), "timeout": seconds}
                wire.send(connection, plan, time.monotonic() + 10)
                told = wire.receive(connection, time.monotonic() + PATIENCE * seconds + 20)
            except wire.WireTimeout:
                self.end()
                raise LaunchTimeout(f"the launch exceeded its limit of {seconds:.0f} s and was ended") from None
            except wire.WireError:
                why = self.why_ended()
                self.end()
                raise BoxEnded(why) from None
            finally:
                self.pull()
        if "timeout" in told:
            raise LaunchTimeout(str(told["timeout"])[:2000], waiting=told.get("waiting") is True)
        if "error" in told:
            error, trace = str(told["error"])[:5000], str(told["traceback"])[-20_000:]
            raise RankError(int(told["rank"]), str(told["experiment"])[:200], error, trace)
        if "runs" not in told:
            raise BoxEnded(f"the launch could not begin: {str(told.get('why'))[:500]}")
        return [Run(runs / experiment.name, dict(record)) for experiment, record in zip(experiments, told["runs"], strict=True)]

    def push(self) -> None:
        if self.files:
            self.files.push()

    def pull(self) -> None:
        if self.files:
            self.files.pull()


@cache
def why_no_slurm() -> str:
    """What keeps a cluster from starting in a box on this machine, tried in one without exercises; nothing if it starts."""
    from shardlab.cluster.slurm import SlurmError

    if isolation()[0] != "bubblewrap":
        return "jobs of the exercises need bubblewrap around them"
    with tempfile.TemporaryDirectory() as temporary:
        nobody = Path(temporary, "nobody")
        (nobody / "exercises").mkdir(parents=True)
        (nobody / "exercises" / "__init__.py").touch()
        with Box(nobody, Path(temporary, "exchange")) as box:
            try:
                box.slurm("scontrol", "ping")
            except (SlurmError, BoxEnded) as error:
                return f"no Slurm starts in a box here: {error}"
    return ""


class Caller:
    """A process of the box that carries out the judge's requests."""

    def __init__(self, box: Box, connection: socket.socket):
        self.box, self.connection = box, connection
        self.codec = wire.Codec(ask=self.ask)

    def ask(self, request: dict, args: tuple = (), kwargs: dict | None = None, seconds: float | None = None):
        """Send a request and wait for its answer; functions of this side that were handed over are called meanwhile.

        Raises:
            TookTooLong: no answer within `seconds`, by default the box's `call_seconds`.
            BoxEnded: the process has gone.
            Exception: what the exercise raised, as a built-in type where it was one, else `RemoteError`.
        """
        writes = request["op"] != "get"  # half of all requests: to look a function up changes no file
        if writes:
            self.box.push()
        try:
            with self.box.timed(seconds or self.box.call_seconds) as seconds:
                told = self._told(request | self._arguments(args, kwargs or {}), seconds)
        finally:
            if writes:
                self.box.pull()
        if "error" in told:
            raise wire.rebuilt(told["error"])
        try:
            return self.codec.decode(told.get("value"))
        except wire.WireError as error:
            raise BoxEnded(str(error)) from None

    def _told(self, request: dict, seconds: float) -> dict:
        deadline = time.monotonic() + seconds
        try:
            wire.send(self.connection, request, deadline)
            while True:
                told = wire.receive(self.connection, deadline)
                if "callback" not in told:
                    return told
                wire.send(self.connection, self._call_back(told), deadline)
        except wire.WireTimeout:
            self.box.end()
            raise TookTooLong(f"it did not come back within {seconds:.0f} s, and was ended") from None
        except wire.WireError as error:
            why = self.box.why_ended() if isinstance(error, wire.Gone) else str(error)
            self.box.end()
            raise BoxEnded(why) from None

    def _arguments(self, args: tuple, kwargs: dict) -> dict:
        return {"args": self.codec.encode(list(args)), "kwargs": self.codec.encode(kwargs)}

    def _call_back(self, told: dict) -> dict:
        try:
            function = self.codec.lent[told["callback"]]
            args, kwargs = self.codec.decode(told["args"]), self.codec.decode(told["kwargs"])
        except (KeyError, wire.WireError, TypeError):
            raise wire.WireError("the answer is no message") from None
        try:
            return {"value": self.codec.encode(function(*args, **kwargs))}
        except Exception as error:
            return {"error": wire.described(error)}

    def close(self) -> None:
        """Let the process go: it has nothing more to read. One that does not go ends with its box."""
        self.connection.close()


def _killed_for_memory() -> int:
    """How many processes the kernel of this machine has ended because memory ran out."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
