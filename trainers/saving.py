"""When and how the checkpoints of a run are written, and what is said where files cannot be."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from esper.runtime import checkpoint
from esper.runtime.distributed import World
from esper.runtime.errors import TrainingError
from trainers.config import CheckpointConfig


class FilesError(TrainingError):
    """Files could not be written, so nothing can be saved either."""


@contextmanager
def files_guarded(what: str, run_dir: Path, step: int) -> Iterator[None]:
    """Within it files of a run are written.

    Args:
        what: is done with them, for the message.
        run_dir: the run directory.
        step: how far the run has come.

    Raises:
        FilesError: they could not be written; the message says what is kept, and how to go on.
    """
    try:
        yield
    except BrokenPipeError:  # of the output, not of a file
        raise
    except OSError as error:
        kept = checkpoint.found(run_dir)
        go_on = f"go on with: python -m trainers.train resume={run_dir}" if kept else "start again"
        where = error.filename or run_dir
        raise FilesError(
            f"could not {what} at step {step:,}: {where}: {error.strerror or error}; "
            f"{len(kept)} earlier checkpoint(s) are untouched; make room or choose another output_dir, then {go_on}"
        ) from error


class Saver:
    """Writes iteration boundaries as checkpoints, which all processes of a run do together.

    Args:
        run_dir: the run directory.
        settings: when to save, and how many files to keep.
        world: the processes; the first one writes.
        saved: the step of the checkpoint that the run goes on from; -1 without one.

    Attributes:
        saved: the step of the last checkpoint.
    """

    def __init__(self, run_dir: Path, settings: CheckpointConfig, world: World, saved: int):
        self._run_dir, self._settings, self._world, self.saved = run_dir, settings, world, saved
        self._at, self._best = time.monotonic(), self._best_score()

    def due(self, iteration: int) -> bool:
        """Whether it is time for a checkpoint, as the first process sees it."""
        waited = time.monotonic() - self._at >= self._settings.every_seconds
        return self._world.from_first(waited or iteration % self._settings.every == 0)

    def save(self, boundary: dict[str, Any]) -> None:
        """Writes a boundary; what each process alone holds of it is in its list `processes`.

        Raises:
            FilesError: it could not be written; earlier ones are untouched.
            TrainingError: another process is gone.
        """
        step = boundary["step"]
        processes = [own for (own,) in self._world.gathered(boundary["processes"])]
        if self._world.first:
            with files_guarded("save a checkpoint", self._run_dir, step):
                state = {**boundary, "processes": processes}
                path = checkpoint.save(self._run_dir, step, state, self._settings.keep)
                if (score := _score(boundary)) > self._best:
                    checkpoint.keep_as_best(path)
                    self._best = score
        self._world.everyone(None)  # none ends before the file is there
        self.saved, self._at = step, time.monotonic()

    def go_on(self) -> str:
        """How to go on from the newest checkpoint, of which this process may know nothing."""
        if self.saved < 0:
            return "no checkpoint had been saved, start again"
        return f"go on from step {self.saved:,} with: python -m trainers.train resume={self._run_dir}"

    def _best_score(self) -> float:
        """Of the best checkpoint of the run so far."""
        path = self._run_dir / checkpoint.FOLDER / checkpoint.BEST
        try:
            return _score(checkpoint.read(path))
        except (checkpoint.CheckpointError, OSError):
            return -math.inf  # there is none, or it is damaged: the next one takes its place


def _score(state: dict[str, Any]) -> float:
    """By which the best checkpoint is told: the mean return of its latest episodes."""
    returns = [episode["return"] for episode in state["window"]]
    return sum(returns) / len(returns) if returns else -math.inf
