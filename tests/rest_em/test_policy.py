import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seal_jax import config as config_lib
from seal_jax import limits
from seal_jax.errors import SealError
from seal_jax.fit import memory
from seal_jax.fit.engine import FitEngine, FitJob, Tokens
from seal_jax.models.load import load_model
from seal_jax.rest_em.policy import Edit, Policy
from seal_jax.sft.engine import SftEngine, Tuned
from seal_jax.tasks.base import Prompt, TrainingSet, TrainSequence


@pytest.fixture(scope="module", autouse=True)
def quick(quick_compile):
    with quick_compile():
        yield


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(config_lib.ModelConfig(str(tiny_model), "float32"))


def make_policy(model, remat="none", **changes):
    config = config_lib.build(
        {
            "task": {"name": "knowledge"},
            "model": {"max_length": 64, "remat": remat},
            "fit": {"lora": {"rank": 4, "alpha": 8.0}, "epochs": 2, "lengths": [64], "slots": 8, "tokens_per_step": 512},
            "sample": {"max_tokens": 12, "rows": 2},
            "answer": {"max_tokens": 6, "rows": 4},
            "m_step": {"lora": {"rank": 4, "alpha": 8.0}, "learning_rate": 0.02, "epochs": 3, "batch_size": 2},
            **changes,
        }
    )
    # A copy, because `merge` consumes the weights that it replaces.
    return Policy(dataclasses.replace(model, params=jax.tree.map(jnp.copy, model.params)), config)


@pytest.fixture(scope="module")
def policy(model):
    return make_policy(model)


def test_training_sequences_are_cut_at_the_models_length(policy):
    text = "Orsk sells salt. " * 40
    (cut,) = policy.tokenise(TrainingSet((TrainSequence(text),)))
    whole = policy.tokenizer.encode(text)
    assert len(whole) > 64 and cut.ids == tuple(whole[:64]) and cut.loss_from == 1


def test_sequences_without_a_token_to_predict_are_left_out(policy):
    sequences = (
        TrainSequence(""),
        TrainSequence("a"),  # one token, which nothing precedes
        TrainSequence("b", Prompt("Orsk sells salt. " * 40)),  # the prompt alone fills the context
        TrainSequence("", Prompt("Orsk sells")),
        TrainSequence("salt", Prompt("Orsk sells")),
    )
    assert len(policy.tokenizer.encode("a")) == 1
    (kept,) = policy.tokenise(TrainingSet(sequences))
    prompt = policy.tokenizer.encode("Orsk sells")
    assert kept.ids == (*prompt, *policy.tokenizer.encode("salt", False)) and kept.loss_from == len(prompt)
    assert policy.tokenise(TrainingSet(sequences[:4])) == ()


def test_a_chat_turn_is_learnt_with_its_end_and_its_prompt_where_asked(policy):
    messages, t = ({"role": "user", "content": "Orsk?"},), policy.tokenizer
    before, after = t.encode_completion(Prompt(messages=messages), "salt")
    sequences = [TrainSequence("salt", Prompt(messages=messages), on_prompt=on_prompt) for on_prompt in (False, True)]
    answer, both = policy.tokenise(TrainingSet(tuple(sequences)))
    assert answer.ids == both.ids == (*before, *after) and answer.ids[-1] == t.eos_ids[0]
    assert (answer.loss_from, both.loss_from) == (len(before), 1)


def test_self_edits_have_the_form_of_the_schema(policy, model):
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 9}, "on": {"type": "boolean"}}}
    schema |= {"required": ["n", "on"], "additionalProperties": False}
    prompts = [Prompt("Orsk:", schema=schema), Prompt("Vell:"), Prompt("Orsk:", schema=schema, then_text=True)]
    keys = [[("s", 0), ("s", 1)], [("s", 2)], [("s", 3)]]
    for change, formed in ({}, True), ({"constrained": False}, False):
        policy = make_policy(model, sample={"max_tokens": 40, "rows": 2, **change})
        (one, two), (free,), (opened,) = policy.write(prompts, keys)
        assert [text.startswith('{"n": ') for text in (one, two, free, opened)] == [formed, formed, False, formed]
        if formed:
            line, _, more = opened.partition("\n")
            assert all(1 <= json.loads(text)["n"] <= 9 for text in (one, two, line)) and more


