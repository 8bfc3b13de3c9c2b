"""Question answering data: what is read, what is refused and with which words, and how answers are scored."""

import copy
import json
import os
import subprocess
import sys

import pytest

from shardlab.data.datasets import load_squad, squad_scores
from shardlab.data.squad_file import DataError, read_squad_json

NILE = "The Nile flows north. It is long."
V1 = {
    "version": "1.1",
    "data": [
        {
            "title": "Nile",
            "paragraphs": [
                {
                    "context": NILE,
                    "qas": [
                        {"id": "n1", "question": "Which river flows north?", "answers": [{"text": "Nile", "answer_start": 4}]},
                        {
                            "id": "n2",
                            "question": "Where does the Nile flow?",
                            "answers": [{"text": "north", "answer_start": 15}, {"text": "flows north", "answer_start": 9}],
                        },
                    ],
                }
            ],
        },
        {
            "title": "Zürich",
            "paragraphs": [
                {
                    "context": "Zürich liegt an der Limmat.",
                    "qas": [{"id": "z1", "question": "An welchem Fluss?", "answers": [{"text": "Limmat", "answer_start": 20}]}],
                }
            ],
        },
    ],
}


def write(path, document) -> str:
    path.write_text(document if isinstance(document, str) else json.dumps(document, ensure_ascii=False), encoding="utf-8")
    return str(path)


def many_paragraphs(number: int) -> dict:
    """A file with so many paragraphs, two questions each."""
    return {
        "data": [
            {
                "title": "Ports",
                "paragraphs": [
                    {
                        "context": f"Ship {n} left port {n}.",
                        "qas": [
                            {
                                "id": f"{n}-{q}",
                                "question": f"What left port {n}?",
                                "answers": [{"text": f"Ship {n}", "answer_start": 0}],
                            }
                            for q in range(2)
                        ],
                    }
                    for n in range(number)
                ],
            }
        ]
    }


# --- what is read -----------------------------------------------------------------------------------------------------


def test_mini_has_both_splits_without_overlap():
    data = load_squad("mini")
    assert set(data) == {"train", "validation"}
    for split in data.values():
        assert len(split) > 100
        assert {"id", "title", "context", "question", "answers"} <= set(split.column_names)
        row = split[0]
        (text,), (start,) = row["answers"]["text"], row["answers"]["answer_start"]
        assert row["context"][start : start + len(text)] == text
    assert not set(data["train"]["context"]) & set(data["validation"]["context"])


def test_v1_file_is_read_question_by_question(tmp_path):
    rows = read_squad_json(write(tmp_path / "v1.json", V1))
    assert [row["id"] for row in rows] == ["n1", "n2", "z1"]
    assert rows[1] == {
        "id": "n2",
        "title": "Nile",
        "context": NILE,
        "question": "Where does the Nile flow?",
        "answers": {"text": ["north", "flows north"], "answer_start": [15, 9]},
    }


def test_v2_file_loses_its_unanswerable_questions(tmp_path):
    document = copy.deepcopy(V1) | {"version": "v2.0"}
    for article in document["data"]:
        for qa in article["paragraphs"][0]["qas"]:
            qa["is_impossible"] = False
    document["data"][0]["paragraphs"][0]["qas"].insert(
        0,
        {
            "id": "n0",
            "question": "Who owns the Nile?",
            "is_impossible": True,
            "answers": [],
            "plausible_answers": [{"text": "Nile", "answer_start": 4}],
        },
    )
    rows = read_squad_json(write(tmp_path / "v2.json", document))
    assert [row["id"] for row in rows] == ["n1", "n2", "z1"]


@pytest.mark.parametrize("share, held_out", [(0.5, 6), (0.25, 3), (0.2, 3)])
def test_single_file_is_split_by_paragraph(tmp_path, share, held_out):
    data = load_squad(write(tmp_path / "ports.json", many_paragraphs(12)), validation_share=share)
    sides = {split: set(data[split]["context"]) for split in ("train", "validation")}
    assert not sides["train"] & sides["validation"]
    assert len(sides["train"] | sides["validation"]) == 12
    assert len(sides["validation"]) == held_out
    assert len(data["train"]) + len(data["validation"]) == 24


def test_two_paragraphs_are_enough_for_two_splits(tmp_path):
    data = load_squad(write(tmp_path / "v1.json", V1))
    assert len(set(data["train"]["context"])) == len(set(data["validation"]["context"])) == 1


def test_file_needs_no_ending_to_be_a_file(tmp_path):
    data = load_squad(write(tmp_path / "questions", V1))
    assert len(data["train"]) + len(data["validation"]) == 3


# --- what is refused --------------------------------------------------------------------------------------------------


