import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seal_jax import rng
from seal_jax.config import FitConfig, LoraConfig, SftConfig
from seal_jax.errors import SealError
from seal_jax.fit import plan
from seal_jax.fit.engine import FitEngine, FitJob, Tokens
from seal_jax.models import lora
from seal_jax.models.decoder import Decoder
from seal_jax.models.tree import get, leaves
from seal_jax.sft import engine as engine_lib
from seal_jax.sft.engine import SftEngine

torch = pytest.importorskip("torch", reason="torch computes the reference; pip install seal_jax[test]")

KEY = ("parity", 0)
# Seven sequences, three a step: the last step of an epoch has one.
LORA = SftConfig(lora=LoraConfig(3, 6.0, list(lora.GROUPS)), learning_rate=3e-3, schedule="cosine", warmup_steps=2, epochs=3, batch_size=3)
FULL = dataclasses.replace(LORA, weights="full", learning_rate=1e-3, weight_decay=0.1, max_grad_norm=0.5)


@pytest.fixture(scope="module", autouse=True)
def quick(quick_compile):
    with quick_compile():
        yield


def sequences(spec, count=7, seed=0):
    """Random sequences of 5 to 24 tokens, the first few of which carry no loss."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(5, 25, count)
    return [Tokens(tuple(draw.integers(0, spec.vocab_size, n).tolist()), int(draw.integers(1, 5))) for n in lengths]


def tune(model, config, dtype=jnp.float32, params=None, **options):
    params = model.params if params is None else params
    return SftEngine(Decoder(model.spec, dtype), config).tune(params, sequences(model.spec), KEY, seed=3, **options)


@pytest.fixture(scope="module")
def runs(tiny):
    """The results of LORA and FULL, one sequence a row and all of a step's rows at once, and the states that they save."""
    model, found = tiny("qwen2"), {}
    for config in (LORA, FULL):
        saved = []
        tuned = tune(model, dataclasses.replace(config, microbatch=8), save=saved.append, checkpoint_every=4)
        found[config.weights] = tuned, saved
    return model, found


def assert_same(one, other):
    """Losses to 1e-5; results leaf for leaf to 3e-5 of a leaf's largest element.

    One element in ten may be off by up to 1e-3: other layouts add up in another order, and where the gradients of an element nearly
    cancel, as those of a key's bias do, Adam divides that rounding by next to nothing.
    """
    np.testing.assert_allclose(one.losses, other.losses, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(one.weights), jax.tree.leaves(other.weights), strict=True):
        gap = np.abs(np.asarray(a) - np.asarray(b)) / np.abs(a).max()
        assert np.quantile(gap, 0.9) <= 3e-5 and gap.max() <= 1e-3


@pytest.mark.parametrize("config", [LORA, FULL], ids=["lora", "full"])
def test_the_layout_changes_nothing(runs, config):
    """Several sequences in a row, and several rows one after another: the result of a row for each sequence, all at once."""
    model, found = runs
    plain, _ = found[config.weights]
    other = tune(model, dataclasses.replace(config, row_length=48))
    assert_same(plain, other)
    assert other.waste.tokens == plain.waste.tokens and other.waste.slots < plain.waste.slots
    assert plain.losses[-3:].mean() < plain.losses[:3].mean() - 0.05, "it learns"


def test_an_adapter_is_that_of_the_inner_loop(runs):
    """The same draws, steps and schedule as one edit of `FitEngine`, which equals PEFT and torch."""
    model, found = runs
    c = LORA
    rates = (c.learning_rate, c.schedule, c.warmup_steps, c.weight_decay, c.max_grad_norm)
    job = FitJob(KEY, tuple(sequences(model.spec)), FitConfig(c.lora, *rates, c.epochs, c.batch_size))
    engine = FitEngine(Decoder(model.spec), c.lora, slots=1, tokens_per_step=1, batch_size=c.batch_size, lengths=(24,))
    fitted = engine.fit(model.params, [job], seed=3)
    ours, _ = found["lora"]
    assert_same(engine_lib.Tuned(jax.tree.map(lambda x: x[0], fitted.lora), fitted.losses[0], fitted.waste), ours)


# --- All weights: the same as transformers and torch -----------------------------------------------------------------


