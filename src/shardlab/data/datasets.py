"""Question answering data: mini-squad, a SQuAD file, or SQuAD from the hub; and how answers are scored."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, StrictInt, StrictStr, ValidationError

from shardlab.data.minisquad import DATA_FOLDER
from shardlab.errors import CourseError


class DataError(CourseError, ValueError):
    """A data file that cannot be used; the message names the file, the place and the reason."""


def read_squad_json(path: Path | str) -> list[dict]:
    """Read a file in the SQuAD v1.1 or v2.0 schema.

    Args:
        path: the JSON file.

    Returns:
        One dictionary a question: `id`, `title`, `context`, `question`, `answers` (`text` and `answer_start`, lists of
        equal length). Questions of v2.0 that have no answer are left out.

    Raises:
        DataError: the file is missing, is not JSON, has no `data`, has an answer that is not at its offset, or has no
            answerable question.
    """
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8. Save the file as UTF-8.") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: line {error.lineno}, column {error.colno}: not JSON ({error.msg}).") from None
    try:
        articles = _File.model_validate(document).data
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in first["loc"]).lstrip(".") or "at the top"
        form = ' A SQuAD file is {"version": …, "data": [articles]}.' if len(first["loc"]) < 2 else ""
        reason = "Input should be an object" if first["type"] == "model_type" else first["msg"]
        raise DataError(f"{path}: {place}: {reason}.{form}") from None

    questions = []
    for a, article in enumerate(articles):
        for p, paragraph in enumerate(article.paragraphs):
            for q, question in enumerate(paragraph.qas):
                where = f"data[{a}].paragraphs[{p}].qas[{q}]"
                for n, answer in enumerate(question.answers):
                    start, end = answer.answer_start, answer.answer_start + len(answer.text)
                    found = paragraph.context[start:end] if start >= 0 else ""
                    if not answer.text or found != answer.text:
                        has = f"the context has {found!r} at offset {start}"
                        raise DataError(f"{path}: {where}.answers[{n}]: {has}, not the answer {answer.text!r}.")
                if question.answers:
                    texts, starts = ([getattr(answer, key) for answer in question.answers] for key in ("text", "answer_start"))
                    questions.append(
                        {
                            "id": str(where if question.id is None else question.id),
                            "title": str(article.title),
                            "context": paragraph.context,
                            "question": question.question,
                            "answers": {"text": texts, "answer_start": starts},
                        }
                    )
    if not questions:
        raise DataError(f"{path}: no answerable question in it.")
    return questions


class _Answer(BaseModel):
    text: StrictStr
    answer_start: StrictInt


class _Question(BaseModel):
    id: object = None
    question: StrictStr
    answers: list[_Answer]


class _Paragraph(BaseModel):
    context: StrictStr
    qas: list[_Question]


class _Article(BaseModel):
    title: object = ""
    paragraphs: list[_Paragraph]


class _File(BaseModel):
    """What of the SQuAD schema is read."""

    data: list[_Article]


def load_squad(source: str = "mini", *, validation_share: float = 0.2):
    """SQuAD-like data as a `datasets.DatasetDict` with `train` and `validation`.

    Args:
        source: `mini` for the data shipped with the course; the path of a SQuAD v1.1 or v2.0 JSON file; or a name on
            the Hugging Face hub such as `squad` (read from the local cache if the hub cannot be reached).
        validation_share: for a single file, the share of its paragraphs that becomes `validation`.

    Raises:
        DataError: the source is neither, or the file is malformed.
    """
    from datasets import Dataset, DatasetDict

    if source == "mini":
        splits = {split: read_squad_json(DATA_FOLDER / f"{split}.json") for split in ("train", "validation")}
    elif source.endswith(".json") or Path(source).is_file():
        splits = _split_by_paragraph(read_squad_json(source), validation_share, source)
    else:
        return _load_from_hub(source)
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


def _load_from_hub(name: str):
    from datasets import load_dataset

    try:
        data = load_dataset(name)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{name}: neither 'mini', nor a JSON file, nor a data set that the hub or its cache gives: {reason} "
            f"Name a SQuAD JSON file, or download '{name}' once on a machine with network."
        ) from error
    absent = [split for split in ("train", "validation") if split not in data]
    if absent:
        raise DataError(f"{name}: it has no split {', '.join(absent)}; it has {', '.join(data)}.")
    missing = [key for key in ("question", "context", "answers") if key not in data["train"].column_names]
    if missing:
        raise DataError(f"{name}: its rows have no {', '.join(missing)}; a SQuAD-like data set is needed.")
    return data.filter(lambda row: len(row["answers"]["text"]) > 0)


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
