"""Prompts, training sequences and requests of the knowledge task against recorded outputs of the original."""

import dataclasses

import pytest

from seal_jax.config import AnswerConfig, FitConfig
from seal_jax.tasks.base import Context, Prompt
from seal_jax.tasks.knowledge import Config, build, prompts, sequences, sources


def of(cases, fn):
    found = [case for case in cases if case["fn"] == fn]
    assert found, f"no cases of {fn}"
    return found


@pytest.fixture(scope="module")
def cases(golden):
    return golden("knowledge_prompts")["cases"]


def context_of(case) -> Context:
    return Context("0", case["title"], {"context": case["context"], "questions": case["questions"]})


def test_make_prompt(cases):
    for case in of(cases, "make_prompt"):
        style = "instruct" if case["instruct"] else case["prompt_key"]
        assert prompts.edit_prompt(style, case["title"], case["context"]) == Prompt(text=case["expected"]), case


def test_make_prompt_openai(cases):
    for case in of(cases, "make_prompt_openai"):
        assert prompts.edit_prompt("implications", case["title"], case["context"]).text == case["expected"]


def test_every_recorded_template_is_a_style(golden):
    templates = golden("knowledge_prompts")["templates"]
    assert {s: t for s, t in prompts.EDIT_TEXTS.items() if s != "instruct"} == templates["templates_base"]
    assert prompts.EDIT_TEXTS["instruct"] == templates["template_instruct"]
    assert prompts.ANSWER_TEXTS["base"] == templates["answer_base"]
    assert prompts.ANSWER_TEXTS["instruct"] == templates["answer_instruct"]


def test_format_answer_prompts(cases):
    for case in of(cases, "format_answer_prompts"):
        style = "instruct" if case["instruct"] else "base"
        assert prompts.answer_prompt(style, case["question"]) == Prompt(text=case["expected"]), case


def test_format_grade_prompts(cases):
    from seal_jax.grade.base import grade_prompt

    for case in of(cases, "format_grade_prompts"):
        assert grade_prompt(case["question"], case["gold"], case["prediction"]) == case["expected"], case


def test_parse_yes_no(cases):
    from seal_jax.grade.base import parse_yes_no

    for case in of(cases, "parse_yes_no"):
        assert bool(parse_yes_no(case["text"])) == case["expected"], case


def test_article_order(cases):
    for case in of(cases, "article_order"):
        start, n = case["start"], case["n"]
        assert sources.original_order(2067)[start : start + n] == case["expected"]


def test_query_server_request(cases):
    """What the original's inner loop is sent: training sequences, questions and, as our defaults, its hyperparameters."""
    for case in of(cases, "query_server_request"):
        task = build(Config(split_newlines=case["split_newlines"], drop_headers=False, answer_prompt="base"), grader=None)
        context, expected = context_of(case), case["expected"]
        training = task.training_set(context, case["completion"])
        assert [s.prompt.text for s in training.sequences] == [""] * len(training.sequences)
        assert [s.completion for s in training.sequences] == expected["train_sequences"]
        asked = [prompts.answer_prompt("base", question["question"]) for question in expected["eval_questions"]]
        assert task.probes(context) == asked
        assert [gold for _, gold in task.describe(context)] == [question["answer"] for question in expected["eval_questions"]]
        fit = FitConfig()
        assert (fit.lora.rank, fit.lora.alpha) == (expected["lora_rank"], expected["lora_alpha"])
        assert (fit.epochs, fit.learning_rate, fit.batch_size) == (
            expected["finetune_epochs"],
            expected["finetune_lr"],
            expected["batch_size"] * expected["gradient_accumulation_steps"],
        )
        assert "temperature" not in {f.name for f in dataclasses.fields(AnswerConfig)}  # answers are greedy


def test_train_sequences(golden):
    cases = golden("knowledge_train_sequences")["cases"]
    assert cases
    for case in cases:
        ours = sequences.train_sequences(case["completion"], case["context"], case["title"], case["split_newlines"])
        assert ours == case["expected"], case["id"]


def test_cleaning_only_takes_away(golden):
    """On every recorded self-edit: what cleaning keeps is a part of the original's sequences, and what it drops is counted."""
    for case in golden("knowledge_train_sequences")["cases"]:
        raw, _ = sequences.edit_lines(case["completion"], case["split_newlines"], drop_headers=False)
        clean, dropped = sequences.edit_lines(case["completion"], case["split_newlines"], drop_headers=True)
        words = " ".join(raw + case["completion"].split("\n")).split()
        assert {word for text in clean for word in text.split()} <= {*words, "Question", "1:"}, case["id"]
        assert (dropped > 0) or len("".join(clean)) >= 0.7 * len("".join(raw)), case["id"]
