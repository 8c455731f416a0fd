"""Text to token ids and back, with the model's own chat template, as transformers does it."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # or it says at every import that there is no torch, which is as meant
from transformers import PreTrainedTokenizerFast

from seal_jax.errors import SealError
from seal_jax.models.folder import one_line, read_json, write_json
from seal_jax.tasks.base import Prompt

# How byte-level BPE models cut text into words before merging, by the name that a GGUF file carries in `tokenizer.ggml.pre`
# (llama.cpp, `llama-vocab.cpp`). None: the `tokenizers` library's own GPT-2 rule.
LLAMA3_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS: dict[str, str | None] = {
    "gpt-2": None,
    "smollm": None,  # after every digit has been split off
    "llama-bpe": LLAMA3_WORDS,
    "qwen2": LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}"),
}
CONTROL, USER_DEFINED = 3, 4  # `tokenizer.ggml.token_type`
# Control tokens that end a text or a turn wherever they exist, beside the one that the file names.
END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "</s>")


# GPT-2's way of writing bytes as characters: those that print stand for themselves, the others, in order, for U+0100 and on.
_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_OF = {chr(b): b for b in _PRINTED} | {chr(0x100 + i): b for i, b in enumerate(sorted(set(range(0x100)).difference(_PRINTED)))}


def _byte_level(token: str) -> bytes | None:
    return bytes(BYTE_OF[c] for c in token) if all(c in BYTE_OF for c in token) else None


def _byte_fallback(token: str) -> bytes | None:
    """Llama 2's and Gemma's way: "▁" is a space, and a byte that is in no other token has one of its own, "<0x0A>"."""
    return bytes([int(token[3:5], 16)]) if re.fullmatch("<0x[0-9A-F]{2}>", token) else token.replace("▁", " ").encode()


class Tokenizer:
    """A fast tokenizer of transformers, with what generation and training need beside it.

    `eos_ids` stop generation; the first of them closes a training completion. `pad_id` fills rows up and never carries a loss.
    """

    def __init__(self, backend: PreTrainedTokenizerFast, eos_ids: Iterable[int] = (), pad_id: int | None = None, where: str = "tokenizer"):
        own = [] if backend.eos_token_id is None else [backend.eos_token_id]
        self.backend = backend
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys([*own, *eos_ids]))
        if not self.eos_ids:
            raise SealError(f"{where}: no end-of-text token; set eos_token in tokenizer_config.json or eos_token_id in config.json")
        pad_id = backend.pad_token_id if backend.pad_token_id is not None else pad_id
        self.pad_id: int = self.eos_ids[0] if pad_id is None else pad_id
        self.where = where

    @property
    def vocab_size(self) -> int:
        """Ids run from 0 to this, added tokens included."""
        return len(self.backend)

    @functools.cached_property
    def token_bytes(self) -> tuple[bytes | None, ...]:
        """What each id, from 0 to `vocab_size`, adds to a text, in bytes, which need not be whole characters.

        None for added tokens, special or not (they are markup, and other tokens can spell them), and for ids without a token.
        Raises `SealError` for a tokenizer whose tokens do not stand for bytes (WordPiece, say).
        """
        backend = self.backend.backend_tokenizer
        decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {"type": None}
        kinds = {d["type"] for d in decoder.get("decoders", [decoder])}
        if not kinds & {"ByteLevel", "ByteFallback"}:
            raise SealError(f"{self.where}: the tokens do not stand for bytes, which constrained sampling needs; expected byte-level BPE")
        read = _byte_level if "ByteLevel" in kinds else _byte_fallback
        added = backend.get_added_tokens_decoder()
        found: list[bytes | None] = [None] * self.vocab_size
        for token, i in backend.get_vocab(with_added_tokens=False).items():
            if i not in added and i < len(found):
                found[i] = read(token) or None
        return tuple(found)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`, as `tokenizer(text)` of transformers gives them.

        `add_special_tokens` adds what the model's tokenizer puts around raw text by itself: a beginning-of-text token for Llama 2 and 3,
        nothing for SmolLM2 and Qwen.
        """
        return list(self.backend(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """The ids that a prompt opens generation with. Messages go through the chat template, with the assistant's turn opened."""
        if prompt.messages is None:
            return self.encode(prompt.text or "")
        # The template writes the special tokens itself; adding them again would double the beginning-of-text token.
        return self.encode(self.render(prompt.messages), add_special_tokens=False)

    def encode_completion(self, prompt: Prompt, completion: str) -> tuple[list[int], list[int]]:
        """(prompt ids, completion ids with the end token) to train on what the model should write after `prompt`.

        The two are tokenised apart, because generation starts from the ids of the prompt alone.
        """
        return self.encode_prompt(prompt), [*self.encode(completion, add_special_tokens=False), self.eos_ids[0]]

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text that the chat template makes of `messages`, up to the opened assistant's turn; without thoughts, where the template can
        leave them out (Qwen3), since what follows is taken for the self-edit, or the answer."""
        if not self.backend.chat_template:
            raise SealError(f"{self.where}: the model has no chat template; use a text prompt, or an instruction-tuned model")
        try:
            return self.backend.apply_chat_template(
                [dict(m) for m in messages], tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        except Exception as error:  # jinja's own errors and whatever a template raises by raise_exception
            raise SealError(f"{self.where}: the chat template refuses the messages: {one_line(error)}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, without special tokens."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the tokenizer files that `AutoTokenizer.from_pretrained` reads."""
        self.backend.save_pretrained(str(folder))
        # transformers 5 names the class in a way that 4 does not know; both know this one.
        path = Path(folder) / "tokenizer_config.json"
        write_json(path, read_json(path) | {"tokenizer_class": "PreTrainedTokenizerFast"})

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str], eos_ids: Iterable[int] = (), pad_id: int | None = None) -> Tokenizer:
        """The tokenizer in a folder of transformers files. `eos_ids` and `pad_id` come from the model's config."""
        if not any((Path(folder) / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")):
            raise SealError(f"{folder}: no tokenizer files; expected tokenizer.json beside the model")
        from transformers import AutoTokenizer  # here, because it takes seconds where torch is installed

        try:
            # Never run code from the folder, nor ask about it on the terminal.
            backend = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # many kinds, by what is broken
            raise SealError(f"{folder}: the tokenizer cannot be read: {one_line(error)}") from None
        if not isinstance(backend, PreTrainedTokenizerFast):
            raise SealError(f"{folder}: no fast tokenizer ({type(backend).__name__}); expected tokenizer.json")
        return cls(backend, eos_ids, pad_id, str(folder))

    @classmethod
    def from_gguf_metadata(cls, fields: Mapping[str, Any], where: str = "GGUF") -> Tokenizer:
        """The byte-level BPE tokenizer that the metadata of a GGUF file describes; `fields` maps names to plain values."""
        kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
        if kind != "gpt2":
            raise SealError(f"{where}: tokenizer.ggml.model={kind!r} is not supported; supported: gpt2 (byte-level BPE)")
        if pre not in WORDS:
            raise SealError(f"{where}: tokenizer.ggml.pre={pre!r} is not supported; supported: {', '.join(WORDS)}")
        try:
            tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
            # The separator is the first space after the first character, which may be a space itself.
            cuts = [(merge, merge.index(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
            eos = tokens[fields["tokenizer.ggml.eos_token_id"]]
        except (KeyError, ValueError, IndexError) as error:
            raise SealError(f"{where}: the tokenizer metadata is incomplete ({one_line(error)})") from None
        backend = Backend(
            models.BPE(
                vocab={token: i for i, token in enumerate(tokens)},
                merges=[(merge[:cut], merge[cut + 1 :]) for merge, cut in cuts],
                ignore_merges=pre == "llama-bpe",  # whole words that are tokens are taken as they are
            )
        )
        split = WORDS[pre]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
        before = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
        before += [pre_tokenizers.Split(Regex(split), "isolated")] if split else []
        backend.pre_tokenizer = pre_tokenizers.Sequence([*before, byte_level])
        backend.decoder = decoders.ByteLevel()
        if pre == "qwen2":
            backend.normalizer = normalizers.NFC()
        backend.add_special_tokens(
            [AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, types, strict=True) if k == CONTROL]
        )
        backend.add_tokens([AddedToken(t, normalized=False) for t, k in zip(tokens, types, strict=True) if k == USER_DEFINED])

        def named(key: str) -> str | None:
            i = fields.get(f"tokenizer.ggml.{key}_token_id")
            return None if i is None else tokens[i]

        bos = named("bos")
        # What llama.cpp does where the file says nothing.
        if fields.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe") and bos is not None:
            backend.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, backend.token_to_id(bos))]
            )
        names = {"bos_token": bos, "eos_token": eos, "pad_token": named("padding"), "unk_token": named("unknown")}
        fast = PreTrainedTokenizerFast(
            tokenizer_object=backend, clean_up_tokenization_spaces=False, **{k: v for k, v in names.items() if v is not None}
        )
        fast.chat_template = fields.get("tokenizer.chat_template")
        control = {t: i for i, (t, k) in enumerate(zip(tokens, types, strict=True)) if k == CONTROL}
        return cls(fast, [control[t] for t in END_TOKENS if t in control], where=where)
