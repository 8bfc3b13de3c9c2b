# %% [markdown]
# # Lab 03: the engine by hand
#
# **What you will have built:** a training loop on DeepSpeed's own engine, without `Trainer`: steps, epochs, evaluation, checkpoints that survive a
# killed rank, one plain model out of many shards, and a checkpoint that another number of ranks can load. Your file is then a program that the
# `deepspeed` and `torchrun` launchers start.
#
# **Time:** about 90 minutes. **Before it:** lab 02, and the lecture `notebooks/03_engine.ipynb`.
#
# | task | what you write | difficulty (1–5) |
# | --- | --- | --- |
# | 3.1 | `initialize_deepspeed` | 2 |
# | 3.2 | `train_step` | 2 |
# | 3.3 | `train_epoch`, which can begin in the middle | 4 |
# | 3.4 | `evaluate` | 3 |
# | 3.5 | `save_checkpoint` | 3 |
# | 3.6 | `load_checkpoint` | 2 |
# | 3.7 | `check_checkpoint` | 2 |
# | 3.8 | `consolidate` | 2 |
# | 3.9 | `convert_to_universal` | 1 |
#
# You write in `src/exercises/lab03_engine.py`. The checks start real ranks. The first cell that needs torch waits 10 to 15 seconds until it and
# DeepSpeed are loaded, and so does the first check; where no lab was checked before, it also compiles an op, which takes half a minute to a minute more.
# After that most checks take 3 to 5 seconds on two idle cores, 3.2 and 3.9 about 6, and 3.6 about 10. In a terminal, each `pytest labs --task` loads them anew.

# %%
from shardlab.show.notebook import RUNS, check, compare, reference, scoreboard, show, start, table

lab = start("lab03_engine")

# %% [markdown]
# ## 3.1 What initialize makes
#
# `deepspeed.initialize` takes a model, its parameters, and a configuration, and returns four things: the **engine**, which replaces the model; the
# optimizer, wrapped by ZeRO; a data loader; and a scheduler. Three things go wrong here again and again:
#
# - `"auto"` in the configuration. Only `Trainer` fills it in.
# - No optimizer, or two. DeepSpeed wants one: yours, or the one that the configuration names.
# - A data loader that knows nothing of ranks. Then all ranks train on the same rows, and nothing says so. `engine.deepspeed_io(data)` makes one with a
#   `DistributedSampler`.
#
# Complete `initialize_deepspeed(model, config, optimizer=None, training_data=None)`.

# %%
try:
    lab.initialize_deepspeed(None, {"train_batch_size": "auto", "optimizer": {"type": "AdamW"}})
except ValueError as error:
    print(error)

# %%
check("3.1")

# %% [markdown]
# ## 3.2 A step
#
# Plain PyTorch, with accumulation over $k$ micro-batches, needs five calls and a condition:
#
# ```python
# loss = model(**batch).loss
# (loss / k).backward()
# if last_of_k:
#     clip_grad_norm_(model.parameters(), 1.0)
#     optimizer.step()
#     optimizer.zero_grad()
# ```
#
# The engine knows $k$ and the clipping from its configuration, and counts. So three calls are left, and you make all three for **every** micro-batch.
# What you would add by habit is done twice then: dividing by $k$, stepping the optimizer. A `zero_grad` of your own before each micro-batch would throw away
# what the ones before it have accumulated. And before the three, `engine.train()`: an evaluation in
# between may have left dropout off.
#
# With Adam such a mistake hides. Its step does not depend on the scale of the gradient: $m / \sqrt{v}$ is the same for $g$ and $g / k$. So a loss curve
# that looks right proves nothing. The check uses a large `eps`, $m / (\sqrt{v} + 0.1)$, with which it does.
#
# Complete `train_step(batch)`. It returns the loss in the mean over the ranks (`mean_over_ranks` is given).

# %%
check("3.2")

