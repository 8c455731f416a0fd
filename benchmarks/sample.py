"""Generation: tokens a second and share of the bandwidth roofline, beside transformers' `generate` and, where it installs, vLLM.

    python -m benchmarks.sample [--model qwen2.5-7b] [--rows 1,8,32,128]

`decode-rN` decodes N questions of the workload at once with the bare model; `answers-eN` has N adapted models answer about five
questions each (`k` is the number of rows or of adapters). Every answer has 64 tokens. `tokens_per_s` is of the whole call, prefill
included; the share of the roofline is of a decoding step: the time that a step's bytes take at the measured bandwidth, over the step's
time, which is what 64 tokens take longer than one.

Ours come first, each a line as soon as it has been timed, then each peer's and, in `decode-rN-vs-...` and `answers-eN-vs-peft`, the ratio
of tokens a second and the check.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import common, peers, shapes, workload
from benchmarks.common import Bench
from seal_jax.models import lora as lora_lib
from seal_jax.sample.engine import Request, generate

# How much, in logits, the peer prefers its own greedy choice to our tokens, in the mean; a wrong token would cost it several.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}


def parse(argv: Sequence[str] | None) -> Any:
    p = common.parser("sample", __doc__.split("\n", 1)[0])
    p.add_argument("--rows", help="sequences decoded at once (default 32,8,1; 128,32,8,1 on a GPU)")
    p.add_argument("--adapters", type=int, help="adapted models that answer at once (default 4; 32 on a GPU); 0: none")
    p.add_argument("--tokens", type=int, help="new tokens of each sequence (default 64)")
    p.set_defaults(minutes=3.0)
    args = p.parse_args(argv)
    common.default(args, "rows", "4,1", "32,8,1", "128,32,8,1")
    common.default(args, "adapters", 2, 4, 32)
    common.default(args, "tokens", 8, workload.ANSWER_TOKENS, workload.ANSWER_TOKENS)
    return args


def questions(bench: Bench, count: int) -> list[tuple[int, ...]]:
    """Prompts of the workload's lengths, the round's questions one after another."""
    lengths = itertools.cycle([n for e in workload.make_round(bench.args.seed) if e.candidate == e.seed == 0 for n in e.questions])
    return [workload.ids(bench.args.seed, bench.spec.vocab_size, next(lengths), "question", i) for i in range(count)]


def adapters(bench: Bench, count: int) -> Any:
    """Random adapters [count, ...], strong enough to change what is chosen."""
    shape = jax.eval_shape(functools.partial(lora_lib.init, jax.random.key(0), bench.spec, bench.lora.rank, bench.lora.targets))
    flat, tree = jax.tree.flatten(shape)

    @jax.jit
    def make(key: jax.Array) -> Any:
        keys = jax.random.split(key, len(flat))
        return jax.tree.unflatten(tree, [0.02 * jax.random.normal(k, (count, *x.shape)) for k, x in zip(keys, flat, strict=True)])

    return jax.block_until_ready(make(jax.random.key(bench.args.seed)))


def decode(bench: Bench, prompts: Sequence[Sequence[int]], tokens: int, rows: int, owners: Sequence[int] = (), lora: Any = None) -> Any:
    """Our side: `tokens` greedy tokens for every prompt, no token ending it; prompt i by adapter `owners[i]`."""
    requests = [Request(tuple(p), tokens, adapter=owners[i] if lora is not None else 0) for i, p in enumerate(prompts)]
    return [g.tokens for g in generate(bench.decoder, bench.params, requests, stop=(), rows=rows, lora=lora)]


@dataclasses.dataclass(frozen=True)
class Ours:
    """What was measured of one case of ours."""

    case: str
    k: int  # rows or adapters
    prompts: list[tuple[int, ...]]
    outputs: list[Sequence[int]]
    rate: float  # tokens a second


def main(argv: Sequence[str] | None = None) -> int:
    bench = common.start(parse(argv))
    args = bench.args
    decoded = []
    for place, count in enumerate(int(x) for x in args.rows.split(",")):
        if not place or common.in_time(f"decode-r{count}", bench.until(0.4)):
            decoded += ours(bench, f"decode-r{count}", count, questions(bench, count), count, bench.until(0.4))
    lora = answered = None
    if args.adapters:
        with common.within_memory("answers"):
            lora = adapters(bench, args.adapters)
            answered = answers(bench, lora)
    peer, reason = peers.connect(bench)
    if peer is None:
        print(f"# no peer: {reason}")
    else:
        for x in decoded:
            generated(bench, peer, x)
        if answered is not None:
            with common.within_memory("peft-generate"):
                one_adapter(bench, peer, answered, jax.tree.map(lambda leaf: leaf[0], lora))
    vllm = peers.vllm_reason(bench)
    if vllm is not None:
        print(f"# vLLM not measured: {vllm}")
    else:
        del peer, lora
        peers.release()
        with common.within_memory("vllm"):
            other = peers.Vllm(bench)
            for x in decoded:
                theirs(bench, "vllm", x, functools.partial(other.generate, x.prompts, args.tokens))
    return bench.finish()


def ours(
    bench: Bench,
    case: str,
    k: int,
    prompts: list[tuple[int, ...]],
    rows: int,
    until: float,
    owners: Sequence[int] = (),
    lora: Any = None,
) -> list[Ours]:
    """Our row of a case; none of it if there was no room for it."""
    tokens, last = bench.args.tokens, []

    def keep() -> None:
        last[:] = decode(bench, prompts, tokens, rows, owners, lora)

    cases = {case: keep, f"first of {case}": functools.partial(decode, bench, prompts, 1, rows, owners, lora)}
    took = common.interleave(cases, bench.args.repeats, until)
    if case not in took:
        return []
    rate = len(prompts) * tokens / statistics.median(took[case])
    first = took.get(f"first of {case}")
    share = roofline(bench, took[case], first, prompts, 0 if lora is None else k) if first else None
    bench.add(case, k=k, tokens_per_s=rate, bandwidth_share=share, **common.figures(took[case]))
    return [Ours(case, k, prompts, last, rate)]


def theirs(bench: Bench, name: str, x: Ours, run: Callable[[], Any], **more: Any) -> None:
    """A peer's row for the prompts of one of our cases, and ours in ratio to it."""
    case = f"{name}-r{x.k}"
    for seconds in common.interleave({case: run}, bench.args.repeats, bench.until(0.9)).values():
        rate = x.k * bench.args.tokens / statistics.median(seconds)
        bench.add(case, k=x.k, tokens_per_s=rate, **common.figures(seconds))
        bench.add(f"{x.case}-vs-{name}", k=x.k, tokens_per_s=x.rate, peer=name, ratio=x.rate / rate, **more)


