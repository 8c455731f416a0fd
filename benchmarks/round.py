"""A whole E-step of the workload, start to finish: self-edits are written, all of them fitted, and the adapted models answer.

    python -m benchmarks.round [--contexts 50 --seeds 3]

Whole edits: all 10 epochs and all 64 tokens of an answer. By default a part of the round is measured, the contexts nearest to its mean;
`round_minutes` is what 750 edits take at the measured rate. The engines are driven directly, with random tokens of the workload's
lengths, so that a model with random weights does the same work as a trained one; grading, which is the host's, is not part of it.

`round` is a line before the peer begins. The peer does the whole of an edit too, for those few whose tokens are nearest to the mean of
the part (`peft-round`). They are not quite as long as the mean, so `ratio` (of `round-vs-peft`) is ours over the peer's trained tokens a
second, all stages in the time; `edits_per_s` is there beside it.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import common, peers, workload
from benchmarks.common import Bench
from benchmarks.fit import TOLERANCE, engine, loss_gap, with_room
from benchmarks.workload import Edit
from seal_jax import rng
from seal_jax.config import LENGTHS, FitConfig
from seal_jax.fit.engine import collection
from seal_jax.parallel import cost
from seal_jax.parallel import mesh as mesh_lib
from seal_jax.sample.engine import Request, generate


def parse(argv: Sequence[str] | None) -> Any:
    p = common.parser("round", __doc__.split("\n", 1)[0])
    p.add_argument("--contexts", type=int, help="of 50 (default 1; 4 on a GPU)")
    p.add_argument("--edits", type=int, help="self-edits a context, of 5 (default 2; 5 on a GPU)")
    p.add_argument("--seeds", type=int, help="fits a self-edit, of 3 (default 1; 3 on a GPU)")
    p.add_argument("--epochs", type=int, help="of the workload's 10")
    p.add_argument("--slots", type=int, help="edits on the device at once, if its memory holds them (default 4; 64 on a GPU)")
    p.add_argument("--tokens-per-step", type=int, help="token slots a device step (default 512; on a GPU 2048)")
    p.add_argument("--rows", type=int, help="sequences decoded at once (default 16; 256 on a GPU)")
    p.add_argument("--lengths", help="padded lengths (default: the library's)")
    p.add_argument("--peer-edits", type=int, default=1, help="edits that the peer writes, fits and answers with; 0: none")
    p.set_defaults(minutes=5.0, repeats=2)
    args = p.parse_args(argv)
    common.default(args, "contexts", 1, 1, 4)
    common.default(args, "edits", 2, 2, 5)
    common.default(args, "seeds", 1, 1, 3)
    common.default(args, "epochs", 1, 10, 10)
    common.default(args, "slots", 2, 4, 64)
    common.default(args, "tokens_per_step", 768, 512, 2048)
    common.default(args, "rows", 8, 16, 256)
    common.default(args, "lengths", "384", ",".join(map(str, LENGTHS)), ",".join(map(str, LENGTHS)))
    return args


@dataclasses.dataclass
class Step:
    """One E-step on our side; `run` may be called again and again."""

    bench: Bench
    edits: Sequence[Edit]
    seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    losses: list[np.ndarray] = dataclasses.field(default_factory=list)
    padding: float = 0.0

    def __post_init__(self) -> None:
        config = FitConfig(lora=self.bench.lora, epochs=self.bench.args.epochs)
        self.jobs = [workload.job(e, self.bench.spec.vocab_size, config, self.bench.args.seed) for e in self.edits]
        self.candidates = list({(e.context, e.candidate): e for e in self.edits}.values())

    def text(self, length: int, *parts: Any) -> tuple[int, ...]:
        return workload.ids(self.bench.args.seed, self.bench.spec.vocab_size, length, *parts)

    def questions(self, edit: Edit) -> list[tuple[int, ...]]:
        return [self.text(n, edit.context, "question", i) for i, n in enumerate(edit.questions)]

    def decode(self, requests: list[Request], lora: Any = None) -> None:
        b = self.bench
        generate(b.decoder, b.params, requests, stop=(), rows=b.args.rows, lora=lora)

    def write(self) -> None:
        """Self-edits, sampled as the paper does, each as long as the workload's."""
        requests = []
        for e in self.candidates:
            words = rng.words(self.bench.args.seed, *e.key, "sample")
            requests.append(Request(self.text(e.prompt, e.context, "prompt"), e.written, 1.0, 0.95, key=(int(words[0]), int(words[1]))))
        self.decode(requests)

    def adapt(self) -> None:
        """All fits, then all answers of the adapted models."""
        b, a = self.bench, self.bench.args
        start = time.perf_counter()
        fitted = engine(b, a.slots).fit(b.params, self.jobs, seed=a.seed)
        lora = jax.block_until_ready(collection(fitted, mesh_lib.single()))
        self.seconds.setdefault("fit", []).append(time.perf_counter() - start)
        self.losses, self.padding = fitted.losses, fitted.waste.share
        places = [int(p) for p in fitted.places]
        del fitted
        asked = [(p, q) for p, e in zip(places, self.edits, strict=True) for q in self.questions(e)]
        self.timed("answer", lambda: self.decode([Request(q, workload.ANSWER_TOKENS, adapter=p) for p, q in asked], lora))

    def bare(self) -> None:
        """The unadapted model's answers, once a context."""
        contexts = {e.context: e for e in self.edits}.values()
        self.decode([Request(q, workload.ANSWER_TOKENS) for e in contexts for q in self.questions(e)])

    def timed(self, stage: str, run: Any) -> None:
        self.seconds.setdefault(stage, []).append(common.seconds(run))

    def run(self) -> None:
        self.timed("write", self.write)
        self.adapt()
        self.timed("bare", self.bare)


