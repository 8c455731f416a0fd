import pytest

from seal_jax import cpu

X86 = """processor\t: 0
model name\t: Some Processor 9000
flags\t\t: fpu avx2 amx_bf16

processor\t: 1
model name\t: Another
flags\t\t: fpu
"""
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd bf16\nCPU part\t: 0xd4f\n"


@pytest.mark.parametrize(
    ("told", "name", "features"),
    [
        (X86, "Some Processor 9000", {"fpu", "avx2", "amx_bf16"}),
        (ARM, None, {"fp", "asimd", "bf16"}),
        ("model name\t:\n", None, set()),
        (None, None, set()),
    ],
)
def test_what_linux_tells_of_the_first_core(tmp_path, monkeypatch, told, name, features):
    info = tmp_path / "cpuinfo"
    if told is not None:
        info.write_text(told, encoding="utf-8")
    monkeypatch.setattr(cpu, "INFO", info)
    cpu._told.cache_clear()
    try:
        assert cpu.name() == name
        assert cpu.features() == features
    finally:
        cpu._told.cache_clear()
