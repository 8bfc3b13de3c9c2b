"""TensorBoard and Weights & Biases: what is written, where a key is found, and that it is nowhere else."""

import http.server
import importlib.util
import json
import struct
import subprocess
import sys
import threading
import types
from pathlib import Path

import psutil
import pytest

from shardlab.run import tracking
from shardlab.run.experiment import Experiment
from shardlab.run.run_folder import Run

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def nobody_logged_in(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there


@pytest.fixture
def run(tmp_path):
    return Run.create(Experiment(name="tracked", program="somewhere:something", ranks=1), runs=tmp_path / "runs")


@pytest.fixture
def server(monkeypatch):
    """A server that knows one key."""

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            import base64

            self.rfile.read(int(self.headers["Content-Length"]))
            known = self.headers["Authorization"] == "Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()
            body = json.dumps({"data": {"viewer": {"username": "ada"} if known else None}}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listening.server_port}")
        yield
        listening.shutdown()


def in_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", KEY)


def by_login(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1\n  login user\n  password {KEY}\n")
    (tmp_path / "netrc").chmod(0o600)


def on_kaggle(monkeypatch, tmp_path):
    module = types.ModuleType("kaggle_secrets")
    module.UserSecretsClient = lambda: types.SimpleNamespace(get_secret=lambda name: {"WANDB_API_KEY": KEY}[name])
    module.__spec__ = importlib.util.spec_from_loader("kaggle_secrets", loader=None)
    monkeypatch.setitem(sys.modules, "kaggle_secrets", module)


@pytest.mark.parametrize(
    "kept, said",
    [(in_the_environment, "environment"), (by_login, "login of wandb"), (on_kaggle, "Kaggle")],
    ids=["environment", "login", "Kaggle"],
)
def test_a_key_is_found_where_people_keep_it_and_not_printed(monkeypatch, tmp_path, capsys, kept, said):
    kept(monkeypatch, tmp_path)
    assert tracking.is_wandb_authenticated()
    printed = "".join(capsys.readouterr())
    assert said in printed and KEY not in printed


def test_without_a_key_one_is_told_what_to_do(capsys):
    assert not tracking.is_wandb_authenticated() and not tracking.test_wandb_connection()
    assert "wandb login" in capsys.readouterr().out


@pytest.mark.parametrize("key, works, said", [(KEY, True, "knows you as ada"), ("f" * 40, False, "the key is not taken")])
def test_a_server_that_answers(monkeypatch, capsys, server, key, works, said):
    monkeypatch.setenv("WANDB_API_KEY", key)
    assert tracking.test_wandb_connection() is works
    printed = "".join(capsys.readouterr())
    assert said in printed and key not in printed


def test_a_server_that_cannot_be_reached(monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert not tracking.test_wandb_connection()
    printed = "".join(capsys.readouterr())
    assert "cannot be reached" in printed and "wandb sync" in printed and KEY not in printed


def test_steps_are_in_tensorboard(run):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with tracking.tracked(run) as log:
        for step in (1, 2, 3):
            log(step, loss=1 / step)
    assert not (run.folder / "wandb").exists(), "there is no key"
    read = event_accumulator.EventAccumulator(str(run.folder / "tensorboard")).Reload()
    assert [(event.step, round(event.value, 4)) for event in read.Scalars("loss")] == [(1, 1.0), (2, 0.5), (3, 0.3333)]


def records_of(kept: Path) -> list:
    """What wandb has written, in the format of LevelDB's log: blocks of 32 KiB, and records in pieces with a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, piece, found = kept.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        if not kind:
            break
        piece += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            found.append(wandb_internal_pb2.Record.FromString(piece))
            piece = b""
    return found


def test_a_run_without_a_server_is_kept_and_can_be_sent_later(monkeypatch, run, capfd):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks for something"))
    with tracking.tracked(run) as log:
        for step in (1, 2, 3):
            log(step, loss=1 / step)
    assert not [child for child in psutil.Process().children() if "wandb" in child.name()], "what closes the file is still at it"
    (kept,) = (run.folder / "wandb").glob("offline-run-*/run-*.wandb")
    records = records_of(kept)
    losses = [
        json.loads(item.value_json)
        for record in records
        if record.HasField("history")
        for item in record.history.item
        if "loss" in (item.key, *item.nested_key)
    ]
    assert losses == [1, 0.5, pytest.approx(1 / 3)]
    assert any(record.HasField("exit") for record in records), "the run has ended"
    command = [sys.executable, "-m", "wandb", "sync", "--dry-run", str(kept.parent)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert told.returncode == 0 and kept.parent.name in told.stdout + told.stderr, told
    assert KEY not in "".join(capfd.readouterr())
    for file in run.folder.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), f"the key is in {file}"


def test_who_wants_no_tracking_gets_none(monkeypatch, run):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with tracking.tracked(run) as log:
        log(1, loss=1.0)
    assert not (run.folder / "wandb").exists()