def test_prompts_that_fit(policy):
    def with_tokens(n):
        prompt = Prompt(text="a b" * n)
        ids = policy.tokenizer.encode_prompt(prompt)
        return prompt, len(ids)

    lengths = {}
    for n in range(1, 60):
        prompt, length = with_tokens(n)
        lengths[length] = policy.prompt_fits(prompt)
    assert lengths == {length: length < 64 for length in lengths} and {True, False} <= set(lengths.values())
    assert policy.prompt_fits(Prompt(messages=({"role": "user", "content": "Orsk?"},)))
    assert not policy.prompt_fits(Prompt(messages=({"role": "user", "content": "Orsk?" * 60},)))


def test_self_edits_depend_on_prompt_and_key_alone(policy, model):
    prompts = [Prompt(text=f"Tell of {town}.") for town in ("Orsk", "Vell")]
    keys = [[("round", 1, town, k) for k in range(2)] for town in "ov"]
    (o0, o1), (v0, v1) = policy.write(prompts, keys)
    assert len({o0, o1, v0, v1}) == 4
    assert policy.write(prompts[::-1], keys[::-1]) == [[v0, v1], [o0, o1]], "not on the order"
    assert policy.write(prompts[1:], [keys[1][1:]]) == [[v1]], "nor on what is written beside"
    assert policy.write(prompts[:1], [[("round", 2, "o", 0)]])[0][0] != o0
    assert make_policy(model, seed=1).write(prompts[:1], [keys[0][:1]])[0][0] != o0


def test_max_tokens_beyond_the_context_end_at_the_context(model, monkeypatch):
    policy, requests = make_policy(model, sample={"max_tokens": 8192}, answer={"max_tokens": 500}), []
    monkeypatch.setattr(policy, "_generate", lambda r, rows, lora, kind, what: requests.extend(r) or ["" for _ in r])
    prompts = [Prompt(text="Tell of Orsk."), Prompt(text="Tell " * 40)]
    policy.write(prompts[:1], [[("x", 0)]])
    policy.answer([prompts])
    ids = [policy.tokenizer.encode(p.text) for p in prompts]
    assert len(ids[0]) < 64 < len(ids[1])
    assert [(list(r.prompt), r.max_tokens) for r in requests] == [
        (ids[0], 64 - len(ids[0])),
        (ids[0], 64 - len(ids[0])),
        (ids[1][-63:], 1),  # of a question that is too long the end is kept
    ]


def test_edits_answer_with_their_own_adapter(policy):
    probes = (Prompt(text="What does Orsk sell?"), Prompt(text="Who?"))
    training = [
        TrainingSet(tuple(TrainSequence(f"{town} sells {good}.") for _ in range(4))) for town, good in (("Orsk", "tin"), ("Vell", "wool"))
    ]
    edits = [Edit(("r", town, 0), data, probes) for town, data in zip("ov", training, strict=True)]
    both = policy.adapt(edits)
    alone = policy.adapt(edits[1:])
    assert [len(a.outputs) for a in both] == [2, 2] and both[0].outputs != both[1].outputs
    assert both[1].outputs == alone[0].outputs
    np.testing.assert_allclose(both[1].losses, alone[0].losses, rtol=1e-5)
    assert len(both[0].losses) == 8 and both[0].losses[-1] < both[0].losses[0]
    assert policy.adapt([]) == []


def test_slots_that_the_config_leaves_open_are_as_many_as_fit(model, policy, monkeypatch):
    """Asked of the compiler once for jobs of a kind, within the memory of the device; the answers are those of any number of slots."""
    fit = {"lora": {"rank": 4, "alpha": 8.0}, "epochs": 2, "lengths": [64], "tokens_per_step": 512}
    edits = [Edit(("s", i), TrainingSet((TrainSequence(f"Orsk sells {i} boats."),)), (Prompt(text="Who?"),)) for i in range(3)]
    asked, found = [], memory.slots_that_fit
    monkeypatch.setattr(memory, "slots_that_fit", lambda *args, **options: asked.append(found(*args, **options)) or asked[-1])
    few = dict.fromkeys(("group", "contexts", "edits", "seeds"), 1)
    open_policy = make_policy(model, fit=fit, rest_em=few, evaluate=few)
    results = [open_policy.adapt(edits) for _ in range(2)]
    assert asked == [8], "all that there are, in steps of eight, and asked once"
    for result in results:
        for ours, given in zip(result, policy.adapt(edits), strict=True):
            assert ours.outputs == given.outputs
            np.testing.assert_allclose(ours.losses, given.losses, rtol=1e-5)
    monkeypatch.setattr(memory, "device_limit", lambda mesh: 1.0)
    with pytest.raises(SealError, match="one edit of 64 tokens takes"):
        make_policy(model, fit=fit).adapt(edits)


