"""What all tests share."""

import os
import shutil
import subprocess
import tempfile

import psutil
import pytest

from shardlab import hardware, switch
from shardlab.milestones.launches import REFERENCES


@pytest.fixture(autouse=True)
def same_exercises_afterwards(monkeypatch):
    """A test that switches the exercises switches for itself alone."""
    before = os.environ.get(switch.VARIABLE)
    yield
    if before is None:
        os.environ.pop(switch.VARIABLE, None)
    else:
        os.environ[switch.VARIABLE] = before


@pytest.fixture(autouse=True, scope="session")
def references(tmp_path_factory):
    """What milestones compare with needs nobody's exercises: it is made once for matrix, notebooks and classes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(REFERENCES, str(tmp_path_factory.mktemp("references")))
        yield


@pytest.fixture(autouse=True, scope="session")
def no_rank_outlives_the_tests():
    """The fork server, this process's own child, may stay until it ends; the ranks below it may not."""
    yield
    below = [process for process in psutil.Process().children(recursive=True) if process.ppid() != os.getpid()]
    left = [process for process in below if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not left, f"ranks left behind: {left}"


def cluster_missing() -> str | None:
    """What keeps a local Slurm cluster from starting here; None if nothing does."""
    absent = [
        command
        for command in ("slurmctld", "slurmd", "munged")
        if not shutil.which(command, path=os.environ["PATH"] + ":/usr/sbin")
    ]
    return f"{', '.join(absent)} not installed: apt-get install slurm-wlm munge" if absent else None


def cluster_command(*words: str) -> str:
    """Run `slurm/local_cluster.sh`; what it printed."""
    done = subprocess.run([hardware.ROOT / "slurm" / "local_cluster.sh", *words], capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def slurm_where_possible():
    """A real Slurm of two nodes for the whole session, beside any other that is up; None where its packages are missing."""
    if cluster_missing():
        yield None
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHARDLAB_CLUSTER", tempfile.mkdtemp(prefix="shardlab-test-"))
        patch.delenv("SLURM_CONF", raising=False)
        cluster_command("up")
        try:
            yield "up"
        finally:
            cluster_command("down")


@pytest.fixture(scope="session")
def slurm_cluster(slurm_where_possible):
    """The same, for tests that are not run without it."""
    if slurm_where_possible is None:
        pytest.skip(cluster_missing())
