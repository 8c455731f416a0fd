"""How many slots fit: the search on made-up memories, and what the compiler says of a tiny engine."""

import math
import random

import jax
import jax.numpy as jnp
import pytest

from seal_jax.config import LoraConfig
from seal_jax.errors import SealError
from seal_jax.fit import memory
from seal_jax.fit.engine import FitEngine
from seal_jax.models.decoder import Decoder
from seal_jax.models.spec import from_hf
from seal_jax.models.tree import leaves, nest
from seal_jax.parallel import mesh as mesh_lib

SPEC = from_hf(
    {
        "model_type": "qwen2",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
    }
)


@pytest.fixture(scope="module")
def fit():
    """(engine, abstract parameters)."""
    mesh = mesh_lib.single()
    where = mesh_lib.parameter_sharding(mesh)
    params = {leaf.path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=where(leaf.path, leaf.shape)) for leaf in leaves(SPEC)}
    return FitEngine(Decoder(SPEC), LoraConfig(4, 8.0, ["q_proj"]), slots=1, tokens_per_step=64, mesh=mesh), nest(params)


@pytest.fixture(scope="module", autouse=True)
def quick(quick_compile):
    with quick_compile():
        yield


def test_the_largest_number_is_found_where_memory_is_linear():
    """With one question where all fits, and with three where what a slot takes was guessed a little wrong."""
    for seed in range(500):
        draw = random.Random(seed)
        base, slope, limit, most = draw.randint(0, 1000), draw.randint(1, 50), draw.randint(1, 5000), draw.randint(1, 300)
        asked = []
        guess = slope * draw.uniform(0.9, 1.1)
        found = memory.most_near(lambda k: asked.append(k) or base + slope * k, limit, most, guess)  # noqa: B023
        best = max(0, min(most, (limit - base) // slope))
        assert (found.slots if found else 0) == best, (base, slope, limit, most)
        assert found is None or (found.slots in asked and found.bytes == base + slope * found.slots)
        assert len(asked) == len(set(asked)) <= (1 if best == most else memory.TRIES)


def test_what_is_found_fits_where_memory_is_not_linear():
    used = lambda k: 100 + 10 * k + (200 if k > 40 else 0)  # noqa: E731
    found = memory.most_near(used, 600, 200, 10.0)
    assert found.slots <= 40 and used(found.slots) == found.bytes <= 600
    refused = memory.most_near(lambda k: 100 + 10 * k if k <= 20 else math.inf, 1000, 200, 10.0)
    assert 13 <= refused.slots <= 20, "a compiler that does not say by how much it failed costs tries, but no wrong answer"


def test_nothing_fits_or_nothing_grows():
    assert memory.most_near(lambda k: 10.0, 5.0, 9, 1.0) is None
    assert memory.most_near(lambda k: 10.0, 15.0, 9, 1.0).slots == 9
    assert memory.most_near(lambda k: 10.0, 15.0, 1, 1.0).slots == 1


def test_a_number_too_small_to_be_of_use_is_not_looked_for():
    asked = []
    used = lambda k: asked.append(k) or 100 + 10 * k  # noqa: E731
    assert memory.most_near(used, 250, 200, 10.0, least=20) is None and asked == [200, 20]
    assert memory.most_near(used, 350, 200, 10.0, least=20).slots == 25
    assert memory.most_near(lambda k: math.inf, 350, 200, 10.0, least=20) is None
    assert memory.most_near(lambda k: 10.0 * k, 350, 7, 10.0, least=7).slots == 7


def test_ways_of_fitting_from_the_fastest_on():
    assert memory.ways("dots", 4096) == (("dots", 4096),)
    assert memory.ways("auto", 4096) == (("none", 4096), ("none", 2048), ("none", 1024), ("full", 4096))
    assert memory.ways("auto", 512) == (("none", 512), ("full", 512)), "smaller steps would be too small"


def test_smaller_steps_come_before_recomputing(fit, monkeypatch):
    """By made-up memories: a token of a step takes 10 bytes if nothing is recomputed, and 2 otherwise."""
    engine, params = fit
    options = {"slots": 1, "lengths": (16, 64, 256), "mesh": engine.mesh}
    lora = LoraConfig(4, 8.0, ["q_proj"])
    engines = [
        FitEngine(Decoder(SPEC, remat=remat), lora, tokens_per_step=tokens, **options) for remat, tokens in memory.ways("auto", 4096)
    ]
    each = {"none": 10, "full": 2}
    step = lambda engine, _, length, slots: each[engine.decoder.remat] * max(length, min(engine.tokens_per_step, slots * length))  # noqa: E731
    monkeypatch.setattr(memory, "step_bytes", step)
    monkeypatch.setattr(memory, "adapter_bytes", lambda engine: 0)
    for limit, longest, way in ((41_000, 100, engines[0]), (40_000, 100, engines[1]), (20_000, 100, engines[2]), (10_000, 100, engines[3])):
        monkeypatch.setattr(memory, "device_limit", lambda mesh: limit)  # noqa: B023
        assert memory.settle(engines, params, longest, 64, None)[0] is way
    monkeypatch.setattr(memory, "device_limit", lambda mesh: 15_000)
    assert memory.settle(engines, params, 100, 64, None)[0] is engines[2]
    assert memory.settle(engines, params, 2000, 64, None)[0] is engines[3], "one sequence of 2,048 tokens is larger than such a step"


@pytest.mark.parametrize(
    ("text", "used"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 18.50G of 15.75G hbm.",
            18.5 * 2**30,
        ),
        ("RESOURCE_EXHAUSTED: Used 900.00M of 500.00M hbm", 900 * 2**20),
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (28.16G) exceeds available HBM (15.75G). HLO module: jit__step.",
            28.16 * 2**30,
        ),
        ("RESOURCE_EXHAUSTED: no figures", math.inf),
        ("INVALID_ARGUMENT: Used 1G of 2G", None),
    ],
)
def test_what_a_refusal_says(text, used):
    assert memory.refused_bytes(RuntimeError(text)) == used


