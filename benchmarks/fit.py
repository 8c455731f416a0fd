"""The inner loop: edits a second and model FLOP utilisation by K, beside PEFT and transformers' Trainer one edit after another.

    python -m benchmarks.fit [--model qwen2.5-7b] [--k 1,4,16,64]

The edits are a sample of the workload (`benchmarks.workload`) spread over its sizes, with `--epochs` of its 10 epochs; the same first
edits for every K and for the peer. Tokens are those that a loss is taken on, so padding never counts as work done. `edits_per_s` is of
whole edits of the workload: tokens a second over the tokens of its mean edit; `ratio` is ours over the peer's tokens a second. What the
peer does for an edit besides its steps is counted once a whole edit of 10 epochs, however few of its steps are timed.

Each case is a line as soon as it has been timed: `fit-kK` by K, then `peft-dynamic`, then `fit-kK-vs-peft`, which has the ratio and the
check, and what else there is time for. A case that the device has no room for is left out, and said so; of K no more edits are
on the device at once than its memory holds.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import common, peers, workload
from benchmarks.common import Bench
from seal_jax.config import LENGTHS, FitConfig
from seal_jax.errors import SealError
from seal_jax.fit import memory, plan
from seal_jax.fit.engine import FitEngine, FitJob, Fitted, Tokens, total_steps
from seal_jax.parallel import cost

# Largest distance of an edit's losses from the peer's: the mean over its steps, as a share of its mean loss. In bfloat16 each side rounds
# in its own order.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
LONG = 10  # times as many steps as are timed, of the edits by which a length of sequences is compared
FALL_TOLERANCE = {"float32": 1e-2, "bfloat16": 1e-1}  # the same as a share of what a short edit's loss falls by


def parse(argv: Sequence[str] | None) -> Any:
    p = common.parser("fit", __doc__.split("\n", 1)[0])
    p.add_argument("--k", help="edits on the device at once, first the one that matters most (default 32,8,1; 64,16,4,1 on a GPU)")
    p.add_argument("--edits", type=int, help="edits a repeat, at least K (default K, and at least 8)")
    p.add_argument("--epochs", type=int, help="of the workload's 10 (default 1; on a GPU 3)")
    p.add_argument("--tokens-per-step", type=int, help="token slots a device step (default 512; on a GPU 2048)")
    p.add_argument("--lengths", help="padded lengths (default: the library's)")
    p.add_argument("--peer-edits", type=int, default=4, help="edits that the peer fits a repeat")
    p.add_argument(
        "--padded-steps", type=int, help="steps that the peer is timed for with padding to 2048 (default 3; on a GPU 8); 0: none"
    )
    p.add_argument("--sweep", help="lengths of the sweep of tokens an adapter-step (default 16,64,256; none: no sweep)")
    args = p.parse_args(argv)
    common.default(args, "k", "2,1", "32,8,1", "64,16,4,1")
    common.default(args, "epochs", 1, 1, 3)
    common.default(args, "tokens_per_step", 768, 512, 2048)
    common.default(args, "padded_steps", 1, 3, 8)
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


def whole_edits(seconds: float, first: float, edits: int, steps: int, whole: int) -> float:
    """The seconds of some of the peer's edits with `whole` steps in all, from those with `steps` in all and with one each (`first`).

    An adapter put on and taken off, and a Trainer made, weigh more in a few steps than in a whole edit.
    """
    if steps <= edits:
        return seconds * whole / steps
    return first + (whole - edits) * max(0.0, seconds - first) / (steps - edits)


def with_room(bench: Bench, slots: int, jobs: Sequence[FitJob]) -> int:
    """`slots`, or as many as the device has room for beside the adapters that come of `jobs`, said in a line.

    The compiler is asked for the largest programs with `slots`, and for others only where those are too large. A CPU is not asked: its
    memory is plenty and its compiler slow.
    """
    if bench.on_cpu:
        return slots
    asked = engine(bench, slots)
    length = max(plan.padded_length(len(s.ids) - 1, asked.lengths) for job in jobs for s in job.sequences)
    try:
        found = memory.slots_that_fit(asked, bench.params, length, max(slots, len(jobs)), most=slots)
    except SealError as error:
        print(f"# {slots} slots, as asked for: {error}")
        return slots
    if found < slots:
        print(f"# {found} slots, not {slots}: no more fit into the device's memory")
    return found


def count(args: Any, k: int) -> int:
    """The edits that are fitted where K are on the device at once."""
    return max(k, args.edits or (3 if args.tiny else 8))


def learning(bench: Bench, peer: peers.Peer, k: int, neighbours: Sequence[FitJob]) -> None:
    """A check: how far the peer's loss falls over ten epochs of one short edit, and the mean distance of ours as a share of that.

    Random tokens seen once teach nothing, so that the timed edits' losses are close whether or not the sides learn alike; these are not.
    Ours is fitted among `neighbours`, which must not matter: as many as make the programs those that were compiled before.
    """
    texts = tuple(Tokens(workload.ids(bench.args.seed, bench.spec.vocab_size, 20, "learning", i)) for i in range(4))
    job = FitJob(("learning",), texts, FitConfig(lora=bench.lora, learning_rate=3e-2 if bench.args.tiny else 1e-3))
    (theirs,) = peer.fit([job], bench.args.seed, initial=True)
    peers.release()
    ours = fit(bench, k, [job, *neighbours]).losses[0]
    fall = float(np.mean(theirs[:4]) - np.mean(theirs[-4:]))
    gap = float(np.mean(np.abs(ours - theirs))) / max(abs(fall), 1e-9)
    bench.add("learning", k=k, fall=fall, fall_gap=gap, check="ok" if gap <= FALL_TOLERANCE[bench.args.dtype] else "failed")


@dataclasses.dataclass(frozen=True)
class Ours:
    """What was measured with K edits at once."""

    k: int
    rate: float  # tokens a second
    losses: Sequence[np.ndarray]  # by edit


def main(argv: Sequence[str] | None = None) -> int:
    bench = common.start(parse(argv))
    args = bench.args
    config = FitConfig(lora=bench.lora, epochs=args.epochs)
    edits = workload.make_round(args.seed)
    whole = 10 * statistics.mean(e.labels for e in edits)
    ks = numbers(args.k)
    chosen = workload.spread(edits, max(count(args, k) for k in ks))
    jobs = [workload.job(e, bench.spec.vocab_size, config, args.seed) for e in chosen]
    flops = functools.partial(cost.trained_flops, bench.spec, bench.lora)

    def row(case: str, trained: Sequence[int], seconds: Sequence[float], **more: Any) -> float:
        rate = sum(trained) / statistics.median(seconds)
        used = flops(trained) / statistics.median(seconds) / bench.flops
        bench.add(case, tokens_per_s=rate, edits_per_s=rate / whole, mfu=used, **common.figures(seconds), **more)
        return rate

    ours: list[Ours] = []
    for place, k in enumerate(ks):
        if place and not common.in_time(f"fit k={k}", bench.until(0.6)):
            continue
        k = with_room(bench, k, jobs[: count(args, k)])
        own, last = jobs[: count(args, k)], []

        def run(k: int = k, own: Sequence[FitJob] = own, last: list[Fitted] = last) -> None:
            last[:] = [dataclasses.replace(fit(bench, k, own), lora=None)]  # the adapters would fill the device

        # The first K is what matters most; the others, and the peer, shall have their part of the time too.
        took = common.interleave({f"fit k={k}": run}, args.repeats, bench.until(0.45 + 0.15 * place / len(ks)))
        for seconds in took.values():
            waste = last[0].waste
            rate = row(f"fit-k{k}", labels(own), seconds, k=k, edits=len(own), epochs=args.epochs, padding=waste.share, steps=waste.steps)
            ours.append(Ours(k, rate, last[0].losses))
    peer, reason = peers.connect(bench)
    if peer is None:
        print(f"# no peer: {reason}")
    else:
        beside(bench, peer, jobs, ours, row)
    peers.release()
    if ours:
        sweep(bench, peer, config, max(x.k for x in ours), row)
    return bench.finish()


def beside(bench: Bench, peer: peers.Peer, jobs: Sequence[FitJob], ours: Sequence[Ours], row: Callable[..., float]) -> None:
    """The peer on the first edits, ours in ratio to it, and the checks."""
    args = bench.args
    own = jobs[: min([args.peer_edits, *(len(x.losses) for x in ours)])]
    theirs: list[np.ndarray] = []
    took: dict[str, list[float]] = {}
    with common.within_memory("peft dynamic"):
        theirs = peer.fit(own, args.seed, initial=True)  # the check, and the peer's warm-up
        cases = {
            "peft dynamic": functools.partial(peer.fit, own, args.seed),
            "peft one step": functools.partial(peer.fit, own, args.seed, steps=1),
        }
        took = common.interleave(cases, args.repeats, bench.until(0.75), warm=list(cases))
    if "peft dynamic" in took:
        loss = float(np.mean(np.concatenate(theirs)))
        whole = [dataclasses.replace(job, config=dataclasses.replace(job.config, epochs=10)) for job in own]
        first = statistics.median(took.get("peft one step", [0.0]))
        steps = [sum(map(total_steps, jobs)) for jobs in (own, whole)]
        seconds = [whole_edits(s, first, len(own), *steps) for s in took["peft dynamic"]]
        rate = row("peft-dynamic", labels(whole), seconds, k=1, edits=len(own), epochs_timed=args.epochs, loss=loss)
        for x in ours:
            gap = loss_gap(x.losses[: len(own)], theirs)
            more = {"loss_gap": gap, "check": "ok" if gap <= TOLERANCE[args.dtype] else "failed"}
            bench.add(f"fit-k{x.k}-vs-peft", k=x.k, tokens_per_s=x.rate, peer="peft-dynamic", ratio=x.rate / rate, **more)
    if ours and common.in_time("learning", bench.until(0.9)):
        with common.within_memory("learning"):
            learning(bench, peer, ours[0].k, jobs[: count(args, ours[0].k) - 1])
    if ours and args.padded_steps and common.in_time("peft padded to 2048", bench.until(0.9)):
        with common.within_memory("peft padded to 2048"):
            padded(bench, peer, own, max(x.rate for x in ours), row)


def padded(bench: Bench, peer: peers.Peer, jobs: Sequence[FitJob], ours: float, row: Callable[..., float]) -> None:
    """The original's way, every sequence padded to 2048 and trained on: a few steps are timed."""
    steps, repeats = bench.args.padded_steps, 1 if bench.on_cpu else 3

    def timed(steps: int) -> list[float]:
        return [common.seconds(lambda: peer.fit(jobs[:1], bench.args.seed, padded=True, steps=steps)) for _ in range(repeats)]

    if not bench.on_cpu:
        timed(1)
    first, took = statistics.median(timed(1)), timed(steps)
    # A step trains one sequence whatever its length: of the workload's mean one, not of those few that happened to be timed.
    edits = workload.make_round(bench.args.seed)
    each, whole = statistics.mean(n - 1 for e in edits for n in e.sequences), round(10 * statistics.mean(len(e.sequences) for e in edits))
    seconds = [whole_edits(s, first, 1, steps, whole) for s in took]
    rate = row("peft-padded-2048", [round(each)] * whole, seconds, k=1, steps_timed=steps)
    bench.add("fit-best-vs-padded", tokens_per_s=ours, peer="peft-padded-2048", ratio=ours / rate)


