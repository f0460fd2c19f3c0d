import pytest

from trainers import progress
from trainers.progress import Reporter, duration


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3723, "1:02:03")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_lines_without_a_terminal(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    # A resumed run: 1,000 of 5,000 steps were done before, so the speed counts from there.
    with Reporter("training", 5_000, "steps", done=1_000) as reporter:
        for seconds, done in ((104.0, 2_000), (106.0, 2_500), (116.0, 5_000)):
            now[0] = seconds
            reporter.update(done, "return +0.5")
    # 1,000 steps in 4 s are 250/s, so the other 3,000 take 12 s; the update after 2 s more is not shown
    assert capsys.readouterr().out.splitlines() == [
        "training  2,000/5,000 steps  250/s  return +0.5  ETA 0:12",
        "training  5,000/5,000 steps  250/s  return +0.5  ETA 0:00",
    ]
