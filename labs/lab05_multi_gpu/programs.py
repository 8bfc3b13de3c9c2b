"""What runs around the exercises of this lab for their milestones: on ranks, or where the exercises are."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
import json
import math
import os
import resource
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import huggingface_hub
import numpy
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional
from transformers.modeling_outputs import ImageClassifierOutput

from shardlab import switch
from shardlab.milestones import pretended
from shardlab.milestones.clock import Clock
from shardlab.run.collectives import gather, rank, world_size
from shardlab.run.experiment import Experiment
from shardlab.run.run_folder import Run
from shardlab.run.trace import Collective, collectives, profile_to
from shardlab.zero.held_bytes import held_before_step
from shardlab.zero.memory_model import States


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
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
    else:
        # The launcher's store still has the addresses of the first group, so the ranks meet at another.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if rank() == 0 else None
        os.environ["MASTER_PORT"] = str(gather(store.port if store else None)[0])
        dist.barrier()
        dist.destroy_process_group()
    lab.cleanup_distributed()  # without a group
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    before = [os.environ.get(name) for name in names]
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
    results["environment"] = gather([os.environ.get(name) for name in names] == before)
    dist.barrier()
    lab.cleanup_distributed()
    results["left"] = dist.is_initialized()
    lab.cleanup_distributed()
    return results


def set_up_with_gpus(rank: int | None, local_rank: int, world_size: int, gpus: int, there: bool = False) -> dict:
    """What the exercise asks torch for on a rank where torch sees so many GPUs; nothing is really made.

    Args:
        rank: None for a lone process, where the other two are set all the same.
        local_rank, world_size, gpus: of the rank.
        there: whether a process group is there already.
    """
    lab, asked = _lab(), {"groups": [], "stores": [], "current": []}
    group = [there]
    signature = inspect.signature(dist.init_process_group)

    def init(*given, **named):
        arguments = signature.bind(*given, **named).arguments
        asked["groups"].append(arguments.get("backend"))
        asked["stores"].append(type(arguments.get("store")).__name__)
        group[0] = True

    def leave(*_):
        group[0] = False

    def set_device(device):
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if (device.index or 0) >= gpus:
            raise RuntimeError("CUDA error: invalid device ordinal")
        asked["current"].append(str(device))

    job = {"LOCAL_RANK": str(local_rank), "WORLD_SIZE": str(world_size)} | ({} if rank is None else {"RANK": str(rank)})
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, job))
        if rank is None:
            os.environ.pop("RANK", None)
        for owner, name, stand_in in (
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "device_count", lambda: gpus),
            (torch.cuda, "set_device", set_device),
            (dist, "is_initialized", lambda: group[0]),
            (dist, "get_rank", lambda *_, **__: rank or 0),
            (dist, "get_world_size", lambda *_, **__: 1 if rank is None else world_size),
            (dist, "init_process_group", mock.create_autospec(dist.init_process_group, side_effect=init)),
            (dist, "destroy_process_group", leave),
            (dist, "barrier", lambda *_, **__: None),
        ):
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        try:
            device, *numbers = lab.setup_distributed()
            asked |= {"device": str(device), "numbers": numbers}
            first = {name: [*asked[name]] for name in ("groups", "stores", "current")}
            lab.cleanup_distributed()
            lab.setup_distributed()
        except ValueError as error:
            return asked | {"refused": str(error)}
        except RuntimeError as error:
            if isinstance(error, NotImplementedError):
                raise
            return asked | {"ended": f"RuntimeError: {error}"}
    return asked | first | {"anew": group[0]}


# --- 5.2: images ------------------------------------------------------------------------------------------------------

IMAGES = {
    "RGB, wide": ("RGB", (40, 24)),
    "RGB, tall": ("RGB", (18, 50)),
    "RGB, of the right size": ("RGB", (16, 16)),
    "RGB, large": ("RGB", (420, 300)),
    "RGB, nearly black": ("RGB", (16, 16), 1),
    "grey": ("L", (20, 20)),
    "RGB with transparency": ("RGBA", (20, 30)),
    "with a palette": ("P", (30, 20)),
    "grey with transparency": ("LA", (20, 30)),
    "black and white": ("1", (30, 20)),
    "CMYK": ("CMYK", (24, 20)),
    "YCbCr": ("YCbCr", (24, 20)),
    "HSV": ("HSV", (20, 24)),
}
"""Mode, width and height, and the largest value of a pixel if it is not 255."""


def image(mode: str, size: tuple[int, int], brightest: int = 255) -> Image.Image:
    """A random image of a mode and a width and height."""
    pixels = numpy.random.default_rng([5, *size]).integers(0, brightest + 1, (size[1], size[0], 4), dtype=numpy.uint8)
    whole = Image.fromarray(pixels, "RGBA")
    return whole if mode == "RGBA" else whole.convert("RGB").convert(mode)


def transform(name: str, image_size: int, mean: list[float], std: list[float]) -> dict:
    """An image through the two transforms: once for validation, 24 times for training."""
    training, validation = _lab().create_image_transforms(image_size, mean, std)
    given = image(*IMAGES[name])
    before, size, mode = given.tobytes(), given.size, given.mode
    torch.manual_seed(7)
    state = torch.get_rng_state()
    try:
        whole = validation(given)
    except (RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, NotImplementedError):
            raise
        return {"ended": f"{type(error).__name__}: {error}"}
    drew = not torch.equal(state, torch.get_rng_state())
    turns = []
    for seed in (1, 1, 2):  # of torch; the other generators go on
        torch.manual_seed(seed)
        turns.append([training(given) for _ in range(24)])
    again = validation(given)
    kept = given.tobytes() == before and (given.size, given.mode) == (size, mode)
    upside_down = given.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    made = []
    for picture in (given, upside_down) * 4:
        made += [(one, one.clone()) for one in (training(picture), validation(picture))]
    wanted = validation(upside_down)
    given.paste(upside_down)  # the same object, other pixels
    return {
        "values": whole,
        "draws": drew,
        "kept": kept,
        "looks again": torch.equal(validation(given), wanted),
        "turns": [
            [
                "mirrored" if torch.equal(one, whole.flip(-1)) else "as it was" if torch.equal(one, whole) else "other"
                for one in turn
            ]
            for turn in turns
        ],
        "again": torch.equal(again, whole),
        "own memory": all(torch.equal(one, copy) for one, copy in made),
    }


def from_a_file() -> dict:
    """A JPEG that is opened and not read yet, and the same one read before."""
    kept = io.BytesIO()
    image("RGB", (640, 480)).save(kept, "JPEG")
    _, validation = _lab().create_image_transforms(16, [0.5] * 3, [0.5] * 3)
    waiting, read = Image.open(kept), Image.open(kept)
    read.load()
    wanted = validation(read)
    return {"same": torch.equal(validation(waiting), wanted), "size": list(waiting.size)}


def mirrored(count: int, seed: int) -> int:
    """How many of so many images the transform for training mirrors."""
    training, validation = _lab().create_image_transforms(8, [0.5] * 3, [0.5] * 3)
    given = image("RGB", (8, 8))
    turned = validation(given).flip(-1)
    torch.manual_seed(seed)
    return sum(torch.equal(training(given), turned) for _ in range(count))


# --- 5.3: loaders -----------------------------------------------------------------------------------------------------


class Numbered(torch.utils.data.Dataset):
    """Rows that know their number: an image of one pixel, and a label."""

    def __init__(self, count: int):
        self.count, self.read = count, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int):
        if not 0 <= number < self.count:
            raise IndexError(number)
        self.read += 1
        return torch.tensor([float(number)]), number % 7


def load(rows: int, test_rows: int, micro_batch_size: int, ranks: int, seed: int, epochs: int = 3) -> list[dict]:
    """What each rank's loaders give: in some epochs of training, and in evaluation."""
    train_set, test_set, found = Numbered(rows), Numbered(test_rows), []
    for one in range(ranks):
        state, before = torch.get_rng_state(), train_set.read + test_set.read
        train, test = _lab().create_data_loaders(
            train_set, test_set, micro_batch_size=micro_batch_size, rank=one, world_size=ranks, seed=seed
        )
        at_once = train_set.read + test_set.read - before
        drew = not torch.equal(state, torch.get_rng_state())
        by_epoch, reads, types = [], [], set()
        for epoch in range(epochs):
            train.sampler.set_epoch(epoch)
            before = train_set.read
            by_epoch.append([[int(number) for number in images[:, 0]] for images, _ in train])
            reads.append(train_set.read - before)
        evaluation = [
            [[int(number), int(label)] for number, label in zip(images[:, 0], labels, strict=True)] for images, labels in test
        ]
        types |= {str(labels.dtype) for loader in (train, test) for _, labels in loader}
        torch.manual_seed(one)
        train.sampler.set_epoch(0)
        again = [[int(number) for number in images[:, 0]] for images, _ in train]
        found.append(
            {
                "epochs": by_epoch,
                "reads": reads,
                "read at once": at_once,
                "draws": drew,
                "types": sorted(types),
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
        "labels": model.config.num_labels,
        "trained": all(parameter.requires_grad for parameter in model.parameters()),
    }


def computed(model: nn.Module) -> list[int]:
    """How often each block computes its first linear layer in a forward and a backward pass: twice under gradient checkpointing."""
    blocks = max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len)
    calls = [0] * len(blocks)

    def count(number: int):
        def hook(*_):
            calls[number] += 1

        return hook

    first = [next(module for module in block.modules() if isinstance(module, nn.Linear)) for block in blocks]
    hooks = [module.register_forward_hook(count(number)) for number, module in enumerate(first)]
    side = model.config.image_size
    images = torch.zeros(1, 3, side, side, dtype=next(model.parameters()).dtype)
    model(pixel_values=images).logits.float().sum().backward()
    for hook in hooks:
        hook.remove()
    return calls


