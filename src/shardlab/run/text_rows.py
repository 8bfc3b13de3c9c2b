"""What an experiment on text trains on, as token ids. It imports no `Trainer`, which takes seconds."""

from __future__ import annotations

from shardlab.data.datasets import load_squad
from shardlab.data.models import load_tokenizer
from shardlab.run.experiment import Experiment


def text_rows(experiment: Experiment) -> tuple[list[dict], list[dict]]:
    """The paragraphs of the data as token ids, each cut or padded to `max_tokens`; the label of every real token is itself."""
    tokenizer = load_tokenizer("bloom-tiny" if experiment.random_weights else experiment.model)
    data = load_squad(experiment.data, skip_bad=experiment.skip_bad)

    def rows(split: str, limit: int | None) -> list[dict]:
        contexts = list(dict.fromkeys(data[split]["context"]))[:limit]
        encoded = tokenizer(contexts, truncation=True, max_length=experiment.max_tokens, padding="max_length", padding_side="right")
        return [
            {"input_ids": ids, "attention_mask": mask, "labels": [i if m else -100 for i, m in zip(ids, mask)]}
            for ids, mask in zip(encoded["input_ids"], encoded["attention_mask"])
        ]

    return rows("train", experiment.train_examples), rows("validation", experiment.eval_examples or 64)
