# %% [markdown]
# # Lab 05: every way to use the GPUs of one node
#
# **What you will have built:** one function that trains the same model by eight methods: alone, alone with offload, DDP, FSDP2, ZeRO-1, 2 and 3, and ZeRO++. It
# counts the bytes that each method holds and sends, measures how fast it is, and says which one to take when. It runs on two CPU cores, where the ranks
# talk through gloo, and unchanged on GPUs, where they talk through NCCL.
#
# **Time:** about 90 minutes. **Before it:** labs 02 and 03, and the lecture `notebooks/05_collectives.ipynb`.
#
# | task | what you write | difficulty (1–5) |
# | --- | --- | --- |
# | 5.1 | `setup_distributed`, `cleanup_distributed` | 2 |
# | 5.2 | `create_image_transforms` | 2 |
# | 5.3 | `create_data_loaders` | 3 |
# | 5.4 | `load_vit_model` | 1 |
# | 5.5 | `wrap_model` | 2 |
# | 5.6 | `initialize_deepspeed_model` | 2 |
# | 5.7 | `train_epoch_standard`, `train_epoch_deepspeed` | 4 |
# | 5.8 | `evaluate` | 3 |
# | 5.9 | `bytes_sent`, `communication_table` | 2 |
# | 5.10 | `measure_throughput`, `get_memory_stats` | 2 |
# | 5.11 | `run_training_experiment` | 3 |
#
# You write in `src/exercises/lab05_multi_gpu.py`. The checks of 5.1 and 5.5 to 5.8 start real ranks.

# %%
from shardlab.show.notebook import RUNS, check, compare, reference, scoreboard, show, start, table

lab = start("lab05_multi_gpu")

# %% [markdown]
# ## 5.1 A process group
#
# Ranks that want to talk form a **process group**. A launcher tells each its `RANK`, its `LOCAL_RANK` on this machine and the `WORLD_SIZE`, and
# where they meet. Four things go wrong again and again: the GPU chosen by the rank instead of the local rank (on the second machine there is no GPU 8); no
# current device set, so that NCCL puts all ranks on GPU 0; a script that only works under a launcher; and a rank that just ends, so that its neighbours print
# pages about a lost connection.
#
# Complete `setup_distributed()` and `cleanup_distributed()`.

# %%
device, rank, local_rank, world_size = lab.setup_distributed()
print(f"device {device}, rank {rank} of {world_size}: a notebook is a lone process")
lab.cleanup_distributed()

# %%
check("5.1")

# %% [markdown]
# ## 5.2 Images in, numbers out
#
# The model learns 101 classes, as many as Food-101 has. By default the course draws the images itself: a shape filled with a texture in a pair
# of colours. The two colours of a pair add up to white, so the mean colour of an image says next to nothing about its class.

# %%
import matplotlib.pyplot as plt

from shardlab.data.images import load_images

images = load_images("drawn")
figure, axes = plt.subplots(2, 8, figsize=(9, 2.6))
for number, axis in enumerate(axes.flat):
    image, label = images["train"][number * 13]
    axis.imshow(image)
    axis.set_title(images["train"].classes[label].replace(" ", "\n", 2), fontsize=5)
    axis.axis("off")

# %% [markdown]
# A model takes images of one size, as numbers around 0: scaled to 0…1, less a mean, over a deviation, channel by channel. Which mean and deviation, its
# image processor says. In training, half of the images are mirrored, so that the model sees more than there is.
#
# Complete `create_image_transforms(image_size, mean, std)`.

# %%
training, validation = lab.create_image_transforms(32, [0.5] * 3, [0.5] * 3)
tensor = validation(images["train"][0][0])
print(tensor.dtype, list(tensor.shape), f"from {tensor.min():.2f} to {tensor.max():.2f}")

# %%
check("5.2")

