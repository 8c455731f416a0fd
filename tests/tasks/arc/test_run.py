"""The ARC task through the whole of ReST-EM, with a tiny random model on tiny puzzles."""

import json
import shutil

import pytest

from seal_jax import config as config_lib
from seal_jax.rest_em import loop
from seal_jax.rest_em import stage as stage_lib
from seal_jax.runs.report import write_report
from seal_jax.tasks.arc import edit as edit_lib
from seal_jax.tasks.arc.edit import Bounds


@pytest.fixture(scope="module", autouse=True)
def quick(quick_compile):
    with quick_compile():
        yield


def puzzles(start, stop):
    """Puzzles of one row, the other way round: tasks by name, as in the competition's file."""
    rows = [[a, b] for a in range(1, 4) for b in range(4, 8)]
    pairs = [{"input": [row], "output": [row[::-1]]} for row in rows]
    return {f"task{i}": {"train": pairs[i : i + 3], "test": [pairs[i + 3]]} for i in range(start, stop)}


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_model, write_config):
    folder = tmp_path_factory.mktemp("arc")
    shutil.copytree(tiny_model, folder / "model")  # with room for the prompt, which is longer than the others' tests'
    settings = json.loads((folder / "model/config.json").read_text())
    (folder / "model/config.json").write_text(json.dumps(settings | {"max_position_embeddings": 2048}))
    for split, (start, stop) in {"train": (0, 2), "validation": (4, 6)}.items():
        (folder / f"{split}_puzzles.json").write_text(json.dumps(puzzles(start, stop)))
    path = write_config(
        folder,
        model=folder / "model",
        task={
            **{"name": "arc", "train": str(folder / "train_puzzles.json"), "validation": str(folder / "validation_puzzles.json")},
            **{"max_sequences": 6, "leave_out": [1], "ask_permutations": 0, "ask_leave_out": [0], "epochs": [1, 2]},
        },
        fit={
            **{"lora": {"rank": 4, "alpha": 8.0}, "schedule": "cosine", "warmup_steps": 2, "batch_size": 2, "slots": 4},
            **{"tokens_per_step": 1024, "lengths": [256, 1024]},
        },
        sample={"temperature": 1.0, "max_tokens": 400, "rows": 4},
        answer={"max_tokens": 8, "rows": 16},
        rest_em={"rounds": 1, "contexts": 2, "edits": 2, "seeds": 1, "group": 2, "select": "top", "keep": 1},
        evaluate={"contexts": 2, "edits": 1, "seeds": 1, "resamples": 50, "group": 2},
    )
    return config_lib.load(path, ["model.max_length=1536"])


@pytest.fixture(scope="module")
def run(config):
    """(table, folder) of the finished run."""
    return loop.train(config), config.run_dir


def test_self_edits_choose_their_fits_and_grids_are_voted_on(run, units):
    _, folder = run
    edits = [e for c in units(folder)["rounds/1/e_step/000"]["contexts"] for e in c["edits"]]
    assert len(edits) == 4 and len({e["text"] for e in edits}) > 1
    epochs = set()
    for edit in edits:
        parsed = edit_lib.parse(edit["text"], Bounds((1e-5, 1e-3), (1, 2)))
        assert isinstance(parsed, edit_lib.Edit), "sampling under the schema leaves nothing invalid"
        (trial,) = edit["trials"]
        assert trial["steps"] == parsed.num_train_epochs * -(-len(edit["sequences"]) // 2)
        assert len(trial["answers"]) == len(trial["verdicts"]) == 1 < len(trial["outputs"])
        epochs.add(parsed.num_train_epochs)
    assert epochs == {1, 2}, "edits of different length, in one program"


def test_the_table_has_the_papers_rows(run):
    table, _ = run
    rows = [(row["method"], row["policy"]) for row in table["rows"]]
    assert rows == [
        ("no adaptation, in context", "base"),
        ("TTT, fixed", "base"),
        ("TTT, self-edit", "base"),
        ("no adaptation, in context", "after 1 round"),
        ("TTT, self-edit", "after 1 round"),
    ]


def test_the_report_draws_the_grids(run):
    page = write_report(run[1]).read_text()
    assert page.count('<svg role="img" aria-label="grid') > 20 and "Pairs</h4>" in page


def test_a_resumed_run_equals_an_unbroken_one(config, run, units, tmp_path):
    """From the middle of the round on."""
    table, folder = run
    shutil.copytree(folder, tmp_path / "run")
    for name in ("rounds/1/m_step.json", "evaluate/after/000.json", "table.json"):
        (tmp_path / "run" / name).unlink()
    shutil.rmtree(tmp_path / "run/policy")
    again = config_lib.load(tmp_path / "run/config.yaml")
    again.run_dir = str(tmp_path / "run")
    assert loop.train(again) == table
    done, redone = units(folder), units(tmp_path / "run")
    assert redone == done and len(done) >= 6


def test_an_invalid_edit_earns_nothing_and_says_why(config, tmp_path):
    """Free-form, a random model writes no JSON."""
    free = config_lib.load(f"{config.run_dir}/config.yaml", ["sample.constrained=false", "sample.max_tokens=8", f"run_dir={tmp_path}/run"])
    stage = stage_lib.build(free, ("train",))
    with loop.open_run(free) as store:
        (record, _) = loop.e_step(stage, store, 1)
    for edit in record["edits"]:
        assert edit["reward"] == 0.0 and edit["problem"].startswith("not JSON") and edit["trials"] == []
