"""The folder that a judge and a box share: two copies, of which neither side can lead the other out."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from shardlab.sandbox.ended import BoxEnded
from shardlab.sandbox.limits import DEPTH, DISK, FILES, RECORD


class Exchange:
    """One folder, twice: the judge's own, and the box's. Neither side can make the other follow a link out of it."""

    def __init__(self, here: Path, inside: Path):
        self.here, self.inside = here, inside
        self._known: dict[str, dict[str, tuple]] = {}

    def push(self) -> None:
        """What has changed on the judge's side goes into the box, links as links: there they lead no further than the box."""
        self._copy(self.here, self.inside, links=True)

    def pull(self) -> None:
        """What has changed in the box comes out, links excepted.

        Raises:
            BoxEnded: more files or bytes than a box may leave.
        """
        self._copy(self.inside, self.here)

    def _copy(self, source: Path, target: Path, links: bool = False) -> None:
        known_source = self._known.setdefault(str(source), {})
        known_target = self._known.setdefault(str(target), {})
        found: dict[str, tuple] = {}
        total = 0
        for path, entry, folder in _entries(source):
            if entry.is_symlink():
                if links:
                    found[path] = ("link", os.readlink(entry.name, dir_fd=folder))
                    if known_source.get(path) != found[path]:
                        _write_link(target, Path(path), found[path][1])
            elif entry.is_dir(follow_symlinks=False):
                found[path] = ("folder",)
                if known_source.get(path) != ("folder",):
                    os.close(_open_folder(target, Path(path)))
                    known_target[path] = ("folder",)
            elif entry.is_file(follow_symlinks=False):
                try:
                    status = entry.stat(follow_symlinks=False)
                    # A box is asked thousands of times, and few answers change a file: what is as it was is not opened.
                    file = None if known_source.get(path) == _mark(status) else _opened(entry.name, folder)
                except OSError:
                    continue  # not to be read, not a file any more, or gone already
                with file or contextlib.nullcontext():
                    status = os.fstat(file.fileno()) if file else status
                    found[path] = _mark(status)
                    total += status.st_size
                    if total > DISK or len(found) > FILES:
                        raise BoxEnded(f"more than {FILES:,} files or {DISK / 2**30:g} GiB were left behind")
                    if path.endswith((".json", ".jsonl")) and status.st_size > RECORD:
                        raise BoxEnded(f"{path} is larger than {RECORD // 2**20} MiB")
                    if file:
                        known_target[path] = _write(target, Path(path), file, status)
        for path in sorted(set(known_source) - set(found), reverse=True):
            _remove(target, Path(path))
            known_target.pop(path, None)
        self._known[str(source)] = found


def _mark(status: os.stat_result) -> tuple:
    """What is another one once a file has changed."""
    return "file", status.st_size, status.st_mtime_ns, status.st_ino


def _entries(folder: Path | int, above: str = "") -> Iterator[tuple[str, os.DirEntry, int]]:
    """All below a folder, no link followed: the path from there, the entry, and a descriptor of the folder that it is in."""
    if above.count("/") > DEPTH:
        raise BoxEnded(f"folders are {DEPTH} deep")
    fd = folder if isinstance(folder, int) else os.open(folder, os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with os.scandir(fd) as entries:
            for entry in entries:
                yield above + entry.name, entry, fd
                if entry.is_dir(follow_symlinks=False):
                    try:
                        below = os.open(entry.name, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
                    except OSError:
                        continue  # not to be read, a link by now, or gone already
                    yield from _entries(below, f"{above}{entry.name}/")
    finally:
        os.close(fd)


def _opened(name: str, folder: int) -> BinaryIO:
    """A file, open for reading.

    Raises:
        OSError: it may not be read, or is no file: a link or a pipe.
    """
    file = os.fdopen(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a file", name)
    return file


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
        _clear(folder, path.name)
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
        return _mark(made)
    finally:
        os.close(folder)


def _clear(folder: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        pass
    except IsADirectoryError:
        shutil.rmtree(name, dir_fd=folder)


def _write_link(root: Path, path: Path, leads_to: str) -> None:
    folder = _open_folder(root, path.parent)
    try:
        _clear(folder, path.name)
        os.symlink(leads_to, path.name, dir_fd=folder)
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


def remove(folder: Path) -> None:
    """Remove a folder, however deep it is and whatever may not be read in it: `shutil.rmtree` gives up on both."""
    with contextlib.suppress(RecursionError):
        shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
            subprocess.run([*command, "--", str(folder)], capture_output=True)