def test_what_fits_recompute_follows_from_the_memory(model, policy, monkeypatch):
    """ "auto": nothing where the device has room for it; each is asked for once for jobs of a kind, and moves no answer."""
    edits = [Edit(("s", i), TrainingSet((TrainSequence(f"Orsk sells {i} boats."),)), (Prompt(text="Who?"),)) for i in range(3)]
    expected, asked, fits = policy.adapt(edits), [], []
    few = dict.fromkeys(("group", "contexts", "edits", "seeds"), 1)
    real = Policy._fit
    monkeypatch.setattr(
        Policy, "_fit", lambda self, engine, *rest: fits.append((engine.decoder.remat, engine.slots)) or real(self, engine, *rest)
    )

    def step_bytes(engine, params, length, slots):
        asked.append((engine.decoder.remat, slots))
        return {"none": 1000.0, "full": 10.0}[engine.decoder.remat] * slots

    monkeypatch.setattr(memory, "step_bytes", step_bytes)
    monkeypatch.setattr(memory, "adapter_bytes", lambda engine: 1)
    for slots, limit, found, questions in (
        (4, 4008.0, ("none", 4), [("none", 4)]),
        (4, 4007.0, ("full", 4), [("none", 4)]),
        (None, 8008.0, ("none", 8), [("none", 8)]),
        (None, 6508.0, ("none", 6), [("none", 8), ("none", 2), ("none", 6)]),
        (None, 2007.0, ("full", 8), [("none", 8), ("none", 2), ("full", 8)]),
    ):
        monkeypatch.setattr(memory, "device_limit", lambda mesh: limit)  # noqa: B023
        asked.clear()
        fit = {"lora": {"rank": 4, "alpha": 8.0}, "epochs": 2, "lengths": [64], "slots": slots, "tokens_per_step": 512}
        auto = make_policy(model, "auto", fit=fit, rest_em=few, evaluate=few)
        results = [auto.adapt(edits) for _ in range(2)]
        assert fits[-2:] == [found] * 2 and asked == questions, "asked for once"
        assert [[a.outputs for a in result] for result in results] == [[a.outputs for a in expected]] * 2
    assert auto.decoder.remat == "full", "of the M-step"
    auto = make_policy(model, "auto", fit=fit | {"slots": 4}, rest_em=few, evaluate=few)
    auto.beside = 1  # of another model, for which there was room before
    monkeypatch.setattr(memory, "device_limit", lambda mesh: 4008.0)
    auto.adapt(edits)
    assert fits[-1] == ("full", 4)


def pairs_of(n):
    """Pairs of 2, 4 and 6 completion tokens, all padded to one length, which is one compilation."""
    pairs = [("Orsk", "!"), ("Vell", "!?!"), ("Mard", "!?!?!")][:n]
    return [(Prompt(text=f"Tell of {town}."), completion) for town, completion in pairs]


def test_the_m_step_learns_what_it_is_shown(model):
    policy = make_policy(model)
    before = jax.tree.map(np.asarray, policy.params)
    tuned = policy.tune(pairs_of(2), ("round", 1, "m_step"))
    lora, losses = tuned.weights, tuned.losses
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(lora))
    assert len(losses) == 3 and losses[2] < losses[1] < losses[0]
    policy.merge(lora, 2.0)
    # Merged are exactly the targeted kernels, by scale * a @ b.
    kernel, change = before["layers"]["mlp"]["up_proj"]["kernel"], lora["layers"]["mlp"]["up_proj"]
    delta = 2.0 * np.einsum("nir,nro->nio", change["a"], change["b"])
    np.testing.assert_allclose(policy.params["layers"]["mlp"]["up_proj"]["kernel"], kernel + delta, atol=1e-6)
    assert np.abs(delta).max() > 1e-3
    np.testing.assert_array_equal(policy.params["embed"]["embedding"], before["embed"]["embedding"])


