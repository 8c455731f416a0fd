import pytest

from seal_jax.errors import SealError
from seal_jax.sweep import config as sweep_config
from seal_jax.sweep.space import Choices, Range

EPOCHS = {"fit.epochs": [2, 4]}


def test_a_sweep_file(write_sweep, tmp_path):
    """Values are as the config has them, whatever YAML made of them; sections and dotted keys may be mixed."""
    space = {"fit": {"learning_rate": ["1e-3", 0.002], "epochs": {"low": 2, "high": 10}}, "rest_em.retention.bits": [0, 1]}
    path = write_sweep(space=space, set={"evaluate": {"contexts": 4}, "fit.stop.loss": 0.1}, search="random", trials=3)
    sweep = sweep_config.load(path)
    assert sweep.space == {
        "fit.learning_rate": Choices((0.001, 0.002)),
        "fit.epochs": Range(2, 10),
        "rest_em.retention.bits": Choices((0.0, 1.0)),
    }
    assert (sweep.base.evaluate.contexts, sweep.base.fit.stop.loss, sweep.run) == (4, 0.1, "train")
    config = sweep.trial({"fit.learning_rate": 0.002, "fit.epochs": 3, "rest_em.retention.bits": 1.0}, "sweeps/a/trials/b")
    assert (config.fit.learning_rate, config.fit.epochs, config.rest_em.retention.bits) == (0.002, 3, 1.0)
    assert (config.name, config.run_dir, config.evaluate.contexts, config.fit.stop.loss) == ("tiny-b", "sweeps/a/trials/b", 4, 0.1)
    assert len(sweep.settings()) == 3


def test_overrides_of_a_sweep_file(write_sweep):
    sweep = sweep_config.load(
        write_sweep(space=EPOCHS), ["space.fit.epochs=[3]", "set.evaluate.contexts=2", "name=other", "run_dir=x/${name}"]
    )
    assert sweep.settings() == [{"fit.epochs": 3}] and sweep.base.evaluate.contexts == 2 and str(sweep.folder) == "x/other"


def test_an_override_counts_over_the_file_whichever_way_that_spells_the_key(write_sweep):
    mixed = {"evaluate": {"contexts": 2}, "evaluate.edits": 1}
    sweep = sweep_config.load(write_sweep(space=EPOCHS, set=mixed), ["set.evaluate.edits=4", "set.evaluate.contexts=3"])
    assert (sweep.base.evaluate.edits, sweep.base.evaluate.contexts) == (4, 3)
    sweep = sweep_config.load(write_sweep(space={"fit": {"lora": {"rank": [2]}}, "fit.epochs": [1]}), ["space.fit.epochs=[7]"])
    assert sweep.settings() == [{"fit.lora.rank": 2, "fit.epochs": 7}]


def test_texts_that_look_like_numbers_stay_texts(write_sweep, tmp_path):
    (tmp_path / "arc.yaml").write_text("task: {name: arc}")
    path = write_sweep(base="arc.yaml", set={"task.train_ids": ["a"]}, space={"task.validation_ids": [["a"]], "model.name": ["b"]})
    items = [
        "name=007",
        "set.task.train_ids=[00576224, 855e0971]",
        "space.task.validation_ids=[[00576224], null]",
        "space.model.name=[1e3]",
    ]
    sweep = sweep_config.load(path, items)
    assert sweep.config.name == "007" and sweep.base.task.train_ids == ["00576224", "855e0971"]
    assert sweep.space["task.validation_ids"].values == (["00576224"], None) and sweep.space["model.name"].values == ("1e3",)
    path.write_text(path.read_text().replace("- a\n", "- 00576224\n", 1))
    with pytest.raises(SealError, match=r"task.train_ids: 195732 is read as no text; put what was meant in quotes"):
        sweep_config.load(path)


def test_interpolations_of_the_base_follow_what_a_trial_sets(write_sweep):
    sweep = sweep_config.load(write_sweep(set={"m_step.epochs": "${fit.epochs}"}, space=EPOCHS))
    assert [sweep.trial(settings).m_step.epochs for settings in sweep.settings()] == [2, 4]


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({}, "space is empty: name the config keys that trials differ in"),
        ({"space": [1]}, "space=[1]: expected a mapping of config keys"),
        ({"space": EPOCHS, "concurent": 2}, "unknown key 'concurent' (did you mean 'concurrent'?)"),
        ({"space": EPOCHS, "resources": {"gpus": 1}}, "unknown key 'resources.gpus' (did you mean 'gpu'?)"),
        ({"space": EPOCHS, "trials": "many"}, "trials: Value 'many' of type 'str' could not be converted to Integer"),
        ({"space": EPOCHS, "concurrent": 0}, "concurrent=0: expected at least 1"),
        ({"space": EPOCHS, "search": "bayes"}, "search='bayes': expected one of grid, random, optuna, lanes"),
        ({"space": EPOCHS, "run": "pretrain"}, "run='pretrain': expected one of train, evaluate"),
        ({"space": EPOCHS, "resources": {"tpu": 3}}, "resources.tpu=3: expected one of 0, 1, 2, 4, 8"),
        ({"space": {"fit.epoch": [1]}}, "unknown key 'fit.epoch' (did you mean 'epochs'?)"),
        ({"space": {"fit.epochs": [1, 0]}}, "fit.epochs=0: expected at least 1"),
        ({"space": {"fit.epochs": {"low": 0, "high": 3}}}, "fit.epochs=0: expected at least 1"),
        ({"space": {"task.prompt": {"low": 0, "high": 3}}, "search": "random"}, "space.task.prompt: is no number in the config"),
        ({"space": {"fit.epochs": {"low": 1, "high": 3}}}, "space.fit.epochs is a range, search is grid: give a list of values"),
        ({"space": EPOCHS, "set": {"fit": {"epochs": 3}}}, "fit.epochs is in set and in space; leave it out of one"),
        ({"space": {"run_dir": ["a"]}}, "run_dir: each trial has its own; set the sweep's run_dir instead"),
        ({"space": EPOCHS, "base": ""}, "base is missing: the config file that trials change"),
        ({"space": EPOCHS, "base": "nothing.yaml"}, "nothing.yaml: no such config file"),
        ({"space": EPOCHS, "asha": {"grace": 1}}, "asha.grace=1, rest_em.rounds=1: expected at least 1 and fewer than the rounds"),
        ({"space": EPOCHS, "asha": {"factor": 1}, "set": {}}, "asha.factor=1: expected at least 2"),
        ({"space": EPOCHS, "asha": {}, "run": "evaluate"}, "asha: stops trials by their rounds, and these have none"),
        ({"space": EPOCHS, "search": "lanes", "run": "train"}, "lanes share a program that trains no policy"),
    ],
)
def test_bad_input_is_one_line(write_sweep, said, problem):
    with pytest.raises(SealError) as refused:
        sweep_config.load(write_sweep(**said))
    assert problem in str(refused.value) and "\n" not in str(refused.value)
