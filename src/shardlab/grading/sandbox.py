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
import ctypes
import errno
import fcntl
import io
import json
import os
import pickle
import resource
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from functools import cache
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import psutil

from shardlab import hardware, ops, switch, tampering
from shardlab.grading import wire
from shardlab.grading.milestones import BoxEnded, TookTooLong, program_of
from shardlab.runs import Experiment, Run

MEMORY = 8 * 2**30
"""Bytes that all processes of a box may hold together."""
DISK = 2**30
"""Bytes that a box may leave on disk, and as many in its /tmp and its /dev/shm."""
PROCESSES = 64
"""How many processes may be in a box at once."""
FILES = 20_000
"""How many files a box may leave behind."""
DEPTH = 50
"""How deep its folders may be."""
RECORD = 16 * 2**20
"""Bytes of a file in JSON that the judge reads."""
WATCH_SECONDS = 0.25

ADDRESS = "10.77.0.1"
USER = "1000"
"""The number, in a box, of whoever grades. Root among numbers without any right would keep Slurm from starting."""
BWRAP_FLAGS = (
    *(f"--unshare-{name}" for name in ("user", "pid", "net", "ipc", "uts")),
    "--disable-userns",
    *("--uid", USER, "--gid", USER, "--die-with-parent", "--new-session"),
)
NS_GET_USERNS, USER_NAMESPACE = 0xB701, 0x10000000
NAMESPACES = {"ipc": 0x08000000, "uts": 0x04000000, "net": 0x40000000, "pid": 0x20000000, "mnt": 0x00020000}
DEVICES = ("null", "zero", "full", "random", "urandom")
ETC = ("nsswitch.conf", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives", "localtime")


class RemoteError(Exception):
    """An error in somebody's exercises.

    Attributes:
        kind: the name of its type.
        places: their own lines that it came through.
    """

    kind, places = "Exception", ()


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
        kind: "bubblewrap" or "limits".
    """

    def __init__(self, submission: Path, exchange: Path, visible: tuple[Path, ...] = (), kind: str | None = None):
        self.kind = kind or isolation()[0]
        self.submission, self.exchange, self.visible = submission, exchange, visible
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

        from shardlab.launch import _bare_main, warm_up

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
        }
        self._process = get_context("forkserver").Process(target=_join, args=(control, watch, setup))
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
        """Run one of Slurm's commands in the box, beside a cluster of the box's own, which the first command starts.

        Raises:
            shardlab.slurm.SlurmError: as `shardlab.slurm.command`.
        """
        from shardlab.slurm import LOCAL_CLUSTER, SlurmError

        for op in ops.needed_by({}):
            self.provide(op)
        try:
            if self._beside_slurm is None:
                caller = self.caller()  # it never imports the exercises
                caller.ask({"op": "observe", "function": "shardlab.slurm:local_cluster"}, ("up",), {}, 120)
                self._beside_slurm = caller
            if words[0] == LOCAL_CLUSTER:
                return self._beside_slurm.ask({"op": "observe", "function": "shardlab.slurm:local_cluster"}, words[1:], {}, 120)
            request = {"op": "observe", "function": "shardlab.slurm:command"}
            return str(self._beside_slurm.ask(request, words, {"seconds": seconds, "text": text}, seconds + 10))
        except BoxEnded:
            raise
        except RuntimeError as error:
            raise SlurmError(str(error)) from None

    def launch(self, experiments: list[Experiment], *, runs: Path, timeout: float) -> list[Run]:
        """Run experiments on ranks in the box, as `shardlab.launch.launch` does outside.

        The results are those that the ranks' programs returned to the launcher; a record that was written into a run folder
        by somebody else does not count.

        Raises:
            shardlab.launch.RankError, shardlab.launch.LaunchTimeout: as there.
            BoxEnded: the box ended.
        """
        from shardlab.launch import LaunchTimeout, RankError

        for op in dict.fromkeys(op for experiment in experiments for op in ops.needed_by(experiment.deepspeed)):
            self.provide(op)
        self.push()
        with self.timed(timeout) as seconds, self._ask_supervisor({"run": "launcher"}) as connection:
            try:
                plan = {"experiments": [e.model_dump() for e in experiments], "runs": str(runs), "timeout": seconds}
                wire.send(connection, plan, time.monotonic() + 10)
                told = wire.receive(connection, time.monotonic() + seconds + 20)
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
            raise LaunchTimeout(str(told["timeout"])[:2000])
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
    from shardlab.slurm import SlurmError

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
        self.box.push()
        with self.box.timed(seconds or self.box.call_seconds) as seconds:
            told = self._told(request | self._arguments(args, kwargs or {}), seconds)
        if "error" in told:
            raise _rebuilt(told["error"])
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
        finally:
            self.box.pull()

    def _arguments(self, args: tuple, kwargs: dict) -> dict:
        return {"args": self.codec.encode(list(args)), "kwargs": self.codec.encode(kwargs)}

    def _call_back(self, told: dict) -> dict:
        try:
            function = self.codec.lent[told["callback"]]
            args, kwargs = self.codec.decode(told["args"]), self.codec.decode(told["kwargs"])
        except (KeyError, wire.WireError, TypeError):
            raise wire.WireError("what came is no message") from None
        try:
            return {"value": self.codec.encode(function(*args, **kwargs))}
        except Exception as error:
            return {"error": _described(error)}

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


def _described(error: BaseException, folder: str = "") -> dict:
    try:
        text = str(error)
    except Exception:
        text = "(its text cannot be read)"
    frames = traceback.extract_tb(error.__traceback__) if folder else []
    places = [f"{Path(f.filename).name}, line {f.lineno}: {f.line}" for f in frames if f.filename.startswith(folder)]
    return {"kinds": [kind.__name__ for kind in type(error).__mro__], "text": text[:10_000], "places": places[-20:]}


def _rebuilt(told) -> Exception:
    """The error that a box described: of the first built-in type among its types that takes a text."""
    import builtins

    kinds = [str(kind)[:100] for kind in told.get("kinds", [])][:50] if isinstance(told, dict) else []
    text = str(told.get("text", ""))[:10_000] if isinstance(told, dict) else ""
    made: Exception = RemoteError(f"{kinds[0] if kinds else 'an error'}: {text}" if text else kinds[0] if kinds else "an error")
    for kind in kinds:
        found = getattr(builtins, kind, None)
        if isinstance(found, type) and issubclass(found, Exception) and found is not Exception:
            with contextlib.suppress(Exception):
                made = found(text)
                break
    made.places = [str(place)[:300] for place in told.get("places", [])][-20:] if isinstance(told, dict) else []
    made.kind = kinds[0] if kinds else "Exception"
    return made


def remove(folder: Path) -> None:
    """Remove a folder, however deep it is and whatever may not be read in it: `shutil.rmtree` gives up on both."""
    with contextlib.suppress(RecursionError):
        shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
            subprocess.run([*command, "--", str(folder)], capture_output=True)


# --- files ------------------------------------------------------------------------------------------------------------


class Exchange:
    """One folder, twice: the judge's own, and the box's. Neither side can make the other follow a link out of it."""

    def __init__(self, here: Path, inside: Path):
        self.here, self.inside = here, inside
        self._known: dict[str, dict[Path, tuple]] = {}

    def push(self) -> None:
        """What has changed on the judge's side goes into the box."""
        self._copy(self.here, self.inside)

    def pull(self) -> None:
        """What has changed in the box comes out.

        Raises:
            BoxEnded: more files or bytes than a box may leave.
        """
        self._copy(self.inside, self.here)

    def _copy(self, source: Path, target: Path) -> None:
        found: dict[Path, tuple] = {}
        known_source = self._known.setdefault(str(source), {})
        known_target = self._known.setdefault(str(target), {})
        total = 0
        for folder, _, names, folder_fd in os.fwalk(source, follow_symlinks=False):
            relative = Path(folder).relative_to(source)
            if len(relative.parts) > DEPTH:
                raise BoxEnded(f"folders are {DEPTH} deep")
            if relative != Path():
                found[relative] = ("folder",)
                if known_source.get(relative) != ("folder",):
                    os.close(_open_folder(target, relative))
                    known_target[relative] = ("folder",)
            for name in names:
                try:
                    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder_fd)
                except OSError:
                    continue  # a link, a socket, or gone already
                with os.fdopen(fd, "rb") as file:
                    status = os.fstat(fd)
                    if not stat.S_ISREG(status.st_mode):
                        continue
                    path, mark = relative / name, ("file", status.st_size, status.st_mtime_ns, status.st_ino)
                    found[path] = mark
                    total += status.st_size
                    if total > DISK or len(found) > FILES:
                        raise BoxEnded(f"more than {FILES:,} files or {DISK / 2**30:g} GiB were left behind")
                    if path.suffix in (".json", ".jsonl") and status.st_size > RECORD:
                        raise BoxEnded(f"{path} is larger than {RECORD // 2**20} MiB")
                    if known_source.get(path) != mark:
                        known_target[path] = _write(target, path, file, status)
        for path in sorted(set(known_source) - set(found), reverse=True):
            _remove(target, path)
            known_target.pop(path, None)
        self._known[str(source)] = found


