"""Places on the disk and in stores behave alike, as far as a run folder needs it; what a store refuses is told in plain words."""

import pathlib
import sys

import pytest

from seal_jax.errors import SealError
from seal_jax.runs import files, places
from seal_jax.runs.places import ObjectPath, place


def test_what_is_no_store_is_a_path():
    for text in ("runs/x", "/tmp/x", "C:/x", "a:b"):
        assert place(text) == pathlib.Path(text)
    assert place(pathlib.Path("x")) == pathlib.Path("x")
    assert place("~/runs") == pathlib.Path.home() / "runs" and place("~nobody-of-that-name/x") == pathlib.Path("~nobody-of-that-name/x")


def test_names():
    path = place("memory://bucket/runs/x/")
    assert isinstance(path, ObjectPath) and place(path) is path
    assert str(path) == "memory://bucket/runs/x" and repr(path) == "ObjectPath('memory://bucket/runs/x')"
    assert (path.name, str(path.parent), str(path.with_name("y"))) == ("x", "memory://bucket/runs", "memory://bucket/runs/y")
    assert path / "a" / "b.json" == path / "a/b.json" != path
    assert (path / "a" / "b.json").relative_to(path).as_posix() == "a/b.json" and path / "" == path == path.resolve()
    assert files.dump({"path": path}, indent=None) == b'{"path": "memory://bucket/runs/x"}'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ftp://host/x", "ftp://host/x: ftp:// is not known here; give a folder, gs://BUCKET/PATH or s3://BUCKET/PATH"),
        ("gs://bucket", "gs://bucket: names no place in a bucket; give gs://BUCKET/PATH"),
        ("s3://bucket/", "s3://bucket/: names no place in a bucket; give s3://BUCKET/PATH"),
    ],
)
def test_names_of_no_place(text, said):
    with pytest.raises(SealError) as caught:
        place(text)
    assert str(caught.value) == said


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    places._store.cache_clear()
    with pytest.raises(SealError, match=r'gs://: cannot be used without more packages: pip install "seal_jax\[remote\]" \(.*gcsfs'):
        place("gs://bucket/runs/x")
    places._store.cache_clear()


def test_files_and_folders(anywhere):
    files.write_atomic(anywhere / "a.json", b"old")
    files.write_atomic(anywhere / "a.json", b"1")
    files.write_atomic(anywhere / "deep/er/b.json", b"22")
    files.write_atomic(anywhere / "deep/c.txt", b"")
    assert sorted(path.name for path in anywhere.iterdir()) == ["a.json", "deep"]
    assert sorted(anywhere.rglob("*.json")) == [anywhere / "a.json", anywhere / "deep/er/b.json"]
    assert (
        sorted(anywhere.glob("d*")) == [anywhere / "deep"]
        and list((anywhere / "none").glob("*")) == list((anywhere / "no").rglob("*")) == []
    )
    found = {
        name: ((anywhere / name).exists(), (anywhere / name).is_file(), (anywhere / name).is_dir()) for name in ("a.json", "deep", "x")
    }
    assert found == {"a.json": (True, True, False), "deep": (True, False, True), "x": (False, False, False)}
    assert (anywhere / "a.json").read_bytes() == b"1" and (anywhere / "deep/c.txt").read_text(encoding="utf-8") == ""
    (anywhere / "a.json").replace(anywhere / "moved.json")
    assert not (anywhere / "a.json").exists() and (anywhere / "moved.json").read_bytes() == b"1"
    (anywhere / "moved.json").unlink()
    (anywhere / "moved.json").unlink(missing_ok=True)
    for wrong, read in (
        (FileNotFoundError, lambda: (anywhere / "x").read_bytes()),
        (FileNotFoundError, lambda: list((anywhere / "x").iterdir())),
    ):
        with pytest.raises(wrong) as caught:
            read()
        assert str(caught.value.filename) == str(anywhere / "x") and caught.value.strerror == "No such file or directory"
    with pytest.raises(NotADirectoryError):
        list((anywhere / "deep/c.txt").iterdir())
    files.remove_tree(anywhere / "deep")
    files.remove_tree(anywhere / "deep")
    assert not (anywhere / "deep").exists()


def test_a_folder_made_here_is_there_after_the_block(anywhere):
    with files.staged(anywhere / "model") as here:
        (here / "deep").mkdir(parents=True)
        (here / "deep/a").write_bytes(b"1")
        (here / "b").write_bytes(b"2")
    assert (anywhere / "model/deep/a").read_bytes() == b"1" and (anywhere / "model/b").read_bytes() == b"2"
    assert not here.exists() or here == anywhere / "model"


