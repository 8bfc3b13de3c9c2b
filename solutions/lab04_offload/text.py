# %% [markdown]
# # Lab 04: offload
#
# **What you will have built:** a configuration that puts optimizer states and parameters on the host or on disk; a formula for the bytes that are then where,
# checked against real ranks and real files; the sum that says what offload costs and what pays for it; and a checkpoint of states that lie on disk, which
# DeepSpeed itself does not bring back.
#
# **Time:** about 75 minutes. **Before it:** labs 02 and 03, and the lecture `notebooks/04_offload.ipynb`.
#
# | task | what you write | difficulty (1–5) |
# | --- | --- | --- |
# | 4.1 | `create_offload_config` | 3 |
# | 4.2 | `offload_bytes` | 3 |
# | 4.3 | `swapped_bytes`, `bytes_found` | 2 |
# | 4.4 | `compare_optimizers` | 2 |
# | 4.5 | `fit_step_time`, `share_kept`, `accumulation_for` | 3 |
# | 4.6 | `largest_model` | 2 |
# | 4.7 | `save_offloaded` | 3 |
# | 4.8 | `load_offloaded` | 3 |
#
# You write in `src/exercises/lab04_offload.py`. Tasks 4.3, 4.7 and 4.8 need libaio. Where it is missing their checks say *not run*, with the package to install.
# The first time, DeepSpeed's ops are compiled: `cpu_adam`, and for the disk `pin_memory` and `async_io`, 2 min 26 s on two idle
# cores, and 6 minutes on busy ones (measured).
# `shardlab doctor --build-ops` does it beforehand.

# %%
from shardlab.show.notebook import RUNS, check, compare, reference, scoreboard, show, start, table

lab = start("lab04_offload")

# %% [markdown]
# ## 4.1 Where the states are
#
# Two entries of `zero_optimization` say it: `offload_optimizer` (stages 1 to 3) and `offload_param` (stage 3). Each has a `device`, "cpu" or "nvme". What makes
# this a task is what DeepSpeed lets through without a word:
#
# - `offload_param` below stage 3 is ignored.
# - "nvme" below stage 3 is taken for "cpu". No file is ever written.
# - A disk that is too full ends the run when it is full, which may be after an hour.
#
# Complete `create_offload_config` and `check_nvme_path`.

# %%
print(lab.create_offload_config(2, optimizer_offload=True))
try:
    lab.create_offload_config(2, optimizer_offload=True, offload_device="nvme", nvme_path="/tmp")
except ValueError as error:
    print(error)

# %%
check("4.1")

# %% [markdown]
# ## 4.2 What moves
#
# By hand, for one rank, ZeRO-2 in bf16, Ψ parameters, shard of $s = Ψ / N$ elements, one micro-batch per step:
#
# | | no offload | optimizer on the host |
# | --- | --- | --- |
# | parameters | $2Ψ$ on the device | $2Ψ$ on the device |
# | gradients | $2s$ on the device | $4s$ on the host: the step reads fp32 |
# | optimizer | $12s$ on the device | $12s$ on the host |
#
# The host needs more than the device saves: $16s$ for $14s$. That is the price of letting the host take the step.
#
# $s$ is rounded up, as in lab 02: 98 parameters on 2 ranks are laid out as 100, so $s$ is 50, and the device holds 2 × 100 bytes of parameters.
#
# Complete `offload_bytes(stage, states, shard, precision, …)`. `states` and `shard` are what your lab 02 says without offload.

# %%
states = {"parameters": 200, "gradients": 100, "optimizer": 600}  # 98 parameters on 2 ranks
print(lab.offload_bytes(2, states, 50, "bf16", optimizer_offload=True))  # device 200, host 800

# %%
check("4.2")

# %% [markdown]
# ## 4.3 What is on disk
#
# With "nvme", master weights and moments lie in files, and a sub-group at a time comes into memory for its step. (A sub-group is a part of the optimizer's
# parameters, of `sub_group_size` elements or a little more; by default 10⁹.) Two details decide how many bytes that are. A tensor below 1 MiB stays in memory.
# And a direct read or write, past the page cache, moves whole blocks, so sizes are rounded up to 1,024 bytes.
#
# By hand: two sub-groups of 262,144 and 300,001 elements, one rank. The first has exactly 1 MiB, so it is written: 3 × 1,048,576 bytes. The second has
# 1,200,004 bytes a tensor, rounded up to 1,172 blocks: 3 × 1,200,128.
#
# Complete `swapped_bytes(groups, ranks)` and `bytes_found(nvme_path, rank)`.