KNOWN_ON_THE_HUB = "google/vit-huge-patch14-224-in21k"
"""Whose shape `vit_config` knows as well."""


@contextlib.contextmanager
def on_the_hub(name: str, model: nn.Module):
    """The hub's cache holds this model under this name, and the hub cannot be reached."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        repository, commit = Path(folder, f"models--{name.replace('/', '--')}"), "0" * 40
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        model.save_pretrained(repository / "snapshots" / commit)
        for constant, value in (("HF_HUB_CACHE", folder), ("HF_HUB_OFFLINE", True)):
            stack.enter_context(mock.patch.object(huggingface_hub.constants, constant, value))
        yield


def load_models(stored_labels: int = 10, labels: int = 101) -> dict:
    """The small model with other arguments, and one from a folder whose head has `stored_labels` classes."""
    from transformers import DeiTConfig, DeiTForImageClassification, ViTConfig, ViTForImageClassification
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    default, left = torch.get_default_dtype(), set()

    def load(*given, **named) -> nn.Module:
        try:
            return _lab().load_vit_model(*given, **named)
        finally:
            left.add(str(torch.get_default_dtype()))
            torch.set_default_dtype(default)

    def seeded(seed: int, **named):
        torch.manual_seed(seed)
        return load("vit-tiny", 7, **named)

    def same(one: nn.Module, other: nn.Module) -> bool:
        return all(torch.equal(a, b.to(a.dtype)) for a, b in zip(one.parameters(), other.parameters(), strict=True))

    small = {
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "image_size": 8,
        "patch_size": 4,
    }
    stored = ViTForImageClassification(ViTConfig(num_labels=stored_labels, **small))
    in_bf16 = copy.deepcopy(stored).to(torch.bfloat16)
    relative = DeiTForImageClassification(DeiTConfig(num_labels=stored_labels, **small))
    with on_the_hub(KNOWN_ON_THE_HUB, stored):
        of_the_hub = load(KNOWN_ON_THE_HUB, stored_labels)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as folder_in_bf16:
        stored.save_pretrained(folder)
        in_bf16.save_pretrained(folder_in_bf16)
        loaded = load(folder, labels, torch.bfloat16, True)
        as_stored = load(folder, stored_labels)
        fitting = load(folder_in_bf16, stored_labels, torch.float32, True)
        relative.save_pretrained(folder)
        of_another_kind = load(folder, stored_labels)
    torch.manual_seed(1)
    in_a_row = [load("vit-tiny", 7) for _ in range(2)]
    models = {
        "tiny": load("vit-tiny", labels),
        "in bf16": load("vit-tiny", 7, torch_dtype=torch.bfloat16),
        "in fp16": load("vit-tiny", 7, torch_dtype=torch.float16),
        "checkpointed": load("vit-tiny", 7, enable_gradient_checkpointing=True),
        "loaded": loaded,
        "fitting": fitting,
    }
    body = {name: tensor for name, tensor in in_bf16.named_parameters() if "classifier" not in name}
    of_loaded = dict(loaded.named_parameters())
    head, old = of_loaded["classifier.weight"], in_bf16.classifier.weight
    rows = min(len(head), len(old))
    facts = {name: facts_of(model) for name, model in models.items()}
    for name in ("tiny", "checkpointed", "loaded", "fitting"):
        facts[name]["computed"] = sorted(set(computed(models[name])))
    return facts | {
        "same seed": same(seeded(1), seeded(1)),
        "other seed": same(seeded(1), seeded(2)),
        "its body": all(torch.equal(of_loaded[name], tensor) for name, tensor in body.items()),
        "its head": list(head.shape),
        "old rows": int((head[:rows] == old[:rows]).all(1).sum()),
        "as stored": same(as_stored, stored) and facts_of(as_stored)["dtypes"] == ["torch.float32"],
        "fits": same(fitting, in_bf16),
        "default types": sorted(left),
        "in a row": same(*in_a_row),
        "of the hub": type(of_the_hub) is type(stored)
        and facts_of(of_the_hub)["parameters"] == facts_of(stored)["parameters"]
        and same(of_the_hub, stored),
        "another kind": type(of_another_kind).__name__,
        "its weights": type(of_another_kind) is type(relative) and same(of_another_kind, relative),
    }


# --- 5.5 to 5.8: on ranks ---------------------------------------------------------------------------------------------

CLASSES, PIXELS, WIDTH = 11, 6, 10


class Small(nn.Module):
    """A classifier of two blocks whose sizes divide by nothing, called as transformers' image models are."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.stem = nn.ModuleList([nn.Linear(PIXELS, WIDTH)])  # a list as well, and shorter
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 7), nn.Tanh(), nn.Linear(7, WIDTH)) for _ in range(2))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, pixel_values, labels=None):
        hidden = self.stem[0](pixel_values)
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


