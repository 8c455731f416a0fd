"""The configs that come with the project: all are valid, and the one for Qwen2.5-7B is built abstractly, without a weight in memory."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import pytest

from seal_jax import config as config_lib
from seal_jax import limits, tasks
from seal_jax.fit import engine, memory, plan
from seal_jax.fit.step import empty_state
from seal_jax.models import lora as lora_lib
from seal_jax.models.decoder import Decoder
from seal_jax.models.dtypes import resolve_dtype
from seal_jax.models.spec import from_hf
from seal_jax.models.tree import leaves, nest
from seal_jax.parallel import mesh
from seal_jax.rest_em.stage import grader
from seal_jax.sample import decode
from seal_jax.sft import pack
from seal_jax.sft.engine import SftEngine
from seal_jax.sweep import config as sweep_config
from seal_jax.sweep import lanes
from seal_jax.tasks.base import Context

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
PAPER = CONFIGS / "knowledge_qwen2.5_7b.yaml"
# The published config.json of Qwen2.5-7B.
QWEN = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}


PASSAGE = {"context": "Orsk sells salt.", "questions": [{"question": "What does it sell?", "answer": "salt"}]}
PAIR = {"input": [[1, 2]], "output": [[2, 1]]}
CONTEXTS = {  # of each task: a context, and what of it stands in the prompt for a self-edit
    "knowledge": (Context("0", "Orsk", PASSAGE), "Orsk sells salt."),
    "arc": (Context("0-0", "0", {"id": "0-0", "train": [PAIR, PAIR], "test": PAIR}), "1 2"),
}


def count(tree) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def shapes(tree) -> list[tuple[tuple[int, ...], str]]:
    return [(x.shape, str(x.dtype)) for x in jax.tree.leaves(tree)]


def stacked(tree, number: int):
    """The shapes of `number` trees stacked."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((number, *x.shape), x.dtype), tree)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_valid(path):
    config = config_lib.load(path)
    assert config.name == path.stem, "the run folder is named after the file"
    task = tasks.build(config.task, grader(config))
    context, shown = CONTEXTS[config.task.name]
    assert shown in str(task.edit_prompt(context))
    assert task.probes(context)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("sweeps/*.yaml")), ids=lambda path: path.stem)
def test_every_sweep_is_valid(path):
    sweep = sweep_config.load(path)
    assert sweep.config.name == path.stem and str(sweep.folder) == f"sweeps/{path.stem}"
    tasks.build(sweep.base.task, grader(sweep.base))
    if sweep.config.search == "lanes":
        assert len(lanes.lanes_of(sweep)) == len(sweep.settings())
    elif sweep.config.search != "optuna":
        assert [sweep.trial(settings) for settings in sweep.settings()]


def test_paper_config_has_the_papers_numbers():
    """Knowledge incorporation, single passage: section 3.1, appendix B and the original's scripts."""
    c = config_lib.load(PAPER)
    assert (c.rest_em.edits, c.rest_em.seeds, c.rest_em.contexts, c.rest_em.rounds, c.rest_em.select) == (5, 3, 50, 2, "best")
    assert (c.fit.lora.rank, c.fit.lora.alpha, c.fit.lora.targets) == (32, 64.0, ["q_proj", "v_proj"])
    assert (c.fit.learning_rate, c.fit.schedule, c.fit.epochs, c.fit.batch_size) == (1e-3, "linear", 10, 1)
    assert (c.fit.warmup_steps, c.fit.weight_decay, c.fit.max_grad_norm) == (0, 0.0, 1.0)
    assert (c.sample.temperature, c.sample.top_p, c.sample.top_k, c.sample.max_tokens) == (1.0, 0.95, 0, 8192)
    assert (c.m_step.lora.rank, c.m_step.lora.alpha, set(c.m_step.lora.targets)) == (64, 128.0, set(limits.LINEAR))
    assert (c.m_step.learning_rate, c.m_step.epochs, c.m_step.batch_size) == (3e-4, 2, 10)
    assert (c.evaluate.contexts, c.answer.max_tokens) == (200, 64)
    assert (c.task.prompt, c.task.answer_prompt, c.task.shuffle, c.task.drop_headers) == ("implications", "base", 42, False)
    assert c.model.max_length > c.sample.max_tokens, "or a passage leaves no room for a whole self-edit"


def test_arc_config_has_the_papers_numbers():
    """Few-shot adaptation: section 3.2, appendix A and the original's scripts."""
    c = config_lib.load(CONFIGS / "arc_llama3.2_1b.yaml")
    assert (c.fit.lora.rank, c.fit.lora.alpha, len(c.fit.lora.targets)) == (128, 16.0, 5)
    assert (c.fit.schedule, c.fit.warmup_steps, c.fit.batch_size, c.fit.weight_decay) == ("cosine", 11, 2, 0.0)
    assert (c.task.max_sequences, c.task.max_steps, c.task.batch_size, c.task.leave_out) == (250, 375, 2, [1, 2])
    assert (c.sample.temperature, c.sample.max_tokens, c.rest_em.edits, c.evaluate.edits) == (0.8, 128, 15, 5)
    assert (c.m_step.lora.rank, c.m_step.learning_rate, c.m_step.epochs, c.m_step.batch_size) == (16, 5e-5, 8, 5)
    assert (c.rest_em.rounds, c.rest_em.select) == (1, "right")
    task = tasks.build(c.task, grader(c))
    assert len(task.contexts("train")) >= len(c.task.train_ids) == 12
    assert len(task.contexts("validation")) >= len(c.task.validation_ids) == 10


