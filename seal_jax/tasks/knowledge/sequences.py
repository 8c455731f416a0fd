"""A self-edit's text -> training sequences.

`train_sequences` is the original's rule (`build_train_sequences` in its `utils.py`), case for case. `edit_lines` adds our default on top:
what only frames the facts (headers, chat, markdown, lone list markers) is never trained on.
"""

from __future__ import annotations

import re

_QUESTION = re.compile(r"Question\s+\d+:")
_ANSWER = re.compile(r"Answer\s*:")
_NEXT_QUESTION = re.compile(r"\n(?=Question\s+\d+:)")

_THOUGHTS = re.compile(r"\s*<think>.*?(?:</think>|\Z)", re.DOTALL)  # of a policy that thinks all the same
_SENTENCE_END = re.compile(r"""(?<=[.!?])(?<!\b[A-Z]\.)(?<!\b(?:Dr|Mr|Ms|St|vs|No)\.)(?<!\b(?:Mrs|etc|Inc)\.)\s+(?=["'“(]?[A-Z0-9])""")


def train_sequences(completion: str, context: str, title: str, split_newlines: bool = True) -> list[str]:
    """The texts that the original trains on: those of the self-edit, then the passage, each after the title and a newline.

    With `split_newlines`, a text is a line, or a question with its answer; without, it is what stands between `---` marks.
    """
    texts, _ = edit_lines(completion, split_newlines, drop_headers=False)
    return [sequence(title, text) for text in [*texts, context.strip()]]


def sequence(title: str, text: str) -> str:
    """One training sequence."""
    return f"{title}\n{text}"


def sentences(text: str) -> list[str]:
    """The sentences of a line: cut after . ! or ? where a capital, a digit or a quote follows; not after an initial, "Dr." and the like."""
    return [part for part in _SENTENCE_END.split(text.strip()) if part]


def edit_lines(
    completion: str,
    split_newlines: bool = True,
    drop_headers: bool = True,
    deduplicate: bool = False,
    title: str = "",
    split_sentences: bool = False,
) -> tuple[list[str], int]:
    """The texts of a self-edit that become training data, and how many lines were left out.

    With `drop_headers` and `deduplicate` off the texts are exactly the original's; the count then holds what its own rule drops, the
    line before a list that starts with "1.". `title` lets `drop_headers` drop a line that only repeats the title. `split_sentences` cuts
    what is left once more, for a policy that writes its facts in a paragraph.
    """
    if drop_headers:
        completion = _THOUGHTS.sub("", completion)
    stripped = completion.strip()
    dropped = 0
    if split_newlines and _QUESTION.search(completion) and _ANSWER.search(completion):
        # Question-answer form: "---" is not a mark here, and blocks keep the blank lines at their end.
        texts = _NEXT_QUESTION.split(stripped)
        if drop_headers:
            texts, dropped = clean_lines(texts, title)
        # The self-qa prompt ends in "Question 1: ", which the completion goes on from.
        if texts and not texts[0].lstrip().startswith("Question"):
            texts[0] = "Question 1: " + texts[0].strip()
    else:
        # Any run of "---" is a mark, in a markdown table too. A completion of nothing but marks stays whole.
        texts = [part.strip() for part in stripped.split("---") if part.strip()] or [stripped]
        if split_newlines:
            texts = [line.strip() for part in texts for line in part.splitlines() if line.strip()]
            # A first line before a numbered list is its header ("Here are the implications"). The original takes "1.5 million" for a
            # list too; with drop_headers a space must follow the "1.".
            first_item = r"1\.\s" if drop_headers else r"1\."
            if len(texts) > 1 and re.match(first_item, texts[1]):
                texts, dropped = texts[1:], 1
        if drop_headers:
            texts, more = clean_lines(texts, title)
            dropped += more
    if split_sentences:
        texts = [part for text in texts for part in sentences(text)]
    if deduplicate:
        unique = list(dict.fromkeys(texts))
        texts, dropped = unique, dropped + len(texts) - len(unique)
    return texts, dropped


def clean_lines(texts: list[str], title: str = "") -> tuple[list[str], int]:
    """The texts without lines that state no fact, and the number of lines left out. A text may have several lines.

    An opening in front of a fact ("Sure! Here is the rewrite: The mill opened ...") is cut off and the fact kept. What follows a label
    alone in its line ("Answer:") is its answer, whatever it is.
    """
    kept, dropped = [], 0
    for text in texts:
        lines, changed, labelled = [], False, False
        for line in text.splitlines():
            cleaned = line if labelled and line.strip() else _clean(line, title)
            if cleaned:
                lines.append(cleaned)
            elif line.strip():
                dropped += 1
            if line.strip():
                labelled = _QA_LABEL.fullmatch(line.strip(_DECORATION)) is not None
            changed |= cleaned != line and bool(line.strip())
        if lines:
            kept.append("\n".join(lines) if changed else text)
    return kept, dropped


