"""Submissions: found, opened without trust, and reduced to what is graded: the files of one `exercises` folder.

A submission is a folder, a .zip, .tar, .tar.gz or .tgz archive, or a git bundle. Nothing in it is executed here, no link is
followed, and nothing is written outside the given folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import resource
import signal
import stat
import subprocess
import tarfile
import tempfile
import unicodedata
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path, PurePosixPath

import psutil

from shardlab.errors import CourseError

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".bundle")
MODULE_BYTES = 2**20
"""A module of exercises is not larger."""
NOTEBOOK_BYTES = 50 * 2**20
NOTEBOOKS = 50
"""How many of a submission's notebooks are looked at."""
TOTAL_BYTES = 500 * 2**20
"""What an archive may hold, unpacked."""
ENTRIES = 20_000
NOTES = 200
"""How many of its notes are kept."""
OPENING_SECONDS = 120
OPENING_MEMORY = 2**30
DEPTH = 12


class SubmissionError(CourseError, ValueError):
    """A submission that cannot be graded; the message says why, and what its author can do."""


@dataclass
class Opened:
    """What was found in a submission.

    Attributes:
        files: the names of the exercise modules that were copied.
        notes: what was left out, and why.
        digest: of the files that are graded; equal for equal work.
    """

    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    digest: str = ""


def name_of(path: Path) -> str:
    """What a submission is called in the gradebook: its file's or folder's name."""
    name = path.name
    for ending in sorted(ARCHIVES, key=len, reverse=True):
        if name.lower().endswith(ending) and len(name) > len(ending):
            return name[: -len(ending)]
    return name


