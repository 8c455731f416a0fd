import dataclasses

import gguf
import jax
import numpy as np
import pytest

from seal_jax.errors import SealError
from seal_jax.models.gguf import read_gguf
from seal_jax.models.spec import from_hf
from seal_jax.models.tree import get, leaves

NAMES = {  # of a block: llama.cpp's and the tree's
    "attn_norm": ("input_norm", "scale"),
    "ffn_norm": ("post_norm", "scale"),
    "attn_q": ("attn", "q_proj", "kernel"),
    "attn_k": ("attn", "k_proj", "kernel"),
    "attn_v": ("attn", "v_proj", "kernel"),
    "attn_output": ("attn", "o_proj", "kernel"),
    "ffn_gate": ("mlp", "gate_proj", "kernel"),
    "ffn_up": ("mlp", "up_proj", "kernel"),
    "ffn_down": ("mlp", "down_proj", "kernel"),
}


def spec_of(arch, tie):
    return from_hf(
        {
            "model_type": arch,
            "vocab_size": 352,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,  # not hidden_size / num_attention_heads
            "rms_norm_eps": 1e-5,
            "rope_theta": 20000.0,
            "tie_word_embeddings": tie,
            "max_position_embeddings": 128,
            "bos_token_id": 0,
            "eos_token_id": [3, 1],
            "pad_token_id": 3,
        }
    )


def random_tree(spec, seed=0):
    rng = np.random.default_rng(seed)
    return {leaf.path: rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves(spec)}


def interleave(weight, heads):
    """What llama.cpp's converter does to q and k: row i and row i + h/2 of a head become neighbours."""
    out, half = np.empty_like(weight), weight.shape[0] // heads // 2
    for head in range(heads):
        start = head * 2 * half
        for i in range(half):
            out[start + 2 * i] = weight[start + i]
            out[start + 2 * i + 1] = weight[start + half + i]
    return out


