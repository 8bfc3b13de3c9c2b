# %% [markdown]
# # Lab 01: baseline
#
# **What you will have built:** the fine-tuning of BLOOM on question answering with the plain Hugging Face `Trainer`, every piece of it yours:
# prompt, labels, batches, settings, saving, generating, and the tables that say what it cost.
#
# **Time:** about 60 minutes. **Before it:** the lecture `notebooks/01_training_step.ipynb`.
#
# | task | what you write | difficulty (1–5) |
# | --- | --- | --- |
# | 1.1 | the prompt | 1 |
# | 1.2 | a prompt that fits | 3 |
# | 1.3 | labels that teach the answer only | 2 |
# | 1.4 | a batch, padded to its longest example | 2 |
# | 1.5 | the training settings | 2 |
# | 1.6 | save and reload | 2 |
# | 1.7 | generate answers | 3 |
# | 1.8 | the training summary | 2 |
# | 1.9 | the memory table | 2 |
#
# You write in `src/exercises/lab01_baseline.py`. Save the file, and the next cell that you run here uses it. `check("1.1")` runs the same
# milestone as `pytest labs`. A task that is not written yet raises `NotImplementedError` with its number; so do the cells that call it.

# %%
from shardlab.show.notebook import RUNS, check, compare, scoreboard, show, start, table

lab = start("lab01_baseline")

# %% [markdown]
# ## The data
#
# SQuAD has paragraphs, questions about them, and answers that stand in the paragraph word for word. `load_squad("mini")` gives data of the
# same form that was generated for this course. Its names are made of syllables, so no model can know them by heart: the answer must be
# found in the paragraph. On a GPU, `load_squad("squad")` gives the real one, and `load_squad("train.json")` reads a file.

# %%
from shardlab.data.datasets import load_squad
from shardlab.data.models import load_model, load_tokenizer

data = load_squad("mini")
tokenizer = load_tokenizer("bloom-tiny")
row = data["train"][0]
print({split: len(rows) for split, rows in data.items()})
print(row["context"])
print(row["question"], "→", row["answers"]["text"][0])

# %% [markdown]
# ## 1.1 The prompt
#
# A causal language model continues a text. So we write a text whose natural continuation is the answer:
#
# > Question: *…* Context: *…* Answer:
#
# No space at the end: the answer brings its own. To a BPE tokenizer `" tea"` is one thing, and `" "` followed by `"tea"` is another.
#
# Complete `format_prompt(question, context) -> str`.

# %%
print(lab.format_prompt(row["question"], row["context"]))

# %%
check("1.1")

# %% [markdown]
# ## 1.2 A prompt that fits
#
# No sequence may be longer than `max_tokens`. What is too long must be cut, but not anywhere: cut the ids at the end, and "Answer:" is
# gone; cut them at the front, and the question is gone. So the context gives way, word by word from its end. A word here is what stands
# between two single spaces: line breaks and double spaces stay as they are.
#
# (The answer may stand in the part that was cut off. When we train, we could look where it is. When the model is used, nobody knows. So
# both are cut in the same way.)
#
# Complete `encode_prompt(tokenizer, question, context, max_tokens) -> list[int]`.

# %%
ids = lab.encode_prompt(tokenizer, row["question"], row["context"], 40)
print(len(ids), "tokens:", tokenizer.decode(ids))

# %%
check("1.2")

# %% [markdown]
# ## 1.3 Labels
#
# An example is the prompt, the answer, and `</s>`. Its labels are −100 over the prompt, so that the loss is the mean over the answer's tokens:
#
# $$\text{loss} = -\frac{1}{|A|}\sum_{t \in A} \log p(x_t \mid x_{<t}), \qquad A = \text{tokens of the answer and } \texttt{</s>}$$
#
# The model shifts the labels by one itself; you do not.
#
# Complete `encode_example(tokenizer, question, context, answer, max_tokens)`. The answer is never cut: the prompt gets what it leaves over.

# %%
example = lab.encode_example(
    tokenizer, row["question"], row["context"], row["answers"]["text"][0], 192
)
taught = [token for token in example["labels"] if token != -100]
print(
    f"{len(example['input_ids'])} tokens, "
    f"{len(taught)} of them taught: {tokenizer.decode(taught)!r}"
)

# %%
check("1.3")

# %% [markdown]
# ## 1.4 A batch
#
# A batch is padded to its own longest example, not to 512. Mini-squad's examples have 105 tokens on average, so padding to 512 would
# make each step compute about five times as much for nothing.
#
# Complete `collate(examples, pad_token_id)`. Padding is 0 in the attention mask and −100 in the labels.

