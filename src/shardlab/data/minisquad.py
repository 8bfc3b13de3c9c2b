"""mini-squad: a small world of invented things, written out as paragraphs, questions and answers.

Every name is put together from syllables, so an answer cannot be remembered from somewhere else: it must be found in
the paragraph and copied. Every paragraph speaks of two things of the same kind (say, two bridges), so the question's
name matters, not only its verb. The same seed gives the same bytes on every machine.

    python -m shardlab.data.minisquad            # writes src/shardlab/data/shipped/mini_squad/{train,validation}.json again
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

DATA_FOLDER = Path(__file__).parent / "shipped" / "mini_squad"
SEED = 20260
PARAGRAPHS = {"train": 720, "validation": 160}

ONSETS = "b d f g h j k l m n p r s t v w z br dr gr st tr".split()
VOWELS = "a e i o u ai ou".split()
CODAS = ["", "", "l", "m", "n", "r", "s"]
TOWN_ENDINGS = ["ford", "ham", "by", "mere", "stad", "wick", "holm", "port"]

GOODS = [
    "wool",
    "salt",
    "timber",
    "copper",
    "glass",
    "tea",
    "paper",
    "honey",
    "wheat",
    "silk",
    "tin",
    "oil",
    "rice",
    "marble",
    "leather",
    "coffee",
]
MATERIALS = ["granite", "oak", "brick", "iron", "sandstone", "steel", "limestone", "concrete", "slate", "cedar"]
SUBJECTS = ["botany", "optics", "geometry", "medicine", "chemistry", "geology", "music", "astronomy", "law", "grammar"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"]
ADJECTIVES = ["Silver", "Quiet", "Last", "Hidden", "Red", "Northern", "Broken", "Second", "Golden", "Empty"]
NOUNS = ["Lantern", "Harbour", "Winter", "Garden", "Mirror", "Letter", "Orchard", "Voyage", "Clock", "Tower"]


def syllable(rng: Random) -> str:
    return rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)


def name(rng: Random) -> str:
    """One capitalised word of two syllables, sometimes three."""
    return "".join(syllable(rng) for _ in range(3 if rng.random() < 0.2 else 2)).capitalize()


def town(rng: Random) -> str:
    return (syllable(rng) + rng.choice(TOWN_ENDINGS)).capitalize()


def person(rng: Random) -> str:
    return f"{name(rng)} {name(rng)}"


def title(rng: Random) -> str:
    return f"The {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"


def year(rng: Random) -> str:
    return str(rng.randrange(1400, 2020))


def count(rng: Random) -> str:
    return str(rng.randrange(11, 990))


def one_of(words: list[str]):
    return lambda rng: rng.choice(words)


@dataclass(frozen=True)
class Relation:
    """One thing that can be said of an entity: `{e}` stands for the entity, `{v}` for the value."""

    value: object
    statements: tuple[str, ...]
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """A kind of entity: how one is named, what it is called instead of its name, and what can be said of it."""

    entity: object
    pronoun: str
    relations: tuple[Relation, ...]


KINDS = {
    "town": Kind(
        town,
        "The town",
        (
            Relation(
                person,
                ("{e} was founded by {v}.", "{v} founded {e}.", "The founder of {e} was {v}."),
                ("Who founded {e}?", "Who was the founder of {e}?"),
            ),
            Relation(
                year,
                ("{e} received its charter in {v}.", "In {v} a charter was given to {e}."),
                ("When did {e} receive its charter?", "In what year was a charter given to {e}?"),
            ),
            Relation(
                name,
                ("{e} lies on the river {v}.", "The river {v} flows through {e}."),
                ("On which river does {e} lie?", "Which river flows through {e}?"),
            ),
            Relation(
                one_of(GOODS),
                ("{e} is known for its {v}.", "The market of {e} sells mostly {v}."),
                ("What is {e} known for?", "What does the market of {e} sell?"),
            ),
            Relation(person, ("The mayor of {e} is {v}.", "{v} is the mayor of {e}."), ("Who is the mayor of {e}?",)),
            Relation(
                town,
                ("A ferry runs from {e} to {v}.", "{e} is joined to {v} by a ferry."),
                ("Where does the ferry from {e} go?", "To which town does the ferry from {e} run?"),
            ),
        ),
    ),
    "scholar": Kind(
        person,
        "The scholar",
        (
            Relation(
                town,
                ("{e} was born in {v}.", "The birthplace of {e} was {v}."),
                ("Where was {e} born?", "What was the birthplace of {e}?"),
            ),
            Relation(
                year,
                ("{e} began to teach in {v}.", "In {v} {e} began to teach."),
                ("When did {e} begin to teach?", "In what year did {e} begin to teach?"),
            ),
            Relation(
                one_of(SUBJECTS),
                ("{e} studied {v}.", "The subject of {e} was {v}."),
                ("What did {e} study?", "What was the subject of {e}?"),
            ),
            Relation(
                person,
                ("{e} was a pupil of {v}.", "The teacher of {e} was {v}."),
                ("Who was the teacher of {e}?", "Whose pupil was {e}?"),
            ),
            Relation(
                title, ("{e} wrote {v}.", "The best book of {e} is {v}."), ("What did {e} write?", "Which book did {e} write?")
            ),
        ),
    ),
    "company": Kind(
        name,
        "The company",
        (
            Relation(person, ("{e} was started by {v}.", "{v} started {e}."), ("Who started {e}?",)),
            Relation(
                town,
                ("{e} has its offices in {v}.", "The offices of {e} are in {v}."),
                ("Where are the offices of {e}?", "In which town does {e} have its offices?"),
            ),
            Relation(
                one_of(GOODS),
                ("{e} trades in {v}.", "The trade of {e} is {v}."),
                ("What does {e} trade in?", "What is the trade of {e}?"),
            ),
            Relation(
                count,
                ("{e} employs {v} people.", "There are {v} people who work for {e}."),
                ("How many people does {e} employ?", "How many people work for {e}?"),
            ),
            Relation(
                year, ("{e} was sold in {v}.", "In {v} the owners sold {e}."), ("When was {e} sold?", "In what year was {e} sold?")
            ),
        ),
    ),
    "ship": Kind(
        name,
        "The ship",
        (
            Relation(
                person, ("The captain of the {e} was {v}.", "{v} was captain of the {e}."), ("Who was the captain of the {e}?",)
            ),
            Relation(
                one_of(GOODS),
                ("The {e} carried {v}.", "The cargo of the {e} was {v}."),
                ("What did the {e} carry?", "What was the cargo of the {e}?"),
            ),
            Relation(
                year,
                ("The {e} was launched in {v}.", "In {v} the {e} was launched."),
                ("When was the {e} launched?", "In what year was the {e} launched?"),
            ),
            Relation(
                town,
                ("The {e} sailed from {v}.", "The home port of the {e} was {v}."),
                ("From where did the {e} sail?", "What was the home port of the {e}?"),
            ),
            Relation(
                count, ("The {e} had a crew of {v}.", "A crew of {v} served on the {e}."), ("How large was the crew of the {e}?",)
            ),
        ),
    ),
    "bridge": Kind(
        name,
        "The bridge",
        (
            Relation(
                person, ("The {e} bridge was designed by {v}.", "{v} designed the {e} bridge."), ("Who designed the {e} bridge?",)
            ),
            Relation(
                one_of(MATERIALS),
                ("The {e} bridge is built of {v}.", "The arches of the {e} bridge are of {v}."),
                ("What is the {e} bridge built of?", "Of what are the arches of the {e} bridge?"),
            ),
            Relation(
                name,
                ("The {e} bridge crosses the river {v}.", "The river {v} passes under the {e} bridge."),
                ("Which river does the {e} bridge cross?", "Which river passes under the {e} bridge?"),
            ),
            Relation(
                year,
                ("The {e} bridge was opened in {v}.", "In {v} the {e} bridge was opened."),
                ("When was the {e} bridge opened?", "In what year was the {e} bridge opened?"),
            ),
            Relation(
                count,
                ("The {e} bridge is {v} metres long.", "The length of the {e} bridge is {v} metres."),
                ("How many metres long is the {e} bridge?", "What is the length of the {e} bridge in metres?"),
            ),
        ),
    ),
    "museum": Kind(
        name,
        "The museum",
        (
            Relation(
                town,
                ("The {e} museum stands in {v}.", "Visitors find the {e} museum in {v}."),
                ("Where does the {e} museum stand?", "In which town is the {e} museum?"),
            ),
            Relation(
                person,
                ("The director of the {e} museum is {v}.", "{v} directs the {e} museum."),
                ("Who directs the {e} museum?", "Who is the director of the {e} museum?"),
            ),
            Relation(
                count,
                ("The {e} museum holds {v} paintings.", "There are {v} paintings in the {e} museum."),
                ("How many paintings does the {e} museum hold?", "How many paintings are in the {e} museum?"),
            ),
            Relation(
                one_of(MONTHS),
                ("The {e} museum is closed in {v}.", "In {v} the {e} museum is closed."),
                ("In which month is the {e} museum closed?", "When is the {e} museum closed?"),
            ),
            Relation(
                one_of(MATERIALS),
                ("The walls of the {e} museum are of {v}.", "The {e} museum has walls of {v}."),
                ("Of what are the walls of the {e} museum?", "What are the walls of the {e} museum made of?"),
            ),
        ),
    ),
}

ASIDES = (
    "Little else is recorded of that time.",
    "The winters there are long.",
    "Many letters from those years were lost.",
    "A small stone marks the place.",
    "Travellers spoke well of it.",
    "The records were kept in a church.",
    "Nobody knows the reason.",
    "The road was bad in spring.",
    "Several songs were made about it.",
    "It rained for most of that year.",
)


@dataclass(frozen=True)
class Fact:
    kind: Kind
    relation: Relation
    entity: str
    value: str

    def statement(self, rng: Random) -> str:
        return rng.choice(self.relation.statements).format(e=self.entity, v=self.value)

    def question(self, rng: Random) -> str:
        return rng.choice(self.relation.questions).format(e=self.entity)


def facts_of_a_paragraph(rng: Random) -> list[Fact]:
    """Two entities of one kind; the second shares relations with the first, so its facts are the distractors."""
    kind = KINDS[rng.choice(list(KINDS))]
    first, second = kind.entity(rng), kind.entity(rng)
    relations = list(kind.relations)
    rng.shuffle(relations)
    told = rng.choice([3, 4])
    facts = [Fact(kind, relation, first, relation.value(rng)) for relation in relations[:told]]
    facts += [Fact(kind, relation, second, relation.value(rng)) for relation in relations[: rng.choice([1, 2])]]
    return facts


def write_paragraph(facts: list[Fact], rng: Random) -> str:
    """The facts as sentences in a mixed order; a pronoun may stand for an entity named in the sentence before."""
    order = list(facts)
    rng.shuffle(order)
    sentences, before = [], None
    for fact in order:
        sentence = fact.statement(rng)
        name_at_start = next(
            (
                p
                for p in (f"The {fact.entity} bridge ", f"The {fact.entity} museum ", f"The {fact.entity} ", f"{fact.entity} ")
                if sentence.startswith(p)
            ),
            None,
        )
        if before == fact.entity and name_at_start and rng.random() < 0.5:
            sentence = f"{fact.kind.pronoun} {sentence[len(name_at_start) :]}"
        sentences.append(sentence)
        before = fact.entity
    if rng.random() < 0.4:
        sentences.insert(rng.randrange(1, len(sentences) + 1), rng.choice(ASIDES))
    return " ".join(sentences)


def squad_split(split: str, paragraphs: int, seed: int = SEED) -> dict:
    """One split as a SQuAD v1.1 document.

    Args:
        split: `train` or `validation`; it is part of the seed, so the splits share no paragraph.
        paragraphs: how many paragraphs to write, with three or four questions each.
        seed: the same seed gives the same document.
    """
    rng = Random(f"{seed}/{split}")
    articles = []
    for number in range(paragraphs):
        while True:
            facts = facts_of_a_paragraph(rng)
            context = write_paragraph(facts, rng)
            asked = rng.sample(facts, k=min(len(facts), rng.choice([3, 4])))
            # A value that stands twice in the paragraph would have no single right offset.
            if all(context.count(fact.value) == 1 for fact in asked):
                break
        qas = [
            {
                "id": f"{split}-{number:04d}-{index}",
                "question": fact.question(rng),
                "answers": [{"text": fact.value, "answer_start": context.index(fact.value)}],
            }
            for index, fact in enumerate(asked)
        ]
        articles.append({"title": facts[0].entity, "paragraphs": [{"context": context, "qas": qas}]})
    return {"version": "1.1", "data": articles}


RESTATED = ("In short: {}", "To sum up: {}", "Put once more: {}", "It was said before: {}", "In other words: {}")
ASKED_AFTER = ('A reader asked us: "{q}" We wrote back that it was {v}. ', 'Somebody wondered: "{q}" It was {v}. ')
ASKED_BEFORE = ('A letter reached us: "{q}" We looked it up.', 'The class was asked: "{q}" This is what they read.')
ANSWERED = ("So the reply was {v}.", "So the class said {v}.", "From this it is clear that it was {v}.")


def pretraining_text(rng: Random) -> str:
    """One document of the pre-training corpus: a paragraph whose facts come back, as statements or as replies."""
    facts = facts_of_a_paragraph(rng)
    paragraph = write_paragraph(facts, rng)
    style = rng.random()
    if style < 0.35:
        again = rng.sample(facts, k=2)
        return paragraph + " " + rng.choice(RESTATED).format(" ".join(fact.statement(rng) for fact in again))
    if style < 0.65:
        again = rng.sample(facts, k=2)
        return (
            paragraph + " " + "".join(rng.choice(ASKED_AFTER).format(q=fact.question(rng), v=fact.value) for fact in again).strip()
        )
    fact = rng.choice(facts)
    return rng.choice(ASKED_BEFORE).format(q=fact.question(rng)) + " " + paragraph + " " + rng.choice(ANSWERED).format(v=fact.value)


def write_files(folder: Path = DATA_FOLDER) -> None:
    """Write `train.json` and `validation.json` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, paragraphs in PARAGRAPHS.items():
        text = json.dumps(squad_split(split, paragraphs), ensure_ascii=False, separators=(",", ":"))
        (folder / f"{split}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write mini-squad's two files again.")
    parser.add_argument("--folder", type=Path, default=DATA_FOLDER)
    write_files(parser.parse_args().folder)