_LABEL = (
    r"(?:the |my |a |your )?(?:following |main |key |short |simple |one-fact |rewritten |revised )*"
    r"(?:rewrite|rewrites|rewritten|rewording|paraphrase|summary|implications?|passages?|facts?|sentences?|version|text|list|title|output)"
    r"(?: \d+)?(?: of (?:the )?(?:\w+ )?(?:passage|text|implications|facts|sentences))?"
)
_DECORATION = " \t*_#>"
_OPENER = re.compile(r"(?:(?:sure(?: thing)?|certainly|absolutely|okay|ok|alright|no problem)\s*[,!.:;]|of course\s*[!.:])\s*", re.I)
_HERE = re.compile(r"(?:below|here)(?:'s| is| are)\b[^:.!?]*:\s*", re.I)
_PREFIX = re.compile(rf"\W*{_LABEL}\s*:[*_\s]*", re.I)
_HERE_WHOLE = re.compile(
    r"(?:below|here)(?:'s| is| are)\b.*\b(?:passages?|text|rewrit\w+|versions?|list|implications?|facts?|sentences?|summary|questions?)\b"
    r"[^.!?]*[.!]?",
    re.I,
)
_ANNOUNCES = re.compile(
    r"\b(?:here|following|follows|below|passages?|text|rewrit\w*|paraphras\w*|lists?|implications?|facts?|sentences?|questions?|request)\b",
    re.I,
)
_LABEL_WHOLE = re.compile(rf"{_LABEL}\.?", re.I)
_QA_LABEL = re.compile(r"(?:question|answer)\s*\d*\s*:", re.I)
_CHAT = re.compile(
    r"i(?:'d| would) be (?:happy|glad)\b|i(?:'m| am) (?:happy|glad|sorry|unable|an ai)\b|i hope (?:this|that|these|you)\b"
    r"|i can(?:not|'t)? (?:help|assist)\b|i(?:'ve| have) (?:rewritten|listed|written|provided)\b"
    r"|(?:please )?(?:let me know|feel free)\b|would you like (?:me |to |more |any |another )|do you want me to\b"
    r"|if you\b.*\b(?:let me know|feel free|just ask|i can|please ask)\b|is there anything else\b|hope (?:this|that|it) helps\b"
    r"|you're welcome\b|as an ai(?:,| (?:language )?(?:model|assistant)\b)"
    r"|thank(?:s| you)(?:[.!,]| for (?:sharing|providing|(?:the|your) (?:passage|text|question|request|information|details|prompt)))"
    r"|(?:please )?rewrite (?:the|this) (?:following )?passage\b|each sentence (?:states|repeats|must|should)\b",
    re.I,
)


def _clean(line: str, title: str) -> str:
    """The line, the fact in it that an opening precedes, or "" if it states no fact."""
    bare = line.strip().replace("’", "'")
    # Rules and table frames, lone bullets and list numbers (a lone number is no fact either), fences.
    if not any(character.isalpha() for character in bare) or bare.startswith(("```", "~~~")):
        return ""
    if re.match(r"#{1,6}\s", bare):
        return ""
    if _QA_LABEL.match(bare.lstrip(_DECORATION)):
        return line  # "Question 2: ..." and "Answer:" hold a pair together
    if re.fullmatch(r"(\*\*|__)[^*_]+\1", bare) and bare[-3] not in ".!?" and len(bare.split()) <= 6:
        return ""  # a line all in bold, and no sentence: a heading
    rest = line.strip()
    for opening in (_OPENER, _HERE, _PREFIX):
        # Matched with plain apostrophes, which are as long as curly ones, so that positions agree.
        if match := opening.match(rest.replace("’", "'")):
            rest = rest[match.end() :]
    core = rest.replace("’", "'").strip(_DECORATION)
    if not any(character.isalpha() for character in core):
        return ""
    words = len(core.split())
    # A colon ends what announces something; a longer sentence that says nothing of a list may state a fact all the same.
    if core.endswith((":", "：")) and (words <= 8 or (words <= 25 and _ANNOUNCES.search(core))):
        return ""
    if _CHAT.match(core) or (words <= 25 and (_HERE_WHOLE.fullmatch(core) or _LABEL_WHOLE.fullmatch(core))):
        return ""
    if title and core.casefold().rstrip(".") == title.strip().casefold().rstrip("."):
        return ""
    return line if rest == line.strip() else rest
