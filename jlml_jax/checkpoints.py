"""Orbax save and restore of a run, with the config and the label map beside the weights.

A run's folder is written by one process at a time, which holds its lock. A checkpoint is written aside and renamed when
whole, and has the SHA-256 of its files: Orbax would restore flipped bits as if they were weights. One that is damaged
is never used; the one before is.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from configs import default
from jlml_jax import camera_statistics, parallel
from jlml_jax.camera_statistics import CameraStatistics
from jlml_jax.errors import UserError, first_few, storage_errors_told
from jlml_jax.files import lock, user_path, write_atomically

# What may differ between a run and its resumption: it changes what is shown or kept, not what is learned.
FREE_FIELDS = ("name", "data.data_dir", "evaluate.", "log_every", "checkpoint_every", "keep_checkpoints",
               "compilation_cache", "profile", "train.steps_per_dispatch")

# What is in a run's folder.
CONFIG, LABEL_MAP = "config.json", "label_map.json"
RESULTS = "results.json"
TRAINING = "training.json"  # see training_history.py

_VISIBLE_WITHIN = 60  # seconds in which a file made on one host is seen on another; NFS remembers what was not there

_LOCK, _CHECKPOINTS, _DIGESTS = "lock", "checkpoints", "sha256.json"


def _steps(workdir: Path) -> list[int]:
    """The steps of the checkpoints of the run in `workdir`, latest first."""
    return sorted((int(step.name) for step in workdir.glob(f"{_CHECKPOINTS}/*") if step.name.isdigit()), reverse=True)


def has_checkpoint(workdir: Path) -> bool:
    """Whether a run in `workdir` has saved anything yet; a trial's run counts for the folder of all trials."""
    return any(_steps(folder) for folder in (workdir, *workdir.glob("trial-*")))


def latest_step(workdir: Path) -> int | None:
    """The step of the latest checkpoint of the run in `workdir`, whole or not."""
    return next(iter(_steps(workdir)), None)


def digests_path(workdir: Path, step: int) -> Path:
    """The file with the SHA-256 of each file of a checkpoint: another one's, of other weights, is another."""
    return workdir / _CHECKPOINTS / str(step) / _DIGESTS


def claim_workdir(workdir: Path, config: ml_collections.ConfigDict, label_map: dict[str, Any] | None = None
                  ) -> contextlib.ExitStack:
    """Writes config.json and label_map.json into a new run's folder; in one with a checkpoint, refuses another run's.

    `label_map` is JSON: what was trained on, and the identity that each class stands for. The folder of several trials
    has none; each trial has its own.

    Returns what holds the lock on the folder until it is closed; nothing on the folder of several trials, which may be
    trained at the same time.

    Raises:
        UserError: the folder is another run's, is in use, or cannot be written.
    """
    config_path, labels_path = workdir / CONFIG, workdir / LABEL_MAP
    try:
        with contextlib.ExitStack() as held:
            workdir.mkdir(parents=True, exist_ok=True)
            if not config_path.exists() and not all(path.name.startswith((CONFIG, _LOCK))
                                                    for path in workdir.iterdir()):
                raise UserError(f"{workdir} has files in it but no {CONFIG}, so it is not a run's folder; "
                                "give another --workdir or empty it")
            if label_map is not None:
                held.enter_context(lock(workdir / _LOCK, str(workdir), "wait until that has ended, stop it, or give "
                                                                "another --workdir"))
            if has_checkpoint(workdir):
                free = [*FREE_FIELDS]
                if label_map is None:  # the folder of several trials may be asked for others of them
                    free.append("data.trials")
                if "cuhk03/" not in config.data.name:  # for evaluate.datasets alone
                    free.append("data.cuhk03_")
                if "+" not in config.data.name:
                    free.append("data.joined_splits")
                _refuse_difference(workdir, _read_json(config_path), json.loads(config.to_json()), tuple(free))
                # Its fingerprint says who was trained on, and how they are numbered.
                if label_map is not None and any(_read_json(labels_path).get(field) != label_map.get(field)
                                                 for field in ("dataset", "fingerprint")):
                    raise UserError(f"{workdir} was trained on another version of {label_map['dataset']} than the one "
                                    "in data.data_dir; give another --workdir, or the data that it was trained on")
            write_atomically(config_path, config.to_json(indent=1))
            if label_map is not None:
                write_atomically(labels_path, json.dumps(label_map))
            return held.pop_all()
    except OSError as error:
        raise UserError(f"cannot use the run's folder {workdir}: {error.strerror}; give another --workdir") from error