# %%
print(f"{lab.swapped_bytes([[262_144], [300_001]], 1):,}")  # 6,746,112

# %%
check("4.3")

# %% [markdown]
# ## Predict
#
# You will train bloom-tiny (2,866,560 parameters, fp32, two ranks, one micro-batch per step) in five ways. Write down what rank 0 will hold, in bytes, on the
# device and on the host. Which of the five will be the slowest, and which the fastest?

# %%
predicted = {
    "ZeRO-2": {"device": ..., "host": ...},
    "ZeRO-2, optimizer on the CPU": {"device": ..., "host": ...},
    "ZeRO-3, optimizer on the CPU": {"device": ..., "host": ...},
    "ZeRO-3, both on the CPU": {"device": ..., "host": ...},
    "ZeRO-3, optimizer on NVMe": {"device": ..., "host": ...},
}

# %% [markdown]
# ## Run

# %%
import shutil

from shardlab.zero import toolchain
from shardlab.run.launch import launch
from shardlab.run.experiment import Experiment

disk = RUNS / "lab04-nvme"
shutil.rmtree(disk, ignore_errors=True)
disk.mkdir(parents=True)
ways = {
    "ZeRO-2": lab.create_offload_config(2),
    "ZeRO-2, optimizer on the CPU": lab.create_offload_config(2, optimizer_offload=True),
    "ZeRO-3, optimizer on the CPU": lab.create_offload_config(3, optimizer_offload=True),
    "ZeRO-3, both on the CPU": lab.create_offload_config(
        3, optimizer_offload=True, param_offload=True
    ),
}
libaio = toolchain.check_libaio()
if libaio.state == "works":
    ways["ZeRO-3, optimizer on NVMe"] = lab.create_offload_config(
        3,
        optimizer_offload=True,
        offload_device="nvme",
        nvme_path=disk,
        bytes_on_disk=2 * lab.swapped_bytes([[2_866_560]], 2) * 4 // 3,
    )  # two ranks; large parameters' fp32 gradients go there, too: 16 for 12 bytes
else:
    print(f"NVMe is not run: {libaio.detail} → {libaio.remedy}")


def experiment(name: str, method: str, accumulation: int = 1) -> Experiment:
    batch = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": 1.0,
    }
    adam = {
        "type": "AdamW",
        "params": {"lr": "auto"} | ({} if "on" in method.split() else {"torch_adam": True}),
    }
    return Experiment(
        name=f"lab04-{name}",
        method=method,
        program="shardlab.run.training:train_text",
        ranks=2,
        micro_batch=2,
        accumulation=accumulation,
        steps=8,
        max_tokens=64,
        learning_rate=1e-3,
        evaluate=False,
        save=False,
        deepspeed=batch | {"optimizer": adam} | ways[method],
    )


runs = launch(
    [experiment(f"way{number}", method) for number, method in enumerate(ways)],
    runs=RUNS,
    or_cpu=True,
)

# %% [markdown]
# ## Compare

# %%
from shardlab import switch
from shardlab.show import report

# Yours. If you got lab 04 by itself, put your file of lab 02 into src/exercises first.
zero_stages = switch.import_exercise("lab02_zero_stages")


def states_with_offload(stage: int, groups: list, ranks: int, precision: str, **offload) -> dict:
    states = zero_stages.state_bytes(stage, groups, ranks, precision)
    shard = zero_stages.shard_elements(stage, groups, ranks)
    return lab.offload_bytes(stage, states, shard, precision, **offload)


for side in ("device", "host"):
    measured = {run.experiment.method: getattr(report.measured_states(run), side) for run in runs}
    formula = {}
    for run in runs:
        zero = run.experiment.deepspeed["zero_optimization"]
        if "NVMe" not in run.experiment.method:
            formula[run.experiment.method] = states_with_offload(
                zero["stage"],
                run.states()["groups"],
                2,
                "fp32",
                optimizer_offload="offload_optimizer" in zero,
                param_offload="offload_param" in zero,
            )[side]
    print(f"on the {side}:")
    compare(
        measured,
        {method: bytes_[side] for method, bytes_ in predicted.items()},
        formula,
        unit="bytes",
        reference_name="your formula",
    )

