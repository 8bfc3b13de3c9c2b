"""What runs around the exercises of this lab for their milestones: on ranks, or where the exercises are."""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import math
import os
import resource
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.nn import functional
from transformers.modeling_outputs import ImageClassifierOutput

from shardlab import switch
from shardlab.milestones.clock import Clock
from shardlab.run.collectives import gather, rank, world_size
from shardlab.run.experiment import Experiment
from shardlab.run.run_folder import Run
from shardlab.run.trace import Collective, collectives, profile_to
from shardlab.zero.held_bytes import held_before_step


def _lab():
    return switch.import_exercise("lab05_multi_gpu")


def here() -> torch.device:
    """This rank's device."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def lone_group() -> None:
    """A process group for a lone rank: what the exercises do with a mean over ranks needs one."""
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", store=dist.HashStore(), rank=0, world_size=1)


# --- 5.1: the process group -------------------------------------------------------------------------------------------


def set_up(experiment: Experiment, run: Run) -> dict:
    """Leave the group that the launcher's ranks are in, and let the exercise make it anew; as a lone process where RANK is not set."""
    lab, store = _lab(), None
    if "RANK" not in os.environ:
        os.environ |= {"WORLD_SIZE": "4", "LOCAL_RANK": "3"}  # as a login shell or a Slurm job may have it
    else:
        # The launcher's store still has the addresses of the first group, so the ranks meet at another.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if rank() == 0 else None
        os.environ["MASTER_PORT"] = str(gather(store.port if store else None)[0])
        dist.barrier()
        dist.destroy_process_group()
    lab.cleanup_distributed()  # without a group
    told = lab.setup_distributed()
    device, *numbers = told
    made = dist.is_initialized()
    if not made:
        return {"made": False}
    total = torch.ones(1, device=here())
    dist.all_reduce(total)
    results = {
        "made": True,
        "numbers": gather(numbers),
        "devices": gather(str(device)),
        "wanted_devices": gather(str(here())),
        "kind": type(device).__name__,
        "sum": total.item(),
        "backend": dist.get_backend(),
        "again": gather(str(lab.setup_distributed()) == str(told)),
    }
    dist.barrier()
    lab.cleanup_distributed()
    results["left"] = dist.is_initialized()
    lab.cleanup_distributed()
    return results


def set_up_with_gpus(rank: int, local_rank: int, world_size: int, gpus: int) -> dict:
    """What the exercise asks torch for on a rank where torch sees so many GPUs; nothing is really made."""
    asked: dict = {"groups": [], "current": []}

    def init(*given, **named):
        arguments = inspect.signature(dist.init_process_group).bind(*given, **named).arguments
        asked["groups"].append(arguments.get("backend"))

    job = {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": str(world_size)}
    init = mock.create_autospec(dist.init_process_group, side_effect=init)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, job))
        for owner, name, stand_in in (
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "device_count", lambda: gpus),
            (
                torch.cuda,
                "set_device",
                lambda device: asked["current"].append(
                    str(torch.device(device)) if isinstance(device, torch.device | str) else f"cuda:{device}"
                ),
            ),
            (dist, "is_initialized", lambda: False),
            (dist, "init_process_group", init),
        ):
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        try:
            device, *numbers = _lab().setup_distributed()
        except ValueError as error:
            return asked | {"refused": str(error)}
    return asked | {"device": str(device), "numbers": numbers}


# --- 5.2: images ------------------------------------------------------------------------------------------------------

IMAGES = {
    "RGB, wide": ("RGB", (40, 24)),
    "RGB, tall": ("RGB", (18, 50)),
    "RGB, of the right size": ("RGB", (16, 16)),
    "grey": ("L", (20, 20)),
    "RGB with transparency": ("RGBA", (20, 30)),
    "with a palette": ("P", (30, 20)),
}


