"""Preflight: what works on this machine, what does not, and the command that mends it.

Each check does the thing itself where that is cheap: it compiles a program, starts two ranks, asks the hub. A file that
merely lies in its place proves nothing. What is absent is *not here*; only what is broken, or what every lab needs, *fails*.

    python -m shardlab.doctor                 # all checks, about 10 s; the exit status is 1 if one fails
    python -m shardlab.doctor --build-ops     # compiles DeepSpeed's ops too, one after the other; minutes
    python -m shardlab.doctor --all-reduce    # the process group alone, with all that its ranks say
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from shardlab import hardware
from shardlab.run.placement import CHECKING_RANKS, place
from shardlab.zero import ops
from shardlab.zero.memory_model import GIB

State = Literal["works", "fails", "not here"]
COLOURS = {"works": "green", "fails": "bold red", "not here": "yellow"}

PYTHON = (3, 11)
DISK_NEEDED = 2 * GIB
MEMORY_NEEDED = 4 * GIB

GET_COMPILER = "sudo apt install g++    # without root: module load gcc, or conda install -c conda-forge cxx-compiler"
GET_LIBAIO = "sudo apt install libaio-dev    # without root: conda install -c conda-forge libaio"
BUILD_OPS = "shardlab doctor --build-ops"


LIBAIO_PROGRAM = """
#include <libaio.h>
#include <cstdio>
#include <cstring>
int main() {
    io_context_t context = 0;
    int error = io_setup(1, &context);
    if (error) std::printf("io_setup: %s", std::strerror(-error));
    return error != 0;
}
"""

# What is asked of a Python in a process of its own; each prints JSON in its last line.
ASK_TORCH = """
import json, torch
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "gpus": torch.cuda.device_count()}))
"""
ASK_CUDA = """
import json, torch
cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
torch.ones(1, device="cuda").item()
print(json.dumps({"cards": [[card.name, card.total_memory] for card in cards]}))
"""
ASK_DEEPSPEED = """
import json, deepspeed
from deepspeed.accelerator import get_accelerator
print(json.dumps({"version": deepspeed.__version__, "accelerator": get_accelerator().device_name()}))
"""
# The library alone: DeepSpeed's own loading may compile, and holds a lock meanwhile that a time limit would leave behind.
ASK_OP = """
import ctypes, json, os, torch
for library in LIBRARIES:
    ctypes.CDLL(library, os.RTLD_NOW | os.RTLD_GLOBAL)
