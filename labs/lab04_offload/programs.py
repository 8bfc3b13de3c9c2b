"""What milestones of this lab run around the exercises: on ranks, and in the exercises' process."""

from __future__ import annotations

import builtins
import contextlib
import errno
import inspect
import io
import math
import os
import resource
import shutil
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

from shardlab import switch
from shardlab.milestones import engine_runs, pretended
from shardlab.milestones.exercises import watched_exercises
from shardlab.run.collectives import barrier, gather, rank
from shardlab.run.experiment import Experiment
from shardlab.run.run_folder import Run
from shardlab.zero import ops


def configure_offload_with_free_bytes(folder, free: int, needed: int) -> dict:
    """Task 4.1: the configuration for states of so many bytes on a disk of which a hundredth is free, in `folder` alone."""
    create = watched_exercises("lab04_offload").create_offload_config

    def usage(path):
        free_there = free if str(path) == str(folder) else 0
        return SimpleNamespace(total=100 * free, used=100 * free - free_there, free=free_there)

    with mock.patch.object(shutil, "disk_usage", usage):
        return create(3, optimizer_offload=True, bytes_on_disk=needed, offload_device="nvme", nvme_path=folder)


_opened: list[str] | None = None


def _note_opened(event: str, arguments: tuple) -> None:
    if _opened is not None and event in ("open", "os.mkdir"):
        _opened.append(str(arguments[0]))


def files_overwritten(folder) -> list[str]:
    """Task 4.1: which files of a user's own are lost if they have the names that trying a folder uses."""
    global _opened
    create = watched_exercises("lab04_offload").create_offload_config
    given = {"optimizer_offload": True, "offload_device": "nvme", "nvme_path": folder}
    sys.addaudithook(_note_opened)
    _opened = []
    create(3, **given)
    own, _opened = [path for path in map(Path, _opened) if path.parent == Path(folder)], None
    for path in own:
        path.write_text("a user's own")
    create(3, **given)
    lost = [path.name for path in own if not path.exists() or path.read_text() != "a user's own"]
    for path in own:
        path.unlink(missing_ok=True)
    return lost


def tried_without_write_bits(folder) -> dict[str, bool]:
    """Task 4.1: whether a folder of mode 0555 is accepted, and whether this account can write into it: root can."""
    create, path = watched_exercises("lab04_offload").create_offload_config, Path(folder, "mode-0555")
    path.mkdir()
    path.chmod(0o555)
    try:
        (path / "tried").touch()
        (path / "tried").unlink()
        can_be_written = True
    except OSError:
        can_be_written = False
    try:
        create(3, optimizer_offload=True, offload_device="nvme", nvme_path=path)
        accepted = True
    except ValueError:
        accepted = False
    path.rmdir()
    return {"accepted": accepted, "can_be_written": can_be_written}


def configure_offload_on_a_disk_that_says(folder, name: str) -> dict:
    """Task 4.1: where each attempt to make a file or a folder ends in an error of the kernel's, such as EROFS."""
    create = watched_exercises("lab04_offload").create_offload_config

    def refusing(call):
        def refused(path, *args, **kwargs):
            if str(path).startswith(str(folder)):
                raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)), str(path))
            return call(path, *args, **kwargs)

        return refused

    with contextlib.ExitStack() as stack:
        for owner, call in ((os, "open"), (os, "mkdir"), (builtins, "open"), (io, "open")):
            stack.enter_context(mock.patch.object(owner, call, refusing(getattr(owner, call))))
        return create(3, optimizer_offload=True, offload_device="nvme", nvme_path=folder)


