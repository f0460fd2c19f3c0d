"""One process of several that train a network together: python replica.py RANK WORLD INIT OUT; see test_settings.py."""

from __future__ import annotations

import sys

import torch
from conftest import Loop, Scripted, features  # type: ignore[import-not-found]
from torch import distributed
from torch.nn import functional as F

import esper
from esper.growth.lifecycle import LifecycleSpec


def main(rank: int, world: int, init: str, out: str) -> None:
    torch.set_num_threads(1)
    own = Loop(features(), optimizer=torch.optim.SGD, lr=0.1)  # Adam would make steps of rounding
    network = own.model
    if world > 1:
        distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=world)
        own.model = torch.nn.parallel.DistributedDataParallel(network)
    # The processes must not need to decide alike.
    policy = Scripted(("GERMINATE", 1, 3), None, None, ("FOSSILIZE", 1, 0)) if rank == 0 else "never"
    growth = esper.grow(
        own.model,
        policy=policy,
        budget=esper.Budget(parameters=None),
        epochs=7,
        lifecycle=LifecycleSpec(auto_blend=1, auto_ramp=1),
    )
    for epoch in range(7):
        order = torch.randperm(300, generator=torch.Generator().manual_seed(epoch))
        for batch in order[:160].split(32):
            own.optimizer.zero_grad()
            part = batch.chunk(world)[rank]
            F.cross_entropy(own.model(own.x[part]), own.y[part]).backward()
            own.optimizer.step()
        growth.step(own.validate, own.optimizer)
    growth.finish()
    torch.save({"state": network.state_dict(), "report": str(growth.report())}, out)
    if world > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
