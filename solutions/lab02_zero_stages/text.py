# %% [markdown]
# # Lab 02: ZeRO stages
#
# **What you will have built:** a function that makes DeepSpeed configurations, a check for what DeepSpeed itself lets through, the memory model
# that predicts to the byte what each rank holds, and the table that compares stages 0 to 3, predicted and measured.
#
# **Time:** about 90 minutes. **Before it:** lab 01, and the lecture `notebooks/02_zero.ipynb`.
#
# | task | what you write | difficulty (1–5) |
# | --- | --- | --- |
# | 2.1 | a DeepSpeed configuration | 3 |
# | 2.2 | a check for bad configurations | 3 |
# | 2.3 | configurations as JSON files | 1 |
# | 2.4 | the baseline under DeepSpeed | 1 |
# | 2.5 | the size of a shard, padding included | 3 |
# | 2.6 | the bytes that a rank holds | 3 |
# | 2.7 | a row of the comparison table | 2 |
# | 2.8 | choosing a stage | 2 |
#
# You write in `src/exercises/lab02_zero_stages.py`.

# %%
from shardlab.show.notebook import RUNS, check, compare, reference, scoreboard, show, start, table

lab = start("lab02_zero_stages")

# %% [markdown]
# ## 2.1 A configuration
#
# DeepSpeed is switched on by a dictionary. Three of its keys are batch sizes, and they must multiply:
#
# $$\texttt{train\_batch\_size} = \texttt{train\_micro\_batch\_size\_per\_gpu} \times \texttt{gradient\_accumulation\_steps} \times N$$
#
# Under `Trainer` any of them may be `"auto"`. It is filled in from `TrainingArguments`. It does **not** look for the largest batch that fits.
#
# `gradient_clipping` is always written out. Left out, DeepSpeed clips at 1.0 since version 0.19.3. Where `Trainer` clips at 1.0 too, which is its
# default, nothing changes. Where it clips otherwise, or not at all (0.0), the losses are not those of the baseline, and no message says so.
#
# Complete `create_deepspeed_config(stage, …)`. Bad input is refused with a `ValueError` and a sentence.

# %%
lab.create_deepspeed_config(2, micro_batch=4, accumulation=2, world_size=2, precision="bf16")

# %%
check("2.1")

# %% [markdown]
# ## 2.2 What DeepSpeed lets through
#
# DeepSpeed checks a configuration, but not all of it. With `zero_optimisation`, spelt with an s, `deepspeed.initialize` trains at stage 0 and
# says nothing. (Under `Trainer`, accelerate asks for the section that is missing; other misspelt keys pass there too.) Your
# `check_deepspeed_config` names the key at fault.
#
# What DeepSpeed refuses by itself need not be checked a second time: `deepspeed_refuses(config, world_size)`, which is given, asks it. What
# it lets through is yours. `TOP_LEVEL_KEYS` in your file holds what deepspeed 0.19.8 reads at the top.

# %%
for config in (
    {"train_batch_size": 8, "zero_optimisation": {"stage": 2}},
    {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2},
):
    try:
        lab.check_deepspeed_config(config, world_size=2)
    except ValueError as error:
        print(error)

# %%
check("2.2")

# %% [markdown]
# ## 2.3 Files
#
# Programs that are started from a command line take their configuration as a JSON file.
#
# DeepSpeed and `Trainer` do not read the same files: DeepSpeed's reader allows comments and a comma too many, and refuses a key that is given
# twice; `Trainer`'s refuses the first two, and of the last keeps one without a word. Complete `save_config` and `load_config`, which says so.
#
# With them and your 2.1, the cell writes a file for each stage and one for offload. Open one.

# %%
configs = RUNS / "configs"
configs.mkdir(parents=True, exist_ok=True)
for stage in range(4):
    lab.save_config(lab.create_deepspeed_config(stage), configs / f"zero{stage}.json")
offload = lab.create_deepspeed_config(2, offload_optimizer=True)
lab.save_config(offload, configs / "zero2_offload.json")
print(sorted(path.name for path in configs.glob("*.json")))
lab.load_config(configs / "zero3.json")["zero_optimization"]

# %%
check("2.3")

