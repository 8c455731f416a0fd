"""A reward that counts what an edit does to the rest: passages learnt before, and texts about no passage.

Before a round the policy is taught some passages, in one adapter: the *memory*. Each self-edit of the round is then fitted on top of it,
and the memory's passages are asked again, and held texts read. What got worse is taken off the reward, so that ReST-EM learns to write
self-edits that do not harm. The paper names forgetting as its first limit, and such a reward as a way out of it (section 5).
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from seal_jax.config import RetentionConfig, RunConfig
from seal_jax.errors import SealError
from seal_jax.fit.likelihood import Texts
from seal_jax.parallel import mesh as mesh_lib
from seal_jax.rest_em.held import Held
from seal_jax.rest_em.policy import Edit, Policy
from seal_jax.rest_em.stage import Stage
from seal_jax.runs.store import RunStore
from seal_jax.tasks.base import Context, Score, Task, TrainingSet

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Memory:
    """What edits are fitted on top of, and what the policy knows with that alone."""

    held: Any  # adapters on the mesh, the same on each shard; None: no passages were taught
    contexts: tuple[Context, ...]
    texts: Texts
    verdicts: tuple[bool | None, ...]  # on all questions of the contexts
    bits: float  # per token of the texts


def wanted(config: RetentionConfig) -> bool:
    """Whether rewards count anything besides the context's own questions."""
    return config.contexts > 0 or config.bits > 0


def check(config: RunConfig, contexts: int) -> None:
    """Raises `SealError` if so many training contexts are too few to remember some beside those of a round."""
    r = config.rest_em
    if r.retention.contexts and min(r.contexts, contexts) + r.retention.contexts > contexts:
        left = contexts - min(r.contexts, contexts)
        raise SealError(
            f"rest_em.retention.contexts={r.retention.contexts}: beside the {min(r.contexts, contexts)} contexts of a round, "
            f"task.train has only {left}"
        )


def remember(stage: Stage, store: RunStore, number: int, contexts: Sequence[Context], texts: Texts) -> Memory:
    """Teaches the policy `contexts` for round `number`, or reads back what it was taught. Their self-edits are its own, one each."""
    policy, held, unit = stage.policy, None, f"rounds/{number}/memory"
    if contexts:
        # Each shard fits the same adapter for itself, from the same draws.
        held = Held(policy, mesh_lib.shards(policy.mesh), 1)

        def taught() -> dict[str, Any]:
            told = _teach(policy, stage.task, contexts, ("round", number, "memory"), held)
            store.save(f"memory/{number}", held.saved(0, 1), {"round": number, "contexts": [c.id for c in contexts]})
            return told

        store.once(f"{unit}_edits", taught, beside=f"memory/{number}")
        held.load(store.load(f"memory/{number}")[0], 0)

    def measured() -> dict[str, Any]:
        adapters = None if held is None else held.placed()
        probes = [stage.task.probes(c) for c in contexts]
        places = [i % mesh_lib.shards(policy.mesh) for i in range(len(probes))]
        outputs = policy.answer(probes, adapters, places, "answering from memory") if probes else []
        scores = stage.task.score([(c, tuple(o)) for c, o in zip(contexts, outputs, strict=True)])
        score = Score.of([v for s in scores for v in s.verdicts])
        return {"accuracy": score.reward, "verdicts": list(score.verdicts), "bits": float(policy.bits(texts, adapters)[0])}

    known = store.once(unit, measured)
    if known["bits"] is None or not math.isfinite(known["bits"]):
        raise SealError(
            f"{unit}: the bits a token of rest_em.retention.texts are not finite under the policy and what it is to remember: a fit "
            "diverged; lower fit.learning_rate or, if it was the round before, m_step.learning_rate"
        )
    return Memory(None if held is None else held.placed(), tuple(contexts), texts, tuple(known["verdicts"]), known["bits"])


def _teach(policy: Policy, task: Task, contexts: Sequence[Context], key: tuple[str | int, ...], held: Held) -> dict[str, Any]:
    """Fits one adapter to the self-edits of all contexts and keeps it in `held`."""
    texts = policy.write([task.edit_prompt(c) for c in contexts], [[(*key, c.id)] for c in contexts], "writing about what to remember")
    sets = [policy.checked(task.training_set(c, text)) for c, [text] in zip(contexts, texts, strict=True)]
    sequences = tuple(s for data in sets if data.problem is None for s in data.sequences)
    told = [{"id": c.id, "edit": text, "problem": d.problem} for c, [text], d in zip(contexts, texts, sets, strict=True)]
    if not sequences:  # then there is nothing to remember, and the memory stays empty
        log.warning("rest_em.retention: none of the %d self-edits to remember is usable: %s", len(contexts), sets[0].problem)
        return {"contexts": told, "losses": []}
    shards = range(held.lanes)
    fitted = policy.fit([Edit(key, TrainingSet(sequences), held=i) for i in shards], " (what to remember)", held.placed())
    held.keep(0, held.fresh(fitted, shards), [1.0] * held.lanes)
    return {"contexts": told, "losses": [float(x) for x in fitted.losses[0]]}


def fall(before: Sequence[bool | None], after: Sequence[bool | None]) -> float | None:
    """By how much the share of right answers falls, over the questions that were graded both times; None if there are none of those."""
    both = [(b, a) for b, a in zip(before, after, strict=True) if b is not None and a is not None]
    return sum(b - a for b, a in both) / len(both) if both else None


def cost(config: RetentionConfig, memory: Memory, trials: Sequence[Mapping[str, Any]]) -> float | None:
    """What is taken off an edit's reward: the mean over its trials of what got worse, weighed.

    A trial without a question graded before and after tells nothing; None if none does.
    """
    found = []
    for trial in trials:
        bits = trial["retention"]["bits"]
        fallen = fall(memory.verdicts, trial["retention"]["verdicts"]) if config.weight and memory.verdicts else 0.0
        rise = max(0.0, bits - memory.bits) if math.isfinite(bits) else math.inf  # of an edit that diverged: nothing is worth that
        if fallen is not None:
            found.append(config.weight * max(0.0, fallen) + (config.bits * rise if config.bits else 0.0))
    return float(np.mean(found)) if found else None
