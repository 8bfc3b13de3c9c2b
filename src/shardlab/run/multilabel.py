"""A multi-label classifier trained by a hand-written loop: its settings, rows, batches, the order of an epoch, and the loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers.trainer_pt_utils import get_parameter_names

from shardlab.data.comments import UNKNOWN

# --- settings -------------------------------------------------------------------------------------------------------


class TrainParams(BaseModel):
    """How to train. Numbers are numbers: `"16"` is refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    batch_size: int = Field(16, ge=1, description="rows per rank and forward pass: the micro-batch")
    grad_accum: int = Field(1, ge=1, description="forward passes an optimizer step")
    epochs: int = Field(4, ge=1, description="passes over the rows")
    lr: float = Field(1e-3, gt=0, description="learning rate at the first step; it falls to 0 in a straight line")
    weight_decay: float = Field(0.01, ge=0, description="of AdamW; not for biases and layer norms")
    clipping: float = Field(1.0, gt=0, description="largest norm of the gradients")
    seed: int = 0
    folds: int = Field(3, ge=2, description="of the cross-validation")
    patience: int = Field(3, ge=1, description="evaluations without a better one before training stops")


class TrainingConfig(BaseModel):
    """What a YAML file says. Without `deepspeed`, the plain `Trainer` trains."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    model_name: str = "comment-tiny"
    num_labels: int = Field(16, ge=1)
    max_len: int = Field(64, ge=8, description="longest text, tokens")
    data: str = Field("generated", description="generated, or a CSV file with a column `text` and a column per label")
    train_params: TrainParams = TrainParams()
    deepspeed: str | None = Field(None, description="a DeepSpeed configuration; its path begins in the folder of the YAML file")


# --- data -----------------------------------------------------------------------------------------------------------


class Encoded(Dataset):
    """Rows of `text` and `labels` as token ids. `augment`, where there is one, is called each time that a row is read."""

    def __init__(self, rows: list[dict], tokenizer, max_len: int, augment: Callable | None = None):
        self.rows, self.augment, self.epoch = rows, augment, 0
        self.ids = tokenizer([row["text"] for row in rows], truncation=True, max_length=max_len)["input_ids"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict:
        ids = self.ids[number]
        if self.augment:
            ids = self.augment(ids, epoch=self.epoch, row=number)
        return {"input_ids": ids, "labels": self.rows[number]["labels"]}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class Collator:
    """Rows as tensors on the CPU: `input_ids` and `attention_mask` [rows, longest], `labels` [rows, labels] in float32."""

    def __init__(self, pad_id: int):
        self.pad_id = pad_id

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), longest), self.pad_id)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
            mask[number, : len(row["input_ids"])] = 1
        labels = torch.tensor([row["labels"] for row in rows], dtype=torch.float32)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class EpochOrder(Sampler):
    """The numbers of the rows, each epoch in an order of its own that seed and epoch draw.

    Args:
        rows: how many there are.
        seed: of the orders.
        multiple: so many come as are a multiple of it, micro-batch × ranks; the few that are over are left out of this epoch. (The
            argument `dataloader_drop_last` of `Trainer` would leave rows out of evaluations too.)
        data: rows that are told the epoch too, if they have `set_epoch`. On several ranks accelerate 1.15 tells a sampler that
            wants to know, and then not the data set; on one rank it tells both.
    """

    def __init__(self, rows: int, seed: int, multiple: int, data: Dataset | None = None):
        self.rows, self.seed, self.length, self.epoch = rows, seed, rows // multiple * multiple, 0
        self.data = data

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator().manual_seed(1_000 * self.seed + self.epoch)
        return iter(torch.randperm(self.rows, generator=draw).tolist()[: self.length])

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(epoch)


# --- the loop -------------------------------------------------------------------------------------------------------


def train_by_hand(model: nn.Module, rows: Encoded, collate: Collator, loss: nn.Module, params: TrainParams) -> list[float]:
    """Train in one process, in float32: AdamW, a rate that falls in a straight line to 0, clipping, accumulation.

    Returns:
        The loss of each optimizer step: the mean over all labels of its rows that somebody has given.
    """
    plain = get_parameter_names(model, [nn.LayerNorm], [r"bias"])
    groups = [
        {"params": [p for name, p in model.named_parameters() if name in plain], "weight_decay": params.weight_decay},
        {"params": [p for name, p in model.named_parameters() if name not in plain], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=params.lr)
    batches = len(rows) // params.batch_size
    steps = params.epochs * math.ceil(batches / params.grad_accum)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    order, losses = EpochOrder(len(rows), params.seed, params.batch_size), []
    model.train()
    for epoch in range(params.epochs):
        order.set_epoch(epoch)
        rows.set_epoch(epoch)
        numbers = list(order)
        for first in range(0, batches, params.grad_accum):
            chosen = range(first, min(first + params.grad_accum, batches))
            group = [collate([rows[n] for n in numbers[b * params.batch_size : (b + 1) * params.batch_size]]) for b in chosen]
            given = sum((batch["labels"] != UNKNOWN).sum() for batch in group)
            total = 0.0
            for batch in group:
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                part = loss(logits, batch["labels"]).sum() / given
                part.backward()
                total += part.item()
            nn.utils.clip_grad_norm_(model.parameters(), params.clipping)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(total)
    return losses
