"""Submissions as they come, and as no instructor wants them: each is made in a folder, and says what its grade must be.

The tests grade them all together; `bench/grading.py` grades a hundred of them.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shardlab.course.authoring import skeleton
from shardlab.hardware import ROOT
from shardlab.labs import named

STEM = "lab02_zero_stages"
TASKS = [f"2.{number}" for number in range(1, 9)]


@dataclass(frozen=True)
class Kind:
    """One kind of submission to lab 02.

    Attributes:
        name: what it is called.
        make: called with a folder that does not exist yet; returns what is handed in.
        passes: the tasks that must pass; every other one must not.
        says: what must be in its row: a part of its error, of its notes, or of the message of a task that has not passed.
        confined: graded without walls around it too: it does nothing beyond its own process, and shows a limit or an end that
            walls could have been needed for. Of the others, many kill, delete and overwrite all that they can reach, and are
            never to be run outside of a box.
    """

    name: str
    make: Callable[[Path], Path]
    passes: tuple[str, ...]
    says: str = ""
    confined: bool = False


ALL, NONE = tuple(TASKS), ()


def solution() -> str:
    return named(STEM).solution.read_text()


def package(folder: Path, source: str | bytes | None, name: str = f"{STEM}.py") -> Path:
    """A folder with `exercises/` in it."""
    inside = folder / "exercises"
    inside.mkdir(parents=True)
    if source is not None:
        (inside / name).write_bytes(source if isinstance(source, bytes) else source.encode())
    return folder


def in_front(code: str) -> str:
    """The solution with code that runs when it is imported."""
    first, rest = solution().split("from __future__ import annotations\n", 1)
    return f"{first}from __future__ import annotations\n{code}\n{rest}"


def behind(code: str) -> str:
    return f"{solution()}\n\n{code}\n"


def in_task(task: str, code: str) -> str:
    """The solution, but one task's body is this code."""
    begin, end = f"    # BEGIN SOLUTION {task}\n", "    # END SOLUTION"
    parts = solution().split(begin)
    rest = [part.partition(end)[2] for part in parts[1:]]
    lines = "".join(f"    {line}\n" for line in code.splitlines())
    return parts[0] + "".join(f"{lines}    # (the end){after}" for after in rest)


def half(done: int) -> str:
    """The first tasks solved, the others left as they were."""
    source = solution()
    for task in TASKS[done:]:
        pattern = rf"( *)# BEGIN SOLUTION {re.escape(task)}\n.*?# END SOLUTION"
        source = re.sub(pattern, rf'\1raise NotImplementedError("Task {task}: not yet")', source, flags=re.DOTALL)
    return source


def alone(stem: str, task: str) -> str:
    """The solution of one task of a lab; the others are not written."""
    others = rf"# BEGIN SOLUTION (?!{re.escape(task)}\n)(\S+)\n.*?# END SOLUTION"
    return re.sub(others, r'raise NotImplementedError("Task \1: not yet")', named(stem).solution.read_text(), flags=re.DOTALL)


def without(*tasks: str) -> tuple[str, ...]:
    return tuple(task for task in TASKS if task not in tasks)


# --- archives ---------------------------------------------------------------------------------------------------------


def zipped(folder: Path, prefix: str = "") -> Path:
    target = folder.with_suffix(".zip")
    folder.mkdir(parents=True)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{prefix}exercises/{STEM}.py", solution())
    folder.rmdir()
    return target


def tarred(folder: Path, members: dict[str, bytes | tarfile.TarInfo]) -> Path:
    target = folder.with_name(folder.name + ".tar.gz")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(target, "w:gz") as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return target


def link(name: str, target: str) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = tarfile.SYMTYPE, target
    return entry


def zip_bomb(folder: Path) -> Path:
    """Modules of 200 MB of zeros each, in an archive of less than one."""
    target = folder.with_suffix(".zip")
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(3):
            with archive.open(f"exercises/lab0{number}_bomb.py", "w") as file:
                for _ in range(200):
                    file.write(bytes(2**20))
    return target


def tar_bomb(folder: Path) -> Path:
    """600 MB of zeros that the archive has to be read through."""
    target = folder.with_name(folder.name + ".tar.gz")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(target, "w:gz", compresslevel=1) as archive:
        entry = tarfile.TarInfo("data.bin")
        entry.size = 600 * 2**20

        class Zeros(io.RawIOBase):
            def read(self, size=-1):
                return bytes(size)

        archive.addfile(entry, Zeros())
    return target


def header_bomb(folder: Path) -> Path:
    """An archive of 9 MB whose first header is 2 GB long."""
    target = folder.with_name(folder.name + ".tar.gz")
    target.parent.mkdir(parents=True, exist_ok=True)
    entry = tarfile.TarInfo("x")
    entry.type, entry.size = tarfile.XHDTYPE, 2 * 2**30
    with gzip.open(target, "wb", compresslevel=1) as file:
        file.write(entry.tobuf(tarfile.USTAR_FORMAT))
        for _ in range(128):
            file.write(bytes(2**24))
    return target


