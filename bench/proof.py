"""What the reference solutions pass on this machine: milestones, hidden ones, lab notebooks, lectures, wrong answers, the demo.

    python bench/proof.py                               # everything, into bench/results/proof-<hardware>.json
    python bench/proof.py --labs 2,3 --parts milestones # a part of it; the rest of that file stays as it was
    python bench/proof.py --mutants 2                   # and the wrong answers of lab 02
    python bench/proof.py --render                      # docs/proof.md from all files that are there

A new lab runs it on one GPU and on two before it is done. CUDA_VISIBLE_DEVICES=0 makes one GPU of several. Nothing counts as
passed that did not run: a milestone that could not is *not run*, with its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shardlab import hardware, labs, switch
from shardlab.cluster import slurm
from shardlab.doctor.versions import pins
from shardlab.milestones.markers import files_of
from shardlab.run import placement
from shardlab.zero import toolchain

RESULTS = hardware.ROOT / "bench" / "results"
PAGE = hardware.ROOT / "docs" / "proof.md"
PARTS = ("milestones", "notebook", "lecture", "mutants", "demo", "refusal")
LIMIT = 1200
"""Seconds for one part of one lab."""


def hardware_name() -> str:
    """Such as `1xh100`, or `cpu`; the name of the result file."""
    gpus = hardware.gpus()
    if not gpus:
        return "cpu"
    model = re.search(r"\b([A-Z]+\d+)\b", gpus[0].name)
    return f"{len(gpus)}x{model[1].lower() if model else 'gpu'}"


_mine = threading.local()
"""`cores`: those that this thread's part may use. Ranks that share cores with those of another part wait for each other in vain."""


def run(words: list[str], **variables: str) -> tuple[int, str]:
    """Exit status and output of `python` with these words, in the course's folder, on this part's cores."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=hardware.ROOT,
        env=os.environ | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
        check=False,
        preexec_fn=lambda: os.sched_setaffinity(0, _mine.cores),
    )
    return done.returncode, done.stdout


def milestones(stem: str) -> dict:
    """The verdict of each milestone, hidden ones included."""
    files = files_of(stem)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, "milestones.json")
        words = ["-m", "pytest", *map(str, files), "--solutions", "--milestones-json", str(path), "-q", "-p", "no:cacheprovider"]
        code, output = run([*words, "--basetemp", f"{temporary}/pytest"])
        if not path.exists():
            return {"verdict": "failed", "reason": output[-2000:]}
        outcomes = json.loads(path.read_text())
    rows = [{key: m[key] for key in ("task", "hidden", "verdict", "message", "ran_on")} for m in outcomes]
    return {"verdict": "passed" if code == 0 else "failed", "rows": rows}


def execute(source: Path, target: Path) -> tuple[int, str]:
    """Execute a notebook's text source with the solutions, its runs next to the target: exit status and output."""
    program = "import sys; from pathlib import Path; from shardlab import switch; from shardlab.course import authoring; "
    program += "authoring.execute_notebook(Path(sys.argv[1]), Path(sys.argv[2]), switch.SOLUTIONS)"
    return run(["-c", program, str(source), str(target)], SHARDLAB_RUNS=str(target.with_name("runs")))


def notebook(stem: str) -> dict:
    """The lab's notebook from top to bottom with the solutions, and the verdicts of its checks."""
    source = labs.named(stem).answers / "text.py"
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(temporary, "out.ipynb")
        code, output = execute(source, target)
        if code:
            return {"verdict": "failed", "reason": output[-2000:]}
        shown = target.read_text()
    checks = dict(re.findall(r"'>(\d+\.\d+) (passed|failed|not implemented|not run)<", shown))
    wrong = [task for task, verdict in checks.items() if verdict not in ("passed", "not run")]
    return {"verdict": "failed" if wrong or not checks else "passed", "checks": checks}


def lecture(stem: str) -> dict:
    """The lab's lecture, from top to bottom."""
    source = labs.named(stem).answers / "lecture.py"
    if not source.exists():
        return {"verdict": "not run", "reason": "there is no lecture for this lab"}
    with tempfile.TemporaryDirectory() as temporary:
        code, output = execute(source, Path(temporary, "out.ipynb"))
    return {"verdict": "failed", "reason": output[-2000:]} if code else {"verdict": "passed"}


