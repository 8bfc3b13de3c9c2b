# %% [markdown]
# # ZeRO
#
# Lecture for lab 02. Read it, run it, change it. Nothing here is graded.
#
# In data-parallel training each rank has the whole model and its own share of the batch. The ranks average their gradients and all take the
# same step. So each of N ranks holds the same 16 bytes per parameter. ZeRO, the Zero Redundancy Optimizer, keeps one copy in all instead of
# N, cut into shards, and moves the pieces when they are needed (Rajbhandari et al. 2020, arXiv 1910.02054).

# %% [markdown]
# ## The words
#
# - **rank**: one process, with one GPU if there are any. **World size** N: how many there are.
# - **shard**: the part of something that one rank holds.
# - **all-reduce**: every rank has a tensor; afterwards every rank has the sum.
# - **reduce-scatter**: every rank has a tensor; afterwards each has its shard of the sum.
# - **all-gather**: each rank has a shard; afterwards every rank has all of it.
# - **micro-batch**: the sequences of one forward pass on one rank. **Global batch** = micro-batch × accumulation × N.
#
# An all-reduce is a reduce-scatter followed by an all-gather. ZeRO takes the two apart, and does something between them.
#
# ## The stages
#
# | stage | sharded | an optimizer step | sent and received by a rank |
# | --- | --- | --- | --- |
# | 0 | nothing | all-reduce gradients, step everything | 2Ψ |
# | 1 | optimizer states | reduce gradients, step the own shard, all-gather parameters | 2Ψ |
# | 2 | and gradients | reduce-scatter gradients during backward, step the own shard, all-gather parameters | 2Ψ |
# | 3 | and parameters | all-gather each layer before forward and before backward, reduce-scatter gradients | 3Ψ |
#
# The volumes are in elements for each optimizer step with accumulation 1 (ZeRO paper, §7). Stages 1 and 2 cost no more than plain data
# parallelism. Stage 3 costs half as much again, since the parameters are gathered twice.
#
# ## Who holds what
#
# With Adam in mixed precision a parameter takes 2 bytes, its gradient 2, and the optimizer 12 (an fp32 master copy, and two moments of 4):

# %%
from shardlab.zero import memory_model
from shardlab.show.notebook import table

PSI = 559_214_592  # BLOOM-560m
rows = []
for ranks in (1, 2, 4, 8):
    rows.append(
        {"N": ranks}
        | {
            f"stage {stage}": (
                f"{memory_model.paper_bytes(stage, PSI, ranks).device / 2**30:.2f} GiB"
            )
            for stage in range(4)
        }
    )
table(rows)

# %% [markdown]
# Read the first row: **on one rank there is nothing to shard**, and all stages are equal. Read the columns: stage 1 goes from 16Ψ towards
# 4Ψ, stage 2 towards 2Ψ, stage 3 towards nothing. The "4 times" and "8 times" that are often quoted are limits for large N.
#
# ### Three accounts
#
# The paper counts 16Ψ. DeepSpeed's own estimator counts fp32 gradients too and comes to 2Ψ + 18Ψ/N for stage 2. What the engine holds
# depends on its settings. All three for stage 2 on 4 ranks:

# %%
paper = memory_model.paper_bytes(2, PSI, 4).device
estimator = memory_model.estimator_bytes(2, PSI, 4)
engine = (2 + 2 / 4 + 12 / 4) * PSI  # parameters whole; shards of gradients and optimizer states
print(
    f"paper {paper / 2**30:.2f} GiB, estimator {estimator / 2**30:.2f} GiB, "
    f"engine in bf16 {engine / 2**30:.2f} GiB"
)

# %% [markdown]
# ### Padding
#
# Shards have equal sizes, so something is rounded up. Stages 1 and 2 join all parameters of an optimizer group in one flat buffer and
# round it up to a multiple of 2N elements. Stage 3 cuts each parameter by itself and rounds up to a multiple of N. `Trainer` makes two
# groups: weights, which decay, and biases and layer norms, which do not.

# %%
# Two groups, of parameters with 7 and 5 elements and of one with 3, on 2 ranks: 15 in all.
by_hand = [
    {
        "stage": "1 and 2",
        "group of 7 and 5": "12, a multiple of 4: 6 each",
        "group of 3": "rounded up to 4: 2 each",
        "elements per rank": 8,
    },
    {
        "stage": "3",
        "group of 7 and 5": "4 and 3 each",
        "group of 3": "2 each",
        "elements per rank": 9,
    },
]
table(by_hand)