print(json.dumps({"loads": True}))
"""
ASK_HUB = """
import json
from huggingface_hub import HfApi, constants
print(json.dumps({"url": constants.ENDPOINT, "model": HfApi().model_info("bigscience/bloom-560m", timeout=5).id}))
"""


@dataclass(frozen=True)
class Finding:
    """What one check found. A finding that fails always names its remedy.

    Attributes:
        name: what was checked.
        state: `works`; `fails`; or `not here`: absent, and needed by some labs only.
        detail: what was found, or why not, in one line.
        remedy: the command that mends it.
    """

    name: str
    state: State
    detail: str
    remedy: str = ""

    def __post_init__(self):
        if self.state not in get_args(State):
            raise ValueError(f"{self.name}: state {self.state!r}; a finding is one of {', '.join(get_args(State))}.")
        if self.state == "fails" and not self.remedy:
            raise ValueError(f"{self.name}: a finding that fails must name its remedy.")


def examine(build_ops: bool = False, say: Callable[[str], None] = print) -> Iterator[Finding]:
    """Check this machine. The findings come one at a time, as they are made; the ops come last, since they can take minutes.

    Args:
        build_ops: compile the ops of DeepSpeed that are not built yet, and clear what interrupted builds left behind.
        say: called with a line when a build begins and when it ends.
    """
    yield _python()
    tools = [_compiler(), _ninja()]
    yield from tools
    torch_finding, torch = _torch()
    yield torch_finding
    if torch is None:
        yield Finding("accelerator", "not here", "needs torch")
    else:
        yield _accelerator(torch)
        yield _milestone_ranks()
        if torch["gpus"]:
            tools.append(_cuda_compiler(torch["cuda"]))
            yield tools[-1]
    deepspeed_finding, deepspeed = _deepspeed()
    yield deepspeed_finding
    aio = libaio(tools[0])
    yield aio
    yield _numactl()
    yield Finding("process group", "not here", "needs torch") if torch is None else process_group()
    yield _hub()
    yield _caches(ops_too=None not in (torch, deepspeed))
    yield _slurm()
    yield _isolation()
    yield _course()
    yield _disk()
    yield _memory()
    if torch is None or deepspeed is None:
        yield from (Finding(f"op {op}", "not here", "needs torch and DeepSpeed") for op in ops.OPS)
        return
    for device in dict.fromkeys([hardware.device(), place(CHECKING_RANKS, or_cpu=True).device]):
        for op in ops.OPS:
            yield op_finding(op, build_ops, [*tools, aio] if op == "async_io" else tools, say, device)


def exit_status(findings: Iterable[Finding]) -> int:
    """1 if anything fails, else 0. What is not here is no failure."""
    return int(any(finding.state == "fails" for finding in findings))


def render(finding: Finding):
    """A finding as `rich.text.Text`: one line, and its remedy on the line below unless it works."""
    from rich.text import Text

    text = Text(f"{finding.name:<22}").append(f"{finding.state:<10}", COLOURS[finding.state]).append(finding.detail)
    if finding.state != "works" and finding.remedy:
        text.append(f"\n{'':<22}→ ").append(finding.remedy, "cyan")
    return text


def show(findings: Iterable[Finding], console=None) -> list[Finding]:
    """Print findings as they come, and a line that counts them.

    Args:
        findings: what `examine` yields.
        console: a `rich.console.Console`; by default one on the standard output.

    Returns:
        The findings, for `exit_status`.
    """
    from rich.console import Console

    console = console or Console()
    shown = []
    for finding in findings:
        # Soft wrap leaves a long command in one piece, so that it can be copied.
        console.print(render(finding), soft_wrap=True)
        shown.append(finding)
    count = Counter(finding.state for finding in shown)
    console.print(f"{count['works']} work, {count['fails']} fail, {count['not here']} not here.", highlight=False)
    return shown


def run(build_ops: bool = False) -> int:
    """All checks, printed as they come; returns the exit status. This is `shardlab doctor`."""
    return exit_status(show(examine(build_ops)))


# --- how a check asks -----------------------------------------------------------------------------------------------


def _run(command: list[str], limit: float, **environment: str) -> tuple[int, str]:
    """Exit status and output of a command. 127: there is no such command; 124: it gave no answer and was ended."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            env=os.environ | environment,
        )
    except OSError as error:
        return 127, f"{command[0]}: {error.strerror}"
    try:
        output, _ = process.communicate(timeout=limit)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            return 124, f"no answer within {limit:g} s"
        raise
    return process.returncode, output


def _ask(program: str, limit: float) -> tuple[dict | None, str]:
    """What a Python program prints as JSON in its last line, run in a process of its own; or `None`, and the reason.

    A broken installation can end an interpreter, and a library writes what it likes to the screen. Neither may happen here.
    """
    code, output = _run([sys.executable, "-c", program], limit, **ops.environment())
    answers = [line for line in output.splitlines() if line.startswith("{")]
    return (json.loads(answers[-1]), "") if code == 0 and answers else (None, _reason(output, code))


def _reason(output: str, code: int) -> str:
    """The line of an output that tells most: the last one with an error in it, else the last."""
    lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith("collect2: ")]
    errors = [line for line in lines if re.search(r"\b(\w*Error|\w*Exception|error|cannot find)\b", line)]
    ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    return " ".join((errors or lines or [ended])[-1].split())[:240]


def _version_line(output: str) -> str:
    return output.strip().splitlines()[0] if output.strip() else "no version given"


def pins() -> dict[str, str]:
    """The versions of `constraints.txt`, by package; empty if the course's folder has no such file."""
    path = hardware.ROOT / "constraints.txt"
    lines = [line.partition("#")[0] for line in path.read_text().splitlines()] if path.exists() else []
    return {canonical(name): version.strip() for name, equal, version in (line.partition("==") for line in lines) if equal}


def canonical(package: str) -> str:
    """A package's name as pip compares it: `nvidia_ml.Py` and `nvidia-ml-py` are one."""
    return re.sub(r"[-_.]+", "-", package.strip()).lower()


