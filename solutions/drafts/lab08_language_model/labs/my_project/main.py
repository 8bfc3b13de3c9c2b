"""Train a language model, and say how well it predicts a text that it has not read.

    python main.py --max_train_steps 50 --max_eval_steps 20 --generation_prompt "Return a"
    torchrun --nproc-per-node 2 main.py --deepspeed_config config/deepspeed/zero-2.json
    deepspeed --num_gpus 2 main.py --model_name gpt2 --dataset_name wikitext --dataset_config wikitext-2-raw-v1

`python main.py --help` names all options. What a run leaves is in --output_dir: metrics.jsonl, checkpoints, summary.json.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import corpora
import engines
import language_model as lm
import small_gpt2
import torch
import torch.distributed as dist
from datasets import Dataset
from tqdm import tqdm
from transformers import AutoModelForCausalLM


class Unfit(ValueError):
    """Options that do not fit each other; the sentence says which and what to do."""


def tokenizer_and_model(options, documents: dict[str, list[str]], config: dict | None):
    name = options.model_name
    if name == "small":
        name = str(Path(options.output_dir, "small"))
        if lm.rank() == 0 and not Path(name, "config.json").exists():
            small_gpt2.make(Path(name), documents["train"], options.seed)
        lm.barrier()
    keep = None
    if config and config.get("zero_optimization", {}).get("stage") == 3:
        from transformers.integrations import HfDeepSpeedConfig

        keep = HfDeepSpeedConfig(config)  # while it lives, from_pretrained shards what it loads
    try:
        tokenizer, model = lm.get_tokenizer(name), AutoModelForCausalLM.from_pretrained(name)
    except OSError as error:
        raise Unfit(f"there is no model {options.model_name}: {str(error).strip().splitlines()[0]}") from None
    del keep
    positions = model.config.max_position_embeddings
    if options.max_length > positions:
        raise Unfit(f"--max_length {options.max_length}: {options.model_name} has {positions} positions")
    return tokenizer, model


def blocks_of(documents: dict[str, list[str]], tokenizer, length: int) -> dict[str, lm.Blocks]:
    found = {}
    for split in corpora.SPLITS:
        rows = Dataset.from_dict({"text": documents[split]})
        rows = rows.map(lm.preprocess_function, batched=True, remove_columns=["text"], fn_kwargs={"tokenizer": tokenizer})
        found[split] = lm.Blocks(rows["input_ids"], length, tokenizer.pad_token_id)
    return found


def metrics_file(path: Path, step: int):
    """The file of the steps, with those up to `step` that a stopped run has left in it."""
    lines = path.read_text().splitlines(keepends=True) if step and path.exists() else []
    path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
    return open(path, "a")


def run(options) -> dict:
    device = engines.start_ranks(bool(options.deepspeed_config))
    first, output = lm.rank() == 0, Path(options.output_dir)
    if first:
        output.mkdir(parents=True, exist_ok=True)
    lm.barrier()
    documents = corpora.read(options.dataset_name, options.dataset_config)
    config = None
    if options.deepspeed_config:
        config = engines.filled_in(
            options.deepspeed_config,
            batch_size=options.batch_size,
            ranks=lm.world_size(),
            precision=engines.precision_of(device),
            learning_rate=options.learning_rate,
        )
    tokenizer, model = tokenizer_and_model(options, documents, config)
    loaders = lm.get_dataloaders(
        blocks_of(documents, tokenizer, options.max_length),
        options.batch_size,
        rank=lm.rank(),
        ranks=lm.world_size(),
        seed=options.seed,
    )
    an_epoch = len(loaders["train"])
    steps = min(options.num_epochs * an_epoch, options.max_train_steps or sys.maxsize)
    torch.manual_seed(options.seed + lm.rank())
    if config is None:
        engine = engines.PlainEngine(model, device, options.learning_rate, steps)
    else:
        engine = engines.deepspeed_engine(model, config, steps)
    checkpoints, sizes = output / "checkpoints", lm.token_bytes(tokenizer)
    position = {"step": 0, "epoch": 0, "batches": 0}
    if options.resume:
        position = lm.load_checkpoint(engine, checkpoints) or position
        if first:
            print(f"going on from step {position['step']}" if position["step"] else "no checkpoint to go on from: from the start")

    def figures(split: str) -> dict:
        loaders[split].sampler.begin(0)
        return lm.evaluate(engine, loaders[split], device, options.max_eval_steps, sizes)

    def text() -> str | None:
        return options.generation_prompt and lm.generate_text(engine.module, tokenizer, options.generation_prompt)

    before, text_before = figures("validation"), text()
    started, losses = time.perf_counter(), []
    bar = tqdm(total=steps, initial=position["step"], desc="training", unit="step", disable=not first)
    log = metrics_file(output / "metrics.jsonl", position["step"]) if first else None
    for epoch in range(position["epoch"], options.num_epochs):
        sampler = loaders["train"].sampler
        skipped = position["batches"] if epoch == position["epoch"] else 0
        sampler.begin(epoch, skipped * options.batch_size)
        position |= {"epoch": epoch, "batches": skipped}
        for loss in lm.train_epoch(engine, loaders["train"], device, steps - position["step"]):
            position |= {"step": position["step"] + 1, "batches": position["batches"] + 1}
            losses.append(loss)
            if first:
                log.write(json.dumps({"step": position["step"], "loss": loss, "seconds": time.perf_counter() - started}) + "\n")
                log.flush()
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()
            if options.save_checkpoint and (position["step"] % options.save_checkpoint == 0 or position["step"] == steps):
                lm.save_checkpoint(engine, checkpoints, position)
        if position["step"] >= steps:
            break
    bar.close()
    seconds = time.perf_counter() - started
    after = {split: figures(split) for split in ("validation", "test")}
    summary = {
        "model": options.model_name,
        "data": options.dataset_name,
        "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters()),
        "ranks": lm.world_size(),
        "device": str(device.type),
        "precision": engines.precision_of(device),
        "deepspeed": options.deepspeed_config,
        "steps": position["step"],
        "last_loss": losses[-1] if losses else None,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(len(losses) * options.batch_size * options.max_length * lm.world_size() / seconds),
        "validation_before": before,
        "validation": after["validation"],
        "test": after["test"],
        "text_before": text_before,
        "text": text(),
    }
    if first:
        log.close()
        (output / "summary.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        show(summary)
    return summary


def show(summary: dict) -> None:
    speed = f"{summary['tokens_per_second']} tokens/s on {summary['ranks']} rank(s)"
    print(f"\n{summary['steps']} steps in {summary['seconds']} s, {speed}")
    for name, values in (("before", summary["validation_before"]), ("after", summary["validation"]), ("test", summary["test"])):
        print(f"{name:<8}" + "  ".join(f"{metric} {value:.4g}" for metric, value in values.items()))
    for name in ("text_before", "text"):
        if summary[name] is not None:
            print(f"{name}: {summary[name]!r}")


def main(arguments: list[str]) -> int:
    options = lm.command_line().parse_args(arguments)
    try:
        run(options)
    except ValueError as error:
        if lm.rank() == 0:
            print(error, file=sys.stderr)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
