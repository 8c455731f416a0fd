"""Where files may be: in a folder of this machine, or under a name in an object store (gs://BUCKET/PATH, s3://BUCKET/PATH).

`place` gives a `pathlib.Path` for the first and an `ObjectPath` for the second, which has the part of `pathlib.Path` that a run folder
needs, so that other modules seldom have to know which they hold. What differs: an object is there whole or not there, it cannot be appended
to, folders are nothing but beginnings of names, and there are no locks (see `seal_jax.runs.lease`).

Access is through fsspec and its gcsfs and s3fs, which find credentials and addresses as Google's and Amazon's own tools do (also
AWS_ENDPOINT_URL for other stores that speak S3, STORAGE_EMULATOR_HOST for GCS), and which try again after passing errors.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import functools
import logging
import mimetypes
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator
from typing import Any

from seal_jax.errors import SealError

# Schemes, and their argument for the type of an object. "memory" ends with the process: for trials.
CONTENT_TYPE = {"gs": "content_type", "s3": "ContentType", "memory": None}
LOGIN = {
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
    "s3": "run `aws configure`, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}
NO_LOGIN = ("DefaultCredentialsError", "NoCredentialsError", "PartialCredentialsError", "RefreshError")  # of google.auth and botocore


class ObjectPath:
    """A name in an object store: an object's, or the beginning of several objects' names, as a folder's.

    Every error of the store is an `OSError` with a reason in `strerror` and the name in `filename`, whatever the store's library raises:
    `FileNotFoundError`, `FileExistsError` and `PermissionError` where they fit. Listings are always asked for anew.
    """

    def __init__(self, scheme: str, key: pathlib.PurePosixPath):
        self.scheme, self._path = scheme, key  # BUCKET/PATH

    @property
    def name(self) -> str:
        return self._path.name

    @property
    def parent(self) -> ObjectPath:
        return ObjectPath(self.scheme, self._path.parent)

    def with_name(self, name: str) -> ObjectPath:
        return ObjectPath(self.scheme, self._path.with_name(name))

    def __truediv__(self, part: str) -> ObjectPath:
        return ObjectPath(self.scheme, self._path / part)

    def relative_to(self, folder: ObjectPath) -> pathlib.PurePosixPath:
        return self._path.relative_to(folder._path)

    def __str__(self) -> str:
        return f"{self.scheme}://{self._path}"

    def __repr__(self) -> str:
        return f"ObjectPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectPath) and str(self) == str(other)

    def __lt__(self, other: ObjectPath) -> bool:
        return str(self) < str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def resolve(self) -> ObjectPath:
        return self

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing: a folder is there when something is in it."""

    def _info(self) -> dict[str, Any] | None:
        with self._told():
            try:
                return _store(self.scheme).info(str(self._path))
            except FileNotFoundError:
                return None

    def exists(self) -> bool:
        return self._info() is not None

    def is_file(self) -> bool:
        info = self._info()
        return info is not None and info["type"] == "file"

    def is_dir(self) -> bool:
        info = self._info()
        return info is not None and info["type"] == "directory"

    def read_bytes(self) -> bytes:
        with self._told():
            return _store(self.scheme).cat_file(str(self._path))

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self.read_bytes().decode(encoding, errors)

    def write_bytes(self, data: bytes, exclusive: bool = False) -> None:
        """Puts the object there, in one step. `exclusive`: raises `FileExistsError` if it is there already; not all stores that speak S3
        can tell, and some of those raise another `OSError`."""
        kind, options = mimetypes.guess_type(self.name)[0], {"mode": "create"} if exclusive else {}
        if kind and (argument := CONTENT_TYPE[self.scheme]):
            options[argument] = kind  # so that a browser shows a report, and does not save it
        with self._told(writes=True):
            _store(self.scheme).pipe_file(str(self._path), data, **options)

    def replace(self, target: ObjectPath) -> None:
        with self._told(writes=True):
            _store(self.scheme).cp_file(str(self._path), str(target._path))
            _store(self.scheme).rm_file(str(self._path))

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            with self._told():
                _store(self.scheme).rm_file(str(self._path))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def iterdir(self) -> Iterator[ObjectPath]:
        """What is directly under the name. Raises `FileNotFoundError` if nothing is, `NotADirectoryError` for an object."""
        with self._told():
            found = _store(self.scheme).ls(str(self._path), detail=True)
        for entry in found:
            path = ObjectPath(self.scheme, pathlib.PurePosixPath(entry["name"].strip("/")))
            if path != self:  # an object whose name ends in a slash, with which some tools mark an empty folder
                yield path
            elif entry["type"] == "file" and not entry["name"].endswith("/"):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(self))

    def sizes(self) -> dict[str, int]:
        """All objects under the name, however deep, and their sizes in bytes, by their names below it."""
        with self._told():
            found = _store(self.scheme).find(str(self._path), detail=True)
        objects = {pathlib.PurePosixPath(name.strip("/")): info for name, info in found.items() if not name.endswith("/")}
        return {str(name.relative_to(self._path)): int(info["size"]) for name, info in objects.items() if name != self._path}

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        """What is directly under the name and fits the pattern, in order."""
        with contextlib.suppress(FileNotFoundError):
            yield from sorted(path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def rglob(self, pattern: str) -> Iterator[ObjectPath]:
        """The objects under the name, however deep, whose last part fits the pattern."""
        for name in sorted(self.sizes()):
            if fnmatch.fnmatchcase(name.rpartition("/")[2], pattern):
                yield self / name

    @contextlib.contextmanager
    def _told(self, writes: bool = False) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of fsspec, aiohttp, botocore, google.auth, gcsfs: they have nothing in common
            number, reason = _reason(error, self)
            if writes and number == errno.ENOENT:
                reason = f"there is no bucket {self._path.parts[0]!r}, or it cannot be seen from here"
            raise OSError(number, reason, str(self)) from error


Place = pathlib.Path | ObjectPath


def place(given: str | os.PathLike[str] | ObjectPath) -> Place:
    """The place that `given` names. Raises `SealError` for an unknown kind of store, one whose package is missing, or a bare bucket."""
    if isinstance(given, ObjectPath):
        return given
    text = os.fspath(given)
    match = re.fullmatch(r"([A-Za-z][\w+.-]*)://(.*)", text, re.DOTALL)
    if match is None:
        path = pathlib.Path(text)
        try:
            return path.expanduser()
        except RuntimeError:  # no such user
            return path
    scheme, key = match[1], pathlib.PurePosixPath(match[2].strip("/"))
    if scheme not in CONTENT_TYPE:
        raise SealError(f"{text}: {scheme}:// is not known here; give a folder, gs://BUCKET/PATH or s3://BUCKET/PATH")
    if len(key.parts) < 2 and scheme in LOGIN:
        raise SealError(f"{text}: names no place in a bucket; give {scheme}://BUCKET/PATH")
    _store(scheme)
    return ObjectPath(scheme, key)


@functools.cache
def _store(scheme: str) -> Any:
    """The one fsspec file system of the scheme; all threads may use it."""
    for name in ("fsspec", "gcsfs", "s3fs", "aiobotocore"):  # they also log what they raise, as tracebacks
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        import fsspec

        # Without a cache of listings: other processes, too, write into the folder.
        return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        raise SealError(f'{scheme}://: cannot be used without more packages: pip install "seal_jax[remote]" ({error})') from None
    except Exception as error:
        raise SealError(f"{scheme}://: {_reason(error, None)[1]}") from None


def _reason(error: Exception, path: ObjectPath | None) -> tuple[int, str]:
    """(number as in errno, reason in plain words) of whatever a store's library raises."""
    text = " ".join(str(error).split())[:300]
    if type(error).__name__ in NO_LOGIN or "anonymous caller" in text.lower():
        return errno.EACCES, f"no credentials were found: {LOGIN[path.scheme] if path else text}"
    for kind, number in (
        (FileNotFoundError, errno.ENOENT),
        (FileExistsError, errno.EEXIST),
        (IsADirectoryError, errno.EISDIR),
        (NotADirectoryError, errno.ENOTDIR),
    ):
        if isinstance(error, kind):
            return number, os.strerror(number)
    if isinstance(error, PermissionError) or text.startswith("Forbidden") or getattr(error, "code", None) in (401, 403):
        return errno.EACCES, f"permission denied by the store: {text}" if text else "permission denied by the store"
    return errno.EIO, text or type(error).__name__


def upload(source: pathlib.Path, target: ObjectPath) -> None:
    """Copies a file of this machine to the store, a piece at a time."""
    with target._told(writes=True):
        _store(target.scheme).put_file(str(source), str(target._path))


def download(source: ObjectPath, target: pathlib.Path) -> None:
    """Copies an object to a file of this machine, a piece at a time."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source._told():
        _store(source.scheme).get_file(str(source._path), str(target))


def remove_tree(folder: ObjectPath, keep: tuple[str, ...] = ()) -> None:
    """Removes all objects under the name, but those whose names below it begin with one of `keep`."""
    names = [str(folder._path / name) for name in folder.sizes() if not name.startswith(keep)]
    with folder._told():
        if names:
            _store(folder.scheme).rm(names)


@contextlib.contextmanager
def scratch() -> Iterator[pathlib.Path]:
    """A folder of this machine, under TMPDIR, for what is on its way to or from a store."""
    with tempfile.TemporaryDirectory(prefix="seal_jax-") as name:
        yield pathlib.Path(name)
