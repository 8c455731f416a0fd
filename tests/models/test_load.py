import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seal_jax.config import ModelConfig
from seal_jax.errors import SealError
from seal_jax.models import embedded, hf, load
from seal_jax.models.gguf import read_gguf

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory, make_gguf_fields):
    """A two-layer Llama with random weights in a GGUF file."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer, rng = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    for add, value in (
        (writer.add_block_count, 2),
        (writer.add_context_length, 64),
        (writer.add_embedding_length, 32),
        (writer.add_feed_forward_length, 32),
        (writer.add_head_count, 2),
        (writer.add_head_count_kv, 1),
        (writer.add_layer_norm_rms_eps, 1e-5),
    ):
        add(value)
    fields = make_gguf_fields()
    for key, value in fields.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}[type(value)]
        add(key, value)
    shapes = {"token_embd": (len(fields["tokenizer.ggml.tokens"]), 32), "output_norm": (32,)}
    for i in range(2):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            rows = 16 if name in ("attn_k", "attn_v") else 32
            shapes[f"blk.{i}.{name}"] = (rows, 32)
        shapes |= {f"blk.{i}.attn_norm": (32,), f"blk.{i}.ffn_norm": (32,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_folder(checkpoints):
    model = load.load_model(ModelConfig(name=str(checkpoints["qwen3"]), dtype="float32"))
    spec, params, _ = hf.read_folder(checkpoints["qwen3"])
    assert (model.spec, model.name) == (spec, str(checkpoints["qwen3"]))
    jax.tree.map(np.testing.assert_array_equal, model.params, params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(model.params))
    assert model.tokenizer.decode(model.tokenizer.encode("Orsk")) == "Orsk"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_embedded_model_and_gguf_files(gguf_file, monkeypatch, dtype):
    spec, params, _ = read_gguf(gguf_file)
    monkeypatch.setattr(embedded, "fetch", lambda: gguf_file)
    for name in (str(gguf_file), "embedded"):
        model = load.load_model(ModelConfig(name=name, dtype=dtype))
        assert (model.spec, model.name) == (spec, name)
        for got, expected in zip(jax.tree.leaves(model.params), jax.tree.leaves(params), strict=True):
            assert isinstance(got, jax.Array) and got.dtype == dtype
            np.testing.assert_array_equal(np.asarray(got), expected.astype(got.dtype))


def test_parameters_are_placed_as_asked(gguf_file):
    asked = []

    def sharding(path, shape):
        asked.append(path)
        return jax.sharding.SingleDeviceSharding(jax.devices()[-1]) if path[-1] == "kernel" else None

    model = load.load_model(ModelConfig(name=str(gguf_file), dtype="bfloat16"), sharding)
    kernel = model.params["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.devices() == {jax.devices()[-1]} and kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(kernel), read_gguf(gguf_file)[1]["layers"]["mlp"]["up_proj"]["kernel"].astype(kernel.dtype))
    assert len(asked) == len(jax.tree.leaves(model.params))


def test_a_tokenizer_of_another_model_is_refused(checkpoints, tmp_path, make_tokenizer):
    folder = shutil.copytree(checkpoints["smollm2"], tmp_path / "copy")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<word {i}>" for i in range(100)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(SealError, match=r"the tokenizer has 430 ids, the model 352"):
        load.load_model(ModelConfig(name=str(folder)))


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(SealError, match="nowhere"):
        load.load_model(ModelConfig(name=str(tmp_path / "nowhere")))
    with pytest.raises(SealError, match=r"config\.json: no such file"):
        load.load_model(ModelConfig(name=str(tmp_path)))
