import pytest

from trainers import progress
from trainers.progress import Reporter, announce, duration, pace


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3723, "1:02:03")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_lines_without_a_terminal(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    # A resumed run: 1,000 of 5,000 steps were done before, so the speed counts from there.
    with Reporter("training", 5_000, "steps", done=1_000) as reporter:
        for seconds, done in ((110.0, 2_000), (112.0, 2_500), (120.0, 5_000)):
            now[0] = seconds
            reporter.update(done, "return +0.5")
    # 1,000 steps in 10 s are 100/s, so the other 3,000 take 30 s; the update after 2 s more is not shown
    assert capsys.readouterr().out.splitlines() == [
        "training  1,000/5,000 steps",
        "training  2,000/5,000 steps  100/s  return +0.5  ETA 0:30",
        "training  5,000/5,000 steps  200/s  return +0.5  ETA 0:00",
    ]


def test_no_speed_and_no_end_before_anything_is_done(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Reporter("training", 10, "steps", done=4) as reporter:
        now[0] = 20.0
        reporter.update(5, "loss 1")
    assert capsys.readouterr().out.splitlines() == [
        "training  4/10 steps",
        "training  5/10 steps  20.0 s each  loss 1  ETA 1:40",
    ]


@pytest.mark.parametrize(
    ("rate", "text"),
    [(1234.5, "1,234/s"), (10, "10/s"), (2.34, "2.3/s"), (0.5, "2.0 s each"), (1e-3, "1,000.0 s each")],
)
def test_pace(rate, text):
    assert pace(rate) == text


@pytest.mark.parametrize(
    ("arguments", "out"), [(["env=digits"], "starting ...\n"), (["-m", "seed=1,2"], "starting ...\n"), (["--help"], "")]
)
def test_the_start_is_announced_unless_the_output_is_asked_for(arguments, out, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["esper", *arguments])
    announce()
    assert capsys.readouterr().out == out
