import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seal_jax import rng
from seal_jax.config import FitConfig, LoraConfig, StopConfig
from seal_jax.fit import engine as engine_lib
from seal_jax.fit import plan
from seal_jax.fit.engine import FitEngine, FitJob, Tokens, total_steps
from seal_jax.models import lora
from seal_jax.models.decoder import Decoder
from seal_jax.parallel import compiler

torch = pytest.importorskip("torch", reason="torch computes the reference; pip install seal_jax[test]")

RANK, TARGETS, LENGTH = 4, ["q_proj", "v_proj"], 24
LORA = LoraConfig(RANK, 8.0, TARGETS)
FIT = FitConfig(lora=LORA, learning_rate=3e-3, epochs=3)


def sequences(spec, count, seed, prompt=0):
    """Random sequences of 5 to LENGTH + 1 tokens, the first `prompt` of which carry no loss."""
    draw = np.random.default_rng(seed)
    return tuple(
        Tokens(tuple(draw.integers(0, spec.vocab_size, draw.integers(5, LENGTH + 2)).tolist()), max(1, prompt)) for _ in range(count)
    )


def make_engine(spec, slots=4, rows=4, config=LORA, dtype=jnp.float32, lengths=(LENGTH,), **options):
    tokens = rows * LENGTH * options.get("batch_size", 1)
    return FitEngine(Decoder(spec, dtype), config, slots=slots, tokens_per_step=tokens, lengths=lengths, **options)


def adapter(fitted, job):
    return [np.asarray(x[job]) for x in jax.tree.leaves(fitted.lora)]


def assert_same(one, other):
    """Losses and adapters of two fits of one job, each (losses, leaves): to 1e-5 relative, a leaf's elements to the largest of them.

    One element in ten may be off by up to 1e-3: programs of different row counts add up in different orders, and where the
    gradients of an element nearly cancel, Adam divides that rounding by next to nothing.
    """
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5)
    for a, b in zip(one[1], other[1], strict=True):
        gap = np.abs(a - b) / np.abs(a).max()
        assert np.quantile(gap, 0.9) <= 1e-5 and gap.max() <= 1e-3


# --- The same as PEFT and torch -------------------------------------------------------------------------------------


