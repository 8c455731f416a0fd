import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seal_jax.errors import SealError
from seal_jax.sample.constraint import Constraint, for_regex, for_schema, guide

EXPRESSIONS = ["a|ab|abc", "(?:ab)*c", "a{2,4}b?", "[^a]b", "é+|a", "", "[a-c]{0,3}é"]


def follow(constraint, ids):
    """The state after the tokens `ids`, -1 where they are not allowed."""
    state = 0
    for i in ids:
        state = constraint.following[state, constraint.class_of[i]] if state >= 0 else -1
    return state


@given(
    st.sampled_from(EXPRESSIONS),
    st.lists(st.one_of(st.none(), st.text("abcé", max_size=4).map(str.encode), st.sampled_from([b"\xc3", b"\xa9", b"\xa9a"])), max_size=12),
    st.data(),
)
@settings(max_examples=300, deadline=None)
def test_tokens_lead_where_their_bytes_do(regex, tokens, data):
    tokens = [*tokens, b"a", b"b", b"c", b"\xc3", b"\xa9"]
    constraint = for_regex(regex, tokens)
    usable = [i for i, t in enumerate(tokens) if t]
    for _ in range(10):
        ids = data.draw(st.lists(st.sampled_from(usable), max_size=5))
        spelt, state = b"".join(tokens[i] for i in ids), follow(constraint, ids)
        try:
            whole = re.fullmatch(regex, spelt.decode()) is not None
        except UnicodeDecodeError:
            whole = False
        assert (state >= 0 and bool(constraint.final[state])) == whole
    assert all(constraint.class_of[i] == 0 for i in range(len(tokens)) if i not in usable)
    assert (constraint.following[:, 0] == -1).all()
    # From every state, a text can be finished.
    reached = constraint.final.copy()
    for _ in range(len(reached)):
        reached |= ((constraint.following >= 0) & reached[constraint.following]).any(axis=1)
    assert reached.all()


def test_text_may_follow_what_a_schema_allows():
    tokens = [*(bytes([b]) for b in range(256)), b"1\n", "é\n".encode()]
    constraint = for_schema({"enum": [1, 23]}, tokens, then_text=True)

    def ends(text):
        state = follow(constraint, text)
        return state >= 0 and bool(constraint.final[state])

    assert ends(b"1\n") and ends(b"23\n") and ends([256]) and ends(b"1\n{any}\n\ttext \x01" + "é東🙂".encode()) and ends([256, 257, 257])
    assert not ends(b"1") and not ends(b"2\n") and not ends(b"1 \n") and not ends(b"\n") and not ends([257])
    assert follow(constraint, b"1\na\0") == -1 and follow(constraint, b"1\n\xff") == -1
    assert follow(constraint, b"1\n\xe6\x9d") > 0 and not ends(b"1\n\xe6\x9d"), "it does not end within a character"
    assert constraint is not for_schema({"enum": [1, 23]}, tokens)


def test_what_cannot_be_finished_is_not_begun():
    constraint = for_regex("ab|ac", [b"a", b"c", b"ab"])
    assert follow(constraint, [0]) > 0 and follow(constraint, [2]) > 0
    some = for_regex("ab|ac|db", [b"a", b"c", b"d"])
    assert follow(some, [2]) == -1 and follow(some, [0, 1]) > 0


def test_the_same_is_made_once():
    tokens = (b"a", None, b"b")
    assert for_regex("ab", tokens) is for_regex("ab", list(tokens)) is not for_regex("ab", (b"a", b"b"))
    assert for_schema({"const": 1}, (b"1",)) is for_regex("(?:1)", (b"1",))


def test_repetitions_of_what_a_match_can_begin_with():
    """The library alone takes time exponential in them."""
    strings = {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 3}
    assert len(for_schema(strings, [bytes([b]) for b in range(256)]).final) < 2000


@pytest.mark.parametrize(
    ("regex", "told"),
    [
        ("a(", "the constraint 'a(' cannot be used"),
        ("(?=a)b", "cannot be used"),
        ("[a&&b]", "cannot be used"),
        ("\ud800", "cannot be used"),
        ("a{3000}", "states, more than 2048; shorten"),
        ("d", "no text that the tokens can spell matches the constraint 'd'"),
    ],
)
def test_what_is_refused(regex, told):
    with pytest.raises(SealError) as caught:
        for_regex(regex, [b"a", b"b"])
    assert told in str(caught.value) and "\n" not in str(caught.value)


# --- Several in one table -------------------------------------------------------------------------------------------


def test_a_table_of_several():
    tokens = [b"a", b"b", None, b"ab", b"c", None]
    some: list[Constraint] = [for_regex("(?:ab)*", tokens), for_regex("c|ab", tokens)]
    tables, starts = guide(some, [2], 8)  # ids 6 and 7 are the model's alone
    assert tables.following.dtype == tables.class_of.dtype == np.int32 and tables.allowed.dtype == np.uint32
    assert all(n & (n - 1) == 0 for n in tables.following.shape)
    width = tables.allowed.shape[1]

    def allowed(state):
        return [t for t in range(8) if tables.allowed[state, t % width] >> np.uint32(t // width) & 1]

    def after(state, token):
        return int(tables.following[state, tables.class_of[token]])

    assert allowed(0) == list(range(8)) and all(after(0, t) == 0 for t in range(8))
    first, second = starts[some[0]], starts[some[1]]
    assert allowed(first) == [0, 2, 3] and allowed(second) == [0, 3, 4]
    assert after(first, 3) == after(after(first, 0), 1) and allowed(after(first, 0)) == [1] and allowed(after(first, 3)) == [0, 2, 3]
    assert allowed(after(second, 4)) == [2] and allowed(after(second, 3)) == [2]
    assert guide(some, [2], 8)[0] is tables


def test_a_stop_id_is_no_text():
    with pytest.raises(ValueError, match="stop id 1 stands for text"):
        guide([for_regex("ab", [b"a", b"b"])], [1], 4)


def test_packing_is_what_the_device_unpacks():
    from seal_jax.sample.logits import Guide

    draw = np.random.default_rng(0)
    for size in (1, 100, 4096, 4097, 9000):
        allowed = draw.random((5, size)) < 0.5
        tables = Guide(Guide.pack(allowed), np.zeros((5, 1), np.int32), np.zeros(size, np.int32))
        logits = draw.normal(0, 1, (3, size)).astype(np.float32)
        state = np.asarray([4, 0, 4])
        masked = np.asarray(Guide(*map(np.asarray, tables)).mask(logits, state))
        np.testing.assert_array_equal(masked, np.where(allowed[state], logits, -np.inf))
