"""The configuration of a run: typed dataclasses, filled from YAML and `key.sub=value` overrides by OmegaConf.

Defaults are the paper's (arXiv 2506.10943), for knowledge incorporation. `task` is checked against the dataclass `Config` of the package
`seal_jax.tasks.<task.name>`, so that a new task brings its own options without a change here.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import os
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any

import omegaconf
import yaml
from omegaconf import OmegaConf

from seal_jax import limits
from seal_jax.errors import SealError
from seal_jax.runs import places

# Spaced by at most 3/2 up to 256, where nearly all sequences of a knowledge edit are (p50 29, p99 255 tokens).
LENGTHS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)


@dataclasses.dataclass
class ModelConfig:
    name: str = "embedded"  # "embedded" (SmolLM2-135M-Instruct), a hub id, a local folder of safetensors, or a GGUF file
    dtype: str = "auto"  # of the weights: "float32", "bfloat16"; auto: bfloat16 where it is fast, on accelerators and CPUs with AMX
    max_length: int = 2048  # longest prompt + answer, or training sequence, in tokens
    remat: str = "none"  # recomputed backward: "none", "dots" (all but products), "full"; "auto": "none" if it fits, maybe in smaller steps


@dataclasses.dataclass
class LoraConfig:
    """A low-rank adapter (Hu et al. 2021)."""

    rank: int = 32  # of the adapter's product
    alpha: float = 64.0  # the adapter's product is scaled by alpha / rank
    targets: list[str] = dataclasses.field(default_factory=lambda: ["q_proj", "v_proj"])  # which linear layers get one, of all blocks


@dataclasses.dataclass
class StopConfig:
    """When an edit ends before its last epoch. Looked at after each epoch, with the mean loss of its steps."""

    loss: float = 0.0  # once the epoch's mean loss is at most this, in nats per token; 0: never
    gain: float = 0.0  # when the loss has not fallen by this share below its least so far; 0: never
    patience: int = 1  # ... in this many epochs in a row


@dataclasses.dataclass
class FitConfig:
    """The inner loop, one adapter per edit. `lora.targets`, `slots`, `tokens_per_step` and `lengths` are the same for all edits."""

    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    learning_rate: float = 1e-3  # of AdamW, at its highest
    schedule: str = "linear"  # "constant", "linear" or "cosine", to 0 over the edit's own steps
    warmup_steps: int = 0  # optimiser steps of linear rise before the schedule
    weight_decay: float = 0.0  # decoupled from the gradient
    max_grad_norm: float = 1.0  # longer gradients are scaled down to it; 0: never
    epochs: int = 10  # each in a random order of its own
    batch_size: int = 1  # sequences per optimiser step
    max_steps: int | None = None  # an upper bound on the optimiser steps of an edit
    stop: StopConfig = dataclasses.field(default_factory=StopConfig)
    anchor: float = 0.0  # L2-SP: weight of half the squared L2 distance of all kernels from what they were before the edit
    orthogonal: float = 0.0  # weight of half the squared products of input directions with those of edits before, if any (O-LoRA)
    slots: int | None = None  # edits held at once by each device along mesh.edit; null: as many as fit into its memory
    tokens_per_step: int = 512  # token slots a step of each device along mesh.edit, over all its edits; model.remat=auto may halve it twice
    lengths: list[int] = dataclasses.field(default_factory=lambda: list(LENGTHS))  # padded lengths; each used one is a compilation


@dataclasses.dataclass
class SampleConfig:
    """How the policy writes self-edits."""

    temperature: float = 1.0  # 0: greedy
    top_p: float = 0.95  # tokens are drawn from the smallest set of at least this mass
    top_k: int = 0  # draw from the k most likely tokens only; 0: from all
    max_tokens: int = 8192  # bounded by model.max_length as well
    constrained: bool = True  # where the task has a schema for its self-edits, nothing else is written
    rows: int = 32  # sequences decoded at once by each device along mesh.edit


@dataclasses.dataclass
class AnswerConfig:
    """How adapted models answer: greedily."""

    max_tokens: int = 64  # of one answer
    rows: int = 64  # answers decoded at once, over all adapters, by each device along mesh.edit


@dataclasses.dataclass
class SftConfig:
    """Supervised fine-tuning of one model over the whole mesh, sequences packed into rows."""

    weights: str = "lora"  # what trains: "lora" (an adapter, to be merged; always so in the M-step) or "full" (all weights, without lora)
    lora: LoraConfig = dataclasses.field(
        default_factory=lambda: LoraConfig(64, 128.0, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    )
    learning_rate: float = 3e-4  # of AdamW, at its highest
    schedule: str = "linear"  # as fit.schedule
    warmup_steps: int = 0  # optimiser steps of linear rise before the schedule
    weight_decay: float = 0.0  # decoupled from the gradient
    max_grad_norm: float = 1.0  # longer gradients are scaled down to it; 0: never
    epochs: int = 2  # over all sequences, each in a random order of its own
    batch_size: int = 10  # sequences per optimiser step
    microbatch: int = 1  # rows in memory at once, of each device along mesh.edit and mesh.fsdp; gradients are accumulated over them
    row_length: int | None = None  # token slots of a row, which several sequences may share; null: the longest sequence's


@dataclasses.dataclass
class MStepConfig(SftConfig):
    """Supervised fine-tuning of the policy on the kept (prompt, self-edit) pairs, completion tokens only, then a merge; of an adapter."""


@dataclasses.dataclass
class RetentionConfig:
    """What rewards count besides the context's own questions, so that the policy learns self-edits that do not harm. Default: nothing."""

    contexts: int = 0  # passages, those after the round's own, that the policy is taught first, and asked again after every edit
    weight: float = 1.0  # of the fall of the share of their questions answered right
    bits: float = 0.0  # weight of the rise of bits per token of the held-out texts
    texts: str = "general"  # held-out texts about no passage, as continual.texts