def peft_fit(model, job, seed):
    """(losses, adapter leaves) of the job, as a plain loop with PEFT, torch's AdamW and transformers' schedule does it."""
    import peft
    from transformers import get_scheduler

    c = job.config
    options = {"r": c.lora.rank, "lora_alpha": c.lora.alpha, "target_modules": list(c.lora.targets), "task_type": "CAUSAL_LM"}
    adapted = peft.get_peft_model(model.load(), peft.LoraConfig(**options))
    key = jax.random.wrap_key_data(rng.words(seed, *job.key, "adapter"))
    tree = lora.init(key, model.spec, c.lora.rank, c.lora.targets)
    modules = dict(adapted.named_modules())
    places = []  # of our leaves, in their order
    for group, members in sorted(tree["layers"].items()):
        for target, leaf in sorted(members.items()):
            name = f"base_model.model.model.layers.{{}}.{'self_attn' if group == 'attn' else 'mlp'}.{target}"
            linear = [modules[name.format(i)] for i in range(model.spec.num_layers)]
            places += [[m.lora_A["default"].weight for m in linear], [m.lora_B["default"].weight for m in linear]]
            with torch.no_grad():
                for i, m in enumerate(linear):
                    m.lora_A["default"].weight.copy_(torch.tensor(np.asarray(leaf["a"][i]).T))
                    assert not m.lora_B["default"].weight.any()
    weights = [p for p in adapted.parameters() if p.requires_grad]
    assert len(weights) == sum(map(len, places))
    optimizer = torch.optim.AdamW(weights, lr=c.learning_rate, weight_decay=c.weight_decay)
    kinds = {"constant": "constant_with_warmup"}
    scheduler = get_scheduler(kinds.get(c.schedule, c.schedule), optimizer, c.warmup_steps, total_steps(job))
    losses = []
    for step in plan.epoch_orders(len(job.sequences), c.epochs, c.batch_size, rng.generator(seed, *job.key, "order"), c.max_steps):
        batch = [job.sequences[i] for i in step]
        ids = torch.zeros(len(batch), max(len(s.ids) for s in batch), dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, s in enumerate(batch):
            ids[row, : len(s.ids)] = torch.tensor(s.ids)
            mask[row, : len(s.ids)] = 1
            labels[row, s.loss_from : len(s.ids)] = torch.tensor(s.ids[s.loss_from :])
        loss = adapted(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, c.max_grad_norm)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses, [np.stack([w.detach().numpy().T for w in place]) for place in places]


PAPER = dataclasses.replace(FIT, epochs=10)  # but for rank and learning rate, which suit the tiny model
ALL = LoraConfig(3, 6.0, list(lora.GROUPS))
PARITY = {
    # As the inner loop of the original: one sequence a step.
    "batch_1": ("qwen2", PAPER, {}, 5, 0),
    # Five sequences, two at a time: the last step of an epoch has one.
    "batch_2": ("llama3", dataclasses.replace(PAPER, lora=ALL, batch_size=2, learning_rate=1e-3), {"batch_size": 2}, 5, 0),
    # Completions only, five sequences a step.
    "batch_5": (
        "qwen3",
        dataclasses.replace(PAPER, lora=ALL, batch_size=5, schedule="cosine", warmup_steps=2, weight_decay=0.05, epochs=6),
        {"batch_size": 5},
        *(7, 3),
    ),
}


@pytest.mark.parametrize("case", PARITY)
def test_equals_peft_and_torch(tiny, case):
    """Loss by loss and leaf by leaf, two edits at once, of which one leaves some of the engine's rank columns out."""
    family, config, options, count, prompt = PARITY[case]
    model = tiny(family)
    smaller = dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=2))
    jobs = [FitJob(("parity", i), sequences(model.spec, count, i, prompt), c) for i, c in enumerate((config, smaller))]
    fitted = make_engine(model.spec, 2, 2, config.lora, **options).fit(model.params, jobs, seed=3)
    for i, job in enumerate(jobs):
        losses, leaves = peft_fit(model, job, 3)
        rank = job.config.lora.rank
        assert len(losses) == total_steps(job) and min(losses) < losses[0] - 0.05  # it learns
        assert np.abs(fitted.losses[i] - losses).max() <= 1e-4
        for n, (ours, theirs) in enumerate(zip(adapter(fitted, i), leaves, strict=True)):  # a, b, a, b, ...
            used, unused = (ours[..., :rank], ours[..., rank:]) if n % 2 == 0 else (ours[:, :rank], ours[:, rank:])
            assert not unused.any() and np.abs(theirs).max() > 1e-3
            assert np.abs(used - theirs).max() <= 1e-4


# --- Isolation ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tiny):
    """Seven jobs that differ in everything that may differ, five that differ in their steps, and what each gives alone."""
    model = tiny("smollm2")
    change = [
        {},
        {"learning_rate": 1e-4, "epochs": 5},
        {"schedule": "cosine", "warmup_steps": 4},
        {"lora": LoraConfig(2, 8.0, TARGETS)},
        {"schedule": "constant", "weight_decay": 0.1, "max_grad_norm": 0.1},
        {"lora": LoraConfig(1, 3.0, TARGETS), "max_steps": 4, "learning_rate": 1e-2},
        {"max_grad_norm": 0.0, "epochs": 2},
    ]
    jobs = [
        FitJob(("edit", i), sequences(model.spec, 2 + i % 3 * 2, 10 + i, i % 2 * 3), dataclasses.replace(FIT, **c))
        for i, c in enumerate(change)
    ]
    # With four slots and rows, 10 and 11 end together, the later one in the lower slot.
    jobs += [
        FitJob(("step", i), sequences(model.spec, 1, 20 + i), dataclasses.replace(FIT, epochs=n)) for i, n in enumerate((6, 2, 6, 4, 2))
    ]
    alone = make_engine(model.spec, slots=1, rows=1)
    solo = []
    for job in jobs:
        fitted = alone.fit(model.params, [job])
        solo.append((fitted.losses[0], adapter(fitted, 0)))
    return model, jobs, solo


