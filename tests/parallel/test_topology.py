"""The plan for devices that are not there. Without libtpu the same programs are compiled for the CPU."""

import dataclasses
import importlib.util
import json
import pathlib
import re

import jax
import pytest

from seal_jax import cli
from seal_jax import config as config_lib
from seal_jax.errors import SealError
from seal_jax.fit import memory
from seal_jax.models import shapes
from seal_jax.models.spec import from_hf
from seal_jax.parallel import cost, plan_table, targets, topology
from seal_jax.parallel import mesh as mesh_lib

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the compiler for TPUs, libtpu, is not installed")
# XLA also counts what is no matrix product; the count by hand leaves out what attention computes twice.
TOLERANCE = 0.06
SPEC = {
    "model_type": "qwen2",
    "vocab_size": 2048,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 1,
}


@pytest.fixture(scope="module")
def settings():
    lora = {"rank": 8, "targets": ["q_proj", "v_proj"]}
    data = {
        "model": {"dtype": "float32", "max_length": 512},
        "task": {"name": "knowledge"},
        "fit": {"lora": lora, "tokens_per_step": 192, "lengths": [48]},
        "answer": {"rows": 10},
        "m_step": {"lora": lora, "batch_size": 2},
        "rest_em": {"group": 1, "edits": 3, "seeds": 2},
    }
    return config_lib.build(data)


def made(settings, mesh, **model):
    settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, **model))
    return topology.Programs(settings, from_hf(SPEC), mesh, topology.Workload())


def ratio(programs, case, mesh, by_hand):
    program = topology.build(case, mesh)
    devices = mesh.size // mesh_lib.shards(mesh)
    return program.work.flops * devices / by_hand


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_corrected_count_is_the_one_by_hand(settings, remat):
    mesh = mesh_lib.single()
    programs = made(settings, mesh, remat=remat)
    spec, lora = programs.spec, settings.fit.lora
    by_hand = cost.fit_flops(spec, lora, 192, 48, 192, remat)
    assert ratio(programs, programs.fit(4), mesh, by_hand) == pytest.approx(1, abs=TOLERANCE)
    # Without the correction, all layers but one are missing: the reason for it. Should XLA count trips itself one day, this fails.
    traced = programs.fit(4).trace()
    counted = traced.lower().compile().cost_analysis()
    assert (counted[0] if isinstance(counted, list) else counted)["flops"] < 0.4 * by_hand
    if remat == "none":
        m = settings.m_step
        by_hand = 2 * cost.fit_flops(spec, m.lora, 384, 384, 384, remat)  # a scan over microbatches around the one over layers
        assert ratio(programs, programs.m_step(), mesh, by_hand) == pytest.approx(1, abs=0.1), "attention is more of it"


def test_the_products_of_the_7b_are_those_counted_by_hand():
    """The traced programs of the paper's config, whose elementwise operations weigh nothing beside the products."""
    settings = config_lib.load(pathlib.Path(__file__).parents[2] / "configs" / "knowledge_qwen2.5_7b.yaml")
    programs = topology.Programs(settings, shapes.published("qwen2.5-7b"), mesh_lib.single(), topology.Workload())
    spec, fit, tune = programs.spec, settings.fit.lora, settings.m_step.lora
    for case, by_hand in (
        (programs.fit(10), cost.fit_flops(spec, fit, 480, 48, 480, "none")),  # of "auto" the faster; the M-step the other
        (programs.m_step(), 10 * cost.fit_flops(spec, tune, 384, 384, 384, "full")),
        (programs.prefill(), cost.forward_flops(spec, fit, 32 * 5 * 48, 48, 32 * 5)),
        (programs.decode(), cost.forward_flops(spec, fit, 32 * 5, 0, 32 * 5)),  # its attention is in sums, not products
    ):
        assert cost.products(cost.needed(case.trace()), case.trips).flops == pytest.approx(by_hand, rel=0.005), case.name


