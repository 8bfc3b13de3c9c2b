"""What a `torch.profiler` trace says of collectives: which were called, with how many bytes, and when.

The trace is the JSON that `profile(…, record_shapes=True).export_chrome_trace(path)` writes; the same file opens in Perfetto. On
gloo and NCCL alike, each collective that a program calls is an event `c10d::…` with the shapes of its tensors. What a library
sends past torch is not in it, such as DeepSpeed's all-reduce over shared memory on a CPU.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shardlab.errors import CourseError

BYTES = {
    "float": 4, "double": 8, "c10::Half": 2, "c10::BFloat16": 2, "signed char": 1, "unsigned char": 1, "bool": 1,
    "int": 4, "long": 8, "long int": 8, "short": 2,
}  # fmt: skip
"""Of one element, by the profiler's name for its type."""

COLLECTIVES = {
    "c10d::allreduce_": ("all-reduce", 0),
    "c10d::allreduce_coalesced_": ("all-reduce", 0),
    "c10d::allgather_": ("all-gather", 0),
    "c10d::_allgather_base_": ("all-gather", 0),
    "c10d::allgather_into_tensor_coalesced_": ("all-gather", 0),
    "c10d::reduce_scatter_": ("reduce-scatter", 1),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "c10d::alltoall_": ("all-to-all", 1),
    "c10d::alltoall_base_": ("all-to-all", 1),
    "c10d::broadcast_": ("broadcast", 0),
    "c10d::reduce_": ("reduce", 0),
}
"""By event: what it is called in this course, and which of its arguments is the whole tensor, every rank's part of it included."""


class TraceError(CourseError, ValueError):
    """A file that is no trace; the message names it."""


@dataclass(frozen=True)
class Collective:
    """One call of a collective on one rank.

    Attributes:
        name: such as `all-reduce`.
        elements: of the whole tensor: what is reduced, what is there after an all-gather, what is there before a reduce-scatter or
            an all-to-all.
        bytes: of the same.
        start, end: microseconds, of the call on the host; the transfer itself can go on after it.
        ranks: of its process group, where the trace names them: NCCL does, gloo does not (None).
    """

    name: str
    elements: int
    bytes: int
    start: float
    end: float
    ranks: int | None = None


