"""Question answering data: mini-squad, a SQuAD file, or SQuAD from the hub; and how answers are scored."""

from __future__ import annotations

from pathlib import Path

from shardlab.data.minisquad import DATA_FOLDER
from shardlab.data.squad_file import DataError, read_squad_json


def load_squad(source: str = "mini", *, validation_share: float = 0.2, skip_bad: bool = False):
    """SQuAD-like data as a `datasets.DatasetDict` with `train` and `validation`.

    Args:
        source: `mini` for the data shipped with the course; the path of a SQuAD v1.1 or v2.0 JSON file, or of one with a question
            per row (`read_squad_json`); or a name on the Hugging Face hub such as `squad` (read from the local cache if the hub
            cannot be reached).
        validation_share: for a single file, the share of its paragraphs that becomes `validation`.
        skip_bad: leave out questions of a file whose answers are empty or not at their offset.

    Raises:
        DataError: the source is neither, or the file is malformed.
    """
    from datasets import Dataset, DatasetDict

    if source == "mini":
        splits = {split: read_squad_json(DATA_FOLDER / f"{split}.json") for split in ("train", "validation")}
    elif source.endswith((".json", ".jsonl")) or Path(source).is_file():
        splits = _split_by_paragraph(read_squad_json(source, skip_bad=skip_bad), validation_share, source)
    else:
        data = load_from_hub(source, ("question", "context", "answers"), "'mini', nor a JSON file", "a SQuAD JSON file")
        return data.filter(lambda row: len(row["answers"]["text"]) > 0)
    return DatasetDict({split: Dataset.from_list(questions) for split, questions in splits.items()})


def _split_by_paragraph(questions: list[dict], share: float, source: str) -> dict[str, list[dict]]:
    """Every k-th paragraph goes to validation, so that no paragraph is on both sides."""
    contexts = list(dict.fromkeys(q["context"] for q in questions))
    if len(contexts) < 2:
        raise DataError(f"{source}: one paragraph only; at least two are needed, one to train on and one to validate with.")
    held_out = set(contexts[:: max(2, round(1 / share))])
    return {
        "train": [q for q in questions if q["context"] not in held_out],
        "validation": [q for q in questions if q["context"] in held_out],
    }


def load_from_hub(name: str, columns: tuple[str, ...], nor: str, instead: str):
    """A data set of the hub, or of its local cache, with splits `train` and `validation` and these columns.

    Args:
        name: on the hub, or whatever was taken for such a name.
        columns: what each row must have.
        nor: what else a source could have been, for the message: "'mini', nor a JSON file".
        instead: what to name in its place.

    Raises:
        DataError: it cannot be had, or has another form.
    """
    from datasets import load_dataset

    try:
        data = load_dataset(name)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{name}: neither {nor}, nor a data set that the hub or its cache gives: {reason} "
            f"Name {instead}, or download '{name}' once on a machine with network."
        ) from error
    absent = [split for split in ("train", "validation") if split not in data]
    if absent:
        raise DataError(f"{name}: it has no split {', '.join(absent)}; it has {', '.join(data)}.")
    missing = [column for column in columns if column not in data["train"].column_names]
    if missing:
        raise DataError(f"{name}: its rows have no {', '.join(missing)}; {', '.join(columns)} are needed.")
    return data


def squad_scores(predictions: list[str], references: list[dict]) -> dict[str, float]:
    """Exact match and F1 in per cent, by torchmetrics' SQuAD metric.

    Args:
        predictions: the generated answers.
        references: the rows of the data set that they answer, in the same order.
    """
    from torchmetrics.functional.text import squad

    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} questions: one for each is needed.")
    scores = squad(
        [{"id": str(number), "prediction_text": text} for number, text in enumerate(predictions)],
        [{"id": str(number), "answers": row["answers"]} for number, row in enumerate(references)],
    )
    return {name: round(float(value), 2) for name, value in scores.items()}
