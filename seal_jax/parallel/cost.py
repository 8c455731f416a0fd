"""What a program costs, in operations and bytes: XLA's count of the compiled program, put right for its loops, and a count by hand.

XLA counts the body of a loop once, however often it runs. How often is known before compilation, so that what is left out is counted in
the traced program, where a layer's products stand once with the number of layers beside them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend import core
from jax.interpreters import partial_eval

from seal_jax.config import LoraConfig
from seal_jax.models import lora as lora_lib
from seal_jax.models.spec import DecoderSpec


class Work(NamedTuple):
    """Operations, and bytes moved between memory and compute units."""

    flops: float
    bytes: float

    def plus(self, other: Work, times: float = 1.0) -> Work:
        return Work(self.flops + times * other.flops, self.bytes + times * other.bytes)


NOTHING = Work(0.0, 0.0)
NO_LORA = LoraConfig(rank=0)


# --- From the compiled program ---------------------------------------------------------------------------------------


def of_program(traced: Any, compiled: Any, trips: int = 1, devices: int = 1) -> Work:
    """The work of one call of a program on one device: XLA's count, and the trips of loops that it leaves out.

    `trips`: how often loops of unknown length run (a scan's length is known). `devices`: how many share what the traced program shows as
    one shard's; of a program under `shard_map` over edits, those along the other axes.
    """
    found = compiled.cost_analysis() or {}
    found = found[0] if isinstance(found, list) else found
    counted = Work(float(found.get("flops", 0.0)), float(found.get("bytes accessed", 0.0)))
    jaxpr = needed(traced)
    return counted.plus(products(jaxpr, trips), 1 / devices).plus(products(jaxpr, None), -1 / devices)


def needed(traced: Any) -> Any:
    """The traced program without what no result needs, which the compiler drops too: an adapted product's backward pass names the gradient
    of its frozen kernel, for one."""
    return partial_eval.dce_jaxpr(traced.jaxpr.jaxpr, True)[0]


def products(jaxpr: Any, trips: int | None) -> Work:
    """The matrix products of a traced program, and the bytes of their operands and results and of slices read from memory.

    Every scan counts as often as it runs and every other loop `trips` times; with `trips` None, each once.
    """
    total = NOTHING
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            total = total.plus(_product(equation))
        elif name == "dynamic_slice":  # a layer of a cache, which is then read where it is used
            total = total.plus(Work(0.0, _size(equation.outvars[0])))
        elif name == "cond":
            total = total.plus(max((products(branch, trips) for branch in _inner(equation)), key=lambda work: work.flops))
        elif name == "while":
            total = total.plus(products(equation.params["body_jaxpr"].jaxpr, trips), 1 if trips is None else trips)
        else:
            times = equation.params["length"] if name == "scan" and trips is not None else 1
            for inner in _inner(equation):
                total = total.plus(products(inner, trips), times)
    return total


def _inner(equation: Any) -> Iterator[Any]:
    for value in core.jaxprs_in_params(equation.params):
        yield value.jaxpr if isinstance(value, core.ClosedJaxpr) else value


def _size(variable: Any) -> float:
    return float(math.prod(variable.aval.shape) * variable.aval.dtype.itemsize)


def _product(equation: Any) -> Work:
    (contracted, _), _ = equation.params["dimension_numbers"]
    depth = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
    moved = sum(_size(v) for v in (*equation.invars, *equation.outvars))
    return Work(2.0 * depth * math.prod(equation.outvars[0].aval.shape), moved)


# --- By hand ---------------------------------------------------------------------------------------------------------


def linear_parameters(spec: DecoderSpec) -> int:
    """Weights of all linear layers, which every token is multiplied with; the output embedding is apart."""
    return spec.num_layers * sum(a * b for a, b in (lora_lib.dimensions(spec, target) for target in lora_lib.GROUPS))


def forward_flops(spec: DecoderSpec, lora: LoraConfig, tokens: float, seen: float, heads: float) -> float:
    """Of `tokens` tokens that each see `seen` tokens, and logits at `heads` positions: 2 for each weight and each score and its use."""
    weights = linear_parameters(spec) + lora_lib.count(spec, lora.rank, lora.targets)
    attention = 4.0 * spec.num_layers * spec.num_heads * spec.head_dim * seen
    return tokens * (2.0 * weights + attention) + 2.0 * heads * spec.vocab_size * spec.hidden_size


def fit_flops(spec: DecoderSpec, lora: LoraConfig, tokens: float, seen: float, labels: float, remat: str = "none") -> float:
    """Of training an adapter on `tokens` tokens that each see `seen`, with a loss on `labels` of them, the base weights frozen.

    A frozen weight costs 2 forward and 2 for the gradient of its input, an adapter's weight 2 more for its own, attention twice its
    forward again. The logits' gradient is taken at once: 2 more for each weight of the head. With remat "full" the layers' forward pass
    runs twice, but for the last product of each, which no gradient needs.
    """
    forward = forward_flops(spec, lora, tokens, seen, 0.0)
    adapter = 2.0 * tokens * lora_lib.count(spec, lora.rank, lora.targets)
    attention = 4.0 * tokens * spec.num_layers * spec.num_heads * spec.head_dim * seen
    again = forward - 2.0 * tokens * spec.num_layers * spec.intermediate_size * spec.hidden_size if remat == "full" else 0.0
    return 2.0 * forward + again + adapter + attention + 4.0 * labels * spec.vocab_size * spec.hidden_size


def trained_flops(spec: DecoderSpec, lora: LoraConfig | None, lengths: Iterable[int]) -> float:
    """Model FLOP of training once on sequences of `lengths` tokens, all of them labels: an adapter, or (None) all weights.

    Attention is counted causally. What is recomputed, and what padding costs, is not counted: that is the point of a utilisation.
    """
    if lora is not None:
        return sum(fit_flops(spec, lora, n, (n + 1) / 2, n) for n in lengths)
    return sum(3.0 * forward_flops(spec, NO_LORA, n, (n + 1) / 2, n) for n in lengths)


def written_flops(spec: DecoderSpec, lora: LoraConfig | None, prompts: Iterable[int], written: Iterable[tuple[int, int]]) -> float:
    """Model FLOP of reading `prompts` of so many tokens, and of writing: (tokens before, tokens written), by an adapted model or a bare."""
    lora = NO_LORA if lora is None else lora
    read = sum(forward_flops(spec, lora, n, (n + 1) / 2, 0) for n in prompts)
    return read + sum(forward_flops(spec, lora, n, before + (n + 1) / 2, n) for before, n in written)


def shard_bytes(tree: Any) -> int:
    """Bytes a device of abstract arrays with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
