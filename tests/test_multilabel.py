"""The hand-written loop learns; an epoch's order is drawn by seed and epoch alone; labels that nobody has given count nowhere."""

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from pydantic import ValidationError
from torch.utils.data import DataLoader

from shardlab.data.comments import UNKNOWN, comments
from shardlab.data.models import load_classifier, load_tokenizer
from shardlab.run.multilabel import Collator, Encoded, EpochOrder, TrainingConfig, TrainParams, train_by_hand


class Entries(torch.nn.Module):
    def forward(self, logits, labels):
        losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.clamp(min=0), reduction="none")
        return losses.masked_fill(labels == UNKNOWN, 0)


def rows(count: int = 48) -> Encoded:
    return Encoded(comments("train", count), load_tokenizer("comment-tiny"), 64)


def without_dropout():
    model = load_classifier()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def losses_of(**params) -> list[float]:
    data = rows()
    return train_by_hand(without_dropout(), data, Collator(1), Entries(), TrainParams(**params))


def test_loop_learns_and_is_the_same_each_time():
    losses = losses_of(batch_size=8, epochs=4, lr=3e-3)
    assert len(losses) == 24 and sum(losses[-6:]) < 0.7 * sum(losses[:6])
    assert losses == losses_of(batch_size=8, epochs=4, lr=3e-3)


def test_accumulation_is_a_larger_batch():
    """Of batches with unequal numbers of labels: the mean is that over all labels of the step."""
    whole, parts = losses_of(batch_size=16, epochs=2), losses_of(batch_size=4, grad_accum=4, epochs=2)
    assert len(whole) == len(parts) == 6
    assert max(abs(a - b) for a, b in zip(whole, parts)) < 1e-5


def test_an_epoch_has_an_order_of_its_own():
    order = EpochOrder(10, seed=1, multiple=4)
    first = list(order)
    order.set_epoch(1)
    second = list(order)
    assert len(first) == len(order) == 8 and len(set(first)) == 8 and first != second
    order.set_epoch(0)
    assert list(order) == first and first != list(EpochOrder(10, seed=2, multiple=4))
    assert sorted(EpochOrder(10, seed=1, multiple=1)) == list(range(10))


@pytest.mark.parametrize("ranks", [1, 2])
def test_rows_are_told_the_epoch_on_any_number_of_ranks(ranks):
    """Or augmentation would mask the same words in all epochs of a run on two ranks."""
    rows = Encoded(comments("train", 8), load_tokenizer("comment-tiny"), 16)
    loader = DataLoader(rows, batch_size=2, sampler=EpochOrder(8, seed=1, multiple=2 * ranks, data=rows))
    prepared = prepare_data_loader(loader, device=torch.device("cpu"), num_processes=ranks, process_index=ranks - 1)
    prepared.set_epoch(3)
    assert rows.epoch == 3


def test_batches_are_padded_on_the_right():
    data = rows(8)
    batch = Collator(1)([data[0], data[1]])
    lengths = [len(data[number]["input_ids"]) for number in (0, 1)]
    assert batch["input_ids"].shape == (2, max(lengths)) and batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["labels"].dtype == torch.float32 and batch["labels"].shape == (2, 16)


def test_augmentation_is_told_row_and_epoch():
    told = []
    data = rows(4)
    data.augment = lambda ids, *, epoch, row: told.append((epoch, row)) or ids
    data.set_epoch(3)
    data[2]
    assert told == [(3, 2)]


@pytest.mark.parametrize("values", [{"lr": "1e-3"}, {"batch_size": 0}, {"batchsize": 8}, {"epochs": 2.5}, {"seed": True}])
def test_settings_refuse_slips(values):
    with pytest.raises(ValidationError, match=next(iter(values))):
        TrainingConfig(train_params=TrainParams(**values))
