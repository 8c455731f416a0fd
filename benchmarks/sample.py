"""Generation: tokens a second and share of the bandwidth roofline, beside transformers' `generate` and, where it installs, vLLM.

    python -m benchmarks.sample [--model qwen2.5-7b] [--rows 1,8,32,128]

`decode-rN` decodes N questions of the workload at once with the bare model; `answers-eN` has N adapted models answer about five
questions each (`k` is the number of rows or of adapters). Every answer has 64 tokens. `tokens_per_s` is of the whole call, prefill
included; the share of the roofline is of a decoding step: the time that a step's bytes take at the measured bandwidth, over the step's
time, which is what 64 tokens take longer than one.
"""

from __future__ import annotations

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


def main(argv: Sequence[str] | None = None) -> int:
    bench = common.start(parse(argv))
    args, tokens = bench.args, bench.args.tokens
    peer, reason = peers.connect(bench)
    if peer is None:
        print(f"# no peer: {reason}")
    vllm = peers.vllm_reason(bench)
    other = peers.Vllm(bench) if vllm is None else None
    if vllm is not None:
        print(f"# vLLM not measured: {vllm}")
    rows = [int(x) for x in args.rows.split(",")]
    cases: dict[str, Callable[[], Any]] = {}
    outputs: dict[int, Any] = {}

    def keep(count: int, prompts: Sequence[Sequence[int]]) -> None:
        outputs[count] = decode(bench, prompts, tokens, count)

    for count in rows:
        prompts = questions(bench, count)
        cases[f"decode-r{count}"] = functools.partial(keep, count, prompts)
        cases[f"first-r{count}"] = functools.partial(decode, bench, prompts, 1, count)
        if peer is not None:
            cases[f"generate-r{count}"] = functools.partial(peer.generate, prompts, tokens)
        if other is not None:
            cases[f"vllm-r{count}"] = functools.partial(other.generate, prompts, tokens)
    took = common.interleave(cases, args.repeats, bench.until(0.7 if args.adapters else 0.97))
    for count in rows:
        if f"decode-r{count}" in took:
            more = check(bench, peer, questions(bench, count), outputs[count])
            report(bench, took, count, questions(bench, count), more)
    if args.adapters:
        answers(bench, peer)
    return bench.finish()


def check(bench: Bench, peer: peers.Peer | None, prompts: Sequence[Sequence[int]], found: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Whether the peer would have chosen our tokens, on a few rows."""
    if peer is None:
        return {}
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


def report(bench: Bench, took: dict[str, list[float]], count: int, prompts: Sequence[Sequence[int]], more: dict[str, Any]) -> None:
    """Our row of `count` rows at once, beside each peer's."""
    rates = {}
    for name in ("generate", "vllm"):
        if seconds := took.get(f"{name}-r{count}"):
            rates[name] = count * bench.args.tokens / statistics.median(seconds)
            case = "transformers-generate" if name == "generate" else name
            bench.add(f"{case}-r{count}", k=count, tokens_per_s=rates[name], **common.figures(seconds))
    own = took[f"decode-r{count}"]
    rate = count * bench.args.tokens / statistics.median(own)
    if "generate" in rates:
        more = {**more, "peer": "transformers-generate", "ratio": rate / rates["generate"]}
    if "vllm" in rates:
        more = {**more, "over_vllm": rate / rates["vllm"]}
    share = roofline(bench, own, took[f"first-r{count}"], prompts) if f"first-r{count}" in took else None
    bench.add(f"decode-r{count}", k=count, tokens_per_s=rate, bandwidth_share=share, **common.figures(own), **more)


def answers(bench: Bench, peer: peers.Peer | None) -> None:
    """Adapted models that answer at once; beside them, PEFT's adapters one after another, each with its questions in one batch."""
    count, tokens = bench.args.adapters, bench.args.tokens
    asked = [e.questions for e in workload.spread(workload.make_round(bench.args.seed), count)]
    owners = [i for i, own in enumerate(asked) for _ in own]
    prompts = [workload.ids(bench.args.seed, bench.spec.vocab_size, n, "answer", i) for i, n in enumerate(n for own in asked for n in own)]
    lora = adapters(bench, count)
    rows = count * max(map(len, asked))
    cases: dict[str, Callable[[], Any]] = {
        "answers": functools.partial(decode, bench, prompts, tokens, rows, owners, lora),
        "first": functools.partial(decode, bench, prompts, 1, rows, owners, lora),
    }
    alone = [p for p, owner in zip(prompts, owners, strict=True) if owner == 0]
    more: dict[str, Any] = {}
    if peer is not None:
        peer.attach(bench.lora, jax.tree.map(lambda x: x[0], lora))
        cases["peft"] = functools.partial(peer.generate, alone, tokens)
        more = check(bench, peer, alone, decode(bench, prompts, tokens, rows, owners, lora))
    took = common.interleave(cases, bench.args.repeats, bench.until(0.97))
    rate = len(prompts) * tokens / statistics.median(took["answers"])
    if "peft" in took:
        theirs = len(alone) * tokens / statistics.median(took["peft"])
        bench.add("peft-generate", k=1, tokens_per_s=theirs, **common.figures(took["peft"]))
        more |= {"peer": "peft-generate", "ratio": rate / theirs}
    share = roofline(bench, took["answers"], took["first"], prompts, count) if "first" in took else None
    bench.add(f"answers-e{count}", k=count, tokens_per_s=rate, bandwidth_share=share, **common.figures(took["answers"]), **more)


if __name__ == "__main__":
    sys.exit(main())