def configure_offload_where_files_stay_empty(folder) -> dict:
    """Task 4.1: where files can be made and nothing can be written into them, as on a full disk."""
    create = watched_exercises("lab04_offload").create_offload_config
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        return create(3, optimizer_offload=True, offload_device="nvme", nvme_path=folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


STEP_SECONDS = (5, 1, 2.000001234, 6, 100, 24, *(30 + number for number in range(14)))
"""What the steps of a `Sum` take, times its factor. The first is not the slowest, and 5 steps have a median between two of them."""


class Clock:
    """A clock that stands still unless it is told to move: what was timed is then known, on any machine."""

    def __init__(self):
        self.now = 1000.0

    @contextlib.contextmanager
    def in_place_of_time(self, module):
        """Let the module's code read this clock, however it asks for the time."""
        reads = {name: lambda: self.now for name in ("perf_counter", "monotonic", "time")}
        # Processor time: all 16 cores of this machine compute.
        reads |= {name: lambda: 16 * self.now for name in ("process_time", "thread_time")}
        reads |= {f"{name}_ns": lambda read=read: int(1e9 * read()) for name, read in reads.items()}
        originals = {getattr(time, name): name for name in reads}
        bound = {key: originals[value] for key, value in vars(module).items() if callable(value) and value in originals.keys()}
        with contextlib.ExitStack() as stack:
            for owner, names in ((time, {name: name for name in reads}), (module, bound)):
                for key, name in names.items():
                    stack.enter_context(mock.patch.object(owner, key, reads[name]))
            yield


class Sum(torch.optim.Optimizer):
    """Subtracts its gradients, of `elements` times a factor, and notes them. Each step takes its time on a clock."""

    def __init__(self, parameters, factor: float, clock: Clock, elements: slice = slice(None)):
        super().__init__(parameters, {})
        self.factor, self.gradients, self.clock, self.elements = factor, [], clock, elements
        self.threads: set[int] = set()
        self.parameter = self.param_groups[0]["params"][0]
        self.start = self.parameter.detach().clone()

    def zero_grad(self, *args, **kwargs):
        self.clock.now += 1000
        super().zero_grad(*args, **kwargs)

    def step(self, closure=None):
        now = self.clock.now
        self.threads.add(torch.get_num_threads())
        self.gradients.append(self.parameter.grad.clone())
        self.parameter.data.sub_(self.parameter.grad)
        self.parameter.data[self.elements].sub_((self.factor - 1.0) * self.parameter.grad[self.elements])
        self.parameter.grad.fill_(7.0)  # as one that decays weights changes its gradient in place
        self.clock.now = now + (round(self.factor) if math.isfinite(self.factor) else 1) * STEP_SECONDS[len(self.gradients) - 1]


Sum.step.hooked = True  # or torch wraps it for its profiler at first use, and it looks as if somebody had replaced it


def compare_two_sums(size: int, steps: int, seed: int, factor: float = 3.0, first_element: int = 0) -> dict:
    """Task 4.4: what two optimizers were given, that subtract their gradients once and `factor` times, and what their steps took.

    They differ in the elements from `first_element` on.
    """
    lab, clock, made = watched_exercises("lab04_offload"), Clock(), []

    def optimizer(factor: float):
        def make(parameters) -> Sum:
            made.append(Sum(parameters, factor, clock, slice(first_element, None)))
            return made[-1]

        return make

    draw = torch.randn

    def draw_slowly(*args, **kwargs):
        clock.now += 1000
        return draw(*args, **kwargs)

    def slow(method):
        def copying(tensor, *args, **kwargs):
            clock.now += 1000
            return method(tensor, *args, **kwargs)

        return copying

    torch.manual_seed(3)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    before = torch.get_rng_state(), torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        stack.enter_context(clock.in_place_of_time(switch.import_exercise("lab04_offload")))
        stack.enter_context(mock.patch.object(torch, "randn", draw_slowly))
        for name in ("clone", "copy_"):
            stack.enter_context(mock.patch.object(torch.Tensor, name, slow(getattr(torch.Tensor, name))))
        returned = lab.compare_optimizers(optimizer(1.0), optimizer(factor), size, steps, seed=seed)
    left_alone = torch.equal(before[0], torch.get_rng_state()) and before[1] == torch.get_num_threads()
    torch.set_num_threads(threads)
    first, second = made[:2]
    return {
        "returned": returned,
        "left_alone": left_alone,
        "threads": sorted(first.threads | second.threads),
        "apart": (first.parameter.detach() - second.parameter.detach()).abs().max().item(),
        "seconds": {factor: [factor * seconds for seconds in STEP_SECONDS[:steps]] for factor in (1, 3)},
        "same_tensor": first.parameter.data_ptr() == second.parameter.data_ptr(),
        "first": {"start": first.start, "gradients": first.gradients},
        "second": {"start": second.start, "gradients": second.gradients},
    }


def compare_adams(size: int, steps: int) -> dict:
    """Task 4.4: DeepSpeed's Adam on the host and torch's AdamW."""
    os.environ.update(ops.environment())  # or DeepSpeed would compile its op again, into torch's own folder
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    import shardlab.run.cpu_facts  # noqa: F401  # DeepSpeedCPUAdam asks about the processor each time; once is enough

    settings = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-8}
    return watched_exercises("lab04_offload").compare_optimizers(
        lambda p: DeepSpeedCPUAdam(p, **settings), lambda p: torch.optim.AdamW(p, **settings), size, steps
    )


FIRST_OF_ITS_NODE = mock.patch.dict(os.environ, {"LOCAL_RANK": "0"})
"""Each rank on a node of its own, whose disk all see."""


