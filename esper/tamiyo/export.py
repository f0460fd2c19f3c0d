"""A policy as a program that runs without Esper: plain tensors in, decisions out, for any numbers of graphs and nodes.

The program is the policy itself, with its encoder written out relation by relation on dense blocks, in which only the
numbers of features are fixed. `docs/export.md` shows its use; the command is `trainers.export`.
"""

from __future__ import annotations

import copy
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from esper.graph import GraphBatch
from esper.graph.interface import DISCRETE, GROWTH, NODE, Interface
from esper.graph.schema import VERSION, Relation
from esper.growth.actions import RAMPS, Verb
from esper.runtime.errors import ConfigError
from esper.tamiyo.distribution import MaskedCategorical
from esper.tamiyo.encoders.parameters import SLOPE, GatLayer, Parameters
from esper.tamiyo.policy import GraphPolicy
from esper.tamiyo.pooled import GLOBAL, PooledEncoder

FORMATS = TORCH, ONNX = "torch_export", "onnx"
ENDINGS = {TORCH: ".pt2", ONNX: ".onnx"}
"""Of the files of each format."""
OUTPUTS = ("log_probs", "actions", "values")
METADATA = "metadata.json"
"""The extra file of a program of PyTorch's that describes it."""
PROPERTY = "esper"
"""The property of an ONNX file that does."""
_FORMAT_VERSION = 1
_ACTION_MASK = "action_mask"
_NEVER = -1e30  # a score that leaves nothing of an edge; finite, so that rows without edges are no NaN
_OPSET = 20  # the first with Gelu


class Program(nn.Module):
    """The function that is exported: a copy of a policy in float32 on the CPU.

    Args:
        policy: any of Esper's.
        interface: of the environments that it plays.
    """

    def __init__(self, policy: GraphPolicy, interface: Interface):
        super().__init__()
        self.policy, self.interface = copy.deepcopy(policy).float().cpu().eval().requires_grad_(False), interface
        for parent in list(self.policy.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.ModuleDict):
                    setattr(parent, name, _Typed(child))

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Decisions for B graphs.

        Args:
            inputs: all of `input_names`, in that order: float32 `x__<node>` [B, n, F], bool `mask__<node>` [B, n], bool
                `edges__<source>__<name>__<target>` [B, n_target, n_source], float32 `attr__...` of the same name
                [B, n_target, n_source, D], and bool `action_mask` [B, A].

        Returns:
            The log-probabilities of all actions, float32 [B, A], -inf for those that are not legal; the most probable
            actions, int64 [B]; and the values, float32 [B].
        """
        schema = self.interface.schema
        x = {node: inputs[f"x__{node}"] for node in schema.nodes}
        masks = {node: inputs[f"mask__{node}"] for node in schema.nodes}
        encoder = self.policy.encoder
        if isinstance(encoder, PooledEncoder):
            embeddings = encoder.of_nodes(x, masks)
        else:
            edges = {r: (inputs[_key("edges", r)], inputs[_key("attr", r)]) for r in schema.relations}
            embeddings = _encode(encoder, x, edges, encoder.edge_attributes)
        logits, values = self.policy.heads(embeddings, masks)
        # Read by position: that A is a product of other sizes could only be told as a limit on all of them.
        mask = inputs[_ACTION_MASK].index_select(1, torch.arange(logits.shape[1]))
        distribution = MaskedCategorical(logits, mask)
        return distribution.log_probs, distribution.mode(), values


class _Typed(nn.Module):
    """A ModuleDict whose modules are not called by its keys: a program spells their names out in Python, where `global`
    is a keyword."""

    def __init__(self, modules: nn.ModuleDict):
        super().__init__()
        self.names = list(modules)
        for name, module in modules.items():
            self.add_module(f"of_{name}", module)

    def __getitem__(self, name: str) -> nn.Module:
        return self.get_submodule(f"of_{name}")

    def items(self) -> list[tuple[str, nn.Module]]:
        return [(name, self[name]) for name in self.names]


Edges = dict[Relation, tuple[Tensor, Tensor]]
"""Which edges there are [B, targets, sources] and their attributes [B, targets, sources, D]."""


def _encode(encoder: Parameters, x: dict[str, Tensor], edges: Edges, attributes: bool) -> dict[str, Tensor]:
    """As `Encoder.forward`."""
    shape = encoder.shape
    h = {node: encoder.inputs[node](value) for node, value in x.items()}
    means = {relation: _mean_weights(mask) for relation, (mask, _) in edges.items()}
    for depth, (layer, skips) in enumerate(encoder.stages()):
        new, first = {}, 0
        folded = layer.folded() if shape.attends(depth) else ()
        for node in (node for node in shape.schema.nodes if node in shape.targets(depth)):
            relations = shape.into(node)
            part = slice(first, first + len(relations))
            first = part.stop
            arrived = []
            for number, relation in enumerate(relations, part.start):
                source = h[relation[0]]
                if shape.attends(depth):
                    mask, attr = edges[relation]
                    vectors = [vector[number] for vector in folded]
                    arrived.append(_gat(layer, number, vectors, source, h[node], mask, attr if attributes else None))
                else:
                    arrived.append(means[relation] @ source @ layer.neighbour[number])
            gathered = sum(arrived[1:], arrived[0]) / len(relations) + layer.bias[part].mean(0)
            if not shape.attends(depth):
                gathered = gathered + h[node] @ layer.root[part].mean(0)
            new[node] = skips[node](h[node]) + F.gelu(gathered)
        h = new
    return {node: h[node] for node in shape.read}


def _mean_weights(mask: Tensor) -> Tensor:
    """[B, targets, sources], the mean over a target's edges; 0 where it has none."""
    weights = mask.float()
    return weights / weights.sum(2, keepdim=True).clamp(min=1)


