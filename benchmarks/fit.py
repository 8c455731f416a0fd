"""The inner loop: edits a second and model FLOP utilisation by K, beside PEFT and transformers' Trainer one edit after another.

    python -m benchmarks.fit [--model qwen2.5-7b] [--k 1,4,16,64]

The edits are a sample of the workload (`benchmarks.workload`) spread over its sizes, with `--epochs` of its 10 epochs; the same first
edits for every K and for the peer. Tokens are those that a loss is taken on, so padding never counts as work done. `edits_per_s` is of
whole edits of the workload: tokens a second over the tokens of its mean edit.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import common, peers, workload
from benchmarks.common import Bench
from seal_jax.config import LENGTHS, FitConfig
from seal_jax.fit.engine import FitEngine, FitJob, Fitted, Tokens
from seal_jax.parallel import cost

# Largest distance of an edit's losses from the peer's: the mean over its steps, as a share of its mean loss. In bfloat16 each side rounds
# in its own order.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
FALL_TOLERANCE = {"float32": 1e-2, "bfloat16": 1e-1}  # the same as a share of what a short edit's loss falls by


def parse(argv: Sequence[str] | None) -> Any:
    p = common.parser("fit", __doc__.split("\n", 1)[0])
    p.add_argument("--k", help="edits on the device at once, first the one that matters most (default 32,8,1; 64,16,4,1 on a GPU)")
    p.add_argument("--edits", type=int, help="edits a repeat, at least K (default twice K, and at least 8)")
    p.add_argument("--epochs", type=int, help="of the workload's 10 (default 1; on a GPU 3)")
    p.add_argument("--tokens-per-step", type=int, help="token slots a device step (default 512; on a GPU 4096)")
    p.add_argument("--lengths", help="padded lengths (default: the library's)")
    p.add_argument("--peer-edits", type=int, default=4, help="edits that the peer fits a repeat")
    p.add_argument(
        "--padded-steps", type=int, help="steps that the peer is timed for with padding to 2048 (default 2; on a GPU 8); 0: none"
    )
    p.add_argument("--sweep", help="lengths of the sweep of tokens an adapter-step (default 16,64,256; none: no sweep)")
    args = p.parse_args(argv)
    common.default(args, "k", "2,1", "32,8,1", "64,16,4,1")
    common.default(args, "epochs", 1, 1, 3)
    common.default(args, "tokens_per_step", 768, 512, 4096)
    common.default(args, "padded_steps", 1, 2, 8)
    common.default(args, "sweep", "16", "16,64,256", "16,64,256,1024")
    common.default(args, "lengths", "384", ",".join(map(str, LENGTHS)), ",".join(map(str, LENGTHS)))
    args.peer_edits = 2 if args.tiny else args.peer_edits
    return args


def numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",") if x and text != "none"]


def engine(bench: Bench, slots: int) -> FitEngine:
    a = bench.args
    return FitEngine(bench.decoder, bench.lora, slots=slots, tokens_per_step=a.tokens_per_step, lengths=tuple(numbers(a.lengths)))


def fit(bench: Bench, slots: int, jobs: Sequence[FitJob]) -> Fitted:
    """Fits, and waits until all of it is done."""
    fitted = engine(bench, slots).fit(bench.params, jobs, seed=bench.args.seed)
    jax.block_until_ready(fitted.lora)
    return fitted


def labels(jobs: Sequence[FitJob]) -> list[int]:
    """Tokens with a loss, of every sequence that the jobs train on."""
    return [len(sequence.ids) - 1 for job in jobs for _ in range(job.config.epochs) for sequence in job.sequences]


def loss_gap(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """The largest over edits of the mean distance of the losses, as a share of the edit's mean loss."""
    return max(float(np.mean(np.abs(a[: len(b)] - b)) / np.mean(b)) for a, b in zip(ours, theirs, strict=True))


def learning(bench: Bench, peer: peers.Peer, slots: int, neighbours: Sequence[FitJob]) -> dict[str, float]:
    """How far the peer's loss falls over ten epochs of one short edit, and the mean distance of ours as a share of that.

    Random tokens seen once teach nothing, so that the timed edits' losses are close whether or not the sides learn alike; these are not.
    Ours is fitted among `neighbours`, which must not matter.
    """
    texts = tuple(Tokens(workload.ids(bench.args.seed, bench.spec.vocab_size, 20, "learning", i)) for i in range(4))
    job = FitJob(("learning",), texts, FitConfig(lora=bench.lora, learning_rate=3e-2 if bench.args.tiny else 1e-3))
    (theirs,) = peer.fit([job], bench.args.seed, initial=True)
    ours = fit(bench, slots, [job, *neighbours]).losses[0]
    fall = float(np.mean(theirs[:4]) - np.mean(theirs[-4:]))
    return {"fall": fall, "fall_gap": float(np.mean(np.abs(ours - theirs))) / max(abs(fall), 1e-9)}


