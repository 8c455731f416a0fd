import numpy as np
import pytest

from benchmarks import fit


def test_our_side_alone(measure):
    rows, printed = measure(fit.main, "--no-peer")
    assert "# no peer: --no-peer" in printed
    assert list(rows) == ["fit-k2", "fit-k1", "fit-length-16"]
    for case in ("fit-k2", "fit-k1"):
        assert rows[case]["ratio"] is None and 0 <= rows[case]["padding"] < 1 and 0 < rows[case]["mfu"] < 1
    assert rows["fit-length-16"]["over_k1"] > 0


def test_beside_the_peer(measure, torch_peer, tmp_path):
    rows, _ = measure(fit.main, "--json", str(tmp_path / "lines"))
    assert {"peft-dynamic", "peft-padded-2048", "fit-best-vs-padded", "fit-k2", "fit-k1", "fit-length-16"} == set(rows)
    for case in ("fit-k2", "fit-k1"):
        assert rows[case]["peer"] == "peft-dynamic" and rows[case]["check"] == "ok" and rows[case]["loss_gap"] < 1e-5
    assert rows["fit-k2"]["fall"] > 0.1 and rows["fit-k2"]["fall_gap"] < 1e-3, "the check is of losses that fall"
    assert rows["fit-best-vs-padded"]["peer"] == "peft-padded-2048" and rows["fit-best-vs-padded"]["ratio"] > 1
    assert rows["peft-padded-2048"]["steps_timed"] == 1
    assert len((tmp_path / "lines").read_text().splitlines()) == len(rows)


def test_other_losses_are_noticed(torch_peer, monkeypatch, capsys, quick_compile):
    """A peer of other numbers fails the check and the run."""
    monkeypatch.setattr(fit, "loss_gap", lambda ours, theirs: real(ours, [1.01 * x for x in theirs]))
    with quick_compile():
        assert fit.main(["--tiny", "--repeats", "1", "--k", "1", "--sweep", "none", "--padded-steps", "0"]) == 1
    captured = capsys.readouterr()
    assert '"check": "failed"' in captured.out and "fit-k1" in captured.err


real = fit.loss_gap


def test_loss_gap_is_the_worst_edit():
    ours, theirs = [np.array([1.0, 2.0]), np.array([4.0])], [np.array([1.0, 2.0]), np.array([5.0])]
    assert fit.loss_gap(ours, theirs) == pytest.approx(0.2)
