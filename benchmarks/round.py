"""A whole E-step of the workload, start to finish: self-edits are written, all of them fitted, and the adapted models answer.

    python -m benchmarks.round [--contexts 50 --seeds 3]

Whole edits: all 10 epochs and all 64 tokens of an answer. By default a part of the round is measured, the contexts nearest to its mean;
`round_minutes` is what 750 edits take at the measured rate. The engines are driven directly, with random tokens of the workload's
lengths, so that a model with random weights does the same work as a trained one; grading, which is the host's, is not part of it.
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
from benchmarks.fit import TOLERANCE, loss_gap
from benchmarks.workload import Edit
from seal_jax import rng
from seal_jax.config import LENGTHS, FitConfig
from seal_jax.fit.engine import FitEngine
from seal_jax.models import lora as lora_lib
from seal_jax.parallel import cost
from seal_jax.sample.engine import Request, generate

_scaled = jax.jit(jax.vmap(lora_lib.scaled))


def parse(argv: Sequence[str] | None) -> Any:
    p = common.parser("round", __doc__.split("\n", 1)[0])
    p.add_argument("--contexts", type=int, help="of 50 (default 1; 4 on a GPU)")
    p.add_argument("--edits", type=int, help="self-edits a context, of 5 (default 2; 5 on a GPU)")
    p.add_argument("--seeds", type=int, help="fits a self-edit, of 3 (default 1; 3 on a GPU)")
    p.add_argument("--epochs", type=int, help="of the workload's 10")
    p.add_argument("--slots", type=int, help="edits on the device at once (default 4; 64 on a GPU)")
    p.add_argument("--tokens-per-step", type=int, help="token slots a device step (default 512; on a GPU 4096)")
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
    common.default(args, "tokens_per_step", 768, 512, 4096)
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
        lengths = tuple(int(x) for x in a.lengths.split(","))
        engine = FitEngine(b.decoder, b.lora, slots=a.slots, tokens_per_step=a.tokens_per_step, lengths=lengths)
        start = time.perf_counter()
        fitted = engine.fit(b.params, self.jobs, seed=a.seed)
        lora = jax.block_until_ready(_scaled(fitted.lora, fitted.scale))
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
    """The other side for the first `count` edits: transformers writes a batch, PEFT fits one after another, each answers in a batch."""

    step: Step
    peer: peers.Peer
    count: int
    write: list[float] = dataclasses.field(default_factory=list)  # seconds of all candidates of a context
    adapt: list[float] = dataclasses.field(default_factory=list)  # seconds of `count` fits with their answers
    losses: list[np.ndarray] = dataclasses.field(default_factory=list)

    def run(self) -> None:
        step, edits = self.step, self.step.edits[: self.count]
        own = [e for e in step.candidates if e.context == edits[0].context]
        prompts = [step.text(e.prompt, e.context, "prompt") for e in own]
        # A batch is as long as its longest.
        self.write.append(common.seconds(lambda: self.peer.generate(prompts, max(e.written for e in own), sample=True)))
        questions = iter([step.questions(e) for e in edits])

        def fit() -> None:
            answer = lambda model: self.peer.generate(next(questions), workload.ANSWER_TOKENS, model)  # noqa: E731
            self.losses = self.peer.fit(step.jobs[: self.count], step.bench.args.seed, initial=True, then=answer)

        self.adapt.append(common.seconds(fit))

    def rate(self) -> float:
        """Edits a second; what is written for a context serves all its fits."""
        served = sum(e.context == self.step.edits[0].context for e in self.step.edits)
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
    peer, reason = peers.connect(bench) if args.peer_edits else (None, "--peer-edits 0")
    cold = common.seconds(step.run)
    step.seconds.clear()
    cases: dict[str, Any] = {"round": step.run}
    if peer is None:
        print(f"# no peer: {reason}")
    else:
        other = PeerStep(step, peer, min(args.peer_edits, len(part)))
        peer.fit(step.jobs[:1], args.seed, steps=2)
        cases["peer"] = other.run
    took = common.interleave(cases, args.repeats, bench.until(1.0), warm=list(cases))
    trained = [n - 1 for e in part for n in e.sequences] * args.epochs
    figures = common.figures(took["round"])
    stages = {f"{stage}_s": statistics.median(s) for stage, s in step.seconds.items()}
    rate = len(part) / figures["seconds"]
    more: dict[str, Any] = {}
    if "peer" in took:
        slow = other.rate()
        work = statistics.mean(e.labels for e in part[: other.count]) * args.epochs
        bench.add("peft-round", k=1, edits_per_s=slow, tokens_per_s=work * slow, edits=other.count, **common.figures(took["peer"]))
        gap = loss_gap(step.losses[: other.count], other.losses)
        more = {"peer": "peft-round", "ratio": rate / slow, "loss_gap": gap, "check": "ok" if gap <= TOLERANCE[args.dtype] else "failed"}
    bench.add(
        "round",
        k=args.slots,
        edits_per_s=rate,
        tokens_per_s=sum(trained) / figures["seconds"],
        mfu=cost.trained_flops(bench.spec, bench.lora, trained) / stages["fit_s"] / bench.flops,
        padding=step.padding,
        edits=len(part),
        cold_seconds=cold,
        round_minutes=len(every) / rate / 60,
        **stages,
        **figures,
        **more,
    )
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
