"""Model folders in the format of transformers: `config.json`, safetensors, tokenizer files. Hub ids are fetched into such a folder.

Weights go tensor by tensor from the file into the array that the decoder uses: host memory never holds a second copy of the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors then reads
import numpy as np

from seal_jax.errors import SealError
from seal_jax.models.folder import new_folder, one_line, open_safetensors, read_json, save_safetensors, write_json
from seal_jax.models.spec import DecoderSpec, from_hf, to_hf, token_ids
from seal_jax.models.tokenizer import Tokenizer
from seal_jax.models.tree import Leaf, get, leaves, nest

Sharding = Callable[[tuple[str, ...], tuple[int, ...]], "jax.sharding.Sharding | None"]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ROWS = 4096  # of two tensors that are compared, in memory at once
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
HUB_SECONDS = 10.0  # for the hub to answer
FLOATS = {"F64", "F32", "F16", "BF16"}
# In some checkpoints beside the weights, and recomputed or unused here.
IGNORED = re.compile(r"(model\.layers\.\d+\.self_attn\.|model\.)rotary_emb\.inv_freq")


def resolve(name: str, key: str = "model.name") -> Path:
    """The local folder or GGUF file that `name` means: a path, or a hub id, which is fetched into the hub's cache.

    `key` is that of the config which gave it, for messages.
    """
    path = Path(name).expanduser()
    if path.exists():
        if path.is_dir() or path.suffix == ".gguf":
            return path
        raise SealError(f"{key}={name!r}: expected a model folder or a .gguf file")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name[0] in "./" or path.suffix == ".gguf":
        raise SealError(f"{key}={name!r}: no such folder or file, and not a hub id (owner/name); 'embedded' needs neither")
    return _snapshot(name, key)


def _snapshot(name: str, key: str) -> Path:
    """The local copy of a hub model, fetched as far as it is not in the hub's cache; without a connection, the copy in the cache."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    what, hint = f"{key}={name!r}", f"give a local folder as {key}, or use {key}=embedded"
    files = {"allow_patterns": ["*.json", "model*.safetensors", "tokenizer*", "merges.txt", "*.jinja"], "ignore_patterns": ["*/*"]}
    try:
        try:
            # Asked first, with a timeout: `snapshot_download` itself waits for ever on a server that accepts and does not answer.
            revision = HfApi().model_info(name, timeout=HUB_SECONDS).sha
        except (GatedRepoError, RepositoryNotFoundError, HFValidationError):
            raise
        except Exception as error:  # of whichever HTTP library the hub's client uses
            reason = one_line(error, 120)
            try:
                return Path(snapshot_download(name, local_files_only=True, **files))
            except LocalEntryNotFoundError:
                raise SealError(f"{what}: the hub cannot be reached ({reason}) and has left no copy in its cache; {hint}") from None
        return Path(snapshot_download(name, revision=revision, **files))
    except SealError:
        raise
    except GatedRepoError:
        raise SealError(f"{what}: the hub wants an account with access to it (HF_TOKEN); or {hint}") from None
    except RepositoryNotFoundError:
        raise SealError(f"{what}: the hub has no such model, or it is private (HF_TOKEN); or {hint}") from None
    except HFValidationError as error:
        raise SealError(f"{what}: no such folder, and not a hub id ({one_line(error, 120)}); {hint}") from None
    except Exception as error:
        raise SealError(f"{what}: fetching from the hub failed ({one_line(error)}); try again, or {hint}") from None


def read_spec(folder: str | os.PathLike[str]) -> tuple[DecoderSpec, Tokenizer]:
    """(spec, tokenizer) of a model folder. End tokens are those of config.json, generation_config.json and the tokenizer."""
    folder = Path(folder)
    config = read_json(folder / "config.json")
    generation = read_json(folder / "generation_config.json") if (folder / "generation_config.json").exists() else {}
    spec = from_hf(config, str(folder / "config.json"))
    more = token_ids(generation.get("eos_token_id"), "eos_token_id", str(folder / "generation_config.json"))
    eos_ids = tuple(dict.fromkeys([*more, *spec.eos_ids]))
    tokenizer = Tokenizer.from_folder(folder, eos_ids, spec.pad_id)
    return dataclasses.replace(spec, eos_ids=tokenizer.eos_ids), tokenizer