def generated(bench: Bench, peer: peers.Peer, x: Ours) -> None:
    """transformers' `generate` on the same prompts."""
    name = f"transformers-generate-r{x.k}"
    if not common.in_time(name, bench.until(0.9)):
        return
    with common.within_memory(name):
        more = check(bench, peer, x.prompts, x.outputs)
        theirs(bench, "transformers-generate", x, functools.partial(peer.generate, x.prompts, bench.args.tokens), **more)


def check(bench: Bench, peer: peers.Peer, prompts: Sequence[Sequence[int]], found: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Whether the peer would have chosen our tokens, on a few rows."""
    regret = peer.regret(prompts[:4], found[:4])
    return {"regret": regret, "check": "ok" if regret <= TOLERANCE[bench.args.dtype] else "failed"}


def roofline(
    bench: Bench, whole: Sequence[float], first: Sequence[float], prompts: Sequence[Sequence[int]], models: int = 0
) -> float | None:
    """The share of the bandwidth roofline that a decoding step reaches; None where one token takes as long as all."""
    tokens = bench.args.tokens
    step = (statistics.median(whole) - statistics.median(first)) / (tokens - 1)
    sizes = bench.dtype.itemsize, jnp.dtype(bench.decoder.dtype).itemsize
    read = shapes.decode_bytes(bench.spec, *sizes, [len(p) + tokens / 2 for p in prompts], models, bench.lora)
    return read / bench.bandwidth / step if step > 0 else None


def answers(bench: Bench, lora: Any) -> Ours | None:
    """Adapted models that answer at once. What is kept of them are the first one's answers."""
    count = bench.args.adapters
    asked = [e.questions for e in workload.spread(workload.make_round(bench.args.seed), count)]
    owners = [i for i, own in enumerate(asked) for _ in own]
    prompts = [workload.ids(bench.args.seed, bench.spec.vocab_size, n, "answer", i) for i, n in enumerate(n for own in asked for n in own)]
    found = ours(bench, f"answers-e{count}", count, prompts, count * max(map(len, asked)), bench.until(0.6), owners, lora)
    alone = owners.count(0)
    return dataclasses.replace(found[0], prompts=prompts[:alone], outputs=found[0].outputs[:alone]) if found else None


def one_adapter(bench: Bench, peer: peers.Peer, x: Ours, adapter: Any) -> None:
    """PEFT's adapters one after another, each with its questions in one batch: one of them is timed. The peer keeps the adapter."""
    if not common.in_time("peft-generate", bench.until(0.9)):
        return
    peer.attach(bench.lora, adapter)
    more = check(bench, peer, x.prompts, x.outputs)
    cases = {"peft": functools.partial(peer.generate, x.prompts, bench.args.tokens)}
    for seconds in common.interleave(cases, bench.args.repeats, bench.until(0.97)).values():
        rate = len(x.prompts) * bench.args.tokens / statistics.median(seconds)
        bench.add("peft-generate", k=1, tokens_per_s=rate, **common.figures(seconds))
        bench.add(f"{x.case}-vs-peft", k=x.k, tokens_per_s=x.rate, peer="peft-generate", ratio=x.rate / rate, **more)


if __name__ == "__main__":
    sys.exit(main())
