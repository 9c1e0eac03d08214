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
import optax
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from jlml_jax import (
    device_data,
    evaluate,
    input_pipeline,
    losses,
    norm_statistics,
    optim,
    parallel,
    pictures,
    profiling,
    protocols,
    provenance,
    result_rows,
    sampling,
)
from jlml_jax.checkpoints import (
    RESULTS,
    TRAINING,
    Checkpoints,
    SavedRun,
    await_claimed,
    claim_workdir,
    has_checkpoint,
    latest_step,
    load_label_map,
    load_run,
    read_description,
    refuse_other_network,
    set_aside_damaged,
    trial_folder,
    trial_folders,
)
from jlml_jax.config_ranges import check_ranges
from jlml_jax.datasets.base import Split
from jlml_jax.errors import UserError, first_few, storage_errors_told
from jlml_jax.files import refuse_address, user_path, write_atomically
from jlml_jax.kept_step import KeptStep
from jlml_jax.logs import TrainingLog
from jlml_jax.models import build_model, check_input_size, count_operations, init_variables, variable_shapes
from jlml_jax.protocols import Trial, namespace
from jlml_jax.stopping import StopRequest
from jlml_jax.train_step import Batch, TrainState, compute_dtype, init_state, make_train_step, steps_per_dispatch

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
    """`config.data.loader`, with auto resolved: device where the decoded images take at most a third of memory."""
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


@dataclasses.dataclass(frozen=True)
class _Run:
    """One trial's run, checked but not begun."""

    asked: ml_collections.ConfigDict  # as given
    config: ml_collections.ConfigDict  # with data.loader resolved
    workdir: Path
    trial: Trial
    others: list[list[Trial]]  # for each data set of evaluate.datasets, its trials
    mesh: Mesh
    model: nn.Module
    optimizer: optax.GradientTransformation
    initial: SavedRun | None  # the run whose weights to start from, unless this one has a checkpoint
    label_map: dict[str, Any]
    source: dict[str, Any]  # provenance so far
    # `_make_step`, `evaluate.make_forward` and `norm_statistics.make_statistics`, each with a cache that all trials of
    # a command share: they differ in their images, and what is compiled for one serves the others.
    make_step: Callable
    make_forward: Callable
    make_statistics: Callable

    def compiled_with(self) -> ml_collections.FrozenConfigDict:
        """The config, to be compiled with: the same for all trials, and hashable."""
        config = self.config.copy_and_resolve_references()
        config.data.trials = ""
        return ml_collections.FrozenConfigDict(config)


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
    check_ranges(config)
    if config.keep_identity_layers and not config.init_from:
        raise UserError("keep_identity_layers=True needs a run to take them from: give init_from, too")
    compute_dtype(config.train.dtype)  # refuses an unknown one
    parallel.check_batch_size(config.train.batch_size, mesh, "train.batch_size", config.train.accumulation_steps)
    parallel.check_batch_size(config.evaluate.batch_size, mesh, "evaluate.batch_size")
    sampling.check_fields(config.train)
    losses.check_fields(config.loss, config.model.cosine_scale, config.train.images_per_identity)
    check_input_size(config.data.height, config.data.width, config.model.num_strips)
    evaluate.check_fields(config.evaluate)
    profiling.parse_steps(config.profile)

    add_distractors = functools.partial(protocols.add_distractors, name=config.evaluate.extra_gallery,
                                        data=config.data)
    # A data set that is drawn here is drawn once.
    protocol = parallel.first_then_others(lambda: protocols.load(config.data.name, config.data))
    others = parallel.first_then_others(lambda: [
        add_distractors(protocols.tests(name, config.data)) for name in config.evaluate.datasets.split(",") if name])

    check = functools.partial(
        _check_run, others=others, mesh=mesh, mode=mode, source=source,
        optimizer=optim.make_optimizer(config.optim, config.train.steps),
        make_step=functools.cache(functools.partial(_make_step, source)),
        make_forward=functools.cache(evaluate.make_forward),
        make_statistics=functools.cache(norm_statistics.make_statistics))

    def check_runs():
        runs = []
        numbers = protocol.numbers(config.data.trials)
        for number, trial in zip(numbers, add_distractors(map(protocol.trial, numbers)), strict=True):
            of_trial = config.copy_and_resolve_references()
            of_trial.data.trials = str(number)
            folder = workdir / trial_folder(number) if protocol.num_trials > 1 else workdir
            runs.append(check(of_trial, folder, trial))
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
        rows = [row for run in runs for row in _go(run, mode)]
        if protocol.num_trials > 1 and mode != "train":
            rows = _collect_trials(workdir, config.evaluate, source)
    return rows