def read_folder(folder: str | os.PathLike[str], dtype: Any = jnp.float32) -> tuple[DecoderSpec, dict[str, Any], Tokenizer]:
    """(spec, params, tokenizer) of a model folder, the parameters on the default device."""
    spec, tokenizer = read_spec(folder)
    return spec, load_params(folder, spec, dtype), tokenizer


def check_params(folder: str | os.PathLike[str], spec: DecoderSpec) -> None:
    """Raises `SealError` as `load_params` would; of the safetensors only their lists of contents are read."""
    with contextlib.ExitStack() as stack:
        _Tensors(Path(folder), stack).check(spec)


def load_params(folder: str | os.PathLike[str], spec: DecoderSpec, dtype: Any, sharding: Sharding | None = None) -> dict[str, Any]:
    """The decoder's tree of jax arrays, in `dtype`, from the safetensors in `folder`."""
    with contextlib.ExitStack() as stack:
        tensors = _Tensors(Path(folder), stack)
        tensors.check(spec)
        flat = {}
        for leaf in leaves(spec):
            flat[leaf.path] = place(leaf.path, leaf.shape, dtype, lambda index, leaf=leaf: tensors.read(leaf, index, spec, dtype), sharding)
        return nest(flat)


def place(
    path: tuple[str, ...], shape: tuple[int, ...], dtype: Any, read: Callable[[Any], np.ndarray], sharding: Sharding | None
) -> jax.Array:
    """A finished leaf: `read(index)` gives the part of it that `index` (a tuple of slices) selects."""
    where = None if sharding is None else sharding(path, shape)
    if where is None:
        return jnp.asarray(read(tuple(slice(None) for _ in shape)), dtype)
    parts: dict[Any, np.ndarray] = {}  # devices that hold the same part get it from one read

    def part(index: Any) -> np.ndarray:
        key = tuple((s.start, s.stop) for s in index)
        if key not in parts:
            parts[key] = np.asarray(read(index)).astype(dtype, copy=False)
        return parts[key]

    return jax.make_array_from_callback(shape, where, part)


