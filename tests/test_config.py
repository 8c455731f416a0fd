import dataclasses

import pytest
import yaml

from seal_jax import config as config_lib
from seal_jax import tasks
from seal_jax.errors import SealError
from seal_jax.tasks.knowledge import Config as Knowledge

TASK = {"task": {"name": "knowledge"}}


def build(*overrides, **data):
    return config_lib.build({**TASK, **data}, overrides)


def refusal(call) -> str:
    """The message of the `SealError` that `call` raises, which is one line."""
    with pytest.raises(SealError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_and_given_values():
    config = build(fit={"lora": {"rank": 4}, "learning_rate": 5e-4}, name="x")
    assert (config.fit.lora.rank, config.fit.lora.alpha, config.fit.learning_rate) == (4, 64.0, 5e-4)
    assert config.run_dir == "runs/x"
    assert isinstance(config.task, Knowledge) and config.task == Knowledge()


def test_overrides_apply_in_order_at_any_depth():
    config = build(
        *("fit.lora.rank=8", "fit.lora.rank=16", "fit.lengths=[8,16]", "fit.lora.targets=[o_proj]", "fit.max_steps=7"),
        *("fit.max_steps=null", "grade.cache=/tmp/a=b", "task.train=x.json", "seed=3", "name=y", "task.shuffle=42"),
        fit={"max_steps": 3},
    )
    assert (config.fit.lora.rank, config.fit.lengths, config.fit.lora.targets, config.fit.max_steps) == (16, [8, 16], ["o_proj"], None)
    assert (config.grade.cache, config.task.train, config.task.shuffle, config.seed) == ("/tmp/a=b", "x.json", 42, 3)
    assert config.run_dir == "runs/y"


def test_written_configs_read_back(tmp_path):
    config = build("fit.max_steps=5", "fit.lengths=[8]", "task.shuffle=1", "grade.base_url=http://localhost:1/v1", "m_step.lora.rank=2")
    (tmp_path / "c.yaml").write_text(config_lib.to_yaml(config))
    assert config_lib.load(tmp_path / "c.yaml") == config
    assert config_lib.load(tmp_path / "c.yaml", ["seed=1"]) == dataclasses.replace(config, seed=1)
    # Every field is written, so that a run folder keeps today's defaults.
    assert yaml.safe_load(config_lib.to_yaml(config)) == config_lib.to_dict(config)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        # unknown keys, with the nearest known one
        ("fit.lora.rnk=1", "unknown key 'fit.lora.rnk' (did you mean 'rank'?)"),
        ("rest_me.rounds=1", "unknown key 'rest_me' (did you mean 'rest_em'?)"),
        ("task.promt=facts", "unknown key 'task.promt' (did you mean 'prompt'?)"),
        ("fit.lora.rank.x=1", "fit.lora.rank={'x': 1}: expected a single value"),
        ("zzz=1", "unknown key 'zzz'; known here: name, seed"),
        ("1=2", "unknown key '1'"),
        # wrong types
        ("fit.epochs=many", "fit.epochs: Value 'many' of type 'str' could not be converted to Integer"),
        ("fit.epochs=2.5", "fit.epochs: Value '2.5'"),
        ("fit.epochs=true", "fit.epochs: Value 'True'"),
        ("fit.epochs=null", "fit.epochs"),
        ("fit.learning_rate=fast", "fit.learning_rate: Value 'fast'"),
        ("evaluate.during_training=perhaps", "evaluate.during_training: Value 'perhaps'"),
        ("fit.lengths=5", "fit.lengths=5: expected a list"),
        ("fit.lengths=null", "fit.lengths=None: expected a list"),
        ("fit.lengths=[a]", "fit.lengths[0]: Value 'a'"),
        ("fit.lora.targets={q_proj: 1}", "fit.lora.targets={'q_proj': 1}: expected a list"),
        ("fit=3", "fit=3: expected a mapping of lora, learning_rate"),
        ("fit.lora=null", "fit.lora=None: expected a mapping of rank, alpha"),
        ("fit.epochs=[1]", "fit.epochs=[1]: expected a single value"),
        # bad values
        ("model.dtype=f32", "model.dtype='f32': expected one of auto, float32, bfloat16"),
        ("rest_em.select=worst", "rest_em.select='worst': expected one of best, top, gain"),
        ("rest_em.edits=0", "rest_em.edits=0: expected at least 1"),
        ("fit.lora.alpha=nan", "fit.lora.alpha=nan: expected a finite number above 0"),
        ("m_step.lora.alpha=0", "m_step.lora.alpha=0.0: expected a finite number above 0"),
        ("pretraining.sft.lora.alpha=.inf", "pretraining.sft.lora.alpha=inf: expected a finite number above 0"),
        ("sample.temperature=-1", "sample.temperature=-1.0: expected at least 0.0"),
        ("fit.learning_rate=nan", "fit.learning_rate=nan: expected at least"),
        ("sample.top_p=0", "sample.top_p=0.0: expected a number above 0 and at most 1"),
        ("grade.threshold=1.5", "grade.threshold=1.5: expected a number above 0 and at most 1"),
        ("grade.timeout=0", "grade.timeout=0.0: expected a number of seconds above 0"),
        ("fit.max_steps=0", "fit.max_steps=0: expected at least 1"),
        ("fit.lengths=[64,32]", "fit.lengths=[64, 32]: expected ascending positive lengths"),
        ("fit.lengths=[]", "fit.lengths=[]: expected ascending"),
        ("fit.lora.targets=[q_proj,qproj]", "fit.lora.targets=['q_proj', 'qproj']: expected some of q_proj, k_proj"),
        ("m_step.lora.targets=[]", "m_step.lora.targets=[]: expected some of"),
        ("m_step.weights=full", "m_step.weights='full': expected one of lora"),
        ("m_step.row_length=0", "m_step.row_length=0: expected at least 1, or null for the longest sequence's"),
        ("m_step.warmup_steps=-1", "m_step.warmup_steps=-1: expected at least 0"),
        # overrides that are none
        ("fit.epochs", "override 'fit.epochs': expected key.sub=value"),
        ("=3", "override '=3': expected key.sub=value"),
        ("fit..epochs=3", "override 'fit..epochs=3': expected key.sub=value"),
        ("name=[1", "override 'name=[1': not readable as YAML"),
        ("name=${nothing}", "name: Interpolation key 'nothing' not found"),
        ("fit.lengths=${nothing}", "Interpolation key 'nothing' not found"),
        # the task
        ("task.name=knowledg", "task.name='knowledg' is unknown (did you mean 'knowledge'?)"),
        ("task=knowledge", "task.name is missing; one of: arc, knowledge"),
        ("task=null", "task.name is missing"),
        ("task=${nothing}", "Interpolation key 'nothing' not found"),
    ],
)
def test_refusals(override, said):
    assert said in refusal(lambda: build(override))


