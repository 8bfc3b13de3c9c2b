"""Multi-label data: generated comments are what their text says of them; a CSV file is read, or refused by line and column."""

import pytest
import torch

from shardlab.data.comments import LABELS, SENTENCES, UNKNOWN, comment, comments, read_csv
from shardlab.data.models import ModelError, load_classifier, load_tokenizer
from shardlab.data.squad_file import DataError


def table(count: int = 1200) -> torch.Tensor:
    return torch.tensor([row["labels"] for row in comments("train", count)])


def test_a_comment_is_the_same_wherever_it_is_made():
    assert comments("train", 20) == [comment("train", number) for number in range(20)]
    assert comment("train", 3) != comment("test", 3) and comment("train", 3) != comment("train", 4)


def test_labels_are_rare_unequal_and_come_together():
    labels = table()
    positives = (labels == 1).sum(0)
    assert labels.shape[1] == len(LABELS) == 16
    assert positives.min() >= 20 and positives.max() > 5 * positives.min()
    assert 0.02 < (labels == UNKNOWN).float().mean() < 0.04
    together = ((labels[:, LABELS.index("parameters")] == 1) & (labels[:, LABELS.index("returns")] == 1)).sum()
    by_chance = positives[LABELS.index("parameters")] * positives[LABELS.index("returns")] / len(labels)
    assert together > 1.5 * by_chance


def test_text_says_most_of_what_is_labelled():
    """What is labelled stands in the text in three cases of four; the rest is vague."""
    clear = []
    for row in comments("train", 400):
        for label, value in zip(LABELS, row["labels"]):
            if value == 1:
                words = {word for sentence in SENTENCES[label] for word in sentence.split() if "{" not in word}
                clear.append(any(word in row["text"].split() for word in words))
    assert sum(clear) / len(clear) > 0.75


def test_every_comment_fits_the_encoder():
    tokenizer = load_tokenizer("comment-tiny")
    ids = tokenizer([row["text"] for row in comments("train") + comments("test")])["input_ids"]
    assert max(map(len, ids)) <= 64 == tokenizer.model_max_length
    assert all(row[0] == tokenizer.cls_token_id and row[-1] == tokenizer.eos_token_id for row in ids)
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == comment("train", 0)["text"]


def test_pre_trained_encoder_knows_more_than_a_new_one():
    """It fills in what was masked."""
    from transformers import AutoModelForMaskedLM

    from shardlab.data.models import COMMENT_TINY

    tokenizer, model = (
        load_tokenizer("comment-tiny"),
        AutoModelForMaskedLM.from_pretrained(COMMENT_TINY, dtype=torch.float32).eval(),
    )
    ids = tokenizer("Returns the list. Not safe from two threads.", return_tensors="pt")["input_ids"]
    right = 0
    for place in range(1, ids.shape[1] - 1):
        asked = ids.clone()
        asked[0, place] = tokenizer.mask_token_id
        with torch.no_grad():
            right += int(model(input_ids=asked).logits[0, place].argmax() == ids[0, place])
    assert right > (ids.shape[1] - 2) / 2


def test_classifier_has_a_new_head_each_time_with_its_seed():
    one, same, other = (load_classifier(num_labels=5, seed=seed).classifier.out_proj.weight for seed in (1, 1, 2))
    assert one.shape == (5, 96) and torch.equal(one, same) and not torch.equal(one, other)
    with pytest.raises(ModelError, match="no/such-model.*comment-tiny"):
        load_classifier("no/such-model")


def test_csv_is_read_with_empty_cells_as_unknown(tmp_path):
    file = tmp_path / "own.csv"
    file.write_text('bug,text,todo\n1,"a, ""b""\nc",0\n, d ,1\n', encoding="utf-8-sig")
    rows, names = read_csv(file)
    assert names == ["bug", "todo"]
    assert rows == [{"text": 'a, "b"\nc', "labels": [1, 0]}, {"text": " d ", "labels": [UNKNOWN, 1]}]
    assert read_csv(file, ["todo"])[0][1] == {"text": " d ", "labels": [1]}


@pytest.mark.parametrize(
    "content, says",
    [
        ("bug,todo\n1,0\n", "no column 'text'"),
        ("text,bug\na,2\n", "line 2, column bug: '2' is no label"),
        ("text,bug\na,1\nb,yes\n", "line 3, column bug: 'yes'"),
        ("text,bug\na\n", "line 2: 1 cells for 2 columns"),
        ("text,bug\n ,1\n", "line 2, column text: there is no text"),
        ("text,bug\n", "no row below"),
        ("", "no column 'text'; the columns are none"),
        (b"text,bug\n\xe9,1\n", "is not UTF-8, at byte"),
        (None, "there is no such file"),
    ],
)
def test_csv_at_fault_is_refused_by_line_and_column(tmp_path, content, says):
    file = tmp_path / "own.csv"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=says) as refused:
        read_csv(file)
    assert "own.csv" in str(refused.value)
