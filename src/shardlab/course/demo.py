"""The main job: fine-tune BLOOM with the plain Trainer and with ZeRO 1, 2, 3 and offload, with the reference solutions."""

from __future__ import annotations

from pathlib import Path

from shardlab import hardware, switch
from shardlab.errors import UsageError
from shardlab.labs import provided
from shardlab.run.experiment import Experiment, program_of
from shardlab.run.launch import LaunchError, launch
from shardlab.run.placement import TooFewGpus, place
from shardlab.run.run_folder import Run
from shardlab.zero import ops

METHODS = {
    "baseline": None,
    "ZeRO-0": {"stage": 0},
    "ZeRO-1": {"stage": 1},
    "ZeRO-2": {"stage": 2},
    "ZeRO-3": {"stage": 3},
    "ZeRO-2 + CPU offload": {"stage": 2, "offload_optimizer": True},
    "ZeRO-3 + CPU offload": {"stage": 3, "offload_optimizer": True, "offload_param": True},
}
"""Method, and the arguments that make its DeepSpeed configuration; the baseline is the plain Trainer."""

DEMO = ["baseline", "ZeRO-1", "ZeRO-2", "ZeRO-3", "ZeRO-3 + CPU offload"]


def experiments(methods: list[str], **settings) -> list[Experiment]:
    """One experiment per method, otherwise equal.

    Args:
        methods: keys of `METHODS`.
        settings: fields of `Experiment`; a `name` is put in front of each experiment's own. The program is the first lab's, if
            none is given.
    """
    prefix = settings.pop("name", "")
    settings = {"program": provided("finetune")} | settings
    found = []
    for method in methods:
        if method not in METHODS:
            raise UsageError(f"there is no method '{method}'; there are {', '.join(METHODS)}")
        name = prefix + method.lower().replace(" + ", "-").replace(" ", "-")
        found.append(Experiment(name=name, method=method, deepspeed=config_of(method), **settings))
    return found


def config_of(method: str) -> dict | None:
    """The DeepSpeed configuration of a method, as the exercises in use make it; None for the plain `Trainer`."""
    options = METHODS[method]
    if options is None:
        return None
    switch.use_exercises(switch.exercises_folder())
    return program_of(provided("deepspeed_config"))(**options)


def _build_ops(planned: list[Experiment]) -> None:
    """Compile what any of the methods needs before the first begins: together it takes less time, and no method waits for it."""
    try:
        device = place(planned[0].ranks, or_cpu=False).device
        ops.build_all(dict.fromkeys(op for e in planned for op in ops.needed_by(e.deepspeed, device)))
    except (TooFewGpus, ops.OpBuildError):
        pass  # the launch that it concerns says so


def run_demo(methods: list[str], runs: Path, **settings) -> tuple[list[Run], LaunchError | TooFewGpus | None]:
    """Run the methods one after the other; a method that fails does not keep the others from running.

    Returns:
        All runs, and the first error, if there was one.
    """
    switch.use_exercises(switch.SOLUTIONS)
    first_error, finished = None, []
    planned = experiments(methods, **settings)
    _build_ops(planned)
    # Each method is a launch of its own: launches are warm, and a failure stays with its method.
    for experiment in planned:
        try:
            finished += launch(experiment, runs=runs)
        except TooFewGpus as error:
            if not finished:
                raise
            first_error = first_error or error  # somebody else has taken a GPU meanwhile
        except LaunchError as error:
            first_error = first_error or error
            finished.append(Run.read(runs / experiment.name))
    return finished, first_error


def default_settings(data: str | None, model: str | None) -> dict:
    """Settings that this machine finishes in minutes: bloom-tiny without a GPU, BLOOM-560m and SQuAD on one or more.

    On generated text 60 steps bring bloom-tiny's exact match from 0 to above 35 %, and 120 above 70 %. Real text is longer, in
    tokens of a tokenizer that has not seen it, so sequences may be longer and steps are fewer.
    """
    tiny = hardware.size() == "tiny"
    model = model or ("bloom-tiny" if tiny else "bigscience/bloom-560m")
    data = data or ("mini" if model == "bloom-tiny" else "squad")
    common = {"model": model, "data": data, "ranks": hardware.default_ranks()}
    if model == "bloom-tiny":
        mini = data == "mini"
        return common | {
            "precision": "fp32",
            "micro_batch": 4,
            "accumulation": 2,  # with 1, stage 1 would hold no more than stage 2
            "steps": 60 if mini else 30,
            "learning_rate": 1e-3,
            "max_tokens": 192 if mini else 384,
            "eval_examples": 200 if mini else 48,
        }
    return common | {
        "precision": hardware.best_precision(),
        "micro_batch": 4,
        "accumulation": 4,
        "steps": 100,
        "learning_rate": 2e-5,
        "max_tokens": 512,
        "eval_examples": 200,
    }
