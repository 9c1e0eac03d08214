"""Orbax save and restore of a run, with the config and the label map beside the weights."""

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp

from jlml_jax.errors import UserError

# What may differ between a run and its resumption: it changes what is shown or kept, not what is learned.
FREE_FIELDS = ("name", "data.data_dir", "evaluate.", "log_every", "checkpoint_every", "keep_checkpoints",
               "compilation_cache", "train.steps_per_dispatch")

_VISIBLE_WITHIN = 60  # seconds in which a file made on one host is seen on another; NFS remembers what was not there

_LABEL_MAP, _CONFIG = "label_map.json", "config.json"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a whole file or nothing: a reader never sees half of it."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def has_checkpoint(workdir: Path) -> bool:
    """Whether a run in `workdir` has saved anything yet; a trial's run counts for the folder of all trials."""
    return any(step.name.isdigit() for pattern in ("checkpoints/*", "trial-*/checkpoints/*")
               for step in workdir.glob(pattern))


def latest_step(workdir: Path) -> int | None:
    """The step of the latest checkpoint of the run in `workdir`."""
    return max((int(step.name) for step in workdir.glob("checkpoints/*") if step.name.isdigit()), default=None)


def claim_workdir(workdir: Path, config: ml_collections.ConfigDict, label_map: dict[str, Any] | None = None) -> None:
    """Writes config.json and label_map.json into a new run's folder; in one with a checkpoint, refuses another run's.

    `label_map` is JSON: what was trained on, and the identity that each class stands for. The folder of several trials
    has none; each trial has its own.
    """
    config_path, labels_path = workdir / _CONFIG, workdir / _LABEL_MAP
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not config_path.exists() and any(workdir.iterdir()):
            raise UserError(f"{workdir} has files in it but no {_CONFIG}, so it is not a run's folder; "
                            "give another --workdir or empty it")
        if has_checkpoint(workdir):
            free = [*FREE_FIELDS]
            if label_map is None:  # the folder of several trials may be asked for others of them
                free.append("data.trials")
            if not config.data.name.startswith("cuhk03/"):  # for evaluate.datasets alone
                free.append("data.cuhk03_")
            _refuse_difference(workdir, json.loads(config_path.read_text()), json.loads(config.to_json()), tuple(free))
            if label_map is not None and json.loads(labels_path.read_text()) != label_map:
                raise UserError(f"{workdir} was trained on another version of {label_map['dataset']} than the one in "
                                "data.data_dir; give another --workdir, or the data that it was trained on")
        write_atomically(config_path, config.to_json(indent=1))
        if label_map is not None:
            write_atomically(labels_path, json.dumps(label_map))
    except OSError as error:
        raise UserError(f"cannot use the run's folder {workdir}: {error.strerror}; give another --workdir") from error


def await_claimed(workdir: Path) -> None:
    """Waits in other processes than the one that called `claim_workdir` until they see what it wrote."""
    deadline = time.monotonic() + _VISIBLE_WITHIN
    while not (workdir / _CONFIG).exists():
        if time.monotonic() > deadline:
            raise UserError(f"{workdir / _CONFIG}, which process 0 has written, is not seen here; give a --workdir "
                            "that all hosts share")
        time.sleep(0.1)


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """What a finished or unfinished run left."""

    workdir: Path
    config: ml_collections.ConfigDict
    label_map: dict[str, Any]
    step: int  # of the checkpoint
    variables: dict[str, Any]  # params and batch_stats, NumPy arrays


