import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_jax.tasks.knowledge.sequences import clean_lines, edit_lines, sentences, train_sequences

FACTS = ["The Brindle Mill was built in 1802.", "Ada Corro built the Brindle Mill."]


def test_a_line_is_a_sequence_and_the_passage_is_the_last():
    text = "  1. A one.\n\n \t2. A two. \n"
    assert train_sequences(text, " The passage.\nIts end. ", "Mill") == [
        "Mill\n1. A one.",
        "Mill\n2. A two.",
        "Mill\nThe passage.\nIts end.",
    ]


def test_without_splitting_marks_separate():
    assert train_sequences("A.\nB.\n---\nC.", "P", "T", split_newlines=False) == ["T\nA.\nB.", "T\nC.", "T\nP"]
    assert train_sequences("---\n---", "P", "T", split_newlines=False) == ["T\n---\n---", "T\nP"]


def test_the_originals_rule_drops_what_stands_before_a_numbered_list():
    assert edit_lines("Some text\n1. A\n2. B", drop_headers=False) == (["1. A", "2. B"], 1)
    assert edit_lines("Some text\n2. A\n1. B", drop_headers=False) == (["Some text", "2. A", "1. B"], 0)


def test_a_number_is_not_taken_for_a_list():
    """The original loses the first fact here; by default we do not."""
    text = "The mill opened in 1802.\n1.5 million sacks were ground."
    assert edit_lines(text, drop_headers=False) == (["1.5 million sacks were ground."], 1)
    assert edit_lines(text) == (text.split("\n"), 0)


def test_questions_stay_with_their_answers():
    text = "Who built it?\nAnswer: Ada Corro.\n\nQuestion 2: When?\nAnswer:\nIn 1802."
    expected = ["Question 1: Who built it?\nAnswer: Ada Corro.", "Question 2: When?\nAnswer:\nIn 1802."]
    assert edit_lines(text) == (expected, 0)
    assert edit_lines(text, drop_headers=False) == (expected, 0)


def test_an_answer_on_a_line_of_its_own_is_kept_whatever_it_is():
    text = "Question 1: Who sang it?\nAnswer:\nBeyoncé\n\nQuestion 2: When?\n**Answer:**\n\n2009\n\nQuestion 3:\nThe list:\nAnswer: 3"
    assert edit_lines(text, title="Beyoncé") == edit_lines(text, drop_headers=False, title="Beyoncé")


def test_thoughts_are_no_facts():
    assert edit_lines("<think>\nThe user wants facts.\n</think>\n\nOrsk sells salt.") == (["Orsk sells salt."], 0)
    assert edit_lines("Orsk sells salt.\n<think>\nShould I go on", drop_headers=False)[0][1] == "<think>"
    assert edit_lines("Orsk sells salt.\n<think>\nShould I go on")[0] == ["Orsk sells salt."]
    assert edit_lines("<think>Let me see")[0] == []


def test_chat_around_questions_is_dropped():
    text = (
        "Sure! Here are the questions:\nQuestion 1: Who?\nAnswer: Ada.\nQuestion 2: When?\nAnswer: 1802.\n\nLet me know if you need more!"
    )
    assert edit_lines(text) == (["Question 1: Who?\nAnswer: Ada.", "Question 2: When?\nAnswer: 1802."], 2)
    # the original would ask the header as question 1
    assert edit_lines(text, drop_headers=False)[0][0] == "Question 1: Sure! Here are the questions:"


HEADERS = [
    "Rewrite:",
    "rewrite",
    "**Rewritten passage:**",
    "Rewritten version of the passage:",
    "Sure, here is a rewritten version of the passage:",
    "Sure, here's the rewrite.",
    "Here is the rewritten passage as short sentences.",
    "Here are the implications:",
    "Here’s a list of implications derived from the passage:",
    "Certainly!",
    "Certainly! Here are a few facts that the passage states:",
    "Of course!",
    "Implications:",
    "Here are some implications, both direct and indirect, derived from the passage:",
    "# Implications",
    "### The Brindle Mill and its builder",
    "**Key facts**",
    "```",
    "```text",
    "---",
    "***",
    "|---|---|",
    "-",
    "*",
    "•",
    "1.",
    "2)",
    "(3)",
    "17",
    "The Brindle Mill",
    "**The Brindle Mill**",
    "Title: The Brindle Mill",
    "Let me know if you need anything else!",
    "Let me know if you’d like these condensed.",
    "I hope this helps!",
    "Hope this helps.",
    "Feel free to ask for more.",
    "Would you like me to expand on any of these?",
    "If you'd like further detail, let me know!",
    "I'd be happy to help with that.",
    "Is there anything else I can do?",
]


