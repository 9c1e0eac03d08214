"""The folder of a run whose weights come from elsewhere than its own training."""

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from jlml_jax import optim, parallel
from jlml_jax.checkpoints import Checkpoints, SavedRun
from jlml_jax.errors import UserError, storage_errors_told
from jlml_jax.models import build_model, variable_shapes
from jlml_jax.train_step import init_state


@contextlib.contextmanager
def new_folder(workdir: Path, option: str) -> Iterator[Path]:
    """A folder to fill, which is there as `workdir`, the value of `option`, once it is filled, and else not at all.

    Raises:
        UserError: it is there already, or cannot be made.
    """
    with _told_of(workdir, option):
        if workdir.exists():
            raise UserError(f"{workdir} is there already; give another {option}")
        part = workdir.with_name(f"{workdir.name}.{secrets.token_hex(4)}.part")
        part.mkdir(parents=True)
    try:
        with storage_errors_told(workdir.parent):
            yield part
        with _told_of(workdir, option):
            part.rename(workdir)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def _told_of(workdir: Path, option: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # also where another process has made it meanwhile
        raise UserError(f"cannot make {workdir} ({error.strerror}); give another {option}") from error


def write_checkpoint(folder: Path, run: SavedRun) -> None:
    """The checkpoint of a finished run: momentum is gone, and not needed any more.

    Raises:
        UserError: the weights are not those of the network in the run's config.
    """
    config = run.config
    model = build_model(config, sum(len(identities) for identities in run.label_map["identities"].values()))
    expected = flatten_dict(variable_shapes(model, config.data.height, config.data.width), sep=".")
    found = flatten_dict(run.variables, sep=".")
    wrong = sorted(name for name in expected.keys() | found.keys()
                   if name not in expected or name not in found or expected[name].shape != found[name].shape)
    if wrong:
        raise UserError(f"{run.workdir} has weights of another network than its config says, such as {wrong[0]}; "
                        "use the version of jlml_jax that packed it")
    mesh = parallel.make_mesh(jax.local_devices()[:1])
    config = config.copy_and_resolve_references()
    config.keep_identity_layers = True
    state = init_state(config, model, optim.make_optimizer(config.optim, config.train.steps), mesh, run)
    checkpoints = Checkpoints(folder, 1)
    try:
        checkpoints.save(run.step, state.replace(step=parallel.replicate(np.int32(run.step), mesh)), {"interval": {}})
    finally:
        checkpoints.close()
