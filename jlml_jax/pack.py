"""Packs a finished run into one file, to hand it on: half the weights' bytes, nothing of its images."""

import dataclasses
import io
import json
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from jlml_jax import calibration, camera_statistics, parallel, result_rows
from jlml_jax.arguments import Parser
from jlml_jax.checkpoints import CONFIG, LABEL_MAP, RESULTS, TRAINING, load_finished_run, read_results
from jlml_jax.datasets import synthetic_drawing
from jlml_jax.errors import UserError, exit_status
from jlml_jax.extractor import Extractor
from jlml_jax.files import check_output, user_path, write_output

FORMAT = 1
# Members of the archive beside those of a run's folder; weights are arrays of NumPy's format, by their dotted paths.
ABOUT, WEIGHTS = "about.json", "weights/"
TOLERANCE = 1e-2  # of the features, relative to their norm
_CROPS = 5

_EXAMPLE = """The file is a zip archive of the config, the label map, the results, the commands that trained it, the
thresholds if calibrate has measured them for these very weights, the statistics by camera if adapt has made any, and
the weights, matrices and kernels in float16: by how much that moves the features of drawn people is told. python -m
jlml_jax.unpack makes a run's folder of it.

example:
  python -m jlml_jax.pack --workdir=runs/market1501 --output=market1501.zip
"""


def pack(workdir: str | Path, output: str | Path) -> None:
    """Writes the run in `workdir` to the file `output`.

    Raises:
        UserError: the run does not load or has not ended, `output` cannot be written, or float16 is too coarse for
            these weights. Nothing is written then.
    """
    output = user_path(output)
    check_output(output)
    run = load_finished_run(workdir)
    packed = jax.tree.map(_rounded, run.variables)
    mesh = parallel.make_mesh(jax.local_devices()[:1])
    before, after = (Extractor(dataclasses.replace(run, variables=variables), mesh)
                     for variables in (run.variables, jax.tree.map(np.float32, packed)))
    error = _difference(before, after)
    if not error <= TOLERANCE:  # also where it is NaN
        raise UserError(f"the weights of {workdir} do not fit into float16: features would differ by {error:.1e} of "
                        f"their norm, {TOLERANCE:.0e} is allowed; hand on the run's folder itself")
    try:
        calibrated = calibration.load(run.workdir, after) is not None
    except UserError:
        calibrated = False
        print(f"{calibration.FILE} is left out, as it is not of the rounded weights: to hand on thresholds, unpack the "
              "file, calibrate that run, and pack it")
    results = read_results(run.workdir)
    settings = result_rows.settings_of(run.config.evaluate)
    if results is not None and results["provenance"].get(result_rows.SETTINGS, settings) != settings:
        results = None
        print(f"{RESULTS} is left out, as it is by another {' or '.join(settings)} than {CONFIG} has now: to hand it "
              "on, evaluate the run again")
    if results is not None and (step := results["provenance"].get("steps", run.step)) != run.step:
        results = None
        print(f"{RESULTS} is left out, as it is of step {step}, not {run.step}: to hand it on, evaluate the run again")
    config = run.config.copy_and_resolve_references()
    config.data.data_dir = ""  # a place on this machine
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(ABOUT, json.dumps({"format": FORMAT, "step": run.step}))
        archive.writestr(CONFIG, config.to_json(indent=1))
        archive.writestr(LABEL_MAP, json.dumps(run.label_map))
        if results is not None:
            archive.writestr(RESULTS, json.dumps(results, indent=1))
        if (run.workdir / TRAINING).exists():
            archive.write(run.workdir / TRAINING, TRAINING)
        if calibrated:
            archive.write(run.workdir / calibration.FILE, calibration.FILE)
        if run.cameras:
            archive.writestr(camera_statistics.FILE, camera_statistics.to_bytes(run.cameras))
        for name, array in flatten_dict(packed, sep=".").items():
            with archive.open(f"{WEIGHTS}{name}.npy", "w") as member:
                np.save(member, array, allow_pickle=False)
    write_output(output, content.getvalue())
    print(f"wrote {output}, {content.tell() / 1e6:.1f} MB, from step {run.step} of {workdir}\n"
          f"its features of {_CROPS} drawn people are the run's to {error:.1e} of their norm")


def _rounded(array: np.ndarray) -> np.ndarray:
    """Vectors, such as BN's statistics, are few bytes and may be of any size."""
    return array.astype(np.float16) if array.ndim > 1 else array


def _difference(before: Extractor, after: Extractor) -> float:
    """The largest distance between their features of the same drawn people, relative to the former's norm."""
    crops = synthetic_drawing.draw_crops(_CROPS, before.height, before.width)
    ours, theirs = before(crops), after(crops)
    return float(np.max(np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(ours, axis=1)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command with `arguments` (None: the process's own); returns its exit status."""
    parser = Parser("jlml_jax.pack", __doc__, _EXAMPLE)
    parser.add_argument("--workdir", required=True, metavar="RUN", help="folder of a trained run")
    parser.add_argument("--output", required=True, metavar="FILE", help="what to write, or to replace")
    options = parser.parse_args(arguments)
    return exit_status(lambda: pack(options.workdir, options.output))


if __name__ == "__main__":
    sys.exit(main())