# %% [markdown]
# ## 5.3 Who sees which row
#
# 101 rows do not divide by 2 ranks. What then?
#
# - **In training** all ranks must take equally many steps: one that takes a step more waits in its all-reduce for ever. `DistributedSampler` makes the shares equal by
#   repeating rows, or with `drop_last` by leaving some out. We leave them out: the next epoch has another order, and leaves out others.
# - **In evaluation** no row may count twice and none may be missing, or the accuracy is another one on every number of ranks. So we fill up with rows whose
#   label is −100 and count them nowhere. (It is lab 01's −100, for the same reason.)
#
# Complete `create_data_loaders(…)`. `FilledUp` is given.

# %%
seven = [(lab.torch.tensor([float(number)]), number) for number in range(7)]
for rank in range(2):
    train_loader, test_loader = lab.create_data_loaders(
        seven, seven, micro_batch_size=2, rank=rank, world_size=2
    )
    print(
        f"rank {rank}: trains on",
        [labels.tolist() for _, labels in train_loader],
        "and is asked",
        [labels.tolist() for _, labels in test_loader],
    )

# %%
check("5.3")

# %% [markdown]
# ## 5.4 A Vision Transformer
#
# A ViT cuts an image into patches, makes a vector of each, and goes on as BLOOM does, without a mask: every patch sees every other. The class is read off
# one vector more. Ours has 4 blocks of width 96 and patches of 8 × 8 pixels. With a GPU and weights at hand you will want
# `google/vit-huge-patch14-224-in21k`, 32 blocks of width 1280.
#
# Complete `load_vit_model(model_name, num_labels, torch_dtype, enable_gradient_checkpointing)`.

# %%
model = lab.load_vit_model("vit-tiny", 101)
print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")

# %%
check("5.4")

# %% [markdown]
# ## 5.5 DDP and FSDP2
#
# **DDP** leaves the whole model on each rank, and averages the gradients in the backward pass. It does not wait for the last one: gradients go into **buckets**, the
# first of 1 MiB and the others of 25, and a full bucket is sent while the next is computed.
#
# **FSDP2** gives each rank a shard of each parameter. Just before a block computes, its parameters are gathered (all-gather); right after, they are let go. In the
# backward pass they are gathered again, and its gradients are averaged and dealt out at once (reduce-scatter). `fully_shard(module)` makes a unit of what is below `module`
# and not in a unit yet. So the blocks come first, and then the model, which gets what is left.
#
# Complete `wrap_model(model, method, device)`. The check counts what a step really sends.

# %%
check("5.5")

# %% [markdown]
# ## 5.6 An engine
#
# `Trainer` fills in every `"auto"` of a DeepSpeed configuration. Without it you do, and whatever is left "auto" should end in a sentence rather than in a traceback from
# within DeepSpeed. One more thing is easily missed: an autocast *around* an engine has no effect. DeepSpeed switches it off inside, and says so once in a log that nobody reads.
# What it computes in is the configuration's business.
#
# Complete `initialize_deepspeed_model(model, config_path, …)`.

# %%
print((lab.CONFIGS / "zero3.json").read_text())

# %%
check("5.6")

# %% [markdown]
# ## 5.7 A step, by hand and by an engine
#
# With accumulation over $k$ micro-batches, DDP would average the gradients $k$ times per step, and $k - 1$ of these are for nothing. Within
# `model.no_sync()` it leaves them where they are; the forward pass must be inside too, since DDP decides there. The engine of lab 03 knows all this from
# its configuration.
#
# At the end of an epoch a few micro-batches may be left that make no whole step. An engine would carry them into the next epoch; the loop by hand would lose
# them. Then the methods would not train on the same rows any more. So both leave them out (`whole_steps`).
#
# Complete `train_epoch_standard(…)` and `train_epoch_deepspeed(…)`.

# %%
check("5.7")

# %% [markdown]
# ## 5.8 Means of means
#
# Rank 0 has 4 rows and is right about 4; rank 1 has 3 and is right about none. The mean of 100 % and 0 % is 50 %; 4 of 7 are 57 %. So add up
# counts and sums, and divide once, at the end.
#
# And call the model for every batch, even one in which nothing counts. Under ZeRO-3 and FSDP2 each call gathers parameters; a rank that leaves one
# out lets the others wait.
#
# Complete `evaluate(model, loader, device, num_classes)`.

