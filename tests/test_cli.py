"""The command line as a user has it, in this process for speed; `test_cli_processes.py` has what needs one of its own."""

import dataclasses
import errno
import gzip
import json
import os
import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest

from seal_jax import cli
from seal_jax import config as config_lib
from seal_jax.models import embedded, peft
from seal_jax.models.load import load_model
from seal_jax.models.lora import merge
from seal_jax.rest_em import loop
from seal_jax.rest_em import stage as stage_lib
from seal_jax.rest_em.policy import Policy
from seal_jax.runs import checkpoint, files, places
from seal_jax.runs.events import read_events
from seal_jax.runs.places import place
from seal_jax.runs.store import RunStore
from seal_jax.tasks.base import Prompt


@pytest.fixture(scope="module", autouse=True)
def quick(quick_compile):
    with quick_compile():
        yield


@pytest.fixture
def seal(capsys):
    """`seal(...)` runs a command in this process: (exit code, standard output, standard error)."""

    def run(*arguments):
        capsys.readouterr()
        code = cli.main([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(seal):
    """`refused(...)` is the one line that a command says before it ends with code 2."""

    def run(*arguments):
        code, out, err = seal(*arguments)
        lines = err.splitlines()
        # Lines of the start and of the progress may stand before it.
        assert code == 2 and out == "" and "Traceback" not in err, err
        assert lines[-1].startswith("seal-jax: ") and not any(line.startswith("seal-jax: ") for line in lines[:-1]), err
        return lines[-1].removeprefix("seal-jax: ")

    return run


@pytest.fixture
def run_copy(tiny_run, tmp_path):
    """A copy of the finished run, to be changed."""
    return shutil.copytree(tiny_run, tmp_path / "copy")


# --- train ----------------------------------------------------------------------------------------------------------


def test_train_prints_the_table_and_the_paths(seal, run_copy, monkeypatch, units):
    monkeypatch.setattr(loop, "measure", None)  # a finished run has nothing to compute
    monkeypatch.setattr(Policy, "tune", None)
    before = {path: path.read_bytes() for path in run_copy.rglob("*.json")}
    code, out, err = seal("train", run_copy)
    assert code == 0
    lines = out.splitlines()
    assert lines[1].split()[:3] == ["method", "policy", "statistic"]
    assert sum(line.startswith(("no adaptation", "passage")) for line in lines) == len(units(run_copy)["table"]["rows"]) >= 6
    assert any("after 2 rounds" in line for line in lines)
    assert lines[-2:] == [f"run folder: {run_copy}", f"report:     {run_copy / 'report.html'}"]
    assert err.splitlines()[0] == f"seal-jax train: tiny, run folder {run_copy}"
    assert {path: path.read_bytes() for path in run_copy.rglob("*.json")} == before


def test_another_config_is_refused_for_a_run_with_results(refused, tiny_run):
    said = refused("train", tiny_run.parent / "config.yaml", "fit.epochs=5")
    assert said == (
        f"{tiny_run}: holds a run with fit.epochs=4, the config has fit.epochs=5; "
        "continue with the run's own config, or choose another run_dir"
    )
    assert "fit.epochs=4, the config has fit.epochs=6" in refused("train", tiny_run, "fit.epochs=6")
    assert "goes on where it is; leave run_dir out" in refused("train", tiny_run, "run_dir=elsewhere")


def test_a_mistake_in_the_config_can_be_corrected_in_the_same_folder(refused, seal, tiny_config, tmp_path):
    said = refused("train", tiny_config, "task.train=trian.json")
    assert said.startswith("data source trian.json: no such file; ")
    assert (tmp_path / "run/config.yaml").is_file()
    code, out, _ = seal("train", tiny_config, "rest_em.rounds=0", "evaluate.contexts=1")
    assert code == 0 and "no adaptation" in out


# --- evaluate, generate, grade, export, report ----------------------------------------------------------------------


def test_evaluate_a_run_is_about_its_trained_policy(seal, refused, run_copy, units):
    code, out, _ = seal("evaluate", run_copy, "evaluate.contexts=1")
    assert code == 0
    folder = f"{run_copy}-evaluate"
    assert out.splitlines()[-2] == f"run folder: {folder}"
    assert {line.split("  ")[1].strip() for line in out.splitlines() if line.startswith("passage only")} <= {"", "after 2 rounds"}
    assert {row["policy"] for row in units(folder)["table"]["rows"]} == {"after 2 rounds"}
    assert units(folder)["evaluate/after/000"]["contexts"][0]["edits"] == units(run_copy)["evaluate/after/000"]["contexts"][0]["edits"]
    assert [name for name in units(run_copy) if name.startswith("evaluate")] == [
        *("evaluate/after/000", "evaluate/after/001", "evaluate/before/000", "evaluate/before/001")
    ], "the run itself stays as it is"
    # Both the run and its evaluation can be named to go on.
    again = seal("evaluate", folder)
    assert again[0] == 0 and again[1] == out
    assert "choose another run_dir" in refused("evaluate", run_copy)
    train = refused("train", folder)
    assert train == f"{folder}: holds an evaluation of {run_copy}; train that run"


def test_evaluate_other_data_elsewhere(seal, tiny_run, tmp_path, units):
    data = tiny_run.parent / "train.json"
    code, _, _ = seal("evaluate", tiny_run, f"task.validation={data}[1:2]", f"run_dir={tmp_path / 'e'}")
    assert code == 0
    (context,) = units(tmp_path / "e")["evaluate/after/000"]["contexts"]
    assert context["title"] == "Vell"


def test_evaluate_a_config_is_about_its_model(seal, tiny_config, tmp_path, units):
    code, out, _ = seal("evaluate", tiny_config, "evaluate.contexts=1")
    assert code == 0 and "after" not in out
    assert {row["policy"] for row in units(tmp_path / "run")["table"]["rows"]} == {"base"}
    assert seal("evaluate", tmp_path / "run")[1] == out, "a run without a finished round goes on in its own folder"
    assert not (tmp_path / "run-evaluate").exists()


def test_generate_prints_json_lines_and_nothing_else(seal, tiny_config, tiny_run, tmp_path):
    code, out, _ = seal("generate", tiny_config, "--limit", "1", "rest_em.edits=3", "--split", "train")
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [(r["context"], r["candidate"]) for r in records] == [("00000-orsk", k) for k in range(3)]
    assert all(r["text"] and r["problem"] is None and r["sequences"][-1].startswith("Orsk\n") for r in records)
    assert not (tmp_path / "run").exists(), "no run is made"
    # A run writes with its trained policy, from the same draws.
    trained = [json.loads(line) for line in seal("generate", tiny_run, "--limit", "1", "--split", "train")[1].splitlines()]
    assert [r["context"] for r in trained] == ["00000-orsk"] * 2
    assert [r["text"] for r in trained] != [r["text"] for r in records[:2]]


def cases(*verdicts):
    answers = [[["salt", "tin"][not right], verdict] for right, verdict in verdicts]
    return {"answer_fields": ["prediction", "verdict"], "cases": [{"title": "T", "question": "What?", "gold": "salt", "answers": answers}]}


def test_grade_prints_the_agreement(seal, tmp_path):
    data = json.dumps(cases((True, True), (True, True), (True, False), (False, False)))
    (tmp_path / "cases.json").write_text(data)
    (tmp_path / "cases.json.gz").write_bytes(gzip.compress(data.encode()))
    for name in ("cases.json", "cases.json.gz"):
        code, out, _ = seal("grade", tmp_path / name, "name=match", "threshold=0.5")
        assert code == 0
        header, row = (line.split() for line in out.splitlines())
        assert dict(zip(header, row, strict=True)) == {
            **{"grader": "match", "cases": "4", "ungraded": "0", "accuracy": "0.750", "precision": "0.667", "recall": "1.000"},
            "kappa": "0.500",
        }


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object with a list 'cases'"),
        ('{"cases": []}', "no cases"),
        ('{"cases": [{"title": "T", "question": "Q"}]}', "case 0: has no 'gold'"),
        ('{"cases": [{"title": "T", "question": "Q", "gold": "G", "answers": [["x", "yes"]]}]}', "'verdict' must be true or false"),
    ],
)
def test_malformed_cases_are_refused(refused, tmp_path, data, said):
    (tmp_path / "cases.json").write_text(data)
    line = refused("grade", tmp_path / "cases.json")
    assert line.startswith(str(tmp_path / "cases.json")) and said in line