def _make_step(source: dict[str, Any], config: ml_collections.FrozenConfigDict, model: nn.Module,
               optimizer: optax.GradientTransformation, mesh: Mesh, *form: Any) -> KeptStep:
    made_of = [config[section].to_json() for section in ("augment", "data", "loss", "model", "optim", "train")]
    step = make_train_step(config, model, optimizer, mesh, *form)
    return KeptStep(step, f"{made_of} {model} {mesh} {form}", source, config.compilation_cache)


def _check_run(config: ml_collections.ConfigDict, workdir: Path, trial: Trial, *, others: list[list[Trial]],
               mesh: Mesh, mode: str, **of_command: Any) -> _Run:
    """All that can be wrong is told before the first step of the first trial, and before anything is written."""
    begun = has_checkpoint(workdir)
    if mode == "evaluate" and not begun:
        raise UserError(f"{workdir} has no checkpoint to evaluate; train it first, or give --workdir of a trained run")
    if trial.train is None:
        if config.train.steps:
            raise UserError(f"{trial.dataset} has no training images; evaluate a run trained on others with "
                            f"--config.evaluate.datasets={trial.dataset}, or start from it (--config.init_from) in "
                            "--config.train.steps=0")
        trial = dataclasses.replace(trial, train=trial.gallery.select(np.arange(0)))
    asked = config
    config = config.copy_and_resolve_references()
    config.data.loader = choose_loader(config, trial.train, mesh)
    if mode != "evaluate" and config.train.steps:
        groups = sampling.identity_groups(trial.labels(), config.train.images_per_identity)
        sampling.steps_per_epoch(len(trial.train), config.train.batch_size, groups)  # refuses too large a batch
    model = build_model(config, len(trial.identities()))
    initial = _load_initial(config.init_from, workdir, trial) if config.init_from and not begun else None
    if initial:
        refuse_other_network(initial, config)
    parent = load_label_map(workdir)["init_from"] if begun else initial.label_map if initial else None
    label_map = protocols.label_map(trial, parent)
    if initial and config.keep_identity_layers:
        protocols.refuse_other_people(initial.label_map, label_map)
    for test in [trial, *(test for tests in others for test in tests)]:
        protocols.refuse_trained_on(test, label_map)
        norm_statistics.refuse_no_images(test, config)
    return _Run(asked, config, workdir, trial, others, mesh, model, initial=initial, label_map=label_map, **of_command)


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
    lock = parallel.together(lambda: claim_workdir(workdir, *run) if jax.process_index() == 0
                             else contextlib.ExitStack())
    parallel.together(lambda: await_claimed(workdir))
    return lock


def _go(run: _Run, mode: str) -> list[dict[str, Any]]:
    started = time.perf_counter()
    with _claim(run.workdir, run.asked, run.label_map):
        _announce(run)
        parallel.together(lambda: set_aside_damaged(run.workdir) if jax.process_index() == 0 else None)
        state = init_state(run.config, run.model, run.optimizer, run.mesh, run.initial)
        checkpoints = Checkpoints(run.workdir, run.config.keep_checkpoints)
        try:
            progress = {"interval": {}}
            if checkpoints.latest_step() is not None:
                state, progress = checkpoints.restore(state)
            if mode != "evaluate":
                state = _train(run, checkpoints, state, progress)
        finally:
            checkpoints.close()
        return [] if mode == "train" else _evaluate(run, state, started)


