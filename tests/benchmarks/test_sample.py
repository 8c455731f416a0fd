from benchmarks import sample


def test_our_side_alone(measure):
    rows, printed = measure(sample.main, "--no-peer")
    assert "# no peer: --no-peer" in printed and "# vLLM not measured" in printed
    assert list(rows) == ["decode-r4", "decode-r1", "answers-e2"]


def test_beside_the_peer(measure, torch_peer):
    rows, _ = measure(sample.main)
    ours = ["decode-r4", "decode-r1", "answers-e2"]
    assert list(rows)[:3] == ours, "before the peer has begun"
    for case in ours:
        name, peer = ("peft", "peft-generate") if case == "answers-e2" else ("transformers-generate",) * 2
        row = rows[f"{case}-vs-{name}"]
        assert row["peer"] == peer and row["check"] == "ok" and abs(row["regret"]) < 1e-4
        assert row["k"] == rows[case]["k"] and row["tokens_per_s"] == rows[case]["tokens_per_s"]
    assert {"transformers-generate-r4", "transformers-generate-r1", "peft-generate"} < set(rows)


def test_other_tokens_are_noticed(torch_peer, monkeypatch, capsys, quick_compile):
    real = sample.decode
    monkeypatch.setattr(sample, "decode", lambda *args: [[(t + 1) % 512 for t in tokens] for tokens in real(*args)])
    with quick_compile():
        assert sample.main(["--tiny", "--repeats", "1", "--rows", "1", "--adapters", "0"]) == 1
    assert '"check": "failed"' in capsys.readouterr().out
