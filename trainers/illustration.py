"""Which pictures go with an evaluation in a growth environment, drawn from what has been recorded of it."""

from __future__ import annotations

import numpy as np

from envs.config import EnvConfig, GrowthConfig
from envs.contexts import KINDS
from esper.tamiyo.baselines.simple import Never
from esper.tamiyo.policy import GraphPolicy
from trainers import gaze, pictures
from trainers.evaluation import play
from trainers.pictures import Picture
from trainers.progress import Reporter
from trainers.recording import Recorder, Recording


def draw(
    policy: GraphPolicy,
    config: GrowthConfig,
    seed: int,
    device: str,
    recording: Recording,
    played: dict[str, np.ndarray],
) -> list[Picture]:
    """The pictures of an evaluation.

    Args:
        policy: what was evaluated.
        config: of the environment.
        seed: of the instances.
        recording: of the policy's episodes, with graphs if it attends.
        played: what `play` returned of them.
    """
    blueprints = list(config.blueprints)
    # Other growth environments have contexts of one kind only.
    kinds = [KINDS[kind] if isinstance(config, EnvConfig) else "" for kind in played["kind"]]
    chosen = typical(played["return"], played["germinated"])
    with Reporter("drawing", 4, "steps") as reporter:
        beside = Recorder()
        play(Never(), config, range(chosen, chosen + 1), seed, device, watch=beside)
        reporter.update(1)
        trace = recording.trace(chosen, blueprints, int(played["length"][chosen]), beside.recording())
        kind = f" ({kinds[chosen]})" if kinds[chosen] else ""
        title = f"{config.name}, held-out instance {chosen}{kind}, return {played['return'][chosen]:+.3f}"
        drawn = [pictures.lifecycle(trace, title)]
        reporter.update(2)
        counts = recording.germinations(len(blueprints), played["length"].tolist())
        drawn.append(pictures.plantings(counts, kinds, blueprints))
        reporter.update(3)
        if recording.graphs and (focus := gaze.focus(policy, recording.graphs)):
            drawn.append(pictures.gaze(focus))
        reporter.update(4)
    return drawn


def typical(returns: np.ndarray, germinated: np.ndarray) -> int:
    """The episode with the median return (the lower of two) among those in which something was planted, or among all.

    Args:
        returns, germinated: [N], of the episodes.
    """
    among = np.flatnonzero(germinated > 0)
    among = among if len(among) else np.arange(len(returns))
    order = among[np.argsort(returns[among], kind="stable")]
    return int(order[(len(order) - 1) // 2])