def test_export_writes_the_trained_policy(seal, tiny_run, tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    config = config_lib.load(tiny_run / "config.yaml")
    policy = stage_lib.build(config, (), RunStore(tiny_run), 2).policy
    assert seal("export", tiny_run, tmp_path / "hf")[:2] == (0, f"{tmp_path / 'hf'}\n")
    assert AutoConfig.from_pretrained(tmp_path / "hf").hidden_size == 32
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    messages = [{"role": "user", "content": "What does Orsk sell?"}]
    ids = policy.tokenizer.encode_prompt(Prompt(messages=tuple(messages)))
    assert tokenizer.encode(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)) == ids
    loaded = load_model(config_lib.ModelConfig(str(tmp_path / "hf"), "float32"))
    for ours, theirs in zip(jax.tree.leaves(policy.params), jax.tree.leaves(loaded.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    probes = [[Prompt(messages=tuple(messages)), Prompt(messages=({"role": "user", "content": "Who?"},))]]
    base = Policy(load_model(config.model), config)
    assert Policy(loaded, config).answer(probes) == policy.answer(probes) != base.answer(probes)

    # One adapter for both rounds, over the model that the run started from.
    code, _, said = seal("export", tiny_run, tmp_path / "peft", "--format", "peft")
    assert code == 0 and f"seal-jax export: adapter (peft) of {tiny_run} after round 2\n" in said
    described = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"], described["base_model_name_or_path"]) == (8, 16, config.model.name)
    lora, rank, alpha = peft.load_adapter(tmp_path / "peft", loaded.spec)
    base = load_model(config.model)
    for ours, theirs in zip(jax.tree.leaves(policy.params), jax.tree.leaves(merge(base.params, lora, alpha / rank)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)

    # An earlier round.
    assert seal("export", tiny_run, tmp_path / "first", "--round", "1", "--format", "peft")[0] == 0
    first, rank, alpha = peft.load_adapter(tmp_path / "first", loaded.spec)
    written, _ = checkpoint.load_adapters(tiny_run / "policy/1")
    np.testing.assert_array_equal(first["layers"]["mlp"]["up_proj"]["a"], written["layers"]["mlp"]["up_proj"]["a"])


def test_an_adapter_of_the_embedded_model_names_the_model_of_the_hub(seal, run_copy, tmp_path):
    text, name = (run_copy / "config.yaml").read_text(), config_lib.load(run_copy / "config.yaml").model.name
    (run_copy / "config.yaml").write_text(text.replace(name, "embedded"))
    assert seal("export", run_copy, tmp_path / "peft", "--format", "peft")[0] == 0
    assert json.loads((tmp_path / "peft/adapter_config.json").read_text())["base_model_name_or_path"] == embedded.HUB_ID


def test_peft_and_transformers_compute_the_exported_policy(seal, tiny_run, tmp_path):
    torch = pytest.importorskip("torch")
    peft_library = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    seal("export", tiny_run, tmp_path / "hf")
    seal("export", tiny_run, tmp_path / "peft", "--format", "peft")
    name = config_lib.load(tiny_run / "config.yaml").model.name
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()(ids).logits
        base = AutoModelForCausalLM.from_pretrained(name).eval()
        plain = base(ids).logits
        adapted = peft_library.PeftModel.from_pretrained(base, tmp_path / "peft").eval()(ids).logits
    assert (merged - adapted).abs().max() < 1e-4 < (merged - plain).abs().max()


def test_export_refusals(refused, tiny_run, tiny_config, seal, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("")
    assert f"{tmp_path / 'full'}: exists and is not an empty folder" in refused("export", tiny_run, tmp_path / "full")
    assert "no policy of round 3; finished rounds: 1 to 2" in refused("export", tiny_run, tmp_path / "x", "--round", "3")
    assert "no policy of round 0" in refused("export", tiny_run, tmp_path / "x", "--round", "0")
    seal("evaluate", tiny_config, "evaluate.contexts=1")
    assert "no round of this run is finished yet" in refused("export", tmp_path / "run", tmp_path / "x")
    assert f"{tmp_path}: not a run folder (no versions.json in it)" in refused("export", tmp_path, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_report(seal, refused, run_copy, tmp_path):
    (run_copy / "report.html").unlink()
    assert seal("report", run_copy)[:2] == (0, f"{run_copy / 'report.html'}\n")
    assert "after 2 rounds" in (run_copy / "report.html").read_text()
    assert refused("report", tmp_path / "nowhere").startswith(f"{tmp_path / 'nowhere'}: not a run folder (no config.yaml in it)")


def test_a_run_in_a_bucket_is_read_as_one_on_the_disk(seal, refused, tiny_run, bucket, tmp_path, units):
    run = place(f"{bucket}{tmp_path}/run")
    for path in tiny_run.rglob("*"):
        if path.is_file() and path.name not in ("lock", "report.html"):
            places.upload(path, run / path.relative_to(tiny_run).as_posix())
    assert seal("report", run)[:2] == (0, f"{run}/report.html\n")
    assert "after 2 rounds" in (run / "report.html").read_text()
    assert seal("export", run, tmp_path / "here", "--format", "peft")[0] == 0
    assert seal("export", run, f"{run}-exported", "--format", "peft")[0] == 0
    weights = "adapter_model.safetensors"
    assert (place(f"{run}-exported") / weights).read_bytes() == (tmp_path / "here" / weights).read_bytes()
    assert f"{run}-exported: exists and is not an empty folder" in refused("export", run, f"{run}-exported")
    code, out, _ = seal("evaluate", run, "evaluate.contexts=1")
    assert code == 0 and out.splitlines()[-2] == f"run folder: {run}-evaluate"
    there = units(f"{run}-evaluate")
    assert there["evaluate/after/000"]["contexts"][0]["edits"] == units(tiny_run)["evaluate/after/000"]["contexts"][0]["edits"]
    assert there["origin"]["run"] == str(run)
    assert f"{run}/nothing: not a run folder" in refused("report", f"{run}/nothing")
    assert "s3://none/run/lock: cannot write: there is no bucket 'none'" in refused(
        "train", tiny_run.parent / "config.yaml", "run_dir=s3://none/run"
    )


# --- bad input ------------------------------------------------------------------------------------------------------


UNREACHABLE = ["grade.name=endpoint", "grade.base_url=http://127.0.0.1:9/v1"]  # nobody listens to port 9


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train"], "the following arguments are required: RUN_OR_"),
        (["trian", "x"], "invalid choice: 'trian'"),
        ([], "the following arguments are required: COMMAND"),
        (["train", "CONFIG", "--rounds=3"], "unrecognised arguments: --rounds=3"),
        (["report", "a", "b"], "unrecognised arguments: b"),
        (["generate", "CONFIG", "--limit", "0"], "--limit: '0': expected a number above 0"),
        (["generate", "CONFIG", "--limit", "2", "limit"], "override 'limit': expected key.sub=value"),
        (["train", "nothing.yaml"], "nothing.yaml: no such config file"),
        (["train", "runs/nope"], "runs/nope: no such run folder or config file"),
        (["grade", "FOLDER/train.json", "grade.threshold=2"], "seal-jax grade: grade.threshold=2.0: expected a number above 0"),
        (["train", "FOLDER"], "FOLDER: not a run folder (no versions.json in it)"),
        (["train", "CONFIG", "fit.lora.rnk=1"], "CONFIG: unknown key 'fit.lora.rnk' (did you mean 'rank'?)"),
        (["evaluate", "CONFIG", "evaluate.contexts=few"], "CONFIG: evaluate.contexts: Value 'few' of type 'str' could not be converted"),
        (["train", "CONFIG", "task.prompt=fact"], "task.prompt='fact' is unknown (did you mean 'facts'?)"),
        (["train", "CONFIG", "model.name=FOLDER/nothing"], "model.name='FOLDER/nothing': no such folder or file"),
        (["train", "CONFIG", "model.name=FOLDER"], "FOLDER/config.json: no such file; expected FOLDER to be a model folder"),
        (["generate", "CONFIG", "task.train=FOLDER/nothing.json", "--split=train"], "data source FOLDER/nothing.json: no such file"),
        (["train", "CONFIG", "task.train=FOLDER"], "FOLDER is a folder"),
        (["train", "CONFIG", "task.validation=CONFIG"], "is not readable as JSON"),
        (["train", "CONFIG", "task.train=FOLDER/train.json[9:]"], "no passages (4 in the source)"),
        (["train", "CONFIG", "run_dir=/dev/null/run"], "/dev/null/run: cannot be a run folder: not a directory; choose another run_dir"),
        (["train", "CONFIG", "run_dir=FOLDER"], "FOLDER: not empty and not a run (it holds 'config.yaml'); choose another run_dir"),
        (["train", "CONFIG", "run_dir=az://a/b"], "az://a/b: az:// is not known here; give a folder, gs://BUCKET/PATH or s3://BUCKET/PATH"),
        (["train", "CONFIG", "model.max_length=40"], "task.train: no usable context: all 4 have a prompt that leaves no room"),
        (["train", "CONFIG", *UNREACHABLE], "grade.name=endpoint: http://127.0.0.1:9/v1 cannot be reached (connection failed: "),
        (["continual", "CONFIG", *UNREACHABLE], "grade.name=endpoint: http://127.0.0.1:9/v1 cannot be reached (connection failed: "),
        (["grade", "FOLDER/train.json", "name=endpoint", "base_url=http://127.0.0.1:9/v1"], "http://127.0.0.1:9/v1 cannot be reached"),
        (["train", "CONFIG", "grade.name=judge", "grade.model=FOLDER/nothing"], "grade.model='FOLDER/nothing': no such folder or file"),
        (["grade", "FOLDER/nothing.json"], "FOLDER/nothing.json: no such file of cases"),
        (["grade", "FOLDER/train.json", "name=mach"], "grade.name='mach': expected one of match, judge, endpoint"),
    ],
)
def test_bad_input_is_one_line(refused, tiny_config, arguments, said):
    folder = str(tiny_config.parent)
    fill = lambda text: text.replace("CONFIG", str(tiny_config)).replace("FOLDER", folder)  # noqa: E731
    assert fill(said) in refused(*map(fill, arguments))


def test_data_with_nothing_usable(refused, tiny_config, tmp_path):
    (tmp_path / "empty.json").write_text(json.dumps([{"title": "T", "context": " ", "questions": []}]))
    said = refused("train", tiny_config, f"task.validation={tmp_path / 'empty.json'}")
    assert f"data source {tmp_path / 'empty.json'}: none of its 1 items is usable: 1 with an empty passage" in said
    (tmp_path / "list.json").write_text("[]")
    assert "no passages" in refused("train", tiny_config, f"task.validation={tmp_path / 'list.json'}")


def test_unusable_items_are_skipped_counted_and_shown(seal, caplog, tiny_config, tmp_path):
    good = json.loads((tmp_path / "validation.json").read_text())
    good[0]["questions"].append({"question": "Who?", "answer": ""})
    long = {**good[0], "title": "Long", "context": "salt and tin " * 200}
    (tmp_path / "mixed.json").write_text(json.dumps([{**good[1], "context": ""}, *good, long]))
    overrides = [f"task.validation={tmp_path / 'mixed.json'}", "evaluate.contexts=1"]
    code, _, _ = seal("evaluate", tiny_config, *overrides)
    assert code == 0
    assert [e for e in caplog.messages if "skipped" in e] == [
        f"data source {tmp_path / 'mixed.json'}: 1 of 4 items skipped: 1 with an empty passage (item 0 'Brast'); "
        "2 question without an answer (item 1 'Quor': 'Who?', item 3 'Long': 'Who?')",
        "task.validation: 1 of 3 contexts skipped: each has a prompt that leaves no room for an answer within 192 tokens: 00003-long",
    ]
    found = [(e["reason"], e["count"]) for e in read_events(tmp_path / "run/events.jsonl") if e["event"] == "skipped"]
    assert found == [
        ("item with an empty passage", 1),
        ("question without an answer", 2),
        ("context with a prompt that leaves no room for an answer within 192 tokens", 1),
    ]
    page = (tmp_path / "run/report.html").read_text()
    assert "1 × item with an empty passage" in page and "2 × question without an answer" in page


def test_self_edits_without_a_usable_line_earn_nothing_and_are_counted(seal, tiny_config, tmp_path, monkeypatch, units):
    monkeypatch.setattr(Policy, "write", lambda self, prompts, keys, *_: [[" \n", "Rewrite:"][: len(each)] for each in keys])
    code, out, _ = seal("evaluate", tiny_config, "evaluate.contexts=1")
    assert code == 0
    (context,) = units(tmp_path / "run")["evaluate/before/000"]["contexts"]
    assert [(e["reward"], e["problem"], e["trials"]) for e in context["edits"]] == [(0.0, "no usable line in the self-edit", [])] * 2
    assert "0.0" in next(line for line in out.splitlines() if "mean of K" in line)
    assert "no usable line in the self-edit" in (tmp_path / "run/report.html").read_text()


def test_a_run_that_another_process_works_on(refused, run_copy):
    config = config_lib.load(run_copy / "config.yaml")
    with RunStore.create_or_open(run_copy, dataclasses.replace(config, run_dir=str(run_copy))):
        said = refused("train", run_copy)
    assert said.startswith(f"{run_copy}: in use by another process (process {os.getpid()} on ")


def test_a_full_disk_loses_nothing(refused, seal, tiny_config, tiny_run, tmp_path, monkeypatch, units):
    write_all, done = files.write_all, 0
    for free in (0, 3000, 8000, 16000, 40000):
        left = [free]

        def write(file, data, left=left):
            fits = data[: left[0]]
            left[0] -= len(fits)
            write_all(file, fits)
            if len(fits) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(files, "write_all", write)
            said = refused("train", tiny_config)
        assert "cannot write: no space left on device; nothing finished is lost" in said
        assert len(units(tmp_path / "run")) >= done
        done = len(units(tmp_path / "run"))
        assert not list((tmp_path / "run").rglob("*.tmp"))
    assert done >= 3
    assert seal("train", tiny_config)[0] == 0
    assert units(tmp_path / "run") == units(tiny_run)


def test_a_full_standard_output(tiny_run, monkeypatch, capsys):
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        code = cli.main(["report", str(tiny_run)])
    assert code == 2 and capsys.readouterr().err == "seal-jax: standard output: no space left on device\n"


def test_devices_without_memory_are_one_line(monkeypatch, capsys, tmp_path):
    from seal_jax.fleet import run

    def full(settings):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12345 bytes.\nmore")

    monkeypatch.setattr(run, "train", full)
    assert cli.main(["train", f"{pathlib.Path(__file__).parents[1]}/configs/quickstart.yaml", f"run_dir={tmp_path / 'run'}"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(
        "seal-jax: the devices' memory is full (RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12345 bytes.)"
    )
    assert "lower answer.rows, sample.rows, fit.slots or m_step.microbatch, or set model.remat=full, and run the command again" in last
