"""What a run tells of its steps, on a tiny run and step by step; and what the report makes of it."""

import time

import jax
import jax.numpy as jnp
import pytest

from seal_jax.config import LoraConfig
from seal_jax.models.shapes import published
from seal_jax.parallel import chips, cost
from seal_jax.runs import health
from seal_jax.runs.events import read_events
from seal_jax.runs.store import RunStore


@pytest.fixture
def heard():
    """What is told from now on: (event, fields)."""
    told = []
    with health.told_to(lambda event, **fields: told.append((event, fields))):
        yield told


def test_a_run_tells_each_long_step_at_its_end(tiny_run):
    steps = [e for e in read_events(tiny_run / "events.jsonl") if e["event"] == "step"]
    assert all(e["ended"] and e["done"] == e["total"] for e in steps)
    count = {kind: sum(e["kind"] == kind for e in steps) for kind in health.KINDS}
    # Two contexts before, two in each of two rounds, two after; answers with adapters and without.
    assert count == {"sample": 8, "answer": 16, "fit": 8, "sft": 2}
    reader = RunStore(tiny_run)
    trained = [t["steps"] for c in reader.read("rounds/1/e_step/000")["contexts"] for e in c["edits"] for t in e["trials"]]
    first = next(e for e in steps if e["kind"] == "fit" and "rounds 1" in e["what"])
    assert first["unit"] == "tok" and first["tokens"] == first["done"] > sum(trained)
    written = [e for e in steps if e["kind"] == "sample"]
    assert all(e["unit"] == "seq" and e["done"] == 2 and 2 < e["tokens"] <= 48 for e in written)
    assert all(abs(e["tokens_per_s"] * e["seconds"] - e["tokens"]) < 0.001 * (e["tokens_per_s"] + e["tokens"]) for e in steps)
    assert sum(e["compiled"] for e in steps) > 4 and all(0 <= e["cache"] <= e["compiled"] for e in steps)
    assert all(0 < e["memory"] <= 2 * e["memory_peak"] and e["memory_of"] == "process" for e in steps)
    assert all(e["utilisation"] is None for e in steps), "of a CPU no peak is published"
    assert {e["waiting"] for e in steps if e["kind"] == "fit"} == {0} and steps[-1]["waiting"] is not None
    rounds = [e for e in read_events(tiny_run / "events.jsonl") if e["event"] == "round"]
    assert [e["round"] for e in rounds] == [1, 2]
    assert all(e["reward/unadapted"] is not None and e["reward/best"] >= e["reward/mean"] and e["loss/first"] for e in rounds)


def test_within_a_step_it_is_told_every_half_minute(heard, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with health.step("fit", "fitting", 400, "tok", peak=1e3, flops_per_token=50.0) as step:
        for _ in range(8):
            now[0] += 10.0
            step.update(50, waiting=3)
    assert [(f["seconds"], f["done"], f["ended"]) for _, f in heard] == [(30.0, 150, False), (60.0, 300, False), (80.0, 400, True)]
    assert heard[-1][1]["utilisation"] == pytest.approx(400 * 50 / 80 / 1e3) and heard[-1][1]["tokens_per_s"] == 5.0
    assert heard[0][1]["waiting"] == 3


def test_a_step_that_fails_is_not_told(heard):
    with pytest.raises(ZeroDivisionError), health.step("fit", "fitting", 1, "tok"):
        raise ZeroDivisionError
    assert not heard


def test_programs_are_counted_where_they_are_compiled(heard):
    program = jax.jit(lambda x: jnp.tanh(x) * 3.25 + 1.5)
    x = jnp.ones(7)
    for _ in range(2):
        with health.step("fit", "fitting", 1, "tok"):
            program(x).block_until_ready()
    assert [fields["compiled"] for _, fields in heard] == [1, 0]
    assert heard[0][1]["compile_seconds"] > 0 == heard[1][1]["compile_seconds"]


def test_nobody_listens_nothing_is_told(monkeypatch):
    monkeypatch.setattr(health, "memory", None)
    with health.step("fit", "fitting", 1, "tok") as step:
        step.update(1)


class Device:
    def __init__(self, kind, stats=None):
        self.device_kind, self._stats = kind, stats

    def memory_stats(self):
        return self._stats


def test_memory_of_devices_is_that_of_the_fullest(monkeypatch):
    devices = [Device("x", {"bytes_in_use": n, "peak_bytes_in_use": 2 * n}) for n in (10, 30, 20)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert health.memory() == {"memory": 30, "memory_peak": 60, "memory_of": "device"}


def test_peaks_are_of_whole_chips():
    assert chips.peak([Device("NVIDIA H200")] * 4) == 4 * 989e12
    assert chips.peak([Device("cpu")]) is None
    halves = [Device("TPU7x") for _ in range(4)]
    for i, device in enumerate(halves):
        device.coords = [i // 2, 0, 0]
    assert chips.peak(halves) == 2 * 2307e12


def test_flops_by_hand():
    spec, lora = published("qwen2.5-0.5b"), LoraConfig(4, 8.0, ["q_proj"])
    weights = cost.linear_parameters(spec) + spec.vocab_size * spec.hidden_size
    pairs = 4 * spec.num_layers * spec.num_heads * spec.head_dim  # of each token and one that it sees
    assert cost.trained_flops(spec, None, [3]) == 3 * (3 * 2 * weights + 0) + 3 * pairs * 6
    assert cost.trained_flops(spec, lora, [3]) < cost.trained_flops(spec, None, [3])
    read = 2 * 5 * cost.linear_parameters(spec) + pairs * 15
    assert cost.written_flops(spec, None, [5], []) == read
    # Two tokens after five: they see six and seven, and each has logits.
    assert cost.written_flops(spec, None, [5], [(5, 2)]) == read + 2 * 2 * weights + pairs * 13


def test_the_report_sums_up_by_kind(tiny_run):
    found = {h["kind"]: h for h in health.summary(read_events(tiny_run / "events.jsonl"))}
    assert list(found) == ["writing self-edits", "fitting adapters", "answering", "training the policy"]
    assert found["fitting adapters"]["steps"] == 8 and found["fitting adapters"]["utilisation"] is None
    page = (tiny_run / "report.html").read_text()
    assert "Longest queue" in page and "training the policy" in page and "of the first process" in " ".join(page.split())
