# %% [markdown]
# # Lab 08: a language-model project of one's own
#
# **What you will have built:** a folder with a small, complete project: a text becomes blocks of tokens, each rank gets its share, a model is trained with or without DeepSpeed, evaluated, asked to write, saved, and goes on after it was killed. The folder runs without this course: copy it for real work.
#
# **Time:** about 80 minutes. **Before it:** lab 03, and the lecture `notebooks/08_language_model.ipynb`.
#
# | task | what you write | difficulty (1–5) |
# | --- | --- | --- |
# | 8.1 | `get_tokenizer`, `preprocess_function` | 2 |
# | 8.2 | `Blocks` | 2 |
# | 8.3 | `Share`, `get_dataloaders` | 3 |
# | 8.4 | `summed_loss`, `train_epoch` | 4 |
# | 8.5 | `perplexity`, `evaluate` | 3 |
# | 8.6 | `generate_text` | 3 |
# | 8.7 | `save_checkpoint` | 4 |
# | 8.8 | `load_checkpoint` | 3 |
# | 8.9 | `command_line` | 2 |
# | 8.10 | `squad_paragraphs`: a data set more | 2 |
# | 8.11 | `token_bytes`, `bits_per_byte`: a metric more | 2 |
#
# You write in `src/exercises/lab08_language_model.py`. It imports nothing of the course, and becomes `language_model.py` of the project. The rest of the project is given, in `labs/lab08_language_model/my_project`: open `main.py` and read it once, it says what happens in which order. The checks of 8.4 to 8.8 start real ranks.

# %%
from shardlab.show.notebook import RUNS, check, compare, scoreboard, start, table

lab = start("lab08_language_model")

# %% [markdown]
# ## 8.1 Tokens
#
# A document is a text that stands for itself: an article, a paragraph, a documentation string. Between two documents stands the end-of-sequence token; it is all that tells the model that what follows is about something else.
#
# Complete `get_tokenizer` and `preprocess_function`. Here is a tokenizer to try them with, made from ten lines of text:

# %%
from tempfile import mkdtemp

from shardlab.hardware import ROOT
from shardlab.run.experiment import module_of

project_files = ROOT / "labs" / "lab08_language_model" / "my_project"
small_gpt2 = module_of("labs/lab08_language_model/my_project/small_gpt2.py")
texts = ["Return the sum of a and b.", "  \n", "Raise ValueError if a is below zero."]
model_folder = mkdtemp()
small_gpt2.make(model_folder, texts * 5, seed=0)
tokenizer = lab.get_tokenizer(model_folder)
documents = lab.preprocess_function({"text": texts}, tokenizer)["input_ids"]
print(tokenizer.pad_token, documents)
print([tokenizer.decode(document) for document in documents])

# %%
check("8.1")

# %% [markdown]
# ## 8.2 Blocks
#
# Documents are of all lengths, and a batch is a rectangle. Filling each up to the longest wastes most of it; cutting each loses text. So they are laid one behind the other and cut into blocks of equal length, wherever a document ends.
#
# ```
# documents   a a a a . | b b . | c c c c c .
# blocks      a a a a   . b b .   c c c c   c . - -
# ```
#
# Only the last block is filled up, and what fills it is in no loss. Complete `Blocks`.

# %%
blocks = lab.Blocks([[5, 6, 7, 0], [8, 9, 0]], 3, 0)
print(len(blocks), blocks[0]["input_ids"], blocks[2])

# %%
check("8.2")

# %% [markdown]
# ## 8.3 Each rank its share
#
# Two ranks, eleven blocks. If one has six batches and the other five, the sixth waits for gradients that nobody sends. If the eleventh block is given twice, it counts twice, and perplexity on two ranks is another than on one. So the rank that has run out gets a block of filling alone: it takes part, and changes nothing.
#
# Complete `Share` and `get_dataloaders`.

# %%
for rank in (0, 1):
    share = lab.Share(5, rank, 2, seed=None)
    print(rank, list(share), len(share))

# %%
check("8.3")

# %% [markdown]
# ## 8.4 Training
#
# Every block has as many tokens, so why count them? Because the last one has not, and neither has any batch of a data set that is padded. A mean of the ranks' means weighs a rank with 3 tokens like one with 300. What is right on one rank is right on several if each hands over
#
# $$\frac{\text{its sum}}{\text{tokens of all ranks}} \cdot \text{ranks},$$
#
# because DeepSpeed and DDP take the mean of the ranks' gradients, which divides by the ranks.
#
# Complete `summed_loss` and `train_epoch`. The check compares with one process that has all rows: with DDP, ZeRO-2 and ZeRO-3, on rows of very different lengths.

# %%
import torch

logits = torch.zeros(1, 3, 10)
print(lab.summed_loss(logits, torch.tensor([[1, 2, -100]])), torch.log(torch.tensor(10.0)))

# %%
check("8.4")

# %% [markdown]
# ## 8.5 Perplexity
#
# The loss is the mean number of nats that the model needs for a token. Its exponential, perplexity, is how many tokens it might as well choose from by chance. A model that knows nothing has the size of its vocabulary: 4096 here.
#
# Complete `perplexity` and `evaluate`.

# %%
print(lab.perplexity(lab.Totals(nats=2.302585, tokens=1)))

# %%
check("8.5")

# %% [markdown]
# ## 8.6 Generation
#
# Under ZeRO-3 no rank has the parameters: each layer gathers them from all ranks when it is asked. A rank whose text has ended asks no more, and the others wait for ever. `generate(…, synced_gpus=True)` lets it go on asking until the last one is done.
#
# Complete `generate_text`.

# %%
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(model_folder)
print(repr(lab.generate_text(model, tokenizer, "Return the", 5)))

