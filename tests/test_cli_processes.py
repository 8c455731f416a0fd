"""The command line in processes of its own: what it writes where, and runs that are killed and go on."""

import json
import os
import pty
import random
import subprocess
import sys
import time

from seal_jax.runs.places import place

# The command without torch, as on a user's machine; importing it takes seconds.
COMMAND = [sys.executable, "-c", "import sys; sys.modules['torch'] = None; from seal_jax.cli import main; sys.exit(main())"]
ENVIRONMENT = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # as `start`


def test_the_first_line_comes_before_anything_slow_is_imported(tiny_run):
    code = (
        "import sys; from seal_jax import cli; from seal_jax.errors import SealError\n"
        "def say(text): print(text, sorted({'jax', 'transformers', 'torch', 'datasets', 'matplotlib'} & sys.modules.keys())); sys.exit()\n"
        "cli._say = say; cli.main(sys.argv[1:])"
    )
    for arguments in (["train", tiny_run.parent / "config.yaml"], ["evaluate", tiny_run], ["generate", tiny_run]):
        out = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=60).stdout
        assert out.startswith(f"seal-jax {arguments[0]}: tiny, ") and out.endswith(" []\n")


def test_streams_that_are_closed_are_no_reason_to_stop(tiny_run, tmp_path):
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        (tiny_run / "report.html").unlink(missing_ok=True)
        line = f'exec "$@" {closed}'
        done = subprocess.run(["bash", "-c", line, "-", *COMMAND, "report", str(tiny_run)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "Traceback" not in done.stderr and (tiny_run / "report.html").exists()


def test_output_to_pipes_is_results_on_one_and_plain_lines_on_the_other(tiny_config, tmp_path):
    (tmp_path / "train.json").write_text(json.dumps([*json.loads((tmp_path / "train.json").read_text()), {"title": "No passage"}]))
    command = [*COMMAND, "generate", str(tiny_config), "--limit", "1", "--split", "train"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["candidate"] for line in done.stdout.splitlines()] == [0, 1]
    lines = done.stderr.splitlines()
    assert lines[0] == "seal-jax generate: tiny, 1 context of train"
    warning = f"WARNING: data source {tmp_path / 'train.json'}: 1 of 5 items skipped: 1 with an empty passage (item 4 'No passage')"
    assert lines[1] == warning and "\r" not in done.stderr
    assert all(line.startswith("writing self-edits: ") and line.endswith(" left") for line in lines[2:])


def test_a_terminal_has_bars_with_the_time_left(tiny_config):
    control, terminal = pty.openpty()
    command = [*COMMAND, "generate", str(tiny_config), "--limit", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal, env=ENVIRONMENT)
    os.close(terminal)
    seen = b""
    while True:
        try:
            part = os.read(control, 4096)
        except OSError:  # what a terminal says when nobody has it open any more
            break
        seen += part
    os.close(control)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and len(out.splitlines()) == 2
    assert b"writing self-edits: 100%|" in seen and b"2/2 [00:" in seen and b"<00:00" in seen


def test_bad_input_to_the_real_command(tiny_config):
    for command in (COMMAND, [sys.executable, "-m", "seal_jax.cli"]):
        done = subprocess.run([*command, "train", str(tiny_config), "fit.epoch=1"], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"seal-jax: {tiny_config}: unknown key 'fit.epoch' (did you mean 'epochs'?)")
        assert len(done.stderr.splitlines()) == 1


# --- SIGKILL --------------------------------------------------------------------------------------------------------


def test_killed_and_continued_in_a_bucket_equals_unbroken_on_the_disk(start, bucket, tiny_config, tiny_run, tmp_path, same_run):
    """Killed in the middle of a round, and while a checkpoint is uploaded."""
    folder = place(f"{bucket}{tmp_path}/run")
    server = {key: value for key, value in os.environ.items() if key.startswith("AWS_")}  # younger than what processes are forked from
    before = f"import os; os.environ.update({server})"
    for moment in ("rounds/1/e_step/000.json", "policy/1"):
        process = start("train", tiny_config, f"run_dir={folder}", before=before)
        end = time.monotonic() + 200
        while not (folder / moment).exists():
            assert process.is_alive() and time.monotonic() < end, f"{moment} did not come"
            time.sleep(0.05)
        process.kill()
        process.join()
        assert (folder / "lock").exists(), "killed while it worked"
    process = start("train", folder, before=before)
    process.join(200)
    assert process.exitcode == 0
    same_run(folder, tiny_run)
    assert not (folder / "lock").exists()
    assert "after 2 rounds" in (folder / "report.html").read_text() and "finished" in (folder / "report.html").read_text()


def test_killed_at_random_and_continued_equals_unbroken(start, tiny_config, tiny_run, tmp_path, same_run):
    folder = tmp_path / "run"
    draw = random.Random(time.time_ns())
    for _ in range(4):
        process = start("train", tiny_config)
        process.join(draw.uniform(0.2, 5.0))
        process.kill()
        process.join()
    process = start("train", tiny_config)
    process.join(200)
    assert process.exitcode == 0
    same_run(folder, tiny_run)
