"""The training loop: collect, update, log, save; with everything that a checkpoint needs to go on from there."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
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
from esper.runtime.distributed import ALONE, World
from esper.runtime.errors import ConfigError, EsperError, Preempted, TrainingError
from esper.runtime.telemetry import METRICS_FILE, Telemetry
from esper.simic.learner import Simic
from esper.simic.rollout import Rollout
from esper.tamiyo.actor import Actor
from esper.tamiyo.loading import check_parameters, take_over
from esper.tamiyo.policies import make_policy
from esper.tamiyo.policy import Tamiyo
from trainers import board, judging, warm_start
from trainers.config import TrainConfig
from trainers.episodes import LatestEpisodes
from trainers.preemption import Preemption, Stop
from trainers.progress import Reporter
from trainers.saving import FilesError, Saver, files_guarded
from trainers.starts import Starts

log = logging.getLogger(__name__)


class _CommonError(TrainingError):
    """All processes have come to it at the same place."""


class Trainer:
    """One run.

    Args:
        config: checked configuration.
        run_dir: the run directory.
        state: a checkpoint to go on from.
        overrides: what the command line said, for the run's card.
        world: the processes that train together, each in a Trainer with its share of the environments. The first one
            logs, saves and shows progress.
    """

    def __init__(
        self,
        config: TrainConfig,
        run_dir: Path,
        state: dict[str, Any] | None = None,
        overrides: Sequence[str] = (),
        world: World = ALONE,
    ):
        self.config, self.run_dir, self.overrides, self.world = config, run_dir, overrides, world
        self.device = device = world.device(config.runtime.device)
        config.runtime.set_up()
        seeding.seed_everything(config.seed)
        self._share = world.share(config.env.num_envs)
        # Where there is nothing to be done, the one environment tells what graphs are like.
        self.env = make_envs(config.env, max(len(self._share), 1), device=device)
        self.policy = make_policy(config.policy, self.env.interface).to(device)
        if config.init is not None and state is None:
            take_over(self.policy, self.env.interface, config.init, config.env.name)
        runtime, acting = config.runtime, world.device(config.runtime.actor_device or device)
        seed = world.seed(config.seed)
        self.learner = Simic(
            self.policy, config.ppo, seed, runtime.precision, runtime.guard("update step", device), world
        )
        self.actor = Actor(self.policy, seed, guard=runtime.guard("actor", acting), device=acting)
        self.rollout = Rollout(config.ppo.num_steps, len(self._share), device, world)
        self.step, self.iteration = 0, 0
        self.starts = Starts(config.ppo)
        # Whether there is nothing to be done before PPO.
        self.warm = config.init is not None or not config.warm_start.episodes
        self.window = LatestEpisodes()
        if not world.first:  # the policy is the same in all processes, what is drawn from now on is not
            seeding.seed_everything(seed)
        if state is None:
            self._begin()
        else:
            self._restore(state)
        self._boundary: dict[str, Any] = {}
        self._saver = Saver(run_dir, config.checkpoint, world, self.step if state else -1)
        self._saving_s = 0.0  # what the last snapshot and its file took

    def _begin(self, *salts: int) -> None:
        """First episodes; other ones for each of `salts`."""
        # Runs with neighbouring seeds must not share instances, as plain seed + k would make them.
        numbers = torch.arange(self.config.env.num_envs)[self._share.start : self._share.stop]
        seeds = seeding.fold(torch.tensor(self.config.seed), numbers if len(numbers) else torch.zeros(1).long())
        self.graph = self.env.reset(seeding.fold(seeds, *salts))

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
        telemetry = self._telemetry() if self.world.first else None
        self.keep()
        try:
            if not self.warm:
                self._warm_start(preemption)
            # Among several processes a signal waits for a place at which all of them stop.
            with nullcontext() if self.world.alone else preemption.held():
                self._train(telemetry, preemption)
            if telemetry and not self.config.evaluation.episodes:  # otherwise the run ends with it
                self._conclude(telemetry, {})
        except Stop as stop:
            raise Preempted(f"stopped by {stop.name}; {self._kept()}") from stop
        except FilesError:
            raise
        except EsperError as error:
            with preemption.held():
                kept = self._kept() if self._together(error) else self._saver.go_on()
            raise TrainingError(f"{error}; {kept}") from error
        except Exception as error:
            with preemption.held():
                if self._together(error):
                    self._kept()
            raise
        finally:
            if telemetry:
                with self._files_guarded("close the logs"):
                    telemetry.close()

    def _telemetry(self) -> Telemetry:
        begun = (self.run_dir / METRICS_FILE).exists()  # also by an attempt that did not come to a checkpoint
        resumed_at = self.step if self.iteration or begun else None
        with self._files_guarded("open the logs"):
            telemetry = Telemetry(self.run_dir, resumed_at, board.LAYOUT)
            size = sum(parameter.numel() for parameter in self.policy.parameters())
            telemetry.text(self.step, "run", board.card(self.config, self.run_dir, self.step, self.overrides, size))
        return telemetry

    def _together(self, error: Exception) -> bool:
        """Whether every process has come to the error, so that all of them can save."""
        return self.world.alone or isinstance(error, _CommonError)

    def _warm_start(self, preemption: Preemption) -> None:
        config = self.config
        assert isinstance(self.policy, Tamiyo)
        assert isinstance(config.env, EnvConfig)
        if not self.world.alone and self._saver.saved != self.step:
            self.save()  # a process that is stopped by itself cannot save
        with self._files_guarded("warm start"):
            warm_start.run(self.policy, config.env, config.warm_start, config.seed, self.run_dir, self.world)
        self.warm = True
        with preemption.held():
            self.keep()
            self.save()

    def _train(self, telemetry: Telemetry | None, preemption: Preemption) -> None:
        total = self.config.ppo.total_steps
        self.starts.begin(self.learner.state_dict())
        self.actor.warm_up(self.graph)
        with Reporter("training", total, "steps", self.step) as reporter:
            while self.step < total:
                before = self.step
                scalars = self.iterate()
                if self.config.ppo.starts > 1 and not self.learner.failed:
                    self._between_starts(before)
                with preemption.held():  # files are not to be cut short
                    if telemetry:
                        self._log(telemetry, scalars)
                    start = time.perf_counter()
                    self.keep()
                    if self.step >= total or self._saver.due(self.iteration):
                        self.save()
                    self._saving_s = time.perf_counter() - start
                    reporter.update(self.step, f"return {self.window.mean('return'):+.3f}" if self.window else "")
                if self.learner.failed:  # which has left no mark on the parameters
                    raise _CommonError(self.learner.failed)

    def _between_starts(self, before: int) -> None:
        """Once a start has ended, the next one begins where that began, or the run ends with the best of them."""
        starts = self.starts
        if not starts.note(before, self.step, self.window, self.policy.state_dict()):
            return
        assert starts.begun is not None
        assert starts.best is not None
        if self.step >= self.config.ppo.total_steps:
            self.policy.load_state_dict(starts.best["policy"])
            self.window = LatestEpisodes(starts.best["window"])
            log.info("the policy of start %d is kept", starts.best["number"] + 1)
            return
        self.learner.load_state_dict({**starts.begun, "generator": self.learner.generator.get_state()})
        self.window.clear()
        self._begin()  # with the same episodes, so that starts are compared on them
        self._draw_anew(self.step)

    def _log(self, telemetry: Telemetry, scalars: dict[str, float]) -> None:
        with self._files_guarded("write the logs"):
            telemetry.log(self.step, scalars)
            latencies = "tamiyo.gnn.inference.latency_ms.histogram"
            telemetry.histogram(self.step, latencies, self.actor.latencies_ms)

    def _kept(self) -> str:
        """Saves the state after the last iteration if that has not been done; says so, and how to go on."""
        step = self._boundary["step"]
        if self._saver.saved != step:
            self.save()
        return f"the state after {step:,} steps is saved, go on with: python -m trainers.train resume={self.run_dir}"

    def iterate(self) -> dict[str, float]:
        """One collect and one update; returns everything that is logged of them."""
        ppo = self.config.ppo
        start = time.perf_counter()
        self.env.graph_build_s.clear()
        self.actor.latencies_ms.clear()
        exchanging = self.world.seconds
        self._collect()
        collected = time.perf_counter()
        number, progress = self.starts.place(self.step)
        metrics = self.learner.update(self.rollout, progress)
        updated = time.perf_counter()
        self.step += self.steps_per_iteration
        self.iteration += 1
        scalars = self.window.scalars()
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
            **({"train/start": number + 1.0} if ppo.starts > 1 else {}),
            **({} if self.world.alone else {"perf/communication_s": self.world.seconds - exchanging}),
        }

    def _collect(self) -> None:
        """Fills the rollout with T steps of every environment of this process, and computes advantages."""
        rollout = self.rollout
        rollout.clear()
        self.actor.sync()
        ended: list[dict[str, torch.Tensor]] = []
        for _ in range(self.config.ppo.num_steps if self._share else 0):
            if self.world.asked() is not None:
                break  # what follows is not going to be used
            decision = self.actor(self.graph)
            graph, reward, terminated, truncated, info = self.env.step(decision.actions.clone())
            final_values = self.actor.value(info["final_graph"]) if truncated.any() else None
            rollout.add(self.graph, *decision, reward, terminated, truncated, final_values)
            self.graph = graph
            if info:
                ended.append(info["episodes"])
        self.world.check()
        for episodes in self.world.everyone(ended):
            for each in episodes:
                self.window.note(each)
        if isinstance(self.env, AdaptedEnv) and not self.world.alone:
            self.env.share_learned(self.world.everyone(self.env.learned()))
        self.learner.finish(rollout, self.actor.value(self.graph)[: len(self._share)])

    def evaluate(self) -> dict[str, Any]:
        """Compares the policy with the baselines on held-out instances; writes `eval/`, and the `eval/` scalars and
        pictures of TensorBoard.

        Raises:
            TrainingError: files could not be written.
        """
        newest = str(checkpoint.found(self.run_dir)[0])
        config = self.config
        learned = self.env.learned() if isinstance(self.env, AdaptedEnv) else {}
        report, drawn = judging.evaluate(self.policy, config.env, config.evaluation, self.device, newest, learned)
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

    def _files_guarded(self, what: str) -> AbstractContextManager[None]:
        return files_guarded(what, self.run_dir, self.step)

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes the checkpoint of the last iteration boundary, which all processes do together.

        Raises:
            TrainingError: it could not be written; earlier ones are untouched.
        """
        self._saver.save(self._boundary)

    def keep(self) -> None:
        """Makes this the iteration boundary that `save` writes, so that a stop in the middle of the next iteration
        finds it untouched."""
        self._boundary = self.snapshot()

    def snapshot(self) -> dict[str, Any]:
        """A copy of the state."""
        return tree_map_only(torch.Tensor, torch.clone, self._state())

    def _state(self) -> dict[str, Any]:
        learner = self.learner.state_dict()
        own = {
            "learner_generator": learner.pop("generator"),
            "actor_generator": self.actor.generator.get_state(),
            "env": self.env.state_dict(),
            "rng": checkpoint.rng_state(),
        }
        return {
            "schema_hash": self.env.interface.schema.hash,
            # Growth environments' is this version's own.
            "interface": None if self.env.interface.actions == GROWTH else self.env.interface.state(),
            "config": asdict(self.config),
            "step": self.step,
            "iteration": self.iteration,
            "warm": self.warm,
            "window": list(self.window),
            "learner": learner,
            "processes": [own],
            **({"starts": self.starts.state_dict()} if self.config.ppo.starts > 1 else {}),
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
        if self.config.ppo.starts > 1:
            self.starts.load_state_dict(state["starts"])
        self.learner.load_state_dict({**state["learner"], "generator": self.learner.generator.get_state()})
        if len(state["processes"]) == self.world.size:
            self._restore_own(state["processes"][self.world.rank])
        else:
            self._deal_anew(state["processes"])

    def _restore_own(self, own: dict[str, Any]) -> None:
        """What this process alone has drawn and got to."""
        self.learner.generator.set_state(own["learner_generator"])
        self.actor.generator.set_state(own["actor_generator"])
        self.graph = self.env.load_state_dict(own["env"])
        checkpoint.set_rng_state(own["rng"])

    def _deal_anew(self, processes: list[dict[str, Any]]) -> None:
        """Goes on with another number of processes than before: with other episodes."""
        if self.world.first:
            log.warning(
                "%s was saved by %d process(es) and goes on with %d: its episodes are given up, and others begin",
                self.run_dir, len(processes), self.world.size,
            )  # fmt: skip
        if isinstance(self.env, AdaptedEnv):
            self.env.load_learned(processes[0]["env"]["learned"])  # which is alike in all of them
        self._begin(self.step)
        self._draw_anew(self.step)

    def _draw_anew(self, salt: int) -> None:
        """Other draws from now on, in each process its own."""
        own = int(seeding.fold(torch.tensor(self.config.seed), salt, self.world.rank)) % 2**31
        self.learner.generator.manual_seed(own)
        self.actor.generator.manual_seed(own)
        seeding.seed_everything(own)


def _mean(values: Collection[float]) -> float:
    return sum(values) / len(values) if values else 0.0
