"""Measure lab 08's project on this machine's GPUs: distilgpt2's shape, PyTorch alone, ZeRO-2 and ZeRO-3 with their offloads.

    python bench/language_model.py --ranks 2 --out bench/results/language-model-2xh200.json

Weights are random, which changes neither memory nor speed; the text is the standard library's documentation. Each run is the
project's own `main.py`. Tokens per second are those of the steps after the first ten, and peaks are rank 0's, next to what
`prediction.py` says before the run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from shardlab import hardware, switch
from shardlab.run.experiment import module_of
from shardlab.zero import ops

LAB = "labs/lab08_language_model"
METHODS = {
    "PyTorch alone": None,
    "ZeRO-2": ("zero-2", ()),
    "ZeRO-2, optimizer on the host": ("zero-2", ("offload_optimizer",)),
    "ZeRO-3": ("zero-3", ()),
    "ZeRO-3, optimizer on the host": ("zero-3", ("offload_optimizer",)),
    "ZeRO-3, optimizer and parameters on the host": ("zero-3", ("offload_optimizer", "offload_param")),
}
UNTIMED = 10


def make_text(path: Path) -> list[str]:
    """The standard library's documentation as one text file: it is gathered once, and not in each run."""
    documents = module_of(f"{LAB}/my_project/corpora.py").read("stdlib", None)["train"]
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return documents


def make_model(folder: Path, texts: list[str], layers: int, hidden: int, vocabulary: int) -> None:
    """A GPT-2 with random weights, and the tokenizer of the project's small model, whose tokens are a part of the vocabulary."""
    from transformers import GPT2Config, GPT2LMHeadModel

    module_of(f"{LAB}/my_project/small_gpt2.py").make(folder, texts, 0)
    shape = GPT2Config(n_layer=layers, n_embd=hidden, n_head=hidden // 64, vocab_size=vocabulary, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(shape).save_pretrained(folder)


def deepspeed_file(project: Path, name: str, offloads: tuple[str, ...]) -> Path:
    config = json.loads((project / "config" / "deepspeed" / f"{name}.json").read_text())
    zero = config["zero_optimization"]
    config["zero_optimization"] = {"stage": zero["stage"]} | {offload: zero[offload] for offload in offloads}
    path = project / f"{'-'.join((name, *offloads))}.json"
    path.write_text(json.dumps(config))
    return path


def measured(project: Path, name: str, options, config: Path | None) -> dict:
    """One run of `main.py`, and what it says of itself."""
    output = project / "output" / name.replace(" ", "-").replace(",", "")
    words = [
        "main.py",
        "--model_name",
        "model",
        "--dataset_name",
        "text.txt",
        "--batch_size",
        str(options.micro_batch),
        "--max_length",
        str(options.max_tokens),
    ]
    words += ["--max_train_steps", str(options.steps), "--max_eval_steps", "2", "--num_epochs", "1000", "--output_dir", str(output)]
    words += ["--deepspeed_config", str(config)] if config else []
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
    environment = os.environ | ops.environment()
    done = subprocess.run([sys.executable, *launcher, *words], cwd=project, env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"outcome": "failed", "reason": done.stderr.strip().splitlines()[-1][:300]}
    summary = json.loads((output / "summary.json").read_text())
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    seconds = steps[-1]["seconds"] - steps[UNTIMED - 1]["seconds"]
    tokens = options.ranks * options.micro_batch * options.max_tokens
    return {
        "outcome": "finished",
        "tokens_per_second": round(tokens * (len(steps) - UNTIMED) / seconds),
        "peak_gb": None if summary["peak_bytes"] is None else round(summary["peak_bytes"] / 1e9, 2),
        "percent_busy": [gpu["percent_busy"] for gpu in summary["gpus"]],
        "precision": summary["precision"],
        "parameters": summary["parameters"],
        "first_loss": round(steps[0]["loss"], 4),
        "last_loss": round(steps[-1]["loss"], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=80, help=f"optimizer steps, of which {UNTIMED} are not timed (default: 80)")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="METHOD")
    parser.add_argument("--runs", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()
    if options.steps < UNTIMED + 2:
        parser.error(f"--steps {options.steps}: at least {UNTIMED + 2} are needed, as the first {UNTIMED} are not timed")
    if unknown := [method for method in options.methods if method not in METHODS]:
        parser.error(f"there is no method {unknown[0]}; there are {', '.join(METHODS)}")

    switch.use_exercises(switch.SOLUTIONS)
    project = (options.runs / "language-model").resolve()
    module_of(f"{LAB}/make_project.py").make(project)
    sys.path.insert(0, str(project))
    make_model(project / "model", make_text(project / "text.txt"), options.layers, options.hidden, options.vocabulary)
    from transformers import AutoConfig, GPT2LMHeadModel

    prediction = module_of(f"{LAB}/my_project/prediction.py")
    shape = AutoConfig.from_pretrained(project / "model")
    parameters = GPT2LMHeadModel.from_pretrained(project / "model").num_parameters()
    results = []
    for method in options.methods:
        config = None if METHODS[method] is None else deepspeed_file(project, *METHODS[method])
        found = [measured(project, method, options, config) for _ in range(options.repetitions)]
        done = sorted((run for run in found if run["outcome"] == "finished"), key=lambda run: run["tokens_per_second"])
        row = {"method": method} | (done[len(done) // 2] if done else found[0])
        if done:
            fastest, slowest = done[-1]["tokens_per_second"], done[0]["tokens_per_second"]
            row["spread_percent"] = round(100 * (fastest / slowest - 1), 1)
            zero = None if config is None else json.loads(config.read_text())["zero_optimization"]
            tokens = options.micro_batch * options.max_tokens
            said = prediction.predict(parameters, shape, tokens=tokens, ranks=options.ranks, precision=row["precision"], zero=zero)
            row |= {
                "predicted_states_gb": round(said.states / 1e9, 2),
                "predicted_activations_gb": round(said.activations / 1e9, 2),
            }
        results.append(row)
        print(json.dumps(row), flush=True)
        write(options, results)


def write(options, results: list[dict]) -> None:
    """The results so far: a run that is ended early has measured something all the same."""
    chosen = (
        f"--ranks {options.ranks} --micro-batch {options.micro_batch} --max-tokens {options.max_tokens} --steps {options.steps}"
    )
    provenance = {"what": __doc__.splitlines()[0], "command": f"python bench/language_model.py {chosen}"}
    provenance |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "hardware": hardware.describe()}
    provenance |= {"versions": hardware.versions(), "commit": hardware.commit()}
    provenance |= {"micro_batch": options.micro_batch, "max_tokens": options.max_tokens}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(provenance | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
