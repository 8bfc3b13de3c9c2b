"""mini-squad: the shipped files are what the generator writes, and each question has one right answer, at its offset."""

import json
import os
import re
import subprocess
import sys

import pytest

from shardlab.data import minisquad
from shardlab.data.minisquad import ASIDES, DATA_FOLDER, KINDS, PARAGRAPHS, SEED, squad_split, write_files

SPLITS = ("train", "validation")


@pytest.fixture(scope="module")
def shipped() -> dict[str, dict]:
    return {split: json.loads((DATA_FOLDER / f"{split}.json").read_text(encoding="utf-8")) for split in SPLITS}


def paragraphs_of(document: dict) -> list[dict]:
    return [paragraph for article in document["data"] for paragraph in article["paragraphs"]]


def test_generator_writes_the_shipped_bytes(tmp_path):
    write_files(tmp_path)
    for split in SPLITS:
        assert (tmp_path / f"{split}.json").read_bytes() == (DATA_FOLDER / f"{split}.json").read_bytes()


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_documented_command_writes_the_same_bytes_in_any_process(tmp_path, hash_seed):
    """Python's own hashes differ from process to process; nothing in the generator may depend on them."""
    subprocess.run(
        [sys.executable, "-m", "shardlab.data.minisquad", "--folder", str(tmp_path)],
        check=True,
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
    )
    for split in SPLITS:
        assert (tmp_path / f"{split}.json").read_bytes() == (DATA_FOLDER / f"{split}.json").read_bytes()


def test_another_seed_gives_another_world():
    here, elsewhere = (squad_split("train", 20, seed) for seed in (SEED, SEED + 1))
    assert here == squad_split("train", 20)
    contexts = [{paragraph["context"] for paragraph in paragraphs_of(document)} for document in (here, elsewhere)]
    assert not contexts[0] & contexts[1]


def test_files_are_small_and_whole(shipped):
    assert sum((DATA_FOLDER / f"{split}.json").stat().st_size for split in SPLITS) <= 2 * 10**6
    for split in SPLITS:
        assert len(paragraphs_of(shipped[split])) == PARAGRAPHS[split]


@pytest.mark.parametrize("split", SPLITS)
def test_answer_stands_at_its_offset_and_nowhere_else(shipped, split):
    for paragraph in paragraphs_of(shipped[split]):
        for qa in paragraph["qas"]:
            (answer,) = qa["answers"]
            text, start = answer["text"], answer["answer_start"]
            assert text and paragraph["context"][start : start + len(text)] == text, qa["id"]
            assert paragraph["context"].count(text) == 1, f"{qa['id']}: {text!r} stands twice, so its offset is not certain"


def test_splits_share_no_paragraph_and_no_question_id(shipped):
    contexts = {split: [paragraph["context"] for paragraph in paragraphs_of(shipped[split])] for split in SPLITS}
    assert not set(contexts["train"]) & set(contexts["validation"])
    ids = [qa["id"] for split in SPLITS for paragraph in paragraphs_of(shipped[split]) for qa in paragraph["qas"]]
    assert len(ids) == len(set(ids))
    for split in SPLITS:
        assert len(contexts[split]) == len(set(contexts[split]))


@pytest.mark.parametrize("split", SPLITS)
def test_every_paragraph_has_several_different_questions(shipped, split):
    for paragraph in paragraphs_of(shipped[split]):
        questions = [qa["question"] for qa in paragraph["qas"]]
        assert len(questions) >= 3
        assert len(questions) == len(set(questions))


def test_world_is_varied(shipped):
    """An answer that could be guessed without the paragraph would make exact match mean little."""
    answers = [qa["answers"][0]["text"] for paragraph in paragraphs_of(shipped["train"]) for qa in paragraph["qas"]]
    most_frequent = max(answers.count(answer) for answer in set(answers))
    assert most_frequent / len(answers) < 0.03
    asked_of = {parsed_question(qa["question"])[0] for paragraph in paragraphs_of(shipped["train"]) for qa in paragraph["qas"]}
    assert asked_of == {(kind, number) for kind in KINDS for number in range(len(KINDS[kind].relations))}


