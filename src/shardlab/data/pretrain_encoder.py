"""Make comment-tiny: train a tokenizer, pre-train a small RoBERTa on generated comments, and write both into the package.

It fills in masked tokens of comments that are in no split of the labs, and never sees a label; that is what fine-tuning is for.

    python -m shardlab.data.pretrain_encoder --out src/shardlab/data/shipped/comment_tiny        # about 10 minutes on one CPU core
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

from shardlab.data.comments import comment

SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # in RoBERTa's order: 0, 1, 2, 3, and the mask
VOCABULARY = 768
MAX_TOKENS = 64
SHAPE = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}
MASKED = 0.2


def train_tokenizer(documents: int = 5000) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with RoBERTa's special tokens, which stand around a text: `<s>` … `</s>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((comment("tokenizer", number)["text"] for number in range(documents)), trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token="<mask>",
        model_max_length=MAX_TOKENS,
    )


def masked(ids: torch.Tensor, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids with one in five replaced by `<mask>`, and labels that are -100 elsewhere."""
    chosen = (torch.rand(ids.shape, generator=draw) < MASKED) & (ids > 3)
    return ids.masked_fill(chosen, 4), ids.masked_fill(~chosen, -100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokenizer, the weights and provenance.json")
    parser.add_argument("--documents", type=int, default=40_000, help="size of the corpus")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=64, help="comments a step")
    parser.add_argument("--peak", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    started = time.monotonic()
    tokenizer = train_tokenizer()
    texts = [comment("pretraining", number)["text"] for number in range(options.documents)]
    rows = tokenizer(texts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")["input_ids"]
    torch.manual_seed(options.seed)
    draw = torch.Generator().manual_seed(options.seed)
    config = RobertaConfig(vocab_size=VOCABULARY, max_position_embeddings=MAX_TOKENS + 2, type_vocab_size=1, **SHAPE)
    model = RobertaForMaskedLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.peak, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.peak, total_steps=options.steps, pct_start=0.05)
    losses = []
    for step in range(options.steps):
        ids = rows[torch.randint(len(rows), (options.batch,), generator=draw)]
        ids = ids[:, : int((ids != 1).sum(1).max())]
        inputs, labels = masked(ids, draw)
        loss = model(input_ids=inputs, attention_mask=(ids != 1).long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == options.steps - 1:
            losses.append(round(loss.item(), 4))
            if step % 500 == 0:
                print(f"step {step:6d}  loss {losses[-1]:.4f}  {time.monotonic() - started:6.0f} s", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(options.out)
    # On a CPU attention with dropout runs without the fused kernel: fine-tuning took 13 % longer.
    model.config.attention_probs_dropout_prob = 0.0
    model.half().save_pretrained(options.out)
    provenance = {
        "made_by": "python -m shardlab.data.pretrain_encoder",
        "options": {key: value for key, value in vars(options).items() if key != "out"},
        "hardware": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seconds": round(time.monotonic() - started),
        "loss_every_100_steps": losses,
    }
    (options.out / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")


if __name__ == "__main__":
    main()
