import math

import pytest
import torch

from esper.graph.schema import SCHEMA
from esper.graph.space import BOUND
from esper.growth.lifecycle import Stage
from esper.growth.observation import Observer

HORIZON = 12
KEYS = [51, 52, 53, 54, 55]
LIVE = ("TRAINING", "BLENDING", "HOLDING", "FOSSILIZED")
HIDDEN = {"mlp": 115, "glu": 175, "low_rank": 20, "norm": 10}  # parameters at width 5
FLOPS = {"mlp": 100, "glu": 150, "low_rank": 20, "norm": 20}


def log(value):
    return math.log(max(value, 1e-8))


def clip(value):
    return BOUND if math.isnan(value) else min(max(value, -BOUND), BOUND)


class Naive:
    """The graph of one host, one node, one edge, one number at a time."""

    def __init__(self, population, host, horizon=HORIZON):
        self.p, self.k, self.horizon = population, host, horizon
        spec = population.spec
        widths = [spec.inputs] + [spec.width] * spec.stages + [spec.classes]
        self.fans = [(widths[i], widths[i + 1]) for i in range(spec.stages + 1)]
        self.sizes = [a * b + b for a, b in self.fans]
        self.flops = sum(a * b for a, b in self.fans)
        self.slots, self.layers = spec.stages, spec.stages + 1
        life = population.lifecycle
        self.stage = [Stage(s).name for s in life.stage[host].tolist()]
        self.kind = [self.names()[b] if b >= 0 else None for b in life.blueprint[host].tolist()]
        self.alpha, self.done = life.alpha[host].tolist(), life.epochs[host].tolist()
        self.epoch = int(population.epoch[host])
        self.trained = self.epoch > 0

    def names(self):
        return [b.name for b in self.p.catalogue]

    def s(self, name, *index):
        return float(getattr(self.p.statistics, name)[(self.k, *index)])

    @staticmethod
    def optional(features, name, known, value):
        features[name] = value() if known else 0.0
        features[f"{name}_known"] = float(known)

    def glob(self):
        f, p = {}, self.p
        f["epoch_fraction"] = self.epoch / self.horizon
        f["remaining_fraction"] = (self.horizon - self.epoch) / self.horizon
        self.optional(f, "log_train_loss", self.trained, lambda: log(self.s("train_loss")))
        f["log_validation_loss"] = log(float(p.validation_loss[self.k]))
        self.optional(
            f, "generalisation_gap", self.trained, lambda: float(p.validation_loss[self.k]) - self.s("train_loss")
        )
        # change of the log loss per epoch over 3 epochs, times 10
        self.optional(
            f,
            "slope",
            self.epoch >= 3,
            lambda: (log(self.s("history", 0)) - log(self.s("history", 3))) / 3 * 10,
        )
        f["log_learning_rate"] = math.log10(float(p.context.learning_rate[self.k])) + 2.5
        f["log_train_size"] = math.log10(int(p.context.train_size[self.k])) - 2.5
        kept = sum(HIDDEN[self.kind[i]] for i in range(self.slots) if self.stage[i] in ("HOLDING", "FOSSILIZED"))
        f["log_parameter_growth"] = math.log((sum(self.sizes) + kept) / sum(self.sizes))
        f["extra_flops_ratio"] = float(p.extra_flops[self.k]) / (self.horizon * self.flops)
        f["live_fraction"] = sum(s in LIVE for s in self.stage) / self.slots
        return [f]

    def layer(self):
        nodes = []
        for i, (a, b) in enumerate(self.fans):
            f = {"depth_fraction": i / (self.layers - 1), "is_linear": 1.0}
            f |= dict.fromkeys(("is_conv", "is_attention", "is_norm", "is_embedding", "is_other"), 0.0)
            f["log_width_in"], f["log_width_out"] = math.log(a, 64), math.log(b, 64)
            f["log_parameters"] = math.log(self.sizes[i], 1000)
            f["weight_rms"] = self.s("layer_weight_rms", i)
            self.optional(
                f, "log_gradient_rms", self.trained, lambda i=i: (log(self.s("layer_gradient_rms", i)) + 5) / 2
            )
            self.optional(
                f,
                "log_update_ratio",
                self.trained,
                lambda i=i: (log(self.s("layer_update_rms", i) / self.s("layer_weight_rms", i)) + 5) / 2,
            )
            self.optional(f, "gradient_signal_to_noise", self.trained, lambda i=i: self.s("layer_signal_to_noise", i))
            nodes.append(f)
        return nodes

    def activation(self):
        nodes = []
        for i in range(self.slots):
            f = {"is_relu": 1.0} | dict.fromkeys(("is_gelu", "is_silu", "is_tanh", "is_identity", "is_other"), 0.0)
            for column, name in enumerate(("dead_fraction", "saturated_fraction", "mean", "std", "effective_rank")):
                f[name] = self.s("activations", i, column)
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
        for i in range(self.slots):
            f = {f"is_{s.name.lower()}": float(s.name == self.stage[i]) for s in Stage}
            live = self.stage[i] in LIVE
            f["alpha"], f["epochs_in_stage"] = self.alpha[i], self.done[i] / self.horizon
            driven = live and int(self.p.seed_steps[self.k, i]) > 0
            self.optional(f, "log_seed_gradient_rms", driven, lambda i=i: (log(self.s("seed_gradient_rms", i)) + 5) / 2)
            known = bool(self.p.statistics.contribution_known[self.k, i])
            self.optional(f, "contribution", known, lambda i=i: self.s("contribution", i))
            f["contribution_age"] = self.s("contribution_age", i) / self.horizon if known else 0.0
            self.optional(
                f,
                "change_since_germination",
                live,
                lambda i=i: float(self.p.validation_loss[self.k]) - self.s("germination_loss", i),
            )
            rest = self.p.lifecycle_spec.embargo_epochs
            f["embargo_left"] = (rest - self.done[i]) / rest if self.stage[i] == "EMBARGOED" else 0.0
            nodes.append(f)
        return nodes

    def blueprint(self):
        nodes = []
        for b, name in enumerate(self.names()):
            f = {"log_parameters": math.log(HIDDEN[name] / sum(self.sizes)), "log_flops": log(FLOPS[name] / self.flops)}
            f |= {"mixes_tokens": 0.0, "gated": float(name == "glu"), "residual": float(name != "norm"), "widens": 0.0}
            known = bool(self.p.statistics.fared_known[self.k, b])
            self.optional(f, "fared", known, lambda b=b: self.s("fared", b))
            nodes.append(f)
        return nodes

    def nodes(self):
        built = {"global": self.glob(), "layer": self.layer(), "activation": self.activation()}
        return built | {"parameter": self.parameter(), "slot": self.slot(), "blueprint": self.blueprint()}

    def edges(self):
        """relation -> list of (target, source, attributes by name)."""
        edges = {relation: [] for relation in SCHEMA.relations}
        last = self.layers - 1

        def ratio(i):
            return math.log(self.fans[i][1] / self.fans[i][0])

        for i in range(last):
            nearby = {"depth_gap": 1 / last, "log_width_ratio": ratio(i + 1), "is_skip": 0.0}
            edges["layer", "feeds", "layer"].append((i + 1, i, nearby))
            at, after = {"depth": i / last, "log_width_ratio": ratio(i)}, {"depth": (i + 1) / last}
            edges["layer", "feeds", "activation"].append((i, i, at))
            edges["activation", "feeds", "layer"].append((i + 1, i, after | {"log_width_ratio": ratio(i + 1)}))
        for i in range(self.layers):
            edges["parameter", "tunes", "layer"].append((i, 0, {"share": self.sizes[i] / sum(self.sizes)}))
        for i in range(self.slots):
            state = {"alpha": self.alpha[i], "stage": Stage[self.stage[i]].value / 6}
            edges["slot", "reads", "layer"].append((i, i, state))  # it reads the layer before it
            edges["slot", "writes", "layer"].append((i + 1, i, state))  # and feeds the one behind it
            for side in (i, i + 1):
                edges["layer", "hosts", "slot"].append((i, side, state))
            for j in range(i + 1, self.slots):
                edges["slot", "precedes", "slot"].append((j, i, {"distance": (j - i) / last}))
            for b, name in enumerate(self.names()):
                fit = {
                    "legal": float(self.stage[i] == "DORMANT"),
                    "relative_cost": math.log(1 + HIDDEN[name] / sum(self.sizes)),
                    "alpha": self.alpha[i] if self.kind[i] == name else 0.0,
                }
                edges["blueprint", "fits", "slot"].append((i, b, fit))
                edges["slot", "fits", "blueprint"].append((b, i, fit))
        for node, rows in self.nodes().items():
            if node != "global":
                for i in range(len(rows)):
                    edges["global", "writes", node].append((i, 0, {"presence": 1.0}))
                    edges[node, "informs", "global"].append((0, i, {"presence": 1.0}))
        return {relation: sorted(rows, key=lambda row: row[:2]) for relation, rows in edges.items()}