def _gat(
    layer: GatLayer,
    number: int,
    vectors: list[Tensor],
    source: Tensor,
    own: Tensor,
    mask: Tensor,
    attr: Tensor | None,
) -> Tensor:
    """[B, targets, out], what one relation brings to `own` [B, targets, in] from `source` [B, sources, in].

    Args:
        layer: whose parameters are used.
        number: of the relation among those of the layer.
        vectors: that score sources, targets and edges, [heads, in] twice and [heads, attributes].
        source, own: embeddings.
        mask: bool [B, targets, sources].
        attr: [B, targets, sources, D], or None if attributes are hidden.
    """
    by, to, along = vectors
    score = (own @ to.T)[:, :, None] + (source @ by.T)[:, None]
    if attr is not None:
        score = score + attr @ along[:, : attr.shape[3]].T
    there = mask[..., None]
    score = F.leaky_relu(score, SLOPE).masked_fill(~there, _NEVER)  # [B, targets, sources, heads]
    share = score.softmax(2) * there  # also where there is no edge at all
    sent = (source @ layer.source[number]).unflatten(2, (len(by), -1))  # [B, sources, heads, size]
    gathered = share.permute(0, 3, 1, 2) @ sent.permute(0, 2, 1, 3)  # [B, heads, targets, size]
    return gathered.permute(0, 2, 1, 3).flatten(2)


# ---- what goes in ---------------------------------------------------------------------------------------------------


def input_names(interface: Interface) -> list[str]:
    """The inputs of a program, in order."""
    schema = interface.schema
    names = [f"{kind}__{node}" for node in schema.nodes for kind in ("x", "mask")]
    return [*names, *(_key(kind, r) for r in schema.relations for kind in ("edges", "attr")), _ACTION_MASK]


def inputs_of(graph: GraphBatch) -> dict[str, Tensor]:
    """The inputs of a program for B graphs, by name; see `Program.forward`.

    Raises:
        ConfigError: two edges of one relation join the same nodes, for which there is no room.
    """
    packed = graph.pack()
    layout = packed.layout
    result: dict[str, Tensor] = {}
    for node, _, _ in layout.types:
        result |= {f"x__{node}": graph.x[node], f"mask__{node}": graph.node_mask[node]}
    for relation, attributes, planes in layout.relations:
        if planes > 1:
            name = "__".join(relation)
            raise ConfigError(f"{name}: {planes} edges join the same nodes; an exported policy has room for one")
        result[_key("edges", relation)] = layout.of_relation(packed.mask, relation)
        result[_key("attr", relation)] = layout.of_relation(packed.attr, relation)[..., :attributes]
    result[_ACTION_MASK] = graph.action_mask
    return {name: value.contiguous() for name, value in result.items()}


def _key(kind: str, relation: Relation) -> str:
    return f"{kind}__{'__'.join(relation)}"