def changed(*path, to) -> dict:
    """V1 with one value changed; the last part of the path is a key, and `to=...` takes it out."""
    document = copy.deepcopy(V1)
    holder = document
    for key in path[:-1]:
        holder = holder[key]
    if to is ...:
        del holder[path[-1]]
    else:
        holder[path[-1]] = to
    return document


PARAGRAPH = ("data", 0, "paragraphs", 0)
QA = (*PARAGRAPH, "qas", 1)
ANSWER = (*QA, "answers", 1)
AT_PARAGRAPH, AT_QA, AT_ANSWER = "data[0].paragraphs[0]", "data[0].paragraphs[0].qas[1]", "data[0].paragraphs[0].qas[1].answers[1]"

MALFORMED = {
    "not JSON": ('{"version": "1.1",\n "data": [}', "line 2, column 11", "not JSON"),
    "empty file": ("", "line 1, column 1", "not JSON"),
    "cut short": (json.dumps(V1)[:-7], "line 1", "not JSON"),
    "a list at the top": ([V1], "at the top", '"data": [articles]'),
    "no data": ({"version": "1.1"}, "data: Field required", '"data": [articles]'),
    "data is an object": ({"data": {"title": "Nile"}}, "data: ", "valid list"),
    "an article is text": (changed("data", 0, to="Nile"), "data[0]: ", "an object"),
    "no paragraphs": (changed("data", 0, "paragraphs", to=...), "data[0].paragraphs: ", ""),
    "paragraphs is an object": (changed("data", 0, "paragraphs", to={}), "data[0].paragraphs: ", ""),
    "a paragraph is text": (changed(*PARAGRAPH, to=NILE), f"{AT_PARAGRAPH}: ", "an object"),
    "no context": (changed(*PARAGRAPH, "context", to=...), f"{AT_PARAGRAPH}.context: ", "Field required"),
    "context is a number": (changed(*PARAGRAPH, "context", to=7), f"{AT_PARAGRAPH}.context: ", "valid"),
    "no questions": (changed(*PARAGRAPH, "qas", to=...), f"{AT_PARAGRAPH}.qas: ", "Field required"),
    "qas is text": (changed(*PARAGRAPH, "qas", to="Which?"), f"{AT_PARAGRAPH}.qas: ", "valid"),
    "a question is nothing": (changed(*QA, to=None), f"{AT_QA}: ", "an object"),
    "a question without text": (changed(*QA, "question", to=...), f"{AT_QA}.question: ", "Field required"),
    "question is a list": (changed(*QA, "question", to=["Which?"]), f"{AT_QA}.question: ", "valid"),
    "no answers": (changed(*QA, "answers", to=...), f"{AT_QA}.answers: ", "Field required"),
    "answers is another object": (changed(*QA, "answers", to={"text": ["north"]}), f"{AT_QA}.answers: ", "valid list"),
    "more texts than offsets": (
        changed(*QA, "answers", to={"text": ["north", "flows"], "answer_start": [15]}),
        f"{AT_QA}.answers: ",
        "lists of one length",
    ),
    "an answer is text": (changed(*ANSWER, to="north"), f"{AT_ANSWER}: ", "an object"),
    "answer without text": (changed(*ANSWER, "text", to=...), f"{AT_ANSWER}.text: ", "Field required"),
    "answer is a number": (changed(*ANSWER, "text", to=15), f"{AT_ANSWER}.text: ", "valid"),
    "empty answer": (changed(*ANSWER, "text", to=""), AT_ANSWER, "the answer is empty"),
    "no offset": (changed(*ANSWER, "answer_start", to=...), f"{AT_ANSWER}.answer_start: ", "Field required"),
    "offset is text": (changed(*ANSWER, "answer_start", to="9"), f"{AT_ANSWER}.answer_start: ", "valid"),
    "offset is a fraction": (changed(*ANSWER, "answer_start", to=9.5), f"{AT_ANSWER}.answer_start: ", "valid"),
    "offset is true": (changed(*ANSWER, "answer_start", to=True), f"{AT_ANSWER}.answer_start: ", "valid"),
    "offset one too large": (changed(*ANSWER, "answer_start", to=10), AT_ANSWER, "at offset 10, not the answer 'flows north'"),
    "offset after the end": (changed(*ANSWER, "answer_start", to=999), AT_ANSWER, "at offset 999"),
    # Python would count -24 from the end, where "flows north" does stand.
    "negative offset": (changed(*ANSWER, "answer_start", to=9 - len(NILE)), AT_ANSWER, f"at offset {9 - len(NILE)}"),
    "no answerable question": (
        {"data": [{"paragraphs": [{"context": NILE, "qas": [{"question": "Who?", "answers": []}]}]}]},
        "",
        "no answerable question",
    ),
    "nothing in it": ({"data": []}, "", "no answerable question"),
    "one paragraph only": ({"data": V1["data"][:1]}, "", "one paragraph only"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_file_is_refused_with_file_place_and_reason(tmp_path, case):
    document, place, reason = MALFORMED[case]
    path = write(tmp_path / "questions.json", document)
    with pytest.raises(DataError) as refused:
        load_squad(path)
    message = str(refused.value)
    assert message.startswith(f"{path}: ")
    assert place in message
    assert reason in message


def test_all_malformed_files_are_one_change_away_from_a_good_one(tmp_path):
    """Without this, a mistake in V1 would make every refusal above look right."""
    load_squad(write(tmp_path / "v1.json", V1))


def test_missing_file_is_refused(tmp_path):
    path = str(tmp_path / "nowhere.json")
    with pytest.raises(DataError, match="no such file") as refused:
        load_squad(path)
    assert path in str(refused.value)


def test_text_in_another_encoding_is_refused_at_its_byte(tmp_path):
    path = tmp_path / "latin.json"
    text = json.dumps(V1, ensure_ascii=False)
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8") as refused:
        load_squad(str(path))
    assert str(path) in str(refused.value)
    assert f"byte {text.index('ü')}" in str(refused.value)


def test_folder_in_place_of_a_file_is_refused(tmp_path):
    folder = tmp_path / "squad.json"
    folder.mkdir()
    with pytest.raises(DataError) as refused:
        load_squad(str(folder))
    assert str(folder) in str(refused.value)


OFFLINE = """
import sys
from shardlab.data.datasets import DataError, load_squad
for name in sys.argv[1:]:
    try:
        data = load_squad(name)
        print({split: list(data[split]["id"]) for split in sorted(data)})
    except DataError as error:
        print("refused", error)
"""


def load_offline(folder, *names: str) -> list[str]:
    """A line for each name, from a process of its own: the hub's library reads HF_HUB_OFFLINE when it is imported."""
    result = subprocess.run(
        [sys.executable, "-c", OFFLINE, *names],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")},
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == len(names)
    return lines


def test_unknown_name_is_refused_with_a_remedy_and_soon(tmp_path):
    names = ["nobody/nothing", "squad", "no such thing"]
    for name, line in zip(names, load_offline(tmp_path, *names), strict=True):
        assert line.startswith(f"refused {name}: neither 'mini', nor a JSON file")
        assert "Name a SQuAD JSON file, or download" in line


def write_lines(path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_data_set_from_the_hub_is_read_or_refused_by_its_columns(tmp_path):
    """A folder of data goes the way of a data set from the hub."""
    rows = read_squad_json(write(tmp_path / "v1.json", V1)) + [
        {"id": "n0", "title": "", "context": NILE, "question": "Who?", "answers": {"text": [], "answer_start": []}}
    ]
    write_lines(tmp_path / "squad" / "train.jsonl", rows)
    write_lines(tmp_path / "squad" / "validation.jsonl", rows[2:])
    for split in ("train", "validation"):
        write_lines(tmp_path / "reviews" / f"{split}.jsonl", [{"text": "Good.", "label": 1}])
    squad, reviews = load_offline(tmp_path, str(tmp_path / "squad"), str(tmp_path / "reviews"))
    assert squad == "{'train': ['n1', 'n2', 'z1'], 'validation': ['z1']}"
    assert reviews.startswith(f"refused {tmp_path / 'reviews'}: its rows have no question, context, answers;")


@pytest.mark.parametrize("split", ["test", "train"])
def test_data_set_without_train_or_validation_is_refused(tmp_path, split):
    write_lines(tmp_path / "part" / f"{split}.jsonl", read_squad_json(write(tmp_path / "v1.json", V1)))
    (line,) = load_offline(tmp_path, str(tmp_path / "part"))
    assert line.startswith(f"refused {tmp_path / 'part'}: ")
    assert {"test": "train", "train": "validation"}[split] in line.removeprefix(f"refused {tmp_path / 'part'}: ")


# --- files as people have them ----------------------------------------------------------------------------------------


def about_bridges(answers, context="Die Brücke baute Ada.", **more) -> dict:
    qa = {"id": "1", "question": "Who?", "answers": answers} | more
    return {"data": [{"title": "Bridges", "paragraphs": [{"context": context, "qas": [qa]}]}]}


def ada(start: int, text: str = "Ada") -> list[dict]:
    return [{"text": text, "answer_start": start}]


def test_a_byte_order_mark_and_the_columns_of_datasets_are_read(tmp_path):
    path = tmp_path / "marked.json"
    path.write_text(json.dumps(V1), encoding="utf-8-sig")
    assert len(read_squad_json(path)) == 3
    columns = about_bridges({"text": ["Ada"], "answer_start": [17]})
    assert read_squad_json(write(path, columns))[0]["answers"] == {"text": ["Ada"], "answer_start": [17]}


@pytest.mark.parametrize("as_lines", [True, False])
def test_a_question_per_row_is_read(tmp_path, as_lines):
    rows = read_squad_json(write(tmp_path / "v1.json", V1))
    text = "".join(json.dumps(row) + "\n" for row in rows) if as_lines else json.dumps(rows)
    assert read_squad_json(write(tmp_path / "rows.jsonl", text)) == rows
    data = load_squad(str(tmp_path / "rows.jsonl"))
    assert len(data["train"]) + len(data["validation"]) == 3


def test_rows_are_refused_at_their_line(tmp_path):
    good = json.dumps({"context": "Ada.", "question": "Who?", "answers": {"text": ["Ada"], "answer_start": [0]}})
    with pytest.raises(DataError, match="line 2: not JSON"):
        read_squad_json(write(tmp_path / "rows.jsonl", f"{good}\n{good[:-5]}\n"))
    with pytest.raises(DataError, match=r"rows\[1\].question: Field required"):
        read_squad_json(write(tmp_path / "rows.jsonl", good + "\n" + good.replace("question", "ask") + "\n"))


def test_answers_of_null_are_no_answers(tmp_path):
    document = about_bridges(None, is_impossible=True)
    document["data"] += V1["data"]
    assert [row["id"] for row in read_squad_json(write(tmp_path / "v2.json", document))] == ["n1", "n2", "z1"]


@pytest.mark.parametrize(
    "document, says",
    [
        (about_bridges(ada(18)), "counts bytes of UTF-8, and has to count characters (17)"),
        (about_bridges(ada(4), "\U0001f309: Ada."), "counts UTF-16 units, and has to count characters (3)"),
        (about_bridges(ada(2)), "which stands at offset 17"),
        (about_bridges(ada(4, "Bru\u0308cke")), "accents are written in another way than the context's, which has NFC"),
        (about_bridges(ada(4, "Tunnel")), "which stands nowhere in it"),
        (about_bridges(ada(0, "")), "the answer is empty"),
    ],
)
def test_what_an_offset_counts_is_said(tmp_path, document, says):
    with pytest.raises(DataError) as refused:
        read_squad_json(write(tmp_path / "bridges.json", document))
    assert says in str(refused.value) and "--skip-bad" in str(refused.value)


def test_nesting_without_end_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match="nested without end"):
        read_squad_json(write(tmp_path / "deep.json", "[" * 100_000))


def test_all_bad_places_are_counted_and_ten_are_named(tmp_path):
    document = many_paragraphs(25)
    for paragraph in document["data"][0]["paragraphs"][::2]:
        paragraph["qas"][0]["answers"][0]["answer_start"] = 3
    path = write(tmp_path / "ports.json", document)
    with pytest.raises(DataError) as refused:
        load_squad(path)
    said = str(refused.value)
    assert "13 of 50 answers cannot be used" in said and "and 3 more" in said
    assert said.count("].qas[0].answers[0]: ") == 10
    data = load_squad(path, skip_bad=True)
    assert len(data["train"]) + len(data["validation"]) == 37


# --- scores -----------------------------------------------------------------------------------------------------------


def row(*answers: str) -> dict:
    return {"answers": {"text": list(answers), "answer_start": [0] * len(answers)}}


@pytest.mark.parametrize(
    "predicted, answers, exact, f1",
    [
        ("Mera Vond", ["Mera Vond"], 100, 100),
        ("the  mera VOND.", ["Mera Vond"], 100, 100),  # case, articles, punctuation and spaces do not count
        ("Mera Vond", ["Torsu", "Mera Vond"], 100, 100),  # any of the right answers will do
        ("Mera", ["Mera Vond"], 0, 66.67),  # precision 1, recall 1/2
        ("in 1832 by Mera", ["Mera Vond"], 0, 33.33),  # precision 1/4, recall 1/2
        ("Torsu", ["Mera Vond"], 0, 0),
        ("", ["Mera Vond"], 0, 0),
    ],
)
def test_score_of_one_answer(predicted, answers, exact, f1):
    assert squad_scores([predicted], [row(*answers)]) == {"exact_match": pytest.approx(exact), "f1": pytest.approx(f1, abs=0.01)}


def test_scores_are_means_in_per_cent():
    scores = squad_scores(["oak", "Mera", "tea"], [row("oak"), row("Mera Vond"), row("silk")])
    assert scores == {"exact_match": pytest.approx(33.33, abs=0.01), "f1": pytest.approx((100 + 66.67 + 0) / 3, abs=0.01)}


def test_order_matters():
    """A score must compare each prediction with its own question."""
    assert squad_scores(["oak", "tea"], [row("tea"), row("oak")])["f1"] == 0


def test_numbers_that_differ_are_refused():
    with pytest.raises(ValueError, match="2 predictions for 1 question"):
        squad_scores(["oak", "tea"], [row("oak")])