def file_name(name: str) -> str:
    """A name for files that is the submission's, as far as every file system allows, and that no other submission has."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    plain = re.sub(r"[^\w.-]+", "-", plain).strip("-.")[:60]
    return f"{plain or 'submission'}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}"


def find(paths: list[Path]) -> dict[str, Path]:
    """The submissions among some paths, by name.

    A folder that holds exercises is a submission. One that holds none, but folders or archives, is a class: each thing in it is a
    submission, a file of any other kind too, so that nobody is lost.

    Raises:
        SubmissionError: a path that is not there, or two submissions of one name.
    """
    found: dict[str, Path] = {}
    for path in paths:
        if not path.exists():
            raise SubmissionError(f"{path} is not there. Give folders, archives, or a folder of them.")
        inside = [p for p in sorted(path.iterdir()) if _may_be_one(p)] if path.is_dir() else []
        if inside and _exercises_below(path) is None:
            inside = [p for p in sorted(path.iterdir()) if not p.name.startswith((".", "__"))]
        else:
            inside = [path]
        for each in inside:
            name = name_of(each)
            if name in found and found[name].resolve() != each.resolve():
                raise SubmissionError(f"two submissions are called {name!r}: {found[name]} and {each}. Rename one of them.")
            found[name] = each
    return found


def _may_be_one(path: Path) -> bool:
    if path.name.startswith((".", "__")):
        return False
    return path.is_dir() or path.name.lower().endswith(ARCHIVES)


def _exercises_below(folder: Path) -> Path | None:
    """`exercises/` or `src/exercises/` in a folder, not in a folder of it."""
    for candidate in (folder / "exercises", folder / "src" / "exercises"):
        if candidate.is_dir() and not candidate.is_symlink():
            return candidate
    return None


def open_submission(path: Path, target: Path) -> Opened:
    """Copy a submission's exercises into `target/exercises`.

    Args:
        path: folder, archive or git bundle.
        target: a folder of the caller's own.

    Raises:
        SubmissionError: it cannot be read, is not safe to open, or holds no exercises.
    """
    opened = Opened()
    target.mkdir(parents=True, exist_ok=True)
    try:
        _keep(_entries(path, opened), target, opened)
    except (SubmissionError, MemoryError):
        raise
    except (OSError, tarfile.TarError, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise SubmissionError(f"{path.name} cannot be read: {error}. Pack it again.") from None
    except Exception as error:  # zlib and lzma have errors of their own
        raise SubmissionError(f"{path.name} cannot be read: {type(error).__name__}: {error}. Pack it again.") from None
    opened.digest = digest_of(target / "exercises")
    return opened


def open_apart(path: Path, target: Path) -> Opened:
    """`open_submission` in a process of its own, with limits: an archive's own headers can take memory and time without end.

    Raises:
        SubmissionError: as there, and where it takes more than it may.
    """
    context = get_context("forkserver")
    connection, theirs = context.Pipe()
    process = context.Process(target=_open_within_limits, args=(theirs, str(path), str(target)))
    process.start()
    theirs.close()
    try:
        if not connection.poll(OPENING_SECONDS):
            raise SubmissionError(f"{path.name} is not open after {OPENING_SECONDS} s. Hand in the folder exercises alone.")
        told = json.loads(connection.recv_bytes(2**20))
    except (EOFError, OSError, ValueError):
        raise SubmissionError(f"{path.name} ended the process that opened it. Hand in the folder exercises alone.") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # git too
        process.kill()
        process.join()
        connection.close()
    if "error" in told:
        raise SubmissionError(told["error"])
    return Opened(**told)


def _open_within_limits(connection: Connection, path: str, target: str) -> None:
    os.setsid()
    memory = psutil.Process().memory_info().data + OPENING_MEMORY
    for kind, value in ((resource.RLIMIT_DATA, memory), (resource.RLIMIT_FSIZE, 2 * TOTAL_BYTES)):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    try:
        opened = open_submission(Path(path), Path(target))
        told = vars(opened) | {
            "files": [name[:300] for name in opened.files[:NOTES]],
            "notes": [note[:500] for note in opened.notes[:NOTES]],
        }
    except SubmissionError as error:
        told = {"error": str(error)[:2000]}
    except MemoryError:
        told = {"error": f"{Path(path).name} takes too much memory to be opened. Hand in the folder exercises alone."}
    connection.send_bytes(json.dumps(told).encode())


def digest_of(folder: Path) -> str:
    """A digest of names and contents below a folder."""
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = os.fsencode(str(path.relative_to(folder)))
            whole.update(len(name).to_bytes(8, "big") + name + hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()


# --- what is in it: pairs of a path and a function that reads at most so many bytes ------------------------------------


def _entries(path: Path, opened: Opened) -> Iterator[tuple[PurePosixPath, callable]]:
    name = path.name.lower()
    if path.is_dir():
        archives = [p for p in sorted(path.rglob("*")) if p.name.lower().endswith(ARCHIVES) and p.is_file() and not p.is_symlink()]
        modules = any(path.rglob("exercises/*.py"))
        if not modules and len(archives) == 1:  # as learning-management systems hand them out: a folder with one archive in it
            opened.notes.append(f"opened {archives[0].name}")
            return _entries(archives[0], opened)
        return _in_folder(path, opened)
    if not path.is_file():
        raise SubmissionError(f"{path.name} is neither a folder nor a file.")
    if name.endswith(".bundle"):
        return _in_bundle(path, opened)
    if name.endswith(".zip"):
        return _in_zip(path, opened)
    if name.endswith(ARCHIVES):
        return _in_tar(path, opened)
    raise SubmissionError(f"{path.name} is no folder, .zip, .tar.gz or git bundle. Hand in one of these.")


def _in_folder(path: Path, opened: Opened):
    count = 0
    for folder, folders, names, fd in os.fwalk(path, follow_symlinks=False):
        relative = PurePosixPath(Path(folder).relative_to(path).as_posix())
        folders[:] = [] if len(relative.parts) >= DEPTH else sorted(f for f in folders if not f.startswith((".", "__pycache__")))
        for name in sorted(names):
            count += 1
            if count > ENTRIES:
                raise SubmissionError(f"{path.name} holds more than {ENTRIES:,} files. Hand in the folder exercises alone.")

            def read(limit: int, name=name, fd=fd) -> bytes:
                handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=fd)
                with os.fdopen(handle, "rb") as file:
                    if not stat.S_ISREG(os.fstat(handle).st_mode):
                        raise OSError("is no file")
                    return file.read(limit)

            if os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode & 0o170000 == stat.S_IFLNK:
                opened.notes.append(f"{relative / name} is a link, and was left out")
                continue
            yield relative / name, read


def _in_zip(path: Path, opened: Opened):
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if len(entries) > ENTRIES:
            raise SubmissionError(f"{path.name} holds more than {ENTRIES:,} entries. Hand in the folder exercises alone.")
        for entry in entries:
            inside = _safe(entry.filename, path)
            if entry.is_dir():
                continue
            if stat.S_ISLNK(entry.external_attr >> 16):
                opened.notes.append(f"{inside} is a link, and was left out")
                continue

            def read(limit: int, entry=entry) -> bytes:
                with archive.open(entry) as file:
                    return file.read(limit)

            yield inside, read


def _in_tar(path: Path, opened: Opened, mode: str = "r:*"):
    total = 0
    with tarfile.open(path, mode) as archive:
        for count, entry in enumerate(archive):
            inside = _safe(entry.name, path)
            # The archive is unpacked as it is gone through, so what its entries say that they hold is counted before that.
            total += max(0, entry.size)
            if total > TOTAL_BYTES or count > ENTRIES:
                raise SubmissionError(
                    f"{path.name} holds more than {TOTAL_BYTES // 2**20} MiB or {ENTRIES:,} entries when it is unpacked. "
                    "Hand in the folder exercises alone."
                )
            if entry.issym() or entry.islnk():
                opened.notes.append(f"{inside} is a link, and was left out")
            elif entry.isfile():

                def read(limit: int, entry=entry) -> bytes:
                    return archive.extractfile(entry).read(limit)

                yield inside, read


def _in_bundle(path: Path, opened: Opened):
    """The newest commit of a git bundle. Git only unpacks here: no hook, no filter and no submodule of its has a say."""
    calm = {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_TERMINAL_PROMPT": "0", "PATH": os.environ["PATH"]}
    with tempfile.TemporaryDirectory() as temporary:

        def git(*words: str) -> str:
            words = ("git", "-c", "core.hooksPath=/dev/null", *words)
            try:
                done = subprocess.run(words, cwd=temporary, env=calm, capture_output=True, timeout=60)
            except subprocess.TimeoutExpired:
                raise SubmissionError(f"{path.name}: git needs more than 60 s to open it. Hand in an archive.") from None
            if done.returncode:
                said = done.stderr.decode(errors="replace").strip().splitlines()
                raise SubmissionError(f"{path.name} is no git bundle that can be read: {said[-1] if said else 'git failed'}")
            return done.stdout.decode(errors="replace")

        heads = git("bundle", "list-heads", "--", str(path.resolve())).split("\n")
        named = {line.split()[1]: line.split()[0] for line in heads if len(line.split()) == 2}
        if not named:
            raise SubmissionError(f"{path.name} holds no commit. Make it with: git bundle create {path.name} HEAD")
        wanted = next((ref for ref in ("HEAD", "refs/heads/main", "refs/heads/master") if ref in named), next(iter(named)))
        git("init", "--quiet", "--bare", "repository")
        git("-C", "repository", "fetch", "--quiet", "--no-tags", "--", str(path.resolve()), wanted)
        git("-C", "repository", "archive", "--format=tar", "--output", f"{temporary}/tree.tar", named[wanted])
        opened.notes.append(f"commit {named[wanted][:12]} of {wanted}")
        yield from _in_tar(Path(temporary, "tree.tar"), opened)


def _safe(name: str, archive: Path) -> PurePosixPath:
    inside = PurePosixPath(name.replace("\\", "/"))
    if inside.is_absolute() or ".." in inside.parts or re.match(r"^[A-Za-z]:", name):
        raise SubmissionError(f"{archive.name} holds a path that leads out of it: {name!r}. It was not opened.")
    return inside


# --- what is kept -----------------------------------------------------------------------------------------------------


def _keep(entries, target: Path, opened: Opened) -> None:
    """Copy the modules of the one `exercises` folder that lies highest, and look at the notebooks."""
    found: dict[PurePosixPath, dict[PurePosixPath, bytes]] = {}
    total, notebooks = 0, 0
    for path, read in entries:
        parts = path.parts
        if any(part.startswith(".") or part in ("__pycache__", "__MACOSX", "solutions") for part in parts):
            continue
        if path.suffix == ".ipynb":
            notebooks += 1
            opened.notes += _notebook(path, read) if notebooks <= NOTEBOOKS else []
            continue
        if "exercises" not in parts[:-1] or path.suffix != ".py":
            continue
        at = parts.index("exercises")
        try:
            content = read(MODULE_BYTES + 1)
        except OSError as error:
            opened.notes.append(f"{path} cannot be read ({error}), and was left out")
            continue
        total += len(content)
        if len(content) > MODULE_BYTES:
            opened.notes.append(f"{path} is larger than {MODULE_BYTES // 1024} KiB, and was left out")
        elif total > TOTAL_BYTES:
            raise SubmissionError("its exercises take more room than all labs need. Hand in the files of the course alone.")
        else:
            found.setdefault(PurePosixPath(*parts[: at + 1]), {})[PurePosixPath(*parts[at + 1 :])] = content
    if not found:
        why = f" ({'; '.join(opened.notes[:5])})" if opened.notes else ""
        raise SubmissionError(f"no folder `exercises` with Python files in it was found{why}. Hand in src/exercises as it is.")
    # `src/exercises` next to another one is the learner's own copy of the course.
    folders = sorted(found, key=lambda folder: (len(folder.parts) - (folder.parts[-2:-1] == ("src",)), folder))
    opened.notes += [f"{folder} was left out: {folders[0]} was graded" for folder in folders[1:]]
    for relative, content in found[folders[0]].items():
        path = target / "exercises" / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        opened.files.append(str(relative))
    (target / "exercises" / "__init__.py").touch()


def _notebook(path: PurePosixPath, read) -> list[str]:
    """What is to be said of a notebook. It is looked at and not run: what is graded is in the exercises."""
    try:
        content = read(NOTEBOOK_BYTES + 1)
        if len(content) > NOTEBOOK_BYTES:
            return [f"{path} is larger than {NOTEBOOK_BYTES // 2**20} MiB, and was not looked at"]
        cells = json.loads(content)["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        ran = sum(cell.get("execution_count") is not None for cell in code)
        kinds = [output.get("ename") for cell in code for output in cell.get("outputs", []) if output.get("output_type") == "error"]
        errors = f", {len(kinds)} with an error ({kinds[0]})" if kinds else ""
        return [f"{path}: {ran} of {len(code)} cells were run{errors}"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{path} cannot be read as a notebook ({type(error).__name__})"]
