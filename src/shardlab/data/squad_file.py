"""SQuAD files as people have them: the nested schema, a question per row, JSON Lines; and what is wrong with them."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

from pydantic import BaseModel, StrictInt, StrictStr, ValidationError, field_validator

from shardlab.errors import CourseError

NAMED = 10
"""So many bad places are named; all are counted."""


class DataError(CourseError, ValueError):
    """A data file that cannot be used; the message names the file, the place and the reason."""


def read_squad_json(path: Path | str, *, skip_bad: bool = False) -> list[dict]:
    """Read a file in the SQuAD v1.1 or v2.0 schema, or one with a question per row: a JSON list, or JSON Lines.

    `answers` may be a list of {"text", "answer_start"}, an object of two lists as `datasets` has it, or null. A byte-order mark is
    passed over.

    Args:
        path: the JSON file.
        skip_bad: leave out questions with an answer that is empty or not at its offset, instead of refusing the file.

    Returns:
        One dictionary per question: `id`, `title`, `context`, `question`, `answers` (`text` and `answer_start`, lists of
        equal length). Questions of v2.0 that have no answer are left out.

    Raises:
        DataError: the file is missing, is not JSON, is of neither form, has an answer that is not at its offset, or has no
            answerable question. All bad places are counted, and the first ten named.
    """
    path = Path(path)
    questions, bad, answers = [], [], 0
    for where, title, context, question in _questions(path):
        answers += len(question.answers)
        wrong = [f"{where}.answers[{n}]: {why}" for n, answer in enumerate(question.answers) if (why := _wrong(context, answer))]
        bad += wrong
        if question.answers and not wrong:
            texts, starts = ([getattr(answer, key) for answer in question.answers] for key in ("text", "answer_start"))
            questions.append(
                {
                    "id": str(where if question.id is None else question.id),
                    "title": title,
                    "context": context,
                    "question": question.question,
                    "answers": {"text": texts, "answer_start": starts},
                }
            )
    if bad and not skip_bad:
        count = f"{len(bad)} of {answers} answers cannot be used: " if answers > 1 else ""
        raise DataError(f"{path}: {count}{_listed(bad)}. To go on without their questions: --skip-bad")
    if not questions:
        raise DataError(f"{path}: no answerable question in it.")
    return questions


def _listed(places: list[str]) -> str:
    more = f"; and {len(places) - NAMED} more" if len(places) > NAMED else ""
    return "; ".join(places[:NAMED]) + more


def _wrong(context: str, answer: _Answer) -> str:
    """What is wrong with an answer, and what it looks like; empty if it stands at its offset."""
    text, start = answer.text, answer.answer_start
    if not text:
        return "the answer is empty"
    found = context[start : start + len(text)] if start >= 0 else ""
    if found == text:
        return ""
    has = f"the context has {found!r} at offset {start}, not the answer {text!r}"
    at = context.find(text)
    encoded, units = text.encode(), text.encode("utf-16-le")
    if start >= 0 and at >= 0:
        if context.encode()[start : start + len(encoded)] == encoded:
            return f"{has}: the offset counts bytes of UTF-8, and has to count characters ({_nearest(context, text, start)})"
        if context.encode("utf-16-le")[2 * start : 2 * start + len(units)] == units:
            return f"{has}: the offset counts UTF-16 units, and has to count characters ({_nearest(context, text, start)})"
    if at >= 0:
        return f"{has}, which stands at offset {_nearest(context, text, start)}"
    for form in ("NFC", "NFD"):
        if unicodedata.normalize(form, text) in context:
            return f"{has}: its accents are written in another way than the context's, which has {form}; normalize both to NFC"
    return f"{has}, which stands nowhere in it"


def _nearest(context: str, text: str, start: int) -> int:
    places = [at for at in range(len(context)) if context.startswith(text, at)]
    return min(places, key=lambda at: abs(at - start))


# --- the forms --------------------------------------------------------------------------------------------------------


class _Answer(BaseModel):
    text: StrictStr
    answer_start: StrictInt


class _Question(BaseModel):
    id: object = None
    question: StrictStr
    answers: list[_Answer]

    @field_validator("answers", mode="before")
    @classmethod
    def _as_list(cls, given):
        if given is None:
            return []
        if isinstance(given, dict) and set(given) >= {"text", "answer_start"}:
            texts, starts = given["text"], given["answer_start"]
            if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
                raise ValueError("text and answer_start have to be lists of one length")
            return [{"text": text, "answer_start": start} for text, start in zip(texts, starts)]
        return given


class _Paragraph(BaseModel):
    context: StrictStr
    qas: list[_Question]


class _Article(BaseModel):
    title: object = ""
    paragraphs: list[_Paragraph]


class _File(BaseModel):
    """What of the SQuAD schema is read."""

    data: list[_Article]


class _Row(_Question):
    """A question with its context, as `datasets` has them."""

    title: object = ""
    context: StrictStr


class _Rows(BaseModel):
    rows: list[_Row]


def _questions(path: Path):
    """Each question, with its place in the file, its title and its context."""
    document = _document(path)
    if isinstance(document, list) and document and isinstance(document[0], dict) and "context" in document[0]:
        for number, row in enumerate(_validated(path, _Rows, {"rows": document}).rows):
            yield f"rows[{number}]", str(row.title), row.context, row
        return
    for a, article in enumerate(_validated(path, _File, document).data):
        for p, paragraph in enumerate(article.paragraphs):
            for q, question in enumerate(paragraph.qas):
                yield f"data[{a}].paragraphs[{p}].qas[{q}]", str(article.title), paragraph.context, question


def _document(path: Path):
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8. Save the file as UTF-8.") from None
    try:
        return json.loads(text)
    except RecursionError:
        raise DataError(f"{path}: nested without end, so it is no SQuAD file.") from None
    except json.JSONDecodeError as error:
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) > 1 and lines[0].lstrip().startswith("{") and lines[0].rstrip().endswith("}"):
            return _json_lines(path, text)
        raise DataError(f"{path}: line {error.lineno}, column {error.colno}: not JSON ({error.msg}).") from None


def _json_lines(path: Path, text: str) -> list:
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{path}: line {number}: not JSON ({getattr(error, 'msg', 'nested without end')}).") from None
    return rows


def _validated(path: Path, form: type[BaseModel], document):
    try:
        return form.model_validate(document)
    except ValidationError as error:
        errors = error.errors()
        places = [_place(each) for each in errors]
        count = f"{len(places)} places: " if len(places) > 1 else ""
        hint = (
            ' A SQuAD file is {"version": …, "data": [articles]}, or has a question per row.' if len(errors[0]["loc"]) < 2 else ""
        )
        raise DataError(f"{path}: {count}{_listed(places)}.{hint}") from None


def _place(error: dict) -> str:
    place = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in error["loc"]).lstrip(".") or "at the top"
    return f"{place}: {'Input should be an object' if error['type'] == 'model_type' else error['msg']}"
