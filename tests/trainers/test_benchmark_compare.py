"""Reports that are compared: made by hand, of a suite that is slowed down, and those in scripts/results/benchmark."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from esper.growth.observation import Observer
from trainers import benchmark, benchmarks
from trainers.benchmarks import checkpoint, comparison, distributed, env, pooling, rows
from trainers.benchmarks.comparison import Verdict
from trainers.benchmarks.ratios import HIGHER, LOWER, Ratio
from trainers.benchmarks.rows import FLOOR, Row
from trainers.config import BenchmarkConfig

from .conftest import call

COMMITTED = sorted((Path(__file__).parents[2] / "scripts/results/benchmark").glob("*.json"))
QUICK = [
    "benchmark.hosts=2",
    "benchmark.hosts_one_by_one=1",
    "benchmark.large=[]",
    "benchmark.repeats=3",
    "benchmark.warmup=1",
    "benchmark.clock=cpu",
]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    return lambda *overrides: call(benchmark.main, overrides, monkeypatch, capsys)


@pytest.fixture
def mine(monkeypatch):
    """A suite that finds the ratio that is set."""
    benchmarks.get("env")  # imports them all, before they are copied
    monkeypatch.setattr(benchmarks, "SUITES", dict(benchmarks.SUITES))
    found = {"case: mine": Ratio(2.0)}
    benchmarks.suite("mine")(lambda config: benchmarks.Report({"ratios": found}, []))
    return found


def write(path: str, ratios: dict[str, Ratio], suite: str = "mine", **config: object) -> str:
    machine = {"cpu": "abacus", "device": "cpu", "threads": 1, "torch": "2", "python": "3"}
    content = {"suite": suite, "machine": machine, "config": {"suite": suite, **config}}
    Path(path).write_text(json.dumps({**content, "ratios": {name: asdict(ratio) for name, ratio in ratios.items()}}))
    return path


# ---- verdicts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "now", "verdict"),
    [
        (Ratio(2.0), Ratio(1.85), Verdict.SAME),
        (Ratio(2.0), Ratio(1.7), Verdict.WORSE),
        (Ratio(2.0), Ratio(2.3), Verdict.BETTER),
        (Ratio(2.0, better=LOWER), Ratio(1.7, better=LOWER), Verdict.BETTER),
        (Ratio(2.0, better=LOWER), Ratio(2.3, better=LOWER), Verdict.WORSE),
        (Ratio(2.0, 1.9, 2.1), Ratio(1.7, 1.6, 1.8), Verdict.WORSE),
        (Ratio(2.0, 1.7, 2.3), Ratio(1.7, 1.6, 1.8), Verdict.NOISE),
        (Ratio(2.0, 1.9, 2.1), Ratio(2.3, 2.0, 2.6), Verdict.NOISE),
        (Ratio(2.0), Ratio(1.7, 1.4, 2.0), Verdict.NOISE),
        (Ratio(2.0), Ratio(1.7, 1.4, 1.9), Verdict.WORSE),
        (Ratio(2.0, 1.6, 2.4), Ratio(1.7), Verdict.NOISE),
        (Ratio(2.0, 0.1, 9.0), Ratio(1.95), Verdict.SAME),
    ],
)
def test_worse_is_beyond_the_tolerance_and_apart(base, now, verdict):
    assert comparison.judge(base, now, 0.1) == verdict


def test_a_ratio_of_turns_is_their_median_and_quartiles():
    ratio = Ratio.of([1.0, 2.0, 3.0, 4.0, 5.0], LOWER)
    assert ratio == Ratio(3.0, 2.0, 4.0, LOWER)
    assert ratio.text() == "3 (2 - 4)"
    assert Ratio(3.0).text() == "3"
    assert Ratio(3.0).interval == (3.0, 3.0)
    assert Ratio(3.0, 3.5, 4.0).interval == (3.0, 4.0)


def test_ratios_of_rows_pair_the_turns():
    def row(variant: str, ms: list[float], floor: float | None = None) -> Row:
        return Row("s", "case", variant, 1.0, 1.0, 0.0, 7.0, floor, None, "pyg", ms)

    every = [row("pyg", [4.0, 8.0, 6.0], 9.0), row("fast", [2.0, 2.0, 2.0], 1.5), row("other", [4.0] * 3)]
    found = rows.ratios([*every, row(FLOOR, [1.0, 2.0, 1.0], 1.0)], rivals=["other"])
    assert found == {
        "case: fast, times as fast as pyg": Ratio(3.0, 2.5, 3.5, HIGHER),
        "case: fast, times the floor": Ratio(2.0, 1.5, 2.0, LOWER),
        "case: other, times as fast as pyg": Ratio(1.5, 1.25, 1.75, LOWER),
    }
    alone = Row("s", "case", "fast", 1.0, 1.0, 0.0, 7.0, reference="pyg")
    assert rows.ratios([alone]) == {"case: fast, times as fast as pyg": Ratio(7.0)}
    assert rows.ratios([Row("s", "case", "only", 1.0, 1.0, 0.0)]) == {}


# ---- two files -------------------------------------------------------------------------------------------------------


def test_two_files_are_compared_without_measuring(run):
    ratios = {"a: x": Ratio(2.0), "a: y": Ratio(3.0), "a: z": Ratio(0.5, better=LOWER)}
    base = write("base.json", {**ratios, "a: old": Ratio(1.0), "b: p": Ratio(1.0), "b: q": Ratio(1.0)}, seed=0)
    now = write("now.json", {**ratios, "a: x": Ratio(1.5), "a: z": Ratio(0.6), "a: fresh": Ratio(1.0)}, seed=3)
    content = json.loads(Path(now).read_text())
    Path(now).write_text(json.dumps({**content, "machine": {**content["machine"], "torch": "3"}}))
    result = run(f"compare={base}", f"against={now}")
    assert result.code == 0, result.err
    assert result.out.splitlines()[-7:] == [
        "only in base.json: a: old; b",
        "only in now.json: a: fresh",
        "machines differ: torch 2 -> 3",
        "settings differ: seed 0 -> 3",
        "2 of 3 ratios are more than 10 % worse than in base.json:",
        "  a: x: 2 -> 1.5, -25 %",
        "  a: z: 0.5 -> 0.6, +20 %",
    ]
    assert {path.name for path in Path().iterdir()} == {"base.json", "now.json"}


def test_the_table_tells_all_ratios_and_their_verdicts(run):
    before = {"a [x]": Ratio(2.0), "b": Ratio(2.0, 1.9, 2.1), "c": Ratio(2.0, 1.0, 3.0), "d": Ratio(2.0, better=LOWER)}
    after = {"a [x]": Ratio(2.1), "b": Ratio(1.5, 1.4, 1.6), "c": Ratio(1.5), "d": Ratio(1.5, better=LOWER)}
    result = run(f"compare={write('base.json', before)}", f"against={write('now.json', after)}")
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in result.out.splitlines()]
    assert [each for each in cells if each and each[0] in before] == [
        ["a [x]", "higher", "2", "2.1", "+5 %", "same"],
        ["b", "higher", "2 (1.9 - 2.1)", "1.5 (1.4 - 1.6)", "-25 %", "worse"],
        ["c", "higher", "2 (1 - 3)", "1.5", "-25 %", "within noise"],
        ["d", "lower", "2", "1.5", "-25 %", "better"],
    ]
    assert result.out.splitlines()[-2:] == [
        "1 of 4 ratios is more than 10 % worse than in base.json:",
        "  b: 2 (1.9 - 2.1) -> 1.5 (1.4 - 1.6), -25 %",
    ]


@pytest.mark.parametrize(
    ("overrides", "code", "error"),
    [
        ([], 0, ""),
        (["strict=true"], 3, "error: strict=true: 1 of 1 ratios is more than 10 % worse than in base.json: a\n"),
        (["strict=true", "tolerance=0.3"], 0, ""),
    ],
)
def test_exit_codes(run, overrides, code, error):
    base, now = write("base.json", {"a": Ratio(2.0)}), write("now.json", {"a": Ratio(1.5)})
    result = run(f"compare={base}", f"against={now}", *overrides)
    assert (result.code, result.err) == (code, error)


# ---- a suite is run again --------------------------------------------------------------------------------------------


def test_an_injected_slowdown_is_named(run, monkeypatch):
    assert run("suite=graph", *QUICK, "out=base.json").code == 0
    observe = Observer.__call__

    def slow(self: Observer) -> object:
        return [observe(self) for _ in range(50)][-1]

    monkeypatch.setattr(Observer, "__call__", slow)
    result = run("compare=base.json", "out=now.json")
    assert result.code == 0, result.err
    name = "building the observation of 2 hosts: observer, times as fast as pyg"
    assert "1 of 1 ratios is more than 10 % worse than in base.json:" in result.out.splitlines()
    assert result.out.splitlines()[-1].startswith(f"  {name}: ")
    strict = run("compare=base.json", "out=now.json", "strict=true")
    assert strict.code == 3
    assert strict.err.startswith("error: strict=true: 1 of 1 ratios")
    assert name in strict.err
    assert "suite=graph: now.json compared with base.json" in strict.out


def test_settings_are_those_of_the_report_but_for_the_command_line(run, mine):
    told = ["seed=7", "benchmark.hosts=9", "benchmark.clock=cpu", "runtime.threads=2", "runtime.precision=bf16"]
    assert run("suite=mine", *told, "out=base.json").code == 0
    result = run("compare=base.json", "benchmark.hosts=11", "runtime=cpu", "tolerance=0.2", "out=now.json")
    assert result.code == 0, result.err
    now = json.loads(Path("now.json").read_text())
    assert now["suite"] == "mine"
    assert (now["config"]["seed"], now["config"]["tolerance"]) == (7, 0.2)
    assert (now["config"]["benchmark"]["hosts"], now["config"]["benchmark"]["clock"]) == (11, "cpu")
    runtime = asdict(BenchmarkConfig().runtime)
    assert now["config"]["runtime"] == runtime
    assert "0 of 1 ratios are more than 20 % worse than in base.json" in result.out
    assert "benchmark.hosts 9 -> 11" in result.out


def test_a_report_may_be_older_than_some_settings_and_know_others(run, mine):
    base = write("base.json", {"case: mine": Ratio(2.0)}, benchmark={"repeats": 4, "colour": "red"}, seed=0)
    result = run(f"compare={base}", "suite=mine")
    assert result.code == 0, result.err
    assert "settings differ: benchmark.colour red -> gone" in result.out.splitlines()
    (path,) = Path("benchmarks/mine").glob("*.json")
    assert json.loads(path.read_text())["config"]["benchmark"]["repeats"] == 4


def test_what_is_measured_takes_the_place_of_the_base_only_afterwards(run, mine):
    write("base.json", {"case: mine": Ratio(4.0)})
    result = run("compare=base.json", "out=base.json")
    assert "  case: mine: 4 -> 2, -50 %" in result.out.splitlines()
    assert comparison.read("compare", "base.json").ratios == mine


# ---- bad input -------------------------------------------------------------------------------------------------------

GOOD = {"suite": "mine", "machine": {}, "config": {}}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "No such file or directory; give a report of python -m trainers.benchmark"),
        ("{", "not JSON (Expecting property name"),
        (b"\xff\xfe", "not JSON ('utf-8' codec"),
        ("[1]", "not a report of trainers.benchmark (it has no suite); give a report"),
        ({}, "not a report of trainers.benchmark (it has no suite); give a report"),
        ({"suite": "mine", "machine": {}}, "not a report of trainers.benchmark (it has no config)"),
        (GOOD, "has no ratios to compare; measure again with suite=mine out=base.json"),
        ({**GOOD, "ratios": {}}, "has no ratios to compare"),
        ({**GOOD, "ratios": {"a": 2.0}}, "ratios: a: not a ratio, but 2.0"),
        ({**GOOD, "ratios": {"a": {"value": 2.0}}}, "ratios: a: not a ratio, but {"),
        ({**GOOD, "ratios": {"a": asdict(Ratio(0.0))}}, "ratios: a: not a ratio, but {"),
        ({**GOOD, "ratios": {"a": asdict(Ratio(float("nan")))}}, "ratios: a: not a ratio, but {"),
        ({**GOOD, "ratios": {"a": asdict(Ratio(2.0, better="maybe"))}}, "ratios: a: not a ratio, but {"),
        ({**GOOD, "ratios": {"a": {**asdict(Ratio(2.0)), "low": "x"}}}, "ratios: a: no quartiles of a ratio in {"),
    ],
)
@pytest.mark.parametrize("key", ["compare", "against"])
def test_bad_files(run, mine, key, content, expected):
    if isinstance(content, bytes):
        Path("base.json").write_bytes(content)
    elif content is not None:
        Path("base.json").write_text(content if isinstance(content, str) else json.dumps(content))
    good = [] if key == "compare" else [f"compare={write('good.json', mine)}"]
    result = run(*good, f"{key}=base.json")
    assert result.code == 2
    assert result.err.startswith(f"error: {key}=base.json: {expected}"), result.err
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["compare=."], "compare=.: Is a directory; give a report"),
        (["against=base.json"], "against=base.json: needs compare=REPORT.json"),
        (["strict=true"], "strict=true: needs compare=REPORT.json"),
        (["compare=base.json", "tolerance=0"], "tolerance=0.0: must lie between 0 and 1"),
        (["compare=base.json", "suite=env"], "suite=env: compare=base.json is a report of suite=mine; leave suite out"),
        (
            ["compare=base.json", "against=other.json"],
            "against=other.json: a report of suite=env, but compare=base.json is one of suite=mine",
        ),
        (
            ["compare=base.json", "against=else.json"],
            "compare=base.json: no ratio in common; it has case, but else.json has b; measure both with the same",
        ),
        (["compare=odd.json"], "compare=odd.json: config: benchmark.hosts=many: no value of this key; override it"),
        (["compare=gone.json"], "suite=gone: no such suite; choose one of "),
        (["compare=old.json"], "compare=old.json: no ratio in common; it has a, but "),
    ],
)
def test_bad_input(run, mine, overrides, expected):
    write("base.json", mine)
    write("other.json", mine, suite="env")
    write("else.json", {"b: x": Ratio(1.0), "b: y": Ratio(1.0)})
    write("odd.json", mine, benchmark={"hosts": "many"})
    write("gone.json", mine, suite="gone")
    write("old.json", {"a": Ratio(1.0)})
    result = run(*overrides)
    assert result.code == 2
    assert result.err.startswith(f"error: {expected}"), result.err
    assert len(result.err.splitlines()) == 1


def test_a_suite_without_ratios_cannot_be_compared(run, mine):
    base = write("base.json", mine)
    mine.clear()
    result = run(f"compare={base}", "out=now.json")
    assert result.code == 2
    assert result.err.startswith("error: out=now.json: has no ratios to compare")


# ---- what is committed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_ratios_follow_from_what_was_measured(path):
    content = json.loads(path.read_text())
    if path.stem == "env":
        expected = env.ratios(content["results"], content["config"]["benchmark"]["hosts"])
    elif path.stem == "checkpoint":
        expected = checkpoint.ratios(content["results"])
    elif path.stem == "distributed":
        expected = distributed.ratios(content["rows"])
    else:
        rivals = pooling.RIVALS if path.stem == "pooling" else ()
        expected = rows.ratios([Row(**row) for row in content["rows"]], rivals)
    assert comparison.read("compare", str(path)).ratios == expected


def test_committed_reports_are_named_by_their_suites():
    benchmarks.get("env")
    assert COMMITTED
    assert all(path.stem == json.loads(path.read_text())["suite"] in benchmarks.SUITES for path in COMMITTED)
