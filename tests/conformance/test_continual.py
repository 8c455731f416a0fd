"""The continual experiment's sequences, requests, matrices and averages against recorded outputs of the original."""

import numpy as np
import pytest

from seal_jax.runs import matrix
from seal_jax.tasks.base import Context, Prompt
from seal_jax.tasks.knowledge import Config, build, prompts


@pytest.fixture(scope="module")
def cases(golden):
    return golden("continual_matrix")["cases"]


def of(cases, kind):
    found = [case for case in cases if case["kind"] == kind]
    assert found, f"no cases of {kind}"
    return found


def as_recorded(cells: np.ndarray) -> np.ndarray:
    """The original has 0 where we have no value."""
    return np.nan_to_num(cells)


def summary_of(data) -> matrix.Summary:
    mean, std = (matrix.from_rows(data[f"{what}_over_sequences"]) for what in ("mean", "std"))
    return matrix.Summary(mean, std, data["n_sequences"], data["base_model"])


def test_sampled_datapoints(cases):
    for case in of(cases, "sampled datapoints"):
        drawn = matrix.sequences(case["n_sequences"], case["n_datapoints"], case["dataset_size"], case["seed"])
        assert drawn == case["expected"], case["seed"]


def test_aggregation_over_sequences(cases):
    for case in of(cases, "continual main aggregation"):
        expected = case["expected"]
        ours = matrix.aggregate(np.stack([matrix.from_rows(rows) for rows in case["sequences"]]))
        np.testing.assert_allclose(as_recorded(ours.mean), expected["mean_over_sequences"], rtol=1e-12)
        np.testing.assert_allclose(as_recorded(ours.std), expected["std_over_sequences"], rtol=1e-12, atol=1e-15)
        assert (ours.sequences, ours.mean.shape[1]) == (expected["n_sequences"], expected["n_datapoints"])


def test_average_over_runs(cases, golden):
    runs = golden("continual_matrix")["run_summaries"]
    for case in of(cases, "average_results.main"):
        expected = case["expected"]
        ours = matrix.average([summary_of(runs[str(run)]) for run in case["runs"]])
        assert np.round(as_recorded(ours.mean), 4).tolist() == expected["mean_over_sequences"], case["runs"]
        assert np.round(as_recorded(ours.std), 4).tolist() == expected["std_over_sequences"], case["runs"]
        assert (ours.sequences, ours.model) == (expected["n_sequences"], expected["base_model"])


def test_run_one_sequence(cases):
    """What is asked for in what order, and the matrix that its verdicts make."""
    task = build(Config(prompt="implications", split_newlines=True, drop_headers=False, answer_prompt="base"), grader=None)
    for case in of(cases, "run_one_sequence"):
        contexts = [Context(str(i), item["title"], item) for i, item in enumerate(case["items"])]
        assert [task.edit_prompt(c) for c in contexts] == [Prompt(text=r["prompt"]) for r in case["self_edit_requests"]]
        requests = iter(case["requests"])

        def verdicts(request, asked):
            """The recorded verdicts, by passage; the questions must be those of the passages asked."""
            expected = [prompts.answer_prompt("base", question) for question in request["questions"]]
            assert [probe for context in asked for probe in task.probes(context)] == expected
            flags = iter(request["verdicts"])
            return {c.id: trial([next(flags) == "1" for _ in task.probes(c)]) for c in asked}

        def trial(flags):
            return {"outputs": [""] * len(flags), "verdicts": flags, "reward": sum(flags) / len(flags)}

        answers = {}
        for context in contexts:
            request = next(requests)
            assert request["train_sequences"] == []
            answers |= verdicts(request, [context])
        steps = []
        for t, (context, completion) in enumerate(zip(contexts, case["completions"], strict=True)):
            request = next(requests)
            # To the original an empty self-edit is the passage once more; to us it is unusable.
            edit = completion.strip() or context.payload["context"]
            assert [s.completion for s in task.training_set(context, edit).sequences] == request["train_sequences"]
            steps.append({"step": t, "lanes": [{"method": "sequential", "sequence": 0, "answers": verdicts(request, contexts[: t + 1])}]})
        start = {"sequences": [[c.id for c in contexts]], "answers": answers}
        ours = matrix.from_records(start, steps)["sequential"]
        assert as_recorded(ours[0]).tolist() == case["expected"]["mean"]
        assert as_recorded(matrix.aggregate(ours).std).tolist() == case["expected"]["std"]
        assert next(requests, None) is None
