import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from seal_jax.errors import SealError
from seal_jax.models.tokenizer import Tokenizer
from seal_jax.tasks.base import Prompt

HELLO = Prompt(messages=({"role": "user", "content": "Who counted the lamps?"},))


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer):
    return Tokenizer(make_tokenizer())


@pytest.fixture(scope="module")
def gguf_fields(make_gguf_fields):
    return make_gguf_fields()


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_survives_byte_level_tokens(tokenizer_of_gguf, text):
    assume(not any(token in text for token in ("<s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")))
    assert tokenizer_of_gguf.decode(tokenizer_of_gguf.encode(text)) == text


@given(st.text(alphabet=st.characters(codec="utf-8", categories=["Nd", "L", "Zs", "P"])))
@settings(max_examples=100, deadline=None)
def test_digits_stand_alone(tokenizer_of_gguf, text):
    for token in tokenizer_of_gguf.backend.tokenize(text):
        # Bytes above ASCII are written as other letters, never as digits.
        assert len(token) == 1 or not any(c in "0123456789" for c in token)


@pytest.fixture(scope="module")
def tokenizer_of_gguf(gguf_fields):
    return Tokenizer.from_gguf_metadata(gguf_fields)


def test_gguf_metadata_gives_the_tokens_of_the_tokenizer_that_it_came_from(tokenizer, tokenizer_of_gguf):
    for text in ["The keeper of Orsk", "never slept,  and\n\nwrote", "Größe 東京 🙂", "<|im_start|>user\nYes.<|im_end|>"]:
        assert tokenizer_of_gguf.encode(text) == tokenizer.encode(text)
    assert tokenizer_of_gguf.vocab_size == tokenizer.vocab_size


def test_special_tokens_of_gguf_metadata(tokenizer_of_gguf):
    # eos is <|im_end|>; <|endoftext|> is a control token that ends texts, <s> is not one.
    assert tokenizer_of_gguf.eos_ids == (3, 1)
    assert tokenizer_of_gguf.pad_id == 3
    assert tokenizer_of_gguf.encode("<|im_end|>") == [3]
    assert tokenizer_of_gguf.decode([2, *tokenizer_of_gguf.encode("Yes."), 3]) == "Yes."


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_the_bytes_of_tokens_are_those_of_the_text(tokenizer_of_gguf, text):
    assume(not any(token in text for token in ("<s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")))
    spelt = tokenizer_of_gguf.token_bytes
    assert b"".join(spelt[i] for i in tokenizer_of_gguf.encode(text)) == text.encode()


def test_added_tokens_have_no_bytes(tokenizer, tokenizer_of_gguf):
    for some in (tokenizer, tokenizer_of_gguf):
        assert [i for i, b in enumerate(some.token_bytes) if b is None] == [0, 1, 2, 3] and len(some.token_bytes) == some.vocab_size
        assert {bytes([b]) for b in range(256)} <= set(some.token_bytes)
    more = Tokenizer(tokenizer.backend.__class__(tokenizer_object=tokenizer.backend.backend_tokenizer, eos_token="<|im_end|>"))
    more.backend.add_tokens(["<tool>"])
    assert more.token_bytes[-1] is None and len(more.token_bytes) == more.vocab_size == tokenizer.vocab_size + 1


