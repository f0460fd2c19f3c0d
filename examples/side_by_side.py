"""What the examples have in common: three networks trained alike, and the table and picture at their end."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from esper.growing import Report

Train = Callable[[nn.Module, torch.optim.Optimizer, int], None]
Score = Callable[[nn.Module, str], tuple[float, float]]
Networks = dict[str, nn.Module]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def arguments(text: str, **defaults: Any) -> argparse.Namespace:
    """The options of an example."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=24, help="of each network")
    parser.add_argument("--policy", default="tamiyo_small", help="who decides: a trained policy, or a baseline by name")
    parser.add_argument("--budget", type=float, default=1.5, help="parameters of the grown network over its own")
    parser.add_argument("--seed", type=int, default=0, help="of initial values and the order of the data")
    parser.add_argument("--out", type=Path, default=Path("runs/examples"), help="where the picture goes")
    parser.set_defaults(**defaults)
    torch.set_num_threads(1)  # more are slower at these sizes
    return parser.parse_args()


def progress(label: str, epoch: int, epochs: int, started: float, note: str = "") -> None:
    """One line for each epoch, or one that changes where there is a terminal."""
    left = (time.monotonic() - started) / (epoch + 1) * (epochs - epoch - 1)
    line = f"{label}: epoch {epoch + 1}/{epochs}  {note}  ETA {left:.0f} s"
    live = sys.stdout.isatty()
    print(f"\r\033[K{line}" if live else line, end="" if live and epoch + 1 < epochs else "\n", flush=True)


def wide_as(make: Callable[[int], nn.Module], target: int) -> nn.Module:
    """Of the networks `make(width)`, the one whose number of parameters is closest to `target`."""
    sizes = {width: parameters(make(width)) for width in range(2, 257)}
    return make(min(sizes, key=lambda width: abs(sizes[width] - target)))


def others(make: Callable[..., nn.Module], size: int, train: Train, rate: float, given: argparse.Namespace) -> Networks:
    """The same network never grown, and one of `size` parameters, both trained as the one that grew."""
    found: Networks = {}
    for label, width in (("the same, never grown", None), ("as large from the start", size)):
        torch.manual_seed(given.seed)
        model = make() if width is None else wide_as(make, width)
        optimizer, started = torch.optim.Adam(model.parameters(), rate), time.monotonic()
        for epoch in range(given.epochs):
            train(model, optimizer, epoch)
            progress(label, epoch, given.epochs, started)
        found[label] = model
    return found


def conclude(networks: Networks, score: Score, report: Report, out: Path, name: str, metric: str) -> None:
    """Prints the report, the networks' scores on the test split, and where the picture is."""
    print(f"\n{report}\n")
    print(f"{'on the test split':32}  parameters    loss   {metric}")
    for label, model in networks.items():
        loss, value = score(model, "test")
        print(f"{label:32}  {parameters(model):10,}  {loss:6.3f}   {value:.2f}")
    out.mkdir(parents=True, exist_ok=True)
    picture = out / f"{name}.png"
    report.chart(picture, f"{name}, grown by {report.controller}")
    print(f"\nits life: {picture}")
