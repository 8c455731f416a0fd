"""The measured workload: one round of the original's knowledge experiment, as a seeded generator of lengths and random tokens.

    python -m benchmarks.workload [--compare FILE ...]

A round is 50 passages x 5 self-edits x 3 seeds = 750 fits. The figures in `FACTS` are those of the training file of the original's second
round (`iter1_train.json`) in SmolLM2's tokens; its other files have up to 17 % more tokens an epoch. The generator draws from tables of
quantiles fitted to them, with stratified draws, so that every seed meets them. `--compare` prints the same statistics of files of the
original's form beside it (a list of articles with `completions`).
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import sys
from collections.abc import Sequence

import numpy as np

from seal_jax import rng
from seal_jax.config import FitConfig
from seal_jax.fit import plan
from seal_jax.fit.engine import FitJob, Tokens

CONTEXTS, EDITS, SEEDS = 50, 5, 3
ANSWER_TOKENS = 64
# name: (value in the original's files, how far a generated round may be off)
FACTS = {
    "sequences an edit, mean": (8.3, 0.3),
    "sequences an edit, p90": (11.0, 1.0),
    "sequences an edit, max": (62.0, 1.0),
    "tokens a sequence, mean": (44.0, 1.5),
    "tokens a sequence, p50": (29.0, 1.5),
    "tokens a sequence, p90": (100.0, 8.0),
    "tokens a sequence, p99": (255.0, 15.0),
    "tokens an epoch, mean": (365.0, 15.0),
    "questions an edit, mean": (4.9, 0.1),
}
# Quantiles: (share of the draws at or below, value), linear in between. Every sequence begins with the passage's title.
SEQUENCES = ((0.0, 3.6), (0.1, 4.6), (0.25, 5.8), (0.5, 7.1), (0.75, 8.7), (0.9, 11.0), (0.95, 14.0), (0.99, 32.0), (1.0, 62.0))
LINE = ((0.0, 5.0), (0.1, 16.0), (0.25, 20.0), (0.5, 26.5), (0.75, 34.0), (0.9, 43.0), (0.99, 90.0), (1.0, 190.0))
PASSAGE = ((0.0, 33.0), (0.1, 78.0), (0.25, 100.0), (0.5, 134.0), (0.75, 172.0), (0.9, 240.0), (0.99, 335.0), (1.0, 345.0))
QUESTIONS = ((0.0, 2.6), (0.02, 3.5), (0.08, 4.5), (1.0, 5.4))
QUESTION_PROMPT = ((0.0, 26.0), (0.5, 34.0), (1.0, 48.0))  # the instruction, the title and a question
WRITING_PROMPT = 24  # tokens around the passage in the prompt for a self-edit
WRITTEN = 0.92  # tokens that the policy writes, of those that its lines have with the titles in front


@dataclasses.dataclass(frozen=True)
class Edit:
    """One fit of the round: lengths in tokens."""

    context: int
    candidate: int
    seed: int
    sequences: tuple[int, ...]  # the self-edit's lines, then the passage
    questions: tuple[int, ...]  # the prompts that the adapted model answers
    prompt: int  # the prompt that the self-edit was written to
    written: int  # the self-edit itself

    @property
    def key(self) -> tuple[str | int, ...]:
        return "workload", self.context, self.candidate, self.seed

    @property
    def labels(self) -> int:
        """Tokens an epoch that are predicted: all but each sequence's first."""
        return sum(self.sequences) - len(self.sequences)


def _draw(table: Sequence[tuple[float, float]], count: int, generator: np.random.Generator) -> np.ndarray:
    """`count` whole numbers whose quantiles are the table's: evenly spaced shares, both ends included, in random order."""
    share = generator.permutation(count) / max(count - 1, 1)
    return np.rint(np.interp(share, *zip(*table, strict=True))).astype(int)


def make_round(seed: int = 0, contexts: int = CONTEXTS, edits: int = EDITS, seeds: int = SEEDS) -> list[Edit]:
    """The edits of a round, context by context; those of a context share its passage, those of a candidate all but the seed."""
    draw = lambda table, count, what: _draw(table, count, rng.generator(seed, "workload", what))  # noqa: E731
    passages = draw(PASSAGE, contexts, "passages").tolist()
    asked = draw(QUESTIONS, contexts, "asked")
    prompts = iter(draw(QUESTION_PROMPT, int(asked.sum()), "questions").tolist())
    counts = draw(SEQUENCES, contexts * edits, "sequences") - 1
    lines = iter(draw(LINE, int(counts.sum()), "lines").tolist())
    found = []
    for context in range(contexts):
        questions = tuple(next(prompts) for _ in range(asked[context]))
        for candidate in range(edits):
            own = [next(lines) for _ in range(counts[context * edits + candidate])]
            written = max(1, round(WRITTEN * sum(own)))
            for s in range(seeds):
                sequences = (*own, passages[context])
                found.append(Edit(context, candidate, s, sequences, questions, WRITING_PROMPT + passages[context], written))
    return found


def spread(edits: Sequence[Edit], count: int) -> list[Edit]:
    """`count` edits spread evenly over all by their tokens; a longer list begins with the shorter one."""
    ordered = sorted(edits, key=lambda e: (sum(e.sequences), e.key))
    found: dict[tuple[str | int, ...], Edit] = {}
    number = 0
    while len(found) < min(count, len(ordered)):
        number += 1
        place = float(sum(int(bit) / (2 << i) for i, bit in enumerate(f"{number:b}"[::-1])))  # van der Corput: 1/2, 1/4, 3/4, 1/8, ...
        edit = ordered[int(place * len(ordered))]
        found.setdefault(edit.key, edit)
    return list(found.values())


