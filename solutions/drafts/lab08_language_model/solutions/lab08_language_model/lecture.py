# %% [markdown]
# # A language model from text to checkpoint
#
# Lecture for lab 08. Read it, run it, change it. Nothing here is graded.
#
# A training script that grew has everything in one file: where the text comes from, how ranks are started, what is saved. It works on one machine, for one model, until somebody needs another. A project
# that is copied and lives on has the same parts, apart:
#
# | part | knows | does not know |
# | --- | --- | --- |
# | where texts come from | files, names on the hub | tokens, ranks |
# | tokens, blocks, shares | a tokenizer, how many ranks there are | the model, DeepSpeed |
# | training, evaluation, generation | a model or engine, batches | launchers, files |
# | the engine | PyTorch alone or DeepSpeed, precision | the text |
# | the program | all of them, in which order | how any of them works |
#
# What it buys: each part can be tested by itself, on one CPU core, in a second. "Does two ranks' share of the blocks make up the whole?" takes no GPU. And what fails on eight GPUs is then one of the few
# things that need eight GPUs.
#
# ## From documents to blocks
#
# Sixty paragraphs, and the tokenizer and model of lab 01:

# %%
import math

import torch

from shardlab.data.minisquad import squad_split
from shardlab.data.models import load_model, load_tokenizer

torch.set_num_threads(1)
articles = squad_split("validation", 60)["data"]
texts = [paragraph["context"] for article in articles for paragraph in article["paragraphs"]]
tokenizer, model = load_tokenizer(), load_model().eval()
documents = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
lengths = [len(document) for document in documents]
padded = max(lengths) * len(lengths)
print(f"{len(lengths)} documents of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in all")
print(f"filled up to the longest: {1 - sum(lengths) / padded:.0%} of the places are filling")

# %% [markdown]
# Filling costs as much as text: the multiplications are the same. In blocks there is next to none. The price is that a block may begin in the middle of a document, and that its tokens can look back into
# the document before. The end-of-sequence token between them tells the model that what stood there is over; it has to learn what that means, so it has to be predicted too. Where the same token fills up, as with GPT-2,
# a program that leaves "the filling token" out of the loss leaves out all ends of documents: the model learns everything but to stop.
#
# Whoever cuts before joining loses text; whoever drops the last block loses some; whoever mixes splits before cutting has read the test. A split is by document, or better by what documents come from: two
# paragraphs of one article are no independent evidence.
#
# ## Each rank its share
#
# The ranks work in step: each gradient is a sum over all of them. A rank with one batch less than the others is not a slow rank, it is a deadlock. Three ways to make the shares equal:
#
# - leave out what is over: in training nobody minds, in evaluation a part of the text is missing, another one for each number of ranks;
# - repeat something (`DistributedSampler` does): some documents count twice;
# - give the rank that has run out a batch that counts nothing. Its forward pass costs time, and changes no sum.
#
# The order of an epoch comes from seed and epoch alone. Then a run can go on in the middle of an epoch, and all ranks agree on the order without a word.
#
# One trap of PyTorch is worth its own line: a `DataLoader` draws a number whenever a pass over it begins, from torch's own generator unless it has one. Dropout draws from there too. So a run that goes on begins a
# pass where the run that never stopped was in the middle of one, and from there on drops other neurons.
#
# ## Training with an engine
#
# | PyTorch alone | DeepSpeed's engine |
# | --- | --- |
# | `model(…)` | `engine(…)`; under ZeRO-3 each layer gathers its weights first, and lets them go |
# | `loss.backward()` | `engine.backward(loss)`: scales the loss for fp16, divides it by the accumulation, reduces gradients to their owners |
# | clipping, `optimizer.step()`, `schedule.step()`, `zero_grad()` | `engine.step()`: all of it, when the accumulation is full |
#
# Both average gradients over the ranks. With $s_r$ the sum of rank $r$'s losses and $n_r$ its tokens, of $R$ ranks, the mean over all tokens is $\sum_r s_r / \sum_r n_r$. Each rank hands over
# $R \, s_r / \sum_r n_r$; the average over the ranks is what was wanted. If each hands over its own mean $s_r / n_r$, the result is a mean of means:

# %%
sums, tokens = torch.tensor([30.0, 3.0]), torch.tensor([10, 3])
print("mean over the tokens:", (sums.sum() / tokens.sum()).item())
print("mean of means:       ", (sums / tokens).mean().item())