# %%
check("5.8")

# %% [markdown]
# ## 5.9 A ring
#
# On a ring of $N$ ranks each sends to its neighbour only. A tensor of $S$ bytes is cut into $N$ pieces. A reduce-scatter takes $N - 1$ turns: in each, every rank
# passes one piece on, to which its neighbour adds its own. Then each rank has the sum of one piece. An all-gather takes $N - 1$ turns more. So
#
# $$\text{reduce-scatter} = \text{all-gather} = \frac{N-1}{N} S, \qquad \text{all-reduce} = 2 \, \frac{N-1}{N} S .$$
#
# Complete `bytes_sent(…)` and `communication_table(…)`. What a rank called is in its trace: `shardlab.run.trace.collectives` reads it.

# %%
for collective in ("all-reduce", "all-gather", "reduce-scatter"):
    print(
        f"{collective:15}", [round(lab.bytes_sent(collective, 1000, n)) for n in (1, 2, 4, 8, 64)]
    )

# %%
check("5.9")

# %% [markdown]
# ## 5.10 Seconds and bytes
#
# A GPU is told what to do and the call returns; the work is done later. A clock that is read without waiting for the GPU measures how fast Python
# talks. And the first steps are not like the others: kernels are loaded, memory is taken, DDP finds out in which order gradients come.
#
# Complete `measure_throughput(…)` and `get_memory_stats(device)`.

# %%
check("5.10")

# %% [markdown]
# ## 5.11 The runner
#
# Now put the parts together. Whatever happens, the result has the same keys: who compares methods must not look whether one is there. A method that
# cannot run here is *not run*, with its reason.
#
# Complete `run_training_experiment(…)`.

# %%
check("5.11")

# %% [markdown]
# ## Predict
#
# All methods, two ranks, global batch 64 in two micro-batches of 16 per rank (the methods for one rank take four). The model has Ψ = 332,000 parameters in fp32: its head has
# 128 rows for the 101 classes (`rows_of_head` says why).
#
# Bytes that a rank sends per optimizer step: on two ranks an all-reduce of all gradients sends 2 · ½ · 4Ψ = 1,328,000, an all-gather or a reduce-scatter of as much 664,000. And remember that accumulation is 2. Bytes that it holds just before the step: parameters, gradients, Adam's two
# moments; DeepSpeed's ZeRO keeps a master copy of its own shard besides. *Just before the step* is a moment after the gradients have been reduced: what the rank's own step needs of them counts.

# %%
predicted_sent = {"ddp": ..., "zero1": ..., "zero2": ..., "zero3": ..., "fsdp2": ...}
predicted_held = {"ddp": ..., "zero1": ..., "zero2": ..., "zero3": ..., "fsdp2": ...}

# %% [markdown]
# ## Run
#
# `method_experiment` says what to train, and `launch_each` runs one after the other; one that fails does not end those after it. About a minute on two cores, and one more the first time, when `cpu_adam` is compiled. (The list counts the drawing of images into samples/s; the throughput in the table is that of steps alone.)
#
# What is compared are bytes and losses, which are the same on the CPU: with `or_cpu=True` both ranks run there on a machine with one GPU, and the throughput is that of its cores.

# %%
from shardlab.run.launch import launch_each

planned = [lab.method_experiment(method, ranks=2) for method in lab.METHODS]
runs = {run.experiment.method: run for run in launch_each(planned, runs=RUNS, or_cpu=True)}
table(
    [
        {
            "method": method,
            "ranks": run.experiment.ranks,
            "outcome": run.reason or run.results["not_run"] or run.outcome,
            "first loss": f"{run.losses()[0]:.5f}" if run.losses() else None,
            "last loss": f"{run.losses()[-1]:.5f}" if run.losses() else None,
            "throughput, samples/s": run.results.get("throughput"),
        }
        for method, run in runs.items()
    ]
)

# %% [markdown]
# The methods on two ranks have the same losses to five digits, though they never hold or send the same. Those on one rank differ a little: with other shares of the rows, the same global batch is
# made of other images.
#
# ## Compare
#
# Bytes sent per step:

