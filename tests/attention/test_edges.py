"""Attention along edges, against PyG's GATConv and against itself by other backends."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch_geometric.nn import GATConv

from esper.attention import Edges, Selection, attend_edges, listening

BACKENDS = ["reference", "sdpa", "segment"]


def edges_of(graphs: int, sources: int, targets: int, count: int, parallel: bool, seed: int) -> Edges:
    generator = torch.Generator().manual_seed(seed)
    cells = graphs * sources * targets
    if parallel:
        cell = torch.randint(cells, (count,), generator=generator)
    else:
        cell = torch.randperm(cells, generator=generator)[:count]
    graph, rest = cell // (sources * targets), cell % (sources * targets)
    source, target = graph * sources + rest % sources, graph * targets + rest // sources
    edges = Edges.of(source, target, graphs, sources, targets)
    assert edges.parallel == (len(cell.unique()) < len(cell))
    return edges


def outputs(scores: Tensor, values: Tensor, edges: Edges, backend: str) -> tuple[Tensor, ...]:
    out = attend_edges(scores, values, edges, backend)
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return out, *torch.autograd.grad((out * weight).sum(), (scores, values))


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(0, 12), st.booleans(), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_all_backends_agree(graphs: int, sources: int, targets: int, count: int, parallel: bool, seed: int) -> None:
    edges = edges_of(graphs, sources, targets, count, parallel, seed)
    generator = torch.Generator().manual_seed(seed)
    scores = (3 * torch.randn(len(edges.source), 2, generator=generator)).requires_grad_()
    values = torch.randn(graphs * sources, 2, 3, generator=generator).requires_grad_()
    expected = outputs(scores, values, edges, "segment")
    for backend in ("reference", "sdpa"):
        torch.testing.assert_close(outputs(scores, values, edges, backend), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("parallel", [False, True])
def test_against_pyg(parallel: bool, backend: str) -> None:
    torch.manual_seed(0)
    nodes, heads, size = 7, 2, 5
    edges = edges_of(1, nodes, nodes, 20, parallel, 1)
    layer = GATConv((4, 4), size, heads, edge_dim=3, add_self_loops=False, bias=False)
    x, attr = torch.randn(nodes, 4), torch.randn(len(edges.source), 3)
    expected = layer((x, x), torch.stack([edges.source, edges.target]), attr)
    sent = layer.lin_src(x).view(nodes, heads, size)
    arriving = layer.lin_dst(x).view(nodes, heads, size)
    along = (layer.lin_edge(attr).view(-1, heads, size) * layer.att_edge).sum(2)
    by, to = (sent * layer.att_src).sum(2), (arriving * layer.att_dst).sum(2)
    scores = torch.nn.functional.leaky_relu(by[edges.source] + to[edges.target] + along, 0.2)
    out = attend_edges(scores, sent, edges, backend)
    torch.testing.assert_close(out.flatten(1), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_targets_without_edges_get_0(backend: str) -> None:
    values = torch.randn(3, 1, 2, requires_grad=True)
    edges = Edges(torch.tensor([0, 1]), torch.tensor([2, 2]), 1, 3, 4, False)
    scores = torch.zeros(2, 1, requires_grad=True)
    out, *gradients = outputs(scores, values, edges, backend)
    torch.testing.assert_close(out[2], values[:2].mean(0))
    assert not out[[0, 1, 3]].any()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(("count", "backend"), [(4, "segment"), (12, "sdpa")])
def test_density_decides(count: int, backend: str) -> None:
    edges, found = edges_of(2, 5, 10, count, False, 0), []
    assert edges.density == count / 100
    with listening(found.append):
        attend_edges(torch.zeros(count, 1), torch.zeros(10, 1, 3), edges)
    assert [event.backend for event in found if isinstance(event, Selection)] == [backend]
