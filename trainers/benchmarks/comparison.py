"""Two reports of one suite: which of the ratios have become worse, and what else of them differs.

What is compared, and how it is measured, is the business of the suites.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.markup import escape
from rich.table import Table

from esper.runtime.errors import ConfigError
from trainers.benchmarks.ratios import HIGHER, LOWER, Ratio

MEASURED = ("seed", "benchmark", "runtime")
"""The parts of a report's configuration that say what was measured and how."""

_MACHINE = ("cpu", "device", "threads", "torch", "python")


# ---- reports ---------------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """What is compared of a report, and where it was found."""

    path: str
    suite: str
    machine: dict[str, Any]
    settings: dict[str, Any]  # dotted key -> value, of MEASURED
    ratios: dict[str, Ratio]


def read(key: str, given: str) -> Stored:
    """A report that `python -m trainers.benchmark` wrote.

    Args:
        key: of the configuration, for messages.
        given: the path.

    Raises:
        ConfigError: it cannot be read, is no such report, or has no ratios.
    """
    remedy = "give a report of python -m trainers.benchmark"
    try:
        content = json.loads(Path(given).read_text())
    except OSError as error:
        raise ConfigError(f"{key}={given}: {error.strerror}; {remedy}") from error
    except ValueError as error:  # no JSON, or no text
        raise ConfigError(f"{key}={given}: not JSON ({error}); {remedy}") from error
    kinds = {"suite": str, "machine": dict, "config": dict}
    for name, kind in kinds.items():
        if not isinstance(content, dict) or not isinstance(content.get(name), kind):
            raise ConfigError(f"{key}={given}: not a report of trainers.benchmark (it has no {name}); {remedy}")
    ratios = content.get("ratios")
    if not isinstance(ratios, dict) or not ratios:
        suite = content["suite"]
        raise ConfigError(f"{key}={given}: has no ratios to compare; measure again with suite={suite} out={given}")
    parsed = {name: _ratio(f"{key}={given}: ratios: {name}", value) for name, value in ratios.items()}
    return Stored(given, content["suite"], content["machine"], dict(settings(content["config"])), parsed)


def _ratio(where: str, given: Any) -> Ratio:
    def number(value: Any) -> bool:
        return isinstance(value, int | float) and math.isfinite(value) and value > 0

    known = isinstance(given, dict) and given.keys() == {"value", "low", "high", "better"}
    if not known or given["better"] not in (HIGHER, LOWER) or not number(given["value"]):
        raise ConfigError(f"{where}: not a ratio, but {json.dumps(given)}; measure the report again")
    if any(end is not None and not number(end) for end in (given["low"], given["high"])):
        raise ConfigError(f"{where}: no quartiles of a ratio in {json.dumps(given)}; measure the report again")
    return Ratio(**given)


