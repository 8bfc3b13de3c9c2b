# %% [markdown]
# # From a loop to a Trainer
#
# Lecture for lab 07. Read it, run it, change it. Nothing here is graded.
#
# Many projects have a loop that somebody wrote by hand, and it works. `Trainer` brings mixed precision, checkpoints, evaluation, logging, several ranks and DeepSpeed, in a line each. What it takes
# away is the view of what happens. So a migration goes in small steps, and after each the losses are the ones of before, to 1e-5. Where they are not, something was changed that nobody meant to.
#
# ## Losses for labels that are mostly 0
#
# A comment of our data has about two of sixteen labels. Binary cross-entropy counts each of the 16 entries the same, so most of its gradient says "0". Two losses let an entry count less that the model
# gets right already. With $p = \sigma(z)$:
#
# $$\text{focal:}\quad -y\,(1-p)^\gamma \log p - (1-y)\,p^\gamma \log(1-p)$$
#
# $$\text{asymmetric:}\quad -y\,(1-p)^{\gamma_+} \log p - (1-y)\,q^{\gamma_-} \log(1-q), \qquad q = \max(p - m, 0)$$
#
# The second treats the two labels differently: with $m = 0.05$ a negative with $p \le 0.05$ costs nothing at all (without label smoothing). With $\gamma = 0$ and $m = 0$ both are cross-entropy.

# %%
import matplotlib.pyplot as plt
import torch

z = torch.linspace(-6, 6, 200)
p = torch.sigmoid(z)
q = (p - 0.05).clamp(min=0)
figure, axis = plt.subplots(figsize=(6, 3))
axis.plot(p, -torch.log(1 - p), label="cross-entropy")
axis.plot(p, -(p**2) * torch.log(1 - p), label="focal, γ = 2")
axis.plot(p, -(q**4) * torch.log(1 - q), label="asymmetric, γ₋ = 4, m = 0.05")
axis.set(xlabel="p of a label that is 0", ylabel="its loss", ylim=(0, 3))
axis.legend()

# %% [markdown]
# Take $\log p$ and $\log(1-p)$ from `logsigmoid`, never of a sigmoid: in float32 $\sigma(20)$ is 1, and $\log(1 - 1)$ is −∞. With a clip, $1 - q = \min(\sigma(-z) + m, 1)$ is never below $m$, and its logarithm harmless.

# %%
z = torch.tensor([10.0, 20.0, 100.0])
print(torch.log(1 - torch.sigmoid(z)))
print(torch.nn.functional.logsigmoid(-z))

# %% [markdown]
# ## What moves where
#
# | in the loop (`src/shardlab/run/multilabel.py`) | with `Trainer` |
# | --- | --- |
# | `torch.randperm` with a seed per epoch | a sampler with `set_epoch`: `_get_train_sampler` |
# | batches of `batch_size` rows | `per_device_train_batch_size`; the batches are dealt to the ranks in turn |
# | one GPU | all that a plain `python` process sees, through `DataParallel`: with two, each batch is twice as large (4 steps became 2 on two H200s). `torchrun`, or `CUDA_VISIBLE_DEVICES=0` |
# | rows that are over are left out | the sampler leaves them out. `dataloader_drop_last=True` does so too, but it also leaves rows out of **evaluation and prediction** |
# | two groups of parameters, decay on one | the same: transformers leaves biases and layer norms without decay |
# | `AdamW(lr=…)` | `optim="adamw_torch"`; the default is the fused one, which is as right |
# | `LambdaLR` to 0 | `lr_scheduler_type="linear"`, `warmup_steps=0` |
# | `clip_grad_norm_(…, params.clipping)` | `max_grad_norm`; under DeepSpeed `gradient_clipping`, and "auto" takes it from there |
# | the loss, divided by the labels of the step | `compute_loss` with `num_items_in_batch` |
# | `loss.backward()` | `accelerator.backward(loss)` in `training_step`; under DeepSpeed it steps too |
# | `optimizer.step(); schedule.step(); zero_grad()` | `Trainer`, after the step's last micro-batch |
#
# **Seeds.** `seed` is set when the `Trainer` is made, and draws dropout. A head's new weights are drawn when the model is made, before that: set a seed there. The order of the rows comes from the sampler; transformers' own
# one draws a seed from torch's generator, so it changes when anything before it draws. Augmentation needs a seed of its own, or an additional word masked changes which neurons are dropped.
#
# **Precision.** The loop computes in float32. So does `Trainer`, until `bf16=True`: then it computes under autocast, and rounds to 8 bits of mantissa. No comparison to 1e-5 is possible any more. Move first, change precision after that.
#
# ## A mean over the step, not a mean of means
#
# Two micro-batches with 10 and 30 labels: the mean over 40 labels is not the mean of the two means. On ranks it is the same story.