def _open_folder(root: Path, relative: Path) -> int:
    """A descriptor of a folder below `root`, made where it is not there. A link on the way is replaced by a folder."""
    fd = os.open(root, os.O_DIRECTORY)
    for part in relative.parts:
        try:
            below = _open_below(fd, part)
        finally:
            os.close(fd)
        fd = below
    return fd


def _open_below(fd: int, name: str) -> int:
    for _ in range(3):
        try:
            return os.open(name, os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
        except FileNotFoundError:
            os.mkdir(name, dir_fd=fd)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                raise
            os.unlink(name, dir_fd=fd)
    raise BoxEnded(f"{name} changes all the time")


def _write(root: Path, path: Path, source, status: os.stat_result) -> tuple:
    folder = _open_folder(root, path.parent)
    try:
        try:
            os.unlink(path.name, dir_fd=folder)
        except FileNotFoundError:
            pass
        except IsADirectoryError:
            shutil.rmtree(path.name, dir_fd=folder)
        mode = 0o644 | status.st_mode & 0o111
        fd = os.open(path.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode, dir_fd=folder)
        with os.fdopen(fd, "wb") as file:
            left = status.st_size
            while left and (part := source.read(min(left, 2**20))):
                file.write(part)
                left -= len(part)
            file.flush()
            os.utime(fd, ns=(status.st_mtime_ns, status.st_mtime_ns))
            made = os.fstat(fd)
        return ("file", made.st_size, made.st_mtime_ns, made.st_ino)
    finally:
        os.close(folder)


def _remove(root: Path, path: Path) -> None:
    folder = _open_folder(root, path.parent)
    try:
        os.unlink(path.name, dir_fd=folder)
    except IsADirectoryError:
        with contextlib.suppress(OSError):
            shutil.rmtree(path.name, dir_fd=folder)
    except OSError:
        pass
    finally:
        os.close(folder)


# --- in the box -------------------------------------------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    _libc.prctl(option, value, 0, 0, 0)


SET_DUMPABLE, SET_NO_NEW_PRIVILEGES, SET_SUBREAPER, DROP_FROM_BOUNDING_SET, DIE_WITH_PARENT = 4, 38, 36, 24, 1


def _join(control: socket.socket, watch: socket.socket, setup: dict) -> None:
    """The first process of ours: fork the supervisor into the namespaces, and watch over all that is in them.

    This process enters all of them but that of the process numbers, which holds for children alone. So nothing in the box can
    see it, stop it or end it.
    """
    _prctl(SET_SUBREAPER, 1)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # where memory runs short, a box goes first
    # A baseline, since /proc shows this process no more once the box's mounts are entered.
    first, loaded = setup["namespaces_of"], _resident(os.getpid())
    if first is not None:
        handles = {name: os.open(f"/proc/{first}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC) for name in (*NAMESPACES, "user")}
        # With --disable-userns, what is in the box belongs to one user namespace, and runs in another below that.
        owner = fcntl.ioctl(handles["net"], NS_GET_USERNS)
        for handle, kind in [(owner, USER_NAMESPACE), *((handles[name], kind) for name, kind in NAMESPACES.items())]:
            _enter(handle, kind)
        _add_address()
        _enter(handles["user"], USER_NAMESPACE)
    ours, telling = os.pipe()
    supervisor = os.fork()
    if supervisor == 0:
        try:
            watch.close()
            os.close(ours)
            _supervise(control, setup | {"ours": telling})
        finally:
            os._exit(0)
    control.close()
    os.close(telling)
    os.set_blocking(ours, False)
    why = "the watch over its memory, processes and files failed"
    try:
        why = _watch_over(supervisor, first, loaded, ours, setup["disk"])
    except OSError:
        time.sleep(WATCH_SECONDS)
        if os.waitpid(supervisor, os.WNOHANG)[0]:
            why = ""  # the box was ended while it was looked at
    finally:
        if why:
            with contextlib.suppress(wire.WireError):
                wire.send(watch, {"why": why}, time.monotonic() + 1)
        if first is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(first, signal.SIGKILL)  # with its first process the namespace ends whole, so that nothing outruns it
        else:
            _end_below(os.getpid())


def _watch_over(supervisor: int, first: int | None, loaded: int, ours: int, disk: str) -> str:
    """Wait until the supervisor ends, or a limit is broken: which one; nothing if none was."""
    checked, told, hiding, hid = 0.0, b"", set(), set()
    while os.waitpid(supervisor, os.WNOHANG)[0] == 0:
        time.sleep(WATCH_SECONDS)
        with contextlib.suppress(BlockingIOError):
            told += os.read(ours, 2**16)
        # In namespaces of its own, every process that is seen belongs to the box.
        in_box = [int(name) for name in os.listdir("/proc") if name.isdigit()] if first is not None else None
        seen = in_box if in_box is not None else [process.pid for process in _below(supervisor)]
        if len(seen) > PROCESSES:
            return f"it started more than {PROCESSES} processes"
        bytes_held, hiding = _held(seen, loaded)
        if bytes_held > MEMORY:
            return f"it took more than {MEMORY / 2**30:g} GiB of memory"
        # A process hides its files for a moment while it is made; ours may.
        hiding -= set(map(int, told.split()))
        if first is not None and hiding & hid:
            return "one of its processes hides what it has open"
        hid = hiding
        if time.monotonic() - checked > 1:
            checked = time.monotonic()
            if why := _too_much_on_disk(disk):
                return why
    return ""


def _enter(handle: int, kind: int) -> None:
    if _libc.setns(handle, kind):
        raise OSError(ctypes.get_errno(), "cannot enter the box")
    os.close(handle)


def _add_address() -> None:
    """Give the box's loopback a second address: Slurm does not start on a machine that has 127.0.0.1 alone."""
    set_address = 0x8916  # SIOCSIFADDR
    request = struct.pack("16sH2x4s8x", b"lo:1", socket.AF_INET, socket.inet_aton(ADDRESS))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket, contextlib.suppress(OSError):
        fcntl.ioctl(any_socket, set_address, request)


def _drop_privileges() -> None:
    for capability in range(64):
        _prctl(DROP_FROM_BOUNDING_SET, capability)
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    _libc.capset(header, none)
    _prctl(SET_NO_NEW_PRIVILEGES, 1)


def _supervise(control: socket.socket, setup: dict) -> None:
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd not in (control.fileno(), setup["ours"]):
            with contextlib.suppress(OSError):
                os.close(fd)
    nothing = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nothing, fd)
    os.close(nothing)
    os.setsid()
    os.chdir(setup["home"])
    variables = {"HOME": setup["home"], "TMPDIR": setup["home"], "XDG_CACHE_HOME": setup["home"] + "/cache", "HF_HUB_OFFLINE": "1"}
    kept = (
        "PATH",
        "LD_LIBRARY_PATH",
        "LANG",
        "LC_ALL",
        "DS_ACCELERATOR",
        "TOKENIZERS_PARALLELISM",
        "CUDA_VISIBLE_DEVICES",
        "TORCH_CUDA_ARCH_LIST",
    )
    variables |= {name: os.environ[name] for name in kept if name in os.environ}
    os.environ.clear()
    ours = {"TORCH_EXTENSIONS_DIR": setup["home"] + "/ops", switch.VARIABLE: setup["submission"], tampering.WATCHED: "1"}
    os.environ.update(variables | ours)
    tempfile.tempdir = None
    _drop_privileges()
    _prctl(SET_DUMPABLE, 0)  # or the exercises, which run as the same user, could write into this process
    _prctl(SET_SUBREAPER, 1)
    _set_limits(setup)
    # Nothing of what the fork server knows of other processes holds here.
    import multiprocessing.resource_tracker as tracker

    tracker._resource_tracker._fd = None

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
            _prctl(DIE_WITH_PARENT, signal.SIGKILL)
            if request["run"] == "caller":
                _prctl(SET_DUMPABLE, 1)  # the watch could not look at the files that it has open
            with contextlib.suppress(OSError):
                os.nice(10)
            with contextlib.suppress(BaseException):
                serve[request["run"]](end, setup)
            os._exit(0)
        if request["run"] == "launcher":
            os.write(setup["ours"], b"%d " % started)
        end.close()
    _end_below(os.getpid())


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


def _below(process: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process).children(recursive=True)
    return []


def _end_below(process: int) -> None:
    """Kill all processes below one; those of a fork bomb are stopped first, so that they cannot outrun it."""
    while left := [p for p in _below(process) if p.status() != psutil.STATUS_ZOMBIE]:
        for sent in (signal.SIGSTOP, signal.SIGKILL):
            for one in left:
                with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
                    os.kill(one.pid, sent)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0] > 0:
                pass
        time.sleep(0.01)


def _held(processes: list[int], loaded: int) -> tuple[int, set[int]]:
    """Bytes of memory that processes hold, and which of them do not let their open files be seen.

    Of each process, what it holds beyond the `loaded` bytes that it shares with the process it was forked from; a program of
    another kind is so counted too low by that. Looking closer (smaps) would have to wait for processes that are just forking; a
    fork bomb would stop the watch. Files without a name count while somebody has them open, and System V's segments always. What is
    not seen: files on their way through a socket. Where memory runs short, the kernel ends processes of a box first.
    """
    nameless: dict[tuple[int, int], int] = {}
    hiding = set()
    for process in processes:
        try:
            for fd in os.listdir(f"/proc/{process}/fd"):
                with contextlib.suppress(OSError):
                    status = os.stat(f"/proc/{process}/fd/{fd}")
                    if stat.S_ISREG(status.st_mode) and status.st_nlink == 0:
                        nameless[status.st_dev, status.st_ino] = status.st_blocks * 512
        except PermissionError:
            hiding.add(process)
        except OSError:
            pass
    segments = 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        segments = sum(int(line.split()[14]) for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:])
    return segments + sum(nameless.values()) + sum(max(0, _resident(process) - loaded) for process in processes), hiding


