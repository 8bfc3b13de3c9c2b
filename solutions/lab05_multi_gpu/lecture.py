# %% [markdown]
# # Communication and scaling
#
# Lecture for lab 05. Read it, run it, change it. Nothing here is graded.
#
# Eight ways to train one model on the GPUs of one node differ in two things: what each rank holds, and what the ranks send each other and when. Lab 02 was about the first.
# This is about the second.

# %% [markdown]
# ## A process group
#
# The ranks of a job are processes that know nothing of each other. They meet at a **store**, a small server whose address the launcher passes on; there each says where it can be reached.
# After that they have a **process group**, and call **collectives** on it: operations that all ranks call in the same order, and that end when all have.
#
# | collective | before | after |
# | --- | --- | --- |
# | broadcast | one rank has a tensor | all have it |
# | all-reduce | each has a tensor | all have the sum |
# | reduce-scatter | each has a tensor | each has one piece of the sum |
# | all-gather | each has a piece | all have all pieces |
#
# An all-reduce is a reduce-scatter and then an all-gather. That one line explains most of ZeRO: what can be done to a piece between the two, a step of Adam for example, needs
# to be done by one rank only.
#
# A collective that one rank does not call is the classic deadlock: the others wait, without a word, until a time limit ends them (30 minutes by default with gloo, 10 with NCCL). Hence an
# evaluation in which every rank makes equally many calls, and a checkpoint that *all* ranks save.
#
# ## Images in, numbers out
#
# What a model was trained on decides what it takes: size, order of channels, mean and deviation. A wrong mean is no error; the accuracy is a little lower, and nobody knows why. So they are read from the
# model's image processor and not typed in.
#
# ## Who sees which row
#
# `DistributedSampler` draws one order from seed and epoch, the same on all ranks, and deals it out like cards. It knows two ways to make the shares equal: repeat rows from the
# beginning, its default, or leave out those that are over (`drop_last=True`). In training the second is the honest one. In evaluation both are wrong: with 101 rows on 8 ranks the first counts three rows twice.
#
# ## A Vision Transformer
#
# A ViT-huge has 632 million parameters, of which all but 2 million are in its 32 blocks. An image of 224 × 224 in patches of 14 × 14 is 256 patches, and one vector more for the class. Its FLOPs
# per image, forward and backward, by the formula of lecture 01:

# %%
layers, hidden, inner, tokens = 32, 1280, 5120, 257
block_parameters = layers * (4 * hidden**2 + 2 * hidden * inner)
flops = tokens * (6 * block_parameters + 12 * layers * hidden * tokens)
print(f"{block_parameters / 1e6:.0f} million parameters in blocks,", end=" ")
print(f"{flops / 1e12:.2f} TFLOPs per image")

# %% [markdown]
# With gradient checkpointing each block's forward pass is computed twice. What is computed twice is not counted twice: MFU says how much *useful* work a GPU does.
#
# ## A ring
#
# How long does a collective take? Two numbers describe a link: α, the seconds before the first byte arrives, and β, the seconds per byte. On a **ring** each rank sends pieces of $S/N$ bytes to its
# neighbour, in $N - 1$ turns for a reduce-scatter and $N - 1$ for an all-gather:
#
# $$t_\text{ring} = 2 (N-1) \left(\alpha + \frac{S}{N} \beta\right)$$
#
# On a **tree** the sum goes up in $\log_2 N$ turns and comes down in as many, with the whole tensor in each:
#
# $$t_\text{tree} = 2 \log_2 N \, (\alpha + S \beta)$$
#
# The ring sends the least that is possible, and waits for many α; the tree waits less and sends more. So small tensors go by trees and large ones by rings; NCCL chooses by size. (Patarasuk and Yuan, 2009, show that the ring is optimal in bytes;
# Sanders, Speck and Träff, 2009, that two trees can share the work.) What both cost on 64 ranks with α = 10 µs and 100 GB/s:

# %%
import matplotlib.pyplot as plt

