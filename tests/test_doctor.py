"""The preflight: what it finds on this machine, and that it finds what is broken, with a remedy."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from shardlab import hardware
from shardlab.doctor import course, examine, machine, process_group, versions
from shardlab.findings import Finding, exit_status, render, show
from shardlab.sandbox import boxes
from shardlab.zero import ops, toolchain

pytestmark = pytest.mark.ranks

MARK = "SHARDLAB_TEST_MARK"


def live_children() -> set[int]:
    """The processes below this one that run. A zombie runs no more."""
    return {child.pid for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE}


def marked(mark: str) -> list[list[str]]:
    """The commands of all processes that were started under this mark; unlike children, orphans are among them."""
    return [
        process.info["cmdline"]
        for process in psutil.process_iter(["environ", "cmdline", "status"])
        if (process.info["environ"] or {}).get(MARK) == mark and process.info["status"] != psutil.STATUS_ZOMBIE
    ]


@pytest.fixture(autouse=True)
def mark(monkeypatch, tmp_path):
    """No check leaves a process or a temporary folder behind."""
    temporary, children = tmp_path / "tmp", live_children()
    temporary.mkdir()
    monkeypatch.setenv(MARK, str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    yield str(tmp_path)
    assert marked(str(tmp_path)) == []
    assert live_children() - children == set()
    assert list(temporary.glob("shardlab-doctor-*")) == []


def by_name(findings) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


@pytest.fixture(scope="module")
def here() -> dict[str, Finding]:
    """The findings about this machine as it is."""
    children = live_children()
    findings = by_name(examine.examine())
    assert live_children() - children == set()
    return findings


@pytest.fixture
def empty_folder(tmp_path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


# --- findings ---------------------------------------------------------------------------------------------------------


def test_exit_status_is_1_only_where_something_fails():
    works, absent = Finding("a", "works", ""), Finding("b", "not here", "")
    assert exit_status([]) == 0
    assert exit_status([works, absent]) == 0
    assert exit_status([works, Finding("c", "fails", "", "mend it"), absent]) == 1


def test_a_finding_that_fails_must_have_a_remedy():
    with pytest.raises(ValueError, match="must name its remedy"):
        Finding("ninja", "fails", "gone")


def test_a_finding_has_one_of_three_states():
    with pytest.raises(ValueError, match="works, fails, not here"):
        Finding("ninja", "broken", "gone", "mend it")


@pytest.mark.parametrize("state, shown", [("works", False), ("fails", True), ("not here", True)])
def test_the_remedy_stands_below_what_does_not_work(state, shown):
    lines = render(Finding("ninja", state, "some [detail]", "export PATH=/a")).plain.splitlines()
    assert "ninja" in lines[0] and state in lines[0] and "some [detail]" in lines[0]
    assert [line.strip() for line in lines[1:]] == (["→ export PATH=/a"] if shown else [])


def test_a_long_command_is_printed_in_one_piece():
    """On a narrow terminal, too: a command broken over two lines cannot be copied."""
    output, command = io.StringIO(), "export PATH=" + "/a/long/folder:" * 20
    shown = show([Finding("ninja", "fails", "gone", command)], Console(file=output, width=40))
    assert f"→ {command}\n" in output.getvalue()
    assert "0 work, 1 fail, 0 not here." in output.getvalue()
    assert exit_status(shown) == 1


def test_findings_come_one_at_a_time():
    findings = examine.examine()
    assert next(findings).name == "Python"
    findings.close()


# --- this machine as it is --------------------------------------------------------------------------------------------


def test_every_subject_is_examined_once(here):
    subjects = {
        "Python",
        "C++ compiler",
        "ninja",
        "torch",
        "accelerator",
        "ranks of milestones",
        "deepspeed",
        "libaio",
        "numactl",
        "process group",
        "hub",
        "caches",
        "Slurm",
        "isolation",
        "course files",
        "disk",
        "memory",
        *(f"op {op}" for op in ops.OPS),
    }
    assert set(here) - {"CUDA compiler"} == subjects


def test_what_runs_this_test_works(here):
    """Python, torch and DeepSpeed are here in the pinned versions, or the other tests of the course could not run."""
    for name in ("Python", "torch", "deepspeed"):
        assert here[name].state == "works", here[name]
    assert versions.pins()["torch"] in here["torch"].detail


def test_the_all_reduce_is_real_and_works(here):
    finding = here["process group"]
    assert finding.state == "works", finding
    assert re.match(r"2 ranks over (gloo|nccl): an all-reduce gave the sum on both", finding.detail)


def test_libaio_agrees_with_a_compiler_asked_by_hand(here, tmp_path):
    """The header too: DeepSpeed's own probe would be no judge, since it links and never includes it."""
    (tmp_path / "probe.cpp").write_text("#include <libaio.h>\nint main() { return 0; }\n")
    result = subprocess.run([*toolchain.cxx(), "probe.cpp", "-laio", "-o", "probe"], cwd=tmp_path, capture_output=True)
    assert (here["libaio"].state == "works") == (result.returncode == 0)