@pytest.fixture(scope="module")
def qwen():
    """(config, decoder, shapes of its parameters in the config's dtype)."""
    config, spec = config_lib.load(PAPER), from_hf(QWEN)
    decoder = Decoder(spec, resolve_dtype(config.model.dtype), memory.remats(config.model.remat)[-1])
    params = jax.eval_shape(decoder.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8), jnp.int32))["params"]
    return config, decoder, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, decoder.dtype), params)


@pytest.fixture(autouse=True)
def nothing_allocated():
    """A test of this file may put a few scalars on the device, but nothing of a model's size."""
    before = sum(x.nbytes for x in jax.live_arrays())
    yield
    assert sum(x.nbytes for x in jax.live_arrays()) - before < 1 << 20


def test_the_7b_decoder_has_the_published_size(qwen):
    _, decoder, params = qwen
    assert count(params) == 7_615_616_512
    assert count(params) - count(params["embed"]) - count(params["lm_head"]) == 6_525_621_760, "the published size without embeddings"
    assert params["layers"]["attn"]["k_proj"]["bias"].shape == (28, 512)
    read = nest({leaf.path: leaf.shape for leaf in leaves(decoder.spec)})
    assert jax.tree.map(lambda x: x.shape, params) == read, "what a checkpoint is read into"


def test_one_step_of_64_edits_of_the_7b_lowers(qwen):
    config, decoder, params = qwen
    fit = engine.FitEngine(decoder, config.fit.lora, slots=64, tokens_per_step=config.fit.tokens_per_step)
    adapter = engine.adapter_shapes(decoder.spec, fit.rank, fit.targets)
    assert count(adapter) == lora_lib.count(decoder.spec, 32, ["q_proj", "v_proj"]) == 28 * 32 * (2 * 3584 + 3584 + 512)
    rows = plan.row_choices(64, config.fit.batch_size, config.fit.tokens_per_step, 64)[-1]
    after, report = fit.lower(params, 64, rows, 64).out_info
    assert rows == 64 and report.loss.shape == report.ended.shape == (rows,)
    state = jax.eval_shape(lambda: empty_state(adapter, 64))
    assert shapes(after) == shapes(state), "a step gives back the state that it takes, so that it can be donated"
    assert after.lora["layers"]["attn"]["v_proj"]["b"].shape == (64, 28, 32, 512)


def test_an_m_step_of_the_7b_lowers(qwen):
    config, decoder, params = qwen
    m = config.m_step
    sft = SftEngine(decoder, m)
    adapter = engine.adapter_shapes(decoder.spec, m.lora.rank, tuple(m.lora.targets))
    after, loss = sft.lower(params, pack.Shape(10, 1, 1024)).out_info
    assert loss.shape == () and shapes(after) == shapes(sft.abstract_state(params)), "so that it can be donated"
    assert shapes(after.weights) == shapes(adapter) == shapes(after.moments.mu)
    merged = jax.eval_shape(lora_lib.merge, params, adapter, m.lora.alpha / m.lora.rank)
    assert shapes(merged) == shapes(params)


def test_training_all_weights_of_the_7b_lowers(qwen):
    config, decoder, params = qwen
    sft = SftEngine(decoder, dataclasses.replace(config.m_step, weights="full"))
    after, _ = sft.lower(params, pack.Shape(10, 1, 1024)).out_info
    assert shapes(after) == shapes(sft.abstract_state(params)) and count(after.weights) == count(params)
    assert {str(x.dtype) for x in jax.tree.leaves(after.weights)} == {"float32"}


def test_adapted_decoding_of_the_7b_lowers(qwen):
    config, decoder, params = qwen
    adapters, each, length, one = 4, 5, 128, mesh.single()
    lora = stacked(jax.eval_shape(functools.partial(lora_lib.init, jax.random.key(0), decoder.spec, 32, config.fit.lora.targets)), adapters)
    prompts = jax.ShapeDtypeStruct((adapters, each, 64), jnp.int32)
    prefix = decode.prefill.lower(decoder, one, params, lora, prompts, jax.ShapeDtypeStruct((adapters, each), jnp.int32)).out_info
    assert prefix.logits.shape == (adapters, each, 152064) and prefix.logits.dtype == jnp.float32
    rows = jax.eval_shape(lambda: decode.empty(decoder, one, adapters, each, length, config.answer.max_tokens))
    assert rows.cache.v.shape == (28, adapters, each, 4, length, 128) and rows.cache.v.dtype == jnp.bfloat16
    after = decode.decode.lower(decoder, decoder.spec.eos_ids, one, params, lora, rows, jax.ShapeDtypeStruct((), jnp.int32)).out_info
    assert shapes(after) == shapes(rows)