def image(mode: str, size: tuple[int, int]) -> Image.Image:
    """A random image of a mode and a width and height."""
    pixels = numpy.random.default_rng([5, *size]).integers(0, 256, (size[1], size[0], 4), dtype=numpy.uint8)
    whole = Image.fromarray(pixels, "RGBA")
    return whole if mode == "RGBA" else whole.convert("RGB").convert(mode)


def transform(name: str, image_size: int, mean: list[float], std: list[float]) -> dict:
    """An image through the two transforms: once for validation, 24 times for training."""
    training, validation = _lab().create_image_transforms(image_size, mean, std)
    given = image(*IMAGES[name])
    before, size, mode = given.tobytes(), given.size, given.mode
    torch.manual_seed(7)
    state = torch.get_rng_state()
    whole = validation(given)
    drew = not torch.equal(state, torch.get_rng_state())
    turns = []
    for seed in (1, 1, 2):  # of torch; the other generators go on
        torch.manual_seed(seed)
        turns.append([training(given) for _ in range(24)])
    return {
        "values": whole,
        "draws": drew,
        "kept": given.tobytes() == before and (given.size, given.mode) == (size, mode),
        "turns": [
            [
                "mirrored" if torch.equal(one, whole.flip(-1)) else "as it was" if torch.equal(one, whole) else "other"
                for one in turn
            ]
            for turn in turns
        ],
        "again": torch.equal(validation(given), whole),
    }


# --- 5.3: loaders -----------------------------------------------------------------------------------------------------


class Numbered(torch.utils.data.Dataset):
    """Rows that know their number: an image of one pixel, and a label."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int):
        if not 0 <= number < self.count:
            raise IndexError(number)
        return torch.tensor([float(number)]), number % 7


def load(rows: int, test_rows: int, micro_batch_size: int, ranks: int, seed: int, epochs: int = 3) -> list[dict]:
    """What each rank's loaders give: in some epochs of training, and in evaluation."""
    train_set, test_set, found = Numbered(rows), Numbered(test_rows), []
    for one in range(ranks):
        train, test = _lab().create_data_loaders(
            train_set, test_set, micro_batch_size=micro_batch_size, rank=one, world_size=ranks, seed=seed
        )
        by_epoch = []
        for epoch in range(epochs):
            train.sampler.set_epoch(epoch)
            by_epoch.append([[int(number) for number in images[:, 0]] for images, _ in train])
        evaluation = [
            [[int(number), int(label)] for number, label in zip(images[:, 0], labels, strict=True)] for images, labels in test
        ]
        torch.manual_seed(one)
        train.sampler.set_epoch(0)
        again = [[int(number) for number in images[:, 0]] for images, _ in train]
        found.append(
            {
                "epochs": by_epoch,
                "again": again == by_epoch[0],
                "evaluation": evaluation,
                "evaluation_again": [len(labels) for _, labels in test] == [len(batch) for batch in evaluation],
                "labels": all(
                    int(label) == int(number) % 7
                    for images, labels in train
                    for number, label in zip(images[:, 0], labels, strict=True)
                ),
                "workers": [train.num_workers, test.num_workers],
                "samplers": [type(train.sampler).__name__, type(test.sampler).__name__],
            }
        )
    return found


def pinned(gpu: bool) -> list[bool]:
    """Whether the loaders pin their memory, where torch sees a GPU, and where it sees none."""
    with mock.patch.object(torch.cuda, "is_available", lambda: gpu):
        loaders = _lab().create_data_loaders(Numbered(8), Numbered(8), micro_batch_size=2, rank=0, world_size=1)
    return [loader.pin_memory for loader in loaders]


# --- 5.4: the model ---------------------------------------------------------------------------------------------------


def facts_of(model: nn.Module) -> dict:
    """What the milestone wants to know of a Vision Transformer."""
    return {
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtypes": sorted({str(parameter.dtype) for parameter in model.parameters()}),
        "devices": sorted({str(parameter.device) for parameter in model.parameters()}),
        "training": all(module.training for module in model.modules()),
        "checkpointing": bool(model.is_gradient_checkpointing),
        "labels": model.config.num_labels,
        "trained": all(parameter.requires_grad for parameter in model.parameters()),
    }