def assert_is_naive(graph, population, hosts, horizon=HORIZON):
    for k in range(hosts):
        naive = Naive(population, k, horizon)
        for node, rows in naive.nodes().items():
            names = SCHEMA.nodes[node]
            assert all(set(row) == set(names) for row in rows), node
            expected = torch.tensor([[clip(row[name]) for name in names] for row in rows])
            torch.testing.assert_close(
                graph.x[node][k], expected, rtol=1e-4, atol=2e-5, msg=lambda m, n=node: f"{n}: {m}"
            )
            assert graph.node_mask[node][k].tolist() == [True] * len(rows)
        for relation, rows in naive.edges().items():
            edges = graph.edges[relation]
            assert edges.target[k].tolist() == [row[0] for row in rows]
            assert edges.source[k].tolist() == [row[1] for row in rows]
            assert edges.mask[k].tolist() == [True] * len(rows)
            expected = torch.tensor([[row[2][name] for name in SCHEMA.relations[relation]] for row in rows])
            torch.testing.assert_close(edges.attr[k], expected, rtol=1e-5, atol=1e-6)


def grown(toy, **kwargs):
    return toy.population(KEYS, toy.data(inputs=6), width=5, steps=3, **kwargs)


@pytest.mark.parametrize(("tag", "auto_blend"), [(1, None), (2, None), (3, 1)])
def test_observer_equals_the_naive_builder(toy, tag, auto_blend):
    p = grown(toy, observed=3, auto_blend=auto_blend)
    observer, seen = Observer(p, HORIZON), set()
    assert_is_naive(observer(), p, 3)
    for _ in range(9):
        toy.act(p, KEYS, tag)
        p.train_epoch()
        seen |= set(p.lifecycle.stage[:3].flatten().tolist())
        assert_is_naive(observer(), p, 3)
    assert len(seen) >= 5