alpha, beta, ranks = 10e-6, 1 / 100e9, 64
sizes = [2**exponent for exponent in range(8, 31)]
ring = [2 * (ranks - 1) * (alpha + size / ranks * beta) for size in sizes]
tree = [2 * (ranks - 1).bit_length() * (alpha + size * beta) for size in sizes]
figure, axis = plt.subplots(figsize=(6.5, 3.2))
axis.loglog(sizes, ring, label="ring")
axis.loglog(sizes, tree, label="tree")
axis.set(xlabel="bytes", ylabel="seconds, 64 ranks")
axis.legend();

# %% [markdown]
# And measured, on four H200s of one host (`bench/links.py`). Below a megabyte the time hardly depends on the size: there α is all that counts. That is why DDP puts gradients into buckets of
# 25 MiB, and why many small gathers are slow on any link.

# %%
from shardlab.show.notebook import reference, table

links = reference("links-4xh200")
figure, axis = plt.subplots(figsize=(6.5, 3.2))
for collective in ("all-reduce", "all-gather", "reduce-scatter"):
    rows = [row for row in links["results"] if row["collective"] == collective]
    axis.loglog(
        [row["bytes"] for row in rows], [row["seconds"] for row in rows], "o-", label=collective
    )
axis.set(xlabel="bytes", ylabel="seconds, 4 ranks")
axis.legend()
print(links["hardware"]["gpus"][0], links["versions"], links["date"])