def _announce(run: _Run) -> None:
    trial, devices = run.trial, run.mesh.devices.flat
    tests = "no test"
    if trial.query is not None:
        tests = f"{len(trial.query)} queries, {len(trial.gallery)} gallery images"
    elif trial.validation is not None:
        tests = f"{len(trial.validation)} validation images"
    print(f"{trial.dataset}, {trial.protocol}: {len(trial.train)} training images of "
          f"{len(trial.identities())} identities, {tests}; run {run.workdir}; "
          f"{run.mesh.size} {devices[0].device_kind} device(s); loader {run.config.data.loader}", flush=True)
    if trial.incomplete:
        print(f"an incomplete or degraded copy of the data: {trial.incomplete}", flush=True)
    if run.initial:
        print(f"weights of {run.initial.workdir}, step {run.initial.step}, trained on "
              f"{run.initial.label_map['dataset']}; the identity layers are "
              f"{'kept' if run.config.keep_identity_layers else 'new'}", flush=True)
    elif trial.query is not None and run.label_map["init_from"] is None and namespace(trial.dataset) in PAPER_DATASETS:
        print("no pre-trained weights were given, so the network starts from random ones (the paper pre-trains): give "
              "a run's folder with --config.init_from, such as that of configs/imagenet.py", flush=True)


def _train(run: _Run, checkpoints: Checkpoints, state: TrainState, progress: dict[str, Any]) -> TrainState:
    config, workdir = run.config, run.workdir
    first_step, last_step = int(state.step), config.train.steps
    if first_step >= last_step:
        if checkpoints.latest_step() is None:  # no steps are to be taken: a run of what it starts from
            checkpoints.save(0, state, {"interval": {}})
            checkpoints.wait()
        print(f"the run in {workdir} is finished: {first_step} steps", flush=True)
        return state
    if first_step:
        print(f"resuming after step {first_step}", flush=True)
    parallel.together(lambda: _add_start(run, first_step) if jax.process_index() == 0 else None)
    from_device_data = config.data.loader == "device"
    at_once = steps_per_dispatch(config, first_step)
    step = run.make_step(run.compiled_with(), run.model, run.optimizer, run.mesh, from_device_data, at_once)
    batches, seed = _batches(run, first_step), parallel.replicate(np.uint32(config.seed), run.mesh)
    schedule = optim.learning_rate_schedule(config.optim, last_step)
    log = TrainingLog(workdir, first_step, last_step, config.train.batch_size, progress["interval"],
                      quiet=jax.process_index() > 0)
    trace = profiling.Trace(profiling.parse_steps(config.profile if jax.process_index() == 0 else ""), workdir)
    any_stop = parallel.make_any_stop(run.mesh)
    in_flight = collections.deque()
    ahead = 0 if jax.default_backend() == "cpu" else DISPATCHES_AHEAD  # a CPU's host has nothing better to do
    told_to_stop = 0  # by any process: every process knows it after the same step

    def finish_oldest():
        nonlocal told_to_stop
        done, metrics, stop_number = in_flight.popleft()
        told_to_stop = told_to_stop or int(stop_number)
        metrics = {name: np.atleast_1d(values).tolist() for name, values in jax.device_get(metrics).items()}
        _refuse_non_finite(done - at_once + 1, metrics, checkpoints)
        log.add(done, metrics)
        if done % config.log_every == 0 or done == last_step:
            log.report(done, float(schedule(done - 1)))

    with StopRequest() as stop:
        try:
            for done in range(first_step + at_once, last_step + 1, at_once):
                dispatch = range(done - at_once, done)
                trace.before(dispatch)
                state, metrics = step(state, next(batches), seed)
                trace.after(dispatch, metrics)
                in_flight.append((done, metrics, any_stop(stop.requested or 0)))
                while len(in_flight) > ahead:
                    finish_oldest()
                if jax.process_count() == 1:  # need not wait to hear it from others
                    told_to_stop = stop.requested
                if done % config.checkpoint_every == 0 or done == last_step or told_to_stop:
                    while in_flight:  # nothing is saved before it is known to be finite
                        finish_oldest()
                    checkpoints.save(done, state, {"interval": log.interval()})
                if told_to_stop:
                    break
            checkpoints.wait()
            told_to_stop = told_to_stop or int(any_stop(stop.requested or 0))  # while the last steps were saved
            if told_to_stop:
                print(f"stopped by {signal.Signals(told_to_stop).name} after step {done}, which is saved; "
                      "the same command goes on", flush=True)
                raise SystemExit(128 + told_to_stop)
        finally:
            trace.stop()
            log.close()
    return state