def test_answers_are_counted_by_hand(settings):
    mesh = mesh_lib.single()
    programs = made(settings, mesh)
    spec, lora = programs.spec, settings.fit.lora
    by_hand = cost.forward_flops(spec, lora, 2 * 5 * 48, 48, 2 * 5)
    assert ratio(programs, programs.prefill(), mesh, by_hand) == pytest.approx(1, abs=TOLERANCE)
    by_hand = cost.forward_flops(spec, lora, 10, 128, 10)
    assert ratio(programs, programs.decode(), mesh, by_hand) == pytest.approx(1, abs=0.15), "sampling and attention by sums weigh more"


def test_weights_of_published_shapes():
    sizes = {name: sum(x.size for x in jax.tree.leaves(abstract(name))) for name in shapes.CONFIGS}
    assert sizes == {
        "embedded": 134_515_008,
        "qwen2.5-0.5b": 494_032_768,
        "qwen2.5-1.5b": 1_543_714_304,
        "qwen2.5-7b": 7_615_616_512,
        "llama-3.2-1b": 1_235_814_400,
        "llama-3.1-8b": 8_030_261_248,
        "llama-3.1-70b": 70_553_706_496,
        "llama-3.3-70b": 70_553_706_496,
    }


def abstract(name):
    return {leaf.path: jax.ShapeDtypeStruct(leaf.shape, "bfloat16") for leaf in topology.leaves(shapes.published(name))}


def test_a_shape_by_folder_and_what_has_none(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SPEC))
    assert shapes.find(str(tmp_path)) == shapes.find(str(tmp_path / "config.json")) == from_hf(SPEC)
    assert shapes.find("Qwen2.5-7B").num_layers == 28
    with pytest.raises(SealError, match="not one of embedded, qwen"):
        shapes.find("nothing")
    (tmp_path / "model.gguf").touch()
    with pytest.raises(SealError, match="--spec"):
        shapes.find(str(tmp_path / "model.gguf"))


# --- The command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def config_file(tmp_path, settings):
    path = tmp_path / "config.yaml"
    path.write_text(config_lib.to_yaml(settings))
    (tmp_path / "config.json").write_text(json.dumps(SPEC))
    return path


@pytest.fixture
def planned(config_file, capsys):
    """`planned(...)` runs the command on the small model: (exit code, standard output, last line of standard error)."""

    def run(*arguments):
        capsys.readouterr()
        code = cli.main(["plan", str(config_file), "--spec", str(config_file.parent), *arguments])
        out, err = capsys.readouterr()
        return code, out, err.splitlines()[-1] if err else ""

    return run


def check(found, devices):
    assert found["fits"] and found["devices"] == devices
    assert found["slots"] == found["edits_per_shard"] == -(-6 // found["mesh"]["edit"])
    assert [p["name"] for p in found["programs"]] == ["fit", "prefill", "decode", "M-step"]
    for p in found["programs"]:
        assert p["compiled"] and p["flops"] > 0 and p["total_bytes"] == sum(p["bytes"].values()) <= found["device_limit"]
    lines = plan_table.table(found).splitlines()
    assert "fits: yes" in lines and any("8.3 sequences and 365 tokens" in line for line in lines)


def test_a_plan_for_the_cpu(planned):
    code, out, _ = planned("--devices", "cpu", "--json", "mesh.edit=1")
    assert code == 0
    found = json.loads(out)
    check(found, len(jax.devices()))
    assert found["edit"]["flops"] > 0 and found["edit"]["seconds"] is None, "nothing is known of this machine's speed"


def test_what_fits_recompute_follows_from_the_memory(settings):
    target = targets.here()
    settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, remat="auto"))
    said = []
    roomy = topology.make(settings, from_hf(SPEC), target, said.append)
    assert (roomy.way.remat, roomy.slots) == ("none", roomy.edits) and not any("remat full" in line for line in said)
    settings = dataclasses.replace(settings, fit=dataclasses.replace(settings.fit, slots=roomy.slots))
    limit = roomy.programs[0].total - 1
    narrow = topology.make(settings, from_hf(SPEC), dataclasses.replace(target, limit=limit), said.append)
    fit, m_step = narrow.programs[0], narrow.programs[-1]
    assert (narrow.way.remat, narrow.slots) == ("full", roomy.slots) and fit.total <= limit
    assert fit.total < roomy.programs[0].total and fit.work.flops > 1.2 * roomy.programs[0].work.flops
    assert m_step.work.flops == roomy.programs[-1].work.flops, "which recomputes in both"


