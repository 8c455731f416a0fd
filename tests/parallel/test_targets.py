"""What programs are compiled for. Those for GPUs are read: what XLA makes of a model whose layers lie in one stack is seen there alone."""

import importlib.util
import re

import jax
import pytest

from seal_jax import config as config_lib
from seal_jax.errors import SealError
from seal_jax.fit import memory
from seal_jax.models.spec import from_hf
from seal_jax.parallel import chips, targets, topology
from seal_jax.parallel import mesh as mesh_lib

newer = jax.__version_info__ >= (0, 11)
needs_cuda = pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="JAX's plugin for CUDA is not installed")
WIDTH, INNER = 2048, 16384  # smaller kernels than these XLA puts side by side, to multiply with several at once
SPEC = {
    "model_type": "qwen2",
    "vocab_size": 4096,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 1,
}


def programs(target, remat="none", rank=8, **mesh):
    lora = {"rank": rank, "targets": ["q_proj", "v_proj"]}
    data = {
        "model": {"dtype": "bfloat16", "max_length": 512, "remat": remat},
        "task": {"name": "knowledge"},
        "fit": {"lora": lora, "tokens_per_step": 384, "lengths": [48]},
        "answer": {"rows": 32},
        "m_step": {"lora": lora, "batch_size": 2},
        "rest_em": {"group": 1, "edits": 3, "seeds": 2},
        "mesh": mesh,
    }
    settings = config_lib.build(data)
    return topology.Programs(settings, from_hf(SPEC), mesh_lib.make(settings.mesh, target.devices), topology.Workload())


def text_of(found, case):
    return topology.compiled_text(case.trace().lower(), found.mesh)[1]


def results(text):
    """(instruction, dtype, shape) of all that the program computes into memory; what merely renames an array is none of it."""
    fused, found = False, []
    for line in text.splitlines():
        if not line.startswith(" "):
            # Inside a fusion nothing is written; inside one that a library's product is part of, its slice is only pointed at.
            fused = bool(re.match(r"%?(fused_|\S*fusion|\S*computation|address)", line))
        elif not fused and (made := re.match(r"\s+(?:ROOT )?%?\S+ = (\(.*?\)|\S+) ([\w-]+)\(", line)):
            found += [(made[2], dtype, tuple(map(int, dims.split(",")))) for dtype, dims in re.findall(r"(\w+)\[([\d,]+)\]", made[1])]
    return [made for made in found if made[0] not in ("parameter", "get-tuple-element", "bitcast", "constant", "tuple", "while")]


@needs_cuda
def test_optimisers_step_where_their_state_lies():
    """A row of a step takes the adapter that it reads and its gradient. Taken out and put back with moments: over 3.4."""
    found = programs(targets.named("h200"), rank=256)
    few, many = (memory.of_program(found.fit_engine.lower(found.params, 16, rows, 48).compile()).temporaries for rows in (24, 48))
    assert (many - few) / 24 < 3 * found.adapter


@needs_cuda
@pytest.mark.skipif(not newer, reason="before JAX 0.11, XLA copies every kernel out of the stack")
@pytest.mark.parametrize("name", ["prefill", "decode", "fit", "m_step"])
def test_no_program_for_gpus_copies_the_weights(name):
    found = programs(targets.named("h200"))
    text = text_of(found, found.fit(8) if name == "fit" else getattr(found, name)())
    assert text.count("__cublas") >= 7, "the projections are the library's, which read their kernels from the stack"
    kernels = {(WIDTH, INNER), (INNER, WIDTH), (WIDTH, WIDTH)}
    copies = [made for made in results(text) if made[1] == "bf16" and tuple(n for n in made[2] if n > 1) in kernels]
    assert not copies


@needs_cuda
@pytest.mark.skipif(not newer, reason="before JAX 0.11, XLA copies every layer's cache out of the stack")
@pytest.mark.parametrize("name", ["decode", "write"])
def test_decoding_on_gpus_reads_caches_where_they_lie(name):
    found = programs(targets.named("h200"))
    case = getattr(found, name)()
    text = text_of(found, case)
    stack = re.search(r"bf16\[6,(\d+),(\d+),4,128,(\d+)\]", text)
    assert stack, "the keys of all layers"
    adapters, rows, positions = map(int, stack.groups())
    whole = sorted(n for n in (adapters, rows, 4, 128, positions) if n > 1)
    merged = sorted(n for n in (adapters * rows * 4, 128, positions) if n > 1)
    copies = [made for made in results(text) if made[1] == "bf16" and sorted(n for n in made[2] if n > 1) in (whole, merged)]
    assert not copies


@needs_cuda
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_a_fit_on_gpus_computes_each_product_once(remat):
    found = programs(targets.named("h200"), remat)
    text = text_of(found, found.fit(8))
    rows = 8 * 48
    wide = re.findall(rf"= (?:\()?\w+\[(?:\d+,)*?{rows},{INNER}\]\S*(?:, s8\[\d+\]\S*\))? custom-call\(.*__cublas", text)
    # Gate and up, and back through down; once more gate and up where nothing is kept.
    assert len(wide) == (5 if remat == "full" else 3)


@needs_cuda
def test_gpus_by_name(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    one, eight = targets.named("h200"), targets.named("h100:8")
    assert (len(one.devices), len(eight.devices)) == (1, 8)
    assert one.devices[0].device_kind == targets.GPUS["h200"].kind and one.flops == chips.GPUS["NVIDIA H200"].flops
    assert one.limit == pytest.approx(0.9 * 0.75 * 141e9)
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.95")
    assert targets.named("h200").limit == pytest.approx(0.9 * 0.95 * 141e9)


@needs_cuda
def test_a_model_shared_by_gpus():
    found = programs(targets.named("h200:4"), fsdp=2, tensor=2)
    program = topology.build(found.fit(8), found.mesh)
    assert program.work is not None and program.sent["fsdp"] > 0 and program.sent["tensor"] > 0


@pytest.mark.parametrize("name", ["b200", "h200:0", "h2000", "", "gpu"])
def test_what_is_neither_a_tpu_nor_a_gpu(name):
    with pytest.raises(
        SealError, match=rf"--topology {name}: neither a TPU nor a GPU of those known, say v5e:2x4, .*, a100, h100, h200, h200:8"
    ):
        targets.named(name)


def test_without_the_plugin_it_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SealError, match=r'plugin for CUDA: pip install "seal_jax\[plan-gpu\]"'):
        targets.named("h200")


@pytest.mark.parametrize("name", targets.GPUS)
def test_what_the_compiler_is_told_of_a_gpu(name):
    gpu, text = targets.GPUS[name], targets.description(name)
    assert gpu.kind in chips.GPUS
    assert f"core_count: {gpu.cores}\n" in text and text.count("{") == text.count("}")