@pytest.mark.parametrize(
    ("order", "slots", "rows", "lengths"),
    [
        ([0, 1, 2, 3, 4, 5, 6], 4, 4, (LENGTH,)),  # more edits than slots
        ([6, 3, 0, 5, 1, 4, 2], 4, 4, (LENGTH,)),  # in another order, so with other neighbours in other slots
        ([1, 5], 4, 4, (LENGTH,)),  # in smaller company
        ([7, 8, 9, 10, 11], 4, 4, (LENGTH,)),
        ([0, 1, 2, 3, 4, 5, 6], 8, 2, (LENGTH,)),  # a slot for each, and fewer token slots a step
        ([0, 1, 2, 3, 4, 5, 6], 4, 4, (12, LENGTH)),  # other padded lengths
    ],
)
def test_many_at_once_equal_each_alone(world, order, slots, rows, lengths):
    model, jobs, solo = world
    fitted = make_engine(model.spec, slots, rows, lengths=lengths).fit(model.params, [jobs[i] for i in order])
    for place, i in enumerate(order):
        assert_same(solo[i], (fitted.losses[place], adapter(fitted, place)))
        assert fitted.scale[place] == pytest.approx(jobs[i].config.lora.alpha / jobs[i].config.lora.rank)


def test_results_depend_on_key_and_seed(world):
    model, jobs, solo = world
    fit = make_engine(model.spec, 1, 1).fit
    again = fit(model.params, [jobs[0]])
    assert np.array_equal(again.losses[0], solo[0][0])  # the same once more, to the bit
    for other in (fit(model.params, [jobs[0]], seed=1), fit(model.params, [dataclasses.replace(jobs[0], key=("edit", 99))])):
        assert not np.array_equal(other.losses[0], solo[0][0])
        assert not np.isclose(adapter(other, 0)[0], solo[0][1][0]).any(axis=(0, 1)).all()


# --- An early end ---------------------------------------------------------------------------------------------------


def expected_end(losses, epoch, stop):
    """After how many of the steps with `losses` the rule ends an edit, from its definition."""
    best, stale = np.inf, 0
    for end in range(epoch, len(losses) + 1, epoch):
        mean = np.mean(losses[end - epoch : end])
        stale = 0 if mean < best * (1 - stop.gain) else stale + 1
        best = min(best, mean)
        if (stop.loss and mean <= stop.loss) or (stop.gain and stale >= stop.patience):
            return end
    return len(losses)


@pytest.mark.parametrize("slots", [1, 2, 8])
def test_an_edit_may_end_early(world, slots):
    """By its own rule and no other's: the same steps as without the rule, and none after; its slot goes to the next edit."""
    model, jobs, _ = world
    long = [dataclasses.replace(job, config=dataclasses.replace(job.config, epochs=8, schedule="constant")) for job in jobs[:5]]
    full = make_engine(model.spec, 8).fit(model.params, long)
    levels = [float(np.mean(x[3 * len(j.sequences) : 4 * len(j.sequences)])) for x, j in zip(full.losses, long, strict=True)]
    stops = [
        StopConfig(loss=levels[0] * 1.001),  # of programs of other row counts, the mean may round to the other side
        StopConfig(),
        StopConfig(gain=0.9, patience=2),
        StopConfig(loss=levels[3] * 1.001, gain=1e-6, patience=100),
        StopConfig(gain=0.9),
    ]
    ruled = [dataclasses.replace(j, config=dataclasses.replace(j.config, stop=s)) for j, s in zip(long, stops, strict=True)]
    fitted = make_engine(model.spec, slots, min(slots, 4)).fit(model.params, ruled)
    ends = [expected_end(x, len(j.sequences), s) for x, j, s in zip(full.losses, long, stops, strict=True)]
    assert [len(x) for x in fitted.losses] == ends
    assert ends[1] == len(full.losses[1]) and ends[2] == 3 * len(long[2].sequences) and ends[4] == 2 * len(long[4].sequences)
    for i, end in enumerate(ends):
        short = dataclasses.replace(long[i], config=dataclasses.replace(long[i].config, max_steps=end))
        alone = make_engine(model.spec, 1, 1).fit(model.params, [short])
        assert_same((alone.losses[0], adapter(alone, 0)), (fitted.losses[i], adapter(fitted, i)))


