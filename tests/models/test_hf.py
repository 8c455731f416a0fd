import json
import os
import shutil
import socket
import threading
import time
import weakref
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from seal_jax.errors import SealError
from seal_jax.models import hf
from seal_jax.models.tree import get, leaves

FAMILIES = ["llama2", "llama3", "smollm2", "qwen2", "qwen3"]


def tensors_of(folder):
    return {name: array for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_lands_in_its_leaf(checkpoints, family):
    stored = tensors_of(checkpoints[family])
    spec, params, tokenizer = hf.read_folder(checkpoints[family])
    assert spec.eos_ids == tokenizer.eos_ids
    count = 0
    for leaf in leaves(spec):
        array = np.asarray(get(params, leaf.path))
        assert array.shape == leaf.shape and array.dtype == np.float32
        for i, name in enumerate(leaf.names(spec)):
            one = array[i] if leaf.stacked else array
            np.testing.assert_array_equal(one.T if leaf.transposed else one, stored[name], err_msg=name)
            count += 1
    assert count == len(stored)
    assert len(jax.tree.leaves(params)) == len(leaves(spec))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_we_save_transformers_loads(checkpoints, family, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec, params, tokenizer = hf.read_folder(checkpoints[family])
    hf.save_folder(tmp_path / "out", spec, params, tokenizer)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    theirs = AutoModelForCausalLM.from_pretrained(checkpoints[family])
    assert ours.dtype == torch.float32
    assert ours.generation_config.eos_token_id == list(spec.eos_ids)
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    ids = torch.arange(5, 17)[None]
    assert torch.equal(ours(ids).logits, theirs(ids).logits)  # the configs mean the same too
    text = "The keeper counted 47 lamps."
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"] == tokenizer.encode(text)
    assert hf.read_spec(tmp_path / "out")[0] == spec


def test_large_models_are_saved_in_shards(checkpoints, tmp_path):
    spec, params, tokenizer = hf.read_folder(checkpoints["qwen2"])
    hf.save_folder(tmp_path / "out", spec, params, tokenizer, max_shard_bytes=50_000)
    index = json.loads((tmp_path / "out" / hf.INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1 and not (tmp_path / "out" / hf.SINGLE).exists()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(params))
    for file in files:
        assert sum(a.nbytes for a in load_file(tmp_path / "out" / file).values()) <= 50_000
    again = hf.load_params(tmp_path / "out", spec, jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_bfloat16_is_stored_read_and_cast(checkpoints, tmp_path):
    spec, params, tokenizer = hf.read_folder(checkpoints["smollm2"])
    low = hf.load_params(checkpoints["smollm2"], spec, jnp.bfloat16)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(low), strict=True):
        assert b.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(a).astype(ml_dtypes.bfloat16), np.asarray(b))
    hf.save_folder(tmp_path / "out", spec, low, tokenizer)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert all(array.dtype == ml_dtypes.bfloat16 for array in tensors_of(tmp_path / "out").values())
    high = hf.load_params(tmp_path / "out", spec, jnp.float32)
    for a, b in zip(jax.tree.leaves(low), jax.tree.leaves(high), strict=True):
        assert b.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(a).astype(np.float32), np.asarray(b))


def test_a_sharded_leaf_reads_only_the_slices_of_its_devices(checkpoints, monkeypatch):
    """A stand-in for several devices asks for parts, as `make_array_from_callback` does on a mesh; the parts make up the whole."""
    spec, params, _ = hf.read_folder(checkpoints["qwen2"])
    read = []

    def parts(shape, sharding, callback):
        n, out = shape[0], shape[-1]
        whole = np.full(shape, np.nan, np.float32)
        middle = tuple(slice(None) for _ in shape[1:-1])
        for rows in (slice(0, 1), slice(1, n)):
            for columns in (slice(0, out // 2), slice(out // 2, out)):
                index = (rows, *middle, columns) if len(shape) > 1 else (columns,)
                whole[index] = callback(index)
                callback(index)  # a device that holds the same part
        return whole

    once = hf._Tensors._one
    monkeypatch.setattr(hf._Tensors, "_one", lambda self, name, *rest: (read.append(name), once(self, name, *rest))[1])
    monkeypatch.setattr(jax, "make_array_from_callback", parts)
    again = hf.load_params(checkpoints["qwen2"], spec, jnp.float32, lambda path, shape: "some sharding")
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert read.count("model.layers.1.mlp.up_proj.weight") == 2  # its two halves of columns, each once


def test_leaves_are_placed_as_asked(checkpoints):
    spec, params, _ = hf.read_folder(checkpoints["llama3"])
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("tensor",))
    asked = {}

    def sharding(path, shape):
        asked[path] = shape
        if path[-1] != "kernel":
            return None
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "tensor"))

    placed = hf.load_params(checkpoints["llama3"], spec, jnp.float32, sharding)
    jax.tree.map(np.testing.assert_array_equal, params, placed)
    assert asked == {leaf.path: leaf.shape for leaf in leaves(spec)}
    assert placed["layers"]["mlp"]["up_proj"]["kernel"].sharding.spec == jax.sharding.PartitionSpec(None, None, "tensor")