def torch_tune(model, config):
    """(losses, state dict after the run), as a plain loop with torch's AdamW, transformers' schedule and its Trainer's rule for decay."""
    from transformers import get_scheduler

    net, data = model.load(), sequences(model.spec)
    kept = [p for name, p in net.named_parameters() if "norm" in name or name.endswith("bias")]
    others = [p for name, p in net.named_parameters() if not ("norm" in name or name.endswith("bias"))]
    groups = [{"params": others, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
    orders = plan.epoch_orders(len(data), config.epochs, config.batch_size, rng.generator(3, *KEY, "order"))
    scheduler, losses = get_scheduler(config.schedule, optimizer, config.warmup_steps, len(orders)), []
    for step in orders:
        batch = [data[i] for i in step]
        ids = torch.zeros(len(batch), max(len(s.ids) for s in batch), dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, s in enumerate(batch):
            ids[row, : len(s.ids)], mask[row, : len(s.ids)] = torch.tensor(s.ids), 1
            labels[row, s.loss_from : len(s.ids)] = torch.tensor(s.ids[s.loss_from :])
        loss = net(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), config.max_grad_norm)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses, {name: x.detach().numpy() for name, x in net.state_dict().items()}


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])  # with a head of its own and biases; with tied embeddings and norms of heads
def test_all_weights_equal_transformers_and_torch(tiny, family):
    """Nine steps with clipping, decay, warm-up and cosine: loss by loss, and every weight of the model."""
    model = tiny(family)
    assert model.spec.tie_embeddings == (family == "qwen3")
    tuned = tune(model, dataclasses.replace(FULL, row_length=48))
    losses, state = torch_tune(model, FULL)
    assert np.abs(tuned.losses - losses).max() <= 1e-4
    for leaf in leaves(model.spec):
        ours, before = np.asarray(get(tuned.weights, leaf.path)), np.asarray(get(model.params, leaf.path))
        for i, name in enumerate(leaf.names(model.spec)):
            one, old = (ours[i], before[i]) if leaf.stacked else (ours, before)
            theirs = state[name].T if leaf.transposed else state[name]
            gap = np.abs(one - theirs)
            # A bias of keys moves no attention, so that its gradient is rounding, of which Adam makes whole steps.
            most = 5e-5 if name.endswith("k_proj.bias") else 1e-5
            assert np.quantile(gap, 0.99) <= most and gap.max() <= 1e-4, name
            assert np.abs(theirs - old).max() > 1e-3, name


def test_bfloat16_weights_train_as_float32_masters(runs):
    """Products in bfloat16; losses stay within 2 % of float32's, and steps too small for bfloat16 are not lost."""
    model, found = runs
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    before = jax.tree.map(np.asarray, params)
    tuned = tune(model, dataclasses.replace(FULL, row_length=64, epochs=1), jnp.bfloat16, params)
    np.testing.assert_allclose(tuned.losses[:2], found["full"][0].losses[:2], rtol=0.02)
    jax.tree.map(np.testing.assert_array_equal, params, before)
    for after, old in zip(jax.tree.leaves(tuned.weights), jax.tree.leaves(before), strict=True):
        assert after.dtype == jnp.float32 and not np.array_equal(after, after.astype(jnp.bfloat16)) and np.all(np.isfinite(after))
        assert np.abs(after - old.astype(np.float32)).max() < 0.02


# --- Going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [LORA, FULL], ids=["lora", "full"])
def test_a_resumed_run_ends_as_an_unbroken_one(runs, config):
    """To the bit, from either of the states that a run of nine steps saves."""
    model, found = runs
    whole, saved = found[config.weights]
    assert [len(s["losses"]) for s in saved] == [4, 8]
    assert all(isinstance(x, np.ndarray) and x.dtype == np.float32 for x in jax.tree.leaves(saved))
    again = []
    resumed = tune(model, dataclasses.replace(config, microbatch=8), resume=saved[0], save=again.append, checkpoint_every=4)
    np.testing.assert_array_equal(resumed.losses, whole.losses)
    jax.tree.map(np.testing.assert_array_equal, resumed.weights, whole.weights)
    jax.tree.map(np.testing.assert_array_equal, again, saved[1:])
    assert resumed.waste.steps == 5, "and not from the start"


def test_a_state_of_another_run_is_refused(runs):
    model, found = runs
    _, saved = found["lora"]
    small = dataclasses.replace(LORA, lora=dataclasses.replace(LORA.lora, rank=2))
    for config in (FULL, small, dataclasses.replace(LORA, epochs=1)):
        with pytest.raises(SealError, match="the saved state of the training is of another model, adapter or number of steps"):
            tune(model, config, resume=saved[1])
    with pytest.raises(ValueError, match="nothing to train on"):
        SftEngine(Decoder(model.spec), LORA).tune(model.params, [], KEY)


# --- One program -----------------------------------------------------------------------------------------------------


def test_a_run_is_one_program_and_moves_nothing_unasked(runs):
    """Steps of different fill, other rates, seeds and weights: all in the program of the first step. The weights are not consumed."""
    model, _ = runs
    config, before = dataclasses.replace(LORA, row_length=48), engine_lib._step._cache_size()
    params = jax.tree.map(lambda x: x * 1.01, model.params)
    first, seen = tune(model, config), []
    assert engine_lib._step._cache_size() <= before + 1
    before = engine_lib._step._cache_size()
    with jax.transfer_guard("disallow"):
        changed = dataclasses.replace(config, learning_rate=1e-4, schedule="linear", weight_decay=0.1, max_grad_norm=0.0)
        other = tune(model, changed, params=params, progress=seen.append)
    assert engine_lib._step._cache_size() == before
    assert sum(seen) == other.waste.tokens and len(seen) == 9 and not np.array_equal(first.losses, other.losses)
    assert np.isfinite(np.asarray(params["embed"]["embedding"])).all()