def test_a_slot_takes_an_adapter_and_its_moments(fit):
    engine, params = fit
    assert memory.adapter_bytes(engine) == 4 * 2 * 4 * (32 + 32), "float32, two layers, rank 4"
    per_slot = (memory.step_bytes(engine, params, 16, 64) - memory.step_bytes(engine, params, 16, 32)) / 32
    assert 3 * memory.adapter_bytes(engine) <= per_slot <= 3.5 * memory.adapter_bytes(engine)


def test_a_step_holds_no_copy_of_the_slots_that_it_does_not_train(fit):
    """Nor of those that it does: XLA for CPUs once copied the moments of all slots, at every step."""
    engine, params = fit
    few, many = (memory.of_program(engine.lower(params, 16, 1, slots).compile()) for slots in (4, 64))
    assert many.temporaries - few.temporaries < 0.05 * (many.arguments - few.arguments)


def test_many_short_rows_may_take_more_than_one_long_one(fit, monkeypatch):
    """Of steps of at most 64 tokens: one row of 48, two of 32, and four of 16, which have the most rows and so the most adapters."""
    engine, params = fit
    asked, real = [], memory._step_bytes
    monkeypatch.setattr(memory, "_step_bytes", lambda *args: asked.append((args[2], real(*args))) or asked[-1][1])
    found = memory.step_bytes(engine, params, 48, 8)
    assert {length for length, _ in asked} == {48, 16} and found == max(used for _, used in asked)
    asked.clear()
    found = memory.step_bytes(engine, params, 48, 2)
    assert {length for length, _ in asked} == {48, 32} and found == max(used for _, used in asked), "two rows at most"
    asked.clear()
    memory.step_bytes(engine, params, 16, 8)
    assert [length for length, _ in asked] == [16]


def test_slots_that_fit_keep_within_the_limit(fit, monkeypatch):
    engine, params = fit
    assert memory.slots_that_fit(engine, params, 16, 2) == 2, "no more slots than edits; compiled, against this machine's memory"
    adapter = memory.adapter_bytes(engine)
    monkeypatch.setattr(memory, "step_bytes", lambda engine, params, length, slots: 1000 + 3 * slots * adapter)
    limit = 1000 + 100 * adapter + 3 * 20 * adapter
    assert memory.slots_that_fit(engine, params, 16, 100, limit=limit) == 20, "beside the adapters that come of the 100 edits"
    assert memory.slots_that_fit(engine, params, 16, 100, limit=limit, held=30 * adapter) == 10
    with pytest.raises(SealError, match=r"one edit of 16 tokens takes .* GiB a device"):
        memory.slots_that_fit(engine, params, 16, 100, limit=1000)


def test_a_device_that_does_not_tell_is_an_error():
    class Silent:
        platform, device_kind, process_index = "gpu", "a card", jax.process_index()

        def memory_stats(self):
            return None

    class Mesh:
        class devices:
            flat = (Silent(),)

    with pytest.raises(SealError, match="a card does not tell"):
        memory.device_limit(Mesh)
    Silent.memory_stats = lambda self: {"bytes_limit": 1000}
    assert memory.device_limit(Mesh) == memory.SHARE * 1000
    assert memory.device_limit(mesh_lib.single()) > 2**28


def test_a_containers_memory_counts(tmp_path, monkeypatch):
    whole = memory.device_limit(mesh_lib.single())
    for name, text in (("memory.max", "max\n"), ("memory.limit", f"{2**62}\n")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "CONTAINER", (str(tmp_path / "memory.max"), str(tmp_path / "memory.limit"), str(tmp_path / "none")))
    machine = memory.device_limit(mesh_lib.single())
    assert machine >= whole
    (tmp_path / "memory.max").write_text(f"{2**20}\n")
    assert memory.device_limit(mesh_lib.single()) == memory.CPU_SHARE * 2**20 / jax.local_device_count()


@pytest.mark.parametrize(("guess", "questions"), [(10.0, 2), (9.0, 3), (12.0, 3), (100.0, 3)])
def test_a_guess_of_a_slot_saves_questions(guess, questions):
    asked = []
    near = lambda used, limit, most: memory.most_near(lambda k: asked.append(k) or used(k), limit, most, guess)  # noqa: E731
    assert near(lambda k: 100 + 10 * k, 600, 75) == (50, 600) and asked[0] == 75 and len(asked) == questions
    asked.clear()
    assert near(lambda k: 100 + 10 * k, 600, 38) == (38, 480) and asked == [38]
    assert near(lambda k: 10.0, 5.0, 9) is None and near(lambda k: 10.0, 5.0, 1) is None
    assert 16 <= near(lambda k: 100 + 10 * k if k <= 20 else math.inf, 1000, 75).slots <= 20
