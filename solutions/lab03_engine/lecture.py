# %% [markdown]
# # Inside the engine
#
# Lecture for lab 03. Read it, run it, change it. Nothing here is graded.
#
# `Trainer` drives DeepSpeed for you. Sooner or later you need a loop that `Trainer` does not have, or an error leads you into the engine. This lecture
# goes through what the engine does in a step, what it keeps in a checkpoint, and how it compares with its neighbours.

# %% [markdown]
# ## What initialize makes
#
# ```python
# engine, optimizer, loader, scheduler = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
# ```
#
# The **engine** is called like the model. It moved the model to the device and to its precision, and wrapped the optimizer: the ZeRO optimizer keeps the fp32
# master weights, in shards from stage 1 on, and an ordinary Adam steps them. `model_parameters` says what is trained; a frozen parameter is left out.
#
# The loader that `training_data=` gives starts two processes per rank, and two more with each new iterator. They outlived ranks that were killed here, by
# minutes. `engine.deepspeed_io(data, num_local_io_workers=0)` makes the same loader without them.
#
# ## A step
#
# Three calls a micro-batch:
#
# | call | what happens |
# | --- | --- |
# | `engine(**batch)` | forward; in stage 3 each layer's parameters are gathered before it and released after it |
# | `engine.backward(loss)` | the loss is divided by the accumulation, then backward; from stage 2 on gradients go to their owners meanwhile, bucket by bucket |
# | `engine.step()` | nothing, until the last micro-batch of the optimizer step; then: norm over all ranks, clipping, Adam on the own shard, all-gather, gradients cleared |
#
# The engine counts micro-batches. So one calls `step` every time, and never the optimizer. Here are two optimizer steps of two micro-batches each, on two real
# ranks, watched from outside:

# %%
from shardlab import progress
from shardlab.run.launch import launch
from shardlab.show.notebook import RUNS, table
from shardlab.run.experiment import Experiment

config = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "train_batch_size": 8,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
}
settings = {
    "ranks": 2,
    "deepspeed": config,
    "micro_batch": 2,
    "accumulation": 2,
    "steps": 2,
    "learning_rate": 1e-3,
    "max_tokens": 48,
    "train_examples": 32,
    "evaluate": False,
    "save": False,
}
run = launch(
    Experiment(name="lecture-watch", program="shardlab.course.lectures:watch_steps", **settings),
    runs=RUNS / "lecture",
    display=progress.Quiet(say=print),
    or_cpu=True,
)[0]
table(run.results["watched"])

# %% [markdown]
# Read it line by line. After a micro-batch that is not the last one, the optimizer step has not moved, and rank 0 holds gradients. After the last one
# the step count has grown, the weights have changed, and the gradients are gone. The shard of the gradients has 5,733,120 bytes, half of 4Ψ (Ψ is the number of parameters, 2,866,560). Between
# micro-batches it is a little more: the parameter at the border of the two shards is kept whole until then.

# %%
# NBVAL_CHECK_OUTPUT
print(
    [
        (row["micro-batch"], row["optimizer steps"], row["weights changed"])
        for row in run.results["watched"]
    ]
)

# %% [markdown]
# ## An epoch
#
# A `DistributedSampler` deals the rows out to the ranks: rank r of N gets the rows r, r + N, r + 2N … of a shuffled list. The shuffle depends on the sampler's
# seed and on the epoch, and the epoch stays 0 until somebody calls `set_epoch`. `Trainer` does; in a loop of your own you must, or every epoch has the same
# order:

# %%
from torch.utils.data import DistributedSampler

sampler = DistributedSampler(range(8), num_replicas=2, rank=0)
print(list(sampler), list(sampler))
sampler.set_epoch(1)
print(list(sampler))

