"""The `shardlab` command."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from shardlab.errors import CourseError, UsageError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="shardlab: training language models beyond one GPU's memory, in graded labs.",
)


def main() -> None:
    """Run the command; an error of the course is one sentence on stderr and exit status 1, an interrupt is 130."""
    try:
        app()
    except CourseError as error:
        print(f"shardlab: {error}", file=sys.stderr)
        sys.exit(1)
    except ValidationError as error:
        if error.title != "Experiment":
            raise
        said = [f"--{'-'.join(map(str, e['loc'])).replace('_', '-')} {e['input']}: {e['msg']}" for e in error.errors()]
        print(f"shardlab: {'; '.join(said)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as error:
        print(f"shardlab: {str(error) or 'interrupted; the ranks have been ended.'}", file=sys.stderr)
        sys.exit(130)


Model = Annotated[str | None, typer.Option(help="bloom-tiny, a name on the hub such as bigscience/bloom-560m, or a local folder.")]
Data = Annotated[
    str | None,
    typer.Option(help="mini, a SQuAD JSON file, or a name on the hub such as squad. By default mini for bloom-tiny, else squad."),
]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Go on without questions of the file whose answers are not at their offset.")
]
RandomWeights = Annotated[
    bool, typer.Option("--random-weights", help="Build the architecture without weights: enough for measuring memory and speed.")
]
Ranks = Annotated[int | None, typer.Option(min=1, help="Processes, one per GPU. By default all GPUs, or 2 without one.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Optimizer steps.")]
Precision = Annotated[str | None, typer.Option(help="fp32, bf16 or fp16. By default the best that the hardware has.")]
MicroBatch = Annotated[int | None, typer.Option(min=1, help="Sequences per rank and forward pass.")]
Accumulation = Annotated[int | None, typer.Option(min=1, help="Forward passes per optimizer step.")]
LearningRate = Annotated[float | None, typer.Option(help="Peak learning rate.")]
Runs = Annotated[Path, typer.Option(help="Folder for the run folders.")]


def _require_solutions(why: str) -> None:
    from shardlab import switch

    if not switch.SOLUTIONS.is_dir():
        raise UsageError(f"{why}, and this is a release for learners: it has none.")


def _given(**options) -> dict:
    return {name: value for name, value in options.items() if value is not None}


@app.command(short_help="Fine-tune BLOOM with the plain Trainer and each ZeRO stage.")
def demo(
    data: Data = None,
    skip_bad: SkipBad = False,
    model: Model = None,
    random_weights: RandomWeights = False,
    ranks: Ranks = None,
    steps: Steps = None,
    precision: Precision = None,
    micro_batch: MicroBatch = None,
    accumulation: Accumulation = None,
    learning_rate: LearningRate = None,
    method: Annotated[list[str] | None, typer.Option(help="Only this method; may be given again. See --list-methods.")] = None,
    list_methods: Annotated[bool, typer.Option("--list-methods", help="Print the methods and stop.")] = False,
    runs: Runs = Path("runs/demo"),
) -> None:
    """Fine-tune BLOOM with the plain Trainer and with ZeRO 1, 2, 3 and offload; then a table, a plot and a report."""
    from rich.console import Console

    from shardlab.course.demo import DEMO, METHODS, default_settings, run_demo
    from shardlab.data.datasets import load_squad
    from shardlab.run.launch import warm_up
    from shardlab.show import report

    console = Console()
    if list_methods:
        console.print("\n".join(METHODS), highlight=False)
        return
    _require_solutions("the demo trains with the reference solutions")
    warm_up()
    settings = default_settings(data, model) | _given(
        ranks=ranks,
        steps=steps,
        precision=precision,
        micro_batch=micro_batch,
        accumulation=accumulation,
        learning_rate=learning_rate,
    )
    settings |= {"skip_bad": skip_bad}
    load_squad(settings["data"], skip_bad=skip_bad)  # a bad file is refused before anything is started
    if random_weights:
        settings |= {"random_weights": True, "save": False}
    console.print(
        f"{settings['model']} on {settings['data']}: "
        f"{settings['ranks']} rank{'s' * (settings['ranks'] > 1)}, {settings['precision']}, {settings['steps']} steps, "
        f"global batch {settings['micro_batch']} × {settings['accumulation']} × {settings['ranks']}",
        highlight=False,
    )
    finished, error = run_demo(method or DEMO, runs, **settings)
    path = report.write_report(
        finished, runs, "shardlab: one model, five ways to train it" if not method else "shardlab: methods compared"
    )
    report.print_table(
        finished, "Model states are the bytes of parameters, gradients and optimizer states on the rank that holds most"
    )
    console.print(f"Report: {path}\nPlot:   {path.with_name('report.png')}", highlight=False)
    if error:
        raise error


@app.command(short_help="Train once, with the exercises, and fill a run folder.")
def run(
    name: Annotated[str, typer.Argument(help="The run folder's name.")],
    method: Annotated[str, typer.Option(help="How to train; `shardlab demo --list-methods` lists the methods.")] = "baseline",
    data: Data = None,
    skip_bad: SkipBad = False,
    model: Model = None,
    random_weights: RandomWeights = False,
    ranks: Ranks = None,
    steps: Steps = None,
    epochs: Annotated[float, typer.Option(min=0, help="Passes over the data, if --steps is not given.")] = 3.0,
    precision: Precision = None,
    micro_batch: MicroBatch = 4,
    accumulation: Accumulation = 4,
    learning_rate: LearningRate = 5e-5,
    max_tokens: Annotated[int, typer.Option(min=8, help="Longest sequence.")] = 512,
    solutions: Annotated[bool, typer.Option("--solutions", help="Use the reference solutions instead of src/exercises.")] = False,
    limit: Annotated[float | None, typer.Option(help="Seconds after which the run is ended.")] = None,
    evaluate: Annotated[bool, typer.Option(help="Evaluate before and after, and generate answers.")] = True,
    save_every: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps from one checkpoint in the run folder to the next.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run of this name, if there is one; its job must be over.")
    ] = False,
    runs: Runs = Path("runs"),
) -> None:
    """Train once, with the exercises (those of the first two labs), and fill a run folder.

    In a shell this starts the ranks itself. Where torchrun, deepspeed or srun has started it, it is one of theirs.
    """

    from shardlab import hardware, switch
    from shardlab.course.demo import METHODS, config_of, default_settings
    from shardlab.labs import provided
    from shardlab.run.experiment import Experiment
    from shardlab.run.launch import launch
    from shardlab.run.ranks import leave_process_group, run_under_launcher
    from shardlab.show import report

    switch.use_exercises(switch.SOLUTIONS if solutions else switch.exercises_folder())
    if method not in METHODS:
        raise UsageError(f"there is no method '{method}'; there are {', '.join(METHODS)}")
    defaults = default_settings(data, model)
    launched = "RANK" in os.environ
    if launched and ranks not in (None, int(os.environ["WORLD_SIZE"])):
        raise UsageError(f"--ranks {ranks}, but the launcher has started {os.environ['WORLD_SIZE']}; leave --ranks out")
    if (resume or save_every) and not launched:
        raise UsageError("--save-every and --resume are for runs under torchrun, deepspeed or srun: slurm/ shows them")
    experiment = Experiment(
        name=name,
        method=method,
        program=provided("finetune"),
        deepspeed=config_of(method),
        model=defaults["model"],
        data=defaults["data"],
        skip_bad=skip_bad,
        random_weights=random_weights,
        ranks=int(os.environ["WORLD_SIZE"]) if launched else ranks or hardware.default_ranks(),
        steps=steps,
        epochs=epochs,
        precision=precision or hardware.best_precision(),
        micro_batch=micro_batch,
        accumulation=accumulation,
        learning_rate=learning_rate,
        max_tokens=max_tokens,
        eval_examples=200,
        evaluate=evaluate,
        save=not random_weights,
        save_every=save_every,
    )
    if launched:
        run_ = run_under_launcher(experiment, runs, resume=resume)
        if int(os.environ["RANK"]) == 0:
            report.print_table([run_])
        leave_process_group()
        return
    finished = launch(experiment, runs=runs, timeout=limit)
    report.print_table(finished)


@app.command(name="report", short_help="Print a table of runs; write report.html and report.png.")
def report_command(folder: Annotated[Path, typer.Argument(help="A folder of run folders, or one run folder.")]) -> None:
    """Print the table of some runs, and write report.html and report.png next to them."""

    from shardlab.run.run_folder import Run, RunError, read_runs
    from shardlab.show import report

    found = [Run.read(folder)] if (folder / "run.json").exists() else read_runs(folder)
    if not found:
        raise RunError(f"{folder} holds no run folder. Name the folder that `shardlab run` or a notebook wrote, such as runs/.")
    report.print_table(found)
    print(f"Report: {report.write_report(found, folder, f'Runs in {folder}')}")


@app.command(short_help="Check this machine; name the command that mends what fails.")
def doctor(
    build_ops: Annotated[bool, typer.Option("--build-ops", help="Compile DeepSpeed's ops now.")] = False,
) -> None:
    """Check what works on this machine, and name the command that mends what does not."""
    from shardlab.doctor import examine

    raise typer.Exit(examine.run(build_ops))


@app.command(short_help="For authors: write skeletons and notebooks from solutions/.")
def build(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if skeletons or notebooks have drifted.")] = False,
    execute: Annotated[
        bool, typer.Option("--execute", help="Execute the solution notebooks and lectures again (minutes).")
    ] = False,
    only: Annotated[str | None, typer.Option(help="With --execute: only this notebook, by its name without .ipynb.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace exercises that somebody has worked on.")] = False,
) -> None:
    """For authors: write skeletons and notebooks again from solutions/."""
    _require_solutions("skeletons and notebooks are made from the solutions")
    from shardlab.course import authoring

    if check:
        drifted = authoring.drifted()
        for path in drifted:
            print(f"{path.relative_to(authoring.ROOT)} differs from what solutions/ gives")
        if drifted:
            print("To write them again: shardlab build; executed notebooks too: shardlab build --execute")
        raise typer.Exit(1 if drifted else 0)
    for path in authoring.build(force=force):
        print(f"wrote {path.relative_to(authoring.ROOT)}")
    if execute:
        for path in authoring.execute(only=only):
            print(f"executed {path.relative_to(authoring.ROOT)}")


slurm_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Batch jobs: rendered from slurm/site.toml, submitted, followed. slurm/local_cluster.sh starts a Slurm to try.",
)
app.add_typer(slurm_app, name="slurm")

ScriptName = Annotated[
    str, typer.Argument(metavar="SCRIPT", help="baseline, zero-sweep, multi-gpu, multi-node, jupyter or grading.")
]
Nodes = Annotated[int | None, typer.Option(help="Nodes; 2 for multi-node by default.")]
GpusPerNode = Annotated[int | None, typer.Option(help="GPUs on each node; all by default, 1 for baseline, jupyter and grading.")]
RanksPerNode = Annotated[int | None, typer.Option(help="Ranks on each node, where nodes have no GPUs.")]
Time = Annotated[str | None, typer.Option(help="Time limit, such as 1:30:00.")]
Launcher = Annotated[str, typer.Option(help="For multi-node: torchrun, deepspeed or srun.")]
SitePath = Annotated[
    Path | None,
    typer.Option("--site", help="Site profile. By default slurm/local.toml while the local cluster is up, else slurm/site.toml."),
]
Graded = Annotated[str | None, typer.Option("--exercises", help="For grading: the folder that holds 'exercises'.")]
UseSolutions = Annotated[bool, typer.Option("--solutions", help="Train with the reference solutions instead of src/exercises.")]
AFTER_DASHES = {"allow_extra_args": True}
"""What stands after `--` goes to `shardlab run` in the job."""


def _asked(given: dict):
    """The job's settings and the site profile, from the arguments of `render` or `submit`."""
    from shardlab.cluster import batch
    from shardlab.course.demo import METHODS

    arguments = given.pop("context").args
    site = batch.site_in_use(given.pop("site"))
    if given["launcher"] not in ("torchrun", "deepspeed", "srun"):
        raise UsageError(f"--launcher {given['launcher']}: it is torchrun, deepspeed or srun")
    # A wrong option is refused here, not in the job after an hour in the queue.
    wanted = typer.main.get_command(app).commands["run"].make_context("shardlab run", ["name", *arguments]).params["method"]
    if wanted not in METHODS:
        raise UsageError(f"there is no method '{wanted}'; there are {', '.join(METHODS)}")
    return batch.JobSettings(arguments=arguments, **_given(**given)), site