@pytest.mark.parametrize("header", HEADERS)
def test_headers_never_become_training_data(header):
    assert clean_lines([FACTS[0], header, FACTS[1]], "The Brindle Mill") == (FACTS, 1)


KEPT = [
    "1. The Brindle Mill was built in 1802.",
    "- The Brindle Mill was built in 1802.",
    "**9. The Brindle Mill is owned by the town.**",
    "**The Brindle Mill closed.**",
    "Here Ada Corro was born.",
    "Surely the Brindle Mill was the first.",
    "Certainty was lost when the Brindle Mill closed in 1987.",
    "Of course, the Brindle Mill closed in 1987.",
    "If the wheel stops, Ada Corro rings a bell.",
    "The list of millers names Ada Corro.",
    "The passage under the Brindle Mill leads to the river.",
    "Would the Brindle Mill exist without Ada Corro?",
    "Okapis were kept at the Brindle Mill: two of them.",
    "The Brindle Mill's wheel was a gift of the neighbouring towns to its people:",
    "Facts and figures about the Brindle Mill are kept by Ada Corro.",
    "布林德尔磨坊建于1802年。",
    "Thank You for the Music is a song by Ada Corro.",
    "As an AI pioneer, Ada Corro wrote of the Brindle Mill.",
]


@pytest.mark.parametrize("fact", KEPT)
def test_facts_are_kept_as_they_are(fact):
    assert clean_lines([fact], "The Brindle Mill") == ([fact], 0)


@pytest.mark.parametrize(
    "opening",
    [
        "Sure! ",
        "Rewrite: ",
        "**Rewrite:** ",
        "Here is the rewritten passage: ",
        "Certainly, here's a summary: ",
        "Implication 3: ",
        "Output: ",
    ],
)
def test_a_fact_after_an_opening_is_kept(opening):
    assert clean_lines([opening + FACTS[0]]) == ([FACTS[0]], 0)


def test_lines_inside_a_text_are_cleaned_too():
    text = "Here are the facts:\n" + "\n".join(FACTS) + "\n\nI hope this helps!"
    assert edit_lines(text, split_newlines=False) == (["\n".join(FACTS)], 2)


def test_a_self_edit_of_chat_alone_leaves_nothing():
    assert edit_lines("Sure, here is the rewrite:\n\n1.\n2.\n```\nLet me know if you need more.") == ([], 5)
    assert edit_lines("  \n\t ") == ([], 0)


def test_equal_lines_stay_unless_asked_otherwise():
    text = "A one.\nA two.\nA one."
    assert edit_lines(text) == (["A one.", "A two.", "A one."], 0)
    assert edit_lines(text, deduplicate=True) == (["A one.", "A two."], 1)


PIECES = st.sampled_from([*HEADERS, *KEPT, *FACTS, "", "Question 2: Who?", "Answer: Ada", "Sure! " + FACTS[0], "a\rb", " "])


@given(st.one_of(st.text(max_size=80), st.lists(PIECES, max_size=8).map("\n".join)), st.booleans(), st.booleans())
def test_any_text_gives_texts_that_hold_something(text, split_newlines, deduplicate):
    lines, dropped = edit_lines(text, split_newlines, True, deduplicate, "The Brindle Mill")
    assert all(line.strip() for line in lines)
    assert 0 <= dropped <= len(text.splitlines()) + text.count("---") * 2


def test_split_sentences_cuts_a_paragraph():
    text = "Built by J. R. Bell in 1802. It cost 3.5 crowns.\nDr. Hull came! 45 men left."
    texts, dropped = edit_lines(text, split_sentences=True)
    assert texts == ["Built by J. R. Bell in 1802.", "It cost 3.5 crowns.", "Dr. Hull came!", "45 men left."]
    assert dropped == 0


@pytest.mark.parametrize("text", ["", "  ", "One sentence without an end", "e.g. this one stays whole."])
def test_sentences_of_a_single_one(text):
    assert sentences(text) == ([text] if text.strip() else [])
