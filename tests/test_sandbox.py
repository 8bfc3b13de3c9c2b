"""The box and the wire: values come through as they are, and neither a message nor a file can reach out of the box."""

import base64
import json
import math
import os
import shutil
import socket
import struct
import threading
import time
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import strategies as st

from shardlab.hardware import ROOT
from shardlab.milestones.agreement import agree, judging
from shardlab.milestones.exercises import BoxedLab
from shardlab.milestones.messages import MilestoneFailed
from shardlab.run.experiment import Experiment
from shardlab.sandbox import boxes, wire
from shardlab.sandbox.boxes import Box, BoxEnded
from shardlab.sandbox.exchange import Exchange

pytestmark = pytest.mark.boxes

# --- the wire ---------------------------------------------------------------------------------------------------------

JUDGE = wire.Codec(ask=lambda *_: None)
BOXED = wire.Codec(callback=lambda *_: None)


def there_and_back(value):
    return JUDGE.decode(json.loads(json.dumps(BOXED.encode(value))))


@pytest.mark.parametrize(
    "value",
    [None, True, 3, 2**80, 0.1, math.inf, "Zoë \"'\n", [1, [2.0, "x"]], (1, (2,)), {"a": {1: (2, 3)}, "$": 1}, {1, 2}, b"\0\xff"]
    + [range(3, 9, 2), Path("/a b"), Experiment(name="a", seed=3)],
    ids=repr,
)  # fmt: skip
def test_values_come_back_as_they_were(value):
    back = there_and_back(value)
    assert back == value and type(back) is type(value)


def test_nan_and_arrays_come_back():
    assert math.isnan(there_and_back(math.nan))
    for tensor in (torch.randn(2, 3), torch.arange(5), torch.randn(4).bfloat16(), torch.empty(0, 3), torch.tensor(True)):
        back = there_and_back(tensor)
        assert back.dtype == tensor.dtype and back.shape == tensor.shape and torch.equal(back, tensor)
    array = numpy.arange(6, dtype=numpy.int16).reshape(2, 3)
    assert numpy.array_equal(there_and_back(array), array) and there_and_back(numpy.int64(7)) == 7


def safetensors(header: dict, data: bytes) -> str:
    """A file of that format with any header."""
    text = json.dumps(header).encode()
    return base64.b64encode(struct.pack("<Q", len(text)) + text + data).decode()


def test_objects_of_the_other_side_are_never_made_here():
    class Equal:
        def __eq__(self, other):
            return True

    back = there_and_back(Equal())
    assert isinstance(back, wire.Remote) and not back == 1 and not back == {}
    for message in (
        {"$": "function", "number": 0},
        {"$": "lent", "number": 0},
        {"$": "model", "number": 0, "config": "{}", "weights": ""},
        {"$": "tokenizer"},
        {"$": "run", "folder": "/"},
        {"$": "nothing"},
        {"no kind": 1},
        {"$": "tensor", "data": ""},
        {"$": "tensor", "data": 7},
        {"$": "tensor", "data": safetensors({"": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4]}}, b"1234")},
        {"$": "tensor", "data": safetensors({"": {"dtype": "__class__", "shape": [1], "data_offsets": [0, 4]}}, b"1234")},
        {"$": "tensor", "data": safetensors({"another": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"1234")},
        {"$": "numpy", "dtype": "O", "shape": [1], "data": ""},
        {"$": "range", "of": ["a"]},
        {"$": "dict", "items": [[[1], 2]]},
    ):
        with pytest.raises(wire.WireError):
            JUDGE.decode(message)


@pytest.mark.parametrize(
    "sent, said",
    [
        (struct.pack(">Q", 2**40), "bytes"),
        (struct.pack(">Q", 5) + b"\xff\xfe{]x", "no message"),
        (struct.pack(">Q", 2) + b"[]", "no message"),
        (struct.pack(">Q", 200_002) + b'{"a":' * 40_000 + b"12", "no message"),
        (struct.pack(">Q", 9) + b"{}", "gone"),
        (b"", "gone"),
    ],
)
def test_what_is_no_message_is_refused(sent, said):
    mine, other = wire.pair()
    threading.Thread(target=lambda: (other.sendall(sent), other.close())).start()
    with pytest.raises(wire.WireError, match=said):
        wire.receive(mine, time.monotonic() + 5)
    mine.close()


