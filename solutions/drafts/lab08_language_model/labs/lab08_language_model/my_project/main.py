"""Train a language model, and say how well it predicts a text that it has not read.

    python main.py --max_train_steps 50 --max_eval_steps 20 --generation_prompt "Return a"
    torchrun --nproc-per-node 2 main.py --deepspeed_config config/deepspeed/zero-2.json
    deepspeed --num_gpus 2 main.py --model_name gpt2 --dataset_name wikitext --dataset_config wikitext-2-raw-v1

`python main.py --help` names all options. What a run leaves is in --output_dir: metrics.jsonl, usage.csv, checkpoints,
trace.json of --profile, summary.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import corpora
import engines
import language_model as lm
import prediction
import small_gpt2
import torch
import torch.distributed as dist
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM
from usage import Usage

PROFILED, BEFORE = 3, 2
"""Steps in a trace, and those before it, which are slower than the others."""
KEPT = 2
"""Checkpoints that are kept; older ones go."""
DECIDE = ("model_name", "dataset_name", "dataset_config", "batch_size", "max_length", "seed", "deepspeed_config")
"""Options with other values of which a run cannot go on: weights or the place in the data would not be those of before."""


class Unfit(ValueError):
    """Options that do not fit each other; the sentence says which and what to do."""


def name_of_model(options, documents: dict[str, list[str]], folder: Path) -> str:
    """What transformers loads: the name that was given, or the folder in which the model `small` was made."""
    if options.model_name != "small":
        return options.model_name
    if lm.rank() == 0 and not (options.resume and folder.exists()):
        half = folder.with_name(folder.name + ".partial")
        for left in (half, folder):
            shutil.rmtree(left, ignore_errors=True)
        small_gpt2.make(half, documents["train"], options.seed)
        half.rename(folder)
    lm.barrier()
    return str(folder)


def settings_that_fit(options, output: Path) -> None:
    """Look whether an output folder is for this run, and note there what the run is.

    Raises:
        Unfit: it has the checkpoints of another run, or those of this one, which nobody wants to go on with.
    """
    path, settings = output / "settings.json", {name: getattr(options, name) for name in DECIDE}
    there = any((output / "checkpoints").glob("step-*[0-9]"))
    if there and not options.resume:
        raise Unfit(f"{output} has checkpoints: --resume goes on from them, and another --output_dir begins anew")
    if there and path.exists():
        for name, before in json.loads(path.read_text()).items():
            if before != settings[name]:
                raise Unfit(f"the run in {output} has --{name} {before}, and goes on with that alone; here it is {settings[name]}")
    lm.barrier()
    if lm.rank() == 0:
        path.write_text(json.dumps(settings, indent=1) + "\n")


def tokenizer_and_shape(options, name: str):
    try:
        tokenizer, shape = lm.get_tokenizer(name), AutoConfig.from_pretrained(name)
    except OSError as error:
        raise Unfit(f"there is no model {options.model_name}: {str(error).strip().splitlines()[0]}") from None
    positions = shape.max_position_embeddings
    if options.max_length > positions:
        raise Unfit(f"--max_length {options.max_length}: {options.model_name} has {positions} positions")
    return tokenizer, shape


def loaded(name: str, config: dict | None):
    """The model. Where DeepSpeed shards parameters, each is sharded as soon as it is there."""
    if config and config.get("zero_optimization", {}).get("stage") == 3:
        from transformers.integrations import HfDeepSpeedConfig

        loaded.keep = HfDeepSpeedConfig(config)  # while it lives, from_pretrained shards what it loads
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)


def blocks_of(documents: dict[str, list[str]], tokenizer, length: int) -> dict[str, lm.Blocks]:
    disable_progress_bar()
    found = {}
    for split in corpora.SPLITS:
        rows = Dataset.from_dict({"text": documents[split]})
        rows = rows.map(lm.preprocess_function, batched=True, remove_columns=["text"], fn_kwargs={"tokenizer": tokenizer})
        found[split] = lm.Blocks(rows["input_ids"], length, tokenizer.pad_token_id)
    return found


def metrics_file(path: Path, step: int):
    """The file of the steps, with those up to `step` that a stopped run has left in it."""
    lines = path.read_text().splitlines(keepends=True) if step and path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]  # a kill may cut the last one short
    path.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))
    return open(path, "a")


def only_the_newest(checkpoints: Path) -> None:
    """Remove all whole checkpoints but the newest ones; first each loses its name, as one that is half removed is not whole."""
    for path in sorted(checkpoints.glob("step-*[0-9]"))[:-KEPT]:
        old = path.with_name(path.name + ".old")
        path.rename(old)
        shutil.rmtree(old)


def byte_level(tokenizer) -> bool:
    """Whether a token is written with a character for each byte, as GPT-2's; only then its bytes can be counted that way."""
    text = "naïve 東京"
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])
    return sum(map(len, pieces)) == len(text.encode())