class _Tensors:
    """The tensors of a checkpoint by name, over all its files."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack):
        self.folder = folder
        if (folder / INDEX).exists():
            table = read_json(folder / INDEX).get("weight_map")
            if not isinstance(table, dict) or not table or not all(isinstance(file, str) for file in table.values()):
                raise SealError(f"{folder / INDEX}: no weight_map of tensor names to files; fetch the model again")
            files = sorted(set(table.values()))
        elif (folder / SINGLE).exists():
            files = [SINGLE]
        else:
            raise SealError(f"{folder}: no {SINGLE} or {INDEX}; expected weights as safetensors")
        self.file_of: dict[str, str] = {}
        self.handles: dict[str, Any] = {}
        for file in files:
            hint = f"{INDEX} names it; fetch the model again"
            self.handles[file] = stack.enter_context(open_safetensors(folder / file, hint))
            self.file_of |= dict.fromkeys(self.handles[file].keys(), file)

    def check(self, spec: DecoderSpec) -> None:
        """Every tensor that the model needs is there, in its shape, and none that it does not know."""
        known = set()
        for leaf in leaves(spec):
            for name in leaf.names(spec):
                known.add(name)
                if name not in self.file_of:
                    raise SealError(f"{self.folder}: tensor {name} is missing; the checkpoint is incomplete or of another architecture")
                where = self.folder / self.file_of[name]
                piece = self.handles[self.file_of[name]].get_slice(name)
                if tuple(piece.get_shape()) != leaf.stored_shape:
                    raise SealError(f"{where}: tensor {name} has shape {piece.get_shape()}; config.json asks for {list(leaf.stored_shape)}")
                if piece.get_dtype() not in FLOATS:
                    raise SealError(f"{where}: tensor {name} is stored as {piece.get_dtype()}; supported: {', '.join(sorted(FLOATS))}")
        if spec.tie_embeddings and HEAD in self.file_of:
            known.add(HEAD)
            if not self._same(HEAD, EMBEDDING):
                raise SealError(
                    f"{self.folder / self.file_of[HEAD]}: {HEAD} is not the embedding, as config.json says; set tie_word_embeddings "
                    "to false there to use it, or take it out of the file"
                )
        for name in sorted(self.file_of):
            if name not in known and not IGNORED.fullmatch(name):
                raise SealError(
                    f"{self.folder / self.file_of[name]}: tensor {name} has no place in the {spec.model_type} model of config.json"
                )

    def _same(self, *names: str) -> bool:
        """Whether tensors are equal, some rows at a time."""
        pieces = [self.handles[self.file_of[name]].get_slice(name) for name in names]
        first = pieces[0].get_shape()
        parts = (slice(i, min(i + ROWS, first[0])) for i in range(0, first[0], ROWS))
        return all(p.get_shape() == first for p in pieces) and all(
            np.array_equal(*(p[part].astype(np.float32) for p in pieces), equal_nan=True) for part in parts
        )

    def read(self, leaf: Leaf, index: tuple[slice, ...], spec: DecoderSpec, dtype: Any) -> np.ndarray:
        """The part of `leaf` that `index` selects, in `dtype`; only that part is read."""
        names = leaf.names(spec)
        if not leaf.stacked:
            return self._one(names[0], index, leaf, dtype)
        names, rest = names[index[0]], index[1:]
        sizes = [len(range(*s.indices(n))) for s, n in zip(rest, leaf.shape[1:], strict=True)]
        out = np.empty((len(names), *sizes), dtype)
        for i, name in enumerate(names):
            out[i] = self._one(name, rest, leaf, dtype)
        return out

    def _one(self, name: str, index: tuple[slice, ...], leaf: Leaf, dtype: Any) -> np.ndarray:
        piece = self.handles[self.file_of[name]].get_slice(name)
        array = piece[index[::-1] if leaf.transposed else index]
        return (array.T if leaf.transposed else array).astype(dtype, copy=False)


def save_folder(
    path: str | os.PathLike[str], spec: DecoderSpec, params: dict[str, Any], tokenizer: Tokenizer, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Write a model folder that `AutoModelForCausalLM` and `AutoTokenizer` of transformers load, in the parameters' dtype.

    One shard at most is copied to host memory at a time. Raises `SealError` if `path` holds something already or cannot be written.
    """
    dtype = str(get(params, ("embed", "embedding")).dtype)
    shards: list[list[tuple[str, Leaf, int]]] = [[]]
    size = 0
    for leaf in leaves(spec):
        array = get(params, leaf.path)
        if tuple(array.shape) != leaf.shape:
            raise ValueError(f"{'.'.join(leaf.path)} has shape {array.shape}, the spec asks for {leaf.shape}")
        for i, name in enumerate(leaf.names(spec)):
            one = array.nbytes // len(leaf.names(spec))
            if shards[-1] and size + one > max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append((name, leaf, i))
            size += one
    with new_folder(path) as tmp:
        index: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            save_safetensors({name: _stored(get(params, leaf.path), leaf, i) for name, leaf, i in shard}, tmp / file)
            index |= {name: file for name, _, _ in shard}
        if len(shards) > 1:
            total = sum(get(params, leaf.path).nbytes for leaf in leaves(spec))
            write_json(tmp / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
        write_json(tmp / "config.json", to_hf(spec, dtype))
        ids = {"bos_token_id": spec.bos_id, "eos_token_id": list(spec.eos_ids), "pad_token_id": tokenizer.pad_id}
        write_json(tmp / "generation_config.json", {key: value for key, value in ids.items() if value is not None})
        tokenizer.save(tmp)


def _stored(array: Any, leaf: Leaf, layer: int) -> np.ndarray:
    """One tensor of a leaf on the host, as a checkpoint holds it."""
    host = np.asarray(array[layer] if leaf.stacked else array)
    return np.ascontiguousarray(host.T if leaf.transposed else host)