@dataclasses.dataclass
class RestEmConfig:
    rounds: int = 2  # of E-step, selection and M-step
    contexts: int = 50  # contexts a round; round r takes the next ones of the training split, from the start again at its end
    edits: int = 5  # K, self-edits a context
    seeds: int = 3  # S, inner-loop seeds an edit
    select: str = "best"  # "best" (best of K), "top" (top `keep`), "gain" (all above the unadapted reward) or "right" (all of reward 1)
    keep: int = 1  # how many `top` keeps a context
    group: int = 10  # contexts measured in one go; a killed run repeats at most one group (two where an endpoint grades)
    rewards: str | None = None  # a file of recorded rewards (the original's "rank" file), which round 1 reads instead of measuring
    retention: RetentionConfig = dataclasses.field(default_factory=RetentionConfig)


@dataclasses.dataclass
class EvaluateConfig:
    contexts: int = 200  # contexts of the validation split
    edits: int = 5  # K, self-edits a context
    seeds: int = 2  # best of K is chosen on the first and scored on the second
    resamples: int = 10000  # bootstrap resamples of contexts
    group: int = 10  # contexts measured in one go
    during_training: bool = True  # the table at the start and at the end of `train`
    beside: list[str] = dataclasses.field(default_factory=list)  # files of the original's results, whose rows stand below ours


@dataclasses.dataclass
class GateConfig:
    """Whether an edit is kept, looked at before it is: what it does to items held back (as STABLE does, arXiv 2510.16089)."""

    # What an edit costs: "none" (all are kept), or by how much these get worse:
    measure: str = "none"  # "answers" (share of earlier questions right), "bits" (per token of held-out texts), "kl" (of predictions there)
    budget: float = 0.1  # the most that an edit may cost, in units of the measure
    scales: list[float] = dataclasses.field(default_factory=lambda: [1.0, 0.5, 0.25])  # tried in order; the first within budget is kept


@dataclasses.dataclass
class MethodConfig:
    """One way of learning passage after passage. All of them off: plain sequential editing."""

    replay: int = 0  # training sequences of earlier passages that are trained on again with each new one
    anchor: float = 0.0  # as fit.anchor, which holds where this is 0
    orthogonal: float = 0.0  # as fit.orthogonal, which holds where this is 0
    gate: GateConfig = dataclasses.field(default_factory=GateConfig)