# %%
first, second = torch.arange(10.0), torch.arange(30.0)
print("mean over all:", torch.cat([first, second]).mean().item())
print("mean of means:", (first.mean() + second.mean()).item() / 2)

# %% [markdown]
# transformers 5 counts the labels that are not −100 in all micro-batches of a step, on all ranks, and hands the number to `compute_loss` as `num_items_in_batch`. But only if it believes that somebody will use it: if the model's `forward` has
# `**kwargs`, if there is a `compute_loss_func`, or if you set `model_accepts_loss_kwargs`. Otherwise it is None, and the loss is divided by the accumulation (`loss_is_scaled_for_ga`).
#
# DDP and DeepSpeed *average* gradients over the ranks. A rank that divides its sum by the labels of all ranks gets a share of the mean; the average of $N$ shares is a $N$th of it. So it is multiplied by the number of ranks.
#
# ## Adversarial training
#
# The fast gradient method moves the word embeddings by $\varepsilon g / \lVert g \rVert$, where the loss grows most, and adds the gradients that the model has there. It costs a second forward and backward pass.
#
# Three things go wrong in scripts that one finds:
#
# - the gradient is read from `weight.grad`, where under accumulation those of earlier micro-batches lie too. Under ZeRO-2 nothing lies there: each gradient is reduced and let go;
# - the weights are put back by subtracting what was added. In floating point that is not what was there before;
# - the second backward pass comes after DeepSpeed's step. accelerate calls `engine.backward` and `engine.step` in one.
#
# | | DDP | DeepSpeed by way of accelerate |
# | --- | --- | --- |
# | first pass | gradients | gradients, **step** |
# | embeddings moved | | |
# | second pass | gradients are added | gradients, **step** with moved embeddings |
# | embeddings put back | | the old values are written over the new ones: the step is undone |
# | step | as it should be | |
#
# So the first pass is told that no step is due (`no_step`), and the embeddings are put back between the second pass and its step (`before_step`). Both passes' gradients are summed, so clipping sets in sooner; and dropout draws new masks in the second. LoRA freezes the
# embeddings, so there is no gradient to follow: the two do not go together.
#
# ## Dropout many times, and words that are missing
#
# Multi-sample dropout computes the head for several masks and takes the mean: more masks for the price of a small layer. Masked words are another kind of noise, on the input. If which word is masked depends on
# seed, epoch and row alone (and on its place in the row), then a run on two ranks masks what a run on one does.
#
# ## LoRA
#
# Beside a weight $W$ of shape $[o, i]$ stand $A$, $[r, i]$, and $B$, $[o, r]$; the layer computes $Wx + \frac{\alpha}{r} BAx$. $B$ begins at 0, so the model begins as it was. Trained are $r(o + i)$ numbers in place of $oi$. For
# graphcodebert-base with $r = 8$ beside query and value:

# %%
hidden, layers, rank = 768, 12, 8
update = layers * 2 * rank * (hidden + hidden)
head = hidden * hidden + hidden + hidden * 16 + 16
share = (update + head) / 124.7e6
print(f"{update:,} and the head's {head:,}: {share:.2%} of 124.7 million")

# %% [markdown]
# With mixed precision a trained parameter takes 16 bytes (lecture 02), a frozen one 2 or 4. peft does it in two lines: `LoraConfig(r=…, lora_alpha=…, target_modules=[…], modules_to_save=["classifier"])` says where, and `get_peft_model` puts the matrices there. It takes
# a target by the end of a layer's name, so `dense` is found in each layer; in the head too, but what is trained whole peft leaves out by itself. To export, $W + \frac{\alpha}{r} BA$ is written into the weight: nothing of peft is left, and nothing is slower.
#
# ## Metrics
#
# Micro F1 counts all entries together, so the frequent labels decide. Macro F1 is a mean over labels, so a label with four positives counts as much as one with four hundred. A label without any positive has no recall. Taking it for 0 punishes
# the model for the data, taking it for 1 rewards it: leave it out, and name it. `torchmetrics` counts; which rows and labels are counted is up to you.
#
# ## Thresholds
#
# A label that is seldom more likely than not is never predicted at 0.5, however well the model ranks. Where F1 is best lies lower. It is looked for on rows that the model was not trained on, and reported on rows
# that it was not looked for on: on the same ones it is too good, and the fewer positives there are the more. With labels that are pure chance:

