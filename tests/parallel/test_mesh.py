import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seal_jax.config import MeshConfig
from seal_jax.errors import SealError
from seal_jax.models.decoder import Decoder
from seal_jax.parallel import mesh

SHAPES = [(8, 1, 1), (2, 2, 2), (1, 4, 1)]  # all devices, and half of them


@pytest.fixture(scope="module")
def devices():
    """What devices.py says of eight fake devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    command = [sys.executable, str(pathlib.Path(__file__).with_name("devices.py")), json.dumps(SHAPES)]
    done = subprocess.run(
        command,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_result_does_not_depend_on_the_devices(devices, shape):
    """Losses, adapters, greedy answers of adapted models and drawn samples: those of one device."""
    found = devices["x".join(map(str, shape))]
    assert (
        found["losses"] <= 1e-5 and found["adapters"] <= 1e-5 and found["adapters_most"] <= 5e-3
    )  # Adam on gradients that nearly cancel, as in tests/fit
    assert found["same_answers"] and found["same_samples"]
    assert devices["answers"] > 3 and devices["samples"] == 15, "or equality would say little"
    assert devices["lengths"][4] < 3, "the edit that ends early does so everywhere"


@pytest.mark.parametrize("shape", SHAPES)
def test_work_and_weights_are_dealt_out(devices, shape):
    found = devices["x".join(map(str, shape))]
    assert found["devices"] == np.prod(shape)
    assert found["part"] == 1 / (shape[1] * shape[2]), "each device holds its part of the kernels"
    if shape[0] > 1:
        assert found["steps"] < devices["steps"], "more slots, fewer steps"


def test_shards_that_send_while_they_decode_end_together(devices):
    """Where heads are cut, a shard that ended alone would leave the others waiting for it."""
    assert devices["uneven"] and devices["masked"]


def test_held_adapters_are_found_on_their_shards(devices):
    """Edits on top of held adapters, and what these make of a text: as on one device."""
    found = devices["held"]
    assert found["losses"] <= 1e-5 and found["nll"] <= 1e-5 and found["before"] <= 1e-5
    assert found["differ"] > 1e-3, "or any adapter would do"


def test_edits_do_not_communicate(devices):
    """On a mesh along `edit` alone, nothing but the report of a step (losses [8], flags [8]) crosses it."""
    crossing = [shape for shapes in devices["collectives"].values() for shape in shapes]
    assert len(crossing) == 2 and all("[8]" in shape for shape in crossing), crossing


def test_slots_are_not_sent_around(devices):
    """Where the model is cut, a step sends of adapters and moments those of its edits at most, never those of all slots."""
    sent = [shape for shapes in devices["sent"].values() for shape in shapes]
    assert sent and not any("[37," in shape and shape.count(",") > 1 for shape in sent), sent


@pytest.mark.parametrize(("weights", "part"), [("lora", 1 / 2), ("full", 1 / 4)])
def test_one_model_is_trained_by_all_devices(devices, weights, part):
    """Over 2 x 2 x 2 devices: what one device gives, with what trains cut as the model is."""
    found = devices["sft"][weights]
    assert found["losses"] <= 1e-5 and found["weights"] <= 1e-4 and found["weights_most"] <= 5e-3
    assert found["part"] == part


def test_each_device_computes_its_own_rows(devices):
    """A row of 48 tokens on each of the four data shards: the two devices of each share its logits, nor are hidden states dealt anew."""
    assert devices["sft"]["logits"] == 48 * 512 // 2
    assert devices["sft"]["moved"] == 0


def test_what_cannot_be_laid_out():
    for config, text in (
        (MeshConfig(edit=2), "edit=2 x fsdp=1 x tensor=1 needs 2 devices, there are 1"),
        (MeshConfig(fsdp=3), "fsdp=3 x tensor=1 does not divide the 1 devices"),
    ):
        with pytest.raises(SealError, match=f"mesh: {text}"):
            mesh.make(config)


def test_every_leaf_of_the_model_has_a_rule(tiny):
    """No kernel is left whole, and whatever a leaf is called, its spec is no longer than its shape."""

    class Wide:
        shape = {"edit": 1, "fsdp": 2, "tensor": 2}  # noqa: RUF012

    for family in ("qwen3", "qwen2"):
        model = tiny(family)
        params = jax.eval_shape(lambda m=model: Decoder(m.spec).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            names = [k.key for k in path]
            spec = mesh.parameter_spec(names, leaf.shape, Wide())
            assert len(spec) <= leaf.ndim
            if names[-1] == "kernel" and names[-2] != "lm_head":
                assert set(spec) == {None, "fsdp", "tensor"}
