import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import common, shapes
from seal_jax.config import LoraConfig
from seal_jax.models import lora
from seal_jax.parallel import cost


@pytest.mark.parametrize(("name", "billions"), [("qwen2.5-0.5b", 0.494), ("qwen2.5-1.5b", 1.544), ("qwen2.5-7b", 7.616)])
def test_shapes_have_the_size_in_their_name(name, billions):
    shape = jax.eval_shape(lambda: shapes.random_params(shapes.SHAPES[name], jnp.dtype("bfloat16")))
    assert abs(sum(x.size for x in jax.tree.leaves(shape)) / 1e9 - billions) < 0.001


def test_random_weights_are_random_and_of_the_dtype():
    params = shapes.random_params(shapes.SHAPES["tiny"], jnp.dtype("bfloat16"))
    again, other = (shapes.random_params(shapes.SHAPES["tiny"], jnp.dtype("bfloat16"), seed) for seed in (0, 1))
    leaves = [[np.asarray(x, np.float32) for x in jax.tree.leaves(tree)] for tree in (params, again, other)]
    assert all((a == b).all() and (a != c).any() and a.std() > 0.01 for a, b, c in zip(*leaves, strict=True))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


def test_trained_flops_by_hand():
    """The tiny shape: two layers of width 32, two heads and one key-value head of 16, an inner width of 48, 512 tokens."""
    spec, config = shapes.SHAPES["tiny"], LoraConfig(4, 8.0)
    linear = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48) + 512 * 32
    adapter = 2 * 4 * (32 + 32 + 32 + 16)
    assert shapes.matrix_parameters(spec) == linear and lora.count(spec, 4, config.targets) == adapter
    pairs = 3 * 4 / 2  # of tokens in which one sees the other, itself included
    assert cost.trained_flops(spec, config, [3]) == 3 * (4 * linear + 6 * adapter) + 12 * 2 * 32 * pairs
    assert cost.trained_flops(spec, config, [3, 3]) == 2 * cost.trained_flops(spec, config, [3])


def test_an_edit_of_the_7b_shape_costs_what_was_estimated():
    """The estimate is 1.1e14 to 1.7e14 FLOP for 3,650 tokens, 43 at a time."""
    total = cost.trained_flops(shapes.SHAPES["qwen2.5-7b"], LoraConfig(), [43] * 85)
    assert 1.0e14 < total < 1.7e14


def test_decode_bytes_by_hand():
    spec, config = shapes.SHAPES["tiny"], LoraConfig(4, 8.0)
    cache = 2 * 2 * 1 * 16 * 2  # keys and values, layers, heads, width, bytes: of one position
    plain = shapes.decode_bytes(spec, 2, 2, [10.0, 20.0])
    assert plain == 2 * shapes.matrix_parameters(spec) + 30 * cache
    assert shapes.decode_bytes(spec, 2, 2, [10.0, 20.0], 3, config) == plain + 3 * 2 * lora.count(spec, 4, config.targets)
    # Where bfloat16 weights have float32 activations: the cache and the adapters are as those.
    wide = shapes.decode_bytes(spec, 2, 4, [10.0, 20.0], 3, config)
    assert wide - plain == plain - 2 * shapes.matrix_parameters(spec) + 3 * 4 * lora.count(spec, 4, config.targets)


def test_interleave_warms_up_and_takes_turns():
    calls = []
    cases = {name: lambda name=name: calls.append(name) for name in "ab"}
    took = common.interleave(cases, 2, time.monotonic() + 60, warm=["b"])
    assert calls == ["a", "a", "b", "a", "b"] and [len(x) for x in took.values()] == [2, 2]


def test_interleave_ends_in_time(capsys):
    took = common.interleave({"a": lambda: time.sleep(0.02), "b": lambda: None}, 50, time.monotonic() + 0.01)
    assert list(took) == ["a"] and len(took["a"]) == 1
    assert "left out, no time: b" in capsys.readouterr().err
    took = common.interleave({"a": lambda: None, "b": lambda: None, "c": lambda: None}, 1, 0.0, warm=["b"])
    assert list(took) == ["a", "b"], "what is warm takes no time to warm up"


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 24 bytes."),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),  # torch's own class is one of RuntimeError
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_cases_without_room_are_left_out(error, capsys):
    def fail(calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) == 2:
            raise error

    def never():
        raise error

    took = common.interleave({"never": never, "once": fail, "ever": lambda: None}, 2, time.monotonic() + 60)
    assert list(took) == ["ever"] and len(took["ever"]) == 2
    assert [line for line in capsys.readouterr().err.splitlines() if "left out" in line] == [
        "left out, no room on the device: never",
        "left out, no room on the device: once",
    ]


def test_other_errors_are_not_taken_for_want_of_room():
    with pytest.raises(RuntimeError, match="INTERNAL"):
        common.interleave({"a": lambda: (_ for _ in ()).throw(jax.errors.JaxRuntimeError("INTERNAL: fault"))}, 1, 0.0, warm=["a"])


def test_figures():
    assert common.figures([2.0, 1.0, 1.5]) == {"seconds": 1.5, "spread": pytest.approx(2 / 3), "repeats": 3}


def test_ceilings_are_rates():
    flops, bandwidth = common.ceilings(jnp.dtype("float32"), tiny=True)
    assert 1e8 < flops < 1e16 and 1e8 < bandwidth < 1e14


def test_the_table_has_the_columns_that_are_filled():
    lines = common.table([{"case": "x", "k": 1, "mfu": None, "ratio": 12.345}, {"case": "longer", "k": None, "ratio": None}]).splitlines()
    assert lines[0].split() == ["|", "case", "|", "k", "|", "ratio", "|"] and "12.3" in lines[2] and len({len(x) for x in lines}) == 1