def profile_to(path: Path, take_step: Callable[[], object], steps: int) -> None:
    """Take some steps under `torch.profiler`, and write their trace, of the GPU too where there is one.

    Args:
        path: of the file to write; it opens in https://ui.perfetto.dev.
        take_step: called without arguments.
        steps: how often.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities, record_shapes=True) as profiler:
        for number in range(steps):
            with record_function(f"{STEP}{number}"):
                take_step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        # gloo's threads say that a collective has ended just before they note its event; what comes late is not in the trace.
        time.sleep(LATE_EVENTS)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))


STEP = "step "
"""How the events of whole steps are called, with their number."""

LATE_EVENTS = 0.05
"""Seconds that a trace waits for events of other threads, after its last step."""


def events(path: Path) -> list[dict]:
    """The events of a trace that have a beginning and a duration, in the order of their beginnings.

    Raises:
        TraceError: the file is no trace, or is cut off.
    """
    try:
        found = json.loads(Path(path).read_text())["traceEvents"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TraceError(f"{path} is no trace that torch.profiler has written: {error}") from error
    return sorted((event for event in found if event.get("ph") == "X"), key=lambda event: event["ts"])


def collectives(path: Path) -> list[Collective]:
    """The collectives that a rank called, in order.

    Raises:
        TraceError: the file is no trace, or was written without `record_shapes=True`.
    """
    found, every = [], events(path)
    for at, event in enumerate(every):
        if event["name"] not in COLLECTIVES:
            continue
        name, whole = COLLECTIVES[event["name"]]
        arguments = event["args"]
        if "Input Dims" not in arguments:
            raise TraceError(f"{path}: {event['name']} has no shapes; profile with record_shapes=True")
        shapes, kind = arguments["Input Dims"][whole], arguments["Input type"][whole]
        of_lists = kind in ("TensorList", "") or (shapes and isinstance(shapes[0], list))
        elements = _elements(shapes) if of_lists else math.prod(shapes)
        if kind not in BYTES:
            kind = _type_below(every, at)
        end = event["ts"] + event["dur"]
        found.append(Collective(name, elements, elements * BYTES[kind], event["ts"], end, _group_size(every, at)))
    return found


def _group_size(every: list[dict], at: int) -> int | None:
    """What NCCL notes within the call of a collective, on the same thread."""
    call = every[at]
    for below in itertools.takewhile(lambda event: event["ts"] <= call["ts"] + call["dur"], every[at + 1 :]):
        if below["name"] == "record_param_comms" and below["tid"] == call["tid"]:
            return below.get("args", {}).get("Group size")
    return None


def _elements(shapes: list) -> int:
    """Of a list of tensors, or of a list of such lists."""
    if not shapes:
        return 0
    if any(isinstance(inner, list) and inner and isinstance(inner[0], list) for inner in shapes):
        return sum(_elements(inner) for inner in shapes)
    return sum(math.prod(shape) for shape in shapes)


NAMED_BY_NCCL = {
    "Float": "float", "BFloat16": "c10::BFloat16", "Half": "c10::Half", "Double": "double", "Byte": "unsigned char",
    "Char": "signed char", "Int": "int", "Long": "long", "Bool": "bool",
}  # fmt: skip


def _type_below(every: list[dict], at: int) -> str:
    """The type of a list of tensors, which the profiler does not name: that of the first event of the transport after the call."""
    for below in every[at + 1 :]:
        arguments = below.get("args", {})
        if below["name"].startswith("gloo:") and arguments.get("Input type"):
            return arguments["Input type"][0]
        if "dtype" in arguments and "Collective name" in arguments:
            return NAMED_BY_NCCL[arguments["dtype"]]
    raise TraceError("a collective over a list of tensors whose type stands nowhere in the trace")


@dataclass(frozen=True)
class Span:
    """Something that a rank did during a step: on the GPU where there is one, else on the CPU.

    Attributes:
        kind: `compute`, or `communication`.
        name: of a collective as its transport calls it, such as `all_reduce`; of compute the operation or kernel.
        bytes: that this rank puts into a collective; 0 of compute, and where the trace does not say.
        start, end: milliseconds since the step began.
    """

    kind: str
    name: str
    bytes: int
    start: float
    end: float


def spans(path: Path, step: int = 0) -> tuple[list[Span], float]:
    """What a rank did in one step of a trace of `profile_to`, by beginning; and the milliseconds that the step took.

    Raises:
        TraceError: there is no such step in the trace.
    """
    every = events(path)
    (whole, *_) = [event for event in every if event["name"] == f"{STEP}{step}" and event.get("cat") == "user_annotation"] or [None]
    if whole is None:
        raise TraceError(f"{path}: no step {step} in this trace")
    begin, end = whole["ts"], whole["ts"] + whole["dur"]
    on_gpu, found, covered = any(event.get("cat") == "kernel" for event in every), [], begin
    for event in every:
        name, arguments = event["name"], event.get("args", {})
        if not begin <= event["ts"] < end:
            continue
        if event.get("cat") == "kernel" and "nccl" in name.lower():
            name, size = arguments.get("Collective name", name).strip("_"), _nccl_bytes(arguments)
        elif name.startswith("gloo:"):
            name, size = name.removeprefix("gloo:"), _gloo_bytes(arguments)
        elif event.get("cat") == "kernel" or (not on_gpu and name.startswith("aten::") and event["tid"] == whole["tid"]):
            if not on_gpu and event["ts"] < covered:  # within the operation before it
                continue
            covered, size = event["ts"] + event["dur"], None
        else:
            continue
        kind = "compute" if size is None else "communication"
        found.append(Span(kind, name, size or 0, (event["ts"] - begin) / 1000, (event["ts"] + event["dur"] - begin) / 1000))
    return found, whole["dur"] / 1000


def _gloo_bytes(arguments: dict) -> int:
    return sum(
        math.prod(shape) * BYTES.get(kind, 0)
        for shape, kind in zip(arguments.get("Input Dims", []), arguments.get("Input type", []))
    )


def _nccl_bytes(arguments: dict) -> int:
    return arguments.get("In msg nelems", 0) * BYTES.get(NAMED_BY_NCCL.get(arguments.get("dtype"), ""), 0)


def _covered(intervals: list[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, until = 0.0, -math.inf
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def shares(traces: list[Path], step: int = 0, rank: int = 0) -> dict[str, float]:
    """Where the time of a rank's step goes: shares, of which the first four add up to 1.

    A collective ends on all ranks together, and begins on each when that one comes to it. So the shortest over the ranks is the
    transfer, and what a rank has before that is waiting for the others.

    Args:
        traces: of all ranks, by rank.
        step: of the traces, from 0.
        rank: whose.

    Returns:
        `compute`; `exposed transfer` and `waiting`, while nothing is computed; `neither`; and `hidden transfer`, which goes on next
        to compute and is part of the first.
    """
    of_ranks = [[span for span in spans(path, step)[0] if span.kind == "communication"] for path in traces]
    found, length = spans(traces[rank], step)
    alike = len({len(sent) for sent in of_ranks}) == 1  # else nobody knows which belong together
    transfers, waits = [], []
    for number, span in enumerate(of_ranks[rank]):
        whole = min(span.end, length) - span.start
        shortest = min(sent[number].end - sent[number].start for sent in of_ranks) if alike else whole
        begun = max(span.start, min(span.end, length) - shortest)
        transfers.append((begun, min(span.end, length)))
        waits.append((span.start, begun))
    computed = [(span.start, min(span.end, length)) for span in found if span.kind == "compute"]
    compute, with_transfers = _covered(computed), _covered(computed + transfers)
    every = _covered(computed + transfers + waits)
    exposed = with_transfers - compute
    return {
        "compute": compute / length,
        "exposed transfer": exposed / length,
        "waiting": (every - with_transfers) / length,
        "neither": 1 - every / length,
        "hidden transfer": max(0.0, _covered(transfers) - exposed) / length,  # sums of floats can differ in their last digits
    }


def holistic_shares(traces: list[Path]) -> list[dict]:
    """What Holistic Trace Analysis says of traces from GPUs, a row per rank: the shares of compute, exposed communication and idle
    time over all profiled steps. It takes waiting for the other ranks for communication, since the kernel runs meanwhile.

    Args:
        traces: of all ranks, by rank.

    Raises:
        TraceError: the traces have no GPU's kernels, or the package is not installed.

    Source: https://hta.readthedocs.io, "Temporal Breakdown"
    """
    if not any(event.get("cat") == "kernel" for event in events(traces[0])):
        first = Path(traces[0])
        raise TraceError(f"{first.parent.name}/{first.name}: no kernels of a GPU in it; `shares` reads traces of CPUs too")
    try:
        from hta.trace_analysis import TraceAnalysis
    except ModuleNotFoundError:
        raise TraceError("Holistic Trace Analysis is not installed: pip install HolisticTraceAnalysis") from None
    logging.getLogger("hta").setLevel(logging.ERROR)
    table = TraceAnalysis(trace_files={rank: str(path) for rank, path in enumerate(traces)}).get_temporal_breakdown(visualize=False)
    names = {"compute": "compute_time_pctg", "exposed communication": "non_compute_time_pctg", "idle": "idle_time_pctg"}
    return [
        {"rank": int(row["rank"])} | {name: row[column] / 100 for name, column in names.items()}
        for row in table.sort_values("rank").to_dict("records")
    ]
