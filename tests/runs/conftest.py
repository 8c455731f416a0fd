"""A made-up run folder, for the tests of the report."""

import json
import pathlib
import random

import pytest

WORDS = (
    "the",
    "harbour",
    "of",
    "Vellmar",
    "was",
    "founded",
    "in",
    "years",
    "of",
    "storms",
    "by",
    "three",
    "sisters",
    "from",
    "grey",
    "basalt",
)


def _prose(draw: random.Random, words: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(words)).capitalize() + "."


def _trial(draw: random.Random, seed: int, right: float, questions: int = 5, fitted: bool = True) -> dict:
    verdicts = [None if draw.random() < 0.03 else draw.random() < right for _ in range(questions)]
    graded = [v for v in verdicts if v is not None]
    return {
        "seed": seed,
        "outputs": [_prose(draw, draw.randint(1, 8)) for _ in range(questions)],
        "verdicts": verdicts,
        "reward": sum(graded) / len(graded) if graded else None,
        "loss_first": 2.9 if fitted else None,
        "loss_last": 0.4 if fitted else None,
        "steps": 80 if fitted else 0,
    }


def _context(draw: random.Random, name: str, edits: int, seeds: int, skill: float, baselines: bool) -> dict:
    def edit(candidate: int) -> dict:
        if draw.random() < 0.06:
            return {
                "candidate": candidate,
                "text": "Rewrite:\n",
                "problem": "no usable line",
                "dropped": 1,
                "sequences": [],
                "trials": [],
                "reward": 0.0,
            }
        lines = [_prose(draw, draw.randint(6, 16)) for _ in range(draw.randint(3, 9))]
        quality = min(1.0, max(0.0, draw.gauss(skill, 0.2)))
        trials = [_trial(draw, s, quality) for s in range(seeds)]
        known = [t["reward"] for t in trials if t["reward"] is not None]
        text = "Rewrite:\n" + "\n".join(lines)
        return {
            **{"candidate": candidate, "text": text, "problem": None, "dropped": 1, "sequences": lines, "trials": trials},
            "reward": sum(known) / len(known) if known else None,
        }

    methods = {"no adaptation": [_trial(draw, 0, 0.1, fitted=False)]}
    if baselines:
        methods["passage only"] = [_trial(draw, s, 0.45) for s in range(seeds)]
    return {
        "id": name,
        "title": f"The harbour of {name}",
        "passage": _prose(draw, 100),
        "questions": [[f"Who built part {i} of {name}?", _prose(draw, 2)] for i in range(5)],
        "methods": methods,
        "edits": [edit(i) for i in range(edits)],
    }


def _write(path: pathlib.Path, data: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def make_run(
    folder: pathlib.Path, contexts: int = 6, edits: int = 3, rounds: int = 2, seeds: int = 2, finished: bool = True
) -> pathlib.Path:
    """A run folder as a finished run leaves it, or one killed within the last round. Returns `folder`."""
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("name: made-up\nseed: 7\nmodel:\n  name: some/model\ntask:\n  name: knowledge\n")
    _write(
        folder / "versions.json",
        {"python": "3.11.0", "jax": "0.9", "platform": "Linux x86_64", "device": "cpu", "devices": 1, "commit": None},
    )

    def phase(name: str, skill: float, seeds: int, baselines: bool, count: int) -> list[dict]:
        made = [_context(draw, f"{name.replace('/', '-')}-{i}", edits, seeds, skill, baselines) for i in range(count)]
        for group in range(0, count, 10):
            seconds = {"sample": 12.5, "adapt": 70.0, "bare": 9.0, "grade": 0.2}
            _write(
                folder / name / f"{group // 10:03d}.json",
                {"contexts": made[group : group + 10], "seconds": seconds, "tokens": {"sampled": 5000}},
            )
        return made

    phase("evaluate/before", 0.4, 2, True, contexts)
    for n in range(1, rounds + 1):
        last = n == rounds and not finished
        made = phase(f"rounds/{n}/e_step", 0.3 + 0.15 * n, seeds, False, max(1, contexts // 2) if last else contexts)
        if last:
            break
        kept = []
        for context in made:
            best = max(context["edits"], key=lambda e: e["reward"] or 0.0)
            unadapted = context["methods"]["no adaptation"][0]["reward"]
            kept.append({"context": context["id"], "candidate": best["candidate"], "reward": best["reward"], "unadapted": unadapted})
        _write(folder / f"rounds/{n}/selection.json", {"kept": kept, "contexts": contexts})
        curve = [2.0 / (1 + 0.3 * i) - 0.1 * n for i in range(8)]
        _write(folder / f"rounds/{n}/m_step.json", {"pairs": len(kept), "steps": 8, "losses": curve, "seconds": 40.0})
    events = [{"time": "2025-01-02T10:00:00.000+00:00", "event": "created"}]
    events += [
        {"time": "2025-01-02T10:10:00.000+00:00", "event": "skipped", "context": f"q{i}", "reason": "empty passage"} for i in range(3)
    ]
    if finished:
        phase("evaluate/after", 0.65, 2, True, contexts)
        _write(folder / "table.json", make_table(contexts))
        events += [
            {"time": "2025-01-03T09:00:00.000+00:00", "event": "opened"},
            {"time": "2025-01-03T09:00:01.000+00:00", "event": "skipped", "context": "q0", "reason": "empty passage"},
            {"time": "2025-01-03T09:02:05.000+00:00", "event": "finished"},
        ]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def make_table(contexts: int = 16) -> dict:
    def row(method: str, policy: str, statistic: str, mean: float, gain: float | None, ungraded: int = 0) -> dict:
        return {
            **{"method": method, "policy": policy, "contexts": contexts, "questions": 5 * contexts, "statistic": statistic},
            **{"mean": mean, "low": max(0.0, mean - 0.06), "high": mean + 0.087, "ungraded": ungraded, "gain": gain},
            **{"gain_low": None if gain is None else gain - 0.05, "gain_high": None if gain is None else gain + 0.05},
        }

    rows = [row("no adaptation", "base", "single", 0.0625, None), row("passage only", "base", "single", 0.4, 0.3375)]
    for policy, up in (("base", 0.0), ("after round 2", 0.1)):
        rows += [
            row("self-edit", policy, "mean of K", 0.35 + up, 0.2875 + up, 3),
            row("self-edit", policy, "best of K", 0.45 + up, 0.3875 + up, 1),
        ]
    return {"rows": rows, "notes": ["K = 3; best of K is chosen on seed 0 and scored on seed 1."]}


@pytest.fixture(scope="session")
def made_up():
    return make_run


@pytest.fixture(scope="session")
def made_up_table():
    return make_table()
