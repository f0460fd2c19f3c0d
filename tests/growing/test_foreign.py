"""Networks that other packages have written grow, and are what they were when growing finishes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.growth.lifecycle import LifecycleSpec

IMAGES, ROWS = torch.randn(24, 1, 16, 16), torch.randn(24, 12)


class Rows(nn.Module):
    """Calls a network for tables with its second argument."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.network(x, None)
        return output


def residual_network() -> nn.Module:
    nets = pytest.importorskip("monai.networks.nets")
    model: nn.Module = nets.ResNet(
        "basic", [1, 1, 1, 1], [8, 8, 16, 16], spatial_dims=2, n_input_channels=1, conv1_t_size=3, num_classes=4
    )
    return model


def mixer() -> nn.Module:
    package = pytest.importorskip("mlp_mixer_pytorch")
    model: nn.Module = package.MLPMixer(
        image_size=16, channels=1, patch_size=4, dim=16, depth=3, num_classes=4, dropout=0.1
    )
    return model


def table_transformer() -> nn.Module:
    package = pytest.importorskip("rtdl_revisiting_models")
    kwargs = package.FTTransformer.get_default_kwargs(n_blocks=2)
    return Rows(package.FTTransformer(n_cont_features=12, cat_cardinalities=[], d_out=4, **kwargs))


@pytest.mark.parametrize("make", [residual_network, mixer, table_transformer])
def test_a_whole_life_in_networks_of_other_packages(
    make: Callable[[], nn.Module], scripted: Callable[..., Any]
) -> None:
    torch.manual_seed(0)
    model, x, y = make(), ROWS if make is table_transformer else IMAGES, torch.arange(24) % 4
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    # One seed lives to the end, one is culled, and one is still in training then.
    script = scripted(("GERMINATE", 0, 1), ("GERMINATE", 1, 3), None, ("CULL", 1, 0), ("FOSSILIZE", 0, 0))
    lifecycle = LifecycleSpec(auto_blend=1, auto_ramp=1)
    growth = esper.grow(model, policy=script, budget=esper.Budget(parameters=None), epochs=7, lifecycle=lifecycle)

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(x), y)

    def validate() -> float:
        with torch.no_grad():
            value = float(nn.functional.cross_entropy(model.eval()(x), y))
        model.train()
        return value

    for _ in range(7):
        for _ in range(2):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        growth.step(validate, optimizer)
    report = growth.report()
    assert len(report.slots) >= 2
    assert [step.action.split(" ")[0] for step in report.decisions] == [
        "germinate", "germinate", "wait", "cull", "fossilise", "wait", "wait",
    ]  # fmt: skip
    with torch.no_grad():
        before = model.eval()(x)
        finished = growth.finish()
        assert torch.equal(finished(x), before)
    assert len(report.kept or []) == 1
    assert sum(p.numel() for p in model.parameters()) == report.decisions[-1].parameters > report.host_parameters
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    fresh = esper.regrow(make(), growth.plan())
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval()(x), before)
