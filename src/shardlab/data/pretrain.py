"""Make bloom-tiny: train its tokenizer, pre-train its weights on generated text, and write both into the package.

The text comes from the world of `minisquad`, with other names than the shipped questions: paragraphs whose facts come
back at the end. The model learns to look a fact up in the paragraph. It never sees the prompt of the labs
("Question: … Context: … Answer:"); that is what fine-tuning is for.

    python -m shardlab.data.pretrain --out src/shardlab/data/shipped/bloom_tiny        # about 8 minutes on one H200

It needs only torch, transformers and tokenizers.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
import time
from pathlib import Path
from random import Random

import numpy
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

from shardlab.data.minisquad import pretraining_text

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>"]  # in BLOOM's order, so the ids are BLOOM's: 0, 1, 2, 3
BLOOM_SPLIT = r" ?[^(\s|[.,!?…。，、।۔،])]+"
VOCABULARY = 1024
MAX_TOKENS = 192
SHAPE = {"hidden_size": 192, "n_layer": 6, "n_head": 6}


def train_tokenizer(documents: int = 20_000, seed: int = 1) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with BLOOM's word splitting and special tokens, trained on generated text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(BLOOM_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = Random(f"tokenizer/{seed}")
    tokenizer.train_from_iterator((pretraining_text(rng) for _ in range(documents)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=2048,
    )


def _texts(job: tuple[int, int]) -> list[str]:
    seed, documents = job
    rng = Random(f"pretraining/{seed}")
    return [pretraining_text(rng) for _ in range(documents)]


def encode_corpus(tokenizer: PreTrainedTokenizerFast, documents: int, workers: int) -> numpy.ndarray:
    """`documents` rows of `MAX_TOKENS` token ids, each one document ended by `</s>` and padded on the right."""
    rows = numpy.full((documents, MAX_TOKENS), tokenizer.pad_token_id, dtype=numpy.int16)
    share = 10_000
    jobs = [(seed, min(share, documents - seed * share)) for seed in range(math.ceil(documents / share))]
    backend, row = tokenizer.backend_tokenizer, 0
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for texts in pool.imap(_texts, jobs):
            for encoding in backend.encode_batch(texts):
                ids = [*encoding.ids, tokenizer.eos_token_id][:MAX_TOKENS]
                rows[row, : len(ids)] = ids
                row += 1
    return rows


def learning_rate(step: int, steps: int, peak: float, warmup: int = 300) -> float:
    """Linear warm-up, then a half cosine down to a twentieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


def pretrain(rows: numpy.ndarray, tokenizer, *, steps: int, batch: int, peak: float, seed: int) -> tuple:
    """Train BLOOM's architecture from random weights; returns the model and the losses, one every 100 steps."""
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = BloomConfig(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=3, use_cache=False, **SHAPE)
    model = BloomForCausalLM(config).to(device)
    forward = torch.compile(model) if device == "cuda" else model
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=peak,
        betas=(0.9, 0.98),
        fused=device == "cuda",
    )
    corpus = torch.from_numpy(rows)
    order = torch.Generator().manual_seed(seed)
    losses, started = [], time.monotonic()
    for step in range(steps):
        ids = corpus[torch.randint(len(corpus), (batch,), generator=order)].to(device).long()
        labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = forward(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == steps - 1:
            losses.append(round(loss.item(), 4))
            if step % 1000 == 0 or step == steps - 1:
                print(f"step {step:6d}  loss {losses[-1]:.4f}  {time.monotonic() - started:6.0f} s", flush=True)
    return model, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokenizer, the weights and provenance.json")
    parser.add_argument("--documents", type=int, default=1_200_000, help="size of the corpus")
    parser.add_argument("--steps", type=int, default=14_000)
    parser.add_argument("--batch", type=int, default=256, help="documents a step")
    parser.add_argument("--peak", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    options = parser.parse_args()

    started = time.monotonic()
    tokenizer = train_tokenizer()
    rows = encode_corpus(tokenizer, options.documents, options.workers)
    print(
        f"corpus: {len(rows)} documents, {(rows != tokenizer.pad_token_id).sum() / len(rows):.0f} tokens each, "
        f"{time.monotonic() - started:.0f} s",
        flush=True,
    )
    model, losses = pretrain(rows, tokenizer, steps=options.steps, batch=options.batch, peak=options.peak, seed=options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(options.out)
    model.config.use_cache = True
    model.half().save_pretrained(options.out)
    (options.out / "provenance.json").write_text(
        json.dumps(
            {
                "made_by": "python -m shardlab.data.pretrain",
                "options": {k: v for k, v in vars(options).items() if k not in ("out", "workers")},
                "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "seconds": round(time.monotonic() - started),
                "loss_every_100_steps": losses,
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
