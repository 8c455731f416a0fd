"""Every kind of source, on data made here."""

import gzip
import http.server
import json
import logging
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_jax.errors import SealError
from seal_jax.tasks.base import to_json
from seal_jax.tasks.knowledge import sources


def passage(title, n=1):
    return {
        "title": title,
        "context": f"{title} is a mill. It has {n} wheels.",
        "questions": [{"question": f"What is {title}, {i}?", "answer": f"mill {i}"} for i in range(n)],
    }


PASSAGES = [passage("Brindle Mill"), passage("Ösel Mill", 2), passage("Corro Mill", 3)]

# The same as SQuAD's columns, with the rows of two passages interleaved and a question without an answer.
ROWS = [
    {
        "id": f"{p['title']}-{i}",
        "title": p["title"].replace(" ", "_").replace("Ö", "%C3%96"),
        "context": p["context"],
        "question": p["questions"][i]["question"],
        "answers": {"text": [p["questions"][i]["answer"], "another"], "answer_start": [0, 1]},
    }
    for i in range(3)
    for p in PASSAGES
    if i < len(p["questions"])
]
ROWS.append({**ROWS[0], "id": "unanswerable", "question": "Who knows?", "answers": {"text": [], "answer_start": []}})


def write(path, data):
    path.write_text(json.dumps(data), encoding="utf-8")
    return str(path)


def check(contexts, expected=PASSAGES):
    assert [c.title for c in contexts] == [p["title"] for p in expected]
    assert [c.payload for c in contexts] == [{"context": p["context"], "questions": p["questions"]} for p in expected]
    json.dumps([to_json(c) for c in contexts])


# ---- the source line ----


def test_a_line_is_taken_apart():
    def parts(line):
        s = sources.parse(line)
        return s.kind, s.name, s.folder, s.split, s.start, s.stop

    assert parts("fictional") == ("fictional", "fictional", None, None, 0, None)
    assert parts("data/my file.json[3:10]") == ("json", "data/my file.json", None, None, 3, 10)
    assert parts("datasets:rajpurkar/squad") == ("datasets", "rajpurkar/squad", None, None, 0, None)
    assert parts("datasets:a/b@plain_text#validation[:5]") == ("datasets", "a/b", "plain_text", "validation", 0, 5)
    assert parts("tfds:squad/v1.1:3.0.0@/data/dir#train") == ("tfds", "squad/v1.1:3.0.0", "/data/dir", "train", 0, None)


@pytest.mark.parametrize("line", ["", " ", "datasets:", "tfds:@/data"])
def test_a_line_without_a_name_is_refused(line):
    with pytest.raises(SealError, match="data source"):
        sources.load(line, "train")


def test_a_file_may_be_named_like_a_split(tmp_path):
    check(sources.load(write(tmp_path / "mills.json#train", PASSAGES), "train"))


# ---- JSON ----


def test_json_in_the_originals_form(tmp_path):
    extra = [{**p, "prompt": "x"} for p in PASSAGES]
    contexts = sources.load(write(tmp_path / "a.json", extra), "train")
    check(contexts)
    assert [c.id for c in contexts] == ["00000-brindle-mill", "00001-osel-mill", "00002-corro-mill"]


def test_self_edits_of_a_passage_are_kept(tmp_path, caplog):
    extra = [{**PASSAGES[0], "completions": ["A.\nB.", " ", 3, "C."]}, {**PASSAGES[1], "completions": "text"}, PASSAGES[2]]
    contexts = sources.load(write(tmp_path / "a.json", extra), "train")
    assert [c.payload.get("completions") for c in contexts] == [["A.\nB.", "C."], None, None]
    assert "0 of 3 items skipped: 2 self-edit without text (item 0 'Brindle Mill'" in caplog.text


def test_json_may_be_gzipped(tmp_path):
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(json.dumps(PASSAGES).encode()))
    check(sources.load(str(path), "validation"))


def test_slices_and_order(tmp_path):
    path = write(tmp_path / "a.json", [passage(f"Mill {i}") for i in range(9)])
    assert [c.id for c in sources.load(f"{path}[2:4]", "train")] == ["00002-mill-2", "00003-mill-3"]
    order = sources.original_order(9, 42)
    assert sorted(order) == list(range(9)) and order != list(range(9))
    # the slice counts in the shuffled order, and ids keep the stored position
    assert [c.id for c in sources.load(f"{path}[2:4]", "train", shuffle=42)] == [f"{i:05d}-mill-{i}" for i in order[2:4]]
    with pytest.raises(SealError, match=r"no passages \(9 in the source\)"):
        sources.load(f"{path}[20:]", "train")