def _resident(process: int) -> int:
    """Bytes in memory that are no file's: anonymous ones, and those shared with other processes."""
    with contextlib.suppress(OSError, ValueError):
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))
    return 0


def _too_much_on_disk(root: str) -> str:
    """Which limit the files below a folder break; nothing if none."""
    total = count = 0
    for folder, folders, names, fd in os.fwalk(root, follow_symlinks=False):
        if folder.count("/") - root.count("/") > DEPTH:
            return f"it made folders {DEPTH} deep"
        count += len(folders) + len(names)
        for name in names[:FILES]:
            with contextlib.suppress(OSError):
                total += os.stat(name, dir_fd=fd, follow_symlinks=False).st_blocks * 512
        if count > FILES:
            return f"it made more than {FILES:,} files"
        if total > DISK:
            return f"it wrote more than {DISK / 2**30:g} GiB"
    return ""


def _take_ops(setup: dict) -> None:
    """Copy the compiled ops that the judge has provided: loading one writes a lock beside it."""
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
            raise _rebuilt(told["error"])
        return codec.decode(told["value"])

    from shardlab.grading import programs  # noqa: F401  (noted below, before the exercises come in)

    codec = wire.Codec(callback=callback)
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
            answer = {"error": _described(error, f"{submission}/exercises")}
        wire.send(connection, answer)


