"""The encoder for CPUs in C++: one tile of 32 graphs after the other, each in a core's cache, compiled at first use.

Arithmetic runs over the graphs of a tile, so that few nodes, few heads and narrow layers still fill whole vectors, and
edges that no graph of a tile has cost nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from functools import cache, cached_property
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esper.graph import GraphBatch, Layout
from esper.runtime.native import Memory, call, fields, library, parts
from esper.tamiyo.encoders.parameters import Parameters, Shape

_TILE = 32


class _Parameter(ctypes.Structure):
    _fields_ = fields(pointers="value gradient")


class _Layer(ctypes.Structure):
    _fields_ = [
        *fields(integers="in_ out attends", pointers="rows computed"),
        *((name, _Parameter) for name in ("weight", "root", "bias", "by", "to", "along")),
        *fields(pointers="skip_weight skip_bias"),
    ]


class _Graphs(ctypes.Structure):
    _fields_ = fields(
        integers="types relations layers heads nodes features cells attributes batch",
        pointers="type relation layer input_weight input_bias gain shift x attr mask out out_gradient kept",
    )


def unavailable() -> str | None:
    """Why the kernel cannot run, or None if it can."""
    found = library(Path(__file__).parent)
    return found if isinstance(found, str) else None


class _Plan:
    """What does not change between batches of one layout."""

    def __init__(self, shape: Shape, layout: Layout):
        self.shape, self.layout = shape, layout
        places = list(layout.counts)
        self.types = torch.tensor([[layout.nodes[n].start, count, f] for n, count, f in layout.types])
        rows = []
        for relation, _, planes in layout.relations:
            block = layout.blocks[relation[2]]
            start = block.starts[block.relations.index(relation)]
            ends = places.index(relation[0]), places.index(relation[2])
            rows.append([*ends, start, planes, block.offset, block.columns])
        self.relations = torch.tensor(rows)
        self.rows, self.computed, self.means = [], [], []
        for depth in range(len(shape.hidden)):
            own, targets = shape.relations(depth), shape.targets(depth)
            self.rows.append(torch.tensor([own.index(r) if r in own else -1 for r, _, _ in layout.relations]))
            self.computed.append(torch.tensor([int(node in targets) for node in places]))
            into = torch.tensor([[float(r[2] == node) for r in own] for node in places])
            self.means.append(into / into.sum(1, keepdim=True).clamp(min=1))  # [types, R]
        self.number = len(_PLANS)
        _PLANS.append(self)

    @cached_property
    def kept(self) -> int:
        """Rows of a tile that the backward pass needs."""
        graphs, alive = _graphs(self, 0, repeat(_Parameter()))
        rows = _kernel("esper_encoder_rows")(ctypes.byref(graphs))
        del alive
        return rows


@cache
@torch.inference_mode(False)
def _plan(shape: Shape, layout: Layout) -> _Plan:
    return _Plan(shape, layout)


def of_tensors(encoder: Parameters, layout: Layout) -> Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]:
    """See Encoder.of_tensors."""
    plan, shape = _plan(encoder.shape, layout), encoder.shape

    def encode(x: Tensor, attr: Tensor, mask: Tensor) -> dict[str, Tensor]:
        # Autocast must not change what the kernel reads.
        with torch.autocast("cpu", enabled=False):
            parameters = list(_parameters(encoder, plan))
            keep = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)
            out = torch.ops.esper.encode(x, attr, mask, parameters, plan.number, keep)[0]
        return {node: out[:, layout.nodes[node]] for node in shape.read}

    return encode


def forward(encoder: Parameters, graph: GraphBatch) -> dict[str, Tensor]:
    """See Encoder.forward."""
    packed = graph.pack()
    return of_tensors(encoder, packed.layout)(packed.x, packed.attr, packed.mask)


def _parameters(encoder: Parameters, plan: _Plan) -> Iterator[Tensor]:
    """What the kernel reads, in the order of `_described`: what scores is folded into the projections, and what all
    relations into a type add to it is averaged."""
    for node in plan.layout.counts:
        layers: Any = encoder.inputs[node]
        linear, norm = layers[0], layers[2]
        yield from (linear.weight, linear.bias, norm.weight, norm.bias)
    for depth, (layer, skips) in enumerate(encoder.stages()):
        mean = plan.means[depth]
        bias = mean @ layer.bias
        if plan.shape.attends(depth):
            yield from (layer.source, bias, *layer.folded())
        else:
            yield from (layer.neighbour, bias)
            yield (mean @ layer.root.flatten(1)).view(-1, *layer.root.shape[1:])
        for node in plan.shape.targets(depth):
            if not isinstance(skips[node], torch.nn.Identity):
                yield from (skips[node].weight, skips[node].bias)


def _described(plan: _Plan, taken: Iterator[_Parameter]) -> tuple[Any, list[Any]]:
    """The layers and the typed inputs for the kernel, and what must live as long."""
    shape, places = plan.shape, list(plan.layout.counts)
    inputs = [(_Parameter * len(places))() for _ in range(4)]
    for number in range(len(places)):
        for array in inputs:
            array[number] = next(taken)
    kept: list[Any] = [inputs]
    layers = (_Layer * len(shape.hidden))()
    for depth, (width, out) in enumerate(shape.widths):
        layer, attends = layers[depth], shape.attends(depth)
        layer.in_, layer.out, layer.attends = width, out, attends
        layer.rows, layer.computed = plan.rows[depth].data_ptr(), plan.computed[depth].data_ptr()
        for name in ("weight", "bias", *(("by", "to", "along") if attends else ("root",))):
            setattr(layer, name, next(taken))
        skips = [(_Parameter * len(places))() for _ in range(2)]
        for node in shape.targets(depth):
            if width != out:
                for array in skips:
                    array[places.index(node)] = next(taken)
        kept.append(skips)
        layer.skip_weight, layer.skip_bias = (ctypes.addressof(array) for array in skips)
    return (layers, inputs), kept


def _graphs(plan: _Plan, batch: int, parameters: Iterable[_Parameter], **tensors: Tensor) -> tuple[_Graphs, list[Any]]:
    """What the kernel reads: `tensors` by the names of its pointers; and what must live as long."""
    (layers, inputs), alive = _described(plan, iter(parameters))
    layout = plan.layout
    structure = _Graphs(
        len(layout.types),
        len(layout.relations),
        len(layers),
        plan.shape.heads,
        layout.size,
        layout.features,
        layout.cells,
        layout.attributes,
        batch,
        plan.types.data_ptr(),
        plan.relations.data_ptr(),
        ctypes.addressof(layers),
        *(ctypes.addressof(array) for array in inputs),
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
    )
    return structure, [alive, layers]


# ---- as operators, which torch.compile takes as they are ------------------------------------------------------------

_MEMORY = Memory()
_PLANS: list[_Plan] = []  # by number; operators take tensors and numbers only


@torch.library.custom_op("esper::encode", mutates_args=())
def _encode(
    x: Tensor, attr: Tensor, mask: Tensor, parameters: list[Tensor], plan: int, keep: bool
) -> tuple[Tensor, Tensor]:
    """The embeddings [B, nodes, out], and what the backward pass needs where `keep` is set."""
    x, attr, mask, *parameters = (value.contiguous() for value in (x, attr, mask, *parameters))
    out, kept = _room(_PLANS[plan], x, keep, _MEMORY.take)
    tensors = {"x": x, "attr": attr, "mask": mask, "out": out.zero_()} | ({"kept": kept} if keep else {})
    pairs = [_Parameter(value.data_ptr()) for value in parameters]
    graphs, alive = _graphs(_PLANS[plan], len(x), pairs, **tensors)
    call(_kernel("esper_encode"), [((graphs,), part) for part in parts(len(x), _TILE)])
    del alive
    return out, kept


def _room(plan: _Plan, x: Tensor, keep: bool, take: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
    # Flat: torch.compile would take another number of tiles than one for another program.
    kept = take(-(-x.shape[0] // _TILE) * plan.kept * _TILE if keep else 0)
    return x.new_empty(x.shape[0], plan.layout.size, plan.shape.hidden[-1]), kept


@_encode.register_fake
def _(x: Tensor, attr: Tensor, mask: Tensor, parameters: list[Tensor], plan: int, keep: bool) -> tuple[Tensor, Tensor]:
    return _room(_PLANS[plan], x, keep, x.new_empty)


@torch.library.custom_op("esper::encode_backward", mutates_args=())
def _encode_backward(
    back: Tensor, kept: Tensor, x: Tensor, attr: Tensor, mask: Tensor, parameters: list[Tensor], plan: int
) -> Tensor:
    """The gradients of all parameters, one behind the other."""
    back, x, attr, mask, *parameters = (value.contiguous() for value in (back, x, attr, mask, *parameters))
    tensors = {"x": x, "attr": attr, "mask": mask, "out_gradient": back, "kept": kept}
    ranges = parts(len(back), _TILE)
    sizes = [parameter.numel() for parameter in parameters]
    # Each thread adds to a copy of its own.
    flat = back.new_zeros(max(len(ranges), 1), sum(sizes))
    work, alive = [], []
    for own, part in zip(flat, ranges, strict=False):
        pieces = zip(parameters, own.split(sizes), strict=True)
        pairs = [_Parameter(value.data_ptr(), gradient.data_ptr()) for value, gradient in pieces]
        graphs, others = _graphs(_PLANS[plan], len(x), pairs, **tensors)
        work.append(((graphs,), part))
        alive.append(others)
    call(_kernel("esper_encode_backward"), work)
    return flat.sum(0)


@_encode_backward.register_fake
def _(back: Tensor, kept: Tensor, x: Tensor, attr: Tensor, mask: Tensor, parameters: list[Tensor], plan: int) -> Tensor:
    return back.new_empty(sum(parameter.numel() for parameter in parameters))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, attr, mask, parameters, ctx.plan, _ = inputs
    ctx.set_materialize_grads(False)  # `kept` has none, and is large
    ctx.save_for_backward(output[1], x, attr, mask, *parameters)


def _differentiated(ctx: Any, back: Tensor, _: Tensor) -> tuple[Any, ...]:
    kept, x, attr, mask, *parameters = ctx.saved_tensors
    whole = torch.ops.esper.encode_backward(back, kept, x, attr, mask, parameters, ctx.plan)
    sizes = [parameter.numel() for parameter in parameters]
    found = [piece.view(p.shape) for piece, p in zip(whole.split(sizes), parameters, strict=True)]
    return None, None, None, found, None, None


_encode.register_autograd(_differentiated, setup_context=_remember)


def _kernel(name: str) -> Any:
    found = library(Path(__file__).parent)
    assert not isinstance(found, str), found
    function = getattr(found, name)
    function.restype = ctypes.c_int64 if name == "esper_encoder_rows" else None
    return function