def profiler(path: Path, steps: int):
    """A trace of three steps, for chrome://tracing or ui.perfetto.dev."""
    from torch.profiler import profile, schedule

    return profile(
        schedule=schedule(wait=min(BEFORE, max(0, steps - PROFILED)), warmup=0, active=PROFILED, repeat=1),
        on_trace_ready=lambda done: done.export_chrome_trace(str(path)),
    )


def dry_run(options, ranks: int) -> None:
    """Say what would be done: nothing is trained, no rank is started, and nothing is written into the output folder."""
    device = engines.device_of_rank()
    documents = corpora.read(options.dataset_name, options.dataset_config)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, shape = tokenizer_and_shape(options, name_of_model(options, documents, Path(folder)))
        blocks = blocks_of(documents, tokenizer, options.max_length)
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(shape).num_parameters()
    precision = engines.precision_of(device)
    zero = None
    if options.deepspeed_config:
        zero = engines.file_of(options.deepspeed_config).get("zero_optimization", {})
    tokens = options.batch_size * options.max_length
    found = prediction.predict(parameters, shape, tokens=tokens, ranks=ranks, precision=precision, zero=zero)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    fits = fit(found, device, local)
    an_epoch = -(-len(blocks["train"]) // (options.batch_size * ranks))
    steps = min(options.num_epochs * an_epoch, options.max_train_steps or sys.maxsize)
    lines = {
        "parameters": f"{parameters:,}",
        "tokens": ", ".join(f"{split} {len(found.tokens):,}" for split, found in blocks.items()),
        "steps": f"{steps:,}, of {ranks} rank(s) with {options.batch_size} blocks of {options.max_length} tokens each",
        "precision": precision,
        "states": f"{prediction.shown(found.states)} per rank",
        "activations": f"about {prediction.shown(found.activations)} per rank",
        "on the host": f"{prediction.shown(found.host)} per rank, offloaded",
        "free": ", ".join(f"{prediction.shown(engines.free_bytes(place))} on {place}" for place in {device, CPU}),
        "fits": fits,
    }
    for name, line in lines.items():
        print(f"{name:<12} {line}")


CPU = torch.device("cpu")


def fit(found: prediction.Prediction, device: torch.device, local_ranks: int) -> str:
    """Whether a rank's states and activations fit, and what this machine's ranks have offloaded; or what to change."""
    on_device, on_host = found.states + found.activations, local_ranks * found.host
    if device == CPU:
        on_device, on_host = 0, on_host + local_ranks * on_device
    if on_host > engines.free_bytes(CPU):
        return f"no: {local_ranks} rank(s) of this machine take {prediction.shown(on_host)} of its memory"
    if on_device < engines.free_bytes(device):
        return "yes"
    if found.states > engines.free_bytes(device):
        return "no: the states alone are too large; a higher ZeRO stage, an offload, or more ranks"
    return "no: a smaller batch, or shorter blocks"


def run(options) -> dict:
    with contextlib.ExitStack() as around:
        return run_within(options, around)


def run_within(options, around: contextlib.ExitStack) -> dict:
    device = engines.start_ranks(bool(options.deepspeed_config))
    first, output = lm.rank() == 0, Path(options.output_dir)
    if output.exists() and not output.is_dir():
        raise Unfit(f"--output_dir {output}: that is a file")
    if first:
        output.mkdir(parents=True, exist_ok=True)
    lm.barrier()
    settings_that_fit(options, output)
    several_nodes = os.environ.get("WORLD_SIZE", "1") != os.environ.get("LOCAL_WORLD_SIZE", "1")
    usage = Usage(output / (f"usage.{socket.gethostname()}.csv" if several_nodes else "usage.csv"))
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        around.enter_context(usage)
    if first:
        print(f"reading {options.dataset_name}", flush=True)
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
    name = name_of_model(options, documents, output / "small")
    tokenizer, _ = tokenizer_and_shape(options, name)
    model = loaded(name, config)
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
    checkpoints, sizes = output / "checkpoints", lm.token_bytes(tokenizer) if byte_level(tokenizer) else None
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
    started, losses, untrained = time.perf_counter(), [], len(usage.rows)
    # In a log file a line is never written over, so there are few of them.
    every = 0.1 if sys.stderr.isatty() else 5.0
    bar = tqdm(total=steps, initial=position["step"], desc="training", unit="step", disable=not first, mininterval=every)
    log = metrics_file(output / "metrics.jsonl", position["step"]) if first else None
    tracing = contextlib.ExitStack()
    around.enter_context(tracing)
    trace = None
    if options.profile and first:
        trace = tracing.enter_context(profiler(output / "trace.json", steps - position["step"]))
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
            if trace:
                trace.step()
            if options.save_checkpoint and (position["step"] % options.save_checkpoint == 0 or position["step"] == steps):
                lm.save_checkpoint(engine, checkpoints, position)
                if first:
                    only_the_newest(checkpoints)
        if position["step"] >= steps:
            break
    tracing.close()
    bar.close()
    seconds, gpus = time.perf_counter() - started, usage.summary(untrained)
    after = {split: figures(split) for split in ("validation", "test")}
    summary = {
        "model": options.model_name,
        "data": options.dataset_name,
        "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters()),
        "ranks": lm.world_size(),
        "device": str(device.type),
        "precision": engines.precision_in_use(engine, device),
        "deepspeed": options.deepspeed_config,
        "steps": position["step"],
        "last_loss": losses[-1] if losses else None,
        "seconds": round(seconds, 1),
        "gpus": gpus,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
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
    for gpu in summary["gpus"]:
        print(f"GPU {gpu['gpu']}: {gpu['percent_busy']:.0f} % busy (median), {prediction.shown(gpu['peak_bytes'])} at most")
    for name, values in (("before", summary["validation_before"]), ("after", summary["validation"]), ("test", summary["test"])):
        print(f"{name:<8}" + "  ".join(f"{metric} {value:.4g}" for metric, value in values.items()))
    for name in ("text_before", "text"):
        if summary[name] is not None:
            print(f"{name}: {summary[name]!r}")


def main(arguments: list[str]) -> int:
    options = lm.command_line().parse_args(arguments)
    try:
        if options.dry_run:
            if os.environ.get("RANK", "0") == "0":
                dry_run(options, int(os.environ.get("WORLD_SIZE", "1")))
        else:
            run(options)
    except KeyboardInterrupt:
        if lm.rank() == 0:
            print(f"stopped. With checkpoints in {options.output_dir}, --resume goes on from the newest", file=sys.stderr)
        return 130
    except ValueError as error:
        # What these files refuse is a sentence for people; what goes wrong inside of a library has to be found.
        if Path(traceback.extract_tb(error.__traceback__)[-1].filename).parent != Path(__file__).resolve().parent:
            raise
        print(error if lm.rank() == 0 else f"rank {lm.rank()}: {error}", file=sys.stderr)
        return 1
    # Only where all went well: a rank that has failed would wait here for what the others still send.
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