class OneByOne:
    """Batches as a loader gives them: it has a length, and can be gone through, and that is all. `read` counts what was taken."""

    def __init__(self, given):
        self.given, self.read = list(given), 0

    def __len__(self) -> int:
        return len(self.given)

    def __iter__(self):
        for batch in self.given:
            self.read += 1
            yield batch


class Loader(OneByOne):
    """Batches that have not been moved."""

    def __init__(self, given):
        super().__init__((images.as_subclass(NotMoved), labels.as_subclass(NotMoved)) for images, labels in given)


class Watch:
    """Notes of each forward pass of a model: were its tensors moved, was it in training mode, of which type were its logits, with gradients?"""

    def __init__(self, model: nn.Module):
        self.moved, self.training, self.parts, self.dtypes, self.gradients, self.inference = [], [], [], [], [], []
        model.register_forward_pre_hook(self.before, with_kwargs=True)
        model.register_forward_hook(self.after)

    def before(self, module, given, named):
        self.moved.append(not any(isinstance(value, NotMoved) for value in (*given, *named.values())))
        modes = [part.training for part in module.modules()]
        self.training.append(all(modes))
        self.parts.append(any(modes))
        self.gradients.append(torch.is_grad_enabled())
        self.inference.append(torch.is_inference_mode_enabled())

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


