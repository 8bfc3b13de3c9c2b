"""Tables and plots, from run folders alone."""

from __future__ import annotations

import base64
import importlib.util
from pathlib import Path

from shardlab import labs
from shardlab.pages import page, table
from shardlab.run.experiment import program_of
from shardlab.run.run_folder import Run
from shardlab.show.charts import create_performance_visualizations
from shardlab.zero import memory_model
from shardlab.zero.memory_model import GIB, MIB, States

COLUMNS = {
    "method": "method",
    "ranks": "ranks",
    "loss_before": "loss before",
    "loss_after": "loss after",
    "exact_match_before": "EM before %",
    "exact_match": "EM after %",
    "samples_per_second": "samples/s",
    "measured": "measured bytes/rank",
    "predicted": "predicted bytes/rank" if importlib.util.find_spec("shardlab.zero.engine_model") else "predicted by you",
    "host": "of it on the host",
    "outcome": "outcome",
}


def bytes_text(count: float | None) -> str:
    """Bytes as a person reads them: GiB or MiB."""
    if count is None:
        return ""
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.1f} MiB"


def _engine_bytes():
    """The course's formula; None in a release, where the learner's own takes its place."""
    try:
        from shardlab.zero.engine_model import engine_bytes
    except ModuleNotFoundError:
        return None
    return engine_bytes


def predicted_states(run: Run) -> States | None:
    """What each rank should hold, by the course's formula or, in a release, by the learner's functions.

    `None` if the run did not come so far that its groups are known, or if the learner has not written what predicts it.
    """
    states = run.states()
    if states is None:
        return None
    config, experiment = run.experiment.deepspeed, run.experiment
    engine_bytes = _engine_bytes()
    if config is None:  # DDP holds fp32 states, whatever it computes in
        by_learner = engine_bytes is None
        return _by_the_learner(0, states["groups"], 1, "fp32") if by_learner else memory_model.ddp_bytes(states["parameters"])
    zero = config.get("zero_optimization", {})
    offloads = {part: zero.get(part, {}).get("device", "none") != "none" for part in ("offload_optimizer", "offload_param")}
    sizes = zero.get("stage", 0), states["groups"], experiment.ranks
    if engine_bytes is None:
        return None if any(offloads.values()) else _by_the_learner(*sizes, experiment.precision)
    offloads["nvme"] = zero.get("offload_optimizer", {}).get("device") == "nvme" and zero.get("stage") == 3
    offloads["accumulates"] = experiment.accumulation > 1
    return engine_bytes(*sizes, precision=experiment.precision, **offloads)


def _by_the_learner(*sizes) -> States | None:
    """What the learner's own formula says, if it is written and says it in the form that its docstring has."""
    try:
        return States(**program_of(labs.provided("state_bytes"))(*sizes))
    except Exception:  # whatever is wrong with it, its own milestone says; here it predicts nothing
        return None


def measured_states(run: Run) -> States | None:
    """The rank that holds most."""
    states = run.states()
    return max((States(**held) for held in states["ranks"]), key=lambda s: s.device + s.host + s.disk) if states else None


def summary(run: Run) -> dict:
    """One row of the table: the keys of `COLUMNS`."""
    losses, predicted, measured = run.results.get("eval_losses") or [], predicted_states(run), measured_states(run)
    return {
        "method": run.experiment.method,
        "ranks": run.experiment.ranks,
        "loss_before": losses[0] if losses else None,
        "loss_after": losses[-1] if losses else None,
        "exact_match_before": run.results.get("exact_match_before"),
        "exact_match": run.results.get("exact_match"),
        "samples_per_second": run.samples_per_second(),
        "measured": measured and measured.device + measured.host + measured.disk,
        "predicted": predicted and predicted.device + predicted.host + predicted.disk,
        "host": measured and measured.host,
        "outcome": run.outcome,
    }


def _cell(key: str, value) -> str:
    if value is None:
        return "-"
    if key in ("measured", "predicted", "host"):
        return bytes_text(value) if value else "0"
    if key.startswith("loss"):
        return f"{value:.3f}"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def columns(rows: list[dict]) -> dict[str, str]:
    """The columns that say something about at least one of these rows."""
    return {key: heading for key, heading in COLUMNS.items() if any(row[key] is not None for row in rows)}


NARROW = ("method", "loss_after", "exact_match", "samples_per_second", "measured", "predicted", "outcome")
"""The columns that fit into a terminal of 100 characters."""


def print_table(runs: list[Run], title: str = "") -> None:
    """Print a table, a row per run: all columns where there is room, or no terminal that could be too narrow."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    rows = [summary(run) for run in runs]
    shown = {key: heading for key, heading in columns(rows).items() if console.width >= 130 or key in NARROW}
    table = Table(title=title or None, title_justify="left")
    for key, heading in shown.items():
        table.add_column(heading, justify="left" if key in ("method", "outcome") else "right")
    for row in rows:
        table.add_row(*(_cell(key, row[key]) for key in shown))
    console.print(table)


def print_rows(title: str, rows: list[dict]) -> None:
    """Print dictionaries as a table, a row each; texts to the left, everything that begins with a digit to the right."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    table = Table(title=title, title_justify="left")
    for heading in rows[0]:
        table.add_column(heading, justify="right" if str(rows[0][heading])[:1].isdigit() else "left")
    for row in rows:
        table.add_row(*map(str, row.values()))
    console.print(table)


