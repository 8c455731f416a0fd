"""The offline grader: how much of the reference answer does the prediction say?

1. Equal after SQuAD's normalisation (Rajpurkar et al. 2016: lower case, no punctuation, no articles), and in their numbers: right.
2. Otherwise both are cut into words. Stopwords, and words that the question has already said, count for nothing in the reference,
   unless nothing else is left of it. The share of the remaining words that the prediction has must reach `threshold`.
3. If the reference is a list ("A, B and C"), at least half of each entry must be there as well: leaving one out is wrong.
4. Words may differ a little in spelling or ending (rapidfuzz ratio >= 88); numbers may not. Numerals are digits ("twenty-one" is 21,
   "third" is 3), "1,000" is 1000, "U.S." is "us". A word may be written as two ("free kick", "freekick"). An abbreviation in capitals
   matches the words it stands for. What the reference has in parentheses is optional.
5. A prediction that has the words only right behind a negation ("not green") is wrong.

Every step can be read off one answer; there is nothing learnt but the three numbers.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence

from rapidfuzz import fuzz, process

from seal_jax.grade.base import GradeItem

FUZZY = 88.0  # the least similarity (0 to 100) of two words that count as one
ITEM_SHARE = 0.5  # the least share of an entry of a list

ARTICLES = frozenset({"a", "an", "the"})
_STOPWORDS = (
    "of in on at to for from by with and or as is are was were be been being it its this that these those their his her he she they "
    "them there than then into which who whom whose what when where why how did do does done had has have not no all any some such "
    "many much more most other"
)
STOPWORDS = ARTICLES | frozenset(_STOPWORDS.split())
# Not "no": it stands in front of a right answer as often ("No, Paris").
NEGATIONS = frozenset({"not", "never", "nor", "without", "isn", "wasn", "aren", "weren", "didn", "doesn"})

_UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
NUMERALS = (
    {word: n for n, word in enumerate(_UNITS.split())}
    | {word: 10 * n for n, word in enumerate(_TENS.split(), 2)}
    | {word: n for n, word in enumerate(_ORDINALS.split(), 1)}
)

_PARENTHESES = re.compile(r"\([^()]*\)")
_SEPARATOR = re.compile(r",(?!\d{3}(?!\d))|;|&|\band\b", re.IGNORECASE)
_DOTTED = re.compile(r"\b(?:[a-z]\.){2,}")
# Marks that stand for vowels, say, belong to their word (Devanagari, Tamil); those that `words` takes for accents are gone by then.
_MARKS = "".join(c for c in map(chr, range(0x300, 0x10000)) if unicodedata.category(c)[0] == "M" and not unicodedata.combining(c))
_WORD = re.compile(rf"(?:(?<![^\W_])-(?=\d))?\d+(?:\.\d+)?|[^\W\d_](?:[^\W\d_]|[{_MARKS}])*")


def normalize(text: str) -> str:
    """SQuAD's normalisation: lower case, without punctuation and articles, single spaces."""
    text = "".join(c for c in text.casefold() if c not in string.punctuation)
    return " ".join(word for word in text.split() if word not in ARTICLES)


def words(text: str) -> list[str]:
    """The words and numbers of a text in order: no case, accents, possessives or articles; numerals as digits."""
    text = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    text = re.sub(r"['’]s?\b", "", text).replace("−", "-")
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<=\d)(?:st|nd|rd|th)\b", "", text)
    text = _DOTTED.sub(lambda m: m.group().replace(".", ""), text).replace("%", " percent ")
    found: list[str] = []
    tens = 0
    for word in _WORD.findall(text):
        if word in ARTICLES:
            continue
        number = NUMERALS.get(word)
        if tens and number is not None and 0 < number < 10:
            found[-1] = str(tens + number)
        else:
            found.append(word if number is None else str(number))
        tens = number if number is not None and number >= 20 else 0
    return found


def _is_number(word: str) -> bool:
    return word[-1].isdigit()


def _numbers(text: str) -> list[str]:
    return [word for word in words(text) if _is_number(word)]


class _Prediction:
    """The prediction's words, ready to be searched."""

    def __init__(self, text: str):
        self.words = words(text)
        self.vocabulary = set(self.words) | {a + b for a, b in zip(self.words, self.words[1:], strict=False)}
        self.spelled = [word for word in self.vocabulary if not _is_number(word)]
        initials = "".join(word[0] for word in self.words)
        self.initials = {initials[i : i + n] for n in range(2, 6) for i in range(len(initials) - n + 1)}

    def has(self, word: str, abbreviation: bool = False) -> bool:
        if word in self.vocabulary or (abbreviation and word in self.initials):
            return True
        return not _is_number(word) and process.extractOne(word, self.spelled, scorer=fuzz.ratio, score_cutoff=FUZZY) is not None

    def negates(self, gold: set[str]) -> bool:
        """Whether each occurrence of the gold words has a negation among the two words before it."""
        places = [i for i, word in enumerate(self.words) if word in gold]
        return bool(places) and all(NEGATIONS & set(self.words[max(0, i - 2) : i]) for i in places)


def matches(question: str, gold: str, prediction: str, threshold: float = 0.6) -> bool:
    """Whether the prediction says the gold answer, by the rule at the top of this file. Any text will do; nothing is raised."""
    if not prediction.strip():
        return False
    if gold.strip().casefold() == prediction.strip().casefold():
        return True
    if normalize(gold) and normalize(gold) == normalize(prediction) and _numbers(gold) == _numbers(prediction):
        return True
    main = _PARENTHESES.sub(" ", gold)
    gold = main if words(main) else gold
    said = _Prediction(prediction)
    asked = set(words(question))
    abbreviations = {word.lower() for word in re.findall(r"\b[A-Z]{2,5}\b", gold)}

    def share(text: str) -> float:
        every = set(words(text))
        telling = every - STOPWORDS or every
        telling = telling - asked or telling
        return sum(said.has(word, word in abbreviations) for word in telling) / len(telling) if telling else 0.0

    if not words(gold) or share(gold) < threshold:
        return False
    entries = [entry for entry in _SEPARATOR.split(gold) if words(entry)]
    if len(entries) > 1 and not all(share(entry) >= ITEM_SHARE for entry in entries):
        return False
    telling = set(words(gold)) - STOPWORDS
    return bool(NEGATIONS & (set(words(gold)) | asked)) or not said.negates(telling)


class MatchGrader:
    """Grades by `matches`; it never leaves an item ungraded."""

    def __init__(self, threshold: float = 0.6):
        self.name = "match"
        self.threshold = threshold

    def check(self) -> None:
        pass

    def grade(self, items: Sequence[GradeItem]) -> list[bool | None]:
        return [matches(item.question, item.gold, item.prediction, self.threshold) for item in items]