# %%
rows = []
for run in runs:
    held = report.measured_states(run)
    rows.append(
        {
            "method": run.experiment.method,
            "device": held.device,
            "host": held.host,
            "on disk": held.disk,
            "samples/s": run.samples_per_second(),
            "last loss": run.losses()[-1],
        }
    )
table(rows, bytes_columns=("device", "host", "on disk"))
if libaio.state == "works":
    print(
        f"in the files of rank 0: {lab.bytes_found(disk, 0):,}; "
        f"your formula: {lab.swapped_bytes(runs[-1].states()['groups'], 2):,}"
    )

# %% [markdown]
# The losses agree to the rounding of fp32: offload moves bytes. (It also changes the Adam: offloaded, it is DeepSpeed's, else torch's. The two round
# differently.) On a machine without a GPU, "device" and "host" are the same memory, so nothing crosses a link, and samples/s say little: run the cell twice, and
# ZeRO-2 with and without offload may change places. (This table has the median step; the line above it ended with the last one.) On GPUs the link is what
# counts. Measured with this course's code on one H200 and on two, BLOOM-560m's shape, bf16, sequences of 512, 4 micro-batches of 8 a step. "On disk" has the gradients
# too there, and with both on NVMe the parameters:

# %%
for name in ("offload-1xh200", "offload-2xh200"):
    gpu = reference(name)
    table(
        [
            {
                "GPUs": row["ranks"],
                "method": row["method"],
                "device": row["held_bytes"]["parameters"]
                + row["held_bytes"]["gradients"]
                + row["held_bytes"]["optimizer"],
                "host": sum(
                    row["held_bytes"][f"host_{kind}"]
                    for kind in ("parameters", "gradients", "optimizer")
                ),
                "on disk": row.get("disk_bytes"),
                "samples/s": row["samples_per_second"],
                "peak GiB": row["peak_gib"],
            }
            for row in gpu["results"]
            if (row["micro_batch"], row["accumulation"]) == (8, 4)
        ],
        bytes_columns=("device", "host", "on disk"),
    )
print(gpu["hardware"]["gpus"][0], gpu["versions"], gpu["date"])

# %% [markdown]
# ## 4.4 Adam on the host
#
# With the optimizer offloaded, Adam runs on CPU cores. DeepSpeed brings its own for that, `DeepSpeedCPUAdam`: one pass over memory, vectorised, on all
# cores. Is it the same Adam, and is it faster than torch's? Both questions need the same care: equal starting points, equal gradients, and a first step that
# does not count.
#
# Complete `compare_optimizers(make_first, make_second, elements, steps)`.

# %%
check("4.4")

# %%
import torch

from shardlab.zero import ops

ops.build("cpu_adam")
from deepspeed.ops.adam import DeepSpeedCPUAdam

settings = {"lr": 1e-3, "weight_decay": 0.01}
rows = []
for name, options in (
    ("a loop over tensors", {"foreach": False}),
    ("foreach", {"foreach": True}),
    ("fused", {"fused": True}),
):
    came = lab.compare_optimizers(
        lambda p: DeepSpeedCPUAdam(p, **settings),
        lambda p: torch.optim.AdamW(p, **settings, **options),
        10_000_000,
        6,
    )
    rows.append(
        {
            "torch's AdamW": name,
            "largest difference": came["largest_difference"],
            "DeepSpeedCPUAdam ms": 1000 * came["first_seconds"],
            "torch ms": 1000 * came["second_seconds"],
            "torch / DeepSpeed": came["second_seconds"] / came["first_seconds"],
        }
    )
table(rows)

# %% [markdown]
# The same trajectory, to the rounding of fp32. Against torch's loop, the default on a CPU, DeepSpeed's Adam is several times faster; against `fused=True`,
# which torch has on CPUs too by now, there is little between them. On the host of an H200 (16 cores, 100 million elements) it was:

# %%
host = reference("host-1xh200")
table(
    [
        {"Adam": row["what"], "ms per step": 1000 * row["seconds"], "GiB/s": row["gib_per_second"]}
        for row in host["adam"]
    ]
)
print(host["hardware"]["cpu"], host["hardware"]["cpu_cores"], "cores,", host["versions"]["torch"])

