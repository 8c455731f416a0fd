"""The demo data set of fictional passages: its form, and the properties that make its scores mean something."""

from __future__ import annotations

import collections
import json
import re
from importlib import resources

import pytest

SIZES = {"train": 24, "validation": 16}
DATA = resources.files("seal_jax.tasks") / "knowledge" / "data"


def load(split: str) -> list[dict]:
    return json.loads((DATA / f"fictional_{split}.json").read_text(encoding="utf-8"))


SPLITS = {split: load(split) for split in SIZES}
PASSAGES = [pytest.param(passage, id=f"{split}-{passage['title']}") for split, passages in SPLITS.items() for passage in passages]
EVERY = [passage for passages in SPLITS.values() for passage in passages]


def occurs(phrase: str, text: str) -> bool:
    """Whether `phrase` stands in `text` as whole words, in any case: "46" does not occur in "1846"."""
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE) is not None


def repeated(items) -> list[str]:
    return [item for item, count in collections.Counter(item.casefold() for item in items).items() if count > 1]


def test_occurs_compares_whole_words():
    assert occurs("pewter", "Made of Pewter.")
    assert not occurs("46", "In 1846 it rained.")
    assert not occurs("Ennet", "the Ennetbridge")


@pytest.mark.parametrize("split", SIZES)
def test_split_has_its_passages(split):
    assert len(SPLITS[split]) == SIZES[split]


@pytest.mark.parametrize("passage", PASSAGES)
def test_passage_form(passage):
    assert set(passage) == {"title", "context", "questions"}
    assert 1 <= len(passage["title"].split()) <= 4
    assert 80 <= len(passage["context"].split()) <= 120
    assert len(passage["questions"]) == 5
    for item in passage["questions"]:
        assert set(item) == {"question", "answer"}
        assert item["question"].endswith("?")
        assert 1 <= len(item["answer"].split()) <= 4
    texts = [passage["title"], passage["context"], *(text for item in passage["questions"] for text in item.values())]
    # Stray spaces and line breaks would split a passage or miss a literal match.
    assert all(text == " ".join(text.split()) for text in texts)
    assert all(text.isascii() for text in texts), "plain ASCII, so that every tokenizer reads it alike"


@pytest.mark.parametrize("passage", PASSAGES)
def test_answers_are_found_only_in_the_context(passage):
    answers = [item["answer"] for item in passage["questions"]]
    questions = [item["question"] for item in passage["questions"]]
    assert repeated(answers) == []
    assert repeated(questions) == []
    for answer in answers:
        # The exact spelling, case included: an answer is a span of the context.
        assert re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", passage["context"]), answer
        # A number that stands twice could be the answer to two questions.
        assert not answer.isdigit() or passage["context"].count(answer) == 1, answer
        assert not occurs(answer, passage["title"]), answer
        # Neither its own question nor a sibling may give an answer away.
        assert [question for question in questions if occurs(answer, question)] == [], answer


@pytest.mark.parametrize("passage", PASSAGES)
def test_questions_name_their_subject(passage):
    """Answers are given without the passage, so a question must say what it is about."""
    head = passage["title"]
    for item in passage["questions"]:
        assert head.casefold() in item["question"].casefold(), item["question"]


def test_titles_contexts_and_questions_are_unique():
    assert repeated(passage["title"] for passage in EVERY) == []
    assert repeated(passage["context"] for passage in EVERY) == []
    assert repeated(item["question"] for passage in EVERY for item in passage["questions"]) == []


def test_train_does_not_leak_validation_answers():
    """A proper name asked for in validation is unknown to a policy that has trained on the train passages."""
    train = "\n".join(f"{passage['title']}\n{passage['context']}" for passage in SPLITS["train"])
    names = [item["answer"] for passage in SPLITS["validation"] for item in passage["questions"] if not item["answer"][0].isdigit()]
    names = [name for name in names if name != name.lower()]
    assert len(names) >= 2 * SIZES["validation"], "too few names: the check would be empty"
    assert [name for name in names if occurs(name, train)] == []


def test_answers_are_not_common_guesses():
    """No two passages share an answer, so that one frequent answer cannot score."""
    assert repeated(item["answer"] for passage in EVERY for item in passage["questions"]) == []