def test_host_memory_holds_a_leaf_or_two_never_the_model(checkpoints, monkeypatch):
    spec = hf.read_spec(checkpoints["qwen2"])[0]
    read, once, alive = [], hf._Tensors.read, []

    def watch(self, leaf, *rest):
        alive.append([name for name, array in read if array() is not None])
        out = once(self, leaf, *rest)
        read.append((leaf.path, weakref.ref(out)))
        return out

    monkeypatch.setattr(hf._Tensors, "read", watch)
    params = jax.block_until_ready(hf.load_params(checkpoints["qwen2"], spec, jnp.float32))
    # On CPU, an array of jax may be the very memory that was read: no second copy, and alive to the end. The others are let go.
    same = {name for name, array in read if array() is not None and get(params, name).unsafe_buffer_pointer() == array().ctypes.data}
    assert len(read) == len(leaves(spec)) > 10
    assert max(len(set(names) - same) for names in alive) <= 2


@pytest.fixture
def copy(checkpoints, tmp_path):
    """A checkpoint of one file that a test may damage."""
    return shutil.copytree(checkpoints["llama2"], tmp_path / "copy")


def rewrite(folder, change):
    tensors = load_file(folder / hf.SINGLE)
    change(tensors)
    save_file(tensors, folder / hf.SINGLE)


def test_harmless_extra_tensors_are_passed_over(copy):
    rewrite(copy, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}))
    hf.read_folder(copy)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop("model.layers.2.mlp.up_proj.weight"), "tensor model.layers.2.mlp.up_proj.weight is missing"),
        (lambda t: t.pop("lm_head.weight"), "tensor lm_head.weight is missing"),
        (
            lambda t: t.update({"model.layers.3.mlp.up_proj.weight": np.ones(2, np.float32)}),
            "layers.3.mlp.up_proj.weight has no place",
        ),
        (lambda t: t.update({"model.norm.weight": np.ones(31, np.float32)}), r"tensor model.norm.weight has shape \[31\].*\[32\]"),
        (lambda t: t.update({"model.norm.weight": np.ones(32, np.int8)}), "tensor model.norm.weight is stored as I8"),
    ],
)
def test_tensors_that_do_not_fit_are_named_with_their_file(copy, change, told):
    rewrite(copy, change)
    with pytest.raises(SealError, match=told) as error:
        hf.read_folder(copy)
    assert str(copy) in str(error.value)


def test_an_output_embedding_that_is_said_to_be_the_input_embedding_must_be(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "ROWS", 100)
    copy = shutil.copytree(checkpoints["smollm2"], tmp_path / "copy")
    rewrite(copy, lambda t: t.update({hf.HEAD: t[hf.EMBEDDING]}))
    hf.read_folder(copy)
    other = load_file(copy / hf.SINGLE)[hf.EMBEDDING].copy()
    other[-1, -1] += 1
    rewrite(copy, lambda t: t.update({hf.HEAD: other}))
    with pytest.raises(SealError, match=r"lm_head.weight is not the embedding, as config.json says; set tie_word_embeddings to false"):
        hf.read_folder(copy)
    rewrite(copy, lambda t: t.update({hf.HEAD: other[:-1]}))
    with pytest.raises(SealError, match=r"lm_head.weight is not the embedding"):
        hf.read_folder(copy)


def test_weights_have_a_new_files_rights(checkpoints, tmp_path):
    spec, params, tokenizer = hf.read_folder(checkpoints["llama2"])
    before = os.umask(0o027)
    try:
        hf.save_folder(tmp_path / "out", spec, params, tokenizer)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}


