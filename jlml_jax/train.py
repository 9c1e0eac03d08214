"""The loop: build the state, step, log, checkpoint, evaluate."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from jlml_jax import (
    device_data,
    evaluate,
    input_pipeline,
    logs,
    losses,
    norm_statistics,
    optim,
    parallel,
    profiling,
    protocols,
    provenance,
    sampling,
    training_history,
)
from jlml_jax.checkpoints import (
    Checkpoints,
    SavedRun,
    await_claimed,
    claim_workdir,
    has_checkpoint,
    latest_step,
    load_label_map,
    load_run,
    refuse_other_network,
    set_aside_damaged,
    trial_folder,
    trial_folders,
)
from jlml_jax.command import Command, Run
from jlml_jax.config_fields import refuse_unknown_fields
from jlml_jax.config_ranges import check_ranges
from jlml_jax.datasets.split import Split
from jlml_jax.errors import UserError, storage_errors_told
from jlml_jax.evaluate_run import collect_trials, evaluate_run, evaluate_while_training, is_due, refuse_no_test
from jlml_jax.files import refuse_address, user_path
from jlml_jax.logs import TrainingLog
from jlml_jax.models import build_model, check_input_size, count_operations, variable_shapes
from jlml_jax.protocols import Trial, namespace
from jlml_jax.result_rows import TITLES, format_score
from jlml_jax.stopping import StopRequest
from jlml_jax.train_step import Batch, TrainState, compute_dtype, init_state, steps_per_dispatch

MODES = ("train_and_evaluate", "train", "evaluate")
PAPER_DATASETS = ("cuhk03", "grid", "market1501", "viper")

# Dispatches given to the device before the oldest one's metrics are fetched: it never waits for the host.
DISPATCHES_AHEAD = 2


def print_model(model: nn.Module, config: ml_collections.ConfigDict) -> None:
    """Prints the parameters, module by module, and the floating-point operations of an evaluation forward in all."""
    # Not nn.tabulate, which traces the network once more and lists every array in it.
    height, width = config.data.height, config.data.width
    variables = variable_shapes(model, height, width)
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(layer)) for name, layer in variables["params"].items()}
    for name, size in [("module", "parameters"), *((name, f"{size:,}") for name, size in sizes.items()),
                       ("in all", f"{sum(sizes.values()):,}")]:
        print(f"{name:<20}{size:>12}")
    # As the paper counts: the CPU's rewrites move XLA's count.
    operations = count_operations(model.clone(native=True), height, width)
    if operations is not None:
        print(f"{operations:.3g} floating-point operations an image of {height}x{width}, as XLA counts")
    print(flush=True)


def choose_loader(config: ml_collections.ConfigDict, images: Split, mesh: Mesh) -> str:
    """`config.data.loader`, with auto resolved: device where the decoded images take at most a third of memory.

    Raises:
        UserError: the loader is unknown.
    """
    loader = config.data.loader
    if loader not in ("auto", "device", "tf_data"):
        raise UserError(f"data.loader={loader!r} is unknown; known are auto, device, tf_data")
    if loader != "auto":
        return loader
    needed = len(images) * math.prod(images.training_size(config.data.height, config.data.width)) * 3
    device = mesh.local_devices[0]
    if device.platform == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(mesh.local_devices)
    else:
        memory = (device.memory_stats() or {}).get("bytes_limit", 0)
    return "device" if needed <= memory / 3 else "tf_data"


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str | Path,
                       mode: str = "train_and_evaluate") -> list[dict[str, Any]]:
    """Trains the run of `config` in `workdir`, resuming where it stands, and evaluates it.

    Where the protocol has several trials, each has a folder of its own in `workdir`, such as trial-03, and
    `workdir`/results.json has the rows of all that have been evaluated so far, and their means. If `config.init_from`
    holds several trials, too, each starts from the one of its number.

    Returns the rows that it writes to `results.json` (none with mode="train"). mode="evaluate" takes the run's latest
    checkpoint. Raises UserError for what the caller can mend.
    """
    source = provenance.collect()
    if mode not in MODES:
        raise UserError(f"--mode={mode} is unknown; known are {', '.join(MODES)}")
    parallel.keep_programs(config.compilation_cache)
    refuse_address("--workdir", workdir)
    workdir = user_path(workdir)
    mesh = parallel.make_mesh()
    code = {field: source[field] for field in ("commit", "source_sha256", "versions")}
    parallel.refuse_differing(flatten_dict({"config": json.loads(config.to_json())} | code, sep=".")
                              | {"--workdir": str(workdir), "--mode": mode})
    _check_config(config, mesh, mode)

    add_distractors = functools.partial(protocols.add_distractors, name=config.evaluate.extra_gallery,
                                        data=config.data)
    # A data set that is drawn here is drawn once.
    protocol = parallel.first_then_others(lambda: protocols.load(config.data.name, config.data))
    other_tests = parallel.first_then_others(lambda: [
        add_distractors(protocols.tests(name, config.data))
        for name in dict.fromkeys(config.evaluate.datasets.split(",")) if name])  # once, or means would count it twice

    command = Command(mode, mesh, optim.make_optimizer(config.optim, config.train.steps), other_tests, source)

    def check_runs():
        _refuse_folder_of_others(workdir, config.data.name, protocol.num_trials)
        runs = []
        numbers = protocol.numbers(config.data.trials)
        for number, trial in zip(numbers, add_distractors(map(protocol.trial, numbers)), strict=True):
            trial_config = config.copy_and_resolve_references()
            trial_config.data.trials = str(number)
            folder = workdir / trial_folder(number) if protocol.num_trials > 1 else workdir
            runs.append(_check_run(command, trial_config, folder, trial))
        return runs

    runs = parallel.together(check_runs)
    for run in runs:
        parallel.refuse_differing({
            "data.loader": run.config.data.loader, "the training data": run.label_map["fingerprint"],
            "the latest checkpoint": latest_step(run.workdir)})
    if protocol.num_trials > 1:
        _claim(workdir, config)
    if jax.process_index() == 0:
        print_model(runs[0].model, config)
    with storage_errors_told(workdir):
        rows = [row for run in runs for row in _train_and_evaluate(run)]
        if protocol.num_trials > 1 and mode != "train":
            rows = collect_trials(workdir, config.evaluate, source)
    return rows


def _refuse_folder_of_others(workdir: Path, dataset: str, num_trials: int) -> None:
    """A UserError if `workdir` is one trial's and the run has several, or is that of several and the run has one.

    A trial's run would get those of trials in its folder, and the results of these in the place of its own.
    """
    if num_trials > 1 and latest_step(workdir) is not None:
        raise UserError(f"{workdir} is the folder of one run, and {dataset} has {num_trials} trials, each in a folder "
                        f"of its own in --workdir; give another, such as {workdir.parent} for a trial that is there")
    if num_trials == 1 and latest_step(workdir) is None and trial_folders(workdir):
        raise UserError(f"{workdir} is the folder of several trials, and {dataset} has one; give another --workdir")


def _check_config(config: ml_collections.ConfigDict, mesh: Mesh, mode: str) -> None:
    """Refuses fields that no run can have, whatever its data."""
    refuse_unknown_fields(config)
    check_ranges(config)
    if config.keep_identity_layers and not config.init_from:
        raise UserError("keep_identity_layers=True needs a run to take them from: give init_from, too")
    compute_dtype(config.train.dtype)  # refuses an unknown one
    if mode != "evaluate":  # which may have other devices than the training had
        parallel.check_batch_size(config.train.batch_size, mesh, "train.batch_size", config.train.accumulation_steps)
    parallel.check_batch_size(config.evaluate.batch_size, mesh, "evaluate.batch_size")
    sampling.check_fields(config.train)
    losses.check_fields(config.loss, config.model.cosine_scale, config.train.images_per_identity)
    check_input_size(config.data.height, config.data.width, config.model.num_strips)
    evaluate.check_fields(config.evaluate)
    traced = profiling.parse_steps(config.profile)
    if traced and mode != "evaluate" and traced.start >= config.train.steps:
        raise UserError(f"profile={config.profile} is beyond train.steps={config.train.steps}, counted from 0: give "
                        "steps that are trained")


def _check_run(command: Command, given_config: ml_collections.ConfigDict, workdir: Path, trial: Trial) -> Run:
    """All that can be wrong is told before the first step of the first trial, and before anything is written."""
    begun, config = has_checkpoint(workdir), given_config.copy_and_resolve_references()
    if command.mode == "evaluate" and not begun:
        raise UserError(f"{workdir} has no checkpoint to evaluate; train it first, or give --workdir of a trained run")
    if trial.train is None:
        if config.train.steps:
            raise UserError(f"{trial.dataset} has no training images; evaluate a run trained on others with "
                            f"--config.evaluate.datasets={trial.dataset}, or start from it (--config.init_from) in "
                            "--config.train.steps=0")
        trial = dataclasses.replace(trial, train=trial.gallery.select(np.arange(0)))
    if config.train.norm_by_camera and not trial.cameras_known:
        raise UserError(f"train.norm_by_camera=True needs cameras, and those of {trial.dataset} are not known; leave "
                        "it False, or prepare the data with a column camera")
    config.data.loader = choose_loader(config, trial.train, command.mesh)
    if command.mode != "evaluate" and config.train.steps:
        groups = sampling.identity_groups(trial.labels(), config.train.images_per_identity)
        sampling.steps_per_epoch(len(trial.train), config.train.batch_size, groups)  # refuses too large a batch
    refuse_no_test(trial, config)
    model = build_model(config, len(trial.identities()))
    _refuse_frozen(config.train, config.init_from)
    initial = _load_initial(config.init_from, workdir, trial) if config.init_from and not begun else None
    if initial:
        refuse_other_network(initial, config)
    parent = load_label_map(workdir)["init_from"] if begun else initial.label_map if initial else None
    label_map = protocols.label_map(trial, protocols.with_names(parent, trial.names))
    if initial and config.keep_identity_layers:
        protocols.refuse_other_people(label_map["init_from"], label_map)
    for test in [trial, *(test for tests in command.other_tests for test in tests)]:
        protocols.refuse_trained_on(test, label_map)
        norm_statistics.refuse_no_images(test, config)
    return Run(command, given_config, config, workdir, trial, model, initial, label_map)


def _refuse_frozen(train: ml_collections.ConfigDict, init_from: str) -> None:
    """Refuses `train.frozen_through` where what it leaves as it is would be of no use."""
    if train.frozen_through and not init_from:
        raise UserError(f"train.frozen_through={train.frozen_through} would freeze random weights; give the run whose "
                        "weights to freeze, --config.init_from, or no train.frozen_through")
    # At test each camera's statistics would come into frozen layers, too, and no layer was trained for that.
    if train.frozen_through and train.norm_by_camera:
        raise UserError(f"train.frozen_through={train.frozen_through} keeps statistics of all cameras together, and "
                        "train.norm_by_camera=True normalises by each camera's; give one of the two")


def _load_initial(init_from: str, workdir: Path, trial: Trial) -> SavedRun:
    """The run to start from: of one that holds several trials of the same data set, the trial of the same number."""
    folder = user_path(init_from)
    if not trial_folders(folder) or workdir.name != trial_folder(trial.number):
        return load_run(folder)
    run = load_run(folder / workdir.name)
    if namespace(run.label_map["dataset"]) != namespace(trial.dataset):
        raise UserError(f"{folder} holds trials of {run.label_map['dataset']}, whose numbers mean nothing to those of "
                        f"{trial.dataset}; give one of them, such as --config.init_from={run.workdir}")
    return run


def _claim(workdir: Path, *run: Any) -> contextlib.ExitStack:
    """`claim_workdir` by process 0, for all."""
    lock = parallel.on_first_process(lambda: claim_workdir(workdir, *run))
    parallel.together(lambda: await_claimed(workdir))
    return lock or contextlib.ExitStack()


def _train_and_evaluate(run: Run) -> list[dict[str, Any]]:
    """Trains the run as far as it is not trained yet, and evaluates it; `mode` leaves out one of the two."""
    started, mode = time.perf_counter(), run.command.mode
    with _claim(run.workdir, run.given_config, run.label_map):
        _announce(run)
        parallel.on_first_process(lambda: set_aside_damaged(run.workdir))
        state = init_state(run.config, run.model, run.command.optimizer, run.command.mesh, run.initial)
        checkpoints = Checkpoints(run.workdir, run.config.keep_checkpoints)
        try:
            progress = {"interval": {}}
            if checkpoints.latest_step() is not None:
                state, progress = checkpoints.restore(state)
            if mode != "evaluate":
                state = _train(run, checkpoints, state, progress)
        finally:
            checkpoints.close()
        return [] if mode == "train" else evaluate_run(run, state, started)


def _announce(run: Run) -> None:
    trial, mesh = run.trial, run.command.mesh
    tests = "no test"
    if trial.query is not None:
        tests = f"{len(trial.query)} queries, {len(trial.gallery)} gallery images"
    elif trial.validation is not None:
        tests = f"{len(trial.validation)} validation images"
    print(f"{trial.dataset}, {trial.protocol}: {len(trial.train)} training images of "
          f"{len(trial.identities())} identities, {tests}; run {run.workdir}; "
          f"{mesh.size} {mesh.devices.flat[0].device_kind} device(s); loader {run.config.data.loader}", flush=True)
    if trial.incomplete:
        print(f"an incomplete or degraded copy of the data: {trial.incomplete}", flush=True)
    if run.initial:
        print(f"weights of {run.initial.workdir}, step {run.initial.step}, trained on "
              f"{run.initial.label_map['dataset']}; the identity layers are "
              f"{'kept' if run.config.keep_identity_layers else 'new'}", flush=True)
    elif trial.query is not None and run.label_map["init_from"] is None and namespace(trial.dataset) in PAPER_DATASETS:
        print("no pre-trained weights were given, so the network starts from random ones (the paper pre-trains): give "
              "a run's folder with --config.init_from, such as that of configs/imagenet.py", flush=True)
    if frozen := run.model.frozen_layers():
        print(f"frozen: {', '.join(frozen)}", flush=True)


def _train(run: Run, checkpoints: Checkpoints, state: TrainState, progress: dict[str, Any]) -> TrainState:
    config, mesh = run.config, run.command.mesh
    first_step, last_step = int(state.step), config.train.steps
    if first_step >= last_step:
        if checkpoints.latest_step() is None:  # no steps are to be taken: a run of what it starts from
            checkpoints.save(0, state, {"interval": {}})
            checkpoints.wait()
        print(f"the run in {run.workdir} is finished: {first_step} steps", flush=True)
        return state
    traced = profiling.parse_steps(config.profile)
    if first_step:
        print(f"resuming after step {first_step}", flush=True)
        if traced and traced.stop <= first_step:
            print(f"nothing is traced: the steps of profile={config.profile} were taken before", flush=True)
    parallel.on_first_process(
        lambda: training_history.record_start(run.workdir, run.command.provenance, first_step))
    at_once = steps_per_dispatch(config, first_step)
    step = run.train_step(config.data.loader == "device", at_once)
    batches, seed = _batches(run, first_step), parallel.replicate(np.uint32(config.seed), mesh)
    log = TrainingLog(run.workdir, first_step, last_step, config.train.batch_size, progress["interval"],
                      quiet=jax.process_index() > 0)
    trace = profiling.Trace(traced if jax.process_index() == 0 else range(0), run.workdir)
    any_stop = parallel.make_any_stop(mesh)
    in_flight = _InFlight(run, checkpoints, log, at_once)
    ahead = 0 if jax.default_backend() == "cpu" else DISPATCHES_AHEAD  # a CPU's host has nothing better to do
    # One that a stop has left out is made up for.
    evaluated = is_due(config, first_step) and parallel.all_of(
        parallel.on_first_process(lambda: logs.is_evaluated(run.workdir, first_step)))[0]

    with StopRequest() as stop:
        def stopped() -> int:
            return int(any_stop(stop.requested or 0))

        try:
            done, told_to_stop = first_step, 0
            while done < last_step and not told_to_stop:
                if is_due(config, done) and not (done == first_step and evaluated):
                    # Nothing is evaluated before it is known to be finite.
                    told_to_stop = in_flight.finish_all_but(0) or _evaluate(run, state, log, stopped)
                    if told_to_stop:
                        checkpoints.save(done, state, {"interval": log.interval()})
                        break
                done += at_once
                dispatch = range(done - at_once, done)
                trace.before(dispatch)
                state, metrics = step(state, next(batches), seed)
                trace.after(dispatch, metrics)
                in_flight.push(done, metrics, any_stop(stop.requested or 0))
                told_to_stop = in_flight.finish_all_but(ahead)
                if jax.process_count() == 1:  # need not wait to hear it from others
                    told_to_stop = stop.requested
                if done % config.checkpoint_every == 0 or done == last_step or told_to_stop:
                    # Nothing is saved before it is known to be finite.
                    told_to_stop = in_flight.finish_all_but(0) or told_to_stop
                    checkpoints.save(done, state, {"interval": log.interval()})
            checkpoints.wait()
            told_to_stop = told_to_stop or stopped()  # while the last steps were saved
            if told_to_stop:
                print(f"stopped by {signal.Signals(told_to_stop).name} after step {done}, which is saved; "
                      "the same command goes on", flush=True)
                raise SystemExit(128 + told_to_stop)
        finally:
            trace.stop()
            log.close()
    return state


def _evaluate(run: Run, state: TrainState, log: TrainingLog, stopped: Callable[[], int]) -> int:
    """Evaluates the network of `state`, logs and prints its scores; the signal that any process was sent, or 0."""
    started, step = time.perf_counter(), int(state.step)
    rows = evaluate_while_training(run, state, stopped)
    if rows is not None:
        log.evaluation(step, rows, time.perf_counter() - started)
        told = (" ".join([row["feature"], *(f"{TITLES[score]} {format_score(row, score)}" for score in logs.EVALUATED)])
                for row in rows)
        print(f"step {step}/{run.config.train.steps}  evaluation in per cent: {', '.join(told)}", flush=True)
    return stopped()


class _InFlight:
    """The dispatches given to the device whose metrics are not fetched yet, oldest first."""

    def __init__(self, run: Run, checkpoints: Checkpoints, log: TrainingLog, steps_at_once: int):
        self._config, self._checkpoints, self._log, self._steps_at_once = run.config, checkpoints, log, steps_at_once
        self._learning_rate = optim.learning_rate_schedule(run.config.optim, run.config.train.steps)
        self._dispatches = collections.deque()
        self._stop_signal = 0

    def push(self, done: int, metrics: dict[str, jax.Array], stop_signal: Any) -> None:
        """A dispatch after which `done` steps are done; `stop_signal` is what `parallel.make_any_stop` gives."""
        self._dispatches.append((done, metrics, stop_signal))

    def finish_all_but(self, newest: int) -> int:
        """Fetches, checks and logs the metrics of the others; the signal that any process was sent by then, or 0."""
        while len(self._dispatches) > newest:
            done, metrics, stop_signal = self._dispatches.popleft()
            self._stop_signal = self._stop_signal or int(stop_signal)  # every process hears of it after the same step
            metrics = {name: np.atleast_1d(values).tolist() for name, values in jax.device_get(metrics).items()}
            _refuse_non_finite(done - self._steps_at_once + 1, metrics, self._checkpoints)
            self._log.add(done, metrics)
            if done % self._config.log_every == 0 or done == self._config.train.steps:
                self._log.report(done, float(self._learning_rate(done - 1)))
        return self._stop_signal


def _batches(run: Run, first_step: int) -> Iterator[Batch]:
    """What the step takes, step by step: the data set itself, or batches decoded by tf.data."""
    data, train, images, labels = run.config.data, run.config.train, run.trial.train, run.trial.labels()
    size = images.training_size(data.height, data.width)
    groups = sampling.identity_groups(labels, train.images_per_identity)
    cameras = run.trial.camera_one_hot() if train.norm_by_camera else None
    if data.loader == "device":
        placed = device_data.place(images, labels, *size, run.command.mesh, groups, cameras)
        while True:
            yield placed
    rows = parallel.process_slice(train.batch_size)
    indices, to_decode = itertools.tee(
        sampling.device_rows(batch, run.command.mesh.size, train.accumulation_steps).reshape(-1)[rows]
        for batch in sampling.training_batches(
            run.config.seed, first_step, train.steps, len(images), train.batch_size, groups))
    decoded = input_pipeline.decode_batches(images, to_decode, *size)
    for batch, batch_images in zip(indices, decoded, strict=True):
        of_batch = labels[batch].astype(np.int32), None if cameras is None else cameras[batch]
        yield parallel.shard_batch((batch_images, *of_batch), run.command.mesh)


def _refuse_non_finite(first: int, metrics: dict[str, list[float]], checkpoints: Checkpoints) -> None:
    """A UserError if a metric of the steps `first` and following is not finite."""
    bad = [(index, name) for name, values in metrics.items()
           for index, value in enumerate(values) if not math.isfinite(value)]
    if bad:
        step = min(bad)[0]
        names = [name for index, name in bad if index == step]
        kept = checkpoints.latest_step()
        raise UserError(f"{', '.join(names)} not finite at step {first + step}; "
                        + (f"checkpoint {kept} is the last good one" if kept is not None else "no checkpoint yet")
                        + "; lower optim.learning_rate or the loss weights and train in another --workdir")
