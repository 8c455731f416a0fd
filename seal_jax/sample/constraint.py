"""Constraints on what a sample may be: finite automata over tokens, made here on the host and followed on the device (`logits.Guide`).

A regular expression becomes an automaton over bytes, and from that and the tokenizer's vocabulary one over tokens. Tokens that lead
from every state to the same one share a class, so the table of states and classes is small, and decoding needs nothing from the host.

The automaton over bytes is outlines-core's, because it hands out its states and transitions. llguidance takes any grammar, but keeps
its states to itself and gives a mask a call, which would have the host in the loop. outlines-core's own way from a JSON schema to a
regular expression is not used: it ignores the bounds of numbers, allows unbounded ones, and repeats white space; `schema` does neither.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from seal_jax.errors import SealError
from seal_jax.models.folder import one_line
from seal_jax.sample import schema as json_schema
from seal_jax.sample.logits import Guide

TEXT = r"\n[^\x00]*"  # a new line of any text, whole characters of UTF-8
MAX_STATES = 2048  # a state costs a bit a token on the device, and twice two bytes a token on the host for a moment

Tokens = Sequence[bytes | None]  # what each id adds to a text; None: nothing that a constraint may use (`Tokenizer.token_bytes`)


@dataclasses.dataclass(frozen=True, eq=False)
class Constraint:
    """A sample starts in state 0, each token of it leads to the next state, and it may end where `final` is true.

    From every state a final one can be reached. Compared and hashed by identity; the same `regex` and vocabulary give the same object.
    """

    regex: str
    following: np.ndarray  # [S, C] int32: the state after a token of class c; -1: such a token is not allowed
    class_of: np.ndarray  # [V] int32: the class of each token; class 0 is allowed nowhere
    final: np.ndarray  # [S] bool


def for_schema(schema: Mapping[str, Any], tokens: Tokens, then_text: bool = False) -> Constraint:
    """The constraint to JSON that satisfies `schema`, written as `seal_jax.sample.schema` says, and with `then_text` to a line break and
    any text after it. Raises `SealError` for what that module refuses.
    """
    return for_regex(json_schema.regex(schema) + (TEXT if then_text else ""), tokens)


def for_regex(regex: str, tokens: Tokens) -> Constraint:
    """The constraint to texts that `regex` (Rust's syntax, without look-around) matches from end to end, over the vocabulary `tokens`.

    NUL is never allowed. An expression that can match a text in many ways may take very long to read.
    Raises `SealError` if the expression cannot be read, is too large, or matches nothing that the tokens can spell.
    """
    return _for_regex(regex, tuple(tokens))


@functools.lru_cache(maxsize=64)
def _for_regex(regex: str, tokens: tuple[bytes | None, ...]) -> Constraint:
    table, final = _byte_automaton(regex)
    if len(table) > MAX_STATES:
        raise SealError(f"a constraint of {len(table)} states, more than {MAX_STATES}; shorten its strings and arrays: {regex[:60]!r}...")
    following, class_of = _classes(_walk(table, tokens))
    # Only what tokens can reach and finish: a vocabulary need not have every byte.
    alive = _closure(following, final, forward=False)
    following = np.where((following >= 0) & alive[following], following, -1)
    alive &= _closure(following, np.arange(len(final)) == 0, forward=True)
    if not alive[0]:
        raise SealError(f"no text that the tokens can spell matches the constraint {regex[:60]!r}")
    number = np.append(np.cumsum(alive) - 1, -1)  # the last for -1 itself
    following, merged = _classes(number[following[alive]])
    return Constraint(regex, following, merged[class_of], final[alive])


def _byte_automaton(regex: str) -> tuple[np.ndarray, np.ndarray]:
    """([S, 256] int32, [S] bool): the state after each byte (-1: none) and which states are final. State 0 is the start.

    outlines-core builds its automaton as for a search, which is put right with NUL bytes, which no text of ours may hold:
    - A search prefers the first alternative that matches, so that "a|ab" has no "ab". With NUL behind it, neither matches before that.
    - The library also builds the automaton that looks for a match further on, for nothing, and that can grow exponentially. Where an
      empty match will do, if nothing better is found, none is looked for.
    - It drops the step away from that empty match; here that is one between the two NULs in front, which together are one token.
    """
    import outlines_core  # here alone, so that the sampler runs without it where nothing is constrained

    end, front = 256, 257  # the library asks for an end token; it loops in the final states
    vocabulary = outlines_core.Vocabulary(end, {bytes([b]): [b] for b in range(256)} | {b"\0\0": [front]})
    try:
        index = outlines_core.Index(rf"\x00\x00(?:{regex})\x00|", vocabulary)
    except ValueError as error:
        raise SealError(f"the constraint {regex[:60]!r} cannot be used: {one_line(error)}") from None
    edges, over = index.get_transitions(), index.get_final_states()
    start = edges[index.get_initial_state()].get(front)
    if start is None:
        raise SealError(f"the constraint {regex[:60]!r} cannot be used: it matches nothing")
    number = {state: i for i, state in enumerate([start, *sorted(edges.keys() - {start})])}
    table, final = np.full((len(number), 256), -1, np.int32), np.zeros(len(number), bool)
    for state, successors in edges.items():
        for byte, successor in successors.items():
            if byte == 0:
                final[number[state]] = successor in over
            elif byte < end:
                table[number[state], byte] = number[successor]
    return table, final


def _walk(table: np.ndarray, tokens: Sequence[bytes | None]) -> np.ndarray:
    """[S, V] int16: the state that each token leads to from each state, byte by byte; -1: nowhere."""
    data = np.frombuffer(b"".join(t or b"" for t in tokens), np.uint8)
    length = np.asarray([len(t or b"") for t in tokens])
    offset = np.cumsum(length) - length
    usable = np.flatnonzero(length)
    starts = [usable[data[offset[usable]] == byte] for byte in range(256)]
    out = np.full((len(table), len(tokens)), -1, np.int16)
    # Pairs of a state and a token that are still alive, which after the first byte are few.
    for begin, row in enumerate(table):
        token = np.concatenate([starts[b] for b in np.flatnonzero(row >= 0)] or [usable[:0]])
        state = row[data[offset[token]]]
        for position in range(1, int(length.max(initial=0))):
            whole = length[token] == position
            out[begin, token[whole]] = state[whole]
            token, state = token[~whole], state[~whole]
            state = table[state, data[offset[token] + position]]
            token, state = token[state >= 0], state[state >= 0]
            if not len(token):
                break
        out[begin, token] = state
    return out


def _classes(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """([S, C] int32, [V] int32): the columns of [S, V] without repetition, the one of nothing but -1 first, and where each is."""
    rows = np.ascontiguousarray(columns.T)
    found = {np.full_like(columns[:, 0], -1).tobytes(): 0}
    class_of = np.fromiter((found.setdefault(row.tobytes(), len(found)) for row in rows), np.int32, len(rows))
    distinct = np.frombuffer(b"".join(found), columns.dtype).reshape(len(found), -1)
    return distinct.T.astype(np.int32), class_of


def _closure(following: np.ndarray, seed: np.ndarray, forward: bool) -> np.ndarray:
    """[S] bool: the states that can be reached from those in `seed`, or if not `forward`, from which one of those can be reached."""
    source, target = np.nonzero(following >= 0)[0], following[following >= 0]
    if not forward:
        source, target = target, source
    reached = seed.copy()
    while True:
        more = reached.copy()
        more[target[reached[source]]] = True
        if (more == reached).all():
            return reached
        reached = more


# --- For the device -------------------------------------------------------------------------------------------------


def guide(constraints: Sequence[Constraint], stop: Sequence[int], vocab_size: int) -> tuple[Guide, dict[Constraint, int]]:
    """One table (of numpy arrays) for rows under any of `constraints` or none, and the state in which a row under each starts.

    State 0 allows everything, for ever. The `stop` ids are allowed exactly in the final states of a constraint. Ids from the
    vocabulary's end to `vocab_size`, which a model may have more of than its tokenizer, are not allowed.
    Raises ValueError for a stop id that is also text of a constraint.
    """
    tables, starts = _guide(tuple(constraints), tuple(stop), vocab_size)
    return tables, dict(zip(constraints, starts, strict=True))


@functools.lru_cache(maxsize=4)
def _guide(constraints: tuple[Constraint, ...], stop: tuple[int, ...], vocab_size: int) -> tuple[Guide, tuple[int, ...]]:
    of_each = np.zeros((len(constraints), vocab_size), np.int32)
    for i, c in enumerate(constraints):
        of_each[i, : len(c.class_of)] = c.class_of
        text = [s for s in stop if of_each[i, s]]
        if text:  # without it, a text that has been begun might have no end
            raise ValueError(f"stop id {text[0]} stands for text that a constraint allows")
    of_each[:, list(stop)] = -1
    joint, class_of = np.unique(of_each, axis=1, return_inverse=True)  # a class of all: one that they share in every constraint
    starts = np.cumsum([1, *[len(c.final) for c in constraints]])
    # Sizes are powers of two, so that other constraints of about the same size do not compile again.
    following = np.full((1 << int(starts[-1] - 1).bit_length(), 1 << (joint.shape[1] - 1).bit_length()), -1, np.int32)
    following[0] = 0
    for c, start, classes in zip(constraints, starts, joint, strict=False):
        own = np.arange(len(c.final))
        part = np.where(classes == -1, np.where(c.final, own, -1)[:, None], c.following[:, classes])
        following[start : start + len(own), : len(classes)] = np.where(part >= 0, part + start, -1)
    class_of = class_of.reshape(-1).astype(np.int32)
    allowed = Guide.pack(following[:, class_of] >= 0)
    return Guide(allowed, following, class_of), tuple(starts[:-1].tolist())