# %% [markdown]
# ## 3.3 An epoch
#
# Two things must be right. The sampler shuffles by seed **and epoch**, and nobody tells it the epoch unless you do. And after a checkpoint was loaded,
# the epoch begins in the middle: the first `samples` sequences have been seen. `samples` counts over all ranks, so that it means the same on any number
# of them.
#
# By hand: micro-batch 2 on 2 ranks, so each batch stands for 4 sequences. With `samples` 16, rank 0 passes over 4 of its batches.
#
# Complete `train_epoch(dataloader, last_step=None)`. Its docstring says when `after_step` is called and what it returns.

# %%
check("3.3")

# %% [markdown]
# ## 3.4 Evaluation
#
# A loss is a mean, and means of means are wrong when the parts have different sizes. Say rank 0 has two labels with losses 1 and 3, and rank 1 has one
# with loss 8. The mean of the ranks' means is (2 + 8) / 2 = 5. The mean loss of a token is (1 + 3 + 8) / 3 = 4. So sum the losses and the labels, over
# batches and then over ranks, and divide once.
#
# Complete `evaluate(dataloader)`.

# %%
check("3.4")

# %% [markdown]
# ## 3.5 A checkpoint
#
# To go on as if nothing had happened, one needs: parameters, optimizer states, the optimizer step, the position in the data, and the random state of
# **each** rank, since dropout draws from it. DeepSpeed saves the first three, each rank its own shard. The rest goes through `client_state`.
#
# A job can be killed while it saves. Then there is a folder, and it is worth nothing. So the last file to be written says that all others are there:
# `complete.json`, with the size of each.
#
# Complete `save_checkpoint(path, client_state)`.

# %%
check("3.5")

# %% [markdown]
# ## 3.6 Going on
#
# Complete `load_checkpoint(path, tag=None)`. Without a tag it takes the newest checkpoint that is whole: `newest_whole` is given. Both call
# `check_checkpoint`, which you write next; the check of this task brings its own.
#
# The check below first trains in stages 1, 2 and 3 without a stop; then it loads checkpoints of those runs in **new processes** and goes on. The losses
# must be those of the run that never stopped, to 1e-5, with dropout on in stage 2. One of the checkpoints comes from a run in which rank 1 was ended with
# `kill -9`, and a newer, half-written one lies next to it.

# %%
check("3.6")

# %% [markdown]
# ## 3.7 Is it whole?
#
# Loading half a checkpoint ends in an error of `torch.load`, if you are lucky. Loading one of another number of ranks ends in an error in stages 1 to 3
# (`ZeRORuntimeException`); in stage 0, where every rank has everything, it goes through in silence. Here one rule holds for all. Your `check_checkpoint(folder, ranks)` says before all that, in a sentence, what is wrong.
#
# It needs no ranks, so try it on a folder made by hand:

# %%
import json
import tempfile
from pathlib import Path

folder = Path(tempfile.mkdtemp(), "step-4")
folder.mkdir()
(folder / "weights.pt").write_bytes(b"12345678")
(folder / "complete.json").write_text(
    json.dumps({"ranks": 2, "universal": False, "files": {"weights.pt": 8}})
)
print(lab.check_checkpoint(folder, 2))
(folder / "weights.pt").write_bytes(b"1234")
try:
    lab.check_checkpoint(folder, 2)
except ValueError as error:
    print(str(error).replace(str(folder), "…/step-4"))

# %%
check("3.7")

# %% [markdown]
# ## Predict
#
# You will train bloom-tiny (2,866,560 parameters, fp32, ZeRO-2, two ranks) for 12 optimizer steps; then for 6 steps, and go on to 12 in new processes.

# %%
predicted = {
    "files in one checkpoint (complete.json included)": ...,
    "bytes of one checkpoint": ...,
    "largest difference between the losses of the two": ...,
}

# %% [markdown]
# ## Run

# %%
import shutil

from shardlab.run.launch import launch
from shardlab.run.experiment import Experiment

