"""What all tests share."""

import os

import psutil
import pytest

from shardlab import switch


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
def no_rank_outlives_the_tests():
    """The fork server, this process's own child, may stay until it ends; the ranks below it may not."""
    yield
    below = [process for process in psutil.Process().children(recursive=True) if process.ppid() != os.getpid()]
    left = [process for process in below if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not left, f"ranks left behind: {left}"