def _carry_out(message: dict, codec: wire.Codec):
    args, kwargs = codec.decode(message["args"]), codec.decode(message["kwargs"])
    match message["op"]:
        case "import":
            switch.import_exercise(message["lab"])
        case "get":
            module = switch.import_exercise(message["lab"])
            return (True, getattr(module, message["name"])) if hasattr(module, message["name"]) else (False, None)
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
    from shardlab.launch import LaunchTimeout, RankError, launch

    plan = wire.receive(connection)
    os.register_at_fork(after_in_child=lambda: (connection.close(), _prctl(SET_DUMPABLE, 1)))
    ForkingPickler.loads = staticmethod(_plain_values)
    try:
        _take_ops(setup)
        experiments = [Experiment.model_validate(experiment) for experiment in plan["experiments"]]
        finished = launch(experiments, runs=plan["runs"], timeout=plan["timeout"], display=progress.Quiet(), start_method="fork")
        answer = {"runs": [run.record_json for run in finished]}
    except LaunchTimeout as error:
        answer = {"timeout": str(error)}
    except RankError as error:
        answer = {"rank": error.rank, "experiment": error.experiment, "error": error.error, "traceback": error.rank_traceback}
    except BaseException as error:
        answer = {"why": f"{type(error).__name__}: {error}"}
    wire.send(connection, answer)