# %%
check("8.6")

# %% [markdown]
# ## 8.7 and 8.8 Checkpoints that are whole
#
# Runs are killed: by the time limit, by the machine's owner, by somebody's `kill`. If that happens while a checkpoint is written, half of it is there, under a name that promises a whole one. The remedy is old: write under another name, and rename at the end. Renaming a folder happens at once or not at all. On several ranks there is one thing more to it: nobody renames before all have written.
#
# A run that goes on should have the losses of the one that never stopped, to the last digit. For that it takes weights, the optimizer's states, the position in the data, and the random generators that dropout draws from, each rank's own.
#
# Complete `save_checkpoint` and `load_checkpoint`.

# %%
check("8.7")

# %%
check("8.8")

# %% [markdown]
# ## 8.9 A command line
#
# A program that others use has options that explain themselves, and refuses what cannot work before it loads a model. Complete `command_line`.

# %%
try:
    lab.command_line().parse_args(["--batch_size", "0"])
except SystemExit as ended:
    print("status", ended.code)

# %%
check("8.9")

# %% [markdown]
# ## 8.10 and 8.11 One more text, one more metric
#
# Registries keep a project open: `main.py` knows no data set and no metric by name. Complete `squad_paragraphs`, which puts the paragraphs of a SQuAD file there, and `token_bytes` and `bits_per_byte`, which make models with different tokenizers comparable.

# %%
check("8.10")

# %%
check("8.11")

# %% [markdown]
# ## The project
#
# Now put it together. `make_project.py` copies what is given into a folder, and your exercises as `language_model.py`. In a terminal: `python labs/lab08_language_model/make_project.py ~/my_project`.

# %%
project = RUNS / "my_project"
module_of("labs/lab08_language_model/make_project.py").make(project)
print(sorted(path.name for path in project.iterdir()))

# %% [markdown]
# What will a run hold, and does it fit? `--dry-run` says so and starts nothing.

# %%
import subprocess
import sys

from shardlab.zero import ops


def run(*words: str, ranks: int = 1) -> dict:
    """Run the project's program with these options; its summary."""
    import json
    import os

    python = [sys.executable]
    if ranks > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    # Where the course keeps what DeepSpeed has compiled; elsewhere it lies in ~/.cache.
    environment = os.environ | ops.environment("cpu" if ranks > 1 else None)
    if ranks > 1:
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*python, "main.py", *words], cwd=project, env=environment, check=True)
    if "--dry-run" in words:
        return {}
    return json.loads((project / words[-1] / "summary.json").read_text())


_ = run("--dry-run", "--max_train_steps", "50")

# %% [markdown]
# The quick test: 50 steps on the documentation of Python's standard library, evaluated on modules that the model has not read. Predict perplexity first. Before training the model has random weights and 4096 tokens to choose from.

# %%
predicted = {"perplexity before": ..., "perplexity after": ...}

# %%
quick = [*"--max_train_steps 50 --max_eval_steps 20 --generation_prompt".split(), "Return a"]
summary = run(*quick, "--output_dir", "output/quick")

# %%
compare(
    {
        "perplexity before": summary["validation_before"]["perplexity"],
        "perplexity after": summary["validation"]["perplexity"],
    },
    predicted,
)
print("before:", repr(summary["text_before"]))
print("after: ", repr(summary["text"]))

# %% [markdown]
# Fifty steps teach it which tokens are frequent, and not much more: what it writes is the likeliest token again and again.
#
# Now two ranks, with plain DDP and with ZeRO-3 whose parameters and optimizer are on the host. Is it the same training?

# %%
few = "--max_train_steps 10 --max_eval_steps 5 --batch_size 4 --output_dir".split()
ddp = run(*few, "output/ddp", ranks=2)
zero3 = run("--deepspeed_config", "config/deepspeed/zero-3.json", *few, "output/zero3", ranks=2)
table(
    [
        {"run": name, "loss of the last step": found["last_loss"]} | found["validation"]
        for name, found in (("DDP", ddp), ("ZeRO-3, offloaded", zero3))
    ]
)

# %% [markdown]
# It is, to about four digits: the Adam on the host computes the same formula and rounds elsewhere. A difference in the second digit would be a mistake.
#
# ## Questions
#
# 1. Two models have perplexities 20 and 30 on the same text. Which one is better?
# 2. Why does `Blocks` take labels from the place and not from the filling token?
# 3. What would happen if each rank renamed the checkpoint's folder when it is done itself?
# 4. `--max_eval_steps 20` gives one perplexity, all batches of the validation text another. Which of the two do you report?
#
# <details><summary>Answers</summary>
#
# 1. Nobody can say before it is known how long their tokens are. With the same tokenizer and the same context the first. Otherwise compare bits per byte.
# 2. The filling token is the end-of-sequence token. Labels without it would never teach the model where a document ends.
# 3. The first one that is done gives the folder its name while others still write. A kill at that moment leaves half a checkpoint under the name of a whole one, and the second rename fails.
# 4. The whole text. The first batches are a sample in the order of the text: the first documents, not any.
#
# </details>
#
# ## Going further
#
# - In a terminal: `cd runs/my_project; ./run.sh quick`, and `./run.sh production` on a machine with GPUs and a network. `README.md` there says how to set one up. On a cluster: `shardlab slurm submit language-model --follow -- quick`.
# - `python main.py --profile --max_train_steps 6`: a trace of three steps, for `ui.perfetto.dev`. Which kernel takes longest?
# - `--dataset_name FOLDER`: your own texts. `--model_name distilgpt2`.
# - A metric of your own: the share of tokens that the model would have guessed needs more than `Totals` has. What would you add?
#
# ## Your points

# %%
scoreboard("lab08_language_model")