def test_naive_in_another_shape_of_host(toy):
    p = toy.population(KEYS[:2], toy.data(inputs=9, classes=7), width=5, stages=5)
    toy.walk(p, KEYS[:2], 4)
    assert_is_naive(Observer(p, 7)(), p, 2, horizon=7)


def test_naive_after_an_action_and_before_its_epoch(toy):
    p = grown(toy)
    toy.walk(p, KEYS, 4)
    toy.act(p, KEYS)
    assert_is_naive(Observer(p, HORIZON)(), p, 5)


def test_naive_after_some_hosts_have_started_anew(toy):
    p = grown(toy)
    toy.walk(p, KEYS, 6)
    p.reset(torch.tensor([3, 1]), toy.context([61, 62]))
    assert_is_naive(Observer(p, HORIZON)(), p, 5)
    toy.walk(p, KEYS, 2)
    assert_is_naive(Observer(p, HORIZON)(), p, 5)


def test_sizes_are_those_of_the_schema(toy):
    graph = Observer(grown(toy), HORIZON)()
    assert list(graph.x) == list(SCHEMA.nodes)
    assert {node: x.shape[2] for node, x in graph.x.items()} == {n: len(f) for n, f in SCHEMA.nodes.items()}
    assert list(graph.edges) == list(SCHEMA.relations)
    for relation, edges in graph.edges.items():
        assert edges.attr.shape[2] == len(SCHEMA.relations[relation])
    assert {node: x.shape[1] for node, x in graph.x.items()} == {
        "global": 1, "layer": 4, "activation": 3, "parameter": 1, "slot": 3, "blueprint": 4
    }  # fmt: skip


def tensors(graph):
    return graph.to_dict()