# %% [markdown]
# ## 2.4 The baseline under DeepSpeed
#
# `TrainingArguments(deepspeed=config)` is all that changes. Model, data, batch and seed stay, and so must the losses. Complete
# `with_deepspeed(baseline, config, method)`, which makes such an experiment of a baseline.
#
# The check trains DDP, stages 0 to 3 and your own experiment on two real ranks in fp32, and compares their losses to 1e-5. The first time it takes
# about 20 seconds on two idle cores. The runs that do not depend on your code are kept, so that a second check of 2.4, and 2.6, are faster.

# %%
check("2.4")

# %% [markdown]
# ## 2.5 Shards
#
# Shards have equal sizes, so something is padded. Stages 1 and 2 join each optimizer group in one flat buffer and round it up to a multiple of
# 2N elements. Stage 3 cuts each parameter by itself.
#
# By hand, for groups `[[7, 5], [3]]` and N = 2: in stages 1 and 2, the first group has 12 elements, which is a multiple of 4, so each rank holds
# 6. The second has 3, rounded up to 4, so 2. Together 8. In stage 3: ⌈7/2⌉ + ⌈5/2⌉ + ⌈3/2⌉ = 4 + 3 + 2 = 9.
#
# Complete `shard_elements(stage, groups, ranks)`.

# %%
print(lab.shard_elements(2, [[7, 5], [3]], 2), lab.shard_elements(3, [[7, 5], [3]], 2))

# %%
check("2.5")

# %% [markdown]
# ## 2.6 Bytes
#
# A parameter in bf16 takes 2 bytes, its gradient 2, and the optimizer 12: an fp32 master copy and Adam's two moments. Stage 1 shards the optimizer
# states, stage 2 the gradients too, stage 3 the parameters too. In fp32, parameters and gradients take 4 each, and stages 1 to 3 keep their
# master copy all the same. Stage 0 in fp32 keeps none.
#
# Complete `state_bytes(stage, groups, ranks, precision)`. The check compares it with what real ranks hold, to the byte.

# %%
for stage in range(4):
    print(stage, lab.state_bytes(stage, [[1_000_000]], 4, "bf16"))

# %%
check("2.6")

# %% [markdown]
# ## Predict
#
# You will train bloom-tiny (2,866,560 parameters) in fp32 with stages 0 to 3, on one rank and on two. Write down first what you expect:
# the model states of a rank in bytes, by your own functions or in your head, and the two answers in words.

# %%
predicted_bytes = {
    "ZeRO-0, 1 rank": ...,
    "ZeRO-1, 1 rank": ...,
    "ZeRO-2, 1 rank": ...,
    "ZeRO-3, 1 rank": ...,
    "ZeRO-0, 2 ranks": ...,
    "ZeRO-1, 2 ranks": ...,
    "ZeRO-2, 2 ranks": ...,
    "ZeRO-3, 2 ranks": ...,
}
predicted_order = {"which stage is slowest on two H200s": ..., "do the losses differ here": ...}

# %% [markdown]
# ## Run
#
# These runs train on the plain text of the paragraphs, with a program of the course's own (`shardlab.run.training:train_text`), so that they do not
# depend on your lab 01. Two of them fill each table: one rank, where there is nothing to shard, and two. Each rank on a GPU needs one of its
# own. What counts here are bytes and losses, which are the same on the CPU, so with `or_cpu=True` two ranks run there on a machine with one GPU.

# %%
from shardlab.run.launch import launch
from shardlab.run.experiment import Experiment


def baseline(name, ranks, **settings):
    """An experiment without DeepSpeed; the global batch is 8 on one rank and on two."""
    return Experiment(
        name=name,
        method="DDP",
        program="shardlab.run.training:train_text",
        ranks=ranks,
        micro_batch=4 // ranks,
        accumulation=2,
        steps=8,
        learning_rate=1e-3,
        max_tokens=64,
        train_examples=128,
        evaluate=False,
        save=False,
        **settings,
    )


def stages(ranks):
    """Stages 0 to 3 with your functions."""
    return [
        lab.with_deepspeed(
            baseline(f"lab02-{ranks}", ranks), lab.create_deepspeed_config(stage), f"ZeRO-{stage}"
        )
        for stage in range(4)
    ]


alone = launch(stages(1), runs=RUNS)

