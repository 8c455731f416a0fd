"""Faults in the middle of a run: told to end, killed while a checkpoint is written, a full disk. The same command goes on."""

import json
import os
import signal

import pytest

from seal_jax.runs import checkpoint
from seal_jax.runs.events import read_events

# Killed within orbax, with its temporary folder half made; and when all is written but the manifest.
IN_ORBAX = """
import signal
import orbax.checkpoint as ocp
ocp.PyTreeCheckpointHandler.finalize = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
"""
BEFORE_THE_MANIFEST = """
import signal
from seal_jax.runs import checkpoint, files
def write(path, data, known=files.write_atomic):
    os.kill(os.getpid(), signal.SIGKILL) if path.name == checkpoint.MANIFEST else known(path, data)
files.write_atomic = write
"""


TOLD = "seal-jax: told to end (SIGTERM); nothing finished is lost, the same command goes on"
# One after another, on one run: killed when a file appears, killed by the code above, told to end within a step.
FAULTS = (
    ("evaluate/before/000.json", ""),
    ("SIGTERM", "writing self-edits (evaluate"),
    ("SIGTERM", "fitting (rounds 1"),
    ("rounds/1/selection.json", ""),
    ("SIGTERM", "M-step"),
    (".1.new*orbax-checkpoint-tmp*", IN_ORBAX),
    (".1.new", BEFORE_THE_MANIFEST),
    ("rounds/1/m_step.json", ""),
    ("evaluate/after/001.json", ""),
)


def test_one_fault_after_another_and_continued_equals_unbroken(start, pause, wait_for, ended, tiny_config, tiny_run, tmp_path, same_run):
    folder, said, mark = tmp_path / "run", tmp_path / "said", tmp_path / "mark"

    def command(before=""):  # by its config first, then by its folder
        return start("train", folder if (folder / "config.yaml").exists() else tiny_config, said=said, before=before)

    for where, what in FAULTS:
        if where == "SIGTERM":
            mark.unlink(missing_ok=True)
            process = command(pause(what, mark))
            wait_for(mark, process)
            os.kill(process.pid, signal.SIGTERM)
            assert ended(process) == 143
            assert said.read_text().splitlines()[-1] == TOLD and "Traceback" not in said.read_text()
            last = read_events(folder / "events.jsonl")[-1]
            assert (last["event"], last["error"]) == ("stopped", "Preempted: told to end (SIGTERM)")
        elif what:
            assert ended(command(what), 200) == -signal.SIGKILL
            assert list((folder / "policy").glob(where)) and not checkpoint.is_complete(folder / "policy" / "1")
        else:
            process = command()
            wait_for(folder / where, process)
            process.kill()
            process.join()
    assert ended(command(), 200) == 0
    same_run(folder, tiny_run)
    assert sorted(path.name for path in (folder / "policy").iterdir()) == ["1", "2"]
    # The table is made of units and written each time: the last kill may come after it.
    done = [e["unit"] for e in read_events(folder / "events.jsonl") if e["event"] == "unit_done" and e["unit"] != "table"]
    assert len(done) == len(set(done)), "nothing is computed twice"


# A file system of our own, in a name space of our own; the command is run again and again with more and more of it free.
DISK = """
import ctypes, shutil
disk, out, room, frees, arguments = {given!r}
user, group, libc = os.geteuid(), os.getegid(), ctypes.CDLL(None)
if libc.unshare(0x10020000):  # CLONE_NEWUSER | CLONE_NEWNS
    sys.exit(77)
for name, text in (("setgroups", "deny"), ("uid_map", f"0 {{user}} 1"), ("gid_map", f"0 {{group}} 1")):
    with open(f"/proc/self/{{name}}", "w") as file:
        file.write(text)
if libc.mount(b"none", disk.encode(), b"tmpfs", 0, f"size={{room}}".encode()):
    sys.exit(77)
from seal_jax import cli
codes = []
for free in frees:
    with open(disk + "/filler", "wb") as file:
        file.write(bytes(max(0, shutil.disk_usage(disk).free - free)))
    child = os.fork()
    if not child:
        code = cli.main(arguments)
        sys.stderr.flush()
        os._exit(code)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    os.remove(disk + "/filler")
shutil.copytree(disk + "/run", out + "/run")
with open(out + "/codes.json", "w") as file:
    file.write(str(codes))
sys.exit(0)
"""


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(start, ended, tiny_config, tiny_run, tmp_path, same_run):
    disk, out, said, room = tmp_path / "disk", tmp_path / "out", tmp_path / "said", 2**21
    disk.mkdir()
    out.mkdir()
    frees = [20_000, 60_000, room]  # too little for the first unit; for the first checkpoint
    command = ["train", str(tiny_config), f"run_dir={disk}/run"]
    process = start(said=said, before=DISK.format(given=(str(disk), str(out), room, frees, command)))
    code = ended(process, 300)
    if code == 77:
        pytest.skip("no name spaces here, and so no small file system")
    assert code == 0
    codes = json.loads((out / "codes.json").read_text())
    assert codes == [2, 2, 0]
    lines = [line for line in said.read_text().splitlines() if "no space left on device" in line]
    assert len(lines) == 2 and all(line.startswith(f"seal-jax: {disk}/run/") for line in lines)
    assert all("nothing finished is lost: free space" in line for line in lines)
    same_run(out / "run", tiny_run)
