"""Who decides, what is refused and why, and what is told of it."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from esper.attention import AttentionSpec, Facts, Selection, attend, configure, listening, select, using
from esper.attention.selection import VARIABLE
from esper.runtime.errors import ConfigError

SPEC = AttentionSpec("dense", "cpu", torch.float32, heads=2, queries=8, keys=8, head_dim=16)
CPU = Facts("cpu")


def test_what_is_asked_nearer_to_the_call_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(backend: str | None = None) -> tuple[str, str]:
        selection = select(SPEC, backend, CPU)
        return selection.backend, selection.source

    assert chosen() == ("sdpa", "auto")
    monkeypatch.setenv(VARIABLE, "reference")
    assert chosen() == ("reference", "environment")
    configure("flex")
    assert chosen() == ("flex", "config")
    with using("reference"):
        assert chosen() == ("reference", "context")
        with using("sdpa"):
            assert chosen() == ("sdpa", "context")
        with using("auto"):  # leaves it to the next, which is the configuration
            assert chosen() == ("flex", "config")
        assert chosen("sdpa") == ("sdpa", "call")
        assert chosen("auto") == ("reference", "context")
    configure("auto")
    assert chosen() == ("reference", "environment")


@pytest.mark.parametrize(("alias", "backend"), [("legacy", "reference"), ("graph", "sdpa")])
def test_aliases(alias: str, backend: str) -> None:
    assert select(SPEC, alias, CPU).backend == backend


@pytest.mark.parametrize("source", ["backend", "attention.using", "runtime.attention", VARIABLE])
def test_an_unknown_name_is_refused_where_it_was_given(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask() -> None:
        if source == "runtime.attention":
            configure("fast")
        elif source == "attention.using":
            with using("fast"):
                pass
        else:
            monkeypatch.setenv(VARIABLE, "fast" if source == VARIABLE else "")
            select(SPEC, "fast" if source == "backend" else None, CPU)

    with pytest.raises(ConfigError) as error:
        ask()
    assert str(error.value) == (
        f"{source}=fast: choose one of auto, reference, sdpa, flex, segment, legacy (= reference), graph (= sdpa)"
    )


def test_what_cannot_be_computed_is_refused_with_reasons_and_what_can() -> None:
    with pytest.raises(ConfigError) as error, using("flex"):
        select(replace(SPEC, needs_grad=True), known=Facts("cpu", no_compiler="there is no C++ compiler"))
    assert str(error.value) == (
        "attention.using=flex: cannot compute attention of kind=dense, device=cpu, dtype=torch.float32, heads=2, "
        "queries=8, keys=8, head_dim=16, needs_grad=True: it must be compiled: there is no C++ compiler; it has no "
        "gradients on CPUs; choose one of auto, reference, sdpa"
    )
    with pytest.raises(ConfigError, match=r"segment: cannot compute.*edges of graphs only; choose one of auto, ref"):
        attend(*torch.randn(3, 1, 2, 8, 16), backend="segment")


@pytest.mark.parametrize(
    ("spec", "known", "rejected"),
    [
        (SPEC, CPU, {"segment"}),
        (replace(SPEC, needs_grad=True), CPU, {"flex", "segment"}),
        (replace(SPEC, queries=None), CPU, {"flex", "segment"}),
        (replace(SPEC, kind="graph", density=0.5), CPU, {"flex"}),
        (replace(SPEC, device="cuda"), Facts("cuda"), {"segment"}),
        (replace(SPEC, device="cuda", needs_grad=True), Facts("cuda"), {"segment"}),
        (replace(SPEC, device="cuda", head_dim=15), Facts("cuda"), {"flex", "segment"}),
        (replace(SPEC, device="cuda"), Facts("cuda", "no Triton"), {"flex", "segment"}),
    ],
    ids=[
        "cpu",
        "gradients on cpu",
        "traced on cpu",
        "graph",
        "cuda",
        "gradients on cuda",
        "narrow heads on cuda",
        "cuda, no Triton",
    ],
)
def test_who_refuses(spec: AttentionSpec, known: Facts, rejected: set[str]) -> None:
    assert set(select(spec, known=known).rejected) == rejected


@pytest.mark.parametrize(
    ("density", "needs_grad", "backend"),
    [(0.07, False, "segment"), (0.09, False, "sdpa"), (0.11, True, "segment"), (0.13, True, "sdpa")],
)
def test_sparse_graphs_are_lists_of_edges(density: float, needs_grad: bool, backend: str) -> None:
    spec = replace(SPEC, kind="graph", density=density, needs_grad=needs_grad, parallel_edges=True)
    assert select(spec, known=CPU).backend == backend


@pytest.mark.parametrize(
    ("changes", "backend"),
    [
        ({}, "reference"),
        ({"needs_grad": False}, "sdpa"),
        ({"mask": "additive"}, "sdpa"),
        ({"causal": True}, "sdpa"),
        ({"bias": False}, "sdpa"),
        ({"device": "cuda"}, "sdpa"),
    ],
    ids=str,
)
def test_a_bias_that_learns_is_left_to_the_reference_on_cpus(changes: dict[str, Any], backend: str) -> None:
    spec = replace(SPEC, **{"bias": True, "needs_grad": True, **changes})
    assert select(spec, known=Facts(spec.device)).backend == backend


def test_one_event_for_each_selection_and_each_new_call() -> None:
    events: list[object] = []
    with listening(events.append):
        selection = select(SPEC, known=CPU)
        assert events == [selection]
        assert selection == Selection(SPEC, "sdpa", "auto", {"segment": ("it follows the edges of graphs only",)})
        q = torch.randn(1, 2, 8, 16)
        for _ in range(3):
            attend(q, q, q)  # the same call is decided once
        assert [event.spec for event in events[1:] if isinstance(event, Selection)] == [SPEC]
        attend(q[:, :, :5], q, q)
        assert len(events) == 3
    attend(q[:, :, :4], q, q)
    assert len(events) == 3, "nobody listens any more"


def test_a_choice_is_followed_under_torch_compile() -> None:
    def twice(q: torch.Tensor) -> torch.Tensor:
        return 2 * attend(q, q, q, causal=True)

    events: list[object] = []
    q = torch.randn(2, 3, 8, 16)
    with listening(events.append), using("reference"):
        compiled = torch.compile(twice, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(q), twice(q))
        compiled(torch.randn(2, 3, 9, 16))
    assert {event.backend for event in events if isinstance(event, Selection)} == {"reference"}