def mutants(stem: str) -> dict:
    """The lab's wrong answers, each of which must fail its own milestone and no other."""
    code, output = run(["-m", "shardlab.cli", "matrix", stem, "--only", "mutants"])
    lines = re.findall(rf"^{stem}  (.*)$", output, re.MULTILINE)
    missed = [line for line in lines if not line.endswith(": as it should")]
    not_run = sum("(not run: " in line for line in lines)
    if not lines:
        return {"verdict": "failed", "reason": output[-2000:]}
    counts = {"caught": len(lines) - len(missed) - not_run, "not run": not_run, "missed": missed}
    return {"verdict": "failed" if code or missed else "passed"} | counts


def demo() -> dict:
    """The demo to its table and report: BLOOM-560m's shape with random weights on GPUs, bloom-tiny without."""
    with tempfile.TemporaryDirectory() as temporary:
        words = ["--runs", f"{temporary}/demo"]
        words += ["--random-weights", "--data", "mini", "--steps", "12"] if hardware.gpu_count() else []
        code, output = run(["-m", "shardlab.cli", "demo", *words], COLUMNS="160")
        report = Path(temporary, "demo", "report.html")
        done = code == 0 and report.exists() and report.stat().st_size > 0
    lines = [line.rstrip() for line in output.splitlines() if line.strip() and not line.startswith(("Report:", "Plot:"))]
    command = " ".join(["shardlab demo", *words[2:]])
    return {"verdict": "passed", "command": command, "printed": lines} if done else {"verdict": "failed", "reason": output[-2000:]}


def refusal() -> dict:
    """What is said where a run for measuring has one rank more than there are GPUs."""
    gpus = hardware.gpu_count()
    if not gpus:
        return {"verdict": "not run", "reason": "without a GPU, ranks run on the CPU"}
    with tempfile.TemporaryDirectory() as temporary:
        words = ["run", "too-many", "--solutions", "--ranks", str(gpus + 1), "--data", "mini", "--model", "bloom-tiny"]
        code, output = run(["-m", "shardlab.cli", *words, "--runs", temporary])
        left = [path.name for path in Path(temporary).iterdir()]
    said = output.strip().splitlines()[-1] if output.strip() else ""
    refused = code != 0 and "Traceback" not in output and not left
    return {"verdict": "passed" if refused else "failed", "command": " ".join(["shardlab", *words]), "said": said}


def surroundings() -> dict:
    """What the verdicts depend on besides the course: hardware, versions, libaio, Slurm."""
    aio = toolchain.check_libaio()
    return {
        "hardware": hardware.describe(),
        "versions": hardware.versions(),
        "milestones_of_2_ranks": placement.place(2, or_cpu=True).__dict__,
        "libaio": "works" if aio.state == "works" else f"not here: {aio.detail}",
        "slurm": f"not here: {why}" if (why := slurm.missing()) else "works",
    }