def save_offloaded(experiment: Experiment, run: Run) -> dict:
    """Task 4.7: save twice into one place, the second time a step later, and go on; what should be in the files, by rank."""
    lab, folder, engine = watched_exercises("lab04_offload"), run.folder / "checkpoints", engine_runs.build(experiment)
    complete, kept, whole = [], True, []
    save, groups, events, save_checkpoint = torch.save, lab.swapped_groups, [], engine.save_checkpoint

    def saving(*args, **kwargs):
        given = inspect.signature(save_checkpoint).bind(*args, **kwargs).arguments
        whole.append(not given.get("exclude_frozen_parameters", False))
        return save_checkpoint(*args, **kwargs)

    engine.save_checkpoint = saving

    def noting(engine):
        for group in groups(engine):
            events.append("read")
            yield group

    def save_slowly(*args, **kwargs):
        events.append("saved")
        time.sleep(0.1 * rank())  # a rank that does not wait for the others is seen on any machine
        return save(*args, **kwargs)

    for step, path in ((1, str(folder)), (2, folder)):
        engine_runs.train_on(engine, experiment, run, step - 1, step)
        client = {"note": "kept", "step": -step, "tag": "best", "ranks": 9}
        given = dict(client)
        if step == 2:  # one sub-group more than there are now, and one of a run on more ranks
            (folder / "last" / "offloaded" / f"rank{rank()}-group99.pt").touch()
            (folder / "last" / "offloaded" / "rank10-group0.pt").touch()
            barrier()
        engine.global_steps += engine_runs.STEPS_SKIPPED
        with (
            mock.patch.object(torch, "save", save_slowly),
            mock.patch.object(switch.import_exercise("lab04_offload"), "swapped_groups", noting),
            FIRST_OF_ITS_NODE,
        ):
            returned = lab.save_offloaded(engine, path, "last", client)
        engine.global_steps -= engine_runs.STEPS_SKIPPED
        files = sorted(found.name for found in (folder / "last" / "offloaded").glob("*"))
        complete.append(gather(files))
        kept = kept and client == given
    torch.save(engine_runs.swapped_states(engine), run.folder / f"wanted{rank()}.pt")
    engine_runs.train_on(engine, experiment, run, 2, experiment.steps)
    return {
        "returned": repr(returned),
        "files_on_return": complete,
        "client_kept": gather(kept),
        "whole": all(whole),
        "two_in_memory": ("read", "read") in zip(events, events[1:]),
    }


@contextlib.contextmanager
def _with_groups(lab, groups: list[tuple], me: int):
    """Let the exercises meet these sub-groups on rank `me`, without an engine and a disk of DeepSpeed's."""
    alone = {"swapped_groups": lambda engine: iter(groups), "rank": lambda: me, "barrier": lambda: None}
    alone |= {name: lambda engine: contextlib.nullcontext() for name in ("without_its_nvme_part", "parameters_renewed")}
    with contextlib.ExitStack() as stack:
        for name, stand_in in alone.items():
            stack.enter_context(mock.patch.object(switch.import_exercise("lab04_offload"), name, stand_in))
        yield


def save_groups(path, sizes: dict[int, int], me: int) -> dict:
    """Task 4.7: a checkpoint of sub-groups of so many elements, by their numbers, next to another one of the same rank; and torch sees a
    GPU.

    Returns:
        `returned`; `files` in the checkpoint's folder, where an earlier one had many; `other_tag`: whether the other one has kept its
        own; `on_gpu`: whether a tensor was saved from there.
    """
    lab, other = watched_exercises("lab04_offload"), Path(path, "step-2", "offloaded", f"rank{me}-group0.pt")
    shutil.rmtree(path, ignore_errors=True)
    other.parent.mkdir(parents=True)
    other.touch()
    folder, on_gpu, save = Path(path, "step-4", "offloaded"), [], torch.save
    folder.mkdir(parents=True)
    for number in (0, 2, 77, 150):
        (folder / f"rank{me}-group{number}.pt").touch()
    moments = {name: torch.ones for name in ("exp_avg", "exp_avg_sq")}
    groups = [
        (number, torch.ones(size), {"step": 3} | {name: make(size) for name, make in moments.items()})
        for number, size in sizes.items()
    ]

    def save_checkpoint(save_dir, tag=None, *args, **kwargs):
        Path(save_dir, tag).mkdir(parents=True, exist_ok=True)

    with _with_groups(lab, groups, me), pretended.gpu() as gpu:

        def save_noted(saved, *args, **kwargs):
            on_gpu.extend(name for name, value in saved.items() if torch.is_tensor(value) and gpu.holds(value))
            return save(saved, *args, **kwargs)

        with mock.patch.object(torch, "save", save_noted):
            returned = lab.save_offloaded(SimpleNamespace(save_checkpoint=save_checkpoint, global_steps=4), path, "step-4", {})
    files = sorted(file.name for file in folder.iterdir())
    return {"returned": returned, "files": files, "other_tag": other.exists(), "on_gpu": on_gpu}