# %%
together = launch(stages(2), runs=RUNS, or_cpu=True)

# %% [markdown]
# ## 2.7 The table
#
# A run folder holds all that is left of a run. Complete `comparison_row(run)`, which makes a row of the table from one.

# %%
check("2.7")

# %%
rows = [lab.comparison_row(run) for run in alone + together]
table(rows, bytes_columns=("measured", "predicted"))

# %% [markdown]
# ## Compare

# %%
measured_bytes = {
    f"{row['method']}, {row['ranks']} rank{'s' if row['ranks'] > 1 else ''}": row["measured"]
    for row in rows
}
course = {
    "ZeRO-0, 1 rank": 45_864_960,
    "ZeRO-1, 1 rank": 57_331_200,
    "ZeRO-2, 1 rank": 57_331_200,
    "ZeRO-3, 1 rank": 57_331_200,
    "ZeRO-0, 2 ranks": 45_864_960,
    "ZeRO-1, 2 ranks": 40_131_840,
    "ZeRO-2, 2 ranks": 34_398_720,
    "ZeRO-3, 2 ranks": 28_665_600,
}
compare(measured_bytes, predicted_bytes, course, unit="bytes", reference_name="course, fp32")

# %%
on_two = [
    row
    for row in reference("stages-2xh200")["results"]
    if row["method"] in ("ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3")
]
slowest = min(on_two, key=lambda row: row["samples_per_second"])["method"]
differ = max(abs(a - b) for run in together for a, b in zip(run.losses(), together[0].losses()))
compare(
    {
        "which stage is slowest on two H200s": slowest,
        "do the losses differ here": f"by {differ:.1e}",
    },
    predicted_order,
)

# %% [markdown]
# On one rank stages 1 to 3 hold *more* than stage 0, and this is fp32's doing: the master copy is a second copy of the same numbers, and there is
# nobody to share it with. In bf16 all four hold 16 bytes per parameter on one rank.
#
# The samples/s in your table say little about the stages. Two CPU cores do the work of both ranks here, the runs are short, and what else the
# machine does shows in them. Bytes and losses are exact; for speed, read the reference below.
#
# ## Break it
#
# A wrong configuration seldom stops a run. Take the key of 2.1: `gradient_clipping`. Here are three runs of which none should clip: DDP with
# clipping 0, ZeRO-2 with `"gradient_clipping": 0.0`, and ZeRO-2 without the key. They begin with random weights, where gradients are large. How far
# from DDP's will the losses of each be after 8 steps: 1e-7, 1e-3, 1?

# %%
predicted_distance = {"gradient_clipping 0.0": ..., "gradient_clipping left out": ...}

# %%
unclipped = baseline("lab02-break", 2, clipping=0.0, random_weights=True)
config = lab.create_deepspeed_config(2, clipping=0.0)
without = {key: value for key, value in config.items() if key != "gradient_clipping"}
broken = [
    unclipped,
    lab.with_deepspeed(unclipped, config, "gradient_clipping 0.0"),
    lab.with_deepspeed(unclipped, without, "gradient_clipping left out"),
]
broken = launch(broken, runs=RUNS, or_cpu=True)
ddp = broken[0].losses()
compare(
    {run.experiment.method: abs(run.losses()[-1] - ddp[-1]) for run in broken[1:]},
    predicted_distance,
)

# %% [markdown]
# No message told. And from the trained weights of the runs before it would not show: there the gradients' norm stays below 1, so that nothing is
# clipped at 1.0. A mistake can wait for the data that brings it out; compare configurations, not only curves.
#
# ## The reference
#
# The same code and command on H200s (`python bench/stages.py --ranks N`), BLOOM-560m's shape in bf16, sequences of 512, micro-batch 8,
# accumulation 2. Left, how fast; right, what a rank holds by your formula, gradients included. (Offload needs another formula, that of lab 04; for it
# the figure shows what a rank holds on GPU and host together, without the gradients that ZeRO-2 + CPU offload collects on the host over micro-batches.)

# %%
import matplotlib.pyplot as plt

