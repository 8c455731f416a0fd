"""The policy and its engines: text in, text out. What stands between the tasks, which know text, and the engines, which know tokens.

A `Policy` is the model with its weights as they are after some number of rounds; `merge` makes them those after the next.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax import rng
from seal_jax.config import FitConfig, RunConfig
from seal_jax.fit.engine import FitEngine, FitJob, Fitted, Tokens, total_steps
from seal_jax.models import lora as lora_lib
from seal_jax.models.decoder import Decoder
from seal_jax.models.load import Model
from seal_jax.models.tokenizer import Tokenizer
from seal_jax.progress import bar
from seal_jax.sample import engine as sample
from seal_jax.tasks.base import Prompt, TrainingSet

Key = tuple[str | int, ...]


@functools.partial(jax.jit, donate_argnums=(0,))
def _merge(params: Any, lora: Any, scale: Any) -> Any:
    return lora_lib.merge(params, lora, scale)


_scaled = jax.jit(jax.vmap(lora_lib.scaled))


@dataclasses.dataclass(frozen=True)
class Edit:
    """A training set to fit, under the key of its random draws, and the prompts that the adapted model then answers."""

    key: Key
    training: TrainingSet
    probes: tuple[Prompt, ...]


@dataclasses.dataclass(frozen=True)
class Adapted:
    """What came of an `Edit`: an answer to each probe, and the loss in nats per token of every optimiser step."""

    outputs: tuple[str, ...]
    losses: np.ndarray


class Policy:
    """A model with the engines that `config` asks for. Holds no state but the weights, which `merge` replaces."""

    def __init__(self, model: Model, config: RunConfig):
        self.config = config
        self.tokenizer: Tokenizer = model.tokenizer
        self.params = model.params
        dtype = jax.tree.leaves(model.params)[0].dtype
        self.decoder = Decoder(model.spec, dtype, config.model.remat)
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
            if sequence.prompt:
                prompt, completion = self.tokenizer.encode(sequence.prompt), self.tokenizer.encode(sequence.completion, False)
            else:
                prompt, completion = [], self.tokenizer.encode(sequence.completion)
            ids = (prompt + completion)[: self.max_length]
            if len(ids) > max(len(prompt), 1):
                found.append(Tokens(tuple(ids), max(len(prompt), 1)))
        return tuple(found)

    # --- engines ----------------------------------------------------------------------------------------------------

    def _generate(self, requests: list[sample.Request], rows: int, lora: Any, what: str) -> list[str]:
        with bar(what, len(requests), "seq") as progress:
            done = sample.generate(
                self.decoder, self.params, requests, stop=self.tokenizer.eos_ids, rows=rows, lora=lora, progress=progress.update
            )
        return [self.tokenizer.decode(g.tokens) for g in done]

    def write(self, prompts: Sequence[Prompt], keys: Sequence[Sequence[Key]], what: str = "writing self-edits") -> list[list[str]]:
        """Self-edits: for each prompt one sample a key, drawn as `config.sample` says."""
        c = self.config.sample
        requests = []
        for prompt, candidates in zip(prompts, keys, strict=True):
            ids = tuple(self.tokenizer.encode_prompt(prompt))
            limit = min(c.max_tokens, self.max_length - len(ids))
            for key in candidates:
                words = tuple(rng.words(self.config.seed, *key, "sample").tolist())
                requests.append(sample.Request(ids, limit, c.temperature, c.top_p, c.top_k, words))
        texts = iter(self._generate(requests, c.rows, None, what))
        return [[next(texts) for _ in candidates] for candidates in keys]

    def answer(self, probes: Sequence[Sequence[Prompt]], lora: Any = None, what: str = "answering") -> list[list[str]]:
        """Greedy answers to the probes of each adapter (`lora` stacked, scale folded in), or of the bare policy."""
        requests = [
            self._question(prompt, adapter if lora is not None else 0) for adapter, prompts in enumerate(probes) for prompt in prompts
        ]
        texts = iter(self._generate(requests, self.config.answer.rows, lora, what))
        return [[next(texts) for _ in prompts] for prompts in probes]

    def _question(self, prompt: Prompt, adapter: int) -> sample.Request:
        limit = self.config.answer.max_tokens
        ids = self.tokenizer.encode_prompt(prompt)
        # A question longer than the context keeps its end, where the question stands.
        return sample.Request(tuple(ids[-(self.max_length - 1) :]), min(limit, max(1, self.max_length - len(ids))), adapter=adapter)

    def adapt(self, edits: Sequence[Edit], what: str = "") -> list[Adapted]:
        """Fits an adapter for every edit, all at once, and has each adapted model answer its probes."""
        if not edits:
            return []
        c = self.config.fit
        jobs = [FitJob(e.key, self.tokenise(e.training), self._fit_config(e.training)) for e in edits]
        engine = FitEngine(
            self.decoder, c.lora, slots=c.slots, tokens_per_step=c.tokens_per_step, batch_size=c.batch_size, lengths=tuple(c.lengths)
        )
        fitted = self._fit(engine, jobs, f"fitting{what}")
        lora = _scaled(fitted.lora, np.resize(fitted.scale, jax.tree.leaves(fitted.lora)[0].shape[0]))
        outputs = self.answer([e.probes for e in edits], lora, f"answering{what}")
        return [Adapted(tuple(o), losses) for o, losses in zip(outputs, fitted.losses, strict=True)]

    def _fit_config(self, training: TrainingSet) -> FitConfig:
        return dataclasses.replace(self.config.fit, **training.fit)

    def _fit(self, engine: FitEngine, jobs: list[FitJob], what: str) -> Fitted:
        total = sum(total_steps(job) * sum(len(s.ids) - 1 for s in job.sequences) // len(job.sequences) for job in jobs)
        with bar(what, total, "tok") as progress:
            return engine.fit(self.params, jobs, seed=self.config.seed, progress=progress.update)

    # --- the M-step -------------------------------------------------------------------------------------------------

    def tune(self, pairs: Sequence[tuple[Prompt, str]], key: Key) -> Fitted:
        """Supervised fine-tuning on (prompt, self-edit) pairs, loss on the completion and its end token, as `config.m_step` says."""
        m = self.config.m_step
        batch_size = min(m.batch_size, len(pairs))  # no microbatches of nothing but padding
        sequences = []
        for prompt, text in pairs:
            before, after = self.tokenizer.encode_completion(prompt, text)
            sequences.append(Tokens(tuple((before + after)[: self.max_length]), len(before)))
        fit = FitConfig(m.lora, m.learning_rate, m.schedule, m.warmup_steps, m.weight_decay, m.max_grad_norm, m.epochs, batch_size)
        engine = FitEngine(self.decoder, m.lora, slots=1, tokens_per_step=1, batch_size=batch_size, microbatch=m.microbatch)
        return self._fit(engine, [FitJob(key, tuple(sequences), fit)], "M-step")

    def merge(self, lora: Any, scale: float) -> None:
        """Merges an adapter (leaves without a leading axis of edits) into the weights; `scale` is its alpha / rank."""
        self.params = _merge(self.params, jax.tree.map(jnp.asarray, lora), scale)
