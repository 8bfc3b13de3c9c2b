"""The folder that a judge and a box share: two copies, of which neither side can lead the other out."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import subprocess
from pathlib import Path

from shardlab.sandbox.ended import BoxEnded
from shardlab.sandbox.limits import DEPTH, DISK, FILES, RECORD


class Exchange:
    """One folder, twice: the judge's own, and the box's. Neither side can make the other follow a link out of it."""

    def __init__(self, here: Path, inside: Path):
        self.here, self.inside = here, inside
        self._known: dict[str, dict[Path, tuple]] = {}

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
        found: dict[Path, tuple] = {}
        known_source = self._known.setdefault(str(source), {})
        known_target = self._known.setdefault(str(target), {})
        total = 0
        for folder, below, names, folder_fd in os.fwalk(source, follow_symlinks=False):
            relative = Path(folder).relative_to(source)
            if len(relative.parts) > DEPTH:
                raise BoxEnded(f"folders are {DEPTH} deep")
            if relative != Path():
                found[relative] = ("folder",)
                if known_source.get(relative) != ("folder",):
                    os.close(_open_folder(target, relative))
                    known_target[relative] = ("folder",)
            for path in (relative / name for name in below + names if links):
                try:
                    found[path] = ("link", os.readlink(path.name, dir_fd=folder_fd))
                except OSError:
                    continue  # a folder or a file
                if known_source.get(path) != found[path]:
                    _write_link(target, path, found[path][1])
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
        return ("file", made.st_size, made.st_mtime_ns, made.st_ino)
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
