import errno
import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from seal_jax.errors import SealError
from seal_jax.runs import files

# Forks children that rewrite one file without pause. The kernel ends each at another moment of its processor time, so that a busy machine
# changes nothing; the file, read after each, must be whole.
KILL = """
import json, os, pathlib, random, signal, sys
from seal_jax.runs import files
path = pathlib.Path(sys.argv[1]) / "deep" / "unit.json"
draw = random.Random(0)
seen = set()
for _ in range(60):
    draw.random()
    child = os.fork()
    if child == 0:
        n = 0
        signal.setitimer(signal.ITIMER_PROF, 0.002 + 0.02 * draw.random())  # its signal has no handler, and ends as SIGKILL does
        while True:
            n += 1
            files.write_atomic(path, files.dump({"n": n, "text": "x" * 200_000}))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGPROF
    if path.exists():
        data = json.loads(path.read_bytes())
        assert len(data["text"]) == 200_000
        seen.add(data["n"])
left = len(list(path.parent.glob(".*.tmp")))
print(len(seen), left)
"""


def test_a_killed_writer_never_leaves_a_damaged_file(tmp_path):
    out = subprocess.run([sys.executable, "-c", KILL, tmp_path], capture_output=True, text=True, timeout=60, check=False)
    assert out.returncode == 0, out.stderr
    seen, left = map(int, out.stdout.split())
    assert seen >= 3, "the children were killed before they wrote: the test shows nothing"
    assert left >= 1, "no child was killed within a write: the test shows nothing"


def test_dump_is_strict_json_of_plain_values(tmp_path):
    data = {
        "nan": float("nan"),
        "inf": np.float32("inf"),
        "array": np.array([[1, 2], [3, 4]]),
        "jax": jnp.float32(0.5),
        "bool": np.bool_(True),
        3: ("a", None),
        "path": tmp_path,
        "text": "grün \ud800 </script>",
    }
    assert json.loads(files.dump(data)) == {
        **{"nan": None, "inf": None, "array": [[1, 2], [3, 4]], "jax": 0.5, "bool": True},
        **{"3": ["a", None], "path": str(tmp_path), "text": "grün \ud800 </script>"},
    }
    assert files.dump({}, indent=None).isascii()


def test_full_disk_is_told_in_one_line_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "unit.json"
    files.write_atomic(path, b"old")
    # /dev/full answers every write as a full disk does; the temporary file is made a link to it.
    os.symlink("/dev/full", tmp_path / f".unit.json.{os.getpid()}{files.TEMPORARY}")
    with pytest.raises(SealError, match=r"unit\.json: cannot write: no space left on device; nothing finished is lost: .*to go on$"):
        files.write_atomic(path, b"new" * 1000)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["unit.json"], "the temporary file must not keep the disk full"

    def fsync(file):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", fsync)  # some file systems notice only here
    with pytest.raises(SealError, match="quota exceeded"):
        files.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_file_in_the_way_of_a_folder(tmp_path):
    (tmp_path / "rounds").write_text("")
    with pytest.raises(SealError, match=r"rounds/1/m_step\.json: cannot write: .*(exists|not a directory)"):
        files.write_atomic(tmp_path / "rounds" / "1" / "m_step.json", b"{}")


def test_write_all_goes_on_after_a_short_write(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, bytes(data)[:7]))
    files.write_atomic(tmp_path / "a.json", bytes(range(100)))
    assert (tmp_path / "a.json").read_bytes() == bytes(range(100))
