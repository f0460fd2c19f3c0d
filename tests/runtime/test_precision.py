"""Number formats: the names, and the order of scaling, unscaling, clipping and stepping by hand."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from envs.config import load_config
from envs.growth_env import GrowthEnv
from esper.runtime import precision
from esper.runtime.errors import ConfigError
from esper.runtime.precision import LossScaler

CPU = torch.device("cpu")


def scaler_of(name: str, *values: float, lr: float = 1.0) -> tuple[LossScaler, nn.Parameter]:
    """A scaler over one parameter of these values, which SGD with that rate moves."""
    parameter = nn.Parameter(torch.tensor(values))
    return LossScaler(name, torch.optim.SGD([parameter], lr, fused=True), CPU), parameter


def test_an_unknown_format_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"runtime\.precision=fp8: choose one of fp32, bf16, fp16"):
        precision.check("fp8")
    with pytest.raises(ConfigError):
        scaler_of("half", 0.0)
    for name in ("fp32", "bf16", "fp16"):
        precision.check(name)


@pytest.mark.parametrize(("name", "scale"), [("fp32", 1.0), ("bf16", 1.0), ("fp16", 65536.0)])
def test_a_step_by_hand(name: str, scale: float) -> None:
    scaler, parameter = scaler_of(name, 1.0, 2.0)
    loss = (parameter * torch.tensor([3.0, 4.0])).sum()
    scaler.backward(loss)
    assert scaler.scale == scale
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [3 * scale, 4 * scale]
    norm, skipped = scaler.step(loss, 0.5)
    # The norm is that of (3, 4), not of what was scaled, and the step is a tenth of it: 0.5 / 5.
    assert (norm.item(), skipped.item()) == (5.0, 0.0)
    assert parameter.tolist() == pytest.approx([1 - 0.3, 2 - 0.4], rel=1e-5)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_moves_nothing(name: str, bad: float) -> None:
    scaler, parameter = scaler_of(name, 1.0, 2.0)
    before = scaler.scale
    loss = parameter.sum()
    scaler.backward(loss)
    assert parameter.grad is not None
    parameter.grad[1] = bad
    _, skipped = scaler.step(loss, 0.5)
    assert skipped.item() == 1
    assert parameter.tolist() == [1.0, 2.0]
    assert scaler.scale == (before / 2 if name == "fp16" else 1.0)
    parameter.grad = None
    scaler.backward(parameter.sum())
    assert scaler.step(parameter.sum(), 10.0)[1].item() == 0
    assert parameter.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_a_bad_loss_with_fine_gradients_moves_nothing(name: str) -> None:
    scaler, parameter = scaler_of(name, 1.0)
    loss = parameter.sum() + torch.tensor(torch.inf)
    scaler.backward(loss)
    _, skipped = scaler.step(loss, 0.5)
    assert skipped.item() == 1
    assert parameter.tolist() == [1.0]


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_adam_forgets_a_skipped_step(name: str) -> None:
    parameter = nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.Adam([parameter], torch.tensor(0.1), fused=True)
    scaler, moments = LossScaler(name, optimizer, CPU), []
    for factor in (2.0, float("nan"), 2.0):
        optimizer.zero_grad()
        loss = (factor * parameter).sum()
        scaler.backward(loss)
        scaler.step(loss, 10.0)
        state = optimizer.state[parameter]
        moments.append([float(state[key]) for key in ("step", "exp_avg", "exp_avg_sq")])
    # m = 0.1 * 2 and v = 0.001 * 4 after one step; 0.9 * 0.2 + 0.2 and 0.999 * 0.004 + 0.004 after two
    assert moments[0] == pytest.approx([1, 0.2, 0.004])
    assert moments[1] == moments[0]
    assert moments[2] == pytest.approx([2, 0.38, 0.007996])
    assert parameter.item() == pytest.approx(0.8, abs=1e-4)  # two steps of 0.1


def test_the_scale_grows_again_and_is_saved() -> None:
    scaler, parameter = scaler_of("fp16", 1.0, lr=0.0)
    scaler.scaler.load_state_dict({**scaler.scaler.state_dict(), "scale": 8.0, "growth_interval": 2})
    for _ in range(2):
        scaler.backward(parameter.sum())
        scaler.step(parameter.sum(), 1.0)
    assert scaler.scale == 16
    other, _ = scaler_of("fp16", 1.0)
    other.scaler.load_state_dict(scaler.scaler.state_dict())
    assert other.scale == 16


def test_products_of_a_cpu_stay_exact() -> None:
    before = torch.get_float32_matmul_precision()
    precision.set_up("cpu")
    assert torch.get_float32_matmul_precision() == before


# ---- tiny numbers -------------------------------------------------------------------------------------------------

TINY = 1e-20  # its square is below the smallest normal number


@pytest.fixture
def as_it_was() -> Iterator[None]:
    """Nothing that a test sets stays set."""
    flushed = bool(torch.tensor([TINY]).square() == 0)
    threads = torch.get_num_threads()
    yield
    torch.set_flush_denormal(flushed)
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("as_it_was")
def test_set_up_makes_what_is_below_normal_numbers_zero() -> None:
    torch.set_flush_denormal(False)
    assert torch.tensor([TINY]).square() > 0
    precision.set_up("cpu", 2)
    assert torch.tensor([TINY]).square() == 0
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("as_it_was")
def test_native_kernels_flush_for_themselves_alone() -> None:
    """A host whose only signal is tiny learns nothing from it, and the caller's own numbers stay as they are."""
    torch.set_flush_denormal(False)
    config = load_config("segment", "plain", host={"width": [4, 4], "stages": [2, 2]}, engine="native")
    env = GrowthEnv(config, 1)
    env.reset(torch.tensor([1]))
    hosts = env.population
    hosts.exp_avg[:] = TINY * TINY * 1e4  # 1e-36; a tenth less with each step, so that it falls below after some
    hosts.theta[:] = 0.0
    before = hosts.exp_avg.clone()
    for _ in range(20):
        hosts.train_epoch()
    dead = hosts.exp_avg[hosts.exp_avg.abs() < 1e-30]
    assert len(dead) > 10
    assert (dead == 0).all()
    assert (before > 0).all()
    assert torch.tensor([TINY]).square() > 0