def test_a_plan_finds_the_slots_that_a_run_finds(settings):
    """Both ask for the steps that take the most, which the usual one is not; the plan's time is that of the usual one."""
    fit = dataclasses.replace(settings.fit, slots=None, tokens_per_step=256, lengths=[16, 48, 128])
    settings = dataclasses.replace(settings, fit=fit)
    programs = made(settings, mesh_lib.single())
    usual, longest = (topology.build(programs.fit(1, length), programs.mesh) for length in (48, 128))
    assert longest.total > usual.total
    limit = longest.total + 3.5 * programs.adapter  # room for two slots, and of usual steps for more
    target = dataclasses.replace(targets.here(), limit=limit)
    plan = topology.make(settings, programs.spec, target)
    engine = programs.fit_engine
    asked = {"most": programs.edits, "limit": limit}
    assert plan.slots == memory.slots_that_fit(engine, programs.params, programs.longest, programs.fitted, **asked) < programs.edits
    found = plan.programs[0]
    assert found.case.shape == programs.fit(plan.slots).shape and found.largest == programs.fit(plan.slots, 128).shape
    assert topology.build(programs.fit(plan.slots), programs.mesh).total < found.total <= limit
    assert f"  {found.largest}" in plan_table.table(plan_table.record(plan, settings, "small"))


@needs_libtpu
@pytest.mark.parametrize(("rows", "length"), [(3, 48), (4, 96)])
def test_a_plan_for_a_tpu(planned, rows, length):
    """Three edits a shard, which has two devices. Of the longer sequences each gets two rows, one of which is idle; the rows of the
    shorter, of few tokens, are not dealt out."""
    longer = (f"fit.lengths=[{length}]", f"fit.tokens_per_step={4 * length}")
    code, out, err = planned("--topology", "v5e:2x2", "--json", "mesh.fsdp=2", "model.dtype=bfloat16", *longer)
    assert code == 0, err
    found = json.loads(out)
    check(found, 4)
    assert found["device_memory"] == 16 * 2**30 and found["mesh"] == {"edit": 2, "fsdp": 2, "tensor": 1}
    assert found["edit"]["per_hour"] == pytest.approx(3600 / found["edit"]["seconds"])
    spec, lora = from_hf(SPEC), config_lib.LoraConfig(8, 64.0, ["q_proj", "v_proj"])
    fit = found["programs"][0]
    assert fit["shape"] == f"3 slots, steps of {rows} x 1 x {length} tokens"
    assert all(p["sent_bytes"]["fsdp"] > 1e5 for p in found["programs"]), "what the replica's two devices tell each other"
    crossing = {p["name"]: sum(size for axes, size in p["sent_bytes"].items() if "edit" in axes) for p in found["programs"]}
    gradients = found["programs"][3]["bytes"]["adapters"] / 3
    assert crossing.pop("M-step") >= gradients / 2 and max(crossing.values()) < 4096, "of edits, nothing but a step's report"
    by_hand = cost.fit_flops(spec, lora, rows * length, length, rows * length) / 2
    assert 0.9 * by_hand < fit["flops"] < 1.1 * by_hand


@needs_libtpu
@pytest.mark.parametrize("shared", [{}, {"tensor": 2, "fsdp": 2}])
def test_kernels_lie_as_the_chip_reads_them(settings, shared):
    """Elsewhere each program of a v7x would begin with a copy of all kernels, beside them."""
    target = targets.named("tpu7x:2x2x1")
    settings = dataclasses.replace(settings, mesh=config_lib.MeshConfig(**shared))
    mesh = mesh_lib.make(settings.mesh, target.devices)
    programs = topology.Programs(settings, shapes.published("qwen2.5-1.5b"), mesh, topology.Workload())
    program = topology.build(programs.decode(), mesh)
    assert program.work is not None
    if not shared:
        assert program.bytes["temporaries"] < 0.3 * program.bytes["weights"]


