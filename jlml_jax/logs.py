"""What a run tells while it trains: metrics.jsonl, TensorBoard events and a line of progress."""

import json
import os
import platform
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jlml_jax.errors import UserError
from jlml_jax.files import write_atomically

# Fields of metrics.jsonl that say how long things took; all others are equal whenever the same run is run again.
TIME_FIELDS = ("images_per_second", "seconds")

# The scores of an evaluation, of results.json's; in a line of its own, by feature: rank1/joint.
EVALUATED = ("rank1", "mean_ap")


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, if it has one; the last is left out if a kill cut it short.

    Raises:
        UserError: it is damaged.
    """
    path = workdir / "metrics.jsonl"
    try:
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        metrics = [json.loads(line) for line in lines if line.endswith("\n")]
        if not all(isinstance(line, dict) and "step" in line for line in metrics):
            raise ValueError("a line has no step")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} does not read ({error}); copy it back from elsewhere, or remove it") from error
    return metrics


def read_training(workdir: Path) -> list[dict[str, Any]]:
    """The lines that are of training steps, not of an evaluation; as `read_metrics`."""
    return [line for line in read_metrics(workdir) if not _is_evaluation(line)]


def is_evaluated(workdir: Path, step: int) -> bool:
    """Whether the lines have an evaluation after `step` steps; as `read_metrics`."""
    return any(line["step"] == step and _is_evaluation(line) for line in read_metrics(workdir))


def _is_evaluation(line: dict[str, Any]) -> bool:
    return any(name.partition("/")[0] in EVALUATED for name in line)


class TrainingLog:
    """Collects the metrics of every step and reports their means over the steps since the last report.

    Rates, the time that is left and `seconds`, since the first dispatch ended, are of training alone.

    On resumption the lines of `metrics.jsonl` after `first_step` are dropped, because those steps come again, and
    `interval` (what `interval()` gave when the checkpoint was made) restores the steps that were not yet reported.

    With `quiet`, of all processes but the first, it only collects: nothing is printed, written or dropped.
    """

    def __init__(self, workdir: Path, first_step: int, total_steps: int, batch_size: int,
                 interval: dict[str, list[float]] | None = None, quiet: bool = False):
        self._path = workdir / "metrics.jsonl"
        self._total_steps, self._batch_size = total_steps, batch_size
        self._interval: dict[str, list[float]] = dict(interval or {})
        self._quiet = quiet
        if not quiet:
            self._drop_lines_after(first_step)
            self._file = open(self._path, "a")  # noqa: SIM115 - closed by close()
            self._events = _EventWriter(workdir, first_step)
        self._start = self._mark = None
        self._mark_step = first_step

    def _drop_lines_after(self, step: int) -> None:
        if not self._path.exists():
            return
        kept = []
        for number, line in enumerate(self._path.read_text(errors="replace").splitlines(keepends=True), 1):
            if not line.endswith("\n"):
                break  # a kill cut it short
            try:
                if json.loads(line)["step"] > step:
                    break  # the first to be repeated
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{self._path} is damaged in line {number} ({error}); mend that line, or move the file "
                                "away") from error
            kept.append(line)
        write_atomically(self._path, "".join(kept))

    def interval(self) -> dict[str, list[float]]:
        """The values of every step since the last report, by name; a copy, which later steps do not change."""
        return {name: list(values) for name, values in self._interval.items()}

    def add(self, done: int, metrics: dict[str, list[float]]) -> None:
        """Takes the metrics of the steps of a dispatch that has ended, after `done` steps."""
        for name, values in metrics.items():
            self._interval.setdefault(name, []).extend(values)
        if self._start is None:  # the first dispatch's time is the compiler's
            self._start = self._mark = time.perf_counter()
            self._mark_step = done

    def report(self, done: int, learning_rate: float) -> None:
        """Writes and prints the means over the steps since the last report, after `done` steps."""
        now = time.perf_counter()
        means = {name: float(np.mean(values)) for name, values in self._interval.items()}
        self._interval = {}
        if self._quiet:
            return
        rate = (done - self._mark_step) * self._batch_size / max(now - self._mark, 1e-9)
        self._mark, self._mark_step = now, done
        record = {"step": done, **means, "learning_rate": learning_rate, "images_per_second": round(rate, 2),
                  "seconds": round(now - self._start, 3)}
        self._write(record)
        self._print(done, means, rate)

    def evaluation(self, done: int, rows: Sequence[dict[str, Any]], seconds: float) -> None:
        """Writes the `EVALUATED` scores of `rows`, one a feature, of the weights after `done` steps.

        The `seconds` that the evaluation took do not count as time of training.
        """
        if self._start is not None:
            self._start += seconds
            self._mark += seconds
        if not self._quiet:
            self._write({"step": done} | {f"{score}/{row['feature']}": row[score] for score in EVALUATED
                                          for row in rows})

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        self._events.add(record["step"], {name: value for name, value in record.items()
                                          if name not in ("step", "seconds")})

    def _print(self, done: int, means: dict[str, float], rate: float) -> None:
        parts = []
        for head in [name.split("/")[1] for name in means if name.startswith("cross_entropy/")]:
            part = f"{head} {means[f'cross_entropy/{head}']:.3f}"
            part += "".join(f" + {means[name]:.3f}" for name in (f"penalty/{head}", f"triplet/{head}") if name in means)
            parts.append(f"{part} ({100 * means[f'accuracy/{head}']:.1f} %)")
        if rate:  # there is none of the first dispatch
            left = (self._total_steps - done) * self._batch_size / rate
            parts.append(f"{rate:.1f} images/s  {_duration(left)} left")
        print(f"step {done}/{self._total_steps}  loss {means['loss']:.3f}  {'  '.join(parts)}", flush=True)

    def close(self) -> None:
        if not self._quiet:
            self._file.close()
            self._events.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class _EventWriter:
    """A TensorBoard event file; from `first_step` on, earlier events of the same steps are superseded.

    TensorBoard's own EventFileWriter writes in a thread, which tells of a full disk late, if at all.
    """

    def __init__(self, workdir: Path, first_step: int):
        # TensorBoard imports all of TensorFlow where it is installed, just to open files, unless this module exists.
        sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        name = f"events.out.tfevents.{time.time():.6f}.{platform.node()}.{os.getpid()}"
        self._writer = RecordWriter(open(workdir / name, "wb"))  # noqa: SIM115 - closed by close()
        self._write(file_version="brain.Event:2")
        if first_step:
            self._write(step=first_step + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def add(self, step: int, values: dict[str, float]) -> None:
        self._write(step=step, summary=self._summary(
            value=[self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]))

    def _write(self, **fields: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
