# %% [markdown]
# # What a training step costs
#
# Lecture for lab 01. Read it, run it, change it. Nothing here is graded.
#
# A training step takes a batch, computes a loss, computes a gradient, and lets the optimizer change the parameters. Each part costs
# memory and time. At the end you can say where the memory of a fine-tuning run goes, what padding and labels have to do with it, and
# why a model of 0.56 billion parameters needs more than 8 GiB before the first sentence is read.

# %%
import torch

from shardlab.show import report
from shardlab.zero import memory_model, held_bytes
from shardlab.data.models import load_model, load_tokenizer, parameter_count

tokenizer, model = load_tokenizer(), load_model()
print(
    f"bloom-tiny: {parameter_count(model):,} parameters, "
    f"{model.config.n_layer} layers of width {model.config.hidden_size}"
)

# %% [markdown]
# `bloom-tiny` has BLOOM's architecture, its own tokenizer, and 2.9 million parameters. It was pre-trained on generated text for this
# course, so that fine-tuning it shows something on two CPU cores. BLOOM-560m is the same architecture with 559 million.
#
# ## What the labels say
#
# A causal language model predicts each next token. The `labels` say which tokens are to be predicted, and the model shifts them by one
# itself. A label of −100 is left out of the loss.
#
# For question answering we want the model to learn the answer, not the question. So the prompt's labels are −100.

# %%
prompt = tokenizer("Question: What did the Paiwo carry? Context: The Paiwo carried tea. Answer:")[
    "input_ids"
]
answer = tokenizer(" tea")["input_ids"] + [tokenizer.eos_token_id]
ids, labels = prompt + answer, [-100] * len(prompt) + answer
for token, label in list(zip(ids, labels))[-6:]:
    print(
        f"{tokenizer.decode([token])!r:>10}  label "
        + ("−100, not taught" if label == -100 else repr(tokenizer.decode([label])))
    )

# %% [markdown]
# Two mistakes are common. With `labels = input_ids` the model also learns to write questions, and the loss is mostly about those. And if
# the end-of-sequence token `</s>` is missing, or masked, the model never learns to stop.
#
# Many tutorials set `pad_token = eos_token` and let a collator mask the padding. That collator then masks every `</s>`, the one after
# the answer too. BLOOM has a `<pad>` token of its own; use it.
#
# ## Padding
#
# A batch is a rectangle, so shorter sequences are padded. Padding costs as much as text. Mini-squad's examples have 105 tokens on
# average. Padded to 512, a batch takes 4.9 times the tokens for the same text:

# %%
mean_length = 105
print(f"{512 / mean_length:.1f} times the tokens")

# %% [markdown]
# In training, padding may stand on either side: the attention mask hides it, and its labels are −100. In generation it must stand on the
# left. The model continues the last token of each row, and that must not be padding. Look at what happens when it is:

# %%
def continue_text(rows, mask):
    output = model.generate(
        input_ids=torch.tensor(rows),
        attention_mask=torch.tensor(mask),
        max_new_tokens=5,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.decode(output[0][len(rows[0]) :])


text = tokenizer("The cargo of the Paiwo was tea. In short: The Paiwo carried")["input_ids"]
pad = [tokenizer.pad_token_id] * 8
print("alone:           ", repr(continue_text([text], [[1] * len(text)])))
print("padded left:     ", repr(continue_text([pad + text], [[0] * 8 + [1] * len(text)])))
print("padded right:    ", repr(continue_text([text + pad], [[1] * len(text) + [0] * 8])))

# %% [markdown]
# ## Where the memory goes
#
# During training a device holds:
#
# - **Model states.** Parameters, one gradient for each, and what the optimizer remembers. Adam remembers two numbers per parameter: a
#   running mean of the gradient and one of its square. They do not depend on the batch.
# - **Activations.** What the forward pass keeps for the backward pass. They grow with batch × sequence length.
# - **Temporary buffers**, such as the logits: batch × sequence × vocabulary numbers.
#
# Write Ψ for the number of parameters. Plain `Trainer` keeps everything in fp32, 4 bytes a number: 4Ψ + 4Ψ + 8Ψ = **16Ψ**. With
# `bf16=True` it still does: autocast computes in bf16, and the parameters stay in fp32. DeepSpeed in bf16 divides the 16 otherwise: 2 for
# the parameters, 2 for the gradients, and 12 for an fp32 master copy with Adam's two numbers. The ZeRO paper counts the same
# (Rajbhandari et al. 2020, arXiv 1910.02054, §3.1).

# %%
for name, parameters in (
    ("bloom-tiny", 2_866_560),
    ("BLOOM-560m", 559_214_592),
    ("BLOOM-7b1", 7_069_016_064),
):
    states = memory_model.ddp_bytes(parameters)
    print(
        f"{name:>10}: parameters {report.bytes_text(states.parameters):>9}, "
        f"gradients {report.bytes_text(states.gradients):>9}, "
        f"Adam {report.bytes_text(states.optimizer):>9}, "
        f"together {report.bytes_text(states.device):>10}"
    )

# %% [markdown]
# Do these formulae hold? Let us count what a real optimizer holds, storage by storage, between `backward` and `step`:

# %%
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for _ in range(2):
    model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.backward()
    held = held_bytes.held_bytes(model, optimizer)
    optimizer.step()
    optimizer.zero_grad()
print(
    f"held: {held.parameters:,} + {held.gradients:,} + {held.optimizer:,} = {held.device:,} bytes; "
    f"16Ψ = {16 * parameter_count(model):,}"
)

# %% [markdown]
# They hold to the byte. BLOOM ties its output layer to its embedding: one tensor with two names, counted once.
#
# For BLOOM the largest buffer is no weight. Its vocabulary has 250,880 words, so the logits of one batch of 8 sequences of 512 tokens
# take, in fp32:

# %%
print(report.bytes_text(4 * 8 * 512 * 250_880))

# %% [markdown]
# ## Time
#
# A forward pass takes about 2 FLOPs per parameter and token, the backward pass twice that: 6Ψ FLOPs per token. Attention adds 12 · layers · hidden
# size · tokens in the sequence (PaLM, arXiv 2204.02311, appendix B): for BLOOM-560m and 512 tokens, 24 layers of 1,024, another 0.15 GFLOPs on 3.36. What
# share of the device's peak is reached is called MFU, model FLOPs utilisation; the table counts both terms. Measured with this course's code on one H200, BLOOM-560m's shape, bf16 autocast:

# %%
from shardlab.show.notebook import reference, table

stages = reference("stages-1xh200")
table(
    [
        {
            key: row[key]
            for key in ("method", "micro_batch", "samples_per_second", "mfu_percent", "peak_gib")
        }
        for row in stages["results"]
        if row["method"] == "baseline"
    ]
)
print(stages["hardware"]["gpus"], stages["versions"])

# %% [markdown]
# Seven eighths of the GPU's arithmetic lie idle at this batch. That is usual for small models and small batches, and a larger batch is the first thing to
# try, before any sharding. Under ZeRO-2 in pure bf16, with one micro-batch per step, the same shape reached 62 samples/s with 8 sequences at a time, and 95
# with 32: 11 and 17 % MFU (`bench/results/offload-1xh200.json`). Compare these two with each other; the table has other settings.
#
# ## Saving
#
# `trainer.save_model(folder)` writes the weights; the tokenizer is a second call. A checkpoint that `Trainer` writes by itself
# (`save_strategy`) holds Adam's two moments too: 8 more bytes per parameter, 12 in all. In lab 01 all ranks call `save_model`, even if only one writes: when
# each rank holds a part of the weights (ZeRO-3, lab 02), they must come together first, and all ranks take part in that.
#
# ## A myth
#
# *`"train_batch_size": "auto"` finds the largest batch that fits.* It does not. `Trainer` fills in ranks × per-device batch ×
# accumulation, whatever you chose. What fits, you find by measuring.