def test_silence_is_not_waited_for():
    mine, _other = wire.pair()
    with pytest.raises(wire.WireTimeout):
        wire.receive(mine, time.monotonic() + 0.05)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def exchange(tmp_path):
    for name in ("here", "inside", "outside"):
        (tmp_path / name).mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    return Exchange(tmp_path / "here", tmp_path / "inside")


def test_files_go_both_ways_and_so_do_removals(exchange):
    (exchange.here / "a").mkdir()
    (exchange.here / "a" / "one").write_text("1")
    exchange.push()
    assert (exchange.inside / "a" / "one").read_text() == "1"
    (exchange.inside / "a" / "one").write_text("changed")
    (exchange.inside / "b").mkdir()
    (exchange.inside / "b" / "two").write_text("2")
    exchange.pull()
    assert (exchange.here / "a" / "one").read_text() == "changed" and (exchange.here / "b" / "two").read_text() == "2"
    shutil.rmtree(exchange.inside / "a")
    exchange.pull()
    assert sorted(p.name for p in exchange.here.iterdir()) == ["b"]


def test_links_and_pipes_stay_in_the_box(exchange, tmp_path):
    (exchange.inside / "link").symlink_to(tmp_path / "outside" / "secret")
    (exchange.inside / "folder").symlink_to(tmp_path / "outside")
    os.mkfifo(exchange.inside / "pipe")
    exchange.pull()
    assert list(exchange.here.iterdir()) == []


def test_links_of_the_judge_reach_the_box_and_are_never_read_back(exchange, tmp_path):
    (exchange.here / "a").mkdir()
    (exchange.here / "link").symlink_to(exchange.here / "a")
    (exchange.here / "a" / "back").symlink_to("..")
    exchange.push()
    assert (exchange.inside / "link").readlink() == exchange.here / "a"
    assert str((exchange.inside / "a" / "back").readlink()) == ".."
    (exchange.inside / "link").unlink()
    (exchange.inside / "link").symlink_to(tmp_path / "outside")
    exchange.pull()
    assert (exchange.here / "link").readlink() == exchange.here / "a"
    (exchange.here / "link").unlink()
    (exchange.here / "link").mkdir()
    (exchange.here / "link" / "one").write_text("1")
    (exchange.here / "a" / "back").unlink()
    exchange.push()
    assert (exchange.inside / "link" / "one").read_text() == "1" and not (exchange.inside / "link").is_symlink()
    assert list((exchange.inside / "a").iterdir()) == []


def test_box_cannot_make_the_judge_write_elsewhere(exchange, tmp_path):
    """The judge writes a/secret and one; in the box somebody has put links in their places."""
    (exchange.inside / "a").symlink_to(tmp_path / "outside")
    (exchange.inside / "one").symlink_to(tmp_path / "outside" / "secret")
    (exchange.here / "a").mkdir()
    (exchange.here / "a" / "secret").write_text("mine")
    (exchange.here / "one").write_text("mine")
    exchange.push()
    assert (tmp_path / "outside" / "secret").read_text() == "secret"
    assert not (exchange.inside / "a").is_symlink() and (exchange.inside / "a" / "secret").read_text() == "mine"


def test_too_much_is_refused(exchange, monkeypatch):
    monkeypatch.setattr("shardlab.sandbox.exchange.FILES", 20)
    for number in range(30):
        (exchange.inside / str(number)).touch()
    with pytest.raises(BoxEnded, match="more than 20 files"):
        exchange.pull()


# --- the box ----------------------------------------------------------------------------------------------------------

