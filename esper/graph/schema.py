"""The one declaration of the observation graph: node types with their features, relations with their attributes.

Its hash goes into every checkpoint, so that a policy is never fed with features of another meaning.
A feature called `<name>_known` is the presence bit of `<name>`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

VERSION = 2

Relation = tuple[str, str, str]
"""(source node type, name, target node type)"""

LAYER_KINDS = ("linear", "conv", "attention", "norm", "embedding", "other")
ACTIVATION_KINDS = ("relu", "gelu", "silu", "tanh", "identity", "other")
STAGES = ("dormant", "training", "blending", "holding", "fossilized", "embargoed")


def _optional(*names: str) -> tuple[str, ...]:
    return tuple(part for name in names for part in (name, f"{name}_known"))


@dataclass(frozen=True)
class GraphSchema:
    """Node types, relations, and the names of their features, in order.

    Attributes:
        nodes: node type -> feature names.
        relations: relation -> attribute names.
    """

    nodes: dict[str, tuple[str, ...]]
    relations: dict[Relation, tuple[str, ...]]

    def feature(self, node: str, name: str) -> int:
        """Column of the feature `name` in `x[node]`."""
        return self.nodes[node].index(name)

    @property
    def hash(self) -> str:
        """16 hexadecimal digits that change with any name or order."""
        relations = [["/".join(relation), list(names)] for relation, names in self.relations.items()]
        text = json.dumps([VERSION, [[k, list(v)] for k, v in self.nodes.items()], relations])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


_NODES: dict[str, tuple[str, ...]] = {
    "global": (
        "epoch_fraction",
        "remaining_fraction",
        *_optional("log_train_loss"),
        "log_validation_loss",
        *_optional("generalisation_gap", "slope"),
        "log_learning_rate",
        "log_train_size",
        "log_parameter_growth",
        "extra_flops_ratio",
        "live_fraction",
        "seeds_left",
        "priced",
    ),
    "layer": (
        "depth_fraction",
        *(f"is_{kind}" for kind in LAYER_KINDS),
        "log_width_in",
        "log_width_out",
        "log_parameters",
        "weight_rms",
        *_optional("log_gradient_rms", "log_update_ratio", "gradient_signal_to_noise"),
    ),
    "activation": (
        *(f"is_{kind}" for kind in ACTIVATION_KINDS),
        "dead_fraction",
        "zero_derivative_fraction",
        "mean",
        "std",
        "effective_rank",
        *_optional("log_backward_rms"),
    ),
    "parameter": ("log_learning_rate", "momentum", "weight_decay", *_optional("log_update_rms"), "log_parameters"),
    "slot": (
        *(f"is_{stage}" for stage in STAGES),
        "alpha",
        "epochs_in_stage",
        *_optional("log_growth_gradient", "log_seed_gradient_rms", "contribution"),
        "contribution_age",
        *_optional("change_since_germination"),
        "embargo_left",
    ),
    "blueprint": (
        "log_parameters",
        "log_flops",
        "mixes_tokens",
        "gated",
        "residual",
        "widens",
        *_optional("fared"),
    ),
}

_RELATIONS: dict[Relation, tuple[str, ...]] = {
    ("layer", "feeds", "layer"): ("depth_gap", "log_width_ratio", "is_skip"),
    ("layer", "feeds", "activation"): ("depth", "log_width_ratio"),
    ("activation", "feeds", "layer"): ("depth", "log_width_ratio"),
    ("parameter", "tunes", "layer"): ("share",),
    ("slot", "reads", "layer"): ("alpha", "stage"),
    ("slot", "writes", "layer"): ("alpha", "stage"),
    ("layer", "hosts", "slot"): ("alpha", "stage"),
    ("slot", "precedes", "slot"): ("distance",),
    ("blueprint", "fits", "slot"): ("legal", "relative_cost", "alpha"),
    ("slot", "fits", "blueprint"): ("legal", "relative_cost", "alpha"),
    **{("global", "writes", node): ("presence",) for node in _NODES if node != "global"},
    **{(node, "informs", "global"): ("presence",) for node in _NODES if node != "global"},
}

SCHEMA = GraphSchema(_NODES, _RELATIONS)
