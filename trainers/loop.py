"""The training loop: collect, update, log, save; with everything that a checkpoint needs to go on from there."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from envs.adapter import AdaptedEnv
from envs.config import EnvConfig
from envs.making import make_envs
from esper import attention
from esper.graph.interface import GROWTH
from esper.runtime import checkpoint, seeding
from esper.runtime.errors import ConfigError, EsperError, Preempted, TrainingError
from esper.runtime.telemetry import Telemetry
from esper.simic.learner import Simic
from esper.simic.rollout import Rollout
from esper.tamiyo.actor import Actor
from esper.tamiyo.loading import check_parameters, interface_of, load_state
from esper.tamiyo.policies import make_policy
from esper.tamiyo.policy import Tamiyo
from trainers import board, judging, warm_start
from trainers.config import TrainConfig
from trainers.preemption import Preemption, Stop
from trainers.progress import Reporter

_WINDOW = 100  # episodes over which rollout/ and growth/ are averaged, as in Stable-Baselines3
_EPISODE_SCALARS = {
    "rollout/ep_rew_mean": "return",
    "rollout/ep_len_mean": "length",
    "growth/germinated": "germinated",
    "growth/fossilized": "fossilized",
    "growth/culled": "culled",
    "growth/diverged": "diverged",
    "growth/params_ratio": "params_ratio",
}


class _FilesError(TrainingError):
    """Files could not be written, so nothing can be saved either."""


class Trainer:
    """One run.

    Args:
        config: checked configuration.
        run_dir: the run directory.
        state: a checkpoint to go on from.
        overrides: what the command line said, for the run's card.
    """

    def __init__(
        self,
        config: TrainConfig,
        run_dir: Path,
        state: dict[str, Any] | None = None,
        overrides: Sequence[str] = (),
    ):
        self.config, self.run_dir, self.overrides = config, run_dir, overrides
        device = config.runtime.device
        config.runtime.set_up()
        seeding.seed_everything(config.seed)
        self.env = make_envs(config.env, config.env.num_envs, device=device)
        self.policy = make_policy(config.policy, self.env.interface).to(device)
        if config.init is not None and state is None:
            self._start_from(config.init)
        runtime, acting = config.runtime, config.runtime.actor_device or device
        self.learner = Simic(
            self.policy, config.ppo, config.seed, runtime.precision, runtime.guard("update step", device)
        )
        self.actor = Actor(self.policy, config.seed, guard=runtime.guard("actor", acting), device=acting)
        self.rollout = Rollout(config.ppo.num_steps, config.env.num_envs, device)
        self.step, self.iteration = 0, 0
        self.warm = not config.warm_start.episodes  # there is nothing to be done before PPO
        self.window: deque[dict[str, float]] = deque(maxlen=_WINDOW)
        if state is None:
            # Runs with neighbouring seeds must not share instances, as plain seed + k would make them.
            seeds = seeding.fold(torch.tensor(config.seed), torch.arange(config.env.num_envs))
            self.graph = self.env.reset(seeds)
        else:
            self._restore(state)
        self._boundary: dict[str, Any] = {}
        self._saved, self._saved_at = self.step if state else -1, time.monotonic()
        self._saving_s = 0.0  # what the last snapshot and its file took
        self._best = self._best_score()

    def _start_from(self, given: str) -> None:
        """Takes over the parameters of the policy that the user named as `init`.

        Raises:
            ConfigError: there is none, or it is of another kind.
        """
        _, state = load_state(given, "init")
        if interface_of(state) != self.env.interface:
            raise ConfigError(
                f"init={given}: its graphs or actions differ from those of env={self.config.env.name}; choose a policy "
                "that was trained on an environment of the same kind and sizes"
            )
        check_parameters(self.policy, state, f"init={given}")
        self.policy.load_state_dict(state["learner"]["policy"])

    @property
    def steps_per_iteration(self) -> int:
        return self.config.ppo.num_steps * self.config.env.num_envs

    # ---- the loop -------------------------------------------------------------------------------------------------

    def run(self, preemption: Preemption) -> None:
        """Trains until `ppo.total_steps`, saving checkpoints on the way and at the end; however it ends before, the
        state after the last iteration is saved, if files can be written.

        Raises:
            TrainingError: numbers are not finite, an environment failed, or files could not be written.
            Preempted: a signal came.
        """
        resumed_at = self.step if self.iteration else None
        with self._files_guarded("open the logs"):
            telemetry = Telemetry(self.run_dir, resumed_at, board.LAYOUT)
            size = sum(parameter.numel() for parameter in self.policy.parameters())
            telemetry.text(self.step, "run", board.card(self.config, self.run_dir, self.step, self.overrides, size))
        self.keep()
        try:
            if not self.warm:
                self._warm_start(preemption)
            self._train(telemetry, preemption)
            if not self.config.evaluation.episodes:  # otherwise the run ends with it
                self._conclude(telemetry, {})
        except Stop as stop:
            raise Preempted(f"stopped by {stop.name}; {self._kept()}") from stop
        except _FilesError:
            raise
        except EsperError as error:
            with preemption.held():
                kept = self._kept()
            raise TrainingError(f"{error}; {kept}") from error
        except Exception:
            with preemption.held():
                self._kept()
            raise
        finally:
            with self._files_guarded("close the logs"):
                telemetry.close()

    def _warm_start(self, preemption: Preemption) -> None:
        assert isinstance(self.policy, Tamiyo)
        assert isinstance(self.config.env, EnvConfig)
        with self._files_guarded("warm start"):
            warm_start.run(self.policy, self.config.env, self.config.warm_start, self.config.seed, self.run_dir)
        self.warm = True
        with preemption.held():
            self.keep()
            self.save()

    def _train(self, telemetry: Telemetry, preemption: Preemption) -> None:
        total = self.config.ppo.total_steps
        self.actor.warm_up(self.graph)
        with Reporter("training", total, "steps", self.step) as reporter:
            while self.step < total:
                scalars = self.iterate()
                with preemption.held():  # files are not to be cut short
                    with self._files_guarded("write the logs"):
                        telemetry.log(self.step, scalars)
                        latencies = "tamiyo.gnn.inference.latency_ms.histogram"
                        telemetry.histogram(self.step, latencies, self.actor.latencies_ms)
                    start = time.perf_counter()
                    self.keep()
                    if self._due():
                        self.save()
                    self._saving_s = time.perf_counter() - start
                    reporter.update(self.step, f"return {self._mean_return():+.3f}" if self.window else "")
                if self.learner.failed:  # which has left no mark on the parameters
                    raise TrainingError(self.learner.failed)

    def _kept(self) -> str:
        """Saves the state after the last iteration if that has not been done; says so, and how to go on."""
        step = self._boundary["step"]
        if self._saved != step:
            self.save()
        return f"the state after {step:,} steps is saved, go on with: python -m trainers.train resume={self.run_dir}"

    def _due(self) -> bool:
        """Whether it is time for a checkpoint."""
        every = self.config.checkpoint
        waited = time.monotonic() - self._saved_at >= every.every_seconds
        return self.step >= self.config.ppo.total_steps or self.iteration % every.every == 0 or waited

    def iterate(self) -> dict[str, float]:
        """One collect and one update; returns everything that is logged of them."""
        ppo = self.config.ppo
        start = time.perf_counter()
        self.env.graph_build_s.clear()
        self.actor.latencies_ms.clear()
        self._collect()
        collected = time.perf_counter()
        metrics = self.learner.update(self.rollout, self.step / ppo.total_steps)
        updated = time.perf_counter()
        self.step += self.steps_per_iteration
        self.iteration += 1
        scalars = {}
        if self.window:
            known = {name: key for name, key in _EPISODE_SCALARS.items() if key in self.window[0]}
            scalars = {name: _mean([episode[key] for episode in self.window]) for name, key in known.items()}
        named = ("approx_kl", "clip_fraction", "entropy_loss", "explained_variance", "learning_rate", "loss")
        losses = "policy_gradient_loss", "value_loss", "auxiliary_loss"
        scalars |= {f"train/{name}": metrics[name] for name in (*named, *losses)}
        return scalars | {
            "grad/norm": metrics["grad_norm"],
            "time/fps": self.steps_per_iteration / (updated - start),
            "perf/collect_s": collected - start,
            "perf/update_s": updated - collected,
            "perf/checkpoint_s": self._saving_s,
            "perf/graph_build_ms": 1e3 * _mean(self.env.graph_build_s),
            "perf/graphs_per_s": ppo.epochs * self.steps_per_iteration / (updated - collected),
            "perf/recompiles": float(self.actor.guard.recompiles + self.learner.guard.recompiles),
            "amp/scale": self.learner.scaler.scale,
            "amp/skipped_steps": float(self.learner.skipped_total),
            "tamiyo.gnn.compile_enabled": float(self.actor.guard.enabled),
            "tamiyo.gnn.compile_fallback_total": float(self.actor.guard.fallback_total),
            "tamiyo.gnn.compile_warm_ms": self.actor.guard.warm_ms,
            "tamiyo.gnn.inference.latency_ms": _mean(self.actor.latencies_ms),
            **attention.scalars(),
        }

    def _collect(self) -> None:
        """Fills the rollout with T steps of every environment, and computes advantages."""
        rollout, ppo = self.rollout, self.config.ppo
        rollout.clear()
        self.actor.sync()
        for _ in range(ppo.num_steps):
            decision = self.actor(self.graph)
            graph, reward, terminated, truncated, info = self.env.step(decision.actions.clone())
            final_values = self.actor.value(info["final_graph"]) if truncated.any() else None
            rollout.add(self.graph, *decision, reward, terminated, truncated, final_values)
            self.graph = graph
            if info:
                self._note(info["episodes"])
        self.learner.finish(rollout, self.actor.value(self.graph))

    def _note(self, episodes: dict[str, torch.Tensor]) -> None:
        columns = {key: episodes[key].tolist() for key in _EPISODE_SCALARS.values() if key in episodes}
        for values in zip(*columns.values(), strict=True):
            self.window.append(dict(zip(columns, map(float, values), strict=True)))

    def evaluate(self) -> dict[str, Any]:
        """Compares the policy with the baselines on held-out instances; writes `eval/`, and the `eval/` scalars and
        pictures of TensorBoard.

        Raises:
            TrainingError: files could not be written.
        """
        newest = str(checkpoint.found(self.run_dir)[0])
        config = self.config
        learned = self.env.learned() if isinstance(self.env, AdaptedEnv) else {}
        report, drawn = judging.evaluate(
            self.policy, config.env, config.evaluation, config.runtime.device, newest, learned
        )
        with self._files_guarded("write the evaluation"):
            telemetry = Telemetry(self.run_dir, self.step, board.LAYOUT)
            telemetry.log(self.step, judging.scalars(report))
            for picture in drawn:
                telemetry.picture(self.step, f"eval/{picture.name}", picture.png())
            self._conclude(telemetry, judging.scalars(report))
            telemetry.close()
            judging.write(report, drawn, self.run_dir / "eval")  # last, since it says that all of this is done
        return report

    def _conclude(self, telemetry: Telemetry, scalars: dict[str, float]) -> None:
        """Writes what the run was given, and how it ended: `scalars` of the evaluation and the last mean return."""
        ended = [*scalars, *(["rollout/ep_rew_mean"] if self.window else [])]
        telemetry.outcome(self.step, board.settings(self.config), ended)

    def _mean_return(self) -> float:
        return _mean([episode["return"] for episode in self.window])

    # ---- files ----------------------------------------------------------------------------------------

    @contextmanager
    def _files_guarded(self, what: str) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:  # of the output, not of a file
            raise
        except OSError as error:
            kept = checkpoint.found(self.run_dir)
            go_on = f"go on with: python -m trainers.train resume={self.run_dir}" if kept else "start again"
            where = error.filename or self.run_dir
            raise _FilesError(
                f"could not {what} at step {self.step:,}: {where}: {error.strerror or error}; "
                f"{len(kept)} earlier checkpoint(s) are untouched; make room or choose another output_dir, then {go_on}"
            ) from error

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes the checkpoint of the last iteration boundary.

        Raises:
            TrainingError: it could not be written; earlier ones are untouched.
        """
        step = self._boundary["step"]
        with self._files_guarded("save a checkpoint"):
            path = checkpoint.save(self.run_dir, step, self._boundary, self.config.checkpoint.keep)
            if (score := _score(self._boundary)) > self._best:
                checkpoint.keep_as_best(path)
                self._best = score
        self._saved, self._saved_at = step, time.monotonic()

    def _best_score(self) -> float:
        """Of the best checkpoint of the run so far."""
        path = self.run_dir / checkpoint.FOLDER / checkpoint.BEST
        try:
            return _score(checkpoint.read(path))
        except (checkpoint.CheckpointError, OSError):
            return -math.inf  # there is none, or it is damaged: the next one takes its place

    def keep(self) -> None:
        """Makes this the iteration boundary that `save` writes, so that a stop in the middle of the next iteration
        finds it untouched."""
        self._boundary = self.snapshot()

    def snapshot(self) -> dict[str, Any]:
        """A copy of the state."""
        return tree_map_only(torch.Tensor, torch.clone, self._state())

    def _state(self) -> dict[str, Any]:
        return {
            "schema_hash": self.env.interface.schema.hash,
            # Growth environments' is this version's own.
            "interface": None if self.env.interface.actions == GROWTH else self.env.interface.state(),
            "config": asdict(self.config),
            "step": self.step,
            "iteration": self.iteration,
            "warm": self.warm,
            "window": list(self.window),
            "learner": self.learner.state_dict(),
            "actor_generator": self.actor.generator.get_state(),
            "env": self.env.state_dict(),
            "rng": checkpoint.rng_state(),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        schema = self.env.interface.schema.hash
        if state["schema_hash"] != schema:
            raise ConfigError(
                f"resume={self.run_dir}: its graph schema is {state['schema_hash']}, this version's is {schema}; "
                "resume it with the version that wrote it"
            )
        check_parameters(self.policy, state, f"resume={self.run_dir}")
        self.step, self.iteration, self.warm = state["step"], state["iteration"], state["warm"]
        self.window.extend(state["window"])
        self.learner.load_state_dict(state["learner"])
        self.actor.generator.set_state(state["actor_generator"])
        self.graph = self.env.load_state_dict(state["env"])
        checkpoint.set_rng_state(state["rng"])


def _score(state: dict[str, Any]) -> float:
    """By which the best checkpoint is told: the mean return of its latest episodes."""
    return _mean([episode["return"] for episode in state["window"]]) if state["window"] else -math.inf


def _mean(values: Collection[float]) -> float:
    return sum(values) / len(values) if values else 0.0