def _read_json(path: Path) -> Any:
    """What is in a file of a run that has a checkpoint."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged or gone ({error}); copy it back from elsewhere, or train in another "
                        "--workdir") from error


def await_claimed(workdir: Path) -> None:
    """Waits in other processes than the one that called `claim_workdir` until they see what it wrote.

    Raises:
        UserError: they are not seen within a minute.
    """
    deadline = time.monotonic() + _VISIBLE_WITHIN
    while not (workdir / CONFIG).exists():
        if time.monotonic() > deadline:
            raise UserError(f"{workdir / CONFIG}, which process 0 has written, is not seen here; give a --workdir "
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
    cameras: CameraStatistics | None = None  # if it has any


def trial_folder(number: int) -> str:
    """The name of the folder that a trial's run has in the one of all trials."""
    return f"trial-{number:02d}"


def trial_folders(workdir: Path) -> list[Path]:
    """The folders of the trials that a run of several has begun in `workdir`; none of any other run."""
    return sorted(path.parent for path in workdir.glob(f"trial-*/{LABEL_MAP}"))


def read_description(workdir: Path) -> tuple[ml_collections.ConfigDict, dict[str, Any]]:
    """The config and the label map of the run in `workdir`; fields that came after it have their defaults.

    Raises:
        UserError: there is no run, or one of the two is damaged.
    """
    if trials := trial_folders(workdir):
        raise UserError(f"{workdir} holds several trials; give one of them, such as {trials[0]}")
    try:
        config = default.get_config()  # of fields that came after the run
        with config.unlocked():
            config.update(_with_tuples(json.loads((workdir / CONFIG).read_text())))
        label_map = json.loads((workdir / LABEL_MAP).read_text())
        if not isinstance(label_map, dict) or {"dataset", "fingerprint", "identities", "init_from"} - label_map.keys():
            raise ValueError(f"{LABEL_MAP} lacks fields")
    except OSError as error:
        raise UserError(f"{workdir} is not a run's folder ({error.strerror}: {Path(error.filename).name}); give one "
                        "that jlml_jax.main or jlml_jax.unpack has made") from error
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{workdir} has a damaged {CONFIG} or {LABEL_MAP} ({error}); train again") from error
    return config, label_map


def load_finished_run(workdir: str | Path) -> SavedRun:
    """`load_run`, for what is made of a run without its momentum, and so could not be trained on as it was begun.

    Raises:
        UserError: as `load_run`, or the run has not ended.
    """
    run = load_run(workdir)
    if run.step < run.config.train.steps:
        raise UserError(f"{workdir} is at step {run.step} of {run.config.train.steps}; train it to its end first")
    return run


def load_run(workdir: str | Path) -> SavedRun:
    """The config, the label map and the latest whole weights of the run in `workdir`, to use them elsewhere.

    Raises:
        UserError: there is no run, it has no checkpoint yet, or none of them is whole.
    """
    workdir = user_path(workdir)
    config, label_map = read_description(workdir)
    if not has_checkpoint(workdir):
        raise UserError(f"{workdir} has no checkpoint yet; train it first")
    step, damaged = _latest_whole(workdir)
    for line in damaged.values():
        print(f"{line}; taking checkpoint {step} instead", file=sys.stderr)
    path = (workdir / _CHECKPOINTS / str(step) / "state").absolute()
    try:
        # Each of several processes reads for itself: one that cannot does not leave the others waiting for it.
        alone = ocp.options.MultiprocessingOptions(jax.process_index(), active_processes={jax.process_index()},
                                                   barrier_sync_key_prefix=f"process{jax.process_index()}")
        reader = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
        wanted = _saved_tree(path, ("params", "batch_stats"))
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        variables = reader.restore(path, args=ocp.args.PyTreeRestore(wanted, as_numpy, partial_restore=True))
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"checkpoint {step} in {path.parents[1]} does not restore ({str(error)[:200]}); it is as it "
                        "was written, perhaps by other versions of JAX, Flax or Orbax: use those") from error
    cameras = camera_statistics.read(workdir / camera_statistics.FILE, variables["batch_stats"])
    return SavedRun(workdir, config, label_map, step, variables, cameras)