gpus = (1, 2, 4)
h200 = {count: reference(f"stages-{count}xh200")["results"] for count in gpus}
figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
for place, count in enumerate(gpus):
    rows = h200[count]
    heights = [line + 0.25 * (place - 1) for line in range(len(rows))]
    label = f"{count} GPU{'s' if count > 1 else ''}"
    axes[0].barh(heights, [row["samples_per_second"] for row in rows], 0.25, label=label)
    axes[1].barh(heights, [row["held_bytes_per_parameter"] for row in rows], 0.25)
axes[0].set(xlabel="samples/s", yticks=range(len(rows)))
axes[0].set_yticklabels([row["method"] for row in rows])
axes[0].invert_yaxis()
axes[1].set(xlabel="held, bytes per parameter")
axes[0].legend();

# %% [markdown]
# On one GPU, ZeRO-2 is 13 % slower than the baseline and holds as much. On four, ZeRO-1 and ZeRO-2 are faster than it, since each GPU steps a quarter of
# the optimizer. Stage 3 holds least, and is 3.0 to 3.6 times slower here: it gathers each layer's parameters anew, and these layers are small.
#
# The figures of 4 GPUs. MFU is the part of the GPU's peak that the model's own operations made use of (lecture 01). *Between steps* is what the
# allocator still had between two steps, bytes per parameter; the lecture explains its figures one by one.

# %%
table(
    [
        {
            "method": row["method"],
            "samples/s": row["samples_per_second"],
            "MFU %": row["mfu_percent"],
            "peak GiB": row["peak_gib"],
            "held": row["held_bytes_per_parameter"],
            "between steps": row["between_steps_bytes_per_parameter"],
        }
        for row in h200[4]
    ]
)
measured = reference("stages-4xh200")
print(measured["hardware"]["gpus"][0], measured["versions"], measured["date"])

# %% [markdown]
# ## 2.8 Choosing
#
# Take the lowest stage that fits. Stages 1 and 2 communicate as much as DDP does, 2Ψ elements per step; stage 3 communicates 3Ψ (ZeRO paper, §7).
#
# Complete `choose_stage(parameters, ranks, device_bytes, other_bytes)`.

# %%
for parameters, name in ((559_214_592, "BLOOM-560m"), (7_069_016_064, "BLOOM-7b1")):
    for ranks, gib in ((1, 16), (2, 10), (4, 7), (4, 40), (8, 80)):
        try:
            stage = f"stage {lab.choose_stage(parameters, ranks, gib * 2**30, 4 * 2**30)}"
        except ValueError as error:
            stage = str(error)
        print(f"{name} on {ranks} × {gib} GiB, 4 GiB of it for activations: {stage}")

# %%
check("2.8")

# %%
show(together)

# %% [markdown]
# ## Your points
#
# All tasks of the lab at once, with the points that `pytest labs` gives, and what to do next.

# %%
scoreboard("lab02_zero_stages")

# %% [markdown]
# ## Questions
#
# 1. Stage 2 holds less than stage 1. When in a step does the difference exist, and when not?
# 2. On 4 GPUs, stages 1 and 2 held 5.12 bytes per parameter between steps. Where do the 5 come from?
# 3. Stage 3 with default settings held 5.91 bytes per parameter between steps on 4 GPUs, and not 16/4. Which setting is behind it?
# 4. Somebody's losses under ZeRO-2 differ from DDP's in the third digit, in fp32. Which key of the configuration do you look at first?
#
# <details><summary>Answers</summary>
#
# 1. While gradients are accumulated: stage 1 keeps whole gradients between micro-batches, stage 2 only a shard. After the step both have none.
# 2. 2 for the bf16 parameters, which stages 1 and 2 hold whole, and 12 / 4 = 3 for the shard of the optimizer states.
# 3. `stage3_max_live_parameters`: up to 10⁹ gathered parameters are kept, and the whole model has fewer. So 2 bytes per parameter stay gathered.
# 4. `gradient_clipping`. Left out, DeepSpeed clips at 1.0, and a baseline that clips otherwise does not.
# </details>
#
# ## Going further
#
# - Put `"stage3_max_live_parameters": 1` and `"stage3_max_reuse_distance": 0` into stage 3's configuration. What happens to the speed?
# - Use your own lab 01: set `program="exercises.lab01_baseline:finetune"` in the baseline, and compare exact match across stages.
# - On a machine with a GPU, run `python bench/stages.py --ranks 1 --out mine.json` and put your figures next to the reference.