def write(path, spec, tree, fields, quantise=(), skip=(), extra=(), keys=None):
    """A GGUF file as llama.cpp's converter would write it; `quantise` maps tensor names to types."""
    writer, quantise = gguf.GGUFWriter(path, spec.model_type), dict(quantise)
    writer.add_block_count(spec.num_layers)
    writer.add_context_length(spec.max_positions)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(spec.rope_theta)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    for key, value in {**fields, **(keys or {})}.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    tensors = {"token_embd.weight": tree["embed", "embedding"], "output_norm.weight": tree["final_norm", "scale"]}
    if not spec.tie_embeddings:
        tensors["output.weight"] = tree["lm_head", "kernel"].T
    for layer in range(spec.num_layers):
        for name, path_ in NAMES.items():
            tensors[f"blk.{layer}.{name}.weight"] = tree[("layers", *path_)][layer].T
            bias = ("layers", *path_[:-1], "bias")
            if bias in tree:
                tensors[f"blk.{layer}.{name}.bias"] = tree[bias][layer]
        if spec.qk_norm:
            for name in ("q_norm", "k_norm"):
                tensors[f"blk.{layer}.attn_{name}.weight"] = tree["layers", "attn", name, "scale"][layer]
        if spec.model_type == "llama":
            for name, heads in (("attn_q", spec.num_heads), ("attn_k", spec.num_kv_heads)):
                tensors[f"blk.{layer}.{name}.weight"] = interleave(tensors[f"blk.{layer}.{name}.weight"], heads)
    for name, array in {**tensors, **dict(extra)}.items():
        if name not in skip:
            kind = quantise.get(name)
            array = np.ascontiguousarray(array)
            writer.add_tensor(name, array if kind is None else gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(("arch", "tie"), [("llama", True), ("llama", False), ("qwen2", False), ("qwen3", True)])
def test_a_model_survives_its_gguf_file(tmp_path, make_gguf_fields, arch, tie):
    spec = spec_of(arch, tie)
    tree = random_tree(spec)
    write(tmp_path / "m.gguf", spec, tree, make_gguf_fields())
    read_spec, params, tokenizer = read_gguf(tmp_path / "m.gguf")
    assert read_spec == spec
    assert len(jax.tree.leaves(params)) == len(tree)
    for path, array in tree.items():
        assert get(params, path).dtype == np.float32
        np.testing.assert_array_equal(get(params, path), array, err_msg=str(path))
    assert tokenizer.decode(tokenizer.encode("Orsk, 47")) == "Orsk, 47"


@pytest.mark.parametrize(("kind", "error"), [("Q8_0", 0.02), ("Q4_1", 0.25), ("F16", 0.002), ("BF16", 0.02)])
def test_quantised_tensors_come_back_near_enough(tmp_path, make_gguf_fields, kind, error):
    spec = spec_of("llama", True)
    tree = random_tree(spec)
    names = ["token_embd.weight", "blk.1.attn_q.weight", "blk.0.ffn_down.weight"]
    write(tmp_path / "m.gguf", spec, tree, make_gguf_fields(), {name: gguf.GGMLQuantizationType[kind] for name in names})
    _, params, _ = read_gguf(tmp_path / "m.gguf")
    for path, layer in (
        (("embed", "embedding"), ...),
        (("layers", "attn", "q_proj", "kernel"), 1),
        (("layers", "mlp", "down_proj", "kernel"), 0),
    ):
        difference = np.abs(get(params, path)[layer] - tree[path][layer]).max()
        assert 0 < difference < error
    np.testing.assert_array_equal(params["layers"]["attn"]["q_proj"]["kernel"][0], tree["layers", "attn", "q_proj", "kernel"][0])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"skip": ["blk.1.ffn_up.weight"]}, "tensor blk.1.ffn_up.weight is missing"),
        ({"extra": [("blk.0.ffn_up.weight", np.zeros((8, 32), np.float32))]}, "blk.0.ffn_up.weight has shape"),
        ({"extra": [("blk.0.attn_q.bias", np.zeros(64, np.float32))]}, "blk.0.attn_q.bias has no place in the llama model"),
        ({"extra": [("rope_freqs.weight", np.ones(8, np.float32))]}, "scaled RoPE"),
        ({"keys": {"general.architecture": "gemma"}}, "general.architecture='gemma'"),
        ({"keys": {"llama.rope.scaling.type": "yarn"}}, "llama.rope.scaling.type='yarn'"),
        ({"keys": {"llama.expert_count": 8}}, "mixtures of experts"),
        ({"keys": {"tokenizer.ggml.pre": "tekken"}}, "tokenizer.ggml.pre='tekken'"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, make_gguf_fields, options, told):
    spec = spec_of("llama", True)
    fields = make_gguf_fields()
    if "keys" in options and "general.architecture" in options["keys"]:
        spec, options = dataclasses.replace(spec, model_type="gemma"), {}
    write(tmp_path / "m.gguf", spec, random_tree(spec), fields, **options)
    with pytest.raises(SealError) as error:
        read_gguf(tmp_path / "m.gguf")
    assert told in str(error.value) and "m.gguf" in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_no_gguf(tmp_path, make_gguf_fields):
    with pytest.raises(SealError, match="no such file"):
        read_gguf(tmp_path / "none.gguf")
    (tmp_path / "junk.gguf").write_bytes(b"not a model" * 100)
    with pytest.raises(SealError, match="not a readable GGUF"):
        read_gguf(tmp_path / "junk.gguf")
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(SealError, match="not a readable GGUF"):
        read_gguf(tmp_path / "empty.gguf")
    spec = spec_of("llama", True)
    write(tmp_path / "m.gguf", spec, random_tree(spec), make_gguf_fields())
    data = (tmp_path / "m.gguf").read_bytes()
    for cut in (100, 5000, len(data) - 2000):
        (tmp_path / "cut.gguf").write_bytes(data[:cut])
        with pytest.raises(SealError, match="not a readable GGUF"):
            read_gguf(tmp_path / "cut.gguf")
