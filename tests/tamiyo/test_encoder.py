"""The encoder against slow loops over edges, and the symmetries that its output must have."""

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper import attention
from esper.graph import Edges, GraphBatch
from esper.graph.schema import GraphSchema
from esper.runtime.errors import ConfigError
from esper.tamiyo import encoders
from esper.tamiyo.encoder import Encoder, masked_mean, orthogonal_
from esper.tamiyo.encoders import native
from esper.tamiyo.encoders.pyg import PyGEncoder, parameters

NODES = {"global": ("u", "v"), "slot": ("p", "q", "r"), "layer": ("w",)}
RELATIONS = {
    ("slot", "near", "slot"): ("d", "e"),
    ("layer", "hosts", "slot"): ("f",),
    ("slot", "reads", "layer"): ("g", "h", "i"),
    ("global", "writes", "slot"): ("presence",),
    ("global", "writes", "layer"): ("presence",),
    ("slot", "informs", "global"): ("presence",),
    ("layer", "informs", "global"): ("presence",),
}
SMALL = GraphSchema(NODES, RELATIONS)
SIZES = {"global": 1, "slot": 4, "layer": 3}
HIDDEN, HEADS = [4, 6, 8, 8], 2
READ = ("global", "slot")
KINDS = [["sage"] * 4, ["gat"] * 4, ["gat", "sage", "gat", "sage"]]  # of layers, besides the default


@pytest.fixture(params=["pyg", "dense", "segment", "native"])
def encoder(request: pytest.FixtureRequest, randomise: Callable[..., Any]) -> Encoder:
    return randomise(Encoder(SMALL, HIDDEN, HEADS, READ, request.param), scale=0.6)


def as_pyg(encoder: Encoder) -> PyGEncoder:
    """Plain PyG modules with copies of the encoder's parameters."""
    plain = PyGEncoder(encoder.shape)
    plain.load_state_dict({name: value.detach().clone() for name, value in parameters(encoder).items()})
    return plain


@pytest.fixture
def graph(random_graph: Callable[..., GraphBatch]) -> GraphBatch:
    """Three graphs; at density 0.4 some nodes have no incoming edge and some have several."""
    return random_graph(3, SIZES, 0.4, seed=3, schema=SMALL)


# ---- the slow reference ----------------------------------------------------------------------------------------------


def incoming(graph: GraphBatch, b: int, relation: tuple[str, str, str], target: int) -> list[tuple[int, Tensor]]:
    """(source, attributes) of the edges into one node of graph b."""
    edges = graph.edges[relation]
    return [
        (int(edges.source[b, e]), edges.attr[b, e])
        for e in range(edges.source.shape[1])
        if edges.mask[b, e] and int(edges.target[b, e]) == target
    ]


def sage(conv: nn.Module, h: dict[str, Tensor], graph: GraphBatch, b: int, relation: tuple[str, str, str]) -> Tensor:
    """Mean of the neighbours through one weight, the node itself through another (arXiv 1706.02216)."""
    rows = []
    for target in range(len(h[relation[2]])):
        neighbours = [h[relation[0]][source] for source, _ in incoming(graph, b, relation, target)]
        mean = sum(neighbours) / len(neighbours) if neighbours else torch.zeros(conv.lin_l.weight.shape[1])
        rows.append(conv.lin_l.weight @ mean + conv.lin_l.bias + conv.lin_r.weight @ h[relation[2]][target])
    return torch.stack(rows)


