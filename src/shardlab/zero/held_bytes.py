"""The bytes of parameters, gradients and optimizer states that a rank holds: counted on a live engine, not estimated."""

from __future__ import annotations

from pathlib import Path

from shardlab.zero.memory_model import States


def parameter_groups(optimizer) -> list[list[int]]:
    """Sizes of the parameters by group of a torch optimizer or of the one that `deepspeed.initialize` returned."""
    groups = getattr(optimizer, "bit16_groups", None) or getattr(optimizer, "fp16_groups", None)
    groups = groups or getattr(optimizer, "bf16_groups", None) or [group["params"] for group in optimizer.param_groups]
    return [[getattr(p, "ds_numel", p.numel()) for p in group if p.requires_grad] for group in groups]


# --- what a live engine holds ---------------------------------------------------------------------------------------


def _tensors(value):
    """All tensors inside nested lists, tuples and dictionaries."""
    import torch

    if torch.is_tensor(value):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)


def held_bytes(model, optimizer, *, host_is_device: bool | None = None) -> States:
    """Bytes of model states that this rank holds now, each storage counted once.

    Gradients are there only between `backward` and the optimizer step. They are counted as the optimizer sees them: a
    gradient of which this rank needs one part counts as that part, although DeepSpeed may keep its tensor whole.

    Args:
        model: the module that is trained (not the wrapper around it).
        optimizer: torch's optimizer, or the one that `deepspeed.initialize` returned.
        host_is_device: count host memory as the device's. By default so when training runs on the CPU; states that
            DeepSpeed was told to offload count as the host's all the same.
    """
    import torch
    from torch.distributed.tensor import DTensor

    seen: set[int] = set()
    inner = getattr(optimizer, "optimizer", optimizer)
    on_cpu = not torch.cuda.is_available() if host_is_device is None else host_is_device
    offloads_optimizer = bool(getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False))
    offloads_parameters = bool(getattr(optimizer, "offload_param", False))

    def count(tensors, offloaded: bool, parts: bool = False) -> tuple[int, int]:
        device = host = 0
        for tensor in tensors:
            if isinstance(tensor, DTensor):  # FSDP2's: of the whole, this rank holds its own part
                tensor = tensor.to_local()
            storage = tensor.untyped_storage()
            key = tensor.data_ptr() if parts else storage.data_ptr()
            if storage.nbytes() == 0 or key in seen:
                continue
            seen.add(key)
            bytes_ = tensor.nbytes if parts else storage.nbytes()
            if tensor.device.type == "cpu" and (offloaded or not on_cpu):
                host += bytes_
            else:
                device += bytes_
        return device, host

    trained = list(model.parameters())
    flat = [*getattr(optimizer, "bit16_groups_flat", []), *getattr(optimizer, "fp16_partitioned_groups_flat", [])]
    shards = [p.ds_tensor for p in trained if getattr(p, "ds_tensor", None) is not None]
    if flat or shards:
        # A ZeRO-3 parameter that is gathered at this moment is a transient copy, not a state.
        whole = [p.data for p in trained if not hasattr(p, "ds_tensor")]
        parameters = count([t for t in [*flat, *shards, *whole] if t is not None], offloads_parameters)
    else:
        parameters = count([p.data for p in trained], False)

    # DeepSpeed's inner optimizer steps the fp32 master weights; torch's steps the parameters, which are counted by now.
    # Stage 3 hands its inner optimizer one sub-group at a time, and keeps them all in this list.
    masters = [
        *getattr(optimizer, "fp32_partitioned_groups_flat", []),
        *(t for group in inner.param_groups for t in group["params"]),
    ]
    moments = [t for t in _tensors(dict(inner.state)) if t.dim() > 0]
    optimizer_states = count([*masters, *moments], offloads_optimizer)

    own = [g for p in trained for g in (p.grad, getattr(p, "grad_accum", None)) if g is not None]
    for_the_step = [t.grad for t in masters]
    for_the_step += _tensors(getattr(optimizer, "averaged_gradients", {}))
    for_the_step += _tensors(getattr(optimizer, "accumulated_grads_in_cpu", {}))
    for_the_step = [g for g in [*for_the_step, getattr(optimizer, "grad_partitions_flat_buffer", None)] if g is not None]
    # A parameter's own gradient lies where the parameter does; those that the step reads, where the optimizer's states do.
    counts = count(own, offloads_parameters, parts=True), count(for_the_step, offloads_optimizer, parts=True)
    gradient_bytes = [sum(pair) for pair in zip(*counts, strict=True)]
    on_device, on_host = zip(parameters, gradient_bytes, optimizer_states, strict=True)
    return States(*on_device, *on_host, *_swapped_out(optimizer))


def held_before_step(model, optimizer, take_step) -> States:
    """Bytes of model states that this rank holds just before an optimizer step, where gradients exist.

    Args:
        model: what is trained; the module within where it is DDP's or a DeepSpeed engine.
        optimizer: torch's, or the engine's.
        take_step: called without arguments; takes at least one step with that optimizer.
    """
    found, step = [], optimizer.step

    def count_first(*args, **kwargs):
        found.append(held_bytes(getattr(model, "module", model), optimizer))
        return step(*args, **kwargs)

    optimizer.step = count_first
    try:
        take_step()
    finally:
        del optimizer.step  # it was the instance's; the class has its own
    return found[0]


def _swapped_out(optimizer) -> tuple[int, int]:
    """Bytes of gradients and of optimizer states in this rank's files of NVMe offload."""
    swapper = getattr(optimizer, "optimizer_swapper", None)
    sizes = {True: 0, False: 0}
    for path in Path(swapper.swap_folder).iterdir() if swapper else []:
        sizes["_gradient_" in path.name] += path.stat().st_size
    return sizes[True], sizes[False]