def sweep(bench: Bench, peer: peers.Peer | None, config: FitConfig, most: int, row: Callable[..., float]) -> None:
    """Speed-up against tokens an adapter-step: K edits at once beside one alone and beside the peer, all sequences of one length."""
    args = bench.args
    k = min(most, 4 if bench.on_cpu else 64)
    for length in numbers(args.sweep):
        if not common.in_time(f"sweep of {length} tokens", bench.until(0.9)):
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
            cases |= {
                "peft": functools.partial(peer.fit, few, args.seed),
                "peft one step": functools.partial(peer.fit, few, args.seed, steps=1),
            }
        took = common.interleave(cases, min(args.repeats, 2), bench.until(0.97))
        if f"k={k}" not in took:
            continue
        ours = sum(labels(made)) / statistics.median(took[f"k={k}"])
        median = {name: statistics.median(s) for name, s in took.items()}
        if "peft" in took:  # its steps alone, as those of a long edit
            own = len(few) * each
            median["peft"] = whole_edits(median["peft"], median.get("peft one step", 0.0), len(few), own, LONG * own) / LONG
        ratio = {name: ours * median[name] / sum(labels(few)) for name in ("k=1", "peft") if name in took}
        against = {"peer": "peft-dynamic", "ratio": ratio["peft"]} if "peft" in ratio else {}
        row(f"fit-length-{length}", labels(made), took[f"k={k}"], k=k, length=length, over_k1=ratio.get("k=1"), **against)


if __name__ == "__main__":
    sys.exit(main())
