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
from seal_jax.runs import places
from seal_jax.runs.checkpoint import is_complete, load_adapters, recover, save_adapters
from seal_jax.runs.places import ObjectPath, place


def tree(seed=0):
    draw = np.random.default_rng(seed)
    pair = {"a": draw.standard_normal((2, 8, 4), dtype=np.float32), "b": draw.standard_normal((2, 4, 8), dtype=np.float32)}
    return {"layers": {"q_proj": pair, "v_proj": {"a": jnp.asarray(pair["a"][:, :, :2])}}, "scale": jnp.full((3,), 0.5, jnp.bfloat16)}


def test_round_trip_leaf_for_leaf(anywhere):
    save_adapters(anywhere / "policy" / "1", tree(), {"rank": 4, "alpha": np.float32(8), "targets": ("q_proj", "v_proj")})
    assert is_complete(anywhere / "policy" / "1")
    found, metadata = load_adapters(anywhere / "policy" / "1")
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


def listed(folder):
    """All files and folders, by their names below `folder`."""
    return sorted(folder.sizes()) if isinstance(folder, ObjectPath) else sorted(os.listdir(folder))


def test_replaces_what_was_there_and_leaves_nothing_beside(anywhere):
    save_adapters(anywhere / "1", tree(0), {"round": 1})
    if not isinstance(anywhere, ObjectPath):
        (anywhere / ".1.new.orbax-checkpoint-tmp").mkdir()  # as a killed process leaves it
        (anywhere / ".1.new").mkdir()
    before = listed(anywhere)
    save_adapters(anywhere / "1", tree(1), {"round": 2})
    found, metadata = load_adapters(anywhere / "1")
    assert metadata == {"round": 2}
    np.testing.assert_array_equal(found["layers"]["q_proj"]["a"], tree(1)["layers"]["q_proj"]["a"])
    if isinstance(anywhere, ObjectPath):
        assert set(before) & set(listed(anywhere)) == {"1/manifest.json"}
        assert len({name.split("/")[1] for name in listed(anywhere)}) == 2, "the manifest, and one folder"
    else:
        assert listed(anywhere) == ["1"]


def test_what_is_whole_beside_its_place_is_put_there(tmp_path):
    """As a process leaves it that is killed when it has removed the earlier one, or a part of that."""
    for left in ((), ("manifest.json",)):
        save_adapters(tmp_path / "1", tree(1), {"round": 2})
        os.replace(tmp_path / "1", tmp_path / ".1.new")
        for name in left:
            (tmp_path / "1").mkdir()
            (tmp_path / "1" / name).write_bytes((tmp_path / ".1.new" / name).read_bytes())
        assert not is_complete(tmp_path / "1")
        recover(tmp_path / "1")
        assert load_adapters(tmp_path / "1")[1] == {"round": 2} and listed(tmp_path) == ["1"]
        save_adapters(tmp_path / ".1.new", tree(0), {"round": 3})
        recover(tmp_path / "1")
        assert load_adapters(tmp_path / "1")[1] == {"round": 2}, "a whole one stays"
        shutil.rmtree(tmp_path / ".1.new")
        shutil.rmtree(tmp_path / "1")
    (tmp_path / ".1.new").mkdir()
    recover(tmp_path / "1")
    assert not (tmp_path / "1").exists(), "one that is not whole is none"


def test_a_part_of_a_checkpoint_is_none(anywhere):
    assert not is_complete(anywhere / "1")
    save_adapters(anywhere / "whole", tree(), {})
    files = {path.relative_to(anywhere / "whole").as_posix(): path for path in (anywhere / "whole").rglob("*") if path.is_file()}
    whole = {name: path.read_bytes() for name, path in files.items()}
    assert len(whole) > 3
    for name, path in files.items():
        path.write_bytes(whole[name][: len(whole[name]) // 2])
        assert not is_complete(anywhere / "whole"), f"{name} cut"
        path.unlink()
        assert not is_complete(anywhere / "whole"), f"{name} gone"
        path.write_bytes(whole[name])
    assert is_complete(anywhere / "whole")
    path.unlink()
    with pytest.raises(SealError, match="no finished checkpoint here"):
        load_adapters(anywhere / "whole")


def test_a_changed_byte_is_told(anywhere):
    save_adapters(anywhere / "1", tree(), {})
    path = max((p for p in (anywhere / "1").rglob("*") if p.parent.name == "d"), key=lambda p: len(p.read_bytes()))  # the arrays' own file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert is_complete(anywhere / "1")
    with pytest.raises(SealError, match=r"damaged checkpoint \(.* has changed\); delete this folder"):
        load_adapters(anywhere / "1")


def test_a_checkpoint_is_replaced_in_one_step_in_a_store(tmp_path, monkeypatch):
    """Whatever of the new one is there when the process ends: the old one is, until the manifest is the new one's."""
    folder, real, done = place(f"memory:/{tmp_path}/1"), places.upload, 0
    save_adapters(folder, tree(0), {"n": 0})
    for most in range(100):
        count = iter(range(most))

        def upload(source, target, count=count):
            if next(count, None) is None:
                raise KeyboardInterrupt
            real(source, target)

        monkeypatch.setattr(places, "upload", upload)
        try:
            save_adapters(folder, tree(1), {"n": 1})
            break
        except KeyboardInterrupt:
            done += 1
        found, metadata = load_adapters(folder)
        assert metadata == {"n": 0}
        np.testing.assert_array_equal(found["layers"]["q_proj"]["a"], tree(0)["layers"]["q_proj"]["a"])
    assert done > 3 and load_adapters(folder)[1] == {"n": 1}


def test_a_checkpoint_copied_from_a_store_by_other_tools_is_one(tmp_path):
    store = place(f"memory:/{tmp_path}/1")
    save_adapters(store, tree(), {"n": 1})
    for name in store.sizes():
        places.download(store / name, tmp_path / "copy" / name)
    found, metadata = load_adapters(tmp_path / "copy")
    assert metadata == {"n": 1}
    np.testing.assert_array_equal(found["layers"]["q_proj"]["a"], tree()["layers"]["q_proj"]["a"])


def test_a_store_out_of_reach_is_not_a_checkpoint_that_is_missing(tmp_path, monkeypatch):
    folder = place(f"memory:/{tmp_path}/1")
    save_adapters(folder, tree(), {})

    def info(*_, **__):
        raise TimeoutError("no answer\nin 60 s")

    monkeypatch.setattr(places._store("memory"), "cat_file", info)
    for ask in (is_complete, load_adapters):
        with pytest.raises(SealError, match=r"^memory://.*/1: cannot read the checkpoint: no answer in 60 s$"):
            ask(folder)


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