def _saved_tree(state: Path, parts: Collection[str]) -> dict[str, Any]:
    """Those `parts` of the tree that Orbax has saved in `state`, with zeros in the place of arrays.

    Orbax's own `metadata` opens every array for its shape, the momentum's too, which takes longer than to read the
    weights.
    """
    described = json.loads((state / "_METADATA").read_text())["tree_metadata"].values()
    names = [tuple(level["key"] for level in array["key_metadata"]) for array in described]
    return unflatten_dict({name: 0 for name in names if name[0] in parts})


def refuse_other_network(run: SavedRun, config: ml_collections.ConfigDict) -> None:
    """A UserError if the weights of `run` that are taken over are not those of `config.model`."""
    independent = {"model.norm_momentum"}  # fields that none of these weights depends on
    if not config.keep_identity_layers:
        independent |= {"model.cosine_scale", "model.loss"}
    old, new = ({name: value for name, value in with_defaults(json.loads(one.to_json())).items()
                 if name.startswith("model.") and name not in independent} for one in (run.config, config))
    if differing := _differences(old, new):
        raise UserError(f"init_from={run.workdir} is a run of another network: {', '.join(differing)}; give the same "
                        "fields, or another run")


def read_results(workdir: Path) -> dict[str, Any] | None:
    """What results.json of a run has, `rows` and `provenance`; None if the run was not evaluated yet.

    Raises:
        UserError: it is damaged.
    """
    path = workdir / RESULTS
    if not path.exists():
        return None
    try:
        results = json.loads(path.read_text())
        if not (isinstance(results, dict) and isinstance(results.get("rows"), list)
                and isinstance(results.get("provenance"), dict)):
            raise ValueError("it lacks rows or provenance")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} does not read ({error}); evaluate the run again with --mode=evaluate") from error
    return results


def load_label_map(workdir: Path) -> dict[str, Any]:
    """The label map of the run in `workdir`, which has a checkpoint."""
    return _read_json(workdir / LABEL_MAP)


def _with_tuples(value: Any) -> Any:
    """JSON has no tuples, and the configs have no lists."""
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(value) if isinstance(value, list) else value


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """The leaves of a config by their dotted paths, as JSON has them; fields that came after it have their defaults."""
    defaults = json.loads(default.get_config().to_json())
    return flatten_dict(defaults, sep=".") | flatten_dict(config, sep=".")


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [f"{key} ({old.get(key)!r} there, {new.get(key)!r} here)" for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)]


def _refuse_difference(workdir: Path, old: dict[str, Any], new: dict[str, Any], free: tuple[str, ...]) -> None:
    old, new = ({key: value for key, value in with_defaults(config).items() if not key.startswith(free)}
                for config in (old, new))
    if differing := _differences(old, new):
        raise UserError(f"{workdir} holds a run with another config: {', '.join(differing)}; "
                        "give another --workdir, or the same fields")


def _damage(checkpoint: Path) -> str | None:
    """Which of a checkpoint's files is not as it was written, in words; None: it is whole."""
    path = checkpoint / _DIGESTS
    try:
        for name, digest in json.loads(path.read_text()).items():
            path = checkpoint / name
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return f"{path} is damaged"
    except OSError as error:
        return f"{path} is damaged ({error.strerror})"
    except ValueError:
        return f"{path} is damaged"
    return None