def load_run(workdir: str | Path) -> SavedRun:
    """The config, the label map and the latest weights of the run in `workdir`, to use them elsewhere.

    Raises:
        UserError: there is no run, it has no checkpoint yet, or the checkpoint does not restore.
    """
    workdir = Path(workdir)
    trials = sorted(path.parent.name for path in workdir.glob(f"trial-*/{_LABEL_MAP}"))
    if trials:
        raise UserError(f"{workdir} holds several trials; give one of them, such as {workdir / trials[0]}")
    try:
        config = ml_collections.ConfigDict(_with_tuples(json.loads((workdir / _CONFIG).read_text())))
        label_map = json.loads((workdir / _LABEL_MAP).read_text())
    except OSError as error:
        raise UserError(f"{workdir} is not a run's folder ({error.strerror}: {Path(error.filename).name}); give one "
                        "that jlml_jax.main has made") from error
    except ValueError as error:
        raise UserError(f"{workdir} has a damaged {_CONFIG} or {_LABEL_MAP} ({error}); train again") from error
    if not has_checkpoint(workdir):
        raise UserError(f"{workdir} has no checkpoint yet; train it first")
    step = latest_step(workdir)
    path = (workdir / "checkpoints" / str(step) / "state").absolute()
    try:
        # Each of several processes reads for itself: one that cannot does not leave the others waiting for it.
        alone = ocp.options.MultiprocessingOptions(jax.process_index(), active_processes={jax.process_index()},
                                                   barrier_sync_key_prefix=f"process{jax.process_index()}")
        reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(multiprocessing_options=alone),
                                  multiprocessing_options=alone)
        tree = reader.metadata(path).item_metadata.tree
        wanted = {part: tree[part] for part in ("params", "batch_stats")}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        variables = reader.restore(path, args=ocp.args.PyTreeRestore(wanted, as_numpy, partial_restore=True))
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"checkpoint {step} in {path.parents[1]} does not restore ({str(error)[:200]}); delete that "
                        "folder to take the one before") from error
    return SavedRun(workdir, config, label_map, step, variables)


# Fields of the model that no parameter but those of the identity layers depends on.
_TRANSFERABLE_FIELDS = ("model.loss", "model.norm_momentum")


def refuse_other_network(run: SavedRun, config: ml_collections.ConfigDict) -> None:
    """A UserError if the weights of `run`, apart from the identity layers, are not those of `config.model`."""
    old, new = ({name: value for name, value in flatten({"model": json.loads(c.to_json())["model"]}).items()
                 if name not in _TRANSFERABLE_FIELDS} for c in (run.config, config))
    if differing := _differences(old, new):
        raise UserError(f"init_from={run.workdir} is a run of another network: {', '.join(differing)}; give the same "
                        "fields, or another run")


def load_label_map(workdir: Path) -> dict[str, Any]:
    """The label map of the run in `workdir`, which has a checkpoint."""
    return json.loads((workdir / _LABEL_MAP).read_text())


def _with_tuples(value: Any) -> Any:
    """JSON has no tuples, and the configs have no lists."""
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(value) if isinstance(value, list) else value


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dicts by their dotted paths."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [f"{key} ({old.get(key)!r} there, {new.get(key)!r} here)" for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)]


def _refuse_difference(workdir: Path, old: dict[str, Any], new: dict[str, Any], free: tuple[str, ...]) -> None:
    old, new = ({key: value for key, value in flatten(config).items() if not key.startswith(free)}
                for config in (old, new))
    if differing := _differences(old, new):
        raise UserError(f"{workdir} holds a run with another config: {', '.join(differing)}; "
                        "give another --workdir, or the same fields")


class Checkpoints:
    """The checkpoints of one run: `workdir`/checkpoints/STEP, written aside and renamed when whole."""

    def __init__(self, workdir: Path, keep: int):
        self._manager = ocp.CheckpointManager(
            (workdir / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True),
            item_names=("state", "progress"),
        )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
        """Saves the train state and `progress` (JSON); goes on writing in the background."""
        if step not in self._manager.all_steps():
            self._manager.save(step, args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress)))

    def restore(self, state: Any) -> tuple[Any, dict[str, Any]]:
        """The latest state, with the shapes, types and shardings of `state` (arrays or shapes), and its progress."""
        step = self.latest_step()
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore()))
        except (ValueError, KeyError, OSError) as error:
            raise UserError(f"checkpoint {step} in {self._manager.directory} does not restore "
                            f"({str(error)[:200]}); delete that folder to go on from the one before") from error
        return restored["state"], restored["progress"]

    def wait(self) -> None:
        """Returns when everything saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()
