"""Makes a run's folder of a packed run: the pre-trained one that comes with jlml_jax, or a file that pack has made."""

import json
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jlml_jax import calibration, camera_statistics
from jlml_jax.arguments import Parser
from jlml_jax.checkpoints import CONFIG, LABEL_MAP, RESULTS, TRAINING, SavedRun, read_description
from jlml_jax.errors import UserError, exit_status
from jlml_jax.files import user_path
from jlml_jax.new_run import new_folder, write_checkpoint
from jlml_jax.pack import ABOUT, FORMAT, WEIGHTS

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
    workdir, file = user_path(workdir), user_path(file)
    with new_folder(workdir, "--workdir") as part:
        step, variables, files = _extract(file)
        for name, content in files.items():
            (part / name).write_bytes(content)
        try:
            config, label_map = read_description(part)
        except UserError as error:  # which names a folder that will be gone
            raise _damaged(file, error.__cause__) from error
        write_checkpoint(part, SavedRun(file, config, label_map, step, variables))
    print(f"{workdir}: trained on {label_map['dataset']}, {config.data.height}x{config.data.width}, step {step}")


def _extract(file: Path) -> tuple[int, dict[str, Any], dict[str, bytes]]:
    """The step of the run, its weights, float32, and the files beside them, by name."""
    variables = {}
    try:
        with _opened(file) as opened, zipfile.ZipFile(opened) as archive:
            about = json.loads(archive.read(ABOUT))
            if about["format"] != FORMAT:
                raise UserError(f"{file} is of format {about['format']}, known is {FORMAT}; use a version of jlml_jax "
                                "no older than the one that packed it")
            names = archive.namelist()
            others = {RESULTS, TRAINING, calibration.FILE, camera_statistics.FILE}
            files = {name: archive.read(name) for name in (CONFIG, LABEL_MAP, *others.intersection(names))}
            for name in names:
                if name.startswith(WEIGHTS):
                    with archive.open(name) as member:
                        array = np.load(member, allow_pickle=False)
                    *path, leaf = name.removeprefix(WEIGHTS).removesuffix(".npy").split(".")
                    place = variables
                    for part in path:
                        place = place.setdefault(part, {})
                    place[leaf] = np.asarray(array, np.float32)
            return int(about["step"]), variables, files
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy raise whatever the bytes lead them to
        raise _damaged(file, error) from error


def _opened(file: Path) -> BinaryIO:
    try:
        return open(file, "rb")
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}); give one that jlml_jax.pack has made") from error


def _damaged(file: Path, error: BaseException | None) -> UserError:
    return UserError(f"{file} is damaged or no packed run ({error}); get it again")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command with `arguments` (None: the process's own); returns its exit status."""
    parser = Parser("jlml_jax.unpack", __doc__, _EXAMPLE)
    parser.add_argument("--workdir", required=True, metavar="RUN", help="the folder to make")
    parser.add_argument("--file", default=PRETRAINED, metavar="FILE",
                        help="what jlml_jax.pack has written (default: the pre-trained run that comes with jlml_jax)")
    options = parser.parse_args(arguments)
    return exit_status(lambda: unpack(options.workdir, options.file))


if __name__ == "__main__":
    sys.exit(main())