# %% [markdown]
# ## Perplexity
#
# The exponential of the mean loss over the tokens. A model that guesses among $V$ tokens by chance has perplexity $V$; one that is always sure and right has 1. It is a mean over *tokens*, so sums are added up over
# batches and ranks and divided once.
#
# Two perplexities can be compared if three things are the same: the text, the tokenizer, and how much context each token had. The third is the one that is forgotten. The same model, the same text, blocks of
# several lengths:

# %%
stream = torch.tensor([token for document in documents for token in document])


@torch.no_grad()
def perplexity(length: int, stride: int) -> float:
    """Of windows of `length` tokens that begin `stride` apart; each counts its last `stride` tokens."""
    windows = stream.unfold(0, length, stride)
    logarithms = model(input_ids=windows).logits[:, :-1].log_softmax(-1)
    losses = -logarithms.gather(-1, windows[:, 1:, None])[..., 0]
    return losses[:, -stride:].mean().exp().item()


for length in (8, 16, 32, 64, 128):
    print(f"blocks of {length:>3}: perplexity {perplexity(length, length):5.1f}")
print(f"windows of 128, half overlapping: {perplexity(128, 64):.1f}")

# %% [markdown]
# The model is the same in each line. In a short block most tokens have little before them. Overlapping windows, of which only the second half counts, give each token at least half a window of context; they cost twice
# the time. Whoever reports a perplexity reports length and stride with it.
#
# Other tokenizers: see the last section but one.
#
# ## Generation
#
# Greedy means the likeliest token, again and again: no chance in it, so a test can ask for equality. Small models end in a loop that way, and that is no error.
#
# Under ZeRO-3 a forward pass is something that all ranks do together. Ranks whose texts end at different places make different numbers of passes. So those that are done go on until all are, and throw the results away:
# `synced_gpus=True`. Without it the program stands still, at 100 % of the GPU, as NCCL waits by spinning, until a time limit ends it: ten minutes with NCCL, thirty with gloo.
#
# ## Checkpoints that are whole
#
# What a run needs to go on, and what happens if it is missing:
#
# | part | without it |
# | --- | --- |
# | weights | it begins anew |
# | the optimizer's states | Adam's means begin at 0, so the next steps are other ones |
# | the position in the data | the first blocks are read twice, and the last ones never |
# | step of the schedule | another learning rate |
# | random generators, each rank's own | other dropout: the losses are others, and no test for equality is possible any more |
#
# A kill comes at any moment, so also while a checkpoint is written. `rename` is the one thing that a file system does whole or not at all: write under another name, wait for all ranks, rename. Whoever looks for the newest
# looks at names, and never finds a half one. A file `latest`, as DeepSpeed writes one by default, is no such thing: rank 0 writes it when its own part is there, and other ranks may still be at theirs.
#
# DeepSpeed writes a file per rank for what is sharded. It loads them with as many ranks as have written them, and refuses another number; `load_checkpoint` of the lab looks before, and names both. (DeepSpeed can make a *universal checkpoint* of one, which any number of ranks loads.)
#
# ## A command line
#
# Options that are refused at once cost a second; those that are refused after the model was loaded, five minutes; those that are ignored, a night. So ranges are checked by the parser, unknown words end the program, and no option is
# known by its beginning: `--max` would mean one thing today, and another when somebody adds `--max_tokens`.
#
# `deepspeed` adds `--local_rank=N` to a script's arguments, `torchrun` does not. A program for both takes it and does not show it.
#
# ## One more text, one more metric
#
# A registry is a dictionary and a decorator. What it buys is that the program need not be touched: adding a text is one function in one file.
#
# Which metric is comparable between tokenizers? Take a text of 1,000 bytes. One model splits it into 250 tokens and needs 2 nats for each: 500 nats, perplexity $e^2 = 7.4$. Another splits it into 125 and needs 4 for each: 500 nats too, so it is exactly as
# good, and its perplexity is $e^4 = 54.6$. What does not change is the sum over the text, so it is divided by something that does not change either: its bytes. (Context remains: 128 tokens of the second model are twice as much text.)

