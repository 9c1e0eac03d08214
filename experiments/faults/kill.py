"""Kills commands at random moments until they are done: python -m experiments.faults.kill [--count=30] [--seed=0]

Three commands are killed: the main one (few people, a network of a few thousand weights), `search` while it adds to a
gallery, and `prepare` of somebody's own crops. The same command is run again after each kill. At the end everything
must be as in a run that nobody disturbed: every array of the last checkpoint to the bit, metrics.jsonl but for the
fields of time, the rows of results.json, the gallery's features, the prepared images.

With --signal=TERM or INT the process must also leave within 30 seconds, with the status of that signal, and without a
traceback.
"""

import collections
import csv
import dataclasses
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from PIL import Image

from jlml_jax import datasets, provenance
from jlml_jax.arguments import Parser
from jlml_jax.logs import TIME_FIELDS

STEPS = 240
LEAVE_WITHIN = 30  # seconds, after a signal that asks
TIMEOUT = 300  # seconds for a command that is left alone

MAIN_FLAGS = (
    "--config.data.height=32", "--config.data.width=16", "--config.model.num_strips=2", "--config.model.depth=1",
    "--config.model.stem_features=4", "--config.model.global_widths=(4,)", "--config.model.local_widths=(4,)",
    "--config.model.global_feature_dim=8", "--config.model.local_feature_dim=8", f"--config.train.steps={STEPS}",
    "--config.train.batch_size=8", "--config.evaluate.batch_size=16", "--config.log_every=7",
    "--config.checkpoint_every=12", "--config.compilation_cache=")