# %%
batch = lab.collate(
    [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9], "labels": [-100, 9]}],
    tokenizer.pad_token_id,
)
for name, tensor in batch.items():
    print(f"{name:15}", tensor.tolist())

# %%
check("1.4")

# %% [markdown]
# ## 1.5 The settings
#
# The **global batch** is micro-batch × accumulation × ranks. With 4 sequences per device and accumulation over 4, one device makes one
# optimizer step from 16 sequences, and holds the activations of 4 at a time.
#
# Complete `training_arguments(output_dir, precision=…, **overrides)`. The docstring lists the settings.
#
# Two things stand wrong in many tutorials. What they call `evaluation_strategy` has been `eval_strategy` since transformers 4.41, and the old
# name is refused today. And `report_to` is `"none"` by default since transformers 5; before, every installed reporting service was used.

# %%
arguments = lab.training_arguments(str(RUNS / "lab01-try"))
print(
    arguments.per_device_train_batch_size,
    "×",
    arguments.gradient_accumulation_steps,
    "sequences per device and step,",
    arguments.learning_rate,
)

# %%
check("1.5")

# %% [markdown]
# ## 1.6 Save and reload
#
# A model that was never read back from its folder may not be there. Save through the trainer, add the tokenizer, and load both as a stranger
# would. All ranks call your function: the check runs it on two ranks, plain and under ZeRO-3, where each rank holds half of every weight.
# Only rank 0 writes. So there must be one point that no rank passes before rank 0 has written everything, weights and tokenizer, and the
# reading comes after it. `trainer.accelerator.wait_for_everyone()` is such a point, if all ranks reach it. The check takes 10 to 20 seconds; a rank that waits for ever is ended after a minute.
#
# Complete `save_and_reload(trainer, tokenizer, folder)`.

# %%
check("1.6")

# %% [markdown]
# ## 1.7 Generate
#
# To generate, pad on the **left**: the model continues the last token of each row, and that must be the prompt's. The output holds the
# prompt too; decode the new tokens only.
#
# Complete `generate_answers(model, tokenizer, prompts, max_new_tokens)`. The model below has not been fine-tuned: it continues the text
# as its pre-training taught it, and does not know yet that an answer is wanted.

# %%
model = load_model("bloom-tiny")
prompts = [
    lab.encode_prompt(tokenizer, r["question"], r["context"], 192)
    for r in data["validation"].select(range(3))
]
for text in lab.generate_answers(model, tokenizer, prompts, max_new_tokens=12):
    print(repr(text))

# %%
check("1.7")

# %% [markdown]
# ## 1.8 and 1.9 The tables
#
# `Trainer` keeps a log, `trainer.state.log_history`: a list of dictionaries, one for each time it logged something. The run folder keeps
# it too. Your `summarise_training` makes the training summary of it.
#
# While a run goes on, the course samples the memory in use ten times a second, into `memory.csv`: `rank0` is the resident host memory of
# rank 0's process, and `gpu0` the memory in use on its GPU. Your `memory_table` gives peak, mean and minimum of each.

# %%
check("1.8")
check("1.9")

# %% [markdown]
# ## Predict
#
# Now everything runs together. The experiment below fine-tunes on one rank. Before you run it, write down what you expect. Replace each
# `...` by a number; nobody sees it but you.

# %%
from shardlab.hardware import best_precision, size

tiny = size() == "tiny"
predicted = {
    "optimizer steps per epoch (whole epochs, batch 4 × 4)": ...,
    "exact match before training, %": ...,
    "exact match after training, %": ...,
    "bytes of parameters, gradients and Adam's states (16Ψ, Ψ = 2,866,560)": ...,
}

# %% [markdown]
# ## Run
#
# An `Experiment` says what to train, and `launch` runs it on ranks: processes of their own, here and on a cluster alike. The learning rate is
# 1e-3, since the tiny model is far smaller than the one that 5e-5 is meant for. It takes about a minute on two cores.

# %%
from shardlab.run.launch import launch
from shardlab.run.experiment import Experiment

experiment = Experiment(
    name="lab01-baseline",
    program="exercises.lab01_baseline:finetune",
    method="baseline",
    ranks=1,
    model="bloom-tiny",
    data="mini",
    precision=best_precision(),
    micro_batch=4,
    accumulation=4,
    steps=120,
    learning_rate=1e-3,
    max_tokens=192,
    eval_examples=200,
    options={"answer_at": [40, 80, 120]},  # optimizer steps after which it answers 64 questions
)
run = launch(experiment, runs=RUNS)[0]

# %% [markdown]
# ## Compare