# --- ranks ------------------------------------------------------------------------------------------------------------


def test_ranks_that_give_no_answer_are_ended_at_the_limit():
    started = time.monotonic()
    finding = process_group.check_process_group(limit=0.1)
    assert finding.state == "fails" and "within 0.1 s" in finding.detail
    assert time.monotonic() - started < 15


@pytest.mark.skipif(hardware.gpu_count() >= 2, reason="with two GPUs NCCL works")
def test_a_rank_that_fails_ends_the_check_with_its_error(monkeypatch):
    """Ranks that are told to use GPUs that are not there. One of them alone would wait for the other until the limit."""
    monkeypatch.setattr(process_group, "hardware", _TwoGpus())
    said = []
    finding = process_group.check_process_group(limit=60, say=said.append)
    assert finding.state == "fails" and "over nccl" in finding.detail
    assert "Error" in finding.detail and any("Traceback" in line for line in said)


class _TwoGpus:
    """The hardware of this machine, but for a claim of two GPUs."""

    def __getattr__(self, name):
        return (lambda: 2) if name == "gpu_count" else getattr(hardware, name)


def test_ranks_take_no_fixed_port():
    """Two preflights at once, as on a login node, do not disturb each other."""
    found = []
    threads = [threading.Thread(target=lambda: found.append(process_group.check_process_group())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [finding.state for finding in found] == ["works", "works"], found


@pytest.mark.parametrize("age", [0.0, 1.0])
def test_ranks_end_with_a_preflight_that_is_killed(mark, tmp_path, age):
    """As early as can be, before a rank has asked the kernel to end with its starter, and later."""
    process = subprocess.Popen(
        [sys.executable, "-m", "shardlab.doctor.process_group"],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    deadline = time.monotonic() + 60
    while not (ranks := [command for command in marked(mark) if "--rank" in command]) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(age)
    process.kill()
    process.wait()
    assert ranks
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert marked(mark) == []


# --- ops --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ops_folder(monkeypatch, tmp_path) -> Path:
    """A folder of ops of its own, so that the machine's stays as it is."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "ops"))
    return tmp_path / "ops"


def leave_a_lock(op: str, age: float = 60) -> Path:
    """What a build that was killed `age` seconds ago leaves behind."""
    ops.library(op).parent.mkdir(parents=True, exist_ok=True)
    lock = ops.library(op).parent / "lock"
    lock.touch()
    os.utime(lock, (time.time() - age,) * 2)
    return lock


def test_null_in_a_configuration_needs_no_op():
    nothing = {"optimizer": None, "zero_optimization": {"stage": 3, "offload_optimizer": None, "offload_param": None}}
    assert ops.needed_by(nothing, "cuda") == ops.needed_by({"zero_optimization": None}, "cuda") == []


def test_an_op_that_is_not_built_is_not_here(ops_folder):
    finding = toolchain.check_op("cpu_adam")
    assert finding.state == "not here"
    assert finding.remedy == "compiled at first use; now: shardlab doctor --build-ops"


def test_an_op_that_no_lab_loads_here_is_not_compiled(ops_folder):
    if hardware.gpu_count():
        pytest.skip("on a GPU it is needed")
    finding = toolchain.check_op("fused_adam", build=True, say=pytest.fail)
    assert finding.state == "not here" and "not needed" in finding.detail
    leave_a_lock("fused_adam")
    assert toolchain.check_op("fused_adam").state == "fails", "whoever loads it all the same would wait for ever"


def test_an_op_that_counts_as_built_is_not_built_again_by_a_rank(tmp_path):
    """DeepSpeed writes its build file at each load, and compiles anew where ours had other flags, on a milestone's clock."""
    built = [ops.OPS[op][0] for op in ops.OPS if ops.is_built(op)]
    if not built:
        pytest.skip("no op is built here: shardlab doctor --build-ops")
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\ncase " $* " in *" -c "*) exit 1;; esac\nexec {shutil.which("c++")} "$@"\n')
    compiler.chmod(0o755)
    program = (
        "import shardlab.run.cpu_facts; from deepspeed.accelerator import get_accelerator as here; "
        f"[here().create_op_builder(name).load(verbose=False) for name in {built}]"
    )
    variables = os.environ | ops.environment()
    variables["PATH"] = f"{tmp_path}:{variables['PATH']}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_ops_are_built_anew_for_another_installation(monkeypatch):
    """A virtual environment that was made again at the same place has sources that are newer than the ops of the one before."""
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    before = hardware.ops_folder("cpu")
    assert hardware.ops_folder("cpu") == before
    installed = hardware._installed
    with monkeypatch.context() as patch:
        patch.setattr(hardware, "_installed", lambda package: installed(package) + "1" * (package == "deepspeed"))
        assert hardware.ops_folder("cpu") != before
    monkeypatch.setattr(hardware, "_written", lambda path: 1 if path.name == "extension.h" else path.stat().st_mtime_ns)
    assert hardware.ops_folder("cpu") != before, "the header that a new release brings is newer"


def test_a_stale_lock_fails(ops_folder):
    lock = leave_a_lock("cpu_adam")
    finding = toolchain.check_op("cpu_adam")
    assert finding.state == "fails" and str(lock) in finding.detail
    assert finding.remedy == "shardlab doctor --build-ops"
    assert lock.exists(), "looking does not change anything"


def test_the_lock_of_a_rank_that_loads_an_op_is_not_stale(ops_folder):
    """Every rank takes it for a moment, and gives it back."""
    leave_a_lock("cpu_adam", age=0)
    assert toolchain.check_op("cpu_adam").state == "not here"


def test_building_clears_a_stale_lock(monkeypatch, ops_folder):
    """The op with the shortest build: half a minute on two cores, or a moment where it can be copied from the machine's folder."""
    op = "deepspeed_shm_comm" if not hardware.gpu_count() else "cpu_adam"
    with monkeypatch.context() as patch:
        patch.delenv("TORCH_EXTENSIONS_DIR")
        built = ops.library(op).parent if ops.is_built(op) else None
    if built:
        shutil.copytree(built, ops.library(op).parent, ignore=shutil.ignore_patterns("lock"))
    lock = leave_a_lock(op)
    said = []
    finding = toolchain.check_op(op, build=True, say=said.append)
    assert finding.state == "works", finding
    assert not lock.exists()
    assert any("left a lock behind" in line for line in said)
    assert toolchain.check_op(op).state == "works"


@pytest.mark.skipif(hardware.gpu_count() > 0, reason="with a GPU, ops are compiled with all of torch's headers")
@pytest.mark.parametrize("op", ops.needed_on("cpu"))
def test_each_file_of_an_op_compiles_with_the_short_header(op):
    """One that does not is compiled again with all of torch's headers: it works, and takes three times as long."""
    if op == "async_io" and toolchain.check_libaio().state != "works":
        pytest.skip("libaio is not installed")
    ops.build(op, device="cpu")
    told = subprocess.check_output(
        ["ninja", "-t", "deps"], cwd=ops.library(op, "cpu").parent, env=os.environ | ops.environment("cpu"), text=True
    )
    # ninja names the headers of a file, but for those of the system, which torch's count to.
    read = [each.splitlines()[1:] for each in told.strip().split("\n\n")]
    of_torch = [paths for paths in read if any("torch/extension.h" in Path(path.strip()).read_text() for path in paths)]
    assert of_torch and all(f"{hardware.OP_HEADERS}/torch/extension.h" in map(str.strip, paths) for paths in of_torch), told


def test_a_library_that_does_not_load_fails(ops_folder):
    """As one does whose link was cut short, or that was made against another torch."""
    ops.library("cpu_adam").parent.mkdir(parents=True)
    ops.library("cpu_adam").write_bytes(b"no library")
    finding = toolchain.check_op("cpu_adam")
    assert finding.state == "fails" and "does not load" in finding.detail
    assert str(ops.library("cpu_adam").parent) in finding.remedy


def test_a_build_that_fails_names_a_remedy(monkeypatch, ops_folder):
    monkeypatch.setenv("CXX", "false")
    said = []
    finding = toolchain.check_op("pin_memory", build=True, say=said.append)
    assert finding.state == "fails" and finding.remedy
    assert any("did not compile" in line for line in said)


def test_an_interrupt_ends_all_builds(monkeypatch, ops_folder, tmp_path):
    """Also those that another thread waits for; and the next run does not wait for their locks."""
    slow = tmp_path / "slow-c++"
    slow.write_text('#!/bin/sh\ncase " $* " in *" -c "*) exec sleep 60;; esac\nexec c++ "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setenv("CXX", str(slow))
    program = "from shardlab.zero import ops; ops.build_all(['pin_memory', 'cpu_adam'], device='cpu')"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    folders = [ops.library(op, "cpu").parent for op in ("pin_memory", "cpu_adam")]
    end = time.monotonic() + 60
    while sum(command[:1] == ["sleep"] for command in marked(str(tmp_path))) < 2:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert process.returncode != 0 and "KeyboardInterrupt" in output
    assert not [folder for folder in folders if (folder / "lock").exists()]


def test_nothing_is_built_with_a_tool_that_is_missing(ops_folder):
    compiler = Finding("C++ compiler", "fails", "no c++", "install g++")
    finding = toolchain.check_op("pin_memory", build=True, needs=[compiler], say=pytest.fail)
    assert finding.state == "not here" and "C++ compiler" in finding.detail and finding.remedy == "install g++"


# --- what is broken or missing ----------------------------------------------------------------------------------------


def test_isolation_names_what_keeps_boxes_from_being_made(monkeypatch, empty_folder):
    monkeypatch.setattr(boxes, "isolation", lambda: ("limits", "a reason"))
    for restricted, remedy in (
        ("", "sudo sysctl user.max_user_namespaces"),
        ("1", "/etc/apparmor.d/bwrap && sudo apparmor_parser"),
    ):
        monkeypatch.setattr(course, "_setting", lambda name, restricted=restricted: restricted)
        assert remedy in course.check_isolation().remedy and "a reason" in course.check_isolation().detail
    monkeypatch.setenv("PATH", str(empty_folder))
    assert course.check_isolation().remedy == "sudo apt install bubblewrap"


def test_without_a_path_the_compiler_fails_and_each_failure_has_a_remedy(monkeypatch, empty_folder):
    monkeypatch.setenv("PATH", str(empty_folder))
    monkeypatch.delenv("CXX", raising=False)
    findings = by_name(examine.examine())
    assert findings["C++ compiler"].state == "fails" and "g++" in findings["C++ compiler"].remedy
    assert {name: findings[name].state for name in ("numactl", "Slurm", "libaio", "op async_io")} == dict.fromkeys(
        ("numactl", "Slurm", "libaio", "op async_io"), "not here"
    )
    assert all(finding.remedy for finding in findings.values() if finding.state == "fails")
    assert not [op for op in ops.OPS if findings[f"op {op}"].state == "works"], "DeepSpeed loads no op without a compiler"
    assert exit_status(findings.values()) == 1


def test_a_compiler_under_another_name_is_named(monkeypatch, empty_folder):
    (empty_folder / "g++").symlink_to(shutil.which("g++") or shutil.which(toolchain.cxx()[0]))
    monkeypatch.setenv("PATH", str(empty_folder))
    monkeypatch.delenv("CXX", raising=False)
    finding = toolchain.check_compiler()
    assert (finding.state, finding.remedy) == ("fails", "export CXX=g++")


def test_a_compiler_that_cannot_compile_fails(monkeypatch, tmp_path):
    """A driver without its compiler proper, or one too old for C++20, still answers --version."""
    script = tmp_path / "c++"
    script.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "c++ 4.8" && exit\necho "c++: error: unrecognized option -std=c++20"; exit 1\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    finding = toolchain.check_compiler()
    assert finding.state == "fails" and "c++ 4.8" in finding.detail and "unrecognized option" in finding.detail


@pytest.fixture
def no_libaio(monkeypatch, tmp_path) -> Finding:
    """A compiler that finds no libaio; returns the finding about it."""
    script = tmp_path / "c++"
    script.write_text(
        '#!/bin/sh\ncase " $* " in *" -laio "*)\n  echo "fatal error: libaio.h: No such file or directory"\n'
        f'  echo "collect2: error: ld returned 1 exit status"; exit 1;;\nesac\nexec {shutil.which("c++")} "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return toolchain.check_compiler()


def test_without_libaio_the_op_that_needs_it_is_not_here(no_libaio, ops_folder):
    finding = toolchain.check_libaio(no_libaio)
    assert no_libaio.state == "works" and finding.state == "not here" and "libaio.h: No such file" in finding.detail
    assert "apt install libaio-dev" in finding.remedy and "conda install -c conda-forge libaio" in finding.remedy
    op = toolchain.check_op("async_io", build=True, needs=[no_libaio, finding], say=pytest.fail)
    assert op.state == "not here" and op.remedy == finding.remedy


def test_libaio_that_conda_has_but_the_compiler_does_not_find(no_libaio, monkeypatch, tmp_path):
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "libaio.h").touch()
    monkeypatch.setenv("CONDA_PREFIX", str(tmp_path))
    finding = toolchain.check_libaio(no_libaio)
    assert finding.state == "not here"
    for variable in (f"CFLAGS=-I{tmp_path}/include", f"LDFLAGS=-L{tmp_path}/lib", f" LIBRARY_PATH={tmp_path}/lib"):
        assert variable in finding.remedy


def test_torch_that_cannot_be_imported_fails_and_what_needs_it_is_not_tried(monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch_cpu.so: cannot open shared object file')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    findings = by_name(examine.examine())
    assert findings["torch"].state == "fails" and "libtorch_cpu.so" in findings["torch"].detail
    assert findings["deepspeed"].state == "fails"
    for name in ("accelerator", "process group", *(f"op {op}" for op in ops.OPS)):
        assert findings[name].state == "not here" and "needs torch" in findings[name].detail


@pytest.mark.parametrize(
    "found, state", [("2.13.0", "works"), ("2.13.0+cpu", "works"), ("2.13.0+cu130", "works"), ("2.11.0+cu130", "fails")]
)
def test_versions_are_compared_without_their_build(monkeypatch, found, state):
    monkeypatch.setattr(versions, "pins", lambda: {"torch": "2.13.0"})
    finding = versions.against_pin("torch", found)
    assert finding.state == state
    assert state == "works" or ("2.13.0" in finding.detail and "constraints.txt" in finding.remedy)


def test_a_cache_that_cannot_be_written_fails(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file" / "huggingface"))
    finding = machine.check_caches(ops_too=True)
    assert finding.state == "fails" and str(tmp_path) in finding.detail and "HF_HOME" in finding.remedy


def test_caches_are_not_made_by_looking(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "new" / "huggingface"))
    assert machine.check_caches(ops_too=False).state == "works"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("check, need", [("check_disk", "DISK_NEEDED"), ("check_memory", "MEMORY_NEEDED")])
def test_too_little_room_fails(monkeypatch, check, need):
    monkeypatch.setattr(machine, need, 2**60)
    finding = getattr(machine, check)()
    assert finding.state == "fails" and finding.remedy


# --- the hub ----------------------------------------------------------------------------------------------------------


class _Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for the one model that the check asks for."""

    def do_GET(self):
        body = b'{"id": "bigscience/bloom-560m", "modelId": "bigscience/bloom-560m", "sha": "0", "tags": [], "siblings": []}'
        self.send_response(200 if self.path.startswith("/api/models/bigscience/bloom-560m") else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Keep the tests' output free of requests."""


@pytest.fixture
def hub(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_that_answers_works(hub):
    finding = machine.check_hub()
    assert finding.state == "works", finding
    assert f"http://127.0.0.1:{hub.server_port}" in finding.detail


def test_without_the_hub_nothing_fails(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    finding = machine.check_hub()
    assert finding.state == "not here" and "offline" in finding.detail
    assert "SQuAD JSON file" in finding.remedy


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_the_findings_and_ends_with_their_status():
    result = subprocess.run([sys.executable, "-m", "shardlab.doctor.process_group"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^process group +works +2 ranks", result.stdout, re.MULTILINE)


def test_the_command_refuses_what_it_does_not_know():
    result = subprocess.run([sys.executable, "-m", "shardlab.doctor.process_group", "--build"], capture_output=True, text=True)
    assert result.returncode == 2 and "usage" in result.stderr
