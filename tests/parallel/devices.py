"""Run by test_mesh.py on eight fake devices: fits and answers on meshes of several shapes, and says how far they are from one device."""

import dataclasses
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax.config import FitConfig, LoraConfig, MeshConfig, SftConfig, StopConfig
from seal_jax.fit import engine as engine_lib
from seal_jax.fit import likelihood
from seal_jax.fit.engine import FitEngine, FitJob, Tokens
from seal_jax.models import lora as lora_lib
from seal_jax.models.decoder import Decoder
from seal_jax.models.spec import DecoderSpec
from seal_jax.parallel import mesh as mesh_lib
from seal_jax.sample.constraint import for_regex
from seal_jax.sample.engine import Request, generate
from seal_jax.sft import pack
from seal_jax.sft.engine import SftEngine

SPEC = DecoderSpec(
    model_type="qwen2", vocab_size=512, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, tie_embeddings=False, qkv_bias=True, qk_norm=False, max_positions=256,
    eos_ids=(2,), bos_id=None, pad_id=None,
)  # fmt: skip
LORA = LoraConfig(4, 8.0, ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"])


def run(shape, host, jobs, prompts):
    """Losses, adapters and answers on a mesh of `shape`, and where the arrays lay."""
    mesh = mesh_lib.make(MeshConfig(*shape))
    where = mesh_lib.parameter_sharding(mesh)
    place = lambda path, x: jax.device_put(x, where([k.key for k in path], x.shape))  # noqa: E731
    params = jax.tree_util.tree_map_with_path(place, host)
    decoder = Decoder(SPEC)
    fitted = FitEngine(decoder, LORA, slots=4, tokens_per_step=48, lengths=(12, 24), mesh=mesh).fit(params, jobs, seed=1)
    lora = jax.jit(jax.vmap(lora_lib.scaled))(fitted.lora, mesh_lib.put(fitted.scale, mesh_lib.edit_sharding(mesh)))
    options = {"stop": SPEC.eos_ids, "rows": 16, "mesh": mesh}
    greedy = [Request(prompts[i % 3], 6, adapter=int(place)) for i, place in enumerate(fitted.places) for _ in range(1 + i % 2)]
    drawn = [Request(p, 7, temperature=1.0, top_p=0.9, key=(i, j)) for i, p in enumerate(prompts) for j in range(5)]
    return {
        "losses": fitted.losses,
        "adapters": [np.asarray(x)[fitted.places] for x in jax.tree.leaves(fitted.lora)],
        "answers": [g.tokens for g in generate(decoder, params, greedy, lora=lora, **{**options, "rows": 2})],
        "samples": [g.tokens for g in generate(decoder, params, drawn, **options)],
        "devices": len(jax.tree.leaves(fitted.lora)[0].sharding.device_set),
        "part": max(s.data.size / x.size for x in jax.tree.leaves(params["layers"]["mlp"]) for s in x.addressable_shards),
        "steps": fitted.waste.steps,
    }


def uneven(shape, host, prompts, constraint=None):
    """Answers of two shards, one of which has ten times as many tokens to draw."""
    mesh = mesh_lib.make(MeshConfig(*shape))
    params = jax.tree.map(jax.device_put, host, mesh_lib.parameter_shardings(mesh, host))
    requests = [Request(prompts[0], 3, constraint=constraint), Request(prompts[1], 30, constraint=constraint)]
    stop = () if constraint is None else SPEC.eos_ids
    return [g.tokens for g in generate(Decoder(SPEC), params, requests, stop=stop, rows=2, mesh=mesh)]


def stacked(shape, host, jobs):
    """Edits on top of held adapters: (losses, nll of a text under each of them together, moved from what was held)."""
    mesh = mesh_lib.make(MeshConfig(*shape))
    params = jax.tree.map(jax.device_put, host, mesh_lib.parameter_shardings(mesh, host))
    shapes = engine_lib.adapter_shapes(SPEC, 3, tuple(LORA.targets))
    draw, decoder = np.random.default_rng(1), Decoder(SPEC)
    held = jax.tree.map(lambda x: draw.normal(0, 0.3, (4, *x.shape)).astype(np.float32), shapes)
    held = jax.tree.map(mesh_lib.put, held, mesh_lib.adapter_shardings(mesh, shapes))
    chosen = [dataclasses.replace(job, held=i % 4) for i, job in enumerate(jobs[:6])]
    fitted = FitEngine(decoder, LORA, slots=2, tokens_per_step=48, lengths=(24,), mesh=mesh).fit(params, chosen, seed=1, held=held)
    texts = likelihood.texts_of([jobs[3].sequences[0].ids, jobs[7].sequences[0].ids])
    nll = likelihood.mean_nll(decoder, params, engine_lib.collection(fitted, mesh, held), texts, mesh)
    before = likelihood.mean_nll(decoder, params, held, texts, mesh)
    return fitted.losses, nll[fitted.places], before


def tuned(shape, host, jobs):
    """One model trained on all sequences of the jobs, an adapter and all weights: (losses, leaves, largest part of a kernel on a device),
    and the text of the program that trains all weights."""
    mesh = mesh_lib.make(MeshConfig(*shape))
    params = jax.tree.map(jax.device_put, host, mesh_lib.parameter_shardings(mesh, host))
    sequences = [s for job in jobs for s in job.sequences][:12]
    found = {}
    for weights in ("lora", "full"):
        engine = SftEngine(Decoder(SPEC), SftConfig(weights, LORA, 3e-3, epochs=2, batch_size=5, row_length=48), mesh)
        done = engine.tune(params, sequences, ("sft",), seed=1)
        kernel = done.weights["layers"]["mlp"]["up_proj"]["b" if weights == "lora" else "kernel"]
        part = max(s.data.size / kernel.size for s in kernel.addressable_shards)
        found[weights] = done.losses, [np.asarray(x) for x in jax.tree.leaves(done.weights)], part
    rows = mesh_lib.data_shards(mesh)
    found["text"] = engine.lower(params, pack.Shape(1, rows, 48)).compile().as_text() if rows > 1 else ""
    return found


def compared(one, many):
    """How far training one model on many devices is from one device, and what its program does."""
    report = {}
    for weights in ("lora", "full"):
        losses, leaves, _ = one[weights]
        gaps = [np.abs(a - b) / np.abs(a).max() for a, b in zip(leaves, many[weights][1], strict=True)]
        report[weights] = {
            "losses": float(np.abs(losses / many[weights][0] - 1).max()),
            "weights": max(float(np.quantile(gap, 0.9)) for gap in gaps),
            "weights_most": max(float(gap.max()) for gap in gaps),
            "part": many[weights][2],
        }
    text = many["text"]
    report["moved"] = sum(text.count(f" {name}(") for name in ("all-to-all", "collective-permute"))
    # The most logits, rows x part of the vocabulary, that a device has at once: `tensor` and `fsdp` share the vocabulary.
    report["logits"] = max([int(rows) * int(part) for rows, part in re.findall(r"f32\[(\d+),(128|256|512)\]", text)], default=0)
    return report


def collectives(shape, slots):
    """The shapes that are sent in the fit step's program on eight devices, by the kind of communication."""
    mesh = mesh_lib.make(MeshConfig(*shape))
    engine = FitEngine(Decoder(SPEC), LORA, slots=slots, tokens_per_step=24, mesh=mesh)
    params = jax.eval_shape(lambda: Decoder(SPEC).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"])
    where = mesh_lib.parameter_shardings(mesh, params)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, where)
    text = engine.lower(params, 24, 1, slots).compile().as_text()
    found = {}
    for name in ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        lines = [line for line in text.splitlines() if f" {name}(" in line or f" {name}-start(" in line]
        found[name] = [line.split("=", 1)[1].split(name)[0].strip() for line in lines]
    return found


def main():
    draw = np.random.default_rng(0)
    host = Decoder(SPEC).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    host = jax.tree.map(lambda x: np.asarray(x) * (12.0 if x.ndim > 2 else 1.0), host)  # large enough for answers that differ
    jobs = []
    for i in range(11):
        sequences = tuple(Tokens(tuple(draw.integers(0, 512, draw.integers(5, 25)).tolist())) for _ in range(1 + i % 4))
        config = FitConfig(lora=LORA, learning_rate=3e-3, epochs=3, stop=StopConfig(gain=0.05 if i == 4 else 0.0))
        jobs.append(FitJob(("edit", i), sequences, config))
    prompts = [tuple(draw.integers(3, 512, n).tolist()) for n in (5, 9, 17)]
    one = run((1, 1, 1), host, jobs, prompts)
    report = {"collectives": collectives((8, 1, 1), 2), "sent": collectives((2, 2, 2), 37)}
    report |= {"answers": len(set(one["answers"])), "samples": len(set(one["samples"])), "steps": one["steps"]}
    report["lengths"] = [len(x) for x in one["losses"]]
    for shape in json.loads(sys.argv[1]):
        many = run(shape, host, jobs, prompts)
        gaps = [np.abs(a - b) / np.abs(a).max() for a, b in zip(one["adapters"], many["adapters"], strict=True)]
        report["x".join(map(str, shape))] = {
            "losses": max(float(np.abs(a / b - 1).max()) for a, b in zip(one["losses"], many["losses"], strict=True)),
            "adapters": max(float(np.quantile(gap, 0.9)) for gap in gaps),
            "adapters_most": max(float(gap.max()) for gap in gaps),
            "same_answers": one["answers"] == many["answers"],
            "same_samples": one["samples"] == many["samples"],
            **{key: many[key] for key in ("devices", "part", "steps")},
        }
    cut = 2, 1, 4  # twice as many devices along `tensor` as there are heads of keys
    assert mesh_lib.cuts_heads(mesh_lib.make(MeshConfig(*cut)), SPEC)
    report["uneven"] = uneven(cut, host, prompts) == uneven((1, 1, 1), host, prompts)
    letters = for_regex("[A-Y]{40,90}", [None] * 3 + [bytes([65 + i % 26]) for i in range(509)])
    (first, second), whole = uneven((2, 1, 2), host, prompts, letters), uneven((1, 1, 1), host, prompts, letters)
    report["masked"] = [first, second] == whole and (len(first), len(second)) == (3, 30)
    (losses, nll, before), others = stacked((1, 1, 1), host, jobs), stacked((2, 2, 2), host, jobs)
    report["held"] = {
        "losses": max(float(np.abs(a / b - 1).max()) for a, b in zip(losses, others[0], strict=True)),
        "nll": float(np.abs(nll / others[1] - 1).max()),
        "before": float(np.abs(before / others[2] - 1).max()),
        "differ": float(np.ptp(before)),
    }
    report["sft"] = compared(tuned((1, 1, 1), host, jobs), tuned((2, 2, 2), host, jobs))
    print(json.dumps(report))


if __name__ == "__main__":
    assert engine_lib and len(jax.devices()) == 8
    main()