# %% [markdown]
# ## 4.5 What pays for it
#
# An optimizer step of $k$ micro-batches takes $t(k) = a \cdot k + b$ seconds: $a$ for each micro-batch, and $b$ once. Offload raises both. $b$ grows by Adam
# on the host and the parameters' way back; accumulation pays for that, since it comes once for $k$ micro-batches. $a$ grows too, because in stage 2 the
# gradients added up so far go to the GPU and back with every micro-batch; only a longer micro-batch pays for that. So at the same global batch the share
# of the samples/s that is kept is
#
# $$\frac{a_0 k + b_0}{a k + b} \to \frac{a_0}{a} \quad (k \to \infty).$$
#
# Complete `fit_step_time`, `share_kept` and `accumulation_for`.

# %%
check("4.5")

# %% [markdown]
# Now with the figures of one H200. Fit both lines for micro-batches of 8 and of 32, and ask which accumulation keeps 60 %:

# %%
gpu, rows = reference("offload-1xh200"), []
for micro_batch in (8, 32):
    lines = []
    for method in ("ZeRO-2", "ZeRO-2 + optimizer on CPU"):
        found = [
            row
            for row in gpu["results"]
            if (row["method"], row["micro_batch"]) == (method, micro_batch)
        ]
        lines.append(
            lab.fit_step_time(
                [row["accumulation"] for row in found],
                [row["global_batch"] / row["samples_per_second"] for row in found],
            )
        )
    plain, offloaded = lines
    rows.append(
        {
            "micro-batch": micro_batch,
            "a without (s)": plain[0],
            "a with": offloaded[0],
            "b without (s)": plain[1],
            "b with": offloaded[1],
            "kept at 1": lab.share_kept(1, *lines),
            "kept at 4": lab.share_kept(4, *lines),
            "limit": plain[0] / offloaded[0],
            "accumulation for 60 %": lab.accumulation_for(0.6, *lines),
        }
    )
table(rows)
for row in gpu["results"]:
    if row["micro_batch"] == 32:
        print(
            f"measured: {row['method']:<26} micro-batch 32, accumulation {row['accumulation']}: "
            f"{row['samples_per_second']:.1f} samples/s"
        )

# %% [markdown]
# Measured at micro-batch 32 and accumulation 4, offload keeps 76 % of the samples/s, at the same global batch, and frees 7.3 GiB of model states.
# At micro-batch 8 even the limit is only just above 60 %.
#
# Where do the seconds go? The gradients in bf16 are 2 × 559,214,592 bytes, 1.04 GiB. On a link of 51.7 GiB/s (measured, pinned) they take 0.02 s each way, 0.04 s
# to the GPU and back: most of what $a$ grew by. A step of Adam reads and writes 28 bytes per element, 14.6 GiB; at 147 GiB/s that is 0.10 s, half of what
# $b$ grew by. **Pinned memory** is what makes the link that fast. From pageable memory the same copies ran at
# 9 GiB/s to the GPU, and the same training at 21 instead of 40 samples/s (the rows of the table above).
#
# ## 4.6 What fits
#
# Turn the formula around: how many parameters fit? The device is each rank's own; the host is shared by all ranks of a machine, and that is what people forget.
#
# Complete `largest_model(bytes_of, ranks=…, device_bytes=…, host_bytes=…)`.

# %%
check("4.6")

# %%
GIB = 2**30


def states_of(stage, ranks, **offload):
    return lambda number: states_with_offload(stage, [[number]], ranks, "bf16", **offload)


methods = {
    "ZeRO-2": (2, {}),
    "ZeRO-3": (3, {}),
    "ZeRO-2, optimizer on the CPU": (2, {"optimizer_offload": True}),
    "ZeRO-3, optimizer on the CPU": (3, {"optimizer_offload": True}),
    "ZeRO-3, both on the CPU": (3, {"optimizer_offload": True, "param_offload": True}),
}


def billions(stage: int, offload: dict, ranks: int, host_gib: int) -> str:
    largest = lab.largest_model(
        states_of(stage, ranks, **offload),
        ranks=ranks,
        device_bytes=40 * GIB,
        host_bytes=host_gib * GIB,
    )
    return f"{largest / 1e9:.2f} billion"


table(
    [
        {"method": method}
        | {
            f"{ranks} × 40 GiB, host {host_gib} GiB": billions(stage, offload, ranks, host_gib)
            for ranks, host_gib in ((1, 128), (4, 128), (4, 512))
        }
        for method, (stage, offload) in methods.items()
    ]
)