# %%
for tokens_of_text, nats_each in ((250, 2.0), (125, 4.0)):
    bits = tokens_of_text * nats_each / math.log(2) / 1000
    print(f"{tokens_of_text} tokens: perplexity {math.exp(nats_each):5.1f}, {bits:.3f} bits per byte")

# %% [markdown]
# ## ZeRO-2, ZeRO-3, or neither
#
# First the arithmetic, which `--dry-run` does with the same function: bytes of a rank for weights, gradients and Adam's states in bf16, and for the activations of one block of 1,024 tokens.

# %%
from types import SimpleNamespace

from shardlab.run.experiment import module_of
from shardlab.show.notebook import table

prediction = module_of("labs/lab08_language_model/my_project/prediction.py")
models = {"distilgpt2": (81_912_576, 768, 6), "gpt2": (124_439_808, 768, 12)}
models |= {"gpt2-large": (774_030_080, 1280, 36), "gpt2-xl": (1_557_611_200, 1600, 48)}
kinds = {"no DeepSpeed": None, "ZeRO-2": {"stage": 2}, "ZeRO-3": {"stage": 3}}
host = {"device": "cpu"}
kinds["ZeRO-2, optimizer on the host"] = {"stage": 2, "offload_optimizer": host}
kinds["ZeRO-3, both on the host"] = {"stage": 3, "offload_optimizer": host, "offload_param": host}
rows = []
for name, (parameters, hidden, layers) in models.items():
    shape = SimpleNamespace(hidden_size=hidden, num_hidden_layers=layers, vocab_size=50257)
    found = {
        kind: prediction.predict(parameters, shape, tokens=1024, ranks=4, precision="bf16", zero=zero)
        for kind, zero in kinds.items()
    }
    row = {"model, 4 ranks": name} | {kind: f"{said.states / 1e9:.2f} GB" for kind, said in found.items()}
    rows.append(row | {"activations": f"{found['ZeRO-2'].activations / 1e9:.1f} GB"})
table(rows)

# %% [markdown]
# On four GPUs of 16 GB: gpt2 needs no DeepSpeed (2.2 and 1.4 GB). gpt2-large does not fit without it (13.9 and 3.9), and does with ZeRO-2 (4.3 and 3.9). gpt2-xl with ZeRO-2 is too near to the edge (8.6 and 6.0, and libraries and fragments come on top), and fits with
# ZeRO-3 (6.2 and 6.0). Where both are on the host, what a layer at work has gathered comes on top of the 0.00. The question is which column is the first that fits: what stands to the right of it costs time for nothing.
#
# ## When it does not work
#
# | what is seen | the measurement | what it says |
# | --- | --- | --- |
# | out of memory at the start | `--dry-run`: states against what is free | states above it: a higher stage, an offload, more ranks. A smaller batch changes nothing |
# | out of memory at the first step | `--dry-run`: activations; half the `--batch_size` | activations grow with the batch, states do not |
# | out of memory after hours | `usage.csv` | memory that grows: something keeps tensors, often a list of losses without `.item()` |
# | out of memory at the first evaluation | `usage.csv` at that time | the graph is kept: `torch.no_grad()` is missing |
# | too slow, GPUs at 30 % | `usage.csv`; `--profile`: gaps between kernels | the host sets the pace: small batches, an optimizer on the CPU, tokens made while training |
# | too slow, GPUs at 100 % | tokens/s against the ranks: one rank, two | one rank alone is faster per GPU: communication. `--profile` shows `nccl` kernels |
# | stands still, GPUs at 100 % | `pip install py-spy`, `py-spy dump --pid` of each rank | ranks wait in different collectives: one has made a batch, an evaluation or a checkpoint more |
# | stands still at the start, GPUs at 0 % | `ls ~/.cache/torch_extensions/*/*/lock` | DeepSpeed compiles (a C++ compiler is busy), or waits for a lock that a killed run has left: remove it |
# | the loss is nan with fp16 | DeepSpeed's "OVERFLOW" lines | some in the beginning are how the scale is found; one after the other is a learning rate that is too large, or a model made for bf16 |
# | `ImportError`, `undefined symbol` | `python -m deepspeed.env_report`; `python -c 'import torch; print(torch.version.cuda)'` | ops were compiled for another torch or CUDA: remove `~/.cache/torch_extensions` |
# | `ModuleNotFoundError` on one node alone | `which python` on each node | another environment there |
