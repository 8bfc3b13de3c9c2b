"""A GPU and a process group that are not there, for exercises that a milestone observes on a machine without either.

On a CPU alone a tensor that was left behind is never missed: everything is in the same place anyway.
"""

from __future__ import annotations

import contextlib
import os
from unittest import mock

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from shardlab import switch

GPU = torch.device("cuda", 0)

ACROSS = {"to", "cpu", "cuda", "copy_", "type_as", "__set__", "__getitem__", "__setitem__", "index_put", "index_put_",
          "_has_compatible_shallow_copy_type"}  # fmt: skip
"""Functions that take tensors of two devices."""


class PretendedGPU(TorchFunctionMode):
    """Within it, what is moved to a GPU or made there stays on the CPU, says that it is on `cuda:0`, and is refused together with
    what is not, as torch does. What is moved before is not known to be there.
    """

    def __init__(self, alone: bool = False):
        super().__init__()
        self._alone = alone
        self._there = WeakTensorKeyDictionary()

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor in self._there

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        if function == torch.Tensor.device.__get__ and self.holds(args[0]):
            return GPU
        if function == torch.Tensor.is_cuda.__get__:
            return self.holds(args[0])
        if name in ("cuda", "cpu"):
            function, args, kwargs, name = torch.Tensor.to, (args[0], name), {}, "to"
        wanted, args, kwargs = self._destination(name, args, kwargs)
        given = _tensors((args, kwargs))
        there = any(map(self.holds, given))
        if there and name not in ACROSS and any(tensor.dim() and not self.holds(tensor) for tensor in given):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (in {name})"
            )
        result = function(*args, **kwargs)
        if name == "__set__":  # of .data or .grad
            self._mark(args[0], self.holds(args[1]) if isinstance(args[1], torch.Tensor) else self.holds(args[0]))
            return result
        if name in ("copy_", "__setitem__", "index_put_"):
            return result
        on_gpu = there if wanted is None else wanted
        if wanted is not None and isinstance(result, torch.Tensor) and any(result is tensor for tensor in given):
            result = result if self.holds(result) == on_gpu else result.clone()
        for tensor in _tensors(result):
            self._mark(tensor, on_gpu)
        return result

    def _mark(self, tensor: torch.Tensor, on_gpu: bool) -> None:
        if on_gpu:
            self._there[tensor] = True
        else:
            self._there.pop(tensor, None)

    def _destination(self, name: str, args: tuple, kwargs: dict) -> tuple[bool | None, tuple, dict]:
        """Whether the result is to be on the GPU, None where nothing says so; and the arguments with the CPU in the GPU's place."""
        if name in ("device", "_parse_to"):  # a device is made; Module.to reads its arguments: nothing is moved yet
            return None, args, kwargs
        wanted = None
        if name == "to" and len(args) > 1 and isinstance(args[1], torch.Tensor):
            wanted = self.holds(args[1])

        def instead(value, may_be_number: bool):
            nonlocal wanted
            number = may_be_number and isinstance(value, int) and not isinstance(value, bool)
            if (
                not number
                and not isinstance(value, torch.device)
                and not (isinstance(value, str) and value.startswith(("cuda", "cpu")))
            ):
                return value
            if self._alone and (value if number else torch.device(value).index or 0) != 0:
                raise RuntimeError(f"CUDA error: invalid device ordinal (the one GPU is cuda:0, and this is {value})")
            wanted = number or torch.device(value).type == "cuda"
            return torch.device("cpu")

        args = tuple(instead(value, name == "to" and at == 1) for at, value in enumerate(args))
        kwargs = {key: instead(value, key == "device") if key in ("device", "other") else value for key, value in kwargs.items()}
        return wanted, args, kwargs


def _tensors(value) -> list[torch.Tensor]:
    """All tensors inside nested lists, tuples and dictionaries."""
    if isinstance(value, torch.Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [found for one in inner for found in _tensors(one)]


@contextlib.contextmanager
def gpu(alone: bool = False):
    """While this lasts, torch says that there is a GPU, what is put there stays on the CPU, and no work is waited for.

    Args:
        alone: whether cuda:0 is the only one, so that any other is refused.
    """
    says = {"is_available": True, "device_count": 1, "current_device": 0, "is_bf16_supported": True, "synchronize": None}
    with contextlib.ExitStack() as stack:
        for name, answer in says.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, answer=answer, **__: answer))
        yield stack.enter_context(PretendedGPU(alone))


@contextlib.contextmanager
def lone_group():
    """While this lasts, this process is rank 0 of a group of one: what it sends itself stays as it is.

    Yields:
        A list, to which each tensor that is given to a collective is added.
    """
    sent: list[torch.Tensor] = []

    def reduced(tensor, *_, **__):
        sent.append(tensor)

    def gathered(tensors, tensor, *_, **__):
        sent.append(tensor)
        tensors[0].copy_(tensor)

    def objects(found, value, *_, **__):
        found[0] = value

    stand_ins = {
        "is_initialized": lambda: True, "get_rank": lambda *_, **__: 0, "get_world_size": lambda *_, **__: 1,
        "barrier": lambda *_, **__: None, "all_reduce": reduced, "reduce": reduced, "broadcast": reduced,
        "all_gather": gathered, "all_gather_into_tensor": lambda out, tensor, *_, **__: gathered([out], tensor),
        "all_gather_object": objects,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch.object(dist, name, stand_in))
        yield sent


def sent_in_a_group(stem: str, function: str, backend: str, *args) -> dict:
    """Call a lab's exercise on rank 5 of 8, on a node with one GPU, where what is sent to the others stays as it is.

    Args:
        stem: the lab's.
        function: the exercise's name.
        backend: of the group, as `dist.get_backend()` gives it.
        args: of the exercise.

    Returns:
        What it `returned`, and where each tensor was that it gave to a collective: `on`, "gpu" or "cpu".
    """
    says = {"get_rank": 5, "get_world_size": 8, "get_backend": backend}
    with contextlib.ExitStack() as stack:
        gpu_, sent = stack.enter_context(gpu(alone=True)), stack.enter_context(lone_group())
        for name, answer in says.items():
            stack.enter_context(mock.patch.object(dist, name, lambda *_, answer=answer, **__: answer))
        stack.enter_context(mock.patch.dict(os.environ, {"RANK": "5", "LOCAL_RANK": "0", "WORLD_SIZE": "8"}))
        returned = getattr(switch.import_exercise(stem), function)(*args)
        return {"returned": returned, "on": ["gpu" if gpu_.holds(tensor) else "cpu" for tensor in sent]}