def main(argv: Sequence[str] | None = None) -> int:
    bench = common.start(parse(argv))
    args = bench.args
    config = FitConfig(lora=bench.lora, epochs=args.epochs)
    edits = workload.make_round(args.seed)
    whole = 10 * statistics.mean(e.labels for e in edits)
    ks = numbers(args.k)
    count = {k: max(k, args.edits or (3 if args.tiny else max(8, 2 * k))) for k in ks}
    chosen = workload.spread(edits, max(count.values()))
    jobs = [workload.job(e, bench.spec.vocab_size, config, args.seed) for e in chosen]
    peer, reason = peers.connect(bench)
    own = jobs[: args.peer_edits]
    learnt: dict[str, float] = {}
    if peer is None:
        print(f"# no peer: {reason}")
        theirs: list[np.ndarray] = []
    else:
        theirs = peer.fit(own, args.seed, initial=True)  # the check, and the peer's warm-up
        learnt = learning(bench, peer, ks[0], own[: ks[0] - 1])
        peers.release()

    last: dict[int, Fitted] = {}

    def run(k: int) -> None:
        last[k] = fit(bench, k, jobs[: count[k]])
        last[k] = dataclasses.replace(last[k], lora=None)  # the adapters would fill the device

    cases: dict[str, Callable[[], Any]] = {}
    for place, k in enumerate(ks):
        cases[f"fit k={k}"] = functools.partial(run, k)
        if place == 0 and peer is not None:
            cases["peft dynamic"] = functools.partial(peer.fit, own, args.seed)
    took = common.interleave(cases, args.repeats, bench.until(0.7), warm=["peft dynamic"])
    flops = functools.partial(cost.trained_flops, bench.spec, bench.lora)

    def row(case: str, trained: Sequence[int], seconds: Sequence[float], **more: Any) -> float:
        rate = sum(trained) / statistics.median(seconds)
        used = flops(trained) / statistics.median(seconds) / bench.flops
        bench.add(case, tokens_per_s=rate, edits_per_s=rate / whole, mfu=used, **common.figures(seconds), **more)
        return rate

    rate = None
    if "peft dynamic" in took:
        more = {"edits": len(own), "epochs": args.epochs, "loss": float(np.mean(np.concatenate(theirs)))}
        rate = row("peft-dynamic", labels(own), took["peft dynamic"], k=1, **more)
    best = (0.0, 0)
    for k in ks:
        if f"fit k={k}" not in took:
            continue
        trained = labels(jobs[: count[k]])
        seconds = took[f"fit k={k}"]
        more = {"edits": count[k], "epochs": args.epochs, "padding": last[k].waste.share}
        if rate is not None:
            gap = loss_gap(last[k].losses[: len(own)], theirs)
            good = gap <= TOLERANCE[args.dtype] and (k != ks[0] or learnt["fall_gap"] <= FALL_TOLERANCE[args.dtype])
            more |= {"peer": "peft-dynamic", "ratio": sum(trained) / statistics.median(seconds) / rate, "loss_gap": gap}
            more |= {**(learnt if k == ks[0] else {}), "check": "ok" if good else "failed"}
        best = max(best, (row(f"fit-k{k}", trained, seconds, k=k, **more), k))
    if peer is not None and args.padded_steps:
        padded(bench, peer, own, best[0], row)
    peers.release()
    sweep(bench, peer, config, ks, row)
    return bench.finish()


def padded(bench: Bench, peer: peers.Peer, jobs: Sequence[FitJob], ours: float, row: Callable[..., float]) -> None:
    """The original's way, every sequence padded to 2048 and trained on: a few steps are timed."""
    steps = bench.args.padded_steps
    peer.fit(jobs[:1], bench.args.seed, padded=True, steps=1)
    took = [common.seconds(lambda: peer.fit(jobs[:1], bench.args.seed, padded=True, steps=steps)) for _ in range(1 if bench.on_cpu else 3)]
    # A step trains one sequence whatever its length: of the workload's mean one, not of those few that happened to be timed.
    each = statistics.mean(n - 1 for e in workload.make_round(bench.args.seed) for n in e.sequences)
    rate = row("peft-padded-2048", [round(each)] * steps, took, k=1, steps_timed=steps)
    bench.add("fit-best-vs-padded", tokens_per_s=ours, peer="peft-padded-2048", ratio=ours / rate)


def sweep(bench: Bench, peer: peers.Peer | None, config: FitConfig, ks: Sequence[int], row: Callable[..., float]) -> None:
    """Speed-up against tokens an adapter-step: K edits at once beside one alone and beside the peer, all sequences of one length."""
    args = bench.args
    k = min(max(ks), 4 if bench.on_cpu else 64)
    for length in numbers(args.sweep):
        if time.monotonic() > bench.until(0.9):
            print(f"left out, no time: sweep of {length} tokens", file=sys.stderr)
            continue
        each = max(1, args.tokens_per_step * (1 if bench.on_cpu else 8) // (k * length))
        once = dataclasses.replace(config, epochs=1)
        made = [
            FitJob(
                ("sweep", length, e),
                tuple(Tokens(workload.ids(args.seed, bench.spec.vocab_size, length + 1, "sweep", length, e, i)) for i in range(each)),
                once,
            )
            for e in range(k)
        ]
        few = made[: 1 if not bench.on_cpu else k]
        cases: dict[str, Callable[[], Any]] = {
            f"k={k}": functools.partial(fit, bench, k, made),
            "k=1": functools.partial(fit, bench, 1, few),
        }
        if peer is not None:
            cases["peft"] = functools.partial(peer.fit, few, args.seed)
        took = common.interleave(cases, min(args.repeats, 2), bench.until(0.97))
        ours = sum(labels(made)) / statistics.median(took[f"k={k}"])
        ratio = {name: ours * statistics.median(took[name]) / sum(labels(few)) for name in ("k=1", "peft") if name in took}
        against = {"peer": "peft-dynamic", "ratio": ratio["peft"]} if "peft" in ratio else {}
        row(f"fit-length-{length}", labels(made), took[f"k={k}"], k=k, length=length, over_k1=ratio.get("k=1"), **against)


if __name__ == "__main__":
    sys.exit(main())
