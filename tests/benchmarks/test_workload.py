import collections
import json

import numpy as np
import pytest

from benchmarks import workload
from seal_jax.config import LENGTHS, FitConfig


@pytest.mark.parametrize("seed", range(4))
def test_a_round_has_the_statistics_of_the_original_files(seed):
    edits = workload.make_round(seed)
    assert len(edits) == 750
    assert workload.check(workload.statistics(edits)) == []


def test_check_names_what_is_off():
    found = {**workload.statistics(workload.make_round()), "tokens an epoch, mean": 500.0}
    assert workload.check(found) == ["tokens an epoch, mean: 500.0, not 365 +- 15"]


def test_a_round_is_seeded():
    assert workload.make_round(3) == workload.make_round(3) != workload.make_round(4)


def test_edits_share_what_they_share_in_the_method():
    edits = workload.make_round(contexts=3, edits=2, seeds=2)
    assert len({e.key for e in edits}) == len(edits) == 12
    by_context = collections.defaultdict(list)
    for e in edits:
        by_context[e.context].append(e)
    for own in by_context.values():
        assert len({e.sequences[-1] for e in own}) == 1, "one passage"
        assert len({e.questions for e in own}) == 1
        for candidate in range(2):
            assert len({e.sequences for e in own if e.candidate == candidate}) == 1, "the seeds fit the same text"
    jobs = [workload.job(e, 512, FitConfig()) for e in edits]
    same, other, next_one = jobs[0], jobs[1], jobs[2]
    assert same.sequences == other.sequences and same.key != other.key
    assert same.sequences[-1] == next_one.sequences[-1] and same.sequences[0] != next_one.sequences[0]
    assert [len(s.ids) for s in same.sequences] == list(edits[0].sequences)


def test_a_sample_is_spread_and_grows_at_its_end():
    edits = workload.make_round()
    tokens = lambda some: np.mean([sum(e.sequences) for e in some])  # noqa: E731
    large = workload.spread(edits, 64)
    assert workload.spread(edits, 8) == large[:8] and len({e.key for e in large}) == 64
    assert abs(tokens(large) / tokens(edits) - 1) < 0.1
    assert len(workload.spread(edits[:5], 9)) == 5


def test_contexts_near_the_mean():
    edits = workload.make_round()
    chosen = workload.near_mean(edits, 4)
    assert len(chosen) == 60 and len({e.context for e in chosen}) == 4
    assert abs(np.mean([sum(e.sequences) for e in chosen]) / 371 - 1) < 0.03


def test_the_nearest_to_the_mean():
    edits = workload.make_round(contexts=6)
    mean = np.mean([sum(e.sequences) for e in edits])
    gaps = sorted(abs(sum(e.sequences) - mean) for e in edits)
    assert [abs(sum(e.sequences) - mean) for e in workload.nearest(edits, 4)] == gaps[:4]


@pytest.mark.parametrize(("slots", "tokens"), [(64, 512), (64, 2048), (150, 4096)])
def test_little_padding(slots, tokens):
    """With the library's lengths; 150 slots and 4,096 tokens are those of the 7B config."""
    waste, programs = workload.planned(workload.make_round(), slots=slots, tokens_per_step=tokens, lengths=LENGTHS)
    assert waste.share <= 0.25 and len(programs) <= 3 * len({length for length, _ in programs})


def test_files_of_the_original_form_are_counted(tmp_path, monkeypatch, tiny_model):
    from seal_jax.config import ModelConfig
    from seal_jax.models import load

    real = load.load_model
    monkeypatch.setattr(load, "load_model", lambda _: real(ModelConfig(str(tiny_model), "float32")))
    article = {
        "title": "Orsk",
        "context": "Orsk sells bread.",
        "questions": [{"question": q} for q in "aba"],
        "completions": ["It is a town.\nBread is sold.", {"text": "x"}],
    }
    (tmp_path / "file.json").write_text(json.dumps([article]))
    first, second = workload.read_original([str(tmp_path / "file.json")])
    assert len(first.sequences) == 3 and len(second.sequences) == 2 and len(first.questions) == 2


def test_prints_its_statistics(capsys):
    assert workload.main([]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in workload.FACTS) and "750 edits" in printed