def _against_pin(package: str, version: str, more: str = "") -> Finding:
    """Compare a version with `constraints.txt`. What follows a + (cpu, cu130) names a build, not a version."""
    pinned = pins().get(canonical(package))
    more = f"; {more}" if more else ""
    if pinned is None:
        return Finding(package, "works", f"{version} (constraints.txt names no version){more}")
    if version.partition("+")[0] != pinned.partition("+")[0]:
        return Finding(package, "fails", f"{version}, but the course was run with {pinned} (constraints.txt){more}", _pip(package))
    return Finding(package, "works", f"{version}, as in constraints.txt{more}")


def _pip(package: str) -> str:
    return shlex.join([sys.executable, "-m", "pip", "install", "-c", str(hardware.ROOT / "constraints.txt"), package])


# --- compiling ------------------------------------------------------------------------------------------------------


def cxx() -> list[str]:
    """The compiler command that torch will build the ops with."""
    return shlex.split(os.environ.get("CXX") or "c++")


def _compile_and_run(source: str, *flags: str) -> tuple[int, str]:
    with tempfile.TemporaryDirectory(prefix="shardlab-doctor-") as folder:
        Path(folder, "probe.cpp").write_text(source)
        program = str(Path(folder, "probe"))
        code, output = _run([*cxx(), "-std=c++20", str(Path(folder, "probe.cpp")), "-o", program, *flags], 60)
        output = output.replace(f"{folder}/", "")  # nobody finds it there any more
        return (code, output) if code else _run([program], 10)


def _python() -> Finding:
    detail = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info < PYTHON:
        needed = ".".join(map(str, PYTHON))
        return Finding("Python", "fails", f"{detail}; the course needs {needed}", "conda env create -f environment.yml")
    return Finding("Python", "works", detail)


def _compiler() -> Finding:
    name, command = "C++ compiler", shlex.join(cxx())
    code, version = _run([*cxx(), "--version"], 30)
    if code == 127:
        # Torch asks for c++ by that name; a g++ beside it does not help unless CXX says so.
        other = next((found for found in ("g++", "clang++") if shutil.which(found)), None)
        remedy = f"export CXX={other}" if other else GET_COMPILER
        return Finding(name, "fails", f"no {command}: DeepSpeed's ops cannot be compiled", remedy)
    # Torch 2.13 compiles its extensions as C++20, which a g++ before version 10 does not know.
    code, output = _compile_and_run("#include <concepts>\n#include <vector>\nint main() { return std::vector<int>(1).front(); }\n")
    if code:
        why = f"a C++20 program does not compile: {_reason(output, code)}"
        return Finding(name, "fails", f"{_version_line(version)}; {why}", GET_COMPILER)
    return Finding(name, "works", f"{_version_line(version)} ({command})")


def _ninja() -> Finding:
    environment = ops.environment()
    code, output = _run(["ninja", "--version"], 30, **environment)
    if code == 0:
        return Finding("ninja", "works", f"{output.strip()} ({shutil.which('ninja', path=environment.get('PATH'))})")
    # Torch looks for ninja on the PATH, where a virtual environment that is not activated has not put it.
    folder = Path(sys.executable).parent
    if (folder / "ninja").exists():
        return Finding("ninja", "fails", f"installed in {folder}, which is not on the PATH", f'export PATH="{folder}:$PATH"')
    return Finding("ninja", "fails", "not on the PATH: DeepSpeed's ops cannot be compiled", _pip("ninja"))


def _cuda_compiler(cuda: str) -> Finding:
    """DeepSpeed refuses to compile for CUDA unless nvcc has the major version of torch's CUDA."""
    name = "CUDA compiler"
    get = f"conda install -c conda-forge cuda-nvcc cuda-libraries-dev cuda-version={cuda}    # or: module load cuda"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    default = "/usr/local/cuda/bin/nvcc"
    nvcc = str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc") or default
    code, output = _run([nvcc, "--version"], 30)
    release = re.search(r"release (\d+\.\d+)", output)
    if code or not release:
        return Finding(name, "not here", f"no {nvcc}: CPU offload, NVMe and DeepSpeed's own Adam need it", get)
    if release[1].split(".")[0] != cuda.split(".")[0]:
        return Finding(name, "fails", f"{nvcc} is CUDA {release[1]}, torch was built with {cuda}: DeepSpeed compiles no op", get)
    return Finding(name, "works", f"CUDA {release[1]} ({nvcc}); torch was built with {cuda}")


