# %% [markdown]
# # The memory hierarchy
#
# Lecture for lab 04. Read it, run it, change it. Nothing here is graded.
#
# A GPU's memory is small and fast, the host's is larger and slower, and a disk is larger and slower again. Offload keeps model states where there is room and
# moves them when they are needed. This lecture says what moves, how far, and what that costs.

# %% [markdown]
# ## Where states can lie
#
# | | `offload_optimizer` | `offload_param` |
# | --- | --- | --- |
# | stage 0 | no | no |
# | stages 1 and 2 | "cpu"; DeepSpeed takes "nvme" for "cpu", in silence | ignored, in silence |
# | stage 3 | "cpu" or "nvme" | "cpu" or "nvme" |
#
# (Tried with deepspeed 0.19.8: in stages 1 and 2 a run with "nvme" wrote no file, and its losses were those of a run with "cpu".) The ideas come from three
# papers: ZeRO-Offload (arXiv 2101.06840) moved the optimizer to the host, ZeRO-Infinity (arXiv 2104.07857) everything, down to the disk; SuperOffload
# and ZenFlow since then overlap the host's step with the GPU's work. On a machine without a GPU the last two do not run.
#
# With the optimizer on the host, *Adam itself runs on the host*. So what crosses the link is the gradients on the way down, 2 bytes per parameter in bf16, and the new
# parameters on the way up, 2 bytes again; the 12 bytes of optimizer states never move. With the parameters on the host too, each layer's
# parameters come up for its forward pass and again for its backward pass.
#
# ## How far away is it
#
# Measured with `bench/host.py`, on one H200 and its host:

# %%
from shardlab.show.notebook import reference, table

host = reference("host-1xh200")
rows = [{"from and to": row["what"], "GiB/s": row["gib_per_second"]} for row in host["copies"]]
rows += [
    {"from and to": f"disk, {row['what']}, direct (libaio)", "GiB/s": row["gib_per_second"]}
    for row in host["disk"]
]
nearest = max(row["GiB/s"] for row in rows)
table(
    [
        row | {"times slower than the GPU's memory": nearest / row["GiB/s"]}
        for row in sorted(rows, key=lambda row: -row["GiB/s"])
    ]
)
print(
    host["hardware"]["gpus"][0],
    host["hardware"]["cpu"],
    host["hardware"]["cpu_cores"],
    "cores,",
    host["date"],
)

# %% [markdown]
# The link is 76 times slower than the GPU's own memory, the disk more than a thousand times. (A virtual machine's disk; a server with several NVMe drives reads
# faster. Measure yours.)
#
# **Pinned** memory is locked: the operating system may not move or swap it, so the GPU's copy engine can read it by itself. Pageable memory goes through a small
# pinned buffer first, copied by a CPU core. Here that made the way up 5.6 times slower and the way down 3 times. `pin_memory` is true by default in
# `offload_optimizer` and `offload_param`. Its price: locked memory is gone for everybody else, and `ulimit -l` may forbid it.
#
# ## What moves
#
# For one rank, bf16, Ψ parameters in all, shard $s = Ψ / N$, one micro-batch per step:
#
# | offloaded | device | host |
# | --- | --- | --- |
# | ZeRO-2, nothing | $2Ψ + 2s + 12s$ | – |
# | ZeRO-2, optimizer | $2Ψ$ | $4s + 12s$ |
# | ZeRO-3, optimizer | $2s$ | $2s + 4s + 12s$ |
# | ZeRO-3, both | – | $2s + 2s + 4s + 12s$ |
#
# The $4s$ are fp32 gradients, which the step reads. When micro-batches add up there is more: stage 1 keeps whole gradients on the device until the last of them,
# and stage 2 keeps those of every parameter in its shard on the host, whole, in bf16. That is no estimate: the course's formula has all of it, and on the
# H200 it was right to the byte in each row below. (Parameters on NVMe it does not know.) On disk are the states and the gradients.

# %%
from shardlab.zero import memory_model

gpu = reference("offload-1xh200")
rows = []
for row in gpu["results"]:
    if row["micro_batch"] == 8 and row["method"] != "ZeRO-3 + both on NVMe":
        held, predicted = (
            memory_model.States(**row["held_bytes"]),
            memory_model.States(**row["predicted_bytes"]),
        )
        rows.append(
            {
                "method": row["method"],
                "micro-batches": row["accumulation"],
                "device": held.device,
                "host": held.host,
                "disk": held.disk,
                "predicted = measured": held == predicted,
                "samples/s": row["samples_per_second"],
                "peak GiB": row["peak_gib"],
            }
        )
table(rows, bytes_columns=("device", "host", "disk"))
print(gpu["hardware"]["gpus"][0], gpu["versions"], gpu["date"])

