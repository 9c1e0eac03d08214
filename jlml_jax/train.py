"""The loop: build the state, step, log, checkpoint, evaluate."""

import collections
import functools
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from jlml_jax import (
    augment,
    device_data,
    evaluate,
    input_pipeline,
    losses,
    optim,
    parallel,
    pictures,
    protocols,
    provenance,
    sampling,
)
from jlml_jax.checkpoints import Checkpoints, claim_workdir, write_atomically
from jlml_jax.device_data import DeviceData
from jlml_jax.errors import UserError
from jlml_jax.logs import TrainingLog
from jlml_jax.models import build_model, check_input_size, init_variables
from jlml_jax.parallel import BATCH_AXIS
from jlml_jax.protocols import Protocol

MODES = ("train_and_evaluate", "train", "evaluate")

# Steps given to the device before the oldest one's metrics are fetched: it never waits for the host.
STEPS_AHEAD = 2


@flax.struct.dataclass
class TrainState:
    """All that a step reads and writes; `step` counts the steps done."""

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any


Batch = DeviceData | tuple[jax.Array, jax.Array]  # a data set to draw from, or this device's (images, labels)


def init_state(config: ml_collections.ConfigDict, model: nn.Module, optimizer: optax.GradientTransformation,
               mesh: Mesh) -> TrainState:
    """The state before the first step, replicated over the mesh."""
    variables = init_variables(model, config.seed, config.data.height, config.data.width)
    state = TrainState(np.zeros((), np.int32), variables["params"], variables["batch_stats"],
                       optimizer.init(variables["params"]))
    return parallel.replicate(state, mesh)


