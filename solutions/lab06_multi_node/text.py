# %% [markdown]
# # Lab 06: several nodes
#
# **What you will have built:** everything between a queue and a training that runs on several nodes: the list of nodes read, the place where ranks meet, a batch script whose every line you
# know, the global batch shared out, the queue's answers read, scaling computed, and a job that goes on after one of its nodes was lost.
#
# **Time:** about 75 minutes. **Before it:** labs 01 to 03, and the lecture `notebooks/06_launchers.ipynb`.
#
# | task | what you write | difficulty (1–5) |
# | --- | --- | --- |
# | 6.1 | `expand_nodelist` | 3 |
# | 6.2 | `rendezvous` | 2 |
# | 6.3 | `hostfile` | 2 |
# | 6.4 | `batch_script` | 4 |
# | 6.5 | `share`, `loss_weight` | 2 |
# | 6.6 | `read_job` | 3 |
# | 6.7 | `scaling` | 2 |
# | 6.8 | `stop_together` | 1 |
# | 6.9 | `surviving` | 5 |
#
# You write in `src/exercises/lab06_multi_node.py`. Tasks 6.4, 6.6 and 6.9 submit real jobs. On a cluster they go to its queue. Anywhere else one command, in a terminal in the
# project's folder, starts a real Slurm with two nodes on this machine:
#
# ```
# slurm/local_cluster.sh up
# ```
#
# It needs Debian's or Ubuntu's packages `slurm-wlm` and `munge`, and says so. `slurm/local_cluster.sh down` removes it. Without any Slurm these checks say *not run*.
# Most checks take seconds; 6.4 takes about half a minute and 6.9 more than one, since a job is killed in it and has to come back.

# %%
from shardlab.cluster import slurm
from shardlab.show.notebook import RUNS, check, compare, reference, scoreboard, show, start, table

lab = start("lab06_multi_node")
why_not = slurm.missing()
print(
    f"Slurm: {why_not}"
    if why_not
    else f"Slurm answers{': the local cluster' if slurm.is_local() else ''}."
)

# %% [markdown]
# ## 6.1 Which nodes
#
# Slurm names the nodes of a job in a short form. By hand: `node[1-3,7]` is node1, node2, node3, node7. `n[08-10]` is n08, n09, n10: the width comes from the first number
# of a range. And `rack[1-2]n[1-2]` has four. On a cluster you would call `scontrol show hostnames`; a container often has no `scontrol`, and then you are glad to have your own.
#
# Complete `expand_nodelist(nodelist)`.

# %%
print(lab.expand_nodelist("node[1-3,7],rack[1-2]n[08-09]"))

# %%
check("6.1")

# %% [markdown]
# ## 6.2 Where they meet
#
# The lecture's three questions: who holds the store, at which address, on which port? Complete `rendezvous(variables, address, ranks_per_node)`. By hand: in job 41234, on the second
# of two nodes (`SLURM_NODEID` 1), with 4 ranks per node: port 12000 + 41234 mod 10000 = 13234, and `is_host=false`.

# %%
node_2 = {
    "SLURM_JOB_ID": "41234",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "1",
}
print(lab.rendezvous(node_2, "10.0.0.11", 4))

# %%
check("6.2")

# %% [markdown]
# ## 6.3 A hostfile
#
# The `deepspeed` launcher wants a file instead: a line per node, with its *slots*, the ranks that it runs. Slurm knows the counts, again in a short form: `4(x2),3` stands for
# 4, 4, 3. A job with unequal nodes is where a script with `slots=4` for all ends in an error, or leaves a GPU idle.
#
# Complete `hostfile(nodes, tasks_per_node)`. DeepSpeed's own parser is the judge.

# %%
print(lab.hostfile(["node1", "node2", "node5"], "4(x2),3"))

# %%
check("6.3")

# %% [markdown]
# ## 6.4 The batch script
#
# Now put it together, in shell: directives; Python; the first node's address; one torchrun on each node. The docstring of `batch_script` says what is needed, line by line. Look at your text
# before you check it; that is what you will do on a cluster, too.

# %%
import sys
from pathlib import Path

setup = f"export PATH='{Path(sys.prefix, 'bin')}':$PATH"
text = lab.batch_script(
    name="first",
    nodes=2,
    ranks_per_node=1,
    minutes=5,
    log="/tmp/first.log",
    setup="export PATH=…",
    program=["-m", "shardlab.cli", "run", "my run"],
)
print(text)

# %% [markdown]
# The check reads your text first and names what it finds: a directive that is a comment, localhost, a fallback. Then it submits it, three times: with a program that only writes down which
# rank it is; with one that fails on one rank, which must end the job; and with a training on two nodes, one rank each, whose losses must be those of one node with two ranks, to 1e-5.

# %%
check("6.4")