@slurm_app.command(context_settings=AFTER_DASHES)
def render(
    context: typer.Context,
    name: ScriptName,
    nodes: Nodes = None,
    gpus_per_node: GpusPerNode = None,
    ranks_per_node: RanksPerNode = None,
    time: Time = None,
    launcher: Launcher = "torchrun",
    exercises: Graded = None,
    solutions: UseSolutions = False,
    site: SitePath = None,
) -> None:
    """Print a batch script. Options after `--` go to `shardlab run` in the job: multi-node -- --method ZeRO-3 --steps 100"""
    given = locals()
    from shardlab.cluster import batch

    print(batch.render(given.pop("name"), *_asked(given)), end="")


@slurm_app.command(context_settings=AFTER_DASHES)
def submit(
    context: typer.Context,
    name: ScriptName,
    nodes: Nodes = None,
    gpus_per_node: GpusPerNode = None,
    ranks_per_node: RanksPerNode = None,
    time: Time = None,
    launcher: Launcher = "torchrun",
    exercises: Graded = None,
    solutions: UseSolutions = False,
    site: SitePath = None,
    follow: Annotated[bool, typer.Option("--follow", help="Stay, and show the job's state and progress until it is over.")] = False,
) -> None:
    """Render a batch script and submit it. Options after `--` go to `shardlab run` in the job."""
    given = locals()
    from shardlab.cluster import batch

    stay = given.pop("follow")
    number, folder = batch.submit(given.pop("name"), *_asked(given))
    print(f"job {number} submitted" + (f"; its run folder will be {folder}" if folder else ""))
    if stay:
        _follow(number, folder)