# --- reading the paragraphs back --------------------------------------------------------------------------------------
# The templates are read as patterns, so the facts of a paragraph come from its text alone, as a reader would get them.


def as_pattern(template: str, **groups: str) -> re.Pattern:
    text = re.escape(template)
    for name, pattern in groups.items():
        text = text.replace(re.escape(f"{{{name}}}"), f"(?P<{name}>{pattern})")
    return re.compile(f"^{text}$")


FORMS = {
    minisquad.person: "[A-Z][a-z]+ [A-Z][a-z]+",
    minisquad.name: "[A-Z][a-z]+",
    minisquad.town: "[A-Z][a-z]+",
    minisquad.title: "The [A-Z][a-z]+ [A-Z][a-z]+",
    minisquad.year: "[0-9]{4}",
    minisquad.count: "[0-9]+",
}
ONE_WORD = "[A-Za-z]+"
QUESTIONS = [
    ((kind, number), as_pattern(question, e=FORMS[KINDS[kind].entity]))
    for kind in KINDS
    for number, relation in enumerate(KINDS[kind].relations)
    for question in relation.questions
]


def parsed_question(question: str) -> tuple[tuple[str, int], str]:
    """The relation that a question asks for, as (kind, number), and the entity that it asks about."""
    found = [(relation, match["e"]) for relation, pattern in QUESTIONS if (match := pattern.match(question))]
    assert len(found) == 1, f"{question!r} reads as {found}"
    return found[0]


def facts_in(context: str, kind: str) -> list[tuple[int, str, str]]:
    """Every (relation, entity, value) that the paragraph tells; a pronoun means the entity of the sentence before."""
    facts, before, named = [], None, FORMS[KINDS[kind].entity]
    for sentence in re.findall(r"[^.]+\.", context):
        sentence = sentence.strip()
        if sentence in ASIDES:
            continue
        readings = set()
        for number, relation in enumerate(KINDS[kind].relations):
            said = FORMS.get(relation.value, ONE_WORD)
            for statement in relation.statements:
                if match := as_pattern(statement, e=named, v=said).match(sentence):
                    readings.add((number, match["e"], match["v"]))
                # "The bridge crosses …" for "The Loran bridge crosses …": the pronoun stands for all the words of the name.
                for start in ("The {e} bridge ", "The {e} museum ", "The {e} ", "{e} "):
                    if statement.startswith(start) and "{v}" in statement:
                        rest = as_pattern(f"{KINDS[kind].pronoun} {statement[len(start) :]}", v=said).match(sentence)
                        if rest and before:
                            readings.add((number, before, rest["v"]))
                        break
        assert len(readings) == 1, f"{sentence!r} reads as {readings}"
        facts.append(readings.pop())
        before = facts[-1][1]
    return facts


@pytest.fixture(scope="module")
def told(shipped) -> list[tuple[list, list]]:
    """For each paragraph of the train split: its questions as (relation, entity, answer), and its facts."""
    result = []
    for paragraph in paragraphs_of(shipped["train"])[:300]:
        asked = [(*parsed_question(qa["question"]), qa["answers"][0]["text"]) for qa in paragraph["qas"]]
        kinds = {relation[0] for relation, _, _ in asked}
        assert len(kinds) == 1, "a paragraph tells of one kind of thing"
        kind = kinds.pop()
        result.append(([(relation[1], entity, answer) for relation, entity, answer in asked], facts_in(paragraph["context"], kind)))
    return result


def test_paragraph_tells_the_answer_that_is_given(told):
    for asked, facts in told:
        for relation, entity, answer in asked:
            values = {value for number, of, value in facts if (number, of) == (relation, entity)}
            assert values == {answer}


def test_two_entities_compete_for_every_paragraph(told):
    """Of two things of one kind the same is told, so the name in the question decides, not its verb."""
    with_distractor = questions = 0
    for asked, facts in told:
        assert len({entity for _, entity, _ in facts}) == 2
        numbers = [number for number, _, _ in facts]
        assert any(numbers.count(number) == 2 for number in numbers)
        for relation, entity, answer in asked:
            others = {value for number, of, value in facts if number == relation and of != entity}
            questions += 1
            with_distractor += bool(others)
            assert answer not in others
    assert with_distractor / questions > 0.4