def libaio(compiler: Finding | None = None) -> Finding:
    """Compile, link and run, as the build of `async_io` will. DeepSpeed's own probe has said no where the build goes well."""
    compiler = compiler or _compiler()
    if compiler.state != "works":
        return Finding("libaio", "not here", "not tried: that needs the C++ compiler", compiler.remedy)
    code, output = _compile_and_run(LIBAIO_PROGRAM, "-laio")
    if code == 0:
        return Finding("libaio", "works", "a program with libaio compiles, links and runs")
    if output.startswith("io_setup: "):
        # Often the kernel's contexts are used up; in a container, the call may be forbidden.
        return Finding(
            "libaio",
            "fails",
            f"the kernel gives no context for it: {output}",
            "sysctl fs.aio-nr fs.aio-max-nr    # the first must be below the second",
        )
    prefix = next((p for p in (os.environ.get("CONDA_PREFIX"), sys.prefix) if p and Path(p, "include", "libaio.h").exists()), None)
    if prefix:
        # DeepSpeed's probe reads CFLAGS and LDFLAGS (its #2328); the build itself does not, but the compiler reads the other two.
        remedy = (
            f"export CFLAGS=-I{prefix}/include LDFLAGS=-L{prefix}/lib CPATH={prefix}/include LIBRARY_PATH={prefix}/lib "
            f"LD_LIBRARY_PATH={prefix}/lib:$LD_LIBRARY_PATH"
        )
        return Finding("libaio", "not here", f"installed in {prefix}, where the compiler does not look", remedy)
    return Finding("libaio", "not here", f"NVMe offload needs it: {_reason(output, code)}", GET_LIBAIO)


# --- torch and DeepSpeed --------------------------------------------------------------------------------------------


def _torch() -> tuple[Finding, dict | None]:
    found, reason = _ask(ASK_TORCH, 180)
    if found is None:
        return Finding("torch", "fails", f"cannot be imported: {reason}", _pip("torch")), None
    return _against_pin("torch", found["version"], f"CUDA {found['cuda']}" if found["cuda"] else "a build without CUDA"), found