@slurm_app.command(name="follow")
def follow_command(
    number: Annotated[int, typer.Argument(metavar="JOB", help="The job's number.")],
    run_folder: Annotated[Path | None, typer.Option("--run", help="The run folder that it writes, for steps and losses.")] = None,
) -> None:
    """Show a job's state and progress until it is over. Ctrl-C ends this, not the job."""
    _follow(number, run_folder)


def _follow(number: int, folder: Path | None) -> None:
    from shardlab.cluster import slurm

    try:
        job = slurm.follow(number, folder)
    except KeyboardInterrupt:
        print(f"\njob {number} goes on; to end it: scancel {number}", file=sys.stderr)
        raise typer.Exit(130) from None
    if job.state != "COMPLETED":
        print(f"job {job.number} {job.state} {job.reason}; the end of {job.log}:\n{slurm.log_tail(number)}", file=sys.stderr)
        raise typer.Exit(1)


@app.command(short_help="Grade submissions in boxes: gradebook, feedback, overview.")
def grade(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="SUBMISSIONS…", help="Folders, .zip, .tar.gz or git bundles that hold 'exercises', or a folder full of them."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Where results, gradebook and feedback go. Run again, the command skips what is graded already.")
    ],
    labs: Annotated[str | None, typer.Option(help="Labs, such as 1,2; all by default.")] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Submissions at a time. By default half of the cores, and no more than memory allows.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that the exercises of one submission may run.")] = 900,
    on_slurm: Annotated[
        bool, typer.Option("--slurm", help="Grade in an array job of --jobs jobs (4 by default), each one submission at a time.")
    ] = False,
    part: Annotated[str | None, typer.Option(help="K/N: only this share, and no gradebook. What the jobs of the array do.")] = None,
    limits_only: Annotated[
        bool, typer.Option("--limits-only", help="Grade without bubblewrap, though it works here. For trying that out.")
    ] = False,
) -> None:
    """Grade submissions, each in a box of its own, and write a gradebook, a feedback page each, and an overview of the class.

    Of what the submissions say nothing is believed: milestones call their functions from outside of the box, and judge there.
    """
    from shardlab.grading.folder import grade_folder
    from shardlab.progress import default_display

    graded = grade_folder(
        paths,
        out,
        of=labs,
        seconds=timeout,
        jobs=jobs,
        on_slurm=on_slurm,
        part=part,
        limits_only=limits_only,
        display=default_display(),
    )
    if graded.book:
        print(f"{len(graded.finished)} of {len(graded.found)} graded\nGradebook: {graded.book}")
        print(f"Overview:  {out / 'overview.html'}\nFeedback:  {out / 'feedback'}")
    if graded.interrupted:
        print("shardlab: interrupted; run the same command again, and it skips what is graded.", file=sys.stderr)
        raise typer.Exit(130)
    if graded.book and (graded.missing or graded.not_whole):
        for names, what in ((graded.missing, "not graded"), (graded.not_whole, "not graded to the end")):
            if names:
                print(f"shardlab: {what}: {', '.join(names)}. The log says why; the same command tries again.", file=sys.stderr)
        raise typer.Exit(1)