def _add_start(run: _Run, first_step: int) -> None:
    starts = _starts(run.workdir) if first_step else []
    if not starts or not _is_of(run.source, starts[-1]):
        starts.append(run.source | {"first_step": first_step})
        write_atomically(run.workdir / TRAINING, json.dumps(starts, indent=1))


def _is_of(source: dict[str, Any], start: dict[str, Any]) -> bool:
    """Whether what trained from there is the same command, code and machine as the one at work now."""
    return all(start.get(name) == value for name, value in source.items())


def _starts(workdir: Path) -> list[dict[str, Any]]:
    """What `_add_start` has written."""
    path = workdir / TRAINING
    try:
        return json.loads(path.read_text()) if path.exists() else []
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it, and who trained this run is not known") from error


def _batches(run: _Run, first_step: int) -> Iterator[Batch]:
    """What the step takes, step by step: the data set itself, or batches decoded by tf.data."""
    data, train, images, labels = run.config.data, run.config.train, run.trial.train, run.trial.labels()
    size = images.training_size(data.height, data.width)
    groups = sampling.identity_groups(labels, train.images_per_identity)
    cameras = run.trial.camera_one_hot() if train.norm_by_camera else None
    if data.loader == "device":
        placed = device_data.place(images, labels, *size, run.mesh, groups, cameras)
        while True:
            yield placed
    rows = parallel.process_slice(train.batch_size)
    indices, to_decode = itertools.tee(
        sampling.device_rows(batch, run.mesh.size, train.accumulation_steps).reshape(-1)[rows]
        for batch in sampling.training_batches(
            run.config.seed, first_step, train.steps, len(images), train.batch_size, groups))
    decoded = input_pipeline.decode_batches(images, to_decode, *size)
    for batch, batch_images in zip(indices, decoded, strict=True):
        of_batch = labels[batch].astype(np.int32), None if cameras is None else cameras[batch]
        yield parallel.shard_batch((batch_images, *of_batch), run.mesh)


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


