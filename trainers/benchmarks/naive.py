"""The observation graph built the slow way: one host, one node, one edge, one number at a time.

What the vectorised builder is compared with, in the suite `graph` and in the tests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch_geometric.data import Batch, HeteroData

from esper.graph.schema import SCHEMA, Relation
from esper.graph.space import BOUND
from esper.growth.actions import ActionLayout
from esper.growth.lifecycle import Stage
from esper.growth.population import Population

Features = dict[str, float]

LIVE = ("TRAINING", "BLENDING", "HOLDING", "FOSSILIZED")
GATED, MIXING = ("glu", "attention"), ("conv", "dilated_conv", "attention")
STATISTICS = ("dead_fraction", "zero_derivative_fraction", "mean", "std", "effective_rank")


def log(value: float) -> float:
    """As the observer's, of what may be 0."""
    return math.log(max(value, 1e-8))


def clip(value: float) -> float:
    """Into the observation's bounds."""
    return BOUND if math.isnan(value) else min(max(value, -BOUND), BOUND)


class Naive:
    """The graph of one host; nodes are named by their place in the room.

    Args:
        population: whose.
        host: which.
        horizon: epochs of an episode.
        seed_sizes: parameters of a seed of each blueprint.
    """

    def __init__(self, population: Population, host: int, horizon: int, seed_sizes: Mapping[str, int]):
        self.p, self.k, self.horizon = population, host, horizon
        spec, c, life = population.spec, population.context, population.lifecycle
        self.width, self.depth = int(c.width[host]), int(c.depth[host])
        self.tokens, self.taps = math.prod(spec.grid), 3 ** len(spec.grid) if math.prod(spec.grid) > 1 else 1
        w = self.width
        self.layers = [*range(self.depth + 1), spec.stages + 1]  # places of the stem, the stages and the head
        self.fans = [(spec.inputs, w), *[(w, w)] * self.depth, (w, spec.classes)]
        taps = [1, *[self.taps] * self.depth, 1]
        self.sizes = [t * a * b + b for t, (a, b) in zip(taps, self.fans, strict=True)]
        often = [self.tokens] * (self.depth + 1) + [self.tokens if spec.per_token else 1]
        self.flops = sum(n * t * a * b for n, t, (a, b) in zip(often, taps, self.fans, strict=True))
        self.names = [b.name for b in population.catalogue]
        self.seed_sizes = seed_sizes
        cost = {"mlp": 4 * w * w, "glu": 6 * w * w, "bypass": w * w, "widen": 2 * w * w}
        cost["low_rank"] = cost["norm"] = 4 * w
        cost["conv"] = cost["dilated_conv"] = (3 ** len(spec.grid) + 1) * w * w
        cost["attention"] = 4 * w * w + 2 * w * self.tokens
        self.seed_flops = {name: self.tokens * each for name, each in cost.items()}
        self.stage = [Stage(s).name for s in life.stage[host].tolist()]
        self.kind = [self.names[b] if b >= 0 else "" for b in life.blueprint[host].tolist()]
        self.alpha, self.done = life.alpha[host].tolist(), life.epochs[host].tolist()
        self.epoch = int(population.epoch[host])
        self.trained = self.epoch > 0
        self.left = int(c.seeds[host]) - int(population.germinated[host])

    def s(self, name: str, *index: int) -> float:
        return float(getattr(self.p.statistics, name)[(self.k, *index)])

    @staticmethod
    def optional(features: Features, name: str, known: bool, value: float) -> None:
        features[name] = value if known else 0.0
        features[f"{name}_known"] = float(known)

    def place(self, layer: int) -> float:
        """How deep a layer sits, 0 for the stem and 1 for the head."""
        return 1.0 if layer == self.layers[-1] else layer / (self.depth + 1)

    def glob(self) -> list[Features]:
        p, c = self.p, self.p.context
        f: Features = {}
        loss = float(p.validation_loss[self.k])
        f["epoch_fraction"] = self.epoch / self.horizon
        f["remaining_fraction"] = (self.horizon - self.epoch) / self.horizon
        self.optional(f, "log_train_loss", self.trained, log(self.s("train_loss")))
        f["log_validation_loss"] = log(loss)
        self.optional(f, "generalisation_gap", self.trained, loss - self.s("train_loss"))
        # change of the log loss per epoch over 3 epochs, times 10
        slope = (log(self.s("history", 0)) - log(self.s("history", 3))) / 3 * 10
        self.optional(f, "slope", self.epoch >= 3, slope)
        f["log_learning_rate"] = math.log10(float(c.learning_rate[self.k])) + 2.5
        f["log_train_size"] = math.log10(int(c.train_size[self.k])) - 2.5
        kept = sum(
            self.seed_sizes[self.kind[i]] for i in range(self.depth) if self.stage[i] in ("HOLDING", "FOSSILIZED")
        )
        f["log_parameter_growth"] = math.log((sum(self.sizes) + kept) / sum(self.sizes))
        f["extra_flops_ratio"] = float(p.extra_flops[self.k]) / (self.horizon * self.flops)
        f["live_fraction"] = sum(s in LIVE for s in self.stage) / self.depth
        f["seeds_left"], f["priced"] = min(self.left, 8) / 4, float(c.priced[self.k])
        return [f]

    def layer(self) -> list[Features]:
        nodes: list[Features] = []
        for i, (a, b), size in zip(self.layers, self.fans, self.sizes, strict=True):
            f = {"depth_fraction": self.place(i)} | dict.fromkeys(
                ("is_linear", "is_conv", "is_attention", "is_norm", "is_embedding", "is_other"), 0.0
            )
            f["is_conv" if self.taps > 1 and 0 < i < self.layers[-1] else "is_linear"] = 1.0
            f["log_width_in"], f["log_width_out"] = math.log(a, 64), math.log(b, 64)
            f["log_parameters"] = math.log(size, 1000)
            f["weight_rms"] = self.s("layer_weight_rms", i)
            ratio = log(self.s("layer_update_rms", i) / (self.s("layer_weight_rms", i) + 1e-8)) + 5
            self.optional(f, "log_gradient_rms", self.trained, (log(self.s("layer_gradient_rms", i)) + 5) / 2)
            self.optional(f, "log_update_ratio", self.trained, ratio)
            self.optional(f, "gradient_signal_to_noise", self.trained, self.s("layer_signal_to_noise", i))
            nodes.append(f)
        return nodes

    def activation(self) -> list[Features]:
        nodes: list[Features] = []
        for i in range(self.depth):
            f = {"is_relu": 1.0} | dict.fromkeys(("is_gelu", "is_silu", "is_tanh", "is_identity", "is_other"), 0.0)
            f |= {name: self.s("activations", i, column) for column, name in enumerate(STATISTICS)}
            self.optional(f, "log_backward_rms", self.trained, (log(self.s("activation_backward_rms", i)) + 8) / 2)
            nodes.append(f)
        return nodes

    def parameter(self) -> list[Features]:
        f = {"log_learning_rate": math.log10(float(self.p.context.learning_rate[self.k])) + 2.5}
        f |= {"momentum": 0.9, "weight_decay": 0.0, "log_parameters": math.log(sum(self.sizes), 1000)}
        self.optional(f, "log_update_rms", self.trained, log(self.s("update_rms")) + 6)
        return [f]

    def slot(self) -> list[Features]:
        nodes: list[Features] = []
        for i in range(self.depth):
            f = {f"is_{s.name.lower()}": float(s.name == self.stage[i]) for s in Stage}
            live = self.stage[i] in LIVE
            f["alpha"], f["epochs_in_stage"] = self.alpha[i], self.done[i] / self.horizon
            driven = live and int(self.p.seed_steps[self.k, i]) > 0
            self.optional(f, "log_growth_gradient", self.trained, (log(self.s("growth_gradient", i)) + 3) / 2)
            self.optional(f, "log_seed_gradient_rms", driven, (log(self.s("seed_gradient_rms", i)) + 5) / 2)
            known = bool(self.p.statistics.contribution_known[self.k, i])
            self.optional(f, "contribution", known, self.s("contribution", i))
            f["contribution_age"] = self.s("contribution_age", i) / self.horizon if known else 0.0
            change = float(self.p.validation_loss[self.k]) - self.s("germination_loss", i)
            self.optional(f, "change_since_germination", live, change)
            rest = self.p.lifecycle_spec.embargo_epochs
            f["embargo_left"] = (rest - self.done[i]) / rest if self.stage[i] == "EMBARGOED" else 0.0
            nodes.append(f)
        return nodes

    def blueprint(self) -> list[Features]:
        nodes: list[Features] = []
        for b, name in enumerate(self.names):
            f = {"log_parameters": math.log(self.seed_sizes[name] / sum(self.sizes))}
            f |= {"log_flops": log(self.seed_flops[name] / self.flops), "mixes_tokens": float(name in MIXING)}
            f |= {"gated": float(name in GATED), "residual": float(name not in ("norm", "bypass", "widen"))}
            f |= {"widens": float(name == "widen")}
            known = bool(self.p.statistics.fared_known[self.k, b])
            self.optional(f, "fared", known, self.s("fared", b))
            nodes.append(f)
        return nodes

    def nodes(self) -> dict[str, dict[int, Features]]:
        """node type -> {place: features}."""
        built = {"global": self.glob(), "activation": self.activation(), "parameter": self.parameter()}
        built |= {"slot": self.slot(), "blueprint": self.blueprint()}
        places = {node: dict(enumerate(rows)) for node, rows in built.items()}
        return places | {"layer": dict(zip(self.layers, self.layer(), strict=True))}

    def edges(self) -> dict[Relation, list[tuple[int, int, Features]]]:
        """relation -> list of (target, source, attributes by name)."""
        edges: dict[Relation, list[tuple[int, int, Features]]] = {relation: [] for relation in SCHEMA.relations}
        ratio = {i: math.log(b / a) for i, (a, b) in zip(self.layers, self.fans, strict=True)}
        share = {i: size / sum(self.sizes) for i, size in zip(self.layers, self.sizes, strict=True)}
        for before, after in zip(self.layers, self.layers[1:], strict=False):
            gap = self.place(after) - self.place(before)
            nearby = {"depth_gap": gap, "log_width_ratio": ratio[after], "is_skip": 0.0}
            edges["layer", "feeds", "layer"].append((after, before, nearby))
        for i in self.layers:
            edges["parameter", "tunes", "layer"].append((i, 0, {"share": share[i]}))
        for i in range(self.depth):
            own, after = i + 1, self.layers[i + 2]
            at = {"depth": self.place(own), "log_width_ratio": ratio[own]}
            edges["layer", "feeds", "activation"].append((i, own, at))
            behind = {"depth": self.place(after), "log_width_ratio": ratio[after]}
            edges["activation", "feeds", "layer"].append((after, i, behind))
            state = {"alpha": self.alpha[i], "stage": Stage[self.stage[i]].value / 6}
            edges["slot", "reads", "layer"].append((own, i, state))
            edges["slot", "writes", "layer"].append((after, i, state))
            for side in (own, after):
                edges["layer", "hosts", "slot"].append((i, side, state))
            for j in range(i + 1, self.depth):
                edges["slot", "precedes", "slot"].append((j, i, {"distance": (j - i) / (self.depth + 1)}))
            for b, name in enumerate(self.names):
                fits = self.tokens > 1 or name not in MIXING
                fit = {
                    "legal": float(self.stage[i] == "DORMANT" and fits and self.left > 0),
                    "relative_cost": math.log(1 + self.seed_sizes[name] / sum(self.sizes)),
                    "alpha": self.alpha[i] if self.kind[i] == name else 0.0,
                }
                edges["blueprint", "fits", "slot"].append((i, b, fit))
                edges["slot", "fits", "blueprint"].append((b, i, fit))
        for node, rows in self.nodes().items():
            if node != "global":
                for i in rows:
                    edges["global", "writes", node].append((i, 0, {"presence": 1.0}))
                    edges[node, "informs", "global"].append((0, i, {"presence": 1.0}))
        return {relation: sorted(rows, key=lambda row: row[:2]) for relation, rows in edges.items()}

    def data(self, legal: torch.Tensor) -> HeteroData:
        """As PyG holds it, with the legal actions [A]."""
        data = HeteroData()
        moved: dict[str, dict[int, int]] = {}
        for node, places in self.nodes().items():
            names = SCHEMA.nodes[node]
            moved[node] = {place: number for number, place in enumerate(places)}
            data[node].x = torch.tensor([[clip(row[name]) for name in names] for row in places.values()])
        for relation, rows in self.edges().items():
            names = SCHEMA.relations[relation]
            pairs = [(moved[relation[0]][source], moved[relation[2]][target]) for target, source, _ in rows]
            data[relation].edge_index = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).T
            values = [[clip(row[name]) for name in names] for _, _, row in rows]
            data[relation].edge_attr = torch.tensor(values).view(-1, len(names))
        data.action_mask = legal
        return data


def batch(population: Population, horizon: int) -> Any:
    """The observations of all hosts as one PyG batch."""
    layout = ActionLayout(population.slots, len(population.catalogue))
    legal = layout.mask(population)
    graphs = []
    for host in range(population.hosts):
        site = population.spec.site_of(int(population.context.width[host]))
        sizes = {blueprint.name: blueprint.parameter_count(site) for blueprint in population.catalogue}
        graphs.append(Naive(population, host, horizon, sizes).data(legal[host]))
    return Batch.from_data_list(graphs)