# %% [markdown]
# ## The configuration
#
# DeepSpeed reads a dictionary, or a JSON file. These keys matter first:
#
# ```json
# {
#   "train_micro_batch_size_per_gpu": 4,
#   "gradient_accumulation_steps": 2,
#   "train_batch_size": 16,
#   "gradient_clipping": 1.0,
#   "bf16": {"enabled": true},
#   "zero_optimization": {"stage": 2}
# }
# ```
#
# The three batch sizes must multiply: 4 × 2 × 2 ranks = 16. Under `Trainer` a value may be `"auto"`; it is then filled in from
# `TrainingArguments`. A value that is neither `"auto"` nor equal to `Trainer`'s is an error that names both.
#
# **Write `gradient_clipping` always.** Since deepspeed 0.19.3 it is 1.0 if you leave it out (DeepSpeed pull request 8068). That is `Trainer`'s
# default too. Against a loop or a `Trainer` that does not clip (`max_grad_norm=0`), losses differ, and no message says so.
#
# ## What DeepSpeed lets through
#
# `DeepSpeedConfig` refuses an unknown key inside `zero_optimization`, batch sizes that do not multiply, fp16 together with bf16, and stage
# 4. It does not see an unknown key at the top:

# %%
import os

from shardlab.zero import ops

os.environ.update(ops.environment())
from deepspeed.runtime.config import DeepSpeedConfig  # noqa: E402

print(
    "stage:",
    DeepSpeedConfig(
        {"train_batch_size": 1, "zero_optimisation": {"stage": 2}}
    ).zero_optimization_stage,
)

# %% [markdown]
# One letter (`optimisation` for `optimization`), and the run trains at stage 0 and never says so. Parameter offload below stage 3, NVMe
# offload without a path, and `"auto"` inside `zero_optimization` without `Trainer` go through in the same way. In lab 02 you write the
# check that DeepSpeed lacks.
#
# ## The same mathematics
#
# Sharding changes where numbers live, not what they are. In fp32, with the same global batch and seed, stages 0 to 3 and DDP give the same
# losses. Two ranks, four steps, in one launch. (Each step sees other text, and Adam's first steps at this learning rate are rough; so the loss
# need not fall within four steps. That all methods give the same four is the point.)

# %%
from shardlab import progress
from shardlab.run.launch import launch
from shardlab.show.notebook import RUNS
from shardlab.run.experiment import Experiment

settings = {
    "program": "shardlab.run.training:train_text",
    "ranks": 2,
    "micro_batch": 2,
    "accumulation": 2,
    "steps": 4,
    "learning_rate": 1e-3,
    "max_tokens": 48,
    "train_examples": 64,
    "evaluate": False,
    "save": False,
}


def zero(stage):
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
    }


experiments = [Experiment(name="lecture-ddp", method="DDP", **settings)]
experiments += [
    Experiment(
        name=f"lecture-zero{stage}", method=f"ZeRO-{stage}", deepspeed=zero(stage), **settings
    )
    for stage in (1, 2, 3)
]
runs = launch(experiments, runs=RUNS / "lecture", display=progress.Quiet(say=print), or_cpu=True)
for run in runs:
    print(f"{run.experiment.method:8}", [round(loss, 5) for loss in run.losses()])

# %%
# NBVAL_CHECK_OUTPUT
worst = max(abs(a - b) for run in runs[1:] for a, b in zip(run.losses(), runs[0].losses()))
print("largest difference below 1e-5:", worst < 1e-5)

# %% [markdown]
# And this is what each rank held, against the formulae. They are those of task 2.6: in your copy of the course the column `predicted` is what your
# own `state_bytes` says, and empty until it is written.

# %%
from shardlab.show import report

rows = []
for run in runs:
    measured, predicted = report.measured_states(run), report.predicted_states(run)
    rows.append(
        {
            "method": run.experiment.method,
            "parameters": measured.parameters,
            "gradients": measured.gradients,
            "optimizer": measured.optimizer,
            "measured": measured.device,
            "predicted": predicted and predicted.device,
        }
    )
table(rows, bytes_columns=("parameters", "gradients", "optimizer", "measured", "predicted"))

# %%
# NBVAL_CHECK_OUTPUT
known = [row for row in rows if row["predicted"] is not None]
as_predicted = all(row["measured"] == row["predicted"] for row in known)
print("all as predicted:", as_predicted if known else "write task 2.6, and come back")

# %% [markdown]
# ## Which stage
#
# Take the lowest stage that fits; between stages 0, 1 and 2 measure, if it matters. With one micro-batch per step they send the same volume.
# With more, stage 2 reduces gradients after each of them, and stages 0 and 1 after the last one only. Stage 3 sends half as much again as
# stage 2, and gathers layer by layer. Measured on H200s linked by NVLink, BLOOM-560m's shape, 512 tokens, micro-batch 8, accumulation 2, bf16:

# %%
from shardlab.show.notebook import reference

rows = []
for name in ("stages-1xh200", "stages-2xh200", "stages-4xh200"):
    rows += [
        {
            key: row.get(key)
            for key in (
                "method",
                "ranks",
                "samples_per_second",
                "mfu_percent",
                "peak_gib",
                "between_steps_bytes_per_parameter",
            )
        }
        for row in reference(name)["results"]
    ]
