"""Where metrics go: TensorBoard's event files and one JSON line per logged step."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import custom_scalars, hparams

METRICS_FILE = "metrics.jsonl"

Layout = Mapping[str, Mapping[str, Sequence[str]]]
"""category -> chart -> tags, as regular expressions, that the chart draws together."""

_OUTCOME = ".outcome"  # suffix of the event file that says how the run ended
_WIDTH, _HEIGHT = slice(16, 20), slice(20, 24)  # of a picture, where its PNG says them


class Telemetry:
    """Writes scalars of one run, and what explains them.

    Args:
        run_dir: where `tb/` and `metrics.jsonl` are.
        resumed_at: the step the run goes on from; points logged after it, by a run that then died, are taken back.
        layout: charts of TensorBoard's tab of custom scalars. Each event file holds it, and TensorBoard shows it once.
    """

    def __init__(self, run_dir: Path, resumed_at: int | None = None, layout: Layout | None = None):
        self.path = run_dir / METRICS_FILE
        if resumed_at is not None and self.path.exists():
            lines = self.path.read_bytes().splitlines()
            temporary = self.path.with_suffix(".tmp")
            temporary.write_bytes(b"".join(line + b"\n" for line in lines if _step(line, resumed_at) <= resumed_at))
            os.replace(temporary, self.path)
        self._file = open(self.path, "a")  # noqa: SIM115 (open as long as the run)
        purge = None if resumed_at is None else resumed_at + 1
        self._folder = run_dir / "tb"
        _date_back(self._folder)
        self._writer = SummaryWriter(str(self._folder), purge_step=purge)
        if layout is not None:
            charts = {
                category: {chart: ["Multiline", list(tags)] for chart, tags in charts.items()}
                for category, charts in layout.items()
            }
            _put(self._writer, custom_scalars(charts), resumed_at or 0)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one point of every scalar at `step` (environment steps). NaN becomes null in JSON."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **finite}) + "\n")
        self._file.flush()
        self._writer.flush()

    def histogram(self, step: int, name: str, values: Collection[float]) -> None:
        """Writes the distribution of `values` at `step`, for TensorBoard alone."""
        if values:
            self._writer.add_histogram(name, np.asarray(values), step)

    def text(self, step: int, name: str, markdown: str) -> None:
        """Writes a text at `step`, for TensorBoard alone."""
        self._writer.add_text(name, markdown, step)

    def picture(self, step: int, name: str, png: bytes) -> None:
        """Writes a picture at `step`, for TensorBoard alone."""
        width, height = (int.from_bytes(png[place], "big") for place in (_WIDTH, _HEIGHT))
        image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png)
        _put(self._writer, Summary(value=[Summary.Value(tag=name, image=image)]), step)

    def outcome(self, step: int, settings: Mapping[str, Any], metrics: Collection[str]) -> None:
        """Writes what the run was given and which scalars tell how it went, for TensorBoard's table of hyperparameters.
        It replaces what was written so when the run ended before, and must come last: TensorBoard may read no more of
        the other file.

        Args:
            settings: name -> value; what is neither a number, a truth value nor a text is written as a text.
            metrics: names of scalars that are logged; the table shows their last values.
        """
        known = bool | int | float | str
        plain = {name: value if isinstance(value, known) else str(value) for name, value in settings.items()}
        self._writer.flush()
        # TensorBoard keeps the first that it finds of a run, hence the file of its own, which can be removed.
        earlier = list(self._folder.glob(f"*{_OUTCOME}"))
        writer = SummaryWriter(str(self._folder), filename_suffix=_OUTCOME)
        # SummaryWriter.add_hparams would put them into a run of their own, below this one.
        for summary in hparams(plain, dict.fromkeys(metrics, 0.0)):
            _put(writer, summary, step)
        writer.close()
        for path in earlier:
            path.unlink()

    def close(self) -> None:
        self._file.close()
        self._writer.close()


def _put(writer: SummaryWriter, summary: Summary, step: int) -> None:
    writer._get_file_writer().add_summary(summary, step)


def _date_back(folder: Path) -> None:
    """Renames event files so that the next one comes after them.

    TensorBoard reads them in the order of their names, which begin with the second in which each was made. That is the
    wrong order if two were made in the same second, or if the clock has been set back.
    """
    limit = int(time.time())
    for path in sorted(folder.glob("events.out.tfevents.*"), reverse=True):
        *before, made, rest = path.name.split(".", 4)
        limit = min(int(made), limit - 1)
        path.rename(path.with_name(".".join((*before, f"{limit:010d}", rest))))


def _step(line: bytes, otherwise: int) -> int:
    """The step of a line of metrics.jsonl; one that was cut off by a crash, or is damaged, counts as later than
    `otherwise`."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return otherwise + 1