def html_table(runs: list[Run]) -> str:
    """The same table in HTML."""
    rows = [summary(run) for run in runs]
    return table(list(columns(rows).values()), [[_cell(key, row[key]) for key in columns(rows)] for row in rows])


def plot(runs: list[Run], path: Path | str | None = None):
    """Up to three plots side by side: loss by step, bytes per rank by kind with the prediction, and samples/s.

    Args:
        runs: any runs; those without a step or without counted states are left out of the plot that needs them. A plot for which
            no run has anything is left out, and so is that of samples/s for a single run, which has nothing to be compared with.
        path: where to save the PNG; by default nothing is saved.

    Returns:
        The matplotlib figure.
    """
    from matplotlib.figure import Figure

    trained, counted = [run for run in runs if run.metrics()], [run for run in runs if run.states()]
    timed = [run for run in runs if run.samples_per_second()]
    drawn = [(_plot_losses, trained)] * bool(trained) + [(_plot_held, counted)] * bool(counted)
    drawn += [(_plot_speed, timed)] * (len(timed) > 1)
    figure = Figure(figsize=(5 * max(1, len(drawn)), 4.4), layout="constrained")
    for number, (draw, with_figures) in enumerate(drawn, 1):
        draw(figure.add_subplot(1, len(drawn), number), with_figures)
    if path is not None:
        figure.savefig(path, dpi=110)
    return figure


def _plot_losses(axis, trained: list[Run]) -> None:
    for index, run in enumerate(trained):
        # The curves lie on one another when all is well; thinner lines on top leave each visible.
        width = 1.5 + min(3, len(trained) - 1 - index)
        axis.plot([row["step"] for row in run.metrics()], run.losses(), label=run.experiment.method, linewidth=width)
    axis.set(title="Training loss", xlabel="optimizer step", ylabel="loss")
    axis.legend(fontsize="small")


def _plot_speed(axis, timed: list[Run]) -> None:
    axis.bar([run.experiment.method for run in timed], [run.samples_per_second() for run in timed], color="#8172b3")
    axis.set(title="Throughput over all ranks", ylabel="samples/s")
    axis.tick_params(axis="x", rotation=30)


def _plot_held(axis, counted: list[Run]) -> None:
    names = [run.experiment.method for run in counted]
    kinds = [
        ("parameters", "#4c72b0"),
        ("gradients", "#dd8452"),
        ("optimizer", "#55a868"),
        ("host_parameters", "#a9bbd8"),
        ("host_gradients", "#efc3ab"),
        ("host_optimizer", "#abd5b5"),
    ]
    bottom = [0.0] * len(counted)
    for kind, colour in kinds:
        values = [getattr(measured_states(run), kind) / MIB for run in counted]
        if any(values):
            axis.bar(names, values, bottom=bottom, color=colour, label=kind.replace("host_", "host: "))
            bottom = [b + v for b, v in zip(bottom, values, strict=True)]
    predicted = [(p.device + p.host) / MIB for p in map(predicted_states, counted)]
    axis.plot(names, predicted, "k_", markersize=28, label="predicted")
    axis.set_ylim(0, 1.5 * max([*predicted, *bottom]))
    axis.legend(fontsize="small", ncols=3, loc="upper center")
    axis.set(title="Model states held by one rank", ylabel="MiB")
    axis.tick_params(axis="x", rotation=30)


def write_report(runs: list[Run], folder: Path | str, title: str) -> Path:
    """Write `report.png` and `report.html` into `folder`; returns the HTML file, which needs no other.

    Runs whose results say what each method holds get four charts more (`methods.png`).
    """
    folder = Path(folder)
    plot(runs, folder / "report.png")
    pictures = {"Training loss, bytes per rank, samples per second": folder / "report.png"}
    if any(run.results.get("held_bytes") for run in runs):
        pictures["Memory, throughput, training time and scaling efficiency by method"] = folder / "methods.png"
        create_performance_visualizations(runs).savefig(folder / "methods.png", dpi=110)
    pictures = {name: base64.b64encode(file.read_bytes()).decode() for name, file in pictures.items()}
    first = runs[0]
    hardware, versions, experiment = first.record_json["hardware"], first.record_json["versions"], first.experiment
    machine = ", ".join(hardware["gpus"]) or f"{hardware['cpu_cores']} cores of {hardware['cpu']}"
    facts = [
        f"Model {experiment.model}, data {experiment.data}, {experiment.precision}.",
        f"Global batch {experiment.global_batch} = {experiment.micro_batch} (micro-batch) × {experiment.accumulation} (accumulation) × {experiment.ranks} (ranks).",
        f"On {machine}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f"; commit {first.record_json['commit']}.",
    ]
    samples = [(run.experiment.method, example) for run in runs for example in run.results.get("examples", [])[:2]]
    path = folder / "report.html"
    values = {"title": title, "facts": facts, "table": html_table(runs), "pictures": pictures, "answers": samples}
    path.write_text(page("report.html", **values), encoding="utf-8")
    return path