config = lab.engine_config(
    2, offload=False, micro_batch=2, accumulation=2, ranks=2, learning_rate=1e-3, precision="fp32"
)
settings = {
    "program": "labs/lab03_engine/train.py:program",
    "ranks": 2,
    "deepspeed": config,
    "micro_batch": 2,
    "accumulation": 2,
    "learning_rate": 1e-3,
    "max_tokens": 64,
    "train_examples": 40,
    "eval_examples": 16,
}
saved = RUNS / "lab03-checkpoints"
shutil.rmtree(saved, ignore_errors=True)
whole = Experiment(name="lab03-whole", method="without a stop", steps=12, **settings)
first = Experiment(
    name="lab03-first", method="6 steps", steps=6, options={"checkpoints": str(saved)}, **settings
)
whole, first = launch([whole, first], runs=RUNS, or_cpu=True)

# %%
second = Experiment(
    name="lab03-second",
    method="and 6 more",
    steps=12,
    options={"checkpoints": str(saved), "resume": True},
    **settings,
)
second = launch(second, runs=RUNS, or_cpu=True)[0]

# %% [markdown]
# ## Compare

# %%
files = [path for path in (saved / "step-6").rglob("*") if path.is_file()]
together = first.losses() + second.losses()
measured = {
    "files in one checkpoint (complete.json included)": len(files),
    "bytes of one checkpoint": sum(path.stat().st_size for path in files),
    "largest difference between the losses of the two": max(
        abs(a - b) for a, b in zip(whole.losses(), together, strict=True)
    ),
}
course = {
    "files in one checkpoint (complete.json included)": 4,
    "bytes of one checkpoint": 45_926_439,
    "largest difference between the losses of the two": 0.0,
}
compare(measured, predicted, course, reference_name="course")

# %% [markdown]
# The checkpoint holds 16 bytes per parameter, 45,864,960, and a little for names and shapes: 4 for the fp32 parameters in `mp_rank_00_model_states.pt`, and 12 in the two shards of the optimizer states,
# the master weights among them. In bf16 it would be 14: 2 + 12. A checkpoint that can be continued is much larger than the model.

# %%
table(
    [
        {"file": str(path.relative_to(saved / "step-6")), "bytes": f"{path.stat().st_size:,}"}
        for path in sorted(files)
    ]
)
show([whole, first, second], plots=False)

# %% [markdown]
# ## 3.8 One model again
#
# What you want to share is a folder that plain `transformers` reads. `deepspeed.utils.zero_to_fp32` puts the shards of the fp32 master weights together.
# BLOOM ties its output layer to its embedding, and older versions of that script lost one of the two (DeepSpeed issues 1896 and 3824). A strict
# `load_state_dict`, the default, would say so.
#
# Complete `consolidate(folder, base_model, out)`.

# %%
check("3.8")

# %%
from transformers import AutoModelForCausalLM

import io
from contextlib import redirect_stderr, redirect_stdout

out = RUNS / "lab03-model"
with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # DeepSpeed says what it reads
    lab.consolidate(saved / "step-12", "bloom-tiny", out)
model = AutoModelForCausalLM.from_pretrained(out)
print(
    f"{sum(p.numel() for p in model.parameters()):,} parameters, "
    f"tied: {model.lm_head.weight is model.transformer.word_embeddings.weight}"
)
print(sorted(path.name for path in out.iterdir()))

# %% [markdown]
# ## 3.9 Another number of ranks
#
# The shards of 2 ranks are not those of 1 or 4. A **universal checkpoint** has each parameter's states whole, in files of their own, and every rank cuts its
# shard out of them. DeepSpeed converts; you call it.
#
# Complete `convert_to_universal(folder, path)`. The check trains on 2 ranks, goes on with 1, and back with 2, and compares the losses to 1e-5.

# %%
check("3.9")