@app.command(short_help="Write the course as learners get it, without its answers.")
def release(
    target: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    labs: Annotated[str | None, typer.Option(help="Labs, such as 1,2,3; all by default.")] = None,
) -> None:
    """Write the course as learners get it: no solutions, no mutants, no hidden milestones; with a manifest of hashes."""
    from shardlab.course import release as releases
    from shardlab.labs import chosen

    manifest = releases.make(target, chosen(labs))
    print(f"{target}: {', '.join(manifest['labs'])}; {len(manifest['files'])} files, hashes in {releases.MANIFEST}")
    print(f"Try it: cd {target} && make doctor && make grade")


@app.command(name="skeleton")
def skeleton_command(
    wanted: Annotated[
        str, typer.Argument(metavar="TASK", help="A task such as 1.3, or a lab, by number or name, for its whole file.")
    ],
) -> None:
    """Print the exercises as they were before anybody wrote in them."""
    from shardlab.course import authoring

    print(authoring.skeleton_of(wanted), end="")


@app.command(short_help="For authors: prove solutions, skeletons and wrong answers.")
def matrix(
    labs: Annotated[list[str] | None, typer.Argument(help="Labs, by number or name; all by default.")] = None,
    only: Annotated[str | None, typer.Option(help="solutions, skeletons, mutants, or a task number.")] = None,
    generated: Annotated[
        bool, typer.Option("--generated", help="Machine-made wrong answers instead: every small change to a solution; minutes.")
    ] = False,
    record: Annotated[
        bool,
        typer.Option(
            "--record",
            help="Note anew by which results mutants are recognised (labs/<lab>/mistakes.json), or what became of small changes.",
        ),
    ] = False,
) -> None:
    """For authors: prove that solutions pass, skeletons fail, and each mutant fails its own milestone and no other."""
    from shardlab.course.matrix import prove
    from shardlab.labs import chosen

    _require_solutions("the matrix needs the solutions")
    stems = [lab.stem for lab in chosen(",".join(labs or []))]
    if generated:
        raise typer.Exit(1 if sum(_prove_small_changes(stem, only, record) for stem in stems) else 0)
    lines = prove(
        stems,
        only=only,
        record=record,
        say=lambda line: print(f"{line.stem}  {line.variant}: {line.problem or 'as it should'}", flush=True),
    )
    wrong = [line for line in lines if line.problem]
    print(f"{len(lines)} variants, {len(wrong)} not as they should be")
    raise typer.Exit(1 if wrong else 0)


def _prove_small_changes(stem: str, task: str | None, record: bool) -> int:
    """Judge a lab's small changes and say which survive; how many of those are not explained."""
    from collections import Counter

    from shardlab.course import small_changes
    from shardlab.labs import named
    from shardlab.progress import Row, default_display

    explained, counts, display = small_changes.equivalents(stem), Counter(), default_display()
    total = sum(task in (None, change.task) for change in small_changes.changes(named(stem).solution.read_text()))

    def rows() -> list[Row]:
        return [Row(stem, "running", {what: str(number) for what, number in counts.items()}, counts.total(), total)]

    verdicts = []
    for one in small_changes.judged(stem, task=task):
        verdicts.append(one)
        why = explained.get((one.change.task, one.change.told), "")
        counts["equivalent" if one.verdict == "survived" and why else one.verdict] += 1
        if one.verdict == "survived" and not why:
            display.say(f"{stem}  {one.change.task}, line {one.change.line}: {one.change.told}: survived")
        display.update(rows)
    display.end(rows)
    if record:
        small_changes.record(stem, verdicts)
    print(f"{stem}: {total} changes; " + ", ".join(f"{number} {what}" for what, number in counts.items()))
    return counts["survived"]


if __name__ == "__main__":
    main()
