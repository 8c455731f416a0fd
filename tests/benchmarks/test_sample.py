from benchmarks import sample


def test_our_side_alone(measure):
    rows, printed = measure(sample.main, "--no-peer")
    assert "# no peer: --no-peer" in printed and "# vLLM not measured" in printed
    assert list(rows) == ["decode-r4", "decode-r1", "answers-e2"]


def test_beside_the_peer(measure, torch_peer):
    rows, _ = measure(sample.main)
    for case, peer in {"decode-r4": "transformers-generate", "decode-r1": "transformers-generate", "answers-e2": "peft-generate"}.items():
        assert rows[case]["peer"] == peer and rows[case]["check"] == "ok" and abs(rows[case]["regret"]) < 1e-4
    assert {"transformers-generate-r4", "transformers-generate-r1", "peft-generate"} < set(rows)


def test_other_tokens_are_noticed(torch_peer, monkeypatch, capsys, quick_compile):
    real = sample.decode
    monkeypatch.setattr(sample, "decode", lambda *args: [[(t + 1) % 512 for t in tokens] for tokens in real(*args)])
    with quick_compile():
        assert sample.main(["--tiny", "--repeats", "1", "--rows", "1", "--adapters", "0"]) == 1
    assert '"check": "failed"' in capsys.readouterr().out