# %%
done = {method: run for method, run in runs.items() if run.results.get("communication")}
sent = {
    method: round(sum(row["sent"] for row in done[method].results["communication"].values()))
    for method in predicted_sent
    if method in done
}
course = {
    "ddp": 1_328_004,
    "zero1": 1_992_008,
    "zero2": 3_320_008,
    "zero3": 1_992_012,
    "fsdp2": 3_866_372,
}
compare(sent, predicted_sent, course, unit="B", reference_name="course")
table(
    [
        {
            "method": method,
            "collective": name,
            "calls per step": row["calls"],
            "bytes sent": f"{row['sent']:,.0f}",
        }
        for method, run in done.items()
        for name, row in run.results["communication"].items()
        if run.experiment.ranks > 1
    ]
)

# %% [markdown]
# Read it line by line against the formulae of the lecture:
#
# - **DDP** sends 2 · ½ · 4Ψ, once per step, thanks to `no_sync`. The four bytes more are the mean of the loss. (DeepSpeed asks the ranks for a number or two of its own: 8 and 12 bytes.)
# - **ZeRO-1** is said to send no more than DDP, 2Ψ: a reduce-scatter and an all-gather. DeepSpeed 0.19.8 sends 3Ψ: it all-reduces the gradients, each rank takes its
#   shard of the sum, and then the new parameters are gathered.
# - **ZeRO-2** reduces after *every* micro-batch, as it keeps no whole gradients between them. With accumulation 2 it sends twice as many gradients.
# - **ZeRO-3** reduce-scatters in every micro-batch too. It gathers less than you may have predicted: a tensor below `stage3_param_persistence_threshold`, 100,000 elements,
#   stays whole on each rank, and is gathered once per step, right after the step has changed it. All tensors of this small model are below it. Larger ones are gathered in each micro-batch: once,
#   as long as less than `stage3_max_live_parameters`, 10⁹ elements, are there at a time, and else in the forward and in the backward pass. That last case is the textbook's 3Ψ.
# - **FSDP2** does let go: every block is gathered in the forward pass and again in the backward pass, in each micro-batch. The model's own part, outside of the
#   blocks, is gathered once.
#
# Bytes held just before the step:

# %%
held = {
    method: sum(done[method].results["held_bytes"].values())
    for method in predicted_held
    if method in done
}
course = {
    "ddp": 5_312_000,
    "zero1": 3_984_000,
    "zero2": 3_984_000,
    "zero3": 3_320_000,
    "fsdp2": 2_669_824,
}
compare(held, predicted_held, course, unit="B", reference_name="course")

# %% [markdown]
# ZeRO-1 and ZeRO-2 hold the same here, since this is the moment just before the step: by then each needs its own part of the gradients only. While ZeRO-1 accumulates, it holds all of them; lab 02 counts that moment, and
# there it is 4Ψ of gradients and not 2Ψ. What ZeRO-3 has gathered for computing is no state and not counted. FSDP2 cuts each tensor by its first dimension, so its ranks do not hold exactly the same.
#
# FSDP2 holds less than ZeRO-3. Its parameters *are* fp32, so there is no master copy; DeepSpeed keeps 4 bytes of parameter and 4 of master even where both are fp32. In
# bf16 training ZeRO-3 holds 2 + 4 for them, and FSDP2 with a `MixedPrecisionPolicy` still 4.
#
# ## See it
#
# Each run that was profiled has a trace per rank in its folder, `rank0.json`; it opens in https://ui.perfetto.dev, and in TensorBoard. The second step of three of them, on one scale:

# %%
from shardlab.show.timeline import timeline

timeline([done[method] for method in ("ddp", "fsdp2", "zero3") if method in done])