# %%
universal = RUNS / "lab03-universal"
shutil.rmtree(universal, ignore_errors=True)
with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
    lab.convert_to_universal(saved / "step-12", universal)
config = lab.engine_config(
    2, offload=False, micro_batch=2, accumulation=4, ranks=1, learning_rate=1e-3, precision="fp32"
)
config["checkpoint"] = {"load_universal": True}
alone = Experiment(
    name="lab03-alone",
    method="2 more on one rank",
    steps=14,
    options={"checkpoints": str(universal), "resume": True},
    **(settings | {"ranks": 1, "deepspeed": config, "accumulation": 4}),
)
alone = launch(alone, runs=RUNS, or_cpu=True)[0]
print(
    "steps 11 and 12 on two ranks, 13 and 14 on one:",
    [round(loss, 4) for loss in together[-2:] + alone.losses()],
)

# %% [markdown]
# Each step sees other rows, so one loss can be above the one before. That the states are the same is what the check looks at: it trains on the same rows
# with and without the conversion.

# %% [markdown]
# ## Break it
#
# A configuration with `zero_optimisation`, an s where a z is due. `deepspeed.initialize` starts, and says nothing. How will you notice? Say first what
# each rank will hold, in bytes; ZeRO-2 held 34,398,720.

# %%
predicted_bytes = {"zero_optimisation": ...}

# %%
misspelt = dict(whole.experiment.deepspeed)
misspelt["zero_optimisation"] = misspelt.pop("zero_optimization")
settings_here = settings | {"deepspeed": misspelt}
wrong = Experiment(name="lab03-misspelt", method="zero_optimisation", steps=12, **settings_here)
wrong = launch(wrong, runs=RUNS, or_cpu=True)[0]
held = max(sum(rank.values()) for rank in wrong.states()["ranks"])
course = {"zero_optimisation": 45_864_960}
compare(
    {"zero_optimisation": held}, predicted_bytes, course, reference_name="course, 2 CPU cores"
)
apart = max(abs(a - b) for a, b in zip(whole.losses(), wrong.losses(), strict=True))
print(f"The losses differ by at most {apart:.1e}.")

# %% [markdown]
# The curve is the same, as all stages compute the same; nothing but the bytes shows that this was stage 0. Your `check_deepspeed_config` of lab 02 says it
# before the run.
#
# And lose a line: `set_epoch`. 24 paragraphs, 8 to an optimizer step, so an epoch is 3 steps; 8 epochs. Say first in how many orders rank 0 will see
# its 12 rows, with the call and without it, and how the two loss curves will differ.

# %%
predicted_orders = {"with set_epoch": ..., "without": ...}

# %%
import matplotlib.pyplot as plt

few = settings | {"train_examples": 24, "steps": 24}
kept = Experiment(name="lab03-set-epoch", method="with set_epoch", **few)
lost = Experiment(
    name="lab03-no-set-epoch", method="without", options={"set_epoch": False}, **few
)
with_call, without = launch([kept, lost], runs=RUNS, or_cpu=True)
orders = {"with set_epoch": with_call.results["orders"], "without": without.results["orders"]}
course = {"with set_epoch": 8, "without": 1}
compare(orders, predicted_orders, course, reference_name="course, 2 CPU cores")
figure, axes = plt.subplots(figsize=(9, 3))
for one in (with_call, without):
    axes.plot(range(1, 25), one.losses(), "o-", label=one.experiment.method)
for end in range(3, 24, 3):
    axes.axvline(end + 0.5, color="lightgrey")
axes.set(xlabel="optimizer step; a grey line ends an epoch", ylabel="training loss")
axes.legend();