@contextlib.contextmanager
def meshes_noted(lab):
    """While this lasts, note the mesh that each call of `fully_shard` is given, None for none, however the exercise has imported it."""
    from torch.distributed import fsdp

    real, meshes = fsdp.fully_shard, []

    @functools.wraps(real)
    def fully_shard(module, *given, **named):
        mesh = named.get("mesh")
        meshes.append(None if mesh is None else [mesh.device_type, mesh.shape[-1]])
        return real(module, *given, **named)

    with in_place_of(lab, real, fully_shard, (fsdp, "fully_shard")):
        yield meshes


@contextlib.contextmanager
def in_place_of(lab, real, stand_in, *owners):
    """While this lasts, a function or class is another one in modules that have it, and under whatever name the exercise has it."""
    with contextlib.ExitStack() as stack:
        for owner, name in [*owners, *((lab, name) for name, value in vars(lab).items() if value is real)]:
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        yield


def wrap(experiment: Experiment, run: Run) -> dict:
    """Task 5.5: four steps of a model that the exercise has wrapped; options: `method`."""
    from torch.distributed.tensor import DTensor

    lone_group()
    lab, method, seed = _lab(), experiment.options["method"], experiment.seed
    given = small(seed)
    # Each rank could be alone on its machine: all ranks are more than those of one machine.
    with meshes_noted(lab) as meshes, mock.patch.dict(os.environ, {"LOCAL_WORLD_SIZE": "1"}):
        model = lab.wrap_model(given, method, here())
    refused = {}
    for other in ("zero2", "fsdp", "DDP"):
        try:
            lab.wrap_model(small(seed), other, here())
            refused[other] = "no error"
        except ValueError as error:
            refused[other] = str(error)
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
        "meshes": meshes,
        "wanted_mesh": [here().type, world_size()],
        "bucket": getattr(model, "bucket_bytes_cap", None),
        "losses": losses,
        "held": gather(vars(held)),
        "sent": sent_in(run, lambda: step(*mine[5])),
        "refused": refused,
    }


