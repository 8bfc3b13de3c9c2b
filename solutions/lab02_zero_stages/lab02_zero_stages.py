"""Lab 02, ZeRO stages: configure DeepSpeed, predict what each stage holds, and measure it.

You complete eight functions. The milestones check what they build with DeepSpeed itself, on two real ranks.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import hjson

from shardlab.run.experiment import Experiment
from shardlab.run.run_folder import Run
from shardlab.zero.config_verdict import deepspeed_refuses

TOP_LEVEL_KEYS = frozenset("""
    activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger communication_data_type compile csv_monitor
    data_efficiency data_types dataloader_drop_last datastates_ckpt disable_allgather disable_python_gc dump_state expert_parallel
    flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor
    hybrid_engine log_level managed_gradient_accumulation memory_breakdown optimizer pipeline prescale_gradients scheduler
    seq_parallel_communication_data_type sequence_parallel_size steps_per_print tensor_parallel tensorboard timers
    torch_autocast train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism vocabulary_size
    wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
""".split())
"""What deepspeed 0.19.8 reads at the top of a configuration. It ignores any other key, and does not say so."""


# --- Task 2.1 -------------------------------------------------------------------------------------------------------


def create_deepspeed_config(stage: int, *, micro_batch: int | str = "auto", accumulation: int | str = "auto",
                            world_size: int | str = "auto", precision: str = "auto", optimizer: str | None = None,
                            learning_rate: float | str = "auto", clipping: float | str = 1.0,
                            offload_optimizer: bool = False, offload_param: bool = False) -> dict:
    """A DeepSpeed configuration, as `TrainingArguments(deepspeed=…)` or `deepspeed.initialize(config=…)` takes it.

    Args:
        stage: 0, 1, 2 or 3.
        micro_batch: sequences per rank and forward pass.
        accumulation: forward passes an optimizer step.
        world_size: ranks; it is no key of the configuration, but the global batch depends on it.
        precision: `fp32`, `bf16`, `fp16`, or `auto` to take `Trainer`'s.
        optimizer: `AdamW` to let DeepSpeed make it; None to leave it to `Trainer`. With optimizer offload DeepSpeed makes
            it in any case, since the step then runs on the host, in its `DeepSpeedCPUAdam`.
        learning_rate: of that optimizer.
        clipping: largest gradient norm, or "auto". It is always written: left out, deepspeed 0.19.3 and later clip at 1.0 unasked.
        offload_optimizer: keep the optimizer states on the CPU.
        offload_param: keep the parameters on the CPU; stage 3 only.

    Returns:
        A dictionary with exactly these keys:
        `train_micro_batch_size_per_gpu`, `gradient_accumulation_steps`, and `train_batch_size`, which is their product
        with `world_size`, or "auto" if one of the three is "auto";
        `gradient_clipping`;
        `bf16` and `fp16`: each {"enabled": True or False}, and for precision "auto" each {"enabled": "auto"};
        `zero_optimization`: `stage`; with offload, `offload_optimizer` and `offload_param`, each {"device": "cpu",
        "pin_memory": True}; in stage 3, `stage3_gather_16bit_weights_on_model_save`: True, or saving writes no weights;
        `optimizer`, if DeepSpeed makes it: {"type": "AdamW", "params": {"lr": learning_rate, "weight_decay": "auto"}}, and
        in `params`, without offload, also "torch_adam": True, which spares compiling a fused kernel. With a `learning_rate`
        that is a number there is no `Trainer` to fill in "auto": leave `weight_decay` out.

    Raises:
        ValueError: a stage other than the numbers 0 to 3 (True and "2" are none); an unknown precision; a `micro_batch`,
            `accumulation` or `world_size` that is neither "auto" nor a whole number of at least 1; a negative clipping;
            `offload_param` without stage 3; `offload_optimizer` at stage 0. The sentence names the argument and holds its value;
            of an offload it says which stage it needs.
    """
    # BEGIN SOLUTION 2.1
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ValueError(f"stage {stage!r}: ZeRO has the stages 0, 1, 2 and 3")
    if precision not in ("auto", "fp32", "bf16", "fp16"):
        raise ValueError(f"precision {precision!r}: use fp32, bf16, fp16 or auto")
    sizes = {"micro_batch": micro_batch, "accumulation": accumulation, "world_size": world_size}
    for name, value in sizes.items():
        if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} {value!r}: use a whole number of at least 1, or 'auto'")
    if clipping != "auto" and clipping < 0:
        raise ValueError(f"clipping {clipping!r}: a norm is not negative; 0 turns clipping off")
    if offload_param and stage != 3:
        raise ValueError(f"offload_param needs stage 3, not stage {stage}: only stage 3 shards the parameters")
    if offload_optimizer and stage == 0:
        raise ValueError("offload_optimizer needs stage 1, 2 or 3: stage 0 has no sharded optimizer to move")
    zero = {"stage": stage}
    to_cpu = {"device": "cpu", "pin_memory": True}
    if offload_optimizer:
        zero["offload_optimizer"] = dict(to_cpu)
    if offload_param:
        zero["offload_param"] = dict(to_cpu)
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": "auto" if "auto" in sizes.values() else micro_batch * accumulation * world_size,
        "gradient_clipping": clipping,
        "bf16": {"enabled": "auto" if precision == "auto" else precision == "bf16"},
        "fp16": {"enabled": "auto" if precision == "auto" else precision == "fp16"},
        "zero_optimization": zero,
    }
    if optimizer is not None or offload_optimizer:
        params = {"lr": learning_rate}
        if learning_rate == "auto":
            params["weight_decay"] = "auto"
        if not offload_optimizer:
            params["torch_adam"] = True
        config["optimizer"] = {"type": optimizer or "AdamW", "params": params}
    return config
    # END SOLUTION


# --- Task 2.2 -------------------------------------------------------------------------------------------------------


def check_deepspeed_config(config: dict, *, world_size: int, with_trainer: bool = True) -> None:
    """Refuse a configuration that DeepSpeed would refuse, and the ones that it lets through and should not.

    Args:
        config: the configuration, as JSON gives it. It is not changed.
        world_size: ranks.
        with_trainer: whether `Trainer` fills in "auto". Without it, "auto" in `zero_optimization` quietly becomes a default.

    Raises:
        ValueError: with a sentence that names the key at fault (the key, not only its value), for
            whatever DeepSpeed refuses by itself: `deepspeed_refuses(config, world_size)` gives its reason, or "". Where it trips
            over a text that should be a number, its reason does not name the key: look for those first;
            a top-level key that is not in `TOP_LEVEL_KEYS` (`zero_optimisation` would train at stage 0);
            a `zero_optimization` that is no object (true and false are an old form of it);
            a stage that is no whole number (DeepSpeed takes "3" and true; "auto" is none either, `Trainer` does not fill it in);
            a number or a boolean written as text ("8", "5e8", "true", "FALSE"), however deep, in lists too;
            an enabled `offload_param` below stage 3. An offload that is null, or whose device is "none" or not given, is none;
            an offload to "nvme" below stage 3, which DeepSpeed takes for "cpu" and does not say so;
            an offload to "nvme" without an `nvme_path`, or with an empty one;
            without `Trainer`: the value "auto" anywhere, however deep, in lists too.
    """
    # BEGIN SOLUTION 2.2
    def search(value, path):
        if isinstance(value, str):
            if value == "auto" and not with_trainer:
                raise ValueError(f"{path} is 'auto', which only Trainer fills in; write a value")
            if value.lower() in ("true", "false") or is_number(value):
                raise ValueError(f"{path} is the text {value!r}; write it without quotes")
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, entry in inner:
            search(entry, f"{path}.{key}" if path else str(key))

    def is_number(text):
        try:
            float(text)
        except ValueError:
            return False
        return True

    search(config, "")
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ValueError(f'zero_optimization is {json.dumps(zero)}, and must be an object: {{"stage": …}}')
    if reason := deepspeed_refuses(config, world_size):
        raise ValueError(f"DeepSpeed refuses it: {reason}")
    unknown = sorted(set(config) - TOP_LEVEL_KEYS)
    if unknown:
        raise ValueError(f"'{unknown[0]}' is no key of DeepSpeed's configuration; DeepSpeed would ignore it and not say so")
    stage = zero.get("stage", 0)
    if not isinstance(stage, int) or isinstance(stage, bool):
        raise ValueError(f"zero_optimization.stage is {json.dumps(stage)}; ZeRO has the stages 0, 1, 2 and 3")
    for part in ("offload_optimizer", "offload_param"):
        offload = zero.get(part) or {}
        device = offload.get("device", "none")
        if part == "offload_param" and device != "none" and stage != 3:
            raise ValueError(f"zero_optimization.offload_param needs stage 3, not stage {stage}")
        if device == "nvme" and stage != 3:
            raise ValueError(f"zero_optimization.{part} goes to nvme, which needs stage 3, not stage {stage}")
        if device == "nvme" and not offload.get("nvme_path"):
            raise ValueError(f"zero_optimization.{part} goes to nvme but has no nvme_path")
    # END SOLUTION


# --- Task 2.3 -------------------------------------------------------------------------------------------------------


def save_config(config: dict, path: str | Path) -> None:
    """Write a configuration as a JSON file that a person can open and edit: indented by two, and a newline at the end."""
    # BEGIN SOLUTION 2.3
    Path(path).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    # END SOLUTION


def load_config(path: str | Path) -> dict:
    """Read a configuration that `save_config`, or a person, wrote. A byte-order mark at its beginning, which editors on Windows
    write, is passed over (the encoding "utf-8-sig" does that).

    DeepSpeed reads its file with hjson, which allows comments and commas at the end of a list; `Trainer` reads it with json, which
    does not. Of a key that is given twice json keeps the last, and DeepSpeed refuses the file. `json.loads(…, object_pairs_hook=…)`
    shows every pair.

    Raises:
        ValueError: with a sentence that names the file, for
            a key given twice in one object, in a file with comments too (`hjson.loads` has the same hook); the sentence names the
            key;
            a file that is not JSON in UTF-8 (Python's UnicodeDecodeError is a ValueError, and names no file). Where
            `hjson.loads` reads an object, each key given once, the sentence says "only DeepSpeed reads it", and that `Trainer`
            does not. Where it reads none, the sentence names neither of the two, since neither reads the file;
            JSON that is no object. (A missing file raises FileNotFoundError by itself.)
    """
    # BEGIN SOLUTION 2.3
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8, as JSON is: {error.reason} at byte {error.start}") from None

    def once(pairs):
        keys = [key for key, _ in pairs]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"{path}: '{twice[0]}' is given twice; DeepSpeed refuses that")
        return dict(pairs)

    try:
        config = json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        try:
            lenient = isinstance(hjson.loads(text, object_pairs_hook=once), dict)
        except hjson.HjsonDecodeError:
            lenient = False
        why = "only DeepSpeed reads it, Trainer does not (comments, or a comma too many)" if lenient else error.msg
        raise ValueError(f"{path}, line {error.lineno}: not JSON: {why}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: a DeepSpeed configuration is a JSON object, {{…}}")
    return config
    # END SOLUTION


# --- Task 2.4 -------------------------------------------------------------------------------------------------------


def with_deepspeed(baseline: Experiment, config: dict, method: str) -> Experiment:
    """The same experiment under DeepSpeed: one argument more, and nothing else changed.

    Args:
        baseline: an experiment with the plain `Trainer`. Experiments cannot be changed; `baseline.model_copy(update={…})`
            makes a changed copy.
        config: the DeepSpeed configuration.
        method: the new name in tables, such as "ZeRO-2".

    Returns:
        The baseline with `deepspeed` and `method` set, at any stage and on any number of ranks, and with the method added to
        its `name`, in lower case and without spaces (hyphens in their place, or nothing), after a hyphen, so that it gets a run
        folder of its own: "demo" and "ZeRO-2" make "demo-zero-2".
    """
    # BEGIN SOLUTION 2.4
    name = f"{baseline.name}-{method.lower().replace(' ', '-')}"
    return baseline.model_copy(update={"name": name, "method": method, "deepspeed": config})
    # END SOLUTION


# --- Task 2.5 -------------------------------------------------------------------------------------------------------


def shard_elements(stage: int, groups: list[list[int]], ranks: int) -> int:
    """Elements in one rank's shard, padding included.

    Stages 1 and 2 join each optimizer group into one flat buffer, round it up to a multiple of 2 × ranks, and give each
    rank an equal piece of it. Stage 3 cuts each parameter by itself, rounded up to a multiple of the ranks.
    `Trainer` makes two groups: parameters with weight decay, and those without.

    Args:
        stage: 1, 2 or 3; at 0 nothing is sharded, and the shard is everything.
        groups: the sizes of the parameters, by optimizer group.
        ranks: N.
    """
    # BEGIN SOLUTION 2.5
    if stage == 0:
        return sum(sum(group) for group in groups)
    if stage == 3:
        return sum(math.ceil(size / ranks) for group in groups for size in group)
    return sum(2 * math.ceil(sum(group) / (2 * ranks)) for group in groups)
    # END SOLUTION


# --- Task 2.6 -------------------------------------------------------------------------------------------------------


def state_bytes(stage: int, groups: list[list[int]], ranks: int, precision: str) -> dict[str, int]:
    """Bytes of model states that one rank of DeepSpeed holds while gradients are accumulated, with Adam and no offload.

    Per element: parameters and gradients take 2 bytes in bf16 and fp16, and 4 in fp32. The optimizer takes 12: the fp32
    master weight and Adam's two moments. (Stage 0 in fp32 steps the parameters themselves and keeps no master: 8.)
    Stage 1 shards the optimizer states, stage 2 the gradients too, stage 3 the parameters too; what is not sharded is
    held whole. A shard has as many elements as `shard_elements` says of all the groups (task 2.5). In stages 1 and 2 the
    whole buffer of parameters is the padded one: ranks × shard elements. Gradients that are held whole (stages 0 and 1)
    are not padded.

    Args:
        stage: 0 to 3.
        groups: the sizes of the parameters, by optimizer group.
        ranks: N.
        precision: `fp32`, `bf16` or `fp16`.

    Returns:
        {"parameters": …, "gradients": …, "optimizer": …} in bytes.
    """
    # BEGIN SOLUTION 2.6
    width = 4 if precision == "fp32" else 2
    everything = sum(sum(group) for group in groups)
    shard = shard_elements(stage, groups, ranks)
    padded = shard * ranks if stage in (1, 2) else everything
    return {
        "parameters": width * (shard if stage == 3 else padded),
        "gradients": width * (shard if stage >= 2 else everything),
        "optimizer": (8 if stage == 0 and precision == "fp32" else 12) * shard,
    }
    # END SOLUTION


# --- Task 2.7 -------------------------------------------------------------------------------------------------------


def comparison_row(run: Run) -> dict:
    """One row of the comparison table, from a run folder.

    Args:
        run: a finished run. `run.losses()`, `run.samples_per_second()` and `run.experiment` say most of it; `run.states()`
            is {"parameters": Ψ, "groups": […], "ranks": [{"parameters": bytes, "gradients": …, "optimizer": …}, …]}. With
            offload a rank has more keys, such as `host_optimizer`: what is not on the device.

    Returns:
        `method` and `ranks` of the experiment; `first_loss`, `last_loss`; `samples_per_second` (over all ranks; None
        where the run has no step after the one that warms up);
        `measured`: parameters + gradients + optimizer bytes of the rank that holds most of these three;
        `predicted`: the sum of your `state_bytes`, with the stage in the experiment's configuration (0 without DeepSpeed, and
        where it names none), and with precision fp32 without DeepSpeed: autocast keeps the parameters in fp32.
    """
    # BEGIN SOLUTION 2.7
    experiment, states = run.experiment, run.states()
    config = experiment.deepspeed
    stage = config.get("zero_optimization", {}).get("stage", 0) if config else 0
    predicted = state_bytes(stage, states["groups"], experiment.ranks, experiment.precision if config else "fp32")
    return {
        "method": experiment.method,
        "ranks": experiment.ranks,
        "first_loss": run.losses()[0],
        "last_loss": run.losses()[-1],
        "samples_per_second": run.samples_per_second(),
        "measured": max(held["parameters"] + held["gradients"] + held["optimizer"] for held in states["ranks"]),
        "predicted": sum(predicted.values()),
    }
    # END SOLUTION


# --- Task 2.8 -------------------------------------------------------------------------------------------------------


def choose_stage(parameters: int, ranks: int, device_bytes: int, other_bytes: int = 0) -> int:
    """The lowest stage whose model states fit on each device, by the ZeRO paper's count for mixed precision.

    Lower stages communicate less, or no more, so one takes the lowest that fits. The paper counts 2Ψ parameters, 2Ψ
    gradients and 12Ψ optimizer states; stage 1 divides the last by the ranks, stage 2 the last two, stage 3 all three.

    Args:
        parameters: Ψ.
        ranks: devices.
        device_bytes: memory of one device.
        other_bytes: what activations, buffers and the CUDA context need on it.

    Returns:
        0, 1, 2 or 3.

    Raises:
        ValueError: not even stage 3 fits. The sentence says how many GiB are missing on each device, with a decimal at
            least, such as "10.3 GiB on each".
    """
    # BEGIN SOLUTION 2.8
    for stage in range(4):
        needed = other_bytes
        for bytes_per_parameter, sharded_from in ((2, 3), (2, 2), (12, 1)):
            needed += bytes_per_parameter * parameters / (ranks if stage >= sharded_from else 1)
        if needed <= device_bytes:
            return stage
    missing = (needed - device_bytes) / 2**30
    raise ValueError(f"stage 3 on {ranks} devices lacks {missing:.1f} GiB on each: add devices, or offload to the CPU")
    # END SOLUTION
