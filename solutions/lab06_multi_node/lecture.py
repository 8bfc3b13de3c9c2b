# %% [markdown]
# # Launchers and schedulers
#
# Lecture for lab 06. Read it, run it, change it. Nothing here is graded, and no cluster is needed.
#
# Within one node, a parent process starts the ranks and knows them all. Over several nodes nobody does. A **scheduler** (here Slurm) gives you nodes and starts
# one command on each; a **launcher** (here torchrun) turns that into ranks that find each other. This lecture follows a job through both.

# %% [markdown]
# ## What Slurm tells a job
#
# `sbatch` puts a script into a queue. When nodes are free, Slurm runs the script **once, on the first of them**. Nothing runs on the others yet: `srun`, in the
# script, starts *tasks* on all nodes. Slurm sets variables in both places, and they do not mean the same in both:
#
# | variable | in the script (the batch shell) | in a task that `srun` has started |
# | --- | --- | --- |
# | `SLURM_JOB_ID` | the job | the job |
# | `SLURM_JOB_NODELIST` | all nodes, such as `node[1-3,7]` | the same |
# | `SLURM_JOB_NUM_NODES` | 4 | 4 |
# | `SLURM_NODEID` | 0: the script runs on the first node | this node, from 0 |
# | `SLURM_PROCID`, `SLURM_LOCALID` | 0 | the task among all, and on its node |
# | `SLURM_RESTART_COUNT` | how often the job was started again; not set the first time | the same |
#
# So `srun bash -c "echo $SLURM_NODEID"` prints 0 on every node: the script's shell replaces the variable before `srun` sees it. In single quotes each task's own
# shell does. A script with the double quotes starts every node as node 0.
#
# ## Where ranks meet
#
# A process group begins with a **rendezvous**: all processes connect to one store, learn how many they are, and get their ranks. Three things must be agreed
# on beforehand: who holds the store, at which address, on which port.
#
# - **Who:** the first node of the job. torchrun compares the address with its own host names to find out whether it is the one. Where a node has several
#   networks, none of its names may match; `--rdzv-conf=is_host=1` says it outright.
# - **Address:** the first node's, on a network that all share. `localhost` is a different machine for each node. A fallback (`… || echo localhost`) turns a clear
#   error into a job that hangs until its time limit. A node often has an address for administration and one for data: Scripts that take "the second word of `hostname -I`"
#   get one or the other by chance (PyTorch issue 73656).
# - **Port:** two jobs can share a node. A port made of the job's number keeps them apart.
#
# With `--rdzv-backend=c10d` torchrun itself gives out ranks, sorted by host name as *text*: node10 comes before node2. Nothing depends on it but
# your expectations. `--node-rank` is for the static rendezvous and is not read here.
#
# ## Three launchers
#
# | | started by `srun` | needs | to know |
# | --- | --- | --- | --- |
# | `torchrun` | one task per node | address and port | starts the node's ranks; ends them all if one fails |
# | `deepspeed --no_ssh` | one task per node | a hostfile with every node's slots, its own `--node_rank`, address, port | without `--no_ssh` it connects to all nodes by ssh, without a password, and leaves most variables behind (DeepSpeed issue 1603) |
# | none: one task per rank | one task per rank | `RANK`, `LOCAL_RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`, made of Slurm's variables | Slurm itself watches the ranks |
#
# `deepspeed --launcher slurm` sets no `RANK`, so a program that is not written for it stops or trains alone. `shardlab slurm render multi-node --launcher NAME` prints a
# complete script for each of the three. On the local cluster of this course all three gave the same losses, and the tests see to it that they do.
#
# ## A batch script
#
# Directives, `#SBATCH --nodes=2`, are comments for the shell and orders for Slurm. With a space, `# SBATCH`, they are comments for both, and nothing says so. Slurm
# reads them up to the first command. `set -euo pipefail` makes the script end where something failed; without it, a job whose training crashed
# ends as COMPLETED, since the last `echo` went well. `srun --kill-on-bad-exit=1` ends all tasks when one fails. Without it the others wait in an all-reduce, for
# minutes or up to the time limit.
#
# ## What a job is doing
#
# `squeue` shows the state and, in the last column, the nodes or the reason for waiting: `Resources` (its turn comes), `Priority` (others first), `BeginTime` (it was
# put back and waits a while), `ReqNodeNotAvail`, `QOSMaxNodePerUserLimit` … `scontrol show job` knows all, for some minutes after the end too. What
# training does is not in there: that is in the run folder, and `shardlab slurm follow` shows both.