def train_step(state: TrainState, batch: Batch, *, model: nn.Module, optimizer: optax.GradientTransformation,
               config: ml_collections.ConfigDict) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step of one device, under the named axis "batch": the same under `shard_map` and under `pmap`.

    Returns the next state and the step's metrics (scalars), both the same on every device.
    """
    if isinstance(batch, DeviceData):
        images, labels = device_data.draw(batch, config.seed, state.step, config.train.batch_size, BATCH_AXIS)
    else:
        images, labels = batch
    key = augment.step_key(config.seed, state.step)
    images = augment.normalise(augment.augment(key, images, config.augment, BATCH_AXIS), config.data)

    def loss_of(params):
        outputs, updates = model.apply({"params": params, "batch_stats": state.batch_stats}, images, train=True,
                                       mutable=["batch_stats"])
        loss, terms = losses.jlml_loss(outputs, params, labels, num_strips=config.model.num_strips, **config.loss)
        return loss, (terms, updates["batch_stats"])

    gradients, (metrics, batch_stats) = jax.grad(loss_of, has_aux=True)(state.params)
    gradients, metrics = jax.lax.pmean((gradients, metrics), BATCH_AXIS)
    metrics["gradient_norm"] = optax.tree.norm(gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, batch_stats, opt_state), metrics


def make_train_step(config: ml_collections.ConfigDict, model: nn.Module, optimizer: optax.GradientTransformation,
                    mesh: Mesh, from_device_data: bool):
    """The compiled step over the mesh: (state, donated; DeviceData or a sharded batch) -> (state, metrics)."""
    step = functools.partial(train_step, model=model, optimizer=optimizer, config=config)
    batch_spec = PartitionSpec() if from_device_data else PartitionSpec(BATCH_AXIS)
    # check_vma=False: gradients of replicated parameters stay per device until the pmean, as under pmap.
    return jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=(PartitionSpec(), batch_spec),
                      out_specs=(PartitionSpec(), PartitionSpec()), check_vma=False),
        donate_argnums=0)


def print_model(model: nn.Module, config: ml_collections.ConfigDict) -> None:
    """Prints parameters and floating-point operations of an evaluation forward, module by module."""
    native = model.clone(native=True)  # as the paper counts: the CPU's rewrites move XLA's count
    images = jnp.zeros((1, config.data.height, config.data.width, 3))
    print(nn.tabulate(native, jax.random.key(0), depth=1, compute_flops=True,
                      console_kwargs={"width": 140, "force_terminal": sys.stdout.isatty()})(images))


def choose_loader(config: ml_collections.ConfigDict, num_images: int, mesh: Mesh) -> str:
    """`config.data.loader`, with auto resolved: device where the decoded images take at most a third of memory."""
    loader = config.data.loader
    if loader not in ("auto", "device", "tf_data"):
        raise UserError(f"data.loader={loader!r} is unknown; known are auto, device, tf_data")
    if loader != "auto":
        return loader
    needed = num_images * config.data.height * config.data.width * 3
    device = mesh.local_devices[0]
    if device.platform == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(mesh.local_devices)
    else:
        memory = (device.memory_stats() or {}).get("bytes_limit", 0)
    return "device" if needed <= memory / 3 else "tf_data"


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str | Path,
                       mode: str = "train_and_evaluate") -> list[dict[str, Any]]:
    """Trains the run of `config` in `workdir`, resuming where it stands, and evaluates it.

    Returns the rows that it writes to `results.json` (none with mode="train"). mode="evaluate" takes the run's latest
    checkpoint. Raises UserError for what the caller can mend.
    """
    started, source = time.perf_counter(), provenance.collect()
    if mode not in MODES:
        raise UserError(f"--mode={mode} is unknown; known are {', '.join(MODES)}")
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(config.compilation_cache))
    workdir = Path(workdir)
    mesh = parallel.make_mesh()
    parallel.check_batch_size(config.train.batch_size, mesh, "train.batch_size")
    parallel.check_batch_size(config.evaluate.batch_size, mesh, "evaluate.batch_size")
    check_input_size(config.data.height, config.data.width, config.model.num_strips)
    evaluate.check_normalize(config.evaluate.normalize)

    protocol = protocols.load(config.data)
    identities = protocol.identities()
    loader = choose_loader(config, len(protocol.train), mesh)
    sampling.steps_per_epoch(len(protocol.train), config.train.batch_size)  # refuses too large a batch
    model = build_model(config, len(identities))
    optimizer = optim.make_optimizer(config.optim, config.train.steps)
    if mode == "evaluate" and not (workdir / "config.json").exists():
        raise UserError(f"{workdir} has no run to evaluate; train it first, or give --workdir of a trained run")
    fingerprint = protocol.train.fingerprint()
    claim_workdir(workdir, config, {"dataset": config.data.name, "fingerprint": fingerprint,
                                    "identities": identities.tolist()})
    config = config.copy_and_resolve_references()
    config.data.loader = loader
    print_model(model, config)
    print(f"{config.data.name}: {len(protocol.train)} training images of {len(identities)} identities, "
          f"{len(protocol.query)} queries, {len(protocol.gallery)} gallery images; run {workdir}; "
          f"{mesh.size} {mesh.devices.flat[0].device_kind} device(s); loader {config.data.loader}", flush=True)

    state = init_state(config, model, optimizer, mesh)
    checkpoints = Checkpoints(workdir, config.keep_checkpoints)
    try:
        progress = {"interval": {}}
        if checkpoints.latest_step() is not None:
            state, progress = checkpoints.restore(state)
        elif mode == "evaluate":
            raise UserError(f"{workdir} has no checkpoint to evaluate; train it first")
        if mode != "evaluate":
            state = _train(config, workdir, protocol, model, optimizer, mesh, checkpoints, state, progress)
    finally:
        checkpoints.close()
    if mode == "train":
        return []
    source |= {"seed": config.seed, "train_fingerprint": fingerprint}
    return _evaluate(config, workdir, protocol, model, mesh, state, source, started)


def _train(config: ml_collections.ConfigDict, workdir: Path, protocol: Protocol, model: nn.Module,
           optimizer: optax.GradientTransformation, mesh: Mesh, checkpoints: Checkpoints, state: TrainState,
           progress: dict[str, Any]) -> TrainState:
    first_step, last_step = int(state.step), config.train.steps
    if first_step >= last_step:
        print(f"the run in {workdir} is finished: {first_step} steps", flush=True)
        return state
    if first_step:
        print(f"resuming after step {first_step}", flush=True)
    from_device_data = config.data.loader == "device"
    step = make_train_step(config, model, optimizer, mesh, from_device_data)
    batches = _batches(config, protocol, mesh, first_step)
    schedule = optim.learning_rate_schedule(config.optim, last_step)
    log = TrainingLog(workdir, first_step, last_step, config.train.batch_size, progress["interval"])
    in_flight = collections.deque()

    def finish_oldest():
        done, metrics = in_flight.popleft()
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        _refuse_non_finite(done, metrics, checkpoints)
        log.add(done, metrics)
        if done % config.log_every == 0 or done == last_step:
            log.report(done, float(schedule(done - 1)))

    with StopRequest() as stop:
        try:
            for done in range(first_step + 1, last_step + 1):
                state, metrics = step(state, next(batches))
                in_flight.append((done, metrics))
                while len(in_flight) > STEPS_AHEAD:
                    finish_oldest()
                if done % config.checkpoint_every == 0 or done == last_step or stop.requested:
                    while in_flight:  # nothing is saved before it is known to be finite
                        finish_oldest()
                    checkpoints.save(done, state, {"interval": log.interval()})
                if stop.requested and done < last_step:
                    checkpoints.wait()
                    print(f"stopped by {stop.requested.name} after step {done}, which is saved; "
                          "the same command goes on", flush=True)
                    raise SystemExit(128 + stop.requested)
            checkpoints.wait()
        finally:
            log.close()
    return state


def _batches(config: ml_collections.ConfigDict, protocol: Protocol, mesh: Mesh, first_step: int) -> Iterator[Batch]:
    """What the step takes, step by step: the data set itself, or batches decoded by tf.data."""
    data, batch_size, labels = config.data, config.train.batch_size, protocol.labels()
    if config.data.loader == "device":
        placed = device_data.place(protocol.train, labels, data.height, data.width, mesh)
        while True:
            yield placed
    rows = parallel.process_slice(batch_size)
    indices = [batch[rows] for batch in sampling.training_batches(
        config.seed, first_step, config.train.steps, len(protocol.train), batch_size)]
    images = input_pipeline.decode_batches(protocol.train, iter(indices), data.height, data.width)
    for batch, batch_images in zip(indices, images, strict=True):
        yield parallel.shard_batch((batch_images, labels[batch].astype(np.int32)), mesh)


def _refuse_non_finite(done: int, metrics: dict[str, float], checkpoints: Checkpoints) -> None:
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        kept = checkpoints.latest_step()
        raise UserError(f"{', '.join(bad)} not finite at step {done}; "
                        + (f"checkpoint {kept} is the last good one" if kept is not None else "no checkpoint yet")
                        + "; lower optim.learning_rate or the loss weights and train in another --workdir")


class StopRequest:
    """While entered, a first SIGTERM or SIGINT is only noted in `requested`; a second one acts at once."""

    requested: signal.Signals | None = None

    def __enter__(self) -> "StopRequest":
        self._handlers = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._handlers[number] = signal.signal(number, self._note)
            except ValueError:  # not in the main thread, where Python allows no handlers
                break
        return self

    def _note(self, number, _frame):
        self.requested = signal.Signals(number)
        self._restore()

    def _restore(self):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def __exit__(self, *_):
        self._restore()


def _evaluate(config: ml_collections.ConfigDict, workdir: Path, protocol: Protocol, model: nn.Module, mesh: Mesh,
              state: TrainState, source: dict[str, Any], started: float) -> list[dict[str, Any]]:
    forward = evaluate.make_forward(model, config.data, mesh)

    def features_of(variables):
        return [evaluate.extract_features(forward, variables, split, config.data, config.evaluate.batch_size, mesh)
                for split in (protocol.query, protocol.gallery)]

    rows = []
    if config.evaluate.baselines:
        rows += evaluate.evaluate_baselines(protocol, config.data)
        untrained = init_variables(model, config.seed, config.data.height, config.data.width)
        joint = evaluate.evaluate_features(protocol, *features_of(untrained), config.evaluate)[-1]
        rows.append(joint | {"feature": "untrained network"})
    query, gallery = features_of({"params": state.params, "batch_stats": state.batch_stats})
    rows += evaluate.evaluate_features(protocol, query, gallery, config.evaluate)
    print(evaluate.format_rows(rows), flush=True)
    if jax.process_index() == 0:
        source |= {"steps": int(state.step), "wall_time_seconds": round(time.perf_counter() - started, 1)}
        write_atomically(workdir / "results.json", json.dumps({"rows": rows, "provenance": source}, indent=1))
        if config.evaluate.picture:
            joint = [list(evaluate.matching_features(features, config.evaluate.normalize).values())[-1]
                     for features in (query, gallery)]
            pictures.ranked_lists(protocol, *joint, workdir / "ranked.png")
        print(f"results in {workdir / 'results.json'}", flush=True)
    return rows