def prove(stems: list[str], parts: list[str], mutants_of: list[str], out: Path, jobs: int) -> bool:
    """Run the parts, and write the file anew after each; whether none of them failed."""
    here, found = surroundings(), json.loads(out.read_text()) if out.exists() else {}
    for what in ("versions", "hardware"):
        keys = here[what] if what == "versions" else ("cpu", "gpus")
        if differ := [key for key in keys if found and found[what].get(key) != here[what][key]]:
            told = ", ".join(f"{key} {found[what].get(key)} → {here[what][key]}" for key in differ)
            raise SystemExit(f"{out} was made elsewhere ({told}), so nothing is added. Give --out another file, or remove it.")
    found |= {"what": __doc__.splitlines()[0], "command": found.get("command", "python " + " ".join(sys.argv))} | here
    lock, judges = threading.Lock(), {"milestones": milestones, "notebook": notebook, "lecture": lecture, "mutants": mutants}
    whole = {"demo": demo, "refusal": refusal}
    # One part of a lab after the other: two that kill a node of the same cluster would end each other's jobs.
    tasks = []
    for stem in stems:
        of = [part for part in judges if part in parts and (part != "mutants" or stem in mutants_of)]
        tasks.append([(stem, part, judges[part]) for part in of])
    tasks += [[("course", part, whole[part])] for part in whole if part in parts]

    def work(stem: str, part: str, judge) -> bool:
        started = time.monotonic()
        try:
            came = judge(stem) if stem != "course" else judge()
        except subprocess.TimeoutExpired:
            came = {"verdict": "failed", "reason": f"no end within {LIMIT} s"}
        came |= {"seconds": round(time.monotonic() - started, 1), "date": time.strftime("%Y-%m-%d"), "commit": hardware.commit()}
        with lock:
            found.setdefault("parts", {}).setdefault(stem, {})[part] = came
            out.parent.mkdir(parents=True, exist_ok=True)
            # Where the course lies on that machine tells nobody anything.
            out.write_text(json.dumps(found, indent=1).replace(f"{hardware.ROOT}/", "") + "\n")
            print(f"{stem}  {part}: {summary(came)}, {came['seconds']:.0f} s", flush=True)
            for row in came.get("rows", []):
                if row["verdict"] not in ("passed", "not run"):
                    print(f"  {row['task']}{' hidden' if row['hidden'] else ''}: {row['message']}", flush=True)
            if came["verdict"] == "failed" and came.get("reason"):
                print(came["reason"], flush=True)
        return came["verdict"] != "failed"

    shares, cores = queue.SimpleQueue(), sorted(os.sched_getaffinity(0))
    for number in range(jobs):
        shares.put(cores[number * len(cores) // jobs : (number + 1) * len(cores) // jobs])
    with ThreadPoolExecutor(jobs, initializer=lambda: setattr(_mine, "cores", shares.get())) as pool:
        return all(list(pool.map(lambda task: all([work(*part) for part in task]), tasks)))


def summary(came: dict) -> str:
    """A part's outcome in a few words."""
    if "rows" in came:
        open_, hidden = ([row["verdict"] for row in came["rows"] if row["hidden"] is which] for which in (False, True))
        return f"{counted(open_)}; hidden {counted(hidden)}"
    if "checks" in came:
        return counted(list(came["checks"].values()))
    if "caught" in came:
        extra = "".join(f", {len(came[key]) if key == 'missed' else came[key]} {key}" for key in ("not run", "missed") if came[key])
        return f"{came['caught']} caught{extra}"
    return came["verdict"]


def counted(verdicts: list[str]) -> str:
    """Such as `9 of 9`, or `5 of 8, 3 not run`."""
    count = Counter(verdicts)
    rest = "".join(f", {number} {verdict}" for verdict, number in sorted(count.items()) if verdict != "passed")
    return f"{count['passed']} of {len(verdicts)}{rest}"


def render() -> str:
    """The page `docs/proof.md`, from the result files."""
    files = {path.stem.removeprefix("proof-"): json.loads(path.read_text()) for path in sorted(RESULTS.glob("proof-*.json"))}
    lines = [
        "# What was run where",
        "",
        "Made by `python bench/proof.py --render` from `bench/results/proof-*.json`, which `python bench/proof.py` writes on a",
        "machine. The reference solutions are judged. *9 of 9* are milestones passed; what could not run there is *not run*, and",
        "does not count as passed. Where a milestone has more ranks than there are GPUs, its ranks ran on the CPU",
        "(`src/shardlab/run/placement.py` has the rule). Several labs were judged at a time (`--jobs`), so the samples/s",
        "of the demo are no measurement; `bench/results/stages-*.json` has those.",
        "",
    ]
    heads = {"milestones": "milestones", "notebook": "lab notebook", "lecture": "lecture", "mutants": "wrong answers"}
    for name, found in files.items():
        machine, versions = found["hardware"], found["versions"]
        gpus = ", ".join(f"{count} × {gpu}" for gpu, count in Counter(machine["gpus"]).items()) or "no GPU"
        lines += [f"## {name}", "", f"{gpus}; {machine['cpu_cores']} cores of {machine['cpu']}."]
        pinned = {package: f" (pinned: {pins()[package]})" for package in versions if package in pins()}
        pinned = {package: note for package, note in pinned.items() if versions[package] not in note}
        lines += [", ".join(f"{package} {version}{pinned.get(package, '')}" for package, version in versions.items()) + "."]
        lines += [f"libaio {found['libaio']}. Slurm {found['slurm']}.", ""]
        where = found["milestones_of_2_ranks"]
        lines += [f"Milestones of two ranks ran on {'GPUs' if where['device'] == 'cuda' else 'the CPU'}"]
        lines[-1] += f": {where['why']}." if where["why"] else "."
        lines += ["", f"| lab | {' | '.join(heads.values())} | commit, date |", f"|{' --- |' * (len(heads) + 2)}"]
        labs = {stem: parts for stem, parts in found["parts"].items() if stem != "course"}
        for stem, parts in sorted(labs.items()):
            cells = [summary(parts[part]) if part in parts else "" for part in heads]
            made = dict.fromkeys(f"{part['commit']}, {part['date']}" for part in parts.values())
            lines.append(f"| {stem} | {' | '.join(cells)} | {'; '.join(made)} |")
        lines += ["", *_each_milestone(labs), ""]
        rows = [row for parts in labs.values() for row in parts.get("milestones", {}).get("rows", [])]
        reasons = dict.fromkeys(row["message"] for row in rows if row["verdict"] == "not run")
        lines += [f"Not run there: {reason}" for reason in reasons] + [""] * bool(reasons)
        notes = dict.fromkeys(part["note"] for parts in labs.values() for part in parts.values() if "note" in part)
        for note in notes:
            lines += [f"Note: {note}", ""]
        for row in rows:
            if row["verdict"] == "failed" and not row["hidden"]:
                lines += [f"Task {row['task']} said:", "", "```", row["message"], "```", ""]
        course = found["parts"].get("course", {})
        if "demo" in course and "printed" in course["demo"]:
            lines += [f"`{course['demo']['command']}`:", "", "```", *course["demo"]["printed"], "```", ""]
        if course.get("refusal", {}).get("said"):
            lines += [f"`{course['refusal']['command']}` is refused:", "", "```", course["refusal"]["said"], "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def _each_milestone(labs: dict) -> list[str]:
    """A line per lab: its tasks by verdict, `h` after those of hidden milestones, and what they ran on where it differs."""
    marks = []
    for stem, parts in sorted(labs.items()):
        by_verdict: dict[str, list[str]] = {}
        for row in parts.get("milestones", {}).get("rows", []):
            place = " (CPU)" if row["ran_on"].startswith("the CPU") else " (GPUs)" if row["ran_on"] else ""
            by_verdict.setdefault(row["verdict"], []).append(f"{row['task']}{'h' if row['hidden'] else ''}{place}")
        told = "; ".join(f"{verdict}: {', '.join(tasks)}" for verdict, tasks in by_verdict.items())
        marks.append(f"- {stem}: {told or 'no milestone was run'}")
    legend = "Task by task (`h`: the hidden milestone; in brackets what its ranks ran on, if it started any and had a choice):"
    return [legend, "", *marks]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labs", help="labs, such as 1,2; all by default")
    parser.add_argument("--parts", help=f"of {', '.join(PARTS)}; all by default", default=",".join(PARTS))
    parser.add_argument("--mutants", help="labs whose wrong answers are tried, such as 2", default="")
    parser.add_argument("--jobs", type=int, default=1, help="labs at a time, each on cores of its own (default: 1)")
    parser.add_argument("--out", type=Path, help="default: bench/results/proof-<hardware>.json")
    parser.add_argument("--render", action="store_true", help="only write docs/proof.md; with --out -, print it")
    options = parser.parse_args()
    if options.render:
        if options.out == Path("-"):
            print(render(), end="")
        else:
            PAGE.write_text(render())
            print(f"wrote {PAGE.relative_to(hardware.ROOT)}")
        return 0
    if not 1 <= options.jobs <= max(1, hardware.cpu_cores() // 2):
        parser.error(f"--jobs {options.jobs}: each needs two cores, and there are {hardware.cpu_cores()}")
    if unknown := set(options.parts.split(",")) - set(PARTS):
        parser.error(f"--parts {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    if not switch.SOLUTIONS.is_dir():
        parser.error("this is a release for learners: it has no solutions to prove")
    from shardlab.labs import chosen

    out = options.out or RESULTS / f"proof-{hardware_name()}.json"
    mutants_of = [lab.stem for lab in chosen(options.mutants)] if options.mutants else []
    stems = [lab.stem for lab in chosen(options.labs)]
    if absent := [stem for stem in mutants_of if stem not in stems]:
        parser.error(f"--mutants {', '.join(absent)}: name it in --labs too")
    return 0 if prove(stems, options.parts.split(","), mutants_of, out, options.jobs) else 1


if __name__ == "__main__":
    sys.exit(main())
