"""The encoder for CPUs in C++: one tile of 32 graphs after the other, each in a core's cache, compiled at first use.

Arithmetic runs over the graphs of a tile, so that few nodes, few heads and narrow layers still fill whole vectors, and
edges that no graph of a tile has cost nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from esper.graph import GraphBatch, Layout
from esper.runtime.native import call, fields, library, parts
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


@cache
@torch.inference_mode(False)
def _plan(shape: Shape, layout: Layout) -> _Plan:
    return _Plan(shape, layout)


def forward(encoder: Parameters, graph: GraphBatch) -> dict[str, Tensor]:
    """See Encoder.forward."""
    packed, shape = graph.pack(), encoder.shape
    plan = _plan(shape, packed.layout)
    # Autocast must not change what the kernel reads.
    with torch.autocast(packed.x.device.type, enabled=False):
        out = _Encode.apply(plan, packed.x, packed.attr, packed.mask, *_parameters(encoder, plan))
    return {node: out[:, packed.layout.nodes[node]] for node in shape.read}


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


def _described(plan: _Plan, parameters: list[_Parameter]) -> tuple[Any, list[Any]]:
    """The layers and the typed inputs for the kernel, and what must live as long."""
    shape, places = plan.shape, list(plan.layout.counts)
    taken = iter(parameters)
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


def _graphs(
    plan: _Plan,
    tensors: tuple[Tensor, Tensor, Tensor],
    parameters: tuple[Tensor, ...],
    gradients: list[Tensor] | None,
    out: Tensor | None = None,
    out_gradient: Tensor | None = None,
    kept: Tensor | None = None,
) -> tuple[_Graphs, list[Any]]:
    found = [None] * len(parameters) if gradients is None else [g.data_ptr() for g in gradients]
    pairs = [_Parameter(p.data_ptr(), g) for p, g in zip(parameters, found, strict=True)]
    (layers, inputs), alive = _described(plan, pairs)
    layout, (x, attr, mask) = plan.layout, tensors
    structure = _Graphs(
        len(layout.types),
        len(layout.relations),
        len(layers),
        plan.shape.heads,
        layout.size,
        layout.features,
        layout.cells,
        layout.attributes,
        len(x),
        plan.types.data_ptr(),
        plan.relations.data_ptr(),
        ctypes.addressof(layers),
        *(ctypes.addressof(array) for array in inputs),
        *(value.data_ptr() for value in (x, attr, mask)),
        None if out is None else out.data_ptr(),
        *(None if value is None else value.data_ptr() for value in (out_gradient, kept)),
    )
    return structure, [alive, layers]


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, x: Tensor, attr: Tensor, mask: Tensor, *parameters: Tensor) -> Tensor:
        tensors = x.contiguous(), attr.contiguous(), mask.contiguous()
        parameters = tuple(parameter.contiguous() for parameter in parameters)
        out = x.new_zeros(len(x), plan.layout.size, plan.shape.hidden[-1])
        kept = None
        if any(ctx.needs_input_grad):
            graphs, alive = _graphs(plan, tensors, parameters, None)
            rows = _kernel("esper_encoder_rows")(ctypes.byref(graphs))
            kept = x.new_empty(-(-len(x) // _TILE), rows, _TILE)
        graphs, alive = _graphs(plan, tensors, parameters, None, out=out, kept=kept)
        call(_kernel("esper_encode"), [((graphs,), part) for part in parts(len(x), _TILE)])
        del alive
        ctx.plan, ctx.kept = plan, kept
        ctx.save_for_backward(*tensors, *parameters)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        plan, saved = ctx.plan, ctx.saved_tensors
        tensors, parameters = saved[:3], saved[3:]
        back = gradients[0].contiguous()
        ranges = parts(len(back), _TILE)
        sizes = [parameter.numel() for parameter in parameters]
        # Each thread adds to a copy of its own.
        flat = back.new_zeros(max(len(ranges), 1), sum(sizes))
        work, alive = [], []
        for own, part in zip(flat, ranges, strict=False):
            pieces = list(own.split(sizes))
            graphs, others = _graphs(plan, tensors, parameters, pieces, out_gradient=back, kept=ctx.kept)
            work.append(((graphs,), part))
            alive.append(others)
        call(_kernel("esper_encode_backward"), work)
        whole = flat[0] if len(flat) == 1 else flat.sum(0)
        found = [piece.view_as(p) for piece, p in zip(whole.split(sizes), parameters, strict=True)]
        return None, None, None, None, *found


def _kernel(name: str) -> Any:
    found = library(Path(__file__).parent)
    assert not isinstance(found, str), found
    function = getattr(found, name)
    function.restype = ctypes.c_int64 if name == "esper_encoder_rows" else None
    return function