# %%
torch.manual_seed(0)
chance, truth = torch.rand(2, 200), (torch.rand(2, 200) < 0.05).long()
f1 = lambda p, y, t: (2 * ((p >= t) & (y == 1)).sum() / ((p >= t).sum() + y.sum())).item()
steps = [0.05 * n for n in range(1, 20)]
best = max(steps, key=lambda t: f1(chance[0], truth[0], t))
print(f"threshold {best:.2f}: {f1(chance[0], truth[0], best):.3f} on its own rows,", end=" ")
print(f"{f1(chance[1], truth[1], best):.3f} on others")

# %% [markdown]
# ## Folds
#
# In k-fold cross-validation each row is asked about once, by a model that has not seen it. The **out-of-fold** table of these answers is what thresholds are fitted on. With rare labels chance may leave a fold without one: iterative stratification deals
# the rarest label first, then the next, each to the fold that lacks it most. It is a heuristic: with labels that come together the shares are near what they should be, and not equal.
#
# ## A configuration that refuses slips
#
# A key with a slip of the pen is worse than an error: the default is used, and the run is done before anybody sees it. So unknown keys are refused, with their line. Numbers in quotes are texts. And so is this:

# %%
import yaml

print(yaml.safe_load("a: 1e-3\nb: 1.0e-3\nc: no"))

# %% [markdown]
# ## What DeepSpeed adds by one line
#
# `deepspeed: zero2.json`. With the trainer of the lab the losses stay the same, to 1e-5: its check 7.3 asks for that. What each rank holds before a step, measured with our classifier of 352,624 parameters, on two ranks:

# %%
from shardlab import progress
from shardlab.run.experiment import Experiment
from shardlab.run.launch import launch_each
from shardlab.show.notebook import RUNS, table

settings = {
    "program": "shardlab.course.lectures:classify",
    "ranks": 2,
    "micro_batch": 4,
    "accumulation": 4,
    "steps": 3,
    "max_tokens": 64,
    "train_examples": 64,
    "evaluate": False,
    "save": False,
}
auto = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
experiments = [Experiment(name="lecture-ddp", **settings)]
for stage in (1, 2, 3):
    config = auto | {"zero_optimization": {"stage": stage}}
    experiments.append(Experiment(name=f"lecture-zero{stage}", deepspeed=config, **settings))
runs = launch_each(
    experiments, runs=RUNS / "lecture", display=progress.Quiet(say=print), or_cpu=True
)
rows = []
for run in runs:
    states = run.states()
    held = {kind: states["ranks"][0][kind] for kind in ("parameters", "gradients", "optimizer")}
    total = sum(held.values()) / states["parameters"]
    rows.append({"run": run.name} | held | {"bytes per parameter": round(total, 2)})
table(rows)

# %% [markdown]
# In float32 DDP holds $4 + 4 + 8 = 16$ bytes per parameter: weight, gradient, Adam's two moments. DeepSpeed steps on a copy of the weights of its own, 4 bytes more, which is sharded as the moments are: $12/N$. Just before
# the step ZeRO-1 has reduced its gradients to a shard as well, so it holds what ZeRO-2 does, $4 + 4/N + 12/N$: 12 on two ranks. (While micro-batches add up, ZeRO-1 holds all of them.) ZeRO-3 shards the weights too: $20/N$, 10. For a model as small as
# ours it buys nothing; it is here so that you know that nothing was lost on the way.
#
# Now look at the losses of these runs (of 64 rows, without those that lack a label), of the first step and of the second:

# %%
table([{"run": run.name} | dict(zip(("step 1", "step 2"), run.losses())) for run in runs])

# %% [markdown]
# A loss for sixteen labels of which nothing is known yet is $\log 2 = 0.69$. The first step, of four micro-batches on two ranks, reports eight times that; the second, of one micro-batch on two ranks, twice. These runs take the loss of transformers' own model, which is a mean. Its `forward` has `**kwargs`, so `Trainer` believes that
# the model has divided by the labels of the step, and does not divide by the 4 micro-batches; then it multiplies by the 2 ranks. The second step is the last of its epoch, with one micro-batch. (transformers 5.23; known as
# [issue 47688](https://github.com/huggingface/transformers/issues/47688).) Adam divides a constant factor out again, clipping does not, and here the factor is not even constant. Your own `compute_loss` of task 7.3 has none of it.
#
# ## A check list for your own code
#
# 1. Fix all seeds, switch dropout off, use float32, take 50 rows. Write the loop's losses down.
# 2. `Trainer` on one rank: the same losses? If only the first is: optimizer or schedule. If not even that one: data order, loss, or dropout.
# 3. With accumulation: the same as with batches that are as large?
# 4. On two ranks with half the micro-batch: the same?
# 5. With a DeepSpeed file of stage 1, 2, 3: the same?
# 6. Now dropout, precision, a longer run: compare the curves by eye.
