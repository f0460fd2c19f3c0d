"""Trains SB3-contrib's MaskablePPO on a growth environment through Gymnasium, as anybody's agent would.

    pip install sb3-contrib
    python scripts/maskable_ppo.py [--id esper/Digits-v0] [--steps 20000] [--envs 4]

It reads the padded Dict observation and the action mask and nothing of Esper's own. Each environment is one host, so
this is slower than the trainer, which steps all hosts at once: about 3 minutes.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import gymnasium
import torch
from sb3_contrib import MaskablePPO
from stable_baselines3.common.env_util import make_vec_env

RESULT = Path(__file__).parent / "results" / "maskable_ppo.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--id", default="esper/Digits-v0")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--envs", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    environments = make_vec_env(lambda: gymnasium.make(f"envs:{arguments.id}"), n_envs=arguments.envs, seed=1)
    agent = MaskablePPO("MultiInputPolicy", environments, n_steps=128, batch_size=128, seed=1, verbose=1)
    start = time.perf_counter()
    agent.learn(arguments.steps)
    returns = [episode["r"] for episode in agent.ep_info_buffer]
    found = {
        "id": arguments.id,
        "steps": agent.num_timesteps,
        "seconds": round(time.perf_counter() - start),
        "mean_return_of_last_episodes": round(sum(returns) / len(returns), 4),
        "episodes_averaged": len(returns),
    }
    RESULT.write_text(json.dumps(found, indent=2) + "\n")
    print(found)


if __name__ == "__main__":
    main()
