import pytest

from seal_jax import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands at `clock[0]`; the last plain line was written at 0."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress._Lines, "said", 100.0)
    return now


def test_plain_lines_come_every_ten_seconds_over_all_steps(clock, capsys):
    with progress.bar("fitting", 40, "tok") as bar:
        clock[0] = 105.0
        bar.update(10)
        assert capsys.readouterr().err == ""
        clock[0] = 110.0
        bar.update(10)
        assert capsys.readouterr().err == "fitting: 20/40 tok, 00:10 gone, 00:10 left\n"
        bar.update(10)
    clock[0] = 119.0
    with progress.bar("answering", 5, "seq") as bar:
        bar.update()
        assert capsys.readouterr().err == ""
        clock[0] = 121.0
        bar.update()
    # A step that begins long after the last line says so.
    clock[0] = 140.0
    with progress.bar("M-step", 123456, "tok"):
        pass
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["answering: 2/5 seq, 00:02 gone, 00:03 left", "M-step: 0.00/123k tok, 00:00 gone, ? left"]