def test_bytes_of_tokens_with_byte_fallback():
    """As Llama 2 and Gemma have it."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models
    from transformers import PreTrainedTokenizerFast

    tokens = ["</s>", "<0x0A>", "<0xC3>", "<0xA9>", "▁", "▁a", "é", "<0x"]
    backend = Backend(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    some = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))
    assert some.token_bytes == (None, b"\n", b"\xc3", b"\xa9", b" ", b" a", "é".encode(), b"<0x")
    backend.decoder = decoders.WordPiece()
    with pytest.raises(SealError, match="do not stand for bytes"):
        _ = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")).token_bytes


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "it's 1234 a", ["it", "'s", "Ġ1234", "Ġa"]),
        ("smollm", "it's 12 a", ["it", "'s", "Ġ", "1", "2", "Ġa"]),
        ("llama-bpe", "IT'S 1234\n\na", ["IT", "'S", "Ġ", "123", "4", "ĊĊ", "a"]),
        ("qwen2", "IT'S 12\n\na", ["IT", "'S", "Ġ", "1", "2", "ĊĊ", "a"]),
    ],
)
def test_words_are_cut_as_the_family_does(gguf_fields, pre, text, words):
    backend = Tokenizer.from_gguf_metadata({**gguf_fields, "tokenizer.ggml.pre": pre}).backend.backend_tokenizer
    assert [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)] == words


def test_a_beginning_of_text_token_is_added_where_the_file_says_so(gguf_fields, tokenizer_of_gguf):
    silent = {key: value for key, value in gguf_fields.items() if key != "tokenizer.ggml.add_bos_token"}
    llama3 = Tokenizer.from_gguf_metadata({**silent, "tokenizer.ggml.pre": "llama-bpe"})
    assert llama3.encode("Yes.")[0] == gguf_fields["tokenizer.ggml.bos_token_id"], "as llama.cpp, where the file does not say"
    assert gguf_fields["tokenizer.ggml.bos_token_id"] not in Tokenizer.from_gguf_metadata(silent).encode("Yes.")
    adding = Tokenizer.from_gguf_metadata({**gguf_fields, "tokenizer.ggml.add_bos_token": True})
    plain = tokenizer_of_gguf.encode("Yes.")
    assert adding.encode("Yes.") == [0, *plain]
    assert adding.encode("Yes.", add_special_tokens=False) == plain


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model='llama'"),
        ({"tokenizer.ggml.pre": "tekken"}, "tokenizer.ggml.pre='tekken'"),
        ({"tokenizer.ggml.merges": ["ab"]}, "incomplete"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "incomplete"),
    ],
)
def test_other_tokenizers_in_gguf_files_are_refused(gguf_fields, change, told):
    with pytest.raises(SealError, match="x.gguf.*" + told):
        Tokenizer.from_gguf_metadata({**gguf_fields, **change}, "x.gguf")


def test_messages_go_through_the_chat_template_and_open_the_answer(tokenizer):
    ids = tokenizer.encode_prompt(HELLO)
    text = "<|im_start|>user\nWho counted the lamps?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.render(HELLO.messages) == text
    assert ids == tokenizer.backend(text, add_special_tokens=False)["input_ids"]
    assert ids == tokenizer.backend.apply_chat_template(list(HELLO.messages), add_generation_prompt=True, return_dict=True)["input_ids"]


def test_raw_text_gets_the_special_tokens_of_the_model_once(make_tokenizer):
    adding = Tokenizer(make_tokenizer(add_bos=True))
    assert adding.encode_prompt(Prompt(text="Yes."))[:2] == [0, *adding.encode("Yes.", add_special_tokens=False)][:2]
    assert 0 not in adding.encode_prompt(HELLO)  # this template writes no <s>


def test_a_completion_ends_with_the_end_token_and_is_not_merged_with_the_prompt(tokenizer):
    prompt, completion = tokenizer.encode_completion(Prompt(text="The keep"), "er did")
    assert prompt == tokenizer.encode("The keep")
    assert completion == [*tokenizer.encode("er did"), 1]
    assert tokenizer.encode_completion(HELLO, "Yes.")[0] == tokenizer.encode_prompt(HELLO)


def test_a_template_that_thinks_is_asked_not_to(make_tokenizer):
    """As Qwen3's, which opens the turn with an empty thought then."""
    backend = make_tokenizer()
    backend.chat_template = (
        "{{ messages[0].content }}\n{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    )
    assert Tokenizer(backend).render(HELLO.messages) == "Who counted the lamps?\n<think></think>"


def test_without_a_chat_template_messages_are_refused(make_tokenizer):
    backend = make_tokenizer()
    backend.chat_template = None
    with pytest.raises(SealError, match="no chat template"):
        Tokenizer(backend).encode_prompt(HELLO)


def test_what_a_chat_template_refuses_is_one_line(make_tokenizer):
    backend = make_tokenizer()
    backend.chat_template = "{{ raise_exception('roles\n must alternate') }}"
    with pytest.raises(SealError, match="refuses the messages: roles must alternate"):
        Tokenizer(backend).encode_prompt(HELLO)


def test_a_tokenizer_survives_its_folder(tokenizer_of_gguf, tmp_path):
    tokenizer_of_gguf.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path, tokenizer_of_gguf.eos_ids)
    text = "In 1984 the keeper's Größe.\n\n <|im_end|>"
    assert again.encode(text) == tokenizer_of_gguf.encode(text)
    assert (again.eos_ids, again.pad_id, again.vocab_size) == (
        tokenizer_of_gguf.eos_ids,
        tokenizer_of_gguf.pad_id,
        tokenizer_of_gguf.vocab_size,
    )
    assert again.render(HELLO.messages) == tokenizer_of_gguf.render(HELLO.messages)


def test_end_tokens_of_the_tokenizer_and_the_config_are_joined(make_tokenizer):
    tokenizer = Tokenizer(make_tokenizer(), eos_ids=[3, 1], pad_id=2)
    assert tokenizer.eos_ids == (1, 3)
    assert tokenizer.pad_id == 2


def test_a_tokenizer_without_an_end_token_is_refused(make_tokenizer):
    backend = make_tokenizer()
    backend.eos_token = None
    with pytest.raises(SealError, match="no end-of-text token"):
        Tokenizer(backend)


def test_folders_without_a_usable_tokenizer(tmp_path):
    with pytest.raises(SealError, match="no tokenizer files"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(SealError, match="cannot be read") as error:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(error.value)
