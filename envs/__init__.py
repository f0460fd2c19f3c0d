"""Growth environments.

`import envs` makes them known to Gymnasium; `gymnasium.make("envs:esper/Segment-v0")` does both.
"""

from gymnasium.envs.registration import register

for _name in ("segment", "digits"):
    register(
        id=f"esper/{_name.title()}-v0",
        entry_point="envs.gym_env:SingleGrowthEnv",
        vector_entry_point="envs.gym_env:VectorGrowthEnv",
        kwargs={"name": _name},
    )