def test_the_loss_of_the_m_step_is_on_the_completion_and_its_end(model, monkeypatch):
    policy, seen = make_policy(model), []
    monkeypatch.setattr(
        SftEngine, "tune", lambda engine, params, sequences, *rest, **options: seen.append(sequences) or Tuned({}, None, None)
    )
    policy.tune([(Prompt(text="Tell of Orsk."), "Orsk sells salt."), (Prompt(text="x" * 200), "y" * 200)], ("m",))
    (sequences,) = seen
    prompt = policy.tokenizer.encode("Tell of Orsk.")
    assert sequences[0].ids == (*prompt, *policy.tokenizer.encode("Orsk sells salt.", False), policy.tokenizer.eos_ids[0])
    assert sequences[0].loss_from == len(prompt)
    assert len(sequences[1].ids) == 64, "cut at the model's length"


def test_a_last_batch_that_is_not_full_is_the_mean_over_its_own_tokens(model):
    policy = make_policy(model, m_step={"lora": {"rank": 4, "alpha": 8.0}, "batch_size": 2, "learning_rate": 0.0, "epochs": 1})
    losses = policy.tune(pairs_of(3), ("round", 1, "m_step")).losses
    alone = []
    for pair in pairs_of(3):
        (loss,) = policy.tune([pair], ("round", 1, "m_step")).losses
        alone.append((float(loss), len(policy.tokenizer.encode_completion(*pair)[1])))
    assert [n for _, n in alone] == [2, 4, 6], "or weighting by tokens would not show"
    # At rate 0 every step sees the base policy: one step holds two of the three, weighted by their tokens, the last the third alone.
    expected = []
    for last in range(3):
        two = [one for i, one in enumerate(alone) if i != last]
        expected.append((sum(loss * n for loss, n in two) / sum(n for _, n in two), alone[last][0]))
    assert any(np.allclose(losses, pair, rtol=1e-5) for pair in expected), (losses, expected)


def test_a_partial_batch_is_a_step_on_its_own_mean(policy):
    """One sequence in a batch padded to two gives the adapter that it gives in a batch of one."""
    lora = config_lib.LoraConfig(4, 8.0, list(limits.LINEAR))
    fitted = []
    for batch_size in (1, 2):
        fit = config_lib.FitConfig(lora, 0.01, epochs=2, batch_size=batch_size)
        engine = FitEngine(policy.decoder, lora, slots=1, tokens_per_step=1, batch_size=batch_size)
        fitted.append(engine.fit(policy.params, [FitJob(("x",), (Tokens(tuple(range(10, 25)), 5),), fit)]))
    np.testing.assert_allclose(fitted[0].losses[0], fitted[1].losses[0], rtol=1e-6)
    for x, y in zip(jax.tree.leaves(fitted[0].lora), jax.tree.leaves(fitted[1].lora), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
        assert np.abs(x).max() > 1e-3


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_continued_pretraining_changes_the_policy_and_goes_on_from_a_state(model, weights):
    """Half of the steps, and from the saved state the rest: the policy of an unbroken run, which has learnt its sequences."""
    sequences = [TrainSequence(f"{town} sells {good}.") for town, good in (("Orsk", "tin"), ("Vell", "wool"), ("Mard", "salt"))]
    lora = config_lib.LoraConfig(4, 8.0, list(limits.LINEAR))
    sft = config_lib.SftConfig(weights, lora, 0.01, epochs=4, batch_size=2, row_length=64)
    policies, saved = [make_policy(model) for _ in range(2)], []
    before = jax.tree.map(np.asarray, policies[0].params)
    losses = policies[0].pretrain(sequences, ("cpt",), sft, save=saved.append, checkpoint_every=4)
    assert len(losses) == 8 and losses[-2:].mean() < losses[:2].mean() and len(saved) == 1
    again = policies[1].pretrain(sequences, ("cpt",), sft, resume=saved[0])
    np.testing.assert_array_equal(again, losses)
    jax.tree.map(np.testing.assert_array_equal, policies[1].params, policies[0].params)
    after = jax.tree.map(np.asarray, policies[0].params)
    assert np.abs(after["layers"]["mlp"]["up_proj"]["kernel"] - before["layers"]["mlp"]["up_proj"]["kernel"]).max() > 1e-3
    assert np.array_equal(after["embed"]["embedding"], before["embed"]["embedding"]) == (weights == "lora")
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, before)


def test_sequences_with_nothing_to_learn_are_refused(policy):
    with pytest.raises(SealError, match="pretraining: none of the 2 sequences has a token to predict within 64 tokens"):
        policy.pretrain([TrainSequence("")] * 2, ("cpt",), config_lib.SftConfig())
