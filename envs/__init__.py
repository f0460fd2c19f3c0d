"""Growth environments.

`import envs` makes them known to Gymnasium; `gymnasium.make("envs:esper/Segment-v0")` does both.
"""

from gymnasium.envs.registration import register

IDS = {
    "segment": "esper/Segment-v0",
    "digits": "esper/Digits-v0",
    "digits_conv": "esper/DigitsConv-v0",
    "signal": "esper/Signal-v0",
    "mnist5k": "esper/Mnist5k-v0",
    "charlm": "esper/CharLM-v0",
    "surrogate": "esper/Surrogate-v0",
    "super_resolution": "esper/SuperResolution-v0",
}
"""Gymnasium's id of each environment of `conf/env`."""

for _name, _id in IDS.items():
    register(
        id=_id,
        entry_point="envs.gym_env:SingleGrowthEnv",
        vector_entry_point="envs.gym_env:VectorGrowthEnv",
        kwargs={"name": _name},
    )