def near_mean(edits: Sequence[Edit], contexts: int) -> list[Edit]:
    """The edits of the `contexts` contexts whose tokens an edit are nearest to the mean of all."""
    by_context: dict[int, list[Edit]] = {}
    for edit in edits:
        by_context.setdefault(edit.context, []).append(edit)
    mean = np.mean([sum(e.sequences) for e in edits])
    gap = {c: abs(np.mean([sum(e.sequences) for e in own]) - mean) for c, own in by_context.items()}
    return [e for c in sorted(sorted(gap, key=lambda c: (gap[c], c))[:contexts]) for e in by_context[c]]


def nearest(edits: Sequence[Edit], count: int) -> list[Edit]:
    """The `count` edits whose tokens are nearest to the mean of all."""
    mean = np.mean([sum(e.sequences) for e in edits])
    return sorted(edits, key=lambda e: (abs(sum(e.sequences) - mean), e.key))[:count]


def planned(
    edits: Sequence[Edit], *, slots: int, tokens_per_step: int, lengths: Sequence[int], epochs: int = 10, seed: int = 0
) -> tuple[plan.Waste, set[tuple[int, int]]]:
    """What fitting the edits wastes, and the (length, rows) of its steps, each a program to compile: as `FitEngine` plans it, reckoned
    without a device."""
    orders = [plan.epoch_orders(len(e.sequences), epochs, 1, rng.generator(seed, *e.key, "order")) for e in edits]
    real = [[e.sequences[i] - 1 for step in order for i in step] for e, order in zip(edits, orders, strict=True)]
    padded = [[plan.padded_length(n, lengths) for n in steps] for steps in real]
    waste, programs = plan.Waste(), set()
    for action in plan.Schedule(padded, slots, 1, tokens_per_step):
        if isinstance(action, plan.Step):
            waste.slots, waste.steps = waste.slots + action.length * action.rows, waste.steps + 1
            waste.tokens += sum(real[e][n] for e, n in zip(action.edits, action.numbers, strict=True))
            programs.add((action.length, action.rows))
    return waste, programs


def ids(seed: int, vocab: int, length: int, *parts: str | int) -> tuple[int, ...]:
    """Random tokens named by `parts`."""
    return tuple(rng.generator(seed, "workload", *parts).integers(0, vocab, length).tolist())


def job(edit: Edit, vocab: int, config: FitConfig, seed: int = 0) -> FitJob:
    """The fit of an edit, on random tokens: the same ones for every seed of a candidate, and the same passage for a context."""
    parts = [(edit.context, edit.candidate, i) for i in range(len(edit.sequences) - 1)] + [(edit.context, "passage")]
    texts = [Tokens(ids(seed, vocab, n, *p)) for n, p in zip(edit.sequences, parts, strict=True)]
    return FitJob(edit.key, tuple(texts), config)


def statistics(edits: Sequence[Edit]) -> dict[str, float]:
    """What `FACTS` names, of these edits."""
    counts, tokens = [len(e.sequences) for e in edits], [n for e in edits for n in e.sequences]
    return {
        "sequences an edit, mean": float(np.mean(counts)),
        "sequences an edit, p90": float(np.percentile(counts, 90)),
        "sequences an edit, max": float(max(counts)),
        "tokens a sequence, mean": float(np.mean(tokens)),
        **{f"tokens a sequence, p{q}": float(np.percentile(tokens, q)) for q in (50, 90, 99)},
        "tokens an epoch, mean": float(np.mean([sum(e.sequences) for e in edits])),
        "questions an edit, mean": float(np.mean([len(e.questions) for e in edits])),
    }


def check(found: dict[str, float]) -> list[str]:
    """The facts that `found` misses, in words."""
    return [
        f"{name}: {found[name]:.1f}, not {value:g} +- {room:g}" for name, (value, room) in FACTS.items() if abs(found[name] - value) > room
    ]


def read_original(paths: Sequence[str]) -> list[Edit]:
    """The edits in files of the original's form, counted with the embedded model's tokenizer."""
    from seal_jax.config import ModelConfig
    from seal_jax.models.load import load_model
    from seal_jax.tasks.knowledge.sequences import train_sequences

    encode = load_model(ModelConfig()).tokenizer.encode
    found = []
    for path in paths:
        with gzip.open(path, "rt", encoding="utf-8") if path.endswith(".gz") else open(path, encoding="utf-8") as file:
            data = json.load(file)
        for number, article in enumerate(data["articles"] if isinstance(data, dict) else data):
            for candidate, completion in enumerate(article["completions"]):
                own = completion if isinstance(completion, dict) else {"text": completion}
                texts = train_sequences(own["text"], article["context"], article["title"])
                asked = {q["question"] for q in own.get("questions") or article.get("questions") or []}  # one file has them once a seed
                lengths = tuple(len(encode(text)) for text in texts)
                found.append(Edit(number, candidate, 0, lengths, tuple(0 for _ in asked), 0, len(encode(own["text"]))))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a round's statistics beside the facts; exit code 1 if it misses one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.workload", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", nargs="+", default=[], metavar="FILE", help="files of the original's form, .json or .json.gz")
    args = parser.parse_args(argv)
    edits = make_round(args.seed)
    found, real = statistics(edits), statistics(read_original(args.compare)) if args.compare else {}
    print(f"{'':26}{'original':>10}{'here':>10}" + (f"{'compared':>10}" if real else ""))
    for name, (value, _) in FACTS.items():
        print(f"{name:26}{value:10.1f}{found[name]:10.1f}" + (f"{real[name]:10.1f}" if real else ""))
    print(f"{len(edits)} edits; {np.mean([e.written for e in edits]):.0f} tokens written an edit, longest {max(e.written for e in edits)}")
    for line in (missed := check(found)):
        print(f"off: {line}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