# %% [markdown]
# The peak is mostly something else: activations, and the logits. BLOOM's 250,880 words make 8 × 512 × 250,880 of them, 1.9 GiB in bf16 and 3.8 in fp32.
# With ZeRO-2 it falls by 5.8 to 6.8 GiB where the states fall by 7.3: it is reached in another moment, with DeepSpeed's buffers in it.
#
# ZeRO-3 on one GPU shards nothing and pays for its hooks and small transfers. It keeps up to 10⁹ parameters gathered (`stage3_max_live_parameters`), all of this
# model's, so its peak is no lower with the parameters on the host. With both on the host it was a little faster than with the optimizer alone, here and on two GPUs (67.5
# against 64.5 samples/s); we do not know why.
#
# ## What a step pays
#
# An optimizer step of $k$ micro-batches takes $a k + b$ seconds. With ZeRO-2 and the optimizer on the host:
#
# - $a$ grows by the gradients' way. DeepSpeed brings those added up so far to the GPU, adds the new ones, and sends them down again: 2 + 2 bytes an
#   element, each time. Only for the first micro-batch there are none to bring up.
# - $b$ grows by Adam on the host, 28 bytes per element read and written, and by the new parameters' way up, 2 bytes per element; less the 2 bytes that the first
#   micro-batch does not bring up.
#
# From the rates above, for Ψ = 559,214,592, one GPU:

# %%
psi, gib = 559_214_592, 2**30
rate = {row["what"]: row["gib_per_second"] for row in host["copies"] + host["adam"]}
down, up = 2 * psi / gib / rate["GPU to host, pinned"], 2 * psi / gib / rate["host to GPU, pinned"]
adam = 28 * psi / gib / rate["DeepSpeedCPUAdam"]
print(f"gradients down {down:.3f} s, up {up:.3f} s; Adam {adam:.3f} s; parameters up {up:.3f} s")
print(f"so a should grow by {down + up:.3f} s and b by {adam + up - up:.3f} s")

# %%
import numpy

lines = {}
for micro_batch in (8, 32):
    for method in ("ZeRO-2", "ZeRO-2 + optimizer on CPU"):
        found = [
            row
            for row in gpu["results"]
            if (row["method"], row["micro_batch"]) == (method, micro_batch)
        ]
        k = [row["accumulation"] for row in found]
        lines[micro_batch, method] = numpy.polyfit(
            k, [row["global_batch"] / row["samples_per_second"] for row in found], 1
        )
    (a0, b0), (a, b) = lines[micro_batch, "ZeRO-2"], lines[micro_batch, "ZeRO-2 + optimizer on CPU"]
    print(
        f"measured, micro-batch {micro_batch}: a grew by {a - a0:.3f} s, b by {b - b0:.3f} s; "
        f"the share kept cannot exceed {a0 / a:.2f}"
    )

# %% [markdown]
# The order of magnitude is right, and the rest is what the sum leaves out: waiting, the norm of the gradients on the host, conversions between bf16 and fp32. What follows
# from it:
#
# - **Accumulation** pays for $b$, and only for $b$.
# - **A larger micro-batch** pays for both, since the gradients do not grow with it. At micro-batch 32 and accumulation 4, offload kept 76 % of the samples/s, at the
#   same global batch (78.9 of 104.4 on one H200; 160.7 of 208.2 on two: 77 %).
# - **More ranks** pay, too: each rank has a shard of the states, a link of its own, and cores of its own, if there are enough.
#
# ## Adam on the host
#
# `DeepSpeedCPUAdam` makes one pass over memory with vector instructions, on all cores. DeepSpeed's documentation still says 5 to 7 times faster than torch's. That
# was against torch's loop. Against torch's fused CPU version, measured above on 16 cores:

# %%
table(
    [
        {
            "Adam": row["what"],
            "ms for 100 million elements": 1000 * row["seconds"],
            "GiB/s": row["gib_per_second"],
        }
        for row in host["adam"]
    ]
)

# %% [markdown]
# So the reason to use it is no longer speed alone; ZeRO-Offload asks for it, and its states are the ones that DeepSpeed saves.
#
# ## On disk
#
# With "nvme", master weights and moments are files, and one sub-group at a time comes into memory: read 12 bytes per element, step, write 12 bytes. At 2.9 GiB/s the
# 6.25 GiB of BLOOM-560m take 2.2 s each way. The row above has it: 4.1 samples/s, 32 samples per step, 7.8 s a step. The fp32 gradients go through files, too, 2.08
# GiB; and DeepSpeed's defaults read and write one after the other (`pipeline_read` and `pipeline_write` overlap them). Reads and writes bypass the page
# cache (`O_DIRECT`), in whole blocks. What is below 1 MiB stays in memory.
#
# It is the last resort, and as such it works. BLOOM-3b's shape with 40 GiB of GPU memory:

# %%
large = reference("offload-3b-1xh200")
table(
    [
        {
            "method": row["method"],
            "outcome": row["outcome"],
            "samples/s": row["samples_per_second"] if row["outcome"] == "finished" else None,
            "peak GiB": row.get("peak_gib"),
            "on disk": row.get("disk_bytes"),
        }
        for row in large["results"]
    ],
    bytes_columns=("on disk",),
)

# %% [markdown]
# Parameters on NVMe pass through a pool of buffers (`buffer_count` of `buffer_size` elements). Stage 3 by default keeps up to 10⁹ gathered elements for later use, and
# each such parameter holds its buffer: training ends in `Not enough buffers 0 for swapping 1`. With `stage3_max_live_parameters` and
# `stage3_max_reuse_distance` at 0 it goes through, in bf16; in fp32 deepspeed 0.19.8 ends in an error of dtypes.
#
# ## What fits
#
# Turn the table of "What moves" around. A device of $M$ bytes for states holds $M / 16$ parameters in bf16 without offload on one rank, and $M / 2$ with ZeRO-2 and the
# optimizer on the host. Then the host is the limit: 16 bytes per parameter **for all its ranks together**, whatever their number, and 18 while micro-batches add
# up. 128 GiB of host memory end at 8.6 billion parameters without accumulation and at 7.6 with it, with one GPU or with eight.
#
# ## A checkpoint of states on disk
#
# Does DeepSpeed's own checkpoint bring such states back? Three runs of bloom-tiny on two ranks: six steps without a stop; three steps, saved twice into one
# place; and three more in new processes. (Where libaio is missing, this cell says so.)

# %%
import shutil

from shardlab.zero import toolchain
from shardlab import progress
from shardlab.run.launch import launch
from shardlab.show.notebook import RUNS
from shardlab.run.experiment import Experiment

libaio = toolchain.check_libaio()
if libaio.state == "works":
    place = RUNS / "lecture" / "nvme"
    shutil.rmtree(place, ignore_errors=True)

    def part(name: str, steps: int, **options) -> Experiment:
        swap = place / name
        swap.mkdir(parents=True)
        zero = {
            "stage": 3,
            "sub_group_size": 300_000,
            "offload_optimizer": {"device": "nvme", "nvme_path": str(swap)},
        }
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 1,
            "train_batch_size": 4,
            "gradient_clipping": 1.0,
            "zero_optimization": zero,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        }
        return Experiment(
            name=name,
            program="shardlab.course.lectures:resume_with_deepspeed_alone",
            ranks=2,
            deepspeed=config,
            micro_batch=2,
            steps=steps,
            max_tokens=48,
            train_examples=32,
            evaluate=False,
            save=False,
            options=options | {"checkpoints": str(place / "checkpoints")},
        )

    quiet = progress.Quiet(say=print)
    whole = launch(part("whole", 6), runs=RUNS / "lecture", display=quiet, or_cpu=True)[0].results
    first = launch(part("first", 3, save_at=3), runs=RUNS / "lecture", display=quiet, or_cpu=True)[
        0
    ].results
    second = launch(
        part("second", 6, load=True), runs=RUNS / "lecture", display=quiet, or_cpu=True
    )[0].results
    print("without a stop", whole["losses"])
    print("with a stop   ", first["losses"] + second["losses"])
    print("second save   ", first["second save"])
else:
    print(f"not run: {libaio.detail} → {libaio.remedy}")

# %% [markdown]
# The losses part ways after the stop, and nothing says why. In the new processes Adam has no moments before its first step, so nobody reads their files: it starts
# at step 0 with zeros. The sub-groups below 1 MiB, which are not on disk, keep the weights of a new model. And had these processes made another engine before,
# the file names would not match, and the large sub-groups would be lost, too. The second save is DeepSpeed issue 7549.
#
# In lab 04 you write a pair of functions that do not lose anything. Until DeepSpeed does the same: save what you cannot lose with
# `stage3_gather_16bit_weights_on_model_save`, which writes whole weights, and test your resume before you need it. A test is short: train 6 steps; train 3, stop, and
# train 3; compare.
#
# ## Myths
#
# - *Offload slows training down by a factor of x.* It adds seconds to each step and to each micro-batch. The factor is what you make of them: 0.34 at micro-batch 8
#   without accumulation, 0.76 at 32 with 4, on the same card.
# - *NVMe offload works with every stage.* It needs stage 3.
# - *More GPUs, larger models, also with offload.* Not on one machine, once the host is the limit.