def _accelerator(torch: dict) -> Finding:
    name, cores = "accelerator", f"{hardware.cpu_cores()} CPU cores, {hardware.cpu_name()}"
    if torch["gpus"]:
        found, reason = _ask(ASK_CUDA, 180)
        if found is None:
            return Finding(
                name,
                "fails",
                f"{torch['gpus']} GPUs, and the first does not compute: {reason}",
                "nvidia-smi    # is another process on it?",
            )
        cards = Counter((card, memory // GIB) for card, memory in found["cards"])
        return Finding(name, "works", ", ".join(f"{n} × {card}, {gib} GiB" for (card, gib), n in cards.items()) + f"; {cores}")
    if Path("/dev/nvidiactl").exists() and not hardware.gpus_are_hidden():
        version = torch["version"].partition("+")[0]
        remedy = (
            "nvidia-smi    # the CUDA version that it names must be at least torch's"
            if torch["cuda"]
            else shlex.join([sys.executable, "-m", "pip", "install", "--force-reinstall", f"torch=={version}"])
        )
        why = f"torch, built with CUDA {torch['cuda']}, finds none it can use" if torch["cuda"] else "torch is a build without CUDA"
        return Finding(name, "fails", f"there is an NVIDIA driver here, but {why}", remedy)
    return Finding(name, "works", f"no GPU; {cores}")


def _milestone_ranks() -> Finding:
    return Finding("ranks of milestones", "works", f"{CHECKING_RANKS} ranks run on {place(CHECKING_RANKS, or_cpu=True).on}")


def _deepspeed() -> tuple[Finding, dict | None]:
    found, reason = _ask(ASK_DEEPSPEED, 180)
    if found is None:
        return Finding("deepspeed", "fails", f"cannot be imported: {reason}", _pip("deepspeed")), None
    return _against_pin("deepspeed", found["version"], f"accelerator {found['accelerator']}"), found


def op_finding(
    op: str,
    build: bool = False,
    needs: Iterable[Finding] = (),
    say: Callable[[str], None] = print,
    device: str | None = None,
) -> Finding:
    """One of DeepSpeed's compiled ops: it is built and loads, or is not built, or an interrupted build blocks it.

    Args:
        op: a key of `ops.OPS`.
        build: compile it if it is not built, after clearing what an interrupted build left behind.
        needs: findings about what it is compiled with. DeepSpeed asks for those each time that it loads a built op, too.
        say: called with a line when a build begins and when it ends.
        device: `cuda` or `cpu`: what the ranks that load it compute on; by default what this process does.
    """
    device = device or hardware.device()
    name, purpose, folder = f"op {op}", ops.OPS[op][1], ops.library(op, device).parent
    if device != hardware.device():
        purpose += f"; for ranks on the {device.upper()}"
    if op == "deepspeed_shm_comm" and device == "cuda":
        return Finding(name, "not here", "not needed: the ranks of GPUs talk through NCCL")
    if op == "fused_adam" and device == "cpu" and not folder.exists():
        return Finding(name, "not here", "not needed: no lab loads it for ranks on the CPU")
    if not build and (lock := ops.stale_lock(op, device)):
        return Finding(name, "fails", f"an interrupted build left {lock} behind, and every run would wait for it", BUILD_OPS)
    if missing := next((finding for finding in needs if finding.state != "works"), None):
        return Finding(name, "not here", f"cannot be compiled or loaded: see {missing.name}; {purpose}", missing.remedy)
    detail = purpose
    if build:
        try:
            seconds = ops.build(op, say, device)
        except (ops.OpBuildError, OSError) as error:
            say(str(error))
            return Finding(name, "fails", _reason(str(error), 1), _rebuild(folder))
        detail += f"; compiled in {seconds:.0f} s" if seconds else ""
    if not ops.library(op, device).exists():
        if (folder / "lock").exists():
            return Finding(name, "not here", f"being compiled by another process now; {purpose}")
        return Finding(
            name,
            "not here",
            f"not built; {purpose}; about {ops.OPS[op][2]:g} min on two cores",
            f"compiled at first use; now: {BUILD_OPS}",
        )
    # DeepSpeed loads pin_memory before async_io, which takes symbols from it.
    libraries = [str(ops.library(other, device)) for other in ("pin_memory", op) if op == "async_io" or other == op]
    loaded, reason = _ask(ASK_OP.replace("LIBRARIES", repr(libraries)), 60)
    if loaded is None:
        return Finding(name, "fails", f"built, but it does not load: {reason}", _rebuild(folder))
    return Finding(name, "works", detail)


def why_no_op(op: str, say: Callable[[str], None], device: str | None = None) -> str:
    """Have one of DeepSpeed's ops compiled if it is not: what keeps it from that, with the remedy; nothing if it is there.

    Args:
        op: a key of `ops.OPS`.
        say: called with a line when a build begins and when it ends.
        device: `cuda` or `cpu`: what the ranks that load it compute on; by default what this process does.
    """
    if ops.is_built(op, device):
        return ""
    needs = [compiler := _compiler(), _ninja(), *([libaio(compiler)] if op == "async_io" else [])]
    missing = next((need for need in needs if need.state != "works"), None)
    finding = missing or op_finding(op, build=True, say=say, device=device)
    return "" if finding.state == "works" else f"{finding.detail} → {finding.remedy}"


def _rebuild(folder: Path) -> str:
    return f"rm -r {shlex.quote(str(folder))}; {BUILD_OPS}"


# --- ranks ----------------------------------------------------------------------------------------------------------


def process_group(limit: float = 60.0, say: Callable[[str], None] = lambda line: None) -> Finding:
    """A real all-reduce on two ranks: over NCCL with two GPUs or more, else over gloo.

    The ranks meet at a store on a port that the system picks, and none of them outlives this call.

    Args:
        limit: seconds for all of it, imports included.
        say: called with what each rank wrote.
    """
    name, ranks = "process group", 2
    backend = "nccl" if hardware.gpu_count() >= ranks else "gloo"
    again = ("NCCL_DEBUG=INFO " if backend == "nccl" else "") + f"{shlex.quote(sys.executable)} -m shardlab.doctor --all-reduce"
    import torch.distributed as dist

    try:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    except (dist.DistError, OSError) as error:
        return Finding(name, "fails", f"no store on 127.0.0.1: {_reason(str(error), 1)}", again)
    shared = (
        os.environ
        | ops.environment()
        | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "OMP_NUM_THREADS": "1",
        }
    )
    if backend == "gloo":
        shared["GLOO_SOCKET_IFNAME"] = "lo"
    command = [sys.executable, "-m", "shardlab.doctor", "--rank", backend, str(os.getpid())]
    started, processes = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="shardlab-doctor-") as folder:
        logs = [Path(folder, f"rank{rank}.log") for rank in range(ranks)]
        try:
            for rank, log in enumerate(logs):
                environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                with open(log, "w") as file:
                    processes.append(
                        subprocess.Popen(
                            command,
                            env=environment,
                            stdin=subprocess.DEVNULL,
                            stdout=file,
                            stderr=subprocess.STDOUT,
                            start_new_session=True,
                        )
                    )
            # A rank that fails leaves the other one waiting, so the first failure ends the wait.
            while (codes := [process.poll() for process in processes]) and None in codes and not any(codes):
                if time.monotonic() - started > limit:
                    break
                time.sleep(0.05)
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        outputs = [log.read_text(errors="replace") for log in logs]
    seconds = time.monotonic() - started
    for rank, output in enumerate(outputs):
        for line in output.splitlines():
            say(f"rank {rank}: {line}")
    failed = [rank for rank, code in enumerate(codes) if code]
    if failed:
        return Finding(name, "fails", f"rank {failed[0]} over {backend}: {_reason(outputs[failed[0]], codes[failed[0]])}", again)
    if None in codes:
        return Finding(name, "fails", f"{ranks} ranks over {backend}: no all-reduce within {limit:g} s", again)
    detail = f"{ranks} ranks over {backend}: an all-reduce gave the sum on both, in {seconds:.1f} s with imports"
    return Finding(name, "works", detail)