# %% [markdown]
# ## Predict
#
# You will train bloom-tiny (fp32, ZeRO-2) on two nodes with one rank each, and on this machine with two ranks, 30 steps with the same global batch.

# %%
predicted = {
    "largest difference between the losses": ...,
    "samples/s, two nodes": ...,
    "samples/s, one node": ...,
    "seconds from sbatch to the first step": ...,
}

# %% [markdown]
# ## Run
#
# The experiment goes into a file, your script starts it on both nodes, and `slurm.follow` shows the queue's state, then steps and losses from the run folder.

# %%
import shutil
import time

from shardlab.cluster import batch
from shardlab.run.launch import launch
from shardlab.run.experiment import Experiment
from shardlab.run.run_folder import Run

zero = {
    "zero_optimization": {"stage": 2},
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
}
settings = {
    "program": "shardlab.run.training:train_text",
    "ranks": 2,
    "micro_batch": 4,
    "accumulation": 1,
    "steps": 30,
    "max_tokens": 64,
    "learning_rate": 1e-3,
    "evaluate": False,
    "save": False,
    "deepspeed": zero,
}
if not why_not:
    site = batch.site_in_use()
    runs = RUNS if slurm.is_local() else batch.run_root(site)
    runs.mkdir(parents=True, exist_ok=True)
    experiment = Experiment(name="lab06-two-nodes", method="2 nodes × 1 rank", **settings)
    shutil.rmtree(runs / experiment.name, ignore_errors=True)
    (runs / "lab06.json").write_text(experiment.model_dump_json())
    script = lab.batch_script(
        name="lab06",
        nodes=2,
        ranks_per_node=1,
        minutes=10,
        log=str(runs / "lab06.log"),
        setup=batch.setup_lines(site),
        program=["-m", "shardlab.run.ranks", str(runs / "lab06.json"), str(runs)],
    )
    submitted = time.time()
    number = slurm.submit(
        script, *batch.sbatch_options(site, gpus_per_node=min(1, site.gpus_per_node))
    )
    job = slurm.follow(number, runs / experiment.name, limit=600)
    print(job.state, "" if job.state == "COMPLETED" else slurm.log_tail(number))

# %%
one_node = launch(
    Experiment(name="lab06-one-node", method="1 node × 2 ranks", **settings), runs=RUNS, or_cpu=True
)[0]

# %% [markdown]
# ## Compare

# %%
if not why_not:
    two_nodes = Run.read(runs / "lab06-two-nodes")
    measured = {
        "largest difference between the losses": max(
            abs(a - b) for a, b in zip(two_nodes.losses(), one_node.losses(), strict=True)
        ),
        "samples/s, two nodes": two_nodes.samples_per_second(),
        "samples/s, one node": one_node.samples_per_second(),
        "seconds from sbatch to the first step": (two_nodes.folder / "metrics.jsonl")
        .stat()
        .st_mtime
        - submitted
        - sum(row["seconds"] for row in two_nodes.metrics()),
    }
    compare(measured, predicted)
    show([two_nodes, one_node])

# %% [markdown]
# On the local cluster both nodes share this machine's cores, so neither is faster by right: run the cells again, and the two may change places. (Its nodes have no
# GPUs. On a machine that has some, the job ran on the CPU and the one node perhaps on GPUs: compare the losses then, and not the speed.) What differs is the road that the gradients take. One node's ranks add them up in
# shared memory; two nodes' ranks send them through a network. And a job is *cold*: each node imports torch and DeepSpeed anew, which this notebook's warm processes have done.
#
# ## 6.5 The same training on any number of nodes
#
# A global batch of 10 on 3 ranks: 4, 3 and 3 sequences. Gradients are averaged over ranks, each rank counted once; so each loss is weighted by its rank's share. By hand: 4 · 3 / 10 = 1.2 for
# the first, 0.9 for the others, 3 in all.
#
# Complete `share(global_batch, rank, ranks)` and `loss_weight(global_batch, rank, ranks)`.

# %%
print([(list(lab.share(10, rank, 3)), lab.loss_weight(10, rank, 3)) for rank in range(3)])

# %%
check("6.5")

# %% [markdown]
# ## 6.6 What is it doing
#
# `scontrol --oneliner show job 17` prints one line of Key=Value pairs. It looks easy until somebody names a job `my first job`. Complete `read_job(line)`.

# %%
if not why_not:
    line = slurm.command("scontrol", "--oneliner", "show", "job", str(number))
    print(line[:230], "…")
    print(lab.read_job(line))

# %%
check("6.6")

# %% [markdown]
# ## 6.7 Does it scale
#
# By hand, weak scaling: one rank 80 samples/s, eight ranks 512 in all. That is 64 a rank, an efficiency of 0.8. Complete `scaling(runs)`.
#
# The cell below trains with the same batch for each rank on 1 and 2 ranks, here. On a machine with two cores, two ranks have the cores of one each:

# %%
weak = [
    Experiment(
        name=f"lab06-weak{ranks}",
        method=f"{ranks} × 4 sequences",
        **(settings | {"ranks": ranks, "steps": 12}),
    )
    for ranks in (1, 2)
]
here = lab.scaling(launch(weak, runs=RUNS, or_cpu=True))["rows"]
table(here)

# %%
import matplotlib.pyplot as plt

figure, axis = plt.subplots(figsize=(6.5, 3.2))
axis.plot([row["ranks"] for row in here], [row["efficiency"] for row in here], "o-", label="here")
for method in ("baseline", "ZeRO-2", "ZeRO-3"):
    speeds = {
        gpus: next(
            row["samples_per_second"]
            for row in reference(f"stages-{gpus}xh200")["results"]
            if row["method"] == method
        )
        for gpus in (1, 2, 4)
    }
    axis.plot(
        list(speeds),
        [speed / gpus / speeds[1] for gpus, speed in speeds.items()],
        "o--",
        label=f"H200, {method}",
    )
axis.axhline(1, color="grey", linewidth=0.8)
axis.set(xlabel="ranks", ylabel="efficiency, weak scaling", ylim=(0, 1.2), xticks=[1, 2, 4])
axis.legend()

# %%
check("6.7")

# %% [markdown]
# Above 1 is no miracle: with ZeRO-2 each GPU steps a smaller shard of the optimizer, and one GPU has nobody to share it with. What it would be on up to 1,024 nodes of GPUs is in the lecture, with the model's assumptions and the measured points that it was checked against.
#
# ## 6.8 Stop together
#
# A job whose time is nearly up should save and end. The message reaches one rank first. Complete `stop_together(asked)`: a few lines, after which all ranks give the same answer.

# %%
check("6.8")

# %% [markdown]
# ## 6.9 Survive
#
# The last piece is shell again. Your lines start the ranks, hear Slurm's signal, and decide whether the job goes back into the queue. Four cases:
#
# - The ranks end with status 0, and nobody asked them to stop: the job is done.
# - They end with status 0, and the file `stop` is there: requeue.
# - They end with another status after a new checkpoint: requeue.
# - They end with another status, and there is no new checkpoint: the job has failed.
#
# Complete `surviving(launch, run)`. The check runs a small job for each case, with stand-ins for the ranks. Then, on the local cluster, it trains on two nodes,
# **kills the second one in the middle**, and compares the whole curve with that of a run that nobody disturbed.

# %%
print(lab.surviving("srun …", "/scratch/my runs/first"))

# %%
check("6.9")

# %% [markdown]
# Do it yourself, too: submit `shardlab slurm submit multi-node --solutions -- --method ZeRO-2 --steps 300 --save-every 20 --no-evaluate` in a terminal, follow it with
# `shardlab slurm follow JOB --run RUN_FOLDER`, and in a second terminal `slurm/local_cluster.sh kill node2`, then `slurm/local_cluster.sh start node2`. (Without `--solutions` it trains with your own
# functions of labs 01 and 02.)
#
# ## Your points
#
# All tasks of the lab at once, with the points that `pytest labs` gives, and what to do next.

# %%
scoreboard("lab06_multi_node")

# %% [markdown]
# ## Questions
#
# 1. `srun bash -c "echo $SLURM_PROCID"` with four tasks prints what, and why?
# 2. A job of 2 nodes hangs right after "Initializing process group". Name three causes, and how to tell them apart.
# 3. Why does the checkpoint folder carry the job's number, and why not the run's name alone?
# 4. A colleague measures 100 samples/s on 1 GPU and 350 on 4 and calls that an efficiency of 350 %. What is it?
# 5. Why must a job that failed without a new checkpoint not be put back?
#
# <details><summary>Answers</summary>
#
# 1. 0 four times. The batch shell replaces the variable before srun starts; its own value is 0.
# 2. The address is not reachable from the other node (the preflight says "cannot reach"); a node never started its launcher (the preflight says "no word from"); both think that they are alone, since the
#    address was localhost (each prints a world size of one).
# 3. A second job of that name would continue the first one's training, or both would write into one folder at once.
# 4. 350 / 4 = 87.5 samples/s per GPU, so 0.875. `Trainer` reports samples/s over all ranks.
# 5. What ended it would most likely end it again, and again: a mistake in the program, a full disk. It would fill the queue for ever.
# </details>
#
# ## Going further
#
# - `shardlab slurm render multi-node --launcher deepspeed` and `--launcher srun`: find the lines that differ, and what each needs.
# - Run the preflight with a wrong address on the second node (`python -m shardlab.cluster.preflight --help`). Which node does it name?
# - Shorten `--time` to two minutes and watch the signal come before the limit.