@needs_libtpu
@pytest.mark.parametrize(("name", "slots"), [("v5p:2x2x2", 4), ("v5e:4x4", 3)])
def test_a_fit_shared_over_two_axes_and_of_several_shards_compiles(settings, name, slots):
    """XLA's partitioner aborted, and the process with it."""
    target = targets.named(name)
    settings = dataclasses.replace(settings, mesh=config_lib.MeshConfig(fsdp=2, tensor=2))
    mesh = mesh_lib.make(settings.mesh, target.devices)
    programs = topology.Programs(settings, from_hf(SPEC), mesh, topology.Workload())
    assert topology.build(programs.fit(slots), mesh).work is not None and mesh.shape["edit"] > 1


@needs_libtpu
@pytest.mark.parametrize(("width", "shared"), [(128, {}), (64, {}), (128, {"tensor": 2})])
def test_caches_are_decoded_where_they_lie(settings, width, shared):
    """A second copy of them would be in the temporaries, and a copy of each layer's part would be a thing of its own in the program."""
    settings = dataclasses.replace(settings, mesh=dataclasses.replace(settings.mesh, **shared))
    mesh = mesh_lib.make(settings.mesh, targets.named("v5e:2x2").devices)
    spec = dataclasses.replace(from_hf(SPEC), head_dim=width)
    case = topology.Programs(settings, spec, mesh, topology.Workload()).write()
    program = topology.build(case, mesh)
    assert case.kinds["caches"] > 2**25
    assert program.bytes["temporaries"] < case.kinds["caches"] / spec.num_layers


@needs_libtpu
def test_keys_are_laid_out_anew_once_a_call_at_most(settings):
    """A TPU v7x did so for each row's token, and held all the cache twice; now the keys alone, between the calls' layout and the loops'."""
    mesh = mesh_lib.make(settings.mesh, targets.named("tpu7x:2x2x1").devices)
    settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, dtype="bfloat16"))
    spec = dataclasses.replace(from_hf(SPEC), head_dim=128)
    case = topology.Programs(settings, spec, mesh, topology.Workload()).write()
    program = topology.build(case, mesh)
    assert case.kinds["caches"] > 2**25 and program.bytes["temporaries"] < 0.6 * case.kinds["caches"]


@needs_libtpu
def test_a_model_that_is_too_large_does_not_fit(settings):
    """What the compiler refuses is an answer, not a failure."""
    target = targets.named("v5e:2x2")
    mesh = mesh_lib.make(settings.mesh, target.devices)
    programs = topology.Programs(settings, shapes.published("llama-3.1-70b"), mesh, topology.Workload())
    program = topology.build(programs.decode(), mesh)
    assert program.work is None and program.total > 130 * 2**30


@needs_libtpu
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--topology", "v5x:2x2"), "--topology v5x:2x2: .*known are, say, v5e:2x4"),
        (("--topology", "v5e:7x9"), "--topology v5e:7x9: "),
        (("--topology", "v5e:2x2", "mesh.fsdp=3"), "mesh: fsdp=3 x tensor=1 does not divide the 4 devices"),
        (("--topology", "v5e:2x2", "mesh.edit=2", "mesh.tensor=4"), "needs 8 devices, there are 4"),
    ],
)
def test_topologies_and_meshes_that_do_not_fit(planned, arguments, message):
    code, out, err = planned(*arguments)
    assert code == 2 and not out
    assert re.search(message, err), err


def test_without_libtpu_the_extra_is_named(planned, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, out, err = planned("--topology", "v5e:2x2")
    assert code == 2 and not out and 'pip install "seal_jax[tpu]"' in err


@pytest.mark.parametrize("arguments", [(), ("--topology", "v5e:2x2", "--devices", "cpu")])
def test_one_of_topology_and_devices(planned, arguments):
    code, _, err = planned(*arguments)
    assert code == 2 and "either --topology NAME" in err


def test_plans_keep_out_of_the_compilation_cache():
    """Programs for devices that are not there cannot be read back from it. Afterwards it is as it was, also after a fault."""
    with pytest.raises(RuntimeError, match="fault"), topology._uncached():
        assert not jax.config.jax_enable_compilation_cache
        raise RuntimeError("fault")
    assert jax.config.jax_enable_compilation_cache