def _rank(backend: str, starter: int) -> None:
    """What each rank runs: contribute rank + 1, and see that all of them arrived."""
    from shardlab.run.ranks import _die_with_the_launcher

    _die_with_the_launcher(starter)
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend)
    ranks = dist.get_world_size()
    values = torch.full((1024,), dist.get_rank() + 1.0, device=device)
    dist.all_reduce(values)
    expected = ranks * (ranks + 1) / 2
    if not values.eq(expected).all():
        raise RuntimeError(f"the all-reduce gave {values.unique().tolist()}, not {expected:g}")
    dist.barrier()
    dist.destroy_process_group()


# --- the machine and its surroundings -------------------------------------------------------------------------------


def _numactl() -> Finding:
    code, output = _run(["numactl", "--show"], 10)
    get = "sudo apt install numactl    # without root: conda install -c conda-forge numactl"
    if code == 127:
        return Finding("numactl", "not here", "only --bind_cores_to_rank needs it", get)
    if code:
        return Finding("numactl", "not here", f"installed, but it may not bind: {_reason(output, code)}")
    cores = re.search(r"physcpubind:(.*)", output)
    return Finding("numactl", "works", f"can bind ranks to {len(cores[1].split())} cores" if cores else "can bind ranks to cores")


def _hub() -> Finding:
    found, reason = _ask(ASK_HUB, 20)
    if found:
        return Finding("hub", "works", f"{found['url']} answers for {found['model']}")
    return Finding(
        "hub",
        "not here",
        f"{reason}; the shipped model and data need none",
        "export HF_HUB_OFFLINE=1    # and name a SQuAD JSON file as data and a folder as model: "
        'Experiment(data="/path/to/train-v1.1.json", model="/path/to/bloom-560m")',
    )


def _hf_home() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("HF_HOME") or cache / "huggingface")