CLIENT_STATE = {"note": "kept", "place": (1, 2), "best": None, 3: ("four",)}


def load_groups(path, sizes: dict[int, int], me: int) -> dict:
    """Task 4.8: a checkpoint of sub-groups of so many elements, by their numbers; the master weights of each are its number plus one.
    Torch sees a GPU.

    Returns:
        `client`: what came back; `refused`: the error where the first sub-group's file is missing; `left_out`: what the engine was told not to load; `masters`: a number of each sub-group afterwards;
        `steps`: Adam's count in each; `alive`: at most so many master weights of others were in memory when one was read.
    """
    lab, folder = watched_exercises("lab04_offload"), Path(path, "step-4", "offloaded")
    shutil.rmtree(path, ignore_errors=True)
    folder.mkdir(parents=True)
    names = ("exp_avg", "exp_avg_sq")
    for number, size in sizes.items():
        state = {"master": torch.full((size,), number + 1.0), "step": number + 3} | {name: torch.ones(size) for name in names}
        torch.save(state, folder / f"rank{me}-group{number}.pt")
    groups = [(number, torch.zeros(size), {}) for number, size in sizes.items()]
    left_out: list[str] = []
    read: list[weakref.ref] = []
    alive, load = [0], torch.load

    def load_checkpoint(load_dir, tag=None, **kwargs):
        left_out.extend(name for name, value in kwargs.items() if value is (name == "load_module_only"))
        return str(load_dir), dict(CLIENT_STATE)

    def load_noted(*args, **kwargs):
        alive.append(sum(one() is not None for one in read))
        state = load(*args, **kwargs)
        read.append(weakref.ref(state["master"]))
        return state

    engine, refused = SimpleNamespace(load_checkpoint=load_checkpoint), "no error"
    with _with_groups(lab, groups, me), pretended.gpu(), mock.patch.object(torch, "load", load_noted):
        client = lab.load_offloaded(engine, path, "step-4")
    with _with_groups(lab, [(number, torch.zeros(size), {}) for number, size in sizes.items()], me):
        (folder / f"rank{me}-group{min(sizes, default=0)}.pt").unlink(missing_ok=True)
        try:
            lab.load_offloaded(engine, path, "step-4")
        except ValueError as error:
            refused = str(error)
    masters = [master[0].item() for _, master, _ in groups]
    steps = [state.get("step") for _, _, state in groups]
    seen = {"client": repr(client), "left_out": left_out, "masters": masters, "steps": steps}
    return seen | {"alive": max(alive), "refused": refused}


def load_offloaded(experiment: Experiment, run: Run) -> dict:
    """Task 4.8: refuse what is no checkpoint, load one, and go on without the exercise."""
    lab, options, engine = watched_exercises("lab04_offload"), experiment.options, engine_runs.build(experiment)

    def refusal(tag: str) -> str:
        try:
            lab.load_offloaded(engine, options["checkpoints"], tag)
        except ValueError as error:
            return str(error)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    if "refused" in options:
        return {"refused": gather(refusal(options["refused"])), "global_steps": engine.global_steps}
    load_checkpoint, whole = engine.load_checkpoint, []

    def loading(*args, **kwargs):
        given = inspect.signature(load_checkpoint).bind(*args, **kwargs).arguments
        whole.append(all(given.get(name, True) for name in ("load_lr_scheduler_states", "load_module_strict")))
        return load_checkpoint(*args, **kwargs)

    engine.load_checkpoint, load, groups, events = loading, torch.load, lab.swapped_groups, []

    def noting(engine):
        for group in groups(engine):
            events.append("group")
            yield group
            events.append("done")

    def load_noted(file, *args, **kwargs):
        if "group" in str(file):
            events.append("read")
        return load(file, *args, **kwargs)

    with (
        FIRST_OF_ITS_NODE,
        mock.patch.object(torch, "load", load_noted),
        mock.patch.object(switch.import_exercise("lab04_offload"), "swapped_groups", noting),
    ):
        client = lab.load_offloaded(engine, Path(options["checkpoints"]), options["tag"])
    states, at = engine_runs.swapped_states(engine), engine.global_steps
    torch.save(states, run.folder / f"loaded{rank()}.pt")
    # DeepSpeed's Adam reads past the end of moments that are not there.
    if all(
        gather(all(state["master"].shape == state[key].shape for state in states.values() for key in ("exp_avg", "exp_avg_sq")))
    ):
        engine_runs.train_on(engine, experiment, run, at - engine_runs.STEPS_SKIPPED, experiment.steps)
    names = ("note", "seen", "step", "sampler")
    kept = [client.get(name) for name in names] if isinstance(client, dict) else repr(client)[:80]
    return {"client": gather(kept), "at": at, "whole": all(whole), "two_in_memory": ("read", "read") in zip(events, events[1:])}