def gat(conv: nn.Module, h: dict[str, Tensor], graph: GraphBatch, b: int, relation: tuple[str, str, str]) -> Tensor:
    """Attention over incoming edges: softmax of LeakyReLU(0.2) of source, target and edge terms (arXiv 1710.10903)."""
    width = conv.att_src.shape[2]
    rows = []
    for target in range(len(h[relation[2]])):
        edges = incoming(graph, b, relation, target)
        row = []
        for head in range(HEADS):
            part = slice(head * width, (head + 1) * width)
            keys = [(conv.lin_src.weight @ h[relation[0]][source])[part] for source, _ in edges]
            own = conv.att_dst[0, head] @ (conv.lin_dst.weight @ h[relation[2]][target])[part]
            scores = []
            for key, (_, attr) in zip(keys, edges, strict=True):
                score = conv.att_src[0, head] @ key + own + conv.att_edge[0, head] @ (conv.lin_edge.weight @ attr)[part]
                scores.append(score if score > 0 else 0.2 * score)
            total = sum(math.exp(score) for score in scores)
            row.append(sum((math.exp(s) / total * k for s, k in zip(scores, keys, strict=True)), torch.zeros(width)))
        rows.append(torch.cat(row) + conv.bias)
    return torch.stack(rows)


def layer_reference(encoder: Encoder, depth: int, h: dict[str, Tensor], graph: GraphBatch, b: int) -> dict[str, Tensor]:
    """HeteroConv: the mean over the relations that end in a node type."""
    kind = {"sage": sage, "gat": gat}[encoder.shape.convolutions[depth]]
    out: dict[str, list[Tensor]] = {}
    for relation in RELATIONS:
        if depth == 3 and relation[2] not in READ:
            continue
        conv = as_pyg(encoder).layers[depth].convs[relation]
        out.setdefault(relation[2], []).append(kind(conv, h, graph, b, relation))
    return {node: sum(values) / len(values) for node, values in out.items()}


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def reference(encoder: Encoder, graph: GraphBatch, b: int) -> dict[str, Tensor]:
    """The whole encoder on graph b, from the definition: inputs, then out + skip four times."""
    h = {}
    for node in NODES:
        linear, _, norm = encoder.inputs[node]
        value = gelu(graph.x[node][b] @ linear.weight.T + linear.bias)
        centred = value - value.mean(1, keepdim=True)
        scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
        h[node] = scaled * norm.weight + norm.bias
    width = HIDDEN[0]
    for depth, out in enumerate(HIDDEN):
        new = {}
        for node, value in layer_reference(encoder, depth, h, graph, b).items():
            skip = encoder.skips[depth][node]
            kept = h[node] if out == width else h[node] @ skip.weight.T + skip.bias
            new[node] = kept + gelu(value)
        h, width = new, out
    return h


