import statistics
import types

import jax
import pytest

from benchmarks import peers, workload
from benchmarks import round as round_
from seal_jax.config import LoraConfig


def test_our_side_alone(measure):
    rows, printed = measure(round_.main, "--peer-edits", "0")
    assert "# 2 of 750 edits" in printed and list(rows) == ["round"]
    row = rows["round"]
    assert row["edits"] == 2 and row["round_minutes"] > 0 and row["cold_seconds"] > 0
    assert abs(row["write_s"] + row["fit_s"] + row["answer_s"] + row["bare_s"] - row["seconds"]) < 0.5 * row["seconds"] + 0.1


def test_beside_the_peer(measure, torch_peer):
    rows, _ = measure(round_.main)
    assert list(rows) == ["round", "peft-round", "round-vs-peft"], "ours before the peer's"
    row = rows["round-vs-peft"]
    assert row["peer"] == "peft-round" and row["check"] == "ok" and row["loss_gap"] < 1e-5
    assert row["ratio"] == pytest.approx(rows["round"]["tokens_per_s"] / rows["peft-round"]["tokens_per_s"], rel=1e-3)
    assert row["edits_per_s"] == rows["round"]["edits_per_s"]


def test_the_peer_has_edits_of_the_mean_length(monkeypatch):
    """Of a part in which the first edits are shorter than the mean; written for each of their contexts."""
    edits = [e for e in workload.near_mean(workload.make_round(), 10) if e.seed == 0]
    mean = statistics.mean(e.labels for e in edits)
    peer = types.SimpleNamespace(generate=lambda prompts, *_, **__: written.append(len(prompts)), fit=lambda jobs, *_, **__: list(jobs))
    args = types.SimpleNamespace(seed=0, epochs=10)
    bench = types.SimpleNamespace(args=args, lora=LoraConfig(), spec=types.SimpleNamespace(vocab_size=512))
    other, written = round_.PeerStep(round_.Step(bench, edits), peer, 3), []
    other.run()
    assert abs(statistics.mean(e.labels for e in other.edits) / mean - 1) < 0.03
    assert [job.key for job in other.losses] == [e.key for e in other.edits] == [edits[p].key for p in other.places]
    assert len(written) == len({e.context for e in other.edits}) and set(written) == {5}


def test_no_room_for_the_peer_leaves_ours(measure, torch_peer, monkeypatch):
    monkeypatch.setattr(peers.Peer, "fit", lambda *_, **__: no_room())
    rows, _ = measure(round_.main)
    assert list(rows) == ["round"]


def no_room():
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 24 bytes.")
