import math

import pytest
import torch

from esper.graph.schema import SCHEMA
from esper.graph.space import BOUND
from esper.growth.lifecycle import Stage
from esper.growth.observation import Observer

HORIZON = 12
KEYS = [51, 52, 53, 54, 55]
TASKS = ["mlp", "grid", "causal"]
LIVE = ("TRAINING", "BLENDING", "HOLDING", "FOSSILIZED")
GATED, MIXING = ("glu", "attention"), ("conv", "dilated_conv", "attention")
STATISTICS = ("dead_fraction", "zero_derivative_fraction", "mean", "std", "effective_rank")


def log(value):
    return math.log(max(value, 1e-8))


def clip(value):
    return BOUND if math.isnan(value) else min(max(value, -BOUND), BOUND)


class Naive:
    """The graph of one host, one node, one edge, one number at a time; nodes are named by their place in the room."""

    def __init__(self, toy, population, host, horizon=HORIZON):
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
        self.seed_sizes = {
            n: sum(p.numel() for p in toy.Seed(n, w, spec.grid, spec.causal).parameters()) for n in self.names
        }
        cost = {"mlp": 4 * w * w, "glu": 6 * w * w, "bypass": w * w, "widen": 2 * w * w}
        cost["low_rank"] = cost["norm"] = 4 * w
        cost["conv"] = cost["dilated_conv"] = (3 ** len(spec.grid) + 1) * w * w
        cost["attention"] = 4 * w * w + 2 * w * self.tokens
        self.seed_flops = {name: self.tokens * each for name, each in cost.items()}
        self.stage = [Stage(s).name for s in life.stage[host].tolist()]
        self.kind = [self.names[b] if b >= 0 else None for b in life.blueprint[host].tolist()]
        self.alpha, self.done = life.alpha[host].tolist(), life.epochs[host].tolist()
        self.epoch = int(population.epoch[host])
        self.trained = self.epoch > 0
        self.left = int(c.seeds[host]) - int(population.germinated[host])

    def s(self, name, *index):
        return float(getattr(self.p.statistics, name)[(self.k, *index)])

    @staticmethod
    def optional(features, name, known, value):
        features[name] = value() if known else 0.0
        features[f"{name}_known"] = float(known)

    def place(self, layer):
        """How deep a layer sits, 0 for the stem and 1 for the head."""
        return 1.0 if layer == self.layers[-1] else layer / (self.depth + 1)

    def glob(self):
        f, p, c = {}, self.p, self.p.context
        loss = float(p.validation_loss[self.k])
        f["epoch_fraction"] = self.epoch / self.horizon
        f["remaining_fraction"] = (self.horizon - self.epoch) / self.horizon
        self.optional(f, "log_train_loss", self.trained, lambda: log(self.s("train_loss")))
        f["log_validation_loss"] = log(loss)
        self.optional(f, "generalisation_gap", self.trained, lambda: loss - self.s("train_loss"))
        # change of the log loss per epoch over 3 epochs, times 10
        slope = lambda: (log(self.s("history", 0)) - log(self.s("history", 3))) / 3 * 10  # noqa: E731
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

    def layer(self):
        nodes = []
        for i, (a, b), size in zip(self.layers, self.fans, self.sizes, strict=True):
            f = {"depth_fraction": self.place(i)} | dict.fromkeys(
                ("is_linear", "is_conv", "is_attention", "is_norm", "is_embedding", "is_other"), 0.0
            )
            f["is_conv" if self.taps > 1 and 0 < i < self.layers[-1] else "is_linear"] = 1.0
            f["log_width_in"], f["log_width_out"] = math.log(a, 64), math.log(b, 64)
            f["log_parameters"] = math.log(size, 1000)
            f["weight_rms"] = self.s("layer_weight_rms", i)
            ratio = lambda i=i: log(self.s("layer_update_rms", i) / (self.s("layer_weight_rms", i) + 1e-8)) + 5  # noqa: E731
            self.optional(
                f, "log_gradient_rms", self.trained, lambda i=i: (log(self.s("layer_gradient_rms", i)) + 5) / 2
            )
            self.optional(f, "log_update_ratio", self.trained, ratio)
            self.optional(f, "gradient_signal_to_noise", self.trained, lambda i=i: self.s("layer_signal_to_noise", i))
            nodes.append(f)
        return nodes

    def activation(self):
        nodes = []
        for i in range(self.depth):
            f = {"is_relu": 1.0} | dict.fromkeys(("is_gelu", "is_silu", "is_tanh", "is_identity", "is_other"), 0.0)
            f |= {name: self.s("activations", i, column) for column, name in enumerate(STATISTICS)}
            self.optional(
                f, "log_backward_rms", self.trained, lambda i=i: (log(self.s("activation_backward_rms", i)) + 8) / 2
            )
            nodes.append(f)
        return nodes

    def parameter(self):
        f = {"log_learning_rate": math.log10(float(self.p.context.learning_rate[self.k])) + 2.5}
        f |= {"momentum": 0.9, "weight_decay": 0.0, "log_parameters": math.log(sum(self.sizes), 1000)}
        self.optional(f, "log_update_rms", self.trained, lambda: log(self.s("update_rms")) + 6)
        return [f]

    def slot(self):
        nodes = []
        for i in range(self.depth):
            f = {f"is_{s.name.lower()}": float(s.name == self.stage[i]) for s in Stage}
            live = self.stage[i] in LIVE
            f["alpha"], f["epochs_in_stage"] = self.alpha[i], self.done[i] / self.horizon
            driven = live and int(self.p.seed_steps[self.k, i]) > 0
            self.optional(
                f, "log_growth_gradient", self.trained, lambda i=i: (log(self.s("growth_gradient", i)) + 3) / 2
            )
            self.optional(f, "log_seed_gradient_rms", driven, lambda i=i: (log(self.s("seed_gradient_rms", i)) + 5) / 2)
            known = bool(self.p.statistics.contribution_known[self.k, i])
            self.optional(f, "contribution", known, lambda i=i: self.s("contribution", i))
            f["contribution_age"] = self.s("contribution_age", i) / self.horizon if known else 0.0
            change = lambda i=i: float(self.p.validation_loss[self.k]) - self.s("germination_loss", i)  # noqa: E731
            self.optional(f, "change_since_germination", live, change)
            rest = self.p.lifecycle_spec.embargo_epochs
            f["embargo_left"] = (rest - self.done[i]) / rest if self.stage[i] == "EMBARGOED" else 0.0
            nodes.append(f)
        return nodes

    def blueprint(self):
        nodes = []
        for b, name in enumerate(self.names):
            f = {"log_parameters": math.log(self.seed_sizes[name] / sum(self.sizes))}
            f |= {"log_flops": log(self.seed_flops[name] / self.flops), "mixes_tokens": float(name in MIXING)}
            f |= {"gated": float(name in GATED), "residual": float(name not in ("norm", "bypass", "widen"))}
            f |= {"widens": float(name == "widen")}
            known = bool(self.p.statistics.fared_known[self.k, b])
            self.optional(f, "fared", known, lambda b=b: self.s("fared", b))
            nodes.append(f)
        return nodes

    def nodes(self):
        """node type -> {place: features}."""
        built = {"global": self.glob(), "activation": self.activation(), "parameter": self.parameter()}
        built |= {"slot": self.slot(), "blueprint": self.blueprint()}
        places = {node: dict(enumerate(rows)) for node, rows in built.items()}
        return places | {"layer": dict(zip(self.layers, self.layer(), strict=True))}

    def edges(self):
        """relation -> list of (target, source, attributes by name)."""
        edges = {relation: [] for relation in SCHEMA.relations}
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