def test_twins_do_not_show(toy):
    p = grown(toy, observed=2)
    toy.walk(p, KEYS, 5)
    observer = Observer(p, HORIZON)
    before = {k: v.clone() for k, v in tensors(observer()).items()}
    for state in (p.theta, p.exp_avg, p.context.learning_rate, p.extra_flops, p.validation_loss):
        state[2:] = float("nan")
    for state in (p.epoch, p.steps, p.seed_steps, p.lifecycle.epochs, p.context.train_size):
        state[2:] += 5
    p.lifecycle.stage[2:] = torch.tensor([Stage.HOLDING, Stage.DORMANT, Stage.EMBARGOED])
    p.lifecycle.blueprint[2:] = 1
    p.lifecycle.alpha[2:] = 1.0
    after = tensors(observer())
    assert all(len(v) == 2 for v in after.values())
    assert all(torch.equal(before[k], v) for k, v in after.items())


def test_the_action_mask_is_the_layout_s(toy):
    p = grown(toy, observed=3)
    toy.walk(p, KEYS, 5)
    mask = Observer(p, HORIZON)().action_mask
    assert torch.equal(mask, toy.layout(p).mask(p.lifecycle.stage[:3]))
    assert not (mask == mask[0]).all()


def test_absent_features_are_zero(toy):
    p = grown(toy)
    observer = Observer(p, HORIZON)
    for _ in range(5):
        for value in vars(p.statistics).values():
            if value.is_floating_point():
                value += 0.1  # nothing is hidden by a zero that happens to be there
        graph = observer()
        for node, names in SCHEMA.nodes.items():
            for name in names:
                if f"{name}_known" in names:
                    known = graph.x[node][..., SCHEMA.feature(node, f"{name}_known")]
                    value = graph.x[node][..., SCHEMA.feature(node, name)]
                    assert set(known.unique().tolist()) <= {0.0, 1.0}
                    assert (value[known == 0] == 0).all(), name
        toy.act(p, KEYS)
        p.train_epoch()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 0.0])
def test_features_stay_within_bounds(toy, poison):
    p = grown(toy)
    toy.walk(p, KEYS, 4)
    p.lifecycle.stage[0] = Stage.HOLDING
    for value in vars(p.statistics).values():
        if value.is_floating_point():
            value.fill_(poison)
        elif value.dtype == torch.bool:
            value.fill_(True)
    p.validation_loss.fill_(poison)
    graph = Observer(p, HORIZON)()
    for value in tensors(graph).values():
        assert value.isfinite().all()
    for x in graph.x.values():
        assert x.abs().max() <= BOUND
    for edges in graph.edges.values():
        assert edges.attr.abs().max() <= BOUND


def test_a_diverged_host_is_still_observed_in_bounds(toy):
    p = grown(toy)
    p.theta[1] = float("nan")
    p.theta[2] *= 1e20
    toy.walk(p, KEYS, 3)
    for x in Observer(p, HORIZON)().x.values():
        assert x.isfinite().all()
        assert x.abs().max() <= BOUND


def test_a_graph_outlives_its_population_s_next_epoch(toy):
    p = grown(toy)
    toy.walk(p, KEYS, 2)
    graph = Observer(p, HORIZON)()
    before = {k: v.clone() for k, v in tensors(graph).items()}
    toy.walk(p, KEYS, 3)
    p.reset(torch.arange(5), toy.context([1, 2, 3, 4, 5]))
    assert all(torch.equal(before[k], v) for k, v in tensors(graph).items())


def test_removed_seeds_leave_a_consistent_graph(toy):
    p = grown(toy)
    for host in range(5):
        toy.plant(p, host, 1, host % 4)
        p.lifecycle.blend(toy.at(p, host, 1), 8)
    for _ in range(4):
        p.train_epoch()
    p.remove_unfinished(torch.tensor([True, False, True, False, True]))
    graph = Observer(p, HORIZON)()
    slot, known = graph.x["slot"], SCHEMA.feature("slot", "contribution_known")
    assert slot[[1, 3], 1, known].tolist() == [1.0, 1.0]
    # The seeds of hosts 0, 2 and 4 are gone, and their losses were evaluated anew.
    loss = graph.x["global"][:, 0, SCHEMA.feature("global", "log_validation_loss")]
    torch.testing.assert_close(loss, p.validation_loss.log())
    assert slot[[0, 2, 4], 1, known].tolist() == [0.0, 0.0, 0.0]