def test_damaged_and_incomplete_folders(copy, checkpoints, tmp_path):
    data = (copy / hf.SINGLE).read_bytes()
    (copy / hf.SINGLE).write_bytes(data[:-100])
    with pytest.raises(SealError, match=r"model\.safetensors: not a readable safetensors file"):
        hf.read_folder(copy)
    (copy / hf.SINGLE).unlink()
    with pytest.raises(SealError, match=r"no model\.safetensors"):
        hf.read_folder(copy)
    (copy / hf.INDEX).write_text('{"weight_map": {"a": 3}}')
    with pytest.raises(SealError, match="weight_map"):
        hf.read_folder(copy)
    (copy / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(SealError, match=r"generation_config\.json: eos_token_id"):
        hf.read_folder(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(SealError, match=r"config\.json: not readable as JSON"):
        hf.read_folder(copy)
    (copy / "config.json").unlink()
    with pytest.raises(SealError, match=r"config\.json: no such file"):
        hf.read_folder(copy)
    sharded = shutil.copytree(checkpoints["llama3"], tmp_path / "sharded")
    sorted(sharded.glob("*.safetensors"))[1].unlink()
    with pytest.raises(SealError, match=r"model-00002-of-.*no such file"):
        hf.read_folder(sharded)


def test_end_tokens_of_all_files_are_joined(copy):
    (copy / "generation_config.json").write_text('{"eos_token_id": [3, 1]}')
    spec, tokenizer = hf.read_spec(copy)
    assert spec.eos_ids == tokenizer.eos_ids == (1, 3)


def test_saving_never_overwrites_nor_leaves_half_a_folder(checkpoints, tmp_path, monkeypatch):
    spec, params, tokenizer = hf.read_folder(checkpoints["smollm2"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(SealError, match="already there"):
        hf.save_folder(tmp_path / "full", spec, params, tokenizer)

    def no_room(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer, "save", no_room)
    with pytest.raises(SealError, match="No space left on device"):
        hf.save_folder(tmp_path / "new", spec, params, tokenizer)
    assert [p.name for p in tmp_path.iterdir()] == ["full"]
    (tmp_path / "file").write_text("")
    with pytest.raises(SealError, match="cannot be written"):
        hf.save_folder(tmp_path / "file" / "below", spec, params, tokenizer)


# --- hub ids: a server of our own plays the hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Points the hub's client at a local address; returns (set the address, the client's cache folder)."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hf, "HUB_SECONDS", 1.0)
    return lambda url: monkeypatch.setattr(constants, "ENDPOINT", url), tmp_path / "hub"


@pytest.fixture
def closed_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"  # bound but not listening: connections are refused


class Refusing(BaseHTTPRequestHandler):
    """Answers every request with the status and the hub's error code that stand in the server."""

    def do_GET(self):
        status, code = self.server.answer
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    ("answer", "told"),
    [((404, "RepoNotFound"), "no such model"), ((403, "GatedRepo"), "wants an account")],
)
def test_what_the_hub_refuses_is_said(hub, answer, told):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    server.answer = answer
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        hub[0](f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(SealError, match=r"someone/model.*" + told) as error:
            hf.resolve("someone/model")
        assert "\n" not in str(error.value)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_hub_out_of_reach_is_said_or_the_cached_copy_is_used(hub, closed_port, checkpoints):
    point_at, cache = hub
    point_at(closed_port)
    with pytest.raises(SealError, match="cannot be reached"):
        hf.resolve("someone/model")
    commit = "0" * 40
    repo = cache / "models--someone--model"
    shutil.copytree(checkpoints["smollm2"], repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    folder = hf.resolve("someone/model")
    assert hf.read_spec(folder)[0].num_layers == 3


def test_a_hub_that_never_answers_is_given_up(hub):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(8)  # connections are accepted by the kernel and never answered
        hub[0](f"http://127.0.0.1:{sock.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(SealError, match="cannot be reached"):
            hf.resolve("someone/model")
        assert time.monotonic() - start < 20


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/no/where/at/all", "owner/model.gguf", "a/b/c", "-x/y"])
def test_names_that_mean_nothing(name):
    with pytest.raises(SealError, match="not a hub id"):
        hf.resolve(name)


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(SealError, match=r"expected a model folder or a \.gguf file"):
        hf.resolve(str(tmp_path / "model.bin"))