def settings(config: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a configuration, as far as it says what is measured."""
    for part in MEASURED:
        value = config.get(part)
        if isinstance(value, Mapping):
            yield from ((f"{part}.{name}", each) for name, each in value.items())
        elif part in config:
            yield part, value


# ---- what has changed ------------------------------------------------------------------------------------------------


class Verdict(StrEnum):
    """What a change of a ratio is."""

    WORSE = "worse"
    BETTER = "better"
    NOISE = "within noise"  # beyond the tolerance, but the quartiles overlap
    SAME = "same"  # within the tolerance


class Change(NamedTuple):
    """Of one ratio."""

    name: str
    base: Ratio
    now: Ratio
    verdict: Verdict

    @property
    def relative(self) -> float:
        """0 where the ratio is what it was."""
        return self.now.value / self.base.value - 1

    def text(self) -> str:
        """On one line."""
        return f"{self.name}: {self.base.text()} -> {self.now.text()}, {100 * self.relative:+.0f} %"


def judge(base: Ratio, now: Ratio, tolerance: float) -> Verdict:
    """What has become of a ratio. Beyond `tolerance` (relative) it is better or worse where the quartiles of both lie
    apart; where those of one report are not known, its value alone has to lie outside the other's."""
    if abs(now.value - base.value) <= tolerance * base.value:
        return Verdict.SAME
    (base_low, base_high), (now_low, now_high) = base.interval, now.interval
    if now_low <= base_high and base_low <= now_high:
        return Verdict.NOISE
    return Verdict.BETTER if (now.value > base.value) == (base.better == HIGHER) else Verdict.WORSE


class Comparison(NamedTuple):
    """Of two reports of one suite."""

    base: Stored
    now: Stored
    tolerance: float
    changes: list[Change]
    gone: list[str]  # ratios that only the base has
    new: list[str]  # ratios that only the other has

    @property
    def worse(self) -> list[Change]:
        return [change for change in self.changes if change.verdict == Verdict.WORSE]

    def summary(self) -> str:
        """How many are worse, on one line."""
        count, beyond = len(self.changes), f"more than {100 * self.tolerance:g} % worse than in {self.base.path}"
        return f"{len(self.worse)} of {count} ratios {'is' if len(self.worse) == 1 else 'are'} {beyond}"

    def table(self) -> Table:
        """For the terminal."""
        title = escape(f"suite={self.base.suite}: {self.now.path} compared with {self.base.path}")
        table = Table("ratio", "better", title=title, box=box.SIMPLE_HEAD, title_justify="left")
        for column in ("base", "now", "change"):
            table.add_column(column, justify="right")
        table.add_column("verdict")
        styles = {Verdict.WORSE: "bold red", Verdict.BETTER: "green"}
        for change in self.changes:
            texts = change.base.text(), change.now.text(), f"{100 * change.relative:+.0f} %", change.verdict.value
            table.add_row(escape(change.name), change.base.better, *texts, style=styles.get(change.verdict))
        return table

    def notes(self) -> Iterator[str]:
        """Lines on what was not compared and on what else differs, then the ratios that are worse."""
        shared = {_case(change.name) for change in self.changes}
        for where, names in ((self.base, self.gone), (self.now, self.new)):
            if names:  # of cases that are only there, all ratios are meant
                named = dict.fromkeys(name if _case(name) in shared else _case(name) for name in names)
                yield f"only in {where.path}: {'; '.join(named)}"
        was, is_now = self.base.machine, self.now.machine
        machine = [f"{key} {was.get(key)} -> {is_now.get(key)}" for key in _MACHINE if was.get(key) != is_now.get(key)]
        # A base without a key is older than the key; what it does not say has not been changed.
        old, new = self.base.settings, self.now.settings
        changed = [f"{key} {old[key]} -> {new.get(key, 'gone')}" for key in old if old[key] != new.get(key, "gone")]
        for title, found in (("machines", machine), ("settings", changed)):
            if found:
                yield f"{title} differ: {', '.join(found)}"
        yield f"{self.summary()}{':' if self.worse else ''}"
        yield from (f"  {change.text()}" for change in self.worse)


def _case(name: str) -> str:
    return name.partition(": ")[0]


def compare(base: Stored, now: Stored, tolerance: float) -> Comparison:
    """Of reports of one suite.

    Raises:
        ConfigError: they are of different suites, or have no ratio in common.
    """
    if base.suite != now.suite:
        raise ConfigError(
            f"against={now.path}: a report of suite={now.suite}, but compare={base.path} is one of suite={base.suite}; "
            "give two of the same suite"
        )
    both = [name for name in base.ratios if name in now.ratios]
    if not both:
        cases = ["; ".join(dict.fromkeys(map(_case, each.ratios))) for each in (base, now)]
        raise ConfigError(
            f"compare={base.path}: no ratio in common; it has {cases[0]}, but {now.path} has {cases[1]}; "
            "measure both with the same settings"
        )
    changes = []
    for name in both:
        before, after = base.ratios[name], now.ratios[name]
        changes.append(Change(name, before, after, judge(before, after, tolerance)))
    gone, new = ([n for n in a.ratios if n not in b.ratios] for a, b in ((base, now), (now, base)))
    return Comparison(base, now, tolerance, changes, gone, new)