def _evaluate(run: _Run, state: TrainState, started: float) -> list[dict[str, Any]]:
    config, trial = run.config, run.trial
    trained = {"params": state.params, "batch_stats": state.batch_stats}

    forward = run.make_forward(run.model, run.compiled_with(), run.mesh)

    def extract(variables: Any, forward: evaluate.Forward = forward) -> Callable[[Split], evaluate.Features]:
        return functools.partial(evaluate.extract_features, forward, variables, data=config.data,
                                 batch_size=config.evaluate.batch_size, mesh=run.mesh)

    features_of = functools.partial(
        norm_statistics.features_of, extract_with=extract, variables=trained, config=config, mesh=run.mesh,
        make_statistics=lambda: run.make_statistics(run.model, run.compiled_with(), run.mesh))
    rows, products = [], evaluate.products_on(run.mesh)
    if trial.validation is not None:
        logits = run.make_forward(run.model, run.compiled_with(), run.mesh, "logits")
        rows += evaluate.evaluate_validation(trial, extract(trained, logits)(trial.validation))
    if trial.query is not None:
        features = features_of(trial)
        if config.evaluate.baselines:
            rows += evaluate.evaluate_baselines(trial, config.data)
            untrained = extract(init_variables(run.model, config.seed, config.data.height, config.data.width))
            single_query = dataclasses.replace(trial, multi_query=None)
            plain = config.evaluate.copy_and_resolve_references()
            plain.norm_statistics = "run"
            rows.append(evaluate.evaluate_trials([single_query], untrained, plain)[-1]
                        | {"feature": "untrained network"})
        rows += evaluate.evaluate_trials([trial], features, config.evaluate, products)
        if config.evaluate.picture and jax.process_index() == 0:
            joint = [evaluate.matching_feature(features(split), config.evaluate.normalize)
                     for split in (trial.query, trial.gallery)]
            pictures.ranked_lists(trial, *joint, run.workdir / "ranked.png")
    for tests in run.others:
        if config.evaluate.norm_statistics == "run":  # an image has the same features in all trials
            others = evaluate.evaluate_trials(tests, features_of(tests[0]), config.evaluate, products)
        else:
            others = [row for test in tests
                      for row in evaluate.evaluate_trials([test], features_of(test), config.evaluate, products)]
            others += result_rows.mean_rows(others) if len(tests) > 1 else []
        rows += [row | {"trained_on": trial.dataset, "trained_trial": trial.number} for row in others]
    if rows:
        print(result_rows.format_rows(rows), flush=True)
    else:
        print(f"{trial.dataset} has no test; evaluate the run on other data sets with --config.evaluate.datasets",
              flush=True)
    source = run.source | {
        "seed": config.seed, "steps": int(state.step), "train_fingerprint": run.label_map["fingerprint"],
        "wall_time_seconds": round(time.perf_counter() - started, 1)}
    starts = _starts(run.workdir)
    if not all(_is_of(run.source, start) for start in starts):
        source["training"] = starts
    _write_results(run.workdir, rows, source)
    return rows


def _write_results(workdir: Path, rows: list[dict[str, Any]], source: dict[str, Any]) -> None:
    def write():
        write_atomically(workdir / RESULTS, json.dumps({"rows": rows, "provenance": source}, indent=1))
        print(f"results in {workdir / RESULTS}", flush=True)

    parallel.together(lambda: write() if jax.process_index() == 0 else None)


# Of config.evaluate: what changes features or queries, and is not in the rows.
_NOT_IN_ROWS = ("flip_average", "multi_query")


def _collect_trials(workdir: Path, settings: ml_collections.ConfigDict, source: dict[str, Any]
                    ) -> list[dict[str, Any]]:
    """Writes the results of all trials evaluated so far, and their means, into the folder that they are in.

    The means are over the trials that were evaluated by these settings, a `config.evaluate`.
    """
    trials = {path.parent: json.loads(path.read_text()) for path in sorted(workdir.glob(f"trial-*/{RESULTS}"))}
    rows = [row for trial in trials.values() for row in trial["rows"]]
    unlike = [folder for folder in trials if any(
        read_description(folder)[0].evaluate[name] != settings[name] for name in _NOT_IN_ROWS)]
    if unlike:
        print(f"evaluated by another {' or '.join(_NOT_IN_ROWS)} and not in the means: "
              f"{first_few([folder.name for folder in unlike])}; --mode=evaluate evaluates them again", flush=True)
    alike = [row for folder, trial in trials.items() if folder not in unlike for row in trial["rows"]]
    others = [row for row in alike if "trained_trial" in row]
    means = result_rows.mean_rows([row for row in alike if "trained_on" not in row])
    means += result_rows.mean_rows(result_rows.without_averaged(others), over="trained_trial")
    if means:
        print(result_rows.format_rows(means), flush=True)
    of_trials = [trial["provenance"] for trial in trials.values()]
    command, source = source, source | {name: of_trials[0][name] for name in ("seed", "steps")} | {
        "train_fingerprint": [one["train_fingerprint"] for one in of_trials],
        "wall_time_seconds": round(sum(one["wall_time_seconds"] for one in of_trials), 1)}
    starts = []
    for start in (start for one in of_trials for start in one.get("training", [one])):
        if (start := {name: start.get(name) for name in command}) not in starts:
            starts.append(start)
    if starts != [command]:
        source["training"] = starts
    _write_results(workdir, rows + means, source)
    return rows + means