def test_ids_are_unique_for_equal_titles(tmp_path):
    contexts = sources.load(
        write(tmp_path / "a.json", [passage("Mill"), passage("Mill"), passage("磨坊"), {**passage("x"), "title": ""}]), "train"
    )
    assert [c.id for c in contexts] == ["00000-mill", "00001-mill", "00002-untitled", "00003-untitled"]


def test_unusable_items_are_skipped_and_counted_in_one_line(tmp_path, caplog):
    data = [
        PASSAGES[0],
        {"title": "Blank", "context": " \n", "questions": PASSAGES[0]["questions"]},
        {"title": "No context", "questions": PASSAGES[0]["questions"]},
        {"title": "Numbers", "context": 17, "questions": PASSAGES[0]["questions"]},
        {"title": ["list"], "context": "c", "questions": PASSAGES[0]["questions"]},
        "only a string",
        {"title": "No questions", "context": "c", "questions": []},
        {"title": "Missing questions", "context": "c"},
        {"title": "Unanswered", "context": "c", "questions": [{"question": "q?"}, {"question": "q?", "answer": " "}, "junk"]},
        {
            "title": "Half",
            "context": "c",
            "questions": [{"question": "q?", "answer": None}, {"answer": "a"}, {"question": "When?", "answer": 1802}],
        },
    ]
    with caplog.at_level(logging.WARNING):
        contexts = sources.load(write(tmp_path / "a.json", data), "train")
    assert [c.id for c in contexts] == ["00000-brindle-mill", "00009-half"]
    assert contexts[1].payload["questions"] == [{"question": "When?", "answer": "1802"}]
    (record,) = caplog.records
    message = record.getMessage()
    assert "8 of 10 items skipped" in message and "\n" not in message
    for part in (
        "2 with an empty passage (item 1 'Blank', item 2 'No context')",
        "1 with a passage that is not text",
        "1 with a title that is not text",
        "1 not a record but str (item 5)",
        "3 with no usable question (item 6 'No questions', item 7 'Missing questions', ...)",
        "3 question without an answer (item 8 'Unanswered': 'q?'",
        "2 question without text",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable as JSON"),
        ('{"data": []}', "holds dict; expected a list of {title, context, questions"),
        ("[]", r"no passages \(0 in the source\)"),
        ('[{"title": "T", "context": ""}]', "none of its 1 items is usable: 1 with an empty passage"),
        ("[1, 2]", "none of its 2 items is usable: 2 not a record but int"),
    ],
)
def test_an_unusable_file_is_one_clear_line(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(SealError, match=message) as error:
        sources.load(str(path), "train")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["title", "context", "questions", "question", "answer", "answers", "text"]), inner, max_size=6)
    ),
    max_leaves=20,
)


@given(st.lists(JSON, max_size=4))
def test_any_json_gives_contexts_or_one_clear_line(data):
    with tempfile.TemporaryDirectory() as folder:
        path = write(pathlib.Path(folder) / "a.json", data)
        try:
            contexts = sources.load(path, "train")
        except SealError as error:
            assert "\n" not in str(error)
        else:
            for context in contexts:
                assert context.payload["context"].strip() and context.payload["questions"]
                assert all(q["question"] and q["answer"] for q in context.payload["questions"])
                json.dumps(to_json(context), ensure_ascii=False).encode()


def test_lone_surrogates_become_encodable(tmp_path):
    (context,) = sources.load(write(tmp_path / "a.json", [{**PASSAGES[0], "context": "A \ud800 mill."}]), "train")
    assert context.payload["context"] == "A ? mill."


def test_a_damaged_name_is_one_clear_line():
    for line in ("x" * 5000, "datasets:/" + "x" * 5000, "a\0b"):
        with pytest.raises(SealError):
            sources.load(line, "train")


def test_bytes_that_are_not_text_are_one_clear_line(tmp_path):
    for name in ("a.json", "a.json.gz"):
        (tmp_path / name).write_bytes(b"\x80\x81\x82")
        with pytest.raises(SealError, match="not readable as JSON"):
            sources.load(str(tmp_path / name), "train")


def test_wrong_names_are_explained(tmp_path):
    with pytest.raises(SealError, match=r"^data source .*none\.json: no such file; "):
        sources.load(str(tmp_path / "none.json"), "train")
    with pytest.raises(SealError, match="did you mean 'fictional'"):
        sources.load("fictinal", "train")
    with pytest.raises(SealError, match="did you mean 'datasets'"):
        sources.load("dataset:rajpurkar/squad", "train")
    with pytest.raises(SealError, match=r"is a folder.*datasets:"):
        sources.load(str(tmp_path), "train")
    with pytest.raises(SealError, match="a JSON file has no splits"):
        sources.load(write(tmp_path / "a.json", PASSAGES) + "#train", "train")


