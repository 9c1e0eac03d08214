"""Makes a run's folder of a packed run: the pre-trained one that comes with jlml_jax, or a file that pack has made."""

import argparse
import json
import secrets
import shutil
import sys
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jlml_jax import calibration, optim, parallel
from jlml_jax.checkpoints import Checkpoints, SavedRun, flatten, read_description
from jlml_jax.errors import UserError, exit_status, storage_errors_told
from jlml_jax.models import build_model, variable_shapes
from jlml_jax.pack import ABOUT, CONFIG, FORMAT, LABEL_MAP, RESULTS, WEIGHTS
from jlml_jax.train_step import init_state

PRETRAINED = Path(__file__).parent / "pretrained" / "market1501.zip"

_EXAMPLE = f"""The folder is that of a finished run: every command takes it, and a new run can start from it. Whom the
pre-trained one was trained on, how well it does and on what terms: {PRETRAINED.parent}/README.md.

examples:
  python -m jlml_jax.unpack --workdir=runs/pretrained
  python -m jlml_jax.unpack --workdir=runs/theirs --file=theirs.zip
"""


def unpack(workdir: str | Path, file: str | Path = PRETRAINED) -> None:
    """Writes the run in `file` to the new folder `workdir`, whole or not at all.

    Raises:
        UserError: `workdir` is there already or cannot be written, or `file` is no packed run, or damaged.
    """
    workdir, file = Path(workdir), Path(file).expanduser()
    if workdir.exists():
        raise UserError(f"{workdir} is there already; give another --workdir")
    part = workdir.with_name(f"{workdir.name}.{secrets.token_hex(4)}.part")
    try:
        with storage_errors_told(workdir.parent):
            part.mkdir(parents=True)
            step, variables = _extract(file, part)
            try:
                config, label_map = read_description(part)
            except UserError as error:  # which names a folder that will be gone
                raise _damaged(file, error.__cause__) from error
            _write_checkpoint(part, SavedRun(file, config, label_map, step, variables))
            part.rename(workdir)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{workdir}: trained on {label_map['dataset']}, {config.data.height}x{config.data.width}, step {step}")


def _extract(file: Path, folder: Path) -> tuple[int, dict[str, Any]]:
    """Writes the files of a run into `folder`, and returns its step and its weights, float32."""
    variables = {}
    try:
        with zipfile.ZipFile(file) as archive:
            about = json.loads(archive.read(ABOUT))
            if about["format"] != FORMAT:
                raise UserError(f"{file} is of format {about['format']}, known is {FORMAT}; use a version of jlml_jax "
                                "no older than the one that packed it")
            names = archive.namelist()
            for name in (CONFIG, LABEL_MAP, *{RESULTS, calibration.FILE}.intersection(names)):
                (folder / name).write_bytes(archive.read(name))
            for name in names:
                if name.startswith(WEIGHTS):
                    with archive.open(name) as member:
                        array = np.load(member, allow_pickle=False)
                    *path, leaf = name.removeprefix(WEIGHTS).removesuffix(".npy").split(".")
                    place = variables
                    for part in path:
                        place = place.setdefault(part, {})
                    place[leaf] = np.asarray(array, np.float32)
            return int(about["step"]), variables
    except FileNotFoundError as error:
        raise UserError(f"there is no file {file}; give one that jlml_jax.pack has made") from error
    except (zipfile.BadZipFile, zlib.error, AttributeError, EOFError, LookupError, MemoryError, NotImplementedError,
            TypeError, ValueError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: BaseException | None) -> UserError:
    return UserError(f"{file} is damaged or no packed run ({error}); get it again")


def _write_checkpoint(folder: Path, run: SavedRun) -> None:
    """The checkpoint of a finished run: momentum is gone, and not needed any more."""
    config = run.config
    model = build_model(config, sum(len(identities) for identities in run.label_map["identities"].values()))
    expected = flatten(variable_shapes(model, config.data.height, config.data.width))
    found = flatten(run.variables)
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command with `arguments` (None: the process's own); returns its exit status."""
    parser = argparse.ArgumentParser(
        "python -m jlml_jax.unpack", description=__doc__, epilog=_EXAMPLE, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, metavar="RUN", help="the folder to make")
    parser.add_argument("--file", default=PRETRAINED, metavar="FILE",
                        help="what jlml_jax.pack has written (default: the pre-trained run that comes with jlml_jax)")
    options = parser.parse_args(arguments)
    return exit_status(lambda: unpack(options.workdir, options.file))


if __name__ == "__main__":
    sys.exit(main())