# %% [markdown]
# ## The global batch
#
# More ranks at the same micro-batch mean a larger global batch, hence other training: fewer steps per epoch, and perhaps another learning rate. For the *same* training
# on N ranks, keep the global batch and divide it. If it does not divide, the shares differ, and then a plain mean over ranks is wrong: by hand, 5 sequences
# on 2 ranks, losses 1 2 3 | 4 8. The mean is 18 / 5 = 3.6. The mean of the ranks' means is (2 + 6) / 2 = 4. Weights 3 · 2 / 5 and 2 · 2 / 5 mend it:
# (1.2 · 2 + 0.8 · 6) / 2 = 3.6.
#
# ## Scaling
#
# **Strong** scaling: the same global batch on more ranks; the step should get shorter. **Weak** scaling: the same batch for each rank; the step should stay as long
# and the global samples/s grow. Efficiency is samples/s *per rank* relative to the smallest run, in both cases. `Trainer` reports global samples/s; whoever takes them for
# one rank's finds an efficiency of N.
#
# ## What crosses the links
#
# Per rank and optimizer step, Ψ parameters, k micro-batches, times (N − 1) / N (ZeRO paper, arXiv 1910.02054, section 7; ZeRO++, arXiv 2306.10209, section 3):
#
# | | elements | why |
# | --- | --- | --- |
# | DDP, ZeRO-1 | 2Ψ | an all-reduce of the gradients is a reduce-scatter and an all-gather |
# | ZeRO-2 | Ψ + kΨ | gradients are reduced to their shard with each micro-batch, parameters gathered once |
# | ZeRO-3 | 3kΨ | parameters gathered for the forward and again for the backward pass, gradients reduced |
# | ZeRO++, between nodes | 0.75kΨ | 8-bit weights, none in the backward pass, 4-bit gradients |
#
# And what the links carry, measured with `bench/links.py` on four H200s of one host:

# %%
from dataclasses import replace

from shardlab.show.notebook import reference, table
from shardlab.cluster.scaling import Link, fit, network

links = reference("links-4xh200")
rows = {}
for row in links["results"]:
    rows.setdefault(row["bytes"], {"bytes": f"{row['bytes']:,}"})[f"{row['collective']} µs"] = (
        1e6 * row["seconds"]
    )
    rows[row["bytes"]][f"{row['collective']} GB/s"] = row["bus_gb_per_second"]
table(list(rows.values())[::3])
print(links["hardware"]["gpus"][0], links["versions"], links["date"])

# %% [markdown]
# A message of 4 KiB takes 25 to 39 µs, one of a quarter of a million bytes hardly longer. Small messages cost their latency, large ones their bytes. (GB/s is the
# "bus bandwidth" of nccl-tests: what each link carries.)
#
# ## A thousand nodes
#
# Nobody here has them, so a model must do:
#
# $$\text{step}(N) = \text{step}(1) + \text{messages} \cdot \text{latency} + \text{bytes} / \text{bandwidth}$$
#
# The bytes come from the table above, bandwidth and latency were measured, and the number of messages is fitted so that the measured step on two GPUs comes out. Four GPUs
# are then a test: BLOOM-560m's shape, bf16, sequences of 512, 2 micro-batches of 8.

# %%
PARAMETERS = 559_214_592
measured = {
    gpus: {row["method"]: row for row in reference(f"stages-{gpus}xh200")["results"]}
    for gpus in (1, 2, 4)
}
reduce_ = [row for row in links["results"] if row["collective"] == "all-reduce"]
nvlink = Link("NVLink", reduce_[-1]["bus_gb_per_second"], reduce_[0]["seconds"])


def step(gpus: int, name: str) -> float:
    row = measured[gpus][name]
    return row["micro_batch"] * row["accumulation"] * gpus / row["samples_per_second"]