# %% [markdown]
# DDP computes, and sends two buckets at the end, of 1 MiB and of the rest, far less than 25 MiB; the small bar after them is the mean of the loss. FSDP2 sends and computes in turns, block by block. ZeRO-3 gathers in dozens of
# small calls, one per parameter. (gloo has no reduce-scatter of its own, it calls its all-reduce; so the bars of FSDP2 and ZeRO-3 have that name here. On GPUs, NCCL
# has one.) On two cores the transport takes the cores away from computing, so little can be hidden.
#
# A long bar is not always a long transfer. A collective ends on all ranks together, so the rank that came first waits in it for the one that came last. The shortest bar over the ranks is the transfer;
# the table below tells the two apart. *Neither* is time in which a rank neither computes nor has a collective under way: Python, hooks, and on a GPU the host that is late with the next kernel.

# %%
from shardlab.run.trace import shares
from shardlab.show.timeline import traces_of

table(
    [
        {"method": method, "rank": rank}
        | {name: f"{100 * share:.0f} %" for name, share in shares(traces_of(run), 1, rank).items()}
        for method, run in done.items()
        for rank in range(run.experiment.ranks if run.experiment.ranks > 1 else 0)
    ]
)

# %% [markdown]
# Traces from GPUs can be read by Holistic Trace Analysis too (`pip install HolisticTraceAnalysis`), which gives the shares of compute, *exposed communication* and idle time, over both steps. What waits in a collective it
# counts as communication: of two H100s under FSDP2, one had 68 % of that and the other 3 %, in the same two steps. The second had been late, and the first had waited.

# %%
from shardlab.run.trace import TraceError, holistic_shares

try:
    table(holistic_shares(traces_of(done["fsdp2"])))
except TraceError as problem:
    print("not run:", problem)

# %%
from shardlab.show.charts import create_performance_visualizations

create_performance_visualizations(list(runs.values()))

# %% [markdown]
# Some of these need a word. *Training time* contains all of an epoch, and here that is mostly drawing the images: one rank draws them all, of two ranks each draws half. *Throughput* is measured on a batch that is there already.
# *Scaling efficiency* can be more than 100 % here. A rank alone computes with two threads, which on operations this small is no gain: 654 and 678 samples/s with two threads, 739 and 747 with one (in one process, on two cores). A second rank brings the second core to bear. (The hatched bars are
# states that offload has put on the host. Where a step has several micro-batches, DeepSpeed keeps the gradients there twice: one copy to add up in, one for the step; lab 04 has the formula.)
#
# The same runs are in TensorBoard: in a terminal, `tensorboard --logdir runs`. With a key for Weights & Biases they go there as well (`pip install wandb`); without network they are kept in their run folders,
# and `wandb sync` sends them later. What there is here:

# %%
from shardlab.run.tracking import test_wandb_connection

test_wandb_connection();

# %% [markdown]
# ## Scaling, weak and strong
#
# **Strong scaling** keeps the global batch, **weak scaling** the samples per rank. So DDP on one rank is measured twice: with the global batch of 64 that two ranks had, and with 32, the samples that each of the two had.

# %%
predicted_scaling = {"strong, × on 2 ranks": ..., "weak, × on 2 ranks": ...}

# %%
from shardlab.show.charts import plot_scaling, scaling_points

alone = {
    "strong": lab.method_experiment(
        "ddp", ranks=1, accumulation=4, trace=False, name="lab05-strong-1"
    ),
    "weak": lab.method_experiment("ddp", ranks=1, accumulation=2, trace=False, name="lab05-weak-1"),
}
alone = dict(zip(alone, launch_each(list(alone.values()), runs=RUNS, or_cpu=True, largest=2)))
gained = {
    f"{kind}, × on 2 ranks": runs["ddp"].results["throughput"] / run.results["throughput"]
    for kind, run in alone.items()
}
compare(gained, predicted_scaling)
plot_scaling(scaling_points([*alone.values(), runs["ddp"]]))

# %% [markdown]
# Five steps are few. In three runs on two cores strong scaling gave 1.2, 2.8 and 4.3, weak scaling 1.0, 2.5 and 3.1: take no single figure for a law. More than 2 is possible because a rank alone makes so little of its second core. On GPUs each rank brings its own. The two kinds differ by what a step pays once, whatever its batch: the optimizer's step, and what is sent. Strong
# scaling on many ranks has ever less to compute for the same bytes to send.
#
# ## Does it learn?
#
# Chance is 1 %. Eight epochs with DDP; one to three minutes on two cores:

# %%
predicted_accuracy = {
    "top-1 accuracy after 8 epochs, %": ...,
    "top-5 accuracy after 8 epochs, %": ...,
}

# %%
learning = lab.method_experiment(
    "ddp",
    ranks=2,
    epochs=8,
    train_images=6060,
    test_images=1010,
    trace=False,
    accumulation=1,
    name="lab05-learning",
)
learning = launch_each([learning], runs=RUNS, or_cpu=True)[0]
reached = {
    "top-1 accuracy after 8 epochs, %": 100 * learning.results["final_accuracy"],
    "top-5 accuracy after 8 epochs, %": 100 * learning.results["final_top5"],
}
course = {"top-1 accuracy after 8 epochs, %": 34.2, "top-5 accuracy after 8 epochs, %": 96.3}
compare(
    reached,
    predicted_accuracy,
    course,
    reference_name="course, two cores",
)
show(learning)

# %% [markdown]
# Far above chance, and far from done: the loss still falls, ever more slowly. The right class is among the first five nearly always: what it has not learned is to tell neighbours apart.
#
# ## On GPUs
#
# ViT-huge's shape with 32 images per GPU, and BLOOM-560m's with 8 rows of 512 tokens; random weights, bf16, gradient checkpointing; two H200s of one host, and one. Measured with `bench/multi_gpu.py` and torch 2.11, medians of three;
# the spread is the fastest of the three over the slowest. MFU counts against 989 TFLOP/s, dense bf16 (NVIDIA's datasheet).

# %%
for name in ("vit-huge", "bloom-560m"):
    two, one = reference(f"multi-gpu-{name}-2xh200"), reference(f"multi-gpu-{name}-1xh200")
    alone = {row["method"]: row.get("samples_per_second") for row in one["results"]}
    last = {row["method"]: row["repetitions"][-1] for row in two["results"]}
    parameters = max(last["ddp"]["held_bytes"]) / 16  # DDP holds 16 bytes of each
    print(f"{two['model']}, {parameters / 1e6:.0f} million parameters,", end=" ")
    print(f"micro-batch {two['micro_batch']}.")
    print(f"One GPU by hand: {alone['single_gpu_simple']:.0f} samples/s;", end=" ")
    print(f"with offload {alone['single_gpu_offload']:.0f}.")
    speeds, steps = [], []
    for row in two["results"]:
        method, traced = row["method"], row["traced"]
        flops = row["samples_per_second"] * two["flops_per_sample"]
        speeds.append(
            {
                "method": method,
                "samples/s, 2 GPUs": row["samples_per_second"],
                "spread, %": row["spread_percent"],
                "samples/s, 1 GPU": alone[method],
                "MFU, %": 100 * flops / (2 * 989e12),
                "peak, GB": last[method]["peak_gb"],
                "held, bytes per parameter": max(last[method]["held_bytes"]) / parameters,
            }
        )
        sent, calls = traced["sent_bytes_per_step"], traced["calls_per_step"]
        of_a_step = {
            share: f"{100 * traced['shares_of_a_step'][share]:.0f} %"
            for share in ("compute", "exposed transfer", "waiting", "neither")
        }
        sums = {"sent per step, GB": sum(sent.values()) / 1e9, "calls": round(sum(calls.values()))}
        steps.append({"method": method} | sums | of_a_step)
    table(speeds)
    table(steps)

