"""From the plan of one replica to rounds on many, on made-up records whose times can be told in the head."""

import copy

import pytest

from seal_jax.parallel import scale

RATES = scale.Rates(100.0, 10.0, 1.0)


def program(name, flops, least, sent, items, an_item):
    return {"name": name, "flops": flops, "least_bytes_accessed": least, "sent_bytes": sent, "items": items, "least_bytes_an_item": an_item}


RECORD = {
    "mesh": {"edit": 2, "fsdp": 1, "tensor": 2},
    "edits_per_shard": 30,
    "workload": {"sequences": 2.0, "epochs": 5, "answer_tokens": 9},
    "programs": [
        program("fit", 1000.0, 50.0, {"tensor": 2.0}, 10, 1.0),  # 10 s of compute, 5 of memory, 2 of links; 4 bytes an item
        program("prefill", 300.0, 10.0, {}, 6, 0.5),  # 3 s
        program("decode", 10.0, 20.0, {}, 6, 1.0),  # 2 s
        program("M-step", 400.0, 60.0, {"edit": 3.0, "tensor": 1.0}, 2, 20.0),  # two microbatches
        program("write", 10.0, 40.0, {}, 8, 2.5),  # 4 s
    ],
}


def what(contexts, **more):
    return scale.Round(**{"contexts": contexts, "edits": 5, "seeds": 3, "written": [100] * 4, "batch": 10, "epochs": 2, **more})


def test_a_call_takes_its_longest_resource():
    fit = RECORD["programs"][0]
    assert scale.call(fit, RATES) == (10.0, "compute")
    assert scale.call(fit, RATES, 1) == (pytest.approx((50 - 9 * 1.0) / 10), "memory bandwidth"), "the weights are read for one edit too"
    assert scale.call(fit, RATES, 25) == scale.call(fit, RATES), "no more than it was compiled for"
    assert scale.call(fit, scale.Rates(1e9, 1e9, 1.0)) == (2.0, "interconnect")


def test_the_expected_longest_of_some():
    assert scale.longest([7, 3], 1) == pytest.approx(5) and scale.longest([7, 3], 2) == pytest.approx(0.75 * 7 + 0.25 * 3)
    assert scale.longest([7, 3], 1000) == pytest.approx(7)


def test_an_e_step_is_the_sum_of_its_groups():
    """One replica holds 30 edits: two contexts a group."""
    time = scale.e_step(RECORD, RATES, 1, what(4))
    # A group: 10 self-edits of 100 tokens in 8 rows; 30 edits of 10 sequences in steps of 10; 5 times 6 adapters that answer 9 tokens.
    group = {"write: memory bandwidth": 125 * 4.0, "fit: compute": 30 * 10.0, "prefill: compute": 15.0, "decode: memory bandwidth": 80.0}
    assert time.terms == pytest.approx({name: 2 * seconds for name, seconds in group.items()})
    assert time.seconds == pytest.approx(2 * sum(group.values())) and time.bottleneck == "write: memory bandwidth"
    assert scale.e_step(RECORD, RATES, 1, what(5)).seconds > time.seconds, "the context that is left over is a group too"


def test_twice_the_replicas_take_half_the_time_of_many_contexts():
    one, two = (scale.e_step(RECORD, RATES, replicas, what(4000)).seconds for replicas in (1, 2))
    assert two == pytest.approx(one / 2)


def test_few_edits_do_not_get_faster_than_one():
    """With an edit a replica, a step reads the weights for one sequence, and there are as many steps."""
    few = what(1)
    alone, more = scale.e_step(RECORD, RATES, 15, few), scale.e_step(RECORD, RATES, 1000, few)
    assert alone.seconds == pytest.approx(more.seconds)
    assert alone.terms["fit: memory bandwidth"] == pytest.approx(10 * 4.1)
    late = scale.e_step(RECORD, RATES, 15, what(1, written=[100, 900]))
    gained = (late.terms["write: memory bandwidth"] - alone.terms["write: memory bandwidth"]) / ((40 - 7 * 2.5) / 10)
    assert gained == pytest.approx(scale.longest([100, 900], 5) - 100), "a group waits for its longest"


def test_an_m_step_leaves_shards_idle_and_sums_over_replicas():
    # As compiled: 10 pairs on 2 replicas are 5 microbatches of 200 FLOP, 20 bytes and, on links, 1.5 along edit and 0.5 along tensor.
    ten = scale.m_step(RECORD, RATES, 2, what(50))
    assert ten.seconds == pytest.approx(10 * max(5 * 200 / 100, (60 + 3 * 20) / 10, 5 * 2.0))
    assert ten.bottleneck == "M-step: memory bandwidth"
    alone = scale.m_step(RECORD, scale.Rates(1e9, 1e9, 1.0), 1, what(50))
    assert alone.seconds == pytest.approx(10 * 10 * 0.5), "nothing goes along edit"
    many = [scale.m_step(RECORD, scale.Rates(1e9, 1e9, 1.0), replicas, what(50)).seconds for replicas in (10, 512)]
    assert many == pytest.approx([10 * (0.5 + 1.5 * share / (1 / 2)) for share in (9 / 10, 511 / 512)]), "ten replicas work, the rest wait"
    whole = copy.deepcopy(RECORD) | {"mesh": {"edit": 2, "fsdp": 5, "tensor": 2}}
    assert scale.m_step(whole, RATES, 2, what(50)).seconds == pytest.approx(10 * 4.0), "rows are dealt out over fsdp as well"
    sent = scale.m_step_sent(whole | {"programs": [program("M-step", 1.0, 1.0, {"edit+fsdp": 9.0}, 1, 1.0)]}, 4, 3)
    assert sent == pytest.approx({"edit+fsdp": 3 * 9.0 * (19 / 20) / (9 / 10)})
