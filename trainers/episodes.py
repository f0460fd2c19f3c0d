"""The latest episodes of training, and what of them is logged."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

from torch import Tensor

LATEST = 100  # episodes over which rollout/ and growth/ are averaged, as in Stable-Baselines3
SCALARS = {
    "rollout/ep_rew_mean": "return",
    "rollout/ep_len_mean": "length",
    "growth/germinated": "germinated",
    "growth/fossilized": "fossilized",
    "growth/culled": "culled",
    "growth/diverged": "diverged",
    "growth/params_ratio": "params_ratio",
}

Episode = dict[str, float]


class LatestEpisodes(deque[Episode]):
    """What those of SCALARS that the environment tells were in the latest episodes, at most LATEST."""

    def __init__(self, episodes: Iterable[Episode] = ()):
        super().__init__(episodes, LATEST)

    def note(self, ended: Mapping[str, Tensor]) -> None:
        """Adds episodes; what is told of them is [K] each."""
        columns = {key: ended[key].tolist() for key in SCALARS.values() if key in ended}
        for values in zip(*columns.values(), strict=True):
            self.append(dict(zip(columns, map(float, values), strict=True)))

    def mean(self, key: str) -> float:
        """Of what episodes were told to be; 0 without any."""
        return sum(episode[key] for episode in self) / len(self) if self else 0.0

    def scalars(self) -> dict[str, float]:
        """The means, by the names under which they are logged."""
        return {name: self.mean(key) for name, key in SCALARS.items() if self and key in self[0]}
