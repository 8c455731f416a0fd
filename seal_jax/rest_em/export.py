"""A run's policy for other programs: merged into a Hugging Face folder, or one round's adapter as a PEFT folder."""

from __future__ import annotations

import os
import pathlib

from seal_jax import config as config_lib
from seal_jax.errors import SealError
from seal_jax.models import hf, load, peft
from seal_jax.rest_em import loop
from seal_jax.rest_em.policy import Policy
from seal_jax.runs import checkpoint
from seal_jax.runs.store import CONFIG, RunStore


def export(run_folder: str | os.PathLike[str], output: str | os.PathLike[str], form: str, number: int | None = None) -> pathlib.Path:
    """Writes the policy after round `number` (default: the last that is done) to `output`.

    "hf": the merged model with its tokenizer. "peft": the adapter of that round alone, whose base is the policy before the round.
    Raises `SealError` if there is no such round, or `output` exists and is not empty.
    """
    folder, output = pathlib.Path(run_folder), pathlib.Path(output)
    if not (folder / CONFIG).is_file():
        raise SealError(f"{folder}: no run in this folder ({CONFIG} is missing)")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise SealError(f"{output}: exists and is not an empty folder; choose another")
    store, config = RunStore(folder), config_lib.load(folder / CONFIG)
    done = loop.rounds_done(store)
    number = done if number is None else number
    if not 0 <= number <= done or (form == "peft" and number == 0):
        raise SealError(f"{folder}: no policy of round {number}; rounds done: {done}")
    model = load.load_model(config.model)
    if form == "peft":
        if not store.read(f"rounds/{number}/m_step")["pairs"]:
            raise SealError(f"{folder}: round {number} kept no self-edit, so it has no adapter")
        lora, _ = checkpoint.load_adapters(folder / "policy" / str(number))
        peft.save_adapter(output, lora, config.m_step.lora.rank, config.m_step.lora.alpha, config.model.name)
        return output
    policy = Policy(model, config)
    for before in range(1, number + 1):
        loop.restore(policy, store, before)
    hf.save_folder(output, model.spec, policy.params, model.tokenizer)
    return output