table(rows)

# %% [markdown]
# Read off what is worth knowing. First speed:
#
# - More ranks give more samples/s at every stage. `Trainer` reports the figure over all ranks; divide by N before you compare devices.
# - On 4 GPUs stage 1 reaches 282 samples/s, stage 2 reaches 269, stage 0 only 222: the ranks of stage 1 each step a quarter of the parameters,
#   those of stage 0 step all of them. On 1 GPU, where nobody shares the work, stage 0 is the fastest of the four. (These are `Trainer`'s
#   figures; lab 03 measures the engine by itself.) The baseline, plain DDP, steps
#   all of them too, and reaches 265: DeepSpeed's engine at stage 0 differs from DDP in more than who steps what. So read a stage's gain off another stage.
# - Stage 3 runs at about a third of stage 2's speed, on 1 GPU too (24 against 63 samples/s), where nothing is sent at all. So the link is not the
#   reason. The reason is the work around each layer, which the host does in Python: gather, wait, release, in the forward and in the backward
#   pass. A model of this size with a micro-batch of 8 is too quick for it to hide.
# - Offload frees device memory and costs throughput: the states cross the PCIe bus, and the CPU does Adam's work.
#
# Then bytes between steps, when no gradients are needed:
#
# - The baseline's 12.12 on 1 GPU are fp32 parameters (4) and Adam's moments (8); `Trainer` has let go of the gradients. DDP, on more GPUs, keeps
#   them in its communication buckets: 16.12. The 0.12 on top are smaller buffers; they are there at every stage.
# - Stages 1 and 2: 2 + 12/N. On two GPUs 8.12, on four 5.12: the bf16 parameters, and the shard of the optimizer states.
# - Stage 3: 16/N + 1.91. Its gradient shards live in one flat buffer that is kept between steps, so it is 16/N and not 14/N. The 1.91 are
#   parameters that it gathered and did not let go of: it keeps up to 10⁹ of them (`stage3_max_live_parameters`), and this model has 0.56 · 10⁹.
#   In the row of ZeRO-3 + CPU offload they stand alone.
#
# And the peak: on four GPUs it falls by 5.2 GiB from stage 0 (27.4) to stage 2 (22.2). The paper's count falls by 5.5 (from 8.33 to 2.86). The
# other 19 GiB of the 22.2 are logits and activations, which no stage shards. They can be counted without a GPU: on torch's `meta` device tensors have shapes
# and no memory, and a hook sees each one that the forward pass keeps for the backward pass. The fullest moment is the first of the backward pass: all
# that was kept is still there, and the gradients of the logits (8 sequences × 512 tokens × 250,880 words) come on top.

# %%
import torch
from transformers import AutoModelForCausalLM

from shardlab.data.models import model_config

with torch.device("meta"):
    bloom = AutoModelForCausalLM.from_config(
        model_config("bigscience/bloom-560m"), dtype=torch.bfloat16
    )
    ids = torch.zeros(8, 512, dtype=torch.long)
parameters = {p.untyped_storage()._cdata for p in bloom.parameters()}
kept = {}  # by storage: two views of one tensor take its memory once


def keep(tensor):
    if tensor.untyped_storage()._cdata not in parameters:
        kept[tensor.untyped_storage()._cdata] = tensor
    return tensor


with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
    logits = bloom(input_ids=ids, labels=ids, use_cache=False).logits

held = dict.fromkeys(
    ("attention, 512 × 512 per head", "the rest of the 24 blocks", "log-probabilities, fp32"), 0
)
for tensor in kept.values():
    of_words, of_pairs = tensor.shape[-1:] == (250_880,), tensor.shape[-2:] == (512, 512)
    name = list(held)[2 if of_words else 0 if of_pairs else 1]
    held[name] += tensor.untyped_storage().nbytes()
held |= {
    "logits, bf16": logits.nbytes,
    "gradient of the fp32 copy of the logits": 2 * logits.nbytes,
    "gradient of the logits, bf16": logits.nbytes,
}
held["all"] = sum(held.values())
table([{"what": name, "bytes": held[name]} for name in held], bytes_columns=("bytes",))

# %% [markdown]
# Three fifths of the 19 GiB are due to the vocabulary. A smaller micro-batch, activation checkpointing, or a loss computed in pieces frees them; ZeRO does not.
#
# ## Myths
#
# - *ZeRO-2 reduces activation memory.* It shards gradients. Activations belong to each rank's own micro-batch.
# - *ZeRO helps on one GPU.* Not by itself: there is nobody to share with. Offload helps there, at a price.
# - *Under ZeRO-3, `model.save_pretrained` saves the model.* Each rank would write its empty placeholders. Save through the trainer, with
#   `stage3_gather_16bit_weights_on_model_save` set.