LAB = '''
import ctypes, os, socket
SEEN = {}

def seen():
    """What is there."""
    answers = {}
    for path in (%r, "/root", "/home", "/work"):
        answers[path] = sorted(os.listdir(path)) if os.path.isdir(path) else None
    answers["processes"] = sum(name.isdigit() for name in os.listdir("/proc"))
    answers["capabilities"] = [line.split()[1] for line in open("/proc/self/status") if line.startswith(("CapEff", "CapPrm"))]
    answers["secret"] = os.environ.get("A_SECRET")
    answers["written"] = []
    for folder in (os.path.dirname(__file__), os.path.dirname(os.__file__), "/usr", "/etc", "/"):
        try:
            open(os.path.join(folder, "x"), "w")
            answers["written"].append(folder)
        except OSError:
            pass
    for setting in ("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/proc/self/oom_score_adj"):
        try:
            os.close(os.open(setting, os.O_WRONLY))
            answers["written"].append(setting)
        except OSError:
            pass
    answers["namespace"] = ctypes.CDLL(None).unshare(0x10000000)
    try:
        socket.create_connection(("127.0.0.1", %d), timeout=2)
        answers["network"] = True
    except OSError:
        answers["network"] = False
    return answers

def double(x): return 2 * x
def apply(f, x): return f(x) + double(1)
def keep(x):
    SEEN["x"] = x
def kept(): return SEEN.get("x")
def ranks(number): return number * int(os.environ.get("WORLD_SIZE", 1))
def write(path):
    path.write_text("written")
    return path
'''


@pytest.fixture
def box(tmp_path):
    if boxes.isolation()[0] != "bubblewrap":
        pytest.skip(boxes.isolation()[1])
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        package = tmp_path / "submission" / "exercises"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "lab.py").write_text(LAB % (str(ROOT), server.getsockname()[1]))
        with Box(tmp_path / "submission", tmp_path / "exchange") as made:
            yield made


def function(box, name):
    caller = box.caller()
    there, found = caller.ask({"op": "get", "lab": "lab", "name": name})
    assert there
    return found


def test_there_is_nothing_to_see_in_a_box(box):
    seen = function(box, "seen")()
    assert seen[str(ROOT)] == [*([".venv"] if (ROOT / ".venv").is_dir() else []), "slurm", "src"], "no labs, no solutions, no git"
    assert seen["processes"] <= 6 and set(seen["capabilities"]) == {"0" * 16}
    assert seen["written"] == [] and seen["network"] is False and seen["namespace"] == -1


def test_functions_of_the_judge_are_called_in_the_judge(box):
    called = []
    assert function(box, "apply")(lambda x: called.append(os.getpid()) or 10 * x, 4) == 42
    assert called == [os.getpid()]


def test_each_milestone_has_a_process_of_its_own(box):
    caller = box.caller()
    caller.ask({"op": "get", "lab": "lab", "name": "keep"})[1](5)
    assert caller.ask({"op": "get", "lab": "lab", "name": "kept"})[1]() == 5
    assert function(box, "kept")() is None


def test_what_only_computes_gives_the_same_on_a_rank_in_the_box(box):
    lab, numbers = BoxedLab("lab", box), st.tuples(st.integers(1, 9))
    with judging(lab):
        agree(lab.double, lambda number: 2 * number, numbers, count=5)
        with pytest.raises(MilestoneFailed, match="asks for the rank, WORLD_SIZE"):
            agree(lab.ranks, lambda number: number, numbers, count=5)
    assert lab.ranks(3) == 3 and "WORLD_SIZE" not in os.environ
    lab.close()


def test_files_travel_with_a_call(box, tmp_path):
    target = box.exchange / "new"
    assert function(box, "write")(target) == target and target.read_text() == "written"
    function(box, "write")(tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists(), "the box has a /tmp of its own"


def test_a_box_is_gone_when_it_is_closed(box):
    function(box, "double")(1)
    first = box._first
    box.close()
    end = time.monotonic() + 5
    while os.path.exists(f"/proc/{first}") and time.monotonic() < end:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{first}") and not box.work.exists()
