"""A step of each rank as bars: what it computed, and what it sent meanwhile."""

from __future__ import annotations

from pathlib import Path

from shardlab.run.run_folder import Run
from shardlab.run.trace import TraceError, spans
from shardlab.show.report import bytes_text
from shardlab.zero.memory_model import MIB

COLORS = {"reduce": "tab:orange", "gather": "tab:blue", "scatter": "tab:green", "broadcast": "tab:purple"}
"""Of collectives, by what is in their names; the last that fits."""


def traces_of(run: Run) -> list[Path]:
    """The traces in a run folder, by rank."""
    return sorted(run.folder.glob("rank*.json"), key=lambda path: int(path.stem.removeprefix("rank")))


def timeline(runs: list[Run] | Run, *, step: int = 1, ranks: int = 2):
    """Draw one step of some runs that were profiled, on one scale of time.

    Each rank has two rows: above what it computed, below its collectives. Where a bar below stands under a bar above,
    communication is hidden behind compute; where it stands under nothing, the rank waits for it. The larger ones carry the
    bytes that the rank puts in.

    Args:
        runs: finished runs with `rank*.json` in their folders.
        step: of the trace, from 0. The first one after a pause can be slower.
        ranks: as many of each run are drawn, from rank 0.

    Returns:
        The matplotlib figure.

    Raises:
        TraceError: none of the runs has a trace.
    """
    import matplotlib.pyplot as plt

    runs = [runs] if isinstance(runs, Run) else runs
    with_traces = {run.experiment.method: traces_of(run)[:ranks] for run in runs if traces_of(run)}
    if not with_traces:
        raise TraceError("none of these runs was profiled: there is no rank0.json in their folders")
    rows = sum(map(len, with_traces.values()))
    figure, axes = plt.subplots(
        len(with_traces), sharex=True, squeeze=False, figsize=(9, 0.6 + 0.55 * rows + 0.35 * len(with_traces))
    )
    kinds: dict[str, str] = {}
    longest = max(spans(path, step)[1] for paths in with_traces.values() for path in paths)
    for axis, (method, paths) in zip(axes[:, 0], with_traces.items()):
        for number, path in enumerate(paths):
            found, length = spans(path, step)
            top = -number
            axis.broken_barh([(0, length)], (top - 0.42, 0.84), color="0.95")
            computed = [(span.start, span.end - span.start) for span in found if span.kind == "compute"]
            axis.broken_barh(computed, (top, 0.4), color="0.45")
            sent = [span for span in found if span.kind == "communication"]
            for span in sent:
                color = next((COLORS[word] for word in reversed(COLORS) if word in span.name), "tab:red")
                kinds[span.name] = color
                axis.broken_barh(
                    [(span.start, span.end - span.start)], (top - 0.4, 0.38), color=color, edgecolor="white", linewidth=0.3
                )
            width, free_from = longest / 16, 0.0  # of a label, and where the one before it ends
            for span in sent:
                middle = (span.start + span.end) / 2
                if span.bytes < MIB / 10 or span.end - span.start < longest / 25 or middle - width / 2 < free_from:
                    continue  # no room for it
                axis.text(middle, top - 0.21, bytes_text(span.bytes), ha="center", va="center", fontsize=6)
                free_from = middle + width / 2
        axis.set_yticks([-number for number in range(len(paths))], [f"rank {number}" for number in range(len(paths))])
        axis.set_title(method, loc="left", fontsize=9)
        axis.set_ylim(-len(paths) + 0.45, 0.55)
    axes[-1, 0].set_xlabel("milliseconds since the step began")
    labels = [plt.Rectangle((0, 0), 1, 1, color="0.45")] + [plt.Rectangle((0, 0), 1, 1, color=color) for color in kinds.values()]
    figure.legend(
        labels, ["compute", *(name.replace("_", "-") for name in kinds)], loc="upper right", ncols=4, fontsize=7, frameon=False
    )
    figure.tight_layout()
    plt.close(figure)
    return figure
