import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from seal_jax.errors import SealError
from seal_jax.models import hf, lora, peft
from seal_jax.models.lora import GROUPS, dimensions

RANK, ALPHA = 4, 6.0


def random_adapter(spec, targets, rank=RANK, seed=0):
    rng = np.random.default_rng(seed)
    tree = {"layers": {}}
    for target in targets:
        inputs, outputs = dimensions(spec, target)
        tree["layers"].setdefault(GROUPS[target], {})[target] = {
            "a": rng.standard_normal((spec.num_layers, inputs, rank)).astype(np.float32) / 4,
            "b": rng.standard_normal((spec.num_layers, rank, outputs)).astype(np.float32) / 4,
        }
    return tree


def assert_equal(one, other):
    assert one["layers"].keys() == other["layers"].keys()
    for group, members in one["layers"].items():
        assert members.keys() == other["layers"][group].keys()
        for target, leaf in members.items():
            np.testing.assert_array_equal(leaf["a"], other["layers"][group][target]["a"], err_msg=target)
            np.testing.assert_array_equal(leaf["b"], other["layers"][group][target]["b"], err_msg=target)


@pytest.fixture(scope="module")
def spec(checkpoints):
    return hf.read_spec(checkpoints["qwen2"])[0]


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "v_proj"], list(GROUPS)])
def test_an_adapter_survives_its_folder(spec, tmp_path, targets):
    tree = random_adapter(spec, targets)
    peft.save_adapter(tmp_path / "a", tree, RANK, ALPHA, "someone/model")
    again, rank, alpha = peft.load_adapter(tmp_path / "a", spec)
    assert (rank, alpha) == (RANK, ALPHA)
    assert_equal(again, tree)


def test_padding_columns_are_not_written(spec, tmp_path):
    tree = random_adapter(spec, ["q_proj"], rank=6)
    leaf = tree["layers"]["attn"]["q_proj"]
    leaf["a"][:, :, 4:] = 0
    peft.save_adapter(tmp_path / "a", tree, 4, ALPHA, "m")
    again, rank, _ = peft.load_adapter(tmp_path / "a", spec)
    assert rank == 4
    np.testing.assert_array_equal(again["layers"]["attn"]["q_proj"]["a"], leaf["a"][:, :, :4])
    np.testing.assert_array_equal(again["layers"]["attn"]["q_proj"]["b"], leaf["b"][:, :4])
    with pytest.raises(ValueError, match="does not fit in rank 3"):
        peft.save_adapter(tmp_path / "b", tree, 3, ALPHA, "m")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("family", ["llama3", "qwen2", "qwen3"])
def test_peft_loads_ours_and_computes_what_merging_gives(checkpoints, family, tmp_path):
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    spec, params, tokenizer = hf.read_folder(checkpoints[family])
    tree = random_adapter(spec, list(GROUPS))
    peft.save_adapter(tmp_path / "adapter", tree, RANK, ALPHA, str(checkpoints[family]))
    adapted = library.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoints[family]), tmp_path / "adapter")
    hf.save_folder(tmp_path / "merged", spec, lora.merge(params, tree, ALPHA / RANK), tokenizer)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        base = adapted.get_base_model()
        with adapted.disable_adapter():
            plain = base(ids).logits
        expected, got = adapted(ids).logits, merged(ids).logits
    assert (expected - plain).abs().max() > 0.1  # the adapter does something
    assert (expected - got).abs().max() < 1e-4 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("rslora", [False, True])
def test_we_load_what_peft_saved(checkpoints, spec, tmp_path, rslora):
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    config = library.LoraConfig(r=RANK, lora_alpha=6, target_modules=["v_proj", "down_proj"], task_type="CAUSAL_LM", use_rslora=rslora)
    model = library.get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoints["qwen2"]), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_()
    model.save_pretrained(tmp_path)
    tree, rank, alpha = peft.load_adapter(tmp_path, spec)
    modules = dict(model.named_modules())
    scaling = modules["base_model.model.model.layers.0.self_attn.v_proj"].scaling["default"]
    assert rank == RANK and alpha / rank == pytest.approx(scaling, rel=1e-12)
    for group, target, place in (("attn", "v_proj", "self_attn"), ("mlp", "down_proj", "mlp")):
        for layer in range(spec.num_layers):
            module = modules[f"base_model.model.model.layers.{layer}.{place}.{target}"]
            delta = tree["layers"][group][target]["a"][layer] @ tree["layers"][group][target]["b"][layer] * (alpha / rank)
            expected = module.get_delta_weight("default").detach().numpy().T
            np.testing.assert_allclose(delta, expected, rtol=1e-4, atol=1e-5)
    assert set(tree["layers"]["attn"]) == {"v_proj"} and set(tree["layers"]["mlp"]) == {"down_proj"}


@pytest.fixture
def saved(spec, tmp_path):
    peft.save_adapter(tmp_path / "adapter", random_adapter(spec, ["q_proj", "v_proj"]), RANK, ALPHA, "someone/model")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    "change",
    [
        {"peft_type": "LOHA"},
        {"use_dora": True},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"fan_in_fan_out": True},
        {"rank_pattern": {"q_proj": 8}},
        {"alpha_pattern": {"q_proj": 8}},
        {"modules_to_save": ["lm_head"]},
        {"layer_replication": [[0, 2], [1, 3]]},
        {"target_parameters": ["mlp.experts"]},
        {"trainable_token_indices": [1]},
        {"init_lora_weights": "pissa_niter_4"},
        {"r": 0},
        {"lora_alpha": None},
    ],
)
def test_features_beyond_plain_lora_are_refused_by_name(saved, spec, change):
    config = json.loads((saved / peft.CONFIG).read_text())
    (saved / peft.CONFIG).write_text(json.dumps({**config, **change}))
    with pytest.raises(SealError, match=f"adapter_config.json: {next(iter(change))}") as error:
        peft.load_adapter(saved, spec)
    assert "\n" not in str(error.value)


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop(KEY), f"{KEY} is missing"),
        (lambda t: t.update({KEY: np.zeros((RANK, 31), np.float32)}), f"{KEY} has shape"),
        (lambda t: t.update({KEY.replace("layers.1.", "layers.3."): t[KEY]}), "no place in this model"),
        (lambda t: t.update({KEY.replace("lora_A", "lora_magnitude_vector"): t[KEY]}), "no place in this model"),
        (lambda t: t.update({"base_model.model.lm_head.lora_A.weight": t[KEY]}), "no place in this model"),
        (lambda t: t.clear(), "no LoRA tensors"),
    ],
)
def test_tensors_that_do_not_fit_are_named(saved, spec, change, told):
    tensors = load_file(saved / peft.WEIGHTS)
    change(tensors)
    save_file(tensors, saved / peft.WEIGHTS)
    with pytest.raises(SealError) as error:
        peft.load_adapter(saved, spec)
    assert told in str(error.value) and str(saved) in str(error.value)


def test_folders_that_hold_no_adapter(saved, spec, tmp_path):
    with pytest.raises(SealError, match=r"adapter_config\.json: no such file"):
        peft.load_adapter(tmp_path / "none", spec)
    with pytest.raises(SealError, match="already there"):
        peft.save_adapter(saved, random_adapter(spec, ["q_proj"]), RANK, ALPHA, "m")
    shutil.move(saved / peft.WEIGHTS, saved / "adapter_model.bin")
    with pytest.raises(SealError, match=r"adapter_model\.safetensors: no such file"):
        peft.load_adapter(saved, spec)
