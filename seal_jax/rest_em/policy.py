"""The policy and its engines: text in, text out. What stands between the tasks, which know text, and the engines, which know tokens.

A `Policy` is the model with its weights as they are after some number of rounds; `merge` makes them those after the next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from seal_jax import rng
from seal_jax.config import FitConfig, LoraConfig, RunConfig, SftConfig
from seal_jax.errors import SealError
from seal_jax.fit import likelihood, memory
from seal_jax.fit.engine import FitEngine, FitJob, Fitted, Tokens, collection, total_steps
from seal_jax.fit.plan import longest_step
from seal_jax.models import lora as lora_lib
from seal_jax.models.decoder import Decoder
from seal_jax.models.dtypes import activation_dtype
from seal_jax.models.load import Model
from seal_jax.models.tokenizer import Tokenizer
from seal_jax.parallel import chips, cost, processes
from seal_jax.parallel import mesh as mesh_lib
from seal_jax.runs import health
from seal_jax.sample import engine as sample
from seal_jax.sample.constraint import for_schema
from seal_jax.sft.engine import Saved, SftEngine, Tuned
from seal_jax.tasks.base import Prompt, TrainingSet, TrainSequence

Key = tuple[str | int, ...]


def _merge(params: Any, lora: Any, scale: float, keep: bool = False) -> Any:
    """`params` (consumed, unless to be kept) with the adapter added, where they lie."""
    where = jax.tree.map(lambda x: x.format, params)
    return jax.jit(lora_lib.merge, donate_argnums=() if keep else (0,), out_shardings=where)(params, lora, scale)


def _rounded(params: Any, weights: Any) -> Any:
    """`weights` in the dtypes of `params`, where those lie."""
    where, dtypes = (jax.tree.map(lambda x, name=name: getattr(x, name), params) for name in ("format", "dtype"))
    return jax.jit(lambda new: jax.tree.map(lambda x, dtype: x.astype(dtype), new, dtypes), out_shardings=where)(weights)


@dataclasses.dataclass(frozen=True)
class Edit:
    """A training set to fit, under the key of its random draws, and the prompts that the adapted model then answers.

    `held`: which of the held adapters it is fitted on top of, where there are any.
    """

    key: Key
    training: TrainingSet
    probes: tuple[Prompt, ...] = ()
    held: int = 0


@dataclasses.dataclass(frozen=True)
class Adapted:
    """What came of an `Edit`: an answer to each probe, the loss in nats per token of every optimiser step, and, where held texts were
    given, the bits per token that these then take."""

    outputs: tuple[str, ...]
    losses: np.ndarray
    bits: float | None = None


class Policy:
    """A model with the engines that `config` asks for, on `mesh` (default: one device). Its state: the weights, which `merge` replaces."""

    def __init__(self, model: Model, config: RunConfig, mesh: Mesh | None = None):
        self.config, self.mesh = config, mesh or mesh_lib.single()
        self.beside = 0  # bytes a device that another model is going to take
        self._settled: dict[tuple[int, int, int], tuple[memory.Way, int]] = {}
        self._peak = chips.peak(self.mesh.devices.flat)
        self.tokenizer: Tokenizer = model.tokenizer
        self.params = mesh_lib.laid_out(model.params, self.mesh)
        weights = jax.tree.leaves(model.params)[0].dtype
        # Of "auto" the M-step, a small part of a round, takes what needs less memory; fits choose by themselves.
        self.decoder = Decoder(model.spec, activation_dtype(weights), memory.remats(config.model.remat)[-1])
        self.max_length = min(config.model.max_length, model.spec.max_positions)

    # --- text -------------------------------------------------------------------------------------------------------

    def prompt_fits(self, prompt: Prompt) -> bool:
        """Whether the prompt leaves room for at least one token."""
        text = (prompt.text or "") if prompt.messages is None else self.tokenizer.render(prompt.messages)
        if len(text.encode()) + 8 < self.max_length:  # a token is a byte or more, but for a few special ones; most prompts end here
            return True
        return len(self.tokenizer.encode_prompt(prompt)) < self.max_length

    def tokenise(self, training: TrainingSet) -> tuple[Tokens, ...]:
        """A training set as tokens, each sequence cut at the model's `max_length`; those with no token to predict are left out."""
        found = []
        for sequence in training.sequences:
            prompt, completion = self._sequence(sequence)
            if len(prompt) < self.max_length and completion:  # something of the completion is left, and more than what stands before a text
                ids, start = (prompt + completion)[: self.max_length], 1 if sequence.on_prompt else max(len(prompt), 1)
                found += [Tokens(tuple(ids), start)] if len(ids) > start else []
        return tuple(found)

    def checked(self, training: TrainingSet) -> TrainingSet:
        """The training set, with a problem set if the model's tokens leave nothing to predict in it."""
        if training.problem is None and not self.tokenise(training):
            return dataclasses.replace(training, problem="no token to predict in the training sequences")
        return training

    def _sequence(self, sequence: TrainSequence) -> tuple[list[int], list[int]]:
        """(prompt ids, completion ids). What the tokenizer puts before a text comes once, before the first of the two."""
        if sequence.prompt.messages is not None:
            return self.tokenizer.encode_completion(sequence.prompt, sequence.completion)
        if sequence.prompt.text:
            return self.tokenizer.encode(sequence.prompt.text), self.tokenizer.encode(sequence.completion, False)
        return [], self.tokenizer.encode(sequence.completion)

    # --- engines ----------------------------------------------------------------------------------------------------

    def _generate(self, requests: list[sample.Request], rows: int, lora: Any, kind: str, what: str) -> list[str]:
        with health.step(kind, what, len(requests), "seq", self._peak) as step:
            options = {"stop": self.tokenizer.eos_ids, "rows": rows, "lora": lora, "mesh": self.mesh, "progress": step.update}
            done = sample.generate(self.decoder, self.params, requests, **options)
            prompts = [len(prompt) for _, prompt in dict.fromkeys((r.adapter, r.prompt) for r in requests)]  # each is read once
            written = [(len(r.prompt), len(g.tokens)) for r, g in zip(requests, done, strict=True)]
            step.flops = cost.written_flops(self.decoder.spec, None if lora is None else self.config.fit.lora, prompts, written)
        return [self.tokenizer.decode(g.tokens) for g in done]

    def write(
        self,
        prompts: Sequence[Prompt],
        keys: Sequence[Sequence[Key]],
        what: str = "writing self-edits",
        lora: Any = None,
        places: Sequence[int] | None = None,
    ) -> list[list[str]]:
        """Self-edits: for each prompt one sample a key, drawn as `config.sample` says, in the form of the prompt's schema.

        They are written by the bare policy, or for each prompt by the adapter at its place in `lora` (stacked, scale folded in).
        """
        c = self.config.sample
        requests = []
        for prompt, candidates, adapter in zip(prompts, keys, [0] * len(prompts) if places is None else places, strict=True):
            ids = tuple(self.tokenizer.encode_prompt(prompt))
            limit = min(c.max_tokens, self.max_length - len(ids))
            form = None
            if prompt.schema is not None and c.constrained:
                form = for_schema(prompt.schema, self.tokenizer.token_bytes, prompt.then_text)
            for key in candidates:
                words = tuple(rng.words(self.config.seed, *key, "sample").tolist())
                requests.append(sample.Request(ids, limit, c.temperature, c.top_p, c.top_k, words, int(adapter), form))
        texts = iter(self._generate(requests, c.rows, lora, "sample", what))
        return [[next(texts) for _ in candidates] for candidates in keys]

    def answer(
        self, probes: Sequence[Sequence[Prompt]], lora: Any = None, places: Sequence[int] | None = None, what: str = "answering"
    ) -> list[list[str]]:
        """Greedy answers to each set of probes: by the adapter at its place in `lora` (stacked, scale folded in), or the bare policy."""
        adapters = [0] * len(probes) if places is None else places
        requests = [self._question(prompt, int(a)) for a, prompts in zip(adapters, probes, strict=True) for prompt in prompts]
        texts = iter(self._generate(requests, self.config.answer.rows, lora, "answer", what))
        return [[next(texts) for _ in prompts] for prompts in probes]

    def _question(self, prompt: Prompt, adapter: int) -> sample.Request:
        limit = self.config.answer.max_tokens
        ids = self.tokenizer.encode_prompt(prompt)
        # A question longer than the context keeps its end, where the question stands.
        return sample.Request(tuple(ids[-(self.max_length - 1) :]), min(limit, max(1, self.max_length - len(ids))), adapter=adapter)

    def fit(self, edits: Sequence[Edit], what: str = "", held: Any = None) -> Fitted:
        """Fits an adapter for every edit, all at once; with `held` (stacked, scale folded in) each on top of the one that it names."""
        jobs = [FitJob(e.key, self.tokenise(e.training), self._fit_config(e.training), e.held) for e in edits]
        return self._fit(self._engine(*self._settle(jobs, held)), jobs, f"fitting{what}", held)

    def adapt(self, edits: Sequence[Edit], what: str = "", held: Any = None, texts: likelihood.Texts | None = None) -> list[Adapted]:
        """`fit`, and what each adapted model then answers to its probes; with `texts`, how likely it finds these."""
        if not edits:
            return []
        fitted = self.fit(edits, what, held)
        lora = collection(fitted, self.mesh, held)
        outputs = self.answer([e.probes for e in edits], lora, fitted.places, f"answering{what}")
        bits = [None] * len(edits) if texts is None else self.bits(texts, lora)[fitted.places].tolist()
        return [Adapted(tuple(o), losses, b) for o, losses, b in zip(outputs, fitted.losses, bits, strict=True)]

    # --- held texts -------------------------------------------------------------------------------------------------

    def texts(self, texts: Sequence[str]) -> likelihood.Texts:
        """Texts to measure likelihood on, each cut at the model's `max_length`."""
        try:
            return likelihood.texts_of([self.tokenizer.encode(text)[: self.max_length] for text in texts])
        except ValueError:
            raise SealError(f"held texts: none of the {len(texts)} has two tokens, so there is nothing to predict") from None

    def bits(self, texts: likelihood.Texts, lora: Any = None) -> np.ndarray:
        """Bits per token of the texts under each adapted model of `lora` (stacked [E, ...], scale folded in), or the bare policy: [E]."""
        return likelihood.mean_nll(self.decoder, self.params, lora, texts, self.mesh) / np.log(2)

    def divergence(self, texts: likelihood.Texts, before: Any, after: Any) -> np.ndarray:
        """Bits per token by which each model of `after` has moved from that of `before`, KL(before || after): [E]."""
        return likelihood.divergence(self.decoder, self.params, before, after, texts, self.mesh) / np.log(2)

    # --- slots and jobs ---------------------------------------------------------------------------------------------

    def _engine(self, way: memory.Way, slots: int) -> FitEngine:
        c, decoder = self.config.fit, self.decoder.clone(remat=way.remat)
        options = {"tokens_per_step": way.tokens, "batch_size": c.batch_size, "lengths": tuple(c.lengths), "mesh": self.mesh}
        return FitEngine(decoder, c.lora, slots=slots, **options)

    def _settle(self, jobs: Sequence[FitJob], held: Any) -> tuple[memory.Way, int]:
        """How the fits run, and the slots a shard: what the config leaves open is asked of the compiler, for the longest
        sequences and the most edits that come up, so that few questions serve a run and its groups share their programs."""
        c, shards = self.config.fit, mesh_lib.shards(self.mesh)
        choices = memory.ways(self.config.model.remat, c.tokens_per_step)
        if not jobs or (len(choices) == 1 and c.slots):
            return choices[-1], c.slots or 1
        longest = max(len(s.ids) - 1 for job in jobs for s in job.sequences)
        length = longest_step(longest, tuple(c.lengths), min(way.tokens for way in choices), c.batch_size)
        edits, beside = 8 * -(-max(len(jobs), self.config.largest_group) // (8 * shards)), self.beside
        if held is not None:  # each row of a step has a copy of the one that it stands on
            rows = min(edits, max(1, c.tokens_per_step // (c.lengths[0] * c.batch_size)))
            beside += int(cost.shard_bytes(held) * (1 + rows * shards / jax.tree.leaves(held)[0].shape[0]))
        asked = (length, edits, beside)
        for before, found in self._settled.items():
            if all(a >= b for a, b in zip(before, asked, strict=True)):
                return found
        engines = [self._engine(each, 1) for each in choices]
        engine, slots = memory.settle(engines, self.params, length, edits, c.slots, held=beside)
        remat, tokens, slots = processes.share([engine.decoder.remat, engine.tokens_per_step, slots])
        self._settled[asked] = memory.Way(remat, tokens), slots
        return self._settled[asked]

    def _fit_config(self, training: TrainingSet) -> FitConfig:
        return dataclasses.replace(self.config.fit, **training.fit)

    def _fit(self, engine: FitEngine, jobs: list[FitJob], what: str, held: Any = None) -> Fitted:
        total = 0
        for job in jobs:  # a last step of an epoch may be short of sequences
            tokens, trained = sum(len(s.ids) - 1 for s in job.sequences), total_steps(job) * job.config.batch_size
            total += min(job.config.epochs * tokens, trained * tokens // len(job.sequences))
        flops = self._flops_per_token([s for job in jobs for s in job.sequences], self.config.fit.lora)
        with health.step("fit", what, total, "tok", self._peak, flops) as step:
            return engine.fit(self.params, jobs, seed=self.config.seed, held=held, progress=step.update)

    def _flops_per_token(self, sequences: Sequence[Tokens], lora: LoraConfig | None) -> float:
        """Model FLOP of training an adapter, or all weights, on a token of `sequences`, in the mean."""
        lengths = [len(s.ids) - 1 for s in sequences]
        return cost.trained_flops(self.decoder.spec, lora, lengths) / max(1, sum(lengths))

    # --- the M-step -------------------------------------------------------------------------------------------------

    def tune(self, pairs: Sequence[tuple[Prompt, str]], key: Key) -> Tuned:
        """Supervised fine-tuning on (prompt, self-edit) pairs, loss on the completion and its end token, as `config.m_step` says.

        The result's `weights` are the adapter in host arrays; the policy stays as it is.
        """
        sequences = []
        for prompt, text in pairs:
            before, after = self.tokenizer.encode_completion(prompt, text)
            sequences.append(Tokens(tuple((before + after)[: self.max_length]), len(before)))
        tuned = self._sft(self.config.m_step, sequences, key, "M-step")
        return dataclasses.replace(tuned, weights=mesh_lib.fetch(tuned.weights))

    def pretrain(
        self,
        sequences: Sequence[TrainSequence],
        key: Key,
        config: SftConfig,
        what: str = "continued pretraining",
        *,
        resume: Saved | None = None,
        save: Callable[[Saved], None] | None = None,
        checkpoint_every: int | None = None,
        save_now: Callable[[], bool] | None = None,
    ) -> np.ndarray:
        """Trains the policy itself on `sequences` and returns the loss of every optimiser step, in nats per token.

        With `config.weights` "full" all weights are replaced, else an adapter is trained and merged; the arrays that were `params` before
        stay as they are. `resume`, `save`, `checkpoint_every` and `save_now` are those of `SftEngine.tune`. Raises `SealError` where no
        sequence leaves anything to predict.
        """
        tokens = self.tokenise(TrainingSet(tuple(sequences)))
        if not tokens:
            raise SealError(f"{what}: none of the {len(sequences)} sequences has a token to predict within {self.max_length} tokens")
        options = {"resume": resume, "save": save, "checkpoint_every": checkpoint_every, "save_now": save_now}
        tuned = self._sft(config, tokens, key, what, **options)
        if config.weights == "full":
            self.params = _rounded(self.params, tuned.weights)
        else:
            self.params = _merge(self.params, tuned.weights, config.lora.alpha / config.lora.rank, keep=True)
        return tuned.losses

    def _sft(self, config: SftConfig, sequences: Sequence[Tokens], key: Key, what: str, **options: Any) -> Tuned:
        total = config.epochs * sum(len(s.ids) - 1 for s in sequences)
        flops = self._flops_per_token(sequences, None if config.weights == "full" else config.lora)
        with health.step("sft", what, total, "tok", self._peak, flops) as step:
            engine = SftEngine(self.decoder, config, self.mesh)
            return engine.tune(self.params, sequences, key, seed=self.config.seed, progress=step.update, **options)

    def merge(self, lora: Any, scale: float) -> None:
        """Merges an adapter (host arrays without a leading axis of edits) into the weights; `scale` is its alpha / rank."""
        self.params = _merge(self.params, mesh_lib.put(lora, mesh_lib.everywhere(self.mesh)), scale)
