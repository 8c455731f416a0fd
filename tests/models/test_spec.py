import json

import pytest

from seal_jax.errors import SealError
from seal_jax.models.spec import RopeScaling, from_hf, to_hf

LLAMA = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
}
LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 4096,
    "rope_type": "llama3",
}


def test_both_styles_of_rope_configuration_give_the_same_spec():
    old = from_hf({**LLAMA, "rope_theta": 500000.0, "rope_scaling": LLAMA3})
    new = from_hf({**LLAMA, "rope_parameters": {**LLAMA3, "rope_theta": 500000.0}})
    assert old == new
    assert hash(old) == hash(new)
    assert old.rope_theta == 500000.0
    assert old.rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 4096)


def test_what_a_config_leaves_out_is_what_transformers_assumes():
    spec = from_hf({k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps")})
    assert (spec.num_kv_heads, spec.head_dim, spec.max_positions, spec.norm_eps) == (4, 6, 2048, 1e-6)
    assert (spec.rope_theta, spec.rope_scaling, spec.tie_embeddings) == (10000.0, None, False)
    assert (spec.bos_id, spec.eos_ids, spec.pad_id) == (1, (2,), None)
    qwen3 = from_hf({**LLAMA, "model_type": "qwen3"})
    assert (qwen3.head_dim, qwen3.qk_norm, qwen3.qkv_bias, qwen3.eos_ids) == (128, True, False, ())
    qwen2 = from_hf({**LLAMA, "model_type": "qwen2"})
    assert (qwen2.head_dim, qwen2.qk_norm, qwen2.qkv_bias) == (6, False, True)


@pytest.mark.parametrize(("value", "ids"), [(7, (7,)), ([7, 9, 7], (7, 9)), (None, ()), (-1, ())])
def test_end_tokens_are_one_or_many(value, ids):
    assert from_hf({**LLAMA, "eos_token_id": value}).eos_ids == ids


def test_a_sliding_window_that_no_layer_uses_is_accepted():
    qwen = {**LLAMA, "model_type": "qwen2", "sliding_window": 64}
    plain = from_hf(qwen)
    assert from_hf({**qwen, "use_sliding_window": False, "max_window_layers": 0}) == plain
    assert from_hf({**qwen, "use_sliding_window": True, "max_window_layers": 2}) == plain
    assert from_hf({**qwen, "layer_types": ["full_attention"] * 2}) == plain


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "mixtral"}, ["model_type='mixtral'", "llama, qwen2, qwen3"]),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"hidden_size": "24"}, ["hidden_size='24'"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers=0"]),
        ({"num_attention_heads": 5}, ["hidden_size=24", "num_attention_heads=5"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads=4", "num_key_value_heads=3"]),
        ({"head_dim": 7}, ["head_dim=7"]),
        ({"rms_norm_eps": "tiny"}, ["rms_norm_eps='tiny'"]),
        ({"eos_token_id": "</s>"}, ["eos_token_id='</s>'"]),
        ({"attention_bias": True}, ["attention_bias=True", "false"]),
        ({"mlp_bias": True}, ["mlp_bias=True"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "silu"]),
        ({"pretraining_tp": 2}, ["pretraining_tp=2"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["rope_scaling", "'dynamic'", "linear, llama3"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, ["rope_parameters", "'yarn'"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["rope_scaling.low_freq_factor"]),
        ({"rope_scaling": "linear"}, ["rope_scaling='linear'"]),
        ({"rope_parameters": LLAMA3, "rope_scaling": {**LLAMA3, "factor": 2.0}}, ["rope_parameters={", "rope_scaling={", "different"]),
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 1024}, ["original_max_position_embeddings=1024, and 4096"]),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ["partial_rotary_factor=0.5"]),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, ["use_sliding_window=True"]),
        ({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "full_attention"]),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(change, told):
    with pytest.raises(SealError) as error:
        from_hf({**LLAMA, **change}, "somewhere/config.json")
    message = str(error.value)
    assert message.startswith("somewhere/config.json: ") and "\n" not in message
    for part in told:
        assert part in message


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("scaling", [None, LLAMA3, {"rope_type": "linear", "factor": 2.0}])
def test_a_spec_survives_its_config_file(model_type, scaling):
    config = {**LLAMA, "model_type": model_type, "head_dim": 16, "rope_scaling": scaling, "eos_token_id": [3, 5], "pad_token_id": 3}
    spec = from_hf({**config, "rope_theta": 5e5, "tie_word_embeddings": True})
    assert from_hf(json.loads(json.dumps(to_hf(spec)))) == spec


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_the_config_as_meant(model_type, tmp_path):
    transformers = pytest.importorskip("transformers")
    spec = from_hf({**LLAMA, "model_type": model_type, "rope_theta": 5e5, "rope_scaling": LLAMA3, "eos_token_id": [3, 5]})
    (tmp_path / "config.json").write_text(json.dumps(to_hf(spec)))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == model_type
    assert from_hf(config.to_dict()) == spec