# %% [markdown]
# ## What each method sends, and when
#
# Per optimizer step of one micro-batch, with Ψ parameters of one type, on $N$ ranks, in units of $\frac{N-1}{N}Ψ$ elements per rank. The papers' counts, and what lab 05's milestones count
# in the traces of today's versions (deepspeed 0.19.8, torch 2.13):
#
# | | when | paper | counted |
# | --- | --- | --- | --- |
# | DDP | all-reduce of buckets, during the backward pass | 2 | 2 |
# | ZeRO-1 | gradients at the end, parameters after the step | 2 | 3: an all-reduce, not a reduce-scatter, of the gradients |
# | ZeRO-2 | gradients in the backward pass, parameters after the step | 2 | 3, for the same reason |
# | ZeRO-3 | parameters before each forward and backward pass of a layer, gradients in the backward pass | 3 | 2, where less than `stage3_max_live_parameters` is gathered at a time: what was gathered for the forward pass stays for the backward pass |
# | FSDP2 | as ZeRO-3, by units of `fully_shard` | 3 | 3, less the model's own unit, which is gathered once |
#
# ZeRO-3 has a second limit: tensors below `stage3_param_persistence_threshold` (100,000 elements; biases and norms, or all of a tiny model) stay whole on each rank, and are gathered once per step, after it.
#
# With accumulation over $k$ micro-batches, DDP (with `no_sync`) and ZeRO-1 reduce once per step; ZeRO-2, ZeRO-3 and FSDP2 in every micro-batch, since none of them keeps a whole gradient.
#
# **ZeRO++** (arXiv 2306.10209) is for slow links between nodes. It quantizes the weights to 8 bits on the way (qwZ: 1 of the 3 units becomes ½), keeps a second copy of the shards within each node, so that the
# backward pass gathers inside of it (hpZ: 1 becomes 0 between nodes), and sends quantized gradients by all-to-all (qgZ: 1 becomes ¼). Between nodes 3 units become 0.75. It costs memory for the second copy, and accuracy that has to be
# watched. Its kernels need a GPU; a rank's part of each parameter must be a multiple of 8 elements; and DeepSpeed 0.19.8 refuses it together with `torch_autocast`. On two GPUs of one node, where NVLink is fast, it
# gained nothing: 76 samples/s, ZeRO-3 75 (ViT-huge's shape, micro-batch 32, 2 × H200); and gradients are quantized only where there is more than one node.
#
# ## An engine without Trainer
#
# A DeepSpeed configuration is complete only where somebody has filled it in. `Trainer` does that: each `"auto"` becomes a number from its own arguments. Without it three numbers have to agree, and the engine refuses what does not:
#
# $$\text{train\_batch\_size} = \text{micro-batch per rank} \times \text{accumulation} \times N$$
#
# What the engine computes in is its configuration's business too. There are three ways, and they exclude each other:
#
# | entry | parameters at rest | computes in |
# | --- | --- | --- |
# | none | as the model has them, here fp32 | the same; a `torch.autocast` around the engine is switched off inside it |
# | `torch_autocast` | as the model has them | what autocast chooses, as in a loop by hand |
# | `bf16` | bf16, and a fp32 master copy in the optimizer | bf16 throughout |
#
# The second is what DDP and FSDP2 do in this lab, so it is what makes methods comparable. ZeRO++ with quantized weights refuses it (deepspeed 0.19.8), and so runs with the third.
#
# ## A step, by hand and by an engine
#
# DDP hooks into the backward pass: when the last gradient of a bucket is there, its all-reduce begins, and the backward pass goes on. So communication can be **hidden** behind compute, all but the last bucket's, if there is enough to compute. What is not
# hidden is **exposed**: the GPU waits. Exposed communication, not communication, is what a method costs in time.
#
# FSDP2 and ZeRO-3 hide theirs by **prefetching**: while one block computes, the next is gathered. That needs a host that is ahead of its GPU. Where blocks are small, the host cannot keep up.
#
# ## Means of means
#
# Losses and accuracies of ranks may be averaged only if all ranks have equally many rows. Else sums and counts are added up. It is the same mistake as in lab 03, where a mean over micro-batches of different numbers of tokens is not the mean over tokens.
#
# ## Seconds and bytes
#
# Steps are measured after a few that are not, between two moments in which the device has nothing left to do. Memory of a GPU is what torch's allocator has **allocated** for tensors at most, and what it has **reserved** from the GPU, which is more. On a CPU there is
# only the process's own size, and that is mostly Python and libraries: there the bytes that model states hold are counted instead.
#
# ## Scaling
#
# **Strong scaling**: the same global batch on more ranks. Each computes less, and sends as much as before; so communication becomes a larger part of a shorter step. **Weak scaling**: the same micro-batch per rank on more ranks. The step stays as long as
# it was, but for communication. Weak scaling looks better and answers another question: how long an *epoch* takes, with a batch that grows. Whether the model still learns as well from larger batches is a third question (lab 06 goes on from here).
#
# ## A fair comparison
#
# Two methods can be compared when all else is equal, and that is more than the arguments:
#
# - the same **weights**: the seed is set just before the model is loaded, and not once at the top of the program, since the method before has drawn random numbers too;
# - the same **rows in the same order**: the sampler is told the epoch, or each epoch repeats the first;
# - the same **global batch**, and throughput counted in samples of *all* ranks, or two ranks seem no faster than one;
# - **scores before measurements**: steps that are taken to measure speed or memory change the weights;
# - the same **keys in every result**, whatever happened: what could not run says why, and is not left out.
#
# ## Which method when
#
# | | DeepSpeed ZeRO-3 | FSDP2 |
# | --- | --- | --- |
# | parameters at rest | in the training type, and a fp32 master copy in the optimizer | fp32; `MixedPrecisionPolicy` casts what is gathered |
# | what is gathered together | by parameter, prefetched by a trace of the first steps; leaf modules by hand | what `fully_shard` was called on |
# | let go of after use | above `stage3_max_live_parameters` (10⁹ elements by default) | always, but the outermost; `reshard_after_forward` |
# | offload | host and NVMe, optimizer and parameters | host (`CPUOffloadPolicy`) |
# | checkpoints | a file per rank, converters to one model or to other ranks (lab 03) | `torch.distributed.checkpoint`: any number of ranks |
# | configuration | JSON, any launcher, in `Trainer` | Python calls in your program; in `Trainer` through accelerate |
#
# Samples/s on 4 H200s of one host, BLOOM-560m's shape, 512 tokens, bf16, no gradient checkpointing (so all are faster than in lab 05's tables): at micro-batch 8, DDP 262, FSDP2 147, ZeRO-3 67.5, and ZeRO-3 with whole blocks as leaf modules 116. At micro-batch 32: DDP 366, FSDP2 369, ZeRO-3 with leaf
# modules 321. So with enough work per step the methods come together, and the choice is one of memory:
#
# 1. Does the model fit on one GPU with 16 to 18 bytes per parameter and its activations? DDP.
# 2. Does it fit with the optimizer's states divided by N? ZeRO-1.
# 3. Else FSDP2 or ZeRO-3; offload when that is not enough, and then lab 04 says what it costs.
