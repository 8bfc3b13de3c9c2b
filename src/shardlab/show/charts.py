"""Charts of methods against each other, from run folders: memory, throughput, training time, scaling."""

from __future__ import annotations

from shardlab.run.run_folder import Run
from shardlab.zero.memory_model import MIB

KINDS = {"parameters": "tab:blue", "gradients": "tab:orange", "optimizer": "tab:green"}


def scaling_efficiency(runs: list[Run]) -> dict[str, float]:
    """Samples/s per rank, as a share of what one rank reaches alone, by run: of the same method where it ran on one rank and on
    more, else of the fastest run on one rank. Empty if there is none."""
    measured = {run.name: run for run in runs if run.results.get("throughput")}
    on_one_rank = [run for run in measured.values() if run.experiment.ranks == 1]
    if not on_one_rank:
        return {}
    scaled = {run.experiment.method for run in measured.values() if run.experiment.ranks > 1}
    alone = {run.experiment.method: run for run in reversed(on_one_rank) if run.experiment.method in scaled}
    fastest = max(on_one_rank, key=lambda run: run.results["throughput"])

    def efficiency(run: Run) -> float:
        reference = alone.get(run.experiment.method, fastest)
        return run.results["throughput"] / run.experiment.ranks / reference.results["throughput"]

    return {name: efficiency(run) for name, run in measured.items()}


def create_performance_visualizations(runs: list[Run]):
    """Draw the four charts. A run that was not run, or failed, has an empty place with its name.

    Args:
        runs: of programs whose results have `held_bytes`, `throughput` and `epoch_duration`.

    Returns:
        The matplotlib figure.
    """
    import matplotlib.pyplot as plt

    labels = [f"{run.experiment.method}\n{run.experiment.ranks} rank{'s' * (run.experiment.ranks > 1)}" for run in runs]
    figure, ((memory, speed), (duration, scaling)) = plt.subplots(2, 2, figsize=(11, 6.5))
    places = range(len(runs))
    below = [0.0] * len(runs)
    for kind, color in KINDS.items():
        for prefix, hatch in (("", ""), ("host_", "//")):
            found = [(run.results.get("held_bytes") or {}).get(prefix + kind, 0) / MIB for run in runs]
            label = kind + (" on the host" if prefix else "")
            memory.bar(
                places, found, bottom=below, color=color, hatch=hatch, edgecolor="white", label=label if any(found) else None
            )
            below = [a + b for a, b in zip(below, found)]
    memory.set(title="Model states held per rank, just before a step", ylabel="MiB")
    memory.legend(fontsize=7)
    speed.bar(places, [run.results.get("throughput") or 0 for run in runs], color="tab:gray")
    speed.set(title="Throughput", ylabel="samples/s, all ranks")
    duration.bar(places, [sum(run.results.get("epoch_duration") or []) for run in runs], color="tab:gray")
    duration.set(title="Training time", ylabel="seconds, all epochs")
    efficiency = scaling_efficiency(runs)
    scaling.bar(places, [100 * efficiency.get(run.name, 0) for run in runs], color="tab:gray")
    scaling.axhline(100, color="black", linewidth=0.8, linestyle=":")
    scaling.set(title="Scaling efficiency: samples/s per rank, against one rank alone", ylabel="%")
    for axis in (memory, speed, duration, scaling):
        axis.set_xticks(places, labels, fontsize=7, rotation=0 if len(runs) < 6 else 45)
        for place, run in zip(places, runs):
            if not run.results.get("throughput"):
                axis.text(place, 0, " not run", rotation=90, ha="center", va="bottom", fontsize=7)
    figure.tight_layout()
    plt.close(figure)
    return figure


def scaling_points(runs: list[Run]) -> list[dict]:
    """Of each run that was measured: `method`, `ranks`, `global_batch` and `samples_per_second`."""
    return [
        {
            "method": run.experiment.method,
            "ranks": run.experiment.ranks,
            "global_batch": run.experiment.global_batch,
            "samples_per_second": run.results["throughput"],
        }
        for run in runs
        if run.results.get("throughput")
    ]


def plot_scaling(points: list[dict]):
    """Samples/s over ranks, a line for each method and kind of scaling, and dotted what would be perfect.

    Points of one method belong to strong scaling where they share a global batch, and to weak scaling where they share the samples
    per rank; a point may belong to both. A method that was measured on one number of ranks only is left out.

    Args:
        points: as of `scaling_points`.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: no method was measured on two numbers of ranks.
    """
    import matplotlib.pyplot as plt

    lines: dict[tuple, list[dict]] = {}
    for point in points:
        for kind, share in (("strong", point["global_batch"]), ("weak", point["global_batch"] / point["ranks"])):
            lines.setdefault((point["method"], kind, share), []).append(point)
    lines = {key: sorted(of, key=lambda point: point["ranks"]) for key, of in lines.items()}
    lines = {key: of for key, of in lines.items() if of[0]["ranks"] < of[-1]["ranks"]}
    if not lines:
        raise ValueError("no method was measured on two numbers of ranks, with equal global batches or equal samples per rank")
    figure, axis = plt.subplots(figsize=(6.5, 3.6))
    for (method, kind, _), of in lines.items():
        ranks, first = [point["ranks"] for point in of], of[0]
        (line,) = axis.plot(ranks, [point["samples_per_second"] for point in of], "o-" if kind == "weak" else "s--")
        line.set_label(f"{method}, {kind}: {of[-1]['samples_per_second'] / first['samples_per_second']:.2f} × on {ranks[-1]}")
        perfect = [first["samples_per_second"] * n / first["ranks"] for n in ranks]
        axis.plot(ranks, perfect, ":", color=line.get_color(), linewidth=0.8)
    axis.set_xticks(sorted({point["ranks"] for point in points}))
    axis.set_ylim(0)
    axis.set(xlabel="ranks", ylabel="samples/s, all ranks", title="Scaling (dotted: perfect)")
    axis.legend(fontsize=7)
    figure.tight_layout()
    plt.close(figure)
    return figure
