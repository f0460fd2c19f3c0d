"""The report of the study: its statistics against hand arithmetic, its verdicts, and that it is reproducible."""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from envs.contexts import KINDS

pytest.importorskip("matplotlib")
SCRIPTS = Path(__file__).parents[2] / "scripts"
PLAIN, REPAIR, SEQUENTIAL = (KINDS.index(name) for name in ("plain", "repair", "sequential"))


def load(name: str) -> Any:
    """A script, which finds its siblings as it does when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def statistics() -> Any:
    return load("study_statistics")


@pytest.fixture(scope="module")
def bars() -> Any:
    return load("study_bars")


@pytest.fixture(scope="module")
def plots() -> Any:
    return load("study_plots")


@pytest.fixture(scope="module")
def report() -> Any:
    return load("study_report")


def scores(
    points: dict[str, list[float]], kind: list[int], name: str = "digits/mixture", role: str = "training"
) -> dict[str, Any]:
    """What scripts/study.py writes of one set."""
    accounts: dict[str, float | None] = {
        "return": 0.1,
        "params_ratio": 1.2,
        "flops_ratio": 0.1,
        "germinated": 1.0,
        "culled": 0.25,
    }
    accounts |= {"waited": 0.9, "waited_noisy": None, "knobs": None}
    return {
        "set": name,
        "role": role,
        "label": "held-out instances",
        "split": "heldout",
        "seed": 0,
        "instances": len(kind),
        "kind": kind,
        "label_noise": [0.0] * len(kind),
        "controllers": {name: {"points": values, **accounts} for name, values in points.items()},
    }


def played(statistics: Any, points: dict[str, list[float]], kind: int = SEQUENTIAL, **names: str) -> Any:
    """A set of one kind of context."""
    return statistics.read_set(scores(points, [kind] * max(len(values) for values in points.values()), **names))


def drawn(seed: int, count: int, mean: float = 0.0) -> list[float]:
    return list(np.random.default_rng(seed).normal(mean, 3.0, count))


def verdicts(bars: Any, *found: Any) -> dict[tuple[str, str], str]:
    lines = (bar.row() for bar in bars.bars(list(found), {}))
    return {(row[0], row[1].split(",")[0]): row[4] for row in lines}


def test_points_are_the_iqm_over_seeds_of_the_mean_over_instances(statistics: Any) -> None:
    # Means 1, 2, 4, 6 and 100: a fifth of a run's weight is not cut in two, so one run goes at each end.
    means = [4.0, 100.0, 1.0, 6.0, 2.0]
    one = played(statistics, {f"tamiyo/{i}": [mean - 2, mean - 1, mean + 3] for i, mean in enumerate(means)})
    assert statistics.points(one, "tamiyo").value == pytest.approx((2 + 4 + 6) / 3)


@pytest.mark.parametrize("runs", [1, 2, 3, 4, 5, 8, 11])
def test_iqm_is_the_trimmed_mean(statistics: Any, runs: int) -> None:
    values = np.random.default_rng(runs).normal(size=(7, runs))
    np.testing.assert_allclose(statistics.iqm(values), stats.trim_mean(values, 0.25, axis=-1), rtol=1e-12)
    np.testing.assert_allclose(statistics.iqm(values, axis=0), stats.trim_mean(values, 0.25, axis=0), rtol=1e-12)


def test_normalised_gain_is_computed_on_the_instances_of_the_ceiling(statistics: Any) -> None:
    mine = {"tamiyo/1": [3.0, 6.0, 90.0], "tamiyo/2": [4.0, 7.0, 90.0], "oracle": [1.0, 1.0]}
    one = played(statistics, {**mine, "lookahead": [6.0, 14.0]})
    assert statistics.normalised_gain(one, "tamiyo").value == pytest.approx((9 / 20 + 11 / 20) / 2)
    assert statistics.normalised_gain(one, "lookahead").interval == (1.0, 1.0)
    one = played(statistics, {**mine, "lookahead": [6.0, 14.0]}, REPAIR)
    assert statistics.normalised_gain(one, "tamiyo").value == pytest.approx((9 / 2 + 11 / 2) / 2)


def test_no_normalised_gain_without_a_ceiling_clear_of_never(statistics: Any) -> None:
    assert statistics.normalised_gain(played(statistics, {"tamiyo/1": [1.0, 2.0]}), "tamiyo") is None
    noise = played(statistics, {"tamiyo/1": [1.0, 2.0, 3.0, 4.0], "lookahead": [-3.0, 3.0, -2.0, 3.0]})
    assert statistics.normalised_gain(noise, "tamiyo") is None


def test_interval_of_a_constant_paired_difference_collapses(statistics: Any) -> None:
    base = drawn(0, 40)
    one = played(statistics, {"tamiyo/1": [value + 2.5 for value in base], "linear": base})
    gap = statistics.difference(one, "tamiyo", "linear")
    assert gap.interval == pytest.approx((2.5, 2.5))
    low, high = statistics.points(one, "linear").interval
    assert high - low > 0.5


def test_interval_agrees_with_the_normal_approximation(statistics: Any) -> None:
    values = drawn(3, 400)
    low, high = statistics.points(played(statistics, {"linear": values}), "linear").interval
    error = np.std(values) / np.sqrt(len(values))
    assert (low, high) == pytest.approx(
        (np.mean(values) - 1.96 * error, np.mean(values) + 1.96 * error), abs=0.1 * error
    )


def test_interval_counts_the_spread_of_runs(statistics: Any) -> None:
    one = played(statistics, {f"tamiyo/{i}": [float(i)] * 10 for i in range(5)} | {"linear": [2.0] * 10})
    low, high = statistics.points(one, "tamiyo").interval
    assert low < 1.5 < 2.5 < high
    assert statistics.points(one, "linear").interval == pytest.approx((2.0, 2.0))


def test_instances_are_resampled_within_their_kind(statistics: Any) -> None:
    kind = np.array([PLAIN] * 3 + [REPAIR] * 5 + [PLAIN])
    weights = statistics.instance_weights(kind)
    np.testing.assert_allclose(weights[:, kind == PLAIN].sum(axis=1), 4 / 9)
    np.testing.assert_allclose(weights[:, kind == REPAIR].sum(axis=1), 5 / 9)
    assert weights[:, 0].std() > 0
    # A difference between kinds is no uncertainty.
    data = scores({"linear": [0.0] * 3 + [9.0] * 5 + [0.0]}, list(map(int, kind)))
    assert statistics.points(statistics.read_set(data), "linear").interval == pytest.approx((5.0, 5.0))


def test_probability_of_improvement_counts_ties_half(statistics: Any) -> None:
    one = played(statistics, {"tamiyo/1": [1.0, 2.0, 3.0, 0.0], "tamiyo/2": [1.0, 1.0, 1.0, 1.0], "linear": [1.0] * 4})
    # Run 1: tie, win, win, loss; run 2: four ties.
    assert statistics.improvement_by_instance(one, "tamiyo", "linear").value == pytest.approx((2.5 / 4 + 2 / 4) / 2)
    assert statistics.improvement_by_instance(one, "linear", "tamiyo").value == pytest.approx((1.5 / 4 + 2 / 4) / 2)


def test_probability_of_improvement_over_runs_and_kinds(statistics: Any) -> None:
    repair = played(
        statistics, {"tamiyo/1": [3.0, 3.0], "tamiyo/2": [1.0, 0.0], "linear": [1.0, 1.0]}, REPAIR, name="x/repair"
    )
    plain = played(
        statistics, {"tamiyo/1": [1.0, 1.0], "tamiyo/2": [1.0, 2.0], "linear": [1.0, 1.0]}, PLAIN, name="x/plain"
    )
    found = statistics.improvement_by_run(statistics.tasks([repair, plain]), "tamiyo", "linear")
    # On repair one run is above and one below; on plain one ties and one is above.
    assert found.value == pytest.approx((1 / 2 + 3 / 4) / 2)
    assert found.interval[0] < 0.6 < found.interval[1]


def test_kinds_come_from_the_mixture_where_no_set_has_them_alone(statistics: Any) -> None:
    repair = played(statistics, {"never": [0.0, 0.0]}, REPAIR, name="x/repair")
    mixture = statistics.read_set(scores({"never": [0.0] * 4}, [PLAIN, REPAIR, SEQUENTIAL, PLAIN], "x/mixture"))
    other = played(statistics, {"never": [0.0]}, PLAIN, name="y/plain", role="generalisation")
    found = [(name, one.name, list(where)) for name, one, where in statistics.tasks([repair, mixture, other])]
    plain, sequential = ("x/plain in mixture", "x/mixture", [0, 3]), ("x/sequential in mixture", "x/mixture", [2])
    assert found == [("x/repair", "x/repair", [0, 1]), plain, sequential]


def test_harmful_is_more_than_a_point_below_never(statistics: Any) -> None:
    one = played(statistics, {"tamiyo/1": [-1.0, -1.1, 5.0, -7.0], "tamiyo/2": [0.0, -2.0, 0.0, 0.0]})
    assert statistics.harmful(one, "tamiyo") == pytest.approx(3 / 8)


def test_failed_runs_are_named(statistics: Any) -> None:
    points = {"tamiyo/1": [3.0, 3.0], "tamiyo/2": [0.0, 1.0], "tamiyo/3": [2.0, 2.0], "linear": [2.0, 2.0]}
    seeds, count = statistics.failed(played(statistics, points), "linear")
    assert seeds == ["2"]
    assert count.value == 1


def test_never_is_right_where_the_ceiling_gains_nothing(statistics: Any, bars: Any) -> None:
    kind = [PLAIN, REPAIR, REPAIR, PLAIN]
    points = {"tamiyo/1": [-0.2, -0.6, 4.0, 5.0]}
    one = statistics.read_set(scores({**points, "lookahead": [0.0, -2.0, 3.0]}, kind))
    assert list(statistics.never_right(one)) == [0, 1]
    assert bars.loss_bar(one).figure.startswith("+0.40 ")
    assert list(statistics.never_right(statistics.read_set(scores(points, kind)))) == [0, 3]


def test_pareto_front(plots: Any) -> None:
    found = [(1.2, 5.0), (1.0, 0.0), (1.3, 4.0), (1.2, 6.0), (1.1, -1.0), (1.5, 6.5)]
    assert plots.front(found) == [(1.0, 0.0), (1.2, 6.0), (1.5, 6.5)]


def test_performance_profile(statistics: Any, plots: Any) -> None:
    one = played(statistics, {"tamiyo/1": [0.0, 1.0, 2.0, 3.0], "tamiyo/2": [2.0, 2.0, 2.0, 2.0]})
    share, low, high = plots.profile(one, "tamiyo", np.arange(4), np.array([-1.0, 1.0, 2.0, 9.0]))
    np.testing.assert_allclose(share, [1, 3 / 4, 1 / 8, 0])
    assert np.all(low <= share)
    assert np.all(share <= high)


def test_learning_curves_share_the_steps_that_every_run_reached(plots: Any) -> None:
    runs = [{"curve": [[0, 0.0], [10, 10.0], [20, 20.0]]}, {"curve": [[0, 1.0], [5, 1.0], [15, 3.0]]}, {"curve": []}]
    steps, values = plots.on_one_axis(runs)
    np.testing.assert_allclose(steps, [0, 10])
    np.testing.assert_allclose(values, [[0, 10], [1, 2]])


def study(statistics: Any, level: float) -> list[Any]:
    """Sets on which Tamiyo has `level` of the ceiling on every instance, and the baselines 0.7 of it."""
    found: list[Any] = []
    for context in ("mixture", "repair", "sequential", "shift"):
        kind = [place % 5 if context == "mixture" else KINDS.index(context) for place in range(60)]
        best = [abs(value) + 5 for value in drawn(len(found), 60)]
        points = {f"tamiyo/{seed}": [level * value for value in best] for seed in range(3)}
        points |= {name: [0.7 * value for value in best] for name in ("statistic", "linear")}
        points |= {"never": [0.0] * 60, "oracle": best[:40], "lookahead": best[:40]}
        found.append(statistics.read_set(scores(points, kind, f"digits/{context}")))
    return found


def test_bars_that_are_met(statistics: Any, bars: Any) -> None:
    found = verdicts(bars, *study(statistics, 0.95))
    assert found.pop(("training cost", "")) == "not measured"
    assert set(found.values()) == {"met"}
    assert len(found) == 3 + 3 * 2 + 1 + 1


def test_bars_that_are_not_met(statistics: Any, bars: Any) -> None:
    found = verdicts(bars, *study(statistics, 0.65))
    assert found.pop(("training cost", "")) == "not measured"
    assert set(found.values()) == {"not met"}


@pytest.mark.parametrize(
    ("cost", "figure", "verdict"),
    [
        ({"processes": 2, "wall_s": 3600}, "60 minutes with two processes", "met"),
        ({"processes": 2, "wall_s": 3661}, "61 minutes with two processes", "not met"),
        ({"processes": 4, "wall_s": 60}, "", "not measured"),
    ],
)
def test_cost_of_training_is_judged(bars: Any, cost: dict[str, int], figure: str, verdict: str) -> None:
    row = bars.cost_bar(cost).row()
    assert (row[2], row[4]) == (figure, verdict)


def test_bars_judge_each_for_itself(statistics: Any, bars: Any) -> None:
    # As good as the baselines: ties are neither above nor below.
    found = verdicts(bars, *study(statistics, 0.7))
    assert found["Tamiyo minus `statistic`", "digits/repair"] == "not met"
    assert found["Tamiyo minus `linear`", "digits/repair"] == "met"
    assert found["failed runs: mean below that of the best baseline", "digits/mixture"] == "met"
    assert found["probability of improvement, runs", "kinds of context"] == "not met"
    # 0.89 of the ceiling is enough on repair, not elsewhere.
    found = verdicts(bars, *study(statistics, 0.89))
    gains = [found["normalised gain", f"digits/{name}"] for name in ("repair", "sequential", "shift", "mixture")]
    assert gains == ["met", "not met", "not met", "not met"]


def test_loss_where_never_is_right_is_judged(statistics: Any, bars: Any) -> None:
    mild = played(statistics, {"tamiyo/1": [-0.3, 4.0], "lookahead": [0.0, 5.0]}, name="digits/shift")
    grave = played(statistics, {"tamiyo/1": [-0.4, 4.0], "lookahead": [-0.2, 5.0]}, name="digits/growth")
    assert bars.loss_bar(mild).met is True
    assert bars.loss_bar(grave).figure == "+0.40 [+0.40, +0.40], `lookahead` itself +0.20 [+0.20, +0.20]"
    assert bars.loss_bar(grave).met is False


def test_what_is_missing_is_not_judged(statistics: Any, bars: Any) -> None:
    assert set(verdicts(bars).values()) == {"not measured"}
    # No ceiling, one run, no baseline but never.
    one = played(statistics, {"tamiyo/4": [1.0, 2.0], "never": [0.0, 0.0]}, name="digits/sequential")
    found = verdicts(bars, one)
    assert found["normalised gain", "digits/sequential"] == "not measured"
    assert found["points, against the baseline whose interval ends highest", "digits/sequential"] == "met"
    assert found["probability of improvement, runs", "kinds of context"] == "met"


def test_generalisation_names_the_best_baseline_of_each_set(statistics: Any, report: Any) -> None:
    first = played(
        statistics, {"tamiyo/1": [5.0, 5.0], "linear": [4.0, 4.0], "never": [0.0, 0.0]}, name="a", role="generalisation"
    )
    second = played(
        statistics,
        {"tamiyo/1": [-2.0, -1.0], "linear": [-3.0, -2.0], "never": [0.0, 0.0]},
        name="b",
        role="generalisation",
    )
    rows = [line.split(" | ") for line in report.generalisation([first, second])[2:4]]
    assert rows[0][4:6] == ["linear +4.0 [+4.0, +4.0]", "+1.0 [+1.0, +1.0]"]
    assert rows[1][4] == "never +0.0 [+0.0, +0.0]"
    assert rows[1][5].startswith("-1.5 ")


@pytest.mark.parametrize("reference", ["short", "tamiyo"])
def test_variants_are_compared_with_one_of_them(statistics: Any, report: Any, reference: str) -> None:
    points = {f"{reference}/1": [1.0, 3.0], f"{reference}/2": [2.0, 4.0], "pooled/1": [4.0, 5.0], "never": [0.0, 0.0]}
    lines = report.variants([played(statistics, points)], reference)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert [row[:2] for row in rows[2:]] == [[reference, "2"], ["pooled", "1"]]
    assert rows[2][3] == ""
    assert rows[3][3].startswith("+2.0")  # 4.5 against 2.5
    assert report.variants([played(statistics, {"pooled/1": [4.0, 5.0]})], reference) == []


def test_rounds_of_tuning(report: Any) -> None:
    assert report.tuned({"rounds": [[256, None], [1024, 6]]}).endswith("knobs: 256 for all, 1,024 for the best 6.")
    assert report.tuned({}) == ""


def test_scores_that_are_not_numbers_are_refused(statistics: Any) -> None:
    with pytest.raises(ValueError, match="linear needs a finite score"):
        played(statistics, {"linear": [1.0, float("nan")]})
    with pytest.raises(ValueError, match="linear needs a finite score"):
        statistics.read_set(scores({"linear": [1.0, 2.0]}, [PLAIN]))


def write(folder: Path, **partial: bool) -> None:
    """A small study: a mixture, a kind, and a set to generalise to."""
    folder.mkdir()
    kind = [place % 5 for place in range(30)]
    points = {"never": [0.0] * 30, "linear": drawn(1, 30, 2.0), "statistic": drawn(2, 30, 1.0)}
    points |= {f"tamiyo/{seed}": drawn(10 + seed, 30, 3.0) for seed in (1, 2, 3)} | {"no_edges/1": drawn(20, 30, 2.0)}
    if not partial.get("no_ceiling"):
        points["lookahead"] = drawn(30, 20, 5.0)
    if partial.get("no_tamiyo"):
        points = {name: values for name, values in points.items() if "/" not in name}
    files = [scores(points, kind), scores(points, [SEQUENTIAL] * 30, "digits/sequential")]
    files.append(scores(points, kind, "segment/mixture", "generalisation"))
    for data in files:
        (folder / f"scores-{data['set'].replace('/', '-')}.json").write_text(json.dumps(data))
    if partial.get("no_training"):
        return
    run = {"command": "python -m trainers.train", "wall_s": 360.0, "steps": 64000, "parameters": 1000}
    runs = {name: {**run, "curve": [[0, 0.0], [64000, 2.0]]} for name in ("tamiyo/1", "tamiyo/2", "no_edges/1")}
    (folder / "training.json").write_text(json.dumps({"runs": runs}))
    knobs = {"linear": {"threshold": 1.0}}
    tuning = {
        "rounds": [[256, None]],
        "grid": {"linear": [{"threshold": 0.0}, knobs["linear"]]},
        "chosen": knobs,
        "scores": {},
    }
    (folder / "tuning.json").write_text(json.dumps(tuning))


def make(report: Any, results: Path, page: Path) -> dict[str, bytes]:
    """Every file that the report writes."""
    page.parent.mkdir(exist_ok=True)
    if not page.exists():
        page.write_text(f"before\n{report.BEGIN}\nstale\n{report.END}\nafter\n")
    report.main(results, page)
    return {path.name: path.read_bytes() for path in page.parent.iterdir()}


@pytest.mark.slow
def test_report_is_the_same_to_the_byte(statistics: Any, plots: Any, report: Any, tmp_path: Path) -> None:
    write(tmp_path / "study")
    first = make(report, tmp_path / "study", tmp_path / "a" / "results.md")
    statistics._run_means.cache_clear()
    statistics._instance_weights.cache_clear()
    second = make(report, tmp_path / "study", tmp_path / "b" / "results.md")
    assert first == second
    assert set(first) == {"results.md", *plots.CAPTIONS}
    text = first["results.md"].decode()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "stale" not in text
    assert all(f"({name})" in text for name in plots.CAPTIONS)
    assert "| linear | 2 | threshold 1.0 |" in text
    assert "| x1.20 | 10 % |" in text  # size, extra FLOPs
    assert "nan" not in text


@pytest.mark.slow
@pytest.mark.parametrize("lacking", ["no_ceiling", "no_tamiyo", "no_training"])
def test_report_of_part_of_a_study(report: Any, tmp_path: Path, lacking: str) -> None:
    write(tmp_path / "study", **{lacking: True})
    text = make(report, tmp_path / "study", tmp_path / "docs" / "results.md")["results.md"].decode()
    assert "### digits/mixture" in text
    assert "nan" not in text


def test_report_without_results(report: Any, tmp_path: Path) -> None:
    files = make(report, tmp_path / "nowhere", tmp_path / "docs" / "results.md")
    assert list(files) == ["results.md"]
    assert "No results are here yet." in files["results.md"].decode()


def test_the_page_has_the_markers(report: Any) -> None:
    text = report.PAGE.read_text()
    again = report.between(text, ["", "new", ""])
    assert report.between(again, ["", "newer", ""]) == report.between(text, ["", "newer", ""])
    assert text.count(report.BEGIN) == 1
    assert text.index(report.BEGIN) < text.index(report.END)