def _example(interface: Interface) -> tuple[dict[str, Tensor], dict[str, dict[int, Any]]]:
    """Inputs to trace with and their dynamic sizes. All sizes differ and none is 1, which would be taken for fixed."""
    schema, batch = interface.schema, Dim("graphs", min=1)
    # A host has one global node; the policies of other environments have as many of each type as there are.
    single = {GLOBAL} if interface.actions == GROWTH else set()
    counts = {node: 1 if node in single else 3 + place for place, node in enumerate(schema.nodes)}
    sizes = {node: None if node in single else Dim(f"{node}s", min=1) for node in schema.nodes}
    generator, graphs = torch.Generator().manual_seed(0), 2
    inputs: dict[str, Tensor] = {}
    dynamic: dict[str, dict[int, Any]] = {}

    def add(name: str, dims: tuple[Any, ...], *shape: int, yes: bool = False) -> None:
        value = torch.randn(graphs, *shape, generator=generator)
        inputs[name] = value > -1 if yes else value
        dynamic[name] = {0: batch} | {place: dim for place, dim in enumerate(dims, 1) if dim is not None}

    for node, names in schema.nodes.items():
        add(f"x__{node}", (sizes[node],), counts[node], len(names))
        add(f"mask__{node}", (sizes[node],), counts[node], yes=True)
    for relation, names in schema.relations.items():
        source, _, target = relation
        dims = sizes[target], sizes[source]
        add(_key("edges", relation), dims, counts[target], counts[source], yes=True)
        add(_key("attr", relation), dims, counts[target], counts[source], len(names))
    if interface.actions == GROWTH:
        add(
            _ACTION_MASK,
            (Dim("actions", min=1),),
            1 + counts["slot"] * (counts["blueprint"] + len(RAMPS) + 2),
            yes=True,
        )
    elif interface.actions == NODE:
        add(_ACTION_MASK, (sizes[interface.node],), counts[interface.node], yes=True)
    else:
        add(_ACTION_MASK, (), interface.count, yes=True)
    inputs[_ACTION_MASK][:, 0] = True
    return inputs, dynamic


# ---- files ----------------------------------------------------------------------------------------------------------


def describe(interface: Interface, trained_on: dict[str, Any]) -> dict[str, Any]:
    """What a reader of a program must know, as plain containers; `trained_on` is added as it is."""
    schema = interface.schema
    return {
        "format_version": _FORMAT_VERSION,
        "schema_version": VERSION,
        "schema_hash": schema.hash,
        "nodes": {node: list(names) for node, names in schema.nodes.items()},
        "relations": [
            {"name": "__".join(relation), "source": relation[0], "target": relation[2], "attributes": list(names)}
            for relation, names in schema.relations.items()
        ],
        "inputs": input_names(interface),
        "outputs": list(OUTPUTS),
        "actions": _actions(interface),
        "trained_on": trained_on,
    }


def _actions(interface: Interface) -> dict[str, Any]:
    """How actions are numbered; each `index` is an expression in the numbers that it names."""
    if interface.actions == DISCRETE:
        return {"kind": DISCRETE, "count": interface.count}
    if interface.actions == NODE:
        return {"kind": NODE, "node": interface.node, "index": interface.node}
    ramps = len(RAMPS)
    tended = "1 + slots * blueprints"
    index = {
        Verb.WAIT: "0",
        Verb.GERMINATE: "1 + slot * blueprints + blueprint",
        Verb.BLEND: f"{tended} + slot * {ramps} + ramp",
        Verb.FOSSILIZE: f"{tended} + slots * {ramps} + slot",
        Verb.CULL: f"{tended} + slots * {ramps + 1} + slot",
    }
    return {
        "kind": GROWTH,
        "count": f"1 + slots * (blueprints + {ramps + 2})",
        "index": {verb.name: index[verb] for verb in Verb},
        "ramps": list(RAMPS),
    }


def program_of(policy: GraphPolicy, interface: Interface) -> ExportedProgram:
    """The policy as a program of PyTorch's, in float32 on the CPU."""
    inputs, dynamic = _example(interface)
    module = Program(policy, interface)
    with torch.no_grad():
        return torch.export.export(module, (inputs,), dynamic_shapes=(dynamic,))


def save(policy: GraphPolicy, interface: Interface, file: Path, kind: str, trained_on: dict[str, Any]) -> None:
    """Writes a policy, with its description.

    Args:
        policy: in eval mode.
        interface: of the environments that it plays.
        file: to write.
        kind: one of FORMATS.
        trained_on: part of the description.

    Raises:
        ConfigError: there is no such format, or a package is missing that it needs.
    """
    check_format(kind)
    program = program_of(policy, interface)
    text = json.dumps(describe(interface, trained_on))
    if kind == TORCH:
        torch.export.save(program, file, extra_files={METADATA: text})
        return
    names = input_names(interface)
    onnx = torch.onnx.export(
        program, input_names=names, output_names=list(OUTPUTS), opset_version=_OPSET, dynamo=True, verbose=False
    )
    assert onnx is not None
    onnx.model.metadata_props[PROPERTY] = text
    onnx.save(str(file))


def check_format(kind: str) -> None:
    """Checks that a format is known and can be written here.

    Raises:
        ConfigError: it is not, or it cannot.
    """
    if kind not in FORMATS:
        raise ConfigError(f"format={kind}: no such format; choose {TORCH} or {ONNX}")
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if kind == ONNX and missing:
        raise ConfigError(f"format={ONNX}: {' and '.join(missing)} not installed; pip install 'esper[export]'")