def _latest_whole(workdir: Path) -> tuple[int, dict[int, str]]:
    """The latest checkpoint that is whole, of at least one, and what is wrong with each that is later."""
    damaged = {}
    for step in _steps(workdir):
        damage = _damage(workdir / _CHECKPOINTS / str(step))
        if damage is None:
            return step, damaged
        damaged[step] = damage
    raise UserError(f"no checkpoint in {workdir / _CHECKPOINTS} is whole: {first_few([*damaged.values()])}; copy the "
                    "folder back from elsewhere, or delete the run's folder to train it anew")


def set_aside_damaged(workdir: Path) -> None:
    """Renames checkpoints that are later than the latest whole one, so that the run goes on from that.

    Raises:
        UserError: there are checkpoints, but none is whole; they are left as they are.
    """
    if latest_step(workdir) is None:
        return
    whole, damaged = _latest_whole(workdir)
    for step, damage in damaged.items():
        path = workdir / _CHECKPOINTS / str(step)
        aside = path.with_name(f"{step}.damaged")
        shutil.rmtree(aside, ignore_errors=True)  # of the same step, earlier
        path.rename(aside)
        print(f"{damage}: checkpoint {step} is set aside as {aside.name}; going on from checkpoint {whole}", flush=True)


class Checkpoints:
    """The checkpoints of one run: `workdir`/checkpoints/STEP, written aside and renamed when whole."""

    def __init__(self, workdir: Path, keep: int):
        self._folder = (workdir / _CHECKPOINTS).absolute()
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                cleanup_tmp_directories=True,  # of saves that a kill cut short
                single_host_load_and_broadcast=True,  # other hosts may be told by NFS of what is no longer there
                async_options=ocp.AsyncOptions(
                    create_directories_asynchronously=False,  # else five minutes pass until a failure is told
                    post_finalization_callback=self._write_digests)),
            item_names=("state", "progress"),
        )

    def _write_digests(self) -> None:
        """Called in process 0 when all processes have written all of a checkpoint, before it is renamed."""
        checkpoint = next(self._folder.glob("*.orbax-checkpoint-tmp"))
        files = sorted(path for path in checkpoint.glob("*/**/*") if path.is_file())
        digests = {}
        for path in files:
            with open(path, "rb") as file:
                digests[str(path.relative_to(checkpoint))] = hashlib.file_digest(file, "sha256").hexdigest()
        write_atomically(checkpoint / _DIGESTS, json.dumps(digests, indent=1))

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
        """Saves the train state and `progress` (JSON); goes on writing in the background.

        Raises:
            UserError: there is no room. What goes wrong in the background is raised by the next call.
        """
        if step in self._manager.all_steps():
            return
        num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        parallel.on_first_process(lambda: self._check_room(num_bytes))
        self._manager.save(step, args=ocp.args.Composite(
            state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress)))

    def _check_room(self, num_bytes: int) -> None:
        """Orbax tells of a full disk, or a quota, late and in tracebacks of its threads."""
        with storage_errors_told(self._folder), tempfile.TemporaryFile(dir=self._folder) as file:
            num_bytes += 1 << 20  # what describes the arrays
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            else:  # on macOS
                file.write(bytes(num_bytes))

    def restore(self, state: Any) -> tuple[Any, dict[str, Any]]:
        """The latest state, with the shapes, types and shardings of `state` (arrays or shapes), and its progress.

        Raises:
            UserError: no checkpoint is whole, or the latest whole one is of another network or does not read.
        """
        step = self.latest_step()
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore()))
        except (ValueError, KeyError, OSError) as error:
            raise UserError(f"checkpoint {step} in {self._folder} does not restore ({str(error)[:200]}); it is as it "
                            "was written, perhaps by other versions of JAX, Flax or Orbax: use those") from error
        return restored["state"], restored["progress"]

    def wait(self) -> None:
        """Returns when everything saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()
