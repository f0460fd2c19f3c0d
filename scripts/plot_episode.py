"""Draws one grown host over time: its validation loss beside its twin's, and what lived in each slot.

python scripts/plot_episode.py RUN_DIR [--instance 0] [--out docs/grown_host.png]
"""

import argparse
from pathlib import Path

from envs.config import GrowthConfig
from envs.making import saved_env_config
from esper.growth.chart import lifecycle_chart
from esper.tamiyo.baselines.simple import Never
from esper.tamiyo.loading import load_state, policy_of
from trainers.evaluation import TamiyoController, play
from trainers.recording import Recorder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run directory, a checkpoint file or a shipped policy")
    parser.add_argument("--instance", type=int, default=0, help="number of the held-out instance")
    parser.add_argument("--out", type=Path, default=Path("docs/grown_host.png"))
    arguments = parser.parse_args()
    _, state = load_state(arguments.run)
    config = saved_env_config(state["config"]["env"])
    if not isinstance(config, GrowthConfig):
        parser.error(f"{arguments.run}: nothing grows in env={config.name}")
    instance = arguments.instance
    one = range(instance, instance + 1)
    grown, alone = Recorder(), Recorder()
    controller = TamiyoController(policy_of(state), seed=0, deterministic=True)
    played = play(controller, config, one, 0, "cpu", watch=grown)
    play(Never(), config, one, 0, "cpu", watch=alone)
    trace = grown.recording().trace(0, config.blueprints, int(played["length"][0]), alone.recording())
    title = f"{config.name}, held-out instance {instance}, return {played['return'][0]:+.3f}"
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    lifecycle_chart(trace, title, host="host, grown by Tamiyo").savefig(arguments.out)
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