@dataclasses.dataclass
class ContinualConfig:
    """Continual self-edits: passage after passage is adapted into the weights, and all passages so far are asked again after each.

    `continual.methods` holds methods against forgetting, each by a name of its own, beside plain `sequential` editing: all learn the same
    sequences.
    """

    sequences: int = 8  # of passages, all learnt at once
    passages: int = 8  # of each sequence
    writer: str = "adapted"  # who writes self-edits: "adapted", each sequence as it has become; "base", the policy before, for all methods
    methods: dict[str, MethodConfig] = dataclasses.field(default_factory=lambda: {"sequential": MethodConfig()})
    texts: str = "general"  # held-out texts about no passage: "general" (ours), or a file of texts
    beside: list[str] = dataclasses.field(default_factory=list)  # published matrices of the original's, as lines beside ours


@dataclasses.dataclass
class PretrainingConfig:
    """Continued pretraining: one model is trained on the self-edits of many passages at once. Defaults: the original's `CPT.py`."""

    sizes: list[int] = dataclasses.field(default_factory=lambda: [200])  # numbers of passages, each with models of its own
    edits: int = 5  # self-edits a passage
    group: int = 50  # passages written about in one go
    sft: SftConfig = dataclasses.field(
        default_factory=lambda: SftConfig(lora=LoraConfig(), learning_rate=1e-3, epochs=3, batch_size=8, microbatch=4)
    )
    checkpoint_every: int | None = 100  # optimiser steps; null: never
    save: bool = False  # the trained models, as transformers folders under models/ in the run folder


@dataclasses.dataclass
class GradeConfig:
    name: str = "match"  # "match" (offline), "judge" (a model of ours) or "endpoint" (an OpenAI-compatible server)
    threshold: float = 0.6  # match: the share of gold tokens that must be found
    model: str = "gpt-4.1"  # judge: as model.name; endpoint: the server's name for it
    base_url: str | None = None  # endpoint: default from OPENAI_BASE_URL
    concurrency: int = 16  # endpoint: calls in flight
    retries: int = 5  # endpoint: tries after the first, with back-off
    timeout: float = 30.0  # endpoint: seconds a try
    patience: float = 600.0  # endpoint: seconds that a server which answers nobody is waited for; then the run stops. 0: no waiting
    cache: str | None = None  # endpoint: folder of the reply cache; default in the user's cache folder


@dataclasses.dataclass
class MeshConfig:
    """How devices are laid out: edit x fsdp x tensor of them, see `seal_jax.parallel.mesh`."""

    edit: int = -1  # devices along the axis of edits; -1: all that are left
    fsdp: int = 1  # devices that share the frozen parameters
    tensor: int = 1  # devices that share each layer's products


@dataclasses.dataclass
class ExecutorConfig:
    """Who does the work of a run: this process (with its like on other hosts of the slice), or workers on the machines of a Ray cluster.

    A worker is a slice: each holds the policy, and computes the groups that no other has taken.
    """

    name: str = "local"  # "local", or "ray" (needs the extra `ray`)
    workers: int = 1  # ray: how many, each with what follows
    hosts: int = 1  # ray: processes of a worker, one a host; they share one mesh
    slice: str | None = None  # ray: a TPU slice for each worker, say v6e:4x4; its hosts and chips are then known
    cpus: float = 1.0  # ray: of each process
    gpus: float = 0.0  # ray: of each process
    tpus: float = 0.0  # ray: chips of each process
    timeout: float | None = 3600.0  # ray: seconds for a group or an M-step; a worker that takes longer is considered lost; null: never
    retries: int = 3  # ray: workers that may be lost over the same group


@dataclasses.dataclass
class TrackConfig:
    """Where the metrics of a run go besides its event log. Nothing here changes a result."""

    tensorboard: bool = False  # curves for TensorBoard in the run folder's `tensorboard/`; needs the extra `tensorboard`
    wandb: str | None = None  # curves to this project of Weights & Biases; needs the extra `wandb`
    profile: str | None = None  # a folder for a trace by JAX's profiler, of the second group of contexts (the first compiles)