def assert_is_naive(toy, graph, population, horizon=HORIZON):
    assert len(graph) == population.hosts
    for k in range(population.hosts):
        naive = Naive(toy, population, k, horizon)
        for node, rows in naive.nodes().items():
            names = SCHEMA.nodes[node]
            assert all(set(row) == set(names) for row in rows.values()), node
            expected = torch.zeros_like(graph.x[node][k])  # padding is 0
            for place, row in rows.items():
                expected[place] = torch.tensor([clip(row[name]) for name in names])
            torch.testing.assert_close(
                graph.x[node][k], expected, rtol=1e-4, atol=2e-5, msg=lambda m, n=node: f"{n}: {m}"
            )
            assert graph.node_mask[node][k].nonzero().flatten().tolist() == sorted(rows)
        for relation, rows in naive.edges().items():
            edges = graph.edges[relation]
            there = edges.mask[k]
            names = SCHEMA.relations[relation]
            expected = torch.tensor([[clip(row[2][name]) for name in names] for row in rows]).view(-1, len(names))
            torch.testing.assert_close(edges.attr[k][there], expected, rtol=1e-5, atol=1e-6)
            assert not edges.attr[k][~there].any()
            for value, column in ((edges.target, 0), (edges.source, 1)):
                assert value.dtype == torch.int64
                assert value[k][there].tolist() == [row[column] for row in rows]


