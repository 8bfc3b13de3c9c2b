"""What a check of this machine found, and how it asks."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from shardlab import hardware

State = Literal["works", "fails", "not here"]


COLOURS = {"works": "green", "fails": "bold red", "not here": "yellow"}


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


# --- how a check asks -----------------------------------------------------------------------------------------------


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


def run_command(command: list[str], limit: float, **environment: str) -> tuple[int, str]:
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


def ask_python(program: str, limit: float, **environment: str) -> tuple[dict | None, str]:
    """What a Python program prints as JSON in its last line, run in a process of its own; or `None`, and the reason.

    A broken installation can end an interpreter, and a library writes what it likes to the screen. Neither may happen here.
    """
    code, output = run_command([sys.executable, "-c", program], limit, **environment)
    answers = [line for line in output.splitlines() if line.startswith("{")]
    return (json.loads(answers[-1]), "") if code == 0 and answers else (None, telling_line(output, code))


def telling_line(output: str, code: int) -> str:
    """The line of an output that tells most: the last one with an error in it, else the last."""
    lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith("collect2: ")]
    errors = [line for line in lines if re.search(r"\b(\w*Error|\w*Exception|error|cannot find)\b", line)]
    ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    return " ".join((errors or lines or [ended])[-1].split())[:240]


def pip_command(package: str) -> str:
    return shlex.join([sys.executable, "-m", "pip", "install", "-c", str(hardware.ROOT / "constraints.txt"), package])