def load_models(stored_labels: int = 10, labels: int = 101) -> dict:
    """The small model with other arguments, and one from a folder whose head has `stored_labels` classes."""
    from transformers import ViTConfig, ViTForImageClassification

    load = _lab().load_vit_model

    def seeded(seed: int, **named):
        torch.manual_seed(seed)
        return load("vit-tiny", 7, **named)

    def same(one: nn.Module, other: nn.Module) -> bool:
        return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))

    small = {
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "image_size": 8,
        "patch_size": 4,
    }
    stored = ViTForImageClassification(ViTConfig(num_labels=stored_labels, **small))
    with tempfile.TemporaryDirectory() as folder:
        stored.save_pretrained(folder)
        loaded = load(folder, labels, torch.bfloat16, True)
        as_stored = load(folder, stored_labels)
    body = {name: tensor for name, tensor in stored.named_parameters() if "classifier" not in name}
    of_loaded = dict(loaded.named_parameters())
    return {
        "tiny": facts_of(load("vit-tiny", labels)),
        "in bf16": facts_of(load("vit-tiny", 7, torch_dtype=torch.bfloat16)),
        "checkpointed": facts_of(load("vit-tiny", 7, enable_gradient_checkpointing=True)),
        "same seed": same(seeded(1), seeded(1)),
        "other seed": same(seeded(1), seeded(2)),
        "loaded": facts_of(loaded),
        "its body": all(torch.equal(of_loaded[name], tensor.to(torch.bfloat16)) for name, tensor in body.items()),
        "its head": list(of_loaded["classifier.weight"].shape),
        "as stored": same(as_stored, stored) and facts_of(as_stored)["dtypes"] == ["torch.float32"],
    }


# --- 5.5 to 5.8: on ranks ---------------------------------------------------------------------------------------------

CLASSES, PIXELS, WIDTH = 11, 6, 10


class Small(nn.Module):
    """A classifier of two blocks whose sizes divide by nothing, called as transformers' image models are."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.first = nn.Linear(PIXELS, WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 7), nn.Tanh(), nn.Linear(7, WIDTH)) for _ in range(2))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, pixel_values, labels=None):
        hidden = self.first(pixel_values)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        logits = self.head(self.dropout(hidden))
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def small(seed: int, dropout: float = 0.0) -> Small:
    torch.manual_seed(seed)
    return Small(dropout)


def batches(seed: int, count: int, rows: int, one: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A rank's micro-batches, on the CPU."""
    drawn = torch.Generator().manual_seed(1000 * seed + one)
    return [(torch.randn(rows, PIXELS, generator=drawn), torch.randint(0, CLASSES, (rows,), generator=drawn)) for _ in range(count)]


ADAM = {"lr": 0.02, "eps": 0.1, "weight_decay": 0.01}
"""With an epsilon this large, AdamW feels the scale of its gradients; with the usual 1e-8 it would not."""


