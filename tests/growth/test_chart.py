import io
import subprocess
import sys
from dataclasses import replace

import pytest
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex

from esper.growth import chart
from esper.growth.chart import COLOURS, Trace, lifecycle_chart
from esper.growth.lifecycle import Stage

NONE = (Stage.DORMANT, 0.0, None)
FIRST = [NONE, (Stage.TRAINING, 0.0, "mlp"), (Stage.BLENDING, 0.5, "mlp"), *2 * [(Stage.HOLDING, 1.0, "mlp")]]
SECOND = [(Stage.TRAINING, 0.0, "norm"), *3 * [(Stage.EMBARGOED, 0.0, None)], (Stage.TRAINING, 0.0, "norm")]


@pytest.fixture
def trace():
    stage, alpha, blueprint = ([[a[part], b[part]] for a, b in zip(FIRST, SECOND, strict=True)] for part in range(3))
    return Trace(stage, alpha, blueprint, [2.0, 1.5, float("inf"), 1.2, 1.0], [2.0, 1.8, 1.6, 1.5, 1.4])


def bars(axes):
    """(left, right, height, colour) of every stretch, by slot."""
    found = {}
    (drawn,) = (each for each in axes.collections if isinstance(each, PolyCollection))
    for path, colour in zip(drawn.get_paths(), drawn.get_facecolors(), strict=True):
        box = path.get_extents()
        found.setdefault(round(box.y1 - 0.45), []).append((box.x0, box.x1, round(box.height, 6), to_hex(colour)))
    return found


def test_rows_show_stage_and_alpha(trace):
    above, below = lifecycle_chart(trace, "title").axes
    found = bars(below)
    assert [(left, right) for left, right, *_ in found[0]] == [(0.5, 1.5), (1.5, 2.5), (2.5, 4.5)]
    assert [colour for *_, colour in found[0]] == [
        COLOURS[stage] for stage in (Stage.TRAINING, Stage.BLENDING, Stage.HOLDING)
    ]
    thin, half, full = (height for _, _, height, _ in found[0])
    assert (thin, full) == pytest.approx((chart._THIN, chart._TALL))
    assert half == pytest.approx((thin + full) / 2)
    assert [(left, right) for left, right, *_ in found[1]] == [(-0.5, 0.5), (0.5, 3.5), (3.5, 4.5)]
    # named where it is planted, and again when it is planted anew
    assert [(text.get_text(), text.get_position()[0]) for text in below.texts] == [
        ("mlp", 0.5),
        ("norm", -0.5),
        ("norm", 3.5),
    ]
    assert above.get_title() == "title"
    assert below.get_ylim()[0] > below.get_ylim()[1]  # the first slot is on top


def test_losses_have_gaps_where_they_are_not_finite(trace):
    above, _ = lifecycle_chart(trace).axes
    twin, host = above.lines
    assert [str(value) for value in host.get_ydata()] == ["2.0", "1.5", "nan", "1.2", "1.0"]
    assert list(twin.get_ydata()) == trace.twin_loss
    assert len(lifecycle_chart(replace(trace, twin_loss=None)).axes[0].lines) == 1


def test_moments_are_counted_from_the_first(trace):
    above, below = lifecycle_chart(replace(trace, first=1)).axes
    assert [list(line.get_xdata()) for line in above.lines] == [[1, 2, 3, 4, 5]] * 2
    assert [(left, right) for left, right, *_ in bars(below)[1]] == [(0.5, 1.5), (1.5, 4.5), (4.5, 5.5)]
    assert [text.get_position()[0] for text in below.texts] == [1.5, 0.5, 4.5]
    assert below.get_xlim() == pytest.approx((0.4, 5.6))


def test_names_of_slots(trace):
    labels = [label.get_text() for label in lifecycle_chart(trace).axes[1].get_yticklabels()]
    assert labels == ["0", "1"]
    named = replace(trace, slots=("stem", "body.0"))
    assert [label.get_text() for label in lifecycle_chart(named).axes[1].get_yticklabels()] == ["stem", "body.0"]


@pytest.mark.parametrize("moments", [1, 2])
def test_short_traces_can_be_drawn(moments, trace):
    short = Trace(*(part[:moments] for part in (trace.stage, trace.alpha, trace.blueprint, trace.host_loss)))
    file = io.BytesIO()
    lifecycle_chart(short).savefig(file)
    assert file.getvalue().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"host_loss": [], "stage": []}, "at least one moment and one slot"),
        ({"host_loss": [1.0]}, r"twin_loss has 5 moments, host_loss has 1"),
        ({"alpha": [[0.0, 0.0]]}, r"alpha must be \[5\]\[2\]"),
        ({"blueprint": [[None]] * 5}, r"blueprint must be \[5\]\[2\]"),
        ({"slots": ["one"]}, "slots has 1 names for 2 slots"),
    ],
)
def test_a_trace_that_does_not_fit_together_is_refused(change, message, trace):
    with pytest.raises(ValueError, match=message):
        lifecycle_chart(replace(trace, **change))


def test_nothing_global_is_touched_and_nothing_imported_before_it_is_needed():
    code = """
import sys
from esper.growth.chart import Trace, lifecycle_chart
assert "matplotlib" not in sys.modules
trace = Trace([[0]], [[0.0]], [[None]], [1.0])
import matplotlib
before = dict(dict.items(matplotlib.rcParams))  # rcParams' own items would choose a display
lifecycle_chart(trace)
assert dict(dict.items(matplotlib.rcParams)) == before
assert "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
