import itertools

import hypothesis
import pytest
from hypothesis import strategies as st

from seal_jax.grade import match
from seal_jax.grade.base import GradeItem

FAST = hypothesis.settings(max_examples=150, deadline=None)
WORDS = st.lists(st.text("abcdefgxyz", min_size=1, max_size=8) | st.integers(0, 3000).map(str), min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("question", "gold", "prediction", "expected"),
    [
        ("Which colour is the door?", "green", "The door is green.", True),
        ("Which colour is the door?", "green", "The door is red.", False),
        ("Which colour is the door?", "green", "The door is not green.", False),
        ("Which colour is the door?", "green", "No, green!", True),
        ("When was it built?", "1921", "It was built in 1921.", True),
        ("When was it built?", "1921", "It was built in 1922.", False),  # one digit off is not a spelling
        ("When was it built?", "1921", "19210", False),
        ("How many?", "three", "There are 3.", True),
        ("How many?", "21", "twenty-one", True),
        ("How many?", "20", "twenty-one", False),
        ("How many?", "1,200", "about 1200 people", True),
        ("Which place?", "the third", "3rd", True),
        ("What share?", "40%", "40 percent", True),
        ("Which body?", "UN", "the United Nations", True),
        ("Which country?", "U.S.", "in the US", True),
        ("What is played?", "freekick", "a free kick", True),
        ("Who wrote it?", "Harriet Colbourne", "Hariet Colbourne", True),  # a slip in a name
        ("Who came?", "Ann, Bea and Cid", "Ann, Bea and Cid came", True),
        ("Who came?", "Ann, Bea and Cid", "Ann and Bea", False),
        ("Which book?", "Tide Tables (1921 edition)", "Tide Tables", True),
        ("Which museum holds Orve's boat?", "Orve Museum", "Orve's boat is in the cellar", False),  # "Orve" was in the question
        ("How long?", "1.5 km", "15 km", False),
        ("How much?", "$1.5 million", "15 million", False),
        ("How cold?", "-40 °C", "40 °C", False),
        ("How cold?", "−40 °C", "It was -40 °C.", True),
        ("What score?", "3-1", "31", False),
        ("What score?", "3-1", "They won 3-1.", True),
        ("When?", "1990-1995", "from 1990 to 1995", True),
        ("What time?", "4:30", "430", False),
        ("Which plane?", "F-16", "the F-16", True),
        ("Which city?", "दिल्ली", "दिल्ली", True),
        ("Which city?", "दिल्ली", "दाल और लाल", False),
        ("Is it?", "no", "no", True),
        ("Who?", "Zoë", "Zoe", True),
        ("Who?", "Ann", "", False),
        ("Who?", "", "Ann", False),
    ],
)
def test_examples(question, gold, prediction, expected):
    assert match.matches(question, gold, prediction) is expected


def test_words():
    found = " ".join(match.words("The Café's 1,234,567 boats, 3.5 km, 2nd of twenty-two; U.S. 50%"))
    assert found == "cafe 1234567 boats 3.5 km 2 of 22 us 50 percent"


def test_threshold():
    question, gold, prediction = "What?", "slow heavy cargo ship", "a heavy ship"
    assert match.matches(question, gold, prediction, threshold=0.5)
    assert not match.matches(question, gold, prediction, threshold=0.6)


def test_grader_uses_its_threshold():
    items = [GradeItem("t", "What?", "slow heavy cargo ship", "a heavy ship"), GradeItem("t", "What?", "ship", " ")]
    assert match.MatchGrader(0.5).grade(items) == [True, False]
    assert match.MatchGrader(0.6).grade(items) == [False, False]


@FAST
@hypothesis.given(st.text(), st.text(min_size=1).filter(str.strip))
def test_identical_text_matches(question, answer):
    assert match.matches(question, answer, answer)


@FAST
@hypothesis.given(WORDS, st.sampled_from([str.lower, str.upper, str.title]), st.sampled_from([" the ", ", ", " a ", "! ", "  ", " An "]))
def test_case_punctuation_and_articles_do_not_matter(gold, case, gap):
    # Not next to each other: "1" ", " "234" would read as one number.
    hypothesis.assume(not any(a.isdigit() and b.isdigit() for a, b in itertools.pairwise(gold)))
    hypothesis.assume(any(word not in match.ARTICLES for word in gold))
    assert match.matches("Which?", " ".join(gold), "The " + gap.join(case(word) for word in gold) + ".")


@FAST
@hypothesis.given(st.text(), st.text(), st.text())
def test_any_text_gives_a_verdict(question, gold, prediction):
    assert match.matches(question, gold, prediction) in (True, False)


@FAST
@hypothesis.given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_numbers_match_only_themselves(a, b):
    assert match.matches("How many?", str(a), f"about {b} of them") is (a == b)