# %% [markdown]
# Read the middle column: four devices do not help offload when the host stays the same. And these are model states alone; activations come on top. Tried on
# one H200 of which torch was given 40 GiB, with BLOOM-3b's shape (3.0 billion parameters, sequences of 512, 16 micro-batches of 4):

# %%
large = reference("offload-3b-1xh200")
table(
    [
        {
            "method": row["method"],
            "outcome": row["outcome"],
            "samples/s": row["samples_per_second"] if row["outcome"] == "finished" else None,
            "peak GiB": row.get("peak_gib"),
            "on disk GiB": row["disk_bytes"] / GIB if "disk_bytes" in row else None,
            "reason": (row.get("reason") or "").split(". ")[0][:90],
        }
        for row in large["results"]
        if row["model"].endswith("3b")
    ]
)

# %% [markdown]
# ## 4.7 A checkpoint of states on disk
#
# The optimizer states are in files already. So a checkpoint could be a copy of the files, and that is what deepspeed 0.19.8 does. It goes wrong in four ways:
#
# 1. A second save into the same place ends in `FileExistsError`: its `copytree` wants a folder that is not there (DeepSpeed issue 7549). `Trainer` saves twice
#    into one place under ZeRO-3, if `stage3_gather_16bit_weights_on_model_save` is false.
# 2. The files are named after a counter of the process. A process that has made another engine before counts on: then the copied files lie next to those in
#    use, and nobody reads them. The training begins anew, and says nothing.
# 3. In a new process, Adam has no state before its first step, so nobody asks for the files of the moments. It begins with zeros, at step 0.
# 4. Sub-groups too small for the disk are in memory. DeepSpeed writes them into its checkpoint, but with NVMe it does not load that part.
#
# The way out: let the engine save and load what it can (`without_its_nvme_part`), and carry the swapped tensors yourself, a sub-group at a time
# (`swapped_groups`). Then memory need hold one sub-group only; a smaller `sub_group_size` than the default of 10⁹ elements, 12 GB of states, makes that little. Both are in `src/shardlab/zero/nvme.py`; read it, it is short.
#
# Complete `save_offloaded(engine, path, tag, client_state)`.

# %%
check("4.7")

# %% [markdown]
# ## 4.8 And back
#
# Complete `load_offloaded(engine, path, tag)`. The check goes on from a checkpoint in new processes, whose model was drawn with another seed. The losses must be
# those of the run that never stopped.
#
# One more trap is in here. Stage 3 keeps small parameters gathered on every rank (`stage3_param_persistence_threshold`). Change their master weights, and the
# gathered copies are still the old ones. `parameters_renewed` gathers them anew.

# %%
check("4.8")

# %% [markdown]
# ## Your points
#
# All tasks of the lab at once, with the points that `pytest labs` gives, and what to do next.

# %%
scoreboard("lab04_offload")

# %% [markdown]
# ## Questions
#
# 1. ZeRO-2 on one GPU saves nothing. ZeRO-2 with optimizer offload on one GPU does. What is the difference?
# 2. Offload frees 7 GiB, and you use them for a larger micro-batch. What must be true for the samples/s to be higher than without offload? Was it, on the H200?
# 3. A colleague reports that NVMe offload in stage 2 is "surprisingly fast". What do you ask?
# 4. A host has 128 GiB and four GPUs. With ZeRO-2 and optimizer offload, how many bytes per parameter does the host need with one rank, and with four?
#
# <details><summary>Answers</summary>
#
# 1. Sharding divides by the number of ranks, and that is one. Offload moves to another memory, whatever the number.
# 2. The larger micro-batch must gain more than offload costs. Micro-batch 32 with offload made 78.9 samples/s, micro-batch 8 without it 84.1, both with
#    accumulation 4: not quite. Where the model does not fit without offload, there is nothing to compare with.
# 3. Whether there are any files. Below stage 3 DeepSpeed takes "nvme" for "cpu".
# 4. 16 both times (and 2 more while micro-batches add up): the shards of all ranks together are the whole.
# </details>
#
# ## Going further
#
# - Set `sub_group_size` to 300,000 and run the NVMe way again. Which sub-groups have no files?
# - Put `"aio": {"queue_depth": 32, "intra_op_parallelism": 4}` into the NVMe way. Does your formula of 4.3 still hold? (Look for `aligned_bytes` in DeepSpeed's
#   `runtime/swap_tensor/optimizer_utils.py`.)
# - On a GPU: run `python bench/host.py --out mine.json` and work out $a$ and $b$ for your own machine before you measure them.
