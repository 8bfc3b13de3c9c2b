"""What compiling and loading DeepSpeed's ops needs: a compiler, ninja, libaio, CUDA's compiler."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from shardlab import hardware
from shardlab.findings import Finding, ask_python, pip_command, run_command, telling_line
from shardlab.zero import ops

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
# The library alone: DeepSpeed's own loading may compile, and holds a lock meanwhile that a time limit would leave behind.
ASK_OP = """
import ctypes, json, os, torch
for library in LIBRARIES:
    ctypes.CDLL(library, os.RTLD_NOW | os.RTLD_GLOBAL)
print(json.dumps({"loads": True}))
"""


def _version_line(output: str) -> str:
    return output.strip().splitlines()[0] if output.strip() else "no version given"


# --- compiling ------------------------------------------------------------------------------------------------------


def cxx() -> list[str]:
    """The compiler command that torch will build the ops with."""
    return shlex.split(os.environ.get("CXX") or "c++")


def _compile_and_run(source: str, *flags: str) -> tuple[int, str]:
    with tempfile.TemporaryDirectory(prefix="shardlab-doctor-") as folder:
        Path(folder, "probe.cpp").write_text(source)
        program = str(Path(folder, "probe"))
        code, output = run_command([*cxx(), "-std=c++20", str(Path(folder, "probe.cpp")), "-o", program, *flags], 60)
        output = output.replace(f"{folder}/", "")  # nobody finds it there any more
        return (code, output) if code else run_command([program], 10)


def check_compiler() -> Finding:
    name, command = "C++ compiler", shlex.join(cxx())
    code, version = run_command([*cxx(), "--version"], 30)
    if code == 127:
        # Torch asks for c++ by that name; a g++ next to it does not help unless CXX says so.
        other = next((found for found in ("g++", "clang++") if shutil.which(found)), None)
        remedy = f"export CXX={other}" if other else GET_COMPILER
        return Finding(name, "fails", f"no {command}: DeepSpeed's ops cannot be compiled", remedy)
    # Torch 2.13 compiles its extensions as C++20, which a g++ before version 10 does not know.
    code, output = _compile_and_run("#include <concepts>\n#include <vector>\nint main() { return std::vector<int>(1).front(); }\n")
    if code:
        why = f"a C++20 program does not compile: {telling_line(output, code)}"
        return Finding(name, "fails", f"{_version_line(version)}; {why}", GET_COMPILER)
    return Finding(name, "works", f"{_version_line(version)} ({command})")


def check_ninja() -> Finding:
    environment = ops.environment()
    code, output = run_command(["ninja", "--version"], 30, **environment)
    if code == 0:
        return Finding("ninja", "works", f"{output.strip()} ({shutil.which('ninja', path=environment.get('PATH'))})")
    # Torch looks for ninja on the PATH, where a virtual environment that is not activated has not put it.
    folder = Path(sys.executable).parent
    if (folder / "ninja").exists():
        return Finding("ninja", "fails", f"installed in {folder}, which is not on the PATH", f'export PATH="{folder}:$PATH"')
    return Finding("ninja", "fails", "not on the PATH: DeepSpeed's ops cannot be compiled", pip_command("ninja"))


def check_cuda_compiler(cuda: str) -> Finding:
    """DeepSpeed refuses to compile for CUDA unless nvcc has the major version of torch's CUDA."""
    name = "CUDA compiler"
    get = f"conda install -c conda-forge cuda-nvcc cuda-libraries-dev cuda-version={cuda}    # or: module load cuda"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    default = "/usr/local/cuda/bin/nvcc"
    nvcc = str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc") or default
    code, output = run_command([nvcc, "--version"], 30)
    release = re.search(r"release (\d+\.\d+)", output)
    if code or not release:
        return Finding(name, "not here", f"no {nvcc}: CPU offload, NVMe and DeepSpeed's own Adam need it", get)
    if release[1].split(".")[0] != cuda.split(".")[0]:
        return Finding(name, "fails", f"{nvcc} is CUDA {release[1]}, torch was built with {cuda}: DeepSpeed compiles no op", get)
    return Finding(name, "works", f"CUDA {release[1]} ({nvcc}); torch was built with {cuda}")


def check_libaio(compiler: Finding | None = None) -> Finding:
    """Compile, link and run, as the build of `async_io` will. DeepSpeed's own probe has said no where the build goes well."""
    compiler = compiler or check_compiler()
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
    return Finding("libaio", "not here", f"NVMe offload needs it: {telling_line(output, code)}", GET_LIBAIO)


def check_op(
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
    if op not in ops.needed_on(device) and not folder.exists():
        return Finding(name, "not here", f"not needed: no lab loads it for ranks on {'the CPU' if device == 'cpu' else 'GPUs'}")
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
            return Finding(name, "fails", telling_line(str(error), 1), _rebuild(folder))
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
    loaded, reason = ask_python(ASK_OP.replace("LIBRARIES", repr(libraries)), 60, **ops.environment())
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
    needs = [compiler := check_compiler(), check_ninja(), *([check_libaio(compiler)] if op == "async_io" else [])]
    missing = next((need for need in needs if need.state != "works"), None)
    finding = missing or check_op(op, build=True, say=say, device=device)
    return "" if finding.state == "works" else f"{finding.detail} → {finding.remedy}"


def _rebuild(folder: Path) -> str:
    return f"rm -r {shlex.quote(str(folder))}; {BUILD_OPS}"