def test_large_files_travel_in_pieces(bucket, tmp_path):
    data = bytes(range(256)) * 256 * 180  # 11 MiB: more than one part
    (tmp_path / "large").write_bytes(data)
    source = place(f"{bucket}{tmp_path}/large")
    places.upload(tmp_path / "large", source)
    places.download(source, tmp_path / "deep/back")
    assert (tmp_path / "deep/back").read_bytes() == data
    places.upload(tmp_path / "large", place(f"memory:/{tmp_path}/large"))
    assert place(f"memory:/{tmp_path}/large").parent.sizes() == {"large": len(data)} == source.parent.sizes()


def test_what_a_folder_mark_of_other_tools_is(bucket, tmp_path):
    folder = place(f"{bucket}{tmp_path}/marked")
    places._store("s3").call_s3("put_object", Bucket="bucket", Key=f"{str(tmp_path).strip('/')}/marked/", Body=b"")
    assert list(folder.iterdir()) == [] == list(folder.rglob("*"))
    (folder / "a").write_bytes(b"1")
    assert list(folder.iterdir()) == [folder / "a"] and folder.sizes() == {"a": 1}


def test_only_one_creates_what_must_be_new(bucket, tmp_path):
    for path in (place(f"{bucket}{tmp_path}/new"), place(f"memory:/{tmp_path}/new")):
        path.write_bytes(b"1", exclusive=True)
        with pytest.raises(FileExistsError):
            path.write_bytes(b"2", exclusive=True)
        assert path.read_bytes() == b"1"


def test_a_report_is_a_web_page(bucket):
    place(f"{bucket}/report/report.html").write_bytes(b"<p>")
    assert places._store("s3").call_s3("head_object", Bucket="bucket", Key="report/report.html")["ContentType"] == "text/html"


class DefaultCredentialsError(Exception):
    """As google.auth has one."""


class HttpError(Exception):
    """As gcsfs has one."""

    def __init__(self, code, message):
        super().__init__(f"{message}, {code}")
        self.code = code


@pytest.mark.parametrize(
    ("scheme", "raised", "kind", "said"),
    [
        (
            "s3",
            FileNotFoundError("The specified bucket does not exist"),
            FileNotFoundError,
            "there is no bucket 'bucket', or it cannot be seen",
        ),
        ("s3", PermissionError("Access Denied"), PermissionError, "permission denied by the store: Access Denied"),
        (
            "gs",
            OSError("Forbidden: b/bucket\ncaller is not allowed"),
            PermissionError,
            "permission denied by the store: Forbidden: b/bucket caller",
        ),
        (
            "gs",
            HttpError(401, "Anonymous caller does not have storage.objects.create"),
            PermissionError,
            "no credentials were found: run `gcloud",
        ),
        ("gs", DefaultCredentialsError("Your default\ncredentials"), PermissionError, "no credentials were found: run `gcloud auth"),
        ("gs", HttpError(503, "Backend\nError"), OSError, "Backend Error, 503"),
        ("s3", TimeoutError(), OSError, "TimeoutError"),
    ],
)
def test_what_stores_refuse_is_told_in_one_line(monkeypatch, scheme, raised, kind, said):
    class Refuses:
        def __getattr__(self, name):
            def method(*_, **__):
                raise raised

            return method

    monkeypatch.setattr(places, "_store", lambda scheme: Refuses())
    path = place(f"{scheme}://bucket/runs/unit.json")
    with pytest.raises(kind) as caught:
        path.write_bytes(b"1")
    assert caught.value.strerror.startswith(said) and "\n" not in str(caught.value)
    with pytest.raises(SealError) as told:
        files.write_atomic(path, b"1")
    said = said[:1].lower() + said[1:]
    assert str(told.value).startswith(f"{scheme}://bucket/runs/unit.json: cannot write: {said}")
    assert str(told.value).endswith("nothing finished is lost: see to the bucket, then run the same command again to go on")


def test_no_credentials(bucket, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    places._store.cache_clear()
    with pytest.raises(PermissionError, match=r"no credentials were found: run `aws configure`, or set AWS_ACCESS_KEY_ID"):
        (place(bucket + "/x") / "unit.json").write_bytes(b"1")
    places._store.cache_clear()
