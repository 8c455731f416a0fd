import os
import shutil
import signal
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from seal_jax.errors import SealError
from seal_jax.runs.checkpoint import is_complete, load_adapters, save_adapters


def tree(seed=0):
    draw = np.random.default_rng(seed)
    pair = {"a": draw.standard_normal((2, 8, 4), dtype=np.float32), "b": draw.standard_normal((2, 4, 8), dtype=np.float32)}
    return {"layers": {"q_proj": pair, "v_proj": {"a": jnp.asarray(pair["a"][:, :, :2])}}, "scale": jnp.full((3,), 0.5, jnp.bfloat16)}


def test_round_trip_leaf_for_leaf(tmp_path):
    save_adapters(tmp_path / "policy" / "1", tree(), {"rank": 4, "alpha": np.float32(8), "targets": ("q_proj", "v_proj")})
    assert is_complete(tmp_path / "policy" / "1")
    found, metadata = load_adapters(tmp_path / "policy" / "1")
    want = tree()
    assert metadata == {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj"]}
    assert found["layers"].keys() == {"q_proj", "v_proj"}
    for got, leaf in (
        (found["layers"]["q_proj"]["a"], want["layers"]["q_proj"]["a"]),
        (found["layers"]["q_proj"]["b"], want["layers"]["q_proj"]["b"]),
        (found["layers"]["v_proj"]["a"], want["layers"]["v_proj"]["a"]),
    ):
        assert isinstance(got, np.ndarray) and got.dtype == np.float32
        np.testing.assert_array_equal(got, leaf)
    assert found["scale"].dtype == ml_dtypes.bfloat16


def test_replaces_what_was_there_and_leaves_nothing_beside(tmp_path):
    save_adapters(tmp_path / "1", tree(0), {"round": 1})
    (tmp_path / ".1.new.orbax-checkpoint-tmp").mkdir()  # as a killed process leaves it
    (tmp_path / ".1.new").mkdir()
    save_adapters(tmp_path / "1", tree(1), {"round": 2})
    found, metadata = load_adapters(tmp_path / "1")
    assert metadata == {"round": 2}
    np.testing.assert_array_equal(found["layers"]["q_proj"]["a"], tree(1)["layers"]["q_proj"]["a"])
    assert os.listdir(tmp_path) == ["1"]


def test_a_part_of_a_checkpoint_is_none(tmp_path):
    assert not is_complete(tmp_path / "1")
    save_adapters(tmp_path / "whole", tree(), {})
    names = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file()]
    for name in names:
        for cut in (True, False):
            shutil.rmtree(tmp_path / "part", ignore_errors=True)
            shutil.copytree(tmp_path / "whole", tmp_path / "part")
            data = (tmp_path / "part" / name).read_bytes()
            if cut:
                (tmp_path / "part" / name).write_bytes(data[: len(data) // 2])
            else:
                (tmp_path / "part" / name).unlink()
            assert not is_complete(tmp_path / "part"), f"{name} {'cut' if cut else 'gone'}"
    with pytest.raises(SealError, match="no finished checkpoint here"):
        load_adapters(tmp_path / "part")


def test_a_changed_byte_is_told(tmp_path):
    save_adapters(tmp_path / "1", tree(), {})
    path = max((tmp_path / "1").rglob("d/*"), key=lambda p: p.stat().st_size)  # the arrays' own file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert is_complete(tmp_path / "1")
    with pytest.raises(SealError, match=r"damaged checkpoint \(.* has changed\); delete this folder"):
        load_adapters(tmp_path / "1")


KILL = """
import sys, numpy as np
from seal_jax.runs.checkpoint import save_adapters
n = 0
while True:
    n += 1
    save_adapters(sys.argv[1], {"w": np.full((300_000,), n, np.float32)}, {"n": n})
    print(n, flush=True)
"""


def test_sigkill_leaves_a_whole_checkpoint_or_none(tmp_path):
    folder = tmp_path / "1"
    child = subprocess.Popen([sys.executable, "-c", KILL, folder], stdout=subprocess.PIPE, text=True)
    for _ in range(5):
        assert child.stdout.readline(), "the child ended"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    if is_complete(folder):
        found, metadata = load_adapters(folder)
        assert np.all(found["w"] == metadata["n"])
    save_adapters(folder, {"w": np.zeros(3, np.float32)}, {"n": 0})
    assert load_adapters(folder)[1] == {"n": 0}
    assert os.listdir(tmp_path) == ["1"]


def test_full_disk(tmp_path, capfd):
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root only")
    try:
        draw = np.random.default_rng(0)
        with pytest.raises(SealError, match=r"policy/1: cannot write the checkpoint: no space left on device; nothing finished is lost"):
            save_adapters(tmp_path / "policy" / "1", {"w": draw.standard_normal((300, 300))}, {})
        assert not is_complete(tmp_path / "policy" / "1")
        assert os.listdir(tmp_path / "policy") == [], "what did not fit must not keep the disk full"
        save_adapters(tmp_path / "policy" / "1", {"w": np.zeros(3)}, {})
        assert is_complete(tmp_path / "policy" / "1")
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert "Traceback" not in capfd.readouterr().err


def test_an_error_of_orbax_is_told_in_one_line_and_cleaned_up(tmp_path, monkeypatch):
    def save(self, folder, *args, **kwargs):
        (folder.parent / f"{folder.name}.orbax-checkpoint-tmp").mkdir(parents=True)
        raise ValueError("RESOURCE_EXHAUSTED: writing\nfailed [os_error_code='28']")

    monkeypatch.setattr("orbax.checkpoint.Checkpointer.save", save)
    with pytest.raises(SealError, match=r"^[^\n]*policy/1: cannot write the checkpoint: no space left on device; [^\n]*$"):
        save_adapters(tmp_path / "policy" / "1", tree(), {})
    assert os.listdir(tmp_path / "policy") == []


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "policy").write_text("")
    with pytest.raises(SealError, match=r"policy/1: cannot write the checkpoint: .*directory"):
        save_adapters(tmp_path / "policy" / "1", tree(), {})