def moved(method: str) -> bool:
    """Task 5.5: whether the exercise puts a model on a GPU, which is pretended."""
    with pretended.gpu() as gpu:
        model = _lab().wrap_model(small(0), method, pretended.GPU)
        return all(map(gpu.holds, model.parameters()))


class NotedDDP(nn.Module):
    """What stands for DistributedDataParallel where there is no GPU: it notes what it is given."""

    def __init__(self, module, device_ids=None, **_):
        super().__init__()
        self.module = module
        self.numbers = (
            None
            if device_ids is None
            else [torch.device("cuda", one).index if isinstance(one, int) else torch.device(one).index for one in device_ids]
        )


def ddp_on_a_gpu() -> dict:
    """Task 5.5: what the exercise gives to DistributedDataParallel on rank 9 of 16, on the second GPU of its machine, which is
    pretended."""
    lab, parallel = _lab(), nn.parallel
    real = parallel.DistributedDataParallel
    owners = [(parallel, "DistributedDataParallel"), (parallel.distributed, "DistributedDataParallel")]
    with pretended.gpu() as gpu, pretended.lone_group(), in_place_of(lab, real, NotedDDP, *owners):
        with (
            mock.patch.object(dist, "get_rank", lambda *_, **__: 9),
            mock.patch.object(dist, "get_world_size", lambda *_, **__: 16),
            mock.patch.dict(os.environ, {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16"}),
        ):
            made = lab.wrap_model(small(0), "ddp", torch.device("cuda", 1))
        wrapped = isinstance(made, NotedDDP)
        moved = all(map(gpu.holds, made.parameters()))
    return {"numbers": made.numbers if wrapped else "no DistributedDataParallel", "moved": moved}


def mesh_beside_a_gpu() -> list[str]:
    """Task 5.5: of which kind the exercise makes a mesh, for a model that is on the CPU of a machine that has a GPU, too."""
    from torch.distributed import device_mesh, fsdp

    lab, kinds = _lab(), []

    def mesh(kind, *_, **__):
        kinds.append(str(kind))

    with contextlib.ExitStack() as stack:
        stack.enter_context(pretended.lone_group())
        stack.enter_context(in_place_of(lab, fsdp.fully_shard, lambda module, *_, **__: module, (fsdp, "fully_shard")))
        for name in ("init_device_mesh", "DeviceMesh"):
            owners = [(device_mesh, name), *([(dist, name)] if hasattr(dist, name) else [])]
            stack.enter_context(in_place_of(lab, getattr(device_mesh, name), mesh, *owners))
        stack.enter_context(mock.patch.object(torch.cuda, "is_available", lambda: True))
        stack.enter_context(mock.patch.object(torch.cuda, "device_count", lambda: 1))
        lab.wrap_model(small(0), "fsdp2", torch.device("cpu"))
    return kinds


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


def _given_to_deepspeed(text: str, *, as_text: bool = False, **more) -> tuple[list[dict], str]:
    """The configurations that the exercise gives to DeepSpeed for a file, and the ValueError that it raises; no engine is made.
    The process group has two ranks, whatever WORLD_SIZE says.
    """
    made: list[dict] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = Path(folder, "config.json")
        path.write_text(text)
        stack.enter_context(mock.patch.dict(os.environ, {"WORLD_SIZE": "4"}))
        for name, stand_in in (("get_world_size", lambda group=None: 2), ("is_initialized", lambda: True)):
            stack.enter_context(mock.patch.object(dist, name, stand_in))
        import deepspeed

        def initialize(*given, config, **named):
            made.append(config)
            return [None] * 4

        stack.enter_context(mock.patch.object(deepspeed, "initialize", initialize))
        sizes = {"micro_batch_size": 3, "gradient_accumulation_steps": 5, "learning_rate": 0.1}
        try:
            _lab().initialize_deepspeed_model(small(0), str(path) if as_text else path, **sizes, **more)
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
    """Task 5.6: the configuration that the exercise makes of a file, for a type to compute in; the path is given as text."""
    try:
        made, said = _given_to_deepspeed(text, as_text=True, torch_dtype=getattr(torch, dtype))
    except (KeyError, AttributeError, TypeError) as error:
        return {"ended": f"{type(error).__name__}: {error}"}
    return made[0] if made else {"ended": f"ValueError: {said}"}


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


def zero_file(folder: Path, stage: int, lr="auto", **more) -> str:
    """A configuration file as a learner has it, for AdamW of `ADAM`; the folder is a visible one."""
    adam = {"type": "AdamW", "params": ADAM | {"lr": lr, "torch_adam": True}}
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


class Loud(Small, FSDPModule):
    """A small model with a thousand times the loss, that notes under which autocast it is called. It passes for one of FSDP2's, whose
    settings it notes.
    """

    def __new__(cls):
        return object.__new__(cls)  # FSDPModule's makes one of the class that was sharded, and none was

    def __init__(self):
        super().__init__()
        self.autocast, self.sync, self.reshard, self.ahead = [], [], [], []
        self.loader = OneByOne([])

    def forward(self, pixel_values, labels=None):
        on = next((device for device in ("cuda", "cpu") if torch.is_autocast_enabled(device)), "")
        dtype = str(torch.get_autocast_dtype(on)) if on else "torch.float32"
        self.autocast.append(f"{dtype}, for the CPU" if on == "cpu" else dtype)
        self.ahead.append(self.loader.read - len(self.autocast))
        found = super().forward(pixel_values, labels)
        return ImageClassifierOutput(loss=1000 * found.loss, logits=found.logits)

    def set_requires_gradient_sync(self, wanted: bool, **_) -> None:
        self.sync.append(wanted)

    def set_reshard_after_backward(self, wanted: bool, **_) -> None:
        self.reshard.append(wanted)


class Held:
    """An optimizer that changes nothing, and compares the gradients that it is given with those that are due."""

    def __init__(self, model: nn.Module, wanted: list[list[torch.Tensor]]):
        self.model, self.wanted, self.apart = model, wanted, []
        self.param_groups, self.state = [{"params": list(model.parameters()), "lr": 0.1}], {}

    def step(self, *_, **__) -> None:
        wanted = self.wanted[len(self.apart)] if len(self.apart) < len(self.wanted) else []
        pairs = zip(self.model.parameters(), wanted, strict=False)
        self.apart.append(
            max((float((p.grad - w).abs().max() / w.abs().max()) for p, w in pairs if p.grad is not None), default=1.0)
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None


def epoch_on_a_gpu(dtype: str, accumulation: int, count: int) -> dict:
    """Task 5.7: an epoch by hand on a GPU, which is pretended, alone: under which autocast the model is called, how many batches
    were read by then, and with which gradients a step is taken. The last micro-batch of the first step has fewer rows.
    """
    lab, given = _lab(), batches(11, count, 3, 0)
    if accumulation <= count:
        given[accumulation - 1] = tuple(part[:2] for part in given[accumulation - 1])
    torch.manual_seed(11)
    model = Loud()
    wanted = []
    for at in range(0, count // accumulation * accumulation, accumulation):
        loss = sum(model(images, labels).loss for images, labels in given[at : at + accumulation]) / accumulation
        wanted.append([gradient.clone() for gradient in torch.autograd.grad(loss, list(model.parameters()))])
    model.autocast.clear(), model.ahead.clear()
    model.loader = OneByOne(given)
    seen: dict = {"ended": ""}
    with pretended.lone_group(), pretended.gpu():
        model.to(pretended.GPU)
        wanted = [[gradient.to(pretended.GPU) for gradient in step] for step in wanted]
        optimizer = Held(model, wanted)
        try:
            found = lab.train_epoch_standard(model, model.loader, optimizer, pretended.GPU, accumulation, getattr(torch, dtype))
            seen["losses"] = len(found)
        except RuntimeError as error:
            if isinstance(error, NotImplementedError):
                raise
            seen["ended"] = f"RuntimeError: {error}"
    noted = {name: getattr(model, name) for name in ("autocast", "sync", "reshard")}
    return seen | noted | {"ahead": max(model.ahead, default=0), "apart": optimizer.apart}


def short_epoch(accumulation: int, count: int) -> dict:
    """Task 5.7: what an epoch with an engine returns, and how many batches it has read at each forward pass; nothing else is the
    engine's.
    """
    loader = OneByOne(batches(11, count, 3, 0))

    class Engine:
        training, called, ahead = True, 0, 0

        def gradient_accumulation_steps(self) -> int:
            return accumulation

        def train(self, mode: bool = True):
            return self

        def __call__(self, **_):
            self.called += 1
            self.ahead = max(self.ahead, loader.read - self.called)
            return SimpleNamespace(loss=torch.ones((), requires_grad=True))

        def backward(self, *_, **__) -> None: ...

        def step(self) -> None: ...

    with pretended.lone_group():
        try:
            engine = Engine()
            found = _lab().train_epoch_deepspeed(engine, loader, torch.device("cpu"))
            return {"ended": "", "losses": found, "passes": engine.called, "ahead": engine.ahead}
        except RuntimeError as error:
            if isinstance(error, NotImplementedError):
                raise
            return {"ended": f"RuntimeError: {error}", "passes": engine.called}


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
    if experiment.options.get("unlabelled"):  # a row without a label, before the others
        given[0] = torch.cat([images[:1], given[0][0]]), torch.cat([torch.tensor([-100]), given[0][1]])
    model = small(seed, dropout=0.5)
    model = made_engine(experiment, model) if experiment.deepspeed else model.to(here())
    module = model.module if experiment.deepspeed else model
    watch, loader, outside = Watch(module), Loader(given), []
    model.register_forward_pre_hook(lambda *_: outside.append(1))
    modes, scores, enabled = [], [], []
    for training in (True, False):
        model.train(training)
        if training:
            module.blocks[0].eval()  # a part that is kept from training, as a frozen one
        scores.append(_lab().evaluate(model, loader, here(), CLASSES))
        modes.append(module.training)
        enabled.append(torch.is_grad_enabled())
        torch.set_grad_enabled(True)
    kept = all(
        torch.equal(a.as_subclass(torch.Tensor), b) and torch.equal(c.as_subclass(torch.Tensor), d)
        for (a, c), (b, d) in zip(loader, given, strict=True)
    )
    return {
        "scores": gather(scores),
        "kinds": sorted({type(value).__name__ for value in scores[0].values()}),
        "modes": gather(modes),
        "moved": all(gather(all(watch.moved))),
        "off": not any(watch.parts),
        "enabled": all(enabled),
        "gradients": any(watch.gradients),
        "inference": any(watch.inference),
        "outside": gather(len(outside)),
        "passes": gather(len(watch.moved)),
        "batches": gather(2 * len(given)),
        "kept": kept,
    }


class InBf16(nn.Module):
    """A classifier whose parameters and logits are in bf16."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(PIXELS, CLASSES).to(torch.bfloat16)

    def forward(self, pixel_values, labels=None):
        return ImageClassifierOutput(logits=self.layer(pixel_values.to(torch.bfloat16)))


def evaluate_alone(rows: int, size: int, gpu: bool) -> dict:
    """Task 5.8: the loss over many batches of a model in bf16, alone, on a CPU or on a GPU, which is pretended; and what it should be."""
    lab, (images, labels) = _lab(), labelled(21, rows)
    torch.manual_seed(21)
    model = InBf16()
    with torch.no_grad():
        wanted = functional.cross_entropy(model(images).logits.double(), labels).item()
    given = [(images[at : at + size], labels[at : at + size]) for at in range(0, rows, size)]
    seen: dict = {"wanted": wanted, "ended": ""}
    with pretended.lone_group() as sent, pretended.gpu() if gpu else contextlib.nullcontext() as there:
        device = pretended.GPU if gpu else torch.device("cpu")
        model.to(device)
        try:
            seen["loss"] = lab.evaluate(model, given, device, CLASSES)["loss"]
        except RuntimeError as error:
            if isinstance(error, NotImplementedError):
                raise
            seen["ended"] = f"RuntimeError: {error}"
        finally:
            torch.set_grad_enabled(True)
        seen["sent from the CPU"] = sum(not there.holds(tensor) for tensor in sent) if gpu else 0
    return seen


def nothing_counts() -> int:
    """Task 5.8: how many collectives the exercise calls on a rank all of whose rows only fill up: the others wait in theirs for it."""
    images, labels = torch.zeros(2, PIXELS), torch.tensor([-100, -100])
    with (
        warnings.catch_warnings(action="ignore"),  # torchmetrics warns of a metric that was given nothing
        pretended.lone_group() as sent,
        contextlib.suppress(ArithmeticError, ValueError),
    ):  # what is 0 of 0 rows is nobody's business
        _lab().evaluate(small(0), [(images, labels)], torch.device("cpu"), CLASSES)
    return len(sent)


# --- 5.9 to 5.11: where the exercises are ------------------------------------------------------------------------------


def table(rows: list[list], ranks: int, steps: int, raising: bool = False) -> dict:
    """Task 5.9: the table of collectives that are given as name and bytes, and the ranks of their own group where they have one."""
    found = [Collective(name, size // 4, size, float(at), at + 1.0, *group) for at, (name, size, *group) in enumerate(rows)]
    before = list(found)
    try:
        made = _lab().communication_table(found, ranks, steps)
    except ValueError as error:
        if raising:
            raise
        return {"refused": str(error)}
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

    def empty_cache():
        log.append("empty_cache")

    with (
        clock.in_place_of_time(_lab()),
        mock.patch.object(time, "time", lambda: 5.0 - clock.now),  # somebody sets the machine's clock
        mock.patch.object(torch.cuda, "synchronize", synchronize),
        mock.patch.object(torch.cuda, "empty_cache", empty_cache),
    ):
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
        return SimpleNamespace(ru_maxrss=2_000_000 if who == resource.RUSAGE_SELF else 9_000_000)

    def reset(*_, **__):
        numbers.update(max_memory_allocated=7, max_memory_reserved=8)

    with contextlib.ExitStack() as stack:
        for name in numbers:
            stack.enter_context(mock.patch.object(torch.cuda, name, said(name)))
        for name in ("reset_peak_memory_stats", "reset_max_memory_allocated", "reset_max_memory_cached"):
            if hasattr(torch.cuda, name):
                stack.enter_context(mock.patch.object(torch.cuda, name, reset))
        stack.enter_context(mock.patch.object(torch.cuda, "is_available", lambda: True))
        stack.enter_context(mock.patch.object(resource, "getrusage", usage))
        found, again = (_lab().get_memory_stats(torch.device(device)) for _ in range(2))
    return {"found": found, "again": again, "asked": sorted(set(asked))}


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
    raw = nn.Linear(2, 2)
    model = nn.Sequential(raw) if method == "ddp" else raw  # what wrap_model returns
    made = SimpleNamespace(optimizer=SimpleNamespace(name="the engine's"), module=model)
    train, test = Standing("train", log), Standing("test", log)
    losses = iter(range(100))

    def called(value) -> str:
        if value is made:
            return "the engine"
        return "the model" if value is model else "the model without its wrapper" if value is raw else "another"

    def given(name, args, named) -> dict:
        bound = inspect.signature(originals[name]).bind(*args, **named)
        bound.apply_defaults()
        return dict(bound.arguments)

    def of_all(groups, setting) -> list:
        return sorted({group[setting] for group in groups})

    def trained(name):
        def stand_in(*args, **named):
            arguments = given(name, args, named)
            batches = arguments["loader"]
            seconds = 10.0 if batches is train else 0.5
            clock.now += seconds + (train.sampler.epoch or 0)
            optimizer = arguments.get("optimizer")
            groups = optimizer.param_groups if optimizer is not None else []
            log.append(
                [
                    name,
                    {
                        "loader": "train" if batches is train else list(batches),
                        "model": called(arguments.get("model", arguments.get("engine"))),
                        "optimizer": None
                        if optimizer is None
                        else [type(optimizer).__name__, *of_all(groups, "lr"), *of_all(groups, "weight_decay"), id(optimizer)],
                        "others": [[list(group["betas"]), group["eps"], group["amsgrad"], group["maximize"]] for group in groups],
                        "trains the model": {id(p) for group in groups for p in group["params"]}
                        == set(map(id, model.parameters())),
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
                            "model": called(arguments["model"]),
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
                        key: called(value)
                        if isinstance(value, nn.Module) or value is made
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
        return raw

    def wrapped():
        if method == "fsdp2":  # fully_shard puts other parameters in the place of the model's
            for name in ("weight", "bias"):
                setattr(raw, name, nn.Parameter(getattr(raw, name).detach().clone()))
        return model

    def evaluated():
        clock.now += 100.0
        return {"loss": 0.25, "top1": 0.5, "top5": 0.75}

    stand_ins = {
        "load_vit_model": simple("load_vit_model", loaded),
        "wrap_model": simple("wrap_model", wrapped),
        "initialize_deepspeed_model": simple("initialize_deepspeed_model", lambda: made),
        "train_epoch_standard": trained("train_epoch_standard"),
        "train_epoch_deepspeed": trained("train_epoch_deepspeed"),
        "evaluate": simple("evaluate", evaluated),
        "measure_throughput": calls_a_step("measure_throughput", 321.5),
        "get_memory_stats": simple("get_memory_stats", {"peak_allocated_gb": 1.5, "peak_reserved_gb": 2.5}),
        "held_before_step": calls_a_step("held_before_step", States(parameters=8, gradients=4, optimizer=2, host_optimizer=16)),
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
