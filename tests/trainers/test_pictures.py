"""Pictures of an evaluation, and the page they are shown on."""

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from esper.growth.chart import INK
from trainers import illustration, pictures
from trainers.page import TableOf, render
from trainers.pictures import Picture

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NAMES = ["lifecycle", "plantings", "attention"]


def heat(axes):
    """The values of a map."""
    (image,) = axes.images
    return np.asarray(image.get_array())


def test_plantings_are_means_of_each_kind():
    counts = torch.zeros(3, 2, 3, dtype=torch.int64)
    counts[0, 1, 2], counts[1, 1, 2], counts[2, 0, 0] = 1, 2, 4
    figure = pictures.plantings(counts, ["repair", "repair", "plain"], ["mlp", "norm", "glu"]).figure
    plain, repair = figure.axes[:2]
    assert plain.get_title() == "plain (n = 1)"
    assert repair.get_title() == "repair (n = 2)"
    assert heat(plain).tolist() == [[4, 0, 0], [0, 0, 0]]
    assert heat(repair).tolist() == [[0, 0, 0], [0, 0, 1.5]]
    assert [label.get_text() for label in repair.get_xticklabels()] == ["mlp", "norm", "glu"]
    assert plain.images[0].get_clim() == repair.images[0].get_clim() == (0, 4)


def test_nothing_planted_can_be_drawn():
    picture = pictures.plantings(torch.zeros(2, 2, 1, dtype=torch.int64), ["", ""], ["mlp"])
    assert picture.figure.axes[0].get_title() == "all (n = 2)"
    assert picture.png().startswith(b"\x89PNG")


def test_gaze_has_a_row_for_each_relation_and_a_gap_between_layers():
    focus = {
        ("slot", "informs", "global"): {2: torch.tensor([0.1, 0.2]), 3: torch.tensor([0.3, 0.4])},
        ("layer", "feeds", "layer"): {2: torch.tensor([0.5, 0.6])},
    }
    axes = pictures.gaze(focus).figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "slot → global (informs)",
        "layer → layer (feeds)",
    ]
    nan = np.nan
    expected = np.array([[0.1, 0.2, nan, 0.3, 0.4], [0.5, 0.6, nan, nan, nan]])
    np.testing.assert_allclose(np.ma.filled(heat(axes), nan), expected, rtol=1e-6)
    assert list(axes.get_xticks()) == [0, 1, 3, 4]


def test_the_dark_drawing_differs_in_its_ink_alone():
    light, dark = pictures.plantings(torch.ones(1, 2, 2, dtype=torch.int64), ["plain"], ["mlp", "norm"]).svg()
    assert INK in light
    assert INK not in dark
    assert dark.replace(pictures.DARK_INK, INK) == light
    assert "<text" not in light  # outlines, which need no font


@pytest.mark.parametrize(
    ("returns", "germinated", "chosen"),
    [
        ([0.0, 3.0, 1.0, 2.0], [0, 1, 1, 1], 3),  # the median of 1, 2, 3
        ([5.0, 3.0, 1.0, 2.0], [0, 1, 0, 1], 3),  # the lower one of two
        ([5.0, 3.0, 1.0], [0, 0, 0], 1),  # nothing was planted anywhere
        ([5.0], [2], 0),
    ],
)
def test_the_typical_episode(returns, germinated, chosen):
    assert illustration.typical(np.array(returns), np.array(germinated)) == chosen


class Reading(HTMLParser):
    """What of a page points somewhere, its text, and whether its elements are closed in order."""

    VOID = ("meta", "img", "source")

    def __init__(self, page):
        super().__init__()
        self.addresses, self.tags, self.text, self.open = [], [], "", []
        self.feed(page)
        assert not self.open, f"{self.open} not closed"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        given = dict(attributes)
        self.addresses += [given[name] for name in ("src", "srcset", "href", "data", "action") if name in given]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_page_escapes_what_it_shows():
    evil = '<script>alert("1")</script>'
    table = TableOf(evil, (evil, "b"), [(evil, "<b>")], mark=evil, note=evil)
    reading = Reading(render(evil, evil, evil, evil, [table], [Picture("x", evil, evil, Figure())]))
    assert not {"script", "b"} & set(reading.tags)
    assert reading.text.count(evil) == 11


@pytest.fixture
def page(run_train, run_evaluate):
    """The page of a small run, evaluated with one baseline."""
    run = run_train("ppo.total_steps=32").run_dir
    result = run_evaluate(f"checkpoint={run}", "baselines=[random]", "episodes=6")
    assert result.code == 0, result.err
    assert f"report: {run / 'eval/report.html'}" in result.out.replace("\n", "")
    return run / "eval/report.html"


def test_a_report_needs_nothing_else(page):
    text = page.read_text(encoding="utf-8")
    reading = Reading(text)
    assert "script" not in reading.tags
    assert "link" not in reading.tags
    assert len(reading.addresses) == 2 * len(NAMES)
    assert all(address.startswith("data:image/svg+xml;base64,") for address in reading.addresses)
    assert re.findall(r'<figure id="(\w+)">', text) == NAMES
    assert "url(" not in text
    assert "@import" not in text
    for address in reading.addresses:
        drawing = base64.b64decode(address.partition(",")[2]).decode()
        assert drawing.lstrip().startswith("<?xml")
        # what drawings name inside of themselves, and pixels of maps
        assert all(each.startswith(("#", "data:image/png")) for each in re.findall(r'href="([^"]*)"', drawing))
    scores = json.loads((page.parent / "report.json").read_text())["controllers"]
    for name, row in scores.items():
        assert f">{name}</td>" in text
        assert f"{row['iqm']:+.3f}" in reading.text
    assert "How to read it" in reading.text
    assert "prefers-color-scheme: dark" in text


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_shows_it(page, dark, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)} (Debian's package is chromium)")
    shot, width, height = tmp_path / "page.png", 1000, 2600
    subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            f"--window-size={width},{height}",
            f"--screenshot={shot}",
            page.as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    pixels = matplotlib.image.imread(shot)[..., :3]
    assert pixels.shape[:2] == (height, width)
    page_colour = pixels[2, 2]
    assert (page_colour.mean() < 0.2) == dark
    # the drawings are there: the green to yellow of their maps, and their ink against the page
    colourful = (pixels.max(2) - pixels.min(2)) > 0.4
    assert colourful.mean() > 0.003
    ink = np.abs(pixels - page_colour).max(2) > 0.6
    assert 0.01 < ink.mean() < 0.5