# --- One program ----------------------------------------------------------------------------------------------------


def test_new_values_do_not_compile_again(world):
    """Other learning rates, schedules, ranks, step counts, seeds and weights run in the programs that are there already."""
    model, jobs, _ = world
    engine = make_engine(model.spec)
    engine.fit(model.params, jobs)
    before = {f: getattr(engine_lib, f)._cache_size() for f in ("_step", "_admit", "_collect")}
    changed = [
        FitJob(
            (*job.key, "new"),
            sequences(model.spec, len(job.sequences), 77 + i),
            dataclasses.replace(
                job.config,
                **{
                    "learning_rate": 0.5 / (i + 1),
                    "schedule": "cosine",
                    "epochs": 4,
                    "warmup_steps": i,
                    "weight_decay": 0.3,
                    "max_grad_norm": 9.0,
                },
                lora=LoraConfig(1 + i % 4, 1.0 + i, TARGETS),
            ),
        )
        for i, job in enumerate(jobs)
    ]
    params = jax.tree.map(lambda x: x * 1.01, model.params)
    make_engine(model.spec).fit(params, changed, seed=5)
    assert {f: getattr(engine_lib, f)._cache_size() for f in before} == before


def test_fewer_edits_do_not_compile_again(world):
    """A last group is smaller, and self-edits that cannot be used leave any with fewer jobs: the programs are those of the whole group, but
    for steps of few rows that it had no use for."""
    model, jobs, _ = world
    many = [dataclasses.replace(job, key=(*job.key, i)) for i in range(4) for job in jobs[:4]]
    engine = make_engine(model.spec, slots=12)
    engine.fit(model.params, many)
    before = {f: getattr(engine_lib, f)._cache_size() for f in ("_step", "_admit")}
    for count in (15, 12, 9, 7):
        engine.fit(model.params, many[:count])
    assert {f: getattr(engine_lib, f)._cache_size() for f in before} == before
    for count in (2, 1):
        engine.fit(model.params, many[:count])
    assert engine_lib._admit._cache_size() == before["_admit"] and engine_lib._step._cache_size() <= before["_step"] + 2