# The plain Trainer keeps fp32 gradients under autocast, so DDP sends 4 bytes per element.
names = {
    "DDP": ("baseline", 4),
    "ZeRO-1": ("ZeRO-1", 2),
    "ZeRO-2": ("ZeRO-2", 2),
    "ZeRO-3": ("ZeRO-3", 2),
}
models = {
    method: fit(method, PARAMETERS, 2, step(1, name), step(2, name), nvlink, size)
    for method, (name, size) in names.items()
}
models["ZeRO++"] = replace(models["ZeRO-3"], method="ZeRO++")
rows = []
for method, (name, _) in names.items():
    model = models[method].seconds(1, 4, nvlink)
    rows.append(
        {
            "method": method,
            **{f"measured, {gpus} GPU": f"{1000 * step(gpus, name):.0f} ms" for gpus in (1, 2, 4)},
            "model, 4 GPU": f"{1000 * model:.0f} ms",
            "model / measured": model / step(4, name),
            "messages": round(models[method].messages),
        }
    )
table(rows)

# %% [markdown]
# DDP and ZeRO-3 come out within 2 %. For stages 1 and 2 the model is 10 to 15 % too slow: each GPU steps a smaller shard of the optimizer, and the model leaves that
# out. ZeRO-3's time at this size is not bytes: on two GPUs each sends 3.4 GB a step, which takes 10 ms over NVLink, and the step got 185 ms longer. It gathers some 300
# parameters one by one; its defaults are made for larger models.
#
# Eight GPUs of one host were not to be had for this course, so there is no measured point beyond four, and none over a network. What follows is arithmetic:

# %%
import matplotlib.pyplot as plt

fabrics = [
    network("25 Gb/s Ethernet, 1 adapter", 25, 1, 30e-6),
    network("100 Gb/s, 1 adapter", 100, 1, 10e-6),
    network("400 Gb/s InfiniBand, 4 adapters", 400, 4, 5e-6),
]
counts = [2**power for power in range(1, 11)]
figure, axes = plt.subplots(1, len(fabrics), figsize=(12, 3.4), sharey=True)
for axis, fabric in zip(axes, fabrics):
    for method, model in models.items():
        axis.plot(
            counts,
            [model.efficiency(nodes, 4, nvlink, fabric) for nodes in counts],
            marker=".",
            label=method,
        )
    axis.set(xscale="log", xlabel="nodes of 4 GPUs", title=fabric.name, ylim=(0, 1))
axes[0].set_ylabel("predicted efficiency, weak scaling")
axes[0].legend()
figure.tight_layout()

# %% [markdown]
# Assumptions: nothing is hidden behind computing (in truth part of it is, so this is pessimistic); no other traffic, no slow node (optimistic); latencies of the networks, 30,
# 10 and 5 µs, are typical figures and not measured here; latency grows with the logarithm of the nodes. On one 25 Gb/s adapter the bytes decide:

# %%
rows = []
for fabric in fabrics:
    for method, model in models.items():
        rows.append(
            {
                "network": fabric.name,
                "method": method,
                **{
                    f"{nodes} nodes": f"{model.efficiency(nodes, 4, nvlink, fabric):.0%}"
                    for nodes in (2, 16, 128, 1024)
                },
            }
        )
table(rows)

# %% [markdown]
# Read along a line: from 2 nodes to 1,024 little changes, since (N − 1) / N is nearly 1 from the start; ZeRO-3 and ZeRO++ lose more, since each of their many
# messages waits longer. Weak scaling is decided at the first step out of the node. Read down: the method that
# sends least wins on a slow network, and on a fast one there is little between those that send few messages. That is the reason for ZeRO++. One more
# assumption stands behind its line: it is ZeRO-3 with fewer bytes between nodes, and the time for packing and unpacking them is not in the model.
#
# ## A job that ends before its training
#
# Three things end a job early: its time limit, a node that fails, a more important job. All are the same to training if it saves checkpoints and its job
# is put back into the queue (`scontrol requeue`; by Slurm itself for a lost node, with `--requeue`). Then:
#
# - The run folder and the checkpoints carry the job's number, so that the second life finds those of the first, and no other job's.
# - A checkpoint may be half written. The last file of each says that it is whole (lab 03).
# - Before the time limit Slurm sends a signal: `--signal=B:USR1@120` means 120 seconds before, to the batch shell alone. A shell that waits for a command in the foreground
#   looks at signals only when the command has ended. So: in the background, and `wait`.
# - **All ranks must stop after the same step.** One that stops alone leaves the others in an all-reduce. So they agree, once per step.
# - A job that fails again and again must not be put back for ever. Put it back if there is a new checkpoint since it began.
#
# With the local cluster of this course you can see all of it on your own machine: `slurm/local_cluster.sh up`, submit, `slurm/local_cluster.sh kill node2`.