def random_embeddings(graph: GraphBatch, width: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {node: torch.randn(len(graph), SIZES[node], width, generator=generator) for node in NODES}


@torch.no_grad()
@pytest.mark.parametrize("depth", [0, 1], ids=["first", "second"])
def test_a_sage_layer_is_the_loop_over_edges(encoder: Encoder, graph: GraphBatch, depth: int) -> None:
    h = random_embeddings(graph, ([HIDDEN[0], *HIDDEN])[depth])
    _, index, _ = graph.flatten()
    out = as_pyg(encoder).layers[depth]({node: value.flatten(0, 1) for node, value in h.items()}, index)
    for b in range(3):
        expected = layer_reference(encoder, depth, {node: value[b] for node, value in h.items()}, graph, b)
        for node, size in SIZES.items():
            torch.testing.assert_close(out[node][b * size : (b + 1) * size], expected[node], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("depth", [2, 3], ids=["first", "second"])
def test_a_gat_layer_is_the_loop_over_edges(encoder: Encoder, graph: GraphBatch, depth: int) -> None:
    h = random_embeddings(graph, HIDDEN[depth - 1])
    _, index, attr = graph.flatten()
    out = as_pyg(encoder).layers[depth]({n: value.flatten(0, 1) for n, value in h.items()}, index, edge_attr_dict=attr)
    assert out.keys() == ({*NODES} if depth == 2 else {*READ})
    for b in range(3):
        expected = layer_reference(encoder, depth, {node: value[b] for node, value in h.items()}, graph, b)
        for node, value in expected.items():
            got = out[node][b * SIZES[node] : (b + 1) * SIZES[node]]
            torch.testing.assert_close(got, value, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_whole_encoder_is_the_loop(encoder: Encoder, graph: GraphBatch) -> None:
    out = encoder(graph)
    assert out.keys() == {*READ}
    for b in range(3):
        expected = reference(encoder, graph, b)
        for node in READ:
            torch.testing.assert_close(out[node][b], expected[node], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
@pytest.mark.parametrize("backend", ["pyg", "dense", "segment", "native"])
def test_layers_of_any_kinds_are_the_loop(
    randomise: Callable[..., Any], graph: GraphBatch, backend: str, kinds: list[str]
) -> None:
    encoder = randomise(Encoder(SMALL, HIDDEN, HEADS, READ, backend, kinds), scale=0.6)
    assert [type(layer).__name__ for layer in encoder.layers] == [f"{kind.capitalize()}Layer" for kind in kinds]
    out = encoder(graph)
    for b in range(3):
        expected = reference(encoder, graph, b)
        for node in READ:
            torch.testing.assert_close(out[node][b], expected[node], atol=1e-5, rtol=1e-5)


def doubled(graph: GraphBatch) -> GraphBatch:
    """Every edge twice, with other attributes the second time."""
    edges = {}
    for relation, own in graph.edges.items():
        order = own.target.repeat(1, 2).argsort(dim=1, stable=True)
        source, target, mask = (x.repeat(1, 2).gather(1, order) for x in (own.source, own.target, own.mask))
        attr = torch.cat([own.attr, 1 - own.attr], dim=1).take_along_dim(order[..., None], 1)
        edges[relation] = Edges(source, target, attr, mask)
    return GraphBatch(graph.x, graph.node_mask, edges, graph.action_mask)


@pytest.mark.parametrize("parallel", [False, True], ids=["", "parallel edges"])
@pytest.mark.parametrize("backend", ["auto", "segment", "sdpa", "reference"])
def test_segment_attends_by_any_backend_of_attention(
    randomise: Callable[..., Any], graph: GraphBatch, backend: str, parallel: bool
) -> None:
    """And takes lists of edges unless another one is asked for, though densities are 0.11 to 0.5."""
    encoder = randomise(Encoder(SMALL, HIDDEN, HEADS, READ, "pyg"), scale=0.6)
    graph = doubled(graph) if parallel else graph

    def outputs() -> list[Tensor]:
        out = [value for _, value in sorted(encoder(graph).items())]
        return [*out, *torch.autograd.grad(sum(value.sin().sum() for value in out), list(encoder.parameters()))]

    expected = outputs()
    encoder.backend = "segment"
    chosen = []
    with attention.using(backend), attention.listening(chosen.append):
        forced = outputs()
    assert {event.backend for event in chosen} <= {"segment" if backend == "auto" else backend}
    for value, right in zip(forced, expected, strict=True):
        torch.testing.assert_close(value, right, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kinds", [["gat"], ["sage"], ["gat", "sage"]], ids="-".join)
@pytest.mark.parametrize("backend", ["dense", "segment", "native"])
def test_there_may_be_another_number_of_layers(
    randomise: Callable[..., Any], graph: GraphBatch, backend: str, kinds: list[str]
) -> None:
    encoder = randomise(Encoder(SMALL, [6] * len(kinds), HEADS, READ, backend, kinds), scale=0.6)
    expected = encoders.backend("pyg")(encoder, graph)
    for node, value in encoder(graph).items():
        torch.testing.assert_close(value, expected[node], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_graphs_without_any_edge_are_encoded(encoder: Encoder, random_graph: Callable[..., GraphBatch]) -> None:
    graph = random_graph(2, SIZES, 0.0, schema=SMALL)
    out = encoder(graph)
    for b in range(2):
        torch.testing.assert_close(out["slot"][b], reference(encoder, graph, b)["slot"], atol=1e-5, rtol=1e-5)


# ---- symmetries ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("node", ["slot", "layer"])
def test_permuted_nodes_have_permuted_embeddings(
    encoder: Encoder, graph: GraphBatch, permute_nodes: Callable[..., GraphBatch], node: str, seed: int
) -> None:
    order = torch.randperm(SIZES[node], generator=torch.Generator().manual_seed(seed))
    before, after = encoder(graph), encoder(permute_nodes(graph, node, order))
    expected = before["slot"][:, order] if node == "slot" else before["slot"]
    torch.testing.assert_close(after["slot"], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after["global"], before["global"], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_order_of_edges_does_not_matter(
    encoder: Encoder, graph: GraphBatch, shuffle_edges: Callable[..., GraphBatch]
) -> None:
    before, after = encoder(graph), encoder(shuffle_edges(graph))
    for node in READ:
        torch.testing.assert_close(after[node], before[node], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_does_not_matter(encoder: Encoder, graph: GraphBatch, pad: Callable[..., GraphBatch]) -> None:
    before, after = encoder(graph), encoder(pad(graph, {"slot": 2, "layer": 3}, 5))
    for node in READ:
        torch.testing.assert_close(after[node][:, : SIZES[node]], before[node], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("relation", list(RELATIONS), ids="-".join)
def test_edge_attributes_matter(
    encoder: Encoder, random_graph: Callable[..., GraphBatch], relation: tuple[str, str, str]
) -> None:
    # Attention over a single edge is 1 whatever its attribute, so with one global node what it writes has no effect.
    graph = random_graph(2, SIZES, 1.0, schema=SMALL)
    before = encoder(graph)
    graph.edges[relation].attr.neg_()
    changed = any(not torch.allclose(encoder(graph)[node], before[node], atol=1e-6) for node in READ)
    assert changed == (relation[0] != "global")


@torch.no_grad()
def test_the_schema_may_have_any_sizes(encoder: Encoder, random_graph: Callable[..., GraphBatch]) -> None:
    out = encoder(random_graph(2, {"global": 1, "slot": 9, "layer": 7}, schema=SMALL))
    assert out["slot"].shape == (2, 9, HIDDEN[-1])
    assert out["global"].shape == (2, 1, HIDDEN[-1])


# ---- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "gain"), [((5, 3), 2.0), ((3, 5), 0.01), ((4, 4), math.sqrt(2))], ids=str)
def test_orthogonal_rows_or_columns_of_that_gain(shape: tuple[int, int], gain: float) -> None:
    layer = orthogonal_(nn.Linear(shape[1], shape[0]), gain)
    weight = layer.weight if shape[0] <= shape[1] else layer.weight.T
    torch.testing.assert_close(weight @ weight.T, gain**2 * torch.eye(min(shape)))
    assert not layer.bias.any()


def test_masked_mean_by_hand() -> None:
    x = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [99.0, 99.0]], [[7.0, 7.0], [8.0, 8.0], [9.0, 9.0]]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    # (1 + 3) / 2 and (2 + 6) / 2; no node at all gives 0
    assert masked_mean(x, mask).tolist() == [[2.0, 4.0], [0.0, 0.0]]


# ---- the choice ------------------------------------------------------------------------------------------------------


def test_auto_chooses_by_device_and_size_and_says_so_once(
    randomise: Callable[..., Any], random_graph: Callable[..., GraphBatch], caplog: pytest.LogCaptureFixture
) -> None:
    encoders.chosen.cache_clear()
    encoder = randomise(Encoder(SMALL, HIDDEN, HEADS, READ), scale=0.6)
    graph = random_graph(3, SIZES, 0.4, schema=SMALL)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            out = encoder(graph)
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == ["encoder backend native"]
    torch.testing.assert_close(out["slot"], encoders.backend("pyg")(encoder, graph)["slot"], atol=1e-5, rtol=1e-5)
    relations = tuple(RELATIONS)
    assert encoders.chosen("cuda", tuple(SIZES.items()), relations) == "dense"
    assert encoders.chosen("cpu", (("global", 1), ("slot", 200), ("layer", 3)), relations) == "segment"


def test_an_unknown_or_unavailable_backend_is_refused(
    random_graph: Callable[..., GraphBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = random_graph(1, SIZES, schema=SMALL)
    with pytest.raises(ConfigError, match=r"policy\.backend=nonsense: .* auto, pyg, segment, dense, native"):
        Encoder(SMALL, HIDDEN, HEADS, READ, "nonsense")(graph)
    monkeypatch.setattr(native, "library", lambda folder: "no compiler")
    with pytest.raises(ConfigError, match=r"policy\.backend=native: no compiler; use auto"):
        Encoder(SMALL, HIDDEN, HEADS, READ, "native")(graph)


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["dense", "segment", "native"])
@pytest.mark.parametrize("batch", [1, 5, 40])
@pytest.mark.parametrize("kinds", [["sage", "sage", "gat", "gat"], *KINDS], ids="-".join)
def test_gradients_are_those_of_pyg(
    randomise: Callable[..., Any], random_graph: Callable[..., GraphBatch], backend: str, batch: int, kinds: list[str]
) -> None:
    graph, found = random_graph(batch, SIZES, 0.5, seed=batch, schema=SMALL), {}
    for name in ("pyg", backend):
        encoder = randomise(Encoder(SMALL, HIDDEN, HEADS, READ, name, kinds), scale=0.6)
        generator = torch.Generator().manual_seed(1)
        out = encoder(graph)
        sum((out[node] * torch.randn(out[node].shape, generator=generator)).sum() for node in READ).backward()
        found[name] = {name: p.grad for name, p in encoder.named_parameters()}
    for name, expected in found["pyg"].items():
        torch.testing.assert_close(
            found[backend][name], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()), msg=name
        )


@pytest.mark.parametrize("backend", ["dense", "segment", "native"])
def test_several_edges_between_a_pair(
    randomise: Callable[..., Any], random_graph: Callable[..., GraphBatch], backend: str
) -> None:
    graph = random_graph(2, SIZES, 0.7, seed=2, schema=SMALL)
    twice = {
        r: Edges(*(torch.cat([t, t], dim=1) for t in (e.source, e.target)), torch.cat([e.attr, -e.attr], dim=1),
                 torch.cat([e.mask, e.mask.roll(1, 1)], dim=1))
        for r, e in graph.edges.items()
    }  # fmt: skip
    graph = GraphBatch(graph.x, graph.node_mask, twice, graph.action_mask)
    assert max(graph.pack().layout.planes.values()) == 2
    encoder = randomise(Encoder(SMALL, HIDDEN, HEADS, READ, backend), scale=0.6)
    expected = encoders.backend("pyg")(encoder, graph)
    for node, value in encoder(graph).items():
        torch.testing.assert_close(value, expected[node], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_change_the_forward_pass(
    randomise: Callable[..., Any], random_graph: Callable[..., GraphBatch], threads: int
) -> None:
    encoder = randomise(Encoder(SMALL, HIDDEN, HEADS, READ, "native"), scale=0.6)
    graph, before = random_graph(100, SIZES, 0.5, schema=SMALL), torch.get_num_threads()

    def run() -> tuple[Tensor, list[Tensor]]:
        encoder.zero_grad()
        out = encoder(graph)["slot"]
        out.square().sum().backward()
        return out.detach(), [p.grad.clone() for p in encoder.parameters() if p.grad is not None]

    one, gradients = run()
    torch.set_num_threads(threads)
    try:
        many, others = run()
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, many)
    for a, b in zip(gradients, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max()))


# ---- half precision --------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["pyg", "dense", "segment", "native"])
def test_half_precision_is_near_the_fp32_reference(
    random_graph: Callable[..., GraphBatch], backend: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    encoder = Encoder(SMALL, [32, 32, 32, 32], 4, READ, backend)  # as it is before training
    graph = random_graph(40, SIZES, 0.5, schema=SMALL)
    expected = encoders.backend("pyg")(encoder, graph)
    with torch.autocast("cpu", dtype):
        out = encoder(graph)
    for node, value in expected.items():
        assert (out[node].float() - value).abs().max() <= 2e-2 * value.abs().max(), node
        # All but `native`, whose kernel is fp32, do run in another type.
        assert torch.equal(out[node], encoders.backend("native")(encoder, graph)[node]) == (backend == "native")
