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
    raise NotImplementedError("Task 2.1: complete create_deepspeed_config() in src/exercises/lab02_zero_stages.py")


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
    raise NotImplementedError("Task 2.2: complete check_deepspeed_config() in src/exercises/lab02_zero_stages.py")


# --- Task 2.3 -------------------------------------------------------------------------------------------------------


def save_config(config: dict, path: str | Path) -> None:
    """Write a configuration as a JSON file that a person can open and edit: indented by two, and a newline at the end."""
    raise NotImplementedError("Task 2.3: complete save_config() in src/exercises/lab02_zero_stages.py")


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
    raise NotImplementedError("Task 2.3: complete load_config() in src/exercises/lab02_zero_stages.py")


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
    raise NotImplementedError("Task 2.4: complete with_deepspeed() in src/exercises/lab02_zero_stages.py")


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
    raise NotImplementedError("Task 2.5: complete shard_elements() in src/exercises/lab02_zero_stages.py")


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
    raise NotImplementedError("Task 2.6: complete state_bytes() in src/exercises/lab02_zero_stages.py")


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
    raise NotImplementedError("Task 2.7: complete comparison_row() in src/exercises/lab02_zero_stages.py")


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
    raise NotImplementedError("Task 2.8: complete choose_stage() in src/exercises/lab02_zero_stages.py")