# %%
summary = lab.summarise_training(run.results["log_history"])
measured = {
    "optimizer steps per epoch (whole epochs, batch 4 × 4)": summary["steps_per_epoch"],
    "exact match before training, %": run.results["exact_match_before"],
    "exact match after training, %": run.results["exact_match"],
    "bytes of parameters, gradients and Adam's states (16Ψ, Ψ = 2,866,560)": sum(
        run.states()["ranks"][0].values()
    ),
}
course = {
    "optimizer steps per epoch (whole epochs, batch 4 × 4)": 157,
    "exact match before training, %": 0.0,
    "exact match after training, %": 76.0,
    "bytes of parameters, gradients and Adam's states (16Ψ, Ψ = 2,866,560)": 45_864_960,
}
compare(measured, predicted, course, reference_name="course, 2 CPU cores")

# %%
table([{name: value for name, value in summary.items() if name != "eval_losses"}])
table(
    [
        {"epoch": round(epoch, 2), "loss on held-out text": round(loss, 3)}
        for epoch, loss in summary["eval_losses"].items()
    ]
)
table(
    [
        {"device": device, **{name: f"{mib:.0f} MiB" for name, mib in row.items()}}
        for device, row in lab.memory_table(run.folder / "memory.csv").items()
    ]
)

# %%
show(run)

# %% [markdown]
# The process takes hundreds of MiB, and the model states 44 of them. The rest is Python, torch and the activations. On a GPU with a real model
# it is the other way round.
#
# ## While it learns
#
# The same five questions at four points of the training, and the share of 64 questions that were answered exactly.

# %%
import matplotlib.pyplot as plt

on_the_way = run.results["on_the_way"]
table(
    [
        {"right answer": example["answer"]}
        | {f"step {point['step']}": point["answers"][number] for point in on_the_way}
        for number, example in enumerate(run.results["examples"])
    ]
)
figure, left = plt.subplots(figsize=(7, 3))
left.plot(run.losses(), color="tab:blue")
left.set(xlabel="optimizer step", ylabel="training loss")
right = left.twinx()
steps = [point["step"] for point in on_the_way]
right.plot(steps, [point["exact_match"] for point in on_the_way], "o-", color="tab:orange")
right.set(ylabel="exact match, %", ylim=(0, 100));

# %% [markdown]
# ## Break it
#
# What does one token do? The same training, 40 steps of it, and the `</s>` is cut off from every example before the model sees it. The plot above says
# what exact match is with it after 40 steps. Without it? And what will the answers look like?

# %%
predicted_match = {"exact match after 40 steps without </s>, %": ...}

# %%
changes = {"steps": 40, "eval_examples": 64, "options": {"end_of_sequence": False}}
endless = experiment.model_copy(update={"name": "lab01-endless", **changes})
endless = launch(endless, runs=RUNS)[0]
name = "exact match after 40 steps without </s>, %"
reached = {name: endless.results["exact_match"]}
compare(reached, predicted_match, {name: 0.0}, reference_name="course, 2 CPU cores")
table(endless.results["examples"])

# %% [markdown]
# Nothing in training tells: the loss falls as before. Some answers begin as they should, and none ends before `max_new_tokens` ends it. So look
# at what a model writes, early; a loss does not show it.
#
# ## Your points
#
# All tasks of the lab at once, with the points that `pytest labs` gives, and what to do next.

# %%
scoreboard("lab01_baseline")

# %% [markdown]
# ## Questions
#
# 1. The loss falls from about 8.7 to 0.2, but exact match stays at 0 for some time. Why?
# 2. Eval loss is a mean over tokens. Can it fall while exact match falls too?
# 3. You double the accumulation and halve the micro-batch. Which of these change: global batch, optimizer steps per epoch, memory of the model
#    states, memory of the activations?
# 4. `final_train_loss` and `train_loss` in the log differ. Which is larger in a run that goes well?
#
# <details><summary>Answers</summary>
#
# 1. An answer is exactly right only if all its tokens are. First the model learns the form (a name, a number, then stop), which takes most of
#    the loss away, and then to copy the right one.
# 2. Yes. The loss falls if the model grows surer of most tokens, while one wrong token more spoils an answer.
# 3. Global batch and steps stay. Model states stay. Activations halve: they belong to one micro-batch.
# 4. `train_loss` is the mean over all steps, the early ones included, so it is larger.
# </details>
#
# ## Going further
#
# - Run with `learning_rate=5e-5` and compare. How many epochs would it need?
# - Replace `data="mini"` by the path of a SQuAD JSON file, with `max_tokens=384`. Real text is harder for a model that never saw any.
# - On a cluster, `shardlab slurm submit baseline --follow` runs this as a batch job. `slurm/local_cluster.sh up` starts one on a laptop.
