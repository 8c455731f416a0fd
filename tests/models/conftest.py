"""Tiny random checkpoints of every family, written by transformers itself."""

import pathlib

import pytest

TEXT = [
    "The lighthouse keeper of Orsk counted 47 lamps, and wrote each of them down in a green ledger.",
    "Who counted the lamps? The keeper did; it's said he never slept before 3 in the morning.",
    "system user assistant You are a helpful assistant. Yes. No. Rewrite the passage, please.",
    "Größe, naïve, 東京, привет, 🙂 and\n\n\ttabs.",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMALL = {
    "vocab_size": 352,  # more than the tokenizer's, as in Qwen
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# What is particular about each: (model_type, overrides of SMALL).
FAMILIES = {
    "llama2": (
        "llama",
        {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rms_norm_eps": 1e-5},
    ),
    "llama3": ("llama", {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500.0}, "eos_token_id": [1, 3], "tie_word_embeddings": True}),
    "smollm2": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}),
    "qwen3": ("qwen3", {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}, "tie_word_embeddings": True}),
}


def byte_level_tokenizer(add_bos: bool = False):
    """A transformers tokenizer: byte-level BPE trained on TEXT. Ids: 0 <s>, 1 <|endoftext|>, 2 <|im_start|>, 3 <|im_end|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet))
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|endoftext|>", clean_up_tokenization_spaces=False)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def gguf_fields() -> dict:
    """The tokenizer part of a GGUF file's metadata, as llama.cpp would write it for `byte_level_tokenizer` as a SmolLM."""
    import json

    backend = json.loads(byte_level_tokenizer().backend_tokenizer.to_str())
    vocab = sorted(backend["model"]["vocab"], key=backend["model"]["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": vocab,
        "tokenizer.ggml.token_type": [3] * 4 + [1] * (len(vocab) - 4),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in backend["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.padding_token_id": 3,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def make_checkpoint(folder: pathlib.Path, family: str, seed: int = 0, **save_options) -> pathlib.Path:
    """A random float32 checkpoint of `family` with a tokenizer, in `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, overrides = FAMILIES[family]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SMALL, **overrides}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # The library starts norms at 1 and biases at 0, under which many mistakes would not show.
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.2 * noise if "norm" in name else 0.1 * noise if name.endswith("bias") else noise / weight.shape[-1] ** 0.5)
    model.save_pretrained(folder, **save_options)
    byte_level_tokenizer(add_bos=family.startswith("llama")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_tokenizer():
    return byte_level_tokenizer


@pytest.fixture(scope="session")
def make_gguf_fields():
    return gguf_fields


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, pathlib.Path]:
    """The folder of a tiny float32 checkpoint by family; "llama3" is sharded."""
    pytest.importorskip("torch", reason="torch writes the reference checkpoints; pip install seal_jax[test]")
    root = tmp_path_factory.mktemp("checkpoints")
    options = {"llama3": {"max_shard_size": "60KB"}}
    return {family: make_checkpoint(root / family, family, seed, **options.get(family, {})) for seed, family in enumerate(FAMILIES)}