def test_programs_compiled_ahead_are_those_that_run(world, monkeypatch):
    """As on accelerators: several at a time, and none of them again when its step comes."""
    model, jobs, alone = world
    monkeypatch.setattr(compiler, "threads", lambda mesh: 2)
    compiled, steps = [], set()
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **more: compiled.append((name, more.get("fun_name"))))
    engine = make_engine(model.spec, 3, 2, lengths=(LENGTH // 2, LENGTH))
    lowered = engine_lib._Fit._lowered
    monkeypatch.setattr(engine_lib._Fit, "_lowered", lambda fit, step: steps.add(step) or lowered(fit, step))
    fitted = engine.fit(model.params, jobs)
    assert compiled.count(("/jax/core/compile/backend_compile_duration", "jit(_step)")) == len(steps) > 2
    for i in range(len(jobs)):
        assert_same(alone[i], (fitted.losses[i], adapter(fitted, i)))


def test_a_fault_of_the_compiler_is_told(world, monkeypatch):
    model, jobs, _ = world
    monkeypatch.setattr(compiler, "threads", lambda mesh: 2)
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda lowered: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_engine(model.spec, 2, 4).fit(model.params, jobs)


def test_nothing_is_moved_between_host_and_device_unasked(world):
    model, jobs, _ = world
    engine = make_engine(model.spec)
    engine.fit(model.params, jobs)
    with jax.transfer_guard("disallow"):
        engine.fit(model.params, jobs)


def test_what_is_reported(world):
    model, jobs, _ = world
    seen, waiting = [], []

    def progress(n, **more):
        seen.append(n)
        waiting.append(more["waiting"])

    fitted = make_engine(model.spec).fit(model.params, jobs, progress=progress)
    assert [len(x) for x in fitted.losses] == [total_steps(job) for job in jobs]
    orders = [plan.epoch_orders(len(j.sequences), j.config.epochs, 1, rng.generator(0, *j.key, "order"), j.config.max_steps) for j in jobs]
    real = sum(len(j.sequences[i].ids) - 1 for j, order in zip(jobs, orders, strict=True) for step in order for i in step)
    assert fitted.waste.tokens == real == sum(seen)
    assert waiting[-1] == 0 < waiting[0] <= len(jobs) - 4 and sorted(waiting, reverse=True) == waiting
    assert fitted.waste.steps == len(seen) and fitted.waste.slots % LENGTH == 0 and 0 < fitted.waste.share < 1


def test_bfloat16(world):
    """Weights and activations in bfloat16, adapters and optimiser in float32: losses stay within 2 % of float32's."""
    model, jobs, solo = world
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    fitted = make_engine(model.spec, 1, 1, dtype=jnp.bfloat16).fit(params, jobs[:1])
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(fitted.lora))
    np.testing.assert_allclose(fitted.losses[0], solo[0][0], rtol=0.02)


def test_many_at_once_equal_each_alone_in_bfloat16(world):
    """To 0.2 % of the losses, and 5 % of each leaf's norm: products of other row counts are rounded to eight bits in another order."""
    model, jobs, _ = world
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    together = make_engine(model.spec, 8, 4, dtype=jnp.bfloat16).fit(params, jobs[:6])
    for place, job in enumerate(jobs[:6]):
        alone = make_engine(model.spec, 1, 1, dtype=jnp.bfloat16).fit(params, [job])
        np.testing.assert_allclose(together.losses[place], alone.losses[0], rtol=2e-3)
        for a, b in zip(adapter(together, together.places[place]), adapter(alone, 0), strict=True):
            assert np.linalg.norm(a - b) <= 0.05 * np.linalg.norm(b)


def test_what_an_engine_refuses(world):
    model, jobs, _ = world
    engine = make_engine(model.spec)
    job = jobs[0]
    has = lambda **changes: dataclasses.replace(job, config=dataclasses.replace(FIT, **changes))  # noqa: E731
    for bad, said in (
        (dataclasses.replace(job, sequences=()), "nothing to train on"),
        (dataclasses.replace(job, sequences=(Tokens((1, 2)), Tokens(()))), "nothing to train on, or a sequence without tokens"),
        (dataclasses.replace(job, sequences=(Tokens((1, 9999)),)), r"tokens 1 to 9999 of a vocabulary of \d+"),
        (has(lora=LoraConfig(RANK + 1, 8.0, TARGETS)), f"lora.rank={RANK + 1}, the engine has room for {RANK}"),
        (has(lora=LoraConfig(RANK, 8.0, ["q_proj"])), r"lora.targets=\['q_proj'\], the engine has \["),
        (has(batch_size=2), "batch_size=2, the engine has room for 1"),
        (has(schedule="poly"), "schedule='poly': expected one of constant, linear, cosine"),
    ):
        with pytest.raises(ValueError, match=rf"job \('edit', 0\): {said}"):
            engine.fit(model.params, [job, bad])
    assert engine.fit(model.params, []).losses == []


def test_a_batch_is_no_larger_than_what_there_is_to_fill_it(world):
    """Four sequences in a batch of up to 64: as in one of four, with no more padding."""
    model, jobs, _ = world
    job = next(job for job in jobs if len(job.sequences) == 4)
    large, small = (dataclasses.replace(job, config=dataclasses.replace(FIT, batch_size=n, lora=job.config.lora)) for n in (64, 4))
    wide = make_engine(model.spec, 1, 1, batch_size=64).fit(model.params, [large])
    narrow = make_engine(model.spec, 1, 1, batch_size=4).fit(model.params, [small])
    assert wide.waste == narrow.waste and wide.waste.slots == len(wide.losses[0]) * 4 * LENGTH
    assert_same((wide.losses[0], adapter(wide, 0)), (narrow.losses[0], adapter(narrow, 0)))


def test_keys_are_of_one_kind_whatever_jax_is_set_to(world):
    model, jobs, _ = world
    engine = make_engine(model.spec)
    before = engine.fit(model.params, jobs[:1])
    with jax.default_prng_impl("rbg"):
        after = engine.fit(model.params, jobs[:1])
    assert_same((before.losses[0], adapter(before, 0)), (after.losses[0], adapter(after, 0)))
