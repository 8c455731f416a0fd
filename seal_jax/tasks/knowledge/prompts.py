"""Every prompt of the knowledge task, and nothing else: to change a wording, change it here.

The styles of the original (arXiv 2506.10943, appendix B; `make_squad_data.py` and `utils.py` of its code) are raw text for base models,
its "instruct" styles carry Qwen's chat markup in the text. `facts` and `chat` are ours: messages, which the model's own chat template
renders, worded for small chat models.
"""

from __future__ import annotations

from decimal import Decimal

from seal_jax.tasks.base import Prompt
from seal_jax.tasks.knowledge.directives import Config as Bounds

_READ = "Let's read the following passage and "
_PASSAGE_HEAD = "\n\nPassage:\n"
_PASSAGE = _PASSAGE_HEAD + "{title}\n{context}\n\n"

# What the policy reads to write a self-edit: raw text with the fields {title} and {context}.
EDIT_TEXTS = {
    "implications": _READ
    + "produce a list of implications derived directly or indirectly from the content."
    + _PASSAGE
    + "Implications:\n",
    "implications-long": _READ
    + "produce a long list of implications derived directly or indirectly from the content."
    + _PASSAGE
    + "Implications:\n",
    "implications-very-long": _READ
    + "produce a very long list of implications derived directly or indirectly from the content."
    + _PASSAGE
    + "Implications:\n",
    "rewrite": _READ + "rewrite it in a few different ways, each one separated by a newline." + _PASSAGE + "Rewritten passages:\n",
    "self-qa": _READ + "rewrite it in a question-answer format." + _PASSAGE + "Question 1: ",
    # The space before <|im_end|> is the original's.
    "instruct": "<|im_start|>system\nYou are an assistant tasked with analyzing the provided passage and producing a list of implications "
    "derived directly or indirectly from the content. <|im_end|>\n<|im_start|>user\n{title}\n{context}<|im_end|>\n"
    "<|im_start|>assistant\n",
}

# The same as chat: (role, content with {title} and {context}).
EDIT_MESSAGES = {
    # SmolLM2-135M-Instruct was trained as a rewriting assistant; asked as one it keeps the facts and stops. A one-shot form keeps about as
    # many, but falls into repetition.
    "facts": (
        (
            "system",
            "You're an AI assistant for text re-writing. Rewrite the input text as short sentences, one fact in each sentence, "
            "repeating the full names.",
        ),
        ("user", "{context}"),
    ),
}

# What every edit prompt says besides where the policy is asked for directives too (`directives.py`), with their bounds as fields.
DIRECTIVES = (
    "Before that, write one line of JSON that says how to train on what you write: "
    '{{"learning_rate": a number from {low} to {high}, "epochs": a whole number from {fewest} to {most}, '
    '"loss": "all" or "part", which leaves the title out}}.'
)
# Before what that sentence stands in a raw text; in messages it ends the first of them.
_DIRECTIVES_BEFORE = {"instruct": "<|im_end|>"}
_SELF_QA_OPENING = "Question 1: "  # the JSON stands before it, and the policy writes it itself

# What the adapted model reads, with the field {question}; the passage is not in it.
ANSWER_TEXTS = {
    "base": "Let's answer a question directly and concisely.\nQuestion: {question}\nAnswer:\n",
    "instruct": "<|im_start|>system\nYou are an assistant to answer a question directly and concisely.<|im_end|>\n"
    "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
}
ANSWER_MESSAGES = {
    "chat": (
        ("system", "You answer questions directly and concisely, in a few words."),
        ("user", "{question}"),
    ),
}

QUESTION = "Topic: {title}\n{question}"  # a question names its passage's title, since the passage itself is absent

EDIT_STYLES = (*EDIT_MESSAGES, *EDIT_TEXTS)
ANSWER_STYLES = (*ANSWER_MESSAGES, *ANSWER_TEXTS)


def edit_prompt(style: str, title: str, context: str, directives: Bounds | None = None) -> Prompt:
    """The prompt of one of `EDIT_STYLES`: what the policy reads to write a self-edit about a passage, with `directives` or without."""
    prompt = _fill(style, EDIT_TEXTS, EDIT_MESSAGES, title=title, context=context)
    return prompt if directives is None else _asking_for(directives, prompt, style)


def _asking_for(directives: Bounds, prompt: Prompt, style: str) -> Prompt:
    (low, high), (fewest, most) = directives.learning_rates, directives.epochs
    sentence = DIRECTIVES.format(low=_plain(low), high=_plain(high), fewest=fewest, most=most)
    if prompt.messages is not None:
        first, *rest = prompt.messages
        return Prompt(messages=({**first, "content": f"{first['content']} {sentence}"}, *rest))
    # The template's own mark comes first, whatever is in the passage.
    head, mark, tail = (prompt.text or "").partition(_DIRECTIVES_BEFORE.get(style, _PASSAGE_HEAD))
    return Prompt(text=f"{head.rstrip()} {sentence}{mark}{tail}".removesuffix(_SELF_QA_OPENING))


def _plain(number: float) -> str:
    """Without an exponent, as the sample's constraint has it."""
    return f"{Decimal(str(number)):f}"


def answer_prompt(style: str, question: str) -> Prompt:
    """The prompt of one of `ANSWER_STYLES` for a question, as `topic_question` writes it."""
    return _fill(style, ANSWER_TEXTS, ANSWER_MESSAGES, question=question)


def topic_question(title: str, question: str) -> str:
    """The question as it is asked without the passage (`query_server.py`, `evaluate_completion`)."""
    return QUESTION.format(title=title, question=question)


def _fill(style: str, texts: dict[str, str], messages: dict[str, tuple[tuple[str, str], ...]], **fields: str) -> Prompt:
    # str.format does not look into what it inserts, so that braces in a passage stay as they are.
    if style in texts:
        return Prompt(text=texts[style].format(**fields))
    return Prompt(messages=tuple({"role": role, "content": content.format(**fields)} for role, content in messages[style]))
