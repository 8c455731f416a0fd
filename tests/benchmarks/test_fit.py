import json
import types

import jax
import numpy as np
import pytest

from benchmarks import fit, peers, workload
from seal_jax.errors import SealError
from seal_jax.fit import memory


def test_our_side_alone(measure):
    rows, printed = measure(fit.main, "--no-peer")
    assert "# no peer: --no-peer" in printed
    assert list(rows) == ["fit-k2", "fit-k1", "fit-length-16"]
    for case in ("fit-k2", "fit-k1"):
        assert rows[case]["ratio"] is None and 0 <= rows[case]["padding"] < 1 and 0 < rows[case]["mfu"] < 1
    assert rows["fit-length-16"]["over_k1"] > 0
    waste, _ = workload.planned(workload.spread(workload.make_round(), 3), slots=2, tokens_per_step=768, lengths=(384,), epochs=1)
    assert rows["fit-k2"]["padding"] == pytest.approx(waste.share, rel=1e-3) and rows["fit-k2"]["steps"] == waste.steps, "as planned"


def test_beside_the_peer(measure, torch_peer, tmp_path):
    rows, _ = measure(fit.main, "--json", str(tmp_path / "lines"))
    after = ["peft-dynamic", "fit-k2-vs-peft", "fit-k1-vs-peft", "learning", "peft-padded-2048", "fit-best-vs-padded", "fit-length-16"]
    assert list(rows) == ["fit-k2", "fit-k1", *after], "ours before the peer's, ratios as soon as they are known"
    for case in ("fit-k2", "fit-k1"):
        row = rows[f"{case}-vs-peft"]
        assert row["peer"] == "peft-dynamic" and row["check"] == "ok" and row["loss_gap"] < 1e-5
        assert row["ratio"] == pytest.approx(rows[case]["tokens_per_s"] / rows["peft-dynamic"]["tokens_per_s"], rel=1e-3)
    learning = rows["learning"]
    assert learning["fall"] > 0.1 and learning["fall_gap"] < 1e-3 and learning["check"] == "ok", "the check is of losses that fall"
    assert rows["fit-best-vs-padded"]["peer"] == "peft-padded-2048" and rows["fit-best-vs-padded"]["ratio"] > 1
    assert rows["peft-padded-2048"]["steps_timed"] == 1
    assert len((tmp_path / "lines").read_text().splitlines()) == len(rows)


def test_what_an_edit_costs_besides_its_steps_is_counted_once():
    """Two edits of 3 s besides their steps of half a second: as many steps as there are, and ten times as many."""
    took = lambda steps: 2 * 3.0 + 0.5 * steps  # noqa: E731
    assert fit.whole_edits(took(20), took(2), 2, 20, 20) == took(20)
    assert fit.whole_edits(took(20), took(2), 2, 20, 200) == took(200)
    assert fit.whole_edits(1.5, 1.5, 1, 1, 10) == 15.0, "one step says nothing of what is besides"


@pytest.fixture
def no_room(monkeypatch):
    """`no_room(where)`: our fits find no room on the device where `where(slots, jobs)`."""
    real = fit.fit

    def install(where):
        def short(bench, slots, jobs):
            if where(slots, jobs):
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 24 bytes.")
            return real(bench, slots, jobs)

        monkeypatch.setattr(fit, "fit", short)

    return install


def test_a_case_without_room_is_left_out(measure, no_room):
    no_room(lambda slots, jobs: slots == 2)
    rows, _ = measure(fit.main, "--no-peer", "--sweep", "none")
    assert list(rows) == ["fit-k1"]


def test_nothing_measured_is_a_failure(no_room, capsys, quick_compile):
    no_room(lambda slots, jobs: True)
    with quick_compile():
        assert fit.main(["--tiny", "--repeats", "1", "--no-peer"]) == 1
    assert capsys.readouterr().err.count("left out, no room on the device: fit k=") == 2


def test_rows_are_there_when_the_peer_fails(torch_peer, monkeypatch, capsys, quick_compile):
    """What is stopped or fails later keeps what was measured."""
    monkeypatch.setattr(peers.Peer, "fit", lambda *_, **__: 1 / 0)
    with quick_compile(), pytest.raises(ZeroDivisionError):
        fit.main(["--tiny", "--repeats", "1"])
    assert [json.loads(line)["case"] for line in capsys.readouterr().out.splitlines() if line[0] == "{"] == ["fit-k2", "fit-k1"]


def test_the_learning_edit_has_the_company_of_the_timed_fits(torch_peer, monkeypatch, capsys, quick_compile):
    """As many jobs, and so the programs, that were timed before."""
    calls, real = [], fit.fit
    monkeypatch.setattr(fit, "fit", lambda bench, slots, jobs: calls.append((slots, len(jobs), jobs[0].key[0])) or real(bench, slots, jobs))
    with quick_compile():
        assert fit.main(["--tiny", "--repeats", "1", "--k", "2", "--sweep", "none", "--padded-steps", "0"]) == 0
    assert calls == [(2, 3, "workload")] * 2 + [(2, 3, "learning")]


def test_slots_are_cut_to_what_the_device_holds(monkeypatch, capsys):
    asked = []
    bench = types.SimpleNamespace(on_cpu=False, params=None)
    jobs = [types.SimpleNamespace(sequences=[fit.Tokens(tuple(range(n)))]) for n in (30, 50)]
    monkeypatch.setattr(fit, "engine", lambda bench, slots: types.SimpleNamespace(lengths=(32, 64)))
    monkeypatch.setattr(
        memory, "slots_that_fit", lambda engine, params, length, edits, most: asked.append((length, edits, most)) or min(most, 40)
    )
    assert (fit.with_room(bench, 64, jobs), fit.with_room(bench, 16, jobs)) == (40, 16)
    assert asked == [(64, 64, 64), (64, 16, 16)] and capsys.readouterr().out.splitlines() == [
        "# 40 slots, not 64: no more fit into the device's memory"
    ]

    def silent(*_, **__):
        raise SealError("cpu does not tell how much memory it has")

    monkeypatch.setattr(memory, "slots_that_fit", silent)
    assert fit.with_room(bench, 64, jobs) == 64, "where nobody tells, what was asked for"


def test_other_losses_are_noticed(torch_peer, monkeypatch, capsys, quick_compile):
    """A peer of other numbers fails the check and the run."""
    monkeypatch.setattr(fit, "loss_gap", lambda ours, theirs: real(ours, [1.01 * x for x in theirs]))
    with quick_compile():
        assert fit.main(["--tiny", "--repeats", "1", "--k", "1", "--sweep", "none", "--padded-steps", "0"]) == 1
    captured = capsys.readouterr()
    assert '"check": "failed"' in captured.out and "fit-k1-vs-peft" in captured.err


real = fit.loss_gap


def test_loss_gap_is_the_worst_edit():
    ours, theirs = [np.array([1.0, 2.0]), np.array([4.0])], [np.array([1.0, 2.0]), np.array([5.0])]
    assert fit.loss_gap(ours, theirs) == pytest.approx(0.2)
