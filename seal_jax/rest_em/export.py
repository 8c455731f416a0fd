"""A run's policy for other programs: merged into a Hugging Face folder, or as one adapter in a PEFT folder."""

from __future__ import annotations

import os

from seal_jax import config as config_lib
from seal_jax.errors import SealError
from seal_jax.models import embedded, hf, load, peft
from seal_jax.models import lora as lora_lib
from seal_jax.rest_em import loop
from seal_jax.rest_em.policy import Policy
from seal_jax.rest_em.stage import restore
from seal_jax.runs import checkpoint, files
from seal_jax.runs.places import Place, place
from seal_jax.runs.store import CONFIG, existing


def export(run_folder: str | os.PathLike[str], output: str | os.PathLike[str], form: str, number: int | None = None) -> tuple[Place, int]:
    """Writes the policy after round `number` (default: the last finished one) to `output`; returns that and the round.

    "hf": the merged model with its tokenizer. "peft": one adapter of the model that the run started from, the sum of all rounds' up to
    that one. Raises `SealError` if there is no such round, or `output` exists and is not empty.
    """
    store, output = existing(run_folder), place(output)
    folder = store.folder
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise SealError(f"{output}: exists and is not an empty folder; choose another")
    config = config_lib.load(folder / CONFIG)
    loop.refuse_evaluation(store, "export from")
    done = loop.rounds_done(store)
    if not done:
        raise SealError(f"{folder}: no round of this run is finished yet, so there is no policy to export; go on with seal-jax train")
    number = done if number is None else number
    if not 1 <= number <= done:
        raise SealError(f"{folder}: no policy of round {number}; finished rounds: 1 to {done}")
    if form == "peft":
        learnt = [n for n in range(1, number + 1) if store.read(f"rounds/{n}/m_step")["pairs"]]
        if not learnt:
            raise SealError(f"{folder}: up to round {number} no self-edit was kept, so there is no adapter")
        found = [checkpoint.load_adapters(folder / "policy" / str(n)) for n in learnt]
        rank, alpha = (sum(metadata[key] for _, metadata in found) for key in ("rank", "alpha"))
        with files.staged(output) as here:
            base = embedded.HUB_ID if config.model.name == "embedded" else config.model.name
            peft.save_adapter(here, lora_lib.concatenate([lora for lora, _ in found]), rank, alpha, base)
        return output, number
    policy = Policy(load.load_model(config.model), config)
    for before in range(1, number + 1):
        restore(policy, store, before)
    with files.staged(output) as here:
        hf.save_folder(here, policy.decoder.spec, policy.params, policy.tokenizer)
    return output, number
