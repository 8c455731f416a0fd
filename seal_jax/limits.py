"""What values a config may have, beyond their types: one of some, at least so much, a share."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from seal_jax.errors import SealError

if TYPE_CHECKING:
    from seal_jax.config import MethodConfig, RunConfig

CHOICES = {
    "model.dtype": ("auto", "float32", "bfloat16"),
    "model.remat": ("auto", "none", "dots", "full"),
    "fit.schedule": ("constant", "linear", "cosine"),
    "m_step.weights": ("lora",),  # a round's checkpoint is its adapter
    "continual.writer": ("adapted", "base"),
    "pretraining.sft.weights": ("lora", "full"),
    "pretraining.sft.schedule": ("constant", "linear", "cosine"),
    "m_step.schedule": ("constant", "linear", "cosine"),
    "rest_em.select": ("best", "top", "gain", "right"),
    "executor.name": ("local", "ray"),
    "grade.name": ("match", "judge", "endpoint"),
}
GATES = ("none", "answers", "bits", "kl")
AT_LEAST = {
    "model.max_length": 16,
    "fit.lora.rank": 1,
    "fit.learning_rate": 0.0,
    "fit.epochs": 1,
    "fit.batch_size": 1,
    "fit.tokens_per_step": 16,
    "fit.warmup_steps": 0,
    "fit.weight_decay": 0.0,
    "fit.stop.loss": 0.0,
    "fit.stop.gain": 0.0,
    "fit.stop.patience": 1,
    "fit.anchor": 0.0,
    "fit.orthogonal": 0.0,
    "fit.max_grad_norm": 0.0,
    "m_step.lora.rank": 1,
    "m_step.learning_rate": 0.0,
    "m_step.warmup_steps": 0,
    "m_step.weight_decay": 0.0,
    "m_step.max_grad_norm": 0.0,
    "m_step.epochs": 1,
    "m_step.batch_size": 1,
    "m_step.microbatch": 1,
    "sample.temperature": 0.0,
    "sample.top_k": 0,
    "sample.max_tokens": 1,
    "sample.rows": 1,
    "answer.max_tokens": 1,
    "answer.rows": 1,
    "rest_em.rounds": 0,
    "rest_em.contexts": 1,
    "rest_em.edits": 1,
    "rest_em.seeds": 1,
    "rest_em.keep": 1,
    "rest_em.group": 1,
    "rest_em.retention.contexts": 0,
    "rest_em.retention.weight": 0.0,
    "rest_em.retention.bits": 0.0,
    "mesh.fsdp": 1,
    "mesh.tensor": 1,
    "evaluate.contexts": 1,
    "evaluate.edits": 1,
    "evaluate.seeds": 1,
    "evaluate.resamples": 1,
    "evaluate.group": 1,
    "continual.sequences": 1,
    "continual.passages": 2,
    "pretraining.edits": 1,
    "pretraining.group": 1,
    "pretraining.sft.lora.rank": 1,
    "pretraining.sft.learning_rate": 0.0,
    "pretraining.sft.epochs": 1,
    "pretraining.sft.warmup_steps": 0,
    "pretraining.sft.weight_decay": 0.0,
    "pretraining.sft.max_grad_norm": 0.0,
    "pretraining.sft.batch_size": 1,
    "pretraining.sft.microbatch": 1,
    "executor.workers": 1,
    "executor.hosts": 1,
    "executor.cpus": 0.0,
    "executor.gpus": 0.0,
    "executor.tpus": 0.0,
    "executor.retries": 0,
    "grade.concurrency": 1,
    "grade.retries": 0,
    "grade.patience": 0,
    "seed": 0,
}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _value(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def check(config: RunConfig, where: str) -> None:
    """Raises `SealError`, which begins with `where`, for the first value that no run can have."""
    for key, choices in CHOICES.items():
        if (value := _value(config, key)) not in choices:
            raise SealError(f"{where}: {key}={value!r}: expected one of {', '.join(choices)}")
    for key, least in AT_LEAST.items():
        if not least <= (value := _value(config, key)) < math.inf:
            raise SealError(f"{where}: {key}={value}: expected at least {least}" + (", and finite" if value == math.inf else ""))
    for key in ("sample.top_p", "grade.threshold"):
        if not 0.0 < (value := _value(config, key)) <= 1.0:
            raise SealError(f"{where}: {key}={value}: expected a number above 0 and at most 1")
    for key in ("fit.lora.alpha", "m_step.lora.alpha", "pretraining.sft.lora.alpha"):
        if not 0.0 < (value := _value(config, key)) < math.inf:
            raise SealError(f"{where}: {key}={value}: expected a finite number above 0")
    if config.fit.max_steps is not None and config.fit.max_steps < 1:
        raise SealError(f"{where}: fit.max_steps={config.fit.max_steps}: expected at least 1, or null for no bound")
    if config.executor.timeout is not None and not config.executor.timeout > 0:
        raise SealError(f"{where}: executor.timeout={config.executor.timeout}: expected a number of seconds above 0, or null for never")
    if config.executor.name == "ray" and not (
        config.executor.cpus or config.executor.gpus or config.executor.tpus or config.executor.slice
    ):
        raise SealError(f"{where}: executor.cpus=0: a worker needs something of a machine: cpus, gpus, tpus or a slice")
    if config.executor.name == "ray" and config.track.profile is not None:
        raise SealError(f"{where}: track.profile={config.track.profile!r}: a trace is of one process; set executor.name=local")
    if config.executor.slice is not None and not re.fullmatch(r"[a-z0-9]+:\d+x\d+(x\d+)?", config.executor.slice):
        raise SealError(f"{where}: executor.slice={config.executor.slice!r}: expected a generation and a shape, say v6e:4x4")
    if not config.grade.timeout > 0:
        raise SealError(f"{where}: grade.timeout={config.grade.timeout}: expected a number of seconds above 0")
    if sorted(set(config.fit.lengths)) != list(config.fit.lengths) or config.fit.lengths[:1] < [1]:
        raise SealError(f"{where}: fit.lengths={config.fit.lengths}: expected ascending positive lengths")
    if config.fit.slots is not None and config.fit.slots < 1:
        raise SealError(f"{where}: fit.slots={config.fit.slots}: expected at least 1, or null for as many as fit")
    for key in ("m_step.row_length", "pretraining.sft.row_length", "pretraining.checkpoint_every"):
        if (value := _value(config, key)) is not None and value < 1:
            none = "never" if key.endswith("checkpoint_every") else "the longest sequence's"
            raise SealError(f"{where}: {key}={value}: expected at least 1, or null for {none}")
    if not config.pretraining.sizes or min(config.pretraining.sizes) < 1:
        raise SealError(f"{where}: pretraining.sizes={config.pretraining.sizes}: expected numbers of passages, at least 1 each")
    if config.mesh.edit != -1 and config.mesh.edit < 1:
        raise SealError(f"{where}: mesh.edit={config.mesh.edit}: expected at least 1, or -1 for all devices that are left")
    for name, method in config.continual.methods.items():
        _check_method(method, f"{where}: continual.methods.{name}")
    for key in ("fit.lora.targets", "m_step.lora.targets", "pretraining.sft.lora.targets"):
        targets = _value(config, key)
        unknown = [t for t in targets if t not in LINEAR]
        if unknown or not targets:
            raise SealError(f"{where}: {key}={targets}: expected some of {', '.join(LINEAR)}")


def _check_method(method: MethodConfig, where: str) -> None:
    gate = method.gate
    if gate.measure not in GATES:
        raise SealError(f"{where}.gate.measure={gate.measure!r}: expected one of {', '.join(GATES)}")
    if not gate.scales or not all(0 < x <= 1 for x in gate.scales) or sorted(gate.scales, reverse=True) != list(gate.scales):
        raise SealError(f"{where}.gate.scales={gate.scales}: expected numbers above 0 and at most 1, the largest first")
    for key, value in (
        ("replay", method.replay),
        ("anchor", method.anchor),
        ("orthogonal", method.orthogonal),
        ("gate.budget", gate.budget),
    ):
        if not value >= 0:
            raise SealError(f"{where}.{key}={value}: expected at least 0")