# %% [markdown]
# Without the call every epoch sees the same batches in the same order, so the curve repeats its shape: low, middle, high. Each epoch looks like progress,
# and the mean over an epoch falls as with it. What is lost is that a row meets other rows; and on a large corpus that is stopped and resumed, nothing tells.
#
# ## The program
#
# `labs/lab03_engine/train.py` puts your functions together as a program. In a terminal, in the project's folder:
#
# ```
# deepspeed --num_gpus 2 labs/lab03_engine/train.py --stage 2
# deepspeed --num_gpus 2 labs/lab03_engine/train.py --stage 3 --offload
# deepspeed --num_gpus 2 labs/lab03_engine/train.py --compare
# torchrun --nproc-per-node 2 labs/lab03_engine/train.py --stage 2
# ```
#
# Then break it. Start a long run, and kill one of its ranks while it trains, as the kernel does when memory runs out:
#
# ```
# torchrun --nproc-per-node 2 labs/lab03_engine/train.py --stage 1 --steps 2000 --save-every 20
# kill -9 $(pgrep -u $USER -f lab03_engine/train.py | tail -1)      # in a second terminal; of your own processes
# ```
#
# The other rank ends too, and `torchrun` names the signal. With which step will `--resume` go on? Look into `runs/lab03-stage1-checkpoints` and say it
# first. Then type the first command again with `--resume` after it, and look at the first line of `runs/lab03-stage1/metrics.jsonl`.
#
# Each rank needs a GPU of its own: on a machine with one, take `--num_gpus 1`, or put `DS_ACCELERATOR=cpu` in front of the command. Then, and without GPUs,
# `--num_gpus 2` means two ranks on the CPU. These launchers know nothing of this notebook's warm processes, so they take half a minute to
# begin. `--compare` trains with every stage, without and with offload. On H200s, BLOOM-560m's shape in bf16, sequences of 512, micro-batch 8,
# accumulation 2, it measured what follows. The weights are random, so a loss of 9 is the beginning; with stage 0 the sums in bf16 are rounded otherwise.

# %%
for name in ("engine-1xh200", "engine-2xh200"):
    measured = reference(name)
    table(
        [
            {
                "GPUs": row["ranks"],
                "method": row["method"],
                "samples/s": row["samples_per_second"],
                "held on the device": row["largest_rank"],
                "last loss": row["losses"][-1],
            }
            for row in measured["results"]
        ]
    )
print(measured["hardware"]["gpus"][0], measured["versions"], measured["date"])

# %% [markdown]
# ## Your points
#
# All tasks of the lab at once, with the points that `pytest labs` gives, and what to do next.

# %%
scoreboard("lab03_engine")

# %% [markdown]
# ## Questions
#
# 1. Why must every rank call `save_checkpoint`, although rank 0 could write everything itself in stage 0?
# 2. You resume on 2 ranks a run that had dropout, and forget the random state. Which of these change: the weights at the start, the first loss, the
#    final quality?
# 3. `evaluate` is called on ranks with 5 and 6 batches. What happens in stage 2, and what in stage 3?
# 4. Why is `complete.json` written by one rank, after a barrier, and not by each rank for its own files?
#
# <details><summary>Answers</summary>
#
# 1. In stages 1 to 3 each rank alone has its shard; and `engine.save_checkpoint` waits for all ranks at every stage.
# 2. The weights are the same; the first loss differs, since dropout draws other numbers; the quality is the same on average. A curve that cannot be
#    compared is what one loses.
# 3. In stage 2 the forward passes are independent, so only the final all-reduce waits, and it comes. In stage 3 every forward pass gathers parameters from
#    all ranks: the sixth waits for ever.
# 4. Whoever reads must be able to tell from one file that all are there. If each rank wrote its own, half of them could be there.
# </details>
#
# ## Going further
#
# - Kill a rank of a running `deepspeed` job with `kill -9`, and start it again with `--resume`.
# - Add a scheduler to the configuration (`"scheduler": {"type": "WarmupLR", …}`). Is it in the checkpoint? Does the check of 3.6 see it?
# - Write a hostfile with the line `localhost slots=2`, and start the program with it; the command is at the top of `labs/lab03_engine/train.py`. Lab 06 goes on from there.
