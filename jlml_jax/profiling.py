"""A trace of some training steps, for TensorBoard's profiler and for Perfetto."""

import re
from pathlib import Path
from typing import Any

import jax

from jlml_jax.errors import UserError

FOLDER = "profile"  # in the run's folder


def parse_steps(text: str) -> range:
    """START:STOP -> the steps to trace, counted from 0: START and up, without STOP. Empty: none.

    Raises:
        UserError: the text is neither that nor empty.
    """
    if not text:
        return range(0)
    match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
    steps = range(*map(int, match.groups())) if match else range(0)
    if not steps:
        raise UserError(f"profile={text!r} is not START:STOP, two numbers of steps, the second larger, as in 20:25")
    return steps


class Trace:
    """Traces the dispatches that hold any of `steps` into `workdir`/profile; `stop` ends it, if nothing else has."""

    def __init__(self, steps: range, workdir: Path):
        self._steps, self._folder, self._tracing = steps, workdir / FOLDER, False

    def before(self, dispatch: range) -> None:
        """The steps in `dispatch` come next."""
        if not self._tracing and max(dispatch.start, self._steps.start) < min(dispatch.stop, self._steps.stop):
            self._tracing = True
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)

    def after(self, dispatch: range, outputs: Any) -> None:
        """The steps in `dispatch` have been handed to the device, to give `outputs`."""
        if self._tracing and dispatch.stop >= self._steps.stop:
            jax.block_until_ready(outputs)
            self.stop()

    def stop(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
            trace = max(self._folder.rglob("perfetto_trace.json.gz"), key=lambda path: path.stat().st_mtime)
            print(f"trace of steps {self._steps.start} to {self._steps.stop - 1}: {trace} for https://ui.perfetto.dev, "
                  f"{self._folder} for TensorBoard with its profile plugin", flush=True)