def plain_losses(seed: int, ranks: int, count: int, rows: int, accumulation: int) -> list[float]:
    """The loss of each optimizer step in plain PyTorch, in this process, on the batches of all ranks."""
    model = small(seed)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    together = list(zip(*(batches(seed, count, rows, one) for one in range(ranks)), strict=True))
    losses = []
    for at in range(0, count // accumulation * accumulation, accumulation):
        found = [model(images, labels).loss for shares in together[at : at + accumulation] for images, labels in shares]
        loss = sum(found) / len(found)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class NotMoved(torch.Tensor):
    """A tensor of a batch that nobody has moved yet: `.to` gives a plain one. On a CPU alone, a batch left where it is would do as well."""

    def to(self, *where, **how):
        return self.as_subclass(torch.Tensor).to(*where, **how)


class Loader(list):
    """Batches that have not been moved, with the length of a loader."""

    def __init__(self, given):
        super().__init__((images.as_subclass(NotMoved), labels.as_subclass(NotMoved)) for images, labels in given)


class Watch:
    """Notes of each forward pass of a model: were its tensors moved, was it in training mode, of which type were its logits, with gradients?"""

    def __init__(self, model: nn.Module):
        self.moved, self.training, self.dtypes, self.gradients = [], [], [], []
        model.register_forward_pre_hook(self.before, with_kwargs=True)
        model.register_forward_hook(self.after)

    def before(self, module, given, named):
        self.moved.append(not any(isinstance(value, NotMoved) for value in (*given, *named.values())))
        self.training.append(all(part.training for part in module.modules()))
        self.gradients.append(torch.is_grad_enabled())

    def after(self, module, given, output):
        self.dtypes.append(str(output.logits.dtype))


def sent_in(run: Run, take_step) -> dict[str, list[int]]:
    """Elements of each collective over more than one number that this rank calls in a step."""
    path = run.folder / f"rank{rank()}.json"
    profile_to(path, take_step, 1)
    found: dict[str, list[int]] = {}
    for one in collectives(path):
        if one.elements > 1:
            found.setdefault(one.name, []).append(one.elements)
    return found


def wrap(experiment: Experiment, run: Run) -> dict:
    """Task 5.5: four steps of a model that the exercise has wrapped; options: `method`."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    lone_group()
    method, seed = experiment.options["method"], experiment.seed
    given = small(seed)
    model = _lab().wrap_model(given, method, here())
    try:
        _lab().wrap_model(small(seed), "zero2", here())
        refused = "no error"
    except ValueError as error:
        refused = str(error)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    losses = []

    def step(images, labels) -> float:
        loss = model(pixel_values=images.to(here()), labels=labels.to(here())).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    mine = batches(seed, 6, 3, rank())
    for given_batch in mine[:4]:
        losses.append(sum(every := gather(step(*given_batch))) / len(every))
    held = held_before_step(model, optimizer, lambda: step(*mine[4]))
    parts = [parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in model.parameters()]
    return {
        "class": type(model).__name__,
        "same": model is given,
        "gathered_together": sum(isinstance(module, FSDPModule) for module in model.modules()),
        "sharded": sum(isinstance(parameter, DTensor) for parameter in model.parameters()),
        "elements": gather(sum(part.numel() for part in parts)),
        "devices": sorted({part.device.type for part in parts}),
        "losses": losses,
        "held": gather(vars(held)),
        "sent": sent_in(run, lambda: step(*mine[5])),
        "refused": refused,
    }


def engine(experiment: Experiment, run: Run) -> dict:
    """Task 5.6: an engine that the exercise has made of a file, and its steps; options: `file`, and `accumulation`."""
    options, seed = experiment.options, experiment.seed
    path = Path(options["file"])
    before = path.read_text()
    sizes = {"micro_batch_size": 3, "gradient_accumulation_steps": experiment.accumulation, "learning_rate": ADAM["lr"]}
    if "dtype" in options:
        sizes["torch_dtype"] = getattr(torch, options["dtype"])
    made = _lab().initialize_deepspeed_model(small(seed), path, **sizes)
    watch = Watch(made.module)

    def step(given) -> float:
        found = []
        for images, labels in given:
            loss = made(pixel_values=images.to(here()), labels=labels.to(here())).loss
            made.backward(loss)
            made.step()
            found.append(loss.item())
        return sum(found) / len(found)

    count = experiment.accumulation
    mine = batches(seed, 5 * count, 3, rank())
    losses = []
    for at in range(0, 3 * count, count):
        losses.append(sum(every := gather(step(mine[at : at + count]))) / len(every))
    held = held_before_step(made, made.optimizer, lambda: step(mine[3 * count : 4 * count]))
    groups = made.optimizer.param_groups
    return {
        "sizes": [made.train_batch_size(), made.train_micro_batch_size_per_gpu(), made.gradient_accumulation_steps()],
        "stage": made.zero_optimization_stage(),
        "clipping": made.gradient_clipping(),
        "optimizer": [[group[name] for name in ("lr", "eps", "weight_decay")] for group in groups],
        "losses": losses,
        "held": gather(vars(held)),
        "sent": sent_in(run, lambda: step(mine[4 * count :])),
        "dtypes": sorted(set(watch.dtypes)),
        "parameters": sorted({str(parameter.dtype) for parameter in made.module.parameters()}),
        "file_kept": path.read_text() == before,
    }


def _given_to_deepspeed(text: str, **more) -> tuple[list[dict], str]:
    """The configurations that the exercise gives to DeepSpeed for a file, and the ValueError that it raises; no engine is made."""
    made: list[dict] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = Path(folder, "config.json")
        path.write_text(text)
        for name, stand_in in (("get_world_size", lambda group=None: 2), ("is_initialized", lambda: True)):
            stack.enter_context(mock.patch.object(dist, name, stand_in))
        import deepspeed

        def initialize(*given, config, **named):
            made.append(config)
            return [None] * 4

        stack.enter_context(mock.patch.object(deepspeed, "initialize", initialize))
        sizes = {"micro_batch_size": 1, "gradient_accumulation_steps": 1, "learning_rate": 0.1}
        try:
            _lab().initialize_deepspeed_model(small(0), path, **sizes, **more)
        except ValueError as error:
            return made, str(error)
    return made, ""


def refuse(text: str) -> str:
    """Task 5.6: what the exercise says of a configuration file."""
    made, said = _given_to_deepspeed(text)
    if not said:
        return "no error"
    return f"an engine was made, and then: {said}" if made else said


def configure(text: str, dtype: str) -> dict:
    """Task 5.6: the configuration that the exercise makes of a file, for a type to compute in."""
    made, said = _given_to_deepspeed(text, torch_dtype=getattr(torch, dtype))
    return made[0] if made else {"refused": said}


def train_standard(experiment: Experiment, run: Run) -> dict:
    """Task 5.7: an epoch of five micro-batches; options: `ddp`, and `dtype`."""
    lone_group()
    options, seed = experiment.options, experiment.seed
    model = small(seed).to(here())
    if options.get("ddp"):
        model = nn.parallel.DistributedDataParallel(model, device_ids=[here()] if here().type == "cuda" else None)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    watch = Watch(model)
    loader = Loader(batches(seed, experiment.options["count"], 3, rank()))
    model.eval()  # as an evaluation may have left it
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)  # as a step that was broken off leaves it
    dtype = getattr(torch, options.get("dtype", "float32"))
    found: list = []
    sent = sent_in(
        run, lambda: found.append(_lab().train_epoch_standard(model, loader, optimizer, here(), experiment.accumulation, dtype))
    )
    return {
        "losses": found[0],
        "kind": sorted({type(loss).__name__ for loss in found[0]}) if isinstance(found[0], list) else type(found[0]).__name__,
        "by_rank": gather(found[0]),
        "moved": all(gather(all(watch.moved))),
        "training": all(watch.training),
        "dtypes": sorted(set(watch.dtypes)),
        "parameters": sorted({str(parameter.dtype) for parameter in model.parameters()}),
        "passes": len(watch.moved),
        "left": any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in model.parameters()),
        "sent": sent.get("all-reduce", []),
    }


def zero_file(folder: Path, stage: int, **more) -> str:
    """A configuration file as a learner has it, for AdamW of `ADAM`; the folder is a visible one."""
    adam = {"type": "AdamW", "params": ADAM | {"lr": "auto", "torch_adam": True}}
    sizes = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"), "auto")
    path = Path(folder, f"zero{stage}.json")
    path.write_text(json.dumps(sizes | {"gradient_clipping": 0.0, "optimizer": adam, "zero_optimization": {"stage": stage}} | more))
    return str(path)


def made_engine(experiment: Experiment, model: nn.Module):
    """An engine without any exercise in it."""
    import deepspeed

    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=copy.deepcopy(experiment.deepspeed))[0]


def train_engine(experiment: Experiment, run: Run) -> dict:
    """Task 5.7: an epoch of five micro-batches with an engine."""
    made = made_engine(experiment, small(experiment.seed))
    watch = Watch(made.module)
    made.eval()
    found = _lab().train_epoch_deepspeed(made, Loader(batches(experiment.seed, experiment.options["count"], 3, rank())), here())
    return {
        "losses": found,
        "kind": sorted({type(loss).__name__ for loss in found}) if isinstance(found, list) else type(found).__name__,
        "by_rank": gather(found),
        "moved": all(gather(all(watch.moved))),
        "training": all(watch.training),
        "micro_steps": made.micro_steps,
        "steps": made.global_steps,
        "passes": len(watch.moved),
    }


def labelled(seed: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return torch.randn(rows, PIXELS, generator=drawn), torch.randint(0, CLASSES, (rows,), generator=drawn)


def scores_of(seed: int, rows: int) -> dict[str, float]:
    """Loss and accuracies over all rows, in plain PyTorch."""
    images, labels = labelled(seed, rows)
    with torch.no_grad():
        logits = small(seed).eval()(images).logits
    places = (logits > logits.gather(1, labels[:, None])).sum(1)
    return {
        "loss": functional.cross_entropy(logits, labels).item(),
        "top1": (places < 1).float().mean().item(),
        "top5": (places < 5).float().mean().item(),
    }


def evaluate(experiment: Experiment, run: Run) -> dict:
    """Task 5.8: scores of a plain model or, with a configuration, of an engine; options: `rows`."""
    lone_group()
    seed, rows = experiment.seed, experiment.options["rows"]
    images, labels = labelled(seed, rows)
    ranks, size = world_size(), experiment.micro_batch
    filled = math.ceil(rows / ranks) * ranks
    mine = [(images[min(n, rows - 1)], labels[n] if n < rows else torch.tensor(-100)) for n in range(rank(), filled, ranks)]
    given = [
        (torch.stack([i for i, _ in mine[at : at + size]]), torch.stack([y for _, y in mine[at : at + size]]))
        for at in range(0, len(mine), size)
    ]
    model = small(seed, dropout=0.5)
    model = made_engine(experiment, model) if experiment.deepspeed else model.to(here())
    module = model.module if experiment.deepspeed else model
    watch, loader = Watch(module), Loader(given)
    modes, scores = [], []
    for training in (True, False):
        model.train(training)
        scores.append(_lab().evaluate(model, loader, here(), CLASSES))
        modes.append(module.training)
    kept = all(
        torch.equal(a.as_subclass(torch.Tensor), b) and torch.equal(c.as_subclass(torch.Tensor), d)
        for (a, c), (b, d) in zip(loader, given, strict=True)
    )
    return {
        "scores": gather(scores),
        "kinds": sorted({type(value).__name__ for value in scores[0].values()}),
        "modes": gather(modes),
        "moved": all(gather(all(watch.moved))),
        "off": not any(watch.training),
        "gradients": any(watch.gradients),
        "passes": gather(len(watch.moved)),
        "batches": gather(2 * len(given)),
        "kept": kept,
    }


# --- 5.9 to 5.11: where the exercises are ------------------------------------------------------------------------------


def table(rows: list[list], ranks: int, steps: int) -> dict:
    """Task 5.9: the table of collectives that are given as name and bytes."""
    found = [Collective(name, size // 4, size, float(at), at + 1.0) for at, (name, size) in enumerate(rows)]
    before = list(found)
    made = _lab().communication_table(found, ranks, steps)
    return {"table": [[name, dict(row)] for name, row in made.items()], "kept": found == before}


def throughput(seconds: list[float], samples: int, device: str, **named) -> dict:
    """Task 5.10: steps that take so many seconds, on a scripted clock. On a GPU a call returns at once, and the work is done when
    the device is synchronized."""
    clock, left, log = Clock(), [0.0], []
    durations = iter(seconds)

    def step():
        log.append("step")
        taken = next(durations, 1e6)
        if device == "cpu":
            clock.now += taken
        else:
            clock.now += 0.001
            left[0] += taken

    def synchronize(which=None):
        log.append(f"synchronize {which if which is None else torch.device(which)}")
        clock.now, left[0] = clock.now + left[0], 0.0

    with clock.in_place_of_time(_lab()), mock.patch.object(torch.cuda, "synchronize", synchronize):
        found = _lab().measure_throughput(step, samples, torch.device(device), **named)
    return {"found": found, "steps": log.count("step"), "log": log}


def memory(device: str) -> dict:
    """Task 5.10: what is made of memory that is known."""
    numbers = {
        "max_memory_allocated": 3_000_000_000,
        "max_memory_reserved": 5_500_000_000,
        "memory_allocated": 7,
        "memory_reserved": 8,
    }
    asked = []

    def said(name):
        def answer(device=None):
            asked.append(str(device))
            return numbers[name]

        return answer

    def usage(who):
        return SimpleNamespace(ru_maxrss=2_000_000 if who == resource.RUSAGE_SELF else 1)

    with contextlib.ExitStack() as stack:
        for name in numbers:
            stack.enter_context(mock.patch.object(torch.cuda, name, said(name)))
        stack.enter_context(mock.patch.object(resource, "getrusage", usage))
        found = _lab().get_memory_stats(torch.device(device))
    return {"found": found, "asked": sorted(set(asked))}


class Sampler:
    def __init__(self, log: list):
        self.log, self.epoch = log, None

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.log.append(["set_epoch", epoch])


class Standing:
    """A loader of three micro-batches, which are only their numbers."""

    def __init__(self, name: str, log: list):
        self.name, self.sampler = name, Sampler(log)

    def __len__(self) -> int:
        return 3

    def __iter__(self):
        return iter([f"{self.name} 0", f"{self.name} 1", f"{self.name} 2"])


def orchestrate(
    method: str,
    device: str,
    rank: int,
    ranks: int,
    *,
    epochs: int = 2,
    accumulation: int = 3,
    micro_batch: int = 4,
    dtype: str = "float32",
    seed: int = 17,
    checkpointing: bool = False,
    profile: bool = True,
) -> dict:
    """Task 5.11: what the exercise calls, in which order and with what, where every function that it puts together is stood in for."""
    lab, log, clock = _lab(), [], Clock()
    originals = {
        name: getattr(lab, name)
        for name in (
            "load_vit_model",
            "wrap_model",
            "initialize_deepspeed_model",
            "train_epoch_standard",
            "train_epoch_deepspeed",
            "evaluate",
            "measure_throughput",
            "get_memory_stats",
            "held_before_step",
            "profile_to",
            "collectives",
            "communication_table",
        )
    }
    model = nn.Linear(2, 2)
    made = SimpleNamespace(optimizer=SimpleNamespace(name="the engine's"), module=model)
    train, test = Standing("train", log), Standing("test", log)
    losses = iter(range(100))

    def given(name, args, named) -> dict:
        bound = inspect.signature(originals[name]).bind(*args, **named)
        bound.apply_defaults()
        return dict(bound.arguments)

    def trained(name):
        def stand_in(*args, **named):
            arguments = given(name, args, named)
            batches = arguments["loader"]
            seconds = 10.0 if batches is train else 0.5
            clock.now += seconds + (train.sampler.epoch or 0)
            optimizer = arguments.get("optimizer")
            log.append(
                [
                    name,
                    {
                        "loader": "train" if batches is train else list(batches),
                        "model": "the model"
                        if arguments.get("model") is model
                        else "the engine"
                        if arguments.get("engine") is made
                        else "another",
                        "optimizer": None
                        if optimizer is None
                        else [
                            type(optimizer).__name__,
                            optimizer.defaults["lr"],
                            optimizer.defaults["weight_decay"],
                            id(optimizer),
                        ],
                        "device": str(arguments["device"]),
                        "accumulation": arguments.get("gradient_accumulation_steps"),
                        "dtype": str(arguments.get("dtype")),
                    },
                ]
            )
            return [float(next(losses)), float(next(losses))]

        return stand_in

    def calls_a_step(name, result):
        def stand_in(*args, **named):
            arguments = given(name, args, named)
            log.append(
                [
                    name,
                    {key: str(value) for key, value in arguments.items() if key not in ("take_step", "model", "optimizer")}
                    | (
                        {
                            "model": "the model"
                            if arguments["model"] is model
                            else "the engine"
                            if arguments["model"] is made
                            else "another",
                            "optimizer": "the engine's"
                            if arguments["optimizer"] is made.optimizer
                            else type(arguments["optimizer"]).__name__,
                        }
                        if "model" in arguments
                        else {}
                    ),
                ]
            )
            arguments["take_step"]()
            log.append([f"{name} ends", None])
            return result

        return stand_in

    def simple(name, result):
        def stand_in(*args, **named):
            arguments = given(name, args, named)
            log.append(
                [
                    name,
                    {
                        key: "the model"
                        if value is model
                        else "the engine"
                        if value is made
                        else "test"
                        if value is test
                        else value
                        if isinstance(value, int | float | list)
                        else str(value)
                        for key, value in arguments.items()
                    },
                ]
            )
            return result() if callable(result) else result

        return stand_in

    def loaded():
        log.append(["seed", torch.initial_seed()])
        return model

    def evaluated():
        clock.now += 100.0
        return {"loss": 0.25, "top1": 0.5, "top5": 0.75}

    stand_ins = {
        "load_vit_model": simple("load_vit_model", loaded),
        "wrap_model": simple("wrap_model", lambda: model),
        "initialize_deepspeed_model": simple("initialize_deepspeed_model", lambda: made),
        "train_epoch_standard": trained("train_epoch_standard"),
        "train_epoch_deepspeed": trained("train_epoch_deepspeed"),
        "evaluate": simple("evaluate", evaluated),
        "measure_throughput": calls_a_step("measure_throughput", 321.5),
        "get_memory_stats": simple("get_memory_stats", {"peak_allocated_gb": 1.5, "peak_reserved_gb": 2.5}),
        "held_before_step": calls_a_step("held_before_step", SimpleNamespace(parameters=8, gradients=4, optimizer=2)),
        "profile_to": calls_a_step("profile_to", None),
        "collectives": simple("collectives", ["found"]),
        "communication_table": simple("communication_table", {"all-reduce": {"calls": 1.0}}),
    }
    torch.manual_seed(99)
    with contextlib.ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch.object(lab, name, stand_in))
        stack.enter_context(clock.in_place_of_time(lab))
        try:
            result = lab.run_training_experiment(
                method,
                "some-vit",
                train,
                test,
                rank,
                ranks,
                device=torch.device(device),
                num_labels=9,
                num_epochs=epochs,
                micro_batch_size=micro_batch,
                gradient_accumulation_steps=accumulation,
                learning_rate=0.125,
                torch_dtype=getattr(torch, dtype),
                enable_gradient_checkpointing=checkpointing,
                seed=seed,
                enable_profiling=Path("/traces") if profile else None,
            )
        except ValueError as error:
            return {"refused": str(error), "log": log}
    numbers: dict[int, int] = {}
    for name, what in log:
        if name == "train_epoch_standard":
            what["optimizer"][-1] = numbers.setdefault(what["optimizer"][-1], len(numbers))
    return {"result": result, "log": log}