# %% [markdown]
# Line by line:
#
# - **Held**: 16 bytes per parameter with DDP, half of them with FSDP2; (4 + 4 + 8) / 2 + 4 = 12 with ZeRO-1 and 2; (4 + 4 + 4 + 8) / 2 = 10 with ZeRO-3. These are your figures from above, on models 1,700 and 1,900 times as large. ZeRO++ runs with
#   `bf16` instead of autocast: (2 + 2 + 4 + 8) / 2 = 8.
# - **Sent**: DDP and FSDP2 send fp32, for that is what the parameters are. DeepSpeed's `torch_autocast` reduces gradients and gathers ZeRO-3's parameters in bf16, half of it; ZeRO-1 and 2 gather new parameters in fp32, and so come
#   to what DDP sends. ZeRO++ quantizes what ZeRO-3 gathers to 8 bits, which halves that part once more; gradients it quantizes only between nodes (deepspeed 0.19.8, `stage3.py`), so here they go as ZeRO-3's do.
# - **Peak** is more than held: activations, what has been gathered, and buckets. ZeRO-3 keeps what it has gathered here, since both models are below `stage3_max_live_parameters`, and has a bucket of 500 million elements
#   (`reduce_bucket_size`) for gradients. So on models this small its peak is no lower than ZeRO-1's, or even DDP's, though it holds less.
# - **Exposed transfer** is 3 % of a step or less everywhere: between two GPUs with NVLink, the link is not what one waits for. Next to nothing is hidden either: while the host is late, the transfer is done before there is anything to
#   compute next to it.
# - **Neither** is the host. With 32 images a GPU is done with a kernel before Python has started the next one. ZeRO-3 has hooks around every sub-module and hundreds of calls per step, and computes in a tenth to a fifth of its step; DDP in a third to a half. A rank
#   whose host is late lets the other **wait** (the table has rank 0). What depends on the host varies, too: look at the spread.
#
# So what ZeRO-3 costs on models this small is not the link but the work around each sub-module. With larger batches there is more to compute per call; the lecture has BLOOM's figures with micro-batch 32, where FSDP2 is as fast as DDP.
#
# ## Questions
#
# 1. Why does ZeRO-2 send more than ZeRO-1 here, and with accumulation 1 not?
# 2. DDP's parameters are the same on all ranks after every step, though nobody sends them. Why?
# 3. At which Ψ would ZeRO-3 begin to gather every block twice? Which of its two limits keeps this model whole, and which would keep ViT-huge?
# 4. Which of the methods would you take for ViT-huge on 2 GPUs of 80 GB? And on 2 of 8 GB?
#
# <details><summary>Answers</summary>
#
# 1. ZeRO-2 keeps a shard of the gradients only, so it reduces those of each micro-batch as soon as they are there. ZeRO-1 adds up whole gradients on each rank, and reduces once per step. With one micro-batch per step both reduce once.
# 2. DDP sends the parameters of rank 0 to all when it wraps the model. From then on each rank applies the same averaged gradients to the same parameters, with the same optimizer states; the same arithmetic gives the same result.
# 3. Beyond 10⁹ elements, `stage3_max_live_parameters`. This model is kept whole by `stage3_param_persistence_threshold`: each of its tensors has fewer than 100,000 elements. ViT-huge's large ones have 1.6 million and more; it is kept by the other limit, as it has 631 million in all.
# 4. With 80 GB, DDP: it holds 16 bytes per parameter, 10.1 GB, peaked at 15.5 GB, and is the fastest. In 8 GB not even its states fit. FSDP2 holds 5.0 GB and peaked at 7.0 GB with 32 images per GPU: it fits, and better with fewer images. ZeRO-3 holds 6.3 GB, and needs smaller
#    buckets than by default; offload (lab 04) takes the optimizer states to the host, but peaked at 8.6 GB with 32 images on one GPU, so it needs fewer too; it gave 59 samples/s there instead of 202.
#
# </details>
#
# ## Going further
#
# - Put `"stage3_param_persistence_threshold": 0` into `zero_optimization` of `labs/lab05_multi_gpu/configs/zero3.json`, run zero3 again, and look at bytes and timeline; then add
#   `"stage3_max_live_parameters": 0` and `"stage3_max_reuse_distance": 0`. With all three it sends 3,984,012 bytes: the textbook's 3Ψ, in each of two micro-batches.
# - `deepspeed.utils.set_z3_leaf_modules(model, [type(block)])` before the engine is made gathers a block at once.
# - On more GPUs: `python bench/multi_gpu.py --help`.
#
# ## Your points

# %%
scoreboard("lab05_multi_gpu")