class Process:
    """A command of `small`, its output read as it comes."""

    def __init__(self, folder: Path, arguments: list[str]):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "PYTHONUNBUFFERED": "1",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "TF_CPP_MIN_LOG_LEVEL": "3"}
        self.started = time.monotonic()
        self._process = subprocess.Popen([sys.executable, "-m", "experiments.faults.small", *arguments], text=True,
                                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
        self.lines: list[tuple[float, str]] = []  # seconds since the start, stdout
        self.errors: list[str] = []
        self._readers = [threading.Thread(target=self._read_output), threading.Thread(target=self._read_errors)]
        for reader in self._readers:
            reader.start()

    def _read_output(self) -> None:
        for line in self._process.stdout:
            self.lines.append((time.monotonic() - self.started, line.rstrip("\n")))

    def _read_errors(self) -> None:
        self.errors += self._process.stderr

    def running(self) -> bool:
        return self._process.poll() is None

    def has_told(self, text: str) -> bool:
        return any(text in line for _, line in self.lines)

    def end(self, number: signal.Signals | None = None, timeout: float = TIMEOUT) -> int:
        """Sends the signal, if any; the exit status, that of a shell where the signal's default action ended it."""
        if number is not None:
            self._process.send_signal(number)
        try:
            status = self._process.wait(timeout)
        finally:
            self._process.kill()
            for reader in self._readers:
                reader.join()
        return 128 - status if status < 0 else status


@dataclasses.dataclass(frozen=True)
class Job:
    """A command to be disturbed, in a folder of its own."""

    name: str
    arguments: Callable[[Path], list[str]]  # of its folder
    phases: dict[str, Callable[[Process, Path], bool]]  # whether a phase has begun, in the order in which they do
    outcome: Callable[[Path], Any]  # what must be equal, by name


def _main_arguments(folder: Path) -> list[str]:
    return ["main", f"--workdir={folder / 'run'}", f"--config.data.data_dir={folder / 'data'}", *MAIN_FLAGS]


def _main_outcome(folder: Path) -> dict[str, Any]:
    run = folder / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit()]
    state = ocp.PyTreeCheckpointer().restore(run / "checkpoints" / str(max(steps)) / "state")
    return {
        "steps logged": [line["step"] for line in lines],
        "metrics.jsonl": [{name: value for name, value in line.items() if name not in TIME_FIELDS} for line in lines],
        "rows of results.json": json.loads((run / "results.json").read_text())["rows"],
        "ranked.png": (run / "ranked.png").read_bytes(),
        "last checkpoint": max(steps),  # a signal that asks makes one more, in place of one before it
        "left over": [path.name for path in run.rglob("*-tmp")],
    } | {jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
         for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _writes_checkpoint(process: Process, folder: Path) -> bool:
    return process.has_told("step ") and any((folder / "run" / "checkpoints").glob("*-tmp"))


TRAINING = Job("main", _main_arguments, {
    "start-up": lambda process, folder: True,
    "drawing": lambda process, folder: process.has_told("drawing "),
    "compilation": lambda process, folder: process.has_told("training images of"),
    "step": lambda process, folder: process.has_told("step "),
    "checkpoint": _writes_checkpoint,
    "evaluation": lambda process, folder: process.has_told(f"step {STEPS}/{STEPS} "),
}, _main_outcome)


def _write_crops(folder: Path) -> None:
    """Images of noise, 40 people by 3 cameras, and their CSV."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    with open(folder / "people.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "identity", "camera"])
        for identity in range(40):
            for camera in range(3):
                for image in range(4):
                    name = f"{identity}_{camera}_{image}.png"
                    Image.fromarray(rng.integers(0, 256, (128, 64, 3), np.uint8)).save(folder / name)
                    rows.writerow([name, identity, camera])


def _prepare_arguments(folder: Path) -> list[str]:
    return ["prepare", "folder/people", f"--source={folder.parent / 'crops' / 'people.csv'}",
            f"--data_dir={folder / 'data'}"]


def _prepare_outcome(folder: Path) -> dict[str, Any]:
    splits = datasets.load("folder/people", ("train", "query", "gallery"), str(folder / "data"))
    return {split: images.fingerprint() for split, images in splits.items()}


PREPARING = Job("prepare", _prepare_arguments, {
    "start-up": lambda process, folder: True,
    "check": lambda process, folder: process.has_told("split"),
    "write": lambda process, folder: process.has_told("writing "),
}, _prepare_outcome)


def _search_arguments(folder: Path) -> list[str]:
    crops = folder.parent / "crops"
    return ["search", f"--workdir={folder.parent / 'whole' / 'run'}", f"--gallery={crops}", f"--index={folder / 'g'}",
            f"--query={crops / '0_0_0.png'}"]


def _search_outcome(folder: Path) -> dict[str, Any]:
    with sqlite3.connect(folder / "g" / "gallery.sqlite") as database:
        rows = database.execute("SELECT * FROM images ORDER BY row").fetchall()
    return {"features": (folder / "g" / "features.f32").read_bytes(), "images": rows}


ADDING = Job("search", _search_arguments, {
    "start-up": lambda process, folder: True,
    "gallery add": lambda process, folder: (folder / "g" / "gallery.sqlite").exists(),
}, _search_outcome)


class Campaign:
    """Kills of one job, each in some phase of it.

    Attributes:
        killed: how many, by the phase in which it was.
        wrong: what was not as it must be, in words.
    """

    def __init__(self, job: Job, folder: Path, number: signal.Signals, rng: random.Random):
        self._job, self._folder, self._number, self._rng = job, folder, number, rng
        self.killed: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.slowest = 0.0  # seconds from a signal to the end of the process
        # The first run compiles; the second says how long each phase takes.
        self._whole = self._undisturbed(folder / "whole" if job is TRAINING else folder / f"whole-{job.name}")[0]
        again, process = self._undisturbed(folder / f"again-{job.name}")
        self._compare(again, "the same command a second time")
        begun = process.begun + [time.monotonic() - process.started]
        self._lasts = {phase: max(end - start, 0.0) for phase, start, end in
                       zip(job.phases, begun, begun[1:], strict=False)}

    def _undisturbed(self, folder: Path) -> tuple[dict[str, Any], Process]:
        process = Process(self._folder, self._job.arguments(folder))
        process.begun = []
        for begins in self._job.phases.values():
            while process.running() and not begins(process, folder):
                time.sleep(0.001)
            process.begun.append(time.monotonic() - process.started)
        status = process.end()
        if status:
            raise RuntimeError(f"{self._job.name} fails undisturbed, with status {status}: {process.errors}")
        return self._job.outcome(folder), process

    def _compare(self, outcome: dict[str, Any], what: str) -> None:
        names = self._whole.keys() | outcome.keys()
        if differing := sorted(name for name in names if self._whole.get(name) != outcome.get(name)):
            self.wrong.append(f"{self._job.name}, {what}: other {', '.join(differing[:5])}")

    def chain(self, phases: list[str]) -> None:
        """Kills the command once in each of `phases`, in their order, then lets it end, and compares."""
        folder = Path(tempfile.mkdtemp(prefix=f"{self._job.name}-", dir=self._folder))
        for phase in phases:
            self._kill_in(phase, folder)
        process = Process(self._folder, self._job.arguments(folder))
        status = process.end()
        if status:
            self.wrong.append(f"{self._job.name} killed in {', '.join(phases)}: status {status} then, "
                              f"{''.join(process.errors)[-500:]}")
            return
        self._compare(self._job.outcome(folder), f"killed in {', '.join(phases)}")
        shutil.rmtree(folder)

    def _kill_in(self, phase: str, folder: Path) -> None:
        process = Process(self._folder, self._job.arguments(folder))
        delay = self._rng.uniform(0, 0.8 * self._lasts[phase])
        while process.running() and not self._job.phases[phase](process, folder):
            time.sleep(0.0005)
        time.sleep(delay)
        if not process.running():
            status = process.end()
            if status:
                self.wrong.append(f"{self._job.name}: status {status}, {''.join(process.errors)[-500:]}")
            return
        sent = time.monotonic()
        try:
            status = process.end(self._number, LEAVE_WITHIN)
        except subprocess.TimeoutExpired:
            self.wrong.append(f"{self._job.name}: not gone {LEAVE_WITHIN} s after {self._number.name} in {phase}")
            return
        self.slowest = max(self.slowest, time.monotonic() - sent)
        seen = next(name for name in reversed(self._job.phases) if self._job.phases[name](process, folder))
        self.killed[seen] += 1
        print(f"{self._job.name}: {self._number.name} in {seen}, after {sent - process.started:.2f} s", flush=True)
        if status not in (0, 128 + self._number):  # 0: it was done just then
            self.wrong.append(f"{self._job.name}: status {status} after {self._number.name} in {seen}")
        if any("Traceback" in line for line in process.errors):
            self.wrong.append(f"{self._job.name}: a traceback after {self._number.name} in {seen}: "
                              f"{''.join(process.errors)[-500:]}")


def main() -> None:
    parser = Parser("experiments.faults.kill", __doc__)
    parser.add_argument("--count", type=int, default=30, help="kills of the main command at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=["KILL", "TERM", "INT"], default="KILL")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    rng, number = random.Random(options.seed), signal.Signals[f"SIG{options.signal}"]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # or the commands would ignore it, as a shell's jobs do
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        _write_crops(Path(folder) / "crops")
        for job, count in ((TRAINING, options.count), (PREPARING, options.count // 5), (ADDING, options.count // 5)):
            campaign = Campaign(job, Path(folder), number, rng)
            while campaign.killed.total() < count:
                campaign.chain(list(job.phases))
            result[job.name] = {"killed": dict(campaign.killed), "wrong": campaign.wrong,
                                "slowest_seconds": round(campaign.slowest, 2)}
    result |= {"signal": number.name, "seed": options.seed, "provenance": provenance.collect()}
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(any(result[job.name]["wrong"] for job in (TRAINING, PREPARING, ADDING)))


if __name__ == "__main__":
    main()