def bundle(folder: Path) -> Path:
    """A git bundle of a course's clone with the solution in src/exercises."""
    package(folder / "src", solution())
    target = folder.with_name(folder.name + ".bundle")

    def git(*words: str) -> None:
        who = ("-c", "user.name=a learner", "-c", "user.email=learner@example.org")
        subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)

    git("init", "--quiet", "--initial-branch=main")
    git("add", "-A")
    git("commit", "--quiet", "-m", "done")
    git("bundle", "create", "--quiet", str(target), "main")
    shutil.rmtree(folder)
    return target


def with_link(folder: Path) -> Path:
    """The module is a link to the solution, wherever the course lies."""
    package(folder, None)
    (folder / "exercises" / f"{STEM}.py").symlink_to(named(STEM).solution)
    return folder


def with_dead_notebook(folder: Path) -> Path:
    package(folder, solution())
    dead = {"output_type": "error", "ename": "DeadKernelError", "evalue": "Kernel died", "traceback": []}
    cell = {"cell_type": "code", "source": "lab.f()", "metadata": {}, "execution_count": None, "outputs": [dead]}
    (folder / f"{STEM}.ipynb").write_text(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    (folder / "cut short.ipynb").write_text('{"cells": [{"cell_ty')
    return folder


# --- code that does harm ----------------------------------------------------------------------------------------------

FORK_BOMB = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
MEMORY = "import numpy\nhog = numpy.ones(50 * 10**9 // 8)"
# Each child holds the same 1 GiB, which counts for each of them. Memory of their own took two idle cores of a virtual machine 14.5 s
# for 12 GiB (7.5 s when it had just been used), and busy ones longer than the class's limit for a call.
MEMORY_IN_CHILDREN = """import os, time
hog = bytes(range(256)) * 2**22
for _ in range(30):
    if os.fork() == 0:
        time.sleep(600)
time.sleep(600)"""
FULL_DISK = """import os
for folder in ("/tmp", os.getcwd(), "/dev/shm", os.path.expanduser("~"), os.path.dirname(__file__)):
    try:
        with open(os.path.join(folder, "full"), "xb") as file:
            while True:
                file.write(bytes(2**24))
    except OSError:
        pass"""
DELETE = f"""import os, shutil
for folder in ({str(ROOT)!r}, "/tmp", os.path.expanduser("~"), os.path.dirname(os.path.dirname(__file__)), "/dev/shm"):
    shutil.rmtree(folder, ignore_errors=True)"""
FLOOD = """import sys
for _ in range(1024):
    sys.stdout.write("x" * 2**20)
    sys.stderr.write("")"""
KILL = """import os, signal
for process in (os.getppid(), -1):
    try:
        os.kill(process, signal.SIGKILL)
    except OSError:
        pass"""
STOP = """import os, signal, time
for process in (-1, *range(1, 60)):
    if process != os.getpid():
        try:
            os.kill(process, signal.SIGSTOP)
        except OSError:
            pass
for _ in range(100):
    if os.fork() == 0:
        time.sleep(600)
time.sleep(600)"""
NAMELESS = """import os, time
for _ in range(12):
    os.posix_fallocate(os.memfd_create("x"), 0, 2**30)
time.sleep(600)"""
OVERWRITE_PYTEST = """import sys
import shardlab.milestones.exercises as exercises
import shardlab.milestones.messages as messages
import shardlab.milestones.scoreboard as scoreboard
messages.require = messages.require_error = lambda *a, **k: None
exercises.Lab.__getattr__ = lambda self, name: (lambda *a, **k: None)
scoreboard.Milestone.earned = property(lambda self: self.points)
try:
    import _pytest.reports
    _pytest.reports.TestReport.passed = property(lambda self: True)
except ImportError:
    pass"""
SYS_MODULES = """import sys, types
class Everything(types.ModuleType):
    def __getattr__(self, name):
        return lambda *a, **k: None
for name in list(sys.modules):
    if name.startswith(("shardlab.grading", "_pytest", "pytest", "json")):
        sys.modules[name] = Everything(name)"""
AT_EXIT = """import atexit
def full_score():
    print("100/100 all milestones passed")
    import json, os, sys
    for fd in range(3, 64):
        try:
            os.write(fd, b"8 passed")
        except OSError:
            pass
atexit.register(full_score)
import sys; sys.exit(0)"""
FORGED = f"""import json, os
milestones = [dict(lab={STEM!r}, task=task, name="test", points=99, verdict="passed", message="") for task in {TASKS!r}]
forged = dict(format=1, name="x", whole=True, error="", milestones=milestones, labs=[{STEM!r}], outcome="finished")
for top in ("/", os.getcwd(), os.path.expanduser("~"), "/tmp", "/box", os.path.dirname(__file__)):
    for folder, folders, _ in os.walk(top):
        folders[:] = [f for f in folders if f not in ("proc", "usr", "sys", "lib", "lib64", "site-packages")][:50]
        for name in ("milestones.json", "run.json", "results.json", "gradebook.csv", "gradebook.json"):
            try:
                with open(os.path.join(folder, name), "w") as file:
                    json.dump(forged, file)
            except OSError:
                pass
os._exit(0)"""
ON_THE_WIRE = """import json, os, struct
answer = json.dumps({"value": {"$": "tuple", "items": [True, {"$": "object", "number": 0, "kind": "x", "text": "x"}]}}).encode()
for fd in range(3, 64):
    for _ in range(8):
        try:
            os.write(fd, struct.pack(">Q", len(answer)) + answer)
        except OSError:
            break"""
SOLUTIONS = f"""import glob, os
code = ""
for root in ({str(ROOT)!r}, "/", "/home", "/root", "/work", "/tmp"):
    for path in glob.glob(os.path.join(root, "**", "solutions", "**", "{STEM}.py"), recursive=True):
        code = open(path).read()
exec(code)"""
NEIGHBOURS = f"""import glob
code = ""
for place in ("/tmp/**", {str(ROOT.parent)!r} + "/**", "/proc/[0-9]*/root/tmp/**", "/proc/[0-9]*/cwd/**"):
    for path in glob.glob(place + "/exercises/{STEM}.py", recursive=True):
        if path != __file__:
            code = open(path).read() or code
exec(code)"""
ALWAYS_EQUAL = """class Equal(dict):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
    def __abs__(self): return 0.0
    def __sub__(self, other): return 0.0
    def __le__(self, other): return True
    def __lt__(self, other): return True
    def __getitem__(self, key): return self
    def __getattr__(self, name): return self
    def __call__(self, *a, **k): return self
    def get(self, *a): return self
return Equal()"""
SUPERVISOR = """import os, re
parent = os.getppid()
for process in (parent, 1, 2):
    try:
        with open(f"/proc/{process}/mem", "r+b") as memory:
            memory.seek(0x400000)
            memory.write(b"x")
        os.remove("/box/untouched")
    except (OSError, ValueError):
        pass
    for fd in range(64):
        try:
            os.open(f"/proc/{process}/fd/{fd}", os.O_RDWR)
            import shutil; shutil.copy(f"/proc/{process}/fd/{fd}", "/tmp/taken")
        except OSError:
            pass"""
FOLDERS = """import os
where = os.getcwd()
for start in ("/box/ops", "/tmp"):
    try:
        os.chdir(start)
        for _ in range(3000):
            os.mkdir("d")
            os.chdir("d")
    except OSError:
        pass
os.chdir(where)"""
PROGRAM = """changes = {"name": "own-zero-2", "method": method, "deepspeed": config}
if baseline.name == "own":
    changes |= {"program": "shardlab.milestones.engine_runs:train", "options": {"load": "/tmp/pickle"}}
return baseline.model_copy(update=changes | {"name": f"{baseline.name}-zero-2"})"""
NETWORK = """import socket
for address in (("127.0.0.1", 22), ("10.0.0.1", 80), ("1.1.1.1", 53)):
    try:
        socket.create_connection(address, timeout=2)
        raise SystemExit(f"the network answers: {address}")
    except OSError:
        pass"""

KINDS = [
    Kind("complete", lambda f: package(f, solution()), ALL, confined=True),
    Kind("untouched", lambda f: package(f, skeleton(solution(), f"src/exercises/{STEM}.py")), NONE, "Task 2.1"),
    Kind("half done", lambda f: package(f, half(4)), ("2.1", "2.2", "2.3", "2.4"), "Task 2.5", confined=True),
    Kind("syntax error", lambda f: package(f, in_front("def broken(:\n    pass")), NONE, "SyntaxError"),
    Kind("import hangs", lambda f: package(f, in_front("import time\ntime.sleep(10**6)")), NONE, "did not come back"),
    Kind("infinite loop", lambda f: package(f, in_task("2.5", "while True:\n    pass")), without("2.5"), "did not come back", confined=True),
    Kind("sys.exit at import", lambda f: package(f, in_front("import sys\nsys.exit(0)")), NONE, "SystemExit", confined=True),
    Kind("fork bomb", lambda f: package(f, in_front(FORK_BOMB)), NONE, "processes"),
    Kind("50 GB allocated", lambda f: package(f, in_task("2.8", MEMORY)), without("2.8"), "MemoryError", confined=True),
    Kind("memory in children", lambda f: package(f, in_task("2.8", MEMORY_IN_CHILDREN)), without("2.8"), "memory"),
    Kind("full disk", lambda f: package(f, in_front(FULL_DISK)), ALL),
    Kind("files deleted", lambda f: package(f, in_front(DELETE)), without("2.3", "2.7")),
    Kind("stdout flooded", lambda f: package(f, in_front(FLOOD)), ALL),
    Kind("wrong encoding", lambda f: package(f, solution().replace('"""', '"""Übung ', 1).encode("latin-1", "replace")), NONE, "utf-8"),
    Kind("a link", with_link, NONE, "link"),
    Kind("a link in an archive", lambda f: tarred(f, {"a": link(f"exercises/{STEM}.py", str(named(STEM).solution))}), NONE, "link"),
    Kind("a path out of the archive", lambda f: tarred(f, {f"exercises/../../../{STEM}.py": b"x = 1"}), NONE, "leads out"),
    Kind("an absolute path", lambda f: tarred(f, {"/tmp/exercises/lab.py": b"x = 1"}), NONE, "leads out"),
    Kind("zip bomb", zip_bomb, NONE, "larger than"),
    Kind("tar bomb", tar_bomb, NONE, "MiB"),
    Kind("header bomb", header_bomb, NONE, "too much memory"),
    Kind("empty folder", lambda f: f.mkdir(parents=True) or f, NONE, "no folder `exercises`"),
    Kind("renamed module", lambda f: package(f, solution(), "my_lab02.py"), NONE, f"a file {STEM}.py in exercises/"),
    Kind("damaged archive", lambda f: _damaged(f), NONE, "cannot be read"),
    Kind("dead notebook", with_dead_notebook, ALL, "DeadKernelError"),
    Kind("zip", zipped, ALL),
    Kind("zip of a course", lambda f: zipped(f, "my course/src/"), ALL),
    Kind("git bundle", bundle, ALL, "commit"),
    Kind("kills what it can", lambda f: package(f, in_front(KILL)), NONE, "ended"),
    Kind("stops what watches", lambda f: package(f, in_front(STOP)), NONE, "processes"),
    Kind("memory in files without a name", lambda f: package(f, in_task("2.8", NAMELESS)), without("2.8"), "memory"),
    Kind("overwrites pytest", lambda f: package(f, f"{OVERWRITE_PYTEST}\n{half(0)}"), NONE),
    Kind("replaces sys.modules", lambda f: package(f, f"{SYS_MODULES}\n"), NONE),
    Kind("prints a full score at exit", lambda f: package(f, AT_EXIT), NONE, "SystemExit"),
    Kind("os._exit(0)", lambda f: package(f, in_task("2.2", "import os\nos._exit(0)")), without("2.2"), "os._exit", confined=True),
    Kind("forged results", lambda f: package(f, FORGED), NONE, "ended"),
    Kind("forges on the wire", lambda f: package(f, ON_THE_WIRE + "\n" + half(0)), NONE),
    Kind("reads the solutions", lambda f: package(f, SOLUTIONS), NONE),
    Kind("reads its neighbours", lambda f: package(f, NEIGHBOURS), NONE),
    Kind("equal to everything", lambda f: package(f, in_task("2.6", ALWAYS_EQUAL)), without("2.6")),
    Kind("says not run", lambda f: package(f, in_task("2.5", "import pytest\npytest.skip('no GPU')")), without("2.5"), "Skipped", confined=True),
    Kind("writes into the supervisor", lambda f: package(f, in_front(SUPERVISOR)), ALL),
    Kind("folders without end", lambda f: package(f, in_front(FOLDERS)), ALL),
    Kind("an error that UTF-8 cannot hold", lambda f: package(f, in_task("2.3", "raise ValueError('\\ud800')")), without("2.3")),
    Kind("a program of its own to launch", lambda f: package(f, in_task("2.4", PROGRAM)), without("2.4"), "the same from another baseline"),
    Kind("looks for the network", lambda f: package(f, in_front(NETWORK)), ALL),
    Kind("Zoë's \"lab 02\" — 完成 ; rm -rf ~", lambda f: package(f, solution()), ALL),
    Kind("=1+1", lambda f: package(f, solution()), ALL),
]  # fmt: skip


def _damaged(folder: Path) -> Path:
    path = zipped(folder)
    os.truncate(path, path.stat().st_size // 2)
    return path


def make(folder: Path, kinds: list[Kind] = KINDS) -> dict[str, Kind]:
    """Make one submission of each kind in a folder; the kinds, by the names that the submissions have."""
    from shardlab.grading.submissions import name_of

    folder.mkdir(parents=True, exist_ok=True)
    return {name_of(kind.make(folder / kind.name)): kind for kind in kinds}