# %% [markdown]
# Going on in the middle of an epoch means passing over what has been seen. Count it in sequences over all ranks: after 16 sequences the same 16 are done,
# whatever the number of ranks. And mind that DeepSpeed's loader starts anew at each `iter()`, the one of a `for` included.
#
# ## Evaluation
#
# `engine.eval()` turns dropout off, and `torch.no_grad()` keeps the activations from being stored. In stage 3 every rank must make equally many forward passes,
# since each gathers parameters from all others. A `DistributedSampler` sees to that: it repeats rows until the shares are equal. So a data set that does not
# divide by the ranks counts some rows twice.
#
# ## A checkpoint
#
# `engine.save_checkpoint(path, tag, client_state)` is called by all ranks. In `path/tag` it writes:
#
# | file | written by | holds |
# | --- | --- | --- |
# | `mp_rank_00_model_states.pt` (stages 0–2) | rank 0 | parameters in the model's precision, step counts, scheduler, your `client_state` |
# | `zero_pp_rank_N_mp_rank_00_model_states.pt` (stage 3) | rank N | the same, with each rank's own `client_state`; the parameters are placeholders |
# | `zero_pp_rank_N_mp_rank_00_optim_states.pt`, with `bf16_` in front in bf16 | rank N | its shard of master weights and Adam's moments |
#
# In stage 0 there is no file of optimizer shards: the first file holds the optimizer's states too.
#
# And in `path` a file `latest`, which names the newest tag. Rank 0 writes it at the end of its own save, *before* the barrier that waits for the other
# ranks: a job killed in between has a `latest` that names half a checkpoint. Of an older tag nothing says whether its save came to its end, and nothing
# notices a file that was cut short afterwards. Lab 03 adds a list of sizes, after a barrier.
#
# What `client_state` must carry, since DeepSpeed does not: the epoch, the position in the data, and the random states. Each rank has its own, and in
# stages 0 to 2 only rank 0's `client_state` is kept.
#
# In stage 3 load into a fresh engine: DeepSpeed's documentation says that loading right after saving, in the same engine, does not work.
#
# ## One model again
#
# `zero_to_fp32` reads the shards of the master weights and gives a state dict in fp32. It needs no GPU and no ranks, and the memory of one model. Beside
# every checkpoint DeepSpeed leaves a copy of that script in `path` (`zero_to_fp32.py`, and `zero_to_torch.py` next to it), so that it can be used without
# knowing where DeepSpeed is installed.
#
# ## Another number of ranks
#
# DeepSpeed refuses a checkpoint of stage 1 to 3 from another number of ranks (`ZeRORuntimeException: The checkpoint being loaded used a DP world size of …`).
# `deepspeed.checkpoint.ds_to_universal` writes each parameter's master weight and moments whole, and an engine with `"checkpoint": {"load_universal": true}`
# cuts its shards out of them. Measured here on two cores: 0.8 s for bloom-tiny, and the losses went on, from 2 ranks to 1 and back to 2, equal to six digits.
#
# ## Engine, Trainer, FSDP2
#
# | | DeepSpeed engine 0.19.8 | `Trainer` 5.23 with DeepSpeed | FSDP2 (torch 2.13) |
# | --- | --- | --- | --- |
# | what you write | the loop, three calls a micro-batch [1] | arguments and data [2] | the loop, plain PyTorch calls; `fully_shard` on each layer [3] |
# | what is sharded | by stage: optimizer, gradients, parameters [1] | as the engine | parameters, gradients, optimizer; with `reshard_after_forward=False` parameters stay gathered until backward [3] |
# | shape of a shard | flat buffers (1, 2), or each parameter flat (3): lab 02 | as the engine | each parameter cut along its first dimension, a `DTensor` [3] |
# | accumulation, clipping | in the configuration | in `TrainingArguments`, handed over through `"auto"` [2] | yours: `set_requires_gradient_sync`, `clip_grad_norm_` [3] |
# | master weights | fp32, always there from stage 1 on [4] | as the engine | the precision that the parameters have; load in fp32, compute in bf16 through `MixedPrecisionPolicy` [3, 4] |
# | offload | optimizer and parameters, to CPU or NVMe [5] | as the engine | parameters, gradients and optimizer to the CPU, all or nothing: `CPUOffloadPolicy` [3] |
# | checkpoint for other ranks | convert to universal [6] | as the engine | `torch.distributed.checkpoint` reshards as it loads [7] |
#
# [1] deepspeed.readthedocs.io, *Training Setup* and *ZeRO*. [2] huggingface.co/docs/transformers, *DeepSpeed*. [3] docs.pytorch.org,
# *torch.distributed.fsdp.fully_shard*. [4] huggingface.co/blog/deepspeed-to-fsdp-and-back, and lab 02's measurement in fp32. [5] www.deepspeed.ai,
# *Configuration JSON*. [6] www.deepspeed.ai, *Universal Checkpointing*. [7] docs.pytorch.org, *torch.distributed.checkpoint*.
#
# Speed is no row of this table, since we have not measured FSDP2 with this code. What lab 02's reference says: on 4 H200s DDP reached 265
# samples/s and ZeRO-3 75. For a model that fits, sharding the parameters costs speed.
#
# ## What the errors mean
#
# | message | what it means | what to do |
# | --- | --- | --- |
# | `ModuleNotFoundError: No module named 'deepspeed'` | another Python than you think; a launcher takes the first on the path | `which deepspeed`, and start it from the environment where it is installed |
# | `Unable to JIT load the … op`, `Error building extension '…'` | an op did not compile; the reason stands **above**, in the compiler's output | `shardlab doctor --build-ops` builds them one by one and shows the compiler's lines |
# | `'DeepSpeedCPUAdam' object has no attribute 'ds_opt_adam'` | the same: it hides the build error before it (DeepSpeed issue 1846) | as above |
# | the program waits for ever at `Loading extension module …` | a killed build left a file `lock` in the extension's folder | `shardlab doctor --build-ops` removes it |
# | `Check batch related parameters. train_batch_size is not equal to micro_batch_per_gpu * gradient_acc_step * world_size 8 != 2 * 1 * 1` | the numbers do not multiply; with a last factor of 1 that should be more, the ranks have not found each other (issues 3228, 6914) | read the last factor first; then the launcher |
# | `The checkpoint being loaded used a DP world size of 2 but the current world size is 1` | saved by another number of ranks | convert it: task 3.9 |
# | `Unrecognized model in …/step-2. Should have a … key in its config.json`, or `IsADirectoryError` | a DeepSpeed checkpoint is a folder of shards, no model | task 3.8, or `trainer.save_model` |
# | `mpi4py` cannot be imported | RANK, WORLD_SIZE, MASTER_ADDR or MASTER_PORT is missing, so DeepSpeed asks MPI (issue 748) | start the program with a launcher |
#
# Two of them, made on purpose:

# %%
import os

from shardlab.zero import ops

os.environ.update(ops.environment())
from deepspeed.runtime.config import DeepSpeedConfig  # noqa: E402

try:
    DeepSpeedConfig(
        {
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 1,
        }
    )
except AssertionError as error:
    print(error)

# %%
from transformers import AutoModelForCausalLM

saved = RUNS / "lecture" / run.name / "checkpoint"
print(sorted(path.name for path in saved.rglob("*") if path.is_file()))
try:
    AutoModelForCausalLM.from_pretrained(saved / "step-2")
except ValueError as error:
    print(str(error).replace(str(saved), "checkpoint"))

# %% [markdown]
# ## Myths
#
# - *One must divide the loss by the accumulation.* The engine does. Divided twice, with Adam the curve looks almost the same: its step does not depend on the
#   gradient's scale. With clipping the clip then acts at the wrong norm.
# - *`optimizer.zero_grad()` must be called.* `engine.step()` clears the gradients after the optimizer step, and not before.
# - *The model can be saved with `model.save_pretrained`.* In stage 3 that writes placeholders. Save through the engine and consolidate.
