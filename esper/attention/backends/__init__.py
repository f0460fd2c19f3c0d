"""Ways to compute attention, all of the same function.

Each is a module with

- `reject(spec, facts)`, why it cannot compute an AttentionSpec on a device with these Facts; nothing where it can;
- `forward(inputs)`, [B, heads, queries, Dv] of Inputs, where it takes a kind other than graphs;
- `forward_edges(scores, values, edges)`, [graphs * targets, heads, D] from scores [E, heads] and values
  [graphs * sources, heads, D], where it takes graphs.
"""

from types import ModuleType

from esper.attention.backends import flex, reference, sdpa, segment

BACKENDS: dict[str, ModuleType] = {"reference": reference, "sdpa": sdpa, "flex": flex, "segment": segment}