def _cannot_write(folder: Path) -> str | None:
    """Why nothing can be written to a folder, or to the nearest one above it that exists; `None` if something can."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
    except OSError as error:
        return f"{folder}: {error.strerror}"
    return None


def _caches(ops_too: bool) -> Finding:
    folders = {"XDG_CACHE_HOME": hardware.cache_folder(), "HF_HOME": _hf_home()}
    if ops_too:
        folders["TORCH_EXTENSIONS_DIR"] = hardware.ops_folder()
    for variable, folder in folders.items():
        if why := _cannot_write(folder):
            return Finding("caches", "fails", f"cannot write there: {why}", f"export {variable}=/path/to/a/folder/of/yours")
    written = dict.fromkeys(str(folder) for folder in folders.values())
    return Finding("caches", "works", f"can write to {', '.join(written)}")


def _slurm() -> Finding:
    from shardlab.cluster import slurm

    why = slurm.missing()
    if why:
        return Finding(
            "Slurm",
            "not here",
            "no job can be submitted from here; only lab 6 and jobs on several nodes need it",
            f"{slurm.START_ONE}    # a real Slurm on this machine; needs: sudo apt install slurm-wlm munge. Or use a login node",
        )
    return Finding(
        "Slurm", "works", slurm.command("sbatch", "--version").strip() + (", the local cluster" if slurm.is_local() else "")
    )


def _isolation() -> Finding:
    """Only `shardlab grade` needs it."""
    from shardlab.sandbox import boxes

    kind, why = boxes.isolation()
    if kind == "bubblewrap":
        return Finding("isolation", "works", "submissions can be graded in boxes of their own")
    settings = (
        "sudo sysctl user.max_user_namespaces=10000    # and on Ubuntu kernel.apparmor_restrict_unprivileged_userns=0: they let "
        "ordinary accounts make namespaces"
    )
    remedy = settings if shutil.which("bwrap") else "sudo apt install bubblewrap"
    return Finding("isolation", "not here", f"only `shardlab grade` needs it: {why}", remedy)


def _course() -> Finding:
    """A release carries the hashes of its files."""
    from shardlab.course import release

    changed = release.changed()
    if changed is None:
        return Finding("course files", "works", "the course itself, with its solutions")
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        return Finding("course files", "fails", f"not as released: {', '.join(changed[:3])}{more}", "unpack the release again")
    return Finding("course files", "works", "as released")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    detail = f"{free / GIB:.0f} GiB free in {Path.cwd()}, where runs/ is written"
    if free < DISK_NEEDED:
        return Finding(
            "disk",
            "fails",
            f"{detail}; {DISK_NEEDED // GIB} GiB are needed",
            "du -sh runs/*    # remove runs, or start from another folder",
        )
    return Finding("disk", "works", detail)


def _memory_limit() -> int | None:
    """Bytes that a batch job or a container may use (cgroup v2); `None` where the whole machine may be used."""
    path = Path("/proc/self/cgroup")
    group = next((line[3:] for line in path.read_text().splitlines() if line.startswith("0::")), None) if path.exists() else None
    if group is None:
        return None
    folder = Path("/sys/fs/cgroup", group.lstrip("/"))
    limits = [(above / "memory.max").read_text().strip() for above in (folder, *folder.parents) if (above / "memory.max").exists()]
    return min((int(limit) for limit in limits if limit != "max"), default=None)


def _memory() -> Finding:
    import psutil

    memory, limit = psutil.virtual_memory(), _memory_limit()
    usable = min(memory.available, limit) if limit is not None else memory.available
    detail = f"{memory.available / GIB:.1f} GiB available of {memory.total / GIB:.1f}"
    detail += f"; this job may use {limit / GIB:.1f}" if limit is not None else ""
    if usable < MEMORY_NEEDED:
        return Finding(
            "memory",
            "fails",
            f"{detail}; {MEMORY_NEEDED // GIB} GiB are needed",
            "ps -eo rss,pid,args --sort=-rss | head    # what holds it; or ask for a larger job: sbatch --mem=8G",
        )
    return Finding("memory", "works", detail)


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--rank"]:
        _rank(arguments[1], starter=int(arguments[2]))
        return 0
    if arguments == ["--all-reduce"]:
        return exit_status(show([process_group(say=print)]))
    if arguments in ([], ["--build-ops"]):
        return run(build_ops=bool(arguments))
    print("usage: python -m shardlab.doctor [--build-ops | --all-reduce]", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
