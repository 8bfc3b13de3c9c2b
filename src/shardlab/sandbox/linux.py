"""What Linux offers and Python's library does not: namespaces entered, privileges dropped, a process's settings."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import struct
import time

import psutil

ADDRESS = "10.77.0.1"
"""The second address of a box's loopback."""
NS_GET_USERNS, USER_NAMESPACE = 0xB701, 0x10000000
NAMESPACES = {"ipc": 0x08000000, "uts": 0x04000000, "net": 0x40000000, "pid": 0x20000000, "mnt": 0x00020000}
SET_DUMPABLE, SET_NO_NEW_PRIVILEGES, SET_SUBREAPER, DROP_FROM_BOUNDING_SET, DIE_WITH_PARENT = 4, 38, 36, 24, 1

_libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, value: int) -> None:
    """Change a setting of this process (`man 2 prctl`)."""
    _libc.prctl(option, value, 0, 0, 0)


def enter(handle: int, kind: int) -> None:
    """Move this process into a namespace, and close its descriptor; of process numbers, only its children move.

    Raises:
        OSError: the kernel refused.
    """
    if _libc.setns(handle, kind):
        raise OSError(ctypes.get_errno(), "cannot enter the box")
    os.close(handle)


def add_address() -> None:
    """Give the box's loopback a second address: Slurm does not start on a machine that has 127.0.0.1 alone."""
    set_address = 0x8916  # SIOCSIFADDR
    request = struct.pack("16sH2x4s8x", b"lo:1", socket.AF_INET, socket.inet_aton(ADDRESS))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket, contextlib.suppress(OSError):
        fcntl.ioctl(any_socket, set_address, request)


def drop_privileges() -> None:
    """Give up all capabilities, and all that a program with special rights could bring."""
    for capability in range(64):
        prctl(DROP_FROM_BOUNDING_SET, capability)
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    _libc.capset(header, none)
    prctl(SET_NO_NEW_PRIVILEGES, 1)


def below(process: int) -> list[psutil.Process]:
    """All processes that a process has started, and those that they have."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process).children(recursive=True)
    return []


def end_below(process: int) -> None:
    """Kill all processes below one; those of a fork bomb are stopped first, so that they cannot outrun it."""
    while left := [p for p in below(process) if p.status() != psutil.STATUS_ZOMBIE]:
        for sent in (signal.SIGSTOP, signal.SIGKILL):
            for one in left:
                with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
                    os.kill(one.pid, sent)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0] > 0:
                pass
        time.sleep(0.01)