@pytest.mark.parametrize(("task", "tag", "auto_blend"), [("mlp", 1, None), ("grid", 2, None), ("causal", 3, 1)])
def test_observer_equals_the_naive_builder(toy, task, tag, auto_blend):
    p = toy.population(KEYS, task, mixed=True, width=6, steps=3, auto_blend=auto_blend)
    observer, seen = Observer(p, HORIZON), set()
    assert_is_naive(toy, observer(), p)
    for _ in range(7):
        toy.act(p, KEYS, tag)
        p.train_epoch()
        seen |= set(p.lifecycle.stage.flatten().tolist())
        assert_is_naive(toy, observer(), p)
    assert len(seen) >= 5
    assert len(p.context.depth.unique()) == 3


@pytest.mark.parametrize("stages", [1, 5])
def test_naive_in_another_shape_of_host(toy, stages):
    data = toy.data(inputs=9, classes=7)
    p = toy.population(KEYS[:3], data=data, width=5, stages=stages, mixed=True)
    toy.walk(p, KEYS[:3], 4)
    assert_is_naive(toy, Observer(p, 7)(), p, horizon=7)


def test_naive_after_an_action_before_its_epoch_and_after_some_hosts_have_started_anew(toy):
    p = toy.population(KEYS, "grid", mixed=True)
    toy.walk(p, KEYS, 4)
    toy.act(p, KEYS)
    assert_is_naive(toy, Observer(p, HORIZON)(), p)
    p.train_epoch()
    p.reset(torch.tensor([3, 1]), toy.context([61, 62], mixed=True))
    assert_is_naive(toy, Observer(p, HORIZON)(), p)
    toy.walk(p, KEYS, 2)
    assert_is_naive(toy, Observer(p, HORIZON)(), p)


@pytest.mark.parametrize("seeds", [0, 1, 3, 8, 1 << 30])
def test_seeds_left(toy, seeds):
    p = toy.population(KEYS[:2])
    p.context.seeds[:] = seeds
    p.germinated[1] = min(seeds, 2)
    left = Observer(p, HORIZON)().x["global"][:, 0, SCHEMA.feature("global", "seeds_left")]
    assert left.tolist() == [min(seeds, 8) / 4, min(max(seeds - 2, 0), 8) / 4]


@pytest.mark.parametrize("task", TASKS)
def test_room_does_not_show(toy, task):
    """What is left without padding is what a host in a population of its own size shows."""
    p = toy.population(KEYS, task, mixed=True, width=6)
    toy.walk(p, KEYS, 4)
    exact = [toy.exact(p, k) for k in range(len(KEYS))]
    for one in (p, *exact):
        one.train_epoch()
    graph = Observer(p, HORIZON)()
    for k, q in enumerate(exact):
        own, depth = Observer(q, HORIZON)(), q.slots
        assert all(mask.all() for mask in own.node_mask.values())
        for node, x in own.x.items():
            left = graph.x[node][k][graph.node_mask[node][k]]
            torch.testing.assert_close(left, x[0], rtol=2e-3, atol=2e-3, msg=lambda m, n=node: f"{n}: {m}")
        for relation, edges in own.edges.items():
            roomy = graph.edges[relation]
            mask, whole = roomy.mask[k], edges.mask[0]
            for node, left, mine in (
                (relation[0], roomy.source[k][mask], edges.source[0][whole]),
                (relation[2], roomy.target[k][mask], edges.target[0][whole]),
            ):
                head = (left == p.slots + 1) & (node == "layer")
                assert torch.equal(torch.where(head, depth + 1, left), mine)
            torch.testing.assert_close(roomy.attr[k][mask], edges.attr[0][whole], rtol=1e-4, atol=1e-5)
        verb, slot, choice = toy.layout(q).table()
        index = [
            toy.layout(p).index(*action) for action in zip(verb.tolist(), slot.tolist(), choice.tolist(), strict=True)
        ]
        assert torch.equal(graph.action_mask[k][index], own.action_mask[0])
        assert graph.action_mask[k].sum() == own.action_mask.sum()