def test_a_list_or_a_mapping_may_be_null_where_its_type_says_so():
    plain = {"task": {"name": "arc"}}
    assert config_lib.build(plain, ["task.train_ids=[a,b]"]).task.train_ids == ["a", "b"]
    for key in ("train_ids", "reference"):
        assert getattr(config_lib.build(plain, [f"task.{key}=null"]).task, key) is None
    said = refusal(lambda: config_lib.build(plain, ["task.train_ids=a"]))
    assert said == "config: task.train_ids='a': expected a list, as in [a,b]"


def test_texts_that_look_like_numbers_stay_texts():
    """Ids of ARC puzzles are hexadecimal."""
    plain = {"task": {"name": "arc"}}
    found = config_lib.build(plain, ["task.train_ids=[855e0971,00576224]", "task.validation_ids=[ '5117e062' , 12]", "task.permutations=1"])
    assert found.task.train_ids == ["855e0971", "00576224"] and found.task.validation_ids == ["5117e062", "12"]
    for name in ("007", "00576224", "1e3", "no", "12:30", "1.50"):
        assert config_lib.build(plain, [f"name={name}", f"grade.model={name}"]).grade.model == name
        assert config_lib.build(plain, [f"name={name}"]).run_dir == f"runs/{name}"
    assert config_lib.build(plain, ["track.wandb=null"]).track.wandb is None
    said = refusal(lambda: config_lib.build({**plain, "name": 7}))
    assert said == "config: name: 7 is read as no text; put what was meant in quotes"
    said = refusal(lambda: config_lib.build({"task": {"name": "arc", "train_ids": ["a", 195732]}}))
    assert said == "config: task.train_ids: 195732 is read as no text; put what was meant in quotes"


def test_a_list_of_the_config_is_set_as_a_whole():
    said = refusal(lambda: build("fit.lengths.0=3", fit={"lengths": [8, 16]}))
    assert "override 'fit.lengths.0=3'" in said and "a list is set as a whole" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no such config file"),
        ("", "expected a mapping of config keys, found NoneType"),
        ("- 1\n- 2\n", "expected a mapping of config keys, found list"),
        ("fit: [1\nname: x\n", "not readable as YAML"),
        ("name: \x00", "not readable as YAML"),
        ("name: x\n", "task.name is missing; one of: arc, knowledge"),
        ("task: {name: knowledge}\nfit:\n  epoch: 3\n", "unknown key 'fit.epoch' (did you mean 'epochs'?)"),
        ("task: {name: knowledge}\nfit: ???\n", "fit has no value"),
    ],
)
def test_files_are_refused_by_name(tmp_path, text, said):
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text)
    message = refusal(lambda: config_lib.load(path))
    assert message.startswith(f"{path}: ") and said in message


def test_a_folder_and_a_binary_file_are_no_config(tmp_path):
    assert "not readable as YAML" in refusal(lambda: config_lib.load(tmp_path))
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not readable as YAML" in refusal(lambda: config_lib.load(tmp_path / "c.yaml"))


def test_a_new_task_is_a_new_package_and_nothing_else(tmp_path, monkeypatch):
    package = tmp_path / "echo"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import dataclasses\n\n\n"
        "@dataclasses.dataclass\nclass Config:\n    name: str = 'echo'\n    loudness: int = 3\n\n\n"
        "def build(config, grader):\n    return ('the task', config.loudness)\n"
    )
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    config = config_lib.build({"task": {"name": "echo"}}, ["task.loudness=5"])
    assert tasks.build(config.task, None) == ("the task", 5)
    assert "one of: arc, echo, knowledge" in refusal(lambda: config_lib.build({"task": {"name": "x"}}))
    # Each task has its own keys.
    assert "unknown key 'task.prompt'" in refusal(lambda: config_lib.build({"task": {"name": "echo", "prompt": "facts"}}))
    assert "unknown key 'task.loudness'" in refusal(lambda: build("task.loudness=5"))


@pytest.mark.parametrize(
    ("rest_em", "evaluate", "edits"),
    [
        ({"group": 10, "contexts": 50, "edits": 5, "seeds": 3}, {"group": 10, "contexts": 4, "edits": 5, "seeds": 1}, 150),
        (
            {"group": 10, "contexts": 2, "edits": 5, "seeds": 1},
            {"group": 10, "contexts": 50, "edits": 5, "seeds": 3},
            180,
        ),  # and the passage
    ],
)
def test_the_most_edits_that_are_fitted_in_one_go(rest_em, evaluate, edits):
    assert config_lib.build({"task": {"name": "knowledge"}, "rest_em": rest_em, "evaluate": evaluate}).largest_group == edits