@dataclasses.dataclass
class RunConfig:
    name: str = "run"  # what the run is called
    seed: int = 0  # base seed of every random draw
    run_dir: str = "runs/${name}"  # the run folder; gs://BUCKET/PATH or s3://BUCKET/PATH: in an object store (extra `remote`)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    task: Any = None
    fit: FitConfig = dataclasses.field(default_factory=FitConfig)
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
    answer: AnswerConfig = dataclasses.field(default_factory=AnswerConfig)
    m_step: MStepConfig = dataclasses.field(default_factory=MStepConfig)
    rest_em: RestEmConfig = dataclasses.field(default_factory=RestEmConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    continual: ContinualConfig = dataclasses.field(default_factory=ContinualConfig)
    pretraining: PretrainingConfig = dataclasses.field(default_factory=PretrainingConfig)
    grade: GradeConfig = dataclasses.field(default_factory=GradeConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    executor: ExecutorConfig = dataclasses.field(default_factory=ExecutorConfig)
    track: TrackConfig = dataclasses.field(default_factory=TrackConfig)

    @property
    def largest_group(self) -> int:
        """The most edits that are fitted in one go, in a round or in an evaluation (where each context has one of the passage alone)."""
        r, e = self.rest_em, self.evaluate
        return max(min(r.group, r.contexts) * r.edits * r.seeds, min(e.group, e.contexts) * (e.edits + 1) * e.seeds)


def task_names() -> list[str]:
    """The tasks that this installation knows: the packages under `seal_jax.tasks`."""
    from seal_jax import tasks

    return sorted(m.name for m in pkgutil.iter_modules(tasks.__path__) if m.ispkg)


def load(path: str | os.PathLike[str] | places.ObjectPath, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in the YAML file (or object) `path`, with `key.sub=value` overrides applied in order.

    Raises `SealError` for a missing or malformed file, an unknown key (with the nearest known one), a wrong type or a bad value.
    """
    return build(read(path), overrides, where=str(path))


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in the YAML file `path`, as plain data. Raises `SealError` for a missing or malformed file."""
    try:
        data = yaml.safe_load(places.place(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SealError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SealError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise SealError(f"{path}: expected a mapping of config keys, found {type(data).__name__}")
    return data


def build(
    data: dict[str, Any], overrides: Sequence[str] = (), where: str = "config", settings: Mapping[str, Any] | None = None
) -> RunConfig:
    """`load` for a config already read as plain data; `where` names it in error messages.

    `settings`: values by dotted key, as data, in place of what `data` has there.
    """
    try:
        given = OmegaConf.create(data)
        for key, value in (settings or {}).items():
            given = OmegaConf.merge(given, functools.reduce(lambda inner, part: {part: inner}, reversed(key.split(".")), value))
        for item in overrides:
            given = override(given, item)
        task = given.get("task")
        name = task.get("name") if OmegaConf.is_dict(task) else None
    except (omegaconf.errors.OmegaConfBaseException, ValueError) as error:
        raise SealError(f"{where}: {_one_line(error)}") from None
    if name is None:
        raise SealError(f"{where}: task.name is missing; one of: {', '.join(task_names())}")
    if name not in task_names():
        raise SealError(f"{where}: task.name={name!r} is unknown{_nearest(str(name), task_names())}; one of: {', '.join(task_names())}")
    schema = schema_of(name)
    for item in overrides:
        keep_texts(schema, given, item)
    config = fill(schema, given, where)
    assert isinstance(config, RunConfig)
    limits.check(config, where)
    return config


def schema_of(task: str) -> Any:
    """What a config of that task may hold, as an `OmegaConf` structure."""
    schema = OmegaConf.structured(RunConfig)
    schema.task = OmegaConf.structured(importlib.import_module(f"seal_jax.tasks.{task}").Config)
    return schema


def fill(schema: Any, given: Any, where: str) -> Any:
    """The dataclass of `schema` with what is `given` in place of its defaults. Raises `SealError` for what is unknown or does not fit."""
    try:
        _check_keys(schema, given, where)
        return OmegaConf.to_object(OmegaConf.merge(schema, given))
    except (omegaconf.errors.OmegaConfBaseException, ValueError) as error:
        raise SealError(f"{where}: {_one_line(error)}") from None


def override(given: Any, item: str) -> Any:
    """`given` with one `key.sub=value` applied."""
    key, separator, _ = item.partition("=")
    if not separator or not all(key.split(".")):
        raise SealError(f"override {item!r}: expected key.sub=value")
    try:
        return OmegaConf.merge(given, OmegaConf.from_dotlist([item]))
    except yaml.YAMLError as error:
        raise SealError(f"override {item!r}: not readable as YAML: {' '.join(str(error).split())}") from None
    except (omegaconf.errors.OmegaConfBaseException, TypeError, ValueError):
        raise SealError(f"override {item!r}: does not fit what the config has there; a list is set as a whole: key=[1,2]") from None


def keep_texts(schema: Any, given: Any, item: str) -> None:
    """Has `given` hold the text that the override `item` has, where the schema wants one, instead of what YAML makes of it."""
    key, _, written = item.partition("=")
    if is_text(schema, key):
        OmegaConf.update(given, key, texts(written))


def is_text(schema: Any, key: str) -> bool:
    """Whether the dotted key takes a text, or a list of texts."""
    node = schema
    for part in key.split("."):
        node = node._get_node(part) if OmegaConf.is_dict(node) and not node._is_none() and part in node else None
    return isinstance(node, omegaconf.StringNode) or (OmegaConf.is_list(node) and node._metadata.element_type is str)


def texts(written: str) -> Any:
    """The text, or list of texts, that an override's value `written` is. To YAML 007 is a number, and so are ids like 855e0971."""

    def kept(read: Any, as_written: Any) -> Any:
        if isinstance(read, list):
            return [kept(*pair) for pair in zip(read, as_written, strict=True)]
        return read if read is None or isinstance(read, str | dict) else as_written

    return kept(yaml.safe_load(written), yaml.load(written, yaml.BaseLoader)) if written else written


def to_yaml(config: RunConfig) -> str:
    """The whole configuration, defaults included, as YAML that `load` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as plain data."""
    return dataclasses.asdict(config)


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), "")
    return f"{key}: {lines[0]}" if key else lines[0]


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, 1, 0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _check_keys(schema: Any, given: Any, where: str, prefix: str = "") -> None:
    """Refuses unknown keys, as OmegaConf would but with the nearest name, and what is no mapping, list or value where one is due."""
    if schema._metadata.object_type is dict:  # sections of one type, under names that the user chooses
        section = schema._metadata.element_type
        schema = OmegaConf.create({key: OmegaConf.structured(section) for key in given})
    for key in given:
        full = f"{prefix}{key}"
        if key not in schema:
            known = [str(k) for k in schema]
            raise SealError(f"{where}: unknown key {full!r}{_nearest(str(key), known)}; known here: {', '.join(known)}")
        if OmegaConf.is_missing(given, key):
            raise SealError(f"{where}: {full} has no value")
        here, there = schema._get_node(key), given._get_node(key)
        if there._is_interpolation() or (there._is_none() and here._is_optional()):
            continue
        if OmegaConf.is_dict(here):
            if here._is_none():  # a section that is off by default
                here = OmegaConf.structured(here._metadata.ref_type)
            if not OmegaConf.is_dict(there) or there._is_none():
                raise SealError(f"{where}: {full}={given[key]!r}: expected a mapping of {', '.join(map(str, here))}")
            _check_keys(here, there, where, f"{full}.")
        elif OmegaConf.is_list(here) and (not OmegaConf.is_list(there) or there._is_none()):
            example = "a,b" if here._is_none() or not here else ", ".join(map(str, here[:2]))
            raise SealError(f"{where}: {full}={given[key]!r}: expected a list, as in [{example}]")
        elif (
            OmegaConf.is_list(here)
            and here._metadata.element_type is str
            and (numbers := [x for x in given[key] if not isinstance(x, str)])
        ):
            raise SealError(f"{where}: {full}: {numbers[0]!r} is read as no text; put what was meant in quotes")
        elif not OmegaConf.is_list(here) and (OmegaConf.is_dict(there) or OmegaConf.is_list(there)):
            raise SealError(f"{where}: {full}={OmegaConf.to_container(there)!r}: expected a single value")
        elif isinstance(here, omegaconf.StringNode) and not isinstance(given[key], str | None):
            raise SealError(f"{where}: {full}: {given[key]!r} is read as no text; put what was meant in quotes")