def test_fictional_takes_the_file_of_the_split(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DATA", tmp_path)
    write(tmp_path / "fictional_train.json", PASSAGES[:1])
    write(tmp_path / "fictional_validation.json", PASSAGES[1:])
    check(sources.load("fictional", "train"), PASSAGES[:1])
    check(sources.load("fictional", "validation"), PASSAGES[1:])
    check(sources.load("fictional#train", "validation"), PASSAGES[:1])
    with pytest.raises(SealError, match="no split 'test'; there are: train, validation"):
        sources.load("fictional#test", "train")


def test_the_demo_set_is_usable(caplog):
    for split in ("train", "validation"):
        assert sources.load("fictional", split)
    assert not caplog.records


# ---- datasets ----


@pytest.fixture
def hf(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    return datasets


def test_datasets_saved_with_splits(hf, tmp_path):
    data = hf.DatasetDict({"train": hf.Dataset.from_list(ROWS), "validation": hf.Dataset.from_list(PASSAGES[:2])})
    data.save_to_disk(str(tmp_path / "saved"))
    check(sources.load(f"datasets:{tmp_path}/saved", "train"))
    check(sources.load(f"datasets:{tmp_path}/saved", "validation"), PASSAGES[:2])
    check(sources.load(f"datasets:{tmp_path}/saved#validation[1:2]", "train"), PASSAGES[1:2])
    with pytest.raises(SealError, match="no split 'test'; there are: train, validation"):
        sources.load(f"datasets:{tmp_path}/saved#test", "train")


def test_datasets_saved_without_splits(hf, tmp_path):
    hf.Dataset.from_list(PASSAGES).save_to_disk(str(tmp_path / "saved"))
    check(sources.load(f"datasets:{tmp_path}/saved", "train"))
    with pytest.raises(SealError, match="has no split 'test'"):
        sources.load(f"datasets:{tmp_path}/saved#test", "train")


def test_datasets_stores_questions_as_columns_too(hf, tmp_path):
    """Sequences of records come back as records of sequences, by the version of `datasets`."""
    columns = [{**p, "questions": {k: [q[k] for q in p["questions"]] for k in ("question", "answer")}} for p in PASSAGES]
    hf.Dataset.from_list(columns).save_to_disk(str(tmp_path / "saved"))
    check(sources.load(f"datasets:{tmp_path}/saved", "train"))


def test_datasets_local_folder(hf, tmp_path):
    folder = tmp_path / "mills"
    folder.mkdir()
    hf.Dataset.from_list(ROWS).to_parquet(str(folder / "train.parquet"))
    check(sources.load(f"datasets:{folder}", "train"))
    with pytest.raises(SealError, match=r"split 'validation'.*train"):
        sources.load(f"datasets:{folder}", "validation")


def test_datasets_folder_that_is_missing_or_unusable(hf, tmp_path):
    with pytest.raises(SealError, match="is not a folder"):
        sources.load(f"datasets:{tmp_path}/none", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SealError, match=r"data source datasets:.*empty") as error:
        sources.load(f"datasets:{tmp_path}/empty", "train")
    assert "\n" not in str(error.value)
    hf.Dataset.from_list([{"text": "no passages here"}]).save_to_disk(str(tmp_path / "other"))
    with pytest.raises(SealError, match="none of its 1 items is usable: 1 with an empty passage"):
        sources.load(f"datasets:{tmp_path}/other", "train")


@pytest.fixture
def hub(hf, monkeypatch):
    """A hub that answers "no such data set" to everything; its address can be changed by the test."""
    from huggingface_hub import constants

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def use(address):
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(hf.config, "HF_ENDPOINT", address)

    use(f"http://127.0.0.1:{server.server_port}")
    yield use
    server.shutdown()
    server.server_close()


def test_hub_does_not_have_it(hub):
    with pytest.raises(SealError, match="the hub has no data set 'nobody/no-mills'"):
        sources.load("datasets:nobody/no-mills", "train")


def test_hub_out_of_reach_is_told_quickly(hub):
    hub("http://127.0.0.1:9")  # nothing listens at the discard port
    start = time.monotonic()
    with pytest.raises(SealError, match=r"the hub cannot be reached and no copy is in the cache \(.*refused.*\)") as error:
        sources.load("datasets:nobody/no-mills", "train")
    assert time.monotonic() - start < 10
    assert "\n" not in str(error.value)


def test_hub_out_of_reach_but_in_the_cache(hub, hf, tmp_path):
    folder = tmp_path / "mills"
    folder.mkdir()
    hf.Dataset.from_list(ROWS).to_parquet(str(folder / "train.parquet"))
    hf.load_dataset(str(folder), split="train")
    # as if it had come from the hub: CACHE/OWNER___NAME/CONFIG/VERSION/FINGERPRINT
    cache = tmp_path / "cache"
    (prepared,) = (p.parent for p in cache.glob("**/dataset_info.json"))
    shutil.move(prepared, cache / "nobody___mills" / "default" / "0.0.0" / "0123456789abcdef")
    hub("http://127.0.0.1:9")
    offline = hf.config.HF_HUB_OFFLINE
    check(sources.load("datasets:nobody/mills", "train"))
    assert offline == hf.config.HF_HUB_OFFLINE


# ---- tensorflow_datasets ----


@pytest.fixture
def prepare(tmp_path):
    """Prepares a builder of rows in a data directory, in a file format that can be written without TensorFlow."""
    tfds = pytest.importorskip("tensorflow_datasets")
    text = tfds.features.Text()

    def prepare(features, splits, file_format="array_record", version="1.0.0", data_dir=tmp_path / "tfds"):
        class Mills(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            VERSION = tfds.core.Version(version)
            code_path = pkg_dir_path = None  # made here, not in a package

            def _info(self):
                described = tfds.features.FeaturesDict(features(text, tfds.features.Sequence))
                return tfds.core.DatasetInfo(builder=self, features=described, disable_shuffling=True)

            def _split_generators(self, dl_manager):
                return {name: enumerate(rows) for name, rows in splits.items()}

            def _generate_examples(self):
                raise NotImplementedError

        builder = Mills(data_dir=data_dir, file_format=file_format)
        builder.download_and_prepare()
        return builder

    return prepare


def squad_features(text, sequence):
    return {
        "id": text,
        "title": text,
        "context": text,
        "question": text,
        "answers": sequence({"text": text, "answer_start": np.int32}),
    }


def passage_features(text, sequence):
    return {"title": text, "context": text, "questions": sequence({"question": text, "answer": text})}


@pytest.mark.parametrize("file_format", ["array_record", "parquet"])
def test_tfds_squad_columns(prepare, tmp_path, file_format):
    prepare(squad_features, {"train": ROWS, "validation": ROWS[:1]}, file_format)
    check(sources.load(f"tfds:mills@{tmp_path}/tfds", "train"))
    (one,) = sources.load(f"tfds:mills@{tmp_path}/tfds#validation", "train")
    assert one.title == "Brindle Mill"


def test_tfds_passages_and_versions(prepare, tmp_path):
    prepare(passage_features, {"train": PASSAGES[:1]}, version="9.0.0")
    prepare(passage_features, {"train": PASSAGES}, version="10.0.0")
    check(sources.load(f"tfds:mills@{tmp_path}/tfds", "train"))  # 10 is above 9
    check(sources.load(f"tfds:mills:9.0.0@{tmp_path}/tfds", "train"), PASSAGES[:1])


def to_tfrecord(folder):
    """The files of a prepared builder as TFRecord, which TensorFlow alone can write."""
    from array_record.python.array_record_module import ArrayRecordReader

    for path in folder.glob("*.array_record-*"):
        records = ArrayRecordReader(str(path)).read_all()
        data = b"".join(len(r).to_bytes(8, "little") + b"crc1" + r + b"crc2" for r in records)
        path.with_name(path.name.replace("array_record", "tfrecord")).write_bytes(data)
        path.unlink()
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))


def test_tfds_tfrecord_needs_no_tensorflow(prepare, tmp_path):
    builder = prepare(squad_features, {"train": ROWS})
    folder = pathlib.Path(str(builder.data_dir))
    to_tfrecord(folder)
    check(sources.load(f"tfds:mills@{tmp_path}/tfds", "train"))
    (path,) = folder.glob("*.tfrecord-*")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(SealError, match="cut off or not a TFRecord file"):
        sources.load(f"tfds:mills@{tmp_path}/tfds", "train")


def test_tfds_needs_neither_tensorflow_nor_jax(prepare, tmp_path):
    prepare(squad_features, {"train": ROWS})
    code = (
        "import sys\n"
        "from seal_jax.tasks.knowledge import sources\n"
        f"print(len(sources.load('tfds:mills@{tmp_path}/tfds', 'train')), 'tensorflow' in sys.modules, 'jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "3 False False", done.stderr


def test_tfds_that_is_missing_is_one_clear_line(prepare, tmp_path):
    with pytest.raises(SealError, match=r"no prepared builder in .*tfds/mills"):
        sources.load(f"tfds:mills@{tmp_path}/tfds", "train")
    builder = prepare(squad_features, {"train": ROWS})
    with pytest.raises(SealError, match="no split 'validation'; there are: train"):
        sources.load(f"tfds:mills@{tmp_path}/tfds", "validation")
    with open(f"{builder.data_dir}/features.json", "w") as file:
        file.write("{")
    with pytest.raises(SealError, match="data source tfds:mills") as error:
        sources.load(f"tfds:mills@{tmp_path}/tfds", "train")
    assert "\n" not in str(error.value)
