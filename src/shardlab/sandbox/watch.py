"""The process between judge and box: it starts the supervisor in the namespaces, and ends the box that breaks a limit."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import stat
import time
from pathlib import Path

from shardlab.sandbox import wire
from shardlab.sandbox.inside import supervise
from shardlab.sandbox.limits import DEPTH, DISK, FILES, MEMORY, PROCESSES
from shardlab.sandbox.linux import (
    NAMESPACES,
    NS_GET_USERNS,
    SET_SUBREAPER,
    USER_NAMESPACE,
    add_address,
    below,
    end_below,
    enter,
    prctl,
)

WATCH_SECONDS = 0.25


def watch_over_box(control: socket.socket, watch: socket.socket, setup: dict) -> None:
    """Fork the supervisor into the namespaces, and watch over all that is in them.

    This process enters all of them but that of the process numbers, which holds for children alone. So nothing in the box can
    see it, stop it or end it.

    Args:
        control: where the judge asks the supervisor.
        watch: where the judge is told which limit was broken.
        setup: as for `supervise`, without `ours`; `disk` is the folder whose files count.
    """
    prctl(SET_SUBREAPER, 1)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # where memory runs short, a box goes first
    # A baseline, since /proc shows this process no more once the box's mounts are entered.
    first, loaded = setup["namespaces_of"], _resident(os.getpid())
    if first is not None:
        handles = {name: os.open(f"/proc/{first}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC) for name in (*NAMESPACES, "user")}
        # With --disable-userns, what is in the box belongs to one user namespace, and runs in another below that.
        owner = fcntl.ioctl(handles["net"], NS_GET_USERNS)
        for handle, kind in [(owner, USER_NAMESPACE), *((handles[name], kind) for name, kind in NAMESPACES.items())]:
            enter(handle, kind)
        add_address()
        enter(handles["user"], USER_NAMESPACE)
    ours, telling = os.pipe()
    supervisor = os.fork()
    if supervisor == 0:
        try:
            watch.close()
            os.close(ours)
            supervise(control, setup | {"ours": telling})
        finally:
            os._exit(0)
    control.close()
    os.close(telling)
    os.set_blocking(ours, False)
    why = "the watch over its memory, processes and files failed"
    try:
        why = _broken_limit(supervisor, first, loaded, ours, setup["disk"])
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
            end_below(os.getpid())


def _broken_limit(supervisor: int, first: int | None, loaded: int, ours: int, disk: str) -> str:
    """Wait until the supervisor ends, or a limit is broken: which one; nothing if none was."""
    checked, told, hiding, hid = 0.0, b"", set(), set()
    while os.waitpid(supervisor, os.WNOHANG)[0] == 0:
        time.sleep(WATCH_SECONDS)
        with contextlib.suppress(BlockingIOError):
            told += os.read(ours, 2**16)
        # In namespaces of its own, every process that is seen belongs to the box.
        in_box = [int(name) for name in os.listdir("/proc") if name.isdigit()] if first is not None else None
        seen = in_box if in_box is not None else [process.pid for process in below(supervisor)]
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