@dataclasses.dataclass
class PeerStep:
    """The other side for `count` edits of the mean length: transformers writes a batch a context, PEFT fits one after another, each
    answers in a batch."""

    step: Step
    peer: peers.Peer
    count: int
    write: list[float] = dataclasses.field(default_factory=list)  # seconds of all candidates of the edits' contexts
    adapt: list[float] = dataclasses.field(default_factory=list)  # seconds of the fits with their answers
    losses: list[np.ndarray] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.edits = workload.nearest(self.step.edits, self.count)
        self.places = [self.step.edits.index(e) for e in self.edits]
        self.contexts = list(dict.fromkeys(e.context for e in self.edits))
        self.jobs = [self.step.jobs[p] for p in self.places]

    def run(self) -> None:
        step = self.step

        def write() -> None:
            for context in self.contexts:
                own = [e for e in step.candidates if e.context == context]
                prompts = [step.text(e.prompt, e.context, "prompt") for e in own]
                self.peer.generate(prompts, max(e.written for e in own), sample=True)  # a batch is as long as its longest

        questions = iter([step.questions(e) for e in self.edits])

        def fit() -> None:
            answer = lambda model: self.peer.generate(next(questions), workload.ANSWER_TOKENS, model)  # noqa: E731
            self.losses = self.peer.fit(self.jobs, step.bench.args.seed, initial=True, then=answer)

        self.write.append(common.seconds(write))
        self.adapt.append(common.seconds(fit))

    def warm_up(self) -> None:
        """All it does, in the timed shapes, but a few steps and tokens of each."""
        step, context = self.step, self.contexts[0]
        self.peer.fit(self.jobs[:1], step.bench.args.seed, steps=2)
        self.peer.generate([step.text(e.prompt, e.context, "prompt") for e in step.candidates if e.context == context], 2, sample=True)
        self.peer.generate(step.questions(self.edits[0]), 2)

    def rate(self) -> float:
        """Edits a second; what is written for a context serves all its fits."""
        served = sum(e.context in self.contexts for e in self.step.edits)
        return 1 / (statistics.median(self.write) / served + statistics.median(self.adapt) / self.count)


def main(argv: Sequence[str] | None = None) -> int:
    bench = common.start(parse(argv))
    args = bench.args
    every = workload.make_round(args.seed)
    part = [e for e in workload.near_mean(every, args.contexts) if e.candidate < args.edits and e.seed < args.seeds]
    print(
        f"# {len(part)} of {len(every)} edits, {statistics.mean(sum(e.sequences) for e in part):.0f} tokens an epoch, {args.epochs} epochs"
    )
    step = Step(bench, part)
    args.slots = with_room(bench, args.slots, step.jobs)
    took: dict[str, list[float]] = {}
    with common.within_memory("round"):
        cold = common.seconds(step.run)
        step.seconds.clear()
        took = common.interleave({"round": step.run}, args.repeats, bench.until(0.7), warm=["round"])
    if "round" not in took:
        return bench.finish()
    trained = [n - 1 for e in part for n in e.sequences] * args.epochs
    figures = common.figures(took["round"])
    stages = {f"{stage}_s": statistics.median(s) for stage, s in step.seconds.items()}
    rates = {"edits_per_s": len(part) / figures["seconds"], "tokens_per_s": sum(trained) / figures["seconds"]}
    bench.add(
        "round",
        k=args.slots,
        mfu=cost.trained_flops(bench.spec, bench.lora, trained) / stages["fit_s"] / bench.flops,
        padding=step.padding,
        edits=len(part),
        cold_seconds=cold,
        round_minutes=len(every) / rates["edits_per_s"] / 60,
        **rates,
        **stages,
        **figures,
    )
    peer, reason = peers.connect(bench) if args.peer_edits else (None, "--peer-edits 0")
    if peer is None:
        print(f"# no peer: {reason}")
    else:
        with common.within_memory("peer"):
            beside(bench, PeerStep(step, peer, min(args.peer_edits, len(part))), rates)
    return bench.finish()


def beside(bench: Bench, other: PeerStep, rates: dict[str, float]) -> None:
    """The peer's row, and ours in ratio to it."""
    args = bench.args
    other.warm_up()
    for seconds in common.interleave({"peer": other.run}, args.repeats, bench.until(1.0), warm=["peer"]).values():
        slow = other.rate()
        work = statistics.mean(e.labels for e in other.edits) * args.epochs
        bench.add("peft-round", k=1, edits_per_s=slow, tokens_per_s=work * slow, edits=other.count, **common.figures(seconds))
        gap = loss_gap([other.step.losses[p] for p in other.places], other.losses)
        more = {"loss_gap": gap, "check": "ok" if gap <= TOLERANCE[args.dtype] else "failed"}
        bench.add("round-vs-peft", k=args.slots, **rates, peer="peft-round", ratio=rates["tokens_per_s"] / (work * slow), **more)


if __name__ == "__main__":
    sys.exit(main())
