"""The estimate of kernels: its arithmetic on a program written by hand, and its count on one that XLA made."""

import importlib.util
import json

import pytest

from benchmarks import kernels
from seal_jax.models import shapes
from seal_jax.parallel import cost

needs_cuda = pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="JAX's plugin for CUDA is not installed")
RATES = 1e12, 1e9
LORA = cost.LoraConfig(32, 64.0, ("q_proj", "v_proj"))

# A loop over four layers: the product of [8, 16] with a slice of a stack of kernels where it lies, and a write into a row of a table.
TEXT = """HloModule made_by_hand
%product (p.0: bf16[8,16], p.1: bf16[4,16,32], p.2: s32[]) -> (bf16[8,32], s8[4194304]) {
  %p.0 = bf16[8,16]{1,0} parameter(0)
  %p.1 = bf16[4,16,32]{2,1,0} parameter(1)
  %p.2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %slice.1 = bf16[1,16,32]{2,1,0} dynamic-slice(%p.1, %p.2, %zero, %zero), dynamic_slice_sizes={1,16,32}
  %kernel = bf16[16,32]{1,0} bitcast(%slice.1)
  ROOT %gemm = (bf16[8,32]{1,0}, s8[4194304]{0}) custom-call(%p.0, %kernel), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
}
%write (q.0: f32[1000,32], q.1: f32[1,32], q.2: s32[]) -> f32[1000,32] {
  %q.0 = f32[1000,32]{1,0} parameter(0)
  %q.1 = f32[1,32]{1,0} parameter(1)
  %q.2 = s32[] parameter(2)
  %naught = s32[] constant(0)
  ROOT %update = f32[1000,32]{1,0} dynamic-update-slice(%q.0, %q.1, %q.2, %naught)
}
%condition (c: (s32[])) -> pred[] {
  %c = (s32[]) parameter(0)
  ROOT %less = pred[] constant(true)
}
%body (b: (s32[], bf16[8,16], bf16[4,16,32], f32[1000,32], f32[1,32])) -> (s32[]) {
  %b = (s32[], bf16[8,16]{1,0}, bf16[4,16,32]{2,1,0}, f32[1000,32]{1,0}, f32[1,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %x = bf16[8,16]{1,0} get-tuple-element(%b), index=1
  %stack = bf16[4,16,32]{2,1,0} get-tuple-element(%b), index=2
  %table = f32[1000,32]{1,0} get-tuple-element(%b), index=3
  %row = f32[1,32]{1,0} get-tuple-element(%b), index=4
  %fused.1 = (bf16[8,32]{1,0}, s8[4194304]{0}) fusion(%x, %stack, %i), kind=kCustom, calls=%product, metadata={op_name="layers/q_proj"}
  %fused.2 = f32[1000,32]{1,0} fusion(%table, %row, %i), kind=kLoop, calls=%write
  ROOT %next = (s32[]) tuple(%i)
}
ENTRY %main (a: (s32[], bf16[8,16], bf16[4,16,32], f32[1000,32], f32[1,32])) -> (s32[]) {
  %a = (s32[], bf16[8,16]{1,0}, bf16[4,16,32]{2,1,0}, f32[1000,32]{1,0}, f32[1,32]{1,0}) parameter(0)
  ROOT %loop = (s32[]) while(%a), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"4"}}
}
"""


def test_kernels_are_counted_as_they_run():
    product, write = kernels.Program(TEXT, RATES).kernels()
    assert (product.name, product.times, product.source) == ("fused.1", 4, "layers/q_proj")
    assert product.flops == 2 * 8 * 16 * 32
    assert product.bytes == 2 * (8 * 16 + 16 * 32 + 8 * 32) + 4, "of the stack its slice alone, of the library's scratch room nothing"
    assert product.seconds == pytest.approx(product.bytes / RATES[1] + kernels.START)
    assert (write.name, write.times, write.flops) == ("fused.2", 4, 0)
    assert write.bytes == 2 * 4 * 32 + 4, "the row, read and written, and its number"
    assert kernels.by_name([product, write]) == {"products": 4 * product.seconds, "fused": 4 * write.seconds}
    # Loops of which the text says nothing run as often as the caller says.
    unknown = TEXT.replace(', backend_config={"known_trip_count":{"n":"4"}}', "")
    assert {k.times for k in kernels.Program(unknown, RATES, 3).kernels()} == {3}


@needs_cuda
def test_the_products_of_a_real_program_are_all_counted(tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(
        "{model: {dtype: bfloat16, remat: none, max_length: 512}, task: {name: knowledge}, answer: {rows: 40},"
        " m_step: {lora: {rank: 32, targets: [q_proj, v_proj]}, batch_size: 10},"
        " fit: {tokens_per_step: 384, lengths: [48], lora: {rank: 32, targets: [q_proj, v_proj]}}}"
    )
    options = [str(config), "--topology", "h200", "--spec", "embedded", "--programs", "fit,decode,m_step", "--slots", "8", "--top", "3"]
    assert kernels.main([*options, "--dump", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    fit, decode, tune = (json.loads(line) for line in printed.splitlines() if line.startswith("{"))
    by_hand = cost.fit_flops(shapes.published("embedded"), LORA, 384, 48, 384)
    assert fit["products_ms"] == pytest.approx(1e3 * by_hand / (kernels.PRODUCTS * 989e12), rel=0.05)
    # Ten pairs, one after another: the loop over them, and in it the branch that has something to do.
    by_hand = 10 * cost.fit_flops(shapes.published("embedded"), LORA, 384, 384, 384)
    assert tune["products_ms"] == pytest.approx(1e3 * by_hand / (kernels.PRODUCTS * 989e12), rel=0.1)
    for row in (fit, decode, tune):
        assert row["ms"] > row["least_ms"] > 0 and row["kernels"] > 500
    assert printed.count(" GFLOP") == 9 and (tmp_path / "decode.txt").stat().st_size > 1e4


def test_what_cannot_be_estimated_is_said(tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text("{task: {name: knowledge}}")
    assert kernels.main([str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
    if importlib.util.find_spec("jax_cuda13_plugin"):
        assert kernels.main([str(config), "--spec", "embedded", "--programs", "fits"]) == 2
        assert "--programs fits: not one of fit, prefill" in capsys.readouterr().err
